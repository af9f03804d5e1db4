"""Out of memory: how to know it, and the next smaller micro-batch. No torch at the top: launchers use it."""

from dlcm.config import RunConfig

# The CPU allocator raises a plain RuntimeError, and the BLAS below it as well.
_CPU_WORDS = ("DefaultCPUAllocator", "not enough memory", "can't allocate memory", "Cannot allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory, of a GPU or of the host, did not suffice."""
    if isinstance(error, MemoryError):
        return True
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _CPU_WORDS)


def smaller_micro_batch(config: RunConfig, current: int | None = None) -> int | None:
    """The largest valid micro-batch of at most half the present one; None where there is none.

    Args:
        config: the run; a micro-batch divides its batch and is a whole number of windows.
        current: tokens of the present micro-batch; those of the config by default.
    """
    batch, window = config.train.batch_tokens, config.data.seq_len
    present = current or config.train.micro_batch_tokens or batch
    sizes = range(present // 2 // window * window, 0, -window)
    return next((size for size in sizes if batch % size == 0), None)
