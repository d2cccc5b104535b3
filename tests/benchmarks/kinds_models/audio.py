"""Sound: spectra of complex numbers, separation, and speech models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.benchmarks.kinds_models.kind import Batch, Kind, classify

SIZE = 1024


def tones(g: torch.Generator) -> Batch:
    """Tones with overtones in noise, and which of four pitches they have."""
    pitch = torch.randint(4, (16,), generator=g)
    phase = 6.28 * torch.rand(16, 1, generator=g)
    angle = torch.arange(SIZE) * (0.08 * 1.5**pitch)[:, None] + phase
    sound = 0.3 * angle.sin() + 0.1 * (2 * angle).sin()
    return sound + 0.1 * torch.randn(16, SIZE, generator=g), pitch


def noisy_tones(g: torch.Generator) -> Batch:
    """Tones in noise, and the tones alone."""
    angle = torch.arange(SIZE) * (0.05 + 0.3 * torch.rand(16, 1, generator=g))
    return 0.3 * angle.sin() + 0.2 * torch.randn(16, SIZE, generator=g), 0.3 * angle.sin()


def two_voices(g: torch.Generator) -> Batch:
    """A low and a high voice together, and both apart."""
    low, high = (
        (torch.arange(SIZE) * (at + 0.05 * torch.rand(8, 1, generator=g))).sin()
        for at in (0.05, 0.4)
    )
    apart = 0.3 * torch.stack([low, high], 1)
    return apart.sum(1), apart


def mel_bank(bins: int, bands: int) -> Tensor:
    """Triangles that are evenly spaced in mel."""
    top = 2595 * torch.tensor(1 + 8000 / 700).log10()
    hertz = 700 * (10 ** (torch.linspace(0, 1, bands + 2) * top / 2595) - 1)
    grid = torch.linspace(0, 8000, bins)[:, None]
    rise = (grid - hertz[:-2]) / (hertz[1:-1] - hertz[:-2])
    fall = (hertz[2:] - grid) / (hertz[2:] - hertz[1:-1])
    return torch.minimum(rise, fall).clamp(min=0)


class MelCnn(nn.Module):
    """A log mel spectrogram of 16-bit samples, and convolutions over it."""

    window: Tensor
    bank: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(256))
        self.register_buffer("bank", mel_bank(129, 32))
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(32, 4)

    def forward(self, sound: Tensor) -> Tensor:
        spectrum = torch.stft(sound * 32768, 256, 64, window=self.window, return_complex=True)
        power = spectrum.abs() ** 2
        mel = torch.einsum("bft,fm->bmt", power, self.bank)
        logs = (mel + 1e-6).log10()
        logs = (logs - logs.mean((1, 2), keepdim=True)) / 4
        return self.head(self.body(logs[:, None]).mean((2, 3)))


class ComplexMask(nn.Module):
    """A mask of complex numbers on the spectrum, and the way back to sound."""

    window: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(128))
        self.rnn = nn.GRU(130, 64, batch_first=True)
        self.mask = nn.Linear(64, 130)

    def forward(self, sound: Tensor) -> Tensor:
        spectrum = torch.stft(sound, 128, 32, window=self.window, return_complex=True)
        parts = torch.view_as_real(spectrum).permute(0, 2, 1, 3).flatten(2)
        mask = self.mask(self.rnn(parts)[0]).unflatten(2, (65, 2)).permute(0, 2, 1, 3)
        masked = spectrum * torch.view_as_complex(mask.contiguous())
        return torch.istft(masked, 128, 32, window=self.window, length=sound.size(-1))


def scale_free(outputs: Tensor, target: Tensor) -> Tensor:
    """The negative scale-invariant signal-to-noise ratio, in dB."""
    outputs, target = (t - t.mean(-1, keepdim=True) for t in (outputs, target))
    size = (target * target).sum(-1, keepdim=True) + 1e-8
    wanted = (outputs * target).sum(-1, keepdim=True) / size * target
    rest = ((outputs - wanted) ** 2).sum(-1) + 1e-8
    return -10 * ((wanted**2).sum(-1) / rest + 1e-8).log10().mean()


class TasnetBlock(nn.Module):
    def __init__(self, size: int, dilation: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(size, 2 * size, 1), nn.PReLU(), nn.GroupNorm(1, 2 * size, eps=1e-8),
            nn.Conv1d(2 * size, 2 * size, 3, padding=dilation, dilation=dilation, groups=2 * size),
            nn.PReLU(), nn.GroupNorm(1, 2 * size, eps=1e-8),
        )  # fmt: skip
        self.rest, self.skip = nn.Conv1d(2 * size, size, 1), nn.Conv1d(2 * size, size, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x)
        return x + self.rest(h), self.skip(h)


class ConvTasnet(nn.Module):
    """Masks on a learnt transform of the sound."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Conv1d(1, 64, 16, 8, bias=False)
        self.norm, self.narrow = nn.GroupNorm(1, 64, eps=1e-8), nn.Conv1d(64, 32, 1)
        self.blocks = nn.ModuleList(TasnetBlock(32, 2**i) for i in range(4))
        self.masks = nn.Sequential(nn.PReLU(), nn.Conv1d(32, 128, 1), nn.Sigmoid())
        self.decode = nn.ConvTranspose1d(64, 1, 16, 8, bias=False)

    def forward(self, sound: Tensor) -> Tensor:
        code = self.encode(sound[:, None]).relu()
        h, skips = self.narrow(self.norm(code)), torch.zeros(1)
        for block in self.blocks:
            h, skip = block(h)
            skips = skips + skip
        masks = self.masks(skips).unflatten(1, (2, 64))
        return self.decode((code[:, None] * masks).flatten(0, 1)).view(len(sound), 2, -1)


