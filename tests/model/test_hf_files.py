"""Checkpoint folders that are damaged, quantised or cannot be written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from longspan.model import load_pretrained, save_pretrained
from longspan.model.decoder import build
from longspan.model.huggingface import load_into, read_config
from tests.model.test_huggingface import theirs


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    theirs("llama").save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def test_damaged_folders_are_refused_by_name(llama: Path, tmp_path: Path) -> None:
    weights = llama / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors must be a whole safetensors file"):
        load_pretrained(llama)
    weights.unlink()
    with pytest.raises(ValueError, match="got neither"):
        load_pretrained(llama)
    (llama / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin, a pickle"):
        load_pretrained(llama)
    index = llama / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(ValueError, match=r"none of name 'model-1\.safetensors'"):
        load_pretrained(llama)
    index.write_text('{"weight_map": {"a": "../x.safetensors"}}')
    with pytest.raises(ValueError, match=r"only files beside it, got '\.\./x\.safetensors'"):
        load_pretrained(llama)
    (llama / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json must be JSON"):
        load_pretrained(llama)
    with pytest.raises(ValueError, match="must be a folder"):
        load_pretrained(tmp_path / "nowhere")


def test_quantised_tensors_are_refused(llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, llama / "model.safetensors")
    with pytest.raises(ValueError, match=r"'model\.norm\.weight'.*got I8"):
        load_pretrained(llama)


def test_loading_needs_memory_and_a_failed_export_leaves_no_checkpoint(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(read_config(llama))
    with pytest.raises(ValueError, match="to_empty"):
        load_into(model, llama)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    ours = load_pretrained(llama)
    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        save_pretrained(ours, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
