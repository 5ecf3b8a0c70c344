"""Attention over ranks on a real network, measured: method by method, mask by mask, against one baseline.

``longspan bench attention --network port --rate 100mbit --ranks 4`` starts each rank in a network namespace of its own
(``bench.network``), passes every cell through its gate (``bench.attention_cell``) and then takes times: each repetition
counts as long as its *slowest* rank took; median and quartiles are over repetitions. Bytes are counted by the kernel.
In several rounds the methods of a problem take turns, so that a machine which is slower for a while is so to all.

Every cell is appended to ``attention.jsonl`` when it is done, and one that is there is not measured again. A ratio is
taken within one run only: where a cell is missing, the baseline of its problem is measured anew beside it.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import product
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any, Literal

from longspan.attention.patterns import check_pattern
from longspan.bench.attention_cell import PUBLISHED, Cell, Job, Problem, solve
from longspan.bench.network import Host, Network, lab
from longspan.bench.record import append_row, head, key, now, plain, quartiles, read_rows, versions
from longspan.bench.regret import LEAST_CELLS, heat_map, regret_table, regrets
from longspan.bench.shares import cpu_shares, join
from longspan.context.methods import METHODS, builder
from longspan.hardware.rates import parse_rate

_START_LIMIT_S = 120.0
_GRACE_S = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionBenchConfig:
    """Measure attention over ranks on a network with a known rate, and write JSON and a table.

    Args:
        network: "port": one cable per rank to a switch; "mesh": one cable per pair of ranks; both need root and
            iproute2. "none": the loopback of this machine, without limit.
        rate: of each direction of each cable, as 100mbit or 1.5gbit; none for no limit.
        ranks: processes.
        methods: names that ``longspan methods`` lists, and auto; all methods by default. A name as zigzag.published is
            the method without leaving out what the mask makes idle, as it was published.
        baseline: the method that ratios are against; always measured.
        masks: names of mask patterns.
        length: tokens of the global sequence, one or several.
        heads: query heads.
        kv_heads: KV heads, one or several.
        layout: token layout of every method; each method's own by default.
        histogram: JSON of document lengths; by default uniform from 1/32 to 1/4 of the length.
        repetitions: timed passes of each kind, in each round.
        rounds: how often the methods of a problem take turns.
        threads: of each rank.
        cpu: cores, for instance 0.4, that each rank may use and no more, as on a host of its own; needs root. 0: ranks
            share the machine's cores.
        timeout_s: limit of one cell; a cell that takes longer counts as failed.
        fresh: measure also what the results hold already.
        out: where the results go, and where those of an earlier run are looked for.
    """

    network: Literal["port", "mesh", "none"] = "none"
    rate: str = "none"
    ranks: int = 4
    methods: tuple[str, ...] = ()
    baseline: str = "zigzag"
    masks: tuple[str, ...] = ("causal",)
    length: tuple[int, ...] = (4096,)
    heads: int = 8
    kv_heads: tuple[int, ...] = (8,)
    head_dim: int = 64
    dtype: Literal["fp64", "fp32", "bf16"] = "fp32"
    layout: str | None = None
    histogram: Path | None = None
    seed: int = 0
    repetitions: int = 5
    rounds: int = 1
    threads: int = 1
    cpu: float = 0.0
    timeout_s: float = 300.0
    fresh: bool = False
    out: Path = Path("runs/bench")

    def __post_init__(self) -> None:
        rate = parse_rate(self.rate)
        if rate is not None and self.network == "none":
            raise ValueError(f"a rate needs a network, got --rate {self.rate} without one; add --network port or mesh")
        for name in (*self.methods, self.baseline):
            if name != "auto":
                builder(name.removesuffix(PUBLISHED), self.ranks)  # refuses unknown names and degrees
        for name in self.masks:
            check_pattern(name)
        if not (self.masks and self.length and self.kv_heads):
            raise ValueError("masks, length and kv_heads must have a value each, got none; name at least one")
        counts = (self.ranks, self.repetitions, self.rounds, self.threads, self.timeout_s)
        if not min(counts) > 0:
            raise ValueError(
                f"ranks, repetitions, rounds, threads and timeout_s must be positive, got {counts}; give numbers"
            )
        if not 0 <= self.cpu <= (os.cpu_count() or 1):
            raise ValueError(f"cpu is a number of cores of this machine, or 0 for no limit, got {self.cpu}; pass 0.4")
        if self.network != "none" and self.ranks < 2:
            raise ValueError(f"a network needs two ranks, got {self.ranks}; pass --ranks 4 or --network none")
        if min(self.length) < self.ranks:
            raise ValueError(f"every rank needs a token, got {min(self.length)} tokens for {self.ranks} ranks")
        list(self.problems())  # which refuse sizes that no problem has

    def problems(self) -> Iterator[list[Cell]]:
        """The cells of each problem, the baseline first."""
        methods = [self.baseline, *(name for name in self.methods or METHODS if name != self.baseline)]
        histogram = None if self.histogram is None else str(self.histogram)
        for length, mask, kv_heads in product(self.length, self.masks, self.kv_heads):
            problem = Problem(
                mask=mask,
                length=length,
                heads=self.heads,
                kv_heads=kv_heads,
                head_dim=self.head_dim,
                dtype=self.dtype,
                histogram=histogram,
                seed=self.seed,
            )
            yield [
                Cell(
                    problem=problem,
                    method=method,
                    layout=self.layout,
                    ranks=self.ranks,
                    network=self.network,
                    rate_bit_per_s=parse_rate(self.rate),
                    threads=self.threads,
                    cpu=self.cpu,
                )
                for method in dict.fromkeys(methods)
            ]


class RanksLostError(RuntimeError):
    """A rank died, failed or was late: the message says which and why."""


def _environment(host: Host | None) -> dict[str, str]:
    """The interface of gloo. Without it gloo resolves the machine's name, which some containers cannot."""
    if host is not None:
        return {"GLOO_SOCKET_IFNAME": host.interface}
    return {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}


