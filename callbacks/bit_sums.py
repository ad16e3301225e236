"""A 64-bit sum over the bits of each of many tensors, fast enough for every step: what changes a bit changes a sum."""

from collections.abc import Callable
from dataclasses import dataclass
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)  # by falling size
SMALL = 2048  # bytes; to copy so few is faster than to start a sum
GAP = 64  # bytes between two small tensors in one storage that are copied together: allocators align to so many


def words(tensor: Tensor) -> list[Tensor]:
    """Flat views as integers that together hold every bit of `tensor` once, as wide as its size allows.

    What adds them up need not know their order: dense strides are sorted; only tensors with gaps, or that begin within
    a word, are copied.
    """
    return _words(_flat(tensor))


def _flat(tensor: Tensor) -> Tensor:
    by_stride = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    flat = tensor.detach().permute(by_stride).reshape(-1).contiguous()
    odd = flat.storage_offset() * flat.itemsize % WORDS[0].itemsize
    return flat.clone() if odd else flat  # the same bits have the same words, wherever they lie


def _local(tensor: Tensor) -> Tensor:
    """What this rank holds; `to_local` makes another object at every call."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _words(flat: Tensor) -> list[Tensor]:
    for word in WORDS:
        ratio = max(1, word.itemsize // flat.dtype.itemsize)
        whole = flat.numel() - flat.numel() % ratio
        if whole and flat.storage_offset() % ratio == 0:
            return [flat[:whole].view(word), *_words(flat[whole:])]
    return []


@dataclass(frozen=True)
class Run:
    """Small tensors that lie one behind another in one storage."""

    view: Tensor  # all of their bytes, gaps included
    places: list[tuple[str, int, int]]  # name, first byte in `view`, bytes


@dataclass(frozen=True)
class Layout:
    """Which tensors of one device a fingerprint is of, and views of their bits."""

    rows: list[tuple[list[str], Tensor]]  # words, (names, ·); a tensor that took several views has several rows
    runs: list[Run]

    def sums(self) -> Tensor:
        """(names of all rows,) int64."""
        return torch.cat([view.sum(1) for _, view in self.rows]) if self.rows else torch.empty(0, dtype=torch.int64)

    def copies(self) -> Tensor:
        """(bytes of all runs,) uint8, one behind another."""
        return torch.cat([run.view for run in self.runs]) if self.runs else torch.empty(0, dtype=torch.uint8)

    def small(self, copies: Tensor) -> list[tuple[str, Tensor]]:
        """What `copies` holds of each small tensor: its name and its bytes."""
        parts = copies.split([run.view.numel() for run in self.runs])
        return [
            (name, part[start : start + count])
            for run, part in zip(self.runs, parts, strict=True)
            for name, start, count in run.places
        ]


def in_rows(views: list[tuple[str, Tensor]]) -> list[tuple[list[str], Tensor]]:
    """Each view as a row. Equally long ones at equal distances in one storage share a view: fewer, larger sums."""
    by_kind: dict[Any, list[tuple[str, Tensor]]] = {}
    for name, view in views:
        kind = (view.untyped_storage().data_ptr(), view.dtype, view.numel())
        by_kind.setdefault(kind, []).append((name, view))
    rows: list[tuple[list[str], Tensor]] = []
    for same in by_kind.values():
        same.sort(key=lambda pair: pair[1].storage_offset())
        while same:
            first = same[0][1]
            places = [int(view.storage_offset() - first.storage_offset()) for _, view in same]
            step, count = max([first.numel(), *places[1:2]]), 1
            while count < len(same) and places[count] == count * step:
                count += 1
            rows.append(([name for name, _ in same[:count]], first.as_strided((count, first.numel()), (step, 1))))
            same = same[count:]
    return rows


def in_runs(views: list[tuple[str, Tensor]]) -> list[Run]:
    """Views of bytes; those close to one another in one storage are copied as one piece."""
    by_storage: dict[int, list[tuple[str, Tensor]]] = {}
    for name, view in views:
        by_storage.setdefault(view.untyped_storage().data_ptr(), []).append((name, view))
    runs: list[Run] = []
    for near in by_storage.values():
        near.sort(key=lambda pair: pair[1].storage_offset())
        while near:
            first = near[0][1]
            begin, end, count = int(first.storage_offset()), int(first.storage_offset()), 0
            while count < len(near) and near[count][1].storage_offset() - end <= GAP:
                end = max(end, int(near[count][1].storage_offset()) + near[count][1].numel())
                count += 1
            places = [(name, int(view.storage_offset()) - begin, view.numel()) for name, view in near[:count]]
            runs.append(Run(first.as_strided((end - begin,), (1,)), places))
            near = near[count:]
    return runs


@dataclass(frozen=True)
class Fingerprint:
    """Of some tensors at one moment, on their devices until somebody reads it."""

    layouts: list[Layout]
    sums: list[Tensor]  # per layout
    copies: list[Tensor]

    def equals(self, other: "Fingerprint") -> bool:
        """Whether both are of the same views and no bit has changed."""
        return self.layouts is other.layouts and all(
            map(torch.equal, self.sums + self.copies, other.sums + other.copies)
        )

    def numbers(self) -> dict[str, int]:
        """The sums by name, modulo 2⁶⁴; waits for the devices."""
        found: dict[str, int] = {}
        for layout, sums, copies in zip(self.layouts, self.sums, self.copies, strict=True):
            summed = zip((name for row, _ in layout.rows for name in row), sums.tolist(), strict=True)
            # a clone starts where its storage does, so that its words are as wide as its size allows
            small = [(name, sum(int(x.sum()) for x in words(x.clone()))) for name, x in layout.small(copies.cpu())]
            for name, value in [*summed, *small]:
                found[name] = (found.get(name, 0) + value) % 2**64
        return found


class BitSums:
    """Takes fingerprints of tensors that mostly stay where they are: to make views takes longer than to add them up."""

    def __init__(self) -> None:
        self._seen: list[Tensor] = []
        self._places: list[int] = []
        self._sharded = False
        self._layouts: list[Layout] = []

    @torch.no_grad()
    def __call__(self, tensors: list[Tensor], names: Callable[[], list[str]]) -> Fingerprint:
        """Of what this rank holds of each tensor. `names` is asked when the tensors are not those of the last call."""
        local = [_local(x) for x in tensors] if self._sharded else tensors
        if (
            len(local) != len(self._seen)
            or not all(map(is_, local, self._seen))
            or list(map(Tensor.data_ptr, local)) != self._places
        ):
            self._look(tensors, names())
        layouts = self._layouts
        return Fingerprint(layouts, [layout.sums() for layout in layouts], [layout.copies() for layout in layouts])

    def _look(self, tensors: list[Tensor], names: list[str]) -> None:
        self._sharded = any(isinstance(x, DTensor) for x in tensors)
        local = [_local(x) for x in tensors]
        held = [(name, x, _flat(x)) for name, x in zip(names, local, strict=True) if x.numel()]
        copied = any(flat.untyped_storage().data_ptr() != x.untyped_storage().data_ptr() for _, x, flat in held)
        self._seen = [] if copied else local  # of copies the next call needs new ones
        self._places = list(map(Tensor.data_ptr, self._seen))
        self._layouts = []
        for device in dict.fromkeys(x.device for _, x, _ in held):
            here = [(name, flat) for name, x, flat in held if x.device == device]
            small = [(name, flat.view(torch.uint8)) for name, flat in here if flat.numel() * flat.itemsize <= SMALL]
            large = [
                (name, view) for name, flat in here if flat.numel() * flat.itemsize > SMALL for view in _words(flat)
            ]
            self._layouts.append(Layout(in_rows(large), in_runs(small)))
