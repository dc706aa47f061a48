"""Make ViViT blind to the direction of time. Read encoders.ViViT.

Time enters at two places: positions (the first is the class token's, then t * h * w) and kernels
that span two frames. Remove one alone and see what the check measures.
"""


def blind(vivit):
    """Change the parameters so that a clip and its reverse have the same mean features."""
    raise NotImplementedError("change position_embedding.data and patch_embedding.weight.data")
