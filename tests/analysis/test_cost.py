from importlib.resources import files

import numpy as np
import pytest

from analysis import analyze, cost_of_results, laws, load_results
from dlcm.errors import UserError
from tests.analysis.conftest import PLANTED_DENSE, PLANTED_DLCM


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """The demo's own plan as a sweep folder, with losses of the planted laws instead of training."""
    from sweeps import Sweep, plan
    from sweeps.store import save_sweep

    folder = tmp_path_factory.mktemp("runs") / "demo"
    made = plan(Sweep.from_yaml(str(files("sweeps") / "recipes" / "demo.yaml")))
    save_sweep(made, folder)
    frame = made.to_frame()
    dense = frame["model"] == "dense"
    x = {"N": frame["params_non_embedding"], "D": frame["tokens"].astype(float), "R": frame["compression_target"]}
    x = {k: v.to_numpy(float) for k, v in x.items()} | {"P": frame["concept_share"].clip(lower=0.1).to_numpy(float)}
    loss = np.where(
        dense,
        laws.CHINCHILLA.predict(PLANTED_DENSE, N=x["N"], D=x["D"]),
        laws.COMPRESSION_AWARE.predict(PLANTED_DLCM, **x),
    )
    frame = frame.assign(
        loss_nats=loss * np.exp(np.random.default_rng(0).normal(0, 0.003, len(frame))),
        bits_per_byte=loss / 2,
        status="finished",
        tokens_per_concept=x["R"],
        tokens_per_concept_train=x["R"],
        flops_train=frame["flops_train_planned"],
    )
    frame.to_parquet(folder / "results.parquet")
    return folder


def test_the_sweeps_cost_function_prices_its_own_runs(planned):
    data = load_results(planned)
    cost = cost_of_results(planned)
    # real widths against integer ones: the planned shapes hit N and P within 1%, the FLOPs within a few percent
    np.testing.assert_allclose(cost(data.N, data.D, data.R, data.P), data.C, rtol=0.06)


@pytest.mark.slow
def test_a_whole_analysis_of_a_sweep_folder_needs_nothing_but_the_folder(planned, tmp_path):
    found = analyze(planned, tmp_path / "out", n_bootstrap=5)
    assert set(found.optima) == {"dense", "dlcm"}
    assert found.savings is not None
    assert not found.missing


def test_results_that_stand_alone_need_the_vocabulary(demo_frame, write_results):
    path = write_results(demo_frame)
    with pytest.raises(UserError, match="--vocab-size"):
        cost_of_results(path)
    assert cost_of_results(path, vocab_size=4096)(1e6, 1e8, 4.0, 0.5) > 0
    mixed = demo_frame.assign(seq_len=np.where(np.arange(len(demo_frame)) % 2, 256, 512))
    with pytest.raises(UserError, match="runs differ in seq_len"):
        cost_of_results(write_results(mixed), vocab_size=4096)


def test_other_conventions_are_not_priced(demo_frame, write_results):
    from analysis.cost import require_priced

    with pytest.raises(UserError, match="non_embedding"):
        require_priced(load_results(write_results(demo_frame), n="total").convention)
