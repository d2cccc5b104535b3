"""The check of a verdict on the saved archive: `archive.outputs`, none where none was asked for.

Are outputs and metrics of the file, as it is read back, within the usual limits?
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from amp_convert.verdict.arm_checks import as_one, checks_of_arm
from amp_convert.verdict.check import Check, CheckStatus
from amp_convert.verdict.thresholds import Thresholds

if TYPE_CHECKING:
    from amp_convert.validate.archive.results import ArchiveParity

NAME = "archive.outputs"


def archive_checks(
    parity: ArchiveParity | None, reason: str, limits: Thresholds, *, required: bool
) -> list[Check]:
    """The check; unchecked with `reason` where the file could not be written."""
    if parity is None:
        return [Check(NAME, CheckStatus.UNCHECKED, None, None, reason)] if required else []
    if parity.failure:
        said = f"of the file as torch.export.load gives it: {parity.failure}"
        return [Check(NAME, CheckStatus.FAIL, None, None, said)]
    if not parity.batches:
        return [Check(NAME, CheckStatus.UNCHECKED, None, None, "no batch was compared")]
    found = checks_of_arm("of the archive", parity.outputs, parity.metrics, limits)
    return [as_one(NAME, "of the archive", found)]
