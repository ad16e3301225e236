"""lm-evaluation-harness on our models: its figures are ours, of the same text."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")

from atlas_lm.cli import evaluate
from atlas_lm.exchange import harness
from atlas_lm.runs.load import load, load_data
from atlas_lm.runs.resolve import resolve_checkpoint

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(autouse=True)
def _caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@torch.no_grad()
def nats(model: Any, tokens: list[int]) -> list[float]:
    """Of each token after the first, read one at a time."""
    session, found = model.stream(1), []
    for token, after in pairwise(tokens):
        logits = session.read(torch.tensor([[token]]))[0, -1].double()
        found.append(-float(torch.log_softmax(logits, -1)[after]))
    return found


def found_in(out: Path, table: str) -> dict[str, Any]:
    runs = json.loads((out / "evaluation.json").read_text())["tables"][table]["runs"]
    return next(iter(runs.values()))


@pytest.mark.long
def test_bits_per_byte_are_those_of_our_own_loss(guarded_run: Path, tmp_path: Path) -> None:
    evaluate.main([f"run={guarded_run}", "suite=lm_eval", "sequences=3", "length=64", f"out={tmp_path}"])
    found = found_in(tmp_path, "lm_eval held_out")
    model, tokenizer = load(guarded_run)
    content = torch.load(resolve_checkpoint(str(guarded_run), "outputs"), weights_only=True)
    raw = load_data(guarded_run, content).held_out_bytes()
    pieces = harness.documents_of(raw, 256)
    count = min(3, len(pieces))
    documents = [pieces[i * len(pieces) // count] for i in range(count)]
    total, size = 0.0, 0
    for text in documents:
        total += sum(nats(model, [tokenizer.separator_id, *tokenizer.encode(text).tolist()]))
        size += len(text.encode())
    assert size > 150
    assert found["bits_per_byte"]["mean"] == pytest.approx(total / size / math.log(2), abs=1e-6)
    assert found["byte_perplexity"]["mean"] == pytest.approx(math.exp(total / size), rel=1e-6)


@pytest.mark.long
def test_a_task_of_ones_own_with_choices(guarded_run: Path, tmp_path: Path) -> None:
    model, tokenizer = load(guarded_run)
    questions = [{"q": "the quick brown", "choices": [" fox jumps", " zzqq", " dog over"]},
                 {"q": "over the lazy", "choices": [" xx", " dog the"]}]  # fmt: skip
    scores = []
    for question in questions:
        context = tokenizer.encode(question["q"]).tolist()
        each = []
        begin = [tokenizer.separator_id]
        for choice in question["choices"]:
            whole = tokenizer.encode(question["q"] + choice).tolist()
            each.append(-sum(nats(model, begin + whole)[len(context) :]))
        scores.append(each)
        question["answer"] = each.index(max(each))
    questions.append({**questions[0], "answer": (questions[0]["answer"] + 1) % 3})  # type: ignore[operator]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    (tmp_path / "mine.yaml").write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'q.jsonl'}}}}}\n"
        'output_type: multiple_choice\ntest_split: test\ndoc_to_text: "{{q}}"\ndoc_to_choice: "{{choices}}"\n'
        'doc_to_target: answer\ntarget_delimiter: ""\nmetric_list: [{metric: acc}]\n'
    )
    command = [f"run={guarded_run}", "suite=lm_eval", f"tasks={tmp_path / 'mine.yaml'}", "sequences=9"]
    evaluate.main([*command, f"out={tmp_path}"])
    accuracy = found_in(tmp_path, "lm_eval mine")["acc"]
    assert accuracy["mean"] == pytest.approx(2 / 3)
    assert accuracy["low"] < 2 / 3 < accuracy["high"]


class Request:
    def __init__(self, *args: Any) -> None:
        self.args = args


def test_a_separator_stands_before_every_text(guarded_run: Path) -> None:
    """Also where the context is white space alone, which the harness moves into the continuation."""
    model, tokenizer = load(guarded_run)
    ours = harness.HarnessModel(model, tokenizer, lambda n: None)
    whole = tokenizer.encode(" the quick").tolist()
    expected = -sum(nats(model, [tokenizer.separator_id, *whole]))
    for context, continuation in ((" ", "the quick"), ("", " the quick")):
        assert ours.loglikelihood([Request(context, continuation)])[0][0] == pytest.approx(expected, abs=1e-6)


def test_scores_and_generation_are_the_streams(guarded_run: Path) -> None:
    model, tokenizer = load(guarded_run)
    ours = harness.HarnessModel(model, tokenizer, lambda n: None)
    whole = tokenizer.encode("the quick brown fox").tolist()
    for cut in (1, 5, len(whole) - 1):
        score, greedy = ours._score(whole[:cut], whole[cut:])
        assert score == pytest.approx(-sum(nats(model, whole)[cut - 1 :]), abs=1e-6)
        assert not greedy
    with torch.no_grad():
        session = model.stream(1)
        logits, ids = session.read(torch.tensor([[tokenizer.separator_id, *whole]]))[0, -1], []
        for _ in range(8):
            ids.append(int(logits.argmax()))
            logits = session.read(torch.tensor([[ids[-1]]]))[0, -1]
    text = ours.generate_until([Request("the quick brown fox", {"until": ["\n\n\n"], "max_gen_toks": 8})])[0]
    expected = tokenizer.decode(ids[: ids.index(tokenizer.separator_id)] if tokenizer.separator_id in ids else ids)
    assert text == expected
    assert ours._score([tokenizer.separator_id, *whole], ids[:3])[1], "what it says itself is the likeliest"
    if len(text) > 3:
        stop = text[2]
        assert ours.generate_until([Request("the quick brown fox", {"until": [stop]})])[0] == text.split(stop)[0]


def test_an_empty_stop_stops_nothing(guarded_run: Path) -> None:
    model, tokenizer = load(guarded_run)
    ours = harness.HarnessModel(model, tokenizer, lambda n: None)
    texts = [
        ours.generate_until([Request("the quick", {"until": until, "max_gen_toks": 6})])[0] for until in ([], [""])
    ]
    assert texts[0] == texts[1]


def test_a_broken_model_gets_no_figure(guarded_run: Path) -> None:
    model, tokenizer = load(guarded_run)
    with torch.no_grad():
        model.embed.weight.fill_(torch.nan)
    ours = harness.HarnessModel(model, tokenizer, lambda n: None)
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        ours.loglikelihood([Request("the", " quick")])
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        ours.generate_until([Request("the", {"until": ["x"]})])


def test_pieces_change_nothing(guarded_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load(guarded_run)
    ours = harness.HarnessModel(model, tokenizer, lambda n: None)
    tokens = tokenizer.encode("the quick brown fox jumps over the lazy dog " * 4).tolist()
    whole = ours._score(tokens[:30], tokens[30:])
    for piece in (7, 29, 30, 31):
        monkeypatch.setattr(harness, "PIECE", piece)
        assert ours._score(tokens[:30], tokens[30:])[0] == pytest.approx(whole[0], abs=1e-4)


@pytest.mark.long
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["suite=lm_eval", "tasks=held_on"], r"tasks=held_on is unknown \(did you mean 'held_out'\?\)"),
        (["suite=lm_eval", "tasks=wikitext"], r"tasks=wikitext cannot be evaluated .* data has to be on this machine"),
        (
            ["suite=lm_eval", "tasks=niah_single_1", "length=500"],
            r"length=500 is none of niah_single_1: there are 4096",
        ),
        (["suite=lm-eval"], r"suite=lm-eval is unknown \(did you mean 'lm_eval'"),
    ],
)
def test_bad_input_is_one_line(guarded_run: Path, tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate.main([f"run={guarded_run}", f"out={tmp_path}", *words])


@pytest.mark.slow
def test_ruler_makes_its_texts_for_the_runs_tokenizer(
    guarded_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that repeats what it was asked for has all points, an untrained one none; nothing is downloaded."""
    pytest.importorskip("wonderwords")
    words = [f"run={guarded_run}", "suite=lm_eval", "tasks=niah_single_1", "sequences=2", f"out={tmp_path}"]
    evaluate.main(words)
    found = found_in(tmp_path, "lm_eval niah_single_1")
    assert {metric: row["mean"] for metric, row in found.items()} == {"4096": 0.0}
    asked = []

    def knows(_: Any, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        asked.extend(request.args[0] for request in requests)
        return [str(request.doc["outputs"][0]) for request in requests]

    monkeypatch.setattr(harness.HarnessModel, "generate_until", knows)
    evaluate.main(words)
    assert found_in(tmp_path, "lm_eval niah_single_1")["4096"]["mean"] == 1.0
    _, tokenizer = load(guarded_run)
    lengths = [len(tokenizer.encode(text)) for text in asked]
    assert min(lengths) > 0.5 * 4096, lengths
    assert max(lengths) <= 4096, lengths


def test_documents_are_cut_at_newlines_and_lose_nothing() -> None:
    text = b"".join(b"line %d\n" % i for i in range(50)) + b"the end"
    documents = harness.documents_of(text, 60)
    assert "".join(documents).encode() == text
    assert len(documents) > 5
    assert harness.documents_of(b"", 60) == []
