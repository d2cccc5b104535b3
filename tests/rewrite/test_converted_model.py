"""The converted model as an nn.Module: its tensors, its two modes, its calls, its copies."""

from __future__ import annotations

import copy
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import amp_convert as amp
from amp_convert.core.errors import ModelError, UnsupportedModelError, UsageError
from tests.zoo import (
    DTYPES,
    Example,
    assert_same_bits,
    both_dtypes,
    build,
    converted,
    every_model,
    example,
    leaves,
    mode,
    same_bits,
)

CASTS = torch.ops.aten._to_copy.default


class Net(nn.Module):
    """Two linear layers, with everything in between that has state or randomness."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.norm = nn.BatchNorm1d(16)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.drop(self.norm(self.first(x))))


def net() -> tuple[Net, torch.Tensor]:
    torch.manual_seed(0)
    return Net(), torch.randn(8, 6)


# --- tensors -------------------------------------------------------------------------------------


@every_model
def test_state_is_the_originals_own(name: str) -> None:
    original, mixed = example(name)[0], converted(name)
    want, have = original.state_dict(), mixed.state_dict()
    assert list(want) == list(have)
    assert all(want[key].data_ptr() == have[key].data_ptr() for key in want)
    assert all(a is b for a, b in zip(original.parameters(), mixed.parameters(), strict=True))
    assert [n for n, _ in original.named_buffers()] == [n for n, _ in mixed.named_buffers()]


@pytest.mark.slow
def test_load_state_dict_changes_the_outputs() -> None:
    (model, x), (other, _) = net(), net()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    mixed = amp.convert(model.eval(), x)
    before = mixed(x)
    assert mixed.load_state_dict(other.state_dict()) == ([], [])
    after = mixed(x)
    assert not torch.equal(before, after)
    assert_same_bits(amp.convert(other.eval(), x)(x), after)


@pytest.mark.slow
def test_an_optimizer_step_changes_the_outputs() -> None:
    model, x = net()
    mixed = amp.convert(model, x).eval()
    before = mixed(x).detach()
    optimizer = torch.optim.SGD(mixed.parameters(), lr=0.01)
    mixed(x).square().mean().backward()
    optimizer.step()
    after = mixed(x).detach()
    assert after.square().mean() < before.square().mean()
    torch.testing.assert_close(after, model.eval()(x).detach(), rtol=1e-2, atol=1e-2)


@every_model
@both_dtypes
def test_gradients_have_their_parameters_dtype(name: str, dtype: torch.dtype) -> None:
    mixed = converted(name, "default", dtype)
    original, args, kwargs = example(name)
    wanted = {n: p for n, p in mixed.named_parameters() if p.requires_grad}
    found = {}
    for call in (original, mixed):
        with mode(original, mixed, train=True):
            result = call(*args, **kwargs)
            outputs = [t for t in pytree.tree_leaves(result) if getattr(t, "requires_grad", False)]
            loss = sum(t.square().mean() for t in outputs)
            grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
            found[call] = dict(zip(wanted, grads, strict=True))
    for key, expected in found[original].items():
        gradient = found[mixed][key]
        assert (gradient is None) == (expected is None), key
        if gradient is not None:
            assert gradient.dtype == wanted[key].dtype == torch.float32, key
            assert bool(gradient.isfinite().all()), key
    # In training each arm draws its own dropout masks, but from one random state: the same ones.
    flat = [torch.cat([g.flatten() for g in found[c].values() if g is not None]) for c in found]
    assert float((flat[1] - flat[0]).norm() / flat[0].norm()) < 0.1


class Tied(nn.Module):
    """One weight under two names, used three times; a second one used twice in one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.shared = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.shared(self.shared(self.embed(ids)))
        return self.head(x) + self.head(x.relu())


@pytest.mark.slow
def test_tied_weights_stay_tied_and_are_cast_once() -> None:
    torch.manual_seed(0)
    model, ids = Tied(), torch.randint(0, 11, (3, 5))
    mixed = amp.convert(model, ids)
    assert mixed.head.weight is mixed.embed.weight is model.head.weight
    for train in ("eval", "train"):
        graph = mixed.rewritten[""][train].graph_module.graph
        weights = [n for n in graph.nodes if n.op == "placeholder" and "p_" in n.name]
        casts = [n.args[0] for n in graph.nodes if n.target is CASTS and n.args[0] in weights]
        assert len(casts) == 3, "the tied weight, the shared layer's weight and its bias"
        assert set(Counter(casts).values()) == {1}
    mixed(ids).sum().backward()
    assert model.embed.weight.grad is mixed.head.weight.grad is not None
    assert list(mixed.state_dict()) == list(model.state_dict())


