"""What the kernels of the memory's loop share: products, activations, curvature (M3, M16), as in `memory/network.py`.

Everything is for one chunk of one head. Tiles have BLOCK_C rows for the C tokens; rows beyond C hold zeros.
"""

# mypy: ignore-errors
# C tokens of a chunk, F features, E hidden units, D outputs

import triton
import triton.language as tl


@triton.jit
def product(a, b, WIDE: tl.constexpr):
    """a b, summed in WIDE; nothing of float32 is rounded to TF32."""
    return tl.dot(a, b, input_precision="ieee", out_dtype=WIDE)


@triton.jit
def places(N: tl.constexpr, zero):
    """0 … N − 1, from a zero in memory: offsets are computed where they are used, and do not live in registers for a
    whole kernel, as those of a constant would."""
    return tl.arange(0, N) + tl.load(zero)


@triton.jit
def rows(at, r_C, live_C, columns_Q, Q: tl.constexpr):
    """The rows of a (…, Q) tensor at `at`; zeros where not `live`."""
    return tl.load(at + r_C[:, None] * Q + columns_Q[None, :], mask=live_C[:, None], other=0.0)


@triton.jit
def square(at, c_C, C, live_C):
    """A (C, C) tensor at `at`."""
    both = live_C[:, None] & live_C[None, :]
    return tl.load(at + c_C[:, None] * C + c_C[None, :], mask=both, other=0.0)


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def tanh(x):
    return 1 - 2 / (1 + tl.exp(2 * x))


@triton.jit
def gelu_parts(x):
    """tanh of GELU's argument, the argument's slope, GELU′ (tanh form)."""
    t = tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))
    inner = 0.7978845608028654 * (1 + 3 * 0.044715 * x * x)
    return t, inner, 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * inner


@triton.jit
def activate(gate, up, WIDTH: tl.constexpr):
    """Hidden activations and their partial derivatives with respect to gate and up; of `mlp` up is unused."""
    if WIDTH == 2:
        s = sigmoid(gate)
        silu = gate * s
        slope = s + silu - silu * s
        return silu * up, slope * up, silu
    else:
        t, _, slope = gelu_parts(gate)
        return 0.5 * gate * (1 + t), slope, tl.zeros_like(gate)


@triton.jit
def activate_backward(gate, up, dhidden, dslope_gate, dslope_up, WIDTH: tl.constexpr):
    """The gradients of gate and up, given those of the hidden activations and of both partial derivatives."""
    if WIDTH == 2:
        s = sigmoid(gate)
        silu = gate * s
        slope = s + silu - silu * s
        bend = (1 - s) * (2 * s + silu - 2 * silu * s)
        into_gate = slope * (dslope_up + dhidden * up) + bend * up * dslope_gate
        return into_gate, dhidden * silu + dslope_gate * slope
    else:
        t, inner, slope = gelu_parts(gate)
        bend = (1 - t * t) * (inner + gate * (3 * 0.7978845608028654 * 0.044715 * gate - t * inner * inner))
        return slope * dhidden + bend * dslope_gate, tl.zeros_like(gate)


@triton.jit
def sensitivity(k_gate, k_up, w_out, WIDE: tl.constexpr):
    """√ of the smaller of two bounds on ‖diag(slopes) W‖² (`network.norm_bound`), for every token."""
    squared = k_gate * k_gate + k_up * k_up
    w = w_out.to(WIDE)
    frobenius = tl.sum(squared * tl.sum(w * w, 1)[None, :], 1)
    spectral = tl.max(tl.sum(tl.abs(product(tl.trans(w_out), w_out, WIDE)), 1), 0)
    return tl.sqrt(tl.minimum(frobenius, tl.max(squared, 1) * spectral))


@triton.jit
def curvature(hidden, scores, J, WIDTH: tl.constexpr, WIDE: tl.constexpr):
    """κ (C, C) of a chunk's tokens (`network.curvature`)."""
    kernel = tl.abs(scores.to(WIDE))
    if WIDTH == 0:
        return kernel
    else:
        return tl.abs(product(hidden, tl.trans(hidden), WIDE)) + kernel * (1 + J[:, None] * J[None, :])


@triton.jit
def own(kappa, gamma, c_C):
    """κ_ii (1 − γ_i)."""
    return tl.sum(tl.where(c_C[:, None] == c_C[None, :], kappa, 0.0), 0) * (1 - gamma)


@triton.jit
def shared_curvature(kappa, gamma, c_C, smallest):
    """D[t, i] for every token t of the chunk: `forward._shared_curvature`."""
    return tl.maximum(own(kappa, gamma, c_C)[None, :] + tl.cumsum(gamma[:, None] * kappa, 0), smallest)


@triton.jit
def scale_of(squares, count, radius):
    """By how much the ball holds a matrix of `count` numbers with that sum of squares."""
    return tl.minimum(1.0, radius * tl.sqrt(count / tl.maximum(squares, 1e-30)))
