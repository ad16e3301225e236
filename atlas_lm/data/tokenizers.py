"""Text to token ids and back, with the number of raw bytes that each token stands for.

Byte counts make losses comparable between tokenizers: bits per byte is the sum of nats over the scored tokens, divided
by ln 2 and by the raw bytes that those tokens stand for.
"""

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import tokenizers as hf_tokenizers

from atlas_lm.data.losses import fate_of, unknown_id

# Byte-level BPE of 2,048 ids of the standard library's source (training split, Python 3.11):
# python -m atlas_lm prepare source=stdlib tokenizer=bpe vocab_size=2048 out=…
SHIPPED = {"python": Path(__file__).with_name("vocabularies") / "python.json"}
SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")  # looked for in this order


class Encoded(NamedTuple):
    """One document of n tokens and b raw bytes."""

    ids: np.ndarray  # (n,) int64, never the separator
    n_bytes: np.ndarray  # (n,) int64, raw bytes per token; the sum is at most b (a tail without a token is left out)
    # (b,) uint8, what becomes of the character that each byte belongs to, see losses.py; None: all come back
    lost: np.ndarray | None = None


@runtime_checkable
class Tokenizer(Protocol):
    """What the rest of the package knows of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of ids, the separator included."""

    @property
    def separator_id(self) -> int:
        """The id that follows every document and occurs nowhere else."""

    def encode(self, text: bytes | str) -> np.ndarray:
        """Token ids (n,) int64, without separator."""

    def encode_batch(self, names: Sequence[str], raws: Sequence[bytes]) -> list[Encoded]:
        """Encode documents; `names` are for error messages."""

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Text of token ids; separators stand for no text."""

    def fingerprint(self) -> str:
        """Hash of everything that `encode` depends on."""


class ByteTokenizer:
    """Every byte is a token; id 256 separates documents. Takes any bytes, valid UTF-8 or not."""

    vocab_size = 257
    separator_id = 256

    def encode(self, text: bytes | str) -> np.ndarray:
        """Token ids (n,) int64, one per byte of the (UTF-8) text."""
        raw = text.encode() if isinstance(text, str) else text
        return np.frombuffer(raw, dtype=np.uint8).astype(np.int64)

    def encode_batch(self, names: Sequence[str], raws: Sequence[bytes]) -> list[Encoded]:
        """One token per byte."""
        return [Encoded(self.encode(raw), np.ones(len(raw), dtype=np.int64)) for raw in raws]

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Text of the ids, with U+FFFD for what is no UTF-8. ValueError for ids outside the vocabulary."""
        values = _checked(ids, self.vocab_size)
        return values[values < 256].astype(np.uint8).tobytes().decode(errors="replace")

    def fingerprint(self) -> str:
        """Constant: there is nothing to configure."""
        return "bytes-257"


