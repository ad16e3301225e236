"""What training would take on 8, 64 and 512 GPUs, on paper: python -m benchmarks.scale --write

Compute is what one card was measured at (docs/results/gpu.json): with memories by PyTorch's loop, whose time is that of
its launches and grows with the number of blocks alone; and, as an aim, at 0.4 of the speed of the same model without
memory, whose operations a second are taken for all sizes. Bytes are counted (`doctor`), times of communication are
bytes over bandwidths. Nothing here was measured on more than one card.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import NamedTuple

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

import atlas_lm.config.schema
import atlas_lm.runs.resolve  # noqa: F401  # both register what conf/ needs
from atlas_lm.files import ROOT, write_atomically
from atlas_lm.training.budget import Budget, budget
from benchmarks.figures import inserted

PAGE = Path("docs") / "results" / "scale.md"
BEGIN = "<!-- scale: python -m benchmarks.scale --write -->"
MODELS, GPUS = ("125m", "340m", "760m", "1300m"), (8, 64, 512)
LENGTH, ROWS = 8192, 2  # tokens of a sequence, sequences of a GPU's step
NODE = 8  # GPUs of a machine
EFFICIENCY = 0.8  # of a nominal bandwidth
NVLINK, NETWORK = EFFICIENCY * 450e9, EFFICIENCY * 50e9  # bytes a second of a GPU, in each direction
OF_TWIN = 0.4  # of the speed of the model without memory: the aim
CARD = 80e9


class Compute(NamedTuple):
    """Of one card."""

    seconds_of_block: float  # a step of 8,192 tokens and more, launches alone
    operations: float  # a second, of the model without memory


class Size(NamedTuple):
    """A model."""

    name: str
    parameters: int
    blocks: int
    budget: Budget


class Row(NamedTuple):
    """One model on so many GPUs: seconds of communication in a step, bytes of one GPU."""

    ddp: float
    fsdp: float
    ddp_bytes: float
    fsdp_bytes: float


def measured(root: Path = ROOT) -> Compute:
    """From the card's results: 43m with and without memory, and its vocabulary of 257."""
    steps = json.loads((root / "docs" / "results" / "gpu.json").read_text())["steps"]
    with_memory, without = steps["43m, local chunks [64], 8k"], steps["43m without memory, 8k"]
    config = settings("43m")
    return Compute(
        with_memory["seconds"] / int(config.layers),
        without["tokens_per_second"] * operations(43_000_000, int(config.layers), int(config.window), int(config.dim)),
    )


def settings(model: str) -> OmegaConf:
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        return compose("train", overrides=[f"model={model}"]).model


def operations(parameters: int, blocks: int, window: int, dim: int) -> float:
    """Of a token, forward and backward: 6 for each parameter, and the attention's."""
    return 6.0 * parameters + 12.0 * blocks * window * dim


def all_reduce(size: float, gpus: int) -> float:
    """Seconds: within each machine, between the machines over all their ports, within each machine."""
    nodes = max(1, gpus // NODE)
    ports = min(gpus, NODE)
    within = 2 * size * (ports - 1) / ports / NVLINK
    return within + 2 * size / ports * (nodes - 1) / nodes / NETWORK


def gather(size: float, gpus: int) -> float:
    """Seconds of an all-gather, or of a reduce-scatter: what every GPU and every machine has to get."""
    nodes, ports = max(1, gpus // NODE), min(gpus, NODE)
    return max(size * (ports - 1) / ports / NVLINK, size * (nodes - 1) / nodes / (ports * NETWORK))


def row(size: Size, gpus: int) -> Row:
    """Gradients are reduced in float32; FSDP2 gathers parameters for both passes and scatters gradients."""
    weights = 4.0 * size.parameters
    return Row(
        all_reduce(weights, gpus), 3 * gather(weights, gpus), float(size.budget.peak),
        size.budget.peak - size.budget.lasting * (1 - 1 / gpus),
    )  # fmt: skip


def waits(compute: float, of: Row) -> tuple[float, float]:
    """Seconds that DDP and FSDP2 add to a step: what does not fit beside the backward pass, or beside both passes."""
    return max(0.0, of.ddp - compute * 2 / 3), max(0.0, of.fsdp - compute)


def size_of(model: str) -> Size:
    """With a vocabulary of 2,048 and bfloat16 operands."""
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        cfg = compose("train", overrides=[f"model={model}", "data=stdlib"])
    config, optim = OmegaConf.to_object(cfg.model), OmegaConf.to_object(cfg.optim)
    found = budget(config, optim, 2048, ROWS, LENGTH, True)  # type: ignore[arg-type]
    return Size(model, found.weights // 4, int(cfg.model.layers), found)


def steps_of(size: Size, compute: Compute) -> tuple[float, float]:
    """Seconds of a step: as the card was measured, and the aim."""
    config = settings(size.name)
    aim = ROWS * LENGTH * operations(size.parameters, size.blocks, int(config.window), int(config.dim))
    aim /= OF_TWIN * compute.operations
    return max(size.blocks * compute.seconds_of_block, aim), aim


def table(sizes: list[Size], compute: Compute) -> str:
    """Markdown."""
    heads = ["model", "GPUs", "step, measured speed", "tokens/s", "step, aim", "tokens/s", "DDP communicates",
             "FSDP2 communicates", "DDP, a GPU holds", "FSDP2"]  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for size in sizes:
        for gpus in GPUS:
            found = row(size, gpus)
            cells = [size.name, str(gpus)]
            for seconds in steps_of(size, compute):
                ddp, fsdp = waits(seconds, found)
                step = seconds + (fsdp if found.ddp_bytes > CARD else min(ddp, fsdp))
                cells += [f"{step:.2f} s", f"{gpus * ROWS * LENGTH / step:,.0f}"]
            cells += [f"{found.ddp * 1e3:.0f} ms", f"{found.fsdp * 1e3:.0f} ms"]
            over = " (too much)" if found.ddp_bytes > CARD else ""
            cells += [f"{found.ddp_bytes / 1e9:.1f} GB{over}", f"{found.fsdp_bytes / 1e9:.1f} GB"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Count, and print or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into docs/results")
    options = parser.parse_args()
    compute = measured()
    text = table([size_of(model) for model in MODELS], compute)
    said = (
        f"One card: {compute.seconds_of_block:.3f} s a block and step with memories, "
        f"{compute.operations / 1e12:.0f} · 10¹² operations a second without."
    )
    print(f"{said}\n\n{text}")
    if options.write:
        page = (ROOT / PAGE).read_text(encoding="utf-8")
        write_atomically(
            ROOT / PAGE, inserted(page, f"`python -m benchmarks.scale --write`\n\n{said}\n\n{text}", BEGIN)
        )


if __name__ == "__main__":
    main()
