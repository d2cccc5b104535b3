"""Plans as rules files, and given back."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example as also
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from amp_convert.plan.plan import Decision, Plan
from amp_convert.rules.load import load_rules
from amp_convert.rules.rule_set import Place, Target
from tests.plan.plans_by_hand import decision, plan
from tests.small_models import example, ramp
from tests.staged import Staged, casts_of, decisions_of

FP32: dict[str, Any] = {"low": False, "dtype": "float32", "category": "deny"}


NONE: dict[str, Any] = {"low": False, "category": "none", "rule": "", "reason": "", "macs": 0}


def saved(*decisions: Decision, painting: str = "grappler") -> dict[str, Any]:
    return tomllib.loads(plan(*decisions, painting=painting).to_toml())


AT = {"location": "model.py:41"}


# --- the rules file ------------------------------------------------------------------------------


def test_a_saved_plan_pins_every_decided_node() -> None:
    document = saved(
        decision("a/aten.linear#0"),
        decision("b/aten.exp#0", **FP32, reason="grows"),
        decision("c/aten.add#0", **{**FP32, "category": "infer"}),
        decision("d/aten.relu#0", category="clear"),
        decision("e/my.warp#0", **{**FP32, "category": "unknown"}),
        decision("f/aten.add#0", **NONE),
    )
    assert document == {
        "painting": "grappler",
        "guards": False,
        "made_for": {"dtype": "float16", "device": "cpu"},
        "rewrites": {"clamp_masks": False, "scale_scores": False, "rescale_layers": False},
        "rule": [
            {
                "node": "a/aten.linear#0",
                "category": "allow",
                "location": "model.py:41",
                "reason": "matrix product",
            },
            {
                "node": "b/aten.exp#0",
                "category": "deny",
                "location": "model.py:41",
                "reason": "grows",
            },
            {
                "node": "c/aten.add#0",
                "category": "deny",
                "location": "model.py:41",
                "reason": "matrix product",
            },
            {
                "node": "d/aten.relu#0",
                "category": "allow",
                "location": "model.py:41",
                "reason": "matrix product",
            },
            {
                "node": "e/my.warp#0",
                "category": "deny",
                "location": "model.py:41",
                "reason": "matrix product",
            },
        ],
    }


def test_under_autocasts_painting_the_category_is_what_decides() -> None:
    """There `clear` passes on what it gets and `infer` takes the widest, low or not."""
    kept = [
        decision("a", category="clear"),
        decision("b", **{**FP32, "category": "clear"}),
        decision("c", category="infer"),
        decision("d", **FP32),
        decision("e"),
        decision("f", **{**FP32, "category": "unknown"}),
    ]
    document = saved(*kept, painting="autocast")
    assert document["painting"] == "autocast"
    assert [rule["category"] for rule in document["rule"]] == [
        "clear",
        "clear",
        "infer",
        "deny",
        "allow",
        "deny",
    ]


def test_a_node_of_both_graphs_is_pinned_once() -> None:
    both = decision("a/aten.linear#0")
    found = plan(both, train=(both, decision("a/aten.dropout#0")))
    nodes = [rule["node"] for rule in tomllib.loads(found.to_toml())["rule"]]
    assert nodes == ["a/aten.linear#0", "a/aten.dropout#0"]


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    found = plan(decision("a"), dtype="bfloat16", rules=("default.toml", "mine.toml"))
    first = found.to_toml().splitlines()[0]
    assert first.startswith("# ")
    assert all(word in first for word in ("bfloat16", "default.toml", "mine.toml"))


AWKWARD = [
    'say "hello"',
    "back\\slash \\u0041 \\",
    "new\nline, tab\t, return\r, null\x00, delete\x7f, next\x85",
    "line separator \u2028, byte order mark \ufeff, no-break\u00a0space",
    "naïve Größe 层 слой 🙂",
    "beyond the first plane and not printable: \U000e0001 \U0001fb00 \U00010fff",
    "'''literal''' \"\"\"",
    "# no comment = [no.table]",
    "a.b[0]*?",
]


@settings(deadline=None, derandomize=True, database=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
@also(AWKWARD[0])
@also(AWKWARD[1])
@also(AWKWARD[2])
@also(AWKWARD[3])
@also(AWKWARD[4])
@also(AWKWARD[5])
@also(AWKWARD[6])
@also(AWKWARD[7])
def test_whatever_a_layer_is_called_it_is_the_same_when_read_back(layer: str) -> None:
    node = f"{layer}/aten.linear#0"
    (rule,) = saved(decision(node, reason=f"because of {layer}."))["rule"]
    assert rule["node"] == node
    assert rule["reason"] == f"because of {layer}."


@pytest.mark.parametrize("layer", AWKWARD)
def test_a_saved_name_matches_its_node_and_no_other(layer: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.toml"
    found = plan(decision(f"{layer}/aten.linear#0", **FP32))
    file.write_bytes(found.to_toml().encode())
    rules = load_rules([str(file)])

    def matched(node: str) -> Any:
        place = Place("float16", "cpu", "eval")
        return rules.match_override(place, node=node, layer="", modules=())

    rule = matched(f"{layer}/aten.linear#0")
    assert (rule.target, rule.category) == (Target.NODE, "deny")
    assert matched(f"{layer}/aten.linear#1") is None
    assert matched(f"x{layer}/aten.linear#0") is None


@pytest.mark.parametrize("file", ["two\nlines.toml", "escape\x1b[0m.toml", "next\x85.toml"])
def test_a_rules_file_with_an_odd_name_breaks_no_comment(file: str) -> None:
    text = plan(decision("a"), rules=(file,)).to_toml()
    assert [rule["node"] for rule in tomllib.loads(text)["rule"]] == ["a"]


class Trained(nn.Module):
    """In training, dropout stands between a denied op and a product: `relu` leads to an infer op
    and is denied with it. In eval mode `relu` leads to the product alone, and joins it."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.last = nn.Dropout(0.5), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.drop(torch.relu(torch.exp(x))))


