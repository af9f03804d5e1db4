"""The sweep file: what it says is what is read, and every slip is one line that names the place and the way out."""

from pathlib import Path

import pytest

from dlcm.errors import UserError
from sweeps import Sweep
from sweeps.axes import expand, flatten, parse_count, unflatten, valid_paths

MINIMAL = {"name": "s", "base": {"size": "0.5M", "concept_share": 0.5}, "budgets": {"tokens": [100_000]}}


def sweep(**blocks) -> Sweep:
    return Sweep.from_dict({**MINIMAL, **blocks})


def refused(**blocks) -> str:
    with pytest.raises(UserError) as error:
        sweep(**blocks)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_nested_and_dotted_bases_are_the_same_sweep():
    nested = sweep(base={"model": {"boundary": {"d_scan": 32}}, "optim": {"lr_token": 1e-3}})
    dotted = sweep(base={"model.boundary.d_scan": 32, "optim": {"lr_token": 1e-3}})
    assert nested == dotted
    assert unflatten(nested.base) == {"model": {"boundary": {"d_scan": 32}}, "optim": {"lr_token": 1e-3}}


def test_short_names_stand_for_config_fields():
    assert sweep(base={"compression_ratio": 3, "boundary": "fixed"}).base == {
        "model.boundary.compression_ratio": 3,
        "model.boundary.detector": "fixed",
    }


def test_blocks_of_axes_combine_by_product_and_zip_runs_in_step():
    axes = sweep(
        axes={
            "grid": {"compression_ratio": [2, 4]},
            "zip": {"seed": [0, 1, 2], "optim.lr_token": [1e-3, 2e-3, 3e-3]},
            "list": [{"model.pooling": "mean"}, {"model.pooling": "first", "model.smoothing": "none"}],
        }
    ).axes
    points = expand(axes)
    assert len(points) == 2 * 3 * 2
    assert {(p["seed"], p["optim.lr_token"]) for p in points} == {(0, 1e-3), (1, 2e-3), (2, 3e-3)}
    assert points[0] == {
        "model.boundary.compression_ratio": 2,
        "seed": 0,
        "optim.lr_token": 1e-3,
        "model.pooling": "mean",
    }


@pytest.mark.parametrize(
    ("text", "number"),
    [("0.3M", 300_000), ("1.5k", 1500), ("2B", 2e9), ("7", "7"), ("x", "x"), (5, 5), ("1_000k", 1e6)],
)
def test_counts_may_carry_a_unit(text, number):
    assert parse_count(text) == number


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        ({"budget": {"tokens": [1]}}, "unknown key 'budget'; did you mean 'budgets'?"),
        ({"base": {"optm": {"lr_token": 1}}}, "base: unknown key 'optm'; did you mean 'optim'?"),
        ({"base": {"optim": {"lr_tokens": 1}}}, "unknown key 'optim.lr_tokens'; did you mean 'optim.lr_token'?"),
        (
            {"axes": {"grid": {"optim.lr_tokn": [1]}}},
            "axes.grid: unknown key 'optim.lr_tokn'; did you mean 'optim.lr_token'?",
        ),
        ({"axes": {"grid": {"compresion_ratio": [2]}}}, "did you mean 'compression_ratio'?"),
        ({"axes": {"zip": {"lr_token": [2]}}}, "did you mean 'optim.lr_token'?"),
        ({"axes": {"list": [{"seeed": 2}]}}, "axes.list[0]: unknown key 'seeed'; did you mean 'seed'?"),
        ({"axes": {"gird": {"seed": [0]}}}, "unknown key 'axes.gird'; did you mean 'grid'?"),
        ({"budgets": {"flop": [1e12]}}, "unknown key 'budgets.flop'; did you mean 'flops'?"),
        ({"baseline": {"matches": "parameters"}}, "unknown key 'baseline.matches'; did you mean 'match'?"),
        ({"baseline": {"set": {"optim.lr_tokken": 1}}}, "baseline.set: unknown key 'optim.lr_tokken'"),
        ({"cluster": {"partitions": "x"}}, "unknown key 'cluster.partitions'; did you mean 'partition'?"),
        ({"shape": {"aspct": 3}}, "unknown key 'shape.aspct'; did you mean 'aspect'?"),
        ({"evaluate": ["corpsu"]}, "'corpsu'; did you mean 'corpus'?"),
    ],
)
def test_a_misspelt_key_is_named_with_the_nearest(blocks, words):
    assert words in refused(**blocks)


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        ({"axes": {"grid": {"seed": 3}}}, "must be a list"),
        ({"axes": {"grid": {"seed": []}}}, "at least one entry"),
        ({"axes": {"zip": {"seed": [0, 1], "size": [1e6]}}}, "seed has 2, size has 1"),
        ({"axes": {"grid": {"seed": [0]}, "zip": {"seed": [1]}}}, "'seed' is given twice"),
        (
            {"axes": {"grid": {"compression_ratio": [2], "model.boundary.compression_ratio": [4]}}},
            "'model.boundary.compression_ratio' is given twice",
        ),
        ({"axes": {"grid": {"seed": [0]}, "list": [{"seed": 1}]}}, "'seed' is given twice"),
        ({"budgets": {"tokens": [1e5], "flops": [1e12]}}, "found flops and tokens"),
        ({"budgets": {}}, "found none"),
        ({"budgets": {"tokens": [-5]}}, "greater than 0"),
        ({"base": {"model": 3}}, "'model': expected a mapping"),
        ({"base": 3}, "base: expected a mapping"),
        ({"name": "a/b"}, "is not a folder name"),
        ({"baseline": {"match": "flops", "sizes": [1e6]}}, "remove it"),
        ({"baseline": {"set": {"compression_ratio": 3}}}, "the baseline is dense"),
        ({"cluster": {"time": "tomorrow"}}, "not a SLURM time"),
        ({"cluster": {"memory": "lots"}}, "not a size such as 8GB"),
    ],
)
def test_a_wrong_value_is_one_line_with_the_way_out(blocks, words):
    assert words in refused(**blocks)


