"""Are planted faults noticed? Detection rates and AUROC, with false alarms: python -m benchmarks.detection

A model writes after clean prompts, as it is and with each fault of `inspection_faults`; two more need no change of the
model: a prompt of which only the end is left, and greedy loops of period 1 to 12, which are read token by token in the
place of what it would write. Thresholds come from other prompts (`inspect calibrate`). For each fault: how often a flag
is raised, and the AUROC of `unusual`, of the flags' own figures and of the cheap scores, against the sound generations.

python -m benchmarks.detection run=stage1
python -m benchmarks.detection model=<folder> text=<file of clean text> out=<file>
"""

from __future__ import annotations

import json
import math
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torchmetrics.functional.classification import binary_auroc

from atlas_lm.cli import inspect_calibrate, inspect_subject
from atlas_lm.cli.arguments import call, parse
from atlas_lm.files import write_atomically
from atlas_lm.inspection.calibrate import calibrate
from atlas_lm.inspection.capture import Plan
from atlas_lm.inspection.health import Thresholds, flags_of, unusual
from atlas_lm.inspection.schema import Report
from atlas_lm.inspection.subject import Subject, inspect_ids
from benchmarks.inspection_faults import PERMANENT, faults_of

PERIODS = range(1, 13)
LEFT = 4  # tokens of a prompt that is cut off
RESAMPLED = 1000
CHEAP = ("sequence_log2_probability", "perplexity", "mean_entropy_bits", "max_entropy_bits")


@dataclass
class Options:
    """Plant faults into a model while it writes, and see which of its flags are raised."""

    run: str = ""
    """Run folder or experiment of ours; or give model= and text=."""
    model: str = ""
    """Folder of a model of transformers."""
    gguf: str = ""
    """File of quantised weights in that folder."""
    text: str = ""
    """File of clean text, for model=."""
    prompts: int = 50
    """For each fault, as many for the thresholds, and as many that stay sound."""
    loops: int = 50
    """Loops of each period."""
    prompt_tokens: int = 48
    """Tokens of a prompt."""
    tokens: int = 48
    """Tokens to write."""
    only: str = ""
    """Faults whose names begin so; the others stay as the file has them."""
    out: str = "docs/results/detection.json"
    """File for all figures; the table is printed."""
    outputs: str = "outputs"
    """Folder of all runs."""

    def __post_init__(self) -> None:
        inspect_subject.check_subject(self.run, self.model)


def scores_of(report: Report, thresholds: Thresholds) -> dict[str, float]:
    """Every number that could show a fault, larger for the worse where that is known; NaN where there is none."""
    baselines = report.baselines.model_dump()
    found = {f"baseline {name}": baselines[name] for name in CHEAP}
    found["unusual"] = unusual(report.summary, thresholds)
    found |= {f"flag {flag.name}": flag.value for flag in flags_of(report, thresholds)}
    return {name: math.inf if value is None else float(value) for name, value in found.items()}


def auroc(bad: Sequence[float], sound: Sequence[float]) -> float:
    """Probability that a bad one scores higher than a sound one, ties counted half; ∞ is the largest of all."""
    both = [*bad, *sound]
    ranks = {value: n / len(both) for n, value in enumerate(sorted(set(both)))}
    target = torch.tensor([1] * len(bad) + [0] * len(sound))
    return float(binary_auroc(torch.tensor([ranks[x] for x in both]), target))


