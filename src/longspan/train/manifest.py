"""The manifest of a checkpoint directory: names, sizes and digests of its files, and the caller's meta data.

`manifest.json` is `{"digest": blake2b of the content, "content": {format, step, order, meta, files}}`, so that a bit
flipped in the manifest itself (a position in the data, say) is found too. `order` counts the saves of a directory: the
latest checkpoint is the one written last, also after a run was resumed from an older step.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
FORMAT = 1
_STEP = re.compile(r"step_(\d{6,})")
_CHUNK_BYTES = 1 << 22


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or of another model."""


class SaveError(RuntimeError):
    """A checkpoint that could not be written for another reason than the disk."""


def step_name(step: int) -> str:
    return f"step_{step:06d}"


def step_of(path: Path) -> int | None:
    """The step of a complete checkpoint's directory name, None for any other name."""
    match = _STEP.fullmatch(path.name)
    return int(match[1]) if match else None


def digest_file(path: Path) -> dict[str, Any]:
    """Size and blake2b of one file, in constant memory."""
    digest = hashlib.blake2b(digest_size=32)
    size_bytes = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            size_bytes += len(chunk)
    return {"bytes": size_bytes, "blake2b": digest.hexdigest()}


def _digest_json(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=32).hexdigest()


def fsync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_manifest(directory: Path, content: dict[str, Any]) -> None:
    with (directory / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump({"digest": _digest_json(content), "content": content}, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(directory: Path) -> dict[str, Any]:
    """The content of a manifest whose own digest is right.

    Raises:
        CheckpointError: missing, damaged, or of another format.
    """
    name = directory.name
    try:
        document = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        content, digest = document["content"], document["digest"]
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {name}: file {MANIFEST} is missing") from None
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError):
        raise CheckpointError(f"checkpoint {name}: file {MANIFEST} is damaged (not a manifest)") from None
    if _digest_json(content) != digest:
        raise CheckpointError(f"checkpoint {name}: file {MANIFEST} is damaged (its content does not match its digest)")
    if content["format"] != FORMAT:
        raise CheckpointError(
            f"checkpoint {name} has format {content['format']}, this longspan reads {FORMAT}; use the one that wrote it"
        )
    if content["step"] != step_of(directory):
        raise CheckpointError(f"checkpoint {name} was written as {step_name(content['step'])}; rename it back")
    return content


def verify_files(directory: Path, part: tuple[int, int] = (0, 1)) -> None:
    """Compares files `part[0]`, `part[0] + part[1]`, ... of a checkpoint with its manifest.

    Raises:
        CheckpointError: names the first file that is missing or differs, and how.
    """
    files = read_manifest(directory)["files"]
    for name in sorted(files)[part[0] :: part[1]]:
        expected, path = files[name], directory / name
        what = f"checkpoint {directory.name}: file {name}"
        if not path.is_file():
            raise CheckpointError(f"{what} is missing")
        size_bytes = path.stat().st_size
        if size_bytes != expected["bytes"]:
            how = "truncated" if size_bytes < expected["bytes"] else "too long"
            raise CheckpointError(f"{what} is {how} ({size_bytes} bytes, {expected['bytes']} were written)")
        if digest_file(path)["blake2b"] != expected["blake2b"]:
            raise CheckpointError(f"{what} is damaged (its content does not match its blake2b digest)")
