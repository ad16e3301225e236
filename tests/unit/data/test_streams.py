"""Streams: the n-th sequence is the same for any number of ranks and after any restart; shares, texts and errors."""

import io
import json
import re
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atlas_lm.data import streams
from atlas_lm.data.datamodule import TokenDataModule
from atlas_lm.data.hf import HuggingFaceSource
from atlas_lm.data.interfaces import Sample, SequenceDataset, split_of
from atlas_lm.data.loader import EpochSampler
from atlas_lm.data.mix import MixSource
from atlas_lm.data.needles import NeedlesSource
from atlas_lm.data.stdlib import StdlibSource
from atlas_lm.data.stream_loader import StreamLoader
from atlas_lm.data.streams import MixStream, SequenceStream, SetStream, TextStream
from atlas_lm.data.text import TextSource
from atlas_lm.data.tokenizers import ByteTokenizer
from tests.support import ROOT

LENGTH = 8
RANKS = (1, 2, 4, 8, 16, 32, 64)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "BLOCK_TOKENS", 16 * LENGTH)


class Lines:
    """A reader of documents that counts how often one was opened."""

    opened = 0

    def __init__(self, texts: list[str]) -> None:
        self.texts, self.place = texts, 0
        Lines.opened += 1

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> str:
        if self.place == len(self.texts):
            raise StopIteration
        self.place += 1
        return self.texts[self.place - 1]

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]


TEXTS = [f"document {i} " * (1 + i % 5) for i in range(23)] + [""]


def text_stream(texts: list[str] = TEXTS, seed: int = 3) -> TextStream:
    return TextStream(
        lambda: Lines(texts), lambda number, row: row.encode() or None, ByteTokenizer(), LENGTH, seed, "texts"
    )


class Numbers(SequenceDataset):
    """Item i holds i."""

    seq_len = LENGTH

    def __init__(self, count: int, first: int = 0) -> None:
        self.count, self.first = count, first

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        row = torch.full((LENGTH,), self.first + index)
        return {"input_ids": row, "targets": row, "document_start": row < 0}

    def fingerprint(self) -> str:
        return f"{self.count} {self.first}"

    def scored_tokens(self, indices: Any) -> int:
        return LENGTH * len(indices)

    def scored_bytes(self, indices: Any) -> bytes:
        return bytes(self.first + i for i in indices)


def mixed() -> MixStream:
    return MixStream({"text": (text_stream(), 3), "some": (SetStream(Numbers(5), 1), 1),
                      "more": (SetStream(Numbers(7, 100), 1), 2)})  # fmt: skip


MAKE: dict[str, Any] = {"set": lambda: SetStream(Numbers(7), 1), "text": text_stream, "mix": mixed}


def rows(samples: list[Sample]) -> list[list[int]]:
    return [sample["input_ids"].tolist() for sample in samples]


