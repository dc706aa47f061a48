"""Muon: momentum whose update of a matrix is made orthogonal (Keller Jordan, 2024).

A small model that starts from random weights learns more in a step of Muon than in one of AdamW.
Source: https://kellerjordan.github.io/posts/muon/. The results are those of torch.optim.Muon, but
everything is computed in float32: torch's version multiplies in bfloat16, which a CPU without
AVX-512 does thirty times slower. Matrices of one shape are multiplied as one batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

# p(x) = a x + b x^3 + c x^5 pulls every singular value in (0, 1] towards 1 in five applications.
# These coefficients are Jordan's: the steepest at 0 that still end between about 0.7 and 1.2.
A, B, C = 3.4445, -4.7750, 2.0315
STEPS = 5
LARGEST_STACK = 2**26  # numbers that are orthogonalised at once: 256 MB, four matrices of the 7B


def orthogonalise(g_kmn: Tensor) -> Tensor:
    """Replace the singular values of k matrices (k, m, n) by numbers near 1: U S V' -> about U V'.

    Newton-Schulz iteration: it needs matrix products only, no decomposition.
    """
    rows, columns = g_kmn.shape[1:]
    x = g_kmn.float()
    if rows > columns:
        x = x.mT  # so that X X' is the smaller of the two squares
    # X = G / |G|: no singular value is above 1.
    norms = x.norm(dim=(1, 2), keepdim=True)
    x = x / norms.clamp(min=1e-7)
    for _ in range(STEPS):
        # S = X X'
        s = x @ x.mT
        # P = b S + c S^2
        p = torch.baddbmm(s, s, s, beta=B, alpha=C)
        # X <- a X + P X
        x = torch.baddbmm(x, p, x, beta=A)
    if rows > columns:
        x = x.mT
    return x.to(g_kmn.dtype)


def orthogonalise_shards(g_kmn: Tensor) -> Tensor:
    """The same for matrices that may be sharded: each process gathers them and keeps its part."""
    if not isinstance(g_kmn, DTensor):
        return orthogonalise(g_kmn)
    whole = orthogonalise(g_kmn.full_tensor())
    # Every process has computed the same matrices, so nothing is sent (src_data_rank=None).
    mesh, placements = g_kmn.device_mesh, g_kmn.placements
    return distribute_tensor(whole, mesh, placements, src_data_rank=None)


def plain(matrices: list[Tensor]) -> list[Tensor]:
    """Matrices that a single process holds, without DTensor, whose bookkeeping costs milliseconds.

    Matrices that are sharded over several processes stay as they are.
    """
    first = matrices[0]
    if isinstance(first, DTensor) and first.device_mesh.size() == 1:
        return [matrix.to_local() for matrix in matrices]
    return matrices


class Muon(torch.optim.Optimizer):
    """Muon for matrices (m, n), sharded or not. Use AdamW for vectors, embeddings and the head.

    lr: learning rate; momentum: share of the old momentum that stays; weight_decay: as in AdamW, a
    fraction lr * weight_decay of each matrix is removed in a step.
    """

    def __init__(self, params, lr: float = 1e-3, weight_decay: float = 0.1, momentum: float = 0.95):
        settings = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            by_shape = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape.setdefault(matrix.shape, []).append(matrix)
            for matrices in by_shape.values():
                # WHY: gathered all at once, the 128 attention matrices of the 7B would take 9 GB.
                at_once = max(1, LARGEST_STACK // matrices[0].numel())
                for first in range(0, len(matrices), at_once):
                    self.update(matrices[first : first + at_once], group)

    def update(self, matrices: list[Tensor], group: dict) -> None:
        """One step for matrices of one shape."""
        lr = group["lr"]
        mu = group["momentum"]
        gradients = []
        momenta = []
        for matrix in matrices:
            state = self.state[matrix]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(matrix.grad)
            gradients.append(matrix.grad)
            momenta.append(state["momentum_buffer"])
        w = plain(matrices)
        g = plain(gradients)
        m = plain(momenta)
        # M <- mu M + (1 - mu) G
        torch._foreach_lerp_(m, g, 1 - mu)
        # Nesterov looks one step ahead: (1 - mu) G + mu M
        ahead = torch._foreach_lerp(g, m, mu)
        o = orthogonalise_shards(torch.stack(ahead))
        # A matrix with more rows than columns takes a longer step: sqrt(max(1, m / n)).
        rows, columns = matrices[0].shape
        length = lr * math.sqrt(max(1, rows / columns))
        # W <- (1 - lr * decay) W - length * O
        torch._foreach_mul_(w, 1 - lr * group["weight_decay"])
        torch._foreach_sub_(w, o.unbind(), alpha=length)
