// The loop over chunks on a CPU: what loop.py, chunk_step.py and chunk_gradient.py compute, one (batch, head) at a
// time, with the fast weights in the core's cache. Equations and names are theirs. Compiled at first use (cpu_loop.py).
//
// Matrices in scratch memory have padded rows (leading dimension `ld`, a whole number of vectors, zeros behind the
// end), so that products run in whole vectors. T is the type of states, coefficients and arithmetic, S that of the
// large tensors outside: double/double, float/float, float/bf16.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

// Bytes of a vector, and the rows × vectors of C that a product keeps in registers.
#if defined(__AVX512F__)
constexpr int VECTOR = 64, ROWS = 6, PANEL = 4;
#elif defined(__AVX__)
constexpr int VECTOR = 32, ROWS = 3, PANEL = 4;
#else
constexpr int VECTOR = 16, ROWS = 4, PANEL = 4;
#endif

typedef int64_t I;

struct bf16 {
    uint16_t bits;
    operator float() const {
        uint32_t wide = uint32_t(bits) << 16;
        float x;
        memcpy(&x, &wide, 4);
        return x;
    }
    bf16() = default;
    bf16(float x) {
        uint32_t wide;
        memcpy(&wide, &x, 4);
        uint32_t rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
        bits = uint16_t(x != x ? 0x7fc0 : rounded);  // NaN stays NaN
    }
};

extern "C" struct Arguments {
    // sizes: batch × heads, chunks, tokens of a chunk and of a block, features, pre-activations, hidden, outputs
    I G, K, C, N, F, P, E, D;
    I kind;  // pre-activations per hidden unit: 0 linear, 1 mlp, 2 gated_mlp
    I token;  // reads see the writes of their own chunk
    I complete, stride, context, train;
    double radius, smallest;
    // inputs
    const void *initial_out, *phi, *v, *by_initial, *phi_q, *q_by_initial, *scores, *gamma, *same, *old, *decay, *on,
        *at, *over, *before[2];
    // what the forward pass gives, and keeps for the backward pass
    void *y, *after[2], *kept[2], *pre, *read_pre, *error, *back, *total, *scale;
    // gradients; dstate comes in as that of `after` and goes out as that of `before`
    const void* dy;
    void *dstate[2], *dinitial, *dphi, *dv, *dby_initial, *dphi_q, *dq_by_initial, *dscores, *ddecay, *don, *dat,
        *dover;
    I rounding;  // the control word of the thread that asks: whether denormals are flushed
    I next;  // the next g that nobody has taken
};

namespace {

template <class T> struct Vec {
    typedef T type __attribute__((vector_size(VECTOR), aligned(sizeof(T)), may_alias));
    static constexpr int lanes = VECTOR / sizeof(T);
};

I up(I n, I to) { return (n + to - 1) / to * to; }

template <class T> I padded(I columns) {
    I ld = up(std::max<I>(columns, 1), Vec<T>::lanes);
    return ld * sizeof(T) % 256 ? ld : ld + Vec<T>::lanes;  // powers of two would share few sets of the cache
}

template <class T> struct Matrix {
    T* p = nullptr;
    I rows = 0, cols = 0, ld = 0;
    T* operator[](I r) const { return p + r * ld; }
    Matrix from(I row) const { return {p + row * ld, rows - row, cols, ld}; }
    Matrix part(I row, I count) const { return {p + row * ld, count, cols, ld}; }
};

// ---------------------------------------------------------------------------------------------------- products

// C (MR × NR vectors) = [C +] alpha A B, with A[i, k] at a[i·am + k·ak]
template <class T, int MR, int NR>
void tile(I K, const T* a, I am, I ak, const T* b, I ldb, T* c, I ldc, T alpha, bool add) {
    typedef typename Vec<T>::type V;
    constexpr int L = Vec<T>::lanes;
    V acc[MR][NR];
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < NR; j++) acc[i][j] = V{};
    for (I k = 0; k < K; k++) {
        V row[NR];
        for (int j = 0; j < NR; j++) row[j] = *(const V*)(b + k * ldb + j * L);
        for (int i = 0; i < MR; i++) {
            T x = a[i * am + k * ak];
            for (int j = 0; j < NR; j++) acc[i][j] += x * row[j];
        }
    }
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < NR; j++) {
            V* to = (V*)(c + i * ldc + j * L);
            *to = add ? *to + alpha * acc[i][j] : alpha * acc[i][j];
        }
}

template <class T, int NR, int MR = 1>
void tiles(int rows, I K, const T* a, I am, I ak, const T* b, I ldb, T* c, I ldc, T alpha, bool add) {
    if constexpr (MR <= (NR == PANEL ? ROWS : ROWS + 2)) {
        if (rows == MR) return tile<T, MR, NR>(K, a, am, ak, b, ldb, c, ldc, alpha, add);
        tiles<T, NR, MR + 1>(rows, K, a, am, ak, b, ldb, c, ldc, alpha, add);
    }
}

template <class T, int NR>
void panel(I M, I K, const T* a, I am, I ak, const T* b, I ldb, T* c, I ldc, T alpha, bool add) {
    constexpr I most = NR == PANEL ? ROWS : ROWS + 2;
    I blocks = (M + most - 1) / most;
    for (I n = 0, i = 0; n < blocks; n++) {
        I rows = (M - i + blocks - n - 1) / (blocks - n);
        tiles<T, NR>(int(rows), K, a + i * am, am, ak, b, ldb, c + i * ldc, ldc, alpha, add);
        i += rows;
    }
}

template <class T> void gemm(I M, I N, I K, const T* a, I am, I ak, const T* b, I ldb, T* c, I ldc, T alpha, bool add) {
    constexpr int L = Vec<T>::lanes;
    for (I j = 0; j < N; j += PANEL * L) {
        switch (std::min<I>(PANEL, (N - j + L - 1) / L)) {
            case 1: panel<T, 1>(M, K, a, am, ak, b + j, ldb, c + j, ldc, alpha, add); break;
            case 2: panel<T, 2>(M, K, a, am, ak, b + j, ldb, c + j, ldc, alpha, add); break;
            case 3: panel<T, 3>(M, K, a, am, ak, b + j, ldb, c + j, ldc, alpha, add); break;
            default: panel<T, 4>(M, K, a, am, ak, b + j, ldb, c + j, ldc, alpha, add);
        }
    }
}

