"""How a batch is cut for the forward passes of one step."""

import torch
from torch import Tensor

from dlcm.config import RunConfig
from dlcm.errors import UserError, parse
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


def shares(config: RunConfig, n_ranks: int) -> list[int]:
    """Tokens of a batch that each rank takes: whole windows, as equal as they can be.

    Raises:
        UserError: fewer windows than ranks.
    """
    windows, seq_len = config.train.batch_tokens // config.data.seq_len, config.data.seq_len
    if windows < n_ranks:
        raise UserError(
            f"train.batch_tokens = {config.train.batch_tokens} is {windows} windows of data.seq_len = {seq_len}, fewer than the "
            f"{n_ranks} ranks: use fewer devices or a larger batch"
        )
    return [(windows * (i + 1) // n_ranks - windows * i // n_ranks) * seq_len for i in range(n_ranks)]


def most_micro_batches(config: RunConfig, n_ranks: int) -> int:
    """Micro-batches of the rank that has most: ranks must agree on what they do together."""
    size = config.train.micro_batch_tokens or config.train.batch_tokens
    return max(-(-share // size) for share in shares(config, n_ranks))


def micro_batches(
    batch: Batch, config: RunConfig, rank: int = 0, n_ranks: int = 1
) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Tokens, targets, cu_seqlens and stream positions of each micro-batch of a rank; windows are never cut."""
    seq_len, size = config.data.seq_len, config.train.micro_batch_tokens or config.train.batch_tokens
    share = shares(config, n_ranks)
    first, last = sum(share[:rank]), sum(share[: rank + 1])
    tokens_T, targets_T = torch.from_numpy(batch.tokens_T), torch.from_numpy(batch.targets_T)
    cu_seqlens = torch.from_numpy(batch.cu_seqlens).long()
    position_T = (torch.from_numpy(batch.windows).long()[:, None] + torch.arange(seq_len)).flatten()
    parts = []
    for start in range(first, last, size):
        end = min(start + size, last)
        inside = (cu_seqlens >= start) & (cu_seqlens <= end)
        part = slice(start, end)
        parts.append((tokens_T[part], targets_T[part], cu_seqlens[inside] - start, position_T[part]))
    return parts
