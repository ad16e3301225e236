"""HangWatch: a rank that stops answering ends the run on the others, with its name; nothing else does.

As a script this is one of two ranks, as two_ranks.py kills the partner of a rank that has died: `python -m
tests.unit.callbacks.test_hang_watch <scenario> <folder>`.
"""

import json
import os
import random
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from torch.utils.data import DataLoader

from callbacks.hang_watch import HangWatch, RankSilent
from callbacks.support import collectives as ranks
from callbacks.support import connections
from callbacks.support.connections import birth_of
from callbacks.support.hang_judge import DONE, Judge, Sign
from callbacks.support.heartbeat import GRACE_S, Heartbeat
from tests.support import ROOT
from tests.support.forking import start
from tests.support.toys import STEPS, Line, Lines, loader
from tests.support.two_ranks import run_on_two_ranks, shared_folder

TIMEOUT_S = 6.0
SLACK_S = 20.0  # on a machine that is busy with other tests; alone it takes 3
FAULT_STEP = 3


# The judgement, on plain numbers


def sign(beat: int = 1, progress: int = 10, idle: float = 0.0, phase: str = "forward", **more: Any) -> Sign:
    return Sign(beat, progress, idle, 7, phase, "any_rank of callbacks.x", "node", 123, "", **more)


class Clock:
    """Gives a Judge of rank 0 one sign per rank and second; a rank in `stopped` gives the same as before."""

    def __init__(self) -> None:
        self.judge = Judge(0, 3, timeout_s=20, stalled_s=600)
        self.signs: list[Any] = [sign() for _ in range(3)]
        self.rounds = 0

    def run(self, seconds: int, *stopped: int, **changes: Any) -> Any:
        for _ in range(seconds):
            self.rounds += 1
            for rank, old in enumerate(self.signs):
                if rank not in stopped:
                    self.signs[rank] = old._replace(beat=old.beat + 1, **changes)
            self.judge.hear(list(self.signs), self.rounds, 1.0)
        return self.judge.verdict()


def test_a_silent_rank_is_named_with_all_that_is_known_of_it() -> None:
    clock = Clock()
    clock.signs[1] = clock.signs[1]._replace(phase="backward, gradients all-reduced", pid=456, host="node7")
    assert clock.run(100) is None
    assert clock.run(19, 1) is None
    verdict = clock.run(1, 1)
    assert verdict.silent == [1]
    assert verdict.message.startswith(
        "rank 1 (host node7, pid 456) has been silent for 20 s, its last sign came from step 7, backward, gradients "
        "all-reduced (last vote: any_rank of callbacks.x). rank 0 (host node, pid 123) waits at step 7, forward (last "
        "vote: any_rank of callbacks.x). Remedy: its process was stopped or killed"
    )
    assert clock.run(1) is None, "it has come back"


def test_before_the_first_step_a_rank_reports_that_it_sets_up() -> None:
    store = torch.distributed.HashStore()
    heart = Heartbeat(Judge(0, 1, 20, 600), store, None)
    assert heart.at == (0, 0, "set-up")
    heart.note(1, "forward")
    heart.stop(DONE)
    last = Sign(*json.loads(store.get("0")))
    assert (last.step, last.phase, last.ended) == (1, "forward", DONE)


def test_a_rank_that_was_never_heard_is_not_judged() -> None:
    """One that imports slowly, or compiles, before its first sign: Lightning waits for it by itself."""
    clock = Clock()
    clock.signs[2] = None
    clock.judge.hear(clock.signs, 1, 100.0)
    assert clock.judge.verdict() is None


def test_the_stores_keeper_is_to_blame_for_its_silence() -> None:
    judge = Judge(2, 3, 20, 600)
    for beat in range(21):
        assert judge.verdict() is None
        judge.hear([sign(), sign(), sign(beat)], 1, 1.0)
    verdict = judge.verdict()
    assert verdict is not None
    assert (verdict.silent, verdict.store) == ([0], True)


