import importlib.util
import json
import sys
from importlib.metadata import EntryPoint

import pytest
import tokenizers
import torch
from lm_eval.evaluator import evaluate as run_harness
from torch.nn import functional as F

from dlcm import cli
from dlcm.checkpoint import load_trained
from dlcm.config import DataConfig, RunConfig
from dlcm.errors import UserError
from dlcm.export import export_hf, hf_config, hf_weights
from dlcm.harness import HarnessModel, HarnessTask
from dlcm.shards import open_corpus
from dlcm.tasks import jsonl_task
from dlcm.tokens import Tokenizer
from dlcm.train import train
from tests.dlcm.conftest import awake, dense_config, small_config
from tests.dlcm.texts import write_texts

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed (extra `hf`)"
)
needs_lm_evals_class = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("transformers", "accelerate")),
    reason="lm-eval's Hugging Face class needs transformers and accelerate (extra `hf`)",
)
SHAPES = {
    "plain": {},
    "scaled": {"d_token": 32, "n_heads_token": 4, "n_kv_heads_token": 2, "d_token_base": 8, "rope_theta": 500.0},
    "tied": {"tie_embeddings": True, "d_token_base": 4},
}
TEXT = "of the river, été <|endoftext|> and"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def trained(texts, tmp_path_factory):
    """A dense run of two seconds, wider than its base."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    config = RunConfig(
        model=dense_config(vocab_size=400, d_token=32, n_heads_token=4, n_kv_heads_token=2, d_token_base=16),
        data={"corpus": str(texts), "tokenizer": "bpe-400", "seq_len": 128, "validation_tokens": 1024},
        optim={"lr_token": 1e-2},
        train={"tokens": 60 * 512, "batch_tokens": 512},
    )
    train(config, run_dir)
    return run_dir


def rms(x, gain, eps=1e-6):
    return gain * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def turned(x, position, theta):
    """Rotary embedding of one head at one position, pair by pair."""
    half = len(x) // 2
    out = x.clone()
    for i in range(half):
        angle = torch.tensor(position * theta ** (-2 * i / len(x)), dtype=x.dtype)
        out[i] = x[i] * angle.cos() - x[half + i] * angle.sin()
        out[half + i] = x[half + i] * angle.cos() + x[i] * angle.sin()
    return out


def llama(weights, config, ids):
    """Logits of the published architecture, head by head and token by token, from nothing but the exported files' content."""
    w = {name: weight.double() for name, weight in weights.items()}
    n_heads, n_kv, width = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    x = w["model.embed_tokens.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        own = {
            name.removeprefix(f"model.layers.{i}."): v for name, v in w.items() if name.startswith(f"model.layers.{i}.")
        }
        y = rms(x, own["input_layernorm.weight"])
        q, k, v = (y @ own[f"self_attn.{name}_proj.weight"].T for name in "qkv")
        heads = []
        for h in range(n_heads):
            g = h // (n_heads // n_kv)
            q_h = rms(q[:, h * width : (h + 1) * width], own["self_attn.q_norm.weight"])
            k_h = rms(k[:, g * width : (g + 1) * width], own["self_attn.k_norm.weight"])
            q_h, k_h = (
                torch.stack([turned(r, t, config["rope_theta"]) for t, r in enumerate(rows)]) for rows in (q_h, k_h)
            )
            scores = (q_h @ k_h.T / width**0.5).masked_fill(torch.ones(len(ids), len(ids)).triu(1).bool(), -torch.inf)
            heads.append(scores.softmax(-1) @ v[:, g * width : (g + 1) * width])
        x = x + torch.cat(heads, 1) @ own["self_attn.o_proj.weight"].T
        y = rms(x, own["post_attention_layernorm.weight"])
        y = F.silu(y @ own["mlp.gate_proj.weight"].T) * (y @ own["mlp.up_proj.weight"].T)
        x = x + y @ own["mlp.down_proj.weight"].T
    head = w["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
    return rms(x, w["model.norm.weight"]) @ head.T


@pytest.mark.parametrize("shape", SHAPES)
def test_the_exported_weights_are_those_of_the_published_architecture(shape):
    model = awake(dense_config(**SHAPES[shape])).eval()
    run = RunConfig(model=model.config, data={"seq_len": 64}, train={"tokens": 2048, "batch_tokens": 2048})
    ids = torch.randint(0, 61, (12,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = model(ids[None]).logits[0]
        theirs = llama(hf_weights(model), hf_config(run, Tokenizer()), ids)
    assert ours.abs().max() > 0.1
    assert (ours - theirs).abs().max() < 1e-4  # weights leave in fp32
    assert ("lm_head.weight" in hf_weights(model)) == (shape != "tied")


@pytest.mark.parametrize("spec", ["bytes", "bpe-400"])
def test_the_exported_tokenizer_puts_the_end_of_text_first_and_else_encodes_as_ours(texts, spec):
    tokenizer = open_corpus(DataConfig(corpus=str(texts), tokenizer=spec)).tokenizer
    backend, name = tokenizer.with_end_of_text()
    again = tokenizers.Tokenizer.from_str(backend.to_str())
    again.encode_special_tokens = True  # what split_special_tokens asks for
    assert again.encode(TEXT).ids == [tokenizer.eot_id, *tokenizer.encode(TEXT).tolist()]
    assert again.encode(TEXT, add_special_tokens=False).ids == tokenizer.encode(TEXT).tolist()
    assert again.decode(again.encode(TEXT).ids) == TEXT
    assert again.id_to_token(tokenizer.eot_id) == name


def test_a_vocabulary_with_gaps_and_no_end_of_text_is_refused():
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 5}, unk_token="a"))
    with pytest.raises(UserError, match="no end of text can be added as id 6"):
        Tokenizer(backend).with_end_of_text()


