"""What the checkpoints of a folder looked like when they were written: `manifest.json` beside them.

{"files": {"step-0000200.ckpt": {"size": bytes, "sha256": …, "logged_steps": …, "global_step": …, "written": Unix
seconds}}, "checksum": …}

Where the tensors are sharded (`shards.py`) the entry has their folder and files too, as `shards`.
`logged_steps` and `global_step` are the checkpoint's position, which orders them; `written` is for people alone.

An entry is there before its file is. While a file is being replaced, `previous` holds what it was before, so that what
lies there is known whenever the process dies. `checksum` is the manifest's own: a damaged one accuses no checkpoint.
"""

import hashlib
import json
import time
from pathlib import Path
from typing import Any

from atlas_lm.files import sha256, write_atomically

MANIFEST = "manifest.json"
SHARDS = (
    "shards"  # of an entry and of a sharded checkpoint: {"folder": name, "files": {name: {"size": bytes, "sha256": …}}}
)

# logging steps, which never go back, and optimizer steps of a checkpoint: what orders them
Position = tuple[float, int]


def verify(path: str | Path) -> str | None:
    """Why a file is not what was written, or None; a file without an entry has nothing to differ from. Follows links.

    OSError: it cannot be read.
    """
    path = Path(path).resolve()
    wanted = versions(path)
    if not wanted:
        return None
    size = path.stat().st_size
    if size not in [entry["size"] for entry in wanted]:
        return f"it has {size} bytes instead of {wanted[0]['size']}"
    found = sha256(path)
    entries = [entry for entry in wanted if entry["sha256"] == found]
    if not entries:
        return f"its checksum is not the one in {MANIFEST}"
    return verify_shards(path.parent, entries[0][SHARDS]) if SHARDS in entries[0] else None


def verify_shards(folder: Path, shards: dict[str, Any]) -> str | None:
    """Why the shards of a checkpoint in `folder` are not what was written, or None. `shards`: as in its entry."""
    name = Path(shards["folder"]).name
    for file, wanted in shards["files"].items():
        path = folder / name / Path(file).name
        if not path.is_file():
            return f"{name}/{file} is missing"
        if path.stat().st_size != wanted["size"]:
            return f"{name}/{file} has {path.stat().st_size} bytes instead of {wanted['size']}"
        if sha256(path) != wanted["sha256"]:
            return f"the checksum of {name}/{file} is not the one in {MANIFEST}"
    return None


def versions(path: Path) -> list[dict[str, Any]]:
    """What a file (no link) may be: its entry, and those before it if it was being replaced; none if it is unknown."""
    return _flat(read(path.parent).get(path.name))


def position_of(entry: dict[str, Any]) -> Position:
    """The position in an entry; entries of older versions hold the optimizer step alone."""
    step = entry.get("global_step") or 0
    return entry.get("logged_steps", step), step


def record(
    folder: Path, name: str, content: Path, checksum: str, position: Position, shards: dict[str, Any] | None = None
) -> None:
    """Enter the file that is about to be renamed from `content` to `name`, beside what has that name now. Durable.

    Entries of files that are gone are dropped.
    """
    entries = {other: entry for other, entry in read(folder).items() if (folder / other).is_file()}
    entry = {
        "size": content.stat().st_size,
        "sha256": checksum,
        "logged_steps": position[0],
        "global_step": position[1],
        "written": round(time.time(), 3),
        **({SHARDS: shards} if shards else {}),
    }
    before = [old for old in _flat(entries.get(name)) if old["sha256"] != entry["sha256"]]
    _write(folder, {**entries, name: {**entry, "previous": before} if before else entry})


def settle(folder: Path, name: str) -> None:
    """The file has been replaced: forget what it was before."""
    entries = read(folder)
    if entries.get(name, {}).pop("previous", None):
        _write(folder, entries)


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The entries by file name; none where the manifest is missing or damaged."""
    try:
        found = json.loads((folder / MANIFEST).read_bytes())
        files = found["files"]
        return files if found["checksum"] == _checksum(files) else {}
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def _flat(entry: dict[str, Any] | None) -> list[dict[str, Any]]:
    if entry is None:
        return []
    return [{name: value for name, value in entry.items() if name != "previous"}, *entry.get("previous", [])]


def _write(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    text = json.dumps({"files": files, "checksum": _checksum(files)}, indent=1, sort_keys=True)
    write_atomically(folder / MANIFEST, text + "\n")


def _checksum(files: Any) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
