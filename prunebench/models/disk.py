"""`--weights disk`: a model whose blocks stay in its files.

The model is a skeleton. What lies outside its blocks (embeddings, the last norm, the head) is
loaded; the parameters of a block are on the meta device, and in memory only while it is open. One
thread reads the next block meanwhile. A block that was pruned is written to a file of its own at
once, and read from there from then on.

Any code that runs the whole model still works: a block that is called opens itself. Reading the
model once for every window would be slow, so whoever runs many windows goes through `models.stream`
or the walker, which take all windows through one block before they open the next.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunebench.models.activations import Activations, MappedActivations
from prunebench.models.checkpoint_keys import match_keys
from prunebench.models.complete import require_complete
from prunebench.models.kept import KeptRun
from prunebench.models.linears import find_blocks
from prunebench.models.load import attention_of, quiet_transformers
from prunebench.models.memory import return_free_memory
from prunebench.models.safetensors_files import (
    StoredTensor,
    check_weight_files,
    stored_tensors,
    weight_files,
)
from prunebench.models.tensor_files import read_tensor
from prunebench.models.weights import set_weights_of
from prunebench.spec import Placement

_ALIGN = 64  # bytes, as torch aligns its own memory


@dataclass(frozen=True)
class _Slot:
    """A parameter or persistent buffer of a block: where it belongs, and what it is."""

    name: str
    module: nn.Module
    attribute: str
    dtype: torch.dtype

    def put(self, tensor: Tensor) -> None:
        """Make it present."""
        if self.attribute in self.module._buffers:
            self.module._buffers[self.attribute] = tensor
        else:
            parameter = nn.Parameter(tensor, requires_grad=False)
            self.module._parameters[self.attribute] = parameter

    def get(self) -> Tensor:
        """Return what is there now."""
        tensor: Tensor = getattr(self.module, self.attribute)
        return tensor.data


class _Rooms:
    """Memory for one block each, filled again and again.

    Fresh memory for every block would be cut up by what is allocated between two blocks and lives
    longer; freed pieces too small for the next block's tensors would add up to the whole model.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._free: list[Tensor] = []

    def take(self) -> Tensor:
        """Return a room that is free, or a new one."""
        return self._free.pop() if self._free else torch.empty(self._size, dtype=torch.uint8)

    def give_back(self, room: Tensor | None) -> None:
        """Let the next block have it; nothing may look at its tensors any more."""
        if room is not None:
            self._free.append(room)


_Present = tuple[Tensor | None, dict[str, Tensor]]
"""A block in host memory: its room, and its tensors by name."""


