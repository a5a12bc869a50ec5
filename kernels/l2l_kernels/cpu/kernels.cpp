// The coordinatewise LSTM on CPU vectors: one step, and a window's backward. reference.py is the definition.
//
// Plain C++ with GCC/Clang vector extensions and a C interface: no headers of PyTorch, so that it compiles in
// seconds with whatever compiler the machine has, for exactly the machine's instruction set.
//
// Coordinates are innermost everywhere, so a vector holds one quantity of LANES neighbouring coordinates and
// no step of the computation crosses lanes. The work is cut three times:
//   slice  the unit of a thread, and of the deterministic sum of weight gradients;
//   chunk  CHUNK coordinates whose operands stay in L2 cache: all layers of a step, all steps of a backward;
//   tile   TILE = TILE_VECTORS * LANES coordinates: 4 x TILE_VECTORS accumulators stay in registers.
// A product W x is formed for the four gates of one hidden unit at a time, so gates are activated in registers
// and the pre-activations never exist in memory.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

namespace {

constexpr int VECTOR_BYTES = 64;
#ifdef __AVX512F__
constexpr int TILE_VECTORS = 4;  // 16 accumulators of the 32 registers
#else
constexpr int TILE_VECTORS = 1;  // a 64-byte vector is several registers already
#endif
constexpr int64_t CHUNK = 256;
constexpr int64_t MIN_SLICE = 1024, MAX_SLICES = 64;

template <class T> struct VectorOf;
template <> struct VectorOf<float> { typedef float type __attribute__((vector_size(VECTOR_BYTES))); };
template <> struct VectorOf<double> { typedef double type __attribute__((vector_size(VECTOR_BYTES))); };
template <> struct VectorOf<int32_t> { typedef int32_t type __attribute__((vector_size(VECTOR_BYTES))); };
template <> struct VectorOf<int64_t> { typedef int64_t type __attribute__((vector_size(VECTOR_BYTES))); };
template <class T> using Vector = typename VectorOf<T>::type;
template <class T> constexpr int LANES = VECTOR_BYTES / sizeof(T);
template <class T> constexpr int64_t ROW = CHUNK / LANES<T>;  // vectors in a row of a chunk's matrix

static_assert(CHUNK % (TILE_VECTORS * LANES<float>) == 0 && MIN_SLICE % CHUNK == 0);

// ------------------------------------------------------------------------------------------ elementwise

template <class T> struct Exp;
template <> struct Exp<float> {
    using Bits = int32_t;
    static constexpr int MANTISSA = 23, DEGREE = 7;
    static constexpr float ROUND = 0x1.8p23f, LN2_HIGH = 0x1.62e4p-1f, LN2_LOW = 0x1.7f7d1cp-20f, LIMIT = 40;
};
template <> struct Exp<double> {
    using Bits = int64_t;
    static constexpr int MANTISSA = 52, DEGREE = 13;
    static constexpr double ROUND = 0x1.8p52, LN2_HIGH = 0x1.62e42fefa38p-1, LN2_LOW = 0x1.ef35793c7673p-45,
                            LIMIT = 300;
};

constexpr double inverse_factorial(int k) { return k < 2 ? 1 : inverse_factorial(k - 1) / k; }

// x := e^x = 2^n e^r with n = round(x / ln 2): Taylor's series for e^r, |r| <= ln(2)/2, and n added to the
// exponent bits. |x| is limited so that products of two results are finite; NaN stays NaN. M independent vectors at
// once, because one alone would wait for its own last result at every term.
template <class T, int M> inline void exponential(Vector<T> (&x)[M]) {
    using E = Exp<T>;
    using Bits = Vector<typename E::Bits>;
    const Vector<T> zero = {}, limit = zero + E::LIMIT;
    Vector<T> rounded[M], sum[M];
    for (int m = 0; m < M; ++m) {
        x[m] = limit < x[m] ? limit : x[m];
        x[m] = -limit > x[m] ? -limit : x[m];
        rounded[m] = x[m] * T(1.4426950408889634) + E::ROUND;
        const Vector<T> n = rounded[m] - E::ROUND;
        x[m] = (x[m] - n * E::LN2_HIGH) - n * E::LN2_LOW;
        sum[m] = zero + T(inverse_factorial(E::DEGREE));
    }
#pragma GCC unroll 16
    for (int k = E::DEGREE - 1; k >= 0; --k)
        for (int m = 0; m < M; ++m) sum[m] = sum[m] * x[m] + T(inverse_factorial(k));
    for (int m = 0; m < M; ++m) x[m] = (Vector<T>)((Bits)sum[m] + ((Bits)rounded[m] << E::MANTISSA));
}

template <class T, int M> inline void tanh(Vector<T> (&x)[M]) {
    for (int m = 0; m < M; ++m) x[m] = T(-2) * x[m];
    exponential<T>(x);
    for (int m = 0; m < M; ++m) x[m] = T(2) / (T(1) + x[m]) - T(1);
}

// The four gates' activations: sigmoid, sigmoid, tanh = 2 sigmoid(2x) - 1, sigmoid.
template <class T> inline void activate(Vector<T>& i, Vector<T>& f, Vector<T>& g, Vector<T>& o) {
    Vector<T> x[4] = {-i, -f, T(-2) * g, -o};
    exponential<T>(x);
    for (int q = 0; q < 4; ++q) x[q] += T(1);
    // 1 / a = b / (a b): divisions are slow, and one serves two.
    const Vector<T> if_ = T(1) / (x[0] * x[1]), go = T(1) / (x[2] * x[3]);
    i = x[1] * if_;
    f = x[0] * if_;
    g = T(2) * (x[3] * go) - T(1);
    o = x[2] * go;
}

struct BFloat16 { uint16_t bits; };

inline float widen(BFloat16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

inline BFloat16 narrow(float x) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (x != x) return {0x7fc0};
    return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
template <class S, class T> inline S narrow_to(T x) {
    if constexpr (std::is_same_v<S, T>) return x;
    else return narrow(x);
}

// n coordinates of one row from memory, zeros after them: lanes beyond the end then add nothing to any sum.
template <class T, class S> inline void load(Vector<T>* row, const S* from, int64_t n) {
    T* to = (T*)row;
    if (n == CHUNK) {  // a constant count: unrolled vector moves
        for (int64_t i = 0; i < CHUNK; ++i) to[i] = widen(from[i]);
    } else {
        for (int64_t i = 0; i < n; ++i) to[i] = widen(from[i]);
        for (int64_t i = n; i < CHUNK; ++i) to[i] = 0;
    }
}
template <class T, class S> inline void store(S* to, const Vector<T>* row, int64_t n) {
    const T* from = (const T*)row;
    if (n == CHUNK)
        for (int64_t i = 0; i < CHUNK; ++i) to[i] = narrow_to<S>(from[i]);
    else
        for (int64_t i = 0; i < n; ++i) to[i] = narrow_to<S>(from[i]);
}

// --------------------------------------------------------------------------------------------- the LSTM

struct Spec {
    int64_t layers, hidden, log_sign;
    double p, output_scale;
    int64_t inputs(int64_t layer) const { return layer ? hidden : log_sign ? 2 : 1; }
    int64_t columns(int64_t layer) const { return inputs(layer) + hidden; }
    int64_t parameters() const {
        int64_t count = hidden + 1;
        for (int64_t l = 0; l < layers; ++l) count += 4 * hidden * (columns(l) + 1);
        return count;
    }
};

// Where layer l's weight [4H, K] and bias [4H] lie in phi; the head's [H] and [] come after the last layer's.
template <class T> struct Weights {
    T *weight, *bias;
    static Weights of(T* phi, const Spec& spec, int64_t layer) {
        for (int64_t l = 0; l < layer; ++l) phi += 4 * spec.hidden * (spec.columns(l) + 1);
        return {phi, phi + 4 * spec.hidden * spec.columns(layer)};
    }
    static Weights head(T* phi, const Spec& spec) {
        T* weight = phi + spec.parameters() - spec.hidden - 1;
        return {weight, weight + spec.hidden};
    }
};

template <class T> void preprocess(Vector<T>* rows, const T* grad, int64_t n, const Spec& spec) {
    load<T>(rows, grad, n);
    if (!spec.log_sign) return;
    T *magnitude = (T*)rows, *sign = (T*)(rows + ROW<T>);
    const T p = spec.p, slope = std::exp(spec.p);
    for (int64_t i = 0; i < CHUNK; ++i) {  // the argument order of max and min lets NaN through
        sign[i] = std::min(std::max(magnitude[i] * slope, T(-1)), T(1));
        magnitude[i] = std::max(std::log(std::abs(magnitude[i])) / p, T(-1));
    }
}

template <class T> using Tile = Vector<T>[TILE_VECTORS];

// Activated gates i, f, g, o of hidden unit j for one tile; x points at the tile in rows [x; h].
template <class T>
inline void gates(Tile<T> (&gate)[4], const Weights<const T>& layer, const Vector<T>* x, int64_t j, int64_t H,
                  int64_t K) {
    for (int q = 0; q < 4; ++q)
        for (int v = 0; v < TILE_VECTORS; ++v) gate[q][v] = Vector<T>{} + layer.bias[q * H + j];
    const T* weight = layer.weight + j * K;
    for (int64_t k = 0; k < K; ++k)
        for (int q = 0; q < 4; ++q)
            for (int v = 0; v < TILE_VECTORS; ++v) gate[q][v] += weight[q * H * K + k] * x[k * ROW<T> + v];
    for (int v = 0; v < TILE_VECTORS; ++v) activate<T>(gate[0][v], gate[1][v], gate[2][v], gate[3][v]);
}

// Rows of CHUNK coordinates, zeroed and aligned.
template <class T> struct Matrix {
    struct Free { void operator()(void* p) const { std::free(p); } };
    std::unique_ptr<Vector<T>, Free> data;
    explicit Matrix(int64_t vectors)
        : data((Vector<T>*)std::aligned_alloc(VECTOR_BYTES, vectors * VECTOR_BYTES)) {
        clear(vectors);
    }
    void clear(int64_t vectors) { std::memset((void*)data.get(), 0, vectors * VECTOR_BYTES); }
    Vector<T>* operator[](int64_t row) { return data.get() + row * ROW<T>; }
};

struct Slices {
    int64_t size, count;
    explicit Slices(int64_t N) {  // of N alone, so that results do not depend on the number of threads
        size = std::max(MIN_SLICE, ((N + MAX_SLICES - 1) / MAX_SLICES + CHUNK - 1) / CHUNK * CHUNK);
        count = (N + size - 1) / size;
    }
};

// Each thread makes one worker (its scratch memory) and calls it with slice after slice.
template <class MakeWorker> void for_slices(int64_t count, int64_t threads, MakeWorker make_worker) {
    std::atomic<int64_t> next{0};
    auto run = [&] {
        auto worker = make_worker();
        for (int64_t slice; (slice = next++) < count;) worker(slice);
    };
    std::vector<std::thread> helpers;
    for (int64_t i = 1; i < std::min(threads, count); ++i) helpers.emplace_back(run);
    run();
    for (auto& helper : helpers) helper.join();
}

// ------------------------------------------------------------------------------------------------- step

template <class T, class S>
void step(int64_t threads, const Spec& spec, int64_t N, T* theta, const T* grad, const S* state, S* new_state,
          const T* phi) {
    const int64_t H = spec.hidden, L = spec.layers;
    const Slices slices(N);
    const auto head = Weights<const T>::head(phi, spec);

    for_slices(slices.count, threads, [&] {
        Matrix<T> even(2 * (H + 1) * ROW<T>), odd(2 * (H + 1) * ROW<T>), cell(H * ROW<T>);
        return [&, even = std::move(even), odd = std::move(odd), cell = std::move(cell)](int64_t slice) mutable {
            const int64_t end = std::min(N, (slice + 1) * slices.size);
            for (int64_t start = slice * slices.size; start < end; start += CHUNK) {
                const int64_t n = std::min(CHUNK, end - start);
                Matrix<T>*operand = &even, *next = &odd;  // rows [x; h] of this layer, and of the one above
                preprocess((*operand)[0], grad + start, n, spec);
                for (int64_t l = 0; l < L; ++l) {
                    const auto layer = Weights<const T>::of(phi, spec, l);
                    const int64_t K = spec.columns(l), above = 2 * l * H;  // rows of the state before this layer
                    for (int64_t j = 0; j < H; ++j) {
                        load<T>((*operand)[K - H + j], state + (above + j) * N + start, n);
                        load<T>(cell[j], state + (above + H + j) * N + start, n);
                    }
                    for (int64_t v0 = 0; v0 * LANES<T> < n; v0 += TILE_VECTORS)
                        for (int64_t j = 0; j < H; ++j) {
                            Tile<T> gate[4];
                            gates<T>(gate, layer, (*operand)[0] + v0, j, H, K);
                            Vector<T>*c = cell[j] + v0, *h = (*next)[j] + v0;
                            Tile<T> tanh_c;
                            for (int v = 0; v < TILE_VECTORS; ++v)
                                tanh_c[v] = c[v] = gate[1][v] * c[v] + gate[0][v] * gate[2][v];
                            tanh<T>(tanh_c);
                            for (int v = 0; v < TILE_VECTORS; ++v) h[v] = gate[3][v] * tanh_c[v];
                        }
                    for (int64_t j = 0; j < H; ++j) {
                        store<T>(new_state + (above + j) * N + start, (*next)[j], n);
                        store<T>(new_state + (above + H + j) * N + start, cell[j], n);
                    }
                    std::swap(operand, next);
                }
                Vector<T>* out = cell[0];
                for (int64_t v = 0; v < ROW<T>; ++v) {
                    Vector<T> sum = Vector<T>{} + *head.bias;
                    for (int64_t j = 0; j < H; ++j) sum += head.weight[j] * (*operand)[j][v];
                    out[v] = T(spec.output_scale) * sum;
                }
                for (int64_t i = 0; i < n; ++i) theta[start + i] += ((const T*)out)[i];
            }
        };
    });
}

// ------------------------------------------------------------------------------------------------- bptt

// Weight gradients of one layer: dW += dZ [x; h; 1]^T, with a whole vector of partial sums per element, kept
// from step to step and reduced once per slice. Stored by 4 x 4 tiles; columns are padded with zero rows.
template <class T>
void accumulate(Vector<T>* sums, const Vector<T>* d_z, const Vector<T>* operand, int64_t rows, int64_t columns,
                int64_t vectors) {
    for (int64_t r = 0; r < rows; r += 4)
        for (int64_t c = 0; c < columns; c += 4, sums += 16) {
            Vector<T> sum[4][4];
            for (int i = 0; i < 16; ++i) sum[i / 4][i % 4] = sums[i];
            for (int64_t v = 0; v < vectors; ++v)
                for (int i = 0; i < 4; ++i)
                    for (int k = 0; k < 4; ++k)
                        sum[i][k] += d_z[(r + i) * ROW<T> + v] * operand[(c + k) * ROW<T> + v];
            for (int i = 0; i < 16; ++i) sums[i] = sum[i / 4][i % 4];
        }
}

template <class T> inline T total(Vector<T> x) {
    T sum = 0;
    for (int i = 0; i < LANES<T>; ++i) sum += x[i];
    return sum;
}

inline int64_t pad4(int64_t n) { return (n + 3) / 4 * 4; }

// One thread's scratch memory for a chunk's backward.
template <class T> struct Backward {
    const Spec& spec;
    std::vector<Matrix<T>> operand;   // per layer: rows [x; h; 1; zeros], pad4(K + 1)
    std::vector<Matrix<T>> d_hidden;  // per layer: cotangent of h, H
    std::vector<Matrix<T>> d_cell;    // per layer: cotangent of c, H
    std::vector<Matrix<T>> sums;      // per layer: 4H * pad4(K + 1) vectors of partial sums
    Matrix<T> head_sums, cell, d_z, d_above, d_out;

    explicit Backward(const Spec& spec)
        : spec(spec), head_sums(spec.hidden + 1), cell(spec.hidden * ROW<T>), d_z(4 * spec.hidden * ROW<T>),
          d_above(spec.hidden * ROW<T>), d_out(ROW<T>) {
        for (int64_t l = 0; l < spec.layers; ++l) {
            const int64_t K = spec.columns(l);
            operand.emplace_back(pad4(K + 1) * ROW<T>);
            std::fill_n(operand[l][K], ROW<T>, Vector<T>{} + T(1));
            d_hidden.emplace_back(spec.hidden * ROW<T>);
            d_cell.emplace_back(spec.hidden * ROW<T>);
            sums.emplace_back(4 * spec.hidden * pad4(K + 1));
        }
    }

    void clear_sums() {
        for (int64_t l = 0; l < spec.layers; ++l) sums[l].clear(4 * spec.hidden * pad4(spec.columns(l) + 1));
        head_sums.clear(spec.hidden + 1);
    }

    void head(const Weights<const T>& head, Vector<T>* h, int64_t j) {
        for (int64_t v = 0; v < ROW<T>; ++v) {
            head_sums.data.get()[j] += h[v] * d_out[0][v];
            d_above[j][v] = head.weight[j] * d_out[0][v];
        }
    }

    // Cotangents of layer l, whose operand and cell are loaded, from d_above, d_hidden and d_cell.
    void layer(int64_t l, const Weights<const T>& weights, int64_t n) {
        const int64_t H = spec.hidden, K = spec.columns(l), inputs = K - H;
        for (int64_t v0 = 0; v0 * LANES<T> < n; v0 += TILE_VECTORS) {
            for (int64_t j = 0; j < H; ++j) {
                Tile<T> gate[4];
                gates<T>(gate, weights, operand[l][0] + v0, j, H, K);
                Tile<T> tanhs;
                for (int v = 0; v < TILE_VECTORS; ++v)
                    tanhs[v] = gate[1][v] * cell[j][v0 + v] + gate[0][v] * gate[2][v];
                tanh<T>(tanhs);
                for (int v = 0; v < TILE_VECTORS; ++v) {
                    const Vector<T> i = gate[0][v], f = gate[1][v], g = gate[2][v], o = gate[3][v];
                    const Vector<T> c = cell[j][v0 + v], tanh_c = tanhs[v];
                    const Vector<T> d_h = d_hidden[l][j][v0 + v] + d_above[j][v0 + v];
                    const Vector<T> d_c = d_cell[l][j][v0 + v] + d_h * o * (T(1) - tanh_c * tanh_c);
                    d_z[j][v0 + v] = d_c * g * i * (T(1) - i);
                    d_z[H + j][v0 + v] = d_c * c * f * (T(1) - f);
                    d_z[2 * H + j][v0 + v] = d_c * i * (T(1) - g * g);
                    d_z[3 * H + j][v0 + v] = d_h * tanh_c * o * (T(1) - o);
                    d_cell[l][j][v0 + v] = d_c * f;
                }
            }
            // W^T dZ, four columns of W at a time; the first layer's inputs are constants.
            for (int64_t k = l ? 0 : inputs; k < K; k += 4) {
                Tile<T> sum[4] = {};
                for (int64_t r = 0; r < 4 * H; ++r)
                    for (int q = 0; q < 4; ++q)  // past the last column this reads on, and drops the result
                        for (int v = 0; v < TILE_VECTORS; ++v)
                            sum[q][v] += weights.weight[r * K + k + q] * d_z[r][v0 + v];
                for (int q = 0; q < 4 && k + q < K; ++q) {
                    Vector<T>* to = k + q < inputs ? d_above[k + q] : d_hidden[l][k + q - inputs];
                    for (int v = 0; v < TILE_VECTORS; ++v) to[v0 + v] = sum[q][v];
                }
            }
        }
        const int64_t vectors = (n + LANES<T> - 1) / LANES<T>;
        accumulate<T>(sums[l].data.get(), d_z[0], operand[l][0], 4 * H, pad4(K + 1), vectors);
    }

    // Reduces the partial sums into a gradient of phi's shape.
    void reduce(T* d_phi) {
        const int64_t H = spec.hidden;
        for (int64_t l = 0; l < spec.layers; ++l) {
            const auto to = Weights<T>::of(d_phi, spec, l);
            const int64_t K = spec.columns(l), padded = pad4(K + 1);
            for (int64_t r = 0; r < 4 * H; ++r) {
                for (int64_t k = 0; k <= K; ++k) {
                    const int64_t tile = r / 4 * (padded / 4) + k / 4;
                    const T sum = total<T>(sums[l].data.get()[tile * 16 + r % 4 * 4 + k % 4]);
                    (k < K ? to.weight[r * K + k] : to.bias[r]) = sum;
                }
            }
        }
        const auto to = Weights<T>::head(d_phi, spec);
        for (int64_t j = 0; j <= H; ++j) to.weight[j] = total<T>(head_sums.data.get()[j]);
    }
};

template <class T, class S>
void bptt(int64_t threads, const Spec& spec, int64_t N, int64_t steps, const T* grads, const S* history,
          const T* d_updates, const T* d_final_state, const T* phi, T* d_phi, T* d_initial_state) {
    const int64_t H = spec.hidden, L = spec.layers, P = spec.parameters(), state_size = 2 * L * H * N;
    const Slices slices(N);
    std::vector<T> partials(slices.count * P);
    const auto head = Weights<const T>::head(phi, spec);

    for_slices(slices.count, threads, [&] {
        return [&, b = Backward<T>(spec)](int64_t slice) mutable {
            b.clear_sums();
            const int64_t end = std::min(N, (slice + 1) * slices.size);
            for (int64_t start = slice * slices.size; start < end; start += CHUNK) {
                const int64_t n = std::min(CHUNK, end - start);
                for (int64_t l = 0; l < L; ++l)
                    for (int64_t j = 0; j < H; ++j) {
                        const T* from = d_final_state + (2 * l * H + j) * N + start;
                        load<T>(b.d_hidden[l][j], from, d_final_state ? n : 0);
                        load<T>(b.d_cell[l][j], from + H * N, d_final_state ? n : 0);
                    }
                for (int64_t t = steps - 1; t >= 0; --t) {
                    const S *before = history + t * state_size + start, *after = before + state_size;
                    load<T>(b.d_out[0], d_updates + t * N + start, n);
                    for (int64_t v = 0; v < ROW<T>; ++v) {
                        b.d_out[0][v] *= T(spec.output_scale);
                        b.head_sums.data.get()[H] += b.d_out[0][v];
                    }
                    for (int64_t j = 0; j < H; ++j) {
                        load<T>(b.cell[0], after + ((L - 1) * 2 * H + j) * N, n);
                        b.head(head, b.cell[0], j);
                    }
                    for (int64_t l = L - 1; l >= 0; --l) {
                        const int64_t inputs = spec.inputs(l);
                        if (l == 0) preprocess(b.operand[0][0], grads + t * N + start, n, spec);
                        for (int64_t j = 0; j < H; ++j) {
                            if (l > 0) load<T>(b.operand[l][j], after + (2 * (l - 1) * H + j) * N, n);
                            load<T>(b.operand[l][inputs + j], before + (2 * l * H + j) * N, n);
                            load<T>(b.cell[j], before + ((2 * l + 1) * H + j) * N, n);
                        }
                        b.layer(l, Weights<const T>::of(phi, spec, l), n);
                    }
                }
                for (int64_t l = 0; l < L; ++l)
                    for (int64_t j = 0; j < H; ++j) {
                        T* to = d_initial_state + (2 * l * H + j) * N + start;
                        store<T>(to, b.d_hidden[l][j], n);
                        store<T>(to + H * N, b.d_cell[l][j], n);
                    }
            }
            b.reduce(partials.data() + slice * P);
        };
    });
    std::fill_n(d_phi, P, T(0));
    for (int64_t slice = 0; slice < slices.count; ++slice)
        for (int64_t k = 0; k < P; ++k) d_phi[k] += partials[slice * P + k];
}

}  // namespace

#define EXPORT(name, T, S)                                                                                      \
    extern "C" void step_##name(int64_t threads, const Spec* spec, int64_t N, T* theta, const T* grad,          \
                                const S* state, S* new_state, const T* phi) {                                   \
        step<T, S>(threads, *spec, N, theta, grad, state, new_state, phi);                                      \
    }                                                                                                           \
    extern "C" void bptt_##name(int64_t threads, const Spec* spec, int64_t N, int64_t steps, const T* grads,    \
                                const S* history, const T* d_updates, const T* d_final_state, const T* phi,     \
                                T* d_phi, T* d_initial_state) {                                                 \
        bptt<T, S>(threads, *spec, N, steps, grads, history, d_updates, d_final_state, phi, d_phi,              \
                   d_initial_state);                                                                            \
    }

EXPORT(float32_float32, float, float)
EXPORT(float32_bfloat16, float, BFloat16)
EXPORT(float64_float64, double, double)
