"""Newton–Schulz orthogonalisation, the U of the ATLAS update (M6; ATLAS eq 32; Muon)."""

# B batch (any leading axes), M rows, N columns

from __future__ import annotations

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Muon's: steep at 0, singular values end within about [0.7, 1.2]
STEPS = 5
_EPSILON = 1e-14  # added to ‖X‖²: a zero matrix stays zero, and its gradient finite


def newton_schulz(x_BMN: Tensor, steps: int = STEPS) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: X ← aX + b(XXᵀ)X + c(XXᵀ)²X after Frobenius normalisation.

    (B, M, N) → (B, M, N); all matrices of the batch at once. The iteration runs on the short side.
    """
    a, b, c = COEFFICIENTS
    tall = x_BMN.size(-2) > x_BMN.size(-1)
    x = x_BMN.mT if tall else x_BMN
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # 1e-14 is 0 in float16
    x = (wide * (wide.square().sum(dim=(-2, -1), keepdim=True) + _EPSILON).rsqrt()).to(x.dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
