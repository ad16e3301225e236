"""Our token shards beside LitData's: python -m benchmarks.litdata_shards (needs pip install litdata)

The same random tokens as shards of either kind; then, of both: sequences a second through the loader of one process,
and whether a loader of another number of ranks, at the same global batch, continues with the sequences that were next.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from atlas_lm.data.loader import EpochSampler, ResumableLoader
from atlas_lm.data.packed import PackedDataset, TokenStream
from atlas_lm.data.tokens import ShardedArray

LENGTH, GLOBAL_BATCH = 1024, 8
PARTS, PART_TOKENS = 16, 4_000_000


def part_of(number: int) -> np.ndarray:
    """The tokens of a shard."""
    return np.random.default_rng(number).integers(0, 50_000, PART_TOKENS, dtype=np.uint16)


def rows(batch: Any) -> list[list[int]]:
    """The first tokens of each sequence, which tell them apart."""
    tokens = batch["input_ids"] if isinstance(batch, dict) else batch
    return tokens[:, :8].tolist()


def ours(folder: Path, ranks: int, rank: int) -> ResumableLoader:
    """Written where there is nothing yet."""
    paths = [folder / f"{number}.tokens" for number in range(PARTS)]
    for number, path in enumerate(paths):
        if not path.exists():
            path.write_bytes(part_of(number).tobytes())
    stream = TokenStream(ShardedArray(paths, "uint16"), 50_000, 0, "random")
    dataset = PackedDataset(stream, LENGTH, "train")
    sampler = EpochSampler(dataset, ranks, rank, 0)
    return ResumableLoader(dataset, batch_size=GLOBAL_BATCH // ranks, sampler=sampler, drop_last=True)


def tokens_of(number: int) -> Iterable[torch.Tensor]:
    yield torch.from_numpy(part_of(number).astype(np.int32))


def theirs(folder: Path, ranks: int, rank: int) -> Any:
    """Likewise."""
    import litdata
    from litdata.streaming.item_loader import TokensLoader
    from litdata.utilities.env import _DistributedEnv

    loader = TokensLoader(block_size=LENGTH + 1)
    if not any(folder.iterdir()):
        litdata.optimize(
            tokens_of, list(range(PARTS)), str(folder), chunk_bytes="64MB", num_workers=1, item_loader=TokensLoader()
        )
    dataset = litdata.StreamingDataset(str(folder), item_loader=loader, shuffle=True, drop_last=True, seed=0)
    dataset.distributed_env = _DistributedEnv(ranks, rank, 1)
    return litdata.StreamingDataLoader(dataset, batch_size=GLOBAL_BATCH // ranks, num_workers=0)


def speed(loader: Any, count: int) -> float:
    """Sequences a second."""
    iterator = iter(loader)
    next(iterator)
    start = time.perf_counter()
    found = sum(1 for _ in islice(iterator, count))
    return found * GLOBAL_BATCH / (time.perf_counter() - start)


def continues(make: Any, folder: Path, before: int, after: int, batches: int = 20) -> str:
    """Whether `after` ranks see what `before` ranks would have seen next."""
    first = [make(folder, before, rank) for rank in range(before)]
    wanted: set[str] = set()
    state = None
    for loader in first:
        iterator = iter(loader)
        list(islice(iterator, batches))
        if state is None:
            state = loader.state_dict()
        wanted |= {str(row) for batch in islice(iterator, batches) for row in rows(batch)}
    found: set[str] = set()
    try:
        for rank in range(after):
            loader = make(folder, after, rank)
            loader.load_state_dict(state)
            found |= {str(row) for batch in islice(iter(loader), batches) for row in rows(batch)}
    except Exception as error:
        return f"refused: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"
    return f"{len(found & wanted)} of {len(wanted)} sequences are those that were next"


def main() -> None:
    """Write, read, and say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=4000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        ways = {"ours": ours, "LitData": theirs}
        folders = {way: Path(name) / way for way in ways}
        for way, make in ways.items():
            folders[way].mkdir()
            make(folders[way], 1, 0)
        speeds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(3):
            for way, make in ways.items():
                speeds[way].append(speed(make(folders[way], 1, 0), options.batches))
        for way, make in ways.items():
            print(f"{way:8} {sorted(speeds[way])[1]:10,.0f} sequences of {LENGTH} tokens a second")
            for before, after in ((1, 1), (2, 1), (1, 2)):
                print(f"{way:8} {before} → {after} ranks: {continues(make, folders[way], before, after)}")


if __name__ == "__main__":
    main()
