"""What is measured of a model that reads and writes: pure functions of tensors, vectorised, without a loop over tokens.

Every function takes leading axes as they come, computes in at least float32 and returns tensors on the same device.
Entropies and surprisals are in bits. Sources: Shannon 1948 for entropy and surprisal; Holtzman et al. 2020 for top-k
mass; the basin is that of CoreVital 0.4, here divided by its causal null, as uniform attention already scores 0.31.
"""

# B batch (any leading axes), V vocabulary, H heads, Q queries, K keys, T tokens, L layers, M model width, W rows and
# columns of fast weights

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as nnf

BITS = 1 / math.log(2)  # bits in a nat
COLLAPSED = 0.03  # normalised entropy of a head below which it sees one key
FOCUSED = 0.9  # largest weight of a head above which it sees little but one key
SPARSE = 0.01  # weight above which a key counts as seen
SATURATED = 0.02  # distance from 0 or 1 below which a gate is saturated


def wide(x: Tensor) -> Tensor:
    """In at least float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


class LogitMetrics(NamedTuple):
    """Of the distribution of the next token, (…,) each."""

    entropy_bits: Tensor
    perplexity: Tensor  # 2^entropy: among so many tokens of equal probability it would choose
    margin: Tensor  # p₁ − p₂
    top_k_mass: Tensor
    top_k_probabilities: Tensor  # (…, k), largest first
    top_k_tokens: Tensor  # (…, k)
    surprisal_bits: Tensor  # of the tokens that are given, else of the likeliest


def logit_metrics(logits_BV: Tensor, k: int = 10, tokens_B: Tensor | None = None) -> LogitMetrics:
    """(…, V) raw logits, before temperature, top-k or top-p, and the tokens (…) that were chosen. Over the full
    vocabulary.

    A logit of −∞ is a token of probability 0; NaN or +∞ makes every figure of its row NaN.
    """
    logits = wide(logits_BV)
    most = logits.amax(-1, keepdim=True)
    less = (logits - most).clamp_(min=-1e4)  # e^−10000 is 0 in every precision, and 0 · −∞ would be NaN
    weights = less.exp()
    total = weights.sum(-1)
    log_total = total.log()
    entropy = (log_total - torch.linalg.vecdot(weights, less) / total) * BITS
    largest, tokens = _largest(logits, min(k, logits.size(-1)))
    top = (largest - most).exp() / total.unsqueeze(-1)
    margin = top[..., 0] - top[..., 1] if top.size(-1) > 1 else top[..., 0]
    chosen = tokens[..., 0] if tokens_B is None else tokens_B
    logit = logits.gather(-1, chosen.unsqueeze(-1))
    bits = (log_total - (logit - most).squeeze(-1)) * BITS
    return LogitMetrics(entropy, torch.exp2(entropy), margin, top.sum(-1), top, tokens, bits)


def _largest(x: Tensor, k: int, width: int = 256) -> tuple[Tensor, Tensor]:
    """`topk` over the last axis. Of a large one first the parts with the k largest maxima, which hold all of them: a
    fifth of the time."""
    n = x.size(-1)
    if n < 16 * width or k > 16:
        return x.topk(k, dim=-1)
    parts = nnf.pad(x, (0, -n % width), value=-torch.inf).unflatten(-1, (-1, width))
    best = parts.amax(-1).topk(k, dim=-1).indices
    candidates = parts.gather(-2, best.unsqueeze(-1).expand(*best.shape, width)).flatten(-2)
    values, places = candidates.topk(k, dim=-1)
    tokens = best.gather(-1, places // width) * width + places % width
    return values, tokens.clamp_max(n - 1)  # of an impossible token the name means nothing, but there must be one


def surprisal_bits(logits_BV: Tensor, tokens_B: Tensor) -> Tensor:
    """−log₂ p of the tokens (…) under raw logits (…, V)."""
    logp_BV = wide(logits_BV).log_softmax(-1)
    return -logp_BV.gather(-1, tokens_B.unsqueeze(-1)).squeeze(-1) * BITS


class HeadMetrics(NamedTuple):
    """Of each head's attention, averaged over nothing: (…, H, Q) each."""

    entropy_bits: Tensor
    relative_entropy: Tensor  # entropy ÷ log₂ of the keys that may be seen, in [0, 1]; 1 where that is one key
    concentration: Tensor  # the largest weight


