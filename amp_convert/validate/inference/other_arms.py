"""What a batch goes through beside the mixed model: the original, native autocast, FP32 nudged by
one ULP, and the frozen model, without and with BatchNorm folded.

All start from one random state, on copies of the inputs, and leave buffers as they were. Where
autocast or the nudged model fails, it is left out from then on, and the reason kept: autocast bans
or breaks some models, and a model may refuse weights that are not its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from amp_convert.capture.in_mode import in_mode
from amp_convert.core.batches import anew
from amp_convert.core.errors import first_line
from amp_convert.core.mode import Mode
from amp_convert.core.module_state import other_tensors
from amp_convert.core.number_formats import from_name, is_float_tensor, nudged
from amp_convert.core.random_state import set_rng_state
from amp_convert.core.tree_paths import map_tensors, named_leaves
from amp_convert.eager import Counts
from amp_convert.rewrite.converted_model import ConvertedModel

_BRANCHES = "the model has a higher-order operator such as torch.cond, which PyTorch compiles"


@dataclass(frozen=True)
class Planned:
    """The original's outputs under the plan, or why there are none, and what the plan met."""

    outputs: Any
    reason: str
    counts: Counts


class OtherArms:
    """The arms of one comparison; `autocast_reason` and `noise_reason` say why one does not run, ""
    while it does. `kept` names the attributes that the original changes from call to call, `folds`
    says whether there is an arm with BatchNorm folded."""

    def __init__(
        self, converted: ConvertedModel, *, autocast: bool, fold_batch_norm: bool = False
    ) -> None:
        self._converted, self._captured = converted, converted.captured
        self._device = self._captured.device
        self._low = from_name(converted.plan.dtype)
        self.frozen_model = converted.freeze()
        self.folds = fold_batch_norm
        self._folded = converted.freeze(fold_batch_norm=True) if fold_batch_norm else None
        # What writes to no input needs no copies of them.
        whole = self._captured.is_whole
        self._writes = not whole or bool(
            self._captured.regions[0].runner(Mode.EVAL).signature.input_outputs
        )
        self._coin = torch.Generator().manual_seed(0)
        self._nudged: dict[int, torch.Tensor] = {}
        self.autocast_reason = "" if autocast else "it was not asked for"
        self.noise_reason = ""
        self.kept: dict[str, None] = {}

    def original(self, args: Sequence[Any], kwargs: Mapping[str, Any], state: Any) -> Any:
        """The eager FP32 model's outputs from this random state."""
        return self.called(self._captured.model, args, kwargs, state)

    def frozen(self, args: Sequence[Any], kwargs: Mapping[str, Any], state: Any) -> Any:
        """The frozen model's."""
        return self.called(self.frozen_model, args, kwargs, state)

    def folded(self, args: Sequence[Any], kwargs: Mapping[str, Any], state: Any) -> Any:
        """Those of the frozen model with BatchNorm folded, where it `folds`."""
        return self.called(self._folded, args, kwargs, state)

    def mixed(self, args: Sequence[Any], kwargs: Mapping[str, Any], state: Any) -> Any:
        """The converted model's."""
        return self.called(self._converted, args, kwargs, state)

    def planned(self, args: Sequence[Any], kwargs: Mapping[str, Any], state: Any) -> Planned:
        """The original's under the plan."""
        model = self._captured.model
        applied = self._converted.plan.autocast(model)
        if self._captured.has_branches:
            return Planned(None, _BRANCHES, applied.counts)
        outputs, reason = _tried(
            lambda: self.called(model, args, kwargs, state, applied),
            "the original fails under the plan",
        )
        return Planned(outputs, reason, applied.counts)

    def autocast(self, args: Sequence[Any], kwargs: Mapping[str, Any], state: Any) -> Any:
        """The original's under native autocast; None once it has failed."""

        def run() -> Any:
            with torch.autocast(self._device.type, dtype=self._low):
                return self.original(args, kwargs, state)

        if not self.autocast_reason:
            outputs, self.autocast_reason = _tried(run, "the original fails under torch.autocast")
            return outputs
        return None

    def noise(self, args: Sequence[Any], kwargs: Mapping[str, Any], state: Any) -> Any:
        """FP32's outputs for inputs and weights nudged by one ULP; None once it has failed."""

        def run() -> Any:
            given = pytree.tree_map_only(
                torch.Tensor, self._nudged_input, (tuple(args), dict(kwargs))
            )
            set_rng_state(self._device, state)
            if self._captured.is_whole:
                runner = self._captured.regions[0].runner(Mode.EVAL)
                inputs = [
                    self._weight(own) if own is value else value
                    for own, value in zip(runner.tensors(), runner.inputs(*given), strict=True)
                ]  # a buffer that the graph writes to is a copy, and stays as it is
                return runner.results(runner.run(*inputs))
            model = self._captured.model
            with in_mode(model, training=False), other_tensors(model, self._parameter):
                return model(*given[0], **given[1])

        if not self.noise_reason:
            outputs, self.noise_reason = _tried(run, "FP32 fails once it is nudged by one ULP")
            return outputs
        return None

    def _nudged_input(self, tensor: torch.Tensor) -> torch.Tensor:
        """An input nudged, but for whole numbers: codes, counts and masks are exact."""
        if tensor.dtype != torch.float32 or tensor.layout is not torch.strided:
            return tensor
        return torch.where(tensor == tensor.round(), tensor, nudged(tensor, self._coin))

    def _parameter(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._weight(tensor) if isinstance(tensor, nn.Parameter) else tensor

    def _weight(self, tensor: torch.Tensor) -> torch.Tensor:
        """A weight nudged, once for all batches."""
        if id(tensor) not in self._nudged:
            self._nudged[id(tensor)] = nudged(tensor, self._coin)
        return self._nudged[id(tensor)]

    def called(
        self,
        model: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        state: Any,
        around: contextlib.AbstractContextManager[Any] | None = None,
    ) -> Any:
        """A model's outputs from this random state, for inputs of its own, called with `around`
        open; its buffers and those of the original are as before."""
        set_rng_state(self._device, state)
        given = (tuple(args), dict(kwargs))
        if self._writes:
            given = pytree.tree_map_only(torch.Tensor, torch.clone, given)
        args, kwargs = anew(given)
        with in_mode(model, training=False) as attributes:
            try:
                with around or contextlib.nullcontext():
                    return model(*args, **kwargs)
            finally:
                if model is self._captured.model:
                    self.kept.update(dict.fromkeys(attributes.changed()))


def _tried(run: Callable[[], Any], what: str) -> tuple[Any, str]:
    """What `run` gives, or why it does not."""
    try:
        return run(), ""
    except Exception as error:  # noqa: BLE001  a result, and no error
        return None, f"{what}: {first_line(error)}"


def as_dtypes_of(outputs: Any, reference: Any) -> Any:
    """Outputs in the reference's dtypes, as the user's metrics expect them; as they are where their
    structure is another."""
    wanted = [leaf for _, leaf in named_leaves(reference) if isinstance(leaf, torch.Tensor)]
    given = [leaf for _, leaf in named_leaves(outputs) if isinstance(leaf, torch.Tensor)]
    if len(wanted) != len(given):
        return outputs
    dtypes = {id(have): want.dtype for have, want in zip(given, wanted, strict=True)}
    return map_tensors(
        lambda t: t.to(dtypes[id(t)]) if is_float_tensor(t) and id(t) in dtypes else t, outputs
    )
