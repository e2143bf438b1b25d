"""Synapses: their impulse responses, states, poles, and that constrained ones stay stable."""

import copy
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from claimed_device import ClaimedDevice
from definitions import with_channels_last
from filters import MARGIN, filters, from_poles, numpy_poles
from hypothesis import given
from hypothesis import strategies as st
from scipy.signal import lfilter
from small_networks import in_parts
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from snn_lib.cells import (
    DualExponentialSynapse,
    IIRSynapse,
    LowPassSynapse,
    ResonantSynapse,
    SpikingNeuron,
    parameter_groups,
)
from snn_lib.containers import Repeat, Sequential
from snn_lib.data.batches import default_dtype
from snn_lib.stability import stabilise, without_warning
from snn_lib.time_constants import log_spaced

STABLE = {"constraint": "stable"}
ORDER_30 = [0.0] * 29 + [0.5]  # F[t] = F[t-30] / 2 + x[t]


def impulse_response(synapse, steps=60):
    impulse = torch.zeros(steps, 1, *synapse.shape, dtype=torch.float64)
    impulse[0] = 1.0
    return synapse(impulse)[0].detach()[:, 0]


# Impulse responses


@pytest.fixture
def double_precision():
    """New modules are in float64."""
    with default_dtype(torch.float64):
        yield


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize(("tau_m", "tau_s"), [(4.0, 1.0), (8.0, 2.0), (20.0, 0.3)])
def test_dual_exponential_impulse_response(tau_m, tau_s):
    response = impulse_response(DualExponentialSynapse(3, tau_m, tau_s))
    k = np.arange(len(response)) + 1
    expected = np.exp(-k / tau_m) - np.exp(-k / tau_s)
    for channel in response.T:
        np.testing.assert_allclose(channel, expected, rtol=1e-12, atol=1e-14)


@given(
    alpha=st.lists(st.floats(-0.3, 0.3), max_size=3),
    beta=st.lists(st.floats(-2.0, 2.0), min_size=1, max_size=3),
)
def test_iir_impulse_response_is_scipy_s(alpha, beta):
    synapse = IIRSynapse((2,), alpha, beta).double()
    coefficients = [c.detach()[:, 0].numpy() for c in (synapse.alpha, synapse.beta)]
    expected = lfilter(coefficients[1], np.concatenate([[1.0], -coefficients[0]]), np.eye(60)[0])
    for channel in impulse_response(synapse).T:
        np.testing.assert_allclose(channel, expected, rtol=1e-10, atol=1e-12)


# Several filters for each input


def several_filters(*positions):
    """Three low passes for each of two inputs, and their decays, ``(copies, inputs)``."""
    decays = torch.tensor([[0.9, 0.8], [0.5, 0.4], [0.2, 0.1]], dtype=torch.float64)
    taus = (-1 / decays.log()).view(6, *positions and (1, 1))
    return Sequential(Repeat(3), LowPassSynapse(tuple(taus.shape), taus)).double(), decays