def saved(state: Any) -> Any:
    """As it comes back from a checkpoint."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("kind", MAKE)
def test_however_it_is_taken_it_is_the_same(kind: str) -> None:
    whole = rows(MAKE[kind]().take(200, range(200)))
    stream, found = MAKE[kind](), []
    for count in [1, 15, 17, 2, 65, 100]:
        found += rows(stream.take(count, range(count)))
    assert found == whole
    some = MAKE[kind]()
    some.take(3, [])
    assert rows(some.take(100, [1, 2, 50, 99])) == [whole[3 + n] for n in (1, 2, 50, 99)]


@pytest.mark.parametrize("kind", MAKE)
def test_resumed_anywhere_it_goes_on_exactly(kind: str) -> None:
    whole = rows(MAKE[kind]().take(120, range(120)))
    stream = MAKE[kind]()
    for n in range(0, 100, 7):
        again = MAKE[kind]()
        again.load_state_dict(saved(stream.state_dict()))
        assert rows(again.take(20, range(20))) == whole[n : n + 20]
        assert again.fingerprint() == stream.fingerprint()
        stream.take(7, [0])


def batches(stream: SequenceStream, ranks: int, count: int, state: Any = None, batch: int = 64) -> list[list[int]]:
    """`count` batches of all ranks, sequences in the order of the data; and the state of one of them, at the end."""
    loaders = [StreamLoader(MAKE["mix"](), batch // ranks, ranks, rank) for rank in range(ranks)]
    found: list[Any] = [[] for _ in range(count)]
    states = []
    for loader in loaders:
        if state is not None:
            loader.load_state_dict(saved(state))
        for place, one in zip(found, islice(iter(loader), count), strict=True):
            place.append(one["input_ids"].tolist())
        states.append(loader.state_dict())
    together = [[row for parts in zip(*of, strict=True) for row in parts] for of in found]
    return [together, states[0], states[-1]]


def test_up_to_64_ranks_see_the_same_and_take_over_from_each_other() -> None:
    whole = batches(mixed(), 1, 4)[0]
    for before, after in [(1, 64), (64, 1), (16, 2), (8, 32), (4, 64)]:
        first, state, last = batches(mixed(), before, 2)
        assert first == whole[:2]
        assert saved(state)["stream"]["taken"] == saved(last)["stream"]["taken"], "any rank's state serves all"
        assert batches(mixed(), after, 2, state)[0] == whole[2:]


def test_up_to_64_ranks_share_a_set_alike() -> None:
    """The epochs of a set that is not streamed."""
    dataset = Numbers(1000)
    for epoch in (0, 3):
        orders = []
        for ranks in RANKS:
            samplers = [EpochSampler(dataset, ranks, rank, 5) for rank in range(ranks)]
            for sampler in samplers:
                sampler.begin(epoch, 2 * 64 // ranks)  # after two batches of 64
            shares = [list(sampler)[: 10 * 64 // ranks] for sampler in samplers]
            orders.append([n for together in zip(*shares, strict=True) for n in together])
        assert len(orders[0]) == 640
        assert all(order == orders[0] for order in orders)


def test_every_text_comes_once_a_time_in_some_order() -> None:
    """Without the shuffling within a block the stream is documents and separators, one after another."""
    stream = text_stream()
    separator = ByteTokenizer().separator_id
    joined: list[int] = []
    while len(joined) < 3000:
        block = stream._loaded()
        stream._begin(block.after, 0)
        first = block.tokens[1:-1]
        joined += first.tolist()
        assert sorted(block.order) == list(range(16))
    wanted: list[int] = []
    while len(wanted) < len(joined):
        for text in TEXTS[:-1]:
            wanted += [*text.encode(), separator]
    assert joined == wanted[: len(joined)]


def test_targets_are_the_next_tokens_and_documents_start_after_separators() -> None:
    separator = ByteTokenizer().separator_id
    starts = 0
    for sample in text_stream().take(40, range(40)):
        assert torch.equal(sample["input_ids"][1:], sample["targets"][:-1])
        assert sample["document_start"][1:].tolist() == (sample["input_ids"][:-1] == separator).tolist()
        starts += int(sample["document_start"].sum())
    assert starts > 5


def test_a_reader_is_opened_once_for_all_blocks_of_a_time() -> None:
    Lines.opened = 0
    stream = text_stream([f"document {i} " * 4 for i in range(200)])
    stream.take(16 * 50, [16 * 50 - 1])
    assert Lines.opened == 1


def test_seeds_shuffle_otherwise() -> None:
    a, b = (rows(text_stream(seed=seed).take(16, range(16))) for seed in (1, 2))
    assert a != b
    assert sorted(a) == sorted(b), "a block holds the same"


def test_shares_are_the_weights_at_every_moment() -> None:
    stream, taken = mixed(), Counter[str]()
    for n, row in enumerate(rows(stream.take(600, range(600))), 1):
        one = len(set(row)) == 1
        taken["more" if one and row[0] >= 100 else "some" if one else "text"] += 1
        for name, share in (("text", 1 / 2), ("some", 1 / 6), ("more", 1 / 3)):
            assert abs(taken[name] - share * n) < 1.5
    assert taken == {"text": 300, "some": 100, "more": 200}


def test_no_text_is_no_endless_loop() -> None:
    for texts in ([], [""], ["", ""]):
        with pytest.raises(ValueError, match="holds no text to train on"):
            text_stream(texts).take(1, [0])


def test_what_the_thread_meets_is_raised_in_training() -> None:
    def broken(number: int, row: Any) -> bytes:
        if number == 20:
            raise ValueError("row 20 is damaged")
        return row.encode()

    stream = TextStream(lambda: Lines(TEXTS), broken, ByteTokenizer(), LENGTH, 0, "texts")
    found = []
    with pytest.raises(ValueError, match="row 20 is damaged"):
        found.extend(iter(StreamLoader(stream, 4, 1, 0)))


def test_other_rows_behind_the_same_name_are_refused() -> None:
    stream = text_stream()
    stream.take(1, [0])
    while len(stream._place.carry) > 100:  # a block of what was read before, and travels in the state
        stream.take(16, [15])
    state = saved(stream.state_dict())
    other = text_stream([text.upper() for text in TEXTS])
    other.load_state_dict(state)
    with pytest.raises(ValueError, match="is not what it was in the checkpointed run"):
        other.take(1, [0])
    same = text_stream()
    same.load_state_dict(state)
    same.take(40, [0, 39])


def test_another_numpy_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = SetStream(Numbers(7), 1)
    state = {**stream.state_dict(), "order": "another"}
    with pytest.raises(ValueError, match="order of the data is another one"):
        stream.load_state_dict(state)


def test_another_order_is_refused() -> None:
    loader = StreamLoader(mixed(), 4, 2, 0)
    state = loader.state_dict()
    with pytest.raises(ValueError, match=r"global_batch_size was 8 .* is 4 now; set data.batch_size"):
        StreamLoader(mixed(), 4, 1, 0).load_state_dict(state)
    with pytest.raises(ValueError, match=r"data was .* use the same corpus"):
        StreamLoader(text_stream(), 4, 2, 0).load_state_dict(state)
    with pytest.raises(ValueError, match="of a set of sequences"):
        loader.load_state_dict({"epoch": 0, "batches": 3})


# A mixture of sources


def test_held_out_text_has_the_same_shares(tmp_path: Path) -> None:
    from atlas_lm.data.mix import MixedDataset

    dataset = MixedDataset({"a": (Numbers(100), 1.0), "b": (Numbers(30, 100), 3.0)})
    found = [int(dataset[i]["input_ids"][0]) for i in range(len(dataset))]
    assert len(set(found)) == len(found) == 40, "each at most once"
    assert sum(n >= 100 for n in found) == 30
    assert sum(n >= 100 for n in found[:20]) == 15, "spread evenly, so that a share of it has the same shares"
    assert dataset.scored_bytes([0, 1]) == bytes(found[:2])
    assert dataset.scored_tokens(range(40)) == 40 * LENGTH


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({}, "has no sources"),
        ({"a": {"weight": 1}}, "needs exactly a source and a weight"),
        ({"a": {"source": StdlibSource("bytes"), "weight": 0}}, "weight=0 must be a number above 0"),
        ({"a": {"source": StdlibSource("bytes"), "weight": float("nan")}}, "weight=nan"),
        ({"a": {"source": StdlibSource("bytes"), "weight": 1}, "b": {"source": StdlibSource("python"), "weight": 1}},
         "sources.b has another tokenizer"),
    ],
)  # fmt: skip
def test_mixtures_that_make_no_sense(sources: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixSource(sources)


def test_what_one_source_holds_out_no_other_trains_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for i in range(6):
        (tmp_path / f"f{i}.txt").write_text(f"file number {i} " * 40)
    paths = [str(tmp_path / f"f{i}.txt") for i in range(6)]
    a = TextSource(paths[:4], validation_files=[paths[4]])
    b = TextSource(paths[4:], validation_files=[paths[0]])
    source = MixSource({"a": {"source": a, "weight": 1}, "b": {"source": b, "weight": 1}})
    dm = TokenDataModule(source, batch_size=4, seq_len=32)
    trained = b"".join(bytes(row.tolist()) for batch in islice(dm.train_dataloader(), 40)
                       for row in batch["input_ids"].clamp(max=255).to(torch.uint8))  # fmt: skip
    assert b"number 1" in trained
    assert b"number 5" in trained
    assert b"number 4" not in trained
    assert b"number 0" not in trained
    assert "sources.a: 1 documents that others hold out are not trained on" in caplog.text


def test_a_mixture_that_could_not_be_read_is_not_taken_for_one_that_was(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    source = MixSource({"a": {"source": TextSource([str(tmp_path / "a.txt")]), "weight": 1}})
    for _ in range(2):
        with pytest.raises(ValueError, match="found no text"):
            source.setup()


def test_needles_are_not_put_into_a_stream() -> None:
    mix = MixSource({"text": {"source": StdlibSource("python"), "weight": 1}})
    with pytest.raises(ValueError, match="not into one that is read on the fly"):
        NeedlesSource(mix, needles=1, window=8, layers=1)


@pytest.mark.slow
def test_needles_can_be_mixed_with_text() -> None:
    text = StdlibSource("python")
    needles = NeedlesSource(text, needles=1, window=8, layers=1)
    source = MixSource({"text": {"source": text, "weight": 3}, "needles": {"source": needles, "weight": 1}})
    dm = TokenDataModule(source, batch_size=4, seq_len=128)
    batch = next(iter(dm.train_dataloader()))
    assert batch["weights"].shape == (4, 128)
    assert (batch["weights"].max(1).values > 1).sum() == 1


def test_workers_are_refused() -> None:
    source = MixSource({"text": {"source": StdlibSource("python"), "weight": 1}})
    with pytest.raises(ValueError, match="num_workers=2: a stream is read by a thread"):
        TokenDataModule(source, batch_size=4, seq_len=128, num_workers=2).train_dataloader()


# Hugging Face datasets on the fly


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    (tmp_path / "d").mkdir()
    for part in range(3):
        lines = [json.dumps({"text": f"part {part} document {i} " * (1 + i % 4)}) for i in range(40)]
        (tmp_path / "d" / f"train-{part}.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "d"


@pytest.mark.parametrize("chunksize", [None, 300])
def test_a_dataset_is_read_on_the_fly_and_resumed(folder: Path, chunksize: int | None) -> None:
    def module() -> TokenDataModule:
        return TokenDataModule(
            HuggingFaceSource(
                str(folder), streaming=True, validation_fraction=0.2, held_out_documents=60, chunksize=chunksize
            ),
            batch_size=2, seq_len=LENGTH, seed=4,
        )  # fmt: skip

    dm = module()
    dm.setup()
    assert dm.validation_bytes
    whole = [batch["input_ids"].tolist() for batch in islice(dm.train_dataloader(), 900)]
    for n in (1, 40, 500):  # in the first part, and after all of them
        loader = module().train_dataloader()
        list(islice(loader, n))
        state = saved(loader.state_dict())
        again = module().train_dataloader()
        again.load_state_dict(state)
        assert [batch["input_ids"].tolist() for batch in islice(again, 20)] == whole[n : n + 20]


def test_a_place_is_counted_in_chunks(folder: Path) -> None:
    """So another size of them is another data set: its state would name other rows."""

    def loader(chunksize: int | None) -> StreamLoader:
        source = HuggingFaceSource(str(folder), streaming=True, held_out_documents=60, chunksize=chunksize)
        return StreamLoader(source.stream(LENGTH, 0), 4, 1, 0)

    state = loader(None).state_dict()
    with pytest.raises(ValueError, match="cannot resume exactly: data was"):
        loader(300).load_state_dict(state)
    loader(None).load_state_dict(state)


@pytest.mark.long
def test_what_a_stream_takes_of_memory() -> None:
    """Of a process that reads and mixes and does nothing else; with pieces of 10 MB it is twice as much."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.streaming", "--gigabytes", "0.03"],
        cwd=ROOT, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = re.search(r"([\d,]+) MB beyond imports", done.stdout)
    assert found, done.stdout
    assert int(found[1]) < 120, done.stdout


