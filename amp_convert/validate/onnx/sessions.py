"""ONNX Runtime, as far as it is needed here: sessions, tensors in and out, and what ran where.

Two things about ONNX Runtime shape this module. Its optimiser can crash on a valid FP16 file and
take the process along, so a file is first opened in a process of its own; where that fails, it is
tried without each optimisation that is known to do this. And a provider that has no kernel for a
dtype runs the operator in FP32, between casts, and then leaves out the casts between two such
operators: a value that overflows FP16 stays finite there. Which operators those are can be read
from the graph that ONNX Runtime says it will run.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

from amp_convert.core.optional_packages import require

Ran = Literal["as written", "in float32", "rewritten"]
"""How ONNX Runtime runs a node: in the dtypes that it has in the file; between casts to FP32 and
back; or not at all, because other nodes took its place."""

SUSPECTS = ("FuseFp16InitializerToFp32NodeTransformer", "SimplifiedLayerNormFusion")
"""Optimisations that fail on FP16 files in some releases of ONNX Runtime."""

_CAST = "InsertedPrecisionFreeCast_"
_TIMEOUT = 600.0

_PROBE = """
import sys, onnxruntime
options = onnxruntime.SessionOptions()
options.log_severity_level = 4
disabled = sys.argv[3].split(",") if sys.argv[3] else None
onnxruntime.InferenceSession(
    sys.argv[1], options, providers=sys.argv[2].split(","), disabled_optimizers=disabled
)
"""


@dataclass(frozen=True)
class Placement:
    """How one node of the file ran, and by which provider."""

    ran: Ran
    provider: str


def runtime_version() -> str:
    """`onnxruntime 1.31.0`. Raises UsageError when it is not installed."""
    require("onnx", "onnxruntime")
    import onnxruntime

    return f"onnxruntime {onnxruntime.__version__}"


def providers() -> tuple[str, ...]:
    """CUDA first, where there is a device and this ONNX Runtime is built for it; the CPU always."""
    import onnxruntime

    cuda = "CUDAExecutionProvider"
    usable = torch.cuda.is_available() and cuda in onnxruntime.get_available_providers()
    return (cuda, "CPUExecutionProvider") if usable else ("CPUExecutionProvider",)


def why_not(path: str, disabled: Sequence[str] = ()) -> str:
    """Open the file in a process of its own, optimised; what goes wrong there, or ""."""
    # -P: or a file called onnxruntime.py in the current folder would run.
    command = [sys.executable, "-P", "-c", _PROBE, path, *map(",".join, (providers(), disabled))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT)  # noqa: S603
    except subprocess.TimeoutExpired:
        return f"ONNX Runtime did not open it within {_TIMEOUT:.0f} s"
    if done.returncode < 0:
        return f"ONNX Runtime crashed while it opened it (signal {-done.returncode})"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1].strip() if done.returncode and lines else ""


def lacks_kernel(failure: str) -> bool:
    """Whether what ONNX Runtime said is that the provider has no kernel: its own word for it."""
    return "NOT_IMPLEMENTED" in failure


def failing_optimisation(path: str) -> tuple[str, tuple[str, ...]]:
    """What goes wrong when the file is opened as users do, and the optimisation without which it
    does not; ("", ()) where nothing does."""
    failure = why_not(path)
    if not failure:
        return "", ()
    return failure, next(((name,) for name in SUSPECTS if not why_not(path, (name,))), ())


class Session:
    """An open ONNX model. Raises what ONNX Runtime raises where it cannot be opened."""

    def __init__(
        self,
        model: str | bytes,
        *,
        optimised: bool = False,
        disabled: Sequence[str] = (),
        record: Path | None = None,
    ) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        levels = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = (
            levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
        )
        if record is not None:
            options.optimized_model_filepath = str(record)
            for key, value in (
                ("session.optimized_model_external_initializers_file_name", "weights"),
                ("session.record_ep_graph_assignment_info", "1"),
            ):
                options.add_session_config_entry(key, value)
        self._session = onnxruntime.InferenceSession(
            model, options, providers=list(providers()), disabled_optimizers=list(disabled) or None
        )
        self._inputs = [value.name for value in self._session.get_inputs()]
        self._outputs = [value.name for value in self._session.get_outputs()]

    @property
    def providers(self) -> tuple[str, ...]:
        """Those that ONNX Runtime took, the preferred one first."""
        return tuple(self._session.get_providers())

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The outputs, on the CPU, for inputs in the order of the file."""
        feeds = {n: _to_ort(t) for n, t in zip(self._inputs, inputs, strict=True)}
        values = self._session.run_with_ort_values(self._outputs, feeds)
        return [_from_ort(value) for value in values]

    def assigned(self) -> dict[str, str]:
        """The provider of each node by name, if the session was opened with `record`."""
        subgraphs = self._session.get_provider_graph_assignment_info()
        return {node.name: sub.ep_name for sub in subgraphs for node in sub.get_nodes()}


def _to_ort(tensor: torch.Tensor) -> Any:
    import onnxruntime
    from onnx import TensorProto

    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        bits = tensor.view(torch.uint16).numpy()
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, TensorProto.BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy())


def _from_ort(value: Any) -> torch.Tensor:
    from onnx import TensorProto

    if value.element_type() == TensorProto.BFLOAT16:  # NumPy has no such dtype
        return from_dlpack(value._get_c_value()).cpu().clone()
    array = np.ascontiguousarray(value.numpy())
    return torch.from_numpy(array).reshape(tuple(value.shape()))


def recorded(path: str) -> tuple[Session, dict[str, Placement]]:
    """The file opened without optimisation, and how each of its nodes runs there, by name."""
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "ran.onnx"
        session = Session(path, record=record)
        ran = onnx.load(record, load_external_data=False).graph
    written = onnx.load(path, load_external_data=False).graph
    assigned, nodes = session.assigned(), {node.name: node for node in ran.node}
    preferred = session.providers[0]
    return session, {
        node.name: Placement(_how(node, nodes.get(node.name)), assigned.get(node.name, preferred))
        for node in written.node
    }


def _how(written: Any, ran: Any) -> Ran:
    if ran is None or ran.op_type != written.op_type:
        return "rewritten"
    names = (*ran.input, *ran.output)
    return "in float32" if any(name.startswith(_CAST) for name in names) else "as written"
