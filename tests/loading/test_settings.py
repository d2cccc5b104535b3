"""Flags, then the nearest pyproject.toml, then defaults; and what each wrong value says."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
from torch.amp import GradScaler

from amp_convert.core.errors import UsageError
from amp_convert.loading.settings import Settings, load_settings
from amp_convert.loading.source import model_folder

TABLE = "[tool.amp-convert]\n"
POWERS = "a power of two from 1 to 2**127"


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A model file in nets/, with a pyproject.toml above it that ends every search."""
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets/model.py").write_text("raise SystemExit('must not be run')")
    return f"{tmp_path}/nets/model.py"


def refusal(source: str, **flags: object) -> str:
    with pytest.raises(UsageError) as caught:
        load_settings(source, flags)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Where values come from


def test_defaults(model: str) -> None:
    assert load_settings(model, {}) == Settings(
        dtype="float16",
        rules=("default",),
        device="auto",
        out=None,
        baseline=None,
        calibrate=4,
        batches=None,
        eval_seconds=600.0,
        train=None,
        steps=None,
        seeds=None,
        onnx=False,
        tolerance=None,
        metric_tolerance=0.01,
        accumulate=1,
        clip_norm=None,
        loss_scale=None,
        initial_scale=65536.0,
        scale_growth=2.0,
        scale_backoff=0.5,
        scale_interval=2000,
        train_metric=None,
        margin=None,
        fp32_seeds=None,
        checkpoint=None,
        checkpoint_every=25,
    )


def test_the_dynamic_scale_is_pytorchs_own_by_default() -> None:
    theirs, ours = GradScaler("cpu"), Settings()
    assert (ours.initial_scale, ours.scale_growth, ours.scale_backoff, ours.scale_interval) == (
        theirs.get_scale(),
        theirs.get_growth_factor(),
        theirs.get_backoff_factor(),
        theirs.get_growth_interval(),
    )


def test_the_dtype_decides_about_the_loss_scale_unless_it_is_given() -> None:
    assert Settings().loss_scaling == "dynamic"
    assert Settings(dtype="bfloat16").loss_scaling == "none"
    assert Settings(dtype="bfloat16", loss_scale="dynamic").loss_scaling == "dynamic"
    assert Settings(loss_scale="1024").loss_scaling == "1024"


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("dynamic", "dynamic"),
        ("none", "none"),
        ("1", "1"),
        ("65536", "65536"),
        ("65536.0", "65536"),
        (1024, "1024"),
        (2.0**20, "1048576"),
        (2.0**127, str(2**127)),
    ],
)
def test_loss_scales(model: str, given: object, kept: str) -> None:
    found = load_settings(model, {"loss_scale": given}).loss_scale
    assert found == kept
    if kept[0].isdigit():
        assert float(found) == float(str(given))


def test_settings_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Settings().dtype = "bfloat16"  # type: ignore[misc]


def test_every_setting_from_pyproject(model: str, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        TABLE + "dtype = 'bfloat16'\nrules = ['half', 'mine.toml']\ndevice = 'cuda:1'\nout = 'o'\n"
        "baseline = 'b.json'\ncalibrate = 1\nbatches = 2\ntrain = false\nsteps = 3\nseeds = 5\n"
        "onnx = true\ntolerance = 1\nmetric-tolerance = 0.5\n"
        "accumulate = 2\nclip-norm = 1\nloss-scale = 'dynamic'\ninitial-scale = 1024\n"
        "scale-growth = 4\nscale-backoff = 0.25\nscale-interval = 100\ntrain-metric = 'f1'\n"
        "margin = 0.1\nfp32-seeds = 'fp32.json'\ncheckpoint = 'c'\ncheckpoint-every = 7\n"
    )
    settings = load_settings(model, {})
    assert settings == Settings(
        dtype="bfloat16",
        rules=("half", f"{tmp_path}/mine.toml"),
        device="cuda:1",
        out=f"{tmp_path}/o",
        baseline=f"{tmp_path}/b.json",
        calibrate=1,
        batches=2,
        train=False,
        steps=3,
        seeds=5,
        onnx=True,
        tolerance=1.0,
        metric_tolerance=0.5,
        accumulate=2,
        clip_norm=1.0,
        loss_scale="dynamic",
        initial_scale=1024.0,
        scale_growth=4.0,
        scale_backoff=0.25,
        scale_interval=100,
        train_metric="f1",
        margin=0.1,
        fp32_seeds=f"{tmp_path}/fp32.json",
        checkpoint=f"{tmp_path}/c",
        checkpoint_every=7,
    )
    assert all(
        isinstance(value, float)
        for value in (settings.tolerance, settings.clip_norm, settings.initial_scale)
    )


def test_flags_win_and_absent_flags_do_not(model: str, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(
        TABLE + "dtype = 'bfloat16'\nrules = 'half'\ntrain = true\nout = 'o'\nbatches = 3"
    )
    flags = {"dtype": "float16", "train": False, "rules": ["fp32"], "metric-tolerance": 0}
    options = {**flags, "batches": None, "out": None, "onnx": None}
    assert load_settings(model, options) == Settings(
        train=False, rules=("fp32",), metric_tolerance=0.0, batches=3, out=f"{tmp_path}/o"
    )
    assert load_settings(model, {"rules": ()}).rules == ("half",)
    assert load_settings(model, {"rules": []}).rules == ("half",)


def test_paths_in_flags_stay_as_typed(model: str) -> None:
    settings = load_settings(
        model, {"out": "o", "baseline": Path("b.json"), "rules": ("./r.toml",)}
    )
    assert (settings.out, settings.baseline, settings.rules) == ("o", "b.json", ("./r.toml",))


def test_rules_in_pyproject_keep_presets_and_absolute_paths(model: str, tmp_path: Path) -> None:
    (tmp_path / "half").write_text("")
    (tmp_path / "pyproject.toml").write_text(TABLE + "rules = ['half', 'sub/r', '/abs/r.toml']")
    assert load_settings(model, {}).rules == ("half", f"{tmp_path}/sub/r", "/abs/r.toml")


def test_the_nearest_pyproject_counts_even_without_the_table(model: str, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text(TABLE + "batches = 3")
    assert load_settings(model, {}).batches == 3
    (tmp_path / "nets/pyproject.toml").write_text("[tool.ruff]")
    assert load_settings(model, {}) == Settings()


def test_the_model_files_folder_counts_not_the_current_one(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nets/pyproject.toml").write_text(TABLE + "batches = 3\nout = 'o'")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/pyproject.toml").write_text(TABLE + "batches = 4")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_settings(model, {}) == Settings(batches=3, out=f"{tmp_path}/nets/o")
    assert load_settings("../nets/model.py", {}).batches == 3
    assert load_settings("../nets/model.py:make", {}).batches == 3


def test_package_form(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nets/__init__.py").write_text("raise SystemExit('must not be run')")
    monkeypatch.chdir(tmp_path)
    assert model_folder("nets.model:make") == tmp_path / "nets"
    assert model_folder("nets:make") == tmp_path / "nets"
    assert model_folder("torchvision.models:resnet18") == tmp_path


# What is wrong


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
