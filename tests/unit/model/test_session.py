"""A stream as an object: reads as the model does, freezes, forks, joins others, and continues from a file."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from atlas_lm.model.atlas import AtlasLM
from atlas_lm.model.session import Session, read_together
from tests.support.model_cases import build, make_tokens


def read(session: Session, tokens: torch.Tensor, cuts: list[int]) -> torch.Tensor:
    return torch.cat([session.read(part) for part in tokens.tensor_split(cuts, dim=1)], dim=1)


@pytest.fixture
def model() -> AtlasLM:
    torch.manual_seed(0)
    return build().eval()


def test_it_reads_as_the_model_does(model: AtlasLM) -> None:
    tokens = make_tokens(30)
    with torch.no_grad():
        expected = model(tokens, model.initial_state(2)).logits
    session = model.stream(2)
    assert torch.allclose(read(session, tokens, [1, 8, 20]), expected, atol=1e-5)
    assert session.age == 30
    assert torch.allclose(model.stream(2).read(tokens, piece=7), expected, atol=1e-5)


def test_frozen_memories_answer_and_do_not_change(model: AtlasLM) -> None:
    tokens = make_tokens(40)
    session = model.stream(2)
    session.read(tokens[:, :25])
    before, fork = session.state, session.fork()
    frozen = session.read(tokens[:, 25:], write=False)
    for old, new in zip(before, session.state, strict=True):
        assert torch.equal(old.memory.projection.M, new.memory.projection.M)
        assert torch.equal(old.memory.projection.n, new.memory.projection.n)
        assert not torch.equal(old.attention.k, new.attention.k), "attention moves on"
    assert not torch.allclose(frozen, fork.read(tokens[:, 25:]), atol=1e-6)


def test_what_is_read_frozen_is_never_learned(model: AtlasLM) -> None:
    """After the end of every chunk that was begun: fast weights bitwise those of a stream that read nothing then."""
    model.set_local_chunks((3, 6))
    start, other, rest = make_tokens(24), make_tokens(24, seed=1), make_tokens(24, seed=2)
    states = []
    for meanwhile in (other, rest):
        session = model.stream(2)
        session.read(start)  # ends every chunk: 3, 6 and 8 divide 24
        session.read(meanwhile, write=False)
        states.append(session.state)
    for ours, theirs, after in zip(*states, states[0], strict=True):
        for a, b in zip(ours.memory.local_memories, theirs.memory.local_memories, strict=True):
            assert all(map(torch.equal, a.change + a.momentum, b.change + b.momentum))
        assert all(map(torch.equal, after.memory.global_memory.change, theirs.memory.global_memory.change))
    untouched = model.stream(2)
    untouched.read(start)
    for a, b in zip(untouched.state, states[0], strict=True):
        pairs = zip(
            (a.memory.global_memory, *a.memory.local_memories), (b.memory.global_memory, *b.memory.local_memories),
            strict=True,
        )  # fmt: skip
        assert all(torch.equal(x, y) for old, new in pairs for x, y in zip(old.change, new.change, strict=True))


def test_a_fork_knows_nothing_of_the_other(model: AtlasLM) -> None:
    tokens = make_tokens(30)
    session = model.stream(2)
    session.read(tokens[:, :11])
    fork = session.fork()
    session.read(make_tokens(9, seed=5))
    expected = read(model.stream(2), tokens, [11])[:, 11:]
    assert torch.equal(fork.read(tokens[:, 11:]), expected)


def test_a_saved_session_continues_bit_for_bit_in_another_process(model: AtlasLM, tmp_path: Path) -> None:
    tokens = make_tokens(40)
    session = model.stream(2)
    session.read(tokens[:, :23])
    session.save(tmp_path / "state.pt")
    torch.save((model.state_dict(), tokens), tmp_path / "rest.pt")
    code = """
import sys, torch
from atlas_lm.model.session import Session
from tests.support.model_cases import build
weights, tokens = torch.load(sys.argv[1] + "/rest.pt", weights_only=True)
model = build().eval()
model.load_state_dict(weights)
session = Session.load(model, sys.argv[1] + "/state.pt")
assert session.age == 23
torch.save(session.read(tokens[:, 23:]), sys.argv[1] + "/logits.pt")
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), session.read(tokens[:, 23:]))


@pytest.mark.parametrize("content", [b"", b"no state", b"\x80\x04K\x01."])
def test_a_file_that_is_no_state_is_named(model: AtlasLM, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "state.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"state\.pt"):
        Session.load(model, path)
    with pytest.raises(ValueError, match="nowhere"):
        Session.load(model, tmp_path / "nowhere")
    torch.save({"format": "another"}, path)
    with pytest.raises(ValueError, match=r"state\.pt"):
        Session.load(model, path)


def test_a_state_of_other_weights_is_refused(model: AtlasLM, tmp_path: Path) -> None:
    model.stream().save(tmp_path / "state.pt")
    with torch.no_grad():
        model.embed.weight[0, 0] += 1
    with pytest.raises(ValueError, match="other weights"):
        Session.load(model, tmp_path / "state.pt")


@pytest.mark.parametrize("changes", [{}, {"attention_conv": 3, "share_qkv": True}], ids=str)
def test_sessions_of_different_ages_read_together(changes: dict[str, Any]) -> None:
    model = build(**changes).eval()
    ages = [0, 5, 29, 29, 53, 24 + 29]
    tokens, more = make_tokens(60, batch=6), make_tokens(9, batch=6, seed=3)
    together, alone = [], []
    for row, age in enumerate(ages):
        for sessions in (together, alone):
            session = model.stream()
            if age:
                session.read(tokens[row : row + 1, :age])
            sessions.append(session)
    found = read_together(together, more)
    expected = torch.cat([session.read(more[row : row + 1]) for row, session in enumerate(alone)])
    assert torch.allclose(found, expected, atol=1e-5)
    again = read_together(together, more)
    assert torch.allclose(again, torch.cat([s.read(more[i : i + 1]) for i, s in enumerate(alone)]), atol=1e-5)
    assert [session.age for session in together] == [age + 18 for age in ages]


def test_sessions_at_one_place_of_their_chunks_run_as_one_batch(model: AtlasLM) -> None:
    calls = []
    model.register_forward_pre_hook(lambda _, arguments: calls.append(len(arguments[0])))
    sessions = [model.stream(), model.stream(), model.stream()]
    period = 168  # 3, 7 and 8 divide it
    sessions[1].read(make_tokens(period, batch=1))
    sessions[2].read(make_tokens(2 * period, batch=1))
    calls.clear()
    read_together(sessions, make_tokens(4, batch=3))
    assert sorted(calls) == [1, 2], "the one that has read nothing has an empty window"


def test_sessions_of_two_models_cannot(model: AtlasLM) -> None:
    with pytest.raises(ValueError, match="different models"):
        read_together([model.stream(), build().stream()], make_tokens(3))
