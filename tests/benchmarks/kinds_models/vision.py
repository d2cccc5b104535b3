"""Detection, sets and point clouds."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F

from tests.benchmarks.kinds_models.kind import Batch, Kind, classify

SIZE = 32


def squares_in_images(g: torch.Generator) -> Batch:
    """Images with two bright squares, small or large; their boxes (x, y, w, h) and kinds."""
    images = 0.1 * torch.randn(8, 3, SIZE, SIZE, generator=g)
    kinds = torch.randint(2, (8, 2), generator=g)
    corners = torch.randint(2, 10, (8, 2, 2), generator=g)
    corners[:, 1] += 12
    sizes = 5 + 3 * kinds
    for image, places, size, kind in zip(images, corners, sizes, kinds, strict=True):
        for (x, y), s, k in zip(places.tolist(), size.tolist(), kind.tolist(), strict=True):
            image[k, y : y + s, x : x + s] += 1
    whole = torch.cat([corners + sizes[..., None] / 2, sizes[..., None].expand(-1, -1, 2)], -1)
    return images, (whole / SIZE, kinds)


def backbone() -> nn.Sequential:
    """A quarter of the size, 32 channels."""
    sizes = ((3, 16), (16, 32), (32, 32))
    layers: list[nn.Module] = []
    for i, o in sizes:
        stride = 1 if i == o else 2
        layers += [nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
    return nn.Sequential(*layers)


def corners_of(boxes: Tensor) -> Tensor:
    centre, size = boxes.chunk(2, -1)
    return torch.cat([centre - size / 2, centre + size / 2], -1)


def overlap(one: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of one box with others, all by their corners."""
    low, high = torch.maximum(one[:2], others[:, :2]), torch.minimum(one[2:], others[:, 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    areas = (others[:, 2:] - others[:, :2]).prod(-1)
    return shared / ((one[2:] - one[:2]).prod() + areas - shared)


def suppress(boxes: Tensor, scores: Tensor, limit: float = 0.5) -> Tensor:
    """Indices of the boxes that no better one overlaps, best first."""
    order, keep = scores.argsort(descending=True), []
    while len(order):
        best = order[0]
        keep.append(best)
        order = order[1:]
        order = order[overlap(boxes[best], boxes[order]) <= limit]
    return torch.stack(keep) if keep else order


class Ssd(nn.Module):
    """A box and a class a cell; in eval mode what is left of them after suppression."""

    centres: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.backbone = backbone()
        self.classes, self.boxes = nn.Conv2d(32, 3, 1), nn.Conv2d(32, 4, 1)
        steps = (torch.arange(8) + 0.5) / 8
        grid = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), -1).flatten(0, 1)
        self.register_buffer("centres", grid)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor] | list[dict[str, Tensor]]:
        h = self.backbone(images)
        logits = self.classes(h).flatten(2).transpose(1, 2)
        shift, size = self.boxes(h).flatten(2).transpose(1, 2).chunk(2, -1)
        boxes = torch.cat([self.centres + 0.1 * shift, 0.2 * size.exp()], -1)
        if self.training:
            return logits, boxes
        return [self.detect(*one) for one in zip(logits.softmax(-1), boxes, strict=True)]

    def detect(self, chances: Tensor, boxes: Tensor) -> dict[str, Tensor]:
        scores, labels = chances[:, 1:].max(-1)
        sure = scores > 0.3
        boxes, scores, labels = corners_of(boxes[sure]), scores[sure], labels[sure]
        kept = suppress(boxes, scores)
        return {"boxes": boxes[kept], "scores": scores[kept], "labels": labels[kept]}


def by_cell(outputs: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> Tensor:
    """A cell answers for the square whose centre lies in it."""
    (logits, found), (boxes, kinds) = outputs, target
    cells = (boxes[..., :2] * 8).long()
    cells = cells[..., 1] * 8 + cells[..., 0]
    classes = torch.zeros(logits.shape[:2], dtype=torch.long).scatter_(1, cells, kinds + 1)
    weights = torch.tensor([0.1, 1, 1])
    at_squares = found.gather(1, cells[..., None].expand(-1, -1, 4))
    return F.cross_entropy(logits.transpose(1, 2), classes, weights) + 5 * F.smooth_l1_loss(
        at_squares, boxes
    )


class Detr(nn.Module):
    """Queries that each find one object or none."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.queries = backbone(), nn.Parameter(torch.randn(6, 32))
        self.places = nn.Parameter(0.1 * torch.randn(64, 32))
        self.body = nn.Transformer(32, 4, 1, 2, 64, 0.0, batch_first=True)
        self.classes, self.boxes = nn.Linear(32, 3), nn.Linear(32, 4)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        h = self.backbone(images).flatten(2).transpose(1, 2) + self.places
        h = self.body(h, self.queries.expand(len(images), -1, -1))
        return {"logits": self.classes(h), "boxes": self.boxes(h).sigmoid()}


def matched(outputs: dict[str, Tensor], target: tuple[Tensor, Tensor]) -> Tensor:
    """The loss under the cheapest pairing of queries and objects."""
    logits, found = outputs["logits"], outputs["boxes"]
    classes, distance = torch.full(logits.shape[:2], 2), logits.new_zeros(())
    for i, (boxes, kinds) in enumerate(zip(*target, strict=True)):
        cost = 5 * torch.cdist(found[i], boxes, 1) - logits[i].softmax(-1)[:, kinds]
        queries, objects = map(torch.as_tensor, linear_sum_assignment(cost.detach().numpy()))
        classes[i, queries] = kinds[objects]
        distance = distance + F.l1_loss(found[i, queries], boxes[objects])
    weights = torch.tensor([1, 1, 0.2])
    return F.cross_entropy(logits.transpose(1, 2), classes, weights) + 5 * distance / len(logits)


def shapes(g: torch.Generator) -> Batch:
    """Points on spheres, cubes and discs."""
    kind = torch.randint(3, (12,), generator=g)
    x = torch.randn(12, 48, 3, generator=g)
    sphere, cube = F.normalize(x, dim=-1), x / x.abs().amax(-1, keepdim=True)
    disc = sphere * torch.tensor([1.0, 1.0, 0.1])
    points = torch.stack([sphere, cube, disc])[kind, torch.arange(12)]
    return points + 0.02 * torch.randn(points.shape, generator=g), kind


class PointCloud(nn.Module):
    """Edge convolutions over the nearest neighbours, found anew at each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.edges = nn.ModuleList(
            nn.Sequential(nn.Linear(2 * i, 32), nn.LayerNorm(32), nn.LeakyReLU(0.2))
            for i in (3, 32)
        )
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        for edge in self.edges:
            inner = x @ x.transpose(1, 2)
            squares = x.square().sum(-1)
            distances = squares[:, :, None] - 2 * inner + squares[:, None]
            near = distances.topk(8, largest=False).indices
            index = near.flatten(1)[..., None].expand(-1, -1, x.size(-1))
            neighbours = x.gather(1, index).unflatten(1, near.shape[1:])
            own = x[:, :, None].expand_as(neighbours)
            x = edge(torch.cat([own, neighbours - own], -1)).amax(2)
        return self.head(x.amax(1))


KINDS = (
    Kind("detection-ssd-nms", "detection", Ssd, squares_in_images, by_cell),
    Kind("detection-detr", "detection", Detr, squares_in_images, matched),
    Kind("pointcloud-dgcnn", "point cloud", PointCloud, shapes, classify),
)