def test_each_input_goes_through_filters_of_its_own():
    bank, decays = several_filters()
    x = torch.randn(20, 4, 2, dtype=torch.float64)
    psp = bank(x)[0].detach().unflatten(2, (3, 2))  # (T, B, copies, inputs)
    for number, channel in np.ndindex(3, 2):
        expected = lfilter([1.0], [1.0, -decays[number, channel].item()], x[..., channel], axis=0)
        np.testing.assert_allclose(psp[:, :, number, channel], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("last", [False, True])
def test_filters_of_repeated_maps_are_those_of_each_position(last):
    maps, rows = several_filters(4, 5)[0], several_filters()[0]
    x = torch.randn(6, 3, 2, 4, 5, dtype=torch.float64)
    psp = maps(with_channels_last(x) if last else x)[0]
    assert psp.stride(2) == (1 if last else 20)  # maps stay as they lie in memory
    for y, z in np.ndindex(4, 5):
        assert torch.equal(psp[..., y, z], rows(x[..., y, z])[0])


# First filters of every channel


def test_time_constants_may_be_numbers_tensors_or_functions_of_the_shape():
    slow, fast = torch.tensor([8.0, 20.0, 300.0]), torch.tensor([2.0, 0.3, 40.0])
    for unit_energy in (False, True):
        together = DualExponentialSynapse(3, slow, lambda shape: fast, unit_energy=unit_energy)
        for channel in range(3):
            taus = slow[channel].item(), fast[channel].item()
            alone = DualExponentialSynapse(1, *taus, unit_energy=unit_energy)
            for name in ("alpha", "beta"):
                row = getattr(together, name)[:, channel : channel + 1]
                torch.testing.assert_close(row, getattr(alone, name))
    low_pass = LowPassSynapse((1, 3), slow[None])
    np.testing.assert_allclose(low_pass.alpha[0, 0].detach(), np.exp(-1 / slow.numpy()))
    assert (low_pass.beta == 1).all()


@pytest.mark.parametrize(
    "synapse",
    [
        LowPassSynapse(3, torch.tensor([2.0, 30.0, 400.0]), unit_energy=True),
        DualExponentialSynapse(3, torch.tensor([3.0, 50.0, 400.0]), 2.0, unit_energy=True),
        ResonantSynapse(3, torch.tensor([2.0, 50.0, 800.0]), torch.tensor([0.5, 0.0, 0.00125])),
        ResonantSynapse((3, 1), torch.tensor([[10.0], [100.0], [400.0]]), 0.2),
    ],
    ids=lambda synapse: type(synapse).__name__,
)
def test_squares_of_a_response_of_unit_energy_sum_to_one(synapse):
    energy = impulse_response(synapse.double(), 8000).square().sum(0)
    # the slowest filters notice that their coefficients are rounded to float32
    np.testing.assert_allclose(energy, np.ones_like(energy), rtol=2e-3)


@pytest.mark.parametrize(("tau", "frequency"), [(20.0, 0.03), (5.0, 0.25), (300.0, 0.4)])
def test_resonant_impulse_response(tau, frequency):
    synapse = ResonantSynapse(2, tau, frequency)
    beta = synapse.beta[0, 0].item()
    response = impulse_response(synapse.double(), 200)[:, 1]
    k, w = np.arange(200), 2 * math.pi * frequency
    expected = beta * np.exp(-k / tau) * np.sin((k + 1) * w) / math.sin(w)
    np.testing.assert_allclose(response, expected, rtol=0.0, atol=2e-4)


def test_the_seed_decides_the_time_constants_that_are_drawn():
    def alpha(seed):
        torch.manual_seed(seed)
        return ResonantSynapse((4, 5), log_spaced(10, 800), log_spaced(0.01, 0.2)).alpha

    assert torch.equal(alpha(1), alpha(1))
    assert not torch.equal(alpha(1), alpha(2))
    assert len(alpha(1)[1].unique()) == 20


@pytest.mark.parametrize(
    ("build", "margin"),
    [
        (lambda **options: LowPassSynapse(2, 800.0, **options), 1e-3),
        (lambda **options: LowPassSynapse(2, 5000.0, **options), 1e-3 / 8),
        (lambda **options: DualExponentialSynapse(2, 800.0, 4.0, **options), 1e-3 / 4),
        (lambda **options: ResonantSynapse(2, 800.0, 1 / 784, **options), 1e-3 / 16),
        (lambda **options: IIRSynapse(2, from_poles(*[0.99] * 3), (1.0,), **options), 1e-3),
        (lambda **options: IIRSynapse(2, (1.9, 0.5), (1.0,), **options), 1e-3),
    ],
)
def test_the_margin_shrinks_where_it_would_change_slow_first_filters(build, margin):
    synapse = build(constraint="stable")
    assert synapse.margin == margin
    if synapse.pole_radius() < 1 - 2 * MARGIN or margin < MARGIN:
        assert torch.equal(synapse.effective_alpha(), build().alpha)
    wide = build(constraint="stable", margin=0.1)
    assert not torch.equal(wide.effective_alpha(), build().alpha)  # what is asked for is kept


def test_first_coefficients_are_made_on_the_default_device_from_the_same_random_numbers():
    def build():
        torch.manual_seed(3)
        return ResonantSynapse(4, log_spaced(10, 800), 0.1, constraint="stable")

    with torch.device("meta"):
        elsewhere = build()
        LowPassSynapse(3, 4.0, constraint="stable")
    after = torch.rand(1)
    build()
    assert elsewhere.alpha.is_meta
    assert torch.equal(torch.rand(1), after)


# Parameters and state


@pytest.mark.parametrize(
    ("synapse", "trained", "fixed"),
    [
        (DualExponentialSynapse(3, 4.0, 1.0), {"alpha", "beta"}, set()),
        (DualExponentialSynapse(3, 4.0, 1.0, train_coefficients=False), set(), {"alpha", "beta"}),
        (LowPassSynapse(3, 4.0), {"alpha"}, {"beta"}),
        (LowPassSynapse(3, 4.0, train_coefficients=False), set(), {"alpha", "beta"}),
        (ResonantSynapse(3, 9.0, 0.1), {"alpha", "beta"}, set()),
        (ResonantSynapse(3, 9.0, 0.1, train_coefficients=False), set(), {"alpha", "beta"}),
        (IIRSynapse(3, (0.5,), (1.0,), train_alpha=False), {"beta"}, {"alpha"}),
    ],
)
def test_coefficients_are_parameters_where_trained_and_buffers_elsewhere(synapse, trained, fixed):
    assert {name for name, _ in synapse.named_parameters()} == trained
    assert {name for name, _ in synapse.named_buffers()} == fixed
    x = torch.randn(4, 2, 3)
    synapse(x)[0]  # a run leaves nothing behind: the state is no buffer
    assert set(synapse.state_dict()) == {"alpha", "beta"}
    if trained:
        synapse(x)[0].sum().backward()
        assert all((parameter.grad != 0).any() for parameter in synapse.parameters())


# Poles


@given(
    st.lists(st.floats(-3.0, 3.0), max_size=5).flatmap(
        lambda alpha: st.lists(
            st.lists(st.floats(-3.0, 3.0), min_size=len(alpha), max_size=len(alpha)),
            min_size=1,
            max_size=3,
        )
    )
)
def test_the_pole_radius_is_that_of_numpy_s_roots(alphas):
    radius = filters(alphas).pole_radius()
    expected = max(abs(numpy_poles(alpha)).max(initial=0.0) for alpha in alphas)
    # a cluster of P poles is known to eps^(1/P) only
    assert radius == pytest.approx(expected, rel=1e-2, abs=1e-2)


@pytest.mark.parametrize(
    "poles",
    [
        (0.5,),
        (-0.9,),
        (0.9, 0.3),
        (0.6 + 0.7j, 0.6 - 0.7j),
        (0.8, 0.2 + 0.9j, 0.2 - 0.9j),
        (1.2, 0),
    ],
)
def test_poles_are_those_that_the_filter_was_made_of(poles):
    synapse = filters([from_poles(*poles)])
    found = synapse.poles()
    assert found.shape == (1, len(poles))
    np.testing.assert_allclose(
        np.sort_complex(found[0].numpy()), np.sort_complex(poles), rtol=1e-6, atol=1e-6
    )
    assert synapse.pole_radius() == pytest.approx(max(abs(np.array(poles))), rel=1e-6)


# Stability in any loop of training


def outward_loss(synapse, x):
    """Falls the more, the longer the filters ring."""
    psp, _ = synapse(x)
    return -torch.log1p(psp.double().square()).mean()


def long_memory(order):
    alphas = [from_poles(*poles[:order]) for poles in ((0.9, 0.8, 0.7), (-0.9, 0.5, 0.3))]
    return filters(alphas, torch.float32, constraint="stable")


def momentum(parameters):
    return torch.optim.SGD(parameters, lr=1.0, momentum=0.9)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.3)


