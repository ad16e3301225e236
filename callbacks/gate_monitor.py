"""Say when the gates between attention and memory stop learning: they must spread out and not collapse.

Watches:  mean, standard deviation and the share of polarised gates (< `low` or > `high`), per layer, over all ranks.
Acts:     fails if gates are not finite, if a layer's deviation falls below `collapse_std` after `baseline_step`, or if
          its variance at `check_step` is below `growth` times that at `baseline_step` while less than a share of
          `opened` of all gates are above `high`: where most have opened the variance falls again.
          on_failure: warn (once per kind) or stop (GateFailure), on all ranks together.
Logs:     gate_monitor/mean, gate_monitor/std, gate_monitor/polarised over all layers, when measured.
Requires: HasGates. Keeps the baseline in the checkpoint.
Source:   C6.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from callbacks.support.collectives import mean_over_ranks
from callbacks.support.lightning_internals import accumulates
from callbacks.support.probing import layer_numbers, record
from callbacks.support.ranges import above, at_least, check, one_of, share

log = logging.getLogger(__name__)
REMEDY = "raise the weight of the polarisation loss, lower optim.lr, or remove the memory of that layer"


@runtime_checkable
class HasGates(Protocol):
    """All that this monitor knows of the module."""

    def gate_values(self) -> Sequence[Tensor] | Tensor:
        """By layer, each of any shape, in [0, 1]: those of the last training step."""
        ...


class GateFailure(FloatingPointError):
    """Gates that are not finite, have collapsed, or never began to spread."""


class Failure(NamedTuple):
    """What is wrong: its kind, and the whole sentence."""

    kind: str
    message: str


class GateMonitor(Callback):
    """Steps are optimizer steps. Measures every `every_n_steps`, and at `baseline_step` and `check_step` themselves.

    ValueError: a value out of its range.
    """

    def __init__(
        self,
        baseline_step: int = 100,
        check_step: int = 500,
        growth: float = 1.5,
        opened: float = 0.2,
        collapse_std: float = 0.01,
        low: float = 0.1,
        high: float = 0.9,
        every_n_steps: int = 10,
        on_failure: str = "warn",
    ) -> None:
        if not 1 <= baseline_step < check_step:
            raise ValueError(f"baseline_step={baseline_step} must be at least 1 and before check_step={check_step}")
        check(
            "gate_monitor", growth=(growth, above(0, "1.5 means half as much again")),
            opened=(opened, share()), collapse_std=(collapse_std, at_least(0)),
            every_n_steps=(every_n_steps, at_least(1)), on_failure=(on_failure, one_of("warn", "stop")),
        )  # fmt: skip
        if not 0 <= low <= high <= 1:
            raise ValueError(f"low={low}, high={high} of gate_monitor must be gates: 0 <= low <= high <= 1")
        self.baseline_step, self.check_step, self.growth = baseline_step, check_step, growth
        self.opened, self.collapse_std, self.low, self.high = opened, collapse_std, low, high
        self.every_n_steps, self.on_failure = every_n_steps, on_failure
        self.reset()

    def reset(self) -> None:
        """What every fit begins with; a resumed one loads its state after `setup`."""
        self.baseline: list[float] | None = None  # variance per layer ...
        self.taken_at: int | None = None  # ... after this step
        self.warned: list[str] = []  # kinds of failure

    def is_due(self, step: int) -> bool:
        """Whether to measure after optimizer step `step`."""
        return step % self.every_n_steps == 0 or step in (self.baseline_step, self.check_step)

    def judge(
        self, step: int, variances: list[float], opened: float = 0.0, numbers: list[int] | None = None
    ) -> Failure | None:
        """What is wrong with the variance of a layer's gates, NaN standing for gates that are not finite.

        `opened`: the share of all gates above `high`. `numbers`: which blocks the layers are.
        """
        numbers = numbers or list(range(len(variances)))
        at = f"at step {step}"
        for layer, variance in zip(numbers, variances, strict=True):
            if not math.isfinite(variance):  # first: every comparison with NaN is False
                return Failure(
                    "nonfinite", f"gates of layer {layer} are NaN or infinite {at}: lower optim.lr or optim.clip"
                )
        for layer, variance in zip(numbers, variances, strict=True):
            if step > self.baseline_step and math.sqrt(variance) < self.collapse_std:
                found = f"deviation {math.sqrt(variance):.3g} is below {self.collapse_std:g}"
                return Failure("collapse", f"gates of layer {layer} have collapsed {at}: {found}: {REMEDY}")
        if step != self.check_step:
            return None
        if self.baseline is None:
            missing = f"their variance at step {self.baseline_step} is not known: resume a checkpoint that holds it"
            return Failure("baseline", f"gates cannot be judged {at}: {missing}")
        # over all layers: in a healthy model one of them may have found its spread before the baseline
        now, before = sum(variances) / len(variances), sum(self.baseline) / len(self.baseline)
        if now < self.growth * before and opened < self.opened:
            growths = [a / b if b else math.inf for a, b in zip(variances, self.baseline, strict=True)]
            layer = numbers[growths.index(min(growths))]
            found = (
                f"{before:.3g} → {now:.3g}, less than {self.growth:g} times, since step {self.taken_at}, and "
                f"{opened:.0%} are above {self.high:g}, less than {self.opened:.0%}"
            )
            return Failure("growth", f"gates do not spread {at}, least in layer {layer}: variance {found}: {REMEDY}")
        return None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """TypeError: the module shows no gates."""
        if stage == "fit":
            self.reset()
        if not isinstance(pl_module, HasGates):
            raise TypeError(f"gate_monitor needs gate_values(), which {type(pl_module).__name__} lacks")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure if it is time, and act."""
        step = trainer.global_step
        if accumulates(trainer) or not self.is_due(step):
            return
        assert isinstance(pl_module, HasGates)
        mean_L, square_L, polarised_L, opened_L = self.measure(trainer, pl_module.gate_values())
        variances = (square_L - mean_L.square()).clamp_min(0).tolist()
        mean, numbers = float(mean_L.mean()), layer_numbers(pl_module, len(variances))
        values = {
            "gate_monitor/mean": mean,
            "gate_monitor/std": math.sqrt(max(float(square_L.mean()) - mean * mean, 0.0)),
            "gate_monitor/polarised": float(polarised_L.mean()),
        }
        record(trainer, values)
        if step == self.baseline_step:
            self.baseline, self.taken_at = variances, step
        self._act(trainer, self.judge(step, variances, float(opened_L.mean()), numbers))

    def measure(self, trainer: Trainer, gates: Sequence[Tensor] | Tensor) -> Tensor:
        """(4, layers): mean, mean square, share polarised and share above `high`, over all ranks.

        ValueError: there are no gates.
        A layer at a time: in float32 all of them would be as large as the activations of a step.
        """
        if not len(gates) or not gates[0].numel():
            raise ValueError("gate_monitor: this model has no gates: remove the monitor with ~callbacks.gate_monitor")
        moments = torch.stack([self._moments(layer.detach()) for layer in gates], dim=1)
        return mean_over_ranks(trainer, moments).cpu()

    def _moments(self, gates: Tensor) -> Tensor:
        """(4,) of one layer."""
        gates = gates.float()
        mean = gates.mean()
        variance = (gates - mean).square_().mean().double()  # about the mean: in float32 it keeps its digits
        mean = mean.double()
        opened = (gates > self.high).count_nonzero().double() / gates.numel()
        polarised = opened + (gates < self.low).count_nonzero().double() / gates.numel()
        return torch.stack([mean, variance + mean.square(), polarised, opened])

    def _act(self, trainer: Trainer, failure: Failure | None) -> None:
        """All ranks have the same numbers and so do the same."""
        if failure is None:
            return
        if self.on_failure == "stop":
            raise GateFailure(failure.message)
        if failure.kind not in self.warned:
            self.warned.append(failure.kind)
            if trainer.is_global_zero:
                log.warning(failure.message)

    def state_dict(self) -> dict[str, Any]:
        """The baseline, and what was warned of."""
        return {"baseline": self.baseline, "taken_at": self.taken_at, "warned": list(self.warned)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Judge against the same baseline."""
        self.baseline, self.warned = state_dict["baseline"], list(state_dict["warned"])
        self.taken_at = state_dict.get("taken_at", self.baseline_step)  # older checkpoints do not say
