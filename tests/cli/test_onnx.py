"""`--onnx` through the command: the file, its checks, and what can be wrong."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import onnx
import pytest

from tests.command import BRANCH, MLP, amp, net, write

PASSED = (
    "onnx.outputs.structure",
    "onnx.outputs.channels",
    "onnx.runs", "onnx.outputs.finite", "onnx.outputs.rel_l2", "onnx.outputs.cosine",
    "onnx.outputs.max_abs", "onnx.metrics.score",
)  # fmt: skip


def onnx_checks(report: Any) -> dict[str, str]:
    checks = report["verdict"]["checks"]
    return {c["name"]: c["status"] for c in checks if c["name"].startswith("onnx")}


@pytest.mark.slow
def test_the_file_lies_in_the_report_folder_and_is_judged(tmp_path: Path) -> None:
    write(tmp_path, MLP)
    outcome = amp(tmp_path, "model.py", "--onnx", "--json")
    report = outcome.json
    assert (outcome.code, report["verdict"]["status"]) == (0, "pass"), report["verdict"]
    # Whether ONNX Runtime rounds as PyTorch does is the provider's affair; the node is named then.
    found = onnx_checks(report)
    assert found.pop("onnx.converted") in ("pass", "unchecked")
    assert found.pop("onnx.outputs.samples") == "unchecked"  # of four elements
    assert found == dict.fromkeys(PASSED, "pass")
    folder = tmp_path / "reports" / "model"
    model = onnx.load(folder / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert report["onnx"]["model"]["path"] == report["onnx"]["parity"]["path"] == "model.onnx"
    assert report["onnx"]["model"]["bytes"] == (folder / "model.onnx").stat().st_size
    weights = [t for t in model.graph.initializer if t.dims]
    assert {tensor.data_type for tensor in weights} == {onnx.TensorProto.FLOAT16}
    assert not list(tmp_path.glob("**/.*amp-convert*"))


@pytest.mark.slow
def test_what_the_provider_has_no_kernel_for_is_unchecked(tmp_path: Path) -> None:
    """ONNX Runtime's CPU provider has no BF16 matrix product; the file is written all the same."""
    write(tmp_path, MLP)
    outcome = amp(tmp_path, "model.py", "--onnx", "--dtype", "bfloat16", "--json")
    found = onnx_checks(outcome.json)
    if found["onnx.runs"] == "unchecked":
        assert outcome.code == 3
        [check] = [c for c in outcome.json["verdict"]["checks"] if c["name"] == "onnx.runs"]
        assert "NOT_IMPLEMENTED" in check["reason"]
    else:
        assert (outcome.code, found["onnx.runs"]) == (0, "pass")
    model = onnx.load(tmp_path / "reports" / "model" / "model.onnx")
    weights = [t for t in model.graph.initializer if t.dims]
    assert {tensor.data_type for tensor in weights} == {onnx.TensorProto.BFLOAT16}


@pytest.mark.slow
def test_its_flags_ask_for_it(tmp_path: Path) -> None:
    """Low inputs and outputs, another opset, and weights in a file of their own."""
    write(tmp_path, MLP.replace("16", "640"))  # small weights stay inside
    flags = ["--io-types", "low", "--opset", "21", "--external-data"]
    outcome = amp(tmp_path, "model.py", *flags)
    assert outcome.code == 0, outcome.out + outcome.err
    folder = tmp_path / "reports" / "model"
    assert (folder / "model.onnx.data").stat().st_size > 0
    model = onnx.load(folder / "model.onnx")
    assert [opset.version for opset in model.opset_import if not opset.domain] == [21]
    ends = [*model.graph.input, *model.graph.output]
    assert {end.type.tensor_type.elem_type for end in ends} == {onnx.TensorProto.FLOAT16}
    report = json.loads((folder / "report.json").read_text())
    assert report["onnx"]["model"]["external_data"] == "model.onnx.data"
    # A run without it leaves no file of the last one.
    assert amp(tmp_path, "model.py").code == 0
    assert not list(folder.glob("model.onnx*"))


