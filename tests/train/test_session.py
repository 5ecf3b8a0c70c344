"""Whole runs of `longspan train`: what they leave behind, resuming, damaged checkpoints, a loss that is not finite."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from longspan.model import load_pretrained
from longspan.plan.plan import Plan
from longspan.train.config import TrainConfig
from longspan.train.session import _agreed
from tests.longspan_cli import LIMIT_S, Result, forked, longspan, losses, records, train
from tests.ranks import run_ranks
from tests.train.runs import given_model

EVAL = ("--eval.tokens", "256", "--eval.contexts", "16", "64")
SAVING = ("--save-every", "3")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Uninterrupted runs of six steps by number of ranks: 1, and 2 with the plan context 2, zero3."""
    folder = tmp_path_factory.mktemp("whole")
    forked(*train(folder / "one", *SAVING)).good()
    forked(*train(folder / "two", *SAVING, "--plan.shard", "zero3"), world=2).good()
    return {1: folder / "one", 2: folder / "two"}


def stopped_at_3(run: Path, to: Path) -> Path:
    """A copy of a run as a kill after its first checkpoint would leave it, metrics of later steps included."""
    shutil.copytree(run, to)
    shutil.rmtree(to / "checkpoints" / "step_000006")
    shutil.rmtree(to / "model")
    return to


def close(one: dict[int, float], other: dict[int, float]) -> bool:
    return one.keys() == other.keys() and all(abs(one[step] - other[step]) <= 1e-4 for step in one)


# ---------------------------------------------------------------- what a run leaves behind


def test_what_a_run_leaves_behind(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "run"
    said = longspan(*train(out, *EVAL, "--eval.every", "2", "--data-workers", "1", "--prompt", "the ")).good().out
    steps = records(out)
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    assert all(record["sequence_length"] == 64 and record["tokens_per_s"] > 0 for record in steps)
    assert steps[-1]["loss"] < steps[0]["loss"] and steps[0]["loss"] > 0.8 * math.log(256)
    evals = [(record["step"], record["sequence_length"]) for record in records(out, "eval")]
    assert evals == [(2, 16), (4, 16), (6, 16), (6, 64)]

    config = TrainConfig(out=out)
    kept = json.loads((out / "config.json").read_text())
    assert kept.keys() == config.to_dict().keys() and kept["model"]["width"] == 32 and kept["out"] == str(out)
    assert kept["batch"] == {**config.to_dict()["batch"], "steps": 6, "tokens": 256, "length": 64}
    assert Plan.read(out / "plan.json") == Plan(context=1, precision="fp32")

    ours = load_pretrained(out / "model", dtype=torch.float32, device="cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32).eval()
    tokens = torch.arange(40)[None] * 5 % 256
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-5, atol=1e-5)

    report = (out / "report.html").read_text()
    for row in records(out, "eval")[-2:]:
        assert f"{row['bits_per_byte']:.3f}" in said and f"{row['bits_per_byte']:.3f}" in report
    assert "held-out bits per byte at context     64" in said and "sample  the " in said
    assert "http://" not in report.replace("http://www.w3.org", "") and "<script src" not in report


def test_rows_of_packed_documents_on_two_ranks(tmp_path: Path) -> None:
    data = tmp_path / "short.jsonl"
    data.write_text("".join(json.dumps({"text": f"the ring turns {number} times"}) + "\n" for number in range(40)))
    options = ("--data.paths", str(data), "--batch.packing", "documents", "--batch.tokens", "192", "--batch.steps", "3")
    options += ("--batch.micro-rows", "1")
    forked(*train(tmp_path / "two", *options), world=2).good()
    forked(*train(tmp_path / "one", *options)).good()
    assert close(losses(tmp_path / "two"), losses(tmp_path / "one"))
    forked(*train(tmp_path / "stream", *options[:2], *options[4:])).good()
    assert losses(tmp_path / "stream") != losses(tmp_path / "one")


def test_init_continues_from_a_hugging_face_checkpoint(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    given, out = tmp_path / "given", tmp_path / "run"
    words = tokenizers.Tokenizer(tokenizers.models.BPE())
    words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    words.train_from_iterator(["the ring turns and every rank hands its keys to the next one"] * 9, trainer)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, bos_token_id=None, eos_token_id=0,
        )
    )  # fmt: skip
    model.save_pretrained(given)
    words.save(str(given / "tokenizer.json"))
    options = ("--init", str(given), "--tokenizer", str(given / "tokenizer.json"))
    forked(*given_model(out, *options, "--prompt", "the ring", *SAVING)).good()
    # The first loss is that of the given weights, so they were loaded and not made anew.
    assert abs(losses(out)[1] - math.log(320)) < 0.2
    forked(*given_model(tmp_path / "two", *options, *SAVING), world=2).good()
    assert close(losses(tmp_path / "two"), losses(out))
    after = transformers.AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    assert isinstance(after, transformers.LlamaForCausalLM)
    before = model.get_parameter("model.layers.1.mlp.up_proj.weight")
    moved = after.get_parameter("model.layers.1.mlp.up_proj.weight") - before
    assert 0 < moved.abs().max() < 0.05
    said = forked("generate", str(out), "--prompt", "the ring", "--max-new-tokens", "4", "--temperature", "0")
    assert said.good().out.startswith("the ring")
    words.add_tokens([f"<extra_{number}>" for number in range(60)])
    words.save(str(given / "large.json"))
    few = forked(*given_model(tmp_path / "few", *options[:2], "--tokenizer", str(given / "large.json")))
    assert "has 320 tokens, but tokenizer" in few.refusal()


