"""`model.checkpoint: block`: the same gradients bit for bit, and nothing of a block is kept but its inputs."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as nnf

from atlas_lm.memory.loop import autograd as torch_loop
from atlas_lm.memory.loop import cpu as cpu_loop
from atlas_lm.model.atlas import AtlasLM
from tests.support.model_cases import build, make_tokens

PATHS = ["compiled", "torch"]


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(cpu_loop, "can_run", lambda *_: False)
    return request.param


def loss_of(model: AtlasLM, tokens: Tensor) -> Tensor:
    logits, gates, _ = model(tokens[:, :-1])
    return nnf.cross_entropy(logits.mT, tokens[:, 1:]) + sum(gate.square().mean() for gate in gates)


def made(**changes: Any) -> AtlasLM:
    torch.manual_seed(0)
    return build(**changes).train()


CHANGES = [{}, {"memory": "none"}, {"memory": "gated_delta"}, {"network": "linear"}, {"update": "newton_schulz"},
           {"context": 4}, {"radius": 0.05}]  # fmt: skip


@pytest.mark.parametrize("changes", CHANGES, ids=str)
@pytest.mark.parametrize("low", [False, True])
def test_gradients_are_bitwise_the_same(path: str, changes: dict[str, Any], low: bool) -> None:
    tokens, found = make_tokens(61), []
    for kind in ("none", "block"):
        model = made(checkpoint=kind, **changes)
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss = loss_of(model, tokens)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def factors_alive(monkeypatch: pytest.MonkeyPatch, path: str, kind: str) -> tuple[int, int]:
    """How many of the tensors that a chunk keeps for the way back live after the forward pass, of how many."""
    kept: list[weakref.ref] = []
    if path == "torch":
        plain = torch_loop.learn_and_read

        def learn_and_read(*arguments: Any) -> Any:
            y, record = plain(*arguments)
            kept.append(weakref.ref(record.pre))
            return y, record

        monkeypatch.setattr(torch_loop, "learn_and_read", learn_and_read)
    else:
        call = cpu_loop._call

        def noted(config: Any, sizes: Any, x: Any, tensors: dict[str, Any]) -> None:
            kept.append(weakref.ref(tensors["pre"]))
            call(config, sizes, x, tensors)

        monkeypatch.setattr(cpu_loop, "_call", noted)
    loss = loss_of(made(checkpoint=kind), make_tokens(61))
    gc.collect()
    alive, count = sum(ref() is not None for ref in kept), len(kept)
    loss.backward()
    return alive, count


def test_what_chunks_keep_is_let_go(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    alive, count = factors_alive(monkeypatch, path, "none")
    assert alive == count > 0
    monkeypatch.undo()
    if path == "torch":
        monkeypatch.setattr(cpu_loop, "can_run", lambda *_: False)
    alive, count = factors_alive(monkeypatch, path, "block")
    assert alive == 0 < count


def test_evaluation_and_streams_are_what_they_were() -> None:
    tokens = make_tokens(40)
    plain, again = made().eval(), made(checkpoint="block")
    with torch.no_grad():
        assert torch.equal(plain(tokens).logits, again(tokens).logits)
    state = again(tokens, again.initial_state(2)).state
    assert torch.equal(state[0].attention.k, plain(tokens, plain.initial_state(2)).state[0].attention.k)
