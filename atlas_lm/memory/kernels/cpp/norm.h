// Root-mean-square norm of every head's channels, heads merged behind it: one pass over memory each way.

#pragma once

#include "products.h"

extern "C" struct NormArguments {
    I B, H, T, D, block;  // block: tokens of a piece of work
    double epsilon;
    const void *x, *weight;  // (B, H, T, D), (D)
    void* y;  // (B, T, H·D)
    void* scales;  // (B, H, T): 1 / √(mean x² + ε)
    const void* dy;
    void *dx, *dweight;  // dweight: (pieces, D)
    I rounding, next;
};

namespace {

template <class T, class S> void norm_piece(NormArguments& a, I piece) {
    I pieces = (a.T + a.block - 1) / a.block, b = piece / pieces, start = piece % pieces * a.block;
    I end = std::min(start + a.block, a.T), D = a.D;
    const T* __restrict weight = (const T*)a.weight;
    std::vector<T> room(2 * D, T(0));
    T *__restrict row = room.data(), *__restrict dweight = room.data() + D;
    for (I t = start; t < end; t++)
        for (I h = 0; h < a.H; h++) {
            I token = (b * a.H + h) * a.T + t, merged = ((b * a.T + t) * a.H + h) * D;
            const S* __restrict x = (const S*)a.x + token * D;
            T* scale = (T*)a.scales + token;
            if (!a.dx) {
                S* __restrict y = (S*)a.y + merged;
                T sum = total_of<T>(D, [&](I c) { return T(x[c]) * T(x[c]); });
                T r = *scale = 1 / std::sqrt(sum / T(D) + T(a.epsilon));
                for (I c = 0; c < D; c++) y[c] = S(T(x[c]) * r * weight[c]);
                continue;
            }
            const S* __restrict dy = (const S*)a.dy + merged;
            S* __restrict dx = (S*)a.dx + token * D;
            T r = *scale;
            for (I c = 0; c < D; c++) {
                T unit = T(x[c]) * r;
                dweight[c] += T(dy[c]) * unit;
                row[c] = T(dy[c]) * weight[c] * unit;
            }
            T along = total_of<T>(D, [&](I c) { return row[c]; }) / T(D);
            for (I c = 0; c < D; c++) dx[c] = S(r * (T(dy[c]) * weight[c] - T(x[c]) * r * along));
        }
    if (a.dx) std::copy(dweight, dweight + D, (T*)a.dweight + piece * D);
}

}  // namespace
