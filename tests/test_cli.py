"""The command line: what it refuses, in one line and with exit code 2, and what its commands print."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from longspan import cli
from longspan.cli import COMMANDS, main
from longspan.train.data.loader import DataWorkerError
from longspan.train.manifest import CheckpointError, SaveError
from tests.longspan_cli import Result, forked, longspan, train
from tests.train.runs import given_model


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
        ("train --rank 2", "unknown option '--rank' of longspan train; did you mean --ranks?"),
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
        ("train --ranks 2 --batch.steps 0", "steps, tokens and length of a batch must be at least 1, got 0, 16384 and"),
        ("train --batch.tokens -5", "steps, tokens and length of a batch must be at least 1, got 100, -5 and 2048"),
        ("train --optim.final 1.5", "final in [0, 1], got 0.9, 0.95, 0.2 and 1.5"),
        ("train --optim.beta2 1", "beta1 and beta2 must lie in [0, 1), decay in (0, 1]"),
        ("train --plan-file p.json --plan.shard zero3", "got --plan-file p.json and --plan options; change the file"),
        ("train --init folder --model.width 64", "got --init folder and --model options; leave one of the two out"),
        ("train --init folder --model.config c.json", "got --init folder and --model options; leave one of the two"),
        ("train --model.config c.json --model.tie True", "got --model.config c.json and other --model options"),
        ("train --eval.every 5 --data.held-out 0", "got every 5 with held_out 0 and 16384 tokens"),
        ("train --eval.every 5 --eval.tokens 0", "got every 5 with held_out 0.05 and 0 tokens"),
        ("generate", "Missing from longspan generate: PATH"),
        ("generate nowhere --prompt x", "a checkpoint must be a folder that exists, got 'nowhere'"),
        ("generate . --prompt x --dtype fp64", "'fp64' for argument '--dtype'"),
        ("methods all", "longspan methods takes no options, got 'all'"),
        ("plan --explian", "unknown option '--explian' of longspan plan; did you mean --explain?"),
        ("doctor --ranks 0", "doctor checks channels between 2 to 16 ranks, got 0; pass --ranks 2"),
        ("demo --ranks 0", "the demo runs on 1 to 512 ranks, got 0; change --ranks"),
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
    of_train = forked("train", "--help").good().out
    assert "--plan.context" in of_train and "longspan train --ranks N" in of_train
    assert "It takes no options" in forked("methods", "--help").good().out
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
        ("--batch.start-length 48", "tokens of a step must be a multiple of every shorter length, got 256 with 48"),
        ("--tokenizer nowhere", "a tokenizer is 'bytes' or the path of a tokenizer.json, got 'nowhere'"),
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
        (
            "--plan.context 1 --plan.pipeline 2 --model.layers 1",
            "needs a layer for every stage, got 1 layers for 2 stages",
        ),
        ("--batch.length 1", "a token for every rank that shares it, got rows of 1 tokens on 2 ranks; use longer rows"),
        ("--model.heads 3", "heads must divide width"),
        ("--ranks 3", "torchrun has started 2"),
    ],
)
def test_what_two_ranks_refuse(tmp_path: Path, options: str, words: str) -> None:
    assert words in forked(*train(tmp_path / "run", *options.split()), world=2).refusal()


def test_the_launcher_repeats_the_line_of_its_ranks(tmp_path: Path) -> None:
    line = longspan(*train(tmp_path / "run", "--ranks", "2", "--plan.context", "1", "--plan.expert", "2")).refusal()
    assert line == "expert parallelism needs an expert for every rank, got 0 experts for expert 2; use fewer, or data"


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
    for command in ("demo", "bench"):
        line = forked(command, "--out", str(file / inside)).refusal()
        assert str(file / inside) in line and "choose another --out" in line
    line = forked(*train(tmp_path / "x", "--out", str(file / inside))).refusal()
    assert f"the folder {file / inside} cannot be made" in line and "--out" in line
    assert file.read_text() == "mine"


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "given"
    folder.mkdir()
    missing = forked(*given_model(tmp_path / "run", "--init", "nowhere")).refusal()
    assert "a checkpoint must be a folder, got 'nowhere'" in missing and not (tmp_path / "run" / "config.json").exists()
    for argv in (given_model(tmp_path / "run", "--init", str(folder)), ["generate", str(folder), "--prompt", "x"]):
        assert "config.json" in forked(*argv).refusal()
    (folder / "config.json").write_text(json.dumps({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}))
    assert "MambaForCausalLM" in forked(*given_model(tmp_path / "run", "--init", str(folder))).refusal()
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
        line = forked(*(given_model if options[:1] == ["--init"] else train)(finished, *options)).refusal()
        assert "already holds a run; go on with --resume latest, or choose another --out" in line
    assert "there are step_000003, step_000006" in forked(*train(finished, "--resume", "4")).refusal()
    line = forked(*train(finished, "--resume", "latest", "--model.width", "64")).refusal()
    assert "checkpoint step_000006 is of another architecture: " in line and "(32, 32) in the checkpoint" in line
    after = tree(finished)
    assert {name for name in before if before[name] != after.get(name)} <= {"heartbeats/rank_00000.json"}


def test_a_run_that_saved_nothing_leads_nowhere_in_circles(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "metrics.jsonl").write_text('{"kind": "event", "step": 0, "time_s": 0.0, "message": "x"}\n')
    before = tree(out)
    line = forked(*train(out)).refusal()
    assert line.endswith("holds the metrics of a run without a checkpoint; choose another --out, or remove the folder")
    assert forked(*train(out, "--resume", "latest")).refusal().endswith("start without --resume in a new --out")
    assert tree(out).items() >= before.items() and not (out / "config.json").exists()


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
        ("--temperature -1", "temperature must be 0 or more and finite, got -1.0"),
        ("--top-p 0", "top_p must be in (0, 1], got 0.0"),
        ("--top-k -3", "top_k must be at least 1, got -3"),
        ("--max-new-tokens -1", "max_new_tokens must be at least 1, got -1"),
        ("--prompt=", "the prompt must have at least one token, got none"),
        ("--tokenizer nowhere", "a tokenizer is 'bytes' or the path of a tokenizer.json, got 'nowhere'"),
        ("--device cuda", "torch sees no CUDA device"),
        ("--topk 3", "did you mean --top-k?"),
    ],
)
def test_what_generate_refuses(finished: Path, options: str, words: str) -> None:
    assert words in generate(finished, *options.split()).refusal()


def test_generate_computes_as_training_does(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(path: Path, *, dtype: torch.dtype, device: str) -> None:
        raise ValueError(f"{dtype} on {device}")

    monkeypatch.setattr("longspan.model.load_pretrained", load)
    for cuda, options, words in (
        (True, [], "torch.bfloat16 on cuda"),
        (True, ["--dtype", "fp32"], "torch.float32 on cuda"),
        (True, ["--device", "cpu"], "torch.float32 on cpu"),
        (False, [], "torch.float32 on cpu"),
        (False, ["--dtype", "bf16"], "torch.bfloat16 on cpu"),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        assert main(["generate", str(finished), "--prompt", "x", *options]) == 2
        assert capsys.readouterr().err == f"longspan: error: {words}\n"


# ---------------------------------------------------------------- the demo's folder


def test_the_demo_replaces_its_own_folder_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(cli, "_train", lambda argv: started.append(list(argv)) or 0)
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out)]) == 0
    (out / "metrics.jsonl").write_text("{}\n")
    assert main(["demo", "--out", str(out), "--ranks", "1"]) == 0 and not (out / "metrics.jsonl").exists()
    assert [argv[:2] for argv in started] == [["--ranks", "2"], ["--ranks", "1"]]
    (tmp_path / "empty").mkdir()
    assert main(["demo", "--out", str(tmp_path / "empty")]) == 0


@pytest.mark.parametrize("options", [[], ["--ranks", "0"], ["--ranks", "513"], ["--limit-s", "-1"], ["--out=file"]])
def test_a_refused_demo_removes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    (run / "checkpoints" / "step_000001").mkdir(parents=True)
    (run / "metrics.jsonl").write_text("{}\n")
    if options:  # even of a demo
        (run / ".longspan-demo").write_text("")
    (tmp_path / "file").write_text("mine")
    assert main(["demo", "--out", "run", *options]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert (run / "metrics.jsonl").is_file() and (run / "checkpoints" / "step_000001").is_dir()
    assert (tmp_path / "file").read_text() == "mine"


def test_the_demo_starts_its_own_ranks(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".longspan-demo").write_text("")
    line = forked("demo", "--out", str(tmp_path / "run"), world=2).refusal()
    assert line == "the demo starts its own ranks, got torchrun's; run longspan train under it"
    assert (tmp_path / "run" / ".longspan-demo").is_file()


# ---------------------------------------------------------------- how failures are said


def test_what_the_system_refuses_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(argv: object) -> int:
        raise OSError(28, "No space left on device", "x/y")

    monkeypatch.setitem(COMMANDS, "bench", (full, ""))
    assert main(["bench"]) == 1
    assert capsys.readouterr().err == "longspan: error: [Errno 28] No space left on device: 'x/y'\n"


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (SaveError("not saved"), 1, "not saved"),
        (DataWorkerError("no data"), 1, "no data"),
        (CheckpointError("damaged"), 2, "damaged"),
        (OSError(28, "full"), 1, "[Errno 28] full"),
    ],
)
def test_a_run_that_fails_says_so_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, words: str
) -> None:
    def run(config: object, command: str) -> bool:
        raise error

    def fail(message: str, code: int = 1) -> None:
        raise SystemExit(f"{code} {message}")

    monkeypatch.setattr("longspan.train.session.run", run)
    monkeypatch.setattr("longspan.train.liveness.fail", fail)
    for made in (False, True):
        if made:
            (tmp_path / "run" / "checkpoints" / "step_000002").mkdir(parents=True)
        more = "; checkpoints are kept: go on with --resume latest" if made and isinstance(error, OSError) else ""
        with pytest.raises(SystemExit, match=re.escape(f"{code} {words}{more}") + "$"):
            main(["train", "--out", str(tmp_path / "run")])


@pytest.mark.parametrize("launcher", [False, True])
def test_the_command_can_be_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launcher: bool) -> None:
    said: list[str] = []
    monkeypatch.setattr(cli, "_rank", lambda config, command: said.append(command) or 0)
    if launcher:
        ranked = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
        for name, value in {**ranked, "LONGSPAN_LAUNCHER_PID": str(os.getppid())}.items():
            monkeypatch.setenv(name, value)
    argv = ["train", "--out", str(tmp_path / "my run"), "--prompt", "it's $HOME"]
    assert main(argv) == 0
    assert shlex.split(said[0]) == ["longspan", "train", *(["--ranks", "2"] if launcher else []), *argv[1:]]


def test_a_reader_that_leaves_is_no_failure_of_the_run(tmp_path: Path) -> None:
    argv = train(tmp_path / "run", "--prompt", "the ")
    process = subprocess.Popen(
        [sys.executable, "-m", "longspan", *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), err) == (0, "") and (tmp_path / "run" / "report.html").is_file()
