"""Sequences, with state that is kept from call to call or written to a memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.benchmarks.kinds_models.kind import Batch, Kind, classify, squares


def smoothed(g: torch.Generator) -> Batch:
    """A chunk of a noisy signal, and its running mean."""
    x = torch.randn(4, 20, 4, generator=g)
    return x, x.cumsum(1) / torch.arange(1, 21)[:, None]


class StreamingGru(nn.Module):
    """Goes on from the state that the last chunk left."""

    state: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(4, 32, batch_first=True), nn.Linear(32, 4)
        self.register_buffer("state", torch.zeros(1, 4, 32))

    def forward(self, x: Tensor) -> Tensor:
        h, state = self.rnn(x, self.state)
        self.state = state.detach()
        return self.head(h)


class CausalConv(nn.Module):
    """Keeps the end of the last chunk in an attribute."""

    def __init__(self, i: int, o: int, size: int = 5) -> None:
        super().__init__()
        self.conv, self.left = nn.Conv1d(i, o, size), size - 1
        self.cache: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.cache is None:
            self.cache = x.new_zeros(x.size(0), x.size(1), self.left)
        x = torch.cat([self.cache, x], 2)
        self.cache = x[..., -self.left :].detach()
        return self.conv(x)


class StreamingConv(nn.Module):
    """Convolutions over a stream that comes in chunks."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = CausalConv(4, 32), CausalConv(32, 32)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.two(self.one(x.transpose(1, 2)).relu()).relu()
        return self.head(h.transpose(1, 2))


def sentences(g: torch.Generator) -> Batch:
    """Padded sentences of ten words with their lengths; tags depend on a word and its neighbour."""
    words = torch.randint(1, 30, (16, 10), generator=g)
    lengths = torch.randint(3, 11, (16,), generator=g).sort(descending=True).values
    lengths[0] = 10
    words = words * (torch.arange(10) < lengths[:, None])
    before = F.pad(words[:, :-1], (1, 0))
    return (words, lengths), (words + before) % 3 * (words > 0)


