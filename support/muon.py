"""Muon: momentum whose update of a matrix is made orthogonal (Keller Jordan, 2024).

A small model that starts from random weights learns more in a step of Muon than in one of AdamW.
Source: https://kellerjordan.github.io/posts/muon/. The numbers are those of torch.optim.Muon, but
everything is computed in float32: torch's version multiplies in bfloat16, which a CPU without
AVX-512 does thirty times slower. Matrices of one shape go through the products as one batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

# p(x) = a x + b x^3 + c x^5 pulls every singular value in (0, 1] towards 1 in five applications.
# These coefficients are Jordan's: the steepest at 0 that still end between about 0.7 and 1.2.
A, B, C = 3.4445, -4.7750, 2.0315
STEPS = 5


def orthogonalise(g_kmn: Tensor) -> Tensor:
    """Replace the singular values of k matrices (k, m, n) by numbers near 1: U S V' -> about U V'.

    Newton-Schulz iteration: it needs matrix products only, no decomposition.
    """
    rows, columns = g_kmn.shape[1:]
    x = g_kmn.mT if rows > columns else g_kmn  # so that X X' is the smaller of the two squares
    # X = G / |G|: no singular value is above 1.
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(STEPS):
        # S = X X'
        s = x @ x.mT
        # X <- a X + (b S + c S^2) X
        x = torch.baddbmm(x, torch.baddbmm(s, s, s, beta=B, alpha=C), x, beta=A)
    return x.mT if rows > columns else x


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
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape.setdefault(matrix.shape, []).append(matrix)
            for matrices in by_shape.values():
                self.update(matrices, group["lr"], group["weight_decay"], group["momentum"])

    def update(self, matrices: list[Tensor], lr: float, decay: float, momentum: float) -> None:
        """One step for matrices of one shape, each process on its shards."""
        for matrix in matrices:
            if not self.state[matrix]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix.grad)
        w = [shard_of(matrix) for matrix in matrices]
        g = [shard_of(matrix.grad) for matrix in matrices]
        m = [shard_of(self.state[matrix]["momentum_buffer"]) for matrix in matrices]
        # M <- mu M + (1 - mu) G
        torch._foreach_lerp_(m, g, 1 - momentum)
        # Nesterov looks one step ahead: (1 - mu) G + mu M
        ahead = torch._foreach_lerp(g, m, momentum)
        o = scatter(orthogonalise(gather(torch.stack(ahead), matrices[0])), matrices[0])
        # A matrix with more rows than columns takes a longer step: sqrt(max(1, m / n)).
        rows, columns = matrices[0].shape
        length = lr * math.sqrt(max(1, rows / columns))
        # W <- (1 - lr * decay) W - length * O
        torch._foreach_mul_(w, 1 - lr * decay)
        torch._foreach_sub_(w, o.unbind(), alpha=length)


def shard_of(matrix: Tensor) -> Tensor:
    """This process's part of a matrix, which is all of it if it is not sharded."""
    return matrix.to_local() if isinstance(matrix, DTensor) else matrix


def is_split(matrix: Tensor) -> bool:
    """Whether several processes hold parts of this matrix."""
    return isinstance(matrix, DTensor) and matrix.device_mesh.size() > 1


def stacked_placements(like: DTensor) -> list:
    """How k matrices stacked along a new first dimension lie if each lies like this one."""
    return [Shard(p.dim + 1) if p.is_shard() else p for p in like.placements]


def gather(stack: Tensor, like: Tensor) -> Tensor:
    """Shards (k, m / processes, n) of matrices like `like` -> whole matrices (k, m, n), float32."""
    if not is_split(like):
        return stack.float()
    shape = torch.Size((len(stack), *like.shape))
    stride = (like.numel(), like.shape[1], 1)
    how = {"run_check": False, "shape": shape, "stride": stride}
    whole = DTensor.from_local(stack, like.device_mesh, stacked_placements(like), **how)
    return whole.full_tensor().float()


def scatter(whole: Tensor, like: Tensor) -> Tensor:
    """The inverse of `gather`: this process's shards of whole matrices, in the dtype of `like`."""
    whole = whole.to(like.dtype)
    if not is_split(like):
        return whole
    # Every process has computed the same matrices, so nothing is sent (src_data_rank=None).
    placements = stacked_placements(like)
    return distribute_tensor(whole, like.device_mesh, placements, src_data_rank=None).to_local()
