"""The tokenizer of a run: its folder keeps a copy, its checkpoints the fingerprint.

A path names a tokenizer only until another file lies there. Another one of the same size fits every tensor, and turns
all that a model has learned into noise; the fingerprint is the tokenizer's content.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from atlas_lm.config.parsing import CONFIG, read_config
from atlas_lm.data.ranks import rank_zero_only
from atlas_lm.data.tokenizers import ByteTokenizer, JsonTokenizer, Tokenizer, load_tokenizer
from atlas_lm.files import write_atomically

log = logging.getLogger(__name__)

COPY = "tokenizer.json"  # in the run folder; none for bytes
SEPARATOR = "tokenizer.separator"  # beside it where the separator is not the one that would be found
NO_TEXT = "none"  # the fingerprint of tokens that are no text
ARGUMENT = "tokenizer"  # of `AtlasModule`, and so in a checkpoint's hyper_parameters


def fingerprint_of(tokenizer: Tokenizer | None) -> str:
    """What a checkpoint keeps of a tokenizer."""
    return NO_TEXT if tokenizer is None else tokenizer.fingerprint()


@rank_zero_only
def keep_tokenizer(run: Path, tokenizer: Tokenizer | None) -> None:
    """Write the copy, once. A tokenizer of the caller's own making, without a tokenizer.json, leaves none."""
    if not isinstance(tokenizer, JsonTokenizer) or (run / COPY).exists():
        return
    if tokenizer.separator != tokenizer.default_separator:
        write_atomically(run / SEPARATOR, tokenizer.separator)
    write_atomically(run / COPY, tokenizer.to_json())


def kept_tokenizer(run: Path) -> JsonTokenizer | None:
    """The run's copy; None where there is none. ValueError: it is damaged."""
    if not (run / COPY).is_file():
        return None
    separator = (run / SEPARATOR).read_text(encoding="utf-8") if (run / SEPARATOR).is_file() else None
    return JsonTokenizer(run / COPY, separator)


def tokenizer_of(run: Path, recorded: str | None) -> Tokenizer:
    """The tokenizer that a run was trained with. `recorded`: its fingerprint in the checkpoint; None in older ones.

    ValueError: the run was not trained on text, its tokenizer is lost, or is another one now.
    """
    # Read in any case: a configuration that is broken, or from an attacker, is said and not passed over.
    config = read_config(run / CONFIG) if (run / CONFIG).is_file() else OmegaConf.create()
    if recorded == NO_TEXT:
        raise ValueError(f"run {str(run)!r} was not trained on text: choose another run")
    if recorded == ByteTokenizer().fingerprint():
        return ByteTokenizer()
    kept = kept_tokenizer(run)
    where = str(run / COPY)
    if kept is not None:
        found: Tokenizer = kept
    else:
        found, where = _named(config)
    if recorded is None:
        if not isinstance(found, ByteTokenizer):
            log.warning(
                "warning: the checkpoint of %s does not record its tokenizer: %s is taken, which cannot be checked",
                run, where,
            )  # fmt: skip
    elif found.fingerprint() != recorded:
        raise ValueError(
            f"{where!r} is not the tokenizer that {str(run)!r} was trained with: its fingerprint is "
            f"{found.fingerprint()}, the checkpoint's {recorded}: restore it as {str(run / COPY)!r}"
        )
    return found


def _named(config: DictConfig) -> tuple[Tokenizer, str]:
    """The tokenizer that the run's configuration names, and what it is called there."""
    spec, path = OmegaConf.select(config, "data.source.tokenizer"), OmegaConf.select(config, "data.source.path")
    if spec is None and path is not None and (Path(path) / COPY).exists():  # shards
        spec = str(Path(path) / COPY)
    if spec is None:
        return ByteTokenizer(), "bytes"
    if isinstance(spec, DictConfig):
        return JsonTokenizer(str(spec.get("path")), spec.get("separator")), str(spec.get("path"))
    return load_tokenizer(str(spec)), str(spec)


def another_tokenizer(saved: Mapping[str, Any], wanted: Mapping[str, Any], checkpoint: Path) -> str | None:
    """How the tokenizer of a checkpoint differs from that of the run to start; None where it does not, or is unknown.

    `saved`, `wanted`: the hyperparameters of both modules.
    """
    then, now = saved.get(ARGUMENT), wanted.get(ARGUMENT)
    if now is None or then == now:
        return None
    if then is None:
        _say_unknown(checkpoint)
        return None
    copy = checkpoint.parent.parent / COPY
    kept = f", kept as {str(copy)!r}" if copy.is_file() else ""
    return f"a tokenizer with the fingerprint {now} but {then} in the checkpoint{kept}"


@rank_zero_only
def _say_unknown(checkpoint: Path) -> None:
    log.warning(
        "warning: %s does not record its tokenizer: make sure that data.source.tokenizer is still the same", checkpoint
    )
