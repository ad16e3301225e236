// Sliding-window attention with rotary positions, from the projection's output to merged heads, one (batch, head) at a
// time and a block of queries at a time: attention.py's window_attention for a sequence that begins here.

#pragma once

#include "activations.h"
#include "operations.h"

extern "C" struct AttentionArguments {
    I B, H, T, D, window, block;  // block: queries at a time
    double scale;
    const void* qkv;  // (B, T, 3·H·D)
    const void *cos, *sin;  // (T, D / 2)
    void* y;  // (B, T, H·D)
    void* sums;  // (B, H, T): log Σ exp of a query's scores
    const void* dy;
    void* dqkv;
    I rounding, next;
};

namespace {

template <class T, class S> struct Attention : Operations<T, S> {
    typedef Operations<T, S> Base;
    typedef Matrix<T> M;
    using Base::nn, Base::nt, Base::tn, Base::view, Base::zero;

    AttentionArguments& a;
    I C, halo, span, width;  // queries of a block, keys before it and in all, channels of a row of qkv
    M q, k, v, p, o, dp, ds, dq, dk, dv;  // dk and dv: of the whole sequence behind `halo` rows

    explicit Attention(AttentionArguments& a_) : a(a_) {
        C = std::min(a.block, a.T), halo = std::min(a.window, a.T) - 1, span = C + halo, width = 3 * a.H * a.D;
        static thread_local Pool<T> pool;
        plan(pool);
        size_t need = pool.used + 2 * VECTOR;
        if (pool.bytes.size() < need) pool.bytes.assign(need, 0);
        else std::memset(pool.bytes.data(), 0, need);
        plan(pool);
    }

    void plan(Pool<T>& pool) {
        pool.used = 0;
        this->room(pool, std::max(span, a.D));
        q = pool.take(C, a.D), k = pool.take(span, a.D), v = pool.take(span, a.D), p = pool.take(C, span);
        o = pool.take(C, a.D);
        if (!a.dy) return;
        dp = pool.take(C, span), ds = pool.take(C, span), dq = pool.take(C, a.D);
        dk = pool.take(halo + up(a.T, C), a.D), dv = pool.take(halo + up(a.T, C), a.D);
    }

    const T* turn(const void* table, I t) const { return (const T*)table + t * (a.D / 2); }

    // rows `start` … of q (part 0), k (1) or v (2); zeros outside the sequence
    void fetch(M to, I b, I h, I part, I start) const {
        I half = a.D / 2;
        for (I r = 0; r < to.rows; r++) {
            I t = start + r;
            T* __restrict x = to[r];
            if (t < 0 || t >= a.T) {
                std::fill(x, x + a.D, T(0));
                continue;
            }
            const S* __restrict from = (const S*)a.qkv + (b * a.T + t) * width + (part * a.H + h) * a.D;
            if (part == 2) {
                for (I c = 0; c < a.D; c++) x[c] = T(from[c]);
                continue;
            }
            const T *__restrict cos = turn(a.cos, t), *__restrict sin = turn(a.sin, t);
            for (I c = 0; c < half; c++) {
                T left = T(from[c]), right = T(from[half + c]);
                x[c] = left * cos[c] - right * sin[c], x[half + c] = left * sin[c] + right * cos[c];
            }
        }
    }
    // the gradient of what `fetch` gave
    void give(M d, I b, I h, I part, I start) const {
        I half = a.D / 2;
        for (I r = 0; r < d.rows && start + r < a.T; r++) {
            I t = start + r;
            const T* __restrict x = d[r];
            S* __restrict to = (S*)a.dqkv + (b * a.T + t) * width + (part * a.H + h) * a.D;
            if (part == 2) {
                for (I c = 0; c < a.D; c++) to[c] = S(x[c]);
                continue;
            }
            const T *__restrict cos = turn(a.cos, t), *__restrict sin = turn(a.sin, t);
            for (I c = 0; c < half; c++) {
                to[c] = S(x[c] * cos[c] + x[half + c] * sin[c]);
                to[half + c] = S(x[half + c] * cos[c] - x[c] * sin[c]);
            }
        }
    }

    // The first and the last key that query i of a block sees, of those that the block holds.
    I least(I start, I i) const { return std::max<I>(i + halo - (a.window - 1), halo - start); }
    I most(I i) const { return i + halo; }

    // The keys from the sequence's start on, in steps: those before it are zeros, and a long window has many of them.
    static constexpr I STEP = 64;
    I first(I start) const { return std::max<I>(0, halo - start) / STEP * STEP; }
    M keys(M m, I start) const { return m.part(first(start), span - first(start)); }
    M scored(M m, I start) const { return {m.p + first(start), m.rows, span - first(start), m.ld}; }

    // softmax of the scores in p, row by row; `known`: the sums are there
    void soften(I g, I start, bool known) {
        for (I i = 0; i < C; i++) {
            I t = start + i, low = std::max<I>(0, least(start, i)), high = most(i) + 1;
            T* __restrict x = p[i];
            if (t >= a.T) {
                std::fill(x, x + span, T(0));
                continue;
            }
            T* sum = (T*)a.sums + g * a.T + t;
            T scale = T(a.scale), shift;
            if (known) {
                shift = *sum;
            } else {
                T top = x[low];
                for (I c = low; c < high; c++) top = x[c] > top || x[c] != x[c] ? x[c] : top;
                T total = total_of<T>(high - low, [&](I c) { return exponential(scale * (x[low + c] - top)); });
                *sum = shift = scale * top + std::log(total);
            }
            std::fill(x + first(start), x + low, T(0)), std::fill(x + high, x + span, T(0));
            for (I c = low; c < high; c++) x[c] = exponential(scale * x[c] - shift);
        }
    }

    void scores(I b, I h, I start, bool known) {
        I low = first(start);
        fetch(q, b, h, 0, start), fetch(keys(k, start), b, h, 1, start - halo + low);
        fetch(keys(v, start), b, h, 2, start - halo + low);
        nt(q, keys(k, start), scored(p, start));
        soften(b * a.H + h, start, known);
    }

    static bool finite(M x) {
        T sum = 0;
        for (I r = 0; r < x.rows; r++)
            for (I c = 0; c < x.cols; c++) sum += x[r][c] * T(0);
        return sum == 0;
    }
    // p v over the keys that each query sees: in the product 0 times a value that is not finite reaches every query
    void alone(I start) {
        for (I i = 0; i < C && start + i < a.T; i++) {
            std::fill(o[i], o[i] + a.D, T(0));
            for (I c = std::max<I>(0, least(start, i)); c <= most(i); c++)
                for (I d = 0; d < a.D; d++) o[i][d] += p[i][c] * v[c][d];
        }
    }

    I row(I b, I h, I t) const { return (b * a.T + t) * a.H * a.D + h * a.D; }

    void forward(I g) {
        I b = g / a.H, h = g % a.H;
        for (I start = 0; start < a.T; start += C) {
            scores(b, h, start, false);
            nn(scored(p, start), keys(v, start), o);
            if (!finite(o)) alone(start);
            for (I i = 0; i < C && start + i < a.T; i++) {
                S* __restrict to = (S*)a.y + row(b, h, start + i);
                for (I c = 0; c < a.D; c++) to[c] = S(o[i][c]);
            }
        }
    }

    void backward(I g) {
        I b = g / a.H, h = g % a.H;
        zero(dk), zero(dv);
        for (I start = 0; start < a.T; start += C) {
            scores(b, h, start, true);
            std::vector<T> along(C, T(0));
            for (I i = 0; i < C; i++) {
                if (start + i >= a.T) {
                    std::fill(o[i], o[i] + a.D, T(0));
                    continue;
                }
                const S* __restrict dy = (const S*)a.dy + row(b, h, start + i);
                const S* __restrict y = (const S*)a.y + row(b, h, start + i);
                for (I c = 0; c < a.D; c++) o[i][c] = T(dy[c]);
                along[i] = total_of<T>(a.D, [&](I c) { return T(dy[c]) * T(y[c]); });
            }
            I low = first(start);
            nt(o, keys(v, start), scored(dp, start));
            for (I i = 0; i < C; i++)
                for (I c = low; c < span; c++) ds[i][c] = p[i][c] * (dp[i][c] - along[i]) * T(a.scale);
            nn(scored(ds, start), keys(k, start), dq);
            tn(scored(ds, start), q, dk.part(start + low, span - low), 1, true);
            tn(scored(p, start), o, dv.part(start + low, span - low), 1, true);
            give(dq, b, h, 0, start);
        }
        give(dk.part(halo, a.T), b, h, 1, 0), give(dv.part(halo, a.T), b, h, 2, 0);
    }
};

}  // namespace
