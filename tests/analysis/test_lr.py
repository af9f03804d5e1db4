import json

import numpy as np
import pandas as pd
import pytest
import yaml

from analysis.lr import analyse_transfer, format_transfer, save_transfer, tuned_yaml
from dlcm.errors import UserError
from sweeps import Sweep, plan
from sweeps.doubts import plan_doubts
from tests.sweeps.tiny import sweep_dict

RATES = tuple(1e-3 * 1.5**k for k in range(7))
SIZES = {48: 300_000, 96: 1_200_000, 192: 5_000_000}


def planted(
    exponent: float = 0.0, best: float = RATES[3], kind: str = "mup", sizes=SIZES, noise: float = 0.0
) -> pd.DataFrame:
    """Losses that are parabolas in the log rate, with the lowest point at `best` x (width / 48) ^ `exponent`."""
    rows, generator = [], np.random.default_rng(0)
    for width, n in sizes.items():
        lowest = best * (width / 48) ** exponent
        for rate in RATES:
            loss = 4.0 - 0.1 * np.log(width) + 0.2 * np.log(rate / lowest) ** 2 + noise * generator.normal()
            base = 64 if kind == "mup" else width
            rows.append(
                {
                    "sweep": "planted", "model": "dlcm", "seed": 0, "status": "finished", "tokens": 500_000, "lr_token": rate,
                    "lr_concept": rate, "loss_nats": loss, "params_total": n + 1000, "params_embedding": 1000,
                    "d_token": width, "d_concept": width, "d_token_base": base, "d_concept_base": base,
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


@pytest.mark.parametrize("exponent", [0.0, -0.5, -1.0])
def test_the_planted_movement_of_the_best_rate_is_found(exponent):
    found = analyse_transfer(planted(exponent, best=RATES[5] if exponent else RATES[3]))
    assert found.drift("mup") == pytest.approx(exponent, abs=0.02)
    assert found.transfers is (exponent == 0.0)
    assert found.step == pytest.approx(1.5)


def test_the_best_rate_is_the_vertex_of_the_planted_parabola():
    found = analyse_transfer(planted(best=1.2 * RATES[3]))
    assert [curve.best for curve in found.of("mup")] == pytest.approx([1.2 * RATES[3]] * 3, rel=1e-9)
    assert [curve.lowest for curve in found.of("mup")] == [RATES[3]] * 3


def test_mup_and_standard_are_told_apart_by_their_base_widths():
    both = pd.concat([planted(), planted(-1.0, best=RATES[5], kind="standard")], ignore_index=True)
    found = analyse_transfer(both)
    assert len(found.of("mup")) == len(found.of("standard")) == 3
    assert found.transfers is True
    assert found.shift("standard") == pytest.approx(3, abs=1)
    assert "verdict: the rate transfers; base rate 0.00337" in format_transfer(found)


def test_a_best_rate_at_the_edge_of_the_grid_is_no_transfer():
    found = analyse_transfer(planted(best=RATES[0] / 3))
    assert found.shift("mup") == 0
    assert found.transfers is False
    assert "at the edge of the grid" in format_transfer(found)


def test_diverged_runs_are_never_the_best_and_one_size_has_no_verdict():
    frame = planted(sizes={48: 300_000})
    frame.loc[frame["lr_token"] > RATES[4], ["status", "loss_nats"]] = "diverged", np.nan
    frame.loc[frame["lr_token"] > RATES[4], "loss_nats"] = np.nan
    found = analyse_transfer(frame)
    assert (found.rate, found.transfers, found.shift("mup")) == (RATES[3], None, None)
    assert "nothing is said" in format_transfer(found)


def test_unequal_rates_are_compared_with_the_best_equal_ones():
    frame = planted()
    unequal = frame[frame["lr_token"] == RATES[3]].assign(lr_concept=RATES[4])
    unequal["loss_nats"] += 0.02
    found = analyse_transfer(pd.concat([frame, unequal], ignore_index=True))
    assert list(found.off_diagonal.values()) == pytest.approx([0.02] * 3)


def test_too_few_rates_and_missing_columns_are_told():
    with pytest.raises(UserError, match="three learning rates"):
        analyse_transfer(planted()[lambda f: f["lr_token"] < RATES[2]])
    with pytest.raises(UserError, match="no column d_token_base"):
        analyse_transfer(planted().drop(columns="d_token_base"))


@pytest.mark.slow
def test_a_sweep_takes_its_rates_from_the_file_and_every_row_says_so(tmp_path, dlcm):
    planted().to_parquet(tmp_path / "results.parquet")
    status, out, _ = dlcm("analyze", "lr", str(tmp_path / "results.parquet"), "--json")
    assert status == 0
    assert json.loads(out)["transfers"] is True
    assert {path.name for path in (tmp_path / "lr").iterdir()} == {"lr.yaml", "lr_transfer.png", "lr_transfer.svg"}
    data = sweep_dict(tmp_path, tuned="lr/lr.yaml")
    data["base"]["model"] = {**data["base"]["model"]}
    found = plan(Sweep.from_dict(data, folder=tmp_path))
    optim, model = found.runs[0].config.optim, found.runs[0].config.model
    assert (optim.lr_token, optim.lr_concept, model.d_token_base) == (RATES[3], RATES[3], 64)
    assert found.to_frame()["lr_source"].str.match(r"lr\.yaml sha256:[0-9a-f]{12}$").all()
    data["base"]["optim.lr_token"] = 1e-3
    with pytest.raises(UserError, match=r"both tuned \(lr.yaml\) and optim.lr_token"):
        plan(Sweep.from_dict(data, folder=tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr_token": -1}, "lr_token"),
        ({"schema": 2}, "schema"),
        ({"lr_tokn": 1}, "lr_tokn"),
    ],
)
def test_a_wrong_tuned_file_is_named(change, message, tmp_path):
    content = yaml.safe_load(tuned_yaml(analyse_transfer(planted()))) | change
    (tmp_path / "lr.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=message) as error:
        plan(Sweep.from_dict(sweep_dict(tmp_path, tuned="lr.yaml"), folder=tmp_path))
    assert "lr.yaml" in str(error.value)
    with pytest.raises(UserError, match="neither a known name nor a file"):
        Sweep.from_dict(sweep_dict(tmp_path, tuned="missing.yaml"), folder=tmp_path)


def test_rates_without_a_file_say_where_they_are_from(tmp_path):
    assert set(plan(Sweep.from_dict(sweep_dict(tmp_path))).to_frame()["lr_source"]) == {"default"}
    given = sweep_dict(tmp_path, base_update={"optim.lr_token": 2e-3})
    assert set(plan(Sweep.from_dict(given)).to_frame()["lr_source"]) == {"sweep file"}


@pytest.mark.slow
def test_the_figure_and_the_file_are_written(tmp_path):
    both = pd.concat([planted(noise=0.01), planted(-1.0, best=RATES[5], kind="standard")], ignore_index=True)
    paths = save_transfer(analyse_transfer(both), tmp_path)
    assert all(path.stat().st_size > 200 for path in paths)


def seeds(n: int, noise: float, exponent: float = 0.0, seed: int = 0) -> pd.DataFrame:
    """The planted sweep with several seeds, each run with noise of its own."""
    generator = np.random.default_rng(seed)
    frames = [planted(exponent, best=RATES[3] if not exponent else RATES[5]).assign(seed=i) for i in range(n)]
    found = pd.concat(frames, ignore_index=True)
    found["loss_nats"] += noise * generator.normal(size=len(found))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("n_seeds", [1, 3])
def test_the_interval_of_the_best_rate_covers_the_planted_one(n_seeds):
    """60 sweeps of three sizes: of 180 intervals of 95%, 160 hold it or more (binomial: in all but 0.03% of cases)."""
    inside = []
    for seed in range(60):
        found = analyse_transfer(seeds(n_seeds, 0.02, seed=seed))
        for curve in found.of("mup"):
            low, high = found.interval(curve)
            inside.append(low <= RATES[3] <= high)
    assert np.sum(inside) >= 160


@pytest.mark.slow
def test_the_fitted_best_rate_moves_less_with_noise_than_the_lowest_one():
    """The lowest rate of a grid jumps by whole steps; over 40 sweeps the vertex is nearer to the planted rate."""
    curves = [curve for seed in range(40) for curve in analyse_transfer(seeds(3, 0.03, seed=seed)).of("mup")]
    off = {
        name: np.mean([np.log(getattr(curve, name) / RATES[3]) ** 2 for curve in curves]) for name in ("best", "lowest")
    }
    assert off["best"] < 0.7 * off["lowest"]


def test_the_verdict_says_where_noise_leaves_it_open():
    still, moving = analyse_transfer(seeds(3, 0.005)), analyse_transfer(seeds(3, 0.005, exponent=-1.0))
    assert "more seeds" not in format_transfer(still)
    assert "more seeds" not in format_transfer(moving)
    assert still.shift_interval("mup")[1] < 1 < moving.shift_interval("mup")[0]
    assert "more seeds would settle it" in format_transfer(analyse_transfer(seeds(1, 0.1)))


@pytest.mark.slow
def test_several_results_are_taken_together(tmp_path):
    for name, frame in (("a", planted()), ("b", planted(-1.0, best=RATES[5], kind="standard"))):
        (tmp_path / name).mkdir()
        frame.to_csv(tmp_path / name / "results.csv", index=False)
    from typer.testing import CliRunner

    from analysis.commands import app

    done = CliRunner().invoke(
        app, ["lr", str(tmp_path / "a"), str(tmp_path / "b"), "-o", str(tmp_path / "lr"), "--json"]
    )
    found = json.loads(done.stdout)
    assert {curve["parametrization"] for curve in found["curves"]} == {"mup", "standard"}
    assert found["shift_steps"]["mup"] == pytest.approx(0.0, abs=1e-6)


def test_a_seed_that_shifts_all_rates_does_not_move_the_best_one():
    """Seeds 0.2 nats apart, one of them on the upper rates alone: pooled, its level would tilt the parabola."""
    frame = seeds(3, 0.0)
    frame = frame[(frame["seed"] < 2) | (frame["lr_token"] >= RATES[2])]
    frame["loss_nats"] += 0.2 * frame["seed"]
    found = analyse_transfer(frame)
    for curve in found.of("mup"):
        pooled = np.polyfit(np.log([run.rate for run in curve.runs]), [run.loss for run in curve.runs], 2)
        assert abs(-pooled[1] / (2 * pooled[0]) - np.log(RATES[3])) > 0.1
        assert curve.best == pytest.approx(RATES[3], rel=1e-6)
        assert [curve.levels[i] for i in range(3)] == pytest.approx([-0.2, 0.0, 0.2], abs=1e-9)
        assert curve.residual[0] == pytest.approx(0, abs=1e-12)


def test_rates_that_are_used_far_from_where_they_were_tuned_are_doubted(tmp_path):
    """The sweep has steps of 128 tokens and runs of 1,024."""
    content = yaml.safe_load(tuned_yaml(analyse_transfer(planted())))

    def doubts(**changes):
        (tmp_path / "lr.yaml").write_text(yaml.safe_dump({**content, "tokens": 1024, **changes}))
        return plan_doubts(plan(Sweep.from_dict(sweep_dict(tmp_path, tuned="lr.yaml"), folder=tmp_path)))

    assert doubts() == doubts(tokens=10_240, batch_tokens=256) == ()
    (moved,) = doubts(source=content["source"] | {"transfers": False})
    assert "did not stay in place" in moved
    (batch,) = doubts(batch_tokens=512)
    assert "lr.yaml: 3 of 3 runs have batch_tokens up to 4 times away from the 512" in batch
    (tokens,) = doubts(tokens=20_480)
    assert "tokens up to 20 times away from the 20,480" in tokens


def test_windows_of_several_lengths_are_judged_on_other_text_and_the_plan_says_so(tmp_path):
    data = sweep_dict(tmp_path)
    data["axes"]["grid"]["data.seq_len"] = [32, 64]
    (doubt,) = plan_doubts(plan(Sweep.from_dict(data, folder=tmp_path)))
    assert doubt.startswith("data.seq_len takes 2 values (32, 64)")


def test_a_diverged_run_has_no_loss_in_json_and_no_rate_is_best_where_all_diverged(run, write_results):
    frame = planted()
    frame.loc[frame["lr_token"] == RATES[-1], "status"] = "diverged"
    code, out, err = run("lr", write_results(frame), "--json")
    assert code == 0, err

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    told = json.loads(out, parse_constant=refuse)
    assert {loss for curve in told["curves"] for rate, loss, _ in curve["runs"] if rate == RATES[-1]} == {None}
    assert told["transfers"] is True
    path = write_results(frame.assign(status="diverged"))
    (path.parent / "lr" / "lr.yaml").unlink()
    code, out, err = run("lr", path)
    assert (code, out) == (2, "")
    assert "every run of N = " in err
    assert "diverged" in err
    assert not (path.parent / "lr" / "lr.yaml").exists()


def test_rows_that_say_nothing_are_left_out_counted_and_move_nothing(run, write_results):
    frame = planted(noise=0.01).assign(run_id=[f"r{i}" for i in range(len(planted()))])
    frame["seed"] = frame["seed"].astype(float)
    whole = analyse_transfer(frame.drop(index=[0, 5, 9]))
    spoilt = frame.copy()
    spoilt.loc[0, "loss_nats"], spoilt.loc[5, "lr_token"], spoilt.loc[9, "seed"] = np.nan, 0.0, np.nan
    found = analyse_transfer(pd.concat([spoilt, spoilt.iloc[20:]], ignore_index=True))
    assert [curve.best for curve in found.curves] == [curve.best for curve in whole.curves]
    assert [found.interval(curve) for curve in found.of("mup")] == [whole.interval(curve) for curve in whole.of("mup")]
    assert found.left_out == {
        "given twice": len(frame) - 20,
        "without a loss, though finished": 1,
        "without a learning rate above 0": 1,
        "without a size, width or seed": 1,
    }
    assert "left out: 1 without a learning rate above 0" in format_transfer(found)
    frame["lr_token"] = frame["lr_token"].astype(object)
    frame.loc[3, "lr_token"] = "fast"
    code, _, err = run("lr", path := write_results(frame, "lr.csv"))
    assert code == 2
    assert f"{path}: column 'lr_token' holds 'fast' in row 4; expected a number" in err
