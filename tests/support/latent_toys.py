"""Embedded documents whose next vector can be known, small enough to train on in seconds."""

from pathlib import Path
from typing import Any

import numpy as np

DIM, CONTEXT = 16, 5


def turning_documents(
    documents: int = 40, frames: int = 24, dim: int = DIM, seed: int = 0, noise: float = 0.1
) -> list[np.ndarray]:
    """Each has a topic, and beside it a vector that one rotation, the same for all, turns from frame to frame."""
    rotation = np.linalg.qr(np.random.default_rng(7).standard_normal((dim, dim)))[0]
    rng, found = np.random.default_rng(seed), []
    for _ in range(documents):
        topic, z = unit(rng.standard_normal(dim)), unit(rng.standard_normal(dim))
        rows = []
        for _ in range(frames):
            rows.append(unit(topic + z))
            z = unit(rotation @ z + noise * unit(rng.standard_normal(dim)))
        found.append(np.stack(rows).astype(np.float32))
    return found


def unit(x: Any) -> Any:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def windows(documents: list[np.ndarray], context: int = CONTEXT) -> dict[str, np.ndarray]:
    """As an npz has them."""
    contexts, targets, ids, indices = [], [], [], []
    for number, rows in enumerate(documents):
        for at in range(context, len(rows)):
            contexts.append(rows[at - context : at])
            targets.append(rows[at])
            ids.append(number)
            indices.append(at)
    return {
        "contexts": np.stack(contexts), "targets": np.stack(targets), "document_ids": np.array(ids),
        "target_indices": np.array(indices),
    }  # fmt: skip


def write_npz(path: Path, documents: list[np.ndarray] | None = None, **changes: Any) -> Path:
    """An npz of windows; `changes`: arrays in place of others, None: without that one."""
    arrays = windows(turning_documents() if documents is None else documents) | changes
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return path
