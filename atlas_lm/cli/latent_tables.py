"""Five tests of next-vector predictors as Markdown, JSON and a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from atlas_lm.cli.figures import new_figure
from atlas_lm.evaluation.bootstrap import Interval, interval
from atlas_lm.latent.criteria import Criterion
from atlas_lm.latent.five_cat import Gate, Measured
from atlas_lm.latent.rows import WORDS, Row, by_document

SHOWN = ("cosine", "accuracy", "recall_at_1", "recall_at_5", "recall_at_10", "reciprocal")


def intervals_of(found: Measured) -> dict[str, Interval]:
    """Each measure with its interval of 95 %, documents resampled."""
    return {name: interval(by_document(found.by_document(name))) for name in SHOWN}


def number(value: float | None, form: str = ".3f") -> str:
    """A number as tables show it."""
    return "–" if value is None or math.isnan(value) else format(value, form)


def line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def measures_table(rows: Sequence[Row], other: bool) -> str:
    """Every row's measures, held-out or out of domain; then chance."""
    header = ["", *(WORDS[name] for name in SHOWN), "effective rank", "spread", "tests passed"]
    lines = [line(header), "|---" * len(header) + "|"]
    chance: dict[str, float] = {}
    for row in rows:
        found = row.other if other else row.held_out
        if found is None:
            continue
        chance, cells = found.chance, []
        for name, of in intervals_of(found).items():
            bare = name in ("recall_at_1", "recall_at_10", "reciprocal") or math.isnan(of.low)
            bounds = "" if bare else f" [{of.low:.3f}, {of.high:.3f}]"
            cells.append(f"{of.mean:.3f}{bounds}")
        passed = "".join(test for test, holds in row.passed.items() if holds)
        cells += [f"{found.effective_rank / found.data_rank:.2f}", f"{found.spread:.2f}", passed or "none"]
        lines.append(line([row.name, *cells]))
    if chance:
        by_name = {"accuracy": "contrastive_accuracy", "reciprocal": "mrr"}
        cells = [number(chance.get(by_name.get(name, name))) for name in SHOWN]
        lines.append(line(["chance", *cells, "–", "–", "–"]))
    return "\n".join(lines)


def gates_table(gates: Sequence[Gate]) -> str:
    """The seed's thresholds for one row."""
    words = {True: "passed", False: "FAILED", None: "not measured"}
    header = ["test", "what", "where", "value", "threshold", ""]
    lines = [line(header), "|---" * len(header) + "|"]
    for gate in gates:
        lines.append(
            line([gate.test, gate.name, gate.where, number(gate.value, "+.3f"), gate.rule, words[gate.passed]])
        )
    return "\n".join(lines)


def criteria_table(found: Sequence[Criterion]) -> str:
    """The seed's criteria by epoch for one run."""
    header = ["epoch", "what", "wanted", "found", ""]
    lines = [line(header), "|---" * len(header) + "|"]
    for c in found:
        wanted, value = f"{c.wanted:+.2f}", number(c.found, "+.3f")
        lines.append(line([str(c.epoch), c.name, wanted, value, "passed" if c.passed else "FAILED"]))
    return "\n".join(lines)


def sweep_figure(rows: Sequence[Row], context: int) -> Figure:
    """A: the mean cosine by offset, a line for each row; the frames of the context are shaded."""
    figure = new_figure(7, 4)
    axes = figure.subplots()
    axes.axvspan(-context + 0.5, 0.5, color="0.93")
    for row in rows:
        offsets = sorted(k for k, value in row.held_out.offsets.items() if not math.isnan(value))
        axes.plot(offsets, [row.held_out.offsets[k] for k in offsets], marker="o", markersize=3, label=row.name)
    axes.axvline(1, color="0.6", linewidth=0.8, linestyle=":")
    axes.set_xlabel("offset from the last frame seen; +1 is the target, the context is shaded")
    axes.set_ylabel("mean cosine with the prediction")
    axes.legend(fontsize=7)
    return figure


def as_json(row: Row) -> dict[str, Any]:
    """Everything that was found for a row."""

    def of(found: Measured | None) -> dict[str, Any] | None:
        if found is None:
            return None
        values: dict[str, Any] = {name: list(value) for name, value in intervals_of(found).items()}
        values["raw_recalls"] = {
            k: float(sum(x.sum() for x in parts) / sum(len(x) for x in parts)) for k, parts in found.raw_recalls.items()
        }
        names = ("chance", "offsets", "ablations", "rollout", "binned", "in_bin", "effective_rank", "data_rank",
                 "spread")  # fmt: skip
        return values | {name: getattr(found, name) for name in names}

    found = {
        "name": row.name, "held_out": of(row.held_out), "out_of_domain": of(row.other),
        "gates": [gate._asdict() for gate in row.gates], "passed": row.passed, "notes": row.notes,
    }  # fmt: skip
    return finite(found)


def finite(value: Any) -> Any:
    """None in place of NaN, which JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    return [finite(v) for v in value] if isinstance(value, list | tuple) else value
