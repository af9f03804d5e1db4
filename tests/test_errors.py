"""Every error that a user can make and mend: one line that names the place and the way out, exit 2, nothing half-written."""

import json

import pandas as pd
import pytest
import yaml

SWEEP = {
    "name": "small",
    "base": {"data": {"tokenizer": "bytes", "seq_len": 32}, "train": {"batch_tokens": 64}},
    "axes": {"grid": {"size": [300_000], "compression_ratio": [2.0], "concept_share": [0.5]}},
    "budgets": {"tokens": [640]},
    "minimum": {"steps": 0},  # ten steps are enough to fail in
    "cluster": {"concurrency": 1, "threads": 1},
}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DLCM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("".join(f"line {i} of a small text\n" for i in range(4000)))
    return tmp_path


def write_sweep(place, **changes):
    spec = json.loads(json.dumps(SWEEP))
    spec["base"]["data"]["corpus"] = "text.txt"
    for path, value in changes.items():
        *parents, last = path.split("__")
        node = spec
        for key in parents:
            node = node.setdefault(key, {})
        if value is None:
            del node[last]
        else:
            node[last] = value
    path = place / "small.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


def assert_one_line(answer, *words):
    status, out, err = answer
    assert status == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err


@pytest.mark.many
@pytest.mark.parametrize("verb", ["plan", "submit"])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base__optim": {"lr_tokn": 1e-3}}, ("small.yaml", "lr_tokn", "did you mean 'optim.lr_token'?")),
        ({"axes__grid__compresion_ratio": [2]}, ("small.yaml", "did you mean 'compression_ratio'?")),
        ({"axes__grid__size": [3_000]}, ("small.yaml", "shape")),
        ({"axes__grid__compression_ratio": [1.0]}, ("small.yaml", "compression_ratio", "above 1")),
        ({"budgets": {"tokens": [63]}}, ("small.yaml", "less than one step", "raise the budget")),
        ({"base__data__corpus": "txet.txt"}, ("small.yaml", "txet.txt")),
    ],
    ids=["misspelt key", "misspelt axis", "impossible shape", "R of one", "budget below a step", "missing corpus"],
)
def test_a_fault_in_the_sweep_file_is_named_and_nothing_is_written(dlcm, place, verb, changes, words):
    path = write_sweep(place, **changes)
    options = ["--cluster", "debug"] if verb == "submit" else []
    assert_one_line(dlcm("sweep", verb, path, *options), *words)
    assert not (place / "runs").exists()


def test_an_unreadable_corpus_is_named(dlcm, place):
    (place / "binary.jsonl").write_bytes(b"\xff\xfe{")
    config = {"model": _dense(), "data": {"corpus": "binary.jsonl", "tokenizer": "bytes"}, "train": {"tokens": 2048}}
    (place / "run.yaml").write_text(yaml.safe_dump(config))
    assert_one_line(dlcm("train", place / "run.yaml", place / "run"), "binary.jsonl")
    assert not list((place / "cache").rglob("meta.json"))


def _dense() -> dict:
    shape = {"d_token": 16, "n_encoder_layers": 1, "d_head": 8, "n_heads_token": 2, "d_ff_token": 16}
    return {"kind": "dense", "vocab_size": 300, **shape}


def test_a_tokenizer_that_does_not_match_the_shards_is_named_with_the_folder(dlcm, place):
    config = {
        "model": _dense(),
        "data": {"corpus": str(place / "text.txt"), "tokenizer": "bpe-300", "seq_len": 32},
        "train": {"tokens": 64, "batch_tokens": 64},
    }
    (place / "run.yaml").write_text(yaml.safe_dump(config))
    status, _, err = dlcm("train", place / "run.yaml", place / "run")
    assert status == 0, err
    (tokenizer,) = (place / "cache").rglob("tokenizer.json")
    content = json.loads(tokenizer.read_text())
    content["added_tokens"][0]["content"] = "<another>"
    tokenizer.write_text(json.dumps(content))
    assert_one_line(dlcm("train", place / "run.yaml", place / "run2"), str(tokenizer.parent), "tokenizer")
    assert not (place / "run2" / "result.json").exists()


