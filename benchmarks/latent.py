"""Next-vector prediction on real text: models beside baselines, and V3's collapse: python -m benchmarks.latent

Trains through train.py, `--seeds` times each, on the vectors that `python -m atlas_lm embed` wrote to `--data` and
`--other` (out of domain), and tests every run on the test split as `latent five_cat` does. What has finished is not
trained again, so an interrupted benchmark is continued by the same command.

--parts: table (models beside baselines), v3 (guards of 0.01 at epoch 4, with and without the cap), rates (half, once
and twice each model's, by the validation split), cost (of the probe and of the guards, on a quiet machine).
--quick: a tenth of the steps and one seed, for trying it. --write: into docs, beside printing it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from atlas_lm.cli import latent_tables as tables
from atlas_lm.cli.figures import new_figure, save
from atlas_lm.evaluation.bootstrap import interval
from atlas_lm.files import ROOT, write_atomically
from atlas_lm.latent.load import load
from atlas_lm.latent.rows import BEATEN, WORDS, Bench, Row, by_document, difference
from atlas_lm.loggers.jsonl import read_rows
from atlas_lm.runs.folder import finished_runs
from benchmarks.figures import inserted

NUMBERS, PAGE, PICTURE = "docs/results/latent.json", "docs/latent.md", "docs/latent_v3.png"
TABLE = "<!-- latent: python -m benchmarks.latent --write -->"
MODELS = {  # row → how it is trained
    "P1: direct, squared error, 3 epochs": ["+experiment=latent_p1", "optim.total_steps=240"],
    "P2: residual, guards in epochs 6 and 7": ["+experiment=latent_p2", "optim.total_steps=560"],
    "memory: residual, InfoNCE, whole history": ["+experiment=latent_memory"],
    "its twin without memory": ["+experiment=latent_memory", "model.memory=none"],
}
RATES = (0.5, 1.0, 2.0)
GUARDS = "callbacks.loss_weight_schedule.stages=[{epoch: 1, direction: 0.002, future: 0.002}]"
COST = {  # row → two epochs of P2, each step with the guards
    "guards and probe": [GUARDS],
    "guards alone": [GUARDS, "~callbacks.five_cat_probe"],
    "probe alone": ["~callbacks.loss_weight_schedule"],
    "neither": ["~callbacks.loss_weight_schedule", "~callbacks.five_cat_probe"],
}
COST_ROUNDS = 5
PARTS = ("table", "v3", "rates", "cost")
V3 = {"no cap": "null", "cap 0.1": "0.1"}
SHOWN = ("cosine", "accuracy", "recall_at_1", "recall_at_5", "recall_at_10")
QUICK = ["optim.total_steps=40", "optim.warmup_steps=4"]


def trained(name: str, overrides: Sequence[str], asked: argparse.Namespace) -> Path | None:
    """The folder of a finished run of that name, trained now if there is none; None where its training failed."""
    outputs = Path(asked.outputs)
    if not finished_runs(outputs / name) and not asked.as_it_is:
        where = [f"name={name}", f"paths.outputs={outputs}", f"data.source.path={asked.data}",
                 f"data.source.out_of_domain={asked.other or 'null'}"]  # fmt: skip
        command = [sys.executable, str(ROOT / "train.py"), *overrides, *where, *(QUICK if asked.quick else [])]
        print("train:", " ".join(command[2:]), flush=True)
        ended = subprocess.run(command, stdout=subprocess.DEVNULL, env=os.environ).returncode
        if ended:
            print(f"{name} ended with {ended}", flush=True)
    found = finished_runs(outputs / name)
    return found[0] if found else None


def seeded(label: str, overrides: Sequence[str], seed: int, asked: argparse.Namespace) -> Path | None:
    name = "latent_bench_" + "".join(c if c.isalnum() else "_" for c in label).strip("_").lower() + f"_{seed}"
    return trained(name, [*overrides, f"seed={seed}", f"data.seed={seed}"], asked)


# Models beside baselines


def table(asked: argparse.Namespace) -> dict[str, Any]:
    """Every row of every seed, tested; what the page shows."""
    runs = {
        label: [folder for seed in range(asked.seeds) if (folder := seeded(label, overrides, seed, asked))]
        for label, overrides in MODELS.items()
    }
    first = next((folders[0] for folders in runs.values() if folders), None)
    if first is None:
        raise SystemExit("no run has finished: see the messages above")
    bench = Bench(load(first).source, "test", asked.samples)
    baselines = bench.baselines(lambda name: print("tested:", name, flush=True))
    models: dict[str, list[Row]] = {}
    for label, folders in runs.items():
        for folder in folders:
            print("tested:", label, folder.parent.name, flush=True)
            models.setdefault(label, []).append(bench.test(label, load(folder).module.predictor()))
    alone = [bench.model(label, load(runs[label][0]).module.predictor())[1:] for label in models]
    beaten = [row for row in baselines if row.name in BEATEN]
    return {
        "documents": len(bench.held_out), "audit": bench.source.audit.line(), "seeds": asked.seeds,
        "baselines": [tables.as_json(row) for row in baselines],
        "models": {label: [tables.as_json(row) for row in rows] for label, rows in models.items()},
        "ablated": [tables.as_json(row) for rows in alone for row in rows],
        "summary": {label: summary(rows, beaten) for label, rows in models.items()},
        "drift": {label: [drift_of(read_rows(folder / "metrics.jsonl")) for folder in runs[label]] for label in models},
    }  # fmt: skip


def drift_of(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Epochs of a run from the third on, and in how many a peak is elsewhere than at +1 and its margin not above 0:
    over the frames not seen, by which guards are taken away, and over −3 … +3."""
    ends = [row for row in rows if row.get("five_cat_probe/margin_seen") is not None and row["epoch"] >= 2]

    def count(suffix: str) -> int:
        return sum(
            row[f"five_cat_probe/peak{suffix}"] != 1 and not row[f"five_cat_probe/margin{suffix}"] > 0 for row in ends
        )

    return {"epochs": len(ends), "unseen": count(""), "seen": count("_seen")}


