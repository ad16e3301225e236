"""Generation from a run folder, and the draws after it."""

import sys
from pathlib import Path

import pytest
import torch

from atlas_lm.cli import generate
from atlas_lm.model import sampling
from atlas_lm.runs.load import load_model
from atlas_lm.runs.resolve import resolve_checkpoint
from tests.support.launching import FEW_STEPS, SMALL_MODEL, launch, only_run


def test_a_run_continues_a_prompt(basic_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate.main([f"run={basic_run}", "prompt=the quick", "tokens=20"])
    first = capsys.readouterr().out
    assert first.startswith("the quick")
    generate.main([f"run={resolve_checkpoint(basic_run)}", "prompt=the quick", "tokens=20"])
    assert capsys.readouterr().out == first, "a checkpoint and its run say the same, seed for seed"
    generate.main([f"run={basic_run}", "prompt=the quick", "tokens=20", "seed=1"])
    assert capsys.readouterr().out != first


def test_decoding_is_the_argmax_of_the_parallel_forward(basic_run: Path) -> None:
    """Greedy decoding token by token, against the logits of one call over prompt and continuation (M14)."""
    model = load_model(resolve_checkpoint(basic_run))
    prompt = torch.arange(97, 117).unsqueeze(0)
    written = sampling.generate_tokens(model, prompt, tokens=30, temperature=0)
    both = torch.cat([prompt, written], dim=1)
    with torch.inference_mode():
        logits = model(both, model.initial_state(1)).logits
    assert torch.equal(logits[:, 19:-1].argmax(-1), written)


def test_top_k_and_temperature() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([[0.0, 5.0, 4.0, -1.0]])
    drawn = {int(sampling.draw(logits, 10.0, 2, generator)) for _ in range(200)}
    assert drawn == {1, 2}
    assert int(sampling.draw(logits, 0.0, 4, generator)) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run=x", "promt=a"], "did you mean 'prompt'"),
        (["prompt=a"], "run= is missing"),
        (["run=x", "tokens=many"], "tokens=many must be a whole number"),
        (["run=x", "tokens=0"], "tokens=0"),
        (["run=x", "temperature=nan"], "temperature=nan at least 0"),
        (["run=nowhere"], "no run 'nowhere'"),
    ],
)
def test_bad_arguments(arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        generate.main(arguments)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        generate.main(["--help"])
    out = capsys.readouterr().out
    assert out.startswith("usage: python -m atlas_lm generate run=... [key=value ...]")
    assert "temperature=0.8  0: always the likeliest token" in out


def test_an_empty_prompt_is_refused(basic_run: Path) -> None:
    model = load_model(resolve_checkpoint(basic_run))
    with pytest.raises(ValueError, match="prompt is empty"):
        sampling.generate_tokens(model, torch.zeros(1, 0, dtype=torch.long), tokens=1)


def test_a_run_that_is_no_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert launch("data=recall", "data.source.samples=100", *SMALL_MODEL, *FEW_STEPS) == 0
    with pytest.raises(ValueError, match="not trained on text"):
        generate.main([f"run={only_run(tmp_path / 'outputs')}", "prompt=a"])
