"""Find what is misspelled or missing in a composed configuration, before anything is built from it.

Hydra rejects unknown keys on the command line, but not what a YAML file or a `+key=value` adds to a group that names a
class; such a key would surface only when that class is called, minutes later or, where it takes `**kwargs`, never.
"""

import importlib
import inspect
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf

from atlas_lm.config.fields import LARGEST
from atlas_lm.config.names import nearest
from atlas_lm.config.parsing import CONFIG
from atlas_lm.config.schema import TrainConfig

# What the configuration of a run folder may name classes of. torch and lightning are none: they have some whose making
# starts a process (torch's SubprocessHandler).
ALLOWED = ("atlas_lm.data", "callbacks")
LISTS, MAPPINGS = (list, tuple, Sequence, Iterable, Collection), (dict, Mapping, MutableMapping)  # in annotations
HYDRA_KEYS = {"_target_", "_args_", "_convert_", "_partial_", "_recursive_"}


def check_config(cfg: DictConfig) -> TrainConfig:
    """The typed top level of `cfg`, with the groups that name classes as plain containers.

    ValueError for the first unknown key, missing value, entry without `_target_`, or value outside its range.
    """
    _check_fields(cfg, TrainConfig, "")
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ValueError(f"{missing[0]} is required: give {missing[0]}=<value>")
    for group in ("module", "data", "trainer"):
        _check_entry(cfg[group], group, [])
    for group in ("logger", "callbacks"):
        for name, entry in cfg[group].items():
            _check_entry(entry, f"{group}.{name}", [str(n) for n in cfg[group] if n != name])
    for where, node in _dicts(cfg, ""):
        if "_target_" in node:
            _check_target(node, where)
    for name, value in dict(cfg.trainer.items_ex(resolve=False)).items():
        if isinstance(value, int) and abs(value) > LARGEST:  # torch keeps such numbers in 32 bits
            raise ValueError(f"trainer.{name}={value} must be at most {LARGEST}: lower it")
    accumulated = cfg.trainer.get("accumulate_grad_batches", 1)
    if accumulated is not None and accumulated < 1:  # Lightning divides by it
        raise ValueError(f"trainer.accumulate_grad_batches={accumulated} must be at least 1: raise it")
    config = OmegaConf.to_object(cfg)
    assert isinstance(config, TrainConfig)
    _check_complete(config, "")
    return config


def _check_fields(cfg: DictConfig, schema: Any, where: str) -> None:
    """Every key of `cfg` is a field of the dataclass `schema`, and so on down the typed part of the tree."""
    known = {f.name: f.type for f in fields(schema)}
    for key in map(str, cfg):
        if key not in known:
            raise ValueError(f"{where}{key} is no setting{nearest(key, known)}; there are {', '.join(known)}")
        if is_dataclass(known[key]):
            _check_fields(cfg[key], known[key], f"{where}{key}.")


def _check_complete(config: Any, where: str) -> None:
    """No field of the dataclass is missing, as one is that `~name` has removed."""
    for f in fields(config):
        value = getattr(config, f.name)
        if isinstance(value, str) and value == MISSING:
            raise ValueError(f"{where}{f.name} is required: give {where}{f.name}=<value>")
        if is_dataclass(value):
            _check_complete(value, f"{where}{f.name}.")


def _check_entry(entry: Any, where: str, siblings: list[str]) -> None:
    if isinstance(entry, DictConfig) and "_target_" in entry:
        return
    name = where.rpartition(".")[2]
    close = nearest(name, siblings)
    remedy = f"a misspelled name of another entry{close}, or" if close else "name the class there, or"
    raise ValueError(f"{where} has no _target_: {remedy} remove it with ~{where}")


def _dicts(node: Any, where: str) -> Iterator[tuple[str, DictConfig]]:
    """Every dict in the tree with its dotted name."""
    if isinstance(node, DictConfig) and not node._is_none():
        yield where, node
        for key in map(str, node):
            if not OmegaConf.is_missing(node, key):
                yield from _dicts(node._get_node(key), f"{where}.{key}" if where else key)
    elif isinstance(node, ListConfig) and not node._is_none():
        for i in range(len(node)):
            yield from _dicts(node._get_node(i), f"{where}[{i}]")


