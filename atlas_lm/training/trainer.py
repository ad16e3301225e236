"""From a composed configuration to the objects of a run."""

import importlib
import inspect
import logging
import os
import warnings

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from lightning import seed_everything
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.environments import ClusterEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from omegaconf import DictConfig, OmegaConf

from atlas_lm.config.schema import TrainConfig
from atlas_lm.config.validate import find_target
from atlas_lm.data.datamodule import TokenDataModule
from atlas_lm.training.allocation import other_allocation
from atlas_lm.training.malloc import configure_malloc
from atlas_lm.training.preemption import REQUEUE

log = logging.getLogger(__name__)

LOGGERS = {  # the package that each needs, and the extra that installs it
    "WandbLogger": ("wandb", "wandb"),
    "MLFlowLogger": ("mlflow", "mlflow"),
    "PrometheusLogger": ("prometheus_client", "prometheus"),
    "DatadogLogger": ("datadog_api_client", "datadog"),
    "OtlpLogger": ("opentelemetry.exporter.otlp.proto.http", "otlp"),
}


def prepare_process(seed: int) -> None:
    """What has to stand before the first tensor: how memory is kept, how numbers underflow, and all seeds."""
    configure_malloc()
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
    check_loggers(cfg)
    callbacks = [instantiate(c) for c in cfg.callbacks.values()]
    plugins = [instantiate(c) for c in cfg.trainer.get("plugins") or []]
    given = any(isinstance(plugin, ClusterEnvironment) for plugin in plugins)
    by_srun = SLURMEnvironment.detect() and not TorchElasticEnvironment.detect() and not given
    if by_srun:
        check_allocation(cfg.trainer.num_nodes, cfg.trainer.devices)
        # its own handler would come between a signal and the callback that saves
        plugins.append(SLURMEnvironment(auto_requeue=False))
    trainer = instantiate(cfg.trainer, _convert_="all", _partial_=True)(
        plugins=plugins,
        callbacks=[*extra, *callbacks],
        logger=[instantiate(c) for c in cfg.logger.values()],
        precision=resolve_precision(cfg.precision, accelerator),
    )
    if by_srun:
        check_allocation(trainer.num_nodes, trainer.num_devices)  # auto has become a number
    refuse_sweep_over_ranks(trainer.world_size)
    return trainer


def check_allocation(nodes: int, devices: int | str) -> None:
    """ValueError where a job of SLURM has other nodes or tasks than the settings ask for: each of its ranks would train
    on a share of the data that nobody completes, or wait for others that never come."""
    differs = other_allocation(nodes, devices if isinstance(devices, int) else None)
    if differs is not None:
        raise ValueError(f"{differs[0]}: give {differs[1]}")
    if int(os.environ["SLURM_NTASKS"]) > 1 and "SLURM_STEP_ID" not in os.environ:
        raise ValueError("this job has several tasks and this is no task of srun: start it by srun python train.py …")


def check_loggers(cfg: DictConfig) -> None:
    """ValueError for a logger whose package is not installed; Lightning would find out after the data is read."""
    for name, entry in cfg.logger.items():
        module, extra = LOGGERS.get(str(entry["_target_"]).rpartition(".")[2], ("", ""))
        try:
            if module:
                importlib.import_module(module)
        except ImportError:
            raise ValueError(f"logger.{name} needs {module}: pip install 'atlas-lm[{extra}]'") from None


def refuse_sweep_over_ranks(ranks: int) -> None:
    """ValueError when one process would sweep with several ranks: rank 1 would run the whole sweep by itself."""
    hydra = HydraConfig.get() if HydraConfig.initialized() else None
    if hydra and hydra.mode == RunMode.MULTIRUN and ranks > 1 and "BasicLauncher" in hydra.launcher._target_:
        raise ValueError(
            f"-m cannot be combined with {ranks} ranks in one process: start each run by itself, "
            "use trainer.devices=1, or a launcher with one job per run (hydra/launcher=submitit_slurm)"
        )


def build_module(config: TrainConfig, dm: TokenDataModule) -> LightningModule:
    """What `module` names, for this model and these data. ValueError: it is not for such data."""
    kind = find_target(config.module["_target_"], "module")
    settings = {name: value for name, value in config.module.items() if name != "_target_"}
    known = inspect.signature(kind).parameters
    given = dm.module_arguments()
    unknown = [name for name in given if name not in known]
    if unknown:
        raise ValueError(
            f"module={kind.__name__} has no use for the {unknown[0]} that this data has: data=embeddings goes with "
            "module=latent, and all others with module=atlas"
        )
    return kind(model=config.model, optim=config.optim, **given, **settings)


@rank_zero_only
def warn_unusual(config: TrainConfig, dm: TokenDataModule) -> None:
    """Log what is legal and hardly meant."""
    model = config.model
    chunk = model.global_chunk if model.memory == "atlas" and model.update != "delta" else None
    if chunk is not None and dm.seq_len < 2 * chunk:
        log.warning(
            "warning: data.seq_len=%d is shorter than two global chunks of %d: the global memory is never read; "
            "lower model.global_chunk or raise data.seq_len", dm.seq_len, chunk,
        )  # fmt: skip
