"""Graphs and molecules: messages along edges, and forces as gradients."""

from __future__ import annotations

import networkx as nx
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.benchmarks.kinds_models.kind import Batch, Kind, classify

GRAPHS, NODES = 8, 12


def random_graphs(g: torch.Generator) -> Batch:
    """Graphs as PyTorch Geometric joins them; the class is whether a graph is dense."""
    dense = torch.randint(2, (GRAPHS,), generator=g)
    chance = torch.rand(GRAPHS, NODES, NODES, generator=g)
    linked = (chance < (0.2 + 0.25 * dense)[:, None, None]) | torch.eye(NODES, dtype=torch.bool)
    graph, source, target = linked.nonzero(as_tuple=True)
    edges = torch.stack([graph * NODES + source, graph * NODES + target])
    x = torch.randn(GRAPHS * NODES, 8, generator=g)
    return (x, edges, torch.arange(GRAPHS).repeat_interleave(NODES)), dense


def segment_softmax(scores: Tensor, segment: Tensor, count: int) -> Tensor:
    """A softmax over the scores of each segment."""
    index = segment[:, None].expand_as(scores)
    top = scores.new_full((count, scores.size(1)), -torch.inf)
    top = top.scatter_reduce(0, index, scores, "amax")
    weights = (scores - top[segment]).exp()
    total = weights.new_zeros(count, weights.size(1)).index_add_(0, segment, weights)
    return weights / (total[segment] + 1e-16)


