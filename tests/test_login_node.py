"""The test command passes where a scheduler's tools and variables are: `make test-login-node` runs all tests so."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# One process, two ranks, train.py in this process and in one of its own, the resolution of time stamps and text.
SOME = [
    "tests/callbacks/test_interrupt.py", "tests/test_runs.py", "tests/test_options.py", "tests/data/test_data_text.py",
    "tests/test_report.py", "tests/test_signals.py::test_while_python_still_imports",
    "tests/test_train.py::test_init_takes_the_weights_and_starts_anew",
]  # fmt: skip


def test_some_tests_as_on_a_login_node(tmp_path: Path) -> None:
    command = ["make", "test-login-node", f"PYTHON={sys.executable}", f"TESTS={' '.join(SOME)} -p no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
