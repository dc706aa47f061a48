"""One decoding step as a CUDA graph.

Decoding one token launches about 20 small kernels for each layer. On a fast card that takes longer
than running them. A CUDA graph records the launches and repeats them all at once
(https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs). What it reads and writes must
stay in place and keep its shape, so the cache is used at its full length from the start.
"""

from __future__ import annotations

import torch
from torch import Tensor


class DecodingStep:
    """Maps the newest id of each row (b,) to the logits of the next one (b, vocab)."""

    def __init__(self, llama, cache, ids: Tensor):
        """llama: a Llama; cache: its KVCache after the prompt; ids (b,): of any value."""
        cache.use_all_slots()
        self.ids = ids.clone()
        before = cache.lengths.clone()
        with torch.cuda.device(ids.device):  # to whose streams a graph belongs
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # a graph may only record what has run before
                llama(self.ids[:, None], cache=cache)
            torch.cuda.current_stream().wait_stream(side)
            cache.lengths.copy_(before)  # so that the first real step overwrites this one
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.logits = llama(self.ids[:, None], cache=cache)[:, 0]

    def __call__(self, ids: Tensor) -> Tensor:
        """Run the step. The result is overwritten by the next call."""
        self.ids.copy_(ids)
        self.graph.replay()
        return self.logits
