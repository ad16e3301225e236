"""The examples in docs/ do what the pages say of them, and the README shows the core of one word for word."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT

EXAMPLES = ROOT / "docs" / "examples"
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def example() -> Any:
    return load("own_module")


def test_the_fault_is_undone(example: Any) -> None:
    said: list[str] = []
    rollback, loss = example.main(said.append)
    assert (rollback.spikes, rollback.rollbacks) == ([35], 1)
    assert f"held-out loss {loss:.3f}" in said[0]
    shown = re.search(r"^spikes at .* held-out loss ([0-9.]+)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert shown is not None
    assert shown[0].partition(", held-out")[0] == said[0].partition(", held-out")[0]
    assert loss == pytest.approx(float(shown[1]), rel=0.2)


def test_without_the_fault_nothing_is_undone(example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example, "Spoil", example.L.Callback)
    rollback, _ = example.main(lambda line: None)
    assert (rollback.spikes, rollback.rollbacks) == ([], 0)


def test_the_readme_shows_its_core() -> None:
    core = (
        (EXAMPLES / "own_module.py")
        .read_text()
        .partition("# README: from here\n")[2]
        .partition("# README: to here")[0]
        .strip()
    )
    assert 0 < len([line for line in core.splitlines() if line]) <= 10
    assert f"```python\n{core}\n```" in (ROOT / "README.md").read_text()


def test_a_safeguard_of_ones_own_acts_and_lets_alone(example: Any, tmp_path: Path) -> None:
    own = load("own_safeguard")

    def fit(guard: Any) -> Any:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        return example.fit(
            example.Regression(), example.batches(0), example.batches(1), str(tmp_path / "run"), [guard], **quiet
        )

    with pytest.raises(own.LossTooHigh, match="3 batches in a row"):
        fit(own.LossCeiling(1e-9, patience=3))
    guard = own.LossCeiling(1e9)
    assert fit(guard).rollbacks == 0
    assert guard.streak == 0
    assert own.LossCeiling(1.0, patience=1).judge(float("nan"))
    with pytest.raises(ValueError, match="patience=0"):
        own.LossCeiling(1.0, patience=0)


@pytest.mark.slow
def test_the_safeguards_work_under_another_name(tmp_path: Path) -> None:
    """For a project that has a `callbacks` of its own: by the command that the page gives."""
    page = (ROOT / "docs" / "safeguards.md").read_text(encoding="utf-8")
    command = re.search(r"`cp -r callbacks (.*)`", page)
    assert command is not None
    shutil.copytree(ROOT / "callbacks", tmp_path / "callbacks", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(["bash", "-c", command[0].strip("`")], cwd=tmp_path, check=True)
    shutil.rmtree(tmp_path / "callbacks")
    (tmp_path / "callbacks").mkdir()
    (tmp_path / "callbacks" / "__init__.py").write_text("raise AssertionError('the other package')\n")
    code = "import safeguards; [getattr(safeguards, name) for name in safeguards.__all__]"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
