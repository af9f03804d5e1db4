import numpy as np
import pytest

from analysis import laws
from dlcm.errors import UserError

VALUES = {
    "chinchilla": {"E": 1.8, "A": 480.0, "alpha": 0.35, "B": 2100.0, "beta": 0.37},
    "compression_aware": {
        "E0": 1.7, "A_t": 60.0, "t_t": 2e5, "d1": 0.3, "A_c": 20.0, "g": 0.25, "t_c": 3e5, "d2": 0.28,
        "A_d": 300.0, "t_d": 4e6, "a": 0.31,
    },
    "overtrained": {"E": 1.6, "a": 150.0, "b": 300.0, "c": 0.26},
    "decay_gain": {"k": 0.02, "a": 1.5, "b": 0.2, "c": -0.05},
    "repeated_data": {"E": 1.8, "A": 480.0, "alpha": 0.35, "B": 2100.0, "beta": 0.37, "R_N": 5.0, "R_D": 15.0},
    "joint": {
        "E0": 1.7, "A": 90.0, "alpha": 0.33, "A_t": 60.0, "t_t": 2e5, "d1": 0.3, "A_c": 20.0, "g": 0.25, "t_c": 3e5,
        "d2": 0.28, "A_d": 300.0, "t_d": 4e6, "a": 0.31,
    },
}  # fmt: skip


def some_inputs(n: int = 7) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    inputs = {
        "N": 10 ** rng.uniform(5, 9, n),
        "D": 10 ** rng.uniform(6, 11, n),
        "R": rng.uniform(1.5, 8, n),
        "P": rng.uniform(0.2, 0.8, n),
        "stable_loss": rng.uniform(2, 5, n),
    }
    # the last two are dense models; half the rows see their tokens several times, the others once
    inputs["P"][-2:], inputs["R"][-2:] = 0.0, 1.0
    inputs["U"] = inputs["D"] / np.where(np.arange(n) % 2, rng.uniform(1.5, 30, n), 1.0)
    return inputs


@pytest.mark.parametrize("law", laws.ALL.values(), ids=lambda law: law.name)
def test_gradient_equals_central_differences(law):
    values, inputs = VALUES[law.name], some_inputs()
    inputs = {name: inputs[name] for name in law.inputs}
    gradient = law.gradient(values, **inputs)
    for column, parameter in enumerate(law.parameters):
        step = 1e-6 * values[parameter.name]
        up, down = ({**values, parameter.name: values[parameter.name] + s} for s in (step, -step))
        numeric = (law.predict(up, **inputs) - law.predict(down, **inputs)) / (2 * step)
        np.testing.assert_allclose(gradient[:, column], numeric, rtol=1e-6, atol=1e-12 / abs(step))


def test_gradient_of_tied_exponents_adds_both_terms():
    law = laws.COMPRESSION_AWARE.fix(t_t=0, t_c=0, t_d=0).tie(d2="d1")
    values = {k: v for k, v in VALUES["compression_aware"].items() if k != "d2"} | {"t_t": 0, "t_c": 0, "t_d": 0}
    inputs = {name: some_inputs()[name][:5] for name in law.inputs}
    column = [p.name for p in law.parameters].index("d1")
    up, down = ({**values, "d1": 0.3 + s} for s in (1e-6, -1e-6))
    numeric = (law.predict(up, **inputs) - law.predict(down, **inputs)) / 2e-6
    np.testing.assert_allclose(law.gradient(values, **inputs)[:, column], numeric, rtol=1e-6)


def test_compression_aware_law_is_equation_22():
    v, x = VALUES["compression_aware"], some_inputs()
    N, D, R, P = x["N"], x["D"], x["R"], x["P"]
    by_hand = (
        v["E0"]
        + v["A_t"] / (N * (1 - P) + v["t_t"]) ** v["d1"]
        + v["A_c"] * R ** v["g"] / (N * P + v["t_c"]) ** v["d2"]
        + v["A_d"] / (D + v["t_d"]) ** v["a"]
    )
    np.testing.assert_allclose(laws.COMPRESSION_AWARE.predict(v, N=N, D=D, R=R, P=P), by_hand, rtol=1e-14)


def test_overtrained_law_is_the_published_form():
    v, x = VALUES["overtrained"], some_inputs()
    N, M = x["N"], x["D"] / x["N"]
    by_hand = v["a"] * N ** -v["c"] + v["b"] * 6 ** (-v["c"] / 2) * (M * N) ** -v["c"] + v["E"]
    # sqrt(6)^-c (M N)^-c is 6^(-c/2) (M N)^-c
    np.testing.assert_allclose(laws.OVERTRAINED.predict(v, N=N, D=x["D"]), by_hand, rtol=1e-12)


def test_equation_shows_what_is_held_and_tied():
    law = laws.COMPRESSION_AWARE.fix(t_t=0, t_c=0, t_d=0, g=0).tie(d2="d1")
    assert law.equation == "L(N, D, R, P) = E0 + A_t / (N(1-P))^d1 + A_c / (N P)^d1 + A_d / D^a"
    assert [p.name for p in law.free] == ["E0", "A_t", "d1", "A_c", "A_d", "a"]
    assert r"\frac{A_{t}}" in law.latex


def test_a_reduction_leaves_the_law_itself_unchanged():
    before = laws.COMPRESSION_AWARE.equation
    laws.COMPRESSION_AWARE.fix(g=0.0)
    assert laws.COMPRESSION_AWARE.equation == before


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(UserError, match="did you mean 'chinchilla'"):
        laws.get("chinchila")
    with pytest.raises(UserError, match="did you mean 't_t'"):
        laws.COMPRESSION_AWARE.fix(t_tt=0)
    with pytest.raises(UserError, match="P is missing"):
        laws.COMPRESSION_AWARE.predict(VALUES["compression_aware"], N=1e6, D=1e8, R=4)
