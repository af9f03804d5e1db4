"""Twelve runs on a real SLURM, and everything that befalls runs: the end of each is as specified, and the finished ones are exact."""

import contextlib
import importlib
import io
import os
import signal
import subprocess
import time

import pytest

from dlcm.record import read_json, read_metrics, write_json
from sweeps.collect import collect
from sweeps.control import cancel
from sweeps.launch import launch
from sweeps.store import load_sweep, save_sweep
from sweeps.watch import take_snapshot, watch
from tests.slurm.cluster import loopback_cluster, why_no_accounting, why_not
from tests.sweeps.test_launch import contents
from tests.sweeps.tiny import make_plan

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=f"no SLURM: {why_not()}"),
]
WAIT_S = 400.0
STEPS = 300


@pytest.fixture(scope="module")
def cluster():
    with loopback_cluster() as running:
        yield running


@pytest.fixture(autouse=True)
def client(cluster, monkeypatch, tmp_path_factory):
    monkeypatch.setenv("SLURM_CONF", str(cluster.config))
    monkeypatch.setenv("DLCM_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setattr(importlib.import_module("sweeps.watch"), "_SQUEUE_EVERY_S", 0.5)


class Faults:
    """Lets one thing after another happen to runs that are in their middle, and remembers to which."""

    def __init__(self, folder, cluster):
        self.folder, self.cluster = folder, cluster
        self.victims = {}
        self.todo = ["cancel", "time_out", "kill", "requeue", "node", "crash"]
        self.crashed = set()

    def status(self, run_id):
        return read_json(self.folder / run_id / "status.json")

    def look(self):
        """One look at the sweep; something happens to a run that has had nothing happen to it yet."""
        for state in take_snapshot(self.folder).states:
            # In the first half: what happens must reach the run before it ends, and SLURM takes its time on a busy machine.
            if state.status != "running" or not 15 <= state.step < STEPS // 2:
                continue
            if state.run_id == self.victims.get("crash"):
                self.crash(state.run_id)
            elif self.todo and state.run_id not in self.victims.values():
                what = self.todo.pop(0)
                self.victims[what] = state.run_id
                getattr(self, what)(state.run_id)
                return

    def cancel(self, run_id):
        cancel(self.folder, [run_id], grace_s=0.0)

    def time_out(self, run_id):
        command = ["scancel", "--signal=USR2", self.status(run_id)["job_id"]]
        # The signal arrives at once; scancel itself keeps asking while the job is on its way back into the queue.
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(command, env=self.cluster.environment, capture_output=True, timeout=3, check=False)

    def kill(self, run_id):
        os.kill(self.status(run_id)["pid"], signal.SIGKILL)

    def requeue(self, run_id):
        self.cluster.client(["scontrol", "requeue", self.status(run_id)["job_id"]])

    def node(self, run_id):
        self.cluster.kill_node("node1")
        time.sleep(2)
        self.cluster.start_node("node1")

    def crash(self, run_id):
        pid = self.status(run_id)["pid"]
        if pid not in self.crashed:
            self.crashed.add(pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSEGV)


def test_twelve_runs_through_every_fault_end_as_specified_and_the_finished_ones_are_exact(tmp_path, cluster):
    plan = make_plan(tmp_path, steps=STEPS, seeds=range(12), cluster={"time": "10"})
    launch(plan, tmp_path / "reference", "debug", threads=1)
    folder = tmp_path / "a sweep's \u201cfolder\u201d, größer"
    save_sweep(plan, folder)
    other = load_sweep(folder).runs[-1]  # its directory is another run's: an exception
    write_json(other.path / "run.json", {"schema": 1, "run_id": "another", "config": {}})
    launch(plan, folder, "slurm", concurrency=2, threads=1)
    faults = Faults(folder, cluster)
    deadline = time.monotonic() + WAIT_S
    while not (snapshot := take_snapshot(folder)).is_over:
        assert time.monotonic() < deadline, ([(s.run_id, s.status, s.reason) for s in snapshot.states], faults.victims)
        faults.look()
        time.sleep(0.1)
    watch(folder, stream=io.StringIO(), stall_s=10)
    states = {state.run_id: state for state in take_snapshot(folder).states}
    assert faults.todo == []
    cancelled, crashed = faults.victims["cancel"], faults.victims["crash"]
    assert (states[other.run_id].status, states[cancelled].status) == ("failed", "cancelled")
    assert "belongs to another run" in str(states[other.run_id].reason)
    assert states[crashed].status == "failed"
    assert "its process died 3 times, the last time killed by SIGSEGV" in str(states[crashed].reason)
    finished = set(states) - {other.run_id, cancelled, crashed}
    assert {states[run_id].status for run_id in finished} == {"finished"}, [
        (s.run_id, s.status, s.reason) for s in states.values()
    ]
    reference = contents(tmp_path / "reference")
    found = contents(folder, finished)
    assert found == {run_id: reference[run_id] for run_id in finished}
    frame = collect(folder).set_index("run_id")
    assert frame.loc[sorted(finished), "loss_nats"].notna().all()
    assert frame.loc[[other.run_id, cancelled, crashed], "loss_nats"].isna().all()
    assert read_json(folder / faults.victims["requeue"] / "status.json")["starts"] >= 2


def test_a_run_moves_to_another_node_when_its_machine_dies_with_accounting_where_there_is_some(tmp_path, monkeypatch):
    plan = make_plan(tmp_path, steps=300, seeds=(0,), cluster={"time": "10"})
    launch(plan, tmp_path / "reference", "debug", threads=1)
    with loopback_cluster(nodes=2, cpus=1, accounting=why_no_accounting() is None) as cluster:
        monkeypatch.setenv("SLURM_CONF", str(cluster.config))
        folder = tmp_path / "s"
        (job,) = launch(plan, folder, "slurm", threads=1).job_ids
        (run,) = load_sweep(folder).runs
        deadline = time.monotonic() + WAIT_S
        while len(read_metrics(run.path / "metrics.jsonl", running=True)) < 30:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        node = cluster.client(["squeue", "-h", "-j", job, "-o", "%N"]).strip()
        cluster.kill_node(node, jobs=True)
        died = time.monotonic()
        while take_snapshot(folder).states[0].status != "lost":  # SLURM still believes that the job runs
            assert time.monotonic() < died + 5, take_snapshot(folder).states
        while not (snapshot := take_snapshot(folder)).is_over:
            assert time.monotonic() < deadline, snapshot.states
            time.sleep(0.2)
        assert snapshot.states[0].status == "finished", snapshot.states
        assert contents(folder) == contents(tmp_path / "reference")
        assert read_json(run.path / "env.json")["slurm"]["SLURM_RESTART_COUNT"] == "1"
        if cluster.accounting:
            assert "COMPLETED" in cluster.client(["sacct", "-n", "-X", "-o", "State"])
