"""The backends for CPU tensors that tests run over."""

import pytest

from diffdoctor.backends.select import why_not

HAS_CPU = why_not("cpu") is None
needs_cpu = pytest.mark.skipif(not HAS_CPU, reason="no compiled module")
BACKENDS = ["reference", pytest.param("cpu", marks=needs_cpu)]
