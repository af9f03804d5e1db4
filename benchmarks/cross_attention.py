"""Attention of tokens to concepts by every backend: `python benchmarks/cross_attention.py [--quick] [--assert]`.

One document (batch 1) cut at random places into length / R concepts, in two forms of the same question:

- `earlier`: our visibility, a token sees the segments before its own. Replication needs eight more columns a head for it.
- `own`: a token sees its own segment's concept too, with the log-length bias: what concept replication (eq 17) computes with
  keys and values repeated and nothing else, the paper's own form.

`forward` runs with gradients on, as in training. What does not depend on the layer (blocks, masks, placements) is made once
before, since all layers of a step share it; `staircase, anew` and `flex, create_block_mask` make it in every call, and `mask`
rows time the two ways to a block mask alone. Ratios are against `replicated` in the same form and direction, of the same run.

CPU: fp32, 8 heads of 64. GPU: bf16, 32 heads, widths 1024, 2048 and 4096 as in table 6 of the paper, which gives neither GPU
nor dtype nor direction; there replicated flash attention is 1.26x to 1.73x faster than FlexAttention over all cells.

Limits (`--assert`): CPU: staircase >= 3x replicated at R = 4 from 2,048 tokens. GPU: staircase >= 1.5x replicated and >= 2x
FlexAttention with create_block_mask, at R = 4 from 8,192 tokens. `--quick` is the smallest form, and writes nothing.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from benchmarks.common import environment, format_table, median_ms, write_result
from dlcm.attention import CrossAttend
from dlcm.backends import flex
from dlcm.concepts import Packing, Segments, segment

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
RATIOS = (2, 4, 8)
FORMS = {"earlier": False, "own": True}
# Above this many scores a backend that holds all of them at once is left out.
MAX_SCORES = {"reference": 2**25, "sdpa": 2**30}
# Flex ms and replicated flash ms of the paper's table 6 at width 1024, by length.
PAPER_MS = {2048: (32.4, 22.5), 4096: (59.8, 45.2), 8192: (116.4, 91.4), 16384: (314.4, 186.2)}


@dataclass(frozen=True)
class Case:
    """One document and the tensors of one layer."""

    length: int
    ratio: int
    segments: Segments
    q_THA: Tensor
    k_KGA: Tensor
    v_KGA: Tensor
    null_GA: Tensor
    d_out_THA: Tensor

    @classmethod
    def draw(
        cls, length: int, ratio: int, n_heads: int, d_head: int, device: torch.device, dtype: torch.dtype
    ) -> "Case":
        generator = torch.Generator().manual_seed(length + ratio)
        flags_T = torch.zeros(length, dtype=torch.bool)
        flags_T[torch.randperm(length - 1, generator=generator)[: length // ratio - 1] + 1] = True
        flags_T[0] = True
        segments = segment(flags_T.to(device), Packing(torch.tensor([0, length], device=device)))

        def normal(rows: int) -> Tensor:
            return torch.randn(rows, n_heads, d_head, generator=generator).to(device, dtype)

        q, k, v = normal(length), normal(segments.n_concepts), normal(segments.n_concepts)
        for leaf in (q, k, v):
            leaf.requires_grad_()
        return cls(length, ratio, segments, q, k, v, normal(1)[0], normal(length))

    def run(self, attend: Callable[..., Tensor], own_segment: bool, backward: bool) -> None:
        """Attention, and its gradients."""
        out_THA = attend(self.q_THA, self.k_KGA, self.v_KGA, None if own_segment else self.null_GA)
        if backward:
            torch.autograd.grad(out_THA, (self.q_THA, self.k_KGA, self.v_KGA), self.d_out_THA)

    def anew(self) -> Segments:
        """The segments with nothing kept on them."""
        s = self.segments
        tokens, concepts = Packing(s.tokens.cu_seqlens_S1), Packing(s.concepts.cu_seqlens_S1)
        return Segments(tokens, concepts, s.segment_T, s.lengths_K, s.n_concepts)


def attends(case: Case, own_segment: bool, backward: bool) -> Iterator[tuple[str, Callable[..., Tensor]]]:
    """The backends that can do this here, by name."""
    n_scores = case.length * case.segments.n_concepts * case.q_THA.shape[1]
    for name in ("replicated", "staircase", "sdpa", "reference"):
        if n_scores <= MAX_SCORES.get(name, n_scores):
            yield name, CrossAttend(case.segments, own_segment, True, name)
    yield "staircase, anew", lambda *qkv: CrossAttend(case.anew(), own_segment, True, "staircase")(*qkv)
    if own_segment:  # FlexAttention is compiled anew for every score function: one form says enough
        return
    if case.q_THA.is_cuda:
        yield "flex", CrossAttend(case.segments, own_segment, True, "flex")
        yield "flex, create_block_mask", partial(with_created_mask, case)
    elif not backward and n_scores <= MAX_SCORES["reference"]:
        yield "flex", without_gradients(CrossAttend(case.segments, own_segment, True, "flex"))


def with_created_mask(case: Case, q_THA: Tensor, k_KGA: Tensor, v_KGA: Tensor, null_GA: Tensor) -> Tensor:
    """FlexAttention with the mask that torch finds by evaluating every token against every concept."""
    anew = case.anew()
    anew.__dict__["_flex"] = {(False, True, torch.float32): (created_mask(anew), _score_mod(case))}
    return CrossAttend(anew, False, True, "flex")(q_THA, k_KGA, v_KGA, null_GA)


def created_mask(segments: Segments) -> Any:
    sizes = segments.segment_T.numel(), segments.lengths_K.numel()
    return create_block_mask(flex.mask_mod(segments, False), None, None, *sizes, device=str(segments.segment_T.device))


def _score_mod(case: Case) -> Callable[..., Tensor]:
    """The bias, made once: here only the mask is to be made in every call."""
    kept = case.segments.__dict__.setdefault("_benchmark", {})
    if "bias" not in kept:
        kept["bias"] = flex.score_mod(case.segments, False, torch.float32)
    return kept["bias"]


def without_gradients(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*qkv: Tensor) -> Tensor:
        with torch.no_grad():
            return attend(*qkv)

    return run


def measure(case: Case, repeats: int) -> list[dict[str, Any]]:
    """Rows of one case."""
    rows, device = [], case.q_THA.device
    where = {"width": case.q_THA.shape[1] * case.q_THA.shape[2], "length": case.length, "R": case.ratio}
    for form, own_segment in FORMS.items():
        for direction, backward in {"forward": False, "forward+backward": True}.items():
            calls = {
                name: partial(case.run, attend, own_segment, backward)
                for name, attend in attends(case, own_segment, backward)
            }
            times = median_ms(calls, repeats, device)
            for name, ms in times.items():
                ratio = times["replicated"] / ms
                rows.append(
                    {**where, "form": form, "direction": direction, "backend": name, "ms": ms, "vs replicated": ratio}
                )
    masks = {"flex": lambda: flex.block_mask(case.anew(), False)}
    if case.length * case.segments.n_concepts <= MAX_SCORES["reference"] or case.q_THA.is_cuda:
        masks["flex, create_block_mask"] = lambda: created_mask(case.anew())
    for name, ms in median_ms(masks, repeats, device).items():
        rows.append({**where, "form": "earlier", "direction": "mask", "backend": name, "ms": ms, "vs replicated": None})
    return rows


def failures(rows: list[dict[str, Any]], on_gpu: bool) -> list[str]:
    """What is slower than the limits allow."""
    found, least_length, least_ratio = [], 8192 if on_gpu else 2048, 1.5 if on_gpu else 3.0
    times = {
        tuple(row[key] for key in ("width", "length", "R", "form", "direction", "backend")): row["ms"] for row in rows
    }
    for (width, length, ratio, form, direction, backend), ms in times.items():
        if backend != "staircase" or ratio != 4 or length < least_length:
            continue
        bounds = {"replicated": least_ratio} | (
            {"flex, create_block_mask": 2.0} if on_gpu and form == "earlier" else {}
        )
        for other, least in bounds.items():
            speedup = times[width, length, ratio, form, direction, other] / ms
            if speedup < least:
                at = f"width {width}, {length} tokens, {form}, {direction}"
                found.append(f"{at}: {speedup:.2f}x {other}, not {least:g}x")
    return found


def paper_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Flex over replicated, here and in the paper, at R = 4 in the paper's form of replication."""
    table, times = (
        [],
        {(r["width"], r["length"], r["R"], r["form"], r["direction"], r["backend"]): r["ms"] for r in rows},
    )
    for (width, length, ratio, form, direction, backend), ms in times.items():
        if backend == "flex" and ratio == 4 and form == "earlier" and direction != "mask" and length in PAPER_MS:
            theirs = PAPER_MS[length][0] / PAPER_MS[length][1] if width == 1024 else None
            ours = {
                f"flex / replicated {f}": ms / times[width, length, 4, f, direction, "replicated"]
                for f in ("own", "earlier")
            }
            table.append({"width": width, "length": length, "direction": direction, **ours, "paper": theirs})
    return table


