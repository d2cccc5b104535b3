"""Which flags go together, with each other and with pyproject.toml."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from amp_convert.cli.flags import convert_settings
from amp_convert.core.errors import UsageError
from amp_convert.loading.settings import Settings

ONE_SEED = "does nothing with one seed. Give --seeds 5 to 12 as well, or leave it out."
NO_SCALE = "Give --loss-scale dynamic as well, or leave it out."
TEST = {"seeds": 8, "margin": 0.1}


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "pyproject.toml").write_text("")
    return f"{tmp_path}/model.py"


def table(model: str, text: str) -> None:
    Path(model).with_name("pyproject.toml").write_text(f"[tool.amp-convert]\n{text}\n")


def refusal(model: str, **given: object) -> str:
    with pytest.raises(UsageError) as caught:
        convert_settings(model, given)
    return str(caught.value)


def settings(model: str, **given: object) -> dict[str, object]:
    """The settings that are not the defaults."""
    defaults = dataclasses.asdict(Settings())
    found = dataclasses.asdict(convert_settings(model, given))
    return {name: value for name, value in found.items() if value != defaults[name]}


# What asks for training


def test_without_flags_training_is_the_model_files_choice(model: str) -> None:
    assert settings(model) == {}
    assert settings(model, dtype="bfloat16", batches=2, train=None) == {
        "dtype": "bfloat16",
        "batches": 2,
    }


@pytest.mark.parametrize(
    "given",
    [
        {"steps": 3},
        {"train_metric": "f1"},
        {"accumulate": 2},
        {"clip_norm": 1.0},
        {"loss_scale": "none"},
        {"initial_scale": 8.0},
        {"scale_growth": 4.0},
        {"scale_backoff": 0.25},
        {"scale_interval": 5},
        {"checkpoint": "c"},
        {"checkpoint": "c", "checkpoint_every": 5},
        TEST,
        {"seeds": 12, "fp32_seeds": "b"},
    ],
)
def test_a_flag_of_training_asks_for_training(model: str, given: dict[str, object]) -> None:
    assert settings(model, **given) == {"train": True, **given}
    assert settings(model, train=True, **given) == {"train": True, **given}
    table(model, "train = false")
    assert settings(model, **given) == {"train": True, **given}
    first = next(iter(given)).replace("_", "-")
    assert refusal(model, train=False, **given) == (
        f"--no-train and --{first} were both given. Leave one out."
    )


def test_what_pyproject_says_of_training_does_not_ask_for_it(model: str) -> None:
    table(model, "steps = 3\naccumulate = 2")
    assert settings(model) == {"steps": 3, "accumulate": 2}
    assert settings(model, train=False)["train"] is False
    table(model, "train = false\nseeds = 3")
    assert settings(model) == {"train": False, "seeds": 3}


# Seeds


@pytest.mark.parametrize("seeds", [2, 4, 13, 100])
def test_seeds_that_no_look_is_for(model: str, seeds: int) -> None:
    said = (
        f"{seeds} seeds were asked for; the test looks at 5, 8 and 12 pairs. "
        "Give 1, or a number from 5 to 12."
    )
    assert refusal(model, seeds=seeds, margin=1.0) == said
    table(model, f"seeds = {seeds}\nmargin = 1")
    assert refusal(model) == said


def test_seeds_need_a_margin(model: str) -> None:
    said = (
        "a test over seeds needs a margin that is fixed before it. Give --margin in the metric's "
        "unit, or --fp32-seeds with a file that amp-convert fp32-seeds made."
    )
    assert refusal(model, seeds=5) == said
    table(model, "seeds = 12")
    assert refusal(model, steps=3) == said
    assert settings(model, margin=0.5) == {"train": True, "seeds": 12, "margin": 0.5}
    assert settings(model, seeds=1) == {"train": True, "seeds": 1}


@pytest.mark.parametrize("name", ["margin", "fp32_seeds"])
def test_what_is_for_seeds_is_refused_without_them(model: str, name: str) -> None:
    value = 0.1 if name == "margin" else "x"
    said = f"--{name.replace('_', '-')} {ONE_SEED}"
    assert refusal(model, **{name: value}) == said
    assert refusal(model, **{name: value}, seeds=1) == said
    table(model, f"{name.replace('_', '-')} = {value!r}")
    assert "train" not in settings(model)


def test_one_margin_and_the_flag_has_the_last_word(model: str, tmp_path: Path) -> None:
    said = "--margin and --fp32-seeds were both given. Leave one out."
    assert refusal(model, seeds=5, margin=0.1, fp32_seeds="b") == said
    table(model, "margin = 0.1")
    asked = {"train": True, "seeds": 5}
    assert settings(model, seeds=5, fp32_seeds="b") == {**asked, "fp32_seeds": "b"}
    assert settings(model, seeds=5) == {**asked, "margin": 0.1}
    table(model, "fp32-seeds = 'b'")
    assert settings(model, seeds=5, margin=0.2) == {**asked, "margin": 0.2}
    assert settings(model, seeds=5) == {**asked, "fp32_seeds": f"{tmp_path}/b"}
    table(model, "fp32-seeds = 'b'\nmargin = 0.1")
    assert refusal(model, seeds=5) == said


# The loss scale


@pytest.mark.parametrize("name", ["initial_scale", "scale_growth", "scale_backoff"])
def test_what_is_for_a_dynamic_scale_is_refused_without_one(model: str, name: str) -> None:
    value = {"initial_scale": 8.0, "scale_growth": 4.0, "scale_backoff": 0.25}[name]
    flag = f"--{name.replace('_', '-')}"
    for scale in ("none", "1024"):
        said = f"{flag} does nothing with a loss scale of {scale}. {NO_SCALE}"
        assert refusal(model, loss_scale=scale, **{name: value}) == said
    assert refusal(model, dtype="bfloat16", **{name: value}) == (
        f"{flag} does nothing with a loss scale of none, the default for bfloat16. {NO_SCALE}"
    )
    given = {"dtype": "bfloat16", "loss_scale": "dynamic", name: value}
    assert settings(model, **given) == {"train": True, **given}
    table(model, f"{flag[2:]} = {value}")
    assert settings(model, dtype="bfloat16") == {"dtype": "bfloat16", name: value}


def test_how_often_without_where(model: str) -> None:
    assert refusal(model, checkpoint_every=3) == (
        "--checkpoint-every does nothing without a checkpoint. "
        "Give --checkpoint DIR as well, or leave it out."
    )
    table(model, "checkpoint = 'c'")
    assert settings(model, checkpoint_every=3)["checkpoint_every"] == 3


def test_importing_flags_does_not_import_torch() -> None:
    code = "import sys, amp_convert.cli.flags; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
