"""What ``--test`` reports of a classification of anyone's sequences, padded ones among them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from snn_lib import Chunked, LowPassSynapse, Sequential, SpikingNeuron
from snn_lib.data.batches import Batch, Split
from snn_lib.inspection.activity import Activity
from snn_lib.inspection.operations import CountedNetwork, Operations
from snn_lib.readout import SpikeCount
from snn_lib.settings import ExperimentConfig
from snn_lib.tasks import SequenceClassification
from snn_lib.tasks.base import output_of
from snn_lib.tasks.classification import CountClassification, describe_energy
from snn_lib.tasks.event_vision import EventConfig

LENGTHS = [12, 5, 9, 30, 30]


def task_and_model(readout):
    torch.manual_seed(0)
    x = [(torch.rand(length, 4) < 0.4).float() for length in LENGTHS]
    task = SequenceClassification(
        {"train": (x, [0, 1, 2, 0, 1]), "test": (x, [0, 1, 2, 0, 1])}, readout
    )
    config = ExperimentConfig()
    config.hyperparameters.batch_size = 3  # the batches are padded, to 12 and to 30 steps
    task.setup(config, torch.device("cpu"))
    model = Sequential(nn.Linear(4, 3), LowPassSynapse(3, 3.0), SpikingNeuron(3, 3.0)).eval()
    with torch.no_grad():  # the first class fires on in the padding, the others do not
        model[0].weight.copy_(torch.tensor([[0.0], [0.6], [0.3]]) + 0.05 * torch.randn(3, 4))
        model[0].bias.copy_(torch.tensor([0.35, 0.0, 0.0]))
    return task, model, x


def report(task, model):
    return list(task.report(model, Activity(model)))


def test_outputs_that_are_no_spikes_have_no_lead_of_one_spike():
    task, model, _ = task_and_model("count")
    *_, early = report(task, model[:2])
    assert early.startswith("accuracy if the output is read after so many steps: 10: ")


def test_sequences_that_count_spikes_are_stopped_early_within_their_own_steps():
    task, model, x = task_and_model("count")
    first, second, early, *stopped = report(task, model)
    assert report(task, Chunked(model, 7)) == [first, second, early, *stopped]
    additions = 3 * sum(sequence.sum().item() for sequence in x) / 5
    assert f"({additions:,.0f} additions and 0 multiply-accumulates)" in first
    assert first.endswith("a dense network of this size takes 12 multiply-accumulates per step")
    counted = CountedNetwork(model)
    for sequence in x:
        counted(sequence[:, None])
    spiking = counted.operations().energy()
    assert f"estimate {1e12 * spiking:,.0f} pJ per sequence (45 nm" in second
    assert second.endswith("the dense network's 55 pJ per step")  # 12 times 0.9 + 3.7

    answers, rows = [], {1: [0, 0, 0], 2: [0, 0, 0], 3: [0, 0, 0]}
    for sequence, label in zip(x, [0, 1, 2, 0, 1], strict=True):
        with torch.no_grad():
            total = model(sequence[:, None])[0][:, 0].cumsum(0)
        answers.append(
            [total[min(step, len(total)) - 1].argmax() == label for step in range(1, 31)]
        )
        for lead, row in rows.items():
            ahead = [step for step, t in enumerate(total, 1) if t.topk(2)[0].diff().item() <= -lead]
            step = min([*ahead, len(total)])
            row[0] += (total[step - 1].argmax() == label).item()
            row[1] += step
            row[2] += 3 * sequence[:step].sum().item()
    right = torch.tensor(answers).float().mean(0)
    shares = ", ".join(f"{step}: {100 * right[step - 1]:.2f} %" for step in (10, 20, 30))
    assert early == f"accuracy if the output is read after so many steps: {shares}"
    assert stopped == [
        f"stopped when one class is {lead} spike{'s' if lead > 1 else ''} ahead: "
        f"{20 * correct:.2f} % after {steps / 5:.1f} steps and {operations / 5:,.0f} synaptic "
        "operations"
        for lead, (correct, steps, operations) in rows.items()
    ]


def test_answers_in_bfloat16_add_up_in_float32():
    x, y = torch.rand(40, 400, 4), torch.arange(40) % 3
    task = SequenceClassification({"train": (x, y), "test": (x, y)}, "count")
    config = ExperimentConfig()
    config.hyperparameters.batch_size = 40
    task.setup(config, torch.device("cpu"))
    model = Sequential(nn.Linear(4, 3)).eval()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        _, found, _ = task.stop_early(model)
        (batch,) = task.batches("test")
        outputs = model(batch.x)[0]
    assert outputs.dtype == torch.bfloat16
    answers = outputs.double().cumsum(0).argmax(2)
    assert found == pytest.approx((answers == batch.y).double().mean(1).tolist(), abs=1e-6)


class Soft(CountClassification):
    """The targets are the probabilities of all classes; ``hard`` has the most probable ones."""

    config_class, hard = EventConfig, False

    def make_split(self, split):
        torch.manual_seed(3)
        x, probabilities = torch.rand(20, 12, 4), torch.rand(12, 3).softmax(1)
        y = probabilities.argmax(1) if self.hard else probabilities
        return Split(12, 5, lambda numbers, share, epoch, number: Batch(x[:, numbers], y[numbers]))


class Several(Soft):
    """Each class is right or wrong."""

    def loss(self, model, batch):
        logits = self.logits(output_of(model, batch.x), batch)
        loss = F.binary_cross_entropy_with_logits(logits, batch.y)
        return loss, {"samples": len(logits), "loss": loss.detach(), "correct": 0.0}


def stopped_early(kind, behind=(), **options):
    """What a task of a user's own finds of early answers, with layers behind the neurons."""
    task = type(kind.__name__, (kind,), options)()
    task.setup(task.config_class(), torch.device("cpu"))
    torch.manual_seed(1)
    model = Sequential(nn.Linear(4, 3), SpikingNeuron(3, 2.0), *behind)
    with torch.no_grad():
        model[0].weight.mul_(4)
    return task.stop_early(model, (1, 2))[1:]


