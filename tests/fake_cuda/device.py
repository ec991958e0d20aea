"""`FakeCuda`: fake tensors on `cuda:N`, what the host reads of them, and a `torch.cuda` that works.

Import it after `tests.fake_cuda.load()`.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.fake_cuda import ROOT

OURS = tuple(str(ROOT / folder) + "/" for folder in ("prunebench", "benchmarks"))
DEVICES = 2
aten = torch.ops.aten


class FakeCuda(contextlib.ExitStack):
    """Inside this context tensors are fake, and `torch.cuda` says that there are two GPUs.

    What the host reads has no value, so it gets one: `any` is False, `all` and `equal` are True,
    an error code is 0; other numbers are 0, 1.0 and True by dtype. A mask selects everything.

    Attributes:
        reads: How often the host waited for a device, by (place, what): a number, a copy to or
            from the host, a shape that depends on data. The place is the innermost line of ours.
        operations: Number of operations.
        capturing: Whether a CUDA graph is being captured: then a read is an error, as on a GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mode = _Mode(allow_non_fake_inputs=True)
        self.reads: Counter[tuple[str, str]] = Counter()
        self.operations = 0
        self.capturing = False

    def __enter__(self) -> FakeCuda:
        super().__enter__()
        for name, value in _cuda(self).items():
            self.enter_context(mock.patch.object(torch.cuda, name, value, create=True))
        self.enter_context(mock.patch.object(torch.Tensor, "data_ptr", _address))
        self.enter_context(mock.patch.object(torch.Tensor, "numpy", _numpy))
        for name in ("__getitem__", "__setitem__"):
            self.enter_context(mock.patch.object(torch.Tensor, name, _with_lists(name)))
        # it would allocate memory on the device
        self.enter_context(mock.patch.object(fake_tensor, "init_gpu_context", lambda device: None))
        self.enter_context(self.mode)
        self.enter_context(_Watch(self))
        return self

    def note(self, what: str) -> None:
        """Note that the host waits for the device."""
        if self.capturing:
            raise RuntimeError(f"operation not permitted when stream is capturing: {what}")
        self.reads[_place(), what] += 1

    def model(self, model: nn.Module, *, dtype: torch.dtype, device: str = "cuda:0") -> nn.Module:
        """Replace parameters and buffers by fake ones on a device; what is tied stays tied."""
        with self.mode:
            for owner, name, tensor, made in _tensors(model):
                kind = dtype if tensor.dtype.is_floating_point else tensor.dtype
                empty = made.get(id(tensor))
                if empty is None:
                    empty = torch.empty(tensor.shape, dtype=kind, device=device)
                    if isinstance(tensor, nn.Parameter):
                        empty = nn.Parameter(empty, requires_grad=False)
                    made[id(tensor)] = empty
                owner[name] = empty
        return model


def _tensors(model: nn.Module) -> Any:
    made: dict[int, Tensor] = {}
    alive = []  # ids of freed tensors would be used again
    for module in list(model.modules()):
        for owner in (module._parameters, module._buffers):
            for name, tensor in list(owner.items()):
                if tensor is not None:
                    alive.append(tensor)
                    yield owner, name, tensor, made


class _Mode(FakeTensorMode):
    """Copies no constant to a device that is not there, although `torch.cuda` is available."""

    avoid_device_init = True