# --- modes ---------------------------------------------------------------------------------------


def test_modes_switch_graphs() -> None:
    model, x = net()
    mixed = amp.convert(model, x)
    mixed.eval()
    assert torch.equal(mixed(x), mixed(x)), "dropout is inactive, statistics are used as they are"
    before = model.norm.running_mean.clone()
    mixed(x)
    assert torch.equal(model.norm.running_mean, before)
    mixed.train()
    assert not torch.equal(mixed(x), mixed(x)), "dropout is active"
    assert int(model.norm.num_batches_tracked) == 2
    assert not torch.equal(model.norm.running_mean, before)


@pytest.mark.parametrize("rules", ["fp32", "default"])
def test_batch_norm_statistics_move_as_in_eager_mode(rules: str) -> None:
    (model, x), (twin, _) = net(), net()
    mixed = amp.convert(model, x, rules=rules).train()
    twin.train()
    for step in range(3):
        mixed(x + step)
        twin(x + step)
    exact = rules == "fp32"
    for key, want in twin.norm.state_dict().items():
        have = mixed.norm.state_dict()[key]
        assert have.dtype == want.dtype
        if exact or not want.is_floating_point():
            assert same_bits(want, have), key
        else:
            torch.testing.assert_close(have, want, rtol=1e-2, atol=1e-3)


@pytest.mark.slow
def test_a_converted_model_has_the_originals_mode() -> None:
    model, x = net()
    assert amp.convert(model.train(), x).training
    assert not amp.convert(model.eval(), x).training


def test_the_original_follows_the_mode() -> None:
    """They share their submodules: a root in another mode than its layers would make no sense."""
    model, x = net()
    mixed = amp.convert(model.train(), x)
    mixed.eval()
    assert {m.training for m in model.modules()} == {False}
    mixed.train()
    assert {m.training for m in model.modules()} == {True}


class EvalOnly(nn.Module):
    """Cannot be exported in training mode, and has no parts that could be."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.weight
        if self.training and y.sum() > 0:
            return y * 2
        return y


class DropsLayers(nn.Module):
    """Draws in training which layers it runs, as wav2vec 2.0 does."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(3))
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            if not self.training or torch.rand(()) > 0.3:
                x = x + layer(x)
        return self.head(x)  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("rules", ["fp32", "autocast"])
def test_a_model_that_cannot_be_captured_whole_for_training_trains_in_parts(rules: str) -> None:
    torch.manual_seed(0)
    model, x = DropsLayers(), torch.randn(16, 8)
    mixed = amp.convert(model, x, rules=rules, dtype=torch.bfloat16)
    assert mixed.captured.is_whole
    assert mixed.captured.training is not None
    parts = [region.path for region in mixed.captured.training.regions]
    assert parts == ["layers.0", "layers.1", "layers.2", "head"]
    (train,) = [found for found in mixed.captured.fidelity if found.mode == "train"]
    assert train.status == "identical"
    assert "captured in parts for training, since in training its control flow" in train.reason
    assert {d.low for d in mixed.plan.train if "linear" in d.node} == {rules == "autocast"}

    def step(of: nn.Module, *, autocast: bool = False) -> Any:
        of.train().zero_grad()
        torch.manual_seed(1)  # which layers run
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            result = of(x)
        result.float().square().sum().backward()
        return result.detach().float(), {name: p.grad for name, p in model.named_parameters()}

    want = copy.deepcopy(step(model, autocast=rules == "autocast"))
    assert_same_bits(want, step(mixed))
    # One part in eval mode, as where a backbone is frozen, is then the original.
    model.layers[0].eval()
    mixed(x)
    whole = copy.deepcopy(mixed)
    assert whole.captured.training is not None
    with torch.no_grad():
        assert_same_bits(mixed.eval()(x), mixed.freeze()(x))


