"""What the tests of several cells share: the backends that run them."""

import pytest

from snn_lib import use_backend


@pytest.fixture(params=["eager", "cpu"])
def backend(request):
    if request.param == "cpu":
        pytest.importorskip("llvmlite")
    with use_backend(request.param):
        yield
