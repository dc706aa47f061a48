"""A mixer of your own that learns which encoder to trust. Read support/variants.py, its interface.

In the check, one encoder knows the answer about a clip and the others guess. Its tokens have a 2 in
channel 0, where those of the others have a 0. Equal weights ignore that; your mixer should use it.
"""

from torch import nn


class Mixer(nn.Module):
    """Tokens (b, e, n, d) -> visual tokens (b, n, d), mixing weights (b, e) that sum to 1."""

    def __init__(self, d, e):
        super().__init__()

    def forward(self, x_bend):
        raise NotImplementedError("give each encoder a score that depends on its tokens")
