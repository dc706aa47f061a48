"""Fold the authors' 44 million fusion parameters into one query. Read docs/fidelity.md, row K5."""


def fold(query, q_weight, q_bias, k_weight):
    """The query (d,) with which equation 2 gives the authors' mixing weights.

    Their score of a key x (d,) is (q_weight @ query + q_bias) . (k_weight @ x + k_bias) divided by
    sqrt(d_inner); q_weight is (d_inner, d_inner), k_weight (d_inner, d). Equation 2 divides by
    sqrt(d). Why is k_bias not needed?
    """
    raise NotImplementedError("move k_weight over to the query: q . (W x) = (W^T q) . x")
