// The coordinatewise LSTM on CPU vectors: one step, and a window's backward. reference.py is the definition.
//
// Plain C++ with GCC/Clang vector extensions and a C interface: no headers of PyTorch, so that it compiles in
// seconds with whatever compiler the machine has, for exactly the machine's instruction set.
//
// Coordinates are innermost everywhere, so a vector holds one quantity of LANES neighbouring coordinates and
// no step of the computation crosses lanes. The work is cut three times:
//   slice  the unit of a thread, and of the deterministic sum of weight gradients;
//   chunk  CHUNK coordinates whose operands stay in L2 cache: all layers of a step, all steps of a backward;
//   tile   TILE_VECTORS vectors of coordinates, whose operands stay in L1 and whose sums stay in registers.
// A product W x is formed for the four gates of one hidden unit at a time, so gates are activated in registers
// and pre-activations never exist in memory.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

// The machine's own vectors (wider ones are legal, and ten times slower), as many to a tile as let the
// 4 x TILE_VECTORS sums of every product stay in registers, with its operands: of 16 registers 12, 3 and 1. And as
// many coordinates to a chunk as its L2 cache holds: a row of a chunk is a contiguous kilobyte or two, and shorter
// ones wait for the TLB. TOGETHER vectors are activated at a time, as many as let the chains of additions wait for
// their results side by side without running out of registers.
#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, TILE_VECTORS = 4, CHUNK = 512, TOGETHER = 2;
constexpr char INSTRUCTION_SET[] = "AVX-512";
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int VECTOR_BYTES = 32, TILE_VECTORS = 3, CHUNK = 192, TOGETHER = 1;
constexpr char INSTRUCTION_SET[] = "AVX2";
#elif defined(__aarch64__)
constexpr int VECTOR_BYTES = 16, TILE_VECTORS = 4, CHUNK = 256, TOGETHER = 2;
constexpr char INSTRUCTION_SET[] = "NEON";
#elif defined(__SSE2__)
constexpr int VECTOR_BYTES = 16, TILE_VECTORS = 2, CHUNK = 256, TOGETHER = 1;
constexpr char INSTRUCTION_SET[] = "SSE2";
#else
constexpr int VECTOR_BYTES = 16, TILE_VECTORS = 2, CHUNK = 256, TOGETHER = 1;
constexpr char INSTRUCTION_SET[] = "the compiler's own vectors";
#endif
constexpr int64_t MIN_SLICE = 1024 / CHUNK * CHUNK, MAX_SLICES = 64;
static_assert(TILE_VECTORS % TOGETHER == 0);

template <class T> struct VectorOf;
template <> struct VectorOf<float> { typedef float type __attribute__((vector_size(VECTOR_BYTES))); };
template <> struct VectorOf<double> { typedef double type __attribute__((vector_size(VECTOR_BYTES))); };
template <> struct VectorOf<int32_t> { typedef int32_t type __attribute__((vector_size(VECTOR_BYTES))); };
template <> struct VectorOf<int64_t> { typedef int64_t type __attribute__((vector_size(VECTOR_BYTES))); };
template <class T> using Vector = typename VectorOf<T>::type;
template <class T> using Tile = Vector<T>[TILE_VECTORS];

// For the functions with a product inside: inlined into their callers, they would run out of registers.
#define KERNEL __attribute__((noinline))
#define INLINE inline __attribute__((always_inline))

template <class T> constexpr int LANES = VECTOR_BYTES / sizeof(T);
template <class T> constexpr int64_t TILE = TILE_VECTORS * LANES<T>;  // coordinates
template <class T> int64_t tiles(int64_t n) { return (n + TILE<T> - 1) / TILE<T>; }
static_assert(CHUNK % TILE<float> == 0 && MIN_SLICE % CHUNK == 0);

// ------------------------------------------------------------------------------------------ elementwise

// 2^f for |f| <= 1/2 as 1 + C[0] f + C[1] f^2 + ...: exact at 0, so that tanh(0) is 0. At the limits e^x and its
// reciprocal are still normal numbers.
template <class T> struct Exp;
template <> struct Exp<float> {
    using Bits = int32_t;
    static constexpr int MANTISSA = 23;
    static constexpr float ROUND = 0x1.8p23f, LIMIT = 80;
    static constexpr float C[] = {0.69314720f,   0.24022648f,   0.055503324f,  // to 2e-9
                                  0.0096184374f, 0.0013398874f, 0.00015353362f};
};
template <> struct Exp<double> {
    using Bits = int64_t;
    static constexpr int MANTISSA = 52;
    static constexpr double ROUND = 0x1.8p52, LIMIT = 700;
    static constexpr double C[] = {  // ln(2)^k / k!
        0.6931471805599453,     0.2402265069591007,     0.05550410866482158,   0.009618129107628477,
        0.0013333558146428443,  0.0001540353039338161,  1.5252733804059841e-05, 1.3215486790144309e-06,
        1.01780860092397e-07,   7.054911620801123e-09,  4.4455382718708115e-10, 2.5678435993488205e-11,
        1.3691488853904128e-12};
};

