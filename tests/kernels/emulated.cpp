// Runs one step and one window's backward on what stands in a file, and writes the results into another: for
// machines that are emulated, where nothing else of this project runs. test_emulated.py writes and reads them.

#include <cstdint>
#include <cstdio>
#include <vector>

struct Spec;
extern "C" {
void step_float32_float32(int64_t, const Spec*, int64_t, float*, const float*, const float*, float*, const float*);
void bptt_float32_float32(int64_t, const Spec*, int64_t, int64_t, const float*, const float*, const float*,
                          const float*, const float*, float*, float*);
const char* instruction_set();
}

int main(int, char** arguments) {
    FILE* file = std::fopen(arguments[1], "rb");
    char spec[7 * 8];
    int64_t sizes[6];  // N, T, then of a step's inputs, a state, phi
    if (!file || !std::fread(spec, sizeof spec, 1, file) || !std::fread(sizes, sizeof sizes, 1, file)) return 1;
    const int64_t N = sizes[0], T = sizes[1], inputs = sizes[2], state = sizes[3], phi = sizes[4];
    const auto read = [&](int64_t count) {
        std::vector<float> values(count);
        if (std::fread(values.data(), 4, count, file) != size_t(count)) values.clear();
        return values;
    };
    const auto theta = read(N), x = read(T * inputs), history = read((T + 1) * state), d_updates = read(T * N);
    const auto d_final = read(state), weights = read(phi);
    std::vector<float> new_theta = theta, new_state(state), d_phi(phi), d_state(state);
    const Spec* cell = (const Spec*)spec;
    step_float32_float32(1, cell, N, new_theta.data(), x.data(), history.data(), new_state.data(), weights.data());
    bptt_float32_float32(1, cell, N, T, x.data(), history.data(), d_updates.data(), d_final.data(), weights.data(),
                         d_phi.data(), d_state.data());
    FILE* results = std::fopen(arguments[2], "wb");
    for (const auto* values : {&new_theta, &new_state, &d_phi, &d_state})
        std::fwrite(values->data(), 4, values->size(), results);
    std::fclose(results);
    std::puts(instruction_set());
    return 0;
}
