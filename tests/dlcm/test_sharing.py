"""A run whose ranks share its model, whole or in parts, is the run of one process, and so are its checkpoints."""

import shutil
import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from dlcm.config import OptimConfig, RunConfig
from dlcm.distributed import Ranks
from dlcm.errors import UserError
from dlcm.model import build_model
from dlcm.optim import build_optimizer
from dlcm.parallel import choose_mode
from dlcm.record import read_json
from dlcm.sharing import SharedModel, share_model
from dlcm.train import load_result, train
from dlcm.trunk import load_branch
from tests.dlcm.conftest import awake, dense_config, random_tokens, small_config
from tests.dlcm.ranks import start
from tests.dlcm.test_distributed_training import STEPS, assert_close, cache, config_of, figures  # noqa: F401

DEEP = {"n_encoder_layers": 2, "n_concept_layers": 2, "n_decoder_layers": 2}
THREE = {"windows": 3, "micro_batch_tokens": 64}  # of two ranks, one has one micro-batch and the other two
# Kind, changes to the model, changes to its boundaries, options of `config_of`.
RUNS = {
    "dlcm": ("dlcm", DEEP, {}, THREE),
    "dense": ("dense", {"n_encoder_layers": 3}, {}, {"windows": 3}),
    "tied": ("dlcm", {"tie_embeddings": True, "cross_attention": "once"}, {}, {"windows": 5, "micro_batch_tokens": 64}),
    "no-ratio-loss": ("dlcm", DEEP, {"ratio_loss_weight": 0.0}, THREE),
    "no-gradient": ("dlcm", {"pooling": "first"}, {"detector": "fixed"}, {"windows": 3}),
    "compiled": ("dlcm", DEEP, {}, {"windows": 3, "compile": True, "activation_checkpointing": True}),
}


def config_named(name, folder, **train_options):
    kind, model, boundary, options = RUNS[name]
    blocks = config_of(folder, kind, **options, **train_options).model_dump()
    blocks["model"] |= model
    if kind == "dlcm":
        blocks["model"]["boundary"] |= boundary
    return RunConfig.model_validate(blocks)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_give_what_one_gives(name, mode, cache, monkeypatch):  # noqa: F811
    config = config_named(name, cache, parallel=mode)
    codes, said = start(2, config, cache / "two")
    assert codes == [0, 0], said
    plain = config_named(name, cache, parallel=mode) if name != "compiled" else uncompiled(config)
    train(plain, cache / "one")
    assert_close(figures(cache / "two"), figures(cache / "one"))
    assert read_json(cache / "two" / "env.json")["parallel"] == mode
    assert read_json(cache / "one" / "env.json")["parallel"] == "alone"


def uncompiled(config):
    train_block = config.train.model_copy(update={"compile": False, "activation_checkpointing": False})
    return config.model_copy(update={"train": train_block})


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_ranks_in_bf16_give_what_one_gives(mode, cache):  # noqa: F811
    config = config_of(cache, "dense", windows=3, parallel=mode, precision="bf16", activation_checkpointing=True)
    codes, said = start(2, config, cache / "two")
    assert codes == [0, 0], said
    train(config, cache / "one")
    assert_close(figures(cache / "two"), figures(cache / "one"))


def structure(x):
    if isinstance(x, torch.Tensor):
        return type(x), x.dtype, tuple(x.shape), x.device.type
    if isinstance(x, dict):
        return {key: structure(value) for key, value in x.items()}
    return [structure(value) for value in x] if isinstance(x, list | tuple) else type(x)


@pytest.mark.slow
def test_a_run_killed_under_one_mode_goes_on_under_any_other(cache):  # noqa: F811
    config = config_named("dlcm", cache)
    train(config, cache / "one")
    expected = figures(cache / "one")
    files = {}
    for before, n_ranks in (("fsdp", 2), ("ddp", 2), (None, 1)):
        stopped = cache / f"stopped-{before}"
        codes, said = start(n_ranks, config, stopped, stop_at=6, mode=before)
        assert codes == [3] * n_ranks, said
        file = stopped / "checkpoints" / "step-00000006.pt"
        files[before] = torch.load(file, weights_only=True)
        for after, n_after in (("fsdp", 2), ("ddp", 2), (None, 1)):
            if "fsdp" not in (before, after):
                continue
            again = cache / f"{before}-{after}"
            shutil.copytree(stopped, again)
            codes, said = start(n_after, config, again, mode=after)
            assert codes == [0] * n_after, said
            assert_close(figures(again), expected)
    for found in files.values():
        assert structure(found) == structure(files[None])
        for i, state in files[None]["optimizer"]["state"].items():
            for key, moment in state.items():
                torch.testing.assert_close(found["optimizer"]["state"][i][key], moment, atol=1e-6, rtol=1e-3)


