"""The networks that are compared compute the same."""

from dataclasses import replace

import pytest
import torch

from snn_lib.containers import WEIGHTED


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("DIGITS", "TimeLast"),
        ("MEMORY", "TimeLast"),
        ("DIGITS", "Loop"),
        ("MEMORY", "Loop"),
        ("MAPS", "Loop"),
    ],
)
def test_the_other_implementations_compute_what_this_library_computes(name, other):
    import networks

    network = replace(getattr(networks, name).small(), dropout=0.0)
    x, loss = network.data("cpu")
    x = (torch.rand(x.shape) < 0.5).float()  # enough of them to fire
    torch.manual_seed(0)
    models = networks.SNN(network), getattr(networks, other)(network)
    weights, others = ([m for m in model.modules() if isinstance(m, WEIGHTED)] for model in models)
    for own, same in zip(weights, others, strict=True):
        same.load_state_dict(own.state_dict())
    ours, theirs = (model(x) for model in models)
    assert 0 < ours.mean() < 1
    assert torch.equal(ours, theirs)
    for output in (ours, theirs):
        loss(output).backward()
    for own, same in zip(weights, others, strict=True):
        torch.testing.assert_close(own.weight.grad, same.weight.grad, rtol=1e-5, atol=1e-7)


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
