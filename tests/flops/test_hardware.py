"""Time, money and energy by hand; names of devices; efficiencies; calibrations as files and as measurements."""

import json
import math
from pathlib import Path

import pytest

from dlcm.config import BoundaryConfig, ModelConfig, RunConfig
from dlcm.errors import UserError
from dlcm.record import append_metrics, write_json
from flops import count, parameters
from flops.calibration import (
    Calibration,
    Point,
    calibration_path,
    cpu_calibration,
    format_calibration,
    gpu_calibration,
    load_calibration,
    save_calibration,
)
from flops.hardware import (
    ACCELERATORS,
    DEFAULT_MFU,
    Hardware,
    accelerator,
    calibrated_cpu,
    computed_flops,
    estimate,
    recognise,
    run_memory,
)
from flops.memory import memory
from flops.speed import format_speed, run_speed

DENSE = {"kind": "dense", "vocab_size": 100, "d_token": 8, "n_encoder_layers": 1, "d_head": 4, "n_heads_token": 2}
DENSE |= {"d_ff_token": 16}
DLCM = {
    "vocab_size": 100,
    "d_token": 16,
    "d_concept": 16,
    "n_encoder_layers": 1,
    "n_concept_layers": 1,
    "n_decoder_layers": 1,
    "d_head": 8,
    "n_heads_token": 2,
    "n_heads_concept": 2,
    "d_ff_token": 32,
    "d_ff_concept": 32,
}


def run(model, *, tokens=1024, batch=128, micro=None, precision="auto", validation=64, seq_len=64) -> RunConfig:
    return RunConfig(
        model=ModelConfig(**model),
        data={"seq_len": seq_len, "validation_tokens": validation},
        train={"tokens": tokens, "batch_tokens": batch, "micro_batch_tokens": micro, "precision": precision},
    )


def calibration(rates=((1e6, 1e9), (1e8, 4e9)), *, bf16=False, **more) -> Calibration:
    points = tuple(Point(x, int(x / 6), 512, bf16, 0.1, rate, 5) for x, rate in rates)
    fields = {"device": "Test CPU @ 3.0", "device_type": "cpu", "threads": 1, "peak_flops": 1e10}
    fields |= {"memory_bytes": 8 * 2**30, "points": points, "left_out": (), "versions": {}, "git_commit": None}
    return Calibration(**{**fields, "measured_at": "2026-01-02T03:04:05+00:00", **more})


def test_hours_price_and_energy_of_one_run_are_those_done_by_hand():
    # Dense, d = 8, one layer of 2 heads of width 4, hidden 16, V = 100, windows of L = 64 tokens. Forward FLOPs of a window:
    #   Q, K, V, O   2·64·8·4·(2·2 + 2·2) = 32,768       scores 4·2·4·(64²/2) = 65,536
    #   SwiGLU       6·64·8·16 = 49,152                  logits 2·64·8·100 = 102,400         together 249,856
    # Training 1,024 tokens is 16 windows at 3 x forward; validation of 64 tokens is one window forward: 49 forward passes.
    config = run(DENSE)
    hardware = Hardware(accelerator("H100"), mfu=0.5, price_per_hour=3.0, pue=1.2)
    found = estimate(config, count(config.model, 64), hardware)
    seconds = 49 * 249_856 / (0.5 * 989.4e12)
    assert found.hours == pytest.approx(seconds / 3600, rel=1e-12)
    assert found.price == pytest.approx(3.0 * seconds / 3600, rel=1e-12)
    assert found.energy_kwh == pytest.approx(0.7 * 1.2 * seconds / 3600, rel=1e-12)
    assert found.tokens_per_s == pytest.approx(0.5 * 989.4e12 / (3 * 249_856 / 64), rel=1e-12)
    assert (found.mfu, found.mfu_source) == (0.5, "given")
    assert found.fits


def test_devices_divide_hours_and_leave_device_hours():
    config = run(DENSE)
    flops = count(config.model, 64)
    one, four = (estimate(config, flops, Hardware(accelerator("A100"), n)) for n in (1, 4))
    assert four.hours == pytest.approx(one.hours / 4)
    assert four.device_hours == pytest.approx(one.device_hours)
    assert four.energy_kwh == pytest.approx(one.energy_kwh)
    assert four.memory.states == one.memory.states


