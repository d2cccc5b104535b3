"""A plan applied to the model as it is. Oracles: the converted model, eager PyTorch and its own
autocast, bit for bit; what is dispatched, counted."""

from __future__ import annotations

import copy
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import amp_convert as amp
from amp_convert.core.errors import UnsupportedModelError, UsageError
from amp_convert.core.op_facts import HEAVY, facts_of_target
from amp_convert.plan.saved_plan import is_scaled
from amp_convert.rules.load import load_rules
from tests import zoo
from tests.plan.test_clamp_masks import converted, staged
from tests.plan.test_rescaling import feed_forward

F16, BF16 = torch.float16, torch.bfloat16
X = torch.linspace(-2, 2, 32).reshape(4, 8)


class Net(nn.Module):
    """A residual block, a norm, and a head that rules can keep in FP32."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.b(torch.relu(self.a(x))) + x))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.a(x))

    def stream(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        for row in x:
            yield self.a(row)

    async def later(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x)


def net(kind: type[nn.Module] = Net) -> Any:
    torch.manual_seed(0)
    return kind().eval()


class Products(TorchDispatchMode):
    """Counts the dtypes that products compute in."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if facts_of_target(func).is_a(*HEAVY):
            self.dtypes[result.dtype] += 1
        return result


def products_of(call: Callable[[], Any]) -> dict[torch.dtype, int]:
    with Products() as seen:
        call()
    return dict(seen.dtypes)


# --- bits ----------------------------------------------------------------------------------------


def as_given(tree: Any, want: Any) -> None:
    """The floating point values of two trees are the same numbers; a cache may hold low ones."""
    for path, expected in zoo.leaves(want).items():
        if isinstance(expected, torch.Tensor):
            found = zoo.leaves(tree)[path]
            assert zoo.same_bits(expected, found.to(expected.dtype)), path


@zoo.every_model
@pytest.mark.parametrize("rules", ["default", "fp32", "autocast"])
@zoo.both_dtypes
def test_its_bits_are_those_of_the_converted_model(
    name: str, rules: str, dtype: torch.dtype
) -> None:
    model, args, kwargs = zoo.example(name)
    mixed = zoo.converted(name, rules, dtype)
    with zoo.mode(model, mixed), torch.no_grad():
        want = mixed(*args, **kwargs)
        with mixed.plan.autocast(model) as applied:
            have = model(*args, **kwargs)
    as_given(have, want)
    known = {"aten._grouped_mm", "aten.clamp"}  # of mixtral and whisper, by paths of their own
    assert {op for _, op in applied.counts.unplanned} <= known
    assert not applied.counts.held_back


@zoo.every_model
def test_a_training_step_is_that_of_the_converted_model(name: str) -> None:
    """The same outputs, and gradients that are no further off than mixed precision is itself: where
    a value has several readers, eager code casts it for each."""
    model, args, kwargs = zoo.example(name)
    mixed = zoo.converted(name, "default", BF16)

    def step(call: Callable[..., Any]) -> tuple[list[torch.Tensor], torch.Tensor]:
        torch.manual_seed(0)
        found = [t for t in zoo.tensors(call(*args, **kwargs)) if t.requires_grad]
        sum(t.float().square().mean() for t in found).backward()  # type: ignore[union-attr]
        grads = [p.grad.flatten().double() for p in model.parameters() if p.grad is not None]
        model.zero_grad(set_to_none=True)
        return [t.detach() for t in found], torch.cat(grads)

    def planned(*args: Any, **kwargs: Any) -> Any:
        with mixed.plan.autocast(model):
            return model(*args, **kwargs)

    with zoo.mode(model, mixed, train=True):
        (want, exact), (have, near), (_, fp32) = step(mixed), step(planned), step(model)
    assert all(zoo.same_bits(w, h.to(w.dtype)) for w, h in zip(want, have, strict=True))
    assert (near - exact).norm() <= (exact - fp32).norm()


