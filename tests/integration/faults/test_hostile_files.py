"""Runs and checkpoints from elsewhere: nothing in them runs, and one line says what is wrong with them."""

import collections
import io
import os
import pickle
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from atlas_lm.checkpoints import manifest
from atlas_lm.checkpoints.io import read_checkpoint
from atlas_lm.cli import arguments as options
from atlas_lm.cli import calibrate, compare, generate
from atlas_lm.cli import gates as command
from tests.support.launching import FEW_STEPS, SMALL_DATA, SMALL_MODEL, launch

MARKER = "it_ran"


@pytest.fixture
def run(guarded_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a run, to be spoiled; what runs leaves MARKER in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    return Path(shutil.copytree(guarded_run, tmp_path / "run", symlinks=True))


def called(main: Callable[[list[str]], None], *arguments: str) -> tuple[int, str]:
    """Exit code of a command, and the error line that it ends with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["command", *arguments])
        try:
            options.call(main)
        except SystemExit as ending:
            return (ending.code, "") if isinstance(ending.code, int) else (1, str(ending.code))
    return 0, ""


COMMANDS: dict[str, Callable[[Path], tuple[int, str]]] = {
    "phase2": lambda run: called(command.main, "phase2", f"run={run}", "sequences=4", "decisions=decisions.yaml"),
    "phase4": lambda run: called(command.main, "phase4", f"run={run}", "sequences=4", "decisions=decisions.yaml"),
    "generate": lambda run: called(generate.main, f"run={run}", "prompt=a", "tokens=2"),
    "calibrate": lambda run: called(calibrate.main, f"run={run}"),
    "compare": lambda run: called(compare.main, str(run), "out=compared"),
}

# What a run's config may name


SYSTEM = {"_target_": "os.system", "command": f"touch {MARKER}"}
EVAL = {"_target_": "builtins.eval", "_args_": [f"open({MARKER!r}, 'w')"]}
POPEN = {"_target_": "subprocess.Popen", "_args_": [["touch", MARKER]]}
HANDLER = {
    "_target_": "torch.distributed.elastic.multiprocessing.subprocess_handler.SubprocessHandler",
    "entrypoint": "touch", "args": [MARKER], "env": {}, "stdout": None, "stderr": None, "local_rank_id": 0,
    "numa_options": None,
}  # fmt: skip
TARGETS = {
    "os.system": SYSTEM,
    "eval": EVAL,
    "Popen": POPEN,
    "os of our module": {**SYSTEM, "_target_": "atlas_lm.data.tokens.os.system"},
    "os of runs": {**SYSTEM, "_target_": "atlas_lm.runs.folder.os.system"},
    "a class of torch that starts a process": HANDLER,
    "a partial": {**SYSTEM, "_partial_": True},
    "under a class of ours": {"_target_": "atlas_lm.data.text.TextSource", "files": "*.txt", "tokenizer": [[SYSTEM]]},
    "as the name of a target": {"_target_": SYSTEM},
    "made by a resolver": "${oc.create:{_target_: os.system, command: touch " + MARKER + "}}",
    "made by a second resolving": r"\${oc.create:'{_target_: os.system, command: touch " + MARKER + "}'}",
    "a process made by a second resolving": r"\${oc.create:'{_target_: " + HANDLER["_target_"] + ", entrypoint: touch, "
    "args: [" + MARKER + "], env: {}, stdout: null, stderr: null, local_rank_id: 0, numa_options: null}'}",
}
PLACES = {
    "data": "data",
    "data.source": "data.source",
    "a new key of data.source": "data.source.more",
    "callbacks": "callbacks.spike_rollback.watch",
}


def put(config: Path, place: str, value: Any) -> None:
    tree = OmegaConf.to_container(OmegaConf.load(config), resolve=True)
    node: Any = tree
    *groups, name = place.split(".")
    for group in groups:
        node = node[group]
    node[name] = value
    config.write_text(OmegaConf.to_yaml(OmegaConf.create(tree)))


# Each target once and each place three times; all of them are slow
FAST_PLACES = {(name, [*PLACES][i % len(PLACES)]) for i, name in enumerate(TARGETS)}
EVERYWHERE = [
    pytest.param(name, place, marks=() if (name, place) in FAST_PLACES else pytest.mark.slow)
    for name in TARGETS
    for place in PLACES
]


@pytest.mark.parametrize(("name", "where"), EVERYWHERE)
def test_a_config_from_elsewhere_runs_nothing(
    run: Path, name: str, where: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = PLACES[where]
    put(run / "config.yaml", place, TARGETS[name])
    capsys.readouterr()
    gate, code = ("G2-6", "phase2") if place.startswith("callbacks") else ("G4-4", "phase4")
    code, line = COMMANDS[code](run)
    captured = capsys.readouterr()
    assert code == 1
    assert not line, "the other gates are judged"
    (said,) = [text for text in captured.out.splitlines() if text.startswith(f"[{gate}]")]
    assert "FAILED" in said
    assert place.split(".")[0] in said
    assert "config.yaml" in said or "_target_" in said or "the run has no data" in said
    assert "Traceback" not in captured.err
    # these build nothing from the config: they do their work, or say in one line what they cannot read
    for other in ("generate", "calibrate", "compare"):
        code, line = COMMANDS[other](run)
        assert code == 0 or line.startswith("error: ")
        assert "\n" not in line
    assert not Path(MARKER).exists(), (name, place)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_config_that_is_python_is_one_line(run: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with (run / "config.yaml").open("a") as file:
        file.write(f"evil: !!python/object/apply:os.system ['touch {MARKER}']\n")
    code, line = COMMANDS[name](run)
    assert code == 1
    assert name.startswith("phase") or line.startswith("error: ")
    assert "Traceback" not in capsys.readouterr().err
    assert not Path(MARKER).exists()


# What a checkpoint may hold


class System:
    def __reduce__(self) -> Any:
        return os.system, (f"touch {MARKER}",)


class Eval:
    def __reduce__(self) -> Any:
        return eval, (f"open({MARKER!r}, 'w').close()",)


class MakeFolder:
    def __reduce__(self) -> Any:
        return os.mkdir, (MARKER,)


class HiddenInAPlainClass(collections.OrderedDict):  # type: ignore[type-arg]
    def __reduce__(self) -> Any:
        return collections.OrderedDict, (), None, None, iter([("a", System())])


def in_place(where: str) -> Callable[[dict[str, Any], Path], None]:
    def write(content: dict[str, Any], path: Path) -> None:
        for payload in (System(), Eval(), MakeFolder(), HiddenInAPlainClass()):
            content.setdefault(where, {})[f"x{type(payload).__name__}"] = payload
        torch.save(content, path)

    return write


def bare_pickle(content: dict[str, Any], path: Path) -> None:
    path.write_bytes(pickle.dumps({"state_dict": {}, "x": System(), "y": MakeFolder()}, protocol=2))


def legacy_file(content: dict[str, Any], path: Path) -> None:
    torch.save({**content, "x": System()}, path, _use_new_zipfile_serialization=False)


def legacy_tar(content: dict[str, Any], path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "storages", "tensors", "pickle"):
            raw = pickle.dumps(System(), protocol=2)
            entry = tarfile.TarInfo(name)
            entry.size = len(raw)
            archive.addfile(entry, io.BytesIO(raw))


def other_zip(content: dict[str, Any], path: Path) -> None:
    """The members of a checkpoint, its pickle another one."""
    torch.save(content, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, raw in members.items():
            archive.writestr(name, pickle.dumps(System(), protocol=2) if name.endswith("data.pkl") else raw)


def torch_script(content: dict[str, Any], path: Path) -> None:
    torch.save(content, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"{path.stem}/constants.pkl", pickle.dumps(System(), protocol=2))
        archive.writestr(f"{path.stem}/code/__torch__.py", "import os")


def allowed_call(content: dict[str, Any], path: Path) -> None:
    """What torch allows beside tensors: functions that rebuild odd ones, classes of DTensor and their state."""
    content["state_dict"]["odd"] = torch.zeros(3, device="meta")
    torch.save(content, path)


PAYLOADS = {
    "state_dict": in_place("state_dict"),
    "callbacks": in_place("callbacks"),
    "hyper_parameters": in_place("hyper_parameters"),
    "optimizer_states": in_place("loops"),
    "bare pickle": bare_pickle,
    "legacy file": legacy_file,
    "legacy tar": legacy_tar,
    "zip with another pickle": other_zip,
    "TorchScript": torch_script,
    "tensor without data": allowed_call,
}


FAST = [
    ("state_dict", True), ("hyper_parameters", False), ("bare pickle", False), ("legacy tar", False),
    ("tensor without data", False),
]  # fmt: skip
SLOW = [(name, known) for name in PAYLOADS for known in (False, True) if (name, known) not in FAST]


@pytest.mark.parametrize(("name", "known"), [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_a_checkpoint_from_elsewhere_runs_nothing(
    run: Path, name: str, known: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """The manifest may come from the attacker too: it is no more than a checksum."""
    (path,) = [p for p in (run / "checkpoints").glob("step-*.ckpt") if not p.is_symlink()][:1]
    content = read_checkpoint(path)
    for other in (run / "checkpoints").iterdir():
        other.unlink()
    PAYLOADS[name](content, path)
    if known:
        manifest.record(path.parent, path.name, path, manifest.sha256(path), (4, 4))
    data = ["data=text", f"data.source.files=['{run.parent}/corpus/*.txt']", "callbacks=basic"]
    (run.parent / "corpus").mkdir()
    for i in range(60):
        (run.parent / "corpus" / f"{i}.txt").write_text(f"document {i}: " + "the quick brown fox " * 9)
    for override in (f"resume={path}", f"init_from={path}", f"resume={run}", f"init_from={run}"):
        capsys.readouterr()
        assert launch(*data, *SMALL_MODEL, *SMALL_DATA, *FEW_STEPS, override, "hydra.run.dir=new") == 1
        captured = capsys.readouterr()
        errors = [line for line in captured.err.splitlines() if line.startswith("error")]
        assert len(errors) == 1, captured.err
        assert str(path) in errors[0]
        assert "Traceback" not in captured.err + captured.out
        assert not Path(MARKER).exists()
        shutil.rmtree("new")
    for which in (run, path):
        code, line = called(generate.main, f"run={which}", "prompt=a", "tokens=2")
        assert code == 1
        assert line.startswith("error: ")
        assert str(path) in line
        assert "\n" not in line
    capsys.readouterr()
    for phase in ("phase2", "phase4"):
        code, line = COMMANDS[phase](run)
        captured = capsys.readouterr()
        assert code == 1
        assert "Traceback" not in captured.err
        gates = [text for text in captured.out.splitlines() if text.startswith("[G")]
        assert gates
        assert all("FAILED" in gate and str(path) in gate for gate in gates)
    assert not Path(MARKER).exists()


def test_these_payloads_would_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the tests above could not fail."""
    monkeypatch.chdir(tmp_path)
    for payload in (System(), Eval(), MakeFolder(), HiddenInAPlainClass()):
        torch.save({"state_dict": {"x": payload}}, "a.ckpt")
        torch.load("a.ckpt", weights_only=False)
        assert Path(MARKER).exists(), payload
        Path(MARKER).rmdir() if Path(MARKER).is_dir() else Path(MARKER).unlink()
    legacy_file({}, Path("a.ckpt"))
    torch.load("a.ckpt", weights_only=False)
    assert Path(MARKER).exists()
