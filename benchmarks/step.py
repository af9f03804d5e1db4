"""Training steps of a DLCM beside those of a dense model: `python benchmarks/step.py [--quick] [--compile] [--assert]`.

Both models have the same number of parameters without embeddings and see the same packed documents. A step is forward, loss,
ratio loss, backward, clipping, AdamW and the ratio controller. What counts is the overhead

    (time of a DLCM step / time of a dense step) / (FLOPs of a DLCM step / FLOPs of a dense step)

with FLOPs at the realised R and the real documents: 1 if the DLCM runs its operations as fast as the dense model does. Steps
of the models take turns, and medians are compared. MFU is FLOPs over time over a peak: of the largest matrix product measured
here, and of the datasheet where `flops.hardware` knows the device.

Limit (`--assert`): 1.15 at 5M parameters on a CPU in fp32; 1.2 at 350M on a GPU in bf16, for the faster of eager and compiled.
"""

import argparse
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import device_name, environment, format_table, median_ms, write_result
from dlcm.boundary import global_statistics, ratio_loss, uniform_draws
from dlcm.config import BoundaryConfig, ModelConfig, OptimConfig
from dlcm.model import Model, Output, build_model
from dlcm.optim import build_optimizer
from flops import count, parameters
from flops.hardware import recognise
from sweeps.shapes import DEFAULT_RULE, ShapeRule, dense_shape, dlcm_shape

RATIO, SHARE = 4.0, 0.6
# What suits the matrix units of a large GPU: heads of 128, all widths multiples of it.
GPU_RULE = ShapeRule(d_head=128, multiple_of=128)


@dataclass(frozen=True)
class Setting:
    """What is run on a device: parameters without embeddings, vocabulary, windows of a batch and their length, shapes."""

    size: float
    vocab_size: int
    n_windows: int
    seq_len: int
    repeats: int
    limit: float = math.inf
    rule: ShapeRule = DEFAULT_RULE


SETTINGS = {
    "cpu": Setting(5e6, 4096, 8, 512, 9, 1.15),
    "cuda": Setting(3.5e8, 32_768, 16, 2048, 15, 1.2, GPU_RULE),
    "quick": Setting(3e5, 512, 2, 128, 2, 1.15),
}


@dataclass
class Stepper:
    """A model in training; calling it takes one step. `n_concepts_S` are those of each document at each step."""

    model: Model
    tokens_T: Tensor
    targets_T: Tensor
    cu_seqlens_S1: Tensor
    autocast: torch.autocast
    n_concepts_S: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        # The rate is small, because the weights are to stay what they are, not to learn this batch.
        self.optimizer = build_optimizer(self.model, OptimConfig(lr_token=1e-5, lr_concept=1e-5))
        self.draws_T = uniform_draws(0, 0, torch.arange(self.tokens_T.numel())).to(self.tokens_T.device)

    def __call__(self) -> None:
        """One training step."""
        with self.autocast:
            out = self.model(self.tokens_T, cu_seqlens=self.cu_seqlens_S1, draws=self.draws_T, targets=self.targets_T)
        assert out.loss_sum is not None
        loss = out.loss_sum / self.tokens_T.numel()
        if out.segments is not None and out.detection is not None and out.detection.score_T is not None:
            loss = loss + self._ratio_term(out)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _ratio_term(self, out: Output) -> Tensor:
        config, first = self.model.boundary.config, not self.n_concepts_S
        assert out.segments is not None
        assert out.detection is not None
        assert out.detection.score_T is not None
        statistics = global_statistics(out.n_concepts, out.boundary_prob.sum(), out.boundaries.numel())
        self.model.boundary.control(statistics.rate, out.detection.score_T.detach(), first_step=first)
        # Padding of a compiled model is a last sequence that is no document.
        self.n_concepts_S.append(out.segments.concepts.lengths_S[: self.cu_seqlens_S1.numel() - 1])
        return config.ratio_loss_weight * ratio_loss(statistics, config.compression_ratio)

    def flops(self, since: int) -> float:
        """FLOPs of a step: of the documents as they are, at the mean number of concepts of the steps from `since` on."""
        documents = self.cu_seqlens_S1.diff().tolist()
        if self.model.config.is_dense:
            return count(self.model.config, documents=documents).training
        return count(self.model.config, documents=documents, concepts=self._mean_concepts(since)).training

    def tokens_per_concept(self, since: int) -> float:
        """Realised R over the steps from `since` on; 1 for a dense model."""
        if self.model.config.is_dense:
            return 1.0
        return self.tokens_T.numel() / sum(self._mean_concepts(since))

    def _mean_concepts(self, since: int) -> list[float]:
        return torch.stack(self.n_concepts_S[since:]).double().mean(0).tolist()


def packed_windows(setting: Setting, seed: int = 0) -> Tensor:
    """Starts of packed documents: windows of a stream of documents whose lengths are log-normal, as those of source files are."""
    generator = torch.Generator().manual_seed(seed)
    total = setting.n_windows * setting.seq_len
    lengths = torch.empty(total).log_normal_(6.5, 1.2, generator=generator).long().clamp(min=8)
    documents = lengths.cumsum(0)
    windows = torch.arange(0, total + 1, setting.seq_len)
    return torch.cat([documents[documents < total], windows]).unique()


