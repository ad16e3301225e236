"""TensorBoard: what its own plugins make of the event files that BoardLogger writes."""

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.utils import instantiate
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import OmegaConf

from atlas_lm.loggers.board import BoardLogger, custom_scalars, flatten
from tests.support import ROOT
from tests.support.worlds import set_clock

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what TensorBoard's server bundles
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.custom_scalar.custom_scalars_plugin import CustomScalarsPlugin
    from tensorboard.plugins.hparams import api_pb2
    from tensorboard.plugins.hparams.backend_context import Context
    from tensorboard.plugins.hparams.list_session_groups import Handler
    from tensorboard.plugins.scalar.scalars_plugin import ScalarsPlugin
    from tensorboard.summary.writer import event_file_writer

LAYOUT = {
    "Safeguards": {"perplexity": ["spike_rollback/ppl", "spike_rollback/ema"], "needle": ["niah_probe/accuracy"]},
    "Training": {"loss": ["val/loss"]},
}
PARAMS = {"model": {"dim": 16, "local_chunks": [4, 8], "residual": True, "memory": None}, "vocab_size": 257}


class Board:
    """A folder of runs as TensorBoard's backend reads it."""

    def __init__(self, folder: Path) -> None:
        multiplexer = EventMultiplexer().AddRunsFromDirectory(str(folder))
        multiplexer.Reload()
        self.multiplexer = multiplexer
        provider = MultiplexerDataProvider(multiplexer, str(folder))
        self.scalars = {"scalars": ScalarsPlugin(TBContext(logdir=str(folder), data_provider=provider))}
        self.context = TBContext(logdir=str(folder), data_provider=provider, plugin_name_to_instance=self.scalars)

    def layout(self) -> dict[str, dict[str, list[str]]]:
        found = CustomScalarsPlugin(self.context).layout_impl(RequestContext(), "")
        text = found if isinstance(found, dict) else yaml.safe_load(found)
        return {
            category["title"]: {chart["title"]: chart["multiline"]["tag"] for chart in category["chart"]}
            for category in text.get("category", [])
        }

    def drawn(self, tag: str, run: str = ".") -> set[str]:
        """The metrics that a chart with this tag draws."""
        found = CustomScalarsPlugin(self.context).scalars_impl(RequestContext(), run, tag, "")
        assert found["regex_valid"]
        return set(found["tag_to_events"])

    def sessions(self) -> list[api_pb2.SessionGroup]:
        """The rows of HPARAMS."""
        context = Context(self.context)
        experiment = context.experiment_from_metadata(
            RequestContext(), "", True, context.hparams_metadata(RequestContext(), ""), None
        )
        statuses = [s for _, s in api_pb2.Status.items()]
        request = api_pb2.ListSessionGroupsRequest(
            start_index=0,
            slice_size=10,
            allowed_statuses=statuses,
            col_params=[api_pb2.ColParams(metric=metric.name) for metric in experiment.metric_infos],
        )
        return list(Handler(RequestContext(), context, "", request).run().session_groups)


