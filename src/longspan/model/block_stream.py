"""Layer streaming: blocks' parameters live in pinned host memory and visit the device one block ahead of use.

As in ZeRO-Infinity (Rajbhandari et al. 2021, arXiv:2104.07857) and L2L (Pudipeddi et al. 2020, arXiv:2002.05645), on
one rank. A block's parameters lie in one host buffer, so that an upload is one copy. `BlockStream` brings blocks and
takes them back, with no autograd; `model.layer_stream` does it by hooks in training, and brings gradients home.

Cost a step, with P bytes of block parameters as the host has them: P go up in the forward and, but for the blocks still
there, again in the backward; the gradients of the trainable ones go down. The device holds `num_buffers` blocks in
place of all; where it computes in another dtype, one more as the host has it, which is cast there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from longspan.model.offload import Lane, Pinned

_ALIGN = 256  # bytes


@dataclass(frozen=True, slots=True)
class _Place:
    """Where one parameter lies in the buffers of its parcel: from `host` on the host, from `device` on the device."""

    parameter: nn.Parameter
    shape: torch.Size
    host: int
    host_dtype: torch.dtype
    device: int
    device_dtype: torch.dtype

    def on_host(self, flat: Tensor) -> Tensor:
        return _view(flat, self.host, self.host_dtype, self.shape)

    def on_device(self, flat: Tensor) -> Tensor:
        return _view(flat, self.device, self.device_dtype, self.shape)


def _view(flat: Tensor, start: int, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    return flat[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)


class Parcel:
    """Parameters that move together: one buffer on the host, of which they are views while they are at home."""

    def __init__(self, parameters: Sequence[nn.Parameter], device: torch.device, dtype: torch.dtype | None) -> None:
        self.places: list[_Place] = []
        self.host_bytes = self.device_bytes = 0
        for parameter in parameters:
            own = parameter.dtype
            there = dtype if dtype is not None and parameter.is_floating_point() else own
            self.places.append(_Place(parameter, parameter.shape, self.host_bytes, own, self.device_bytes, there))
            self.host_bytes += aligned(parameter.numel() * own.itemsize)
            self.device_bytes += aligned(parameter.numel() * there.itemsize)
        self.casts = any(place.host_dtype != place.device_dtype for place in self.places)
        self.host = Pinned(self.host_bytes, device)
        self._grads: dict[nn.Parameter, Tensor | None] = {}
        for place in self.places:
            with torch.no_grad():
                place.on_host(self.host.bytes).copy_(place.parameter)
        self.go_home()

    def go_home(self) -> None:
        """Parameters are the host's, with the gradients that they had there."""
        for place in self.places:
            place.parameter.data = place.on_host(self.host.bytes)
            if place.parameter in self._grads:
                place.parameter.grad = self._grads[place.parameter]
        self._grads.clear()

    def go_to(self, flat: Tensor) -> None:
        """Parameters are the device's, without gradients: those on the host are kept aside."""
        for place in self.places:
            self._grads[place.parameter], place.parameter.grad = place.parameter.grad, None
            place.parameter.data = place.on_device(flat)

    def upload(
        self, lane: Lane, flat: Tensor, staging: Tensor | None, after: tuple[torch.cuda.Event | None, ...] = ()
    ) -> torch.cuda.Event | None:
        """Starts the copy into `flat` on the device; by way of `staging` there, where it is cast."""
        if not self.casts:
            return lane.copy((flat[: self.host_bytes], self.host.bytes), after=after)
        assert staging is not None
        raw = staging[: self.host_bytes]
        casts = [(place.on_device(flat), place.on_host(raw)) for place in self.places]
        return lane.copy((raw, self.host.bytes), *casts, after=after)

    def grad(self, parameter: nn.Parameter) -> Tensor | None:
        """The gradient on the host of a parameter that is away."""
        return self._grads[parameter]

    def set_grad(self, parameter: nn.Parameter, grad: Tensor) -> None:
        self._grads[parameter] = grad


