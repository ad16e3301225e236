"""worth: every model gets the same sweep, and as much time as the first one took; what has finished is not repeated."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import figures, worth

SPEED = {"memory": 1000.0, "no memory": 2500.0, "full attention": 800.0}
BEST = {"memory": 1.0, "no memory": 4.0, "full attention": 0.5}
SWEPT = {"memory": [1, 2, 0.5], "no memory": [1, 2, 4, 8], "full attention": [1, 2, 0.5, 0.25]}


@pytest.fixture
def s(tmp_path: Path) -> worth.Setting:
    return worth.setting("stage1", ["optim.total_steps=400"], False, tmp_path)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The runs that are asked for; a model's loss is lowest at its best rate, and falls with steps."""
    made: list[tuple[Any, ...]] = []

    def train(
        s: Any, name: str, steps: int, rate: float, seed: int, what: str, may_fail: bool = False
    ) -> dict[str, Any]:
        made.append((what, name, steps, rate, seed))
        loss = 1 + abs(math.log2(rate / BEST[name])) + 10 / steps + seed / 100
        return {"status": "finished", "val_loss": loss, "val_bits_per_byte": loss, "tokens": steps * s.tokens,
                "steps": steps, "tokens_per_second": 1.0, "parameters": 7}  # fmt: skip

    monkeypatch.setattr(worth, "train", train)
    monkeypatch.setattr(worth, "speeds", lambda s, names: {name: SPEED[name] for name in names})
    return made


def test_the_settings_are_the_experiments(s: worth.Setting) -> None:
    assert (s.steps, s.window, s.length, s.tokens) == (400, 64, 2048, 2048)
    assert s.rates == {"lr": 3e-3, "muon_lr": 0.02, "memory_lr": 1e-4}
    assert worth.setting("stage1", [], True, s.out).steps == 100


def test_a_rate_is_tried_for_the_whole_of_the_equal_time(s: worth.Setting, runs: list[tuple[Any, ...]]) -> None:
    """In shorter runs a higher rate wins, which is too high for the whole: decision 52."""
    worth.measure(s, list(SPEED), seeds=1)
    steps = {"memory": 400, "no memory": 1000, "full attention": 320}
    swept = [("run", name, steps[name], rate, 0) for name, rates in SWEPT.items() for rate in rates]
    assert runs[: len(swept)] == swept
    assert {run[0] for run in runs} == {"run"}, "the best of them is the first seed's run at equal time"


def test_each_model_gets_its_rate_and_the_time_of_the_first(s: worth.Setting, runs: list[tuple[Any, ...]]) -> None:
    found = worth.measure(s._replace(sweep=0.25), list(SPEED), seeds=2)
    assert {name: run["rate"] for name, run in found.items()} == BEST
    sweeps = [run[:4] for run in runs if run[0] == "sweep"]
    assert sweeps == [("sweep", name, 100, rate) for name, rates in SWEPT.items() for rate in rates]
    assert sorted(run[1:3] + run[4:] for run in runs if run[0] == "run") == sorted([
        (name, steps, seed)
        for seed in (0, 1)
        for name, steps in (("memory", 400), ("no memory", 400), ("no memory", 1000), ("full attention", 400),
                            ("full attention", 320))
    ]), "2.5 and 0.8 times the steps"  # fmt: skip
    for run in found.values():
        assert [report["tokens"] / run["tokens_per_second"] for report in run["time"]] == pytest.approx([819.2] * 2)
    text = worth.table(worth.summary(found))
    assert text.splitlines()[0].index("equal time") < text.splitlines()[0].index("equal steps")
    assert "| full attention | **" in text


def test_a_sweep_ends_where_the_loss_rises_again() -> None:
    assert worth.next_rate({1.0: 2.0, 2.0: 1.0}) == 4.0
    assert worth.next_rate({1.0: 1.0, 2.0: 2.0}) == 0.5
    assert worth.next_rate({0.5: 3.0, 1.0: 1.0, 2.0: 2.0}) is None
    assert worth.next_rate({8.0: 2.0, 16.0: 1.0}) is None, "the highest"
    assert worth.next_rate({1.0: math.inf, 2.0: math.inf}) == 0.5, "both unstable: lower"


