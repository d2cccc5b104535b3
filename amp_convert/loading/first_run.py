"""The first run of the user's model, in FP32 on the example inputs: what could not be compared
later is refused here."""

from __future__ import annotations

import itertools
import os
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map_only

from amp_convert.core.errors import ModelError
from amp_convert.core.module_state import Attributes, other_tensors
from amp_convert.core.tree_paths import named_leaves
from amp_convert.loading.model_file import Case, kind_of, refuse_unwritable
from amp_convert.loading.user_code import user_code


def check_forward(case: Case) -> Any:
    """The FP32 model's outputs for the example inputs, from one eager run in eval mode.

    Buffers, inputs, training flags and torch's random state are afterwards as they were before.
    Raises ModelError when the model refuses its inputs, returns no tensor, or returns NaN;
    infinities are let through, since masks use them. Tensors without values are not examined.
    """
    _check_names(case)
    try:
        outputs = _eager_outputs(case)
    except ModelError as error:
        try:
            _eager_outputs(case, gradients=True)
        except ModelError:
            raise error from error.__cause__
        raise ModelError(
            "the model computes gradients in its forward pass, and inference runs without them",
            where=error.where,
            mend="Put that part of it under torch.enable_grad().",
        ) from error
    tensors = [(n, t) for n, t in named_leaves(outputs) if isinstance(t, torch.Tensor)]
    if not tensors:
        mend = (
            "Let forward() return a tensor, or tensors in a tuple, list, dict or dataclass, or "
            "register the class with torch.utils._pytree.register_pytree_node."
        )
        what = f"the model returns {kind_of(outputs)}, in which no tensor can be found"
        raise ModelError(what, where=os.path.basename(case.path), mend=mend)
    refuse_unwritable((name for name, _ in tensors), "an output", os.path.basename(case.path))
    if spoilt := [f"{n}: {c} of {t.numel()} values" for n, t in tensors if (c := _nans(t))]:
        mend = "Correct the model or example_inputs first: NaN cannot be compared with anything."
        what = f"the FP32 model itself gives NaN in its output ({'; '.join(spoilt[:5])})"
        raise ModelError(what, where=os.path.basename(case.path), mend=mend)
    return outputs


def _eager_outputs(case: Case, *, gradients: bool = False) -> Any:
    """What the model returns for the example inputs in eval mode; nothing of it is changed."""
    flags = [(module, module.training) for module in case.model.modules()]
    held = [t for t in (*case.model.parameters(), *case.model.buffers()) if t.is_cuda]
    devices = {t.get_device() for t in held if not isinstance(t, FakeTensor)}
    attributes = Attributes(case.model)
    mend = "Make example_inputs match the model's forward(); --debug shows the traceback."
    try:
        with (
            torch.set_grad_enabled(gradients),
            torch.random.fork_rng(devices=devices),
            user_code("the model, called with example_inputs,", case.path, mend),
        ):
            inputs = tree_map_only(torch.Tensor, torch.clone, (case.args, case.kwargs))
            case.model.eval()
            with other_tensors(case.model, _buffer_of_its_own):
                return case.model(*inputs[0], **inputs[1])
    finally:
        attributes.restore()
        for module, training in flags:
            module.training = training


def _buffer_of_its_own(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if isinstance(tensor, nn.Parameter) else tensor.clone()


def _check_names(case: Case) -> None:
    """Refuse names that no report could hold, before there is anything to report."""
    where = os.path.basename(case.path)
    kinds = {type(module) for module in case.model.modules()}
    refuse_unwritable([case.name, *(kind.__qualname__ for kind in kinds)], "a class", where)
    refuse_unwritable((name for name, _ in case.model.named_modules()), "a submodule", where)
    tensors = itertools.chain(case.model.named_parameters(), case.model.named_buffers())
    refuse_unwritable((name for name, _ in tensors), "a tensor of the model", where)
    refuse_unwritable(case.kwargs, "an input", where)


def _nans(tensor: torch.Tensor) -> int:
    numeric = tensor.is_floating_point() or tensor.is_complex()
    if tensor.is_meta or isinstance(tensor, FakeTensor) or not numeric:
        return 0
    return int(torch.isnan(tensor).sum())
