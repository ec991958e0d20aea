"""`--weights disk`: a model whose blocks are read from its files when they are used.

The model is a skeleton. Everything outside its blocks (embeddings, the last norm, the head) is
loaded; the parameters of a block are on the meta device, and in memory only while the block is
open. Meanwhile a thread prefetches the next block. A pruned block is written to its own file at
once, and read from there afterwards.

Code that runs the whole model still works: a block that is called opens itself. That reads the
whole model for every call, so code with many windows uses `models.stream` or the walker, which run
all windows through one block before they open the next.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunebench.errors import IncompatibleData
from prunebench.models.activations import Activations, MappedActivations
from prunebench.models.block_buffers import BufferPool, ParameterSlot, parameter_slots
from prunebench.models.checkpoint_keys import match_keys
from prunebench.models.complete import require_complete
from prunebench.models.journal import RunJournal
from prunebench.models.linears import find_blocks, find_linears, find_repeats
from prunebench.models.load import attention_of, quiet_transformers
from prunebench.models.out_of_memory import return_free_memory
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


_LoadedBlock = tuple[Tensor | None, dict[str, Tensor]]
"""A block in host memory: its buffer (None where memory is pinned), and its tensors by name."""


class DiskWeights:
    """Weights that are read a block at a time, see the module's docstring.

    Args:
        model: The skeleton.
        stored: The stored tensors of its parameters, by name.
        device: The device on which a block runs.
        journal: The journal, in which pruned blocks are saved.
        placement: Where hidden states are stored between two blocks.

    Attributes:
        journal: The journal.
        read_bytes: Bytes read so far.
        read_seconds: Time spent reading, most of it while another block was running.
        wait_seconds: Time spent waiting for a block that had not been read yet.
        returns: What follows the hidden state in each block's output; None until a run has
            observed it.
    """

    def __init__(
        self,
        model: nn.Module,
        stored: dict[str, StoredTensor],
        *,
        device: torch.device,
        journal: RunJournal,
        placement: Placement = "device",
    ) -> None:
        prefix, self._blocks = find_blocks(model)
        self._stored = stored
        self._device = device
        self._placement = placement
        self.journal = journal
        self._pruned: dict[int, dict[str, StoredTensor]] = {}
        self._slots = [
            list(parameter_slots(block, f"{prefix}.{index}.", stored))
            for index, block in enumerate(self._blocks)
        ]
        self._depth: dict[int, int] = {}  # how often each block is open: opening nests
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="next-block")
        self._prefetched: tuple[int, Future[_LoadedBlock]] | None = None
        self._pool = BufferPool(max(sum(map(self._aligned_bytes, slots)) for slots in self._slots))
        self._buffer_of: dict[int, Tensor | None] = {}
        self.read_bytes = 0
        self.read_seconds = self.wait_seconds = 0.0
        self.returns: list[tuple[Any, ...] | None] | None = None
        for index, block in enumerate(self._blocks):
            self._open_when_called(index, block)

    # ------------------------------------------------------------ the `WeightStore` protocol

    @property
    def finished(self) -> Sequence[Sequence[Any]]:
        """The notes of the blocks that an interrupted run has already pruned, from the first."""
        return [self.journal.blocks[index]["notes"] for index in range(len(self._pruned))]

    @contextlib.contextmanager
    def open_block(self, index: int, *, then: int | None = None) -> Iterator[nn.Module]:
        """Read a block and start prefetching the next one; free the block at the end.

        Args:
            index: Index of the block.
            then: Index of the block to prefetch; by default `index + 1`.

        Raises:
            IncompatibleData: A file has become shorter.
        """
        self._enter(index, index + 1 if then is None else then)
        try:
            yield self._blocks[index]
        finally:
            self._leave(index)

    def save_block(
        self, index: int, *, notes: Sequence[Any] = (), hidden: Iterable[Tensor] | None = None
    ) -> None:
        """Save an open block to its own file, and read it from there from now on.

        Raises:
            SaveError: The disk is full.
        """
        self.journal.save_block(index, self.tensors_of(index), notes=notes, hidden=hidden)
        self._pruned[index] = self.journal.tensors_of(index)

    def saved_hidden(self, index: int) -> list[Tensor] | None:
        """Return the saved activations before a block of an interrupted run, if any."""
        return self.journal.hidden_before(index)

    @contextlib.contextmanager
    def unpruned(self) -> Iterator[None]:
        """Open blocks with their dense weights inside; nothing may be saved there."""
        self._drop_prefetched()
        pruned, self._pruned = self._pruned, {}
        try:
            yield
        finally:
            self._drop_prefetched()
            self._pruned = pruned

    def activations(self, device: torch.device) -> Activations:
        """Return an empty store for hidden states: on `device`, or as the run's placement says."""
        if self._placement == "disk":
            return MappedActivations(self.journal.folder)
        return Activations(torch.device("cpu") if self._placement == "cpu" else device)

    # ------------------------------------------------------------ resuming, and where tensors are

    def restore_blocks(self) -> None:
        """Read the blocks that an interrupted run has pruned from their saved files."""
        self._drop_prefetched()
        self._pruned = {
            index: self.journal.tensors_of(index) for index in range(len(self.journal.blocks))
        }

    def tensors_of(self, index: int) -> dict[str, Tensor]:
        """Return the tensors of an open block by name."""
        return {slot.name: slot.get() for slot in self._slots[index]}

    @property
    def source(self) -> Path:
        """The folder of the dense model."""
        return next(iter(self._stored.values())).path.parent

    def pruned_file(self, index: int) -> Path | None:
        """Return the file of a pruned block; None for a dense one."""
        if index not in self._pruned:
            return None
        return self.journal.folder / str(self.journal.blocks[index]["file"])

    def close(self) -> None:
        """Stop the prefetching thread."""
        self._drop_prefetched()
        self._reader.shutdown(wait=True)

    # ------------------------------------------------------------ reading

    def _enter(self, index: int, then: int) -> None:
        """Load a block, unless it is open already, and start prefetching block `then`."""
        self._depth[index] = self._depth.get(index, 0) + 1
        if self._depth[index] > 1:
            return
        try:
            start_time = time.perf_counter()
            self._buffer_of[index], tensors = self._take(index)
            self.wait_seconds += time.perf_counter() - start_time
            # only after `_take`, which has used or dropped the last prefetch: two buffers suffice
            if then < len(self._blocks) and then != index:
                self._prefetched = (then, self._reader.submit(self._read, then))
            # pop: on a GPU each host copy can be freed as soon as it has been transferred
            for slot in self._slots[index]:
                slot.put(tensors.pop(slot.name).to(self._device, non_blocking=True))
        except BaseException:  # a partly loaded block goes back to the meta device
            self._leave(index)
            raise

    def _leave(self, index: int) -> None:
        """Undo one `_enter`; the last one frees the block."""
        self._depth[index] -= 1
        if self._depth[index] == 0:
            for slot in self._slots[index]:
                slot.put(torch.empty_like(slot.get(), device="meta"))
            self._pool.give_back(self._buffer_of.pop(index, None))
            return_free_memory()

    def _take(self, index: int) -> _LoadedBlock:
        """Return a block in host memory: wait for its prefetch, or read it now."""
        if self._prefetched is not None and self._prefetched[0] == index:
            (_, prefetch), self._prefetched = self._prefetched, None
            return prefetch.result()  # an error of the thread is raised here
        self._drop_prefetched()
        return self._read(index)

    def _drop_prefetched(self) -> None:
        """Cancel the prefetch, or wait for it and free its buffer."""
        prefetched, self._prefetched = self._prefetched, None
        if prefetched is not None:
            prefetch = prefetched[1]
            # `cancel` fails once the thread is reading; `exception` waits until it has finished
            if not prefetch.cancel() and prefetch.exception() is None:
                self._pool.give_back(prefetch.result()[0])

    def _aligned_bytes(self, slot: ParameterSlot) -> int:
        size = math.prod(self._stored[slot.name].shape) * slot.dtype.itemsize
        return -(-size // _ALIGN) * _ALIGN

    def _read(self, index: int) -> _LoadedBlock:
        """Read a block; for a GPU into pinned memory, which torch's allocator reuses."""
        stored = self._pruned.get(index, self._stored)
        pin = self._device.type == "cuda"
        buffer = None if pin else self._pool.take()
        start_time, offset = time.perf_counter(), 0
        tensors: dict[str, Tensor] = {}
        for slot in self._slots[index]:
            tensor, out = stored[slot.name], None
            if buffer is not None:
                size = math.prod(tensor.shape) * slot.dtype.itemsize
                out = buffer[offset : offset + size].view(slot.dtype).view(tensor.shape)
                offset += self._aligned_bytes(slot)
            tensors[slot.name] = read_tensor(tensor, slot.dtype, pin=pin, out=out)
            self.read_bytes += tensor.stop - tensor.start
        self.read_seconds += time.perf_counter() - start_time
        return buffer, tensors

    def _open_when_called(self, index: int, block: nn.Module) -> None:
        """Make a block open itself for a call while it is not open."""
        opened: list[bool] = []  # a stack, one entry for each running call

        def before(module: nn.Module, args: Any) -> None:
            # an instance's "forward" is a replacement of `models.replay`, which uses no weights
            closed = self._depth.get(index, 0) == 0 and "forward" not in vars(module)
            opened.append(closed)
            if closed:
                self._enter(index, index + 1)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            if opened and opened.pop():
                self._leave(index)

        block.register_forward_pre_hook(before)
        block.register_forward_hook(after, always_call=True)


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Create parameters on the meta device; buffers, which are computed, stay real."""
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


def build_skeleton(config: Any, dtype: torch.dtype, *, attention: str | None = None) -> nn.Module:
    """Build a model whose parameters are on the meta device and whose buffers are real.

    Args:
        config: Of the model.
        dtype: Of its parameters.
        attention: The attention implementation; by default that of a run.
    """
    from transformers import AutoModelForCausalLM

    with _parameters_on_meta(), quiet_transformers():
        model: nn.Module = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention or attention_of(config)
        )
    model.requires_grad_(False)
    return model.eval()


def load_on_disk(
    path: Path,
    config: Any,
    *,
    dtype: torch.dtype,
    device: torch.device,
    journal: RunJournal,
    placement: Placement = "device",
) -> nn.Module:
    """Load a model without its blocks, which are read from disk when they are used.

    Args:
        path: The folder of the model.
        config: From `load_config`.
        dtype: Dtype of the parameters.
        device: The device on which the model runs.
        journal: The journal, in which pruned blocks are saved.
        placement: Where hidden states are stored between two blocks.

    Raises:
        IncompatibleData: Blocks share a matrix, a tensor is missing, or the checkpoint's tensors
            have to be converted and not only renamed, see `models.checkpoint_keys`.
    """
    check_weight_files(path)
    model: Any = build_skeleton(config, dtype)
    for repeat, linear in find_repeats(model, find_linears(model)).items():
        raise IncompatibleData(
            f"{linear.name} cannot be read from disk when its block is used",
            where=f"blocks {linear.block_index} and {repeat.block_index} share its weight",
            fix="use --weights resident",
        )
    keys = match_keys(model, stored_tensors(weight_files(path)), dtype=dtype)
    prefix, _ = find_blocks(model)
    for slot in parameter_slots(model, "", keys.stored):
        if not slot.name.startswith(f"{prefix}."):
            slot.put(read_tensor(keys.stored[slot.name], slot.dtype).to(device))
    absent = set(model.state_dict()) - set(keys.stored)  # all tied: `match_keys` has checked it
    with quiet_transformers():
        model.tie_weights(missing_keys=absent, recompute_mapping=False)
    require_complete(path, missing=absent)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)
    store = DiskWeights(model, keys.stored, device=device, journal=journal, placement=placement)
    set_weights_of(model, store)
    ready: nn.Module = model
    return ready
