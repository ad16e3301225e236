"""The gradients of reads: all chunks of a segment are programs of their own.

What one step has found is stored for the next one and loaded again: registers would not hold all of it.
"""

# mypy: ignore-errors
# G programs × S chunks of a segment; C tokens of a chunk, F features, E hidden units (of `linear`: outputs), D outputs

import triton
import triton.language as tl

from atlas_lm.memory.kernels.triton.parts import activate, activate_backward, product, rows, square
from atlas_lm.memory.kernels.triton.read import first_layer, shares


@triton.jit
def second_layer(
    initial_out, z_out, scale, read_pre, error_out, hidden, dy, share,
    hidden_q, derror_out, dhidden, dshare, dq_by_initial, by_w, by_s, c, C, live,
    E: tl.constexpr, D: tl.constexpr, P: tl.constexpr, WIDTH: tl.constexpr, LOW: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """From the outputs to the pre-activations of reads; gives back the gradients of a and −b so far."""
    e, d = tl.arange(0, E), tl.arange(0, D)
    ed, ce, cp = e[:, None] * D + d[None, :], c[:, None] * E + e[None, :], c[:, None] * P + e[None, :]
    dout = rows(dy, c, live, d, D)
    gate = rows(read_pre, c, live, e, P).to(WIDE)
    up = rows(read_pre + E, c, live, e, P).to(WIDE) if WIDTH == 2 else gate
    x, _, _ = activate(gate, up, WIDTH)
    left = product(dout, tl.trans((scale * tl.load(z_out + ed)).to(LOW)), WIDE)
    dby_w = tl.sum(x * left, 1)
    dx = by_w[:, None] * left
    right = product(dout, tl.trans(tl.load(z_out + E * D + ed).to(LOW)), WIDE)
    dby_s = tl.sum(x * right, 1)
    dx += by_s[:, None] * right
    dx += product(dout, tl.trans(tl.load(initial_out + ed).to(LOW)), WIDE)
    x = x.to(LOW)
    tl.store(hidden_q + ce, x, mask=live[:, None])
    h = rows(hidden, c, live, e, E)
    alike = product(x, tl.trans(h), WIDE)
    of_chunk = square(share, c, C, live).to(WIDE)
    dweights = -product(dout, tl.trans(rows(error_out, c, live, d, D)), WIDE)
    both = live[:, None] & live[None, :]
    tl.store(dshare + c[:, None] * C + c[None, :], dweights * alike, mask=both)
    found = -product(tl.trans((of_chunk * alike).to(LOW)), dout, WIDE)
    tl.store(derror_out + c[:, None] * D + d[None, :], found, mask=live[:, None])
    dalike = (dweights * of_chunk).to(LOW)
    tl.store(dhidden + ce, product(tl.trans(dalike), x, WIDE), mask=live[:, None])
    dx += product(dalike, h, WIDE)
    gate = rows(read_pre, c, live, e, P).to(WIDE)
    up = rows(read_pre + E, c, live, e, P).to(WIDE) if WIDTH == 2 else gate
    none = tl.zeros_like(dx)
    into_gate, into_up = activate_backward(gate, up, dx, none, none, WIDTH)
    tl.store(dq_by_initial + cp, into_gate.to(LOW), mask=live[:, None])
    if WIDTH == 2:
        tl.store(dq_by_initial + E + cp, into_up.to(LOW), mask=live[:, None])
    return dby_w, dby_s


@triton.jit
def read_backward(
    phi_q, q_by_initial, key_scores, scores, gamma, read_coef, grad_coef, initial_out,
    z_in, z_out, scale, error_in, error_out, hidden, slope_norm, dy,
    share, total, dshare, read_pre,  # (G, S, C, C) three times, (G, S, C, P): between the steps
    hidden_q, derror_in, derror_out, dhidden,  # (G, S, C, E), (G, S, C, P), (G, S, C, D), (G, S, C, E): of a segment
    dphi_q, dq_by_initial, dscores, dread_coef, dgrad_coef,
    smallest, K, C, S, start,
    F: tl.constexpr, E: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_F: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    WIDE: tl.constexpr = z_in.dtype.element_ty
    P: tl.constexpr = 2 * E if WIDTH == 2 else E
    g, j = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c, e, f = tl.arange(0, BLOCK_C), tl.arange(0, E), tl.arange(0, BLOCK_F)
    live = c < C
    both = live[:, None] & live[None, :]
    chunk, slot, now = g * K + start + j, g * (S + 1) + j, (g * S + j) * C
    cc, cp = c[:, None] * C + c[None, :], c[:, None] * P + e[None, :]
    by_w = tl.load(read_coef + chunk * 2 * C + c, mask=live, other=0.0)
    by_s = tl.load(read_coef + chunk * 2 * C + C + c, mask=live, other=0.0)
    of_all, of_chunk = shares(
        key_scores + chunk * C * C, gamma + chunk * C, hidden + now * E, slope_norm + now, grad_coef + chunk * C * C,
        smallest, c, C, live, E, WIDTH, LOW, WIDE,
    )  # fmt: skip
    tl.store(total + now * C + cc, of_all, mask=both)
    tl.store(share + now * C + cc, of_chunk, mask=both)
    dby_w, dby_s = tl.zeros([BLOCK_C], WIDE), tl.zeros([BLOCK_C], WIDE)
    if WIDTH == 0:
        tl.store(dq_by_initial + chunk * C * P + cp, rows(dy + chunk * C * D, c, live, e, D), mask=live[:, None])
    else:
        weights = (of_chunk.to(WIDE) * square(scores + chunk * C * C, c, C, live)).to(LOW)
        gate, up = first_layer(
            phi_q + chunk * C * F, q_by_initial + chunk * C * P, z_in + slot * 2 * F * P, scale + slot * 3, weights,
            error_in + now * P, by_w, by_s, c, live, F, E, P, WIDTH, BLOCK_C, BLOCK_F, LOW, WIDE,
        )  # fmt: skip
        tl.store(read_pre + now * P + cp, gate, mask=live[:, None])
        if WIDTH == 2:
            tl.store(read_pre + now * P + E + cp, up, mask=live[:, None])
        tl.debug_barrier()
        dby_w, dby_s = second_layer(
            initial_out + g * E * D, z_out + slot * 2 * E * D, tl.load(scale + slot * 3 + 2), read_pre + now * P,
            error_out + now * D, hidden + now * E, dy + chunk * C * D, share + now * C,
            hidden_q + now * E, derror_out + now * D, dhidden + now * E, dshare + now * C,
            dq_by_initial + chunk * C * P, by_w, by_s, c, C, live, E, D, P, WIDTH, LOW, WIDE,
        )  # fmt: skip
    tl.debug_barrier()
    of_chunk = square(share + now * C, c, C, live)
    alike = square(scores + chunk * C * C, c, C, live)
    weights = (of_chunk.to(WIDE) * alike).to(LOW)
    dpre = rows(dq_by_initial + chunk * C * P, c, live, e, P)
    dweights = -product(dpre, tl.trans(rows(error_in + now * P, c, live, e, P)), WIDE)
    tl.store(derror_in + now * P + cp, -product(tl.trans(weights), dpre, WIDE), mask=live[:, None])
    if WIDTH == 2:
        dpre = rows(dq_by_initial + chunk * C * P + E, c, live, e, P)
        dweights -= product(dpre, tl.trans(rows(error_in + now * P + E, c, live, e, P)), WIDE)
        tl.store(derror_in + now * P + E + cp, -product(tl.trans(weights), dpre, WIDE), mask=live[:, None])
    tl.store(dscores + chunk * C * C + cc, (dweights * of_chunk).to(LOW), mask=both)
    dshares = dweights * alike
    if WIDTH > 0:
        dshares += square(dshare + now * C, c, C, live)
    of_all = tl.load(total + now * C + cc, mask=both, other=1.0)
    tl.store(dgrad_coef + chunk * C * C + cc, dshares / of_all, mask=both)
    held_gate, held_up = tl.load(scale + slot * 3), tl.load(scale + slot * 3 + 1)
    for i in range(F // BLOCK_F):
        r = i * BLOCK_F + f
        at = z_in + slot * 2 * F * P + r[:, None] * P + e[None, :]
        dpre = rows(dq_by_initial + chunk * C * P, c, live, e, P)
        back_w = product(dpre, tl.trans((held_gate * tl.load(at)).to(LOW)), WIDE)
        back_s = product(dpre, tl.trans(tl.load(at + F * P).to(LOW)), WIDE)
        if WIDTH == 2:
            dpre = rows(dq_by_initial + chunk * C * P + E, c, live, e, P)
            back_w += product(dpre, tl.trans((held_up * tl.load(at + E)).to(LOW)), WIDE)
            back_s += product(dpre, tl.trans(tl.load(at + F * P + E).to(LOW)), WIDE)
        query = rows(phi_q + chunk * C * F, c, live, r, F).to(WIDE)
        dby_w += tl.sum(query * back_w, 1)
        dby_s += tl.sum(query * back_s, 1)
        dquery = by_w[:, None] * back_w + by_s[:, None] * back_s
        tl.store(dphi_q + chunk * C * F + c[:, None] * F + r[None, :], dquery.to(LOW), mask=live[:, None])
    tl.store(dread_coef + chunk * 2 * C + c, dby_w, mask=live)
    tl.store(dread_coef + chunk * 2 * C + C + c, dby_s, mask=live)
