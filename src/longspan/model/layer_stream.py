"""Training with parameters, gradients and optimiser state on the host: blocks visit the device, by hooks on the model.

Forward: each block comes as it is called, the next under way. Backward: in reverse; a gradient leaves as soon as
autograd has it. Parameters outside the blocks (embedding, last norm, head) come with the first call and stay until
`flush`. Frozen parameters come and never go. Gradients of several backwards add up, in the host's dtype.

What autograd saves of a block's parameters is kept as a place in its buffer, so that a backward reads the block that
has come again, whether or not activations are recomputed.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longspan.model.block_stream import BlockStream, Parcel, aligned, check_parameters, move_buffers
from longspan.model.offload import Pinned


class _Saved(NamedTuple):
    """A tensor in a block's buffer that autograd wants to keep."""

    block: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


class LayerStream:
    """Made by `stream_layers`; keep it, and call `flush` before reading or changing parameters and gradients.

    Attributes:
        blocks: the lower layer, for what runs without autograd.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device | str,
        num_buffers: int,
        dtype: torch.dtype | None,
        after_block: Callable[[int], None] | None,
    ) -> None:
        found = getattr(model, "blocks", None)
        if not found:
            raise ValueError(
                f"streaming needs a model with blocks, got {type(model).__name__}; pass the decoder itself"
            )
        blocks: list[nn.Module] = list(found)
        inside = {module for block in blocks for module in block.modules()}
        outside = [module for module in model.modules() if module not in inside]
        owned = [p for module in outside for p in module.parameters(recurse=False)]
        check_parameters([nn.ParameterList(dict.fromkeys(owned)), *blocks])
        self.blocks = BlockStream(blocks, device, num_buffers, dtype=dtype)
        self.device, self._ahead = self.blocks.device, num_buffers - 1
        self._outer = Parcel(list(dict.fromkeys(owned)), self.device, dtype)
        self._outer_flat: Tensor | None = None
        self._outer_here = False
        move_buffers(model, self.device)

        self._host_grads: dict[nn.Parameter, Tensor] = {}
        self._pins: list[Pinned] = []
        # Gradients on their way home, of the block at work and of the one before: (tensor, event).
        self._leaving: list[list[tuple[Tensor, torch.cuda.Event | None]]] = [[], []]
        self._landed: dict[nn.Parameter, torch.cuda.Event | None] = {}
        self._working: int | None = None  # in the backward
        self._saving: list[Any] = []
        self._after_block = after_block
        self._worker = ThreadPoolExecutor(1, "longspan-optimizer") if after_block is not None else None
        self._jobs: dict[int, Future[None]] = {}
        for module in outside:
            if next(module.parameters(recurse=False), None) is not None:
                module.register_forward_pre_hook(lambda *_: self._bring_outer())
        for index, block in enumerate(blocks):
            block.register_forward_pre_hook(partial(self._before, index))
            block.register_forward_hook(partial(self._after, index), always_call=True)
        for parcel in (self._outer, *self.blocks.parcels):
            for place in parcel.places:
                if place.parameter.requires_grad:
                    place.parameter.register_post_accumulate_grad_hook(partial(self._take_gradient, parcel))
        # A checkpoint or an export holds what the host has, in its dtype.
        model.register_state_dict_pre_hook(lambda *_: self.flush())
        model.register_load_state_dict_pre_hook(lambda *_: self.flush())

    @property
    def host_bytes(self) -> int:
        """Pinned host memory: parameters, and the gradients that there have been."""
        parcels = (self._outer, *self.blocks.parcels)
        return sum(parcel.host_bytes for parcel in parcels) + sum(pin.bytes.numel() for pin in self._pins)

    def flush(self) -> None:
        """Waits until all gradients are on the host; all parameters and gradients are the host's tensors then.

        Values may be changed from here to the next call of the model. Raises what `after_block` raised.
        """
        self._end_backward()
        for index in list(self._jobs):
            self._join(index)
        if self._outer_here:
            self._outer.go_home()
            self._outer_here = False
        self.blocks.forget()
        if self.blocks.down.stream is not None:
            self.blocks.down.stream.synchronize()
        self._leaving = [[], []]
        self._landed.clear()

    def _bring_outer(self) -> None:
        if self._outer_here or not self._outer.places:
            return
        if self._outer_flat is None:
            self._outer_flat = torch.empty(self._outer.device_bytes, dtype=torch.uint8, device=self.device)
        staging = None
        if self._outer.casts:
            staging = torch.empty(self._outer.host_bytes, dtype=torch.uint8, device=self.device)
        self.blocks.up.wait(self._outer.upload(self.blocks.up, self._outer_flat, staging))
        self._outer.go_to(self._outer_flat)
        self._outer_here = True

    def _fetch(self, index: int) -> None:
        if index in self._jobs:
            self._join(index)
        self.blocks.fetch(index)

    def _before(self, index: int, _block: nn.Module, _args: Any) -> None:
        if index == self._working:
            return  # recomputed by a checkpoint around the block
        self._fetch(index)
        self.blocks.bring(index)
        for later in range(index + 1, min(index + 1 + self._ahead, len(self.blocks.blocks))):
            self._fetch(later)
        hooks = torch.autograd.graph.saved_tensors_hooks(partial(self._pack, index), self._unpack)
        hooks.__enter__()
        self._saving.append(hooks)

    def _after(self, index: int, _block: nn.Module, _args: Any, out: Any) -> None:
        if index == self._working:
            return
        if self._saving:
            self._saving.pop().__exit__(None, None, None)
        self.blocks.take_back(index)
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda _grad: self._begin_backward(index))

    def _pack(self, index: int, tensor: Tensor) -> Tensor | _Saved:
        flat = self.blocks.flat_of(index)
        if flat is None or tensor.untyped_storage().data_ptr() != flat.untyped_storage().data_ptr():
            return tensor
        return _Saved(index, tensor.dtype, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def _unpack(self, saved: Tensor | _Saved) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        self._begin_backward(saved.block)
        flat = self.blocks.flat_of(saved.block)
        assert flat is not None
        return flat.view(saved.dtype).as_strided(saved.shape, saved.stride, saved.offset)

    def _begin_backward(self, index: int) -> None:
        if self._working == index:
            return
        if self._working is None:
            torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)  # type: ignore[attr-defined]
        self._finish_block()
        self._working = index
        self.blocks.bring(index)
        for later in range(index - 1, max(index - 1 - self._ahead, -1), -1):
            self.blocks.fetch(later)

    def _finish_block(self) -> None:
        """The block at work has its gradients: it goes home, and what the one before it sent has had its time."""
        for _, event in self._leaving[0]:
            self.blocks.down.wait(event)
        self._leaving = [self._leaving[1], []]
        if self._working is None:
            return
        index, self._working = self._working, None
        self.blocks.take_back(index)
        if self._worker is not None:
            parameters = [place.parameter for place in self.blocks.parcels[index].places]
            events = [event for p in parameters if (event := self._landed.get(p)) is not None]
            self._jobs[index] = self._worker.submit(self._run_after, index, events)

    def _end_backward(self) -> None:
        if self._working is not None:
            self._finish_block()

    def _run_after(self, index: int, events: list[torch.cuda.Event]) -> None:
        for event in events:
            event.synchronize()
        assert self._after_block is not None
        self._after_block(index)

    def _join(self, index: int) -> None:
        self._jobs.pop(index).result()
        self.blocks.forget_one(index)

    def _take_gradient(self, parcel: Parcel, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter) and parameter.grad is not None
        grad, parameter.grad = parameter.grad, None
        home = self._home_of(parcel, parameter)
        grad = grad.to(home.dtype)
        earlier = parcel.grad(parameter)
        if earlier is not None:
            there = torch.empty_like(earlier, device=self.device)
            self.blocks.up.wait(self.blocks.up.copy((there, earlier), after=(self._landed.get(parameter),)))
            grad = there.add_(grad)
        self._landed[parameter] = self.blocks.down.copy((home, grad))
        self._leaving[1].append((grad, self._landed[parameter]))
        parcel.set_grad(parameter, home)

    def _home_of(self, parcel: Parcel, parameter: nn.Parameter) -> Tensor:
        """Pinned memory for a gradient, made once: for all trainable parameters of a parcel together."""
        if parameter not in self._host_grads:
            wanted = [place for place in parcel.places if place.parameter.requires_grad]
            sizes = [place.shape.numel() * place.host_dtype.itemsize for place in wanted]
            *starts, num_bytes = accumulate(map(aligned, sizes), initial=0)
            pin = Pinned(num_bytes, self.device)
            self._pins.append(pin)
            for place, start, size in zip(wanted, starts, sizes, strict=True):
                flat = pin.bytes[start : start + size].view(place.host_dtype)
                self._host_grads[place.parameter] = flat.view(place.shape)
        return self._host_grads[parameter]


def stream_layers(
    model: nn.Module,
    device: torch.device | str,
    *,
    num_buffers: int = 2,
    dtype: torch.dtype | None = None,
    after_block: Callable[[int], None] | None = None,
) -> LayerStream:
    """Streams the blocks of a model, whose parameters are on the host and stay there, through `device`.

    Parameter objects and names stay as they are, so that an optimiser made before or after is one on host tensors.

    Args:
        model: has `blocks`; filled, not sharded. `apply_recompute` comes first.
        device: where it computes.
        num_buffers: blocks on the device at a time.
        dtype: of parameters on the device; None for their own. The host's are then the master copy.
        after_block: called with a block's number once its gradients of a backward are on the host, in a thread of its
            own beside the backward of the other blocks; a block's optimiser step, say. The block waits for it before
            it comes again. Not for several backwards a step.

    Raises:
        ValueError: a model without blocks, shared or sharded parameters, or too few buffers.
    """
    return LayerStream(model, device, num_buffers, dtype, after_block)
