"""One branch of a condition is run, and its gradients are the model's."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import amp_convert as amp
from tests.bits import same_bits
from tests.capture.test_branches import (
    FUNCTIONS,
    Branching,
    X,
    nested,
    plain,
    several_results,
    two_dtypes,
)
from tests.rewrite.kernels.running import running, targets


class Products(TorchDispatchMode):
    """The dtypes of the products that run."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.addmm.default, torch.ops.aten.linear.default):
            self.dtypes.append(args[1].dtype)
        return func(*args, **(kwargs or {}))


def results(model: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Any:
    x = x.clone().requires_grad_()
    out = model(x)
    outputs = out if isinstance(out, tuple) else (out,)
    wanted = [x, *parameters.values()]
    total = sum(o.sum() for o in outputs if o.is_floating_point())
    return [o.detach() for o in outputs], torch.autograd.grad(total, wanted, allow_unused=True)


@pytest.mark.slow
@pytest.mark.parametrize("function", FUNCTIONS)
def test_fp32_throughout_is_eager_bit_for_bit(function: Callable[..., Any]) -> None:
    model = Branching(function)
    mixed = amp.convert(model, (X,), rules="fp32")
    parameters = dict(model.named_parameters())
    for training in (False, True):
        mixed.train(training)
        for x in (X, -X):
            want, have = (results(m, parameters, x) for m in (model, mixed))
            for a, b in zip((*want[0], *want[1]), (*have[0], *have[1]), strict=True):
                assert (a is None and b is None) or same_bits(a, b)


@pytest.mark.slow
def test_the_caller_may_write_to_a_result() -> None:
    model = Branching(plain)
    mixed = amp.convert(model, (X,), rules="fp32")
    for x in (X, -X):
        want, have = model(x).add_(1), mixed(x).add_(1)
        assert torch.equal(want, have)
        have.sum().backward()


@pytest.mark.slow
def test_a_loss_of_one_of_the_results_has_gradients_for_all() -> None:
    model = Branching(several_results)
    mixed = amp.convert(model, (X,), rules="fp32")
    for each in (model, mixed):
        model.zero_grad()
        each(X)[1].sum().backward()
        assert all(p.grad is not None for p in model.parameters())


@pytest.mark.slow
def test_autocasts_plan_takes_one_branch_as_well() -> None:
    """Its two sides have two dtypes."""
    mixed = amp.convert(Branching(two_dtypes), (X,), dtype=torch.bfloat16, rules="autocast")
    for mode in ("eval", "train"):
        assert "where" not in targets(running(mixed, mode).tuned)


@pytest.mark.slow
@pytest.mark.parametrize("function", [several_results, nested])
def test_one_branch_alone_is_computed_in_low_precision(function: Callable[..., Any]) -> None:
    mixed = amp.convert(Branching(function), (X,), dtype=torch.bfloat16)
    frozen = mixed.freeze()
    for model in (mixed.train(), mixed.eval(), frozen):
        with torch.no_grad(), Products() as seen:
            model(X)
        assert seen.dtypes == [torch.bfloat16] * 2
    for mode in ("eval", "train"):  # the one before the condition
        assert targets(running(mixed, mode).tuned).count("linear") == 1


@pytest.mark.slow
def test_copies_and_files_choose_as_well() -> None:
    frozen = amp.convert(Branching(nested).eval(), (X,), dtype=torch.bfloat16).freeze()
    with torch.no_grad():
        want = [frozen(x) for x in (X, -X)]
        for again in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
            assert all(torch.equal(a, again(x)) for a, x in zip(want, (X, -X), strict=True))
            with Products() as seen:
                again(-X)
            assert len(seen.dtypes) == 1


@pytest.mark.slow
def test_compilers_and_exporters_see_a_condition() -> None:
    frozen = amp.convert(Branching(plain).eval(), (X,), dtype=torch.bfloat16).freeze()
    with torch.no_grad():
        want = [frozen(x) for x in (X, -X)]
        compiled = torch.compile(frozen, backend="eager", fullgraph=True)
        assert all(torch.equal(a, compiled(x)) for a, x in zip(want, (X, -X), strict=True))
        program = torch.export.export(frozen, (X,))
        calls = [node.target for node in program.graph.nodes]
        assert torch.ops.higher_order.cond in calls
        again = program.module()
        assert all(torch.equal(a, again(x)) for a, x in zip(want, (X, -X), strict=True))


@pytest.mark.slow
def test_a_batch_of_models_computes_both() -> None:
    """Under vmap nobody can tell which branch it is."""
    model = Branching(plain).eval()
    mixed = amp.convert(model, (X,), rules="fp32")
    with torch.no_grad():
        have = torch.vmap(mixed)(torch.stack([X, -X]))
    assert torch.equal(have, torch.stack([model(X), model(-X)]))
