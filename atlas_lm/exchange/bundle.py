"""The source of a model as files of one folder that import one another, for those who do not have this package.

Hugging Face takes the modules that `modeling_*.py` names by `from .name import …`, from its own folder alone. So
`atlas_lm.memory.chunked` becomes `memory_chunked.py`, and every import is rewritten. The C++ sources travel as text
in a module.
"""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = "atlas_lm"
HOME = Path(__file__).parents[1]
HERE = f"{PACKAGE}.exchange.hugging_face"
ENTRY = f"{HERE}.modeling_atlas"
COMPILED = f"{PACKAGE}.memory.kernels.compiled"
REPLACED = {f"{PACKAGE}.memory.loop.triton": f"{HERE}.without_triton"}
SOURCES = "cpp_sources"  # the module that holds the C++ code


def path_of(module: str) -> Path:
    """Its file."""
    return HOME.joinpath(*module.split(".")[1:]).with_suffix(".py")


def is_module(name: str) -> bool:
    return name.startswith(f"{PACKAGE}.") and path_of(name).is_file()


def flat(module: str) -> str:
    """What a module is called in the folder."""
    return module.removeprefix(f"{HERE}.").removeprefix(f"{PACKAGE}.").replace(".", "_")


def source_of(module: str) -> str:
    return path_of(REPLACED.get(module, module)).read_text(encoding="utf-8")


def imports_of(source: str) -> list[ast.ImportFrom]:
    """The statements that import from this package."""
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    return [node for node in found if node.level == 0 and (node.module or "").split(".")[0] == PACKAGE]


def imported(node: ast.ImportFrom) -> list[str]:
    """The modules that a statement needs."""
    return [name if is_module(name := f"{node.module}.{a.name}") else str(node.module) for a in node.names]


def closure(entry: str = ENTRY) -> list[str]:
    """All modules that one needs, itself first."""
    found, left = [], [entry]
    while left:
        module = left.pop()
        if module not in found:
            found.append(module)
            left += [name for node in imports_of(source_of(module)) for name in imported(node)]
    return [entry, *sorted(set(found) - {entry})]


def rewritten(source: str) -> str:
    """With imports from the same folder."""
    lines = source.splitlines(keepends=True)
    for node in sorted(imports_of(source), key=lambda node: node.lineno, reverse=True):
        indent = " " * node.col_offset
        new, names = [], []
        for alias in node.names:
            whole = f"{node.module}.{alias.name}"
            if is_module(whole):
                new.append(f"{indent}from . import {flat(whole)} as {alias.asname or alias.name}\n")
            else:
                names.append(f"{alias.name} as {alias.asname}" if alias.asname else alias.name)
        if names:
            inner = "".join(f"{indent}    {name},\n" for name in names)
            listed = ", ".join(names) if len(names) == 1 else f"(\n{inner}{indent})"
            new.append(f"{indent}from .{flat(str(node.module))} import {listed}\n")
        lines[node.lineno - 1 : node.end_lineno] = new
    return "".join(lines)


def bundle() -> dict[str, str]:
    """File name → text, for everything that an exported model needs beside its weights."""
    modules = closure()
    files = {f"{flat(module)}.py": rewritten(source_of(module)) for module in modules}
    cpp = {path.name: path.read_text(encoding="utf-8") for path in sorted(path_of(COMPILED).with_name("cpp").iterdir())}
    files[f"{SOURCES}.py"] = f'"""The memory\'s inner loops in C++, compiled at first use."""\n\nFILES = {cpp!r}\n'
    # Hugging Face copies the files that are named so, and those that they name in turn
    named = [*(flat(module) for module in modules[1:]), SOURCES]
    every = "".join(f"from .{name} import __doc__ as _{name}\n" for name in named)
    used = f"from .{SOURCES} import FILES\nfrom .{flat(COMPILED)} import use_sources\n\nuse_sources(FILES)\n"
    main = f"{flat(modules[0])}.py"
    files[main] = f"{files[main]}\n\n# The files of this folder\n{every}{used}"
    return files
