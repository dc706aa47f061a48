"""Which time steps change when one frame does? Read encoders.py and data.preprocess; figure 4."""


def changed_steps(config, frame):
    """The time steps (a set) whose features change with one of the encoder's own frames.

    config: an EncoderConfig. Frame 8 of DINOv2's 16, for example, changes step 8 alone.
    """
    raise NotImplementedError("look at config.tubelet_frames, config.temporal_window, config.grid")