class PackedLstm(nn.Module):
    """Skips the padding by packing."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(30, 32, padding_idx=0), nn.Linear(64, 3)
        self.rnn = nn.LSTM(32, 32, batch_first=True, bidirectional=True)

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.embed(words), lengths, True)
        h, _ = pad_packed_sequence(self.rnn(packed)[0], True, total_length=words.size(1))
        return self.head(h)


def tagged(g: torch.Generator) -> Batch:
    (words, lengths), tags = sentences(g)
    return (words, tags, torch.arange(10) < lengths[:, None]), torch.zeros(16)


class CrfTagger(nn.Module):
    """The log-likelihood of given tags under a chain, and the scores of each tag."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Embedding(30, 32), nn.LSTM(32, 32, batch_first=True)
        self.head, self.moves = nn.Linear(32, 3), nn.Parameter(0.1 * torch.randn(3, 3))

    def forward(self, words: Tensor, tags: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.head(self.rnn(self.embed(words))[0])
        own = scores.gather(2, tags[..., None])[..., 0]
        steps = own[:, 1:] + self.moves[tags[:, :-1], tags[:, 1:]]
        gold = own[:, 0] + (steps * mask[:, 1:]).sum(1)
        alpha = scores[:, 0]
        for t in range(1, words.size(1)):
            after = torch.logsumexp(alpha[:, :, None] + self.moves + scores[:, t, None], 1)
            alpha = torch.where(mask[:, t, None], after, alpha)
        return gold - alpha.logsumexp(1), scores


def unlikely(outputs: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
    return -outputs[0].mean()


def utterances(g: torch.Generator) -> Batch:
    """Frames that tell which of four labels is spoken, twice; and the labels."""
    labels = torch.randint(1, 5, (8, 3), generator=g)
    frames = F.one_hot(labels - 1, 8).float().repeat_interleave(3, 1)
    return (frames + 0.3 * torch.randn(8, 9, 8, generator=g), labels), labels


class Transducer(nn.Module):
    """An RNN-T: every frame is joined with every prefix of the labels."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.embed = nn.LSTM(8, 32, batch_first=True), nn.Embedding(5, 32)
        self.predict = nn.GRU(32, 32, batch_first=True)
        self.join = nn.Sequential(nn.Tanh(), nn.Linear(32, 5))

    def forward(self, frames: Tensor, labels: Tensor) -> Tensor:
        heard = self.encode(frames)[0]
        said = self.predict(self.embed(F.pad(labels, (1, 0))))[0]
        return self.join(heard[:, :, None] + said[:, None]).log_softmax(-1)


def transducer_loss(logs: Tensor, labels: Tensor) -> Tensor:
    """The negative log of the sum over all alignments."""
    times, count = logs.size(1), labels.size(1)
    blank = logs[..., 0]
    index = labels[:, None, :, None].expand(-1, times, -1, -1)
    spoken = logs[:, :, :-1].gather(3, index)[..., 0]
    alpha = F.pad(spoken[:, 0].cumsum(1), (1, 0))
    for t in range(1, times):
        row = [alpha[:, 0] + blank[:, t - 1, 0]]
        for u in range(1, count + 1):
            stay = alpha[:, u] + blank[:, t - 1, u]
            row.append(torch.logaddexp(stay, row[-1] + spoken[:, t, u - 1]))
        alpha = torch.stack(row, 1)
    return -(alpha[:, -1] + blank[:, -1, -1]).mean()


def bits(g: torch.Generator) -> Batch:
    """Four words of six bits, to be said again after a pause."""
    words = torch.randint(2, (32, 4, 6), generator=g).float()
    return F.pad(words, (0, 0, 0, 4)), words


class NeuralTuring(nn.Module):
    """A controller that reads and writes a memory by content and by shifts of its place."""

    def __init__(self, slots: int = 8, width: int = 12) -> None:
        super().__init__()
        self.slots, self.width = slots, width
        self.cell, self.out = nn.LSTMCell(6 + width, 48), nn.Linear(48 + width, 6)
        self.head = nn.Linear(48, 3 * width + 6)

    def place(self, memory: Tensor, key: Tensor, knobs: Tensor, before: Tensor) -> Tensor:
        near = F.cosine_similarity(memory, key[:, None], dim=-1)
        found = (near * F.softplus(knobs[:, :1])).softmax(-1)
        gate, shift = knobs[:, 1:2].sigmoid(), knobs[:, 2:5].softmax(-1)
        mixed = gate * found + (1 - gate) * before
        moved = sum(shift[:, i, None] * mixed.roll(i - 1, 1) for i in range(3))
        sharp = (moved + 1e-8) ** (1 + F.softplus(knobs[:, 5:6]))
        return sharp / sharp.sum(-1, keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        memory = x.new_full((len(x), self.slots, self.width), 1e-3)
        at = F.one_hot(torch.zeros(len(x), dtype=torch.long), self.slots).float()
        h, c = x.new_zeros(2, len(x), 48).unbind(0)
        read, said = x.new_zeros(len(x), self.width), []
        for step in x.unbind(1):
            h, c = self.cell(torch.cat([step, read], 1), (h, c))
            key, erase, add, knobs = self.head(h).split([self.width] * 3 + [6], 1)
            at = self.place(memory, key, knobs, at)
            memory = memory * (1 - at[..., None] * erase.sigmoid()[:, None])
            memory = memory + at[..., None] * add.tanh()[:, None]
            read = (at[..., None] * memory).sum(1)
            said.append(self.out(torch.cat([h, read], 1)))
        return torch.stack(said[4:], 1)


def wrong_bits(outputs: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(outputs, target)


KINDS = (
    Kind("streaming-gru", "streaming", StreamingGru, smoothed, squares, rate=1e-2),
    Kind("streaming-conv", "streaming", StreamingConv, smoothed),
    Kind("sequence-packed-lstm", "sequences", PackedLstm, sentences, classify, rate=1e-2),
    Kind("sequence-crf", "sequences", CrfTagger, tagged, unlikely, rate=1e-2),
    Kind("audio-rnnt", "audio", Transducer, utterances, transducer_loss, rate=1e-2),
    Kind("memory-ntm", "sequences", NeuralTuring, bits, wrong_bits, rate=1e-2),
)
