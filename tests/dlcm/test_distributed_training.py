"""One run on several processes gives what one process gives, up to rounding."""

import pytest
import torch

from dlcm.config import RunConfig
from dlcm.distributed import first_host, rendezvous
from dlcm.errors import UserError
from dlcm.micro_batch import most_micro_batches, shares
from dlcm.record import read_json, read_metrics
from dlcm.train import train
from tests.dlcm.ranks import start

STEPS = 10
WORDS = ["alpha", "beta", "gamma", "of", "the", "and", "x", "=", "1", "in", "so", "it", "was", "delta"]


def config_of(folder, kind="dlcm", windows=5, **train_options):
    text = folder / "text.txt"
    if not text.exists():
        text.write_text("\n".join(" ".join(WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(9)) for i in range(2500)))
    shape = {
        "d_token": 32,
        "d_head": 16,
        "n_heads_token": 2,
        "d_ff_token": 64,
        "n_encoder_layers": 1,
        "vocab_size": 257,
    }
    if kind == "dlcm":
        shape |= {
            "d_concept": 48,
            "n_heads_concept": 3,
            "d_ff_concept": 96,
            "n_concept_layers": 1,
            "n_decoder_layers": 1,
        }
    batch = 64 * windows
    return RunConfig.model_validate(
        {
            "model": {"kind": kind, **shape},
            "data": {"corpus": str(text), "tokenizer": "bytes", "seq_len": 64, "validation_tokens": 512},
            "train": {
                "batch_tokens": batch,
                "tokens": batch * STEPS,
                "log_every": 1,
                "checkpoint_every": 4,
                **train_options,
            },
        }
    )


def figures(run_dir):
    rows = read_metrics(run_dir / "metrics.jsonl")
    newest = max((run_dir / "checkpoints").glob("*.pt"))
    return rows, read_json(run_dir / "result.json"), torch.load(newest, weights_only=True)["model"]


def assert_close(found, reference):
    (rows, result, weights), (rows_1, result_1, weights_1) = found, reference
    assert [row["step"] for row in rows] == [row["step"] for row in rows_1] == list(range(1, STEPS + 1))
    for key, tolerance in (
        ("loss_nats", 1e-4),
        ("grad_norm", 1e-2),
        ("tokens_per_concept", 2e-2),
        ("boundary_prob", 1e-3),
    ):
        assert [row[key] for row in rows] == pytest.approx([row[key] for row in rows_1], rel=tolerance), key
    assert result["loss_nats"] == pytest.approx(result_1["loss_nats"], rel=1e-3)
    assert result["status"] == "finished"
    for name, weight in weights_1.items():
        torch.testing.assert_close(weights[name], weight, atol=2e-3, rtol=2e-2, msg=name)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DLCM_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "n_ranks", "options"),
    [("dlcm", 2, {}), ("dlcm", 2, {"micro_batch_tokens": 64}), ("dense", 3, {})],
    ids=["unequal shares", "several micro-batches", "dense, three ranks"],
)
def test_several_ranks_train_what_one_trains(cache, kind, n_ranks, options):
    config = config_of(cache, kind, **options)
    train(config, cache / "one")
    codes, said = start(n_ranks, config, cache / "many")
    assert codes == [0] * n_ranks, said
    assert_close(figures(cache / "many"), figures(cache / "one"))
    assert read_json(cache / "many" / "env.json")["n_ranks"] == n_ranks


@pytest.mark.slow
def test_all_ranks_stop_together_and_another_number_of_ranks_goes_on(cache):
    config = config_of(cache)
    codes, said = start(2, config, cache / "run", stop_at=6)
    assert codes == [3, 3], said
    assert max((cache / "run" / "checkpoints").glob("*.pt")).name == "step-00000006.pt"
    train(config, cache / "run")
    train(config, cache / "one")
    assert_close(figures(cache / "run"), figures(cache / "one"))
    codes, said = start(2, config, cache / "run")
    assert codes == [0, 0]
    assert all("finished" in text for text in said)  # the result, without training


@pytest.mark.slow
def test_an_error_of_rank_0_reaches_all(cache):
    (cache / "run").mkdir()
    (cache / "run" / "run.json").write_text('{"run_id": "another"}')
    codes, said = start(2, config_of(cache), cache / "run")
    assert codes == [2, 2], said
    assert all("belongs to another run" in text for text in said)


def test_shares_are_whole_windows_and_sum_to_the_batch(tmp_path):
    config = config_of(tmp_path, windows=5)
    assert shares(config, 1) == [320]
    assert shares(config, 2) == [128, 192]
    assert shares(config, 5) == [64] * 5
    assert most_micro_batches(config, 2) == 1
    with pytest.raises(UserError, match="5 windows .* fewer than the 6 ranks"):
        shares(config, 6)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"RANK": "0", "WORLD_SIZE": "1"}, None),
        (
            {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "n", "MASTER_PORT": "5"},
            (1, 4, 1, "n", 5),
        ),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, None),  # a batch script, without srun
        (
            {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_JOB_NODELIST": "gpu[3-4]"}
            | {"SLURM_JOB_ID": "77"},
            (5, 8, 1, "gpu3", 20077),
        ),
        (
            {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_JOB_NODELIST": "gpu3"}
            | {"SLURM_JOB_ID": "77", "SLURM_STEP_NUM_NODES": "1"},
            (1, 2, 1, "127.0.0.1", 20077),
        ),
        (
            {"SUBMITIT_LOCAL_NTASKS": "2", "SUBMITIT_LOCAL_GLOBALID": "1", "SUBMITIT_LOCAL_LOCALID": "1"}
            | {"SUBMITIT_LOCAL_JOB_ID": "9"},
            (1, 2, 1, "127.0.0.1", 20009),
        ),
    ],
)
def test_ranks_are_read_off_the_environment(environment, expected):
    found = rendezvous(environment)
    if expected is None:
        assert found is None
    else:
        ranks, address, port = found
        assert (ranks.rank, ranks.world_size, ranks.local_rank, address, port) == expected


def test_a_rank_that_cannot_be_is_refused():
    with pytest.raises(UserError, match="RANK = 4 with WORLD_SIZE = 4"):
        rendezvous({"RANK": "4", "WORLD_SIZE": "4"})


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({"RANK": "abc", "WORLD_SIZE": "2"}, "RANK = 'abc'"),
        ({"RANK": "0", "WORLD_SIZE": ""}, "WORLD_SIZE = ''"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "x"}, "MASTER_PORT = 'x'"),
        ({"SLURM_STEP_NUM_TASKS": "two"}, "SLURM_STEP_NUM_TASKS = 'two'"),
    ],
)
def test_a_variable_that_is_no_number_is_named(environment, name):
    with pytest.raises(UserError, match=f"{name} in the environment: expected a whole number"):
        rendezvous(environment)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("a", "a"),
        ("a,b", "a"),
        ("n[07-12,20]", "n07"),
        ("n[3,5]-ib,x", "n3-ib"),
        ("a1,b[1-2]", "a1"),
        ("r[1-2]n[3-4],x", "r1n3"),
    ],
)
def test_the_first_host_of_a_node_list(nodes, host):
    assert first_host(nodes) == host
