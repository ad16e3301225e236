"""The sources of text by name, as `prepare` builds them."""

import inspect
from collections.abc import Callable
from typing import Any

from atlas_lm.config.names import nearest
from atlas_lm.data.hf import HuggingFaceSource
from atlas_lm.data.packed import PackedSource
from atlas_lm.data.stdlib import StdlibSource
from atlas_lm.data.text import TextSource

SOURCES: dict[str, Callable[..., PackedSource]] = {
    "stdlib": StdlibSource,
    "text": TextSource,
    "hf": HuggingFaceSource,
}


def build_source(name: str, options: dict[str, Any]) -> PackedSource:
    """The source of that name. ValueError: it is unknown, has no such option, or refuses it."""
    if name not in SOURCES:
        raise ValueError(f"source={name} is unknown: use one of {', '.join(SOURCES)}")
    known = set(inspect.signature(SOURCES[name]).parameters) - {"tokenizer"}
    unknown = sorted(set(options) - known)
    if unknown:
        close = nearest(unknown[0], known) if len(unknown) == 1 else ""
        raise ValueError(f"source={name} has no {', '.join(unknown)}{close}: it knows {', '.join(sorted(known))}")
    try:
        return SOURCES[name](**options)
    except TypeError as error:
        raise ValueError(f"source={name}: {error}; it knows {', '.join(sorted(known))}") from error
