"""From a sweep to its runs, each with its whole config, parameters, tokens and cost. Pure: nothing is written or built.

No torch here: a thousand runs are planned in about a second.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlcm.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from dlcm.errors import UserError, parse
from flops import FlopCount, ParamCount, count, parameters
from sweeps.axes import ALIASES, expand, label, parse_count, unflatten
from sweeps.shapes import SHAPE_FIELDS, Parts, dense_shape, dlcm_shape, size_at_cost

if TYPE_CHECKING:
    import pandas as pd

    from sweeps.spec import Sweep

# muP: widths at which the learning rates of a sweep hold, unless base.model names others. One base for all its shapes.
D_TOKEN_BASE = 64
D_CONCEPT_BASE = 64

_RATIO, _DETECTOR = ALIASES["compression_ratio"], ALIASES["boundary"]
# What only a DLCM has, so that a dense baseline drops it.
_DLCM_ONLY = ("concept_share", "model.pooling", "model.smoothing", "model.concept_bias", "model.cross_attention")
_UNIT_LABELS = {"flops": "FLOPs", "tokens": "tokens", "tokens_per_parameter": "tokens/parameter"}


@dataclass(frozen=True)
class PlannedRun:
    """One run before it is trained.

    Attributes:
        config: the whole config; its hash is part of `run_id`.
        design: the point of the sweep: `size`, `concept_share`, `compression_ratio`, `boundary`, `seed` where they were
            asked for, and every other axis by its dotted path.
        params: realised parameters.
        flops: FLOPs of one sequence at the planned R.
        budget: the budget that set the tokens, in words; empty where train.tokens did.
        budget_share: this run's part of the planned training FLOPs of the whole sweep.
    """

    config: RunConfig
    design: Mapping[str, Any]
    params: ParamCount
    flops: FlopCount
    budget: str
    budget_share: float = 0.0
    run_id: str = field(default="")

    @property
    def params_total(self) -> int:
        """All parameters."""
        return self.params.total

    @property
    def params_embedding(self) -> int:
        """Embedding and unembedding."""
        return self.params.embedding

    @property
    def params_token(self) -> int:
        """Token side without embeddings."""
        return self.params.token

    @property
    def params_concept(self) -> int:
        """Concept backbone."""
        return self.params.concept

    @property
    def concept_share(self) -> float:
        """P, realised."""
        return self.params.concept_share

    @property
    def compression_target(self) -> float:
        """R, planned; 1 for a dense model."""
        return self.config.model.compression_target

    @property
    def tokens(self) -> int:
        """Training tokens, whole steps."""
        return self.config.tokens

    @property
    def flops_per_token_forward(self) -> float:
        """Forward FLOPs per token at the planned R, one document per window."""
        return self.flops.forward_per_token

    @property
    def flops_train_planned(self) -> float:
        """Training FLOPs of the run at the planned R."""
        return self.flops.training_per_token * self.tokens


@dataclass(frozen=True)
class Plan:
    """The runs of a sweep, each once, in the order of the file: DLCM runs by budget and point, then the baseline."""

    sweep: "Sweep"
    runs: tuple[PlannedRun, ...]

    def __len__(self) -> int:
        return len(self.runs)

    @property
    def flops(self) -> float:
        """Training FLOPs of all runs."""
        return sum(run.flops_train_planned for run in self.runs)

    @property
    def tokens(self) -> int:
        """Training tokens of all runs."""
        return sum(run.tokens for run in self.runs)

    def to_frame(self) -> "pd.DataFrame":
        """One row a run, named as in results.parquet where the column exists there."""
        import pandas as pd

        return pd.DataFrame([plan_row(run, self.sweep.name) for run in self.runs])

    def save(self, path: Path) -> None:
        """Write `to_frame()` as parquet, atomically."""
        from dlcm.record import write_atomic

        data = self.to_frame().to_parquet(index=False)
        assert isinstance(data, bytes)  # pandas returns bytes where it is given no path
        write_atomic(path, data)


def plan_row(run: PlannedRun, sweep: str) -> dict[str, Any]:
    """A run as one flat row: realised shape, parameters, tokens and planned cost."""
    model = run.config.model
    layers = (model.n_encoder_layers, model.n_concept_layers, model.n_decoder_layers)
    return {
        "run_id": run.run_id,
        "sweep": sweep,
        "model": model.kind,
        "boundary": model.boundary.detector if model.boundary else "none",
        "seed": run.config.seed,
        "n_encoder_layers": layers[0],
        "n_concept_layers": layers[1],
        "n_decoder_layers": layers[2],
        "d_token": model.d_token,
        "d_concept": model.d_concept,
        "params_total": run.params.total,
        "params_embedding": run.params.embedding,
        "params_token": run.params.token,
        "params_concept": run.params.concept,
        "params_non_embedding": run.params.non_embedding,
        "concept_share": run.params.concept_share,
        "compression_target": model.compression_target,
        "tokens": run.tokens,
        "n_steps": run.config.n_steps,
        "seq_len": run.config.data.seq_len,
        "flops_per_token_forward": run.flops_per_token_forward,
        "flops_train_planned": run.flops_train_planned,
        "budget": run.budget,
        "budget_share": run.budget_share,
        "lr_token": run.config.optim.lr_token,
        "lr_concept": run.config.optim.lr_concept,
    }


def plan(sweep: "Sweep") -> Plan:
    """All runs of a sweep.

    Every point of the axes is run at every budget. A FLOPs budget C becomes tokens = C / (training FLOPs per token at the
    planned R); tokens are rounded down to whole steps, so that no run exceeds its budget by rounding. Two points with the
    same config are one run.

    Args:
        sweep: as read from its file.

    Returns:
        The plan; shares of the budget sum to one.

    Raises:
        UserError: a value that its field refuses, R <= 1, an impossible shape, or a budget below one step; the message
            names the file and the point.
    """
    _check_lengths(sweep)
    points = [{**sweep.base, **point} for point in expand(sweep.axes)]
    runs: dict[str, PlannedRun] = {}
    for values in (*points, *_baseline_points(sweep, points)):
        for run in _runs_of(sweep, values):
            runs.setdefault(run.run_id, run)
    total = sum(run.flops_train_planned for run in runs.values())
    return Plan(sweep, tuple(_with_share(run, total) for run in runs.values()))


def _with_share(run: PlannedRun, total: float) -> PlannedRun:
    # dataclasses.replace would run over every field's descriptor for each of thousands of runs.
    return PlannedRun(
        run.config, run.design, run.params, run.flops, run.budget, run.flops_train_planned / total, run.run_id
    )


def _check_lengths(sweep: "Sweep") -> None:
    """Exactly one of `budgets` and `train.tokens` sets how long the runs are."""
    axes = sweep.axes
    given = "train.tokens" in sweep.base or any("train.tokens" in keys for keys in (axes.grid, axes.zip, *axes.list))
    if sweep.budgets is None and not given:
        raise UserError(
            f"{sweep.where}: no length of the runs: add budgets (flops, tokens or tokens_per_parameter) or train.tokens"
        )
    if sweep.budgets is not None and given:
        raise UserError(f"{sweep.where}: both budgets and train.tokens set the length of the runs; keep one")


def _baseline_points(sweep: "Sweep", points: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The dense counterparts of the points: everything that only a DLCM has is dropped, the rest stays."""
    baseline = sweep.baseline
    if baseline is None:
        return
    seen = set()
    for values in points:
        dense = {k: v for k, v in values.items() if k not in _DLCM_ONLY and not k.startswith("model.boundary.")}
        dense = {k: v for k, v in dense.items() if not _is_concept_field(k)}
        dense["model.kind"] = "dense"
        if baseline.match == "flops":
            dense["size"] = _matched_size(sweep, values)
        elif "size" not in dense and not baseline.sizes:
            raise UserError(f"{sweep.where}: baseline: no size to match; give size in base or axes, or baseline.sizes")
        for size in baseline.sizes or (dense["size"],):
            for seed in baseline.seeds or (dense.get("seed", 0),):
                point = {k: v for k, v in dense.items() if k.rpartition(".")[2] not in SHAPE_FIELDS}
                point |= {"size": size, "seed": seed, **baseline.set}
                # A dense model has no concept side; one learning rate, so that an axis over lr_concept adds no twin runs.
                point["optim.lr_concept"] = point.get(
                    "optim.lr_token", RunConfig.model_fields["optim"].default.lr_token
                )
                if (key := repr(sorted(point.items()))) not in seen:
                    seen.add(key)
                    yield point


