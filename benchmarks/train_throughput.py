"""Tokens a second in training: our dense model beside Hugging Face's Llama, and the DLCM beside our dense model.

    python benchmarks/train_throughput.py [--quick] [--compile] [--assert]         needs the package `transformers`

Three models of one size take turns on the same windows: `LlamaForCausalLM` (SDPA attention, its own loss), our dense model of the
same layers, widths, heads and vocabulary, and a DLCM of as many parameters at R = 4. The optimizer (fused AdamW), the precision
(bf16 autocast on a GPU, fp32 on a CPU), clipping and compilation are the same. Ours also normalises queries and keys, which Llama
does not. FLOPs are the closed form's, so that the DLCM's tokens a second stand beside the ratio of FLOPs. On a GPU the peak of
a step in torch's allocator stands beside the estimate of `flops.memory`; where a model does not fit, the windows of a step are
halved for all of them. Each row is stored once it is measured.

Limits (`--assert`): dense over Llama at least 1.1; on a GPU at 350M an MFU of 45% dense and 38% DLCM.
"""

import argparse
import dataclasses
import gc
import itertools
from collections.abc import Callable, Mapping
from importlib import metadata
from itertools import count as from_zero
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import device_name, environment, format_table, median_ms, write_result
from benchmarks.step import GPU_RULE, RATIO, Setting, configs
from dlcm.boundary import global_statistics, ratio_loss, uniform_draws
from dlcm.config import ModelConfig, OptimConfig
from dlcm.model import Model, build_model
from dlcm.optim import build_optimizer
from flops import count, parameters
from flops.hardware import recognise
from flops.memory import OPTIMIZER_BYTES, WEIGHT_BYTES, memory

LEAST = 1.1
MFU_LIMITS = {"dense": 0.45, "dlcm": 0.38}


SETTINGS = {
    "cpu": (Setting(1e6, 4096, 8, 512, 25), Setting(5e6, 4096, 8, 512, 25)),
    "cuda": (Setting(3.5e8, 32_768, 24, 2048, 15, rule=GPU_RULE),),
    "quick": (Setting(2e5, 512, 2, 128, 2),),
}


