"""The choice of a kernel: by name, by device, and what is refused."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from longspan.attention import kernels
from longspan.attention.kernels import KERNELS, pick

Q = torch.zeros(1, 3, 2, 16)


def test_names_are_the_kernels_own() -> None:
    assert {name: make().name for name, make in KERNELS.items()} == {name: name for name in KERNELS}
    assert pick(Q, softcap=None, name="reference").name == "reference"


def test_auto_on_cpu_says_once_what_it_chose_and_why(caplog: pytest.LogCaptureFixture) -> None:
    kernels._say_once.cache_clear()
    with caplog.at_level(logging.INFO):
        assert pick(Q, softcap=None).name == pick(Q.double(), softcap=None).name == "cpu_flash"
    assert len(caplog.records) == 1
    assert "cpu_flash" in caplog.text and "not cudnn (it takes CUDA tensors, not cpu)" in caplog.text
    caplog.clear()
    assert pick(Q, softcap=30.0).name == "reference"  # slow, and memory for whole score matrices: said aloud
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What the choice looks at of queries on an H100."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    return SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, shape=(1, 8, 2, 64))


@pytest.fixture
def torch_switch() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("torch_switch")
def test_cudnn_is_not_taken_where_torch_must_be_deterministic(hopper, caplog: pytest.LogCaptureFixture) -> None:
    kernels._say_once.cache_clear()
    assert pick(hopper, softcap=None).name == "cudnn"
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert pick(hopper, softcap=None).name == "cudnn", "torch too only warns"
    torch.use_deterministic_algorithms(True)
    with caplog.at_level(logging.INFO):
        assert pick(hopper, softcap=None).name == "cuda_flash"
    assert "not cudnn (its backward is not deterministic" in caplog.text
    with pytest.raises(ValueError, match=r"^kernel 'cudnn' cannot be used here: its backward is not det.*take 'auto'$"):
        pick(hopper, softcap=None, name="cudnn")


def test_refusals_are_one_line() -> None:
    k = torch.zeros(1, 3, 3, 16)
    options = {"scale": 1.0, "softcap": None}
    for make, rule in (
        (lambda: pick(Q, softcap=None, name="fa9"), "unknown attention kernel 'fa9'; known are auto, cudnn"),
        (lambda: pick(Q, softcap=None, name="flex"), "no backward on cpu"),
        (lambda: pick(Q, softcap=2.0, name="cpu_flash"), "no softcap"),
        (lambda: KERNELS["cpu_flash"]().forward(Q, Q, Q, (), scale=1.0, softcap=2.0), "no softcap"),
        (lambda: KERNELS["cudnn"]().forward(Q, Q, Q, (), **options), "takes CUDA tensors, not cpu"),
        (lambda: KERNELS["reference"]().forward(Q, k, k, (), **options), "multiple of KV heads"),
        (lambda: KERNELS["reference"]().forward(Q, Q[..., :8], Q[..., :8], (), **options), "attention takes q"),
        (lambda: KERNELS["reference"]().forward(Q, Q.half(), Q, (), **options), "one dtype"),
    ):
        with pytest.raises(ValueError, match=rule) as error:
            make()
        assert "\n" not in str(error.value)
