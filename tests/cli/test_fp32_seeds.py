"""`amp-convert fp32-seeds`, and the margin that --seeds takes from its file."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from tests.cli.training_files import (
    batches,
    checks,
    loss,
    optimizer,
    refused,
    without,
)
from tests.command import TRAINED, Outcome, amp, write

DEFINE = "Define train_batches(seed) and loss(outputs, target) in the model file."


LOOK = "Correct it there; --debug shows the traceback."


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A folder with a model file, and the baseline b.json of it."""
    folder = tmp_path_factory.mktemp("measured")
    write(folder, TRAINED)
    flags = ("--out", "b.json", "--steps", "6", "--train-metric", "loss", "--json")
    return folder, amp(folder, "fp32-seeds", "model.py", *flags)


@pytest.mark.slow
def test_a_baseline_is_a_file_that_seeds_take_their_margin_from(
    measured: tuple[Path, Outcome],
) -> None:
    folder, made = measured
    assert made.code == 0
    assert made.out == (folder / "b.json").read_text(encoding="utf-8")
    assert sorted(path.name for path in folder.iterdir()) == ["b.json", "model.py"]
    found = made.json
    assert (found["metric"], found["lower_is_better"]) == ("loss", True)
    assert found["seeds"] == list(range(1000, 1008))
    assert len(set(found["values"])) == 8
    flags = ("--seeds", "5", "--steps", "6", "--fp32-seeds", "b.json", "--json")
    outcome = amp(folder, "model.py", *flags)
    assert outcome.code == 0
    training = outcome.json["training"]
    answer = training["noninferiority"]
    assert (training["metric"], training["steps"], answer["status"]) == ("loss", 6, "pass")
    assert answer["margin"]["value"] == pytest.approx(1.5 * statistics.stdev(found["values"]))
    assert [pair["seed"] for pair in training["pairs"]] == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_a_margin_of_the_users_own(tmp_path: Path) -> None:
    """One that would let a model pass that has learnt nothing is refused."""
    write(tmp_path, TRAINED)
    found = {}
    for margin in ("0.02", "0.5"):
        outcome = amp(tmp_path, "model.py", "--seeds", "5", "--margin", margin, "--json")
        check = checks(outcome)["training.seeds"]
        found[margin] = (outcome.code, check["status"], check["threshold"])
        assert outcome.json["training"]["metric"] == "accuracy"
    assert found["0.5"] == (3, "unchecked", -0.5)
    assert found["0.02"][2] == -0.02
    assert "more than half of the" in check["reason"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--steps 5", "steps was 6, is 5. Give --steps 6, or make it anew with"),
        ("--steps 6 --accumulate 2", "accumulate was 1, is 2. Give --accumulate 1, or make it"),
        ("--steps 6 --clip-norm 1", "clip-norm was none, is 1.0. Leave --clip-norm out, or make"),
        ("--steps 6 --batches 3", "batches was 8, is 3. Give --batches 8, or make it anew with"),
        ("--steps 6 --train-metric accuracy", "train-metric was loss, is accuracy. Give --train-m"),
    ],
)
def test_a_baseline_of_other_training_is_refused(
    flags: str, message: str, measured: tuple[Path, Outcome], tmp_path: Path
) -> None:
    write(tmp_path, measured[1].out, "b.json")
    more = ("--seeds", "5", "--fp32-seeds", "b.json", *flags.split())
    error = refused(tmp_path, TRAINED, "model.py", *more).error
    assert error.startswith(f"the FP32 seeds are of other training: {message}")


