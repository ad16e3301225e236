"""Write docs/reference from the code: python -m benchmarks.reference

Settings come from the dataclasses of atlas_lm/config/schema.py, the comments in conf/ and the callbacks' docstrings;
commands from their own --help; the run folder and the metrics from the tables below, which
tests/integration/test_reference.py compares with a small run.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import io
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

import callbacks
from atlas_lm.__main__ import COMMANDS, usage
from atlas_lm.cli.arguments import help_of
from atlas_lm.config import model, schema
from atlas_lm.files import ROOT, write_atomically

CONF = ROOT / "conf"
FOLDER = ROOT / "docs" / "reference"
WRITTEN = "<!-- written by python -m benchmarks.reference: change the code, not this page -->"
SUBCOMMANDS = {
    "gates": ("phase2", "phase4", "chunk_sizes"),
    "latent": ("five_cat",),
    "inspect": ("calibrate", "compare", "dashboard"),
}

RUN_FOLDER = {  # pattern below the run folder → what it is
    "report.json": "the verdict on the run, for programs: status, losses, bits per byte beside gzip and xz, tokens/s, "
    "times, counts of rollbacks and skipped steps, paths",
    "report.md": "the same for people",
    "metrics.jsonl": "one object for each logged step; see [metrics](metrics.md)",
    "metrics.cut.jsonl": "rows that a killed process had written beyond the checkpoint from which the run was resumed",
    "tensorboard/events.out.tfevents.*": "the same values; gate histograms, the needle's heat map, a text sample at "
    "each validation",
    "tensorboard/hparams.yaml": "written by Lightning's logger",
    "checkpoints/step-*.ckpt": "a state of the whole run, by steps and minutes (`callbacks.step_checkpoint`)",
    "checkpoints/last.ckpt": "a link to the newest of them",
    "checkpoints/snapshot-*.ckpt": "the states that a rollback can return to (`callbacks.spike_rollback`)",
    "checkpoints/interrupted.ckpt": "the state at the step in which a signal came (`callbacks.interrupt`)",
    "checkpoints/*.abandoned*": "checkpoints of a timeline that a rollback has left",
    "checkpoints/manifest.json": "size, SHA-256 and position of every checkpoint; one that differs is not resumed",
    "config.yaml": "every setting as resolved; its presence makes a folder a run folder",
    "config.*.yaml": "the settings of before a resume that changed some",
    "environment.json": "git state, package versions, machine, command",
    "environment.*.json": "those of before a resume",
    "run.json": "the run's number in its experiment, and the overrides that it was started with; runs are ordered by "
    "this number",
    "tokenizer.json": "the run's own copy of its tokenizer; none for bytes",
    "train.log": "what was logged",
    "five_cat*": "what `python -m atlas_lm latent five_cat` found: tables, values and a picture",
    "exit_gates.json": "what `python -m atlas_lm gates` measured, by phase",
    "calibration.json": "the threshold that `python -m atlas_lm calibrate` derived",
    "calibration.png": "the histogram of the deltas that it stands on",
    ".hydra/*.yaml": "written by Hydra: configuration before it is resolved, overrides",
    ".lock": "held by the process that writes to the folder; the kernel lets it go, however the process ends",
}


class Metric(NamedTuple):
    """A row of the metrics page."""

    unit: str
    meaning: str
    by: str
    """The module or the callback that logs it."""
    when: str
    """Every step; at an interval; or the event that it reports, after which a healthy run does not have it."""


STEP, PROBE, CHECK, VALIDATION = "logging steps", "at probes", "at evaluations", "validations"
EVENT = "when it happens"
EMBEDDINGS = "with data=embeddings"
INSPECTED = "with +inspect=generation"
METRICS = {
    "train/loss": Metric("nats per token", "mean loss of the batch", "module", STEP),
    "train/ppl": Metric("", "its exponential", "module", STEP),
    "train/polarisation": Metric("", "mean of 1 − abs(2g − 1) over the gates; 0 where all are open or closed",
                                 "module", "where its weight is above 0"),
    "train/global_step": Metric("optimizer steps", "steps of this timeline; goes back at a rollback", "module", STEP),
    "optim/lr": Metric("", "learning rate of the last parameter group", "module", STEP),
    "optim/grad_norm": Metric("", "2-norm of all gradients before clipping", "module", STEP),
    "perf/tokens_per_second": Metric("tokens/s", "over all ranks, since the last step", "module", STEP),
    "perf/checkpoint_stall_seconds": Metric("s", "training waited for the last save", "step_checkpoint", EVENT),
    "val/loss": Metric("nats per token", "mean loss of the validation text", "module", VALIDATION),
    "val/ppl": Metric("", "its perplexity", "module", VALIDATION),
    "val/bits_per_byte": Metric("bits", "the same per byte of text", "module", "validations on text"),
    "recall/accuracy": Metric("share", "right answers", "module", "validations on data=recall"),
    "memory/norm/layer_<i>": Metric("", "norm of W − W_init of block i after a shard of validation text", "module",
                                    "validations"),
    "gate_monitor/mean": Metric("", "mean of the gates of the last training step", "gate_monitor", CHECK),
    "gate_monitor/std": Metric("", "their standard deviation", "gate_monitor", CHECK),
    "gate_monitor/polarised": Metric("share", "gates below `low` or above `high`", "gate_monitor", CHECK),
    "chunk_size_scheduler/chunk_size": Metric("tokens", "largest local chunk", "chunk_size_scheduler", STEP),
    "memory_contribution/perplexity_rise": Metric("share", "rise of the held-out perplexity when "
        "the memory's output is zeroed; 0.2 is "
                                  "20 %", "memory_contribution", PROBE),
    "memory_horizon/gain": Metric("nats per token", "what the memory's past beyond attention's reach is worth to the "
                                  "end of held-out sequences", "memory_horizon", PROBE),
    "memory_horizon/gain_low": Metric("nats per token", "lower end of its interval of 95 %", "memory_horizon", PROBE),
    "memory_horizon/gain_high": Metric("nats per token", "upper end of it", "memory_horizon", PROBE),
    "memory_horizon/horizon": Metric("tokens", "how far back 95 % of the gain comes from", "memory_horizon", PROBE),
    "memory_horizon/step": Metric("optimizer steps", "when that was measured", "memory_horizon", PROBE),
    "memory_contribution/step": Metric("optimizer steps", "when that was measured", "memory_contribution", PROBE),
    "niah_probe/accuracy": Metric("cosine", "of the needle and what is retrieved for its "
        "key, mean over layers, memories, "
                            "heads and needles", "niah_probe", PROBE),
    "niah_probe/accuracy/layer_<i>": Metric("cosine", "the same for block i", "niah_probe", PROBE),
    "niah_probe/control": Metric("cosine", "the same with the needle not written: about 0", "niah_probe", PROBE),
    "niah_probe/retained": Metric("cosine", "with the gates that the model opens for text", "niah_probe", PROBE),
    "niah_probe/overhead_percent": Metric("%", "share of the training time that probes took", "niah_probe", PROBE),
    "niah_probe/step": Metric("optimizer steps", "when the needle was probed", "niah_probe", PROBE),
    "spike_rollback/ppl": Metric("", "perplexity of the fixed held-out batch", "spike_rollback", CHECK),
    "spike_rollback/ema": Metric("", "its moving average before this evaluation", "spike_rollback", CHECK),
    "spike_rollback/ppl_delta": Metric("share", "its rise above that average; 0.05 is 5 %", "spike_rollback", CHECK),
    "spike_rollback/threshold": Metric("share", "the rise that is a spike", "spike_rollback", CHECK),
    "spike_rollback/count": Metric("", "spikes so far", "spike_rollback", STEP),
    "spike_rollback/rollbacks": Metric("", "rollbacks so far", "spike_rollback", STEP),
    "spike_rollback/timeline": Metric("", "number of the timeline, the rollbacks so far", "spike_rollback", STEP),
    "optim/clip_threshold": Metric("", "gradient norm that clipping allows", "proactive_clipping", STEP),
    "proactive_clipping/transitions": Metric("", "changes of the chunk size so far", "proactive_clipping", STEP),
    "proactive_clipping/clips": Metric("", "steps so far whose gradient was clipped", "proactive_clipping", STEP),
    "loss_weight_schedule/<name>": Metric("", "weight of an auxiliary loss", "loss_weight_schedule", STEP),
    "nonfinite_guard/skipped_steps": Metric("", "steps dropped for NaN or infinity so far", "nonfinite_guard", EVENT),
    "generation_health/<figure>": Metric("", "of the inspector's summary, the mean over its prompts: `summary` of "
                                         "[the report](inspection-report.md)", "generation_health", INSPECTED),
    "generation_health/flags": Metric("", "flags that were raised, over all prompts", "generation_health", INSPECTED),
    "generation_health/step": Metric("optimizer steps", "when that was measured", "generation_health", INSPECTED),
    "generation_health/overhead_percent": Metric("%", "of the time of training", "generation_health", INSPECTED),
    "train/cosine": Metric("cosine", "of each prediction and the next frame, mean of the batch", "module", EMBEDDINGS),
    "val/cosine": Metric("cosine", "the same over the validation frames; val/loss is 1 less it", "module", EMBEDDINGS),
    "val/contrastive_accuracy": Metric("share", "of the document's other frames that lie farther from the prediction "
                                       "than the next one; chance 1/2", "module", EMBEDDINGS),
    "val/recall_at_<k>": Metric("share", "of predictions whose next frame is among the nearest k of its document",
                                "module", EMBEDDINGS),
    "val/effective_rank": Metric("share", "effective rank of the predictions over that of the frames; small is a "
                                 "collapse", "module", EMBEDDINGS),
    "val/spread": Metric("share", "variance per dimension over that of the frames", "module", EMBEDDINGS),
    "last_frame/<measure>": Metric("", "the same of the last frame in place of a prediction", "module", EMBEDDINGS),
    "latent/alpha": Metric("", "α of the residual head", "module", EMBEDDINGS),
    "latent/guard_ratio": Metric("share", "gradient norm of all guards together over the main loss's, before the cap",
                                 "module", EMBEDDINGS),
    "latent/guard_scale": Metric("", "what the cap multiplies it by", "module", EMBEDDINGS),
    "five_cat_probe/cosine": Metric("cosine", "of predictions and the next frame, on the probe's rows",
                                    "five_cat_probe", EMBEDDINGS),
    "five_cat_probe/peak": Metric("frames", "offset of the frame that predictions are nearest to, over `among`; 1 is "
                                  "the next one", "five_cat_probe", EMBEDDINGS),
    "five_cat_probe/margin": Metric("cosine", "by how much the next frame is nearer than any other of `among`",
                                    "five_cat_probe", EMBEDDINGS),
    "five_cat_probe/peak_seen": Metric("frames", "the offset over −3 … +3", "five_cat_probe", EMBEDDINGS),
    "five_cat_probe/margin_seen": Metric("cosine", "the margin over −3 … +3", "five_cat_probe", EMBEDDINGS),
    "five_cat_probe/drift": Metric("", "1 where the test finds drift", "five_cat_probe", EMBEDDINGS),
    "outlier_guard/outliers": Metric("", "steps dropped for an outlying loss so far", "outlier_guard", EVENT),
    "weight_integrity/corruptions": Metric("", "changes outside the optimizer so far", "weight_integrity", EVENT),
    "epoch": Metric("epochs", "logged by Lightning", "Lightning", STEP),
}  # fmt: skip
COLUMNS = {  # of a row of metrics.jsonl, beside the fields named after metrics and the metrics themselves
    "seq": "number of the row in the file, over all processes that wrote to it",
    "step": "Lightning's logging step: it only grows",
    "global_step": "optimizer steps of this timeline: it goes back at a rollback",
    "timeline": "counts the rollbacks",
    "time": "Unix seconds",
    "nonfinite": "names of the metrics of this row that are NaN or infinite and stand as null",
}

CONFIG_INTRO = """
Every setting can be given on the command line: `python train.py +experiment=stage1 optim.lr=1e-3`. `conf/train.yaml` is
the table of contents. A misspelled key, a missing value and a value outside its range are refused before anything is
built. What a resumed run does with a changed setting: [resume and clusters](../resume-and-clusters.md).
"""
CALLBACKS_INTRO = """
Each safeguard is on because it is in the configuration; `~callbacks.<name>` removes one. What each of them does:
[safeguards](../safeguards.md).
"""
FOLDER_INTRO = """
A run writes to `outputs/<experiment>/<timestamp>/`. `outputs/<experiment>/latest` links to the newest finished run, and
`run=<experiment>` means it. Runs are ordered by their number in `run.json`: no clock, time zone or copy changes which
of them is the newest. Every file is whole or absent, also after a power cut.
"""
METRICS_INTRO = """
TensorBoard and `metrics.jsonl` get the same values under the same names. A metric that reports an event is absent from
a healthy run.
"""
ROWS_INTRO = """
A row has these columns, then a fixed set of fields (null where the step did not log one), then every metric of the step
by its name.
"""
REPORT_INTRO = """
`report.json`, as `python -m atlas_lm inspect` writes it. `Number` is a float or null, `Column` a list of them, `Table`
a list of columns. `summary` has one number for each figure, over the generated tokens; `inspect compare` shows it.
"""
COMMANDS_END = """
A command ends with 0, with 1 and one line that says what to put right, or with 130 after Ctrl-C. `gates` ends with 1
when a gate fails.
"""
TRAIN = (
    (
        "`python train.py +experiment=stage1`",
        "train an experiment of `conf/experiment`; settings follow as `key=value`",
    ),
    ("`python train.py +experiment=stage1 resume=auto`", "resume the newest run of the experiment, or begin one"),
    ("`python train.py +experiment=stage2 init_from=stage1`", "begin a new run from the weights of another"),
    ("`python train.py -m +experiment=stage2 +sweep=chunk_sizes name=chunks`", "a sweep: a run for each combination"),
    ("`python train.py +experiment=stage1 --cfg job`", "print the composed configuration and end"),
    ("`python train.py --help`", "Hydra's own options"),
)
EXIT_CODES = (
    ("0", "finished"),
    ("1", "failed, or stopped by a safeguard or by Ctrl-C; one line says why, the report too"),
    ("75", "SIGTERM or SIGUSR1: saved between two steps; run it again with `resume=auto`"),
    ("130", "Ctrl-C before training"),
)


def rows_of(header: str, rows: list[tuple[str, ...]]) -> str:
    """A Markdown table; `header`: its column names, separated by |."""
    names = header.split("|")
    lines = [" | ".join(names), "|".join("---" for _ in names), *(" | ".join(map(escaped, row)) for row in rows)]
    return "\n".join(f"| {line} |" if "---" not in line[:3] else f"|{line}|" for line in lines)


def escaped(cell: str) -> str:
    """On one line, without what would end the cell."""
    return re.sub(r"(?<!\\)\|", r"\|", " ".join(cell.split()))


def code(value: Any) -> str:
    """A value as the configuration has it."""
    if value is None:
        return "`null`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`" if value != "" else ""


class Entry(NamedTuple):
    """A setting in a file of conf/."""

    key: str
    """Dotted, below the file's group."""
    value: str
    comment: str


