"""MemoryHorizon: a memory that is used and one that is not, in toys and in the real model; training is undisturbed."""

import logging
import math
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from atlas_lm.model import probes
from atlas_lm.model.probes import losses_after_restarts
from atlas_lm.training.module import AtlasModule
from callbacks.memory_horizon import Gain, HasMemoryHorizon, MemoryHorizon, MemoryUnused, distances, estimate
from tests.support.model_cases import VOCABULARY, build_model, make_tokens
from tests.support.rollback_cases import Faulty, differences, plain
from tests.support.toys import Line, Lines, loader
from tests.support.two_ranks import run_on_two_ranks
from tests.unit.callbacks.test_niah_probe import fit as fit_real

NAMES = ("gain", "gain_low", "gain_high", "horizon", "step")


# The judgement, on plain numbers


@pytest.mark.parametrize(
    ("window", "reach", "context", "found"),
    [
        (64, 126, 960, [0, 64, 126, 252, 504]),
        (16, 30, 80, [0, 16, 30, 60]),
        (64, 63, 127, [0, 63, 126]),
        (512, 511, 512, [0, 511]),
        (4, 6, 7, [0, 4, 6]),
    ],
)
def test_where_the_memory_is_restarted(window: int, reach: int, context: int, found: list[int]) -> None:
    assert distances(window, reach, context) == found


@pytest.mark.parametrize(("reach", "context"), [(64, 64), (64, 10), (0, 10)])
def test_nothing_beyond_attention_is_an_error(reach: int, context: int) -> None:
    with pytest.raises(ValueError, match=f"{context} tokens .* {reach}"):
        distances(64, reach, context)


def losses(means: list[float], rows: int = 40, block: int = 16, noise: float = 0.1, seed: int = 0) -> Tensor:
    """Losses whose difference to those with the whole past has these means, and noise of its own per token."""
    generator = torch.Generator().manual_seed(seed)
    base = 2 + torch.randn(rows, block, generator=generator)
    return torch.stack([base + mean + noise * torch.randn(rows, block, generator=generator) for mean in [*means, 0.0]])


def test_a_gain_is_found_with_its_horizon() -> None:
    restarts = [0, 4, 8, 16, 32]
    gain = estimate(losses([0.9, 0.7, 0.4, 0.2, 0.0], noise=1e-4), restarts, reach=8)
    assert gain.mean == pytest.approx(0.4, abs=1e-3)
    assert gain.low < 0.4 < gain.high
    assert gain.horizon == pytest.approx(16 + 16 * (0.2 - 0.02) / 0.2, abs=0.1), "where 0.02 of 0.4 are missing"


def test_a_horizon_beyond_the_sequences_is_their_longest_restart() -> None:
    assert estimate(losses([0.9, 0.4, 0.3], noise=1e-4), [0, 8, 16], reach=8).horizon == 16


def test_no_gain_has_no_horizon_and_an_interval_around_zero() -> None:
    gain = estimate(losses([0.5, 0.0, 0.0], noise=0.3), [0, 8, 16], reach=8)
    assert gain.low < 0 < gain.high
    assert estimate(losses([0.5, -0.2, -0.1], noise=1e-4), [0, 8, 16], reach=8).horizon == 0
    assert estimate(torch.zeros(3, 4, 2), [0, 8], reach=8) == Gain(0, 0, 0, 0), "a memory that is switched off"


def test_tokens_that_are_not_scored_count_for_nothing() -> None:
    given = losses([0.5, 0.4], noise=1e-4)
    holes = given.clone()
    holes[:, :, ::2] = torch.nan
    holes[:, :3] = torch.nan
    assert estimate(holes, [0, 8], reach=8).mean == pytest.approx(estimate(given, [0, 8], reach=8).mean, abs=1e-3)
    assert all(math.isnan(value) for value in estimate(given * torch.nan, [0, 8], reach=8))


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    inside = 0
    for seed in range(100):
        gain = estimate(losses([0.3, 0.05], rows=30, noise=0.5, seed=seed), [0, 8], reach=8)
        inside += gain.low <= 0.05 <= gain.high
    assert 85 <= inside <= 100


@pytest.mark.parametrize(
    ("low", "step", "wrong"),
    [(0.01, 500, False), (-0.01, 99, False), (0.0, 100, True), (-0.01, 100, True), (math.nan, 0, True)],
)
def test_the_judgement(low: float, step: int, wrong: bool) -> None:
    found = MemoryHorizon(from_step=100).judge(Gain(0.02, low, 0.05, 30.0), step)
    assert (found is not None) == wrong
    assert not wrong or f"step {step}" in str(found)


@pytest.mark.parametrize(
    ("name", "value"), [("every_n_steps", 0), ("rows", 1), ("block", 0), ("from_step", -1), ("on_failure", "hope")]
)
def test_values_out_of_range(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name}={value} of memory_horizon"):
        MemoryHorizon(**{name: value})


