"""A mixer of your own: a small network scores the mean token of each encoder."""

from torch import nn


class Mixer(nn.Module):
    """Tokens (b, e, n, d) -> visual tokens (b, n, d), mixing weights (b, e) that sum to 1."""

    def __init__(self, d, e):
        super().__init__()
        self.score = nn.Sequential(nn.Linear(d, 16), nn.GELU(), nn.Linear(16, 1))

    def forward(self, x_bend):
        weight_be = self.score(x_bend.mean(2))[..., 0].softmax(-1)
        return (weight_be[:, :, None, None] * x_bend).sum(1), weight_be
