"""Which tensor of a checkpoint fills which parameter: found by an architecture's names, checked, read by boxes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longspan.model.config import DecoderConfig
from longspan.model.encoder_config import EncoderConfig
from longspan.model.hf_files import TensorFiles
from longspan.model.hf_names import Stored
from longspan.model.hf_table import Architecture
from longspan.model.shards import Region

Reader = Callable[[Region], Tensor]
Shapes = dict[str, tuple[int, ...]]


def readers_of(
    architecture: Architecture, config: DecoderConfig | EncoderConfig, shapes: Shapes, files: TensorFiles, folder: Path
) -> dict[str, Reader]:
    """What reads a box of each parameter of a whole model, whose parameters have `shapes`.

    Raises:
        ValueError: tensors that are missing, surplus or misshapen.
    """
    found: dict[str, Reader] = {}
    stacks: dict[str, dict[int, Reader]] = {}
    for entry, name in _match(architecture, config, shapes, files, folder):
        if entry.index is not None:
            stacks.setdefault(entry.ours[0], {})[entry.index] = _reader(files, name, 0, entry.transposed)
            continue
        start = 0
        for ours in entry.ours:
            found[ours] = _reader(files, name, start, entry.transposed, shapes[ours] if entry.folded else None)
            start += shapes[ours][0]
    return found | {ours: _stack_reader(entries) for ours, entries in stacks.items()}


def _stack_reader(entries: Mapping[int, Reader]) -> Reader:
    def read(region: Region) -> Tensor:
        return torch.stack([entries[index](region[1:]) for index in range(region[0].start, region[0].stop)])

    return read


def _reader(
    files: TensorFiles, name: str, start: int, transposed: bool, unfolded: tuple[int, ...] | None = None
) -> Reader:
    def read(region: Region) -> Tensor:
        if unfolded is not None:
            # Such tensors are small: each rank reads all of it.
            return files.read(name, tuple(slice(0, n) for n in files.shape(name))).reshape(unfolded)[region]
        rows = slice(region[0].start + start, region[0].stop + start)
        if transposed:
            return files.read(name, (region[1], rows)).t()
        return files.read(name, (rows, *region[1:]))

    return read


def _match(
    architecture: Architecture, config: DecoderConfig | EncoderConfig, shapes: Shapes, files: TensorFiles, folder: Path
) -> list[tuple[Stored, str]]:
    """Every tensor the whole model wants beside its name in the files; all that does not fit is refused here."""
    held = {_renamed(name, architecture.renamed): name for name in files}
    bare = not any(name.startswith(architecture.prefix) for name in files)
    plan: list[tuple[Stored, str]] = []
    missing: list[str] = []
    for entry in _names(architecture, config, shapes, folder):
        name = entry.name.removeprefix(architecture.prefix) if bare else entry.name
        if name not in held:
            missing.append(name)
            continue
        name = held[name]
        shape = entry.shape(shapes)
        if files.shape(name) != shape:
            raise ValueError(
                f"tensor {name!r} of {folder} must have shape {shape}, got {files.shape(name)}: "
                "do config and weights belong together?"
            )
        files.check_dtype(name)
        plan.append((entry, name))
    if missing:
        raise ValueError(
            f"{folder} must hold tensor {missing[0]!r}, got {len(missing)} missing in all: fetch the checkpoint again"
        )
    wanted = {name for _, name in plan}
    surplus = [name for name in files if name not in wanted and not re.search(architecture.ignored, name)]
    for twice, ours in architecture.tied:
        if twice in surplus:
            _check_tied(files, twice, next(name for entry, name in plan if entry.ours == (ours,)), folder)
            surplus.remove(twice)
    if surplus:
        raise ValueError(
            f"{folder} may hold only the model's tensors, got {sorted(surplus)[0]!r} and "
            f"{len(surplus) - 1} more: the config does not ask for it"
        )
    return plan


def _renamed(name: str, renamed: tuple[tuple[str, str], ...]) -> str:
    for old, new in renamed:
        name = re.sub(old, new, name)
    return name


def _names(architecture: Architecture, config: Any, shapes: Shapes, folder: Path) -> list[Stored]:
    stored = architecture.names(config)
    unknown = sorted({name for entry in stored for name in entry.ours} ^ set(shapes))
    if unknown:
        raise ValueError(
            f"the model must have the parts of {architecture.model_type}, as {folder} does, got a difference "
            f"at {unknown[0]!r}: build it from read_config(path)"
        )
    return stored


def _check_tied(files: TensorFiles, twice: str, kept: str, folder: Path) -> None:
    """A head stored beside a tied embedding must be the same values, for it will not be read."""
    rows, *columns = files.shape(kept)
    same = files.shape(twice) == (rows, *columns)
    for start in range(0, rows, 4096):
        box = (slice(start, min(start + 4096, rows)), *(slice(0, n) for n in columns))
        same = same and torch.equal(files.read(kept, box), files.read(twice, box))
    if not same:
        raise ValueError(
            f"{twice!r} of {folder} must equal the embedding or bias it is tied to, got other values: "
            'set "tie_word_embeddings": false'
        )