def test_a_rank_has_its_share_of_the_batch_and_of_a_model_too_large_to_be_replicated():
    config = run(DENSE, batch=512)  # 8 windows of 64 tokens
    n = parameters(config.model).total
    whole = run_memory(config, "cuda", 3, 16 * n / 0.6)
    assert whole == memory(config.model, 3 * 64, bf16=True, gpu=True)
    shared = run_memory(config, "cuda", 3, 16 * n / 0.6 - 1)
    assert shared == memory(config.model, 3 * 64, bf16=True, gpu=True, n_sharing=3)
    assert run_memory(run(DENSE, batch=512, micro=64), "cuda", 3).activations == pytest.approx(
        memory(config.model, 64, bf16=True, gpu=True).activations
    )


def test_recomputation_computes_the_blocks_once_more():
    config = run(DLCM)
    again = config.model_copy(update={"train": config.train.model_copy(update={"activation_checkpointing": True})})
    flops = count(config.model, 64)
    blocks = sum(flops.components[name] for name in ("encoder", "backbone", "cross_attention", "decoder"))
    more = computed_flops(again, flops)[0] - computed_flops(config, flops)[0]
    assert more == pytest.approx(1024 / 64 * blocks)
    assert 1 < computed_flops(again, flops)[0] / computed_flops(config, flops)[0] < 4 / 3
    assert run_memory(again, "cuda") == memory(config.model, 128, bf16=True, gpu=True, checkpointing=True)


def test_fp32_on_a_gpu_is_judged_by_its_fp32_peak():
    config, slow = run(DENSE), run(DENSE, precision="fp32")
    flops, hardware = count(config.model, 64), Hardware(accelerator("H100"))
    ratio = estimate(slow, flops, hardware).hours / estimate(config, flops, hardware).hours
    assert ratio == pytest.approx(989.4 / 66.9)


def test_a_split_batch_computes_the_encoder_once_more_where_the_ratio_loss_needs_the_whole_batch():
    whole, split = run(DLCM), run(DLCM, micro=64)
    flops = count(whole.model, 64)
    encoder = flops.components["encoder"] + flops.components["boundary"]
    windows = 1024 / 64
    assert computed_flops(whole, flops) == pytest.approx((windows * flops.training, flops.forward + 2 * encoder))
    assert computed_flops(split, flops)[0] == pytest.approx(windows * (flops.training + encoder))
    fixed = run({**DLCM, "boundary": BoundaryConfig(detector="fixed")}, micro=64)
    flops = count(fixed.model, 64)
    assert computed_flops(fixed, flops) == pytest.approx((windows * flops.training, flops.forward))


def test_a_run_that_does_not_fit_says_how_much_would():
    large = {**DENSE, "vocab_size": 100_000, "d_token": 1024, "n_encoder_layers": 8, "n_heads_token": 16, "d_head": 64}
    config = run({**large, "d_ff_token": 2816}, tokens=2**20, batch=2**18, seq_len=1024)
    found = estimate(config, count(config.model, 1024), Hardware(accelerator("A100-40GB")))
    assert not found.fits
    assert found.largest_micro_batch is not None
    smaller = config.train.model_copy(update={"micro_batch_tokens": found.largest_micro_batch})
    again = config.model_copy(update={"train": smaller})
    assert estimate(again, count(config.model, 1024), Hardware(accelerator("A100-40GB"))).fits


@pytest.mark.parametrize("name", ACCELERATORS)
def test_every_accelerator_is_whole_and_names_its_source(name):
    device = ACCELERATORS[name]
    assert device.name == name
    # Dense bf16 is at least eight times fp32 on tensor cores, and all of them need 90 to 300 FLOPs a byte to be busy.
    assert 8 <= device.bf16_flops / device.fp32_flops <= 32
    assert device.bandwidth is not None
    assert 90 <= device.bf16_flops / device.bandwidth <= 400
    assert device.memory_bytes >= 40e9
    assert "nvidia" in device.source.lower()
    assert any(character.isdigit() for character in device.source)


def test_the_table_of_the_documentation_is_that_of_the_code():
    page = (Path(__file__).parents[2] / "docs" / "hardware.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| ")
    ]
    told = {row[0]: [float(cell) for cell in row[1:6]] for row in rows if row[0] in ACCELERATORS}
    scales = (("bf16_flops", 1e12), ("fp32_flops", 1e12), ("memory_bytes", 1e9), ("bandwidth", 1e12), ("power_w", 1))
    for name, device in ACCELERATORS.items():
        assert told[name] == pytest.approx([getattr(device, field) / scale for field, scale in scales])


