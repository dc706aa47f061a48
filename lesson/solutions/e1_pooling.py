def pool(grid, side):
    """Average a grid of features (size, size, d_e) down to (side, side, d_e), window by window."""
    size = len(grid)
    pooled = grid.new_zeros(side, side, grid.shape[2])
    spans = [(i * size // side, -(-(i + 1) * size // side)) for i in range(side)]
    for i, (top, bottom) in enumerate(spans):
        for j, (left, right) in enumerate(spans):
            pooled[i, j] = grid[top:bottom, left:right].mean((0, 1))
    return pooled
