"""What a run takes of a device: seconds, memory, money and energy, from its FLOPs.

    seconds = FLOPs that the run computes / (MFU x peak of one device x devices)

MFU, model FLOPs utilisation, is the share of the peak that is reached. Where it is not given it comes from a calibration of the
device (`flops.calibration`), else it is `DEFAULT_MFU`, which holds for large models on a GPU only.

Peaks are those of the vendor's datasheets for dense matrices: the figures printed first there are often those "with sparsity",
twice as large. fp32 peaks are those of the ordinary cores, because PyTorch does not use TF32 unless asked to.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dlcm.config import RunConfig
from dlcm.errors import UserError, nearest
from dlcm.parallel import choose_mode
from flops.calibration import Calibration
from flops.count import FlopCount, parameters
from flops.memory import Memory, largest_micro_batch, memory

# Reported for large models: 38-43 % for 405B parameters on up to 16,384 H100 (Llama 3, arXiv 2407.21783, table 4), 46 % for PaLM
# 540B (arXiv 2204.02311). This code runs eagerly by default, so the estimate stays below them.
DEFAULT_MFU = 0.35
# Smaller models reach a fraction of it: their matrix products are too small for the device.
DEFAULT_MFU_FROM_PARAMETERS = 1e8
_CONTROLLED = ("learned", "cosine", "random")
# What activation checkpointing computes twice.
_BLOCKS = ("encoder", "backbone", "cross_attention", "decoder")


@dataclass(frozen=True)
class Accelerator:
    """One device.

    Attributes:
        name: as sweep files name it; `cpu` for a calibrated processor.
        bf16_flops: dense peak in bf16, FLOP/s.
        fp32_flops: peak in fp32 without TF32, FLOP/s.
        memory_bytes: as printed, in decimal units. Cards hold some 6 % more, which is left to the CUDA context and to the gaps
            of the allocator.
        bandwidth: of the memory, bytes/s; None where unknown.
        power_w: of the board at most, watts; None where unknown.
        source: where the figures are from.
    """

    name: str
    bf16_flops: float
    fp32_flops: float
    memory_bytes: float
    bandwidth: float | None
    power_w: float | None
    source: str

    @property
    def is_gpu(self) -> bool:
        """Whether it runs the GPU's code paths."""
        return self.name != "cpu"

    @property
    def device_type(self) -> str:
        """As torch names it."""
        return "cuda" if self.is_gpu else "cpu"

    def peak(self, bf16: bool) -> float:
        """Peak FLOP/s in the precision of a run."""
        return self.bf16_flops if bf16 else self.fp32_flops


_A100 = (
    "NVIDIA A100 datasheet, 2021: www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/"
    "nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf"
)
_H100 = "NVIDIA H100 datasheet, 2023: resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet"
_H200 = "NVIDIA H200 datasheet, 2024: nvdam.widen.net/s/nb5zzzsjdf/hpc-datasheet-sc23-h200-datasheet-3002446"
_B200 = "NVIDIA HGX B200 specifications, 2025, an eighth of the eight-GPU board: www.nvidia.com/en-us/data-center/hgx"
ACCELERATORS: Mapping[str, Accelerator] = {
    a.name: a
    for a in (
        Accelerator("A100", 312e12, 19.5e12, 80e9, 2.039e12, 400, _A100),
        Accelerator("A100-40GB", 312e12, 19.5e12, 40e9, 1.555e12, 400, _A100),
        Accelerator("H100", 989.4e12, 66.9e12, 80e9, 3.35e12, 700, _H100),
        Accelerator("H100-PCIe", 756e12, 51e12, 80e9, 2.0e12, 350, _H100),
        Accelerator("H200", 989.4e12, 66.9e12, 141e9, 4.8e12, 700, _H200),
        Accelerator("B200", 2250e12, 75e12, 180e9, 8.0e12, 1000, _B200),
    )
}
# Device names as the driver tells them. NVL boards and the superchips have other clocks: they are not known.
_DEVICE_NAMES = (
    (r"\bA100\b.*\b40GB", "A100-40GB"),
    (r"\bA100\b", "A100"),
    (r"\bH100\b.*PCIe", "H100-PCIe"),
    (r"\bH100\b(?!.*NVL)", "H100"),
    (r"\bH200\b(?!.*NVL)", "H200"),
    (r"\bB200\b", "B200"),
)


def canonical_accelerator(name: str) -> str:
    """The name of an accelerator as it is written here, from any case; `cpu` is one.

    Raises:
        ValueError: unknown; the message names the nearest.
    """
    known = {key.lower(): key for key in (*ACCELERATORS, "cpu")}
    if name.lower() not in known:
        raise ValueError(f"unknown accelerator {name!r}{nearest(name.upper(), known.values())}")
    return known[name.lower()]