@pytest.mark.parametrize(
    ("told", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200", "H200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA GB200", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("cpu", None),
    ],
)
def test_devices_are_recognised_by_their_drivers_name(told, name):
    known = recognise(told)
    assert (known.name if known else None) == name


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: accelerator("H10"), "did you mean 'H100'?"),
        (lambda: accelerator("cpu"), "flops calibrate"),
        (lambda: Hardware(accelerator("h100"), mfu=1.5), "mfu = 1.5 is not a share"),
        (lambda: Hardware(accelerator("H100"), n_devices=0), "gpus = 0 is not at least 1"),
        (lambda: Hardware(accelerator("H100"), price_per_hour=-1.0), "price_per_hour = -1 is not 0 or more"),
        (lambda: Hardware(accelerator("H100"), pue=0.5), "pue = 0.5"),
    ],
)
def test_what_no_device_has_is_refused_in_one_line(make, words):
    with pytest.raises(UserError, match=words.replace("?", r"\?").replace(".", r"\.")) as error:
        make()
    assert "\n" not in str(error.value)


def test_the_mfu_given_wins_over_the_calibration_and_that_over_the_default():
    measured = calibration(((1e6, 1e13), (1e8, 4e13)), bf16=True, device_type="cuda")
    device = accelerator("H100")
    assert Hardware(device).efficiency(1e7, bf16=True).mfu == DEFAULT_MFU
    assert Hardware(device, calibration=measured).efficiency(1e7, bf16=True).mfu == pytest.approx(2.5e13 / 989.4e12)
    assert Hardware(device, calibration=measured, mfu=0.2).efficiency(1e7, bf16=True).mfu == 0.2
    # Nothing was measured in fp32.
    assert Hardware(device, calibration=measured).efficiency(1e7, bf16=False).mfu == DEFAULT_MFU


def test_a_cpu_has_no_default():
    hardware = Hardware(calibrated_cpu(calibration()), calibration=calibration())
    assert hardware.efficiency(1e6, bf16=False).mfu == pytest.approx(0.1)
    with pytest.raises(UserError, match="not calibrated in bf16"):
        hardware.efficiency(1e6, bf16=True)


def test_rates_are_linear_in_the_logarithm_and_held_at_the_ends():
    measured = calibration(((1e6, 1e9), (1e8, 3e9), (1e9, 4e9)))
    for flops, rate, outside in (
        (1e6, 1e9, False),
        (1e7, 2e9, False),
        (1e8, 3e9, False),
        (math.sqrt(1e17), 3.5e9, False),
        (1e9, 4e9, False),
        (1e5, 1e9, True),
        (1e12, 4e9, True),
    ):
        assert measured.rate(flops, bf16=False) == (pytest.approx(rate), outside)
    assert measured.rate(1e7, bf16=True) is None


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DLCM_CACHE", str(tmp_path))
    return tmp_path


def test_a_calibration_comes_back_from_its_file(cache):
    measured = calibration(left_out=(7,))
    path = save_calibration(measured)
    assert path == calibration_path("Test CPU @ 3.0", "cpu", 1) == cache / "calibration" / "test-cpu-3-0-1t.json"
    found, note = load_calibration(path)
    assert found == measured
    assert note is not None
    assert "here is" in note


def test_the_newest_calibration_of_a_gpu_counts(cache):
    for device, day in (("NVIDIA H100 80GB HBM3", 2), ("NVIDIA H100 80GB HBM3 again", 5), ("NVIDIA H200", 9)):
        save_calibration(calibration(device=device, device_type="cuda", measured_at=f"2026-01-0{day}T00:00:00+00:00"))
    found, _ = gpu_calibration("H100")
    assert found is not None
    assert found.device == "NVIDIA H100 80GB HBM3 again"
    assert gpu_calibration("B200") == (None, None)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda text: text[:40], "not readable as JSON"),
        (lambda text: text.replace('"points"', '"punkte"'), "not a calibration"),
        (lambda text: text.replace("1000000000.0", "-1"), "figures are not positive"),
    ],
)
def test_a_damaged_calibration_is_refused_with_the_way_out(cache, damage, words):
    path = save_calibration(calibration())
    path.write_text(damage(path.read_text()))
    with pytest.raises(UserError, match=words) as error:
        load_calibration(path)
    assert str(path) in str(error.value)
    assert "dlcm flops calibrate" in str(error.value)


