"""Reads: every chunk has its state, so that all of a segment are programs of their own."""

# mypy: ignore-errors
# G programs × S chunks of a segment; C tokens of a chunk, F features, E hidden units (of `linear`: outputs), D outputs

import triton
import triton.language as tl

from atlas_lm.memory.kernels.triton.parts import activate, curvature, product, rows, shared_curvature, square


@triton.jit
def first_layer(
    phi_q, q_by_initial, z_in, scale, weights, error_in, by_w, by_s, c, live,
    F: tl.constexpr, E: tl.constexpr, P: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_F: tl.constexpr, LOW: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Pre-activations of a chunk's reads: r′ + [a x, −b x] z − (Γ/D ⊙ scores) e, in LOW."""
    f, e = tl.arange(0, BLOCK_F), tl.arange(0, E)
    gate, up = tl.zeros([BLOCK_C, E], WIDE), tl.zeros([BLOCK_C, E], WIDE)
    held_gate, held_up = tl.load(scale), tl.load(scale + 1)
    for i in range(F // BLOCK_F):
        r = i * BLOCK_F + f
        x = rows(phi_q, c, live, r, F).to(WIDE)
        x_w, x_s = (x * by_w[:, None]).to(LOW), (x * by_s[:, None]).to(LOW)
        at = z_in + r[:, None] * P + e[None, :]
        gate += product(x_w, (held_gate * tl.load(at)).to(LOW), WIDE)
        gate += product(x_s, tl.load(at + F * P).to(LOW), WIDE)
        if WIDTH == 2:
            up += product(x_w, (held_up * tl.load(at + E)).to(LOW), WIDE)
            up += product(x_s, tl.load(at + F * P + E).to(LOW), WIDE)
    gate += rows(q_by_initial, c, live, e, P)
    gate -= product(weights, rows(error_in, c, live, e, P), WIDE)
    if WIDTH == 2:
        up += rows(q_by_initial + E, c, live, e, P)
        up -= product(weights, rows(error_in + E, c, live, e, P), WIDE)
    else:
        up = gate
    return gate.to(LOW), up.to(LOW)


@triton.jit
def shares(
    key_scores, gamma, hidden, slope_norm, grad_coef, smallest, c, C, live,
    E: tl.constexpr, WIDTH: tl.constexpr, LOW: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """D and Γ/D of a chunk."""
    strength = tl.load(gamma + c, mask=live, other=0.0)
    if WIDTH == 0:
        kappa = curvature(strength, square(key_scores, c, C, live), strength, WIDTH, WIDE)
    else:
        J = tl.load(slope_norm + c, mask=live, other=0.0)
        h = rows(hidden, c, live, tl.arange(0, E), E)
        kappa = curvature(h, square(key_scores, c, C, live), J, WIDTH, WIDE)
    total = shared_curvature(kappa, strength, c, smallest)
    return total, (square(grad_coef, c, C, live) / total).to(LOW)


@triton.jit
def read(
    phi_q, q_by_initial, key_scores, scores, gamma, read_coef, grad_coef, initial_out,  # as LoopInputs, and φφᵀ
    z_in, z_out, scale, error_in, error_out, hidden, slope_norm,  # as `learn` has left them
    y,  # (G, K, C, D)
    smallest, K, C, S, start,
    F: tl.constexpr, E: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_F: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    WIDE: tl.constexpr = z_in.dtype.element_ty
    P: tl.constexpr = 2 * E if WIDTH == 2 else E
    g, j = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c, e, d = tl.arange(0, BLOCK_C), tl.arange(0, E), tl.arange(0, D)
    live = c < C
    chunk, slot, now = g * K + start + j, g * (S + 1) + j, (g * S + j) * C
    by_w = tl.load(read_coef + chunk * 2 * C + c, mask=live, other=0.0)
    by_s = tl.load(read_coef + chunk * 2 * C + C + c, mask=live, other=0.0)
    _, share = shares(
        key_scores + chunk * C * C, gamma + chunk * C, hidden + now * E, slope_norm + now, grad_coef + chunk * C * C,
        smallest, c, C, live, E, WIDTH, LOW, WIDE,
    )  # fmt: skip
    weights = (share.to(WIDE) * square(scores + chunk * C * C, c, C, live)).to(LOW)
    gate, up = first_layer(
        phi_q + chunk * C * F, q_by_initial + chunk * C * P, z_in + slot * 2 * F * P, scale + slot * 3, weights,
        error_in + now * P, by_w, by_s, c, live, F, E, P, WIDTH, BLOCK_C, BLOCK_F, LOW, WIDE,
    )  # fmt: skip
    out = gate.to(WIDE)
    if WIDTH > 0:
        x, _, _ = activate(gate.to(WIDE), up.to(WIDE), WIDTH)
        x_w, x_s = (x * by_w[:, None]).to(LOW), (x * by_s[:, None]).to(LOW)
        x = x.to(LOW)
        ed = e[:, None] * D + d[None, :]
        h = rows(hidden + now * E, c, live, e, E)
        weights = (share.to(WIDE) * product(x, tl.trans(h), WIDE)).to(LOW)
        w = tl.load(scale + slot * 3 + 2) * tl.load(z_out + slot * 2 * E * D + ed)
        out = product(x, tl.load(initial_out + g * E * D + ed).to(LOW), WIDE) + product(x_w, w.to(LOW), WIDE)
        out += product(x_s, tl.load(z_out + slot * 2 * E * D + E * D + ed).to(LOW), WIDE)
        out -= product(weights, rows(error_out + now * D, c, live, d, D), WIDE)
    tl.store(y + chunk * C * D + c[:, None] * D + d[None, :], out.to(LOW), mask=live[:, None])
