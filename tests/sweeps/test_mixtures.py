"""Mixtures in sweeps: weights as an axis, columns of each source, and the warning about repeated text."""

import json
import random

import pandas as pd
import pytest
import yaml

from dlcm.errors import UserError
from dlcm.shards import open_corpus
from sweeps.collect import COLUMNS, SOURCE_COLUMNS, TASK_COLUMNS, as_results, collect
from sweeps.epochs import describe_repeats, plan_repeats
from sweeps.plan import plan
from sweeps.spec import Sweep
from sweeps.store import load_sweep, save_sweep
from tests.sweeps.tiny import MODEL, WORDS, FakeTrain, finish, make_plan, sweep_dict


def write_texts(folder, name, n=100, words=100):
    path, draw = folder / name, random.Random(name)
    path.mkdir()
    for i in range(n):
        (path / f"{i}.txt").write_text(f"{i} " + " ".join(draw.choices(WORDS, k=words)))


@pytest.fixture
def texts(tmp_path):
    for name in ("code", "wiki"):
        write_texts(tmp_path, name)
    return tmp_path


def mixture_sweep(texts, axes=None, steps=8, **more):
    """Sources named beside the sweep file, which stands in `texts`."""
    data = {
        "mixture": {"code": {"corpus": "code", "weight": 0.7}, "wiki": {"corpus": "wiki", "weight": 0.3}},
        "tokenizer": "bytes",
        "seq_len": 64,
        "validation_tokens": 640,
    }
    train = {"batch_tokens": 256, "tokens": 256 * steps, "log_every": 1}
    return {
        "name": "mix",
        "base": {"data": data, "train": train, "model": MODEL},
        "axes": {"grid": axes or {}},
        "minimum": {"steps": 0},
        **more,
    }


def weights_of(planned):
    return [{name: s.weight for name, s in run.config.data.mixture.items()} for run in planned.runs]


def plan_of(texts, *args, **more):
    return plan(Sweep.from_dict(mixture_sweep(texts, *args, **more), folder=texts))


# Axes


def test_a_weight_is_an_axis_by_its_dotted_path(texts):
    planned = plan_of(texts, {"data.mixture.wiki.weight": [0.3, 0.7]})
    assert weights_of(planned) == [{"code": 0.7, "wiki": 0.3}, {"code": 0.5, "wiki": 0.5}]
    assert [run.design["data.mixture.wiki.weight"] for run in planned.runs] == [0.3, 0.7]
    assert planned.runs[0].config.data.mixture["wiki"].corpus == str((texts / "wiki").resolve())


def test_weights_in_step_and_sources_of_one_run_alone(texts):
    axes = {"data.mixture.code.weight": [0.9, 0.5], "data.mixture.wiki.weight": [0.1, 0.5]}
    planned = plan(Sweep.from_dict({**mixture_sweep(texts), "axes": {"zip": axes}}, folder=texts))
    assert weights_of(planned) == [{"code": 0.9, "wiki": 0.1}, {"code": 0.5, "wiki": 0.5}]
    write_texts(texts, "third", n=3)
    more = {"data.mixture.zoo.corpus": "third", "data.mixture.zoo.weight": 1.0}
    planned = plan(Sweep.from_dict({**mixture_sweep(texts), "axes": {"list": [{"seed": 1}, more]}}, folder=texts))
    assert weights_of(planned) == [{"code": 0.7, "wiki": 0.3}, {"code": 0.35, "wiki": 0.15, "zoo": 0.5}]


def test_whole_mixtures_are_an_axis_and_replace_that_of_the_base(texts):
    whole = {"a": {"corpus": "code", "weight": 1}, "b": {"corpus": "wiki", "weight": 3}}
    planned = plan_of(texts, {"data.mixture": [whole, None]})
    assert weights_of(plan_of(texts, {"data.mixture": [whole]})) == [{"a": 0.25, "b": 0.75}]
    assert planned.runs[0].config.data.mixture["a"].corpus == str((texts / "code").resolve())
    assert planned.runs[1].config.data.mixture is None
    assert planned.runs[1].config.data.corpus == "stdlib"


