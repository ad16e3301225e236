"""The command line: judge the gates of a phase, print the table, write exit_gates.json."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.text import Text

from atlas_lm.cli.arguments import HELP, parse
from atlas_lm.cli.errors import explain
from atlas_lm.config.names import nearest
from atlas_lm.config.parsing import read_json
from atlas_lm.exit_gates import chunk_sizes
from atlas_lm.exit_gates import measured_gates as measures
from atlas_lm.exit_gates import recorded_gates as records
from atlas_lm.exit_gates import rollback_drill as rollback
from atlas_lm.exit_gates.artifacts import RunArtifacts
from atlas_lm.exit_gates.result import Gate, GateResult
from atlas_lm.files import write_atomically
from atlas_lm.runs.resolve import resolve_run
from atlas_lm.training.trainer import prepare_process

RESULTS = "exit_gates.json"
COMMAND = "python -m atlas_lm gates"


class Check(NamedTuple):
    """One gate before it is judged."""

    id: str
    name: str
    threshold: str
    measure: Callable[[RunArtifacts], GateResult]
    word: str = "PASSED"


class Phase(NamedTuple):
    """A table of gates."""

    title: str
    checks: tuple[Check, ...]


NEEDLES = f"> {measures.ACCURACY} under {measures.HAYSTACK} pairs, without the needle within ±{measures.CONTROL}"
USED = Check("used", "Memory used beyond attention", "context gain > 0, its interval too", measures.used)
PHASES = {
    "phase2": Phase(
        "PHASE 2: Training Infrastructure",
        (
            Check("G2-1", "Chunk sizes", "as decided in conf/decisions", chunk_sizes.locked, "DECIDED"),
            Check("G2-2", "NIAH frequency", "< 1 % of training time, >= 5 probes", records.niah_frequency, "LOCKED"),
            Check("G2-3", "Q-K projection norm", "n == norm_persistent after a reset", measures.norm_in_projection),
            Check("G2-4", "1000 steps stable", ">= 1000 steps, no NaN, no OOM", records.stable),
            Check("G2-5", "NIAH accuracy", NEEDLES, measures.needles),
            Check("G2-6", "Rollback test", "1 forced spike, undone bitwise, training continues", rollback.forced),
            Check("G2-7", "PPL delta telemetry", "as many in metrics.jsonl as in TensorBoard, > 0", records.ppl_delta),
            USED,
        ),
    ),
    "phase4": Phase(
        "PHASE 4: Stage 2 Fine-Tuning",
        (
            Check("G4-1", "Dynamic clip formula", "0.5 * sqrt(32 / C_L), or half of it", records.clipping),
            Check("G4-2", "Rollback count", f"<= {records.ROLLBACKS}", records.rollbacks),
            Check("G4-3", "PPL spike count", f"< {records.SPIKES}", records.spikes),
            Check("G4-4", "Resolution flat", f"std/mean of perplexity < {measures.SPREAD}", measures.resolution),
            Check(
                "G4-5", "Gate polarization", f">= {measures.POLARISED} of gates < 0.1 or > 0.9", measures.polarisation
            ),
            Check("G4-6", "NIAH accuracy", NEEDLES, measures.needles),
            USED,
        ),
    ),
    "used": Phase("MEMORY: used beyond attention", (USED,)),
}


@dataclass
class Options:
    """Judge a run by the exit gates of its phase. Exit code 0 when all pass, else 1."""

    run: str
    """Run folder or experiment, for example run=stage1."""
    sequences: int = 32
    """Validation sequences that the model is measured on."""
    decisions: str = ""
    """Where chunk sizes are decided; conf/decisions/chunk_sizes.yaml of the repository if none is given."""
    outputs: str = "outputs"
    """Folder of all runs."""

    def __post_init__(self) -> None:
        if self.sequences < 1:
            raise ValueError(f"sequences={self.sequences} must be at least 1")


def measure(check: Check, run: RunArtifacts) -> GateResult:
    """What the gate finds; a gate that cannot be measured fails, and the others continue."""
    try:
        return check.measure(run)
    except Exception as error:
        line = explain(error)
        if line is None:  # a bug: its traceback is worth having
            traceback.print_exc()
            line = f"{type(error).__name__}: {error}"
        return GateResult(False, None, " ".join(line.split()))


def judge(phase: Phase, run: RunArtifacts) -> list[Gate]:
    """All gates of a phase. A run that did not finish passes none, whatever is measured."""
    unfinished, gates = run.unfinished(), []
    for check in phase.checks:
        _progress(f"measuring [{check.id}] {check.name}")
        found = measure(check, run)
        if unfinished and unfinished not in found.detail:
            found = GateResult(False, found.measured, f"{unfinished}; {found.detail}")
        gates.append(Gate(check.id, check.name, found.passed, found.measured, check.threshold, found.detail))
    _progress("")
    return gates


def _progress(text: str) -> None:
    """One line that is overwritten on a terminal, else a line each."""
    if sys.stderr.isatty():
        print(f"\r{text:60}\r", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)


def show(name: str, gates: list[Gate], console: Console) -> None:
    """The table: a line for each gate, then the count."""
    phase = PHASES[name]
    words = {check.id: check.word for check in phase.checks}

    def say(*parts: str | tuple[str, str]) -> None:
        console.print(Text.assemble(*parts), soft_wrap=True)

    say(phase.title)
    say("=" * 60)
    for gate in gates:
        word = (words[gate.id], "green") if gate.passed else ("FAILED", "red")
        say(f"[{gate.id}] {gate.name}... ", word, f" ({gate.detail})")
    failed = [gate.id for gate in gates if not gate.passed]
    title = phase.title.partition(":")[0]
    say("")
    say(f"{title} SUMMARY: {len(gates) - len(failed)}/{len(gates)} checkpoints passed")
    say(f"*** {len(failed)} FAILED: {', '.join(failed)} ***" if failed else f"*** ALL {title} CHECKS PASSED ***")


def write(run: Path, name: str, gates: list[Gate]) -> None:
    """exit_gates.json: a list of gates under each phase that was judged; those of another phase stay."""
    path = run / RESULTS
    try:
        known = read_json(path)
    except (OSError, ValueError):  # none yet, or broken: it is measured again
        known = {}
    results = {phase: known[phase] for phase in PHASES if isinstance(known, dict) and phase in known}
    results[name] = [gate.as_json() for gate in gates]
    write_atomically(path, json.dumps(results, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def judge_run(name: str, options: Options, console: Console | None = None) -> list[Gate]:
    """Judge a phase of a run, print the table and write the results. ValueError: no such run."""
    folder = resolve_run(options.run, options.outputs)
    decisions = Path(options.decisions) if options.decisions else chunk_sizes.DECISIONS
    prepare_process(seed=0)
    gates = judge(PHASES[name], RunArtifacts(folder, decisions, options.sequences))
    console = console or Console(highlight=False)
    show(name, gates, console)
    write(folder, name, gates)
    console.print(f"wrote {folder / RESULTS}", soft_wrap=True, markup=False)
    return gates


def usage() -> str:
    """What there is to call."""
    lines = [f"usage: {COMMAND} {name} run=... [key=value ...]" for name in PHASES]
    return "\n".join(
        [*lines, f"usage: {COMMAND} chunk_sizes [key=value ...]", "", "--help after each lists its options"]
    )


def main(arguments: list[str]) -> None:
    """See the package. ValueError: bad arguments or no such run. SystemExit with 1: a gate has failed."""
    name, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if name in HELP:
        print(usage())
    elif name == "chunk_sizes":
        chunk_sizes.run_command(parse(chunk_sizes.Options, rest, f"{COMMAND} chunk_sizes"))
    elif name in PHASES:
        gates = judge_run(name, parse(Options, rest, f"{COMMAND} {name}"))
        if not all(gate.passed for gate in gates):
            raise SystemExit(1)
    else:
        known = (*PHASES, "chunk_sizes")
        raise ValueError(f"what is to be judged? give one of {', '.join(known)}, not {name!r}{nearest(name, known)}")