class _Ranks:
    """One process per rank, each in its host where there is a network, serving cells until one of them fails."""

    def __init__(
        self, config: AttentionBenchConfig, network: Network | None, shares: Sequence[Path], folder: Path
    ) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._pipes: list[Connection] = []
        self._logs = [folder / f"rank_{rank}.log" for rank in range(config.ranks)]
        store = folder / "store"
        store.unlink(missing_ok=True)
        try:
            for rank, log in enumerate(self._logs):
                host = None if network is None else network.hosts[rank]
                ours, theirs = Pipe()
                self._pipes.append(ours)
                numbers = (theirs.fileno(), rank, config.ranks, config.threads, store, config.timeout_s)
                command = [sys.executable, "-m", "longspan.bench.attention_cell", *map(str, numbers)]
                with log.open("wb") as said:
                    process = subprocess.Popen(
                        command if host is None else host.command(*command),
                        env={**os.environ, **_environment(host), "OMP_NUM_THREADS": str(config.threads)},
                        pass_fds=(theirs.fileno(),),
                        stdin=subprocess.DEVNULL,
                        stdout=said,
                        stderr=said,
                        start_new_session=True,  # Ctrl-C is this process's, which ends the ranks
                    )
                self._processes.append(process)
                if shares:
                    join(shares[rank], process.pid)
                theirs.close()  # so that a rank's death closes the pipe
            self._collect(_START_LIMIT_S)
        except BaseException:
            self.close()
            raise

    def measure(self, job: Job, timeout_s: float) -> list[dict[str, Any]]:
        """What each rank has measured. Raises RanksLostError, after which these ranks are of no use."""
        for pipe in self._pipes:
            pipe.send(job)
        return self._collect(timeout_s)

    def _collect(self, timeout_s: float) -> list[Any]:
        deadline_s = time.monotonic() + timeout_s
        answers: dict[int, Any] = {}
        while len(answers) < len(self._pipes):
            open_pipes = [pipe for rank, pipe in enumerate(self._pipes) if rank not in answers]
            ready = wait(open_pipes, max(0.0, deadline_s - time.monotonic()))
            if not ready:
                late = ", ".join(str(rank) for rank in range(len(self._pipes)) if rank not in answers)
                raise RanksLostError(f"no answer within {timeout_s:g} s from rank {late}")
            for rank, pipe in enumerate(self._pipes):
                if pipe not in ready:
                    continue
                try:
                    answers[rank] = pipe.recv()
                except (EOFError, ConnectionResetError):
                    raise RanksLostError(f"rank {rank} {self._end(rank)}") from None
        return [answers[rank] for rank in range(len(self._pipes))]

    def _end(self, rank: int) -> str:
        try:
            code = self._processes[rank].wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            code = None
        if code is not None and code < 0:
            return f"died of {signal.Signals(-code).name}"
        lines = self._logs[rank].read_text(errors="replace").strip().splitlines()
        return f"ended with exit code {code}: {lines[-1].strip() if lines else 'it said nothing'}"

    def close(self) -> None:
        """Ends the ranks: those that are idle by themselves, the others by force."""
        for pipe in self._pipes:
            pipe.close()
        deadline_s = time.monotonic() + _GRACE_S
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline_s - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def run_attention_bench(config: AttentionBenchConfig) -> int:
    """Measures what is missing; writes ``attention.jsonl``, ``.json`` and ``.md``. Exit code 1 where a cell failed.

    With ``auto`` beside fixed methods in several cells also what it chose and lost: ``attention_choice.md``, ``.svg``.
    Raises ValueError (NetworkError) where the network cannot be made here.
    """
    config.out.mkdir(parents=True, exist_ok=True)
    log, run = config.out / "attention.jsonl", now()
    rows = {} if config.fresh else read_rows(log, versions())
    wanted = list(config.problems())
    with ExitStack() as stack:
        missing = [cells for cells in wanted if any(key(asdict(cell)) not in rows for cell in cells)]
        network = None
        if missing and config.network != "none":
            network = stack.enter_context(lab(config.ranks, config.network, parse_rate(config.rate)))
        shares = stack.enter_context(cpu_shares(config.ranks, config.cpu)) if missing and config.cpu else ()
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="longspan-bench-")))
        ranks: _Ranks | None = None
        try:
            for cells in missing:
                answer = folder / "answer.pt"
                print(f"answer to {_title(asdict(cells[0].problem))} in float64 ...", flush=True)
                solve(cells[0].problem, answer)
                base = None
                due = [cell for cell in cells if cell.method == config.baseline or key(asdict(cell)) not in rows]
                found: dict[Cell, list[dict[str, Any]]] = {}
                for number, cell in product(range(config.rounds), due):
                    if number and found[cell][0]["status"] != "ok":
                        continue
                    try:
                        ranks = ranks or _Ranks(config, network, shares, folder)
                        job = Job(cell=cell, answer=answer, repetitions=config.repetitions)
                        parts = ranks.measure(job, config.timeout_s)
                    except RanksLostError as error:
                        parts = [{"status": "failed", "reason": str(error)}]
                        if ranks is not None:
                            ranks.close()
                        ranks = None
                    found[cell] = with_times(parts, found[cell]) if number else parts
                    if number + 1 < config.rounds and parts[0]["status"] == "ok":
                        continue
                    row = {"run": run, "versions": versions(), "cell": asdict(cell), **combine(found[cell])}
                    append_row(log, row)
                    rows[key(asdict(cell))] = row
                    base = row if cell.method == config.baseline else base
                    print(_line(row, base), flush=True)
        finally:
            if ranks is not None:
                ranks.close()
    every = [rows[key(asdict(cell))] for cells in wanted for cell in cells]
    record = {**head("attention", run), "config": plain(config), "rows": every}
    (config.out / "attention.json").write_text(json.dumps(record, indent=2) + "\n")
    (config.out / "attention.md").write_text(table(record))
    if len(cells := regrets(record["rows"])) >= LEAST_CELLS:
        (config.out / "attention_choice.md").write_text(regret_table(cells))
        (config.out / "attention_choice.svg").write_text(heat_map(cells))
    print(f"results {config.out / 'attention.json'} and {config.out / 'attention.md'}")
    return int(any(row["status"] in ("red", "failed") for row in record["rows"]))


