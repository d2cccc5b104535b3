"""Training on the command line: what a model file has to give, and what is said where it does not.

Each mistake ends in one line and exit code 2, leaves nothing behind, and leaves the report of the
run before as it was.
"""

from __future__ import annotations

import json
import statistics
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from tests.command import TRAINED, Outcome, amp, net, write

DEFINE = "Define train_batches(seed) and loss(outputs, target) in the model file."
LOOK = "Correct it there; --debug shows the traceback."
PAIRS = "Let it give (inputs, target) pairs, anew at each call."
FIT = (
    "Pad it to that size, or convert the model with example inputs, and with batches, like those "
    "you will pass."
)
POWERS = "a power of two from 1 to 2**127."
YIELD, LOSS = "yield batch(100 * seed + step + 2)", "return F.cross_entropy(outputs, target)"
OPTIMIZER = "return torch.optim.SGD(parameters, lr=0.1)"


def batches(text: str) -> str:
    assert YIELD in TRAINED
    return TRAINED.replace(YIELD, text)


def loss(text: str) -> str:
    assert LOSS in TRAINED
    return TRAINED.replace(LOSS, text)


def optimizer(text: str) -> str:
    assert OPTIMIZER in TRAINED
    return TRAINED.replace(OPTIMIZER, text)


def scheduler(text: str) -> str:
    return f"{TRAINED}def scheduler(optimizer):\n    {text}\n"


def initial_model(text: str) -> str:
    return f"{TRAINED}def initial_model(seed):\n    {text}\n"


def without(*names: str) -> str:
    text = TRAINED
    for name in names:
        text = text.replace(f"def {name}(", f"def _{name}(")
    return text


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
    }


BEFORE = '{"schema_version": 1, "amp_convert": "0.1", "model": {}, "verdict": {}}'


def refused(folder: Path, text: str, *arguments: str, code: int = 2) -> Outcome:
    """The outcome of a run on this model file; the folder has a report, and must stay as it was."""
    write(folder, text)
    write(folder, "", "pyproject.toml")
    (folder / "reports/model").mkdir(parents=True)
    write(folder, BEFORE, "reports/model/report.json")
    before = contents(folder)
    outcome = amp(folder, *(arguments or ("model.py",)))
    assert outcome.code == code, outcome
    assert contents(folder) == before
    return outcome


def checks(outcome: Outcome) -> dict[str, Any]:
    """The checks on training by name."""
    found = {check["name"]: check for check in outcome.json["verdict"]["checks"]}
    return {name: check for name, check in found.items() if name.startswith("training")}


# Wrong flags


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


# What the file does not define


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


