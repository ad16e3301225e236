// What stands between the two layers of a memory: network.py's gated_mlp (2 pre-activations a unit) and mlp (1).
// Loops are simple, for the compiler to run in vectors.

#pragma once

#include "products.h"

namespace {

inline double exponential(double x) { return std::exp(x); }
inline float exponential(float x) {  // 2ⁿ times a polynomial of the rest; NaN stays NaN
    x = x > 88.0f ? 88.0f : x;
    x = x < -87.0f ? -87.0f : x;
    float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 · 2²³: the lowest bits are the nearest whole number
    float n = shifted - 12582912.0f;
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    uint32_t bits;
    memcpy(&bits, &shifted, 4);
    bits = (bits + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return p * power;
}
template <class T> T logistic(T x) { return T(1) / (T(1) + exponential(-x)); }

template <class T> struct Gate {  // SiLU of a gate, with its slope
    T s, silu, slope;
    explicit Gate(T gate) : s(logistic(gate)), silu(gate * s), slope(s + silu - silu * s) {}
    T bend() const { return (1 - s) * (2 * s + silu - 2 * silu * s); }  // SiLU″
};

template <class T> struct Gelu {  // its tanh form
    static constexpr T SLOPE = T(0.7978845608028654), CUBIC = T(0.044715);
    T x, tanh, inner, value, slope;
    explicit Gelu(T x_) : x(x_) {
        inner = SLOPE * (1 + 3 * CUBIC * x * x);
        tanh = 2 * logistic(2 * SLOPE * (x + CUBIC * x * x * x)) - 1;
        value = T(0.5) * x * (1 + tanh);
        slope = T(0.5) * (1 + tanh) + T(0.5) * x * (1 - tanh * tanh) * inner;
    }
    T bend() const { return (1 - tanh * tanh) * (inner + x * (3 * SLOPE * CUBIC * x - tanh * inner * inner)); }  // GELU″
};

// hidden (E) = act(pre) and, where LEARNED, its partial derivatives (P)
template <class T, bool LEARNED>
void activate(I kind, I E, const T* __restrict pre, T* __restrict hidden, T* __restrict slopes) {
    if (kind == 2) {
        for (I i = 0; i < E; i++) {
            Gate<T> gate(pre[i]);
            T up = pre[E + i];
            hidden[i] = gate.silu * up;
            if constexpr (LEARNED) slopes[i] = gate.slope * up, slopes[E + i] = gate.silu;
        }
        return;
    }
    for (I i = 0; i < E; i++) {
        Gelu<T> gelu(pre[i]);
        hidden[i] = gelu.value;
        if constexpr (LEARNED) slopes[i] = gelu.slope;
    }
}

// gradient of pre, given those of hidden and, where LEARNED, of the errors e = slopes ⊙ back
template <class T, bool LEARNED>
void deactivate(I kind, I E, const T* __restrict pre, const T* __restrict dh, const T* __restrict de,
                const T* __restrict back, T* __restrict dp) {
    if (kind == 2) {
        for (I i = 0; i < E; i++) {
            Gate<T> gate(pre[i]);
            T up = pre[E + i], into_gate = gate.slope * dh[i] * up, into_up = dh[i] * gate.silu;
            if constexpr (LEARNED) {
                T dgate = de[i] * back[i], dup = de[E + i] * back[i];
                into_gate += gate.slope * dup + gate.bend() * up * dgate;
                into_up += dgate * gate.slope;
            }
            dp[i] = into_gate, dp[E + i] = into_up;
        }
        return;
    }
    for (I i = 0; i < E; i++) {
        Gelu<T> gelu(pre[i]);
        T into = gelu.slope * dh[i];
        if constexpr (LEARNED) into += gelu.bend() * (de[i] * back[i]);
        dp[i] = into;
    }
}

}  // namespace
