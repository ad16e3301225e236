"""Print the README's table from the newest finished runs: python -m benchmarks.figures

Those of the experiments stage1, stage1_twin, recall and recall_twin; trains nothing.
"""

from __future__ import annotations

import json
from typing import Any

from atlas_lm.runs import resolve_run


def report(name: str) -> dict[str, Any]:
    return json.loads((resolve_run(name) / "report.json").read_text())


def rows() -> list[tuple[str, str, str]]:
    """What, figure, command."""
    stage1, twin, recall, blind = (report(name) for name in ("stage1", "stage1_twin", "recall", "recall_twin"))
    run = "`python train.py +experiment="
    table = [
        (
            f"held-out source ({stage1['val_bytes']:,} bytes), bits per byte",
            f"**{stage1['val_bits_per_byte']:.3f}**",
            f"{run}stage1`",
        ),
        ("the same bytes, gzip -9", f"{stage1['gzip_bits_per_byte']:.3f}", "the same"),
        ("the same bytes, xz -9e", f"{stage1['xz_bits_per_byte']:.3f}", "the same"),
        (
            f"no memory, same steps, {twin['parameters']:,} parameters instead of {stage1['parameters']:,}",
            f"{twin['val_bits_per_byte']:.3f}",
            f"{run}stage1_twin`",
        ),
        (
            f"training time, {stage1['steps']} steps, {stage1['tokens']:,} bytes, validation included",
            f"{stage1['train_seconds'] / 60:.1f} min",
            f"{run}stage1`",
        ),
        (
            "tokens per second (no memory)",
            f"{stage1['tokens_per_second']:,.0f} ({twin['tokens_per_second']:,.0f})",
            "both",
        ),
        ("recall two windows back, 16 pairs", f"**{recall['recall_accuracy']:.3f}**", f"{run}recall`"),
        ("recall, no memory (chance 0.016)", f"{blind['recall_accuracy']:.3f}", f"{run}recall_twin`"),
        ("training time of recall", f"{recall['train_seconds'] / 60:.1f} min", f"{run}recall`"),
    ]
    return table


if __name__ == "__main__":
    print("| what | figure | command |\n|---|---|---|")
    for row in rows():
        print("| " + " | ".join(row) + " |")
