"""Fine-tuning by the command line on two ranks: conversations, adapters, frozen layers, resuming, exports."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from longspan.model import load_pretrained, save_pretrained
from longspan.model.config import DecoderConfig
from longspan.model.decoder import build
from longspan.model.hf_adapter import load_adapter
from longspan.model.lora import merge_lora
from longspan.train.config import ModelConfig
from longspan.train.export import StoredTensors
from tests.longspan_cli import Result, forked, losses, records
from tests.train.data.chats import CHATML, MESSAGES, chat_tokenizer, write_chats
from tests.train.runs import given_model

WHOLE = ("--plan.shard", "zero3", "--eval.every", "2")
LORA = ("--lora.rank", "4", "--lora.alpha", "8", "--lora.targets", "q", "v", "down")


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint that has a chat template, `model`, and `chats.jsonl`."""
    folder = tmp_path_factory.mktemp("given")
    decoder: DecoderConfig = ModelConfig(layers=2, width=32, heads=2, tie=True).decoder(312, 128)
    save_pretrained(build(decoder, device="cpu", seed=5), folder / "model")
    chat_tokenizer(folder / "model", CHATML)
    write_chats(folder / "chats.jsonl", copies=12)
    return folder


def arguments(given: Path, out: Path, *options: str) -> list[str]:
    """Of a run on the conversations; a conversation has up to 100 tokens."""
    asked = {name for name in options if name.startswith("--")}
    usual = {
        "--data.held-out": "0.2", "--batch.length": "128", "--batch.tokens": "512", "--batch.steps": "8",
        "--optim.warmup": "1", "--optim.lr": "1e-2", "--eval.tokens": "500", "--save-every": "4",
    }  # fmt: skip
    model = str(given / "model")
    chosen = [word for name, value in usual.items() if name not in asked for word in (name, value)]
    return given_model(
        out, "--init", model, "--tokenizer", model, "--data.paths", str(given / "chats.jsonl"), "--data.format",
        "conversations", "--batch.packing", "documents", *chosen, *options,
    )  # fmt: skip


def stop_at_4(run: Path, to: Path) -> Path:
    shutil.copytree(run, to)
    shutil.rmtree(to / "checkpoints" / "step_000008")
    for name in ("model", "adapter"):
        shutil.rmtree(to / name, ignore_errors=True)
    return to


def learnt(result: Result) -> float:
    (line,) = [line for line in result.out.splitlines() if line.startswith("held-out loss of the assistant's tokens")]
    return float(line.split(": ")[1].split()[0])


@pytest.fixture(scope="module")
def whole(given: Path) -> Path:
    """The folder of a run that trains all weights, on two ranks that share them; one conversation is too long."""
    out = given / "whole"
    long = [{"role": "user", "content": "why " * 200}, {"role": "assistant", "content": "no"}]
    write_chats(given / "with_long.jsonl", [*MESSAGES * 12, long])
    said = forked(*arguments(given, out, *WHOLE, "--data.paths", str(given / "with_long.jsonl")), world=2).good()
    assert abs(learnt(said) - records(out, "eval")[-1]["loss"]) < 1e-3
    return out


@pytest.fixture(scope="module")
def adapted(given: Path) -> Path:
    """The folder of a run with adapters, on two ranks that share the weights."""
    out = given / "adapted"
    forked(*arguments(given, out, *LORA, "--plan.shard", "zero3"), world=2).good()
    return out


# ---------------------------------------------------------------- conversations


def test_conversations_are_learnt_and_resumed(given: Path, whole: Path, tmp_path: Path) -> None:
    evals = records(whole, "eval")
    assert evals[-1]["loss"] < 0.6 * evals[0]["loss"] and "bits_per_byte" not in evals[0]
    assert losses(whole)[8] < 0.6 * losses(whole)[1]
    notes = [record["message"] for record in records(whole, "event")]
    assert "documents left out: 1 longer than 128 tokens" in notes
    assert any("held-out conversations are scored" in note for note in notes)
    assert (whole / "model" / "tokenizer_config.json").is_file()  # its template, for the next one
    options = ("--data.paths", str(given / "with_long.jsonl"), "--resume", "latest")
    again = stop_at_4(whole, tmp_path / "again")
    forked(*arguments(given, again, *WHOLE, *options), world=2).good()
    assert losses(again) == losses(whole)
    one = stop_at_4(whole, tmp_path / "one")
    forked(*arguments(given, one, *options)).good()
    assert abs(losses(one)[8] - losses(whole)[8]) < 1e-3


