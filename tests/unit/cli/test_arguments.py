"""key=value arguments: typed by a dataclass, refused with a remedy, explained by --help."""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from atlas_lm.cli.arguments import call, describe, parse
from tests.support import ROOT


@dataclass
class Plain:
    """What the tests ask for."""

    run: str
    """Run folder
    or experiment."""
    steps: int = 3
    """How many."""
    rate: float = 0.5
    fast: bool = False
    """Whether to hurry."""
    folder: Path = Path("here")
    limit: int | None = None
    note: str = field(default="", metadata={"help": "From the metadata."})

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps={self.steps} must be at least 0")


@dataclass
class WithRest:
    paths: list[str] = field(default_factory=list)
    """What to read."""
    out: str = ""


def test_every_type() -> None:
    found = parse(Plain, ["run=a=b", "steps=7", "rate=1e-3", "fast=Yes", "folder=x/y", "limit=4", "note="])
    assert found == Plain("a=b", 7, 1e-3, True, Path("x/y"), 4, "")
    assert [type(value) for value in vars(found).values()] == [str, int, float, bool, type(Path()), int, str]


def test_defaults() -> None:
    assert parse(Plain, ["run=a"]) == Plain("a")
    assert parse(Plain, ["run=a", "limit=none", "fast=0"]) == Plain("a")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "run= is missing: Run folder or experiment; --help"),
        (["run="], "run= is missing"),
        (["run=a", "step=1"], "unknown argument 'step=1'.*key one of run, steps.*did you mean 'steps'"),
        (["run=a", "steps"], "unknown argument 'steps': give key=value.*did you mean 'steps'"),
        (["run=a", "--steps=1"], "unknown argument '--steps=1'.*did you mean 'steps'"),
        (["run=a", "steps=many"], "steps=many must be a whole number"),
        (["run=a", "steps=1.5"], "steps=1.5 must be a whole number"),
        (["run=a", "limit=1e3"], "limit=1e3 must be a whole number"),
        (["run=a", "rate="], "rate= must be a number"),
        (["run=a", "fast=maybe"], "fast=maybe must be true or false"),
        (["run=a", "run=b"], "run= is given twice"),
        (["run=a", "steps=-1"], "steps=-1 must be at least 0"),
    ],
)
def test_what_is_wrong_is_named(arguments: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse(Plain, arguments)


def test_arguments_without_a_key_go_together() -> None:
    found = parse(WithRest, ["outputs/a", "out=x", "outputs/lr=0.1/b", "*"])
    assert found == WithRest(["outputs/a", "outputs/lr=0.1/b", "*"], "x")
    assert parse(WithRest, []) == WithRest([], "")
    for argument in ("oout=x", "--verbose"):
        with pytest.raises(ValueError, match="unknown argument"):
            parse(WithRest, [argument])


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_names_every_option_and_ends(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        parse(Plain, ["nonsense", flag], "python -m tool")
    assert ending.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "usage: python -m tool run=... [key=value ...]"
    assert lines[2] == "What the tests ask for."
    assert [line.split() for line in lines[4:]] == [
        ["run=...", *["Run", "folder", "or", "experiment", "(required)"]],
        ["steps=3", "How", "many"],
        ["rate=0.5"],
        ["fast=False", *["Whether", "to", "hurry"]],
        ["folder=here"],
        ["limit=..."],
        ["note=...", *["From", "the", "metadata"]],
    ]


def test_help_of_arguments_without_a_key() -> None:
    text = describe(WithRest, "tool")
    assert text.startswith("usage: tool paths... [key=value ...]\n")
    assert "  paths...  What to read" in text


def test_a_command_answers_a_user_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(arguments: list[str]) -> Any:
        return parse(Plain, arguments)

    monkeypatch.setattr(sys, "argv", ["tool", "run=a", "steps=x"])
    with pytest.raises(SystemExit) as ending:
        call(main)
    assert ending.value.code == "error: steps=x must be a whole number"

    def bug(arguments: list[str]) -> None:
        raise KeyError("a bug keeps its traceback")

    with pytest.raises(KeyError):
        call(bug)


@pytest.mark.slow
def test_a_module_as_a_process() -> None:
    """What the shell sees: nothing but the line on stderr, and exit code 1."""
    command = [sys.executable, "-m", "atlas_lm", "compare", "ot=x"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: unknown argument 'ot=x'")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("text", ["${oc.env:PATH}", "${x}", "???", "a: b", "[1", "null", " x "])
def test_text_stays_as_it_was_typed(text: str) -> None:
    assert parse(Plain, [f"run={text}"]).run == text
    assert parse(Plain, ["run=a", f"folder={text}"]).folder == Path(text)
    assert parse(WithRest, [text]).paths == [text]


@pytest.mark.parametrize("value", ["${x}", "???", "${oc.env:PATH}"])
def test_references_are_no_numbers(value: str) -> None:
    with pytest.raises(ValueError, match=r"steps=.* must be a whole number"):
        parse(Plain, ["run=a", f"steps={value}"])
