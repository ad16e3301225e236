"""How often a step waits for the device: counted on a CPU, on the way that a GPU takes."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.nn import functional as nnf
from torch.utils._python_dispatch import TorchDispatchMode

from atlas_lm.memory import chunked, network
from atlas_lm.memory.kernels import attention as cpu_attention
from atlas_lm.memory.kernels import convolution as cpu_convolution
from atlas_lm.memory.kernels import delta as cpu_delta
from atlas_lm.memory.kernels import features as cpu_features
from atlas_lm.memory.kernels import norm as cpu_norm
from atlas_lm.memory.loop import cpu as cpu_loop
from atlas_lm.model import attention
from atlas_lm.model.atlas import AtlasLM
from atlas_lm.model.documents import apart
from tests.support.model_cases import build, make_tokens

READS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique_dim", "_unique2"}


class HostReads(TorchDispatchMode):
    """Counts the operations whose result the host has to know before it can go on."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in READS:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (cpu_attention, cpu_convolution, cpu_delta, cpu_features, cpu_loop, cpu_norm):
        monkeypatch.setattr(module, "can_run", lambda *_: False)
    for room in (chunked, attention):
        monkeypatch.setattr(room, "may_look", lambda _: False)
    monkeypatch.setattr(network, "surely_inside", lambda *_: False)
    monkeypatch.setattr(AtlasLM, "_check_tokens", lambda *_: None)  # it looks at tokens on a CPU alone


def test_a_read_is_counted() -> None:
    with HostReads() as mode:
        assert torch.ones(3).sum().item() == 3
        assert bool((torch.ones(1) > 0).all())
    assert len(mode.found) == 2


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("changes", [{}, {"update": "newton_schulz"}, {"context": 4},
                                     {"memory": "none"}, {"memory": "gated_delta"}], ids=str)  # fmt: skip
def test_a_step_of_the_model_reads_nothing(changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, tokens = build(**changes).train(), make_tokens(61)
    starts = torch.zeros(2, 60, dtype=torch.bool)
    starts[:, ::17] = True
    with HostReads() as mode:
        logits = model(tokens[:, :-1], document_start_BT=starts).logits
        nnf.cross_entropy(logits.mT, tokens[:, 1:]).backward()
    assert mode.found == []


@pytest.mark.usefixtures("as_on_a_gpu")
def test_documents_are_read_before_the_model_runs() -> None:
    """Where each of them begins says how the batch is cut; after that nothing waits."""
    torch.manual_seed(0)
    model, tokens = build(reset_at_document=True).train(), make_tokens(60)
    starts = torch.zeros(2, 60, dtype=torch.bool)
    starts[:, ::17] = True
    rows = apart(starts)
    with patch("atlas_lm.model.documents.apart", lambda *_: rows), HostReads() as mode:
        model(tokens, document_start_BT=starts).logits.square().mean().backward()
    assert mode.found == []


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_stream_reads_nothing() -> None:
    torch.manual_seed(0)
    model, tokens = build().eval(), make_tokens(40)
    state = model.initial_state(2)
    with HostReads() as mode, torch.no_grad():
        for piece in tokens.tensor_split([17, 18], dim=1):
            state = model(piece, state).state
    assert mode.found == []


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_stream_does_not_forget_what_was_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens that are left out where nothing is looked at leave their mark on the state."""
    torch.manual_seed(0)
    model, tokens = build().eval(), make_tokens(60)
    memory = model.blocks[0].memory
    assert memory is not None

    def spoil(_: Any, __: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[1, 3] = torch.nan
        return output

    with torch.no_grad():
        hook = memory.qkv.register_forward_hook(spoil)  # type: ignore[union-attr]
        state = model(tokens[:, :30], model.initial_state(2)).state
        hook.remove()
        logits = model(tokens[:, 30:], state).logits
    assert logits[0].isfinite().all()
    assert not logits[1].isfinite().any()
