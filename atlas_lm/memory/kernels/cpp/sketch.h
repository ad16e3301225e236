// The sketch feature map behind its two linear maps, in one pass over memory each way (features.py has it in PyTorch):
// φ = [c₀, c₁ x, c₂ p / ‖p‖] with p = a ⊙ b.

#pragma once

#include "products.h"

extern "C" struct SketchArguments {
    I rows, D, R, block;  // tokens, channels, rank, tokens of a piece of work
    double constant, linear, quadratic;  // c₀, c₁, c₂
    const void *x, *ab;  // (rows, D), (rows, 2R): a beside b
    void* phi;  // (rows, 1 + D + R)
    void* norms;  // (rows)
    const void* dphi;
    void *dx, *dab;
    I rounding, next;
};

namespace {

template <class T, class S> void sketch_piece(SketchArguments& a, I piece) {
    I end = std::min((piece + 1) * a.block, a.rows), F = 1 + a.D + a.R;
    std::vector<T> product(a.R);
    T* __restrict p = product.data();
    for (I i = piece * a.block; i < end; i++) {
        const S* __restrict x = (const S*)a.x + i * a.D;
        const S* __restrict left = (const S*)a.ab + i * 2 * a.R;
        const S* __restrict right = left + a.R;
        T* norm = (T*)a.norms + i;
        if (!a.dx) {
            S* __restrict phi = (S*)a.phi + i * F;
            phi[0] = S(T(a.constant));
            for (I c = 0; c < a.D; c++) phi[1 + c] = S(T(x[c]) * T(a.linear));
            for (I r = 0; r < a.R; r++) p[r] = T(left[r]) * T(right[r]);
            *norm = std::max(std::sqrt(dot(a.R, p, p)), T(1e-12));
            T scale = T(a.quadratic) / *norm;
            for (I r = 0; r < a.R; r++) phi[1 + a.D + r] = S(p[r] * scale);
            continue;
        }
        const S* __restrict dphi = (const S*)a.dphi + i * F;
        S* __restrict dx = (S*)a.dx + i * a.D;
        S* __restrict dleft = (S*)a.dab + i * 2 * a.R;
        S* __restrict dright = dleft + a.R;
        for (I c = 0; c < a.D; c++) dx[c] = S(T(dphi[1 + c]) * T(a.linear));
        for (I r = 0; r < a.R; r++) p[r] = T(left[r]) * T(right[r]) * T(dphi[1 + a.D + r]);
        T along = 0, scale = T(a.quadratic) / *norm;
        if (*norm > T(1e-12)) {
            along = total_of<T>(a.R, [&](I r) { return p[r]; }) / (*norm * *norm);
        }
        for (I r = 0; r < a.R; r++) {
            T l = T(left[r]), w = T(right[r]), dp = scale * (T(dphi[1 + a.D + r]) - l * w * along);
            dleft[r] = S(dp * w), dright[r] = S(dp * l);
        }
    }
}

}  // namespace
