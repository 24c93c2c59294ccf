"""Inputs of recomputed blocks, kept in host memory from the forward pass to the backward pass.

Checkpointing keeps the input of every block. On a GPU these are copied out while the block computes, and back while the
block above is recomputed and differentiated, on a stream of their own. A GPU then holds two of them at a time: in the
forward pass the one that is computed with, in the backward pass that one and the next.

Memory of the GPU is freed without asking whether a copy has ended: the computation's own stream waits for it first, so
that whatever is computed in that memory comes later. The host waits for nothing.
"""

from __future__ import annotations

import logging
import math
import mmap
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from finetune_trainer.errors import UsageError
from finetune_trainer.fast.pinned import pin, unpin

logger = logging.getLogger(__name__)


class SideStream:
    """Copies beside the computation of a device. On a CPU they are made at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def pins(self) -> bool:
        """Whether host memory is to be pinned for it."""
        return self._stream is not None

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> torch.cuda.Event | None:
        """Begin to copy, after all that was asked of the current stream so far; gives what to wait for."""
        if self._stream is None:
            target.copy_(source)
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            done = torch.cuda.Event()
            done.record(self._stream)
        return done

    def wait(self, done: torch.cuda.Event | None) -> None:
        """Let the current stream come after a copy."""
        if done is not None:
            torch.cuda.current_stream(self.device).wait_event(done)

    def synchronize(self) -> None:
        """Let the host come after all copies."""
        if self._stream is not None:
            self._stream.synchronize()


class Buffer:
    """Host memory of so many bytes."""

    def __init__(self, size: int, stream: SideStream) -> None:
        """Raises UsageError where there is no more memory."""
        try:
            memory = mmap.mmap(-1, size)
        except OSError as error:
            raise UsageError(
                f"spec.training.gradientCheckpointing: offload needs {size:,} more bytes of host memory, which are not"
                f" there ({error}); give the pods more memory, or set it to always"
            ) from None
        self._bytes = torch.frombuffer(memory, dtype=torch.uint8)
        address = self._bytes.data_ptr()
        self.pinned = stream.pins and pin(address, size)
        if self.pinned:
            # `memory` outlives the call.
            weakref.finalize(self, _unpin, address, stream, memory)

    def __len__(self) -> int:
        """Bytes."""
        return len(self._bytes)

    def view(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """The beginning of it."""
        return self._bytes[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


def _unpin(address: int, stream: SideStream, memory: mmap.mmap) -> None:
    stream.synchronize()
    unpin(address)


class Pool:
    """Buffers for as many inputs as are kept at a time, used again and again. A buffer that is too small for any
    input that comes gives way to a larger one, so that there are never more than were in use at once."""

    def __init__(self, stream: SideStream) -> None:
        self._stream = stream
        self._free: list[Buffer] = []
        self._told = False

    def take(self, size: int) -> Buffer:
        """The smallest that holds so many bytes."""
        fitting = [buffer for buffer in self._free if len(buffer) >= size]
        if fitting:
            found = min(fitting, key=len)
            self._free.remove(found)
            return found
        if self._free:
            self._free.pop()
        # Rows that differ a little in length do not ask for a new one each.
        step = max(mmap.PAGESIZE, 1 << max(0, size.bit_length() - 4))
        made = Buffer(-(-max(size, 1) // step) * step, self._stream)
        if self._stream.pins and not made.pinned and not self._told:
            logger.warning("offload: host memory cannot be pinned; the GPU waits for every copy")
            self._told = True
        return made

    def give_back(self, buffer: Buffer) -> None:
        """Copies from and to it may be under way: those of its next user come after them, on the same stream."""
        self._free.append(buffer)

    def __len__(self) -> int:
        """Buffers that nobody uses."""
        return len(self._free)


class Kept:
    """A block's input in host memory, for as long as the backward pass may ask for it."""

    def __init__(self, inputs: HostInputs, states: torch.Tensor, below: Kept | None) -> None:
        self._pool = inputs.pool
        self._buffer = self._pool.take(states.numel() * states.element_size())
        self.host = self._buffer.view(states.shape, states.dtype)
        self.requires_grad = states.requires_grad
        self.below = (lambda: None) if below is None else weakref.ref(below)
        """What was kept before it, which is asked for next; None once it is gone."""

    def __del__(self) -> None:
        if hasattr(self, "_buffer"):
            self._pool.give_back(self._buffer)