def test_the_baseline_may_have_weights_of_its_own(texts):
    more = {"baseline": {"match": "parameters", "sizes": [20_000], "set": {"data.mixture.wiki.weight": 0.7}}}
    planned = plan_of(texts, **more)
    assert weights_of(planned) == [{"code": 0.7, "wiki": 0.3}, {"code": 0.5, "wiki": 0.5}]
    whole = {"a": {"corpus": "code", "weight": 1}, "b": {"corpus": "wiki", "weight": 3}}
    planned = plan_of(
        texts, {"data.mixture": [whole]}, baseline={"sizes": [20_000], "set": {"data.mixture.a.weight": 3}}
    )
    assert weights_of(planned) == [{"a": 0.25, "b": 0.75}, {"a": 0.5, "b": 0.5}]
    assert whole["a"]["weight"] == 1


def test_a_sweep_with_a_mixture_comes_back_from_its_yaml(texts, tmp_path):
    sweep = Sweep.from_dict(mixture_sweep(texts, {"data.mixture.wiki.weight": [0.3, 0.7]}), folder=texts)
    path = tmp_path / "again" / "mix.yaml"
    path.parent.mkdir()
    path.write_text(sweep.to_yaml())
    assert [run.run_id for run in plan(Sweep.from_yaml(path)).runs] == [run.run_id for run in plan(sweep).runs]


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ({"data.mixture.wiki.wieght": [0.3]}, "'data.mixture.wiki.wieght'; did you mean 'weight'"),
        ({"data.mixture.wiki": [0.3]}, "'data.mixture.wiki': expected corpus, weight, text_key"),
        ({"data.mixtur.wiki.weight": [0.3]}, "unknown key 'data.mixtur.wiki.weight'"),
        ({"data.mixture.wiki.weight": [0.3, 0]}, "data.mixture.wiki.weight"),
        ({"data.mixture.wikki.weight": [0.3]}, "missing key 'data.mixture.wikki.corpus'"),
        ({"data.mixture.wiki.corpus": ["nowhere.txt"]}, "data.mixture.wiki.corpus: 'nowhere.txt' is neither"),
        ({"data.corpus": ["packages"]}, "both corpus = 'packages' and a mixture"),
        ({"data.mixture": [None], "data.mixture.wiki.weight": [0.3]}, "given twice"),
        ({"data.mixture.wiki.weight": [0.3], "data.mixture": [None]}, "given twice"),
        ({"data.mixture": [{"a": 3}]}, "data.mixture.a: expected a mapping"),
        ({"data.mixture": [{}]}, "give a single one as data.corpus"),
    ],
)
def test_axes_over_a_mixture_that_make_no_sense_are_refused(texts, axes, words):
    with pytest.raises(UserError) as error:
        plan_of(texts, axes)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("mixture", "words"),
    [({"code": 3}, "'data.mixture.code': expected a mapping"), ({}, "give a single one"), (3, "data.mixture")],
)
def test_a_mixture_in_the_base_that_makes_no_sense_is_refused(texts, mixture, words):
    data = mixture_sweep(texts)
    data["base"]["data"]["mixture"] = mixture
    with pytest.raises(UserError, match=words):
        plan(Sweep.from_dict(data, folder=texts))


# Results


