"""Exact resume: the batches after a checkpoint are the ones that an uninterrupted run would have seen."""

from itertools import chain
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from atlas_lm.data.datamodule import TokenDataModule
from atlas_lm.data.loader import EpochSampler, ResumableLoader
from atlas_lm.data.recall import RecallSource
from tests.support.pairwise import every_pair
from tests.support.two_ranks import run_on_two_ranks, shared_folder

SAMPLES, BATCH = 50, 4  # 12 full batches, 2 samples left out

# Lightning advises more workers and calls what torch deprecates; fork beside threads is deprecated in Python 3.12.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning"),
]


def source(samples: int = SAMPLES, **changes: int) -> RecallSource:
    sizes = {"num_pairs": 2, "num_symbols": 32, "window": 2, "samples": samples, "validation_samples": 4}
    return RecallSource(**{**sizes, **changes})


def datamodule(workers: int = 0, **changes: Any) -> TokenDataModule:
    return TokenDataModule(**{"source": source(), "batch_size": BATCH, "num_workers": workers, **changes})


def loader(ranks: int = 1, rank: int = 0, batch_size: int = BATCH, seed: int = 0, data=None) -> ResumableLoader:
    dataset = data or source().dataset("train", None)
    sampler = EpochSampler(dataset, ranks, rank, seed)
    return ResumableLoader(dataset, batch_size=batch_size, sampler=sampler, drop_last=True)


def tokens(batch: dict[str, torch.Tensor]) -> list[list[int]]:
    return batch["input_ids"].tolist()


def epochs(train: ResumableLoader, count: int) -> list[list[list[list[int]]]]:
    return [[tokens(batch) for batch in train] for _ in range(count)]


