// The gated delta rule, a chunk at a time, one (batch, head) at a time with the fast weights in the core's cache:
// gated_delta.py's scan and delta.py's W_init. Equations and names are theirs:
//
//     A = tril(diag(β) Γ ⊙ K Kᵀ, −1),  (I + A) U = diag(β) (V − K W_init − diag(G) K S)
//     Y = Q W_init + diag(G) Q S + tril(Γ ⊙ Q Kᵀ) U,  S ← G_C S + Kᵀ diag(Γ_C) U

#pragma once

#include "operations.h"

extern "C" struct DeltaArguments {
    I G, H, T, F, E, C;  // batch × heads, heads, tokens, key dim, value dim, tokens of a chunk
    const void *q, *k;  // (G, T, F)
    const void* v;  // (G, T, E)
    const void *alpha, *beta;  // (G, T)
    const void* initial;  // (H, F, E): W_init; null: none
    const void* before;  // (G, F, E)
    void *y, *after;
    void *kept, *u;  // for the backward pass: (G, chunks, F, E) states at the chunks' starts, (G, T, E)
    const void *dy, *dafter;
    void *dq, *dk, *dv, *dalpha, *dbeta, *dinitial, *dbefore;  // dinitial: (G, F, E)
    I rounding, next;
};

namespace {

template <class T, class S> struct Delta : Operations<T, S> {
    typedef Operations<T, S> Base;
    typedef Matrix<T> M;
    using Base::nn, Base::nt, Base::tn, Base::zero;

    DeltaArguments& a;
    I F, E, C, chunks;
    M s, w0, q, k, v, u, y, ks, qs, kw, gamma, kappa, scores, weighed;  // weighed: rows times a decay or a strength
    M ds, dw0, dq, dk, du, dgamma, dp, dkappa, x, dy;
    std::vector<T> alpha, beta, carry, dalpha, dbeta, dcarry;

    explicit Delta(DeltaArguments& a_) : a(a_), F(a_.F), E(a_.E), C(a_.C) {
        chunks = (a.T + C - 1) / C;
        static thread_local Pool<T> pool;
        plan(pool);  // counts
        size_t need = pool.used + 2 * VECTOR;
        if (pool.bytes.size() < need) pool.bytes.assign(need, 0);
        else std::memset(pool.bytes.data(), 0, need);  // padding must be zero
        plan(pool);
        for (auto* list : {&alpha, &beta, &carry, &dalpha, &dbeta, &dcarry}) list->assign(C, T(0));
    }

    void plan(Pool<T>& p) {
        p.used = 0;
        this->room(p, std::max({F, E, C}));
        s = p.take(F, E), w0 = p.take(F, E);
        q = p.take(C, F), k = p.take(C, F), weighed = p.take(C, std::max(F, E));
        for (M* m : {&v, &u, &y, &ks, &qs, &kw}) *m = p.take(C, E);
        for (M* m : {&gamma, &kappa, &scores}) *m = p.take(C, C);
        if (!a.dy) return;
        ds = p.take(F, E), dw0 = p.take(F, E), dq = p.take(C, F), dk = p.take(C, F);
        for (M* m : {&du, &x, &dy}) *m = p.take(C, E);
        for (M* m : {&dgamma, &dp, &dkappa}) *m = p.take(C, C);
    }

    M rows(M m) const { return {m.p, C, E, padded<T>(E)}; }  // of scratch that is wider

    // rows of chunk n; zeros after the sequence's end
    template <class X> void fetch(M to, const void* from, I g, I n) const {
        I count = std::min(C, a.T - n * C);
        const X* p = (const X*)from + (g * a.T + n * C) * to.cols;
        for (I r = 0; r < C; r++)
            for (I c = 0; c < to.cols; c++) to[r][c] = r < count ? T(p[r * to.cols + c]) : T(0);
    }
    template <class X> void give(M from, void* to, I g, I n) const {
        I count = std::min(C, a.T - n * C);
        X* p = (X*)to + (g * a.T + n * C) * from.cols;
        for (I r = 0; r < count; r++)
            for (I c = 0; c < from.cols; c++) p[r * from.cols + c] = X(from[r][c]);
    }
    void gates(I g, I n) {  // what is missing forgets nothing and writes nothing
        I count = std::min(C, a.T - n * C), first = g * a.T + n * C;
        T all = 1;
        for (I i = 0; i < C; i++) {
            alpha[i] = i < count ? ((const T*)a.alpha)[first + i] : T(1);
            beta[i] = i < count ? ((const T*)a.beta)[first + i] : T(0);
            carry[i] = all *= alpha[i];
            for (I j = 0; j < i; j++) gamma[i][j] = gamma[i - 1][j] * alpha[i];
            gamma[i][i] = 1;
            for (I j = i + 1; j < C; j++) gamma[i][j] = 0;
        }
    }

    // what both passes need of a chunk: K Kᵀ, Q Kᵀ, K S and K W_init
    void products(I g, I n) {
        fetch<S>(q, a.q, g, n), fetch<S>(k, a.k, g, n), fetch<S>(v, a.v, g, n), gates(g, n);
        nt(k, k, kappa), nt(q, k, scores);
        nn(k, s, ks), nn(q, s, qs);
        if (a.initial) nn(k, w0, kw);
    }

    // U in place of its right side: every row takes away what the rows before it wrote
    void solve() {
        for (I i = 0; i < C; i++) {
            T* __restrict row = u[i];
            for (I c = 0; c < E; c++) row[c] = beta[i] * (v[i][c] - (a.initial ? kw[i][c] : T(0)) - carry[i] * ks[i][c]);
            for (I j = 0; j < i; j++) {
                T share = beta[i] * gamma[i][j] * kappa[i][j];
                const T* __restrict other = u[j];
                for (I c = 0; c < E; c++) row[c] -= share * other[c];
            }
        }
    }

    void weigh(M m, const T* by, M to) const {
        for (I i = 0; i < C; i++)
            for (I c = 0; c < m.cols; c++) to[i][c] = by[i] * m[i][c];
    }

    // S ← G_C S + Kᵀ diag(Γ_C) U
    void write() {
        M w = rows(weighed);
        weigh(u, gamma[C - 1], w);
        for (I r = 0; r < F; r++)
            for (I c = 0; c < E; c++) s[r][c] *= carry[C - 1];
        tn(k, w, s, 1, true);
    }

    M within(M to) const {  // Γ ⊙ Q Kᵀ
        for (I i = 0; i < C; i++)
            for (I j = 0; j < C; j++) to[i][j] = j <= i ? gamma[i][j] * scores[i][j] : T(0);
        return to;
    }

    void forward(I g) {
        load_state(s, a.before, g);
        if (a.initial) load_state(w0, a.initial, g % a.H);
        for (I n = 0; n < chunks; n++) {
            if (a.kept) store_state(a.kept, s, g * chunks + n);
            products(g, n);
            solve();
            if (a.u) give<T>(u, a.u, g, n);
            if (a.initial) nn(q, w0, y);
            for (I i = 0; i < C; i++)
                for (I c = 0; c < E; c++) y[i][c] = (a.initial ? y[i][c] : T(0)) + carry[i] * qs[i][c];
            nn(within(scores), u, y, 1, true);
            give<T>(y, a.y, g, n);
            write();
        }
        store_state(a.after, s, g);
    }

    void load_state(M to, const void* from, I index) const { Base::load(to, (const T*)from + index * F * E); }
    void store_state(void* to, M from, I index) const { Base::store((T*)to + index * F * E, from, E); }

    void backward_chunk(I g, I n) {
        load_state(s, a.kept, g * chunks + n);
        products(g, n);
        fetch<T>(u, a.u, g, n), fetch<T>(dy, a.dy, g, n);
        M w = rows(weighed);
        std::fill(dalpha.begin(), dalpha.end(), T(0)), std::fill(dbeta.begin(), dbeta.end(), T(0));
        zero(dgamma);
        // S ← G_C S + Kᵀ diag(Γ_C) U, while ds is still that of the chunk's end
        nn(k, ds, du);
        for (I i = 0; i < C; i++) dgamma[C - 1][i] += dot(E, u[i], du[i]), dcarry[i] = 0;
        for (I r = 0; r < F; r++) dcarry[C - 1] += dot(E, s[r], ds[r]);
        weigh(u, gamma[C - 1], w);
        nt(w, ds, dk);
        weigh(du, gamma[C - 1], du);
        for (I r = 0; r < F; r++)
            for (I c = 0; c < E; c++) ds[r][c] *= carry[C - 1];
        // Y
        for (I i = 0; i < C; i++) dcarry[i] += dot(E, dy[i], qs[i]);
        weigh(dy, carry.data(), w);
        nt(w, s, dq);
        tn(q, w, ds, 1, true);
        if (a.initial) nt(dy, w0, dq, 1, true), tn(q, dy, dw0, 1, true);
        nt(dy, u, dp);
        for (I i = 0; i < C; i++)
            for (I j = 0; j < C; j++) {
                T d = j <= i ? dp[i][j] : T(0);
                if (j <= i) dgamma[i][j] += d * scores[i][j];
                dp[i][j] = j <= i ? d * gamma[i][j] : T(0);
            }
        nn(dp, k, dq, 1, true), tn(dp, q, dk, 1, true);
        tn(within(scores), dy, du, 1, true);
        // (I + A) U = R: rows from the last one back
        for (I i = C - 1; i >= 0; i--) {
            const T* __restrict row = du[i];
            for (I j = 0; j < i; j++) {
                T share = beta[i] * gamma[i][j] * kappa[i][j];
                T* __restrict other = du[j];
                for (I c = 0; c < E; c++) other[c] -= share * row[c];
            }
        }
        nt(du, u, dkappa);
        for (I i = 0; i < C; i++) {
            for (I j = 0; j < C; j++) {
                T d = j < i ? -dkappa[i][j] : T(0);
                if (j < i) {
                    dbeta[i] += d * gamma[i][j] * kappa[i][j];
                    dgamma[i][j] += d * beta[i] * kappa[i][j];
                }
                dkappa[i][j] = j < i ? d * beta[i] * gamma[i][j] : T(0);
            }
            T along = 0;
            for (I c = 0; c < E; c++) {
                T d = du[i][c];
                dbeta[i] += d * (v[i][c] - (a.initial ? kw[i][c] : T(0)) - carry[i] * ks[i][c]);
                along += d * ks[i][c];
                du[i][c] = beta[i] * d;  // of V
                x[i][c] = -carry[i] * beta[i] * d;  // of K S
            }
            dcarry[i] -= beta[i] * along;
        }
        give<S>(du, a.dv, g, n);
        if (a.initial) nt(du, w0, dk, -1, true), tn(k, du, dw0, -1, true);
        nt(x, s, dk, 1, true), tn(k, x, ds, 1, true);
        nn(dkappa, k, dk, 1, true), tn(dkappa, k, dk, 1, true);
        give<S>(dq, a.dq, g, n), give<S>(dk, a.dk, g, n);
        // Γ_ij = Γ_{i−1,j} α_i, and G as one more column
        for (I i = C - 1; i >= 0; i--) {
            dalpha[i] += dcarry[i] * (i ? carry[i - 1] : T(1));
            if (!i) break;
            dcarry[i - 1] += dcarry[i] * alpha[i];
            dalpha[i] += dot(i, dgamma[i], gamma[i - 1]);
            for (I j = 0; j < i; j++) dgamma[i - 1][j] += dgamma[i][j] * alpha[i];
        }
        I count = std::min(C, a.T - n * C), first = g * a.T + n * C;
        std::copy(dalpha.begin(), dalpha.begin() + count, (T*)a.dalpha + first);
        std::copy(dbeta.begin(), dbeta.begin() + count, (T*)a.dbeta + first);
    }

    void backward(I g) {
        load_state(ds, a.dafter, g);
        if (a.initial) load_state(w0, a.initial, g % a.H), zero(dw0);
        for (I n = chunks - 1; n >= 0; n--) backward_chunk(g, n);
        store_state(a.dbefore, ds, g);
        if (a.initial) store_state(a.dinitial, dw0, g);
    }
};

}  // namespace
