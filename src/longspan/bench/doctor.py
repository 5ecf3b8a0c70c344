"""``longspan doctor``: what is on this machine, exact small checks of every channel, and what cannot be shown here.

Speed is not measured. A finding is "ok" (shown here and now), "failed", or "unverified" (not shown here, with the
reason): what has not been run is never called working.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from longspan.attention.kernels import KERNELS
from longspan.bench import channels
from longspan.bench.local_ranks import Check, Outcome, Ranks, run_checks
from longspan.hardware.devices import Device, devices, links, versions

MAX_RANKS = 16
_GPU_STAGED_RANKS = 2


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was checked, or could not be: ``where`` ("gloo, 2 ranks"), ``what`` and one line of reason."""

    where: str
    what: str
    status: Literal["ok", "failed", "unverified"]
    reason: str

    def __str__(self) -> str:
        return f"{self.status:<10}  {self.where + ': ' + self.what:<52}  {self.reason}"


CHANNELS: dict[str, Check] = {
    "point to point": channels.point_to_point,
    "all_gather": channels.all_gather,
    "reduce_scatter": channels.reduce_scatter,
    "all_reduce": channels.all_reduce,
    "attention": channels.split_attention,
}

Say = Callable[[Finding], None]


def doctor(ranks: int = 2, *, timeout_s: float = 60.0, say: Say | None = None) -> list[Finding]:
    """Runs all checks that this machine allows.

    Args:
        ranks: gloo ranks to start, 2 to 16.
        timeout_s: wall-clock limit of each group of ranks.
        say: told each finding when it is made.

    Raises:
        ValueError: ranks or timeout_s out of range.
    """
    if not 2 <= ranks <= MAX_RANKS:
        raise ValueError(f"doctor checks channels between 2 to {MAX_RANKS} ranks, got {ranks}; pass --ranks 2")
    cuda = [device for device in devices() if device.kind == "cuda"]
    found: list[Finding] = []

    def add(new: Sequence[Finding]) -> None:
        found.extend(new)
        for finding in new if say else ():
            assert say is not None
            say(finding)

    cpu = torch.device("cpu")
    if "gloo" in versions_available():
        add(_on_ranks(f"gloo, {ranks} ranks", Ranks(devices=(cpu,) * ranks, timeout_s=timeout_s), CHANNELS))
    else:
        add([Finding("gloo", "all channels", "unverified", "this build of torch has no gloo")])
    for name in KERNELS:
        add(_kernel(name, [cpu, *(each.device for each in cuda[:1])]))
    add(_nccl(cuda, timeout_s))
    add(_staged(cuda, timeout_s))
    elsewhere = "only ranks of this machine were started; run your job under torchrun or Slurm on two to see"
    add([Finding("several machines", "all channels", "unverified", elsewhere)])
    return found


def versions_available() -> tuple[str, ...]:
    """The process-group back ends that this build of torch has."""
    found = versions()
    return tuple(name for name in ("gloo", "nccl") if not found[name].startswith("not"))


def _on_ranks(where: str, ranks: Ranks, checks: dict[str, Check]) -> list[Finding]:
    def finding(outcome: Outcome) -> Finding:
        if outcome.status == "not reached":
            return Finding(where, outcome.name, "unverified", f"not reached: {outcome.text}")
        return Finding(where, outcome.name, outcome.status, outcome.text)

    return [finding(outcome) for outcome in run_checks(list(checks.items()), ranks)]


def _kernel(name: str, where: Sequence[torch.device]) -> list[Finding]:
    """One finding for each kind of device that the kernel takes; one that says why where it takes none."""
    found: list[Finding] = []
    reason = ""
    for device in where:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        probe = torch.empty((1, 1, 1, 16), dtype=dtype, device=device)
        refusal = KERNELS[name]().supports(probe, probe, probe, softcap=None)
        if refusal is not None:
            reason = refusal
            continue
        try:
            found.append(Finding(f"kernel on {device.type}", name, "ok", channels.kernel(name, device)))
        except (ValueError, RuntimeError) as error:  # compilers and CUDA raise RuntimeErrors
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            found.append(Finding(f"kernel on {device.type}", name, "failed", first))
    return found or [Finding("kernel", name, "unverified", reason)]


