// One pass over a state z (w above s): mix the two halves and add outer products to them.

#pragma once

#include "products.h"

namespace {

// aᵀ b for the half w and sᵀ b for the half s; null: none
template <class T> struct Outer {
    const T *w, *s;
    I ld;
    const T* b;
    I ldb, tokens;
};

template <class T> struct Mix {
    Matrix<T> z, to;  // `to` may be z
    const T* by;  // to = [[by₀, by₁], [by₂, by₃]] z + all outer products
    const Outer<T>* outer;
    int count;
    int shared = 0;  // so many of the first, of w alone, are added to `sum` as well
    Matrix<T> sum = {};
    Matrix<T> with = {};  // a state of the same shape
    T* dots = nullptr;  // += [[z_w·with_w, z_w·with_s], [z_s·with_w, z_s·with_s]]
};

template <class T, int MR, int NR> void mix_tile(const Mix<T>& m, I r, I j0) {
    typedef typename Vec<T>::type V;
    constexpr int L = Vec<T>::lanes;
    const I R = m.z.rows / 2;
    V w[MR][NR], s[MR][NR];
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < NR; j++) w[i][j] = V{}, s[i][j] = V{};
    for (int f = 0; f < m.count; f++) {
        const Outer<T>& o = m.outer[f];
        if (o.s) {
            for (I k = 0; k < o.tokens; k++) {
                V row[NR];
                for (int j = 0; j < NR; j++) row[j] = *(const V*)(o.b + k * o.ldb + j0 + j * L);
                for (int i = 0; i < MR; i++) {
                    T x = o.w[k * o.ld + r + i], y = o.s[k * o.ld + r + i];
                    for (int j = 0; j < NR; j++) w[i][j] += x * row[j], s[i][j] += y * row[j];
                }
            }
        } else {
            for (I k = 0; k < o.tokens; k++) {
                V row[NR];
                for (int j = 0; j < NR; j++) row[j] = *(const V*)(o.b + k * o.ldb + j0 + j * L);
                for (int i = 0; i < MR; i++) {
                    T x = o.w[k * o.ld + r + i];
                    for (int j = 0; j < NR; j++) w[i][j] += x * row[j];
                }
            }
        }
        if (f + 1 == m.shared)
            for (int i = 0; i < MR; i++)
                for (int j = 0; j < NR; j++) *(V*)(m.sum[r + i] + j0 + j * L) += w[i][j];
    }
    V dots[4] = {};
    for (int i = 0; i < MR; i++)
        for (int j = 0; j < NR; j++) {
            V zw = *(const V*)(m.z[r + i] + j0 + j * L), zs = *(const V*)(m.z[R + r + i] + j0 + j * L);
            if (m.dots) {
                V ww = *(const V*)(m.with[r + i] + j0 + j * L), ws = *(const V*)(m.with[R + r + i] + j0 + j * L);
                dots[0] += zw * ww, dots[1] += zw * ws, dots[2] += zs * ww, dots[3] += zs * ws;
            }
            *(V*)(m.to[r + i] + j0 + j * L) = m.by[0] * zw + m.by[1] * zs + w[i][j];
            *(V*)(m.to[R + r + i] + j0 + j * L) = m.by[2] * zw + m.by[3] * zs + s[i][j];
        }
    if (m.dots)
        for (int d = 0; d < 4; d++)
            for (int l = 0; l < L; l++) m.dots[d] += dots[d][l];
}

template <class T, int NR> void mix_panel(const Mix<T>& m, I j0) {
    constexpr int MR = ROWS / 2;
    I R = m.z.rows / 2, r = 0;
    for (; r + MR <= R; r += MR) mix_tile<T, MR, NR>(m, r, j0);
    for (; r < R; r++) mix_tile<T, 1, NR>(m, r, j0);
}

template <class T> void mix(const Mix<T>& m) {
    constexpr int L = Vec<T>::lanes;
    for (I j = 0; j < m.z.cols; j += PANEL * L) {
        switch (std::min<I>(PANEL, (m.z.cols - j + L - 1) / L)) {
            case 1: mix_panel<T, 1>(m, j); break;
            case 2: mix_panel<T, 2>(m, j); break;
            case 3: mix_panel<T, 3>(m, j); break;
            default: mix_panel<T, 4>(m, j);
        }
    }
}

}  // namespace
