"""The YAML file of a sweep: base config, axes, budgets, baseline, evaluation, cluster. No torch.

    name: compression
    base:                       # overrides of the run config, nested as in `dlcm.config`, plus the design variables
      data: {corpus: stdlib, tokenizer: bpe-4096}        # or mixture: {code: {corpus: stdlib, weight: 0.7}, wiki: {...}}
      optim: {lr_token: 3.0e-3, lr_concept: 3.0e-3}
      size: 0.5M                # non-embedding parameters; the shape follows (`sweeps/shapes.py`)
    axes:
      grid: {compression_ratio: [2, 4, 8], concept_share: [0.3, 0.5, 0.7]}     # every combination
      zip: {seed: [0, 1], optim.lr_token: [2.0e-3, 3.0e-3]}                    # in step
      list: [{model.pooling: mean}, {model.pooling: first}]                    # as written
    budgets: {flops: [1e12, 3e12]}                                             # or tokens, or tokens_per_parameter
    batch: {rule: power, of: tokens}                                           # a published law in place of train.batch_tokens
    tuned: lr.yaml                                                             # in place of the rates: `dlcm analyze lr`
    warmup: {rule: parameters}                                                 # as many tokens as parameters
    minimum: {steps: 100, tokens_per_parameter: 1}                             # shorter runs are refused
    baseline: {match: parameters}                                              # the dense model at each size
    evaluate: [corpus, ../data/openbook_qa.jsonl]
    track: [tensorboard]                                                       # or wandb
    cluster: {partition: gpu, time: "4:00:00", gpus: 1}

`grid`, `zip` and `list` combine by product: each may be left out, and a key may stand in one of them only.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, PrivateAttr, field_validator, model_validator

from dlcm.config import Frozen
from dlcm.errors import UserError, parse, user_path
from dlcm.tracking import TrackerName
from sweeps.axes import COUNTS, DESIGN, MIXTURE, Count, check_paths, flatten, parse_count
from sweeps.cluster_config import ClusterConfig as ClusterConfig
from sweeps.rules import BatchRule, Minimum, WarmupRule
from sweeps.shapes import ShapeRule

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

Values = tuple[Any, ...]


class Axes(Frozen):
    """What varies. The blocks combine by product; inside `zip` the lists run in step."""

    grid: dict[str, Values] = Field(default={}, description="key -> values; every combination")
    zip: dict[str, Values] = Field(default={}, description="key -> values, all of one length; taken in step")
    list: tuple[dict[str, Any], ...] = Field(
        default=(), description="points written out, each a mapping of keys to values"
    )

    @field_validator("grid", "zip", mode="before")
    @classmethod
    def _values_are_lists(cls, axes: Any) -> Any:
        for key, values in axes.items() if isinstance(axes, Mapping) else ():
            if not isinstance(values, (tuple, list)) or not values:
                raise ValueError(f"the values of {key!r} must be a list with at least one entry, got {values!r}")
        return axes

    @model_validator(mode="after")
    def _check(self) -> "Axes":
        lengths = {key: len(values) for key, values in self.zip.items()}
        if len(set(lengths.values())) > 1:
            told = ", ".join(f"{key} has {n}" for key, n in lengths.items())
            raise ValueError(f"the lists of zip must have one length: {told}")
        return self


class Budgets(Frozen):
    """How long the runs are: exactly one of the three lists. Every design point is run at every budget."""

    flops: tuple[Count, ...] | None = Field(default=None, description="training FLOPs of one run, at its planned R")
    tokens: tuple[Count, ...] | None = Field(default=None, description="training tokens of one run")
    tokens_per_parameter: tuple[Count, ...] | None = Field(
        default=None, description="training tokens over the realised non-embedding parameters"
    )

    @model_validator(mode="after")
    def _check(self) -> "Budgets":
        given = [name for name in type(self).model_fields if getattr(self, name)]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(f"budgets takes one list of flops, tokens or tokens_per_parameter, found {found}")
        return self

    @property
    def unit(self) -> Literal["flops", "tokens", "tokens_per_parameter"]:
        """Which of the three lists is given."""
        for name in ("flops", "tokens"):
            if getattr(self, name):
                return name
        return "tokens_per_parameter"

    @property
    def values(self) -> tuple[float, ...]:
        """The budgets, in `unit`."""
        return getattr(self, self.unit)


class Baseline(Frozen):
    """Dense models beside the DLCM runs: the same axes without those that only a DLCM has, each model once."""

    match: Literal["parameters", "flops"] = Field(
        default="parameters",
        description="`parameters`: as many non-embedding parameters; `flops`: as many training FLOPs per token as each DLCM",
    )
    sizes: tuple[Count, ...] | None = Field(
        default=None, description="non-embedding parameters; those of the sweep by default"
    )
    seeds: tuple[int, ...] | None = Field(default=None, description="seeds; those of the sweep by default")
    set: dict[str, Any] = Field(default={}, description="config fields of the baseline alone, by dotted path")

    @model_validator(mode="after")
    def _check(self) -> "Baseline":
        if self.match == "flops" and self.sizes:
            raise ValueError(
                "baseline.sizes has no meaning with match: flops, which takes the cost of each DLCM; remove it"
            )
        return self


class Sweep(Frozen):
    """A sweep as written in its file; `plan` turns it into runs.

    `base` and the axes are stored flat, by dotted path, with the design variables `compression_ratio` and `boundary`
    as the config fields that they stand for. Paths of files are absolute.
    """

    name: str = Field(description="name of the folder under runs/", json_schema_extra={"pattern": f"^{_NAME.pattern}$"})
    base: dict[str, Any] = Field(default={}, description="overrides of the run config that hold for every run")
    shape: ShapeRule = Field(default=ShapeRule(), description="how a size becomes an architecture")
    axes: Axes = Field(default=Axes(), description="what varies from run to run")
    budgets: Budgets | None = Field(default=None, description="lengths of the runs; train.tokens where absent")
    batch: BatchRule = Field(default=BatchRule(), description="tokens of a step; train.batch_tokens by default")
    warmup: WarmupRule = Field(default=WarmupRule(), description="tokens of the warm-up; what optim says by default")
    tuned: str | None = Field(
        default=None, description="file with learning rates and base widths that `dlcm analyze lr` wrote"
    )
    minimum: Minimum = Field(default=Minimum(), description="steps and tokens per parameter that a run must have")
    baseline: Baseline | None = Field(default=None, description="dense models to compare with")
    evaluate: tuple[str, ...] = Field(
        default=(),
        description="tasks for every finished run: corpus, a .jsonl file, lm-eval:NAME, paper; with @K after K examples",
    )
    track: tuple[TrackerName, ...] = Field(
        default=(), description="`tensorboard`, `wandb`: where the metrics of all runs are shown too"
    )
    cluster: ClusterConfig = Field(default=ClusterConfig(), description="where and how the runs run")

    _source: Path | None = PrivateAttr(None)

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError(f"name = {name!r} is not a folder name; use letters, digits, '.', '_' and '-'")
        return name

    @property
    def source(self) -> Path | None:
        """The file that the sweep was read from."""
        return self._source

    @property
    def where(self) -> str:
        """How error messages name the sweep."""
        return str(self._source) if self._source else f"sweep {self.name!r}"

    @classmethod
    def from_yaml(cls, path: Path | str) -> "Sweep":
        """Read a sweep file.

        Args:
            path: the YAML file. Files named inside it are looked for in its folder, then in the working directory.

        Raises:
            UserError: unreadable file, unknown or misspelt key, wrong value, missing corpus or evaluation file.
        """
        from dlcm.yaml_io import load_yaml

        path = Path(path)
        data = load_yaml(path)
        if isinstance(data, Mapping) and "name" not in data:
            data = {"name": path.stem, **data}
        return cls.from_dict(data, where=str(path), folder=path.parent, source=path)

    @classmethod
    def from_dict(
        cls, data: Any, *, where: str = "sweep", folder: Path | None = None, source: Path | None = None
    ) -> "Sweep":
        """Validate a sweep that was written as a mapping, nested or by dotted paths.

        Args:
            data: the keys of the YAML file.
            where: names the origin in messages.
            folder: folder against which relative files are resolved first.
            source: file that the mapping came from.

        Raises:
            UserError: as `from_yaml`.
        """
        if not isinstance(data, Mapping):
            raise UserError(f"{where}: expected a mapping with the keys of a sweep, found {type(data).__name__}")
        data = dict(data)
        for block in ("base", "axes"):
            if not isinstance(data.setdefault(block, {}), Mapping):
                raise UserError(f"{where}: {block}: expected a mapping, found {type(data[block]).__name__}")
        data["base"] = flatten(data["base"], f"{where}: base")
        sweep = parse(cls, data, where)
        fixed = sweep.model_copy(update=_checked_paths(sweep, where, folder or Path.cwd()))
        fixed._source = source
        return fixed

    def to_yaml(self) -> str:
        """The sweep as YAML that `from_yaml` reads back to an equal sweep, on any folder of this machine."""
        data = self.model_dump(mode="json", exclude_defaults=True)
        data = {"name": self.name, **{key: value for key, value in data.items() if key != "name"}}
        return yaml.safe_dump(data, sort_keys=False, width=120)


def _checked_paths(sweep: Sweep, where: str, folder: Path) -> dict[str, Any]:
    """The parts of the sweep whose keys name config fields or whose values name files, checked and made canonical."""
    axes, seen = sweep.axes, {}
    blocks = {
        "grid": check_paths(axes.grid, f"{where}: axes.grid", seen),
        "zip": check_paths(axes.zip, f"{where}: axes.zip", seen),
    }
    listed = [check_paths(point, f"{where}: axes.list[{i}]", dict(seen)) for i, point in enumerate(axes.list)]

    def files(values: dict[str, Any], at: str) -> dict[str, Any]:
        return {key: _resolve(key, value, folder, f"{where}: {at}.{key}") for key, value in values.items()}

    def file_lists(values: dict[str, Any], at: str) -> dict[str, Any]:
        return {
            key: tuple(_resolve(key, value, folder, f"{where}: {at}.{key}") for value in entries)
            for key, entries in values.items()
        }

    update: dict[str, Any] = {
        "base": files(sweep.base, "base"),
        "axes": axes.model_copy(
            update={
                "grid": file_lists(blocks["grid"], "axes.grid"),
                "zip": file_lists(blocks["zip"], "axes.zip"),
                "list": tuple(files(point, f"axes.list[{i}]") for i, point in enumerate(listed)),
            }
        ),
        "evaluate": _tasks(sweep.evaluate, folder, f"{where}: evaluate"),
    }
    if sweep.baseline is not None:
        overrides = check_paths(sweep.baseline.set, f"{where}: baseline.set", {})
        for key in overrides:
            if key in DESIGN or key.startswith("model.boundary."):
                raise UserError(
                    f"{where}: baseline.set.{key}: the baseline is dense and takes its size from baseline.sizes"
                )
        update["baseline"] = sweep.baseline.model_copy(update={"set": files(overrides, "baseline.set")})
    if sweep.tuned is not None:
        update["tuned"] = _find(sweep.tuned, folder, f"{where}: tuned")
    return update


def _tasks(tasks: tuple[str, ...], folder: Path, where: str) -> tuple[str, ...]:
    """The evaluation tasks with the paths of files absolute; an unknown name is refused with the nearest."""
    if not tasks:
        return ()
    from dataclasses import replace

    from dlcm.tasks import check_tasks, expand_tasks, parse_task

    try:
        parsed = [parse_task(word) for word in expand_tasks(tasks)]
        files = {task.target: _find(task.target, folder, where) for task in parsed if task.kind == "file"}
        found = tuple(replace(task, target=files.get(task.target, task.target)).word for task in parsed)
        check_tasks(found)
    except UserError as error:
        raise UserError(f"{where}: {str(error).removeprefix(f'{where}: ')}") from None
    return found


def _resolve(key: str, value: Any, folder: Path, where: str) -> Any:
    """The value of a config field: a count such as 0.3M as a number, a file's path absolute, all else as it is."""
    if key in COUNTS:
        return parse_count(value)
    if key == MIXTURE and isinstance(value, Mapping):
        if odd := [name for name, source in value.items() if not isinstance(source, Mapping)]:
            raise UserError(f"{where}.{odd[0]}: expected a mapping of keys to values, got {value[odd[0]]!r}")
        return {
            name: {k: _resolve(f"{key}.{name}.{k}", v, folder, f"{where}.{name}.{k}") for k, v in source.items()}
            for name, source in value.items()
        }
    if not isinstance(value, str):
        return value
    is_corpus = key == "data.corpus" or (key.startswith(MIXTURE + ".") and key.endswith(".corpus"))
    if is_corpus and value not in ("stdlib", "packages") and not value.startswith("hf:"):
        return _find(value, folder, where)
    if key == "data.tokenizer" and value.endswith(".json") and not value.startswith("hub:"):
        return _find(value, folder, where)
    return value


def _find(name: str, folder: Path, where: str) -> str:
    """Absolute path of a file named in a sweep: beside the sweep file, else in the working directory."""
    path = user_path(name, where)
    tried = [path] if path.is_absolute() else [(folder / path), (Path.cwd() / path)]
    for candidate in tried:
        if candidate.exists():
            return str(candidate.resolve())
    looked = " nor ".join(dict.fromkeys(str(candidate.absolute()) for candidate in tried))
    raise UserError(f"{where}: {name!r} is neither a known name nor a file: no {looked}")
