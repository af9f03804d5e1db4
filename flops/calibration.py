"""What was measured of a device: the FLOP rate of training steps by model size, as a file that estimates read.

`flops.calibrate` makes it, one file for each device (and, on a CPU, number of threads) under `<cache root>/calibration`.
Rates are interpolated linearly over the logarithm of the training FLOPs per token, and held at the ends. Why that axis: what
limits a small model is the width of its matrix products, which it shares with its FLOPs per token; measured on a CPU (0.3M to
3M parameters, 512 to 8,192 tokens a step) the rate rises threefold with the size, within a third of it for 16-fold batches, and
dense and hierarchical models lie on one curve. Points are taken at the micro-batch of the runs that are asked about.
"""

import bisect
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dlcm.errors import UserError
from dlcm.record import read_json, write_json

SCHEMA = 1


@dataclass(frozen=True)
class Point:
    """Training steps of one model.

    Attributes:
        flops_per_token: training FLOPs per token of the model at its target R, one document a window.
        params_non_embedding: N.
        micro_batch_tokens: tokens of one forward pass.
        bf16: whether steps ran under bf16 autocast.
        seconds_per_step: median over `n_steps`.
        flop_per_s: FLOPs that a step computes, a second encoder pass included, over its seconds.
        n_steps: steps that were timed.
    """

    flops_per_token: float
    params_non_embedding: int
    micro_batch_tokens: int
    bf16: bool
    seconds_per_step: float
    flop_per_s: float
    n_steps: int


@dataclass(frozen=True)
class Calibration:
    """A measured device.

    Attributes:
        device: model name of the GPU or of the processor.
        device_type: `cuda` or `cpu`.
        threads: CPU threads of a run.
        peak_flops: best rate of a large matrix product, FLOP/s; in bf16 on a GPU, in fp32 on a CPU.
        memory_bytes: of the GPU, or of the machine.
        points: by rising FLOPs per token.
        left_out: N of models that were too large for the device or the time.
        versions: of Python and of the packages that set the speed.
        git_commit: code that was measured; None outside a checkout.
        measured_at: UTC, ISO 8601.
    """

    device: str
    device_type: str
    threads: int
    peak_flops: float
    memory_bytes: int
    points: tuple[Point, ...]
    left_out: tuple[int, ...]
    versions: Mapping[str, str]
    git_commit: str | None
    measured_at: str
    schema: int = SCHEMA

    @property
    def told(self) -> str:
        """Device and date, for a line of text."""
        threads = f", {self.threads} thread{'s' * (self.threads != 1)}" if self.device_type == "cpu" else ""
        return f"{self.device}{threads}, {self.measured_at[:10]}"

    def rate(self, flops_per_token: float, *, bf16: bool) -> tuple[float, bool] | None:
        """FLOP/s of a model with this many training FLOPs per token, and whether it lies outside of what was measured.

        Returns:
            None where nothing was measured in this precision.
        """
        points = [point for point in self.points if point.bf16 == bf16]
        if not points:
            return None
        places = [math.log(point.flops_per_token) for point in points]
        place, i = math.log(flops_per_token), bisect.bisect_left(places, math.log(flops_per_token))
        # A model of the size of an end point is inside, whatever the last bit of its logarithm.
        if i == 0 or i == len(places):
            end = points[0] if i == 0 else points[-1]
            return end.flop_per_s, not math.isclose(flops_per_token, end.flops_per_token, rel_tol=0.02)
        share = (place - places[i - 1]) / (places[i] - places[i - 1])
        return points[i - 1].flop_per_s * (1 - share) + points[i].flop_per_s * share, False


def calibration_folder() -> Path:
    """Where calibrations are kept."""
    from dlcm.shards import cache_root

    return cache_root() / "calibration"


