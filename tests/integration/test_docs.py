"""What README and docs say can be followed: links lead somewhere, ids are explained, commands and options exist.

Each check is a function from text to what is wrong with it, and is seen to find a planted fault.
"""

import ast
import functools
import importlib
import importlib.util
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from atlas_lm.__main__ import COMMANDS
from atlas_lm.cli import gates, inspect, inspect_calibrate
from atlas_lm.cli.source_arguments import parse_arguments
from atlas_lm.data.prepare import prepare
from atlas_lm.exit_gates import chunk_sizes
from atlas_lm.latent.embed import embed
from benchmarks import pictures
from benchmarks.figures import NUMBERS
from tests.support import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
FOLDERS = ("atlas_lm", "callbacks", "benchmarks", "conf", "tests", "docs")
CODE = [
    path
    for path in [
        *ROOT.glob("*.*"),
        ROOT / "Makefile",
        *(p for folder in FOLDERS for p in ROOT.glob(f"{folder}/**/*.*")),
    ]
    if path.is_file() and path.suffix in (".py", ".yaml", ".toml", ".h", ".cpp", "") and path != Path(__file__)
]
README_LINES = 150


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


# Links


def prose(text: str) -> str:
    """A page without its code."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors(text: str) -> set[str]:
    """What a link may name of a page: its headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(text: str, page: Path) -> list[str]:
    """Relative links and images of a page that lead nowhere."""
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if re.match(r"https?:|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        found = page.parent / path if path else page
        inside = found.exists() and found.resolve().is_relative_to(ROOT)
        if not inside or (anchor and anchor not in anchors(found.read_text(encoding="utf-8") if path else text)):
            wrong.append(target)
    return wrong


def test_links_lead_somewhere() -> None:
    found = {name_of(page): broken_links(page.read_text(encoding="utf-8"), page) for page in PAGES}
    assert len(found) > 50
    assert {page: wrong for page, wrong in found.items() if wrong} == {}


def test_a_broken_link_is_found() -> None:
    text = (
        "# A page\n[a](docs/nowhere.md) ![b](docs/index.md) [c](#a-page) [d](#b) [e](docs/data.md#f) [g](../x) `[h](i)`"
    )
    assert broken_links(text, ROOT / "README.md") == ["docs/nowhere.md", "#b", "docs/data.md#f", "../x"]


def missing_documents(text: str) -> list[str]:
    """Files of docs/ that are named and are not there; docs/decisions/0021 means the page of that number."""
    named = re.findall(r"docs/[\w/-]+(?:\.(?:md|json|png|svg|py))?\b", text)
    known = [NUMBERS]  # written from runs
    return [
        name
        for name in named
        if name not in known and not (ROOT / name).exists() and not list(ROOT.glob(f"{name}-*.md"))
    ]


def test_code_names_documents_that_exist() -> None:
    texts = {name_of(path): path.read_text(encoding="utf-8") for path in CODE}
    assert len(texts) > 200
    assert {name: missing_documents(text) for name, text in texts.items() if missing_documents(text)} == {}
    unknown = [name for name, text in texts.items() if re.search(r"\bSPEC [A-Z]\d|\bseed documents?\b", text)]
    assert unknown == [], "a reader does not have these documents"


def test_a_missing_document_is_found() -> None:
    assert missing_documents("docs/mathematics.md docs/decisions/0021 docs/decisions/9999 docs/none.md") == [
        "docs/decisions/9999", "docs/none.md",
    ]  # fmt: skip


def missing_files(text: str) -> list[str]:
    """Files and folders of the repository that a page names and that are not there."""
    inside = re.findall(r"`((?:atlas_lm|callbacks)/[\w./-]+)`", text)
    anywhere = re.findall(r"(?<![\w/.])((?:tests|conf|benchmarks)/[\w/-]+(?:\.\w+)?)", text)
    return [name for name in [*inside, *anywhere] if not (ROOT / name).exists()]


def test_pages_name_files_that_exist() -> None:
    pages = [page for page in PAGES if page.name != "CHANGELOG.md"]
    found = {name_of(page): missing_files(page.read_text(encoding="utf-8")) for page in pages}
    assert {page: names for page, names in found.items() if names} == {}


def test_a_missing_file_is_found() -> None:
    text = "`atlas_lm/files.py` `callbacks/none.py` (`pytest -m slow tests/nowhere`) conf/callbacks"
    assert missing_files(text) == ["callbacks/none.py", "tests/nowhere"]


# Ids

ID = r"(?:[MNT]\d{1,2}|C\d{1,2}b?|G\d-\d|W0|D\d-\d|AC-\w+-\d)"


@functools.cache
def explained() -> set[str]:
    """The ids that have a heading or begin a row of a table."""
    text = "".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("mathematics.md", "safeguards.md"))
    rows = re.findall(rf"^\| ({ID}) \|", text, re.MULTILINE)
    notation = re.findall(rf"`({ID})`", "".join(re.findall(r"^\| `.*$", text, re.MULTILINE)))
    return {*re.findall(rf"^#+ ({ID}) ·", text, re.MULTILINE), *rows, *notation}