def test_a_model_that_diverges_at_a_rate_does_not_get_it(s: worth.Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*arguments: Any, may_fail: bool = False) -> dict[str, Any]:
        loss = {1.0: 6.0, 2.0: 5.0, 4.0: None}[arguments[3]]
        status = "failed" if loss is None else "finished"
        return {"status": status, "val_loss": loss, "val_bits_per_byte": loss, "tokens": 1, "tokens_per_second": 1.0,
                "steps": 1}  # fmt: skip

    monkeypatch.setattr(worth, "train", train)
    monkeypatch.setattr(worth, "speeds", lambda *_: {"memory": 1.0})
    found = worth.measure(s, ["memory"], 0)["memory"]
    assert found["rate"] == 2.0
    assert found["sweep"] == {"2.0": 5.0, "1.0": 6.0, "4.0": None}


def test_what_needs_no_more_training(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    assert not worth.settled(report, True)
    for status, error, sweep, run in (
        ("finished", None, True, True),
        ("failed", "TrainingUnstable: 5 rollbacks", True, False),
        ("failed", "SaveError: no space left", False, False),
        ("interrupted", "KeyboardInterrupt:", False, False),
    ):
        report.write_text(json.dumps({"status": status, "error": error}))
        assert (worth.settled(report, True), worth.settled(report, False)) == (sweep, run), (status, error)


def test_speeds_are_measured_once_for_the_same_models(s: worth.Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def in_process(_: str, request: dict[str, Any]) -> dict[str, float]:
        asked.append(request["names"])
        return {name: 5.0 for name in request["names"]}

    monkeypatch.setattr(worth.measuring, "in_process", in_process)
    for names in (["memory"], ["memory"], ["memory", "no memory"], ["memory"]):
        assert worth.speeds(s, names) == {name: 5.0 for name in names}
    worth.speeds(s._replace(extra=["model.rank=63"]), ["memory"])
    assert asked == [["memory"], ["memory", "no memory"], ["memory"]]


@pytest.mark.parametrize("name", ["memory", "gated delta net", "full attention"])
def test_a_step_trains(name: str, tmp_path: Path) -> None:
    small = ["model.dim=16", "model.head_dim=8", "model.rank=7", "data.seq_len=64",
             "model.window=8", "model.global_chunk=16", "model.shard=32", "model.local_chunks=[4]"]  # fmt: skip
    step = worth.step_of(worth.setting("stage1", small, True, tmp_path), name)
    model = step.__closure__  # the model is the step's own
    assert model is not None
    weights = next(cell.cell_contents for cell in model if hasattr(cell.cell_contents, "embed")).embed.weight
    before = weights.detach().clone()
    step()
    assert not before.equal(weights)


def test_intervals_over_seeds() -> None:
    assert worth.interval([1.0]) == (1.0, math.inf)
    mean, half = worth.interval([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(4.303 / math.sqrt(3)))


def test_what_is_published_is_what_the_readme_takes(
    s: worth.Setting, runs: list[tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worth, "draw", lambda found, path: path.write_text("picture"))
    (tmp_path / worth.PAGE).parent.mkdir(parents=True)
    (tmp_path / worth.PAGE).write_text(f"before\n{worth.BEGIN}\nold\n{figures.END}\nafter\n")
    found = worth.measure(s, list(SPEED), seeds=2)
    worth.publish(found, s, "--seeds 2", tmp_path)
    rows = worth.summary(found)
    assert f"\n\n{worth.table(rows)}\n{figures.END}" in (tmp_path / worth.PAGE).read_text()
    first = figures.equal_time(json.loads((tmp_path / figures.WORTH).read_text()))
    assert first.values == [row.equal_time[0] for row in rows]
    assert first.shown.startswith(f"memory **{rows[0].equal_time[0]:.3f}** ± ")
    assert first.command == "python -m benchmarks.worth --seeds 2 --set optim.total_steps=400"


def test_rows_are_added_beside_those_published(
    s: worth.Setting, runs: list[tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worth, "draw", lambda found, path: path.write_text(" ".join(found)))
    (tmp_path / worth.PAGE).parent.mkdir(parents=True)
    (tmp_path / worth.PAGE).write_text(f"{worth.BEGIN}\nold\n{figures.END}\n")
    before = worth.measure(s, ["memory", "full attention"], seeds=1)
    worth.publish(before, s, "--seeds 1", tmp_path)
    runs.clear()
    added = worth.measure(s, ["memory", "no memory"], seeds=1, add=True)
    assert {name for _, name, *_ in runs} == {"no memory"}, "the first one only sets the time"
    assert added["no memory"]["time"][0]["steps"] == 1000
    worth.publish(added, s, "--seeds 1 --add", tmp_path, add=True)
    published = json.loads((tmp_path / worth.NUMBERS).read_text())
    assert [row["model"] for row in published["models"]] == ["memory", "no memory", "full attention"]
    assert published["models"][0]["equal_time"] == [worth.summary(before)[0].equal_time[0], None]
    assert (tmp_path / worth.PICTURE).read_text() == "memory full attention", "it has the curves of those alone"
    assert published["command"].count("python -m benchmarks.worth") == 2


def test_fewer_seeds_may_train_at_equal_steps(s: worth.Setting, runs: list[tuple[Any, ...]]) -> None:
    found = worth.measure(s, ["memory", "no memory"], seeds=3, steps_seeds=1)
    assert [len(found["no memory"][kind]) for kind in ("time", "steps")] == [3, 1]
    assert {seed for _, name, steps, _, seed in runs if (name, steps) == ("no memory", 400)} == {0}
    assert worth.summary(found)[1].equal_steps[1] is None, "one seed has no interval"


@pytest.mark.slow
def test_it_runs_and_continues(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worth, "RATES", (1.0,))
    monkeypatch.setattr(worth, "next_rate", lambda found: None)
    (tmp_path / "a.txt").write_text("".join(f"line {i} of a small text\n" for i in range(3000)))
    small = [
        "data=text", f"data.source.files={tmp_path / 'a.txt'}", "data.source.document_bytes=500", "data.seq_len=64",
        "data.val_sequences=4", "model.dim=16", "model.head_dim=8", "model.rank=7",
        "model.window=8", "model.global_chunk=16", "model.shard=32", "model.local_chunks=[4]", "optim.total_steps=400",
    ]  # fmt: skip
    arguments = [
        "--quick",
        "--jobs",
        "2",
        "--models",
        "memory",
        "no memory",
        "--out",
        str(tmp_path / "worth"),
        "--set",
        *small,
    ]
    worth.main(arguments)
    first = capsys.readouterr()
    assert first.err.count("seed_0") == 3, "2 at equal time, which are the sweep's, and 1 more at equal steps"
    found = json.loads((tmp_path / "worth" / "worth.json").read_text())
    assert found["no memory"]["time"][0]["steps"] > found["memory"]["time"][0]["steps"] == 40
    assert (tmp_path / "worth" / "worth.png").is_file()
    worth.main(arguments)
    second = capsys.readouterr()
    assert "seed_0" not in second.err, "nothing is trained again"
    assert second.out == first.out


@pytest.mark.parametrize(("tokenizer", "ids"), [("bytes", 257), ("python", 2048)])
def test_speeds_are_those_of_the_experiments_vocabulary(
    s: worth.Setting, monkeypatch: pytest.MonkeyPatch, tokenizer: str, ids: int
) -> None:
    built = []

    def model(config: Any, vocabulary: int) -> Any:
        built.append(vocabulary)
        raise KeyboardInterrupt

    monkeypatch.setattr(worth, "AtlasLM", model)
    with pytest.raises(KeyboardInterrupt):
        worth.step_of(s._replace(extra=[f"data.source.tokenizer={tokenizer}"]), "no memory")
    assert built == [ids]


def test_a_run_of_other_settings_behind_the_same_command_is_made_again(
    s: worth.Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of conf/ may have changed since: the command alone does not say so."""
    made = []

    def run(command: list[str], **_: Any) -> Any:
        made.append("resume=auto" in command)
        folder = s.out / "runs" / label / "latest"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(json.dumps({"status": "finished", "val_loss": 1.0}))
        return SimpleNamespace(returncode=0, stdout="", stderr="")

    label = "run_no_memory_x1_seed_0_steps_400"
    (s.out / "runs").mkdir(parents=True)
    monkeypatch.setattr(worth.subprocess, "run", run)
    for settings in ("a", "a", "b"):
        monkeypatch.setattr(worth, "meaning", lambda *_, settings=settings: settings)
        worth.train(s, "no memory", 400, 1, 0, "run")
    assert made == [False, False], "twice: not at the second call, which finds the first one's"


def test_settings_are_what_is_composed() -> None:
    same, wider = (worth.meaning("stage1", [f"model.dim={dim}"]) for dim in (256, 320))
    assert same == worth.meaning("stage1", [])
    assert same != wider
