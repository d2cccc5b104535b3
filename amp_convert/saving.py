"""`amp_convert.save` and `load`: converted models as files, to deploy and to train on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from torch import nn

from amp_convert import api
from amp_convert.core.errors import UsageError
from amp_convert.core.number_formats import from_name
from amp_convert.loading.model_file import kind_of
from amp_convert.report.writers.json_report import verdict_text
from amp_convert.rewrite.converted_model import ConvertedModel
from amp_convert.rewrite.frozen_model import FrozenModel
from amp_convert.rules.load import rules_of_text
from amp_convert.saved_model.archive import Archive, write_archive
from amp_convert.saved_model.checkpoint import read_checkpoint, write_checkpoint
from amp_convert.saved_model.restoring import fill, refuse_other
from amp_convert.verdict.verdict import Verdict


def save(
    model: ConvertedModel | FrozenModel,
    path: str | PathLike[str],
    *,
    verdict: Verdict | None = None,
) -> Archive | None:
    """Write a converted model to `path`, whole or not at all.

    A frozen model becomes a `torch.export` archive (.pt2): `torch.export.load(path).module()` is it
    again, in the plan's precision, in a process that has neither amp_convert nor the code of the
    model; what it gives is in dicts, lists and tuples. Plan, digests and the `verdict` of a check
    are among its extra files. Gives what is in it.

    Another converted model becomes a safetensors file (.safetensors) with its FP32 weights and its
    plan, to be trained on: see `load`.

    Raises UsageError for a path of another kind, UnsupportedModelError for a frozen model that is
    in parts or that `torch.export` refuses, ModelError for weights that no such file can hold.
    """
    frozen = isinstance(model, FrozenModel)
    if not frozen and not isinstance(model, ConvertedModel):
        mend = "Give what convert() or .freeze() gave."
        raise UsageError(f"{kind_of(model)} is no converted model", mend=mend)
    target, suffix = Path(path), ".pt2" if frozen else ".safetensors"
    if target.suffix != suffix:
        what = "a frozen model" if frozen else "a converted model"
        raise UsageError(f"{what} is saved as a {suffix} file, not as {target.name}")
    if target.is_dir():
        raise UsageError(f"{target} is a folder", mend="Give the name of a file.")
    try:
        if isinstance(model, FrozenModel):
            text = None if verdict is None else verdict_text(verdict)
            return write_archive(model, target, text)
        write_checkpoint(model, target)
    except OSError as error:
        raise UsageError(f"{target} cannot be written: {error}") from error
    return None


def load(
    path: str | PathLike[str],
    model: nn.Module,
    args: Any,
    kwargs: Mapping[str, Any] | None = None,
    calibration: Iterable[Any] | None = None,
) -> ConvertedModel:
    """The converted model that `save` wrote to `path`: its weights are copied into `model`, an
    instance of the same class, and the saved plan is applied to it, node by node. `args`, `kwargs`
    and `calibration` are as for `convert`. They decide about no precision; but where the saved plan
    rescales or clamps, they say by how much, so give the calibration batches of then.

    Raises UsageError for a file that `save` did not write or that has changed since, ModelError for
    a `model` that is not the one that was saved: before its weights are touched, where their names
    or shapes tell it.
    """
    saved = read_checkpoint(Path(path))
    fill(model, saved)
    rules = rules_of_text(saved.plan, fspath(path))
    assert rules.made_for is not None
    dtype = from_name(rules.made_for.dtype)
    mixed = api.convert(model, args, kwargs, dtype, rules, calibration, train=saved.for_training)
    refuse_other(mixed.plan, rules)
    return mixed
