"""The model under the real Inductor: what is compiled is judged, and what that breaks shows."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import amp_convert as amp
from amp_convert.core.number_formats import from_name
from amp_convert.validate.compiled.compare import StepToCompile, compare_compiled
from amp_convert.validate.compiled.results import CompiledParity, OperatorCount
from amp_convert.validate.compiled.watch import PRODUCT, lowered, raised

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("c++"), reason="Inductor needs a C++ compiler"),
]
BF16 = torch.bfloat16


class Attention(nn.Module):
    """One head, its softmax in FP32 by the model's own word, dropout behind it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        self.out, self.dropout = nn.Linear(16, 16), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        weights = torch.softmax((q @ k.transpose(-1, -2)).float() / 4, -1)
        return x + self.out(self.dropout(weights).to(v.dtype) @ v)


X = torch.randn(4, 8, 16, generator=torch.Generator().manual_seed(1))
BATCHES = [(X,), (X[:2],), (X[:3],)]


def loss(outputs: Tensor, target: Tensor) -> Tensor:
    return (outputs - target).square().mean()


def parity(model: nn.Module, **more: Any) -> CompiledParity:
    mixed = amp.convert(model, X, dtype=BF16)
    batches = [(args, {}, None) for args in BATCHES]
    return compare_compiled(mixed, batches, (X,), {}, **more)


def by_op(rows: tuple[OperatorCount, ...]) -> dict[tuple[str, str], tuple[int, int]]:
    return {(row.op, row.dtype): (row.traced, row.compiled) for row in rows}


def test_a_compiled_model_is_judged_in_inference_and_in_a_step() -> None:
    model = Attention().train()
    step = StepToCompile(((X,), {}, X.flip(0)), loss, "", 1.0)
    found = parity(model, step=step)
    assert (found.failure, found.no_step, found.batches) == ("", "", 3)
    [output] = found.outputs
    assert 0 < output.rel_l2 < 5e-3
    assert output.elements == sum(args[0].numel() for args in BATCHES)
    ops = by_op(found.ops)
    # Once for the first size, and once for those that vary.
    assert ops[PRODUCT, "bfloat16"] == (12, 12)
    assert (PRODUCT, "float32") not in ops
    assert ops["aten.exp", "float32"] == (2, 2)
    assert ("aten.exp", "bfloat16") not in ops
    assert lowered(found.ops) == raised(found.ops) == []
    assert found.step is not None
    # Dropout hits the same elements as in FP32: else they would be far apart.
    assert 0 < found.step.rel_l2 < 2 * found.step.eager_rel_l2 < 0.1
    assert found.step.missing == ()
    assert by_op(found.step.ops)[PRODUCT, "bfloat16"][0] == 15  # 6, and 9 backward
    assert lowered(found.step.ops) == raised(found.step.ops) == []
    timed = [{c.arm for c in costs if c.milliseconds} for costs in (found.forward, found.training)]
    assert timed == [{"fp32", "autocast", "all low", "frozen"}, {"fp32", "autocast", "mixed"}]
    assert model.training
    assert all(p.grad is None for p in model.parameters())


@pytest.fixture
def island_dropped() -> Iterator[None]:
    """A pass that computes exponentials in low precision."""

    def narrow(graph: fx.Graph) -> None:
        aten, low = torch.ops.aten, from_name("bfloat16")
        for node in list(graph.find_nodes(op="call_function", target=aten.exp.default)):
            value = node.meta["val"]
            with graph.inserting_before(node):
                cast = torch.ops.prims.convert_element_type.default
                given = graph.call_function(cast, (node.args[0], low))
                given.meta["val"] = value.to(low)
            with graph.inserting_after(node):
                back = graph.call_function(cast, (node, torch.float32))
                back.meta["val"] = value
            node.replace_all_uses_with(back, lambda user, back=back: user is not back)
            node.args, node.meta["val"] = (given,), value.to(low)

    with torch._inductor.config.patch(post_grad_custom_pre_pass=narrow):
        yield