# What the file's functions do wrong


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(
            loss("return F.cross_entropy(outputs, target, reduction='none')"),
            "loss() gives a tensor of shape (16,) (at model.py:26). "
            "Let it return a floating point tensor of one element.",
            id="a loss a sample",
        ),
        pytest.param(
            loss("return F.cross_entropy(outputs, target).item()"),
            "loss() gives a float, not a tensor (at model.py:26). "
            "Let it return a floating point tensor of one element.",
            id="a loss that is no tensor",
        ),
        pytest.param(
            loss("return (outputs.argmax(1) == target).sum()"),
            "loss() gives a tensor of torch.int64 (at model.py:26). "
            "Let it return a floating point tensor of one element.",
            id="a loss of integers",
        ),
        pytest.param(
            loss("return F.cross_entropy(outputs, target).detach()"),
            "loss() gives a tensor that no parameter has a gradient from (at model.py:26). "
            "Compute it from the model's outputs, without detach(), item() or no_grad().",
            id="a loss without a gradient",
        ),
        pytest.param(
            loss("return F.cross_entropy(outputs, target.int())"),
            "loss(), given the outputs of the FP32 model, raised RuntimeError: expected target "
            f"dtype to be Long or Byte, but got Int (at model.py:27). {LOOK}",
            id="a target dtype that the loss refuses",
        ),
        pytest.param(
            batches("yield batch(0)[0], torch.ones(4)"),
            "loss(), given the outputs of the FP32 model, raised ValueError: Expected input "
            f"batch_size (16) to match target batch_size (4) (at model.py:27). {LOOK}",
            id="a target shape that the loss refuses",
        ),
        pytest.param(
            batches("if False: yield"),
            f"train_batches() gives no batches (at model.py:22). {PAIRS}",
            id="no batch",
        ),
        pytest.param(
            batches("yield batch(0)[0]"),
            f"batch 0 of train_batches() is a Tensor, not a pair (at model.py:22). {PAIRS}",
            id="no pair",
        ),
        pytest.param(
            batches("yield (*batch(0), None) if step == 3 else batch(0)"),
            f"batch 3 of train_batches() is a tuple, not a pair (at model.py:22). {PAIRS}",
            id="a triple later",
        ),
        pytest.param(
            batches("yield list(batch(0)[0]), 0"),
            "batch 0 of train_batches() gives a list (at model.py:22). "
            "Use a tuple for positional arguments.",
            id="a list of inputs",
        ),
        pytest.param(
            batches("yield torch.ones(16, 9), batch(0)[1]"),
            "input input has shape (16, 9), but the graph takes (any, 8) (at batch 0 of "
            f"train_batches(0)). {FIT}",
            id="a batch that does not fit",
        ),
        pytest.param(
            batches("yield torch.ones(16, 9 if step == 3 else 8), batch(0)[1]"),
            "the FP32 model, given step 4 of train_batches(0), raised RuntimeError: mat1 and mat2 "
            "shapes cannot be multiplied (16x9 and 8x16) (at model.py). "
            "Make it what its forward() takes; --debug shows the traceback.",
            id="a batch that does not fit later",
        ),
        pytest.param(
            batches("yield batch(0)\n        raise OSError('no such file')"),
            f"train_batches() raised OSError: no such file (at model.py:25). {LOOK}",
            id="batches that fail",
        ),
        pytest.param(
            TRAINED.replace("train_batches(seed):", "train_batches():\n    seed = 0"),
            "train_batches() raised TypeError: train_batches() takes 0 positional arguments but 1 "
            f"was given (at model.py). {LOOK}",
            id="batches without a seed",
        ),
        pytest.param(
            optimizer("torch.optim.SGD(parameters, lr=0.1)"),
            "optimizer() gives None (at model.py:29). Let it return a torch.optim.Optimizer.",
            id="no optimizer",
        ),
        pytest.param(
            optimizer("return torch.optim.SGD(parameters, lr=-1)"),
            f"optimizer() raised ValueError: Invalid learning rate: -1 (at model.py:30). {LOOK}",
            id="an optimizer that cannot be made",
        ),
        pytest.param(
            optimizer(
                "parameters = list(parameters)\n    for p in parameters: p.data = p.data.half()\n"
                f"    {OPTIMIZER}"
            ),
            "optimizer() made 0.weight a float16 tensor of shape (16, 8) on cpu; it was float32, "
            "(16, 8) on cpu (at model.py:29). Use one that keeps FP32 weights as they are.",
            id="an optimizer that changes the dtype",
        ),
        pytest.param(
            optimizer("return Low(parameters, lr=0.1)") + "class Low(torch.optim.SGD):\n"
            "    def step(self):\n        super().step()\n"
            "        for p in self.param_groups[0]['params']: p.data = p.data.bfloat16()\n",
            "the optimizer's step made 0.weight a bfloat16 tensor of shape (16, 8) on cpu; it was "
            "float32, (16, 8) on cpu (at model.py:29). Use one that keeps FP32 weights as they "
            "are.",
            id="a step that changes the dtype",
        ),
        pytest.param(
            scheduler("torch.optim.lr_scheduler.StepLR(optimizer, 2)"),
            "scheduler() gives None (at model.py:31). "
            "Let it return a scheduler of torch.optim.lr_scheduler.",
            id="no scheduler",
        ),
        pytest.param(
            scheduler("return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (2 - n))"),
            "the scheduler's step raised ZeroDivisionError: division by zero (at model.py:32). "
            f"{LOOK}",
            id="a scheduler that fails in its step",
        ),
        pytest.param(
            initial_model("build_model()"),
            "initial_model() gives None (at model.py:31). "
            "Let it return the model that training starts from.",
            id="no initial model",
        ),
        pytest.param(
            initial_model("return nn.Sequential(nn.Linear(8, 17), nn.ReLU(), nn.Linear(17, 4))"),
            "initial_model() gives another model than the one to convert: its 0.weight is a "
            "float32 tensor of shape (17, 8), not a float32 tensor of shape (16, 8) (at "
            "model.py:31). Let it build the same model with other weights.",
            id="another initial model",
        ),
        pytest.param(
            initial_model("return nn.Sequential(*build_model(), nn.Linear(4, 4))"),
            "initial_model() gives another model than the one to convert: it has 3.weight as well "
            "(at model.py:31). Let it build the same model with other weights.",
            id="a larger initial model",
        ),
        pytest.param(
            TRAINED.replace("    return {", "    assert len(target) == 3\n    return {"),
            f"metrics() raised AssertionError (at model.py:20). {LOOK}",
            id="metrics that fail",
        ),
    ],
)
def test_a_mistake_in_the_model_file(text: str, message: str, tmp_path: Path) -> None:
    assert refused(tmp_path, text).error == message