@pytest.fixture(autouse=True)
def _closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No writer outlives its test."""
    made: list[BoardLogger] = []
    build = BoardLogger.__init__

    def remember(self: BoardLogger, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(BoardLogger, "__init__", remember)
    yield
    for logger in made:
        TensorBoardLogger.finalize(logger, "failed")


def a_run(folder: Path, status: str = "success", losses: tuple[float, ...] = (3.0, 2.5), first: int = 0) -> None:
    logger = BoardLogger(str(folder), LAYOUT)
    logger.log_hyperparams(PARAMS)
    for step, loss in enumerate(losses, first):
        logger.log_metrics({"val/loss": loss, "spike_rollback/ppl": loss, "spike_rollback/ppl_delta": 0.0}, step)
    logger.finalize(status)


def test_the_layout_reaches_tensorboard(tmp_path: Path) -> None:
    a_run(tmp_path)
    board = Board(tmp_path / "tensorboard")
    layout = board.layout()
    assert {category: list(charts) for category, charts in layout.items()} == {
        "Safeguards": ["perplexity", "needle"],
        "Training": ["loss"],
    }
    drawn = set().union(*(board.drawn(tag) for tag in layout["Safeguards"]["perplexity"]))
    assert drawn == {"spike_rollback/ppl"}, "spike_rollback/ppl_delta is another chart's"


def test_tags_with_signs_of_regular_expressions_are_meant_literally() -> None:
    (pattern,) = custom_scalars({"a": {"b": ["x/y.z+"]}})["a"]["b"][1]
    assert re.match(pattern, "x/y.z+")
    assert not re.match(pattern, "x/yaz+")
    assert not re.match(pattern, "x/y.zz")
    assert not re.match(pattern, "x/y.z+/more")


@pytest.mark.parametrize("tags", ["val/loss", []])
def test_a_chart_without_a_list_is_refused(tmp_path: Path, tags: Any) -> None:
    with pytest.raises(ValueError, match=r"Training\.loss.*list of metrics"):
        BoardLogger(str(tmp_path), {"Training": {"loss": tags}})


def test_hyperparameters_stand_beside_the_validation_loss(tmp_path: Path) -> None:
    a_run(tmp_path)
    (session,) = Board(tmp_path / "tensorboard").sessions()
    assert session.hparams["model/dim"].number_value == 16
    assert session.hparams["model/local_chunks"].string_value == "[4, 8]"
    assert session.hparams["vocab_size"].number_value == 257
    (value,) = session.metric_values
    assert value.name.tag == "val/loss"
    assert (value.value, value.training_step) == (2.5, 1)
    assert session.sessions[0].status == api_pb2.STATUS_SUCCESS


def test_no_placeholder_value_is_written(tmp_path: Path) -> None:
    logger = BoardLogger(str(tmp_path), LAYOUT)
    logger.log_hyperparams(PARAMS)
    logger.log_hyperparams(PARAMS)  # as Lightning does before fit and again before validate
    logger.finalize("failed")
    events = EventAccumulator(logger.log_dir).Reload()
    assert events.Tags()["scalars"] == []
    assert events.Tags()["tensors"] == ["custom_scalars__config__"]
    assert len(events.Tensors("custom_scalars__config__")) == 1
    (session,) = Board(tmp_path / "tensorboard").sessions()
    assert list(session.metric_values) == []
    assert session.sessions[0].status == api_pb2.STATUS_UNKNOWN


@pytest.mark.parametrize("writers", [0, 9, 99])
def test_what_is_written_after_the_end_keeps_one_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writers: int
) -> None:
    """train.py validates once more after fit, and Lightning closes the logger in between. A sweep in one process may
    have had `writers` before, and their number is part of a file's name."""
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(writers))
    logger = BoardLogger(str(tmp_path), LAYOUT)
    logger.log_hyperparams(PARAMS)
    logger.finalize("success")
    logger.log_hyperparams(PARAMS)
    logger.log_metrics({"val/loss": 2.0}, 5)
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir).Reload()
    assert len(events.Tensors("custom_scalars__config__")) == 1
    assert [event.value for event in events.Scalars("val/loss")] == [2.0]


def test_a_failed_run_that_is_resumed_in_its_folder(tmp_path: Path) -> None:
    a_run(tmp_path, "failed", (3.0, 2.5))
    a_run(tmp_path, "success", (2.0,), first=2)
    board = Board(tmp_path / "tensorboard")
    assert board.layout() == {
        category: {chart: entry[1] for chart, entry in charts.items()}
        for category, charts in custom_scalars(LAYOUT).items()
    }, "each chart once"
    losses = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("val/loss")
    assert [(event.step, event.value) for event in losses] == [(0, 3.0), (1, 2.5), (2, 2.0)]
    (session,) = board.sessions()
    assert (session.metric_values[0].value, session.sessions[0].status) == (2.0, api_pb2.STATUS_SUCCESS)


