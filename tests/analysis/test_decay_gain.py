"""The law of the decay's gain (eq 23) from a sweep whose runs share trunks: the gain follows from what was collected."""

import json

import numpy as np
import pandas as pd
import pytest

from analysis import laws, load_results
from analysis.inputs import prepare
from dlcm.errors import UserError
from sweeps.collect import collect
from sweeps.store import load_sweep, save_sweep
from tests.analysis.conftest import make_frame
from tests.sweeps.tiny import finish, make_plan

TRUTH = {"k": 0.012, "a": 1.5, "b": 0.2, "c": -0.05}


@pytest.fixture
def trunks() -> pd.DataFrame:
    """Four sizes, three ratios, three lengths: the longest run of each family is the trunk of the others."""
    frame = make_frame(
        [1e5, 5e5, 2e6, 6e6], [1e12, 4e12, 1.6e13], dense_sizes=[5e5], shares=[0.5], ratios=(2.0, 4.0, 8.0)
    )
    family = frame["model"] + frame["params_total"].astype(str) + frame["compression_target"].astype(str)
    longest = frame["tokens"].groupby(family).transform("idxmax")
    trunk = frame["run_id"].loc[longest].to_numpy()
    frame["trunk"] = pd.Series(trunk).where(trunk != frame["run_id"])
    N = (frame["params_total"] - frame["params_embedding"]).to_numpy(float)
    stable = frame["loss_nats"].to_numpy() * 1.03
    gain = laws.DECAY_GAIN.predict(TRUTH, N=N, R=frame["tokens_per_concept"].to_numpy(), stable_loss=stable)
    return frame.assign(loss_nats_stable=stable, loss_nats=stable * (1 - gain))


def test_the_law_is_recovered_from_a_table_of_trunks_and_branches(trunks, write_results, run, tmp_path):
    path = write_results(trunks)
    code, out, err = run("fit", path, "--law", "decay_gain", "--bootstrap", 20, "--out", tmp_path / "gain.json")
    assert code == 0, err
    found = json.loads((tmp_path / "gain.json").read_text())
    assert {p["name"]: p["value"] for p in found["parameters"]} == pytest.approx(TRUTH, rel=1e-6)
    # dense runs are of another law, and branches of one trunk are resampled together
    assert (found["n_runs"], found["n_clusters"]) == (36, 12)
    assert "decay_gain(N, R, stable_loss) = k L_stable^a R^b N^c" in out
    assert "bootstrap by trunk (12 for 36 runs)" in out


def test_runs_whose_gain_is_not_known_are_left_out_with_the_reason(trunks, write_results):
    worse, silent = trunks.index[trunks["model"] == "dlcm"][:2]
    trunks.loc[worse, "loss_nats"] = 1.01 * trunks.loc[worse, "loss_nats_stable"]
    trunks.loc[silent, "loss_nats_stable"] = np.nan
    data = load_results(write_results(trunks)).dlcm
    rows = prepare(laws.DECAY_GAIN, data)
    assert len(rows) == 34
    reasons = {e.run_id: e.reason for e in rows.exclusions}
    assert "its decay did not lower the loss" in reasons[trunks.loc[worse, "run_id"]]
    assert "train.measure_stable: true" in reasons[trunks.loc[silent, "run_id"]]
    trunks["loss_nats_stable"] = np.nan
    with pytest.raises(UserError, match=r"no run is left for law decay_gain.*measure_stable: true"):
        prepare(laws.DECAY_GAIN, load_results(write_results(trunks)).dlcm)


def test_a_users_own_columns_serve_as_well(trunks, tmp_path, run):
    own = pd.DataFrame(
        {"size": trunks["params_total"] - trunks["params_embedding"], "seen": trunks["tokens"], "ratio": trunks["tokens_per_concept"],
         "before": trunks["loss_nats_stable"], "after": trunks["loss_nats"], "kind": trunks["model"]}
    )  # fmt: skip
    own.to_csv(tmp_path / "mine.csv", index=False)
    columns = "N=size,D=seen,R=ratio,loss=after,loss_nats_stable=before,family=kind"
    code, out, err = run(
        "fit", tmp_path / "mine.csv", "--columns", columns, "--law", "decay_gain", "--bootstrap", 0, "--json"
    )
    assert code == 0, err
    assert {p["name"]: p["value"] for p in json.loads(out)["parameters"]} == pytest.approx(TRUTH, rel=1e-6)


def test_what_a_sweep_collects_of_branches_is_what_the_law_takes(tmp_path):
    """Records of runs as training leaves them -> results.parquet -> gains, against the records themselves."""
    plan = make_plan(
        tmp_path,
        seeds=(0, 1),
        base_update={"optim.warmup_tokens": 256, "train.measure_stable": True},
        budgets={"tokens": [128 * n for n in (20, 30, 40)]},
    )
    save_sweep(plan, tmp_path / "s")
    rng, expected = np.random.default_rng(0), {}
    for stored, planned in zip(load_sweep(tmp_path / "s").runs, plan.runs):
        stable, end = rng.uniform(4.0, 5.0), rng.uniform(3.0, 3.9)
        trunk = planned.trunk_run if planned.trunk_run != stored.run_id else None
        finish(
            stored, loss_nats=end, loss_nats_stable=stable, trunk=trunk, trunk_tokens=128 * planned.steps_shared,
            tokens_per_concept=rng.uniform(2, 8),
        )  # fmt: skip
        expected[stored.run_id] = (stable - end) / stable
    collect(tmp_path / "s")
    rows = prepare(laws.DECAY_GAIN, load_results(tmp_path / "s"))
    assert dict(zip(rows.run_ids, rows.values("decay_gain"))) == pytest.approx(expected)
    assert len(set(rows.clusters)) == 2
