"""GateMonitor: what is no failure passes, what is one is named, and training never notices."""

import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from callbacks.gate_monitor import GateFailure, GateMonitor
from tests.support.toys import Line, Lines


def spread(half_width: float, layers: int = 2) -> Tensor:
    """Gates of deviation `half_width` around 0.5."""
    return 0.5 + half_width * torch.tensor([-1.0, 1.0]).repeat(layers, 8)


class Gated(Line):
    """Shows the gates of `plan` from the given step on."""

    def __init__(self, plan: dict[int, Tensor] | None = None) -> None:
        super().__init__()
        self.plan = {0: spread(0.1), 4: spread(0.2), **(plan or {})}
        self.gates = self.plan[0]

    def training_step(self, batch: Any, index: int) -> Any:
        self.gates = self.plan.get(self.global_step + 1, self.gates)
        return super().training_step(batch, index)

    def gate_values(self) -> Tensor:
        return self.gates


def monitor(**changes: Any) -> GateMonitor:
    return GateMonitor(**{"baseline_step": 2, "check_step": 5, "every_n_steps": 1, "on_failure": "stop", **changes})


# The judgement


def test_the_judgement() -> None:
    gates = monitor(baseline_step=100, check_step=500)
    gates.baseline = [0.01, 0.02]
    assert gates.judge(50, [0.0, 0.0]) is None, "before the baseline gates may be alike"
    assert gates.judge(400, [0.0101, 0.02]) is None, "growth is judged at one step"
    assert gates.judge(500, [0.01501, 0.0301]) is None
    assert gates.judge(500, [0.012, 0.0331]) is None, "the layers together have spread"
    assert gates.judge(500, [0.005, 0.01], 0.2) is None, "a fifth has opened, and their variance falls"
    assert gates.judge(500, [0.005, 0.01], 0.19) is not None
    assert gates.judge(500, [0.00009, 0.00009], 1.0).kind == "collapse", "all shut, or all open"
    for step, variances, kind, named in (
        (10, [0.01, math.nan], "nonfinite", "layer 1 are NaN or infinite at step 10"),
        (110, [0.00009, 0.02], "collapse", "layer 0 have collapsed at step 110: deviation 0.00949 is below 0.01"),
        (500, [0.0151, 0.029], "growth", "do not spread at step 500, least in layer 1: variance 0.015 → 0.022"),
        (500, [math.nan, 0.0], "nonfinite", "layer 0"),
    ):
        failure = gates.judge(step, variances)
        assert failure is not None
        assert failure.kind == kind
        assert named in failure.message


def test_gates_that_shut_have_not_spread(fit: Any) -> None:
    """All polarised, and the memory's branch gone: only those that open count."""
    shut, opened = (torch.full((2, 16), level) + spread(0.02) - 0.5 for level in (0.04, 0.96))
    with pytest.raises(GateFailure, match=r"do not spread at step 5.*0% are above 0\.9, less than 20%"):
        fit(Gated({4: shut}), monitor())
    fit(Gated({4: opened}), monitor())


def test_layers_are_named_by_their_blocks(fit: Any) -> None:
    """Where only some of them hold a memory, and the module says which."""
    module = Gated({3: spread(0.005)})
    module.memory_layers = lambda: [1, 4]  # type: ignore[method-assign]
    with pytest.raises(GateFailure, match="gates of layer 1 have collapsed"):
        fit(module, monitor())
    module.memory_layers = lambda: [1]  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"Gated names 1 blocks, \[1\], and 2 were measured"):
        fit(module, monitor())


def test_it_measures_when_it_is_due() -> None:
    gates = GateMonitor(baseline_step=105, check_step=507)
    assert [step for step in range(1, 510) if gates.is_due(step)] == sorted({*range(10, 510, 10), 105, 507})


def test_the_statistics(fit: Any) -> None:
    lines = Lines()
    fit(Gated({0: torch.tensor([[0.05, 0.5], [0.95, 0.9]])}), monitor(every_n_steps=100), logger=lines, max_steps=2)
    rows = {step: row for step, row in lines.rows if "gate_monitor/mean" in row}
    assert list(rows) == [1], "the loggers count from 0"
    assert rows[1]["gate_monitor/mean"] == pytest.approx(0.6)
    assert rows[1]["gate_monitor/std"] == pytest.approx(float(torch.tensor([0.05, 0.5, 0.95, 0.9]).std(correction=0)))
    assert rows[1]["gate_monitor/polarised"] == pytest.approx(0.5)


# It trips


