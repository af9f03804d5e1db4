"""The code that a sweep was submitted with: frozen beside it, so that a changed checkout does not change running experiments.

```text
<sweep>/code/<hash>/dlcm, flops, sweeps, analysis     the files, as they were in the working tree
                   /snapshot.json                     commit, hash of the difference, versions, number of files
                   /difference.diff                   what differed from the commit
```
"""

import hashlib
import importlib
import json
import platform
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from dlcm.errors import UserError
from dlcm.provenance import source_commit
from dlcm.record import read_json

PACKAGES = ("dlcm", "flops", "sweeps", "analysis")
# Packages whose version decides what a run computes.
_PINNED = ("torch", "numpy", "tokenizers")


def packages_root() -> Path:
    """The one directory that holds all four packages.

    Raises:
        UserError: they come from different places: another distribution, or a half-made checkout, is in the way.
    """
    roots = {}
    for name in PACKAGES:
        file = importlib.import_module(name).__file__
        roots[name] = Path(file).resolve().parent.parent if file else None
    if len(set(roots.values())) != 1 or (root := roots["sweeps"]) is None:
        found = ", ".join(f"{name} from {place}" for name, place in roots.items())
        raise UserError(f"the packages do not come from one place ({found}); use an environment of this project alone")
    return root


def freeze_code(sweep_dir: Path) -> Path:
    """Copy the packages into the sweep's directory, once for each state of the code.

    Args:
        sweep_dir: directory of the sweep.

    Returns:
        The folder that holds the packages; it goes first on the path of the workers.
    """
    root = packages_root()
    if (root / "snapshot.json").exists():  # submitted from a snapshot: the code is frozen already
        return root
    files = {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(_files(root))}
    digest = hashlib.sha256()
    for name, content in files.items():
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    commit, difference = source_commit()
    versions = _versions()
    digest.update(json.dumps([commit, versions], sort_keys=True).encode())
    place = sweep_dir / "code" / digest.hexdigest()[:12]
    if place.exists():
        return place
    draft = place.with_name(f".{place.name}-{uuid.uuid4().hex[:8]}")
    for name, content in files.items():
        (draft / name).parent.mkdir(parents=True, exist_ok=True)
        (draft / name).write_bytes(content)
    facts = {"git_commit": commit, "git_dirty_hash": difference, "n_files": len(files), "versions": versions}
    (draft / "snapshot.json").write_text(json.dumps(facts, indent=2) + "\n")
    (draft / "difference.diff").write_text(_difference(root) if difference else "")
    try:
        draft.rename(place)
    except OSError:  # another submit was faster
        shutil.rmtree(draft, ignore_errors=True)
        if not place.exists():
            raise
    return place


def check_code(root: Path) -> None:
    """Refuse to work with other code, or another environment, than the sweep was submitted with.

    Args:
        root: the folder of the submitter's packages, frozen or not.

    Raises:
        UserError: the packages come from elsewhere, or versions differ.
    """
    here = packages_root()
    if here != root.resolve():
        raise UserError(
            f"this worker imports the packages from {here}, the sweep was submitted with {root}; "
            "unset PYTHONPATH in cluster.setup, and submit again"
        )
    path = root / "snapshot.json"
    if not path.exists():
        return
    then, now = read_json(path)["versions"], _versions()
    differing = [f"{name} {now.get(name)} instead of {then[name]}" for name in then if now.get(name) != then[name]]
    if differing:
        raise UserError(
            f"this worker has {', '.join(differing)}: not the environment that the sweep was submitted with; "
            "restore it, or submit again from this one"
        )


def _files(root: Path) -> Iterator[Path]:
    """Files of the packages: what git tracks or would track; all but caches where there is no git."""
    listed = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *PACKAGES)
    if listed:
        yield from (path for name in listed.split("\0") if name and (path := root / name).is_file())
        return
    for package in PACKAGES:
        yield from (path for path in (root / package).rglob("*") if path.is_file() and "__pycache__" not in path.parts)


def _difference(root: Path) -> str:
    return _git(root, "diff", "HEAD", "--", *PACKAGES) or ""


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PINNED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _git(root: Path, *arguments: str) -> str | None:
    try:
        run = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.decode(errors="replace") if run.returncode == 0 else None
