def blind(vivit):
    """Change the parameters so that a clip and its reverse have the same mean features."""
    positions = vivit.position_embedding.data[:, 1:]
    over_time = positions.unflatten(1, vivit.config.grid)
    over_time[:] = over_time.mean(1, keepdim=True)
    kernel = vivit.patch_embedding.weight.data  # (d_e, 3, 2 frames, H, W)
    kernel[:] = kernel.mean(2, keepdim=True)