class by_hand:
    """p -= lr * p.grad"""

    def __init__(self, parameters):
        self.parameters = list(parameters)

    def zero_grad(self):
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self):
        for parameter in self.parameters:
            parameter -= 10.0 * parameter.grad


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("optimiser", [momentum, adamw, by_hand])
@pytest.mark.parametrize("passes", ["one", "accumulated", "backward twice"])
def test_any_training_loop_runs_stable_filters_alone(order, optimiser, passes):
    synapse, x = long_memory(order), torch.randn(30, 2, 2)
    steps = optimiser(synapse.parameters())
    left = False
    for _ in range(5):
        steps.zero_grad()
        loss = outward_loss(synapse, x)
        if passes == "accumulated":
            loss.backward()
            loss = outward_loss(synapse, 2 * x)
        if passes == "backward twice":
            loss.backward(retain_graph=True)
        loss.backward()
        steps.step()
        left |= bool(max(abs(numpy_poles(a.detach())).max() for a in synapse.alpha.T) > 1)
        assert synapse.pole_radius() < 1.0
    assert left  # the parameter, not the filter
    synapse.eval()
    assert synapse(torch.ones(3000, 1, 2))[0].isfinite().all()


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("optimiser", [momentum, adamw])
def test_training_gives_the_filters_of_a_projection_after_every_step(order, optimiser):
    x = torch.randn(30, 2, 2)
    synapse = long_memory(order)
    projected = IIRSynapse(2, (0.0,) * order, (1.0,))
    projected.load_state_dict(synapse.state_dict())
    for trained in (synapse, projected):
        steps = optimiser(trained.parameters())
        for number in range(20):
            steps.zero_grad()
            sign = 1 if number < 10 else -1  # out, then in again
            (sign * outward_loss(trained, x)).backward()
            steps.step()
            if trained is projected:
                trained.alpha.data = stabilise(trained.alpha.data, MARGIN)
    for key, value in synapse.state_dict().items():
        assert torch.equal(value, projected.state_dict()[key]), key