def test_a_baseline_of_another_model_file_is_refused(
    measured: tuple[Path, Outcome], tmp_path: Path
) -> None:
    write(tmp_path, measured[1].out, "b.json")
    flags = ("--seeds", "5", "--fp32-seeds", "b.json", "--steps", "6")
    error = refused(tmp_path, f"{TRAINED}\n", "model.py", *flags).error
    there = measured[1].json["conditions"]["digest"][:12]
    assert error.startswith(
        f"the FP32 seeds are of other training: the model file's SHA-256 was {there}, is "
    )
    assert error.endswith(". Make it anew with amp-convert fp32-seeds.")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read b.json: No such file or directory. "),
        (
            "{",
            "b.json is no file of FP32 seeds: Expecting property name",
        ),
        (
            '{"kind": "baseline"}',
            "b.json is no file of FP32 seeds: kind: Input should be 'amp-convert ",
        ),
    ],
)
def test_no_baseline(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        write(tmp_path, text, "b.json")
    flags = ("--seeds", "5", "--fp32-seeds", "b.json")
    never = "raise RuntimeError('the model file was run')"
    error = refused(tmp_path, never, "model.py", *flags).error
    assert error.startswith(message)
    assert error.endswith(" Make it anew with amp-convert fp32-seeds.")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--seeds 7 --out b.json",
            "7 FP32 seeds were asked for; a margin needs at least 8. Give --seeds 8 or more.",
        ),
        ("", "Missing option '--out'. See amp-convert fp32-seeds --help."),
        ("--out .", "cannot write .: Is a directory."),
        ("--out model.py/b.json", "cannot write model.py/b.json: Not a directory."),
        (
            "--out model.py",
            "model.py is no file of FP32 seeds, so it is not overwritten. "
            "Choose another path, or remove that file.",
        ),
    ],
)
def test_a_baseline_that_cannot_be_made_is_refused_before_the_file_is_run(
    flags: str, message: str, tmp_path: Path
) -> None:
    text = "raise RuntimeError('the model file was run')"
    assert refused(tmp_path, text, "fp32-seeds", "model.py", *flags.split()).error == message


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        (without("loss"), "", f"training was asked for, but model defines no loss. {DEFINE}"),
        (
            TRAINED,
            "",
            "train_batches(1000) has batches for 6 of 50 steps only (at model.py). "
            "Let it give more, or give --steps 6.",
        ),
        (
            TRAINED,
            "--accumulate 7",
            "train_batches(1000) has batches for 0 of 50 steps only (at model.py). "
            "Let it give more.",
        ),
        (
            loss("return F.cross_entropy(outputs, target).detach()"),
            "",
            "loss() gives a tensor that no parameter has a gradient from (at model.py:26). "
            "Compute it from the model's outputs, without detach(), item() or no_grad().",
        ),
        (
            loss("return F.cross_entropy(outputs, target) * float('nan')"),
            "",
            "the FP32 model itself has a loss of nan (at model.py). "
            "Correct the model, its weights or that batch first.",
        ),
        (
            optimizer("return torch.optim.SGD(parameters, lr=1e30)"),
            "",
            "seed 1000: the FP32 arm stopped: its loss is nan at step 2 (at model.py). "
            "Make FP32 training stable first.",
        ),
        (
            batches("yield torch.ones(16, 9), batch(0)[1]"),
            "",
            "the FP32 model, given step 1 of train_batches(1000), raised RuntimeError: mat1 and "
            "mat2 shapes cannot be multiplied (16x9 and 8x16) (at model.py). "
            "Make it what its forward() takes; --debug shows the traceback.",
        ),
        (
            TRAINED.replace("yield batch(1)", "yield torch.ones(16, 9), 0"),
            "",
            "the FP32 model, given a batch of eval_batches(), raised RuntimeError: mat1 and mat2 "
            "shapes cannot be multiplied (16x9 and 8x16) (at model.py). "
            "Make it what its forward() takes; --debug shows the traceback.",
        ),
        (
            TRAINED.replace("    return {", "    assert len(target) == 3\n    return {"),
            "",
            f"metrics() raised AssertionError (at model.py:20). {LOOK}",
        ),
        (
            TRAINED,
            "--steps 1 --train-metric f1",
            "the model file has no metric f1. There are: loss, accuracy, train_loss.",
        ),
        (
            TRAINED.replace("(outputs.argmax(1) == target).float().mean()", "0.5"),
            "--steps 1",
            "the metric of the FP32 seeds is 0.5 for each of its 8 seeds. "
            "That gives no margin: give a tolerance instead.",
        ),
        (
            TRAINED.replace("(outputs.argmax(1) == target).float().mean()", "float('nan')"),
            "--steps 1",
            "the metric accuracy is nan after FP32 training from seed 1000 (at model.py). "
            "Make FP32 training stable first.",
        ),
    ],
)
def test_training_that_gives_no_baseline(
    text: str, flags: str, message: str, tmp_path: Path
) -> None:
    made = refused(tmp_path, text, "fp32-seeds", "model.py", "--out", "new/b.json", *flags.split())
    assert made.error == message


def test_a_baseline_that_is_interrupted_is_not_written(tmp_path: Path) -> None:
    text = loss("raise KeyboardInterrupt")
    outcome = refused(tmp_path, text, "fp32-seeds", "model.py", "--out", "b.json", code=130)
    assert outcome.error == "interrupted"
