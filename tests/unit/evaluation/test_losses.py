"""Losses by context and state: equal to slow direct computations, whether in one piece or streamed."""

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as nnf

from atlas_lm.data.interfaces import UNSCORED
from atlas_lm.evaluation import losses as module
from atlas_lm.evaluation.bootstrap import interval
from atlas_lm.evaluation.losses import after_changes, chunk_size, losses
from atlas_lm.evaluation.subject import Text
from tests.support.model_cases import build, make_tokens


def text_of(rows: int, length: int, seed: int = 0) -> Text:
    tokens = make_tokens(length + 1, batch=rows, seed=seed)
    return Text(tokens[:, :-1], tokens[:, 1:])


def ignore(_: int) -> None:
    pass


def direct(model: torch.nn.Module, text: Text, context: int, block: int) -> torch.Tensor:
    """One sequence at a time, cut by hand; log softmax written out."""
    rows = []
    for tokens, targets in zip(text.tokens_NT, text.targets_NT, strict=True):
        with torch.no_grad():
            logits = model(tokens[None, len(tokens) - context :]).logits[0, -block:].double()
        chances = logits - logits.exp().sum(-1, keepdim=True).log()
        rows.append(-chances[torch.arange(block), targets[-block:]])
    return torch.stack(rows)


@pytest.mark.parametrize("context", [5, 9, 17, 40])
def test_a_block_by_its_context_is_the_direct_computation(context: int) -> None:
    model, text = build(), text_of(5, 40)
    assert torch.allclose(
        losses(model, text.last(context), ignore, last=5).double(), direct(model, text, context, 5), atol=1e-5
    )


def test_streamed_is_the_stream_and_constant_in_its_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = build(), text_of(2, 50)
    with torch.no_grad():
        whole = model(text.tokens_NT, model.initial_state(2)).logits
    expected = nnf.cross_entropy(whole.mT, text.targets_NT, reduction="none")
    monkeypatch.setattr(module, "PARALLEL", 10)
    for piece in (7, 16, 50):
        monkeypatch.setattr(module, "PIECE", piece)
        assert torch.allclose(losses(model, text, ignore), expected, atol=1e-5)


@pytest.mark.parametrize("streamed", [False, True])
def test_memories_restart_where_the_model_has_them_restart(monkeypatch: pytest.MonkeyPatch, streamed: bool) -> None:
    """What stood in another document is of no account, where the configuration says so."""
    monkeypatch.setattr(module, "PARALLEL", 10 if streamed else 100)
    starts = torch.zeros(2, 50, dtype=torch.bool)
    starts[:, 24] = True  # the start of a shard; attention of two windows of 5 reaches back to 16
    for reset in (True, False):
        found = []
        torch.manual_seed(0)
        model = build(reset_at_document=reset, conv=1)
        for seed in (1, 2):
            text = text_of(2, 50)._replace(document_start_NT=starts)
            text.tokens_NT[:, :10] = make_tokens(10, seed=seed)
            found.append(losses(model, text, ignore, last=10))
        assert torch.allclose(*found, atol=1e-6) == reset


def test_batches_are_small_and_every_token_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    model, text, ticks = build(), text_of(7, 20), list[int]()
    whole = losses(model, text, ignore)
    monkeypatch.setattr(module, "BATCH_TOKENS", 40)
    assert torch.allclose(losses(model, text, ticks.append), whole, atol=1e-5)
    assert sum(ticks) == 7 * 20
    assert max(ticks) <= 40


