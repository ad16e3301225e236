"""A 64-bit sum over the bits of each of many tensors, fast enough for every step: what changes a bit changes a sum.

The sum of a tensor is that of its memory, read as signed 64-bit integers; up to seven bytes behind them are read as
32 bits, 16 bits and an unsigned byte, as far as there are so many. It is the same wherever the tensor lies.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from operator import is_

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

WORD = 8  # bytes
ROW = 256 * WORD  # bytes; shorter rows are slower to add up, of longer ones more is copied where two tensors meet


def _flat(tensor: Tensor) -> Tensor:
    """All elements in the order of memory, as sums need no other; copied if there are gaps, or half a word before."""
    by_stride = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    flat = tensor.detach().permute(by_stride).reshape(-1).contiguous()
    flat = flat.as_strided(flat.shape, (1,))  # torch calls a single element contiguous, whatever its stride
    odd = flat.storage_offset() * flat.itemsize % WORD
    return flat.clone() if odd else flat  # the same bits have the same words, wherever they lie


def _local(tensor: Tensor) -> Tensor:
    """What this rank holds; `to_local` makes another object at every call."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True)
class Place:
    """Where in a stretch a tensor is."""

    name: str
    rows: tuple[int, int]  # the first that is all its own, and the one behind the last
    pieces: list[tuple[int, int]]  # what it has before and behind them: first byte and end in the copies


@dataclass(frozen=True)
class Stretch:
    """Tensors one behind another in one storage: summed row by row, wherever one ends and the next begins.

    Rows in which that happens are copied too, and so is what is no whole row at the end.
    """

    rows: Tensor  # (rows, words) int64
    copied: list[Tensor]  # (bytes,) uint8 each: neighbouring rows, and the rest
    places: list[Place]


def _between(values: Tensor, spans: list[tuple[int, int]]) -> list[int]:
    """Sums of values[start:end], each but for a multiple of 2⁶⁴."""
    below = torch.cat([values.new_zeros(1), values.cumsum(0)])
    starts, ends = torch.tensor(spans, dtype=torch.int64, device=values.device).view(-1, 2).unbind(1)
    return (below[ends] - below[starts]).tolist()


def _sum_of(data: memoryview) -> int:
    """Of bytes, but for a multiple of 2⁶⁴."""
    whole = len(data) - len(data) % WORD
    value, left = sum(data[:whole].cast("q")), bytes(data[whole:])
    for width in (4, 2, 1):
        if len(left) >= width:
            value += int.from_bytes(left[:width], sys.byteorder, signed=width > 1)
            left = left[width:]
    return value


def stretches(flat: list[tuple[str, Tensor]]) -> list[Stretch]:
    """Of dense tensors that begin with a word, and their names. Where less than a row lies between two, one goes on."""
    by_storage: dict[int, list[tuple[str, Tensor]]] = {}
    for name, x in flat:
        by_storage.setdefault(x.untyped_storage().data_ptr(), []).append((name, x.view(torch.uint8)))
    found: list[Stretch] = []
    for near in by_storage.values():
        spans = sorted((int(x.storage_offset()), int(x.storage_offset()) + x.numel(), name) for name, x in near)
        ends = [*accumulate((end for _, end, _ in spans), max)]  # one may lie within another
        widest = max((x for _, x in near), key=lambda x: x.untyped_storage().nbytes())  # two may begin at one address
        cuts = [i for i in range(1, len(spans)) if spans[i][0] - ends[i - 1] >= ROW]
        for i, j in zip([0, *cuts], [*cuts, len(spans)], strict=True):
            found.append(_stretch(widest, spans[i:j], ends[j - 1]))
    return found