class JsonTokenizer:
    """Any `tokenizer.json` of the Hugging Face `tokenizers` library.

    `separator` is the token put after every document; by default the first of `SEPARATORS` that the vocabulary holds.
    ValueError: no such file, not a tokenizer, or no separator.
    """

    def __init__(self, path: str | Path, separator: str | None = None) -> None:
        if Path(path).is_dir():
            raise ValueError(f"{str(path)!r} is a folder: give the tokenizer.json in it")
        if not Path(path).is_file():
            raise ValueError(
                f"no tokenizer at {str(path)!r}: give 'bytes', 'python' or the path of a tokenizer.json"
                " (a run keeps its own in its folder)"
            )
        self._path = str(path)
        try:
            self._tokenizer = hf_tokenizers.Tokenizer.from_file(self._path)
        except BaseException as error:
            raise ValueError(f"{self._path!r} is not a tokenizer.json ({_reason(error)}): write it again") from error
        self._tokenizer.encode_special_tokens = True  # "<|endoftext|>" inside a document is text, not a separator
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._separator = separator or self.default_separator
        found = self._tokenizer.token_to_id(self._separator)
        if found is None:
            raise ValueError(
                f"{str(path)!r} has no separator token {separator or SEPARATORS}: name one of its special tokens"
            )
        self._separator_id = int(found)
        self._vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self._unknown, self._unknown_token = unknown_id(self._tokenizer.to_str())
        self._distinguished: dict[str, bool] = {}  # white space: whether it leaves a trace in the ids

    @property
    def vocab_size(self) -> int:
        """Largest id + 1 (ids may have holes)."""
        return self._vocab_size

    @property
    def separator_id(self) -> int:
        """Id of the separator token."""
        return self._separator_id

    @property
    def separator(self) -> str:
        """The separator token."""
        return self._separator

    @property
    def default_separator(self) -> str:
        """The separator if none is named; "" if there is none."""
        return next((s for s in SEPARATORS if self._tokenizer.token_to_id(s) is not None), "")

    def encode(self, text: bytes | str) -> np.ndarray:
        """Token ids (n,) int64. ValueError when bytes are no UTF-8."""
        raw = text.encode() if isinstance(text, str) else text
        return self.encode_batch(["text"], [raw])[0].ids

    def encode_batch(self, names: Sequence[str], raws: Sequence[bytes]) -> list[Encoded]:
        """Encode documents in parallel. ValueError names the document that is no UTF-8."""
        texts = [_utf8(name, raw) for name, raw in zip(names, raws, strict=True)]
        try:
            encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
            decoded = self._tokenizer.decode_batch([encoding.ids for encoding in encodings])
        except BaseException as error:
            raise ValueError(
                f"the tokenizer {self._path!r} cannot encode {names[0]}{' and what follows' * (len(names) > 1)} "
                f"({_reason(error)}): use tokenizer=bytes, or one with an unknown token or byte fallback"
            ) from error
        decodes = self._tokenizer.decoder is not None  # without one the tokens are joined by spaces, whatever was there
        return [
            self._with_bytes(name, text, encoding.ids, encoding.offsets)._replace(
                lost=None if back == text and decodes else self._lost(text, encoding.ids, encoding.offsets)
            )
            for name, text, encoding, back in zip(names, texts, encodings, decoded, strict=True)
        ]

    def _lost(self, text: str, ids: list[int], offsets: list[tuple[int, int]]) -> np.ndarray | None:
        """(bytes of the text,) uint8, the fate of each byte's character; None where all of them come back."""
        known = [(i, span) for i, span in zip(ids, offsets, strict=True) if not self._is_unknown(i, text, span)]
        normalizer = self._tokenizer.normalizer
        back = self._tokenizer.decode([i for i, _ in known], skip_special_tokens=False)
        back += text if normalizer is None else normalizer.normalize_str(text)
        fate = fate_of(text, back, [span for _, span in known], lambda at: self._distinguishes(text, at))
        return np.repeat(fate, np.diff(_byte_offsets(text))) if fate.any() else None

    def _is_unknown(self, token: int, text: str, span: tuple[int, int]) -> bool:
        return token == self._unknown and text[slice(*span)] != self._unknown_token

    def _distinguishes(self, text: str, at: int) -> bool:
        """Whether the white space text[at] leaves a trace: the ids differ when there is twice as much of it."""
        space = text[at]
        if space not in self._distinguished:
            once = text[max(at - 16, 0) : at + 16]
            twice = text[max(at - 16, 0) : at] + space + text[at : at + 16]
            one, two = self._tokenizer.encode_batch([once, twice], add_special_tokens=False)
            self._distinguished[space] = one.ids != two.ids
        return self._distinguished[space]

    def _with_bytes(self, name: str, text: str, ids: list[int], offsets: list[tuple[int, int]]) -> Encoded:
        tokens = np.asarray(ids, dtype=np.int64)
        if (tokens == self._separator_id).any():
            raise ValueError(f"{name}: the text encodes to the separator {self._separator!r}: name another separator")
        if not len(tokens):
            return Encoded(tokens, np.zeros(0, dtype=np.int64))
        # A token stands for the bytes up to its end, skipped characters included; bytes of one character that are
        # spread over several tokens count for the first of them.
        ends = np.maximum.accumulate(np.asarray(offsets, dtype=np.int64)[:, 1])
        return Encoded(tokens, np.diff(_byte_offsets(text)[ends], prepend=0))

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Text of the ids, special tokens left out. ValueError for ids outside the vocabulary."""
        values = _checked(ids, self.vocab_size).tolist()
        try:
            return self._tokenizer.decode(values)
        except BaseException as error:
            raise ValueError(
                f"the tokenizer {self._path!r} cannot decode ({_reason(error)}): write it again"
            ) from error

    def fingerprint(self) -> str:
        """Hash of the tokenizer's JSON and of the separator."""
        text = f"{self._separator}\n{self._tokenizer.to_str()}"
        return blake2b(text.encode(), digest_size=16).hexdigest()

    def to_json(self) -> str:
        """The content of a tokenizer.json."""
        return self._tokenizer.to_str(pretty=True)


