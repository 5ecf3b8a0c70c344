"""Import and export of Hugging Face checkpoints: a folder with config.json and safetensors. Nothing is downloaded, no
pickle is opened.

`ARCHITECTURES` lists what is understood: how to read and write its config, and the names of its tensors. Values are
read lazily, box by
box: a rank with a sharded model reads its own shard from the mapped files, and nothing else.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from longspan.model import hf_configs, hf_export, hf_files, hf_gemma
from longspan.model.config import DecoderConfig
from longspan.model.decoder import DecoderLM, build
from longspan.model.hf_files import TensorFiles
from longspan.model.hf_names import Stored, gpt2_names, llama_names
from longspan.model.shards import Region, fill, is_sharded


@dataclass(frozen=True, kw_only=True, slots=True)
class Architecture:
    """One published architecture.

    `prefix` stands before the names of a causal LM and is absent in checkpoints of the bare model; `ignored` matches
    stored tensors that old versions wrote and that hold no weight.
    """

    model_type: str
    read: Callable[[hf_configs.Keys], DecoderConfig]
    write: Callable[[DecoderConfig], dict[str, Any]]
    names: Callable[[DecoderConfig], list[Stored]]
    prefix: str = "model."
    ignored: str = r"rotary_emb\.inv_freq$"


ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture(
        model_type="llama", read=hf_configs.read_llama, write=hf_export.write_llama, names=llama_names
    ),
    "MistralForCausalLM": Architecture(
        model_type="mistral", read=hf_configs.read_mistral, write=hf_export.write_mistral, names=llama_names
    ),
    "Qwen3ForCausalLM": Architecture(
        model_type="qwen3", read=hf_configs.read_qwen3, write=hf_export.write_qwen3, names=llama_names
    ),
    "Gemma2ForCausalLM": Architecture(
        model_type="gemma2", read=hf_gemma.read_gemma2, write=hf_gemma.write_gemma2, names=hf_gemma.gemma_names
    ),
    "Gemma3ForCausalLM": Architecture(
        model_type="gemma3_text", read=hf_gemma.read_gemma3, write=hf_gemma.write_gemma3, names=hf_gemma.gemma_names
    ),
    "GPT2LMHeadModel": Architecture(
        model_type="gpt2",
        read=hf_configs.read_gpt2,
        write=hf_export.write_gpt2,
        names=gpt2_names,
        prefix="transformer.",
        ignored=r"h\.\d+\.attn\.(bias|masked_bias)$",
    ),
}


def load_pretrained(
    path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> DecoderLM:
    """The model of a checkpoint folder, whole, on one device; for a sharded model see `load_into`.

    Args:
        path: folder with config.json and safetensors.
        dtype: of the parameters, whatever the storage (float64, float32, float16 or bfloat16).
        device: where they go; tensors pass through the CPU one at a time.

    Raises:
        ValueError: another architecture, a config key that is not understood, a missing, surplus or misshapen tensor, a
            damaged file, a
            pickle: one line naming it.
    """
    model = build(read_config(path), dtype=dtype)
    model.to_empty(device=device)
    load_into(model, path)
    return model


def read_config(path: str | os.PathLike[str]) -> DecoderConfig:
    """The config of a checkpoint folder. Raises ValueError as `load_pretrained`."""
    values = _config_json(Path(path))
    return _architecture(values).read(hf_configs.Keys(values))


def load_into(model: DecoderLM, path: str | os.PathLike[str]) -> None:
    """Fills `model` from a checkpoint; of DTensors each rank reads its own shard only. All checks come before the first
    value is written.

    The model keeps its own config, of which the shapes must fit: change the rope scaling or the windows before, to
    stretch a model.

    Raises:
        ValueError: as `load_pretrained`; and parameters on the meta device.
    """
    folder = Path(path)
    architecture = _architecture(_config_json(folder))
    files = TensorFiles(folder)
    parameters = dict(model.named_parameters())
    plan = _match(architecture, model, files, folder)
    for entry, name in plan:
        start = 0
        for ours in entry.ours:
            parameter = parameters[ours]
            fill(parameter, _reader(files, name, start, entry.transposed))
            start += parameter.shape[0]


def _reader(files: TensorFiles, name: str, start: int, transposed: bool) -> Callable[[Region], Tensor]:
    def read(region: Region) -> Tensor:
        rows = slice(region[0].start + start, region[0].stop + start)
        if transposed:
            return files.read(name, (region[1], rows)).t()
        return files.read(name, (rows, *region[1:]))

    return read


def _match(architecture: Architecture, model: DecoderLM, files: TensorFiles, folder: Path) -> list[tuple[Stored, str]]:
    """Every tensor the model wants beside its name in the files; all that does not fit is refused here."""
    bare = not any(name.startswith(architecture.prefix) for name in files)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    plan: list[tuple[Stored, str]] = []
    missing: list[str] = []
    for entry in _names(architecture, model.config, shapes, folder):
        name = entry.name.removeprefix(architecture.prefix) if bare else entry.name
        if name not in files:
            missing.append(name)
            continue
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
    if "lm_head.weight" in surplus and model.config.tie_embeddings:
        _check_tied(files, next(name for entry, name in plan if entry.ours == ("embed.weight",)), folder)
        surplus.remove("lm_head.weight")
    if surplus:
        raise ValueError(
            f"{folder} may hold only the model's tensors, got {sorted(surplus)[0]!r} and "
            f"{len(surplus) - 1} more: the config does not ask for it"
        )
    return plan


def _names(architecture: Architecture, config: DecoderConfig, shapes: Mapping[str, Any], folder: Path) -> list[Stored]:
    stored = architecture.names(config)
    unknown = sorted({name for entry in stored for name in entry.ours} ^ set(shapes))
    if unknown:
        raise ValueError(
            f"the model must have the parts of {architecture.model_type}, as {folder} does, got a difference "
            f"at {unknown[0]!r}: build it from read_config(path)"
        )
    return stored


def _check_tied(files: TensorFiles, embedding: str, folder: Path) -> None:
    """A head stored beside a tied embedding must be the same values, for it will not be read."""
    rows, columns = files.shape(embedding)
    same = files.shape("lm_head.weight") == (rows, columns)
    for start in range(0, rows, 4096):
        box = (slice(start, min(start + 4096, rows)), slice(0, columns))
        same = same and torch.equal(files.read(embedding, box), files.read("lm_head.weight", box))
    if not same:
        raise ValueError(
            f"'lm_head.weight' of {folder} must equal the embedding it is tied to, got other values: "
            'set "tie_word_embeddings": false'
        )


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
    model: DecoderLM,
    path: str | os.PathLike[str],
    *,
    architecture: str | None = None,
    dtype: torch.dtype | None = None,
    max_file_bytes: int = 5_000_000_000,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Writes a folder that transformers loads with equal logits. config.json comes last: without it a folder is no
    checkpoint.

    With DTensor parameters every rank must call; each tensor is gathered in turn and rank 0 writes. Otherwise call it
    on one rank.

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
    folder = Path(path)
    name, values = _describe(model.config, architecture)
    for key in extra or {}:
        if key not in hf_configs.HARMLESS:
            raise ValueError(
                f"extra may hold only keys that do not change the maths, got {key!r}: change the model's config"
            )
    if max_file_bytes < 1:
        raise ValueError(f"max_file_bytes must be positive, got {max_file_bytes}: 5_000_000_000 is usual")
    parameters = dict(model.named_parameters())
    dtype = dtype or next(iter(parameters.values())).dtype
    values |= {"torch_dtype": str(dtype).removeprefix("torch."), **(extra or {})}
    shapes = {ours: tuple(parameter.shape) for ours, parameter in parameters.items()}
    stored = {entry.name: entry for entry in ARCHITECTURES[name].names(model.config)}
    num_bytes = {
        theirs: torch.Size(entry.shape(shapes)).numel() * hf_files.itemsize(dtype) for theirs, entry in stored.items()
    }
    files = hf_files.plan_files(num_bytes, max_file_bytes)

    relay = _Relay(sharded=is_sharded(model))
    relay.run(lambda: _prepare(folder))
    for file, names in files.items():
        tensors = {theirs: _gather(stored[theirs], parameters, dtype, keep=relay.writes) for theirs in names}
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


def _describe(config: DecoderConfig, architecture: str | None) -> tuple[str, dict[str, Any]]:
    if architecture is not None:
        if architecture not in ARCHITECTURES:
            raise ValueError(
                f"architecture must be one of {', '.join(ARCHITECTURES)}, got {architecture!r}: pick one of these"
            )
        return architecture, ARCHITECTURES[architecture].write(config)
    reasons = []
    for name, entry in ARCHITECTURES.items():
        try:
            return name, entry.write(config)
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError(f"no Hugging Face architecture can hold this model: {'; '.join(reasons)}")


def _gather(entry: Stored, parameters: Mapping[str, Tensor], dtype: torch.dtype, *, keep: bool) -> Tensor:
    parts = []
    for name in entry.ours:
        parameter = parameters[name].detach()
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        parts.append(whole.to("cpu", dtype) if keep else torch.empty(0))
    joined = torch.cat(parts) if len(parts) > 1 else parts[0]
    return joined.t() if entry.transposed and keep else joined


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
