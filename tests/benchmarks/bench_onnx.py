"""`make bench-onnx`: FP16 ONNX files beside those of onnxconverter-common and NVIDIA's ModelOpt.

    python -m tests.benchmarks.bench_onnx NEIGHBOURS_PYTHON [MODEL ...]

Every tool gets the same models, batches and processor, model by model. amp-convert starts from the
PyTorch model: capture, calibration, plan, rewriting, export, and validation in ONNX Runtime against
both PyTorch models; its time is given without the run node by node, which no neighbour has, and
with it. The neighbours start from what `torch.onnx.export` makes of the model with a free batch
size, as amp-convert's files have it, and are checked as `neighbours.py` says; the time of that
export is theirs too.

Errors are relative L2 over all outputs and batches, in FP64, against the FP32 PyTorch model. ONNX
Runtime keeps FP32 between FP16 operators on a CPU, so what a file is worth shows only where every
node is run by itself and its result rounded to the dtype that the file gives it; the other column
is ONNX Runtime's own result, unoptimised. Sizes are given as they are, and bare of what says where
nodes come from: layers, reasons, lines of code. The share of low nodes is that of nodes with a
floating point result, without casts. A neighbour's error is compared with that of amp-convert's
file that has the smallest share not below the neighbour's: of the default rules', and of the `half`
preset's, which converts everything. The graphs are not the same, so 2 % or two nodes less will do.
"""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import nn
from torch.utils import _pytree as pytree

import amp_convert as amp
from amp_convert.core.tensor_errors import ErrorSums
from amp_convert.core.tree_paths import named_leaves
from amp_convert.onnx_file.write import export
from amp_convert.validate.onnx.compare import validate_onnx
from amp_convert.validate.onnx.node_kernels import Kernels, constant
from amp_convert.validate.onnx.sessions import Session
from tests.benchmarks.bench_onnx_printing import File, print_files, print_summary
from tests.benchmarks.neighbours import TOOLS
from tests.onnx_files import EXPORTABLE
from tests.zoo import BUILDERS, build

BATCHES = 8
CACHING = ("gpt2", "llama", "t5", "whisper")
"""Models that return their caches, which PyTorch's exporter does not take from the model itself."""
MINILM = Path(__file__).parents[2] / "examples" / "minilm.py"

Feeds = dict[str, torch.Tensor]


def main(python: str, names: Sequence[str]) -> None:
    """Print every figure."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:  # what is imported and warmed up is nobody's time
        bench("cnn", Path(folder), python, {})
    found: dict[str, list[File]] = {}
    versions: dict[str, str] = {}
    for name in names or (*EXPORTABLE, "minilm"):
        with tempfile.TemporaryDirectory() as folder:
            try:
                files = bench(name, Path(folder), python, versions)
            except torch.onnx.OnnxExporterError:
                print(f"\n{name}: PyTorch's exporter does not take the FP32 model itself")
                continue
        found[name] = files
        print_files(name, files)
    print(f"\namp-convert {amp.__version__}, PyTorch {torch.__version__}, CPU, "
          f"{torch.get_num_threads()} threads; "
          + ", ".join(f"{tool} {version}" for tool, version in versions.items()))  # fmt: skip
    print_summary(found)


# --- measuring -----------------------------------------------------------------------------------


def bench(name: str, folder: Path, python: str, versions: dict[str, str]) -> list[File]:
    """All tools on one model, amp-convert's two files first."""
    model, batches = minilm() if name == "minilm" else zoo_model(name)
    plain = folder / "fp32.onnx"
    begin = time.perf_counter()
    program = torch.onnx.export(
        model,
        (),
        kwargs=batches[0],
        dynamo=True,
        verbose=False,
        opset_version=20,
        dynamic_shapes=pytree.tree_map(free_batch, batches[0]),
    )
    assert program is not None
    program.save(plain, external_data=False)
    exporting = time.perf_counter() - begin
    feeds = write_batches(folder, [value.name for value in onnx.load(plain).graph.input], batches)
    wanted = [tensor_list(model(**batch)) for batch in batches]
    files = []
    for rules in ("default", "half"):
        path = folder / f"{rules}.onnx"
        seconds, with_nodes = amp_convert(model, batches, path, rules)
        file = measured(f"amp-convert, {rules}", seconds, path, feeds, wanted)
        files.append(replace(file, with_nodes=with_nodes))
    for tool in TOOLS:
        done = subprocess.run(
            [python, str(Path(__file__).with_name("neighbours.py")), tool, str(folder)],
            capture_output=True,
            text=True,
        )
        report = folder / f"{tool}.json"
        if not report.exists():
            files.append(File(tool, float("nan"), failure=ended(done)))
            continue
        figures = json.loads(report.read_text())
        versions[tool] = figures["version"]
        seconds = figures["seconds"] + exporting
        if figures["failure"]:
            files.append(File(tool, seconds, failure=figures["failure"]))
        else:
            files.append(measured(tool, seconds, folder / f"{tool}.onnx", feeds, wanted))
    return files


