"""Import and export of Hugging Face checkpoints: a folder with config.json and safetensors. Nothing is downloaded, no
pickle is opened.

`hf_table.ARCHITECTURES` lists what is understood. Values are read lazily, box by box: a rank with a sharded model reads
its own shard from the mapped files, and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longspan.model import hf_configs, hf_files
from longspan.model.config import DecoderConfig
from longspan.model.decoder import DecoderLM, build
from longspan.model.encoder import Encoder, build_encoder
from longspan.model.encoder_config import EncoderConfig
from longspan.model.hf_files import TensorFiles
from longspan.model.hf_match import readers_of
from longspan.model.hf_names import Stored
from longspan.model.hf_table import ARCHITECTURES, Architecture, architectures_of
from longspan.model.lora import is_adapter
from longspan.model.moe import reset_balance
from longspan.model.shards import Collector, Region, fill

M = TypeVar("M", bound=nn.Module)
C = TypeVar("C")


@overload
def load_pretrained(
    path: str | os.PathLike[str], *, dtype: torch.dtype = ..., device: torch.device | str = ...
) -> DecoderLM: ...
@overload
def load_pretrained(
    path: str | os.PathLike[str], *, dtype: torch.dtype = ..., device: torch.device | str = ..., kind: type[M]
) -> M: ...
def load_pretrained(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    kind: type[nn.Module] = DecoderLM,
) -> nn.Module:
    """The model of a checkpoint folder, whole, on one device; for a sharded model see `load_into`.

    Args:
        path: folder with config.json and safetensors.
        dtype: of the parameters, whatever the storage (float64, float32, float16 or bfloat16).
        device: where they go; tensors pass through the CPU one at a time.
        kind: the class that the caller expects, `DecoderLM` or `Encoder`.

    Raises:
        ValueError: another architecture, one that builds another class, a config key that is not understood, a missing,
            surplus or misshapen tensor, a damaged file, a pickle: one line naming it.
    """
    values = _config_json(Path(path))
    architecture = _architecture(values)
    _check_kind(architecture, kind, path)
    config = architecture.read(hf_configs.Keys(values))
    model = _outline(config).to(dtype)
    model.to_empty(device=device)
    load_into(model, path)
    return model


@overload
def read_config(path: str | os.PathLike[str]) -> DecoderConfig: ...
@overload
def read_config(path: str | os.PathLike[str], kind: type[C]) -> C: ...
def read_config(path: str | os.PathLike[str], kind: type = DecoderConfig) -> Any:
    """The config of a checkpoint folder, of the class expected. Raises ValueError as `load_pretrained`."""
    values = _config_json(Path(path))
    architecture = _architecture(values)
    _check_kind(architecture, kind, path)
    return architecture.read(hf_configs.Keys(values))


def _check_kind(architecture: Architecture, kind: type, path: str | os.PathLike[str]) -> None:
    if kind not in (architecture.model, architecture.config):
        raise ValueError(
            f"{path} must hold the checkpoint of a {kind.__name__}, got model type {architecture.model_type!r}: "
            f"that is of class {architecture.model.__name__}"
        )


def load_into(model: DecoderLM | Encoder, path: str | os.PathLike[str]) -> None:
    """Fills `model` from a checkpoint; of DTensors each rank reads its own shard only. All checks come before the first
    value is written.

    The model keeps its own config, of which the shapes must fit: change the rope scaling or the windows before, to
    stretch a model.

    Raises:
        ValueError: as `load_pretrained`; and parameters on the meta device.
    """
    parameters, boxes, found = dict(model.named_parameters()), model.boxes(), readers(model, path)
    reset_balance(model)
    for name, read in found.items():
        if name in parameters:
            fill(parameters[name], read, boxes.get(name))


def readers(model: DecoderLM | Encoder, path: str | os.PathLike[str]) -> dict[str, Callable[[Region], Tensor]]:
    """What reads a box of each parameter of the whole of `model`, adapters left out. Raises as `load_into`."""
    folder = Path(path)
    architecture = _architecture(_config_json(folder))
    _check_kind(architecture, type(model.config), folder)
    return readers_of(architecture, model.config, _shapes(model.config), TensorFiles(folder), folder)


def _config_json(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ValueError(
            f"a checkpoint must be a folder, got {str(folder)!r}: download it first, longspan fetches nothing"
        )
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"a checkpoint folder must hold config.json, got {str(folder)!r} without: is it the right folder?"
        )
    return hf_files.read_json(folder / "config.json")


def _architecture(values: dict[str, Any]) -> Architecture:
    names = values.get("architectures") or []
    if not names:
        names = [name for name, entry in ARCHITECTURES.items() if entry.model_type == values.get("model_type")]
    if not isinstance(names, list) or len(names) != 1 or names[0] not in list(ARCHITECTURES):
        got = names or values.get("model_type")
        raise ValueError(
            f"the architecture must be one of {', '.join(ARCHITECTURES)}, got {got!r}: longspan reads no other"
        )
    return ARCHITECTURES[names[0]]


def save_pretrained(
    model: DecoderLM | Encoder,
    path: str | os.PathLike[str],
    *,
    architecture: str | None = None,
    dtype: torch.dtype | None = None,
    max_file_bytes: int = 5_000_000_000,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Writes a folder that transformers loads with equal logits. config.json comes last: without it a folder is no
    checkpoint.

    With DTensor parameters every rank must call, each with its part of the model; each tensor is gathered in turn and
    rank 0 writes. Otherwise call it on one rank.

    Args:
        path: folder, made where absent; it must not hold a checkpoint yet.
        architecture: a key of `ARCHITECTURES`; None: the first that can say all of the config.
        dtype: of the stored values; None: that of the parameters.
        max_file_bytes: above it the tensors go to several files with an index.
        extra: harmless keys for config.json, such as eos_token_id.

    Raises:
        ValueError: no architecture can hold the model, a folder that holds a checkpoint, an `extra` key that is not
            harmless.
        OSError: the disk; on all ranks where the model is sharded.
    """
    parameters = Collector(model, model.boxes())
    if any(map(is_adapter, parameters)):
        raise ValueError(
            "a model is saved without adapters, got one with some: call merge_lora, or hf_adapter.save_adapter"
        )
    save_tensors(
        model.config,
        parameters,
        _shapes(model.config),
        path,
        sharded=not parameters.alone,
        architecture=architecture,
        dtype=dtype or next(model.parameters()).dtype,
        max_file_bytes=max_file_bytes,
        extra=extra,
    )


