"""A callback that writes down which sequences each rank trains on, and their loss."""

import json
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import lightning


class SeenBatches(lightning.Callback):
    """Appends to `folder`/<rank>.jsonl: the step, the number of ranks, a hash of each sequence, their mean loss."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        rows = [blake2b(row.cpu().numpy().tobytes(), digest_size=8).hexdigest() for row in batch["input_ids"]]
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps([trainer.global_step, trainer.world_size, rows, float(outputs["loss"])]) + "\n")


class Step(NamedTuple):
    """What all ranks trained on together."""

    rows: list[str]  # in the order of the data
    loss: float


def seen(folder: Path) -> dict[int, Step]:
    """By optimizer step."""
    found: dict[int, dict[int, tuple[list[str], float]]] = {}
    for path in folder.glob("*.jsonl"):
        for line in path.read_text().splitlines():
            step, ranks, rows, loss = json.loads(line)
            assert int(path.stem) < ranks
            found.setdefault(step, {})[int(path.stem)] = rows, loss
    steps = {}
    for step, parts in sorted(found.items()):
        assert sorted(parts) == list(range(len(parts)))
        ranks = [parts[rank] for rank in sorted(parts)]
        rows = [row for together in zip(*(rows for rows, _ in ranks), strict=True) for row in together]
        steps[step] = Step(rows, sum(loss for _, loss in ranks) / len(ranks))
    return steps
