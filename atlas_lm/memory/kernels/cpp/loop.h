// The loop over chunks: what loop/autograd.py, forward.py and backward.py compute, one (batch, head) at a time, with
// the fast weights in the core's cache. Equations and names are theirs. T is the type of states, coefficients and
// arithmetic, S that of the large tensors outside: double/double, float/float, float/bf16.

#pragma once

#include "activations.h"
#include "coefficients.h"
#include "mix.h"
#include "newton_schulz.h"
#include "operations.h"

extern "C" struct Arguments {
    // sizes: batch × heads, heads, chunks, tokens of a chunk and of a block, features, pre-activations, hidden, outputs
    I G, H, K, C, N, F, P, E, D;
    I kind;  // pre-activations per hidden unit: 0 linear, 1 mlp, 2 gated_mlp
    I token;  // reads see the writes of their own chunk
    I complete, stride, context, train;
    I steps;  // of Newton–Schulz; 0: the update is the gradient
    double radius, smallest;
    // inputs
    const void *initial[2], *phi, *v, *phi_q, *gamma, *same_segment, *in_start_segment, *decay, *eta, *write_coef,
        *gates[4], *before[2];  // gates of reads inside a chunk: eta, intake, retain, carry
    // what the forward pass gives, and keeps for the backward pass
    void *y, *after[2], *kept[2], *pre, *read_pre, *error, *back, *total, *scale;
    // gradients; dstate comes in as that of `after` and goes out as that of `before`
    const void* dy;
    void *dstate[2], *dinitial[2], *dphi, *dv, *dphi_q, *dgamma, *ddecay, *deta, *dwrite_coef,
        *dgates[4];
    I rounding;  // the control word of the thread that asks: whether denormals are flushed
    I next;  // the next g that nobody has taken
};