def mean_of_seeds(rows: Sequence[Row], name: str) -> list[torch.Tensor]:
    """By document, each prediction's value averaged over the seeds: all were tested on the same text."""
    return [
        torch.stack(list(parts)).mean(0)
        for parts in zip(*(row.held_out.by_document(name) for row in rows), strict=True)
    ]


def summary(rows: Sequence[Row], beaten: Sequence[Row]) -> dict[str, Any]:
    """Of a model's seeds: each measure, its spread over seeds, and the differences from what it has to beat."""
    found: dict[str, Any] = {"seeds": len(rows)}
    for name in SHOWN:
        each = [row.held_out.mean(name) for row in rows]
        of = interval(by_document(mean_of_seeds(rows, name)))
        found[name] = {"mean": of.mean, "low": of.low, "high": of.high, "seeds": each}
        for other in beaten:
            differences = [difference(row.held_out, other.held_out, name) for row in rows]
            of = interval(torch.stack(differences).mean(0))
            found[name][f"over {other.name}"] = [of.mean, of.low, of.high]
    found["effective_rank"] = [row.held_out.effective_rank / row.held_out.data_rank for row in rows]
    found["passed"] = [[test for test, holds in row.passed.items() if holds] for row in rows]
    better = all(
        found[name][f"over {other.name}"][1] > 0 for name in ("accuracy", "recall_at_5") for other in beaten
    )  # fmt: skip
    found["holds"] = better and min(found["effective_rank"]) >= 0.5
    return found


