"""Packages give their names lazily, and the same to a type checker."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import amp_convert

PACKAGES = [
    "amp_convert",
    *(
        found.name
        for found in pkgutil.walk_packages(amp_convert.__path__, "amp_convert.")
        if found.ispkg
    ),
]


def names_for_a_type_checker(package: str) -> set[str]:
    path = importlib.import_module(package).__file__
    assert path is not None
    tree = ast.parse(Path(path).read_text())
    blocks = [node for node in tree.body if isinstance(node, ast.If)]
    return {
        alias.asname or alias.name
        for block in blocks
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }


@pytest.mark.parametrize("package", [name for name in PACKAGES if names_for_a_type_checker(name)])
def test_what_is_given_is_what_a_type_checker_sees(package: str) -> None:
    module = importlib.import_module(package)
    assert {*module.__all__} - {"__version__"} == names_for_a_type_checker(package)
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nonsense'"):
        _ = module.nonsense


def test_no_package_imports_torch() -> None:
    every = [name for name in PACKAGES if name != "amp_convert.plan.guards"]
    code = f"import sys, {', '.join(every)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
