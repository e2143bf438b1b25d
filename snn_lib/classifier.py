"""Time series for people who know no spikes: a classifier and a regressor as aeon's are.

    from aeon.datasets import load_classification
    from snn_lib.classifier import SpikingClassifier

    X, y = load_classification("GunPoint", split="train")
    classifier = SpikingClassifier(random_state=0).fit(X, y)

They follow the conventions of aeon and scikit-learn: clones, pipelines, searches over parameters
and pickles work. The network is that of :mod:`snn_lib.time_series`. A fitted estimator also follows
a series step by step (:meth:`SpikingClassifier.stream`).
"""

import copy
import threading
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

try:
    from aeon.base import BaseCollectionEstimator
    from aeon.classification.base import BaseClassifier
    from aeon.regression.base import BaseRegressor
    from aeon.utils.validation import check_n_jobs
    from sklearn.utils import check_random_state
except ImportError as error:
    raise ImportError("snn_lib.classifier needs aeon: pip install 'aeon>=1.6'") from error
from tqdm import tqdm

from snn_lib.containers import whole_number
from snn_lib.data.batches import default_dtype
from snn_lib.data.sequences import as_sequences
from snn_lib.errors import InputError
from snn_lib.inference import compiled
from snn_lib.initialisation import fit_readout, scale_of_logits
from snn_lib.readout import Mean
from snn_lib.tasks.time_series import SAMPLE, TimeSeriesHyperparameters, prepare_series
from snn_lib.time_series import build_network, draw_weights

SEEDED = threading.Lock()
SIZES = "neurons", "filters", "length"
BATCH = 16  # sequences that run at once: they are long and neurons many
FIFTHS = 5  # beginnings of series on which it is found how sure an early answer is
FARTHEST = 1e12  # deviations that a regressor's targets may be away from 0, in float64
DEFAULTS = TimeSeriesHyperparameters()


