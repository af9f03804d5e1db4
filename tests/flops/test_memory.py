"""The closed form of memory against autograd's own record of saved tensors, and against the allocator's peak of a real step."""

import gc
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint as recompute_checkpoint

from dlcm import fused_gpu, recompute, validation
from dlcm.boundary import uniform_draws
from dlcm.config import BoundaryConfig, ModelConfig, RunConfig
from dlcm.model import build_model
from dlcm.optim import build_optimizer
from dlcm.train import step_seconds
from flops.calibrate import synthetic_corpus
from flops.memory import VALIDATION_BATCH_TOKENS, largest_micro_batch, memory
from sweeps.shapes import dlcm_shape
from tests import plain_kernels

DENSE = {"kind": "dense", "vocab_size": 90, "d_token": 32, "n_encoder_layers": 2, "d_head": 16, "n_heads_token": 2}
DENSE |= {"d_ff_token": 56}
DLCM = {
    "vocab_size": 90,
    "d_token": 32,
    "d_concept": 48,
    "n_encoder_layers": 1,
    "n_concept_layers": 2,
    "n_decoder_layers": 2,
    "d_head": 16,
    "n_heads_token": 2,
    "n_heads_concept": 3,
    "d_ff_token": 56,
    "d_ff_concept": 96,
}


def boundary(**more):
    return {"boundary": BoundaryConfig(**more)}


SHAPES = {
    "dense": DENSE,
    "dense-gqa": {**DENSE, "n_kv_heads_token": 1, "d_ff_token": 100},
    "dense-tied": {**DENSE, "tie_embeddings": True, "d_token": 64},
    "dlcm": DLCM,
    "dlcm-gqa": {**DLCM, "n_heads_concept": 4, "n_kv_heads_token": 1, "n_kv_heads_concept": 2},
    "dlcm-narrow-concepts": {**DLCM, "d_concept": 16, "n_heads_concept": 1, "n_concept_layers": 3},
    "dlcm-unsmoothed": {**DLCM, "smoothing": "none"},
    "dlcm-first": {**DLCM, "pooling": "first"},
    "dlcm-first-unsmoothed": {**DLCM, "pooling": "first", "smoothing": "none"},
    "dlcm-one-cross": {**DLCM, "cross_attention": "once", "n_decoder_layers": 3},
    "dlcm-straight-through": {**DLCM, **boundary(straight_through=True, compression_ratio=2.0)},
    "dlcm-cosine": {**DLCM, **boundary(detector="cosine", compression_ratio=8.0)},
    "dlcm-fixed": {**DLCM, **boundary(detector="fixed")},
    "dlcm-random": {**DLCM, **boundary(detector="random")},
}


