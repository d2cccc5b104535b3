"""Containers of other libraries can be looked into."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils import _pytree as pytree

from amp_convert.capture.pytree_containers import register_containers
from amp_convert.core.tree_paths import named_leaves
from tests import bits, zoo


def test_a_key_value_cache_is_a_tree_of_tensors() -> None:
    from transformers import DynamicCache, EncoderDecoderCache

    register_containers()
    register_containers()
    halves = (DynamicCache(), DynamicCache())
    for number, half in enumerate(halves):
        keys = torch.full((2, 4, 3, 8), float(number))
        half.update(keys, keys + 10, 0)
    cache = EncoderDecoderCache(*halves)
    named = {name: float(leaf.mean()) for name, leaf in named_leaves(cache)}
    assert named == {
        "output.self_attention_cache['key_cache'][0]": 0,
        "output.self_attention_cache['value_cache'][0]": 10,
        "output.cross_attention_cache['key_cache'][0]": 1,
        "output.cross_attention_cache['value_cache'][0]": 11,
    }
    doubled = pytree.tree_map(lambda t: 2 * t, cache)
    assert isinstance(doubled, EncoderDecoderCache)
    assert [float(leaf.mean()) for leaf in pytree.tree_leaves(doubled)] == [0, 20, 2, 22]


@pytest.mark.slow
def test_nothing_is_imported_for_it() -> None:
    code = (
        "import sys; from amp_convert.capture.pytree_containers import register_containers; "
        "register_containers(); sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_a_language_model_that_returns_its_cache_is_captured_whole() -> None:
    captured = zoo.captured("t5")
    assert captured.is_whole
    model, args, kwargs = zoo.example("t5")
    with zoo.mode(model):
        want = model(*args, **kwargs)
    with zoo.mode(model):
        have = captured.regions[0].runner("eval")(*args, **kwargs)
    assert type(have.past_key_values) is type(want.past_key_values)
    bits.assert_same_bits(want, have)