# Any module


class Reader(Line):
    """Somebody else's module; `worth`: nats that its memory's past is worth."""

    def __init__(self, worth: float) -> None:
        super().__init__()
        self.worth = worth

    def attention_reach(self) -> tuple[int, int]:
        return 1, 1

    def losses_after_restarts(self, batch: Any, restarts: Any, block: int) -> Tensor:
        noise = torch.randn(len(restarts) + 1, len(batch), block, generator=torch.Generator().manual_seed(1))
        missing = torch.tensor([float(self.worth)] * len(restarts) + [0.0])
        return 1 + missing[:, None, None] + 0.01 * noise


def values_of(lines: Lines) -> dict[str, float]:
    found: dict[str, float] = {}
    for _, row in lines.rows:
        found |= {k.partition("/")[2]: v for k, v in row.items() if k.startswith("memory_horizon/")}
    return found


def test_a_memory_that_is_used_is_logged_and_lets_alone(fit: Any, caplog: pytest.LogCaptureFixture) -> None:
    lines = Lines()
    assert isinstance(Reader(0.5), HasMemoryHorizon)
    guard = MemoryHorizon(every_n_steps=4, from_step=0, on_failure="stop")
    with caplog.at_level(logging.WARNING, "callbacks.memory_horizon"):
        fit(Reader(0.5), guard, logger=lines, limit_val_batches=1)
    found = values_of(lines)
    assert set(found) == set(NAMES)
    assert found["gain"] == pytest.approx(0.5, abs=0.02)
    assert found["step"] == 8
    assert not [r for r in caplog.records if r.name == "callbacks.memory_horizon"]


def test_a_memory_that_is_not_used_is_reported_or_stops_the_run(fit: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "callbacks.memory_horizon"):
        fit(Reader(0.0), MemoryHorizon(every_n_steps=2, from_step=5), limit_val_batches=1)
    warned = [r for r in caplog.records if r.name == "callbacks.memory_horizon"]
    assert len(warned) == 2, "at steps 6 and 8"
    with pytest.raises(MemoryUnused, match="step 6"):
        fit(Reader(0.0), MemoryHorizon(every_n_steps=2, from_step=5, on_failure="stop"), limit_val_batches=1)


class Rare(Reader):
    """Its memory helps one row in eight, and much: of few rows the interval contains 0."""

    def losses_after_restarts(self, batch: Any, restarts: Any, block: int) -> Tensor:
        found = super().losses_after_restarts(batch, restarts, block)
        missing = torch.zeros(len(batch))
        missing[3::8] = self.worth
        found[:-1] += missing[:, None] - self.worth
        return found


def test_it_measures_again_before_it_warns(caplog: pytest.LogCaptureFixture, tmp_path: Any) -> None:
    """With few rows the interval of a small gain contains 0: one healthy run in three was reported."""
    settings: dict[str, Any] = {"every_n_steps": 4, "from_step": 0, "rows": 8}

    def warned(guard: MemoryHorizon, worth: float) -> tuple[int, dict[str, float]]:
        caplog.clear()
        lines = Lines()
        trainer = lightning.Trainer(
            max_steps=4, accelerator="cpu", logger=lines, callbacks=[guard], enable_model_summary=False,
            enable_progress_bar=False, enable_checkpointing=False, default_root_dir=tmp_path, log_every_n_steps=1,
        )  # fmt: skip
        with caplog.at_level(logging.WARNING, "callbacks.memory_horizon"):
            trainer.fit(Rare(worth), loader(), DataLoader(torch.zeros(64, 4), batch_size=8))
        return len([r for r in caplog.records if r.name == "callbacks.memory_horizon"]), values_of(lines)

    count, found = warned(MemoryHorizon(**settings, confirm_rows=0), 0.5)
    assert count == 1
    assert found["gain_low"] <= 0 < found["gain"]
    count, found = warned(MemoryHorizon(**settings, confirm_rows=64), 0.5)
    assert count == 0
    assert found["gain_low"] > 0
    assert found["gain"] == pytest.approx(0.5 / 8, abs=0.02)
    count, found = warned(MemoryHorizon(**settings, confirm_rows=64), 0.0)
    assert count == 1, "a memory that gives nothing is still found out"


def test_another_module_is_refused(fit: Any, line: Any) -> None:
    with pytest.raises(TypeError, match="Line"):
        fit(line(), MemoryHorizon(), limit_val_batches=1)