def with_times(parts: list[dict[str, Any]], before: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The ranks' parts of a round with the times of those before; where a round fails, as it failed."""
    if any(part["status"] != "ok" for part in parts):
        return parts
    times = ("forward_s", "both_s")
    return [
        {**part, **{name: old[name] + part[name] for name in times}} for part, old in zip(parts, before, strict=True)
    ]


def combine(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The ranks' parts as one row: a repetition takes as long as its slowest rank. No figures unless all are ok."""
    bad = next((part for part in parts if part["status"] != "ok"), None)
    if bad is not None:
        worst = max(parts, key=lambda part: part.get("excess", 0.0))  # of a red cell the reddest rank
        return {"status": bad["status"], "reason": worst.get("reason", bad["reason"])}
    first = parts[0]
    row = {"status": "ok", "method": first["method"], "layout": first["layout"]}
    for kind in ("forward", "both"):
        slowest = [max(times) for times in zip(*(part[f"{kind}_s"] for part in parts), strict=True)]
        row[f"{kind}_s"] = quartiles(slowest)
        for how in ("counted", "formula"):
            row[f"{kind}_{how}_bytes"] = [part[f"{kind}_{how}_bytes"] for part in parts]
    row["added_bytes_per_rank"] = [part["added_bytes"] for part in parts]
    row["excess"] = max(part["excess"] for part in parts)
    row["build_s"] = max(part["build_s"] for part in parts)
    return row


def _title(problem: dict[str, Any]) -> str:
    shape = f"H:G {problem['heads']}:{problem['kv_heads']}, D {problem['head_dim']}, {problem['dtype']}"
    return f"{problem['mask']}, {problem['length']:,} tokens, {shape}"


def _ratio(row: dict[str, Any], base: dict[str, Any] | None, kind: str) -> str:
    """Against the baseline of the same run; a dash where there is none."""
    if base is None or base["status"] != "ok" or base["run"] != row["run"]:
        return "–"
    return f"{row[f'{kind}_s'][1] / base[f'{kind}_s'][1]:.2f}"


def _counted(row: dict[str, Any], kind: str) -> str:
    """Counted bytes by formula's bytes, summed over ranks."""
    counted, formula = row[f"{kind}_counted_bytes"], row[f"{kind}_formula_bytes"]
    if None in counted or not sum(formula):
        return "–"
    return f"{sum(counted) / sum(formula):.4f}"


def _line(row: dict[str, Any], base: dict[str, Any] | None) -> str:
    name = f"  {row['cell']['method']:<18}"
    if row["status"] != "ok":
        return f"{name} {row['status']}: {row['reason']}"
    return (
        f"{name} forward {row['forward_s'][1]:7.3f} s ({_ratio(row, base, 'forward')} x)   forward and backward "
        f"{row['both_s'][1]:7.3f} s ({_ratio(row, base, 'both')} x)   sent at most "
        f"{max(row['both_formula_bytes']) / 1e6:.2f} MB (counted {_counted(row, 'both')} x)"
    )


def table(record: dict[str, Any]) -> str:
    """The record as Markdown, a table per problem and network; ratios are against the baseline of the same run."""
    lines: list[str] = []
    baseline, heading = record["config"]["baseline"], None
    for row in record["rows"]:
        cell = row["cell"]
        rate = cell["rate_bit_per_s"]
        speed = "no limit" if rate is None else f"{rate / 1e6:g} Mbit/s"
        network = "loopback" if cell["network"] == "none" else f"{cell['network']}, {speed}"
        title = f"{_title(cell['problem'])}; {cell['ranks']} ranks, {network}"
        if cell.get("cpu"):
            title += f", {cell['cpu']:g} of a core each"
        if title != heading:
            heading = title
            lines += ["", f"**{title}**", ""] if lines else [f"**{title}**", ""]
            lines += [
                f"| method | layout | forward s (quartiles) | ÷ {baseline} | forward + backward s (quartiles) | "
                f"÷ {baseline} | MB sent per rank forward, mean / max | both, mean / max | counted ÷ formula |",
                "|---|---|---:|---:|---:|---:|---:|---:|---:|",
            ]
        if row["status"] != "ok":
            lines.append(f"| {cell['method']} | {row['status']}: {row['reason']} " + "|  " * 7 + "|")
            continue
        base = next(
            (r for r in record["rows"] if r["cell"] == {**cell, "method": baseline} and r["run"] == row["run"]), None
        )
        parts = [cell["method"] if cell["method"] == row["method"] else f"{cell['method']} ({row['method']})"]
        parts.append(row["layout"])
        for kind in ("forward", "both"):
            low, median, high = row[f"{kind}_s"]
            parts += [f"{median:.3f} ({low:.3f}–{high:.3f})", _ratio(row, base, kind)]
        for kind in ("forward", "both"):
            sent = row[f"{kind}_formula_bytes"]
            parts.append(f"{statistics.mean(sent) / 1e6:.2f} / {max(sent) / 1e6:.2f}")
        parts.append(_counted(row, "both"))
        lines.append("| " + " | ".join(parts) + " |")
    return "\n".join(lines) + "\n"
