"""A sweep so small that a run takes a second, and a stand-in for training that takes none."""

import importlib
import json
import os
import random
import time
from pathlib import Path
from types import SimpleNamespace

from dlcm.record import append_metrics, run_lock, write_json
from flops import parameters
from sweeps.plan import plan
from sweeps.spec import Sweep

WORDS = ["alpha", "beta", "gamma", "delta", "of", "the", "and", "it", "was", "so", "x = 1", "in"]
MODEL = {
    "d_token": 32,
    "d_concept": 32,
    "n_encoder_layers": 1,
    "n_concept_layers": 1,
    "n_decoder_layers": 1,
    "d_head": 16,
    "n_heads_token": 2,
    "n_heads_concept": 2,
    "d_ff_token": 64,
    "d_ff_concept": 64,
}


def write_corpus(folder: Path) -> Path:
    path = folder / "corpus.jsonl"
    draw = random.Random(0)
    lines = [json.dumps({"text": " ".join(draw.choices(WORDS, k=150))}) for _ in range(120)]
    path.write_text("\n".join(lines) + "\n")
    return path


def sweep_dict(folder: Path, *, steps: int = 8, seeds=(0, 1, 2), name: str = "tiny", base_update=None, **more) -> dict:
    """Runs that differ in seed and, so that one is the longest, in tokens."""
    corpus = folder / "corpus.jsonl"
    if not corpus.exists():
        write_corpus(folder)
    train = {"batch_tokens": 128, "tokens": 128 * steps, "checkpoint_every": 5, "log_every": 1}
    if "budgets" in more:
        del train["tokens"]
    data = {"corpus": str(corpus), "tokenizer": "bytes", "seq_len": 64, "validation_tokens": 512}
    return {
        "name": name,
        "base": {"data": data, "train": train, "model": MODEL, **(base_update or {})},
        "axes": {"grid": {"seed": list(seeds)}},
        "minimum": {"steps": 0},  # these runs are far shorter than any that would teach something
        **more,
    }


def make_plan(folder: Path, **options):
    return plan(Sweep.from_dict(sweep_dict(folder, **options)))


class FakeTrain:
    """Writes the files of a run as `dlcm.train.train` does, at once; `behave` may raise, sleep, or name a status."""

    def __init__(self, behave=None):
        self.behave, self.calls = behave, []

    def __call__(
        self,
        config,
        run_dir,
        *,
        on_step=None,
        guard=lambda: None,
        micro_batch_tokens=None,
        trunk=None,
        keep=(),
        trackers=(),
    ):
        with run_lock(run_dir):
            self.calls.append(config.run_id)
            (run_dir / "metrics.jsonl").unlink(missing_ok=True)
            for step in range(1, config.n_steps + 1):
                append_metrics(run_dir / "metrics.jsonl", {"step": step, "loss_nats": 5.0 - 0.1 * step})
                if on_step is not None:
                    on_step(
                        SimpleNamespace(step=step, n_steps=config.n_steps, loss_nats=4.0, tokens_per_s=1000.0, mfu=None)
                    )
            status = (self.behave(config) if self.behave else None) or "finished"
            write_json(run_dir / "result.json", result_json(config, status))
            return SimpleNamespace(status=status)

    def install(self, monkeypatch):
        # `dlcm.train` is the function, by the house's naming; the module is what the worker imports from.
        monkeypatch.setattr(importlib.import_module("dlcm.train"), "train", self)
        return self


def result_json(config, status="finished", **more):
    params = parameters(config.model)
    ended_well = status == "finished"
    return {
        "schema": 1,
        "run_id": config.run_id,
        "status": status,
        "step": config.n_steps,
        "tokens": config.tokens,
        "loss_nats": 4.0 if ended_well else None,
        "bits_per_byte": 2.0 if ended_well else None,
        "tokens_per_concept": 3.9 if ended_well else None,
        "tokens_per_concept_train": 4.1 if ended_well else None,
        "epochs": 0.5,
        "params": {group: getattr(params, group) for group in ("total", "embedding", "token", "concept")},
        "wall_s": 1.5,
        "device": "cpu",
        "reason": None if ended_well else "loss is nan at step 3",
        **more,
    }


def finish(run, status="finished", **more):
    """Write what a finished run leaves."""
    run.path.mkdir(parents=True, exist_ok=True)
    for step in range(1, run.config.n_steps + 1):
        append_metrics(run.path / "metrics.jsonl", {"step": step, "loss_nats": 4.0})
    write_json(run.path / "result.json", result_json(run.config, status, **more))


def beat(run, *, state="running", submission=1, deaths=0, starts=1, host=None, job_id="1", age_s=0.0, step=3):
    """Write a heartbeat."""
    import socket

    run.path.mkdir(parents=True, exist_ok=True)
    facts = {
        "schema": 1,
        "run_id": run.run_id,
        "state": state,
        "phase": "train",
        "reason": None,
        "pid": 1,
        "host": host or socket.gethostname(),
        "job_id": job_id,
        "submission": submission,
        "deaths": deaths,
        "starts": starts,
        "step": step,
        "n_steps": run.config.n_steps,
        "tokens_per_s": 100.0,
        "loss_nats": 4.5,
        "time": time.time() - age_s,
    }
    write_json(run.path / "status.json", facts)
    # How old it is, is read off the file: clocks of machines differ.
    written = (run.path / "status.json").stat().st_mtime - age_s
    os.utime(run.path / "status.json", (written, written))


def fail(run, *, submission=1, stage="train"):
    """Write a failure."""
    run.path.mkdir(parents=True, exist_ok=True)
    record = {"schema": 1, "run_id": run.run_id, "stage": stage, "exception": "ValueError", "message": "ValueError: no"}
    write_json(run.path / "failure.json", record | {"traceback": "Traceback\nValueError: no", "submission": submission})
