"""What a run knows before it trains, and its time limit."""

from __future__ import annotations

import json
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from longspan.mixers.config import AttentionConfig, RotaryConfig
from longspan.model import load_pretrained, save_pretrained
from longspan.model.config import DecoderConfig, MlpConfig, NormConfig
from longspan.model.decoder import build
from longspan.model.encoder import build_encoder
from longspan.model.encoder_config import EncoderConfig, TokensConfig
from longspan.train.config import BatchConfig
from longspan.train.session import _catch_up, _time_left
from longspan.train.setting import first_on_rank_0, patient_group
from tests.longspan_cli import forked, losses, records, text_folder, train
from tests.ranks import run_ranks
from tests.train.runs import given_model, tiny_decoder

EVAL = ("--eval.tokens", "256", "--eval.contexts", "16", "64")


def notes(run: Path) -> list[str]:
    """The events of a run, without the methods that were chosen."""
    said = [record["message"] for record in records(run, "event")]
    return [text for text in said if not text.startswith("attention over")]


# ---------------------------------------------------------------- what is known before training


def test_a_model_that_no_architecture_holds_has_its_report(tmp_path: Path) -> None:
    file = tiny_decoder(tmp_path / "model.json", wiring="parallel")
    options = ("--model.config", str(file), *EVAL, "--prompt", "the ")
    said = forked(*given_model(tmp_path / "run", *options), world=2).good().out
    events = notes(tmp_path / "run")
    assert len(events) == 1 and events[0].startswith("the model is not exported: ") and "wiring" in events[0]
    assert f"\n{events[0]}\n" in f"\n{said}" and "model   not exported: " in said and "sample" not in said
    report = (tmp_path / "run" / "report.html").read_text()
    assert "the model is not exported: " in report and "no completion was sampled" in report
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--eval.tokens", "256", "--eval.contexts", "16", "128"), "evaluation contexts of 128 tokens; set --eval.con"),
        (("--batch.length", "128"), "the model has learned 64 positions, got rows of 128 tokens; set --batch.length"),
    ],
)
def test_learned_positions_that_end_too_early_are_refused(tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    file = tiny_decoder(tmp_path / "model.json", positions=64)
    line = forked(*given_model(tmp_path / "run", "--model.config", str(file), *options)).refusal()
    assert words in line and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_sample_ends_where_learned_positions_do(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    given = tmp_path / "given"
    transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=257, n_positions=64, n_embd=32, n_layer=1, n_head=2)
    ).save_pretrained(given)
    short = forked(*given_model(tmp_path / "short", "--init", str(given), "--prompt", "the ring")).good().out
    assert "sample  the ring" in short
    long = forked(*given_model(tmp_path / "long", "--init", str(given), "--prompt", "the ring " * 9)).good().out
    assert "sample  the" not in long
    assert "no completion was sampled: max_new_tokens" in (tmp_path / "long" / "report.html").read_text()


def test_a_gemma_is_trained_and_exported_as_one(tmp_path: Path) -> None:
    decoder = DecoderConfig(
        num_layers=2,
        hidden_size=32,
        vocab_size=257,
        attention=AttentionConfig(
            num_heads=4, head_dim=8, num_kv_heads=2, qk_norm_eps=1e-6, qk_norm_kind="rms_plus_one", scale=8**-0.5
        ),
        mlp=MlpConfig(kind="geglu_tanh", inner_size=40),
        norm=NormConfig(kind="rms_plus_one"),
        wiring="sandwich",
        tie_embeddings=True,
        windows=(8, None),
        windowed_positions=RotaryConfig(theta=100.0),
        embed_scale=32**0.5,
        final_softcap=30.0,
    )
    save_pretrained(build(decoder, device="cpu", seed=5), tmp_path / "given")
    plan = ("--plan.tensor", "2", "--plan.context", "1", "--eval.tokens", "256")
    forked(*given_model(tmp_path / "run", "--init", str(tmp_path / "given"), *plan), world=2).good()
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["architectures"] == [
        "Gemma3ForCausalLM"
    ]
    trained = load_pretrained(tmp_path / "run" / "model")
    assert trained.config == decoder
    first, *_, last = losses(tmp_path / "run").values()
    assert last < first


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    encoder = EncoderConfig(
        num_layers=1,
        hidden_size=8,
        inputs=TokensConfig(vocab_size=257, num_types=2),
        attention=AttentionConfig(num_heads=2, head_dim=4, qkv_bias=True, out_bias=True),
        mlp=MlpConfig(kind="gelu", inner_size=8, bias=True),
        wiring="post",
        embed_norm=True,
        head="masked_lm",
    )
    save_pretrained(build_encoder(encoder, device="cpu"), tmp_path / "given")
    line = forked(*given_model(tmp_path / "run", "--init", str(tmp_path / "given"))).refusal()
    assert "must hold the checkpoint of a DecoderConfig, got model type 'bert': that is of class Encoder" in line


