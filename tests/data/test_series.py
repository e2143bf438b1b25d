"""Reading time series: what comes out is what went in, and bad input is refused in one line."""

import os
import re
import sys

import numpy as np
import pytest
import refusing
import torch

from snn_lib.data.series import load_series

X = np.random.default_rng(0).normal(size=(6, 5, 2))
Y = np.array(["walk", "run", "walk", "run", "sit", "sit"])
TRAIN = {"x": X, "y": Y}
INFINITE = "sequence 0 has a number that is infinite or undefined in torch.float64: step 0, channel"
HEADER = "@problemName Mine\n@timeStamps false\n@missing {missing}\n@univariate false\n" + (
    "@dimensions 2\n@equalLength {equal}\n@classLabel true a b\n@data\n"
)


def npz(folder, **arrays):
    np.savez(folder / "mine.npz", **arrays)
    return str(folder / "mine.npz")


def ts(folder, train, test, equal="true", missing="false"):
    for part, lines in (("TRAIN", train), ("TEST", test)):
        header = HEADER.format(equal=equal, missing=missing)
        (folder / f"Mine_{part}.ts").write_text(header + "\n".join(lines) + "\n")
    return str(folder / "Mine_TRAIN.ts")


def refusal(dataset, root=".", **options):
    return refusing.refusal(load_series, dataset, root, **options)


def test_an_npz_gives_its_sequences_and_classes_by_number(tmp_path):
    found = load_series(npz(tmp_path, x=X, y=Y, x_test=X[:2], y_test=Y[:2]), tmp_path)
    assert found.classes == ["run", "sit", "walk"]
    x, y = found.parts["train"]
    assert [found.classes[number] for number in y] == Y.tolist()
    assert torch.equal(torch.stack(x), torch.from_numpy(X))
    assert found.parts["test"][1].tolist() == [2, 0]


def test_lengths_cut_the_padding_and_single_channels_need_no_axis(tmp_path):
    lengths = np.array([5, 1, 2, 3, 4, 5])
    padded = X[..., 0].copy()
    padded[1, 1:] = np.nan  # what lies behind the end is nobody's business
    found = load_series(npz(tmp_path, x=padded, y=np.arange(6) % 2, lengths=lengths), tmp_path)
    assert found.classes == ["0", "1"]
    assert found.parts.keys() == {"train"}
    for own, n, sequence in zip(padded, lengths, found.parts["train"][0], strict=True):
        assert torch.equal(sequence, torch.from_numpy(own[:n, None]))


@pytest.mark.parametrize(
    ("y", "classes", "numbers"),
    [
        ([10, 9, 2], ["2", "9", "10"], [2, 1, 0]),
        ([b"up", b"d\xffwn", b"up"], ["d\\xffwn", "up"], [1, 0, 1]),
    ],
    ids=["numbers sort as numbers", "names may be bytes"],
)
def test_classes_are_numbered_in_their_order(tmp_path, y, classes, numbers):
    found = load_series(npz(tmp_path, x=X, y=np.array(y * 2)), tmp_path)
    assert found.classes == classes
    assert found.parts["train"][1].tolist() == numbers * 2


def test_a_pair_of_ts_files_is_read_time_first(tmp_path):
    pytest.importorskip("aeon")
    path = ts(tmp_path, ["1,2,3:4,5,6:a", "7,8:9,10:b"], ["0,1:2,3:b"], equal="false")
    found = load_series(path, tmp_path)
    assert found.classes == ["a", "b"]
    first, second = found.parts["train"][0]
    assert first.tolist() == [[1, 4], [2, 5], [3, 6]]
    assert second.tolist() == [[7, 9], [8, 10]]
    assert found.parts["test"][1].tolist() == [1]