def test_a_model_captured_for_inference_only_refuses_to_train() -> None:
    torch.manual_seed(0)
    model, x = EvalOnly(), torch.randn(3, 4)
    mixed = amp.convert(model, x)
    train = next(f for f in mixed.captured.fidelity if f.mode == "train")
    assert train.status == "unchecked"
    assert "Guard" in train.reason or "data-dependent" in train.reason
    torch.testing.assert_close(mixed.eval()(x), model.eval()(x), rtol=1e-2, atol=1e-2)
    with pytest.raises(UnsupportedModelError, match="captured for inference only"):
        mixed.train()(x)


@pytest.mark.slow
def test_conversion_leaves_the_original_as_it_was() -> None:
    model, x = net()
    model.train()
    model.norm.eval()
    model.first.weight.requires_grad_(False)
    handle = model.last.register_forward_hook(lambda *_: None)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    flags = [m.training for m in model.modules()]
    hooks = dict(model.last._forward_hooks)
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    seed = torch.get_rng_state()
    amp.convert(model, x, calibration=[x, x * 2])
    assert torch.equal(torch.get_rng_state(), seed)
    assert [m.training for m in model.modules()] == flags
    assert model.last._forward_hooks == hooks
    assert attributes == {name: set(vars(module)) for name, module in model.named_modules()}
    assert all(p.grad is None for p in model.parameters())
    assert not model.first.weight.requires_grad
    assert_same_bits(state, dict(model.state_dict()))
    handle.remove()


# --- calls ---------------------------------------------------------------------------------------


@every_model
def test_outputs_keep_structure_dtype_and_shape(name: str) -> None:
    original, args, kwargs = example(name)
    mixed = converted(name)
    with mode(original, mixed), torch.no_grad():
        want, have = original(*args, **kwargs), mixed(*args, **kwargs)
    assert type(want) is type(have)
    assert pytree.tree_structure(want) == pytree.tree_structure(have)
    for path, expected in leaves(want).items():
        found = leaves(have)[path]
        assert type(found) is type(expected), path
        if isinstance(expected, torch.Tensor):
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape), path
            torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02)


@dataclass
class Boxed:
    """An output class of the user's own."""

    logits: torch.Tensor
    note: str


pytree.register_dataclass(Boxed)


