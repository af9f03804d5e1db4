"""Tokens per second of incremental decoding: `python benchmarks/decode.py [--quick] [--assert]`.

Three ways to write the same number of tokens behind the same prompt, batch 1 and 8, in one run:

- `incremental`: the DLCM with its caches, one token a call;
- `recomputed`: the same DLCM without caches, the whole prefix each time (timed at evenly spaced lengths, not at every one);
- `dense`: the dense model with the same FLOPs per token at this length, with its cache.

Rows of a batch have boundaries of their own: they come from the model's detector, set to the target rate R = 4 on the prompt.
Limit (`--assert`): incremental decoding is faster than recomputing.
"""

import argparse
import statistics
import time

import torch

from benchmarks.common import environment, format_table, write_result
from dlcm.config import BoundaryConfig, ModelConfig
from dlcm.model import Model, build_model
from flops import count
from sweeps.shapes import dense_shape, dlcm_shape

RATIO, SHARE, N_PROBES = 4.0, 0.6, 6


def models(size: float, vocab_size: int, length: int) -> dict[str, ModelConfig]:
    """A DLCM of `size` non-embedding parameters and the dense model that costs the same per token at `length`."""
    dlcm = ModelConfig(
        vocab_size=vocab_size,
        boundary=BoundaryConfig(compression_ratio=RATIO),
        **dlcm_shape(size, SHARE),
    )
    target = count(dlcm, seq_len=length, tokens_per_concept=RATIO).forward_per_token

    def dense(n: float) -> ModelConfig:
        return ModelConfig(kind="dense", vocab_size=vocab_size, **dense_shape(n))

    sizes = [size * (0.3 + 0.02 * i) for i in range(36)]
    costs = {n: count(dense(n), seq_len=length).forward_per_token for n in sizes}
    return {"dlcm": dlcm, "dense": dense(min(sizes, key=lambda n: abs(costs[n] / target - 1)))}


def prepared(config: ModelConfig, prompt_BT: torch.Tensor) -> Model:
    """A model whose logits mean nothing but whose boundary rate on the prompt is 1/R."""
    model = build_model(config).to(prompt_BT.device).eval()
    if not config.is_dense:
        n_rows, length = prompt_BT.shape
        starts = torch.arange(n_rows + 1, device=prompt_BT.device) * length
        model.boundary.calibrate(model.detect(prompt_BT.flatten(), starts).score_T)
    return model


class Run:
    """Greedy decoding behind a prompt, with or without a cache."""

    def __init__(self, model: Model, prompt_BT: torch.Tensor, new_tokens_BT: torch.Tensor) -> None:
        self.model, self.prompt_BT, self.new_BT = model, prompt_BT, new_tokens_BT
        self.tokens_per_concept = 1.0

    def incremental_s(self) -> float:
        """Seconds a token of one row-step: every row gets one token."""
        cache = self.model.new_cache(self.prompt_BT.shape[0])
        self.model(self.prompt_BT, cache=cache)
        _wait(self.prompt_BT)
        began = time.perf_counter()
        for t in range(self.new_BT.shape[1]):
            self.model(self.new_BT[:, t : t + 1], cache=cache)
        _wait(self.prompt_BT)
        elapsed = time.perf_counter() - began
        if not self.model.config.is_dense:
            self.tokens_per_concept = float(cache.n_tokens_B.sum() / cache.n_segments_B.sum())
        return elapsed / self.new_BT.shape[1]

    def recomputed_s(self) -> float:
        """The same without a cache, averaged over evenly spaced lengths."""
        whole_BT = torch.cat([self.prompt_BT, self.new_BT], dim=1)
        first, last = self.prompt_BT.shape[1], whole_BT.shape[1]
        began = time.perf_counter()
        for i in range(N_PROBES):
            self.model(whole_BT[:, : first + round((last - first) * (i + 0.5) / N_PROBES)])
        _wait(self.prompt_BT)
        return (time.perf_counter() - began) / N_PROBES


def _wait(x: torch.Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def measure(configs: dict[str, ModelConfig], n_rows: int, n_prompt: int, n_new: int, repeats: int, device: str) -> dict:
    """Medians of interleaved repeats for one batch size."""
    generator = torch.Generator().manual_seed(0)
    vocab_size = configs["dlcm"].vocab_size
    tokens_BT = torch.randint(0, vocab_size, (n_rows, n_prompt + n_new), generator=generator).to(device)
    prompt_BT, new_BT = tokens_BT[:, :n_prompt], tokens_BT[:, n_prompt:]
    dlcm, dense = (Run(prepared(configs[kind], prompt_BT), prompt_BT, new_BT) for kind in ("dlcm", "dense"))
    ways = {"incremental": dlcm.incremental_s, "recomputed": dlcm.recomputed_s, "dense": dense.incremental_s}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            seconds = way()
            if repeat:  # the first one warms up
                times[name].append(seconds)
    speed = {f"{name}_tokens_per_s": n_rows / statistics.median(found) for name, found in times.items()}
    return {
        "batch": n_rows,
        "tokens_per_concept": dlcm.tokens_per_concept,
        **speed,
        "incremental_over_recomputed": speed["incremental_tokens_per_s"] / speed["recomputed_tokens_per_s"],
        "dlcm_over_dense": speed["incremental_tokens_per_s"] / speed["dense_tokens_per_s"],
    }


@torch.no_grad()
def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smallest form: does it run")
    parser.add_argument("--assert", action="store_true", dest="check", help="fail where the limit is missed")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size, n_prompt, n_new, repeats = (1e5, 24, 8, 1) if args.quick else (5e6, 256, 128, 5)
    if device == "cuda" and not args.quick:
        size, n_prompt, n_new = 3.5e8, 1024, 256
    configs = models(size, 257 if args.quick else 4096, n_prompt + n_new)
    with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
        rows = [measure(configs, n_rows, n_prompt, n_new, repeats, device) for n_rows in (1, 8)]
    print(f"prompt {n_prompt}, {n_new} new tokens, R = {RATIO:g}, {size:.2g} parameters without embeddings")
    print(format_table(rows))
    if not args.quick:
        payload = {
            "environment": environment(device),
            "prompt": n_prompt,
            "new_tokens": n_new,
            "models": {name: config.model_dump(mode="json") for name, config in configs.items()},
            "flops_per_token": {
                name: count(config, seq_len=n_prompt + n_new, tokens_per_concept=RATIO).forward_per_token
                if name == "dlcm"
                else count(config, seq_len=n_prompt + n_new).forward_per_token
                for name, config in configs.items()
            },
            "rows": rows,
        }
        print(f"written to {write_result(f'decode_{device}', payload)}")
    if args.check:
        slow = [row["batch"] for row in rows if row["incremental_over_recomputed"] <= 1.0]
        assert not slow, f"incremental decoding is not faster than recomputing at batch {slow}"


if __name__ == "__main__":
    main()
