"""How the ranks of a run share its model: each has all of it (DDP), or each a share (FSDP2).

Both reduce gradients while the backward pass still runs. The objective of a rank is scaled by the number of ranks, so that the
mean over them is the gradient of the global batch, however unequal their shares are.

DDP (Li et al. 2020) sums the gradients of each bucket as soon as the last of them is there, in the last micro-batch of a rank
only. FSDP (Zhao et al. 2023) keeps on each rank a share of every weight, its gradient and its moments; a block's weights are
gathered before it is computed, forward and backward, and its gradients are summed and scattered behind it, in fp32, in each
micro-batch, so that no rank ever has the gradient of the whole model. Weights are gathered in fp32, because autocast chooses
operation by operation what is computed in bf16: norms and the residual stream are not.

Files hold whole tensors under the names of the bare model, whoever wrote them: a run goes on under any number of ranks.
"""

import contextlib
import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dlcm.config import RunConfig
from dlcm.distributed import Ranks
from dlcm.errors import UserError
from dlcm.model import Model, Output
from dlcm.parallel import Mode, choose_mode
from dlcm.recompute import recompute_blocks

Part = TypeVar("Part")
# MB of gradients that are reduced together: enough to fill a network, few enough that the first are under way early.
BUCKET_MB = 25


class SharedModel:
    """A model as the ranks of a run have it; calling it is the forward pass of training.

    Attributes:
        model: the model itself, on the device, under its own names. Under FSDP its parameters are shares between passes, and
            `forward` and `detect` gather them: all ranks call them alike.
        mode: how it is shared.
    """

    def __init__(self, model: Model, mode: Mode, device: torch.device, *, bucket_mb: float = BUCKET_MB) -> None:
        self.model, self.mode = model, mode
        self.replica: nn.parallel.DistributedDataParallel | None = None
        if mode != "alone":
            _freeze_untrained(model)
        if mode == "fsdp":
            _shard(model, device)
        model.to(device)
        if mode == "ddp":
            self.replica = _replicated(model, bucket_mb)

    def __call__(self, *inputs: Tensor, **options: Any) -> Output:
        """`Model.forward`."""
        return (self.model if self.replica is None else self.replica)(*inputs, **options)

    def passes(self, parts: Sequence[Part], n_most: int) -> list[tuple[Part, bool]]:
        """The micro-batches of a step, each with whether it counts.

        Under FSDP the ranks gather weights together, so each takes as many passes as the one with most micro-batches; the
        passes beyond its own repeat its last micro-batch and must not count.

        Args:
            parts: micro-batches of this rank, one at least.
            n_most: micro-batches of the rank that has most.
        """
        n_idle = n_most - len(parts) if self.mode == "fsdp" else 0
        return [*((part, True) for part in parts), *[(parts[-1], False)] * n_idle]

    def accumulating(self, more: bool) -> contextlib.AbstractContextManager[None]:
        """Around forward and backward pass of a micro-batch; `more`: others follow, and gradients are not yet to be reduced."""
        return self.replica.no_sync() if self.replica is not None and more else contextlib.nullcontext()

    def clip_gradients(self, largest: float) -> float:
        """Scale the gradients to a global norm of at most `largest`; the norm before."""
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), largest)
        return float(_whole(norm))

    def state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """States of model and optimizer as those of a process alone, on rank 0; of no use elsewhere. All ranks call it."""
        model, moments = self.model.state_dict(), optimizer.state_dict()
        if self.mode != "fsdp":
            return {"model": model, "optimizer": moments}
        states = {i: _gathered(state) for i, state in moments["state"].items()}
        return {"model": _gathered(model), "optimizer": {**moments, "state": states}}

    def load(self, state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
        """Take over what `state` gave, from whatever number of ranks and mode; every rank has the whole of it at hand."""
        model, moments = state["model"], state["optimizer"]
        if self.mode == "fsdp":
            model = {name: _share_like(x, model[name]) for name, x in self.model.state_dict().items()}
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            states = {
                i: {key: _share_like(parameters[i], x) for key, x in found.items()}
                for i, found in moments["state"].items()
            }
            moments = {**moments, "state": states}
        self.model.load_state_dict(model)
        optimizer.load_state_dict(moments)


def share_model(
    model: Model, config: RunConfig, device: torch.device, ranks: Ranks, *, compiled: bool = False
) -> SharedModel:
    """A model that was built on the CPU, ready to train on a device, recomputed as `config.train` says.

    Args:
        model: built on the CPU.
        config: of the run.
        device: of this rank.
        ranks: that share it.
        compiled: whether its stacks are compiled.

    Raises:
        UserError: `parallel: fsdp` with a torch that was built without it.
    """
    train = config.train
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    n_parameters = sum(p.numel() for p in model.parameters())
    # Rank 0 decides: cards of one job may differ.
    mode: Mode = ranks.tell(choose_mode(train.parallel, ranks.world_size, n_parameters, memory))
    if train.activation_checkpointing:
        recompute_blocks(model.blocks())
    if compiled:
        # Block by block, so that weights are gathered and gradients leave between them, and on a GPU because blocks are alike:
        # 24 layers whole took minutes to compile, one block ten seconds, for the same speed. Dynamo would cut graphs at DDP's
        # buckets to the same end, but not those with a recomputation in them.
        torch._dynamo.config.optimize_ddp = torch._dynamo.config.optimize_ddp and mode != "ddp"
        model.compile_stacks(by_block=mode != "alone" or device.type == "cuda")
    return SharedModel(model, mode, device)


def _replicated(model: Model, bucket_mb: float) -> nn.parallel.DistributedDataParallel:
    ddp = nn.parallel.DistributedDataParallel
    # Buffers need not be sent: the ratio controller moves them alike on all ranks. Newer versions of torch call that otherwise.
    newer = "forward_sync_buffers" in inspect.signature(ddp).parameters
    options: dict[str, Any] = {"forward_sync_buffers" if newer else "broadcast_buffers": False}
    return ddp(model, gradient_as_bucket_view=True, bucket_cap_mb=bucket_mb, **options)


def _freeze_untrained(model: Model) -> None:
    """Take the gradient from what has none: the learned detector without a ratio loss. Reductions would wait for it."""
    boundary = model.config.boundary
    if boundary is not None and boundary.ratio_loss_weight == 0 and not boundary.straight_through:
        model.boundary.requires_grad_(False)


def _shard(model: Model, device: torch.device) -> None:
    """Share every block, and what is left of the model, among the ranks of the default group.

    Blocks go to the device one by one, and leave all but their share behind them: the whole need never be there.
    """
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    except ImportError as error:
        raise UserError(
            f"train.parallel: fsdp needs FSDP2, which torch {torch.__version__} does not have ({error}); "
            "install another build of torch, or set train.parallel: ddp"
        ) from None
    # It tells of views among the outputs, of which none is written to.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in model.blocks():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "detect")


def _whole(x: Any) -> Any:
    """A tensor whose shares lie on the ranks, put together; all ranks call it. Other things as they are."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def _gathered(state: Mapping[str, Any]) -> dict[str, Any]:
    """Whole tensors in the memory of the host; one at a time is on the device, and rank 0 alone keeps them."""
    is_main = dist.get_rank() == 0
    found = {}
    for name, x in state.items():
        whole = _whole(x)
        if is_main:
            found[name] = whole.cpu() if isinstance(whole, Tensor) else whole
    return found


def _share_like(like: Tensor, whole: Any) -> Any:
    """This rank's share of a whole tensor, as `like` is shared; what is of another shape, as a step count, is not."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor) or whole.shape != like.shape:
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
