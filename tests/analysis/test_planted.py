"""Every law that ships, and every named reduction, planted without noise and found again: exponents to 1e-6."""

import numpy as np
import pytest

from analysis import ResultsData, fit, laws
from tests.analysis.test_laws import VALUES

BY_LAW = {
    "chinchilla": {"sizes": np.geomspace(1e7, 1e10, 6), "tokens": np.geomspace(1e9, 3e11, 6)},
    "compression_aware": {"sizes": np.geomspace(1e6, 6.4e7, 4), "tokens": np.geomspace(2e7, 1.2e9, 4)},
    "overtrained": {"sizes": np.geomspace(1e7, 1e10, 5), "tokens": np.geomspace(1e9, 3e11, 5)},
    "repeated_data": {"sizes": np.geomspace(1e7, 3e9, 5), "tokens": np.geomspace(1e9, 3e10, 4)},
    "decay_gain": {"sizes": np.geomspace(1e6, 1e9, 4), "tokens": np.array([1e9])},
    "joint": {"sizes": np.geomspace(1e6, 6.4e7, 4), "tokens": np.geomspace(2e7, 1.2e9, 4)},
}
REDUCED = [f"{name}.{step}" for name, steps in laws.REDUCTIONS.items() for step in steps]


def grid(law, values, sizes, tokens) -> ResultsData:
    """A factorial design of the inputs that the law has."""
    has_ratio = law.family in ("dlcm", None)
    R, P = ([2.0, 4.0, 8.0], [0.3, 0.45, 0.6, 0.75]) if has_ratio else ([1.0], [0.0])
    epochs = [1.0, 2.0, 5.0, 12.0, 40.0] if "U" in law.inputs else [1.0]
    stable = [2.0, 3.0, 4.5] if "stable_loss" in law.inputs else [3.0]
    axes = [v.ravel() for v in np.meshgrid(sizes, tokens, R, P, epochs, stable, indexing="ij")]
    if law.is_joint:
        dense = [v.ravel() for v in np.meshgrid(sizes, tokens, [1.0], [0.0], epochs, stable, indexing="ij")]
        axes = [np.concatenate(pair) for pair in zip(axes, dense)]
    N, D, R, P, epochs, stable = axes
    inputs = {"N": N, "D": D, "R": R, "P": P, "U": D / epochs, "stable_loss": stable}
    target = law.predict(values, **{name: inputs[name] for name in law.inputs})
    columns = {"U": inputs["U"], "stable_loss": stable, "model": np.where(P > 0, "dlcm", "dense")}
    if law.target != "loss":
        return ResultsData.from_arrays(N=N, D=D, R=R, P=P, loss=stable, **columns, **{law.target: target})
    return ResultsData.from_arrays(N=N, D=D, R=R, P=P, loss=target, **columns)


def planted_values(law):
    """Of the unreduced law's constants, those that the reduction has, with what it holds."""
    return {p.name: VALUES[law.name][p.name] for p in law.parameters} | dict(law.fixed)


def assert_recovered(law, data, names=None):
    values, result = planted_values(law), fit(law, data, n_bootstrap=0)
    assert [c for c in result.law.changes if c not in law.changes] == []
    assert [check.text for check in result.checks if not check.passed] == []
    exponents = names or [p.name for p in law.free if p.kind in ("exponent", "other")]
    assert exponents or not law.free
    for name in exponents:
        assert result.values[name] == pytest.approx(values[name], rel=1e-6), name
    # what the law says is found everywhere to far better than any noise
    inputs = {name: data.values(name) for name in law.inputs}
    np.testing.assert_allclose(result.predict(**inputs), law.predict(values, **inputs), rtol=1e-7)


def test_every_law_is_planted():
    assert set(BY_LAW) == set(laws.ALL) == set(VALUES)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*laws.ALL, *REDUCED])
def test_planted_laws_without_noise_are_recovered_to_1e_6(name):
    law = laws.get(name)
    assert_recovered(law, grid(law, planted_values(law), **BY_LAW[law.name]))


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["log_huber", "log_mse", "mse"])
def test_all_eleven_constants_of_planted_eq_22_are_recovered_under_every_loss(loss):
    law = laws.COMPRESSION_AWARE
    result = fit(law, grid(law, planted_values(law), **BY_LAW[law.name]), loss=loss, n_bootstrap=0)
    for p in law.parameters:
        assert result.values[p.name] == pytest.approx(VALUES[law.name][p.name], rel=1e-6), p.name


@pytest.mark.slow
def test_27_cells_whose_tokens_vary_give_every_exponent_of_eq_22_without_offsets():
    # an orthogonal array: each pair of axes is balanced, though there are 27 of 81 cells
    i, j, k = (v.ravel() for v in np.meshgrid(*[np.arange(3)] * 3, indexing="ij"))
    N, R, P = np.array([5e7, 2.5e8, 1.25e9])[i], np.array([2.0, 4.0, 8.0])[j], np.array([0.3, 0.55, 0.8])[k]
    D = np.array([1e9, 5e9, 2.5e10])[(i + j + k) % 3]
    law = laws.get("compression_aware.no_offsets")
    loss = law.predict(planted_values(law), N=N, D=D, R=R, P=P)
    assert_recovered(law, ResultsData.from_arrays(N=N, D=D, R=R, P=P, loss=loss))
