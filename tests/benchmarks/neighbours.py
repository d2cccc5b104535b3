"""Converts an FP32 ONNX file with another tool, in that tool's own environment.

    python neighbours.py TOOL FOLDER

reads `fp32.onnx` and the batches in `batches/*.npz` from the folder, and writes `TOOL.onnx` and
`TOOL.json` there: the tool's version, the seconds that it took to convert the file and to have it
checked, and what went wrong, if anything did.

Neither tool holds what it has made against the original, so its users have to: the check here is
ONNX's own, and one run of both files over all batches in ONNX Runtime as it is by default. Imports
are not counted. Nothing of amp-convert is imported.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime


def onnxconverter_common() -> Callable[[Path], Any]:
    """Microsoft's converter: everything but a list of operators, no calibration."""
    from onnxconverter_common import float16

    return lambda folder: float16.convert_float_to_float16(
        onnx.load(folder / "fp32.onnx"), keep_io_types=True
    )


def nvidia_modelopt() -> Callable[[Path], Any]:
    """NVIDIA's AutoCast, calibrated with the batches."""
    from modelopt.onnx.autocast.convert import convert_to_mixed_precision

    return lambda folder: convert_to_mixed_precision(
        str(folder / "fp32.onnx"),
        low_precision_type="fp16",
        keep_io_types=True,
        calibration_data=str(folder / "batches"),
    )


TOOLS = {"onnxconverter-common": onnxconverter_common, "nvidia-modelopt": nvidia_modelopt}


def main(tool: str, folder: Path) -> None:
    """Convert and check; write the file and the figures."""
    with contextlib.redirect_stdout(sys.stderr):
        convert = TOOLS[tool]()
        failure, begin = "", time.perf_counter()
        path = folder / f"{tool}.onnx"
        try:
            onnx.save(convert(folder), path)
            check(path, folder)
        except Exception as error:  # noqa: BLE001  whatever it is, it is this tool's result
            lines = str(error).strip().splitlines() or [""]
            failure = f"{type(error).__name__}: {lines[0].strip()}"
        seconds = time.perf_counter() - begin
    figures = {
        "version": importlib.metadata.version(tool),
        "seconds": seconds,
        "failure": failure,
    }
    (folder / f"{tool}.json").write_text(json.dumps(figures))


def check(path: Path, folder: Path) -> None:
    """ONNX's checker, and a comparison that refuses nothing but what cannot run."""
    onnx.checker.check_model(str(path), full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    sessions = [
        onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        for file in (folder / "fp32.onnx", path)
    ]
    for batch in sorted((folder / "batches").glob("*.npz")):
        feeds = dict(np.load(batch))
        want, have = (session.run(None, feeds) for session in sessions)
        for a, b in zip(want, have, strict=True):
            np.abs(a.astype(np.float64) - b.astype(np.float64)).max(initial=0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
