"""A fifth encoder: the mean colour of each patch."""

from torch import nn

from encoders import ENCODERS, Encoder, EncoderConfig

NAME = "mean-colour"


class MeanColour(Encoder, family="mean-colour"):
    """The mean red, green and blue of each patch, and a random projection of these."""

    encodes_frames_alone = True

    def __init__(self, config):
        super().__init__(config)
        self.patch_embedding = nn.Linear(3, config.hidden_size)

    def embed(self, frames):
        """(b, T, 3, H, W) -> one row per frame (b*t, h*w, d_e)."""
        frames = frames.flatten(0, 1)
        size = self.config.patch_size
        pooled = nn.functional.avg_pool2d(frames, size)
        return self.patch_embedding(pooled.flatten(2).mT)


ENCODERS[NAME] = EncoderConfig(
    NAME, family="mean-colour", source="", hidden_size=8, num_heads=1, released_layers=0,
    num_layers=0, patch_size=8, image_size=32, num_frames=4, class_token=False,
)  # fmt: skip