def test_the_gradient_of_an_unstable_parameter_is_that_of_the_stable_filter_at_work():
    outside = filters([(3.0, -3.0, 2.0), (0.1, 0.1, 0.1)], constraint="stable").eval()
    at_work = filters([(0.0,) * 3] * 2)
    at_work.load_state_dict(copy.deepcopy(outside).state_dict())
    assert not torch.equal(outside.alpha, at_work.alpha)
    x = torch.randn(9, 2, 2, dtype=torch.float64)
    for synapse in (outside, at_work):
        synapse(x)[0].square().sum().backward()
    assert torch.equal(outside.alpha.grad, at_work.alpha.grad)
    assert (at_work.alpha.grad != 0).all()


@pytest.mark.parametrize("order", [2, 3])
def test_compiled_training_gives_the_same_filters(order):
    torch.compiler.reset()
    synapse, x = long_memory(order), torch.randn(30, 2, 2)
    twin = copy.deepcopy(synapse)
    compiled = torch.compile(synapse, backend="aot_eager_decomp_partition", fullgraph=True)
    for module, parameters in ((compiled, synapse.parameters()), (twin, twin.parameters())):
        steps = momentum(parameters)
        for _ in range(4):
            steps.zero_grad()
            outward_loss(module, x).backward()
            steps.step()
    torch.testing.assert_close(dict(synapse.state_dict()), dict(twin.state_dict()))
    assert synapse.pole_radius() < 1.0


def test_export_in_training_mode_leaves_the_parameter_alone():
    synapse, x = filters([(3.0, -3.0, 2.0)], torch.float32, "stable"), torch.randn(9, 2, 1)
    program = torch.export.export(synapse, (x,))
    assert synapse.alpha[:, 0].tolist() == [3.0, -3.0, 2.0]
    torch.testing.assert_close(program.module()(x)[0], synapse(x)[0])


def test_distributed_data_parallel_trains_the_same_filters(tmp_path):
    synapse, x = long_memory(3), torch.randn(30, 2, 2)
    twin = copy.deepcopy(synapse)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        for module in (DistributedDataParallel(synapse), twin):
            steps = momentum(module.parameters())
            for _ in range(4):
                steps.zero_grad()
                outward_loss(module, x).backward()
                steps.step()
    finally:
        dist.destroy_process_group()
    assert torch.equal(synapse.alpha, twin.alpha)
    assert synapse.pole_radius() < 1.0


@pytest.mark.parametrize("alpha", [(1.9, 0.5), (3.0, -3.0, 2.0)])
def test_functional_calls_run_stable_filters_and_change_no_parameter(alpha):
    synapse = filters([alpha, alpha], constraint="stable")
    given_alpha = torch.tensor([alpha, alpha], dtype=torch.float64).T
    at_work = {"alpha": stabilise(given_alpha, MARGIN), "beta": synapse.beta.detach()}
    free = filters([alpha, alpha])

    def loss(parameters, x, module=synapse):
        return functional_call(module, parameters, (x,))[0].square().mean()

    x = torch.randn(4, 9, 2, 2, dtype=torch.float64)
    weights = {"alpha": given_alpha.clone(), "beta": synapse.beta.detach()}
    expected = [grad(loss)(at_work, sample, free) for sample in x]
    torch.testing.assert_close(grad(loss)(weights, x[0]), expected[0])
    each = vmap(grad(loss), in_dims=(None, 0))(weights, x)
    torch.testing.assert_close(each["alpha"], torch.stack([g["alpha"] for g in expected]))
    grad(lambda x: synapse(x)[0].sum())(x[0])  # the parameter is not the transform's
    functional_call(synapse, weights, (x[0],))  # without a transform
    assert torch.equal(weights["alpha"], given_alpha)
    assert torch.equal(synapse.alpha, given_alpha)


