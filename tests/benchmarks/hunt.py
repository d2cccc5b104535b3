"""`make hunt`: faults planted in converted models, and whether the verdict sees them.

Each model is captured once. A fault is an edit of its mixed graph, taken back afterwards: what a
wrong kernel, a wrong cast or a wrong index would do to one channel, one sample, one class, one
batch, one buffer, one mask, one head's gradient, one metric. A fault with a size is sized in units
of the output: of the spread of the slice that it hits. Beyond twice the tolerance none may pass; of
the kinds without a size, none at all. The smallest fault that was caught is printed for each kind.

`python -m tests.benchmarks.hunt [FAULTS]` plants so many, by default `FAULTS`.
"""

from __future__ import annotations

import contextlib
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from amp_convert.capture.regions import capture
from amp_convert.core.batches import Batch
from amp_convert.core.number_formats import name_of
from amp_convert.profile.calibrate import profile
from amp_convert.rewrite.converted_model import ConvertedModel, convert_captured
from amp_convert.rules.load import load_rules
from amp_convert.validate.inference.compare import compare
from amp_convert.validate.inference.results import Divergence
from amp_convert.validate.training.compare_gradients import compare_gradients
from amp_convert.verdict.gradient_checks import gradients_check
from amp_convert.verdict.slice_checks import RARE, rarity
from amp_convert.verdict.thresholds import Thresholds
from amp_convert.verdict.verdict import judge
from tests.training_evidence import parity

FAULTS = 400
SIZES = (30.0, 8.0, 3.0, 2.05, 1.5, 1.1, 0.7)
"""In units of the tolerance. Beyond 2, a fault must not pass."""
DTYPES = (torch.float16, torch.bfloat16)
Plant = Callable[[str, Tensor], Tensor]


# --- models --------------------------------------------------------------------------------------


class Padded(nn.Module):
    """Attention that leaves the padding out, and a mean over what is left."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv = nn.Embedding(20, 16), nn.Linear(16, 48)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 9)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        seen = ids > 0
        q, k, v = self.qkv(self.embed(ids)).chunk(3, -1)
        h = self.norm(F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, :]))
        weight = seen[..., None].float()
        return {"tokens": h * weight, "logits": self.head((h * weight).sum(1) / weight.sum(1))}


class Averaging(nn.Module):
    """It keeps a running mean, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 12)
        self.register_buffer("mean", torch.zeros(12))

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        self.mean.mul_(0.9).add_(0.1 * h.detach().mean(0))
        return h - self.mean


class Labels(nn.Module):
    """A classifier that gives labels alone."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).argmax(1)


class Heads(nn.Module):
    """A shared body with a head each for a class, a number and a map."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU())
        self.label, self.number = nn.Linear(8, 10), nn.Linear(8, 1)
        self.map = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.body(x)
        pooled = h.mean((2, 3))
        return self.label(pooled), self.number(pooled), self.map(h)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 10))


def _normal(*shape: int) -> Callable[[int], Tensor]:
    return lambda seed: torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _ids(seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 20, (12, 10), generator=g)
    lengths = torch.randint(3, 11, (12, 1), generator=g)
    return ids * (torch.arange(10) < lengths)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "mlp": (mlp, _normal(24, 16)),
    "heads": (Heads, _normal(12, 1, 8, 8)),
    "padded": (Padded, _ids),
    "averaging": (Averaging, _normal(16, 8)),
    "labels": (Labels, _normal(60, 16)),
}


