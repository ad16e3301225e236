"""BitSums: every bit of every tensor counts, however the tensors lie in memory."""

import math
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import distribute_tensor

from callbacks.support import fingerprint as bit_sums
from callbacks.support.fingerprint import SHORT, BitSums, views
from tests.support.pairwise import every_pair


@pytest.fixture
def one_rank() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def names_of(tensors: list[Tensor]) -> Callable[[], list[str]]:
    return lambda: [str(i) for i in range(len(tensors))]


def numbers(*tensors: Tensor) -> dict[str, int]:
    return BitSums()(list(tensors), names_of(list(tensors))).numbers()


def by_hand(tensor: Tensor) -> int:
    """The sum of a contiguous tensor, as checkpoints hold it."""
    left = bytes(tensor.reshape(-1).view(torch.uint8).tolist())
    value = 0
    for width in (8, 4, 2, 1):
        while len(left) >= width:
            value += int.from_bytes(left[:width], sys.byteorder, signed=width > 1)
            left = left[width:]
    return value % 2**64


KINDS = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.bool,
         torch.complex64, torch.complex128, torch.float8_e4m3fn]  # fmt: skip


ROWS = [8, 16, SHORT]  # summed, summed and copied, copied
any_rows = pytest.mark.parametrize("row", ROWS, ids=["summed", "summed and copied", "copied"])


