"""Kept activations in host memory: what recomputation keeps of a block leaves the device until its backward.

After ALST (Bekman et al. 2025, arXiv:2506.13996, section 3.3), which moves checkpointed block inputs to the host. Here
what "attention" recomputation keeps (attention's output and log-sum-exp) moves too, both directions run on a stream of
their own, and no computation waits for a copy that has had a whole block's time. Results are those without, bit by bit.

Cost, with g = bytes a block keeps under its recomputation and n blocks: (n - 2)·g go out in the forward and come back
in the backward; the host holds (n - 2)·g, the device 2·g in place of n·g. The last two blocks keep theirs, which would
come back at once. Parameters and tensors under `min_bytes` never move.

`Lane` and `Pinned` are what layer streaming (`model.block_stream`) copies with. On a CPU, "device" and "host" are both
its memory: copies are still made, at once.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

NUM_ON_DEVICE = 2  # blocks whose tensors are on the device at a time: the one at work, and the next or the last


def _cudart() -> Any:
    return torch.cuda.cudart()


class Pinned:
    """Uninitialised host memory that `device` can copy from and to while it computes; plain memory for a CPU.

    Not by torch's own pinned allocator, which rounds up to a power of two: 5 GiB would take 8. Views of `bytes` may
    outlive this, but are then pinned no more.

    Raises:
        MemoryError: the system has no more memory to pin.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._device, self._is_pinned = device, False
        # A default device that somebody has set must not decide where the host is.
        self.bytes = torch.empty(num_bytes, dtype=torch.uint8, device="cpu")
        if device.type == "cuda" and num_bytes:
            code = int(_cudart().cudaHostRegister(self.bytes.data_ptr(), num_bytes, 0))
            if code:
                raise MemoryError(
                    f"the host must have room to pin {num_bytes} bytes, got CUDA error {code}; move less to the host"
                )
            self._is_pinned = True

    def __del__(self) -> None:
        if self._is_pinned and not sys.is_finalizing():
            # A copy may be under way. Buffers are used again, so that this is rare: nobody minds the wait.
            torch.cuda.synchronize(self._device)
            _cudart().cudaHostUnregister(self.bytes.data_ptr())


class Lane:
    """A stream for copies beside the computation. On a CPU every copy is over when it has been asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(
        self, *pairs: tuple[Tensor, Tensor], after: tuple[torch.cuda.Event | None, ...] = ()
    ) -> torch.cuda.Event | None:
        """Copies (to, source) pairs once the current stream has done all it was given so far, and `after` are over.

        The caller keeps both tensors until a stream that owns their memory has waited for the event returned.
        """
        with torch.no_grad():
            if self.stream is None:
                for to, source in pairs:
                    to.copy_(source)
                return None
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                for event in after:
                    if event is not None:
                        self.stream.wait_event(event)
                for to, source in pairs:
                    to.copy_(source, non_blocking=True)
                done = torch.cuda.Event()
                done.record(self.stream)
        return done

    def wait(self, event: torch.cuda.Event | None) -> None:
        """The current stream goes on after `event`; the host does not wait."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def abandon(self, tensor: Tensor, event: torch.cuda.Event | None) -> None:
        """For a tensor that is let go while a copy of it may be under way: its memory is not used again before."""
        if self.stream is not None and event is not None:
            tensor.record_stream(self.stream)


class HostPool:
    """Pinned buffers that are used again, within a step and over steps. It never holds more than was in use at once.

    Args:
        limit_bytes: most bytes in use at a time; None for no limit.
    """

    def __init__(self, device: torch.device, limit_bytes: int | None = None) -> None:
        self.device, self.limit_bytes = device, limit_bytes
        self.used_bytes, self.num_made = 0, 0
        self._free: list[Pinned] = []

    @property
    def free_bytes(self) -> int:
        """Bytes of the buffers that wait to be used again."""
        return sum(buffer.bytes.numel() for buffer in self._free)

    def take(self, num_bytes: int) -> Pinned | None:
        """A buffer of so many bytes or more; None where the limit would be passed."""
        fitting = [buffer for buffer in self._free if buffer.bytes.numel() >= num_bytes]
        buffer = min(fitting, key=lambda one: one.bytes.numel(), default=None)
        size = num_bytes if buffer is None else buffer.bytes.numel()
        if self.limit_bytes is not None and self.used_bytes + size > self.limit_bytes:
            return None
        if buffer is None:
            self._free.clear()  # of an earlier, shorter sequence: all too small
            buffer = Pinned(num_bytes, self.device)
            self.num_made += 1
        else:
            self._free.remove(buffer)
        self.used_bytes += size
        return buffer

    def give(self, buffer: Pinned) -> None:
        """Takes a buffer back. Copies out of it may be under way: the next one into it follows on the same lane."""
        self.used_bytes -= buffer.bytes.numel()
        self._free.append(buffer)


