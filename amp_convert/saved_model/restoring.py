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
    model.load_state_dict(dict(saved.tensors), assign=any(t.is_meta for t in have.values()))


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
