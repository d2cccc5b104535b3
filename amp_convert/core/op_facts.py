"""What the kernels of an operator keep in FP32 while the rest of it runs in low precision."""

from __future__ import annotations

from typing import Any

import torch

aten = torch.ops.aten

_NORMS = {
    aten.layer_norm.default, aten.native_layer_norm.default,
    aten.group_norm.default, aten.native_group_norm.default,
}  # fmt: skip
_STATISTICS = frozenset({"weight", "bias", "running_mean", "running_var"})


def kept_arguments(target: Any, device: str) -> frozenset[str]:
    """Arguments that stay FP32 in a low node, since the kernel takes them so at no cost.

    Batch normalisation reads and writes its statistics in FP32 everywhere; the CPU's layer and
    group normalisation take FP32 parameters beside a low input. CUDA's want one dtype.
    """
    if not isinstance(target, torch._ops.OpOverload):
        return frozenset()
    if "batch_norm" in target.name():
        return _STATISTICS
    if target in _NORMS and device == "cpu":
        return frozenset({"weight", "bias"})
    # A table is looked up first and cast after: the same bits, for a fraction of the work.
    return frozenset({"weight"}) if target is aten.embedding.default else frozenset()


def casts_result(target: Any) -> bool:
    """Whether a low node computes in FP32 and casts what comes out."""
    return target is aten.embedding.default
