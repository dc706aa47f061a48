"""Equation 2 in five lines."""

import math


def mix(x_bend, query):
    """Tokens (b, e, n, d) and a query (d,) -> visual tokens (b, n, d), mixing weights (b, e)."""
    key_bed = x_bend.mean(2)
    score_be = key_bed @ query / math.sqrt(len(query))
    weight_be = score_be.softmax(-1)
    weighted_bend = x_bend * weight_be[..., None, None]
    return weighted_bend.sum(1), weight_be