def llama(config: ModelConfig, seq_len: int) -> nn.Module:
    """Hugging Face's model of the same shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_token,
            intermediate_size=config.d_ff_token,
            num_hidden_layers=config.n_encoder_layers,
            num_attention_heads=config.n_heads_token,
            num_key_value_heads=config.n_kv_heads_token,
            head_dim=config.d_head,
            max_position_embeddings=seq_len,
            tie_word_embeddings=False,
            attn_implementation="sdpa",
            use_cache=False,
        )
    )


def stepper(forward: Callable[[], Tensor], optimizer: torch.optim.Optimizer, module: nn.Module) -> Callable[[], None]:
    """One optimizer step on the loss that `forward` gives."""

    def step() -> None:
        forward().backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def our_forward(model: Model, tokens_T: Tensor, setting: Setting, autocast: torch.autocast) -> Callable[[], Tensor]:
    """Loss of our models as training has it: packed, in chunks, with ratio loss and controller for a DLCM."""
    n = tokens_T.numel() - 1
    cu = torch.arange(0, n + 1, setting.seq_len, device=tokens_T.device)
    draws_T, steps = uniform_draws(0, 0, torch.arange(n)).to(tokens_T.device), from_zero()

    def forward() -> Tensor:
        with autocast:
            out = model(tokens_T[:-1], cu_seqlens=cu, draws=draws_T, targets=tokens_T[1:])
        assert out.loss_sum is not None
        loss = out.loss_sum / n
        if out.detection is None or out.detection.score_T is None:
            return loss
        boundary = model.boundary.config
        statistics = global_statistics(out.n_concepts, out.boundary_prob.sum(), n)
        model.boundary.control(statistics.rate, out.detection.score_T.detach(), first_step=next(steps) == 0)
        return loss + boundary.ratio_loss_weight * ratio_loss(statistics, boundary.compression_ratio)

    return forward


def steppers(setting: Setting, device: str, compiled: bool) -> dict[str, tuple[nn.Module, Callable[[], None]]]:
    """The three models, and a step of each."""
    tokens_T = torch.randint(0, setting.vocab_size, (setting.n_windows * setting.seq_len + 1,)).to(device)
    autocast = torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda")
    optim = OptimConfig(lr_token=1e-5, lr_concept=1e-5)
    shapes = configs(setting)
    theirs = llama(shapes["dense"], setting.seq_len).to(device).train()
    rows_BT = tokens_T[:-1].view(setting.n_windows, -1)
    labels_BT = tokens_T[1:].view(setting.n_windows, -1)
    run = torch.compile(theirs) if compiled else theirs

    def their_forward() -> Tensor:
        with autocast:
            return run(input_ids=rows_BT, shift_labels=labels_BT, labels=labels_BT).loss

    fused = torch.optim.AdamW(theirs.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    made: dict[str, tuple[nn.Module, Callable[[], None]]] = {"llama": (theirs, stepper(their_forward, fused, theirs))}
    for name, config in shapes.items():
        model = build_model(config).to(device).train()
        if compiled:
            model.compile_stacks(by_block=device == "cuda")  # as runs do
        step = stepper(our_forward(model, tokens_T, setting, autocast), build_optimizer(model, optim), model)
        made[name] = model, step
    return made


def warm_up(made: Mapping[str, tuple[nn.Module, Callable[[], None]]], device: str) -> dict[str, float]:
    """Take three steps of each model; the peak of the last one in bytes, on a GPU.

    Raises:
        torch.OutOfMemoryError: a model does not fit.
    """
    peaks = {}
    for name, (module, step) in made.items():
        for _ in range(2):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        step()
        peaks[name] = 0.0
        if device == "cuda":
            states = (WEIGHT_BYTES + OPTIMIZER_BYTES) * sum(p.numel() for p in module.parameters())
            peaks[name] = states + torch.cuda.max_memory_allocated() - before
    return peaks


def fitting(setting: Setting, device: str, compiled: bool) -> tuple[Setting, Mapping[str, Any], dict[str, float]]:
    """The setting with as many windows as fit, its models and steps, and their peaks."""
    while True:
        made = steppers(setting, device, compiled)
        try:
            return setting, made, warm_up(made, device)
        except torch.OutOfMemoryError as error:
            if setting.n_windows == 1:
                raise
            print(f"{setting.n_windows} windows do not fit: {str(error).partition('.')[0]}", flush=True)
        setting = dataclasses.replace(setting, n_windows=setting.n_windows // 2)
        del made
        gc.collect()
        torch.cuda.empty_cache()


def measure(setting: Setting, device: str, compiled: bool) -> dict[str, Any]:
    """Tokens a second of the three, and their ratios."""
    setting, made, peaks = fitting(setting, device, compiled)
    shapes = configs(setting)
    times = median_ms({name: made[name][1] for name in peaks}, setting.repeats, device)
    n = setting.n_windows * setting.seq_len
    rate = {name: 1e3 * n / ms for name, ms in times.items()}
    flops = {
        name: count(config, setting.seq_len, RATIO if name == "dlcm" else 1.0).training_per_token
        for name, config in shapes.items()
    }
    known = recognise(device_name(device)) if device == "cuda" else None
    peak = None if known is None else known.peak(True)
    mfu = {} if peak is None else {f"MFU {name}": flops[name] * rate[name] / peak for name in shapes}
    estimates = {
        name: memory(config, n, bf16=True, gpu=True, evaluation_tokens=0).total / 1e9 for name, config in shapes.items()
    }
    gigabytes = {f"peak GB {name}": value / 1e9 for name, value in peaks.items()}
    gigabytes |= {f"estimated GB {name}": value for name, value in estimates.items()}
    theirs = made["llama"][0]
    return {
        "size": parameters(shapes["dense"]).non_embedding,
        "llama size": sum(p.numel() for p in theirs.parameters()) - 2 * setting.vocab_size * shapes["dense"].d_token,
        "windows": setting.n_windows,
        "compiled": compiled,
        **{f"{name} tokens/s": value for name, value in rate.items()},
        "dense over llama": rate["dense"] / rate["llama"],
        "dlcm over dense": rate["dlcm"] / rate["dense"],
        "FLOPs dense over dlcm": flops["dense"] / flops["dlcm"],
        **mfu,
        **(gigabytes if device == "cuda" else {}),
    }


def main() -> None:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny size, to try the script")
    parser.add_argument("--compile", action="store_true", help="compile all three as well")
    parser.add_argument("--assert", dest="must", action="store_true")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings = SETTINGS["quick" if options.quick else device]
    modes = (False, True) if options.compile else (False,)
    name = f"train_throughput_{'quick' if options.quick else device}"
    batch = [{"windows": s.n_windows, "seq_len": s.seq_len, "vocabulary": s.vocab_size} for s in settings]
    models = [{name: config.model_dump(mode="json") for name, config in configs(s).items()} for s in settings]
    where = environment(device)
    where["versions"]["transformers"] = metadata.version("transformers")
    about = {"environment": where, "threads": torch.get_num_threads(), "batch": batch, "models": models}
    rows = []
    for setting, compiled in itertools.product(settings, modes):
        rows.append(measure(setting, device, compiled))
        print(format_table(rows[-1:]), flush=True)
        path = write_result(name, {**about, "rows": rows})
    print(f"-> {path}")
    if options.must:
        slow = [row for row in rows if row["dense over llama"] < LEAST]
        low = [row for row in rows for name, least in MFU_LIMITS.items() if row.get(f"MFU {name}", 1.0) < least]
        if slow or low:
            raise SystemExit(f"error: {len(slow)} below {LEAST}x of Llama, {len(low)} below the MFU wanted")


if __name__ == "__main__":
    main()
