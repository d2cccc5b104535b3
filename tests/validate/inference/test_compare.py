"""Divergence against computations by hand: errors, outputs, metrics, and what was left alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import amp_convert as amp
from amp_convert.validate.inference.compare import compare
from amp_convert.validate.inference.results import Divergence, NodeDivergence
from tests.bits import tensors
from tests.validate.inference.small_nets import flat, on, rel_l2, two_layers
from tests.validate.inference.test_lockstep import values_of
from tests.zoo import both_dtypes, converted, every_model, example, mode

X = torch.linspace(-2, 2, 40).reshape(5, 8)


def by_op(divergence: Divergence, op: str) -> NodeDivergence:
    [row] = [row for row in divergence.nodes if row.op == op]
    return row


# --- nodes ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_errors_of_a_two_layer_net_by_hand() -> None:
    """Over two batches: sums of squares add up before the root is taken."""
    model, batches = two_layers(), [X, 3 * X + 1]
    divergence = on(amp.convert(model, X), *batches)
    first, _, last = model

    def low(layer: Any, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x.half(), layer.weight.half(), layer.bias.half())

    with torch.no_grad():
        hidden = [first(x) for x in batches]
        hidden_low = [low(first, x) for x in batches]
        want = [last(h.relu()) for h in hidden]
        accumulated = [low(last, h.relu()) for h in hidden_low]
        local = [low(last, h.relu()) for h in hidden]
    assert [row.node for row in divergence.nodes] == [
        "0/aten.linear#0", "1/aten.relu#0", "2/aten.linear#0",
    ]  # fmt: skip
    one, relu, two = divergence.nodes
    assert one.local_rel_l2 == pytest.approx(rel_l2(hidden, hidden_low), rel=1e-12)
    assert one.accumulated_rel_l2 == one.local_rel_l2, "nothing comes before it"
    assert two.local_rel_l2 == pytest.approx(rel_l2(want, local), rel=1e-12)
    assert two.accumulated_rel_l2 == pytest.approx(rel_l2(want, accumulated), rel=1e-12)
    assert two.accumulated_rel_l2 != two.local_rel_l2
    assert relu.accumulated_rel_l2 == pytest.approx(
        rel_l2([h.relu() for h in hidden], [h.relu() for h in hidden_low]), rel=1e-12
    )

    a, b = flat(want), flat(accumulated)
    assert two.sqnr_db == pytest.approx(-20 * np.log10(two.accumulated_rel_l2))
    assert two.cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-12)
    assert two.max_abs_err == np.abs(b - a).max()
    steps = [w.half().numpy().view(np.int16).astype(int) for w in want]
    found = [t.numpy().view(np.int16).astype(int) for t in local]
    assert two.max_ulp == max(np.abs(s - f).max() for s, f in zip(steps, found, strict=True))
    assert (two.nonfinite, two.overflow_fraction) == (0, 0.0)
    assert (two.layer, two.op, two.dtype) == ("2", "aten.linear", "float16")


@every_model
@both_dtypes
def test_accumulated_errors_of_every_node(name: str, dtype: torch.dtype) -> None:
    """Also of those that are taken from another node's row since they move no number."""
    mixed = converted(name, "default", dtype)
    _, args, kwargs = example(name)
    divergence = compare(mixed, [(args, kwargs, None)], autocast=False)
    region, rewritten = mixed.captured.regions[0], mixed.rewritten[""]["eval"]
    with mode(mixed):
        inputs = region.runner("eval").inputs(args, kwargs)
        exact = values_of(region.graphs["eval"].graph_module, inputs)
        low = values_of(rewritten.graph_module, inputs)
    assert [row.node for row in divergence.nodes] == [d.node for d in mixed.plan.eval]
    for row, decision in zip(divergence.nodes, mixed.plan.eval, strict=True):
        want = [t for t in tensors(exact[decision.name]) if t.is_floating_point() and t.numel()]
        have = tensors(low[rewritten.values[decision.name].name])
        have = [t for t in have if t.is_floating_point() and t.numel()]
        assert row.dtype == decision.dtype
        if not want:
            assert row.accumulated_rel_l2 is row.local_rel_l2 is row.max_ulp is None, row
            continue
        a, b = flat(want), flat(have)
        if decision.clamp is not None:  # a mask is compared with what its clamp makes of it
            a = np.where(np.isneginf(a), a, np.maximum(a, decision.clamp))
        finite = np.isfinite(a)
        assert (b[~finite] == a[~finite]).all()
        a, b = a[finite], b[finite]
        error, norm = np.linalg.norm(b - a), np.linalg.norm(a)
        assert row.accumulated_rel_l2 == pytest.approx(error / norm if norm else 0.0, rel=1e-9)
        assert row.max_abs_err == np.abs(b - a).max(initial=0)
        if not decision.low:
            assert row.local_rel_l2 == row.max_ulp == row.underflow_fraction == 0
        elif row.local_rel_l2:
            # One operator on correct inputs: a few roundings, far from what adds up over layers.
            assert row.local_rel_l2 < 20 * torch.finfo(dtype).eps


class Overflowing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.linear(x) * 1e5).exp().clamp(max=10)


