"""From a sweep to its runs, each with its whole config, parameters, tokens and cost. Pure: nothing is written or built.

No torch here: ten thousand runs are planned in about a second.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlcm.config import DataConfig, RunConfig, TrainConfig
from dlcm.errors import UserError, parse
from flops import FlopCount, ParamCount
from sweeps.axes import ALIASES, DESIGN, expand, overlay, unflatten
from sweeps.points import PlannedModel, Point, Shared
from sweeps.trunks import shared_steps
from sweeps.tuned import apply_tuned, describe_source

if TYPE_CHECKING:
    import pandas as pd

    from sweeps.spec import Sweep

_SHORT = {path: name for name, path in ALIASES.items()}
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
        budget_share: this run's part of the planned training FLOPs of the whole sweep, each trunk counted once.
        trunk_run: longest run of those that share its trunk (`sweeps.trunks`), maybe itself; None where it shares nothing.
        steps_shared: its first steps, if a longer run of them trains those.
    """

    config: RunConfig
    design: Mapping[str, Any]
    params: ParamCount
    flops: FlopCount
    budget: str
    budget_share: float = 0.0
    run_id: str = field(default="")
    trunk_run: str | None = None
    steps_shared: int = 0

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

    @property
    def tokens_shared(self) -> int:
        """Training tokens that a longer run spends for it."""
        return self.steps_shared * self.config.train.batch_tokens

    @property
    def flops_marginal(self) -> float:
        """Training FLOPs at the planned R, without those of the shared steps."""
        return self.flops.training_per_token * (self.tokens - self.tokens_shared)

    @property
    def lr_token_effective(self) -> float:
        """Peak learning rate of the token-side matrices at the realised width: lr_token / s_token (eq 19)."""
        return self.config.optim.lr_token / self.config.model.mup_scale_token

    @property
    def lr_concept_effective(self) -> float:
        """Peak learning rate of the concept-side matrices: lr_concept / s_concept (eq 20); the token side's of a dense model."""
        if self.config.model.is_dense:
            return self.lr_token_effective
        return self.config.optim.lr_concept / self.config.model.mup_scale_concept


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
    def flops_marginal(self) -> float:
        """Training FLOPs of all runs, the steps that runs share counted once: what the sweep costs."""
        return sum(run.flops_marginal for run in self.runs)

    @property
    def tokens(self) -> int:
        """Training tokens of all runs."""
        return sum(run.tokens for run in self.runs)

    def to_frame(self) -> "pd.DataFrame":
        """One row a run, named as in results.parquet where the column exists there."""
        import pandas as pd

        source = describe_source(self.sweep.tuned, given_keys(self.sweep))
        return pd.DataFrame([{**plan_row(run, self.sweep.name), "lr_source": source} for run in self.runs])

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
        "trunk_run": run.trunk_run,
        "n_stable_steps": run.config.n_stable_steps,
        "tokens_shared": run.tokens_shared,
        "flops_train_marginal_planned": run.flops_marginal,
        "lr_token": run.config.optim.lr_token,
        "lr_concept": run.config.optim.lr_concept,
        "lr_token_effective": run.lr_token_effective,
        "lr_concept_effective": run.lr_concept_effective,
        "batch_tokens": run.config.train.batch_tokens,
    }


def plan(sweep: "Sweep") -> Plan:
    """All runs of a sweep.

    Every point of the axes is run at every budget. A FLOPs budget C becomes tokens = C / (training FLOPs per token at the
    planned R); tokens are rounded down to whole steps, so that no run exceeds its budget by rounding. The batch is that of
    `Sweep.batch`. Two points with the same config are one run.

    Args:
        sweep: as read from its file.

    Returns:
        The plan; shares of the budget sum to one.

    Raises:
        UserError: a value that its field refuses, R <= 1, an impossible shape, a budget below one step, or runs below
            `Sweep.minimum`; the message names the file and the point.
    """
    _check_given(sweep)
    shared = Shared(sweep)
    tuned = {} if sweep.tuned is None else apply_tuned(Path(sweep.tuned), given_keys(sweep), sweep.where)
    points = [overlay(sweep.base, tuned, point) for point in expand(sweep.axes)]
    runs: dict[str, PlannedRun] = {}
    short: list[str] = []
    for values in (*points, *shared.baseline_points(points)):
        for run in _runs_of(shared, values):
            if run.run_id in runs:
                continue
            runs[run.run_id] = run
            if fault := sweep.minimum.fault(run.config, run.params.non_embedding):
                short.append(f"{shared.where(values)}: {run.budget or 'train.tokens'}: {fault}")
    if short:
        raise UserError(f"{short[0]}; {len(short)} of {len(runs)} runs {'is' if len(short) == 1 else 'are'} too short")
    found = list(runs.values())
    shared_by = shared_steps(found, [shared.trunk_key(run.config) for run in found])
    costs = [
        run.flops.training_per_token * (run.tokens - n * run.config.train.batch_tokens)
        for run, (_, n) in zip(found, shared_by)
    ]
    total = sum(costs)
    # dataclasses.replace would run over every field's descriptor for each of thousands of runs.
    return Plan(
        sweep,
        tuple(
            PlannedRun(r.config, r.design, r.params, r.flops, r.budget, cost / total, r.run_id, head, n)
            for r, cost, (head, n) in zip(found, costs, shared_by)
        ),
    )


