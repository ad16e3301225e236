"""The vectors of a text: the same bytes after a kill, and refused when text, settings or embedder have changed."""

import json
import shutil
import sys
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atlas_lm.cli import embed as command
from atlas_lm.latent import embed as module
from atlas_lm.latent.embed import Written
from atlas_lm.latent.embedder import Embedder, fingerprint
from atlas_lm.latent.source import EmbeddingSource

PARAGRAPHS = 14


class Words:
    """A bag of words as unit vectors: equal texts have equal ones. `dies_after`: blocks that it lives for."""

    def __init__(self, model: str, batch: int, dies_after: int = 10**9) -> None:
        self.hash, self.dies_after, self.encoded = f"hash of {model}", dies_after, 0

    def cut_short(self, texts: Sequence[str]) -> int:
        return sum(len(text) > 60 for text in texts)

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        if self.dies_after == 0:
            raise KeyboardInterrupt
        self.dies_after -= 1
        self.encoded += len(texts)
        found = np.stack([sum(self._word(word) for word in text.split()) for text in texts])
        return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)

    def _word(self, word: str) -> Any:
        seed = int.from_bytes(blake2b(word.encode(), digest_size=4).digest(), "big")
        return np.random.default_rng(seed).standard_normal(8)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(12):
        parts = [f"Document {i} has a paragraph {j} with {i * j} words of its own." for j in range(PARAGRAPHS)]
        (folder / f"{i}.txt").write_text("\n\n".join(parts))
    return folder


def run(corpus: Path, out: Path, load: Any = Words, model: str = "m", **changes: Any) -> Written:
    arguments: dict[str, Any] = {"files": [f"{corpus}/*.txt"], "validation_fraction": 0.3, "block": 20, **changes}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "Embedder", load)
        return module.embed("text", out, model, **arguments)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_every_passage_has_its_vector_in_its_documents_split(corpus: Path, tmp_path: Path) -> None:
    found = run(corpus, tmp_path / "x")
    assert sum(found.frames.values()) == 12 * PARAGRAPHS
    assert json.loads((tmp_path / "x" / "audit.json").read_text())["documents"] == 12
    source = EmbeddingSource(str(tmp_path / "x"))
    frames = source.frames
    for piece in frames.pieces:
        text = Path(piece.document).read_text().split("\n\n")
        assert np.allclose(frames.vectors_FD[piece.start : piece.stop], Words("m", 1).encode(text), atol=1e-6)
    assert source.module_arguments(None)["embedder"] == "hash of m"
    assert found.cut_short == 0
    assert run(corpus, tmp_path / "y", min_chars=80).cut_short > 0


def test_a_killed_one_resumes_and_has_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    whole = run(corpus, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(corpus, tmp_path / "cut", lambda model, batch: Words(model, batch, dies_after=2))
    with pytest.raises(ValueError, match="same embed command again"):
        EmbeddingSource(str(tmp_path / "cut")).setup()
    again = Words("m", 1)
    run(corpus, tmp_path / "cut", lambda model, batch: again)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert 0 < again.encoded < sum(whole.frames.values()), "what was there is not embedded again"


def test_a_finished_one_is_left_as_it_is(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "x")
    before = contents(tmp_path / "x")
    idle = Words("m", 1)
    run(corpus, tmp_path / "x", lambda model, batch: idle)
    assert contents(tmp_path / "x") == before
    assert idle.encoded == 0


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("changes", "why"),
    [({"model": "other"}, "hash of other"), ({"unit": "line"}, "unit=paragraph"), ({"block": 30}, "block=20"),
     ({"validation_fraction": 0.4}, "options")],
)  # fmt: skip
def test_another_embedder_and_other_settings_are_refused(
    corpus: Path, tmp_path: Path, changes: dict[str, Any], why: str, finished: bool
) -> None:
    if finished:
        run(corpus, tmp_path / "x")
    else:
        with pytest.raises(KeyboardInterrupt):
            run(corpus, tmp_path / "x", lambda model, batch: Words(model, batch, dies_after=2))
    before = contents(tmp_path / "x")
    with pytest.raises(ValueError, match=why):
        run(corpus, tmp_path / "x", **changes)
    assert contents(tmp_path / "x") == before


