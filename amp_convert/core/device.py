"""Where a run takes place: choosing the device, moving things there, timing and measuring there.

Nothing here assumes a GPU. On CUDA, times come from events and the FP32 arm runs with TF32 off,
since a TF32 reference would hide the very errors that the tool is there to find. On every other
device times come from the wall clock.

Peak memory is counted from the storages that PyTorch's operators return while they are alive. That
is the same count on every device and for eager and captured code alike; it leaves out the scratch
space inside a kernel.
"""

from __future__ import annotations

import contextlib
import platform
import random
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from amp_convert.core.errors import UsageError


@dataclass(frozen=True)
class Device:
    """A chosen device and the sentence that says why it was chosen."""

    device: torch.device
    name: str
    reason: str

    @property
    def type(self) -> str:
        """`"cpu"`, `"cuda"` or `"meta"`."""
        return self.device.type


def choose(requested: str) -> Device:
    """Choose the device for `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises UsageError when CUDA is asked for by name and PyTorch has none.
    """
    available = torch.cuda.is_available()
    if requested == "auto":
        if available:
            return _cuda(
                torch.device("cuda", torch.cuda.current_device()), "auto: CUDA is available"
            )
        build = (
            "this PyTorch is built without CUDA" if torch.version.cuda is None else "no usable GPU"
        )
        return Device(torch.device("cpu"), _cpu_name(), f"auto: {build}")
    device = torch.device(requested)
    if device.type != "cuda":
        return Device(device, _cpu_name(), f"--device {requested}")
    if not available:
        raise UsageError(
            f"--device {requested} was asked for, but PyTorch finds no CUDA device",
            mend="Use --device cpu, or install a CUDA build of PyTorch.",
        )
    if (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"--device {requested} was asked for, but there are {torch.cuda.device_count()} GPUs",
            mend="Count starts at cuda:0.",
        )
    return _cuda(device, f"--device {requested}")


def of_model(model: nn.Module) -> torch.device:
    """The device of the model's first parameter or buffer; the CPU for a model without any."""
    for tensor in [*model.parameters(), *model.buffers()]:
        return tensor.device
    return torch.device("cpu")


def has_values(model: nn.Module) -> bool:
    """Whether the model's tensors hold numbers: not on the meta device, and not fake."""
    tensors = (*model.parameters(), *model.buffers())
    return not any(t.is_meta or isinstance(t, FakeTensor) for t in tensors)


def move(tree: Any, device: torch.device) -> Any:
    """Every tensor of a pytree, moved to `device`; everything else as it is."""
    return pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), tree)


@contextlib.contextmanager
def exact_fp32(device: torch.device) -> Iterator[None]:
    """FP32 means FP32: TF32 products are off inside, and the user's settings come back after."""
    if device.type != "cuda":
        yield
        return
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = matmul
        torch.backends.cudnn.allow_tf32 = cudnn


@contextlib.contextmanager
def plain_mode(device: torch.device) -> Iterator[None]:
    """Gradients on, inference mode and autocast off, whatever the caller is in the middle of."""
    with (
        torch.inference_mode(mode=False),
        torch.enable_grad(),
        torch.autocast(device.type if device.type != "meta" else "cpu", enabled=False),
    ):
        yield


@dataclass(frozen=True, eq=False)
class RngState:
    """The state of every global random number generator: PyTorch's of the CPU and, on CUDA, of the
    device, Python's and NumPy's. All but the tensors is plain data."""

    cpu: torch.Tensor
    device: torch.Tensor | None
    python: tuple[Any, ...]
    numpy: tuple[Any, ...]

    def same(self, other: RngState) -> bool:
        """Whether both go on with the same numbers."""
        mine, theirs = self.device, other.device
        alike = mine is theirs if mine is None or theirs is None else torch.equal(mine, theirs)
        rest = (self.python, self.numpy) == (other.python, other.numpy)
        return alike and rest and torch.equal(self.cpu, other.cpu)


@contextlib.contextmanager
def preserved_rng(device: torch.device) -> Iterator[None]:
    """Leave the random state as it was."""
    state = rng_state(device)
    try:
        yield
    finally:
        set_rng_state(device, state)


def rng_state(device: torch.device) -> RngState:
    """The random state of the CPU and, on CUDA, of `device`."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    name, keys, *rest = np.random.get_state(legacy=True)
    numpy = (name, tuple(np.asarray(keys).tolist()), *rest)
    return RngState(torch.get_rng_state(), cuda, random.getstate(), numpy)


def set_rng_state(device: torch.device, state: RngState) -> None:
    """Go back to a state that `rng_state` returned."""
    torch.set_rng_state(state.cpu)
    if state.device is not None:
        torch.cuda.set_rng_state(state.device, device)
    random.setstate(state.python)
    np.random.set_state(state.numpy)


def seed_all(seed: int) -> None:
    """Start every global random number generator from `seed`."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def milliseconds(function: Callable[[], Any], device: torch.device) -> float:
    """The time of one call, by events on CUDA and by the wall clock elsewhere."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record(torch.cuda.current_stream(device))
        function()
        end.record(torch.cuda.current_stream(device))
        end.synchronize()
        return float(start.elapsed_time(end))
    begin = time.perf_counter()
    function()
    return (time.perf_counter() - begin) * 1e3


def peak_bytes(function: Callable[[], Any]) -> int:
    """The largest number of bytes that tensors made during one call held at one time."""
    with StorageMeter() as meter:
        function()
    peak: int = meter.peak
    return peak


class StorageMeter(TorchDispatchMode):
    """Counts the bytes of the storages that operators allocate, from their birth to their death."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        borrowed = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known and storage._cdata not in borrowed:
                self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _tensors(tree: Any) -> list[torch.Tensor]:
    """The tensors that have storage of their own: of a sparse one, its parts."""
    found: list[torch.Tensor] = []
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, torch.Tensor) and leaf.layout is torch.sparse_coo:
            found += [leaf._indices(), leaf._values()]
        elif isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided:
            found.append(leaf)
    return found


def _cuda(device: torch.device, reason: str) -> Device:
    return Device(device, torch.cuda.get_device_name(device), reason)


def kernels_of(device: torch.device) -> str:
    """What decides about the bits of PyTorch's kernels: the GPU, or the CPU's instruction set."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {torch.backends.cpu.get_cpu_capability()}"


def _cpu_name() -> str:
    return platform.processor() or platform.machine()