class _Watch(TorchDispatchMode):
    """Sees every operation before FakeTensorMode, and answers for those that need data."""

    def __init__(self, fake: FakeCuda) -> None:
        super().__init__()
        self.fake = fake

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.fake.operations += 1
        if func.overloadpacket in _ONE_DTYPE:
            _require_one_dtype(func, args, kwargs)
        if func is aten._local_scalar_dense.default and not isinstance(args[0], FakeTensor):
            with fake_tensor.unset_fake_temporarily():
                return func(*args)  # of a real tensor on the CPU
        answer = _ANSWERS.get(func.overloadpacket)
        if answer is not None and args and isinstance(args[0], FakeTensor):
            value = answer(self.fake, func, args, kwargs)
            if value is not NotImplemented:
                return value
        out = func(*args, **kwargs)
        packet = func.overloadpacket
        if packet in _VALUES and isinstance(out, FakeTensor):
            out.host_value = _VALUES[packet]
        elif packet is aten.linalg_cholesky_ex:
            out[1].host_value = 0
        elif packet in (aten._to_copy, aten.copy_) and isinstance(out, FakeTensor):
            self._note_copy(args, out)
        return out

    def _note_copy(self, args: Any, out: Tensor) -> None:
        source = args[1] if len(args) > 1 and isinstance(args[1], Tensor) else args[0]
        if not isinstance(source, Tensor):
            return
        ends = source.device.type, out.device.type
        if isinstance(source, FakeTensor) and source.constant is not None and out.numel() == 1:
            out.host_value = source.constant.item()
        elif hasattr(source, "host_value"):
            out.host_value = source.host_value
        if ends == ("cuda", "cpu"):
            self.fake.note("copy to the host")
        elif ends == ("cpu", "cuda") and out.numel():
            self.fake.note("copy from the host")


_VALUES = {aten.any: False, aten.all: True}
# Operations that convert nothing: FakeTensorMode computes some of them from mixed dtypes.
_ONE_DTYPE = {
    getattr(aten, name)
    for name in (
        "mm", "bmm", "mv", "dot", "linear", "addmm", "addmm_", "baddbmm", "baddbmm_", "addmv",
        "addmv_", "index_copy", "index_copy_", "index_add", "index_add_", "scatter", "scatter_",
        "index_put", "index_put_", "linalg_solve_triangular", "convolution",
        "scaled_dot_product_attention",
    )
}  # fmt: skip


def _require_one_dtype(func: Any, args: Any, kwargs: Any) -> None:
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    kinds = {t.dtype for t in tensors if t.ndim and t.dtype.is_floating_point}
    if "out_dtype" in kwargs or func._overloadname.startswith("dtype"):
        kinds = {t.dtype for t in tensors[:2]}  # a product of another dtype than its factors
    if len(kinds) > 1:
        raise RuntimeError(f"{func} of {', '.join(sorted(map(str, kinds)))}")


