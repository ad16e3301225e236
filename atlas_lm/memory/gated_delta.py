"""The gated delta rule, chunk by chunk (arXiv 2412.06464): `update: delta`, and the baseline `memory: gated_delta`.

    S̃_t = α_t S_{t−1},   S_t = S̃_t + k_t u_tᵀ,   u_t = β_t (v_t − S̃_tᵀ k_t),   y_t = S_tᵀ q_t

Inside a chunk, with Γ_ij = Π α_{j+1..i} and G_i = Π α_{1..i}, the u solve one unit lower-triangular system:

    (I + tril(diag(β) Γ ⊙ K Kᵀ, −1)) U = diag(β) (V − diag(G) K S_ξ)

so that a chunk of any length stores what chunks of one token store. `reference.gated_delta` is the same one token at
a time.
"""

# B batch, H heads, T tokens, D key dim, E value dim, C chunk, K chunks

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as nnf

from atlas_lm.memory.coefficients import DecayProducts
from atlas_lm.memory.kernels import delta as kernel
from atlas_lm.memory.state import without_autocast

CHUNK = 64  # tokens; whatever it is, the outputs are the same


def scan(
    q_BGTD: Tensor,
    k_BGTD: Tensor,
    v_BHTE: Tensor,
    alpha_BHT: Tensor,
    beta_BHT: Tensor,
    state_BHDE: Tensor,
    chunk: int = CHUNK,
    initial_HDE: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Learn every token, then answer its query: outputs (B, H, T, E) and the state after the last token.

    Keys have unit norm; G is 1, keys shared by all heads, or H. An α of 0 restarts the state. With `initial_HDE` the
    weights are that plus the state, which alone is forgotten. Under autocast products take their operands in that
    precision; sums, the triangular system and the state are kept in at least float32.
    """
    wide = torch.promote_types(v_BHTE.dtype, torch.float32)
    device = v_BHTE.device.type
    low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else wide
    if kernel.can_run(v_BHTE, low):
        with without_autocast(v_BHTE):
            shape = (*v_BHTE.shape[:3], q_BGTD.size(-1))
            q, k, v = q_BGTD.to(low).expand(shape), k_BGTD.to(low).expand(shape), v_BHTE.to(low)
            alpha, beta, state = alpha_BHT.to(wide), beta_BHT.to(wide), state_BHDE.to(wide)
            initial = None if initial_HDE is None else initial_HDE.to(wide)
            return kernel.scan(q, k, v, alpha, beta, state, initial, chunk)
    if initial_HDE is not None:
        w0 = initial_HDE.to(low)
        v_BHTE = v_BHTE - (k_BGTD.to(low) @ w0).to(v_BHTE.dtype)
        y, after = scan(q_BGTD, k_BGTD, v_BHTE, alpha_BHT, beta_BHT, state_BHDE, chunk)
        return y + (q_BGTD.to(low) @ w0).to(y.dtype), after
    T = v_BHTE.size(2)
    C = min(chunk, T)
    missing = -T % C

    def cut(x: Tensor, after: float = 0.0) -> Tensor:
        """(B, H, T, …) → (B, H, K, C, …)."""
        x = nnf.pad(x, (0, 0, 0, missing) if x.dim() == 4 else (0, missing), value=after) if missing else x
        return x.unflatten(2, (-1, C)).to(wide)

    with without_autocast(v_BHTE):
        q, k, v, beta = (cut(x) for x in (q_BGTD, k_BGTD, v_BHTE, beta_BHT))  # what is missing writes nothing
        alpha = cut(alpha_BHT, after=1.0)  # and forgets nothing
        gamma = DecayProducts.apply(alpha)
        carry = gamma[..., 0] * alpha[..., :1]  # G
        A = (beta.unsqueeze(-1) * gamma * (k @ k.mT)).tril(-1)
        right = torch.cat([beta.unsqueeze(-1) * v, (beta * carry).unsqueeze(-1) * k], dim=-1)
        solved = torch.linalg.solve_triangular(A, right, upper=False, unitriangular=True)
        u, w = solved.split([v.size(-1), k.size(-1)], dim=-1)
        q_carry, within = carry.unsqueeze(-1) * q, gamma * (q @ k.mT)
        k_to_end = (gamma[..., -1, :].unsqueeze(-1) * k).mT
        S, outputs = state_BHDE.to(wide), []
        end = carry[..., -1, None, None]
        parts = (x.unbind(2) for x in (u, w.to(low), q_carry.to(low), within.to(low), k_to_end.to(low), end))
        for u_n, w_n, q_n, within_n, k_n, end_n in zip(*parts, strict=True):
            known = S.to(low)
            written = u_n - w_n @ known
            outputs.append(q_n @ known + within_n @ written.to(low))
            S = torch.addcmul((k_n @ written.to(low)).to(wide), end_n, S)
    return torch.stack(outputs, dim=2).to(wide).flatten(2, 3)[:, :, :T], S
