"""From a composed configuration to the objects of a run."""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning import seed_everything
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from omegaconf import DictConfig, OmegaConf

from atlas_lm.checkpoints.io import MODEL, CheckpointError, differences, load_weights, read_checkpoint
from atlas_lm.config.schema import TrainConfig
from atlas_lm.data.datamodule import TokenDataModule
from atlas_lm.data.run_tokenizer import another_tokenizer
from atlas_lm.runs.environment import environment
from atlas_lm.runs.folder import (
    CONFIG,
    FINISHED,
    finished_runs,
    has_ended_well,
    mark_latest,
    newest_intact,
    resolve_checkpoint,
    write_atomically,
    write_identity,
)
from atlas_lm.runs.report import Report
from atlas_lm.runs.resume import AUTO, checkpoint_to_resume, keep_aside, locked, withdraw_report
from atlas_lm.training.malloc import keep_freed_memory
from atlas_lm.training.preemption import REQUEUE

log = logging.getLogger(__name__)

ROOT = Path(__file__).parents[2]


def prepare_process(seed: int) -> None:
    """What has to stand before the first tensor: how memory is kept, how numbers underflow, and all seeds."""
    keep_freed_memory()
    # products of retention gates underflow within a chunk, and a CPU computes with denormals a hundred times slower
    torch.set_flush_denormal(True)
    seed_everything(seed, workers=True, verbose=False)


def requeue_exit_code(cfg: DictConfig) -> int:
    """What a signal ends the process with: as in training, before and after it."""
    code = OmegaConf.select(cfg, "callbacks.interrupt.requeue_exit_code")
    return code if isinstance(code, int) else REQUEUE


def tidy_log() -> None:
    """Let Lightning log through Hydra, into the run folder too, without what nobody can act on."""
    for name in ("lightning", "lightning.pytorch"):  # with handlers of their own each line would come twice
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_no_advertisement)
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated", category=FutureWarning)


def _no_advertisement(record: logging.LogRecord) -> bool:
    return "litlogger" not in record.getMessage()


def fast_bf16(accelerator: str) -> bool:
    """Whether the device computes in bfloat16 faster than in float32."""
    if accelerator != "cpu" and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_amx_tile_supported())


def resolve_precision(precision: str, accelerator: str) -> str:
    """`auto` becomes bf16-mixed or 32-true; the log says why."""
    if precision != "auto":
        return precision
    fast = fast_bf16(accelerator)
    chosen = "bf16-mixed" if fast else "32-true"
    rank_zero_info("precision: %s, as this hardware is %s at bfloat16", chosen, "fast" if fast else "slow")
    return chosen


def build_trainer(cfg: DictConfig, *extra: Callback) -> Trainer:
    """The Trainer with all callbacks and loggers of the configuration. ValueError for what this machine cannot run."""
    tidy_log()
    accelerator = str(cfg.trainer.accelerator)
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ValueError(f"trainer.accelerator={accelerator} but this machine has no CUDA device: use trainer=cpu")
    if accelerator == "cpu" and torch.cuda.is_available():
        log.info("training on the CPU although there is a GPU: trainer=gpu uses it")
    callbacks = [instantiate(c) for c in cfg.callbacks.values()]
    trainer = instantiate(cfg.trainer, _convert_="all", _partial_=True)(
        callbacks=[*extra, *callbacks],
        logger=[instantiate(c) for c in cfg.logger.values()],
        precision=resolve_precision(cfg.precision, accelerator),
    )
    refuse_sweep_over_ranks(trainer.world_size)
    return trainer


def refuse_sweep_over_ranks(ranks: int) -> None:
    """ValueError when one process would sweep with several ranks: rank 1 would run the whole sweep by itself."""
    hydra = HydraConfig.get() if HydraConfig.initialized() else None
    if hydra and hydra.mode == RunMode.MULTIRUN and ranks > 1 and "BasicLauncher" in hydra.launcher._target_:
        raise ValueError(
            f"-m cannot be combined with {ranks} ranks in one process: start each run by itself, "
            "use trainer.devices=1, or a launcher with one job per run (hydra/launcher=submitit_slurm)"
        )


@rank_zero_only
def second_look(config: TrainConfig, dm: TokenDataModule) -> None:
    """Log what is legal and hardly meant."""
    model = config.model
    if model.memory != "none" and dm.seq_len < 2 * model.global_chunk:
        log.warning(
            "warning: data.seq_len=%d is shorter than two global chunks of %d: the global memory is never read; "
            "lower model.global_chunk or raise data.seq_len", dm.seq_len, model.global_chunk,
        )  # fmt: skip


def starting_point(config: TrainConfig, module: LightningModule) -> Path | None:
    """Load what `init_from` names into the module; the checkpoint that `resume` names.

    ValueError if either does not fit the model.
    """
    outputs = config.paths.outputs
    checkpoint = checkpoint_to_resume(config, module)
    if checkpoint:
        if config.init_from:  # +experiment=stage2 resume=... has both
            rank_zero_info("resume=%s: init_from=%s is what that run began with", config.resume, config.init_from)
        return checkpoint
    if config.init_from:
        source = weights_to_start_from(config.init_from, module, outputs)
        load_weights(module, source)
        rank_zero_info("starting from the weights of %s", source)
    return None


