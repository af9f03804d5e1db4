"""How a batch is cut for the forward passes of one step."""

import torch
from torch import Tensor

from dlcm.config import RunConfig
from dlcm.errors import parse
from dlcm.shards import Batch


def with_micro_batch(config: RunConfig, micro_batch_tokens: int | None) -> RunConfig:
    """The config with another micro-batch, checked; the config itself where none is given.

    Raises:
        UserError: it does not divide the batch, or is not a whole number of windows.
    """
    if micro_batch_tokens is None:
        return config
    train = {**config.train.model_dump(), "micro_batch_tokens": micro_batch_tokens}
    return parse(RunConfig, {**config.model_dump(), "train": train}, "train")


def micro_batches(batch: Batch, config: RunConfig) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Tokens, targets, cu_seqlens and stream positions of each micro-batch; windows are never cut."""
    seq_len, size = config.data.seq_len, config.train.micro_batch_tokens or config.train.batch_tokens
    tokens_T, targets_T = torch.from_numpy(batch.tokens_T), torch.from_numpy(batch.targets_T)
    cu_seqlens = torch.from_numpy(batch.cu_seqlens).long()
    position_T = (torch.from_numpy(batch.windows).long()[:, None] + torch.arange(seq_len)).flatten()
    parts = []
    for start in range(0, tokens_T.numel(), size):
        inside = (cu_seqlens >= start) & (cu_seqlens <= start + size)
        part = slice(start, start + size)
        parts.append((tokens_T[part], targets_T[part], cu_seqlens[inside] - start, position_T[part]))
    return parts