class Structured(nn.Module):
    """Returns all that models return: nested, integer, boolean, wide, half, absent, the input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> dict[str, Any]:
        y = self.linear(x) * scale
        return {
            "pair": (y, [y.argmax(-1), y > 0]),
            "wide": y.double(),
            "half": y.half(),
            "box": Boxed(y.relu(), "linear"),
            "none": None,
            "count": 3,
            "input": x,
        }


@both_dtypes
def test_every_kind_of_output_survives(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Structured().eval(), torch.randn(5, 4)
    mixed = amp.convert(model, x, dtype=dtype)
    want, have = model(x), mixed(x)
    assert pytree.tree_structure(want) == pytree.tree_structure(have)
    dtypes = [getattr(leaf, "dtype", leaf) for leaf in pytree.tree_leaves(have)]
    assert dtypes == [getattr(leaf, "dtype", leaf) for leaf in pytree.tree_leaves(want)]
    assert isinstance(have["box"], Boxed)
    assert have["box"].note == "linear"
    assert torch.equal(have["input"], x)
    torch.testing.assert_close(have["wide"], want["wide"], rtol=2e-2, atol=2e-2)
    assert any(d.low for d in mixed.plan.eval)


@every_model
def test_other_batch_sizes(name: str) -> None:
    """Twice the batch gives twice the outputs; the example inputs fixed nothing but the rest."""
    original, args, kwargs = example(name)
    mixed = converted(name, "fp32")

    def doubled(leaf: torch.Tensor) -> torch.Tensor:
        return torch.cat([leaf, leaf.flip(0)])

    args, kwargs = pytree.tree_map_only(torch.Tensor, doubled, (args, kwargs))
    with mode(original, mixed), torch.no_grad():
        want, have = original(*args, **kwargs), mixed(*args, **kwargs)
    for path, expected in leaves(want).items():
        if isinstance(expected, torch.Tensor):
            torch.testing.assert_close(leaves(have)[path], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 3, 7])
def test_a_batch_of_one_as_example(size: int) -> None:
    model, x = net()
    mixed = amp.convert(model.eval(), x[:1])
    y = torch.randn(size, 6)
    assert mixed(y).shape == (size, 3)
    torch.testing.assert_close(mixed(y), model(y), rtol=2e-2, atol=2e-2)


REFUSED = {
    "another dtype": ((torch.ones(4, 6, dtype=torch.float16),), {}, "input x has dtype.*float16"),
    "no tensor": ((3.0,), {}, "input x is a float, but the graph was captured with a tensor"),
    "too many": ((torch.ones(4, 6), 1, 2), {}, "too many positional arguments"),
    "unknown keyword": ((torch.ones(4, 6),), {"y": 1}, "unexpected keyword argument 'y'"),
    "missing": ((), {}, "missing a required argument: 'x'"),
}  # fmt: skip


class WithDefault(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        return self.linear(x if other is None else x + other)


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_inputs_that_do_not_fit(case: str) -> None:
    args, kwargs, message = REFUSED[case]
    mixed = amp.convert(WithDefault(), torch.ones(2, 6))
    with pytest.raises(ModelError, match=message) as caught:
        mixed(*args, **kwargs)
    assert caught.value.mend
    assert caught.value.exit_code == 2


@pytest.mark.slow
def test_what_the_original_takes_and_the_graph_does_not_runs_under_the_plan() -> None:
    x = torch.linspace(-1, 1, 24).reshape(4, 6)
    model = WithDefault()
    mixed = amp.convert(model, x)
    with torch.no_grad():
        for args in ((x[:, None],), (x, x), (x[0],)):
            found, want = mixed(*args), model(*args)
            assert found.dtype is torch.float32
            assert 0 < (found - want).abs().max() < 1e-2
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            mixed(torch.ones(4, 7))
        with pytest.raises(TypeError, match="must be Tensor, not list"):
            mixed([x])


@pytest.mark.slow
def test_defaults_may_be_given_or_left_out() -> None:
    x = torch.ones(2, 6)
    mixed = amp.convert(WithDefault(), x)
    assert torch.equal(mixed(x), mixed(x, None))
    assert torch.equal(mixed(x), mixed(x=x, other=None))
    explicit = amp.convert(WithDefault(), (x, None))
    assert torch.equal(explicit(x), explicit(other=None, x=x))


# --- the original's other face -------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.half(),
        lambda model: model.double(),
        lambda model: model.to(torch.bfloat16),
        lambda model: model.to("cpu", torch.float64),
    ],
    ids=["half", "double", "to", "to with a device"],
)
def test_weights_keep_their_dtypes(change: Callable[[nn.Module], nn.Module]) -> None:
    """They are the original's, which would change as well, and the plan would no longer hold."""
    model, args, kwargs = build("cnn")
    mixed = amp.convert(model, args, kwargs)
    before = copy.deepcopy(model.state_dict())
    for of in (mixed, mixed.freeze()):
        with pytest.raises(
            UsageError, match=r"keep the dtypes of its plan: float(16|32) would become"
        ):
            change(of)
    assert_same_bits(before, model.state_dict())
    assert mixed.float().to("cpu").train() is mixed


@pytest.mark.slow
def test_attributes_are_the_originals() -> None:
    bert, mixed = example("bert")[0], converted("bert")
    assert mixed.config is bert.config
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = mixed.nothing_of_the_kind


@pytest.mark.slow
def test_a_copy_is_independent() -> None:
    model, x = net()
    mixed = amp.convert(model.eval(), x)
    twin = copy.deepcopy(mixed)
    before = mixed(x)
    assert_same_bits(before, twin(x))
    with torch.no_grad():
        twin.last.weight.zero_()
        twin.last.bias.fill_(2.0)
    assert torch.equal(twin(x), torch.full((8, 3), 2.0))
    assert_same_bits(before, mixed(x))
    assert_same_bits(before, amp.convert(model, x)(x))
    twin.train()
    twin(x)
    assert int(twin.norm.num_batches_tracked) == 1
    assert int(model.norm.num_batches_tracked) == 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_numbers_are_eagers(dtype: torch.dtype) -> None:
    """Dropout of the converted model drops what dropout of the original does."""
    model, x = net()
    model.norm.momentum = 0.0
    mixed = amp.convert(model.train(), x, dtype=dtype)
    torch.manual_seed(3)
    want = model(x)
    torch.manual_seed(3)
    torch.testing.assert_close(mixed(x), want, rtol=5e-2, atol=5e-2)


