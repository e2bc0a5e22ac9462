"""What a command sets for its own computing is put back for the process's other work."""

import numpy as np
import pytest
import torch

from diffdoctor.training.cpu_settings import cpu_settings, denormals_are_flushed


def test_threads_and_denormals_are_put_back():
    before = torch.get_num_threads()
    assert not denormals_are_flushed()
    with cpu_settings(threads=before + 1):
        assert torch.get_num_threads() == before + 1
        assert denormals_are_flushed()
        assert np.float32(1e-40) * np.ones(1, np.float32) == 0
        with cpu_settings():
            assert torch.get_num_threads() == before + 1
        assert denormals_are_flushed(), "an inner use must leave what the outer one set"
    assert torch.get_num_threads() == before
    assert not denormals_are_flushed()
    assert np.float32(1e-40) * np.ones(1, np.float32) != 0


def test_they_are_put_back_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), cpu_settings(threads=before + 1):
        raise KeyError
    assert torch.get_num_threads() == before
    assert not denormals_are_flushed()
