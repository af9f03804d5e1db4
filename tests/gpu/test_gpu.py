"""What only a GPU can show: its kernels in the model and in training, against float64 on the CPU.

`make gpu` runs these. Without a GPU they are skipped: the same functions are tested on the CPU elsewhere.
"""

import itertools
from dataclasses import replace
from itertools import islice

import pytest
import torch

from dlcm.attention import self_attention
from dlcm.backends import reference, varlen
from dlcm.boundary import uniform_draws
from dlcm.concepts import Packing
from dlcm.config import BoundaryConfig, ModelConfig, RunConfig
from dlcm.model import build_model
from dlcm.train import step_seconds, train
from flops.calibrate import synthetic_corpus
from flops.hardware import run_memory

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
LENGTHS = [70, 0, 1, 300, 129]


def shape(kind="dlcm", **over):
    base = {"kind": kind, "vocab_size": 512, "d_token": 128, "d_head": 64, "n_encoder_layers": 2, "d_ff_token": 320}
    base["n_heads_token"] = over.get("d_token", 128) // 64
    if kind == "dlcm":
        base |= {
            "d_concept": 256,
            "n_heads_concept": 4,
            "n_concept_layers": 2,
            "n_decoder_layers": 2,
            "d_ff_concept": 640,
        }
        base |= {"boundary": BoundaryConfig(compression_ratio=4.0)}
    return ModelConfig(**base | over)


def grown(config, seed=0):
    """A model whose unembedding is not zero, so that every parameter has a gradient."""
    model = build_model(config, seed=seed)
    if not config.tie_embeddings:
        torch.nn.init.normal_(model.unembedding.weight, std=0.05, generator=torch.Generator().manual_seed(1))
    return model.train()


def batch(device, lengths=(200, 57, 255), vocab=512):
    n = sum(lengths)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, vocab, (n + 1,), generator=generator)
    cu = torch.tensor([0, *itertools.accumulate(lengths)])
    every = torch.zeros(n, dtype=torch.bool)
    every[::3] = True
    every[cu[:-1]] = True
    return [x.to(device) for x in (tokens[:-1], tokens[1:], cu, every)]


