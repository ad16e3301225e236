"""Command lines of key=value, described by a dataclass: its fields are the options, the string under each its help.

@dataclass
class Options:
    run: str
    "Run folder or experiment."
    paths: list[str] = field(default_factory=list)
    "Takes every argument that is no key=value."

options = parse(Options, sys.argv[1:], "python -m atlas_lm.some_tool")
"""

import ast
import contextlib
import inspect
import itertools
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from atlas_lm.config.names import nearest

T = TypeVar("T")

HELP = ("-h", "--help")


def parse(options: type[T], arguments: Sequence[str], command: str = "") -> T:
    """The dataclass `options` filled from key=value arguments, typed by OmegaConf.

    Its fields are int, float, str, bool, Path, or one of them and None.
    A field of type list[str] takes what is no key=value. -h or --help prints the options and ends the process with 0.
    ValueError: an argument that is no option or is given twice, a value of the wrong type, an option without default
    that is not given, and whatever the dataclass itself refuses.
    """
    if any(argument in HELP for argument in arguments):
        print(describe(options, command))
        raise SystemExit(0)
    kinds = get_type_hints(options)
    rest = next((name for name, kind in kinds.items() if kind == list[str]), None)
    names = [name for name in kinds if name != rest]
    given: dict[str, Any] = {}
    for argument in arguments:
        name, separator, value = argument.partition("=")
        if rest and not (separator and name.isidentifier()) and not argument.startswith("-"):
            given.setdefault(rest, []).append(argument)
        elif not separator or name not in names:
            raise ValueError(
                f"unknown argument {argument!r}: give key=value, key one of {', '.join(names)}{nearest(name, names)}"
            )
        elif name in given:
            raise ValueError(f"{name}= is given twice: keep one")
        else:
            given[name] = value
    for f in fields(options):  # type: ignore[arg-type]
        if is_required(f) and given.get(f.name, "") == "":
            raise ValueError(f"{f.name}= is missing: {help_of(options, f)}; --help lists all options")
    return options(**{name: typed(options, name, value, kinds[name]) for name, value in given.items()})


def typed(options: type, name: str, value: Any, kind: Any) -> Any:
    """The value of an option in its type. ValueError naming both if it cannot be.

    Text stays as it was typed: to OmegaConf "${x}" is a reference, and "???" a value that is missing.
    """
    wanted = {k for k in get_args(kind) or (kind,) if k is not NoneType}
    if NoneType in get_args(kind) and value in ("none", "None", "null"):
        return None
    if kind == list[str] or str in wanted:
        return value
    if Path in wanted:
        return Path(value)
    config = OmegaConf.structured(options)
    try:
        config[name] = value
        return config[name]
    except OmegaConfBaseException:
        raise ValueError(f"{name}={value} must be {in_words(kind)}") from None


def in_words(kind: Any) -> str:
    """What a value of this type looks like."""
    words = {int: "a whole number", float: "a number", bool: "true or false"}
    return next((words[k] for k in (kind, *get_args(kind)) if k in words), "text")


def describe(options: type, command: str = "") -> str:
    """The text of --help: how to call the command and every option with its default and its help."""
    kinds = get_type_hints(options)
    usage, rows = [], []
    for f in fields(options):
        if kinds[f.name] == list[str]:
            left = f"{f.name}..."
        else:
            left = f"{f.name}={'...' if f.default in (MISSING, None, '') else f.default}"
        usage += [left] if is_required(f) or kinds[f.name] == list[str] else []
        rows.append((left, help_of(options, f) + (" (required)" if is_required(f) else "")))
    width = max(len(left) for left, _ in rows)
    head = " ".join(["usage:", *command.split(), *usage, "[key=value ...]"])
    about = [inspect.getdoc(options) or "", ""]
    return "\n".join([head, "", *about, *(f"  {left:{width}}  {text}".rstrip() for left, text in rows)])


def is_required(f: "Field[Any]") -> bool:
    """Whether a field has no default."""
    return f.default is MISSING and f.default_factory is MISSING


def help_of(options: type, f: "Field[Any]") -> str:
    """The help of a field: its metadata `help`, else the string under it, else nothing; without the full stop."""
    text = f.metadata.get("help") or _documentation(options).get(f.name, "")
    return " ".join(str(text).split()).removesuffix(".")


def _documentation(options: type) -> dict[str, str]:
    """The string under each field, from the source of the class."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(options)))
    except (OSError, TypeError):  # a class without a source file
        return {}
    assert isinstance(tree.body[0], ast.ClassDef)
    body = tree.body[0].body
    return {
        before.target.id: after.value.value
        for before, after in itertools.pairwise(body)
        if isinstance(before, ast.AnnAssign)
        and isinstance(before.target, ast.Name)
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
        and isinstance(after.value.value, str)
    }


def call(main: Callable[[list[str]], None]) -> None:
    """Run a command on the process's arguments; what the user can put right ends it with one line and exit code 1."""
    ending = attempt(lambda: main(sys.argv[1:]))
    if ending:
        sys.exit(ending)


def attempt(command: Callable[[], object]) -> int | str:
    """What a command ends with, as `sys.exit` takes it: 0, a line that says what the user can put right, or a code.

    130 at Ctrl-C. 1 without a word where a reader closes the pipe early, as `head` does: it wants no more.
    Anything else is a bug and keeps its traceback.
    """
    try:
        try:
            command()
        except SystemExit:
            _flush()
            raise
        _flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _drop_output()
        return 1
    except Exception as error:
        from atlas_lm.cli.errors import explain  # takes seconds to import

        line = explain(error)
        if line is None:
            raise
        if isinstance(error, OSError) and error.filename is None:
            _drop_output()
        return f"error: {line}"
    return 0


def _flush() -> None:
    """What cannot be written is found here, not while Python exits."""
    if sys.stdout is not None:
        sys.stdout.flush()


def _drop_output() -> None:
    """Send what is still to be written to nowhere: Python flushes once more at the end, and would complain."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # no stdout, or one that is no file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
