"""The faults: what each does to a result, a metric or a gradient."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from amp_convert.validate.inference.results import Divergence
from amp_convert.verdict.slice_checks import RARE, rarity
from tests.benchmarks.hunt_models import Plant, Subject


@dataclass(frozen=True)
class Fault:
    """What is planted in which model; `size` in units of the tolerance, None for a kind without."""

    kind: str
    model: str
    size: float | None
    caught: bool

    @property
    def missed(self) -> bool:
        """Whether it passed, and must not have."""
        return not self.caught and (self.size is None or self.size > 2)


def _spread(values: Tensor) -> float:
    return float(values.double().std(correction=0))


def floats(subject: Subject) -> list[str]:
    return [n for n, v in subject.outputs.items() if v[0].is_floating_point()]


def channel(subject: Subject, size: float, luck: random.Random) -> Plant:
    """One channel has an offset."""
    name = luck.choice(floats(subject))
    values = torch.cat(subject.outputs[name])
    dims = [d for d in range(1, values.dim()) if values.shape[d] > 1] or [1]
    dim = luck.choice(dims)
    spreads = [_spread(values.select(dim, i)) for i in range(values.shape[dim])]
    index = luck.choice([i for i, s in enumerate(spreads) if s > 0])
    off = size * subject.limits.output_rel_l2 * spreads[index]

    def plant(at: str, value: Tensor) -> Tensor:
        if at != name:
            return value
        moved = value.clone()
        moved.select(dim, index).add_(off)
        return moved

    return plant


def sample(subject: Subject, size: float, luck: random.Random) -> Plant:
    """One sample of one batch is noisy; of few numbers, the largest error is its measure."""
    name, batch = luck.choice(floats(subject)), luck.randrange(len(subject.inputs))
    want = subject.outputs[name][batch]
    index = luck.randrange(len(want))
    noise = torch.randn(want[index].shape, generator=torch.Generator().manual_seed(batch))
    if want[index].numel() >= 8:
        off = noise / noise.norm() * (want[index] - want[index].mean()).norm()
        off = off * size * subject.limits.output_rel_l2
    else:
        off = torch.zeros_like(want[index])
        off.view(-1)[0] = size * subject.limits.output_max_abs * _reach(subject, name)

    def plant(at: str, value: Tensor) -> Tensor:
        if at != name or subject.at != batch:
            return value
        moved = value.clone()
        moved[index] += off
        return moved

    return plant


def element(subject: Subject, size: float, luck: random.Random) -> Plant:
    """One number of one batch is off."""
    name, batch = luck.choice(floats(subject)), luck.randrange(len(subject.inputs))
    index = luck.randrange(subject.outputs[name][batch].numel())
    off = size * subject.limits.output_max_abs * _reach(subject, name)

    def plant(at: str, value: Tensor) -> Tensor:
        if at != name or subject.at != batch:
            return value
        moved = value.clone(memory_format=torch.contiguous_format)
        moved.view(-1)[index] += off
        return moved

    return plant


def _reach(subject: Subject, name: str) -> float:
    """The largest distance from the mean of the first batch."""
    values, mean = torch.cat(subject.outputs[name]), subject.outputs[name][0].mean()
    return float((values - mean).abs().max())


def gain(subject: Subject, size: float, luck: random.Random) -> Plant:
    """An output is too large by a factor."""
    name = luck.choice(floats(subject))
    center = torch.cat(subject.outputs[name]).mean()
    factor = 1 + size * subject.limits.output_rel_l2

    def plant(at: str, value: Tensor) -> Tensor:
        return (value - center) * factor + center if at == name else value

    return plant


def label(subject: Subject, size: float, luck: random.Random) -> Plant | None:
    """Some of a class become another one. Its tolerance is the smallest number that is no luck."""
    name = next((n for n, v in subject.outputs.items() if not v[0].is_floating_point()), None)
    if name is None:
        return None
    values = torch.cat(subject.outputs[name])
    wanted = luck.choice([c for c in values.unique().tolist() if int((values == c).sum()) >= 8])
    total = int((values == wanted).sum())
    least = next(
        k for k in range(1, total) if rarity(k, total, 1 - subject.limits.agreement) < RARE
    )
    changed = round(size * least)
    if changed > total:
        return None

    def plant(at: str, value: Tensor) -> Tensor:
        moved, where = value.clone(), torch.nonzero(value == wanted).flatten()
        before = sum(int((v == wanted).sum()) for v in subject.outputs[name][: subject.at])
        moved[where[: max(0, changed - before)]] = (wanted + 1) % 5
        return moved

    return plant


def swapped(subject: Subject, luck: random.Random) -> Plant | None:
    """Two samples of a batch change places. Of labels alone, two that differ are in tolerance."""
    if not floats(subject):
        return None
    batch = luck.randrange(len(subject.inputs))
    size = len(subject.inputs[batch])
    one, other = luck.sample(range(size), 2)
    order = list(range(size))
    order[one], order[other] = other, one

    def plant(at: str, value: Tensor) -> Tensor:
        hit = subject.at == batch and at in subject.outputs
        return value[order] if hit else value

    return plant


def lost_batch(subject: Subject, luck: random.Random) -> Plant:
    """One batch gets the outputs of another."""
    batch = luck.randrange(1, len(subject.inputs))

    def plant(at: str, value: Tensor) -> Tensor:
        hit = subject.at == batch and at in subject.outputs
        return subject.outputs[at][batch - 1].to(value.dtype) if hit else value

    return plant


def nothing(subject: Subject, luck: random.Random) -> Plant:
    """An output is its mean, or its commonest label, for every sample."""
    name = luck.choice(list(subject.outputs))
    values = torch.cat(subject.outputs[name])
    constant = values.mean(0) if values.is_floating_point() else values.mode().values

    def plant(at: str, value: Tensor) -> Tensor:
        return constant.to(value.dtype).expand_as(value).clone() if at == name else value

    return plant


def not_a_number(subject: Subject, luck: random.Random) -> Plant | None:
    """One number is NaN."""
    if not floats(subject):
        return None
    base = element(subject, 1.0, luck)

    def plant(at: str, value: Tensor) -> Tensor:
        moved = base(at, value)
        return value if moved is value else torch.where(moved == value, value, torch.nan)

    return plant


def shorter(subject: Subject, luck: random.Random) -> Plant:
    """The last sample of a batch is missing."""
    batch = luck.randrange(len(subject.inputs))

    def plant(at: str, value: Tensor) -> Tensor:
        return value[:-1] if subject.at == batch and at in subject.outputs else value

    return plant


def stale(subject: Subject, luck: random.Random) -> Plant | None:
    """A buffer keeps what it was."""
    if subject.name != "averaging":
        return None
    return lambda at, value: torch.zeros_like(value) if at.startswith("buffer") else value


SIZED: dict[str, Any] = {"channel": channel, "sample": sample, "element": element, "gain": gain,
                         "label": label}  # fmt: skip


UNSIZED: dict[str, Any] = {"swapped": swapped, "lost batch": lost_batch, "nothing": nothing,
                           "not a number": not_a_number, "shorter": shorter,
                           "stale buffer": stale}  # fmt: skip


def biased_metric(subject: Subject, size: float) -> bool:
    """The mixed model's metric is worse than its outputs make it; whether that is caught."""

    def change(found: Divergence) -> Divergence:
        (pair,) = found.metrics
        worse = pair.fp32 - size * subject.limits.metric_tolerance * abs(pair.fp32)
        return replace(found, metrics=(replace(pair, mixed=worse),))

    return subject.verdict(change) != "pass"


def missing_metric(subject: Subject) -> bool:
    """The mixed model lacks the metric on one batch; whether that is caught."""

    def change(found: Divergence) -> Divergence:
        return replace(found, metrics=(replace(found.metrics[0], unpaired=1),))

    return subject.verdict(change) != "pass"


def wrong_mask(subject: Subject) -> bool:
    """Attention looks at the padding; whether that is caught."""
    graph = subject.mixed.rewritten[""]["eval"].graph_module
    (attention,) = (n for n in graph.graph.nodes if "scaled_dot" in str(n.target))
    (mask,) = (n for n in attention.all_input_nodes[3:])
    with graph.graph.inserting_before(attention):
        seen = graph.graph.call_function(_all_seen, (mask,))
    attention.replace_input_with(mask, seen)
    graph.recompile()
    subject.mixed._run_rewritten()
    try:
        return subject.verdict() != "pass"
    finally:
        attention.replace_input_with(seen, mask)
        graph.graph.erase_node(seen)
        graph.recompile()
        subject.mixed._run_rewritten()


def _all_seen(mask: Tensor) -> Tensor:
    return torch.ones_like(mask) if mask.dtype == torch.bool else torch.zeros_like(mask)
