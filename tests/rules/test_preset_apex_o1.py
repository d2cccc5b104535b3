"""Apex's O1: its lists of functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from amp_convert.rules.load import load_rules
from amp_convert.rules.rule_set import Place, Rules
from tests.rules.apex_models import INPUTS, as_float, build, run
from tests.small_models import ramp
from tests.staged import F16, F32, Staged, decision, low, same_bits

# apex/amp/lists at the parent of cb65b8ed, by file and list, for PyTorch 1.1 or later and CUDA 9.1
# or later; the recurrent functions from apex/amp/rnn_compat.py. `__div__` and `__idiv__` are
# Python 2's.
LISTS = {
    ("functional", "FP16_FUNCS"): """
        conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d conv_tbc linear
    """,
    ("functional", "FP32_FUNCS"): """
        interpolate grid_sample softplus softmin log_softmax softmax gelu layer_norm group_norm
        local_response_norm normalize cosine_similarity poisson_nll_loss cosine_embedding_loss
        cross_entropy hinge_embedding_loss kl_div l1_loss mse_loss margin_ranking_loss
        multilabel_margin_loss multilabel_soft_margin_loss multi_margin_loss nll_loss
        binary_cross_entropy_with_logits smooth_l1_loss soft_margin_loss triplet_margin_loss
        ctc_loss
    """,
    ("functional", "BANNED_FUNCS"): "binary_cross_entropy",
    ("torch", "FP16_FUNCS"): """
        conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d conv_tbc prelu
        addmm addmv addr matmul mm mv addbmm baddbmm bmm
    """,
    ("torch", "FP32_FUNCS"): """
        acos asin cosh erfinv exp expm1 log log10 log2 reciprocal rsqrt sinh tan pow cumprod cumsum
        dist norm prod std sum var renorm
    """,
    ("torch", "CASTS"): """
        addcdiv addcmul atan2 cross bilinear dot add div mul eq equal ge gt le lt ne
    """,
    ("torch", "SEQUENCE_CASTS"): "cat stack",
    ("tensor", "FP16_FUNCS"): "__matmul__",
    ("tensor", "FP32_FUNCS"): "__ipow__ __pow__ __rpow__ cpu",
    ("tensor", "CASTS"): """
        __add__ __div__ __eq__ __ge__ __gt__ __iadd__ __idiv__ __imul__ __isub__ __itruediv__ __le__
        __lt__ __mul__ __ne__ __radd__ __rdiv__ __rmul__ __rsub__ __rtruediv__ __sub__ __truediv__
    """,
    ("rnn", "FP16_FUNCS"): """
        rnn_relu rnn_tanh gru lstm rnn_relu_cell rnn_tanh_cell gru_cell lstm_cell
    """,
}  # fmt: skip


CATEGORIES = {
    "FP16_FUNCS": "allow",
    "FP32_FUNCS": "deny",
    "BANNED_FUNCS": "deny",
    "CASTS": "infer",
    "SEQUENCE_CASTS": "infer",
}


# The ATen ops that a function becomes in a captured graph, where they are not its namesake; those
# that unlisted functions become as well are left out.
OPS = {
    "interpolate": "upsample_* _upsample_*",
    "grid_sample": "grid_sampler",
    "softmin": "softmax",
    "normalize": "linalg_vector_norm",
    "cross_entropy": "cross_entropy_loss",
    "nll_loss": "nll_loss_nd",
    "norm": "norm linalg_vector_norm linalg_matrix_norm",
    "__ipow__": "pow",
    "__rpow__": "pow",
    "__radd__": "add",
    "__iadd__": "add",
    "__rmul__": "mul",
    "__imul__": "mul",
    "__isub__": "sub",
    "__idiv__": "div",
    "__itruediv__": "div",
    "__truediv__": "div",
    # Python's 1 / x is x.reciprocal() * 1, and `reciprocal` is in the FP32 list.
    "__rdiv__": "",
    "__rtruediv__": "",
    # Made of ops that are not theirs alone: see `APART`.
    "local_response_norm": "",
    "multilabel_soft_margin_loss": "",
    # No op of a graph.
    "cpu": "",
}


def entries() -> Iterator[tuple[str, str, str]]:
    """(file, function, category) of everything that Apex patches."""
    for (file, name), functions in LISTS.items():
        for function in functions.split():
            yield file, function, CATEGORIES[name]


def ops(function: str) -> list[str]:
    """The ATen patterns of a patched function."""
    return [f"aten.{name}" for name in OPS.get(function, function.strip("_")).split()]


def category(rules: Rules, op: str) -> str | None:
    found = rules.match_op(Place("float16", "cuda", "train"), op)
    return found and found.category.value


def test_o1_has_the_category_of_every_entry() -> None:
    rules = load_rules(["apex-o1"])
    expected = {op: wanted for _, function, wanted in entries() for op in ops(function)}
    found = {op: category(rules, f"{op.replace('*', 'bilinear2d')}.default") for op in expected}
    assert found == expected


def test_o1_has_no_other_entries() -> None:
    stated = [rule.pattern for rule in load_rules(["apex-o1"]).rules]
    assert sorted(stated) == sorted({"*", *(op for _, f, _ in entries() for op in ops(f))})


class Calls(nn.Module):
    """Listed functions under names that are not an ATen op's, and those that are taken apart."""

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> list[torch.Tensor]:
        image = x[None, None]
        return [
            F.interpolate(image, scale_factor=2.0, mode="bilinear"),
            F.interpolate(image, scale_factor=2.0, mode="nearest"),
            F.interpolate(image, size=(3, 3), mode="bicubic", antialias=True),
            F.grid_sample(image, torch.ones(1, 3, 3, 2), align_corners=False),
            F.softmin(x, -1),
            F.normalize(x),
            F.cross_entropy(x, target),
            F.nll_loss(x, target),
            x.norm(),
            torch.norm(x, p="nuc"),
            x**2,
            2**x,
            x**x,
            1 / x,
            1 - x,
            x - x.mT,
            x @ x,
            x == x.mT,
            x / x.mT,
        ]


