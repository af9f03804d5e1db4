"""What a plan costs: by hand for one run, the choice of the device, the warnings, and the same figures in every form of output."""

import csv
import io
import json
from pathlib import Path

import pytest

from dlcm.errors import UserError
from flops import count
from flops.calibration import Calibration, Point, save_calibration
from flops.hardware import DEFAULT_MFU
from flops.memory import memory
from sweeps import Sweep, plan
from sweeps.costs import Overrides, calibration_runs, cost_plan, costed, format_hours, hardware_of
from tests.sweeps.tiny import sweep_dict

SWEEP = {
    "name": "small",
    "base": {"size": "0.4M", "concept_share": 0.5, "train": {"batch_tokens": 2048}},
    "axes": {"grid": {"compression_ratio": [2, 4]}},
    "budgets": {"tokens": ["100k", "200k"]},
    "baseline": {"match": "parameters"},
}


def planned(cluster=None, **more):
    return plan(Sweep.from_dict({**SWEEP, "cluster": cluster or {}, **more}))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DLCM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def calibrate_cpu(cache, threads=1, rates=((1e6, 1e10), (1e8, 3e10))):
    from importlib import metadata

    from dlcm.provenance import processor_name

    points = tuple(Point(flops, 10**6, 512, False, 0.1, rate, 9) for flops, rate in rates)
    versions = {"torch": metadata.version("torch")}
    save_calibration(
        Calibration(
            processor_name(), "cpu", threads, 9e10, 16 * 2**30, points, (), versions, None, "2026-01-02T00:00:00+00:00"
        )
    )


def test_the_cost_of_one_run_is_that_done_by_hand():
    found = planned({"gpus": 1, "accelerator": "A100", "mfu": 0.25, "price_per_hour": 2.0})
    costs = costed(found)
    run, estimate = found.runs[0], costs.runs[0]
    flops = count(run.config.model, run.config.data.seq_len)
    detect = (flops.components["encoder"] + flops.components["boundary"]) / flops.n_tokens
    # 48 whole steps of 2,048 tokens; then 65,536 tokens of validation forward, and twice through the encoder for the threshold.
    work = 48 * 2048 * flops.training_per_token + 65_536 * (flops.forward_per_token + 2 * detect)
    hours = work / (0.25 * 312e12) / 3600
    assert estimate.hours == pytest.approx(hours)
    assert estimate.price == pytest.approx(2 * hours)
    assert estimate.energy_kwh == pytest.approx(0.4 * hours)
    assert estimate.memory == memory(run.config.model, 2048, bf16=True, gpu=True)


def test_totals_are_the_sums_over_the_runs():
    costs = costed(planned({"gpus": 2, "price_per_hour": 1.5}))
    assert costs.device_hours == pytest.approx(2 * sum(run.hours for run in costs.runs))
    assert costs.price == pytest.approx(1.5 * costs.device_hours)
    assert costs.energy_kwh == pytest.approx(0.7 * costs.device_hours)
    assert costs.longest_hours == max(run.hours for run in costs.runs)
    assert costs.memory_bytes == max(run.memory.total for run in costs.runs)
    assert len(costs.runs) == 6


@pytest.mark.parametrize(
    ("cluster", "given", "name", "n"),
    [
        ({"gpus": 1}, None, "H100", 1),
        ({"gpus": 4, "accelerator": "h200"}, None, "H200", 4),
        ({"gpus": 4, "nodes": 2}, None, "H100", 8),
        ({"gpus": 4, "accelerator": "H200"}, Overrides(accelerator="B200", gpus=2), "B200", 2),
        ({}, Overrides(accelerator="A100"), "A100", 1),
        ({}, Overrides(gpus=8), "H100", 8),
        ({}, None, None, None),
        ({"accelerator": "cpu", "gpus": 1}, None, None, None),
    ],
)
def test_the_command_line_goes_before_the_sweep_and_that_before_the_default(cache, cluster, given, name, n):
    hardware, notes = hardware_of(Sweep.from_dict({**SWEEP, "cluster": cluster}), given)
    if name is None:
        assert hardware is None
        assert "dlcm flops calibrate" in notes[0]
    else:
        assert hardware is not None
        assert (hardware.accelerator.name, hardware.n_devices) == (name, n)