class DiskWeights:
    """Weights that are read a block at a time, see the module's docstring.

    Args:
        model: The skeleton.
        stored: Where its parameters lie, by name.
        device: Where a block computes.
        kept: Takes the blocks that have been pruned.
        placement: Where hidden states wait between two blocks.

    Attributes:
        read_bytes: What has been read so far.
        read_seconds: How long that took, most of it while another block was at work.
        wait_seconds: How long a block that was wanted was not there yet.
        returns: What follows the hidden state in each block's output, once it has been seen.
    """

    def __init__(
        self,
        model: nn.Module,
        stored: dict[str, StoredTensor],
        *,
        device: torch.device,
        kept: KeptRun,
        placement: Placement = "device",
    ) -> None:
        prefix, self._blocks = find_blocks(model)
        self._stored = stored
        self._device = device
        self._placement = placement
        self.kept = kept
        self._pruned: dict[int, dict[str, StoredTensor]] = {}
        self._slots = [
            list(_slots(block, f"{prefix}.{index}.", stored))
            for index, block in enumerate(self._blocks)
        ]
        self._depth: dict[int, int] = {}
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="next-block")
        self._coming: tuple[int, Future[_Present]] | None = None
        self._rooms = _Rooms(max(sum(map(self._room_bytes, slots)) for slots in self._slots))
        self._room_of: dict[int, Tensor | None] = {}
        self.read_bytes = 0
        self.read_seconds = self.wait_seconds = 0.0
        self.returns: list[tuple[Any, ...] | None] | None = None
        for index, block in enumerate(self._blocks):
            self._open_when_called(index, block)

    # ------------------------------------------------------------ the store of the walker

    @property
    def finished(self) -> Sequence[Sequence[Any]]:
        """The notes of the first blocks, which an interrupted run has pruned already."""
        return [self.kept.blocks[index]["notes"] for index in range(len(self._pruned))]

    @contextlib.contextmanager
    def open_block(self, index: int, *, then: int | None = None) -> Iterator[nn.Module]:
        """Read a block, and begin to read the next one; drop it at the end.

        Raises:
            IncompatibleData: A file has become shorter.
        """
        self._enter(index, index + 1 if then is None else then)
        try:
            yield self._blocks[index]
        finally:
            self._leave(index)

    def keep_block(
        self, index: int, *, notes: Sequence[Any] = (), hidden: Iterable[Tensor] | None = None
    ) -> None:
        """Write an open block to its file, and read it from there from now on.

        Raises:
            SaveError: The disk is full.
        """
        tensors = {slot.name: slot.get() for slot in self._slots[index]}
        self.kept.add_block(index, tensors, notes=notes, hidden=hidden)
        self._pruned[index] = self.kept.tensors_of(index)

    def kept_hidden(self, index: int) -> list[Tensor] | None:
        """Return the activations before a block that an interrupted run has kept, if any."""
        return self.kept.hidden_before(index)

    def activations(self, device: torch.device) -> Activations:
        """Return an empty place for hidden states, where the run wants them."""
        if self._placement == "disk":
            return MappedActivations(self.kept.folder)
        return Activations(torch.device("cpu") if self._placement == "cpu" else device)

    # ------------------------------------------------------------ going on, and what is where

    def go_on(self) -> None:
        """Take the blocks that an interrupted run has pruned for the model's."""
        self._forget_coming()
        self._pruned = {
            index: self.kept.tensors_of(index) for index in range(len(self.kept.blocks))
        }

    def names_of(self, index: int) -> list[str]:
        """Return the names of a block's tensors in the model."""
        return [slot.name for slot in self._slots[index]]

    def tensors_of(self, index: int) -> dict[str, Tensor]:
        """Return the tensors of an open block by name."""
        return {slot.name: slot.get() for slot in self._slots[index]}

    @property
    def source(self) -> Path:
        """The folder of the dense model."""
        return next(iter(self._stored.values())).path.parent

    def pruned_file(self, index: int) -> Path | None:
        """Return the file of a block that was pruned."""
        if index not in self._pruned:
            return None
        return self.kept.folder / str(self.kept.blocks[index]["file"])

    def close(self) -> None:
        """End the reading thread."""
        self._forget_coming()
        self._reader.shutdown(wait=True)

    # ------------------------------------------------------------ reading

    def _enter(self, index: int, then: int) -> None:
        self._depth[index] = self._depth.get(index, 0) + 1
        if self._depth[index] > 1:
            return
        try:
            begun = time.perf_counter()
            self._room_of[index], tensors = self._take(index)
            self.wait_seconds += time.perf_counter() - begun
            if then < len(self._blocks) and then != index:
                self._coming = (then, self._reader.submit(self._read, then))
            for slot in self._slots[index]:
                slot.put(tensors.pop(slot.name).to(self._device, non_blocking=True))
        except BaseException:
            self._leave(index)
            raise

    def _leave(self, index: int) -> None:
        self._depth[index] -= 1
        if self._depth[index] == 0:
            for slot in self._slots[index]:
                slot.put(torch.empty_like(slot.get(), device="meta"))
            self._rooms.give_back(self._room_of.pop(index, None))
            return_free_memory()

    def _take(self, index: int) -> _Present:
        """Return a block: the one that was read ahead, or read now."""
        if self._coming is not None and self._coming[0] == index:
            coming, self._coming = self._coming, None
            return coming[1].result()
        self._forget_coming()
        return self._read(index)

    def _forget_coming(self) -> None:
        coming, self._coming = self._coming, None
        if coming is not None and not coming[1].cancel() and coming[1].exception() is None:
            self._rooms.give_back(coming[1].result()[0])  # it had begun, and was waited for

    def _room_bytes(self, slot: _Slot) -> int:
        size = math.prod(self._stored[slot.name].shape) * slot.dtype.itemsize
        return -(-size // _ALIGN) * _ALIGN

    def _read(self, index: int) -> _Present:
        """Read a block; for a GPU into pinned memory, which torch itself uses again."""
        places = self._pruned.get(index, self._stored)
        pin = self._device.type == "cuda"
        room = None if pin else self._rooms.take()
        begun, at = time.perf_counter(), 0
        tensors: dict[str, Tensor] = {}
        for slot in self._slots[index]:
            place, out = places[slot.name], None
            if room is not None:
                shape = place.shape
                size = math.prod(shape) * slot.dtype.itemsize
                out = room[at : at + size].view(slot.dtype).view(shape)
                at += self._room_bytes(slot)
            tensors[slot.name] = read_tensor(place, slot.dtype, pin=pin, out=out)
            self.read_bytes += place.stop - place.start
        self.read_seconds += time.perf_counter() - begun
        return room, tensors

    def _open_when_called(self, index: int, block: nn.Module) -> None:
        """Let a block that is called while it is not open, open itself for the call."""
        mine: list[bool] = []

        def before(module: nn.Module, args: Any) -> None:
            absent = self._depth.get(index, 0) == 0 and "forward" not in vars(module)
            mine.append(absent)
            if absent:
                self._enter(index, index + 1)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            if mine and mine.pop():
                self._leave(index)

        block.register_forward_pre_hook(before)
        block.register_forward_hook(after, always_call=True)


def _slots(block: nn.Module, prefix: str, stored: dict[str, StoredTensor]) -> Iterator[_Slot]:
    for path, module in block.named_modules():
        inside = f"{prefix}{path}." if path else prefix
        for attribute, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and f"{inside}{attribute}" in stored:
                yield _Slot(f"{inside}{attribute}", module, attribute, tensor.dtype)


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Let new parameters be on the meta device; buffers, which are computed, are real."""
    plain = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.data.to("meta"), requires_grad=False)
        plain(module, name, parameter)

    nn.Module.register_parameter = register  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = plain  # type: ignore[method-assign]


def build_skeleton(config: Any, dtype: torch.dtype) -> nn.Module:
    """Build a model whose parameters are on the meta device and whose buffers are real."""
    from transformers import AutoModelForCausalLM

    with _parameters_on_meta(), quiet_transformers():
        model: nn.Module = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention_of(config)
        )
    model.requires_grad_(False)
    return model.eval()


def load_on_disk(
    path: Path,
    config: Any,
    *,
    dtype: torch.dtype,
    device: torch.device,
    kept: KeptRun,
    placement: Placement = "device",
) -> nn.Module:
    """Load what lies outside the blocks of a model, and let its blocks be read when they are used.

    Args:
        path: The folder of the model.
        config: From `load_config`.
        dtype: Of the parameters.
        device: Where the model computes.
        kept: Takes the blocks that are pruned.
        placement: Where hidden states wait between two blocks.

    Raises:
        IncompatibleData: The checkpoint needs more than names, see `models.checkpoint_keys`, or a
            tensor is missing.
    """
    check_weight_files(path)
    model: Any = build_skeleton(config, dtype)
    keys = match_keys(model, stored_tensors(weight_files(path)), dtype=dtype)
    prefix, _ = find_blocks(model)
    for slot in _slots(model, "", keys.stored):
        if not slot.name.startswith(f"{prefix}."):
            slot.put(read_tensor(keys.stored[slot.name], slot.dtype).to(device))
    absent = set(model.state_dict()) - set(keys.stored)  # all tied, `match_keys` says
    with quiet_transformers():
        model.tie_weights(missing_keys=absent, recompute_mapping=False)
    require_complete(path, missing=absent)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)
    store = DiskWeights(model, keys.stored, device=device, kept=kept, placement=placement)
    set_weights_of(model, store)
    ready: nn.Module = model
    return ready
