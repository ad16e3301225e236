"""docs/gpu.md names tests that exist."""

import re

import pytest

from benchmarks.gpu import SHOWN_ON_A_CPU
from tests.support import ROOT


@pytest.mark.parametrize("what", list(SHOWN_ON_A_CPU))
def test_every_test_that_the_page_names_exists(what: str) -> None:
    path, names = SHOWN_ON_A_CPU[what]
    there = re.findall(r"^def (test_\w+)", (ROOT / path).read_text(), re.MULTILINE)
    assert set(names) <= set(there)
    assert what in (ROOT / "docs/gpu.md").read_text()