def test_a_calibrated_cpu_is_the_default_of_a_sweep_without_gpus(cache):
    calibrate_cpu(cache, threads=2)
    assert costed(planned()).hardware is None  # a run has one thread there
    costs = costed(planned({"threads": 2}))
    assert costs.hardware is not None
    assert costs.hardware.accelerator.name == "cpu"
    assert all(run.mfu_source.startswith("calibrated") for run in costs.runs)
    assert costs.energy_kwh is None
    assert costs.price is None


def test_a_cpu_asked_for_and_not_calibrated_is_refused(cache):
    with pytest.raises(
        UserError, match="was not calibrated with 1 thread; `dlcm flops calibrate SWEEP.yaml` measures it"
    ):
        costed(planned(), Overrides(accelerator="cpu"))


@pytest.mark.parametrize(
    ("cluster", "words"),
    [
        ({"accelerator": "H1000"}, "unknown accelerator 'H1000'; did you mean 'H100'?"),
        ({"mfu": 0}, "mfu"),
        ({"mfu": 1.2}, "mfu"),
        ({"price_per_hour": -1}, "price_per_hour"),
        ({"price_per_hours": 2}, "unknown key 'cluster.price_per_hours'; did you mean 'price_per_hour'?"),
    ],
)
def test_bad_values_of_the_cluster_are_refused_in_one_line(cluster, words):
    with pytest.raises(UserError) as error:
        Sweep.from_dict({**SWEEP, "cluster": cluster})
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "given",
    [
        Overrides(accelerator="H10"),
        Overrides(gpus=1, mfu=0.0),
        Overrides(accelerator="H100", gpus=0),
        Overrides(gpus=-1),
    ],
)
def test_bad_values_of_the_command_line_are_refused_in_one_line(given):
    with pytest.raises(UserError) as error:
        costed(planned(), given)
    assert "\n" not in str(error.value)


def test_what_stands_in_the_way_is_told():
    large = {"size": "70M", "model": {"vocab_size": 128_000}, "data": {"seq_len": 1024}}
    large |= {"train": {"batch_tokens": 524_288}}
    slow = planned(
        {"gpus": 2, "accelerator": "A100-40GB", "time": "1:00:00"},
        base=SWEEP["base"] | large,
        budgets={"tokens": ["20B"]},
    )
    costs = costed(slow)
    memory_line, time_line, devices_line, mfu_line, epochs_line = costs.warnings
    assert "3 of 3 runs do not fit the 40 GB of A100-40GB" in memory_line
    assert "cluster.time = 1:00:00" in time_line
    assert "2 devices share each run without loss" in devices_line
    assert "fewer than 100M parameters" in mfu_line
    assert "3 of 3 runs go through text more than once" in epochs_line
    most = int(memory_line.split("micro_batch_tokens to ")[1].split(" ")[0].replace(",", ""))
    fitting = planned(
        {"gpus": 1, "accelerator": "A100-40GB", "time": "7-00:00:00", "mfu": 0.3},
        base=SWEEP["base"] | large | {"train": {"batch_tokens": 524_288, "micro_batch_tokens": most}},
        budgets={"tokens": ["20B"]},
    )
    assert costed(fitting).warnings == (epochs_line,)


def test_models_outside_of_the_calibration_are_told(cache):
    calibrate_cpu(cache, rates=((1e4, 1e9), (1e5, 2e9)))
    costs = costed(planned())
    assert any("6 of 6 runs are smaller or larger than any calibrated model" in line for line in costs.warnings)
    assert {run.mfu for run in costs.runs} == {2e9 / 9e10}


def test_no_hardware_gives_no_estimates():
    costs = cost_plan(planned(), None, ["why"])
    assert (costs.runs, costs.device_hours, costs.notes) == ((), None, ("why",))


def test_hours_are_told_in_the_unit_that_suits_them():
    assert [format_hours(x) for x in (1 / 3600, 0.5, 3.0, 100.0)] == ["1 s", "30 min", "3 h", "4.17 d"]


@pytest.fixture
def sweep_file(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps(SWEEP))
    return path


