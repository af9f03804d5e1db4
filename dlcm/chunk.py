"""How many tokens have their logits in memory at once. No torch: estimates of memory need it too."""

# Elements of the logits of a chunk: what the caches of a processor hold, and what keeps a GPU busy.
CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}


def chunk_rows(n_tokens: int, vocab_size: int, device: str) -> int:
    """Tokens of a chunk of cross-entropy; at least one.

    Args:
        n_tokens: tokens of the micro-batch.
        vocab_size: rows of the unembedding.
        device: `cpu` or `cuda`.
    """
    return max(1, min(n_tokens, CHUNK_ELEMENTS[device] // vocab_size))