def test_the_average_of_stable_filters_is_run_as_a_stable_one():
    one, other = ((0.95, 0.95, 0.95), (-0.95, 0.95 * 1j, -0.95 * 1j))
    synapse = filters([from_poles(*one)], constraint="stable")
    average = AveragedModel(synapse)
    average.update_parameters(synapse)
    with torch.no_grad():
        synapse.alpha[:, 0] = torch.tensor(from_poles(*other))
    average.update_parameters(synapse)
    mean = (np.array(from_poles(*one)) + from_poles(*other)) / 2
    assert abs(numpy_poles(mean)).max() > 1.0
    np.testing.assert_allclose(average.module.alpha.detach()[:, 0], mean)
    assert average.module.pole_radius() < 1.0


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_filters_stay_stable_in_low_precision(dtype, order):
    synapse = filters([from_poles(*[0.9985, 0.9985, 0.5][:order])], constraint="stable").to(dtype)
    assert synapse.pole_radius() < 1.0
    psp, _ = synapse(torch.ones(5, 2, 1))
    assert psp.dtype == dtype
    saved = synapse.state_dict()["alpha"]
    assert torch.equal(saved, synapse.effective_alpha())
    assert abs(numpy_poles(saved[:, 0].double())).max() < 1.0


def test_loading_refuses_filters_that_rounding_would_stop_from_decaying():
    fast, slow = LowPassSynapse(2, 5.0).bfloat16(), LowPassSynapse(2, 1000.0).state_dict()
    with pytest.raises(RuntimeError, match=r"alpha: a filter .* rounded to torch\.bfloat16"):
        fast.load_state_dict(slow)
    fast.load_state_dict(LowPassSynapse(2, 8.0).state_dict())
    LowPassSynapse(2, 5.0, constraint="stable").bfloat16().load_state_dict(slow)
    LowPassSynapse(2, 5.0).load_state_dict(slow)


def test_a_conversion_that_would_stop_a_filter_from_decaying_is_refused():
    slow = LowPassSynapse(2, torch.tensor([4.0, 1000.0]))
    network = nn.Sequential(nn.Linear(2, 2), slow)
    before = slow.alpha.detach().clone()
    kept = r"torch\.bfloat16, .*: leave the layer in torch\.float32 and use torch\.autocast, or"
    with pytest.raises(ValueError, match=kept):
        network.bfloat16()
    assert torch.equal(slow.alpha, before)
    slow.half()
    assert slow.pole_radius() < 1
    slow.double().float()
    slower = LowPassSynapse(2, 5.0).double()
    nn.init.constant_(slower.alpha, 1 - 1e-9)
    with pytest.raises(ValueError, match=r"leave the layer in torch\.float64, or build"):
        slower.float()
    LowPassSynapse(2, 1000.0, constraint="stable").bfloat16()
    LowPassSynapse(2, 1000.0).to("meta").bfloat16()
    unstable = IIRSynapse(2, (torch.tensor([1.5, 0.5]),), (1.0,)).bfloat16()
    assert unstable.alpha[0].tolist() == [1.5, 0.5]


@pytest.mark.parametrize("alpha", [(1.5,), (1.9, -1.2), (3.0, -3.0, 2.0)])
def test_files_and_copies_hold_the_stable_filter(alpha):
    synapse = filters([alpha], constraint="stable")
    parameter, expected = synapse.alpha, stabilise(synapse.alpha.detach(), MARGIN)
    x = torch.randn(9, 2, 1, dtype=torch.float64)
    psp = copy.deepcopy(synapse)(x)[0]
    assert torch.equal(pickle.loads(pickle.dumps(synapse))(x)[0], psp)

    assigned = filters([(0.0,) * len(alpha)], constraint="stable")
    assigned.load_state_dict({"alpha": parameter.clone(), "beta": synapse.beta}, assign=True)
    assert torch.equal(assigned.eval()(x)[0], psp)
    assert assigned.pole_radius() < 1.0

    saved = synapse.state_dict()["alpha"]
    assert torch.equal(saved, expected)
    assert saved.data_ptr() == parameter.data_ptr()  # the parameter itself, as PyTorch has it
    assert synapse.alpha is parameter
    assert parameter.requires_grad


def test_evaluation_leaves_the_parameter_alone():
    synapse = filters([(1.9, 0.5)], constraint="stable")
    x = torch.randn(9, 2, 1, dtype=torch.float64)
    with torch.no_grad():
        psp = synapse(x)[0]
    with torch.inference_mode():
        assert torch.equal(synapse(x)[0], psp)
    assert torch.equal(synapse.eval()(x)[0], psp)
    assert synapse.alpha[:, 0].tolist() == [1.9, 0.5]
    assert torch.equal(synapse.train()(x)[0], psp)
    assert torch.equal(synapse.alpha, synapse.effective_alpha())