@pytest.mark.parametrize("host", [0, None])
def test_who_was_silent_before_the_store_is_to_blame(host: int | None) -> None:
    judge = Judge(2, 3, 20, 600, host)
    for beat in range(10):
        judge.hear([sign(beat), sign(), sign(beat)], beat, 1.0)
    for beat in range(10, 30):
        judge.hear([sign(9), sign(), sign(beat)], 9, 1.0)
    verdict = judge.verdict()
    assert verdict is not None
    assert (verdict.silent, verdict.store) == ([1], True)


def test_a_store_of_torchruns_agent_is_nobodys() -> None:
    judge = Judge(1, 2, 20, 600, host=None)
    for beat in range(22):
        judge.hear([sign(), sign(beat)], 0, 1.0)
    verdict = judge.verdict()
    assert verdict is not None
    assert verdict.message.startswith("the store of the process group does not answer. rank 1 ")
    assert verdict.silent == []


def test_a_rank_that_is_done_is_missed_by_nobody() -> None:
    clock = Clock()
    clock.signs[1] = clock.signs[1]._replace(ended="done")
    assert clock.run(100, 1) is None
    clock.signs[1] = clock.signs[1]._replace(idle=700.0)
    assert clock.run(1, 1, idle=700.0) is None, "the other has work left, such as a last save"
    judge = Judge(1, 2, 20, 600)
    for beat in range(50):
        judge.hear([sign(ended="done"), sign(beat)], 0, 1.0)
    assert judge.verdict() is None, "it took the store with it"


def test_a_rank_that_left_with_an_error_is_named_with_it() -> None:
    clock = Clock()
    clock.signs[1] = clock.signs[1]._replace(ended="ValueError: a bad batch")
    assert clock.run(5, 1) is None, "the others may raise by themselves"
    for verdict in (clock.judge.verdict(lost_connection=True), clock.run(16, 1)):
        assert verdict.message.startswith("rank 1 (host node, pid 123) has left the run at step 7, forward (last vote")
        assert "ValueError: a bad batch" in verdict.message
        assert verdict.silent == []


def test_a_stall_names_who_lags() -> None:
    clock = Clock()
    assert clock.run(1, idle=599.0) is None
    clock.signs[1] = clock.signs[1]._replace(progress=8, phase="validation, batch 3")
    verdict = clock.run(1, idle=600.0)
    assert "no rank has got any further for 600 s: rank 1 (host node, pid 123) lags, at step 7, v" in verdict.message
    clock.signs[2] = clock.signs[2]._replace(idle=3.0)
    clock.judge.hear(clock.signs, 9999, 1.0)
    assert clock.judge.verdict() is None, "one still works, the others wait for it"
    clock = Clock()
    assert "600 s: all are at one place" in clock.run(1, idle=600.0).message


@pytest.mark.parametrize(("settings", "said"), [({"timeout_s": 4}, "timeout_s=4"), ({"stalled_s": 20}, "stalled_s=20")])
def test_settings_out_of_range_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=rf"{said} of hang_watch must be"):
        HangWatch(**settings)


def test_a_process_is_reported_from_another_of_its_number() -> None:
    assert birth_of(os.getpid()) == birth_of(os.getpid()) != birth_of(os.getppid())
    assert birth_of(2**22 + 1) == ""


# One rank


def test_with_one_rank_nothing_runs_and_training_is_bitwise_the_same(fit: Any, line: Any, same_training: Any) -> None:
    threads: list[int] = []

    class Count(lightning.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            threads.append(threading.active_count())

    before = threading.active_count()
    same_training(fit(line(), HangWatch(), Count()), fit(line()))
    assert set(threads) == {before}


# Two ranks that are well


class Slow(Line):
    """Rank 1 takes longer over one step than a silence may last: its thread continues."""

    def training_step(self, batch: Any, index: int) -> Any:
        if self.global_step == FAULT_STEP and os.environ["RANK"] == "1":
            time.sleep(8)
        return super().training_step(batch, index)


def healthy(watch: bool) -> Any:
    """Trains with a validation and a checkpoint."""
    found: dict[str, Any] = {}

    def alive() -> list[str]:
        return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("hang_watch"))

    class Evaluate(lightning.Callback):
        def on_train_end(self, *_: Any) -> None:
            found["threads"] = alive()

    random.seed(1)
    trainer = train(Slow(), *([HangWatch(timeout_s=5)] if watch else []), Evaluate(), limit_val_batches=2)
    trainer.save_checkpoint(shared_folder() / "some.ckpt")
    found["left"] = alive()
    found["weights"] = [p.tolist() for p in trainer.lightning_module.parameters()]
    found["moments"] = [v.tolist() for s in trainer.optimizers[0].state.values() for v in s.values()]
    found["random"] = (torch.get_rng_state().tolist(), random.random())
    return found