def with_interval(bad: Sequence[float], sound: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """AUROC and its 95 % interval over resampled generations."""
    draw = random.Random(seed)
    found = sorted(auroc(draw.choices(bad, k=len(bad)), draw.choices(sound, k=len(sound))) for _ in range(RESAMPLED))
    return auroc(bad, sound), found[int(0.025 * RESAMPLED)], found[int(0.975 * RESAMPLED)]


def prompts_of(o: Options, subject: Subject) -> list[list[int]]:
    """Three times as many as a fault needs: for thresholds, sound ones, and those that faults are planted in."""
    calibration = inspect_calibrate.Calibration(
        run=o.run, model=o.model, gguf=o.gguf, text=o.text, texts=max(8, 3 * o.prompts), outputs=o.outputs
    )
    texts = inspect_calibrate.clean_texts(calibration, subject, o.prompt_tokens)
    return [subject.encode(text)[: o.prompt_tokens] for text in texts]


def loop_of(subject: Subject, ids: list[int], period: int, seed: int, tokens: int) -> Report:
    """A generation that repeats the first tokens the model itself writes; where these end the text, the prompt's."""
    own = inspect_ids(subject, ids, "", Plan(tokens=period, seed=seed, capture="off"), Thresholds(), "").steps.token_ids
    ends = getattr(getattr(subject, "model", None), "generation_config", None)
    end = getattr(ends, "eos_token_id", None)
    ending = set(end if isinstance(end, list) else [end])
    own = [token for token in [*own, *ids] if token not in ending][:period]
    n = max(tokens, 4 * period)
    forced = tuple((own * (n // len(own) + 1))[:n])
    return inspect_ids(subject, ids, "", Plan(tokens=n, forced=forced, seed=seed), Thresholds(), "")


def measure(o: Options, subject: Any, tick: Callable[[str], None]) -> dict[str, Any]:
    """All generations, and what is found in them."""
    prompts = prompts_of(o, subject)
    n = o.prompts
    plan = Plan(tokens=o.tokens)
    thresholds = calibrate([_one(subject, ids, seed, plan) for seed, ids in enumerate(prompts[:n])])
    tick("thresholds")
    sound = [_one(subject, ids, 10_000 + seed, plan) for seed, ids in enumerate(prompts[n : 2 * n])]
    tick("sound")
    bad: dict[str, list[Report]] = {}
    for name, fault in faults_of(subject).items():
        if not name.startswith(o.only):
            continue
        throughout = name in PERMANENT
        with fault(subject) if throughout else nullcontext():
            bad[name] = []
            for seed, ids in enumerate(prompts[2 * n : 3 * n]):
                with nullcontext() if throughout else fault(subject):  # each generation meets it at the same step
                    bad[name].append(_one(subject, ids, 20_000 + seed, plan))
        tick(name)
    if "prompt cut off".startswith(o.only):
        bad["prompt cut off"] = [
            _one(subject, ids[-LEFT:], 20_000 + s, plan) for s, ids in enumerate(prompts[2 * n : 3 * n])
        ]
        tick("prompt cut off")
    for period in PERIODS if "loop of".startswith(o.only[:7]) else ():
        some = [prompts[(2 * n + i) % len(prompts)][-16:] for i in range(o.loops)]
        bad[f"loop of {period}"] = [loop_of(subject, ids, period, s, 3 * period + 6) for s, ids in enumerate(some)]
        tick(f"loop of {period}")
    return {
        "model": subject.info.model_dump(), "options": vars(o), "thresholds": thresholds.model_dump(mode="json"),
        "false_alarms": false_alarms(sound, thresholds),
        "faults": {name: judged(reports, sound, thresholds) for name, reports in bad.items()},
    }  # fmt: skip


def _one(subject: Subject, ids: list[int], seed: int, plan: Plan) -> Report:
    return inspect_ids(subject, ids, "", Plan(**{**vars(plan), "seed": seed}), Thresholds(), "")


def false_alarms(sound: Sequence[Report], thresholds: Thresholds) -> dict[str, float]:
    """Share of sound generations in which each flag is raised, and in which any is."""
    raised = [{flag.name for flag in flags_of(report, thresholds) if flag.fired} for report in sound]
    names = [flag.name for flag in flags_of(sound[0], thresholds)]
    rates = {name: statistics.fmean(name in found for found in raised) for name in names}
    return {**rates, "any": statistics.fmean(bool(found) for found in raised)}


def judged(bad: Sequence[Report], sound: Sequence[Report], thresholds: Thresholds) -> dict[str, Any]:
    """Rates of flags and AUROC of every score, with intervals."""
    rates = false_alarms(bad, thresholds)
    of_bad, of_sound = ([scores_of(report, thresholds) for report in reports] for reports in (bad, sound))
    found = {}
    for name in of_sound[0]:
        worse, better = ([scores[name] for scores in some if name in scores] for some in (of_bad, of_sound))
        if len(worse) == len(bad):
            found[name] = with_interval(worse, better)
    return {"generations": len(bad), "raised": rates, "auroc": found}


def table(content: dict[str, Any]) -> str:
    """Markdown: a fault a row."""
    lines = ["| fault | noticed | by | AUROC of `unusual` | best cheap score |", "|---|---|---|---|---|"]
    for name, found in content["faults"].items():
        rates = {flag: rate for flag, rate in found["raised"].items() if flag != "any" and rate > 0}
        by = ", ".join(f"{flag} {rate:.0%}" for flag, rate in sorted(rates.items(), key=lambda x: -x[1])[:3])
        cheap = {k.removeprefix("baseline "): v for k, v in found["auroc"].items() if k.startswith("baseline ")}
        # a score that falls where others rise is as good, turned round
        best = max(cheap, key=lambda k: abs(cheap[k][0] - 0.5))
        lines.append(
            f"| {name} | {found['raised']['any']:.0%} | {by or '–'} | {interval(found['auroc'].get('unusual'))} | "
            f"{best} {interval(cheap[best])} |"
        )
    alarms = content["false_alarms"]
    named = ", ".join(f"{flag} {rate:.0%}" for flag, rate in alarms.items() if rate and flag != "any")
    lines.append(f"| none (false alarms) | {alarms['any']:.0%} | {named or '–'} | | |")
    return "\n".join(lines)


def interval(found: Sequence[float] | None) -> str:
    return "–" if found is None else f"{found[0]:.2f} [{found[1]:.2f}, {found[2]:.2f}]"


def main(arguments: list[str]) -> None:
    o = parse(Options, arguments, "python -m benchmarks.detection")
    subject, _ = inspect_subject.open_subject(
        inspect_calibrate.Calibration(run=o.run, model=o.model, gguf=o.gguf, text=o.text or "-", outputs=o.outputs)
    )
    content = measure(o, subject, lambda what: print(what, file=sys.stderr, flush=True))
    path = Path(o.out)
    if o.only:
        before = json.loads(path.read_text(encoding="utf-8"))
        same = ("prompts", "prompt_tokens", "tokens", "loops", "text")
        if any(before["options"][name] != vars(o)[name] for name in same):
            raise ValueError(f"out={path} was measured with other options: give {', '.join(same)} as there")
        content |= {"options": before["options"], "faults": {**before["faults"], **content["faults"]}}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    print(table(content))


if __name__ == "__main__":
    call(main)
