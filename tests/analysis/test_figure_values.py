"""What the figures draw is what was planted: brute force, closed forms and counts against what stands on the axes."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from analysis import ResultsData, fit, laws, load_results, optimum
from analysis.plots import format_power, new_figure
from analysis.plots_fit import plot_fit
from analysis.plots_savings import BaselineSize, plot_savings, savings_by_size
from analysis.plots_shares import find_slice, loss_surface, plot_iso_loss, plot_share_at_size, share_frame
from analysis.plots_training import RatioCurve, load_ratio_curves, plot_decay_gain, plot_ratio_over_training
from analysis.savings import Savings
from dlcm.errors import UserError
from dlcm.record import begin_metrics
from tests.analysis.conftest import PLANTED_DLCM, cost

DECAY = {"k": 0.02, "a": 1.5, "b": 0.1, "c": 0.02}


def predict(values, N, D, R, P):
    """The compression-aware law, written out (eq 22) without its offsets."""
    v = values
    tokens = v["A_t"] / (N * (1 - P)) ** v["d1"] + v["A_d"] / D ** v["a"]
    return v["E0"] + tokens + v["A_c"] * R ** v["g"] / (N * P) ** v["d2"]


def brute_force(values, budget, R, P, ends=(1e5, 6e6)):
    """Least loss over a fine grid of sizes, D from the cost."""
    N = np.geomspace(*ends, 4001)
    return predict(values, N, budget / cost(N, 1.0, R, P), R, P).min()


@pytest.fixture(scope="module")
def product():
    """Every size, number of tokens, ratio and share, without noise."""
    grid = np.meshgrid([1e6, 4e6, 2e7], [1e8, 1e9], [2.0, 4.0, 8.0], [0.3, 0.5, 0.7])
    N, D, R, P = (v.ravel() for v in grid)
    loss = predict(PLANTED_DLCM, N, D, R, P)
    model = ["dlcm"] * len(N)
    return ResultsData.from_arrays(N=N, D=D, R=R, P=P, C=cost(N, D, R, P), loss=loss, model=model)


@pytest.fixture
def planted_law():
    """Stands for a fit that found the planted constants."""
    return SimpleNamespace(predict=lambda **x: predict(PLANTED_DLCM, x["N"], x["D"], x["R"], x["P"]))


def test_the_slice_is_the_largest_size_at_which_all_shares_and_ratios_were_run(product):
    part = find_slice(product)
    np.testing.assert_allclose([part.N, part.D], [2e7, 1e9])
    assert len(part.rows) == 9
    # where another size was run at more ratios and shares, it is that one
    fewer = product.take((product.N < 1e7) | (product.P < 0.6))
    np.testing.assert_allclose(find_slice(fewer).N, 4e6)
    with pytest.raises(UserError, match="no model size was run at two shares P"):
        find_slice(product.take(product.P == 0.5))


@pytest.mark.parametrize("price", [None, cost])
def test_loss_over_the_share_is_the_law_at_equal_tokens_or_at_equal_flops(product, planted_law, price):
    # tokens that scatter, as they do where a budget is spent on models of several costs
    rng = np.random.default_rng(1)
    D = product.D * np.exp(rng.uniform(-0.3, 0.3, len(product)))
    loss = predict(PLANTED_DLCM, product.N, D, product.R, product.P)
    part = find_slice(dataclasses.replace(product, D=D, loss=loss))
    _, ax = new_figure()
    plot_share_at_size(ax, part, planted_law, cost=price)
    budget = np.exp(np.mean(np.log(cost(part.N, part.D, part.rows.R, part.rows.P))))
    for ratio, points, line in zip((2.0, 4.0, 8.0), ax.collections, ax.lines):
        for P, y in [*points.get_offsets(), *line.get_xydata()]:
            tokens = part.D if price is None else budget / cost(part.N, 1.0, ratio, P)
            assert y == pytest.approx(predict(PLANTED_DLCM, part.N, tokens, ratio, P), rel=1e-9)
    assert ax.get_ylabel() == f"loss at equal {'D' if price is None else 'FLOPs'} (nats/token)"


def test_the_surface_of_equal_loss_is_that_of_a_grid_search(adequate_fits):
    result, budget = adequate_fits["dlcm"], 3e13
    surface = loss_surface(result, cost, budget, n=5)
    assert (surface.ratios[0], surface.ratios[-1]) == pytest.approx(result.ranges["R"])
    for i, P in enumerate(surface.shares):
        for k, R in enumerate(surface.ratios):
            ends = result.ranges["N"]
            assert surface.loss[i, k] == pytest.approx(brute_force(result.values, budget, R, P, ends), abs=2e-6)
    # and nowhere below the optimum of the same budget
    best = optimum(result, cost, budget, flat=None)
    assert surface.loss.min() >= best.loss - 1e-9


def test_lines_of_equal_loss_are_nats_above_the_optimum_which_has_its_intervals(
    adequate_fits, adequate_frame, write_results
):
    result, budget = adequate_fits["dlcm"], 3e12
    best = optimum(result, cost, budget, flat=None)
    _, ax = new_figure()
    plot_iso_loss(ax, loss_surface(result, cost, budget), best, load_results(write_results(adequate_frame)))
    lines = ax.collections[1]
    for height, path in zip(lines.levels, lines.get_paths()):
        for R, P in path.vertices[::7]:
            assert brute_force(result.values, budget, R, P, result.ranges["N"]) - best.loss == pytest.approx(
                height, rel=0.1
            )
    (star,) = ax.containers
    assert star[0].get_xydata().ravel() == pytest.approx([best["R"].value, best["P"].value])
    across, up = (bar.get_segments()[0] for bar in star[2])
    assert across[:, 0] == pytest.approx([best["R"].low, best["R"].high])
    assert up[:, 1] == pytest.approx([best["P"].low, best["P"].high])
    at, others = (points for points in ax.collections[2:] if points.get_label() in ("other runs", "runs at budget"))
    assert len(at.get_offsets()) + len(others.get_offsets()) == 144


def test_with_one_ratio_there_is_no_surface(adequate_fits):
    result = adequate_fits["dlcm"]
    one = dataclasses.replace(result, ranges={**result.ranges, "R": (4.0, 4.0)})
    with pytest.raises(UserError, match="needs runs at two or more tokens per concept R; the data hold one"):
        loss_surface(one, cost, 3e12)


@pytest.mark.slow
def test_savings_by_size_are_those_of_a_grid_search(adequate_fits):
    dlcm, dense = adequate_fits["dlcm"], adequate_fits["dense"]
    found = savings_by_size(dlcm, dense, cost, [3e12, 3e13, 1e14])
    assert [entry.size for entry in found] == sorted(entry.size for entry in found)
    R, P = np.meshgrid(np.geomspace(*dlcm.ranges["R"], 9), np.linspace(*dlcm.ranges["P"], 81))
    N = np.geomspace(*dense.ranges["N"], 3001)
    for entry in found:
        least = min(
            brute_force(dlcm.values, entry.savings.budget, r, p, dlcm.ranges["N"]) for r, p in zip(R.ravel(), P.ravel())
        )
        flops = entry.savings.dense_flops
        loss = laws.CHINCHILLA.predict(dense.values, N=N, D=flops / cost(N, 1.0, 1.0, 0.0))
        # the dense model that needs these FLOPs reaches that loss, at that size
        assert loss.min() == pytest.approx(least, abs=3e-5)
        assert N[np.argmin(loss)] == pytest.approx(entry.size, rel=0.01)
        assert entry.savings.share == pytest.approx(1 - entry.savings.budget / flops)
    assert [entry.is_bound for entry in found] == [False, False, False]


def size(
    N: float,
    share: float,
    *,
    bound: bool = False,
    edge: bool = False,
    outside: float = 0.0,
    low: float | None = None,
) -> BaselineSize:
    ends = (None, None) if low is None else (low, share + 0.05)
    saved = Savings(1e15, "training FLOPs", None, 1e15 / (1 - share), share, *ends, {}, "ok", "")
    return BaselineSize(N, saved, bound, edge, outside)


def test_savings_are_drawn_in_percent_hollow_beyond_the_runs_and_without_sizes_at_the_edge():
    _, ax = new_figure()
    plot_savings(
        ax, [size(1e5, 0.9, bound=True), size(3e5, 0.1, low=-3.0), size(1e6, 0.2, low=0.15), size(3e6, 0.3, outside=1)]
    )
    inside, beyond = ax.containers
    np.testing.assert_allclose(inside[0].get_xydata(), [[3e5, 10], [1e6, 20]])
    np.testing.assert_allclose(beyond[0].get_xydata(), [[3e6, 30]])
    assert (inside[0].get_markerfacecolor(), beyond[0].get_markerfacecolor()) == ("#0072B2", "white")
    bars = [segment[:, 1].tolist() for segment in inside[2][0].get_segments()]
    np.testing.assert_allclose(bars, [[-300, 15], [15, 25]])
    assert -130 < ax.get_ylim()[0] < -100  # one endless interval does not flatten the others
    with pytest.raises(UserError, match="smallest or largest that was run at every budget"):
        plot_savings(ax, [size(1e5, 0.9, bound=True)])


def test_savings_of_a_dlcm_at_an_edge_of_its_runs_are_drawn_as_what_they_are_at_least():
    _, ax = new_figure()
    plot_savings(ax, [size(3e5, 0.1, low=0.05), size(1e6, -0.2, low=-0.3, edge=True)])
    found = {c.get_label(): c[0] for c in ax.containers}
    at_least = found["at least: DLCM at an edge of its runs"]
    np.testing.assert_allclose(at_least.get_xydata(), [[1e6, -20]])
    assert (at_least.get_marker(), at_least.get_markerfacecolor()) == ("^", "white")


def test_ratios_over_training_are_read_from_the_logs_of_the_runs(adequate_frame, write_results, tmp_path):
    data = load_results(write_results(adequate_frame))
    with pytest.raises(UserError, match=r"has metrics.jsonl here; give the sweep folder"):
        load_ratio_curves(tmp_path, data)
    one, other = data.dlcm.run_ids[4], data.dlcm.run_ids[0]
    for run_id, ratio in ((one, 5.0), (other, 2.5)):
        tokens = float(data.D[data.run_ids.index(run_id)])
        lines = [{"tokens": tokens * k / 4, "tokens_per_concept": ratio - k / 4 if k else None} for k in range(5)]
        (tmp_path / run_id).mkdir()
        begin_metrics(tmp_path / run_id / "metrics.jsonl", lines)
    with (tmp_path / one / "metrics.jsonl").open("a") as file:
        file.write('{"tokens": 1')  # being written
    found = {curve.run_id: curve for curve in load_ratio_curves(tmp_path, data)}
    assert found.keys() == {one, other}
    np.testing.assert_allclose(found[one].done, [25, 50, 75, 100])
    np.testing.assert_allclose(found[one].ratio, [4.75, 4.5, 4.25, 4.0])
    assert found[one].evaluated == data.frame["tokens_per_concept"][data.run_ids.index(one)]


@pytest.mark.parametrize("n", [3, 30])
def test_few_runs_are_drawn_one_by_one_and_many_as_median_and_middle_90_percent(n):
    rng = np.random.default_rng(0)
    done = np.linspace(10, 100, 10)
    curves = [RatioCurve(f"r{i}", 4.0, done, 4 + rng.normal(0, 0.2, 10), 4.0 + 0.01 * i) for i in range(n)]
    _, ax = new_figure()
    plot_ratio_over_training(ax, curves)
    all_ratios = np.array([curve.ratio for curve in curves])
    if n == 3:
        assert len(ax.lines) == 3
        np.testing.assert_allclose([line.get_ydata() for line in ax.lines], all_ratios)
    else:
        (median,) = ax.lines
        at = np.isin(median.get_xdata(), done)
        np.testing.assert_allclose(median.get_ydata()[at], np.median(all_ratios, axis=0))
        band = next(c for c in ax.collections[1:] if len(c.get_paths()[0].vertices) > 50).get_paths()[0].vertices
        ends = np.percentile(all_ratios, [5, 95], axis=0)
        for x, low, high in zip(done, *ends):
            assert band[band[:, 0] == x][:, 1].min() == pytest.approx(low)
            assert band[band[:, 0] == x][:, 1].max() == pytest.approx(high)
    points = ax.collections[-1].get_offsets()
    np.testing.assert_allclose(points[:, 1], [curve.evaluated for curve in curves])


def test_the_decay_gain_is_drawn_with_the_planted_law():
    R, N, stable = (v.ravel() for v in np.meshgrid([2.0, 4.0, 8.0], [1e6, 1e7], np.linspace(3, 6, 6)))
    gain = DECAY["k"] * stable ** DECAY["a"] * R ** DECAY["b"] * N ** DECAY["c"]
    data = ResultsData.from_arrays(
        N=N, D=1e9, R=R, P=0.5, loss=stable * (1 - gain), model=["dlcm"] * len(N), loss_nats_stable=stable
    )
    result = fit(laws.DECAY_GAIN, data, n_bootstrap=0)
    _, ax = new_figure()
    plot_decay_gain(ax, data, result)
    for ratio, points, line in zip((2.0, 4.0, 8.0), ax.collections, ax.lines):
        own = ratio == R
        np.testing.assert_allclose(points.get_offsets(), np.column_stack([stable, 100 * gain])[own])
        x, y = line.get_xydata().T
        middle = np.median(N)
        truth = 100 * DECAY["k"] * x ** DECAY["a"] * ratio ** DECAY["b"] * middle ** DECAY["c"]
        np.testing.assert_allclose(y, truth, rtol=1e-4)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["R = 2", "R = 4", "R = 8"]


def test_points_beside_a_law_keep_their_distance_from_it(product, adequate_fits):
    """Every run 1% above the law lies 1% above its line, whatever its own D, R and P."""
    result = adequate_fits["dlcm"]
    loss = 1.01 * result.predict(N=product.N, D=product.D, R=product.R, P=product.P)
    data = dataclasses.replace(product, loss=loss, convention=result.convention)
    _, ax = new_figure()
    plot_fit(ax, data, result)
    for points, D in zip(ax.collections, (1e8, 1e9)):
        N, drawn = points.get_offsets().T
        np.testing.assert_allclose(drawn, 1.01 * result.predict(N=N, D=D, R=4.0, P=0.5), rtol=1e-9)


def test_the_frame_of_the_shares_holds_the_best_runs_and_leaves_the_worst_sizes_out():
    best, losses = [2.64, 2.70, 2.78], np.array([2.64, 2.70, 2.78, 2.9, 4.0])
    low, high = share_frame(best, losses)
    assert low < 2.64 < 2.78 < 2.9 < high < 4.0
    assert share_frame(best, losses[:4]) is None
    assert share_frame([2.6, 2.6], losses) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [(9.96e15, "$10^{16}$"), (1e16, "$10^{16}$"), (3.04e14, "$3{\\times}10^{14}$"), (2.5e-3, "$2.5{\\times}10^{-3}$")],
)
def test_a_mantissa_never_rounds_to_ten(value, text):
    assert format_power(value) == text
