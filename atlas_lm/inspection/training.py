"""The inspector of `callbacks.generation_health`: our model as it trains writes from held-out prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from atlas_lm import __version__
from atlas_lm.inspection import atlas
from atlas_lm.inspection.capture import Plan
from atlas_lm.inspection.health import Thresholds, read_thresholds
from atlas_lm.inspection.report import build
from atlas_lm.inspection.subject import info_of

# Of the summary: what is worth a curve. Memories' are logged one by one.
LOGGED = (
    "mean_entropy_bits", "mean_margin", "mean_surprisal_bits", "repetition_tokens", "attention_entropy_bits",
    "collapsed_share", "mid_layer_ratio",
)  # fmt: skip
OF_MEMORY = ("weight_norm", "output_ratio", "write_strength", "residual_now")


class TrainingInspector:
    """Generates `tokens` tokens after the first `prompt_tokens` of each held-out row, always with the same draws.

    `thresholds`: a file that `python -m atlas_lm inspect calibrate` wrote; None: general ones. ValueError: a value out
    of its range, or no such file.
    """

    def __init__(
        self, prompt_tokens: int = 64, tokens: int = 64, temperature: float = 0.8, top_k: int = 50, seed: int = 0,
        capture: str = "sampled", thresholds: str | None = None,
    ) -> None:  # fmt: skip
        self.plan = Plan(tokens=tokens, temperature=temperature, top_k=top_k, seed=seed, capture=capture)
        if prompt_tokens < 1:
            raise ValueError(f"prompt_tokens={prompt_tokens} must be at least 1")
        self.prompt_tokens = prompt_tokens
        self.thresholds = Thresholds() if thresholds is None else read_thresholds(Path(thresholds))

    def inspect(self, module: Any, batch: Any) -> Sequence[tuple[Mapping[str, float], Sequence[str], str]]:
        """See `callbacks.generation_health.Inspector`. TypeError: the module has no model of ours."""
        model = getattr(module, "model", None)
        if not hasattr(model, "stream") or not isinstance(batch, dict) or "input_ids" not in batch:
            raise TypeError(f"{type(module).__name__} has no AtlasLM that reads input_ids: remove generation_health")
        return [self._one(model, row) for row in batch["input_ids"][:, : self.prompt_tokens].tolist()]

    def _one(self, model: Any, ids: list[int]) -> tuple[dict[str, float], list[str], str]:
        info = info_of(model, model.config.name)
        with torch.inference_mode():
            trace = atlas.inspect(model, ids, self.plan, _numbers)
        report = build(trace, info, self.plan, _numbers, "", self.thresholds, __version__)
        keys = [f"{label.replace(' ', '_')}_{name}" for label in info.memories for name in OF_MEMORY]
        figures = {
            name: value for name in (*LOGGED, *keys) if (value := report.summary.get(name)) is not None
        }  # fmt: skip
        flags = [f"{flag.name} ({flag.message})" if flag.message else flag.name for flag in report.flags if flag.fired]
        return figures, flags, report.model_dump_json()


def _numbers(ids: Sequence[int]) -> list[str]:
    """Token ids as text: the module knows no tokenizer."""
    return [f"<{i}>" for i in ids]
