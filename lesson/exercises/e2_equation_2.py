"""Equation 2 in five lines. Read merv.CrossAttentionMixer, close it, and write it again."""


def mix(x_bend, query):
    """Tokens (b, e, n, d) and a query (d,) -> visual tokens (b, n, d), mixing weights (b, e)."""
    raise NotImplementedError("one key for each encoder: its mean token")