@pytest.mark.slow
def test_a_node_that_overflows_is_reported() -> None:
    model = Overflowing().eval()
    divergence = on(amp.convert(model, X, rules="half"), X)
    with torch.no_grad():
        large = (model.linear(X) * 1e5).abs() > 65520
    row = by_op(divergence, "aten.mul")
    count = int(large.sum())
    assert 0 < count < large.numel()
    assert row.nonfinite == count
    assert row.overflow_fraction == pytest.approx(count / large.numel())
    assert not math.isfinite(row.accumulated_rel_l2)
    assert not math.isfinite(row.local_rel_l2)
    assert math.isnan(row.max_ulp)
    assert not math.isfinite(row.max_abs_err)


@pytest.mark.slow
def test_a_node_that_underflows_is_reported() -> None:
    class Underflowing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) * 1e-8

    divergence = on(amp.convert(Underflowing().eval(), X, rules="half"), X)
    row = by_op(divergence, "aten.mul")
    assert row.underflow_fraction == 1.0
    assert row.local_rel_l2 == 1.0
    assert row.cosine == 0.0
    assert divergence.outputs[0].rel_l2 == 1.0


@pytest.mark.slow
def test_memory_that_was_not_written_is_not_measured() -> None:
    """What lay in an empty tensor is no error of anybody's."""

    class Scratch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.linear(x)
            return torch.empty_like(y).index_copy(1, torch.arange(4), y)

    divergence = on(amp.convert(Scratch().eval(), X), X)
    row = next(r for r in divergence.nodes if "empty" in r.op)
    assert row.accumulated_rel_l2 is None
    assert divergence.outputs[0].rel_l2 < 1e-3


class ManyOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(8, 300)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.linear(x)
        return {"y": y, "rest": (y.argmax(-1), [y > 0, None]), "wave": torch.fft.fft(y.float())}


# --- outputs -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_outputs_are_those_of_the_two_models_run_apart() -> None:
    model, batches = ManyOutputs().eval(), [X, X[:2] * 3]
    mixed = amp.convert(model, X, dtype=torch.bfloat16)
    divergence = on(mixed, *batches)
    with torch.no_grad():
        want, have = ([m(x) for x in batches] for m in (model, mixed))
    rows = {row.name: row for row in divergence.outputs}
    assert list(rows) == ["y", "rest[0]", "rest[1][0]", "wave"]

    a, b = (flat([out["y"] for out in outs]) for outs in (want, have))
    y = rows["y"]
    assert (y.dtype, y.elements, y.mismatches, y.nonfinite) == ("float32", 2100, 0, 0)
    assert y.rel_l2 == pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(a), rel=1e-12)
    assert y.cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-12)
    assert y.max_abs_err == np.abs(b - a).max()
    assert y.ref_abs_max == np.abs(a).max()
    for share, quantile in (
        (0.5, y.abs_err_p50), (0.9, y.abs_err_p90), (0.95, y.abs_err_p95), (0.99, y.abs_err_p99),
    ):  # fmt: skip
        exact = np.quantile(np.abs(b - a), share, method="inverted_cdf")
        assert exact <= quantile <= exact * 1.008

    label, sign = rows["rest[0]"], rows["rest[1][0]"]
    assert (label.dtype, label.elements) == ("int64", 7)
    expected = [int((w["rest"][0] != h["rest"][0]).sum()) for w, h in zip(want, have, strict=True)]
    assert label.mismatches == sum(expected)
    flips = [int((w["rest"][1][0] != h["rest"][1][0]).sum())
             for w, h in zip(want, have, strict=True)]  # fmt: skip
    assert (sign.dtype, sign.mismatches) == ("bool", sum(flips))
    wave = rows["wave"]
    assert wave.dtype == "complex64"
    parts = [[torch.view_as_real(out["wave"]) for out in outs] for outs in (want, have)]
    assert wave.rel_l2 == pytest.approx(rel_l2(*parts), rel=1e-12)
    assert wave.elements == 2100
    assert (divergence.batches, divergence.samples) == (2, 7)


@every_model
def test_outputs_of_every_model(name: str) -> None:
    mixed = converted(name)
    original, args, kwargs = example(name)
    divergence = compare(mixed, [(args, kwargs, None)], autocast=False)
    with mode(original, mixed), torch.no_grad():
        want, have = tensors(original(*args, **kwargs)), tensors(mixed(*args, **kwargs))
    assert len(divergence.outputs) == len(want)
    for row, a, b in zip(divergence.outputs, want, have, strict=True):
        assert row.elements == a.numel()
        # The captured graph is the reference: with nn.Transformer, eager's fused kernel differs.
        assert row.rel_l2 == pytest.approx(rel_l2([a], [b]), rel=1e-2)
        assert row.nonfinite == row.ref_nonfinite == 0


@pytest.mark.slow
def test_infinities_of_the_reference_are_counted() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear = nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x).masked_fill(x[:, :4] > 0, -math.inf)

    [row] = on(amp.convert(Masked().eval(), X), X).outputs
    assert row.ref_nonfinite == int((X[:, :4] > 0).sum())
    assert row.nonfinite == 0
    assert 0 < row.rel_l2 < 1e-3
