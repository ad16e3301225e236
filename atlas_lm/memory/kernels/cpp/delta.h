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

// Products take q over k as one matrix, and S beside W_init: each is packed for the matrix unit once.
template <class T, class S> struct Delta : Operations<T, S> {
    typedef Operations<T, S> Base;
    typedef Matrix<T> M;
    using Base::nn, Base::nt, Base::tn, Base::zero;

    DeltaArguments& a;
    I F, E, C, chunks, beside;  // beside: columns of S before those of W_init
    bool w_init;
    M qk, q, k, v, u, w, y, sw, s, w0, seen, qs, ks, qw, kw, gamma, pair, scores, kappa;
    M dsw, ds, dw0, dqk, dk, du, dy, dgamma, dpair, dp, dkappa, right;
    std::vector<T> alpha, beta, carry, dalpha, dbeta, dcarry;

    explicit Delta(DeltaArguments& a_) : a(a_), F(a_.F), E(a_.E), C(a_.C) {
        chunks = (a.T + C - 1) / C, w_init = a.initial != nullptr, beside = up(E, Vec<T>::lanes);
        static thread_local Pool<T> pool;
        plan(pool);  // counts
        size_t need = pool.used + 2 * VECTOR;
        if (pool.bytes.size() < need) pool.bytes.assign(need, 0);
        else std::memset(pool.bytes.data(), 0, need);  // padding must be zero, and what lies between S and W_init
        plan(pool);
        for (auto* list : {&alpha, &beta, &carry, &dalpha, &dbeta, &dcarry}) list->assign(C, T(0));
    }

    static M columns(M m, I from, I count) { return {m.p + from, m.rows, count, m.ld}; }

    void plan(Pool<T>& p) {
        p.used = 0;
        I both = w_init ? beside + E : E;
        this->room(p, std::max({F, both, 2 * C}));
        qk = p.take(2 * C, F), q = qk.part(0, C), k = qk.part(C, C);
        for (M* m : {&v, &u, &w, &y}) *m = p.take(C, E);
        sw = p.take(F, both), s = columns(sw, 0, E), w0 = columns(sw, beside, E);
        seen = p.take(2 * C, both);
        qs = columns(seen.part(0, C), 0, E), ks = columns(seen.part(C, C), 0, E);
        qw = columns(seen.part(0, C), beside, E), kw = columns(seen.part(C, C), beside, E);
        gamma = p.take(C, C), pair = p.take(2 * C, C), scores = pair.part(0, C), kappa = pair.part(C, C);
        if (!a.dy) return;
        dsw = p.take(F, both), ds = columns(dsw, 0, E), dw0 = columns(dsw, beside, E);
        dqk = p.take(2 * C, F), dk = dqk.part(C, C);
        du = p.take(C, E), dy = p.take(C, E), right = p.take(2 * C, both);
        dgamma = p.take(C, C), dpair = p.take(2 * C, C), dp = dpair.part(0, C), dkappa = dpair.part(C, C);
    }

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

    void load_state(M to, const void* from, I index) const {
        const T* p = (const T*)from + index * F * E;
        for (I r = 0; r < F; r++) std::copy(p + r * E, p + (r + 1) * E, to[r]);
    }
    void store_state(void* to, M from, I index) const {
        T* p = (T*)to + index * F * E;
        for (I r = 0; r < F; r++) std::copy(from[r], from[r] + E, p + r * E);
    }

    // what both passes need of a chunk: q and k with k, with S and with W_init
    void products(I g, I n) {
        fetch<S>(q, a.q, g, n), fetch<S>(k, a.k, g, n), fetch<S>(v, a.v, g, n), gates(g, n);
        nt(qk, k, pair), nn(qk, sw, seen);
    }

    T error(I i, I c) const { return v[i][c] - (w_init ? kw[i][c] : T(0)) - carry[i] * ks[i][c]; }

    // U in place of its right side: every row takes away what the rows before it wrote
    void solve() {
        for (I i = 0; i < C; i++) {
            T* __restrict row = u[i];
            for (I c = 0; c < E; c++) row[c] = beta[i] * error(i, c);
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
    void decay(M m) const {  // over the whole chunk
        for (I r = 0; r < F; r++)
            for (I c = 0; c < E; c++) m[r][c] *= carry[C - 1];
    }

    M within() {  // Γ ⊙ Q Kᵀ, in place of Q Kᵀ
        for (I i = 0; i < C; i++)
            for (I j = 0; j < C; j++) scores[i][j] = j <= i ? gamma[i][j] * scores[i][j] : T(0);
        return scores;
    }

    void forward(I g) {
        load_state(s, a.before, g);
        if (w_init) load_state(w0, a.initial, g % a.H);
        for (I n = 0; n < chunks; n++) {
            if (a.kept) store_state(a.kept, s, g * chunks + n);
            products(g, n);
            solve();
            if (a.u) give<T>(u, a.u, g, n);
            for (I i = 0; i < C; i++)
                for (I c = 0; c < E; c++) y[i][c] = (w_init ? qw[i][c] : T(0)) + carry[i] * qs[i][c];
            nn(within(), u, y, 1, true);
            give<T>(y, a.y, g, n);
            weigh(u, gamma[C - 1], w);
            decay(s);
            tn(k, w, s, 1, true);
        }
        store_state(a.after, s, g);
    }

    void backward_chunk(I g, I n) {
        load_state(s, a.kept, g * chunks + n);
        products(g, n);
        fetch<T>(u, a.u, g, n), fetch<T>(dy, a.dy, g, n);
        std::fill(dalpha.begin(), dalpha.end(), T(0)), std::fill(dbeta.begin(), dbeta.end(), T(0));
        zero(dgamma);
        // S ← G_C S + Kᵀ diag(Γ_C) U; ds is still that of the chunk's end
        nn(k, ds, du);
        for (I i = 0; i < C; i++) dgamma[C - 1][i] += dot(E, u[i], du[i]), dcarry[i] = dot(E, dy[i], qs[i]);
        for (I r = 0; r < F; r++) dcarry[C - 1] += dot(E, s[r], ds[r]);
        weigh(du, gamma[C - 1], du);
        // Y
        nt(dy, u, dp);
        for (I i = 0; i < C; i++) {
            for (I j = 0; j <= i; j++) dgamma[i][j] += dp[i][j] * scores[i][j], dp[i][j] *= gamma[i][j];
            for (I j = i + 1; j < C; j++) dp[i][j] = 0;
        }
        tn(within(), dy, du, 1, true);
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
            for (I j = 0; j < i; j++) {
                T d = -dkappa[i][j];
                dbeta[i] += d * gamma[i][j] * kappa[i][j];
                dgamma[i][j] += d * beta[i] * kappa[i][j];
                dkappa[i][j] = d * beta[i] * gamma[i][j];
            }
            for (I j = i; j < C; j++) dkappa[i][j] = 0;
            T along = 0;
            T *__restrict of_q = right[i], *__restrict of_k = right[C + i];
            for (I c = 0; c < E; c++) {
                T d = du[i][c];
                dbeta[i] += d * error(i, c), along += d * ks[i][c];
                du[i][c] = beta[i] * d;  // of V
                of_q[c] = carry[i] * dy[i][c], of_k[c] = -carry[i] * beta[i] * d;  // of Q S and K S
            }
            for (I c = 0; w_init && c < E; c++) of_q[beside + c] = dy[i][c], of_k[beside + c] = -du[i][c];
            dcarry[i] -= beta[i] * along;
        }
        give<S>(du, a.dv, g, n);
        nt(right, sw, dqk);
        weigh(u, gamma[C - 1], w);
        nt(w, ds, dk, 1, true);
        decay(ds);
        tn(qk, right, dsw, 1, true);
        nn(dpair, k, dqk, 1, true), tn(dpair, qk, dk, 1, true);
        give<S>(dqk.part(0, C), a.dq, g, n), give<S>(dk, a.dk, g, n);
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
        zero(dsw);
        load_state(ds, a.dafter, g);
        if (w_init) load_state(w0, a.initial, g % a.H);
        for (I n = chunks - 1; n >= 0; n--) backward_chunk(g, n);
        store_state(a.dbefore, ds, g);
        if (w_init) store_state(a.dinitial, dw0, g);
    }
};

}  // namespace
