"""Chunks of time: output, state, dropout and gradients are those of the whole run."""

import pytest
import torch
from small_networks import TAU_M, TAU_S, Operators, parts, ragged_network, spike_trains, two_layers
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from snn_lib.cells import DualExponentialSynapse, SpikingNeuron
from snn_lib.chunks import Chunked, UnfitOutputError
from snn_lib.containers import Output, Sequential, StatefulModule, detach
from snn_lib.recomputing import current_chunk, is_recomputing

EXACT = {"rtol": 0.0, "atol": 0.0}


class OwnNetwork(nn.Module):
    """A network of one's own, with a state of another form."""

    def __init__(self):
        super().__init__()
        self.weights, self.neurons = nn.Linear(12, 5), SpikingNeuron(5, TAU_M, True, dropout=0.2)
        nn.init.normal_(self.weights.weight, 0.1, 0.5)

    def forward(self, x, state=None):
        spikes, of_neurons = self.neurons(self.weights(x), state and state["neurons"])
        return spikes, {"neurons": of_neurons}


class Resampled(nn.Module):
    """A layer that sees every step of the input twice."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, state=None):
        return self.layer(x.repeat_interleave(2, 0), state)


CHUNKED = {
    "synapse": lambda: DualExponentialSynapse(12, TAU_M, TAU_S, constraint="stable"),
    "neuron": lambda: SpikingNeuron(12, TAU_M, dropout=0.3),
    "network": lambda: two_layers(dropout=0.3),
    "gru": lambda: nn.GRU(12, 5),
    "own": OwnNetwork,
    "twice as many steps": lambda: Resampled(SpikingNeuron(12, TAU_M, dropout=0.3)),
}


def whole_and_chunked(module, x, steps, state=None, **options):
    """Output, last state and gradients of a seeded run at once, and of one in chunks."""
    results = []
    for run in (module, Chunked(module, steps)):
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        output, last = run(leaf, state, **options)
        weights = torch.linspace(0.5, 1.5, output.numel()).view_as(
            output
        )  # no step is like another
        loss = (output * weights).sum() + sum(part.square().sum() for part in parts(last))
        gradients = torch.autograd.grad(loss, [leaf, *module.parameters()])
        results.append((output, parts(last), gradients, torch.rand(1)))
    return results


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("steps", [1, 7, 25, 100])
@pytest.mark.parametrize("build", CHUNKED.values(), ids=CHUNKED)
def test_a_run_in_chunks_is_the_whole_run_with_its_dropout_and_gradients(build, steps, training):
    module = build().double().train(training)
    x = 2 * spike_trains().double()
    (output, state, gradients, after), chunked = whole_and_chunked(module, x, steps)
    assert output.abs().sum() > 0
    torch.testing.assert_close(chunked[0], output, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(chunked[1], state, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(chunked[2], gradients, rtol=1e-9, atol=1e-9)
    assert torch.equal(chunked[3], after)  # as many random numbers were drawn


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
def test_lengths_may_be_of_any_whole_type(dtype):
    network, x = Sequential(DualExponentialSynapse(3, TAU_M, TAU_S)), torch.rand(9, 4, 3)
    lengths = torch.tensor([9, 1, 4, 6])
    ((expected, _),) = network(x, lengths=lengths)[1]
    ((found, _),) = Chunked(network, 3)(x, lengths=lengths.to(dtype))[1]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (torch.tensor([9.0, 1.5, 4.0, 6.0]), "expected whole numbers"),
        (torch.tensor([True, False, True, True]), "expected whole numbers"),
        (torch.tensor([9, 1]), r"of shape \(4,\)"),
        ([9, 1, 4, 6], "lengths are a list"),
    ],
)
@pytest.mark.parametrize("batch_first", [False, True])
def test_lengths_that_are_not_a_whole_number_for_each_sequence_are_refused(
    lengths, message, batch_first
):
    network = Sequential(DualExponentialSynapse(3, TAU_M, TAU_S), batch_first=batch_first)
    x = torch.rand(4, 9, 3) if batch_first else torch.rand(9, 4, 3)
    with pytest.raises(ValueError, match=message):
        Chunked(network, 3)(x, lengths=lengths)


class Fixed(StatefulModule):
    """A part of it stays in evaluation mode, whatever it is put into."""

    def __init__(self):
        super().__init__()
        self.front, self.layer = nn.Linear(3, 3), DualExponentialSynapse(3, TAU_M, TAU_S)

    def forward(self, x, state=None, lengths=None):
        self.front.eval()
        return self.layer(self.front(x), state)


def test_a_module_may_put_a_part_of_it_into_evaluation_mode_as_it_runs():
    module, x = Fixed(), torch.rand(6, 2, 3)
    found = []
    for model in (module, Chunked(module, 2)):
        module.train()
        module.zero_grad()
        model(x)[0].square().sum().backward()
        found.append(module.front.weight.grad.clone())
    torch.testing.assert_close(*found)


class Squashed(nn.Module):
    def forward(self, x):
        return torch.sigmoid(x)


@pytest.mark.parametrize(("number", "name"), [(1, "reset_decay"), (2, "alpha")])
def test_coefficients_with_a_parametrisation_learn_in_chunks(number, name):
    x = 3 * torch.randn(9, 3, 4)
    layers = SpikingNeuron(6, 4.0, train_decay=True), DualExponentialSynapse(6, TAU_M, TAU_S)
    network = Sequential(nn.Linear(4, 6), *layers, nn.Linear(6, 2))
    register_parametrization(network[number], name, Squashed())
    found = []
    for model in (network, Chunked(network, 4)):
        network.zero_grad()
        model(x)[0].sin().sum().backward()
        found.append([parameter.grad.clone() for parameter in network.parameters()])
    assert all(gradient.any() for gradient in found[0])
    torch.testing.assert_close(found[1], found[0])


def test_dropout_of_pytorch_is_the_same_when_a_chunk_runs_again():
    torch.manual_seed(1)
    network = Sequential(SpikingNeuron(12, TAU_M, dropout=0.3), nn.Dropout(0.5), nn.Linear(12, 5))
    network, x = network.double(), (2 * spike_trains()).double()
    torch.manual_seed(3)
    kept = []
    network[2].register_forward_pre_hook(lambda layer, args: kept.append(args[0].detach()))
    Chunked(network, 7)(x)[0].sum().backward()
    forward, again = kept[:4], kept[4:]
    assert all(torch.equal(*pair) for pair in zip(forward, again[::-1], strict=True))


def test_dropout_of_neurons_is_the_same_though_no_generator_is_set_back(monkeypatch):
    """That of a second GPU, say, to which the module itself brings its input."""
    elsewhere = torch.Generator().manual_seed(1)
    monkeypatch.setattr(
        "snn_lib.recomputing.draw_seed",
        lambda device: torch.randint(2**40, (2,), generator=elsewhere) * torch.tensor([1, 0]),
    )
    kept = []
    network = two_layers(dropout=0.3)
    network[1].register_forward_hook(lambda layer, args, output: kept.append(args[0].detach()))
    Chunked(network, 10)(spike_trains())[0].sum().backward()
    forward, again = kept[:3], kept[3:]
    assert all(torch.equal(*pair) for pair in zip(forward, again[::-1], strict=True))


def test_a_run_in_chunks_begins_with_a_state_and_hands_it_its_gradient():
    network, x = two_layers().double(), spike_trains().double()
    _, state = network(spike_trains(5).double().requires_grad_())
    found = []
    for run in (network, Chunked(network, 4)):
        output, _ = run(x, state)
        found.append(torch.autograd.grad(output.sum(), state[0][0], retain_graph=True))
    assert found[0][0].abs().sum() > 0
    torch.testing.assert_close(found[1], found[0])


def test_a_network_with_batch_first_and_a_last_layer_without_a_state_runs_in_chunks():
    network = two_layers().append(nn.Linear(5, 3)).double()
    network.batch_first = True
    x = spike_trains().double().transpose(0, 1)
    whole, chunked = whole_and_chunked(network, x, 6)
    assert whole[0].shape == (8, 25, 3)
    for one, other in zip(whole[:3], chunked[:3], strict=True):
        torch.testing.assert_close(other, one)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("steps", [3, 5])  # fewer and more than there are sequences
def test_a_run_in_chunks_ends_with_the_state_at_each_sequence_s_own_end(steps, batch_first):
    network, x = ragged_network(), 2 * torch.rand(9, 4, 6).double()
    nn.init.normal_(network[1].weight, 0.5)
    lengths = torch.tensor([9, 1, 5, 6])
    whole, state = network(x, lengths=lengths)
    network.batch_first = batch_first
    output, last = Chunked(network, steps)(x.transpose(0, 1) if batch_first else x, None, lengths)
    output = output.transpose(0, 1) if batch_first else output
    torch.testing.assert_close(parts(last), parts(state))
    for b, length in enumerate(lengths):
        torch.testing.assert_close(output[:length, b], whole[:length, b], **EXACT)


def test_a_run_in_chunks_keeps_states_and_the_input_alone():
    """All that the graph of the network itself would keep is what a chunk leaves out."""

    def kept(module, x):
        sizes = {}

        def count(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            module(x)
        return sum(sizes.values())

    network, x = two_layers(), spike_trains(60)
    weights = sum(parameter.nbytes for parameter in network.parameters())
    assert kept(network, x) > 2 * x.nbytes
    assert kept(Chunked(network, 10), x) <= weights + x.nbytes


def test_the_gradient_of_the_input_costs_no_more_per_step_in_a_longer_run():
    def elements(steps):
        network, x = Chunked(two_layers(), 5), torch.rand(steps, 2, 12, requires_grad=True)
        with Operators() as counted:
            network(2 * x)[0].sum().backward()
        return counted.elements / steps

    assert elements(200) < 1.2 * elements(50)


def test_chunks_run_again_in_reverse_order_and_hooks_can_tell():
    network, x, seen = two_layers(), spike_trains(10), []
    network[1].register_forward_hook(
        lambda *_: seen.append((current_chunk().start, is_recomputing()))
    )
    Chunked(network, 4)(x)[0].sum().backward()
    assert seen == [(0, False), (4, False), (8, False), (8, True), (4, True), (0, True)]
    assert current_chunk() is None
    assert not is_recomputing()


def test_filters_are_pulled_back_in_the_forward_pass_and_not_when_a_chunk_runs_again():
    synapse = DualExponentialSynapse(12, TAU_M, TAU_S, constraint="stable")
    synapse.alpha.data.fill_(3.0)
    output, _ = Chunked(synapse, 4)(spike_trains(10))
    inside = synapse.alpha.detach().clone()
    assert synapse.pole_radius() < 1
    synapse.alpha.data.mul_(0.5)
    changed = synapse.alpha.detach().clone()
    assert (changed != inside).any()
    output.sum().backward()
    assert torch.equal(synapse.alpha, changed)


def test_a_run_in_chunks_needs_no_gradients_and_no_steps():
    network, x = two_layers(dropout=0.3).eval(), spike_trains()
    with torch.no_grad():
        torch.testing.assert_close(Chunked(network, 6)(x), network(x), rtol=0.0, atol=1e-6)
    assert Chunked(network, 6)(x[:0])[0].shape == (0, 8, 5)


def test_losses_of_chunks_add_up_to_that_of_the_whole_run():
    """The way of sequences that are too long to keep their output."""

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = two_layers().double()

        def forward(self, x, state=None):
            inputs, target = x
            output, state = self.network(inputs, state)
            return (output - target.double()).square().sum()[None], state

    model, x, target = Loss(), spike_trains().bool(), spike_trains(channels=5).bool()
    losses, _ = Chunked(model, 10)((x, target))
    assert losses.shape == (3,)
    losses.sum().backward()
    found = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    loss = (model.network(x)[0] - target.double()).square().sum()
    torch.testing.assert_close(losses.sum(), loss)
    loss.backward()
    torch.testing.assert_close(found, [parameter.grad for parameter in model.parameters()])


def test_a_compiled_module_runs_in_chunks_and_a_chunked_one_cannot_be_compiled():
    torch.compiler.reset()
    network, x = two_layers(dropout=0.3), spike_trains(12)
    chunked = Chunked(torch.compile(network, backend="aot_eager"), 4)
    torch.manual_seed(0)
    output, _ = chunked(x)
    found = torch.autograd.grad(output.sum(), list(network.parameters()))
    assert all(torch.isfinite(gradient).all() for gradient in found)
    with pytest.raises(Exception, match=r"Chunked\(torch\.compile\(module\)"):
        torch.compile(Chunked(network, 4), backend="eager", fullgraph=True)(x)


@pytest.mark.parametrize("batch_first", [False, True])
def test_the_loss_of_chunks_may_be_a_number(batch_first):
    class Loss(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network, self.batch_first = network, network.batch_first

        def forward(self, x, state=None):
            output, state = self.network(x, state)
            return output.square().sum(), state

    network, x = two_layers().double(), spike_trains().double()
    expected = torch.stack([part.square().sum() for part in network(x)[0].split(10)])
    network.batch_first = batch_first
    losses, _ = Chunked(Loss(network), 10)(x.transpose(0, 1) if batch_first else x)
    torch.testing.assert_close(losses, expected)
    losses.sum().backward()


REFUSED = [  # what is built or run, and the words
    (lambda: Chunked(two_layers(), 0), "steps is 0"),
    (lambda: Chunked(nn.Linear(12, 5), 4), "Linear takes no state, so it cannot run in chunks"),
    (lambda: Chunked(Sequential(nn.GRU(12, 5, bidirectional=True)), 4),
     r"bidirectional=True\) reads time both ways"),
    (lambda: Chunked(Stateless(), 4)(spike_trains()),
     r"Stateless returned Tensor, expected \(output, state\)"),
    (lambda: Chunked(Talkative(), 4)(spike_trains()),
     r"Talkative returned tuple, expected \(output, state\)"),
    (lambda: Chunked(two_layers(), 4)((spike_trains(), spike_trains(24))), r"\[25, 24\] steps"),
    (lambda: Chunked(two_layers(), 4)(spike_trains().numpy()), "x is a ndarray, expected a tensor"),
    (lambda: Chunked(Chunked(two_layers(), 4), 10), "Chunked holds another Chunked: let only one"),
    (lambda: Chunked(lambda x, state: Chunked(two_layers(), 4)(x, state), 10)(spike_trains()),
     "in the chunks of another"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "words"), REFUSED)
def test_modules_and_inputs_that_cannot_run_in_chunks_are_refused(call, words):
    with pytest.raises((ValueError, TypeError, RuntimeError), match=words):
        call()


def test_a_module_that_hides_a_part_with_batch_first_is_refused():
    network = Resampled(two_layers())
    network.layer.batch_first = True
    with pytest.raises(ValueError, match="Resampled has a part with batch_first: give Res"):
        Chunked(network, 4)
    network.batch_first = False
    Chunked(network, 4)


def change_a_weight(network, x, state):
    with torch.no_grad():
        network[1].weight.mul_(2)


def change_a_buffer(network, x, state):
    network[2].reset_decay.mul_(0.5)


def replace_a_buffer(network, x, state):
    network[2].reset_decay = network[2].reset_decay / 2


def refill_the_input(network, x, state):
    x[0].zero_()


def refill_the_state(network, x, state):
    state["layers"][0][0].zero_()


def leave_training(network, x, state):
    network.eval()


@pytest.mark.parametrize(
    "change",
    [
        *(change_a_weight, change_a_buffer, replace_a_buffer, refill_the_input, refill_the_state),
        leave_training,
    ],
)
def test_weights_buffers_inputs_states_and_modes_that_have_changed_are_refused(
    change,
):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = two_layers()

        def forward(self, x, state=None):  # with inputs and a state of another form
            output, state = self.network(x[0] + x[1], state and state["layers"])
            return output, {"layers": state}

    model, x = Pair(), (spike_trains(), spike_trains())
    state = detach(model(x)[1])
    output, _ = Chunked(model, 4)(x, state)
    change(model.network, x, state)
    with pytest.raises(RuntimeError, match="Chunked runs each chunk again"):
        output.sum().backward()


def test_running_averages_may_change_while_chunks_run():
    class Normalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.network, self.norm = two_layers(), nn.BatchNorm1d(5)

        def forward(self, x, state=None):
            output, state = self.network(x, state)
            return self.norm(output.flatten(0, 1)).unflatten(0, output.shape[:2]), state

    model = Normalised()
    Chunked(model, 5)(spike_trains())[0].square().sum().backward()
    assert model.norm.num_batches_tracked == 10  # five chunks, each of them twice
    assert model.network[1].weight.grad.any()


def test_a_backward_pass_through_functional_call_is_refused():
    chunked, x = Chunked(two_layers(), 4), spike_trains()
    others = {name: p.detach().clone() for name, p in chunked.named_parameters()}
    others = {name: p.requires_grad_() for name, p in others.items()}
    output, _ = torch.func.functional_call(chunked, others, (x,))
    with pytest.raises(RuntimeError, match="Chunked runs each chunk again"):
        output.sum().backward()
    with torch.no_grad():
        torch.func.functional_call(chunked, others, (x,))


class Talkative(nn.Module):
    """Returns its input beside the output and a state."""

    def forward(self, x, state=None):
        return 2 * x, state, x


class Stateless(nn.Linear):
    def __init__(self):
        super().__init__(12, 5)

    def forward(self, x, state=None):
        return super().forward(x)


def test_gradients_of_weights_in_low_precision_are_added_up_in_that_of_the_weights():
    network, x = Sequential(nn.Linear(6, 20), nn.Linear(20, 3)), torch.randn(4000, 4, 6)

    def slopes(model, enabled=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            model(x)[0].float().square().mean().backward()
        found = [parameter.grad.clone() for parameter in network.parameters()]
        network.zero_grad()
        return found

    exact, whole = slopes(network, enabled=False), slopes(network)
    for one, other, own in zip(exact, whole, slopes(Chunked(network, 20)), strict=True):
        assert (own - one).norm() < 2 * (other - one).norm() + 1e-3 * one.norm()


def test_an_output_that_is_no_tensor_is_refused():
    class Heads(StatefulModule):
        def forward(self, x, state=None):
            return (x, x), state

    with pytest.raises(TypeError, match="the output of Heads is a tuple, expected a tensor"):
        Chunked(Heads(), 2)(torch.rand(4, 2, 3))


class Doubling(StatefulModule):
    """A layer without a state."""

    def forward(self, x, state=None, lengths=None):
        return Output(2 * x, None)


class Residual(StatefulModule):
    """Adds its input to the output of a layer whose state it forgets."""

    def __init__(self):
        super().__init__()
        self.layer = DualExponentialSynapse(3, TAU_M, TAU_S)

    def forward(self, x, state=None, lengths=None):
        return Output(x + self.layer(x).output, None)


@pytest.mark.parametrize("around", [[], [nn.Linear(3, 3)], [SpikingNeuron(3, 4.0)]])
def test_a_part_that_forgets_its_state_is_refused_at_the_second_chunk(around):
    module = Sequential(*around, Sequential(Residual()), nn.ReLU()) if around else Residual()
    Chunked(module, 6)(torch.rand(6, 2, 3))
    with pytest.raises(UnfitOutputError, match=r"Residual returned no state, so that its DualExp"):
        Chunked(module, 3)(torch.rand(6, 2, 3))


class OwnStates(Sequential):
    """Its states have a form of their own."""

    def forward(self, x, state=None, lengths=None):
        output, state = super().forward(x, None if state is None else state[0], lengths)
        return Output(output, (state, None))


def test_a_chain_with_a_forward_and_states_of_its_own_runs_in_chunks():
    module, x = (
        OwnStates(nn.Linear(4, 4), DualExponentialSynapse(4, TAU_M, TAU_S)),
        torch.rand(7, 2, 4),
    )
    torch.testing.assert_close(Chunked(module, 3)(x)[0], module(x)[0])
    chain = Sequential(*module)
    chain.forward = module.forward
    torch.testing.assert_close(Chunked(chain, 3)(x)[0], module(x)[0])


class Sub(torch.Tensor):
    pass


def test_tensors_of_a_user_s_own_class_have_the_gradients_of_the_whole_run_in_chunks():
    layers = nn.Linear(8, 40), SpikingNeuron(40, 4.0), nn.Linear(40, 40), SpikingNeuron(40, 4.0)
    network, x = Sequential(*layers, nn.Linear(40, 3)), 2 * torch.randn(12, 5, 8)
    found = []
    for model, given in ((network, x), (Chunked(network, 5), x.as_subclass(Sub))):
        network.zero_grad()
        model(given)[0].sin().sum().backward()
        found.append([p.grad.as_subclass(torch.Tensor) for p in network.parameters()])
    torch.testing.assert_close(found[1], found[0])


def test_a_layer_without_a_state_runs_in_chunks():
    x = torch.rand(6, 2, 3)
    assert torch.equal(Chunked(Doubling(), 3)(x)[0], 2 * x)


class Forgetting(nn.Module):
    def __init__(self):
        super().__init__()
        self.neurons = SpikingNeuron(3, 4.0)

    def forward(self, x, state=None):
        return self.neurons(x)[0], None


def test_a_module_that_returns_no_states_is_refused_at_its_second_chunk():
    x = torch.rand(6, 2, 3)
    assert torch.equal(Chunked(Forgetting(), 6)(x)[0], Forgetting()(x)[0])
    with pytest.raises(TypeError, match="Forgetting returned no state, so that its Spik"):
        Chunked(Forgetting(), 3)(x)


def test_chunks_of_a_module_in_evaluation_mode_are_in_evaluation_mode():
    """Else a loop that puts the mode back would train what nobody trained."""
    for training in (True, False):
        assert Chunked(two_layers().train(training), 4).training == training