// What the language's operators on vectors cannot say, or not say well.
template <class T> inline Vector<T> reciprocal(Vector<T> x) { return T(1) / x; }
template <class T> inline Vector<T> clamp(Vector<T> x, T limit) {  // to [-limit, limit]; NaN stays NaN
    const Vector<T> high = Vector<T>{} + limit;
    x = high < x ? high : x;
    return -high > x ? -high : x;
}
// 2^n x for n = rounded - ROUND: n is in the low bits of `rounded`, from where it goes into x's exponent.
template <class T> INLINE Vector<T> times_power_of_2(Vector<T> x, Vector<T> rounded) {
    using Bits = Vector<typename Exp<T>::Bits>;
    return (Vector<T>)((Bits)x + ((Bits)rounded << Exp<T>::MANTISSA));
}
// Loads once what is used several times: GCC would read it from memory in each multiply-add, at twice the cost.
template <class T> INLINE Vector<T> in_register(Vector<T> x) {
#if defined(__x86_64__)
    asm("" : "+v"(x));
#elif defined(__aarch64__)
    asm("" : "+w"(x));
#endif
    return x;
}
#if defined(__AVX512F__)
// 14 bits, doubled by a Newton step: a vector division would take as long as 18 multiply-adds.
template <> inline Vector<float> reciprocal<float>(Vector<float> x) {
    const Vector<float> y = (Vector<float>)_mm512_rcp14_ps((__m512)x);
    return y + y * (1.0f - x * y);
}
template <> INLINE Vector<float> times_power_of_2<float>(Vector<float> x, Vector<float> rounded) {
    return (Vector<float>)_mm512_scalef_ps((__m512)x, (__m512)(rounded - Exp<float>::ROUND));
}
template <> inline Vector<float> clamp<float>(Vector<float> x, float limit) {
    const __m512 high = _mm512_set1_ps(limit), low = _mm512_set1_ps(-limit);
    return (Vector<float>)_mm512_max_ps(low, _mm512_min_ps(high, (__m512)x));
}
#elif defined(__AVX2__) && defined(__FMA__)
// 12 bits, doubled likewise.
template <> inline Vector<float> reciprocal<float>(Vector<float> x) {
    const Vector<float> y = (Vector<float>)_mm256_rcp_ps((__m256)x);
    return y + y * (1.0f - x * y);
}
template <> inline Vector<float> clamp<float>(Vector<float> x, float limit) {
    const __m256 high = _mm256_set1_ps(limit), low = _mm256_set1_ps(-limit);
    return (Vector<float>)_mm256_max_ps(low, _mm256_min_ps(high, (__m256)x));
}
#endif

// tanh(x) from 1 + e^-2x, exactly 0 from 2 whatever the reciprocal's last bit.
template <class T> INLINE Vector<T> tanh_by(Vector<T> x) { return (T(2) - x) * reciprocal<T>(x); }

// x[m] := e^(scale[m] x[m]) = 2^n 2^f, n + f = scale x / ln 2: n goes into the exponent's bits. NaN stays NaN.
// M independent vectors at once, because one alone would wait for its own last result at every term. The
// rounding of scale / ln 2 errs by a part in 2^24 (2^53) of x, where sigmoid and tanh are the flatter for it.
template <class T, int M> INLINE void exponential(Vector<T> (&x)[M], const int (&scale)[M]) {
    using E = Exp<T>;
    constexpr int DEGREE = sizeof(E::C) / sizeof(T);
    const Vector<T> zero = {};
    Vector<T> rounded[M], sum[M];
    for (int m = 0; m < M; ++m) {
        const T per_ln2 = scale[m] * T(1.4426950408889634);
        x[m] = clamp<T>(x[m], E::LIMIT / std::abs(scale[m]));
        rounded[m] = x[m] * per_ln2 + E::ROUND;
        x[m] = x[m] * per_ln2 - (rounded[m] - E::ROUND);
        sum[m] = zero + E::C[DEGREE - 1];
    }
#pragma GCC unroll 16
    for (int k = DEGREE - 2; k >= 0; --k)
        for (int m = 0; m < M; ++m) sum[m] = sum[m] * x[m] + E::C[k];
    for (int m = 0; m < M; ++m) {
        sum[m] = sum[m] * x[m] + T(1);
        x[m] = times_power_of_2<T>(sum[m], rounded[m]);
    }
}

struct BFloat16 { uint16_t bits; };

