"""Every setting of a run, typed: Hydra composes `conf/` against these classes, so a misspelled key fails at once.

Only the model, the optimizer, the paths and the top level are typed here. `data`, `trainer`, `logger` and `callbacks`
name a class each (`_target_`); their keys are checked against its signature, see `validate.py`. `???` marks a value
that `conf/` or the user has to give.
"""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore

from atlas_lm.config.fields import MISSING, check_values, choice, number
from atlas_lm.config.model import ModelConfig


@dataclass
class OptimConfig:
    """The outer optimizer (T5). ValueError for a value outside its choices or range."""

    name: str = choice("adamw", "muon")
    """muon: Muon for the 2-D weights of the blocks, AdamW for the rest."""
    lr: float = number(minimum=0)
    """Peak learning rate of AdamW."""
    muon_lr: float = number(minimum=0)
    """Peak learning rate of Muon; read by `name: muon` alone."""
    memory_lr: float = number(minimum=0)
    """Peak learning rate of W_init and of the memory's feature map: high ones cost the memory its capacity."""
    weight_decay: float = number(minimum=0)
    """Decoupled weight decay of matrices; vectors have none."""
    betas: list[float] = MISSING
    """AdamW's two averaging constants."""
    warmup_steps: int = number(minimum=0)
    """Optimizer steps of linear warm-up."""
    total_steps: int = number(minimum=1)
    """Optimizer steps of the run, warm-up included; the cosine ends here and so does training."""
    min_lr_ratio: float = number(minimum=0, maximum=1)
    """Learning rate at the end, as a fraction of the peak."""
    clip: float = number(minimum=0)
    """Gradient norm above which gradients are scaled down."""

    def __post_init__(self) -> None:
        check_values(self, "optim.")
        if isinstance(self.betas, list) and not (len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)):
            raise ValueError(f"optim.betas={self.betas} must be two numbers from 0 to below 1; [0.9,0.95] is usual")


@dataclass
class PathsConfig:
    """Where a run reads and writes."""

    outputs: str = MISSING
    """Folder of all runs, one folder per experiment in it."""
    run: str = MISSING
    """Folder of this run; Hydra writes its log there too."""


@dataclass
class TrainConfig:
    """`conf/train.yaml`: everything that `train.py` reads."""

    name: str = MISSING
    """Name of the experiment: its runs lie in `outputs/<name>/`."""
    seed: int = number(minimum=0)
    """Of the weights' initial values; `data.seed` is the one of the shuffling."""
    precision: str = choice("auto", "32-true", "bf16-mixed")
    """auto: bf16-mixed where the hardware is fast at it, else 32-true; the log says which."""
    resume: str | None = None
    """What to resume exactly, in its folder, after its last record: `auto` (the newest run of this experiment if
    it is not finished, else a new one), a run folder, an experiment (its newest finished run), or a checkpoint."""
    init_from: str | None = None
    """Checkpoint, run folder or experiment (its newest finished run of this model) whose weights to start from; all
    else begins again."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """conf/model/"""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """conf/optim/"""
    module: dict[str, Any] = MISSING
    """conf/module/: the LightningModule that trains a model; by default that of AtlasLM."""
    data: dict[str, Any] = MISSING
    """conf/data/: a LightningDataModule."""
    trainer: dict[str, Any] = MISSING
    """conf/trainer/: the arguments of Lightning's Trainer."""
    logger: dict[str, Any] = MISSING
    """conf/logger/: by name, each a Logger."""
    callbacks: dict[str, Any] = MISSING
    """conf/callbacks/: by name, each a Callback; they run in this order, checkpoints last."""
    paths: PathsConfig = field(default_factory=PathsConfig)
    """conf/paths/"""

    def __post_init__(self) -> None:
        check_values(self, "")


def register() -> None:
    """Make `schema` known to Hydra, for the defaults list of `conf/train.yaml`."""
    ConfigStore.instance().store(name="schema", node=TrainConfig)


register()