def head_metrics(weights_HQK: Tensor, keys_Q: Tensor) -> HeadMetrics:
    """(…, H, Q, K) weights whose rows sum to 1; `keys_Q` (Q,) or broadcastable: how many keys each query may see.

    Weights of keys that may not be seen are 0.
    """
    weights = wide(weights_HQK)
    entropy = torch.special.entr(weights).sum(-1) * BITS
    most = keys_Q.to(entropy.dtype).log2()
    relative = torch.where(most > 0, entropy / most.clamp_min(torch.finfo(entropy.dtype).tiny), 1.0)
    return HeadMetrics(entropy, relative, weights.amax(-1))


class AttentionSummary(NamedTuple):
    """Over the heads of a layer, (…, Q) each."""

    entropy_mean: Tensor  # bits
    entropy_min: Tensor
    entropy_max: Tensor
    concentration_mean: Tensor
    concentration_max: Tensor
    collapsed: Tensor  # heads whose relative entropy is below 0.03
    focused: Tensor  # heads whose largest weight is above 0.9


def over_heads(of: HeadMetrics) -> AttentionSummary:
    """(…, H, Q) → (…, Q)."""
    least, most = of.entropy_bits.aminmax(dim=-2)
    return AttentionSummary(
        of.entropy_bits.mean(-2), least, most, of.concentration.mean(-2), of.concentration.amax(-2),
        (of.relative_entropy < COLLAPSED).sum(-2), (of.concentration > FOCUSED).sum(-2),
    )  # fmt: skip


def seen_keys(weights_HQK: Tensor, threshold: float = SPARSE) -> Tensor:
    """Sparse attention: keys with a weight above `threshold`, per head the mean over queries, (…, H)."""
    return (wide(weights_HQK) > threshold).sum(-1).to(torch.float32).mean(-1)


def basin(mass_HK: Tensor) -> Tensor:
    """The mass of the middle third of keys ÷ that of the others, (…, H), from each key's mass summed over queries.

    NaN where nothing lies outside the middle. 1 under three keys.
    """
    K = mass_HK.size(-1)
    if K < 3:
        return torch.ones_like(mass_HK[..., 0])
    first, last = K // 3, K - K // 3
    middle = mass_HK[..., first:last].sum(-1)
    return middle / (mass_HK.sum(-1) - middle)


