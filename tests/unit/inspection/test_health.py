"""Each flag on plain numbers: an input that raises it, and one that does not."""

import math

import pytest

from atlas_lm.inspection.calibrate import calibrate
from atlas_lm.inspection.health import Thresholds, flags_of, unusual
from atlas_lm.inspection.summary import mid_layer_ratios, summary_of
from tests.support.reports import a_report


def judged(report, **thresholds):
    report.summary = summary_of(report)
    return {flag.name: flag for flag in flags_of(report, Thresholds(**thresholds))}


def test_a_sound_report_raises_nothing():
    report = a_report()
    report.layers.norm = [[1.0, 1.0, 1.0]] * 4
    report.layers.focused = report.layers.collapsed = [[0, 0]] * 4
    assert not [name for name, flag in judged(report).items() if flag.fired]


def test_nonfinite_points_to_step_and_layer():
    report = a_report()
    report.layers.nonfinite[2] = [0, 7]
    flag = judged(report)["nonfinite"]
    assert flag.fired
    assert flag.steps == [2]
    assert "layer 1" in flag.message
    report = a_report()
    report.steps.entropy_bits[3] = None
    assert judged(report)["nonfinite"].steps == [3]
    report = a_report()
    report.prompt.nonfinite = [0, 1]
    assert "prompt" in judged(report)["nonfinite"].message


def test_high_entropy_counts_steps():
    report = a_report()  # 2, 3, 4 and 5 bits
    assert judged(report, high_entropy_share=0.2)["high_entropy"].steps == [3]
    assert not judged(report, high_entropy_share=0.25)["high_entropy"].fired


def test_collapse_is_a_share_of_heads():
    report = a_report()  # one of four heads in every step
    assert judged(report, collapsed_share=0.2)["attention_collapse"].value == pytest.approx(0.25)
    assert judged(report, collapsed_share=0.2)["attention_collapse"].fired
    assert not judged(report)["attention_collapse"].fired


def test_repetition_needs_tokens_and_hidden_states_alike():
    report = a_report()
    report.steps.repetition_period = [0, 0, 2, 2]
    report.steps.repetition_tokens = [0, 0, 6, 7]
    report.steps.repetition_cosine = [None, None, 0.5, 0.95]
    flag = judged(report)["repetition"]
    assert flag.fired
    assert flag.steps == [3]
    assert flag.value == 7
    report.steps.repetition_cosine = [None, None, 0.5, 0.5]
    assert not judged(report)["repetition"].fired
    report.steps.repetition_cosine = [None] * 4  # no hidden states: tokens decide
    assert judged(report)["repetition"].steps == [2, 3]


def test_mid_layer_anomaly_is_relative_to_the_same_step():
    assert mid_layer_ratios([[1.0, 2.0, 3.0], [100.0, 200.0, 1.0]]) == [2.0, 2.0]
    assert mid_layer_ratios([[1.0, None, 3.0]]) == [math.inf]
    assert mid_layer_ratios([[1.0, 2.0]]) == [None]
    report = a_report()
    report.layers.norm = [[1.0, 2.0, 3.0]] * 3 + [[1.0, 6.0, 3.0]]
    flag = judged(report)["mid_layer_anomaly"]
    assert flag.steps == [3]
    assert flag.value == 6.0


def test_memory_flags():
    report = a_report()
    assert not any(judged(report)[name].fired for name in ("memory_silent", "memory_saturated", "memory_diverging"))
    report.memory.output_ratio = [[0.001], [0.001]]
    assert judged(report)["memory_silent"].fired
    report = a_report()
    report.memory.relative_change = [[None], [0.0]]
    assert "no write" in judged(report)["memory_silent"].message
    report.memory.chunks = [64]  # no write was due in three tokens
    assert not judged(report)["memory_silent"].fired
    report = a_report()
    report.memory.radius_share = [[0.2], [1.8]]
    assert judged(report)["memory_saturated"].fired
    report = a_report()
    report.memory.saturated_gates = [[0.95], [0.99]]
    assert "gates" in judged(report)["memory_saturated"].message
    report = a_report()
    report.memory.relative_change = [[None], [0.9]]
    assert judged(report)["memory_diverging"].steps == [3]
    report = a_report()
    report.memory.weight_norm = [[1.0], [None]]
    assert judged(report)["memory_diverging"].fired
    assert judged(a_report(), diverging_norm=1.1)["memory_diverging"].fired


def clean(n, spread=0.05):
    found = []
    for i in range(n):
        report = a_report()
        report.steps.entropy_bits = [2.0 + spread * (i % 7), 2.5, 3.0, 2.2 - spread * (i % 5)]
        found.append(report)
    return found


def test_calibrated_flags_are_silent_on_their_own_text_and_speak_on_another():
    thresholds = calibrate(clean(40))
    for report in clean(40):
        report.summary = summary_of(report)
        assert not [flag.name for flag in flags_of(report, thresholds) if flag.fired]
    odd = a_report()
    odd.steps.entropy_bits = [9.0] * 4
    odd.summary = summary_of(odd)
    assert {"high_entropy", "unusual"} <= {flag.name for flag in flags_of(odd, thresholds) if flag.fired}


def test_figures_that_were_not_captured_do_not_count():
    thresholds = calibrate(clean(20))
    summary = summary_of(clean(1)[0])
    assert unusual(summary, thresholds) < thresholds.unusual
    assert unusual({**summary, "prompt_basin": None}, thresholds) < thresholds.unusual
    assert unusual({}, thresholds) is None


def test_a_figure_that_clean_text_never_changes_makes_nothing_impossible():
    thresholds = calibrate(clean(20))
    summary = summary_of(clean(1)[0])
    moved = {**summary, "mean_margin": (summary["mean_margin"] or 0) * 1.05}
    assert unusual(moved, thresholds) < 3


@pytest.mark.parametrize(("n", "quantile", "named"), [(7, 0.99, "7"), (20, 1.0, "1.0"), (20, 0.1, "0.1")])
def test_too_few_texts_and_a_wrong_quantile_are_refused(n, quantile, named):
    with pytest.raises(ValueError, match=named):
        calibrate(clean(n), quantile)
