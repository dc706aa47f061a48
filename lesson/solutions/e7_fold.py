def fold(query, q_weight, q_bias, k_weight):
    """The query (d,) with which equation 2 gives the authors' mixing weights."""
    # k_bias adds the same number to every score, and cancels in the softmax.
    d_inner, d = k_weight.shape
    projected = q_weight @ query + q_bias
    return k_weight.mT @ projected * (d / d_inner) ** 0.5
