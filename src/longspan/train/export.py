"""A run's sharded checkpoint as a Hugging Face folder, in one process and without the trainer.

Tensors are read one at a time, whatever ranks wrote them, and written a file at a time: memory is that of one file of
the export (5 GB). Adapters are read whole and merged into the weights that they were trained beside, or written as an
adapter.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

from longspan.model.config import DecoderConfig
from longspan.model.decoder import build
from longspan.model.hf_adapter import write_adapter
from longspan.model.hf_files import fingerprint
from longspan.model.huggingface import readers, save_tensors
from longspan.model.lora import LoraConfig, is_adapter, merged
from longspan.train.checkpoint import CheckpointStore
from longspan.train.data.tokenizers import load_tokenizer, save_tokenizer
from longspan.train.manifest import read_manifest, step_of, verify_files

_MODEL = "model/"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """Write a run's checkpoint as a Hugging Face folder.

    Args:
        checkpoint: the folder of a run, of which the latest checkpoint is taken, or one of its checkpoints/step_000100.
        out: the folder to write.
        form: of a run with adapters: "merged" into the weights, or the "adapter" alone, for PEFT.
        dtype: of the stored values.
        base: where the weights that adapters were trained beside are now, if not where the run found them.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional]
    out: Path
    form: Literal["merged", "adapter"] = "merged"
    dtype: Literal["fp32", "bf16"] = "fp32"
    base: Path | None = None


class StoredTensors(Mapping[str, Tensor]):
    """The model's tensors of one checkpoint by our names; each is read whole when it is asked for."""

    def __init__(self, checkpoint: Path) -> None:
        self._reader = FileSystemReader(checkpoint)
        stored = self._reader.read_metadata().state_dict_metadata
        self._stored: dict[str, Any] = {
            key.removeprefix(_MODEL): entry for key, entry in stored.items() if key.startswith(_MODEL)
        }

    def __getitem__(self, name: str) -> Tensor:
        entry = self._stored[name]
        state = {_MODEL + name: torch.empty(entry.size, dtype=entry.properties.dtype)}
        with warnings.catch_warnings():
            # torch says on every load that one process is no distributed job.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
            load(state, storage_reader=self._reader, no_dist=True)
        return state[_MODEL + name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


class _Merged(Mapping[str, Tensor]):
    """The weights of a checkpoint folder with adapters added, each read and merged when it is asked for."""

    def __init__(
        self,
        base: dict[str, Callable[[tuple[slice, ...]], Tensor]],
        shapes: dict[str, tuple[int, ...]],
        adapters: Mapping[str, Tensor],
        scaling: float,
    ) -> None:
        self._base, self._shapes, self._adapters, self._scaling = base, shapes, adapters, scaling

    def __getitem__(self, name: str) -> Tensor:
        weight = self._base[name](tuple(slice(0, size) for size in self._shapes[name]))
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_a" not in self._adapters:
            return weight
        # In fp32, not in the base's dtype: what is stored is rounded once.
        a, b = self._adapters[f"{layer}.lora_a"], self._adapters[f"{layer}.lora_b"]
        return merged(weight.float(), a, b, self._scaling)

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)


def find_checkpoint(path: Path) -> tuple[Path, Path]:
    """(run folder, checkpoint) of a run's folder or one of its checkpoints. Raises ValueError where it is neither."""
    if step_of(path) is not None and path.is_dir():
        run, checkpoint = path.resolve().parent.parent, path
    else:
        run, store = path, CheckpointStore(path / "checkpoints", read_only=True)
        step = store.latest()
        if step is None:
            raise ValueError(
                f"an export needs a run's folder or one of its checkpoints, got {str(path)!r} without any: check the "
                "path"
            )
        checkpoint = store.path(step)
    if not (run / "model.json").is_file():
        raise ValueError(f"a run's folder must hold model.json, got {str(run)!r} without: keep checkpoints in theirs")
    return run, checkpoint


def run_export(config: ExportConfig) -> int:
    """`longspan export`. Raises ValueError for what is no run, is damaged, or does not fit."""
    run, checkpoint = find_checkpoint(config.checkpoint)
    verify_files(checkpoint)
    meta = read_manifest(checkpoint)["meta"]
    decoder = DecoderConfig.from_json((run / "model.json").read_text(encoding="utf-8"))
    tensors = StoredTensors(checkpoint)
    adapted = any(map(is_adapter, tensors))
    if not adapted and (config.form == "adapter" or config.base is not None):
        raise ValueError(f"form adapter and base are for a run with adapters, got {str(run)!r}: leave them out")
    if config.form == "adapter" and config.dtype != "fp32":
        raise ValueError(f"an adapter is written as it was trained, in fp32, got dtype {config.dtype}: leave it out")
    if config.form == "adapter":
        lora, base = _lora(meta, config.base)
        write_adapter(tensors, config.out, decoder, lora, base=str(base))
    else:
        outline = build(decoder)
        shapes = {name: tuple(parameter.shape) for name, parameter in outline.named_parameters()}
        parameters: Mapping[str, Tensor] = tensors
        if adapted:
            lora, base = _lora(meta, config.base)
            if fingerprint(base) != meta["base"]:
                raise ValueError(f"the adapters were trained beside other weights than those of {base}: give --base")
            parameters = _Merged(readers(outline, base), shapes, dict(tensors), lora.scaling)
        elif different := sorted(set(shapes) ^ set(tensors)):
            raise ValueError(f"model.json of {run} must be the checkpoint's own, got a difference at {different[0]!r}")
        save_tensors(
            decoder, parameters, shapes, config.out, dtype=torch.bfloat16 if config.dtype == "bf16" else torch.float32
        )
    _tokenizer(run, config.out)
    what = "adapter" if config.form == "adapter" else "model"
    print(f"{checkpoint.name} of {run} is now a Hugging Face {what} in {config.out}")
    return 0


def _lora(meta: dict[str, Any], base: Path | None) -> tuple[LoraConfig, Path]:
    values = meta["config"]["lora"]
    return LoraConfig(**values | {"targets": tuple(values["targets"])}), base or Path(meta["config"]["init"])


def _tokenizer(run: Path, out: Path) -> None:
    """The run's tokenizer beside the export, where it is still to be found."""
    name = json.loads((run / "config.json").read_text(encoding="utf-8"))["tokenizer"]
    try:
        tokenizer = load_tokenizer(name)
    except ValueError as error:
        print(f"the tokenizer was not copied: {error}")
        return
    save_tokenizer(tokenizer, out)
