// How the gates of a chunk fold into the coefficients of its reads, row by row: coefficients.py's Reads.
//
//     σ_t = carry_t σ_{t−1} + intake_t Ω_t      of every gradient in S_t
//     Γ_t = retain_t Γ_{t−1} + η_t σ_t          of every gradient in W_t
//     p_t = carry_t p_{t−1},  a_t = retain_t a_{t−1},  b_t = retain_t b_{t−1} + η_t p_t

#pragma once

#include "products.h"

namespace {

template <class T> struct Coefficients {
    I C, N, context;
    const T *eta, *intake, *retain, *carry;  // (C)
    const T* gamma;  // (N)
    const uint8_t* same;  // (N, N), or null
    Matrix<T> sigma, of_gradients;  // σ, Γ (C, N)
    std::vector<T> at, p;  // [a, −b] (2, C); p (C)
    std::vector<T> d_omega, d_sigma;

    // Ω[t, i] / γ_i
    bool sees(I t, I i) const {
        I now = t + N - C;
        return i <= now && i > now - context && (!same || same[now * N + i]);
    }
    I from(I t) const { return std::max<I>(0, t + N - C - context + 1); }

    void fold() {
        at.assign(2 * C, 0), p.assign(C, 0);
        T a = 1, b = 0, through = 1;
        for (I t = 0; t < C; t++) {
            T *__restrict s = sigma[t], *__restrict w = of_gradients[t];
            const T *was = t ? sigma[t - 1] : nullptr, *gone = t ? of_gradients[t - 1] : nullptr;
            for (I i = 0; i < N; i++) s[i] = was ? carry[t] * was[i] : T(0);
            for (I i = from(t); i <= t + N - C; i++)
                if (sees(t, i)) s[i] += intake[t] * gamma[i];
            for (I i = 0; i < N; i++) w[i] = eta[t] * s[i] + (gone ? retain[t] * gone[i] : T(0));
            through *= carry[t], a *= retain[t], b = retain[t] * b + eta[t] * through;
            p[t] = through, at[t] = a, at[C + t] = -b;
        }
    }

    // Given the gradients of Γ and of [a, −b]: those of the gates. `dgamma` is added to.
    void unfold(Matrix<T> dgradients, const T* da, const T* db, T* deta, T* dintake, T* dretain, T* dcarry, T* dgamma) {
        d_omega.assign(N, 0), d_sigma.assign(N, 0);
        T sum_a = 0, sum_b = 0, sum_p = 0;
        T *w = d_omega.data(), *s = d_sigma.data();
        for (I t = C - 1; t >= 0; t--) {
            T before_a = t ? at[t - 1] : T(1), before_b = t ? -at[C + t - 1] : T(0), before_p = t ? p[t - 1] : T(1);
            for (I i = 0; i < N; i++) w[i] += dgradients[t][i];
            sum_a += da[t], sum_b -= db[t];
            deta[t] = dot(N, w, sigma[t]) + sum_b * p[t];
            dretain[t] = sum_a * before_a + sum_b * before_b + (t ? dot(N, w, of_gradients[t - 1]) : T(0));
            for (I i = 0; i < N; i++) s[i] += eta[t] * w[i];
            sum_p += sum_b * eta[t];
            dcarry[t] = sum_p * before_p + (t ? dot(N, s, sigma[t - 1]) : T(0));
            T taken = 0;
            for (I i = from(t); i <= t + N - C; i++)
                if (sees(t, i)) taken += s[i] * gamma[i], dgamma[i] += intake[t] * s[i];
            dintake[t] = taken;
            for (I i = 0; i < N; i++) w[i] *= retain[t], s[i] *= carry[t];
            sum_a *= retain[t], sum_b *= retain[t], sum_p *= carry[t];
        }
    }
};

}  // namespace