@pytest.mark.parametrize(
    ("plan", "match", "steps"),
    [
        ({3: spread(0.2).index_fill_(1, torch.tensor([3]), math.nan)}, r"layer 0 are NaN .*step 3: lower optim\.lr", 3),
        ({3: spread(0.005)}, r"layer 0 have collapsed at step 3.*raise the weight", 3),
        (
            {4: spread(0.12)},
            r"gates do not spread at step 5, least in layer 0: variance 0\.01 → 0\.0144, less than 1\.5 times.*step 2",
            5,
        ),
    ],
)
def test_it_stops(fit: Any, plan: dict[int, Tensor], match: str, steps: int) -> None:
    module = Gated(plan)
    with pytest.raises(GateFailure, match=match):
        fit(module, monitor())
    assert len(module.seen) == steps


def test_it_warns_once_per_kind(fit: Any, caplog: pytest.LogCaptureFixture) -> None:
    module = Gated({3: spread(0.001), 4: spread(0.001), 6: spread(math.nan)})
    fit(module, monitor(on_failure="warn"))
    reported = [text for name, _, text in caplog.record_tuples if name == "callbacks.gate_monitor"]
    assert len(module.seen) == 8
    assert [text.split(":")[0] for text in reported] == [
        "gates of layer 0 have collapsed at step 3", "gates of layer 0 are NaN or infinite at step 6",
    ]  # fmt: skip


# It is quiet


def test_it_is_silent_and_bitwise_inert_on_a_healthy_run(
    fit: Any, same_training: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "callbacks.gate_monitor"):
        same_training(fit(Gated(), monitor()), fit(Gated()))
    assert not [record for record in caplog.records if record.name == "callbacks.gate_monitor"]


def test_it_waits_for_the_end_of_an_accumulation_window(fit: Any) -> None:
    gates, measured = monitor(), []
    gates.judge = lambda step, *_: measured.append(step)  # type: ignore[method-assign]
    fit(Gated(), gates, accumulate_grad_batches=2, max_steps=3)
    assert measured == [1, 2, 3]


# It continues


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable:UserWarning")
def test_the_baseline_survives_a_resume(fit: Any, tmp_path: Path) -> None:
    for width, fine in ((0.2, True), (0.12, False)):
        path = tmp_path / f"{width}.ckpt"
        fit(Gated(), monitor(), max_steps=3).save_checkpoint(path)
        module, gates = Gated({4: spread(width)}), monitor()
        if fine:
            fit(module, gates, ckpt_path=path)
        else:
            with pytest.raises(GateFailure, match=r"do not spread at step 5, least in layer 0: variance 0\.01 →"):
                fit(module, gates, ckpt_path=path)
        assert gates.baseline == pytest.approx([0.01, 0.01])


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable:UserWarning")
def test_it_does_not_warn_again_after_a_resume(fit: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit(Gated({3: spread(0.001)}), monitor(on_failure="warn"), max_steps=4).save_checkpoint(tmp_path / "4.ckpt")
    assert sum("collapsed" in record.message for record in caplog.records) == 1
    fit(Gated({5: spread(0.001)}), monitor(on_failure="warn"), ckpt_path=tmp_path / "4.ckpt")
    assert sum("collapsed" in record.message for record in caplog.records) == 1


def test_without_a_baseline_it_says_so() -> None:
    failure = monitor().judge(5, [0.1])
    assert failure is not None
    assert "their variance at step 2 is not known" in failure.message


# Refusals


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"baseline_step": 0}, "baseline_step=0"),
        ({"check_step": 2}, "baseline_step=2 .*before check_step=2"),
        ({"growth": 0.0}, "growth=0.0"),
        ({"growth": math.nan}, "growth=nan"),
        ({"collapse_std": -1.0}, "collapse_std=-1.0"),
        ({"low": 0.6, "high": 0.4}, "low=0.6, high=0.4"),
        ({"every_n_steps": 0}, "every_n_steps=0"),
        ({"on_failure": "abort"}, "on_failure=abort .*warn or stop"),
    ],
)
def test_values_are_checked(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        monitor(**changes)


def test_the_module_is_checked(fit: Any, line: Any) -> None:
    with pytest.raises(TypeError, match=r"needs gate_values\(\), which Line lacks"):
        fit(line(), monitor())
    with pytest.raises(ValueError, match=r"no gates: remove the monitor with ~callbacks\.gate_monitor"):
        fit(Gated({0: torch.empty(0, 0)}), monitor())


def test_a_layer_is_measured_at_a_time() -> None:
    """What is made in float32 is one layer's, not all layers' at once."""
    made: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            made.append(found.numel() if isinstance(found, torch.Tensor) else 0)
            return found

    trainer: Any = SimpleNamespace(world_size=1)
    gates = [torch.rand(2, 50, 8).bfloat16() for _ in range(6)]
    with Sizes():
        moments = monitor().measure(trainer, gates)
    assert max(made) == 800
    stacked = torch.stack(gates).flatten(1).double()
    expected = torch.stack([stacked.mean(1), stacked.square().mean(1), moments[2], moments[3]])
    assert torch.allclose(moments, expected, atol=1e-6)