@pytest.mark.slow
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_no_number_in_fp32_is_said_before_any_mixed_step(
    value: str, tmp_path: Path
) -> None:
    text = loss(f"print('the loss was called')\n    {LOSS} * float('{value}')")
    outcome = refused(tmp_path, text)
    assert outcome.err.splitlines()[-2:] == [
        "the loss was called",
        f"error: the FP32 model itself has a loss of {value} (at model.py). "
        "Correct the model, its weights or that batch first.",
    ]
    assert outcome.err.count("the loss was called") == 1


@pytest.mark.slow
def test_lengths_that_vary_from_batch_to_batch_are_trained_on(tmp_path: Path) -> None:
    """The second dimension varies as the batches do."""
    text = net("return self.a(x).mean(1)").replace(
        ".reshape(4, 8)", ".reshape(4, 8)[:, None].expand(4, 5, 8)"
    )
    text += "def train_batches(seed):\n    for length in (5, 5, 6):\n"
    text += "        yield torch.ones(4, length, 8), 0\n"
    text += "def loss(outputs, target):\n    return outputs.square().sum()\n"
    write(tmp_path, text)
    outcome = amp(tmp_path, "model.py")
    assert outcome.code == 3
    assert "undecided by training.steps: too little is learnt in 3 steps" in outcome.out


def test_a_checkpoint_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    flags = ("--checkpoint", "reports/model")
    assert refused(tmp_path, TRAINED, "model.py", *flags).error == (
        "the folder reports/model is no checkpoint: it holds report.json. "
        "Give a new or empty folder."
    )


@pytest.mark.slow
def test_a_metric_that_there_is_not(tmp_path: Path) -> None:
    flags = ("--seeds", "5", "--margin", "0.1", "--train-metric", "acuracy")
    assert refused(tmp_path, TRAINED, "model.py", *flags).error == (
        "the model file has no metric acuracy. There are: loss, accuracy, train_loss."
    )


# Batches that run out


@pytest.mark.slow
def test_batches_that_run_out_before_the_steps_leave_it_open(tmp_path: Path) -> None:
    write(tmp_path, TRAINED)
    outcome = amp(tmp_path, "model.py", "--steps", "10", "--json")
    reason = "train_batches(0) has batches for 6 steps only, of 10"
    assert (outcome.code, outcome.json["verdict"]["status"]) == (3, "inconclusive")
    assert checks(outcome)["training.steps"] == {
        "name": "training.steps",
        "status": "unchecked",
        "value": 6.0,
        "threshold": 10.0,
        "required": True,
        "reason": reason,
    }
    assert outcome.json["training"]["ended"] == reason
    markdown = (tmp_path / "reports/model/report.md").read_text(encoding="utf-8")
    assert reason in markdown


