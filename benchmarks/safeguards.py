"""What the safeguards cost: python -m benchmarks.safeguards [--experiment stage1] [--steps 1000] [--pairs 30]

Two runs. In the first all safeguards are on: the share of each is the time inside its hooks over the time of the steps;
what happens once before the first step is counted apart. `--steps` should be a multiple of all intervals, so that every
probe comes as often as in a long run. In the second, without the probes, the others are switched off and on again every
10 steps: what they cost is how much longer a block with them takes than its neighbours without, the median over pairs;
that finds also what they cost outside their hooks. Polarisation, which is part of what is trained, is on throughout,
and so is the norm of the gradients, which clipping and the records need: neither is a safeguard's time.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Checkpoint

from atlas_lm.config.validate import check_config
from atlas_lm.training.module import AtlasModule
from atlas_lm.training.trainer import prepare_process, resolve_precision
from benchmarks import measuring

MODULE = "benchmarks.safeguards"
CONF = Path(__file__).parents[1] / "conf"
NOT_COUNTED = ("progress", "step_checkpoint", "interrupt", "random_state")  # any training has these
# at intervals; all of their time is in their hooks
PROBES = ("niah_probe", "memory_contribution", "memory_horizon", "five_cat_probe", "spike_rollback")
BLOCK = 10  # steps: one at which Lightning logs, and at which gates are measured, in each
HOOKS = (
    "on_train_start", "on_train_batch_start", "on_before_backward", "on_after_backward", "on_before_optimizer_step",
    "on_train_batch_end", "on_step_end",
)  # fmt: skip


class Clock:
    """Seconds inside the hooks of each safeguard: before the first step, and during the steps."""

    def __init__(self) -> None:
        self.before: dict[str, float] = defaultdict(float)
        self.during: dict[str, float] = defaultdict(float)
        self.on = True
        self._needed_anyway = 0.0

    def watch(self, name: str, callback: Any) -> Any:
        for hook in HOOKS:
            if getattr(type(callback), hook, None) is not getattr(lightning.Callback, hook, None):
                setattr(callback, hook, self._timed(name, hook, getattr(callback, hook)))
        return callback

    def leave_out_the_norm(self, module: AtlasModule) -> None:
        norm = module.gradient_norm

        def timed() -> torch.Tensor:
            start = time.perf_counter()
            found = norm()
            self._needed_anyway += time.perf_counter() - start
            return found

        module.gradient_norm = timed  # type: ignore[method-assign]

    def _timed(self, name: str, hook: str, function: Callable[..., Any]) -> Callable[..., Any]:
        totals = self.before if hook == "on_train_start" else self.during
        wait = torch.cuda.synchronize if torch.cuda.is_available() else bool

        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self.on:
                return None
            start, before = time.perf_counter(), self._needed_anyway
            try:
                return function(*args, **kwargs)
            finally:
                wait()
                totals[name] += time.perf_counter() - start - (self._needed_anyway - before)

        return timed


class Steps(lightning.Callback):
    """Seconds from the first step's start to the last one's end."""

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 0:
            self.began = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds = time.perf_counter() - self.began


class Switch(lightning.Callback):
    """Turns the safeguards off and on again, where none of them waits for its next hook: within an optimizer step."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.blocks: list[tuple[bool, float]] = []  # whether they were on, and seconds
        self._began: float | None = None

    def on_before_optimizer_step(self, trainer: Any, *_: Any) -> None:
        if (trainer.global_step + 1) % BLOCK == 0:
            trainer.lightning_module.gradient_norm()  # else the first to ask for it would do so in the next block
            now = time.perf_counter()
            if self._began is not None:  # the first block warms up
                self.blocks.append((self.clock.on, now - self._began))
            self._began, self.clock.on = now, not self.clock.on

    def ratios(self) -> list[float]:
        """How much longer each block with safeguards took than its two neighbours without."""
        triples = zip(self.blocks, self.blocks[1:], self.blocks[2:], strict=False)
        return [2 * seconds / (a + b) - 1 for (_, a), (on, seconds), (_, b) in triples if on]


def standard_error(ratios: list[float], repetitions: int = 4000) -> float:
    """Of their median, by the bootstrap (Efron 1979); the same for the same ratios."""
    draw = random.Random(0)
    medians = [statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(repetitions)]
    return statistics.stdev(medians)