@every_pair(seen=[0, 1, 5, 11, 12, 13, 30], before=[0, 2], after=[0, 2])
def test_the_rest_is_identical(seen: int, before: int, after: int) -> None:
    asked = seen
    whole = list(chain(*epochs(datamodule(0).train_dataloader(), 4)))
    first = datamodule(before).train_dataloader()
    while seen:
        for batch in first:
            assert tokens(batch) == whole.pop(0)
            seen -= 1
            if not seen:
                break
    state = first.state_dict()
    del first
    second = datamodule(after).train_dataloader()
    second.load_state_dict(state)
    assert second.state_dict()["batches"] == state["batches"] % 12
    for _ in range(2):
        for batch in second:
            assert tokens(batch) == whole.pop(0)
    assert len(whole) == 24 - 12 * (asked // 12)


def test_each_epoch_is_another_order_of_the_same_samples() -> None:
    one, two, other = (datamodule(seed=seed).train_dataloader() for seed in (3, 3, 4))
    a, b, c = epochs(one, 3), epochs(two, 3), epochs(other, 3)
    assert a == b
    orders = [str(epoch) for epoch in (*a, *c)]
    assert len(set(orders)) == 6  # neither is seed 3's second epoch seed 4's first one
    for epoch in a:
        samples = [str(sample) for batch in epoch for sample in batch]
        assert len(set(samples)) == len(samples) == 48


def test_set_epoch_chooses_the_epoch() -> None:
    train = datamodule().train_dataloader()
    orders = epochs(train, 3)
    train.sampler.set_epoch(1)
    assert epochs(train, 2) == orders[1:]


@pytest.mark.long
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_the_batches_of_one_rank(ranks: int) -> None:
    alone = [tokens(batch) for batch in loader(batch_size=8)]
    shares = [[tokens(batch) for batch in loader(ranks, rank, 8 // ranks)] for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    for step, batch in enumerate(alone):
        assert sorted(batch) == sorted(sample for share in shares for sample in share[step])


def test_a_checkpoint_of_two_ranks_resumes_on_one() -> None:
    alone = [tokens(batch) for batch in loader(batch_size=8)]
    pair = [loader(2, rank, 4) for rank in range(2)]
    for train in pair:
        iterator = iter(train)
        for _ in range(3):
            next(iterator)
    states = [train.state_dict() for train in pair]
    assert states[0] == states[1]  # only rank 0's reaches the checkpoint
    resumed = loader(batch_size=8)
    resumed.load_state_dict(states[0])
    assert [tokens(batch) for batch in resumed] == alone[3:]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seed": 1}, r"seed was 0 in the checkpointed run and is 1 now; set data\.seed back"),
        ({"batch_size": 8}, r"global_batch_size was 4 .* and is 8 now; set data\.batch_size times the number of ranks"),
        ({"ranks": 2}, "global_batch_size was 4 .* and is 8 now"),
        ({"data": source(60).dataset("train", None)}, "sequences was 50 .* and is 60 now; use the same corpus"),
        ({"data": source(seed=1).dataset("train", None)}, "data was .* use the same corpus, tokenizer"),
    ],
)
def test_another_order_is_refused(other: dict[str, Any], message: str) -> None:
    state = loader().state_dict()
    with pytest.raises(ValueError, match=message):
        loader(**other).load_state_dict(state)


def test_another_permutation_and_foreign_states_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    state = loader().state_dict()
    with pytest.raises(ValueError, match="not of ResumableLoader"):
        loader().load_state_dict({"_snapshot": {}})
    monkeypatch.setattr(EpochSampler, "permutation", lambda self, epoch: torch.arange(50).numpy())
    with pytest.raises(ValueError, match=r"order was .* use the numpy version of the first run"):
        loader().load_state_dict(state)


# Inside Lightning


class Recorder(lightning.LightningModule):
    """Keeps every training batch that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[list[list[int]]] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.seen.append(tokens(batch))
        return self.weight.sum() * batch["targets"].sum()

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit(folder: Path, resume: Path | None = None, workers: int = 0, **options: Any) -> list[list[list[int]]]:
    module = Recorder()
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, max_epochs=3, num_sanity_val_steps=0, **options,
    )  # fmt: skip
    trainer.fit(module, datamodule=datamodule(workers), ckpt_path=resume, weights_only=True)
    return module.seen


@pytest.mark.parametrize(
    ("options", "per_epoch"),
    [({}, 12), ({"limit_train_batches": 7}, 7), ({"val_check_interval": 5}, 12), ({"accumulate_grad_batches": 5}, 12)],
    ids=str,
)
def test_lightning_resumes_exactly_from_every_checkpoint(tmp_path: Path, options: Any, per_epoch: int) -> None:
    every_step = ModelCheckpoint(tmp_path / "steps", filename="{epoch}-{step}", every_n_train_steps=1, save_top_k=-1)
    at_epoch_end = ModelCheckpoint(
        tmp_path / "epochs", filename="{epoch}-{step}", save_on_train_epoch_end=True, save_top_k=-1
    )
    after_validation = ModelCheckpoint(
        tmp_path / "validations", filename="{epoch}-{step}", save_on_train_epoch_end=False, save_top_k=-1, mode="max"
    )
    whole = fit(tmp_path, callbacks=[every_step, at_epoch_end, after_validation], **options)
    assert len(whole) == 3 * per_epoch
    checkpoints = sorted(tmp_path.glob("*/*.ckpt"))
    assert len(checkpoints) > 8
    for path in checkpoints:
        state = torch.load(path, weights_only=True)["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]
        seen = state["epoch"] * per_epoch + state["batches"]
        rest = fit(tmp_path, path, enable_checkpointing=False, **options)
        assert rest == whole[seen:], (path, state)


def test_lightning_with_workers(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=8, save_top_k=-1)
    whole = fit(tmp_path, callbacks=[saver], workers=2)
    assert fit(tmp_path, tmp_path / "step=16.ckpt", workers=2, enable_checkpointing=False) == whole[16:]


@pytest.mark.filterwarnings("ignore:You requested to overfit:UserWarning")
@pytest.mark.filterwarnings("ignore:You are using `overfit_batches`:UserWarning")
def test_overfit_batches_runs_but_is_not_resumed(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    seen = fit(tmp_path, overfit_batches=2, callbacks=[saver])
    assert seen[:2] == seen[2:4]
    with pytest.raises(ValueError, match=r"not_resumable.*overfit_batches"):
        fit(tmp_path, tmp_path / "step=4.ckpt")
    with pytest.raises(ValueError, match="overfit_batches replaces the sampler"):
        fit(tmp_path, tmp_path / "step=4.ckpt", overfit_batches=2)


def on_two_ranks(injected: bool) -> dict[str, list[list[int]]]:
    """What this rank sees of a whole run and of the same one resumed in the middle."""
    folder, seen = shared_folder() / f"injected_{injected}", {}
    for name, resume in (("whole", None), ("resumed", folder / "step=4.ckpt")):
        saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        module = Recorder()
        trainer = lightning.Trainer(
            accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, logger=False, callbacks=[saver],
            enable_progress_bar=False, use_distributed_sampler=injected, num_sanity_val_steps=0,
        )  # fmt: skip
        trainer.fit(module, datamodule=datamodule(), ckpt_path=resume)
        seen[name] = module.seen
    return seen


def with_injection() -> dict[str, list[list[int]]]:
    return on_two_ranks(True)


def without_injection() -> dict[str, list[list[int]]]:
    return on_two_ranks(False)


@pytest.fixture(scope="module")
def ranks() -> dict[bool, list[dict[str, list[list[int]]]]]:
    return dict(zip((True, False), run_on_two_ranks(with_injection, without_injection), strict=True))


@pytest.mark.long
@pytest.mark.parametrize("injected", [True, False])
def test_two_ranks_in_lightning(ranks: dict[bool, list[dict[str, list[list[int]]]]], injected: bool) -> None:
    """With use_distributed_sampler on and off: the samplers stay ours, and each rank continues exactly."""
    first, second = ranks[injected]
    alone = list(chain(*epochs(loader(batch_size=8), 2)))
    for step, batch in enumerate(alone):
        assert sorted(batch) == sorted(first["whole"][step] + second["whole"][step])
    for rank in (first, second):
        assert rank["resumed"] == rank["whole"][4:]
