"""Weights that a frozen model holds in FP32 and in low precision, since it reads both.

A table that is looked up and multiplied is low for both (see `plan.tied_tables`), unless a guard
has measured that what reads its entries cannot bear the rounding. What that costs is said here, of
tables as of any other weight: by what constant folding will store, so it is what a frozen model
has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from amp_convert.capture.captured import Captured, Region
from amp_convert.core.mode import Mode
from amp_convert.core.number_formats import LOW_DTYPES
from amp_convert.plan.costs import StoredTwice
from amp_convert.rewrite.fold_constants import StoredWeight, stored_weights
from amp_convert.rewrite.insert_casts import Rewritten


def stored_twice(
    captured: Captured, rewritten: Mapping[str, Mapping[Mode, Rewritten]], low: torch.dtype
) -> tuple[StoredTwice, ...]:
    """The weights of the frozen model, the largest first. `rewritten` has the graphs by part."""
    wide: dict[int, StoredTwice] = {}
    tensors: dict[int, torch.Tensor] = {}
    lowered: set[int] = set()
    for region in captured.regions:
        graph = rewritten[region.path][Mode.EVAL]
        for weight in stored_weights(graph, region.runner(Mode.EVAL).tensors()):
            key = id(weight.tensor)
            tensors[key] = weight.tensor
            if weight.dtype in LOW_DTYPES:
                lowered.add(key)
            elif key not in wide:
                wide[key] = _read_in_fp32(region, graph, weight, low)
    for name, tensor in _left_eager(captured):
        if id(tensor) in lowered and id(tensor) not in wide:
            size = tensor.numel() * low.itemsize
            wide[id(tensor)] = StoredTwice(name, size, "", "code that was not captured has it", "")
    found = [wide[key] for key in wide if key in lowered]
    return tuple(sorted(found, key=lambda each: -each.low_bytes))


def _read_in_fp32(
    region: Region, rewritten: Rewritten, weight: StoredWeight, low: torch.dtype
) -> StoredTwice:
    size = weight.tensor.numel() * low.itemsize
    name = region.qualified(weight.name)
    decision = rewritten.decisions.get(rewritten.origins.get(weight.reader.name, ""))
    if decision is None:  # the graph's output
        return StoredTwice(name, size, "", "the model returns it", "")
    return StoredTwice(name, size, decision.node, decision.reason, decision.evidence)


def _left_eager(captured: Captured) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of the modules that are in no part that was captured."""
    if captured.is_whole:
        return
    inside = {module for region in captured.regions for module in region.module.modules()}
    for path, module in captured.model.named_modules():
        if module not in inside:
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    yield f"{path}.{name}".lstrip("."), tensor
