"""From the points of a sweep to the validated parts of its run configs; what many runs share is made once.

A plan of ten thousand runs has a few hundred models and a handful of data and optimizer blocks: each is solved, validated,
counted and written as JSON once, and the runs refer to it.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar, get_args

from dlcm.config import NOT_IN_TRUNK, DataConfig, Frozen, ModelConfig, OptimConfig, RunConfig, canonical_json
from dlcm.errors import UserError, nearest, parse
from flops import FlopCount, ParamCount, count, parameters
from sweeps.axes import ALIASES, DESIGN, Parametrization, label, overlay, parse_count, unflatten
from sweeps.shapes import SHAPE_FIELDS, Parts, dense_shape, dlcm_shape
from sweeps.smooth_cost import size_at_cost

if TYPE_CHECKING:
    from sweeps.spec import Sweep

# muP: widths at which the learning rates of a sweep hold, unless base.model names others. One base for all its shapes.
D_TOKEN_BASE = 64
D_CONCEPT_BASE = 64
PARAMETRIZATIONS = get_args(Parametrization)

_RATIO, _DETECTOR = ALIASES["compression_ratio"], ALIASES["boundary"]
# What only a DLCM has, so that a dense baseline drops it.
_DLCM_ONLY = ("concept_share", "model.pooling", "model.smoothing", "model.concept_bias", "model.cross_attention")

Point = Mapping[str, Any]
ConfigT = TypeVar("ConfigT", bound=Frozen)


@dataclass(frozen=True)
class Block(Generic[ConfigT]):
    """A validated block of a run config, and its canonical JSON, which the ids of its runs are made of."""

    config: ConfigT
    json: str


@dataclass(frozen=True)
class PlannedModel(Block[ModelConfig]):
    """A model and its parameters."""

    params: ParamCount


class Shared:
    """The models, blocks and counts of one sweep, each made at its first use.

    Args:
        sweep: whose points are asked for.
    """

    def __init__(self, sweep: "Sweep") -> None:
        self.sweep = sweep
        axes = sweep.axes
        varied = (*axes.grid, *axes.zip, *(key for entry in axes.list for key in entry))
        self._named = {*DESIGN, *ALIASES.values(), *varied}
        self._models: dict[str, PlannedModel] = {}
        self._blocks: dict[tuple[type, str], Block] = {}
        self._flops: dict[tuple[str, int], FlopCount] = {}
        self._trunk_parts: dict[int, str] = {}
        self._matched: dict[tuple[float, int, int, Any], float] = {}

    def where(self, values: Point) -> str:
        """Names a point by what was asked of it, not by everything that the base fixes."""
        kind = {"model.kind": "dense"} if values.get("model.kind") == "dense" else {}
        return f"{self.sweep.where}: run [{label({**kind, **{k: v for k, v in values.items() if k in self._named}})}]"

    def block(self, name: str, kind: type[ConfigT], values: Mapping[str, Any], where: str) -> Block[ConfigT]:
        """`values` as the block `name` of the run config.

        Raises:
            UserError: a value that its field refuses.
        """
        key = (kind, repr(values))
        found = self._blocks.get(key)
        if found is None:
            config = parse(kind, values, where, name)
            found = self._blocks[key] = Block(config, canonical_json(config))
        return found

    def optim(self, values: Mapping[str, Any], non_embedding: int, where: str) -> Block[OptimConfig]:
        """The optimizer of a point: what is given, and the warm-up by the sweep's rule.

        Raises:
            UserError: a value that its field refuses.
        """
        given = self.block("optim", OptimConfig, values, where)
        if self.sweep.warmup.rule == "fixed":
            return given
        warmup = self.sweep.warmup.tokens(non_embedding)
        return self.block("optim", OptimConfig, {**values, "warmup_tokens": warmup}, where)

    def trunk_key(self, config: RunConfig) -> tuple | None:
        """What runs with a common trunk have in common, as `RunConfig.trunk` has it but without writing the whole config."""
        if not config.n_stable_steps:
            return None
        parts = (self._trunk_part(getattr(config, name), fields) for name, fields in NOT_IN_TRUNK.items())
        return id(config.model), config.seed, *parts

    def _trunk_part(self, block: Frozen, without: tuple[str, ...]) -> str:
        key = id(block)  # blocks live as long as their sweep: see `block`
        found = self._trunk_parts.get(key)
        if found is None:
            found = self._trunk_parts[key] = canonical_json(block.model_dump(mode="json", exclude=set(without)))
        return found

    def model(self, values: Point, where: str) -> PlannedModel:
        """The model of a point: what is given, the shape of its size, and what the sweep fixes.

        Raises:
            UserError: contradictory or impossible values, or no shape within tolerance.
        """
        key = repr([item for item in values.items() if item[0].startswith("model.") or item[0] in _MODEL_KEYS])
        found = self._models.get(key)
        if found is None:
            config = parse(ModelConfig, _model_values(self.sweep, values, where), where, "model")
            found = self._models[key] = PlannedModel(config, canonical_json(config), parameters(config))
        return found

    def flops(self, model: Block[ModelConfig], seq_len: int) -> FlopCount:
        """FLOPs of one sequence at the model's target R."""
        key = (model.json, seq_len)
        found = self._flops.get(key)
        if found is None:
            found = self._flops[key] = count(model.config, seq_len)
        return found

    def baseline_points(self, points: Iterable[Point]) -> Iterator[Point]:
        """The dense counterparts of the points: everything that only a DLCM has is dropped, the rest stays.

        Raises:
            UserError: no size to match.
        """
        baseline = self.sweep.baseline
        if baseline is None:
            return
        seen = set()
        for values in points:
            dense = {key: value for key, value in values.items() if not _is_dlcm_only(key)}
            dense["model.kind"] = "dense"
            if baseline.match == "flops":
                dense["size"] = self._matched_size(values)
            elif "size" not in dense and not baseline.sizes:
                raise UserError(
                    f"{self.sweep.where}: baseline: no size to match; give size in base or axes, or baseline.sizes"
                )
            for size in baseline.sizes or (dense["size"],):
                for seed in baseline.seeds or (dense.get("seed", 0),):
                    point = {k: v for k, v in dense.items() if k.rpartition(".")[2] not in SHAPE_FIELDS}
                    point = overlay(point | {"size": size, "seed": seed}, baseline.set)
                    # A dense model has no concept side; one learning rate, so that an axis over lr_concept adds no twin runs.
                    point["optim.lr_concept"] = point.get(
                        "optim.lr_token", RunConfig.model_fields["optim"].default.lr_token
                    )
                    if (key := repr(sorted(point.items()))) not in seen:
                        seen.add(key)
                        yield point

    def _matched_size(self, values: Point) -> float:
        """Size of the dense model that costs as much per token as the DLCM at `values`."""
        model = self.model(values, self.where(values))
        seq_len = int(values.get("data.seq_len", DataConfig().seq_len))
        target = self.flops(model, seq_len).training_per_token
        key = (target, model.config.vocab_size, seq_len, values.get("model.d_head"))
        if key not in self._matched:
            try:
                self._matched[key] = size_at_cost(
                    target, vocab_size=key[1], seq_len=seq_len, rule=self.sweep.shape, d_head=key[3]
                )
            except UserError as error:
                raise UserError(f"{self.where(values)}: baseline: {error}") from None
        return self._matched[key]


