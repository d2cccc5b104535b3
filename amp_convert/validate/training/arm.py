"""One arm of a paired training run: a model's weights, optimizer and random numbers, and its steps.

All arms train the same module object. Each keeps its own tensors and puts them into the module for
its turn (`installed`), so that the captured graphs, which look tensors up at call time, and the
user's own code run as they are, and an arm costs its weights and the optimizer's state, no more.

A step is the loop that PyTorch's documentation of automatic mixed precision gives: forward, loss,
`scaler.scale(loss).backward()` over the accumulated batches, `unscale_`, clipping, `scaler.step`,
`scaler.update`, and the scheduler where the optimizer has stepped. Without loss scaling that is
plain training, bit for bit. The norm of the gradients that the optimizer works with, summed in
FP64, is not finite exactly where the scaler leaves the update out.

What an arm cannot keep apart is state outside parameters and buffers, such as a counter in the
model or a running mean in the loss: all arms write to that.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import nn

from amp_convert.capture.gradient_probe import real_gradient
from amp_convert.core import device as devices
from amp_convert.core.batches import Batch
from amp_convert.core.errors import ModelError, UsageError
from amp_convert.core.files import digests
from amp_convert.core.memory_meter import StorageMeter, held_bytes
from amp_convert.core.module_state import Attributes
from amp_convert.core.number_formats import name_of
from amp_convert.core.random_state import RngState, preserved_rng, rng_state, set_rng_state
from amp_convert.loading.model_file import kind_of
from amp_convert.loading.user_code import defined_at, placed, user_code
from amp_convert.validate.training.arm_specs import FP32, ArmSpec
from amp_convert.validate.training.gradient_step import checked_loss, cloned, require_trainable
from amp_convert.validate.training.recipe import Recipe
from amp_convert.validate.training.weights import Weights


class Arm:
    """One model in training. `call` is what runs in the module's place; `context` is open around
    forward and loss, as `torch.autocast` has to be."""

    def __init__(
        self,
        spec: ArmSpec,
        call: Callable[..., Any],
        weights: Weights,
        initial: Mapping[str, torch.Tensor],
        recipe: Recipe,
        device: torch.device,
        rng: RngState,
        context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        self.spec, self.call, self.context = spec, call, context
        self.rng = rng
        self.tensors = {n: tensor.clone() for n, tensor in initial.items()}
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.scales: list[float] = []
        self.times: list[float] = []
        self.skipped: list[int] = []
        self.peak_bytes: int | None = None
        self.note = ""
        self._state: Attributes | None = None
        self._weights, self._recipe, self._device = weights, recipe, device
        self.scaler = recipe.scaling.scaler(device.type)
        self._where = defined_at(recipe.optimizer, recipe.path)
        with self.installed():
            with user_code("optimizer()", recipe.path):
                self.optimizer: Any = recipe.optimizer(weights.parameters.values())
            weights.check(initial, "optimizer()", self._where)
        self._trained = self._checked_parameters()
        self.scheduler: Any = None
        if recipe.scheduler is not None:
            with user_code("scheduler()", recipe.path):
                self.scheduler = recipe.scheduler(self.optimizer)
            if not callable(getattr(self.scheduler, "step", None)):
                what, where = kind_of(self.scheduler), defined_at(recipe.scheduler, recipe.path)
                mend = "Let it return a scheduler of torch.optim.lr_scheduler."
                raise ModelError(f"scheduler() gives {what}", where=where, mend=mend)

    def _checked_parameters(self) -> list[nn.Parameter]:
        """What the optimizer updates. Raises ModelError unless an arm can keep all of it apart."""
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            what, mend = kind_of(self.optimizer), "Let it return a torch.optim.Optimizer."
            raise ModelError(f"optimizer() gives {what}", where=self._where, mend=mend)
        names = {id(p): name for name, p in self._weights.parameters.items()}
        found = [p for group in self.optimizer.param_groups for p in group["params"]]
        foreign = [p for p in found if id(p) not in names]
        if foreign:
            raise ModelError(
                f"optimizer() also updates a tensor of shape {tuple(foreign[0].shape)} that is "
                "no parameter of the model",
                where=self._where,
                mend="Make it a parameter of the model: each arm has to have its own.",
            )
        odd = [p for p in found if p.is_complex() or p.dtype == torch.float16]
        if odd and self.scaler.is_enabled():
            raise ModelError(
                f"{names[id(odd[0])]} is {name_of(odd[0].dtype)}, which torch.amp.GradScaler "
                "cannot unscale the gradients of",
                where=self._where,
                mend="Give --loss-scale none.",
            )
        return found

    @property
    def name(self) -> str:
        """Its key in reports."""
        return self.spec.name

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """The module has this arm's tensors and attributes, and PyTorch its random state, while
        this is open."""
        outer, before = rng_state(self._device), self._weights.get()
        state = Attributes(self._weights.model)
        self._weights.put(self.tensors)
        if self._state is not None:
            self._state.restore()
        set_rng_state(self._device, self.rng)
        try:
            yield
        finally:
            self.tensors, self.rng = self._weights.get(), rng_state(self._device)
            self._state = Attributes(self._weights.model)
            state.restore()
            self._weights.put(before)
            set_rng_state(self._device, outer)

    def step(self, batches: Sequence[Batch], *, meter: bool = False) -> None:
        """One update from these batches; `meter` also measures memory, which costs time."""
        before = dict(self.tensors)
        self.scales.append(self.scaler.get_scale())
        with self.installed():
            with StorageMeter() if meter else contextlib.nullcontext() as measured:
                resident = self._resident_bytes()
                forward = devices.milliseconds(lambda: self._backward(batches), self._device)
                self.norms.append(self._norm())
                update = devices.milliseconds(self._update, self._device)
            self._weights.check(before, "the optimizer's step", self._where)
        if measured is not None:
            self.peak_bytes = resident + measured.peak
        else:
            self.times.append(forward + update)

    @contextlib.contextmanager
    def given(self, batches: str) -> Iterator[None]:
        """Errors inside this are due to `batches`, a noun, or to the user's model: unless it is the
        converted one that runs. What fails in that alone is ours."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(placed(batches))
            if not self.spec.low:
                what = f"the FP32 model, given {batches},"
                mend = "Make it what its forward() takes; --debug shows the traceback."
                stack.enter_context(user_code(what, self._recipe.path, mend))
            yield

    def _backward(self, batches: Sequence[Batch]) -> None:
        total, recipe = 0.0, self._recipe
        for batch in batches:
            args, kwargs, target = cloned(batch)
            with self.context():
                outputs = self.call(*args, **kwargs)
                loss = checked_loss(recipe.loss, outputs, target, self.spec.title, recipe.path)
            del outputs
            if self.spec == FP32 and not self.losses:
                require_trainable(loss, recipe.loss, recipe.path)
            total += float(loss.detach())
            wide = loss.to(torch.promote_types(loss.dtype, torch.float32)).sum()
            if wide.requires_grad:
                share = wide if len(batches) == 1 else wide / len(batches)
                self.scaler.scale(share).backward()
        self.losses.append(total / len(batches))
        if self._gradients():
            self.scaler.unscale_(self.optimizer)

    def _update(self) -> None:
        clip = self._recipe.clip_norm
        with user_code("the optimizer's step", self._recipe.path):
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(self._trained, clip)
            if self._gradients():
                self.scaler.step(self.optimizer)
                self.scaler.update()
                if self._recipe.scaling.kind == "static":
                    self.scaler.update(self._recipe.scaling.initial)
        finite = math.isfinite(self.norms[-1])
        if not finite and self.scaler.is_enabled():
            self.skipped.append(len(self.norms))
        elif self.scheduler is not None:
            # One kind asks how training goes; a step's own loss is what there is to tell it.
            plateau = isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
            with user_code("the scheduler's step", self._recipe.path):
                self.scheduler.step(*([self.losses[-1]] if plateau else []))
        self.clear()

    def clear(self) -> None:
        """Drop all gradients: the next arm has the same parameters, and they need not all be this
        optimizer's."""
        for parameter in self._weights.parameters.values():
            parameter.grad = None

    def _gradients(self) -> list[torch.Tensor]:
        return [p.grad for p in self._trained if p.grad is not None]

    def _norm(self) -> float:
        norms = [
            torch.linalg.vector_norm(real_gradient(gradient), dtype=torch.float64)
            for gradient in self._gradients()
        ]
        return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0

    def _resident_bytes(self) -> int:
        """The bytes of weights, buffers and the optimizer's state, each storage counted once."""
        state = [v for s in self.optimizer.state.values() for v in s.values()]
        tensors = (*self.tensors.values(), *(v for v in state if isinstance(v, torch.Tensor)))
        return held_bytes(tensors)

    @property
    def scale_history(self) -> str:
        """The loss scales in order, each once where it stays: "65536, 32768"."""
        values = [*self.scales, self.scaler.get_scale()]
        changes = [v for i, v in enumerate(values) if i == 0 or v != values[i - 1]]
        shown = [f"{value:g}" for value in changes]
        return ", ".join(shown if len(shown) <= 24 else [*shown[:12], "...", *shown[-11:]])

    @property
    def milliseconds(self) -> float | None:
        """The median time of a step, the first one left out."""
        return statistics.median(self.times[1:]) if len(self.times) > 1 else None

    def sha256(self) -> str:
        """The digest of weights and buffers, names and all."""
        return digests.of_tensors(self.tensors.items())

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on, and the records, for a checkpoint.

        Raises UsageError for a scheduler that does not tell its state.
        """
        for call in ("state_dict", "load_state_dict"):
            if self.scheduler is not None and not hasattr(self.scheduler, call):
                what = f"scheduler() gives {kind_of(self.scheduler)} without {call}()"
                raise UsageError(what, mend="A checkpoint needs it; else leave --checkpoint out.")
        return {
            "tensors": dict(self.tensors),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": {name: getattr(self.rng, name) for name in _RNG},
            **{name: getattr(self, name) for name in _RECORDS},
        }

    def _restore_dtypes(self, stored: Mapping[int, Any]) -> None:
        """Undo that `load_state_dict` casts an optimizer's tensors to their parameters' dtype."""
        for index, parameter in enumerate(self._trained):
            held = self.optimizer.state.get(parameter, {})
            for key, value in stored.get(index, {}).items():
                if isinstance(value, torch.Tensor) and held[key].dtype != value.dtype:
                    held[key] = value.to(held[key].device, copy=True)

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned. Raises whatever comes of anything else."""
        for name, tensor in self.tensors.items():
            stored = state["tensors"][name]
            if (stored.shape, stored.dtype) != (tensor.shape, tensor.dtype):
                raise ValueError(name)
            tensor.copy_(stored)
        self.optimizer.load_state_dict(state["optimizer"])
        self._restore_dtypes(state["optimizer"]["state"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        if self.scaler.is_enabled():
            if not all(value >= 0 for value in state["scaler"].values()):
                raise ValueError("scaler")
            self.scaler.load_state_dict(state["scaler"])
        self.rng = RngState(**state["rng"])
        with preserved_rng(self._device):  # now, and not at the first step
            set_rng_state(self._device, self.rng)
        for name, kind in _RECORDS.items():
            setattr(self, name, TypeAdapter(kind).validate_python(state[name], strict=True))


_RNG = ("cpu", "device", "python", "numpy")
_RECORDS: dict[str, Any] = {
    **dict.fromkeys(("losses", "norms", "scales", "times"), list[float]),
    "skipped": list[int],
    "peak_bytes": int | None,
    "note": str,
}
