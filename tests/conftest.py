import os
import sys
from pathlib import Path

import hypothesis
import pytest

# Tests hold what runs on a CPU to the bit, and are the same everywhere: they see a GPU where they are asked for it (`make gpu`).
if os.environ.get("TEST_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

from dlcm.cli import main

# The same examples in every run, and none is judged by how long a busy machine took over it.
hypothesis.settings.register_profile(
    "tests", derandomize=True, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("tests")


def pytest_collection_modifyitems(items):
    """Of a test that is `many`, the first case is among the fast tests and the others are slow."""
    seen = set()
    for item in items:
        if item.get_closest_marker("many") and (name := item.nodeid.partition("[")[0]) in seen:
            item.add_marker(pytest.mark.slow)
        elif item.get_closest_marker("many"):
            seen.add(name)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Tests neither read nor leave tokenized corpora in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DLCM_CACHE", str(tmp_path_factory.mktemp("dlcm-cache")))
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of data that is not part of the project; tests that read it are skipped where it is absent."""
    default = Path(__file__).parents[2] / "shared" / "data"
    path = Path(os.environ.get("DLCM_SHARED_DATA", default))
    if not path.is_dir():
        pytest.skip(f"no shared data in {path}; set DLCM_SHARED_DATA")
    return path


@pytest.fixture
def dlcm(monkeypatch, capsys):
    """Run the command line in this process; returns (status, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dlcm", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return run