@every_pair(size=[1, 2, 3, 7, 8, 9, 33], dtype=KINDS, row=ROWS)
def test_every_single_bit_counts(dtype: torch.dtype, size: int, row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bit_sums, "SHORT", row)
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (size * dtype.itemsize,), dtype=torch.uint8)
    tensor = raw.view(dtype)
    found = numbers(tensor)["0"]
    assert found == by_hand(tensor)
    for bit in range(raw.numel() * 8):
        raw[bit // 8] ^= 1 << (bit % 8)
        assert numbers(tensor)["0"] != found, f"bit {bit}"
        raw[bit // 8] ^= 1 << (bit % 8)


STRIDED = {
    "transposed": lambda x: x.view(4, 6).T,
    "channels last": lambda x: x.view(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
    "with gaps": lambda x: x.view(4, 6)[:, ::2],
    "one column": lambda x: x.view(4, 6)[:, 1],
    "off by one": lambda x: x[1:],
    "a scalar": lambda x: x[3],
    "one of a column": lambda x: x[::24],
}


@any_rows
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", STRIDED)
def test_strides_do_not_hide_a_bit(layout: str, dtype: torch.dtype, row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bit_sums, "SHORT", row)
    tensor = STRIDED[layout](torch.randn(24).to(dtype))
    sums, names = BitSums(), lambda: ["x"]
    before = sums([tensor], names).numbers()
    assert before == sums([tensor], names).numbers()
    for place in range(tensor.numel()):
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(place), tensor.shape))
        bits = tensor[index].view(torch.int16 if dtype is torch.bfloat16 else torch.int32)
        bits ^= 1 << 5
        assert sums([tensor], names).numbers() != before, "also with the views of the first call"
        bits ^= 1 << 5


def test_views_follow_the_tensors() -> None:
    """Memory that was replaced, and none at all."""
    parameter, sums = nn.Parameter(torch.zeros(4)), BitSums()
    before = sums([parameter], lambda: ["x"]).numbers()
    parameter.data = torch.ones(4)
    assert sums([parameter], lambda: ["x"]).numbers() != before
    assert sums([torch.empty(0, 3), parameter], lambda: ["empty", "x"]).numbers().keys() == {"x"}
    assert BitSums()([], list).numbers() == {}


SHAPES = [(40, 30), (3,), (40, 30), (700,), (), (40, 30), (1025,), (1025,), (0, 5)]


def flat_storage(gap: int, even: bool = False) -> list[Tensor]:
    """Views into one storage, `gap` elements between them; `even`: none begins within a 64-bit word."""
    room, tensors, at = torch.randn(20_000), [], 0
    for shape in SHAPES:
        tensors.append(room[at : at + math.prod(shape)].view(shape))
        at += math.prod(shape) + gap
        at += at % 2 if even else 0
    return tensors


@any_rows
@pytest.mark.parametrize("gap", [0, 6, 1000])
@pytest.mark.parametrize("even", [True, False])
def test_tensors_in_one_storage_have_the_sums_that_they_have_alone(
    gap: int, even: bool, row: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bit_sums, "SHORT", row)
    together = flat_storage(gap, even)
    assert numbers(*together) == {str(i): by_hand(x) for i, x in enumerate(together) if x.numel()}
    assert numbers(*together) == numbers(*[x.clone() for x in together])


def test_alike_tensors_are_summed_together() -> None:
    """Those of one size at equal distances, whatever lies between; what is no whole word at the end is copied."""
    room = torch.arange(20_000, dtype=torch.int32).view(torch.uint8)
    a, b, c, odd = (room[start : start + SHORT + 3] for start in (0, 4096, 8192, 20_000))
    short = room[40_000:40_100]
    found = views([("odd", odd), ("c", c), ("a", a), ("short", short), ("b", b)])
    assert [tuple(x.shape) for x in found.words] == [(3, SHORT // 8), (1, SHORT // 8)]
    assert found.names == ["a", "b", "c", "odd"]
    assert torch.equal(found.words[0][1], b[:SHORT].view(torch.int64))
    assert {name: len(x) for name, x in found.ends} == {"odd": 3, "c": 3, "a": 3, "b": 3, "short": 100}


@any_rows
def test_what_overlaps_counts_for_both(row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bit_sums, "SHORT", row)
    room = torch.randint(0, 256, (4000,), dtype=torch.uint8)
    parts = {
        "whole": room[:3501],
        "part": room[16:47],
        "twice": room[16:47],
        "end": room[3200:],
        "far": room[3904:3905],
    }
    assert BitSums()([*parts.values()], lambda: [*parts]).numbers() == {name: by_hand(x) for name, x in parts.items()}


def test_a_name_that_several_tensors_have_counts_all_of_them() -> None:
    found = BitSums()([torch.ones(1), torch.ones(1), torch.ones(3)], lambda: ["x", "x", "y"]).numbers()
    assert found == {"x": 2 * by_hand(torch.ones(1)), "y": by_hand(torch.ones(3))}


def test_storages_at_one_address_may_differ_in_size() -> None:
    room = torch.arange(10_000, dtype=torch.uint8).numpy()
    part, whole = torch.from_numpy(room[:5000]), torch.from_numpy(room)
    assert numbers(part, whole) == {"0": by_hand(part), "1": by_hand(whole)}


def test_another_default_device_changes_nothing() -> None:
    tensors = [torch.randn(1000), torch.randn(3)]
    with torch.device("meta"):
        found = numbers(*tensors)
    assert found == {"0": by_hand(tensors[0]), "1": by_hand(tensors[1])}


def test_nothing_has_no_sums_whatever_came_before() -> None:
    sums = BitSums()
    assert sums([torch.randn(4, 6)[:, ::2]], lambda: ["copied"]).numbers()
    assert sums([], list).numbers() == {}


def test_a_fingerprint_keeps_what_it_has_seen() -> None:
    """Also where nothing but copies is needed."""
    tensor, sums = torch.zeros(3), BitSums()
    before = sums([tensor], lambda: ["x"])
    tensor.fill_(1)
    assert not before.equals(sums([tensor], lambda: ["x"]))
    assert before.numbers() == {"x": 0}


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("gap", [0, 6])
@any_rows
def test_a_bit_is_found_and_named_wherever_it_flips(
    row: int, gap: int, even: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bit_sums, "SHORT", row)
    tensors = flat_storage(gap, even)
    sums = BitSums()
    before = sums(tensors, names_of(tensors))
    again = sums(tensors, names_of(tensors))
    assert before.equals(again) is even, "what had to be copied is compared by its numbers"
    assert before.numbers() == again.numbers()
    for i, tensor in enumerate(tensors):
        for place in {0, tensor.numel() // 2, tensor.numel() - 1} & set(range(tensor.numel())):
            bits = tensor.view(-1)[place].view(torch.int32)
            bits ^= 1 << 3
            after = sums(tensors, names_of(tensors))
            assert not before.equals(after)
            old, new = before.numbers(), after.numbers()
            assert [name for name in new if new[name] != old[name]] == [str(i)]
            bits ^= 1 << 3


def test_shards_are_looked_up_once(one_rank: DeviceMesh) -> None:
    shard = nn.Parameter(distribute_tensor(torch.randn(40, 30), one_rank))
    asked, sums = [], BitSums()

    def names() -> list[str]:
        asked.append(1)
        return ["x"]

    before = sums([shard], names)
    assert before.equals(sums([shard], names))
    assert len(asked) == 1
    shard._local_tensor.view(torch.int32)[3, 4] ^= 1
    assert not before.equals(sums([shard], names))
    assert [*sums([shard], names).numbers().values()] == [*numbers(shard._local_tensor).values()]
