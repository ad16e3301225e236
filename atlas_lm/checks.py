"""Find what is misspelled or missing in a composed configuration, before anything is built from it.

Hydra rejects unknown keys on the command line, but not what a YAML file or a `+key=value` adds to a group that names a
class; such a key would surface only when that class is called, minutes later or, behind `**kwargs`, never.
"""

import importlib
import inspect
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from atlas_lm.config import TrainConfig, nearest

HYDRA_KEYS = {"_target_", "_args_", "_convert_", "_partial_", "_recursive_"}


def check_config(cfg: DictConfig) -> TrainConfig:
    """The typed top level of `cfg`, with the groups that name classes as plain containers.

    ValueError for the first unknown key, missing value, entry without `_target_`, or value outside its range.
    """
    _check_fields(cfg, TrainConfig, "")
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ValueError(f"{missing[0]} is required: give {missing[0]}=<value>")
    for group in ("data", "trainer"):
        _check_entry(cfg[group], group, [])
    for group in ("logger", "callbacks"):
        for name, entry in cfg[group].items():
            _check_entry(entry, f"{group}.{name}", [str(n) for n in cfg[group] if n != name])
    for where, node in _dicts(cfg, ""):
        if "_target_" in node:
            _check_target(node, where)
    config = OmegaConf.to_object(cfg)
    assert isinstance(config, TrainConfig)
    return config


def _check_fields(cfg: DictConfig, schema: Any, where: str) -> None:
    """Every key of `cfg` is a field of the dataclass `schema`, and so on down the typed part of the tree."""
    known = {f.name: f.type for f in fields(schema)}
    for key in map(str, cfg):
        if key not in known:
            raise ValueError(f"{where}{key} is no setting{nearest(key, known)}; there are {', '.join(known)}")
        if is_dataclass(known[key]):
            _check_fields(cfg[key], known[key], f"{where}{key}.")


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
    """Every key beside `_target_` is a parameter of what it names."""
    target = find_target(str(node["_target_"]), where)
    parameters = inspect.signature(target).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    for key in set(map(str, node)) - HYDRA_KEYS - set(parameters):
        raise ValueError(
            f"{where}.{key} is no setting of {target.__name__}{nearest(key, parameters)}; "
            f"it takes {', '.join(parameters)}"
        )


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
