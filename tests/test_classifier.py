"""The estimators: aeon's and scikit-learn's conventions, input of all kinds, and streams."""

import importlib
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

pytest.importorskip("aeon")
from aeon.testing.estimator_checking import check_estimator
from aeon.transformations.collection import Normalizer
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from torch.nn.modules.module import register_module_forward_hook

from snn_lib.classifier import SpikingClassifier, SpikingRegressor
from snn_lib.data.batches import default_dtype
from snn_lib.initialisation import fit_readout
from snn_lib.tasks.time_series import TimeSeriesHyperparameters
from snn_lib.time_series import draw_weights

pytestmark = pytest.mark.filterwarnings("error")
SMALL = {"neurons": 64, "filters": 16, "random_state": 0}


def waves(samples=30, channels=2, steps=40, seed=0):
    """Series whose class is their frequency, in noise, and the frequencies."""
    generator = np.random.default_rng(seed)
    y = np.arange(samples) % 3
    phase = generator.uniform(0, 2 * np.pi, (samples, channels, 1))
    cycles = (0.05 + 0.08 * y)[:, None, None]
    x = np.sin(2 * np.pi * cycles * np.arange(steps) + phase)
    return x + 0.3 * generator.normal(size=x.shape), y


def differing_late(samples=30, seed=0):
    """Series of 101 steps whose class is a shift of the second half, in noise, and the classes."""
    y = np.arange(samples) % 2
    x = np.random.default_rng(seed).normal(size=(samples, 1, 101))
    x[:, :, 51:] += 2.0 * y[:, None, None]
    return x, y


@pytest.mark.parametrize("estimator", [SpikingClassifier, SpikingRegressor])
def test_estimators_pass_the_checks_of_aeon(estimator):
    found = check_estimator(estimator(**SMALL))
    assert len(found) > 20
    assert {name: what for name, what in found.items() if what != "PASSED"} == {}


@pytest.mark.parametrize("estimator", [SpikingClassifier, SpikingRegressor])
def test_the_defaults_are_those_of_the_command(estimator):
    own, recipe = estimator().get_params(), vars(TimeSeriesHyperparameters())
    assert {"neurons", "filters", "length", "reset_strength"} <= own.keys() & recipe.keys()
    assert own == {**own, **{key: recipe[key] for key in own.keys() & recipe.keys()}}


def test_classes_of_any_kind_are_learned_and_named():
    x, y = waves()
    more, numbers = waves(seed=1)
    for names in (np.array(["slow", "medium", "fast"]), np.array([5, -1, 70])):
        classifier = SpikingClassifier(**SMALL).fit(x, names[y])
        assert classifier.classes_.tolist() == sorted(names.tolist())
        said = classifier.predict(more)
        assert said.dtype == names.dtype
        assert (said == names[numbers]).mean() == classifier.score(more, names[numbers]) > 0.9
        likely = classifier.predict_proba(more)
        np.testing.assert_allclose(likely.sum(1), 1)
        assert (classifier.classes_[likely.argmax(1)] == said).all()


def test_probabilities_are_as_sure_as_series_left_out_allow():
    x, y = waves(samples=90)
    sure = SpikingClassifier(**SMALL).fit(x, y).predict_proba(waves(seed=1)[0]).max(1)
    assert 0.9 < sure.mean() < 1
    guessed = np.random.default_rng(0).permutation(y)
    unsure = SpikingClassifier(**SMALL).fit(x, guessed).predict_proba(waves(seed=1)[0]).max(1)
    assert unsure.mean() < 0.5


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e45])
@pytest.mark.parametrize("offset", [0.0, 1e7, 1.7e9, -1e11])  # 1.7e9: a time of Unix
def test_numbers_are_predicted_whatever_their_offset_and_scale(offset, scale):
    x, y = waves()
    more, numbers = waves(seed=1)
    plain = SpikingRegressor(**SMALL).fit(x, y / 3)
    assert (plain.mean_, plain.deviation_) == pytest.approx(((y / 3).mean(), (y / 3).std()))
    assert plain.score(more, numbers / 3) > 0.8
    with np.errstate(invalid="ignore"):  # scikit-learn asks whether 1e45 is a whole number
        other = SpikingRegressor(**SMALL).fit(x, scale * (offset + y / 3))
    said = other.predict(more) / scale - offset
    np.testing.assert_allclose(said, plain.predict(more), atol=1e-9 * abs(offset) + 1e-4)
    assert r_squared(said, numbers / 3) == pytest.approx(plain.score(more, numbers / 3), abs=1e-3)
    stream = other.stream()
    for step in x[0].T:
        found = stream.step(step)
    assert found == pytest.approx(other.predict(x[:1])[0], rel=1e-3 / (1 + abs(offset)))


