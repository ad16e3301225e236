"""A model for other people's tools, and back.

python -m atlas_lm export run=stage1 to=hf out=my-model          # for Hugging Face transformers
python -m atlas_lm export run=my-model to=run out=outputs/theirs/1   # such a folder as a run folder of ours
python -m atlas_lm export run=stage1 to=checkpoint out=outputs/whole/1   # a checkpoint whose shards become one file
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from atlas_lm.cli.arguments import parse

KINDS = ("hf", "run", "checkpoint")


@dataclass
class Options:
    """A trained model for Hugging Face transformers (to=hf), such a folder as a run folder of ours (to=run), or a
    run's newest checkpoint, shards and all, as one file in a run folder (to=checkpoint)."""

    run: str
    """Run folder, experiment or checkpoint; for to=run the folder that to=hf wrote."""
    out: Path
    """New folder to write to."""
    to: str = "hf"
    """hf, run or checkpoint."""
    outputs: str = "outputs"
    """Folder of all runs."""

    def __post_init__(self) -> None:
        if self.to not in KINDS:
            raise ValueError(f"to={self.to} must be one of {', '.join(KINDS)}")


def main(arguments: list[str]) -> None:
    """Write and say where. ValueError: bad arguments, no such run, or a folder that has files."""
    options = parse(Options, arguments, "python -m atlas_lm export")
    from atlas_lm.exchange.export import consolidate, export, import_back  # torch takes seconds

    if options.to == "run":
        path = import_back(Path(options.run), options.out)
        print(f"wrote {path}: init_from={options.out}, or generate and evaluate with run={options.out}")
        return
    if options.to == "checkpoint":
        print(f"wrote {consolidate(options.run, options.out, options.outputs)}")
        return
    checkpoint = export(options.run, options.out, options.outputs)
    print(f"wrote {checkpoint} as {options.out}")
    print(f'AutoModelForCausalLM.from_pretrained("{options.out}", trust_remote_code=True) reads it')
