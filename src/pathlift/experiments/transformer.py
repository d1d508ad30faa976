"""A small language model as people build them now: RMSNorm, rotary positions, SwiGLU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

HEADS = 4
_BASE = 10_000.0  # of the rotary frequencies


class LanguageModel(nn.Module):
    """Tokens (N, T) int64 to logits (N, tokens, T).

    Args:
        tokens: how many there are.
        width: of the residual stream; a multiple of ``2 * HEADS``.
        layers: blocks of attention and SwiGLU, of ``8/3 width`` units in a multiple of 4.
        length: largest T.
    """

    def __init__(self, tokens: int, width: int, layers: int, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(_Block(width, length) for _ in range(layers))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.head = nn.Linear(width, tokens, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x)
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h)).transpose(1, 2)


class _Block(nn.Module):
    cos: Tensor
    sin: Tensor
    mask: Tensor

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        hidden = hidden_units(width)
        self.first, self.second = (nn.RMSNorm(width, eps=1e-6) for _ in range(2))
        self.query, self.key, self.value, self.mix = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)
        half = width // HEADS // 2
        angles = torch.arange(length)[:, None] * _BASE ** (-torch.arange(half) / half)
        for name, table in (("cos", angles.cos()), ("sin", angles.sin())):
            self.register_buffer(name, table, persistent=False)
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        self.register_buffer("mask", later, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._attended(self.first(x))
        y = self.second(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))

    def _attended(self, x: Tensor) -> Tensor:
        n, t, width = x.shape
        q, k, v = (
            layer(x).view(n, t, HEADS, width // HEADS).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        # Written out: the fused kernel has no second derivatives, which curvature needs.
        scores = self._rotated(q) @ self._rotated(k).transpose(-1, -2) / (width // HEADS) ** 0.5
        scores = scores.masked_fill(self.mask[:t, :t], -torch.inf)
        return self.mix((scores.softmax(-1) @ v).transpose(1, 2).reshape(n, t, width))

    def _rotated(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        cos, sin = self.cos[: x.shape[-2]], self.sin[: x.shape[-2]]
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def hidden_units(width: int) -> int:
    """Units of a SwiGLU."""
    return (8 * width // 3 + 3) // 4 * 4
