"""Whole treatment steps are timed from one diagnosis to the next, on tiny networks here."""

import pytest

from benchmarks.studies import treat_speed


@pytest.mark.parametrize(("network", "method"), [("sd", "nft"), ("flux", "grpo")])
def test_a_step_is_timed_between_diagnoses(network, method):
    found = treat_speed.measured(treat_speed.NETWORKS[network], method, "cpu", small=True, steps=3)
    assert len(found["steps"]) == 2
    assert 0 < found["step"] == found["steps"][1] < found["whole"]
    assert found["skipped"] == 0
    text = treat_speed.markdown([found])
    assert f"{found['step']:.2f} s" in text
    assert text.count("\n") == 2
