"""Make ViViT blind to the direction of time."""


def blind(vivit):
    """Change the parameters so that a clip and its reverse have the same mean features."""
    t = vivit.config.grid[0]
    positions = vivit.position_embedding.data[0, 1:]  # (t*h*w, d_e), without the class token's
    over_time = positions.unflatten(0, (t, -1))
    same_at_every_step = over_time.mean(0, keepdim=True)
    over_time.copy_(same_at_every_step)

    kernels = vivit.patch_embedding.weight.data  # (d_e, 3, 2 frames, H, W)
    same_for_both_frames = kernels.mean(2, keepdim=True)
    kernels.copy_(same_for_both_frames)
