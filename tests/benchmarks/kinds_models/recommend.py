"""Recommenders and mixtures of experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.benchmarks.kinds_models.kind import Batch, Kind, classify


def clicks(g: torch.Generator) -> Batch:
    """Numbers, and bags of ids by their offsets, of which one half are liked."""
    dense = torch.rand(64, 4, generator=g) * 100
    bags = torch.randint(50, (3, 64 * 4), generator=g)
    offsets = torch.arange(0, 256, 4).expand(3, -1)
    liked = (bags < 25).float().mean(0).view(64, 4).mean(1) + (dense[:, 0] - 50) / 100
    return (dense, bags.unbind(0), offsets.unbind(0)), (liked > 0.5).float()


class Dlrm(nn.Module):
    """Embedding bags, the products of all pairs, and a network on top."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(50, 16, mode="sum") for _ in range(3))
        self.bottom = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(16 + 6, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(
        self, dense: Tensor, bags: tuple[Tensor, ...], offsets: tuple[Tensor, ...]
    ) -> Tensor:
        x = self.bottom(dense.log1p())
        found = [bag(i, o) for bag, i, o in zip(self.bags, bags, offsets, strict=True)]
        vectors = torch.stack([x, *found], 1)
        products = vectors @ vectors.transpose(1, 2)
        rows, columns = torch.tril_indices(4, 4, -1)
        return self.top(torch.cat([x, products[:, rows, columns]], 1))[:, 0]


def clicked(outputs: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(outputs, target)


def purchases(g: torch.Generator) -> Batch:
    """Users with what they saw last, and an item of the group that they like."""
    users = torch.randint(100, (64,), generator=g)
    groups = users % 10
    seen = groups[:, None] * 10 + torch.randint(10, (64, 5), generator=g)
    items = groups * 10 + torch.randint(10, (64,), generator=g)
    return {"user": users, "seen": seen, "item": items}, torch.arange(64)


class TwoTower(nn.Module):
    """A vector a user and one an item; every other item of the batch is a wrong one."""

    def __init__(self) -> None:
        super().__init__()
        self.users = nn.Embedding(100, 32)
        self.items = nn.EmbeddingBag(100, 32, mode="mean")
        self.user = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
        self.item = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
        self.scale = nn.Parameter(torch.tensor(20.0).log())

    def forward(self, user: Tensor, seen: Tensor, item: Tensor) -> Tensor:
        one = self.user(torch.cat([self.users(user), self.items(seen)], 1))
        other = self.item(self.items(item[:, None]))
        return self.scale.exp() * F.normalize(one, dim=1) @ F.normalize(other, dim=1).T


def mixture(g: torch.Generator) -> Batch:
    """Points in four clusters, each with a rule of its own for its class."""
    x = torch.randn(128, 16, generator=g)
    cluster = torch.randint(4, (128,), generator=g)
    label = x.gather(1, cluster[:, None] + 8)[:, 0] > 0
    return x + 3 * F.one_hot(cluster, 16), label.long()


class Experts(nn.Module):
    """The two likeliest of eight experts, each on the rows that chose it."""

    def __init__(self, size: int = 32, experts: int = 8) -> None:
        super().__init__()
        self.router = nn.Linear(size, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(size, 64), nn.SiLU(), nn.Linear(64, size))
            for _ in range(experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        chances = self.router(x).softmax(-1)
        weights, chosen = chances.topk(2, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows, slots = torch.where(chosen == i)
            if len(rows):
                out.index_add_(0, rows, expert(x[rows]) * weights[rows, slots, None])
        return out


class SparseExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.start, self.experts, self.head = nn.Linear(16, 32), Experts(), nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.start(x)
        return self.head(h + self.experts(h))


class CapacityExperts(nn.Module):
    """The rows go to buffers of a fixed size by index_put and come back by gather."""

    def __init__(self, size: int = 32, experts: int = 4, room: int = 96) -> None:
        super().__init__()
        self.room, self.count = room, experts
        self.start, self.head = nn.Linear(16, size), nn.Linear(size, 2)
        self.router = nn.Linear(size, experts)
        self.up = nn.Parameter(torch.randn(experts, size, 64) / size**0.5)
        self.down = nn.Parameter(torch.randn(experts, 64, size) / 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.start(x)
        weights, chosen = self.router(h).softmax(-1).topk(2, dim=-1)
        hot = F.one_hot(chosen.flatten(), self.count)
        turn = ((hot.cumsum(0) - 1) * hot).sum(1).clamp(max=self.room - 1)
        rows = h.repeat_interleave(2, 0)
        sent = h.new_zeros(self.count, self.room, h.size(1))
        sent = sent.index_put((chosen.flatten(), turn), rows)
        done = torch.bmm(torch.bmm(sent, self.up).relu(), self.down)
        back = done[chosen.flatten(), turn].unflatten(0, (-1, 2))
        return self.head(h + (back * weights[..., None]).sum(1))


KINDS = (
    Kind("recommender-dlrm", "recommender", Dlrm, clicks, clicked, rate=1e-2),
    Kind("recommender-two-tower", "recommender", TwoTower, purchases, classify),
    Kind("experts-top2", "experts", SparseExperts, mixture, classify),
    Kind("experts-capacity", "experts", CapacityExperts, mixture, classify),
)