def test_a_parameter_that_is_pulled_back_may_be_penalised_in_the_same_loss():
    synapse = filters([(1.9, 0.5)], constraint="stable")
    penalty = synapse.alpha.square().sum()
    (penalty + synapse(torch.ones(3, 1, 1))[0].sum()).backward()


@pytest.mark.parametrize("alpha", [(1.5,), (1.9, -1.2), (3.0, -3.0, 2.0)])
def test_without_a_constraint_no_parameter_is_moved(alpha):
    synapse = filters([alpha])
    synapse(torch.ones(3, 1, 1))
    synapse.project_()
    assert synapse.effective_alpha() is synapse.alpha
    assert synapse.state_dict()["alpha"][:, 0].tolist() == list(alpha)


def test_a_filter_without_poles_or_channels_is_stable():
    synapse = IIRSynapse(3, (), (1.0,), constraint="stable")
    x = torch.randn(4, 2, 3)
    assert torch.equal(synapse(x)[0], x)
    assert synapse.poles().shape == (3, 0)
    assert synapse.pole_radius() == LowPassSynapse(0, 5.0).pole_radius() == 0.0


# Autocast


@pytest.mark.parametrize("constraint", ["none", "stable"])
def test_under_autocast_the_psp_is_rounded_and_the_state_is_not(constraint):
    synapse, x = DualExponentialSynapse(3, 4.0, 1.0, constraint=constraint), torch.rand(9, 2, 3)
    exact, end = synapse(x)
    with torch.autocast("cpu", torch.bfloat16):
        psp, state = synapse(x)
    assert psp.dtype == torch.bfloat16
    assert torch.equal(psp, exact.to(torch.bfloat16))
    assert not torch.equal(psp.float(), exact)
    torch.testing.assert_close(state, end, rtol=0.0, atol=0.0)


def test_autocast_gives_its_own_dtype_and_leaves_float64_alone():
    synapse, x = LowPassSynapse(3, 4.0), torch.rand(9, 2, 3)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert synapse(x)[0].dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert LowPassSynapse(3, 4.0).double()(x)[0].dtype == torch.float64
    assert synapse(x)[0].dtype == torch.float32


# Filters at the edge of what their dtype holds


@pytest.mark.usefixtures("double_precision")
def test_float64_allows_time_constants_that_are_too_long_in_float32():
    synapse = ResonantSynapse(1, 5000.0, 0.0)
    assert synapse.pole_radius() == pytest.approx(math.exp(-1 / 5000), abs=1e-7)


@pytest.mark.parametrize(("tau", "frequency"), [(2000.0, 1e-3), (10_000.0, 2e-4)])
def test_a_filter_has_unit_energy_with_its_rounded_coefficients(tau, frequency):
    synapse = ResonantSynapse(1, tau, frequency)
    x = torch.zeros(200_000, 1, 1, dtype=torch.float64)
    x[0] = 1
    with torch.no_grad():
        response, _ = synapse.double()(x)  # the float32's coefficients
    assert response.square().sum().item() == pytest.approx(1, rel=1e-4)


def test_a_first_filter_that_is_stable_is_kept_as_it_is():
    alpha = torch.tensor([0.5, 0.9999, 1.1])  # the last is not stable
    synapse = IIRSynapse(3, (alpha,), (1.0,), constraint="stable")
    assert torch.equal(synapse.effective_alpha()[0, :2], alpha[:2])
    assert synapse.pole_radius() < 1


def test_loaded_filters_stay_as_they_are_whatever_the_margin_of_the_layer():
    x = torch.randn(50, 2, 3)
    slow, fast = (LowPassSynapse(3, tau, constraint="stable") for tau in (2000.0, 4.0))
    assert slow.margin < fast.margin == MARGIN
    fast.load_state_dict(slow.state_dict())
    assert torch.equal(fast(x)[0], slow(x)[0])
    slow.load_state_dict(LowPassSynapse(3, 4.0).state_dict())
    assert slow.margin == fast.margin  # as training began, for a run that goes on
    nearest = LowPassSynapse(3, 4.0)
    nearest.alpha.data.fill_(1 - 1e-6)  # no margin leaves this filter as it is
    slow.load_state_dict(nearest.state_dict())
    assert slow.margin == fast.margin
    assert slow.effective_alpha().max() < 1 - slow.margin / 2
    fixed = LowPassSynapse(3, 4.0, constraint="stable", margin=0.1)
    fixed.load_state_dict(fast.state_dict())
    assert fixed.margin == 0.1
    assert fixed.effective_alpha().max() <= 0.9