def test_held_out_rows_are_not_trained_on(folder: Path) -> None:
    source = HuggingFaceSource(str(folder), streaming=True, validation_fraction=0.2, held_out_documents=60)
    source.setup()
    held = list(source.documents_in_memory())
    assert held
    assert all(d.split != "train" for d in held)
    assert {d.split for d in source.documents()} == {"train", "validation", "test"}, "prepare writes all of it"
    stream, trained = source.stream(LENGTH, 0), b""
    while len(trained) < 10_000:
        block = stream._loaded()
        stream._begin(block.after, 0)
        trained += bytes(np.where(block.tokens < 256, block.tokens, 0).astype(np.uint8)[1:-1])
    texts = {text for text in trained.split(b"\0")[:-1] if text}
    all_rows = {
        json.loads(line)["text"].encode() for path in folder.iterdir() for line in path.read_text().splitlines()
    }
    assert texts == {raw for raw in all_rows if split_of(raw, 0.2, 0.05) == "train"}
    assert source.losses("train") is None


def test_rows_of_a_named_split_are_held_out_of_training_too(folder: Path) -> None:
    line = (folder / "train-1.jsonl").read_text().splitlines()[3]
    (folder / "validation.jsonl").write_text(line + "\n" + json.dumps({"text": "another one " * 9}) + "\n")
    source = HuggingFaceSource(str(folder), streaming=True, validation_split="validation")
    source.setup()
    stream = source.stream(LENGTH, 0)
    assert stream._text_of(3, json.loads(line)) is None
    assert stream._text_of(4, {"text": "something else"}) == b"something else"
    with pytest.raises(ValueError, match="row 5: no column 'text'"):
        stream._text_of(5, {"body": ""})


def test_a_damaged_row_names_itself(folder: Path) -> None:
    path = folder / "train-2.jsonl"
    path.write_text(path.read_text() + "{broken\n")
    source = HuggingFaceSource(str(folder), streaming=True, held_out_documents=20)
    source.setup()
    with pytest.raises(ValueError, match=r"cannot read .*\[train\]"):
        list(islice(StreamLoader(source.stream(LENGTH, 0), 4, 1, 0), 900))


def test_what_is_on_disk_whole_is_not_streamed(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": [f"a {i} c" for i in range(50)]}).save_to_disk(str(tmp_path / "d"))
    source = HuggingFaceSource(str(tmp_path / "d"), streaming=True, validation_fraction=0.3)
    with pytest.raises(ValueError, match="cannot be streamed: leave streaming=true out"):
        source.stream(LENGTH, 0).take(1, [0])