def unknown_ids(text: str) -> list[str]:
    return sorted(set(re.findall(rf"(?<![\w.\-]){ID}(?![\w\-])", text)) - explained())


def test_ids_are_explained() -> None:
    found = {name_of(path): unknown_ids(path.read_text(encoding="utf-8")) for path in [*PAGES, *CODE]}
    assert {name: ids for name, ids in found.items() if ids} == {}


def test_an_unknown_id_is_found() -> None:
    assert unknown_ids("M16, C1b and G4-6 are known; M99 is not, nor C77; GM99, M99x and 3-M99 are no ids") == [
        "C77",
        "M99",
    ]
    assert {"M1", "M17", "N2", "T5", "C10", "C1b", "G2-1", "G4-6", "W0"} <= explained()


# Commands


def commands(text: str) -> list[str]:
    """The `python -m` and `python train.py` commands of a page, from blocks and from inline code."""
    text = text.replace("\\\n", " ")
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    rest = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", rest)]
    found = []
    for line in lines:
        for part in re.split(r"&&|\|\||;", line):
            match = re.search(r"python (?:-m |train\.py).*", part)
            if match and not part.strip().startswith("#"):
                found.append(match[0].strip())
    return found


def words_of(command: str) -> list[str]:
    """Its arguments, without the comment after it and without what stands for something."""
    words = shlex.split(command, comments=True)
    return [word for word in words[1:] if word not in ("…", "...")]


@functools.cache
def whats_wrong(command: str) -> str | None:
    """Why a command cannot be given; nothing is run."""
    if re.search(r"<[\w ]+>|=\.\.\.|\[key=value", command):  # a form: what is to be put there is not known
        command = re.sub(r"\S*(?:<[\w -]+>|=\.\.\.|\[key=value \.\.\.\])\S*", "", command)
    first, *words = words_of(command)
    if first == "train.py":
        return wrong_overrides(words)
    module, *words = words
    if importlib.util.find_spec(module) is None:
        return f"no module {module}"
    if module == "atlas_lm":
        return wrong_arguments(words)
    if module.startswith("benchmarks."):
        source = (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
        unknown = [word for word in words if word.startswith("--") and f'"{word}"' not in source]
        overrides = [word for word in words if re.match(r"[\w.]+\.[\w.]+=", word)]
        return f"{module} has no {unknown}" if unknown else wrong_overrides(overrides) if overrides else None
    return None


def wrong_arguments(words: list[str]) -> str | None:
    """Of python -m atlas_lm."""
    if not words:
        return None
    name, *rest = words
    if name == "--help":
        return None
    if name not in COMMANDS:
        return f"no command {name}"
    if name in ("prepare", "embed"):
        try:
            given = parse_arguments(rest, prepare if name == "prepare" else embed)
            if name == "embed" and "model" not in given:
                return "model= is missing"
        except ValueError as error:
            return str(error) if rest else None
        return None
    if name == "doctor":
        named = any(word.startswith("+experiment=") for word in rest)
        return wrong_overrides(rest if named else ["+experiment=stage1", *rest])
    if name == "latent":
        if rest and rest[0] not in ("five_cat", "--help"):
            return f"latent has no {rest[0]}"
        rest = rest[1:]
    if name == "inspect":
        parts = {
            "calibrate": inspect_calibrate.Calibration,
            "compare": inspect.Comparison,
            "dashboard": inspect.Dashboard,
        }
        options: Any = parts.get(rest[0] if rest else "", inspect.Options)
        rest = rest[1:] if rest and rest[0] in parts else rest
    elif name == "gates":
        if rest and rest[0] not in (*gates.PHASES, "chunk_sizes"):
            return f"gates has no {rest[0]}"
        options = chunk_sizes.Options if rest[:1] == ["chunk_sizes"] else gates.Options
        rest = rest[1:]
    else:
        options = importlib.import_module(f"atlas_lm.cli.{name}").Options
    known = {f.name for f in fields(options)} | {"--help"}
    unknown = [word for word in rest if ("=" in word or word.startswith("-")) and word.partition("=")[0] not in known]
    return f"{name} has no {unknown}" if unknown else None


def wrong_overrides(words: list[str]) -> str | None:
    """Of python train.py: they are composed, a sweep with the first value of each."""
    words = [word for word in words if word not in ("-m", "--help", "--cfg", "job")]
    chosen = []
    for word, override in zip(words, OverridesParser.create().parse_overrides(words), strict=True):
        values = list(override.sweep_string_iterator()) if override.is_sweep_override() else []
        chosen.append(f"{word.partition('=')[0]}={values[0]}" if values else word)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            compose("train", chosen)
    except (HydraException, OmegaConfBaseException) as error:
        return str(error)
    finally:
        GlobalHydra.instance().clear()
    return None


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=name_of)
def test_commands_can_be_given(page: Path) -> None:
    found = {command: whats_wrong(command) for command in commands(page.read_text(encoding="utf-8"))}
    assert {command: wrong for command, wrong in found.items() if wrong} == {}


