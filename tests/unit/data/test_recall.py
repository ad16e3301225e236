import pytest
import torch

from atlas_lm.data.datamodule import TokenDataModule
from atlas_lm.data.interfaces import Source
from atlas_lm.data.recall import RecallSource


def test_every_answer_is_scored_once_and_further_back_than_two_windows() -> None:
    source = RecallSource(num_pairs=16, num_symbols=128, window=16, samples=50)
    assert isinstance(source, Source)
    dataset = source.dataset("train", None)
    assert dataset.seq_len == 4 * 16 + 32
    for i in range(len(dataset)):
        sample = dataset[i]
        tokens, targets = sample["input_ids"].tolist(), sample["targets"].tolist()
        pairs = {tokens[j]: (j, tokens[j + 1]) for j in range(0, 32, 2)}
        assert len(pairs) == 16
        asked = [t for t, target in enumerate(targets) if target != -100]
        assert sorted(tokens[t] for t in asked) == sorted(pairs)
        for t in asked:
            where, value = pairs[tokens[t]]
            assert targets[t] == value == tokens[t + 1]
            assert t - (where + 1) >= 2 * 16
        assert all(0 <= key < 64 for key in pairs)
        assert all(64 <= value < 128 for _, value in pairs.values())
        assert all(128 <= token < source.vocab_size for token in tokens[32:64])
        assert sample["document_start"].tolist() == [True] + [False] * 95
    assert dataset.scored_tokens([0, 1]) == 32


def test_samples_depend_on_seed_split_and_index_alone() -> None:
    a, b = RecallSource(seed=1), RecallSource(seed=1)
    assert torch.equal(a.dataset("train", None)[7]["input_ids"], b.dataset("train", None)[7]["input_ids"])
    others = [
        a.dataset("train", None)[8],
        a.dataset("validation", None)[7],
        RecallSource(seed=2).dataset("train", None)[7],
    ]
    for other in others:
        assert not torch.equal(a.dataset("train", None)[7]["input_ids"], other["input_ids"])
    assert a.dataset("train", None).fingerprint() == b.dataset("train", None).fingerprint()
    assert a.dataset("train", None).fingerprint() != RecallSource(seed=2).dataset("train", None).fingerprint()


def test_values_are_uniform_so_that_chance_is_exact() -> None:
    source = RecallSource(num_pairs=4, num_symbols=8, samples=2000)
    values = torch.stack([source.dataset("train", None)[i]["targets"] for i in range(2000)])
    counts = values[values != -100].bincount()[4:8]
    assert source.chance == 1 / 4
    assert (counts.double() / counts.sum() - 0.25).abs().max() < 0.02
    # Independent too: were they all different, earlier answers would tell the later ones.
    different = [len(set(row[row != -100].tolist())) for row in values]
    assert abs(different.count(4) / 2000 - 24 / 256) < 0.03


def test_queries_come_in_another_order_than_the_pairs() -> None:
    dataset = RecallSource(num_pairs=3, samples=600).dataset("train", None)
    orders = set()
    for i in range(len(dataset)):
        tokens = dataset[i]["input_ids"].tolist()
        orders.add(tuple(tokens[:6:2].index(key) for key in tokens[-6::2]))
    assert len(orders) == 6


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_pairs": 0}, "num_pairs=0 must be at least 1"),
        ({"samples": 0}, "samples=0 must be at least 1"),
        ({"num_symbols": 7}, "num_symbols=7 must be even"),
        ({"num_pairs": 65}, "num_pairs=65 needs as many different keys: num_symbols ≥ 130"),
        ({"gap": 31}, "gap=31 is below two windows: raise it to 32"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
    ],
)
def test_sizes_are_checked(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RecallSource(**sizes)


def test_length_is_derived_padded_or_refused() -> None:
    assert RecallSource(gap=100).dataset("train", None).seq_len == 164
    assert RecallSource().dataset("train", 256)[0]["input_ids"].shape == (256,)
    with pytest.raises(ValueError, match=r"seq_len=95 does not fit.*at least 96 tokens; set data.seq_len=96"):
        RecallSource().dataset("train", 95)
    with pytest.raises(ValueError, match=r"seq_len=165 does not fit.*set data.seq_len=164"):
        RecallSource(gap=100).dataset("train", 165)


def test_datamodule_knows_that_it_is_no_text() -> None:
    dm = TokenDataModule(RecallSource(samples=8, validation_samples=10), batch_size=4, val_sequences=5)
    assert dm.tokenizer is None
    assert dm.vocab_size == 160
    assert dm.held_out_bytes() is None
    assert dm.validation_bytes is None
    assert dm.bytes_per_token() is None
    assert dm.validation_tokens == 5 * 16
    assert dm.seq_len == 96
    assert [batch["targets"].shape for batch in dm.train_dataloader()] == [(4, 96)] * 2
