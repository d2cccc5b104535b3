"""exp, log and softmax: overflow, vanishing probabilities, sharp temperatures."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.traps.trap import A16, AB16, H16, HB16, Built, Net, linear, trap


@trap(A16 | H16, share=0.99)
def rate_of_a_poisson_head() -> Built:
    """exp of a little over 11 passes 65504."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return torch.exp(net.head(torch.tanh(net.hidden(x))))

    head = linear(32, 4)
    nn.init.constant_(head.bias, 11.5)
    return Net(compute, hidden=linear(8, 32), head=head), (torch.randn(6, 8),)


@trap(A16 | H16, share=0.99)
def softmax_by_hand_overflows() -> Built:
    """exp(x) / exp(x).sum() without taking the maximum off."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        weight = torch.exp(net.score(x))
        return net.out((weight / weight.sum(-1, keepdim=True)) * 8)

    score = linear(8, 64)
    nn.init.constant_(score.bias, 10.0)
    return Net(compute, score=score, out=linear(64, 4)), (torch.randn(6, 8),)


@trap(A16 | H16, share=0.6)
def performer_features_overflow() -> Built:
    """exp feature maps and the sums that normalise them."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        q, k, v = net.qkv(x).chunk(3, -1)
        q, k = (torch.exp(t @ net.projection - t.pow(2).sum(-1, True) / 2 + 6) for t in (q, k))
        total = (q * k.sum(1, keepdim=True)).sum(-1, keepdim=True)
        return net.out(q @ (k.transpose(1, 2) @ v) / total)

    projection = torch.randn(8, 16) * 0.7
    return Net(compute, qkv=linear(8, 24, 0.7), out=linear(8, 8), projection=projection), (
        torch.randn(2, 256, 8),
    )


@trap(A16 | H16, share=0.99)
def softplus_by_hand_overflows() -> Built:
    """log(1 + exp(x))."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return net.down(torch.log(1 + torch.exp(net.up(x))) / 10)

    return Net(compute, up=linear(16, 32, 8.0), down=linear(32, 8)), (torch.randn(6, 16),)


@trap(A16 | H16, share=0.99)
def log_of_softmax() -> Built:
    """The loss of a classifier that takes the logarithm of probabilities."""

    def compute(net: nn.Module, x: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        probability = net.classify(x).softmax(-1)
        return -torch.log(probability).gather(1, label[:, None])

    classify = linear(16, 10, 10.0)
    return Net(compute, classify=classify), (torch.randn(12, 16), torch.arange(12) % 10)


@trap(A16 | H16, share=0.99)
def entropy_of_probabilities() -> Built:
    """p·log(p + 1e-10): where p vanishes, the eps must not."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        p = net.route(x).softmax(-1)
        return -(p * torch.log(p + 1e-10)).sum(-1)

    return Net(compute, route=linear(16, 16, 12.0)), (torch.randn(64, 16),)


