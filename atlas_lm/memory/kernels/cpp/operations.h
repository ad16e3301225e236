// Matrices of a worker: scratch memory, conversion to and from the tensors outside, and products.

#pragma once

#include "narrow.h"
#include "products.h"

namespace {

template <class T> struct Pool {  // scratch memory of one thread, kept between calls
    std::vector<char> bytes;
    size_t used = 0;
    Matrix<T> take(I rows, I cols) {
        I ld = padded<T>(cols);
        Matrix<T> m{(T*)(base() + used), rows, cols, ld};
        used += size_t(up((rows * ld + VECTOR) * sizeof(T), VECTOR));
        return m;
    }
    char* base() { return (char*)((uintptr_t(bytes.data()) + VECTOR - 1) / VECTOR * VECTOR); }
};

template <class T, class S> struct Operations {
    typedef Matrix<T> M;
    const bool narrow = std::is_same<S, bf16>::value && narrow_available();
    M tmp, ton, tsq;  // for operands and results on their way

    void room(Pool<T>& p, I wide) { tmp = p.take(wide, wide), ton = p.take(wide, wide), tsq = p.take(wide, wide); }

    template <class X> static void load(M to, const X* from) {
        for (I r = 0; r < to.rows; r++)
            for (I c = 0; c < to.cols; c++) to[r][c] = T(from[r * to.cols + c]);
    }
    template <class X> static void store(X* to, M from, I cols, T sign = 1) {
        for (I r = 0; r < from.rows; r++)
            for (I c = 0; c < cols; c++) to[r * cols + c] = X(sign * from[r][c]);
    }
    static void zero(M m) { std::memset(m.p, 0, size_t(m.rows * m.ld) * sizeof(T)); }
    static M view(M m, I rows, I cols) { return {m.p, rows, cols, padded<T>(cols)}; }  // of scratch, for a smaller one

    // With bf16 tensors outside, products of enough rows go through the matrix unit.
    static constexpr I FEW = 12;  // rows; below, packing for it takes longer than the product
    void product(M A, bool across, M B, bool turned, I rows, I columns, I deep, M C, T alpha, bool add) {
        if constexpr (std::is_same<T, float>::value)
            narrow_product(rows, columns, deep, {A.p, A.ld, across}, {B.p, B.ld, turned}, C.p, C.ld, alpha, add);
    }
    // C = [C +] alpha A B
    void nn(M A, M B, M C, T alpha = 1, bool add = false) {
        if (narrow && A.rows >= FEW) return product(A, false, B, false, A.rows, B.cols, A.cols, C, alpha, add);
        gemm<T>(A.rows, B.cols, A.cols, A.p, A.ld, 1, B.p, B.ld, C.p, C.ld, alpha, add);
    }
    // C = [C +] alpha Aᵀ B
    void tn(M A, M B, M C, T alpha = 1, bool add = false) {
        if (narrow && A.rows >= FEW) return product(A, true, B, false, A.cols, B.cols, A.rows, C, alpha, add);
        gemm<T>(A.cols, B.cols, A.rows, A.p, 1, A.ld, B.p, B.ld, C.p, C.ld, alpha, add);
    }
    // C = [C +] alpha (A Bᵀ [+ A2 B2ᵀ]): transposes what is smaller, A and the result or B
    void nt(M A, M B, M C, T alpha = 1, bool add = false, const M* A2 = nullptr, const M* B2 = nullptr) {
        if (narrow) {
            product(A, false, B, true, A.rows, B.rows, A.cols, C, alpha, add);
            if (A2) product(*A2, false, *B2, true, A2->rows, B2->rows, A2->cols, C, alpha, true);
            return;
        }
        if (A.rows * (A.cols + B.rows) < B.rows * B.cols) {
            M At = view(ton, A.cols, A.rows), Ct = view(tsq, B.rows, A.rows), back = view(tmp, A.rows, B.rows);
            transpose<T>(A.rows, A.cols, A.p, A.ld, At.p, At.ld);
            nn(B, At, Ct, alpha);
            if (A2) {
                transpose<T>(A2->rows, A2->cols, A2->p, A2->ld, At.p, At.ld);
                nn(*B2, At, Ct, alpha, true);
            }
            if (!add) return transpose<T>(B.rows, A.rows, Ct.p, Ct.ld, C.p, C.ld);
            transpose<T>(B.rows, A.rows, Ct.p, Ct.ld, back.p, back.ld);
            for (I r = 0; r < A.rows; r++)
                for (I c = 0; c < B.rows; c++) C[r][c] += back[r][c];
            return;
        }
        M Bt = view(ton, B.cols, B.rows);
        transpose<T>(B.rows, B.cols, B.p, B.ld, Bt.p, Bt.ld);
        nn(A, Bt, C, alpha, add);
        if (A2) {
            transpose<T>(B.rows, B.cols, B2->p, B2->ld, Bt.p, Bt.ld);
            nn(*A2, Bt, C, alpha, true);
        }
    }
};

}  // namespace
