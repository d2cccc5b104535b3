"""`make dispatch`: what each arm asks of the device, counted and not timed.

A model's time is that of the kernels it calls and of the bytes they move. Both can be counted on
any machine: a `TorchDispatchMode` sees every call below autograd. This counts them for the FP32
original, for it under `torch.autocast`, for all of it in a low dtype (`.half()`, `.bfloat16()`),
for the converted and for the frozen model; forward in inference, and forward and backward in
training.

A *kernel call* is a call that computes: a view of a tensor computes nothing, nor does an allocation
(`empty`). `read` and `written` are the bytes of the arguments and of the results; a tensor that a
kernel writes in place counts as both; an expanded tensor counts as what lies in memory. A *cast* is
a call that copies floating-point values into another floating-point dtype, of one tensor or of a
list. `wide` are the bytes of
calls that read or write FP32 tensors: in a converted model, its FP32 regions and its casts.

Each arm is called once before it is counted: what is computed once for each set of sizes is not
what a call costs. The fused encoder layers of `nn.Transformer` are off for all arms, as they are
under autocast: they hide from the dispatcher what they call.

`python -m tests.benchmarks.dispatch [MODEL ...] [--dtype NAME] [--kernels]`
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from amp_convert.core.memory_meter import held_bytes, peak_bytes
from amp_convert.core.number_formats import from_name
from amp_convert.core.random_state import preserved_rng
from amp_convert.rewrite.converted_model import ConvertedModel
from tests import zoo
from tests.benchmarks import counted_models

aten = torch.ops.aten

_ALLOCATIONS = {  # and what only relabels memory
    aten._unsafe_view.default,
    aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default,
    aten.new_empty.default, aten.new_empty_strided.default,
}  # fmt: skip
_CASTS = {aten._to_copy.default, aten.copy_.default, aten._foreach_copy_.default}


@dataclass
class Count:
    """What was dispatched: the calls by kernel, and the bytes that they moved."""

    calls: Counter[str] = field(default_factory=Counter)
    casts: int = 0
    read: int = 0
    written: int = 0
    wide: int = 0

    @property
    def total(self) -> int:
        """Kernel calls."""
        return self.calls.total()

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return self.read + self.written


class DispatchMeter(TorchDispatchMode):
    """Counts what is dispatched while it is entered."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = Count()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given, made = list(_tensors((args, kwargs))), list(_tensors(result))
        if not _computes(func):
            return result
        count = self.count
        count.calls[kernel(func, args, kwargs)] += 1
        count.read += sum(map(held, given))
        count.written += sum(map(held, made))
        count.casts += func in _CASTS and _changes_format(given, made)
        if any(t.dtype is torch.float32 and t.dim() for t in (*given, *made)):
            count.wide += sum(map(held, (*given, *made)))
        return result


@dataclass(frozen=True)
class Arm:
    """What one arm dispatches, and the bytes that it stores and holds at one time."""

    count: Count
    stored: int
    peak: int


