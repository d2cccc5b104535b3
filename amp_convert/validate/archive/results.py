"""What running a saved archive showed. Plain data."""

from __future__ import annotations

from dataclasses import dataclass

from amp_convert.saved_model.archive import Archive
from amp_convert.validate.inference.results import MetricPair, OutputError


@dataclass(frozen=True)
class ArchiveParity:
    """A file read back by `torch.export.load`, held against FP32 over `batches`.

    `outputs` are its errors, `metrics` the user's of it (as `mixed`), `identical` whether it gave
    the frozen model's bits on each batch. `failure` is what is wrong with it as a whole, such as
    "it does not run: ...", "" where nothing is.
    """

    file: Archive
    batches: int
    identical: bool = False
    outputs: tuple[OutputError, ...] = ()
    metrics: tuple[MetricPair, ...] = ()
    failure: str = ""
