"""Every command line of ours: wrong types, odd values, misplaced files, closed pipes: one line, no traceback."""

import contextlib
import io
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from atlas_lm.cli import arguments as options
from atlas_lm.cli import calibrate, compare, generate, prepare
from atlas_lm.cli import gates as command
from tests.support.launching import write_corpus

ODD = [
    "", "abc", "-1", "0", "1e300", "nan", "inf", "-inf", "9" * 26, "null", "[1]", "{a: 1}", "afile", "afolder",
    "/proc/nope/x", "afile/sub", "x" * 300, "${nope}", "???", "[", "'", "a=b", "ñ", "~", "bad.ckpt", "1.5", "true",
]  # fmt: skip


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "afile").write_text("x")
    (tmp_path / "afolder").mkdir()
    (tmp_path / "bad.ckpt").write_text("x")


def answered(main: Callable[[list[str]], object], *arguments: str) -> str:
    """The error line of a command; nothing where it did its work."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        ending = options.attempt(lambda: main(list(arguments)))
    assert "Traceback" not in out.getvalue() + err.getvalue()
    return ending if isinstance(ending, str) else ""


def is_one_line(line: str) -> bool:
    return line.startswith("error: ") and "\n" not in line


@pytest.mark.parametrize("key", ["prompt", "temperature", "top_k", "seed", "run", "outputs", "nope"])
def test_generate(basic_run: Path, key: str) -> None:
    for value in ODD:
        words = {"run": str(basic_run), "tokens": "1", key: value}
        line = answered(generate.main, *(f"{name}={value}" for name, value in words.items()))
        assert line == "" or is_one_line(line), (key, value)


@pytest.mark.long
def test_compare_calibrate_and_gates(basic_run: Path) -> None:
    for value in ODD:
        for main, arguments in (
            (compare.main, [str(basic_run), f"out={value}"]),
            (compare.main, [value]),
            (calibrate.main, [f"run={value}"]),
            (calibrate.main, [f"run={basic_run}", f"nope={value}"]),
            (command.main, [value]),
            (command.main, ["phase4", f"run={value}"]),
            (command.main, ["phase4", f"run={basic_run}", f"sequences={value}x"]),
            (command.main, ["chunk_sizes", f"out={value}"]),
        ):
            line = answered(main, *arguments)
            assert line == "" or is_one_line(line), arguments


def test_outputs_that_cannot_be_written(basic_run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(basic_run, tmp_path / "run", symlinks=True))
    rows = "".join(f'{{"step": {i}, "seq": {i}, "ppl_delta": 0.01}}\n' for i in range(40))
    (copy / "metrics.jsonl").write_text(rows)
    for name in ("calibration.json", "compare.md"):
        (copy / name).mkdir()
    assert "a folder lies where a file is wanted" in answered(calibrate.main, f"run={copy}")
    assert "a folder lies where a file is wanted" in answered(compare.main, str(basic_run), f"out={copy}")
    assert "in the way" in answered(compare.main, str(basic_run), "out=afile")
    shutil.move(copy / "metrics.jsonl", copy / "aside")
    (copy / "metrics.jsonl").mkdir()
    assert is_one_line(answered(calibrate.main, f"run={copy}"))


VALID = {  # odd values that prepare may take
    "vocab_size": {"", "null", "~"}, "block_mb": {"1e300", "9" * 26, "1.5"},
    "document_bytes": {"", "null", "~", "9" * 26},
    "validation_files": {"", "null", "~"}, "test_files": {"", "null", "~"}, "validation_fraction": {"0"},
    "test_fraction": {"0"}, "text_field": {"", *ODD}, "out": {"", *ODD},
}  # fmt: skip


@pytest.mark.parametrize(
    "key",
    ["source", "out", "tokenizer", "vocab_size", "block_mb", "files", "validation_files", "test_files", "text_field",
     "validation_fraction", "test_fraction", "document_bytes", "nope"],
)  # fmt: skip
def test_prepare(tmp_path: Path, key: str) -> None:
    write_corpus(tmp_path / "corpus")
    for value in ODD:
        shutil.rmtree("shards", ignore_errors=True)
        words = {"source": "text", "out": "shards", "files": "corpus/*.txt", key: value}
        line = answered(prepare.main, *(f"{name}={value}" for name, value in words.items()))
        assert line == "" or is_one_line(line), (key, value)
        assert line or value in VALID.get(key, ()), f"{key}={value} is accepted"


@pytest.mark.parametrize("key", ["path", "name", "train_split", "streaming", "max_documents", "validation_split"])
def test_prepare_of_a_dataset(key: str) -> None:
    pytest.importorskip("datasets")
    for value in ODD:
        words = {"source": "hf", "out": "shards", "path": "afolder", key: value}
        line = answered(prepare.main, *(f"{name}={value}" for name, value in words.items()))
        assert is_one_line(line), (key, value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("out=/proc/nope/x", "/proc/nope': correct the path"),
        ("out=afile", "'afile': a file of that name is in the way"),
        ("out=afile/sub", "'afile/sub': a file lies where a folder is wanted"),
        ("block_mb=abc", "block_mb=abc must be a number"),
        ("block_mb=.inf", "block_mb=inf must be above 0"),
        ("document_bytes=1.5", "document_bytes=1.5 must be a whole number"),
        ("tokenizer=bpe vocab_size=1e3", "vocab_size=1e3 must be a whole number"),
        ("tokenizer=bpe vocab_size=99999999999999999999", "vocab_size=99999999999999999999 is above"),
        ("tokenizer=corpus", "'corpus' is a folder: give the tokenizer.json in it"),
        ("files=corpus", "'corpus' is a folder: name its files, e.g. corpus/**/*.txt"),
        ("files=[1]", "files=[1]: 1 is no text: put quotes around it"),
        ("out=a out=b", "out= is given twice"),
        ("validation_fractions=0.1", "did you mean 'validation_fraction'"),
    ],
)
def test_what_prepare_says(tmp_path: Path, words: str, message: str) -> None:
    write_corpus(tmp_path / "corpus")
    rest = [word for word in ("out=shards", "files=corpus/*.txt") if word.split("=")[0] + "=" not in words]
    line = answered(prepare.main, "source=text", *rest, *words.split())
    assert is_one_line(line)
    assert message in line


def test_a_number_is_a_name_where_a_name_is_wanted(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus")
    assert answered(prepare.main, "source=text", "out=2024", "files=corpus/*.txt", "validation_fraction=0.3") == ""
    assert (tmp_path / "2024" / "index.json").is_file()


TWO_LINES = (
    "import sys; from atlas_lm.cli.arguments import call; call(lambda _: [print('x' * 9999) for _ in range(99)])"
)


@pytest.mark.slow
def test_a_reader_that_goes_away_and_an_output_that_is_full() -> None:
    ours, prepared = f'{sys.executable} -c "{TWO_LINES}"', f"{sys.executable} -m atlas_lm prepare --help"
    for line in (f"{ours} | true", f"{ours} | head -c 1 > /dev/null", f"{ours} >&-", f"{prepared} | true"):
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
        assert done.stderr == "", line
    full = subprocess.run(
        ["bash", "-c", f'{sys.executable} -c "{TWO_LINES}" > /dev/full'], capture_output=True, text=True, check=False
    )
    assert full.returncode == 1
    assert full.stderr.count("\n") == 1
    assert "No space left on device: free space" in full.stderr


def test_ctrl_c_is_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def stopped() -> None:
        raise KeyboardInterrupt

    assert options.attempt(stopped) == 130
    assert capsys.readouterr().err == "interrupted\n"
