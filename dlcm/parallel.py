"""Whether several ranks each keep a run's whole model, or a share of it. No torch here: planning asks as well."""

from typing import Literal

Mode = Literal["alone", "ddp", "fsdp"]
# Weight, gradient and both moments of AdamW, all in fp32.
STATE_BYTES = 16
# Of a device's memory: the rest is for activations, bf16 copies of the matrices and the gaps of the allocator.
REPLICATED_SHARE = 0.6


def choose_mode(parallel: str, n_ranks: int, n_parameters: int, memory_bytes: float | None) -> Mode:
    """How the ranks of a run share its model.

    Args:
        parallel: `train.parallel`.
        n_ranks: processes of the run; one is alone, whatever is asked for.
        n_parameters: of the whole model.
        memory_bytes: of one device; None where not known, as for a CPU, whose ranks share one memory.

    Returns:
        `ddp`: each rank has all of weights, gradients and moments. `fsdp`: each has a share. `auto` is `ddp` as long as they
        take at most `REPLICATED_SHARE` of the memory.
    """
    if n_ranks == 1:
        return "alone"
    if parallel != "auto":
        return "fsdp" if parallel == "fsdp" else "ddp"
    too_large = memory_bytes is not None and STATE_BYTES * n_parameters > REPLICATED_SHARE * memory_bytes
    return "fsdp" if too_large else "ddp"
