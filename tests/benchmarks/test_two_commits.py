"""Two commits are compared in turns, by the ratio of each round."""

import pytest


def test_a_drift_of_the_machine_changes_no_ratio():
    from two_commits import compare

    drift = [1.0, 2.0, 4.0, 8.0, 16.0]
    a = [{"step": [9.0 * d, 3.0 * d, 1.0 * d], "dense": [2.0 * d]} for d in drift]
    b = [{"step": [2.4 * d], "dense": [1.9 * d, 2.0 * d, 7.0 * d]} for d in drift]
    found = compare(a, b)
    assert (found["a"], found["b"]) == (12.0, pytest.approx(9.6))
    assert [found[f"ratio{q}"] for q in ("_q25", "", "_q75")] == pytest.approx([0.8] * 3)
    assert found["beyond_a"] == pytest.approx(0.5)
    assert found["beyond_b"] == pytest.approx(0.2)


def test_a_stream_is_compared_without_a_dense_network():
    from two_commits import compare

    found = compare([{"step": [2.0]}, {"step": [4.0]}], [{"step": [1.0]}, {"step": [3.0]}])
    assert found == {"a": 3.0, "b": 2.0, "ratio_q25": 0.5625, "ratio": 0.625, "ratio_q75": 0.6875}


def test_the_two_commits_take_turns_in_going_first():
    from two_commits import in_turns

    assert in_turns(4) == [(0, 1), (1, 0), (0, 1), (1, 0)]
