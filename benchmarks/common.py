"""What every timing script shares: where it ran, medians of interleaved repeats, a table, a JSON file."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from dlcm.provenance import describe_environment, processor_name
from dlcm.record import write_json

RESULTS = Path(__file__).parent / "results"
_KERNEL_PACKAGES = ("triton", "flash-attn")


def environment(device: str | torch.device) -> dict[str, Any]:
    """Code version, package versions, device name and threads: what a figure needs to be repeated."""
    device = torch.device(device)
    found = describe_environment(device_name(device), torch.get_num_threads())
    for name in ("slurm", "host", "platform", "processor"):  # of no use to a reader elsewhere
        del found[name]
    found["device_type"] = device.type
    for name in _KERNEL_PACKAGES:
        try:
            found["versions"][name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if device.type == "cuda":
        found["versions"]["cuda"] = torch.version.cuda
    return found


def device_name(device: str | torch.device) -> str:
    """The model name of a GPU, or of the processor."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor_name()


def median_ms(
    functions: Mapping[str, Callable[[], Any]],
    repeats: int = 7,
    device: str | torch.device = "cpu",
    min_ms: float = 20.0,
) -> dict[str, float]:
    """Median time of each function in milliseconds.

    One repeat of every function after another, `repeats` times, so that a slow minute of the machine falls on all alike and
    ratios stay fair. Short functions are called several times a repeat.

    Args:
        functions: what to time, by name; called once before, to warm up.
        repeats: how often.
        device: CUDA devices are timed by events on the stream.
        min_ms: a repeat calls a function until about this much time has passed.
    """
    device = torch.device(device)
    calls = {}
    for name, function in functions.items():
        function()
        once = _elapsed_ms(function, 1, device)
        calls[name] = max(1, min(100, int(min_ms / max(once, 1e-3))))
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            times[name].append(_elapsed_ms(function, calls[name], device))
    return {name: statistics.median(found) for name, found in times.items()}


def _elapsed_ms(function: Callable[[], Any], n_calls: int, device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(n_calls):
            function()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / n_calls
    began = time.perf_counter()
    for _ in range(n_calls):
        function()
    return (time.perf_counter() - began) / n_calls * 1e3


def write_result(name: str, payload: Mapping[str, Any]) -> Path:
    """Write `benchmarks/results/<name>.json` and return its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    write_json(path, dict(payload))
    return path


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as a Markdown table with aligned columns; numbers with three significant digits."""
    if not rows:
        return ""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([_cell(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    lines = ["| " + " | ".join(text.rjust(width) for text, width in zip(line, widths)) + " |" for line in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
