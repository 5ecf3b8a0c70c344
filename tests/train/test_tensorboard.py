"""TensorBoard's event files of real runs, read back by TensorBoard itself; and the MFU of known cards."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from longspan.model.config import DecoderConfig
from longspan.plan.plan import Plan
from longspan.train.config import ModelConfig
from longspan.train.tensorboard import Board, check_tensorboard
from longspan.train.utilisation import Utilisation, flops_a_token, peak_flop_per_s
from tests.longspan_cli import LIMIT_S, forked, records, train

EVAL = ("--eval.tokens", "256", "--eval.contexts", "16", "64", "--eval.every", "2")
BOARD = ("--tensorboard", "--save-every", "3")


def read(folder: Path) -> Any:
    """What TensorBoard shows of a folder."""
    pytest.importorskip("tensorboard")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    return accumulator.EventAccumulator(str(folder)).Reload()


def points(board: Any, tag: str) -> dict[int, float]:
    found = [(event.step, event.value) for event in board.Scalars(tag)]
    assert len(found) == len(dict(found)), f"{tag} has a step twice: {found}"
    return dict(found)


def near(found: dict[int, float], expected: dict[int, float]) -> bool:
    """TensorBoard's values are in single precision."""
    return found.keys() == expected.keys() and all(math.isclose(found[k], expected[k], rel_tol=1e-6) for k in found)


def test_event_files_hold_what_the_metrics_hold(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    out = tmp_path / "run"
    forked(*train(out, *EVAL, *BOARD), world=2).good()
    steps, tokens = read(out / "tensorboard" / "steps"), read(out / "tensorboard" / "tokens")
    taken = records(out)
    for name, tag in (
        ("loss", "loss/train"),
        ("learning_rate", "optimizer/learning_rate"),
        ("gradient_norm", "optimizer/gradient_norm"),
        ("tokens_per_s", "speed/tokens_per_s"),
        ("memory_bytes", "memory/peak_bytes"),
        ("tokens", "batch/tokens"),
    ):
        assert near(points(steps, tag), {record["step"]: record[name] for record in taken}), tag
    assert "speed/mfu" not in steps.Tags()["scalars"]  # of a CPU no peak is known
    assert [record["tokens"] for record in taken] == [256, 512, 768, 1024, 1280, 1536]
    assert near(points(tokens, "loss/train"), {record["tokens"]: record["loss"] for record in taken})
    scored = [record for record in records(out, "eval") if record["sequence_length"] == 16]
    assert [record["step"] for record in scored] == [2, 4, 6]
    for name in ("loss", "bits_per_byte"):
        tag = f"{name}/held_out_at_16"
        assert near(points(steps, tag), {record["step"]: record[name] for record in scored})
        assert near(points(tokens, tag), {record["tokens"]: record[name] for record in scored})
    (text,) = steps.Tensors("config/text_summary")
    assert '"width": 32' in text.tensor_proto.string_val[0].decode()
    # One writer, though there were two ranks.
    assert len(list((out / "tensorboard").glob("*/*"))) == 2


def test_a_run_that_goes_on_has_each_point_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    out = tmp_path / "run"
    forked(*train(out, *BOARD)).good()
    first = points(read(out / "tensorboard" / "steps"), "loss/train")
    shutil.rmtree(out / "checkpoints" / "step_000006")  # as a kill before the second save would leave it
    forked(*train(out, *BOARD, "--resume", "latest", "--optim.lr", "0.1")).good()
    steps, tokens = read(out / "tensorboard" / "steps"), read(out / "tensorboard" / "tokens")
    taken = records(out)
    assert near(points(steps, "loss/train"), {record["step"]: record["loss"] for record in taken})
    assert near(points(tokens, "loss/train"), {record["tokens"]: record["loss"] for record in taken})
    assert points(steps, "loss/train")[6] != first[6] and points(steps, "loss/train")[3] == first[3]


def test_a_folder_of_its_own_and_refusals(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    out, folder = tmp_path / "run", tmp_path / "events"
    options = ("--batch.steps", "1", "--tensorboard", str(folder))
    forked(*train(out, *options)).good()
    assert list((folder / "steps").iterdir()) and not (out / "tensorboard").exists()
    again = forked(*train(tmp_path / "other", *options)).refusal()
    assert again == f"the folder {folder} has the events of another run; choose another --tensorboard folder"


def test_without_the_package_nothing_is_trained(tmp_path: Path) -> None:
    code = "import sys; sys.modules['tensorboard'] = None; from longspan.cli import main; sys.exit(main(sys.argv[1:]))"
    argv = [sys.executable, "-c", code, *train(tmp_path / "run", "--tensorboard")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=LIMIT_S, env=dict(os.environ))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "pip install 'longspan[tensorboard]'" in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_check_tensorboard_lets_a_run_go_on(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    board = Board(tmp_path, step=0, tokens=0)
    board.step(1, tokens=16, loss=2.0)
    board.flush()
    board.close()
    check_tensorboard(tmp_path, resumes=True)
    with pytest.raises(ValueError, match="another run"):
        check_tensorboard(tmp_path, resumes=False)


# ---------------------------------------------------------------- MFU


def tiny(**changes: Any) -> DecoderConfig:
    return ModelConfig(layers=2, width=32, heads=2, inner=64, **changes).decoder(257, 64)


def test_flops_of_a_token_by_hand() -> None:
    """Three times the forward: 2 FLOPs a weight and token, 4 d a pair and head, over a causal row of 64."""
    weights = 2 * (4 * 32 * 32 + 3 * 32 * 64) + 32 * 257
    pairs = 64 * 65 // 2
    assert flops_a_token(tiny(), 64) == pytest.approx(3 * (2 * weights + 2 * 4 * 32 * pairs / 64), rel=1e-12)


@pytest.mark.parametrize(
    ("name", "preset", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "h100", 989e12),
        ("NVIDIA H200", "h200", 989e12),
        ("NVIDIA A100-SXM4-80GB", "a100", 312e12),
        ("NVIDIA A10", "a10", 125e12),
        ("NVIDIA H100 PCIe", "h100", None),
        ("NVIDIA H100 NVL", "h100", None),
        ("NVIDIA RTX A1000", "a100", None),
        ("NVIDIA GeForce RTX 4090", "h100", None),
        ("AMD EPYC", "cpu", None),
    ],
)
def test_only_known_cards_have_a_peak(name: str, preset: str, peak: float | None) -> None:
    assert peak_flop_per_s(name, preset, "bf16") == peak


def test_utilisation_is_the_share_of_all_devices_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longspan.train.utilisation.device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr("longspan.train.utilisation.preset_of", lambda device: "h100")
    cuda, plan = torch.device("cuda"), Plan(precision="bf16")
    known = Utilisation(tiny(), plan, cuda, world=4, known=True)
    rate = 0.4 * 4 * 989e12 / flops_a_token(tiny(), 64)
    assert known.of(rate, 64)["mfu"] == pytest.approx(0.4)
    assert Utilisation(tiny(), plan, cuda, world=4, known=False).of(rate, 64) == {}
    assert Utilisation(tiny(), plan, torch.device("cpu"), world=4, known=True).of(rate, 64) == {}
