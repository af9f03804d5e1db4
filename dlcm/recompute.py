"""Activation checkpointing: a block keeps its input and computes the rest again in the backward pass (Chen et al. 2016).

What a block computes is a function of its inputs: it draws nothing, and boundaries are decided between the stacks. So what is
computed again is what was there, to the bit.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute_blocks(blocks: list[nn.Module]) -> None:
    """Let blocks recompute their activations. Names of parameters stay; hooks of a block run around it, once a pass."""
    for block in blocks:
        block.forward = _recomputed(block.forward)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def call(*inputs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs)
        outputs = checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False)
        if not torch.compiler.is_compiling():
            # Autocast would hold the bf16 copies of all matrices to the end of the pass; nobody reads them any more.
            torch.clear_autocast_cache()
        return outputs

    return call
