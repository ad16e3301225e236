"""From a trace to a report: NaN is seen whatever is captured, seconds add up, thresholds come back from their file."""

import math

import pytest
import torch

from atlas_lm.inspection import atlas, schema
from atlas_lm.inspection.calibrate import calibrate
from atlas_lm.inspection.capture import CAPTURES, Plan
from atlas_lm.inspection.health import Thresholds, read_thresholds
from atlas_lm.inspection.report import build
from atlas_lm.inspection.subject import info_of
from tests.support.model_cases import VOCABULARY, build_model, make_tokens
from tests.support.reports import a_report


def names(ids):
    return [f"<{i}>" for i in ids]


def reported(model, **changes):
    plan = Plan(tokens=40, top_k=VOCABULARY, **changes)
    trace = atlas.inspect(model, make_tokens(20, batch=1)[0].tolist(), plan, names)
    return build(trace, info_of(model, "small"), plan, names, "", Thresholds(), "0")


@pytest.mark.parametrize("capture", CAPTURES)
def test_logits_that_are_not_finite_raise_their_flag_whatever_is_captured(capture):
    model = build_model(torch.float32, shard=240, context=1).eval()
    passes = []

    def broken(_, __, output):
        passes.append(1)
        return output * math.nan if len(passes) == 6 else None

    model.norm.register_forward_hook(broken)  # after every layer: hidden states stay finite
    report = reported(model, capture=capture)
    flag = next(flag for flag in report.flags if flag.name == "nonfinite")
    assert flag.fired
    assert flag.steps == [5]
    assert report.steps.entropy_bits[5] is None
    assert schema.parse(report.model_dump_json()) == report


def test_seconds_by_operation_add_up_to_the_total():
    latency = reported(build_model(torch.float32, shard=240, context=1).eval()).latency
    assert sum(latency.by_operation.values()) == pytest.approx(latency.total, rel=1e-6)
    assert latency.by_operation["prompt"] > 0


def test_thresholds_of_a_model_without_a_memory_come_back_from_their_file(tmp_path):
    reports = [a_report() for _ in range(10)]
    for report in reports:
        report.memory = schema.MemoryColumns()
    thresholds = calibrate(reports)
    assert thresholds.diverging_norm == math.inf
    path = tmp_path / "thresholds.json"
    path.write_text(thresholds.model_dump_json())
    assert read_thresholds(path) == thresholds
