"""docs/examples/own_module.py does what the README says of it, and the README shows its core word for word."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "docs" / "examples" / "own_module.py"
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("own_module", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_fault_is_undone(example: Any) -> None:
    said: list[str] = []
    rollback, loss = example.main(said.append)
    assert (rollback.spikes, rollback.rollbacks) == ([35], 1)
    assert f"held-out loss {loss:.3f}" in said[0]


def test_without_the_fault_nothing_is_undone(example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(example, "Spoil", example.L.Callback)
    rollback, _ = example.main(lambda line: None)
    assert (rollback.spikes, rollback.rollbacks) == ([], 0)


def test_the_readme_shows_its_core() -> None:
    core = EXAMPLE.read_text().partition("# README: from here\n")[2].partition("# README: to here")[0].strip()
    assert 0 < len([line for line in core.splitlines() if line]) <= 10
    assert f"```python\n{core}\n```" in (ROOT / "README.md").read_text()
