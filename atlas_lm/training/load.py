"""From a checkpoint to a model: whether it fits, its weights, the module that it describes."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from omegaconf import MISSING

from atlas_lm.checkpoints.content import MODEL, CheckpointError
from atlas_lm.checkpoints.io import read_checkpoint
from atlas_lm.config.model import ModelConfig
from atlas_lm.data.interfaces import UNKNOWN_EMBEDDER
from atlas_lm.data.run_tokenizer import another_tokenizer
from atlas_lm.training.module import AtlasModule

DEFAULTS = {field.name: field.default for field in fields(ModelConfig) if field.default != MISSING}


def build_module(content: dict[str, Any], path: Path, **optim: Any) -> Any:
    """The `AtlasModule` of a checkpoint's content, weights included; `optim`: settings to change of its optimizer.

    CheckpointError: the content describes no model that this version can build, or has not its weights.
    """
    if "embedder" in content.get(MODEL[0], {}):
        raise CheckpointError(
            f"{str(path)!r} predicts vectors, not tokens: test it with python -m atlas_lm latent five_cat, or choose "
            "another run"
        )
    try:
        arguments = dict(content[MODEL[0]])
        module = AtlasModule(**{**arguments, "optim": {**arguments["optim"], **optim}})
    except (TypeError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{str(path)!r} is of no model that this version of atlas-lm can build ({type(error).__name__}: {error}): "
            "choose another checkpoint"
        ) from error
    _fill(module, content, path)
    return module


def load_weights(module: LightningModule, path: Path) -> None:
    """Copy a checkpoint's weights into `module`. CheckpointError if names, shapes or the tokenizer differ."""
    content = read_checkpoint(path)
    tokenizer = another_tokenizer(content.get(MODEL[0], {}), module.hparams, path)
    if tokenizer:
        raise CheckpointError(f"{str(path)!r} does not fit, {tokenizer}: set the tokenizer (or the shards) back")
    embedder = another_embedder(content.get(MODEL[0], {}), module.hparams)
    if embedder:
        raise CheckpointError(f"{str(path)!r} does not fit, {embedder}: embed the text with the model of then")
    _fill(module, content, path)


def another_embedder(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """How the embedder of a checkpoint's vectors differs from that of the run to start; None: it does not, there is
    none, or it is unknown. `saved`, `wanted`: the hyperparameters of both modules."""
    then, now = saved.get("embedder"), wanted.get("embedder")
    if then == now or None in (then, now) or UNKNOWN_EMBEDDER in (then, now):
        return None
    return f"vectors of the embedder {now} but {then} in the checkpoint"


def _fill(module: LightningModule, content: dict[str, Any], path: Path) -> None:
    saved, wanted = content["state_dict"], module.state_dict()
    wrong = [name for name in wanted if name not in saved or saved[name].shape != wanted[name].shape]
    wrong += [name for name in saved if name not in wanted]
    if wrong:
        found = differences(
            dict(content.get(MODEL[0], {}).get(MODEL[1], {})), dict(module.hparams.get(MODEL[1], {}))
        ) or [f"{len(wrong)} tensors differ, the first is {wrong[0]}"]
        raise CheckpointError(f"{str(path)!r} is of another model: {'; '.join(found)}: set these back")
    module.load_state_dict(saved)


def check_same_model(path: Path, header: dict[str, Any], module: LightningModule) -> None:
    """CheckpointError naming the fields in which the checkpoint's model, or the kind of its optimizer, differs from
    `module`'s. `header`: the checkpoint's content."""
    saved, wanted = header.get(MODEL[0], {}), module.hparams
    found = differences(dict(saved.get(MODEL[1], {})), dict(wanted.get(MODEL[1], {})))
    if saved.get("vocab_size") != wanted.get("vocab_size"):
        found.append(f"a vocabulary of {wanted.get('vocab_size')} but {saved.get('vocab_size')} in the checkpoint")
    found += [x for x in (another_tokenizer(saved, wanted, path), another_embedder(saved, wanted)) if x]
    before, now = (dict(settings.get("optim", {})).get("name") for settings in (saved, wanted))
    if before != now:  # its moments mean nothing to another one
        found.append(f"optim.name={now} but {before} in the checkpoint")
    if found:
        raise CheckpointError(
            f"{str(path)!r} is of another model or optimizer: {'; '.join(found)}: "
            "set these back to resume, or use init_from= to start a new run from its weights"
        )


def differences(saved: dict[str, Any], wanted: dict[str, Any], without: tuple[str, ...] = ()) -> list[str]:
    """`name=<wanted> but <saved> in the checkpoint` for every field that differs.

    What changes neither weights nor outputs does not count, nor what `without` names.
    """
    free = ("name", "checkpoint", *without)
    saved = {name: DEFAULTS[name] for name in wanted if name in DEFAULTS} | saved  # an older checkpoint knows less
    names = [name for name in [*wanted, *(n for n in saved if n not in wanted)] if name not in free]
    absent = "absent"
    return [
        f"model.{name}={wanted.get(name, absent)} but {saved.get(name, absent)} in the checkpoint"
        for name in names
        if wanted.get(name, absent) != saved.get(name, absent)
    ]