def test_targets_whose_sum_is_more_than_float64_holds_are_learned():
    x, y = waves()
    with np.errstate(invalid="ignore"):  # as above
        plain, large = (SpikingRegressor(**SMALL).fit(x, scale * y) for scale in (1.0, 8e307))
    np.testing.assert_allclose(large.predict(x) / 8e307, plain.predict(x), atol=1e-4)


def r_squared(found, expected):
    return 1 - np.square(found - expected).sum() / np.square(expected - expected.mean()).sum()


def test_targets_that_float64_cannot_tell_apart_and_a_single_one_are_refused():
    x, y = waves()
    with pytest.raises(ValueError, match="at least two"):
        SpikingRegressor(**SMALL).fit(x[:1], np.array([1.5]))
    with pytest.raises(ValueError, match=r"the mean 1e\+13 .*: expected a mean of at most 1e\+12"):
        SpikingRegressor(**SMALL).fit(x, 1e13 + y / 3)
    same = SpikingRegressor(**SMALL).fit(x, np.full(len(x), 1e13 + 0.5))
    np.testing.assert_array_equal(same.predict(x), 1e13 + 0.5)


def test_a_moment_is_the_first_step_at_which_its_share_is_seen():
    x, y = differing_late()
    fitted = SpikingClassifier(**SMALL, moments=4, length=101).fit(x, y)
    assert list(fitted.readouts_) == [26, 51, 76, 101]


def test_of_more_moments_than_steps_each_step_is_one():
    x, y = waves(steps=4)
    many, each = (SpikingClassifier(**SMALL, moments=count).fit(x, y) for count in (10, 4))
    assert list(many.readouts_) == [1, 2, 3, 4]
    assert many.sureness_ == {1: 1.0}  # there is no step before the first moment
    one, other = many.stream(), each.stream()
    for step in x[0].T:
        found, expected = one.step(step).probabilities, other.step(step).probabilities
        np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(many.predict_proba(x), each.predict_proba(x), atol=1e-6)


def test_time_and_channels_in_the_wrong_order_are_warned_of():
    x, y = waves(steps=40)
    with pytest.warns(
        UserWarning, match=r"40 channels and at most 2 steps: .*\(samples, channels, T\)$"
    ):
        SpikingClassifier(**SMALL).fit(x.transpose(0, 2, 1), y)


def test_a_single_channel_needs_no_axis_and_series_may_be_a_list():
    x, y = waves(channels=1)
    expected = SpikingClassifier(**SMALL).fit(x, y).predict_proba(x)
    for same in (x[:, 0], list(x), [series.astype(np.float32) for series in x]):
        found = SpikingClassifier(**SMALL).fit(same, y).predict_proba(same)
        np.testing.assert_allclose(found, expected, atol=0.02)


def test_series_of_other_lengths_do_not_disturb_each_other():
    x, y = waves()
    lengths = np.random.default_rng(0).integers(15, 41, len(x))
    ragged = [series[:, :length] for series, length in zip(x, lengths, strict=True)]
    classifier = SpikingClassifier(**SMALL).fit(ragged, y)
    together = classifier.predict_proba(ragged)
    for index in range(5):
        alone = classifier.predict_proba([ragged[index]])
        np.testing.assert_allclose(alone[0], together[index], atol=1e-4)


def test_the_seed_decides_and_nothing_outside_is_changed():
    x, y = waves()
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    drawn = [
        SpikingClassifier(64, 16, random_state=seed).fit(x, y).predict_proba(x)
        for seed in (0, 0, 1)
    ]
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])
    assert torch.equal(torch.get_rng_state(), state)
    classifier = SpikingClassifier(**SMALL, n_jobs=2).fit(x, y)
    np.testing.assert_allclose(classifier.predict_proba(x), drawn[0], atol=1e-3)
    assert torch.get_num_threads() == threads


