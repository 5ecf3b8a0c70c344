"""The command line: ``longspan train | generate | export | demo | doctor | methods | plan | bench``.

Options come from the dataclasses. A mistake is one line on standard error and exit code 2; a run that failed on the way
exits with 1, an interrupted one with 130.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import itertools
import math
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from longspan import __version__

_T = TypeVar("_T")
_ALONE = ("--tensorboard", "--profile")  # options of `longspan train`, "auto" without a value
_DEMO_MARK = ".longspan-demo"  # only a folder that holds it is removed


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateConfig:
    """Continue a prompt with a checkpoint, token by token.

    Args:
        checkpoint: a folder with config.json and safetensors, or the folder of a training run.
        prompt: the text to continue.
        adapter: a folder with a LoRA adapter of the checkpoint, in PEFT's format.
        max_new_tokens: at most so many.
        temperature: 0 takes the most likely token.
        top_k: sample among the k most likely tokens; 0 for all.
        top_p: sample among the fewest tokens that together have this probability.
        tokenizer: "bytes" or a tokenizer.json; by default the checkpoint's own.
        dtype: "auto" is bf16 on CUDA and fp32 elsewhere, as in training.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional]
    prompt: str
    adapter: Path | None = None
    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    tokenizer: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "fp32", "bf16"] = "auto"


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoConfig:
    """Train a small byte-level model on Python's own standard library, 8,192 tokens over two ranks, and report.

    Args:
        out: the run's folder; one made by an earlier demo is replaced.
        ranks: local ranks, at most 512: the shortest rows have a token for each.
        limit_s: training stops after so many seconds; 0 for no limit.
    """

    out: Path = Path("runs/demo")
    ranks: int = 2
    limit_s: float = 115.0

    def __post_init__(self) -> None:
        if not 1 <= self.ranks <= 512:
            raise ValueError(f"the demo runs on 1 to 512 ranks, got {self.ranks}; change --ranks")
        if not 0 <= self.limit_s < math.inf:
            raise ValueError(f"limit_s must be 0 or more seconds, got {self.limit_s}; 0 for no limit")


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorConfig:
    """What is here, checked: devices, back ends, kernels, every communication channel.

    Args:
        ranks: local gloo ranks of the channel checks.
    """

    ranks: int = 2


def _options(kind: Any) -> list[str]:
    parser = tyro.extras.get_parser(kind)
    return [option for action in parser._actions for option in action.option_strings]


def _unboxed(text: str) -> str:
    """What tyro says in a box of several lines, as one: the message, without title and help text."""
    lines = [line.strip("│─╭╮╰╯ ") for line in text.splitlines()]
    # The first line is the title; rules (drawn with "-" where the terminal is ASCII) are around the message.
    message = itertools.dropwhile(lambda line: not line.strip("-"), lines[1:])
    return " ".join(itertools.takewhile(lambda line: line.strip("-"), message)).rstrip(".")