def given_keys(sweep: "Sweep") -> set[str]:
    """Every key that the sweep sets in its base or its axes."""
    axes = sweep.axes
    return {*sweep.base, *axes.grid, *axes.zip, *(key for entry in axes.list for key in entry)}


def _check_given(sweep: "Sweep") -> None:
    """Exactly one of `budgets` and `train.tokens` sets how long the runs are, and one rule how large a batch is."""
    baseline, keys = sweep.baseline, given_keys(sweep)
    if sweep.budgets is None and "train.tokens" not in keys:
        raise UserError(
            f"{sweep.where}: no length of the runs: add budgets (flops, tokens or tokens_per_parameter) or train.tokens"
        )
    if sweep.budgets is not None and "train.tokens" in keys:
        raise UserError(f"{sweep.where}: both budgets and train.tokens set the length of the runs; keep one")
    if sweep.warmup.rule != "fixed" and (given := keys & {"optim.warmup_tokens", "optim.warmup_share"}):
        raise UserError(f"{sweep.where}: both warmup (rule: parameters) and {min(given)} set the warm-up; keep one")
    if sweep.batch.rule != "fixed" and "train.batch_tokens" in keys | {*(baseline.set if baseline else ())}:
        raise UserError(
            f"{sweep.where}: both batch (rule: {sweep.batch.rule}) and train.batch_tokens set the batch; keep one"
        )


def _runs_of(shared: Shared, values: Point) -> Iterator[PlannedRun]:
    """The runs of one point, one for each budget."""
    where, budgets = shared.where(values), shared.sweep.budgets
    rest = unflatten({k: v for k, v in values.items() if k not in DESIGN and not k.startswith("model.")})
    model = shared.model(values, where)
    data = shared.block("data", DataConfig, rest.get("data", {}), where)
    optim = shared.optim(rest.get("optim", {}), model.params.non_embedding, where)
    flops = shared.flops(model, data.config.seq_len)
    given = rest.get("train", {})
    if budgets is None:
        train = shared.block("train", TrainConfig, given, where).config
        lengths = [("", float(train.tokens))]
    else:
        train = shared.block("train", TrainConfig, {**given, "tokens": 1}, where).config
        lengths = [
            (f"{value:g} {_UNIT_LABELS[budgets.unit]}", _tokens(value, budgets.unit, model, flops))
            for value in budgets.values
        ]
    design = {_SHORT.get(key, key): value for key, value in values.items()}
    for budget, tokens in lengths:
        batch = _batch_tokens(shared.sweep, train, data.config.seq_len, tokens, flops)
        n_tokens = _whole_steps(tokens, batch, budget, shared.sweep, where) if budget else train.tokens
        length = {**given, "tokens": n_tokens, "batch_tokens": batch}
        blocks = {
            "model": model,
            "data": data,
            "optim": optim,
            "train": shared.block("train", TrainConfig, length, where),
        }
        config = parse(RunConfig, {**rest, **{name: block.config for name, block in blocks.items()}}, where)
        run_id = config.identify({name: block.json for name, block in blocks.items()})
        yield PlannedRun(config, {**design, "seed": config.seed}, model.params, flops, budget, run_id=run_id)


def _tokens(budget: float, unit: str, model: PlannedModel, flops: FlopCount) -> float:
    """Training tokens that `budget` pays for."""
    if unit == "flops":
        return budget / flops.training_per_token
    return budget * model.params.non_embedding if unit == "tokens_per_parameter" else budget


def _batch_tokens(sweep: "Sweep", train: TrainConfig, seq_len: int, tokens: float, flops: FlopCount) -> int:
    """Tokens of a step of a run of about `tokens`."""
    if sweep.batch.rule == "fixed":
        return train.batch_tokens
    x = tokens
    if sweep.batch.of == "flops":
        x *= flops.training_per_token * (1 - flops.share("head"))
    return sweep.batch.batch_tokens(x, train.micro_batch_tokens or seq_len)


def _whole_steps(tokens: float, batch: int, budget: str, sweep: "Sweep", where: str) -> int:
    """The tokens of a budget, rounded down to whole steps."""
    if tokens < batch:
        fixed = sweep.batch.rule == "fixed"
        step = f"train.batch_tokens = {batch:,}" if fixed else f"{batch:,} tokens, the batch by its rule"
        way_out = "train.batch_tokens" if fixed else "train.micro_batch_tokens or data.seq_len"
        raise UserError(
            f"{where}: a budget of {budget} is {int(tokens):,} tokens, less than one step of {step}; "
            f"raise the budget, or lower the size or {way_out}"
        )
    return int(tokens // batch) * batch
