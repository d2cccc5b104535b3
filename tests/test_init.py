"""The public names, and that importing the package is cheap."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys

import pytest

import amp_convert

FUNCTIONS = {
    "api": ["audit", "autocast", "check", "compare", "convert", "error_budget", "export_onnx"],
    "saving": ["load", "save"],
}
NAMES = [(module, name) for module, names in FUNCTIONS.items() for name in names]
TYPES = ["Budget", "ConvertedModel", "Decision", "Divergence", "FrozenModel", "Plan", "Run"]
ERRORS = ["AmpConvertError", "ModelError", "UnsupportedModelError", "UsageError"]


def loaded(code: str) -> set[str]:
    """The modules that a fresh interpreter has after `code`."""
    code += "\nimport sys; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_the_public_names() -> None:
    assert sorted(amp_convert.__all__) == sorted(
        [*(name for _, name in NAMES), *TYPES, *ERRORS, "__version__"]
    )
    assert dir(amp_convert) == sorted(amp_convert.__all__)


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_functions_stand_where_their_names_say(module: str, name: str) -> None:
    function = getattr(amp_convert, name)
    assert function is getattr(importlib.import_module(f"amp_convert.{module}"), name)
    assert inspect.isfunction(function)


@pytest.mark.parametrize("name", [*TYPES, *ERRORS])
def test_types_have_their_own_names(name: str) -> None:
    found = getattr(amp_convert, name)
    assert inspect.isclass(found)
    assert found.__name__ == name
    assert issubclass(found, Exception) == (name in ERRORS)


@pytest.mark.parametrize("name", ["onnx", "torch", "_missing"])
def test_other_names_are_missing(name: str) -> None:
    with pytest.raises(AttributeError, match=f"has no attribute '{name}'"):
        getattr(amp_convert, name)


def test_the_signature_of_the_contract() -> None:
    signature = inspect.signature(amp_convert.convert)
    given = {name: p.default for name, p in signature.parameters.items()}
    contract = ["model", "args", "kwargs", "dtype", "rules", "calibration"]
    assert list(given) == [*contract, "train", "dynamic"]
    for ours in ("train", "dynamic"):  # on top
        assert signature.parameters[ours].kind is inspect.Parameter.KEYWORD_ONLY
    assert str(given["dtype"]) == "torch.float16"
    assert (given["kwargs"], given["rules"], given["calibration"]) == (None, "default", None)


def test_importing_the_package_imports_nothing_heavy() -> None:
    modules = loaded("import amp_convert; amp_convert.__version__; dir(amp_convert)")
    assert "amp_convert" in modules
    assert not {"torch", "numpy", "pandas", "pydantic", "rich", "typer"} & modules


@pytest.mark.slow
def test_an_error_class_does_not_import_torch_and_a_function_does() -> None:
    assert "torch" not in loaded("import amp_convert; amp_convert.UsageError")
    assert "torch" in loaded("import amp_convert; amp_convert.convert")


def test_the_version_is_that_of_the_installed_package() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", amp_convert.__version__)
    metadata = importlib.import_module("importlib.metadata")
    assert metadata.version("amp-convert") == amp_convert.__version__
