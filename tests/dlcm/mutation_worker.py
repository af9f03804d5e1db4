"""Runs tests of copies of the project, each in a process of its own that begins with torch already imported.

A line of JSON on the standard input, {"folder": ..., "tests": [...]}, is answered by one with the exit status of pytest and
what it printed. Importing torch and its compiler takes longer than most of the tests, so it is done once and inherited by
fork; nothing of the project is imported before the fork, so that each child finds the package of its own folder.
"""

import json
import os
import sys
import threading
from importlib import import_module
from pathlib import Path
from subprocess import PIPE, Popen

ROOT = Path(__file__).parents[2]


class Worker:
    """The worker process, seen from a test."""

    def __init__(self) -> None:
        # A wide terminal keeps the reasons of failures in one line each.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "1000"}
        self._process = Popen([sys.executable, __file__], stdin=PIPE, stdout=PIPE, text=True, env=environment)

    def run_tests(self, folder: Path, tests: list[str]) -> tuple[int, str]:
        """Exit status of pytest in `folder`, and all that it printed; `tests` are names below `tests/dlcm/`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps({"folder": str(folder), "tests": tests}), file=self._process.stdin, flush=True)
        answer = json.loads(self._process.stdout.readline())
        return answer["status"], answer["printed"]

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


def run_in_child(folder: Path, tests: list[str]) -> tuple[int, str]:
    """Fork, run pytest there, and collect."""
    assert threading.active_count() == 1, "a fork keeps one thread"
    printed = folder / "printed.txt"
    child = os.fork()
    if child == 0:
        status = 3
        try:
            os.chdir(folder)
            sys.path.insert(0, str(folder))
            os.environ["PYTHONPATH"] = str(folder)  # for processes that a test starts
            handle = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            options = ["-q", "--tb=line", "-p", "no:cacheprovider", "-p", "no:xdist"]
            status = int(pytest.main([*options, *(f"tests/dlcm/{test}" for test in tests)]))
            sys.stdout.flush()
        finally:
            os._exit(status)
    _, waited = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(waited), printed.read_text()


def serve() -> None:
    """Answer until the standard input ends."""
    # Children find the package in their own folder, not beside this file.
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() not in (ROOT, Path(__file__).parent)]
    for line in sys.stdin:
        task = json.loads(line)
        status, printed = run_in_child(Path(task["folder"]), task["tests"])
        print(json.dumps({"status": status, "printed": printed}), flush=True)


if __name__ == "__main__":
    import pytest

    import_module("torch.nn.attention.flex_attention")  # and with it torch and the compiler
    serve()
