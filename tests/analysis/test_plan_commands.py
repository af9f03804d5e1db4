"""`dlcm sweep plan` with what the sweep will teach, from the command line."""

import csv
import io
import json

import numpy as np
import pytest

from analysis import fit, laws
from analysis.data import ResultsData

from .test_ensemble import grid
from .test_expect import small_sweep


@pytest.fixture
def sweep_file(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(small_sweep(cluster={"gpus": 1, "accelerator": "H100", "price_per_hour": 2.0}).to_yaml())
    return path


@pytest.fixture
def fit_file(tmp_path):
    data, rng = grid(laws.CHINCHILLA, R=(1,), P=(0,)), np.random.default_rng(0)
    noisy = ResultsData.from_arrays(
        N=data.N, D=data.D, C=data.C, loss=data.loss * np.exp(rng.normal(0, 0.003, len(data)))
    )
    path = tmp_path / "dense.json"
    fit(laws.CHINCHILLA, noisy, n_bootstrap=0).save(path)
    return path


@pytest.mark.slow
def test_a_plan_tells_runs_costs_and_expected_intervals(dlcm, sweep_file):
    status, out, _ = dlcm("sweep", "plan", sweep_file, "--target", "1e20")
    assert status == 0
    assert "90 runs (81 dlcm, 9 dense)" in out
    assert "H100: " in out
    assert "device-hours" in out
    assert "least loss at 1e+20 training FLOPs" in out
    assert "without R = 4" in out
    # The costs stand above what takes longer to find out.
    assert out.index("device-hours") < out.index("What it will teach")


@pytest.mark.slow
def test_json_holds_every_interval_and_every_change(dlcm, sweep_file):
    status, out, _ = dlcm("sweep", "plan", sweep_file, "--target", "1e20", "--noise", "0.01", "--json")
    told = json.loads(out)
    assert status == 0
    assert len(told["runs"]) == 90
    expected = told["expected"]
    assert [e["family"] for e in expected["expected"]] == ["dlcm", "dense"]
    assert expected["expected"][0]["prior"]["noise"] == 0.01
    constants = {c["name"]: c for c in expected["expected"][0]["constants"]}
    assert constants["a"]["low"] < constants["a"]["planted"] < constants["a"]["high"]
    assert {"without", "with"} == {v["op"] for v in expected["variations"]}


def test_without_expectations_only_runs_and_costs_are_told(dlcm, sweep_file):
    out = dlcm("sweep", "plan", sweep_file, "--no-expect")[1]
    assert "What it will teach" not in out
    assert json.loads(dlcm("sweep", "plan", sweep_file, "--no-expect", "--json")[1])["expected"] is None


def test_csv_on_stdout_is_csv_alone(dlcm, sweep_file):
    out = dlcm("sweep", "plan", sweep_file, "--csv", "-")[1]
    assert len(list(csv.DictReader(io.StringIO(out)))) == 90


@pytest.mark.slow
def test_an_earlier_fit_is_the_prior_of_its_family(dlcm, sweep_file, fit_file):
    status, out, _ = dlcm("sweep", "plan", sweep_file, "--target", "1e20", "--prior", fit_file, "--json")
    assert status == 0
    dlcm_family, dense = json.loads(out)["expected"]["expected"]
    assert "shipped default" in dlcm_family["prior"]["source"]
    assert str(fit_file) in dense["prior"]["source"]
    assert dense["prior"]["noise"] == pytest.approx(0.003, rel=0.3)


@pytest.mark.many
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--target", "0"), "target = 0"),
        (("--target", "5"), "pays for no model"),
        (("--noise", "0.9"), "standard deviation of log loss"),
        (("--prior", "absent.json"), "absent.json"),
        (("--accelerator", "H1000"), "H1000"),
    ],
)
def test_an_expectation_that_cannot_be_had_is_one_line(dlcm, sweep_file, options, words):
    status, _, err = dlcm("sweep", "plan", sweep_file, *options)
    assert status == 2
    assert words in err
    assert len(err.strip().splitlines()) == 1


def test_a_file_that_is_no_fit_is_refused(dlcm, sweep_file, tmp_path):
    (tmp_path / "other.json").write_text("{}")
    status, _, err = dlcm("sweep", "plan", sweep_file, "--prior", tmp_path / "other.json")
    assert status == 2
    assert "fit again" in err
