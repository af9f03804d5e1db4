"""Decoupled muP as AdamW parameter groups, and the learning-rate schedules.

| matrix                                        | fan-in  | learning rate, epsilon | weight decay |
|-----------------------------------------------|---------|------------------------|--------------|
| encoder, decoder, cross Q and O, W_q/W_k, W_up | token   | base / s_token         | base s_token |
| backbone, cross K and V                        | concept | base / s_concept       | base s_concept |
| embedding, unembedding                         | -       | base                   | base         |
| norms, smoother, null concept                  | -       | base                   | 0            |

with s = width / base width (eq 18). The paper groups by module (eqs 19, 20), so that K and V of the cross-attention, which
read the concept width, would be scaled by the token width; grouping per matrix by its own fan-in is ours. AdamW applies
lr * wd, so weight decay grows by s to keep that product.
"""

import math

import torch
from torch import nn

from dlcm.config import ModelConfig, OptimConfig, RunConfig
from dlcm.layers import Linear, RMSNorm
from dlcm.model import ConceptStack, Model


def parameter_groups(model: Model, config: OptimConfig) -> list[dict]:
    """AdamW groups, each with `params`, `lr` and `peak_lr`, `eps`, `weight_decay`, `name`, `side`.

    Raises:
        RuntimeError: a parameter is in no group or in two; a new kind of parameter needs a row in the table above.
    """
    groups: dict[tuple[str, str], list[torch.Tensor]] = {}
    for module in model.modules():
        if isinstance(module, Linear):
            role = ("output", "token") if module is model.unembedding else ("matrix", module.side)
            if not (module is model.unembedding and model.config.tie_embeddings):
                groups.setdefault(role, []).append(module.weight)
        elif isinstance(module, RMSNorm):
            groups.setdefault(("vector", module.side), []).append(module.weight)
        elif isinstance(module, nn.Embedding):
            groups.setdefault(("embedding", "token"), []).append(module.weight)
        elif isinstance(module, ConceptStack):
            groups.setdefault(("vector", "concept"), []).extend(module.parameters(recurse=False))
    grouped = [id(p) for params in groups.values() for p in params]
    if sorted(grouped) != sorted(id(p) for p in model.parameters()):
        raise RuntimeError("parameter groups do not cover every parameter exactly once")
    return [_group(role, side, params, model.config, config) for (role, side), params in groups.items()]


def _group(role: str, side: str, params: list[torch.Tensor], model: ModelConfig, optim: OptimConfig) -> dict:
    lr = optim.lr_token if side == "token" else optim.lr_concept
    s = 1.0
    if role == "matrix":
        s = model.mup_scale_token if side == "token" else model.mup_scale_concept
    return {
        "params": params,
        "name": f"{role}_{side}",
        "side": side,
        "lr": lr / s,
        "peak_lr": lr / s,
        "eps": optim.eps / s,
        "weight_decay": 0.0 if role == "vector" else optim.weight_decay * s,
    }


def build_optimizer(model: Model, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the groups of `parameter_groups`."""
    return torch.optim.AdamW(parameter_groups(model, config), betas=(config.beta1, config.beta2), fused=True)


def lr_factor(config: RunConfig, step: int) -> float:
    """Learning rate of `step` (from 0) over the peak.

    `wsd`: linear warm-up, constant, linear decay to `final_lr_ratio`. `cosine`: linear warm-up, then half a cosine.
    The first step has a positive rate and the last one ends above the final ratio, so that no step is wasted.
    """
    optim, n_steps, n_warmup = config.optim, config.n_steps, config.n_warmup_steps
    warm = min(1.0, (step + 1) / n_warmup) if n_warmup else 1.0
    if optim.schedule == "wsd":
        n_decay = optim.decay_share * n_steps
        remaining = min(1.0, (n_steps - step) / n_decay) if n_decay else 1.0
    else:
        span = max(n_steps - n_warmup, 1.0)
        remaining = 0.5 * (1.0 + math.cos(math.pi * min(max(step - n_warmup, 0.0) / span, 1.0)))
    if remaining == 1.0:  # to the bit, whatever the final ratio is
        return warm
    return min(warm, optim.final_lr_ratio + (1.0 - optim.final_lr_ratio) * remaining)
