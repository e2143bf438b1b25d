"""``python -m snn_lib.kernels --check``: what agrees, what does not, and what cannot run."""

import os
import re
import runpy
import sys
from types import SimpleNamespace

import pytest
import torch
from claimed_device import ClaimedDevice

from snn_lib import cells, kernels
from snn_lib.kernels import check, eager

# Programs that round between their cells exist in bfloat16 alone.
ROWS = sum(1 if "~" in one["key"] else len(check.TOLERANCE) for one in check.PROGRAMS.values())


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Nothing is large, and nothing is timed for long."""
    monkeypatch.setattr(check, "ODD", (3, 2, 5))
    monkeypatch.setattr(check, "LARGE", (3, 2, 4))
    once = SimpleNamespace(times=[2e-3])
    monkeypatch.setattr(check.Timer, "blocked_autorange", lambda timer, min_run_time: once)


def backend(name="cpu", **functions):
    """A backend that computes as ``eager``, but for ``functions``."""
    own = {"forward": eager.forward, "backward": eager.backward}
    return SimpleNamespace(__name__=f"snn_lib.kernels.{name}", **own | functions)


def lines(capsys):
    """The lines of the table, without its head."""
    _, _, table = capsys.readouterr().out.partition("product\n")
    return table.splitlines()


def test_the_cpu_backend_agrees_and_is_timed(capsys):
    pytest.importorskip("llvmlite")
    assert check.check(["cpu"])
    table = lines(capsys)
    assert len(table) == ROWS
    assert all(line.endswith("  agrees") for line in table)
    assert all(line.split()[-4:-1] == ["2.000"] * 3 for line in table)


def test_every_cell_of_the_library_is_compared():
    keys = "".join(options["key"] for options in check.PROGRAMS.values())
    exported = [getattr(cells, name) for name in cells.__all__]
    kinds = {one.kind for one in exported if hasattr(one, "kind")}
    assert set(re.findall(r"\w+(?=\[)", keys)) == kinds


@pytest.mark.parametrize(
    ("function", "place"), [("forward", 0), ("forward", 1), *(("backward", n) for n in range(3))]
)
def test_a_wrong_result_is_told(capsys, function, place, monkeypatch):
    right = getattr(eager, function)

    def spoilt(inputs, *arguments):
        results = [*right(inputs, *arguments)]
        if inputs.key.endswith(check.NEURON):
            results[place] = results[place] + 0.02 * results[place].abs().amax()
        return results

    few = {name: check.PROGRAMS[name] for name in ("filter, P = 2, Q = 0", "neuron, gaussian")}
    monkeypatch.setattr(check, "PROGRAMS", few)
    assert not check.print_table(backend(**{function: spoilt}), "cpu")
    for line in lines(capsys):
        wrong = line.startswith("neuron")
        assert line.endswith("DISAGREES" if wrong else "  agrees")


def test_a_difference_is_relative_and_infinite_where_it_cannot_be_computed():
    expected = torch.tensor([-4.0, 1.0])
    assert check.difference(expected + torch.tensor([0.0, 0.5]), expected) == 0.125
    assert check.difference(expected[:0], expected[:0]) == 0
    for wrong in (expected * torch.nan, expected.half(), expected[None], expected / 0):
        assert check.difference(wrong, expected) == torch.inf
    assert check.difference(expected, expected * torch.nan) == torch.inf


def test_a_program_that_raises_is_told_in_a_line_and_the_check_goes_on(capsys):
    def fail(inputs, *arguments):
        if inputs.key == check.NEURON:
            raise RuntimeError("no such\ninstruction")
        return eager.backward(inputs, *arguments)

    assert not check.print_table(backend(backward=fail), "cpu")
    table = lines(capsys)
    assert len(table) == ROWS
    for line in table:
        failed = "FAILS: RuntimeError('no such\\ninstruction')" in line
        assert failed == line.startswith("neuron,")


def test_a_gpu_s_tensors_stay_on_it(capsys, monkeypatch):
    """With a device that is only claimed, and ``eager`` in the place of Triton."""
    pytest.importorskip("triton")
    monkeypatch.setattr(check, "PROGRAMS", {"pair": check.PROGRAMS["neuron and filter"]})
    with ClaimedDevice():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
        agree = check.print_table(backend("cuda"), "cuda")
    output = capsys.readouterr().out
    assert agree, output
    assert "Backend cuda on a GPU, Triton" in output


@pytest.mark.parametrize("agree", [(True, False), (False, True)])
def test_all_devices_have_to_agree(agree, monkeypatch):
    monkeypatch.setattr(
        check, "compiled_backends", lambda devices: zip(devices, agree, strict=True)
    )
    monkeypatch.setattr(check, "print_table", lambda device, agrees: agrees)
    assert not check.check(["cpu", "cuda"])


def test_forward_backward_and_product_are_timed_in_their_own_columns(capsys, monkeypatch):
    called = []

    class Watch:
        """Finds out what it is to time."""

        def __init__(self, statement, globals, num_threads):
            self.call = globals["call"]

        def blocked_autorange(self, min_run_time):
            called.clear()
            self.call()
            milliseconds = {"forward": 1.0, "backward": 2.0}.get(*called or "-", 3.0)
            return SimpleNamespace(times=[9.0, 1e-3 * milliseconds])

    def watched(name):
        return lambda *inputs: called.append(name) or getattr(eager, name)(*inputs)

    monkeypatch.setattr(check, "Timer", Watch)
    monkeypatch.setattr(check, "PROGRAMS", {"neuron": {"key": check.NEURON}})
    kinds = {name: watched(name) for name in ("forward", "backward")}
    assert check.print_table(backend(**kinds), "cpu")
    assert {tuple(line.split()[-4:-1]) for line in lines(capsys)} == {("1.000", "2.000", "3.000")}


def test_programs_run_with_the_lengths_the_dropout_and_the_surrogate_that_they_name():
    for label, options in check.PROGRAMS.items():
        given = check.make_case(check.Draw(torch.float32, "cpu"), (4, 3, 2), **options).inputs
        assert (given.lengths is not None) == ("lengths" in label)
        assert (given.dropout > 0) == (given.seed is not None) == ("dropout" in options)
        assert ("fast_sigmoid" in label) == (given.surrogate == "fast_sigmoid")


def test_backends_that_cannot_serve_are_left_out(monkeypatch, capsys):
    monkeypatch.setattr(check, "BACKENDS", ("eager",))
    assert not check.check(["cpu"])
    assert capsys.readouterr().out == (
        "no compiled backend can run here, so there is nothing to check\n"
    )


@pytest.mark.parametrize(
    ("options", "agree", "code"),
    [([], False, None), (["--check"], True, None), (["--check"], False, 1)],
)
def test_the_command_prints_the_backend_and_ends_with_1_where_results_differ(
    options, agree, code, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["kernels", *options])
    monkeypatch.setattr(check, "check", lambda devices: agree)
    if code is None:
        runpy.run_module("snn_lib.kernels", run_name="__main__")
    else:
        with pytest.raises(SystemExit) as end:
            runpy.run_module("snn_lib.kernels", run_name="__main__")
        assert end.value.code == code
    name, reason = kernels.choose_backend("cpu")
    assert capsys.readouterr().out.splitlines()[0] == f"cpu: {name} ({reason})"


def test_the_command_checks_the_gpu_beside_the_cpu(monkeypatch, capsys):
    checked = []
    gpu = SimpleNamespace(type="cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: gpu)
    monkeypatch.setattr(kernels, "choose_backend", lambda device: ("eager", f"of {device}"))
    monkeypatch.setattr(sys, "argv", ["kernels", "--check"])
    monkeypatch.setattr(check, "check", lambda devices: checked.extend(devices) or True)
    runpy.run_module("snn_lib.kernels", run_name="__main__")
    assert checked == ["cpu", "cuda"]
    assert capsys.readouterr().out == "cpu: eager (of cpu)\ncuda: eager (of cuda)\n"


def test_the_command_says_why_no_backend_serves_a_device(monkeypatch, capsys):
    def refuse(device):
        raise ValueError(f"nothing serves {device}")

    monkeypatch.setattr(sys, "argv", ["kernels"])
    monkeypatch.setattr(kernels, "choose_backend", refuse)
    with pytest.raises(SystemExit) as end:
        runpy.run_module("snn_lib.kernels", run_name="__main__")
    assert end.value.code == 1
    assert capsys.readouterr().out.startswith("cpu: none (nothing serves cpu)\n")


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="runs with test_agreement's cuda cases"
)
def test_the_interpreted_cuda_backend_agrees(capsys, monkeypatch):
    monkeypatch.setattr(check, "PROGRAMS", {"pair": check.PROGRAMS["neuron and filter"]})
    agree = check.check(["cpu"])
    output = capsys.readouterr().out
    assert agree, output
    assert "Backend cuda on cpu, Triton" in output
    assert " interpreted" in output
