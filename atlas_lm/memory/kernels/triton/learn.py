"""The chain of states: a program takes one (shard, head) through the chunks of a segment.

A pass over the first layer's fast weights writes what the chunk before has learned, keeps the state for the reads and
for the way back, and multiplies it with the chunk's keys: so the state is moved once a chunk. The ball's scale is known
only when a pass has ended; states are kept as they were before it, each with its scale, which whoever reads multiplies.
"""

# mypy: ignore-errors
# G programs; C tokens of a chunk, F features, E hidden units (of `linear`: outputs), D outputs; K chunks in all,
# S + 1 states are kept of a segment

import triton
import triton.language as tl

from atlas_lm.memory.kernels.triton.parts import (
    activate,
    curvature,
    own,
    product,
    rows,
    scale_of,
    sensitivity,
    square,
)


@triton.jit
def learn(
    phi, v, by_initial, key_scores, gamma, write_coef, decay, initial_out,  # as LoopInputs; φφᵀ (G, K, C, C)
    z_in, z_out,  # (G, S + 1, 2F, WIDTH·E), (G, S + 1, 2E, D): states, before their scales
    scale,  # (G, S + 1, 3) of gate, up and the second layer
    pre, error_in, error_out, hidden, back,  # (G, S, C, WIDTH·E) twice, (G, S, C, D), (G, S, C, E) twice: of the chunks
    slope_norm, last,  # (G, S, C): ‖J‖, and D at the chunk's end
    # chunks start … start + count; one pass more where the last of them writes
    radius, smallest, K, C, S, start, count, passes,
    F: tl.constexpr, E: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_F: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    WIDE: tl.constexpr = z_in.dtype.element_ty
    P: tl.constexpr = 2 * E if WIDTH == 2 else E
    g = tl.program_id(0).to(tl.int64)
    c, f, e, d = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_F), tl.arange(0, E), tl.arange(0, D)
    live = c < C
    ed = e[:, None] * D + d[None, :]
    for j in range(passes):
        n = start + j
        chunk, slot = g * K + n, g * (S + 1) + j
        now, before = (g * S + j) * C, (g * S + j - 1) * C
        new, learns = n > start, n < start + count
        previous = tl.where(new, slot - 1, slot)
        alpha = tl.load(decay + (chunk - 1) * 4, mask=new, other=1.0)
        beta = tl.load(decay + (chunk - 1) * 4 + 1, mask=new, other=0.0)
        theta = tl.load(decay + (chunk - 1) * 4 + 3, mask=new, other=1.0)
        seen = c < tl.where(new, C, 0)
        share = tl.load(last + before + c, mask=seen, other=1.0)
        into_w = tl.load(write_coef + (chunk - 1) * 2 * C + c, mask=seen, other=0.0) / share
        into_s = tl.load(write_coef + (chunk - 1) * 2 * C + C + c, mask=seen, other=0.0) / share
        held_gate = tl.load(scale + previous * 3)
        held_up = tl.load(scale + previous * 3 + 1)
        pre_gate = tl.zeros([BLOCK_C, E], WIDE)
        pre_up = tl.zeros([BLOCK_C, E], WIDE)
        squares_gate = tl.zeros([], WIDE)
        squares_up = tl.zeros([], WIDE)
        for i in range(F // BLOCK_F):
            r = i * BLOCK_F + f
            at = r[:, None] * P + e[None, :]
            old, kept = z_in + previous * 2 * F * P + at, z_in + slot * 2 * F * P + at
            w_gate, s_gate = tl.load(old), tl.load(old + F * P)
            if WIDTH == 2:
                w_up, s_up = tl.load(old + E), tl.load(old + F * P + E)
            if new:
                key = tl.load(phi + ((chunk - 1) * C + c)[None, :] * F + r[:, None], mask=live[None, :], other=0.0)
                key_w = (key.to(WIDE) * into_w[None, :]).to(LOW)
                key_s = (key.to(WIDE) * into_s[None, :]).to(LOW)
                error = rows(error_in + before * P, c, live, e, P)
                w_gate = alpha * held_gate * w_gate + beta * s_gate + product(key_w, error, WIDE)
                s_gate = theta * s_gate + product(key_s, error, WIDE)
                tl.store(kept, w_gate)
                tl.store(kept + F * P, s_gate)
                if WIDTH == 2:
                    error = rows(error_in + before * P + E, c, live, e, P)
                    w_up = alpha * held_up * w_up + beta * s_up + product(key_w, error, WIDE)
                    s_up = theta * s_up + product(key_s, error, WIDE)
                    tl.store(kept + E, w_up)
                    tl.store(kept + F * P + E, s_up)
            key = rows(phi + chunk * C * F, c, c < tl.where(learns, C, 0), r, F)
            squares_gate += tl.sum(w_gate * w_gate)
            pre_gate += product(key, w_gate.to(LOW), WIDE)
            if WIDTH == 2:
                squares_up += tl.sum(w_up * w_up)
                pre_up += product(key, w_up.to(LOW), WIDE)
        at_scale = scale + slot * 3  # of a segment's first state it is given
        held_gate, held_up = tl.load(at_scale), tl.load(at_scale + 1)
        if new:
            held_gate = scale_of(squares_gate, F * E, radius).to(WIDE)
            tl.store(at_scale, held_gate)
            if WIDTH == 2:
                held_up = scale_of(squares_up, F * E, radius).to(WIDE)
                tl.store(at_scale + 1, held_up)
        if learns:
            strength = tl.load(gamma + chunk * C + c, mask=live, other=0.0)
            target = rows(v + chunk * C * D, c, live, d, D).to(WIDE)
            scores = square(key_scores + chunk * C * C, c, C, live)
            at_pre = c[:, None] * P + e[None, :]
            gate = (held_gate * pre_gate + rows(by_initial + chunk * C * P, c, live, e, P)).to(LOW)
            tl.store(pre + now * P + at_pre, gate, mask=live[:, None])
            if WIDTH == 0:
                tl.store(error_in + now * P + at_pre, (gate.to(WIDE) - target).to(LOW), mask=live[:, None])
                kappa = curvature(gate, scores, strength, WIDTH, WIDE)
            else:
                if WIDTH == 2:
                    up = (held_up * pre_up + rows(by_initial + chunk * C * P + E, c, live, e, P)).to(LOW)
                    tl.store(pre + now * P + E + at_pre, up, mask=live[:, None])
                else:
                    up = gate
                h, k_gate, k_up = activate(gate.to(WIDE), up.to(WIDE), WIDTH)
                h = h.to(LOW)
                tl.store(hidden + now * E + c[:, None] * E + e[None, :], h, mask=live[:, None])
                held_out = tl.load(at_scale + 2)
                w = held_out * tl.load(z_out + slot * 2 * E * D + ed)
                s = tl.load(z_out + slot * 2 * E * D + E * D + ed)
                w_out = (tl.load(initial_out + g * E * D + ed) + w).to(LOW)
                error = (product(h, w_out, WIDE) - target).to(LOW)
                through = product(error, tl.trans(w_out), WIDE)
                tl.store(error_out + now * D + c[:, None] * D + d[None, :], error, mask=live[:, None])
                tl.store(back + now * E + c[:, None] * E + e[None, :], through.to(LOW), mask=live[:, None])
                tl.store(error_in + now * P + at_pre, (k_gate * through).to(LOW), mask=live[:, None])
                if WIDTH == 2:
                    tl.store(error_in + now * P + E + at_pre, (k_up * through).to(LOW), mask=live[:, None])
                J = sensitivity(k_gate, k_up, w_out, WIDE)
                tl.store(slope_norm + now + c, J, mask=live)
                kappa = curvature(h, scores, J, WIDTH, WIDE)
            total = tl.maximum(own(kappa, strength, c) + tl.sum(strength[:, None] * kappa, 0), smallest)
            tl.store(last + now + c, total, mask=live)
            if WIDTH > 0:  # noqa: SIM102  # of a network without a second layer nothing of it is compiled
                if n + 1 < start + passes:
                    on_w = tl.load(write_coef + chunk * 2 * C + c, mask=live, other=0.0) / total
                    on_s = tl.load(write_coef + chunk * 2 * C + C + c, mask=live, other=0.0) / total
                    alpha, beta = tl.load(decay + chunk * 4), tl.load(decay + chunk * 4 + 1)
                    theta = tl.load(decay + chunk * 4 + 3)
                    h_w, h_s = (h.to(WIDE) * on_w[:, None]).to(LOW), (h.to(WIDE) * on_s[:, None]).to(LOW)
                    w = alpha * w + beta * s + product(tl.trans(h_w), error, WIDE)
                    s = theta * s + product(tl.trans(h_s), error, WIDE)
                    tl.store(z_out + (slot + 1) * 2 * E * D + ed, w)
                    tl.store(z_out + (slot + 1) * 2 * E * D + E * D + ed, s)
                    tl.store(at_scale + 5, scale_of(tl.sum(w * w), E * D, radius).to(WIDE))
        tl.debug_barrier()  # the next pass loads what others of this program have stored