def test_commands_are_found() -> None:
    page = "a `python -m atlas_lm generate\nrun=x` b\n```\npython train.py a=1 && python train.py b=2 # c\n$ ls\n```\n"
    assert commands(page) == ["python train.py a=1", "python train.py b=2 # c", "python -m atlas_lm generate run=x"]
    assert len(commands((ROOT / "README.md").read_text(encoding="utf-8"))) > 15


@pytest.mark.parametrize(
    "command",
    [
        "python -m atlas_lm gates phase2 run=stage1", "python -m atlas_lm gates chunk_sizes model=tiny",
        "python -m atlas_lm", "python -m atlas_lm prepare source=stdlib out=x",
        "python train.py -m +experiment=stage2 model.local_chunks=[8],[16] +sweep=chunk_sizes",
        "python train.py +experiment=stage1 … resume=auto", "python train.py ~callbacks.niah_probe",
    ],
)  # fmt: skip
def test_a_right_command_passes(command: str) -> None:
    assert whats_wrong(command) is None


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("python -m atlas_lm.generate2 run=x", "no module"),
        ("python -m atlas_lm generat run=x", "no command"),
        ("python -m atlas_lm generate runs=x", "has no"),
        ("python -m atlas_lm gates phase3 run=x", "has no"),
        ("python -m atlas_lm doctor model.windwo=3", "windwo"),
        ("python -m atlas_lm gates chunk_sizes step=1", "has no"),
        ("python -m atlas_lm prepare source=stdlib", "out= is missing"),
        ("python -m atlas_lm embed source=stdlib out=x", "model= is missing"),
        ("python -m atlas_lm latent six_cat run=x", "has no"),
        ("python -m atlas_lm latent five_cat runs=x", "has no"),
        ("python -m benchmarks.nothing", "no module"),
        ("python -m benchmarks.faults --sed 2", "has no"),
        ("python -m benchmarks.safeguards callbacks.niah_prob.needles=4", "niah_prob"),
        ("python train.py +experiment=stage9", "stage9"),
        ("python train.py optim.total_step=3", "total_step"),
        ("python train.py callbacks.niah_probe.need=3", "need"),
        ("python train.py model=900m", "900m"),
        ("python train.py ~callbacks.niah", "niah"),
    ],
)
def test_a_wrong_command_is_found(command: str, words: str) -> None:
    assert words in (whats_wrong(command) or "")


# Python


