"""Files of a user's: what is in them comes back, and what is wrong with them is told in a line."""

import errno
import os
import zipfile

import numpy as np
import pytest
import refusing

from snn_lib.errors import InputError
from snn_lib.files import lock, read_array, read_arrays, read_file, write_csv

X = np.arange(24.0).reshape(2, 3, 4)


def refusal(read, *arguments):
    message = refusing.refusal(read, *arguments)
    assert str(arguments[0]) in message
    assert "pickle" not in message
    return message


def test_arrays_and_files_are_read_as_they_were_written(tmp_path):
    np.save(tmp_path / "x.npy", X)
    np.savez_compressed(tmp_path / "x.npz", x=X, z=X[1])
    assert (read_array(tmp_path / "x.npy") == X).all()
    found = read_arrays(str(tmp_path / "x.npz"), ["x", "z", "lengths"])
    assert found.keys() == {"x", "z"}
    assert (found["x"] == X).all()
    assert (found["z"] == X[1]).all()
    message = f"{tmp_path}/x.npz: unknown array 'z', expected x, y"
    assert refusal(read_arrays, tmp_path / "x.npz", ["x", "y"]) == message
    assert read_file(tmp_path / "x.npy").endswith(X.tobytes())


def test_a_table_has_a_column_for_every_key_and_a_line_for_each_row(tmp_path):
    write_csv(tmp_path / "x.csv", [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "f1": 0.25}])
    assert (tmp_path / "x.csv").read_bytes() == b"epoch,loss,f1\n1,0.5,\n2,,0.25\n"


def readers(path):
    return (read_file,), (read_array,), (read_arrays, ["x"])


def test_what_is_no_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for read, *names in readers(tmp_path):
        assert refusal(read, tmp_path / "no", *names) == f"there is no file {tmp_path}/no"
        assert refusal(read, tmp_path, *names) == f"{tmp_path} is not a file"
        assert refusal(read, tmp_path / "pipe", *names) == f"{tmp_path}/pipe is not a file"


def test_an_array_that_is_cut_or_changed_anywhere_is_refused_or_read(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, np.ones((2, 3), np.uint8))
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert "cannot be read" in refusal(read_array, path)
    for position in range(len(whole) - 6):
        path.write_bytes(whole[:position] + b"(" + whole[position + 1 :])
        try:  # a change of the header may be without consequence
            read_array(path)
        except InputError:
            refusal(read_array, path)


def test_objects_and_files_of_other_kinds_are_refused(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    np.savez(tmp_path / "objects.npz", x=np.array([{}]))
    (tmp_path / "text.npy").write_text("0 1 1 0 0 1")
    np.savez(tmp_path / "some.npz", x=X)
    for name in ("text.npy", "some.npz"):
        message = refusal(read_array, tmp_path / name)
        assert message.endswith("it is not a NumPy file of numbers")
    for refused in (
        refusal(read_array, tmp_path / "objects.npy"),
        refusal(read_arrays, tmp_path / "objects.npz", ["x"]),
    ):
        assert refused.endswith(
            "it has an array of Python objects: save numbers, and names by astype(str)"
        )
    np.save(tmp_path / "x.npy", X)
    for other in ("x.npy", "text.npy"):
        assert "cannot be read" in refusal(read_arrays, tmp_path / other, ["x"])


def test_a_file_in_an_archive_that_is_no_array_is_refused(tmp_path):
    path = tmp_path / "x.npz"
    for name, content in (("x", b"raw"), ("x.npy", b"raw"), ("x.npy", b"")):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, content)
        assert refusal(read_arrays, path, ["x"]).endswith("x is no array that NumPy has saved")


def test_an_array_that_no_memory_holds_is_refused(tmp_path):
    path = tmp_path / "x.npy"
    promised = {"descr": "<f8", "fortran_order": False, "shape": (2_000_000, 30_000_000, 4)}
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, promised)
    assert "cannot be read" in refusal(read_array, path)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_an_archive_that_is_damaged_anywhere_is_refused_or_read(tmp_path, method):
    np.save(tmp_path / "x.npy", X)
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.write(tmp_path / "x.npy", "x.npy")
    whole = path.read_bytes()
    assert (read_arrays(path, ["x"])["x"] == X).all()
    outcomes = set()
    for position in range(0, len(whole), 3):
        for content in (whole[:position], whole[:position] + b"\xff" + whole[position + 1 :]):
            path.write_bytes(content)
            try:
                outcomes.add("x" in read_arrays(path, ["x"]))
            except InputError:
                refusal(read_arrays, path, ["x"])
                outcomes.add("refused")
    assert "refused" in outcomes


def test_an_encrypted_archive_is_refused(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, x=X)
    content = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # a flag of either header
        content[content.index(mark) + offset] |= 1
    path.write_bytes(content)
    assert "encrypted" in refusal(read_arrays, path, ["x"])


def test_files_need_no_lock_where_the_file_system_has_none(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    with lock(tmp_path / "lock") as file:
        assert not file.closed
