"""The benchmark of long sequences and large networks runs, in a tiny setting."""

import pytest


def test_scaling_sweeps_time_steps_batch_and_width(tmp_path, run_smoke):
    rows, printed = run_smoke("scaling", tmp_path)
    for sweep in ("time steps", "batch", "width"):
        for variant in (
            "SNN-IIR cpu",
            "SNN-IIR cpu, chunks",
            "SNN-IIR cpu, chunks of loss",
            "dense floor",
        ):
            points = [r for r in rows if (r["sweep"], r["variant"]) == (sweep, variant)]
            assert len({r["size"] for r in points}) == len(points) == 2
            assert len({r["slope_training_ms"] for r in points}) == 1
            assert f"{variant} against {sweep}" in printed


def test_slope_is_the_exponent_of_a_power_law():
    from scaling import slope

    assert slope([1, 10, 100], [3.0, 300.0, 30000.0]) == pytest.approx(2.0)