def _is_concept_field(path: str) -> bool:
    return path.startswith("model.") and "concept" in path


def _matched_size(sweep: "Sweep", values: dict[str, Any]) -> float:
    """Size of the dense model that costs as much per token as the DLCM at `values`."""
    where = _where(sweep, values)
    nested = _model_values(sweep, values, where)
    model = parse(ModelConfig, nested, f"{where}: model")
    seq_len = int(values.get("data.seq_len", DataConfig().seq_len))
    target = count(model, seq_len).training_per_token
    return size_at_cost(
        target, vocab_size=model.vocab_size, seq_len=seq_len, rule=sweep.shape, d_head=nested.get("d_head")
    )


def _runs_of(sweep: "Sweep", values: dict[str, Any]) -> Iterator[PlannedRun]:
    """The runs of one point, one for each budget."""
    where = _where(sweep, values)
    config = {k: v for k, v in values.items() if k not in ("size", "concept_share") and not k.startswith("model.")}
    nested = unflatten(config)
    nested["model"] = _model_values(sweep, values, where)
    nested["model"] = model = parse(ModelConfig, nested["model"], f"{where}: model")
    if sweep.budgets is None:
        yield _planned(nested, values, "", where)
        return
    data = parse(DataConfig, nested.get("data", {}), f"{where}: data")
    batch = parse(TrainConfig, {**nested.get("train", {}), "tokens": 1}, f"{where}: train").batch_tokens
    for budget in sweep.budgets.values:
        text = f"{budget:g} {_UNIT_LABELS[sweep.budgets.unit]}"
        tokens = _tokens(budget, sweep.budgets.unit, model, data.seq_len)
        if tokens < batch:
            raise UserError(
                f"{where}: a budget of {text} is {int(tokens):,} tokens, less than one step of train.batch_tokens = {batch:,}; "
                "raise the budget, or lower the size or train.batch_tokens"
            )
        n_tokens = int(tokens // batch) * batch
        yield _planned({**nested, "train": {**nested.get("train", {}), "tokens": n_tokens}}, values, text, where)


def _tokens(budget: float, unit: str, model: ModelConfig, seq_len: int) -> float:
    """Training tokens that `budget` pays for."""
    if unit == "flops":
        return budget / count(model, seq_len).training_per_token
    return budget * parameters(model).non_embedding if unit == "tokens_per_parameter" else budget


def _planned(nested: dict[str, Any], values: Mapping[str, Any], budget: str, where: str) -> PlannedRun:
    config = parse(RunConfig, nested, where)
    short = {path: name for name, path in ALIASES.items()}
    design = {short.get(key, key): value for key, value in values.items()}
    design["seed"] = config.seed
    flops = count(config.model, config.data.seq_len)
    return PlannedRun(config, design, parameters(config.model), flops, budget, run_id=config.run_id)


def _model_values(sweep: "Sweep", values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of the model config at a point: what is given, the shape of its size, and what the sweep fixes."""
    given = {k.removeprefix("model."): v for k, v in values.items() if k.startswith("model.")}
    model = unflatten(given)
    dense = model.get("kind", "dlcm") == "dense"
    _check_design(values, dense, where)
    if "size" in values:
        if clash := [name for name in SHAPE_FIELDS if name in model]:
            raise UserError(
                f"{where}: size decides the shape, so model.{clash[0]} cannot be given too; remove one of them"
            )
        model |= _shape(sweep, values, model, dense, where)
    elif "concept_share" in values:
        raise UserError(f"{where}: concept_share needs size, which it divides; add size, or remove concept_share")
    if "vocab_size" not in model:
        tokenizer = str(values.get("data.tokenizer", DataConfig().tokenizer))
        model["vocab_size"] = _vocab_size(tokenizer)
        if model["vocab_size"] is None:
            raise UserError(f"{where}: the vocabulary of {tokenizer!r} is only known to the hub; give model.vocab_size")
    model.setdefault("d_token_base", D_TOKEN_BASE)
    if not dense:
        model.setdefault("d_concept_base", D_CONCEPT_BASE)
    return model


def _shape(sweep: "Sweep", values: Mapping[str, Any], model: dict[str, Any], dense: bool, where: str) -> dict[str, int]:
    size = _number(values["size"], "size", where)
    try:
        if dense:
            return dense_shape(size, sweep.shape, model.get("d_head"))
        if "concept_share" not in values:
            raise UserError(
                "a dlcm sweep over size needs concept_share, the backbone's share of it; add it to base or axes"
            )
        return dlcm_shape(size, _number(values["concept_share"], "concept_share", where), sweep.shape, Parts.of(model))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _check_design(values: Mapping[str, Any], dense: bool, where: str) -> None:
    if dense:
        if given := [name for name in ("concept_share", _RATIO, _DETECTOR) if name in values]:
            name = {_RATIO: "compression_ratio", _DETECTOR: "boundary"}.get(given[0], given[0])
            raise UserError(
                f"{where}: a dense model takes no {name}; remove it, or use the baseline block for dense runs"
            )
    elif _RATIO in values and (ratio := _number(values[_RATIO], "compression_ratio", where)) <= 1:
        raise UserError(
            f"{where}: compression_ratio = {ratio:g}, but R must be above 1 token per concept; "
            "for no compression use a dense model (the baseline block)"
        )


def _number(value: Any, name: str, where: str) -> float:
    number = parse_count(value)
    try:
        if isinstance(number, bool):
            raise TypeError
        return float(number)
    except (TypeError, ValueError):
        raise UserError(f"{where}: {name} = {value!r} is not a number") from None


def _where(sweep: "Sweep", values: Mapping[str, Any]) -> str:
    """Names a point by what was asked of it, not by everything that its base fixes."""
    varied = {*sweep.axes.grid, *sweep.axes.zip, *(key for entry in sweep.axes.list for key in entry)}
    kind = {"model.kind": "dense"} if values.get("model.kind") == "dense" else {}
    named = {"size", *varied, *ALIASES.values(), "concept_share"}
    return f"{sweep.where}: run [{label({**kind, **{k: v for k, v in values.items() if k in named}})}]"


@functools.lru_cache(maxsize=64)
def _vocab_size(tokenizer: str) -> int | None:
    from dlcm.tokens import vocab_size_of

    return vocab_size_of(tokenizer)
