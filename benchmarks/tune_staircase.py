"""The staircase kernels on this machine: errors against the float64 reference, then the time of every tile candidate.

    python benchmarks/tune_staircase.py [--out NAME]

On a GPU: bfloat16 errors beside those of the eager reference, float32 errors, and milliseconds by kernel, head width and
length; the best tiles are printed and everything is written to `benchmarks/results/NAME.json`. Without a GPU: float32 errors
at a small size under Triton's interpreter, printed only.
"""

import argparse
import os
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

sys.path.insert(0, str(Path(__file__).parent))
from common import environment, format_table, write_result  # noqa: E402

from dlcm.backends import reference, staircase_tiles, staircase_triton  # noqa: E402
from dlcm.backends.staircase_tiles import Kernel, Tiles  # noqa: E402
from dlcm.concepts import Packing, segment  # noqa: E402

DEVICE = "cuda" if ON_GPU else "cpu"
KERNELS: tuple[Kernel, ...] = ("forward", "query_grad", "key_grad")
# Largest errors by the norm; half precision is bounded by twice the error of the eager computation instead.
FLOAT32_BOUND = 1e-5


def draw(lengths: list[int], n_heads: int, n_kv: int, d_head: int, ratio: float, seed: int = 0):
    """Packed documents with random boundaries, and float32 queries, keys, values and output gradients."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    packing = Packing.from_lengths(torch.tensor(lengths, device=DEVICE))
    flags_T = torch.rand(sum(lengths), generator=generator, device=DEVICE) < 1.0 / ratio
    segments = segment(flags_T | packing.is_first_T, packing)
    rows = (sum(lengths), n_heads), (segments.n_concepts, n_kv), (segments.n_concepts, n_kv), (sum(lengths), n_heads)
    return segments, [torch.randn(*r, d_head, generator=generator, device=DEVICE) for r in rows]


def by_kernels(segments, tensors, own_segment: bool) -> list[torch.Tensor]:
    """Output and gradients of the kernels."""
    q, k, v, d_out = tensors
    out, lse = staircase_triton.forward(q, k, v, segments, own_segment, True)
    return [out, *staircase_triton.backward(d_out, q, k, v, out, lse, segments, own_segment, True)]


def by_reference(segments, tensors, own_segment: bool) -> list[torch.Tensor]:
    """The same from the dense reference in the dtype of the tensors."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors[:3]]
    out = reference.cross_attention(*leaves, segments, own_segment, True)
    return [out.detach(), *torch.autograd.grad(out, leaves, tensors[3])]


def errors(found: list[torch.Tensor], truth: list[torch.Tensor]) -> list[float]:
    """Relative errors by the norm; infinite where something is not finite."""
    return [
        ((a.double() - b).norm() / b.norm()).item() if bool(torch.isfinite(a).all()) else float("inf")
        for a, b in zip(found, truth)
    ]


def check() -> list[dict[str, Any]]:
    """Errors at several sizes, head widths and groupings; `ok` says whether they are within their bounds."""
    lengths = [[1500, 548], [1, 0, 900, 64, 83]] if ON_GPU else [[70, 1, 0, 25]]
    heads = [(8, 8, 128), (8, 2, 64), (4, 1, 80), (2, 2, 256)] if ON_GPU else [(2, 1, 16)]
    rows = []
    for packed, (n_heads, n_kv, d_head), own_segment in product(lengths, heads, (False, True)):
        segments, tensors = draw(packed, n_heads, n_kv, d_head, 4.0)
        # bfloat16 products are not computed by the interpreter.
        for dtype in (torch.float32, torch.bfloat16) if ON_GPU else (torch.float32,):
            rounded = [x.to(dtype) for x in tensors]
            truth = by_reference(segments, [x.double() for x in rounded], own_segment)
            found = errors(by_kernels(segments, rounded, own_segment), truth)
            bounds = [FLOAT32_BOUND] * 4
            if dtype != torch.float32:
                bounds = [2 * e for e in errors(by_reference(segments, rounded, own_segment), truth)]
            row = {
                "tokens": sum(packed),
                "heads": f"{n_heads}/{n_kv}x{d_head}",
                "own": own_segment,
                "dtype": str(dtype)[6:],
            }
            row |= dict(zip(("out", "d_q", "d_k", "d_v"), found))
            rows.append({**row, "ok": all(e <= bound for e, bound in zip(found, bounds))})
    return rows


def tune(lengths: list[int], d_heads: list[int]) -> list[dict[str, Any]]:
    """Milliseconds of every candidate: the forward pass, or the whole backward pass with one kernel's tiles varied."""
    rows = []
    for n_tokens, d_head in product(lengths, d_heads):
        segments, tensors = draw([n_tokens], 32, 32, d_head, 4.0)
        tensors = [x.bfloat16() for x in tensors]
        default = {kernel: staircase_tiles.candidates(kernel, d_head, torch.bfloat16)[0] for kernel in KERNELS}
        for kernel in KERNELS:
            for tiles in staircase_tiles.candidates(kernel, d_head, torch.bfloat16):
                ms = time_ms(segments, tensors, kernel, {**default, kernel: tiles})
                rows.append({"kernel": kernel, "d_head": d_head, "tokens": n_tokens, "tiles": list(tiles), "ms": ms})
    staircase_tiles.fix({})
    return rows


def time_ms(segments, tensors, kernel: Kernel, tiles: dict[Kernel, Tiles]) -> float | None:
    """Median time of the pass that holds the kernel; None where its tiles do not fit."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    q, k, v, d_out = tensors
    staircase_tiles.fix(tiles)
    rest = (segments, False, True)
    try:
        out, lse = staircase_triton.forward(q, k, v, *rest)
        run = (
            (lambda: staircase_triton.forward(q, k, v, *rest))
            if kernel == "forward"
            else (lambda: staircase_triton.backward(d_out, q, k, v, out, lse, *rest))
        )
        return float(do_bench(run, return_mode="median"))
    except OutOfResources:
        return None


def best(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The fastest candidate of each kernel, head width and length."""
    fastest: dict[tuple, dict[str, Any]] = {}
    for row in rows:
        key = (row["kernel"], row["d_head"], row["tokens"])
        if row["ms"] is not None and (key not in fastest or row["ms"] < fastest[key]["ms"]):
            fastest[key] = row
    return list(fastest.values())


def main() -> int:
    """Check, then tune; status 1 where an error is above its bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="tune_staircase", help="name of the file in benchmarks/results")
    arguments = parser.parse_args()
    if not ON_GPU:
        small = Tiles(32, 32, 4, 2)
        staircase_tiles.fix(dict.fromkeys(KERNELS, small), 2)
    checks = check()
    print(format_table(checks))
    if not all(row["ok"] for row in checks):
        print("errors above their bounds: nothing is timed", file=sys.stderr)
        return 1
    if ON_GPU:
        timings = tune([2048, 8192, 16384], [32, 64, 128, 256])
        print(format_table(best(timings)))
        payload = {"environment": environment(DEVICE), "checks": checks, "timings": timings, "best": best(timings)}
        print(write_result(arguments.out, payload))
    return 0


if __name__ == "__main__":
    sys.exit(main())