class SpikingEstimator(BaseCollectionEstimator):
    """What the classifier and the regressor share: the network, and how it runs.

    Args:
        neurons: spiking neurons; more of them are a little more accurate, and slower.
        filters: of all channels together, rounded up so that each has the same even number.
        reset_strength: by how much a spike lowers the next potential; 1 is the paper's, 0 none.
        length: most steps; longer series are averaged over blocks of steps.
        moments: how many last layers are fitted for streams. With 10, the first is fitted to the
            training series up to a tenth of the steps of the longest one, the second up to two
            tenths, and so on. At each of these moments a stream answers by the layer for it, and
            between them it keeps its answer.
        random_state: seed of the filters' and the neurons' weights, or NumPy's ``RandomState``.
        n_jobs: threads of PyTorch that ``fit`` and ``predict`` use; -1 for all processors. It is a
            number of the whole process, so Python's own threads should fit one after the other.
        verbose: whether ``fit`` shows a bar.

    Attributes:
        network_: the fitted network, a ``snn_lib.Sequential``.
        preparation_: makes its input of series.
        readouts_: the last layer, ``nn.Linear``, by the step that is its moment; that of the last
            moment is the network's own.
        sureness_: by steps up to the first moment, the factor of the logits of a stream that has
            seen so many.

    Series are aeon's collections: ``(samples, channels, T)``, ``(samples, T)`` for one channel, or
    a list of ``(channels, T_i)``. (The ``.npz`` files of :mod:`snn_lib.time_series` have the other
    order, ``(samples, T, channels)``.)

    Warns:
        UserWarning: series have far more channels than steps, as in the wrong order.
    """

    _tags = {  # noqa: RUF012 (aeon's way)
        "X_inner_type": ["np-list", "numpy3D"],
        "algorithm_type": "convolution",
        "capability:multivariate": True,
        "capability:unequal_length": True,
        "capability:multithreading": True,
    }
    _read: Callable[[np.ndarray], Any]  # makes a stream's answer of the last layer's output

    def __init__(
        self,
        neurons: int = DEFAULTS.neurons,
        filters: int = DEFAULTS.filters,
        reset_strength: float = DEFAULTS.reset_strength,
        length: int = DEFAULTS.length,
        moments: int = 1,
        random_state: Any = None,
        n_jobs: int = 1,
        verbose: int = 0,
    ) -> None:
        self.neurons, self.filters, self.reset_strength = neurons, filters, reset_strength
        self.length, self.moments, self.random_state = length, moments, random_state
        self.n_jobs, self.verbose = n_jobs, verbose
        super().__init__()

    def _train(self, X: Any, y: Tensor, outputs: int) -> None:
        """Fits a network with so many outputs to targets of the series."""
        moments = whole_number(self.moments, "moments")
        sizes: dict[str, Any] = {name: whole_number(getattr(self, name), name) for name in SIZES}
        self._n_jobs = check_n_jobs(self.n_jobs)
        seed = check_random_state(self.random_state).randint(2**31)
        with _refusing(), _plain(self._n_jobs):
            sequences = _sequences(X)
            options = TimeSeriesHyperparameters(**sizes, reset_strength=self.reset_strength)
            self.preparation_ = prepare_series(sequences, options)
            sample = self.preparation_(sequences[:: -(-len(sequences) // SAMPLE)])
            steps = self.preparation_.steps
            ends = [-(-steps * number // moments) for number in range(1, moments + 1)]
            # All threads of a process share the generator that first weights are drawn from.
            with SEEDED, torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.network_ = build_network(options, self.preparation_, outputs).eval()
                draw_weights(self.network_, options, sample)
                self.readouts_ = {end: torch.nn.Linear(options.neurons, outputs) for end in ends}
            # Before the first moment an answer about a class is less sure than at it, by a factor
            # that is found on the training series' beginnings. A number needs none.
            parts = 0 if y.is_floating_point() else FIFTHS
            beginnings = [max(ends[0] * part // FIFTHS, 1) for part in range(parts)]
            seen = [*self.readouts_, *beginnings]
            found = self._features(sequences, seen, bool(self.verbose))
            for layer, features in zip(self.readouts_.values(), found, strict=False):
                fit_readout(layer, features, y)
            self.network_[-1] = self.readouts_[steps]
            with torch.no_grad():
                self.sureness_ = {
                    step: min(scale_of_logits(self.readouts_[ends[0]](features).double(), y), 1.0)
                    for step, features in zip(beginnings, found[-parts:], strict=False)
                } | {ends[0]: 1.0}

    @torch.inference_mode()
    def _features(
        self, sequences: list[Tensor], moments: Sequence[int | None], bar: bool = False
    ) -> Tensor:
        """The input of the last layer, averaged up to each moment; None is the end of all.

        ``(moments, samples, neurons)``.
        """
        found = []
        for begin in tqdm(range(0, len(sequences), BATCH), unit=" batches", disable=not bar):
            x, lengths = self.preparation_(sequences[begin : begin + BATCH])
            psp, _ = self.network_[:-1](x)
            found.append(torch.stack([Mean()(psp[:moment], lengths) for moment in moments]))
        return torch.cat(found, 1)

    def stream(self) -> "Stream":
        """Follows a new series step by step; several streams do not disturb each other.

        :meth:`Stream.step` of a classifier returns an :class:`Answer`, of a regressor the predicted
        number.

        Raises:
            NotFittedError: ``fit`` has not been called.
        """
        self._check_is_fitted()
        return Stream(self)

    @torch.inference_mode()
    def _answers(self, X: Any) -> Tensor:
        """The answers to whole series, ``(samples, outputs)``."""
        with _refusing(), _plain(self._n_jobs):
            (features,) = self._features(_sequences(X), [None])
            return self.network_[-1](features).double()

    def _check_X(self, X: Any) -> dict[str, Any]:
        """Checks series as aeon does; that some hardly change is no reason for a warning here."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return super()._check_X(X)


class SpikingClassifier(SpikingEstimator, BaseClassifier):
    """Classifies time series by how often random spiking neurons fire.

    The probabilities of the classes are as large as suits the training series best if each of them
    is predicted from all the others.

    Args and attributes: as in :class:`SpikingEstimator`.
    """

    def _fit(self, X: Any, y: np.ndarray) -> "SpikingClassifier":
        self._train(X, torch.from_numpy(np.searchsorted(self.classes_, y)), self.n_classes_)
        return self

    def _predict_proba(self, X: Any) -> np.ndarray:
        return self._answers(X).softmax(1).numpy()

    def _predict(self, X: Any) -> np.ndarray:
        return self.classes_[self._answers(X).argmax(1).numpy()]

    def _read(self, logits: np.ndarray) -> "Answer":
        likely = np.exp(logits - logits.max())
        return Answer(self.classes_[logits.argmax()], likely / likely.sum())


class SpikingRegressor(SpikingEstimator, BaseRegressor):
    """Predicts a number for each time series from how often random spiking neurons fire.

    The network learns and answers numbers of mean 0 and deviation 1. The numbers of the series are
    float64, which rounds whole numbers beyond 2^53.

    Args and attributes: as in :class:`SpikingEstimator`, and

    Attributes:
        mean_, deviation_: of the training series' numbers; the deviation of equal ones is their
            size, or 1. ``fit`` refuses a mean of more than 1e12 deviations with a ValueError, since
            float64 could not tell the numbers apart.
    """

    def _fit(self, X: Any, y: np.ndarray) -> "SpikingRegressor":
        y = _numbers(y)
        if len(y) < 2 or not np.isfinite(y).all():
            raise ValueError(f"y has {len(y)} values, expected finite numbers, and at least two")
        with np.errstate(over="ignore", invalid="ignore"):
            apart = y - y[0]  # exactly 0 if all are equal
            largest = np.abs(apart).max() or 1.0
            deviation = largest * (apart / largest).std() or abs(y[0]) or 1.0
            mean = y[0] + largest * (apart / largest).mean()
        if not abs(mean) / FARTHEST <= deviation < np.inf:
            raise ValueError(
                f"y has the mean {mean:g} and the deviation {deviation:g}: expected a mean of at "
                f"most {FARTHEST:g} deviations, such as y - y.mean() has, and finite differences"
            )
        self.mean_, self.deviation_ = float(mean), float(deviation)
        self._train(X, torch.from_numpy((y - mean) / deviation)[:, None], 1)
        return self

    def _predict(self, X: Any) -> np.ndarray:
        return self.mean_ + self.deviation_ * self._answers(X)[:, 0].numpy()

    def _read(self, numbers: np.ndarray) -> float:
        return self.mean_ + self.deviation_ * float(numbers[0])


class Answer(NamedTuple):
    """What a classifier says of a series.

    Attributes:
        label: the most probable class.
        probabilities: of all classes, in the order of ``classes_``; the largest says how sure the
            classifier is.
    """

    label: Any
    probabilities: np.ndarray


class Stream:
    """A series that is followed step by step, by the compiled network.

    Made by the ``stream`` method of an estimator. With ``moments=1`` the answer after step t is
    what the estimator would predict of the first t steps. With more moments the estimator has a
    last layer for each, and from the first moment to the last the answer changes only at moments.
    Before and after them it changes at every step. (If series are averaged over blocks, it
    changes at every step of the last moment's block, too.) From the last step of the longest
    training series on, it is what the estimator predicts of the whole series.

    The probabilities of a class differ from this before the first moment: there they allow for the
    steps to come. They are as sure as suits the beginnings of the training series, and never surer
    than the estimator would be of a series that ends there. Since the last layer has learned these
    series, it may be too sure of the beginning of a new one.

    Args:
        estimator: the fitted estimator, which makes the answer of the mean output.
    """

    def __init__(self, estimator: SpikingEstimator) -> None:
        preparation = estimator.preparation_
        self._network = compiled(estimator.network_[:-1], preparation.features)
        self._moments = list(estimator.readouts_)
        self._readouts = [
            (layer.weight.detach().numpy().T, layer.bias.detach().numpy())
            for layer in estimator.readouts_.values()
        ]
        self._read, self._block = copy.copy(estimator)._read, preparation.block  # of these classes
        tensors = preparation.mean, preparation.deviation, preparation.change
        self._mean, self._deviation, self._change = (one.numpy() for one in tensors)
        self._sureness = list(estimator.sureness_), list(estimator.sureness_.values())
        self.reset()

    def reset(self) -> None:
        """Begins a new series."""
        self._network.reset()
        self._waiting: list[np.ndarray] = []  # steps of a block that is not whole yet
        self._last: np.ndarray | None = None
        self._total, self._steps = np.zeros(self._network.after), 0

    def step(self, x: np.ndarray | float) -> Any:
        """Takes the next step of the series and returns the answer so far.

        If long series are averaged over blocks of steps, so are the steps of a last block that is
        not whole yet, as in the last block of a series.

        Args:
            x: ``(channels,)``, or a number if there is one channel.

        Raises:
            ValueError: ``x`` has another shape, or it, or its change, is not finite in float32; the
                stream stays as it is.
        """
        x, steps = np.atleast_1d(_numbers(x)), self._steps + 1
        if x.shape != self._mean.shape:
            raise ValueError(
                f"a step has the shape {x.shape}, expected {self._mean.shape}: a number for each "
                "channel"
            )
        with np.errstate(over="ignore", invalid="ignore"):
            waiting = [*self._waiting, (x - self._mean) / self._deviation]
            value = np.mean(waiting, 0).astype(np.float32)
            last = value if self._last is None else self._last
            values = np.concatenate([value, (value - last) / self._change])
        if not np.isfinite(values).all():
            raise ValueError(
                f"a step is {x.tolist()}, expected finite numbers, of which float32 holds the size "
                "and the change"
            )
        is_whole = len(waiting) == self._block
        passed = bisect_right(self._moments, steps)
        # A moment is there once its block is whole. The first one's layer has answered before, and
        # the last one's answers at once, because the longest series may end in its block.
        answers = passed in (0, len(self._moments)) or (
            self._moments[passed - 1] == steps and (is_whole or passed == 1)
        )
        if is_whole:
            output = self._network.step(values)
        elif answers:
            output = self._network.peek(values)
        if answers:
            weight, bias = self._readouts[max(passed - 1, 0)]
            sureness = np.interp(steps, *self._sureness)
            self._answer = sureness * ((self._total + output) / steps @ weight + bias)
        if is_whole:
            self._total, self._steps, self._last = self._total + output, steps, value
            waiting = []
        self._waiting = waiting
        return self._read(self._answer)


def _sequences(X: Any) -> list[Tensor]:
    """Aeon's collection as ``(T, channels)`` each."""
    turned = (_numbers(series).T for series in X)
    return as_sequences(turned, "series", dtype=torch.float64)


def _numbers(values: Any) -> np.ndarray:
    """A user's numbers in float64; those that are masked are nan."""
    return np.ma.filled(np.ma.array(values, np.float64), np.nan)


@contextmanager
def _refusing() -> Iterator[None]:
    """The context in which wrong input is a ValueError, as scikit-learn's users expect."""
    try:
        yield
    except InputError as error:
        raise ValueError(str(error)) from None


@contextmanager
def _plain(threads: int) -> Iterator[None]:
    """The context in which PyTorch has the defaults of a new process, and so many threads."""
    before = torch.get_num_threads()
    on_cpu = torch.get_default_device().type == "cpu"  # else a mode that looks at every operation
    torch.set_num_threads(threads)
    try:
        here = nullcontext() if on_cpu else torch.device("cpu")
        with here, default_dtype(torch.float32), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.set_num_threads(before)
