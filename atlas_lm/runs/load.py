"""A trained model with its tokenizer, by the name of its experiment, its run folder or a checkpoint."""

from pathlib import Path
from typing import NamedTuple

from atlas_lm.checkpoints.io import read_checkpoint
from atlas_lm.data.run_tokenizer import ARGUMENT, tokenizer_of
from atlas_lm.data.tokenizers import Tokenizer
from atlas_lm.model.atlas import AtlasLM
from atlas_lm.runs.resolve import resolve_checkpoint, resolve_run
from atlas_lm.training.load import build_module


class Loaded(NamedTuple):
    """What `load` returns."""

    model: AtlasLM
    tokenizer: Tokenizer


def load(run: str | Path, outputs: str | Path = "outputs") -> Loaded:
    """The model, in eval mode on the CPU, and the tokenizer that it was trained with.

    `run`: a checkpoint, a run folder, or the name of an experiment in `outputs`, which means its newest finished run.
    ValueError: there is none, it is damaged, or it was not trained on text.
    """
    checkpoint = resolve_checkpoint(run, outputs)
    folder = checkpoint.parent.parent if Path(run).is_file() else resolve_run(run, outputs)
    header = read_checkpoint(checkpoint, lazily=True)
    tokenizer = tokenizer_of(folder, header.get("hyper_parameters", {}).get(ARGUMENT))
    model = load_model(checkpoint)
    if tokenizer.vocab_size != model.embed.num_embeddings:
        raise ValueError(
            f"run {str(folder)!r} has a vocabulary of {model.embed.num_embeddings}, its tokenizer "
            f"{tokenizer.vocab_size}: it was not trained on text, or its tokenizer has changed since; "
            "choose another run"
        )
    return Loaded(model, tokenizer)


def load_model(checkpoint: Path) -> AtlasLM:
    """The model of a checkpoint file, in eval mode, with the chunk sizes that training had reached."""
    content = read_checkpoint(checkpoint)
    module = build_module(content, checkpoint)
    if content.get("local_chunks"):
        module.set_local_chunks(content["local_chunks"])
    return module.model.eval()