@pytest.mark.slow
def test_ranks_that_share_weights_go_on_from_the_last_checkpoint_after_one_was_killed(cache):  # noqa: F811
    config = config_named("dlcm", cache, parallel="fsdp")  # a checkpoint each four steps
    codes, said = start(2, config, cache / "two", kill_at=6)
    assert codes[0] == 9, said
    assert codes[1] != 0, said
    assert [path.name for path in (cache / "two" / "checkpoints").iterdir()] == ["step-00000004.pt"]
    codes, said = start(2, config, cache / "two")
    assert codes == [0, 0], said
    train(config, cache / "one")
    assert_close(figures(cache / "two"), figures(cache / "one"))


@pytest.mark.slow
def test_a_branch_kept_under_fsdp_is_taken_up_alone(cache):  # noqa: F811
    blocks = config_named("dlcm", cache, parallel="fsdp").model_dump()
    blocks["optim"] |= {"warmup_tokens": 2 * blocks["train"]["batch_tokens"]}
    long = RunConfig.model_validate(blocks)
    blocks["train"] |= {"tokens": 8 * blocks["train"]["batch_tokens"], "measure_stable": True}
    short = RunConfig.model_validate(blocks)
    codes, said = start(2, long, cache / "long", keep=[short.n_stable_steps])
    assert codes == [0, 0], said
    assert load_branch(cache / "long", short)["step"] == short.n_stable_steps
    train(short, cache / "branch", trunk=cache / "long")
    train(short, cache / "alone")
    codes, said = start(2, short, cache / "two")
    assert codes == [0, 0], said
    alone = load_result(cache / "alone")
    for name in ("branch", "two"):
        found = load_result(cache / name)
        assert (found.loss_nats, found.loss_nats_stable) == pytest.approx(
            (alone.loss_nats, alone.loss_nats_stable), 1e-5
        )
        assert found.params == alone.params


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def backward(shared, observe=lambda: None):
    """A pass and back; `observe` is called when the gradient of the first block's first matrix has been computed."""
    tokens = random_tokens(48, 0)
    out = shared(tokens, draws=torch.rand(48), targets=tokens)
    handle = shared.model.encoder[0].attention.w_q.weight.register_hook(lambda _: observe())
    (out.loss_sum + out.boundary_prob.sum()).backward()
    handle.remove()


def recorded(shared):
    """Names of the parameters whose gradients are under way over the network, in the order in which they leave."""
    names = {id(p): name for name, p in shared.model.named_parameters()}
    left = []

    def reduce(_, bucket):
        left.extend(names[id(p)] for p in bucket.parameters())
        return allreduce_hook(None, bucket)

    shared.replica.register_comm_hook(None, reduce)
    return left


def test_ddp_reduces_the_last_layers_before_the_first_have_gradients(group):
    shared = SharedModel(build_model(small_config()).train(), "ddp", torch.device("cpu"), bucket_mb=0.005)
    left = recorded(shared)
    backward(shared)  # the first step reduces all together, and learns the order in which gradients come
    left.clear()
    backward(shared, lambda: left.append("first block"))
    at = left.index("first block")
    before, names = left[:at], [name for name, _ in shared.model.named_parameters()]
    assert {name for name in names if name.startswith("decoder.1")} <= set(before)
    assert not [name for name in before if name.startswith("encoder.0.attention.")]
    assert sorted(left[:at] + left[at + 1 :]) == sorted(names)  # each is reduced once


def test_ddp_reduces_nothing_while_micro_batches_accumulate(group):
    shared = SharedModel(build_model(small_config()).train(), "ddp", torch.device("cpu"))
    left = recorded(shared)
    for more in (True, True, False):
        with shared.accumulating(more):
            backward(shared)
        assert bool(left) == (not more)