@pytest.mark.slow
def test_a_sweep_over_weights_is_planned_trained_and_collected(texts, dlcm):
    path, runs = texts / "mix.yaml", texts / "runs"
    sweep = mixture_sweep(texts, {"data.mixture.wiki.weight": [0.3, 0.7]}, evaluate=["corpus"])
    sweep["base"]["data"]["validation_share"] = 0.3
    path.write_text(yaml.safe_dump(sweep))
    assert dlcm("sweep", "plan", path, "--no-expect")[0] == 0
    status, _, err = dlcm("sweep", "submit", path, "--cluster", "debug", "--dir", runs)
    assert status == 0, err
    status, out, err = dlcm("sweep", "collect", runs / "mix", "--json")
    assert (status, err) == (0, "")
    assert json.loads(out)["warnings"] == []
    frame = pd.read_parquet(runs / "mix" / "results.parquet")
    names = [pattern.replace("<source>", name) for name in ("code", "wiki") for pattern in SOURCE_COLUMNS]
    tasks = [pattern.replace("<task>", "corpus") for pattern in TASK_COLUMNS]
    assert list(frame.columns) == [*COLUMNS, *names, *tasks]
    assert frame["weight_wiki"].tolist() == [0.3, 0.5]
    mean = frame["weight_code"] * frame["loss_nats_code"] + frame["weight_wiki"] * frame["loss_nats_wiki"]
    assert frame["loss_nats"].to_numpy() == pytest.approx(mean.to_numpy())
    for run in load_sweep(runs / "mix").runs:
        result = json.loads((run.path / "result.json").read_text())
        row = frame.set_index("run_id").loc[run.run_id]
        for name, source in result["sources"].items():
            for key in ("loss_nats", "bits_per_byte", "tokens_per_concept", "epochs"):
                assert row[f"{key}_{name}"] == source[key]
        assert row["epochs"] == max(result["epochs_by_source"].values())


def test_columns_of_sources_are_null_for_runs_without_them():
    facts = {name: 0 for name, column in COLUMNS.items() if column.dtype == "int64"}
    frame = as_results([{**facts, "loss_nats_wiki": 3.0, "acc_x": 0.5}, {**facts, "weight_code": 0.5}])
    assert list(frame.columns)[len(COLUMNS) :] == ["weight_code", "loss_nats_wiki", "acc_x"]
    assert frame["loss_nats_wiki"].isna().tolist() == [False, True]
    assert {str(frame[name].dtype) for name in ("weight_code", "loss_nats_wiki", "acc_x")} == {"float64"}


def test_a_result_whose_source_lacks_a_figure_is_refused(texts):
    path = texts / "runs" / "mix"
    save_sweep(plan_of(texts), path)
    finish(load_sweep(path).runs[0], sources={"code": {"loss_nats": 1.0}}, epochs_by_source={"code": 1.0})
    with pytest.raises(UserError, match=r"sources\.code has no bits_per_byte, tokens_per_concept"):
        collect(path)


# Repeated text


def test_one_sentence_counts_the_runs_that_repeat_and_names_the_most_epochs():
    told = describe_repeats([0.5, 1.0, 2.25, None, float("nan"), 7.128])
    assert told is not None
    assert told.startswith("2 of 4 runs go through text more than once, up to 7.13 epochs: ")
    assert "Muennighoff et al. 2023" in told
    assert describe_repeats([0.5, 1.0, None]) is None
    assert str(describe_repeats([1.5])).startswith("1 of 1 runs goes ")
    assert "about 1.5 epochs (estimated" in str(describe_repeats([1.5], about=True))


