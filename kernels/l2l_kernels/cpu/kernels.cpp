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
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

namespace {

// The machine's own vectors (wider ones are legal, and ten times slower), and as many to a tile as let the
// 4 x TILE_VECTORS sums of every product stay in registers.
#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, TILE_VECTORS = 4;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32, TILE_VECTORS = 2;
#elif defined(__aarch64__)
constexpr int VECTOR_BYTES = 16, TILE_VECTORS = 4;
#else
constexpr int VECTOR_BYTES = 16, TILE_VECTORS = 2;
#endif
constexpr int64_t CHUNK = 256;  // a row of a chunk is a contiguous kilobyte: shorter ones wait for the TLB
constexpr int64_t MIN_SLICE = 1024, MAX_SLICES = 64;

template <class T> struct VectorOf;
template <> struct VectorOf<float> { typedef float type __attribute__((vector_size(VECTOR_BYTES))); };
template <> struct VectorOf<double> { typedef double type __attribute__((vector_size(VECTOR_BYTES))); };
template <> struct VectorOf<int32_t> { typedef int32_t type __attribute__((vector_size(VECTOR_BYTES))); };
template <> struct VectorOf<int64_t> { typedef int64_t type __attribute__((vector_size(VECTOR_BYTES))); };
template <class T> using Vector = typename VectorOf<T>::type;
template <class T> using Tile = Vector<T>[TILE_VECTORS];

// For the functions with a product inside: inlined into their callers, they would run out of registers.
#define KERNEL __attribute__((noinline))

template <class T> constexpr int LANES = VECTOR_BYTES / sizeof(T);
template <class T> constexpr int64_t TILE = TILE_VECTORS * LANES<T>;  // coordinates
template <class T> constexpr int64_t TILES = CHUNK / TILE<T>;
static_assert(CHUNK % TILE<float> == 0 && MIN_SLICE % CHUNK == 0);

// ------------------------------------------------------------------------------------------ elementwise

template <class T> struct Exp;
template <> struct Exp<float> {
    using Bits = int32_t;
    static constexpr int MANTISSA = 23, DEGREE = 7;
    static constexpr float ROUND = 0x1.8p23f, LN2_HIGH = 0x1.62e4p-1f, LN2_LOW = 0x1.7f7d1cp-20f, LIMIT = 80;
};
template <> struct Exp<double> {
    using Bits = int64_t;
    static constexpr int MANTISSA = 52, DEGREE = 13;
    static constexpr double ROUND = 0x1.8p52, LN2_HIGH = 0x1.62e42fefa38p-1, LN2_LOW = 0x1.ef35793c7673p-45,
                            LIMIT = 700;
};

constexpr double inverse_factorial(int k) { return k < 2 ? 1 : inverse_factorial(k - 1) / k; }

// x := e^x = 2^n e^r with n = round(x / ln 2): Taylor's series for e^r, |r| <= ln(2)/2, and n added to the
// exponent bits. |x| is limited so that the result is a normal number; NaN stays NaN. M independent vectors at
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
    i = T(1) / (T(1) + x[0]);
    f = T(1) / (T(1) + x[1]);
    g = T(2) / (T(1) + x[2]) - T(1);
    o = T(1) / (T(1) + x[3]);
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

// A chunk of `rows` quantities, tile by tile, zero at first.
template <class T> class Matrix {
    struct Free { void operator()(void* p) const { std::free(p); } };
    int64_t rows;
    std::unique_ptr<Tile<T>[], Free> data;

  public:
    explicit Matrix(int64_t rows)
        : rows(rows), data((Tile<T>*)std::aligned_alloc(VECTOR_BYTES, rows * CHUNK * sizeof(T))) {
        std::memset((void*)data.get(), 0, rows * CHUNK * sizeof(T));
    }

    // Rows row, row + 1, ... of one tile.
    Tile<T>* at(int64_t tile, int64_t row) { return data.get() + tile * rows + row; }

    // n coordinates of a row from memory, zeros after them: lanes beyond the end then add nothing to any sum.
    template <class S> void load(int64_t row, const S* from, int64_t n) {
        for (int64_t tile = 0; tile < TILES<T>; ++tile) {
            T* to = (T*)at(tile, row);
            const int64_t count = std::clamp(n - tile * TILE<T>, int64_t(0), TILE<T>);
            if (count == TILE<T>) {  // a constant count: unrolled vector moves
                for (int64_t i = 0; i < TILE<T>; ++i) to[i] = widen(from[tile * TILE<T> + i]);
            } else {
                for (int64_t i = 0; i < count; ++i) to[i] = widen(from[tile * TILE<T> + i]);
                for (int64_t i = count; i < TILE<T>; ++i) to[i] = 0;
            }
        }
    }

    template <class S> void store(int64_t row, S* to, int64_t n) {
        for (int64_t tile = 0; tile < TILES<T> && tile * TILE<T> < n; ++tile) {
            const T* from = (const T*)at(tile, row);
            const int64_t count = std::min(n - tile * TILE<T>, TILE<T>);
            if (count == TILE<T>)
                for (int64_t i = 0; i < TILE<T>; ++i) assign(to[tile * TILE<T> + i], from[i]);
            else
                for (int64_t i = 0; i < count; ++i) assign(to[tile * TILE<T> + i], from[i]);
        }
    }

    void fill(int64_t row, T value) {
        for (int64_t tile = 0; tile < TILES<T>; ++tile)
            for (auto& vector : *at(tile, row)) vector = Vector<T>{} + value;
    }
};

// --------------------------------------------------------------------------------------------- the LSTM

struct Spec {
    int64_t layers, hidden, log_sign;
    double p, output_scale;