def _number(fake: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
    tensor = args[0]
    if tensor.device.type == "cuda":
        fake.note("number")
    if tensor.constant is not None:
        return tensor.constant.item()
    if hasattr(tensor, "host_value"):
        return tensor.host_value
    if tensor.dtype == torch.bool:
        return True
    return 1.0 if tensor.dtype.is_floating_point else 0


def _equal(fake: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
    one, other = args[:2]
    if one.device != other.device:
        raise RuntimeError(f"torch.equal of {one.device} and {other.device}")
    fake.note("equal")
    return True


def _nonzero(fake: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
    fake.note("shape")
    mask = args[0]
    return mask.new_empty(mask.numel(), mask.ndim, dtype=torch.int64)


def _index(fake: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
    """Of a mask: everything, in the order of the dimensions that it masks."""
    tensor, indices = args[:2]
    masks = [i for i in indices if i is not None and i.dtype in (torch.bool, torch.uint8)]
    if not masks:
        return NotImplemented
    if len(indices) > 1:
        raise NotImplementedError("fake CUDA knows one mask, at the front")
    fake.note("shape")
    (mask,) = masks
    if mask.device.type != "cpu" and mask.device != tensor.device:
        raise RuntimeError(f"a mask on {mask.device} indexes a tensor on {tensor.device}")
    return tensor.new_empty(mask.numel(), *tensor.shape[mask.ndim :])


def _index_put(fake: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
    tensor, indices = args[:2]
    if any(i is not None and i.dtype == torch.bool for i in indices) and args[2].ndim:
        fake.note("shape")  # a single value fills a mask without one
        return tensor
    return NotImplemented


def _bincount(fake: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
    fake.note("shape")
    least = args[2] if len(args) > 2 else kwargs.get("minlength", 0)
    return args[0].new_empty(least, dtype=torch.int64)


_ANSWERS = {
    aten._local_scalar_dense: _number,
    aten.equal: _equal,
    aten.nonzero: _nonzero,
    aten.index: _index,
    aten.index_put_: _index_put,
    aten._index_put_impl_: _index_put,
    aten.bincount: _bincount,
}


def _address(tensor: Tensor) -> int:
    """Stand in for `data_ptr`: a fake tensor has an address by its storage, others their own."""
    if not isinstance(tensor, FakeTensor):
        return torch._C.TensorBase.data_ptr(tensor)
    start = _STORAGES.setdefault(tensor.untyped_storage()._cdata, len(_STORAGES) + 1) << 44
    return start + tensor.storage_offset() * tensor.itemsize


_STORAGES: dict[int, int] = {}


def _with_lists(name: str) -> Any:
    """Stand in for indexing: torch copies a list of places to the device unseen by any mode."""
    plain = getattr(torch._C.TensorBase, name)

    def indexed(tensor: Tensor, index: Any, *value: Any) -> Any:
        if isinstance(tensor, FakeTensor):
            if isinstance(index, tuple):
                index = tuple(_places(each, tensor) for each in index)
            index = _places(index, tensor)
        return plain(tensor, index, *value)

    return indexed


def _places(index: Any, tensor: Tensor) -> Any:
    return torch.tensor(index, device=tensor.device) if isinstance(index, list) else index


def _numpy(tensor: Tensor) -> Any:
    """Stand in for `numpy`: of a fake tensor on the CPU, zeros."""
    if not isinstance(tensor, FakeTensor):
        return torch._C.TensorBase.numpy(tensor)
    if tensor.device.type != "cpu":
        raise TypeError(f"can't convert {tensor.device} tensor to numpy")
    with fake_tensor.unset_fake_temporarily():
        return torch.zeros(tensor.shape, dtype=tensor.dtype).numpy()


def _place() -> str:
    frame = sys._getframe(2)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(OURS):
            return f"{Path(path).relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


# ---------------------------------------------------------------- torch.cuda


def _cuda(fake: FakeCuda) -> dict[str, Any]:
    """Return what stands in for functions and classes of `torch.cuda`."""
    current = threading.local()

    def index_of(device: Any) -> int:
        if isinstance(device, int):
            return device
        index = torch.device(device).index if device is not None else None
        return current_device() if index is None else index

    def current_device() -> int:
        return getattr(current, "index", 0)

    def set_device(device: Any) -> None:
        current.index = index_of(device)

    def exchange(device: int) -> int:
        before = current_device()
        if device >= 0:
            current.index = device
        return before

    def synchronize(device: Any = None) -> None:
        fake.note("synchronize")

    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: DEVICES,
        "current_device": current_device,
        "set_device": set_device,
        "_exchange_device": exchange,
        "_maybe_exchange_device": exchange,
        "synchronize": synchronize,
        "empty_cache": lambda: None,
        "mem_get_info": lambda device=None: (120 << 30, 139 << 30),
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "get_device_name": lambda device=None: "fake CUDA",
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: PROPERTIES,
        "current_stream": lambda device=None: _Stream(),
        "Stream": _Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "Event": _Event,
        "CUDAGraph": _Graph,
        "graph": lambda graph, **options: _capture(fake),
    }


PROPERTIES = SimpleNamespace(
    name="fake CUDA", major=9, minor=0, multi_processor_count=132, total_memory=139 << 30,
    L2_cache_size=50 << 20, warp_size=32, shared_memory_per_block_optin=232448,
)  # fmt: skip


class _Stream:
    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.cuda_stream = 0

    def wait_stream(self, other: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


class _Event:
    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: Any) -> float:
        """Milliseconds."""
        return 1.0


class _Graph:
    def replay(self) -> None:
        pass

    def reset(self) -> None:
        pass


@contextlib.contextmanager
def _capture(fake: FakeCuda) -> Any:
    fake.capturing = True
    try:
        yield
    finally:
        fake.capturing = False
