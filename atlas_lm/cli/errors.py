"""Entry points that answer bad input with one line on stderr and exit code 1.

What the user can put right (a name, a value, a file, a full disk) becomes `error: …`. Everything else is a bug and
keeps its traceback, as does all of it with HYDRA_FULL_ERROR=1.
"""

import atexit
import contextlib
import errno
import functools
import inspect
import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from atlas_lm.config.names import nearest
from atlas_lm.config.validate import find_target
from atlas_lm.files import ROOT
from atlas_lm.training.preemption import INTERRUPTED

EXTRAS = {("hydra/launcher", "submitit_slurm"): "pip install 'atlas-lm[slurm]'"}
SHOW_ALL = "ATLAS_LM_FULL_ERROR"  # what HYDRA_FULL_ERROR was before `run` took it over
REMEDIES = {
    errno.ENOENT: "correct the path",
    errno.EACCES: "change its permissions or use another path",
    errno.EPERM: "change its permissions or use another path",
    errno.EROFS: "use another path, nothing can be written there",
    errno.EEXIST: "a file of that name is in the way, use another path",
    errno.ENOTDIR: "a file lies where a folder is wanted, use another path",
    errno.EISDIR: "a folder lies where a file is wanted, use another path",
    errno.ENAMETOOLONG: "use a shorter name",
    errno.ENOSPC: "free space on that disk",
    errno.EDQUOT: "free space within your quota",
}


class Refused(Exception):
    """What a run of a sweep says to the process that started it, which may be another one than the run's."""


