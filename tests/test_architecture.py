"""docs/architecture.md and the README's tables say what is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from amp_convert.cli.flags import table_of
from amp_convert.loading.settings import Part

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
MAP = PAGE.partition("## The map")[2].partition("What is settled")[0]
STAGES = PAGE.partition("## The way of the data")[2].partition("## The map")[0]


def test_each_path_is_there() -> None:
    """A path that is written in backquotes, from the repository or from the package."""
    paths = {
        p for p in re.findall(r"`([\w/.-]+(?:/|\.py|\.toml|\.md|\.json))`", PAGE) if "*" not in p
    }
    assert len(paths) > 25
    assert {
        p for p in paths if not any((r / p).exists() for r in (ROOT, ROOT / "amp_convert"))
    } == set()


def test_each_result_stands_in_the_module_that_the_table_names() -> None:
    found = 0
    for line in STAGES.splitlines():
        cells = line.split("|")
        folder = re.search(r"`([\w/]+)/`", cells[2]) if len(cells) == 6 else None
        if folder is None:
            continue
        for name, module in re.findall(r"`(\w+)` \(`(\w+)`\)", cells[4]):
            text = (ROOT / "amp_convert" / folder[1] / f"{module}.py").read_text(encoding="utf-8")
            assert re.search(rf"^class {name}\b", text, re.MULTILINE), (name, module)
            found += 1
    assert found >= 15


def test_each_package_is_on_the_map() -> None:
    packages = {p.parent.name for p in (ROOT / "amp_convert").glob("*/__init__.py")}
    assert packages == {*re.findall(r"^      (\w+)/ ", MAP, re.MULTILINE)}


@pytest.mark.parametrize("part", Part)
def test_the_readme_has_the_table_of_flags(part: Part) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert table_of(part) in readme, f"write into README.md:\n{table_of(part)}"
