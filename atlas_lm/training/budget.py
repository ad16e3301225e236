"""The memory that training takes on a GPU, counted without one.

A whole step runs on tensors that have sizes and no contents (PyTorch's FakeTensorMode), the way that a GPU takes, and
every storage is counted from its first use to its end. So the count knows of everything that the code does.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as nnf
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from atlas_lm.config.model import ModelConfig
from atlas_lm.config.schema import OptimConfig
from atlas_lm.memory.host_reads import as_on_a_gpu
from atlas_lm.model.atlas import AtlasLM
from atlas_lm.training.optimizer import build_optimizer

USABLE = 0.94  # of a card: the rest is the driver's, and lies in gaps between blocks of memory


class Budget(NamedTuple):
    """Bytes of one rank that holds the whole model."""

    weights: int
    gradients: int
    moments: int  # of the optimizer
    activations: int  # what a forward pass keeps for the way back, the logits and the loss included
    kept_states: int  # fast weights among them
    peak: int  # at most at one moment of a step: all of it

    @property
    def lasting(self) -> int:
        """What does not depend on the batch."""
        return self.weights + self.gradients + self.moments


class Live(TorchDispatchMode):
    """Counts the bytes of storages that exist, and how many there were at most."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, Any] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._note(x)
        return out

    def _note(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def gone(_: Any) -> None:
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def budget(
    model: ModelConfig, optim: OptimConfig, vocabulary: int, rows: int, length: int, mixed: bool = True
) -> Budget:
    """Of a step on `rows` sequences of `length` tokens, in bfloat16 where `mixed`."""
    with torch.device("meta"):
        net = AtlasLM(model, vocabulary)
    states = {(2 * w.size(-2), w.size(-1)) for h in _hierarchies(net) for m in h.memories() for w in m.weights()}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if x.shape[-2:] in states:
            kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with as_on_a_gpu(), FakeTensorMode(), Live() as live:
        _give_sizes(net)
        weights = live.now
        tokens = torch.zeros(rows, length, dtype=torch.int64)
        with saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            logits = net(tokens).logits
        loss = nnf.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())
        del logits
        activations = live.now - weights
        loss.backward()
        gradients = _bytes([p.grad for p in net.parameters()])
        peak = live.peak
        optimizer = build_optimizer(net, optim)
        optimizer.step()
        moments = _bytes([x for state in optimizer.state.values() for x in state.values()])
    return Budget(weights, gradients, moments, activations, sum(kept.values()), max(peak + moments, live.peak))


def _hierarchies(net: AtlasLM) -> Any:
    return net.hierarchies() if net.config.memory == "atlas" else ()


def _give_sizes(net: nn.Module) -> None:
    """Parameters and buffers without contents, in place of those on device meta."""
    for module in net.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad)
        for name, x in module._buffers.items():
            if x is not None:
                module._buffers[name] = torch.empty(x.shape, dtype=x.dtype)


def _bytes(tensors: list[Any]) -> int:
    return sum(x.nbytes for x in tensors if isinstance(x, Tensor))


def largest_batch(found: Budget, rows: int, card: float, sharded_over: int = 1) -> int:
    """Sequences that fit a card of so many bytes, from the budget of `rows`: what a batch needs grows with it."""
    lasting = found.lasting / sharded_over
    return max(0, int((USABLE * card - lasting) / ((found.peak - found.lasting) / rows)))
