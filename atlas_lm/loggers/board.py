"""TensorBoard with a page laid out for the safeguards, and hyperparameters that its HPARAMS tab shows.

Lightning's logger leaves that tab empty unless it may write a placeholder value for a metric. Here the metric is only
declared: its column fills with what the run logs.
"""

import re
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

Layout = Mapping[str, Mapping[str, Sequence[str]]]

EVENTS = "events.out.tfevents."  # how SummaryWriter begins a file's name; ten digits of Unix time follow
JUDGED_BY = "val/loss"  # the metric beside the hyperparameters


def custom_scalars(layout: Layout) -> dict[str, dict[str, list[Any]]]:
    """category → chart → tags, as `SummaryWriter.add_custom_scalars` takes it: lines, each tag matched as a whole.

    TensorBoard takes tags for regular expressions and matches their beginning: spike_rollback/ppl would draw
    spike_rollback/ppl_delta.
    ValueError: a chart without a list of tags.
    """
    for category, charts in layout.items():
        for chart, tags in charts.items():
            if isinstance(tags, str) or not tags:
                raise ValueError(
                    f"layout: {category}.{chart}={tags} must be a list of metrics, as [train/loss, val/loss]"
                )
    return {
        category: {chart: ["Multiline", [f"^{re.escape(tag)}$" for tag in tags]] for chart, tags in charts.items()}
        for category, charts in layout.items()
    }


def flatten(params: Mapping[str, Any], parent: str = "") -> dict[str, int | float | str]:
    """Nested hyperparameters under names like model/dim; what is no number becomes text."""
    flat: dict[str, int | float | str] = {}
    for key, value in params.items():
        name = f"{parent}{key}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{name}/"))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[name] = value
        else:
            flat[name] = str(value)
    return flat


class BoardLogger(TensorBoardLogger):
    """Event files in `save_dir`/`version`; only rank zero writes.

    `layout`: category → chart → metrics drawn in it, for the tab CUSTOM SCALARS. ValueError: see `custom_scalars`.
    """

    def __init__(self, save_dir: str, layout: Layout, version: str = "tensorboard") -> None:
        super().__init__(save_dir, name="", version=version, default_hp_metric=False)
        self.layout = custom_scalars(layout)
        self._declared = False
        self._ended = False

    @property
    @rank_zero_experiment
    def experiment(self) -> SummaryWriter:
        """The writer; the first call creates it and writes the layout."""
        is_new = self._experiment is None
        if is_new:
            self._keep_order()
            if not self._files():
                self._kwargs["purge_step"] = 0  # TensorBoard takes a second beginning for a restart, if it saw a first
        writer = super().experiment
        if writer.all_writers is None:  # closed by `finalize`: what comes now goes into another file
            self._keep_order()
        if is_new:
            writer.purge_step = None  # what is logged after `finalize` goes into another file, and is no restart
            if self.layout and not self._kwargs.get("purge_step"):  # a resumed run has it, before that step
                writer.add_custom_scalars(self.layout)
        return writer

    def _files(self) -> list[Path]:
        """Event files in the order in which TensorBoard reads them."""
        return sorted(Path(self.log_dir).glob(f"{EVENTS}*"))

    def _keep_order(self) -> None:
        """Let the files before the next one come before it. Their names begin with the time and end with a number, as
        text: where a clock was set back, or the tenth or hundredth writer of a process comes within a second of the
        one before it, TensorBoard would drop what is written from now on."""
        files = self._files()
        if files and files[-1].name >= f"{EVENTS}{int(time.time()):010d}":
            for number, file in enumerate(files):
                rest = file.name.removeprefix(EVENTS).partition(".")[2]
                file.rename(file.with_name(f"{EVENTS}{number:010d}.{rest}"))

    @rank_zero_only
    def log_hyperparams(
        self,
        params: dict[str, Any] | Namespace,
        metrics: dict[str, Any] | None = None,
        step: int | None = None,
    ) -> None:
        """Remember them for hparams.yaml and show them in the tab HPARAMS, once, beside `val/loss`."""
        super().log_hyperparams(params, metrics, step)
        if self._declared or metrics:
            return
        experiment, start, _ = self._hparams()
        self._add(experiment, start)
        self._declared = True

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """All numbers of a call in one event: one for each takes twenty times as long."""
        values = [Summary.Value(tag=name, simple_value=float(value)) for name, value in metrics.items()]
        if values:
            self.experiment._get_file_writer().add_summary(Summary(value=values), step)

    @rank_zero_only
    def resume_from_step(self, step: int) -> None:
        """TensorBoard leaves out what a process that died had written of `step` and later: it comes again."""
        if self._files():
            self._kwargs["purge_step"] = step

    @rank_zero_only
    def flush(self) -> None:
        """Everything that was logged so far is in the event file."""
        if self._experiment is not None:
            self._experiment.flush()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the files. Only success ends the session in HPARAMS: TensorBoard keeps the first end that it reads,
        and a failed run may be resumed in this folder."""
        if self._declared and not self._ended and status == "success":
            self._add(self._hparams()[2])
            self._ended = True
        super().finalize(status)

    def _hparams(self) -> tuple[Any, Any, Any]:
        """Declaration, start and end of the session, as TensorBoard's summaries."""
        return hparams(flatten(dict(self.hparams)), {JUDGED_BY: None})

    def _add(self, *summaries: Any) -> None:
        writer = self.experiment._get_file_writer()
        for summary in summaries:
            writer.add_summary(summary)
