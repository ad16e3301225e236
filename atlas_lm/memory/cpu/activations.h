// What stands between the two layers of a memory: network.py's gated_mlp (2 pre-activations a unit) and mlp (1).

#pragma once

#include "products.h"

namespace {

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

}  // namespace