def test_the_directory_holds_all_that_is_needed_and_where_it_is_from(trained, tmp_path):
    done = export_hf(trained, tmp_path / "out")
    assert done.files == ("config.json", "dlcm.json", "pytorch_model.bin", "tokenizer.json", "tokenizer_config.json")
    model, config, _ = load_trained(trained)
    assert done.n_parameters == sum(p.numel() for p in model.parameters())
    told = json.loads((tmp_path / "out" / "dlcm.json").read_text())
    assert (told["run_id"], told["checkpoint"]) == (config.run_id, "step-00000060.pt")
    read = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    ids = torch.tensor([399, 5, 300, 17, 8])
    with torch.no_grad():
        ours = model(ids[None]).logits[0]
    theirs = llama(read, json.loads((tmp_path / "out" / "config.json").read_text()), ids)
    assert (ours - theirs).abs().max() < 1e-4
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # nothing half-made stays


def test_what_cannot_be_exported_is_refused_and_what_is_there_stays(trained, texts, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="full: exists and is not an empty directory"):
        export_hf(trained, tmp_path / "full")
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"
    config = RunConfig(
        model=small_config(vocab_size=257),
        data={"corpus": str(texts), "tokenizer": "bytes", "seq_len": 64, "validation_tokens": 512},
        train={"tokens": 512, "batch_tokens": 512},
    )
    train(config, tmp_path / "dlcm")
    with pytest.raises(UserError, match="a DLCM has no Hugging Face format: .* boundaries, concepts"):
        export_hf(tmp_path / "dlcm", tmp_path / "out")
    with pytest.raises(UserError, match=r"run\.json: no such file"):
        export_hf(tmp_path / "none", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_export_verb_writes_or_says_what_is_missing(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "entry_points", lambda group: [EntryPoint("model", "dlcm.commands:app", "dlcm.commands")])

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["dlcm", "export", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return (stop.value.code or 0, *capsys.readouterr())

    code, out, _ = run("--hf", trained, "-o", tmp_path / "out")
    assert code == 0
    assert "pytorch_model.bin" in out
    code, out, err = run(trained, "-o", tmp_path / "other")
    assert (code, out) == (2, "")
    assert "--hf is the one there is" in err
    code, out, _ = run("--hf", trained, "-o", tmp_path / "json", "--json")
    assert json.loads(out)["path"] == str(tmp_path / "json")


@needs_transformers
def test_transformers_reads_it_and_gives_the_same_logits(trained, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(export_hf(trained, tmp_path / "out").path)
    theirs, their_tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    model, config, _ = load_trained(trained)
    tokenizer = open_corpus(config.data).tokenizer
    ids = [tokenizer.eot_id, *tokenizer.encode(TEXT).tolist()]
    assert their_tokenizer.encode(TEXT) == ids
    tokens = torch.tensor([ids])
    with torch.no_grad():
        assert (model(tokens).logits - theirs(tokens).logits).abs().max() < 1e-4


@needs_lm_evals_class
def test_lm_evals_own_class_gives_the_same_accuracies_and_log_likelihoods(trained, tmp_path):
    from lm_eval.models.huggingface import HFLM

    rows = [
        {"query": f"{i} of the", "choices": ["river and", "town", "was it.", f"it {i}"], "gold": i % 4}
        for i in range(40)
    ]
    (tmp_path / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "last.jsonl").write_text(
        "".join(json.dumps({"text": f"{i} of the and of the"}) + "\n" for i in range(40))
    )
    tasks = [jsonl_task(tmp_path / f"{name}.jsonl") for name in ("words", "last")]
    model, config, _ = load_trained(trained)
    ours = HarnessModel(model, open_corpus(config.data).tokenizer, config.data.seq_len)
    folder = str(export_hf(trained, tmp_path / "out").path)
    theirs = HFLM(pretrained=folder, tokenizer=folder, device="cpu", dtype="float32", batch_size=8)
    answers = [
        run_harness(lm, {task.name: HarnessTask(task) for task in tasks}, bootstrap_iters=1) for lm in (ours, theirs)
    ]
    for task in tasks:
        one, other = (answer["samples"][task.name] for answer in answers)
        for mine, peers in zip(one, other):
            assert mine["acc"] == peers["acc"]
            for (value, greedy), (their_value, their_greedy) in zip(mine["filtered_resps"], peers["filtered_resps"]):
                assert value == pytest.approx(their_value, abs=1e-3)
                assert greedy == their_greedy
        results = [answer["results"][task.name] for answer in answers]
        assert results[0]["acc,none"] == results[1]["acc,none"]
        assert results[0]["bits_per_byte,none"] == pytest.approx(results[1]["bits_per_byte,none"], abs=1e-3)
