// What is compiled, once per machine (compiled.py).

#include "attention.h"
#include "convolution.h"
#include "delta.h"
#include "norm.h"
#include "sketch.h"
#include "loop.h"

namespace {

// Denormals are flushed in every thread as in the one that asks: results must not depend on who computes them.
void round_as(I mode) {
#if defined(__SSE__)
    _mm_setcsr(unsigned(mode));
#else
    (void)mode;
#endif
}

template <class S> using Unit = typename std::conditional<std::is_same<S, bf16>::value, MatrixUnit, int>::type;

template <class T, class S> void attend(AttentionArguments* a) {
    round_as(a->rounding);
    Attention<T, S> worker(*a);
    [[maybe_unused]] Unit<S> unit{};
    for (I g; (g = __atomic_fetch_add(&a->next, 1, __ATOMIC_RELAXED)) < a->B * a->H;)
        a->dy ? worker.backward(g) : worker.forward(g);
}

template <class T, class S> void loop(Arguments* a) {
    round_as(a->rounding);
    Worker<T, S> worker(*a);
    [[maybe_unused]] Unit<S> unit{};
    for (I g; (g = __atomic_fetch_add(&a->next, 1, __ATOMIC_RELAXED)) < a->G;)
        a->dy ? worker.backward(g) : worker.forward(g);
}

template <class T, class S> void delta(DeltaArguments* a) {
    round_as(a->rounding);
    Delta<T, S> worker(*a);
    [[maybe_unused]] Unit<S> unit{};
    for (I g; (g = __atomic_fetch_add(&a->next, 1, __ATOMIC_RELAXED)) < a->G;)
        a->dy ? worker.backward(g) : worker.forward(g);
}

template <class T, class S> void convolve(ConvolutionArguments* a) {
    round_as(a->rounding);
    Convolution<T, S> worker(*a);
    for (I n; (n = __atomic_fetch_add(&a->next, 1, __ATOMIC_RELAXED)) < a->B * worker.pieces;)
        a->dx ? worker.backward(n) : worker.forward(n);
}

template <class T, class S> void sketch(SketchArguments* a) {
    round_as(a->rounding);
    for (I n; (n = __atomic_fetch_add(&a->next, 1, __ATOMIC_RELAXED)) * a->block < a->rows;) sketch_piece<T, S>(*a, n);
}

template <class T, class S> void norm(NormArguments* a) {
    round_as(a->rounding);
    I pieces = a->B * ((a->T + a->block - 1) / a->block);
    for (I n; (n = __atomic_fetch_add(&a->next, 1, __ATOMIC_RELAXED)) < pieces;) norm_piece<T, S>(*a, n);
}

}  // namespace

extern "C" {
I rounding_mode() {
#if defined(__SSE__)
    return I(_mm_getcsr());
#else
    return 0;
#endif
}
I leading_dimension(I columns, I item) { return item == 8 ? padded<double>(columns) : padded<float>(columns); }
void attention_double(AttentionArguments* a) { attend<double, double>(a); }
void attention_float(AttentionArguments* a) { attend<float, float>(a); }
void attention_bf16(AttentionArguments* a) { attend<float, bf16>(a); }
void delta_double(DeltaArguments* a) { delta<double, double>(a); }
void delta_float(DeltaArguments* a) { delta<float, float>(a); }
void delta_bf16(DeltaArguments* a) { delta<float, bf16>(a); }
void loop_double(Arguments* a) { loop<double, double>(a); }
void loop_float(Arguments* a) { loop<float, float>(a); }
void loop_bf16(Arguments* a) { loop<float, bf16>(a); }
void convolution_double(ConvolutionArguments* a) { convolve<double, double>(a); }
void convolution_float(ConvolutionArguments* a) { convolve<float, float>(a); }
void convolution_bf16(ConvolutionArguments* a) { convolve<float, bf16>(a); }
void norm_double(NormArguments* a) { norm<double, double>(a); }
void norm_float(NormArguments* a) { norm<float, float>(a); }
void sketch_double(SketchArguments* a) { sketch<double, double>(a); }
void sketch_float(SketchArguments* a) { sketch<float, float>(a); }
void sketch_bf16(SketchArguments* a) { sketch<float, bf16>(a); }
}
