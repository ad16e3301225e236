"""A run's model as a folder for Hugging Face transformers, and back to a run folder of ours."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import OmegaConf

from atlas_lm import __version__
from atlas_lm.checkpoints.content import MODEL
from atlas_lm.checkpoints.io import AtomicCheckpointIO, read_checkpoint
from atlas_lm.config.parsing import CONFIG, read_json
from atlas_lm.data.run_tokenizer import COPY, SEPARATOR, tokenizer_of
from atlas_lm.data.tokenizers import ByteTokenizer, JsonTokenizer, Tokenizer
from atlas_lm.exchange.bundle import bundle
from atlas_lm.files import ROOT, write_atomically
from atlas_lm.runs.folder import write_identity
from atlas_lm.runs.resolve import resolve_checkpoint
from atlas_lm.training.load import build_module

TRAINING = "training.json"  # what a run of ours needs beside the weights, to go back to one
EXPORTED = "config.json"
BYTES_SEPARATOR = "<|endoftext|>"


def export(run: str, out: Path, outputs: str = "outputs") -> Path:
    """Write the model of a run, an experiment or a checkpoint to the new folder `out`; its checkpoint's path.

    ValueError: there is no such run, it was not trained on text, `out` has files, or transformers is not installed.
    """
    with new_folder(out) as folder:
        return _export(run, folder, outputs)


def _export(run: str, out: Path, outputs: str) -> Path:
    checkpoint = resolve_checkpoint(run, outputs)
    content = read_checkpoint(checkpoint)
    arguments = dict(content[MODEL[0]])
    folder = checkpoint.parent.parent
    tokenizer = tokenizer_of(folder, arguments.get("tokenizer"))
    module = build_module(content, checkpoint)
    if content.get("local_chunks"):
        module.set_local_chunks(content["local_chunks"])
    settings = dict(arguments["model"])
    if module.local_chunks:  # a twin without memory has none, and the sizes of one that it stands beside
        settings["local_chunks"] = list(module.local_chunks)
    save_model(module.model, settings, arguments["vocab_size"], tokenizer, out)
    training = {
        "hyper_parameters": {**plain(arguments), "model": settings},
        "global_step": content.get("global_step", 0),
        "atlas_lm": __version__,
    }
    write_atomically(out / TRAINING, json.dumps(training, indent=2) + "\n")
    if (folder / CONFIG).is_file():
        write_atomically(out / CONFIG, (folder / CONFIG).read_bytes())
    if (folder / SEPARATOR).is_file():
        write_atomically(out / SEPARATOR, (folder / SEPARATOR).read_bytes())
    report = read_json(folder / "report.json") if (folder / "report.json").is_file() else {}
    write_atomically(out / "README.md", card(settings, arguments["vocab_size"], training, report))
    write_atomically(out / "LICENSE", (ROOT / "LICENSE").read_bytes())
    return checkpoint


def consolidate(run: str, out: Path, outputs: str = "outputs") -> Path:
    """Write a run's newest intact checkpoint, or the one named, as one file into the new run folder `out`; its path.

    Weights, moments and all that a resume needs; of a sharded one too, which then any strategy resumes.
    ValueError as of `export`; CheckpointError: it is damaged.
    """
    checkpoint = resolve_checkpoint(run, outputs)
    content = read_checkpoint(checkpoint)
    folder, name = checkpoint.resolve().parent.parent, checkpoint.resolve().name
    with new_folder(out) as into:
        AtomicCheckpointIO().save_checkpoint(content, into / "checkpoints" / name)
        for file in (CONFIG, COPY, SEPARATOR):
            if (folder / file).is_file():
                write_atomically(into / file, (folder / file).read_bytes())
        write_identity(into, [])
    return out / "checkpoints" / name


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write to, which becomes `out` when all is written, and is removed where something fails.

    ValueError: there is something in `out` already.
    """
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ValueError(f"out={out} has something in it already: give a new folder")
    half = out.with_name(f"{out.name}.tmp")
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    try:
        yield half
        half.replace(out)
    finally:
        shutil.rmtree(half, ignore_errors=True)


def save_model(model: Any, settings: dict[str, Any], vocab_size: int, tokenizer: Tokenizer, out: Path) -> None:
    """Weights as safetensors, configuration, code and tokenizer, as from_pretrained reads them."""
    try:
        from transformers import GenerationConfig

        from atlas_lm.exchange.hugging_face.configuration_atlas import AtlasConfig
        from atlas_lm.exchange.hugging_face.modeling_atlas import AtlasForCausalLM
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed: pip install 'atlas-lm[exchange]'") from error
    end = tokenizer.separator_id
    ids: dict[str, Any] = {"eos_token_id": end, "pad_token_id": end, "bos_token_id": None}
    config = AtlasConfig(settings, vocab_size, architectures=["AtlasForCausalLM"], **ids)
    config.auto_map = {
        "AutoConfig": "configuration_atlas.AtlasConfig",
        "AutoModelForCausalLM": "modeling_atlas.AtlasForCausalLM",
    }
    with torch.device("meta"):
        whole = AtlasForCausalLM(config)
    whole.model = model
    whole.generation_config = GenerationConfig(**ids)
    whole.save_pretrained(out)
    for name, text in bundle().items():
        write_atomically(out / name, text)
    save_tokenizer(tokenizer, out)


