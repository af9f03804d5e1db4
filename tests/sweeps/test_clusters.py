"""Named clusters, settings of the command line, and what is asked of a scheduler."""

import math

import pytest

from dlcm.errors import UserError
from sweeps.cluster_config import ClusterConfig
from sweeps.clusters import parse_settings, resolve_target
from sweeps.resources import TIME_MARGIN, UNKNOWN_MINUTES, group_runs
from sweeps.store import StoredRun

FILE = """
jupiter: {partition: gpu, account: me, time: "2:00:00", setup: [module load cuda]}
box: {scheduler: local, concurrency: 4}
"""


@pytest.fixture
def clusters(tmp_path, monkeypatch):
    path = tmp_path / "clusters.yaml"
    path.write_text(FILE)
    monkeypatch.setenv("DLCM_CLUSTERS", str(path))
    return path


def test_the_command_line_wins_over_the_sweep_and_the_sweep_over_the_named_cluster(clusters):
    spec = ClusterConfig(time="1:00:00", gpus=2)
    target = resolve_target("jupiter", spec, {"gpus": 4, "qos": "high"})
    assert (target.name, target.scheduler) == ("jupiter", "slurm")
    found = target.config
    assert (found.partition, found.account, found.setup) == ("gpu", "me", ("module load cuda",))
    assert (found.time, found.gpus, found.qos) == ("1:00:00", 4, "high")
    assert resolve_target("box", ClusterConfig()).scheduler == "local"
    assert resolve_target("box", ClusterConfig()).config.concurrency == 4


def test_without_a_file_the_three_schedulers_are_there(tmp_path, monkeypatch):
    monkeypatch.delenv("DLCM_CLUSTERS", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for name in ("local", "slurm", "debug"):
        assert resolve_target(name, ClusterConfig()).scheduler == name


@pytest.mark.parametrize(
    ("text", "name", "words"),
    [
        (FILE, "jupyter", "did you mean 'jupiter'?"),
        ("a: {partiton: x}", "a", "did you mean 'partition'?"),
        ("a: {scheduler: pbs}", "a", "a.scheduler = 'pbs'; give local or slurm or debug"),
        ("[a]", "a", "expected a mapping"),
        ("a: {time: never}", "a", "not a SLURM time"),
    ],
)
def test_a_fault_of_the_file_is_told_with_its_place(clusters, text, name, words):
    clusters.write_text(text)
    with pytest.raises(UserError) as error:
        resolve_target(name, ClusterConfig())
    assert words in str(error.value)
    assert "clusters.yaml" in str(error.value)


def test_a_file_that_is_named_and_absent_is_told(clusters):
    clusters.unlink()
    with pytest.raises(UserError, match="DLCM_CLUSTERS names it"):
        resolve_target("jupiter", ClusterConfig())


def test_settings_are_read_as_yaml_and_times_as_times():
    pairs = ["partition=gpu", "gpus=2", "time=4:00:00", "setup=[module load a, export B=c]"]
    assert parse_settings(pairs) == {
        "partition": "gpu",
        "gpus": 2,
        "time": "4:00:00",
        "setup": ["module load a", "export B=c"],
    }


@pytest.mark.parametrize(
    ("pair", "words"),
    [("partition", "give KEY=VALUE"), ("partiton=x", "did you mean 'partition'?"), ("gpus=[", "value")],
)
def test_a_setting_that_is_none_is_refused(pair, words):
    with pytest.raises(UserError, match="--set"):
        parse_settings([pair])
    with pytest.raises(UserError) as error:
        parse_settings([pair])
    assert words in str(error.value)


def stored(tmp_path, hours, memory=math.nan):
    row = {"flops_train_planned": 1.0, "hours_estimated": hours, "memory_estimated": memory}
    return StoredRun(f"run-{hours}", tmp_path / f"run-{hours}", row, True)


def test_times_follow_the_estimates_with_a_margin_and_runs_of_like_need_share_an_array(tmp_path):
    hours = [0.1, 0.12, 3.0, 2.9, 30.0]
    groups = group_runs([stored(tmp_path, h) for h in hours], ClusterConfig())
    assert [group.run_ids for group in groups] == [("run-30.0",), ("run-3.0", "run-2.9"), ("run-0.12", "run-0.1")]
    for group, longest in zip(groups, (30.0, 3.0, 0.12)):
        assert group.minutes >= 60 * longest * TIME_MARGIN
        assert group.minutes <= 2 * (60 * longest * TIME_MARGIN + 15)


def test_packed_runs_ask_for_the_time_of_all_and_the_limit_of_the_partition_holds(tmp_path):
    runs = [stored(tmp_path, h) for h in (1.0, 1.1, 0.9, 1.05)]
    (group,) = group_runs(runs, ClusterConfig(runs_per_task=4))
    assert (group.n_tasks, group.run_ids[0]) == (1, "run-1.1")
    assert group.minutes >= 4.05 * 60 * TIME_MARGIN
    (group,) = group_runs(runs, ClusterConfig(runs_per_task=4, max_time="2:00:00"))
    assert group.minutes == 120


def test_a_given_time_wins_and_without_an_estimate_four_hours_are_asked_for(tmp_path):
    runs = [stored(tmp_path, math.nan)]
    assert group_runs(runs, ClusterConfig())[0].minutes == UNKNOWN_MINUTES
    assert group_runs(runs, ClusterConfig(time="30"))[0].minutes == 30


def test_memory_is_asked_for_where_it_is_given_or_estimated(tmp_path):
    run = stored(tmp_path, 1.0, memory=4e9)
    assert group_runs([run], ClusterConfig())[0].memory_bytes is None
    assert group_runs([run], ClusterConfig(memory="8GB"))[0].memory_bytes == 8 << 30
    found = group_runs([run], ClusterConfig(memory="auto"))[0].memory_bytes
    assert found is not None
    assert 4e9 < found < 9e9
    four = group_runs([run], ClusterConfig(memory="auto", gpus=4, nodes=2))[0].memory_bytes
    assert four == pytest.approx(4 * found, abs=4)  # of each node, for all of its ranks
    assert group_runs([stored(tmp_path, 1.0)], ClusterConfig(memory="auto"))[0].memory_bytes is None


def test_several_devices_and_several_runs_on_one_device_exclude_each_other():
    with pytest.raises(ValueError, match="runs_at_once above 1 shares one device"):
        ClusterConfig(runs_at_once=2, gpus=2)
