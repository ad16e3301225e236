"""Gates that are measured now on the newest checkpoint: G2-3, G2-5 and G4-6, G4-4, G4-5."""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor
from torch.nn import functional as nnf

from atlas_lm.exit_gates.artifacts import RunArtifacts
from atlas_lm.exit_gates.result import GateResult
from atlas_lm.files import ROOT
from atlas_lm.memory.projection import ProjectionState, persistent_state, project
from atlas_lm.training.module import UNSCORED

ACCURACY, CONTROL, HAYSTACK = 0.8, 0.3, 100  # C1
NEEDLES = 16  # trials per layer, memory and head
SIZES, SPREAD = (1, 4, 8, 16, 32, 64), 0.10
LOW, HIGH, POLARISED = 0.1, 0.9, 0.20
STREAM = 100  # tokens before the reset
DEFAULT_PROBE = ROOT / "conf" / "callbacks" / "memory_horizon.yaml"


@torch.no_grad()
def reset_of(keys_HPD: Tensor) -> tuple[ProjectionState, ProjectionState]:
    """Projection states of one layer: after a stream of random keys, and after a reset after it.

    The key at the reset is zero, so that it adds nothing: what is left is what the reset has put there.
    """
    H, _, D = keys_HPD.shape
    generator = torch.Generator().manual_seed(0)
    k = nnf.normalize(torch.randn(1, H, STREAM, D, generator=generator), dim=-1).to(keys_HPD)
    persistent = persistent_state(keys_HPD, 1)
    _, streamed = project(k, k, persistent, persistent)
    zero, restart = torch.zeros_like(k[:, :, :1]), torch.ones(1, H, 1, dtype=torch.bool, device=k.device)
    _, reset = project(zero, zero, streamed, persistent, restart)
    return streamed, reset


def judge_reset(keys_HPD: Tensor, streamed: ProjectionState, reset: ProjectionState) -> str | None:
    """What is wrong with the reset of one layer; None if nothing is. Comparisons are bitwise, NaN equals nothing."""
    if not keys_HPD.numel():
        return "there are no persistent keys"
    M_HDD, n_H = keys_HPD.mT @ keys_HPD, keys_HPD.square().sum(dim=(-2, -1))
    if not bool((n_H > 0).all() and n_H.isfinite().all()):
        return f"norm_persistent is {n_H.tolist()}"
    if not torch.equal(reset.n[0], n_H):
        return f"n is {reset.n[0].tolist()} after a reset, norm_persistent {n_H.tolist()}"
    if not torch.equal(reset.M[0], M_HDD):
        return "M is not m_persistent after a reset"
    if bool((streamed.n[0] == n_H).any()) or torch.equal(streamed.M[0], M_HDD):
        return "the stream before the reset moved nothing: the check could not fail"
    return None


def norm_in_projection(run: RunArtifacts) -> GateResult:
    """G2-3."""
    layers = run.module.persistent_memory()
    for i, keys in enumerate(layers):
        streamed, reset = reset_of(keys)
        wrong = judge_reset(keys, streamed, reset)
        if wrong:
            return GateResult(False, None, f"layer {i}: {wrong}")
    before, after = float(streamed.n.mean()), float(reset.n.mean())
    return GateResult(bool(layers), after, f"n == norm_persistent in {len(layers)} layers, {before:.1f} → {after:.1f}")


def judge_needles(found: Tensor, control: Tensor, values: Tensor, haystack: int) -> GateResult:
    """G2-5, G4-6: answers (layers, memories, heads, N, dim) with and without the needle; its values lack `memories`."""
    if not found.numel():
        return GateResult(False, None, "no needle was asked for")
    cosine, empty = (nnf.cosine_similarity(y.double(), values.double()[:, None], dim=-1) for y in (found, control))
    layers = [float(layer.mean()) for layer in cosine]
    accuracy, without = float(cosine.mean()), float(empty.mean())
    passed = accuracy > ACCURACY and abs(without) <= CONTROL and haystack >= HAYSTACK  # False with NaN
    wrong = "" if haystack >= HAYSTACK else f": a haystack of {haystack} is too easy, C1 asks for {HAYSTACK}"
    per_layer = ", ".join(f"{layer:.3f}" for layer in layers)
    sign = ">" if accuracy > ACCURACY else "is not above"
    detail = f"{accuracy:.1%} {sign} {ACCURACY:.0%}, gates open; layers {per_layer}; not written {without:+.3f}{wrong}"
    return GateResult(passed, accuracy, detail)


