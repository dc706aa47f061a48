"""LoRA, low-rank adaptation (arXiv:2106.09685): train a small correction of each matrix of an LLM.

The pre-trained matrix W (out, in) stays frozen. Two thin ones, A (rank, in) and B (out, rank),
learn what is added to it: 40 million parameters for LLaMA-2 7B and rank 16, not 6.5 billion.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from support.errors import UserError


class LoRALinear(nn.Module):
    """A Linear without bias whose weight W is frozen, and its adapter. W keeps its name."""

    def __init__(self, weight: nn.Parameter, rank: int, alpha: float):
        super().__init__()
        rows, columns = weight.shape
        self.scale = alpha / rank
        self.weight = weight
        self.lora_a = nn.Parameter(torch.empty(rank, columns))
        self.lora_b = nn.Parameter(torch.zeros(rows, rank))  # so that at first y = W x

    def forward(self, x: Tensor) -> Tensor:
        # y = W x + (alpha / rank) B A x. With W x last, checkpointing need not recompute it.
        low_rank = linear(x, self.lora_a)
        change = linear(low_rank, self.lora_b)
        return linear(x, self.weight) + self.scale * change


def add_adapters(llm: nn.Module, rank: int, alpha: float, seed: int = 0) -> None:
    """Freeze a LLaMA and give each matrix of its layers an adapter, in place. Raises UserError if
    the rank is below 1 or above the width of the LLM."""
    width = llm.config.hidden_size
    if not 1 <= rank <= width:
        what = f"--lora {rank} is not possible."
        why = f"the rank of a correction is between 1 and the width of the LLM, {width}."
        raise UserError(what, why, "choose a rank such as 8 or 16.")
    generator = torch.Generator().manual_seed(seed)
    llm.requires_grad_(False)
    modules = dict(llm.layers.named_modules())
    for name, module in modules.items():
        if isinstance(module, nn.Linear):
            adapted = LoRALinear(module.weight, rank, alpha)
            # A ~ N(0, 1 / in), so that A x is about as large as x.
            std = module.in_features**-0.5
            nn.init.normal_(adapted.lora_a, std=std, generator=generator)
            llm.layers.set_submodule(name, adapted)


def is_adapter(name: str) -> bool:
    """Whether the parameter of this name is an A or a B."""
    return name.endswith((".lora_a", ".lora_b"))


def merge(state: dict, scale: float) -> dict:
    """The state_dict of a plain model: adapters are added to their W. scale: alpha / rank."""
    plain = {name: state[name] for name in state if not is_adapter(name)}
    for name in state:
        module, _, leaf = name.rpartition(".")
        if leaf == "lora_a":
            b = state[f"{module}.lora_b"].float()
            # W <- W + (alpha / rank) B A, in float32
            change = scale * b @ state[name].float()
            weight = f"{module}.weight"
            plain[weight] = plain[weight].float() + change
    return plain
