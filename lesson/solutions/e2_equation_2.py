def mix(x_bend, query):
    """Tokens (b, e, n, d) and a query (d,) -> visual tokens (b, n, d), mixing weights (b, e)."""
    key_bed = x_bend.mean(2)
    score_be = key_bed @ query / len(query) ** 0.5
    weight_be = score_be.softmax(-1)
    o_bnd = (weight_be[:, :, None, None] * x_bend).sum(1)
    return o_bnd, weight_be