def test_a_plan_is_judged_by_exact_counts_once_the_text_is_tokenized(texts):
    axes = {"data.mixture.wiki.weight": [0.3, 2.8]}
    data = plan_of(texts, axes).runs[1].config.data
    assert "estimated" in str(plan_repeats(plan_of(texts, axes, steps=1000)))
    corpora = [open_corpus(run.config.data) for run in plan_of(texts, axes).runs]
    sizes = {part.name: part.corpus.train.n_tokens for part in corpora[0].parts}
    assert data.mixture["wiki"].weight == 0.8
    expected = 256_000 * 819 / 1024 / sizes["wiki"]  # 0.8 in windows of a block
    told = str(plan_repeats(plan_of(texts, axes, steps=1000)))
    assert f"2 of 2 runs go through text more than once, up to {expected:.3g} epochs: " in told
    few = sizes["wiki"] * 1024 // 819 // 256
    assert plan_repeats(plan_of(texts, axes, steps=few)) is None
    assert str(plan_repeats(plan_of(texts, axes, steps=few + 1))).startswith("1 of 2 runs goes")


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe-300"])
def test_the_count_of_a_plain_corpus_is_exact_too(tmp_path, tokenizer):
    def planned(tokens):
        update = {"data": {**sweep_dict(tmp_path)["base"]["data"], "tokenizer": tokenizer}}
        update["train"] = {"batch_tokens": 64, "tokens": tokens}
        return make_plan(tmp_path, seeds=(0,), base_update=update)

    corpus = open_corpus(planned(64).runs[0].config.data)
    n = corpus.train.n_tokens // 64 * 64
    assert plan_repeats(planned(n)) is None
    assert "estimated" not in str(plan_repeats(planned(n + 64)))
    assert plan_repeats(planned(n + 64)) is not None


def test_nothing_is_said_where_the_size_of_the_text_is_not_known(tmp_path):
    for corpus in ("hf:some/data", str(tmp_path / "x.jsonl.gz")):
        (tmp_path / "x.jsonl.gz").write_bytes(b"")
        update = {"data": {"corpus": corpus, "tokenizer": "bytes", "seq_len": 64}}
        assert plan_repeats(make_plan(tmp_path, base_update=update, steps=10**6)) is None


@pytest.mark.slow
def test_plan_submit_and_collect_warn_in_one_line_and_json_stays_pure(tmp_path, dlcm):
    path, runs = tmp_path / "tiny.yaml", tmp_path / "runs"
    data = sweep_dict(tmp_path, steps=4, seeds=(0, 1))
    path.write_text(yaml.safe_dump(data))
    assert "more than once" not in "".join(dlcm("sweep", "plan", path, "--no-expect")[1:])
    many = tmp_path / "many.yaml"
    many.write_text(yaml.safe_dump(sweep_dict(tmp_path, steps=3000, seeds=(0, 1), name="many")))
    status, out, err = dlcm("sweep", "plan", many, "--no-expect")
    assert (status, (out + err).count("more than once")) == (0, 1)
    assert "2 of 2 runs go" in out
    told = json.loads(dlcm("sweep", "plan", many, "--no-expect", "--json")[1])
    assert sum("more than once" in warning for warning in told["costs"]["warnings"]) == 1
    told = json.loads(dlcm("sweep", "submit", many, "--dry-run", "--json", "--dir", runs)[1])
    assert sum("more than once" in warning for warning in told["plan"]["costs"]["warnings"]) == 1

    folder = runs / "done"
    save_sweep(plan(Sweep.from_yaml(many)), folder)
    for run, epochs in zip(load_sweep(folder).runs, (0.5, 6.25)):
        finish(run, epochs=epochs)
    status, out, err = dlcm("sweep", "collect", folder)
    assert (status, err.count("\n"), "more than once" in out) == (0, 1, False)
    assert err.startswith("warning: 1 of 2 runs goes through text more than once, up to 6.25 epochs")
    status, out, err = dlcm("sweep", "collect", folder, "--json")
    assert len(json.loads(out)["warnings"]) == 1
    assert pd.read_parquet(folder / "results.parquet")["epochs"].tolist() == [0.5, 6.25]


def test_a_submit_warns_on_stderr_before_it_trains(tmp_path, dlcm, monkeypatch):
    FakeTrain().install(monkeypatch)
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(sweep_dict(tmp_path, steps=2000, seeds=(0,))))
    status, out, err = dlcm("sweep", "submit", path, "--cluster", "debug", "--dir", tmp_path / "runs", "--json")
    assert status == 0
    assert json.loads(out)["trained"]
    assert err.count("warning: 1 of 1 runs goes through text more than once") == 1
