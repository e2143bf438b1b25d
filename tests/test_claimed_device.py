"""The claimed device that other tests rely on: it computes as the CPU and refuses as CUDA."""

import copy

import pytest
import torch
from claimed_device import ClaimedDevice
from torch import nn
from torch.optim.swa_utils import AveragedModel

from snn_lib import DualExponentialSynapse, Sequential, SpikingNeuron

LINE = "tests/test_claimed_device.py"


@pytest.fixture
def claimed():
    with ClaimedDevice() as device:
        yield device


def model():
    torch.manual_seed(0)
    return Sequential(DualExponentialSynapse(4, 4.0, 1.0), nn.Linear(4, 3), SpikingNeuron(3, 4.0))


def trained(device, fused=True):
    """Weights after two steps of an optimiser, and their moving average."""
    network = model().to(device)
    average = AveragedModel(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, fused=fused)
    x = torch.ones(6, 2, 4, device=device)
    for _ in range(2):
        optimizer.zero_grad()
        (network(x)[0].mean() - network[1](x).square().mean()).backward()
        optimizer.step()
        average.update_parameters(network)
    assert all(p.device == p.grad.device == x.device for p in network.parameters())
    return [p.cpu() for p in (*network.parameters(), *average.parameters())]


def test_the_claimed_device_trains_as_the_cpu_does(claimed):
    for on_device, on_cpu in zip(trained("cuda"), trained("cpu"), strict=True):
        assert type(on_device) is nn.Parameter or type(on_device) is torch.Tensor
        torch.testing.assert_close(on_device, on_cpu)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(2, device="cuda"),
        lambda: torch.tensor([1.0, 2.0], device=torch.device("cuda")),
        lambda: torch.rand(2, device="cuda:0"),
        lambda: torch.ones(2).to("cuda"),
        lambda: torch.ones(2).cuda(),
        lambda: torch.ones(2, device="cuda") * torch.tensor(2.0),
        lambda: torch.ones(2, device="cuda").new_zeros(3)[1:].view(2, 1),
        lambda: torch.ones(2).new_zeros(3, device="cuda"),
        lambda: torch.zeros_like(torch.ones(2), device="cuda"),
        lambda: nn.Linear(2, 2).cuda().weight,
        lambda: nn.Linear(2, 2, device="cuda").to(torch.float64).bias,
        lambda: copy.deepcopy(nn.Linear(2, 2, device="cuda")).weight,
        lambda: torch.zeros(2, device="cuda").copy_(torch.ones(2)),
        lambda: torch.ones(2, device="cuda")[torch.tensor([0])],
    ],
)
def test_tensors_that_are_made_or_moved_there_are_on_the_device(claimed, make):
    assert make().device == torch.device("cuda:0")
    assert make().is_cuda
    assert make().cpu().device == torch.device("cpu")


@pytest.mark.parametrize(
    ("do", "message"),
    [
        (lambda x: x + torch.ones(2), "same device, but found at least two devices, cuda:0 and"),
        (lambda x: torch.stack([x[0], torch.tensor(1.0)]), "same device"),
        (lambda x: torch.cat([x, torch.zeros(1)]), "same device"),
        (lambda x: nn.Linear(2, 2)(x), "same device"),
        (lambda x: nn.Linear(2, 2).to("cuda")(torch.ones(2)), "same device"),
        (lambda x: x.copy_(torch.zeros(2)) + torch.zeros(2), "same device"),
        (lambda x: torch.ones(2)[x.long()], "same device"),
        (lambda x: x.index_put((x.long(),), torch.ones(2)), "same device"),
        (
            lambda x: torch.rand(2, device="cuda", generator=torch.Generator()),
            "Expected a 'cuda' device type for generator but found 'cpu'",
        ),
        (lambda x: x.numpy(), "can't convert cuda:0 device type tensor to numpy"),
    ],
)
def test_operations_that_cuda_refuses_are_refused(claimed, do, message):
    with pytest.raises((RuntimeError, TypeError), match=message):
        do(torch.ones(2, device="cuda"))