def test_a_relative_corpus_is_found_beside_the_sweep_then_in_the_working_directory(tmp_path, monkeypatch):
    beside, here = tmp_path / "sweeps", tmp_path / "here"
    for folder in (beside, here):
        folder.mkdir()
        (folder / "both.txt").write_text("text")
    (here / "cwd.txt").write_text("text")
    (beside / "tasks.jsonl").write_text("{}")
    monkeypatch.chdir(here)
    text = "base: {{size: 0.5M, concept_share: 0.5, data: {{corpus: {}}}}}\nbudgets: {{tokens: [100k]}}\nevaluate: [tasks.jsonl@2, corpus, paper]\n"
    file = beside / "x.yaml"
    for name, found in (("both.txt", beside), ("cwd.txt", here)):
        file.write_text(text.format(name))
        read = Sweep.from_yaml(file)
        assert read.base["data.corpus"] == str(found / name)
        assert read.evaluate[:3] == (f"{beside / 'tasks.jsonl'}@2", "corpus", "lm-eval:commonsense_qa")
        assert len(read.evaluate) == 14
        assert (read.name, read.source) == ("x", file)
    file.write_text(text.format("absent.txt"))
    with pytest.raises(UserError) as error:
        Sweep.from_yaml(file)
    assert str(beside / "absent.txt") in str(error.value)
    assert str(here / "absent.txt") in str(error.value)


def test_files_on_an_axis_are_resolved_too(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    read = Sweep.from_dict({**MINIMAL, "axes": {"grid": {"data.corpus": ["stdlib", "a.txt"]}}}, folder=tmp_path)
    assert read.axes.grid["data.corpus"] == ("stdlib", str(tmp_path / "a.txt"))


def test_a_sweep_survives_its_own_yaml(tmp_path):
    before = sweep(
        axes={"grid": {"size": ["0.3M", 5e5], "compression_ratio": [2, 4]}, "list": [{"seed": 0}, {"seed": 1}]},
        baseline={"sizes": ["0.2M"], "seeds": [3], "set": {"optim.lr_token": 1e-3}},
        cluster={"time": "1-02:00:00", "memory": "8GB", "setup": ["module load x"]},
        shape={"aspect": 32},
        evaluate=["corpus"],
    )
    path = tmp_path / "copy.yaml"
    path.write_text(before.to_yaml())
    assert Sweep.from_yaml(path).model_dump() == before.model_dump()


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        (90, 90),
        ("90", 90),
        ("4:00:00", 240),
        ("1:30", 2),
        ("1-0", 1440),
        ("1-02:30", 1590),
        ("0:00:01", 1),
        ("2-00:00:00", 2880),
    ],
)
def test_times_read_as_sbatch_reads_them(text, minutes):
    assert sweep(cluster={"time": text}).cluster.time_minutes == minutes


def test_memory_reads_in_bytes():
    assert sweep(cluster={"memory": "1.5GB"}).cluster.memory_bytes == 3 * 2**29
    assert sweep().cluster.memory_bytes is None


def test_every_leaf_of_the_run_config_is_a_valid_axis():
    paths = set(valid_paths())
    assert {
        "seed",
        "optim.lr_token",
        "model.boundary.detector",
        "train.tokens",
        "data.corpus",
        "size",
        "boundary",
    } <= paths
    assert "model" not in paths
    assert flatten({"model": {"boundary": {"detector": "fixed"}}}, "x") == {"model.boundary.detector": "fixed"}


def test_an_unreadable_file_is_named(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        Sweep.from_yaml(Path(tmp_path / "absent.yaml"))
