"""`make bench-gpu`, and a part of `make bench`: forward passes of each arm, side by side.

FP32, TF32 (on CUDA), native autocast, all low (`.half()`, `.bfloat16()`), converted and frozen.
Arms take turns, medians are printed, and ratios are what to read. Behind each low arm stands its
error: the relative L2 norm over all outputs together, against FP32 with TF32 off.

`python -m tests.benchmarks.speed [MODEL ...] [--device D] [--dtype NAME] [--full] [--turns N]`
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

import amp_convert as amp
from amp_convert.core import device as devices
from amp_convert.core.memory_meter import held_bytes, peak_bytes
from amp_convert.core.number_formats import from_name
from tests.benchmarks.dispatch import counted
from tests.benchmarks.speed_models import MODELS, build

_COLUMNS = ("fp32", "tf32", "autocast", "all low", "mixed", "frozen")


def arms(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype
) -> tuple[dict[str, Callable[[], Any]], nn.Module, nn.Module]:
    """What each arm runs; and the frozen and the low model."""
    device = devices.of_model(model)
    mixed = amp.convert(model, args, kwargs, dtype=dtype, train=False)
    frozen, low = mixed.freeze(), copy.deepcopy(model).to(dtype)
    given, kept = pytree.tree_map(
        lambda t: t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t,
        (args, kwargs),
    )

    def fp32() -> Any:
        with devices.exact_fp32(device):
            return model(*args, **kwargs)

    def tf32() -> Any:
        with _tf32():
            return model(*args, **kwargs)

    def autocast() -> Any:
        with torch.autocast(device.type, dtype=dtype):
            return model(*args, **kwargs)

    found: dict[str, Callable[[], Any]] = {
        "fp32": fp32,
        "autocast": autocast,
        "all low": lambda: low(*given, **kept),
        "mixed": lambda: mixed(*args, **kwargs),
        "frozen": lambda: frozen(*args, **kwargs),
    }
    if device.type == "cuda":
        found["tf32"] = tf32
    return found, frozen, low


@contextlib.contextmanager
def _tf32() -> Any:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def measure(name: str, device: torch.device, dtype: torch.dtype, turns: int, *, full: bool) -> str:
    """One line of the table."""
    model, args, kwargs = build(name, full=full)
    model, (args, kwargs) = model.to(device), devices.move((args, kwargs), device)
    running, frozen, low = arms(model, args, kwargs, dtype)
    errors, times, counts = {}, {}, {}
    with torch.no_grad():
        reference = running["fp32"]()
        for arm, run in list(running.items()):
            try:
                errors[arm] = error(run(), reference)
                counts[arm] = counted(run).total
            except (RuntimeError, NotImplementedError):  # no kernel on this device
                del running[arm]
        taken: dict[str, list[float]] = {arm: [] for arm in running}
        for _ in range(turns):
            for arm, run in running.items():
                taken[arm].append(devices.milliseconds(run, device))
        times = {arm: statistics.median(values) for arm, values in taken.items()}
        peaks = [
            held_bytes((*m.parameters(), *m.buffers())) + peak_bytes(running[arm])
            for arm, m in (("frozen", frozen), ("all low", low))
            if arm in running
        ]
    cells = [
        f"{times[arm]:8.2f}" + (f" ({errors[arm]:.0e})" if arm not in ("fp32", "tf32") else "")
        if arm in times
        else f"{'-':>8}"
        for arm in _COLUMNS
    ]
    ratios = [
        times["frozen"] / times[arm] if arm in times else float("nan")
        for arm in ("all low", "autocast")
    ]
    memory = peaks[0] / peaks[1] if len(peaks) == 2 else float("nan")
    calls = f"{counts['frozen']}/{counts.get('all low', 0)}"
    return (
        f"{name:17} {' '.join(cells)}   {ratios[0]:.3f}   {ratios[1]:.3f}   {memory:.2f}   {calls}"
    )


def error(made: Any, reference: Any) -> float:
    """Relative L2 error over all floating-point outputs together, in FP64."""
    squares = [0.0, 0.0]
    pairs = zip(pytree.tree_leaves(made), pytree.tree_leaves(reference), strict=True)
    for have, want in pairs:
        if isinstance(want, torch.Tensor) and want.is_floating_point():
            squares[0] += float((have.double() - want.double()).square().sum())
            squares[1] += float(want.double().square().sum())
    return float((squares[0] / squares[1]) ** 0.5)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Time the forward passes of each arm.")
    parser.add_argument("models", nargs="*", default=list(MODELS), metavar="MODEL")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--full", action="store_true", help="inputs of the size that a GPU takes")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument(
        "--seconds", type=float, default=270.0, help="no model is begun after these"
    )
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    device, dtype = devices.choose(given.device), from_name(given.dtype)
    begin = time.perf_counter()
    slow = devices.slow_kernels(device.device, dtype)
    print(
        f"\n{device.name}, PyTorch {torch.__version__}, {given.dtype}, medians of {given.turns} "
        f"turns in ms (relative L2 error){f'; {slow}' if slow else ''}"
    )
    head = " ".join(
        f"{arm:>8}" + (" " * 8 if arm not in ("fp32", "tf32") else "") for arm in _COLUMNS
    )
    print(f"{'':17} {head}   /low    /autoc  memory calls: frozen/all low")
    for name in given.models:
        if time.perf_counter() - begin > given.seconds:
            print(f"{name:17} left out: {given.seconds:.0f} s are over")
            continue
        print(measure(name, device.device, dtype, given.turns, full=given.full), flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
