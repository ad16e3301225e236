"""Tokenize a corpus once and write it to shards for `data=tokens`.

    python -m atlas_lm prepare source=stdlib out=shards/stdlib
    python -m atlas_lm prepare source=text files='[corpus/**/*.txt]' out=shards/mine tokenizer=bpe vocab_size=4096

    source       stdlib, text or hf; further keys are the source's own (conf/data/<source>.yaml explains them)
    out          folder to write to
    tokenizer    bytes (default), the path of a tokenizer.json, or bpe: trained on the training split
    vocab_size   ids of a bpe tokenizer
    block_mb     raw text per shard of a split, MB (default 64); a block is what a killed run has to repeat

The same command after a kill continues where it stopped, and the result has the same bytes as an uninterrupted run.
After it has finished, the same command reads the corpus again, and says whether it still is the one in the shards.
"""

from collections.abc import Sequence

from atlas_lm.cli.arguments import HELP
from atlas_lm.cli.source_arguments import parse_arguments
from atlas_lm.data.prepare import prepare
from atlas_lm.data.tokens import read_index


def main(words: Sequence[str]) -> None:
    """Write the shards, print what they hold. ValueError: bad arguments, or a corpus that cannot be used."""
    if not words or words[0] in HELP:
        print(__doc__)
        return
    folder = prepare(**parse_arguments(words, prepare))
    for split, entry in read_index(folder)["splits"].items():
        print(f"{split}: {entry['tokens']} tokens, {entry['bytes']} bytes")
