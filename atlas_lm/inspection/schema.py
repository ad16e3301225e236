"""The report of one generation: numbers, names and text, never a tensor. Files of every earlier version still load.

Columns are lists over steps, so that a report of 2,000 steps stays small and is read as a table. What is not finite is
null: NaN is not JSON, and the flag `nonfinite` says where it was.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from atlas_lm.files import write_atomically

VERSION = 1


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_finite)]
Column = list[Number]
Table = list[Column]


class _Part(BaseModel):
    # strict: a tensor counts as a list of numbers otherwise
    model_config = ConfigDict(extra="forbid", strict=True)


class ModelInfo(_Part):
    """What was inspected."""

    kind: Literal["atlas_lm", "causal", "seq2seq"]
    name: str
    parameters: int
    layers: int
    heads: int
    vocabulary: int
    memories: list[str] = []  # as "layer 1 global"; empty without a memory


class Settings(_Part):
    """How it was inspected."""

    capture: Literal["full", "sampled", "off"]
    layers: list[int]  # that were captured, counted from 0
    every: int  # steps from one that was captured to the next
    tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int


class LayerColumns(_Part):
    """Attention and hidden states of the captured layers. Rows: the steps in `steps`; columns: the layers."""

    steps: list[int] = []
    entropy_mean: Table = []  # bits, over heads
    entropy_min: Table = []
    entropy_max: Table = []
    concentration_mean: Table = []  # largest weight of a head
    concentration_max: Table = []
    collapsed: Table = []  # heads
    focused: Table = []  # heads
    norm: Table = []  # L2 of the hidden state
    nonfinite: Table = []  # entries
    head_entropy: Table = []  # (layers, heads): bits, the mean over steps
    head_concentration: Table = []


class Prompt(_Part):
    """What the model made of the prompt in the pass that generation makes anyway."""

    text: str
    tokens: list[str]
    surprisal_bits: Column = []  # of every token but the first; empty where an encoder read it
    entropy_mean: Column = []  # per layer, bits, over heads and tokens
    concentration_mean: Column = []
    seen_keys: Table = []  # (layers, heads): keys with a weight above 0.01, the mean over tokens
    basin: Table = []  # (layers, heads): relative to the causal null, 1 under three tokens
    transformation: Column = []  # 1 − cosine, from each captured layer to the next
    norm: Column = []  # per layer: L2 of hidden states, the mean over tokens
    nonfinite: Column = []


class Steps(_Part):
    """A column for each figure of the generated tokens, of raw logits."""

    token_ids: list[int] = []
    tokens: list[str] = []
    entropy_bits: Column = []
    surprisal_bits: Column = []
    perplexity: Column = []  # 2^entropy
    margin: Column = []  # p₁ − p₂
    top_k_mass: Column = []  # of the ten likeliest
    top_tokens: list[list[str]] = []  # the likeliest first
    top_probabilities: Table = []  # none where the step's logits were not captured
    repetition_period: list[int] = []  # 0: none
    repetition_tokens: list[int] = []  # that repeat with it
    repetition_cosine: Column = []  # of last hidden states at that lag
    latency_seconds: Column = []  # the whole step
    forward_seconds: Column = []
    capture_seconds: Column = []

    def has_logits(self, step: int) -> bool:
        """Whether the logits of a step were captured: where they were, a figure that is None was not finite."""
        return bool(self.top_probabilities[step])


class MemoryColumns(_Part):
    """Health of fast weights. Rows: the steps in `steps`; columns: the memories in `labels`."""

    labels: list[str] = []
    chunks: list[int] = []  # tokens from one write of each memory to its next
    steps: list[int] = []
    weight_norm: Table = []  # ‖W − W_init‖
    relative_change: Table = []  # ‖ΔW‖ ÷ ‖W‖ since the row before, per token
    write_strength: Table = []  # η, the mean over heads and tokens
    half_life: Table = []  # tokens
    saturated_gates: Table = []  # share of the block's fusion gates within 0.02 of 0 or 1
    output_ratio: Table = []  # ‖memory's output‖ ÷ ‖attention's output‖ of the block
    radius_share: Table = []  # largest root mean square of a matrix of W − W_init ÷ the bound on it
    effective_rank: Table = []  # of W − W_init
    lags: list[int] = []  # tokens; 0: the token written last
    residual: list[Table] = []  # per row, (memories, lags): ‖M(k) − v‖ ÷ ‖v‖


class Latency(_Part):
    """Seconds."""

    total: Number = None
    time_to_first_token: Number = None
    inter_token_mean: Number = None
    by_operation: dict[str, Number] = {}


class Baselines(_Part):
    """Cheap scores of one pass, to compare every other score with."""

    sequence_log2_probability: Number = None  # maximum sequence probability, as its logarithm; not of a sample
    perplexity: Number = None  # of the text that was written: 2^(mean surprisal), of the steps with logits
    mean_entropy_bits: Number = None
    max_entropy_bits: Number = None


class Flag(_Part):
    """A judgement."""

    name: str
    fired: bool
    value: Number
    threshold: Number
    steps: list[int] = []  # that it points to
    message: str = ""


class Report(_Part):
    """One generation."""

    schema_version: Literal[1] = 1
    id: str
    created: str  # ISO 8601, UTC
    version: str  # of atlas-lm
    model: ModelInfo
    settings: Settings
    prompt: Prompt
    text: str  # that was generated
    steps: Steps
    layers: LayerColumns
    cross: LayerColumns = Field(default_factory=LayerColumns)  # a decoder's attention to its encoder
    memory: MemoryColumns = Field(default_factory=MemoryColumns)
    latency: Latency
    summary: dict[str, Number]  # one number for each figure
    baselines: Baselines
    flags: list[Flag]
    thresholds: dict[str, Any] = {}  # that the flags were judged by
    warnings: list[str] = []

    @property
    def fired(self) -> list[str]:
        return [flag.name for flag in self.flags if flag.fired]


# version → what makes the content of the next version of it; tests/golden/reports keeps a file of each version
UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}


def parse(text: str | bytes, name: str = "the report") -> Report:
    """A report of any version so far. ValueError: it is none, it is cut off, or a newer version wrote it."""
    try:
        content = json.loads(text)
    except ValueError as error:  # json's own, and what is no UTF-8
        raise ValueError(f"{name} is cut off or no JSON ({str(error).splitlines()[0]}): write it again") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if isinstance(version, bool) or not isinstance(version, int):
        raise ValueError(f"{name} is no report of an inspection: it has no schema_version")
    if version > VERSION:
        raise ValueError(f"{name} has schema version {version}, this atlas-lm reads up to {VERSION}: upgrade atlas-lm")
    if version < 1:
        raise ValueError(f"{name} has schema version {version}: there is none before 1")
    for before in range(version, VERSION):
        content = UPGRADES[before](content)
    try:
        return Report.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{name} is damaged: {where}: {first['msg']}; write it again") from error


def read(path: str | Path) -> Report:
    """The report of a file. ValueError: see `parse`. OSError: it cannot be read."""
    return parse(Path(path).read_bytes(), str(path))


def write(report: Report, path: str | Path) -> None:
    """Whole or not at all. OSError: it cannot be written."""
    write_atomically(Path(path), report.model_dump_json() + "\n")