# ---------------------------------------------------------------- adapters


def test_adapters_are_learnt_alone_and_small(given: Path, adapted: Path) -> None:
    assert losses(adapted)[8] < 0.9 * losses(adapted)[1]
    kept = StoredTensors(adapted / "checkpoints" / "step_000008")
    assert sorted(kept) == sorted(
        f"blocks.{layer}.{name}.lora_{kind}"
        for layer in (0, 1) for name in ("mixer.q", "mixer.v", "mlp.down") for kind in "ab"
    )  # fmt: skip
    state = [key for key in kept._reader.read_metadata().state_dict_metadata if key.startswith("optimizer/")]
    assert state and all(".lora_" in key for key in state)
    stored = load_file(adapted / "adapter" / "adapter_model.safetensors")
    assert len(stored) == 12 and all(tensor.any() for tensor in stored.values())
    config = json.loads((adapted / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(given / "model") and not (adapted / "model").exists()


SPLIT = ("--plan.tensor", "2", "--plan.pipeline", "2")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "options"),
    [(1, ("--plan.shard", "zero3")), (1, ("--plan.recompute", "full")), (2, ("--plan.data", "2")), (4, SPLIT)],
)
def test_other_plans_learn_the_same(
    given: Path, adapted: Path, tmp_path: Path, world: int, options: tuple[str, ...]
) -> None:
    plan = ("--plan.context", "1") if world > 1 else ()
    forked(*arguments(given, tmp_path / "run", *LORA, *options, *plan), world=world).good()
    other = losses(tmp_path / "run")
    assert all(abs(other[step] - loss) < 1e-4 for step, loss in losses(adapted).items())


def test_adapters_of_stages_are_resumed_and_exported(given: Path, adapted: Path, tmp_path: Path) -> None:
    """A run on two ranks that share the layers goes on from one whose ranks share the tokens."""
    again = stop_at_4(adapted, tmp_path / "again")
    options = ("--plan.pipeline", "2", "--plan.context", "1", "--plan.pipeline-schedule", "gpipe")
    forked(*arguments(given, again, *LORA, *options, "--resume", "latest"), world=2).good()
    assert all(abs(losses(again)[step] - loss) < 1e-4 for step, loss in losses(adapted).items())
    forked("export", str(again), "--out", str(tmp_path / "alone"), "--form", "adapter").good()
    name = "adapter_model.safetensors"
    want, got = load_file(again / "adapter" / name), load_file(tmp_path / "alone" / name)
    assert want.keys() == got.keys() and all(torch.equal(want[key], got[key]) for key in want)


@pytest.mark.slow
def test_adapters_in_bf16(given: Path, adapted: Path, tmp_path: Path) -> None:
    options = ("--plan.precision", "bf16", "--batch.steps", "4", "--plan.shard", "zero2")
    forked(*arguments(given, tmp_path / "run", *LORA, *options), world=2).good()
    assert abs(losses(tmp_path / "run")[3] - losses(adapted)[3]) < 0.05


def test_adapters_go_on_beside_the_same_weights_only(given: Path, adapted: Path, tmp_path: Path) -> None:
    again = stop_at_4(adapted, tmp_path / "again")
    go_on = (*LORA, "--plan.shard", "zero3", "--resume", "latest")
    other = tmp_path / "other"
    decoder = DecoderConfig.from_json((adapted / "model.json").read_text())
    save_pretrained(build(decoder, device="cpu", seed=6), other)
    refused = forked(*arguments(given, again, *go_on, "--init", str(other))).refusal()
    assert f"beside the weights of {given / 'model'}, got --init {other}, which has others" in refused
    refused = forked(*arguments(given, again, *go_on, "--lora.alpha", "9")).refusal()
    assert "got lora alpha 9.0 for a checkpoint with 8.0" in refused
    refused = forked(*arguments(given, again, "--resume", "latest")).refusal()
    assert "is of another architecture" in refused
    forked(*arguments(given, again, *go_on), world=2).good()
    assert losses(again) == losses(adapted)


