"""The chain of gradients: a program takes one (shard, head) back through the chunks of a segment.

The states of the segment are there again, and so is what its reads send back. Two passes a chunk over the gradient of
the first layer's state: one for what the chunk's errors did to it, one that takes it to the chunk's start.
"""

# mypy: ignore-errors
# G programs; C tokens of a chunk, F features, E hidden units (of `linear`: outputs), D outputs; K chunks in all,
# S + 1 states are kept of a segment

import triton
import triton.language as tl

from atlas_lm.memory.kernels.triton.parts import activate, activate_backward, places, product, rows


@triton.jit
def unhold(w, dw, scale, count: tl.constexpr, Q: tl.constexpr, stride: tl.constexpr, BLOCK: tl.constexpr):
    """The gradient of what the ball scaled, in place of that of what it became: scale · (dw − its part along w).

    w are `count` rows of Q numbers, as they were before; nothing happens inside the ball.
    """
    if scale < 1:
        q, r = tl.arange(0, Q), tl.arange(0, BLOCK)
        inner, squares = tl.zeros([], dw.dtype.element_ty), tl.zeros([], dw.dtype.element_ty)
        for i in range(count // BLOCK):
            at = (i * BLOCK + r)[:, None] * stride + q[None, :]
            of_w = tl.load(w + at)
            inner += tl.sum(of_w * tl.load(dw + at))
            squares += tl.sum(of_w * of_w)
        along = inner / tl.where(squares > 0, squares, 1.0)
        for i in range(count // BLOCK):
            at = (i * BLOCK + r)[:, None] * stride + q[None, :]
            tl.store(dw + at, scale * (tl.load(dw + at) - along * tl.load(w + at)))


@triton.jit
def pair(at, c, C, count):
    """Two vectors that lie one after the other, (2, C); zeros from `count` on."""
    return tl.load(at + c, mask=c < count, other=0.0), tl.load(at + C + c, mask=c < count, other=0.0)


@triton.jit
def writes_of(write_coef, last, c, C, count):
    """ω/D of a chunk. Loaded wherever it is used: vectors that live long cost registers."""
    into_w, into_s = pair(write_coef, c, C, count)
    total = tl.load(last + c, mask=c < C, other=1.0)
    return into_w / total, into_s / total


@triton.jit
def errors(
    dv, initial_out, z_out, dz_out, pre, hidden, dback, derror_in, derror_out,
    write_coef, last, written, held, C, zero,
    BLOCK_C: tl.constexpr, E: tl.constexpr, D: tl.constexpr, P: tl.constexpr, WIDTH: tl.constexpr,
    LOW: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The gradients of a chunk's errors: of e₂ (less that of v) and of what e₁ is made of, e₂ (W + w₂)ᵀ."""
    c = places(BLOCK_C, zero)
    live = c < C
    e, d = tl.arange(0, E), tl.arange(0, D)
    rows_e = places(E, zero)
    ed = rows_e[:, None] * D + d[None, :]
    gate = rows(pre, c, live, e, P).to(WIDE)
    up = rows(pre + E, c, live, e, P).to(WIDE) if WIDTH == 2 else gate
    _, k_gate, k_up = activate(gate, up, WIDTH)
    into_back = k_gate * rows(derror_in, c, live, e, P)
    if WIDTH == 2:
        into_back += k_up * rows(derror_in + E, c, live, e, P)
    into_back = into_back.to(LOW)
    tl.store(dback + c[:, None] * E + e[None, :], into_back, mask=live[:, None])
    w_out = (tl.load(initial_out + ed) + held * tl.load(z_out + ed)).to(LOW)
    derror = rows(derror_out, c, live, d, D)
    derror += product(into_back, w_out, WIDE)
    dw, ds = tl.load(dz_out + ed), tl.load(dz_out + E * D + ed)
    h = rows(hidden, c, live, e, E).to(WIDE)
    into_w, into_s = writes_of(write_coef, last, c, C, written)
    derror += product((h * into_w[:, None]).to(LOW), dw.to(LOW), WIDE)
    derror += product((h * into_s[:, None]).to(LOW), ds.to(LOW), WIDE)
    tl.store(dv + c[:, None] * D + d[None, :], -derror.to(LOW), mask=live[:, None])


@triton.jit
def hidden_gradient(
    dv, initial_out, z_out, dz_out, error_out, hidden, dhidden, dwrite,
    write_coef, last, written, held, C, zero,
    BLOCK_C: tl.constexpr, E: tl.constexpr, D: tl.constexpr, LOW: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Of a chunk's hidden activations, added to what is there, and so are those of ω/D."""
    c = places(BLOCK_C, zero)
    live = c < C
    e, d = tl.arange(0, E), tl.arange(0, D)
    rows_e = places(E, zero)
    ed, ce = rows_e[:, None] * D + d[None, :], c[:, None] * E + e[None, :]
    h = rows(hidden, c, live, e, E).to(WIDE)
    error = rows(error_out, c, live, d, D)
    dw, ds = tl.load(dz_out + ed), tl.load(dz_out + E * D + ed)
    into_w, into_s = writes_of(write_coef, last, c, C, written)
    more_w, more_s = pair(dwrite, c, C, C)
    left = product(error, tl.trans(dw.to(LOW)), WIDE)
    tl.store(dwrite + c, more_w + tl.sum(h * left, 1), mask=live)
    dh = rows(dhidden, c, live, e, E) + into_w[:, None] * left
    right = product(error, tl.trans(ds.to(LOW)), WIDE)
    tl.store(dwrite + C + c, more_s + tl.sum(h * right, 1), mask=live)
    dh += into_s[:, None] * right
    w_out = (tl.load(initial_out + ed) + held * tl.load(z_out + ed)).to(LOW)
    dh += product(-rows(dv, c, live, d, D), tl.trans(w_out), WIDE)
    tl.store(dhidden + ce, dh, mask=live[:, None])


@triton.jit
def second_state(
    dv, dy, dinitial_out, z_out, dz_out, error_out, hidden, dback, hidden_q, read_coef,
    alpha, beta, theta, held, C, zero,
    BLOCK_C: tl.constexpr, E: tl.constexpr, D: tl.constexpr, LOW: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The gradient of the second layer's state before a chunk; gives back those of α, −β and θ."""
    c = places(BLOCK_C, zero)
    live = c < C
    e, d = tl.arange(0, E), tl.arange(0, D)
    rows_e = places(E, zero)
    ed = rows_e[:, None] * D + d[None, :]
    dout = rows(dy, c, live, d, D)
    x = rows(hidden_q, c, live, e, E)
    w, s = tl.load(z_out + ed), tl.load(z_out + E * D + ed)
    dw, ds = tl.load(dz_out + ed), tl.load(dz_out + E * D + ed)
    dalpha, dbeta, dtheta = held * tl.sum(dw * w), tl.sum(dw * s), tl.sum(ds * s)
    by_w, by_s = pair(read_coef, c, C, C)
    x_s = (x.to(WIDE) * by_s[:, None]).to(LOW)
    ds = theta * ds + beta * dw
    ds += product(tl.trans(x_s), dout, WIDE)
    tl.store(dz_out + E * D + ed, ds)
    tl.debug_barrier()
    dw_out = product(tl.trans(rows(dback, c, live, e, E)), rows(error_out, c, live, d, D), WIDE)
    dw_out += product(tl.trans(rows(hidden, c, live, e, E)), -rows(dv, c, live, d, D), WIDE)
    x_w = (x.to(WIDE) * by_w[:, None]).to(LOW)
    dw = alpha * dw + dw_out
    dw += product(tl.trans(x_w), dout, WIDE)
    dw_out += tl.load(dinitial_out + ed)
    dw_out += product(tl.trans(x), dout, WIDE)
    tl.store(dinitial_out + ed, dw_out)
    tl.store(dz_out + ed, dw)
    return dalpha, dbeta, dtheta


@triton.jit
def activation(
    dby_initial, pre, back, derror_in, dhidden, C, zero,
    BLOCK_C: tl.constexpr, E: tl.constexpr, P: tl.constexpr, WIDTH: tl.constexpr, LOW: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The gradients of a chunk's pre-activations, from those of its hidden activations and of its errors."""
    c = places(BLOCK_C, zero)
    live = c < C
    e = tl.arange(0, E)
    cp = c[:, None] * P + e[None, :]
    gate = rows(pre, c, live, e, P).to(WIDE)
    through = rows(back, c, live, e, E).to(WIDE)
    dslope_gate = through * rows(derror_in, c, live, e, P)
    if WIDTH == 2:
        up = rows(pre + E, c, live, e, P).to(WIDE)
        dslope_up = through * rows(derror_in + E, c, live, e, P)
    else:
        up, dslope_up = gate, dslope_gate
    dh = rows(dhidden, c, live, e, E)
    into_gate, into_up = activate_backward(gate, up, dh, dslope_gate, dslope_up, WIDTH)
    tl.store(dby_initial + cp, into_gate.to(LOW), mask=live[:, None])
    if WIDTH == 2:
        tl.store(dby_initial + E + cp, into_up.to(LOW), mask=live[:, None])


@triton.jit
def learn_backward(
    phi, phi_q, dy, write_coef, read_coef, decay, initial_out,
    z_in, z_out, scale, pre, error_in, error_out, hidden, back, last,  # as `learn` has left them
    hidden_q, derror_in, derror_out, dhidden, dq_by_initial,  # as `read_backward` has
    dz_in, dz_out,  # (G, 2F, P), (G, 2E, D): of the states after the segment, then of those before
    dback, dkey,  # (G, S, C, E), (G, C, F): between the steps
    dinitial_out,  # (G, E, D), added to
    dphi, dv, dby_initial, dwrite_coef, ddecay,
    zero,  # a 0, see `places`
    K, C, S, start, count, complete,
    F: tl.constexpr, E: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_F: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    WIDE: tl.constexpr = z_in.dtype.element_ty
    P: tl.constexpr = 2 * E if WIDTH == 2 else E
    g = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, E)
    for i in range(count):
        j = count - 1 - i
        g = tl.program_id(0).to(tl.int64) + tl.load(zero)
        c, f = places(BLOCK_C, zero), places(BLOCK_F, zero)
        live = c < C
        cp = c[:, None] * P + e[None, :]
        n = start + j
        writes = n < complete
        chunk, slot, now = g * K + n, g * (S + 1) + j, (g * S + j) * C
        alpha = tl.load(decay + chunk * 4, mask=writes, other=1.0)
        beta = tl.load(decay + chunk * 4 + 1, mask=writes, other=0.0)
        theta = tl.load(decay + chunk * 4 + 3, mask=writes, other=1.0)
        written = tl.where(writes, C, 0)
        coef, dwrite = write_coef + chunk * 2 * C, dwrite_coef + chunk * 2 * C
        if writes:
            unhold(
                z_in + (slot + 1) * 2 * F * P, dz_in + g * 2 * F * P, tl.load(scale + slot * 3 + 3), F, E, P, BLOCK_F
            )
            if WIDTH == 2:
                up = z_in + (slot + 1) * 2 * F * P + E
                unhold(up, dz_in + g * 2 * F * P + E, tl.load(scale + slot * 3 + 4), F, E, P, BLOCK_F)
            if WIDTH > 0:
                out = z_out + (slot + 1) * 2 * E * D
                unhold(out, dz_out + g * 2 * E * D, tl.load(scale + slot * 3 + 5), E, D, D, E)
            tl.debug_barrier()
        # what the chunk's errors and keys did to the state after it
        derror_gate = rows(derror_in + now * P, c, live, e, P)
        derror_up = derror_gate
        if WIDTH == 2:
            derror_up = rows(derror_in + now * P + E, c, live, e, P)
        into_w, into_s = writes_of(coef, last + now, c, C, written)
        dwrite_w, dwrite_s = tl.zeros([BLOCK_C], WIDE), tl.zeros([BLOCK_C], WIDE)
        for t in range(F // BLOCK_F):
            r = t * BLOCK_F + f
            at = r[:, None] * P + e[None, :]
            dw_at = dz_in + g * 2 * F * P + at
            key = rows(phi + chunk * C * F, c, live, r, F).to(WIDE)
            key_w, key_s = (key * into_w[:, None]).to(LOW), (key * into_s[:, None]).to(LOW)
            dw, ds = tl.load(dw_at).to(LOW), tl.load(dw_at + F * P).to(LOW)
            derror_gate += product(key_w, dw, WIDE)
            derror_gate += product(key_s, ds, WIDE)
            error = rows(error_in + now * P, c, live, e, P)
            left, right = product(error, tl.trans(dw), WIDE), product(error, tl.trans(ds), WIDE)
            if WIDTH == 2:
                dw, ds = tl.load(dw_at + E).to(LOW), tl.load(dw_at + F * P + E).to(LOW)
                derror_up += product(key_w, dw, WIDE)
                derror_up += product(key_s, ds, WIDE)
                error = rows(error_in + now * P + E, c, live, e, P)
                left += product(error, tl.trans(dw), WIDE)
                right += product(error, tl.trans(ds), WIDE)
            dwrite_w += tl.sum(key * left, 1)
            dwrite_s += tl.sum(key * right, 1)
            by_write = into_w[:, None] * left + into_s[:, None] * right
            tl.store(dkey + (g * C + c)[:, None] * F + r[None, :], by_write, mask=live[:, None])
        tl.store(dwrite + c, dwrite_w, mask=live)
        tl.store(dwrite + C + c, dwrite_s, mask=live)
        dalpha, dbeta, dtheta = tl.zeros([], WIDE), tl.zeros([], WIDE), tl.zeros([], WIDE)
        held_gate, held_up = tl.load(scale + slot * 3), tl.load(scale + slot * 3 + 1)
        if WIDTH == 0:
            tl.store(dby_initial + chunk * C * P + cp, derror_gate.to(LOW), mask=live[:, None])
            tl.store(dv + chunk * C * D + cp, -derror_gate.to(LOW), mask=live[:, None])
        else:
            tl.store(derror_in + now * P + cp, derror_gate, mask=live[:, None])
            if WIDTH == 2:
                tl.store(derror_in + now * P + E + cp, derror_up, mask=live[:, None])
            tl.debug_barrier()
            held_out = tl.load(scale + slot * 3 + 2)
            states = z_out + slot * 2 * E * D
            errors(
                dv + chunk * C * D, initial_out + g * E * D, states, dz_out + g * 2 * E * D, pre + now * P,
                hidden + now * E, dback + now * E, derror_in + now * P, derror_out + now * D,
                coef, last + now, written, held_out, C, zero, BLOCK_C, E, D, P, WIDTH, LOW, WIDE,
            )  # fmt: skip
            tl.debug_barrier()
            hidden_gradient(
                dv + chunk * C * D, initial_out + g * E * D, states, dz_out + g * 2 * E * D, error_out + now * D,
                hidden + now * E, dhidden + now * E, dwrite, coef, last + now, written, held_out,
                C, zero, BLOCK_C, E, D, LOW, WIDE,
            )  # fmt: skip
            tl.debug_barrier()
            dalpha, dbeta, dtheta = second_state(
                dv + chunk * C * D, dy + chunk * C * D, dinitial_out + g * E * D, states, dz_out + g * 2 * E * D,
                error_out + now * D, hidden + now * E, dback + now * E, hidden_q + now * E, read_coef + chunk * 2 * C,
                alpha, beta, theta, held_out, C, zero, BLOCK_C, E, D, LOW, WIDE,
            )  # fmt: skip
            tl.debug_barrier()
            activation(
                dby_initial + chunk * C * P, pre + now * P, back + now * E, derror_in + now * P, dhidden + now * E,
                C, zero, BLOCK_C, E, P, WIDTH, LOW, WIDE,
            )  # fmt: skip
        tl.debug_barrier()
        # the gradient of the state before it
        c, f = places(BLOCK_C, zero), places(BLOCK_F, zero)
        live = c < C
        by_w, by_s = pair(read_coef + chunk * 2 * C, c, C, C)
        for t in range(F // BLOCK_F):
            r = t * BLOCK_F + f
            at = r[:, None] * P + e[None, :]
            w_at, dw_at = z_in + slot * 2 * F * P + at, dz_in + g * 2 * F * P + at
            key = rows(phi + chunk * C * F, c, live, r, F)
            query = rows(phi_q + chunk * C * F, c, live, r, F).to(WIDE)
            query_w, query_s = (query * by_w[:, None]).to(LOW), (query * by_s[:, None]).to(LOW)
            dphi_at = c[:, None] * F + r[None, :]
            into_key = tl.load(dkey + g * C * F + dphi_at, mask=live[:, None], other=0.0)
            for half in tl.static_range(2 if WIDTH == 2 else 1):
                w, s = tl.load(w_at + half * E), tl.load(w_at + F * P + half * E)
                held_w = held_gate if half == 0 else held_up
                dw, ds = tl.load(dw_at + half * E), tl.load(dw_at + F * P + half * E)
                dalpha += held_w * tl.sum(dw * w)
                dbeta += tl.sum(dw * s)
                dtheta += tl.sum(ds * s)
                dpre = rows(dby_initial + chunk * C * P + half * E, c, live, e, P)
                dread = rows(dq_by_initial + chunk * C * P + half * E, c, live, e, P)
                into_key += product(dpre, tl.trans((held_w * w).to(LOW)), WIDE)
                ds = theta * ds + beta * dw
                ds += product(tl.trans(query_s), dread, WIDE)
                tl.store(dw_at + F * P + half * E, ds)
                dw = alpha * dw
                dw += product(tl.trans(key), dpre, WIDE)
                dw += product(tl.trans(query_w), dread, WIDE)
                tl.store(dw_at + half * E, dw)
            tl.store(dphi + chunk * C * F + dphi_at, into_key.to(LOW), mask=live[:, None])
        total = tl.load(last + now + c, mask=live, other=1.0)
        dwrite_w, dwrite_s = pair(dwrite, c, C, written)
        tl.store(dwrite + c, dwrite_w / total, mask=live)
        tl.store(dwrite + C + c, dwrite_s / total, mask=live)
        tl.store(ddecay + chunk * 4, dalpha, mask=writes)
        tl.store(ddecay + chunk * 4 + 1, dbeta, mask=writes)
        tl.store(ddecay + chunk * 4 + 3, dtheta, mask=writes)
        tl.debug_barrier()