@pytest.mark.slow
def test_table_json_and_csv_carry_the_same_costs(dlcm, sweep_file, tmp_path):
    options = ("--accelerator", "H200", "--gpus", 1, "--price", 4)
    status, table, err = dlcm("sweep", "plan", sweep_file, *options)
    assert status == 0
    assert all(line.startswith("simulating") for line in err.splitlines()), err  # progress, where the machine is slow
    assert table.splitlines()[0].split()[-3:] == ["time", "memory", "price"]
    assert "H200: " in table
    assert "warning: " in table
    told = json.loads(dlcm("sweep", "plan", sweep_file, *options, "--json")[1])
    rows = list(csv.DictReader(io.StringIO(dlcm("sweep", "plan", sweep_file, *options, "--csv", "-")[1])))
    assert len(rows) == len(told["runs"]) == 6
    for row, run in zip(rows, told["runs"]):
        for key in ("hours", "device_hours", "memory_gb", "price", "energy_kwh", "mfu", "tokens_per_s"):
            assert float(row[key]) == pytest.approx(run[key])
        assert run["mfu"] == DEFAULT_MFU
    assert told["costs"]["device_hours"] == pytest.approx(sum(run["device_hours"] for run in told["runs"]))
    assert told["costs"]["price"] == pytest.approx(4 * told["costs"]["device_hours"])
    assert told["costs"]["accelerator"]["name"] == "H200"


def test_a_dry_run_of_submit_shows_the_costs_too(dlcm, sweep_file, tmp_path, cache):
    calibrate_cpu(cache)
    status, out, _ = dlcm("sweep", "submit", sweep_file, "--dir", tmp_path / "runs", "--dry-run")
    assert status == 0
    assert "cpu: " in out
    assert "device-hours" in out
    told = json.loads(dlcm("sweep", "submit", sweep_file, "--dir", tmp_path / "runs", "--dry-run", "--json")[1])
    assert told["plan"]["costs"]["accelerator"]["name"] == "cpu"
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_calibrate_measures_a_sweep_and_plan_reads_it(dlcm, tmp_path, cache):
    path = tmp_path / "one.yaml"
    path.write_text(json.dumps(sweep_dict(tmp_path)))
    assert "no time estimate" in dlcm("sweep", "plan", path)[1]
    status, out, _ = dlcm("flops", "calibrate", path, "--seconds", 0.5, "--json")
    told = json.loads(out)
    assert status == 0
    assert len(told["points"]) == 1
    assert Path(told["path"]).parent == cache / "calibration"
    out = dlcm("sweep", "plan", path)[1]
    assert "cpu: " in out
    assert "calibrated: " in out


def test_calibration_takes_the_smallest_middle_and_largest_model(sweep_file, tmp_path):
    sizes = {**SWEEP, "axes": {"grid": {"size": ["0.3M", "0.5M", "1M", "2M"], "compression_ratio": [4]}}}
    base = {key: value for key, value in SWEEP["base"].items() if key != "size"}
    sweep_file.write_text(json.dumps({**sizes, "base": base, "cluster": {"threads": 3}}))
    configs, threads = calibration_runs(sweep_file, gpu=False)
    costs = [count(config.model, 256).training_per_token for config in configs]
    everything = sorted(run.flops.training_per_token for run in plan(Sweep.from_yaml(sweep_file)).runs)
    assert threads == 3
    assert [costs[0], costs[-1]] == [everything[0], everything[-1]]
    assert len(costs) == 3


def test_calibration_reads_runs_configs_and_models_too(tmp_path):
    config = planned().runs[0].config
    run = tmp_path / "run"
    run.mkdir()
    record = {"schema": 1, "run_id": config.run_id, "config": config.model_dump(mode="json")}
    (run / "run.json").write_text(json.dumps(record))
    (tmp_path / "config.yaml").write_text(json.dumps(record["config"]))
    (tmp_path / "model.json").write_text(json.dumps(record["config"]["model"]))
    assert calibration_runs(run, gpu=False)[0] == [config]
    assert calibration_runs(tmp_path / "config.yaml", gpu=False)[0] == [config]
    assert calibration_runs(tmp_path / "model.json", gpu=False)[0][0].model == config.model
    assert len(calibration_runs(None, gpu=True)[0]) == 3
    with pytest.raises(UserError, match="no such file"):
        calibration_runs(tmp_path, gpu=False)


def test_costs_add_little_to_a_plan_of_many_runs():
    """Estimates are shared between runs of one model, so that 10,000 runs cost as much as their models."""
    import sweeps.costs

    calls = 0
    original = sweeps.costs.run_memory

    def counted(*arguments):
        nonlocal calls
        calls += 1
        return original(*arguments)

    many = planned({"gpus": 1}, axes={"grid": {"compression_ratio": [2, 4], "seed": list(range(20))}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweeps.costs, "run_memory", counted)
        costs = costed(many)
    assert len(costs.runs) == len(many) == 120
    assert calls == 3