@pytest.mark.parametrize("finished", [True, False])
def test_a_text_that_has_changed_is_refused(corpus: Path, tmp_path: Path, finished: bool) -> None:
    if finished:
        run(corpus, tmp_path / "x")
    else:
        with pytest.raises(KeyboardInterrupt):
            run(corpus, tmp_path / "x", lambda model, batch: Words(model, batch, dies_after=3))
    (corpus / "0.txt").write_text("Something else.\n\n" * 14)
    with pytest.raises(ValueError, match="corpus changed"):
        run(corpus, tmp_path / "x")


def test_damaged_vectors_are_noticed(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "x")
    path = tmp_path / "x" / "part-00000.f32"
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged.*embed again"):
        EmbeddingSource(str(tmp_path / "x")).setup()


@pytest.mark.parametrize(
    ("changes", "why"),
    [({"unit": "word"}, "unit=word"), ({"min_chars": 50, "max_chars": 50}, "min_chars=50"), ({"block": 0}, "block=0"),
     ({"batch": 0}, "batch=0"), ({"files": []}, "empty")],
)  # fmt: skip
def test_arguments_out_of_range_are_named(corpus: Path, tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        run(corpus, tmp_path / "x", **changes)


def test_a_folder_of_something_else_is_left_alone(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not written by embed"):
        run(corpus, tmp_path / "x")


def test_text_that_is_not_utf8_is_named(corpus: Path, tmp_path: Path) -> None:
    (corpus / "3.txt").write_bytes(b"caf\xe9 " * 30)
    with pytest.raises(ValueError, match=r"3\.txt"):
        run(corpus, tmp_path / "x")


def test_documents_shorter_than_a_context_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "short"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.txt").write_text(f"Only one paragraph, number {i}, which is short but long enough.")
    with pytest.raises(ValueError, match="shorter than a context"):
        run(folder, tmp_path / "x")


@pytest.mark.parametrize(
    ("words", "why"),
    [(["source=text", "out=x", "files=['*.txt']"], "model="),
     (["source=text", "out=x", "model=m", "block=x"], "block=x"), (["out=x", "model=m"], "source="),
     (["source=text", "out=x", "model=m", "nope=3"], "nope")],
)  # fmt: skip
def test_the_command_names_what_is_missing_or_wrong(
    words: list[str], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "Embedder", Words)
    with pytest.raises(ValueError, match=why):
        command.main(words)


# A real sentence-transformers model, of random weights


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformer of one layer with a vocabulary of words, saved as sentence-transformers has it."""
    st = pytest.importorskip("sentence_transformers", reason="pip install 'atlas-lm[latent]'")
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("tiny")
    text = "Document has a paragraph with words of its own ."
    words = ["[PAD]", "[UNK]", *map(str, range(100)), *text.split()]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    )
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder / "bert")
    fast.save_pretrained(folder / "bert")
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules", reason="an older version")
    transformer = modules.Transformer(str(folder / "bert"), max_seq_length=16)
    model = st.SentenceTransformer(modules=[transformer, modules.Pooling(16)], device="cpu")
    model.save(str(folder / "model"))
    return folder / "model"


@pytest.mark.filterwarnings("ignore")
def test_a_sentence_transformers_model_embeds_and_is_known_again(corpus: Path, tmp_path: Path, tiny: Path) -> None:
    first = run(corpus, tmp_path / "x", Embedder, str(tiny))
    assert sum(first.frames.values()) == 12 * PARAGRAPHS
    shutil.copytree(tiny, tmp_path / "copy")
    one, copy = Embedder(str(tiny), 4), Embedder(str(tmp_path / "copy"), 4)
    assert one.hash == copy.hash
    with torch.no_grad():
        next(copy.model.parameters()).view(-1)[0] += 1
    assert fingerprint(copy.model) != one.hash
    assert one.cut_short(["word " * 40, "word"]) == 1
    with pytest.raises(ValueError, match="no such folder"):
        Embedder(str(tmp_path / "nothing"), 4)
    with pytest.raises(ValueError, match=r"no modules\.json"):  # the library would take the mean of its states
        Embedder(str(tiny.parent / "bert"), 4)
    (tmp_path / "copy" / "config.json").write_text("no JSON")
    with pytest.raises(ValueError, match="cannot be loaded"):
        Embedder(str(tmp_path / "copy"), 4)


def test_without_the_library_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ValueError, match=r"atlas-lm\[latent\]"):
        Embedder("x", 1)
