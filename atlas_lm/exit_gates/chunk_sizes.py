"""G2-1: measure what candidate sets of local chunks cost, decide, and find the decision again."""

from __future__ import annotations

import datetime
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch.nn import functional as nnf

from atlas_lm.config.model import ModelConfig
from atlas_lm.config.parsing import is_number
from atlas_lm.exit_gates.artifacts import RunArtifacts
from atlas_lm.exit_gates.result import GateResult
from atlas_lm.files import ROOT
from atlas_lm.model.atlas import AtlasLM
from atlas_lm.training.trainer import prepare_process

Chunks = tuple[int, ...]
Decision = dict[str, Any]  # the model (IDENTITY), local_chunks, tokens_per_second, date, device

DECISIONS = ROOT / "conf" / "decisions" / "chunk_sizes.yaml"
CANDIDATES: dict[str, Chunks] = {  # G2-1
    "Set A": (8, 16, 32, 64),
    "Set B": (16, 32, 64, 128),
    "Set C": (8, 32, 64),
    "Set D": (8,),
}
MARGIN = 1.10  # another set must be faster than the configured one by this factor
VOCABULARY = 256
SIZES = ("steps", "seq_len", "batch_size")  # of a measurement
IDENTITY = ("name", "dim", "layers", "heads", "head_dim")  # of a model: a decision holds for no other


@dataclass
class Options:
    """Measure the throughput of sets of local chunk sizes and append the decision to conf/decisions (G2-1)."""

    model: str = "tiny"
    """A file of conf/model."""
    overrides: list[str] = field(default_factory=list)
    """Settings as train.py takes them, e.g. model.dim=512 or +experiment=stage1."""
    steps: int = 5
    """Forward and backward passes per set; the median counts."""
    seq_len: int = 1024
    """Tokens per sequence."""
    batch_size: int = 2
    """Sequences per pass."""
    decisions: str = ""
    """File to append to; conf/decisions/chunk_sizes.yaml of the repository if none is given."""

    def __post_init__(self) -> None:
        for name in SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


def label(chunks: Chunks) -> str:
    """Set A: {8,16,32,64}; without a name where it is none of the candidates."""
    names = [f"{name}: " for name, candidate in CANDIDATES.items() if candidate == chunks]
    return f"{''.join(names)}{{{','.join(map(str, chunks))}}}"


def model_config(name: str, overrides: list[str]) -> ModelConfig:
    """The model that train.py would build. ValueError: it has no local memory."""
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        found = OmegaConf.to_object(compose("train", overrides=[f"model={name}", *overrides]).model)
    assert isinstance(found, ModelConfig)
    if found.memory == "none" or not found.local_chunks:
        raise ValueError(f"model {found.name} has no local memory: there are no chunk sizes to decide on")
    return found


def candidates(config: ModelConfig) -> list[Chunks]:
    """The sets of G2-1, and the configured one."""
    return list(dict.fromkeys([*CANDIDATES.values(), tuple(config.local_chunks)]))


def measure(config: ModelConfig, steps: int, batch_size: int, seq_len: int) -> dict[Chunks, float]:
    """Tokens per second of forward and backward by set, in float32: medians, sets taken in turn."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens = torch.randint(VOCABULARY, (batch_size, seq_len + 1), device=device)

    def step_of(chunks: Chunks) -> Callable[[], float]:
        torch.manual_seed(0)
        model = AtlasLM(ModelConfig(**{**vars(config), "local_chunks": list(chunks)}), VOCABULARY).to(device)

        def step() -> float:
            start = time.perf_counter()
            logits = model(tokens[:, :-1]).logits
            nnf.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
            model.zero_grad(set_to_none=True)
            if device.type == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - start

        return step

    sets = {chunks: step_of(chunks) for chunks in candidates(config)}
    times: dict[Chunks, list[float]] = {chunks: [] for chunks in sets}
    for i in range(steps + 1):  # the first is a warm-up
        print(f"chunk sizes: round {i} of {steps}", file=sys.stderr)
        for chunks, step in sets.items():
            seconds = step()
            times[chunks] += [seconds] if i else []
    return {chunks: tokens[:, 1:].numel() / statistics.median(found) for chunks, found in times.items()}


def decide(rates: dict[Chunks, float], configured: Chunks) -> Chunks:
    """The configured set, unless the fastest is more than 10 % faster."""
    fastest = max(rates, key=lambda chunks: rates[chunks])
    return fastest if rates[fastest] > MARGIN * rates[configured] else configured


def identity(config: ModelConfig) -> dict[str, Any]:
    """What a decision says of the model that it is for."""
    return {("model" if name == "name" else name): getattr(config, name) for name in IDENTITY}


def device_name() -> str:
    """Where the sets are measured."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"


