"""`amp-convert explain`, by the command."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.command import MLP, amp, write


@pytest.mark.slow
def test_a_node_on_a_page(tmp_path: Path) -> None:
    write(tmp_path, MLP)
    found = amp(tmp_path, "explain", "model.py", "--node", "2/aten.linear#0", "--json").json
    (node,) = found["explanation"]["nodes"]
    assert found["explanation"]["layer"] == "2"
    assert node["dtype"] == "float16"
    assert node["share"]["rel_l2"] > 0
    assert found["explanation"]["time"]["fp32"] > 0
    assert found["explanation"]["no_budget"] == ""
    shown = amp(tmp_path, "explain", "model.py", "--layer", "2")
    assert shown.code == 0
    assert "to the outputs' error of" in shown.out
    assert 'node = "2/aten.linear#0"' in shown.out


@pytest.mark.slow
def test_what_there_is_not_is_said_with_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, MLP)
    found = amp(tmp_path, "explain", "model.py", "--node", "2/aten.linear#1")
    assert found.code == 2
    assert found.error.endswith("Did you mean 2/aten.linear#0?")


@pytest.mark.parametrize("arguments", [(), ("--layer", "a", "--node", "b")])
def test_one_of_the_two(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    write(tmp_path, MLP)
    found = amp(tmp_path, "explain", "model.py", *arguments)
    assert found.code == 2
    assert "--layer NAME or --node ID" in found.error
