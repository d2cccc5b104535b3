"""The presets `apex-o1`, `apex-o2` and `apex-o3` are NVIDIA Apex amp's optimization levels.

Oracles: the lists of Apex's source, written down here as facts; a function mode that casts as
Apex's patches do, for O1; and the eager model cast as `amp.initialize` casts it, for O2 and O3.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from amp_convert.plan.costs import Casts
from amp_convert.rules.load import load_rules
from amp_convert.rules.rule_set import GuardLimits, Painting, Place, Rules
from tests.small_models import ramp
from tests.staged import F16, F32, Staged, casts_of, decision, low, rows, same_bits, table

# --- models --------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """A convolutional network that ends in a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(torch.relu(self.norm(self.conv(x))))
        return F.softmax(self.head(F.adaptive_avg_pool2d(x, 1).flatten(1)), -1)


class Block(nn.Module):
    """Attention and a feed-forward part by hand, a softmax at the end, and a loss of it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(8), nn.Linear(8, 24)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + F.softmax(q @ k.transpose(1, 2) / 8**0.5, -1) @ v
        y = F.softmax(x + self.down(F.gelu(self.up(x))), -1)
        return y, F.mse_loss(y, target)


INPUTS = {
    "cnn": (ramp(2, 1, 8, 8),),
    "block": (ramp(2, 3, 8), ramp(2, 3, 8).flip(0).softmax(-1)),
}


def build(name: str, norm: Callable[[torch.Tensor], torch.Tensor] = torch.clone) -> nn.Module:
    """A model with uneven weights in its normalisation; `norm` rounds them."""
    torch.manual_seed(0)
    model = Classifier() if name == "cnn" else Block()
    assert isinstance(model.norm, nn.Module)
    with torch.no_grad():
        for tensor in (*model.norm.parameters(), *model.norm.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(norm(torch.rand_like(tensor) + 0.5))
    return model


def representable(tensor: torch.Tensor) -> torch.Tensor:
    """What FP16 can hold of it."""
    return tensor.half().float()


@cache
def staged(name: str) -> Staged:
    return Staged.of(build(name), *INPUTS[name])


def run(model: nn.Module, inputs: Iterable[torch.Tensor]) -> Any:
    with torch.no_grad():
        return model(*inputs)


# --- whole plans ---------------------------------------------------------------------------------


O1 = {
    ("cnn", "eval"): """
        /sym_size#0             | none  |            |     | -   | .
        conv/conv2d#0           | allow | op conv2d  | f16 | low | f16 f16
        norm/_native_batch_norm_legit_no_training#0
                                | clear | op *       | f16 | low | . . . . .
        norm/operator.getitem#0 | none  |            | f16 | -   |
        /relu#0                 | clear | op *       | f16 | low | .
        pool/max_pool2d#0       | clear | op *       | f16 | low | .
        /adaptive_avg_pool2d#0  | clear | op *       | f16 | low | .
        /reshape#0              | clear | op *       | f16 | low | .
        head/linear#0           | allow | op linear  | f16 | low | . f16 f16
        /softmax#0              | deny  | op softmax | f32 | -   | f32
    """,
    ("cnn", "train"): """
        /sym_size#0             | none  |            |     | -   | .
        conv/conv2d#0           | allow | op conv2d  | f16 | low | f16 f16
        norm/add#0              | none  |            | i64 | -   | .
        norm/_native_batch_norm_legit_functional#0
                                | clear | op *       | f16 | low | . . . . .
        norm/operator.getitem#0 | none  |            | f16 | -   |
        norm/operator.getitem#1 | none  |            | f32 | -   |
        norm/operator.getitem#2 | none  |            | f32 | -   |
        /relu#0                 | clear | op *       | f16 | low | .
        pool/max_pool2d#0       | clear | op *       | f16 | low | .
        /adaptive_avg_pool2d#0  | clear | op *       | f16 | low | .
        /reshape#0              | clear | op *       | f16 | low | .
        head/linear#0           | allow | op linear  | f16 | low | . f16 f16
        /softmax#0              | deny  | op softmax | f32 | -   | f32
    """,
    ("block", "eval"): """
        norm/layer_norm#0    | deny  | op layer_norm | f32 | -   | . . .
        qkv/linear#0         | allow | op linear     | f16 | low | f16 f16 f16
        /split#0             | clear | op *          | f16 | low | .
        /operator.getitem#0  | none  |               | f16 | -   |
        /operator.getitem#1  | none  |               | f16 | -   |
        /operator.getitem#2  | none  |               | f16 | -   |
        /transpose#0         | clear | op *          | f16 | low | .
        /matmul#0            | allow | op matmul     | f16 | low | . .
        /div#0               | infer | op div        | f16 | low | .
        /softmax#0           | deny  | op softmax    | f32 | -   | f32
        /matmul#1            | allow | op matmul     | f16 | low | f16 .
        /add#0               | infer | op add        | f32 | -   | . f32
        up/linear#0          | allow | op linear     | f16 | low | f16 f16 f16
        /gelu#0              | deny  | op gelu       | f32 | -   | f32
        down/linear#0        | allow | op linear     | f16 | low | f16 f16 f16
        /add#1               | infer | op add        | f32 | -   | . f32
        /softmax#1           | deny  | op softmax    | f32 | -   | .
        /broadcast_tensors#0 | clear | op *          | f32 | -   | . .
        /operator.getitem#3  | none  |               | f32 | -   |
        /operator.getitem#4  | none  |               | f32 | -   |
        /mse_loss#0          | deny  | op mse_loss   | f32 | -   | . .
    """,
}


O2 = {
    ("cnn", "eval"): """
        /sym_size#0             | none  |                 |     | -   | .
        conv/conv2d#0           | allow | op *            | f16 | low | f16 f16
        norm/_native_batch_norm_legit_no_training#0
                                | allow | op *batch_norm* | f16 | low | . . . . .
        norm/operator.getitem#0 | none  |                 | f16 | -   |
        /relu#0                 | allow | op *            | f16 | low | .
        pool/max_pool2d#0       | allow | op *            | f16 | low | .
        /adaptive_avg_pool2d#0  | allow | op *            | f16 | low | .
        /reshape#0              | allow | op *            | f16 | low | .
        head/linear#0           | allow | op *            | f16 | low | . f16 f16
        /softmax#0              | allow | op *            | f16 | low | .
    """,
    ("cnn", "train"): """
        /sym_size#0             | none  |                 |     | -   | .
        conv/conv2d#0           | allow | op *            | f16 | low | f16 f16
        norm/add#0              | none  |                 | i64 | -   | .
        norm/_native_batch_norm_legit_functional#0
                                | allow | op *batch_norm* | f16 | low | . . . . .
        norm/operator.getitem#0 | none  |                 | f16 | -   |
        norm/operator.getitem#1 | none  |                 | f32 | -   |
        norm/operator.getitem#2 | none  |                 | f32 | -   |
        /relu#0                 | allow | op *            | f16 | low | .
        pool/max_pool2d#0       | allow | op *            | f16 | low | .
        /adaptive_avg_pool2d#0  | allow | op *            | f16 | low | .
        /reshape#0              | allow | op *            | f16 | low | .
        head/linear#0           | allow | op *            | f16 | low | . f16 f16
        /softmax#0              | allow | op *            | f16 | low | .
    """,
    ("block", "eval"): """
        norm/layer_norm#0    | allow | op * | f16 | low | f16 . .
        qkv/linear#0         | allow | op * | f16 | low | . f16 f16
        /split#0             | allow | op * | f16 | low | .
        /operator.getitem#0  | none  |      | f16 | -   |
        /operator.getitem#1  | none  |      | f16 | -   |
        /operator.getitem#2  | none  |      | f16 | -   |
        /transpose#0         | allow | op * | f16 | low | .
        /matmul#0            | allow | op * | f16 | low | . .
        /div#0               | allow | op * | f16 | low | .
        /softmax#0           | allow | op * | f16 | low | .
        /matmul#1            | allow | op * | f16 | low | . .
        /add#0               | allow | op * | f16 | low | f16 .
        up/linear#0          | allow | op * | f16 | low | . f16 f16
        /gelu#0              | allow | op * | f16 | low | .
        down/linear#0        | allow | op * | f16 | low | . f16 f16
        /add#1               | allow | op * | f16 | low | . .
        /softmax#1           | allow | op * | f16 | low | .
        /broadcast_tensors#0 | allow | op * | f16 | low | . f16
        /operator.getitem#3  | none  |      | f16 | -   |
        /operator.getitem#4  | none  |      | f16 | -   |
        /mse_loss#0          | allow | op * | f16 | low | . .
    """,
}

# BatchNorm's statistics stay FP32 in O3 as well: see the head of its rules file.
O3 = {key: text.replace("op *batch_norm*", "op *           ") for key, text in O2.items()}

WHOLE = [
    (preset, model, mode, expected)
    for preset, plans in [("apex-o1", O1), ("apex-o2", O2), ("apex-o3", O3)]
    for (model, stated), expected in plans.items()
    for mode in (["eval", "train"] if model == "block" else [stated])
]
CASTS = {
    ("apex-o1", "cnn"): Casts(2, 3, 5),
    ("apex-o1", "block"): Casts(8, 6, 14),
    ("apex-o2", "cnn"): Casts(2, 3, 5),
    ("apex-o2", "block"): Casts(4, 6, 11),
    ("apex-o3", "cnn"): Casts(2, 3, 5),
    ("apex-o3", "block"): Casts(4, 6, 11),
}


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "model", "mode", "expected"), WHOLE)
def test_whole_plans(preset: str, model: str, mode: str, expected: str) -> None:
    plan = staged(model).plan(preset)
    # A long node name stands on a line of its own.
    assert table(plan, mode) == rows(
        expected.replace("#0\n                                |", "#0 |")
    )
    assert casts_of(plan, mode) == CASTS[preset, model]


@pytest.mark.parametrize("preset", ["apex-o1", "apex-o2", "apex-o3"])
def test_apex_looks_at_no_ranges(preset: str) -> None:
    rules = load_rules([preset])
    assert set(vars(rules.guards)) == set(vars(GuardLimits()))
    assert set(vars(rules.guards).values()) == {False}
    assert (rules.painting is Painting.AUTOCAST) == (preset == "apex-o1")


# --- O1: the lists -------------------------------------------------------------------------------


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


# --- O2 and O3: the eager model, cast ------------------------------------------------------------


class Initialized(nn.Module):
    """The model as `amp.initialize` casts it in O2 and O3: inputs to FP16, outputs to FP32."""

    def __init__(self, model: nn.Module, *, keep_batchnorm_fp32: bool) -> None:
        super().__init__()
        self.model = model
        for module in model.modules():
            is_batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
            if not (keep_batchnorm_fp32 and is_batch_norm and module.affine):
                for tensor in (*module.parameters(False), *module.buffers(False)):
                    if tensor.is_floating_point():
                        tensor.data = tensor.data.to(F16)

    def forward(self, *inputs: torch.Tensor) -> Any:
        return as_float(self.model(*(x.to(F16) for x in inputs)))


def as_float(outputs: Any) -> Any:
    return pytree.tree_map(lambda t: t.float(), outputs)


def o2(model: nn.Module) -> Initialized:
    return Initialized(copy.deepcopy(model), keep_batchnorm_fp32=True)


def o3(model: nn.Module) -> Initialized:
    return Initialized(copy.deepcopy(model), keep_batchnorm_fp32=False)


def assert_same_bits(
    preset: str, oracle: Callable[[nn.Module], Initialized], model: nn.Module, mode: str
) -> None:
    """Outputs and statistics agree; `model`, converted, is left with those that a call leaves."""
    inputs = INPUTS["cnn" if isinstance(model, Classifier) else "block"]
    original = run(copy.deepcopy(model).train(mode == "train"), inputs)
    cast = oracle(model).train(mode == "train")
    converted = Staged.of(model, *inputs).convert(preset).train(mode == "train")
    have = run(converted, inputs)
    assert same_bits(run(cast, inputs), have)
    assert not same_bits(original, have)
    statistics = {n: b.float() for n, b in model.named_buffers()}
    assert same_bits({n: b.float() for n, b in cast.model.named_buffers()}, statistics)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_o2_gives_the_bits_of_a_model_with_batch_norm_in_float32(mode: str) -> None:
    """On FP16 input the CPU's BatchNorm computes in FP32 from FP32 parameters, as cuDNN's does."""
    assert_same_bits("apex-o2", o2, build("cnn"), mode)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize(("preset", "oracle"), [("apex-o2", o2), ("apex-o3", o3)])
def test_o2_and_o3_give_the_bits_of_a_half_block(
    preset: str, oracle: Callable[[nn.Module], Initialized], mode: str
) -> None:
    """The CPU's layer normalisation reads its weights in FP32: let FP16 be able to hold them."""
    assert_same_bits(preset, oracle, build("block", representable), mode)


