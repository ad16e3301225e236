"""The walls between the rooms stand: each contract of pyproject.toml holds, and falls when a line breaks it."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

BROKEN = [  # contract, file, and the line that breaks it
    ("Rooms stand above", "atlas_lm/model/norm.py", "import atlas_lm.training.optimizer"),
    ("Rooms stand above", "atlas_lm/latent/losses.py", "import atlas_lm.inspection.metrics"),  # beside each other
    ("The package knows no safeguard", "atlas_lm/runs/stats.py", "import callbacks.support.probing"),
    ("Safeguards import nothing", "callbacks/gate_monitor.py", "import atlas_lm.config.names"),
    ("The memory's mathematics", "atlas_lm/memory/state.py", "import numpy"),
    ("No circles", "atlas_lm/memory/network.py", "import atlas_lm.memory.state"),
]


def verdicts(folder: Path) -> dict[str, bool]:
    """Whether each contract is kept, by its name."""
    code = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
    found = subprocess.run([sys.executable, "-c", code, "--no-cache"], cwd=folder, capture_output=True, text=True)
    lines = [line.rsplit(" ", 1) for line in found.stdout.splitlines() if line.endswith((" KEPT", " BROKEN"))]
    assert lines, found.stdout + found.stderr
    assert (found.returncode == 0) == all(word == "KEPT" for _, word in lines)
    return {name: word == "KEPT" for name, word in lines}


def test_all_walls_stand() -> None:
    assert set(verdicts(ROOT).values()) == {True}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for name in ("atlas_lm", "callbacks"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.parametrize(("contract", "file", "line"), BROKEN)
def test_a_planted_violation_breaks_its_contract(copy: Path, contract: str, file: str, line: str) -> None:
    with (copy / file).open("a") as handle:
        handle.write(f"\n{line}\n")
    found = verdicts(copy)
    assert [kept for name, kept in found.items() if name.startswith(contract)] == [False]


def test_every_file_is_in_a_room() -> None:
    flat = {path.name for path in (ROOT / "atlas_lm").glob("*.py")}
    assert flat == {"__init__.py", "__main__.py", "files.py"}


def imported(folder: Path) -> dict[str, set[str]]:
    """The packages that each file of a folder imports, without its own package's."""
    found = {}
    for path in folder.rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        names += [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)]
        found[str(path.relative_to(folder))] = {name.partition(".")[0] for name in names}
    return found


def strangers(memory: Path) -> set[tuple[str, str]]:
    """What files of the memory import and may not: torch and Python are free, Triton where its kernels are."""
    allowed = {"atlas_lm", "torch", "__future__", *sys.stdlib_module_names}
    return {
        (file, name)
        for file, names in imported(memory).items()
        for name in names - allowed
        if name != "triton" or not (file == "loop/triton.py" or file.startswith("kernels/triton/"))
    }


def test_the_memory_imports_torch_and_python_alone(copy: Path) -> None:
    assert not strangers(ROOT / "atlas_lm" / "memory")
    for file, name in (("state.py", "einops"), ("network.py", "triton")):
        with (copy / "atlas_lm/memory" / file).open("a") as handle:
            handle.write(f"\nimport {name}\n")
    assert strangers(copy / "atlas_lm" / "memory") == {("state.py", "einops"), ("network.py", "triton")}
