import numpy as np
import pytest
from typer.testing import CliRunner

from analysis import FitResult, ResultsData, fit, laws
from analysis.commands import app
from analysis.expression import names, parse
from analysis.objective import Problem
from analysis.optimum import optimum
from analysis.result import ParameterStatus, Status
from dlcm.errors import UserError
from tests.analysis.test_fit import epoch_data

CHINCHILLA = "E + A*N**-alpha + B*D**-beta"
BOUNDS = {"E": None, "A": None, "alpha": (0, 3), "B": None, "beta": (0, 3)}
TRUTH = {"E": 1.8, "A": 480.0, "alpha": 0.35, "B": 2100.0, "beta": 0.37}


def grid(loss_of, noise: float = 0.0, **columns) -> ResultsData:
    N, D = np.array(np.meshgrid([1e7, 4e7, 1e8, 1e9, 1e10], [1e9, 4e9, 1e10, 1e11])).reshape(2, -1)
    loss = loss_of(N, D) * np.exp(np.random.default_rng(0).normal(0, noise, len(N)))
    return ResultsData.from_arrays(N=N, D=D, loss=loss, **columns)


def chinchilla_loss(N, D):
    return TRUTH["E"] + TRUTH["A"] / N ** TRUTH["alpha"] + TRUTH["B"] / D ** TRUTH["beta"]


def custom(**more):
    return laws.from_expression(CHINCHILLA, BOUNDS, **more)


# -- what is written ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("__import__('os').system('true')", "not allowed"),
        ("(lambda: 1)()", "not allowed"),
        ("N.__class__", "not allowed"),
        ("[x for x in N]", "not allowed"),
        ("N if D else A", "not allowed"),
        ("N[0]", "not allowed"),
        ("N // 2", "not allowed"),
        ("N < 2", "not allowed"),
        ("'N'", "not allowed"),
        ("f'{N}'", "not allowed"),
        ("exp(*N)", "not allowed"),
        ("exp(x=N)", "not allowed"),
        ("A*N^2", r"write \*\*"),
        ("eval(N)", "unknown function 'eval'"),
        ("expp(N)", "did you mean 'exp'"),
        ("repeated(N, D, A)", "unknown function 'repeated'"),
        ("exp(N, D)", "2 arguments"),
        ("exp + N", "exp is a function"),
        ("2j*N", "no real number"),
        ("True*N", "no real number"),
        ("1" + "0" * 400 + "*N", "too large"),
        ("A*", "no expression"),
        ("A = N", "no expression"),
        ("", "no expression"),
        ("-" * 300 + "N", "deep"),
        ("N" + "+N" * 3000, "2000 at most"),
        ("A*ν", "outside A-Z"),
    ],
)
def test_what_is_no_formula_is_refused_with_the_reason(text, told):
    with pytest.raises(UserError, match=told):
        parse(text, "law")


def test_nothing_of_an_expression_is_run(tmp_path):
    trap = tmp_path / "trap"
    with pytest.raises(UserError):
        laws.from_expression(f"E + A*N*open({str(trap)!r}, 'w').write('x')", {"E": None, "A": None})
    assert not trap.exists()


def test_a_tower_of_powers_is_refused_rather_than_worked_out():
    with pytest.raises(UserError, match="not a finite number"):
        fit(laws.from_expression("E + N*9**9**9**9", {"E": None}), grid(chinchilla_loss), n_bootstrap=0)


def test_names_come_in_the_order_of_the_equation():
    assert names(parse("b*exp(a) + sqrt(N)*b + E", "law")) == ("b", "a", "N", "E")


