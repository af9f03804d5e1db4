"""Runs the Triton kernels for tests: on the GPU where there is one, else under Triton's interpreter in another process.

The interpreter is chosen by an environment variable when Triton is imported, and it leaves Triton's language patched behind.
Tests share their process with others in any order, so the interpreter gets a process of its own, which reads problems from
its standard input and writes solutions to its standard output.
"""

import os
import pickle
import struct
import subprocess
import sys
from types import SimpleNamespace
from typing import Any, BinaryIO

import torch

SMALL = (32, 32, 4, 2)


def solve(problem: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """What the kernels give for a problem: cross-entropy where there are `logits`, a named function, else the staircase."""
    if "model" in problem:
        return _model(**problem)
    if "function" in problem:
        from dlcm.backends import fused_triton

        found = getattr(fused_triton, problem["function"])(*problem["inputs"])
        return found if isinstance(found, tuple) else (found,)
    return _cross_entropy(problem) if "logits" in problem else _staircase(problem)


def _model(
    model: Any, tokens: torch.Tensor, cu_seqlens: torch.Tensor, boundaries: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Loss of the next token and all gradients of a model whose blocks go through the kernels."""
    from dlcm import fused_gpu

    applies, fused_gpu.applies = fused_gpu.applies, lambda x: True
    try:
        out = model(tokens[:-1], cu_seqlens=cu_seqlens, boundaries=boundaries, targets=tokens[1:])
        return out.loss_sum.detach(), *torch.autograd.grad(out.loss_sum, [p for _, p in trained(model)])
    finally:
        fused_gpu.applies = applies


def trained(model: Any) -> list[tuple[str, Any]]:
    """Parameters that have a gradient where boundaries are given."""
    return [(name, p) for name, p in model.named_parameters() if not name.startswith("boundary.")]


def _cross_entropy(problem: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """Losses, and what stands in the place of the logits."""
    from dlcm.backends.cross_entropy_triton import softmax_delta_

    logits = problem["logits"].clone()
    nats = torch.full(logits.shape[:1], float("nan"), device=logits.device)
    softmax_delta_(logits, problem["targets"], nats, problem["gradient"])
    return nats, logits


def _staircase(problem: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """Outputs, log-sum-exp, and the gradients of queries, keys and values where there is `d_out`."""
    from dlcm.backends import staircase_tiles, staircase_triton

    tiles = staircase_tiles.Tiles(*problem["tiles"])
    staircase_tiles.fix({"forward": tiles, "query_grad": tiles, "key_grad": tiles}, problem["n_splits"])
    rest = (problem["segments"], problem["own_segment"], problem["log_length"])
    q, k, v = problem["qkv"]
    out, lse = staircase_triton.forward(q, k, v, *rest)
    if problem["d_out"] is None:
        return out, lse
    return out, lse, *staircase_triton.backward(problem["d_out"], q, k, v, out, lse, *rest)


class Interpreter:
    """A process that solves problems under Triton's interpreter."""

    def __init__(self) -> None:
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )

    def solve(self, problem: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        """What `solve` returns there, or the error that it raises there."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        _send(self.process.stdin, problem)
        answer = _receive(self.process.stdout)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def _mend_interpreter() -> None:
    """Make the interpreter's arithmetic that of a GPU, where it is not.

    It multiplies bfloat16 matrices by their bit patterns, cuts bits off where bfloat16 is rounded, and leaves products to a
    library whose rounding depends on where in a matrix a row stands.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def values(handle: Any) -> np.ndarray:
        if handle.dtype.scalar == tl.bfloat16:
            return (handle.data.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        return handle.data.astype(np.float64)

    def dot(_: Any, a: Any, b: Any, c: Any, *__: Any) -> Any:
        product = (values(a) @ values(b)).astype(c.data.dtype)
        return interpreter.TensorHandle(product + c.data, c.dtype.scalar)

    def convert_float(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, rounding)
        bits = np.ascontiguousarray(data).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)

    interpreter.InterpreterBuilder.create_dot = dot
    interpreter._convert_float = convert_float
    # It patches the language that a function's module sees anew for each call, which takes longer than the call.
    patch, patched = interpreter._patch_lang, set()

    def patch_once(function: Any) -> Any:
        if function.__module__ not in patched:
            patched.add(function.__module__)
            patch(function)
            # Bounds of loops come as arrays of one element, which NumPy 2.4 no longer takes for an integer by itself.
            tl.tensor.__index__ = lambda self: int(self.handle.data.item())
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = patch_once


def _send(stream: BinaryIO, item: Any) -> None:
    data = pickle.dumps(item)
    stream.write(struct.pack("<Q", len(data)) + data)
    stream.flush()


def _receive(stream: BinaryIO) -> Any:
    header = stream.read(8)
    if len(header) < 8:
        raise EOFError("the interpreter's process has ended; its error is printed above")
    return pickle.loads(stream.read(struct.unpack("<Q", header)[0]))


def _serve() -> None:
    answers, sys.stdout = sys.stdout.buffer, sys.stderr  # what a library prints must not end up between answers
    torch.set_num_threads(1)
    _mend_interpreter()
    while True:
        try:
            problem = _receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            _send(answers, solve(problem))
        except Exception as error:
            _send(answers, RuntimeError(f"{type(error).__name__}: {error}"))


if __name__ == "__main__":
    _serve()
