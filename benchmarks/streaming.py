"""What a corpus larger than memory costs to read while training: python -m benchmarks.streaming

Writes documents of random lines of the standard library as JSON lines, then reads all of them once through
`data.source.streaming`, mixed 9 : 1 with the standard library, in a process that does nothing else: its speed, and the
most memory that it ever had. Another process resumes from the state of the middle and has to see the same batches.
--tokenizer bytes, or python for the subwords that come with the program.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

PART = 100_000_000  # bytes of a file
LENGTH, BATCH = 1024, 8
AFTER = 200  # batches that are compared after the resume


def write_corpus(folder: Path, size: int) -> int:
    """Files of about `size` bytes in all; bytes of text."""
    from atlas_lm.data.stdlib import StdlibSource

    lines = [line for d in StdlibSource("bytes").documents() for line in d.raw.decode(errors="ignore").splitlines()]
    draw, written, text = random.Random(0), 0, 0
    for part in range(-(-size // PART)):
        with (folder / f"train-{part:03d}.jsonl").open("w") as file:
            while written < min(size, (part + 1) * PART):
                start = draw.randrange(len(lines) - 400)
                document = "\n".join(lines[start : start + draw.randrange(20, 400)]) + f"\n# {draw.random()}"
                written += file.write(json.dumps({"text": document}) + "\n")
                text += len(document.encode())
    return text


def data(folder: str, tokenizer: str) -> Any:
    """The mixture."""
    from atlas_lm.data.datamodule import TokenDataModule
    from atlas_lm.data.hf import HuggingFaceSource
    from atlas_lm.data.mix import MixSource
    from atlas_lm.data.stdlib import StdlibSource

    large = HuggingFaceSource(folder, streaming=True, tokenizer=tokenizer, held_out_documents=1000)
    sources = {"large": {"source": large, "weight": 9}, "stdlib": {"source": StdlibSource(tokenizer), "weight": 1}}
    return TokenDataModule(MixSource(sources), batch_size=BATCH, seq_len=LENGTH)


def peak() -> int:
    """The most memory that this process has had; bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def worker(folder: str, tokenizer: str, kept: str, resumed: bool) -> None:
    """Read everything once, or the batches after the middle; what was found as JSON."""
    import datasets  # noqa: F401  # as the sources do
    import lightning  # noqa: F401
    import torch

    imports = peak()
    loader = data(folder, tokenizer).train_dataloader()
    if resumed:
        loader.load_state_dict(torch.load(kept, weights_only=True))
        digest = blake2b(digest_size=16)
        for batch in islice(loader, AFTER):
            digest.update(batch["input_ids"].numpy().tobytes())
        print(json.dumps({"digest": digest.hexdigest()}))
        return
    start, batches, middle = time.perf_counter(), 0, None
    digest = blake2b(digest_size=16)
    for batch in loader:
        batches += 1
        part = loader.state_dict()["stream"]["parts"][0]
        if middle is None and part["number"] == 200:
            torch.save(loader.state_dict(), kept)
            middle = batches
        elif middle is not None and batches <= middle + AFTER:
            digest.update(batch["input_ids"].numpy().tobytes())
        if part["time"] > 0:
            break
    print(json.dumps({
        "batches": batches, "seconds": time.perf_counter() - start, "middle": middle, "digest": digest.hexdigest(),
        "peak_bytes": peak(), "imports_bytes": imports, "state_bytes": Path(kept).stat().st_size,
    }))  # fmt: skip


def main() -> None:
    """Write, read, resume, and say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--tokenizer", default="bytes")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker[0], options.tokenizer, options.worker[1], options.worker[2] == "resumed")
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "corpus"
        folder.mkdir()
        text = write_corpus(folder, int(options.gigabytes * 1e9))
        found = {}
        for how in ("whole", "resumed"):
            command = [sys.executable, "-m", "benchmarks.streaming", "--tokenizer", options.tokenizer, "--worker"]
            done = subprocess.run(
                [*command, str(folder), f"{name}/state.pt", how], capture_output=True, text=True, check=False
            )
            if done.returncode:
                sys.exit(done.stderr)
            found[how] = json.loads(done.stdout.splitlines()[-1])
    whole = found["whole"]
    tokens = whole["batches"] * BATCH * LENGTH
    print(
        f"{text / 1e9:.2f} GB of text in {whole['seconds']:.0f} s: {text / 1e6 / whole['seconds']:.1f} MB/s, ", end=""
    )
    print(f"{tokens / whole['seconds']:,.0f} tokens/s with the mixture")
    added = whole["peak_bytes"] - whole["imports_bytes"]
    print(
        f"most memory of the process: {whole['peak_bytes'] / 1e6:.0f} MB, {added / 1e6:.0f} MB beyond imports; ", end=""
    )
    print(f"a checkpoint's share: {whole['state_bytes']:,} bytes")
    same = whole["digest"] == found["resumed"]["digest"]
    print(f"resumed after batch {whole['middle']:,}: the next {AFTER} batches are {'the same' if same else 'OTHERS'}")
    if not same:
        sys.exit(1)


if __name__ == "__main__":
    main()
