"""Embed the passages of a text with a sentence-transformers model, once, for `data=embeddings`.

    python -m atlas_lm embed source=text files='[speeches/*.txt]' out=embeddings/speeches model=all-MiniLM-L6-v2

source       stdlib, text or hf; further keys are the source's own (conf/data/<source>.yaml explains them):
             validation_fraction and test_fraction are the shares of documents that are held out
out          folder to write to
model        folder or name of a sentence-transformers model (pip install 'atlas-lm[latent]')
unit         what becomes a frame: paragraph (default, blank lines between), line or sentence
min_chars    characters below which a passage is joined to the next (default 40)
max_chars    characters above which a passage is cut after sentences (default 1000)
block        passages embedded before they are written (default 512): what a killed run has to repeat
batch        passages that the model reads at a time (default 32)

The same command after a kill or Ctrl-C continues where it stopped, and the result has the same bytes as an
uninterrupted run. The split is by document. The model's hash is kept: vectors of another one are refused.
"""

import sys
from collections.abc import Sequence

from atlas_lm.cli.arguments import HELP
from atlas_lm.cli.source_arguments import parse_arguments
from atlas_lm.latent.embed import AUDIT, embed


def main(words: Sequence[str]) -> None:
    """Write the vectors, print the audit. ValueError: bad arguments, or a text that cannot be used."""
    if not words or words[0] in HELP:
        print(__doc__)
        return
    arguments = parse_arguments(words, embed)
    if not arguments.get("model"):
        raise ValueError("model= is missing: give the folder or the name of a sentence-transformers model")
    try:
        written = embed(**arguments)
    except KeyboardInterrupt:
        print("the same command continues where it stopped", file=sys.stderr)
        raise
    for split, frames in written.frames.items():
        documents = written.audit.held_out_documents.get(split)
        print(f"{split}: {frames} frames{'' if documents is None else f' of {documents} documents'}")
    if written.cut_short:
        print(f"{written.cut_short} passages are longer than the model reads, their ends are lost: lower max_chars")
    print(written.audit.line())
    for alarm in written.audit.alarms():
        print(f"warning: {alarm}")
    print(f"{written.folder / AUDIT}")
