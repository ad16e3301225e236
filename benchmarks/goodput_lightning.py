"""A rank of the job of `benchmarks.goodput` that trains with Lightning's own requeue, without our safeguards."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import lightning
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment

from atlas_lm.config.validate import check_config
from atlas_lm.files import ROOT
from atlas_lm.training.trainer import build_module, prepare_process
from benchmarks.goodput import SAVE_EVERY, TRAINING, Clock


def main(folder: Path) -> None:
    """The model, data and optimizer of train.py, without its callbacks."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", [*TRAINING, f"paths.run={folder}/run", "hydra.job.chdir=false"])
    config = check_config(cfg)
    prepare_process(config.seed)
    data = instantiate(cfg.data)
    data.setup("fit")
    saving = ModelCheckpoint(folder / "checkpoints", every_n_train_steps=SAVE_EVERY, save_last=True, save_top_k=1)
    trainer = lightning.Trainer(
        accelerator="cpu", strategy="ddp", num_nodes=2, devices=1, max_steps=config.optim.total_steps, max_epochs=-1,
        gradient_clip_val=config.optim.clip, callbacks=[Clock(), saving], logger=False,
        val_check_interval=cfg.trainer.val_check_interval, check_val_every_n_epoch=None, num_sanity_val_steps=0,
        limit_val_batches=cfg.data.val_sequences, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, use_distributed_sampler=False,
        plugins=[SLURMEnvironment(auto_requeue=True, requeue_signal=signal.SIGUSR1)],
    )  # fmt: skip
    trainer.fit(build_module(config, data), data, ckpt_path="last")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
