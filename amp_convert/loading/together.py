"""Which settings go together.

A setting of training or of ONNX asks for training or ONNX. One that would do nothing beside the
others is refused, for whoever gave it expects something; what stands in pyproject.toml waits for
the run that it is for, and gives way to a flag that says something else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

from amp_convert.core.errors import UsageError
from amp_convert.loading.settings import SEEDS, SETTINGS, Part, Settings, flag_of, option_of

_OF_A_SCALE = ("initial_scale", "scale_growth", "scale_backoff", "scale_interval")


_OF_SEEDS = ("margin", "fp32_seeds")


_OF_TRAINING = tuple(
    name for name in SETTINGS if option_of(name).part is Part.TRAINING and name != "train"
)


_OF_ONNX = tuple(name for name in SETTINGS if option_of(name).part is Part.ONNX)


_LEAVE_ONE_OUT = "Leave one out."


def agreed(settings: Settings, given: Mapping[str, object]) -> Settings:
    """`settings`, and what those that were `given` for this run ask for; None for absent. Raises
    UsageError for one that says the opposite of another, or would do nothing."""
    settings = _with_onnx(settings, given)
    if given.get("cuda_graphs") and given.get("compile") is False:
        raise UsageError("--cuda-graphs was given, and compile is off", mend=_LEAVE_ONE_OUT)
    if given.get("cuda_graphs"):
        settings = dataclasses.replace(settings, compile=True)
    asked = [name for name in _OF_TRAINING if given.get(name) is not None]
    if asked and given.get("train") is False:
        raise UsageError(f"--no-train and {_flag(asked[0])} were both given", mend=_LEAVE_ONE_OUT)
    if asked:
        settings = dataclasses.replace(settings, train=True)
    if settings.train is False:
        return settings
    for name in asked:
        _refuse_idle(name, settings)
    return _one_margin(settings, asked)


def _with_onnx(settings: Settings, given: Mapping[str, object]) -> Settings:
    """The settings, with ONNX where a flag of it was given."""
    if any(given.get(name) is not None for name in _OF_ONNX):
        return dataclasses.replace(settings, onnx=True)
    return settings


def _refuse_idle(name: str, settings: Settings) -> None:
    """Raises UsageError for a flag that does nothing beside the others."""
    if name in _OF_SEEDS and settings.seeds in (None, 1):
        why, more = "with one seed", f"--seeds {SEEDS}"
    elif name in _OF_A_SCALE and settings.loss_scaling != "dynamic":
        default = "" if settings.loss_scale else f", the default for {settings.dtype}"
        why = f"with a loss scale of {settings.loss_scaling}{default}"
        more = "--loss-scale dynamic"
    elif name == "checkpoint_every" and settings.checkpoint is None:
        why, more = "without a checkpoint", "--checkpoint DIR"
    else:
        return
    mend = f"Give {more} as well, or leave it out."
    raise UsageError(f"{_flag(name)} does nothing {why}", mend=mend)


def _one_margin(settings: Settings, asked: Collection[str]) -> Settings:
    """The settings with one source of the margin at most: a flag before pyproject.toml."""
    if settings.margin is None or settings.fp32_seeds is None:
        return settings
    match [name for name in ("margin", "fp32_seeds") if name in asked]:
        case ["margin"]:
            return dataclasses.replace(settings, fp32_seeds=None)
        case ["fp32_seeds"]:
            return dataclasses.replace(settings, margin=None)
    raise UsageError("--margin and --fp32-seeds were both given", mend=_LEAVE_ONE_OUT)


def _flag(name: str) -> str:
    return f"--{flag_of(name)}"
