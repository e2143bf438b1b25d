"""Compiled functions are kept on disk, and compiled anew where that fails."""

import importlib.util

import pytest

pytest.importorskip("numba")

from numba.core.caching import IndexDataCacheFile

from snn_lib.inference.compiling import jit


@pytest.fixture
def doubled(tmp_path):
    """Compiles a function as a new process would, whose files lie in ``tmp_path``."""
    path = tmp_path / "doubling.py"
    path.write_text("def double(x):\n    return 2 * x\n")
    spec = importlib.util.spec_from_file_location("doubling", path)

    def make():
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        function = jit(module.double, no_cpython_wrapper=False)
        assert function(3.0) == 6.0
        return function.stats.cache_hits

    return make


def files(folder, kind):
    return [*folder.glob(f"__pycache__/*.{kind}")]


def test_a_second_process_compiles_nothing(doubled):
    assert [not doubled(), bool(doubled())] == [True, True]


@pytest.mark.parametrize("kind", ["nbi", "nbc"])
@pytest.mark.parametrize("left", [0, 20])
def test_a_damaged_file_is_replaced(tmp_path, doubled, kind, left):
    doubled()
    (path,) = files(tmp_path, kind)
    path.write_bytes(path.read_bytes()[:left])
    assert [bool(doubled()), bool(doubled())] == [False, True]


def test_a_full_disk_is_done_without(tmp_path, doubled, monkeypatch):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(IndexDataCacheFile, "_open_for_write", fail)
    assert not doubled()
    assert not files(tmp_path, "nbc")