def test_the_archive_sets_that_aeon_brings_need_no_network(tmp_path):
    pytest.importorskip("aeon")
    found = load_series("JapaneseVowels", tmp_path)
    (x, y), (test_x, test_y) = found.parts["train"], found.parts["test"]
    assert (len(x), len(test_x), len(found.classes)) == (270, 370, 9)
    assert {sequence.shape[1] for sequence in x} == {12}
    assert (min(map(len, x)), max(map(len, test_x))) == (7, 29)
    assert torch.equal(y.bincount(), torch.full((9,), 30))
    assert test_y.bincount().tolist() == [31, 35, 88, 44, 29, 24, 40, 50, 29]
    assert not list(tmp_path.iterdir())


def test_a_set_of_the_archive_is_downloaded_once_and_then_read_where_it_is(tmp_path, monkeypatch):
    datasets = pytest.importorskip("aeon.datasets")

    def download(name, split, extract_path):
        (tmp_path / name).mkdir()  # and fails if it is there
        ts(tmp_path / name, ["1,2:4,5:a", "7,8:9,10:b"], ["0,1:2,3:b"])
        assert extract_path == str(tmp_path)

    monkeypatch.setitem(datasets.tsc_datasets.tsc_zenodo, "Mine", 1)
    monkeypatch.setattr(datasets, "load_classification", download)
    for _ in range(2):
        found = load_series("Mine", tmp_path)
        assert found.parts["train"][0][1].tolist() == [[7, 9], [8, 10]]
        assert found.parts["test"][0][0].tolist() == [[0, 2], [1, 3]]


def test_missing_values_are_interpolated_by_the_setting_alone(tmp_path):
    x = np.zeros((2, 6, 1))
    x[0, :, 0] = [np.nan, 1, np.nan, np.nan, 4, np.nan]
    path = npz(tmp_path, x=x, y=np.array([0, 1]))
    assert "sequence 0 has missing values; missing=interpolate fills" in refusal(path)
    sequence = load_series(path, tmp_path, "interpolate").parts["train"][0][0]
    assert sequence[:, 0].tolist() == [1, 1, 2, 3, 4, 4]
    x[1] = np.nan
    path = npz(tmp_path, x=x, y=np.array([0, 1]))
    assert "sequence 1 has a channel without any value" in refusal(path, missing="interpolate")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": X}, "has no array y"),
        ({"y_test": X}, "has no array x and no y"),
        ({"x": X, "y": Y, "x_test": X}, "has no array y_test"),
        ({"x": X, "y": Y, "lengths_test": Y}, "has no array x_test and no y_test"),
        ({"x": X, "y": Y, "length": Y}, "unknown array 'length', expected x, y, lengths, x_test"),
        (
            {**TRAIN, "x_test": X, "y_test": Y, "lengths": np.full(6, 3)},
            "has lengths of one part alone: expected lengths and lengths_test, or neither",
        ),
        ({**TRAIN, "x_test": X, "y_test": Y, "lengths_test": np.full(6, 3)}, "of one part alone"),
        ({"x": X[0, 0], "y": Y}, "x has shape (2,)"),
        ({"x": Y, "y": Y}, "in <U4, expected numbers"),
        ({"x": X, "y": Y[:4]}, "train data: 6 sequences have 4 targets"),
        (
            {"x": X, "y": Y[:, None]},
            "y has shape (6, 1) in <U4, expected a whole number or the",
        ),
        ({"x": X, "y": np.arange(6) / 2}, "y has shape (6,) in float64"),
        ({"x": X[:0], "y": Y[:0]}, "train data: there are no sequences"),
        ({"x": X, "y": Y, "lengths": np.array([1, 2])}, "lengths has shape (2,), expected (6,)"),
        ({"x": X, "y": Y, "lengths": np.full((6, 1), 5)}, "lengths has shape (6, 1)"),
        (
            {"x": X, "y": Y, "lengths": np.full(6, 5.0)},
            "length 0 is 5.0, expected a whole number from",
        ),
        (
            {"x": X, "y": Y, "lengths": np.full(6, 6)},
            "length 0 is 6, expected a whole number from",
        ),
        ({"x": X[:, :0], "y": Y}, "train: sequence 0 has shape (0, 2), expected"),
        ({"x": X[..., :0], "y": Y}, "train: sequence 0 has shape (5, 0), expected"),
        ({"x": X * np.inf, "y": Y}, INFINITE),
        ({"x": np.full((6, 5), np.longdouble("1e4000")), "y": Y}, INFINITE),
        ({"x": X, "y": np.ones(6, int)}, "all training sequences are of class 1"),
        (
            {**TRAIN, "x_test": X[:1], "y_test": np.array(["fly"])},
            "the test part has class 'fly', wh",
        ),
        ({**TRAIN, "x_test": X[:1, :, :1], "y_test": Y[:1]}, "(5, 1), expected (T, 2) as in train"),
        ({"x": np.array([[1], [2, 3]], dtype=object), "y": Y[:2]}, "cannot be read"),
    ],
)
def test_an_npz_whose_arrays_do_not_fit_each_other_is_refused(tmp_path, arrays, message):
    assert message in refusal(npz(tmp_path, **arrays))


