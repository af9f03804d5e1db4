"""A submitted sweep runs the code that it was submitted with."""

import json
import os
import subprocess
import sys

import pytest

from dlcm.errors import UserError
from sweeps.code import PACKAGES, check_code, freeze_code, packages_root


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    return freeze_code(tmp_path_factory.mktemp("a sweep's folder, größer"))


def run(code, root, cwd):
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONSAFEPATH": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=cwd, capture_output=True, text=True, check=False
    )


def test_every_file_of_the_packages_is_frozen_with_commit_and_versions(frozen):
    facts = json.loads((frozen / "snapshot.json").read_text())
    for name in PACKAGES:
        original = {p.relative_to(packages_root()) for p in (packages_root() / name).rglob("*.py")}
        assert original == {p.relative_to(frozen) for p in (frozen / name).rglob("*.py")}
    assert (frozen / "sweeps" / "recipes" / "demo.yaml").exists()
    assert facts["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert "torch" in facts["versions"]
    assert facts["n_files"] > 50
    assert (frozen / "difference.diff").exists()


def test_the_same_code_is_frozen_once(frozen):
    assert freeze_code(frozen.parent.parent) == frozen
    assert [p for p in frozen.parent.iterdir() if p.is_dir()] == [frozen]


def test_a_process_with_the_snapshot_on_its_path_imports_it_even_inside_the_checkout(frozen):
    code = (
        "import dlcm, flops, sweeps, analysis; print(*{m.__file__ for m in (dlcm, flops, sweeps, analysis)}, sep='\\n')"
    )
    done = run(code, frozen, packages_root())
    assert done.returncode == 0, done.stderr
    assert all(line.startswith(str(frozen)) for line in done.stdout.splitlines())


def test_the_snapshot_knows_its_commit(frozen):
    code = "from dlcm.provenance import source_commit; print(source_commit())"
    facts = json.loads((frozen / "snapshot.json").read_text())
    done = run(code, frozen, frozen)
    assert done.stdout.strip() == str((facts["git_commit"], facts["git_dirty_hash"]))


def test_other_code_than_the_submitters_is_refused(frozen):
    with pytest.raises(UserError, match="imports the packages from"):
        check_code(frozen)
    check_code(packages_root())


def test_another_environment_than_the_submitters_is_refused_by_name(frozen, tmp_path):
    import shutil

    other = tmp_path / "code"
    shutil.copytree(frozen, other)
    facts = json.loads((other / "snapshot.json").read_text())
    facts["versions"]["torch"] = "1.0"
    (other / "snapshot.json").write_text(json.dumps(facts))
    code = f"from pathlib import Path; from sweeps.code import check_code; check_code(Path({str(other)!r}))"
    done = run(code, other, tmp_path)
    assert done.returncode != 0
    assert "instead of 1.0" in done.stderr


def test_submitting_from_a_snapshot_freezes_nothing_new(frozen, tmp_path):
    code = f"from pathlib import Path; from sweeps.code import freeze_code; print(freeze_code(Path({str(tmp_path)!r})))"
    done = run(code, frozen, tmp_path)
    assert done.stdout.strip() == str(frozen), done.stderr
    assert not (tmp_path / "code").exists()