def parse(kind: type[_T], argv: Sequence[str], prog: str, also: tuple[str, ...] = (), *, switches: bool = False) -> _T:
    """The config from the command line. Raises ValueError for an unknown option, with the nearest known one (``also``:
    known, and not of the config), and for a value that cannot be read. ``switches``: a yes-or-no option is its name
    alone, without a value."""
    said = io.StringIO()
    style = tyro.conf.FlagCreatePairsOff if switches else tyro.conf.FlagConversionOff
    try:
        with contextlib.redirect_stderr(said):
            config, unknown = tyro.cli(kind, args=list(argv), prog=prog, return_unknown_args=True, config=(style,))
    except SystemExit as error:
        if not error.code:  # --help
            raise
        raise ValueError(f"{_unboxed(said.getvalue())}; see {prog} --help") from None
    if unknown:
        name = next((item for item in unknown if item.startswith("-")), unknown[0]).split("=")[0]
        near = difflib.get_close_matches(name, [*also, *_options(kind)], n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"see {prog} --help"
        raise ValueError(f"unknown option {name!r} of {prog}; {hint}")
    return config


def _train(argv: Sequence[str]) -> int:
    from longspan.train.config import TrainConfig
    from longspan.train.launch import discover, local_ranks
    from longspan.train.liveness import started_by_launcher

    ranks, rest = _take_ranks(argv)
    rest = _with_values(rest)
    if {"-h", "--help"} & set(rest):
        print("longspan train --ranks N [options] starts N ranks on this machine; the options of each:\n")
    config = parse(TrainConfig, rest, "longspan train", also=("--ranks",))
    launch = discover()
    if launch.how != "single":
        if ranks not in (None, launch.world_size):
            raise ValueError(
                f"--ranks starts local ranks, but {launch.how} has started {launch.world_size}; leave it out"
            )
    elif ranks is not None and ranks > 1:
        from longspan.plan.plan import Plan

        plan = Plan.read(config.plan_file) if config.plan_file is not None else config.plan
        plan.fit(ranks)  # before anything is started
        config.batch.plan()
        return local_ranks(ranks, ["train", *rest], hint=lambda: _how_to_go_on(config.out))
    # Ranks of --ranks are started without it; the command to repeat has it.
    started = ["--ranks", str(launch.world_size)] if started_by_launcher() else []
    return _rank(config, shlex.join(["longspan", "train", *started, *rest]))


def _how_to_go_on(out: Path) -> str:
    kept = list((out / "checkpoints").glob("step_*[0-9]"))
    return "checkpoints are kept: go on with --resume latest" if kept else ""


def _take_ranks(argv: Sequence[str]) -> tuple[int | None, list[str]]:
    """--ranks belongs to the launcher, not to the run: it is taken off the command line."""
    rest, ranks = [], None
    items = iter(argv)
    for item in items:
        name, _, value = item.partition("=")
        if name != "--ranks":
            rest.append(item)
            continue
        text = value or next(items, "")
        if not text.isdigit() or int(text) < 1:
            raise ValueError(f"--ranks must be a number of at least 1, got {text!r}")
        ranks = int(text)
    return ranks, rest


def _with_values(argv: Sequence[str]) -> list[str]:
    """Options that may stand alone get the value that they then have."""
    filled: list[str] = []
    for item, after in itertools.zip_longest(argv, argv[1:], fillvalue="--"):
        filled.append(item)
        if item in _ALONE and after.startswith("--"):
            filled.append("auto")
    return filled


def _rank(config: Any, command: str) -> int:
    """One rank of a training run, its errors in one line each."""
    from longspan.train.data.loader import DataWorkerError
    from longspan.train.liveness import INTERRUPTED, LostRankError, fail, started_by_launcher
    from longspan.train.loop import NotFiniteError
    from longspan.train.manifest import SaveError
    from longspan.train.session import run

    try:
        finished = run(config, command)
    except (LostRankError, NotFiniteError, DataWorkerError, SaveError) as error:
        fail(str(error))
    except ValueError as error:
        fail(str(error), code=2)
    except OSError as error:
        # The launcher of --ranks adds how to go on.
        words = "" if started_by_launcher() else _how_to_go_on(config.out)
        fail(f"{error}; {words}" if words else str(error))
    # The launcher of --ranks knows of the Ctrl-C that it passed on; a code from its ranks would be a failure to it.
    return 0 if finished or started_by_launcher() else INTERRUPTED


def _demo(argv: Sequence[str]) -> int:
    from longspan.train.launch import discover
    from longspan.train.setting import make_folder

    config = parse(DemoConfig, argv, "longspan demo")
    if (launch := discover()).how != "single":
        raise ValueError(f"the demo starts its own ranks, got {launch.how}'s; run longspan train under it")
    mark = config.out / _DEMO_MARK
    if config.out.exists():
        if not mark.is_file() and (not config.out.is_dir() or any(config.out.iterdir())):
            raise ValueError(f"{config.out} is not the folder of an earlier demo; choose another --out")
        shutil.rmtree(config.out)
    make_folder(config.out)
    mark.write_text("made by longspan demo, which may replace this folder\n")
    return _train(
        [
            "--ranks", str(config.ranks), "--out", str(config.out), "--limit-s", str(config.limit_s),
            *demo_options(),
        ]
    )  # fmt: skip


def demo_options() -> list[str]:
    """The demo's training run: 512 tokens growing to 8,192, split over the ranks."""
    return [
        "--model.layers", "2", "--model.width", "128", "--model.heads", "2",
        "--batch.steps", "420", "--batch.tokens", "1024", "--batch.length", "8192", "--batch.start-length", "512",
        "--batch.warmup-fraction", "0.98", "--optim.lr", "4e-3", "--optim.warmup", "20",
        "--eval.contexts", "512", "8192", "--eval.tokens", "32768",
    ]  # fmt: skip


def _generate(argv: Sequence[str]) -> int:
    import torch

    from longspan.model import load_pretrained
    from longspan.model.generate import generate
    from longspan.model.hf_adapter import load_adapter
    from longspan.model.huggingface import read_config
    from longspan.train.data.tokenizers import load_tokenizer

    config = parse(GenerateConfig, argv, "longspan generate")
    folder = config.checkpoint
    if not folder.is_dir():
        raise ValueError(f"a checkpoint must be a folder that exists, got {str(folder)!r}; check the path")
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        folder = folder / "model" if (folder / "model" / "config.json").is_file() else folder
    read_config(folder)  # before the tokenizer: a folder that is no checkpoint is called that
    tokenizer = load_tokenizer(config.tokenizer or str(folder))
    cuda = config.device != "cpu" and torch.cuda.is_available()
    if config.device == "cuda" and not cuda:
        raise ValueError("device cuda was asked for and torch sees no CUDA device; use --device cpu or auto")
    bf16 = cuda if config.dtype == "auto" else config.dtype == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    model = load_pretrained(folder, dtype=dtype, device="cuda" if cuda else "cpu")
    if config.adapter is not None:
        load_adapter(model, config.adapter)
    ids = tokenizer.encode(config.prompt)
    steps = generate(
        model,
        torch.from_numpy(ids)[None],
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k or None,
        top_p=config.top_p,
        seed=config.seed,
        stop_ids={tokenizer.separator_id},
    )
    print(config.prompt, end="", flush=True)
    decoder = tokenizer.stream(ids.tolist())
    for (token,) in steps:
        if token == tokenizer.separator_id:
            break
        if token < tokenizer.vocab_size:  # a padded vocabulary has tokens without text
            print(decoder.push(token), end="", flush=True)
    print(decoder.finish(), flush=True)
    return 0


def _export(argv: Sequence[str]) -> int:
    from longspan.train.export import ExportConfig, run_export

    return run_export(parse(ExportConfig, argv, "longspan export"))


def _doctor(argv: Sequence[str]) -> int:
    from longspan.bench.doctor import run_doctor

    return run_doctor(parse(DoctorConfig, argv, "longspan doctor").ranks)


def _methods(argv: Sequence[str]) -> int:
    from longspan.bench.catalogue import print_methods

    if argv and argv[0] in ("-h", "--help"):
        print(f"longspan methods: {COMMANDS['methods'][1]}. It takes no options.")
        return 0
    if argv:
        raise ValueError(f"longspan methods takes no options, got {argv[0]!r}; leave it out")
    print_methods()
    return 0


def _bench(argv: Sequence[str]) -> int:
    if argv and argv[0] == "attention":
        from longspan.bench.attention import AttentionBenchConfig, run_attention_bench

        config = parse(AttentionBenchConfig, argv[1:], "longspan bench attention", switches=True)
        return run_attention_bench(config)
    if argv and argv[0] == "kernels":
        from longspan.bench.kernels import KernelBenchConfig, run_kernel_bench

        return run_kernel_bench(parse(KernelBenchConfig, argv[1:], "longspan bench kernels", switches=True))
    if argv and argv[0] == "step":
        from longspan.bench.step import StepBenchConfig, run_step_bench

        return run_step_bench(parse(StepBenchConfig, argv[1:], "longspan bench step", switches=True))
    if argv and argv[0] == "memory":
        from longspan.bench.memory import MemoryBenchConfig, run_memory_bench

        return run_memory_bench(parse(MemoryBenchConfig, argv[1:], "longspan bench memory", switches=True))
    from longspan.bench.training import BenchConfig, run_training_bench

    if {"-h", "--help"} & set(argv):
        print("longspan bench measures training; others have a --help of their own:")
        print("  longspan bench attention  the methods over ranks, on a network")
        print("  longspan bench kernels    attention kernels on one device; --save-profile calibrates it")
        print("  longspan bench step       a training step on one device, beside others' and the floor")
        print("  longspan bench memory     what each way of saving memory saves and costs\n")
    return run_training_bench(parse(BenchConfig, argv, "longspan bench"))


def _plan(argv: Sequence[str]) -> int:
    from longspan.plan.command import PlanConfig, run_plan

    return run_plan(parse(PlanConfig, argv, "longspan plan", switches=True))


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "train": (_train, "train a model, on one rank or many"),
    "generate": (_generate, "continue a prompt with a checkpoint"),
    "export": (_export, "a run's checkpoint as a Hugging Face folder"),
    "demo": (_demo, "train a small model on real text over two ranks, and write a report"),
    "doctor": (_doctor, "what is here, checked: devices, back ends, every communication channel"),
    "methods": (_methods, "every method, layout, mask and kernel, and where each is verified"),
    "plan": (_plan, "which context-parallel method and token layout would be chosen, and why"),
    "bench": (
        _bench,
        "measure on this machine: training, one step, memory, attention, or its kernels",
    ),
}


def usage() -> str:
    lines = [f"longspan {__version__}: train transformers on sequences that no single device holds", ""]
    lines += [f"  longspan {name:<9} {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join([*lines, "", "longspan COMMAND --help lists a command's options."])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. A ValueError becomes one line and exit code 2, what the system refused one and exit code 1."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(__version__)
        return 0
    name, rest = arguments[0], arguments[1:]
    try:
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            known = ", ".join(COMMANDS)
            raise ValueError(
                f"unknown command {name!r}; " + (f"did you mean {near[0]}?" if near else f"known: {known}")
            )
        return COMMANDS[name][0](rest)
    except ValueError as error:
        print(f"longspan: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of a pipe has left. What stays in the buffer would fail again when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"longspan: error: {error}", file=sys.stderr)
        return 1
