"""Decisions on chunk sizes, as conf/decisions/ records them, for the model of small runs."""

from typing import Any

DECIDED = {"model": "tiny_deep", "dim": 16, "layers": 1, "heads": 2, "head_dim": 8}


def decided(chunks: Any, rate: Any = 99, **changes: Any) -> dict[str, Any]:
    return {**DECIDED, "local_chunks": chunks, "tokens_per_second": rate, **changes}
