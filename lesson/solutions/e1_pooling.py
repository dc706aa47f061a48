"""Average pooling with loops."""


def window(place, size, side):
    """The first patch that a place after pooling covers, and the first one that it does not."""
    first = place * size // side
    end = -(-(place + 1) * size // side)  # rounded up
    return first, end


def pool(grid, side):
    """Average a grid of features (size, size, d_e) down to (side, side, d_e), window by window."""
    size, _, d_e = grid.shape
    pooled = grid.new_zeros(side, side, d_e)
    for i in range(side):
        top, bottom = window(i, size, side)
        for j in range(side):
            left, right = window(j, size, side)
            patches = grid[top:bottom, left:right]
            pooled[i, j] = patches.mean((0, 1))
    return pooled
