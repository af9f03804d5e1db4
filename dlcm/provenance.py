"""Which code, which packages, which machine: what a result needs beside its config to be traced."""

import hashlib
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("dlcm-scaling", "torch", "numpy", "tokenizers")


def source_commit() -> tuple[str | None, str | None]:
    """Commit of the running code and a hash of what differs from it; (None, None) outside a checkout, no hash when clean."""
    folder = Path(__file__).resolve().parent.parent
    frozen = folder / "snapshot.json"  # code that was frozen with a sweep knows where it came from
    if frozen.exists():
        facts = json.loads(frozen.read_text())
        return facts["git_commit"], facts["git_dirty_hash"]
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None, None
    difference = _git(folder, "diff", "HEAD") or ""
    return commit, hashlib.sha256(difference.encode()).hexdigest()[:16] if difference else None


def commit_in_words() -> str:
    """The commit of the running code, with `+` and a hash where the checkout differs from it."""
    commit, difference = source_commit()
    return f"{commit}+{difference}" if commit and difference else commit or "not a checkout"


def processor_name() -> str:
    """The model name of the processor, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def describe_environment(device: str, threads: int) -> dict[str, Any]:
    """The content of `env.json`: code version, package versions, host, device, processor, SLURM ids."""
    commit, dirty = source_commit()
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "git_commit": commit,
        "git_dirty_hash": dirty,
        "versions": versions,
        "host": platform.node(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": device,
        "processor": processor_name(),
        "threads": threads,
        "slurm": {
            k: v for k, v in sorted(os.environ.items()) if k.startswith("SLURM_") and k.endswith(("_ID", "_COUNT"))
        },
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        run = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() if run.returncode == 0 else None
