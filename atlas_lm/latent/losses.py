"""What a next-vector predictor learns from: its main loss, the guards, and the cap that keeps these below it.

The seed's main loss is a mean over D dimensions: of unit vectors 2 (1 − cos) / D, so at D = 768 a guard "of 0.01" pulls
about four times as hard as all of it. What matters is the ratio of the gradients, and that is what the cap holds.
"""

# B batch, T positions, D dimensions, K offsets

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as nnf

from atlas_lm.latent.metrics import unit

GUARDS = ("future", "direction", "anticopy")
MEANS = ("mean", "sum")


def cosines_at(y_BTD: Tensor, frames_BND: Tensor, valid_BN: Tensor, offsets: Sequence[int], before: int) -> Tensor:
    """Cosine (K, B, T) of each prediction with the frame at each offset from its position; NaN where there is none.

    Position t of the predictions is frame `before` + t; offset +1 is the target, 0 the last frame seen.
    """
    found = []
    for k in offsets:
        at = torch.arange(y_BTD.size(1), device=y_BTD.device) + before + k
        inside = (at >= 0) & (at < frames_BND.size(1))
        at = at.clamp(0, frames_BND.size(1) - 1)
        cosine = (y_BTD.float() * frames_BND[:, at].float()).sum(-1)
        found.append(cosine.masked_fill(~(valid_BN[:, at] & inside), torch.nan))
    return torch.stack(found)


def main_loss(cosine: Tensor, dim: int, mean: str) -> Tensor:
    """The squared error of unit vectors, 2 (1 − cos): summed over dimensions, or their mean as the seed has it."""
    error = 2 * (1 - cosine).mean()
    return error / dim if mean == "mean" else error


def hinge(cosine: Tensor, other: Tensor, margin: float) -> Tensor:
    """mean ReLU(margin − (cos(ŷ, target) − cos(ŷ, other))) over what there is; 0 where there is nothing."""
    short = nnf.relu(margin - (cosine - other))
    there = ~other.isnan()
    return torch.where(there, short, 0.0).sum() / there.sum().clamp_min(1)


def guard_losses(of: dict[int, Tensor], margins: dict[str, float], context: int) -> dict[str, Tensor]:
    """The three guards by name, from the cosines at each offset, (N,) each.

    future: the target before the two frames after it; direction: before the last frame seen; anticopy: before each
    frame of the context. The terms of a guard are added, or averaged over the context, as the seed has them.
    """
    target = of[1]
    return {
        "future": hinge(target, of[2], margins["future"]) + hinge(target, of[3], margins["future"]),
        "direction": hinge(target, of[0], margins["direction"]),
        "anticopy": torch.stack([hinge(target, of[-i], margins["anticopy"]) for i in range(context)]).mean(),
    }


def contrast_loss(
    y_BTD: Tensor, frames_BND: Tensor, valid_BN: Tensor, scored_BT: Tensor, before: int, context: int,
    temperature: float, centre_D: Tensor,
) -> Tensor:  # fmt: skip
    """InfoNCE: which of the batch's frames is the target? In directions from the centre of all frames.

    Candidates are the targets of the whole batch and every frame of the prediction's own run, the frames of its own
    context excepted: those of the same text are the hard ones.
    """
    rows, columns = scored_BT.nonzero(as_tuple=True)
    y_PD = unit(y_BTD[rows, columns].float() - centre_D)
    frames = unit(frames_BND.float() - centre_D)
    target_PD = frames[rows, columns + before + 1]
    across_PP = y_PD @ target_PD.T
    # a target of the same run is among the frames of the run already: its own stays, the others do not count twice
    same_run = rows[:, None] == rows[None, :]
    same_run.fill_diagonal_(False)
    across_PP = across_PP.masked_fill(same_run, -torch.inf)
    within_PN = torch.einsum("pd,pnd->pn", y_PD, frames[rows])
    place = torch.arange(frames.size(1), device=rows.device)
    last = (columns + before)[:, None]
    own = (place > last - context) & (place <= last + 1)
    within_PN = within_PN.masked_fill(own | ~valid_BN[rows], -torch.inf)
    logits = torch.cat([across_PP, within_PN], dim=1) / temperature
    return nnf.cross_entropy(logits, torch.arange(len(rows), device=rows.device))


def gradient_norms(losses: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    """The 2-norm of each loss's gradient over all parameters; the graph stays."""
    found = []
    for loss in losses:
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        found.append(torch.linalg.vector_norm(torch.stack([g.float().norm() for g in gradients if g is not None])))
    return found


def capped_scale(main_norm: Tensor, guard_norm: Tensor, cap: float | None) -> Tensor:
    """What the guards are multiplied by, so that their gradient is at most `cap` times the main one; None: 1."""
    if cap is None:
        return torch.ones_like(main_norm)
    return (cap * main_norm / guard_norm.clamp_min(torch.finfo(guard_norm.dtype).tiny)).clamp(max=1.0)
