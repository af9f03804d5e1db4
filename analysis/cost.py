"""What models cost under the shape rule of a sweep: to train, to serve a token, and over a lifetime of served tokens.

Every cost here is `cost(N, D, R, P)`, vectorised, N non-embedding parameters, counted by `flops.ops` for the real-valued shape:
6ND stands nowhere. What its figure counts is its `unit`; what a model of that shape costs to train is `training`.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.budget import Cost
from analysis.data import Convention, find_results, numeric_column, read_table
from dlcm.errors import UserError

if TYPE_CHECKING:
    from dlcm.config import RunConfig
    from sweeps.plan import Plan
    from sweeps.shapes import Parts, ShapeRule


OWN_WAY = 'the cost of your own models (--cost "6*N*D")'


@dataclasses.dataclass(frozen=True)
class TrainingCost:
    """Training FLOPs: three forward passes a token, at the realised R.

    Attributes:
        price: the function behind it.
        shapes: what it was built from; None where the function came from elsewhere.
    """

    price: Cost
    shapes: "Shapes | None" = None
    unit = "training FLOPs"

    def __call__(self, N: Any, D: Any, R: Any, P: Any) -> Any:
        """Training FLOPs."""
        return self.price(N, D, R, P)

    @property
    def training(self) -> Cost:
        """Itself."""
        return self


@dataclasses.dataclass(frozen=True)
class InferenceCost:
    """FLOPs of serving one token; they do not depend on D, which therefore has to be given where they are a budget.

    Attributes:
        price: the function behind it.
        training: what a model costs to train, to tell how far from the data a choice lies; None where unknown.
    """

    price: Cost
    training: Cost | None = None
    unit = "inference FLOPs per token"

    def __call__(self, N: Any, D: Any, R: Any, P: Any) -> Any:
        """Inference FLOPs per token."""
        return self.price(N, D, R, P)


@dataclasses.dataclass(frozen=True)
class LifetimeCost:
    """Training FLOPs and those of all the tokens that the model will serve: training(N, D, R, P) + S * inference(N, R, P).

    Attributes:
        training: training FLOPs.
        inference: FLOPs per served token.
        served_tokens: S, tokens read and written over the lifetime.
    """

    training: Cost
    inference: Cost
    served_tokens: float

    def __post_init__(self) -> None:
        if not (np.isfinite(self.served_tokens) and self.served_tokens >= 0):
            raise UserError(f"served tokens = {self.served_tokens:g}; give a number, 0 or above")

    @property
    def unit(self) -> str:
        """What a figure counts."""
        return f"FLOPs for training and {self.served_tokens:.3g} served tokens"

    def __call__(self, N: Any, D: Any, R: Any, P: Any) -> Any:
        """FLOPs over the lifetime."""
        return self.training(N, D, R, P) + self.served_tokens * self.inference(N, D, R, P)


@dataclasses.dataclass(frozen=True)
class Serving:
    """How tokens are served.

    Attributes:
        prompt: tokens of a request that are read (prefill). new: tokens that are written (decode), each behind those before.
    """

    prompt: int
    new: int


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What a size becomes and what it costs: window, vocabulary and the shape rule of a sweep."""

    vocab_size: int
    seq_len: int
    rule: "ShapeRule | None" = None
    parts: "Parts | None" = None

    def training(self) -> TrainingCost:
        """Training FLOPs as a function of N, D, R and P."""
        from sweeps.smooth_cost import cost_function

        return TrainingCost(
            cost_function(vocab_size=self.vocab_size, seq_len=self.seq_len, **self._proportions()), self
        )

    def inference(self, serving: Serving | None = None) -> InferenceCost:
        """FLOPs per served token.

        Args:
            serving: lengths of a request, over whose tokens the cost is averaged: prefill, with the logits of its last token,
                and decode. By default the forward pass over a window of the training length with all logits, a third of the
                training FLOPs per token.
        """
        from sweeps.smooth_cost import inference_function

        request = (self.seq_len, 0) if serving is None else (serving.prompt, serving.new)
        price = inference_function(
            vocab_size=self.vocab_size, prompt=request[0], new=request[1], score=serving is None, **self._proportions()
        )
        return InferenceCost(price, self.training())

    def lifetime(self, served_tokens: float, serving: Serving | None = None) -> LifetimeCost:
        """Training FLOPs and those of `served_tokens` tokens."""
        return LifetimeCost(self.training(), self.inference(serving), float(served_tokens))

    def _proportions(self) -> dict[str, Any]:
        given = {"rule": self.rule, "parts": self.parts}
        return {name: value for name, value in given.items() if value is not None}