def loss_and_gradients(model, device, boundaries=True, dtype=torch.float32, bf16=False):
    model = model.to(device, dtype)
    tokens, targets, cu, every = batch(device)
    draws = uniform_draws(0, 0, torch.arange(tokens.numel())).to(device)
    with torch.autocast(device, dtype=torch.bfloat16, enabled=bf16):
        options = {"boundaries": every} if boundaries else {"draws": draws}
        out = model(tokens, cu_seqlens=cu, targets=targets, **options)
    out.loss_sum.backward()
    gradients = {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return out.loss_sum.item() / tokens.numel(), gradients


def errors(found, right):
    return {name: ((found[name] - right[name]).norm() / (right[name].norm() + 1e-9)).item() for name in right}


@pytest.mark.parametrize(("n_heads", "n_kv"), [(4, 4), (4, 2)])
@pytest.mark.parametrize("width", [64, 128])
def test_self_attention_by_flash_errs_at_most_twice_as_much_as_the_eager_one(width, n_heads, n_kv):
    packing = Packing.from_lengths(torch.tensor(LENGTHS, device="cuda"))
    n, generator = sum(LENGTHS), torch.Generator().manual_seed(0)
    sizes = (n_heads, n_kv, n_kv, n_heads)
    q, k, v, d_out = (torch.randn(n, h, width, generator=generator).cuda().bfloat16() for h in sizes)
    results = []
    for dtype, attend in (
        (torch.float64, reference.self_attention),
        (torch.bfloat16, reference.self_attention),
        (torch.bfloat16, lambda q, k, v, packing: self_attention(q, k, v, packing, "auto")),
    ):
        qkv = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = attend(qkv[0], qkv[1], qkv[2], packing)
        results.append([out.detach(), *torch.autograd.grad(out, qkv, d_out.to(dtype))])
    out, lse = varlen.forward(q, k, v, packing)
    results.append([out, *varlen.backward(d_out, q, k, v, out, lse, packing)])
    exact, eager, *kernels = results
    for kernel in kernels:
        for right, theirs, ours in zip(exact, eager, kernel):
            assert (ours.double() - right).norm() <= 2 * (theirs.double() - right).norm() + 1e-3


@pytest.mark.parametrize("backend", ["auto", "sdpa", "flex", "replicated"])
@pytest.mark.parametrize("bf16", [False, True])
def test_loss_and_gradients_are_those_of_float64_on_the_cpu_with_every_backend(backend, bf16):
    if backend == "flex" and not bf16:
        pytest.skip("FlexAttention is run in bf16")
    config = shape(attention_backend=backend)
    loss, right = loss_and_gradients(grown(shape()), "cpu", dtype=torch.float64)
    found, gradients = loss_and_gradients(grown(config), "cuda", bf16=bf16)
    assert found == pytest.approx(loss, rel=2e-3 if bf16 else 2e-5)
    assert gradients.keys() == right.keys()
    wrong = {name: e for name, e in errors(gradients, right).items() if e > (0.06 if bf16 else 2e-3)}
    assert not wrong


@pytest.mark.parametrize("kind", ["dense", "dlcm"])
def test_compiled_and_eager_models_have_the_same_loss_and_gradients(kind):
    torch._dynamo.reset()
    eager, compiled = grown(shape(kind)).cuda(), grown(shape(kind)).cuda()
    compiled.compile_stacks(by_block=True)  # as runs do
    loss, right = loss_and_gradients(eager, "cuda", bf16=True)
    found, gradients = loss_and_gradients(compiled, "cuda", bf16=True)
    assert found == pytest.approx(loss, rel=2e-3)
    names = [name for name in right if "boundary" not in name]
    wrong = {name: e for name, e in errors(gradients, right).items() if name in names and e > 0.06}
    assert not wrong


def test_other_boundaries_and_documents_compile_nothing_anew():
    torch._dynamo.reset()
    model = grown(shape()).cuda()
    model.compile_stacks(by_block=True)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        for step, lengths in enumerate([(200, 57, 255), (500, 12), (100, 100, 100, 100, 112), (2, 3, 507)]):
            if step == 2:
                torch._dynamo.utils.counters.clear()
            tokens, targets, cu, _ = batch("cuda", lengths)
            draws = uniform_draws(0, step, torch.arange(tokens.numel())).cuda()
            model(tokens, cu_seqlens=cu, draws=draws, targets=targets).loss_sum.backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0


def run_config(kind="dlcm", **train_options):
    model = shape(kind)
    options = {"tokens": 40 * 2048, "batch_tokens": 2048, "checkpoint_every": 10, "log_every": 5} | train_options
    return RunConfig.model_validate(
        {
            "model": {**model.model_dump(), "vocab_size": 512},
            "data": {"corpus": "stdlib", "tokenizer": "bpe-512", "seq_len": 256, "validation_tokens": 16_384},
            "train": options,
        }
    )


class Killed(Exception):
    pass


@pytest.mark.parametrize("kind", ["dense", "dlcm"])
def test_a_run_learns_the_same_as_on_a_cpu_and_goes_on_after_a_kill(kind, tmp_path, monkeypatch):
    config = run_config(kind)
    whole = train(config, tmp_path / "whole")
    assert "NVIDIA" in whole.device or "AMD" in whole.device
    assert whole.status == "finished"

    def kill(progress):
        if progress.step == 25:
            raise Killed

    with pytest.raises(Killed):
        train(config, tmp_path / "killed", on_step=kill)
    resumed = train(config, tmp_path / "killed")
    assert resumed.loss_nats == pytest.approx(whole.loss_nats, abs=0.02)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    on_cpu = train(config, tmp_path / "cpu")
    assert whole.loss_nats == pytest.approx(on_cpu.loss_nats, abs=0.02)
    if kind == "dlcm":
        assert whole.tokens_per_concept == pytest.approx(4.0, rel=0.02)
        assert whole.tokens_per_concept_train == pytest.approx(on_cpu.tokens_per_concept_train, rel=0.05)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", ["dense", "dlcm"])
def test_the_estimate_of_memory_is_the_peak_of_the_allocator(kind, recompute):
    model = shape(kind, d_token=512, n_encoder_layers=4, d_ff_token=1408, vocab_size=8192)
    batch_tokens = 8192
    config = RunConfig.model_validate(
        {
            "model": model.model_dump(),
            "data": {"seq_len": 1024},
            "train": {
                "tokens": 1000 * batch_tokens,
                "batch_tokens": batch_tokens,
                "activation_checkpointing": recompute,
                "compile": False,
            },
        }
    )
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in islice(step_seconds(config, synthetic_corpus(config)), 4):
        pass
    peak = torch.cuda.max_memory_allocated() - before
    estimated = replace(run_memory(config, "cuda"), evaluation=0.0).total
    assert 0.9 <= estimated / peak <= 1.2


def test_tokens_written_one_by_one_have_the_logits_of_the_whole_pass():
    model = grown(shape()).cuda().eval()
    tokens = batch("cuda", (64,))[0][None]
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        whole = model(tokens).logits
        cache = model.new_cache(1)
        parts = [model(tokens[:, :40], cache=cache).logits]
        parts += [model(tokens[:, t : t + 1], cache=cache).logits for t in range(40, 64)]
    assert (torch.cat(parts, 1) - whole).float().norm() <= 0.03 * whole.float().norm()
