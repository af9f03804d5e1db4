"""Do the tests notice? Each fault is put into a copy of the package, alone, and named tests must fail there, by assertion.

The copy holds `dlcm/` and the tests; a fault is one replacement of text in one file. That the same tests pass on the copy
without a fault is shown once, for all of them.
"""

import importlib.util
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.dlcm.mutation_worker import ROOT, Worker

TRUNCATION = "test_model.py::test_truncating_the_suffix_leaves_earlier_logits_unchanged[learned-mean-False]"
DECODING = "test_cache.py::test_decoding_in_chunks_equals_the_full_forward_pass[learned-3]"
PACKED = "test_model.py::test_packed_equals_per_document_equals_padded[learned-mean]"
ISOLATED = "test_model.py::test_nothing_flows_between_packed_documents"


def against_loop(backend: str, own_segment: bool = False) -> str:
    case = f"lengths2-{own_segment}-True-{backend}"
    return f"test_attention.py::test_cross_attention_equals_a_loop_over_replicated_concepts[{case}]"


@dataclass(frozen=True)
class Fault:
    """Text of a file of `dlcm/`, what takes its place, and the tests that must fail then."""

    file: str
    found: str
    replaced: str
    tests: tuple[str, ...]


FAULTS = {
    "a token sees the concept of its own segment": Fault(
        "concepts.py",
        "return lo_T, self.segment_T + int(own_segment)",
        "return lo_T, self.segment_T + 1",
        (TRUNCATION, against_loop("reference")),
    ),
    "a token sees the segments that end at it": Fault(
        "concepts.py",
        "return lo_T, self.segment_T + int(own_segment)",
        "next_T = torch.cat([self.segment_T[1:], self.segment_T[-1:]])\n"
        "        return lo_T, self.segment_T + (next_T != self.segment_T).long()",
        (TRUNCATION, against_loop("reference")),
    ),
    "the smoother is centred": Fault(
        "model.py",
        "return [shift(z_KC, position_K, n) for n in range(n_taps)]",
        "ahead_KC = torch.cat([z_KC[1:], torch.zeros_like(z_KC[:1])])\n"
        "            return [ahead_KC, *(shift(z_KC, position_K, n) for n in range(n_taps - 1))]",
        (TRUNCATION,),
    ),
    "the smoother runs on from one document to the next": Fault(
        "model.py",
        "return [shift(z_KC, position_K, n) for n in range(n_taps)]",
        "index_K = torch.arange(z_KC.shape[0], device=z_KC.device)\n"
        "            return [shift(z_KC, index_K, n) for n in range(n_taps)]",
        (ISOLATED, PACKED),
    ),
    "log-length bias: not in reference": Fault(
        "backends/reference.py",
        "    if log_length:\n        # Where the own segment",
        "    if False:\n        # Where the own segment",
        (against_loop("reference"), against_loop("reference", own_segment=True)),
    ),
    "log-length bias: not in sdpa": Fault(
        "backends/sdpa.py",
        "    if log_length:\n        # The own segment",
        "    if False:\n        # The own segment",
        (against_loop("sdpa"), against_loop("sdpa", own_segment=True)),
    ),
    "log-length bias: not in replicated": Fault(
        "backends/replicated.py",
        "        if log_length:\n            bias_T = ",
        "        if False:\n            bias_T = ",
        (against_loop("replicated"),),
    ),
    "log-length bias: not in flex": Fault(
        "backends/flex.py",
        "bias = score_mod(segments, own_segment, dtype) if log_length else None",
        "bias = None",
        (against_loop("flex"), against_loop("flex", own_segment=True)),
    ),
    "log-length bias: not in staircase on a CPU": Fault(
        "backends/staircase_cpu.py",
        "log_lengths_K = segments.lengths_K.clamp(min=1).to(dtype).log() if log_length else None",
        "log_lengths_K = None",
        (against_loop("staircase"),),
    ),
    "log-length bias: not in the staircase kernels": Fault(
        "backends/staircase_triton.py",
        "bias_K = segments.lengths_K.clamp(min=1).float().log2() if log_length else None",
        "bias_K = None",
        ("test_staircase_triton.py::test_kernels_equal_the_reference_on_packed_documents_with_padding[False-True]",),
    ),
    "log-length bias: not in decoding": Fault(
        "cache.py",
        'if cache.config.concept_bias == "log_length":',
        'if cache.config.concept_bias == "never":',
        (DECODING,),
    ),
    "decoding sees the open segment": Fault(
        "cache.py",
        "n_visible_T = self.ordinal_T + int(own)",
        "n_visible_T = self.ordinal_T + 1",
        (DECODING,),
    ),
    "positions of concepts start anew with each chunk": Fault(
        "model.py",
        "self.rotary(cut.concepts.position_N)",
        "self.rotary(cut.concepts.column_N)",
        (DECODING,),
    ),
    "statistics of the ratio loss are those of a rank": Fault(
        "boundary.py",
        "    if n_ranks > 1:\n        dist.all_reduce(sums_3, group=group)\n",
        "",
        (
            "test_distributed.py::test_the_ranks_see_the_statistics_of_the_whole_batch",
            "test_distributed.py::test_gradients_averaged_over_two_unequal_ranks_are_those_of_one_process",
        ),
    ),
    "F of the ratio loss is that of a micro-batch": Fault(
        "trainer.py",
        "if most_micro_batches(self.executed, self.ranks.world_size) == 1 or not self._has_ratio_loss:",
        "if True:",
        ("test_train.py::test_micro_batches_give_the_metrics_of_the_whole_batch",),
    ),
}


def copy_of_the_project(folder: Path) -> Path:
    """The package, the one that registers a meter with it, the tests and the settings of pytest."""
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("dlcm", "flops", "tests/dlcm"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("tests/__init__.py", "tests/conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def failures(printed: str) -> dict[str, str]:
    """The reason of each failed test in one line."""
    return dict(re.findall(r"^FAILED tests/dlcm/(\S+)(?: - (.*))?$", printed, re.MULTILINE))


@pytest.fixture(scope="module")
def worker():
    """Runs tests of a copy in a process of their own."""
    worker = Worker()
    yield worker
    worker.close()


def usable(fault: Fault) -> bool:
    return fault.file != "backends/staircase_triton.py" or importlib.util.find_spec("triton") is not None


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_makes_the_tests_fail_that_are_there_to_find_it(name, tmp_path, worker):
    fault = FAULTS[name]
    if not usable(fault):
        pytest.skip("the kernels need Triton")
    path = copy_of_the_project(tmp_path) / "dlcm" / fault.file
    source = path.read_text()
    assert source.count(fault.found) == 1, f"{fault.file} has changed: bring the fault up to date"
    path.write_text(source.replace(fault.found, fault.replaced))
    status, printed = worker.run_tests(tmp_path, list(fault.tests))
    failed = failures(printed)
    assert status == 1, printed
    assert set(failed) == set(fault.tests), printed
    # A fault that raises would be found by any test; these are found because a statement is no longer true.
    assert all(reason.startswith(("AssertionError", "assert ")) for reason in failed.values()), printed


@pytest.mark.slow
def test_without_a_fault_all_these_tests_pass_in_the_copy(tmp_path, worker):
    tests = sorted({test for fault in FAULTS.values() if usable(fault) for test in fault.tests})
    status, printed = worker.run_tests(copy_of_the_project(tmp_path), tests)
    assert status == 0, printed
    assert f"{len(tests)} passed" in printed