@pytest.mark.slow
def test_a_torn_metrics_line_is_named_by_number_and_no_table_is_written(dlcm, place):
    path = write_sweep(place)
    assert dlcm("sweep", "submit", path, "--cluster", "debug")[0] == 0
    (metrics,) = (place / "runs" / "small").rglob("metrics.jsonl")
    with metrics.open("ab") as file:
        file.write(b'{"step": 11, "lo')
    n_lines = metrics.read_bytes().count(b"\n") + 1
    assert_one_line(
        dlcm("sweep", "collect", place / "runs" / "small"), f"{metrics.relative_to(place)}:{n_lines}", "torn"
    )
    assert not (place / "runs" / "small" / "results.parquet").exists()


@pytest.mark.parametrize("verb", ["fit", "optimum", "export", "report"])
def test_a_results_table_without_a_needed_column_is_named_with_the_nearest(dlcm, place, verb):
    pd.DataFrame({"run_id": ["a"], "model": ["dlcm"], "los_nats": [3.0]}).to_parquet(place / "results.parquet")
    assert_one_line(dlcm("analyze", verb, place / "results.parquet"), "results.parquet", "no column")
    assert [p.name for p in place.iterdir() if p.name not in ("text.txt", "cache")] == ["results.parquet"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("flops", "table", "small.yaml", "-r", "0"),
        ("flops", "table", "small.yaml", "--seq-len", "0"),
        ("flops", "check", "-r", "0"),
    ],
)
def test_nought_is_a_number_and_not_the_default(dlcm, place, arguments):
    write_sweep(place)
    status, out, err = dlcm(*arguments)
    assert (status, out) == (2, "")
    assert "= 0 is below 1" in err or "lengths [0]" in err


def test_a_budget_that_is_none_is_refused_by_report_and_plot(dlcm, place):
    frame = pd.DataFrame({"params": [1e7, 1e8, 1e9], "D": [1e9, 2e9, 4e9], "loss": [3.0, 2.7, 2.5]})
    frame.to_csv("mine.csv", index=False)
    own = ("mine.csv", "--columns", "N=params,D=D,loss=loss,C=6*params*D", "--n", "non_embedding", "--cost", "6*N*D")
    for verb in ("report", "plot"):
        for budget in ("0", "-1", "nan"):
            answer = dlcm("analyze", verb, *own, "--bootstrap", 0, "-o", place / "out", "--budget", budget)
            assert answer[0] == 2, verb
            assert "give training FLOPs, a number above 0" in answer[2]
    assert not (place / "out" / "summary.md").exists()


def test_output_that_cannot_be_written_is_one_line_and_leaves_nothing(dlcm, place):
    write_sweep(place)
    (place / "folder.csv").mkdir()
    (place / "file").touch()
    assert_one_line(dlcm("flops", "table", "small.yaml", "--csv", place / "folder.csv"), "folder.csv", "another place")
    plan = ("sweep", "plan", "small.yaml", "--no-expect", "--csv")
    status, _, err = dlcm(*plan, place / "file" / "x.csv")
    assert status == 2
    assert err.splitlines()[-1].startswith(f"error: {place / 'file'}")
    assert not [path for path in place.rglob("*") if path.suffix in (".tmp", ".part")]


def test_a_table_of_an_unknown_kind_is_refused(dlcm, place):
    pd.DataFrame({"N": [1e7], "D": [1e9], "loss": [3.0]}).to_csv("mine.csv", index=False)
    answer = dlcm("analyze", "export", "mine.csv", "--columns", "N=N,D=D,loss=loss", "-o", "table.xlsx")
    assert_one_line(answer, "table.xlsx", ".csv, .md, .parquet, .tex")
