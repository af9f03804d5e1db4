"""Processes that work on one run together, as torchrun would start them.

They are forked from a process that has imported torch already: the imports of an interpreter take longer than what a test
trains, and the tests start some seventy.
"""

import faulthandler
import functools
import multiprocessing
import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dlcm import sharing
from dlcm.config import RunConfig
from dlcm.distributed import joined
from dlcm.errors import UserError
from dlcm.train import StopTraining, train

ROOT = Path(__file__).parents[2]
# What a rank imports when it starts to share a model or to compile it.
IMPORTED = (__name__, "torch._dynamo", "torch.distributed.fsdp", "torch._functorch.aot_autograd")
_PATIENCE_S = 240
_CONTEXT = multiprocessing.get_context("forkserver")


def run_ranks(n_ranks: int, work: Callable[..., int | None], *arguments: Any) -> tuple[list[int | None], list[str]]:
    """Call `work(*arguments)` on each rank; their exit codes (what `work` returns) and what they printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    paths = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(ROOT)  # of the process that they are forked from, which is started here
    _CONTEXT.set_forkserver_preload(list(IMPORTED))
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(n_ranks):
            own = {
                "RANK": rank,
                "WORLD_SIZE": n_ranks,
                "LOCAL_RANK": rank,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            environment = {**os.environ, **{name: str(value) for name, value in own.items()}}
            said = Path(folder, str(rank))
            processes.append(_CONTEXT.Process(target=_rank, args=(environment, said, work, arguments)))
            processes[-1].start()
        if paths is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = paths
        for process in processes:
            process.join(timeout=_PATIENCE_S)
            process.kill()
            process.join()
        codes = [process.exitcode for process in processes]
        return codes, [Path(folder, str(rank)).read_text() for rank in range(n_ranks)]


def _rank(environment: dict[str, str], said: Path, work: Callable[..., int | None], arguments: Sequence[Any]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(said, os.O_WRONLY | os.O_CREAT, 0o600)
    for stream in (1, 2):
        os.dup2(file, stream)
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(
        _PATIENCE_S - 20, file=sys.__stderr__
    )  # says where a rank hangs, before it is killed
    status: int | None = 1
    try:
        status = work(*arguments)
    except Exception:
        traceback.print_exc()
    # No teardown of the interpreter: threads of gloo and torch, begun in a forked process, need not end for it.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


def start(
    n_ranks: int,
    config: RunConfig,
    run_dir: Path,
    *,
    stop_at: int | None = None,
    kill_at: int | None = None,
    mode: str | None = None,
    keep: Sequence[int] = (),
) -> tuple[list[int | None], list[str]]:
    """Train on several ranks. `mode` shares the model otherwise than the config says."""
    return run_ranks(n_ranks, _train, config, run_dir, stop_at, kill_at, mode, list(keep))


def _train(
    config: RunConfig, run_dir: Path, stop_at: int | None, kill_at: int | None, mode: str | None, keep: list[int]
) -> int:
    """What one rank does: train, and end with 3 where it was told to stop, with 2 on an error that a person can mend."""
    # The default backend would take most of the time of a test.
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    if mode is not None:
        sharing.choose_mode = lambda *_: mode

    def follow(progress: Any) -> None:
        if kill_at == progress.step:
            os._exit(9)
        if stop_at == progress.step:
            raise StopTraining("enough")

    with joined() as ranks:
        try:
            result = train(config, run_dir, on_step=follow, keep=keep)
        except StopTraining:
            return 3
        except UserError as error:
            print(f"{ranks.rank}: {error}")
            return 2
    print(f"{ranks.rank}: {result.status}")
    return 0
