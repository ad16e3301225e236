"""docs/gpu.md names tests that exist, and says what no card has shown; what a step of a model takes."""

import re

import pytest

from atlas_lm.config.model import ModelConfig
from benchmarks import memory_layer
from benchmarks.gpu import ASKED, PARTS, SHOWN_ON_A_CPU, shown_by
from benchmarks.gpu_runs import flops_per_token
from benchmarks.train_step import model_values
from tests.support import ROOT


@pytest.mark.parametrize("what", list(SHOWN_ON_A_CPU))
def test_every_test_that_the_page_names_exists(what: str) -> None:
    path, names = SHOWN_ON_A_CPU[what]
    there = re.findall(r"^def (test_\w+)", (ROOT / path).read_text(), re.MULTILINE)
    assert set(names) <= set(there)
    assert what in (ROOT / "docs/gpu.md").read_text()


def test_what_no_run_has_shown_is_said() -> None:
    assert {where[0] for where in ASKED.values() if where} <= PARTS.keys()
    where = ("kernels", "chunk 1: triton")
    assert shown_by([{"kernels": {"failed": "took more than 120 s"}}, {}], where) == "**not measured**"
    assert shown_by([{}, {"kernels": {"chunk 1: triton": {"forward_us": 1.0}}}], where) == "run 2"
    assert shown_by([{}], None) == "**not measured**"


def test_useful_operations_of_a_step() -> None:
    """By hand: 6 for each weight of a matrix; attention; memories as memory_layer counts them."""
    values = model_values("43m") | {"layers": 1, "local_chunks": [64], "global_chunk": None, "local_rank": 191}
    found = flops_per_token(ModelConfig(**values), 1000)
    D, W = 512, 512
    assert found["logits"] == 6 * D * 1000
    assert found["window"] == 12 * W * D
    by_hand = 2 * 3 * D * D + 2 * D * D + 3 * D * 1366  # both projections, gate and output, feed-forward
    assert 6 * by_hand < found["matrices"] < 6 * by_hand * 1.05
    assert found["local memory, chunk 64"] == 2 * 8 * memory_layer.useful_of_head(
        "gated_mlp", 256, 64, 64, 64, "gradient"
    )
    twin = flops_per_token(ModelConfig(**{**values, "memory": "none"}), 1000)
    assert set(twin) == {"matrices", "logits", "window"}