template <class T> inline T widen(T x) { return x; }
inline float widen(BFloat16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

template <class T> inline void assign(T& to, T x) { to = x; }
inline void assign(BFloat16& to, float x) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    to.bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// A tile from the first n coordinates of memory, zeros after them: lanes beyond the end then add nothing to any
// sum. A whole tile's constant count makes these unrolled vector moves.
template <class T, class S> INLINE void load_tile(Tile<T>& tile, const S* from, int64_t n) {
    T* to = (T*)tile;
    if (n >= TILE<T>) {
        for (int64_t i = 0; i < TILE<T>; ++i) to[i] = widen(from[i]);
    } else {
        for (int64_t i = 0; i < TILE<T>; ++i) to[i] = i < n ? widen(from[i]) : T(0);
    }
}

template <class T, class S> INLINE void store_tile(const Tile<T>& tile, S* to, int64_t n) {
    const T* from = (const T*)tile;
    if (n >= TILE<T>) {
        for (int64_t i = 0; i < TILE<T>; ++i) assign(to[i], from[i]);
    } else {
        for (int64_t i = 0; i < n; ++i) assign(to[i], from[i]);
    }
}

// A chunk of `rows` quantities, tile by tile, zero at first; as much of one as N coordinates need.
template <class T, int VECTORS = TILE_VECTORS> class Matrix {
    using Row = Vector<T>[VECTORS];  // of one tile
    struct Free { void operator()(void* p) const { std::free(p); } };
    int64_t rows, capacity;  // in tiles
    std::unique_ptr<Row[], Free> data;

  public:
    Matrix(int64_t rows, int64_t N) : rows(rows), capacity(tiles<T>(std::min<int64_t>(N, CHUNK))) {
        const size_t bytes = capacity * rows * sizeof(Row);
        data.reset((Row*)std::aligned_alloc(VECTOR_BYTES, bytes));
        std::memset((void*)data.get(), 0, bytes);
    }

    // Rows row, row + 1, ... of one tile.
    Row* at(int64_t tile, int64_t row) { return data.get() + tile * rows + row; }

    // n coordinates of a row from memory, zeros after them.
    template <class S> void load(int64_t row, const S* from, int64_t n) {
        for (int64_t tile = 0; tile < tiles<T>(n); ++tile)
            load_tile<T>(*at(tile, row), from + tile * TILE<T>, n - tile * TILE<T>);
    }

    template <class S> void store(int64_t row, S* to, int64_t n) {
        for (int64_t tile = 0; tile < tiles<T>(n); ++tile)
            store_tile<T>(*at(tile, row), to + tile * TILE<T>, n - tile * TILE<T>);
    }

    void fill(int64_t row, T value) {
        for (int64_t tile = 0; tile < capacity; ++tile)
            for (auto& vector : *at(tile, row)) vector = Vector<T>{} + value;
    }
};

// What a chunk will read (or write) next, brought into L2 cache a few lines at a time while it computes. The
// machine does not do so by itself: rows lie a whole row of coordinates apart, and its prefetchers stop at pages.
template <class S> class Ahead {
    static constexpr int64_t LINE = 64;
    const char* row = nullptr;
    int64_t stride = 0, rows = 0, row_bytes = 0, byte = 0, lines_per_call = 0;

  public:
    // `rows` rows, `stride` elements apart, of n coordinates each, by `calls` calls of fetch().
    void aim(const S* from, int64_t rows_, int64_t stride_, int64_t n, int64_t calls) {
        row = (const char*)from;
        rows = rows_, stride = stride_ * sizeof(S), row_bytes = n * sizeof(S), byte = 0;
        lines_per_call = (rows * ((row_bytes + LINE - 1) / LINE) + calls - 1) / calls;
    }

    template <int write> inline void fetch() {
        for (int64_t line = 0; line < lines_per_call && rows > 0; ++line) {
            __builtin_prefetch(row + byte, write, 2);
            if ((byte += LINE) >= row_bytes) byte = 0, row += stride, --rows;
        }
    }
};

// --------------------------------------------------------------------------------------------- the LSTM

struct Spec {
    int64_t layers, hidden, log_sign, width, tanh_output;
    double p, output_scale;

    int64_t inputs(int64_t layer) const { return layer ? hidden : log_sign ? 2 : width; }
    int64_t columns(int64_t layer) const { return inputs(layer) + hidden; }
    int64_t most_columns() const { return std::max(columns(0), 2 * hidden); }
    int64_t offset(int64_t layer) const {  // of its weight [4H, K], which its bias [4H] follows, in phi
        int64_t count = 0;
        for (int64_t l = 0; l < layer; ++l) count += 4 * hidden * (columns(l) + 1);
        return count;
    }
    int64_t bias_offset(int64_t layer) const { return offset(layer) + 4 * hidden * columns(layer); }
    int64_t head_offset() const { return offset(layers); }  // of the head's weight [H], then its bias
    int64_t parameters() const { return head_offset() + hidden + 1; }
    int64_t state_row(int64_t layer, bool cell) const { return (2 * layer + cell) * hidden; }
    int64_t state_rows() const { return 2 * layers * hidden; }
};

// How products are formed: Exact multiplies numbers as they are, Rounded rounds both operands to bfloat16 and adds
// two of their products at a time in float32. What is two at a time: in W x two columns of W with two rows of x,
// in W^T dZ two rows of W with the same two of dZ, and in dZ x^T two coordinates. TERMS says how many.
template <class T> struct Exact {
    static constexpr int TERMS = 1;
    using Weight = T;  // of one multiply-add

    class Weights {
        const Spec& spec;
        const T* phi;

      public:
        Weights(const Spec& spec, const T* phi) : spec(spec), phi(phi) {}
        const T* of_inputs(int64_t layer) const { return phi + spec.offset(layer); }      // [4H, K], for W x
        const T* of_cotangents(int64_t layer) const { return phi + spec.offset(layer); }  // [4H, K], for W^T dZ
    };

    static INLINE Vector<T> add(Vector<T> sum, T weight, Vector<T> x) { return sum + weight * x; }
    static INLINE Vector<T> add(Vector<T> sum, Vector<T> x, Vector<T> y) { return sum + x * y; }
};

#if defined(__AVX512BF16__)
struct Rounded {
    static constexpr int TERMS = 2;
    using Weight = uint32_t;  // two bfloat16, the first in the lower half

    class Weights {
        std::vector<Weight> packed;
        std::vector<int64_t> inputs, cotangents;  // per layer: where its weights start

        static Weight pair(float first, float second) {
            BFloat16 low, high;
            assign(low, first), assign(high, second);
            return low.bits | Weight(high.bits) << 16;
        }

      public:
        Weights(const Spec& spec, const float* phi) {
            const int64_t H = spec.hidden;
            for (int64_t l = 0; l < spec.layers; ++l) {
                const int64_t K = spec.columns(l);
                const float* weight = phi + spec.offset(l);
                inputs.push_back(packed.size());
                for (int64_t r = 0; r < 4 * H; ++r)
                    for (int64_t k = 0; k < K; k += 2)
                        packed.push_back(pair(weight[r * K + k], k + 1 < K ? weight[r * K + k + 1] : 0.0f));
                cotangents.push_back(packed.size());
                for (int64_t first : {int64_t(0), 2 * H})  // of gates i and f, of g and o
                    for (int64_t r = first; r < first + H; ++r)
                        for (int64_t k = 0; k < K; ++k)
                            packed.push_back(pair(weight[r * K + k], weight[(r + H) * K + k]));
            }
            packed.resize(packed.size() + 3);  // Bptt::inputs reads on past the end
        }
        const Weight* of_inputs(int64_t layer) const { return &packed[inputs[layer]]; }          // [4H, K / 2]
        const Weight* of_cotangents(int64_t layer) const { return &packed[cotangents[layer]]; }  // [2H, K]
    };

    static INLINE Vector<float> add(Vector<float> sum, Vector<float> x, Vector<float> y) {
        return (Vector<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);
    }
    static INLINE Vector<float> add(Vector<float> sum, Weight weight, Vector<float> x) {
        return add(sum, (Vector<float>)_mm512_set1_epi32(weight), x);
    }

    // Two vectors rounded to nearest, ties to even, in one: one after the other, so that a lane has neighbours ...
    static INLINE Vector<float> neighbours(Vector<float> first, Vector<float> second) {
        return (Vector<float>)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
    }
    // ... or side by side, so that a lane has both of one coordinate.
    static INLINE Vector<float> pairs(Vector<float> first, Vector<float> second) {
        alignas(64) static constexpr uint16_t ORDER[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                           8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
        const __m512i both = (__m512i)neighbours(first, second);
        return (Vector<float>)_mm512_permutexvar_epi16(_mm512_load_si512(ORDER), both);
    }

    // Rows 2k and 2k + 1 of K become row k of `to`; the last one of an odd number is paired with zeros.
    KERNEL static void pair_rows(const Tile<float>* rows, int64_t K, Tile<float>* to) {
        for (int64_t k = 0; k < K; k += 2)
            for (int v = 0; v < TILE_VECTORS; ++v)
                to[k / 2][v] = pairs(rows[k][v], k + 1 < K ? rows[k + 1][v] : Vector<float>{});
    }
};
#endif

// log x for 2^-126 <= x; infinity and NaN stay. x = 2^n (1 + f) with 1/sqrt(2) <= 1 + f < sqrt(2), and
// log(1 + f) = f - f^2/2 + f^3 P(f), to 3e-8 of itself.
INLINE Vector<float> logarithm(Vector<float> x) {
    using Bits = Vector<int32_t>;
    constexpr float P[] = {0.33333911f, -0.25001337f, 0.19963064f, -0.16577584f,
                           0.14914768f, -0.14267489f, 0.087004381f};
    const Vector<float> infinity = Vector<float>{} + INFINITY;
    const Bits n = ((Bits)x - 0x3f3504f3) >> 23;
    const Vector<float> f = (Vector<float>)((Bits)x - (n << 23)) - 1.0f;
    Vector<float> sum = Vector<float>{} + P[6];
    for (int k = 5; k >= 0; --k) sum = sum * f + P[k];
    const Vector<float> log_1_f = f + f * f * (f * sum - 0.5f);
    return x < infinity ? __builtin_convertvector(n, Vector<float>) * 0.69314718f + log_1_f : x;
}

INLINE Vector<double> logarithm(Vector<double> x) {
    for (int i = 0; i < LANES<double>; ++i) x[i] = std::log(x[i]);
    return x;
}

// The first layer's inputs: rows max(log|g| / p, -1) and clamp(e^p g, -1, 1), or the features [width, N] as they
// are. The least normal number stands for smaller ones: its logarithm is below -p for every p < 80.
template <class T> void preprocess(Matrix<T>& rows, const T* inputs, int64_t N, int64_t n, const Spec& spec) {
    for (int64_t k = 0; k < spec.width; ++k) rows.load(k, inputs + k * N, n);
    if (!spec.log_sign) return;
    const T slope = std::exp(spec.p), inverse_p = 1 / spec.p;
    const Vector<T> zero = {}, least = zero + std::numeric_limits<T>::min(), one = zero + T(1);
    for (int64_t tile = 0; tile < tiles<T>(n); ++tile)
        for (int v = 0; v < TILE_VECTORS; ++v) {
            Vector<T>&x = (*rows.at(tile, 0))[v], &sign = (*rows.at(tile, 1))[v];
            sign = clamp<T>(x * slope, 1);
            x = x < zero ? -x : x;
            x = x < least ? least : x;
            x = logarithm(x) * inverse_p;
            x = x < -one ? -one : x;  // every comparison with NaN is false: it stays
        }
}

// tanh of a tile, as Cell has it.
template <class T> INLINE void hyperbolic_tangent(Tile<T>& x) {
    int scale[TILE_VECTORS];
    std::fill_n(scale, TILE_VECTORS, -2);
    exponential<T>(x, scale);
    for (auto& v : x) v = tanh_by<T>(T(1) + v);
}

// The new cell and the activated gates i, f, g, o of hidden unit j, for one tile with operand rows [x; h], or pairs
// of them.
template <class T, class P> struct Cell {
    Tile<T> gate[4], c, tanh_c;

    KERNEL Cell(const Spec& spec, int64_t layer, const T* phi, const typename P::Weights& weights,
                const Tile<T>* operand, const Tile<T>& old_c, int64_t j) {
        const int64_t H = spec.hidden, K = (spec.columns(layer) + P::TERMS - 1) / P::TERMS;
        const typename P::Weight* weight = weights.of_inputs(layer) + j * K;
        const T* bias = phi + spec.bias_offset(layer) + j;
        for (int q = 0; q < 4; ++q)
            for (int v = 0; v < TILE_VECTORS; ++v) gate[q][v] = Vector<T>{} + bias[q * H];
        for (int64_t k = 0; k < K; ++k)
            for (int q = 0; q < 4; ++q)
                for (int v = 0; v < TILE_VECTORS; ++v)
                    gate[q][v] = P::add(gate[q][v], weight[q * H * K + k], operand[k][v]);
        activate(old_c);
    }

  private:
    // sigmoid(x) = 1 / (1 + e^-x). One reciprocal of five is a division: the
    // divider works beside the multiply-adds, but not fast enough for more.
    INLINE void activate(const Tile<T>& old_c) {
#pragma GCC unroll 4
        for (int first = 0; first < TILE_VECTORS; first += TOGETHER) {
            Vector<T> e[4 * TOGETHER];
            int scale[4 * TOGETHER];
            for (int m = 0; m < 4 * TOGETHER; ++m) {
                e[m] = gate[m % 4][first + m / 4];
                scale[m] = m % 4 == 2 ? -2 : -1;
            }
            exponential<T>(e, scale);
            for (auto& x : e) x = T(1) + x;
            for (int m = 0; m < TOGETHER; ++m) {
                const int v = first + m;
                gate[0][v] = reciprocal<T>(e[4 * m]);
                gate[1][v] = reciprocal<T>(e[4 * m + 1]);
                gate[2][v] = tanh_by<T>(e[4 * m + 2]);
                gate[3][v] = T(1) / e[4 * m + 3];
                c[v] = gate[1][v] * old_c[v] + gate[0][v] * gate[2][v];
            }
        }
        for (int v = 0; v < TILE_VECTORS; ++v) tanh_c[v] = c[v];
        hyperbolic_tangent<T>(tanh_c);
    }
};

// ------------------------------------------------------------------------------------------------ slices

struct Slices {
    int64_t size, count;
    explicit Slices(int64_t N) {  // of N alone, so that results do not depend on the number of threads
        size = std::max(MIN_SLICE, ((N + MAX_SLICES - 1) / MAX_SLICES + CHUNK - 1) / CHUNK * CHUNK);
        count = (N + size - 1) / size;
    }
};

struct Slice {
    int64_t index, start, end;
    int64_t next;  // where this thread goes on afterwards, N if nowhere
};

// Subnormal numbers count as 0 while this lives, on the thread that made it: cotangents that die out over a long
// window reach them, and arithmetic on them is 100 times slower on many machines.
class FlushSubnormals {
#if defined(__x86_64__)
    static constexpr unsigned FLUSH = 0x8040;  // results and operands
    const unsigned before = _mm_getcsr();

  public:
    FlushSubnormals() { _mm_setcsr(before | FLUSH); }
    ~FlushSubnormals() { _mm_setcsr(before); }
#elif defined(__aarch64__)
    static constexpr uint64_t FLUSH = 1 << 24;
    uint64_t before;
    static void set(uint64_t control) { asm volatile("msr fpcr, %0" : : "r"(control)); }

  public:
    FlushSubnormals() {
        asm volatile("mrs %0, fpcr" : "=r"(before));
        set(before | FLUSH);
    }
    ~FlushSubnormals() { set(before); }
#endif
};

// Each thread makes a Worker (its scratch memory) and calls its run(slice), slice after slice.
// OpenMP, because PyTorch uses it: threads of another kind would fight its waiting ones for the cores.
template <class Worker, class Arguments> void for_slices(int64_t threads, const Arguments& arguments) {
    const Slices slices(arguments.N);
    const int team = std::max(int64_t(1), std::min(threads, slices.count));
    (void)team;  // unused without OpenMP
    std::atomic<int64_t> taken{0};
#pragma omp parallel num_threads(team)
    {
        const FlushSubnormals flush;
        Worker worker(arguments);
        const auto start = [&](int64_t i) { return std::min(arguments.N, i * slices.size); };
        for (int64_t i = taken++, next; i < slices.count; i = next) {
            next = taken++;
            worker.run({i, start(i), start(i + 1), start(next)});
        }
    }
}

// -------------------------------------------------------------------------------------------------- step

template <class T, class S, class P> struct StepArguments {
    const Spec& spec;
    const typename P::Weights& weights;
    int64_t N;
    T* theta;
    const T* inputs;  // [N], or [width, N]
    const S* state;
    S* new_state;
    const T* phi;
};

template <class T, class S, class P> class Step {
    const StepArguments<T, S, P>& a;
    const Spec& spec = a.spec;
    Matrix<T> even, odd;  // rows [x; h] of a layer, and of the one above it
    Matrix<T> pairs;      // of a tile's rows [x; h]
    Ahead<S> old_ahead, new_ahead;

  public:
    explicit Step(const StepArguments<T, S, P>& arguments)
        : a(arguments),
          even(spec.hidden + std::max(spec.hidden, spec.inputs(0)), a.N),
          odd(2 * spec.hidden, a.N),
          pairs(P::TERMS == 1 ? 0 : spec.most_columns(), 1) {}

    void run(const Slice& slice) {
        for (int64_t start = slice.start, next; start < slice.end; start = next) {
            next = start + CHUNK;
            chunk(start, std::min<int64_t>(CHUNK, slice.end - start), next < slice.end ? next : slice.next);
        }
    }

  private:
    void chunk(int64_t start, int64_t n, int64_t next) {
        const int64_t H = spec.hidden;
        Matrix<T>*operand = &even, *above = &odd;
        preprocess(*operand, a.inputs + start, a.N, n, spec);
        for (int64_t l = 0; l < spec.layers; ++l) {
            const int64_t h_offset = spec.state_row(l, false) * a.N + start;
            const int64_t c_offset = spec.state_row(l, true) * a.N + start;
            for (int64_t j = 0; j < H; ++j)
                operand->load(spec.inputs(l) + j, a.state + h_offset + j * a.N, n);
            const bool last = l + 1 == spec.layers;
            look_ahead(last ? 0 : l + 1, last ? next : start, n);
            for (int64_t tile = 0; tile < tiles<T>(n); ++tile) {
                const int64_t first = tile * TILE<T>;
                const Tile<T>* rows = operand->at(tile, 0);
                if constexpr (P::TERMS == 2) {
                    P::pair_rows(rows, spec.columns(l), pairs.at(0, 0));
                    rows = pairs.at(0, 0);
                }
                for (int64_t j = 0; j < H; ++j) {
                    old_ahead.template fetch<0>();
                    new_ahead.template fetch<1>();
                    Tile<T> c, &h = *above->at(tile, j);
                    load_tile<T>(c, a.state + c_offset + j * a.N + first, n - first);
                    const Cell<T, P> updated(spec, l, a.phi, a.weights, rows, c, j);
                    for (int v = 0; v < TILE_VECTORS; ++v) h[v] = updated.gate[3][v] * updated.tanh_c[v];
                    store_tile<T>(h, a.new_state + h_offset + j * a.N + first, n - first);
                    store_tile<T>(updated.c, a.new_state + c_offset + j * a.N + first, n - first);
                }
            }
            std::swap(operand, above);
        }
        const T *weight = a.phi + spec.head_offset(), bias = weight[H];
        for (int64_t tile = 0; tile < tiles<T>(n); ++tile) {
            Tile<T> update = {};
            for (int64_t j = 0; j < H; ++j)
                for (int v = 0; v < TILE_VECTORS; ++v) update[v] += weight[j] * (*operand->at(tile, j))[v];
            for (auto& v : update) v += bias;
            if (spec.tanh_output) hyperbolic_tangent<T>(update);
            T* theta = a.theta + start + tile * TILE<T>;
            for (int64_t i = 0; i < std::min(n - tile * TILE<T>, TILE<T>); ++i)
                theta[i] += T(spec.output_scale) * ((const T*)update)[i];
        }
    }

    // While n coordinates of one layer are computed, those from `start` on of the given layer come closer.
    void look_ahead(int64_t layer, int64_t start, int64_t n) {
        const int64_t H = spec.hidden, calls = tiles<T>(n) * H;
        const int64_t offset = spec.state_row(layer, false) * a.N + start, count = std::min<int64_t>(CHUNK, a.N - start);
        old_ahead.aim(a.state + offset, a.state == a.new_state ? 0 : 2 * H, a.N, count, calls);
        new_ahead.aim(a.new_state + offset, 2 * H, a.N, count, calls);
    }
};

// -------------------------------------------------------------------------------------------------- bptt

template <class T, class S, class P> struct BpttArguments {
    const Spec& spec;
    const typename P::Weights& weights;
    int64_t N, steps;
    const T* inputs;  // [T, N], or [T, width, N]
    const S* history;
    const T *d_updates, *d_final_state, *phi;
    T *partials, *d_initial_state;  // partials: d_phi of every slice, [slices, P]
};

template <class T> T total(Vector<T> x) {
    T result = 0;
    for (int i = 0; i < LANES<T>; ++i) result += x[i];
    return result;
}

// dZ [x; h; 1]^T of one layer, summed over steps and chunks: a vector of partial sums per element, reduced
// once per slice, so that neither operand is ever transposed. Kept in blocks whose sums fit in registers; a
// block's left rows stay in L1 cache while all right rows pass, so blocks are higher than wide.
template <class T, class P> class OuterSum {
    static constexpr int ROWS = VECTOR_BYTES == 64 ? 8 : 4, COLUMNS = VECTOR_BYTES == 64 ? 3 : TILE_VECTORS;
    static int64_t pad(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
    std::vector<Vector<T>> sums;

  public:
    const int64_t rows, columns;  // of the operands: at least those asked for, the others zero

    OuterSum(int64_t least_rows, int64_t least_columns)
        : rows(pad(least_rows, ROWS)), columns(pad(least_columns, COLUMNS)) {
        sums.resize(rows * columns);
    }

    void clear() { std::fill(sums.begin(), sums.end(), Vector<T>{}); }

    // Of rows as they are, or, Rounded, of neighbours in a row.
    static constexpr int VECTORS = TILE_VECTORS / P::TERMS;
    KERNEL void add(Matrix<T, VECTORS>& left, Matrix<T, VECTORS>& right, int64_t tiles) {
        Vector<T>* block = sums.data();
        for (int64_t r = 0; r < rows; r += ROWS)
            for (int64_t c = 0; c < columns; c += COLUMNS, block += ROWS * COLUMNS) {
                Vector<T> sum[ROWS * COLUMNS];
#pragma GCC unroll 32
                for (int i = 0; i < ROWS * COLUMNS; ++i) sum[i] = block[i];
                for (int64_t tile = 0; tile < tiles; ++tile) {
                    const auto *x = left.at(tile, r), *y = right.at(tile, c);
                    for (int v = 0; v < VECTORS; ++v) {
                        Vector<T> right_v[COLUMNS];
                        for (int k = 0; k < COLUMNS; ++k) right_v[k] = in_register<T>(y[k][v]);
                        for (int i = 0; i < ROWS; ++i) {
                            const Vector<T> left_v = in_register<T>(x[i][v]);
                            for (int k = 0; k < COLUMNS; ++k)
                                sum[i * COLUMNS + k] = P::add(sum[i * COLUMNS + k], left_v, right_v[k]);
                        }
                    }
                }
#pragma GCC unroll 32
                for (int i = 0; i < ROWS * COLUMNS; ++i) block[i] = sum[i];
            }
    }

    T at(int64_t row, int64_t column) const {
        const int64_t block = row / ROWS * (columns / COLUMNS) + column / COLUMNS;
        return total<T>(sums[(block * ROWS + row % ROWS) * COLUMNS + column % COLUMNS]);
    }
};

template <class T, class S, class P> class Bptt {
    using Sum = OuterSum<T, P>;
    using Rows = Matrix<T, Sum::VECTORS>;
    const BpttArguments<T, S, P>& a;
    const Spec& spec = a.spec;
    const int64_t H = spec.hidden;
    std::vector<Sum> d_weight;        // per layer: [4H, K + 1], the last column for the bias
    std::vector<Vector<T>> d_head;    // [H + 1]
    std::vector<Matrix<T>> operand;   // per layer: rows [x; h; 1]
    std::vector<Matrix<T>> d_h, d_c;  // per layer: cotangents of its state
    Rows d_z;                         // rows i, f, g, o of one layer
    Matrix<T> d_above, d_update;      // d_above: what reaches h from the layer above or the head
    Matrix<T> pairs, d_pairs;         // Rounded: of a tile's rows [x; h], of its i and f, g and o
    std::vector<Rows> neighbours;     // Rounded, per layer: rows [x; h; 1]
    Ahead<S> ahead;

  public:
    explicit Bptt(const BpttArguments<T, S, P>& arguments)
        : a(arguments),
          d_head(H + 1),
          d_z(Sum(4 * H, 1).rows, a.N),
          d_above(H, a.N),
          d_update(1, a.N),
          pairs(P::TERMS == 1 ? 0 : spec.most_columns(), 1),
          d_pairs(P::TERMS == 1 ? 0 : 2 * H, 1) {
        for (int64_t l = 0; l < spec.layers; ++l) {
            const int64_t K = spec.columns(l);
            d_weight.emplace_back(4 * H, K + 1);
            operand.emplace_back(d_weight.back().columns, a.N).fill(K, 1);
            if (P::TERMS == 2) neighbours.emplace_back(d_weight.back().columns, a.N);
            d_h.emplace_back(H, a.N);
            d_c.emplace_back(H, a.N);
        }
    }

    void run(const Slice& slice) {
        for (auto& sum : d_weight) sum.clear();
        std::fill(d_head.begin(), d_head.end(), Vector<T>{});
        for (int64_t start = slice.start, next; start < slice.end; start = next) {
            next = start + CHUNK;
            chunk(start, std::min<int64_t>(CHUNK, slice.end - start), next < slice.end ? next : slice.next);
        }
        T* d_phi = a.partials + slice.index * spec.parameters();
        for (int64_t l = 0; l < spec.layers; ++l) {
            const int64_t K = spec.columns(l);
            for (int64_t r = 0; r < 4 * H; ++r) {
                for (int64_t k = 0; k < K; ++k) d_phi[spec.offset(l) + r * K + k] = d_weight[l].at(r, k);
                d_phi[spec.bias_offset(l) + r] = d_weight[l].at(r, K);
            }
        }
        for (int64_t j = 0; j <= H; ++j) d_phi[spec.head_offset() + j] = total<T>(d_head[j]);
    }

  private:
    void chunk(int64_t start, int64_t n, int64_t next) {
        // Where unit j's h or c of layer l lies in a state.
        const auto row = [&](int64_t l, bool cell, int64_t j) {
            return (spec.state_row(l, cell) + j) * a.N + start;
        };
        for (int64_t l = 0; l < spec.layers; ++l)
            for (int64_t j = 0; j < H; ++j) {
                if (a.d_final_state) {
                    d_h[l].load(j, a.d_final_state + row(l, false, j), n);
                    d_c[l].load(j, a.d_final_state + row(l, true, j), n);
                } else {
                    d_h[l].fill(j, 0);
                    d_c[l].fill(j, 0);
                }
            }
        for (int64_t t = a.steps - 1; t >= 0; --t) {
            const S* before = a.history + t * spec.state_rows() * a.N;
            const S* after = before + spec.state_rows() * a.N;
            look_ahead(t > 0 ? t - 1 : a.steps - 1, t > 0 ? start : next, n);
            d_update.load(0, a.d_updates + t * a.N + start, n);
            head(after + row(spec.layers - 1, false, 0), n);
            for (int64_t l = spec.layers - 1; l >= 0; --l) {
                if (l == 0) preprocess(operand[0], a.inputs + t * spec.width * a.N + start, a.N, n, spec);
                for (int64_t j = 0; j < H; ++j) {
                    if (l > 0) operand[l].load(j, after + row(l - 1, false, j), n);
                    operand[l].load(spec.inputs(l) + j, before + row(l, false, j), n);
                }
                layer(l, before + row(l, true, 0), n);
            }
        }
        for (int64_t l = 0; l < spec.layers; ++l)
            for (int64_t j = 0; j < H; ++j) {
                d_h[l].store(j, a.d_initial_state + row(l, false, j), n);
                d_c[l].store(j, a.d_initial_state + row(l, true, j), n);
            }
    }

    // While n coordinates of one step are computed, the states that step t starts from come closer.
    void look_ahead(int64_t t, int64_t start, int64_t n) {
        ahead.aim(a.history + t * spec.state_rows() * a.N + start, spec.state_rows(), a.N,
                  std::min<int64_t>(CHUNK, a.N - start), spec.layers * tiles<T>(n) * H);
    }

    void head(const S* top_h, int64_t n) {
        const T* weight = a.phi + spec.head_offset();
        for (int64_t tile = 0; tile < tiles<T>(n); ++tile) {
            Tile<T>& d_out = *d_update.at(tile, 0);
            for (auto& d : d_out) d *= T(spec.output_scale);
            if (spec.tanh_output) through_tanh(d_out, top_h + tile * TILE<T>, n - tile * TILE<T>);
            for (auto& d : d_out) d_head[H] += d;
            for (int64_t j = 0; j < H; ++j) {
                Tile<T> h, &d = *d_above.at(tile, j);
                load_tile<T>(h, top_h + j * a.N + tile * TILE<T>, n - tile * TILE<T>);
                for (int v = 0; v < TILE_VECTORS; ++v) {
                    d[v] = weight[j] * d_out[v];
                    d_head[j] += h[v] * d_out[v];
                }
            }
        }
    }

    // From the cotangent of tanh(w_out h + b_out) to that of its argument.
    void through_tanh(Tile<T>& d_out, const S* top_h, int64_t n) {
        const T *weight = a.phi + spec.head_offset(), bias = weight[H];
        Tile<T> output, h;
        for (auto& v : output) v = Vector<T>{} + bias;
        for (int64_t j = 0; j < H; ++j) {
            load_tile<T>(h, top_h + j * a.N, n);
            for (int v = 0; v < TILE_VECTORS; ++v) output[v] += weight[j] * h[v];
        }
        hyperbolic_tangent<T>(output);
        for (int v = 0; v < TILE_VECTORS; ++v) d_out[v] *= T(1) - output[v] * output[v];
    }

    // From d_above, d_h and d_c of layer l after a step to those before it, and to d_above of the layer below.
    void layer(int64_t l, const S* old_c, int64_t n) {
        for (int64_t tile = 0; tile < tiles<T>(n); ++tile) {
            const Tile<T>* rows = operand[l].at(tile, 0);
            if constexpr (P::TERMS == 2) {
                const int64_t K = spec.columns(l);
                for (int64_t k = 0; k <= K; ++k)
                    for (int v = 0; v < Sum::VECTORS; ++v)
                        (*neighbours[l].at(tile, k))[v] = P::neighbours(rows[k][2 * v], rows[k][2 * v + 1]);
                P::pair_rows(rows, K, pairs.at(0, 0));
                rows = pairs.at(0, 0);
            }
            for (int64_t j = 0; j < H; ++j) {
                Tile<T> c;
                load_tile<T>(c, old_c + j * a.N + tile * TILE<T>, n - tile * TILE<T>);
                unit(l, tile, rows, j, c);
            }
            inputs(l, tile);
        }
        if constexpr (P::TERMS == 2) d_weight[l].add(d_z, neighbours[l], tiles<T>(n));
        else d_weight[l].add(d_z, operand[l], tiles<T>(n));
    }

    void unit(int64_t l, int64_t tile, const Tile<T>* rows, int64_t j, const Tile<T>& old_c) {
        ahead.template fetch<0>();
        Tile<T> unrounded[4], *d_gate[4];
        for (int q = 0; q < 4; ++q) {
            if constexpr (P::TERMS == 2) d_gate[q] = &unrounded[q];
            else d_gate[q] = d_z.at(tile, q * H + j);
        }
        const Cell<T, P> cell(spec, l, a.phi, a.weights, rows, old_c, j);
        for (int v = 0; v < TILE_VECTORS; ++v) {
            const Vector<T> i = cell.gate[0][v], f = cell.gate[1][v], g = cell.gate[2][v], o = cell.gate[3][v];
            const Vector<T> tanh_c = cell.tanh_c[v];
            const Vector<T> dh = (*d_h[l].at(tile, j))[v] + (*d_above.at(tile, j))[v];
            const Vector<T> dc = (*d_c[l].at(tile, j))[v] + dh * o * (T(1) - tanh_c * tanh_c);
            (*d_gate[0])[v] = dc * g * i * (T(1) - i);
            (*d_gate[1])[v] = dc * old_c[v] * f * (T(1) - f);
            (*d_gate[2])[v] = dc * i * (T(1) - g * g);
            (*d_gate[3])[v] = dh * tanh_c * o * (T(1) - o);
            (*d_c[l].at(tile, j))[v] = dc * f;
        }
        if constexpr (P::TERMS == 2) {
            for (int q = 0; q < 4; ++q)
                for (int v = 0; v < Sum::VECTORS; ++v)
                    (*d_z.at(tile, q * H + j))[v] = P::neighbours(unrounded[q][2 * v], unrounded[q][2 * v + 1]);
            for (int q = 0; q < 4; q += 2)
                for (int v = 0; v < TILE_VECTORS; ++v)
                    (*d_pairs.at(0, q / 2 * H + j))[v] = P::pairs(unrounded[q][v], unrounded[q + 1][v]);
        }
    }

    // W^T dZ, four columns of W at a time. The first layer's inputs are constants.
    KERNEL void inputs(int64_t l, int64_t tile) {
        const int64_t K = spec.columns(l), first_h = spec.inputs(l);
        const typename P::Weight* weight = a.weights.of_cotangents(l);
        const Tile<T>* d_gates;
        if constexpr (P::TERMS == 2) d_gates = d_pairs.at(0, 0);
        else d_gates = d_z.at(tile, 0);
        for (int64_t k = l ? 0 : first_h; k < K; k += 4) {
            Tile<T> sum[4] = {};  // past the last column this reads on (a bias follows), and drops the result
            for (int64_t r = 0; r < 4 * H / P::TERMS; ++r)
                for (int q = 0; q < 4; ++q)
                    for (int v = 0; v < TILE_VECTORS; ++v)
                        sum[q][v] = P::add(sum[q][v], weight[r * K + k + q], d_gates[r][v]);
            for (int q = 0; q < 4 && k + q < K; ++q) {
                Tile<T>& to = k + q < first_h ? *d_above.at(tile, k + q) : *d_h[l].at(tile, k + q - first_h);
                for (int v = 0; v < TILE_VECTORS; ++v) to[v] = sum[q][v];
            }
        }
    }
};

template <class P, class T, class S>
void step(int64_t threads, const Spec& spec, int64_t N, T* theta, const T* inputs, const S* state, S* new_state,
          const T* phi) {
    const typename P::Weights weights(spec, phi);
    for_slices<Step<T, S, P>>(threads,
                              StepArguments<T, S, P>{spec, weights, N, theta, inputs, state, new_state, phi});
}

template <class P, class T, class S>
void bptt(int64_t threads, const Spec& spec, int64_t N, int64_t steps, const T* inputs, const S* history,
          const T* d_updates, const T* d_final_state, const T* phi, T* d_phi, T* d_initial_state) {
    const int64_t parameters = spec.parameters(), slices = Slices(N).count;
    std::vector<T> partials(slices * parameters);
    const typename P::Weights weights(spec, phi);
    for_slices<Bptt<T, S, P>>(
        threads, BpttArguments<T, S, P>{spec, weights, N, steps, inputs, history, d_updates, d_final_state, phi,
                                        partials.data(), d_initial_state});
    std::fill_n(d_phi, parameters, T(0));
    for (int64_t i = 0; i < slices; ++i)
        for (int64_t k = 0; k < parameters; ++k) d_phi[k] += partials[i * parameters + k];
}

}  // namespace

// clang-format off
#define EXPORT(name, P, T, S)                                                                                 \
    extern "C" void step_##name(int64_t threads, const Spec* spec, int64_t N, T* theta, const T* inputs,      \
                                const S* state, S* new_state, const T* phi) {                                 \
        step<P>(threads, *spec, N, theta, inputs, state, new_state, phi);                                     \
    }                                                                                                         \
    extern "C" void bptt_##name(int64_t threads, const Spec* spec, int64_t N, int64_t steps, const T* inputs, \
                                const S* history, const T* d_updates, const T* d_final_state, const T* phi,   \
                                T* d_phi, T* d_initial_state) {                                               \
        bptt<P>(threads, *spec, N, steps, inputs, history, d_updates, d_final_state, phi, d_phi,              \
                d_initial_state);                                                                             \
    }
// clang-format on

extern "C" const char* instruction_set() { return INSTRUCTION_SET; }
extern "C" int has_openmp() {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

EXPORT(float32_float32, Exact<float>, float, float)
EXPORT(float32_bfloat16, Exact<float>, float, BFloat16)
EXPORT(float64_float64, Exact<double>, double, double)
#if defined(__AVX512BF16__)
EXPORT(float32_float32_bf16, Rounded, float, float)
EXPORT(float32_bfloat16_bf16, Rounded, float, BFloat16)
#endif