def accelerator(name: str) -> Accelerator:
    """The accelerator of this name, in any case.

    Raises:
        UserError: unknown; or `cpu`, whose figures come from a calibration.
    """
    try:
        name = canonical_accelerator(name)
    except ValueError as error:
        raise UserError(str(error)) from None
    if name == "cpu":
        raise UserError("the accelerator cpu has no figures before `dlcm flops calibrate` has measured them")
    return ACCELERATORS[name]


def recognise(device_name: str) -> Accelerator | None:
    """The accelerator behind a driver's device name such as `NVIDIA H100 80GB HBM3`; None where its figures are not known."""
    name = next((name for pattern, name in _DEVICE_NAMES if re.search(pattern, device_name, re.IGNORECASE)), None)
    return ACCELERATORS[name] if name else None


def calibrated_cpu(calibration: Calibration) -> Accelerator:
    """A processor as it was measured; one peak for both precisions, that of fp32."""
    peak = calibration.peak_flops
    return Accelerator("cpu", peak, peak, calibration.memory_bytes, None, None, f"measured: {calibration.told}")


@dataclass(frozen=True)
class Efficiency:
    """Share of the peak that training reaches, where it is from, and whether it lies outside of what was measured."""

    mfu: float
    source: str
    outside: bool = False


@dataclass(frozen=True)
class Hardware:
    """What runs are estimated for.

    Attributes:
        accelerator: each device.
        n_devices: devices of one run.
        mfu: share of the peak, (0, 1]; from the calibration, else `DEFAULT_MFU`, where None.
        price_per_hour: of one device, in any currency; None where unknown.
        calibration: of this device; None where there is none.
        pue: power usage effectiveness of the data centre, total over device power; 1 counts the boards alone.
    """

    accelerator: Accelerator
    n_devices: int = 1
    mfu: float | None = None
    price_per_hour: float | None = None
    calibration: Calibration | None = None
    pue: float = 1.0

    def __post_init__(self) -> None:
        checks = (
            ("gpus", self.n_devices, self.n_devices >= 1, "at least 1"),
            ("mfu", self.mfu, self.mfu is None or 0 < self.mfu <= 1, "a share above 0, at most 1"),
            ("price_per_hour", self.price_per_hour, (self.price_per_hour or 0) >= 0, "0 or more"),
            ("pue", self.pue, self.pue >= 1, "at least 1"),
        )
        for name, value, holds, wanted in checks:
            if not holds:
                raise UserError(f"{name} = {value:g} is not {wanted}")

    def efficiency(self, flops_per_token: float, *, bf16: bool) -> Efficiency:
        """MFU of a model with this many training FLOPs per token.

        Raises:
            UserError: a CPU that was not calibrated in this precision.
        """
        if self.mfu is not None:
            return Efficiency(self.mfu, "given")
        measured = self.calibration.rate(flops_per_token, bf16=bf16) if self.calibration else None
        if measured is not None and self.calibration is not None:
            rate, outside = measured
            return Efficiency(rate / self.accelerator.peak(bf16), f"calibrated: {self.calibration.told}", outside)
        if not self.accelerator.is_gpu:
            precision = "bf16" if bf16 else "fp32"
            raise UserError(
                f"this CPU was not calibrated in {precision}; run `dlcm flops calibrate` with such a config"
            )
        return Efficiency(DEFAULT_MFU, "default for large models")


@dataclass(frozen=True)
class Estimate:
    """What one run takes.

    Attributes:
        hours: wall hours of the training steps and of validation at the end; not of start, checkpoints and other evaluation.
        device_hours: hours x devices.
        tokens_per_s: in training.
        memory: bytes on each device.
        fits: whether that is within the device's memory.
        micro_batch_tokens: tokens of one forward pass.
        largest_micro_batch: the most that fit, where those do not; None where not one window does, or where they fit.
        price: device_hours x price per hour; None without a price.
        energy_kwh: device_hours x board power x PUE; the most it can be, None where the power is not known.
        mfu: share of the peak that was assumed.
        mfu_source: where it is from.
        mfu_outside: whether the model is larger or smaller than any that was measured.
    """

    hours: float
    device_hours: float
    tokens_per_s: float
    memory: Memory
    fits: bool
    micro_batch_tokens: int
    largest_micro_batch: int | None
    price: float | None
    energy_kwh: float | None
    mfu: float
    mfu_source: str
    mfu_outside: bool = False


