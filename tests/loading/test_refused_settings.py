"""Settings that are refused."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from amp_convert.core.errors import UsageError
from amp_convert.loading.read_settings import load_settings

TABLE = "[tool.amp-convert]\n"


POWERS = "a power of two from 1 to 2**127"


def refusal(source: str, **flags: object) -> str:
    with pytest.raises(UsageError) as caught:
        load_settings(source, flags)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("line", "what", "mend"),
    [
        ("dtpe = 'float16'", "unknown setting dtpe", "Did you mean dtype?"),
        ("metric_tolerance = 1", "unknown setting metric_tolerance",
         "Did you mean metric-tolerance?"),
        ("zzz = 1", "unknown setting zzz", "They are the flags of amp-convert convert --help."),
        ("dtype = 'fp16'", "dtype is 'fp16'", "Give float16 or bfloat16."),
        ("dtype = ['float16']", "dtype is ['float16']", "Give float16 or bfloat16."),
        ("device = 'gpu'", "device is 'gpu'", "Give auto, cpu, cuda or cuda:N."),
        ("device = 'cuda:'", "device is 'cuda:'", "Give auto, cpu, cuda or cuda:N."),
        ("device = 0", "device is 0", "Give auto, cpu, cuda or cuda:N."),
        ("batches = 0", "batches is 0", "Give a whole number from 1 to 10**9."),
        ("calibrate = -1", "calibrate is -1", "Give a whole number from 1 to 10**9."),
        ("steps = true", "steps is True", "Give a whole number from 1 to 10**9."),
        ("seeds = 5.0", "seeds is 5.0", "Give a whole number from 1 to 10**9."),
        ("tolerance = -0.1", "tolerance is -0.1", "Give a finite number of at least 0."),
        ("tolerance = nan", "tolerance is nan", "Give a finite number of at least 0."),
        ("tolerance = inf", "tolerance is inf", "Give a finite number of at least 0."),
        ("tolerance = true", "tolerance is True", "Give a finite number of at least 0."),
        ("metric-tolerance = '1'", "metric-tolerance is '1'",
         "Give a finite number of at least 0."),
        ("train = 1", "train is 1", "Give true or false."),
        ("onnx = 'yes'", "onnx is 'yes'", "Give true or false."),
        ("out = ''", "out is ''", "Give a path."),
        ("baseline = 3", "baseline is 3", "Give a path."),
        ("rules = []", "rules is []",
         "Give the name of a preset, the path of a rules file, or a list of them."),
        ("rules = ['half', 3]", "rules is ['half', 3]",
         "Give the name of a preset, the path of a rules file, or a list of them."),
        ("rules = ''", "rules is ''",
         "Give the name of a preset, the path of a rules file, or a list of them."),
    ],
)  # fmt: skip
def test_wrong_keys_and_values(model: str, tmp_path: Path, line: str, what: str, mend: str) -> None:
    (tmp_path / "pyproject.toml").write_text(TABLE + line)
    assert refusal(model) == f"{what} (at pyproject.toml [tool.amp-convert]). {mend}"


@pytest.mark.parametrize(
    ("keys", "wanted", "values"),
    [
        ("accumulate scale-interval checkpoint-every", "a whole number from 1 to 10**9",
         "0 -5 1.5 true '2'"),
        ("clip-norm margin", "a finite number above 0", "0 -1 nan inf true '1'"),
        ("initial-scale", POWERS, "3 0.5 0 -2 nan inf true '8' 3.402823669209385e38"),
        ("loss-scale", f"dynamic, none, or {POWERS}",
         "0.5 1000 -1 nan true 'inf' 'nan' 'static' '0.5' '' 3.402823669209385e38"),
        ("scale-growth", "a finite number above 1", "1 0.5 -2 nan inf true '2'"),
        ("scale-backoff", "a number between 0 and 1", "0 1 2 -0.5 nan inf true '0.5'"),
        ("train-metric", "a name", "'' 1 true"),
        ("fp32-seeds checkpoint", "a path", "'' 3 true"),
    ],
)  # fmt: skip
def test_wrong_values_of_training(
    model: str, tmp_path: Path, keys: str, wanted: str, values: str
) -> None:
    """In pyproject.toml and as a flag, in the same words."""
    for key in keys.split():
        for text in values.split():
            (tmp_path / "pyproject.toml").write_text(f"{TABLE}{key} = {text}")
            value = tomllib.loads(f"x = {text}")["x"]
            said = f"{key} is {value!r} (at %s). Give {wanted}."
            assert refusal(model) == said % "pyproject.toml [tool.amp-convert]"
            (tmp_path / "pyproject.toml").write_text("")
            assert refusal(model, **{key: value}) == said % f"--{key}"


def test_wrong_flags_are_named_as_flags(model: str) -> None:
    assert refusal(model, dtype="fp16") == "dtype is 'fp16' (at --dtype). Give float16 or bfloat16."
    assert refusal(model, metric_tolerance=-1) == (
        "metric-tolerance is -1 (at --metric-tolerance). Give a finite number of at least 0."
    )
    assert refusal(model, dtyp="x") == "unknown setting dtyp (at --dtyp). Did you mean dtype?"


def test_numbers_too_large_for_a_float_are_refused(model: str) -> None:
    assert "Give a finite number" in refusal(model, tolerance=10**400)


def test_a_wrong_value_in_pyproject_is_refused_even_under_a_flag(
    model: str, tmp_path: Path
) -> None:
    (tmp_path / "pyproject.toml").write_text(TABLE + "batches = 0")
    assert refusal(model, batches=2).startswith("batches is 0 (at pyproject.toml [tool.amp-")


@pytest.mark.parametrize(
    ("text", "key"), [("tool = 3", "tool"), ("[tool]\namp-convert = 'x'", "amp-convert")]
)
def test_not_a_table(model: str, tmp_path: Path, text: str, key: str) -> None:
    (tmp_path / "pyproject.toml").write_text(text)
    assert refusal(model) == (
        f"{key} is not a table (at pyproject.toml [tool.amp-convert]). Write [tool.amp-convert]."
    )


@pytest.mark.parametrize("data", [b"[tool.amp-convert\n", b"x = '\xff'"])
def test_not_toml(model: str, tmp_path: Path, data: bytes) -> None:
    (tmp_path / "pyproject.toml").write_bytes(data)
    said = refusal(model)
    assert said.startswith("pyproject.toml is not valid TOML: ")
    assert said.endswith(f"(at {tmp_path}/pyproject.toml). Correct that file.")


def test_importing_settings_does_not_import_torch() -> None:
    code = "import sys, amp_convert.loading.settings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
