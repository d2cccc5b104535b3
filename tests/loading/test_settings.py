"""Flags, then the nearest pyproject.toml, then defaults; and what each wrong value says."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
from torch.amp import GradScaler

from amp_convert.loading.read_settings import load_settings
from amp_convert.loading.settings import Settings
from amp_convert.loading.source import model_folder

TABLE = "[tool.amp-convert]\n"


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