@pytest.mark.usefixtures("island_dropped")
def test_an_island_that_the_compiler_drops_is_seen() -> None:
    run = amp.check(Attention().eval(), X, dtype=BF16, compile=True)
    checks = {check.name: check for check in run.verdict.checks}
    check = checks["compiled.precision"]
    assert (check.status, run.exit_code) == ("fail", 1)
    assert check.reason.endswith("aten.exp in bfloat16, 1 where 0 were traced")


def test_what_is_compiled_wrong_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's own switch for a wrong relu."""
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)).eval()
    assert amp.check(model, X, dtype=BF16, compile=True).exit_code == 0
    with torch._inductor.config.patch({"cpp.inject_relu_bug_TESTING_ONLY": "accuracy"}):
        run = amp.check(model, X, dtype=BF16, compile=True)
    failed = [check.name for check in run.verdict.checks if check.status == "fail"]
    assert failed == ["compiled.outputs"]


def test_a_compiler_that_fails_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", missing)
    run = amp.check(Attention().eval(), X, dtype=BF16, compile=True)
    [check] = [check for check in run.verdict.checks if check.name.startswith("compiled")]
    assert (check.status, check.required, run.exit_code) == ("unchecked", True, 3)
    assert check.reason == "torch.compile fails: RuntimeError: no compiler here"


def test_nothing_compiled_is_nothing_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Dynamo is switched off, `torch.compile` gives the model that it was given."""
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    run = amp.check(Attention().eval(), X, dtype=BF16, compile=True)
    [check] = [check for check in run.verdict.checks if check.name.startswith("compiled")]
    assert (check.status, check.required, run.exit_code) == ("unchecked", True, 3)
    assert check.reason.endswith("no graph has reached Inductor")


def test_the_users_metrics_are_those_of_the_compiled_model() -> None:
    def metrics(outputs: Tensor, _: Any) -> dict[str, float]:
        return {"mean": float(outputs.mean())}

    model = Attention().eval()
    batches = [(X, None), (X.flip(0), None)]
    run = amp.check(model, X, dtype=BF16, compile=True, eval_batches=batches, metrics=metrics)
    found = run.report.compiled
    assert isinstance(found, CompiledParity)
    [pair] = found.metrics
    with torch.no_grad():
        torch.testing.assert_close(pair.fp32, float(model(X).mean()), rtol=1e-4, atol=1e-6)
    assert pair.mixed != pair.fp32


def test_a_model_that_is_compiled_anew_too_often_is_not_judged_by_eager() -> None:
    class Counts(nn.Module):
        """Compiled anew for every value of a number."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = Attention()

        def forward(self, x: Tensor, n: int) -> Tensor:
            return self.inner(x) * n

    model = Counts().eval()
    mixed = amp.convert(model, (X, 1), dtype=BF16, train=False)
    with torch._dynamo.config.patch(recompile_limit=1, automatic_dynamic_shapes=False):
        batches = [((X[:size], 1), {}, None) for size in (4, 3, 2)]
        found = compare_compiled(mixed, batches, (X, 1), {})
    assert found.outputs == ()
    assert found.failure.startswith("torch.compile fails: FailOnRecompileLimitHit")


def test_nothing_stays_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    resets: list[bool] = []
    own = torch._dynamo.reset
    monkeypatch.setattr(torch._dynamo, "reset", lambda: (resets.append(True), own())[1])
    parity(nn.Linear(16, 16).eval())
    assert len(resets) == 2


def test_the_report_shows_it(tmp_path: Any) -> None:
    out = tmp_path / "report"
    amp.check(Attention().eval(), X, dtype=BF16, compile=True, out=out)
    text = (out / "report.md").read_text()
    section = text[text.index("## Under torch.compile") :]
    assert "| forward |" in section
    assert "- output error of the compiled frozen model: " in section
    assert "Under torch.compile" in (out / "report.html").read_text()