// Interleave the lanes of two vectors: a perfect shuffle, log₂ of which transposes.
template <class T> void interleave(typename Vec<T>::type& a, typename Vec<T>::type& b) {
    typedef typename Vec<T>::type V;
    constexpr int L = Vec<T>::lanes;
    typedef typename std::conditional<sizeof(T) == 4, int32_t, int64_t>::type Index;
    typedef Index Mask __attribute__((vector_size(VECTOR)));
    Mask low, high;
    for (int i = 0; i < L; i++) {
        low[i] = i / 2 + (i % 2) * L;
        high[i] = L / 2 + i / 2 + (i % 2) * L;
    }
    V x = __builtin_shuffle(a, b, low), y = __builtin_shuffle(a, b, high);
    a = x, b = y;
}

// to[c][r] (+)= alpha from[r][c]; columns of `to` up to a whole vector are written, with zeros behind the end
template <class T> void transpose(I rows, I cols, const T* from, I lf, T* to, I lt) {
    typedef typename Vec<T>::type V;
    constexpr int L = Vec<T>::lanes;
    for (I r = 0; r < rows; r += L)
        for (I c = 0; c < cols; c += L) {
            V x[L];
            for (int i = 0; i < L; i++) x[i] = r + i < rows ? *(const V*)(from + (r + i) * lf + c) : V{};
            for (int step = 1; step < L; step *= 2) {
                V z[L];
                for (int i = 0; i < L / 2; i++) {
                    V a = x[i], b = x[i + L / 2];
                    interleave<T>(a, b);
                    z[2 * i] = a, z[2 * i + 1] = b;
                }
                for (int i = 0; i < L; i++) x[i] = z[i];
            }
            I count = std::min<I>(L, cols - c);
            for (I i = 0; i < count; i++) *(V*)(to + (c + i) * lt + r) = x[i];
        }
}

// ------------------------------------------------------------------------------------------------ activations

inline double exponential(double x) { return std::exp(x); }
inline float exponential(float x) {  // 2ⁿ times a polynomial of the rest; NaN stays NaN
    x = x > 88.0f ? 88.0f : x;
    x = x < -87.0f ? -87.0f : x;
    float n = floorf(x * 1.44269504f + 0.5f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t bits = (int32_t(n == n ? n : 0.0f) + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}
template <class T> T logistic(T x) { return T(1) / (T(1) + exponential(-x)); }

constexpr double SLOPE = 0.7978845608028654, CUBIC = 0.044715;  // of GELU's tanh form

// hidden (E) = act(pre) and, where asked for, its partial derivatives (P)
template <class T> void activate(I kind, I E, const T* __restrict pre, T* __restrict hidden, T* __restrict slopes) {
    if (kind == 2) {
        for (I i = 0; i < E; i++) {
            T gate = pre[i], up = pre[E + i], s = logistic(gate), silu = gate * s;
            hidden[i] = silu * up;
            if (slopes) slopes[i] = (s + silu - silu * s) * up, slopes[E + i] = silu;
        }
        return;
    }
    for (I i = 0; i < E; i++) {
        T x = pre[i], inner = T(SLOPE) * (1 + T(3 * CUBIC) * x * x);
        T tanh = 2 * logistic(T(2 * SLOPE) * (x + T(CUBIC) * x * x * x)) - 1;
        hidden[i] = T(0.5) * x * (1 + tanh);
        if (slopes) slopes[i] = T(0.5) * (1 + tanh) + T(0.5) * x * (1 - tanh * tanh) * inner;
    }
}

// gradient of pre, given those of hidden and, where they were used, of the derivatives
template <class T>
void deactivate(I kind, I E, const T* __restrict pre, const T* __restrict dh, const T* __restrict ds, T* __restrict dp) {
    if (kind == 2) {
        for (I i = 0; i < E; i++) {
            T gate = pre[i], up = pre[E + i], s = logistic(gate), silu = gate * s, slope = s + silu - silu * s;
            T dgate = ds ? ds[i] : T(0), dup = ds ? ds[E + i] : T(0);
            T bend = (1 - s) * (2 * s + silu - 2 * silu * s);  // SiLU″
            dp[i] = slope * (dup + dh[i] * up) + bend * up * dgate;
            dp[E + i] = dh[i] * silu + dgate * slope;
        }
        return;
    }
    for (I i = 0; i < E; i++) {
        T x = pre[i], inner = T(SLOPE) * (1 + T(3 * CUBIC) * x * x);
        T tanh = 2 * logistic(T(2 * SLOPE) * (x + T(CUBIC) * x * x * x)) - 1;
        T slope = T(0.5) * (1 + tanh) + T(0.5) * x * (1 - tanh * tanh) * inner;
        T bend = (1 - tanh * tanh) * (inner + x * (T(3 * SLOPE * CUBIC) * x - tanh * inner * inner));  // GELU″
        dp[i] = slope * dh[i] + bend * (ds ? ds[i] : T(0));
    }
}

template <class T> T dot(I n, const T* __restrict a, const T* __restrict b) {
    typedef typename Vec<T>::type V;
    constexpr int L = Vec<T>::lanes;
    V acc[4] = {};
    I i = 0;
    for (; i + 4 * L <= n; i += 4 * L)
        for (int j = 0; j < 4; j++) acc[j] += *(const V*)(a + i + j * L) * *(const V*)(b + i + j * L);
    acc[0] = (acc[0] + acc[1]) + (acc[2] + acc[3]);
    T sum = 0;
    for (int j = 0; j < L; j++) sum += acc[0][j];
    for (; i < n; i++) sum += a[i] * b[i];
    return sum;
}

// ----------------------------------------------------------------------------- what adds to both halves of a state

// aᵀ b for the half w and sᵀ b for the half s; null: none
template <class T> struct Outer {
    const T *w, *s;
    I ld;
    const T* b;
    I ldb, tokens;
};

template <class T, int MR, int NR>
void mix_tile(I R, const T* z, I ldz, T* to, I ldt, const T* by, const Outer<T>* outer, int count) {
    typedef typename Vec<T>::type V;
    constexpr int L = Vec<T>::lanes;
    V w[MR][NR], s[MR][NR];
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < NR; j++) {
            V zw = *(const V*)(z + i * ldz + j * L), zs = *(const V*)(z + (R + i) * ldz + j * L);
            w[i][j] = by[0] * zw + by[1] * zs;
            s[i][j] = by[2] * zw + by[3] * zs;
        }
    for (int f = 0; f < count; f++) {
        const Outer<T>& o = outer[f];
        for (I k = 0; k < o.tokens; k++) {
            V row[NR];
            for (int j = 0; j < NR; j++) row[j] = *(const V*)(o.b + k * o.ldb + j * L);
            for (int i = 0; i < MR; i++) {
                T x = o.w[k * o.ld + i];
                for (int j = 0; j < NR; j++) w[i][j] += x * row[j];
            }
            if (o.s)
                for (int i = 0; i < MR; i++) {
                    T x = o.s[k * o.ld + i];
                    for (int j = 0; j < NR; j++) s[i][j] += x * row[j];
                }
        }
    }
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < NR; j++) {
            *(V*)(to + i * ldt + j * L) = w[i][j];
            *(V*)(to + (R + i) * ldt + j * L) = s[i][j];
        }
}