def with_it() -> Any:
    return healthy(watch=True)


def without_it() -> Any:
    return healthy(watch=False)


@pytest.mark.slow
def test_two_healthy_ranks_train_as_without_it_and_no_thread_is_left() -> None:
    ours, theirs = run_on_two_ranks(with_it, without_it)
    for rank in range(2):
        assert ours[rank].pop("threads") == ["hang_watch _listen", "hang_watch _speak"]
        assert theirs[rank].pop("threads") == []
        assert ours[rank]["left"] == []
        assert ours[rank] == theirs[rank]


# Two ranks of which one has a fault


def train(module: Line, *callbacks: Any, **changes: Any) -> lightning.Trainer:
    trainer = lightning.Trainer(
        callbacks=list(callbacks), accelerator="cpu", devices=2, strategy="ddp", max_steps=STEPS,
        enable_model_summary=False, enable_checkpointing=False, enable_progress_bar=False,
        num_sanity_val_steps=0, log_every_n_steps=1, **{"limit_val_batches": 0, "logger": False, **changes},
    )  # fmt: skip
    trainer.fit(module, loader(), DataLoader(torch.ones(8, 4)))  # type: ignore[arg-type]
    return trainer


class Faulty(Line):
    """At FAULT_STEP the victim does what the scenario says, in forward."""

    def __init__(self, scenario: str) -> None:
        super().__init__()
        self.scenario, self.victim = scenario[:-1], int(scenario[-1])
        self.mine = os.environ["RANK"] == str(self.victim)

    def training_step(self, batch: Any, index: int) -> Any:
        if self.global_step == FAULT_STEP:
            self.wait_until_heard()
            if self.mine:
                self.fault()
            elif self.scenario == "deaf":
                time.sleep(600)  # nothing that could raise
        return super().training_step(batch, index)

    def wait_until_heard(self) -> None:
        """Until the other has the victim's sign of this step: it comes within two seconds, and later on a busy machine.

        In seconds of sleep this was a matter of luck: a sign a second, and a look at it a second later.
        """
        heard = Path(sys.argv[2]) / "heard"
        (watch,) = (c._watch for c in self.trainer.callbacks if isinstance(c, HangWatch))  # type: ignore[attr-defined]
        until = time.monotonic() + 60
        while time.monotonic() < until and not heard.exists():
            signs = [] if self.mine else [watch._signs[self.victim]]
            if any(sign is not None and (sign.step, sign.phase) == (FAULT_STEP, "forward") for sign in signs):
                heard.touch()
            time.sleep(0.02)
        assert heard.exists(), "no sign of this step has come"

    def fault(self) -> None:
        (Path(sys.argv[2]) / "fault").write_text(str(time.time()))
        if self.scenario in ("stop", "deaf"):
            os.kill(os.getpid(), signal.SIGSTOP)
        elif self.scenario == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.scenario == "error":
            raise ValueError("a batch that only this rank has")
        elif self.scenario == "stall":
            time.sleep(600)


class After(lightning.Callback):
    """Listed after: the way for exceptions must reach it."""

    def __init__(self) -> None:
        self.saw = ""

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.saw = type(exception).__name__


class Ending(Lines):
    status = ""

    def finalize(self, status: str) -> None:
        self.status = status


def one_rank(scenario: str, folder: Path) -> None:
    stalled = 8.0 if scenario.startswith("stall") else 600.0
    after, logger = After(), Ending()
    outcome: dict[str, Any] = {}
    timeout = float(os.environ.get("TIMEOUT_S", TIMEOUT_S))
    try:
        train(Faulty(scenario), HangWatch(timeout, stalled), after, logger=logger)
    except BaseException as error:
        outcome = {"type": type(error).__name__, "message": str(error), "cause": type(error.__cause__).__name__}
        raise
    finally:
        outcome |= {"saw": after.saw, "logger": logger.status, "ended": time.time()}
        (folder / f"outcome{os.environ['RANK']}").write_text(json.dumps(outcome))


