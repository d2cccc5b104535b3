"""The ways in which a validation runs an ONNX file, each with the sums of its outputs' errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from amp_convert.onnx_file import write as onnx_export
from amp_convert.validate.inference.output_errors import OutputSums
from amp_convert.validate.onnx import sessions as onnx_sessions
from amp_convert.validate.onnx.lockstep import OnnxLockstep, OnnxNodeValues
from amp_convert.validate.onnx.results import Arm
from amp_convert.validate.onnx.sessions import Placement, Session

if TYPE_CHECKING:
    import onnx_ir as ir

T = TypeVar("T")


@dataclass
class Fed:
    """One batch: the model's tensors, the same in the dtypes of the file, and the flat inputs of
    the frozen graph."""

    tensors: list[torch.Tensor]
    bordered: list[torch.Tensor]
    flat: list[Any]


@dataclass
class FileRun:
    """One way of running a file. What fails in it ends this run, and no other; a run that works
    only `without` some optimisations has a `failure` as well."""

    arm: Arm
    call: Callable[[Fed], list[torch.Tensor]] | None = None
    failure: str = ""
    without: tuple[str, ...] = ()
    batches: int = 0
    against_fp32: dict[str, OutputSums] = field(default_factory=dict)
    against_converted: dict[str, OutputSums] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        return bool(self.failure) and not self.without

    def outputs(self, fed: Fed) -> list[torch.Tensor] | None:
        """The outputs for one batch; None when this run has failed, now or before."""
        call = self.call
        return self.attempt(lambda: call(fed)) if call is not None else None

    def attempt(self, action: Callable[[], T]) -> T | None:
        """What `action` gives; None when it fails, as this run then has."""
        try:
            return action()
        except Exception as error:  # noqa: BLE001  ONNX Runtime's errors have no class in common
            lines = str(error).strip().splitlines() or [type(error).__name__]
            self.failure, self.without, self.call = lines[-1].strip(), (), None
            return None


def fp32_run(make: Callable[[], ir.Model], folder: Path) -> FileRun:
    """The FP32 model, from a file that is written for the purpose."""
    run, path = FileRun("fp32"), folder / "fp32.onnx"

    def opened() -> Session:
        onnx_export.write(make(), path, check=False)
        return Session(str(path))

    if (session := run.attempt(opened)) is not None:
        run.call = lambda fed: session.run(fed.tensors)
    return run


def unoptimised_run(path: str) -> tuple[FileRun, Mapping[str, Placement], tuple[str, ...]]:
    """The file as it is written, how each node of it runs, and the providers."""
    run = FileRun("unoptimised")
    if (opened := run.attempt(lambda: onnx_sessions.recorded(path))) is None:
        return run, {}, onnx_sessions.providers()
    session, placements = opened
    run.call = lambda fed: session.run(fed.bordered)
    return run, placements, session.providers


def optimised_run(path: str) -> FileRun:
    """The file as ONNX Runtime optimises it, but for what makes it fail."""
    failure, without = onnx_sessions.failing_optimisation(path)
    run = FileRun("optimised", failure=failure, without=without)
    if not run.failed:
        session = run.attempt(lambda: Session(path, optimised=True, disabled=without))
        if session is not None:
            run.call = lambda fed: session.run(fed.bordered)
    return run


def stepwise_run(lockstep: OnnxLockstep, visit: Callable[[OnnxNodeValues], None]) -> FileRun:
    """The file node by node."""
    return FileRun("node by node", lambda fed: lockstep.run(fed.flat, fed.bordered, visit))