def calibration_path(device: str, device_type: str, threads: int) -> Path:
    """The file of a device; on a CPU also of a number of threads, which set its speed."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return calibration_folder() / f"{slug}{f'-{threads}t' if device_type == 'cpu' else ''}.json"


def save_calibration(calibration: Calibration) -> Path:
    """Write a calibration, atomically, in place of an earlier one of the same device."""
    path = calibration_path(calibration.device, calibration.device_type, calibration.threads)
    write_json(path, asdict(calibration))
    return path


def load_calibration(path: Path) -> tuple[Calibration | None, str | None]:
    """Read a calibration.

    Returns:
        The calibration, or None where there is none of this schema; and what the reader should know about it, if anything.

    Raises:
        UserError: the file is damaged.
    """
    if not path.exists():
        return None, None
    way_out = "run `dlcm flops calibrate` to measure anew, or delete the file"
    try:
        record = read_json(path)
        if record.get("schema") != SCHEMA:
            return None, f"{path} is of another version and was ignored; {way_out}"
        calibration = _parse(record)
    except UserError as error:
        raise UserError(f"{error}; {way_out}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a calibration ({type(error).__name__}: {error}); {way_out}") from None
    return calibration, _outdated(calibration)


def format_calibration(calibration: Calibration) -> str:
    """A calibration as a table: a line a model, and its share of the peak."""
    from flops.hardware import recognise
    from flops.table import align

    known = recognise(calibration.device)
    cells = [["N", "FLOPs/token", "micro-batch", "ms/step", "tokens/s", "GFLOP/s", "MFU"]]
    for point in calibration.points:
        peak = known.peak(point.bf16) if known else calibration.peak_flops
        cells.append(
            [
                f"{point.params_non_embedding:,}",
                f"{point.flops_per_token:.3g}",
                f"{point.micro_batch_tokens:,}",
                f"{1e3 * point.seconds_per_step:.3g}",
                f"{point.flop_per_s / point.flops_per_token:,.0f}",
                f"{point.flop_per_s / 1e9:,.3g}",
                f"{100 * point.flop_per_s / peak:.1f}%",
            ]
        )
    what = "bf16" if calibration.device_type == "cuda" else "fp32"
    peak_told = f"largest matrix product {calibration.peak_flops / 1e9:,.4g} GFLOP/s in {what}"
    lines = [f"{calibration.told}: {peak_told}", align(cells, left=0)]
    if calibration.left_out:
        told = ", ".join(f"{n:,}" for n in calibration.left_out)
        lines.append(
            f"not measured, too large for this device or this time: {told} parameters (--seconds gives more time)"
        )
    return "\n".join(lines)


def _parse(record: dict[str, Any]) -> Calibration:
    points = tuple(Point(**point) for point in record["points"])
    facts: dict[str, Any] = {**record, "points": points, "left_out": tuple(record["left_out"])}
    calibration = Calibration(**facts)
    figures = [calibration.peak_flops, calibration.memory_bytes]
    figures += [x for point in calibration.points for x in (point.flops_per_token, point.flop_per_s)]
    if not calibration.points or not all(math.isfinite(x) and x > 0 for x in figures):
        raise ValueError("its figures are not positive")
    return calibration


def _outdated(calibration: Calibration) -> str | None:
    from importlib import metadata

    measured, here = calibration.versions.get("torch"), metadata.version("torch")
    if measured == here:
        return None
    return f"calibrated with torch {measured}, here is {here}: `dlcm flops calibrate` measures anew"


def cpu_calibration(threads: int) -> tuple[Calibration | None, str | None]:
    """The calibration of this machine's processor, as `load_calibration`."""
    from dlcm.provenance import processor_name

    return load_calibration(calibration_path(processor_name(), "cpu", threads))


def gpu_calibration(accelerator: str) -> tuple[Calibration | None, str | None]:
    """The newest calibration of a GPU of this kind, as `load_calibration`."""
    from flops.hardware import recognise

    found: list[tuple[Calibration, str | None]] = []
    ignored = None
    for path in sorted(calibration_folder().glob("*.json")):
        calibration, note = load_calibration(path)
        if calibration is None:
            ignored = note
        elif calibration.device_type == "cuda" and (known := recognise(calibration.device)):
            found += [(calibration, note)] if known.name == accelerator else []
    return max(found, key=lambda item: item[0].measured_at, default=(None, ignored))
