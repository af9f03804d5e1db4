"""The schema that editors read says what the sweep file takes: every key, its default, and nothing else."""

import copy
import json
import re
from pathlib import Path

import pytest
from jsonschema import Draft7Validator

from dlcm.errors import UserError
from dlcm.yaml_io import load_yaml
from sweeps import Sweep, plan
from sweeps.axes import ALIASES, DESIGN, valid_paths
from sweeps.schema import SHIPPED, format_schema, sweep_schema

ROOT = Path(__file__).parents[2]
SCHEMA = sweep_schema()
VALIDATOR = Draft7Validator(SCHEMA)
SHIPPED_SWEEPS = sorted([*ROOT.glob("sweeps/recipes/*.yaml"), *ROOT.glob("benchmarks/sweeps/*.yaml")])

FULL = {
    "name": "full",
    "base": {
        "size": "0.5M",
        "compression_ratio": 4,
        "data": {
            "mixture": {"code": {"corpus": "stdlib", "weight": 0.7}, "rest": {"corpus": "packages", "weight": 0.3}},
            "tokenizer": "bytes",
        },
        "model": {"boundary": {"d_scan": 32, "detector": "learned"}, "pooling": "mean"},
        "optim": {"lr_token": 1e-3},
        "train": {"batch_tokens": "2k"},
    },
    "shape": {"layers": [1, 2, 1], "tolerance_size": 0.02},
    "axes": {
        "grid": {"concept_share": [0.3, 0.5], "data.mixture.code.weight": [0.5, 0.7]},
        "zip": {"seed": [0, 1], "optim.lr_concept": [1e-3, 2e-3]},
        "list": [{"model.smoothing": "none"}, {"model.smoothing": "causal"}],
    },
    "budgets": {"tokens": ["100k", 2e5]},
    "batch": {"rule": "fixed"},
    "warmup": {"rule": "parameters", "coefficient": 0.5},
    "minimum": {"steps": 10},
    "baseline": {"match": "parameters", "sizes": ["1M"], "set": {"optim.lr_token": 2e-3}},
    "evaluate": ["corpus"],
    "track": [],
    "cluster": {"time": 90, "gpus": 1, "setup": ["module load cuda"]},
}


def faults(sweep: dict) -> list[str]:
    return [error.message for error in VALIDATOR.iter_errors(sweep)]


def mappings(node, path=()):
    """Every mapping of a sweep, with where it stands."""
    if isinstance(node, dict):
        yield path
        for key, value in node.items():
            yield from mappings(value, (*path, key))
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from mappings(value, (*path, i))


def changed(path, key, value) -> dict:
    sweep = copy.deepcopy(FULL)
    at = sweep
    for step in path:
        at = at[step]
    at[key] = value
    return sweep


def test_it_is_a_schema():
    Draft7Validator.check_schema(SCHEMA)


def test_the_shipped_file_is_current():
    assert SHIPPED.read_text() == format_schema(), "run: dlcm sweep schema -o sweeps/sweep.schema.json"


@pytest.mark.parametrize("path", SHIPPED_SWEEPS, ids=lambda p: p.stem)
def test_shipped_sweeps_are_valid_and_name_the_schema(path):
    assert faults(load_yaml(path)) == []
    named = re.match(r"# yaml-language-server: \$schema=(\S+)\n", path.read_text())
    assert named is not None
    assert (path.parent / named[1]).resolve() == SHIPPED


def test_a_sweep_with_every_block_is_valid_in_both():
    assert faults(FULL) == []
    assert set(FULL) == set(Sweep.model_fields) - {"tuned"}
    Sweep.from_dict(FULL)


@pytest.mark.parametrize("path", list(mappings(FULL)), ids=lambda p: ".".join(map(str, p)) or "top")
def test_an_unknown_key_is_refused_everywhere(path):
    # In a mixture a key is the name of a source, so there the value is what is wrong.
    odd = changed(path, "ratio", 3)
    assert faults(odd) != []
    with pytest.raises(UserError, match="ratio"):
        Sweep.from_dict(odd)


