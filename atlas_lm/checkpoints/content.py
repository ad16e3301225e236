"""What a checkpoint file holds: tensors and plain containers, never code; and how far training had come in it."""

import errno
import pickle
from pathlib import Path
from typing import Any

from atlas_lm.checkpoints.manifest import SHARDS, Position

MODEL = ("hyper_parameters", "model")  # where Lightning puts `AtlasModule`'s argument


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not belong to this model."""


def read_content(path: Path, map_location: Any, lazily: bool) -> dict[str, Any]:
    """The content; of a sharded checkpoint `lazily` all but the tensors. CheckpointError, without a remedy, if it is
    none of ours, or its shards are gone."""
    import torch  # takes seconds: whoever lists and names checkpoints need not wait

    broken = f"{str(path)!r} is truncated or not a checkpoint ({path.stat().st_size} bytes)"
    try:
        content = torch.load(path, map_location=map_location, weights_only=True, mmap=lazily or None)
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "GLOBAL" in str(error):
            what = "holds Python objects, not only tensors and plain containers"
            raise CheckpointError(f"{str(path)!r} {what}, and is not atlas-lm's") from error
        raise CheckpointError(broken) from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # torch seeks to before the start of a file that is cut off
            raise
        raise CheckpointError(broken) from error
    except MemoryError:
        raise
    except Exception as error:  # what a few changed bytes make torch's reader raise has no end
        raise CheckpointError(broken) from error
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise CheckpointError(f"{str(path)!r} is a file of tensors but not a checkpoint of a run")
    odd = [str(name) for name, value in content["state_dict"].items() if not _is_plain(value)]
    if odd:
        raise CheckpointError(f"{str(path)!r} holds no plain tensor as {odd[0]}, and is not atlas-lm's")
    arguments = content.get(MODEL[0], {})
    if not isinstance(arguments, dict) or not isinstance(arguments.get(MODEL[1], {}), dict):
        raise CheckpointError(f"{str(path)!r} does not say which model it is of, and is not atlas-lm's")
    if SHARDS not in content or lazily:
        return content
    from atlas_lm.checkpoints import shards

    try:
        return shards.whole(content, path.resolve().parent, map_location)
    except shards.ShardsError as error:
        raise CheckpointError(f"{str(path)!r}: {error}") from error


def _is_plain(value: Any) -> bool:
    """A tensor with numbers in it: torch also reads sparse, quantised and nested ones, and some without data."""
    import torch

    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        return False
    return value.layout == torch.strided and not value.is_quantized and not value.is_nested and not value.is_meta


def position_in(checkpoint: dict[str, Any]) -> Position:
    """(logging steps, optimizer steps): the first never goes back, the second does at a rollback."""
    step = checkpoint.get("global_step")
    step = step if isinstance(step, int) else 0
    try:
        return steps_recorded(checkpoint), step
    except (KeyError, TypeError, AttributeError):  # of another program, or of weights alone
        return step, step


def steps_recorded(checkpoint: dict[str, Any]) -> int:
    """Number of the first logging step that a run resumed from `checkpoint` will write. KeyError: it is of no run."""
    loop = checkpoint["loops"]["fit_loop"]
    total = loop["epoch_loop.batch_progress"]["total"]
    # Lightning's own rule: where a step was not complete when it was saved, its number has not been counted up yet
    return loop["epoch_loop.state_dict"]["_batches_that_stepped"] + (total["completed"] < total["processed"])
