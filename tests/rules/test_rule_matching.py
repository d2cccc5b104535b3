"""Which rules match a node, and which has the last word."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from amp_convert.core.errors import UsageError
from amp_convert.rules import load
from amp_convert.rules.load import load_rules
from amp_convert.rules.rule_set import Place, Rules
from tests.rules.rules_by_hand import op, rule, write

F16 = Place("float16", "cpu", "eval")


def override(rules: Rules, layer: str = "", modules: tuple[str, ...] = (), node: str = "") -> Any:
    found = rules.match_override(F16, node=node, layer=layer, modules=modules)
    return found and found.reason


def test_op_patterns(tmp_path: Path) -> None:
    text = "".join(
        rule("op", pattern, "deny", pattern)
        for pattern in (
            "aten.fft_*",
            "aten.pow",
            "aten.pow.Tensor_Scalar",
            "aten.fft_rfft",
            "my.op",
        )
    )
    rules = load_rules([write(tmp_path / "r.toml", text)])
    assert op(rules, "aten.pow.Tensor_Tensor") == "aten.pow"
    assert op(rules, "aten.pow.Tensor_Scalar") == "aten.pow.Tensor_Scalar"
    assert op(rules, "aten.fft_fft.default") == "aten.fft_*"
    assert op(rules, "aten.fft_rfft.default") == "aten.fft_rfft"
    assert op(rules, "aten.fft_rfft2.default") == "aten.fft_*"
    assert op(rules, "my.op.default") == "my.op"
    assert op(rules, "aten.powf.default") is None
    assert op(rules, "aten.linear.default") is None


def test_a_star_matches_every_op(tmp_path: Path) -> None:
    rules = load_rules([write(tmp_path / "r.toml", rule("op", "*", "deny", "all"))])
    assert op(rules, "aten.linear.default") == op(rules, "operator.getitem") == "all"


def test_one_rule_may_name_several_ops(tmp_path: Path) -> None:
    text = "[[rule]]\nops = ['aten.mm', 'aten.fft_*']\ncategory = 'deny'\nreason = 'r'\n"
    rules = load_rules([write(tmp_path / "r.toml", text)])
    assert op(rules, "aten.mm.default") == op(rules, "aten.fft_fft.default") == "r"
    assert op(rules, "aten.bmm.default") is None
    assert {r.source for r in rules.rules} == {"r.toml:1"}


def test_in_a_file_an_exact_name_beats_an_alias_and_that_a_glob(tmp_path: Path) -> None:
    text = (
        rule("op", "aten.clip.Tensor", "deny", "overload")
        + rule("op", "aten.clip", "deny", "exact")
        + rule("op", "aten.clamp", "deny", "alias")
        + rule("op", "aten.cl*", "deny", "glob")
    )
    rules = load_rules([write(tmp_path / "r.toml", text)])
    assert op(rules, "aten.clip.Tensor") == "overload"
    assert op(rules, "aten.clip.default") == "exact"
    assert op(rules, "aten.clamp.default") == "alias"
    assert op(rules, "aten.clamp_.default") == "alias"
    assert op(rules, "aten.clone.default") == "glob"


def test_a_later_file_wins_whatever_its_pattern(tmp_path: Path) -> None:
    text = "extends = 'default'\n" + rule("op", "aten.*", "deny", "mine")
    rules = load_rules([write(tmp_path / "r.toml", text)])
    assert op(rules, "aten.linear.default") == op(rules, "aten.view.default") == "mine"


def test_a_rule_for_one_name_of_a_function_holds_for_the_others(tmp_path: Path) -> None:
    rules = load_rules([write(tmp_path / "r.toml", rule("op", "aten.divide.Tensor_mode", "deny"))])
    assert op(rules, "aten.div.Tensor_mode") == op(rules, "aten.div_.Tensor_mode") == "r"
    assert op(rules, "aten.true_divide.Tensor") is None
    rules = load_rules([write(tmp_path / "s.toml", rule("op", "aten.clip", "deny"))])
    assert op(rules, "aten.clamp.default") == "r"
    assert op(rules, "aten.clamp_min.default") is None


def test_the_last_rule_that_matches_dtype_and_device_wins(tmp_path: Path) -> None:
    text = (
        rule("op", "aten.mm", "deny", "any")
        + rule("op", "*", "deny", "star on cuda", device="cuda")
        + rule("op", "aten.mm", "deny", "bf16", dtype="bfloat16")
        + rule("op", "aten.mm", "deny", "both", dtype="bfloat16", device="cuda")
    )
    rules = load_rules([write(tmp_path / "r.toml", text)])
    assert op(rules, "aten.mm.default", "float16", "cpu") == "any"
    assert op(rules, "aten.mm.default", "float16", "cuda") == "any"
    assert op(rules, "aten.bmm.default", "float16", "cuda") == "star on cuda"
    assert op(rules, "aten.mm.default", "bfloat16", "cpu") == "bf16"
    assert op(rules, "aten.mm.default", "bfloat16", "cuda") == "both"


@pytest.mark.parametrize(
    ("pattern", "layer", "matches"),
    [
        ("encoder.layer.0", "encoder.layer.0", True),
        ("encoder.layer.0", "encoder.layer.0.attention.self", True),
        ("encoder.layer.0", "encoder.layer.01", False),
        ("encoder.layer.0", "encoder.layer", False),
        ("encoder.*.attention", "encoder.layer.3.attention", True),
        ("encoder.*.attention", "encoder.layer.3.attention.self.query", True),
        ("encoder.*.attention", "decoder.layer.3.attention", False),
        ("encoder.layer.[01]", "encoder.layer.1.output", True),
        ("encoder.layer.[01]", "encoder.layer.2.output", False),
        ("head", "Head", False),
        ("*", "", True),
        ("*", "encoder", True),
        ("head", "", False),
    ],
)
def test_layer_patterns(tmp_path: Path, pattern: str, layer: str, matches: bool) -> None:
    rules = load_rules([write(tmp_path / "r.toml", rule("layer", pattern, "deny"))])
    assert (override(rules, layer) == "r") is matches


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("LayerNorm", True),
        ("torch.nn.LayerNorm", True),
        ("torch.nn.modules.normalization.LayerNorm", True),
        ("Block", True),
        ("model.Block", True),
        ("my.nn.LayerNorm", False),
        ("model.sub.Block", False),
        ("torch.optim.LayerNorm", False),
        ("torch.nn.functional.LayerNorm", False),
        ("torch.nn.Norm", False),
        ("Norm", False),
        ("layernorm", False),
    ],
)
def test_module_patterns_match_any_module_around_the_node(
    tmp_path: Path, pattern: str, matches: bool
) -> None:
    rules = load_rules([write(tmp_path / "r.toml", rule("module", pattern, "deny"))])
    around = ("torch.nn.modules.normalization.LayerNorm", "model.Block")
    assert (override(rules, modules=around) == "r") is matches


def test_a_public_name_of_a_package_that_gives_it_lazily(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, inner = ModuleType("lazypkg"), ModuleType("lazypkg.inner")
    kind = type("Net", (), {"__module__": "lazypkg.inner"})
    vars(inner)["Net"] = kind
    rules = load_rules([write(tmp_path / "r.toml", rule("module", "lazypkg.Net", "deny"))])
    monkeypatch.setitem(sys.modules, "lazypkg", package)
    monkeypatch.setitem(sys.modules, "lazypkg.inner", inner)
    vars(package)["__getattr__"] = {"Net": kind}.__getitem__
    assert override(rules, modules=("lazypkg.inner.Net",)) == "r"
    assert override(rules, modules=("lazypkg.other.Net",)) is None


def test_a_module_rule_imports_nothing(tmp_path: Path) -> None:
    rules = load_rules([write(tmp_path / "r.toml", rule("module", "antigravity.Net", "deny"))])
    assert override(rules, modules=("antigravity.Net",)) == "r"
    assert override(rules, modules=("antigravity.inner.Net",)) is None
    assert "antigravity" not in sys.modules


def test_overrides_and_op_rules_are_apart_and_the_last_override_wins(tmp_path: Path) -> None:
    pin = "encoder.0[x]/aten.linear#2"
    text = (
        rule("layer", "encoder", "deny", "layer")
        + rule("node", pin, "allow", "node")
        + rule("module", "Block", "deny", "module")
        + rule("op", "*", "deny", "op")
        + rule("layer", "encoder", "deny", "bf16", dtype="bfloat16")
    )
    rules = load_rules([write(tmp_path / "r.toml", text)])
    assert override(rules, "encoder.0[x]", node=pin) == "node"
    assert override(rules, "encoder.0[x]", node="encoder.0[x]/aten.linear#1") == "layer"
    assert override(rules, "encoder.0[x]", ("m.Block",), pin) == "module"
    assert override(rules, "decoder") is None
    assert op(rules, "aten.linear.default") == "op"


def test_a_rule_may_hold_in_one_mode_only(tmp_path: Path) -> None:
    text = rule("op", "aten.relu", "deny", "r", mode="train")
    rules = load_rules(["default", write(tmp_path / "my.toml", text)])
    place = {mode: Place("float16", "cpu", mode) for mode in ("eval", "train")}
    assert {m: rules.match_op(p, "aten.relu").category for m, p in place.items()} == {
        "eval": "clear",
        "train": "deny",
    }


def test_a_mode_is_eval_or_train(tmp_path: Path) -> None:
    text = rule("op", "aten.relu", "deny", "r", mode="training")
    with pytest.raises(UsageError, match="unknown mode 'training'"):
        load_rules([write(tmp_path / "my.toml", text)])


def test_a_file_that_is_named_often_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = []
    parse = load.parse_rule_file

    def counted(text: str, shown: str, *, preset: bool) -> Any:
        parsed.append(shown)
        return parse(text, shown, preset=preset)

    monkeypatch.setattr(load, "parse_rule_file", counted)
    rules = load_rules(["half", "default"] * 500 + ["half"])
    assert sorted(parsed) == ["default.toml", "half.toml"]
    assert rules.files == ("default.toml", "half.toml")


def test_a_chain_of_files_has_an_end(tmp_path: Path) -> None:
    for number in range(1_000):
        (tmp_path / f"{number}.toml").write_text(f'extends = "{number + 1}.toml"\n')
    with pytest.raises(UsageError, match="more than 50 rules files extend one another in a row"):
        load_rules([str(tmp_path / "0.toml")])
