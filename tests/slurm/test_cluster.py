"""The test cluster itself, and what SLURM does to jobs when something fails: the facts that other tests build on."""

import subprocess
import time

import pytest

from tests.slurm.cluster import SLURMD_TIMEOUT_S, loopback_cluster, why_no_accounting, why_not

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=f"no SLURM: {why_not()}"),
]
# Noticing a dead node takes SlurmdTimeout and a few pings, a requeued job waits eleven seconds for its credential.
WAIT_S = 60.0
BEAT = 'echo "start $SLURM_RESTART_COUNT $SLURMD_NODENAME"; for i in $(seq 600); do echo beat; sleep 0.2; done'


@pytest.fixture(scope="module")
def cluster():
    with loopback_cluster(nodes=3, gpus=2, max_array_size=11, preemption=True) as running:
        yield running


@pytest.fixture(autouse=True)
def clean(request):
    yield
    if "cluster" in request.fixturenames:
        running = request.getfixturevalue("cluster")
        running.client(["scancel", "--user=root"])
        until(lambda: not running.client(["squeue", "-h"]), "an empty queue")


def until(condition, what):
    """Wait, and return how many seconds it took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() < start + WAIT_S, f"gave up waiting: {what}"
        time.sleep(0.1)
    return time.monotonic() - start


def until_job(cluster, job, *states):
    return until(lambda: cluster.job_states()[job] in states, f"{job} {states}, {cluster.job_states()}")


def output(cluster, job):
    path = cluster.folder / f"{job}.out"
    return path.read_text() if path.exists() else ""


def started(cluster, script, *options):
    """Submit a job and wait until its script runs."""
    job = cluster.sbatch(script, *options)
    until(lambda: output(cluster, job), f"output of {job}")
    return job


def still_beats(cluster, job):
    before = len(output(cluster, job))
    time.sleep(1.0)
    return len(output(cluster, job)) > before


def test_a_job_runs_on_each_of_three_nodes(cluster):
    assert cluster.node_states() == {"node1": "idle", "node2": "idle", "node3": "idle"}
    jobs = {name: cluster.sbatch("echo $SLURMD_NODENAME", f"--nodelist={name}") for name in cluster.names}
    for name, job in jobs.items():
        until_job(cluster, job, "COMPLETED")
        assert output(cluster, job).split() == [name]


def test_jobs_share_the_gpus_of_a_node(cluster):
    show = 'echo "$CUDA_VISIBLE_DEVICES"; sleep 2'
    pair = [started(cluster, show, "--gpus-per-node=1", "--nodelist=node1") for _ in range(2)]
    assert sorted(output(cluster, job).strip() for job in pair) == ["0", "1"]
    both = started(cluster, show, "--gpus-per-node=2", "--nodelist=node2")
    assert output(cluster, both).strip() == "0,1"
    with pytest.raises(subprocess.CalledProcessError):
        cluster.sbatch("true", "--gpus-per-node=3")


def test_an_array_has_the_size_that_the_cluster_allows(cluster):
    job = cluster.sbatch("true", "--array=0-10")
    until(lambda: [cluster.job_states().get(f"{job}_{i}") for i in range(11)] == ["COMPLETED"] * 11, "the array")
    with pytest.raises(subprocess.CalledProcessError) as caught:
        cluster.sbatch("true", "--array=0-11")
    assert "Invalid job array specification" in caught.value.stderr


def test_a_job_outlives_its_slurmd_when_that_is_back_in_time(cluster):
    job = started(cluster, "echo start; sleep 4; echo end $SLURM_RESTART_COUNT", "--nodelist=node1")
    cluster.kill_node("node1")
    time.sleep(1.0)
    assert cluster.job_states()[job] == "RUNNING"
    cluster.start_node("node1")
    assert cluster.job_states()[job] == "RUNNING"
    until_job(cluster, job, "COMPLETED")
    assert output(cluster, job).split() == ["start", "end"]
    again = started(cluster, "echo $SLURMD_NODENAME", "--nodelist=node1")
    until_job(cluster, again, "COMPLETED")
    assert output(cluster, again).split() == ["node1"]


def test_a_job_without_its_slurmd_is_requeued_while_its_processes_run_on(cluster):
    job = started(cluster, BEAT, "--nodelist=node1", "--open-mode=append")
    cluster.kill_node("node1")
    took = until(lambda: cluster.job_states()[job] == "PENDING", "the requeue")
    assert took >= SLURMD_TIMEOUT_S - 1
    print(f"requeued {took:.1f} s after its slurmd's death")
    assert cluster.node_states()["node1"] == "down*"
    # SLURM has given the job up, and two copies of it would run where another node takes it.
    assert still_beats(cluster, job)
    cluster.start_node("node1")
    # Its new slurmd is told at once to end what the controller believes dead.
    until(lambda: not still_beats(cluster, job), "the end of the first copy")
    until(lambda: "start 1 node1" in output(cluster, job), "the second start")


def test_the_jobs_of_a_dead_machine_move_to_another(cluster):
    job = started(cluster, BEAT, "--open-mode=append")
    node = output(cluster, job).split()[1]
    cluster.kill_node(node, jobs=True)
    assert not still_beats(cluster, job)
    took = until(lambda: "start 1" in output(cluster, job), "the second start")
    print(f"runs elsewhere {took:.1f} s after the machine's death")
    assert f"start 1 {node}" not in output(cluster, job)
    cluster.start_node(node)


def test_the_jobs_of_a_node_given_up_by_the_controller_are_requeued(cluster):
    job = started(cluster, BEAT, "--nodelist=node2")
    lost = started(cluster, BEAT, "--nodelist=node2", "--no-requeue")
    cluster.down_node("node2")
    until_job(cluster, job, "PENDING")
    assert cluster.job_states()[lost] == "NODE_FAIL"
    cluster.start_node("node2")
    assert cluster.node_states()["node2"] in ("idle", "mixed")


def test_a_requeue_counts_restarts(cluster):
    job = started(cluster, "echo start $SLURM_RESTART_COUNT; sleep 60", "--open-mode=append")
    cluster.requeue(job)
    took = until(lambda: output(cluster, job).split() == ["start", "start", "1"], "the second start")
    print(f"started again {took:.1f} s after the requeue")


def test_a_signal_reaches_the_steps_or_the_batch_script(cluster):
    trap = "trap 'echo {0}' USR2; echo {0} ready; for i in $(seq 300); do sleep 0.1; done"
    step = f'sh -c "{trap.format("step").replace("$", chr(92) + "$")}"'
    job = started(cluster, f"trap 'echo batch' USR2; srun {step} & while ! wait; do :; done")
    until(lambda: "step ready" in output(cluster, job), "the step")
    cluster.signal(job, "USR2")
    until(lambda: "step\n" in output(cluster, job), "the step's signal")
    assert "batch" not in output(cluster, job)
    cluster.signal(job, "USR2", batch=True)
    until(lambda: "batch\n" in output(cluster, job), "the script's signal")


def test_an_urgent_job_pushes_others_back_into_the_queue(cluster):
    job = started(cluster, BEAT, "--nodelist=node3", "--exclusive")
    urgent = cluster.sbatch("true", "--partition=urgent", "--nodelist=node3")
    until_job(cluster, urgent, "COMPLETED")
    assert cluster.job_states()[job] == "PENDING"


def test_another_user_runs_jobs_as_itself(cluster):
    job = cluster.sbatch("id -un; srun id -un; pwd; sleep 60", user="nobody")
    path = cluster.folder / "home" / "nobody" / f"{job}.out"
    until(lambda: path.exists() and len(path.read_text().splitlines()) == 3, "output")
    assert path.read_text().split() == ["nobody", "nobody", str(path.parent)]
    assert path.owner() == "nobody"
    assert job in cluster.client(["squeue", "-h", "--me", "-o", "%i"], user="nobody")
    of_root = started(cluster, BEAT)
    with pytest.raises(subprocess.CalledProcessError):
        cluster.client(["scancel", of_root], user="nobody")
    cluster.client(["scancel", job], user="nobody")
    until_job(cluster, job, "CANCELLED")


def test_without_accounting_sacct_fails_fast(cluster):
    start = time.monotonic()
    with pytest.raises(subprocess.CalledProcessError) as caught:
        cluster.client(["sacct"])
    assert "accounting storage is disabled" in caught.value.stderr
    assert time.monotonic() - start < 2.0


@pytest.mark.skipif(why_no_accounting() is not None, reason=f"no accounting: {why_no_accounting()}")
def test_with_accounting_sacct_names_every_end():
    with loopback_cluster(nodes=2, memory_mb=200, accounting=True) as cluster:
        jobs = {
            "COMPLETED": cluster.sbatch("true"),
            "FAILED": cluster.sbatch("exit 3"),
            "NODE_FAIL": started(cluster, BEAT, "--nodelist=node2", "--no-requeue"),
            "CANCELLED by 0": started(cluster, BEAT, "--nodelist=node1"),
        }
        own = cluster.sbatch("true", "--nodelist=node1", user="nobody")
        cluster.client(["scancel", jobs["CANCELLED by 0"]])
        cluster.down_node("node2")

        def states(user=None):
            lines = cluster.client(["sacct", "-n", "-P", "-X", "-o", "JobID,State"], user=user).splitlines()
            return dict(line.split("|") for line in lines)

        until(lambda: states() == {job: word for word, job in jobs.items()} | {own: "COMPLETED"}, "the ends")
        assert states("nobody") == {own: "COMPLETED"}
