"""Small tensors between host and device, without the host waiting for the work that the device has."""

from __future__ import annotations

import torch
from torch import Tensor


class Reading:
    """Numbers on their way to the host, which may give the device more work before it waits for them."""

    def __init__(self, values: Tensor) -> None:
        self._arrived = None
        self._values = values.to("cpu", non_blocking=True)  # into pinned memory
        if values.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(values.device))

    def wait(self) -> list[float]:
        """The numbers, once they are there; what the device was given after them may still run."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values.tolist()


def upload(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device; a CPU's own is itself."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
