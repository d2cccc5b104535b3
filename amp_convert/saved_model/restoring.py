"""A saved model put back: `Checkpoint` and the user's model -> that model with the saved weights,
and whether the plan made of it is the one that was saved."""

from __future__ import annotations

import torch
from torch import nn

from amp_convert.core.errors import ModelError
from amp_convert.plan.plan import Plan
from amp_convert.rules.load import rules_of_text
from amp_convert.rules.rule import Target
from amp_convert.rules.rule_set import Rules
from amp_convert.saved_model.checkpoint import Checkpoint

_MEND = "Give an instance of the class that was saved, built as it was."


def fill(model: nn.Module, saved: Checkpoint) -> None:
    """Copy the saved weights into `model`, which is left alone where it has others. Raises
    ModelError then."""
    have = {k: v for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
    if any(tensor.is_meta for tensor in have.values()):
        what = "the model has no memory yet: it is on the meta device"
        raise ModelError(what, where=saved.model_class, mend="Build it on the device to train on.")
    for name in sorted(have.keys() ^ saved.tensors.keys()):
        which = "the file has no" if name in have else "the model has no"
        raise ModelError(f"{which} {name}", where=saved.model_class, mend=_MEND)
    for name, tensor in have.items():
        want = saved.tensors[name]
        if (tensor.shape, tensor.dtype) != (want.shape, want.dtype):
            raise ModelError(
                f"{name} is {_kind(tensor)} in the model, and {_kind(want)} in the file",
                where=saved.model_class,
                mend=_MEND,
            )
    _refuse_other_ties(model, saved)
    model.load_state_dict(dict(saved.tensors))


def _refuse_other_ties(model: nn.Module, saved: Checkpoint) -> None:
    """Raises ModelError where names are of one tensor in the model, and of two in the file, or the
    other way round."""
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    names: dict[int, list[str]] = {}
    for name, tensor in named:
        if name in saved.tensors:
            names.setdefault(id(tensor), []).append(name)
    for found in names.values():
        firsts = {saved.aliases.get(name, name) for name in found}
        if len(firsts) > 1:
            what = (
                f"{' and '.join(sorted(firsts))} are one tensor in the model, and not in the file"
            )
            raise ModelError(what, where=saved.model_class, mend=_MEND)
    for name, first in saved.aliases.items():
        if not any(name in found and first in found for found in names.values()):
            what = f"{first} and {name} are one tensor in the file, and not in the model"
            raise ModelError(what, where=saved.model_class, mend=_MEND)


def refuse_other(plan: Plan, saved: Rules) -> None:
    """Raises ModelError where a plan, made of the saved one's rules, has a node that those do not
    name, or lacks one that they do: another model's, which the names of its weights did not tell.
    """
    have = {decision.node for decision in (*plan.eval, *plan.train)}
    decided = {decision.node for decision in (*plan.eval, *plan.train) if decision.decided}
    named = {rule.pattern for rule in saved.rules if rule.target is Target.NODE}
    for node in sorted((named - have) | (decided - named)):
        which = "which the saved plan does not know" if node in have else "of the saved plan"
        what = "computes" if node in have else "does not compute"
        raise ModelError(f"the model {what} {node}, {which}", mend=_MEND)
    _refuse_other_treatment(plan, saved)


def _refuse_other_treatment(plan: Plan, saved: Rules) -> None:
    made = rules_of_text(plan.to_toml(), saved.name).made_for
    for what in ("clamped", "rescaled"):
        differ = set(getattr(made, what)) ^ set(getattr(saved.made_for, what))
        for node in sorted(differ):
            raise ModelError(
                f"{node} is {what} in one of the two, the saved plan and that for these inputs",
                mend="Give calibration batches like those that it was converted with.",
            )


def _kind(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"