def lines_of(found: dict[str, Any]) -> str:
    """The table of the page."""
    header = ["", *(WORDS[name] for name in SHOWN), "effective rank", "tests passed"]
    lines = [tables.line(header), "|---" * len(header) + "|"]
    for row in found["baselines"]:
        of = row["held_out"]
        cells = [f"{of[name][0]:.3f}" for name in SHOWN]
        rank = of["effective_rank"] / of["data_rank"]
        passed = "".join(test for test, holds in row["passed"].items() if holds)
        lines.append(tables.line([row["name"], *cells, f"{rank:.2f}", passed or "none"]))
    for label, of in found["summary"].items():
        cells = []
        for name in SHOWN:
            spread = statistics.stdev(of[name]["seeds"]) if of["seeds"] > 1 else 0.0
            cells.append(f"{of[name]['mean']:.3f} ± {spread:.3f}")
        passed = " ".join("".join(tests) or "–" for tests in of["passed"])
        lines.append(tables.line([f"**{label}**", *cells, f"{statistics.mean(of['effective_rank']):.2f}", passed]))
    chance = found["baselines"][0]["held_out"]["chance"]
    keys = {"accuracy": "contrastive_accuracy"}
    cells = [tables.number(chance.get(keys.get(name, name))) for name in SHOWN]
    lines += [tables.line(["chance", *cells, "–", "–"]), ""]
    lines.append(
        f"{found['documents']} test documents, {found['seeds']} seeds, ± over seeds; the model of each seed: the "
        "letters of the tests that it passes. " + found["audit"][0].upper() + found["audit"][1:] + "."
    )
    header = ["difference, interval of 95 % over documents", *(f"from {name}" for name in BEATEN)]
    lines += ["", tables.line(header), "|---" * len(header) + "|"]
    for label, of in found["summary"].items():
        for name in ("accuracy", "recall_at_5"):
            cells = ["{:+.3f} [{:+.3f}, {:+.3f}]".format(*of[name][f"over {other}"]) for other in BEATEN]
            lines.append(tables.line([f"{label}: {WORDS[name]}", *cells]))
    drifts = [of for each in found["drift"].values() for of in each]
    total = {name: sum(of[name] for of in drifts) for name in ("epochs", "unseen", "seen")}
    lines += ["", f"Drift in {len(drifts)} runs, {total['epochs']} epochs from the third on: {total['unseen']} by "
              f"the frames that a prediction has not seen, {total['seen']} over −3 … +3."]  # fmt: skip
    holds = [label for label, of in found["summary"].items() if of["holds"]]
    lines += ["", "Better than the last frame and ridge in both, with an effective rank of at least half the data's: "
              + (", ".join(holds) if holds else "**no model**") + "."]  # fmt: skip
    return "\n".join(lines)


# V3


def v3(asked: argparse.Namespace) -> dict[str, Any]:
    """The validation cosine by epoch, with and without the cap."""
    found: dict[str, Any] = {}
    for label, cap in V3.items():
        for seed in range(min(asked.seeds, 3)):
            name = f"latent_v3_cap_{cap}_seed_{seed}"
            overrides = ["+experiment=latent_v3", f"module.guard_cap={cap}", f"seed={seed}", f"data.seed={seed}"]
            folder = trained(name, overrides, asked)
            if folder is not None:
                found.setdefault(label, []).append(curve(read_rows(folder / "metrics.jsonl")))
    return found