def entries(path: Path) -> list[Entry]:
    """The settings of a YAML file with their comments; no defaults lists, targets or items of lists."""
    found: list[Entry] = []
    stack: list[tuple[int, str]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        match = re.match(r"( *)(\w+):(?: +(.*?))??(?: *# (.*))?$", line)
        if not match or line.lstrip().startswith("#"):
            continue
        depth, key, value, comment = len(match[1]), match[2], match[3] or "", match[4] or ""
        stack = [(d, k) for d, k in stack if d < depth]
        if key.startswith("_") or key == "defaults":
            continue
        if value:
            found.append(Entry(".".join([*(k for _, k in stack), key]), value, comment))
        stack.append((depth, key))
    return found


def head_comment(path: Path) -> str:
    """The comment that a file begins with."""
    lines = path.read_text(encoding="utf-8").splitlines()
    head = [line[2:] for line in lines[: next((i for i, x in enumerate(lines) if not x.startswith("#")), 0)]]
    return " ".join(line for line in head if not line.startswith("@package"))


def kind_of(f: Any) -> str:
    """The type of a field in words, with its choices or its range."""
    choices = f.metadata.get("choices")
    if choices:
        return " ".join(code(name) for name in choices)
    kind = f.type if isinstance(f.type, type) and not get_args(f.type) else str(f.type)
    name = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
    low, high = f.metadata.get("minimum"), f.metadata.get("maximum")
    limits = [f"{sign} {limit:g}" for sign, limit in (("≥", low), ("≤", high)) if limit is not None]
    return ", ".join([name.replace("str", "text"), *limits])


def dataclass_table(config: type, values: Any, prefix: str) -> str:
    """The fields of a dataclass with the default that conf/ gives them."""
    rows: list[tuple[str, ...]] = []
    for f in fields(config):
        if is_dataclass(f.type) or f.name in ("module", "data", "trainer", "logger", "callbacks"):
            continue
        default = values.get(f.name, f.default)
        rows.append((code(f"{prefix}{f.name}"), kind_of(f), code(default), help_of(config, f)))
    return rows_of("setting|type|default|meaning", rows)


def file_table(path: Path, prefix: str) -> str:
    """The settings of a file of conf/."""
    return rows_of(
        "setting|default|meaning", [(code(f"{prefix}{e.key}"), code(e.value), e.comment) for e in entries(path)]
    )


@contextlib.contextmanager
def hydra_of(conf: Path = CONF) -> Iterator[None]:
    """Hydra, ready to compose."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf), version_base="1.3"):
        yield


def callback_section(path: Path) -> list[str]:
    """A callback of conf/callbacks: its class, what its constructor takes, the defaults of both."""
    node = OmegaConf.load(path)
    (name,) = (str(key) for key in node)
    target = str(node[name]["_target_"])
    module, _, class_name = target.rpartition(".")
    kind = getattr(importlib.import_module(module), class_name)
    assert class_name in callbacks.__all__, f"{class_name} is not exported by callbacks/__init__.py"
    given = {e.key.removeprefix(f"{name}."): e for e in entries(path)}
    rows: list[tuple[str, ...]] = []
    for parameter in list(inspect.signature(kind).parameters.values()):
        entry = given.get(parameter.name)
        value = entry.value if entry else parameter.default
        nested = [e for key, e in given.items() if key.startswith(f"{parameter.name}.")]
        if nested:
            value, comment = "{" + ", ".join(f"{e.key.rpartition('.')[2]}: {e.value}" for e in nested) + "}", ""
        else:
            comment = entry.comment if entry else ""
        required = value is inspect.Parameter.empty
        rows.append((code(f"callbacks.{name}.{parameter.name}"), "" if required else code(value), comment))
    about = inspect.getdoc(kind) or ""
    parts = [f"### {name}", "", f"`{target}`: {' '.join(about.split())}", ""]
    return parts + ([rows_of("setting|default|meaning", rows), ""] if rows else [])


def config_page() -> str:
    """docs/reference/config.md."""
    with hydra_of():
        cfg = OmegaConf.to_container(compose("train"), resolve=False)
        assert isinstance(cfg, dict)
        models = []
        for path in sorted(CONF.glob("model/[!_]*.yaml")):
            m = compose("train", [f"model={path.stem}"]).model
            models.append(
                tuple(str(m[key]) for key in ("name", "dim", "layers", "heads", "window", "local_chunks", "shard"))
            )
    models.sort(key=lambda m: int(m[1]) * int(m[2]))
    parts = [
        "# Configuration", "", WRITTEN, "",
        CONFIG_INTRO.strip(),
        "", "## Top level", "", dataclass_table(schema.TrainConfig, cfg, ""),
        "", "## paths", "", dataclass_table(schema.PathsConfig, cfg["paths"], "paths."),
        "", "## model", "", "Defaults are those of `model=tiny`.", "",
        dataclass_table(model.ModelConfig, cfg["model"], "model."), "",
        rows_of("model=|dim|layers|heads|window|local chunks|shard", models),
        "", "## module", "",
    ]  # fmt: skip
    for path in sorted(CONF.glob("module/*.yaml")):
        table = file_table(path, "module.")
        parts += [f"`module={path.stem}`: {head_comment(path)}", "", *([table, ""] if "module." in table else [])]
    parts += [
        "## optim", "", "Defaults are those of `optim=adamw`.", "",
        dataclass_table(schema.OptimConfig, cfg["optim"], "optim."), "", "## data", "",
    ]  # fmt: skip
    for path in sorted(CONF.glob("data/*.yaml")):
        parts += [f"### data={path.stem}", "", head_comment(path), "", file_table(path, "data."), ""]
    parts += ["## trainer", "", "The arguments of Lightning's Trainer. " + head_comment(CONF / "trainer/cpu.yaml"), ""]
    parts += [file_table(CONF / "trainer/cpu.yaml", "trainer."), ""]
    for path in sorted(CONF.glob("trainer/*.yaml")):
        if path.stem != "cpu":
            parts += [f"`trainer={path.stem}`:", "", "```yaml", path.read_text(encoding="utf-8").strip(), "```", ""]
    parts += ["## logger", "", head_comment(CONF / "logger/default.yaml"), "", "```yaml"]
    parts += [(CONF / "logger/default.yaml").read_text(encoding="utf-8").strip(), "```", "", "## callbacks", ""]
    parts += [CALLBACKS_INTRO.strip(), ""]
    sets = sorted(p for p in CONF.glob("callbacks/*.yaml") if "_target_" not in p.read_text(encoding="utf-8"))
    with hydra_of():
        names = {p.stem: ", ".join(map(str, compose("train", [f"callbacks={p.stem}"]).callbacks)) for p in sets}
    order = ["default", *(p.stem for p in sets if p.stem != "default")]
    parts += [rows_of("callbacks=|in the order in which they run", [(code(n), names[n]) for n in order]), ""]
    for path in sorted(CONF.glob("callbacks/*.yaml")):
        if path not in sets:
            parts += callback_section(path)
    parts += ["## Experiments and sweeps", ""]
    chosen = [
        (f"+{p.parent.name}={p.stem}", head_comment(p))
        for g in ("experiment", "debug", "sweep")
        for p in sorted(CONF.glob(f"{g}/*.yaml"))
    ]
    parts += [rows_of("argument|what it is", [(code(name), about) for name, about in chosen])]
    return "\n".join(parts).strip() + "\n"


def help_text(name: str, *arguments: str) -> str:
    """What a command prints for --help."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        importlib.import_module(f"atlas_lm.cli.{name}").main([*arguments, "--help"])
    return out.getvalue().strip()


def commands() -> list[tuple[str, str]]:
    """The benchmarks that are commands, with the first sentence of what they say of themselves."""
    found = []
    for path in sorted((ROOT / "benchmarks").glob("[!_]*.py")):
        text = path.read_text(encoding="utf-8")
        if '__name__ == "__main__"' in text:
            about = (ast.get_docstring(ast.parse(text)) or "").partition("\n\n")[0]
            about = re.sub(r":? ?`?python -m benchmarks\.\S*( --?\S+| \[[^]]*\]| \S+\.json)*`?", "", about)
            found.append((code(f"python -m benchmarks.{path.stem}"), about))
    return found


def command_line_page() -> str:
    """docs/reference/command-line.md."""
    parts = ["# Command line", "", WRITTEN, "", "## Training", ""]
    parts += [rows_of("command|what it does", list(TRAIN)), ""]
    parts += [rows_of("exit code|of train.py", list(EXIT_CODES)), "", "## Commands", "", "```", usage(), "```", ""]
    for name in COMMANDS:
        parts += [f"### {name}", "", "```", help_text(name), "```", ""]
        for sub in SUBCOMMANDS.get(name, ()):
            parts += [f"`{name} {sub}`:", "", "```", help_text(name, sub), "```", ""]
    parts += [COMMANDS_END.strip(), "", "## Benchmarks", "", rows_of("command|what it does", commands())]
    return "\n".join(parts) + "\n"


def run_folder_page() -> str:
    """docs/reference/run-folder.md."""
    return "\n".join([
        "# The run folder", "", WRITTEN, "",
        FOLDER_INTRO.strip(), "",
        rows_of("file|what it is", [(code(name), what) for name, what in RUN_FOLDER.items()]),
    ]) + "\n"  # fmt: skip


def metrics_page() -> str:
    """docs/reference/metrics.md."""
    from atlas_lm.loggers.jsonl import FIELDS

    metrics = [(code(name), m.unit, m.meaning, m.by, m.when) for name, m in METRICS.items()]
    return "\n".join([
        "# Metrics", "", WRITTEN, "",
        METRICS_INTRO.strip(), "",
        rows_of("metric|unit|meaning|logged by|when", metrics), "",
        "## A row of metrics.jsonl", "",
        ROWS_INTRO.strip(), "",
        rows_of("column|meaning", [(code(name), what) for name, what in COLUMNS.items()]), "",
        rows_of("field|the metric", [(code(name), code(metric)) for name, metric in FIELDS.items()]),
    ]) + "\n"  # fmt: skip


def report_page() -> str:
    """docs/reference/inspection-report.md, from the classes and comments of the schema."""
    path = ROOT / "atlas_lm" / "inspection" / "schema.py"
    text = path.read_text(encoding="utf-8")
    lines, tree = text.splitlines(), ast.parse(text)
    parts = ["# The report of an inspection", "", WRITTEN, "", " ".join((ast.get_docstring(tree) or "").split()), ""]
    parts += [REPORT_INTRO.strip(), ""]
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    for node in sorted(classes, key=lambda node: node.name != "Report"):  # the whole first
        rows = [
            (code(ast.unparse(field.target)), ast.unparse(field.annotation).replace("|", "or"),
             lines[(field.end_lineno or 0) - 1].partition("  # ")[2])
            for field in node.body if isinstance(field, ast.AnnAssign)
        ]  # fmt: skip
        parts += [f"## {node.name}", "", ast.get_docstring(node) or "", "", rows_of("field|type|meaning", rows), ""]
    return "\n".join(parts).strip() + "\n"


PAGES = {
    "config.md": config_page,
    "command-line.md": command_line_page,
    "run-folder.md": run_folder_page,
    "metrics.md": metrics_page,
    "inspection-report.md": report_page,
}


def main() -> None:
    """Write all pages."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, page in PAGES.items():
        write_atomically(FOLDER / name, page())
        print(f"wrote {(FOLDER / name).relative_to(ROOT)}")


if __name__ == "__main__":
    main()
