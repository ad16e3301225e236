"""Hundreds of pairs of models and streaming states, also under the address sanitizer."""

import subprocess

import pytest

from tests.support.state_pairs import pairs

pytestmark = pytest.mark.slow


def test_many_pairs_of_models_and_states():
    assert "500 pairs" in pairs("500", "1")


def test_many_pairs_under_the_address_sanitizer(tmp_path, monkeypatch):
    found = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout
    if "/" not in found:
        pytest.skip("g++ has no libasan.so here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "500 pairs" in pairs("500", "0", "--sanitize")