@pytest.mark.slow
def test_o1_names_the_ops_that_listed_functions_become() -> None:
    plan = Staged.of(Calls(), ramp(4, 4) + 2, torch.tensor([0, 1, 2, 3])).plan("apex-o1")
    found = {(d.op.removeprefix("aten."), d.category) for d in plan.eval if d.decided}
    assert found == {
        ("upsample_bilinear2d", "deny"),
        ("upsample_nearest2d", "deny"),
        ("_upsample_bicubic2d_aa", "deny"),
        ("grid_sampler", "deny"),
        ("softmax", "deny"),
        ("linalg_vector_norm", "deny"),
        ("linalg_matrix_norm", "deny"),
        ("cross_entropy_loss", "deny"),
        ("nll_loss_nd", "deny"),
        ("pow", "deny"),
        ("reciprocal", "deny"),
        ("matmul", "allow"),
        ("rsub", "infer"),
        ("sub", "infer"),
        ("mul", "infer"),
        ("div", "infer"),
        ("eq", "infer"),
        # Parts of `interpolate`'s input, of `softmin` and of `normalize`, in no list.
        ("unsqueeze", "clear"),
        ("transpose", "clear"),
        ("neg", "clear"),
        ("clamp_min", "clear"),
        ("expand", "clear"),
    }


APART: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], list[str]]] = {
    "interpolate": (
        lambda x: F.interpolate(x, size=(2, 2), mode="area"),
        ["head/conv2d", "/adaptive_avg_pool2d"],
    ),
    "local_response_norm": (
        lambda x: F.local_response_norm(x, 2),
        [
            *("head/conv2d", "/mul", "/reshape", "/pad", "/avg_pool3d", "/squeeze", "/reshape#1"),
            *("/mul#1", "/add"),
        ],
    ),
    "multi_margin_loss": (
        lambda x: F.multi_margin_loss(x.flatten(1), torch.tensor([0, 1])),
        ["head/conv2d", "/reshape", "/gather", "/rsub", "/add", "/clamp_min", "/where", "/mean"],
    ),
    "multilabel_soft_margin_loss": (
        lambda x: F.multilabel_soft_margin_loss(x.flatten(1), torch.ones(2, 18)),
        ["head/conv2d", "/reshape", "/log_sigmoid", "/neg", "/log_sigmoid#1"],
    ),
}


class Applied(nn.Module):
    """A function of what a convolution makes."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.head, self.function = nn.Conv2d(1, 2, 3), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.head(x))


@pytest.mark.slow
@pytest.mark.parametrize("function", APART)
def test_o1_sees_only_the_parts_of_what_is_taken_apart(function: str) -> None:
    """A known difference: Apex computes all of it in FP32, here these parts stay FP16."""
    call, expected = APART[function]
    plan = Staged.of(Applied(call), ramp(2, 1, 5, 5)).plan("apex-o1")
    assert low(plan) == expected


class Patched(TorchFunctionMode):
    """Casts what listed functions get, as Apex's patches do; one level deep."""

    def __init__(self) -> None:
        super().__init__()
        homes: dict[str, list[Any]] = {
            "functional": [F],
            "torch": [torch, torch.Tensor],
            "tensor": [torch.Tensor],
        }
        self.wanted: dict[Any, str] = {}
        for file, function, category in entries():
            for home in homes.get(file, []):
                if hasattr(home, function):
                    self.wanted[getattr(home, function)] = category

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = (args, kwargs or {})
        floats = {t.dtype for t in pytree.tree_leaves(call) if is_float(t)}
        widest = F32 if F32 in floats else F16
        dtype = {"allow": F16, "deny": F32, "infer": widest}.get(self.wanted.get(func, ""))
        if dtype is not None:
            call = pytree.tree_map(lambda t: t.to(dtype) if is_float(t) else t, call)
        return func(*call[0], **call[1])


def is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


@pytest.mark.slow
@pytest.mark.parametrize("model", INPUTS)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_o1_gives_the_bits_of_patched_functions(model: str, mode: str) -> None:
    eager, original = build(model), build(model)
    converted = Staged.of(original, *INPUTS[model]).convert("apex-o1").train(mode == "train")
    with Patched():
        want = run(eager.train(mode == "train"), INPUTS[model])
    assert not same_bits(want, run(build(model).train(mode == "train"), INPUTS[model]))
    assert same_bits(as_float(want), run(converted, INPUTS[model]))
    assert same_bits(eager.state_dict(), original.state_dict())


class Method(nn.Module):
    """A softmax by a name that is in none of Apex's lists."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x).softmax(-1)


@pytest.mark.slow
def test_o1_does_not_tell_a_listed_name_from_an_unlisted_one() -> None:
    """A known difference: only F.softmax is in Apex's lists, and both are one ATen op."""
    plan = Staged.of(Method(), ramp(4, 4)).plan("apex-o1")
    assert decision(plan, "/softmax#0").dtype == "float32"
    with Patched():
        assert run(Method(), (ramp(4, 4),)).dtype == F16