def test_fit_and_predict_use_as_many_threads_as_they_are_told():
    x, y = waves()
    seen = []
    hook = register_module_forward_hook(lambda *call: seen.append(torch.get_num_threads()))
    try:
        fitted = SpikingClassifier(**SMALL, n_jobs=3).fit(x, y)
        in_fit = set(seen)
        seen.clear()
        fitted.predict(x)
    finally:
        hook.remove()
    assert in_fit == set(seen) == {3}


def test_the_seed_decides_in_threads_too():
    x, y = waves()

    def drawn(_=None):
        return SpikingClassifier(256, 16, random_state=0).fit(x, y).network_[-1].weight

    expected, state = drawn(), torch.get_rng_state()
    with ThreadPoolExecutor(4) as threads:
        for weight in threads.map(drawn, range(8)):
            torch.testing.assert_close(weight, expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_classifier_works_with_the_tools_of_scikit_learn(tmp_path):
    x, y = waves()
    classifier = SpikingClassifier(**SMALL)
    assert clone(classifier).get_params() == classifier.get_params()
    assert cross_val_score(classifier, x, y, cv=3).mean() > 0.8
    grid = {"neurons": np.array([8, 64]), "filters": np.array([9]), "reset_strength": [0.0, 1.0]}
    search = GridSearchCV(classifier, grid, cv=2)
    assert search.fit(x, y).best_score_ > 0.8
    assert make_pipeline(Normalizer(), classifier).fit(x, y).score(x, y) > 0.9
    fitted = classifier.fit(x, y)
    again = pickle.loads(pickle.dumps(fitted))
    assert np.array_equal(again.predict_proba(x), fitted.predict_proba(x))
    assert again.stream().step(x[0, :, 0]).probabilities.shape == (3,)


LENGTHS = [512, 14]  # 14: blocks of three steps, the last of which has one


@pytest.mark.parametrize("length", LENGTHS)
def test_a_stream_predicts_what_the_regressor_predicts_of_the_steps_so_far(length):
    x, y = waves()
    regressor = SpikingRegressor(**SMALL, length=length).fit(x, 20.0 + y)
    one, other = regressor.stream(), regressor.stream()
    found = []
    for first, second in zip(x[0].T, x[1].T, strict=True):
        found.append(one.step(first))
        other.step(second)
    expected = [regressor.predict(x[:1, :, :end])[0] for end in range(1, 41)]
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert np.ptp(expected) > 0.1
    one.reset()
    assert [one.step(step) for step in x[0].T] == found


@pytest.mark.parametrize("length", LENGTHS)
def test_a_stream_names_the_class_of_the_steps_so_far_and_is_not_surer_than_the_classifier(length):
    x, y = waves()
    classifier = SpikingClassifier(**SMALL, length=length).fit(x, y)
    stream = classifier.stream()
    for end, step in enumerate(x[0].T, 1):
        answer = stream.step(step)
        expected = classifier.predict_proba(x[:1, :, :end])[0]
        assert answer.label == classifier.classes_[expected.argmax()]
        assert answer.probabilities.max() <= expected.max() + 1e-3
        assert answer.probabilities.sum() == pytest.approx(1)
    np.testing.assert_allclose(answer.probabilities, expected, atol=1e-3)


def test_a_stream_is_as_sure_of_beginnings_that_tell_nothing_as_of_a_guess():
    """Classes differ in the second half; before, an answer is right as often as a guess."""
    x, y = differing_late(samples=60)
    more, labels = differing_late(samples=60, seed=1)
    for moments in (1, 2):
        classifier = SpikingClassifier(**SMALL, moments=moments).fit(x, y)
        assert classifier.score(more, labels) > 0.95
        stream, sure = classifier.stream(), []
        for series in more:
            stream.reset()
            sure.append([stream.step(step).probabilities.max() for step in series.T])
        sure = np.mean(sure, 0)
        assert sure[:40].max() < 0.7
        assert sure[-1] > 0.9


@pytest.mark.parametrize("moments", [1, 2, 10])
@pytest.mark.parametrize("length", [50, 512])  # 101 steps in blocks of three, and as they are
def test_after_the_longest_series_a_stream_says_what_the_classifier_says(moments, length):
    x, y = differing_late()
    classifier = SpikingClassifier(**SMALL, length=length, moments=moments).fit(x, y)
    stream = classifier.stream()
    for series, expected in zip(x[:5], classifier.predict_proba(x[:5]), strict=True):
        stream.reset()
        answers = [stream.step(step) for step in series.T]
        np.testing.assert_allclose(answers[-1].probabilities, expected, atol=1e-3)


def test_before_the_first_of_several_moments_a_stream_is_as_sure_as_it_is_right():
    y = np.arange(280) % 2
    x = np.random.default_rng(0).normal(size=(280, 2, 40))
    x[:, 0] += 2.0 * y[:, None]
    classifier = SpikingClassifier(**SMALL, moments=4).fit(x[:80], y[:80])
    stream, sure, right = classifier.stream(), [], []
    for series, label in zip(x[80:], y[80:], strict=True):
        stream.reset()
        _, answer = [stream.step(step) for step in series.T[:2]]
        sure.append(answer.probabilities.max())
        right.append(answer.label == label)
    assert abs(np.mean(sure) - np.mean(right)) < 0.05


def test_at_the_end_of_short_series_a_stream_is_as_sure_as_the_classifier():
    """The step before tells nothing yet."""
    y = np.arange(80) % 2
    x = np.random.default_rng(0).normal(size=(80, 1, 10))
    x[:, :, 8:] += 3.0 * y[:, None, None]
    classifier = SpikingClassifier(**SMALL).fit(x, y)
    stream, apart = classifier.stream(), []
    for series, expected in zip(x[:8], classifier.predict_proba(x[:8]), strict=True):
        stream.reset()
        *_, before, last = [stream.step(step).probabilities for step in series.T]
        np.testing.assert_allclose(last, expected, atol=1e-3)
        apart.append(abs(before - last).max())
    assert max(apart) > 0.05


def test_between_moments_an_answer_stays_while_a_block_is_not_whole():
    x, y = differing_late()
    classifier = SpikingClassifier(**SMALL, length=50, moments=4).fit(x, y)
    stream = classifier.stream()
    answers = [stream.step(step).probabilities for step in x[0].T]
    changes = [n + 1 for n in range(1, 101) if (answers[n] != answers[n - 1]).any()]
    first, *between, _ = (3 * block for block in classifier.readouts_)  # 101 steps in blocks of 3
    assert [step for step in changes if step > first] == [*between, 100, 101]
    assert {first - 2, first - 1, first} < {*changes}


def test_first_weights_are_found_on_series_from_all_over_the_set(monkeypatch):
    """Where all series of a class come first, on those of both classes."""
    shown = []

    def spy(network, options, sample):
        shown.extend(sample.x.abs().amax((0, 2)).tolist())
        return draw_weights(network, options, sample)

    monkeypatch.setattr("snn_lib.classifier.draw_weights", spy)
    monkeypatch.setattr("snn_lib.classifier.SAMPLE", 8)
    x, _ = waves(samples=40)
    x[20:] *= 10
    SpikingClassifier(**SMALL).fit(x, np.arange(40) // 20)
    assert 4 < len(shown) <= 8
    loud = sum(one > max(shown) / 3 for one in shown)
    assert abs(loud - len(shown) / 2) <= 1


def test_more_moments_make_a_stream_right_earlier():
    x, y = waves(samples=60)
    more, numbers = waves(samples=60, seed=1)
    right = {}
    for moments in (1, 5):
        classifier = SpikingClassifier(**SMALL, moments=moments).fit(x, y)
        assert len(classifier.readouts_) == moments
        stream, answers = classifier.stream(), []
        for series in more:
            stream.reset()
            answers.append([stream.step(step) for step in series.T])
        for step in (8, 40):  # a fifth, and all
            labels = np.array([own[step - 1].label for own in answers])
            right[moments, step] = (labels == numbers).mean()
        if moments > 1:
            for own in answers:  # until the next moment
                assert all(np.array_equal(own[7].probabilities, a.probabilities) for a in own[8:15])
        last = [own[-1].probabilities for own in answers]
        np.testing.assert_allclose(last, classifier.predict_proba(more), atol=1e-3)
    assert right[5, 8] > right[1, 8] + 0.1
    assert right[5, 40] == right[1, 40] > 0.9


def outputs_of(estimator, series):
    """What the hidden neurons of a fitted estimator say at each step of a series, by PyTorch."""
    x, _ = estimator.preparation_([torch.from_numpy(series.T)])
    with torch.no_grad():
        return estimator.network_[:-1](x)[0][:, 0]


def test_at_each_moment_a_stream_answers_by_the_layer_for_it():
    x, y = waves()
    regressor = SpikingRegressor(**SMALL, moments=5).fit(x, 20.0 + y)
    other = waves(seed=1)[0][2]
    stream, hidden = regressor.stream(), outputs_of(regressor, other)
    answers = [stream.step(step) for step in other.T]
    for moment, layer in regressor.readouts_.items():
        with torch.no_grad():
            answer = layer(hidden[:moment].mean(0)).item()
        expected = regressor.mean_ + regressor.deviation_ * answer
        assert answers[moment - 1] == pytest.approx(expected, abs=1e-3)
    assert len({round(answers[moment - 1], 2) for moment in regressor.readouts_}) == 5


def test_the_last_layer_is_fitted_to_means_over_each_series_own_steps():
    x, y = waves()
    lengths = np.random.default_rng(0).integers(15, 41, len(x))
    ragged = [series[:, :length] for series, length in zip(x, lengths, strict=True)]
    regressor = SpikingRegressor(**SMALL).fit(ragged, y.astype(float))
    features = torch.stack([outputs_of(regressor, series).mean(0) for series in ragged])
    layer, targets = torch.nn.Linear(64, 1), (y - regressor.mean_) / regressor.deviation_
    fit_readout(layer, features, torch.from_numpy(targets)[:, None])
    torch.testing.assert_close(layer.weight, regressor.network_[-1].weight, rtol=1e-2, atol=1e-4)


def test_a_step_of_one_channel_may_be_a_single_number():
    x, y = waves(channels=1)
    regressor = SpikingRegressor(**SMALL).fit(x, y.astype(float))
    stream = regressor.stream()
    for value in x[0, 0]:
        found = stream.step(value)
    assert found == pytest.approx(regressor.predict(x[:1])[0], abs=1e-3)


@pytest.mark.parametrize(
    "defaults",
    [
        lambda: torch.device("meta"),
        lambda: torch.autocast("cpu"),
        lambda: default_dtype(torch.float64),
        lambda: default_dtype(torch.bfloat16),
    ],
    ids=["device", "autocast", "float64", "bfloat16"],
)
def test_defaults_of_pytorch_change_nothing(defaults):
    def answers():
        classifier = SpikingClassifier(**SMALL, moments=2).fit(x, y)
        stream = classifier.stream()
        return classifier.predict_proba(x), [stream.step(now).probabilities for now in x[0].T]

    x, y = waves()
    expected = answers()
    with defaults():
        dtype = torch.get_default_dtype()
        found = answers()
        assert torch.get_default_dtype() == dtype
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_stream_refuses_a_step_and_goes_on():
    x, y = waves()
    classifier = SpikingClassifier(**SMALL).fit(x, y)
    stream, undisturbed = classifier.stream(), classifier.stream()
    for step in range(5):
        for wrong in ([1.0], [[1.0, 2.0]]):
            with pytest.raises(ValueError, match=r"has the shape \(1.*, expected \(2,\): a number"):
                stream.step(wrong)
        for wrong in ([np.nan, 1.0], [1.7e308, 1.0], [3e38, 1.0]):
            with pytest.raises(ValueError, match=r"a step is .*, expected finite numbers, of"):
                stream.step(wrong)
        found = stream.step(x[0, :, step])
        assert np.array_equal(found.probabilities, undisturbed.step(x[0, :, step]).probabilities)
    with pytest.raises(NotFittedError):
        SpikingClassifier().stream()


def test_a_stream_keeps_the_names_of_the_fit_that_it_was_made_of():
    x, y = waves()
    classifier = SpikingClassifier(**SMALL).fit(x, y)
    stream = classifier.stream()
    classifier.fit(x, np.array([f"new {label}" for label in y]))
    assert stream.step(x[0, :, 0]).label in y


def changed(x, index, value):
    x = x.copy()
    x[index] = value
    return x


def masked(x, index=()):
    return np.ma.array(x, mask=changed(np.zeros(x.shape, bool), index, bool(index)))


@pytest.mark.parametrize(
    ("series", "labels", "message"),
    [
        (lambda x: changed(x, (0, 0, 0), np.nan), None, "missing values"),
        (lambda x: changed(x, (0, 0, 0), np.inf), None, "series 0 .* infinite .*: step 0"),
        (lambda x: masked(x, (2, 1, 5)), None, "series 2 .* undefined .*: step 5, channel 1"),
        (lambda x: [masked(one, (1, 5)) for one in x], None, "series 0 .*: step 5, channel 1"),
        (lambda x: np.full_like(x, 3.7), None, "no training sequence ever changes"),
        (lambda x: 1e300 * x, None, "too large to be squared"),
        (lambda x: x[:1], [0], "at least 2 unique labels, but found 1"),
        (lambda x: x, [0] * 30, "at least 2 unique labels, but found 1"),
        (lambda x: x, [0, 1], "Mismatch in number of cases"),
        (lambda x: [x[0], *x[1:, :1]], None, "channels"),
        (lambda x: x[:, :, :0], None, "."),
    ],
)
def test_wrong_series_are_refused_as_scikit_learn_does(series, labels, message):
    x, y = waves()
    with pytest.raises(ValueError, match=message):
        SpikingClassifier(**SMALL).fit(series(x), y if labels is None else np.array(labels))


@pytest.mark.parametrize(
    ("series", "message"),
    [
        (lambda x: x[:, :1], "number of channels"),
        (lambda x: changed(x, (0, 0, 0), np.nan), "missing values"),
        (lambda x: changed(x, (3, 0, 0), np.inf), "series 3 .* infinite .*: step 0, channel 0"),
        (lambda x: masked(x, (3, 1, 5)), "series 3 .* undefined .*: step 5, channel 1"),
    ],
)
def test_wrong_series_are_refused_after_the_fit(series, message):
    x, y = waves()
    classifier = SpikingClassifier(**SMALL).fit(x, y)
    with pytest.raises(ValueError, match=message):
        classifier.predict(series(x))


def test_masked_numbers_are_refused_and_a_mask_of_none_is_no_matter():
    x, y = waves()
    fitted = SpikingRegressor(**SMALL).fit(masked(x), masked(y.astype(float)))
    expected = SpikingRegressor(**SMALL).fit(x, y.astype(float))
    np.testing.assert_array_equal(fitted.predict(x), expected.predict(masked(x)))
    with pytest.raises(ValueError, match=r"y has .* values, expected finite numbers"):
        SpikingRegressor(**SMALL).fit(x, masked(y.astype(float), (1,)))
    with pytest.raises(ValueError, match=r"a step is \[.*nan\], expected finite numbers"):
        fitted.stream().step(masked(x[0, :, 0], (1,)))


WRONG = {"neurons": 0, "filters": "9", "length": 0, "reset_strength": -1.0, "moments": 1.5}


@pytest.mark.parametrize(("name", "value"), [*WRONG.items(), ("neurons", 2.5)])
def test_wrong_parameters_are_refused_by_their_name(name, value):
    x, y = waves()
    with pytest.raises(ValueError, match=rf"{name} is .*, expected .*at least"):
        SpikingClassifier(**{name: value}).fit(x, y)


@pytest.mark.parametrize(
    ("series", "labels"),
    [
        (lambda x: x[:2], [0, 1]),  # a single member each
        (lambda x: x[:, :, :1], None),  # a single step
        (lambda x: changed(x, np.s_[:, 0], 5.0), None),  # a channel that never changes
        (lambda x: changed(x, 0, 0.0), None),
        (lambda x: 1e-30 * x, None),
        (lambda x: 1e8 + x, None),
        (lambda x: np.repeat(x[:4], 100, 1), [0, 1, 0, 1]),  # 200 channels
        (lambda x: x.astype(int), None),
    ],
)
def test_unusual_series_get_a_sensible_answer_without_a_warning(series, labels):
    x, y = waves()
    x, y = series(x), y if labels is None else np.array(labels)
    classifier = SpikingClassifier(**SMALL).fit(x, y)
    likely = classifier.predict_proba(x)
    assert np.isfinite(likely).all()
    np.testing.assert_allclose(likely.sum(1), 1)


def test_fit_shows_a_bar_if_asked(capsys):
    x, y = waves()
    SpikingClassifier(**SMALL).fit(x, y)
    assert capsys.readouterr() == ("", "")
    SpikingClassifier(**SMALL, verbose=1).fit(x, y)
    assert "2/2" in capsys.readouterr().err


def test_without_aeon_the_import_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "aeon.classification.base", None)  # as if there were none
    monkeypatch.delitem(sys.modules, "snn_lib.classifier")
    with pytest.raises(ImportError, match="pip install 'aeon"):
        importlib.import_module("snn_lib.classifier")