namespace {

// ------------------------------------------------------------------------------------------------------- a worker

template <class T, class S> struct Worker : Operations<T, S> {
    Arguments& a;
    I layers, H2;  // H2: rows that a read of inside the chunk needs of D
    I R[2], Q[2];
    bool act, token;
    bool summed;  // W_init + w is formed once a chunk: where no token is masked, and there are some
    typedef Matrix<T> M;
    typedef Operations<T, S> Base;
    using Base::narrow, Base::nn, Base::tn, Base::nt, Base::view, Base::load, Base::store, Base::zero, Base::ton, Base::tsq,
        Base::tmp, Base::FEW;

    // scratch
    M w0[2], sum[2], phi, phi_old, pre, v, hidden, hidden_old, slopes, e1, e2, back, kappa, hh, total, over, phi_q, two0,
        two1, read_pre, read_hidden, y, alike, z[2];
    M dz[2], dy, de1, de2, dphi, dhidden, y0, y1, left, right, drh, drp, datt, datt2, dover, dback,
        dpre, factor[4], dinitial[2], spare[2];
    std::vector<M> states[2];
    Coefficients<T> fold;
    NewtonSchulz<T, S> orthogonal{*this};
    std::vector<T> sens, on0, on1, don0, don1, rows, squares, dat0, dat1;
    std::vector<T> own_row;

    explicit Worker(Arguments& a_) : a(a_) {
        act = a.kind > 0, token = a.token, summed = !a.in_start_segment && a.N >= 6;
        layers = act ? 2 : 1;
        R[0] = a.F, Q[0] = a.P, R[1] = a.E, Q[1] = a.D;
        H2 = token ? a.C : 1;
        static thread_local Pool<T> pool;
        plan(pool);  // counts
        size_t need = pool.used + 2 * VECTOR;
        if (pool.bytes.size() < need) pool.bytes.assign(need, 0);
        else std::memset(pool.bytes.data(), 0, need);  // padding must be zero
        plan(pool);
        for (auto* x : {&sens, &on0, &on1, &don0, &don1, &own_row}) x->assign(a.N, 0);
        for (auto* x : {&dat0, &dat1}) x->assign(a.C, 0);
        rows.assign(std::max(a.E, a.D), 0), squares.assign(a.E, 0);
    }

    void plan(Pool<T>& p) {
        p.used = 0;
        I N = a.N, C = a.C, F = a.F, P = a.P, E = a.E, D = a.D, wide = std::max({F, P, E, D, N, C});
        for (int l = 0; l < layers; l++) z[l] = p.take(2 * R[l], Q[l]), w0[l] = p.take(R[l], Q[l]), sum[l] = p.take(R[l], Q[l]);
        phi = p.take(N, F), phi_old = a.in_start_segment ? p.take(N, F) : phi;
        pre = p.take(N, P), v = p.take(N, D), e1 = p.take(N, P);
        kappa = p.take(N, N), hh = p.take(N, N), total = p.take(H2, N);
        phi_q = p.take(C, F), read_pre = p.take(C, P), y = p.take(C, D);
        two0 = p.take(a.steps ? wide : std::max(N, C), wide), two1 = p.take(std::max(N, C), wide);
        this->room(p, wide);
        if (a.steps) orthogonal.plan(p, a.steps, wide);
        if (token) over = p.take(C, N), alike = p.take(C, N), fold.sigma = p.take(C, N), fold.of_gradients = p.take(C, N);
        if (act) {
            hidden = p.take(N, E), hidden_old = a.in_start_segment ? p.take(N, E) : hidden;
            slopes = p.take(N, P), e2 = p.take(N, D), back = p.take(N, E), read_hidden = p.take(C, E);
        }
        if (!a.dy) return;
        for (int l = 0; l < layers; l++) {
            dinitial[l] = p.take(R[l], Q[l]), dz[l] = p.take(2 * R[l], Q[l]), spare[l] = p.take(2 * R[l], Q[l]);
            states[l].clear();
            for (I i = 0; i < a.stride; i++) states[l].push_back(p.take(2 * R[l], Q[l]));
        }
        dy = p.take(C, D), de1 = p.take(N, P), dphi = p.take(N, F);
        y0 = p.take(N, wide), y1 = p.take(N, wide);
        drp = p.take(C, P), dpre = p.take(N, P);
        if (token) left = p.take(C, wide), right = p.take(C, wide), datt = p.take(C, N), datt2 = p.take(C, N), dover = p.take(C, N);
        for (auto& f : factor) f = p.take(std::max(N, C), wide);
        if (act) {
            de2 = p.take(N, D), dhidden = p.take(N, E), drh = p.take(C, E), dback = p.take(N, E);
        }
    }

    // mix(m), its products through the matrix unit where they have enough tokens
    void blend(Mix<T> m) {
        bool few = !narrow;
        for (int f = 0; f < m.count; f++) few |= m.outer[f].tokens < FEW;
        if (few) return mix(m);
        I rows = m.z.rows / 2, columns = m.z.cols;
        M sum = view(ton, rows, columns);
        auto add = [&](const Outer<T>& o, const T* a, M to, bool onto) {
            tn(M{const_cast<T*>(a), o.tokens, rows, o.ld}, M{const_cast<T*>(o.b), o.tokens, columns, o.ldb}, to, 1, onto);
        };
        for (int f = 0; f < m.shared; f++) add(m.outer[f], m.outer[f].w, sum, f > 0);
        const Outer<T> identity{nullptr, nullptr, 0, nullptr, 0, 0};
        Mix<T> rest = m;
        rest.outer = &identity, rest.count = 0, rest.shared = 0;
        mix(rest);
        M w = first(m.to), s = second(m.to);
        if (m.shared)
            for (I r = 0; r < rows; r++)
                for (I c = 0; c < columns; c++) w[r][c] += sum[r][c], m.sum[r][c] += sum[r][c];
        for (int f = m.shared; f < m.count; f++) {
            add(m.outer[f], m.outer[f].w, w, true);
            if (m.outer[f].s) add(m.outer[f], m.outer[f].s, s, true);
        }
    }

    static M first(M state) { return {state.p, state.rows / 2, state.cols, state.ld}; }
    static M second(M state) { return state.part(state.rows / 2, state.rows / 2); }

    bool in_start(I g, I n, I i) const { return !a.in_start_segment || ((const uint8_t*)a.in_start_segment)[(g * a.K + n) * a.N + i]; }
    // rows of x whose token sees W_ξ
    void mask(I g, I n, M x, M to, I shift) const {
        for (I i = 0; i < x.rows; i++) {
            bool seen = in_start(g, n, i + shift);
            for (I c = 0; c < x.cols; c++) to[i][c] = seen ? x[i][c] : T(0);
        }
    }
    I halo() const { return a.N - a.C; }

    template <class X> X* chunk(void* p, I g, I n, I size) const { return (X*)p + (g * a.K + n) * size; }
    template <class X> const X* chunk(const void* p, I g, I n, I size) const { return (const X*)p + (g * a.K + n) * size; }

    void load_state(M* to, const void* const* from, I index) {  // null: empty
        for (int l = 0; l < layers; l++) from[l] ? load(to[l], (const T*)from[l] + index * 2 * R[l] * Q[l]) : zero(to[l]);
    }
    void store_state(void* const* to, M* from, I index) {
        for (int l = 0; l < layers && to[l]; l++) store((T*)to[l] + index * 2 * R[l] * Q[l], from[l], Q[l]);
    }

    void load_initial(I g) {
        for (int l = 0; l < layers; l++) load(w0[l], (const T*)a.initial[l] + g % a.H * R[l] * Q[l]);
    }

    void sum_initial(M* state) {  // W_init + w
        for (int l = summed ? 0 : 1; l < layers; l++) {
            M w = first(state[l]);
            for (I r = 0; r < R[l]; r++) {
                T* __restrict to = sum[l][r];
                for (I c = 0; c < Q[l]; c++) to[c] = w0[l][r][c] + w[r][c];
            }
        }
    }

    // y = x (W_init + w), where rows of `seen` alone see w; `seen` is x where nothing is masked
    void forward_product(int l, M x, M seen, M state, M y) {
        if (summed) return nn(x, sum[l], y);
        nn(x, w0[l], y);
        nn(seen, first(state), y, 1, true);
    }
    // x = [x +] d (W_init + w)ᵀ, alike
    void backward_product(int l, M d, M seen, M state, M x, bool add) {
        if (summed) return nt(d, sum[l], x, 1, add);
        M w = first(state);
        nt(d, w0[l], x, 1, add, &seen, &w);
    }

    // --------------------------------------------------------------------------------------------------- forward

    bool learns(I n) const { return n < a.complete || token; }

    void learn(I g, I n) {  // factors of the chunk's gradients, and D
        load(phi, chunk<S>(a.phi, g, n, a.N * a.F));
        if (a.in_start_segment) mask(g, n, phi, phi_old, 0);
        forward_product(0, phi, phi_old, z[0], pre);
        load(v, chunk<S>(a.v, g, n, a.N * a.D));
        if (!act) {
            for (I i = 0; i < a.N; i++)
                for (I c = 0; c < a.P; c++) e1[i][c] = pre[i][c] - v[i][c];
        } else {
            for (I i = 0; i < a.N; i++) activate<T, true>(a.kind, a.E, pre[i], hidden[i], slopes[i]);
            if (a.in_start_segment) mask(g, n, hidden, hidden_old, 0);
            forward_product(1, hidden, hidden_old, z[1], e2);
            for (I i = 0; i < a.N; i++)
                for (I c = 0; c < a.D; c++) e2[i][c] -= v[i][c];
            M e_old = e2;
            if (a.in_start_segment) mask(g, n, e2, e_old = view(two0, a.N, a.D), 0);
            backward_product(1, e2, e_old, z[1], back, false);
            first_errors();
        }
        if (a.steps) return;
        curvature(g, n);
        if (!a.train) return;
        store(chunk<T>(a.total, g, n, H2 * a.N), total, a.N);
    }

    // What the backward pass needs is computed where it is kept, in padded rows.
    void place(I g, I n) {
        if (!a.pre) return;
        pre.p = chunk<T>(a.pre, g, n, a.N * pre.ld);
        if (!act) return;
        read_pre.p = chunk<T>(a.read_pre, g, n, a.C * read_pre.ld);
        e2.p = chunk<T>(a.error, g, n, a.N * e2.ld);
        back.p = chunk<T>(a.back, g, n, a.N * back.ld);
    }

    void first_errors() {
        for (I i = 0; i < a.N; i++)
            for (I k = 0; k < a.kind; k++)
                for (I c = 0; c < a.E; c++) e1[i][k * a.E + c] = slopes[i][k * a.E + c] * back[i][c];
    }

    void restore(I g, I n) {  // what `learn` found, from what it kept
        load(phi, chunk<S>(a.phi, g, n, a.N * a.F));
        if (a.in_start_segment) mask(g, n, phi, phi_old, 0);
        place(g, n);
        if (!a.steps) load(total, chunk<T>(a.total, g, n, H2 * a.N));
        if (!act) {
            load(v, chunk<S>(a.v, g, n, a.N * a.D));
            for (I i = 0; i < a.N; i++)
                for (I c = 0; c < a.P; c++) e1[i][c] = pre[i][c] - v[i][c];
            return;
        }
        for (I i = 0; i < a.N; i++) activate<T, true>(a.kind, a.E, pre[i], hidden[i], slopes[i]);
        if (a.in_start_segment) mask(g, n, hidden, hidden_old, 0);
        first_errors();
    }

    // the smaller of two bounds on ‖diag(slopes) W‖², given its squared slopes: network.norm_bound
    T spectral_bound(M w) {
        M wt = view(ton, a.D, a.E), gram = view(tsq, a.D, a.D);
        transpose<T>(a.E, a.D, w.p, w.ld, wt.p, wt.ld);
        nn(wt, w, gram);
        return most_of<T>(a.D, [&](I r) { return total_of<T>(a.D, [&](I c) { return std::abs(gram[r][c]); }); });
    }

    void sensitivity(I g, I n, M w, bool seen) {
        T spectral = spectral_bound(w);
        for (I r = 0; r < a.E; r++) rows[r] = dot(a.D, w[r], w[r]);
        for (I i = 0; i < a.N; i++) {
            if (a.in_start_segment && in_start(g, n, i) != seen) continue;
            const T* __restrict slope = slopes[i];
            T* __restrict squared = squares.data();
            for (I c = 0; c < a.E; c++) squared[c] = slope[c] * slope[c];
            if (a.kind == 2)
                for (I c = 0; c < a.E; c++) squared[c] += slope[a.E + c] * slope[a.E + c];
            T frobenius = dot(a.E, squared, rows.data());
            T other = spectral * most_of<T>(a.E, [&](I c) { return squared[c]; });
            sens[i] = std::sqrt(other < frobenius ? other : frobenius);
        }
    }

    void curvature(I g, I n) {
        I N = a.N;
        nt(phi, phi, kappa);
        if (act) {
            sensitivity(g, n, sum[1], true);
            if (a.in_start_segment) sensitivity(g, n, w0[1], false);
            nt(hidden, hidden, hh);
        }
        const uint8_t* same = a.same_segment ? chunk<uint8_t>(a.same_segment, g, n, N * N) : nullptr;
        for (I i = 0; i < N; i++) {
            for (I j = 0; j < N; j++) {
                T k = std::abs(kappa[i][j]);
                kappa[i][j] = act ? std::abs(hh[i][j]) + k * (1 + sens[i] * sens[j]) : k;
            }
            if (same)
                for (I j = 0; j < N; j++) kappa[i][j] = same[i * N + j] ? kappa[i][j] : T(0);
        }
        const T* gamma = chunk<T>(a.gamma, g, n, N);
        for (I i = 0; i < N; i++) own_row[i] = kappa[i][i] * (1 - gamma[i]);
        T least = T(a.smallest), context = T(a.context);
        for (I j = 0, t = 0; j < N; j++) {
            for (I i = 0; i < N; i++) own_row[i] += gamma[j] * kappa[j][i];
            if (token ? j < N - a.C : j < N - 1) continue;
            for (I i = 0; i < N; i++) {
                T d = context * own_row[i];
                total[t][i] = d < least ? least : d;
            }
            t++;
        }
    }

    // [a x, −b x]
    void weigh(M x, const T* by, M to0, M to1, I count) {
        for (I i = 0; i < x.rows; i++)
            for (I c = 0; c < x.cols; c++) to0[i][c] = by[i] * x[i][c], to1[i][c] = by[count + i] * x[i][c];
    }

    void attention(M weights, M scores, M to) {
        for (I i = 0; i < to.rows; i++)
            for (I c = 0; c < to.cols; c++) to[i][c] = weights[i][c] * scores[i][c];
    }

    void divide_over(I g, I n) {
        fold.C = a.C, fold.N = a.N, fold.context = a.context;
        fold.eta = chunk<T>(a.gates[0], g, n, a.C), fold.intake = chunk<T>(a.gates[1], g, n, a.C);
        fold.retain = chunk<T>(a.gates[2], g, n, a.C), fold.carry = chunk<T>(a.gates[3], g, n, a.C);
        fold.gamma = chunk<T>(a.gamma, g, n, a.N);
        fold.same = a.same_segment ? chunk<uint8_t>(a.same_segment, g, n, a.N * a.N) : nullptr;
        fold.fold();
        for (I i = 0; i < a.C; i++)
            for (I c = 0; c < a.N; c++) over[i][c] = fold.of_gradients[i][c] / total[i][c];
    }

    void read(I g, I n) {
        load(phi_q, chunk<S>(a.phi_q, g, n, a.C * a.F));
        M x0 = view(two0, a.C, a.F), x1 = view(two1, a.C, a.F);
        if (!token) {
            M x = phi_q;
            if (a.in_start_segment) mask(g, n, phi_q, x = x0, halo());
            forward_product(0, phi_q, x, z[0], read_pre);
        } else {
            divide_over(g, n);
            const T* at_ = fold.at.data();
            weigh(phi_q, at_, x0, x1, a.C);
            nn(phi_q, w0[0], read_pre);
            nn(x0, first(z[0]), read_pre, 1, true);
            nn(x1, second(z[0]), read_pre, 1, true);
            nt(phi_q, phi, alike);
            attention(over, alike, alike);
            nn(alike, e1, read_pre, -1, true);
        }
        if (!act) return store(chunk<S>(a.y, g, n, a.C * a.D), read_pre, a.D);
        for (I i = 0; i < a.C; i++) activate<T, false>(a.kind, a.E, read_pre[i], read_hidden[i], nullptr);
        if (!token) {
            M x = read_hidden;
            if (a.in_start_segment) mask(g, n, read_hidden, x = view(two0, a.C, a.E), halo());
            forward_product(1, read_hidden, x, z[1], y);
        } else {
            M h0 = view(two0, a.C, a.E), h1 = view(two1, a.C, a.E);
            weigh(read_hidden, fold.at.data(), h0, h1, a.C);
            nn(read_hidden, w0[1], y);
            nn(h0, first(z[1]), y, 1, true);
            nn(h1, second(z[1]), y, 1, true);
            nt(read_hidden, hidden, alike);
            attention(over, alike, alike);
            nn(alike, e2, y, -1, true);
        }
        store(chunk<S>(a.y, g, n, a.C * a.D), y, a.D);
    }

    void step_sizes(I g, I n) {  // ω/D
        const T* on = chunk<T>(a.write_coef, g, n, 2 * a.N);
        for (I i = 0; i < a.N; i++) {
            T d = a.steps ? T(1) : total[H2 - 1][i];
            on0[i] = on[i] / d, on1[i] = on[a.N + i] / d;
        }
    }

    void update(I g, I n, M* from, M* to) {
        step_sizes(g, n);
        const T* by = chunk<T>(a.decay, g, n, 4);
        M* inputs[2] = {&phi, &hidden};
        M* errors[2] = {&e1, &e2};
        for (int l = 0; l < layers; l++) {
            M x0 = view(two0, a.N, R[l]), x1 = view(two1, a.N, R[l]), x = *inputs[l];
            for (I i = 0; i < a.N; i++)
                for (I c = 0; c < R[l]; c++) x0[i][c] = on0[i] * x[i][c], x1[i][c] = on1[i] * x[i][c];
            Outer<T> o{x0.p, x1.p, x0.ld, errors[l]->p, errors[l]->ld, a.N};
            blend(Mix<T>{from[l], to[l], by, &o, 1});
        }
        for (int m = 0; a.steps && m < matrices(); m++) {
            M w = matrix(to, m), u = orthogonal.forward(matrix(to, m, true));
            T eta = *chunk<T>(a.eta, g, n, 1);
            for (I r = 0; r < w.rows; r++)
                for (I c = 0; c < w.cols; c++) w[r][c] -= eta * u[r][c];
        }
    }

    // the matrices of the paper: W_gate and W_up lie side by side
    int matrices() const { return act ? int(a.kind) + 1 : 1; }
    M matrix(M* state, int m, bool momentum = false) const {
        bool last = m == matrices() - 1;
        int l = last && act ? 1 : 0;
        M w = momentum ? second(state[l]) : first(state[l]);
        I columns = act && !last ? a.E : Q[l];
        return {w.p + (act && !last ? m * a.E : 0), w.rows, columns, w.ld};
    }

    void hold(M* state, T* scale) {  // on the ball
        for (int m = 0; m < matrices(); m++) {
            M w = matrix(state, m);
            T sum = 0;
            for (I r = 0; r < w.rows; r++) sum += dot(w.cols, w[r], w[r]);
            T size = std::sqrt(sum / T(w.rows * w.cols));
            scale[m] = size > T(a.radius) ? T(a.radius) / size : T(1);
            stretch(w, scale[m]);
        }
    }
    static void stretch(M w, T by) {
        if (by == 1) return;
        for (I r = 0; r < w.rows; r++)
            for (I c = 0; c < w.cols; c++) w[r][c] *= by;
    }

    void forward(I g) {
        load_state(z, a.before, g);
        load_initial(g);
        for (I n = 0; n < a.K; n++) {
            if (a.train && n % a.stride == 0) store_state(a.kept, z, n / a.stride * a.G + g);
            sum_initial(z);
            place(g, n);
            if (learns(n)) learn(g, n);
            read(g, n);
            if (n >= a.complete) continue;
            update(g, n, z, z);
            T scale[3] = {1, 1, 1};
            hold(z, scale);
            if (a.train) std::memcpy(chunk<T>(a.scale, g, n, 3), scale, sizeof scale);
        }
        store_state(a.after, z, g);
    }

    // -------------------------------------------------------------------------------------------------- backward

    void next_state(I g, I n, M* from, M* to) {  // as in the forward pass
        restore(g, n);
        update(g, n, from, to);
        const T* scale = chunk<T>(a.scale, g, n, 3);
        for (int m = 0; m < matrices(); m++) stretch(matrix(to, m), scale[m]);
    }

    void backward_ball(I g, I n, M* state) {
        const T* scale = chunk<T>(a.scale, g, n, 3);
        bool held = false;
        for (int m = 0; m < matrices(); m++) held |= scale[m] != 1;
        if (!held) return;
        next_state(g, n, state, spare);
        for (int m = 0; m < matrices(); m++) {
            if (scale[m] == 1) continue;
            M w = matrix(spare, m), dw = matrix(dz, m);
            T along = 0, size = 0;
            for (I r = 0; r < w.rows; r++) along += dot(w.cols, w[r], dw[r]), size += dot(w.cols, w[r], w[r]);
            for (I r = 0; r < w.rows; r++)
                for (I c = 0; c < w.cols; c++) dw[r][c] = scale[m] * (dw[r][c] - w[r][c] * (along / size));
        }
    }

    void backward_update(I g, I n, M* state) {
        backward_ball(g, n, state);
        if (a.steps) backward_orthogonal(g, n, state);
        restore(g, n);
        step_sizes(g, n);
        M* inputs[2] = {&phi, &hidden};
        M* errors[2] = {&e1, &e2};
        M* dinputs[2] = {&dphi, &dhidden};
        M* derrors[2] = {&de1, &de2};
        T* don = chunk<T>(a.dwrite_coef, g, n, 2 * a.N);
        std::fill(don0.begin(), don0.end(), T(0)), std::fill(don1.begin(), don1.end(), T(0));
        for (int l = 0; l < layers; l++) {
            M x = *inputs[l], e = *errors[l], de = *derrors[l], w = first(dz[l]), s = second(dz[l]);
            M a0 = view(y0, a.N, Q[l]), a1 = view(y1, a.N, Q[l]);
            nn(x, w, a0), nn(x, s, a1);
            for (I i = 0; i < a.N; i++) {
                don0[i] += dot(Q[l], e[i], a0[i]), don1[i] += dot(Q[l], e[i], a1[i]);
                for (I c = 0; c < Q[l]; c++) de[i][c] = on0[i] * a0[i][c] + on1[i] * a1[i][c];
            }
            // on₀ e wᵀ + on₁ e sᵀ, by columns
            M et = view(ton, Q[l], a.N), by_w = view(tsq, R[l], a.N), by_s = view(tmp, R[l], a.N);
            transpose<T>(a.N, Q[l], e.p, e.ld, et.p, et.ld);
            nn(w, et, by_w), nn(s, et, by_s);
            for (I r = 0; r < R[l]; r++)
                for (I i = 0; i < a.N; i++) by_w[r][i] = on0[i] * by_w[r][i] + on1[i] * by_s[r][i];
            transpose<T>(R[l], a.N, by_w.p, by_w.ld, dinputs[l]->p, dinputs[l]->ld);
        }
        for (I i = 0; i < a.N; i++)
            don[i] = a.steps ? don0[i] : don0[i] / total[H2 - 1][i],
            don[a.N + i] = a.steps ? don1[i] : don1[i] / total[H2 - 1][i];
    }

    void backward_orthogonal(I g, I n, M* state) {
        next_state(g, n, state, spare);
        T eta = *chunk<T>(a.eta, g, n, 1), along = 0;
        for (int m = 0; m < matrices(); m++) {
            M s = matrix(spare, m, true), dw = matrix(dz, m), ds = matrix(dz, m, true), du = view(two0, s.rows, s.cols);
            M u = orthogonal.forward(s);
            along += NewtonSchulz<T, S>::product(u, dw);
            for (I r = 0; r < dw.rows; r++)
                for (I c = 0; c < dw.cols; c++) du[r][c] = -eta * dw[r][c];
            orthogonal.backward(s, du, ds);
        }
        *chunk<T>(a.deta, g, n, 1) = -along;
    }

    // of one layer of a read inside a chunk: the gradient of x
    void backward_token(M x, M keys, M state, M w_init, M d, M dx, M dkeys, M error, M derror, bool started) {
        const T* at_ = fold.at.data();
        nt(x, keys, alike);
        M L = view(left, a.C, x.cols), Rr = view(right, a.C, x.cols);
        nt(d, first(state), L), nt(d, second(state), Rr);
        for (I i = 0; i < a.C; i++) {
            dat0[i] += dot(x.cols, x[i], L[i]), dat1[i] += dot(x.cols, x[i], Rr[i]);
            for (I c = 0; c < x.cols; c++) dx[i][c] = at_[i] * L[i][c] + at_[a.C + i] * Rr[i][c];
        }
        nt(d, w_init, dx, 1, true);
        nt(d, error, datt, -1);
        attention(over, alike, datt2);
        tn(datt2, d, derror, -1, started);
        for (I i = 0; i < a.C; i++)
            for (I c = 0; c < a.N; c++) {
                dover[i][c] += datt[i][c] * alike[i][c] / total[i][c];
                datt[i][c] *= over[i][c];  // the gradient of x kᵀ
            }
        nn(datt, keys, dx, 1, true);
        tn(datt, x, dkeys, 1, started);
    }

    void backward_read(I g, I n, M* state, bool started, Outer<T>* outer) {
        load(dy, chunk<S>(a.dy, g, n, a.C * a.D));
        load(phi_q, chunk<S>(a.phi_q, g, n, a.C * a.F));
        M d = dy;
        if (token) {
            divide_over(g, n);
            zero(dover), std::fill(dat0.begin(), dat0.end(), T(0)), std::fill(dat1.begin(), dat1.end(), T(0));
        }
        if (act) {
            place(g, n);
            for (I i = 0; i < a.C; i++) activate<T, false>(a.kind, a.E, read_pre[i], read_hidden[i], nullptr);
            M f0 = view(factor[0], a.C, a.E), f1 = view(factor[1], a.C, a.E);
            if (!token) {
                M x = read_hidden;
                M seen = dy;
                if (a.in_start_segment) mask(g, n, dy, seen = view(two0, a.C, a.D), halo()), mask(g, n, read_hidden, x = f0, halo());
                backward_product(1, dy, seen, state[1], drh, false);
                outer[1] = {x.p, nullptr, x.ld, dy.p, dy.ld, a.C};
            } else {
                backward_token(read_hidden, hidden, state[1], w0[1], dy, drh, dhidden, e2, de2, started);
                weigh(read_hidden, fold.at.data(), f0, f1, a.C);
                outer[1] = {f0.p, f1.p, f0.ld, dy.p, dy.ld, a.C};
            }
            if (token || a.in_start_segment) tn(read_hidden, dy, dinitial[1], 1, true);
            for (I i = 0; i < a.C; i++) deactivate<T, false>(a.kind, a.E, read_pre[i], drh[i], nullptr, nullptr, drp[i]);
            d = drp;
        }
        M dx = view(two0, a.C, a.F), f2 = view(factor[2], a.C, a.F), f3 = view(factor[3], a.C, a.F);
        if (!token) {
            M x = phi_q, seen = d;
            if (a.in_start_segment) mask(g, n, d, seen = view(two1, a.C, a.P), halo()), mask(g, n, phi_q, x = f2, halo());
            backward_product(0, d, seen, state[0], dx, false);
            outer[0] = {x.p, nullptr, x.ld, d.p, d.ld, a.C};
        } else {
            backward_token(phi_q, phi, state[0], w0[0], d, dx, dphi, e1, de1, started);
            weigh(phi_q, fold.at.data(), f2, f3, a.C);
            outer[0] = {f2.p, f3.p, f2.ld, d.p, d.ld, a.C};
            T* dgates[4];
            for (int i = 0; i < 4; i++) dgates[i] = chunk<T>(a.dgates[i], g, n, a.C);
            T* dgamma = chunk<T>(a.dgamma, g, n, a.N);
            std::fill(dgamma, dgamma + a.N, T(0));
            fold.unfold(dover, dat0.data(), dat1.data(), dgates[0], dgates[1], dgates[2], dgates[3], dgamma);
        }
        store(chunk<S>(a.dphi_q, g, n, a.C * a.F), dx, a.F);
        if (token || a.in_start_segment) tn(phi_q, d, dinitial[0], 1, true);
    }

    int backward_learn(I g, I n, M* state, Outer<T>* outer) {  // more products for the second layer
        int count = 0;
        M d = de1;
        if (act) {
            for (I i = 0; i < a.N; i++)
                for (I c = 0; c < a.E; c++) {
                    dback[i][c] = slopes[i][c] * de1[i][c];
                    if (a.kind == 2) dback[i][c] += slopes[i][a.E + c] * de1[i][a.E + c];
                }
            M b = dback, seen = de2;
            if (a.in_start_segment) mask(g, n, dback, b = view(y0, a.N, a.E), 0);
            if (summed) {
                nn(dback, sum[1], de2, 1, true);
            } else {
                nn(dback, w0[1], de2, 1, true), nn(b, first(state[1]), de2, 1, true);
            }
            if (a.in_start_segment) mask(g, n, de2, seen = view(two0, a.N, a.D), 0);
            backward_product(1, de2, seen, state[1], dhidden, true);
            if (a.in_start_segment) tn(dback, e2, dinitial[1], 1, true), tn(hidden, de2, dinitial[1], 1, true);
            outer[count++] = {b.p, nullptr, b.ld, e2.p, e2.ld, a.N};
            outer[count++] = {hidden_old.p, nullptr, hidden_old.ld, de2.p, de2.ld, a.N};
            for (I i = 0; i < a.N; i++) deactivate<T, true>(a.kind, a.E, pre[i], dhidden[i], de1[i], back[i], dpre[i]);
            d = dpre;
            store(chunk<S>(a.dv, g, n, a.N * a.D), de2, a.D, -1);
        } else {
            store(chunk<S>(a.dv, g, n, a.N * a.D), de1, a.D, -1);
        }
        M seen = d;
        if (a.in_start_segment) mask(g, n, d, seen = view(y1, a.N, a.P), 0), tn(phi, d, dinitial[0], 1, true);
        backward_product(0, d, seen, state[0], dphi, token || n < a.complete);
        store(chunk<S>(a.dphi, g, n, a.N * a.F), dphi, a.F);
        return count;
    }

    template <class X> void nothing(void* p, I g, I n, I size) {
        std::fill(chunk<X>(p, g, n, size), chunk<X>(p, g, n, size) + size, X(0));
    }

    void backward_chunk(I g, I n, M* state) {
        bool ends = n < a.complete;
        if (!ends) nothing<T>(a.dwrite_coef, g, n, 2 * a.N);
        if (!ends && a.deta) nothing<T>(a.deta, g, n, 1);
        if (!learns(n)) nothing<S>(a.dphi, g, n, a.N * a.F), nothing<S>(a.dv, g, n, a.N * a.D);
        if (ends) backward_update(g, n, state);
        else if (learns(n)) restore(g, n);
        sum_initial(state);
        Outer<T> in[2], out[3], of_read[2];
        int ins = 0, outs = 0;
        backward_read(g, n, state, ends, of_read);
        if (learns(n)) {
            outs = backward_learn(g, n, state, out);
            const M& d = act ? dpre : de1;
            in[ins++] = {phi_old.p, nullptr, phi_old.ld, d.p, d.ld, a.N};
        }
        in[ins++] = of_read[0], out[outs++] = of_read[1];
        // W_init has the same products, where tokens are not weighed otherwise than in w
        int less = token ? 1 : 0;
        T by[4] = {1, 0, 0, 1};
        T* ddecay = nullptr;
        if (ends) {
            const T* decay = chunk<T>(a.decay, g, n, 4);
            by[0] = decay[0], by[1] = decay[2], by[2] = decay[1], by[3] = decay[3];
            ddecay = chunk<T>(a.ddecay, g, n, 4);
        }
        blend(Mix<T>{dz[0], dz[0], by, in, ins, a.in_start_segment ? 0 : ins - less, dinitial[0], state[0], ddecay});
        if (act) blend(Mix<T>{dz[1], dz[1], by, out, outs, a.in_start_segment ? 0 : outs - less, dinitial[1], state[1], ddecay});
    }

    void backward(I g) {
        load_state(dz, a.dstate, g);
        load_initial(g);
        for (int l = 0; l < layers; l++) zero(dinitial[l]);
        for (I start = (a.K - 1) / a.stride * a.stride; start >= 0; start -= a.stride) {
            I end = std::min(start + a.stride, a.K);
            I last = std::min(end - 1, a.complete);  // the newest state that any chunk of these starts from
            for (I n = start; n <= last; n++) {
                M now[2] = {states[0][n - start], layers > 1 ? states[1][n - start] : M{}};
                if (n == start) {
                    load_state(now, a.kept, start / a.stride * a.G + g);
                } else {
                    M was[2] = {states[0][n - start - 1], layers > 1 ? states[1][n - start - 1] : M{}};
                    next_state(g, n - 1, was, now);
                }
            }
            for (I n = end - 1; n >= start; n--) {
                I at = std::max<I>(std::min(n, a.complete), start) - start;
                M now[2] = {states[0][at], layers > 1 ? states[1][at] : M{}};
                backward_chunk(g, n, now);
            }
        }
        store_state(a.dstate, dz, g);
        for (int l = 0; l < layers; l++) store((T*)a.dinitial[l] + g * R[l] * Q[l], dinitial[l], Q[l]);
    }
};

}  // namespace
