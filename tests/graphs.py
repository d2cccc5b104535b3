"""Random small modules for property tests: drawn as data, executed by a small interpreter.

A `Recipe` is a list of operations, each reading earlier values by index; hypothesis shrinks it to
the shortest list that still breaks a law, and its `repr` is the counterexample. Value 0 is the
user's `x` of shape (batch, 4, 8), value 1 the ids of shape (batch, 4) that embeddings look up. Each
value has a `Kind`, and an operation takes only kinds that it is defined on, so every recipe is a
working FP32 model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

from tests.graph_operations import CHANNELS, OPERATIONS, TOKENS, VOCABULARY, Kind


@dataclass(frozen=True)
class Step:
    """One operation of a recipe and the values it reads."""

    name: str
    reads: tuple[int, ...]


@dataclass(frozen=True)
class Recipe:
    """A module as data. `outputs` are value indices, `shape` says how they are returned."""

    steps: tuple[Step, ...]
    outputs: tuple[int, ...]
    shape: str
    seed: int


# --- the operations ------------------------------------------------------------------------------


ALLOWED = ["linear", "linear_relu_", "linear_iadd", "conv", "conv_relu_", "cat_linear"]
SHAPES = ("single", "tuple", "dict", "nested")


# --- the interpreter -----------------------------------------------------------------------------


class RandomModule(nn.Module):
    """Carries a recipe out. Step n's module is named "n_operation"."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.steps = nn.ModuleDict()
        shared: nn.Parameter | None = None
        for number, step in enumerate(recipe.steps):
            make = OPERATIONS[step.name].module
            if make is None:
                continue
            module = make()
            if step.name.startswith("tied"):
                shared = shared if shared is not None else module.weight
                module.weight = shared
            self.steps[f"{number}_{step.name}"] = module

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> Any:
        values: list[Any] = [x, ids]
        for number, step in enumerate(self.recipe.steps):
            operation = OPERATIONS[step.name]
            inputs = [values[i] for i in step.reads]
            if operation.module is not None:
                inputs.insert(0, self.steps[f"{number}_{step.name}"])
            made = operation.call(*inputs)
            values += made if isinstance(made, tuple) else [made]
        return _structured([values[i] for i in self.recipe.outputs], self.recipe.shape)


def _structured(values: list[Any], shape: str) -> Any:
    if shape == "single":
        return values[0]
    if shape == "tuple":
        return (*values, None)
    if shape == "dict":
        return {f"out{n}": value for n, value in enumerate(values)} | {"count": 3, "nothing": None}
    return [{"first": values[0]}, (values[1:], 7)]


def inputs_of(recipe: Recipe, batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """(x, ids) for a module of this recipe."""
    generator = torch.Generator().manual_seed(recipe.seed)
    x = torch.randn(batch, TOKENS, CHANNELS, generator=generator)
    return x, torch.randint(VOCABULARY, (batch, TOKENS), generator=generator)


# --- the strategy --------------------------------------------------------------------------------


@st.composite
def recipes(draw: st.DrawFn, min_steps: int = 10, max_steps: int = 30) -> Recipe:
    """Recipes with one to four outputs, less the steps that none of them needs.

    Hypothesis draws a seed, how far to go from there, and the outputs; shrinking cuts the steps to
    the shortest beginning that breaks the law.
    """
    seed = draw(st.integers(0, 2**32 - 1))
    steps = _walk(seed, draw(st.integers(min_steps, max_steps)))
    last = 1 + sum(len(OPERATIONS[step.name].gives) for step in steps)
    others = draw(st.lists(st.integers(2, last), max_size=3))
    return _needed(steps, (last, *others), draw(st.sampled_from(SHAPES)), draw(st.integers(0, 3)))


def covering(times: int) -> list[Recipe]:
    """Recipes in which every operation occurs in at least `times`, found by trying seeds in turn.

    Hypothesis's own draws cluster: of 50 recipes it gives, most operations are in none.
    """
    found: list[Recipe] = []
    missing = Counter(dict.fromkeys(OPERATIONS, times))
    seed = 0
    while missing:
        steps = _walk(seed, 18, missing)
        last = 1 + sum(len(OPERATIONS[step.name].gives) for step in steps)
        outputs = (last, last - 1, last - 2)
        recipe = _needed(steps, outputs, SHAPES[1 + seed % 3], seed % 4)
        names = {step.name for step in recipe.steps}
        if len(names & missing.keys()) >= min(3, len(missing)):
            found.append(recipe)
            missing = +(missing - Counter(names))
        seed += 1
    return found


def _walk(seed: int, count: int, wanted: Collection[str] = ()) -> list[Step]:
    """The first `count` steps from a seed, more of them those that are `wanted`."""
    random = Random(seed)
    kinds = [Kind.FULL, Kind.IDS]
    steps = []
    for _ in range(count):
        possible = [n for n, o in OPERATIONS.items() if set(o.takes) <= set(kinds)]
        # Without an op in low precision there is little to see: favour those.
        favoured = [name for name in possible if name in wanted or name in ALLOWED]
        name = random.choice(favoured if random.random() < 0.4 else possible)
        reads = tuple(readable(random, kinds, kind) for kind in OPERATIONS[name].takes)
        steps.append(Step(name, reads))
        kinds += OPERATIONS[name].gives
    return steps


def readable(random: Random, kinds: list[Kind], wanted: Kind) -> int:
    """A value of a kind, a new one more often than an old one: depth shows more than width."""
    found = [i for i, kind in enumerate(kinds) if kind is wanted]
    return random.choice(found[-2:] if random.random() < 0.6 else found)


def _needed(steps: list[Step], outputs: tuple[int, ...], shape: str, seed: int) -> Recipe:
    """The recipe without the steps that no output reads, and its values numbered anew."""
    outputs = outputs[:1] if shape == "single" else outputs
    makers = [n for n, step in enumerate(steps) for _ in OPERATIONS[step.name].gives]
    wanted = {makers[value - 2] for value in outputs}
    for number in reversed(range(len(steps))):
        if number in wanted:
            wanted |= {makers[value - 2] for value in steps[number].reads if value >= 2}
    kept = [0, 1, *(value for value, maker in enumerate(makers, 2) if maker in wanted)]
    place = {value: number for number, value in enumerate(kept)}
    left = [
        Step(step.name, tuple(place[value] for value in step.reads))
        for number, step in enumerate(steps)
        if number in wanted
    ]
    return Recipe(tuple(left), tuple(place[value] for value in outputs), shape, seed)
