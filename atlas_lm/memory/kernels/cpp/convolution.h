// Short causal convolution of queries, keys and values, in one pass over memory each way (convolution.py and block.py
// have it in PyTorch): cut into heads, queries and keys brought to unit norm, or as it is.

#pragma once

#include "products.h"

extern "C" struct ConvolutionArguments {
    // sequences, tokens, heads, channels of a head, width, tokens of a piece of work; without norms H·D are all channels
    I B, T, H, D, taps, block;
    const void *x, *tail, *weight;  // (B, T, 3·H·D), (B, taps − 1, 3·H·D), (taps, 3·H·D)
    void *out[3];  // q, k, v (B, H, T, D); without norms the first alone, (B, T, H·D)
    void* norms;  // (B, H, 2, T) of q and k; null: neither heads nor norms
    const void* dout[3];
    void *dx, *dtail, *dweight;  // dweight: (pieces, taps, 3·H·D)
    I rounding, next;
};

namespace {

constexpr double SMALLEST_NORM = 1e-12;

template <class T, class S> struct Convolution {
    ConvolutionArguments& a;
    I width, pieces;  // channels; pieces of work in a sequence
    std::vector<T> ahead, row;

    explicit Convolution(ConvolutionArguments& a_) : a(a_) {
        width = (a.norms ? 3 : 1) * a.H * a.D, pieces = (a.T + a.block - 1) / a.block;
    }

    const S* input(I b, I t) const {  // of token t, from the tail where t < 0
        if (t < 0) return (const S*)a.tail + (b * (a.taps - 1) + t + a.taps - 1) * width;
        return (const S*)a.x + (b * a.T + t) * width;
    }
    I at(I b, I h, I t) const { return ((b * a.H + h) * a.T + t) * a.D; }

    void forward(I piece) {
        I b = piece / pieces, start = piece % pieces * a.block, end = std::min(start + a.block, a.T);
        row.resize(width);
        for (I t = start; t < end; t++) {
            for (I i = 0; i < a.taps; i++) {
                const S* __restrict from = input(b, t + i - a.taps + 1);
                const T* __restrict weight = (const T*)a.weight + i * width;
                T* __restrict to = row.data();
                if (i == 0)
                    for (I c = 0; c < width; c++) to[c] = T(from[c]) * weight[c];
                else
                    for (I c = 0; c < width; c++) to[c] += T(from[c]) * weight[c];
            }
            if (!a.norms) {
                S* __restrict to = (S*)a.out[0] + (b * a.T + t) * width;
                for (I c = 0; c < width; c++) to[c] = S(row[c]);
                continue;
            }
            for (I p = 0; p < 3; p++)
                for (I h = 0; h < a.H; h++) {
                    const T* __restrict from = row.data() + (p * a.H + h) * a.D;
                    S* __restrict to = (S*)a.out[p] + at(b, h, t);
                    T scale = 1;
                    if (p < 2) {
                        T norm = std::max(std::sqrt(dot(a.D, from, from)), T(SMALLEST_NORM));
                        ((T*)a.norms)[((b * a.H + h) * 2 + p) * a.T + t] = norm;
                        scale = 1 / norm;
                    }
                    for (I c = 0; c < a.D; c++) to[c] = S(from[c] * scale);
                }
        }
    }

    // the gradient of the convolution's outputs at token t
    void through_norms(I b, I t, T* to_row) const {
        if (!a.norms) {
            const S* __restrict dy = (const S*)a.dout[0] + (b * a.T + t) * width;
            for (I c = 0; c < width; c++) to_row[c] = T(dy[c]);
            return;
        }
        for (I p = 0; p < 3; p++)
            for (I h = 0; h < a.H; h++) {
                const S* __restrict dy = (const S*)a.dout[p] + at(b, h, t);
                const S* __restrict y = (const S*)a.out[p] + at(b, h, t);
                T* __restrict to = to_row + (p * a.H + h) * a.D;
                if (p == 2) {
                    for (I c = 0; c < a.D; c++) to[c] = T(dy[c]);
                    continue;
                }
                T norm = ((const T*)a.norms)[((b * a.H + h) * 2 + p) * a.T + t], along = 0;
                if (norm > T(SMALLEST_NORM)) along = total_of<T>(a.D, [&](I c) { return T(dy[c]) * T(y[c]); });
                for (I c = 0; c < a.D; c++) to[c] = (T(dy[c]) - T(y[c]) * along) / norm;
            }
    }

    void backward(I piece) {
        I b = piece / pieces, start = piece % pieces * a.block, end = std::min(start + a.block, a.T), k = a.taps;
        I low = start == 0 ? 1 - k : start;  // the first piece gives the tail's gradient too
        row.resize(width), ahead.assign(k * width, T(0));  // gradients at tokens t … t + taps − 1, in a ring
        T* dweight = (T*)a.dweight + piece * k * width;
        std::fill(dweight, dweight + k * width, T(0));
        auto slot = [&](I t) { return ahead.data() + (t + k) % k * width; };
        auto fill = [&](I t) {
            if (t >= 0 && t < a.T) through_norms(b, t, slot(t));
            else std::fill(slot(t), slot(t) + width, T(0));
        };
        for (I t = low; t < low + k - 1; t++) fill(t);
        for (I t = low; t < end; t++) {
            fill(t + k - 1);
            const S* __restrict from = input(b, t);
            T* __restrict sum = row.data();
            for (I i = 0; i < k; i++) {  // x at t met tap i in the output at t + taps − 1 − i
                const T* __restrict d = slot(t + k - 1 - i);
                const T* __restrict weight = (const T*)a.weight + i * width;
                T* __restrict dw = dweight + i * width;
                if (i == 0)
                    for (I c = 0; c < width; c++) sum[c] = d[c] * weight[c];
                else
                    for (I c = 0; c < width; c++) sum[c] += d[c] * weight[c];
                for (I c = 0; c < width; c++) dw[c] += d[c] * T(from[c]);
            }
            S* __restrict to = t < 0 ? (S*)a.dtail + (b * (k - 1) + t + k - 1) * width : (S*)a.dx + (b * a.T + t) * width;
            for (I c = 0; c < width; c++) to[c] = S(sum[c]);
        }
    }
};

}  // namespace
