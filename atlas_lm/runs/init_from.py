"""The weights that a new run starts from."""

import logging
from pathlib import Path

from lightning.pytorch import LightningModule

from atlas_lm.checkpoints.content import MODEL, CheckpointError
from atlas_lm.checkpoints.io import read_checkpoint
from atlas_lm.checkpoints.listing import newest_intact
from atlas_lm.data.run_tokenizer import another_tokenizer
from atlas_lm.files import ROOT
from atlas_lm.runs.folder import finished_runs
from atlas_lm.runs.resolve import resolve_checkpoint
from atlas_lm.training.load import differences

log = logging.getLogger(__name__)


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
