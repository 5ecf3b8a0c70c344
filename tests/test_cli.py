"""The command line: what it refuses, in one line and with exit code 2, and what its commands print."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longspan.cli import COMMANDS
from tests.longspan_cli import Result, forked, longspan, train


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder and what it holds."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---------------------------------------------------------------- what the parser refuses


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("trian", "unknown command 'trian'; did you mean train?"),
        ("xyzzy", "known: train, generate"),
        ("train --bathc.length 64", "unknown option '--bathc.length' of longspan train; did you mean --batch.length?"),
        ("train --rank 2", "unknown option '--rank' of longspan train; did you mean --"),
        ("train stray", "unknown option 'stray' of longspan train"),
        ("train --seed --plan.data 3", "Missing value for argument '--seed'"),
        ("train --batch.steps many", "--batch.steps: invalid literal for int() with base 10: 'many'"),
        ("train --plan.shard zero9", "'zero9' for argument '--plan.shard'. Expected one of ('none', 'zero2', 'zero3')"),
        ("train --plan.data 0", "a plan's data must be at least 1, got 0"),
        ("train --optim.lr -1", "lr and eps must be positive"),
        ("train --keep 0", "keep must be at least 1, got 0"),
        ("train --save-every -1", "must be 0 or more, got -1, 0.0 and 0"),
        ("train --timeout-s 1", "timeout_s must be at least 2 (ranks answer every second), got 1.0"),
        ("train --eval.contexts 64 -4", "contexts must be lengths of at least 2 tokens, got (64, -4)"),
        ("train --eval.every -1", "tokens and every must be 0 or more, got 16384 and -1"),
        ("train --ranks two", "--ranks must be a number of at least 1, got 'two'"),
        ("train --ranks 0", "--ranks must be a number of at least 1, got '0'"),
        ("train --ranks 2 --plan.data 3", "got data 3 x context 1 for 2 ranks; change the plan or start 3 ranks"),
        ("train --ranks 2 --batch.steps 0", "stage"),
        ("generate", "Missing from longspan generate: PATH"),
        ("generate nowhere --prompt x", "a checkpoint must be a folder that exists, got 'nowhere'"),
        ("generate . --prompt x --dtype fp64", "'fp64' for argument '--dtype'"),
        ("methods all", "longspan methods takes no options, got 'all'"),
        ("doctor --ranks 0", "doctor"),
        ("bench --suite speed", "'speed' for argument '--suite'"),
    ],
)
def test_what_the_parser_refuses(argv: str, words: str) -> None:
    assert words in forked(*argv.split()).refusal()


def test_a_fresh_interpreter_says_the_same() -> None:
    result = longspan("train", "--plan.shrad", "zero3")
    assert result.refusal() == "unknown option '--plan.shrad' of longspan train; did you mean --plan.shard?"
    assert not result.out


def test_help_and_version() -> None:
    usage = forked("--help").good().out
    assert all(f"longspan {command} " in usage for command in COMMANDS)
    assert "--plan.context" in forked("train", "--help").good().out
    assert forked("--version").good().out.strip().count(".") == 2
    assert forked().code == 2


# ---------------------------------------------------------------- what a run refuses


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--model.heads 3", "heads must divide width, got 1, 32 and 3"),
        ("--model.kv-heads 3", "num_heads must be a multiple of num_kv_heads, got (2, 3)"),
        ("--plan.tensor 2", "got data 1 x context 1 x tensor 2 for 1 ranks"),
        ("--plan.data 3", "got data 3 x context 1 for 1 ranks"),
        ("--plan.method rign", "unknown context-parallel method 'rign'; known: auto, ring, zigzag"),
        ("--plan.layout zigzga", "unknown layout 'zigzga'; known: contiguous, zigzag, striped"),
        ("--batch.start-length 48", "length"),
        ("--tokenizer nowhere", "a tokenizer is 'bytes' or the path of a tokenizer.json, got 'nowhere'"),
        ("--init nowhere", "a checkpoint must be a folder, got 'nowhere'"),
        ("--resume first", "resume must be 'latest' or a checkpoint such as step_000100, got 'first'"),
        ("--resume latest", "there is no checkpoint in"),
        ("--resume step_000004", "there is no checkpoint in"),
        ("--data.paths nowhere", "a path that exists, got 'nowhere'"),
    ],
)
def test_what_a_run_refuses(tmp_path: Path, options: str, words: str) -> None:
    out = tmp_path / "run"
    assert words in forked(*train(out, *options.split())).refusal()
    assert not (out / "config.json").exists() and not (out / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--plan.context 1 --plan.tensor 2", "the trainer runs the axes data and context, got tensor 2; set tensor to"),
        ("--batch.length 1", "a token for every rank that shares it, got rows of 1 tokens on 2 ranks; use longer rows"),
        ("--model.heads 3", "heads must divide width"),
        ("--ranks 3", "torchrun has started 2"),
    ],
)
def test_what_two_ranks_refuse(tmp_path: Path, options: str, words: str) -> None:
    assert words in forked(*train(tmp_path / "run", *options.split()), world=2).refusal()


def test_the_launcher_repeats_the_line_of_its_ranks(tmp_path: Path) -> None:
    line = longspan(*train(tmp_path / "run", "--ranks", "2", "--plan.context", "1", "--plan.tensor", "2")).refusal()
    assert line == "the trainer runs the axes data and context, got tensor 2; set tensor to 1"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"contxt": 2}', "unknown key 'contxt' in a plan; did you mean 'context'?"),
        ('{"context": "2"}', "a plan's context must be int, got '2' (str)"),
        ("{", "a plan must be JSON, got an error at character 1"),
        ("[2]", "a plan must be a JSON object, got list"),
        ('{"data": 3}', "got data 3 x context 1 for 1 ranks"),
        (None, "No such file"),
    ],
)
def test_plan_files(tmp_path: Path, text: str | None, words: str) -> None:
    file = tmp_path / "plan.json"
    if text is not None:
        file.write_text(text)
    assert words in forked(*train(tmp_path / "run", "--plan-file", str(file))).refusal()
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("*.json*"))


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "empty"), (bytes(range(256)) * 8, "a data file must hold UTF-8 text, got")],
    ids=["empty", "binary"],
)
def test_data_that_is_no_text(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "data.txt"
    file.write_bytes(content)
    line = forked(*train(tmp_path / "run", "--data.paths", str(file))).refusal()
    assert words in line and str(file) in line


@pytest.mark.parametrize("inside", ["", "run"])
def test_out_is_a_file(tmp_path: Path, inside: str) -> None:
    file = tmp_path / "taken"
    file.write_text("mine")
    line = forked(*train(tmp_path / "x", "--out", str(file / inside))).refusal()
    assert f"the run's folder {file / inside} cannot be made" in line and "--out" in line
    assert file.read_text() == "mine"


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "given"
    folder.mkdir()
    for argv in (train(tmp_path / "run", "--init", str(folder)), ["generate", str(folder), "--prompt", "x"]):
        assert "config.json" in forked(*argv).refusal()
    (folder / "config.json").write_text(json.dumps({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}))
    assert "MambaForCausalLM" in forked(*train(tmp_path / "run", "--init", str(folder))).refusal()
    assert "MambaForCausalLM" in forked("generate", str(folder), "--prompt", "x").refusal()


# ---------------------------------------------------------------- a run that is there


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of six steps with checkpoints at 3 and 6."""
    out = tmp_path_factory.mktemp("finished") / "run"
    forked(*train(out, "--save-every", "3")).good()
    return out