def test_sequences_within_attentions_reach_are_said_not_to_be_measured(
    fit: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class Far(Reader):
        def attention_reach(self) -> tuple[int, int]:
            return 2, 100

    lines = Lines()
    with caplog.at_level(logging.WARNING, "callbacks.memory_horizon"):
        fit(Far(0.5), MemoryHorizon(every_n_steps=2), logger=lines, limit_val_batches=1)
    assert values_of(lines) == {}
    assert len([r for r in caplog.records if "not measured" in r.message]) == 1


def judged_together(second: float) -> Any:
    """What both ranks raise where the first has a gain of 0.3 more, and the second of so many times 0.3."""
    from tests.unit.callbacks.test_two_ranks import train

    class Uneven(Reader):
        def losses_after_restarts(self, batch: Any, restarts: Any, block: int) -> Tensor:
            sign = 1.0 if self.trainer.global_rank == 0 else second
            found = super().losses_after_restarts(batch, restarts, block)
            found[:-1] += sign * 0.3
            return found

    probe = MemoryHorizon(every_n_steps=2, from_step=0, on_failure="stop")
    return train(Uneven(0.0), probe, limit_val_batches=1)["raised"]


def unused_on_both() -> Any:
    return judged_together(-1.2)  # only together they are below 0


def used_on_both() -> Any:
    return judged_together(1.0)


@pytest.mark.long
def test_two_ranks_judge_the_sequences_of_both() -> None:
    unused, used = run_on_two_ranks(unused_on_both, used_on_both)
    assert unused[0] == unused[1], unused
    assert unused[0][:2] == ("raised", "MemoryUnused")
    assert used == [None, None]


# The real model


def test_training_is_bitwise_undisturbed(tmp_path: Any) -> None:
    ours, theirs = Faulty((), 1.0), Faulty((), 1.0)
    probe = MemoryHorizon(every_n_steps=1, rows=2)
    a = fit_real(ours, probe, folder=tmp_path)
    b = fit_real(theirs, folder=tmp_path)
    assert differences(plain(ours.state_dict()), plain(theirs.state_dict())) == []
    assert differences(plain(a.optimizers[0].state_dict()), plain(b.optimizers[0].state_dict())) == []


def test_a_restart_hides_what_was_before_it_and_nothing_else() -> None:
    """As if those tokens had been others. Not so with short convolutions: these carry a trace over the restart."""
    model, tokens, block = build_model(context=1, conv=1), make_tokens(60), 6
    targets = make_tokens(60, seed=1)
    reach = 2 * 4
    hidden = tokens.clone()
    changed = 60 - block - 20 - reach  # no layer's attention leads from there past the restart
    hidden[:, :changed] = (hidden[:, :changed] + 1) % VOCABULARY
    ours, theirs = (losses_after_restarts(model, x, targets, [20, 40], block) for x in (tokens, hidden))
    assert torch.allclose(ours[0], theirs[0], rtol=0, atol=1e-12)
    assert not torch.allclose(ours[1], theirs[1], rtol=0, atol=1e-6), "a restart before them hides nothing"
    assert not torch.allclose(ours[2], theirs[2], rtol=0, atol=1e-6)


def test_rows_are_probed_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens, targets = build_model(), make_tokens(30, batch=5), make_tokens(30, batch=5, seed=1)
    whole = losses_after_restarts(model, tokens, targets, [10], 4)
    rows: list[int] = []
    model.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    monkeypatch.setattr(probes, "PROBED_TOKENS", 60)
    assert torch.allclose(losses_after_restarts(model, tokens, targets, [10], 4), whole, rtol=0, atol=1e-12)
    assert rows == [2, 2, 1] * 2


def test_without_writes_the_gain_is_zero_and_fails(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from atlas_lm.memory import hierarchy

    opened = hierarchy.FastMemory.open

    def closed(self: Any, x: Tensor) -> Any:
        gates = opened(self, x)
        return gates._replace(gamma=0 * gates.gamma)

    module = Faulty((), 1.0)
    probe = MemoryHorizon(rows=2)
    batch = {"input_ids": make_tokens(24, seed=3), "targets": make_tokens(24, seed=4)}
    with torch.no_grad():
        losses, restarts, reach = probe.losses(module, batch)
        assert (losses[:-1] - losses[-1]).abs().max() > 0
        monkeypatch.setattr(hierarchy.FastMemory, "open", closed)
        for block in module.model.blocks:  # the projection learns the keys that it sees, too
            monkeypatch.setattr(block.memory.hierarchy, "local_memories", torch.nn.ModuleList())
        losses, restarts, reach = probe.losses(module, batch)
    gain = probe.estimate(losses, restarts, reach)
    assert (gain.mean, gain.low) == (0, 0)
    assert probe.judge(gain, 1000) is not None


def test_a_model_without_memory_says_so() -> None:
    from tests.support.rollback_cases import MODEL, OPTIM

    module = AtlasModule({**MODEL, "memory": "none"}, OPTIM, 17)
    with pytest.raises(ValueError, match="no memory"):
        module.losses_after_restarts({"input_ids": make_tokens(24)}, [0], 4)


def test_it_keeps_no_state(fit: Any, tmp_path: Any) -> None:
    assert MemoryHorizon().state_dict() == {}
    assert isinstance(MemoryHorizon(), lightning.Callback)
