// Newton–Schulz orthogonalisation of one matrix, and the way back: newton_schulz.py.

#pragma once

#include "operations.h"

namespace {

template <class T, class S> struct NewtonSchulz {
    typedef Matrix<T> M;
    static constexpr T A = T(3.4445), B = T(-4.7750), C = T(2.0315), EPSILON = T(1e-14);

    Operations<T, S>& op;
    I steps;
    std::vector<M> x;  // iterates, on the short side
    M gram, factor, dx, dfactor, dgram, turned;
    bool tall = false;
    T scale = 0;

    explicit NewtonSchulz(Operations<T, S>& op_) : op(op_) {}

    void plan(Pool<T>& pool, I count, I longest) {
        steps = count;
        x.clear();
        for (I i = 0; i <= steps; i++) x.push_back(pool.take(longest, longest));
        for (M* m : {&gram, &factor, &dx, &dfactor, &dgram, &turned}) *m = pool.take(longest, longest);
    }

    static M shaped(M m, I rows, I cols) { return Operations<T, S>::view(m, rows, cols); }
    static T product(M a, M b) {
        T sum = 0;
        for (I r = 0; r < a.rows; r++) sum += dot(a.cols, a[r], b[r]);
        return sum;
    }
    static void turn(M from, M to, bool across) {
        if (across) return transpose<T>(from.rows, from.cols, from.p, from.ld, to.p, to.ld);
        for (I r = 0; r < from.rows; r++) std::copy(from[r], from[r] + from.cols, to[r]);
    }

    void polynomial(M at) {  // factor = b G + c G²
        op.nt(at, at, gram);
        op.nn(gram, gram, factor, 1);
        for (I r = 0; r < gram.rows; r++)
            for (I c = 0; c < gram.cols; c++) factor[r][c] = B * gram[r][c] + C * factor[r][c];
    }

    // U(s) (rows × cols), in the orientation of s
    M forward(M s) {
        tall = s.rows > s.cols;
        I rows = std::min(s.rows, s.cols), cols = std::max(s.rows, s.cols);
        for (auto& m : x) m = shaped(m, rows, cols);
        for (M* m : {&gram, &factor, &dfactor, &dgram}) *m = shaped(*m, rows, rows);
        dx = shaped(dx, rows, cols), turned = shaped(turned, s.rows, s.cols);
        scale = 1 / std::sqrt(product(s, s) + EPSILON);
        turn(s, x[0], tall);
        for (I r = 0; r < rows; r++)
            for (I c = 0; c < cols; c++) x[0][r][c] *= scale;
        for (I k = 0; k < steps; k++) {
            polynomial(x[k]);
            op.nn(factor, x[k], x[k + 1]);
            for (I r = 0; r < rows; r++)
                for (I c = 0; c < cols; c++) x[k + 1][r][c] += A * x[k][r][c];
        }
        turn(x[steps], turned, tall);
        return turned;
    }

    // Behind `forward(s)`: given the gradient of U(s), adds that of s to ds.
    void backward(M s, M du, M ds) {
        turn(du, dx, tall);
        for (I k = steps - 1; k >= 0; k--) {
            polynomial(x[k]);
            op.nt(dx, x[k], dfactor);
            // dG = b dF + c (G dF + dF G), made symmetric; G and F are symmetric
            op.nn(gram, dfactor, dgram), op.nn(dfactor, gram, dgram, 1, true);
            for (I r = 0; r < gram.rows; r++)
                for (I c = 0; c < gram.cols; c++) dgram[r][c] = B * dfactor[r][c] + C * dgram[r][c];
            for (I r = 0; r < gram.rows; r++)
                for (I c = 0; c <= r; c++) dgram[r][c] = dgram[c][r] = dgram[r][c] + dgram[c][r];
            M next = x[k + 1];  // no longer needed
            op.nn(factor, dx, next), op.nn(dgram, x[k], next, 1, true);
            for (I r = 0; r < dx.rows; r++)
                for (I c = 0; c < dx.cols; c++) dx[r][c] = next[r][c] + A * dx[r][c];
        }
        turn(dx, turned, tall);
        T along = scale * scale * scale * product(turned, s);
        for (I r = 0; r < s.rows; r++)
            for (I c = 0; c < s.cols; c++) ds[r][c] += scale * turned[r][c] - along * s[r][c];
    }
};

}  // namespace
