"""A mixer of your own: a small network scores the mean token of each encoder."""

from torch import nn


class Mixer(nn.Module):
    """Tokens (b, e, n, d) -> visual tokens (b, n, d), mixing weights (b, e) that sum to 1."""

    def __init__(self, d, e):
        super().__init__()
        self.hidden = nn.Linear(d, 16)
        self.score = nn.Linear(16, 1)

    def forward(self, x_bend):
        """Score each encoder by what its tokens say, and mix by a softmax of the scores."""
        key_bed = x_bend.mean(2)
        hidden = self.hidden(key_bed).relu()
        weight_be1 = self.score(hidden).softmax(1)
        weighted_bend = x_bend * weight_be1[..., None]
        visual = weighted_bend.sum(1)
        return visual, weight_be1[..., 0]
