"""A fault campaign: a sweep on this machine, and a random fault every other second until hundreds have happened.

    python benchmarks/faults.py --faults 200 --seed 0

Faults: SIGKILL, SIGTERM and USR2 to workers, supervisors and whole jobs; processes frozen for seconds; torn files (metrics tail,
newest checkpoint, heartbeat, left-over drafts); times of files that jump by days, as the clock of a file server would; a full
disk (a tmpfs of its own, filled for seconds; needs root, else left out and said); two submitters at once. Whatever is not
finished is submitted again.

At the end every run must be finished, its weights and metrics equal to those of an undisturbed sweep bit by bit, no step in a
metrics log twice, and every row of results.parquet that of the undisturbed sweep. All the while no run may have two processes
that train it. The seed of a failure repeats its sequence of faults; what they hit depends on timing.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common import environment, write_result
from dlcm.errors import UserError
from dlcm.record import read_metrics
from sweeps import Sweep, collect, plan
from sweeps.control import cancel
from sweeps.launch import launch
from sweeps.store import load_sweep
from sweeps.watch import take_snapshot

_CLOCK_COLUMNS = ["wall_s", "commit", "status"]
_MODEL = {
    "d_token": 32, "d_concept": 32, "n_encoder_layers": 1, "n_concept_layers": 1, "n_decoder_layers": 1, "d_head": 16,
    "n_heads_token": 2, "n_heads_concept": 2, "d_ff_token": 64, "d_ff_concept": 64,
}  # fmt: skip


def small_sweep(folder: Path, n_runs: int, steps: int) -> Any:
    """Runs of some seconds that differ in seed."""
    text = folder / "text.txt"
    draw = random.Random(0)
    text.write_text(
        "\n".join(" ".join(draw.choices(["alpha", "beta", "of", "the", "x = 1"], k=12)) for _ in range(3000))
    )
    train = {"batch_tokens": 128, "tokens": 128 * steps, "checkpoint_every": 10, "log_every": 1}
    data = {"corpus": str(text), "tokenizer": "bytes", "seq_len": 64, "validation_tokens": 512}
    return plan(
        Sweep.from_dict(
            {
                "name": "campaign",
                "base": {"data": data, "train": train, "model": _MODEL},
                "axes": {"grid": {"seed": list(range(n_runs))}},
                "minimum": {"steps": 0},
                "cluster": {"concurrency": 2, "threads": 1},
            }
        )
    )


class Campaign:
    """The faults, each by its name, and what was seen."""

    def __init__(self, sweep_plan: Any, folder: Path, seed: int, disk: bool) -> None:
        self.plan, self.folder, self.draw = sweep_plan, folder, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.twice: list[str] = []
        self.threads: list[threading.Thread] = []
        self.faults: dict[str, Callable[[], bool]] = {
            "SIGKILL worker": lambda: self._signal(self._workers(), signal.SIGKILL),
            "SIGTERM worker": lambda: self._signal(self._workers(), signal.SIGTERM),
            "USR2 supervisor": lambda: self._signal(self._supervisors(), signal.SIGUSR2),
            "SIGTERM supervisor": lambda: self._signal(self._supervisors(), signal.SIGTERM),
            "SIGKILL supervisor": lambda: self._signal(self._supervisors(), signal.SIGKILL),
            "freeze worker": self._freeze,
            "torn metrics": self._tear_metrics,
            "torn checkpoint": self._tear_checkpoint,
            "torn heartbeat": self._tear_heartbeat,
            "left-over draft": self._draft,
            "clock jump": self._jump,
            "two submitters": self._submit_twice,
            **({"full disk": self._fill} if disk else {}),
        }

    def one(self) -> None:
        """Let one fault happen; another one where it finds nothing to hit."""
        for name in self.draw.sample(list(self.faults), len(self.faults)):
            with contextlib.suppress(OSError):  # the disk may be full
                if self.faults[name]():
                    self.counts[name] += 1
                    return

    def submit(self) -> None:
        """Send out what is not finished; a submit that meets another, or a full disk, is refused and repeated later."""
        with contextlib.suppress(UserError, OSError):
            launch(self.plan, self.folder, "local")

    def watch(self) -> None:
        """Note runs that two processes have opened for training at the same moment."""
        holders: Counter[str] = Counter()
        for process in self._workers():
            with contextlib.suppress(psutil.Error):
                held = {f.path for f in process.open_files() if f.path.endswith("/.lock")}
                holders.update(held)
        doubled = [path for path, n in holders.items() if n > 1]
        if doubled:  # a contender holds the file open for a moment; a second trainer for seconds
            time.sleep(0.5)
            again = Counter(f.path for p in self._workers() for f in _open_files(p) if f.path.endswith("/.lock"))
            self.twice += [path for path in doubled if again[path] > 1]

    def _processes(self, words: str) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter(["cmdline"]):
            line = " ".join(process.info["cmdline"] or ())
            if words in line and str(self.folder) in line:
                found.append(process)
        return sorted(found, key=lambda p: p.pid)

    def _workers(self) -> list[psutil.Process]:
        return self._processes("sweeps.worker")

    def _supervisors(self) -> list[psutil.Process]:
        return self._processes("submitit.core._submit")

    def _signal(self, processes: list[psutil.Process], number: signal.Signals) -> bool:
        if not processes:
            return False
        with contextlib.suppress(psutil.Error):
            self.draw.choice(processes).send_signal(number)
        return True

    def _freeze(self) -> bool:
        workers = self._workers()
        if not workers:
            return False
        process = self.draw.choice(workers)
        with contextlib.suppress(psutil.Error):
            process.suspend()
        self._later(self.draw.uniform(1, 5), lambda: process.resume())
        return True

    def _begun(self, name: str, over: bool = False) -> Path | None:
        runs = [run.path for run in load_sweep(self.folder).runs]
        found = [path for path in runs if (path / name).exists() and (over or not (path / "result.json").exists())]
        return self.draw.choice(found) if found else None

    def _tear_metrics(self) -> bool:
        run = self._idle_run("metrics.jsonl")
        if run is None:
            return False
        with (run / "metrics.jsonl").open("ab") as file:
            file.write(b'{"step": 99')
        return True

    def _tear_checkpoint(self) -> bool:
        run = self._idle_run("checkpoints")
        newest = max((run / "checkpoints").glob("*.pt"), default=None) if run else None
        if newest is None or run is None or len(list((run / "checkpoints").glob("*.pt"))) < 2:
            return False
        os.truncate(newest, newest.stat().st_size // 2)
        return True

    def _idle_run(self, name: str) -> Path | None:
        """An unfinished run that nobody works on: what a crash of the machine leaves torn, nobody writes at the moment."""
        run = self._begun(name)
        busy = {Path(f.path).parent for p in self._workers() for f in _open_files(p) if f.path.endswith("/.claim")}
        return None if run is None or run in busy else run

    def _tear_heartbeat(self) -> bool:
        run = self._begun("status.json")
        if run is None:
            return False
        (run / "status.json").write_bytes(b'{"schema": 1, "sta')
        return True

    def _draft(self) -> bool:
        run = self._begun("status.json")
        if run is None:
            return False
        (run / f".status.json.{self.draw.randrange(10**6)}.tmp").write_bytes(b"{")
        return True

    def _jump(self) -> bool:
        run = self._begun("status.json")
        if run is None:
            return False
        then = time.time() + self.draw.choice([-1, 1]) * 86400 * self.draw.uniform(0.1, 30)
        for path in (run / "status.json", *(run / ".claim.d").glob("*")):
            with contextlib.suppress(FileNotFoundError):
                os.utime(path, (then, then))
        return True

    def _submit_twice(self) -> bool:
        command = [sys.executable, "-m", "benchmarks.faults", "--submit-only", str(self.folder), "--seed", "0"]
        for _ in range(2):
            subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return True

    def _fill(self) -> bool:
        ballast = self.folder.parent / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb") as file:
            while True:
                file.write(b"0" * (1 << 20))
        self._later(self.draw.uniform(1, 4), lambda: ballast.unlink(missing_ok=True))
        return True

    def _later(self, seconds: float, action: Callable[[], Any]) -> None:
        def act() -> None:
            time.sleep(seconds)
            with contextlib.suppress(psutil.Error, OSError):
                action()

        thread = threading.Thread(target=act, daemon=True)
        thread.start()
        self.threads.append(thread)


def _open_files(process: psutil.Process) -> list[Any]:
    with contextlib.suppress(psutil.Error):
        return list(process.open_files())
    return []


def run_campaign(campaign: Campaign, n_faults: int, minutes: float) -> bool:
    """Faults until there were enough and every run is finished, then quiet. Returns whether every run ended."""
    deadline = time.monotonic() + 60 * minutes
    campaign.submit()
    while time.monotonic() < deadline:
        if sum(campaign.counts.values()) < n_faults:
            campaign.one()
        else:
            for thread in campaign.threads:
                thread.join()
        campaign.watch()
        with contextlib.suppress(UserError, OSError):
            snapshot = take_snapshot(campaign.folder)
            if snapshot.is_over and not snapshot.incomplete and sum(campaign.counts.values()) >= n_faults:
                return True
            if snapshot.is_over or campaign.draw.random() < 0.05:
                campaign.submit()
        if sum(campaign.counts.values()) % 20 == 0:
            print(f"{sum(campaign.counts.values())} faults", file=sys.stderr, flush=True)
        time.sleep(campaign.draw.uniform(0.5, 3.0))
    return False


def compare(folder: Path, reference: Path) -> tuple[list[str], list[str]]:
    """Runs that differ from the undisturbed ones, and rows of the table that do."""
    import torch

    wrong = []
    for run in load_sweep(folder).runs:
        rows, other = (read_metrics(path / run.run_id / "metrics.jsonl") for path in (folder, reference))
        same = [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in rows] == [
            {k: v for k, v in row.items() if k != "tokens_per_s"} for row in other
        ]
        newest, then = (
            torch.load(max((path / run.run_id / "checkpoints").glob("*.pt")), weights_only=True)["model"]
            for path in (folder, reference)
        )
        if not same or not all(torch.equal(newest[name], then[name]) for name in then):
            wrong.append(run.run_id)
    tables = [
        collect(path).drop(columns=["sweep", *_CLOCK_COLUMNS]).set_index("run_id").sort_index()
        for path in (folder, reference)
    ]
    differing = [str(i) for i in tables[1].index if not tables[0].loc[[i]].equals(tables[1].loc[[i]])]
    return wrong, differing


@contextlib.contextmanager
def own_disk(folder: Path) -> Iterator[bool]:
    """A small file system of its own on `folder`, where that can be had."""
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=192m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    try:
        yield done.returncode == 0
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)


def main() -> None:
    """Run the campaign, print, record; exit 1 where a run was lost, trained twice or is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--runs", type=int, default=12)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=25.0, help="give up after")
    parser.add_argument("--submit-only", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.submit_only:
        from sweeps.launch import resubmit

        with contextlib.suppress(UserError, OSError):
            resubmit(args.submit_only, "local")
        return
    base = Path(tempfile.mkdtemp(prefix="faults-"))
    os.environ["DLCM_CACHE"] = str(base / "cache")
    (base / "disk").mkdir()
    with own_disk(base / "disk") as disk:
        sweep_plan = small_sweep(base, args.runs, args.steps)
        launch(sweep_plan, base / "reference", "debug", threads=1)
        campaign = Campaign(sweep_plan, base / "disk" / "campaign", args.seed, disk)
        began = time.monotonic()
        ended = run_campaign(campaign, args.faults, args.minutes)
        snapshot = take_snapshot(campaign.folder)
        lost = [f"{s.run_id}: {s.status} ({s.reason})" for s in snapshot.incomplete]
        wrong, rows = ([], []) if not ended else compare(campaign.folder, base / "reference")
        cancel(campaign.folder) if not ended else None
        result = {
            "environment": environment("cpu"),
            "seed": args.seed,
            "faults": dict(campaign.counts),
            "n_faults": sum(campaign.counts.values()),
            "n_runs": args.runs,
            "seconds": round(time.monotonic() - began),
            "n_submissions": max((job.submission for job in snapshot.jobs.values()), default=0),
            "lost": lost,
            "trained_twice": campaign.twice,
            "wrong_runs": wrong,
            "wrong_rows": rows,
        }
    for name, count in sorted(campaign.counts.items()):
        print(f"{count:5}  {name}")
    print(
        f"{result['n_faults']} faults in {result['seconds']} s, {result['n_submissions']} submissions: {len(lost)} lost, "
        f"{len(campaign.twice)} trained twice, {len(wrong)} wrong runs, {len(rows)} wrong rows"
        + ("" if disk else "; no full disk: mounting a tmpfs needs root")
    )
    if args.faults >= 200:
        write_result("faults", result)
    faulty = not ended or bool(lost or campaign.twice or wrong or rows)
    if not faulty:
        shutil.rmtree(base, ignore_errors=True)
    sys.exit(f"kept for a look: {base}; repeat with --seed {args.seed}" if faulty else 0)


if __name__ == "__main__":
    main()