# ---------------------------------------------------------------- who starts the ranks


def test_slurm_starts_the_ranks(tmp_path: Path, whole: dict[int, Path]) -> None:
    forked(*train(tmp_path / "run", *SAVING, "--plan.shard", "zero3"), world=2, slurm=True).good()
    assert losses(tmp_path / "run") == losses(whole[2])


@pytest.mark.slow
def test_torchrun_and_the_launcher_start_the_ranks(tmp_path: Path, whole: dict[int, Path]) -> None:
    argv = train(tmp_path / "torchrun", *SAVING, "--plan.shard", "zero3")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "-m", "longspan", *argv],
        capture_output=True, text=True, timeout=LIMIT_S, env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
    )  # fmt: skip
    Result(done.returncode, done.stdout, done.stderr).good()
    assert losses(tmp_path / "torchrun") == losses(whole[2])
    ranks = longspan(*train(tmp_path / "ranks", "--ranks", "2", *SAVING, "--plan.shard", "zero3")).good()
    assert "longspan train --ranks 2 --out " in (tmp_path / "ranks" / "report.html").read_text()
    assert losses(tmp_path / "ranks") == losses(whole[2])
    assert ranks.out.count("trained 6 steps") == 1


# ---------------------------------------------------------------- resuming


@pytest.mark.parametrize("world", [1, 2])
def test_the_same_plan_continues_bit_for_bit(tmp_path: Path, whole: dict[int, Path], world: int) -> None:
    out = stopped_at_3(whole[world], tmp_path / "run")
    shutil.copytree(whole[world].parent / "text", tmp_path / "text")
    said = forked(
        *train(out, *SAVING, "--resume", "latest", "--plan.shard", "none" if world == 1 else "zero3"), world=world
    ).good()
    assert "step 4/6" in said.out and "step 1/6" not in said.out
    for key in ("loss", "gradient_norm", "learning_rate"):
        assert [r[key] for r in records(out)] == [r[key] for r in records(whole[world])]
    model = Path("model") / "model.safetensors"
    assert (out / model).read_bytes() == (whole[world] / model).read_bytes()


@pytest.mark.parametrize(
    ("wrote", "world", "options"),
    [(2, 1, ()), (1, 2, ("--plan.data", "2", "--plan.shard", "zero2", "--plan.recompute", "attention"))],
)
def test_another_plan_on_other_ranks_continues(
    tmp_path: Path, whole: dict[int, Path], wrote: int, world: int, options: tuple[str, ...]
) -> None:
    out = stopped_at_3(whole[wrote], tmp_path / "run")
    forked(*train(out, *options, "--resume", "step_000003"), world=world).good()
    assert losses(out) != losses(whole[wrote]) or world == wrote
    assert close(losses(out), losses(whole[wrote]))


