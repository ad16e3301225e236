"""BitSums: every bit of every tensor counts, however the tensors lie in memory."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import distribute_tensor

from callbacks import bit_sums
from callbacks.bit_sums import GAP, SMALL, BitSums, words


@pytest.fixture
def one_rank() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def names_of(tensors: list[Tensor]) -> Callable[[], list[str]]:
    return lambda: [str(i) for i in range(len(tensors))]


def numbers(*tensors: Tensor) -> dict[str, int]:
    return BitSums()(list(tensors), names_of(list(tensors))).numbers()


KINDS = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.bool,
         torch.complex64, torch.complex128, torch.float8_e4m3fn]  # fmt: skip


either_way = pytest.mark.parametrize("small", [0, SMALL], ids=["summed", "copied"])


@either_way
@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 9, 33])
def test_every_single_bit_counts(dtype: torch.dtype, size: int, small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bit_sums, "SMALL", small)
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (size * dtype.itemsize,), dtype=torch.uint8)
    tensor = raw.view(dtype)
    found = numbers(tensor)["0"]
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
}


@either_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", STRIDED)
def test_strides_do_not_hide_a_bit(
    layout: str, dtype: torch.dtype, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bit_sums, "SMALL", small)
    tensor = STRIDED[layout](torch.randn(24).to(dtype))
    sums, names = BitSums(), lambda: ["x"]
    before = sums([tensor], names).numbers()
    assert before == sums([tensor], names).numbers()
    assert sum(part.numel() * part.element_size() for part in words(tensor)) == tensor.numel() * dtype.itemsize
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


def side_by_side(gap: int, even: bool = False) -> list[Tensor]:
    """Views into one storage, `gap` elements between them; `even`: none begins within a 64-bit word."""
    room, tensors, at = torch.randn(10_000), [], 0
    for shape in SHAPES:
        tensors.append(room[at : at + math.prod(shape)].view(shape))
        at += math.prod(shape) + gap
        at += at % 2 if even else 0
    return tensors


@pytest.mark.parametrize("gap", [0, 6])
def test_tensors_in_one_storage_have_the_sums_that_they_have_alone(gap: int, monkeypatch: pytest.MonkeyPatch) -> None:
    together = side_by_side(gap)
    alone = [x.clone() for x in together]
    assert numbers(*together) == numbers(*alone)
    assert numbers(*together) == {k: v for i, x in enumerate(alone) for k, v in {str(i): numbers(x).get("0")}.items()
                                  if x.numel()}  # fmt: skip
    monkeypatch.setattr(bit_sums, "SMALL", 0)
    assert numbers(*together) == numbers(*alone)


def test_equally_long_neighbours_share_a_view() -> None:
    room = torch.randn(5, 1000)
    rows = bit_sums.in_rows([(str(i), room[i].view(torch.int64)) for i in (4, 0, 1, 2)])
    assert [names for names, _ in rows] == [["0", "1", "2"], ["4"]]
    assert torch.equal(rows[0][1], room[:3].view(torch.int64))
    twice = bit_sums.in_rows([("a", room[0].view(torch.int64)), ("the same", room[0].view(torch.int64))])
    assert [names for names, _ in twice] == [["a"], ["the same"]]


def test_small_neighbours_are_copied_together() -> None:
    room, other = torch.arange(1000, dtype=torch.uint8), torch.zeros(5, dtype=torch.uint8)
    near, behind, far = room[10:20], room[20 + GAP : 30 + GAP], room[31 + 2 * GAP :][:4]
    runs = bit_sums.in_runs([("far", far), ("b", behind), ("else", other), ("a", near)])
    assert [run.places for run in runs] == [[("a", 0, 10), ("b", 10 + GAP, 10)], [("far", 0, 4)], [("else", 0, 5)]]
    assert torch.equal(runs[0].view, room[10 : 30 + GAP])
    found = dict(bit_sums.Layout([], runs).small(bit_sums.Layout([], runs).copies()))
    for name, view in (("a", near), ("b", behind), ("far", far), ("else", other)):
        assert torch.equal(found[name], view)


def test_what_overlaps_is_in_one_run_and_counts_for_both() -> None:
    room = torch.arange(100, dtype=torch.uint8)
    (run,) = bit_sums.in_runs([("whole", room[:50]), ("part", room[10:20]), ("end", room[45:60])])
    assert run.places == [("whole", 0, 50), ("part", 10, 10), ("end", 45, 15)]
    assert run.view.numel() == 60


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("gap", [0, 6])
def test_a_bit_is_found_and_named_wherever_it_flips(gap: int, even: bool) -> None:
    tensors = side_by_side(gap, even)
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


def test_a_small_tensor_is_one_that_is_copied() -> None:
    small, large = torch.zeros(SMALL // 4), torch.zeros(SMALL // 4 + 1)
    found = BitSums()([small, large], lambda: ["small", "large"])
    assert [name for run in found.layouts[0].runs for name, _, _ in run.places] == ["small"]
    assert {name for names, _ in found.layouts[0].rows for name in names} == {"large"}