def ended(done: subprocess.CompletedProcess[str]) -> str:
    """Why a tool left no figures."""
    if done.returncode < 0:
        return f"its process crashed: {signal.Signals(-done.returncode).name}"
    return (done.stderr.strip().splitlines() or ["it did not start"])[-1]


def free_batch(leaf: Any) -> dict[int, Any] | None:
    return {0: torch.export.Dim.AUTO} if isinstance(leaf, torch.Tensor) else None


def zoo_model(name: str) -> tuple[nn.Module, list[dict[str, Any]]]:
    """A model of the tests, and batches as keywords."""
    model, args, _ = build(name)
    more = {"use_cache": False} if name in CACHING else {}
    batches = []
    for seed in range(BATCHES):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            _, args, kwargs = BUILDERS[name]()
        batches.append(by_keyword(model, args) | kwargs | more)
    return model.eval().requires_grad_(False), batches


def by_keyword(model: nn.Module, args: Sequence[Any]) -> dict[str, Any]:
    names = model.forward.__code__.co_varnames[1:]
    return dict(zip(names, args, strict=False))


def minilm() -> tuple[nn.Module, list[dict[str, Any]]]:
    """The sentence encoder of the examples on its own sentences."""
    spec = importlib.util.spec_from_file_location("minilm", MINILM)
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    batches = [inputs for inputs, _ in module.eval_batches()]
    return module.build_model().requires_grad_(False), batches


def write_batches(
    folder: Path, names: Sequence[str], batches: Sequence[dict[str, Any]]
) -> list[Feeds]:
    """The batches as the neighbours read them, by the names of the file's inputs."""
    (folder / "batches").mkdir()
    feeds = [{name: batch[name] for name in names} for batch in batches]
    for index, feed in enumerate(feeds):
        arrays = {name: tensor.numpy() for name, tensor in feed.items()}
        np.savez(folder / "batches" / f"{index}.npz", allow_pickle=False, **arrays)
    return feeds


def tensor_list(outputs: Any) -> list[torch.Tensor]:
    return [leaf for _, leaf in named_leaves(outputs) if isinstance(leaf, torch.Tensor)]


def amp_convert(
    model: nn.Module, batches: Sequence[dict[str, Any]], path: Path, rules: str
) -> tuple[float, float]:
    """Seconds from the PyTorch model to the file and its validation, of outputs alone and with the
    nodes."""
    times = [time.perf_counter()]
    mixed = amp.convert(model, (), batches[0], rules=rules, calibration=batches, train=False)
    exported = export(mixed, path)
    times.append(time.perf_counter())
    for node_batches in (0, 1):
        calls = [((), batch, None) for batch in batches]
        validate_onnx(mixed, exported.file, calls, fp32=exported.fp32, node_batches=node_batches)
        times.append(time.perf_counter())
    making, outputs, nodes = (after - before for before, after in pairwise(times))
    return making + outputs, making + nodes


def measured(
    tool: str, seconds: float, path: Path, feeds: list[Feeds], wanted: list[list[torch.Tensor]]
) -> File:
    """The figures of a file that ONNX Runtime takes."""
    model = ir.from_proto(onnx.shape_inference.infer_shapes(onnx.load(path)))
    session = Session(str(path))
    kernels = Kernels(model.opset_imports)
    rounded, whole = ErrorSums(), ErrorSums()
    for feed, outputs in zip(feeds, wanted, strict=True):
        inputs = [feed[value.name or ""] for value in model.graph.inputs]
        for sums, results in (
            (rounded, node_by_node(model.graph, kernels, inputs)),
            (whole, session.run(inputs)),
        ):
            for want, have in zip(outputs, results, strict=True):
                if want.is_floating_point():
                    sums.add(want, have)
    dtypes = [node.outputs[0].dtype for node in model.graph
              if node.op_type not in ("Cast", "Constant", "Identity")]  # fmt: skip
    low = dtypes.count(ir.DataType.FLOAT16)
    return File(
        tool=tool,
        seconds=seconds,
        low=low,
        floating=low + dtypes.count(ir.DataType.FLOAT),
        casts=sum(node.op_type == "Cast" for node in model.graph),
        bytes=path.stat().st_size,
        bare=bare_size(path),
        rounded=rounded.rel_l2,
        session=whole.rel_l2,
    )


def bare_size(path: Path) -> int:
    """Bytes without metadata."""
    model = onnx.load(path)
    graph = model.graph
    for item in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info,
                 *graph.initializer):  # fmt: skip
        item.ClearField("metadata_props")
        item.ClearField("doc_string")
    return model.ByteSize()


def node_by_node(
    graph: ir.Graph, kernels: Kernels, inputs: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """The outputs when every result is rounded to the dtype that the file gives it."""
    values = dict(zip(graph.inputs, inputs, strict=True))

    def given(value: ir.Value) -> torch.Tensor:
        return values[value] if value in values else constant(value.const_value)  # type: ignore[arg-type]

    for node in graph:
        values |= kernels.run(node, given)
    return [given(value) for value in graph.outputs]


# --- printing ------------------------------------------------------------------------------------


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