@dataclass
class Subject:
    """A converted model with its batches, and what its outputs are in FP32 by name."""

    name: str
    limits: Thresholds
    mixed: ConvertedModel
    inputs: list[Tensor]
    outputs: dict[str, list[Tensor]]
    at: int = 0

    @classmethod
    def of(cls, name: str, dtype: torch.dtype) -> Subject:
        """The model of this name, captured."""
        build, batch = MODELS[name]
        torch.manual_seed(0)
        model = build().eval()
        inputs = [batch(seed) for seed in range(4)]
        captured = capture(model, (inputs[0],), {})
        rules = load_rules(["default"])
        stats = profile(captured, [((x,), {}) for x in inputs], [dtype])
        mixed = convert_captured(captured, rules, stats, dtype)
        held: dict[str, list[Tensor]] = {}
        with torch.no_grad():
            for x in inputs:
                for key, value in _named(_kept(model, x)):
                    held.setdefault(key, []).append(value)
        return cls(name, Thresholds.for_dtype(name_of(dtype)), mixed, inputs, held)

    def batches(self) -> Iterator[Batch]:
        """The batches; a fault asks which one it is at."""
        for index, x in enumerate(self.inputs):
            self.at = index
            yield (x,), {}, None

    def verdict(self, change: Callable[[Divergence], Divergence] = lambda d: d) -> str:
        """What the verdict says of the model as it is now."""
        found = change(compare(self.mixed, self.batches(), score=_score, autocast=False))
        captured, plan = self.mixed.captured, self.mixed.plan
        return str(judge(captured.fidelity, plan, found, self.limits, metrics_supplied=True).status)

    @contextlib.contextmanager
    def planted(self, plant: Plant) -> Iterator[None]:
        """Each output of the mixed eval graph goes through `plant` while this is open."""
        rewritten = self.mixed.rewritten[""]["eval"]
        module, signature = rewritten.graph_module, rewritten.captured.signature
        (output,) = module.graph.find_nodes(op="output")
        before = output.args
        values = list(before[0])
        first = len(signature.buffer_outputs) + len(signature.input_outputs)
        names = [f"buffer {name}" for name in signature.buffer_outputs] + list(self.outputs)
        added = []
        for i, value in enumerate(values):
            if isinstance(value, fx.Node) and (i >= first or i < len(signature.buffer_outputs)):
                with module.graph.inserting_before(output):
                    node = module.graph.call_function(_named_call(plant, names[i]), (value,))
                added.append(node)
                values[i] = node
        output.args = (tuple(values),)
        module.recompile()
        self.mixed._run_rewritten()
        try:
            yield
        finally:
            output.args = before
            for node in added:
                module.graph.erase_node(node)
            module.recompile()
            self.mixed._run_rewritten()


def _named_call(plant: Plant, name: str) -> Callable[[Tensor], Tensor]:
    """A function of one tensor, with a name for the graph."""

    def planted(value: Tensor) -> Tensor:
        return plant(name, value)

    return planted


def _kept(model: nn.Module, x: Tensor) -> Any:
    """The model's outputs, its buffers as they were."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return torch.func.functional_call(model, buffers, (x,))


def _named(outputs: Any) -> list[tuple[str, Tensor]]:
    if isinstance(outputs, dict):
        return list(outputs.items())
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return [(str(i), value) for i, value in enumerate(outputs)]


def _score(outputs: Any, _: Any) -> dict[str, float]:
    """A metric that hardly moves with rounding: the mean of the first output's largest index."""
    first = _named(outputs)[0][1].float()
    return {"score": 2 + float(first.reshape(len(first), -1).std(1).mean() if first.dim() > 1
                               else (first + 1).mean())}  # fmt: skip


# --- faults --------------------------------------------------------------------------------------


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


def _floats(subject: Subject) -> list[str]:
    return [n for n, v in subject.outputs.items() if v[0].is_floating_point()]


def channel(subject: Subject, size: float, luck: random.Random) -> Plant:
    """One channel has an offset."""
    name = luck.choice(_floats(subject))
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
    name, batch = luck.choice(_floats(subject)), luck.randrange(len(subject.inputs))
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
    name, batch = luck.choice(_floats(subject)), luck.randrange(len(subject.inputs))
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
    name = luck.choice(_floats(subject))
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
    if not _floats(subject):
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
    if not _floats(subject):
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


