"""Profiles measured on a user's own devices, one JSON file per device, where ``method="auto"`` finds them.

``longspan bench kernels --save-profile`` writes them. A GPU is known by its name; the CPU by its name and by the number
of threads that torch uses in this process, since these are what its profile describes.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

from longspan.hardware.devices import device_name
from longspan.hardware.profile import DeviceProfile, make_profile


def profile_name(device: torch.device) -> str:
    """What a device is called in profiles of it."""
    name = device_name(device)
    return name if device.type == "cuda" else f"{name}, {torch.get_num_threads()} threads"


def profile_path(device: torch.device) -> Path:
    """Where the profile of a device is kept: ``longspan/profiles`` in $XDG_CONFIG_HOME, by default in ~/.config."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    # The standard says that a relative path there is to be ignored.
    folder = Path(base) if Path(base).is_absolute() else Path.home() / ".config"
    name = re.sub(r"[^a-z0-9]+", "-", profile_name(device).lower()).strip("-")
    return folder / "longspan" / "profiles" / f"{name}.json"


def save_profile(profile: DeviceProfile, path: Path) -> None:
    """Writes a profile, whole or not at all; folders are made. Raises OSError where that cannot be done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(profile.to_json() + "\n")
    os.replace(temporary, path)


def saved_profile(device: torch.device) -> DeviceProfile | None:
    """The profile kept for a device, or None. Raises ValueError where the file holds no profile."""
    path = profile_path(device)
    return make_profile(path) if path.exists() else None
