"""The model file's contract: what is found by name, and what each mistake in it says."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from amp_convert.core.errors import UsageError
from amp_convert.loading.first_run import check_forward
from amp_convert.loading.model_file import Case, load_case
from amp_convert.loading.user_functions import score, user_batches
from tests.loading.model_texts import MODEL, OPTIONAL, refusal

HEAD = "import torch\nfrom torch import nn\n"


INPUTS = "def example_inputs():\n    return torch.ones(4, 3)\n"


Load = Callable[..., Case]


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
