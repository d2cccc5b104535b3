"""Training on the command line: what a model file has to give, and what is said where it does not.

Each mistake ends in one line and exit code 2, leaves nothing behind, and leaves the report of the
run before as it was.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.training_files import (
    checks,
    loss,
    refused,
    without,
)
from tests.command import amp, net, write

DEFINE = "Define train_batches(seed) and loss(outputs, target) in the model file."


POWERS = "a power of two from 1 to 2**127."


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--steps 0", "steps is 0 (at --steps). Give a whole number from 1 to 10**9."),
        ("--clip-norm 0", "clip-norm is 0.0 (at --clip-norm). Give a finite number above 0."),
        (
            "--loss-scale 0.5",
            f"loss-scale is '0.5' (at --loss-scale). Give dynamic, none, or {POWERS}",
        ),
        ("--initial-scale 3", f"initial-scale is 3.0 (at --initial-scale). Give {POWERS}"),
        (
            "--scale-growth 1",
            "scale-growth is 1.0 (at --scale-growth). Give a finite number above 1.",
        ),
        (
            "--scale-backoff 2",
            "scale-backoff is 2.0 (at --scale-backoff). Give a number between 0 and 1.",
        ),
        (
            "--scale-interval x",
            "Invalid value for '--scale-interval': Input should be a valid integer. "
            "See amp-convert convert --help.",
        ),
        ("--seeds 5 --margin nan", "margin is nan (at --margin). Give a finite number above 0."),
        ("--seeds 5 --margin -1", "margin is -1.0 (at --margin). Give a finite number above 0."),
        (
            "--seeds 3 --margin 1",
            "3 seeds were asked for; the test looks at 5, 8 and 12 pairs. "
            "Give 1, or a number from 5 to 12.",
        ),
        (
            "--seeds 5",
            "a test over seeds needs a margin that is fixed before it. Give --margin in the "
            "metric's unit, or --fp32-seeds with a file that amp-convert fp32-seeds made.",
        ),
        (
            "--margin 1",
            "--margin does nothing with one seed. Give --seeds 5 to 12 as well, or leave it out.",
        ),
        (
            "--dtype bfloat16 --initial-scale 8",
            "--initial-scale does nothing with a loss scale of none, the default for bfloat16. "
            "Give --loss-scale dynamic as well, or leave it out.",
        ),
        ("--no-train --steps 5", "--no-train and --steps were both given. Leave one out."),
        ("--train_metric x", "there is no flag --train_metric. Did you mean --train-metric?"),
    ],
)
def test_wrong_flags_before_the_file_is_run(flags: str, message: str, tmp_path: Path) -> None:
    text = "raise RuntimeError('the model file was run')"
    assert refused(tmp_path, text, "model.py", *flags.split()).error == message


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("loss",), "model defines no loss"),
        (("train_batches",), "model defines no train_batches"),
        (("loss", "train_batches"), "model defines no train_batches and no loss"),
    ],
)
def test_without_a_loss_or_batches_training_is_unchecked(
    names: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    write(tmp_path, without(*names))
    outcome = amp(tmp_path, "model.py", "--json")
    assert outcome.code == 0
    assert outcome.json["training"] == {"status": "unchecked", "reason": said}
    assert checks(outcome) == {
        "training": {
            "name": "training",
            "status": "unchecked",
            "value": None,
            "threshold": None,
            "required": False,
            "reason": said,
        }
    }
    page = (tmp_path / "reports/model/report.md").read_text(encoding="utf-8")
    assert f"training: {said}" in page
    for flags in (["--train"], ["--steps", "3"], ["--accumulate", "2"]):
        asked = amp(tmp_path, "model.py", *flags)
        assert asked.code == 2
        assert asked.error == f"training was asked for, but {said}. {DEFINE}"


@pytest.mark.slow
def test_training_that_is_switched_off(tmp_path: Path) -> None:
    write(tmp_path, loss("raise RuntimeError('it was trained')"))
    outcome = amp(tmp_path, "model.py", "--no-train", "--json")
    reason = "training is switched off (--no-train)"
    assert (outcome.code, outcome.json["training"]["reason"]) == (0, reason)
    write(tmp_path, "[tool.amp-convert]\ntrain = false\n", "pyproject.toml")
    assert amp(tmp_path, "model.py", "--json").json["training"]["reason"] == reason


@pytest.mark.slow
def test_a_model_without_a_train_graph(tmp_path: Path) -> None:
    """It can be used but not trained: unchecked, and with --train not supported."""
    branch = (
        "y = x @ self.a\n        if self.training and y.sum() > 0:\n            y = y * 2\n"
        "        return y"
    )
    training = "\ndef train_batches(seed):\n    yield torch.ones(4, 8), 0\n"
    training += "def loss(outputs, target):\n    return outputs.sum()\n"
    text = net(branch, training)
    text = text.replace("self.a = nn.Linear(8, 8)", "self.a = nn.Parameter(torch.randn(8, 8))")
    write(tmp_path, text)
    outcome = amp(tmp_path, "model.py", "--json")
    reason = outcome.json["training"]["reason"]
    assert outcome.code == 3, "the file gives all that training takes"
    assert amp(tmp_path, "model.py", "--no-train").code == 0
    assert reason.startswith("the model has no train graph: ")
    asked = amp(tmp_path, "model.py", "--train")
    assert (asked.code, asked.error) == (
        4,
        f"training was asked for, but {reason}. Make its forward pass exportable in training "
        "mode, or give --no-train.",
    )
