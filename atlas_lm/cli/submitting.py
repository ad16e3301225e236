"""What the command that submits jobs says before it does, and after."""

import logging
import sys
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict

from atlas_lm.cli.errors import explain
from atlas_lm.config.validate import check_config
from atlas_lm.training.preemption import only_wait_from_now_on


class BeforeJobs(Callback):
    """A callback of Hydra's: what every job would refuse is refused at once, not hours later at the end of a queue."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """`config` has no value of what a sweep varies; each job finds those by itself."""
        logs = OmegaConf.select(config, "hydra.launcher.submitit_folder")
        cfg = config.copy()
        with open_dict(cfg):
            del cfg["hydra"]
            cfg.paths.run = ""  # each job has its own
        try:
            check_config(cfg)
            if not isinstance(cfg.trainer.devices, int):
                raise ValueError(
                    f"trainer.devices={cfg.trainer.devices}: a job is given its tasks before it sees a node: give how "
                    "many each node gets, one a GPU"
                )
        except Exception as error:
            line = explain(error)
            if line is None:  # the job says what it is
                return
            print(f"error: {line}", file=sys.stderr)
            raise SystemExit(1) from error  # Hydra makes a warning of everything else
        setup = OmegaConf.select(config, "hydra.launcher.setup") or []
        if not any("scontrol requeue" in line for line in setup):
            print(
                "warning: hydra.launcher.setup has no line that queues a killed process again: keep those of "
                "conf/launcher/slurm.yaml beside your own",
                file=sys.stderr,
            )
        only_wait_from_now_on()
        import submitit  # noqa: F401  # sets the level of its logger

        logging.getLogger("submitit").setLevel(logging.ERROR)  # without accounting it warns each time it asks
        print(
            f"jobs of SLURM: squeue lists them, {str(logs).replace('%j', '<job>')}/ has what they print; "
            "Ctrl-C ends this command, scancel <job> a job"
        )

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Say where to see what became of them; Hydra asks for it only where none has failed."""
        outputs = "" if config.paths.outputs == "outputs" else f" outputs={config.paths.outputs}"
        print(f"what became of them: python -m atlas_lm runs {config.name}{outputs}")