def test_a_calibration_of_another_version_is_ignored_with_a_note(cache):
    path = save_calibration(calibration())
    write_json(path, {**json.loads(path.read_text()), "schema": 0})
    found, note = load_calibration(path)
    assert found is None
    assert note is not None
    assert "was ignored" in note
    assert cpu_calibration(99) == (None, None)


@pytest.mark.slow
def test_a_measurement_is_consistent_with_itself_and_with_this_machine(cache):
    import torch

    from flops.calibrate import calibrate

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        delimited = {**DLCM, "boundary": BoundaryConfig(detector="delimiter_word")}
        measured = calibrate([run(DENSE), run(DLCM, micro=64), run(delimited), run(DENSE)], seconds=0.3)
    finally:
        torch.set_num_threads(before)
    assert measured.threads == 1
    assert len(measured.points) == 3
    costs = [point.flops_per_token for point in measured.points]
    assert costs == sorted(costs)
    for point in measured.points:
        assert point.n_steps >= 3
        assert 0 < point.flop_per_s < measured.peak_flops
    dense = next(p for p in measured.points if p.flops_per_token == count(ModelConfig(**DENSE), 64).training_per_token)
    assert dense.flop_per_s == pytest.approx(dense.flops_per_token * dense.micro_batch_tokens / dense.seconds_per_step)
    assert format_calibration(measured).count("\n") == 4
    save_calibration(measured)
    found, note = cpu_calibration(1)
    assert (found, note) == (measured, None)


def test_what_no_time_is_left_for_is_refused():
    from flops.calibrate import calibrate

    with pytest.raises(UserError, match="leaves no time"):
        calibrate([run(DENSE)], seconds=0)
    large = {**DENSE, "d_token": 4096, "n_encoder_layers": 64, "d_ff_token": 16_384, "vocab_size": 100_000}
    with pytest.raises(UserError, match="could be measured in 0.01 s"):
        calibrate([run({**large, "n_heads_token": 1024})], seconds=0.01)


def finished(folder, config, *, device="cpu", wall_s=2.0, **environment):
    write_json(folder / "run.json", {"schema": 1, "run_id": config.run_id, "config": config.model_dump(mode="json")})
    write_json(folder / "env.json", {"device": device, "threads": 1, **environment})
    result = {"tokens": config.tokens, "wall_s": wall_s, "device": device, "tokens_per_concept_train": 4.0}
    write_json(folder / "result.json", result)
    for step, speed in enumerate((1.0, 900.0, 1000.0, 1100.0)):
        append_metrics(folder / "metrics.jsonl", {"step": step, "tokens_per_s": speed})
    return folder


def test_the_mfu_of_a_finished_run_is_its_flops_over_the_peak(tmp_path):
    config = run(DLCM)
    speed = run_speed(finished(tmp_path, config, device="NVIDIA H100 80GB HBM3"))
    per_token = count(config.model, 64, 4.0).training_per_token
    assert speed is not None
    assert speed.tokens_per_s == 1000.0  # the median without the first, which warms up
    assert speed.tokens_per_s_overall == 1024 / 2.0
    assert speed.mfu == pytest.approx(1000 * per_token / 989.4e12)
    assert speed.mfu_overall == pytest.approx(512 * per_token / 989.4e12)
    assert "MFU" in format_speed(speed)
    assert "H100" in format_speed(speed)


def test_the_mfu_of_several_devices_is_over_the_peak_of_all(tmp_path):
    folder = finished(tmp_path, run(DLCM), device="NVIDIA H100 80GB HBM3")
    one = run_speed(folder)
    write_json(folder / "env.json", {"device": "NVIDIA H100 80GB HBM3", "threads": 1, "n_ranks": 4})
    four = run_speed(folder)
    assert one is not None
    assert four is not None
    assert four.mfu == pytest.approx(one.mfu / 4)
    assert "4 x NVIDIA H100" in format_speed(four)


def test_the_peak_of_a_processor_is_known_where_it_was_calibrated(tmp_path, cache):
    folder = finished(tmp_path / "run", run(DLCM), processor="Test CPU @ 3.0")
    speed = run_speed(folder)
    assert speed is not None
    assert speed.mfu is None
    assert "flops calibrate" in format_speed(speed)
    save_calibration(calibration())
    speed = run_speed(folder)
    assert speed is not None
    assert speed.peak_flops == 1e10
    assert speed.mfu == pytest.approx(speed.flop_per_s / 1e10)


def test_a_run_without_a_result_has_no_speed(tmp_path):
    assert run_speed(tmp_path) is None