def computed_flops(config: RunConfig, flops: FlopCount) -> tuple[float, float]:
    """FLOPs that a run computes: in training, and in validation at its end.

    Training is 3 x forward; once more the blocks (a third on top, at most) where they recompute their activations; and once more
    the encoder and the boundaries where several micro-batches share a ratio loss, whose statistics are those of the whole batch
    (`dlcm.train`). Validation is one forward pass over its tokens, and two passes of
    encoder and boundaries where a threshold is calibrated.

    Args:
        config: the run.
        flops: count of one of its sequences.
    """
    detect = (flops.components["encoder"] + flops.components["boundary"]) / flops.n_tokens
    boundary, train, seq_len = config.model.boundary, config.train, config.data.seq_len
    split = train.micro_batch_tokens is not None and train.micro_batch_tokens < train.batch_tokens
    has_loss = boundary is not None and boundary.detector == "learned" and boundary.ratio_loss_weight > 0
    controlled = boundary is not None and boundary.control == "bias" and boundary.detector in _CONTROLLED
    per_token = flops.training_per_token + (detect if split and has_loss else 0.0)
    if train.activation_checkpointing:
        per_token += sum(flops.components[name] for name in _BLOCKS) / flops.n_tokens
    validation_tokens = max(1, config.data.validation_tokens // seq_len) * seq_len
    validation = validation_tokens * (flops.forward_per_token + (2 * detect if controlled else 0.0))
    return per_token * config.tokens, validation


def run_memory(config: RunConfig, device_type: str, n_ranks: int = 1, memory_bytes: float | None = None) -> Memory:
    """Bytes that a run takes on each of its devices.

    Args:
        config: the run.
        device_type: `cuda` or `cpu`.
        n_ranks: its processes; each takes its share of a batch, and of the model where they share that (`train.parallel`).
        memory_bytes: of one device; `train.parallel: auto` goes by it. None where not known.
    """
    options = _memory_options(config, device_type, n_ranks, memory_bytes)
    micro = min(config.train.micro_batch_tokens or config.train.batch_tokens, options.pop("most_tokens"))
    return memory(config.model, micro, **options)


def _memory_options(config: RunConfig, device_type: str, n_ranks: int, memory_bytes: float | None) -> dict[str, Any]:
    mode = choose_mode(config.train.parallel, n_ranks, parameters(config.model).total, memory_bytes)
    seq_len = config.data.seq_len
    return {
        "bf16": config.train.is_bf16(device_type),
        "gpu": device_type == "cuda",
        "checkpointing": config.train.activation_checkpointing,
        "n_sharing": n_ranks if mode == "fsdp" else 1,
        "most_tokens": -(-config.train.batch_tokens // (seq_len * n_ranks)) * seq_len,
    }


def estimate(config: RunConfig, flops: FlopCount, hardware: Hardware, *, needed: Memory | None = None) -> Estimate:
    """What a run takes on this hardware.

    Several devices are taken to share a batch without loss: hours fall as 1 / devices. Each takes its share of the batch, and has
    the whole model, or its share of it, as `train.parallel` says.

    Args:
        config: the run.
        flops: count of one of its sequences at the R that is expected.
        hardware: where.
        needed: its memory where it is known already; from `run_memory` by default.

    Raises:
        UserError: a CPU that was not calibrated for this precision.
    """
    device, train = hardware.accelerator, config.train
    bf16 = train.is_bf16(device.device_type)
    efficiency = hardware.efficiency(flops.training_per_token, bf16=bf16)
    training, validation = computed_flops(config, flops)
    rate = efficiency.mfu * device.peak(bf16) * hardware.n_devices
    hours = (training + validation) / rate / 3600
    device_hours = hours * hardware.n_devices
    needed = needed or run_memory(config, device.device_type, hardware.n_devices, _card_memory(device))
    fits = needed.total <= device.memory_bytes
    return Estimate(
        hours=hours,
        device_hours=device_hours,
        tokens_per_s=rate * config.tokens / training,
        memory=needed,
        fits=fits,
        micro_batch_tokens=train.micro_batch_tokens or train.batch_tokens,
        largest_micro_batch=None if fits else fitting_micro_batch(config, device, hardware.n_devices),
        price=None if hardware.price_per_hour is None else device_hours * hardware.price_per_hour,
        energy_kwh=None if device.power_w is None else device_hours * device.power_w * hardware.pue / 1000,
        mfu=efficiency.mfu,
        mfu_source=efficiency.source,
        mfu_outside=efficiency.outside,
    )


def fitting_micro_batch(config: RunConfig, device: Accelerator, n_ranks: int = 1) -> int | None:
    """The largest micro-batch of a run that fits its devices, in tokens; None where not one window fits."""
    options = _memory_options(config, device.device_type, n_ranks, _card_memory(device))
    return largest_micro_batch(
        config.model, config.train.batch_tokens, config.data.seq_len, device.memory_bytes, **options
    )


def _card_memory(device: Accelerator) -> float | None:
    """What `train.parallel: auto` goes by: the memory of a GPU; the ranks of a CPU share one."""
    return device.memory_bytes if device.is_gpu else None
