"""Whether another form of the loop agrees with PyTorch's on this very device, seen before it is used (M7).

Kernels are compiled for whatever card there is, and a wrong one would train a wrong model without a word. So a few
random chunks go through both forms first, once for each kind of problem; where they differ, or where the other form
fails, the loop runs in PyTorch and the log says why.
"""

# G batch × heads, K chunks, C chunk, F feature dim, P pre-activations, E hidden dim, D outputs

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from atlas_lm.memory.loop.types import LoopConfig, LoopInputs

log = logging.getLogger(__name__)

Form = Callable[[LoopConfig, list[Tensor], LoopInputs], tuple[Tensor, list[Tensor]]]
G, K = 2, 3
# relative error of outputs and of every gradient: rounding stays far below, a wrong sign far above
ALLOWED = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
_found: dict[Any, bool] = {}


def agrees(form: Form, truth: Form, config: LoopConfig, like: LoopInputs, key: Any) -> bool:
    """Whether `form` computes what `truth` does, on inputs like these; tried once for each key."""
    if key not in _found:
        why = difference(form, truth, config, like)
        if why:
            log.warning("the memory runs in PyTorch operations, as its kernels do not pass their trial here: %s", why)
        _found[key] = not why
    return _found[key]


def difference(form: Form, truth: Form, config: LoopConfig, like: LoopInputs) -> str:
    """What is wrong with `form`; empty where nothing is."""
    config = config._replace(complete=K, train=True)
    with torch.inference_mode(False), torch.enable_grad():
        x = _problem(like, config.operands)
        expected = _outcome(truth, config, x)
        try:
            found = _outcome(form, config, x)
        except Exception as error:  # of a compiler, of a driver: whatever it is, PyTorch's form is there
            return " ".join(f"{type(error).__name__}: {error}".split())[:300]
    for name, a, b in zip(_names(x), expected, found, strict=True):
        size = float(torch.linalg.vector_norm(a))
        off = float(torch.linalg.vector_norm(a - b)) / max(size, 1e-6)
        if not off <= ALLOWED[config.operands]:
            return f"{name} differs by {off:.2g} of its size"
    return ""


def _problem(like: LoopInputs, low: torch.dtype) -> LoopInputs:
    """Random chunks as wide as these, of the same heads; the generator is of its own, so no run is changed."""
    wide, device = like.decay.dtype, like.phi.device
    generator = torch.Generator(device).manual_seed(0)
    C, F, P, D = like.phi_q.size(2), like.phi.size(3), like.by_initial.size(3), like.v.size(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(G, *shape, generator=generator, device=device, dtype=wide)

    def gate(*shape: int) -> Tensor:
        return torch.rand(G, *shape, generator=generator, device=device, dtype=wide)

    phi, phi_q = (torch.nn.functional.normalize(normal(K, C, F), dim=-1) for _ in range(2))
    alpha, beta, theta = (gate(K) for _ in range(3))
    known: dict[str, Any] = {
        "phi": phi.to(low),
        "v": normal(K, C, D).to(low),
        "phi_q": phi_q.to(low),
        "gamma": gate(K, C),
        "same_segment": None,
        "in_start_segment": None,
        "decay": torch.stack([alpha, -beta, torch.zeros_like(alpha), theta], -1).unflatten(-1, (2, 2)),
        "eta": gate(K),
        "write_coef": torch.stack([-gate(K, C), gate(K, C)], dim=-2),
        "scores": (phi_q @ phi.mT).to(low),
        "read_coef": torch.stack([gate(K, C), -gate(K, C)], dim=-2),
        "grad_coef": gate(K, C, C).tril(),
        "initial_out": None if like.initial_out is None else normal(like.initial_out.size(1), D) / D**0.5,
        "by_initial": normal(K, C, P).to(low),
        "q_by_initial": normal(K, C, P).to(low),
    }
    return LoopInputs(**known)


def _names(x: LoopInputs) -> list[str]:
    """Of what is compared."""
    layers = 1 if x.initial_out is None else 2
    return ["the output", *["a state"] * layers, *(f"the gradient of {name}" for name in _leaves(x))]


def _leaves(x: LoopInputs) -> list[str]:
    without = ("gamma", "eta", "decay")  # not all of decay is looked at: its zero has no gradient
    return [name for name in LoopInputs._fields if name not in without and getattr(x, name) is not None]


def _outcome(form: Form, config: LoopConfig, x: LoopInputs) -> list[Tensor]:
    """Outputs, states and gradients, wide."""
    leaves = {name: getattr(x, name).detach().clone().requires_grad_() for name in _leaves(x)}
    layers = [(x.phi.size(3), x.by_initial.size(3))]
    if x.initial_out is not None:
        layers.append((x.initial_out.size(1), x.v.size(3)))
    given = [x.decay.new_zeros(G, 2 * rows, columns) for rows, columns in layers]
    y, states = form(config, given, x._replace(**leaves))
    weight = torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)
    total = (y.float() * weight).sum() + sum(z.square().sum() for z in states)
    grads = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
    return [t.detach().to(x.decay.dtype) for t in (y, *states, *grads)]