def test_generate_with_an_adapter(given: Path, adapted: Path) -> None:
    asked = ("generate", str(given / "model"), "--prompt", "the ring", "--max-new-tokens", "8", "--temperature", "0")
    base = forked(*asked).good().out
    assert forked(*asked, "--adapter", str(adapted / "adapter")).good().out != base
    assert "an adapter is a folder with" in forked(*asked, "--adapter", str(given)).refusal()


# ---------------------------------------------------------------- exports


def test_an_export_is_the_model_that_was_trained(given: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    forked("export", str(out), "--out", str(tmp_path / "latest")).good()
    want, got = load_file(out / "model" / "model.safetensors"), load_file(tmp_path / "latest" / "model.safetensors")
    assert want.keys() == got.keys() and all(torch.equal(want[name], got[name]) for name in want)
    assert (tmp_path / "latest" / "tokenizer.json").is_file()
    config = [json.loads((folder / "config.json").read_text()) for folder in (out / "model", tmp_path / "latest")]
    assert config[0] == config[1]
    step = out / "checkpoints" / "step_000004"
    forked("export", str(step), "--out", str(tmp_path / "step"), "--dtype", "bf16").good()
    early = load_file(tmp_path / "step" / "model.safetensors")
    assert early.keys() == want.keys() and all(tensor.dtype == torch.bfloat16 for tensor in early.values())
    assert any((early[name].float() - want[name]).abs().max() > 0.01 for name in want)
    assert (
        "holds" not in forked("generate", str(tmp_path / "step"), "--prompt", "x", "--max-new-tokens", "2").good().err
    )
    refused = forked("export", str(out), "--out", str(tmp_path / "step")).refusal()
    assert "an export needs a folder without a checkpoint" in refused
    assert "for a run with adapters" in forked("export", str(out), "--out", "x", "--form", "adapter").refusal()
    assert "without any" in forked("export", str(given), "--out", "x").refusal()
    (damaged,) = list(step.glob("__0_*.distcp"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert "is truncated" in forked("export", str(step), "--out", str(tmp_path / "no")).refusal()
    assert not (tmp_path / "no").exists()


def test_adapters_are_exported_merged_or_alone(given: Path, adapted: Path, tmp_path: Path) -> None:
    forked("export", str(adapted), "--out", str(tmp_path / "alone"), "--form", "adapter").good()
    name = "adapter_model.safetensors"
    want, got = load_file(adapted / "adapter" / name), load_file(tmp_path / "alone" / name)
    assert want.keys() == got.keys() and all(torch.equal(want[key], got[key]) for key in want)
    forked("export", str(adapted), "--out", str(tmp_path / "merged")).good()
    model = load_pretrained(given / "model")
    load_adapter(model, adapted / "adapter")
    merge_lora(model)
    merged = dict(load_pretrained(tmp_path / "merged").named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(merged[name], parameter, rtol=0, atol=1e-7)
    other = tmp_path / "other"
    save_pretrained(build(model.config, device="cpu", seed=6), other)
    refused = forked("export", str(adapted), "--out", str(tmp_path / "no"), "--base", str(other)).refusal()
    assert "were trained beside other weights" in refused


# ---------------------------------------------------------------- frozen layers


@pytest.mark.parametrize(
    "options",
    [
        ("--plan.shard", "zero3"),
        pytest.param(("--plan.shard", "zero2", "--plan.recompute", "full"), marks=pytest.mark.slow),
        ("--plan.pipeline", "2", "--plan.context", "1", "--plan.pipeline-schedule", "gpipe"),
        pytest.param(("--plan.tensor", "2", "--plan.context", "1"), marks=pytest.mark.slow),
    ],
)
def test_frozen_layers_stay(given: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    out, frozen = tmp_path / "run", ("--freeze", "embed,norm", "blocks.0", "blocks.1.mixer")
    forked(*arguments(given, out, *frozen, *options), world=2).good()
    assert losses(out)[8] < losses(out)[1]
    before, after = (dict(load_pretrained(path).named_parameters()) for path in (given / "model", out / "model"))
    stay = {name for name in before if torch.equal(before[name], after[name])}
    assert stay == {name for name in before if not name.startswith(("blocks.1.mlp", "blocks.1.norm"))}
    reader = StoredTensors(out / "checkpoints" / "step_000008")
    state = {key.split("/")[1] for key in reader._reader.read_metadata().state_dict_metadata if "optimizer/" in key}
    assert set(reader) == set(before) and state == set(before) - stay
    again = stop_at_4(out, tmp_path / "again")
    forked(*arguments(given, again, *frozen, *options, "--resume", "latest"), world=2).good()
    assert losses(again) == losses(out)
    other = forked(*arguments(given, again, "--freeze", "blocks.1.mlp", "--resume", "step_000004")).refusal()
    assert "holds optimiser state" in other


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--freeze blocks.7", "a freeze pattern must match a parameter, got 'blocks.7'"),
        ("--freeze *", "some parameter must be left to train"),
        ("--freeze embed --lora.rank 2", "with adapters all else is frozen"),
        ("--lora.rank -2", "lora rank must be 0 or more"),
        ("--lora.alpha 3", "lora options need a lora rank"),
        ("--lora.rank 2 --lora.targets k head", "lora targets must be some of q, k, v"),
        ("--eval.contexts 64", "conversations are scored whole"),
        ("--tokenizer bytes", "conversations need a tokenizer with a chat template"),
        ("--data.field chat", "conversations are lines of .jsonl files"),
    ],
)
def test_what_a_run_refuses(given: Path, tmp_path: Path, options: str, says: str) -> None:
    assert says in forked(*arguments(given, tmp_path / "run", *options.split())).refusal()


def test_adapters_need_a_checkpoint(tmp_path: Path) -> None:
    assert "without --init" in forked("train", "--out", str(tmp_path / "run"), "--lora.rank", "2").refusal()


def test_frozen_layers_in_bf16_on_one_rank_stay_and_go_on_elsewhere(given: Path, tmp_path: Path) -> None:
    """The computation rounds them, and nothing that is saved, exported or resumed under another plan."""
    out, options = tmp_path / "run", ("--freeze", "embed,norm", "blocks.0", "--plan.precision", "bf16")
    forked(*arguments(given, out, *options)).good()
    forked("export", str(out), "--out", str(tmp_path / "exported")).good()
    before = dict(load_pretrained(given / "model").named_parameters())
    for folder in (out / "model", tmp_path / "exported"):
        stored = load_file(folder / "model.safetensors")
        assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
        after = dict(load_pretrained(folder).named_parameters())
        stay = {name for name in before if torch.equal(before[name], after[name])}
        assert stay == {name for name in before if not name.startswith("blocks.1")}
    again = stop_at_4(out, tmp_path / "again")
    forked(*arguments(given, again, *options, "--plan.shard", "zero3", "--resume", "latest"), world=2).good()
    assert abs(losses(again)[8] - losses(out)[8]) < 0.02


@pytest.mark.parametrize("options", [(), pytest.param(LORA, marks=pytest.mark.slow)])
def test_weights_in_bf16_go_on_bit_for_bit(given: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    """Without fp32 weights anywhere, and what is exported is what was trained."""
    out, options = tmp_path / "run", (*options, "--plan.precision", "pure_bf16", "--plan.shard", "zero3")
    forked(*arguments(given, out, *options), world=2).good()
    assert losses(out)[8] < 0.9 * losses(out)[1]
    again = stop_at_4(out, tmp_path / "again")
    forked(*arguments(given, again, *options, "--resume", "latest"), world=2).good()
    assert losses(again) == losses(out)
    exported = "adapter/adapter_model.safetensors" if "--lora.rank" in options else "model/model.safetensors"
    assert (again / exported).read_bytes() == (out / exported).read_bytes()
    assert {tensor.dtype for tensor in load_file(out / exported).values()} == {torch.bfloat16}
    wide = (*options, "--plan.precision", "bf16", "--resume", "step_000004")
    refused = forked(*arguments(given, again, *wide), world=2).refusal()
    assert "was trained in another precision" in refused and refused.endswith("resume with its --plan.precision")
