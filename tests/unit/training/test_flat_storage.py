"""Tensors side by side: the same values, aligned like torch's own allocations, equal ones at equal distances."""

import pytest
import torch
from torch import Tensor, nn

from atlas_lm.training.flat_storage import ALIGNMENT, LARGE, flat_storage, lay_side_by_side


def test_copies_share_one_storage_at_equal_distances() -> None:
    tensors = [torch.randn(3, 5), torch.randn(17), torch.randn(3, 5), torch.randn(()), torch.randn(5, 3).T]
    copies = flat_storage(tensors)
    for copy, x in zip(copies, tensors, strict=True):
        assert torch.equal(copy, x)
        assert copy.stride() == x.stride()
        assert copy.data_ptr() % ALIGNMENT == 0
    assert len({copy.untyped_storage().data_ptr() for copy in copies}) == 1
    same = sorted(copies[i].data_ptr() for i in (0, 2, 4))
    assert same[1] - same[0] == same[2] - same[1] == ALIGNMENT
    copies[0].zero_()
    assert all(torch.equal(copy, x) for copy, x in zip(copies[1:], tensors[1:], strict=True)), "none overlaps another"


def test_large_ones_start_at_multiples_of_their_own() -> None:
    copies = flat_storage(torch.zeros(n) for n in (3, LARGE // 4, 1000, LARGE // 4 - 1))
    places = [copy.data_ptr() - copies[2].data_ptr() for copy in copies]
    assert places == [4 * LARGE, 2 * LARGE, 0, 3 * LARGE]


def test_nothing_to_lay_out() -> None:
    assert flat_storage([]) == []


def test_what_cannot_lie_side_by_side() -> None:
    with pytest.raises(ValueError, match=r"float64 on cpu cannot lie beside torch\.float32 on cpu"):
        flat_storage([torch.zeros(3), torch.zeros(3, dtype=torch.float64)])
    with pytest.raises(ValueError, match=r"shape \(4, 3\) with strides \(6, 2\) is not dense"):
        flat_storage([torch.randn(4, 6)[:, ::2]])


def storages(module: nn.Module) -> int:
    return len({p.untyped_storage().data_ptr() for p in module.parameters()})


def test_a_module_that_was_moved_is_laid_out_again() -> None:
    """As one that goes to a GPU: there each parameter gets a storage of its own."""
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    before = [p.detach().clone() for p in module.parameters()]
    assert storages(module) == 4
    for dtype in (torch.float64, torch.float32):
        lay_side_by_side(module)
        assert storages(module) == 1
        assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
        module.to(dtype)
        assert storages(module) == 4
        before = [x.to(dtype) for x in before]


def test_parameters_of_two_kinds_stay_where_they_are() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5).double())
    lay_side_by_side(module)
    assert storages(module) == 4


def test_without_memory_for_both_they_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_: object) -> list[Tensor]:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr("atlas_lm.training.flat_storage.flat_storage", none)
    module = nn.Linear(3, 4)
    lay_side_by_side(module)
    assert storages(module) == 2