FORMS = [
    (CHINCHILLA, BOUNDS, chinchilla_loss, TRUTH),
    (
        "E + exp(a - alpha*log(N)) + B/sqrt(D)",
        {"E": None, "a": (0, 10), "alpha": (0, 2), "B": None},
        lambda N, D: 1.5 + np.exp(5.0 - 0.3 * np.log(N)) + 900.0 * D**-0.5,
        {"E": 1.5, "a": 5.0, "alpha": 0.3, "B": 900.0},
    ),
    (
        "E + A/(N + t)**alpha + c*log(D)",
        {"E": None, "A": None, "t": (1e4, 1e9), "alpha": (0, 2), "c": (-1, 1)},
        lambda N, D: 4.0 + 300.0 / (N + 2e7) ** 0.4 - 0.05 * np.log(D),
        {"E": 4.0, "A": 300.0, "t": 2e7, "alpha": 0.4, "c": -0.05},
    ),
    (
        "(E + A*N**-alpha)*(1 + D**-beta)",
        {"E": (0, 5), "A": (0, 1e4), "alpha": (0, 2), "beta": (0, 2)},
        lambda N, D: (1.7 + 200.0 * N**-0.3) * (1 + D**-0.2),
        {"E": 1.7, "A": 200.0, "alpha": 0.3, "beta": 0.2},
    ),
    (
        "E - A*D**beta*N**-alpha + B*N**-gamma",
        {"E": None, "A": None, "alpha": (0, 2), "beta": (-2, 2), "B": None, "gamma": {"start": 0.5, "bounds": (0, None)}},
        lambda N, D: 2.5 - 0.3 * D**0.05 * N**-0.1 + 90 * N**-0.3,
        {"E": 2.5, "A": 0.3, "alpha": 0.1, "beta": 0.05, "B": 90.0, "gamma": 0.3},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("text", "bounds", "by_hand", "values"), FORMS, ids=[f[0] for f in FORMS])
def test_value_and_gradient_are_those_of_the_formula(text, bounds, by_hand, values):
    law, data = laws.from_expression(text, bounds), grid(chinchilla_loss)
    inputs = {name: data.values(name) for name in law.inputs}
    np.testing.assert_allclose(law.predict(values, N=data.N, D=data.D), by_hand(data.N, data.D), rtol=1e-13)
    gradient = law.gradient(values, **inputs)
    for column, parameter in enumerate(law.parameters):
        step = 1e-6 * abs(values[parameter.name])
        up, down = ({**values, parameter.name: values[parameter.name] + s} for s in (step, -step))
        numeric = (law.predict(up, **inputs) - law.predict(down, **inputs)) / (2 * step)
        np.testing.assert_allclose(gradient[:, column], numeric, rtol=1e-5, atol=1e-8 * np.abs(numeric).max())


@pytest.mark.parametrize(("text", "bounds", "by_hand", "values"), FORMS, ids=[f[0] for f in FORMS])
def test_derivatives_by_the_fitted_coordinates_are_right_for_one_and_for_many(text, bounds, by_hand, values):
    law = laws.from_expression(text, bounds)
    problem = Problem.build(law, grid(by_hand, noise=0.01))
    theta = problem.theta(values)
    assert problem.values(theta) == pytest.approx(values, rel=1e-10)
    _, partials = problem.evaluate(theta, gradient=True)
    many = problem.evaluate(np.stack([theta, theta + 1e-3]), gradient=True)[1]
    for i, partial in enumerate(partials):
        step = np.zeros(len(theta))
        step[i] = 1e-6
        ends = [problem.evaluate(theta + s * step, gradient=False)[0] for s in (1, -1)]
        numeric = (ends[0] - ends[1]) / 2e-6
        np.testing.assert_allclose(
            np.broadcast_to(partial, numeric.shape), numeric, rtol=1e-5, atol=1e-7 * np.abs(numeric).max()
        )
        np.testing.assert_allclose(np.broadcast_to(many[i], (2, len(problem)))[0], partial, rtol=1e-12)


@pytest.mark.many
@pytest.mark.parametrize(("text", "bounds", "by_hand", "values"), FORMS[:4], ids=[f[0] for f in FORMS[:4]])
def test_a_planted_formula_is_recovered_to_1e_6(text, bounds, by_hand, values):
    result = fit(laws.from_expression(text, bounds), grid(by_hand), n_bootstrap=0)
    assert result.values == pytest.approx(values, rel=1e-6)


def test_equation_and_latex_show_the_formula():
    law = custom().fix(alpha=0.5)
    assert law.equation == "L(N, D) = E + A * N ** (-0.5) + B * D ** (-beta)"
    assert custom().equation == f"L(N, D) = {CHINCHILLA}"
    assert r"D^{- \beta}" in custom().latex
    assert r"\alpha" not in law.latex


# -- what a constant is ------------------------------------------------------------------------------------------------


def test_kinds_are_read_from_the_formula():
    kinds = {p.name: p.kind for p in custom().parameters}
    assert kinds == {"E": "floor", "A": "amplitude", "alpha": "exponent", "B": "amplitude", "beta": "exponent"}
    law = laws.from_expression("E + A*log(N) + k*N", {"E": (-1, 1), "A": (0, 1), "k": (-1, 1)})
    # a floor or a factor that may be negative is neither, and a factor of a logarithm has no sign of its own
    assert {p.name: p.kind for p in law.parameters} == dict.fromkeys("EAk", "other")


@pytest.mark.parametrize(
    ("parameters", "told"),
    [
        ({"E": None, "A": None, "alpha": None}, "alpha has no bounds"),
        ({"E": None, "A": None, "alpha": (0, None)}, "open bounds .* and no start"),
        ({"E": None, "A": None, "alpha": (1, 0)}, "must be below"),
        ({"E": None, "A": None, "alpha": "0-3"}, "bounds '0-3'"),
        ({"E": None, "A": None, "alpha": {"bounds": (0, 1), "start": 2}}, "outside its bounds"),
        ({"E": None, "A": None, "alpha": {"bound": (0, 1)}}, "did you mean 'bounds'"),
        ({"E": None, "A": None, "alpha": {"bounds": (0, 1), "kind": "floor"}}, "no floor"),
        ({"E": None, "A": {"bounds": (-1, 1), "kind": "amplitude"}, "alpha": (0, 1)}, "not below 0"),
        ({"E": None, "A": None, "alfa": (0, 1)}, "did you mean 'alpha'"),
        ({}, "no parameter"),
        ({"E": None, "A": None, "alpha": (0, 1), "N": (0, 1)}, "an input such as N"),
    ],
)
def test_a_constant_without_what_it_needs_is_refused(parameters, told):
    with pytest.raises(UserError, match=told):
        laws.from_expression("E + A*N**-alpha", parameters)


def test_a_name_that_is_no_column_is_refused_with_the_nearest():
    law = laws.from_expression("E + A*Nn**-alpha", {"E": None, "A": None, "alpha": (0, 3)})
    with pytest.raises(UserError, match="'Nn', which is neither a parameter nor a column; did you mean 'N'"):
        fit(law, grid(chinchilla_loss))


def test_a_formula_that_is_not_finite_on_the_data_names_the_run():
    law = laws.from_expression("E + A*log(N - t)", {"E": (0, 9), "A": (-1, 1), "t": (2e7, 3e7)})
    with pytest.raises(UserError, match="run run0: law custom is not finite at N = 1e"):
        fit(law, grid(chinchilla_loss))


# -- the fit -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_chinchilla_as_an_expression_has_the_minimum_of_the_law_and_its_bootstrap():
    data = grid(chinchilla_loss, noise=0.005)
    own, built_in = (fit(law, data, n_bootstrap=200) for law in (custom(), laws.CHINCHILLA))
    assert own.status is built_in.status is Status.CERTIFIED
    assert own.objective == pytest.approx(built_in.objective, rel=1e-8)
    for name in TRUTH:
        assert own.values[name] == pytest.approx(built_in.values[name], rel=1e-6)
        # the same draws of weights, descended in other arithmetic
        ends = [(r[name].low, r[name].high) for r in (own, built_in)]
        np.testing.assert_allclose(*ends, rtol=1e-3)


@pytest.mark.slow
def test_chinchilla_as_an_expression_reaches_the_published_minimum():
    result = fit(custom(), epoch_data(), n_bootstrap=0)
    assert result.status is Status.CERTIFIED
    assert result.objective <= 0.00101828
    assert result.objective == pytest.approx(fit(laws.CHINCHILLA, epoch_data(), n_bootstrap=0).objective, rel=1e-8)


@pytest.mark.slow
def test_centring_takes_an_amplitude_and_its_exponent_apart():
    data = grid(chinchilla_loss, noise=0.005)
    bounded = laws.from_expression(CHINCHILLA, {**BOUNDS, "A": (1, 1e5), "B": (1, 1e6)})
    results = [fit(law, data, n_bootstrap=0) for law in (custom(), bounded)]
    assert results[0].objective == pytest.approx(results[1].objective, rel=1e-8)
    assert results[0].condition < 0.5 * results[1].condition


@pytest.mark.slow
def test_bounds_hold_and_are_reported():
    law = laws.from_expression(CHINCHILLA, {**BOUNDS, "A": (1, 100), "beta": (0.5, 3)})
    result = fit(law, grid(chinchilla_loss, noise=0.005), n_bootstrap=50)
    assert result.status is Status.BOUND_HIT
    assert result["beta"].status is ParameterStatus.AT_BOUND
    assert "bound 0.5" in result["beta"].reason
    column = [p.name for p in result.parameters].index("A")
    assert result.replicates[:, column].max() <= 100 * (1 + 1e-9)


@pytest.mark.slow
def test_a_fit_of_an_expression_is_read_back(tmp_path):
    law = laws.from_expression(CHINCHILLA, {**BOUNDS, "E": (0, None)}, name="mine", family=None, source="a note")
    for changed in (law, law.fix(alpha=0.35), law.tie(beta="alpha")):
        result = fit(changed, grid(chinchilla_loss, noise=0.005), n_bootstrap=5)
        result.save(tmp_path / "fit.json")
        read = FitResult.load(tmp_path / "fit.json")
        assert read.law == result.law == changed
        assert read.law.equation == changed.equation
        assert read.to_dict() == result.to_dict()
        np.testing.assert_array_equal(read.predict(N=1e8, D=1e10), result.predict(N=1e8, D=1e10))


@pytest.mark.slow
def test_a_held_and_a_tied_constant_leave_the_others_to_fit():
    data = grid(lambda N, D: 1.8 + 480.0 * N**-0.35 + 2100.0 * D**-0.35)
    held = fit(custom().fix(A=480.0, E=1.8), data, n_bootstrap=0)
    tied = fit(custom().tie(beta="alpha"), data, n_bootstrap=0)
    assert held["A"].status is ParameterStatus.HELD
    assert held.values == pytest.approx({**TRUTH, "beta": 0.35}, rel=1e-6)
    assert tied.values == pytest.approx({"E": 1.8, "A": 480.0, "alpha": 0.35, "B": 2100.0}, rel=1e-6)
    with pytest.raises(UserError, match="did you mean 'alpha'"):
        custom().fix(alfa=1)


@pytest.mark.slow
def test_the_optimum_of_an_expression_is_the_closed_form():
    result = fit(custom(), grid(chinchilla_loss), n_bootstrap=5)
    budget = 6e19
    # minimise A N^-alpha + B D^-beta with 6 N D = budget: Hoffmann et al. 2022, eq 4
    alpha, beta = TRUTH["alpha"], TRUTH["beta"]
    G = (alpha * TRUTH["A"] / (beta * TRUTH["B"])) ** (1 / (alpha + beta))
    best = optimum(result, lambda N, D, R, P: 6 * N * D, budget)
    assert best["N"].value == pytest.approx(G * (budget / 6) ** (beta / (alpha + beta)), rel=1e-5)
    assert best["D"].value == pytest.approx((budget / 6) ** (alpha / (alpha + beta)) / G, rel=1e-5)


def test_another_target_and_columns_of_the_data_serve_as_inputs():
    depth = np.tile([4.0, 8.0, 16.0, 32.0, 64.0], 4)
    data = grid(chinchilla_loss, depth=depth, accuracy=0.9 - 0.5 * depth**-0.7)
    law = laws.from_expression(
        "top - k*depth**-b", {"top": (0, 1), "k": None, "b": (0, 2)}, target="accuracy", name="deep"
    )
    assert law.equation == "accuracy(depth) = top - k*depth**-b"
    result = fit(law, data, loss="mse", n_bootstrap=0)
    assert result.values == pytest.approx({"top": 0.9, "k": 0.5, "b": 0.7}, rel=1e-6)


# -- files and the command line ----------------------------------------------------------------------------------------

YAML = """
expression: E + A*N**-alpha + B*D**-beta
parameters:
  E:
  A: {}
  alpha: [0, 3]
  B: {bounds: [0, null]}
  beta: {bounds: [0, 3], start: 0.4}
family: dense
source: our own
"""


def test_a_law_is_read_from_a_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(YAML)
    law = laws.find(str(path))
    assert (law.name, law.family, law.source) == ("mine", "dense", "our own")
    assert [p.kind for p in law.parameters] == ["floor", "amplitude", "exponent", "amplitude", "exponent"]
    for text, told in [
        (YAML.replace("expression", "expresion"), "no key 'expression'"),
        (YAML.replace("source", "sourse"), "did you mean 'source'"),
        (YAML.replace("  B: {bounds: [0, null]}\n", "").replace("dense", "dens"), "did you mean 'dense'"),
        ("a: [", "not readable as YAML"),
    ]:
        path.write_text(text)
        with pytest.raises(UserError, match=told):
            laws.find(str(path))
    with pytest.raises(UserError, match="no such file"):
        laws.find(str(tmp_path / "absent.yaml"))


def run(*words: str):
    return CliRunner().invoke(app, list(words))


@pytest.mark.slow
def test_the_command_fits_an_expression_and_a_file(tmp_path):
    data, table = grid(chinchilla_loss, noise=0.002), tmp_path / "runs.csv"
    data.frame.assign(n=data.N, d=data.D, loss=data.loss).to_csv(table, index=False)
    (tmp_path / "mine.yaml").write_text(YAML)
    begin = ["fit", str(table), "--columns", "N=n,D=d,loss=loss", "--bootstrap", "0", "--json", "--law"]
    expected = fit(laws.CHINCHILLA, data, n_bootstrap=0).objective
    for words in ([CHINCHILLA, "--bounds", "alpha=0:3", "--bounds", "beta=0:3"], [str(tmp_path / "mine.yaml")]):
        out = tmp_path / "fit.json"
        answer = run(*begin, *words, "--out", str(out))
        assert answer.exit_code == 0, answer.output
        assert FitResult.load(out).objective == pytest.approx(expected, rel=1e-8)
    for words, told in [
        ([CHINCHILLA, "--bounds", "alpha=0:3"], "beta has no bounds"),
        (["E + A*Nn**-alpha", "--bounds", "alpha=0:3"], "Nn has no bounds and is no column"),
        ([CHINCHILLA, "--bounds", "alpha=0..3"], "NAME=LOW:HIGH"),
        (["chinchilla", "--bounds", "alpha=0:3"], "with an expression alone"),
        (["chinchila"], "did you mean 'chinchilla'; there are chinchilla, compression_aware"),
    ]:
        answer = run(*begin, *words)
        assert isinstance(answer.exception, UserError)
        assert told in str(answer.exception)
