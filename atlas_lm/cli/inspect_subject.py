"""What the parts of `inspect` share: the model that is asked for, layers, a progress bar."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from atlas_lm.runs.load import load
from atlas_lm.runs.resolve import resolve_run

try:  # this is the first module of the command that needs the extra
    from atlas_lm.inspection.subject import AtlasSubject, Subject, load_hugging_face
except ImportError as error:
    if error.name is None or not error.name.startswith("pydantic"):
        raise
    raise ValueError("inspect needs pydantic: pip install 'atlas-lm[inspect]'") from error

COMMAND = "python -m atlas_lm inspect"
FOLDER, THRESHOLDS = "inspection", "thresholds.json"  # in a run folder


class NamesModel(Protocol):
    """Options that name a model."""

    run: str
    model: str
    gguf: str
    outputs: str


def check_subject(run: str, model: str, gguf: str = "") -> None:
    """ValueError unless one of the two is given, and a file of weights with the second alone."""
    if run and gguf:
        raise ValueError(f"gguf={gguf} is a file of model=, and run= has weights of its own: leave it out")
    if bool(run) == bool(model):
        raise ValueError("give run=<one of ours> or model=<folder of transformers>, one of them")


def layers_of(text: str) -> tuple[int, ...] | None:
    """ValueError: no whole numbers with commas between them."""
    if text == "all":
        return None
    if not all(part.isdigit() for part in text.split(",")):
        raise ValueError(f"layers={text} must be all, or numbers with commas between them, such as 0,3,5")
    return tuple(map(int, text.split(",")))


def open_subject(o: NamesModel) -> tuple[Subject, Path]:
    """The model, and the folder where its reports belong."""
    if o.model:
        return load_hugging_face(o.model, o.gguf), Path(FOLDER)
    model, tokenizer = load(o.run, o.outputs)
    folder = Path(o.run).parent.parent if Path(o.run).is_file() else resolve_run(o.run, o.outputs)
    return AtlasSubject(model, tokenizer, folder.parent.name), folder / FOLDER


def bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), transient=True
    )
