"""What is believed of a law before a sweep is run: its constants, and the noise of a run. Expected intervals rest on it.

The shipped default is for planning only. No constants of the compression-aware law are published, so it is put together from
what is:

- floor, D term and exponents are those of the dense law in Besiroglu et al. 2024 (a re-reading of Hoffmann et al. 2022):
  E 1.8169, A 482.01, B 2085.43, alpha 0.3478, beta 0.3658; d1 = d2 = alpha, a = beta, offsets 0;
- a hierarchy that does not compress gains nothing: at R = 1 and the best P the DLCM has the dense model's loss (ours);
- A_c = 0.2 A_t and g = 0.1 (ours): then the least loss at R = 4 and the cost of the paper's main model (6.3e21 FLOPs) lies at
  P = 0.5, the "middling" share that the paper reports, and saves 20% of the dense model's FLOPs, where the paper reports
  up to 34%.

Where g < d2, as here, the law has no best R inside any range: a larger backbone at a larger R costs the same and has the lower
loss, until something else (memory) limits N. The search then ends at the largest R that it is allowed.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scipy import optimize

from analysis import laws
from analysis.laws import Law
from analysis.result import FitResult
from dlcm.errors import UserError

DEFAULT_NOISE = 0.005
"""Standard deviation of log loss between runs: the residuals of the 240 runs of the fit named above scatter by half a percent
(the mean of their log-Huber penalties at delta 1e-3 is 4.2e-6: about 0.0047 of mean absolute log error)."""

_DENSE = {"E": 1.8169, "A": 482.01, "alpha": 0.3478, "B": 2085.43, "beta": 0.3658}
_CONCEPT_OVER_TOKEN = 0.2
_G = 0.1
_RANGES = {"N": (7e7, 1.6e10), "D": (5e9, 5e11)}
"""Of the runs behind the dense constants: 70 million to 16 billion parameters, 5 to 500 billion tokens (Hoffmann et al. 2022)."""
_DEFAULT_SOURCE = "shipped default: constants of Besiroglu et al. 2024, concept term assumed; for planning only"


@dataclasses.dataclass(frozen=True)
class Prior:
    """A law with constants and noise.

    Attributes:
        law: as it stands before any reduction.
        values: its constants in natural units (parameters, tokens, nats).
        noise: standard deviation of log loss of one run around the law, between seeds.
        source: where the constants are from.
        ranges: input -> (lowest, highest) among the runs that the constants come from.
    """

    law: Law
    values: Mapping[str, float]
    noise: float
    source: str
    ranges: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)

    def beyond(self, **inputs: tuple[float, float]) -> dict[str, float]:
        """How far ranges of inputs reach outside those of the prior, in decades, by input; empty inside."""
        distances = {}
        for name, (low, high) in inputs.items():
            known = self.ranges.get(name)
            if known is None or not known[0] > 0:
                continue
            distance = max(math.log10(high / known[1]), math.log10(known[0] / low))
            if distance > 0.1:
                distances[name] = distance
        return distances

    def with_noise(self, noise: float | None) -> "Prior":
        """The same law with another noise; itself where None is given.

        Raises:
            UserError: the noise is not above 0 and below 0.5.
        """
        if noise is None:
            return self
        if not 0.0 < noise < 0.5:
            raise UserError(
                f"noise = {noise:g}: give the standard deviation of log loss, above 0 and below 0.5, e.g. 0.005"
            )
        return dataclasses.replace(self, noise=float(noise))

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {"law": self.law.name, "values": dict(self.values), "noise": self.noise, "source": self.source}


def default_prior(family: str = "dlcm") -> Prior:
    """The shipped prior of a family (`dlcm` or `dense`); see the head of this module."""
    if family == "dense":
        return Prior(laws.CHINCHILLA, _DENSE, DEFAULT_NOISE, "shipped default: Besiroglu et al. 2024", _RANGES)
    alpha = _DENSE["alpha"]
    best = optimize.minimize_scalar(
        lambda p: (1 - p) ** -alpha + _CONCEPT_OVER_TOKEN * p**-alpha, bounds=(1e-3, 1 - 1e-3), method="bounded"
    )
    a_token = _DENSE["A"] / float(best.fun)
    values = {"E0": _DENSE["E"], "A_t": a_token, "t_t": 0.0, "d1": alpha}
    values |= {"A_c": _CONCEPT_OVER_TOKEN * a_token, "g": _G, "t_c": 0.0, "d2": alpha}
    values |= {"A_d": _DENSE["B"], "t_d": 0.0, "a": _DENSE["beta"]}
    return Prior(laws.COMPRESSION_AWARE, values, DEFAULT_NOISE, _DEFAULT_SOURCE, _RANGES)


def prior_from_fit(result: FitResult, source: str = "") -> Prior:
    """The constants of an earlier fit, with the scatter of its runs as the noise.

    A constant that the fit tied to another has the other's value. The scatter is that of the residuals with the degrees of
    freedom that the constants took put back.

    Raises:
        UserError: the fit dropped a term, or has no run to spare: it knows nothing of that term, or of the noise.
    """
    if not result.law.terms or result.law.name not in (laws.CHINCHILLA.name, laws.COMPRESSION_AWARE.name):
        raise UserError(
            f"{source or 'prior'}: a fit of law {result.law.name}; sweeps are planned with compression_aware or chinchilla"
        )
    law, values = laws.get(result.law.name), dict(result.values)
    for change in result.law.changes:
        if change.op == "drop":
            raise UserError(
                f"{source or 'prior'}: the term of {change.parameter} was dropped for want of runs, so this fit plans no sweep; "
                "use a richer fit, or leave the prior out for the shipped default"
            )
        if change.op == "tie" and change.other is not None:
            values.setdefault(change.parameter, values[change.other])
    values = {p.name: float(values[p.name]) for p in law.parameters}
    spare = result.n_runs - result.n_free
    if spare < 1 or not result.rms > 0:
        raise UserError(
            f"{source or 'prior'}: {result.n_runs} runs for {result.n_free} constants leave nothing to judge the noise by; "
            "give it (--noise), or use a richer fit"
        )
    noise = result.rms * (result.n_runs / spare) ** 0.5
    told = f"fit of {result.n_runs} runs ({result.status}), {source or result.source}"
    return Prior(law, values, noise, told, {name: result.ranges[name] for name in "ND" if name in result.ranges})


def load_prior(path: str | Path, family: str | None = "dlcm") -> Prior:
    """The prior in a file written by `dlcm analyze fit --out`.

    Args:
        path: the file.
        family: `dlcm` or `dense`, the family that it must be of; None for either.

    Raises:
        UserError: not such a file, or a fit of another family, or of a law that predicts something else than the loss.
    """
    result = FitResult.load(path)
    if result.law.target != "loss" or result.law.inputs == () or not {"N", "D"} & set(result.law.inputs):
        raise UserError(
            f"{path}: law {result.law.name} does not predict the loss from N and D; fit compression_aware or chinchilla"
        )
    if family is not None and result.law.family != family:
        raise UserError(f"{path}: a fit of law {result.law.name}, and a prior for {family} runs is wanted")
    return prior_from_fit(result, str(path))
