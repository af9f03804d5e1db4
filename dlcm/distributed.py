"""One run on several processes: who we are among them, and the few things that ranks say to each other.

Each rank takes its share of the windows of a batch; `dlcm.sharing` says how they share the model and its gradients. Files are
written by rank 0 alone.
"""

import contextlib
import os
import re
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dlcm.errors import UserError

Answer = TypeVar("Answer")
_MEETING = timedelta(minutes=5)  # tasks of a job start within seconds of each other
_PATIENCE = timedelta(hours=2)  # rank 0 evaluates while the others wait; a rank that dies is noticed at once


@dataclass(frozen=True)
class Ranks:
    """This process among those of a run.

    Attributes:
        rank: 0 writes the files.
        world_size: processes of the run.
        local_rank: number on this machine, and of its GPU.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == 0

    def sum(self, values: Iterable[float], device: torch.device) -> list[float]:
        """Sums over the ranks, in double precision."""
        found = torch.tensor(list(values), dtype=torch.float64, device=device)
        if self.world_size > 1:
            dist.all_reduce(found)
        return found.tolist()

    def tell(self, message: Any = None) -> Any:
        """What rank 0 says, on all ranks."""
        if self.world_size == 1:
            return message
        box = [message]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def on_main(self, action: Callable[[], Answer]) -> Answer:
        """Let rank 0 do something; its answer, or its exception, comes back on all ranks."""
        if self.world_size == 1:
            return action()
        answer, error = None, None
        if self.is_main:
            try:
                answer = action()
            except Exception as found:
                error = found
        answer, error = self.tell((answer, error))
        if error is not None:
            raise error
        return answer


def current_ranks() -> Ranks:
    """This process in torch's default process group; alone where there is none."""
    if not (dist.is_available() and dist.is_initialized()):
        return Ranks()
    return Ranks(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))


@contextlib.contextmanager
def joined(environment: Mapping[str, str] = os.environ) -> Generator[Ranks]:
    """Join the processes of a run as torchrun, SLURM or submitit started them; alone where they started one.

    Raises:
        UserError: the environment names a rank that cannot be.
    """
    found = rendezvous(environment)
    if found is None:
        yield current_ranks()
        return
    ranks, address, port = found
    os.environ["LOCAL_RANK"] = str(ranks.local_rank)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(ranks.local_rank)
    try:
        store = dist.TCPStore(address, port, ranks.world_size, ranks.is_main, timeout=_MEETING)
    except (dist.DistError, RuntimeError) as error:
        raise UserError(
            f"rank {ranks.rank} of {ranks.world_size} does not reach rank 0 at {address}:{port} "
            f"({str(error).splitlines()[0]}); name nodes that resolve, or set MASTER_ADDR and start with torchrun"
        ) from None
    dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.world_size, timeout=_PATIENCE)
    try:
        yield ranks
    finally:
        dist.destroy_process_group()


def device_of(ranks: Ranks) -> tuple[torch.device, str]:
    """The device of this process, and its name: that of the GPU, or `cpu`."""
    if not torch.cuda.is_available():
        return torch.device("cpu"), "cpu"
    device = torch.device(f"cuda:{ranks.local_rank}")
    return device, torch.cuda.get_device_name(device)


def rendezvous(environment: Mapping[str, str]) -> tuple[Ranks, str, int] | None:
    """Rank, address and port by which processes find each other; None for a process alone.

    Raises:
        UserError: a rank outside of the number of ranks, or a variable that is not a number.
    """
    e = environment
    if "RANK" in e and "WORLD_SIZE" in e:  # torchrun
        keys, address, port = (
            ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
            e.get("MASTER_ADDR", "127.0.0.1"),
            e.get("MASTER_PORT", "29500"),
        )
    # srun; SLURM_NTASKS is there in a batch script of one process, too
    elif _whole("SLURM_STEP_NUM_TASKS", e.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        keys = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
        port = _port(e["SLURM_JOB_ID"])
        one_node = e.get("SLURM_STEP_NUM_NODES") == "1"  # then no name has to resolve
        address = "127.0.0.1" if one_node else first_host(e.get("SLURM_STEP_NODELIST", e["SLURM_JOB_NODELIST"]))
    elif _whole("SUBMITIT_LOCAL_NTASKS", e.get("SUBMITIT_LOCAL_NTASKS", "1")) > 1:
        keys = ("SUBMITIT_LOCAL_GLOBALID", "SUBMITIT_LOCAL_NTASKS", "SUBMITIT_LOCAL_LOCALID")
        address, port = "127.0.0.1", _port(e["SUBMITIT_LOCAL_JOB_ID"])
    else:
        return None
    rank, world_size, local_rank = (_whole(key, e.get(key, "0")) for key in keys)
    if world_size == 1:
        return None
    if not 0 <= rank < world_size:
        raise UserError(f"{keys[0]} = {rank} with {keys[1]} = {world_size}: a rank is below the number of ranks")
    return Ranks(rank, world_size, local_rank), address, _whole("MASTER_PORT", str(port))


def _whole(name: str, value: str) -> int:
    """A whole number of the environment."""
    if not re.fullmatch(r"[0-9]+", value):
        raise UserError(
            f"{name} = {value!r} in the environment: expected a whole number; set it, or unset it to train alone"
        )
    return int(value)


def first_host(nodes: str) -> str:
    """The first host of a SLURM node list: `gpu[3-5,9],x1` -> `gpu3`, `rack[1-2]node[3-4]` -> `rack1node3`."""
    match = re.match(r"(?:[^,\[]|\[[^\]]+\])+", nodes)
    if not match:
        raise UserError(f"SLURM_JOB_NODELIST = {nodes!r} names no host")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", match[0])


def _port(job_id: str) -> int:
    """A port of the unprivileged range that is the same on all ranks and differs from job to job."""
    return 20_000 + int(re.sub(r"\D", "", job_id) or 0) % 20_000