# What the model of a point depends on beside its own fields: the tokenizer gives the vocabulary.
_MODEL_KEYS = (*DESIGN, "data.tokenizer")


def _is_dlcm_only(path: str) -> bool:
    return path in _DLCM_ONLY or (
        path.startswith("model.") and ("concept" in path or path.startswith("model.boundary."))
    )


def _model_values(sweep: "Sweep", values: Point, where: str) -> dict[str, Any]:
    """The fields of the model config at a point."""
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
    _set_bases(values, model, dense, where)
    return model


def _set_bases(values: Point, model: dict[str, Any], dense: bool, where: str) -> None:
    """The muP base widths: one pair for all shapes of a sweep; the own widths of each where it is parametrised as usual."""
    kind = values.get("parametrization", "mup")
    if kind not in PARAMETRIZATIONS:
        raise UserError(f"{where}: parametrization = {kind!r}{nearest(str(kind), PARAMETRIZATIONS)}; mup or standard")
    bases = {"d_token_base": D_TOKEN_BASE} | ({} if dense else {"d_concept_base": D_CONCEPT_BASE})
    for name, width in bases.items():
        if kind == "mup":
            model.setdefault(name, width)
        elif name in model:
            raise UserError(
                f"{where}: parametrization: standard has no base width; remove model.{name}, or `tuned`, which sets it"
            )
        else:
            model[name] = model.get(name.removesuffix("_base"), 1)


def _shape(sweep: "Sweep", values: Point, model: dict[str, Any], dense: bool, where: str) -> dict[str, int]:
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


def _check_design(values: Point, dense: bool, where: str) -> None:
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


@functools.lru_cache(maxsize=64)
def _vocab_size(tokenizer: str) -> int | None:
    from dlcm.tokens import vocab_size_of

    return vocab_size_of(tokenizer)
