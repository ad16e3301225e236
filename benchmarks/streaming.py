"""What a corpus larger than memory costs to read while training: python -m benchmarks.streaming

Writes documents of random lines of the standard library as JSON lines in two folders, 9 : 1, then reads both at once
through `data.source.streaming` and `data=mix`, in a process that does nothing else: its speed, and the most memory that
it ever had. Another process resumes from the state of the middle and has to see the same batches.
--tokenizer bytes, or python for the subwords that come with the program. --stdlib mixes with the standard library, as a
whole in memory, in place of the second folder.
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
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from atlas_lm.data.stream_loader import StreamLoader

PART = 100_000_000  # bytes of a file
CHUNK = 1_000_000  # bytes of a file that are read at once
SHARES = {"large": 9, "small": 1}
LENGTH, BATCH = 1024, 8
AFTER = 200  # batches that are compared after the resume


def write_corpus(folder: Path, size: int, seed: int) -> int:
    """Files of about `size` bytes in all; bytes of text."""
    from atlas_lm.data.stdlib import StdlibSource

    lines = [line for d in StdlibSource("bytes").documents() for line in d.raw.decode(errors="ignore").splitlines()]
    draw, written, text = random.Random(seed), 0, 0
    for part in range(-(-size // PART)):
        with (folder / f"train-{part:03d}.jsonl").open("w") as file:
            while written < min(size, (part + 1) * PART):
                start = draw.randrange(len(lines) - 400)
                document = "\n".join(lines[start : start + draw.randrange(20, 400)]) + f"\n# {draw.random()}"
                written += file.write(json.dumps({"text": document}) + "\n")
                text += len(document.encode())
    return text


def reader(folder: str, tokenizer: str, stdlib: bool) -> StreamLoader:
    """Batches of the mixture."""
    from atlas_lm.data.hf import HuggingFaceSource
    from atlas_lm.data.mix import MixSource
    from atlas_lm.data.stdlib import StdlibSource
    from atlas_lm.data.stream_loader import StreamLoader

    def streamed(name: str) -> HuggingFaceSource:
        return HuggingFaceSource(
            f"{folder}/{name}", streaming=True, tokenizer=tokenizer, held_out_documents=1000, chunksize=CHUNK
        )

    sources = {"large": streamed("large"), "small": StdlibSource(tokenizer) if stdlib else streamed("small")}
    mixture = MixSource({name: {"source": sources[name], "weight": share} for name, share in SHARES.items()})
    return StreamLoader(mixture.stream(LENGTH, seed=0), BATCH, ranks=1, rank=0)


def peak() -> int:
    """The most memory that this process has had; bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def worker(folder: str, tokenizer: str, stdlib: bool, kept: str, resumed: bool) -> None:
    """Read everything once, or the batches after the middle; what was found as JSON."""
    import datasets  # noqa: F401  # as the sources do
    import torch

    imports = peak()
    loader = reader(folder, tokenizer, stdlib)
    if resumed:
        loader.load_state_dict(torch.load(kept, weights_only=True))
        digest = blake2b(digest_size=16)
        for batch in islice(loader, AFTER):
            digest.update(batch["input_ids"].numpy().tobytes())
        print(json.dumps({"digest": digest.hexdigest()}))
        return
    start, batches, middle = time.perf_counter(), 0, None
    digest = blake2b(digest_size=16)
    half = sum(file.stat().st_size for file in Path(folder, "large").iterdir()) // 10_000_000  # a block: 1 to 5 MB
    for batch in loader:
        batches += 1
        part = loader.state_dict()["stream"]["parts"][0]
        if middle is None and part["number"] == half:
            torch.save(loader.state_dict(), kept)
            middle = batches
        elif middle is not None and batches <= middle + AFTER:
            digest.update(batch["input_ids"].numpy().tobytes())
        if part["time"] > 0:
            break
    assert "lightning" not in sys.modules
    print(json.dumps({
        "batches": batches, "seconds": time.perf_counter() - start, "middle": middle, "digest": digest.hexdigest(),
        "peak_bytes": peak(), "imports_bytes": imports, "state_bytes": Path(kept).stat().st_size,
    }))  # fmt: skip


def main() -> None:
    """Write, read, resume, and say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--tokenizer", default="bytes")
    parser.add_argument("--stdlib", action="store_true")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        folder, kept, how = options.worker
        worker(folder, options.tokenizer, options.stdlib, kept, how == "resumed")
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "corpus"
        text = 0
        for seed, (part, share) in enumerate(SHARES.items()):
            (folder / part).mkdir(parents=True)
            text += write_corpus(folder / part, int(options.gigabytes * 1e9 * share / sum(SHARES.values())), seed)
        found = {}
        for how in ("whole", "resumed"):
            command = [sys.executable, "-m", "benchmarks.streaming", "--tokenizer", options.tokenizer]
            command += ["--stdlib"] * options.stdlib + ["--worker"]
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