template <class T, int NR>
void mix_panel(I R, const T* z, I ldz, T* to, I ldt, const T* by, const Outer<T>* outer, int count) {
    constexpr int MR = ROWS / 2;
    std::vector<Outer<T>> at(outer, outer + count);
    auto advance = [&](I rows) {
        for (auto& o : at) o.w += rows, o.s = o.s ? o.s + rows : nullptr;
    };
    I r = 0;
    for (; r + MR <= R; r += MR, advance(MR))
        mix_tile<T, MR, NR>(R, z + r * ldz, ldz, to + r * ldt, ldt, by, at.data(), count);
    for (; r < R; r++, advance(1)) mix_tile<T, 1, NR>(R, z + r * ldz, ldz, to + r * ldt, ldt, by, at.data(), count);
}

// to = [[by₀, by₁], [by₂, by₃]] z + all outer products; `to` may be z
template <class T> void mix(Matrix<T> z, Matrix<T> to, const T* by, const Outer<T>* outer, int count) {
    constexpr int L = Vec<T>::lanes;
    I R = z.rows / 2;
    Outer<T> at[4];
    for (I j = 0; j < z.cols; j += PANEL * L) {
        for (int f = 0; f < count; f++) at[f] = outer[f], at[f].b += j;
        switch (std::min<I>(PANEL, (z.cols - j + L - 1) / L)) {
            case 1: mix_panel<T, 1>(R, z.p + j, z.ld, to.p + j, to.ld, by, at, count); break;
            case 2: mix_panel<T, 2>(R, z.p + j, z.ld, to.p + j, to.ld, by, at, count); break;
            case 3: mix_panel<T, 3>(R, z.p + j, z.ld, to.p + j, to.ld, by, at, count); break;
            default: mix_panel<T, 4>(R, z.p + j, z.ld, to.p + j, to.ld, by, at, count);
        }
    }
}

// ------------------------------------------------------------------------------------------------------- a worker

template <class T> struct Pool {  // scratch memory of one thread, kept between calls
    std::vector<char> bytes;
    size_t used = 0;
    Matrix<T> take(I rows, I cols) {
        I ld = padded<T>(cols);
        Matrix<T> m{(T*)(base() + used), rows, cols, ld};
        used += size_t(up((rows * ld + VECTOR) * sizeof(T), VECTOR));
        return m;
    }
    char* base() { return (char*)((uintptr_t(bytes.data()) + VECTOR - 1) / VECTOR * VECTOR); }
};

