// The nominal step on many tensors, in one pass over memory. reference.nominal_step is the definition.
//
// Tensors are cut into blocks of BLOCK coordinates, whatever the number of threads. A block leaves its sums, in
// double, which are added up in the blocks' order: so they are the same on any number of threads. The loop over
// coordinates is plain, and the compiler makes vectors of it.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

constexpr int64_t BLOCK = 8192, CHUNK = 1024;  // a chunk's operands stay in L1 cache
constexpr int SUMS = 3;

struct Tensor {  // a row of the table of whole numbers
    void* target;      // theta [count], or where the direction goes
    const void* grad;  // [count]
    int64_t offset;    // of its first coordinate in each row of the statistics
    int64_t count;
    int64_t target_is_bfloat16, grad_is_bfloat16, moves;
};

template <class T> struct Sizes { T size, decay; };  // a row of the table of numbers

struct Coefficients { double w_fast, w_slow, w_square, fast, gradient, slow, square, shrink; };

template <class T> struct Arguments {
    int64_t num_tensors;
    const Tensor* tensors;
    const Sizes<T>* sizes;   // null: only the sums are wanted
    int64_t N;               // the length of a row of the statistics
    T* statistics;           // [3, N], or [2, N] where m and m2 share a word
    Coefficients coefficients;
    double sign;             // -1 to ascend
    double* sums;            // [num_tensors, SUMS]
};

