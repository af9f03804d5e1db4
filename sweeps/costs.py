"""What a plan costs on a device: hours, memory, money and energy of every run and of all, and what stands in its way."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlcm.config import ModelConfig, RunConfig
from dlcm.errors import UserError, parse
from flops.calibration import cpu_calibration, gpu_calibration
from flops.hardware import (
    DEFAULT_MFU_FROM_PARAMETERS,
    Estimate,
    Hardware,
    accelerator,
    calibrated_cpu,
    canonical_accelerator,
    estimate,
    run_memory,
)
from flops.memory import Memory

if TYPE_CHECKING:
    from sweeps.plan import Plan, PlannedRun
    from sweeps.spec import Sweep

_DEFAULT_GPU = "H100"


@dataclass(frozen=True)
class Overrides:
    """What the command line says in place of the sweep's `cluster` block; None leaves that as it is."""

    accelerator: str | None = None
    gpus: int | None = None
    mfu: float | None = None
    price_per_hour: float | None = None


@dataclass(frozen=True)
class PlanCosts:
    """What all runs of a plan take.

    Attributes:
        hardware: what they were estimated for; None where no device is known, and then there are no estimates.
        runs: one estimate a run, in the order of the plan.
        notes: what to know about the device's figures.
        warnings: what stands in the way of the runs, or makes the figures doubtful.
    """

    hardware: Hardware | None
    runs: tuple[Estimate, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def device_hours(self) -> float | None:
        """Of all runs; None without estimates, here and below."""
        return self._sum([run.device_hours for run in self.runs])

    @property
    def price(self) -> float | None:
        """Of all runs, in the currency of the price per hour; None without one."""
        return self._sum([run.price for run in self.runs if run.price is not None])

    @property
    def energy_kwh(self) -> float | None:
        """Of all runs at most: boards at full power, no cooling; None where the power is not known."""
        return self._sum([run.energy_kwh for run in self.runs if run.energy_kwh is not None])

    @property
    def longest_hours(self) -> float | None:
        """Wall hours of the longest run."""
        return max((run.hours for run in self.runs), default=None)

    @property
    def memory_bytes(self) -> float | None:
        """Of the run that needs the most, on each device."""
        return max((run.memory.total for run in self.runs), default=None)

    @property
    def mfu_sources(self) -> tuple[str, ...]:
        """Where the MFUs are from."""
        return tuple(dict.fromkeys(run.mfu_source for run in self.runs))

    def _sum(self, values: Sequence[float]) -> float | None:
        return sum(values) if values else None


def hardware_of(sweep: "Sweep", overrides: Overrides | None = None) -> tuple[Hardware | None, tuple[str, ...]]:
    """The device that a sweep's costs are estimated for.

    That of the command line, else `cluster.accelerator`, else an H100 where `cluster.gpus` is above 0, else this machine's
    processor if it was calibrated. A calibration of the device gives the MFU where none is given.

    Args:
        sweep: its `cluster` block counts.
        overrides: from the command line.

    Returns:
        The hardware, or None where a processor was not calibrated; and notes on what was found.

    Raises:
        UserError: unknown accelerator, a value out of range, a damaged calibration, or `cpu` asked for on the command line
            and not calibrated.
    """
    cluster, given = sweep.cluster, overrides or Overrides()
    gpus = cluster.gpus * cluster.nodes if given.gpus is None else given.gpus
    if gpus < 0 or (given.gpus == 0 and given.accelerator not in (None, "cpu")):
        raise UserError(f"--gpus {gpus} leaves no device to run on; give 1 or more")
    try:
        name = canonical_accelerator(given.accelerator or cluster.accelerator or (_DEFAULT_GPU if gpus > 0 else "cpu"))
    except ValueError as error:
        raise UserError(f"--accelerator: {error}") from None
    mfu = cluster.mfu if given.mfu is None else given.mfu
    price = cluster.price_per_hour if given.price_per_hour is None else given.price_per_hour
    if name != "cpu":
        calibration, note = gpu_calibration(name)
        hardware = Hardware(accelerator(name), max(gpus, 1), mfu, price, calibration)
        return hardware, (note,) if note else ()
    calibration, note = cpu_calibration(cluster.threads)
    notes = (note,) if note else ()
    if calibration is not None:
        return Hardware(calibrated_cpu(calibration), cluster.n_ranks, mfu, price, calibration), notes
    threads = f"{cluster.threads} thread{'s' * (cluster.threads != 1)}"
    way_out = f"`dlcm flops calibrate {sweep.source or 'SWEEP.yaml'}` measures it in half a minute"
    absent = f"no time estimate: this CPU was not calibrated with {threads}; {way_out}, or --accelerator names a GPU"
    if given.accelerator is not None:
        raise UserError("; ".join([*notes, absent]))
    return None, (*notes, absent)


def cost_plan(plan: "Plan", hardware: Hardware | None, notes: Sequence[str] = ()) -> PlanCosts:
    """What every run of a plan takes on this hardware.

    Args:
        plan: from `sweeps.plan.plan`.
        hardware: from `hardware_of`; None gives no estimates.
        notes: from `hardware_of`.

    Raises:
        UserError: a processor that was not calibrated in the precision of a run.
    """
    if hardware is None:
        return PlanCosts(None, notes=tuple(notes))
    device_type = hardware.accelerator.device_type
    # Runs that differ in seed, rate or length take the same memory.
    memories: dict[tuple[Any, ...], Memory] = {}
    estimates = []
    for run in plan.runs:
        train = run.config.train
        batch = (train.batch_tokens, train.micro_batch_tokens, run.config.data.seq_len)
        key = (run.config.model, batch, train.precision, train.parallel, train.activation_checkpointing)
        needed = memories.get(key)
        if needed is None:
            memory_bytes = hardware.accelerator.memory_bytes if device_type == "cuda" else None
            needed = memories[key] = run_memory(run.config, device_type, hardware.n_devices, memory_bytes)
        estimates.append(estimate(_own_part(run), run.flops, hardware, needed=needed))
    warnings = tuple(_warnings(plan, hardware, estimates))
    return PlanCosts(hardware, tuple(estimates), tuple(notes), warnings)


def _own_part(run: "PlannedRun") -> RunConfig:
    """The run as long as what is left for it to train, where a longer one trains its first steps."""
    if not run.steps_shared:
        return run.config
    train = run.config.train.model_copy(update={"tokens": run.tokens - run.tokens_shared})
    return run.config.model_copy(update={"train": train})


def _warnings(plan: "Plan", hardware: Hardware, estimates: Sequence[Estimate]) -> Iterator[str]:
    """One line for each thing that stands in the way."""
    device, cluster, n = hardware.accelerator, plan.sweep.cluster, len(estimates)
    if large := [run for run in estimates if not run.fits]:
        most = max(run.memory.total for run in large)
        fitting = [run.largest_micro_batch for run in large]
        if None in fitting:
            way_out = "not even one window of every run fits: choose a device with more memory, or shorter data.seq_len"
        else:
            way_out = f"set train.micro_batch_tokens to {min(x for x in fitting if x is not None):,} or less"
        told = f"{_n(len(large), n)} not fit the {device.memory_bytes / 1e9:.0f} GB of {device.name}"
        yield f"{told} (up to {most / 1e9:.0f} GB): {way_out}"
    limit = math.inf if cluster.time is None else cluster.time_minutes / 60
    if late := [run for run in estimates if run.hours > limit]:
        longest = max(run.hours for run in late)
        yield (
            f"{_n(len(late), n)} not end within cluster.time = {cluster.time} (longest {format_hours(longest)}): raise it, or "
            "count on resuming from checkpoints"
        )
    if hardware.n_devices > 1:
        yield (
            f"hours assume that {hardware.n_devices} devices share each run without loss, which has not been measured; "
            "price and energy are for all of them"
        )
    defaulted = device.is_gpu and hardware.mfu is None
    small = [
        run
        for run, found in zip(plan.runs, estimates)
        if found.mfu_source.startswith("default") and run.params.non_embedding < DEFAULT_MFU_FROM_PARAMETERS
    ]
    if defaulted and small:
        yield (
            f"{len(small)} of {n} runs have fewer than {DEFAULT_MFU_FROM_PARAMETERS / 1e6:.0f}M parameters, and will be slower "
            f"than MFU {estimates[0].mfu:g} has it: run `dlcm flops calibrate` on the device, or give --mfu"
        )
    if outside := sum(run.mfu_outside for run in estimates):
        yield f"{outside} of {n} runs are smaller or larger than any calibrated model; the rate of the nearest was taken"


def _n(count: int, total: int) -> str:
    return f"{count} of {total} runs {'does' if count == 1 else 'do'}"


def cost_row(found: Estimate, hardware: Hardware) -> dict[str, Any]:
    """An estimate as flat columns, units in their names; the price is in the currency of the price per hour."""
    return {
        "accelerator": hardware.accelerator.name,
        "n_devices": hardware.n_devices,
        "hours": found.hours,
        "device_hours": found.device_hours,
        "tokens_per_s": found.tokens_per_s,
        "memory_gb": found.memory.total / 1e9,
        "fits_memory": found.fits,
        "price": found.price,
        "energy_kwh": found.energy_kwh,
        "mfu": found.mfu,
        "mfu_source": found.mfu_source,
    }


def costs_json(costs: PlanCosts) -> dict[str, Any]:
    """Totals, the device and its source, notes and warnings."""
    hardware = costs.hardware
    told: dict[str, Any] = {"notes": list(costs.notes), "warnings": list(costs.warnings)}
    if hardware is None:
        return {"accelerator": None, **told}
    memory_bytes = costs.memory_bytes
    return {
        "accelerator": asdict(hardware.accelerator),
        "n_devices": hardware.n_devices,
        "price_per_hour": hardware.price_per_hour,
        "pue": hardware.pue,
        "device_hours": costs.device_hours,
        "longest_hours": costs.longest_hours,
        "memory_gb": None if memory_bytes is None else memory_bytes / 1e9,
        "price": costs.price,
        "energy_kwh": costs.energy_kwh,
        "mfu": sorted({run.mfu for run in costs.runs}),
        "mfu_sources": list(costs.mfu_sources),
        **told,
    }


def format_costs(costs: PlanCosts) -> str:
    """Totals in one line, then notes and warnings, a line each; empty where nothing is known."""
    lines = []
    if costs.hardware is not None and costs.runs:
        device, n = costs.hardware.accelerator, costs.hardware.n_devices
        mfus = [run.mfu for run in costs.runs]
        low, high = f"{100 * min(mfus):.3g}", f"{100 * max(mfus):.3g}"
        parts = [
            f"{device.name}{f' x {n}' if n > 1 else ''}: {costs.device_hours:,.4g} device-hours",
            f"longest run {format_hours(max(run.hours for run in costs.runs))}",
        ]
        if costs.price is not None:
            parts.append(f"price {costs.price:,.2f}")
        if costs.energy_kwh is not None:
            parts.append(f"at most {costs.energy_kwh:,.4g} kWh")
        span = low if low == high else f"{low} to {high}"
        lines.append(f"{', '.join(parts)}; MFU {span}% ({'; '.join(costs.mfu_sources)})")
    lines += costs.notes
    return "\n".join([*lines, *(f"warning: {text}" for text in costs.warnings)])


def format_hours(hours: float) -> str:
    """A time in the unit that suits it: seconds, minutes, hours, days."""
    for limit, size, unit in ((1 / 60, 1 / 3600, "s"), (1.0, 1 / 60, "min"), (48.0, 1.0, "h")):
        if hours < limit:
            return f"{hours / size:.3g} {unit}"
    return f"{hours / 24:.3g} d"


def costed(sweep_plan: "Plan", overrides: Overrides | None = None) -> PlanCosts:
    """`hardware_of` and `cost_plan` in one, with a warning where runs repeat their text."""
    from sweeps.doubts import plan_doubts

    hardware, notes = hardware_of(sweep_plan.sweep, overrides)
    costs = cost_plan(sweep_plan, hardware, notes)
    return replace(costs, warnings=(*costs.warnings, *plan_doubts(sweep_plan)))


def calibration_runs(path: Path | None, *, gpu: bool) -> tuple[list[RunConfig], int | None]:
    """The runs to calibrate with, and the CPU threads of one where the file says.

    Of a sweep the smallest, the middle and the largest model by FLOPs per token; of a run or a config that one; without a file
    three sizes of a middling DLCM.

    Args:
        path: sweep file, config file or run folder.
        gpu: whether the device is a GPU, for the sizes without a file.

    Raises:
        UserError: nothing there that can be trained.
    """
    from sweeps.plan import plan
    from sweeps.spec import Sweep

    if path is None:
        return [_example(size, gpu) for size in ((3e7, 1.5e8, 6e8) if gpu else (3e5, 1.2e6, 5e6))], None
    if path.is_dir() or path.suffix == ".json":
        from dlcm.record import read_json

        path = path / "run.json" if path.is_dir() else path
        data = read_json(path)
        return [_run_config(data.get("config", data), str(path))], None
    from dlcm.yaml_io import load_yaml

    data = load_yaml(path)
    if "model" in data or "d_token" in data:
        return [_run_config(data, str(path))], None
    sweep = Sweep.from_yaml(path)
    runs = sorted(plan(sweep).runs, key=lambda run: run.flops.training_per_token)
    chosen = {id(run): run.config for run in (runs[0], runs[len(runs) // 2], runs[-1])}
    return list(chosen.values()), sweep.cluster.threads


def _run_config(data: Any, where: str) -> RunConfig:
    """A run, or a model with the defaults of everything else."""
    if isinstance(data, dict) and "model" in data:
        return parse(RunConfig, data, where)
    model = parse(ModelConfig, data, where)
    return parse(RunConfig, {"model": model, "train": {"tokens": 2_048}}, where)


def _example(size: float, gpu: bool) -> RunConfig:
    from sweeps.shapes import dlcm_shape

    shape = dlcm_shape(size, 0.5)
    data, train = ({"seq_len": 2048}, {"batch_tokens": 16_384}) if gpu else ({"seq_len": 256}, {"batch_tokens": 2_048})
    model = {"vocab_size": 32_768 if gpu else 4_096, **shape}
    return parse(RunConfig, {"model": model, "data": data, "train": {"tokens": 10**9, **train}}, f"size {size:g}")
