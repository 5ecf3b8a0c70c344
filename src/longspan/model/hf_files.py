"""A folder of safetensors: its tensors by name and box, read lazily; and the writing of one, never half visible.

Formats: one `model.safetensors`, or several files with `model.safetensors.index.json`. Pickles are never opened.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_SAMPLES, _SAMPLE_BYTES = 256, 4096
_STORED_DTYPES = ("F64", "F32", "F16", "BF16")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ValueError naming the file where it is not one."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be JSON, got an error: {error}: fetch the file again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(values).__name__}: fetch the file again")
    return values


class TensorFiles:
    """The tensors of a checkpoint folder. Headers are read at once; values only by `read`, one box at a time."""

    def __init__(self, folder: Path) -> None:
        self._slices: dict[str, Any] = {}
        self._paths: dict[str, Path] = {}
        for path in _files(folder):
            try:
                # Kept open: the file is mapped, not read, and closes with the last slice of it.
                handle = safe_open(str(path), framework="pt")
                for name in handle.keys():  # noqa: SIM118 (not a dict)
                    self._slices[name], self._paths[name] = handle.get_slice(name), path
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"{path} must be a whole safetensors file, got: {error}: fetch the file again"
                ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._slices)

    def __contains__(self, name: str) -> bool:
        return name in self._slices

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a stored tensor, from the header."""
        return tuple(self._slices[name].get_shape())

    def check_dtype(self, name: str) -> None:
        """Raises ValueError where a tensor is not stored as plain floats (a quantised checkpoint)."""
        dtype = self._slices[name].get_dtype()
        if dtype not in _STORED_DTYPES:
            raise ValueError(
                f"tensor {name!r} must be stored as one of {', '.join(_STORED_DTYPES)}, got {dtype} in "
                f"{self._paths[name]}: give an unquantised checkpoint"
            )

    def read(self, name: str, region: tuple[slice, ...]) -> Tensor:
        """One box of a stored tensor, in its stored dtype, on the CPU."""
        return self._slices[name][region]


def fingerprint(folder: Path) -> str:
    """Digest that tells checkpoints apart, of every file's size and of 4 KiB at 256 places of it, the header's too."""
    digest = hashlib.blake2b(digest_size=16)
    for path in _files(folder):
        size = path.stat().st_size
        digest.update(f"{size}/".encode())
        with path.open("rb") as file:
            for place in range(_SAMPLES):
                file.seek(size * place // _SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{folder / INDEX} must hold a 'weight_map', got {weight_map!r}: fetch the file again")
        names = sorted(set(map(str, weight_map.values())))
        for name in names:
            if Path(name).name != name:
                raise ValueError(
                    f"{folder / INDEX} may name only files beside it, got {name!r}: do not trust this folder"
                )
            if not (folder / name).is_file():
                raise ValueError(f"{folder} must hold every file of its index, got none of name {name!r}: fetch it")
        return [folder / name for name in names]
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        raise ValueError(
            f"{folder} must hold safetensors, got only {pickles[0]}, a pickle, which can run code when read: "
            "convert it with transformers' save_pretrained"
        )
    raise ValueError(f"{folder} must hold {SINGLE} or {INDEX}, got neither: is it a checkpoint folder?")


def plan_files(num_bytes: Mapping[str, int], max_file_bytes: int) -> dict[str, list[str]]:
    """File name to tensor names, in order, no file above `max_file_bytes` unless by a single tensor."""
    groups: list[list[str]] = [[]]
    held = 0
    for name, size in num_bytes.items():
        if groups[-1] and held + size > max_file_bytes:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Writes beside `path` and renames: a reader sees the old file or the whole new one; an error leaves nothing."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """An object as indented JSON, whole or not at all."""
    write_whole(path, lambda partial: partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8"))


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """One safetensors file, whole or not at all; tensors are moved to the CPU."""
    ready = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}

    def write(partial: Path) -> None:
        try:
            save_file(ready, str(partial), metadata={"format": "pt"})
        except SafetensorError as error:  # how safetensors reports a full disk
            raise OSError(f"{path} could not be written: {error}") from None

    write_whole(path, write)


def itemsize(dtype: torch.dtype) -> int:
    """Bytes of one value."""
    return torch.empty((), dtype=dtype, device="meta").element_size()
