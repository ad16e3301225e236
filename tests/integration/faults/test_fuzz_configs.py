"""Command lines that are wrong in every way: a run that finishes, or one line and exit code 1, never a traceback.

Values are left alone where a legal one means hours (optim.total_steps=10¹²) or more processes (trainer.devices).
"""

import json
import random
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from atlas_lm.files import ROOT
from tests.support.faults import TooLong, at_most
from tests.support.launching import SMALL_DATA, SMALL_MODEL, launch, write_corpus

SECONDS = 60  # more is a hang
TINY = [
    "data=text", *SMALL_MODEL, *SMALL_DATA, "optim.total_steps=1", "optim.warmup_steps=0",
    "trainer.log_every_n_steps=1", "trainer.val_check_interval=1", "callbacks=basic",
    "callbacks.progress.every_n_seconds=0",
]  # fmt: skip
GROUPS = {
    "model": ["tiny", "tiny_deep", "43m"], "optim": ["adamw", "muon"],
    "data": ["stdlib", "text", "tokens", "recall", "hf"], "trainer": ["cpu", "gpu"],
    "callbacks": ["default", "stage1", "basic"], "logger": ["default"], "paths": ["default"],
    "+experiment": ["stage1", "stage2", "recall"],
}  # fmt: skip
# a legal value there takes long, starts processes, or writes elsewhere
ALONE = (
    "optim.total_steps", "trainer.devices", "trainer.strategy", "trainer.accelerator", "trainer.max_steps",
    "trainer.max_epochs", "data.num_workers", "model.layers", "model.newton_schulz_steps", "paths.", "name",
)  # fmt: skip
WRONG: dict[str, list[str]] = {  # values that are wrong wherever a value of that type is meant
    "number": ["abc", "'1 2'", "[1,2]", "{a:1}", "''", "ünïcode", "1e", "--3", "true false"],
    "text": ["[1,[2]]", "{a:{b:1}}"],
    "list": ["3.5", "abc", "{a:1}", "[[]]", "[x]"],
    "any": ["${nowhere}", "${oc.env:NO_SUCH_VARIABLE}", "${nothing:1}", "???", "${", "${}", "[", "{", "}", "a=b=c{"],
}
ODD = [  # values that may be right somewhere
    "-1", "0", "1", "-0.0", "nan", "inf", "-inf", "1000000000000", "100000000000000000000", "1e300", "1e-300", "null",
    "true", "''", "' '", "[]", "{}", "[1]", "[nan]", "[-3]", "'\\t'", "ñ", "'日本'", "nowhere/file.txt", "2.5", "0x10",
    "'\\u0000'", "[null]", "~", "!!", "1_000",
]  # fmt: skip


class Case(NamedTuple):
    """Overrides to add to TINY, and whether a run with them must not start."""

    overrides: list[str]
    invalid: bool


