"""Which corpus rewards context? What full attention gains from it, for each of several: python -m benchmarks.corpora

The twin without memory of `--experiment`, its window as long as the sequences, trains on each corpus for the
experiment's steps. Then the end of held-out sequences is predicted twice: seen with what two windows of the experiment
reach, and with the whole sequence. The fall of the loss is what the corpus offers a memory at this budget. On needles
the answers alone are scored.

--text NAME=GLOB adds text files of one's own, as bytes and in subwords. Runs that have finished are not made again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from atlas_lm.evaluation.bootstrap import interval
from atlas_lm.evaluation.losses import losses
from atlas_lm.evaluation.subject import Subject
from atlas_lm.files import ROOT, write_atomically
from atlas_lm.model.probes import attention_reach
from benchmarks import worth

VOCABULARY = 2048  # subwords
DENSITIES = (2, 8, 24)  # needles in a sequence
SIZES = ("data.seq_len=1024", "data.batch_size=2")  # the same for all


class Corpus(NamedTuple):
    """Settings of the data, and what a tokenizer for it is trained on; None: bytes."""

    settings: tuple[str, ...] = ()
    subwords_of: tuple[str, ...] | None = None


def candidates(texts: dict[str, str]) -> dict[str, Corpus]:
    """By name: what needs no download, then the given texts (name → glob)."""
    found = {
        "standard library, bytes": Corpus((*SIZES, "data.source.tokenizer=bytes")),
        "standard library, subwords": Corpus(SIZES, ("source=stdlib",)),
    }
    for n in DENSITIES:
        # short statements of one digit, so that the densest fit
        needles = ("data=needles", f"data.source.needles={n}", "data.source.digits=1", *SIZES)
        found[f"standard library with {n} needles, bytes"] = Corpus(needles)
    for name, pattern in texts.items():
        settings = ("data=text", f"data.source.files=['{pattern}']", *SIZES)
        found[f"{name}, bytes"] = Corpus((*settings, "data.val_sequences=64"))
        found[f"{name}, subwords"] = Corpus(
            (*settings, "data.val_sequences=64"), ("source=text", f"files=['{pattern}']")
        )
    return found


def tokenizer_settings(name: str, corpus: Corpus, out: Path) -> list[str]:
    """A tokenizer trained on the corpus, once."""
    if corpus.subwords_of is None:
        return []
    folder = out / "tokenizers" / worth.slug(name)
    if not (folder / "tokenizer.json").is_file():
        command = [sys.executable, "-m", "atlas_lm", "prepare", *corpus.subwords_of, f"out={folder}", "tokenizer=bpe",
                   f"vocab_size={VOCABULARY}"]  # fmt: skip
        subprocess.run(command, check=True, cwd=ROOT, stdout=sys.stderr)
    return [f"data.source.tokenizer={folder / 'tokenizer.json'}"]


@torch.no_grad()
def offered(run: str, window: int, sequences: int) -> dict[str, Any]:
    """Nats per scored token of the last `window` ones, with what two windows reach, and with the whole sequence."""
    subject = Subject(run)
    length = subject.trained_length
    text = subject.text(length, sequences)
    reach = window + attention_reach(subject.model.config, window)
    near, whole = (losses(subject.model, text.last(c), lambda _: None, window) for c in (reach, length))
    return {"reach": reach, "length": length, "loss": interval(whole), "gain": interval(near - whole)}


def table(found: dict[str, Any]) -> str:
    """Markdown, the largest gain first."""
    lines = [
        "| corpus | context gain of full attention, nats per scored token | loss of the scored tokens | "
        "bits per byte | steps |",
        "|---|---|---|---|---|",
    ]
    for name, row in sorted(found.items(), key=lambda item: -item[1]["gain"][0]):
        mean, low, high = row["gain"]
        bits = row["bits_per_byte"]
        lines.append(
            f"| {name} | {mean:+.4f} [{low:+.4f}, {high:+.4f}] | {row['loss'][0]:.3f} | "
            f"{'' if bits is None else f'{bits:.3f}'} | {row['steps']:,} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Train what is missing, then print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", default="stage1")
    parser.add_argument("--text", nargs="*", default=[], metavar="NAME=GLOB")
    parser.add_argument("--sequences", type=int, default=160)
    parser.add_argument("--rate", type=float, default=2.0, help="times the experiment's learning rates")
    parser.add_argument("--only", nargs="+", help="names that begin so")
    parser.add_argument("--out", type=Path, default=Path("outputs/corpora"))
    parser.add_argument("--set", nargs="*", default=[], dest="extra", help="settings of all runs")
    options = parser.parse_args(arguments)
    if wrong := [text for text in options.text if "=" not in text]:
        parser.error(f"--text {wrong[0]} must be NAME=GLOB, such as novels=texts/*.txt")
    out = options.out.absolute()
    (out / "runs").mkdir(parents=True, exist_ok=True)
    path = out / "corpora.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    for name, corpus in candidates(dict(text.split("=", 1) for text in options.text)).items():
        if options.only and not name.startswith(tuple(options.only)):
            continue
        extra = [*corpus.settings, *tokenizer_settings(name, corpus, out), *options.extra]
        s = worth.setting(options.experiment, extra, False, out)
        report = worth.train(s, "full attention", s.steps, options.rate, 0, name)
        found[name] = {
            **offered(report["run"], s.window, options.sequences),
            "bits_per_byte": report["val_bits_per_byte"],
            "steps": report["steps"],
        }
        write_atomically(path, json.dumps(found, indent=1) + "\n")
    text = table(found)
    print(text)
    write_atomically(out / "corpora.md", f"{text}\n")


if __name__ == "__main__":
    main()