@trap(A16 | H16, share=0.99)
def kl_divergence_of_soft_labels() -> Built:
    """Distillation: p·log(p/q), of which q vanishes in FP16."""

    def compute(net: nn.Module, x: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        q = net.student(x).softmax(-1)
        return (teacher * torch.log(teacher / q)).sum(-1)

    teacher = (torch.randn(12, 10) * 2).softmax(-1)
    return Net(compute, student=linear(16, 10, 12.0)), (torch.randn(12, 16), teacher)


@trap(A16 | H16 | AB16 | HB16, share=0.99)
def binary_cross_entropy_of_probabilities() -> Built:
    """Autocast on CUDA bans it; a saturated FP16 probability makes the CPU's answer wrong."""

    def compute(net: nn.Module, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        p = torch.sigmoid(net.head(F.relu(net.hidden(x))))
        return F.binary_cross_entropy(p, target)

    head = nn.Linear(32, 4)
    nn.init.constant_(head.bias, 9.0)
    return Net(compute, hidden=linear(8, 32), head=head), (torch.randn(8, 8), torch.zeros(8, 4))


@trap(A16 | H16)
def attention_sink_of_a_long_row() -> Built:
    """The sink takes all but 8e-8 a token, and its value is zero: what remains is subnormal."""

    def compute(net: nn.Module, scores: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return net.head(scores.softmax(-1) @ value)

    value = 1000 + 100 * torch.randn(20000, 8)
    value[0] = 0.0
    scores = torch.zeros(2, 20000)
    scores[:, 0] = 16.298
    return Net(compute, head=linear(8, 4)), (scores, value)


@trap(H16 | HB16, share=0.99)
def softmax_with_a_sharp_temperature() -> Built:
    """Similarities divided by 1e-3: a step of FP16 near 0.7 is half a logit."""

    def compute(net: nn.Module, similar: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return net.out((similar / 1e-3).softmax(-1) @ net.value(x))

    similar = 0.7 + torch.rand(4, 32) * 4e-3
    return Net(compute, value=linear(8, 16), out=linear(16, 4)), (similar, torch.randn(32, 8))


@trap(H16, share=0.99)
def gumbel_noise_with_eps_1e20() -> Built:
    """Noise from a given uniform sample that comes close to 0 and 1."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        noise = -torch.log(-torch.log(net.uniform + 1e-20) + 1e-20)
        return net.value((net.score(x) + noise).softmax(-1))

    uniform = torch.rand(6, 16)
    uniform[0, 3], uniform[2, 5], uniform[4, 1] = 1 - 2**-24, 0.0, 1 - 2**-20
    return Net(compute, score=linear(8, 16), value=linear(16, 4), uniform=uniform), (
        torch.randn(6, 8),
    )


@trap(A16 | H16, share=0.99)
def gumbel_noise_of_the_scores_dtype() -> Built:
    """As above, where the sample is brought to the dtype of the scores first."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        score = net.score(x)
        sample = net.uniform.to(score.dtype)
        noise = -torch.log(-torch.log(sample + 1e-20) + 1e-20)
        return net.value((score + noise).softmax(-1))

    uniform = torch.rand(6, 16)
    uniform[0, 3], uniform[2, 5] = 1 - 2**-24, 0.0
    return Net(compute, score=linear(8, 16), value=linear(16, 4), uniform=uniform), (
        torch.randn(6, 8),
    )


@trap(A16 | H16)
def sinkhorn_scaling() -> Built:
    """exp(-cost / 0.05) down to 1e-9, and ten rounds of division by sums of it."""

    def compute(net: nn.Module, cost: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        kernel = torch.exp(-cost / 0.05)
        v = torch.ones_like(cost[0])
        for _ in range(10):
            u = 1 / (kernel @ v)
            v = 1 / (kernel.t() @ u)
        return net.out((u[:, None] * kernel * v) @ net.value(x))

    cost = torch.rand(12, 12) * 0.4 + 0.6
    return Net(compute, value=linear(8, 16), out=linear(16, 4)), (cost, torch.randn(12, 8))


@trap(H16 | HB16, share=0.99)
def loss_of_a_linear_chain_crf() -> Built:
    """The partition function over 24 steps, less the score of one path."""

    def compute(net: nn.Module, x: torch.Tensor, tags: torch.Tensor) -> torch.Tensor:
        emission = net.emit(x)
        log_z = emission[:, 0]
        for t in range(1, 24):
            scores = log_z[:, :, None] + net.transition + emission[:, t, None, :]
            log_z = torch.logsumexp(scores, 1)
        path = emission.gather(2, tags[..., None]).sum((1, 2))
        path = path + net.transition[tags[:, :-1], tags[:, 1:]].sum(1)
        return torch.logsumexp(log_z, 1) - path

    emit = linear(8, 5, 1.0)
    nn.init.constant_(emit.bias, 56.0)
    transition = nn.Parameter(torch.randn(5, 5) * 0.1)
    x, tags = torch.randn(3, 24, 8), torch.randint(5, (3, 24))
    return Net(compute, emit=emit, transition=transition), (x, tags)


@trap(A16 | H16, share=0.99)
def logsumexp_free_energy() -> Built:
    """exp, sum and log by hand over 4096 states."""

    def compute(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return net.head(torch.log(torch.exp(net.energy(x)).sum(-1, keepdim=True)) + x / 2)

    energy = linear(8, 4096)
    nn.init.constant_(energy.bias, 4.0)
    return Net(compute, energy=energy, head=linear(8, 4)), (torch.randn(6, 8),)
