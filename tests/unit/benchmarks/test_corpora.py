"""corpora: every candidate is a configuration that exists, and what is measured is what far text gives."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from atlas_lm.evaluation.subject import Text
from benchmarks import corpora, worth


@pytest.mark.parametrize("name", list(corpora.candidates({"mine": "texts/*.txt"})))
def test_every_candidate_composes(name: str, tmp_path: Path) -> None:
    corpus = corpora.candidates({"mine": "texts/*.txt"})[name]
    s = worth.setting("stage1", list(corpus.settings), False, tmp_path)
    cfg = worth.composed("stage1", worth.settings_of(s, "full attention"))
    assert (cfg.model.memory, cfg.model.window, cfg.data.seq_len) == ("none", 1024, 1024)
    assert s.tokens == 2048, "the same budget for all"
    if "needles" in name:
        assert cfg.data.source.window == 64, "what attention sees does not move the questions"


@pytest.mark.parametrize(("repeats", "low", "high"), [(True, 1.5, 2.5), (False, -0.01, 0.01)])
def test_the_gain_is_what_far_text_gives(
    monkeypatch: pytest.MonkeyPatch, repeats: bool, low: float, high: float
) -> None:
    """A model that knows the token 100 places back: of use where the text repeats, and where it sees that far."""
    vocabulary, length, rows = 11, 200, 8
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(vocabulary, (rows, 100), generator=generator)
    again = torch.randint(vocabulary, (rows, 101), generator=generator)
    row = torch.cat([first, first, first[:, :1]] if repeats else [first, again], dim=1)

    class Model:
        config = SimpleNamespace(layers=2, attention_conv=1)

        def __call__(self, tokens: torch.Tensor, **_: Any) -> Any:
            logits = torch.zeros(*tokens.shape, vocabulary)
            if repeats and tokens.size(1) > 99:
                logits[:, 99:] = torch.nn.functional.one_hot(tokens[:, :-99], vocabulary) * 8.0
            return SimpleNamespace(logits=logits)

    subject = SimpleNamespace(trained_length=length, model=Model(), text=lambda *_: Text(row[:, :-1], row[:, 1:]))
    monkeypatch.setattr(corpora, "Subject", lambda _: subject)
    found = corpora.offered("run", window=10, sequences=rows)
    assert (found["reach"], found["length"]) == (28, 200)
    assert low < found["gain"].mean < high
    assert found["gain"].mean + found["loss"].mean == pytest.approx(math.log(vocabulary), abs=0.01)


def test_a_text_without_a_name_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        corpora.main(["--out", str(tmp_path), "--text", "texts/*.txt"])
    assert "texts/*.txt must be NAME=GLOB" in capsys.readouterr().err


def test_the_table_begins_with_the_largest_gain() -> None:
    row = {"loss": (1.0, 1.0, 1.0), "bits_per_byte": None, "steps": 1000}
    text = corpora.table({"a": row | {"gain": (0.01, 0.0, 0.02)}, "b": row | {"gain": (0.5, 0.4, 0.6)}})
    assert text.index("| b |") < text.index("| a |")
    assert "+0.5000 [+0.4000, +0.6000]" in text