def test_a_filter_that_has_to_be_moved_moves_no_other():
    synapse = LowPassSynapse(2, 5.0, constraint="stable")
    near, nearer = 0.9999, 0.9999995
    synapse.load_state_dict({"alpha": torch.tensor([[near, nearer]]), "beta": torch.ones(1, 2)})
    found = synapse.effective_alpha()[0]
    assert found[0] == torch.tensor(near)
    assert found[1] < nearer


def test_a_stable_filter_of_high_order_is_not_called_unstable():
    synapse = IIRSynapse(1, ORDER_30, [1.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        synapse(torch.ones(40, 1, 1))[0].sum().backward()
    assert synapse.pole_radius() == pytest.approx(0.5 ** (1 / 30))


@pytest.mark.parametrize("constraint", ["none", "stable"])
def test_a_filter_of_any_order_is_built_on_the_default_device(constraint):
    for alpha in ([], [0.5], [0.5, 0.2], [0.5, 0.2, 0.1]):
        with torch.device("meta"):
            assert IIRSynapse(3, alpha, [1.0], constraint=constraint).alpha.is_meta


def test_poles_are_found_on_the_cpu_whatever_the_default_device():
    synapse = DualExponentialSynapse(3, 4.0, 1.0)
    expected = synapse.poles()
    with torch.device("meta"):
        assert torch.equal(synapse.poles(), expected)


REFUSED = [  # what is built or run, and the words
    *((lambda m=m, s=s: DualExponentialSynapse(3, m, s), f"tau_m is {m} and tau_s {s}")
      for m, s in ((1.0, 1.0), (1.0, 4.0), (4.0, 0.0), (4.0, -1.0), (-1.0, -4.0), (0.0, 0.0))),
    *((lambda t=t: LowPassSynapse(3, t), f"tau is {t}") for t in (0.0, -1.0, math.nan)),
    (lambda: IIRSynapse(3, 0.5, [1.0]), r"alpha is 0\.5, expected a list with a number for each"),
    (lambda: IIRSynapse(3, [], 1), "beta is 1, expected a list"),
    (lambda: IIRSynapse(3, None, [1.0]), "alpha is None, expected a list"),
    (lambda: IIRSynapse(3, torch.tensor(0.5), [1.0]), r"alpha is tensor.*, expected a list"),
    (lambda: IIRSynapse(3, [0.5, math.nan], [1.0]), "alpha is nan, expected finite numbers"),
    *((lambda f=f: ResonantSynapse(3, 4.0, f), rf"frequency is {f}.*\[0, 0\.5\]")
      for f in (-0.1, 0.6, math.nan)),
    (lambda: ResonantSynapse(3, 4.0, torch.tensor([0.1, 0.6, 0.2])), r"frequency is 0\.6"),
    *((build, r"too long, .*: in torch\.float32 its filter does not decay") for build in (
        lambda: LowPassSynapse(3, torch.tensor([1.0, math.inf, 2.0])),
        lambda: LowPassSynapse(3, 1e9, unit_energy=True),
        lambda: DualExponentialSynapse(1, 5000.0, 4000.0),
        lambda: ResonantSynapse(3, 1e18, 0.1),
        lambda: ResonantSynapse(1, 5000.0, 0.0))),
    *((build, "too near the edge of the stable set") for build in (
        lambda: LowPassSynapse(3, torch.tensor([10.0, 1e4, 4e6]), **STABLE),
        lambda: ResonantSynapse(256, log_spaced(10, 10_000), log_spaced(1e-4, 1 / 4), **STABLE))),
    *((lambda m=m: LowPassSynapse(3, 4.0, **STABLE, margin=m), f"margin is {m}")
      for m in (0.0, -0.1, 1.0, math.nan)),
    (lambda: LowPassSynapse(3, 4.0, constraint="stabel"), "stabel.*none.*stable"),
    (lambda: IIRSynapse(1, ORDER_30, [1.0], **STABLE), "30 cannot be kept stable, expected ord"),
    (lambda: IIRSynapse(3, (0.5,), ()), "beta_0"),
    (lambda: IIRSynapse(3, (0.1, torch.zeros(2)), (1.0,)), r"\(2,\), expected \(3,\) or a number"),
    (lambda: LowPassSynapse(3, 4.0)(torch.zeros(5, 2, 4)), r"x has shape \(5, 2, 4\), .*\(3,\)"),
    (lambda: LowPassSynapse(3, 4.0)(torch.zeros(5, 1, 3), torch.zeros(2, 1, 2, 3).unbind()),
     r"\(1, 2, 3\).*\(1, 1, 3\)"),
    *((lambda n=n: Repeat(n), f"copies is {n}, expected a whole number")
      for n in (0, -1, 1.5, None)),
]  # fmt: skip


@pytest.mark.parametrize(("call", "words"), REFUSED)
def test_bad_settings_and_inputs_are_refused(call, words):
    with pytest.raises((ValueError, TypeError), match=words):
        call()


@pytest.mark.parametrize("constraint", ["none", "stable"])
def test_positions_of_a_map_of_any_size_share_a_filter(constraint):
    shared = DualExponentialSynapse((3, 1, 1), 4.0, 1.0, constraint=constraint)
    with torch.no_grad():
        scale = 0.5 if constraint == "stable" else -0.2  # some of them unstable, or none
        shared.alpha.mul_(1.0 + scale * torch.rand_like(shared.alpha))
    for size in (2, 5):
        repeated = DualExponentialSynapse((3, size, size), 4.0, 1.0, constraint=constraint)
        repeated.load_state_dict(
            {k: v.expand(-1, 3, size, size).clone() for k, v in shared.state_dict().items()}
        )
        x = (torch.rand(7, 2, 3, size, size) < 0.4).float()
        lengths = torch.tensor([7, 3])
        results = [synapse(x, lengths=lengths) for synapse in (shared, repeated)]
        torch.testing.assert_close(*results, rtol=0.0, atol=0.0)
        shared.zero_grad()
        for psp, _ in results:
            psp.square().mean().backward()
        for one, many in zip(shared.parameters(), repeated.parameters(), strict=True):
            torch.testing.assert_close(one.grad, many.grad.sum((2, 3), keepdim=True))
        parts, _ = in_parts(shared, x, [4, 3])
        torch.testing.assert_close(parts, shared(x)[0], rtol=0.0, atol=0.0)


# Coefficients in an optimiser


def network():
    return Sequential(
        DualExponentialSynapse(6, 4.0, 1.0),
        nn.Linear(6, 5),
        SpikingNeuron(5, 4.0),
        LowPassSynapse(5, 4.0),
        nn.Linear(5, 4, bias=False),
        IIRSynapse(4, (0.5,), (1.0, 0.2), train_beta=False),
    )


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_filters_are_loaded_on_a_device(kind):
    slow, other = (LowPassSynapse(3, tau, constraint="stable") for tau in (2000.0, 4.0))
    with ClaimedDevice(kind):
        other.to(kind).load_state_dict(slow.state_dict())
        assert other.margin == slow.margin
        assert torch.equal(other.effective_alpha().cpu(), slow.alpha)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_coefficients_learn_at_the_scaled_rate_and_weights_alone_decay(kind):
    model = network()
    optimizer = kind(parameter_groups(model, 0.04, 0.25), lr=1.0, weight_decay=0.5)
    weights, coefficients = optimizer.param_groups
    assert (weights["lr"], weights["weight_decay"]) == (0.04, 0.5)
    assert (coefficients["lr"], coefficients["weight_decay"]) == (0.01, 0.0)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        kept = 1 - 0.04 * 0.5 if "weight" in name or "bias" in name else 1
        torch.testing.assert_close(parameter, kept * before[name])


def test_a_network_without_trained_filters_has_one_group():
    fixed = DualExponentialSynapse(3, 4.0, 1.0, train_coefficients=False)
    (group,) = parameter_groups(Sequential(fixed, nn.Linear(3, 2)), 0.1)
    assert len(group["params"]) == 2


def test_parametrised_coefficients_are_in_the_coefficients_group():
    synapse = LowPassSynapse(3, 4.0)
    nn.utils.parametrizations.weight_norm(synapse, "alpha")
    (group,) = parameter_groups(synapse, 0.1)
    assert group["weight_decay"] == 0.0
    assert len(group["params"]) == len(list(synapse.parameters()))


def test_a_filter_that_is_kept_stable_causes_no_warning(recwarn):
    with without_warning():  # after which the warning is given once again
        pass
    synapse = LowPassSynapse(3, 4.0, constraint="stable")
    synapse.alpha.data.fill_(1.5)  # as an optimiser may leave it
    synapse(torch.rand(9, 2, 3))[0].sum().backward()
    assert not recwarn.list