def test_states_of_documents_that_begin_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that restarts at documents: where nothing is written after the last of them, all states are one."""
    model, text = build(reset_at_document=True), text_of(4, 40)
    starts = torch.zeros(4, 40, dtype=torch.bool)
    starts[torch.arange(4), torch.tensor([3, 9, 10, 22])] = True
    found = after_changes(model, text._replace(document_start_NT=starts), 15, 5, ignore)
    monkeypatch.setattr(module, "PARALLEL", 10)  # through a stream too
    expected = losses(model, text._replace(document_start_NT=starts), ignore, last=5)
    assert torch.allclose(found["whole"], expected, atol=1e-5)
    for name in ("frozen", "restarted", "another", "zeroed"):
        assert (found[name] - found["whole"]).abs().amax(1).min() > 1e-6, name
    starts[:, 30] = True
    found = after_changes(model, text._replace(document_start_NT=starts), 15, 5, ignore)
    assert torch.equal(found["restarted"], found["whole"])
    assert torch.equal(found["another"], found["whole"])


def test_changed_states_are_what_they_say() -> None:
    model, text, tail, block = build(), text_of(4, 40), 15, 5
    found = after_changes(model, text, tail, block, ignore)
    tokens, targets = text.tokens_NT, text.targets_NT[:, -block:]
    with torch.no_grad():
        before = model(tokens[:, :-tail], model.initial_state(4)).state
        fresh = model.initial_state(4)
        cases = {
            "whole": before,
            "restarted": tuple(b._replace(memory=f.memory) for b, f in zip(before, fresh, strict=True)),
        }
        for name, state in cases.items():
            logits = model(tokens[:, -tail:], state).logits[:, -block:]
            expected = nnf.cross_entropy(logits.mT, targets, reduction="none")
            assert torch.allclose(found[name], expected, atol=1e-5), name
        other = tokens.roll(1, dims=0)  # the row before has left it
        theirs = model(other[:, :-tail], model.initial_state(4)).state
        mixed = tuple(b._replace(memory=t.memory) for b, t in zip(before, theirs, strict=True))
        expected = nnf.cross_entropy(model(tokens[:, -tail:], mixed).logits[:, -block:].mT, targets, reduction="none")
    assert torch.allclose(found["another"], expected, atol=1e-5)
    for name in ("frozen", "restarted", "another", "zeroed"):
        assert (found[name] - found["whole"]).abs().max() > 1e-6, f"{name} changes something"


def test_one_sequence_has_no_other() -> None:
    with pytest.raises(ValueError, match="raise sequences"):
        after_changes(build(), text_of(1, 40), 15, 5, ignore)


def test_chunk_sizes_are_put_back() -> None:
    model = build()
    before = model.local_chunks
    with chunk_size(model, 4):
        assert set(model.local_chunks) == {4}
    assert model.local_chunks == before
    with chunk_size(model, 10_000):
        assert set(model.local_chunks) == {model.config.shard}


def test_an_interval_resamples_sequences_not_tokens() -> None:
    """Tokens of a sequence that are all alike say no more than one."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 1, generator=generator)
    one, many = interval(rows), interval(rows.expand(-1, 100))
    assert many == pytest.approx(one)
    assert one.low < one.mean < one.high
    assert one.high - one.low == pytest.approx(4 * rows.std().item() / math.sqrt(40), rel=0.25)


def test_holes_count_for_nothing() -> None:
    values = torch.tensor([[1.0, torch.nan], [3.0, 5.0], [torch.nan, torch.nan]])
    assert interval(values).mean == 3.0
    assert math.isnan(interval(values * torch.nan).mean)
    model, text = build(), text_of(2, 20)
    holes = Text(text.tokens_NT, text.targets_NT.clone())
    holes.targets_NT[:, ::2] = UNSCORED
    found = losses(model, holes, ignore)
    assert torch.equal(found.isnan(), holes.targets_NT == UNSCORED)


def test_the_callback_and_the_evaluation_find_the_same_interval() -> None:
    from callbacks.memory_horizon import estimate

    generator = torch.Generator().manual_seed(0)
    given = torch.randn(3, 20, 5, generator=generator)
    gain = estimate(given, [0, 8], reach=8)
    assert (gain.mean, gain.low, gain.high) == pytest.approx(interval(given[1] - given[2]))


@pytest.mark.slow
def test_64_thousand_tokens_need_no_more_than_four(tmp_path: Path) -> None:
    """Peak of resident memory in a process of its own, growing by less than the text would take in one piece."""
    import subprocess
    import sys

    code = """
import resource, sys, torch
from atlas_lm.evaluation.losses import losses
from atlas_lm.evaluation.subject import Text
from tests.support.model_cases import build
model = build(context=1)
peaks = []
for length in (8192, 65536):
    tokens = torch.randint(11, (1, length + 1))
    losses(model, Text(tokens[:, :-1], tokens[:, 1:]), lambda n: None)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
print(*peaks)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    short, long = map(float, done.stdout.split())
    assert long - short < 20, "MiB; the logits and features of 57 thousand more tokens are far more"