float widen(uint16_t x) {
    const uint32_t bits = uint32_t(x) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

uint16_t narrow(float x) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// A chunk of a tensor as numbers of type T: in place if they are, else by way of a buffer.
template <class T> class View {
    T buffer[CHUNK];

  public:
    const T* read(const void* from, int64_t start, int64_t n, bool is_bfloat16) {
        if (!is_bfloat16) return (const T*)from + start;
        const uint16_t* halves = (const uint16_t*)from + start;
        for (int64_t i = 0; i < n; ++i) buffer[i] = widen(halves[i]);
        return buffer;
    }

    T* to_write(void* to, int64_t start, bool is_bfloat16) { return is_bfloat16 ? buffer : (T*)to + start; }

    void written(void* to, int64_t start, int64_t n, bool is_bfloat16) {
        if (!is_bfloat16) return;
        uint16_t* halves = (uint16_t*)to + start;
        for (int64_t i = 0; i < n; ++i) halves[i] = narrow(buffer[i]);
    }
};

// m and m2 in one word, each rounded to half of its bits: m is the upper half, and m2 the lower.
template <class T> struct Halves;

template <> struct Halves<float> {
    static uint32_t rounded(float x) {  // as narrow, where it is
        uint32_t bits;
        std::memcpy(&bits, &x, sizeof bits);
        return x != x ? 0x7fc00000 : (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000;
    }
    static float number(uint32_t bits) {
        float result;
        std::memcpy(&result, &bits, sizeof result);
        return result;
    }
    static void split(float word, float& m, float& m2) {
        uint32_t bits;
        std::memcpy(&bits, &word, sizeof bits);
        m = number(bits & 0xffff0000), m2 = number(bits << 16);
    }
    static float join(float& m, float& m2) {  // rounds both
        const uint32_t high = rounded(m), low = rounded(m2);
        m = number(high), m2 = number(low);
        return number(high | (low >> 16));
    }
};

template <> struct Halves<double> {
    static void split(double word, double& m, double& m2) {
        uint64_t bits;
        std::memcpy(&bits, &word, sizeof bits);
        m = Halves<float>::number(uint32_t(bits >> 32)), m2 = Halves<float>::number(uint32_t(bits));
    }
    static double join(double& m, double& m2) {
        const float narrow[2] = {float(m2), float(m)};
        uint32_t halves[2];
        std::memcpy(halves, narrow, sizeof halves);
        const uint64_t bits = uint64_t(halves[1]) << 32 | halves[0];
        m = narrow[1], m2 = narrow[0];
        double word;
        std::memcpy(&word, &bits, sizeof word);
        return word;
    }
};

template <class T, bool SHARED> struct Rows {  // SHARED: m and m2 are in fast, and slow is not used
    T *fast, *slow, *square;

    Rows(T* first, int64_t stride)
        : fast(first), slow(SHARED ? first : first + stride), square(first + (SHARED ? 1 : 2) * stride) {}
};

// A step of one chunk, which returns nothing but through its pointers. There is one loop for all that is asked
// of it: how a compiler cuts it into vectors decides in which order it adds, and the sums of a step must be those
// that are formed anew when a run is resumed. The sums, in double, cost next to nothing beside the root and the
// division.
template <class T, bool SHARED>
__attribute__((noinline)) void update(Rows<T, SHARED> from, Rows<T, SHARED> to, const T* grad, const T* theta,
                                      T* target, int64_t n, Sizes<T> sizes, const Coefficients& c, T sign,
                                      double* sums) {
    const T fast = c.fast, gradient = c.gradient, slow = c.slow, square = c.square;
    const T size = sizes.size, shrink = c.shrink, both = shrink + sizes.decay;
    const T w_fast = c.w_fast, w_slow = c.w_slow, w_square = c.w_square;
    constexpr T TINY = std::numeric_limits<T>::min();
    const T *old_fast = from.fast, *old_slow = from.slow, *old_square = from.square;
    T *to_fast = to.fast, *to_slow = to.slow, *to_square = to.square;
    double sum_fast = 0, sum_slow = 0, sum_square = 0;
#pragma omp simd reduction(+ : sum_fast, sum_slow, sum_square)
    for (int64_t i = 0; i < n; ++i) {
        const T g = sign * grad[i], v = old_square[i];
        T m = old_fast[i], m2 = old_slow[i];
        if constexpr (SHARED) Halves<T>::split(old_fast[i], m, m2);
        T new_m = m + w_fast * (g - m), new_m2 = m2 + w_slow * (g - m2), word = 0;
        if constexpr (SHARED) word = Halves<T>::join(new_m, new_m2);
        const T new_v = v + w_square * (g * g - v);
        const T mean_square = new_v * square;
        const T inverse = mean_square > 0 ? 1 / std::sqrt(std::max(mean_square, TINY)) : T(0);
        const T direction = (fast * new_m + gradient * g + slow * new_m2) * inverse;
        if constexpr (SHARED) to_fast[i] = word;
        else to_fast[i] = new_m, to_slow[i] = new_m2;
        to_square[i] = new_v;
        target[i] = theta[i] - (inverse > 0 ? both : shrink) * theta[i] - size * direction;
        sum_fast += double(new_m) * double(new_m);
        sum_slow += double(new_m2) * double(new_m2);
        sum_square += double(new_v);
    }
    sums[0] += sum_fast, sums[1] += sum_slow, sums[2] += sum_square;
}

template <class T, bool SHARED> void step_block(const Arguments<T>& a, int64_t index, int64_t start, double* sums) {
    static const T zeros[CHUNK] = {};
    const Tensor& tensor = a.tensors[index];
    const Sizes<T> sizes = tensor.moves ? a.sizes[index] : Sizes<T>{-1, 0};  // 0 - 0 + direction
    View<T> grads, targets;
    for (int64_t end = std::min(tensor.count, start + BLOCK); start < end; start += CHUNK) {
        const int64_t n = std::min(CHUNK, end - start);
        const Rows<T, SHARED> rows(a.statistics + tensor.offset + start, a.N);
        const T* grad = grads.read(tensor.grad, start, n, tensor.grad_is_bfloat16);
        const T* theta = zeros;
        if (tensor.moves) theta = targets.read(tensor.target, start, n, tensor.target_is_bfloat16);
        T* target = targets.to_write(tensor.target, start, tensor.target_is_bfloat16);
        update(rows, rows, grad, theta, target, n, sizes, a.coefficients, T(a.sign), sums);
        targets.written(tensor.target, start, n, tensor.target_is_bfloat16);
    }
}

// The sums alone: a step that gives the newest gradient no weight, and that nobody sees.
template <class T, bool SHARED> void sum_block(const Arguments<T>& a, int64_t index, int64_t start, double* sums) {
    static const T zeros[CHUNK] = {};
    T unseen[4 * CHUNK];
    const Tensor& tensor = a.tensors[index];
    for (int64_t end = std::min(tensor.count, start + BLOCK); start < end; start += CHUNK) {
        const Rows<T, SHARED> rows(a.statistics + tensor.offset + start, a.N);
        update(rows, Rows<T, SHARED>(unseen, CHUNK), zeros, zeros, unseen + 3 * CHUNK, std::min(CHUNK, end - start),
               Sizes<T>{}, Coefficients{}, T(1), sums);
    }
}

template <class T, bool SHARED> void nominal(int64_t threads, const Arguments<T>& a) {
    struct Block { int64_t tensor, start; };
    std::vector<Block> blocks;
    for (int64_t i = 0; i < a.num_tensors; ++i)
        for (int64_t start = 0; start < a.tensors[i].count; start += BLOCK) blocks.push_back({i, start});
    const int64_t count = blocks.size();
    std::vector<double> partials(count * SUMS, 0.0);
    const int team = std::max(int64_t(1), std::min(threads, count));
    (void)team;  // unused without OpenMP
#pragma omp parallel for num_threads(team) schedule(dynamic, 2)
    for (int64_t i = 0; i < count; ++i)
        (a.sizes ? step_block<T, SHARED> : sum_block<T, SHARED>)(a, blocks[i].tensor, blocks[i].start, &partials[i * SUMS]);
    std::fill_n(a.sums, a.num_tensors * SUMS, 0.0);
    for (int64_t i = 0; i < count; ++i)
        for (int k = 0; k < SUMS; ++k) a.sums[blocks[i].tensor * SUMS + k] += partials[i * SUMS + k];
}

struct Head {
    double of_counts_fast, of_counts_slow, low, high, of_fast, of_slow, limit, scale, of_decay, most_decay;
};

template <class T>
void sizes_of(int64_t num_tensors, const double* sums, const T* log_sizes, const T* decays, const Head& h,
              Sizes<T>* sizes) {
    for (int64_t i = 0; i < num_tensors; ++i) {
        const double fast = sums[i * SUMS], slow = sums[i * SUMS + 1], square = sums[i * SUMS + 2];
        const bool known = square > 0 && square < INFINITY;
        const auto log_snr = [&](double signal, double correction) {
            return known ? std::clamp(std::log(signal / square) + correction, h.low, h.high) : 0.0;
        };
        const double log_fast = log_snr(fast, h.of_counts_fast), log_slow = log_snr(slow, h.of_counts_slow);
        const double log_size = log_sizes[i] + h.of_fast * log_fast + h.of_slow * log_slow;
        const double size = std::exp(std::min(log_size, h.limit)) * h.scale;
        const double decay = size * decays[i] * std::exp(h.of_decay * log_fast);
        sizes[i] = {T(size), T(std::min(decay, h.most_decay))};
    }
}

}  // namespace

#define EXPORT(T, name)                                                                                       \
    extern "C" void nominal_##name(int64_t threads, int64_t num_tensors, const Tensor* tensors,               \
                                   const Sizes<T>* sizes, int64_t shared, int64_t N, T* statistics,           \
                                   const Coefficients* coefficients, double sign, double* sums) {             \
        (shared ? nominal<T, true> : nominal<T, false>)(                                                      \
            threads, {num_tensors, tensors, sizes, N, statistics, *coefficients, sign, sums});                \
    }                                                                                                         \
    extern "C" void nominal_sizes_##name(int64_t num_tensors, const double* sums, const T* log_sizes,         \
                                         const T* decays, const Head* head, Sizes<T>* sizes) {                \
        sizes_of<T>(num_tensors, sums, log_sizes, decays, *head, sizes);                                      \
    }

EXPORT(float, float32)
EXPORT(double, float64)
