"""A trained dense model as a Hugging Face directory: weights, config and tokenizer, for everything that reads that format.

The dense model is Llama's (RMSNorm, rotary halves, SwiGLU, grouped queries, no biases) with a norm on queries and keys, which
Llama does not have. That architecture is called Qwen3 there: the same parts, the same names, and the two norms. The multiplier of
the logits (muP, eq 21) goes into the gain of the last norm.
"""

import json
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dlcm.checkpoint import check_corpus, load_config, load_trained
from dlcm.config import ModelConfig, RunConfig
from dlcm.errors import UserError
from dlcm.model import Model
from dlcm.provenance import commit_in_words
from dlcm.record import read_json
from dlcm.shards import open_corpus
from dlcm.tokens import Tokenizer

# Part of a block here -> there.
_BLOCK = {
    "attention_norm": "input_layernorm",
    "attention.w_q": "self_attn.q_proj",
    "attention.w_k": "self_attn.k_proj",
    "attention.w_v": "self_attn.v_proj",
    "attention.w_o": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "ff_norm": "post_attention_layernorm",
    "ff.w_gate": "mlp.gate_proj",
    "ff.w_up": "mlp.up_proj",
    "ff.w_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the directory.
        files: names of its files.
        n_parameters: weights, the shared embedding once.
    """

    path: Path
    files: tuple[str, ...]
    n_parameters: int


def export_hf(run_dir: Path | str, target: Path | str) -> Exported:
    """Write the newest checkpoint of a dense run as a Hugging Face directory.

    Args:
        run_dir: directory of a trained run.
        target: directory to make.

    Raises:
        UserError: a DLCM, no trained run, another tokenizer than it was trained with, or a directory that is not empty.
    """
    run_dir, target = Path(run_dir), Path(target)
    config = load_config(run_dir)
    if not config.model.is_dense:
        raise UserError(
            f"{run_dir}: a DLCM has no Hugging Face format: no architecture there has boundaries, concepts and attention of "
            "tokens to them; export a dense run (model.kind: dense), and evaluate this one with `dlcm eval`"
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: exists and is not an empty directory; give another -o")
    corpus = open_corpus(config.data)
    check_corpus(run_dir, corpus)
    model, _, checkpoint = load_trained(run_dir)
    weights = hf_weights(model)
    draft = target.with_name(f".{target.name}-{uuid.uuid4().hex[:8]}")
    draft.mkdir(parents=True)
    try:
        torch.save(weights, draft / "pytorch_model.bin")
        _write_tokenizer(draft, corpus.tokenizer, config.data.seq_len)
        _write(draft / "config.json", hf_config(config, corpus.tokenizer))
        _write(draft / "dlcm.json", _provenance(run_dir, config, checkpoint))
        if target.exists():
            target.rmdir()
        draft.rename(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    files = tuple(sorted(path.name for path in target.iterdir()))
    return Exported(target, files, sum(weight.numel() for weight in weights.values()))


def hf_weights(model: Model) -> dict[str, Tensor]:
    """The weights of a dense model by the names that they have there; fp32, on the CPU."""
    ours, config = model.state_dict(), model.config
    found = {"model.embed_tokens.weight": ours["embedding.weight"]}
    for i in range(config.n_encoder_layers):
        for here, there in _BLOCK.items():
            found[f"model.layers.{i}.{there}.weight"] = ours[f"encoder.{i}.{here}.weight"]
    found["model.norm.weight"] = ours["norm.weight"] / config.mup_scale_token
    if not config.tie_embeddings:
        found["lm_head.weight"] = ours["unembedding.weight"]
    return {name: weight.detach().float().cpu().contiguous().clone() for name, weight in found.items()}


def hf_config(config: RunConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of config.json."""
    model: ModelConfig = config.model
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_token,
        "intermediate_size": model.d_ff_token,
        "num_hidden_layers": model.n_encoder_layers,
        "num_attention_heads": model.n_heads_token,
        "num_key_value_heads": model.n_kv_heads_token,
        "head_dim": model.d_head,
        "hidden_act": "silu",
        "max_position_embeddings": config.data.seq_len,
        "rms_norm_eps": 1e-6,
        # Once as version 4 of transformers reads it, once as version 5 does.
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "tie_word_embeddings": model.tie_embeddings,
        "bos_token_id": tokenizer.eot_id,
        "eos_token_id": tokenizer.eot_id,
        "torch_dtype": "float32",
    }


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, seq_len: int) -> None:
    backend, eot = tokenizer.with_end_of_text()
    backend.save(str(folder / "tokenizer.json"))
    facts = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": eot,
        "eos_token": eot,
        "model_max_length": seq_len,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # text that spells the end of text is text
    }
    _write(folder / "tokenizer_config.json", facts)


def _provenance(run_dir: Path, config: RunConfig, checkpoint: str) -> dict[str, Any]:
    result = run_dir / "result.json"
    return {
        "run_id": config.run_id,
        "config": config.model_dump(mode="json"),
        "checkpoint": checkpoint,
        "loss_nats": read_json(result).get("loss_nats") if result.exists() else None,
        "exported_by": commit_in_words(),
    }


def _write(path: Path, facts: dict[str, Any]) -> None:
    path.write_text(json.dumps(facts, indent=2) + "\n")