def test_the_most_probable_class_is_right_where_targets_are_probabilities():
    accuracy, rows = stopped_early(Soft)
    assert (accuracy, rows) == stopped_early(Soft, hard=True)
    assert len(set(accuracy)) > 1


class SeveralByCrossEntropy(Soft):
    """The same, where each loss of the library's is computed."""

    def cross_entropy(self, model, logits, targets):
        loss = F.binary_cross_entropy_with_logits(logits, targets)
        return loss, {"samples": len(logits), "loss": loss.detach(), "correct": 0.0}


@pytest.mark.parametrize("kind", [Several, SeveralByCrossEntropy])
def test_early_answers_about_several_classes_are_not_judged(kind):
    assert stopped_early(kind) == ([], [])


class Mirrored(Soft):
    """The class whose neuron spikes least answers."""

    def answer(self, output, batch):
        return -super().answer(output, batch)


def test_an_answer_of_one_s_own_is_what_the_loss_and_the_checkpoint_know():
    task = Mirrored()
    task.setup(task.config_class(), torch.device("cpu"))
    batch, model = next(task.batches("train")), Sequential(nn.Linear(4, 3), SpikingNeuron(3, 2.0))
    model[0].weight.data.mul_(4)
    expected = F.cross_entropy(-model(batch.x)[0].sum(0), batch.y)
    torch.testing.assert_close(task.loss(model.eval(), batch)[0], expected)
    assert task.usage()["readout"] is None


class Halve(nn.Module):
    def forward(self, x):
        return x.unflatten(0, (-1, 2)).sum(1)


def test_early_answers_of_a_network_that_leaves_out_steps_are_not_judged():
    assert stopped_early(Soft, behind=[Halve()]) == ([], [])


class First(nn.Module):
    def forward(self, x):
        return x[..., :1]


def test_operations_of_a_network_with_one_output_are_counted_and_its_answers_not_judged():
    assert stopped_early(Soft, behind=[First()]) == ([], [])


def test_a_lead_of_one_spike_means_nothing_if_any_batch_has_other_outputs():
    class Half(nn.Module):
        """Spikes of the first batch, of 5 sequences, count half."""

        def forward(self, x):
            return x / 2 if x.shape[1] == 5 else x

    accuracy, rows = stopped_early(Soft, behind=[Half()])
    assert (len(accuracy), rows) == (20, [])


def test_an_energy_has_digits_however_small_it_is():
    for count, text in ((1, "5 pJ"), (500, "2,300 pJ"), (10**5, "0.46 uJ"), (10**9, "4,600.00 uJ")):
        assert describe_energy(Operations(0, count, 0, 0)) == text


class CountOfTheEnd(SpikeCount):
    def forward(self, output, lengths=None):
        return super().forward(output[3:], lengths - 3)


@pytest.mark.parametrize("readout", ["last", CountOfTheEnd()])
def test_readouts_other_than_counts_report_operations_alone(readout):
    task, model, _ = task_and_model(readout)
    lines = report(task, model)
    assert len(lines) == 2
    assert "synaptic operations per sequence" in lines[0]


def test_a_network_whose_operations_cannot_be_counted_says_why():
    task, _, _ = task_and_model("count")
    model = Sequential(nn.GRU(4, 3))
    lines = report(task, model)
    assert lines == [
        "operations are not counted: layer 0 is an nn.GRU, whose weights have no count here"
    ]
