"""Draw recall accuracy against steps, with and without memory (N2): python -m benchmarks.recall_curves

Reads the newest finished runs of `recall` and `recall_twin`; trains nothing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from atlas_lm.runs.resolve import resolve_run

CURVES = {"recall": "with memory", "recall_twin": "same parameters, no memory"}


def curve(run: Path) -> tuple[list[int], list[float]]:
    """Steps and accuracies of every validation of a run."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    points = [(row["step"], row["recall/accuracy"]) for row in rows if row.get("recall/accuracy") is not None]
    return [step for step, _ in points], [accuracy for _, accuracy in points]


def main(target: str = "docs/recall.png") -> None:
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for name, label in CURVES.items():
        axes.plot(*curve(resolve_run(name)), marker="o", markersize=3, label=label)
    axes.axhline(1 / 64, color="grey", linewidth=0.8, linestyle=":", label="chance (1 of 64 values)")
    axes.set(xlabel="optimizer step", ylabel="recall accuracy", ylim=(-0.03, 1.03))
    axes.set_title("16 pairs, asked for two attention windows later", fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(target, dpi=120)
    print(f"wrote {target}")


if __name__ == "__main__":
    main(*sys.argv[1:])