def test_a_finished_run_resumes_to_its_end(tmp_path: Path, whole: dict[int, Path]) -> None:
    shutil.copytree(whole[1], tmp_path / "run")
    before = losses(tmp_path / "run")
    forked(*train(tmp_path / "run", "--resume", "latest")).good()
    assert losses(tmp_path / "run") == before


def test_a_checkpoint_beyond_the_run_is_refused(tmp_path: Path, whole: dict[int, Path]) -> None:
    shutil.copytree(whole[1], tmp_path / "run")
    before = (tmp_path / "run" / "config.json").read_bytes()
    line = forked(*train(tmp_path / "run", "--resume", "latest", "--batch.steps", "5")).refusal()
    assert "the checkpoint has 6 steps done, got a run of 5; raise --batch.steps" in line
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def agree(rank: int, world: int) -> list[object]:
    return [_agreed(step == 1 and rank == 1, step == 2 and rank == 0, float(rank), 10 - rank) for step in range(3)]


def test_ranks_agree_on_leaving_clock_and_memory() -> None:
    wanted = [(False, False, 2.0, 10), (True, False, 2.0, 10), (False, True, 2.0, 10)]
    assert run_ranks(agree, 3) == [wanted] * 3


# ---------------------------------------------------------------- damage


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "manifest.json"])
@pytest.mark.parametrize("harm", [truncate, flip])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_offered(
    tmp_path: Path, whole: dict[int, Path], harm: object, name: str
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole[1], out)
    assert callable(harm)
    harm(out / "checkpoints" / "step_000006" / name)
    before = (out / "metrics.jsonl").read_bytes()
    line = forked(*train(out, "--resume", "latest")).refusal()
    assert "step_000006" in line and name in line and line.endswith("resume with --resume step_000003")
    assert (out / "metrics.jsonl").read_bytes() == before
    if name == "__0_0.distcp":
        forked(*train(out, *SAVING, "--resume", "step_000003")).good()
        assert losses(out) == losses(whole[1])


def test_two_ranks_refuse_a_damaged_checkpoint_in_one_line(tmp_path: Path, whole: dict[int, Path]) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole[2], out)
    flip(out / "checkpoints" / "step_000006" / "__1_0.distcp")
    line = forked(*train(out, "--resume", "latest", "--plan.shard", "zero3"), world=2).refusal()
    assert "file __1_0.distcp is damaged" in line and line.endswith("resume with --resume step_000003")


# ---------------------------------------------------------------- not finite


def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ("--optim.lr", "1e30", "--optim.warmup", "0", "--save-every", "1")
    line = forked(*train(out, *options), world=2).refusal(1)
    assert line.startswith("the loss of step 2 is ") and "stopped before the optimiser step" in line
    assert "the largest gradient is in embed.weight (nan)" in line
    assert list(losses(out)) == [1] and [p.name for p in (out / "checkpoints").iterdir()] == ["step_000001"]
    # Nothing else had saved it.
    forked(*train(tmp_path / "unsaved", *options[:4]), world=2).refusal(1)
    assert [p.name for p in (tmp_path / "unsaved" / "checkpoints").iterdir()] == ["step_000001"]
    assert forked(*train(tmp_path / "unsaved", *options[:4], "--resume", "latest"), world=2).refusal(1) == line
    # The checkpoint that stays is whole: the same step fails again, from it.
    assert forked(*train(out, *options, "--resume", "latest"), world=2).refusal(1) == line


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_poisoned_parameter_is_named(tmp_path: Path, whole: dict[int, Path], value: float) -> None:
    given = tmp_path / "given"
    shutil.copytree(whole[1] / "model", given)
    tensors = load_file(given / "model.safetensors")
    name = next(name for name in tensors if name.endswith("down_proj.weight"))
    tensors[name][3, 5] = value
    save_file(tensors, given / "model.safetensors", metadata={"format": "pt"})
    line = forked(*given_model(tmp_path / "run", "--init", str(given))).refusal(1)
    assert line.startswith("the loss of step 1 is nan") and "the largest gradient is in " in line
    assert not losses(tmp_path / "run") and not list((tmp_path / "run" / "checkpoints").iterdir())