def uniform_mass(tokens: int, window: int | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
    """The mass (K,) that each key has when every query weighs all keys it may see alike: the causal null."""
    keys = torch.arange(1, tokens + 1, dtype=dtype)
    seen = keys if window is None else keys.clamp_max(window)
    share = 1 / seen
    # key j is seen by the queries j … j + window − 1
    total = torch.cat([share.new_zeros(1), share.cumsum(0)])
    end = torch.arange(1, tokens + 1) + (tokens if window is None else window) - 1
    return total[end.clamp_max(tokens)] - total[:-1]


def relative_basin(mass_HK: Tensor, window: int | None = None) -> Tensor:
    """The basin relative to its causal null: 1 for uniform attention, and under three tokens; below, the middle of a
    text is neglected. (…, H)."""
    if mass_HK.size(-1) < 3:
        return torch.ones_like(wide(mass_HK)[..., 0])
    null = basin(uniform_mass(mass_HK.size(-1), window))
    return basin(wide(mass_HK)) / null.to(mass_HK.device, wide(mass_HK).dtype)


class HiddenMetrics(NamedTuple):
    """Of hidden states, (…,) each."""

    norm: Tensor  # L2
    nonfinite: Tensor  # entries that are NaN or infinite


def hidden_metrics(hidden_BM: Tensor) -> HiddenMetrics:
    """(…, M) → (…). The norm is in at least float32, so that half precision does not overflow in the squares."""
    return HiddenMetrics(torch.linalg.vector_norm(wide(hidden_BM), dim=-1), (~hidden_BM.isfinite()).sum(-1))


def transformation(below_TM: Tensor, above_TM: Tensor) -> Tensor:
    """1 − cosine between the hidden states of two consecutive layers, the mean over tokens: (…, T, M) → (…)."""
    return 1 - nnf.cosine_similarity(wide(below_TM), wide(above_TM), dim=-1).mean(-1)


# ---------------------------------------------------------------------------------------------------------------------
# Memory health


def weight_norm(change: tuple[Tensor, ...]) -> Tensor:
    """‖W − W_init‖ over all matrices of a memory (…, rows, columns) each: (…)."""
    return torch.stack([torch.linalg.matrix_norm(wide(x)) for x in change]).square().sum(0).sqrt()


def relative_change(before: tuple[Tensor, ...], after: tuple[Tensor, ...], initial: tuple[Tensor, ...]) -> Tensor:
    """‖ΔW‖ ÷ ‖W‖ between two states, W = W_init + change, over all matrices of a memory: (…)."""
    moved = weight_norm(tuple(b - a for a, b in zip(before, after, strict=True)))
    return moved / weight_norm(tuple(w + b for w, b in zip(initial, after, strict=True))).clamp_min(1e-30)


def half_life(alpha: Tensor) -> Tensor:
    """Tokens after which half of what a memory holds is left, of its mean log α: (…, T) → (…). ∞ where α is 1."""
    return math.log(2) / wide(alpha).log().mean(-1).abs()


def saturation(gate: Tensor, margin: float = SATURATED) -> Tensor:
    """The share of gates within `margin` of 0 or 1, over the last axis: (…, N) → (…)."""
    return ((wide(gate) < margin) | (wide(gate) > 1 - margin)).to(torch.float32).mean(-1)


def residual(answer_BD: Tensor, value_BD: Tensor) -> Tensor:
    """‖M(k) − v‖ ÷ ‖v‖ of what a memory answers to a key, (…): 0 it holds the value, 1 as good as an empty one."""
    error = torch.linalg.vector_norm(wide(answer_BD) - wide(value_BD), dim=-1)
    return error / torch.linalg.vector_norm(wide(value_BD), dim=-1).clamp_min(1e-30)


def output_ratio(memory_TM: Tensor, attention_TM: Tensor) -> Tensor:
    """‖memory's output‖ ÷ ‖attention's output‖, roots of mean squares over the last two axes: (…)."""
    ratio = torch.linalg.matrix_norm(wide(memory_TM)) / torch.linalg.matrix_norm(wide(attention_TM)).clamp_min(1e-30)
    return ratio


def effective_rank(matrix: Tensor) -> Tensor:
    """exp of the entropy of normalised singular values (Roy and Vetterli 2007): (…, rows, columns) → (…).

    Between 1 and the smaller side; 0 for a matrix of zeros. NaN for one that is not finite.
    """
    finite = matrix.isfinite().all(-1).all(-1)
    narrow = matrix.double().nan_to_num(0.0, 0.0, 0.0)
    narrow = narrow if narrow.size(-1) <= narrow.size(-2) else narrow.mT
    # of the product with itself: the smaller side alone counts, and a memory's is a tenth of the larger
    values = torch.linalg.eigvalsh(narrow.mT @ narrow).clamp_min(0).sqrt()
    total = values.sum(-1, keepdim=True)
    entropy = torch.special.entr(values / total.clamp_min(1e-300)).sum(-1)
    rank = torch.where(total.squeeze(-1) > 0, entropy.exp(), 0.0)
    return torch.where(finite, rank, torch.nan).to(wide(matrix).dtype)
