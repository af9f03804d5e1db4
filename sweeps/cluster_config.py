"""The `cluster` block of a sweep: where and how its runs run. No torch."""

import re
from typing import Any

from pydantic import Field, field_validator, model_validator

from dlcm.config import Frozen
from flops.hardware import canonical_accelerator

_SUFFIXES = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class ClusterConfig(Frozen):
    """Where and how the runs run. Every value has a default that works on one machine."""

    partition: str | None = Field(default=None, description="SLURM partition")
    account: str | None = Field(default=None, description="SLURM account")
    qos: str | None = Field(default=None, description="SLURM quality of service")
    time: str | None = Field(
        default=None,
        description="wall time of one run: minutes, H:M:S, D-H or D-H:M:S as sbatch reads it; from the plan's estimate with a "
        "margin where absent, and 4 hours where there is no estimate",
    )
    max_time: str | None = Field(
        default=None, description="longest wall time that the partition allows; longer runs go on after a requeue"
    )
    nodes: int = Field(default=1, gt=0, description="nodes of one run; each has `gpus` GPUs")
    gpus: int = Field(default=0, ge=0, description="GPUs of one run on a node; one rank each")
    ranks_per_node: int | None = Field(
        default=None, gt=0, description="processes of one run on a node; one for each GPU, or one, by default"
    )
    cpus_per_run: int = Field(default=1, gt=0, description="CPUs of one run")
    memory: str | None = Field(
        default=None,
        description="memory of one task, e.g. 8GB; `auto` takes the plan's estimate with a margin; the cluster's default "
        "where absent",
    )
    constraint: str | None = Field(default=None, description="SLURM node features")
    setup: tuple[str, ...] = Field(default=(), description="shell lines before the run, e.g. module loads")
    concurrency: int = Field(default=2, gt=0, description="runs at once with `--cluster local`")
    threads: int = Field(default=1, gt=0, description="threads of one run on the CPU")
    runs_per_task: int = Field(
        default=1, gt=0, description="runs that a task of a SLURM array trains, one after the other"
    )
    runs_at_once: int = Field(default=1, gt=0, description="runs that share the devices of a task at the same time")
    array_parallelism: int = Field(default=256, gt=0, description="tasks of a SLURM array that run at once")
    accelerator: str | None = Field(
        default=None,
        description="device that costs are estimated for: A100, A100-40GB, H100, H100-PCIe, H200, B200, or cpu, which "
        "`dlcm flops calibrate` measures; H100 by default where gpus is above 0, else cpu",
    )
    mfu: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="share of the device's peak that training reaches; from the calibration by default, else 0.35",
    )
    price_per_hour: float | None = Field(
        default=None, ge=0, description="price of one device for one hour, in any currency"
    )

    @field_validator("time", "max_time", mode="before", json_schema_input_type=str | int | None)
    @classmethod
    def _time(cls, value: Any) -> str | None:
        if value is None:
            return None
        _minutes(str(value))
        return str(value)

    @field_validator("accelerator")
    @classmethod
    def _accelerator(cls, value: str | None) -> str | None:
        return None if value is None else canonical_accelerator(value)

    @field_validator("memory")
    @classmethod
    def _memory(cls, value: str | None) -> str | None:
        if value not in (None, "auto") and not re.fullmatch(r"\d+(\.\d+)?\s*[KMGT]B?", value, re.IGNORECASE):
            raise ValueError(f"memory = {value!r} is not a size such as 8GB or 512MB, nor auto")
        return value

    @model_validator(mode="after")
    def _check(self) -> "ClusterConfig":
        if self.runs_at_once > 1 and self.n_ranks > 1:
            raise ValueError(
                "runs_at_once above 1 shares one device; with gpus or nodes above 1 a run has several: keep one"
            )
        return self

    @property
    def time_minutes(self) -> int:
        """Wall time in whole minutes, rounded up; 240 where none is given."""
        return 240 if self.time is None else _minutes(self.time)

    @property
    def max_minutes(self) -> int | None:
        """The longest time that may be asked for, in whole minutes."""
        return None if self.max_time is None else _minutes(self.max_time)

    @property
    def n_ranks(self) -> int:
        """Processes of one run."""
        return self.nodes * self.n_ranks_per_node

    @property
    def n_ranks_per_node(self) -> int:
        """Processes of one run on a node."""
        return self.ranks_per_node or max(self.gpus, 1)

    @property
    def memory_bytes(self) -> int | None:
        """Memory in bytes."""
        if self.memory is None or self.memory == "auto":
            return None
        size = re.fullmatch(r"([\d.]+)\s*([KMGT])B?", self.memory.upper())
        assert size is not None  # `_memory` lets nothing else in
        number, unit = size.groups()
        return int(float(number) * _SUFFIXES[unit])


def _minutes(text: str) -> int:
    """Minutes of a SLURM time: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if not match:
        raise ValueError(f"time = {text!r} is not a SLURM time such as 90, 4:00:00 or 1-12:00:00")
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is not None:
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:
        hours, minutes, seconds = 0, numbers[0], [*numbers, 0][1]
    total = ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
    if total <= 0:
        raise ValueError(f"time = {text!r} leaves no time to run")
    return -(-total // 60)
