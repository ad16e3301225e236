"""Watch modules, and keep what they show of a few steps, at little cost to the steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Handle(Protocol):
    """Of something that was attached."""

    def remove(self) -> None:
        """It is attached no more."""
        ...


def watch(module: nn.Module, seen: Callable[..., None]) -> Handle:
    """Call `seen(output, *arguments)` after every call of a module, as a forward hook does, until it is removed.

    With any hook torch takes a slow path through a module, and in a step of a few milliseconds a dozen of those are a
    percent. So a module that has no hook of others is watched without one. Of several on one module the last is
    removed first.
    """
    if module._forward_hooks or module._forward_pre_hooks:  # what those change is what the model goes by
        return module.register_forward_hook(lambda _, given, output: seen(output, *given))
    return _Watch(module, seen)


class _Watch:
    def __init__(self, module: nn.Module, seen: Callable[..., None]) -> None:
        self._attributes, self._before = module.__dict__, module.__dict__.get("forward")
        forward = module.forward

        def shown(*given: Any, **named: Any) -> Any:
            output = forward(*given, **named)
            seen(output, *given)
            return output

        self._attributes["forward"] = shown

    def remove(self) -> None:
        if self._before is None:
            del self._attributes["forward"]
        else:
            self._attributes["forward"] = self._before


class Ring:
    """Up to `size` tensors of one shape (1, …), copied to one place.

    Tensors that are kept where they are lie between the buffers of the model, whose next ones then come from colder
    memory: with a state of a megabyte that costs more than all metrics.
    """

    def __init__(self, size: int) -> None:
        self.size, self.n = size, 0
        self._buffer: Tensor | None = None
        self._slots: tuple[Tensor, ...] = ()

    def append(self, x_1: Tensor) -> None:
        if self._buffer is None:
            self._buffer = x_1.new_empty(self.size, *x_1.shape[1:])
            self._slots = self._buffer.split(1)
        self._slots[self.n].copy_(x_1)
        self.n += 1

    def take(self) -> Tensor:
        """(n, …), which the next ones overwrite. ValueError: there are none."""
        if self._buffer is None:
            raise ValueError("nothing was kept")
        n, self.n = self.n, 0
        return self._buffer[:n]


class Rings:
    """Up to `size` rows of several tensors (1, …), each row copied by one call: a call of its own for each tensor costs
    a step more than all metrics of its logits."""

    def __init__(self, size: int) -> None:
        self.size, self.n = size, 0
        self._names: list[str] = []
        self._row: list[Tensor | None] = []
        self._buffers: list[Tensor] = []
        self._slots: list[tuple[Tensor, ...]] = []  # by row

    def place(self, name: str, tensors: int = 1) -> int:
        """Where a row keeps so many more tensors. `name` says in an error what was to give them."""
        first = len(self._names)
        self._names += [name] * tensors
        self._row += [None] * tensors
        return first

    def put(self, at: int, *tensors: Tensor) -> None:
        """Into the row that is open."""
        self._row[at : at + len(tensors)] = tensors

    def close(self) -> None:
        """The row is whole. RuntimeError: a tensor is missing."""
        row = [x for x in self._row if x is not None]
        if len(row) < len(self._row):
            missing = self._names[next(i for i, x in enumerate(self._row) if x is None)]
            raise RuntimeError(f"the hook on {missing} did not fire: its metrics would be empty")
        if not self._buffers:
            self._buffers = [x.new_empty(self.size, *x.shape[1:]) for x in row]
            self._slots = list(zip(*(buffer.split(1) for buffer in self._buffers), strict=True))
        torch._foreach_copy_(self._slots[self.n], row)
        self._row, self.n = [None] * len(row), self.n + 1

    def take(self) -> list[Tensor]:
        """(n, …) of each place, which the next ones overwrite. ValueError: no row was closed."""
        if not self.n:
            raise ValueError("nothing was kept")
        n, self.n = self.n, 0
        return [buffer[:n] for buffer in self._buffers]