SCENARIOS = ("stop1", "stop0", "kill1", "error1", "stall1")


def launch(scenario: str, folder: Path, **env: str) -> dict[str, Any]:
    """What became of both ranks; one that is stopped is killed once the other has ended."""
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        **os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        "TORCHELASTIC_RUN_ID": "tests", **env,
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    processes = []
    for rank in range(2):
        own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        module = "tests.unit.callbacks.test_hang_watch"
        processes.append(start(module, scenario, str(folder), env=own, stderr=folder / f"stderr{rank}"))
    victim, other = (int(scenario[-1]), 1 - int(scenario[-1]))
    ended: list[float] = [0.0, 0.0]
    codes: list[int | None] = [None, None]
    try:
        until = time.monotonic() + 90
        while time.monotonic() < until and not all(ended):
            for rank in range(2):
                if not ended[rank] and processes[rank].poll() is not None:
                    ended[rank], codes[rank] = time.time(), processes[rank].returncode
            if ended[other] and time.time() > ended[other] + 20:
                break
            time.sleep(0.1)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
    fault = folder / "fault"
    at = float(fault.read_text()) if fault.exists() else 0.0
    result: dict[str, Any] = {"codes": codes, "victim": victim, "other": other, "seconds": [end - at for end in ended]}
    for rank in range(2):
        result[f"stderr{rank}"] = (folder / f"stderr{rank}").read_text(errors="replace")
        outcome = folder / f"outcome{rank}"
        result[f"outcome{rank}"] = (
            json.loads(outcome.read_text()) if outcome.exists() and outcome.stat().st_size else None
        )
    return result


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("hang_watch")
    with ThreadPoolExecutor(3) as pool:  # they mostly wait
        found = pool.map(lambda name: launch(name, folder / name), SCENARIOS)
        return dict(zip(SCENARIOS, found, strict=True))


def survivors(run: dict[str, Any]) -> tuple[dict[str, Any], str, float]:
    other = run["other"]
    assert run["codes"][other] not in (None, 0), f"{run['codes']}\n{run[f'stderr{other}'][-3000:]}"
    return run[f"outcome{other}"], run[f"stderr{other}"], run["seconds"][other]


@pytest.mark.long
@pytest.mark.parametrize("scenario", ["stop1", "stop0"])
def test_a_stopped_rank_ends_the_run(results: dict[str, Any], scenario: str) -> None:
    run = results[scenario]
    outcome, stderr, seconds = survivors(run)
    victim, other = run["victim"], run["other"]
    assert TIMEOUT_S < seconds < TIMEOUT_S + SLACK_S
    assert outcome["type"] == "RankSilent", stderr[-3000:]
    assert outcome["message"].startswith(f"rank {victim} (host {socket.gethostname()}, pid ")
    assert f"its last sign came from step {FAULT_STEP}, forward (last vote: " in outcome["message"]
    assert f"rank {other} (host" in outcome["message"]
    assert f"waits at step {FAULT_STEP}, backward, gradients all-reduced" in outcome["message"]
    assert outcome["cause"] == "RuntimeError", "what gloo raised"
    assert f"hang_watch: {outcome['message']}" in stderr
    assert run["codes"][victim] == -signal.SIGKILL, "it would keep its memory for ever"


@pytest.mark.long
def test_the_way_for_exceptions_is_gone_in_full(results: dict[str, Any]) -> None:
    outcome, _, _ = survivors(results["stop1"])
    assert outcome["saw"] == "RuntimeError"
    assert outcome["logger"] == "failed"


@pytest.mark.long
def test_a_killed_rank_is_named_though_gloo_notices_first(results: dict[str, Any]) -> None:
    outcome, _, seconds = survivors(results["kill1"])
    assert outcome["type"] == "RankSilent"
    assert outcome["message"].startswith("rank 1 (host ")
    assert f"its last sign came from step {FAULT_STEP}" in outcome["message"]
    assert seconds < TIMEOUT_S + SLACK_S