def load_tokenizer(spec: str | Tokenizer) -> Tokenizer:
    """`"bytes"`, `"python"` (shipped, for source text), the path of a tokenizer.json, or a tokenizer itself."""
    if not isinstance(spec, str | Path):
        if isinstance(spec, Tokenizer):
            return spec
        raise ValueError(f"tokenizer={spec!r} is no tokenizer: give 'bytes', 'python' or the path of a tokenizer.json")
    return ByteTokenizer() if spec == "bytes" else JsonTokenizer(tokenizer_path(spec))


def tokenizer_path(spec: str | Path) -> Path:
    """Where the tokenizer.json of a name or a path lies."""
    return SHIPPED.get(str(spec), Path(spec))


def train_bpe(texts: Iterable[bytes], vocab_size: int) -> hf_tokenizers.Tokenizer:
    """Byte-level BPE (as GPT-2's) of `vocab_size` ids, the separator included. The same texts give the same result.

    ValueError: fewer ids than bytes + separator, or a corpus too small to yield that many.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size={vocab_size} is below 257 (256 bytes and a separator); 4096 suits a small corpus")
    tokenizer = hf_tokenizers.Tokenizer(hf_tokenizers.models.BPE())
    tokenizer.pre_tokenizer = hf_tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = hf_tokenizers.decoders.ByteLevel()
    trainer = hf_tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATORS[0]],
        initial_alphabet=hf_tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((raw.decode(errors="replace") for raw in texts), trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size}: this corpus yields only {tokenizer.get_vocab_size()} tokens, lower vocab_size"
        )
    return tokenizer


def _reason(error: BaseException) -> str:
    """What the tokenizers library says is wrong, on one line. Anything that is no error of it is raised again.

    The library raises bare Exceptions; where it panics, on a vocabulary that contradicts itself, it raises a
    PanicException, which is not even an Exception.
    """
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error
    return " ".join(str(error).split()) or type(error).__name__


def _utf8(name: str, raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}: not UTF-8 at byte {error.start} ({raw[error.start]:#04x}): "
            "convert the document, or use tokenizer=bytes, which takes any bytes"
        ) from error


def _byte_offsets(text: str) -> np.ndarray:
    """(len(text) + 1,) int64: where each character begins in UTF-8."""
    if text.isascii():
        return np.arange(len(text) + 1, dtype=np.int64)
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    widths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(widths)])


def _checked(ids: Iterable[int] | np.ndarray, vocab_size: int) -> np.ndarray:
    values = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), dtype=np.int64)
    if values.size:
        lowest, highest = int(np.min(values)), int(np.max(values))
        if lowest < 0 or highest >= vocab_size:
            raise ValueError(f"token ids must be in [0, {vocab_size}), got {lowest} to {highest}")
    return values
