"""One training step, forward and backward, without an update: the same step for any model that
shares the original's parameters, so that their gradients can be compared.

Every run starts from the same buffers and random state, in train mode, in exact FP32, on copies of
the batch. Gradients are asked for, not accumulated: `.grad` of the parameters is never touched.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from amp_convert.capture.gradient_probe import mode_runner, real_gradient
from amp_convert.capture.in_mode import in_mode
from amp_convert.core import device as devices
from amp_convert.core.errors import ModelError
from amp_convert.core.mode import Mode
from amp_convert.core.number_formats import from_name, is_float_tensor, nudged
from amp_convert.core.random_state import RngState, preserved_rng, rng_state
from amp_convert.loading.model_file import kind_of
from amp_convert.loading.user_code import defined_at, user_code
from amp_convert.rewrite.converted_model import ConvertedModel

Loss = Callable[[Any, Any], torch.Tensor]
"""The user's loss: (outputs, target) to a tensor of one element."""


@dataclass(frozen=True, eq=False)
class StepTrace:
    """What one step gives: the loss, dense real gradients by parameter (None for those without),
    still multiplied by the loss scale, and the random state that it ended with."""

    loss: float
    gradients: dict[str, torch.Tensor | None]
    rng_state: RngState


class TrainStep:
    """One batch, (args, kwargs, target), and a loss, to be run through several models.

    `parameters` are those that require gradients, a shared one once, by its first name. `path` is
    the file that the loss stands in.
    """

    def __init__(
        self, converted: ConvertedModel, batch: tuple[Any, Any, Any], loss: Loss, path: str
    ) -> None:
        self._converted, self._model = converted, converted.captured.model
        self._device = converted.captured.device
        self._batch, self._loss, self._path = batch, loss, path
        self.parameters = {n: p for n, p in self._model.named_parameters() if p.requires_grad}
        if not devices.has_values(self._model):
            mend = "Load its weights on a real device."
            raise self._error("the model's tensors hold no values, so it has no gradients", mend)
        if not self.parameters:
            raise self._error("no parameter of the model requires gradients", "Unfreeze some.")

    def eager(self) -> StepTrace:
        """The step of the original itself. Whatever is wrong with the batch, the loss, or the FP32
        gradients (one that is not finite can be compared with nothing) ends as a ModelError."""
        captured = self._converted.captured.in_mode(Mode.TRAIN)
        if captured.is_whole:  # its own words on inputs that do not fit come first
            args, kwargs, _ = self._batch
            mode_runner(captured.regions[0], Mode.TRAIN).inputs(args, kwargs)
        with user_code("a training step of the FP32 model", self._path):
            trace = self.run(self._model, "FP32")
        for name, gradient in trace.gradients.items():
            if gradient is not None and (bad := int((~torch.isfinite(gradient)).sum())):
                raise self._error(
                    "the FP32 model itself has NaN or infinite gradients: "
                    f"{bad} of {gradient.numel()} in {name}",
                    "Correct the model, the loss or that batch first.",
                )
        return trace

    def rounded(self) -> StepTrace:
        """The step of the original with its FP32 parameters rounded to the low dtype, once; those
        beyond its range stay as they are."""
        low = from_name(self._converted.plan.dtype)

        def rounded(data: torch.Tensor) -> torch.Tensor:
            wide = data.to(low).float()
            return torch.where(torch.isfinite(wide), wide, data)

        return self._moved(rounded, "with rounded weights")

    def nudged(self) -> StepTrace:
        """The step of the original with every FP32 parameter moved by one ULP: FP32's own noise."""
        coin = torch.Generator().manual_seed(0)
        return self._moved(lambda data: nudged(data, coin), "nudged by one ULP")

    def _moved(self, change: Callable[[torch.Tensor], torch.Tensor], how: str) -> StepTrace:
        """The step of the original with its FP32 parameters changed, once."""
        floats = [p for p in self._model.parameters() if p.dtype == torch.float32]
        before = [parameter.data for parameter in floats]
        try:
            for parameter, data in zip(floats, before, strict=True):
                parameter.data = change(data)
            with user_code(f"a training step of the FP32 model {how}", self._path):
                return self.run(self._model, f"FP32, {how},")
        finally:
            for parameter, data in zip(floats, before, strict=True):
                parameter.data = data

    def run(self, call: Callable[..., Any], arm: str, scale: float = 1.0) -> StepTrace:
        """The step with `call` in the model's place; `arm`, "FP32" or "mixed", names it."""
        with self._training():
            args, kwargs, target = cloned(self._batch)
            outputs = call(*args, **kwargs)
            value = checked_loss(self._loss, outputs, target, arm, self._path)
            del outputs
            if arm == "FP32":
                require_trainable(value, self._loss, self._path)
            found = self._backward(value, scale)
            state = rng_state(self._device)
        return StepTrace(float(value.detach()), found, state)

    def _backward(self, value: torch.Tensor, scale: float) -> dict[str, torch.Tensor | None]:
        if not value.requires_grad:
            return dict.fromkeys(self.parameters)
        wide = value.to(torch.promote_types(value.dtype, torch.float32)).sum() * scale
        wanted = list(self.parameters.values())
        found: Sequence[torch.Tensor | None] = torch.autograd.grad(wide, wanted, allow_unused=True)
        gradients = [None if gradient is None else real_gradient(gradient) for gradient in found]
        return dict(zip(self.parameters, gradients, strict=True))

    @contextlib.contextmanager
    def _training(self) -> Iterator[None]:
        was_training = self._converted.training
        with (
            in_mode(self._model, training=True),
            devices.exact_fp32(self._device),
            preserved_rng(self._device),
            devices.plain_mode(self._device),
        ):
            self._converted.training = True
            try:
                yield
            finally:
                self._converted.training = was_training

    def _error(self, what: str, mend: str) -> ModelError:
        return ModelError(what, where=os.path.basename(self._path), mend=mend)


def cloned(values: tuple[Any, ...]) -> Any:
    """The same with tensors of its own: a model or loss may write to what it is given."""
    return pytree.tree_map_only(torch.Tensor, torch.clone, values)


def checked_loss(loss: Loss, outputs: Any, target: Any, arm: str, path: str) -> torch.Tensor:
    """The user's loss of the outputs of the model that `arm` names; `path` is the loss's file.

    Raises ModelError when the loss fails, or is no floating point tensor of one element.
    """
    with user_code(f"loss(), given the outputs of the {arm} model,", path):
        value: Any = loss(outputs, target)
    what = ""
    if not isinstance(value, torch.Tensor):
        what = f"{kind_of(value)}, not a tensor"
    elif value.numel() != 1:
        what = f"a tensor of shape {tuple(value.shape)}"
    elif not is_float_tensor(value):
        what = f"a tensor of {value.dtype}"
    if what:
        mend = "Let it return a floating point tensor of one element."
        raise ModelError(f"loss() gives {what}", where=defined_at(loss, path), mend=mend)
    checked: torch.Tensor = value
    return checked


def require_trainable(value: torch.Tensor, loss: Loss, path: str) -> None:
    """Raises ModelError for a loss of the FP32 model that nothing can be trained with."""
    number = float(value.detach())
    if not math.isfinite(number):
        what = f"the FP32 model itself has a loss of {number}"
        mend = "Correct the model, its weights or that batch first."
        raise ModelError(what, where=os.path.basename(path), mend=mend)
    if not value.requires_grad:
        what = "loss() gives a tensor that no parameter has a gradient from"
        mend = "Compute it from the model's outputs, without detach(), item() or no_grad()."
        raise ModelError(what, where=defined_at(loss, path), mend=mend)
