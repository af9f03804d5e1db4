"""How fast a finished run was: tokens and FLOPs per second, and its MFU.

`result.json` and `metrics.jsonl` time different things. `wall_s` runs from the first step to the last, over all resumed parts:
steps, checkpoints and the calibration of the threshold, but not the start, the validation that follows, or steps that an
interruption took back. `tokens_per_s` of a line of metrics is that of one step alone. So the speed of steps is the median over
the lines, the speed overall is tokens over `wall_s`, and both are told.

FLOPs are the model's, at the R realised in training, one document a window: packed windows compute less attention, second
encoder passes of split batches more.
"""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dlcm.config import RunConfig
from dlcm.errors import UserError, parse
from dlcm.record import read_json, read_metrics
from flops.calibration import calibration_path, load_calibration
from flops.count import count
from flops.hardware import recognise


@dataclass(frozen=True)
class Speed:
    """Speed of a finished run, over all its devices.

    Attributes:
        device: as recorded; the processor where that is known.
        tokens_per_s: of steps, median over the logged ones; overall where none was logged.
        tokens_per_s_overall: over all of `wall_s`.
        flop_per_s: model FLOPs of training, at the speed of steps.
        flop_per_s_overall: the same overall.
        peak_flops: of all its devices in the precision of the run; None where not known.
        peak_source: datasheet, or the calibration that measured it.
        bf16: whether the run ran under bf16 autocast.
    """

    device: str
    tokens_per_s: float
    tokens_per_s_overall: float
    flop_per_s: float
    flop_per_s_overall: float
    peak_flops: float | None
    peak_source: str | None
    bf16: bool

    @property
    def mfu(self) -> float | None:
        """Share of the peak that steps reached."""
        return None if self.peak_flops is None else self.flop_per_s / self.peak_flops

    @property
    def mfu_overall(self) -> float | None:
        """Share of the peak over the whole run."""
        return None if self.peak_flops is None else self.flop_per_s_overall / self.peak_flops

    def to_json(self) -> dict[str, Any]:
        """All figures."""
        return {**asdict(self), "mfu": self.mfu, "mfu_overall": self.mfu_overall}


def run_speed(run_dir: Path) -> Speed | None:
    """The speed of a run; None where it has no result, or took no step.

    Raises:
        UserError: files of the run are damaged.
    """
    if not (run_dir / "result.json").exists():
        return None
    result = read_json(run_dir / "result.json")
    tokens, wall_s = result.get("tokens"), result.get("wall_s")
    if not tokens or not wall_s:
        return None
    config = parse(RunConfig, read_json(run_dir / "run.json").get("config"), f"{run_dir / 'run.json'}: config")
    environment = read_json(run_dir / "env.json") if (run_dir / "env.json").exists() else {}
    device = str(result.get("device") or environment.get("device") or "unknown")
    bf16 = config.train.is_bf16("cpu" if device == "cpu" else "cuda")
    # The first logged step may hold one-time work: compilation, first allocations.
    logged = [row["tokens_per_s"] for row in read_metrics(run_dir / "metrics.jsonl") if row.get("tokens_per_s")]
    steps = statistics.median(logged[1:] or logged) if logged else tokens / wall_s
    per_token = count(config.model, config.data.seq_len, result.get("tokens_per_concept_train")).training_per_token
    peak, source = _peak(device, environment, bf16)
    name, n_ranks = environment.get("processor") or device if device == "cpu" else device, environment.get("n_ranks", 1)
    if n_ranks > 1:
        name, peak = f"{n_ranks} x {name}", None if peak is None else n_ranks * peak
    return Speed(
        device=name,
        tokens_per_s=steps,
        tokens_per_s_overall=tokens / wall_s,
        flop_per_s=per_token * steps,
        flop_per_s_overall=per_token * tokens / wall_s,
        peak_flops=peak,
        peak_source=source,
        bf16=bf16,
    )


def meter(config: RunConfig, environment: Mapping[str, Any]) -> Callable[[float, float], float] | None:
    """MFU of a run while it trains (`dlcm.meter`).

    Args:
        config: the run.
        environment: its `env.json`.

    Returns:
        A function of tokens per second, over all devices, and tokens per concept; None where no peak is known.
    """
    device = str(environment["device"])
    peak, _ = _peak(device, environment, config.train.is_bf16("cpu" if device == "cpu" else "cuda"))
    if peak is None:
        return None
    total = peak * int(environment.get("n_ranks", 1))

    def mfu(tokens_per_s: float, tokens_per_concept: float) -> float:
        ratio = None if config.model.is_dense else tokens_per_concept
        return count(config.model, config.data.seq_len, ratio).training_per_token * tokens_per_s / total

    return mfu


def _peak(device: str, environment: Mapping[str, Any], bf16: bool) -> tuple[float | None, str | None]:
    """Peak FLOP/s of the device of a run, and its source; of a processor only where this machine calibrated the same one."""
    known = recognise(device)
    if known is not None:
        return known.peak(bf16), f"datasheet, {known.name}"
    processor, threads = environment.get("processor"), environment.get("threads")
    if device != "cpu" or processor is None or threads is None:
        return None, None
    try:
        calibration, _ = load_calibration(calibration_path(str(processor), "cpu", int(threads)))
    except UserError:
        return None, None  # a damaged calibration is no fault of the run; `sweep plan` reports it
    if calibration is None:
        return None, None
    return calibration.peak_flops, f"measured matrix product: {calibration.told}"


def format_speed(speed: Speed) -> str:
    """The speed in two lines."""
    what = "bf16" if speed.bf16 else "fp32"
    lines = [
        f"speed of steps {speed.tokens_per_s:,.0f} tokens/s, {speed.flop_per_s:.3g} FLOP/s; "
        f"overall {speed.tokens_per_s_overall:,.0f} tokens/s ({speed.device}, {what})"
    ]
    if speed.mfu is None or speed.mfu_overall is None:
        lines.append(
            "MFU unknown: no peak is known of this device; `dlcm flops calibrate` measures that of this machine"
        )
    else:
        lines.append(
            f"MFU {100 * speed.mfu:.1f}% in steps, {100 * speed.mfu_overall:.1f}% overall, "
            f"of {speed.peak_flops:.3g} FLOP/s ({speed.peak_source})"
        )
    return "\n".join(lines)
