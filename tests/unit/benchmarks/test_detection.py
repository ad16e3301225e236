"""Planted faults change what a model computes and nothing after them; scores and rates are what they say."""

import json
import math

import pytest
import torch

from atlas_lm.inspection.capture import Plan
from atlas_lm.inspection.health import Thresholds
from atlas_lm.inspection.subject import AtlasSubject, HuggingFaceSubject, inspect_ids
from benchmarks import detection, inspection, inspection_faults, uncertainty
from benchmarks.inspection_faults import PERMANENT, faults_of
from tests.support.model_cases import build_model, make_tokens
from tests.unit.inspection.test_hugging_face import causal


class Letters:
    """A tokenizer of a small vocabulary."""

    separator_id = 0

    def encode(self, text):
        return [ord(c) - 97 for c in text]

    def decode(self, ids):
        return "".join(chr(97 + int(i)) for i in ids)


def ours():
    model = build_model(torch.float32, shard=240, context=1).eval()
    return AtlasSubject(model, Letters(), "ours")


def theirs():
    return HuggingFaceSubject(causal("llama"), Letters(), "theirs")


def written(subject, ids, **plan):
    return inspect_ids(subject, ids, "", Plan(tokens=80, **plan), Thresholds(), "")


@pytest.mark.long
@pytest.mark.parametrize("make", [ours, theirs])
def test_every_fault_shows_and_leaves_the_model_as_it_was(make):
    subject, ids = make(), make_tokens(20, batch=1)[0].tolist()
    forced = tuple(make_tokens(80, batch=1, seed=1)[0].tolist())  # more than one row of the memories' health
    sound = written(subject, ids, forced=forced)
    faults = faults_of(subject)
    assert ("memory wiped" in faults) == (make is ours)
    for name, fault in faults.items():
        with fault(subject):
            changed = written(subject, ids, forced=forced)
        same = [a == b for a, b in zip(sound.steps.surprisal_bits, changed.steps.surprisal_bits, strict=False)]
        assert not all(same), f"{name} changes nothing"
        if name in ("NaN in a layer", "KV cache shuffled", "memory wiped", "memory noise"):
            assert all(same[: inspection_faults.AT]), f"{name} comes too early"
        if name == "NaN in a layer":
            assert "nonfinite" in changed.fired
            assert changed.flags[0].steps[0] == inspection_faults.AT
        if name == "writes frozen":
            assert "memory_silent" in changed.fired
        assert written(subject, ids, forced=forced).steps.surprisal_bits == sound.steps.surprisal_bits, name
    assert set(PERMANENT) <= set(faults)


def test_a_loop_is_of_the_period_that_is_asked_for():
    report = detection.loop_of(ours(), make_tokens(20, batch=1)[0].tolist(), 7, 0, 40)
    assert "repetition" in report.fired
    assert report.steps.repetition_period[-1] in (1, 7)


def test_auroc_and_prr_of_known_scores():
    assert detection.auroc([3, 4, math.inf], [1, 2, 2]) == 1.0
    assert detection.auroc([1, 2], [1, 2]) == 0.5
    assert detection.with_interval([3, 4, 5] * 5, [1, 2, 2] * 5)[1:] == (1.0, 1.0)
    assert uncertainty.prr([0.0, 0.1, 0.8, 0.9], [1, 1, 0, 0]) == pytest.approx(1.0)
    assert uncertainty.prr([0.9, 0.8, 0.1, 0.0], [1, 1, 0, 0]) == pytest.approx(-1.0)
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(4000, generator=generator).tolist()
    quality = (torch.rand(4000, generator=generator) < 0.5).float().tolist()
    assert abs(uncertainty.prr(noise, quality)) < 0.1
    assert uncertainty.auroc(noise, quality) == pytest.approx(0.5, abs=0.05)


@pytest.mark.slow
def test_the_table_of_a_small_model(tmp_path, monkeypatch):
    subject = ours()
    prompts = [make_tokens(16, batch=1, seed=i)[0].tolist() for i in range(27)]
    monkeypatch.setattr(detection, "prompts_of", lambda o, s: prompts)
    monkeypatch.setattr(detection, "PERIODS", range(2, 4))
    o = detection.Options(run="x", prompts=9, loops=3, tokens=20)
    content = detection.measure(o, subject, lambda what: None)
    table = detection.table(content)
    assert content["faults"]["NaN in a layer"]["raised"]["nonfinite"] == 1.0
    assert content["faults"]["loop of 3"]["raised"]["repetition"] == 1.0
    assert "false alarms" in table
    assert table.count("\n") == 1 + len(content["faults"]) + 1


def test_questions_have_one_answer_each_and_are_judged_by_it():
    asked = uncertainty.questions()
    assert len(asked) >= 300
    assert len({q.text for q in asked}) == len(asked)
    assert asked == uncertainty.questions()
    number, city = asked[-1], asked[0]
    assert uncertainty.is_right(f" {number.answer}.\nQuestion", number)
    assert not uncertainty.is_right(f" 1{number.answer}", number)
    assert uncertainty.is_right(f" It is {city.answer}.", city)
    assert not uncertainty.is_right(" Paris is lovely"[:1], city)


def test_directions_come_from_the_other_half():
    right = [bool(i // 2 % 2) for i in range(400)]
    scores = [{"helps": float(r), "baseline: perplexity": 1.0 - r} for r in right]
    found = uncertainty.judge(scores, right)
    assert found["helps"]["auroc"][0] == found["baseline: perplexity"]["auroc"][0] == 1.0
    assert found["helps"]["direction"] == "low is unsure"
    backwards = uncertainty.judge([{"baseline: perplexity": float(r)} for r in right], right)
    assert backwards["baseline: perplexity"]["auroc"][0] == 0.0  # its direction is known, and not turned round


def test_the_cost_of_an_inspection_and_its_page(tmp_path, monkeypatch):
    monkeypatch.setattr(inspection, "PROMPT", "abcabc")
    found = {"ours": inspection.cost(ours(), tokens=6, pairs=2)}
    assert set(found["ours"]["cost"]) == {"full", "sampled"}
    low, middle, high = found["ours"]["cost"]["full"]
    assert low <= middle <= high
    (tmp_path / "docs" / "results").mkdir(parents=True)
    page = "before\n" + "\n".join(f"{inspection.MARK.format(name=n)}\nold\n<!-- end of figures -->\nbetween" for n in
                                  ("detection", "uncertainty", "inspection"))  # fmt: skip
    (tmp_path / inspection.PAGE).write_text(page)
    (tmp_path / inspection.NUMBERS).write_text(json.dumps(found))
    inspection.draw(tmp_path)
    written = (tmp_path / inspection.PAGE).read_text()
    assert written.count("old") == 2
    assert "| ours |" in written
    assert written.count("between") == 3
