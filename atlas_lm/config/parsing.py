"""JSON and YAML from files that may be damaged: every error is a ValueError that names the file."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

CONFIG = "config.yaml"  # in a run folder: its presence makes a folder a run folder


def parse_json(text: str | bytes, where: str | Path) -> Any:
    """The value that a JSON text stands for; bytes are UTF-8. ValueError naming `where`: it is no JSON.

    `json.loads` raises RecursionError for values nested too deeply, and its ValueErrors do not say which file it was.
    """
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON ({' '.join(str(error).split())})") from error
    except RecursionError:  # without its thousand frames
        raise ValueError(f"{where}: not valid JSON that can be read (values nested too deeply)") from None


def read_json(path: Path) -> Any:
    """The value in a JSON file. ValueError: it is no JSON. OSError: it cannot be read."""
    return parse_json(path.read_bytes(), path)


def is_number(value: object) -> bool:
    """A finite number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_numbers(values: Mapping[str, Any], names: Iterable[str], where: str | Path) -> None:
    """ValueError naming `where` unless the values of these names are finite numbers, null or absent."""
    for name in names:
        if values.get(name) is not None and not is_number(values[name]):
            raise ValueError(f"{where}: {name} is {values[name]!r} and must be a number or null: correct it")


FORMER_CALLBACKS = {  # keys of version 0.1, and those of now, which are the names of the callbacks' files
    "checkpoint": "step_checkpoint",
    "chunk_size": "chunk_size_scheduler",
    "loss_weights": "loss_weight_schedule",
    "persistent_memory": "persistent_memory_check",
}


def read_config(path: Path) -> DictConfig:
    """The configuration in a YAML file; that of a run of version 0.1 with the keys of now.

    ValueError: it is none. OSError: it cannot be read.
    """
    try:
        found = OmegaConf.load(path)
    except OSError as error:
        if error.errno is not None:
            raise
        raise ValueError(f"{path} is no configuration of a run ({error}): choose another run") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: broken YAML ({' '.join(str(error).split())})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error})") from error
    except RecursionError:
        raise ValueError(f"{path}: values nested too deeply") from None
    if not isinstance(found, DictConfig):
        raise ValueError(f"{path} is no configuration of a run: choose another run")
    callbacks = found._get_node("callbacks")
    if isinstance(callbacks, DictConfig) and not callbacks._is_none() and not callbacks._is_missing():
        for former, name in FORMER_CALLBACKS.items():
            if former in callbacks and name not in callbacks:
                callbacks[name] = callbacks.pop(former)
    return found