class GatLayer(nn.Module):
    def __init__(self, size: int, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.lift = heads, nn.Linear(size, size, bias=False)
        self.left = nn.Parameter(0.3 * torch.randn(heads, size // heads))
        self.right = nn.Parameter(0.3 * torch.randn(heads, size // heads))

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        h = self.lift(x).unflatten(1, (self.heads, -1))
        scores = (h * self.left).sum(-1)[source] + (h * self.right).sum(-1)[target]
        weights = segment_softmax(F.leaky_relu(scores, 0.2), target, len(x))
        messages = h[source] * weights[..., None]
        return torch.zeros_like(h).index_add_(0, target, messages).flatten(1)


class GraphAttention(nn.Module):
    """Attention along edges, and a sum over each graph; the number of edges varies."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(9, 32), nn.Linear(32, 2)
        self.layers = nn.ModuleList(GatLayer(32) for _ in range(2))

    def forward(self, x: Tensor, edges: Tensor, batch: Tensor) -> Tensor:
        degree = torch.bincount(edges[1], minlength=len(x)).float()
        h = F.relu(self.embed(torch.cat([x, degree[:, None].log1p()], 1)))
        for layer in self.layers:
            h = h + F.elu(layer(h, edges))
        count = int(batch.max()) + 1
        pooled = h.new_zeros(count, h.size(1)).index_add_(0, batch, h)
        return self.head(pooled / NODES)


def karate_features(g: torch.Generator) -> Batch:
    """The karate club with noise in its features, and the club of each member."""
    graph = nx.karate_club_graph()
    clubs = torch.tensor([graph.nodes[n]["club"] == "Officer" for n in graph]).long()
    return torch.eye(34) + 0.1 * torch.randn(6, 34, 34, generator=g), clubs.expand(6, -1)


class Sage(nn.Module):
    """GraphSAGE with the largest and the mean message; the edges are a buffer."""

    edges: Tensor

    def __init__(self) -> None:
        super().__init__()
        edges = torch.tensor(list(nx.karate_club_graph().edges)).T
        self.register_buffer("edges", torch.cat([edges, edges.flip(0)], 1))
        self.embed, self.head = nn.Linear(34, 16), nn.Linear(16, 2)
        self.layers = nn.ModuleList(nn.Linear(48, 16) for _ in range(2))
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        source, target = self.edges
        h = F.relu(self.embed(x))
        for layer in self.layers:
            sent = h[:, source]
            index = target[None, :, None].expand_as(sent)
            empty = torch.zeros_like(h)
            most = empty.scatter_reduce(1, index, sent, "amax", include_self=False)
            mean = empty.scatter_reduce(1, index, sent, "mean", include_self=False)
            h = self.norm(h + F.relu(layer(torch.cat([h, most, mean], -1))))
        return self.head(h)


def clusters(g: torch.Generator) -> Batch:
    """Small clusters of atoms, with the energy of springs between them and its forces."""
    kinds = torch.randint(3, (16, 6), generator=g)
    grid = torch.tensor([[i % 2, i // 2 % 2, i // 4] for i in range(6)]).float()
    positions = 1.5 * grid + 0.2 * torch.randn(16, 6, 3, generator=g)
    rest = 1 + 0.3 * (kinds[:, :, None] + kinds[:, None])
    between = positions[:, :, None] - positions[:, None]
    apart = between.norm(dim=-1) + torch.eye(6)
    stretch = (apart - rest) * (1 - torch.eye(6))
    forces = -(stretch / apart)[..., None] * between
    return (kinds, positions), (0.25 * stretch.square().sum((1, 2)), forces.sum(2))


def energy_and_forces(outputs: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(outputs[0], target[0]) + F.mse_loss(outputs[1], target[1])


class Schnet(nn.Module):
    """Continuous filters over distances; the forces are the gradient of the energy."""

    def __init__(self, switches_on: bool) -> None:
        super().__init__()
        self.switches_on = switches_on
        self.embed = nn.Embedding(3, 32)
        self.filters = nn.ModuleList(
            nn.Sequential(nn.Linear(20, 32), nn.Softplus(), nn.Linear(32, 32)) for _ in range(2)
        )
        self.updates = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 32), nn.Softplus(), nn.Linear(32, 32)) for _ in range(2)
        )
        self.atomwise = nn.Sequential(nn.Linear(32, 32), nn.Softplus(), nn.Linear(32, 1))

    def energy(self, kinds: Tensor, positions: Tensor) -> Tensor:
        eye = torch.eye(positions.size(1))
        apart = (positions[:, :, None] - positions[:, None] + eye[..., None]).norm(dim=-1)
        bases = torch.exp(-4 * (apart[..., None] - torch.linspace(0, 5, 20)) ** 2)
        near = 0.5 * ((apart / 5 * torch.pi).cos() + 1) * (apart < 5) * (1 - eye)
        h = self.embed(kinds)
        for kernel, update in zip(self.filters, self.updates, strict=True):
            h = h + update((kernel(bases) * near[..., None] * h[:, None]).sum(2))
        return self.atomwise(h).sum((1, 2))

    def forward(self, kinds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        if self.switches_on:
            with torch.enable_grad():
                return self.energy_and_forces(kinds, positions)
        return self.energy_and_forces(kinds, positions)

    def energy_and_forces(self, kinds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        positions = positions.detach().requires_grad_()
        energy = self.energy(kinds, positions)
        (gradient,) = torch.autograd.grad(energy.sum(), positions, create_graph=self.training)
        return energy, -gradient


class Egnn(nn.Module):
    """Turns with its inputs: scalars and positions are updated from squared distances."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 32)
        self.messages, self.moves, self.nodes = (nn.ModuleList() for _ in range(3))
        for _ in range(2):
            self.messages.append(nn.Sequential(nn.Linear(65, 32), nn.SiLU(), nn.Linear(32, 32)))
            self.moves.append(nn.Sequential(nn.Linear(32, 32), nn.SiLU(), nn.Linear(32, 1)))
            self.nodes.append(nn.Sequential(nn.Linear(64, 32), nn.SiLU(), nn.Linear(32, 32)))
        self.head = nn.Linear(32, 1)

    def forward(self, kinds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        h, x = self.embed(kinds), positions
        size = x.size(1)
        for message, move, node in zip(self.messages, self.moves, self.nodes, strict=True):
            difference = x[:, :, None] - x[:, None]
            squared = difference.square().sum(-1, keepdim=True)
            pairs = (h[:, :, None].expand(-1, -1, size, -1), h[:, None].expand(-1, size, -1, -1))
            m = F.silu(message(torch.cat([*pairs, squared], -1)))
            x = x + (difference / (squared + 1).sqrt() * move(m)).mean(2)
            h = h + node(torch.cat([h, m.sum(2)], -1))
        return self.head(h).sum((1, 2)), x - positions


KINDS = (
    Kind("graph-attention", "graph", GraphAttention, random_graphs, classify, rate=1e-2),
    Kind("graph-sage", "graph", Sage, karate_features, classify, rate=1e-2),
    Kind("graph-egnn", "graph", Egnn, clusters, energy_and_forces),
    Kind("schnet-forces", "physics", lambda: Schnet(True), clusters, energy_and_forces),
    Kind("schnet-forces-bare", "physics", lambda: Schnet(False), clusters, energy_and_forces),
)
