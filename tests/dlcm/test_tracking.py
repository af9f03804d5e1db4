"""Trackers mirror metrics.jsonl, whatever happens to the run and to them."""

import json
import struct
import sys

import pytest

from dlcm.config import RunConfig
from dlcm.errors import UserError
from dlcm.record import read_metrics
from dlcm.tracking import Tracking, check_trackers
from dlcm.train import train
from tests.dlcm.conftest import Killed, dense_config, kill_at

# Both load libraries that take seconds to import.
pytestmark = pytest.mark.slow


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("DLCM_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} word " * 40}) + "\n" for i in range(40)))
    return RunConfig.model_validate(
        {
            "model": dense_config(vocab_size=257).model_dump(),
            "data": {"corpus": str(path), "tokenizer": "bytes", "seq_len": 64, "validation_tokens": 512},
            "train": {"tokens": 12 * 256, "batch_tokens": 256, "log_every": 2, "checkpoint_every": 4},
        }
    )


def scalars(run_dir, tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def test_tensorboard_has_the_lines_of_metrics_each_once_after_a_kill(config, tmp_path):
    run_dir = tmp_path / "run"
    with pytest.raises(Killed):
        train(config, run_dir, on_step=kill_at(7), trackers=["tensorboard"])
    result = train(config, run_dir, trackers=["tensorboard"])
    rows = read_metrics(run_dir / "metrics.jsonl")
    for name in ("loss_nats", "grad_norm", "rms_encoder"):
        found = scalars(run_dir, f"train/{name}")
        assert sorted(found) == [row["step"] for row in rows]
        assert found == {row["step"]: pytest.approx(row[name], rel=1e-6) for row in rows}
    assert scalars(run_dir, "result/loss_nats") == {12: pytest.approx(result.loss_nats, rel=1e-6)}


def test_a_tracker_that_comes_later_gets_the_lines_that_were_there(config, tmp_path):
    run_dir = tmp_path / "run"
    with pytest.raises(Killed):
        train(config, run_dir, on_step=kill_at(9))
    train(config, run_dir, trackers=["tensorboard"])
    assert sorted(scalars(run_dir, "train/loss_nats")) == [2, 4, 6, 8, 10, 12]


def test_weights_and_biases_without_an_account_writes_offline(config, tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    run_dir = tmp_path / "run"
    result = train(config, run_dir, trackers=["wandb"])
    (folder,) = (run_dir / "wandb").glob("offline-run-*")
    (log,) = folder.glob("*.wandb")
    rows, summary = wandb_rows(log)
    expected = read_metrics(run_dir / "metrics.jsonl")
    assert [row["_step"] for row in rows] == [row["step"] for row in expected]
    assert [row["train/loss_nats"] for row in rows] == pytest.approx([row["loss_nats"] for row in expected])
    assert summary["result/loss_nats"] == pytest.approx(result.loss_nats)


def wandb_records(data):
    """Records of a transaction log: seven bytes of header, then LevelDB's log format in blocks of 32 KiB."""
    at, block, record = 7, 1 << 15, b""
    while at + 7 <= len(data):
        if block - at % block < 7:  # too little room for a header: the rest of the block is padding
            at += block - at % block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def wandb_rows(path):
    """Rows and summary of the transaction log that `wandb sync` sends."""
    from wandb.proto import wandb_internal_pb2 as pb

    def values(items):
        return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}

    rows, summary = [], {}
    for data in wandb_records(path.read_bytes()):
        record = pb.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            rows.append(values(record.history.item))
        elif kind == "summary":
            summary |= values(record.summary.update)
    return rows, summary


def test_a_tracker_that_fails_on_the_way_is_dropped_with_a_warning_and_the_run_goes_on(
    config, tmp_path, monkeypatch, capsys
):
    from torch.utils.tensorboard import SummaryWriter

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    result = train(config, tmp_path / "run", trackers=["tensorboard"])
    assert result.status == "finished"
    told = capsys.readouterr().err
    assert told.count("warning: tensorboard is left out") == 1
    assert "No space left" in told


def test_a_tracker_that_is_not_installed_or_not_known_is_refused_before_anything_is_written(
    config, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"wandb is not installed: pip install 'dlcm-scaling\[track\]'"):
        train(config, tmp_path / "run", trackers=["wandb"])
    assert not (tmp_path / "run" / "env.json").exists()
    with pytest.raises(UserError, match="unknown tracker 'tensorbord'; known are tensorboard, wandb"):
        check_trackers(["tensorbord"])


def test_what_is_not_a_number_is_left_out(config, tmp_path):
    with Tracking(["tensorboard"], config, tmp_path) as tracking:
        tracking.log({"step": 3, "loss_nats": 1.0, "mfu": None, "grad_norm": float("nan")})
    assert scalars(tmp_path, "train/loss_nats") == {3: 1.0}
    with pytest.raises(KeyError):
        scalars(tmp_path, "train/mfu")
