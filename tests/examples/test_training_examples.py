"""The promise of a comparison of training, on the examples, by the command: what trains passes, and
what underflows does not.

The GPT's batches are cut to 4 of 64 windows: a CPU without FP16 arithmetic takes minutes for more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.command import Outcome, amp, write

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL_GPT = f"""
import sys
sys.path.insert(0, {str(EXAMPLES)!r})
import char_gpt
from char_gpt import initial_model, lower_is_better, metrics, optimizer

def build_model():
    return initial_model(0).eval()

def cut(batches):
    for characters, following in batches:
        yield characters[:4], following[:4]

def example_inputs():
    return char_gpt.example_inputs()[:4]

def eval_batches():
    return cut(char_gpt.eval_batches())

def train_batches(seed):
    return cut(char_gpt.train_batches(seed))

def loss(outputs, target):
    return FACTOR * char_gpt.loss(outputs, target)
"""
TINY, WHOLE = SMALL_GPT + "\nFACTOR = 1e-6\n", SMALL_GPT + "\nFACTOR = 1\n"


def training_checks(outcome: Outcome) -> dict[str, str]:
    """Status by name."""
    checks = outcome.json["verdict"]["checks"]
    return {c["name"]: c["status"] for c in checks if c["name"].startswith("training")}


def assert_passed(outcome: Outcome) -> None:
    """Metrics other than the one that was named may be off by luck, on some other processor."""
    assert (outcome.code, outcome.json["verdict"]["status"]) == (0, "pass")
    named = [n for n in training_checks(outcome) if not n.startswith("training.metrics.")]
    assert {training_checks(outcome)[name] for name in named} == {"pass"}
    assert "training.metric" in named


def gpt(folder: Path, text: str, *flags: str, steps: int = 20) -> Outcome:
    write(folder, text)
    return amp(folder, "model.py", "--device", "cpu", "--steps", f"{steps}", "--json", *flags)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_digits_cnn_trains_as_fp32_does(dtype: str, tmp_path: Path) -> None:
    flags = ["--device", "cpu", "--dtype", dtype, "--json"]
    outcome = amp(tmp_path, str(EXAMPLES / "digits_cnn.py"), *flags)
    assert_passed(outcome)
    assert outcome.json["training"]["run"]["steps"] == 50


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_char_gpt_trains_as_fp32_does(dtype: str, tmp_path: Path) -> None:
    outcome = gpt(tmp_path, WHOLE, "--dtype", dtype)
    assert_passed(outcome)
    training: dict[str, Any] = outcome.json["training"]
    assert training["loss_scaling"].startswith("dynamic" if dtype == "float16" else "none")
    losses = {arm["arm"]: arm["losses"] for arm in training["run"]["arms"]}
    assert losses["mixed"][-1] < losses["mixed"][0] - 1


@pytest.mark.slow
def test_char_gpt_with_a_tiny_loss_and_no_scale_fails(tmp_path: Path) -> None:
    """The loss times 1e-6: FP16 has no number for nearly all of its gradients."""
    outcome = gpt(tmp_path, TINY, "--loss-scale", "none", steps=8)
    assert (outcome.code, outcome.json["verdict"]["status"]) == (1, "fail")
    found = training_checks(outcome)
    assert (found["training.gradients"], found["training.weights"]) == ("fail", "fail")
    gradients = outcome.json["training"]["gradients"]
    for part in ("weight_range", "activation_range"):
        assert gradients[part]["underflow_fraction"] > 0.9
    assert gradients["total"]["zeroed_share"] > 0.9
    advice = gradients["recommended"]
    assert advice["lost_without"] > 0.9 > 0.01 > advice["lost_with"]
    scaled = gpt(tmp_path, TINY, "--loss-scale", f"{advice['scale']:.0f}", steps=1)
    assert training_checks(scaled)["training.gradients"] == "pass"
    assert scaled.json["training"]["gradients"]["total"]["rel_l2"] < 0.05
