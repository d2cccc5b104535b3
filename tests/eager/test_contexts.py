"""The plan as a context: from a file, as a decorator, in threads, in training, and the methods of a
converted model."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import amp_convert as amp
from amp_convert.core.errors import UnsupportedModelError, UsageError
from tests import bits
from tests.eager.small_net import Looping, Net, net, plainly, products_of

F16, BF16 = torch.float16, torch.bfloat16


X = torch.linspace(-2, 2, 32).reshape(4, 8)


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
        bits.assert_same_bits(mixed(X), run(X))
        bits.assert_same_bits(mixed(X), run(X))
        with amp.autocast(mixed.plan, model):
            bits.assert_same_bits(mixed(X), model(X))
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
            bits.assert_same_bits(want, mixed(X))
            bits.assert_same_bits(want, frozen(X))
    assert applied.counts.calls == 0


def test_the_callers_autocast_has_no_word_in_it() -> None:
    model = net()
    mixed = amp.convert(model, X)
    with torch.no_grad(), torch.autocast("cpu", dtype=BF16), mixed.plan.autocast(model):
        bits.assert_same_bits(plainly(mixed, X), model(X))


def test_another_thread_is_left_alone() -> None:
    model = net()
    plan = amp.convert(model, X).plan
    found = []
    with plan.autocast(model):
        thread = threading.Thread(target=lambda: found.append(model(X)))
        thread.start()
        thread.join()
    assert bits.same_bits(found[0], model(X))


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
