"""Average pooling with loops. Read merv.pooling_matrix: row i covers floor(i * size / side) up to
ceil((i + 1) * size / side). Try 14 -> 8, where windows overlap."""


def pool(grid, side):
    """Average a grid of features (size, size, d_e) down to (side, side, d_e), window by window."""
    raise NotImplementedError("make a tensor (side, side, d_e) and fill one place at a time")