def configs(setting: Setting) -> dict[str, ModelConfig]:
    """The two models."""
    boundary = BoundaryConfig(compression_ratio=RATIO)
    dlcm: dict[str, Any] = {"boundary": boundary, **dlcm_shape(setting.size, SHARE, setting.rule)}
    dense: dict[str, Any] = {"kind": "dense", **dense_shape(setting.size, setting.rule)}
    return {name: ModelConfig(vocab_size=setting.vocab_size, **x) for name, x in (("dense", dense), ("dlcm", dlcm))}


def steppers(setting: Setting, device: str, compile_too: bool) -> dict[str, Stepper]:
    """Each model in training, eager and, if asked for, compiled."""
    generator = torch.Generator().manual_seed(1)
    stream = torch.randint(0, setting.vocab_size, (setting.n_windows * setting.seq_len + 1,), generator=generator)
    tokens_T, targets_T, cu = (x.to(device) for x in (stream[:-1], stream[1:], packed_windows(setting)))
    made = {}
    for mode in ("eager", "compiled")[: 1 + compile_too]:
        for name, config in configs(setting).items():
            model = build_model(config).to(device).train()
            if mode == "compiled":
                model.compile_stacks(by_block=device == "cuda")  # as runs do
            autocast = torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda")
            made[f"{name}, {mode}"] = Stepper(model, tokens_T, targets_T, cu, autocast)
    return made


def peak_flops(device: str) -> float:
    """FLOP/s of the best of several large square matrix products, in the dtype of training."""
    n, dtype = (8192, torch.bfloat16) if device == "cuda" else (2048, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2.0 * n**3 / (min(_matmul_s(a, b, device) for _ in range(8)))


def _matmul_s(a: Tensor, b: Tensor, device: str) -> float:
    wait: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    torch.matmul(a, b)
    wait()
    return time.perf_counter() - began


def measure(made: Mapping[str, Stepper], setting: Setting, device: str, peak: float) -> list[dict[str, Any]]:
    """Warm up, time, count: a row each model and mode."""
    for step in made.values():
        for _ in range(3):  # compilation, and the controller's first steps
            step()
    warm = {name: len(step.n_concepts_S) for name, step in made.items()}
    times = median_ms(made, setting.repeats, device)
    known = recognise(device_name(device))
    datasheet = known.bf16_flops if known else None
    rows = []
    for name, step in made.items():
        kind, mode = name.split(", ")
        rate = step.flops(warm[name]) / times[name] * 1e3
        rows.append(
            {
                "model": kind,
                "mode": mode,
                "parameters": parameters(step.model.config).non_embedding,
                "tokens_per_concept": step.tokens_per_concept(warm[name]),
                "gflop_per_step": step.flops(warm[name]) / 1e9,
                "ms_per_step": times[name],
                "tokens_per_s": step.tokens_T.numel() / times[name] * 1e3,
                "mfu_measured_peak": rate / peak,
                "mfu_datasheet": rate / datasheet if datasheet else None,
            }
        )
    return rows


def overheads(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Time ratio, FLOP ratio and their quotient of each mode."""
    found = []
    for mode in dict.fromkeys(row["mode"] for row in rows):
        dense, dlcm = (next(r for r in rows if r["mode"] == mode and r["model"] == m) for m in ("dense", "dlcm"))
        ratios = {key: dlcm[key] / dense[key] for key in ("ms_per_step", "gflop_per_step")}
        found.append(
            {
                "mode": mode,
                "time_ratio": ratios["ms_per_step"],
                "flop_ratio": ratios["gflop_per_step"],
                "overhead": ratios["ms_per_step"] / ratios["gflop_per_step"],
                "dense_ms": dense["ms_per_step"],
            }
        )
    return found


def main() -> None:
    """Measure, print, record, then assert."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smallest form, for whether it runs; writes nothing")
    parser.add_argument("--compile", action="store_true", help="compiled stacks too")
    parser.add_argument("--assert", action="store_true", dest="check", help="fail where the limit is missed")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    setting = SETTINGS["quick" if args.quick else device]
    made = steppers(setting, device, args.compile)
    peak = peak_flops(device)
    rows = measure(made, setting, device, peak)
    ratios = overheads(rows)
    print(format_table(rows), format_table(ratios), sep="\n\n")
    if not args.quick:
        payload = {
            "environment": environment(device),
            "precision": "bf16 autocast" if device == "cuda" else "fp32",
            "batch": {"windows": setting.n_windows, "seq_len": setting.seq_len},
            "documents": packed_windows(setting).diff().tolist(),
            "peak_flops_measured": peak,
            "models": {name: config.model_dump(mode="json") for name, config in configs(setting).items()},
            "limit": setting.limit,
            "rows": rows,
            "overheads": ratios,
        }
        print(f"written to {write_result(f'step_{device}', payload)}")
    if args.check:
        # In the mode that serves the dense model best: the strictest baseline.
        decisive = min(ratios, key=lambda ratio: ratio["dense_ms"])
        assert decisive["overhead"] <= setting.limit, f"overhead {decisive['overhead']:.2f} is above {setting.limit}"


if __name__ == "__main__":
    main()