def wrong_python(text: str) -> list[str]:
    """Blocks of Python that do not parse, and imports in them that fail."""
    wrong = []
    for block in re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        try:
            tree = ast.parse(block)
        except SyntaxError as error:
            wrong.append(str(error))
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module or "")
                wrong += [f"{node.module}.{n.name}" for n in node.names if not hasattr(module, n.name)]
    return wrong


def test_python_in_pages_can_be_imported() -> None:
    found = {name_of(page): wrong_python(page.read_text(encoding="utf-8")) for page in PAGES}
    assert {page: wrong for page, wrong in found.items() if wrong} == {}


def test_wrong_python_is_found() -> None:
    text = "```python\nfrom callbacks import SpikeRollback, Nothing\n```\n```python\nx = (\n```\n"
    found = wrong_python(text)
    assert (len(found), found[0]) == (2, "callbacks.Nothing")


# The README, the wall, the pictures, the decisions


def too_long(text: str) -> bool:
    return len(text.splitlines()) > README_LINES


def test_the_readme_is_short() -> None:
    assert not too_long((ROOT / "README.md").read_text(encoding="utf-8"))
    assert too_long("x\n" * (README_LINES + 1))


def protocol_members() -> Iterator[tuple[str, str]]:
    """(Protocol, member) of every Protocol in callbacks/."""
    for path in sorted(ROOT.glob("callbacks/**/*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "Protocol" for base in node.bases):
                for member in node.body:
                    if isinstance(member, ast.FunctionDef):
                        yield node.name, member.name
                    elif isinstance(member, ast.AnnAssign):
                        yield node.name, ast.unparse(member.target)


def undocumented(page: str) -> list[str]:
    """Members of Protocols that the page does not name in the row of their Protocol."""
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", page, re.MULTILINE))
    return [f"{kind}.{name}" for kind, name in protocol_members() if not re.search(rf"`{name}\b", rows.get(kind, ""))]


def test_the_page_of_the_safeguards_has_every_protocol() -> None:
    page = (ROOT / "docs" / "safeguards.md").read_text(encoding="utf-8")
    assert undocumented(page) == []
    assert undocumented(page.replace("`held_out_loss(batch)`", "")) == ["HasHeldOutLoss.held_out_loss"]


def one_sided(page: str) -> list[str]:
    """Names of the table of the wall that one side does not have."""
    section = page.partition("## Names that cross the wall")[2].partition("\nAmong callbacks")[0]
    names = re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)
    assert names
    sides = []
    for folder in ("callbacks", "atlas_lm"):
        sides.append("".join(path.read_text(encoding="utf-8") for path in ROOT.glob(f"{folder}/**/*.py")))
    return [name for name in names if not all(re.search(rf"\b{re.escape(name)}\b", side) for side in sides)]


def test_names_that_cross_the_wall_are_on_both_sides() -> None:
    page = (ROOT / "docs" / "safeguards.md").read_text(encoding="utf-8")
    assert one_sided(page) == []
    assert one_sided(page.replace("| `haystack` |", "| `haystacks` |")) == ["haystacks"]


@pytest.mark.parametrize("hook", re.findall(r"`(\w+)(?:\([^`]*\))?`", (ROOT / "docs" / "safeguards.md")
                                            .read_text(encoding="utf-8").partition("\nAmong callbacks")[2]
                                            .partition("\n## ")[0]))  # fmt: skip
def test_names_among_callbacks_exist(hook: str) -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("callbacks/**/*.py"))
    assert re.search(rf"\b{hook}\b", source)


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_pictures_are_what_the_script_draws(name: str) -> None:
    drawn = pictures.PICTURES[name]()
    assert (ROOT / name).read_text(encoding="utf-8") == drawn, "run python -m benchmarks.pictures"
    ElementTree.fromstring(drawn)


def test_the_index_lists_every_decision_with_its_title_and_status() -> None:
    folder = ROOT / "docs" / "decisions"
    index = (folder / "index.md").read_text(encoding="utf-8")
    pages = sorted(folder.glob("[0-9]*.md"))
    assert [int(page.name[:4]) for page in pages] == list(range(1, len(pages) + 1))
    for page in pages:
        title, _, dated = page.read_text(encoding="utf-8").split("\n", 3)[:3]
        date, _, status = dated.partition(" · ")
        assert f"| [{page.name[:4]}]({page.name}) | {title[2:]} | {date} | {status} |" in index
