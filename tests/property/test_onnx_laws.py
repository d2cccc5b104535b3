"""Laws that hold for every ONNX file: random small graphs, exported and run node by node."""

from __future__ import annotations

from pathlib import Path

import pytest

import amp_convert as amp
from amp_convert.core.number_formats import LOW_DTYPES
from amp_convert.onnx_file.write import export_onnx
from amp_convert.validate.onnx.compare import validate_onnx
from tests.graphs import RandomModule, Recipe, covering, inputs_of

UNTRANSLATED = {"damped", "attention"}
"""A custom operator, and attention without heads, which PyTorch's exporter refuses."""

RECIPES = [
    recipe
    for recipe in covering(times=2)
    if not UNTRANSLATED & {step.name for step in recipe.steps}
]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(RECIPES)))
def test_no_node_parts_by_its_own_doing(number: int, tmp_path: Path) -> None:
    """Each node's ONNX operators, fed with PyTorch's values, give PyTorch's result within one ULP,
    and each node's value is found in the file, but for casts there and back."""
    recipe: Recipe = RECIPES[number]
    inputs, dtype = inputs_of(recipe), LOW_DTYPES[number % 2]
    preset = ("default", "half")[number // 2 % 2]
    mixed = amp.convert(RandomModule(recipe).eval(), inputs, dtype=dtype, rules=preset)
    file = export_onnx(mixed, tmp_path / "m.onnx")
    parity = validate_onnx(mixed, file, [(inputs, {}, None)])
    assert parity.run("node by node").failure == ""
    assert parity.parting == ""
    assert all(node.startswith("/aten._to_copy#") for node in parity.unmatched)
    assert {row.dtype for row in parity.nodes} <= {"float16", "bfloat16", "float32", "float64"}
