"""How well a calibration predicts: `python benchmarks/calibration.py [--quick] [--seconds 60]`.

Calibrates this device with three sizes of DLCM, as `dlcm flops calibrate` does without a file, then trains models of other sizes,
shares, ratios and kinds on real text with `dlcm.train`, and compares. `steps` is predicted over measured time of a step, the
median of the logged ones; `run` is predicted over measured time of the whole run with its validation, from the first step on.
Nothing is asserted: on a machine that others use, half of a ratio is the machine.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import environment, format_table, write_result
from dlcm.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from dlcm.record import read_metrics
from dlcm.shards import open_corpus
from dlcm.train import Progress, train
from flops import count, parameters
from flops.calibrate import calibrate
from flops.calibration import Calibration, format_calibration
from flops.hardware import Hardware, calibrated_cpu, estimate, recognise
from sweeps.costs import calibration_runs
from sweeps.shapes import dense_shape, dlcm_shape

# Kind, N, P, R: none of them is measured by the calibration.
UNSEEN: tuple[tuple[str, float, float, float], ...] = (
    ("dlcm", 6e5, 0.3, 8.0),
    ("dlcm", 2.5e6, 0.7, 2.0),
    ("dense", 1e6, 0.0, 1.0),
)
N_STEPS = 24


def unseen(kind: str, size: float, share: float, ratio: float, like: RunConfig, n_steps: int) -> RunConfig:
    """A run of that model on the standard library's text, in the batches of `like`."""
    model: dict[str, Any] = {"kind": kind, "vocab_size": like.model.vocab_size}
    if kind == "dense":
        model |= dense_shape(size)
    else:
        model |= {**dlcm_shape(size, share), "boundary": {"compression_ratio": ratio}}
    batch = like.train.batch_tokens
    train_config: dict[str, Any] = {
        "tokens": n_steps * batch,
        "batch_tokens": batch,
        "log_every": 1,
        "checkpoint_every": n_steps,
    }
    data: dict[str, Any] = {
        "tokenizer": f"bpe-{like.model.vocab_size}",
        "seq_len": like.data.seq_len,
        "validation_tokens": 16_384,
    }
    return RunConfig(model=ModelConfig(**model), data=DataConfig(**data), train=TrainConfig(**train_config))


def compare(config: RunConfig, hardware: Hardware, folder: Path) -> dict[str, Any]:
    """Predict a run, train it, and put both side by side."""
    predicted = estimate(config, count(config.model, config.data.seq_len), hardware)
    first: list[float] = []

    def on_step(_: Progress) -> None:
        if not first:
            first.append(time.perf_counter())

    result = train(config, folder, on_step=on_step)
    # The first step warms up, and the clock of the run starts behind it: n - 1 steps and the validation are compared.
    seconds = time.perf_counter() - first[0]
    logged = [row["tokens_per_s"] for row in read_metrics(folder / "metrics.jsonl")][1:]
    batch = config.train.batch_tokens
    step_s = batch / statistics.median(logged)
    return {
        "model": config.model.kind,
        "parameters": parameters(config.model).non_embedding,
        "concept_share": parameters(config.model).concept_share,
        "tokens_per_concept": result.tokens_per_concept_train,
        "mfu_predicted": predicted.mfu,
        "ms_per_step_predicted": 1e3 * batch / predicted.tokens_per_s,
        "ms_per_step": 1e3 * step_s,
        "steps_predicted_over_measured": batch / predicted.tokens_per_s / step_s,
        "run_predicted_over_measured": (3600 * predicted.hours - batch / predicted.tokens_per_s) / seconds,
    }


def hardware_of(measured: Calibration) -> Hardware:
    """The device as it was calibrated."""
    device = recognise(measured.device) if measured.device_type == "cuda" else calibrated_cpu(measured)
    if device is None:
        raise SystemExit(f"the peak of {measured.device} is not known; add it to flops/hardware.py")
    return Hardware(device, calibration=measured)


def main() -> None:
    """Calibrate, train, compare, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smallest form, for whether it runs; writes nothing")
    parser.add_argument("--seconds", type=float, default=60.0, help="of the calibration")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    configs, _ = calibration_runs(None, gpu=device == "cuda")
    n_steps = 3 if args.quick else N_STEPS
    runs = [unseen(*point, like=configs[0], n_steps=n_steps) for point in UNSEEN[: 1 if args.quick else None]]
    open_corpus(runs[0].data)
    measured = calibrate(configs[:1] if args.quick else configs, seconds=3.0 if args.quick else args.seconds)
    print(format_calibration(measured), end="\n\n")
    with tempfile.TemporaryDirectory() as folder:
        rows = [compare(run, hardware_of(measured), Path(folder) / run.run_id) for run in runs]
    print(format_table(rows))
    if not args.quick:
        payload = {
            "environment": environment(device),
            "peak_flops_measured": measured.peak_flops,
            "calibration": [vars(point) for point in measured.points],
            "batch": {"tokens": runs[0].train.batch_tokens, "seq_len": runs[0].data.seq_len, "steps": n_steps},
            "rows": rows,
        }
        print(f"written to {write_result(f'calibration_{device}', payload)}")


if __name__ == "__main__":
    main()
