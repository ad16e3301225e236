"""A trained run of next-vector prediction, and the data that it was trained on."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import NamedTuple

from omegaconf import OmegaConf

from atlas_lm.checkpoints.content import MODEL, CheckpointError
from atlas_lm.checkpoints.io import read_checkpoint
from atlas_lm.config.parsing import CONFIG, read_config
from atlas_lm.latent.module import LatentModule
from atlas_lm.latent.source import EmbeddingSource
from atlas_lm.runs.resolve import resolve_checkpoint, resolve_run
from atlas_lm.training.load import another_embedder

SOURCE = f"{EmbeddingSource.__module__}.{EmbeddingSource.__name__}"


class Loaded(NamedTuple):
    """What `load` returns."""

    folder: Path
    module: LatentModule
    source: EmbeddingSource


def load(run: str | Path, outputs: str | Path = "outputs") -> Loaded:
    """The module of a run, in eval mode on the CPU, and its data, checked to be by the same embedder.

    `run`: a checkpoint, a run folder, or an experiment in `outputs`, which means its newest finished run. ValueError:
    there is none, it is damaged or of another kind, or its data is gone or has changed.
    """
    checkpoint = resolve_checkpoint(run, outputs)
    folder = checkpoint.parent.parent if Path(run).is_file() else resolve_run(run, outputs)
    content = read_checkpoint(checkpoint)
    arguments = dict(content.get(MODEL[0], {}))
    if "embedder" not in arguments:
        raise ValueError(f"run {str(folder)!r} predicts tokens, not vectors: choose a run of +experiment=latent_p1 …")
    try:
        module = LatentModule(**arguments)
        module.load_state_dict(content["state_dict"])
    except (TypeError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{str(checkpoint)!r} is of no model that this version of atlas-lm can build ({type(error).__name__}: "
            f"{error}): choose another checkpoint"
        ) from error
    return Loaded(folder, module.eval(), _source(folder, module))


def _source(folder: Path, module: LatentModule) -> EmbeddingSource:
    values = OmegaConf.to_container(read_config(folder / CONFIG), resolve=True)
    data = values.get("data") if isinstance(values, dict) else None
    settings = data.get("source") if isinstance(data, dict) else None
    if not isinstance(settings, dict) or settings.get("_target_") != SOURCE:  # nothing else is built from a run folder
        raise ValueError(f"data.source of {str(folder / CONFIG)!r} is no {SOURCE}: choose another run")
    known = inspect.signature(EmbeddingSource).parameters
    source = EmbeddingSource(**{str(k): v for k, v in settings.items() if k in known})
    found = source.frames
    wrong = another_embedder({"embedder": module.embedder}, {"embedder": found.embedder})
    if found.dim != module.model.dim:
        wrong = f"vectors of {found.dim} dimensions but {module.model.dim} in the checkpoint"
    if wrong:
        raise ValueError(f"{source.path!r} has {wrong}: restore the vectors that {str(folder)!r} was trained on")
    return source
