"""Small members of the families of architectures in use, written with torch alone."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from symmetry.architectures import CASES, Case, Net, case, image, parameter, tokens, vector, words

assert CASES


def attention(m: Any, q: Tensor, k: Tensor, v: Tensor, bias: Any = 0.0) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, by hand."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return torch.softmax(scores + bias, -1) @ v


def heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


# ------------------------------------------------------------------ fully connected


@case
def mlp() -> Case:
    return nn.Sequential(
        nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)
    ), vector()


@case
def mlp_without_biases() -> Case:
    return nn.Sequential(nn.Linear(3, 4, False), nn.ReLU(), nn.Linear(4, 2, False)), vector()


@case
def mlp_with_batch_norm() -> Case:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)), vector(
        3, 6
    )


@case
def mlp_with_layer_norm() -> Case:
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 2)), vector()


@case
def linear_network() -> Case:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(3, 2)), vector()


@case
def autoencoder() -> Case:
    widths = (4, 3, 2, 3, 4)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1]), vector(4)


@case
def tied_autoencoder() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        return F.linear(F.relu(F.linear(x, m.w, m.b)), m.w.t(), m.c)

    return Net(run, w=parameter(3, 4), b=parameter(3), c=parameter(4)), vector(4)


@case
def convolutional_autoencoder() -> Case:
    return nn.Sequential(
        nn.Conv2d(1, 3, 2, 2), nn.ReLU(), nn.Conv2d(3, 2, 1), nn.ReLU(),
        nn.ConvTranspose2d(2, 3, 2, 2), nn.ReLU(), nn.Conv2d(3, 1, 1),
    ), image(1, 4)  # fmt: skip


@case
def variational_autoencoder() -> Case:
    def run(m: Any, x: Tensor) -> Any:
        h = F.relu(m.encode(x))
        mean, log_variance = m.mean(h), m.log_variance(h)
        z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        return m.decode(F.relu(m.hidden(z))), mean, log_variance

    return Net(
        run, encode=nn.Linear(3, 4), mean=nn.Linear(4, 2), log_variance=nn.Linear(4, 2),
        hidden=nn.Linear(2, 3), decode=nn.Linear(3, 3),
    ), vector()  # fmt: skip


@case
def siamese() -> Case:
    def run(m: Any, a: Tensor, b: Tensor) -> Tensor:
        return m.head((m.body(a) - m.body(b)).abs())

    body = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3))
    return Net(run, body=body, head=nn.Linear(3, 1)), vector() + vector()


@case
def shared_layer_twice() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.last(F.relu(m.middle(F.relu(m.middle(F.relu(m.first(x)))))))

    return Net(run, first=nn.Linear(3, 4), middle=nn.Linear(4, 4), last=nn.Linear(4, 2)), vector()


@case
def two_inputs_and_outputs() -> Case:
    def run(m: Any, a: Tensor, b: Tensor) -> Any:
        h = F.relu(m.a(a) + m.b(b))
        return {"one": m.c(h), "two": (m.d(h), a * 0 + 1)}

    return Net(
        run, a=nn.Linear(3, 4), b=nn.Linear(2, 4), c=nn.Linear(4, 2), d=nn.Linear(4, 1)
    ), vector() + vector(2)


@case
def bilinear_layer() -> Case:
    def run(m: Any, x: Tensor, y: Tensor) -> Tensor:
        return m.out(F.relu(m.product(F.relu(m.a(x)), F.relu(m.b(y)))))

    return Net(
        run, a=nn.Linear(2, 3), b=nn.Linear(2, 3), product=nn.Bilinear(3, 3, 2), out=nn.Linear(2, 1)
    ), vector(2) + vector(2)


@case
def low_rank_adapter() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.out(F.relu(m.base(x) + m.up(m.down(x)) * 2))

    return Net(
        run, base=nn.Linear(3, 4), down=nn.Linear(3, 2, False), up=nn.Linear(2, 4, False),
        out=nn.Linear(4, 2),
    ), vector()  # fmt: skip


@case
def highway() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.first(x))
        gate = torch.sigmoid(m.gate(h))
        return m.last(gate * F.relu(m.body(h)) + (1 - gate) * h)

    return Net(
        run, first=nn.Linear(3, 4), gate=nn.Linear(4, 4), body=nn.Linear(4, 4), last=nn.Linear(4, 2)
    ), vector()


@case
def residual_gate() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.first(x))
        return m.last(h + m.alpha * F.relu(m.body(h)))

    return Net(
        run, first=nn.Linear(3, 4), body=nn.Linear(4, 4), alpha=parameter(1), last=nn.Linear(4, 2)
    ), vector()


@case
def scalar_gate_without_dimension() -> Case:
    net, x = residual_gate()
    net.alpha = nn.Parameter(torch.tensor(0.7))
    return net, x


@case
def mixture_of_experts() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        weights = torch.softmax(m.router(x), -1)
        outputs = torch.stack([e(x) for e in m.experts], -1)
        return m.head((outputs * weights[:, None, :]).sum(-1))

    experts = nn.ModuleList(
        nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)) for _ in range(2)
    )
    return Net(run, router=nn.Linear(3, 2), experts=experts, head=nn.Linear(2, 2)), vector()


@case
def feature_wise_modulation() -> Case:
    def run(m: Any, x: Tensor, y: Tensor) -> Tensor:
        return m.out(F.relu(m.gain(y) * m.body(x) + m.shift(y)))

    return Net(
        run, gain=nn.Linear(2, 4), body=nn.Linear(3, 4), shift=nn.Linear(2, 4), out=nn.Linear(4, 2)
    ), vector() + vector(2)


@case
def hypernetwork() -> Case:
    def run(m: Any, x: Tensor, y: Tensor) -> Tensor:
        weight = m.make(F.relu(m.first(y))).unflatten(1, (3, 2))
        return m.out(F.relu(torch.bmm(weight, x[:, :, None])[..., 0]))

    return Net(run, first=nn.Linear(2, 3), make=nn.Linear(3, 6), out=nn.Linear(3, 2)), vector(
        2
    ) + vector(2)


@case
def deep_sets() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.rho(m.phi(x).sum(1))

    phi = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3))
    return Net(run, phi=phi, rho=nn.Sequential(nn.ReLU(), nn.Linear(3, 2))), tokens(3)


@case
def point_net() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(F.relu(m.body(x.transpose(1, 2))).amax(2))

    return Net(
        run,
        body=nn.Sequential(nn.Conv1d(3, 4, 1), nn.ReLU(), nn.Conv1d(4, 3, 1)),
        head=nn.Linear(3, 2),
    ), tokens(3)


@case
def prelu_network() -> Case:
    return nn.Sequential(
        nn.Linear(3, 4), nn.PReLU(4), nn.Linear(4, 3), nn.PReLU(), nn.Linear(3, 2)
    ), vector()


@case
def graph_convolution() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.adjacency @ m.first(x))
        return m.last(m.adjacency @ h)

    adjacency = torch.rand(4, 4)
    return Net(run, adjacency=adjacency, first=nn.Linear(3, 4), last=nn.Linear(4, 2)), tokens(3)


@case
def graph_attention() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        h = m.value(x)
        scores = F.leaky_relu(m.left(h) + m.right(h).transpose(1, 2), 0.2)
        return m.last(F.relu(torch.softmax(scores, -1) @ h))

    return Net(
        run, value=nn.Linear(3, 3), left=nn.Linear(3, 1, False), right=nn.Linear(3, 1, False),
        last=nn.Linear(3, 2),
    ), tokens(3)  # fmt: skip


@case
def graph_isomorphism() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.first(x))
        return m.last(((1 + m.eps) * h + m.adjacency @ h).sum(1))

    return Net(
        run,
        adjacency=torch.rand(4, 4),
        eps=parameter(1),
        first=nn.Linear(3, 4),
        last=nn.Linear(4, 2),
    ), tokens(3)


@case
def factorisation_machine() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        pairs = (x @ m.factors) ** 2 - (x**2) @ (m.factors**2)
        return m.linear(x) + pairs.sum(1, keepdim=True)

    return Net(run, factors=parameter(3, 2), linear=nn.Linear(3, 1)), vector()


@case
def matrix_factorisation() -> Case:
    def run(m: Any, i: Tensor, j: Tensor) -> Tensor:
        return (m.users(i) * m.items(j)).sum(-1)

    return Net(run, users=nn.Embedding(3, 2), items=nn.Embedding(3, 2)), (
        torch.arange(3).repeat(3),
        torch.arange(3).repeat_interleave(3),
    )


@case
def homogeneous_polynomial_network() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.c(m.b(m.a(x) ** 2) ** 3)

    return Net(run, a=nn.Linear(2, 3), b=nn.Linear(3, 2), c=nn.Linear(2, 1)), vector(2)


@case
def rational_network() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.out(m.a(x).relu() / (m.b(x).abs()))

    return Net(run, a=nn.Linear(2, 3), b=nn.Linear(2, 3), out=nn.Linear(3, 1)), vector(2)


@case
def euclidean_distance_head() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        return torch.cdist(F.relu(m.first(x)), m.centres)

    return Net(run, first=nn.Linear(2, 3), centres=parameter(2, 3)), vector(2)


@case
def cosine_head() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        return F.normalize(F.relu(m.first(x)), dim=-1) @ F.normalize(m.centres, dim=-1).t()

    return Net(run, first=nn.Linear(2, 3), centres=parameter(2, 3)), vector(2)


@case
def weight_norm_network() -> Case:
    wn = nn.utils.parametrizations.weight_norm
    return nn.Sequential(wn(nn.Linear(2, 4)), nn.ReLU(), wn(nn.Linear(4, 2))), vector(2)


# ------------------------------------------------------------------ convolutional


@case
def convolutional_network() -> Case:
    return nn.Sequential(
        nn.Conv2d(2, 3, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 3, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(12, 2),
    ), image()  # fmt: skip


@case
def flattened_head() -> Case:
    return nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)), image(1, 3)


@case
def residual_network() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.n0(m.stem(x)))
        h = F.relu(h + m.n2(m.c2(F.relu(m.n1(m.c1(h))))))
        h = F.relu(m.short(h) + m.n4(m.c4(F.relu(m.n3(m.c3(h))))))
        return m.head(h.mean((2, 3)))

    return Net(
        run, stem=nn.Conv2d(1, 3, 1, bias=False), c1=nn.Conv2d(3, 2, 1, bias=False),
        c2=nn.Conv2d(2, 3, 1, bias=False), c3=nn.Conv2d(3, 2, 1, bias=False),
        c4=nn.Conv2d(2, 4, 1, bias=False), short=nn.Conv2d(3, 4, 1), head=nn.Linear(4, 2),
        n0=nn.BatchNorm2d(3), n1=nn.BatchNorm2d(2), n2=nn.BatchNorm2d(3), n3=nn.BatchNorm2d(2),
        n4=nn.BatchNorm2d(4),
    ), image(1, 3)  # fmt: skip


@case
def pre_activation_residual_network() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        h = m.stem(x)
        h = h + m.c1(F.relu(m.n1(h)))
        h = h + m.c2(F.relu(m.n2(h)))
        return m.head(F.relu(m.n3(h)).mean((2, 3)))

    return Net(
        run, stem=nn.Conv2d(1, 3, 1), c1=nn.Conv2d(3, 3, 1), c2=nn.Conv2d(3, 3, 1),
        n1=nn.BatchNorm2d(3), n2=nn.BatchNorm2d(3), n3=nn.BatchNorm2d(3), head=nn.Linear(3, 2),
    ), image(1, 3)  # fmt: skip


@case
def dense_network() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        h = m.stem(x)
        h = torch.cat([h, m.c1(F.relu(m.n1(h)))], 1)
        h = torch.cat([h, m.c2(F.relu(h))], 1)
        return m.head(F.relu(h).mean((2, 3)))

    return Net(
        run, stem=nn.Conv2d(1, 2, 1), n1=nn.BatchNorm2d(2), c1=nn.Conv2d(2, 2, 1),
        c2=nn.Conv2d(4, 2, 1), head=nn.Linear(6, 2),
    ), image(1, 3)  # fmt: skip


@case
def u_net() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        a = F.relu(m.down(x))
        b = F.relu(m.bottom(F.max_pool2d(a, 2)))
        return m.out(F.relu(m.up(torch.cat([a, m.rise(b)], 1))))

    return Net(
        run, down=nn.Conv2d(1, 2, 3, padding=1), bottom=nn.Conv2d(2, 3, 1),
        rise=nn.ConvTranspose2d(3, 2, 2, 2), up=nn.Conv2d(4, 2, 1), out=nn.Conv2d(2, 1, 1),
    ), image(1, 4)  # fmt: skip


@case
def feature_pyramid() -> Case:
    def run(m: Any, x: Tensor) -> Any:
        a = F.relu(m.a(x))
        b = F.relu(m.b(F.max_pool2d(a, 2)))
        top = m.lateral_b(b)
        low = m.lateral_a(a) + F.interpolate(top, scale_factor=2)
        return m.out(top), m.out(low)

    return Net(
        run, a=nn.Conv2d(1, 2, 1), b=nn.Conv2d(2, 3, 1), lateral_a=nn.Conv2d(2, 2, 1),
        lateral_b=nn.Conv2d(3, 2, 1), out=nn.Conv2d(2, 1, 1),
    ), image(1, 4)  # fmt: skip


@case
def inception_block() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.stem(x))
        parts = [m.a(h), m.c(F.relu(m.b(h))), m.d(F.max_pool2d(h, 3, 1, 1))]
        return m.head(F.relu(torch.cat(parts, 1)).mean((2, 3)))

    return Net(
        run, stem=nn.Conv2d(1, 3, 1), a=nn.Conv2d(3, 2, 1), b=nn.Conv2d(3, 2, 1),
        c=nn.Conv2d(2, 2, 3, padding=1), d=nn.Conv2d(3, 1, 1), head=nn.Linear(5, 2),
    ), image(1, 4)  # fmt: skip


@case
def fire_module() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.squeeze(x))
        return m.out(torch.cat([F.relu(m.one(h)), F.relu(m.three(h))], 1))

    return Net(
        run, squeeze=nn.Conv2d(2, 3, 1), one=nn.Conv2d(3, 2, 1), three=nn.Conv2d(3, 2, 3, padding=1),
        out=nn.Conv2d(4, 1, 1),
    ), image()  # fmt: skip


def inverted_residual(activation: nn.Module) -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        h = m.stem(x)
        h = h + m.project(m.act(m.n2(m.depth(m.act(m.n1(m.expand(h)))))))
        return m.head(h.mean((2, 3)))

    return Net(
        run, stem=nn.Conv2d(1, 2, 1), expand=nn.Conv2d(2, 4, 1, bias=False), n1=nn.BatchNorm2d(4),
        depth=nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), n2=nn.BatchNorm2d(4),
        project=nn.Conv2d(4, 2, 1), act=activation, head=nn.Linear(2, 2),
    ), image(1, 4)  # fmt: skip


@case
def mobile_net_with_relu6() -> Case:
    return inverted_residual(nn.ReLU6())


@case
def mobile_net_with_relu() -> Case:
    return inverted_residual(nn.ReLU())


@case
def squeeze_excitation() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.stem(x))
        gate = torch.sigmoid(m.rise(F.relu(m.squeeze(h.mean((2, 3), keepdim=True)))))
        return m.out(F.relu(m.body(h * gate)))

    return Net(
        run, stem=nn.Conv2d(1, 3, 1), squeeze=nn.Conv2d(3, 2, 1), rise=nn.Conv2d(2, 3, 1),
        body=nn.Conv2d(3, 2, 1), out=nn.Conv2d(2, 1, 1),
    ), image(1, 3)  # fmt: skip


@case
def squeeze_excitation_with_relu_gate() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.stem(x))
        gate = F.relu(m.rise(h.mean((2, 3), keepdim=True)))
        return m.out(h * gate)

    return Net(
        run, stem=nn.Conv2d(1, 3, 1), rise=nn.Conv2d(3, 3, 1), out=nn.Conv2d(3, 1, 1)
    ), image(1, 3)


@case
def shuffle_unit() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.stem(x))
        left, right = h.chunk(2, 1)
        right = F.relu(m.project(m.depth(F.relu(m.expand(right)))))
        h = torch.cat([left, right], 1)
        h = h.unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2)
        return m.out(h)

    return Net(
        run, stem=nn.Conv2d(1, 4, 1), expand=nn.Conv2d(2, 2, 1),
        depth=nn.Conv2d(2, 2, 3, padding=1, groups=2), project=nn.Conv2d(2, 2, 1),
        out=nn.Conv2d(4, 1, 1),
    ), image(1, 3)  # fmt: skip


@case
def grouped_residual_block() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.stem(x))
        return m.out(F.relu(h + m.c(F.relu(m.b(F.relu(m.a(h)))))))

    return Net(
        run, stem=nn.Conv2d(1, 3, 1), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 4, 1, groups=2),
        c=nn.Conv2d(4, 3, 1), out=nn.Conv2d(3, 1, 1),
    ), image(1, 3)  # fmt: skip


@case
def conv_next_block() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        h = m.stem(x)
        y = m.norm(m.depth(h).permute(0, 2, 3, 1))
        y = m.gamma * m.down(F.gelu(m.up(y)))
        h = h + y.permute(0, 3, 1, 2)
        return m.head(h.mean((2, 3)))

    return Net(
        run, stem=nn.Conv2d(1, 3, 1), depth=nn.Conv2d(3, 3, 3, padding=1, groups=3),
        norm=nn.LayerNorm(3), up=nn.Linear(3, 4), down=nn.Linear(4, 3), gamma=parameter(3),
        head=nn.Linear(3, 2),
    ), image(1, 3)  # fmt: skip


@case
def network_without_normalisation_with_standardised_weights() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        w = m.w
        w = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)
        h = F.relu(F.conv2d(x, w * m.gain[:, None, None, None], m.b))
        return m.out(h)

    return Net(
        run, w=parameter(3, 2, 2, 2), gain=parameter(3), b=parameter(3), out=nn.Conv2d(3, 1, 1)
    ), image()


@case
def super_resolution() -> Case:
    return nn.Sequential(
        nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 4, 1), nn.PixelShuffle(2), nn.ReLU(),
        nn.Conv2d(1, 1, 1),
    ), image(1, 3)  # fmt: skip


@case
def generator() -> Case:
    return nn.Sequential(
        nn.ConvTranspose2d(2, 3, 2),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.ConvTranspose2d(3, 1, 2),
        nn.Tanh(),
    ), image(2, 2)


@case
def temporal_convolution() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.a(F.pad(x, (2, 0))))
        h = h + F.relu(m.b(F.pad(h, (4, 0))))
        return m.out(h)

    return Net(
        run, a=nn.Conv1d(2, 3, 3), b=nn.Conv1d(3, 3, 3, dilation=2), out=nn.Conv1d(3, 1, 1)
    ), (torch.randn(2, 2, 6),)


@case
def wave_net_gate() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        h = m.stem(x)
        return m.out(F.relu(h + m.skip(torch.tanh(m.a(h)) * torch.sigmoid(m.b(h)))))

    return Net(
        run, stem=nn.Conv1d(2, 3, 1), a=nn.Conv1d(3, 3, 1), b=nn.Conv1d(3, 3, 1),
        skip=nn.Conv1d(3, 3, 1), out=nn.Conv1d(3, 1, 1),
    ), (torch.randn(2, 2, 4),)  # fmt: skip


@case
def maxout_network() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.out(m.a(x).unflatten(1, (3, 2)).amax(2))

    return Net(run, a=nn.Linear(2, 6), out=nn.Linear(3, 1)), vector(2)


@case
def concatenated_relu() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        h = m.a(x)
        return m.out(torch.cat([h.relu(), (-h).relu()], 1))

    return Net(run, a=nn.Linear(2, 3), out=nn.Linear(6, 1)), vector(2)


@case
def global_context_block() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        h = m.stem(x)
        weights = torch.softmax(m.mask(h).flatten(2), -1)
        context = (h.flatten(2) @ weights.transpose(1, 2))[..., None]
        return m.out(F.relu(h + m.b(F.relu(m.a(context)))))

    return Net(
        run, stem=nn.Conv2d(1, 3, 1), mask=nn.Conv2d(3, 1, 1), a=nn.Conv2d(3, 2, 1),
        b=nn.Conv2d(2, 3, 1), out=nn.Conv2d(3, 1, 1),
    ), image(1, 3)  # fmt: skip


@case
def video_network() -> Case:
    return nn.Sequential(
        nn.Conv3d(1, 2, (1, 2, 2)), nn.ReLU(), nn.Conv3d(2, 2, (2, 1, 1)), nn.ReLU(),
        nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(2, 2),
    ), (torch.randn(2, 1, 3, 3, 3),)  # fmt: skip


# ------------------------------------------------------------------ recurrent


def unrolled(cell: nn.Module) -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        state: Any = None
        for t in range(x.shape[1]):
            state = m.cell(x[:, t], state)
        return m.out(state[0] if isinstance(state, tuple) else state)

    return Net(run, cell=cell, out=nn.Linear(2, 1)), tokens(2, 3)


@case
def recurrent_relu_cell() -> Case:
    return unrolled(nn.RNNCell(2, 2, nonlinearity="relu"))


@case
def lstm_cell() -> Case:
    return unrolled(nn.LSTMCell(2, 2))


@case
def gru_cell() -> Case:
    return unrolled(nn.GRUCell(2, 2))


@case
def lstm_layer() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.out(m.rnn(x)[0][:, -1])

    return Net(run, rnn=nn.LSTM(2, 2, batch_first=True), out=nn.Linear(2, 1)), tokens(2, 3)


@case
def lstm_by_hand() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        h = c = torch.zeros(x.shape[0], 2, dtype=x.dtype)
        for t in range(x.shape[1]):
            i, f, g, o = (m.input(x[:, t]) + m.hidden(h)).chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * F.relu(g)
            h = torch.sigmoid(o) * c
        return m.out(h)

    return Net(
        run, input=nn.Linear(2, 8), hidden=nn.Linear(2, 8, False), out=nn.Linear(2, 1)
    ), tokens(2, 3)


@case
def minimal_gated_unit() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        h = torch.zeros(x.shape[0], 2, dtype=x.dtype)
        for t in range(x.shape[1]):
            z = torch.sigmoid(m.gate(x[:, t]))
            h = (1 - z) * h + z * m.value(x[:, t])
        return m.out(h)

    return Net(run, gate=nn.Linear(2, 2), value=nn.Linear(2, 2), out=nn.Linear(2, 1)), tokens(2, 3)


@case
def state_space_scan() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        u, h, out = m.input(x), 0.0, []
        for t in range(x.shape[1]):
            h = m.decay * h + m.b * u[:, t, :, None]
            out.append((h * m.c).sum(-1))
        return m.out(torch.stack(out, 1) + m.d * u)

    return Net(
        run, input=nn.Linear(2, 2), decay=parameter(2, 2), b=parameter(2, 2), c=parameter(2, 2),
        d=parameter(2), out=nn.Linear(2, 1),
    ), tokens(2, 3)  # fmt: skip


# ------------------------------------------------------------------ attention


@case
def vision_transformer() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        h = m.patch(x).flatten(2).transpose(1, 2)
        h = torch.cat([m.token.expand(h.shape[0], -1, -1), h], 1) + m.position
        q, k, v = m.qkv(m.n1(h)).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        h = h + m.proj(merged(F.scaled_dot_product_attention(q, k, v)))
        h = h + m.down(F.gelu(m.up(m.n2(h))))
        return m.head(m.n3(h)[:, 0])

    return Net(
        run, patch=nn.Conv2d(1, 4, 2, 2), token=parameter(1, 1, 4), position=parameter(1, 5, 4),
        qkv=nn.Linear(4, 12), proj=nn.Linear(4, 4), up=nn.Linear(4, 5), down=nn.Linear(5, 4),
        n1=nn.LayerNorm(4), n2=nn.LayerNorm(4), n3=nn.LayerNorm(4), head=nn.Linear(4, 2),
    ), image(1, 4)  # fmt: skip


@case
def multi_head_attention_module() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.out(F.relu(m.attention(x, x, x, need_weights=False)[0]))

    return Net(
        run, attention=nn.MultiheadAttention(4, 2, batch_first=True), out=nn.Linear(4, 2)
    ), tokens()


@case
def encoder_layer_module() -> Case:
    return nn.TransformerEncoderLayer(4, 2, 5, dropout=0.1, batch_first=True), tokens()


@case
def swin_block() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        h = m.stem(x).permute(0, 2, 3, 1)
        y = torch.roll(m.norm(h), (-1, -1), (1, 2))
        y = y.unflatten(1, (2, 2)).unflatten(3, (2, 2)).transpose(2, 3).reshape(-1, 4, 4)
        q, k, v = m.qkv(y).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        bias = m.table[m.index].permute(2, 0, 1)
        y = m.proj(merged(attention(m, q, k, v, bias)))
        y = y.reshape(-1, 2, 2, 2, 2, 4).transpose(2, 3).reshape(h.shape)
        return m.head((h + torch.roll(y, (1, 1), (1, 2))).mean((1, 2)))

    grid = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")).flatten(1)
    offset = (grid[:, :, None] - grid[:, None, :]) + 1
    return Net(
        run, stem=nn.Conv2d(1, 4, 1), norm=nn.LayerNorm(4), qkv=nn.Linear(4, 12),
        table=parameter(9, 2), index=offset[0] * 3 + offset[1], proj=nn.Linear(4, 4),
        head=nn.Linear(4, 2),
    ), image(1, 4)  # fmt: skip


@case
def encoder_with_hand_written_attention_and_mask() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        mask = torch.ones(4, 4, dtype=torch.bool).tril()
        q, k, v = (heads(f(x), 2) for f in (m.q, m.k, m.v))
        scores = (q @ k.transpose(-1, -2) / 2).masked_fill(~mask, float("-inf"))
        return m.out(merged(torch.softmax(scores, -1) @ v))

    return Net(
        run, q=nn.Linear(4, 4), k=nn.Linear(4, 4), v=nn.Linear(4, 4), out=nn.Linear(4, 2)
    ), tokens()


def decoder(kv_heads: int, rotary: bool, normalised: bool, gated: bool) -> Case:
    def rotate(x: Tensor) -> Tensor:
        if not rotary:
            return x
        half = x.shape[-1] // 2
        turned = torch.cat([-x[..., half:], x[..., :half]], -1)
        angle = torch.arange(x.shape[-2]).to(x.dtype)[:, None] * torch.tensor([1.0, 0.3] * 1).to(
            x.dtype
        )
        angle = torch.cat([angle, angle], -1)[:, : x.shape[-1]]
        return x * angle.cos() + turned * angle.sin()

    def run(m: Any, ids: Tensor) -> Tensor:
        h = m.embed(ids)
        y = m.n1(h)
        q, k, v = heads(m.q(y), 2), heads(m.k(y), kv_heads), heads(m.v(y), kv_heads)
        if normalised:
            q, k = m.qn(q), m.kn(k)
        q, k = rotate(q), rotate(k)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=kv_heads < 2)
        h = h + m.o(merged(y))
        y = m.n2(h)
        y = F.silu(m.gate(y)) * m.up(y) if gated else F.relu(m.up(y)) ** 2
        return m.head(m.n3(h + m.down(y)))

    bias = not rotary
    size = 4
    return Net(
        run, embed=nn.Embedding(5, 4), n1=nn.RMSNorm(4, 0.1), n2=nn.RMSNorm(4, 0.1), n3=nn.RMSNorm(4, 0.1),
        qn=nn.RMSNorm(size, 0.1), kn=nn.RMSNorm(size, 0.1), q=nn.Linear(4, 2 * size, bias),
        k=nn.Linear(4, kv_heads * size, bias), v=nn.Linear(4, kv_heads * size, bias),
        o=nn.Linear(2 * size, 4, bias), gate=nn.Linear(4, 5, False), up=nn.Linear(4, 5, False),
        down=nn.Linear(5, 4, False), head=nn.Linear(4, 5, False),
    ), words()  # fmt: skip


@case
def llama_block() -> Case:
    return decoder(2, rotary=True, normalised=False, gated=True)


@case
def llama_block_with_grouped_queries() -> Case:
    return decoder(1, rotary=True, normalised=False, gated=True)


@case
def decoder_with_query_key_norm() -> Case:
    return decoder(2, rotary=True, normalised=True, gated=True)


@case
def decoder_with_squared_relu() -> Case:
    return decoder(2, rotary=False, normalised=False, gated=False)


@case
def decoder_with_one_key_head() -> Case:
    return decoder(1, rotary=False, normalised=False, gated=False)


@case
def tied_embedding_decoder() -> Case:
    net, inputs = decoder(2, rotary=False, normalised=False, gated=True)
    net.head.weight = net.embed.weight
    return net, inputs


@case
def linear_attention() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.q(x).abs() + 0, m.k(x).abs(), m.v(x)
        top = q @ (k.transpose(1, 2) @ v)
        bottom = q @ k.sum(1, keepdim=True).transpose(1, 2)
        return m.out(top / bottom)

    return Net(
        run, q=nn.Linear(3, 3), k=nn.Linear(3, 3), v=nn.Linear(3, 3), out=nn.Linear(3, 2)
    ), tokens(3)


@case
def external_attention() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        scores = torch.softmax(m.q(x) @ m.memory.t(), -1)
        return m.out(F.relu(scores @ m.values))

    return Net(
        run, q=nn.Linear(3, 3), memory=parameter(4, 3), values=parameter(4, 3), out=nn.Linear(3, 2)
    ), tokens(3)


@case
def additive_attention() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        scores = m.score(F.relu(m.a(x)[:, :, None] + m.b(x)[:, None]))[..., 0]
        return m.out(torch.softmax(scores, -1) @ m.v(x))

    return Net(
        run, a=nn.Linear(3, 3), b=nn.Linear(3, 3), score=nn.Linear(3, 1), v=nn.Linear(3, 3),
        out=nn.Linear(3, 2),
    ), tokens(3)  # fmt: skip


@case
def cross_attention() -> Case:
    def run(m: Any, x: Tensor, y: Tensor) -> Tensor:
        return m.out(F.scaled_dot_product_attention(m.q(x), m.k(y), m.v(y)))

    return Net(
        run, q=nn.Linear(3, 3), k=nn.Linear(3, 3), v=nn.Linear(3, 3), out=nn.Linear(3, 2)
    ), tokens(3) + tokens(3, 5)


@case
def einsum_attention() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, 2)) for f in (m.q, m.k, m.v))
        weights = torch.softmax(torch.einsum("bqhd,bkhd->bhqk", q, k), -1)
        y = torch.einsum("bhqk,bkhd->bqhd", weights, v)
        return torch.einsum("bqhd,hdo->bqo", y, m.o)

    return Net(
        run, q=nn.Linear(4, 4), k=nn.Linear(4, 4), v=nn.Linear(4, 4), o=parameter(2, 2, 3)
    ), tokens()


@case
def relative_position_attention() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        q, k, v = m.q(x), m.k(x), m.v(x)
        content = (q + m.u) @ k.transpose(1, 2)
        position = (q + m.w) @ m.r.t()
        return m.out(torch.softmax(content + position, -1) @ v)

    return Net(
        run, q=nn.Linear(3, 3), k=nn.Linear(3, 3), v=nn.Linear(3, 3), r=parameter(4, 3),
        u=parameter(3), w=parameter(3), out=nn.Linear(3, 2),
    ), tokens(3)  # fmt: skip


@case
def conformer_convolution() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        y = F.glu(m.point(m.norm(x).transpose(1, 2)), 1)
        y = m.out(F.silu(m.batch(m.depth(y))))
        return x + y.transpose(1, 2)

    return Net(
        run, norm=nn.LayerNorm(3), point=nn.Conv1d(3, 6, 1), batch=nn.BatchNorm1d(3),
        depth=nn.Conv1d(3, 3, 3, padding=1, groups=3), out=nn.Conv1d(3, 3, 1),
    ), tokens(3)  # fmt: skip


@case
def mlp_mixer() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        h = m.stem(x)
        h = h + m.t2(F.relu(m.t1(m.n1(h).transpose(1, 2)))).transpose(1, 2)
        h = h + m.c2(F.relu(m.c1(m.n2(h))))
        return m.head(h.mean(1))

    return Net(
        run, stem=nn.Linear(3, 3), n1=nn.LayerNorm(3), n2=nn.LayerNorm(3), t1=nn.Linear(4, 3),
        t2=nn.Linear(3, 4), c1=nn.Linear(3, 4), c2=nn.Linear(4, 3), head=nn.Linear(3, 2),
    ), tokens(3)  # fmt: skip


@case
def mixer_without_norm() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.stem(x))
        h = m.t2(F.relu(m.t1(h.transpose(1, 2)))).transpose(1, 2)
        return m.head(h.mean(1))

    return Net(
        run, stem=nn.Linear(3, 3), t1=nn.Linear(4, 3), t2=nn.Linear(3, 4), head=nn.Linear(3, 2)
    ), tokens(3)


@case
def gated_mlp_with_spatial_gate() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        u, v = F.gelu(m.up(m.norm(x))).chunk(2, -1)
        v = m.space(m.gate(v).transpose(1, 2)).transpose(1, 2)
        return x + m.down(u * v)

    return Net(
        run, norm=nn.LayerNorm(3), up=nn.Linear(3, 6), gate=nn.LayerNorm(3), space=nn.Linear(4, 4),
        down=nn.Linear(3, 3),
    ), tokens(3)  # fmt: skip


@case
def bilinear_gated_unit() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.out(m.a(x) * m.b(x))

    return Net(run, a=nn.Linear(2, 3), b=nn.Linear(2, 3), out=nn.Linear(3, 1)), vector(2)


@case
def affine_layer_scale() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        h = m.stem(x)
        return m.out(h + m.g2 * F.relu(m.body(m.g1 * h + m.b1)))

    return Net(
        run, stem=nn.Linear(2, 3), g1=parameter(3), b1=parameter(3), g2=parameter(3),
        body=nn.Linear(3, 3), out=nn.Linear(3, 1),
    ), vector(2)  # fmt: skip


@case
def embedding_classifier() -> Case:
    def run(m: Any, ids: Tensor) -> Tensor:
        return m.out(F.relu(m.hidden(m.embed(ids).mean(1))))

    return Net(run, embed=nn.Embedding(5, 3), hidden=nn.Linear(3, 3), out=nn.Linear(3, 2)), words()


@case
def embedding_bag() -> Case:
    def run(m: Any, ids: Tensor) -> Tensor:
        return m.out(F.relu(m.embed(ids)))

    return Net(run, embed=nn.EmbeddingBag(5, 3, mode="sum"), out=nn.Linear(3, 2)), words()


@case
def slot_normalisation() -> Case:
    def run(m: Any, x: Tensor) -> Tensor:
        weights = m.a(x).abs()
        weights = weights / weights.sum(1, keepdim=True)
        return m.out(weights.transpose(1, 2) @ m.v(x))

    return Net(run, a=nn.Linear(3, 2), v=nn.Linear(3, 3), out=nn.Linear(3, 2)), tokens(3)


@case
def neural_process_aggregation() -> Case:
    def run(m: Any, x: Tensor, y: Tensor) -> Tensor:
        code = F.relu(m.encode(torch.cat([x, y], -1))).mean(1, keepdim=True)
        return m.decode(F.relu(m.hidden(torch.cat([code.expand(-1, 4, -1), x], -1))))

    return Net(run, encode=nn.Linear(4, 3), hidden=nn.Linear(5, 3), decode=nn.Linear(3, 2)), tokens(
        2
    ) + tokens(2)
