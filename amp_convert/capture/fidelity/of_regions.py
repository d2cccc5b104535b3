"""The fidelity of each captured part, in each mode, and that of the model as a whole."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence

from amp_convert.capture import fidelity
from amp_convert.capture.captured import Region
from amp_convert.capture.fidelity import Fidelity, FidelityStatus
from amp_convert.capture.hooks import own_hooks_off
from amp_convert.capture.kept import fingerprint
from amp_convert.capture.kept.answers import kept
from amp_convert.core.files.cache import Entry
from amp_convert.core.files.plain_data import NotPlainError, PlainData
from amp_convert.core.mode import Mode


def of_region(region: Region, mode: Mode, *, proofs: bool = True) -> Fidelity:
    if mode not in region.graphs:
        return fidelity.unchecked(mode, f"the train graph was not captured: {region.train_failure}")

    trains = Mode.TRAIN in region.graphs

    def checked() -> Fidelity:
        runner = region.runner(mode)
        return fidelity.check(
            region.module, runner, region.args, region.kwargs, mode, gradients=trains
        )

    def about() -> str:
        inputs = (region.args, dict(region.kwargs))
        return fingerprint.of_call(region.module, inputs, str(mode), trains)

    with own_hooks_off(region.module) if region.path else contextlib.nullcontext():
        if proofs:
            return checked()
        kind = f"the fidelity of {region.path or 'the model'}"
        return kept(kind, about, checked, _written, _read)


_PLAIN = PlainData(Fidelity, FidelityStatus, Mode)


def _written(found: Fidelity) -> Entry:
    if found.status is not FidelityStatus.IDENTICAL:
        raise NotPlainError(found.reason)  # what came in between may be gone the next time
    return Entry(_PLAIN.write(found))


def _read(entry: Entry) -> Fidelity:
    found: Fidelity = _PLAIN.read(entry.document)
    return found


def merged(region: Sequence[tuple[str, Fidelity]], how_trained: str) -> tuple[Fidelity, ...]:
    """One result a mode: the worst over all regions, which it names when there are several."""
    rank = [FidelityStatus.IDENTICAL, FidelityStatus.UNCHECKED, FidelityStatus.DIFFERENT]
    found_by_mode = []
    for mode in Mode:
        found = [(path, f) for path, f in region if f.mode == mode]
        path, worst = max(found, key=lambda item: (rank.index(item[1].status), item[1].max_rel_l2))
        reason = f"{path}: {worst.reason}" if len(found) > 1 else worst.reason
        reason += how_trained if mode is Mode.TRAIN else ""
        found_by_mode.append(dataclasses.replace(worst, reason=reason))
    return tuple(found_by_mode)
