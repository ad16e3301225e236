"""The test command passes where a scheduler's tools and variables are: `make test-login-node` runs all tests so."""

import subprocess
import sys

import pytest

from tests.support import ROOT

# One process, two ranks, train.py in this process and in one of its own, the resolution of time stamps and text.
FEW = [
    "tests/unit/callbacks/test_interrupt.py", "tests/unit/runs/test_runs.py", "tests/unit/data/test_text.py",
    "tests/integration/test_signals.py::test_while_python_still_imports",
    "tests/integration/test_train.py::test_init_takes_the_weights_and_starts_again",
]  # fmt: skip
MORE = [*FEW, "tests/unit/cli/test_arguments.py", "tests/integration/test_report.py"]


@pytest.mark.slow
@pytest.mark.parametrize("some", [FEW, MORE], ids=["few", "more"])
def test_some_tests_as_on_a_login_node(some: list[str]) -> None:
    command = [
        "make",
        "test-login-node",
        f"PYTHON={sys.executable}",
        f"TESTS={' '.join(some)} -p no:cacheprovider -n 0",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
