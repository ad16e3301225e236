"""A model with its tokenizer, as inspection sees it: ours by the name of a run, others by a folder of Hugging Face."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from atlas_lm.inspection import atlas, hugging_face, layers, memory
from atlas_lm.inspection.capture import Plan, Trace
from atlas_lm.inspection.health import Thresholds
from atlas_lm.inspection.report import build
from atlas_lm.inspection.schema import ModelInfo, Report

Flushed = Callable[[Trace], None]


class Subject(Protocol):
    """What can be inspected."""

    info: ModelInfo

    def encode(self, text: str) -> list[int]:
        """The token ids that the model reads for a prompt. ValueError: there are none."""
        ...

    def names(self, ids: Sequence[int]) -> list[str]:
        """The text of each token."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of all of them."""
        ...

    def run(self, ids: Sequence[int], plan: Plan, text: str, on_flush: Flushed) -> Trace:
        """Generate, and capture."""
        ...


def info_of(model: Any, name: str) -> ModelInfo:
    """Of one of ours."""
    config = model.config
    return ModelInfo(
        kind="atlas_lm", name=name, parameters=sum(p.numel() for p in model.parameters()), layers=config.layers,
        heads=config.heads, vocabulary=model.embed.num_embeddings,
        memories=memory.labels_of(model, range(config.layers)),
    )  # fmt: skip


class AtlasSubject:
    """One of ours."""

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.info = info_of(model, name)

    def encode(self, text: str) -> list[int]:
        """A document begins with the separator, as in training."""
        return [self.tokenizer.separator_id, *(int(i) for i in self.tokenizer.encode(text))]

    def names(self, ids: Sequence[int]) -> list[str]:
        return [self.tokenizer.decode(np.array([i])) for i in ids]

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(np.array(list(ids), dtype=np.int64))

    def run(self, ids: Sequence[int], plan: Plan, text: str, on_flush: Flushed = lambda _: None) -> Trace:
        return atlas.inspect(self.model, ids, plan, self.names, text, on_flush=on_flush)


class HuggingFaceSubject:
    """A causal or sequence-to-sequence model of transformers, from memory or from `load_hugging_face`."""

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        self.model, self.tokenizer = model, tokenizer
        config = model.config
        seq2seq = bool(config.is_encoder_decoder)
        stack = layers.find_stack(model.get_decoder() if seq2seq else model)
        self.info = ModelInfo(
            kind="seq2seq" if seq2seq else "causal", name=name,
            parameters=sum(p.numel() for p in model.parameters()), layers=len(stack.layers),
            heads=int(config.num_attention_heads), vocabulary=int(config.vocab_size),
        )  # fmt: skip

    def encode(self, text: str) -> list[int]:
        ids = list(self.tokenizer(text).input_ids)
        if not ids:
            raise ValueError("the prompt is empty: give at least one token")
        return ids

    def names(self, ids: Sequence[int]) -> list[str]:
        return [self.tokenizer.decode([i]) for i in ids]

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids))

    def run(self, ids: Sequence[int], plan: Plan, text: str, on_flush: Flushed = lambda _: None) -> Trace:
        return hugging_face.inspect(self.model, ids, plan, self.names, text, on_flush=on_flush)


def load_hugging_face(path: str, gguf: str = "") -> HuggingFaceSubject:
    """A model of a folder, or of the Hub's cache, with eager attention: the implementation that computes weights.

    `gguf`: the file of quantised weights in it. ValueError: there is no such model, or it writes no text.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
    except ImportError as error:
        raise ValueError("model= needs transformers: pip install 'atlas-lm[exchange]'") from error
    if not Path(path).exists():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        raise_if_local(path)
    files = {"gguf_file": gguf} if gguf else {}
    try:
        config = AutoConfig.from_pretrained(path, **files)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        tokenizer = AutoTokenizer.from_pretrained(path, **files)
        model = kind.from_pretrained(path, attn_implementation="eager", dtype=torch.float32, **files)
    except (OSError, ValueError, KeyError, ImportError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"model={path} is no text model that transformers can load: {reason}") from error
    return HuggingFaceSubject(model.eval(), tokenizer, Path(path).name)


def raise_if_local(path: str) -> None:
    """ValueError for what can be no name on the Hub, so that a mistyped folder is not looked up there."""
    if path.startswith(("/", "./", "../", "~")) or path.count("/") != 1:
        raise ValueError(f"model={path}: there is no such folder; correct the path")


def inspect_text(
    subject: Subject, prompt: str, plan: Plan, thresholds: Thresholds, version: str, on_flush: Flushed = lambda _: None
) -> Report:
    """Generate from a prompt, and report. ValueError: an empty prompt, or one longer than the context."""
    return inspect_ids(subject, subject.encode(prompt), prompt, plan, thresholds, version, on_flush)


def inspect_ids(
    subject: Subject, ids: Sequence[int], prompt: str, plan: Plan, thresholds: Thresholds, version: str,
    on_flush: Flushed = lambda _: None,
) -> Report:  # fmt: skip
    """The same from token ids; `plan.forced` is read in place of what would be drawn."""
    trace = subject.run(ids, plan, prompt, on_flush)
    written = subject.decode(trace.steps.token_ids)
    return build(trace, subject.info, plan, subject.names, written, thresholds, version)


def clean_reports(
    subject: Subject, texts: Sequence[str], plan: Plan, prompt_tokens: int, tick: Callable[[], None]
) -> list[Report]:
    """Reports of what the model writes after the first tokens of clean texts, each with draws of its own.

    Prompts are a quarter, half, three quarters and all of `prompt_tokens` long, in turn: some figures depend on where
    in its chunk a memory is. ValueError: a text is too short for that.
    """
    found = []
    for seed, text in enumerate(texts):
        ids = subject.encode(text)
        if len(ids) < prompt_tokens:
            raise ValueError(f"a text of {len(ids)} tokens is too short for prompts of {prompt_tokens}")
        ids = ids[: max(1, prompt_tokens * (1 + seed % 4) // 4)]
        of_this = Plan(**{**vars(plan), "seed": seed})
        found.append(inspect_ids(subject, ids, "", of_this, Thresholds(), ""))
        tick()
    return found
