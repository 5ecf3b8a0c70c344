"""The doctor on a machine without a GPU, on one whose channels fail, and the yardstick it measures by."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from longspan.attention import masks
from longspan.attention.kernels import KERNELS
from longspan.attention.kernels.reference import Reference
from longspan.bench import channels
from longspan.bench import doctor as module
from longspan.bench.doctor import Finding, doctor, exit_code, inventory, render, run_doctor, summary
from longspan.bench.exact import excess, formula, make_inputs
from longspan.bench.local_ranks import Check, Outcome, Ranks
from longspan.hardware.devices import Device
from tests.oracles.attention import dense_attention

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU cannot show")


def _broken(group: dist.ProcessGroup, device: torch.device) -> str:
    raise ValueError("a byte is wrong")


@no_gpu
def test_what_is_shown_and_what_is_not() -> None:
    told: list[Finding] = []
    found = doctor(2, say=told.append)
    assert told == found
    status = {(finding.where, finding.what): finding.status for finding in found}
    assert {what for (where, what), s in status.items() if where == "gloo, 2 ranks" and s == "ok"} == {
        "ranks meet", "point to point", "all_gather", "reduce_scatter", "all_reduce", "attention",
    }  # fmt: skip
    assert status["kernel on cpu", "reference"] == status["kernel on cpu", "cpu_flash"] == "ok"
    unverified = {where for (where, _), s in status.items() if s == "unverified"}
    assert {"kernel", "NCCL", "gloo through pinned memory", "several machines"} == unverified
    assert exit_code(found) == 0
    text = render(found)
    assert all(len(line.splitlines()) == 1 and str(finding) in text for finding in found for line in [finding.reason])
    assert torch.__version__ in text and summary(found) == text.splitlines()[-1]


@no_gpu
def test_a_failure_is_told_and_is_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "CHANNELS", {"broken": _broken, "all_reduce": channels.all_reduce})
    assert run_doctor(2) == 1
    said = capsys.readouterr().out
    assert "failed      gloo, 2 ranks: broken" in said and "rank 0: a byte is wrong" in said
    assert "not reached: 'broken' failed" in said and "1 failed" in said.splitlines()[-1]


def test_a_wrong_kernel_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(Reference):
        def backward(self, *args, **kwargs):
            dq, dk, dv = super().backward(*args, **kwargs)
            return dq, dk, dv * 1.001

    monkeypatch.setitem(KERNELS, "reference", Wrong)
    (finding,) = module._kernel("reference", [torch.device("cpu")])
    assert finding.status == "failed" and "in torch.float64" in finding.reason


def test_numbers_of_ranks() -> None:
    for ranks in (1, 17):
        with pytest.raises(ValueError, match=f"between 2 to 16 ranks, got {ranks}"):
            doctor(ranks)


def test_inventory_names_devices_and_versions() -> None:
    facts = inventory()
    assert {"python", "torch", "gloo", "nccl", "cpu", "link"} <= {name for name, _ in facts}


@pytest.mark.parametrize("mask", [masks.documents([5, 6]), masks.sliding_window(11, 2, 1)])
def test_the_formula_is_the_oracles(mask: masks.Mask) -> None:
    inputs = make_inputs(11, h=4, g=2, d=3, dtype=torch.float64)
    oracle = dense_attention(*inputs, mask.dense().numpy())
    for mine, theirs in zip(formula(inputs, mask.dense()), (oracle.out, *oracle[3:]), strict=True):
        torch.testing.assert_close(mine, torch.from_numpy(theirs), rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_yardstick_bites(dtype: torch.dtype) -> None:
    mask = masks.causal(101)
    inputs = make_inputs(101, dtype=dtype)
    plain, exact = formula(inputs, mask.dense()), formula(inputs.to(torch.float64), mask.dense())
    assert excess(plain, exact, plain) <= 0.5
    assert excess([x.to(dtype) for x in exact], exact, plain) <= 1
    assert excess([torch.zeros_like(x) for x in exact], exact, plain) > 10
    assert excess([*exact[:3], exact.dk], exact, plain) > 10
    assert excess(formula(inputs, masks.full(101).dense()), exact, plain) > 10
    assert excess([exact[0] * torch.nan, *exact[1:]], exact, plain) == float("inf")
    with pytest.raises(ValueError, match="must have the shape"):
        excess([x[:, :-1] for x in exact], exact, plain)


@pytest.mark.parametrize("num_cards", [1, 2])
def test_what_is_started_where_there_are_gpus(num_cards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[Ranks, list[str]]] = []

    def pretend(checks: list[tuple[str, Check]], ranks: Ranks) -> list[Outcome]:
        started.append((ranks, [name for name, _ in checks]))
        return [Outcome(name, "ok", "") for name, _ in checks]

    monkeypatch.setattr(module, "run_checks", pretend)
    monkeypatch.setattr(module, "versions_available", lambda: ("gloo", "nccl"))
    cards = [Device(kind="cuda", index=i, name="Card", memory_bytes=1) for i in range(num_cards)]
    found = module._nccl(cards, 5.0) + module._staged(cards, 5.0)
    (nccl, nccl_checks), (staged, staged_checks) = started
    assert nccl.backend == "cpu:gloo,cuda:nccl" and nccl.devices == tuple(card.device for card in cards)
    assert ("point to point" in nccl_checks) == (num_cards > 1) and "attention" in nccl_checks
    assert staged.backend == "gloo" and staged.devices == (torch.device("cuda:0"),) * 2
    assert staged_checks == ["point to point", "attention"]
    unverified = [finding.reason for finding in found if finding.status == "unverified"]
    assert len(unverified) == (num_cards == 1) and all("refuses two ranks on one" in reason for reason in unverified)


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_on_a_gpu() -> None:
    found = doctor(2, timeout_s=120)
    assert not [str(finding) for finding in found if finding.status == "failed"]
    shown = {(finding.where, finding.what) for finding in found if finding.status == "ok"}
    assert {("kernel on cuda", "flex"), ("gloo through pinned memory, 2 ranks on one GPU", "attention")} <= shown
    assert any(where.startswith("NCCL, ") and what == "attention" for where, what in shown)