def curve(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By epoch: cosine, contrastive accuracy, effective rank; and the ratio of the gradients where guards are on."""
    names = {"cosine": "val/cosine", "accuracy": "val/contrastive_accuracy", "effective_rank": "val/effective_rank",
             **{name: f"five_cat_probe/{name}" for name in ("margin_seen", "peak_seen", "margin", "peak")}}  # fmt: skip
    ends = [row for row in rows if row.get("five_cat_probe/margin_seen") is not None]  # whole epochs
    ratios: dict[int, list[float]] = {}
    for row in rows:
        if row.get("latent/guard_ratio") is not None:
            ratios.setdefault(int(row["epoch"]) + 1, []).append(float(row["latent/guard_ratio"]))
    return {
        "epochs": [int(row["epoch"]) + 1 for row in ends],
        **{name: [row.get(metric) for row in ends] for name, metric in names.items()},
        "guard_ratio": {str(epoch): statistics.median(values) for epoch, values in ratios.items()},
    }


def v3_lines(found: dict[str, Any]) -> str:
    """A table of the seeds."""
    header = [
        "",
        "seed",
        "cosine after epoch 3",
        "lowest from epoch 4 on",
        "last",
        "guards / main loss, gradients, epoch 4",
    ]
    lines = [tables.line(header), "|---" * len(header) + "|"]
    for label, curves in found.items():
        for seed, of in enumerate(curves):
            by_epoch = dict(zip(of["epochs"], of["cosine"], strict=True))
            later = [value for epoch, value in by_epoch.items() if epoch >= 4]
            values = [by_epoch.get(3), min(later, default=None), later[-1] if later else None]
            ratio = tables.number(of["guard_ratio"].get("4"), ".1f")
            lines.append(tables.line([label, str(seed), *(tables.number(value) for value in values), ratio]))
    return "\n".join(lines)


def v3_figure(found: dict[str, Any]) -> Any:
    """Curves of all seeds: cosine, and the effective rank."""
    figure = new_figure(9, 3.6)
    for axes, name, words in zip(
        figure.subplots(1, 2), ("cosine", "effective_rank"), ("validation cosine", "effective rank / the data's"),
        strict=True,
    ):  # fmt: skip
        for colour, (label, curves) in zip(("tab:red", "tab:blue"), found.items(), strict=False):
            for seed, of in enumerate(curves):
                axes.plot(of["epochs"], of[name], color=colour, alpha=0.8, marker="o", markersize=3,
                          label=label if seed == 0 else None)  # fmt: skip
        axes.axvline(3.5, color="0.6", linestyle=":", linewidth=0.8)
        axes.set_xlabel("epoch; guards of 0.01 from the 4th on")
        axes.set_ylabel(words)
        axes.legend(fontsize=8)
    return figure


# Rates, and what the parts cost


def rates(asked: argparse.Namespace) -> dict[str, Any]:
    """Of each model at each rate, one seed: contrastive accuracy and R@5 of the validation split."""
    found: dict[str, Any] = {}
    for label, overrides in MODELS.items():
        lr = 2.0e-3 if "latent_memory" in overrides[0] else 1.0e-3  # conf/experiment
        for rate in RATES:
            folder = seeded(f"{label} x{rate}", [*overrides, f"optim.lr={lr * rate:g}"], 0, asked)
            if folder is not None:
                report = json.loads((folder / "report.json").read_text())
                values = [report["val_contrastive_accuracy"], report["val_recall_at_5"]]
                found.setdefault(label, {})[str(rate)] = values
    return found


def rate_lines(found: dict[str, Any]) -> str:
    """A table: accuracy / R@5."""
    lines = [tables.line(["validation: contrastive accuracy / R@5", *(f"rate × {rate:g}" for rate in RATES)])]
    lines.append("|---" * (1 + len(RATES)) + "|")
    for label, of in found.items():
        cells = [" / ".join(tables.number(x) for x in of[str(rate)]) if str(rate) in of else "–" for rate in RATES]
        lines.append(tables.line([label, *cells]))
    return "\n".join(lines)


def cost(asked: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of training, the runs of a round after each other."""
    found: dict[str, list[float]] = {label: [] for label in COST}
    settings = ["+experiment=latent_p2", "optim.total_steps=160", "module.head=residual"]
    for number in range(COST_ROUNDS):
        for label, overrides in COST.items():
            folder = seeded(f"cost {label} {number}", [*settings, *overrides], 0, asked)
            if folder is not None:
                found[label].append(json.loads((folder / "report.json").read_text())["train_seconds"])
    return found


def cost_lines(found: dict[str, list[float]]) -> str:
    """Each against training with neither, in pairs."""
    lines = [tables.line(["two epochs of P2, guards in every step", "seconds", "against neither"]), "|---|---|---|"]
    for label, seconds in found.items():
        more = [100 * (a / b - 1) for a, b in zip(seconds, found["neither"], strict=True)]
        shown = f"{statistics.median(more):+.1f} % ({min(more):+.1f} to {max(more):+.1f})"
        lines.append(tables.line([label, f"{statistics.median(seconds):.1f}", "–" if label == "neither" else shown]))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["table", "v3"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--data", default="embeddings/sotu", help="folder of embed")
    parser.add_argument("--other", default="embeddings/moby", help="the same, out of domain; empty: none")
    parser.add_argument("--outputs", default="outputs", help="folder of all runs")
    parser.add_argument("--samples", type=int, default=1000, help="windows of the ablations and the roll-out")
    parser.add_argument("--as-it-is", action="store_true", help="train nothing, test what has finished")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    if asked.quick:
        asked.seeds = 1
    known = json.loads((ROOT / NUMBERS).read_text()) if (ROOT / NUMBERS).exists() else {}
    found: dict[str, Any] = known if asked.write else {}
    measured = {"table": table, "v3": v3, "rates": rates, "cost": cost}
    shown: dict[str, Any] = {"table": lines_of, "v3": v3_lines, "rates": rate_lines, "cost": cost_lines}
    for part in asked.parts:
        found[part] = measured[part](asked)
    print("\n\n".join(shown[part](found[part]) for part in asked.parts))
    if asked.write:
        write_atomically(ROOT / NUMBERS, json.dumps(tables.finite(found), indent=1, allow_nan=False) + "\n")
        if "v3" in found:
            save(v3_figure(found["v3"]), ROOT / PICTURE)
        parts = [shown[part](found[part]) for part in PARTS if part in found]
        page = (ROOT / PAGE).read_text(encoding="utf-8")
        write_atomically(ROOT / PAGE, inserted(page, "\n\n".join(parts), TABLE))


if __name__ == "__main__":
    main()
