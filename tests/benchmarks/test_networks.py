"""The networks that are compared compute the same."""

from dataclasses import replace

import pytest
import torch
from torch import nn


@pytest.mark.parametrize("network", ["DIGITS", "MEMORY"])
def test_both_interfaces_compute_the_same_network(network):
    import networks

    network = replace(getattr(networks, network).small(), dropout=0.0)
    models = [build(network) for build in (networks.SNN, networks.TimeLast, networks.Loop)]
    weights = [
        [p for m in model.modules() if isinstance(m, nn.Linear) for p in m.parameters()]
        for model in models
    ]
    for others in weights[1:]:
        for own, other in zip(weights[0], others, strict=True):
            other.data.copy_(own.data)
    x = torch.rand(network.steps, network.batch, network.inputs)
    expected = models[0](x)
    assert 0 < expected.mean() < 1
    for model in models[1:]:
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("name", ["MEMORY", "MAPS"])
def test_the_loop_computes_what_this_library_computes(name):
    import networks

    network = replace(getattr(networks, name).small(), dropout=0.0)
    x, loss = network.data("cpu")
    x = (torch.rand(x.shape) < 0.5).float()  # enough of them to fire
    found = []
    for build in (networks.SNN, networks.Loop):
        torch.manual_seed(0)
        model = build(network)
        output = model(x)
        loss(output).backward()
        found.append((output, [m.weight.grad for m in model.modules() if hasattr(m, "weight")]))
    (ours, ours_grad), (loops, loops_grad) = found
    assert ours.any()
    assert torch.equal(ours, loops)
    for one, other in zip(ours_grad, loops_grad, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_the_loss_of_chunks_is_that_of_the_whole(monkeypatch):
    import networks

    monkeypatch.setattr(networks, "CHUNK", 2)  # of three steps
    network = replace(networks.MEMORY.small(), dropout=0.0)
    found = []
    for build, data in (
        (networks.SNN, networks.Network.data),
        (networks.ChunkedLoss, networks.Network.trains_and_loss),
    ):
        torch.manual_seed(0)
        model = build(network)
        x, loss = data(network, "cpu")
        error = loss(model(x))
        error.backward()
        found.append((error, [parameter.grad for parameter in model.parameters()]))
    torch.testing.assert_close(*found)
    assert found[0][0] > 0