@pytest.mark.slow
def test_o3_gives_the_bits_of_a_half_model() -> None:
    """A converted model's statistics stay FP32: let FP16 be able to hold them."""
    assert_same_bits("apex-o3", o3, build("cnn", representable), "eval")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_o3_treats_batch_norm_as_with_keep_batchnorm_fp32(mode: str) -> None:
    """A known difference: Apex's O3 rounds parameters and statistics unless told to keep them."""
    assert_same_bits("apex-o3", o2, build("cnn"), mode)
    assert {b.dtype for b in o3(build("cnn")).model.norm.parameters()} == {F16}


def test_o2_says_what_becomes_of_batch_norm() -> None:
    found = decision(staged("cnn").plan("apex-o2"), "norm/_native_batch_norm_legit_no_training#0")
    assert found.reason.startswith("O2 keeps BatchNorm's parameters and statistics in FP32")
    assert found.input_dtypes == (None,) * 5


class Transformed(nn.Module):
    """A linear, then an op that has no FP16 kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.inv(self.first(x) + 4 * torch.eye(4))


@pytest.mark.parametrize("preset", ["apex-o2", "apex-o3"])
def test_an_op_without_a_kernel_stays_float32(preset: str) -> None:
    torch.manual_seed(0)
    converted = Staged.of(Transformed(), ramp(4, 4)).convert(preset)
    found = {d.op: d for d in converted.plan.eval}
    assert found["aten.linear"].low
    inverse = found["aten.linalg_inv"]
    assert (inverse.rule, inverse.category, inverse.low) == ("no kernel", "deny", False)
    assert run(converted, (ramp(4, 4),)).dtype == F32