def inference_arms(
    model: nn.Module,
    converted: ConvertedModel,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> dict[str, Arm]:
    """The five arms, in eval mode without gradients; one that PyTorch cannot run is left out."""
    dtype, device = from_name(converted.plan.dtype), converted.captured.device
    low = copy.deepcopy(model).to(dtype)
    low_inputs = _lowered((args, kwargs), dtype)

    def autocast() -> Any:
        with torch.autocast(device.type, dtype=dtype):
            return model(*args, **kwargs)

    frozen = converted.freeze()
    calls: dict[str, tuple[nn.Module, Callable[[], Any]]] = {
        "fp32": (model, lambda: model(*args, **kwargs)),
        "autocast": (model, autocast),
        "all low": (low, lambda: low(*low_inputs[0], **low_inputs[1])),
        "mixed": (converted, lambda: converted(*args, **kwargs)),
        "frozen": (frozen, lambda: frozen(*args, **kwargs)),
    }
    found = {}
    with in_eval(model, low, converted), torch.no_grad(), unfused():
        for name, (module, call) in calls.items():
            with contextlib.suppress(RuntimeError, NotImplementedError):  # no kernel on this device
                call()
                stored = held_bytes((*module.parameters(), *module.buffers()))
                found[name] = Arm(counted(call), stored, stored + peak_bytes(call))
    return found


def training_arms(
    model: nn.Module,
    converted: ConvertedModel,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> dict[str, Count]:
    """One forward and backward pass of each arm that trains, from a loss of all its outputs."""
    dtype, device = from_name(converted.plan.dtype), converted.captured.device
    low = copy.deepcopy(model).to(dtype)
    low_inputs = _lowered((args, kwargs), dtype)

    def step(module: nn.Module, given: Any, *, autocast: bool = False) -> Callable[[], None]:
        def run() -> None:
            with torch.autocast(device.type, dtype=dtype, enabled=autocast):
                made = module(*given[0], **given[1])
                floats = [t for t in _tensors(made) if t.requires_grad]
                loss = sum(t.float().square().mean() for t in floats)
            loss.backward()  # type: ignore[union-attr]
            module.zero_grad()

        return run

    calls: dict[str, Callable[[], None]] = {
        "fp32": step(model, (args, kwargs)),
        "autocast": step(model, (args, kwargs), autocast=True),
        "all low": step(low, low_inputs),
        "mixed": step(converted, (args, kwargs)),
    }
    found = {}
    modules = [model, low, converted]
    with preserved_rng(device), _training(*modules):
        for name, call in calls.items():
            with contextlib.suppress(RuntimeError, NotImplementedError):
                call()
                found[name] = counted(call)
    return found


def counted(call: Callable[[], Any]) -> Count:
    """What one call dispatches."""
    with DispatchMeter() as meter:
        call()
    found: Count = meter.count
    return found


def kernel(func: Any, args: Any, kwargs: Any) -> str:
    """A kernel with the flags that decide how fast it is: attention's mask and whether it is
    causal, and the number of dimensions of a product."""
    name = str(func).removeprefix("aten.").removesuffix(".default")
    if "attention" in name and "backward" not in name:
        arguments = {a.name: a for a in func._schema.arguments}
        given = dict(zip(arguments, args, strict=False)) | kwargs
        mask = given.get("attn_mask", given.get("attn_bias"))
        flags = ["mask" if mask is not None else "no mask"]
        flags += ["causal"] if given.get("is_causal") else []
        return f"{name}({', '.join(flags)})"
    return name


def held(tensor: torch.Tensor) -> int:
    """The bytes in memory that a strided tensor spans, an expanded dimension counted once."""
    if tensor.layout is not torch.strided:
        return 0
    sizes = [n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return int(torch.Size(sizes).numel()) * tensor.element_size() if tensor.numel() else 0


def _computes(func: Any) -> bool:
    if func in _ALLOCATIONS or func.namespace == "prim":
        return False
    aliases = [a.alias_info for a in func._schema.arguments if a.alias_info is not None]
    returns = [r.alias_info for r in func._schema.returns]
    is_view = any(info is not None and not info.is_write for info in returns)
    return not is_view or any(info.is_write for info in aliases)


def _changes_format(given: list[torch.Tensor], made: list[torch.Tensor]) -> bool:
    formats = {t.dtype for t in (*given, *made) if t.is_floating_point()}
    return len(formats) > 1


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def _lowered(tree: Any, dtype: torch.dtype) -> Any:
    return pytree.tree_map(
        lambda t: t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t, tree
    )


def in_eval(*modules: nn.Module) -> contextlib.AbstractContextManager[None]:
    """These modules in eval mode."""
    return zoo.mode(*modules, train=False)


def _training(*modules: nn.Module) -> contextlib.AbstractContextManager[None]:
    return zoo.mode(*modules, train=True)


def unfused() -> contextlib.AbstractContextManager[None]:
    """`nn.Transformer` without its fused layers."""
    return zoo.fused_transformer(False)


def report(name: str, dtype: torch.dtype, *, kernels: bool) -> None:
    """Print what the arms of one model dispatch."""
    model, args, kwargs = counted_models.example(name)
    converted = counted_models.converted(name, dtype)
    arms = inference_arms(model, converted, args, kwargs)
    print(f"\n{name}, {converted.plan.dtype}, inference; KiB")
    print(
        f"  {'arm':9} {'calls':>6} {'casts':>6} {'moved':>8} {'wide':>8} {'stored':>8} {'peak':>8}"
    )
    for arm, found in arms.items():
        count = found.count
        sizes = (count.moved, count.wide, found.stored, found.peak)
        print(f"  {arm:9} {count.total:6} {count.casts:6}", *(f"{n // 1024:8}" for n in sizes))
    if kernels and "all low" in arms:
        low, frozen = arms["all low"].count.calls, arms["frozen"].count.calls
        print("  frozen has more:", dict(frozen - low))
        print("  frozen has fewer:", dict(low - frozen))
    print(f"{name}, {converted.plan.dtype}, training step; KiB")
    steps = training_arms(model, converted, args, kwargs)
    for arm, step in steps.items():
        print(f"  {arm:9} {step.total:6} {step.casts:6} {step.moved // 1024:8}")
    if kernels and {"autocast", "mixed"} <= steps.keys():
        native, mixed = steps["autocast"].calls, steps["mixed"].calls
        print("  mixed has more:", dict(mixed - native))
        print("  mixed has fewer:", dict(native - mixed))


def main() -> int:
    """Print the counts of every model."""
    parser = argparse.ArgumentParser(description="Count kernel calls and the bytes they move.")
    parser.add_argument("models", nargs="*", default=counted_models.MODELS, metavar="MODEL")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--kernels", action="store_true", help="name the kernels that differ")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in given.models:
        report(name, from_name(given.dtype), kernels=given.kernels)
    return 0


if __name__ == "__main__":
    sys.exit(main())
