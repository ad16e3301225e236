"""Reports: numbers alone, of every version so far, and files that are none say so."""

import json
import math

import pytest
import torch
from pydantic import ValidationError

from atlas_lm.files import ROOT
from atlas_lm.inspection import schema
from tests.support.reports import a_report


def test_a_report_comes_back_from_its_file(tmp_path):
    report = a_report()
    schema.write(report, tmp_path / "report.json")
    assert schema.read(tmp_path / "report.json") == report


def test_what_is_not_finite_becomes_null():
    report = a_report()
    report.steps.entropy_bits = []
    content = json.loads(report.model_dump_json())
    content["steps"]["entropy_bits"] = [math.nan, math.inf, 1.0]
    again = schema.parse(json.dumps(content))
    assert again.steps.entropy_bits == [None, None, 1.0]
    json.loads(again.model_dump_json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_a_tensor_does_not_get_into_a_report():
    content = a_report().model_dump()
    content["steps"]["entropy_bits"] = torch.ones(3)
    with pytest.raises(ValidationError):
        schema.Report.model_validate(content)
    with pytest.raises(ValidationError):
        schema.Report.model_validate({**a_report().model_dump(), "hidden_states": [1.0]})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda text: text[: len(text) // 2], "cut off"),
        (lambda text: "[]", "schema_version"),
        (lambda text: text.replace('"schema_version":1', '"schema_version":999'), "999"),
        (lambda text: text.replace('"schema_version":1', '"schema_version":0'), "version 0"),
        (lambda text: text.replace('"schema_version":1', '"schema_version":true'), "schema_version"),
        (lambda text: text.replace('"text":', '"txt":'), "text"),
    ],
)
def test_what_is_no_report_of_this_version_is_refused_by_what_is_wrong(tmp_path, change, named):
    path = tmp_path / "broken.json"
    path.write_text(change(a_report().model_dump_json()))
    with pytest.raises(ValueError, match=named):
        schema.read(path)


def test_reports_of_every_version_load():
    versions = sorted(int(path.stem) for path in (ROOT / "tests/golden/reports").glob("*.json"))
    assert versions == list(range(1, schema.VERSION + 1))
    for version in versions:
        report = schema.read(ROOT / f"tests/golden/reports/{version}.json")
        assert report.schema_version == schema.VERSION


def test_an_older_version_is_upgraded_step_by_step(monkeypatch):
    content = json.loads(a_report().model_dump_json())
    older = {**content, "schema_version": 1, "generated": content.pop("text")}
    del older["text"]
    monkeypatch.setattr(schema, "VERSION", 2)
    renamed = lambda old: {**{k: v for k, v in old.items() if k != "generated"}, "text": old["generated"]}  # noqa: E731
    monkeypatch.setattr(schema, "UPGRADES", {1: renamed})
    assert schema.parse(json.dumps(older)).text == older["generated"]