def test_fsdp_scatters_the_last_layers_before_the_first_have_gradients(group):
    shared = SharedModel(build_model(small_config()).train(), "fsdp", torch.device("cpu"))
    with_gradient = []

    def watch(_, __, out):
        out.register_hook(
            lambda _: with_gradient.extend(name for name, p in shared.model.named_parameters() if p.grad is not None)
        )

    shared.model.encoder[0].register_forward_hook(watch)
    tokens = random_tokens(48, 0)
    shared(tokens, draws=torch.rand(48), targets=tokens).loss_sum.backward()
    assert {f"decoder.1.{name}" for name, _ in shared.model.decoder[1].named_parameters()} <= set(with_gradient)
    assert not [name for name in with_gradient if name.startswith("encoder.0")]


def test_a_rank_keeps_its_share_of_every_weight_and_so_of_its_moments():
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    try:
        shared = SharedModel(build_model(small_config()).train(), "fsdp", torch.device("cpu"))
        kept = sum(p.to_local().numel() for p in shared.model.parameters())
        whole = sum(p.numel() for p in shared.model.parameters())
        assert kept == pytest.approx(whole / 4, rel=0.02)  # rows that four does not divide, and the null concept's one
        optimizer = build_optimizer(shared.model, OptimConfig())
        for p in shared.model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        moments = [x.to_local().numel() for state in optimizer.state.values() for x in state.values() if x.dim()]
        assert sum(moments) == 2 * kept
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_under_autocast_fsdp_computes_what_autocast_does_and_its_own_bf16_is_further_from_fp32(group):
    losses, found = {}, {}
    for name in ("fp32", "autocast", "fsdp", "fsdp bf16"):
        model = awake(dense_config(n_encoder_layers=4)).float().train()
        if name == "fsdp":
            model = SharedModel(model, "fsdp", torch.device("cpu")).model
        if name == "fsdp bf16":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            for module in (*model.blocks(), model):
                fully_shard(module, mp_policy=policy)
        tokens = random_tokens(256, 0)
        with torch.autocast("cpu", torch.bfloat16, enabled=name in ("autocast", "fsdp")):
            loss = model(tokens, targets=tokens.roll(-1)).loss_sum
        loss.backward()
        losses[name] = float(loss.detach())
        found[name] = torch.cat([put_together(p.grad).flatten() for p in model.parameters()])
    assert losses["fsdp"] == losses["autocast"]
    assert torch.equal(found["fsdp"], found["autocast"])
    error = {name: float((x - found["fp32"]).norm()) for name, x in found.items()}
    assert error["fsdp bf16"] > 1.2 * error["autocast"]


def put_together(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def test_one_process_is_alone_whatever_is_asked_for():
    assert {choose_mode(asked, 1, 10**12, 1.0) for asked in ("auto", "ddp", "fsdp")} == {"alone"}


def test_ranks_share_the_states_where_sixteen_bytes_a_parameter_exceed_three_fifths_of_the_memory():
    n, memory = 3_000_000_000, 80e9
    assert 16 * n == 0.6 * memory
    assert choose_mode("auto", 8, n, memory) == "ddp"
    assert choose_mode("auto", 8, n + 1, memory) == "fsdp"
    assert choose_mode("auto", 8, n + 1, None) == "ddp"
    assert choose_mode("ddp", 8, 10 * n, memory) == "ddp"
    assert choose_mode("fsdp", 2, 1, memory) == "fsdp"


def test_ranks_that_share_weights_take_passes_alike():
    shared = SharedModel(build_model(dense_config()), "alone", torch.device("cpu"))
    assert shared.passes(["a", "b"], 3) == [("a", True), ("b", True)]
    shared.mode = "fsdp"
    assert shared.passes(["a", "b"], 4) == [("a", True), ("b", True), ("b", False), ("b", False)]


def test_fsdp_without_fsdp2_is_refused_with_a_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.distributed.fsdp", None)
    config = RunConfig(model=dense_config(), train={"tokens": 2048, "parallel": "fsdp"})
    ranks = Ranks(0, 2, 0)
    monkeypatch.setattr(Ranks, "tell", lambda _, message: message)
    with pytest.raises(UserError, match=r"parallel: fsdp needs FSDP2.*set train\.parallel: ddp"):
        share_model(build_model(config.model), config, torch.device("cpu"), ranks)