@pytest.mark.long
def test_a_rank_that_fails_alone_is_named_with_its_error(results: dict[str, Any]) -> None:
    run = results["error1"]
    outcome, _, _ = survivors(run)
    assert outcome["type"] == "RankSilent"
    assert "has left the run at step 3, forward" in outcome["message"]
    assert "ValueError: a batch that only this rank has" in outcome["message"]
    assert run["outcome1"]["type"] == "ValueError", "its own error stays what it was"


@pytest.mark.long
def test_a_stall_ends_both(results: dict[str, Any]) -> None:
    run = results["stall1"]
    outcome, stderr, seconds = survivors(run)
    assert outcome["type"] == "RankSilent", stderr[-3000:]
    assert "no rank has got any further for 8 s: rank 1 (host" in outcome["message"]
    assert f"lags, at step {FAULT_STEP}, forward" in outcome["message"]
    assert 8 < seconds < 8 + GRACE_S + SLACK_S
    assert run["codes"][1] == 1, "it sleeps and cannot raise"
    assert "in fault" in run["stderr1"], "where its training thread is"


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["stop1", "stop0", "deaf1"])
def test_with_the_default_it_takes_less_than_30_seconds(tmp_path: Path, scenario: str) -> None:
    run = launch(scenario, tmp_path / scenario, TIMEOUT_S=str(HangWatch().timeout_s))
    _, stderr, seconds = survivors(run)
    assert 20 < seconds < 30
    assert ("this rank cannot raise, it ends here" in stderr) == (scenario == "deaf1")


def test_votes_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What callbacks/support/collectives.py enters is what the message shows."""

    class Two:
        world_size = 2
        strategy = type("S", (), {"reduce_boolean_decision": lambda self, flag, all: flag})()

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    before = ranks.entered[0]
    assert ranks.any_rank(Two(), True)  # type: ignore[arg-type]
    assert ranks.entered == (before + 1, f"any_rank of {__name__}")
    assert issubclass(RankSilent, RuntimeError)


# What happens on NCCL alone; it needs two GPUs, so here is in which order and on which condition


@pytest.mark.parametrize(("backend", "done"), [("nccl", ["abort"]), ("gloo", ["cut 7"]), (None, ["cut 7"])])
def test_nccl_is_aborted_and_gloo_is_cut(monkeypatch: pytest.MonkeyPatch, backend: str | None, done: list[str]) -> None:
    """A cut connection of NCCL's ends the process by its own watchdog, before the verdict is reported."""
    did: list[str] = []
    monkeypatch.setattr(connections.dist, "is_initialized", lambda: backend is not None)
    monkeypatch.setattr(connections.dist, "get_backend", lambda: backend)
    monkeypatch.setattr(connections.dist.distributed_c10d, "_abort_process_group", lambda: did.append("abort"))
    monkeypatch.setattr(connections, "cut_connections", lambda port: did.append(f"cut {port}"))
    connections.end_collectives(7)
    assert did == done


def test_nccl_leaves_the_end_to_the_watch(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for name in connections.NCCL_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    HangWatch()
    assert {name: os.environ[name] for name in connections.NCCL_SETTINGS} == connections.NCCL_SETTINGS
    assert not caplog.records
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    HangWatch()
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "1", "the user has decided"
    assert "TORCH_NCCL_ASYNC_ERROR_HANDLING=1" in caplog.text


@pytest.mark.parametrize("vote", ["any_rank", "max_over_ranks", "mean_over_ranks", "gathered"])
def test_a_vote_without_a_process_group_is_an_error_and_no_vote_of_one(vote: str) -> None:
    """Lightning's reduce would give back what it gets: every rank would go on by itself."""
    trainer: Any = SimpleNamespace(world_size=2, strategy=SimpleNamespace(root_device="cpu", reduce=lambda x, **_: x))
    with pytest.raises(ranks.ProcessGroupGone, match=vote) as error:
        getattr(ranks, vote)(trainer, torch.ones(1))
    assert connections.is_of_connection(error.value), "hang_watch waits for the verdict, and names the rank"


if __name__ == "__main__":
    one_rank(sys.argv[1], Path(sys.argv[2]))
