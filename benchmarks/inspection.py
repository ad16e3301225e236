"""What an inspection costs, and the tables of docs/inspection.md: python -m benchmarks.inspection run=stage1

Plain generation and generation under inspection take turns in one process, so that a busier minute meets both; the cost
is the median over pairs of how much longer the second took. `draw=true` measures nothing: it puts the tables of
docs/results/inspection.json and of `benchmarks.detection` and `benchmarks.uncertainty` into the page.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from atlas_lm.cli.arguments import call, parse
from atlas_lm.cli.inspect_calibrate import Calibration
from atlas_lm.cli.inspect_subject import open_subject
from atlas_lm.files import ROOT, write_atomically
from atlas_lm.inspection import hugging_face
from atlas_lm.inspection.capture import Plan
from atlas_lm.inspection.subject import Subject
from atlas_lm.model.sampling import generate_tokens
from benchmarks import detection, measuring, uncertainty
from benchmarks.figures import inserted

PAGE = Path("docs") / "inspection.md"
RESULTS = Path("docs") / "results"
NUMBERS = RESULTS / "inspection.json"
CAPTURES = ("full", "sampled")
PROMPT = "The history of the world is the history of"
MARK = "<!-- {name}: python -m benchmarks.{name} -->"


@dataclass
class Options:
    """Time generation with and without inspection, in pairs."""

    run: str = ""
    """Run folder or experiment of ours."""
    model: str = ""
    """Folder of a model of transformers."""
    gguf: str = ""
    """File of quantised weights in that folder."""
    tokens: int = 200
    """Tokens to write."""
    pairs: int = 9
    """Of runs with and without."""
    draw: bool = False
    """Only put the tables into the page."""
    outputs: str = "outputs"
    """Folder of all runs."""


def plain_of(subject: Any, ids: list[int], plan: Plan) -> Callable[[], Any]:
    """Generation as without inspection."""
    prompt = torch.tensor([ids])
    if subject.info.kind == "atlas_lm":
        return lambda: generate_tokens(subject.model, prompt, plan.tokens, plan.temperature, plan.top_k, plan.seed)

    def generate() -> Any:
        torch.manual_seed(plan.seed)
        with torch.inference_mode():
            mask = torch.ones_like(prompt)
            return subject.model.generate(prompt, attention_mask=mask, **hugging_face.arguments_of(plan))

    return generate


def cost(subject: Subject, tokens: int, pairs: int) -> dict[str, Any]:
    """Median share of time that each kind of capture adds, its quartiles, and tokens per second without."""
    ids = subject.encode(PROMPT)
    plain = plain_of(subject, ids, Plan(tokens=tokens, temperature=0.8))
    found: dict[str, list[float]] = {capture: [] for capture in CAPTURES}
    seconds = []
    plain()
    for n in range(pairs):
        print(f"{subject.info.name}: pair {n + 1} of {pairs}", file=sys.stderr, flush=True)
        for capture in CAPTURES:
            plan = Plan(tokens=tokens, temperature=0.8, capture=capture)
            before = measuring.seconds(plain)
            with_it = measuring.seconds(lambda plan=plan: subject.run(ids, plan, "", lambda _: None))  # type: ignore[misc]
            after = measuring.seconds(plain)  # a machine that grows busier in a pair would count as a cost
            found[capture].append(2 * with_it / (before + after) - 1)
            seconds += [before, after]
    return {
        "tokens": tokens, "pairs": pairs, "tokens_per_second": tokens / statistics.median(seconds),
        "cost": {capture: statistics.quantiles(values, n=4) for capture, values in found.items()},
    }  # fmt: skip


def costs(content: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["| model | tokens/s without | full capture | sampled |", "|---|---|---|---|"]
    for name, found in content.items():
        cells = [f"{q[1]:+.1%} (quartiles {q[0]:+.1%}, {q[2]:+.1%})" for q in found["cost"].values()]
        lines.append(f"| {name} | {found['tokens_per_second']:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(root: Path) -> None:
    """The tables of all results that there are."""
    page = (root / PAGE).read_text(encoding="utf-8")
    if (root / NUMBERS).is_file():
        content = json.loads((root / NUMBERS).read_text(encoding="utf-8"))
        page = inserted(page, costs(content), MARK.format(name="inspection"))
    tables = []
    for path in sorted((root / RESULTS).glob("detection*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        o = content["options"]
        loops = f", {o['loops']} loops of each period" if any(n.startswith("loop") for n in content["faults"]) else ""
        tables.append(
            f"{content['model']['name']}, {o['prompts']} prompts of {o['prompt_tokens']} tokens, {o['tokens']} tokens "
            f"written after each{loops}:\n\n{detection.table(content)}"
        )
    if tables:
        page = inserted(page, "\n\n".join(tables), MARK.format(name="detection"))
    if (root / RESULTS / "uncertainty.json").is_file():
        content = json.loads((root / RESULTS / "uncertainty.json").read_text(encoding="utf-8"))
        head = f"{content['model']['name']}: {content['right']} of {content['questions']} questions right."
        page = inserted(page, f"{head}\n\n{uncertainty.table(content)}", MARK.format(name="uncertainty"))
    write_atomically(root / PAGE, page)


def main(arguments: list[str], root: Path = ROOT) -> None:
    o = parse(Options, arguments, "python -m benchmarks.inspection")
    content: dict[str, Any] = {}
    if (root / NUMBERS).is_file():
        content = json.loads((root / NUMBERS).read_text(encoding="utf-8"))
    for run, model in ((o.run, ""), ("", o.model)):
        if (run or model) and not o.draw:
            subject, _ = open_subject(Calibration(run=run, model=model, gguf=o.gguf, text="-", outputs=o.outputs))
            content[subject.info.name] = cost(subject, o.tokens, o.pairs)
    if content and not o.draw:
        write_atomically(root / NUMBERS, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        print(costs(content))
    draw(root)


if __name__ == "__main__":
    call(main)
