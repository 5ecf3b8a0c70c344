"""Adapters in PEFT's format: a folder with adapter_config.json and adapter_model.safetensors, read and written.

An adapter belongs to layers by their Hugging Face names, so only models whose targets are tensors of their own there
have one: not GPT-2, which keeps q, k and v in one matrix.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from longspan.model import hf_files
from longspan.model.config import DecoderConfig
from longspan.model.decoder import DecoderLM
from longspan.model.huggingface import stored_names
from longspan.model.lora import TARGETS, LoraConfig, adapted_layers, apply_lora, is_adapter
from longspan.model.shards import Collector, fill

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Keys of adapter_config.json that say nothing about the maths; of all others only empty values are understood.
_HARMLESS = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version",
        "low_cpu_mem_usage", "ensure_weight_tying", "runtime_config", "megatron_core", "qalora_group_size",
        "init_lora_weights", "lora_bias",
    }
)  # fmt: skip
_READ = frozenset({"peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "bias"})
# Other ways to start an adapter change the base's weights too.
_STARTS = (True, False, None, "gaussian")


def layer_names(config: DecoderConfig, targets: tuple[str, ...]) -> dict[str, str]:
    """Our name of every target layer to Hugging Face's.

    Raises:
        ValueError: a target that has no tensor of its own there.
    """
    theirs = {
        entry.ours[0]: entry.name for entry in stored_names(config) if len(entry.ours) == 1 and not entry.transposed
    }
    found: dict[str, str] = {}
    for layer in range(config.num_layers):
        for target in targets:
            ours = f"blocks.{layer}.{TARGETS[target]}"
            if f"{ours}.weight" not in theirs:
                raise ValueError(
                    f"an adapter's target must be a matrix of its own in the Hugging Face model, got {target!r} of a "
                    "model that has none: train all weights instead"
                )
            found[ours] = theirs[f"{ours}.weight"].removesuffix(".weight")
    return found


def save_adapter(
    model: DecoderLM, path: str | os.PathLike[str], config: LoraConfig, *, base: str | None = None
) -> None:
    """Writes the adapters of a model; of a sharded or split one each tensor is gathered in turn, every rank calls and
    rank 0 writes.

    Args:
        config: with which they were applied.
        base: where the frozen weights are, for the reader.

    Raises:
        ValueError: a model without adapters, or whose targets have no tensors of their own.
        OSError: the disk; on rank 0.
    """
    parameters = Collector(model, model.boxes())
    writes = parameters.alone or dist.get_rank() == 0
    tensors: dict[str, Tensor] = {}
    for name in filter(is_adapter, parameters):
        whole = parameters[name].detach()
        if writes:
            tensors[name] = whole.cpu()
    if writes:
        write_adapter(tensors, path, model.config, config, base=base)


def write_adapter(
    tensors: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    decoder: DecoderConfig,
    config: LoraConfig,
    *,
    base: str | None = None,
) -> None:
    """Writes adapters given by our names of their tensors. Raises as `save_adapter`."""
    folder = Path(path)
    names = layer_names(decoder, config.targets)
    stored: dict[str, Tensor] = {}
    for ours, theirs in names.items():
        for kind in ("a", "b"):
            if f"{ours}.lora_{kind}" not in tensors:
                raise ValueError(f"a model to save needs an adapter on {ours}, got none: apply_lora comes first")
            stored[f"{_PREFIX}{theirs}.lora_{kind.upper()}.weight"] = tensors[f"{ours}.lora_{kind}"]
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha if config.alpha % 1 else int(config.alpha),
        "lora_dropout": config.dropout,
        "target_modules": sorted({theirs.rpartition(".")[2] for theirs in names.values()}),
        "use_rslora": config.rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    hf_files.write_tensors(folder / TENSORS, stored)
    hf_files.write_json(folder / CONFIG, values)


def load_adapter(model: DecoderLM, path: str | os.PathLike[str]) -> LoraConfig:
    """Gives a model, not yet sharded, the adapters of a folder, and returns their config.

    Raises:
        ValueError: an adapter of another kind, one whose config is not understood in full, or tensors that do not fit.
    """
    folder = Path(path)
    if not (folder / CONFIG).is_file() or not (folder / TENSORS).is_file():
        raise ValueError(f"an adapter is a folder with {CONFIG} and {TENSORS}, got {str(folder)!r}: check the path")
    values = hf_files.read_json(folder / CONFIG)
    _check(values, folder)
    try:
        with safe_open(str(folder / TENSORS), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{folder / TENSORS} must be a whole safetensors file, got: {error}: copy it again") from None
    leaves = {name.removesuffix(".lora_A.weight").rpartition(".")[2] for name in tensors if ".lora_A." in name}
    targets = tuple(
        target
        for target in TARGETS
        if any(entry.ours == (f"blocks.0.{TARGETS[target]}.weight",) and _leaf(entry.name) in leaves
               for entry in stored_names(model.config))
    )  # fmt: skip
    config = LoraConfig(
        rank=values["r"], alpha=float(values["lora_alpha"]), targets=targets, rslora=bool(values.get("use_rslora"))
    )
    names = layer_names(model.config, targets)
    wanted = {f"{_PREFIX}{theirs}.lora_{kind}.weight" for theirs in names.values() for kind in "AB"}
    if different := sorted(wanted ^ set(tensors)):
        raise ValueError(
            f"{folder} must hold one adapter for each target of each layer and no other tensor, got a difference at "
            f"{different[0]!r} ({len(different)} in all): adapters of single layers are not read"
        )
    apply_lora(model, config)
    for ours, layer in adapted_layers(model).items():
        for kind, parameter in (("A", layer.lora_a), ("B", layer.lora_b)):
            name = f"{_PREFIX}{names[ours]}.lora_{kind}.weight"
            if tensors[name].shape != parameter.shape:
                raise ValueError(
                    f"tensor {name!r} of {folder} must have shape {tuple(parameter.shape)}, got "
                    f"{tuple(tensors[name].shape)}: do adapter and model belong together?"
                )
            fill(parameter, lambda region, name=name: tensors[name][region])
    return config


def _leaf(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]


def _check(values: dict[str, Any], folder: Path) -> None:
    if values.get("peft_type") != "LORA":
        raise ValueError(f"an adapter must be of peft_type LORA, got {values.get('peft_type')!r} in {folder}")
    if type(values.get("r")) is not int or type(values.get("lora_alpha")) not in (int, float):
        raise ValueError(f"{folder / CONFIG} must have numbers r and lora_alpha, got none: copy the adapter again")
    if values.get("bias", "none") != "none":
        raise ValueError(f"an adapter must leave biases alone (bias none), got {values['bias']!r} in {folder}")
    if values.get("init_lora_weights", True) not in _STARTS or values.get("lora_bias"):
        raise ValueError(
            f"an adapter must start as LoRA's paper has it, got init_lora_weights {values.get('init_lora_weights')!r} "
            f"and lora_bias {values.get('lora_bias')!r} in {folder}: other starts change the base's weights"
        )
    for key, value in values.items():
        if key not in _HARMLESS | _READ and value not in (None, False, {}, [], ""):
            raise ValueError(f"{key} of {folder / CONFIG} is not understood, got {value!r}: use PEFT, or leave it out")
