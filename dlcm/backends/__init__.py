"""Ways to compute the two attentions of a model; `dlcm.attention` chooses among them and says what they compute.

A backend for token-to-concept attention is a function (q_THA, k_KGA, v_KGA, segments, own_segment, log_length) -> out_THA.
Every token sees the contiguous range of flat concepts that `Segments.visible` gives; the row of a token that sees none may
hold any finite number, since `dlcm.attention` puts the null concept there, and its gradients are zero.

Kernels without a gradient of their own in autograd come as a pair `forward(q, k, v, *where) -> (out, lse)` and
`backward(d_out, q, k, v, out, lse, *where) -> (d_q, d_k, d_v)`; `ops` makes them differentiable, eagerly and for the compiler.
"""

from functools import cache
from importlib.util import find_spec


@cache
def has_triton() -> bool:
    """Whether Triton, in which the kernels for GPUs are written, is installed."""
    return find_spec("triton") is not None
