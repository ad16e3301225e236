"""The gated delta rule, chunk by chunk: the memory of a gated delta net (arXiv 2412.06464), a baseline.

    S̃_t = α_t S_{t−1},   S_t = S̃_t + k_t u_tᵀ,   u_t = β_t (v_t − S̃_tᵀ k_t),   y_t = S_tᵀ q_t

Inside a chunk, with G_t the product of its α up to t, the u solve one unit lower-triangular system:

    (I + tril(diag(β) Γ ⊙ K Kᵀ, −1)) U = diag(β) (V − diag(G) K S_ξ),   Γ_ij = G_i / G_j

so that a chunk of any length stores what chunks of one token store. `reference.gated_delta` is the same one token at
a time.
"""

# B batch, H heads, T tokens, D key dim, E value dim, C chunk, K chunks

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as nnf

from atlas_lm.memory.state import without_autocast

CHUNK = 64  # tokens; whatever it is, the outputs are the same


def scan(
    q_BGTD: Tensor,
    k_BGTD: Tensor,
    v_BHTE: Tensor,
    log_alpha_BHT: Tensor,
    beta_BHT: Tensor,
    state_BHDE: Tensor,
    restart_BT: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Learn every token, then answer its query: outputs (B, H, T, E) and the state after the last token.

    Keys have unit norm; G is 1, keys shared by all heads, or H. `restart_BT` (bool): there the state restarts from
    zero. Under autocast the products with the state take its operands in that precision; all else, and the state, is
    kept in at least float32.
    """
    wide = torch.promote_types(v_BHTE.dtype, torch.float32)
    device = v_BHTE.device.type
    low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else wide
    T = v_BHTE.size(2)
    C = min(chunk, T)
    missing = -T % C

    def cut(x: Tensor) -> Tensor:
        """(B, H, T, …) → (B, H, K, C, …): zeros after the end forget and write nothing."""
        x = nnf.pad(x, (0, 0, 0, missing) if x.dim() == 4 else (0, missing))
        return x.unflatten(2, (-1, C)).to(wide)

    with without_autocast(v_BHTE):
        q, k, v, log_alpha, beta = (cut(x) for x in (q_BGTD, k_BGTD, v_BHTE, log_alpha_BHT, beta_BHT))
        ones = torch.ones(C, C, dtype=wide, device=v.device)
        keep = ones.tril().bool()
        if restart_BT is not None:
            start_B1KC = nnf.pad(restart_BT, (0, missing)).unflatten(1, (-1, C)).unsqueeze(1)
            segment = start_B1KC.cumsum(-1)
            keep = keep & (segment.unsqueeze(-1) == segment.unsqueeze(-2))
            log_alpha = log_alpha.masked_fill(start_B1KC, 0.0)  # of what is dropped
        total = log_alpha @ ones.triu()  # log G; no cumsum, whose order varies on a GPU
        gamma = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(~keep, -torch.inf).exp()
        carry = total.exp() if restart_BT is None else total.exp() * (segment == 0)
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