def leaves(node: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from leaves(value, f"{where}.{key}" if where else key)
    else:
        yield where, node


def misspelled(word: str, r: random.Random) -> str:
    at = r.randrange(len(word))
    return r.choice(
        [word[:at] + word[at + 1 :], word[:at] + word[at] + word[at:], word[:at] + r.choice("aeqx_") + word[at:],
         word[:at] + word[at + 1 : at + 2] + word[at] + word[at + 2 :], word.upper()]
    )  # fmt: skip


class Fuzzer:
    """Cases from a seed, over the keys of the configuration that TINY composes."""

    def __init__(self, corpus: str, seed: int) -> None:
        self.r = random.Random(seed)
        self.corpus = corpus
        GlobalHydra.instance().clear()
        with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
            cfg = compose("train", overrides=[*TINY, corpus])
        self.tree: dict[str, Any] = OmegaConf.to_container(cfg, resolve=False)  # type: ignore[assignment]
        self.values = dict(leaves(self.tree))
        self.keys = [key for key in self.values if "layout" not in key]
        self.nodes = {key.rsplit(".", depth)[0] for key in self.keys for depth in range(1, key.count(".") + 1)}

    def kind(self, key: str) -> str:
        value = self.values[key]
        if isinstance(value, list):
            return "list"
        return "number" if isinstance(value, int | float) else "text"

    def key(self) -> str:
        return self.r.choice(self.keys)

    def unknown(self) -> str:
        """A key that is none, a letter or two from one."""
        while True:
            parts = self.key().split(".")
            at = self.r.randrange(len(parts))
            parts[at] = misspelled(parts[at], self.r)
            found = ".".join(parts)
            if found not in self.values and found not in self.nodes and found.strip(".") and "=" not in found:
                return found

    def case(self) -> Case:
        return self.r.choice(
            [self.misspelled_key, self.wrong_value, self.wrong_value, *[self.odd_value] * 6, self.prefixed,
             self.twice, self.deleted, self.group, self.experiment, self.moved, self.missing_file]
        )()  # fmt: skip

    def misspelled_key(self) -> Case:
        return Case([f"{self.r.choice(['', '', '++', '+'])}{self.unknown()}=1"], True)

    def wrong_value(self) -> Case:
        key = self.key()
        values = WRONG["any"] + (WRONG[self.kind(key)] if key.startswith(("model.", "optim.", "seed")) else [])
        return Case([f"{key}={self.r.choice(values)}"], True)

    def odd_value(self) -> Case:
        key = self.r.choice([key for key in self.keys if not key.startswith(ALONE)])
        value = self.r.choice(ODD)
        bounded = key.startswith("optim.") and key not in ("optim.name", "optim.betas")
        return Case([f"{key}={value}"], bounded and value in ("-1", "nan", "-inf", "null", "''", "[]", "ñ"))

    def prefixed(self) -> Case:
        key = self.key()
        return Case([self.r.choice([f"+{key}=1", f"~{key}=1", f"~{key}", f"+{key}.more=1", f"++{key}.more=1"])], False)

    def twice(self) -> Case:
        key = self.r.choice([key for key in self.keys if not key.startswith(ALONE)])
        return Case([f"{key}={self.r.choice(ODD)}", f"{key}={self.r.choice(ODD)}"], False)

    def deleted(self) -> Case:
        node = self.r.choice(["model", "data", "optim", "trainer", "data.source", "data.source.files", "seed",
                              "data.batch_size", "data._target_", "trainer._target_", "data.source._target_",
                              "model.dim", "optim.lr", "paths", "precision", "callbacks", "logger", "name",
                              "callbacks.step_checkpoint", "callbacks.progress", "logger.jsonl",
                              "trainer.plugins"])  # fmt: skip
        required = ("model", "data", "optim", "trainer", "data.source", "data.source.files", "data.batch_size",
                    "data._target_", "data.source._target_")  # fmt: skip
        return Case([f"~{node}"], node in required)

    def group(self) -> Case:
        group = self.r.choice(list(GROUPS))
        everything = [name for names in GROUPS.values() for name in names]
        name = self.r.choice([*everything, misspelled(self.r.choice(GROUPS[group]), self.r), "''", "null", "[]"])
        if name == "43m" or (group in ("+experiment", "callbacks") and name in GROUPS[group]):
            name = "nothing"  # long, or what TINY cannot undo
        return Case([f"{group}={name}"], name not in (*GROUPS[group], "null", "[]", "''", "cpu", "default"))

    def experiment(self) -> Case:
        name = misspelled(self.r.choice(GROUPS["+experiment"]), self.r)
        prefix = self.r.choice(["+experiment", "experiment", "++experiment", "+experimnt", "~experiment"])
        return Case([f"{prefix}={name}"], name not in GROUPS["+experiment"])

    def moved(self) -> Case:
        """A key of one group in another."""
        group, key = self.r.choice(["model", "optim", "data", "trainer", "callbacks"]), self.key().rpartition(".")[2]
        found = f"{group}.{key}"
        known = found in self.values or found in self.nodes
        return Case([f"{self.r.choice(['', '+'])}{found}=1"], not known and group != "trainer")

    def missing_file(self) -> Case:
        return Case(
            [self.r.choice([
                "data.source.files=[nowhere/*.txt]", "data.source.files=[]", "data.source.files=''",
                "data.source.tokenizer=nowhere.json", "data.source.tokenizer=empty.json", "resume=nowhere",
                "resume=nowhere.ckpt", "resume=empty.json", "init_from=nowhere", "init_from=empty.json",
                "init_from=stge1", "resume=.", "init_from=.", "data.source.files=[empty.json]",
                "data.source.validation_files=[nowhere]", "data.source.files=[.]", "resume=''''x",
                "init_from='\\u0000'",
            ])],
            True,
        )  # fmt: skip


def judged(case: Case, corpus: str, capsys: pytest.CaptureFixture[str]) -> str | None:
    """What is wrong with the answer to a case."""
    run = Path("run")
    shutil.rmtree(run, ignore_errors=True)
    shutil.rmtree("outputs", ignore_errors=True)
    capsys.readouterr()
    try:
        with at_most(SECONDS):
            code = launch(*TINY, corpus, f"hydra.run.dir={run}", *case.overrides)
    except TooLong as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__module__}.{type(error).__name__}: {str(error)[:400]}"
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_flush_denormal(False)
        torch.autograd.set_detect_anomaly(False)
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error")]
    if "Traceback" in captured.err + captured.out:
        return "Traceback in the output"
    if code == 0:
        reports = list(Path().rglob("report.json"))
        if not reports:
            return "exit code 0 without a report"
        status = json.loads(reports[0].read_text())["status"]
        if case.invalid:
            return "accepted what is invalid"
        return None if status == "finished" else f"exit code 0 of a run that is {status}"
    if code != 1 or len(lines) != 1:
        return f"exit code {code} with {len(lines)} lines of error: {captured.err[-300:]}"
    return None