@dataclass(frozen=True)
class Moving:
    """An input on the device, on its way out or just come back."""

    of: weakref.ref[Kept]
    states: torch.Tensor
    version: int | None
    """Of states on their way out, which nobody may change meanwhile."""
    done: torch.cuda.Event | None


class HostInputs:
    """The inputs of one device's blocks. Forward passes put them in; backward passes ask for them in reverse."""

    def __init__(self, stream: SideStream) -> None:
        self.pool = Pool(stream)
        self._stream = stream
        self._moving: Moving | None = None
        self._newest: Callable[[], Kept | None] = lambda: None

    def keep(self, states: torch.Tensor) -> Kept:
        """Begin to copy states to the host; the device frees them once the next ones are kept.

        Raises UsageError where the last ones were changed in the meantime, or where memory ends.
        """
        self._settle()
        kept = Kept(self, states, self._newest())
        inside = states.detach()
        done = self._stream.copy(kept.host, inside)
        self._moving = Moving(weakref.ref(kept), inside, inside._version, done)
        self._newest = weakref.ref(kept)
        return kept

    def states(self, kept: Kept) -> torch.Tensor:
        """What was kept, on the device again; what is asked for next sets out now."""
        if self._moving is None or self._moving.of() is not kept:
            self._settle()
            self._moving = self._bring(kept)
        states = self._moving.states
        self._settle()
        below = kept.below()
        if below is not None:
            self._moving = self._bring(below)
        return states.detach().requires_grad_(kept.requires_grad)

    def _bring(self, kept: Kept) -> Moving:
        # In the current stream's memory: the copy comes after what was computed there before, and `_settle` has what is
        # computed there later come after the copy.
        states = torch.empty(kept.host.shape, dtype=kept.host.dtype, device=self._stream.device)
        done = self._stream.copy(states, kept.host)
        return Moving(weakref.ref(kept), states, None, done)

    def _settle(self) -> None:
        moving, self._moving = self._moving, None
        if moving is None:
            return
        self._stream.wait(moving.done)
        if moving.version not in (None, moving.states._version):
            raise UsageError(
                "spec.training.gradientCheckpointing: offload cannot be used: the model changes the inputs of its"
                " blocks in place; set it to always"
            )


def _looks(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


class Offload:
    """A function to checkpoint with, in the stead of torch's own: `offload(function, states, *more)`.

    All but where the states are kept is torch's, without reentry: random numbers, autocast, hooks of gradients, inputs
    that need none. One object serves all blocks of a model; its host memory goes with it.
    """

    def __init__(self, stream_of: Callable[[torch.device], SideStream] = SideStream) -> None:
        self._stream_of = stream_of
        self._inputs: dict[torch.device, HostInputs] = {}

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """What the function gives for these arguments, of which the first are the states."""
        if not torch.is_grad_enabled() or not args or not isinstance(args[0], torch.Tensor):
            return checkpoint(function, *args, use_reentrant=False)
        states, *more = args
        inputs = self.inputs_on(states.device)
        kept = inputs.keep(states)
        # Taken out by the forward pass, so that nothing here keeps them on the device.
        first = [states]

        def run(_: torch.Tensor, *more: Any) -> Any:
            return function(first.pop() if first else inputs.states(kept), *more)

        # An argument without content tells torch whose random numbers to restore.
        return checkpoint(run, states.new_empty(0), *more, use_reentrant=False)

    @staticmethod
    def can_hold(*args: Any) -> bool:
        """Whether the first of a function's arguments are states that come back as they were: not strided."""
        return bool(args) and isinstance(args[0], torch.Tensor) and args[0].is_contiguous()

    @contextmanager
    def held(self, states: torch.Tensor) -> Iterator[None]:
        """Around a function of these states that keeps them for a backward pass, and recomputes by itself what else it
        needs there: it finds them again on the device then."""
        inputs = self.inputs_on(states.device)
        kept = inputs.keep(states)
        looks = _looks(states)

        def pack(tensor: torch.Tensor) -> torch.Tensor | Kept:
            return kept if _looks(tensor) == looks else tensor

        def unpack(packed: torch.Tensor | Kept) -> torch.Tensor:
            return inputs.states(packed) if isinstance(packed, Kept) else packed

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield

    def inputs_on(self, device: torch.device) -> HostInputs:
        """Where a device's inputs are kept."""
        if device not in self._inputs:
            self._inputs[device] = HostInputs(self._stream_of(device))
        return self._inputs[device]