def weights_to_start_from(name: str, module: LightningModule, outputs: str) -> Path:
    """The checkpoint that `init_from` means: a path, or of an experiment the newest finished run of the same model.

    ValueError with the command that trains one, if there is none.
    """
    folder = Path(outputs) / name
    experiments = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))
    if Path(name).exists() or not (folder.is_dir() or name in experiments):
        return resolve_checkpoint(name, outputs)
    wanted, others = module.hparams["model"], []
    for run in finished_runs(folder):
        checkpoint, damaged = newest_intact(run)
        for why in damaged:
            log.warning("warning: %s", why)
        if checkpoint is not None:
            different = _unlike(checkpoint, module)
            if not different:
                return checkpoint
            others.append(f"; the run {run} differs: {'; '.join(different)}")
    what = f"+experiment={name}" if name in experiments else f"name={name}"
    command = f"python train.py {what} model={wanted['name']}"
    raise ValueError(
        f"init_from={name}: {str(folder)!r} has no finished run of this model{''.join(others[:1])}; train one first: "
        f"{command}, or give init_from=<checkpoint or run>"
    )


def _unlike(checkpoint: Path, module: LightningModule) -> list[str]:
    """Why `module` cannot start from a checkpoint; chunk sizes may differ, their number may not."""
    try:
        saved = read_checkpoint(checkpoint, lazily=True).get(MODEL[0], {})
    except CheckpointError as error:
        return [str(error)]
    theirs, ours = dict(saved.get(MODEL[1], {})), dict(module.hparams["model"])
    different = differences(theirs, ours, without=("local_chunks", "polarisation_cap"))
    for what, then, now in (
        ("vocabulary", saved.get("vocab_size"), module.hparams["vocab_size"]),
        ("number of local memories", len(theirs.get("local_chunks", [])), len(ours["local_chunks"])),
    ):
        if then != now:
            different.append(f"a {what} of {now} but {then} in the checkpoint")
    tokenizer = another_tokenizer(saved, module.hparams, checkpoint)
    return [*different, tokenizer] if tokenizer else different


@contextmanager
def run_folder(cfg: DictConfig, root: Path) -> Iterator[bool]:
    """Hold the run's folder. Whether a run goes on there: until it trains nothing in it changes, see `settle_in`.

    ValueError if another run lies there, or another process writes there.
    """
    run = Path(cfg.paths.run)
    if getattr(rank_zero_only, "rank", 0) != 0:
        yield bool(cfg.resume)
        return
    with locked(run):
        goes_on = (run / CONFIG).exists()
        if goes_on and not cfg.resume:
            raise ValueError(f"{str(run)!r} already holds a run: start again a second later, or give hydra.run.dir")
        if not goes_on:
            write_atomically(run / "environment.json", json.dumps(environment(root), indent=2) + "\n")
            write_identity(run, HydraConfig.get().overrides.task if HydraConfig.initialized() else [])
            write_atomically(run / CONFIG, configuration(cfg))
        yield goes_on


def configuration(cfg: DictConfig) -> str:
    """What a run folder holds of its configuration. `resume` is left out: it says how this process came to the run."""
    return OmegaConf.to_yaml(OmegaConf.merge(cfg, {"resume": None}), resolve=True)


def result_of_sweep(cfg: DictConfig) -> Report | None:
    """The report of a run that a sweep which is resumed has finished before; None: there is something to train."""
    hydra = HydraConfig.get() if HydraConfig.initialized() else None
    if hydra is None or hydra.mode != RunMode.MULTIRUN or cfg.resume != AUTO:
        return None
    run = Path(cfg.paths.run)
    if not has_ended_well(run):
        return None
    log.info("resume=auto: %s is finished and stays as it is; without resume=auto it is trained again", run)
    return json.loads((run / "report.json").read_bytes())


@rank_zero_only
def settle_in(cfg: DictConfig, root: Path) -> None:
    """Training goes on: its configuration and environment are the run's now, and its old report is withdrawn."""
    run = Path(cfg.paths.run)
    now = environment(root)
    try:
        then = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        then = {}
    if {**then, "command": None} != {**now, "command": None}:
        text = json.dumps(now, indent=2) + "\n"
        keep_aside(run / "environment.json", text)
        write_atomically(run / "environment.json", text)
    text = configuration(cfg)
    keep_aside(run / CONFIG, text)
    write_atomically(run / CONFIG, text)
    withdraw_report(run)


@rank_zero_only
def close_run_folder(cfg: DictConfig, report: dict[str, Any]) -> None:
    """The newest finished run of the experiment becomes its `latest`."""
    run, experiment = Path(cfg.paths.run), Path(cfg.paths.outputs) / cfg.name
    if report["status"] in FINISHED:
        inside = run.resolve().parent == experiment.resolve()  # hydra.run.dir may have put it elsewhere
        mark_latest(finished_runs(experiment)[0] if inside else run, experiment)