def test_what_was_left_out_is_said(tmp_path: Path) -> None:
    data = text_folder(tmp_path / "text")
    (data / "binary.txt").write_bytes(b"a\0b")
    (data / "empty.txt").write_bytes(b"")
    options = ("--eval.tokens", "4096", "--eval.contexts", "16", "8192")
    said = forked(*train(tmp_path / "run", *options), world=2).good().out
    events = notes(tmp_path / "run")
    report = (tmp_path / "run" / "report.html").read_text()
    assert events[0] == "documents left out: 1 binary, 1 empty"
    assert events[1].startswith("no evaluation at context 8,192: the held-out text has ")
    assert events[2].endswith(" of 4,096 tokens are scored: the held-out text has no more") and len(events) == 3
    assert all(said.count(event) == 1 and f"<li>{event}</li>" in report for event in events)
    forked(*train(tmp_path / "none", *options, "--data.held-out", "0")).good()
    assert records(tmp_path / "none", "event")[1]["message"].startswith("no evaluation: nothing is held out")


def read_slowly(rank: int, world: int, store: str) -> int:
    dist.barrier()  # they meet again within the time of a collective
    dist.destroy_process_group()
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=4)
    )
    group = patient_group()

    def read() -> int:
        time.sleep(6)
        return 7

    found = first_on_rank_0(read, group)
    dist.barrier()  # of the ranks that met again, at once
    return found


def test_reading_takes_longer_than_a_collective_may(tmp_path: Path) -> None:
    assert run_ranks(read_slowly, 2, str(tmp_path / "store")) == [7, 7]


def refuse(rank: int, world: int) -> list[str]:
    said = []
    for bad in range(world):

        def read(bad: int = bad) -> bool:
            if rank == bad:
                raise OSError(f"rank {rank} cannot read")
            return True

        with pytest.raises(ValueError) as caught:
            first_on_rank_0(read, patient_group())
        said.append(str(caught.value))
    return said


def test_one_rank_that_cannot_read_refuses_for_all() -> None:
    assert run_ranks(refuse, 2) == [["rank 0 cannot read", "rank 1 cannot read"]] * 2


# ---------------------------------------------------------------- a time limit


def limited(limit_s: float = 100.0) -> Any:
    batches = BatchConfig(steps=100, tokens=256, length=64, start_length=16, warmup_fraction=0.9).plan()
    return SimpleNamespace(batches=batches, config=SimpleNamespace(limit_s=limit_s))


@pytest.mark.parametrize("step_s", [1, 2, 5, 9, 11, 20, 30, 45])
def test_a_slow_machine_reaches_the_full_length(step_s: float) -> None:
    setting, done, elapsed_s, lengths = limited(), 0, 0.0, []
    while done < 100 and elapsed_s <= 100:
        lengths.append(setting.batches.at(done).length)
        done += 1
        elapsed_s += step_s
        done = max(done, _catch_up(setting, done, elapsed_s + step_s))
    assert sorted(set(lengths)) == [16, 32, 64] and lengths == sorted(lengths)


def test_a_very_slow_machine_goes_to_the_full_length_at_once() -> None:
    # After one step of 60 s of 100 there is time for one more.
    assert _catch_up(limited(), 1, 120.0) == 90
    assert _catch_up(limited(), 95, 120.0) == 95 and _catch_up(limited(0.0), 1, 120.0) == 1


def test_time_left_is_of_this_session() -> None:
    batches = BatchConfig(steps=1000, tokens=64, length=64).plan()
    setting: Any = SimpleNamespace(batches=batches, config=SimpleNamespace(limit_s=0.0))
    assert _time_left(setting, 901, 64, 1.0) == 99.0  # resumed at 900, one step of a second done


def test_steps_left_out_are_recorded_and_the_full_length_is_reached(tmp_path: Path) -> None:
    options = ("--batch.steps", "100000", "--batch.start-length", "16", "--batch.warmup-fraction", "0.9")
    forked(*train(tmp_path / "run", *options, "--limit-s", "3")).good()
    left_out = [record["message"] for record in records(tmp_path / "run", "event")][:-1]
    # A machine whose first step takes half of the time leaves both lengths out at once.
    assert len(left_out) in (1, 2) and all("left out, to keep within 3 s" in message for message in left_out)
    assert left_out[-1].startswith("steps ") and " to 90000 left out" in left_out[-1]
    steps = records(tmp_path / "run")
    assert steps[-1]["sequence_length"] == 64 and [record["step"] for record in steps] == sorted(
        losses(tmp_path / "run")
    )


def test_a_time_limit_that_a_finished_run_overran_is_no_event(tmp_path: Path) -> None:
    forked(*train(tmp_path / "run", "--batch.steps", "1", "--limit-s", "1e-9")).good()
    assert records(tmp_path / "run", "event") == []


def test_a_time_limit_ends_a_run_in_good_order(tmp_path: Path) -> None:
    out = tmp_path / "run"
    said = forked(*train(out, "--batch.steps", "100000", "--limit-s", "0.5", *EVAL)).good().out
    assert "held-out bits per byte" in said and records(out, "event")[-1]["message"].endswith("(time limit)")
    assert (out / "checkpoints" / f"step_{max(losses(out)):06d}").is_dir()
