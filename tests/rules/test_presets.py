"""The presets: every op exists, and `default` keeps its word about kernels."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from amp_convert.rules.load import load_rules, preset_names
from amp_convert.rules.rule_set import GuardLimits, Place, Rules

aten = torch.ops.aten
PRESETS = Path(__file__).resolve().parents[2] / "rules"


def category(rules: Rules, op: str, dtype: str = "float16", device: str = "cpu") -> str | None:
    found = rules.match_op(Place(dtype, device, "eval"), op)
    return found and found.category.value


@pytest.fixture(params=["autocast", "default", "fp32", "half"])
def preset(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_all_presets_are_tested_here() -> None:
    assert preset_names() == [
        "apex-o1", "apex-o2", "apex-o3", "autocast", "default", "fp32", "half",
        "keras-mixed-float16",
    ]  # fmt: skip


def test_every_op_of_a_preset_exists(preset: str, tmp_path: Path) -> None:
    # Copied to a user's file, each op is looked up.
    text = (PRESETS / f"{preset}.toml").read_text(encoding="utf-8")
    copy = tmp_path / "copy.toml"
    copy.write_text(text, encoding="utf-8")
    copied = load_rules([str(copy)])
    assert len(copied.rules) == len(load_rules([preset]).rules) >= text.count("[[rule]]") > 0


def test_the_sources_of_a_preset_point_at_its_rules(preset: str) -> None:
    lines = (PRESETS / f"{preset}.toml").read_text(encoding="utf-8").split("\n")
    for r in load_rules([preset]).rules:
        name, _, number = r.source.partition(":")
        assert name == f"{preset}.toml"
        block = lines[int(number) - 1 :]
        end = block.index("") if "" in block else len(block)
        (table,) = tomllib.loads("\n".join(block[:end]))["rule"]
        assert r.pattern in table.get("ops", [table.get("op")])
        assert (table["category"], table["reason"]) == (r.category, r.reason)


def test_a_person_can_read_the_default_preset() -> None:
    lines = (PRESETS / "default.toml").read_text(encoding="utf-8").split("\n")
    assert len(lines) <= 700
    assert max(map(len, lines)) <= 100


def test_no_rule_of_a_preset_is_overruled_by_a_later_pattern(preset: str) -> None:
    rules = load_rules([preset])
    for r in rules.rules:
        if "*" not in r.pattern:
            op = r.pattern if r.pattern.count(".") == 2 else f"{r.pattern}.any"
            found = rules.match_op(Place(r.dtype or "bfloat16", r.device or "cuda", "eval"), op)
            assert found is r


def test_only_the_default_preset_has_guards(preset: str) -> None:
    off = GuardLimits(**{field.name: False for field in fields(GuardLimits)})
    assert load_rules([preset]).guards == (GuardLimits() if preset == "default" else off)


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("fft_fft", ()),
        ("linalg_inv", ()),
        ("special_bessel_j0", ()),
        ("cholesky", ()),
        ("cdist", (torch.eye(4),)),
        ("quantile", (torch.tensor(0.5),)),
        ("polar", (torch.eye(4),)),
    ],
)
def test_half_leaves_out_only_what_has_no_kernel(
    name: str, args: tuple[torch.Tensor, ...], low: torch.dtype
) -> None:
    rules = load_rules(["half"])
    assert category(rules, "aten.exp.default") == category(rules, "aten.linear.default") == "allow"
    assert category(rules, f"aten.{name}.default") == "deny"
    getattr(aten, name)(torch.eye(4), *args)
    with pytest.raises(
        RuntimeError, match=r"(?i)not implemented|low precision|unsupported|half|float"
    ):
        getattr(aten, name)(torch.eye(4, dtype=low), *(a.to(low) for a in args))


def test_presets_are_found_inside_an_installed_package(tmp_path: Path) -> None:
    shutil.copytree(PRESETS.parent / "amp_convert", tmp_path / "amp_convert")
    shutil.copytree(PRESETS, tmp_path / "amp_convert" / "rules" / "presets")
    code = (
        "from amp_convert.rules import load;"
        "print(len(load.load_rules(['default']).rules), load.__file__)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    count = len(load_rules(["default"]).rules)
    file = tmp_path / "amp_convert" / "rules" / "load.py"
    assert ran.stdout.split() == [str(count), str(file)]


def test_presets_are_read_without_torch() -> None:
    code = (
        "import sys; from amp_convert.rules.load import load_rules, preset_names;"
        "load_rules(preset_names()); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("ops", "expected"),
    [
        ("linear.default addmm.default bmm.default conv2d.default lstm.input", "allow"),
        ("einsum.default scaled_dot_product_attention.default", "allow"),
        ("add.Tensor mul.Tensor div.Tensor gelu.default softmax.int tanh.default", "infer"),
        ("layer_norm.default _native_batch_norm_legit_functional.default", "infer"),
        ("_native_batch_norm_legit_no_training.default sqrt.default", "infer"),
        ("adaptive_avg_pool2d.default native_dropout.default", "infer"),
        ("linalg_vecdot.default linalg_multi_dot.default", "allow"),
        ("exp.default expm1.default pow.Scalar mean.dim sum.dim_IntList", "deny"),
        ("cross_entropy_loss.default mse_loss.default rsqrt.default cumsum.default", "deny"),
        ("sin.default fft_rfft.default linalg_svd.default div.Tensor_mode", "deny"),
        ("relu.default view.default cat.default gather.default max.dim eq.Tensor", "clear"),
        ("max_pool2d_with_indices.default fft_fftshift.default", "clear"),
        ("embedding.default", "allow"),
    ],
)
def test_default_follows_grappler(ops: str, expected: str) -> None:
    rules = load_rules(["default"])
    for name in ops.split():
        assert (name, category(rules, f"aten.{name}")) == (name, expected)


# Every op in the captured graphs of the models that the other tests convert.
CAPTURED = """
__and__.Tensor _assert_tensor_metadata.default _native_batch_norm_legit_functional.default
_native_batch_norm_legit_no_training.default _to_copy.default _unsafe_view.default abs.default
adaptive_avg_pool2d.default add.Tensor addmm.default arange.default argmax.default cat.default
clone.default conv1d.default conv2d.default cos.default cumsum.default diff.default div.Tensor
embedding.default empty_like.default eq.Scalar eq.Tensor exp.default expand.default
floor_divide.default full_like.default gather.default ge.Scalar gelu.default gt.Scalar histc.default
index.Tensor index_put.default layer_norm.default le.Tensor linear.default log.default lstm.input
lt.Scalar matmul.default mean.default mean.dim min.other mul.Tensor native_dropout.default
ne.Scalar neg.default new_ones.default permute.default pow.Tensor_Scalar relu.default repeat.default
rsqrt.default scaled_dot_product_attention.default select.int sigmoid.default silu.default
sin.default slice.Tensor softmax.int softplus.default sort.default split.Tensor
split_with_sizes.default squeeze.dim stack.default sub.Tensor sum.dim_IntList sym_size.int t.default
tanh.default topk.default transpose.int unsqueeze.default view.default where.ScalarOther where.self
zeros.default zeros_like.default
"""


def test_default_lists_every_op_of_the_captured_models() -> None:
    rules = load_rules(["default"])
    names = [f"aten.{name}" for name in CAPTURED.split()]
    names += ["operator.getitem", "operator.mul", "transformers.grouped_mm_fallback.default"]
    assert [name for name in names if category(rules, name) is None] == []


# ---- default: its claims about kernels, measured ------------------------------------------------


def error(low: torch.dtype, call: Callable[..., Any], *args: torch.Tensor) -> float:
    """Relative L2 error of a low-precision call against FP64 on the same rounded inputs."""
    rounded = [a.to(low) for a in args]
    got, exact = (pytree.tree_leaves(call(*x))[0] for x in (rounded, [a.double() for a in rounded]))
    assert got.dtype == low
    return float((got.double() - exact).norm() / exact.norm())


def with_float_statistics(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Any:
    wide = torch.promote_types(x.dtype, torch.float32)
    mean, var = torch.full((64,), 99.0, dtype=wide), torch.ones(64, dtype=wide)
    args = (x, w.to(wide), b.to(wide), mean, var)
    return aten._native_batch_norm_legit_functional(*args, True, 0.1, 1e-5)


ROWS, IMAGE, SEQUENCE = (16, 4096), (4, 64, 16, 16), (2, 4, 256, 32)
REDUCTIONS: dict[str, tuple[Callable[..., Any], tuple[int, ...]]] = {
    "layer_norm": (lambda x, w, b: aten.layer_norm(x, [4096], w, b), ROWS),
    "rms_norm": (lambda x, w, b: aten.rms_norm(x, [4096], w), ROWS),
    "group_norm": (lambda x, w, b: aten.group_norm(x, 4, w, b), IMAGE),
    "_native_batch_norm_legit_functional": (with_float_statistics, IMAGE),
    "softmax": (lambda x, w, b: aten.softmax(x, -1), ROWS),
    "avg_pool2d": (lambda x, w, b: aten.avg_pool2d(x, [16, 16]), IMAGE),
    "adaptive_avg_pool2d": (lambda x, w, b: aten.adaptive_avg_pool2d(x, [1, 1]), IMAGE),
    "linear": (lambda x, w, b: aten.linear(x, w.expand(8, -1)), ROWS),
    "conv2d": (lambda x, w, b: aten.conv2d(x / 100, x[:2] / 100), IMAGE),
    "scaled_dot_product_attention": (
        lambda x, w, b: aten.scaled_dot_product_attention(x - 100, x - 100, x),
        SEQUENCE,
    ),
}


@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions_that_may_be_low_accumulate_in_float32(name: str, low: torch.dtype) -> None:
    """On rows of mean 100 and deviation 1, summing in low precision would be off by percents."""
    call, shape = REDUCTIONS[name]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) + 100
    w, b = torch.randn(2, 64 if shape is IMAGE else 4096, generator=generator)
    assert category(load_rules(["default"]), f"aten.{name}") in ("allow", "infer")
    assert error(low, call, x, w, b) < torch.finfo(low).eps


def test_why_instance_norm_stays_float32_on_the_cpu() -> None:
    x = torch.randn(IMAGE, generator=torch.Generator().manual_seed(0)) + 100

    def call(x: torch.Tensor) -> Any:
        return aten.instance_norm(x, None, None, None, None, True, 0.1, 1e-5, False)

    assert error(torch.float16, call, x) > 10 * torch.finfo(torch.float16).eps
    rules = load_rules(["default"])
    name = "aten.instance_norm.default"
    assert [category(rules, name, device=d) for d in ("cpu", "cuda")] == ["deny", "infer"]


def test_only_presets_that_ask_for_them_need_trials(preset: str) -> None:
    assert load_rules([preset]).uses_trials is (preset == "default")
