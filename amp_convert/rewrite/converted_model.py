"""The converted model: an `nn.Module` that takes and returns what the original does.

It has the original's parameters, buffers and submodules as its own (shared, not copied, as with
`torch.compile`), so `state_dict()` has the original's keys, optimizers update FP32 master weights,
and `.train()` and `.eval()` switch between two graphs over that one set of weights.

A model that could be captured only in parts runs as it is, with the `forward` of each captured part
replaced while it runs.

`freeze()` gives a module for inference only: whatever the eval graph computes from weights alone,
the casts first of all, is computed once and stored, so weights are kept in low precision and no
call pays for casting them.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from amp_convert.capture.captured import Call, Captured, RegionCall
from amp_convert.capture.graph_call import GraphRunner, UnfitCallError
from amp_convert.capture.hooks import HookWatch, hooks_of, unheard
from amp_convert.capture.in_mode import in_mode
from amp_convert.capture.regions import capture
from amp_convert.core.errors import UsageError
from amp_convert.core.mode import Mode
from amp_convert.core.number_formats import from_name
from amp_convert.core.random_state import preserved_rng
from amp_convert.eager import EagerPlan, no_plan
from amp_convert.plan.plan import Plan
from amp_convert.plan.planner import make_plan
from amp_convert.profile.calibrate import profile
from amp_convert.rewrite.converted_part import Part
from amp_convert.rewrite.frozen_model import MODULE_STATE, FrozenModel, refuse_other_dtypes
from amp_convert.rewrite.graph_execution import runner_of, try_kernels
from amp_convert.rewrite.insert_casts import Rewritten, rewrite
from amp_convert.rewrite.original_methods import under_plan
from amp_convert.rewrite.original_signature import show
from amp_convert.rewrite.stored_twice import stored_twice
from amp_convert.rules.load import rules_of_text

_log = logging.getLogger(__name__)
_MOST_TOLD = 16
"""How many kinds of calls that no graph takes are logged."""


class ConvertedModel(nn.Module):
    """A model in mixed precision. `plan` says what was decided, and why.

    Its submodules are the original's own, so `.train()` and `.eval()` reach those too.
    """

    captured: Captured
    plan: Plan
    rewritten: Mapping[str, Mapping[Mode, Rewritten]]

    def __init__(self, captured: Captured, plan: Plan) -> None:
        super().__init__()
        original = captured.model
        for name in MODULE_STATE:
            self.__dict__[name] = original.__dict__[name]
        self.__dict__["_unfit"] = set[str]()
        self._hold(captured, plan)
        # What was hooked when the graphs were captured is in them.
        self._watch(hooks_of(original), frozenset())
        self.training = original.training
        show(self, inspect.signature(original.forward))

    def _hold(self, captured: Captured, plan: Plan) -> None:
        """Rewrite what was captured as planned. Not through nn.Module: none of this is a
        submodule."""
        self.__dict__["captured"], self.__dict__["plan"] = captured, plan
        self.__dict__.pop("_applied", None)
        rewritten: dict[str, dict[Mode, Rewritten]] = {}
        for region, mode in captured.graphs():
            rewritten.setdefault(region.path, {})[mode] = rewrite(region, mode, plan)
        self.__dict__["rewritten"] = rewritten
        twice = stored_twice(captured, rewritten, from_name(plan.dtype))
        self.__dict__["plan"] = replace(plan, stored_twice=twice)
        self._run_rewritten()

    def _run_rewritten(self) -> None:
        """Make what runs from the rewritten graphs as they are now."""
        captured, exact = self.captured, self.plan.exact
        self.__dict__["_parts"] = {
            region.path: Part(region, self.rewritten[region.path], exact=exact)
            for mode in Mode
            for region in captured.in_mode(mode).regions
        }

    def _watch(self, hooks: Mapping[str, frozenset[int]], apart: frozenset[str]) -> None:
        """Take `hooks` as those that are in the graphs, and `apart` as captured around hooks."""
        watch = HookWatch(self.captured.model, hooks)
        self.__dict__.update(_hooks=hooks, _apart=apart, _watch_of_hooks=watch)

    def heed_hooks(self) -> None:
        """Let submodules that have got a forward hook since, or lost one, be regions of their own:
        a hook does not run inside a graph. The plan's decisions stay, node by node."""
        hooked = self.__dict__["_watch_of_hooks"].changed()
        if hooked == self.__dict__["_apart"]:
            return
        _log.info("captured anew around the hooks on %s", ", ".join(sorted(hooked)) or "nothing")
        captured, plan = self.captured, self.plan
        with unheard(captured.model, hooked):
            anew = capture(
                captured.model, captured.args, captured.kwargs,
                train=self.has_train, apart=hooked, others=captured.others,
            )  # fmt: skip
            rules = rules_of_text(plan.to_toml(), "the plan")
            call = (captured.args, captured.kwargs)
            stats = profile(anew, [call], [], probes=rules.uses_probes)
        self._hold(anew, make_plan(anew, rules, stats, from_name(plan.dtype)))
        self.__dict__["_apart"] = hooked

    @property
    def has_train(self) -> bool:
        """Whether there are graphs to train with."""
        regions = self.captured.in_mode(Mode.TRAIN).regions
        return all(Mode.TRAIN in region.graphs for region in regions)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Takes and returns what the original does, in the original's dtypes. What the graph does
        not take, such as other sizes, the original takes, under the plan, operation by operation.
        """
        if torch.compiler.is_compiling():
            return self._called(args, kwargs)
        self.heed_hooks()
        with no_plan():
            try:
                return self._called(args, kwargs)
            except UnfitCallError as error:
                # Of a model in parts, some have run: in training they have changed what they keep.
                if self.training and not self.captured.in_mode(Mode.TRAIN).is_whole:
                    raise
                unfit = error.what
        return self._as_it_is(unfit, args, kwargs)

    def _called(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        mode = Mode.of(self.training)
        if self.captured.in_mode(mode).is_whole:
            return self.__dict__["_parts"][""](mode, args, kwargs)
        with self._replaced(mode):
            return self.captured.model(*args, **kwargs)

    def _as_it_is(self, unfit: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """A call that the graph does not take, and why: the original takes it, under the plan."""
        told: set[str] = self.__dict__["_unfit"]
        if unfit not in told and len(told) < _MOST_TOLD:
            told.add(unfit)
            _log.warning("%s: such calls run operation by operation, under the plan", unfit)
        model = self.captured.model
        return under_plan(model.__call__, self._eager_plan, model, self)(*args, **kwargs)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        refuse_other_dtypes(self, fn)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def train(self, mode: bool = True) -> ConvertedModel:
        """Switch to the train graph, or to the eval graph; the original follows."""
        super().train(mode)
        self.captured.model.training = mode
        return self

    def eval(self) -> ConvertedModel:
        """Switch to the eval graph; the original follows."""
        return self.train(False)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and files hold the model, its example inputs and the plan; the graphs are captured
        anew, since they cannot be stored."""
        self.heed_hooks()
        captured = self.captured
        parts = (captured.model, captured.args, dict(captured.kwargs), self.plan)
        hooks = (self.__dict__["_hooks"], self.__dict__["_apart"])
        return _recaptured, (*parts, self.has_train, self.training, *hooks, captured.others)

    def freeze(self, *, fold_batch_norm: bool = False) -> FrozenModel:
        """A copy for inference, weights stored in low precision; this model is left as it is.

        With `fold_batch_norm` each BatchNorm that can be goes into the weights before it, as
        `plan.batch_norm_folds` says of the weights at conversion, and `batch_norm_folds` of the
        result of those of now: fewer kernels, and other bits than this model's, which the verdict
        judges where `check` was given `fold_batch_norm=True`. Raises UsageError where the rules ask
        for the bits of FP32 or of autocast.
        """
        self.heed_hooks()
        if fold_batch_norm and self.plan.asks_for_bits:
            raise UsageError(
                "folding BatchNorm changes bits, and these rules ask for those of PyTorch itself",
                mend="Leave it out, or convert under rules that do not.",
            )
        return FrozenModel(self, fold_batch_norm=fold_batch_norm)

    def try_kernels(self, known: Collection[str] = ()) -> dict[str, str]:
        """Run every graph once on its example inputs: the operators that refuse their dtypes, and
        what they say. Raises KernelError for one of the `known`, that were kept in FP32 already."""
        device, refused = self.captured.device, dict[str, str]()
        with torch.no_grad(), preserved_rng(device):
            for region, mode in self.captured.graphs():
                rewritten = self.rewritten[region.path][mode]
                runner = runner_of(rewritten, region.module)
                with in_mode(region.module, training=mode.is_training):
                    given = runner.inputs(region.args, region.kwargs)
                    refused |= try_kernels(rewritten, given, region.traces[mode].values, known)
        return refused

    def runner(self, path: str, mode: Mode = Mode.EVAL) -> GraphRunner:
        """What is called for the captured part at `path` in a mode."""
        part: Part = self.__dict__["_parts"][path]
        return part.runners[mode]

    def calls(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[RegionCall]:
        """What each region receives when this model is called with these inputs, in eval mode."""
        with self._replaced(Mode.EVAL):
            return self.captured.calls(args, kwargs)

    @contextlib.contextmanager
    def _replaced(self, mode: Mode) -> Iterator[None]:
        """The original with the converted parts of a mode, itself in this model's, while this is
        open."""
        model = self.captured.model
        was_training, model.training = model.training, self.training
        regions = self.captured.in_mode(mode).regions
        try:
            for region in regions:
                part = self.__dict__["_parts"][region.path]
                region.module.__dict__["forward"] = part.as_forward(region.module)
            yield
        finally:
            model.training = was_training
            for region in regions:
                region.module.__dict__.pop("forward", None)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "captured" not in self.__dict__:
                raise
            return self._of_original(name)

    def _of_original(self, name: str) -> Any:
        """An attribute of the original. A method of it, such as `generate`, runs under the plan: no
        graph holds it, but what it calls is known operation by operation."""
        original = self.captured.model
        found = getattr(original, name)
        if not inspect.ismethod(found) or found.__self__ is not original:
            return found
        return under_plan(found, self._eager_plan, original, self)

    @property
    def _eager_plan(self) -> EagerPlan:
        if "_applied" not in self.__dict__:
            self.__dict__["_applied"] = self.plan.autocast(self.captured.model)
        applied: EagerPlan = self.__dict__["_applied"]
        return applied


def _recaptured(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    plan: Plan,
    has_train: bool,
    training: bool,
    hooks: Mapping[str, frozenset[int]],
    apart: frozenset[str],
    others: tuple[Call, ...],
) -> ConvertedModel:
    """A copy of a converted model, from what `ConvertedModel.__reduce__` keeps."""
    with unheard(model, apart):
        captured = capture(model, args, kwargs, train=has_train, apart=apart, others=others)
    converted = ConvertedModel(captured, plan)
    converted._watch(hooks, apart)
    converted.training = training
    return converted