def unit_of(cost: Cost) -> str:
    """What a cost counts; a plain function is taken for training FLOPs."""
    return getattr(cost, "unit", TrainingCost.unit)


def training_of(cost: Cost) -> Cost | None:
    """The training FLOPs of the models that a cost prices; None where unknown."""
    return getattr(cost, "training", cost)


def shapes_of_results(path: str | Path, *, vocab_size: int | None = None, seq_len: int | None = None) -> Shapes:
    """Shape rule, window and vocabulary of the sweep behind results.

    Args:
        path: a sweep folder or the results file in it; or results that stand alone, together with `vocab_size`.
        vocab_size: vocabulary of the models, where the sweep's own folder is not at hand; the default shape rule holds then.
        seq_len: window of the models, where the results do not tell it; with a `vocab_size` alone.

    Raises:
        UserError: there is no sweep beside the results and no `vocab_size`, or its runs differ in vocabulary or window.
    """
    if vocab_size is not None and seq_len is not None:
        return Shapes(vocab_size, seq_len)
    if seq_len is not None:
        raise UserError("seq_len= (--seq-len): prices shapes together with vocab_size= (--vocab-size)")
    results = find_results(path)
    folder = results.parent
    if vocab_size is None and not (folder / "plan.parquet").exists():
        raise UserError(
            f"{results}: stands apart from its sweep (no plan.parquet beside it), so shapes cannot be priced; "
            f"give the sweep folder, the vocabulary with vocab_size= (--vocab-size), or {OWN_WAY}"
        )
    if vocab_size is not None:
        table = read_table(results)
        if "seq_len" not in table:
            raise UserError(f"{results}: no column 'seq_len'; give the window with seq_len= (--seq-len), or {OWN_WAY}")
        return Shapes(vocab_size, _only(numeric_column(table, "seq_len", str(results)), "seq_len", str(results)))
    from sweeps.store import load_sweep

    sweep = load_sweep(folder)
    return _shapes_of_runs([run.config for run in sweep.runs], sweep.spec.shape, str(folder))


def cost_of_results(path: str | Path, *, vocab_size: int | None = None) -> TrainingCost:
    """Training FLOPs, cost(N, D, R, P), under the sweep behind results; see `shapes_of_results`."""
    return shapes_of_results(path, vocab_size=vocab_size).training()


def cost_of_plan(plan: "Plan") -> TrainingCost:
    """cost(N, D, R, P) under the shape rule, window and vocabulary of a plan; N counts non-embedding parameters.

    Raises:
        UserError: its runs differ in vocabulary or window.
    """
    return _shapes_of_runs([run.config for run in plan.runs], plan.sweep.shape, plan.sweep.where).training()


def _shapes_of_runs(configs: Sequence["RunConfig"], rule: "ShapeRule", where: str) -> Shapes:
    from sweeps.shapes import Parts

    vocabulary = _only([c.model.vocab_size for c in configs], "model.vocab_size", where)
    seq_len = _only([c.data.seq_len for c in configs], "data.seq_len", where)
    typical = next((c for c in configs if not c.model.is_dense), configs[0])
    return Shapes(vocabulary, seq_len, rule, Parts.of(typical.model.model_dump()))


def require_priced(convention: Convention, prices: object = None) -> None:
    """The shape rule prices non-embedding parameters, with causal attention halved.

    Args:
        convention: of the fit or the results.
        prices: what prices the models; only shapes are bound to a convention.

    Raises:
        UserError: N or C were loaded under another convention, or nothing says what a mapped N counts.
    """
    shapes = prices is None or isinstance(prices, Shapes) or getattr(prices, "shapes", None) is not None
    if shapes and (convention.n != "non_embedding" or convention.c == "full"):
        raise UserError(
            "the cost of shapes counts N without embeddings and C causal-halved, but "
            f"N is {convention.n!r} and C {convention.c!r}; load the results with n='non_embedding' (--n non_embedding) and "
            f"c='causal', or give {OWN_WAY}"
        )


def _only(values: object, name: str, where: str) -> int:
    distinct = np.unique(np.asarray(values))
    if len(distinct) != 1:
        raise UserError(
            f"{where}: runs differ in {name} ({', '.join(f'{v:g}' for v in distinct[:4])}); "
            "their cost is no function of N, D, R, P alone"
        )
    return int(distinct[0])
