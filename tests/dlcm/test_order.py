import numpy as np
import pytest

from dlcm.order import permute


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 1_000, 65_537])
def test_every_number_comes_once(n):
    for key in ((0, 0), (0, 1), (7, 3)):
        assert sorted(permute(np.arange(n), n, *key)) == list(range(n))


def test_a_place_does_not_depend_on_what_else_is_asked():
    whole = permute(np.arange(1_000), 1_000, 5, 2)
    assert [int(permute(np.array([i]), 1_000, 5, 2)[0]) for i in (0, 499, 999)] == whole[[0, 499, 999]].tolist()


def test_keys_give_unlike_orders_without_a_trend():
    n = 100_000
    orders = [permute(np.arange(n), n, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    places = np.arange(n)
    for i, order in enumerate(orders):
        # Correlations of independent orders scatter by 1 / sqrt(n) = 0.003.
        assert abs(np.corrcoef(places, order)[0, 1]) < 0.015
        assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.015
        assert all((order == other).mean() < 1e-3 for other in orders[:i])


@pytest.mark.slow
def test_the_first_of_many_orders_are_spread_evenly():
    found = np.bincount([int(permute(np.array([0]), 50, key)[0]) for key in range(5_000)], minlength=50)
    assert ((found - 100) ** 2 / 100).sum() < 100  # chi-squared with 49 degrees of freedom: mean 49, deviation 10


def test_a_billion_windows_take_no_memory():
    assert permute(np.array([0, 10**9 - 1]), 10**9, 1).max() < 10**9