def main() -> None:
    """Measure, print, record, then assert."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="smallest form; nothing is written")
    parser.add_argument("--assert", dest="limits", action="store_true", help="fail where a limit is not met")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of the CPU; torch's default otherwise")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens; 512 to 16384 by default")
    parser.add_argument("--ratios", type=int, nargs="+", help="tokens per concept; 2, 4, 8 by default")
    parser.add_argument("--widths", type=int, nargs="+", help="heads x head width; GPU 1024, 2048, 4096, CPU 512")
    parser.add_argument("--heads", type=int, help="GPU 32, CPU 8")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    n_heads, dtype = options.heads or (32 if on_gpu else 8), torch.bfloat16 if on_gpu else torch.float32
    widths = options.widths or (
        (1024,) if on_gpu and options.quick else (1024, 2048, 4096) if on_gpu else (64 * n_heads,)
    )
    lengths = options.lengths or ((512, 2048) if options.quick else LENGTHS)
    ratios = options.ratios or ((4,) if options.quick else RATIOS)
    rows: list[dict[str, Any]] = []
    for width in widths:
        # A kernel of FlexAttention is compiled for one head width; stale ones would count against the compiler's limit.
        torch._dynamo.reset()
        flex._compiled.cache_clear()
        for length, ratio in itertools.product(lengths, ratios):
            found = measure(Case.draw(length, ratio, n_heads, width // n_heads, device, dtype), options.repeats)
            print(format_table(found), flush=True)
            rows += found
    result = {
        "environment": environment(device),
        "dtype": str(dtype).removeprefix("torch."),
        "heads": n_heads,
        "batch": 1,
        "repeats": options.repeats,
        "rows": rows,
    }
    if on_gpu:
        result["flex_over_replicated"] = paper_rows(rows)
        print(format_table(result["flex_over_replicated"]))
    if not options.quick:
        slug = result["environment"]["device"].lower().replace(" ", "-") if on_gpu else "cpu"
        print(write_result(f"cross_attention_{slug}", result))
    missed = failures(rows, on_gpu)
    print("\n".join(missed) or "all limits met")
    if options.limits and missed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
