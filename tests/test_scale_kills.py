"""Thirty kills of drivers, workers and nodes lose nothing and repeat nothing."""

import pytest
import scale_trial

pytest.importorskip("ray")


@pytest.mark.slow
def test_a_run_that_is_killed_thirty_times_loses_nothing(tmp_path):
    done = scale_trial.trial(tmp_path, kills=30, images=1500)
    assert sum(done.values()) == 30 and all(done.values())
