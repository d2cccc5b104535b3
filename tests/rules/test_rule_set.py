"""Which files are read in which order, and which rule a node gets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from amp_convert.core.errors import UsageError
from amp_convert.rules.load import load_rules, preset_names
from amp_convert.rules.rule_set import GuardLimits, Painting, Rules, Target
from tests.rules.rules_by_hand import op, rule, write

RULE = '[[rule]]\nop = "aten.linear"\ncategory = "allow"\nreason = "r"\n'


def reasons(rules: Rules) -> list[str]:
    return [r.reason for r in rules.rules]


def test_a_rule_carries_all_that_its_table_says(tmp_path: Path) -> None:
    text = (
        "# a comment\n\n"
        + RULE
        + "\n"
        + rule("layer", "a.*", "deny", "two\twords", dtype="bfloat16", device="cuda")
    )
    rules = load_rules([write(tmp_path / "my.toml", text)])
    first, second = rules.rules
    assert (first.target, first.pattern, first.category) == (Target.OP, "aten.linear", "allow")
    assert (first.reason, first.dtype, first.device) == ("r", None, None)
    assert (first.source, second.source) == ("my.toml:3", "my.toml:8")
    assert (second.dtype, second.device, second.reason) == ("bfloat16", "cuda", "two words")
    assert (first.name, second.name) == ("op aten.linear", "layer a.*")
    assert rules.name == str(tmp_path / "my.toml")
    assert rules.files == (str(tmp_path / "my.toml"),)
    assert rules.painting is Painting.GRAPPLER
    assert rules.guards == GuardLimits()


def test_extends_come_first_and_each_file_once(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path / "base.toml", rule("op", "aten.mm", "deny", "base"))
    write(
        tmp_path / "sub/a.toml", "extends = '../base.toml'\n" + rule("op", "aten.mm", "deny", "a")
    )
    b = "extends = ['base.toml', 'sub/a.toml', 'fp32']\n" + rule("op", "aten.mm", "deny", "b")
    write(tmp_path / "b.toml", b)
    rules = load_rules([str(tmp_path / "b.toml")])
    assert reasons(rules) == ["base", "a", "everything stays FP32", "b"]
    # What two files both extend must not override the first of them again.
    rules = load_rules([str(tmp_path / "sub/a.toml"), str(tmp_path / "b.toml")])
    assert reasons(rules) == ["base", "a", "everything stays FP32", "b"]
    # What is named on its own has its place in that order.
    rules = load_rules([str(tmp_path / "b.toml"), str(tmp_path / "base.toml")])
    assert reasons(rules) == ["a", "everything stays FP32", "b", "base"]
    assert op(rules, "aten.mm.default") == "base"
    assert rules.name == f"{tmp_path / 'b.toml'}, {tmp_path / 'base.toml'}"


def test_painting_and_guards_come_from_the_last_file_that_states_them(tmp_path: Path) -> None:
    first = "extends = 'autocast'\n[guards]\nactivation_headroom = 4\nweight_tiny_share = 0.25\n"
    second = "[guards]\nweight_tiny_share = false\n"
    write(tmp_path / "a.toml", first), write(tmp_path / "b.toml", second)
    rules = load_rules([str(tmp_path / "a.toml"), str(tmp_path / "b.toml")])
    assert rules.painting is Painting.AUTOCAST
    assert rules.guards == replace(load_rules(["autocast"]).guards, activation_headroom=4.0)
    assert load_rules(["autocast", "default"]).painting is Painting.GRAPPLER
    assert load_rules(["autocast", "default"]).guards == GuardLimits()


def test_a_file_may_have_the_name_of_a_preset(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "fp32", RULE)
    write(tmp_path / "mine", RULE)
    assert load_rules(["./fp32"]).rules[0].source == "fp32:1"
    assert load_rules(["fp32"]).rules[0].source == "fp32.toml:8"
    assert load_rules(["mine"]).rules[0].source == "mine:1"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    mend = f"Name a TOML file or one of the presets: {', '.join(preset_names())}."
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    child = write(tmp_path / "child.toml", "extends = 'gone.toml'\n")
    for name, message in {
        "gone.toml": f"cannot read rules file '{tmp_path}/gone.toml': no such file or directory. ",
        ".": f"cannot read rules file '{tmp_path}': is a directory. ",
        "bytes.toml": f"cannot read rules file '{tmp_path}/bytes.toml': not UTF-8 text. ",
        "rules.tml": f"cannot read rules file '{tmp_path}/rules.tml': no such file or directory. ",
        "child.toml": f"cannot read rules file '{tmp_path}/gone.toml': no such file or directory "
        f"(at {child}). ",
    }.items():
        with pytest.raises(UsageError) as caught:
            load_rules([str(tmp_path / name)])
        assert str(caught.value) == message + mend


def test_unknown_presets_and_none_at_all() -> None:
    with pytest.raises(UsageError, match=r"^unknown preset 'autocst'\. Did you mean 'autocast'\?$"):
        load_rules(["autocst"])
    with pytest.raises(UsageError, match=r"^no rules were given\. Name one of: apex-o1, "):
        load_rules([])


def test_files_that_extend_each_other(tmp_path: Path) -> None:
    a = write(tmp_path / "a.toml", "\nextends = 'b.toml'\n")
    b = write(tmp_path / "b.toml", "extends = ['fp32', './a.toml']\n")
    with pytest.raises(UsageError) as caught:
        load_rules([a])
    assert str(caught.value) == (
        f"rules files extend each other in a circle: {a} -> {b} -> {a} (at {b}:1). "
        "Remove one of these `extends`."
    )
