"""What a training run is fed with: batches, first weights and random numbers, each from a seed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from amp_convert.core.batches import Batch, Score
from amp_convert.core.errors import ModelError
from amp_convert.core.files import digests
from amp_convert.core.number_formats import name_of
from amp_convert.core.random_state import (
    RngState,
    preserved_rng,
    rng_state,
    seed_all,
    set_rng_state,
)
from amp_convert.loading.model_file import kind_of
from amp_convert.loading.user_code import defined_at, user_code
from amp_convert.validate.training.weights import Weights


@dataclass(frozen=True, eq=False)
class Data:
    """What a model is trained and judged on.

    `train_batches` takes a seed; both kinds of batches come on the run's device. `score` gives the
    user's metrics of a batch, {} for none. `initial_model` makes the model that training starts
    from for a seed; without it every seed starts from the weights that the model has.
    """

    train_batches: Callable[[int], Iterator[Batch]]
    eval_batches: Callable[[], Iterator[Batch]] | None = None
    score: Score = lambda outputs, target: {}  # noqa: ARG005
    initial_model: Callable[[int], nn.Module] | None = None


class Stream:
    """The training batches of a seed, drawn with a random state of their own."""

    def __init__(
        self, data: Data, seed: int, rng: RngState, device: torch.device, accumulate: int
    ) -> None:
        self._make, self._seed, self._rng, self._device = data.train_batches, seed, rng, device
        self._accumulate, self._drawn = accumulate, 0
        self._batches: Iterator[Batch] | None = None
        self._last: list[Batch] = []

    def draw(self, at_most: int) -> list[Batch] | None:
        """The batches of the next step; None after `at_most` steps, or where too few are left."""
        if self._drawn == at_most:
            return None
        outer = rng_state(self._device)
        set_rng_state(self._device, self._rng)
        try:
            if self._batches is None:
                self._batches = self._make(self._seed)
            found = [b for _, b in zip(range(self._accumulate), self._batches, strict=False)]
            self._rng = rng_state(self._device)
        finally:
            set_rng_state(self._device, outer)
        if len(found) < self._accumulate:
            return None
        self._drawn += 1
        self._last = found
        return found

    def digest(self) -> str:
        """The SHA-256 of the batches of the last step."""
        leaves = pytree.tree_leaves(self._last)
        return digests.of_tensors(("", leaf) for leaf in leaves if isinstance(leaf, torch.Tensor))


_NUMBER = re.compile(r"_\d+(?=[./]|$)")


def initial_weights(
    weights: Weights, data: Data, path: str, device: torch.device, seed: int
) -> dict[str, torch.Tensor]:
    """What training starts from for a seed: copies of the model's tensors, or `initial_model`'s.

    Raises ModelError where that gives another model, or none.
    """
    held = weights.get()
    if data.initial_model is None:
        return {name: tensor.detach().clone() for name, tensor in held.items()}
    where = defined_at(data.initial_model, path)
    with preserved_rng(device), user_code("initial_model()", path):
        seed_all(seed)
        made: Any = data.initial_model(seed)
        if not isinstance(made, nn.Module):
            mend = "Let it return the model that training starts from."
            raise ModelError(f"initial_model() gives {kind_of(made)}", where=where, mend=mend)
        found = _renumbered(Weights(made.to(device)).get(), held)
    if difference := _difference(found, held):
        what = f"initial_model() gives another model than the one to convert: {difference}"
        mend = "Let it build the same model with other weights."
        raise ModelError(what, where=where, mend=mend)
    return {name: found[name].detach().clone() for name in held}


def _renumbered(
    found: Mapping[str, torch.Tensor], held: Mapping[str, torch.Tensor]
) -> Mapping[str, torch.Tensor]:
    """`found` under the names of `held`, where the names differ in numbers alone: Keras calls the
    layers of a second model `dense_3`, where the first one's were `dense`."""
    names = [[_NUMBER.sub("", name) for name in tensors] for tensors in (found, held)]
    return dict(zip(held, found.values(), strict=True)) if names[0] == names[1] else found


def _difference(found: Mapping[str, torch.Tensor], held: Mapping[str, torch.Tensor]) -> str:
    """The first tensor that two models do not share, as a clause; empty where they share all."""
    for name in dict.fromkeys((*held, *found)):
        if name not in found:
            return f"it has no {name}"
        if name not in held:
            return f"it has {name} as well"
        kinds = [
            f"a {name_of(tensors[name].dtype)} tensor of shape {tuple(tensors[name].shape)}"
            for tensors in (found, held)
        ]
        if kinds[0] != kinds[1]:
            return f"its {name} is {kinds[0]}, not {kinds[1]}"
    return ""


def seeded_rng(device: torch.device, seed: int) -> RngState:
    """The random state after seeding PyTorch, Python and NumPy with `seed`."""
    with preserved_rng(device):
        seed_all(seed)
        return rng_state(device)