def fuzz(count: int, seed: int, capsys: pytest.CaptureFixture[str]) -> Counter[str]:
    """Judge `count` cases; AssertionError naming all that went wrong."""
    corpus = write_corpus(Path("corpus"), documents=30)
    Path("empty.json").write_text("")
    assert judged(Case([], False), corpus, capsys) is None, "the tiny run itself"
    fuzzer, seen, wrong = Fuzzer(corpus, seed), Counter[str](), []
    for number in range(count):
        case = fuzzer.case()
        why = judged(case, corpus, capsys)
        if why:
            wrong.append(f"{number}: {' '.join(case.overrides)}: {why}")
        seen["finished" if (Path("run") / "report.json").exists() else "refused"] += 1
    assert not wrong, f"{len(wrong)} of {count}, seed {seed}:\n" + "\n".join(wrong)
    return seen


@pytest.fixture(autouse=True)
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", [20, pytest.param(40, marks=pytest.mark.slow)])
def test_wrong_command_lines(count: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz(count, 0, capsys).total() == count


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.accelerator=abc", "invalid accelerator name"),
        ("trainer.strategy=abc", "invalid strategy name"),
        ("trainer.devices=abc", "`devices` selected"),
        ("trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches=0 must be at least 1"),
        ("trainer.num_sanity_val_steps=few", "num_sanity_val_steps is 'few' and must be a whole number or null"),
        ("trainer.gradient_clip_val=[1]", "trainer.gradient_clip_val is [1] and must be a whole number or a number"),
        ("data.seq_len='long'", "data.seq_len is 'long' and must be a whole number or null"),
        ("data.seed=[1]", "data.seed is [1] and must be a whole number"),
        ("~data.source._target_", "and must be a Source with its _target_"),
        ("callbacks.step_checkpoint.keep=2.5", "callbacks.step_checkpoint.keep is 2.5 and must be a whole number"),
        ("logger.tensorboard.save_dir=0", "logger.tensorboard.save_dir is 0 and must be text"),
        ("~seed", "seed is required: give seed=<value>"),
        ("model.persistent_keys=2147483647", "memory is short"),
        ("model.persistent_keys=100000000000000000000", "must be at most 2147483647"),
        ("optim.betas=[0.9]", "optim.betas=[0.9] must be two numbers"),
        ("optim.lr=1e300", "beyond 3.4e+38"),
        ("optim.betas=[2,3]", "optim.betas=[2.0, 3.0] must be two numbers"),
        ("paths=null", "name a file of conf/"),
    ],
)
def test_what_fuzzing_has_found(override: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each of these was a traceback."""
    corpus = write_corpus(Path("corpus"), documents=30)
    assert launch(*TINY, corpus, "hydra.run.dir=run", override) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert words in line


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(1, 6))
def test_five_hundred_wrong_command_lines(seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    """100 for each of five seeds."""
    seen = fuzz(100, seed, capsys)
    assert seen.total() == 100
    assert min(seen["finished"], seen["refused"]) >= 5, seen