def wav2vec2() -> nn.Module:
    """wav2vec 2.0 with a CTC head; in training it skips layers and masks stretches of time."""
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    config = Wav2Vec2Config(
        vocab_size=6, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=64, conv_dim=(32, 32), conv_stride=(8, 4), conv_kernel=(16, 8),
        num_feat_extract_layers=2, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4,
        layerdrop=0.1, mask_time_prob=0.1, mask_time_length=2, do_stable_layer_norm=True,
        feat_extract_norm="layer",
    )  # fmt: skip
    return Wav2Vec2ForCTC(config)


def spoken(g: torch.Generator) -> Batch:
    """Two tones after each other, and their names."""
    names = torch.randint(1, 6, (8, 2), generator=g)
    angle = torch.arange(SIZE // 2) * (0.08 * 1.5**names)[..., None]
    sound = angle.sin().flatten(1) + 0.05 * torch.randn(8, SIZE, generator=g)
    return {"input_values": sound}, names


def ctc(outputs: Any, target: Tensor) -> Tensor:
    logs = outputs.logits.log_softmax(-1).transpose(0, 1)
    sizes = torch.full((len(target),), logs.size(0)), torch.full((len(target),), target.size(1))
    return F.ctc_loss(logs, target, *sizes)


def whisper() -> nn.Module:
    """A small Whisper."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=20,
        num_mel_bins=16, max_source_positions=20, max_target_positions=10, dropout=0.1,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config)


def dictated(g: torch.Generator) -> Batch:
    """A word that is said five times, eight frames each, in a band of its own."""
    words = torch.randint(3, 19, (16, 1), generator=g).expand(-1, 5)
    bands = F.one_hot(words - 3, 16).float().repeat_interleave(8, 1).transpose(1, 2)
    begun = torch.cat([torch.ones(16, 1, dtype=torch.long), words[:, :-1]], 1)
    features = bands + 0.2 * torch.randn(bands.shape, generator=g)
    return {"input_features": features, "decoder_input_ids": begun}, words


def words_heard(outputs: Any, target: Tensor) -> Tensor:
    return classify(outputs.logits, target)


KINDS = (
    Kind("audio-mel-cnn", "audio", MelCnn, tones, classify),
    Kind("audio-complex-mask", "audio", ComplexMask, noisy_tones, scale_free),
    Kind("audio-conv-tasnet", "audio", ConvTasnet, two_voices, scale_free),
    Kind("audio-wav2vec2", "audio", wav2vec2, spoken, ctc, steps=300),
    Kind("audio-whisper", "audio", whisper, dictated, words_heard),
)
