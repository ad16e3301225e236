"""evaluate: runs side by side, from the command line; needles that are answered and needles that are not."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atlas_lm.cli import evaluate as command
from atlas_lm.data.interfaces import UNSCORED
from atlas_lm.data.tokenizers import ByteTokenizer
from atlas_lm.evaluation.needles import TASKS, answered, example
from atlas_lm.evaluation.subject import Text


def arguments(*runs: Path, **changes: Any) -> list[str]:
    named = ",".join(map(str, runs))
    given = {"run": named, "sequences": 4, "length": 96, "block": 8, "lengths": "1,2", "chunks": "1,4"}
    return [f"{name}={value}" for name, value in {**given, **changes}.items()]


@pytest.mark.long
def test_all_suites_of_two_runs(
    guarded_run: Path, basic_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command.main(arguments(guarded_run, basic_run, out=tmp_path, lengths="4,8"))
    found = json.loads((tmp_path / "evaluation.json").read_text())["tables"]
    printed = capsys.readouterr().out
    for name, table in found.items():
        assert len(table["runs"]) >= 1, name
        assert table["title"] in printed
        for cells in table["runs"].values():
            assert all(v["low"] <= v["mean"] <= v["high"] for v in cells.values() if v["mean"] is not None)
    assert {"position", "horizon", "state", "chunks", "needles S-NIAH-1"} <= set(found)
    assert len(list(tmp_path.glob("evaluation_*.png"))) == len(found)
    assert (tmp_path / "evaluation.md").read_text().count("## ") == len(found)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"suite": "positon"}, r"suite=positon .*did you mean 'position'"),
        ({"sequences": 1}, "sequences=1"),
        ({"lengths": "1,x"}, "lengths=1,x"),
        ({"chunks": "0"}, "chunks=0"),
        ({"block": 96}, "block=96"),
        ({"run": "nowhere"}, "nowhere"),
    ],
)
def test_bad_arguments(guarded_run: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        command.main(arguments(guarded_run, **changes))


class Knowing(torch.nn.Module):
    """Answers what was stated, by looking it up; `knows`: whether it does, or says 0 all the time."""

    def __init__(self, knows: bool) -> None:
        super().__init__()
        self.knows = knows

    def forward(self, tokens: torch.Tensor) -> Any:
        logits = torch.zeros(*tokens.shape, 257)
        for row, ids in enumerate(tokens.tolist()):
            text = bytes(i % 256 for i in ids)
            for at in range(len(ids)):
                start = text.rfind(b"[", 0, at + 1)
                lead = text[start : at + 1]
                first = text.find(lead) if b"=" in lead and start >= 0 else -1
                after = text[first + len(lead)] if self.knows and 0 <= first < start else ord("0")
                logits[row, at, after] = 1.0
        return type("Output", (), {"logits": logits})


@pytest.mark.parametrize("name", ["S-NIAH-1", "S-NIAH-2", "S-NIAH-3", "multi-key", "multi-query"])
def test_a_needle_that_is_known_is_answered_and_one_that_is_not_is_not(name: str) -> None:
    text = np.frombuffer(b"All work and no play makes Jack a dull boy. " * 20, dtype=np.uint8).astype(np.int64)
    rows = [example(TASKS[name], ByteTokenizer(), text, 300, seed) for seed in range(6)]
    tokens, targets = (torch.stack([getattr(row, part) for row in rows]) for part in ("tokens", "targets"))
    assert tokens.shape == targets.shape == (6, 300)
    for row in rows:  # the floor counts those that are asked for within one window
        text_of_row = bytes(int(i) % 256 for i in row.tokens)
        asked = [m.start() for m in re.finditer(rb"\[", text_of_row)][-TASKS[name].asked :]
        back = [at - text_of_row.find(text_of_row[at : at + 6]) for at in asked]
        assert row.distance == max(back)
    questions = TASKS[name].asked * TASKS[name].digits
    assert (targets != UNSCORED).sum(1).tolist() == [questions] * 6
    for knows in (True, False):
        found = answered(Knowing(knows), Text(tokens, targets), lambda n: None)  # type: ignore[arg-type]
        assert found.all() == knows
        assert found.any() == knows


def test_values_of_one_key_are_asked_for_in_their_order() -> None:
    text = np.full(400, ord("x"))
    tokens, targets, _ = example(TASKS["multi-value"], ByteTokenizer(), text, 300, 0)
    row = bytes(tokens.tolist()).decode()
    stated, asked = row.split("]\n")[:4], row.split("]\n")[4:8]
    assert [s.rpartition("[")[2] for s in stated] == [s.rpartition("[")[2].rstrip("]") for s in asked][:4]
    assert (targets != UNSCORED).sum() == 12


def test_too_short_a_haystack_is_named() -> None:
    with pytest.raises(ValueError, match="30 tokens have no room"):
        example(TASKS["multi-query"], ByteTokenizer(), np.zeros(31, dtype=np.int64), 30, 0)
