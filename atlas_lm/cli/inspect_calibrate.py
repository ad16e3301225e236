"""Thresholds of flags from what a model writes after clean text: python -m atlas_lm inspect calibrate run=stage1"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from atlas_lm.checkpoints.io import read_checkpoint
from atlas_lm.cli.arguments import parse
from atlas_lm.cli.inspect_subject import COMMAND, THRESHOLDS, bar, check_subject, layers_of, open_subject
from atlas_lm.files import write_atomically
from atlas_lm.inspection.calibrate import QUANTILE, calibrate
from atlas_lm.inspection.capture import Plan
from atlas_lm.inspection.subject import Subject, clean_reports
from atlas_lm.runs.load import load_data
from atlas_lm.runs.resolve import resolve_checkpoint, resolve_run


@dataclass
class Calibration:
    """Thresholds of a model's flags: quantiles over what it writes after clean text."""

    run: str = ""
    """Run folder or experiment of ours, after whose held-out text it writes; or give model= and text=."""
    model: str = ""
    """Folder of a model of transformers."""
    gguf: str = ""
    """File of quantised weights in that folder."""
    text: str = ""
    """File of clean text, for model=."""
    texts: int = 64
    """Pieces of text to write after."""
    prompt_tokens: int = 128
    """Tokens of the longest prompts; others are a quarter, half and three quarters as long."""
    tokens: int = 64
    """Tokens to write; as many as in the generations that are to be inspected, and likewise for what follows."""
    temperature: float = 0.8
    """0: always the likeliest token."""
    top_k: int = 50
    """Tokens to draw from."""
    capture: str = "full"
    """full, sampled or off."""
    layers: str = "all"
    """Layers to capture."""
    quantile: float = 0.99
    """Share of clean texts on which each flag stays silent."""
    out: str = ""
    """File to write; inspection/thresholds.json in the run folder, or here, if none is given."""
    outputs: str = "outputs"
    """Folder of all runs."""

    def __post_init__(self) -> None:
        check_subject(self.run, self.model, self.gguf)
        if self.model and not self.text:
            raise ValueError("text= is missing: a file of clean text for the model to read")
        if self.texts < 8 or self.prompt_tokens < 1 or self.tokens < 1:
            raise ValueError(
                f"texts={self.texts} must be at least 8, prompt_tokens={self.prompt_tokens} and tokens={self.tokens} "
                "at least 1"
            )


def main(arguments: list[str]) -> None:
    """Write the file. ValueError: bad arguments, or too little text."""
    o = parse(Calibration, arguments, f"{COMMAND} calibrate")
    plan = Plan(o.tokens, o.temperature, o.top_k, capture=o.capture, layers=layers_of(o.layers))
    if not 0.5 <= o.quantile < 1:
        raise ValueError(f"quantile={o.quantile} must be in [0.5, 1), such as {QUANTILE}")
    subject, home = open_subject(o)
    texts = clean_texts(o, subject, o.prompt_tokens)
    with bar() as progress:
        task = progress.add_task("texts", total=len(texts))
        reports = clean_reports(subject, texts, plan, o.prompt_tokens, lambda: progress.advance(task))
    thresholds = calibrate(reports, o.quantile)
    path = Path(o.out) if o.out else home / THRESHOLDS
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, thresholds.model_dump_json(indent=1) + "\n")
    print(f"wrote {path}: thresholds from {len(texts)} texts of {o.tokens} tokens, each silent on {o.quantile:.0%}")


def clean_texts(o: Calibration, subject: Subject, tokens: int) -> list[str]:
    """Pieces of clean text, spread over all there is. ValueError: there is too little."""
    if o.model:
        raw = Path(o.text).read_text(encoding="utf-8")
    else:
        folder = resolve_run(o.run, o.outputs)
        data = load_data(folder, read_checkpoint(resolve_checkpoint(o.run, o.outputs), lazily=True))
        raw = (data.held_out_bytes() or b"").decode("utf-8", "replace")
    return pieces_of(raw, subject, o.texts, tokens)


def pieces_of(raw: str, subject: Subject, texts: int, tokens: int) -> list[str]:
    """So many pieces of at least so many tokens, from places spread evenly. ValueError: the text is too short."""
    sample = raw[: 64 * tokens]
    per_token = len(sample) / max(1, len(subject.encode(sample))) if sample else 1.0
    length = int(per_token * tokens * 1.25) + 4
    if len(raw) < texts * length:
        raise ValueError(
            f"{len(raw):,} characters of clean text are too few for texts={texts} of {tokens} tokens: about "
            f"{texts * length:,} are needed; lower texts= or tokens="
        )
    apart = (len(raw) - length) // max(1, texts - 1)
    found = []
    for i in range(texts):
        piece = raw[i * apart : i * apart + length]
        while len(subject.encode(piece)) < tokens and i * apart + len(piece) < len(raw):
            piece = raw[i * apart : i * apart + 2 * len(piece)]
        found.append(piece)
    return found