def test_runs_of_a_sweep_are_rows_of_one_table(tmp_path: Path) -> None:
    for name, loss in (("a", 3.0), ("b", 2.0)):
        a_run(tmp_path / name, losses=(loss,))
    board = Board(tmp_path)
    assert sorted(session.metric_values[0].value for session in board.sessions()) == [2.0, 3.0]
    assert list(board.layout()) == ["Safeguards", "Training"]


def test_ranks_other_than_zero_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    a_run(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_nested_hyperparameters() -> None:
    assert flatten({"a": {"b": {"c": 1.5}}, "d": None, "e": True, "f": "x"}) == {
        "a/b/c": 1.5,
        "d": "None",
        "e": "True",
        "f": "x",
    }


def test_the_configured_layout_has_all_safeguards_on_one_page(tmp_path: Path) -> None:
    config = OmegaConf.load(ROOT / "conf/logger/default.yaml").tensorboard
    logger = instantiate(config, save_dir=str(tmp_path))
    assert isinstance(logger, BoardLogger)
    logger.log_metrics({"niah_probe/accuracy": 0.9, "niah_probe/control": 0.0, "train/loss": 2.0}, 0)
    logger.finalize("success")
    board = Board(tmp_path / "tensorboard")
    layout = board.layout()
    assert list(layout) == ["Safeguards", "Training"]
    assert set().union(*(board.drawn(tag) for tag in layout["Safeguards"]["needle"])) == {
        "niah_probe/accuracy",
        "niah_probe/control",
    }
    assert {"perplexity", "rollbacks", "gates", "chunk size", "clipping", "skipped steps"} <= set(layout["Safeguards"])


def shown(folder: Path) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in EventAccumulator(str(folder / "tensorboard")).Reload().Scalars("x")]


def log(folder: Path, steps: range, value: float, resume_from_step: int | None = None) -> BoardLogger:
    logger = BoardLogger(str(folder), LAYOUT)
    if resume_from_step is not None:
        logger.resume_from_step(resume_from_step)
    for step in steps:
        logger.log_metrics({"x": value}, step)
    logger.flush()
    return logger


def test_a_resumed_run_repeats_and_loses_no_step(tmp_path: Path) -> None:
    log(tmp_path, range(5), 1.0)  # and dies
    log(tmp_path, range(3, 8), 2.0, resume_from_step=3)  # and dies
    log(tmp_path, range(6, 7), 3.0, resume_from_step=6).finalize("success")
    assert shown(tmp_path) == [(step, value) for step, value in enumerate([1.0] * 3 + [2.0] * 3 + [3.0])]


def test_what_is_logged_after_the_end_hides_nothing(tmp_path: Path) -> None:
    for folder, resume_from_step in ((tmp_path / "new", None), (tmp_path / "resumed", 2)):
        if resume_from_step is not None:
            log(folder, range(2), 1.0).finalize("failed")
        logger = log(folder, range(resume_from_step or 0, 4), 1.0, resume_from_step)
        logger.finalize("success")
        logger.log_metrics({"x": 9.0}, 4)  # a validation after the last step
        logger.finalize("success")
        assert shown(folder) == [(0, 1.0), (1, 1.0), (2, 1.0), (3, 1.0), (4, 9.0)]


@pytest.mark.parametrize("offsets", [(0, -86400), (0, -86400, -43200), (0, 0, 0)], ids=str)
def test_a_clock_that_was_set_back_loses_no_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offsets: tuple[int, ...]
) -> None:
    """Each process after the first is resumed three steps back, as one that was killed is."""
    for i, offset in enumerate(offsets):
        set_clock(monkeypatch, offset)
        logger = BoardLogger(str(tmp_path), LAYOUT)
        if i:
            logger.resume_from_step(10 * i - 3)
        for step in range(10 * i - 3 if i else 0, 10 * (i + 1)):
            logger.log_metrics({"val/loss": float(i)}, step)
        logger.finalize("failed")
    board = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    points = [(event.step, event.value) for event in board.Scalars("val/loss")]
    assert [step for step, _ in points] == [*range(10 * len(offsets))]
    assert points[7] == (7, 1.0), "what came again replaces what was there"
