"""docs/grafana.json draws what the exporters have, and a Prometheus server that scrapes them answers its queries."""

import copy
import json
import re
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from atlas_lm.inspection.exported import Live
from atlas_lm.inspection.metrics import logit_metrics
from atlas_lm.inspection.sinks import open_sinks
from atlas_lm.loggers.export import PrometheusLogger
from atlas_lm.model.session import Session
from benchmarks.reference import METRICS
from tests.support import ROOT
from tests.support.model_cases import build_model, make_tokens
from tests.support.prometheus import needs_prometheus, scraping
from tests.support.receivers import free_port
from tests.support.reports import a_report

pytest.importorskip("prometheus_client")
BOARD = json.loads((ROOT / "docs" / "grafana.json").read_text(encoding="utf-8"))


def expressions(node: Any) -> Iterator[str]:
    """Every query of a dashboard, wherever it stands."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "expr":
                yield value
            else:
                yield from expressions(value)
    elif isinstance(node, list):
        for value in node:
            yield from expressions(value)


def page(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        return answer.read().decode()


@pytest.fixture
def exporters(tmp_path: Path) -> Iterator[tuple[int, int]]:
    """The ports of an inspection that has reported and of a run that has logged every metric that there is."""
    ports = free_port(), free_port()
    sinks = open_sinks("prometheus", tmp_path, port=ports[0])
    sinks.report(a_report())
    logger = PrometheusLogger("stage1", port=ports[1])
    logger.log_metrics({name.replace("<i>", "0").replace("<name>", "x"): 1.0 for name in METRICS}, 1)
    assert logger._delivery is not None
    assert logger._delivery.flush(5) == ""
    yield ports
    logger.finalize("success")
    sinks.close()


def unknown(board: Any, names: set[str]) -> set[str]:
    """What queries name and no exporter has."""
    return {name for expression in expressions(board) for name in re.findall(r"\batlas_lm:\w+", expression)} - names


def test_every_query_names_a_metric_that_there_is(exporters: tuple[int, int]) -> None:
    names = {name for port in exporters for name in re.findall(r"^(atlas_lm:\w+)[{ ]", page(port), re.MULTILINE)}
    found = list(expressions(BOARD))
    assert len(found) > 40
    assert all("atlas_lm:" in expression for expression in found)
    assert unknown(BOARD, names) == set()
    wrong = copy.deepcopy(BOARD)
    wrong["panels"][1]["targets"][0]["expr"] += " + atlas_lm:generation_token_total"
    assert unknown(wrong, names) == {"atlas_lm:generation_token_total"}


def test_every_memory_figure_has_a_panel(exporters: tuple[int, int]) -> None:
    drawn = " ".join(expressions(BOARD))
    there = set(re.findall(r"^(atlas_lm:(?:memory|layer)_\w+)\{", page(exporters[0]), re.MULTILINE))
    assert len(there) == 11
    assert {name for name in there if name not in drawn} == set()


def test_panels_have_titles_and_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert panel["title"]
        assert not cells & taken, panel["title"]
        taken |= cells
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])


@pytest.mark.slow
@needs_prometheus
def test_a_server_answers_every_query(exporters: tuple[int, int], tmp_path: Path) -> None:
    with scraping(tmp_path, *exporters) as server:
        server.wait_for("count(up == 1)", lambda count: count == 2)
        time.sleep(3)  # rates take two samples
        for expression in expressions(BOARD):
            filled = expression.replace("$model", ".*").replace("$__rate_interval", "2s")
            assert "$" not in filled, expression
            assert server.query(filled), expression
        models = server.ask("/api/v1/series", **{"match[]": '{__name__=~"atlas_lm:.+"}'})
        assert {series["model_name"] for series in models} == {"tiny", "stage1"}


@pytest.mark.slow
@needs_prometheus
def test_a_server_scrapes_a_live_generation(tmp_path: Path) -> None:
    model, port = build_model(dtype=torch.float32), free_port()
    sinks = open_sinks("prometheus", tmp_path, port=port)
    tokens = 'atlas_lm:generation_tokens_total{model_name="small"}'
    with scraping(tmp_path, port) as server, torch.no_grad():
        server.wait_for("up", lambda up: up == 1)  # it begins seconds after it is ready
        session = Session(model)
        logits = session.read(make_tokens(8, batch=1))[:, -1]
        written, seen = 0, []
        until = time.monotonic() + 4
        while time.monotonic() < until:
            entropy, waits = [], []
            for _ in range(16):
                start = time.perf_counter()
                entropy.append(float(logit_metrics(logits).entropy_bits[0]))
                logits = session.read(logits.argmax(-1, keepdim=True))[:, -1]
                waits.append(time.perf_counter() - start)
            sinks.step("small", Live(16, entropy, (), waits))
            written += 16
            time.sleep(0.05)
            seen += [value for _, value in server.query(tokens)]
        assert len(set(seen)) > 3, "it grows while tokens are written"
        assert seen == sorted(seen)
        server.wait_for(tokens, lambda value: value == written)
        assert server.wait_for('atlas_lm:token_entropy_bits_count{model_name="small"}', lambda value: value == written)
        quantile = "histogram_quantile(0.95, rate(atlas_lm:inter_token_latency_seconds_bucket[4s]))"
        assert 0 < server.wait_for(quantile, lambda value: value > 0) < 5
        (line,) = sinks.report(a_report())
        assert re.search(r"scraped \d+ times", line)
    sinks.close()
