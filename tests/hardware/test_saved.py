"""Profiles of one's own devices: where they are kept, and that they come back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from longspan.hardware import saved
from longspan.hardware.profile import make_profile
from longspan.hardware.saved import profile_path, save_profile, saved_profile

CPU = torch.device("cpu")


def test_a_saved_profile_is_found_again(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert saved_profile(CPU) is None
    mine = make_profile("a100")
    save_profile(mine, profile_path(CPU))
    assert saved_profile(CPU) == mine
    assert [path.suffix for path in profile_path(CPU).parent.iterdir()] == [".json"]
    profile_path(CPU).write_text("{}")
    with pytest.raises(ValueError, match="no device profile can be read from"):
        saved_profile(CPU)


@pytest.mark.parametrize("given", [None, "", "relative/folder"])
def test_without_an_absolute_folder_it_is_the_users(given, monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    if given is None:
        monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    else:
        monkeypatch.setenv("XDG_CONFIG_HOME", given)
    assert profile_path(CPU).parent == Path("/somewhere/.config/longspan/profiles")


def test_a_cpu_is_known_by_its_threads_and_a_gpu_by_its_name(monkeypatch) -> None:
    monkeypatch.setattr(saved, "device_name", lambda device: "ACME (R) Fast/9")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert profile_path(CPU).name == "acme-r-fast-9-3-threads.json"
    assert profile_path(torch.device("cuda", 0)).name == "acme-r-fast-9.json"