class _Scaled(torch.autograd.Function):
    """The identity, with its gradient times a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:  # type: ignore[override]
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return grad * ctx.factor, None


def gradient(subject: Subject, factor: float, luck: random.Random) -> bool:
    """The gradient of one layer's result times a factor; whether that is caught."""
    module = subject.mixed.rewritten[""]["train"].graph_module
    layers = [
        n for n in module.graph.nodes if str(n.target).startswith(("aten.linear", "aten.con"))
    ]
    node = luck.choice(layers)
    with module.graph.inserting_after(node):
        scaled = module.graph.call_function(_scaled, (node, factor))
    node.replace_all_uses_with(scaled, lambda user: user is not scaled)
    module.recompile()
    subject.mixed._run_rewritten()
    try:
        found = compare_gradients(
            subject.mixed, (subject.inputs[0],), {}, None, _loss, scale=1024.0, backoff=0.5
        )
    finally:
        scaled.replace_all_uses_with(node)
        module.graph.erase_node(scaled)
        module.recompile()
        subject.mixed._run_rewritten()
    return gradients_check(parity(gradients=found), subject.limits).status != "pass"


def _scaled(x: Tensor, factor: float) -> Tensor:
    return _Scaled.apply(x, factor)  # type: ignore[no-untyped-call,no-any-return]


def _loss(outputs: Any, _: Any) -> Tensor:
    floats = [v for _, v in _named(outputs) if v.is_floating_point()]
    return torch.stack([v.float().square().mean() for v in floats]).sum()


# --- the hunt ------------------------------------------------------------------------------------


def hunt(faults: int = FAULTS, models: list[str] | None = None, seed: int = 0) -> list[Fault]:
    """Plant `faults` faults, of all kinds in turn, and say which were caught."""
    luck = random.Random(seed)
    subjects = [Subject.of(name, dtype) for dtype in DTYPES for name in models or MODELS]
    for subject in subjects:
        assert subject.verdict() == "pass", f"{subject.name} does not pass without a fault"
    found: list[Fault] = []
    while len(found) < faults:
        before = len(found)
        for subject in subjects:
            found += _round(subject, luck)
        assert len(found) > before
    return found[:faults]


def _round(subject: Subject, luck: random.Random) -> Iterator[Fault]:
    """One fault of each kind, of each size."""
    has_floats, name = bool(_floats(subject)), subject.name
    for kind, make in SIZED.items():
        for size in SIZES:
            if kind != "label" and not has_floats:
                continue
            if (plant := make(subject, size, luck)) is not None:
                yield Fault(kind, name, size, _is_caught(subject, plant))
    for kind, make in UNSIZED.items():
        if (plant := make(subject, luck)) is not None:
            yield Fault(kind, name, None, _is_caught(subject, plant))
    for size in SIZES:
        yield Fault("biased metric", name, size, biased_metric(subject, size))
    yield Fault("missing metric", name, None, missing_metric(subject))
    if name == "padded":
        yield Fault("wrong mask", name, None, wrong_mask(subject))
    if has_floats:
        yield Fault("zeroed gradient", name, None, gradient(subject, 0.0, luck))
        for size in SIZES:
            factor = 1 + size * subject.limits.layer_gradient_rel_l2
            yield Fault("gradient", name, size, gradient(subject, factor, luck))


def _is_caught(subject: Subject, plant: Plant) -> bool:
    with subject.planted(plant):
        return subject.verdict() != "pass"


def main() -> int:
    """Print what was caught of each kind; 1 where a fault was missed."""
    warnings.simplefilter("ignore")
    begin = time.perf_counter()
    found = hunt(int(sys.argv[1]) if len(sys.argv) > 1 else FAULTS)
    print(f"{'kind':17} {'planted':>7} {'caught':>7} {'smallest caught':>16}  largest that passed")
    for kind in dict.fromkeys(fault.kind for fault in found):
        mine = [fault for fault in found if fault.kind == kind]
        caught = [fault.size for fault in mine if fault.caught and fault.size is not None]
        passed = [fault.size for fault in mine if not fault.caught and fault.size is not None]
        least = f"{min(caught):.3g} tolerances" if caught else ""
        most = f"{max(passed):.3g} tolerances" if passed else ""
        hits = sum(fault.caught for fault in mine)
        print(f"{kind:17} {len(mine):7} {hits:7} {least:>16}  {most}")
    missed = [fault for fault in found if fault.missed]
    took = time.perf_counter() - begin
    print(f"\n{len(found)} faults in {took:.0f} s, {len(missed)} missed that must be seen")
    for fault in missed:
        print(f"  {fault.kind} in {fault.model}, size {fault.size}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
