"""Print the README's table from the newest finished runs: python -m benchmarks.figures

Those of the experiments stage1, stage1_twin, stage2, recall and recall_twin, and what `atlas_lm.exit_gates` found of
them; trains nothing.
"""

from __future__ import annotations

import json
from typing import Any

from atlas_lm.loggers.jsonl import read_rows
from atlas_lm.runs.resolve import resolve_run

RUN = "`python train.py +experiment="


def report(name: str) -> dict[str, Any]:
    return json.loads((resolve_run(name) / "report.json").read_text())


def gates(name: str, phase: str) -> dict[str, dict[str, Any]]:
    """Exit gates of a phase by their ids."""
    return {gate["id"]: gate for gate in json.loads((resolve_run(name) / "exit_gates.json").read_text())[phase]}


def safeguards() -> list[tuple[str, str, str]]:
    """What the gates and the records say of the safeguards."""
    second, fourth = gates("stage1", "phase2"), gates("stage2", "phase4")
    stage2 = report("stage2")
    records = read_rows(resolve_run("stage1") / "metrics.jsonl")
    contribution = [row["memory/contribution"] for row in records if row.get("memory/contribution") is not None][-1]
    judged = "`python -m atlas_lm gates "

    def passed(found: dict[str, dict[str, Any]]) -> str:
        return f"{sum(gate['passed'] for gate in found.values())}/{len(found)}"

    return [
        ("perplexity without the memory's output, as a multiple", f"{1 + contribution:.2f}", RUN + "stage1`"),
        ("exit gates of Stage 1", f"**{passed(second)}**", judged + "phase2 run=stage1`"),
        ("needle behind 100 pairs, gates open, mean cosine", f"{second['G2-5']['measured']:.3f}", "the same"),
        ("exit gates of Stage 2", f"**{passed(fourth)}**", judged + "phase4 run=stage2`"),
        ("needle after Stage 2, at chunk 1", f"{fourth['G4-6']['measured']:.3f}", "the same"),
        ("spread of the perplexity over chunk sizes 1 to 64", f"{fourth['G4-4']['measured']:.1%}", "the same"),
        ("gates below 0.1 or above 0.9", f"{fourth['G4-5']['measured']:.1%}", "the same"),
        (
            f"training time of Stage 2, {stage2['steps']} steps, chunk 32 to 1",
            f"{stage2['train_seconds'] / 60:.1f} min",
            RUN + "stage2`",
        ),
    ]


def rows() -> list[tuple[str, str, str]]:
    """What, figure, command."""
    stage1, twin, recall, blind = (report(name) for name in ("stage1", "stage1_twin", "recall", "recall_twin"))
    table = [
        (
            f"held-out source ({stage1['val_bytes']:,} bytes), bits per byte",
            f"**{stage1['val_bits_per_byte']:.3f}**",
            f"{RUN}stage1`",
        ),
        ("the same bytes, gzip -9", f"{stage1['gzip_bits_per_byte']:.3f}", "the same"),
        ("the same bytes, xz -9e", f"{stage1['xz_bits_per_byte']:.3f}", "the same"),
        (
            f"no memory, same steps, {twin['parameters']:,} parameters instead of {stage1['parameters']:,}",
            f"{twin['val_bits_per_byte']:.3f}",
            f"{RUN}stage1_twin`",
        ),
        (
            f"training time, {stage1['steps']} steps, {stage1['tokens']:,} bytes, validation included",
            f"{stage1['train_seconds'] / 60:.1f} min",
            f"{RUN}stage1`",
        ),
        (
            "tokens per second (no memory)",
            f"{stage1['tokens_per_second']:,.0f} ({twin['tokens_per_second']:,.0f})",
            "both",
        ),
        ("recall two windows back, 16 pairs", f"**{recall['recall_accuracy']:.3f}**", f"{RUN}recall`"),
        ("recall, no memory (chance 0.016)", f"{blind['recall_accuracy']:.3f}", f"{RUN}recall_twin`"),
        ("training time of recall", f"{recall['train_seconds'] / 60:.1f} min", f"{RUN}recall`"),
    ]
    return [*table, *safeguards()]


if __name__ == "__main__":
    print("| what | figure | command |\n|---|---|---|")
    for row in rows():
        print("| " + " | ".join(row) + " |")