def given_back(staged: Staged, first: Plan, folder: Path) -> Plan:
    file = folder / "plan.toml"
    file.write_text(first.to_toml(), encoding="utf-8")
    return staged.plan(load_rules([str(file)]))


def assert_same_effect(one: Plan, other: Plan, mode: str) -> None:
    def effect(found: Plan) -> list[tuple[Any, ...]]:
        return [
            (d.node, d.dtype, d.low, d.input_dtypes, d.output_dtypes)
            for d in decisions_of(found, mode)
        ]

    assert effect(one) == effect(other)
    assert casts_of(one, mode) == casts_of(other, mode)


# --- given back ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["default", "autocast", "half", "fp32"])
@pytest.mark.parametrize("model", ["block", "cnn", "attention", "gated", "chained"])
def test_a_plan_given_back_decides_the_same(model: str, preset: str, tmp_path: Path) -> None:
    first = example(model).plan(preset)
    again = given_back(example(model), first, tmp_path)
    for mode in ("eval", "train"):
        assert_same_effect(first, again, mode)
    assert again.rules == (str(tmp_path / "plan.toml"),)
    assert {d.rule for d in again.eval if d.decided} <= {
        "explicit cast",
        *(f"node {d.node}" for d in again.eval),
    }


def test_a_change_in_the_file_is_a_change_in_the_plan(tmp_path: Path) -> None:
    staged = example("block")
    text = staged.plan().to_toml()
    pinned = 'node = "down/aten.linear#0"\ncategory = "{}"'
    assert pinned.format("allow") in text
    file = tmp_path / "edited.toml"
    file.write_text(text.replace(pinned.format("allow"), pinned.format("deny")), encoding="utf-8")
    edited = staged.plan(load_rules([str(file)]))
    assert [d.node for d in edited.eval if d.low] == [
        "up/aten.linear#0",
        "norm/aten.layer_norm#0",
        "/aten.gelu#0",
    ]


@pytest.mark.slow
def test_a_node_that_differs_between_the_graphs_is_given_back_as_it_was(tmp_path: Path) -> None:
    staged = Staged.of(Trained(), ramp(2, 8))
    first = staged.plan()
    relus = [next(d for d in found if "relu" in d.node) for found in (first.eval, first.train)]
    assert relus[0].node == relus[1].node
    assert [d.low for d in relus] == [True, False]
    again = given_back(staged, first, tmp_path)
    assert_same_effect(first, again, "eval")
    assert_same_effect(first, again, "train")
