"""Modules that are watched without hooks, and rows of tensors: what is seen is what the model goes by."""

import pytest
import torch
from torch import nn

from atlas_lm.inspection.hooks import Rings, watch


def watched(module, x):
    seen = []
    handle = watch(module, lambda output, *given: seen.append((output, *given)))
    output = module(x)
    handle.remove()
    return output, seen


def test_a_module_shows_its_output_and_arguments_until_the_handle_is_removed():
    module, x = nn.Linear(3, 2), torch.randn(4, 3)
    output, seen = watched(module, x)
    assert [(a is output, b is x) for a, b in seen] == [(True, True)]
    module(x)
    assert len(seen) == 1
    assert "forward" not in vars(module)


def test_what_the_hooks_of_others_change_is_seen():
    module, x = nn.Linear(3, 2), torch.randn(4, 3)
    module.register_forward_hook(lambda _, __, output: 50 * output)
    output, seen = watched(module, x)
    assert torch.equal(seen[0][0], output)
    module = nn.Linear(3, 2)
    module.register_forward_pre_hook(lambda _, given: (0 * given[0],))
    output, seen = watched(module, x)
    assert not seen[0][1].any()
    assert torch.equal(seen[0][0], output)


def test_several_on_one_module_see_it_all_and_leave_it_as_it_was():
    module, x = nn.Linear(3, 2), torch.randn(4, 3)
    own = module.forward
    module.forward = lambda given: own(given) + 1  # as one who patched it
    patched, counts = module.forward, [0, 0]

    def count(n):
        def seen(*_):
            counts[n] += 1

        return seen

    handles = [watch(module, count(n)) for n in range(2)]
    expected = own(x) + 1
    assert torch.equal(module(x), expected)
    assert counts == [1, 1]
    for handle in reversed(handles):
        handle.remove()
    assert module.forward is patched


def test_rows_are_copies_and_a_missing_tensor_is_named():
    rings = Rings(2)
    first, second = rings.place("layer 0"), rings.place("the memory of layer 0", 2)
    x = torch.randn(1, 3)
    rings.put(first, x)
    rings.put(second, x + 1, x + 2)
    rings.close()
    x.zero_()
    rings.put(second, x, x)
    with pytest.raises(RuntimeError, match="layer 0 did not fire"):
        rings.close()
    rings.put(first, x)
    rings.close()
    found = rings.take()
    assert [tuple(part.shape) for part in found] == [(2, 3)] * 3
    assert torch.equal(found[1][0], found[0][0] + 1)
    assert not found[0][1].any()
    with pytest.raises(ValueError, match="nothing"):
        rings.take()