def save_tensors(
    config: DecoderConfig | EncoderConfig,
    parameters: Mapping[str, Tensor],
    shapes: dict[str, tuple[int, ...]],
    path: str | os.PathLike[str],
    *,
    sharded: bool = False,
    architecture: str | None = None,
    dtype: torch.dtype = torch.float32,
    max_file_bytes: int = 5_000_000_000,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """`save_pretrained` of parameters that a mapping makes as they are asked for, one file's worth at a time.

    Args:
        shapes: of all parameters.
        sharded: every rank calls, asks for the same names, and rank 0 gets them.

    Raises:
        As `save_pretrained`.
    """
    folder = Path(path)
    name, values = _describe(config, architecture)
    for key in extra or {}:
        if key not in hf_configs.HARMLESS:
            raise ValueError(
                f"extra may hold only keys that do not change the maths, got {key!r}: change the model's config"
            )
    if max_file_bytes < 1:
        raise ValueError(f"max_file_bytes must be positive, got {max_file_bytes}: 5_000_000_000 is usual")
    values |= {"torch_dtype": str(dtype).removeprefix("torch."), **(extra or {})}
    stored = {entry.name: entry for entry in ARCHITECTURES[name].names(config)}
    num_bytes = {
        theirs: torch.Size(entry.shape(shapes)).numel() * hf_files.itemsize(dtype) for theirs, entry in stored.items()
    }
    files = hf_files.plan_files(num_bytes, max_file_bytes)

    relay = _Relay(sharded=sharded)
    relay.run(lambda: _prepare(folder))
    gather = _Gather(parameters, dtype, keep=relay.writes)
    for file, names in files.items():
        tensors = {theirs: gather(stored[theirs]) for theirs in names}
        relay.run(lambda file=file, tensors=tensors: hf_files.write_tensors(folder / file, tensors))
    relay.run(lambda: _finish(folder, values, files, sum(num_bytes.values())))


class _Written(NamedTuple):
    error: Exception | None


class _Relay:
    """Runs what one rank does and raises its error on all: the others would wait for ever in the next gather."""

    def __init__(self, *, sharded: bool) -> None:
        self.sharded = sharded
        self.writes = not sharded or dist.get_rank() == 0

    def run(self, action: Callable[[], None]) -> None:
        outcome = _Written(None)
        if self.writes:
            try:
                action()
            except (OSError, ValueError) as error:
                outcome = _Written(error)
        if self.sharded:
            box = [outcome]
            dist.broadcast_object_list(box, src=0)
            outcome = box[0]
        if outcome.error is not None:
            raise outcome.error


def stored_names(config: DecoderConfig | EncoderConfig) -> list[Stored]:
    """The names of the first architecture that can hold the model. Raises ValueError where none can."""
    return ARCHITECTURES[_describe(config, None)[0]].names(config)


def _describe(config: DecoderConfig | EncoderConfig, architecture: str | None) -> tuple[str, dict[str, Any]]:
    if architecture is not None:
        if architecture not in ARCHITECTURES:
            raise ValueError(
                f"architecture must be one of {', '.join(ARCHITECTURES)}, got {architecture!r}: pick one of these"
            )
        if architecture not in architectures_of(config):
            raise ValueError(f"{architecture} cannot hold this model: it holds none of {type(config).__name__}")
        return architecture, ARCHITECTURES[architecture].write(config)
    reasons = []
    for name, entry in architectures_of(config).items():
        try:
            return name, entry.write(config)
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError(f"no Hugging Face architecture can hold this model: {'; '.join(reasons)}")


class _Gather:
    """Stored tensors from parameters; of a stack, whose entries come one after another, the last one gathered stays."""

    def __init__(self, parameters: Mapping[str, Tensor], dtype: torch.dtype, *, keep: bool) -> None:
        self.parameters, self.dtype, self.keep = parameters, dtype, keep
        self._last: tuple[str, Tensor] | None = None

    def __call__(self, entry: Stored) -> Tensor:
        """A stored tensor, on the rank that writes; elsewhere nothing."""
        if entry.index is not None:
            (name,) = entry.ours
            if self._last is None or self._last[0] != name:
                self._last = None  # not two at a time
                self._last = (name, self._whole(name))
            # A copy: safetensors takes no two tensors of one storage.
            return self._last[1][entry.index].clone() if self.keep else torch.empty(0)
        parts = [self._whole(name) for name in entry.ours]
        joined = torch.cat(parts) if len(parts) > 1 else parts[0]
        if entry.folded is not None and self.keep:
            return joined.reshape(entry.folded)
        return joined.t() if entry.transposed and self.keep else joined

    def _whole(self, name: str) -> Tensor:
        whole = self.parameters[name].detach()
        return whole.to("cpu", self.dtype) if self.keep else torch.empty(0)


def _shapes(config: DecoderConfig | EncoderConfig) -> dict[str, tuple[int, ...]]:
    """Of the whole model's parameters."""
    return {name: tuple(parameter.shape) for name, parameter in _outline(config).named_parameters()}


def _outline(config: DecoderConfig | EncoderConfig) -> DecoderLM | Encoder:
    """The whole model, with shapes only."""
    return build(config) if isinstance(config, DecoderConfig) else build_encoder(config)


def _prepare(folder: Path) -> None:
    held = [name for name in ("config.json", hf_files.SINGLE, hf_files.INDEX) if (folder / name).exists()]
    if held:
        raise ValueError(
            f"an export needs a folder without a checkpoint, got {str(folder)!r} with {held[0]}: give another path"
        )
    folder.mkdir(parents=True, exist_ok=True)


def _finish(folder: Path, values: dict[str, Any], files: dict[str, list[str]], total_bytes: int) -> None:
    if len(files) > 1:
        weight_map = {name: file for file, names in files.items() for name in names}
        hf_files.write_json(
            folder / hf_files.INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        )
    hf_files.write_json(folder / "config.json", values)
