"""Small networks of many kinds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv(i: int, o: int, groups: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(i, o, 3, padding=1, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(o, momentum=0.3), nn.ReLU())


class Residual(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.one, self.two = conv(size, size), nn.Conv2d(size, size, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.two(self.one(x)))


def pooled(*layers: nn.Module, width: int) -> nn.Module:
    return nn.Sequential(*layers, nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16 * width, 10))


class ConvNext(nn.Module):
    """A block with a depthwise convolution, LayerNorm and a small scale."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.depth = nn.Conv2d(size, size, 5, padding=2, groups=size)
        self.norm, self.up = nn.LayerNorm(size), nn.Linear(size, 4 * size)
        self.down, self.scale = nn.Linear(4 * size, size), nn.Parameter(torch.full((size,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.depth(x).permute(0, 2, 3, 1))
        h = self.scale * self.down(F.gelu(self.up(h)))
        return x + h.permute(0, 3, 1, 2)


class Vit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 32, 2, 2)
        self.places = nn.Parameter(0.02 * torch.randn(1, 16, 32))
        layer = nn.TransformerEncoderLayer(
            32, 4, 64, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).transpose(1, 2) + self.places
        return self.head(self.body(h).mean(1))


class UNet(nn.Module):
    def __init__(self, out: int = 1, timed: bool = False) -> None:
        super().__init__()
        self.down, self.mid = conv(1, 16), nn.Sequential(nn.MaxPool2d(2), conv(16, 32))
        self.up = nn.ConvTranspose2d(32, 16, 2, 2)
        self.out = nn.Sequential(conv(32, 16), nn.Conv2d(16, out, 1))
        self.time = nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 32)) if timed else None

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        one = self.down(x)
        two = self.mid(one)
        if self.time is not None and t is not None:
            angles = t[:, None] * torch.tensor([1.0, 2.0, 4.0, 8.0])
            two = two + self.time(torch.cat([angles.sin(), angles.cos()], 1))[..., None, None]
        return self.out(torch.cat([one, self.up(two)], 1))


class Segmenter(UNet):
    """Classes last, as the losses here take them."""

    def __init__(self) -> None:
        super().__init__(2)

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        return super().forward(x).permute(0, 2, 3, 1)


class Vae(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 16))
        self.decode = nn.Sequential(nn.Linear(8, 64), nn.SiLU(), nn.Linear(64, 64), nn.Sigmoid())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_var = self.encode(x).chunk(2, 1)
        z = mean
        if self.training:
            z = mean + torch.randn_like(mean) * (0.5 * log_var).exp()
        return self.decode(z).view_as(x), mean, log_var


def elbo(outputs: Any, target: Tensor) -> Tensor:
    image, mean, log_var = outputs
    kl = -0.5 * (1 + log_var - mean**2 - log_var.exp()).sum(1).mean()
    return F.binary_cross_entropy(image, target.clamp(0, 1)) * 64 + kl


class Recurrent(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.rnn = getattr(nn, kind)(8, 32, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x[:, 0])[0][:, -1])


class CharModel(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(128, 48), nn.Linear(48, 128)
        self.rnn: nn.Module | None = None
        if kind == "lstm":
            self.rnn = nn.LSTM(48, 48, batch_first=True)
        else:
            self.places = nn.Parameter(0.02 * torch.randn(1, 32, 48))
            layer = nn.TransformerEncoderLayer(48, 4, 96, 0.1, "gelu", batch_first=True,
                                               norm_first=True)  # fmt: skip
            self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        if self.rnn is not None:
            return self.head(self.rnn(h)[0])
        size = ids.shape[1]
        mask = torch.full((size, size), -torch.inf).triu(1)
        return self.head(self.body(h + self.places, mask=mask))


class TextCnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(128, 24), nn.Linear(48, 2)
        self.convs = nn.ModuleList(nn.Conv1d(24, 24, k) for k in (3, 5))

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids).transpose(1, 2)
        return self.head(torch.cat([F.relu(c(h)).amax(2) for c in self.convs], 1))


class TextEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(128, 32), nn.LayerNorm(32)
        self.places = nn.Parameter(0.02 * torch.randn(1, 64, 32))
        self.body = nn.TransformerEncoderLayer(32, 4, 64, 0.1, batch_first=True)
        self.head = nn.Linear(32, 2)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.body(self.norm(self.embed(ids) + self.places))
        return self.head(h.amax(1))


class Seq2seq(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(128, 32), nn.Parameter(0.1 * torch.randn(1, 8, 32))
        self.body = nn.Transformer(32, 4, 1, 1, 64, 0.0, batch_first=True)
        self.head = nn.Linear(32, 128)

    def forward(self, word: Tensor, begun: Tensor) -> Tensor:
        mask = torch.full((8, 8), -torch.inf).triu(1)
        source, target = (self.embed(ids) + self.places for ids in (word, begun))
        return self.head(self.body(source, target, tgt_mask=mask))


class Wave(nn.Module):
    """Dilated convolutions with gates and skips."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.end = nn.Conv1d(1, 16, 1), nn.Conv1d(16, 1, 1)
        self.layers = nn.ModuleList(
            nn.Conv1d(16, 32, 3, padding=d, dilation=d) for d in (1, 2, 4, 8)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.start(x)
        for layer in self.layers:
            a, b = layer(h).chunk(2, 1)
            h = h + a.tanh() * b.sigmoid()
        return self.end(h)


class Sound(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(1, 16, 9, 4),
            nn.GroupNorm(4, 16),
            nn.GELU(),
            nn.Conv1d(16, 32, 9, 4),
            nn.GELU(),
        )
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).abs().mean(2))


class Gcn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(34, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        degree = adjacency.sum(-1, keepdim=True)
        norm = adjacency / degree.sqrt() / degree.sqrt().transpose(1, 2)
        return self.two(norm @ F.relu(self.one(norm @ x)))


class Gat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(34, 16), nn.Linear(16, 2)
        self.left, self.right = nn.Linear(16, 1), nn.Linear(16, 1)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        h = self.body(x)
        scores = F.leaky_relu(self.left(h) + self.right(h).transpose(1, 2), 0.2)
        weights = scores.masked_fill(adjacency == 0, -1e9).softmax(-1)
        return self.head(F.elu(weights @ h))


class TabTransformer(nn.Module):
    """A token a column."""

    def __init__(self, columns: int, classes: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(0.3 * torch.randn(columns, 16))
        self.shift = nn.Parameter(0.3 * torch.randn(columns, 16))
        self.body = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x[..., None] * self.scale + self.shift).mean(1))


class Factors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Embedding(77, 16), nn.Embedding(77, 16)
        self.bias = nn.Embedding(77, 1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        product = (self.one(a) * self.other(b)).sum(1)
        return product + self.bias(a)[:, 0] + self.bias(b)[:, 0]


class Deep(nn.Module):
    """Factors that go through layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Embedding(77, 16), nn.Embedding(77, 16)
        self.net = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 1))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.net(torch.cat([self.one(a), self.other(b)], 1))[:, 0]


def mlp(i: int, o: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(i, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, o)
    )