def _nccl(cuda: Sequence[Device], timeout_s: float) -> list[Finding]:
    missing = None
    if not cuda:
        missing = "no CUDA device here"
    elif "nccl" not in versions_available():
        missing = "this build of torch has no NCCL"
    if missing is not None:
        return [Finding("NCCL", "all channels", "unverified", missing)]
    ranks = Ranks(
        devices=tuple(device.device for device in cuda), backend="cpu:gloo,cuda:nccl", timeout_s=2 * timeout_s
    )
    if len(cuda) > 1:
        return _on_ranks(f"NCCL, {len(cuda)} GPUs", ranks, CHANNELS)
    alone = {name: check for name, check in CHANNELS.items() if name != "point to point"}
    across = "one CUDA device here, and NCCL refuses two ranks on one"
    return [
        *_on_ranks("NCCL, 1 GPU", ranks, alone),
        Finding("NCCL", "point to point across GPUs", "unverified", across),
    ]


def _staged(cuda: Sequence[Device], timeout_s: float) -> list[Finding]:
    where = "gloo through pinned memory"
    if not cuda:
        return [Finding(where, "CUDA tensors", "unverified", "no CUDA device here")]
    if "gloo" not in versions_available():
        return [Finding(where, "CUDA tensors", "unverified", "this build of torch has no gloo")]
    # gloo itself cannot read CUDA memory; what takes the detour is the exchange of attention and of unshard.
    checks = {name: CHANNELS[name] for name in ("point to point", "attention")}
    ranks = Ranks(devices=(cuda[0].device,) * _GPU_STAGED_RANKS, timeout_s=2 * timeout_s)
    return _on_ranks(f"{where}, {_GPU_STAGED_RANKS} ranks on one GPU", ranks, checks)


def inventory() -> list[tuple[str, str]]:
    """What is here, as (name, value) lines: versions, devices with their back ends, kernels, links."""
    lines = list(versions().items())
    for device in devices():
        label = "cpu" if device.kind == "cpu" else f"cuda:{device.index}"
        lines.append((label, f"{device}; back ends: {', '.join(device.backends) or 'none'}"))
    return lines + [("link", str(link)) for link in links()]


def exit_code(findings: Sequence[Finding]) -> int:
    """1 where a check failed, else 0: what is unverified is no failure."""
    return int(any(finding.status == "failed" for finding in findings))


def summary(findings: Sequence[Finding]) -> str:
    """One line: how many of each, and which failed first."""
    num = {status: sum(f.status == status for f in findings) for status in ("ok", "failed", "unverified")}
    line = ", ".join(f"{count} {status}" for status, count in num.items())
    failed = next((finding for finding in findings if finding.status == "failed"), None)
    return line if failed is None else f"{line}; first failure: {failed.where}, {failed.what}: {failed.reason}"


def render(findings: Sequence[Finding], facts: Sequence[tuple[str, str]] | None = None) -> str:
    """The whole report as text; ``facts`` are those of ``inventory``."""
    facts = inventory() if facts is None else facts
    lines = [*_facts(facts), "", *(str(finding) for finding in findings), "", summary(findings)]
    return "\n".join(lines) + "\n"


def _facts(facts: Sequence[tuple[str, str]]) -> list[str]:
    width = max((len(name) for name, _ in facts), default=0)
    return [f"{name:<{width}}  {value}" for name, value in facts]


def run_doctor(ranks: int = 2, *, timeout_s: float = 60.0) -> int:
    """Prints the inventory, then each finding as it is made, then a summary. Returns the exit code."""
    show = partial(print, flush=True)
    show("\n".join(_facts(inventory())) + "\n")
    findings = doctor(ranks, timeout_s=timeout_s, say=show)
    show(f"\n{summary(findings)}")
    return exit_code(findings)
