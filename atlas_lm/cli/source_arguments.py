"""The key=value arguments of `prepare`, each checked against the type of the parameter that takes it."""

import inspect
from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any, get_args, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from atlas_lm.config.validate import fits, in_words
from atlas_lm.data.sources import SOURCES

EXAMPLE = "source=stdlib out=shards/stdlib"


def parse_arguments(words: Sequence[str], function: Callable[..., Any]) -> dict[str, Any]:
    """The arguments of `function`, and those of the source that `source=` names, from YAML values.

    A value that YAML takes for a number is text where only text is wanted: out=2024 is a folder.
    ValueError: no key=value, a key that is missing, unknown or given twice, a value of the wrong type.
    """
    raw: dict[str, str] = {}
    for word in words:
        key, separator, value = word.partition("=")
        if not separator:
            raise ValueError(f"{word!r} is not key=value, e.g. {EXAMPLE}")
        if key in raw:
            raise ValueError(f"{key}= is given twice: keep one")
        raw[key] = value
    try:
        given = OmegaConf.from_dotlist(list(words))
        missing = OmegaConf.missing_keys(given)
        values: dict[str, Any] = OmegaConf.to_container(given, resolve=True)  # type: ignore[assignment]
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"cannot read the arguments ({reason})") from error
    for key in ("source", "out"):
        if raw.get(key, "") in ("", "null", "~") or key in missing:
            raise ValueError(f"{key}= is missing, e.g. {EXAMPLE}")
    kinds = _kinds(function)
    if raw["source"] in SOURCES:
        kinds = {**_kinds(SOURCES[raw["source"]]), **kinds}
    return {key: _checked(key, value, raw.get(key), kinds, given) for key, value in values.items()}


def _kinds(function: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of the parameters that have a name of their own."""
    named = [p.name for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
    hints = get_type_hints(getattr(function, "__init__") if isinstance(function, type) else function)  # noqa: B009
    return {name: hints[name] for name in named}


def _checked(key: str, value: Any, raw: str | None, kinds: dict[str, Any], given: DictConfig) -> Any:
    kind = kinds.get(key)
    if kind is None:  # an unknown key: `prepare` names those that its source knows
        return value
    allowed = get_args(kind) or (kind,)
    if str in allowed and raw is not None and isinstance(value, int | float) and not fits(value, kind):
        return raw
    if not fits(given[key], kind):
        wanted = " or ".join(dict.fromkeys(word for k in allowed if k is not NoneType for word in in_words(k)))
        raise ValueError(f"{key}={value if raw is None else raw} must be {wanted}: correct the value")
    if isinstance(value, list):
        for item in value:
            if not isinstance(item, str):
                raise ValueError(f"{key}={raw}: {item!r} is no text: put quotes around it, e.g. {key}=['{item}']")
    return value
