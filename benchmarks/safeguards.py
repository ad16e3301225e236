"""What the safeguards cost: python -m benchmarks.safeguards [--experiment stage1] [--steps 200] [--pairs 3]

Trains the experiment in pairs, with its safeguards and without, in one process. The share of each safeguard is the time
inside its hooks over the time of the steps; what happens once before the first step is counted apart. The norm of the
gradients, which clipping and the records take in either run, is not a safeguard's time, whoever asks for it first.
`--steps` should be a multiple of all intervals, so that every probe comes as often as in a long run.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from atlas_lm.building import prepare_process, resolve_precision
from atlas_lm.checks import check_config
from atlas_lm.module import AtlasModule
from benchmarks import measuring

MODULE = "benchmarks.safeguards"
CONF = Path(__file__).parents[1] / "conf"
NOT_COUNTED = ("progress", "checkpoint", "interrupt", "random_state")  # any training has these
HOOKS = (
    "on_train_start", "on_train_batch_start", "on_before_backward", "on_after_backward", "on_before_optimizer_step",
    "on_train_batch_end", "on_step_border",
)  # fmt: skip


class Clock:
    """Seconds inside the hooks of each safeguard: before the first step, and during the steps."""

    def __init__(self) -> None:
        self.before: dict[str, float] = defaultdict(float)
        self.during: dict[str, float] = defaultdict(float)
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

        def timed(*args: Any, **kwargs: Any) -> Any:
            start, before = time.perf_counter(), self._needed_anyway
            try:
                return function(*args, **kwargs)
            finally:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                totals[name] += time.perf_counter() - start - (self._needed_anyway - before)

        return timed


class Steps(lightning.Callback):
    """Seconds from the first step's start to the last one's end."""

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 0:
            self.began = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds = time.perf_counter() - self.began


def train(overrides: list[str], steps: int, safeguards: bool) -> dict[str, Any]:
    """One fit of `steps` steps from the start; its times."""
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
        chosen = {name: entry for name, entry in cfg.callbacks.items() if name not in NOT_COUNTED}
        callbacks = [clock.watch(str(name), instantiate(c)) for name, c in chosen.items()] if safeguards else []
        trainer = lightning.Trainer(
            accelerator=cfg.trainer.accelerator, devices=1, max_steps=steps, max_epochs=-1,
            precision=resolve_precision(config.precision, str(cfg.trainer.accelerator)),  # type: ignore[arg-type]
            gradient_clip_val=config.optim.clip, callbacks=[*callbacks, whole],
            logger=[instantiate(c) for c in cfg.logger.values()], limit_val_batches=1,
            val_check_interval=10**6, check_val_every_n_epoch=None, num_sanity_val_steps=0,
            enable_checkpointing=safeguards, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=folder, plugins=[instantiate(p) for p in cfg.trainer.plugins],
        )  # fmt: skip
        trainer.fit(module, data)
    return {"seconds": whole.seconds, "before": dict(clock.before), "during": dict(clock.during)}


def main() -> None:
    parser = measuring.arguments(MODULE, __doc__.splitlines()[0])
    parser.add_argument("--experiment", default="stage1")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("overrides", nargs="*", help="further settings, as train.py takes them")
    args = parser.parse_args()
    overrides = [f"+experiment={args.experiment}", *args.overrides]
    train(overrides, 5, safeguards=False)  # compile, touch the memory
    runs: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for pair in range(args.pairs):
        for safeguards in (True, False) if pair % 2 else (False, True):
            measuring.progress(f"pair {pair + 1}/{args.pairs}, {'with' if safeguards else 'without'} safeguards")
            runs[safeguards].append(train(overrides, args.steps, safeguards))
    names = list(runs[True][0]["before"] | runs[True][0]["during"])
    rows: list[measuring.Row] = []
    for name in names:
        share = statistics.median(run["during"].get(name, 0.0) / run["seconds"] for run in runs[True])
        before = statistics.median(run["before"].get(name, 0.0) for run in runs[True])
        rows.append({"name": name, "share": share, "seconds_before": before})
    total = statistics.median(sum(run["during"].values()) / run["seconds"] for run in runs[True])
    before = statistics.median(sum(run["before"].values()) for run in runs[True])
    ratios = [a["seconds"] / b["seconds"] - 1 for a, b in zip(runs[True], runs[False], strict=True)]
    rows.append({"name": "all safeguards", "share": total, "seconds_before": before})
    rows.append({"name": "whole run, with / without", "share": statistics.median(ratios), "seconds_before": None})
    seconds = statistics.median(run["seconds"] for run in runs[False])
    rows.append({"name": f"{args.steps} steps without, seconds", "share": None, "seconds_before": seconds})
    columns = {
        "safeguard": lambda row: row["name"],
        "share of training time": lambda row: "" if row["share"] is None else f"{row['share']:.2%}",
        "seconds before the first step": lambda row: (
            "" if row["seconds_before"] is None else f"{row['seconds_before']:.2f}"
        ),
    }
    measuring.publish(rows, columns, args.json)
    print(json.dumps({"pairs": [round(r, 4) for r in ratios]}))


if __name__ == "__main__":
    main()
