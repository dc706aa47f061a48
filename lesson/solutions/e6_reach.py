"""Which time steps change when one frame does?"""


def changed_steps(config, frame):
    """The time steps (a set) whose features change with one of the encoder's own frames."""
    if config.tubelet_frames > 1:  # ViViT: every tubelet attends to every other
        return set(range(config.grid[0]))
    if config.temporal_window:  # LanguageBind: the frames of one window attend to each other
        first = frame - frame % config.temporal_window
        return set(range(first, first + config.temporal_window))
    return {frame}