def _check_target(node: DictConfig, where: str) -> None:
    """Every key beside `_target_` is a parameter of what it names, every value of a type that the parameter takes."""
    target = find_target(str(node["_target_"]), where)
    parameters = inspect.signature(target).parameters
    known = set(map(str, node)) - HYDRA_KEYS
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        for key in sorted(known - set(parameters)):
            raise ValueError(
                f"{where}.{key} is no setting of {target.__name__}{nearest(key, parameters)}; "
                f"it takes {', '.join(parameters)}"
            )
    try:
        kinds = get_type_hints(getattr(target, "__init__") if isinstance(target, type) else target)  # noqa: B009
    except (NameError, TypeError):  # somebody else's annotations
        return
    for key in sorted(known & set(kinds) & set(parameters)):
        value = node[key]
        if not fits(value, kinds[key]):
            wanted = " or ".join(dict.fromkeys(in_words(kinds[key])))
            what = f"is {value!r}" if isinstance(value, str) else f"is {value}"
            raise ValueError(f"{where}.{key} {what} and must be {wanted}: correct the value")


def fits(value: Any, kind: Any) -> bool:
    """Whether a parameter annotated with `kind` may take a value of the configuration; what is not understood fits."""
    origin = get_origin(kind) or kind
    if origin in (Union, UnionType):
        return any(fits(value, k) for k in get_args(kind))
    if not isinstance(origin, type):  # Any, Literal, a type variable
        return True
    if origin in (int, float):
        return isinstance(value, (int, float) if origin is float else int) and not isinstance(value, bool)
    if origin in (bool, str, NoneType):
        return isinstance(value, origin)
    if issubclass(origin, os.PathLike):
        return isinstance(value, str)
    if isinstance(value, DictConfig):
        return "_target_" in value or origin in MAPPINGS
    if isinstance(value, ListConfig):
        return origin in LISTS
    return origin is object


def in_words(kind: Any) -> Iterator[str]:
    """What to call the values that fit."""
    origin = get_origin(kind) or kind
    if origin in (Union, UnionType):
        for k in get_args(kind):
            yield from in_words(k)
        return
    known = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}
    if origin in known:
        yield known[origin]
    elif not isinstance(origin, type):
        yield "something else"
    elif issubclass(origin, os.PathLike):
        yield "a path"
    elif origin in LISTS:
        yield "a list"
    else:
        yield "a mapping" if origin in MAPPINGS else f"a {origin.__name__} with its _target_"


def find_target(path: str, where: str) -> Any:
    """The class or function that a dotted path names. ValueError, with the nearest name, if there is none."""
    module_name, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name) if module_name else None
    except ModuleNotFoundError as error:
        if error.name and not module_name.startswith(error.name):
            raise  # the module is there and imports something that is not: a missing dependency, or a bug
        raise ValueError(f"{where}._target_={path}: there is no module {module_name!r}: correct the path") from error
    target = getattr(module, name, None)
    if not callable(target):
        raise ValueError(f"{where}._target_={path}: {module_name!r} has no {name!r}{nearest(name, dir(module))}")
    return target


def check_targets(node: Any, where: str) -> None:
    """ValueError for the first `_target_` in a plain, resolved container that is no class of the packages allowed.

    A run folder may come from anywhere, and nothing that its configuration names may run for the asking: all that is
    built from one goes through here. What would be resolved a second time is refused too: it could become a target.
    """
    for place, value in _leaves(node, where):
        if isinstance(value, str) and "${" in value:
            raise ValueError(f"{place}={value} would be resolved a second time: mend the run's {CONFIG}")
        if place.endswith("._target_"):
            allowed = f"{place}={value} must be a class of {' or '.join(ALLOWED)}: mend the run's {CONFIG}"
            if not _is_within(value, ALLOWED):
                raise ValueError(allowed)
            found = find_target(value, place.removesuffix("._target_"))
            # a module of ours also holds what it has imported
            if not isinstance(found, type) or not _is_within(found.__module__, ALLOWED):
                raise ValueError(allowed)


def _is_within(path: Any, packages: tuple[str, ...]) -> bool:
    return isinstance(path, str) and any(path == package or path.startswith(f"{package}.") for package in packages)


def _leaves(node: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Every value that is no container, with its dotted name; a `_target_` whatever it is."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "_target_":
                yield f"{where}._target_", value
            else:
                yield from _leaves(key, f"{where}.<key>")
                yield from _leaves(value, f"{where}.{key}")
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from _leaves(value, f"{where}[{i}]")
    else:
        yield where, node
