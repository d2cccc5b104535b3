"""A saved archive -> `ArchiveParity`: the file, as it is read back, held against FP32.

It is read by `torch.export.load`, as whoever deploys it does, and run on the user's batches. Its
graph has other kernels in places than the frozen model's (see `tuned_graph`), so it is judged by
its errors, as an arm of its own; whether the bits are the frozen model's is said beside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from amp_convert.capture.graph_signature import Signature
from amp_convert.core.batches import Batch, Score, batch_size, no_score
from amp_convert.core.errors import first_line, refuse_environment
from amp_convert.core.random_state import rng_state, set_rng_state
from amp_convert.rewrite.converted_model import ConvertedModel
from amp_convert.saved_model.archive import Archive
from amp_convert.saved_model.plain_call import plain_call
from amp_convert.validate.archive.results import ArchiveParity
from amp_convert.validate.inference.evaluating import evaluating
from amp_convert.validate.inference.metrics import Metrics
from amp_convert.validate.inference.other_arms import OtherArms
from amp_convert.validate.inference.output_errors import OutputSums, accumulate, same_bits
from amp_convert.validate.inference.reordered import row_matcher


def compare_archive(
    converted: ConvertedModel,
    archive: Archive,
    path: Path,
    batches: Iterable[Batch],
    *,
    score: Score | None = None,
    lower_is_better: frozenset[str] = frozenset(),
    on_batch: Callable[[], None] = lambda: None,
) -> ArchiveParity:
    """Run the file at `path`, which was written of `converted`, on `batches`; it has to refuse
    those that the frozen model does not take. That it does not run is a result, and no error."""
    arms, metrics = OtherArms(converted, autocast=False), Metrics(score or no_score)
    loaded = _Loaded(path, arms.frozen_model.runner("").signature, converted.captured.device)
    sums: dict[str, OutputSums] = {}
    count, identical = 0, True
    with evaluating(converted):
        for args, kwargs, target in batches:
            if unfit := converted.captured.takes(args, kwargs):
                if loaded.takes(args, kwargs):
                    failure = f"it takes a batch that the frozen model refuses: {unfit}"
                    return ArchiveParity(archive, count, failure=failure)
                continue
            state, size = rng_state(converted.captured.device), batch_size(args, kwargs)
            matcher = row_matcher(converted, size)
            reference = arms.original(args, kwargs, state)
            noise = arms.noise(args, kwargs, state)
            have = loaded(args, kwargs, state)
            if loaded.failure:
                return ArchiveParity(archive, count, failure=loaded.failure)
            accumulate(sums, reference, have, noise, matcher)
            metrics.add_pair(reference, have, target, size)
            identical &= same_bits(arms.frozen(args, kwargs, state), have)
            count += 1
            on_batch()
    return ArchiveParity(
        archive,
        count,
        identical,
        tuple(total.row(name) for name, total in sums.items()),
        metrics.pairs(lower_is_better),
    )


class _Loaded:
    """The file as `torch.export.load` gives it, with the original's output classes around what it
    gives; `failure` is what is wrong with it, "" while nothing is."""

    def __init__(self, path: Path, signature: Signature, device: torch.device) -> None:
        self._path, self._signature, self._device = path, signature, device
        self._program: Callable[..., Any] | None = None
        self.failure = ""

    def takes(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether it gives anything for these inputs."""
        before = self.failure
        found = self(args, kwargs, rng_state(self._device))
        self.failure = before
        return found is not None

    def __call__(self, args: Sequence[Any], kwargs: Mapping[str, Any], state: Any) -> Any:
        """The outputs from this random state, for copies of the inputs; None where it fails."""
        copied = pytree.tree_map_only(torch.Tensor, torch.clone, (tuple(args), dict(kwargs)))
        try:
            args, kwargs = plain_call(self._signature, *copied)
            self._program = self._program or torch.export.load(self._path).module()
            set_rng_state(self._device, state)
            leaves = pytree.tree_leaves(self._program(*args, **kwargs))
            return pytree.tree_unflatten(leaves, self._signature.out_spec)
        except Exception as error:  # noqa: BLE001  readers fail in as many ways as user code
            refuse_environment(error)
            self.failure = f"it does not run: {type(error).__name__}: {first_line(error)}"
            return None