def decision(config: ModelConfig, rates: dict[Chunks, float]) -> Decision:
    """What is decided, for the machine."""
    chosen = decide(rates, tuple(config.local_chunks))
    return {
        **identity(config),
        "local_chunks": list(chosen),
        "tokens_per_second": round(rates[chosen]),
        "date": datetime.date.today(),
        "device": device_name(),
    }


def entry(config: ModelConfig, rates: dict[Chunks, float], options: Options) -> str:
    """The same for people: a page of docs/decisions."""
    configured = tuple(config.local_chunks)
    chosen = decide(rates, configured)
    stays = chosen == configured
    ratio = rates[chosen] / rates[configured]
    verdict = (
        f"The configured set stays, {label(chosen)}."
        if stays
        else f"{label(chosen)}, {ratio - 1:.0%} faster than the configured {label(configured)}: "
        "model.local_chunks has to follow, until then G2-1 fails."
    )
    rows = "\n".join(
        f"| {label(chunks)}{' (configured)' if chunks == configured else ''} | {rate:,.0f} | "
        f"{rate / rates[configured]:.2f} |{' chosen' if chunks == chosen else ''} |"
        for chunks, rate in rates.items()
    )
    usual = Options()
    sizes = [f"{name}={getattr(options, name)}" for name in SIZES if getattr(options, name) != getattr(usual, name)]
    command = " ".join([f"model={options.model}", *sizes, *options.overrides])
    return f"""# Local chunk sizes of {config.name}, dim {config.dim} (G2-1)

{datetime.date.today().isoformat()} · decided

## Question

Which set of local chunk sizes does this model train with?

## Measurement

`python -m atlas_lm gates chunk_sizes {command}`: forward and backward of {options.batch_size} ×
{options.seq_len:,} random tokens, float32, {device_name()}; median of {options.steps}, sets taken in turn.

| local chunks | tokens/s | share of the configured set's | |
|---|---|---|---|
{rows}

## Decision

The configured set stays unless another one is more than {MARGIN - 1:.0%} faster. {verdict}
"""


def read_decisions(path: Path) -> list[Decision]:
    """All decisions in a file, the oldest first. ValueError: it is no list of decisions. OSError: it cannot be read."""
    try:
        found = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: broken YAML ({' '.join(str(error).split())})") from error
    if not isinstance(found, list | None) or not all(isinstance(item, dict) for item in found or []):
        raise ValueError(f"{path} is no list of decisions: python -m atlas_lm gates chunk_sizes writes one")
    return found or []


def find_decision(decisions: list[Decision], config: ModelConfig) -> Decision:
    """The newest decision on this model. ValueError: none."""
    wanted, others = identity(config), []
    for found in reversed(decisions):
        if all(found.get(key) == value for key, value in wanted.items()):
            return found
        others.append(f"{found.get('model', '?')} of dim {found.get('dim', '?')}")
    about = ", ".join(f"{key}={value}" for key, value in wanted.items())
    there = f"; there are decisions on {', '.join(dict.fromkeys(others))}" if others else ""
    raise ValueError(f"no decision on {about}{there}: python -m atlas_lm gates chunk_sizes model={config.name}")


def judge(decisions: list[Decision], config: ModelConfig) -> GateResult:
    """G2-1."""
    found = find_decision(decisions, config)
    sizes, rate = found.get("local_chunks"), found.get("tokens_per_second")
    if not (isinstance(sizes, list) and sizes and all(is_number(size) for size in sizes)):
        raise ValueError("the decision names no chunk sizes: repeat it")
    if rate is None or not (is_number(rate) and rate > 0):
        raise ValueError("the decision names no tokens_per_second: repeat it")
    decided, used = tuple(sizes), tuple(config.local_chunks)
    if decided != used:
        return GateResult(False, label(used), f"{label(decided)} was decided, the run has {label(used)}")
    return GateResult(True, label(used), f"{label(used)}, {rate:,.0f} tokens/s")


def locked(run: RunArtifacts) -> GateResult:
    """G2-1."""
    if not run.decisions.is_file():
        raise ValueError(f"there is no {run.decisions}: python -m atlas_lm gates chunk_sizes model=<name>")
    return judge(read_decisions(run.decisions), run.model_config)


def run_command(options: Options) -> str:
    """Measure, append the decision, print the page for docs/decisions; returns that."""
    config = model_config(options.model, options.overrides)
    path = Path(options.decisions) if options.decisions else DECISIONS
    if path.exists():
        read_decisions(path)  # what is no list of decisions gets none appended
    prepare_process(seed=0)
    rates = measure(config, options.steps, options.batch_size, options.seq_len)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:  # one write: others may append too
        file.write(yaml.safe_dump([decision(config, rates)], sort_keys=False, default_flow_style=None))
    text = entry(config, rates, options)
    print(text)
    print(f"appended the decision to {path}; the page above is for docs/decisions", file=sys.stderr)
    return text
