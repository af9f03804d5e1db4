"""What the kernels of `dlcm.backends.fused_triton` give, by plain operations: for tests of what is kept, without a GPU."""

import torch


def add_rms_norm(x, branch, weight_W, eps, dtype):
    """The sum, its norm, and the scale of each row."""
    total = x if branch is None else (x.float() + branch).to(x.dtype)
    scale_N = (total.float().square().mean(-1) + eps).rsqrt()
    return total, (total.float() * scale_N[..., None] * weight_W).to(dtype), scale_N.flatten()


def heads(x_TX, weights_2A, eps, cos_T1A, sin_T1A, n_heads, n_kv):
    """Queries, keys, values, and the scales of the norms."""
    parts = x_TX.unflatten(1, (-1, weights_2A[0].shape[0])).split([n_heads, n_kv, n_kv], 1)
    found = []
    for x_THA, weight_A in zip(parts, weights_2A):
        _, normed_THA, scale = add_rms_norm(x_THA, None, weight_A, eps, torch.float32)
        a, b = normed_THA.chunk(2, -1)
        rotated = torch.cat([a * cos_T1A - b * sin_T1A, a * sin_T1A + b * cos_T1A], -1)
        found.append((rotated.to(x_TX.dtype), scale.unflatten(0, (x_TX.shape[0], -1))))
    (q, of_q), (k, of_k) = found
    return q, k, parts[2].contiguous(), torch.cat([of_q, of_k], 1)


def swiglu(x_TX):
    """The gated half."""
    gate, up = x_TX.float().chunk(2, 1)
    return (torch.nn.functional.silu(gate) * up).to(x_TX.dtype)
