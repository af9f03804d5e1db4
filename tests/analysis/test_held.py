"""Constants that a user holds: they stay at their value in natural units, on data of any scale."""

import numpy as np
import pytest

from analysis import ResultsData, fit, laws
from tests.analysis.test_fit import PLANTED, grid_data

TRUTH = {"E": 1.8, "A": 480.0, "alpha": 0.35, "B": 2100.0, "beta": 0.37}


@pytest.mark.slow
def test_a_held_floor_and_held_offsets_keep_their_value_in_nats_parameters_and_tokens():
    N, D = np.array(np.meshgrid([1e7, 1e8, 1e9], [1e9, 1e10, 1e11])).reshape(2, -1)
    data = ResultsData.from_arrays(N=N, D=D, loss=laws.CHINCHILLA.predict(TRUTH, N=N, D=D))
    result = fit(laws.CHINCHILLA.fix(E=1.8), data, n_bootstrap=0)
    for name, value in TRUTH.items():
        assert result.values[name] == pytest.approx(value, rel=1e-6)
    law = laws.COMPRESSION_AWARE.fix(t_t=PLANTED["t_t"], t_d=PLANTED["t_d"], E0=PLANTED["E0"])
    result = fit(law, grid_data(laws.COMPRESSION_AWARE, PLANTED), n_bootstrap=0)
    for name, value in PLANTED.items():
        assert result.values[name] == pytest.approx(value, rel=1e-5)


def test_a_floor_held_elsewhere_fits_worse():
    N, D = np.array(np.meshgrid([1e7, 1e8, 1e9], [1e9, 1e10, 1e11])).reshape(2, -1)
    data = ResultsData.from_arrays(N=N, D=D, loss=laws.CHINCHILLA.predict(TRUTH, N=N, D=D))
    result = fit(laws.CHINCHILLA.fix(E=0.9), data, n_bootstrap=0)
    assert result.values["E"] == 0.9
    assert result.rms > 1e-3
    predicted = result.predict(N=N, D=D)
    assert np.sqrt(np.mean(np.log(predicted / data.loss) ** 2)) == pytest.approx(result.rms, rel=1e-6)