def test_fewer_batches_than_a_step_takes(tmp_path: Path) -> None:
    write(tmp_path, TRAINED)
    outcome = amp(tmp_path, "model.py", "--accumulate", "7", "--json")
    assert outcome.code == 3
    steps = checks(outcome)["training.steps"]
    assert (steps["status"], steps["reason"]) == (
        "unchecked",
        "train_batches(0) has batches for 0 steps only, of 50",
    )


@pytest.mark.slow
def test_without_steps_the_batches_decide_how_many(tmp_path: Path) -> None:
    write(tmp_path, TRAINED)
    outcome = amp(tmp_path, "model.py", "--json")
    assert outcome.code == 0
    training = outcome.json["training"]
    assert (training["steps"], training["run"]["steps"], training["ended"]) == (6, 6, "")
    endless = batches("while True: yield batch(step)")
    write(tmp_path, endless)
    assert amp(tmp_path, "model.py", "--json").json["training"]["run"]["steps"] == 50


# What is trained, and what is said of it


@pytest.mark.slow
def test_a_run_that_passes_has_every_check_on_training(tmp_path: Path) -> None:
    write(tmp_path, TRAINED)
    write(tmp_path, TRAINED.replace("range(6)", "range(20)"))  # six steps teach too little
    outcome = amp(tmp_path, "model.py", "--steps", "20", "--json")
    assert outcome.code == 0
    schema = json.loads(files("amp_convert.report").joinpath("report.schema.json").read_bytes())
    assert list(Draft202012Validator(schema).iter_errors(outcome.json)) == []
    judged = checks(outcome)
    assert {check["status"] for check in judged.values()} == {"pass"}
    parts = ("steps", "sound", "random", "gradients", "loss", "weights", "metric")
    assert {f"training.{part}" for part in parts} <= set(judged)
    training = outcome.json["training"]
    assert {key: training[key] for key in ("dtype", "optimizer", "schedule", "loss_scaling")} == {
        "dtype": "float16",
        "optimizer": "SGD, learning rate 0.1",
        "schedule": "none",
        "loss_scaling": "dynamic, from 65536: times 2 after 2000 clean steps, times 0.5 after an "
        "overflow",
    }
    assert [arm["arm"] for arm in training["run"]["arms"]] == ["fp32", "mixed", "autocast", "noise"]


@pytest.mark.slow
def test_settings_of_training_from_pyproject_and_flags(tmp_path: Path) -> None:
    text = scheduler("return torch.optim.lr_scheduler.StepLR(optimizer, 2)")
    write(tmp_path, text + "def initial_model(seed):\n    return build_model()\n")
    table = "[tool.amp-convert]\nsteps = 2\naccumulate = 3\nclip-norm = 0.5\nloss-scale = 1024\n"
    write(tmp_path, table, "pyproject.toml")
    training = amp(tmp_path, "model.py", "--json", "--accumulate", "2").json["training"]
    said = ("steps", "accumulate", "clip_norm", "loss_scaling", "schedule", "initial_weights")
    assert [training[key] for key in said] == [
        *(2, 2, 0.5, "static, 1024", "StepLR", "initial_model(seed)")
    ]
    assert training["run"]["arms"][1]["scales"] == [1024, 1024]
    low = amp(tmp_path, "model.py", "--json", "--dtype", "bfloat16", "--loss-scale", "none")
    assert low.json["training"]["loss_scaling"] == "none"


@pytest.mark.slow
def test_a_loss_that_refuses_low_precision_is_given_fp32(tmp_path: Path) -> None:
    """Native autocast gives it FP16, and fails, as with the losses that PyTorch bans there."""
    refuse = "if outputs.dtype != torch.float32: raise TypeError('it takes FP32')"
    write(tmp_path, loss(f"{refuse}\n    {LOSS}"))
    outcome = amp(tmp_path, "model.py", "--json")
    assert outcome.code == 0
    notes = {arm["arm"]: arm["note"] for arm in outcome.json["training"]["run"]["arms"]}
    why = "the original fails under torch.autocast: loss(), given the outputs of the autocast"
    assert notes.pop("autocast").startswith(why)
    assert notes == {"fp32": "", "mixed": "", "noise": ""}


# Seeds and the FP32 baseline


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