class Moved:
    """One tensor on its way to the host and back. `device` is it, or its copy, while one is on the device."""

    __slots__ = ("__weakref__", "_buffer", "_done", "_host", "_lane", "_pool", "device")

    def __init__(self, tensor: Tensor, buffer: Pinned, lane: Lane, pool: HostPool) -> None:
        self.device: Tensor | None = tensor.detach()
        self._buffer, self._lane, self._pool, self._done = buffer, lane, pool, None
        # Strides as a new tensor would have them: equal for all that lies densely, and no gaps of a view are copied.
        strides = torch.empty_like(tensor, device="meta").stride()
        flat = buffer.bytes[: tensor.numel() * tensor.element_size()].view(tensor.dtype)
        self._host = flat.as_strided(tensor.shape, strides)
        self._done = lane.copy((self._host, self.device))

    def leave(self) -> None:
        """The device's memory is free for what comes after the copy."""
        if self.device is not None:
            self._lane.wait(self._done)
            self.device = self._done = None

    def come(self) -> None:
        """Starts the way back, unless the tensor is there or under way."""
        if self.device is None:
            self.device = torch.empty_strided(
                self._host.shape, self._host.stride(), dtype=self._host.dtype, device=self._lane.device
            )
            self._done = self._lane.copy((self.device, self._host))

    def get(self) -> Tensor:
        """The tensor, for the current stream; from here on only the caller keeps it on the device."""
        self.come()
        assert self.device is not None
        self._lane.wait(self._done)
        found, self.device, self._done = self.device, None, None
        return found

    def __del__(self) -> None:
        if self.device is not None:
            self._lane.abandon(self.device, self._done)
        self._pool.give(self._buffer)


class Group:
    """What one run of one block keeps. Its hooks go around the block's checkpoint, which saves the block's inputs."""

    def __init__(self, owner: ActivationOffload, before: Group | None, stays: bool) -> None:
        self._owner, self._stays, self._asked = owner, stays, False
        self._before = None if before is None else weakref.ref(before)
        # Weak: a graph that is dropped gives its buffers back.
        self._moved: list[weakref.ref[Moved]] = []

    def hooks(self) -> AbstractContextManager[Any]:
        """Within it, autograd keeps what `keep` makes of the tensors that it saves."""
        return torch.autograd.graph.saved_tensors_hooks(self.keep, self.get)

    def keep(self, tensor: Tensor) -> tuple[Group, Tensor | Moved]:
        """What to hold in place of a tensor; itself where it is too small, a parameter, or there is no room."""
        moved = None if self._stays else self._owner.move(tensor)
        if moved is not None:
            self._moved.append(weakref.ref(moved))
        # The group itself goes along: it lives as long as anything that it keeps.
        return self, tensor if moved is None else moved

    def get(self, kept: tuple[Group, Tensor | Moved]) -> Tensor:
        """The tensor again. The block before, whose turn is next, begins to come back meanwhile."""
        if not self._asked:
            self._asked = True
            self._each(Moved.come)
            before = None if self._before is None else self._before()
            if before is not None:
                before._each(Moved.come)
        return kept[1].get() if isinstance(kept[1], Moved) else kept[1]

    def leave(self) -> None:
        self._each(Moved.leave)

    def _each(self, do: Callable[[Moved], None]) -> None:
        for ref in self._moved:
            if (moved := ref()) is not None:
                do(moved)


class ActivationOffload:
    """Moves what blocks keep; handed to `model.recompute.apply_recompute`, which puts it to work.

    Args:
        min_bytes: smaller tensors stay where they are.
        limit_bytes: most host memory that is used; blocks that find no room keep their tensors on the device, which
            are then the last ones, whose turn comes first in the backward. None for no limit.

    Raises:
        ValueError: a number below 0.
    """

    def __init__(self, *, min_bytes: int = 2**20, limit_bytes: int | None = None) -> None:
        if min_bytes < 0 or (limit_bytes is not None and limit_bytes < 0):
            raise ValueError(f"min_bytes and limit_bytes must be 0 or more, got {min_bytes} and {limit_bytes}")
        self.min_bytes, self.limit_bytes = min_bytes, limit_bytes
        self.pool: HostPool | None = None
        self._lane: Lane | None = None
        self._last: weakref.ref[Group] | None = None

    def begin(self, *, stays: bool) -> Group:
        """The group of a block that is about to run. `stays`: its tensors are kept on the device."""
        group = Group(self, None if self._last is None else self._last(), stays)
        self._last = weakref.ref(group)
        return group

    def end(self, group: Group) -> None:
        """The block has run: what the block before it kept leaves the device. A copy has a block's time."""
        before = None if group._before is None else group._before()
        if before is not None:
            before.leave()

    def move(self, tensor: Tensor) -> Moved | None:
        """A tensor on its way to the host, or None where it stays."""
        num_bytes = prod(tensor.shape) * tensor.element_size()
        if num_bytes < self.min_bytes or type(tensor) is not Tensor or isinstance(tensor._base, nn.Parameter):
            return None
        if self._lane is None or self.pool is None:
            self._lane, self.pool = Lane(tensor.device), HostPool(tensor.device, self.limit_bytes)
        if tensor.device != self._lane.device:
            return None
        buffer = self.pool.take(num_bytes)
        return None if buffer is None else Moved(tensor, buffer, self._lane, self.pool)

    def __deepcopy__(self, memo: dict[int, Any]) -> ActivationOffload:
        return self  # a copy of a model may share it: groups know their own run
