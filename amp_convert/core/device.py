"""Where a run takes place: choosing the device, moving things there, timing there.

Nothing here assumes a GPU. On CUDA, times come from events and the FP32 arm runs with TF32 off,
since a TF32 reference would hide the very errors that the tool is there to find. On every other
device times come from the wall clock.
"""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

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


def slow_kernels(device: torch.device, dtype: torch.dtype) -> str:
    """Why `device` has no kernels that are faster in `dtype` than in FP32, as a clause; "" where it
    has."""
    name = str(dtype).removeprefix("torch.")
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        least = (
            8 if dtype is torch.bfloat16 else 7
        )  # Ampere, Volta: NVIDIA's tables of tensor cores
        slow = major < least and torch.version.hip is None
        return f"this GPU (sm_{major}{minor}) has no tensor cores for {name}" if slow else ""
    if device.type != "cpu":
        return ""
    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    wanted = _FAST_CPU[dtype]
    if not features or any(features.get(feature) for feature in wanted):
        return ""
    return f"this CPU has no instructions for {name} ({', '.join(wanted)})"


_FAST_CPU = {
    torch.float16: ("avx512_fp16", "amx_fp16", "arm_fp16", "arm_sve"),
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "arm_bf16"),
}
"""PyTorch's names of what makes products faster than in FP32; any of them will do."""


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


def free_bytes(device: torch.device) -> int | None:
    """The memory that is free on the device; None where nobody tells."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = [_of_machine(), _of_container()]
    return min((size for size in found if size is not None), default=None)


def _of_machine() -> int | None:
    """What Linux says could be had without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    kilobytes = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return next((int(size) * 1024 for size in kilobytes), None)


def _of_container() -> int | None:
    """What a container (cgroup v2) leaves; its file cache can be had as well."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        used = int((group / "memory.current").read_text(encoding="ascii"))
        lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return None
    cached = next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)
    return int(limit) - used + cached if limit.isdecimal() else None


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


def _cuda(device: torch.device, reason: str) -> Device:
    return Device(device, torch.cuda.get_device_name(device), reason)


def kernels_of(device: torch.device) -> str:
    """What decides about the bits of PyTorch's kernels: the GPU, or the CPU's instruction set."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_name()}, {torch.backends.cpu.get_cpu_capability()}"


def _cpu_name() -> str:
    return platform.processor() or platform.machine()