def test_a_folder_that_holds_a_run_is_left_alone(finished: Path) -> None:
    before = tree(finished)
    for options in ([], ["--seed", "5"], ["--init", str(finished / "model")]):
        line = forked(*train(finished, *options)).refusal()
        assert "already holds a run; go on with --resume latest, or choose another --out" in line
    assert "there are step_000003, step_000006" in forked(*train(finished, "--resume", "4")).refusal()
    line = forked(*train(finished, "--resume", "latest", "--model.width", "64")).refusal()
    assert "checkpoint step_000006 is of another architecture: " in line and "(32, 32) in the checkpoint" in line
    after = tree(finished)
    assert {name for name in before if before[name] != after.get(name)} <= {"heartbeats/rank_00000.json"}


def generate(folder: Path, *options: str) -> Result:
    return forked("generate", str(folder), "--prompt", "the ring", "--max-new-tokens", "16", *options)


def test_generate(finished: Path) -> None:
    greedy = generate(finished, "--temperature", "0").good().out
    assert greedy.startswith("the ring") and len(greedy.encode()) > len("the ring") + 8
    assert generate(finished / "model", "--temperature", "0", "--seed", "9").good().out == greedy
    sampled = [generate(finished, "--temperature", "5", "--seed", seed).good().out for seed in ("1", "1", "2")]
    assert sampled[0] == sampled[1] != sampled[2] and sampled[0] != greedy


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--temperature -1", "temperature"),
        ("--top-p 0", "top_p"),
        ("--top-k -3", "top_k"),
        ("--max-new-tokens -1", "max_new_tokens"),
        ("--prompt=", "prompt"),
        ("--tokenizer nowhere", "tokenizer"),
        ("--device cuda", "torch sees no CUDA device"),
        ("--topk 3", "did you mean --top-k?"),
    ],
)
def test_what_generate_refuses(finished: Path, options: str, words: str) -> None:
    assert words in generate(finished, *options.split()).refusal()