def save_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """As AutoTokenizer reads it. ModuleNotFoundError: transformers is not installed."""
    from transformers import PreTrainedTokenizerFast

    out.mkdir(exist_ok=True)
    separator = tokenizer.separator if isinstance(tokenizer, JsonTokenizer) else BYTES_SEPARATOR
    text = tokenizer.to_json() if isinstance(tokenizer, JsonTokenizer) else bytes_json()
    write_atomically(out / COPY, text)
    fast = PreTrainedTokenizerFast(
        tokenizer_file=str(out / COPY), eos_token=separator, pad_token=separator, split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    fast.save_pretrained(out)
    write_atomically(out / COPY, text)  # which that has changed: it adds what its own configuration says


def bytes_json() -> str:
    """The tokenizer.json in which every byte is a token, with the ids of `ByteTokenizer`."""
    import tokenizers as hf

    symbols = {chr(byte): byte for byte in [*range(33, 127), *range(161, 173), *range(174, 256)]}
    others = [byte for byte in range(256) if byte not in symbols.values()]
    symbols |= {chr(256 + i): byte for i, byte in enumerate(others)}  # as ByteLevel shows bytes that are no letters
    whole = hf.Tokenizer(hf.models.BPE(vocab=symbols, merges=[]))
    whole.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    whole.decoder = hf.decoders.ByteLevel()
    whole.add_special_tokens([BYTES_SEPARATOR])
    assert whole.token_to_id(BYTES_SEPARATOR) == ByteTokenizer.separator_id
    return whole.to_str(pretty=True)


def plain(value: Any) -> Any:
    """As JSON has it."""
    if isinstance(value, dict):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return value


def card(settings: dict[str, Any], vocab_size: int, training: dict[str, Any], report: dict[str, Any]) -> str:
    """The model card: what it is, how to read with it, what was measured."""

    def shown(name: str, form: str = ".3f") -> str | None:
        value = report.get(name)
        return format(value, form) if isinstance(value, (int, float)) and math.isfinite(value) else None

    figures = {
        "held-out loss, nats per token": shown("val_loss"),
        "bits per byte": shown("val_bits_per_byte"),
        "of it by gzip -9": shown("gzip_bits_per_byte"),
        "parameters": shown("parameters", ","),
        "optimizer steps": shown("steps", ","),
        "tokens trained on": shown("tokens", ","),
        "gained from text beyond attention's reach, nats per token": shown("context_gain"),
        "how far back 95 % of that lies, tokens": shown("memory_horizon", ","),
    }
    rows = "".join(f"| {name} | {value} |\n" for name, value in figures.items() if value is not None)
    text = yaml.safe_dump(settings, sort_keys=True, allow_unicode=True)
    head = "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [atlas-lm, memory]\n---\n\n"
    return f"""{head}# {settings.get("name")}: a language model with a memory

Sliding-window attention beside a memory whose weights are learned while it reads. Vocabulary: {vocab_size} tokens.
Exported by atlas-lm {__version__} after step {training["global_step"]}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
print(tokenizer.decode(model.generate(**tokenizer("def ", return_tensors="pt"), max_new_tokens=100)[0]))
```

`generate` streams on a state of constant size, however long the text. Sequences of a batch must be of one length: a
memory learns whatever it reads, padding too. The C++ loops are compiled at first use where there is a compiler.

| | |
|---|---|
{rows}
## Settings

```yaml
{text}```
"""


def import_back(exported: Path, out: Path) -> Path:
    """A run folder of ours from an exported one: weights, configuration and tokenizer; the checkpoint's path.

    It starts new runs (`init_from=`), generates and is evaluated; the optimizer's state is not there to resume.
    ValueError: not an exported folder, or `out` has files.
    """
    with new_folder(out) as folder:
        return out / _import(exported, folder).relative_to(folder)


def _import(exported: Path, out: Path) -> Path:
    if not (exported / TRAINING).is_file() or not (exported / EXPORTED).is_file():
        raise ValueError(
            f"{str(exported)!r} is no folder that export to=hf wrote: {TRAINING} or {EXPORTED} is missing there"
        )
    training = read_json(exported / TRAINING)
    arguments = training["hyper_parameters"]
    content: dict[str, Any] = {
        "state_dict": read_safetensors(exported),
        "hyper_parameters": arguments,
        "global_step": training["global_step"],
        "epoch": 0,
        "pytorch-lightning_version": "2.6.0",
        "loops": {},
    }
    path = out / "checkpoints" / f"step-{int(training['global_step']):07d}.ckpt"
    content["local_chunks"] = list(build_module(content, exported).local_chunks)  # CheckpointError: it does not fit
    AtomicCheckpointIO().save_checkpoint(content, path)
    kept = exported / CONFIG
    text = kept.read_text() if kept.is_file() else OmegaConf.to_yaml({"model": arguments["model"]})
    write_atomically(out / CONFIG, text)
    if arguments.get("tokenizer") != ByteTokenizer().fingerprint():
        write_atomically(out / COPY, (exported / COPY).read_bytes())
        if (exported / SEPARATOR).is_file():
            write_atomically(out / SEPARATOR, (exported / SEPARATOR).read_bytes())
    write_identity(out, [])
    return path


def read_safetensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of model.safetensors, or of its parts. ValueError: there is none, or one is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise ValueError(f"{str(folder)!r} has no model.safetensors: copy it again")
    found: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            found |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{str(file)!r} is damaged ({error}): copy it again") from error
    return found
