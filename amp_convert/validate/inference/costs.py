"""Time and peak memory of one forward pass of each arm, side by side.

The arms take turns, so that a machine whose speed drifts slows all of them alike; the median over
the turns counts. Memory, weights included, is measured in a pass of its own, since counting costs
time. The frozen arm is what one would deploy, the mixed arm what one would train.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from amp_convert.capture.in_mode import in_mode
from amp_convert.core import device as devices
from amp_convert.core.errors import first_line
from amp_convert.core.memory_meter import held_bytes, peak_bytes
from amp_convert.core.number_formats import from_name
from amp_convert.core.random_state import preserved_rng
from amp_convert.rewrite.converted_model import ConvertedModel
from amp_convert.validate.inference.results import ArmCost

TURNS = 5
BUDGET_SECONDS = 20.0
"""Past this no further turn is started; the first one always runs."""


def measure(
    converted: ConvertedModel,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    fold_batch_norm: bool = False,
) -> tuple[ArmCost, ...]:
    """Costs of the FP32 original, native autocast, the converted and the frozen model, and of that
    with BatchNorm folded where asked for, in eval mode."""
    device = converted.captured.device
    frozen = converted.freeze()
    original = converted.captured.model
    models = {"fp32": original, "autocast": original, "mixed": converted, "frozen": frozen}
    if fold_batch_norm:
        models["folded"] = converted.freeze(fold_batch_norm=True)
    arms = _arms(models, converted)
    notes = dict.fromkeys(arms, "")
    peaks: dict[str, int] = {}
    times: dict[str, list[float]] = {name: [] for name in arms}
    with (
        in_mode(original, training=False) as attributes,
        in_mode(converted, training=False),
        torch.no_grad(),
        preserved_rng(device),
    ):
        for name, run in list(arms.items()):
            try:
                # This also warms the arm up.
                model = models[name]
                held = held_bytes((*model.parameters(), *model.buffers()))
                given = _copied(args, kwargs)
                if converted.captured.has_branches:
                    run(*given)
                else:
                    peaks[name] = held + peak_bytes(partial(run, *given))
                attributes.restore()  # a state kept in one would be of the arm's precision
            except Exception as error:  # noqa: BLE001  autocast breaks some models: a result
                notes[name] = f"it does not run, so it has no time: {first_line(error)}"
                del arms[name]
        begin = time.perf_counter()
        for turn in range(TURNS):
            if turn and time.perf_counter() - begin > BUDGET_SECONDS:
                break
            for name, run in arms.items():
                given = _copied(args, kwargs)
                taken = devices.milliseconds(partial(run, *given), device)
                times[name].append(taken)
                attributes.restore()
    return tuple(
        ArmCost(
            arm=name,
            milliseconds=statistics.median(taken) if taken else None,
            peak_bytes=peaks.get(name),
            note=notes[name] or f"median of {len(taken)} forward passes; memory with the weights",
        )
        for name, taken in times.items()
    )


def _copied(
    args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs for one call, which may write to them."""
    copied: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(
        torch.Tensor, torch.clone, (tuple(args), dict(kwargs))
    )
    return copied


_Arm = Callable[[tuple[Any, ...], dict[str, Any]], Any]


def _arms(models: Mapping[str, nn.Module], converted: ConvertedModel) -> dict[str, _Arm]:
    original = models["fp32"]
    device, low = converted.captured.device, from_name(converted.plan.dtype)

    def fp32(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with devices.exact_fp32(device):
            original(*args, **kwargs)

    def autocast(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with torch.autocast(device.type, dtype=low):
            original(*args, **kwargs)

    return {
        "fp32": fp32,
        "autocast": autocast,
        **{
            name: partial(_call, model)
            for name, model in models.items()
            if name not in ("fp32", "autocast")
        },
    }


def _call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    model(*args, **kwargs)