def test_files_of_no_known_form_are_refused(tmp_path):
    pytest.importorskip("aeon")
    assert refusal(f"{tmp_path}/no.npz") == f"there is no file {tmp_path}/no.npz"
    assert refusal(f"{tmp_path}/no_TRAIN.ts") == f"there is no file {tmp_path}/no_TRAIN.ts"
    assert "expected NAME_TRAIN.ts" in refusal(f"{tmp_path}/no.ts")
    assert "expected NAME_TRAIN.ts" in refusal(f"{tmp_path}/no.csv")
    (tmp_path / "text.npz").write_text("no zip")
    assert "cannot be read" in refusal(f"{tmp_path}/text.npz")
    np.save(tmp_path / "one.npy", X)
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    assert "cannot be read" in refusal(f"{tmp_path}/one.npz")
    for text in ("no series", "@data\nx,y:a", "@classLabel false\n@data\n1,2:3", ""):
        for part in ("TRAIN", "TEST"):
            (tmp_path / f"text_{part}.ts").write_text(text)
        message = refusal(f"{tmp_path}/text_TRAIN.ts")
        assert re.search("cannot be read|no classification", message)


def test_a_class_that_the_header_does_not_list_is_refused(tmp_path):
    pytest.importorskip("aeon")
    path = ts(tmp_path, ["1,2:4,5:a", "7,8:9,10: b", "0,1:2,3:c"], ["0,1:2,3:b"])
    assert refusal(path) == (
        f"{path}: sequence 2 is of class c, expected one of those that @classLabel lists: a, b"
    )
    path = ts(tmp_path, ["1,2:4,5:a", "7,8:9,10: b"], ["0,1:2,3:b"])
    assert load_series(path, tmp_path).classes == ["a", "b"]


def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path):
    pytest.importorskip("aeon")
    for name in ("mine.npz", "Mine_TRAIN.ts"):
        os.mkfifo(tmp_path / name)
        assert refusal(f"{tmp_path}/{name}") == f"{tmp_path}/{name} is not a file"


def test_archive_names_are_checked_before_the_network_is_asked(tmp_path, monkeypatch):
    pytest.importorskip("aeon")
    import aeon.datasets._data_loaders as loaders

    def no_network(*arguments, **options):
        raise OSError("Name or service not known")

    monkeypatch.setattr(loaders, "urlopen", no_network)
    monkeypatch.setattr(loaders.urllib.request, "urlretrieve", no_network)
    assert refusal("gunpoint", tmp_path).endswith("have no such set, but GunPoint")
    assert refusal("Elephants", tmp_path).endswith("have no such set")
    assert refusal("Elephants" * 100, tmp_path).endswith("have no such set")
    message = refusal("Wafer", tmp_path)
    assert message.startswith("Wafer cannot be downloaded: ")


def test_without_aeon_it_is_asked_for_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "aeon", None)  # as if there were none
    assert refusal("GunPoint").endswith("read by aeon, which is not installed: pip install aeon")
    assert load_series(npz(tmp_path, x=X, y=Y), tmp_path).classes  # which needs none
