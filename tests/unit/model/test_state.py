"""A stream's state between two calls: detached, saved, loaded."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional as nnf

from atlas_lm.memory.loop import cpu as cpu_loop
from atlas_lm.model.atlas import AtlasLM, detach_state
from tests.support import ROOT
from tests.support.model_cases import VOCABULARY, build

CHANGES = [{}, {"memory": "none"}, {"network": "linear", "update": "newton_schulz"}, {"reset_at_document": True}]


def tensors(value) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [x for part in value for x in tensors(part)] if isinstance(value, tuple) else []


def made(**changes) -> tuple[AtlasLM, Tensor]:
    torch.manual_seed(0)
    return build(**changes), torch.randint(VOCABULARY, (2, 40))


@pytest.mark.parametrize("through_torch", [False, True])
@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_a_stream_is_trained_piece_by_piece(changes, through_torch, monkeypatch):
    if through_torch:
        monkeypatch.setattr(cpu_loop, "can_run", lambda *_: False)
    model, tokens = made(**changes)
    state = model.initial_state(2)
    for start in range(0, 40, 10):
        output = model(tokens[:, start : start + 10], detach_state(state))
        nnf.cross_entropy(output.logits.flatten(0, 1), tokens[:, start : start + 10].flatten()).backward()
        state = output.state
    detached = detach_state(state)
    assert type(detached[0]) is type(state[0])
    assert any(x.requires_grad for x in tensors(state))
    assert not any(x.requires_grad for x in tensors(detached))
    assert all(torch.equal(a, b) for a, b in zip(tensors(state), tensors(detached), strict=True))


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_a_saved_state_continues_bit_for_bit(changes, tmp_path):
    model, tokens = made(**changes)
    with torch.inference_mode():
        state = model(tokens[:, :25], model.initial_state(2)).state
        torch.save(state, tmp_path / "state.pt")
        loaded = torch.load(tmp_path / "state.pt", weights_only=True)
        assert loaded[0]._fields == state[0]._fields
        assert torch.equal(model(tokens[:, 25:], loaded).logits, model(tokens[:, 25:], state).logits)


def test_a_saved_state_is_loaded_by_another_process(tmp_path):
    model, tokens = made()
    torch.save(detach_state(model(tokens, model.initial_state(2)).state), tmp_path / "state.pt")
    script = "import sys, torch, atlas_lm.model.atlas; print(len(torch.load(sys.argv[1], weights_only=True)))"
    command = [sys.executable, "-c", script, str(tmp_path / "state.pt")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "2\n", done.stderr
