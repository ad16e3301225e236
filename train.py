"""Train a model: python train.py +experiment=stage1. Settings: conf/, atlas_lm/config/schema.py."""

from atlas_lm.training import preemption

if __name__ == "__main__":
    preemption.exit_when_preempted()  # before the imports below, which take seconds

from pathlib import Path

import hydra
from hydra.utils import instantiate
from omegaconf import DictConfig

from atlas_lm.cli import errors as cli
from atlas_lm.config.schema import TrainConfig
from atlas_lm.config.validate import check_config
from atlas_lm.data.run_tokenizer import keep_tokenizer
from atlas_lm.files import ROOT
from atlas_lm.runs.lifecycle import close_run_folder, is_sweep, open_run_folder, result_so_far, resume_own_run, stats_of
from atlas_lm.runs.report import Report, judge
from atlas_lm.runs.resume import load_starting_weights, rewind_loggers
from atlas_lm.training.trainer import build_module, build_trainer, prepare_process, requeue_exit_code, warn_unusual


def train(cfg: DictConfig) -> Report:
    """One run: compose, build, fit, judge. Returns its report."""
    resume_own_run(cfg)
    config, done = check_config(cfg), result_so_far(cfg)
    if done is not None:
        return done
    with preemption.preemptible(requeue_exit_code(cfg)):
        with open_run_folder(cfg) as resumes:
            report = fit(cfg, config, resumes)
        close_run_folder(cfg, report)
    return report


def fit(cfg: DictConfig, config: TrainConfig, resumes: bool) -> Report:
    """Train in the run's folder, from the start or from where it ended; whatever becomes of it, there is a report."""
    prepare_process(config.seed)
    dm = instantiate(cfg.data)
    dm.setup("fit")  # a bad corpus fails here, before a model is built for it
    warn_unusual(config, dm)
    module = build_module(config, dm)
    point = load_starting_weights(config, module)
    keep_tokenizer(Path(config.paths.run), dm.tokenizer)
    stats = stats_of(cfg, dm.held_out_fingerprint, resumes, point.checkpoint if point else None)
    trainer = build_trainer(cfg, stats)
    if resumes or point is not None:
        rewind_loggers(trainer, point)
    try:
        trainer.fit(module, dm, ckpt_path=point.checkpoint if point else None)
        if not stats.has_begun:  # its last step was done
            stats.skip_training(trainer, point.next_step if point else 0)
        if stats.validated_at != trainer.global_step:
            trainer.validate(module, dm, verbose=False)
    except BaseException as error:
        if isinstance(error, Exception) or stats.error is None:
            stats.error = error  # Lightning gives callbacks the first one; a safeguard may have found its cause
        raise
    finally:
        if stats.error is None and not is_sweep():  # which has more to do
            preemption.ignore_from_now_on()
        if stats.has_begun or not resumes:  # a resume that is refused leaves the run as it was
            report = judge(Path(config.paths.run), trainer, module, dm, stats)
    return report


@hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="train")
@cli.task
def main(cfg: DictConfig) -> float | None:
    """The value that a sweep minimises: the validation loss."""
    return train(cfg)["val_loss"]


if __name__ == "__main__":
    cli.leave(cli.run(main))
