"""Fold the authors' 44 million fusion parameters into one query."""


def fold(query, q_weight, q_bias, k_weight):
    """The query (d,) with which equation 2 gives the authors' mixing weights."""
    # k_bias adds the same number to every score, and cancels in the softmax.
    d_inner, d = k_weight.shape
    projected = q_weight @ query + q_bias
    scale = (d / d_inner) ** 0.5  # they divide by sqrt(d_inner), equation 2 by sqrt(d)
    return scale * (k_weight.mT @ projected)
