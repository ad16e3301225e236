"""Faults that are planted into a model while it writes, for `benchmarks.detection`: one context manager each.

A fault takes a subject of `atlas_lm.inspection.subject` and changes what its model computes until the context ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from atlas_lm.inspection.layers import find_stack
from atlas_lm.model.block import MemoryBranch
from atlas_lm.model.session import Session

AT = 8  # step from which on a fault that comes while the model writes is there
Fault = Callable[[Any], AbstractContextManager[None]]


def layers_of(subject: Any) -> list[nn.Module]:
    """The blocks of a model, ours or of transformers."""
    if subject.info.kind == "atlas_lm":
        return list(subject.model.blocks)
    return find_stack(subject.model).layers


@contextmanager
def _hooked(module: nn.Module, change: Callable[[Tensor], Tensor], after: int = 0) -> Iterator[None]:
    """What a layer returns, changed; from its pass number `after` on."""
    passes = 0

    def hook(_: Any, __: Any, output: Any) -> Any:
        nonlocal passes
        passes += 1
        if passes <= after:
            return output
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def nan_in_a_layer(subject: Any) -> AbstractContextManager[None]:
    """One entry of the middle layer's output becomes NaN while the model writes."""
    layers = layers_of(subject)

    def spoil(x: Tensor) -> Tensor:
        x = x.clone()
        x[..., 0] = torch.nan
        return x

    return _hooked(layers[len(layers) // 2], spoil, after=AT)


def a_layer_times_50(subject: Any) -> AbstractContextManager[None]:
    """The middle layer's output is 50 times as large."""
    layers = layers_of(subject)
    return _hooked(layers[len(layers) // 2], lambda x: 50 * x)


@contextmanager
def attention_zeroed(subject: Any) -> Iterator[None]:
    """The attention of the middle third of layers answers zero."""
    layers: list[Any] = layers_of(subject)
    some = range(len(layers) // 3, max(len(layers) // 3 + 1, len(layers) - len(layers) // 3))
    if subject.info.kind != "atlas_lm":
        attention = find_stack(subject.model).attention
        handles = [attention[i].register_forward_hook(lambda _, __, out: (0 * out[0], *out[1:])) for i in some]
    else:
        handles = []
        for block in (layers[i] for i in some):
            if block.fusion is None:
                handles.append(block.out.register_forward_hook(lambda _, __, out: 0 * out))
            else:
                handles.append(block.fusion.register_forward_pre_hook(lambda _, both: (0 * both[0], both[1])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def weights_of_4_bits(subject: Any) -> Iterator[None]:
    """Every matrix rounded to 15 values per row."""
    kept: list[tuple[Tensor, Tensor]] = []
    with torch.no_grad():
        for parameter in subject.model.parameters():
            if parameter.dim() < 2:
                continue
            kept.append((parameter, parameter.detach().clone()))
            step = parameter.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 7
            parameter.copy_((parameter / step).round() * step)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, before in kept:
                parameter.copy_(before)


@contextmanager
def _during_reading(subject: Any, change: Callable[[Session], None], at: int = AT) -> Iterator[None]:
    """Our model: a session's state is changed once, before it reads the token of step `at`."""
    stream = subject.model.stream

    class Changed(Session):
        def read(self, tokens_BT: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
            self.reads = getattr(self, "reads", -1) + 1
            if self.reads == at:
                change(self)
            return super().read(tokens_BT, *arguments, **keywords)

    subject.model.stream = lambda batch=1: Changed(subject.model, batch)
    try:
        yield
    finally:
        subject.model.stream = stream


def cache_shuffled(subject: Any) -> AbstractContextManager[None]:
    """Keys and values of everything read so far change places, in every layer."""
    if subject.info.kind == "atlas_lm":

        def shuffle(session: Session) -> None:
            generator = torch.Generator().manual_seed(0)
            blocks = []
            for block in session.state:
                order = torch.randperm(block.attention.k.size(2), generator=generator)
                attention = block.attention._replace(v=block.attention.v[:, :, order])
                blocks.append(block._replace(attention=attention))
            session.state = tuple(blocks)

        return _during_reading(subject, shuffle)
    return _shuffled_cache(subject)


@contextmanager
def _shuffled_cache(subject: Any) -> Iterator[None]:
    passes = 0

    def hook(_: Any, __: Any, keywords: Any) -> None:
        nonlocal passes
        passes += 1
        if passes != AT + 1:
            return
        generator = torch.Generator().manual_seed(0)
        cache = next(value for value in keywords.values() if hasattr(value, "layers"))
        for layer in cache.layers:
            order = torch.randperm(layer.values.size(2), generator=generator)
            layer.values = layer.values[:, :, order]

    handle = subject.model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _memories_changed(session: Session, change: Callable[[Tensor], Tensor]) -> None:
    """`change` of every W − W_init, in all memories."""

    def of(memory: Any) -> Any:
        return None if memory is None else memory._replace(change=tuple(change(x) for x in memory.change))

    blocks = []
    for block in session.state:
        if hasattr(block.memory, "local_memories"):
            memory = block.memory._replace(
                global_memory=of(block.memory.global_memory),
                local_memories=tuple(of(one) for one in block.memory.local_memories),
            )
            block = block._replace(memory=memory)
        blocks.append(block)
    session.state = tuple(blocks)


def memory_wiped(subject: Any) -> AbstractContextManager[None]:
    """Every memory is as if it had read nothing."""
    return _during_reading(subject, lambda session: _memories_changed(session, torch.zeros_like))


def memory_noise(subject: Any) -> AbstractContextManager[None]:
    """Noise as large as what each memory has learned is added to it."""
    generator = torch.Generator().manual_seed(0)

    def noisy(x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=generator)
        return x + noise * (x.norm() / noise.norm())

    return _during_reading(subject, lambda session: _memories_changed(session, noisy))


@contextmanager
def writes_frozen(subject: Any) -> Iterator[None]:
    """No memory learns while the model writes; the prompt it has learned."""
    stream = subject.model.stream

    class Frozen(Session):
        def read(self, tokens_BT: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
            return super().read(tokens_BT, *arguments, **{**keywords, "write": self.logits is None})

    subject.model.stream = lambda batch=1: Frozen(subject.model, batch)
    try:
        yield
    finally:
        subject.model.stream = stream


FAULTS: dict[str, Fault] = {
    "NaN in a layer": nan_in_a_layer,
    "a layer's output × 50": a_layer_times_50,
    "attention zeroed": attention_zeroed,
    "weights of 4 bits": weights_of_4_bits,
    "KV cache shuffled": cache_shuffled,
}
OF_MEMORY: dict[str, Fault] = {
    "memory wiped": memory_wiped,
    "writes frozen": writes_frozen,
    "memory noise": memory_noise,
}


PERMANENT = ("weights of 4 bits",)  # faults of weights, which do not come at a step


def faults_of(subject: Any) -> dict[str, Fault]:
    """Those that a model can have."""
    has = subject.info.kind == "atlas_lm" and any(isinstance(b.memory, MemoryBranch) for b in subject.model.blocks)
    return {**FAULTS, **(OF_MEMORY if has else {})}