# --- torch.compile -------------------------------------------------------------------------------


def without_dropout(name: str) -> Example:
    """A fresh model whose dropout drops nothing: a compiled one draws other numbers than eager."""
    model, args, kwargs = build(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model, args, kwargs


def compiled_like_eager(mixed: nn.Module, backend: str, *args: Any, train: bool, **kw: Any) -> None:
    with mode(mixed, train=train):
        want = mixed(*args, **kw)
        expected = torch.autograd.grad(_loss(want), list(mixed.parameters()), allow_unused=True)
    torch._dynamo.reset()
    fast = torch.compile(mixed, backend=backend, fullgraph=True)
    with mode(mixed, train=train):
        have = fast(*args, **kw)
        found = torch.autograd.grad(_loss(have), list(mixed.parameters()), allow_unused=True)
    assert type(have) is type(want)
    for path, value in leaves(want).items():
        if isinstance(value, torch.Tensor):
            assert leaves(have)[path].dtype == value.dtype
            torch.testing.assert_close(leaves(have)[path], value, rtol=2e-2, atol=5e-3)
    for gradient, value in zip(found, expected, strict=True):
        assert (gradient is None) == (value is None)
        if value is not None:
            assert gradient.dtype == value.dtype
            torch.testing.assert_close(gradient, value, rtol=5e-2, atol=2e-2)


def _loss(tree: Any) -> torch.Tensor:
    floats = [t for t in pytree.tree_leaves(tree) if getattr(t, "requires_grad", False)]
    return sum((t.float().square().mean() for t in floats), torch.zeros(()))


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["cnn", "bert"])
def test_torch_compile(name: str, train: bool) -> None:
    """In one graph, without breaks."""
    model, args, kwargs = without_dropout(name)
    mixed = amp.convert(model, args, kwargs, dtype=torch.bfloat16)
    compiled_like_eager(mixed, "aot_eager", *args, train=train, **kwargs)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_torch_compile_with_inductor(train: bool) -> None:
    model, args, kwargs = without_dropout("cnn")
    mixed = amp.convert(model, args, kwargs, dtype=torch.bfloat16)
    compiled_like_eager(mixed, "inductor", *args, train=train, **kwargs)


@pytest.mark.slow
@both_dtypes
@pytest.mark.parametrize("train", [False, True])
def test_the_plan_holds_inside_autocast(dtype: torch.dtype, train: bool) -> None:
    """A loop written for autocast may stay as it is: what the plan keeps in FP32 stays there."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) + x

    torch.manual_seed(0)
    model, x = Sum(), torch.randn(3, 8)
    for rules in ("fp32", "default"):
        mixed = amp.convert(model.train(train), x, dtype=dtype, rules=rules)
        calls = [mixed] if train else [mixed, mixed.freeze()]
        for call in calls:
            for gradients in (False, True):
                with torch.set_grad_enabled(gradients):
                    want = call(x)
                    with torch.autocast("cpu", dtype=dtype):
                        have = call(x)
                assert have.dtype is torch.float32
                assert_same_bits(want.detach(), have.detach())
        torch._dynamo.reset()
        compiled = torch.compile(mixed, backend="eager", fullgraph=True)
        want = compiled(x)
        with torch.autocast("cpu", dtype=dtype):
            have = compiled(x)
        assert_same_bits(want.detach(), have.detach())


@pytest.mark.slow
def test_converting_leaves_buffers_that_operators_write_to_unsaid() -> None:
    """`instance_norm` writes its statistics in training, and no schema says so."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.InstanceNorm2d(4, affine=True, track_running_stats=True)).train()
    eager, x = copy.deepcopy(model), torch.randn(4, 4, 8, 8)
    mixed = amp.convert(model, x, rules="fp32")
    assert_same_bits(list(eager.buffers()), list(model.buffers()))
    for call in (eager, mixed):
        call(x)
    assert float(model[0].running_mean.abs().sum()) > 0
    assert_same_bits(list(eager.buffers()), list(model.buffers()))