def test_without_it_nothing_is_written_and_the_report_says_so(tmp_path: Path) -> None:
    write(tmp_path, MLP)
    report = amp(tmp_path, "model.py", "--json").json
    assert onnx_checks(report) == {"onnx": "unchecked"}
    assert report["onnx"] == {"status": "unchecked", "reason": "--onnx was not given"}


def test_a_missing_package_is_named_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "amp_convert.core.optional_packages.find_spec",
        lambda name: None if name == "onnxruntime" else find(name),
    )
    write(tmp_path, MLP)
    outcome = amp(tmp_path, "model.py", "--onnx")
    assert (outcome.code, outcome.err) == (
        2,
        "error: onnxruntime is not installed. Install what it takes: "
        "pip install 'amp-convert[onnx]'.\n",
    )


@pytest.mark.slow
def test_a_model_in_parts_is_no_onnx_model_and_the_rest_is_reported(tmp_path: Path) -> None:
    write(tmp_path, net(BRANCH))
    outcome = amp(tmp_path, "model.py", "--onnx", "--json")
    assert outcome.code == 3
    [check] = [c for c in outcome.json["verdict"]["checks"] if c["name"] == "onnx"]
    assert (check["status"], check["required"]) == ("unchecked", True)
    assert check["reason"].startswith(
        "ONNX takes a whole model, and only parts of this one could be captured: its control flow"
    )
    assert (tmp_path / "reports" / "model" / "report.html").exists()
    assert not list(tmp_path.glob("**/*.onnx"))


CUMPROD = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        x = self.layer(x).sigmoid()
        return x.cumprod(-1)

def build_model():
    torch.manual_seed(0)
    return Net().eval()

def example_inputs():
    return torch.randn(16, 8)
"""


@pytest.mark.slow
def test_an_operator_without_a_translation_goes_by_its_own_name_and_line(tmp_path: Path) -> None:
    """The exporter speaks of prims.prod, which nobody wrote."""
    write(tmp_path, CUMPROD)
    outcome = amp(tmp_path, "model.py", "--onnx", "--json")
    assert outcome.code == 3
    report = outcome.json
    assert report["onnx"]["status"] == "unchecked"
    assert report["onnx"]["reason"] == (
        "this model cannot be written as ONNX: the operator aten.cumprod has no translation to "
        "ONNX (PyTorch makes prims.prod of it) (at model.py:12). Write it with other operators "
        "there, or leave --onnx out."
    )
    failed = {c["name"] for c in report["verdict"]["checks"] if c["status"] == "fail"}
    assert not failed
    assert (tmp_path / "reports" / "model" / "layers.csv").exists()


BAG = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag, self.layer = nn.EmbeddingBag(50, 16), nn.Linear(16, 2)

    def forward(self, ids):
        return self.layer(self.bag(ids))

def build_model():
    torch.manual_seed(0)
    return Net().eval()

def example_inputs():
    return torch.randint(0, 50, (16, 3))
"""


@pytest.mark.slow
def test_a_file_with_sequences_of_tensors_runs_node_by_node(tmp_path: Path) -> None:
    """PyTorch translates nn.EmbeddingBag into a loop that builds up a sequence."""
    write(tmp_path, BAG)
    outcome = amp(tmp_path, "model.py", "--onnx", "--json")
    assert outcome.code == 0, outcome.json["verdict"]
    runs = {run["arm"]: run for run in outcome.json["onnx"]["parity"]["runs"]}
    assert runs["node by node"]["failure"] == ""
    assert runs["node by node"]["batches"] == 1
    assert "" not in outcome.json["onnx"]["model"]["nodes_by_dtype"]


def test_an_opset_that_cannot_be_written(tmp_path: Path) -> None:
    write(tmp_path, MLP)
    outcome = amp(tmp_path, "model.py", "--onnx", "--opset", "9")
    assert (outcome.code, outcome.error) == (2, "opset 9 cannot be written. Use 18 to 23.")
