"""The definition of F, entry by entry, and random problems for it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from scipy.special import logsumexp

from pathlift.solve import MatrixBlock, Problem
from pathlift.tensors.product import Product
from pathlift.tensors.product import dense as formed

LN2 = np.log(2.0)


@dataclass(frozen=True)
class Dense:
    """``coefficients`` ``(n,)`` and exponent rows ``(n, H)`` of every entry with g > 0."""

    coefficients: np.ndarray
    exponents: np.ndarray
    constant: float
    linear: np.ndarray
    count: int

    def logs(self, s):
        logs = np.log(self.coefficients) - 2 * LN2 * (self.exponents @ s)
        return np.append(logs, np.log(self.constant)) if self.constant > 0 else logs

    def objective(self, s):
        logs = self.logs(s)
        total = self.count * logsumexp(logs) if logs.size else 0.0
        return total + 2 * LN2 * self.linear @ s

    def weights(self, s):
        logs = self.logs(s)
        w = np.exp(logs - logsumexp(logs)) if logs.size else logs
        return w[: self.coefficients.size]

    def gradient(self, s):
        return 2 * LN2 * (self.linear - self.count * self.exponents.T @ self.weights(s))

    def hessian(self, s):
        w, e = self.weights(s), self.exponents
        mean = e.T @ w
        return 4 * LN2**2 * self.count * (e.T @ (w[:, None] * e) - np.outer(mean, mean))


def enumerate_entries(problem: Problem) -> Dense:
    g, rows = [], []
    for block in problem.blocks:
        matrix = formed(block.matrix).numpy()
        left, right = block.rows.toarray(), block.cols.toarray()
        for o in range(matrix.shape[0]):
            for i in range(matrix.shape[1]):
                g.append(float(matrix[o, i]))
                rows.append(left[o] + right[i])
    for k, value in enumerate(np.asarray(problem.vector)):
        g.append(float(value))
        rows.append(problem.vector_forms.toarray()[k])
    coefficients = np.asarray(g)
    exponents = np.asarray(rows, dtype=float).reshape(len(g), problem.num_scales)
    keep = coefficients > 0
    return Dense(
        coefficients[keep], exponents[keep], problem.constant, problem.linear, problem.count
    )


def selection(indices, signs, h):
    """One form per item: ``sign`` times scale ``index``; index -1: no scale."""
    keep = np.flatnonzero(np.asarray(indices) >= 0)
    data = np.asarray(signs, dtype=float)[keep]
    position = (keep, np.asarray(indices)[keep])
    return sparse.csr_array((data, position), shape=(len(indices), h))


def counted(blocks, vector, vector_forms, h, constant=0.0, lower=None, upper=None, layers=None):
    """A problem whose counted entries are its positive ones."""
    draft = Problem(
        h,
        tuple(blocks),
        np.asarray(vector, dtype=float),
        vector_forms,
        constant,
        np.zeros(h),
        0,
        np.full(h, -np.inf) if lower is None else lower,
        np.full(h, np.inf) if upper is None else upper,
        np.zeros(h, dtype=np.int64) if layers is None else layers,
    )
    linear, count = np.zeros(h), 0
    for block in blocks:
        positive = (formed(block.matrix) > 0).numpy().astype(float)
        linear += block.rows.T @ positive.sum(1) + block.cols.T @ positive.sum(0)
        count += int(positive.sum())
    positive = (np.asarray(vector) > 0).astype(float)
    linear += vector_forms.T @ positive
    count += int(positive.sum())
    return Problem(
        **{**{k: getattr(draft, k) for k in draft.__dataclass_fields__}, "linear": linear,
           "count": count}
    )  # fmt: skip


def mlp(widths, seed=0, spread=1.0, bias=True, scale=lambda layer: 1.0, bound=None):
    """Layers of squared gaussians with heterogeneous rows and columns."""
    rng = np.random.default_rng(seed)
    depth, h = len(widths) - 1, sum(widths[1:-1])
    start = np.concatenate([[0], np.cumsum(widths[1:-1])]).astype(int)
    blocks, vector, forms = [], [np.zeros(0)], [sparse.csr_array((0, h))]
    for k in range(depth):
        r, c = widths[k + 1], widths[k]
        m = rng.standard_normal((r, c)) ** 2 + 1e-12
        m *= np.exp(spread * (rng.standard_normal((r, 1)) + rng.standard_normal((1, c)))) * scale(k)
        out = start[k] + np.arange(r) if k < depth - 1 else np.full(r, -1)
        inn = start[k - 1] + np.arange(c) if k else np.full(c, -1)
        rows = selection(out, np.ones(r), h)
        blocks.append(MatrixBlock(torch.from_numpy(m), rows, selection(inn, -np.ones(c), h)))
        if bias:
            vector.append((rng.standard_normal(r) ** 2 + 1e-12) * scale(k))
            forms.append(rows)
    layers = np.repeat(np.arange(depth - 1), widths[1:-1])
    limit = None if bound is None else np.full(h, float(bound))
    low = None if limit is None else -limit
    stacked = sparse.csr_array(sparse.vstack(forms))
    return counted(blocks, np.concatenate(vector), stacked, h, 0.0, low, limit, layers)


def random_problem(seed, *, general=False, extreme=False, bounded=False, zeros=True):
    """Small random problem; ``general``: several scales per form, exponents up to 2 in size.

    Some matrices are products of one row or of several.
    """
    rng = np.random.default_rng(seed)
    h = int(rng.integers(1, 6))
    reach = 600.0 if extreme else 4.0

    def values(shape, part=1.0):
        size = 2.0 ** rng.uniform(-reach * part, reach * part, shape)
        return np.where(rng.random(shape) < 0.2 * part, 0.0, size) if zeros else size

    def matrix(r, c):
        if rng.random() < 0.5:
            return torch.from_numpy(values((r, c)))
        t = int(rng.integers(1, 4))
        return Product(*(torch.from_numpy(values((t, n), 0.5)) for n in (r, c)))

    def forms(n, sign):
        if general:
            dense = rng.integers(-2, 3, (n, h)) * (rng.random((n, h)) < 0.5)
            return sparse.csr_array(dense.astype(float))
        return selection(rng.integers(-1, h, n), np.full(n, sign), h)

    blocks = []
    for _ in range(int(rng.integers(0, 4))):
        r, c = rng.integers(1, 5, 2)
        blocks.append(MatrixBlock(matrix(r, c), forms(r, 1), forms(c, -1)))
    n = int(rng.integers(0, 6))
    # each scale enters and leaves some entry, so that a minimiser exists
    tail = sparse.vstack([sparse.eye_array(h), -sparse.eye_array(h)])
    vector = np.concatenate([values(n), np.where(True, 2.0 ** rng.uniform(-2, 2, 2 * h), 0)])
    all_forms = sparse.csr_array(sparse.vstack([forms(n, 1), tail]))
    low = rng.integers(-3, 1, h).astype(float) if bounded else None
    high = rng.integers(0, 4, h).astype(float) if bounded else None
    constant = float(rng.choice([0.0, 1.0, 50.0]))
    layers = rng.integers(0, 3, h)
    return counted(blocks, vector, all_forms, h, constant, low, high, layers)