def _stretch(view: Tensor, spans: list[tuple[int, int, str]], end: int) -> Stretch:
    """`view`: bytes of that storage; `spans`: first byte, end and name of each tensor, the first one first."""
    begin = spans[0][0]
    count = (end - begin) // ROW
    held: list[tuple[str, tuple[int, int], list[tuple[int, int]]]] = []  # name, rows, pieces in bytes of the stretch
    for start, stop, name in ((start - begin, stop - begin, name) for start, stop, name in spans):
        first = -(-start // ROW)
        last = max(first, stop // ROW)
        ends = ((start, min(stop, first * ROW)), (last * ROW, stop))
        held.append((name, (first, last) if first < last else (0, 0), [(a, b) for a, b in ends if a < b]))
    shared = sorted({a // ROW for _, _, pieces in held for a, _ in pieces})  # the last one may be no whole row
    copied = {row: i * ROW for i, row in enumerate(shared)}  # row → first byte in the copies
    cuts = [i for i in range(1, len(shared)) if shared[i] - shared[i - 1] > 1]
    runs = [
        (shared[i] * ROW, (shared[j - 1] + 1) * ROW)
        for i, j in zip([0, *cuts], [*cuts, len(shared)], strict=True)
        if i < j
    ]
    return Stretch(
        view.as_strided((count * ROW,), (1,), begin).view(torch.int64).view(-1, ROW // WORD),
        [view.as_strided((min(b, end - begin) - a,), (1,), begin + a) for a, b in runs],
        [
            Place(name, rows, [(copied[a // ROW] + a % ROW, copied[a // ROW] + a % ROW + b - a) for a, b in pieces])
            for name, rows, pieces in held
        ],
    )


@dataclass(frozen=True)
class Layout:
    """Which tensors of one device a fingerprint is of, and views of their bits."""

    stretches: list[Stretch]

    def sums(self) -> Tensor:
        """(rows of all stretches,) int64."""
        sums = [x.rows.sum(1) for x in self.stretches if len(x.rows)]
        return torch.cat(sums) if sums else torch.empty(0, dtype=torch.int64, device="cpu")

    def copies(self) -> Tensor:
        """(bytes of all copies,) uint8."""
        views = [view for x in self.stretches for view in x.copied]
        return torch.cat(views) if views else torch.empty(0, dtype=torch.uint8, device="cpu")

    def numbers(self, sums: Tensor, copies: Tensor) -> list[tuple[str, int]]:
        """Parts of the tensors' sums, but for multiples of 2⁶⁴; what goes in is on a CPU."""
        data = copies.numpy().data
        names: list[str] = []
        spans: list[tuple[int, int]] = []
        found: list[tuple[str, int]] = []
        row = byte = 0  # at which a stretch begins
        for x in self.stretches:
            names += [place.name for place in x.places]
            spans += [(row + place.rows[0], row + place.rows[1]) for place in x.places]
            found += [(p.name, _sum_of(data[byte + start : byte + end])) for p in x.places for start, end in p.pieces]
            row, byte = row + len(x.rows), byte + sum(map(Tensor.numel, x.copied))
        return [*zip(names, _between(sums, spans), strict=True), *found]


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
            for name, value in layout.numbers(sums.cpu(), copies.cpu()):
                found[name] = (found.get(name, 0) + value) % 2**64
        return found


class BitSums:
    """Takes fingerprints of tensors that mostly stay where they are: to make views takes longer than to add them up."""

    def __init__(self) -> None:
        self._seen: list[Tensor] | None = None  # None: the next call needs new views
        self._places: list[int] = []
        self._sharded = False
        self._layouts: list[Layout] = []

    @torch.no_grad()
    def __call__(self, tensors: list[Tensor], names: Callable[[], list[str]]) -> Fingerprint:
        """Of what this rank holds of each tensor. `names` is asked when the tensors are not those of the last call."""
        local = [_local(x) for x in tensors] if self._sharded else tensors
        if (
            self._seen is None
            or len(local) != len(self._seen)
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
        self._seen = None if copied else local
        self._places = list(map(Tensor.data_ptr, local))
        self._layouts = [
            Layout(stretches([(name, flat) for name, x, flat in held if x.device == device]))
            for device in dict.fromkeys(x.device for _, x, _ in held)
        ]