def saved_bytes(
    config: ModelConfig, n_tokens: int, bf16: bool, monkeypatch: pytest.MonkeyPatch | None = None
) -> tuple[int, int]:
    """Bytes of the distinct tensors that autograd keeps of one forward pass with its losses, without the parameters; and M.

    With a patch for it, blocks recompute their activations: what autograd does not see, because blocks are called again with
    it, is then counted as well.
    """
    model = build_model(config).train()
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage
        return x

    if monkeypatch is not None:

        def checkpoint(function, x, *others, **options):
            for tensor in (x for other in others if other is not None for x in vars(other).values()):
                if isinstance(tensor, torch.Tensor):
                    pack(tensor)
            return recompute_checkpoint(function, x, *others, **options)

        monkeypatch.setattr(recompute, "checkpoint", checkpoint)
        recompute.recompute_blocks(model.blocks())
    generator = torch.Generator().manual_seed(0)
    tokens, targets = (torch.randint(0, config.vocab_size, (n_tokens,), generator=generator) for _ in range(2))
    starts = torch.tensor([0, n_tokens // 5, n_tokens // 2, n_tokens])
    draws = uniform_draws(0, 0, torch.arange(n_tokens))
    with warnings.catch_warnings(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        warnings.simplefilter("ignore")  # torch tells that bf16 norms are not fused on a CPU
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            out = model(tokens, cu_seqlens=starts, draws=draws, targets=targets)
        assert out.loss_sum is not None
        loss = out.loss_sum + (0 if config.is_dense else out.boundary_prob.sum())
    assert torch.isfinite(loss)
    return sum(storage.nbytes() for storage in kept.values()), out.n_concepts


@pytest.mark.many
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", SHAPES)
def test_activations_are_what_autograd_saves_to_the_byte(name, bf16):
    config = ModelConfig(**SHAPES[name])
    n_tokens = 160
    saved, n_concepts = saved_bytes(config, n_tokens, bf16)
    found = memory(config, n_tokens, bf16=bf16, gpu=False, n_concepts=n_concepts)
    # Of what cross-entropy holds, the gradient of the unembedding is saved; the rest is alive while it works.
    assert found.activations_total + found.casts + 4 * config.vocab_size * config.d_token == saved


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["dense-gqa", "dlcm", "dlcm-unsmoothed", "dlcm-first", "dlcm-straight-through"])
def test_the_rules_of_a_gpu_give_what_autograd_saves_with_its_functions(name, bf16, monkeypatch):
    # No GPU is asked: the kernels are replaced by plain operations, which give tensors of the same shapes and dtypes.
    monkeypatch.setattr(fused_gpu, "applies", lambda _: True)
    monkeypatch.setattr(fused_gpu, "_kernels", lambda: plain_kernels)
    config = ModelConfig(**SHAPES[name])
    saved, n_concepts = saved_bytes(config, 160, bf16)
    found = memory(config, 160, bf16=bf16, gpu=True, n_concepts=n_concepts)
    assert found.activations_total + found.casts + 4 * config.vocab_size * config.d_token == saved


@pytest.mark.many
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", SHAPES)
def test_with_checkpointing_activations_are_what_autograd_and_the_blocks_arguments_keep_to_the_byte(
    name, bf16, monkeypatch
):
    config = ModelConfig(**SHAPES[name])
    saved, n_concepts = saved_bytes(config, 160, bf16, monkeypatch)
    found = memory(config, 160, bf16=bf16, gpu=False, n_concepts=n_concepts, checkpointing=True)
    assert found.activations_total + found.casts + 4 * config.vocab_size * config.d_token == saved


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_whole_under_fsdp_is_twice_the_largest_block_and_all_outside_of_blocks(name):
    config = ModelConfig(**SHAPES[name])
    model = build_model(config)
    sizes = [sum(p.numel() for p in block.parameters()) for block in model.blocks()]
    outside = sum(p.numel() for p in model.parameters()) - sum(sizes)
    one, four = (memory(config, 64, bf16=True, gpu=True, n_sharing=n) for n in (1, 4))
    assert (one.gathered, four.gathered) == (0, 8 * (outside + 2 * max(sizes)))
    assert four.states == pytest.approx(one.states / 4, abs=16)
    assert (four.casts, four.activations) == (one.casts, one.activations)


@pytest.mark.parametrize("name", ["dense", "dlcm"])
def test_states_are_sixteen_bytes_a_parameter(name):
    config = ModelConfig(**SHAPES[name])
    model = build_model(config)
    n = sum(p.numel() for p in model.parameters())
    optimizer = build_optimizer(model, RunConfig(model=config, train={"tokens": 2048}).optim)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moments = [x for state in optimizer.state.values() for key, x in state.items() if key != "step"]
    found = memory(config, 64, bf16=True, gpu=False)
    assert found.weights == sum(p.nbytes for p in model.parameters()) == 4 * n
    assert found.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    assert found.optimizer == sum(x.nbytes for x in moments)
    assert found.states == 16 * n


def peak_bytes(config: RunConfig) -> int:
    """Most bytes that torch had allocated at once, from before the model was built to the end of its second step.

    Without oneDNN: its working space depends on the processor's instructions and threads, and is not part of the estimate.
    """
    gc.collect()  # what is freed while it is measured must have been allocated then
    with (
        torch.backends.mkldnn.flags(enabled=False),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        steps = step_seconds(config, synthetic_corpus(config))
        next(steps)
        next(steps)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["dense", "dlcm"])
def test_the_total_with_checkpointing_is_close_to_the_allocators_peak(name, precision):
    layers = {"n_encoder_layers": 6} if name == "dense" else {"n_encoder_layers": 3, "n_decoder_layers": 3}
    model = ModelConfig(**{**SHAPES[name], **layers, "d_token": 64, "d_ff_token": 160})
    totals, peaks = [], []
    for checkpointing in (False, True):
        train = {"tokens": 10**7, "batch_tokens": 2048, "micro_batch_tokens": 1024, "precision": precision}
        config = RunConfig(
            model=model, data={"seq_len": 256}, train={**train, "activation_checkpointing": checkpointing}
        )
        found = memory(
            model, 1024, bf16=precision == "bf16", gpu=False, evaluation_tokens=0, checkpointing=checkpointing
        )
        totals.append(found.total)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peaks.append(peak_bytes(config))
    assert peaks[1] < 0.6 * peaks[0]
    assert 0.9 < totals[1] / peaks[1] < 1.1


@pytest.mark.slow
@pytest.mark.parametrize("n_micro", [1, 4])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("name", "vocab_size"), [("dense", 300), ("dense", 3000), ("dlcm", 300), ("dlcm", 3000)])
def test_the_total_is_close_to_the_allocators_peak(name, vocab_size, precision, n_micro):
    model = ModelConfig(**{**SHAPES[name], "vocab_size": vocab_size, "d_token": 64, "d_ff_token": 160})
    train = {"tokens": 10**7, "batch_tokens": 512 * n_micro, "micro_batch_tokens": 512, "precision": precision}
    config = RunConfig(model=model, data={"seq_len": 256}, train=train)
    found = memory(model, 512, bf16=precision == "bf16", gpu=False, evaluation_tokens=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peak = peak_bytes(config)
    # Masks of the attention are not counted. With one micro-batch the gradients are not there yet when the activations are.
    assert found.total / peak > 0.94
    early = found.gradients if n_micro == 1 else 0
    assert found.total - early < (1.02 if n_micro == 1 else 1.01) * peak


def test_the_batch_of_validation_is_that_of_the_code():
    assert validation._VALIDATION_BATCH_TOKENS == VALIDATION_BATCH_TOKENS


def test_the_largest_micro_batch_divides_the_batch_and_a_larger_one_does_not_fit():
    config = ModelConfig(**{**DLCM, "vocab_size": 4096})
    for room in (5e8, 1e9, 4e9):
        most = largest_micro_batch(config, 48 * 256, 256, room, bf16=True, gpu=True)
        assert most is not None
        assert 48 * 256 % most == 0
        assert memory(config, most, bf16=True, gpu=True).total <= room
        larger = next((n for n in range(most + 256, 48 * 256 + 1, 256) if 48 * 256 % n == 0), None)
        assert larger is None or memory(config, larger, bf16=True, gpu=True).total > room


def test_no_micro_batch_fits_where_the_states_alone_do_not():
    config = ModelConfig(**DLCM)
    assert largest_micro_batch(config, 2048, 256, 1e5, bf16=True, gpu=True) is None


def test_activations_grow_in_proportion_to_the_tokens_and_states_do_not():
    config = ModelConfig(**DLCM)
    one, four = (memory(config, n, bf16=True, gpu=True) for n in (1024, 4096))
    assert four.activations_total == pytest.approx(4 * one.activations_total, rel=1e-6)
    assert four.states == one.states


def test_fewer_concepts_take_less_memory():
    totals = []
    for ratio in (2.0, 4.0, 8.0):
        config = ModelConfig(**{**DLCM, **boundary(compression_ratio=ratio)})
        totals.append(memory(config, 4096, bf16=True, gpu=True).activations_total)
    assert totals == sorted(totals, reverse=True)
    assert len(set(totals)) == 3


def test_the_table_of_several_devices_is_that_of_the_closed_form():
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    table = page.split("| parameters without embeddings | one rank |")[1].split("\n\n")[0]
    rows = [[float(cell.strip(" B")) for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert len(rows) == 3
    for size, *told in rows:
        config = ModelConfig(**boundary(compression_ratio=4), vocab_size=128_000, **dlcm_shape(size * 1e9, 0.6))
        options = [(n, checkpointing) for n in (1, 8) for checkpointing in (False, True)]
        found = [
            memory(config, 8192, bf16=True, gpu=True, checkpointing=checkpointing, n_sharing=n).total / 1e9
            for n, checkpointing in options
        ]
        assert told == pytest.approx(found, abs=0.051)


def test_memory_needs_no_torch():
    import subprocess
    import sys

    code = "import sys; from flops.memory import memory; from sweeps.costs import costed; print('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True).stdout == "False\n"
