"""The model file's contract: what is found by name, and what each mistake in it says."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from amp_convert.core.errors import ModelError, UsageError
from amp_convert.loading import user_code as usercode
from amp_convert.loading.model_file import Case, check_forward, load_case
from amp_convert.loading.user_functions import score, user_batches

HEAD = "import torch\nfrom torch import nn\n"
MODEL = HEAD + "def build_model():\n    return nn.Linear(3, 2)\n"
INPUTS = "def example_inputs():\n    return torch.ones(4, 3)\n"
OPTIONAL = (
    *("eval_batches", "metrics", "train_batches", "loss"),
    *("optimizer", "scheduler", "initial_model"),
)
Load = Callable[..., Case]


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Each test starts with nothing loaded, and leaves sys.path and sys.modules as they were."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(usercode, "_names", {})
    yield
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load(text: str, attribute: str = "") -> Case:
        (tmp_path / "model.py").write_text(text, encoding="utf-8")
        return load_case(f"{tmp_path}/model.py{attribute}")

    return load


def refusal(function: Callable[..., object], *args: object) -> str:
    with pytest.raises(ModelError) as caught:
        function(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What is found


def test_smallest_file(load: Load, tmp_path: Path) -> None:
    case = load(MODEL + INPUTS)
    path = f"{tmp_path}/model.py"
    assert (case.name, case.source, case.path) == ("model", path, path)
    assert case.digest == hashlib.sha256((MODEL + INPUTS).encode()).hexdigest()
    assert isinstance(case.model, nn.Linear)
    assert torch.equal(case.args[0], torch.ones(4, 3))
    assert (len(case.args), case.kwargs, case.lower_is_better) == (1, {}, frozenset())
    assert [getattr(case, name) for name in OPTIONAL] == [None] * 7


def test_whole_file(load: Load) -> None:
    case = load(
        MODEL
        + INPUTS
        + "def eval_batches(): yield torch.ones(1, 3), 0\n"
        + "def metrics(outputs, target): return {'a': torch.tensor(0.5), 'b': 2}\n"
        + "def train_batches(seed): yield torch.full((1, 3), float(seed)), 0\n"
        + "loss = nn.MSELoss()\n"
        + "def optimizer(parameters): return torch.optim.SGD(parameters, lr=7.0)\n"
        + "def scheduler(optimizer): return torch.optim.lr_scheduler.StepLR(optimizer, 7)\n"
        + "def initial_model(seed): return nn.Linear(3, 2 + seed)\n"
        + "lower_is_better = ['b']\n"
    )
    assert all(getattr(case, name) for name in OPTIONAL)
    assert [target for _, target in case.eval_batches()] == [0]
    assert score(case, None, None) == {"a": 0.5, "b": 2.0}
    assert [x[0, 0].item() for x, _ in case.train_batches(9)] == [9.0]
    assert case.loss(torch.ones(1), torch.zeros(1)).item() == 1.0
    optimizer = case.optimizer(case.model.parameters())
    assert optimizer.defaults["lr"] == 7.0
    assert case.scheduler(optimizer).step_size == 7
    assert case.initial_model(4).out_features == 6
    assert case.lower_is_better == frozenset({"b"})


def test_values_instead_of_functions(load: Load) -> None:
    case = load(HEAD + "model = nn.Linear(3, 2)\nexample_inputs = {'input': torch.ones(1, 3)}")
    assert isinstance(case.model, nn.Linear)
    assert (case.args, [*case.kwargs]) == ((), ["input"])


def test_build_model_wins_over_model(load: Load) -> None:
    assert load(MODEL + INPUTS + "model = nn.Conv2d(1, 1, 1)").model._get_name() == "Linear"


@pytest.mark.parametrize("attribute", [":small", ":net", ":Holder.net", ":nn.Identity"])
def test_attribute_of_a_file(load: Load, attribute: str) -> None:
    text = (
        HEAD + INPUTS + "def small(): return nn.Linear(3, 1)\nnet = nn.Linear(3, 1)\n"
        "class Holder: net = nn.Linear(3, 1)\n"
    )
    if attribute == ":nn.Identity":
        assert "it has no parameters" in refusal(load, text, attribute)
    else:
        case = load(text, attribute)
        assert isinstance(case.model, nn.Linear)
        assert (case.model.out_features, case.name) == (1, "model")


def test_package_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nets").mkdir()
    (tmp_path / "nets/small.py").write_text(MODEL.replace("build_model", "make") + INPUTS)
    (tmp_path / "nets/__init__.py").write_text("")
    monkeypatch.chdir(tmp_path)
    case = load_case("nets.small:make")
    assert (case.name, case.source) == ("small", "nets.small:make")
    assert case.path == f"{tmp_path}/nets/small.py"
    assert case.digest == hashlib.sha256(Path(case.path).read_bytes()).hexdigest()
    assert torch.equal(case.args[0], torch.ones(4, 3))
    with pytest.raises(UsageError) as caught:
        load_case("nets.small:mkae")
    assert str(caught.value) == "small.py does not define mkae. Did you mean make?"


def test_two_files_of_one_stem(tmp_path: Path) -> None:
    for width in (1, 2):
        (tmp_path / str(width)).mkdir()
        (tmp_path / str(width) / "model.py").write_text(
            HEAD + f"class Net(nn.Linear): width = {width}\nmodel = Net(3, {width})\n" + INPUTS
        )
    first, second = (load_case(f"{tmp_path}/{width}/model.py") for width in (1, 2))
    assert (type(first.model).width, type(second.model).width) == (1, 2)
    assert first.digest != second.digest


def test_everything_printed_goes_to_stderr(load: Load, capsys: pytest.CaptureFixture[str]) -> None:
    case = load(
        HEAD
        + "print('file')\n"
        + "class Net(nn.Linear):\n"
        + "    def forward(self, x):\n        print('forward')\n        return x\n"
        + "def build_model():\n    print('build')\n    return Net(3, 2)\n"
        + "def example_inputs():\n    print('inputs')\n    return torch.ones(3)\n"
        + "def eval_batches():\n    print('batches')\n    yield torch.ones(3), 0\n"
        + "def metrics(outputs, target):\n    print('metrics')\n    return {}\n"
    )
    check_forward(case)
    assert [*user_batches("eval_batches", case.eval_batches, case.path, 1)]
    score(case, None, None)
    out, err = capsys.readouterr()
    assert (out, err) == ("", "file\nbuild\ninputs\nforward\nbatches\nmetrics\n")


# What is refused


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            INPUTS,
            "model.py defines neither build_model nor model. "
            "Define build_model(), which returns the torch.nn.Module to convert.",
        ),
        (
            MODEL.replace("build_model", "build_modle"),
            "model.py defines neither build_model nor model. "
            "Did you mean build_modle? Then rename it to build_model.",
        ),
        (
            HEAD + "def build_model():\n    raise ValueError('no weights')",
            "build_model() raised ValueError: no weights (at model.py:4). "
            "Correct it there; --debug shows the traceback.",
        ),
        (
            HEAD + "def build_model():\n    return nn.Linear('3', 2)",
            "build_model() raised TypeError: empty(): ",
        ),
        ("def build_model(size): ...", "build_model() raised TypeError: build_model() missing 1"),
        (
            "def build_model(): return 'x', 1",
            "build_model() gives a tuple (at model.py). "
            "Let build_model() give the torch.nn.Module to convert.",
        ),
        ("def build_model(): ...", "build_model() gives None (at model.py). Let build_model()"),
        ("model = 3", "model gives an int (at model.py). Let model give the torch.nn.Module"),
        (
            "def build_model():\n    import sys\n    sys.exit(1)",
            "build_model() called sys.exit(1) (at model.py:3). Guard it with ",
        ),
        (
            MODEL,
            "model.py does not define example_inputs. Define example_inputs(), which returns "
            "a tensor, a tuple (positional arguments) or a dict (keyword arguments).",
        ),
        (
            MODEL + "def example_input(): ...",
            "model.py does not define example_inputs. "
            "Did you mean example_input? Then rename it to example_inputs.",
        ),
        (
            MODEL + "def example_inputs():\n    return torch.ones(2) @ torch.ones(3)",
            "example_inputs() raised RuntimeError: ",
        ),
        (
            MODEL + "example_inputs = [torch.ones(3)]",
            "example_inputs gives a list. Use a tuple for positional arguments.",
        ),
        (MODEL + "example_inputs = 'text'", "example_inputs gives a str. Give a tensor, a tuple"),
        (
            MODEL + "def example_inputs(): return {1: torch.ones(3)}",
            "example_inputs() gives a dict with keys that are not strings. Give ",
        ),
        (
            MODEL + INPUTS + "eval_batches = []",
            "eval_batches is a list, not a function (at model.py). "
            "Write it as def eval_batches(...).",
        ),
        *[
            (
                MODEL + INPUTS + f"{name} = 3",
                f"{name} is an int, not a function (at model.py). Write it as def {name}(...).",
            )
            for name in OPTIONAL
        ],
        (
            MODEL + INPUTS + "def metrics(o, t): ...",
            "model.py defines metrics, but not eval_batches. "
            "Define eval_batches(), which yields (inputs, target) pairs.",
        ),
        (
            MODEL + INPUTS + "lower_is_better = 'loss'",
            "lower_is_better is 'loss' (at model.py). Write a tuple of names, such as (\"loss\",).",
        ),
        (MODEL + INPUTS + "lower_is_better = (1,)", "lower_is_better is (1,) (at model.py). "),
        (MODEL + INPUTS + "lower_is_better = 5", "lower_is_better is 5 (at model.py). "),
    ],
)
def test_refused_files(load: Load, text: str, said: str) -> None:
    assert refusal(load, text).startswith(said)


def test_the_file_is_named_where_no_line_of_it_is_to_blame(load: Load) -> None:
    assert "(at model.py)" in refusal(load, "def build_model(size): ...")


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("nn.ReLU()", "the model has no FP32 parameters, so there is nothing to convert: it has no "
         "parameters (at model.py). Let model give a model in FP32."),
        ("nn.BatchNorm1d(3, affine=False)", "the model has no FP32 parameters, so there is nothing "
         "to convert: it has no parameters (at model.py). Let model give a model in FP32."),
        ("nn.Sequential(nn.Linear(3, 2).double(), nn.Linear(2, 2, dtype=torch.complex64))",
         "the model has no FP32 parameters, so there is nothing to convert: its parameters are "
         "complex64, float64 (at model.py). Let model give a model in FP32."),
        ("nn.Linear(3, 2).half()",
         "the model's parameters are already float16 (at model.py). Give it in FP32."),
        ("nn.Linear(3, 2).bfloat16()",
         "the model's parameters are already bfloat16 (at model.py). Give it in FP32."),
        ("nn.LazyLinear(2)", "the model has lazy parameters without a shape (at model.py). "
         "Run it once on an input before model gives it."),
    ],
)  # fmt: skip
def test_refused_models(load: Load, model: str, said: str) -> None:
    assert refusal(load, f"{HEAD}{INPUTS}model = {model}") == said


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_torchscript_is_refused_and_partly_low_models_are_not(load: Load) -> None:
    scripted = MODEL.replace("nn.Linear(3, 2)", "torch.jit.script(nn.Linear(3, 2))")
    assert "gives a TorchScript module (at" in refusal(load, scripted + INPUTS)
    mixed = load(f"{HEAD}{INPUTS}model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2).half())")
    assert {p.dtype for p in mixed.model.parameters()} == {torch.float32, torch.float16}


# What goes wrong later


def test_refused_inputs_show_the_models_own_error_and_line(load: Load) -> None:
    text = (
        HEAD + "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.layer = nn.Linear(3, 2)\n"
        "    def forward(self, x):\n"
        "        return self.layer(x)\n"
        "model = Net()\n"
    )
    case = load(text + "example_inputs = torch.ones(4, 5)")
    assert refusal(check_forward, case) == (
        "the model, called with example_inputs, raised RuntimeError: mat1 and mat2 shapes cannot "
        "be multiplied (4x5 and 3x2) (at model.py:8). Make example_inputs match the model's "
        "forward(); --debug shows the traceback."
    )
    assert all(module.training for module in case.model.modules())
    said = refusal(check_forward, load(text + "example_inputs = {'y': torch.ones(4, 3)}"))
    assert "got an unexpected keyword argument 'y' (at model.py)" in said


def test_errors_while_batches_are_drawn_name_the_line(load: Load) -> None:
    case = load(MODEL + INPUTS + "def eval_batches():\n    yield torch.ones(3), 0\n    1 / 0")
    batches = user_batches("eval_batches", case.eval_batches, case.path, 9)
    assert next(batches)[2] == 0
    assert refusal(next, batches).startswith(
        "eval_batches() raised ZeroDivisionError: division by zero (at model.py:9)"
    )