def test_fp32_rules_change_no_bit_and_autocasts_are_autocasts() -> None:
    model = net()
    same = amp.convert(model, X, rules="fp32").plan
    native = amp.convert(model, X, dtype=BF16, rules="autocast").plan
    with torch.no_grad():
        with same.autocast(model):
            assert zoo.same_bits(model(X * 3), F.linear(X, X[:3]) * 0 + _plainly(model, X * 3))
        with torch.autocast("cpu", dtype=BF16):
            want = model(X * 3)
        with native.autocast(model):
            assert zoo.same_bits(model(X * 3), want.float())


def _plainly(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch._C.DisableTorchFunction():
        return model(x)


# --- what no graph holds -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("cache", [None, "static"])
@zoo.both_dtypes
def test_generate_runs_as_planned(name: str, cache: str | None, dtype: torch.dtype) -> None:
    """100 prompts of 32 tokens: all products compute low, and the greedy tokens are FP32's at least
    as often as those of the model all in the low dtype."""
    model, _, _ = zoo.example(name)
    mixed = zoo.converted(name, "default", dtype)
    low = copy.deepcopy(model).to(dtype)
    ids = torch.randint(3, 99, (100, 32), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    if cache is not None:
        options["cache_implementation"] = cache
    with zoo.mode(model, mixed, low):
        seen = products_of(lambda: mixed.generate(ids[:2], **options))
        want = model.generate(ids, **options)
        ours, all_low = (each.generate(ids, **options) == want for each in (mixed, low))
    assert set(seen) == {dtype}
    assert ours.float().mean() >= all_low.float().mean()
    assert ours.float().mean() > 0.9


class Looping(Net):
    """Its control flow depends on values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(1 + int(x.abs().max())):
            x = self.a(x)
        return self.head(x)


def test_other_shapes_control_flow_and_hooks_run_as_planned() -> None:
    model = net()
    plan = amp.convert(model, X).plan
    seen: list[torch.dtype] = []
    handle = model.b.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with plan.autocast(model) as applied, torch.no_grad():
        found = products_of(lambda: model(torch.ones(2, 5, 8)))
    assert found == {F16: 3}
    assert seen == [F16]
    assert applied.counts.unplanned == {}
    handle.remove()

    looping = net(Looping)
    kept = amp.convert(looping, X)  # in parts
    with kept.plan.autocast(looping) as applied, torch.no_grad():
        assert set(products_of(lambda: looping(X))) == {F16}
    assert applied.counts.unplanned  # the loop calls `a` more often than the plan has it


def test_a_layer_that_rules_keep_stays_fp32_whatever_the_shape(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        'extends = "default"\n[[rule]]\nlayer = "head"\ncategory = "deny"\nreason = "mine"\n'
    )
    model = net()
    plan = amp.convert(model, X, rules=[file]).plan
    with plan.autocast(model), torch.no_grad():
        assert products_of(lambda: model(torch.ones(3, 4, 8))) == {F16: 2, torch.float32: 1}


def test_calls_that_are_no_node_take_the_rule_for_their_operator_and_are_counted() -> None:
    model = net()
    plan = amp.convert(model, X).plan
    weight = torch.randn(8, 8)
    with plan.autocast(model) as applied:
        assert (X @ weight).dtype is F16
        assert X.exp().dtype is torch.float32
        assert X.half().softmax(-1).dtype is F16
        assert X.half().view(8, 4).dtype is F16
        assert torch.cat([X, X.half()]).dtype is torch.float32
    assert applied.counts.unplanned == {
        ("", "aten.matmul"): 1,
        ("", "aten.exp"): 1,
        ("", "aten.softmax"): 1,
    }


def test_masks_are_clamped_as_planned() -> None:
    found = staged(-1e9)
    model, inputs = found.captured.model, (found.args[0], found.args[1])
    mixed = converted(found, load_rules(["default"]), F16)
    assert any(d.clamp for d in mixed.plan.eval)
    with torch.no_grad(), mixed.plan.autocast(model):
        have = model(*inputs)
    assert have.isfinite().all()
    assert zoo.same_bits(have, mixed(*inputs).detach())


def test_what_the_plan_scales_runs_in_fp32() -> None:
    """The factor of one call is taken back by another: that takes a graph."""
    of = feed_forward()
    mixed = amp.convert(of.captured.model, (of.args[0],))
    assert any(is_scaled(d) for d in mixed.plan.eval)
    with torch.no_grad(), mixed.plan.autocast(of.captured.model):
        found = of.captured.model(of.args[0])
    want = of.captured.model(of.args[0]).detach()
    assert found.isfinite().all()
    assert (found - want).norm() < 1e-2 * want.norm()


class InPlace(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        y += self.b.weight.mean(0).exp()  # FP32, which floods what it is added to
        return self.head(torch.relu_(y))


def test_what_writes_in_place_keeps_its_dtype_and_is_counted() -> None:
    model = net(InPlace)
    mixed = amp.convert(model, X)
    with torch.no_grad(), mixed.plan.autocast(model) as applied:
        found = model(X)
    low = {d.node: d.low for d in mixed.plan.eval}
    assert not low["/aten.add#0"]
    assert ("", "aten.add") in applied.counts.held_back
    assert (found - mixed(X)).abs().max() < 1e-2


@pytest.mark.parametrize("recurrent", [nn.LSTM, nn.GRU])
def test_layers_that_ask_for_their_weights_dtype(recurrent: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), recurrent(8, 8, batch_first=True)).eval()
    x = X.reshape(2, 2, 8)
    mixed = amp.convert(model, x)
    with torch.no_grad(), mixed.plan.autocast(model):
        found = model(x)
    with torch.no_grad():
        zoo.assert_same_bits(mixed(x), found)


class WithScript(Net):
    def __init__(self) -> None:
        super().__init__()
        self.b = torch.jit.script(nn.Linear(8, 8))


def test_a_scripted_part_gets_fp32() -> None:
    model = net(WithScript)
    mixed = amp.convert(model, X)
    with torch.no_grad(), mixed.plan.autocast(model):
        found = model(X)
    with torch.no_grad():
        assert (found - mixed(X)).abs().max() < 1e-3


# --- contexts ------------------------------------------------------------------------------------


def test_as_a_decorator_from_a_saved_plan_without_the_model(tmp_path: Path) -> None:
    model = net()
    mixed = amp.convert(model, X)
    file = tmp_path / "plan.toml"
    file.write_text(mixed.plan.to_toml())

    @amp.autocast(file)
    def run(x: torch.Tensor) -> torch.Tensor:
        """Runs."""
        return model(x)

    with torch.no_grad():
        zoo.assert_same_bits(mixed(X), run(X))
        zoo.assert_same_bits(mixed(X), run(X))
        with amp.autocast(mixed.plan, model):
            zoo.assert_same_bits(mixed(X), model(X))
    assert run.__doc__ == "Runs."


def test_a_file_that_is_no_saved_plan(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="default is no saved plan"):
        amp.autocast("default")
    for table, message in (
        ("3", "`made_for` is not a table"),
        ('{dtype = "int8", device = "cpu"}', "unknown dtype 'int8'"),
        ('{dtype = "float16"}', "no `device`"),
        ('{dtype = "float16", device = "cpu", clamped = 3}', "`clamped` is not a list of nodes"),
        ('{dtype = "float16", device = "cpu", clamps = []}', "Did you mean 'clamped'"),
    ):
        file = tmp_path / "plan.toml"
        file.write_text(f"made_for = {table}\n")
        with pytest.raises(UsageError, match=message):
            amp.autocast(file)


def test_it_ends_where_it_ends() -> None:
    model = net()
    plan = amp.convert(model, X).plan
    applied = plan.autocast(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), applied:
        model(torch.ones(2, 3))
    with applied, torch.no_grad():  # nothing is left of the call that failed
        first = products_of(lambda: model(X))
    assert first == {F16: 3}
    assert not nn.modules.module._global_forward_pre_hooks


def test_a_context_within_another_of_another_model() -> None:
    model, other = net(), net(Looping)
    plan, inner = amp.convert(model, X).plan, amp.convert(other, X, dtype=BF16).plan
    with plan.autocast(model), torch.no_grad():
        with inner.autocast(other):
            assert set(products_of(lambda: other(X))) == {BF16}
        assert products_of(lambda: model(X)) == {F16: 3}


def test_a_converted_or_frozen_model_inside_of_it_is_left_alone() -> None:
    model = net()
    mixed = amp.convert(model, X)
    frozen = mixed.freeze()
    with torch.no_grad():
        want = mixed(X)
        with mixed.plan.autocast(model) as applied:
            zoo.assert_same_bits(want, mixed(X))
            zoo.assert_same_bits(want, frozen(X))
    assert applied.counts.calls == 0


def test_the_callers_autocast_has_no_word_in_it() -> None:
    model = net()
    mixed = amp.convert(model, X)
    with torch.no_grad(), torch.autocast("cpu", dtype=BF16), mixed.plan.autocast(model):
        zoo.assert_same_bits(_plainly(mixed, X), model(X))


def test_another_thread_is_left_alone() -> None:
    model = net()
    plan = amp.convert(model, X).plan
    found = []
    with plan.autocast(model):
        thread = threading.Thread(target=lambda: found.append(model(X)))
        thread.start()
        thread.join()
    assert zoo.same_bits(found[0], model(X))


def test_two_threads_may_have_one_plan_open() -> None:
    """As a server has that calls `mixed.generate` from several."""
    model = net()
    mixed = amp.convert(model, X)
    applied, both = mixed.plan.autocast(model), threading.Barrier(2)
    found: list[torch.Tensor] = []

    def run(rows: int) -> None:
        with applied, torch.no_grad():
            both.wait(60)
            found.append(model(X[:rows]))
            both.wait(60)
        found.append(model(X[:rows]).detach())

    threads = [threading.Thread(target=run, args=(rows,)) for rows in (2, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    planned, plain = found[:2], found[2:]
    with torch.no_grad():
        assert all(torch.equal(y, mixed(X[: len(y)])) for y in planned)
        assert all(torch.equal(y, model(X[: len(y)])) for y in plain)


def test_it_trains_with_a_scaler_as_autocast_does() -> None:
    """The loss falls as it does in FP32; weights and their gradients stay FP32."""
    losses = {}
    for planned in (False, True):
        model = net().train()
        plan = amp.convert(model, X).plan
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        target = torch.tensor([0, 1, 2, 0])
        for _ in range(30):
            if planned:
                with plan.autocast(model):
                    loss = F.cross_entropy(model(X), target)
            else:
                loss = F.cross_entropy(model(X), target)
            assert loss.dtype is torch.float32
            scaler.scale(loss).backward()
            assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        losses[planned] = float(loss)
    assert abs(losses[True] - losses[False]) < 0.02 * losses[False] + 1e-3


def test_a_weight_is_cast_once_a_call_and_no_cast_outlives_it() -> None:
    class Twice(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(self.a(x))

    model = net(Twice)
    plan = amp.convert(model, X).plan
    with plan.autocast(model):
        before = model(X)
        with torch.no_grad():
            model.a.weight.data.mul_(2)  # shows in no version
        after = model(X)
    assert not torch.equal(before, after)


# --- methods of the converted model --------------------------------------------------------------


def test_methods_of_the_original_run_under_the_plan() -> None:
    model = net()
    mixed = amp.convert(model, X)
    with torch.no_grad():
        assert products_of(lambda: mixed.encode(X)) == {F16: 1}
        assert mixed.encode(X).dtype is torch.float32
        assert products_of(lambda: list(mixed.stream(X))) == {F16: 4}
        assert {row.dtype for row in mixed.stream(X)} == {torch.float32}
    with pytest.raises(UnsupportedModelError, match="later is asynchronous"):
        mixed.later(X)
    assert mixed.encode.__name__ == "encode"
    assert products_of(lambda: model.encode(X)) == {torch.float32: 1}


def test_attributes_are_the_originals_own() -> None:
    model = net()
    model.settings = {"size": 8}
    mixed = amp.convert(model, X)
    assert mixed.settings is model.settings
    with pytest.raises(AttributeError, match="nothing"):
        mixed.nothing  # noqa: B018