def aligned(num_bytes: int) -> int:
    """The bytes up to where the next tensor of a buffer begins."""
    return -(-num_bytes // _ALIGN) * _ALIGN


class _Slot:
    """A device buffer: which block is in it, since when, and until when a copy out of it is under way."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.flat = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        self.index: int | None = None
        self.ready: torch.cuda.Event | None = None
        self.leaving: torch.cuda.Event | None = None


class BlockStream:
    """Blocks whose parameters live on the host, brought to the device one after the other.

    `for block in stream.forward(): ...` has each block on the device within the loop's body, the next under way.
    Between bodies its parameters are the host's.

    Args:
        blocks: modules that share no parameter. Their buffers move to the device and stay there.
        device: where they compute.
        num_buffers: blocks on the device at a time, that at work included.
        dtype: of floating-point parameters on the device; None for their own.

    Raises:
        ValueError: fewer than two buffers, no blocks, or parameters that are shared or have no memory.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        device: torch.device | str,
        num_buffers: int = 2,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        if num_buffers < 2 or not blocks:
            raise ValueError(
                f"a stream needs blocks and two buffers or more, got {len(blocks)} blocks and {num_buffers} buffers"
            )
        self.blocks, self.device = list(blocks), torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        check_parameters(self.blocks)
        self.up, self.down = Lane(self.device), Lane(self.device)
        self.parcels = [Parcel(list(block.parameters()), self.device, dtype) for block in self.blocks]
        for block in self.blocks:
            move_buffers(block, self.device)
        self._slots: list[_Slot] = []
        self._num_buffers = min(num_buffers, len(self.blocks))
        self._staging: Tensor | None = None
        # Most recently used last.
        self._used: list[_Slot] = []
        self._here: set[int] = set()
        self._landed: dict[int, torch.cuda.Event | None] = {}

    def forward(self, *, write_back: bool = False) -> Iterator[nn.Module]:
        """Each block in turn, on the device, as the host has it now.

        Args:
            write_back: what the body changes in the block's parameters, in place, goes to the host.

        Raises:
            ValueError: write_back where the device computes in another dtype.
        """
        return self._walk(range(len(self.blocks)), write_back)

    def backward(self, *, write_back: bool = False) -> Iterator[nn.Module]:
        """As `forward`, from the last block to the first."""
        return self._walk(range(len(self.blocks) - 1, -1, -1), write_back)

    def _walk(self, order: range, write_back: bool) -> Iterator[nn.Module]:
        if write_back and any(parcel.casts for parcel in self.parcels):
            raise ValueError("write_back needs blocks in their own dtype on the device, got a cast; leave out dtype")
        self.forget()
        for at, index in enumerate(order):
            self.bring(index)
            for later in order[at + 1 : at + self._num_buffers]:
                self.fetch(later)
            try:
                yield self.blocks[index]
            finally:
                self.take_back(index, write_back=write_back)
        self.settle()

    def fetch(self, index: int) -> None:
        """Starts a block's upload, unless it is there or no buffer is free."""
        if any(slot.index == index for slot in self._slots):
            return
        slot = self._free_slot()
        if slot is None:
            return
        slot.index = index
        self._touch(slot)
        parcel = self.parcels[index]
        if parcel.casts and self._staging is None:
            size = max(parcel.host_bytes for parcel in self.parcels if parcel.casts)
            self._staging = torch.empty(size, dtype=torch.uint8, device=self.device)
        slot.ready = parcel.upload(self.up, slot.flat, self._staging, (slot.leaving, self._landed.get(index)))
        slot.leaving = None

    def bring(self, index: int) -> None:
        """The block's parameters are the device's from here on, for the current stream."""
        self.fetch(index)
        slot = next((slot for slot in self._slots if slot.index == index), None)
        if slot is None:
            raise RuntimeError(f"{self._num_buffers} blocks are on the device already: take one back first")
        self._touch(slot)
        self.up.wait(slot.ready)
        if index not in self._here:
            self._here.add(index)
            self.parcels[index].go_to(slot.flat)

    def take_back(self, index: int, *, write_back: bool = False) -> None:
        """The block's parameters are the host's again; its values stay in the buffer until that is needed."""
        if index not in self._here:
            return
        self._here.remove(index)
        parcel = self.parcels[index]
        if write_back:
            slot = next(slot for slot in self._slots if slot.index == index)
            slot.leaving = self.down.copy((parcel.host.bytes, slot.flat[: parcel.host_bytes]))
            self._landed[index] = slot.leaving
        parcel.go_home()

    def settle(self) -> None:
        """Waits until all that was written back is on the host."""
        for event in self._landed.values():
            if event is not None:
                event.synchronize()
        self._landed.clear()

    def forget(self) -> None:
        """Takes all blocks back and forgets what the buffers hold: the host's values may change."""
        for index in list(self._here):
            self.take_back(index)
        for slot in self._slots:
            slot.index = None

    def forget_one(self, index: int) -> None:
        """As `forget`, for one block."""
        self.take_back(index)
        for slot in self._slots:
            if slot.index == index:
                slot.index = None

    def flat_of(self, index: int) -> Tensor | None:
        """The buffer that holds a block at work, None for another block."""
        return next((slot.flat for slot in self._slots if slot.index == index and index in self._here), None)

    def _free_slot(self) -> _Slot | None:
        """A buffer that holds nothing, or, of those whose block is not at work, the one used longest ago."""
        empty = next((slot for slot in self._slots if slot.index is None), None)
        if empty is not None:
            return empty
        if len(self._slots) < self._num_buffers:
            size = max(parcel.device_bytes for parcel in self.parcels)
            self._slots.append(_Slot(size, self.device))
            return self._slots[-1]
        return next((slot for slot in self._used if slot.index not in self._here), None)

    def _touch(self, slot: _Slot) -> None:
        if slot in self._used:
            self._used.remove(slot)
        self._used.append(slot)


def check_parameters(modules: Sequence[nn.Module]) -> None:
    """Refuses parameters that two modules share, or that have no memory. Raises ValueError."""
    owner: dict[nn.Parameter, int] = {}
    for index, module in enumerate(modules):
        for name, parameter in module.named_parameters():
            if owner.setdefault(parameter, index) != index:
                raise ValueError(
                    f"streamed blocks may not share parameters, got {name} in {owner[parameter]} and {index}"
                )
            if parameter.is_meta or type(parameter.data) is not Tensor:
                raise ValueError(
                    f"streamed blocks need plain parameters with memory, got {type(parameter.data).__name__} on "
                    f"{parameter.device} for {name}; fill the model on the host and do not shard it"
                )


def move_buffers(module: nn.Module, device: torch.device) -> None:
    """Buffers, small by comparison, stay on the device."""
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = buffer.to(device)
