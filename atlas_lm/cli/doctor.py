"""Whether this machine is fit for a run, and what the run will take, before it is queued.

    python -m atlas_lm doctor
    python -m atlas_lm doctor model=125m data.seq_len=8192 data.batch_size=2
    python -m atlas_lm doctor +experiment=stage2 model=43m trainer=fsdp trainer.devices=8

The arguments are those of train.py; without +experiment= it is that of Stage 1. A step is run without contents, the way
that a GPU takes, and what exists at once is counted: nothing is trained, and no GPU is needed. It prints the bytes of
weights, gradients, optimizer, activations and the fast weights kept among them, the most at one moment of a step, what
the snapshots of spike_rollback take in the host's memory, and the largest batch for cards of 80 and 141 GB.

Then it looks at the machine: compiler, device, precision, threads, network, SLURM, memory, disk, locks, clock; what is
wrong comes with what to change. Exit code 1 where a run would fail, or where this batch fits neither card.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from atlas_lm.cli.arguments import HELP
from atlas_lm.config.validate import check_config
from atlas_lm.files import ROOT
from atlas_lm.runs import checkup
from atlas_lm.training.budget import USABLE, Budget, budget, largest_batch

CARDS = (80e9, 141e9)
EXPERIMENT = "+experiment="


def main(words: Sequence[str]) -> None:
    """Print both. ValueError: a setting that train.py would refuse, a problem, or a batch that fits no card."""
    if any(word in HELP for word in words):
        print(__doc__)
        return
    cfg = composed(words)
    config = check_config(cfg)
    dm = instantiate(cfg.data)
    rows, length, ranks = int(cfg.data.batch_size), dm.seq_len, sharded_over(cfg)
    mixed = config.precision != "32-true"
    console = Console()
    with console.status(f"running a step of {rows} × {length} tokens without contents"):
        found = budget(config.model, config.optim, dm.vocab_size, rows, length, mixed)
    operands = "bfloat16" if mixed else "float32"
    each = "" if ranks == 1 else f", one of {ranks} ranks that share weights, gradients and optimizer"
    console.print(f"model {config.model.name}, {rows} × {length} tokens a step, {operands}{each}")
    console.print(table(found, ranks, snapshots(cfg)))
    peak = found.peak - found.lasting + found.lasting / ranks
    fits = {card: largest_batch(found, rows, card, ranks) for card in CARDS}
    for card, most in fits.items():
        console.print(f"{card / 1e9:.0f} GB: {most} sequences of {length} tokens at most")
    findings = checkup.examine(wanted(cfg, found, ranks))
    console.print(report(findings))
    wrong = [f"{f.what}: {f.remedy}" for f in findings if f.state == checkup.PROBLEM]
    if peak > USABLE * max(CARDS):
        wrong.append(
            f"a step of {rows} sequences of {length} tokens needs {gigabytes(peak)} and fits no card of "
            f"{max(CARDS) / 1e9:.0f} GB: lower data.batch_size"
            + (", or set model.checkpoint=block" if config.model.checkpoint == "none" else " or data.seq_len")
        )
    if wrong:
        raise ValueError("; ".join(wrong))


def wanted(cfg: DictConfig, found: Budget, ranks: int) -> checkup.Wanted:
    """What the run needs of the machine."""
    sizes = [OmegaConf.select(cfg, f"trainer.{name}") for name in ("devices", "num_nodes")]
    devices = sizes[0] if isinstance(sizes[0], int) and sizes[0] > 0 else None
    nodes = sizes[1] if isinstance(sizes[1], int) else 1
    content = found.weights + found.moments
    files = (
        snapshots(cfg) + int(OmegaConf.select(cfg, "callbacks.step_checkpoint.keep") or 0) + 1
    )  # and one half-written
    written = content * 2 / (nodes if ranks > 1 else 1)  # by rank zero, or by each its part
    on_machine = content * snapshots(cfg) / nodes + written  # snapshots once per job, divided among its ranks
    return checkup.Wanted(
        Path(str(cfg.paths.outputs)), str(cfg.trainer.accelerator), devices, nodes, content * files, on_machine
    )


def report(findings: Sequence[checkup.Finding]) -> Table:
    """What was looked at, and what to change."""
    shown = Table("this machine", "", "", box=None, pad_edge=False)
    colours = {checkup.FINE: "green", checkup.MIND: "yellow", checkup.PROBLEM: "red"}
    for finding in findings:
        remedy = f"\n→ {escape(finding.remedy)}" if finding.remedy else ""
        state = f"[{colours[finding.state]}]{finding.state}[/]"
        shown.add_row(finding.name, state, f"{escape(finding.what)}{remedy}")
    return shown


def composed(words: Sequence[str]) -> DictConfig:
    """The configuration that train.py would train with."""
    given = [] if any(word.startswith(EXPERIMENT) for word in words) else [f"{EXPERIMENT}stage1"]
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        return compose("train", overrides=[*given, *words, "paths.run=."])


def sharded_over(cfg: DictConfig) -> int:
    """Ranks among which weights, gradients and optimizer are divided; 1 where each has all, or their number is open."""
    sharded = "FullySharded" in str(OmegaConf.select(cfg, "trainer.strategy"))
    sizes = [OmegaConf.select(cfg, f"trainer.{name}") for name in ("devices", "num_nodes")]
    return sizes[0] * sizes[1] if sharded and all(isinstance(size, int) and size > 0 for size in sizes) else 1


def snapshots(cfg: DictConfig) -> int:
    """How many of weights and optimizer the ring of spike_rollback holds in the host's memory."""
    kept = OmegaConf.select(cfg, "callbacks.spike_rollback.keep_last")
    return kept if isinstance(kept, int) else 0


def table(found: Budget, ranks: int, kept: int) -> Table:
    """Rows of what, and how many bytes. Snapshots are kept once per job: a rank has its share."""
    shown = Table("on the GPU", "bytes", box=None, pad_edge=False)
    shown.columns[1].justify = "right"
    activations = found.activations - found.kept_states
    lines: list[tuple[str, Any]] = [
        ("weights", found.weights / ranks),
        ("gradients", found.gradients / ranks),
        ("optimizer", found.moments / ranks),
        ("activations", activations),
        ("kept fast weights", found.kept_states),
        ("at most at one moment", found.peak - found.lasting + found.lasting / ranks),
    ]
    for name, size in lines:
        shown.add_row(name, gigabytes(size))
    held = kept * (found.weights + found.moments) / ranks
    shown.add_row(f"host: {kept} snapshots of spike_rollback", gigabytes(held))
    who = "host of rank 0" if ranks == 1 else "host"
    shown.add_row(f"{who}: two checkpoints being written", gigabytes(2 * (found.weights + found.moments) / ranks))
    return shown


def gigabytes(size: float) -> str:
    """In units of 10⁹ bytes, or 10⁶ where that says more."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
