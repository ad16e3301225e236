"""A 64-bit sum over the bits of each of many tensors, fast enough for every step: what changes a bit changes a sum.

The sum of a tensor is that of its memory, read as signed 64-bit integers; up to seven bytes at the end are read as
32 bits, 16 bits and an unsigned byte, as far as there are so many. It is the same wherever the tensor lies.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from operator import is_

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

WORD = 8  # bytes
SHORT = 1024  # bytes; shorter tensors are copied side by side and not summed: a sum has a price of its own


def _flat(tensor: Tensor) -> Tensor:
    """All bytes in the order of memory, as sums need no other; copied if there are gaps, or half a word before."""
    by_stride = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    flat = tensor.detach().permute(by_stride).reshape(-1).contiguous()
    flat = flat.as_strided(flat.shape, (1,))  # torch calls a single element contiguous, whatever its stride
    odd = flat.storage_offset() * flat.itemsize % WORD
    return (flat.clone() if odd else flat).view(torch.uint8)


def _local(tensor: Tensor) -> Tensor:
    """What this rank holds; `to_local` makes another object at every call."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True)
class Views:
    """The tensors of one device. Equally large ones at equal distances in one storage are rows of one view."""

    names: list[str]  # of the rows of all of `words`
    words: list[Tensor]  # (tensors, words) int64 each
    ends: list[tuple[str, Tensor]]  # (bytes,) uint8 each: what is no whole word, and short tensors


def views(flat: list[tuple[str, Tensor]]) -> Views:
    """Of the bytes of tensors, by name."""
    found, alike = Views([], [], []), dict[tuple[int, int, int], list[tuple[int, str, Tensor]]]()
    for name, x in flat:
        whole = len(x) - len(x) % WORD if len(x) >= SHORT else 0
        if whole < len(x):
            found.ends.append((name, x[whole:]))
        if whole:
            storage = x.untyped_storage()
            key = storage.data_ptr(), storage.nbytes(), whole  # two storages may begin at one address
            alike.setdefault(key, []).append((int(x.storage_offset()), name, x))
    for (_, _, whole), group in alike.items():
        group.sort(key=lambda entry: entry[0])
        start = 0
        while start < len(group):
            end, step = start + 1, group[start + 1][0] - group[start][0] if start + 1 < len(group) else whole
            while end < len(group) and group[end][0] - group[end - 1][0] == step:
                end += 1
            first, _, x = group[start]
            found.words.append(x.as_strided((end - start, whole), (step, 1), first).view(torch.int64))
            found.names.extend(name for _, name, _ in group[start:end])
            start = end
    return found


def _sum_of(data: bytes) -> int:
    """Of bytes, but for a multiple of 2⁶⁴."""
    value = 0
    for width in (WORD, 4, 2, 1):
        while len(data) >= width:
            value, data = value + int.from_bytes(data[:width], sys.byteorder, signed=width > 1), data[width:]
    return value


@dataclass(frozen=True)
class Fingerprint:
    """Of some tensors at one moment, on their devices until somebody reads it."""

    views: list[Views]
    sums: list[Tensor]  # of each view's rows
    ends: list[Tensor]  # copies of all bytes that are not summed

    def equals(self, other: "Fingerprint") -> bool:
        """Whether both are of the same views and no bit has changed."""
        same = self.views is other.views
        return same and all(map(torch.equal, self.sums + self.ends, other.sums + other.ends))

    def differs(self, other: "Fingerprint") -> Tensor:
        """Whether a bit has changed, between two of the same views: on the device, and nobody waits for it."""
        pairs = list(zip(self.sums + self.ends, other.sums + other.ends, strict=True))
        device = next((a.device for a, _ in pairs if a.device.type != "cpu"), torch.device("cpu"))
        return torch.stack([(a != b).any().to(device) for a, b in pairs]).any()

    def numbers(self) -> dict[str, int]:
        """The sums by name, modulo 2⁶⁴; waits for the devices."""
        found: dict[str, int] = {}
        for of, sums, ends in zip(self.views, self.sums, self.ends, strict=True):
            data, parts = ends.cpu().numpy().tobytes(), list(zip(of.names, sums.tolist(), strict=True))
            for name, x in of.ends:
                parts.append((name, _sum_of(data[: len(x)])))
                data = data[len(x) :]
            for name, value in parts:
                found[name] = (found.get(name, 0) + value) % 2**64
        return found


class BitSums:
    """Takes fingerprints of tensors that mostly stay where they are: to make views takes longer than to add them up."""

    def __init__(self) -> None:
        self._seen: list[Tensor] | None = None  # None: the next call needs new views
        self._addresses: list[int] = []
        self._views: list[Views] = []

    @torch.no_grad()
    def __call__(self, tensors: list[Tensor], names: Callable[[], list[str]]) -> Fingerprint:
        """Of what this rank holds of each tensor. `names` is asked when the tensors are not those of the last call."""
        local = list(map(_local, tensors))
        same = self._seen is not None and len(local) == len(self._seen) and all(map(is_, local, self._seen))
        if not same or list(map(Tensor.data_ptr, local)) != self._addresses:
            self._make_views(local, names())
        made = self._views
        nothing = [torch.zeros(0, device="cpu")]
        sums = [torch.cat([rows.sum(1) for rows in of.words] or nothing) for of in made]
        return Fingerprint(made, sums, [torch.cat([x for _, x in of.ends] or nothing) for of in made])

    def _make_views(self, local: list[Tensor], names: list[str]) -> None:
        held = [(name, x, _flat(x)) for name, x in zip(names, local, strict=True) if x.numel()]
        copied = any(flat.untyped_storage().data_ptr() != x.untyped_storage().data_ptr() for _, x, flat in held)
        self._seen, self._addresses = None if copied else local, list(map(Tensor.data_ptr, local))
        devices = dict.fromkeys(x.device for _, x, _ in held)
        self._views = [views([(name, flat) for name, x, flat in held if x.device == device]) for device in devices]
