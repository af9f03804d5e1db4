"""The JSON schema of the sweep file, for editors and for the reference: made from the classes that read the file. No torch.

An editor that knows the schema completes keys, shows their descriptions and defaults, and marks unknown keys and wrong values
as they are typed. `sweeps/sweep.schema.json` is what `sweep_schema` returns; a test holds it to that.

The file is wider than the class `Sweep`, which stores everything flat: `base` may be nested or dotted, and axes name every field
of a run by its path. These keys are written out here, from `sweeps.axes.valid_paths`.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import models_json_schema

from dlcm.config import RunConfig
from dlcm.data_config import SourceConfig
from sweeps.axes import ALIASES, COUNTS, DESIGN, MIXTURE, CountText, DesignVariables, valid_paths
from sweeps.points import D_CONCEPT_BASE, D_TOKEN_BASE
from sweeps.shapes import SHAPE_FIELDS
from sweeps.spec import Sweep

Schema = dict[str, Any]

SHIPPED = Path(__file__).with_name("sweep.schema.json")
# The draft that editors know best.
DRAFT = "http://json-schema.org/draft-07/schema#"
_REF = "#/definitions/{model}"
# Classes whose fields are written out by path.
_BY_PATH = ("RunConfig", "ModelConfig", "BoundaryConfig", "OptimConfig", "TrainConfig", "DataConfig", "DesignVariables")
# Fields of a run that a sweep fills in otherwise than the class of the run does, and what it says of them.
_IN_A_SWEEP: dict[str, tuple[Any, str]] = {
    "model.vocab_size": (None, "the tokenizer's where absent"),
    "model.d_head": (None, "16, 32 or 64 by the size where absent, and 32 without a size"),
    "model.d_token_base": (D_TOKEN_BASE, "one for all models of the sweep"),
    "model.d_concept_base": (D_CONCEPT_BASE, "one for all models of the sweep"),
    "train.tokens": (None, "in place of `budgets`"),
    **{f"model.{name}": (None, "follows from `size`, or is given without it") for name in SHAPE_FIELDS},
}
_SOURCE_NAME = "[a-z0-9_]{1,32}"


def sweep_schema() -> Schema:
    """The schema of a sweep file, JSON schema draft 7.

    Returns:
        The schema as plain data. Fields of a run stand under `definitions` by their dotted path, and the axes refer to them.
    """
    _, written = models_json_schema(
        [(Sweep, "validation"), (RunConfig, "validation"), (DesignVariables, "validation")], ref_template=_REF
    )
    classes = {name: _draft_7(_untitled(schema)) for name, schema in written["$defs"].items()}
    fields = _fields(classes)
    for name in _BY_PATH:
        del classes[name]
    del classes["SourceConfig"]["required"]  # an axis may give what `base` leaves out
    top = classes.pop("Sweep")
    top["properties"]["name"]["description"] += "; the file's own name where absent"
    top["properties"]["base"] |= {"additionalProperties": False, **_block("")}
    classes["Axes"]["properties"] |= _axes(classes["Axes"]["properties"])
    classes["Baseline"]["properties"]["set"] |= _paths(_value, _in_baseline())
    # Exactly one list; the class says so in a validator, which no schema shows.
    classes["Budgets"] |= {"minProperties": 1, "maxProperties": 1}
    for field in top["properties"].values():
        if isinstance(field.get("default"), dict):  # a whole block of defaults, which its own fields show
            del field["default"]
    return {
        "$schema": DRAFT,
        "title": "dlcm-scaling sweep",
        "type": "object",
        "description": "A sweep: which runs are trained, on what, for how long, and where.",
        "additionalProperties": False,
        "properties": top["properties"],
        "definitions": dict(sorted({**classes, **fields}.items())),
    }


def format_schema() -> str:
    """The schema as the text of a file."""
    return json.dumps(sweep_schema(), indent=1) + "\n"


def _fields(classes: Mapping[str, Schema]) -> dict[str, Schema]:
    """Schema of every field that an axis may name, by its path; short names are those of the fields they stand for."""
    fields = {}
    for path in valid_paths():
        block, _, name = ALIASES.get(path, path).rpartition(".")
        kind = {"": "RunConfig", "model.boundary": "BoundaryConfig"}.get(block, f"{block.capitalize()}Config")
        if path in DESIGN:
            kind = "DesignVariables"
        fields[path] = dict(classes[kind]["properties"][name])
        if path in _IN_A_SWEEP:
            default, told = _IN_A_SWEEP[path]
            fields[path] |= {"default": default, "description": f"{fields[path]['description']}; {told}"}
            if default is None:
                del fields[path]["default"]
        if path in COUNTS and path not in DESIGN:
            fields[path] = _or_count(fields[path])
        if path in ALIASES:
            fields[path]["description"] += f" (short for `{ALIASES[path]}`)"
    fields[MIXTURE] |= {"propertyNames": {"pattern": f"^{_SOURCE_NAME}$"}}
    return fields


def _or_count(field: Schema) -> Schema:
    """A field whose number may be written as `0.3M`."""
    told = {key: field.pop(key) for key in ("description", "default") if key in field}
    kinds = field.get("anyOf", [field])
    return {"anyOf": [*kinds, TypeAdapter(CountText).json_schema()], **told}


def _block(prefix: str) -> Schema:
    """The keys that may stand in `base` below `prefix`: fields and blocks, nested or with dots, in any mixture of both."""
    keys: dict[str, Schema] = {}
    for path in valid_paths():
        if not path.startswith(prefix):
            continue
        parts = path.removeprefix(prefix).split(".")
        for n in range(1, len(parts)):
            key = ".".join(parts[:n])
            if key not in keys:
                keys[key] = {"type": "object", "additionalProperties": False, **_block(f"{prefix}{key}.")}
        keys[".".join(parts)] = _value(path)
    # Editors offer properties and check patterns: they are to offer the nested way to write a key, and to accept the other.
    dotted = {f"^{_literal(key)}$": schema for key, schema in keys.items() if "." in key}
    return {
        "properties": {key: schema for key, schema in keys.items() if "." not in key},
        "patternProperties": {**dotted, **_sources(prefix, _value, blocks=True)},
    }


def _sources(prefix: str, wrap: Callable[[str], Schema], blocks: bool = False) -> dict[str, Schema]:
    """Patterns below `prefix` for the sources of a mixture, whose names the sweep gives."""
    if not f"{MIXTURE}.".startswith(prefix):
        return {}
    start = f"^{_literal(f'{MIXTURE}.'.removeprefix(prefix))}{_SOURCE_NAME}"
    fields = {f"{start}[.]{name}$": wrap(f"SourceConfig/properties/{name}") for name in SourceConfig.model_fields}
    return fields | ({f"{start}$": _value("SourceConfig")} if blocks else {})


def _axes(written: Mapping[str, Schema]) -> dict[str, Schema]:
    """The three blocks of `axes`: lists of values by path, and points by path."""
    lists, points = _paths(_list, valid_paths()), _paths(_value, valid_paths())
    return {
        "grid": {**written["grid"], **lists},
        "zip": {**written["zip"], **lists},
        "list": {**written["list"], "items": {"type": "object", **points}},
    }


def _in_baseline() -> Iterable[str]:
    """What `baseline.set` may name: a dense model has neither a share nor boundaries, and its size is `baseline.sizes`."""
    return (p for p in valid_paths() if p not in (*DESIGN, *ALIASES) and not p.startswith("model.boundary."))


def _paths(wrap: Callable[[str], Schema], paths: Iterable[str]) -> Schema:
    """A mapping with exactly these paths, and the sources of mixtures, as keys."""
    properties = {path: wrap(path) for path in paths}
    return {"additionalProperties": False, "properties": properties, "patternProperties": _sources("", wrap)}


def _value(definition: str) -> Schema:
    return {"$ref": f"#/definitions/{definition}"}


def _list(definition: str) -> Schema:
    return {"type": "array", "minItems": 1, "items": _value(definition)}


def _literal(key: str) -> str:
    return key.replace(".", "[.]")


def _untitled(node: Any) -> Any:
    """Without the titles that pydantic makes of names; a property that is called `title` stays."""
    if isinstance(node, Mapping):
        return {key: _untitled(value) for key, value in node.items() if key != "title" or not isinstance(value, str)}
    return [_untitled(value) for value in node] if isinstance(node, list) else node


def _draft_7(node: Any) -> Any:
    """Draft 7 of what pydantic writes in draft 2020-12: tuples, and keys beside a reference, which draft 7 does not read."""
    if isinstance(node, list):
        return [_draft_7(value) for value in node]
    if not isinstance(node, Mapping):
        return node
    node = {key: _draft_7(value) for key, value in node.items()}
    if "prefixItems" in node:
        node["items"] = node.pop("prefixItems")
    if "$ref" in node and len(node) > 1:
        node["allOf"] = [{"$ref": node.pop("$ref")}]
    return node