template <class T, class S> struct Worker {
    Arguments& a;
    I layers, H2;  // H2: rows that a read of inside the chunk needs of D
    I R[2], Q[2];
    bool act, token;
    typedef Matrix<T> M;

    // scratch
    M w0, w_out, phi, phi_old, pre, v, hidden, hidden_old, slopes, e1, e2, back, kappa, hh, total, over, phi_q, two0,
        two1, read_pre, read_hidden, y, alike, tmp, ton, tsq, z[2];
    M dz[2], dy, de1, de2, dphi, dhidden, y0, y1, eo0, eo1, left, right, drh, drp, datt, datt2, dover, dback, dslopes,
        dpre, factor[4], dinitial, spare[2];
    std::vector<M> states[2];
    std::vector<T> sens, on0, on1, don0, don1, rows, dat0, dat1;
    std::vector<T> own_row;

    explicit Worker(Arguments& a_) : a(a_) {
        act = a.kind > 0, token = a.token;
        layers = act ? 2 : 1;
        R[0] = a.F, Q[0] = a.P, R[1] = a.E, Q[1] = a.D;
        H2 = token ? a.C : 1;
        static thread_local Pool<T> pool;
        plan(pool);  // counts
        size_t need = pool.used + 2 * VECTOR;
        if (pool.bytes.size() < need) pool.bytes.assign(need, 0);
        else std::memset(pool.bytes.data(), 0, need);  // padding must be zero
        plan(pool);
        for (auto* x : {&sens, &on0, &on1, &don0, &don1, &own_row}) x->assign(a.N, 0);
        for (auto* x : {&dat0, &dat1}) x->assign(a.C, 0);
        rows.assign(std::max(a.E, a.D), 0);
    }

    void plan(Pool<T>& p) {
        p.used = 0;
        I N = a.N, C = a.C, F = a.F, P = a.P, E = a.E, D = a.D, wide = std::max({F, P, E, D, N, C});
        for (int l = 0; l < layers; l++) z[l] = p.take(2 * R[l], Q[l]);
        phi = p.take(N, F), phi_old = a.old ? p.take(N, F) : phi;
        pre = p.take(N, P), v = p.take(N, D), e1 = p.take(N, P);
        kappa = p.take(N, N), hh = p.take(N, N), total = p.take(H2, N);
        phi_q = p.take(C, F), read_pre = p.take(C, P), y = p.take(C, D);
        two0 = p.take(std::max(N, C), wide), two1 = p.take(std::max(N, C), wide);
        tmp = p.take(wide, wide), ton = p.take(wide, wide), tsq = p.take(wide, wide);
        if (token) over = p.take(C, N), alike = p.take(C, N);
        if (act) {
            w0 = p.take(E, D), w_out = a.old ? p.take(E, D) : p.take(E, D);
            hidden = p.take(N, E), hidden_old = a.old ? p.take(N, E) : hidden;
            slopes = p.take(N, P), e2 = p.take(N, D), back = p.take(N, E), read_hidden = p.take(C, E);
        }
        if (!a.dy) return;
        for (int l = 0; l < layers; l++) {
            dz[l] = p.take(2 * R[l], Q[l]), spare[l] = p.take(2 * R[l], Q[l]);
            states[l].clear();
            for (I i = 0; i < a.stride; i++) states[l].push_back(p.take(2 * R[l], Q[l]));
        }
        dy = p.take(C, D), de1 = p.take(N, P), dphi = p.take(N, F);
        y0 = p.take(N, wide), y1 = p.take(N, wide), eo0 = p.take(N, wide), eo1 = p.take(N, wide);
        drp = p.take(C, P), dpre = p.take(N, P);
        if (token) left = p.take(C, wide), right = p.take(C, wide), datt = p.take(C, N), datt2 = p.take(C, N), dover = p.take(C, N);
        for (auto& f : factor) f = p.take(std::max(N, C), wide);
        if (act) {
            de2 = p.take(N, D), dhidden = p.take(N, E), drh = p.take(C, E), dback = p.take(N, E);
            dslopes = p.take(N, P), dinitial = p.take(E, D);
        }
    }

    // ------------------------------------------------------------------------------------------------- to and fro

    template <class X> static const X* at(const void* p, I index, I size) { return (const X*)p + index * size; }
    template <class X> static void load(M to, const X* from) {
        for (I r = 0; r < to.rows; r++)
            for (I c = 0; c < to.cols; c++) to[r][c] = T(from[r * to.cols + c]);
    }
    template <class X> static void store(X* to, M from, I cols, T sign = 1) {
        for (I r = 0; r < from.rows; r++)
            for (I c = 0; c < cols; c++) to[r * cols + c] = X(sign * from[r][c]);
    }
    static void zero(M m) { std::memset(m.p, 0, size_t(m.rows * m.ld) * sizeof(T)); }
    static M view(M m, I rows, I cols) { return {m.p, rows, cols, padded<T>(cols)}; }  // of scratch, for a smaller one

    // C = [C +] alpha A B
    static void nn(M A, M B, M C, T alpha = 1, bool add = false) {
        gemm<T>(A.rows, B.cols, A.cols, A.p, A.ld, 1, B.p, B.ld, C.p, C.ld, alpha, add);
    }
    // C = [C +] alpha Aᵀ B
    static void tn(M A, M B, M C, T alpha = 1, bool add = false) {
        gemm<T>(A.cols, B.cols, A.rows, A.p, 1, A.ld, B.p, B.ld, C.p, C.ld, alpha, add);
    }
    // C = [C +] alpha (A Bᵀ [+ A2 B2ᵀ]): transposes what is smaller, A and the result or B
    void nt(M A, M B, M C, T alpha = 1, bool add = false, const M* A2 = nullptr, const M* B2 = nullptr) {
        if (A.rows * (A.cols + B.rows) < B.rows * B.cols) {
            M At = view(ton, A.cols, A.rows), Ct = view(tsq, B.rows, A.rows), back = view(tmp, A.rows, B.rows);
            transpose<T>(A.rows, A.cols, A.p, A.ld, At.p, At.ld);
            gemm<T>(B.rows, A.rows, B.cols, B.p, B.ld, 1, At.p, At.ld, Ct.p, Ct.ld, alpha, false);
            if (A2) {
                transpose<T>(A2->rows, A2->cols, A2->p, A2->ld, At.p, At.ld);
                gemm<T>(B.rows, A.rows, B.cols, B2->p, B2->ld, 1, At.p, At.ld, Ct.p, Ct.ld, alpha, true);
            }
            if (!add) return transpose<T>(B.rows, A.rows, Ct.p, Ct.ld, C.p, C.ld);
            transpose<T>(B.rows, A.rows, Ct.p, Ct.ld, back.p, back.ld);
            for (I r = 0; r < A.rows; r++)
                for (I c = 0; c < B.rows; c++) C[r][c] += back[r][c];
            return;
        }
        M Bt = view(ton, B.cols, B.rows);
        transpose<T>(B.rows, B.cols, B.p, B.ld, Bt.p, Bt.ld);
        nn(A, Bt, C, alpha, add);
        if (A2) {
            transpose<T>(B.rows, B.cols, B2->p, B2->ld, Bt.p, Bt.ld);
            nn(*A2, Bt, C, alpha, true);
        }
    }

    static M first(M state) { return {state.p, state.rows / 2, state.cols, state.ld}; }
    static M second(M state) { return state.part(state.rows / 2, state.rows / 2); }

    bool old(I g, I n, I i) const { return !a.old || ((const uint8_t*)a.old)[(g * a.K + n) * a.N + i]; }
    // rows of x whose token sees W_ξ
    void mask(I g, I n, M x, M to, I shift) const {
        for (I i = 0; i < x.rows; i++) {
            bool seen = old(g, n, i + shift);
            for (I c = 0; c < x.cols; c++) to[i][c] = seen ? x[i][c] : T(0);
        }
    }
    I halo() const { return a.N - a.C; }

    template <class X> X* chunk(void* p, I g, I n, I size) const { return (X*)p + (g * a.K + n) * size; }
    template <class X> const X* chunk(const void* p, I g, I n, I size) const { return (const X*)p + (g * a.K + n) * size; }

    void load_state(M* to, const void* const* from, I index) {
        for (int l = 0; l < layers; l++) load(to[l], (const T*)from[l] + index * 2 * R[l] * Q[l]);
    }
    void store_state(void* const* to, M* from, I index) {
        for (int l = 0; l < layers; l++) store((T*)to[l] + index * 2 * R[l] * Q[l], from[l], Q[l]);
    }

    void sum_out(M* state) {  // W_init + w of the second layer
        M w = first(state[1]);
        for (I r = 0; r < a.E; r++)
            for (I c = 0; c < a.D; c++) w_out[r][c] = w0[r][c] + w[r][c];
    }

    // --------------------------------------------------------------------------------------------------- forward

    bool learns(I n) const { return n < a.complete || token; }

    void learn(I g, I n) {  // factors of the chunk's gradients, and D
        load(phi, chunk<S>(a.phi, g, n, a.N * a.F));
        if (a.old) mask(g, n, phi, phi_old, 0);
        load(pre, chunk<S>(a.by_initial, g, n, a.N * a.P));
        nn(phi_old, first(z[0]), pre, 1, true);
        load(v, chunk<S>(a.v, g, n, a.N * a.D));
        if (!act) {
            for (I i = 0; i < a.N; i++)
                for (I c = 0; c < a.P; c++) e1[i][c] = pre[i][c] - v[i][c];
        } else {
            for (I i = 0; i < a.N; i++) activate(a.kind, a.E, pre[i], hidden[i], slopes[i]);
            if (!a.old) {
                nn(hidden, w_out, e2, 1, false);
                for (I i = 0; i < a.N; i++)
                    for (I c = 0; c < a.D; c++) e2[i][c] -= v[i][c];
                nt(e2, w_out, back);
            } else {
                M e_old = view(two0, a.N, a.D);
                mask(g, n, hidden, hidden_old, 0);
                nn(hidden, w0, e2);
                nn(hidden_old, first(z[1]), e2, 1, true);
                for (I i = 0; i < a.N; i++)
                    for (I c = 0; c < a.D; c++) e2[i][c] -= v[i][c];
                mask(g, n, e2, e_old, 0);
                M w = first(z[1]);
                nt(e2, w0, back, 1, false, &e_old, &w);
            }
            first_errors();
        }
        curvature(g, n);
        if (!a.train) return;
        store(chunk<T>(a.pre, g, n, a.N * a.P), pre, a.P);
        store(chunk<T>(a.total, g, n, H2 * a.N), total, a.N);
        if (!act) return;
        store(chunk<T>(a.error, g, n, a.N * a.D), e2, a.D);
        store(chunk<T>(a.back, g, n, a.N * a.E), back, a.E);
    }

    void first_errors() {
        for (I i = 0; i < a.N; i++)
            for (I k = 0; k < a.kind; k++)
                for (I c = 0; c < a.E; c++) e1[i][k * a.E + c] = slopes[i][k * a.E + c] * back[i][c];
    }

    void restore(I g, I n) {  // what `learn` found, from what it kept
        load(phi, chunk<S>(a.phi, g, n, a.N * a.F));
        if (a.old) mask(g, n, phi, phi_old, 0);
        load(pre, chunk<T>(a.pre, g, n, a.N * a.P));
        load(total, chunk<T>(a.total, g, n, H2 * a.N));
        if (!act) {
            load(v, chunk<S>(a.v, g, n, a.N * a.D));
            for (I i = 0; i < a.N; i++)
                for (I c = 0; c < a.P; c++) e1[i][c] = pre[i][c] - v[i][c];
            return;
        }
        for (I i = 0; i < a.N; i++) activate(a.kind, a.E, pre[i], hidden[i], slopes[i]);
        if (a.old) mask(g, n, hidden, hidden_old, 0);
        load(e2, chunk<T>(a.error, g, n, a.N * a.D));
        load(back, chunk<T>(a.back, g, n, a.N * a.E));
        first_errors();
    }

    // the smaller of two bounds on ‖diag(slopes) W‖², given its squared slopes: network.norm_bound
    T spectral_bound(M w) {
        M wt = view(ton, a.D, a.E), gram = view(tsq, a.D, a.D);
        transpose<T>(a.E, a.D, w.p, w.ld, wt.p, wt.ld);
        nn(wt, w, gram);
        T most = 0;
        for (I r = 0; r < a.D; r++) {
            T sum = 0;
            for (I c = 0; c < a.D; c++) sum += std::abs(gram[r][c]);
            most = sum > most || sum != sum ? sum : most;
        }
        return most;
    }

    void sensitivity(I g, I n, M w, bool seen) {
        T spectral = spectral_bound(w);
        for (I r = 0; r < a.E; r++) rows[r] = dot(a.D, w[r], w[r]);
        for (I i = 0; i < a.N; i++) {
            if (a.old && old(g, n, i) != seen) continue;
            T frobenius = 0, most = 0;
            for (I c = 0; c < a.E; c++) {
                T squared = 0;
                for (I k = 0; k < a.kind; k++) squared += slopes[i][k * a.E + c] * slopes[i][k * a.E + c];
                frobenius += squared * rows[c];
                most = squared > most ? squared : most;
            }
            T other = most * spectral;
            sens[i] = std::sqrt(other < frobenius ? other : frobenius);
        }
    }

    void curvature(I g, I n) {
        I N = a.N;
        nt(phi, phi, kappa);
        if (act) {
            sensitivity(g, n, w_out, true);
            if (a.old) sensitivity(g, n, w0, false);
            nt(hidden, hidden, hh);
        }
        const uint8_t* same = a.same ? chunk<uint8_t>(a.same, g, n, N * N) : nullptr;
        for (I i = 0; i < N; i++) {
            for (I j = 0; j < N; j++) {
                T k = std::abs(kappa[i][j]);
                kappa[i][j] = act ? std::abs(hh[i][j]) + k * (1 + sens[i] * sens[j]) : k;
            }
            if (same)
                for (I j = 0; j < N; j++) kappa[i][j] = same[i * N + j] ? kappa[i][j] : T(0);
        }
        const T* gamma = chunk<T>(a.gamma, g, n, N);
        for (I i = 0; i < N; i++) own_row[i] = kappa[i][i] * (1 - gamma[i]);
        T least = T(a.smallest), context = T(a.context);
        for (I j = 0, t = 0; j < N; j++) {
            for (I i = 0; i < N; i++) own_row[i] += gamma[j] * kappa[j][i];
            if (token ? j < N - a.C : j < N - 1) continue;
            for (I i = 0; i < N; i++) {
                T d = context * own_row[i];
                total[t][i] = d < least ? least : d;
            }
            t++;
        }
    }

    // [a x, −b x]
    void weigh(M x, const T* by, M to0, M to1, I count) {
        for (I i = 0; i < x.rows; i++)
            for (I c = 0; c < x.cols; c++) to0[i][c] = by[i] * x[i][c], to1[i][c] = by[count + i] * x[i][c];
    }

    void attention(M weights, M scores, M to) {
        for (I i = 0; i < to.rows; i++)
            for (I c = 0; c < to.cols; c++) to[i][c] = weights[i][c] * scores[i][c];
    }

    void divide_over(I g, I n) {
        const T* gamma = chunk<T>(a.over, g, n, a.C * a.N);
        for (I i = 0; i < a.C; i++)
            for (I c = 0; c < a.N; c++) over[i][c] = gamma[i * a.N + c] / total[i][c];
    }

    void read(I g, I n) {
        load(phi_q, chunk<S>(a.phi_q, g, n, a.C * a.F));
        load(read_pre, chunk<S>(a.q_by_initial, g, n, a.C * a.P));
        const T* at_ = token ? chunk<T>(a.at, g, n, 2 * a.C) : nullptr;
        M x0 = view(two0, a.C, a.F), x1 = view(two1, a.C, a.F);
        if (!token) {
            M x = phi_q;
            if (a.old) mask(g, n, phi_q, x = x0, halo());
            nn(x, first(z[0]), read_pre, 1, true);
        } else {
            divide_over(g, n);
            weigh(phi_q, at_, x0, x1, a.C);
            nn(x0, first(z[0]), read_pre, 1, true);
            nn(x1, second(z[0]), read_pre, 1, true);
            load(alike, chunk<S>(a.scores, g, n, a.C * a.N));
            attention(over, alike, alike);
            nn(alike, e1, read_pre, -1, true);
        }
        if (a.train && act) store(chunk<T>(a.read_pre, g, n, a.C * a.P), read_pre, a.P);
        if (!act) return store(chunk<S>(a.y, g, n, a.C * a.D), read_pre, a.D);
        for (I i = 0; i < a.C; i++) activate<T>(a.kind, a.E, read_pre[i], read_hidden[i], nullptr);
        if (!token && !a.old) {
            nn(read_hidden, w_out, y);
        } else if (!token) {
            M x = view(two0, a.C, a.E);
            mask(g, n, read_hidden, x, halo());
            nn(read_hidden, w0, y);
            nn(x, first(z[1]), y, 1, true);
        } else {
            M h0 = view(two0, a.C, a.E), h1 = view(two1, a.C, a.E);
            weigh(read_hidden, at_, h0, h1, a.C);
            nn(read_hidden, w0, y);
            nn(h0, first(z[1]), y, 1, true);
            nn(h1, second(z[1]), y, 1, true);
            nt(read_hidden, hidden, alike);
            attention(over, alike, alike);
            nn(alike, e2, y, -1, true);
        }
        store(chunk<S>(a.y, g, n, a.C * a.D), y, a.D);
    }

    void step_sizes(I g, I n) {  // ω/D
        const T* on = chunk<T>(a.on, g, n, 2 * a.N);
        for (I i = 0; i < a.N; i++) on0[i] = on[i] / total[H2 - 1][i], on1[i] = on[a.N + i] / total[H2 - 1][i];
    }

    void update(I g, I n, M* from, M* to) {
        step_sizes(g, n);
        const T* by = chunk<T>(a.decay, g, n, 4);
        M* inputs[2] = {&phi, &hidden};
        M* errors[2] = {&e1, &e2};
        for (int l = 0; l < layers; l++) {
            M x0 = view(two0, a.N, R[l]), x1 = view(two1, a.N, R[l]), x = *inputs[l];
            for (I i = 0; i < a.N; i++)
                for (I c = 0; c < R[l]; c++) x0[i][c] = on0[i] * x[i][c], x1[i][c] = on1[i] * x[i][c];
            Outer<T> o{x0.p, x1.p, x0.ld, errors[l]->p, errors[l]->ld, a.N};
            mix(from[l], to[l], by, &o, 1);
        }
    }

    // the matrices of the paper: W_gate and W_up lie side by side
    int matrices() const { return act ? int(a.kind) + 1 : 1; }
    M matrix(M* state, int m) const {
        bool last = m == matrices() - 1;
        int l = last && act ? 1 : 0;
        M w = first(state[l]);
        I columns = act && !last ? a.E : Q[l];
        return {w.p + (act && !last ? m * a.E : 0), w.rows, columns, w.ld};
    }

    void hold(M* state, T* scale) {  // on the ball
        for (int m = 0; m < matrices(); m++) {
            M w = matrix(state, m);
            T sum = 0;
            for (I r = 0; r < w.rows; r++) sum += dot(w.cols, w[r], w[r]);
            T size = std::sqrt(sum / T(w.rows * w.cols));
            scale[m] = size > T(a.radius) ? T(a.radius) / size : T(1);
            stretch(w, scale[m]);
        }
    }
    static void stretch(M w, T by) {
        if (by == 1) return;
        for (I r = 0; r < w.rows; r++)
            for (I c = 0; c < w.cols; c++) w[r][c] *= by;
    }

    void forward(I g) {
        load_state(z, a.before, g);
        if (act) load(w0, (const T*)a.initial_out + g * a.E * a.D);
        for (I n = 0; n < a.K; n++) {
            if (a.train && n % a.stride == 0) store_state(a.kept, z, n / a.stride * a.G + g);
            if (act) sum_out(z);
            if (learns(n)) learn(g, n);
            read(g, n);
            if (n >= a.complete) continue;
            update(g, n, z, z);
            T scale[3] = {1, 1, 1};
            hold(z, scale);
            if (a.train) std::memcpy(chunk<T>(a.scale, g, n, 3), scale, sizeof scale);
        }
        store_state(a.after, z, g);
    }

    // -------------------------------------------------------------------------------------------------- backward

    void next_state(I g, I n, M* from, M* to) {  // as in the forward pass
        restore(g, n);
        update(g, n, from, to);
        const T* scale = chunk<T>(a.scale, g, n, 3);
        for (int m = 0; m < matrices(); m++) stretch(matrix(to, m), scale[m]);
    }

    void backward_ball(I g, I n, M* state) {
        const T* scale = chunk<T>(a.scale, g, n, 3);
        bool held = false;
        for (int m = 0; m < matrices(); m++) held |= scale[m] != 1;
        if (!held) return;
        next_state(g, n, state, spare);
        for (int m = 0; m < matrices(); m++) {
            if (scale[m] == 1) continue;
            M w = matrix(spare, m), dw = matrix(dz, m);
            T along = 0, size = 0;
            for (I r = 0; r < w.rows; r++) along += dot(w.cols, w[r], dw[r]), size += dot(w.cols, w[r], w[r]);
            for (I r = 0; r < w.rows; r++)
                for (I c = 0; c < w.cols; c++) dw[r][c] = scale[m] * (dw[r][c] - w[r][c] * (along / size));
        }
    }

    void backward_update(I g, I n, M* state) {
        backward_ball(g, n, state);
        restore(g, n);
        step_sizes(g, n);
        M* inputs[2] = {&phi, &hidden};
        M* errors[2] = {&e1, &e2};
        M* dinputs[2] = {&dphi, &dhidden};
        M* derrors[2] = {&de1, &de2};
        T* ddecay = chunk<T>(a.ddecay, g, n, 4);
        T* don = chunk<T>(a.don, g, n, 2 * a.N);
        std::fill(don0.begin(), don0.end(), T(0)), std::fill(don1.begin(), don1.end(), T(0));
        for (int l = 0; l < layers; l++) {
            M x = *inputs[l], e = *errors[l], de = *derrors[l], w = first(dz[l]), s = second(dz[l]);
            M a0 = view(y0, a.N, Q[l]), a1 = view(y1, a.N, Q[l]), b0 = view(eo0, a.N, Q[l]), b1 = view(eo1, a.N, Q[l]);
            nn(x, w, a0), nn(x, s, a1);
            for (I i = 0; i < a.N; i++) {
                don0[i] += dot(Q[l], e[i], a0[i]), don1[i] += dot(Q[l], e[i], a1[i]);
                for (I c = 0; c < Q[l]; c++) {
                    de[i][c] = on0[i] * a0[i][c] + on1[i] * a1[i][c];
                    b0[i][c] = on0[i] * e[i][c], b1[i][c] = on1[i] * e[i][c];
                }
            }
            nt(b0, w, *dinputs[l], 1, false, &b1, &s);
            for (I h = 0; h < 2; h++)
                for (I r = 0; r < R[l]; r++)
                    for (I other = 0; other < 2; other++)
                        ddecay[h * 2 + other] += dot(Q[l], dz[l][h * R[l] + r], state[l][other * R[l] + r]);
        }
        for (I i = 0; i < a.N; i++)
            don[i] = don0[i] / total[H2 - 1][i], don[a.N + i] = don1[i] / total[H2 - 1][i];
    }

    // of one layer of a read inside a chunk: the gradient of x
    void backward_token(I g, I n, M x, M state, M d, M dx, M error, M derror, bool started) {
        const T* at_ = chunk<T>(a.at, g, n, 2 * a.C);
        M L = view(left, a.C, x.cols), Rr = view(right, a.C, x.cols);
        nt(d, first(state), L), nt(d, second(state), Rr);
        for (I i = 0; i < a.C; i++) {
            dat0[i] += dot(x.cols, x[i], L[i]), dat1[i] += dot(x.cols, x[i], Rr[i]);
            for (I c = 0; c < x.cols; c++) dx[i][c] = at_[i] * L[i][c] + at_[a.C + i] * Rr[i][c];
        }
        // alike: x kᵀ
        nt(d, error, datt, -1);
        attention(over, alike, datt2);
        tn(datt2, d, derror, -1, started);
        for (I i = 0; i < a.C; i++)
            for (I c = 0; c < a.N; c++) {
                dover[i][c] += datt[i][c] * alike[i][c] / total[i][c];
                datt[i][c] *= over[i][c];  // the gradient of x kᵀ
            }
    }

    void backward_read(I g, I n, M* state, bool started, Outer<T>* outer) {
        const T* at_ = token ? chunk<T>(a.at, g, n, 2 * a.C) : nullptr;
        load(dy, chunk<S>(a.dy, g, n, a.C * a.D));
        load(phi_q, chunk<S>(a.phi_q, g, n, a.C * a.F));
        M d = dy;
        if (token) {
            divide_over(g, n);
            zero(dover), std::fill(dat0.begin(), dat0.end(), T(0)), std::fill(dat1.begin(), dat1.end(), T(0));
        }
        if (act) {
            load(read_pre, chunk<T>(a.read_pre, g, n, a.C * a.P));
            for (I i = 0; i < a.C; i++) activate<T>(a.kind, a.E, read_pre[i], read_hidden[i], nullptr);
            M f0 = view(factor[0], a.C, a.E), f1 = view(factor[1], a.C, a.E);
            if (!token) {
                M x = read_hidden;
                if (!a.old) {
                    nt(dy, w_out, drh);
                } else {
                    M seen = view(two0, a.C, a.D), w = first(state[1]);
                    mask(g, n, dy, seen, halo());
                    nt(dy, w0, drh, 1, false, &seen, &w);
                    mask(g, n, read_hidden, x = f0, halo());
                }
                outer[1] = {x.p, nullptr, x.ld, dy.p, dy.ld, a.C};
            } else {
                nt(read_hidden, hidden, alike);
                backward_token(g, n, read_hidden, state[1], dy, drh, e2, de2, started);
                nn(datt, hidden, drh, 1, true);
                tn(datt, read_hidden, dhidden, 1, started);
                nt(dy, w0, drh, 1, true);
                weigh(read_hidden, at_, f0, f1, a.C);
                outer[1] = {f0.p, f1.p, f0.ld, dy.p, dy.ld, a.C};
            }
            tn(read_hidden, dy, dinitial, 1, true);
            for (I i = 0; i < a.C; i++) deactivate<T>(a.kind, a.E, read_pre[i], drh[i], nullptr, drp[i]);
            d = drp;
        }
        M dx = view(two0, a.C, a.F), f2 = view(factor[2], a.C, a.F), f3 = view(factor[3], a.C, a.F);
        if (!token) {
            nt(d, first(state[0]), dx);
            M x = phi_q;
            if (a.old) mask(g, n, dx, dx, halo()), mask(g, n, phi_q, x = f2, halo());
            outer[0] = {x.p, nullptr, x.ld, d.p, d.ld, a.C};
        } else {
            load(alike, chunk<S>(a.scores, g, n, a.C * a.N));
            backward_token(g, n, phi_q, state[0], d, dx, e1, de1, started);
            store(chunk<S>(a.dscores, g, n, a.C * a.N), datt, a.N);
            weigh(phi_q, at_, f2, f3, a.C);
            outer[0] = {f2.p, f3.p, f2.ld, d.p, d.ld, a.C};
            T* dat = chunk<T>(a.dat, g, n, 2 * a.C);
            for (I i = 0; i < a.C; i++) dat[i] = dat0[i], dat[a.C + i] = dat1[i];
            store(chunk<T>(a.dover, g, n, a.C * a.N), dover, a.N);
        }
        store(chunk<S>(a.dphi_q, g, n, a.C * a.F), dx, a.F);
        store(chunk<S>(a.dq_by_initial, g, n, a.C * a.P), d, a.P);
    }

    int backward_learn(I g, I n, M* state, bool started, Outer<T>* outer) {  // more products for the second layer
        int count = 0;
        M d = de1;
        if (act) {
            for (I i = 0; i < a.N; i++)
                for (I c = 0; c < a.E; c++) {
                    T sum = 0;
                    for (I k = 0; k < a.kind; k++) {
                        I p = k * a.E + c;
                        sum += slopes[i][p] * de1[i][p];
                        dslopes[i][p] = back[i][c] * de1[i][p];
                    }
                    dback[i][c] = sum;
                }
            M w = first(state[1]), b = dback, h = hidden;
            if (!a.old) {
                nn(dback, w_out, de2, 1, true);
                nt(de2, w_out, dhidden, 1, started);
            } else {
                M seen = view(two0, a.N, a.D);
                mask(g, n, dback, b = view(y0, a.N, a.E), 0), h = hidden_old;
                nn(dback, w0, de2, 1, true), nn(b, w, de2, 1, true);
                mask(g, n, de2, seen, 0);
                nt(de2, w0, dhidden, 1, started, &seen, &w);
            }
            tn(dback, e2, dinitial, 1, true), tn(hidden, de2, dinitial, 1, true);
            outer[count++] = {b.p, nullptr, b.ld, e2.p, e2.ld, a.N};
            outer[count++] = {h.p, nullptr, h.ld, de2.p, de2.ld, a.N};
            for (I i = 0; i < a.N; i++) deactivate<T>(a.kind, a.E, pre[i], dhidden[i], dslopes[i], dpre[i]);
            d = dpre;
            store(chunk<S>(a.dv, g, n, a.N * a.D), de2, a.D, -1);
        } else {
            store(chunk<S>(a.dv, g, n, a.N * a.D), de1, a.D, -1);
        }
        store(chunk<S>(a.dby_initial, g, n, a.N * a.P), d, a.P);
        if (!a.old) {
            nt(d, first(state[0]), dphi, 1, n < a.complete);
        } else {
            M seen = view(eo0, a.N, a.P);
            mask(g, n, d, seen, 0);
            nt(seen, first(state[0]), dphi, 1, n < a.complete);
        }
        store(chunk<S>(a.dphi, g, n, a.N * a.F), dphi, a.F);
        return count;
    }

    void backward_chunk(I g, I n, M* state) {
        bool ends = n < a.complete;
        if (ends) backward_update(g, n, state);
        else if (learns(n)) restore(g, n);
        Outer<T> in[2], out[3];
        Outer<T> read_outer[2];
        if (act) sum_out(state);
        backward_read(g, n, state, ends, read_outer);
        in[0] = read_outer[0], out[0] = read_outer[1];
        int ins = 1, outs = 1;
        if (learns(n)) {
            outs += backward_learn(g, n, state, true, out + 1);
            const M& d = act ? dpre : de1;
            in[ins++] = {phi_old.p, nullptr, phi_old.ld, d.p, d.ld, a.N};
        }
        T by[4] = {1, 0, 0, 1};
        if (ends) {
            const T* decay = chunk<T>(a.decay, g, n, 4);
            by[0] = decay[0], by[1] = decay[2], by[2] = decay[1], by[3] = decay[3];
        }
        mix(dz[0], dz[0], by, in, ins);
        if (act) mix(dz[1], dz[1], by, out, outs);
    }

    void backward(I g) {
        load_state(dz, a.dstate, g);
        if (act) load(w0, (const T*)a.initial_out + g * a.E * a.D), zero(dinitial);
        for (I start = (a.K - 1) / a.stride * a.stride; start >= 0; start -= a.stride) {
            I end = std::min(start + a.stride, a.K);
            I last = std::min(end - 1, a.complete);  // the newest state that any chunk of these starts from
            for (I n = start; n <= last; n++) {
                M now[2] = {states[0][n - start], layers > 1 ? states[1][n - start] : M{}};
                if (n == start) {
                    load_state(now, a.kept, start / a.stride * a.G + g);
                } else {
                    M was[2] = {states[0][n - start - 1], layers > 1 ? states[1][n - start - 1] : M{}};
                    next_state(g, n - 1, was, now);
                }
            }
            for (I n = end - 1; n >= start; n--) {
                I at = std::max<I>(std::min(n, a.complete), start) - start;
                M now[2] = {states[0][at], layers > 1 ? states[1][at] : M{}};
                backward_chunk(g, n, now);
            }
        }
        store_state(a.dstate, dz, g);
        if (act) store((T*)a.dinitial + g * a.E * a.D, dinitial, a.D);
    }
};

template <class T, class S> void work(Arguments* a) {
#if defined(__SSE__)
    _mm_setcsr(unsigned(a->rounding));
#endif
    Worker<T, S> worker(*a);
    for (;;) {
        I g = __atomic_fetch_add(&a->next, 1, __ATOMIC_RELAXED);
        if (g >= a->G) return;
        a->dy ? worker.backward(g) : worker.forward(g);
    }
}

}  // namespace

extern "C" {
I rounding_mode() {
#if defined(__SSE__)
    return I(_mm_getcsr());
#else
    return 0;
#endif
}
void loop_double(Arguments* a) { work<double, double>(a); }
void loop_float(Arguments* a) { work<float, float>(a); }
void loop_bf16(Arguments* a) { work<float, bf16>(a); }
}
