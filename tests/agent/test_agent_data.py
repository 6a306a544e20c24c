"""Files into tables: what is read, and what each error says and does not say."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path

import msgspec
import numpy as np
import pytest

from sordino_agent.data.catalogue import FileCatalogue
from sordino_agent.data.files import load_table
from sordino_agent.data.table import split_rows, table_of
from sordino_agent.datasets import DatasetSpec
from sordino_agent.errors import DatasetError, UnknownData

MAX = 1 << 20


def spec(path: Path, **more: object) -> DatasetSpec:
    return msgspec.convert({"name": "toy", "path": str(path), **more}, DatasetSpec)


def write(path: Path, text: str) -> Path:
    path.write_text(text, "utf-8")
    return path


def test_csv(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", '\ufeffage,"blood, pressure",y\n1,2.5,-3e2\n\n4,5,6\n')
    table = load_table(spec(path), max_bytes=MAX)
    assert list(table.columns) == ["age", "blood, pressure", "y"]
    assert table.columns["y"].tolist() == [-300.0, 6.0]
    assert [column.dtype for column in table.info().columns] == ["float64"] * 3
    assert (table.info().train_rows, table.info().test_rows) == (2, 0)


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("a,b\n1,2\n3,secret7\n", ":3:", ("column 2 (b)", "not a finite number", "columns")),
        ("a,b\n1,2\n\n3,nan\n", ":4:", ("column 2 (b)", "not a finite number")),
        ("a,b\n1, \n", ":2:", ("column 2 (b)", "is empty")),
        ("a,b\n1,2,3\n", ":2:", ("3 cells, the header has 2",)),
        ("a,a\n1,2\n", ":1:", ("'a' is there twice",)),
        ("a,\n1,2\n", ":1:", ("name for every column",)),
        ("", ":1:", ("header row",)),
        ('a,b\n1,"2\n', ":2:", ("not valid CSV",)),
    ],
)
def test_csv_errors_name_line_and_column_and_no_cell(
    tmp_path: Path, text: str, place: str, words: tuple[str, ...]
) -> None:
    path = write(tmp_path / "a.csv", text)
    with pytest.raises(DatasetError) as caught:
        load_table(spec(path), max_bytes=MAX)
    assert str(caught.value).startswith(f"{path}{place}")
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "secret7" not in str(caught.value)
    assert str(path) not in caught.value.public


def test_csv_reads_only_the_columns_on_offer(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "id,x,y\nalice,1,2\nbob,3,4\n")
    table = load_table(spec(path, columns=["y", "x"]), max_bytes=MAX)
    assert list(table.columns) == ["y", "x"]
    table = load_table(spec(path, features=["x"], target="y"), max_bytes=MAX)
    assert list(table.columns) == ["x", "y"]
    with pytest.raises(DatasetError, match="no column 'z'; the file has id, x, y"):
        load_table(spec(path, columns=["z"]), max_bytes=MAX)


def test_files_over_the_limit_are_not_opened(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "a\n" + "1\n" * 100)
    with pytest.raises(DatasetError, match=r"limits\.memory_bytes allows 50"):
        load_table(spec(path), max_bytes=50)
    np.savez_compressed(tmp_path / "b.npz", zeros=np.zeros(200_000))
    with pytest.raises(DatasetError, match="when unpacked"):
        load_table(spec(tmp_path / "b.npz"), max_bytes=100_000)


def test_npz_and_npy(tmp_path: Path) -> None:
    image = np.arange(4 * 2 * 3, dtype=">i4").reshape(4, 2, 3)
    np.savez(tmp_path / "b.npz", image=image, label=np.arange(4))
    table = load_table(spec(tmp_path / "b.npz"), max_bytes=MAX)
    assert table.columns["image"].dtype == np.dtype("<i4")
    assert np.array_equal(table.columns["image"], image)
    assert [column.shape for column in table.info().columns] == [(2, 3), ()]
    np.save(tmp_path / "c.npy", np.arange(6.0).reshape(3, 2))
    table = load_table(spec(tmp_path / "c.npy", columns=["a", "b"]), max_bytes=MAX)
    assert table.columns["b"].tolist() == [1, 3, 5]
    assert load_table(spec(tmp_path / "c.npy", columns=["a"]), max_bytes=MAX).columns["a"].shape == (3, 2)
    with pytest.raises(DatasetError, match="give `columns`"):
        load_table(spec(tmp_path / "c.npy"), max_bytes=MAX)
    with pytest.raises(DatasetError, match=r"\[rows, 3\] is expected"):
        load_table(spec(tmp_path / "c.npy", columns=["a", "b", "c"]), max_bytes=MAX)


def test_pickles_are_never_read(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (pytest.fail, ("unpickled",))

    np.save(tmp_path / "a.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    with pytest.raises(DatasetError, match="without pickles"):
        load_table(spec(tmp_path / "a.npy", columns=["a"]), max_bytes=MAX)
    (tmp_path / "b.npy").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(DatasetError, match="without pickles"):
        load_table(spec(tmp_path / "b.npy", columns=["a"]), max_bytes=MAX)
    buffer = io.BytesIO()
    np.save(buffer, np.array([Bomb()], dtype=object), allow_pickle=True)
    with zipfile.ZipFile(tmp_path / "c.npz", "w") as archive:
        archive.writestr("a.npy", buffer.getvalue())
    with pytest.raises(DatasetError, match="without pickles"):
        load_table(spec(tmp_path / "c.npz"), max_bytes=MAX)
    (tmp_path / "d.npz").write_bytes(b"PK not a zip")
    with pytest.raises(DatasetError, match="not a readable NPZ"):
        load_table(spec(tmp_path / "d.npz"), max_bytes=MAX)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"a": np.array(["x", "y"])}, "numbers"),
        ({"a": np.array([1.0, np.inf])}, "row 1: NaN or infinite"),
        ({"a": np.zeros(3), "b": np.zeros(2)}, "differ in length"),
        ({"a": np.float64(3.0)}, "rows"),
    ],
)
def test_arrays_that_are_no_columns(tmp_path: Path, columns: dict[str, np.ndarray], words: str) -> None:
    np.savez(tmp_path / "a.npz", **columns)
    with pytest.raises(DatasetError, match=words):
        load_table(spec(tmp_path / "a.npz"), max_bytes=MAX)


def test_missing_file_names_the_reason(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="No such file"):
        load_table(spec(tmp_path / "none.csv"), max_bytes=MAX)


# --- the split ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "fraction", "tests"), [(10, 0.2, 2), (10, 0.0, 0), (1, 0.5, 0), (2, 0.01, 1), (3, 0.9, 2)]
)
def test_split_is_a_partition_and_deterministic(rows: int, fraction: float, tests: int) -> None:
    train, test = split_rows(rows, test_fraction=fraction, seed=3)
    assert len(test) == tests
    assert sorted([*train, *test]) == list(range(rows))
    again = split_rows(rows, test_fraction=fraction, seed=3)
    assert all(np.array_equal(one, two) for one, two in zip((train, test), again, strict=True))


def test_split_by_fraction_is_the_recorded_one() -> None:
    """A change here would move rows between train and test on devices in the field."""
    _, test = split_rows(12, test_fraction=0.25, seed=3)
    assert test.tolist() == [0, 4, 9]


def test_split_by_rows_and_by_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "a\n" + "".join(f"{i}\n" for i in range(5)))
    other = write(tmp_path / "b.csv", "a\n7\n8\n")
    table = load_table(spec(path, test_rows=2), max_bytes=MAX)
    assert (table.train.tolist(), table.test.tolist()) == ([0, 1, 2], [3, 4])
    table = load_table(spec(path, test_path=str(other)), max_bytes=MAX)
    assert table.columns["a"][table.test].tolist() == [7.0, 8.0]
    with pytest.raises(DatasetError, match="test_rows is 5"):
        load_table(spec(path, test_rows=5), max_bytes=MAX)
    with pytest.raises(DatasetError, match="lacks the column 'a'"):
        load_table(spec(path, test_path=str(write(tmp_path / "c.csv", "b\n1\n"))), max_bytes=MAX)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"test_rows": 3, "test_fraction": 0.1}, "one of test_fraction"),
        ({"columns": ["a"], "features": ["b"], "target": "c"}, "either columns"),
        ({"features": ["b"]}, "come together"),
        ({"columns": ["a", "a"]}, "named twice"),
        ({"path": "a.parquet"}, "is not csv, npz or npy"),
    ],
)
def test_specs_that_contradict_themselves(more: dict[str, object], words: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=words):
        msgspec.convert({"name": "toy", "path": "a.csv", **more}, DatasetSpec)


# --- the catalogue -----------------------------------------------------------------------------------------------


def test_catalogue_reads_once_and_reports_what_it_cannot_read(tmp_path: Path) -> None:
    good = spec(write(tmp_path / "a.csv", "a\n1\n2\n"))
    bad = msgspec.structs.replace(good, name="bad", path=str(tmp_path / "none.csv"))
    loads: list[str] = []

    def load(one: DatasetSpec, *, max_bytes: int):
        loads.append(one.name)
        return load_table(one, max_bytes=max_bytes)

    catalogue = FileCatalogue([good, bad], max_bytes=MAX, load=load)
    described = catalogue.describe()
    assert [info.name for info in described.datasets] == ["toy"]
    assert [problem.dataset for problem in described.problems] == ["bad"]
    assert "none.csv" in described.problems[0].detail
    catalogue.table("toy")
    assert loads == ["toy", "bad"]
    with pytest.raises(UnknownData, match="there are: toy, bad"):
        catalogue.table("other")


def test_table_shows_no_values() -> None:
    table = table_of("toy", {"a": np.array([123.456])})
    assert "123" not in repr(table)
    assert "123" not in repr(table.info())
