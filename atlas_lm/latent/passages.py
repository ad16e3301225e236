"""A document's text cut into the passages that become its frames."""

from __future__ import annotations

import re

UNITS = ("paragraph", "line", "sentence")
SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+(?=[\"'“‘(\[]?[A-Z0-9])")


def passages(text: str, unit: str, min_chars: int, max_chars: int) -> list[str]:
    """Passages in order: none is empty, short ones are joined to the next, long ones are cut at sentences.

    unit: paragraph (blank lines between), line or sentence. A passage of fewer than `min_chars` characters is joined to
    the one after it, the last one to the one before; one of more than `max_chars` is cut after sentences, and within
    one that is longer itself after words.
    """
    if unit == "paragraph":
        parts = re.split(r"\n\s*\n", text)
    elif unit == "line":
        parts = text.splitlines()
    else:
        parts = SENTENCE_END.split(text)
    found: list[str] = []
    short = ""
    for part in (" ".join(part.split()) for part in parts):
        if not part:
            continue
        whole = f"{short} {part}" if short else part
        short = whole if len(whole) < min_chars else ""
        if not short:
            found += cut(whole, max_chars)
    if short:
        if found:
            found[-1] = f"{found[-1]} {short}"
        else:
            found.append(short)
    return found


def cut(passage: str, max_chars: int) -> list[str]:
    """Pieces of at most so many characters, as few as can be where they end after sentences; a word is never cut."""
    if len(passage) <= max_chars:
        return [passage]
    pieces: list[str] = []
    for sentence in SENTENCE_END.split(passage):
        for part in [sentence] if len(sentence) <= max_chars else _words(sentence, max_chars):
            if pieces and len(pieces[-1]) + 1 + len(part) <= max_chars:
                pieces[-1] = f"{pieces[-1]} {part}"
            else:
                pieces.append(part)
    return pieces


def _words(sentence: str, max_chars: int) -> list[str]:
    lines = [""]
    for word in sentence.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > max_chars:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines
