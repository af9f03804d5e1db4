"""The search against closed forms, optimality conditions and brute force."""

import numpy as np
import pytest

from analysis import laws
from analysis.box import minimise_in_box
from analysis.budget import find_root, ratios_for_budget, sizes_for_budget, tokens_for_budget
from analysis.cost import Shapes
from analysis.search import Search
from dlcm.errors import UserError
from sweeps.shapes import Parts, ShapeRule

CHINCHILLA = {"E": 1.8, "A": 480.0, "alpha": 0.35, "B": 2100.0, "beta": 0.37}
DLCM = {
    "E0": 1.7, "A_t": 60.0, "t_t": 2e6, "d1": 0.3, "A_c": 40.0, "g": 0.4, "t_c": 1e6, "d2": 0.29, "A_d": 900.0, "t_d": 1e6, "a": 0.34,
}  # fmt: skip
SHAPES = Shapes(8192, 1024, ShapeRule(heads_per_kv=2), Parts(d_head=64))
BOX = {"N": (1e7, 1e11), "R": (1.2, 16.0), "P": (0.1, 0.9)}


def eq22(N, D, R, P, v=DLCM):
    """Eq 22 written out, to share nothing with the law's own arithmetic."""
    token = v["A_t"] / (N * (1 - P) + v["t_t"]) ** v["d1"]
    concept = v["A_c"] * R ** v["g"] / (N * P + v["t_c"]) ** v["d2"]
    return v["E0"] + token + concept + v["A_d"] / (D + v["t_d"]) ** v["a"]


def scattered(values, n, scale, seed=0):
    rng = np.random.default_rng(seed)
    return {name: value * np.exp(scale * rng.normal(size=n)) for name, value in values.items()}


def test_many_sets_of_constants_reach_their_closed_form_under_6nd():
    many, budget = scattered(CHINCHILLA, 300, 0.05), 1e21
    search = Search(laws.CHINCHILLA, lambda N, D, R, P: 6 * N * D, budget, {"N": (1e7, 1e13), "R": (1, 1), "P": (0, 0)})
    found = search.minimise_many(many)
    a, b = many["alpha"], many["beta"]
    G = (a * many["A"] / (b * many["B"])) ** (1 / (a + b))
    np.testing.assert_allclose(found[:, 0], G * (budget / 6) ** (b / (a + b)), rtol=1e-6)
    np.testing.assert_allclose(found[:, 1], (budget / 6) ** (a / (a + b)) / G, rtol=1e-6)


def slopes(f, x, step=1e-4):
    """Central differences by log N, log D, log R and P, extrapolated to step 0."""
    out = []
    for i in range(4):
        e = np.eye(4)[i]
        once, twice = ((f(x + h * e) - f(x - h * e)) / (2 * h) for h in (step, 2 * step))
        out.append((4 * once - twice) / 3)
    return np.array(out)


def conditions(best, cost, v=DLCM):
    """dL/dx over dC/dx of log N, log D, log R and P, by finite differences of the law written out and of the cost."""
    x = np.array([np.log(best[0]), np.log(best[1]), np.log(best[2]), best[3]])
    natural = lambda y: (np.exp(y[0]), np.exp(y[1]), np.exp(y[2]), y[3])  # noqa: E731
    return slopes(lambda y: eq22(*natural(y), v), x), slopes(lambda y: np.log(cost(*natural(y))), x)


# R pays through FLOPs alone: with P free as well its best value is usually an end of the range, so that one
# of the two is held where all that is open should be interior.
INNER = [({"P": (0.5, 0.5)}, [0, 1, 2]), ({"R": (4.0, 4.0)}, [0, 1, 3])]


@pytest.mark.parametrize(("held", "open_"), INNER, ids=["share held", "ratio held"])
@pytest.mark.parametrize("served", [None, 3e10])
def test_with_real_costs_an_interior_optimum_satisfies_lagranges_conditions(held, open_, served):
    cost = SHAPES.training() if served is None else SHAPES.lifetime(served)
    best = Search(laws.COMPRESSION_AWARE, cost, 1e20, BOX | held).minimise(DLCM | {"g": 0.2})
    for i in set(open_) - {1}:
        low, high = BOX["NDRP"[i]]
        assert low * 1.05 < best[i] < high * 0.95
    loss, price = conditions(best, cost, DLCM | {"g": 0.2})
    multipliers = (loss / price)[open_]
    np.testing.assert_allclose(multipliers, multipliers[1], rtol=1e-5)
    assert multipliers[1] < 0
    assert cost(*best[:4]) == pytest.approx(1e20, rel=1e-10)
    assert best[4] == pytest.approx(eq22(*best[:4], DLCM | {"g": 0.2}), rel=1e-12)


@pytest.mark.parametrize(("g", "edge", "outwards"), [(0.1, 6.0, +1), (0.9, 2.0, -1)])
def test_on_the_edge_of_the_box_the_slope_points_outwards_and_the_rest_is_stationary(g, edge, outwards):
    cost, v = SHAPES.training(), DLCM | {"g": g}
    best = Search(laws.COMPRESSION_AWARE, cost, 1e20, BOX | {"R": (2.0, 6.0)}).minimise(v)
    assert best[2] == pytest.approx(edge, rel=1e-9)
    loss, price = conditions(best, cost, v)
    multiplier = loss[1] / price[1]
    np.testing.assert_allclose((loss / price)[[0, 3]], multiplier, rtol=1e-5)
    # the loss still falls along the budget beyond the edge
    assert outwards * (loss[2] - multiplier * price[2]) < 0


@pytest.mark.parametrize(("held", "open_"), INNER, ids=["share held", "ratio held"])
def test_inference_at_fixed_tokens_satisfies_the_conditions_of_n_r_and_p(held, open_):
    cost, v = SHAPES.inference(), DLCM | {"g": 0.2}
    best = Search(laws.COMPRESSION_AWARE, cost, 2e9, BOX | held, solve="N", tokens=3e10).minimise(v)
    assert best[1] == 3e10
    assert cost(*best[:4]) == pytest.approx(2e9, rel=1e-9)
    loss, price = conditions(best, cost, v)
    assert price[1] == 0
    multipliers = [loss[i] / price[i] for i in open_ if i != 1]
    assert multipliers[1] == pytest.approx(multipliers[0], rel=1e-5)


@pytest.mark.parametrize("kind", ["training", "inference", "lifetime"])
def test_no_point_of_a_brute_grid_is_better(kind):
    many = scattered(DLCM, 40, 0.05)
    cost, budget = {
        "training": (SHAPES.training(), 1e20),
        "inference": (SHAPES.inference(), 2e9),
        "lifetime": (SHAPES.lifetime(1e11), 3e20),
    }[kind]
    solve, tokens = ("N", 3e10) if kind == "inference" else ("D", None)
    found = Search(laws.COMPRESSION_AWARE, cost, budget, BOX, solve=solve, tokens=tokens).minimise_many(many)
    rng = np.random.default_rng(1)
    N, R = (np.exp(rng.uniform(*np.log(BOX[k]), 30_000)) for k in "NR")
    P = rng.uniform(*BOX["P"], 30_000)
    if solve == "N":
        D = np.full_like(P, tokens)
        N = sizes_for_budget(cost, budget, D, R, P)
    else:
        D = tokens_for_budget(cost, budget, N, R, P)
    with np.errstate(invalid="ignore"):
        for i in range(40):
            assert found[i, 4] <= np.nanmin(eq22(N, D, R, P, {k: x[i] for k, x in many.items()})) + 1e-12
    np.testing.assert_allclose(cost(*found.T[:4]), budget, rtol=1e-9)


def test_budgets_of_their_own_give_each_set_what_it_finds_alone():
    cost, budgets = SHAPES.training(), np.geomspace(1e19, 1e21, 3)
    together = Search(laws.COMPRESSION_AWARE, cost, budgets, BOX).minimise_many(DLCM)
    for row, budget in zip(together, budgets):
        np.testing.assert_allclose(row, Search(laws.COMPRESSION_AWARE, cost, budget, BOX).minimise(DLCM), rtol=1e-6)


def test_a_lifetime_without_served_tokens_is_training_and_serving_many_makes_models_small():
    box = {"N": (1e7, 1e13), "R": (1, 1), "P": (0, 0)}
    sizes = [Search(laws.CHINCHILLA, cost, 1e21, box).minimise(CHINCHILLA)[0] for cost in (
        SHAPES.training(), SHAPES.lifetime(0), SHAPES.lifetime(1e10), SHAPES.lifetime(1e12), SHAPES.lifetime(1e13))]  # fmt: skip
    assert sizes[1] == pytest.approx(sizes[0], rel=1e-9)
    assert sizes[1] > sizes[2] > sizes[3] > sizes[4]


def test_tokens_solve_a_lifetime_whose_serving_takes_almost_all_of_it():
    def cost(N, D, R, P):
        return 6 * N * D + 2 * N * 1e15

    N = np.array([1e6, 1e7, 1e8])
    D = tokens_for_budget(cost, 3e22, N, 1.0, 0.0)
    np.testing.assert_allclose(D[:2], (3e22 - 2 * N[:2] * 1e15) / (6 * N[:2]), rtol=1e-6)
    assert np.isnan(D[2])  # serving alone costs more


def test_sizes_and_ratios_invert_the_cost():
    cost = SHAPES.inference()
    R, P = np.array([1.5, 4.0, 8.0]), np.array([0.2, 0.5, 0.7])
    N = sizes_for_budget(cost, 1e9, 1e10, R, P)
    np.testing.assert_allclose(cost(N, 1e10, R, P), 1e9, rtol=1e-12)
    np.testing.assert_allclose(ratios_for_budget(cost, 1e9, N, 1e10, P, (1.0, 16.0)), R, rtol=1e-9)
    assert np.isnan(ratios_for_budget(cost, 1e9, 100 * N, 1e10, P, (1.0, 16.0))).all()
    np.testing.assert_array_equal(ratios_for_budget(cost, 1e9, N / 100, 1e10, P, (1.0, 16.0)), 1.0)


def test_roots_are_found_of_curves_steps_and_half_lines():
    low, high = np.full(3, -40.0), np.full(3, 40.0)

    def curves(x):
        step = np.where(x[1] < 1.25, -1e-4, 1e-4) + 1e-6 * (x[1] - 1.25)
        return np.stack([np.sinh(x[0] / 4) - 3.0, step, np.where(x[2] < 2.0, -np.inf, x[2] - 7.0)])

    found, _ = find_root(curves, low, high, np.zeros(3))
    np.testing.assert_allclose(found, [4 * np.arcsinh(3.0), 1.25, 7.0], rtol=1e-9)


def test_the_box_search_finds_corners_kinks_valleys_and_edges_of_what_is_possible():
    centre = np.array([[0.3, 0.6, 0.2], [1.4, 0.5, -0.3], [0.123456, 0.7, 0.9], [0.8, 0.8, 0.8]])

    def function(x, rows):
        d = x - centre[rows, None]
        valley = 1e3 * (d[..., 0] - d[..., 1]) ** 2 + (d**2).sum(-1) + 0.3 * (d**4).sum(-1)
        kink = np.abs(d).sum(-1)
        wall = np.where(x.sum(-1) > 1.8, np.inf, (d**2).sum(-1))
        square = (d**2).sum(-1)
        return np.choose(rows[:, None], [valley, square, kink, wall])

    found = minimise_in_box(function, np.full((4, 3), 0.5), 0.1)
    np.testing.assert_allclose(found[0], centre[0], atol=1e-7)
    np.testing.assert_allclose(found[1], [1.0, 0.5, 0.0], atol=1e-9)
    np.testing.assert_allclose(found[2], centre[2], atol=1e-6)
    np.testing.assert_allclose(((found[3] - centre[3]) ** 2).sum(), 0.12, rtol=0.02)


def test_on_an_end_of_the_box_the_other_coordinates_are_as_exact_as_within():
    ends = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])

    def function(x, rows):
        # pulled beyond the ends by its linear part; the least in z follows the others along a curve
        away = np.abs(x[..., :2] - ends[rows, None]).sum(-1)
        curve = 0.5 + 0.3 * np.sin(3 * x[..., 0]) * np.cos(2 * x[..., 1])
        return away + 1e-2 * np.exp(x[..., 0]) * (x[..., 2] - curve) ** 2

    found = minimise_in_box(function, np.full((3, 3), 0.4), 0.1)
    np.testing.assert_array_equal(found[:, :2], ends)
    np.testing.assert_allclose(found[:, 2], 0.5 + 0.3 * np.sin(3 * ends[:, 0]) * np.cos(2 * ends[:, 1]), atol=1e-8)


def test_what_cannot_be_searched_is_refused():
    cost = SHAPES.training()
    with pytest.raises(UserError, match=r"pays for no model \(N 1e\+07 to 1e\+11"):
        Search(laws.COMPRESSION_AWARE, SHAPES.lifetime(1e15), 1e20, BOX).minimise(DLCM)
    with pytest.raises(UserError, match="not given"):
        Search(laws.COMPRESSION_AWARE, cost, 1e20, BOX, solve="N")
    with pytest.raises(UserError, match="does not rise with D"):
        Search(laws.COMPRESSION_AWARE, SHAPES.inference(), 1e20, BOX).minimise(DLCM)
    with pytest.raises(UserError, match="stays below the budget"):
        sizes_for_budget(lambda N, D, R, P: 5.0 + 0 * N, 1e3, 1e9, 1.0, 0.0)
