"""Shards of versions that did not compare the splits: what is held out there is compared with what is trained on."""

import logging
from collections.abc import Iterator
from hashlib import blake2b

import numpy as np

from atlas_lm.data.interfaces import Split
from atlas_lm.data.overlap import Overlap
from atlas_lm.data.packed import Array, HeldOutBytes, TokenStream, byte_ends

PIECE = 1 << 22  # tokens read at a time


def token_documents(tokens: Array, separator_id: int) -> Iterator[tuple[int, int, bytes]]:
    """(start, end, 16 bytes of content) of each document; its separator is tokens[end - 1]."""
    start, rest = 0, np.zeros(0, dtype=np.uint16)
    for first in range(0, len(tokens), PIECE):
        piece = np.concatenate([rest, np.asarray(tokens[first : first + PIECE])])
        begin = 0
        for end in (np.flatnonzero(piece == separator_id) + 1).tolist():
            key = blake2b(piece[begin:end].astype("<u4").tobytes(), digest_size=16).digest()
            yield start + begin, start + end, key
            begin = end
        start, rest = start + begin, piece[begin:]


def compare_splits(streams: dict[Split, TokenStream]) -> dict[Split, TokenStream]:
    """The streams, the held-out ones without documents that are trained on; equal documents have equal tokens.

    ValueError when nothing is left of a split.
    """
    overlap, found = Overlap(drawn=True, level=logging.WARNING), dict(streams)
    for split, stream in streams.items():
        for _, _, key in token_documents(stream.tokens, stream.separator_id):
            overlap.note(split, key)
    for split, stream in streams.items():
        if stream.held_out is None:
            continue
        kept: list[tuple[int, int]] = []
        for number, (start, end, key) in enumerate(token_documents(stream.tokens, stream.separator_id)):
            left_out = overlap.leaves_out(split, key)
            size = int(stream.held_out.ends[end] - stream.held_out.ends[start])
            overlap.count(split, f"document {number}", size, left_out)
            if not left_out:
                kept.append((start, end))
        if kept and sum(end - start for start, end in kept) < len(stream.tokens):
            found[split] = _only(stream, stream.held_out, kept)
    overlap.report()
    return found


def _only(stream: TokenStream, held_out: HeldOutBytes, kept: list[tuple[int, int]]) -> TokenStream:
    tokens = np.concatenate([stream.tokens[start:end] for start, end in kept])
    raw = b"".join(held_out.raw[held_out.ends[start] : held_out.ends[end]] for start, end in kept)
    lengths = np.concatenate([np.diff(held_out.ends[start : end + 1]) for start, end in kept])
    digest = blake2b(f"{stream.fingerprint} {kept}".encode(), digest_size=16).hexdigest()
    bytes_kept = HeldOutBytes(raw, byte_ends(lengths))
    return TokenStream(tokens, stream.separator_id, len(raw), digest, bytes_kept, stream.losses)