@pytest.mark.parametrize(
    ("path", "key", "value"),
    [
        ((), "name", "a/b"),
        ((), "track", ["tensorbord"]),
        (("axes", "grid"), "concept_share", []),
        (("axes", "grid"), "concept_share", 0.3),
        ((), "budgets", {}),
        ((), "budgets", {"tokens": [1e5], "flops": [1e12]}),
        (("budgets",), "tokens", [-5]),
        (("budgets",), "tokens", ["many"]),
        (("baseline",), "set", {"compression_ratio": 3}),
        (("baseline",), "match", "size"),
        (("base",), "model", 3),
        (("cluster",), "gpus", -1),
        (("cluster",), "mfu", 1.5),
        (("cluster",), "setup", "module load cuda"),
        (("shape",), "layers", [2, 2]),
        (("minimum",), "steps", -1),
    ],
)
def test_a_wrong_value_is_refused_by_the_schema_and_by_the_reader(path, key, value):
    assert faults(changed(path, key, value)) != []
    with pytest.raises(UserError):
        Sweep.from_dict(changed(path, key, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model.boundary.detector", "lerned"),
        ("boundary", "lerned"),
        ("compression_ratio", 1),
        ("concept_share", 1.0),
        ("parametrization", "sp"),
        ("optim.lr_token", 0),
        ("train.compile", "sometimes"),
        ("model.n_encoder_layers", 0),
        ("seed", -1),
    ],
)
def test_the_value_of_a_field_is_checked_wherever_it_may_stand(path, value):
    # The reader checks these when it plans, since only then is a run put together.
    for sweep in (
        {"name": "s", "base": {path: value}},
        {"name": "s", "axes": {"grid": {path: [value]}}},
        {"name": "s", "axes": {"zip": {path: [value]}}},
        {"name": "s", "axes": {"list": [{path: value}]}},
    ):
        assert faults(sweep) != [], sweep


@pytest.mark.parametrize(
    "base",
    [
        {"model": {"boundary": {"d_scan": 32}}},
        {"model": {"boundary.d_scan": 32}},
        {"model.boundary": {"d_scan": 32}},
        {"model.boundary.d_scan": 32},
        {"data": {"mixture.code.weight": 0.4, "mixture.wiki": {"weight": 0.6}}},
        {"data.mixture.code.weight": 0.4, "data.mixture": {"wiki": {"weight": 0.6}}},
        {"boundary": "fixed", "size": "1.5k"},
    ],
)
def test_nested_and_dotted_keys_are_both_taken(base):
    assert faults({"name": "s", "base": base}) == []
    Sweep.from_dict({"name": "s", "base": base})


@pytest.mark.parametrize("path", valid_paths())
def test_every_field_is_described_and_may_stand_in_base_and_axes(path):
    field = SCHEMA["definitions"][path]
    assert len(field["description"]) > 8
    if "default" in field:
        assert (
            list(Draft7Validator({**field, "definitions": SCHEMA["definitions"]}).iter_errors(field["default"])) == []
        )
    axes = SCHEMA["definitions"]["Axes"]["properties"]
    assert path in axes["grid"]["properties"]
    assert path in axes["zip"]["properties"]
    assert path in axes["list"]["items"]["properties"]
    at = SCHEMA["properties"]["base"]
    for step in path.split("."):
        at = at["properties"][step]
    assert at == {"$ref": f"#/definitions/{path}"}


def test_the_defaults_are_those_of_a_planned_run():
    smallest = {"name": "s", "base": {"size": "0.5M", "concept_share": 0.5}, "budgets": {"tokens": [1e6]}}
    config = plan(Sweep.from_dict(smallest)).runs[0].config.model_dump(mode="json")
    compared = 0
    for path in valid_paths():
        if path in (*DESIGN, *ALIASES) or "default" not in SCHEMA["definitions"][path]:
            continue
        value = config
        for step in path.split("."):
            value = value[step]
        assert SCHEMA["definitions"][path]["default"] == value, path
        compared += 1
    assert compared > 40


def test_every_key_of_every_block_is_described():
    blocks = [SCHEMA, *(d for d in SCHEMA["definitions"].values() if "properties" in d)]
    bare = [name for block in blocks for name, field in block["properties"].items() if not field.get("description")]
    assert bare == []


def test_the_command_prints_it_and_writes_it(dlcm, tmp_path):
    status, out, _ = dlcm("sweep", "schema")
    assert status == 0
    assert json.loads(out) == SCHEMA
    status, out, _ = dlcm("sweep", "schema", "-o", tmp_path / "s.json")
    assert status == 0
    assert "# yaml-language-server: $schema=s.json" in out
    assert json.loads((tmp_path / "s.json").read_text()) == SCHEMA


def test_a_place_where_nothing_can_be_written_is_named(dlcm, tmp_path):
    (tmp_path / "file").touch()
    status, _, err = dlcm("sweep", "schema", "-o", tmp_path / "file" / "s.json")
    assert status == 2
    assert str(tmp_path / "file" / "s.json") in err
    assert err.count("\n") == 1
