"""A trained model with its tokenizer, by the name of its experiment, its run folder or a checkpoint."""

from pathlib import Path
from typing import Any, NamedTuple

from hydra.utils import instantiate
from omegaconf import OmegaConf

from atlas_lm.checkpoints.io import read_checkpoint
from atlas_lm.config.parsing import CONFIG, read_config
from atlas_lm.config.validate import check_targets
from atlas_lm.data.run_tokenizer import ARGUMENT, COPY, another_tokenizer, tokenizer_of
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


def load_data(folder: Path, content: dict[str, Any], **changes: Any) -> Any:
    """The run's data, set up in this process, with `changes` of its settings such as seq_len.

    With the run's own copy of its tokenizer, which outlives the file that was trained with. ValueError: it is not the
    data that the checkpoint's `content` was trained on, by vocabulary and tokenizer.
    """
    settings = OmegaConf.to_container(read_config(folder / CONFIG), resolve=True)
    values = settings.get("data") if isinstance(settings, dict) else None
    if not isinstance(values, dict) or "_target_" not in values:
        raise ValueError(f"data of {folder / CONFIG} has no _target_")
    source = values.get("source")
    if (folder / COPY).is_file() and isinstance(source, dict):
        values["source"] = with_tokenizer(source, str(folder / COPY))
    values.update(num_workers=0, **changes)
    check_targets(values, "data")
    data = instantiate(values)
    data.setup("fit")
    arguments = content["hyper_parameters"]
    trained = arguments["vocab_size"]
    if data.vocab_size != trained:
        raise ValueError(f"the data has {data.vocab_size} token ids, {trained} in training: restore its tokenizer")
    wrong = another_tokenizer(arguments, {ARGUMENT: data.tokenizer_fingerprint}, folder / "checkpoints" / "last.ckpt")
    if wrong:
        raise ValueError(f"the data has {wrong}: restore its tokenizer")
    return data


def with_tokenizer(source: dict[str, Any], path: str) -> dict[str, Any]:
    """A source's settings with the tokenizer at `path` in place of its own, in the source that it may wrap too."""
    spec, text = source.get("tokenizer"), source.get("text")
    if isinstance(text, dict):
        return {**source, "text": with_tokenizer(text, path)}
    if isinstance(spec, dict):
        return {**source, "tokenizer": {**spec, "path": path}}
    return {**source, "tokenizer": path} if isinstance(spec, str) else source