@pytest.mark.parametrize(
    ("do", "operation"),
    [
        (lambda x: x[0].item(), "_local_scalar_dense"),
        (lambda x: float(x[0]), "_local_scalar_dense"),
        (lambda x: int(x[0]), "_local_scalar_dense"),
        (lambda x: bool(x[0]), "_local_scalar_dense"),
        (lambda x: x.tolist(), "_to_copy"),
        (lambda x: x.cpu(), "_to_copy"),
        (lambda x: x.to("cpu"), "_to_copy"),
        (lambda x: torch.zeros(2).copy_(x), "copy_"),
        (lambda x: torch.zeros(2).to("cuda"), "_to_copy"),
        (lambda x: torch.zeros(2).to("cuda", non_blocking=True), "_to_copy"),
        (lambda x: torch.zeros(2).pin_memory().to("cuda"), "_to_copy"),
        (lambda x: torch.tensor([1.0], device="cuda"), "_to_copy"),
        (lambda x: x.copy_(torch.zeros(2)), "copy_"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x[x > 0], "index"),
        (lambda x: x[torch.tensor([0])], "index"),
        (lambda x: torch.equal(x, x), "equal"),
        (lambda x: x.long().bincount(), "bincount"),
        (lambda x: x.repeat_interleave(x.long()), "repeat_interleave"),
        (lambda x: str(x), "_to_copy"),
    ],
)
def test_operations_that_wait_for_the_device_are_counted_with_their_lines(claimed, do, operation):
    x = torch.ones(2, device="cuda")
    do(x)
    ((line, found), times), *others = claimed.waits.items()
    assert (found, times, others) == (operation, 1, [])
    assert line.startswith(f"{LINE}:{do.__code__.co_firstlineno} ")


def test_operations_that_do_not_wait_are_not_counted(claimed):
    x = torch.ones(4, device="cuda", requires_grad=True)
    torch.zeros(4).pin_memory().to("cuda", non_blocking=True).copy_(x.detach())
    y = (x * torch.tensor(2.0)).clone()
    y[y > 3] = 0.0
    y[torch.zeros(1, dtype=torch.int64, device="cuda")].sum().backward()
    x.detach().repeat_interleave(torch.arange(4, device="cuda"), output_size=6)
    torch.rand(3, device="cuda")
    assert not claimed.waits


def test_the_device_has_random_numbers_of_its_own(claimed):
    torch.manual_seed(1)
    here, there = torch.rand(3), torch.rand(3, device="cuda")
    assert torch.equal(here, there.cpu())
    state = torch.cuda.get_rng_state()
    one = torch.randint(100, (9,), device="cuda").tolist()
    torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.randint(100, (9,), device="cuda").tolist() == one


def test_autocast_rounds_matrix_products(claimed):
    layer, x = nn.Linear(2, 3).to("cuda"), torch.ones(4, 2, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer(x).dtype == torch.float32


def test_files_hold_tensors_of_the_cpu(claimed, tmp_path):
    network = model().to("cuda")
    torch.save(network.state_dict(), tmp_path / "file")
    state = torch.load(tmp_path / "file", map_location="cpu", weights_only=True)
    assert all(type(value) is torch.Tensor for value in state.values())
    other = model().to("cuda")
    with torch.no_grad():
        other[1].weight.zero_()
    other.load_state_dict(state)
    assert torch.equal(other[1].weight, network[1].weight)


def test_mps_has_no_float64():
    with ClaimedDevice("mps"):
        assert torch.ones(2, device="mps").sum().device == torch.device("mps:0")
        with pytest.raises(TypeError, match="float64"):
            torch.ones(2, device="mps").double()


def test_the_claimed_device_leaves_nothing_behind():
    before = torch.cuda.is_available, torch.Tensor.pin_memory, torch.cuda.get_rng_state
    with ClaimedDevice():
        x = torch.ones(2, device="cuda")
    assert before == (torch.cuda.is_available, torch.Tensor.pin_memory, torch.cuda.get_rng_state)
    with pytest.raises(RuntimeError, match="device is gone"):
        x + 1
