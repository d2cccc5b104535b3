"""An ONNX section with chosen values, for the tests to change."""

from __future__ import annotations

import math
from dataclasses import replace

from amp_convert.onnx_file.write import OnnxModel, OnnxTensor
from amp_convert.report.model import OnnxSection
from amp_convert.validate.onnx.results import (
    Arm,
    OnnxMetric,
    OnnxNode,
    OnnxOutput,
    OnnxParity,
    OnnxRun,
)
from tests.report.builders import HOSTILE, output_error


def model(**changes: object) -> OnnxModel:
    """A file of 12 nodes for the `small_report`, with its weights beside it."""
    base = OnnxModel(
        path="model.onnx",
        external_data="model.onnx.data",
        bytes=3 * 2**20,
        dtype="float16",
        io_types="keep",
        opset=20,
        producer="amp-convert 0.1.0 with PyTorch 2.13.0",
        inputs=(OnnxTensor("image", "float32", ("batch", 1, 8, 8)),),
        outputs=(
            OnnxTensor("logits", "float32", ("batch", 10)),
            OnnxTensor("label", "int64", ("batch",)),
        ),
        nodes=12,
        casts=3,
        nodes_by_dtype={"float16": 7, "float32": 3, "int64": 2},
        lost_state=(),
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def output(
    distance: float, limit: float | None = 0.01, *, agrees: bool | None = True, name: str = "logits"
) -> OnnxOutput:
    """A floating point output this far from the converted model's."""
    error = replace(output_error(name, 2 * distance), max_abs_err=distance)
    return OnnxOutput(output_error(name, 5e-4), error, limit, agrees)


def label(mismatches: int = 0) -> OnnxOutput:
    """An integer output."""
    error = replace(output_error("label", 0.0, "int64"), mismatches=mismatches)
    return OnnxOutput(error, error, None, mismatches == 0)


def run(arm: Arm, *outputs: OnnxOutput, **changes: object) -> OnnxRun:
    """A run over two batches."""
    return replace(OnnxRun(arm, "", (), 2, outputs), **changes)  # type: ignore[arg-type]


def fp32_run() -> OnnxRun:
    """The FP32 file's, which is compared with FP32 alone."""
    error = OnnxOutput(output_error("logits", 1e-7), None, None, None)
    return run("fp32", error, replace(label(), against_converted=None, agrees=None))


def node(
    layer: str, op: str, local: float | None, accumulated: float | None, **changes: object
) -> OnnxNode:
    """The row of a node of the `small_report`."""
    base = OnnxNode(
        node=f"{layer}/{op}#0",
        layer=layer,
        op=op,
        dtype="float16",
        local_rel_l2=local,
        accumulated_rel_l2=accumulated,
        sqnr_db=60.0,
        cosine=1.0,
        max_abs_err=0.001,
        max_ulp=1.0,
        nonfinite=0,
        overflow_fraction=0.0,
        underflow_fraction=0.0,
        onnx_ops=("Conv",),
        ran="in float32",
        provider="CPUExecutionProvider",
        parts=False,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def parity(**changes: object) -> OnnxParity:
    """Two batches: optimised, the file needs an optimisation left out and does not agree."""
    base = OnnxParity(
        path="model.onnx",
        dtype="float16",
        runtime="onnxruntime 1.32.0",
        providers=("CPUExecutionProvider",),
        batches=2,
        samples=64,
        runs=(
            fp32_run(),
            run("unoptimised", output(0.004), label()),
            run(
                "optimised",
                output(0.04, agrees=False),
                label(3),
                failure="no such kernel",
                without=("SimplifiedLayerNormFusion",),
            ),
            run("node by node", output(0.0), label(), batches=1),
        ),
        ran={"as written": 1, "in float32": 5, "rewritten": 2},
        ran_reason="",
        nodes=(
            node("features.0", "aten.conv2d", 1e-6, 1e-6),
            node(
                "features.1", "aten.batch_norm", 2e-7, 3e-6, dtype="float32", ran="",
                onnx_ops=("Mul", "Add"),
            ),
            node("classifier", "aten.linear", 4e-3, 5e-3, onnx_ops=("Gemm",), parts=True),
            node("", "aten.exp", 0.0, 6e-3, onnx_ops=(), ran=""),
        ),
        node_batches=1,
        unmatched=("/aten.frobnicate#0",),
        parting="classifier/aten.linear#0",
        drifting="features.1/aten.batch_norm#0",
        metrics=(OnnxMetric("accuracy", 0.975, 0.96, 0.95, lower_is_better=False),),
        metrics_arm="optimised",
    )  # fmt: skip
    return replace(base, **changes)  # type: ignore[arg-type]


def section(changed: OnnxModel | None = None, **changes: object) -> OnnxSection:
    """The section of `model`, or of the one given, and of a `parity` with these changes."""
    return OnnxSection(model=changed or model(), parity=parity(**changes))


def clean_parity() -> dict[str, object]:
    """What `parity` takes for a file that gives PyTorch's bits and needs no cast."""
    same = node("features.0", "aten.conv2d", 0.0, 0.0, ran="as written")
    arms: tuple[Arm, ...] = ("unoptimised", "optimised", "node by node")
    return {
        "runs": (fp32_run(), *(run(arm, output(0.0), label()) for arm in arms)),
        "ran": {"as written": 8},
        "nodes": (same,),
        "unmatched": (),
        "parting": "",
        "drifting": "",
        "metrics": (),
        "metrics_arm": None,
    }


def hostile_section() -> OnnxSection:
    """Every text that comes from a model, its file or ONNX Runtime replaced by a hostile one."""
    arms: tuple[Arm, ...] = ("unoptimised", "optimised", "node by node")
    rows = tuple(
        node(name, name, 0.5, 0.5, node=f"{name}#{i}", onnx_ops=(name,), parts=True)
        for i, name in enumerate(HOSTILE)
    )
    return section(
        model(
            path=HOSTILE[0],
            external_data=HOSTILE[1],
            inputs=tuple(OnnxTensor(name, name, (name, 1)) for name in HOSTILE),
            nodes_by_dtype=dict.fromkeys(HOSTILE, 1),
            lost_state=HOSTILE,
        ),
        runtime=HOSTILE[2],
        providers=HOSTILE[3:5],
        runs=(
            fp32_run(),
            *(
                run(arm, output(1.0, math.inf, name=name), failure=name, without=(name,))
                for arm, name in zip(arms, HOSTILE, strict=False)
            ),
        ),
        nodes=rows,
        parting=rows[0].node,
        drifting=rows[4].node,
        metrics=tuple(OnnxMetric(name, 1.0, 1.0, 1.0, lower_is_better=True) for name in HOSTILE),
    )