def train(
    overrides: list[str], steps: int, switched: bool = False, more: Iterable[lightning.Callback] = ()
) -> dict[str, Any]:
    """One fit of `steps` steps from the start, with `more` callbacks; its times."""
    with tempfile.TemporaryDirectory() as folder:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("train", [*overrides, f"paths.run={folder}", "hydra.job.chdir=false"])
        config = check_config(cfg)
        prepare_process(config.seed)
        data = instantiate(cfg.data)
        data.setup("fit")
        module = AtlasModule(config.model, config.optim, data.vocab_size, 1.0)
        clock, whole = Clock(), Steps()
        clock.leave_out_the_norm(module)
        switch = Switch(clock)
        chosen = {name: entry for name, entry in cfg.callbacks.items() if name not in NOT_COUNTED}
        callbacks = [clock.watch(str(name), instantiate(c)) for name, c in chosen.items()]
        trainer = lightning.Trainer(
            accelerator=cfg.trainer.accelerator, devices=1, max_steps=steps, max_epochs=-1,
            precision=resolve_precision(config.precision, str(cfg.trainer.accelerator)),  # type: ignore[arg-type]
            log_every_n_steps=cfg.trainer.log_every_n_steps, gradient_clip_val=config.optim.clip,
            callbacks=[*callbacks, whole, *([switch] if switched else []), *more],
            logger=[instantiate(c) for c in cfg.logger.values()], limit_val_batches=1,
            val_check_interval=10**6, check_val_every_n_epoch=None, num_sanity_val_steps=0,
            enable_checkpointing=any(isinstance(c, Checkpoint) for c in callbacks), enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=folder, plugins=[instantiate(p) for p in cfg.trainer.plugins],
        )  # fmt: skip
        trainer.fit(module, data)
    during, before = dict(clock.during), dict(clock.before)
    return {"seconds": whole.seconds, "before": before, "during": during, "ratios": switch.ratios()}


def main() -> None:
    parser = measuring.arguments(MODULE, __doc__.splitlines()[0])
    parser.add_argument("--experiment", default="stage1")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("overrides", nargs="*", help="further settings, as train.py takes them")
    args = parser.parse_args()
    overrides = [f"+experiment={args.experiment}", *args.overrides]
    train(overrides, 5)  # compile, touch the memory
    measuring.progress(f"{args.steps} steps with all safeguards")
    run = train(overrides, args.steps)
    measuring.progress(f"{args.pairs} pairs of blocks")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        present = compose("train", overrides).callbacks
    without = [f"~callbacks.{name}" for name in PROBES if name in present]
    ratios = train([*overrides, *without], 2 * BLOCK * (args.pairs + 1), switched=True)["ratios"]

    def share(names: Iterable[str]) -> float:
        return sum(run["during"].get(name, 0.0) for name in names) / run["seconds"]

    def once(names: Iterable[str]) -> float:
        return sum(run["before"].get(name, 0.0) for name in names)

    names = list(run["before"] | run["during"])
    probes = [name for name in names if name in PROBES]
    others = [name for name in names if name not in PROBES]
    rows: list[measuring.Row] = [
        {"name": name, "share": share([name]), "seconds_before": once([name])} for name in names
    ]
    rows.append({"name": "all, time in hooks", "share": share(names), "seconds_before": once(names)})
    blocks = statistics.median(ratios)
    rows.append({"name": "all but the probes, time in hooks", "share": share(others), "seconds_before": once(others)})
    rows.append({"name": "all but the probes, blocks with / without", "share": blocks, "seconds_before": None})
    rows.append({"name": "all: blocks and probes", "share": blocks + share(probes), "seconds_before": None})
    rows.append({"name": f"{args.steps} steps, seconds", "share": None, "seconds_before": run["seconds"]})
    columns = {
        "safeguard": lambda row: row["name"],
        "share of training time": lambda row: "" if row["share"] is None else f"{row['share']:.2%}",
        "seconds before the first step": lambda row: (
            "" if row["seconds_before"] is None else f"{row['seconds_before']:.2f}"
        ),
    }
    measuring.publish(rows, columns, args.json)
    error = round(standard_error(ratios), 4)
    print(json.dumps({"standard error of their median": error, "ratios of blocks": [round(r, 4) for r in ratios]}))


if __name__ == "__main__":
    main()