@torch.no_grad()
def needles(run: RunArtifacts) -> GateResult:
    """G2-5, G4-6: the run's own probe, its needle under the whole haystack."""
    # trials enough, whatever the run's probe could afford
    probe, module = run.build("callbacks.niah_probe", needles=NEEDLES, seed=0), run.module
    keys, values = (x.to(run.device) for x in probe.pairs(*module.memory_shape()))
    query, wanted = keys[..., 0, :], values[..., 0, :]
    found = module.write_and_read(keys, values, query)
    control = module.write_and_read(keys[..., 1:, :], values[..., 1:, :], query)
    return judge_needles(found, control, wanted, int(probe.haystack))


def perplexity(module: Any, batches: list[dict[str, Tensor]]) -> float:
    """Of all scored tokens of these batches; NaN where nothing is scored."""
    nats, tokens = 0.0, 0
    for batch in batches:
        scored = int((batch["targets"] != UNSCORED).sum())
        if scored:
            nats, tokens = nats + scored * float(module.held_out_loss(batch)), tokens + scored
    mean = nats / tokens if tokens else math.nan
    return math.exp(mean) if mean < 700 else mean * math.inf  # NaN stays NaN


def judge_flatness(curve: dict[int, float]) -> GateResult:
    """G4-4: population standard deviation over mean of the perplexities by chunk size."""
    shown = ", ".join(f"{size}: {value:.4g}" for size, value in curve.items())
    if set(curve) != set(SIZES) or not all(math.isfinite(value) and value > 0 for value in curve.values()):
        return GateResult(False, None, f"not a finite perplexity at each size ({shown})")
    if len(set(curve.values())) == 1:
        return GateResult(False, 0.0, f"the chunk size changes nothing, not even in the last digit ({shown})")
    spread = statistics.pstdev(curve.values()) / statistics.fmean(curve.values())
    sign = "<" if spread < SPREAD else "is not below"
    return GateResult(spread < SPREAD, spread, f"{spread:.2%} {sign} {SPREAD:.0%}; perplexity {shown}")


@torch.no_grad()
def resolution(run: RunArtifacts) -> GateResult:
    """G4-4."""
    module = run.module
    memories = len(module.local_chunks)
    if not memories:
        raise ValueError("the model has no local memory")
    curve = {}
    try:
        for size in SIZES:
            module.set_local_chunks((min(size, run.model_config.shard),) * memories)  # a longer one ends with the shard
            curve[size] = perplexity(module, run.batches)
    finally:
        module.set_local_chunks(run.final_chunks)
    return judge_flatness(curve)


def judge_use(gain: float, low: float, high: float, horizon: float) -> GateResult:
    """`used`, from the context gain in nats per token and its interval. False with NaN."""
    found = f"context gain {gain:+.4f} nats per token ({low:+.4f} to {high:+.4f})"
    passed = low > 0
    detail = f"{found}, 95 % of it within {horizon:.0f} tokens" if passed else f"{found}: the memory's past is not used"
    return GateResult(passed, gain, detail)


@torch.no_grad()
def used(run: RunArtifacts) -> GateResult:
    """`used`: the run's own probe, on more text; or the probe of the defaults, where the run had none."""
    name = "callbacks.memory_horizon"
    probe = run.build(name) if run.has(name) else instantiate(OmegaConf.load(DEFAULT_PROBE).memory_horizon)
    parts = [probe.losses(run.module, batch) for batch in run.batches]
    _, restarts, reach = parts[0]
    return judge_use(*probe.estimate(torch.cat([losses.cpu() for losses, _, _ in parts], dim=1), restarts, reach))


def judge_polarisation(polarised: int, nonfinite: int, total: int) -> GateResult:
    """G4-5, from counts of gates."""
    if nonfinite or not total:
        return GateResult(False, None, f"{total} gates, {nonfinite} of them not finite")
    share = polarised / total
    sign = ">=" if share >= POLARISED else "is below"
    return GateResult(share >= POLARISED, share, f"{share:.1%} {sign} {POLARISED:.0%} of {total:,} gates")


@torch.no_grad()
def polarisation(run: RunArtifacts) -> GateResult:
    """G4-5: at the final chunk sizes."""
    polarised = nonfinite = total = 0
    for batch in run.batches:
        for gate in run.module(batch).gates:
            polarised += int(((gate < LOW) | (gate > HIGH)).sum())
            nonfinite += int((~gate.isfinite()).sum())
            total += gate.numel()
    return judge_polarisation(polarised, nonfinite, total)