    int64_t inputs(int64_t layer) const { return layer ? hidden : log_sign ? 2 : 1; }
    int64_t columns(int64_t layer) const { return inputs(layer) + hidden; }
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

template <class T> void preprocess(Matrix<T>& rows, const T* grad, int64_t n, const Spec& spec) {
    rows.load(0, grad, n);
    if (!spec.log_sign) return;
    const T p = spec.p, slope = std::exp(spec.p);
    for (int64_t tile = 0; tile < TILES<T>; ++tile) {
        T *magnitude = (T*)rows.at(tile, 0), *sign = (T*)rows.at(tile, 1);
        for (int64_t i = 0; i < TILE<T>; ++i) {  // this order of max's and min's arguments lets NaN through
            sign[i] = std::min(std::max(magnitude[i] * slope, T(-1)), T(1));
            magnitude[i] = std::max(std::log(std::abs(magnitude[i])) / p, T(-1));
        }
    }
}

// The new cell and the activated gates i, f, g, o of hidden unit j, for one tile with operand rows [x; h].
template <class T> struct Cell {
    Tile<T> gate[4], c, tanh_c;

    KERNEL Cell(const Spec& spec, int64_t layer, const T* phi, const Tile<T>* operand, const Tile<T>& old_c,
                int64_t j) {
        const int64_t H = spec.hidden, K = spec.columns(layer);
        const T *weight = phi + spec.offset(layer) + j * K, *bias = phi + spec.bias_offset(layer) + j;
        for (int q = 0; q < 4; ++q)
            for (int v = 0; v < TILE_VECTORS; ++v) gate[q][v] = Vector<T>{} + bias[q * H];
        for (int64_t k = 0; k < K; ++k)
            for (int q = 0; q < 4; ++q)
                for (int v = 0; v < TILE_VECTORS; ++v) gate[q][v] += weight[q * H * K + k] * operand[k][v];
        for (int v = 0; v < TILE_VECTORS; ++v) {
            activate<T>(gate[0][v], gate[1][v], gate[2][v], gate[3][v]);
            tanh_c[v] = c[v] = gate[1][v] * old_c[v] + gate[0][v] * gate[2][v];
        }
        tanh<T>(tanh_c);
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

// Each thread makes a Worker (its scratch memory) and calls its slice(index, start, end), slice after slice.
// OpenMP, because PyTorch uses it: threads of another kind would fight its waiting ones for the cores.
template <class Worker, class Arguments> void for_slices(int64_t threads, const Arguments& arguments) {
    const Slices slices(arguments.N);
    const int team = std::max(int64_t(1), std::min(threads, slices.count));
    (void)team;  // unused without OpenMP
#pragma omp parallel num_threads(team)
    {
        Worker worker(arguments);
#pragma omp for schedule(dynamic) nowait
        for (int64_t i = 0; i < slices.count; ++i)
            worker.slice(i, i * slices.size, std::min(arguments.N, (i + 1) * slices.size));
    }
}

// -------------------------------------------------------------------------------------------------- step

template <class T, class S> struct StepArguments {
    const Spec& spec;
    int64_t N;
    T* theta;
    const T* grad;
    const S* state;
    S* new_state;
    const T* phi;
};

template <class T, class S> class Step {
    const StepArguments<T, S>& a;
    const Spec& spec = a.spec;
    Matrix<T> even, odd;  // rows [x; h] of a layer, and of the one above it
    Matrix<T> cell;       // rows c

  public:
    explicit Step(const StepArguments<T, S>& arguments)
        : a(arguments), even(2 * spec.hidden + 2), odd(2 * spec.hidden), cell(spec.hidden) {}

    void slice(int64_t, int64_t start, int64_t end) {
        for (; start < end; start += CHUNK) chunk(start, std::min(CHUNK, end - start));
    }

  private:
    void chunk(int64_t start, int64_t n) {
        const int64_t H = spec.hidden;
        Matrix<T>*operand = &even, *above = &odd;
        preprocess(*operand, a.grad + start, n, spec);
        for (int64_t l = 0; l < spec.layers; ++l) {
            const int64_t h_offset = spec.state_row(l, false) * a.N + start;
            const int64_t c_offset = spec.state_row(l, true) * a.N + start;
            for (int64_t j = 0; j < H; ++j) {
                operand->load(spec.inputs(l) + j, a.state + h_offset + j * a.N, n);
                cell.load(j, a.state + c_offset + j * a.N, n);
            }
            for (int64_t tile = 0; tile * TILE<T> < n; ++tile)
                for (int64_t j = 0; j < H; ++j) {
                    Tile<T>&c = *cell.at(tile, j), &h = *above->at(tile, j);
                    const Cell<T> updated(spec, l, a.phi, operand->at(tile, 0), c, j);
                    for (int v = 0; v < TILE_VECTORS; ++v) {
                        c[v] = updated.c[v];
                        h[v] = updated.gate[3][v] * updated.tanh_c[v];
                    }
                }
            for (int64_t j = 0; j < H; ++j) {
                above->store(j, a.new_state + h_offset + j * a.N, n);
                cell.store(j, a.new_state + c_offset + j * a.N, n);
            }
            std::swap(operand, above);
        }
        const T *weight = a.phi + spec.head_offset(), bias = weight[H];
        for (int64_t tile = 0; tile * TILE<T> < n; ++tile) {
            Tile<T> update = {};
            for (int64_t j = 0; j < H; ++j)
                for (int v = 0; v < TILE_VECTORS; ++v) update[v] += weight[j] * (*operand->at(tile, j))[v];
            T* theta = a.theta + start + tile * TILE<T>;
            for (int64_t i = 0; i < std::min(n - tile * TILE<T>, TILE<T>); ++i)
                theta[i] += T(spec.output_scale) * (((const T*)update)[i] + bias);
        }
    }
};

// -------------------------------------------------------------------------------------------------- bptt

template <class T, class S> struct BpttArguments {
    const Spec& spec;
    int64_t N, steps;
    const T* grads;
    const S* history;
    const T *d_updates, *d_final_state, *phi;
    T *partials, *d_initial_state;  // partials: d_phi of every slice, [slices, P]
};

// dZ [x; h; 1]^T of one layer, summed over steps and chunks: a vector of partial sums per element, reduced
// once per slice, so that neither operand is ever transposed. Kept in blocks whose sums fit in registers.
template <class T> class OuterSum {
    static constexpr int ROWS = 4, COLUMNS = TILE_VECTORS;
    int64_t rows, columns;
    std::vector<Vector<T>> sums;

  public:
    OuterSum(int64_t rows, int64_t columns) : rows(rows), columns(columns), sums(rows * columns) {}

    void clear() { std::fill(sums.begin(), sums.end(), Vector<T>{}); }

    KERNEL void add(Matrix<T>& left, Matrix<T>& right, int64_t tiles) {
        Vector<T>* block = sums.data();
        for (int64_t r = 0; r < rows; r += ROWS)
            for (int64_t c = 0; c < columns; c += COLUMNS, block += ROWS * COLUMNS) {
                Vector<T> sum[ROWS * COLUMNS];
                for (int i = 0; i < ROWS * COLUMNS; ++i) sum[i] = block[i];
                for (int64_t tile = 0; tile < tiles; ++tile) {
                    const Tile<T>*x = left.at(tile, r), *y = right.at(tile, c);
                    for (int v = 0; v < TILE_VECTORS; ++v)
                        for (int i = 0; i < ROWS; ++i)
                            for (int k = 0; k < COLUMNS; ++k) sum[i * COLUMNS + k] += x[i][v] * y[k][v];
                }
                for (int i = 0; i < ROWS * COLUMNS; ++i) block[i] = sum[i];
            }
    }

    T total(int64_t row, int64_t column) const {
        const int64_t block = row / ROWS * (columns / COLUMNS) + column / COLUMNS;
        const Vector<T> sum = sums[(block * ROWS + row % ROWS) * COLUMNS + column % COLUMNS];
        T result = 0;
        for (int i = 0; i < LANES<T>; ++i) result += sum[i];
        return result;
    }
};

inline int64_t pad4(int64_t n) { return (n + 3) / 4 * 4; }

template <class T, class S> class Bptt {
    const BpttArguments<T, S>& a;
    const Spec& spec = a.spec;
    const int64_t H = spec.hidden;
    std::vector<Matrix<T>> operand;       // per layer: rows [x; h; 1], padded by zeros to whole blocks
    std::vector<Matrix<T>> d_h, d_c;      // per layer: cotangents of its state
    std::vector<OuterSum<T>> d_weight;    // per layer: [4H, K + 1], the last column for the bias
    OuterSum<T> d_head;                   // [1, H + 1], padded likewise
    Matrix<T> top;                        // the head's operand: rows [h; 1]
    Matrix<T> c, d_z, d_above, d_update;  // d_above: what reaches h from the layer above or the head

  public:
    explicit Bptt(const BpttArguments<T, S>& arguments)
        : a(arguments), d_head(4, pad4(H + 1)), top(pad4(H + 1)), c(H), d_z(4 * H), d_above(H), d_update(4) {
        for (int64_t l = 0; l < spec.layers; ++l) {
            const int64_t K = spec.columns(l);
            operand.emplace_back(pad4(K + 1)).fill(K, 1);
            d_h.emplace_back(H);
            d_c.emplace_back(H);
            d_weight.emplace_back(4 * H, pad4(K + 1));
        }
        top.fill(H, 1);
    }

    void slice(int64_t index, int64_t start, int64_t end) {
        for (auto& sum : d_weight) sum.clear();
        d_head.clear();
        for (; start < end; start += CHUNK) chunk(start, std::min(CHUNK, end - start));
        T* d_phi = a.partials + index * spec.parameters();
        for (int64_t l = 0; l < spec.layers; ++l) {
            const int64_t K = spec.columns(l);
            for (int64_t r = 0; r < 4 * H; ++r) {
                for (int64_t k = 0; k < K; ++k) d_phi[spec.offset(l) + r * K + k] = d_weight[l].total(r, k);
                d_phi[spec.bias_offset(l) + r] = d_weight[l].total(r, K);
            }
        }
        for (int64_t j = 0; j <= H; ++j) d_phi[spec.head_offset() + j] = d_head.total(0, j);
    }

  private:
    void chunk(int64_t start, int64_t n) {
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
            d_update.load(0, a.d_updates + t * a.N + start, n);
            for (int64_t j = 0; j < H; ++j) top.load(j, after + row(spec.layers - 1, false, j), n);
            head(n);
            for (int64_t l = spec.layers - 1; l >= 0; --l) {
                if (l == 0) preprocess(operand[0], a.grads + t * a.N + start, n, spec);
                for (int64_t j = 0; j < H; ++j) {
                    if (l > 0) operand[l].load(j, after + row(l - 1, false, j), n);
                    operand[l].load(spec.inputs(l) + j, before + row(l, false, j), n);
                    c.load(j, before + row(l, true, j), n);
                }
                layer(l, n);
            }
        }
        for (int64_t l = 0; l < spec.layers; ++l)
            for (int64_t j = 0; j < H; ++j) {
                d_h[l].store(j, a.d_initial_state + row(l, false, j), n);
                d_c[l].store(j, a.d_initial_state + row(l, true, j), n);
            }
    }

    int64_t tiles(int64_t n) const { return (n + TILE<T> - 1) / TILE<T>; }

    void head(int64_t n) {
        const T* weight = a.phi + spec.head_offset();
        for (int64_t tile = 0; tile < tiles(n); ++tile) {
            Tile<T>& d_out = *d_update.at(tile, 0);
            for (auto& d : d_out) d *= T(spec.output_scale);
            for (int64_t j = 0; j < H; ++j)
                for (int v = 0; v < TILE_VECTORS; ++v) (*d_above.at(tile, j))[v] = weight[j] * d_out[v];
        }
        d_head.add(d_update, top, tiles(n));
    }

    // From d_above, d_h and d_c of layer l after a step to those before it, and to d_above of the layer below.
    void layer(int64_t l, int64_t n) {
        for (int64_t tile = 0; tile < tiles(n); ++tile) {
            for (int64_t j = 0; j < H; ++j) unit(l, tile, j);
            inputs(l, tile);
        }
        d_weight[l].add(d_z, operand[l], tiles(n));
    }

    void unit(int64_t l, int64_t tile, int64_t j) {
        const Tile<T>& old_c = *c.at(tile, j);
        Tile<T>* d_gate[4];
        for (int q = 0; q < 4; ++q) d_gate[q] = d_z.at(tile, q * H + j);
        const Cell<T> cell(spec, l, a.phi, operand[l].at(tile, 0), old_c, j);
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
    }

    // W^T dZ, four columns of W at a time. The first layer's inputs are constants.
    KERNEL void inputs(int64_t l, int64_t tile) {
        const int64_t K = spec.columns(l), first_h = spec.inputs(l);
        const T* weight = a.phi + spec.offset(l);
        const Tile<T>* d_gates = d_z.at(tile, 0);
        for (int64_t k = l ? 0 : first_h; k < K; k += 4) {
            Tile<T> sum[4] = {};  // past the last column this reads on (a bias follows), and drops the result
            for (int64_t r = 0; r < 4 * H; ++r)
                for (int q = 0; q < 4; ++q)
                    for (int v = 0; v < TILE_VECTORS; ++v) sum[q][v] += weight[r * K + k + q] * d_gates[r][v];
            for (int q = 0; q < 4 && k + q < K; ++q) {
                Tile<T>& to = k + q < first_h ? *d_above.at(tile, k + q) : *d_h[l].at(tile, k + q - first_h);
                for (int v = 0; v < TILE_VECTORS; ++v) to[v] = sum[q][v];
            }
        }
    }
};

template <class T, class S> void bptt(int64_t threads, BpttArguments<T, S> arguments, T* d_phi) {
    const int64_t P = arguments.spec.parameters(), slices = Slices(arguments.N).count;
    std::vector<T> partials(slices * P);
    arguments.partials = partials.data();
    for_slices<Bptt<T, S>>(threads, arguments);
    std::fill_n(d_phi, P, T(0));
    for (int64_t i = 0; i < slices; ++i)
        for (int64_t k = 0; k < P; ++k) d_phi[k] += partials[i * P + k];
}

}  // namespace

// clang-format off
#define EXPORT(name, T, S)                                                                                    \
    extern "C" void step_##name(int64_t threads, const Spec* spec, int64_t N, T* theta, const T* grad,        \
                                const S* state, S* new_state, const T* phi) {                                 \
        for_slices<Step<T, S>>(threads, StepArguments<T, S>{*spec, N, theta, grad, state, new_state, phi});   \
    }                                                                                                         \
    extern "C" void bptt_##name(int64_t threads, const Spec* spec, int64_t N, int64_t steps, const T* grads,  \
                                const S* history, const T* d_updates, const T* d_final_state, const T* phi,   \
                                T* d_phi, T* d_initial_state) {                                               \
        bptt<T, S>(threads, {*spec, N, steps, grads, history, d_updates, d_final_state, phi, nullptr,         \
                             d_initial_state}, d_phi);                                                        \
    }
// clang-format on

EXPORT(float32_float32, float, float)
EXPORT(float32_bfloat16, float, BFloat16)
EXPORT(float64_float64, double, double)
