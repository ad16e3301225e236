"""Do the tests notice a small change of the code? python -m benchmarks.mutations --count 30 --out mutations.json

Draws places in safeguards, checkpoints and the memory's mathematics, changes one (a comparison, a number, an `and`, a
`not`, a sign) in a copy of the repository, and runs the fast tests of its room until one fails.
"""

import argparse
import ast
import copy
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from atlas_lm.files import ROOT

ROOMS = {  # files that are changed, and where their tests are
    "callbacks/*.py": ["tests/unit/callbacks"],
    "callbacks/support/*.py": ["tests/unit/callbacks"],
    "atlas_lm/checkpoints/*.py": ["tests/unit/checkpoints", "tests/unit/runs", "tests/integration/test_resume_point.py",
                                  "tests/integration/test_resume.py"],
    "atlas_lm/memory/*.py": ["tests/unit/memory", "tests/unit/model"],
    "atlas_lm/memory/loop/*.py": ["tests/unit/memory", "tests/unit/model"],
}  # fmt: skip
COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
SIGNS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}


def changed(node: ast.AST) -> ast.AST | None:
    """Another node in its place; None where there is nothing to change."""
    new: Any = copy.deepcopy(node)
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        new.ops[0] = COMPARISONS[type(node.ops[0])]()
    elif isinstance(node, ast.BoolOp):
        new.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return new.operand
    elif isinstance(node, ast.BinOp) and type(node.op) in SIGNS:
        new.op = SIGNS[type(node.op)]()
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        new.value = node.value + 1
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        new.value = not node.value
    else:
        return None
    return new


def places(path: Path) -> Iterator[tuple[int, int]]:
    """Where something can be changed, as (index in the order of ast.walk, line); not in annotations or at the top."""
    tree = ast.parse(path.read_text())
    inside = {
        id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for part in f.body for n in ast.walk(part)
    }
    for index, node in enumerate(ast.walk(tree)):
        if id(node) in inside and changed(node) is not None:
            yield index, getattr(node, "lineno", 0)


def mutated(text: str, index: int) -> tuple[str, str, str]:
    """The file with one place changed, what stood there, and what does now."""
    tree = ast.parse(text)
    wanted = list(ast.walk(tree))[index]
    new = changed(wanted)
    assert new is not None

    class Change(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> Any:
            return new if node is wanted else self.generic_visit(node)

    before, after = ast.unparse(wanted), ast.unparse(ast.fix_missing_locations(new))
    return ast.unparse(ast.fix_missing_locations(Change().visit(tree))), before, after


def notice(copy_of_repo: Path, file: str, index: int, tests: list[str]) -> dict[str, Any]:
    """Change a place, run the tests, put it back. `caught`: the test that failed first, or None."""
    path, start = copy_of_repo / file, time.monotonic()
    text = path.read_text()
    new, before, after = mutated(text, index)
    named = f"tests/unit/callbacks/test_{path.stem}.py"
    first = [named] if (copy_of_repo / named).exists() else []
    path.write_text(new)
    try:
        command = [sys.executable, "-m", "pytest", "-n", "0", "-x", "-p", "no:cacheprovider", *first, *tests]
        env = {**os.environ, "PYTHONPATH": str(copy_of_repo), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=copy_of_repo, env=env, capture_output=True, text=True, timeout=1200)
        failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        caught = failed[0] if failed else (f"exit code {done.returncode}" if done.returncode else None)
    except subprocess.TimeoutExpired:
        caught = "a test that did not end"
    finally:
        path.write_text(text)
    line = dict(places(path))[index]
    seconds = round(time.monotonic() - start)
    return {"file": file, "line": line, "before": before, "after": after, "caught": caught, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    rooms = {room: [(p, i) for p in sorted(ROOT.glob(room)) for i, _ in places(p)] for room in ROOMS}
    chosen = []
    for n in range(options.count):  # as many from each room
        room = list(ROOMS)[n % len(ROOMS)]
        path, index = rng.choice(rooms[room])
        chosen.append((str(path.relative_to(ROOT)), index, ROOMS[room]))
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        copies: SimpleQueue[Path] = SimpleQueue()
        for n in range(options.jobs):
            names = (
                "atlas_lm",
                "callbacks",
                "conf",
                "tests",
                "benchmarks",
                "docs",
                "train.py",
                "pyproject.toml",
                "README.md",
            )
            for name in names:
                source, target = ROOT / name, Path(folder) / str(n) / name
                target.parent.mkdir(exist_ok=True)
                shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
            copies.put(Path(folder) / str(n))

        def run(place: tuple[str, int, list[str]]) -> None:
            where = copies.get()
            try:
                result = notice(where, *place)
            finally:
                copies.put(where)
            found.append(result)
            print(f"{len(found)}/{len(chosen)} {json.dumps(result, ensure_ascii=False)}", flush=True)
            if options.out:
                options.out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")

        list(pool.map(run, chosen))
    print(f"{sum(x['caught'] is not None for x in found)} of {len(found)} noticed")


if __name__ == "__main__":
    main()