def run(main: Callable[[], Any], overrides: Sequence[str] | None = None) -> int:
    """Call a `hydra.main` function; the exit code. `overrides` take the place of the command line's."""
    if overrides is not None:
        sys.argv = [sys.argv[0], *overrides]
    asked = os.environ.get("HYDRA_FULL_ERROR")
    os.environ[SHOW_ALL] = asked or "0"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing and exiting
    try:
        main()
    except SystemExit as ending:
        return ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except KeyboardInterrupt:  # before training, which saves at Ctrl-C
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        line = None if asked == "1" else explain(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        return 1
    finally:
        os.environ["HYDRA_FULL_ERROR"] = asked or "0"
    return 0


def leave(code: int) -> NoReturn:
    """End this process with `code`, as Python does but for its last phase, in which it takes the interpreter apart.

    Threads of torch and gloo that ask for the interpreter then abort the process ("terminate called without an active
    exception"): a run whose work is done and saved would end as one that has crashed.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are no daemons
    atexit._run_exitfuncs()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or nobody reads it any more
            stream.flush()
    os._exit(code)


def task(function: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    """Decorator between `hydra.main` and its function: says what went wrong before Hydra does, in one line.

    In a sweep it says so at once, with the overrides of the run, as Hydra continues and raises only the first error.
    """

    @functools.wraps(function)
    def reported(cfg: DictConfig) -> Any:
        is_job = "SUBMITIT_EXECUTOR" in os.environ
        if is_job:
            failed = threading.Event()
            atexit.register(_end_as_failed, failed)  # now, so that it runs after what is registered while training
        try:
            return function(cfg)
        except Exception as error:
            if is_job:
                failed.set()
            line = explain(error)
            hydra = HydraConfig.get()
            if hydra.mode == RunMode.MULTIRUN:
                what = line or "".join(traceback.format_exception_only(error)).strip()
                print(f"error in {' '.join(hydra.overrides.task)}: {what}", file=sys.stderr)
                if line is None or os.environ.get(SHOW_ALL) == "1":
                    raise
                raise Refused(line) from error
            if line is None or os.environ.get(SHOW_ALL) == "1":
                raise
            print(f"error: {line}", file=sys.stderr)
            raise SystemExit(1) from error

    return reported


def _end_as_failed(failed: threading.Event) -> None:
    """submitit hands a run's error to the command that waits, and the job would end well, for SLURM and `sacct`."""
    if failed.is_set():
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(1)


def explain(error: BaseException) -> str | None:
    """One line that says what is wrong and what to do about it; None for what is no user's mistake."""
    if isinstance(error, MissingConfigException):
        return _missing_config(error)
    if isinstance(error, OverrideParseException):
        return f"cannot read {error.override!r}: {_one_line(error)}; put quotes around special characters"
    if isinstance(error, OmegaConfBaseException):
        return _omegaconf(error)
    if isinstance(error, HydraException):
        return _hydra(error)
    if isinstance(error, yaml.YAMLError):
        return f"broken YAML: {_one_line(error)}"
    if isinstance(error, OSError):
        remedy = REMEDIES.get(error.errno or 0)
        return _one_line(error) + (f": {remedy}" if remedy else "")
    # FloatingPointError: training met NaN or infinity. Misconfiguration: Lightning refuses the Trainer's arguments.
    if isinstance(error, FloatingPointError | MisconfigurationException):
        return _one_line(error)
    if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
        return f"{_one_line(error)}: is memory short? run the same command with resume=auto"
    if type(error).__module__.partition(".")[0] in ("atlas_lm", "callbacks"):  # what a safeguard says is for the user
        return _one_line(error)
    if type(error).__module__.startswith("wandb."):
        return f"wandb: {_one_line(error)}; or logger.wandb.offline=true"
    if type(error).__module__.startswith("submitit."):
        return _submitit(error)
    if _is_short_of_memory(error):
        first = _one_line((str(error) or type(error).__name__).splitlines()[0])
        return f"memory is short ({first}): lower data.batch_size, data.seq_len or the model's sizes"
    if isinstance(error, RuntimeError) and 'Could not detect "srun"' in str(error):
        return "launcher=slurm: there is no SLURM on this machine: submit from a login node, or launcher=local"
    if isinstance(error, ValueError) and "Config group override" in str(error):
        return f"{_one_line(error)}: name a file of conf/, e.g. model=tiny"
    if isinstance(error, ValueError | TypeError) and _is_of_the_trainer(error):
        return f"trainer: {_one_line(error)}: correct the value"
    # A ValueError of our own code addresses the user; one from inside a library is a bug of ours.
    if isinstance(error, ValueError) and _is_ours(error):
        return _one_line(error)
    return None


def _is_of_the_trainer(error: BaseException) -> bool:
    """Lightning has refused an argument of the Trainer that `build_trainer` was making."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(frame.name == "build_trainer" for frame in frames) and "lightning" in Path(frames[-1].filename).parts


def _is_short_of_memory(error: BaseException) -> bool:
    """Torch says so in a RuntimeError on the CPU, and in a class of that name on a GPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _one_line(error: BaseException | str) -> str:
    lines = [line.strip() for line in str(error).splitlines() if not line.startswith("See https://hydra.cc")]
    return " ".join(line for line in lines if line)


def _is_ours(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return False
    file = Path(frames[-1].filename).resolve()
    return any(file.is_relative_to(ROOT / folder) for folder in ("atlas_lm", "callbacks")) or file.parent == ROOT


def _missing_config(error: MissingConfigException) -> str:
    group, _, name = str(error.missing_cfg_file or "").rpartition("/")
    options = [option for option in error.options or [] if not option.startswith("_")]
    if not options:
        return _one_line(str(error).split("Search path")[0].split("Config search path")[0])
    if (group, name) in EXTRAS:
        return f"{group}={name} is not installed: {EXTRAS[group, name]}"
    plus = "+" if group == "experiment" else ""
    return f"there is no {plus}{group}={name}{nearest(name, options)}; choose one of {', '.join(options)}"


def _submitit(error: BaseException) -> str | None:
    """What SLURM refuses, or a job that left nothing; None for the rest."""
    failed = re.search(
        r"failed during processing with trace:\n-+\n(.*?)\n-{20,}\n(?:.*\n)*?  - (.*)", str(error), re.DOTALL
    )
    if failed is not None:  # before the run began, or what only Hydra knows
        return f"{failed[1].strip().splitlines()[-1]} (in a job; all of it is in {failed[2].splitlines()[0]})"
    if type(error).__name__ == "FailedJobError":
        said = _one_line(str(error).replace("sbatch: error: ", ""))
        return f"sbatch refused the job ({said}): correct hydra.launcher, or trainer.num_nodes and trainer.devices"
    if type(error).__name__ == "UncompletedJobError":
        return f"{_one_line(str(error).partition('-' * 40)[0])}; python -m atlas_lm runs says how far it came"
    return None


def _omegaconf(error: OmegaConfBaseException) -> str:
    where = error.full_key or error.key
    if isinstance(error, ConfigKeyError | ConfigAttributeError):
        node = error.parent_node
        if isinstance(node, DictConfig) and _takes(node, str(error.key)):
            return f"{where} has no value in conf/ that could be replaced: +{where}=<value> adds it"
        known = [str(key) for key in node if key != "hydra"] if isinstance(node, DictConfig) else []
        options = f"; there are {', '.join(known)}" if known else ""
        return f"{where} is no setting{nearest(str(error.key), known)}{options}"
    if isinstance(error, MissingMandatoryValue):
        return f"{where} is required: give {where}=<value>"
    return f"{where}: {str(error).splitlines()[0]}: correct the value"


def _takes(node: DictConfig, key: str) -> bool:
    """Whether what the node names by `_target_` has a parameter of that name."""
    if not isinstance(node.get("_target_"), str):
        return False
    try:
        return key in inspect.signature(find_target(node["_target_"], "")).parameters
    except (ValueError, TypeError):  # it names nothing, or what shows no signature
        return False


def _hydra(error: HydraException) -> str | None:
    cause = error.__cause__ or error.__context__
    if not isinstance(cause, Exception):
        text = _one_line(error)
        if "Ambiguous value" in text:
            return text.split(" 1. ")[0] + ": use -m to sweep over it, or key=[value1,value2] for a list"
        return text.replace("To append to your default list use", "Use")
    if isinstance(error, InstantiationException) and isinstance(cause, TypeError) and "argument" in str(cause):
        return _one_line(error)
    line, file = explain(cause), re.match(r"In '(\S+)':", str(error))
    return f"{line} (in conf/{file[1]}.yaml)" if line and file else line
