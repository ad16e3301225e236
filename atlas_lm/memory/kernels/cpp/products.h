// Matrices in scratch memory and their products, for one core.
//
// Rows are padded (leading dimension `ld`, a whole number of vectors, zeros behind the end), so that products run in
// whole vectors; what they write behind the end is never read as a value.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
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

// to[c][r] = from[r][c]; columns of `to` up to a whole vector are written, with zeros behind the end
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

// Σ f(i), in as many partial sums as a vector has lanes: the compiler may not reorder a sum by itself
template <class T, class F> T total_of(I n, F f) {
    constexpr int L = Vec<T>::lanes;
    T part[L] = {};
    I i = 0;
    for (; i + L <= n; i += L)
        for (int j = 0; j < L; j++) part[j] += f(i + j);
    T sum = 0;
    for (; i < n; i++) sum += f(i);
    for (int j = 0; j < L; j++) sum += part[j];
    return sum;
}

// the largest f(i) ≥ 0; NaN wins
template <class T, class F> T most_of(I n, F f) {
    constexpr int L = Vec<T>::lanes;
    T part[L] = {};
    I i = 0;
    auto larger = [](T a, T b) { return b > a || b != b ? b : a; };
    for (; i + L <= n; i += L)
        for (int j = 0; j < L; j++) part[j] = larger(part[j], f(i + j));
    T most = 0;
    for (; i < n; i++) most = larger(most, f(i));
    for (int j = 0; j < L; j++) most = larger(most, part[j]);
    return most;
}

}  // namespace
