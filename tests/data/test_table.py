"""Tables of images: formats, splits, labels, groups, and everything that can be wrong with them."""

import csv
import gzip
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from jaxft.config import may_change
from jaxft.data import datasets, image_folder
from jaxft.data.dataset import DataOptions, Dataset
from jaxft.data.fields import parse_targets
from jaxft.data.identity import differences
from jaxft.data.lazy_images import LazyImages
from jaxft.data.table import load_table
from jaxft.data.table_file import read_table
from jaxft.errors import UserError

ALL = "class:species, tags:tags, age=number:age*0.5, signs=tags:wet|dark"
ROWS = [
    {"species": "cat", "tags": "red | big|red", "age": "3", "wet": "1", "dark": "no", "split": "train"},
    {"species": "dog", "tags": "", "age": "5", "wet": "", "dark": "yes", "split": "train"},
    {"species": "", "tags": "|", "age": "", "wet": "False", "dark": "", "split": "train"},
    {"species": "cat", "tags": "big", "age": "1e1", "wet": "0", "dark": "0", "split": "train"},
    {"species": "dog", "tags": "red", "age": "-4.5", "wet": "true", "dark": "1", "split": "test"},
    {"species": "", "tags": "", "age": "", "wet": "", "dark": "", "split": "test"},
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Returns a folder with images 0.png to 23.png, whose pixels are their number."""
    root = tmp_path / "fötos"
    root.mkdir()
    for i in range(24):
        Image.fromarray(np.full((4, 4, 3), i, np.uint8)).save(root / f"{i}.png")
    return root


def write(path: Path, rows: Iterable[dict[str, Any]], **options: Any) -> Path:
    """Writes a table as its name says; `path` of row i is i.png unless the row has one."""
    rows = [{"path": f"{i}.png"} | row for i, row in enumerate(rows)]
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        names = dict.fromkeys(name for row in rows for name in row)
        with path.open("w", newline="", encoding=options.pop("encoding", "utf-8")) as file:
            writer = csv.DictWriter(file, names, delimiter="\t" if path.suffix == ".tsv" else ",", **options)
            writer.writeheader()
            writer.writerows(rows)
    return path


def splits(path: Path, targets: str = "", **options: Any) -> tuple[Dataset, Dataset]:
    chosen = DataOptions(**options)
    train = datasets.load(f"table:{path}", "train", chosen, targets=targets)
    names = train.class_names or None
    return train, datasets.load(f"table:{path}", "test", chosen, names, targets=targets, train_fields=train.fields)


def numbers(data: Dataset) -> list[int]:
    found = np.asarray(data.image[np.arange(data.num_examples)])[:, 0, 0, 0].tolist()
    assert [path.name for path in data.origin.files] == [f"{i}.png" for i in found]
    return found


def check_all(path: Path) -> Dataset:
    """Checks the splits of a table with ROWS."""
    train, test = splits(path, ALL)
    assert [field.names for field in train.fields] == [("cat", "dog"), ("big", "red"), (), ("dark", "wet")]
    assert [field.weight for field in train.fields] == [1, 1, 0.5, 1]
    assert (train.class_names, train.num_examples, test.fields) == ((), 4, train.fields)
    assert (numbers(train), numbers(test)) == ([0, 1, 2, 3], [4, 5])
    assert train.label["species"].tolist() == [0, 1, -1, 0] and train.label["species"].dtype == np.int32
    assert train.label["tags"].tolist() == [[1, 1], [-1, -1], [0, 0], [1, 0]] and train.label["tags"].dtype == np.int8
    assert train.label["signs"].tolist() == [[0, 1], [1, -1], [-1, 0], [0, 0]]
    age = train.fields[2]
    ages = np.array([3, 5, 10])
    assert (age.mean, age.std) == (6, np.std(ages))
    assert train.label["age"].dtype == np.float32
    np.testing.assert_allclose(train.label["age"] * age.std + age.mean, [3, 5, np.nan, 10], rtol=1e-6)
    np.testing.assert_allclose(test.label["age"] * age.std + age.mean, [-4.5, np.nan], rtol=1e-6)
    assert test.label["species"].tolist() == [1, -1]
    assert test.label["tags"].tolist() == [[0, 1], [-1, -1]]
    assert test.label["signs"].tolist() == [[1, 1], [-1, -1]]
    return train


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "A.CSV"])
def test_labels_of_all_kinds_are_encoded(root: Path, name: str) -> None:
    check_all(write(root / name, ROWS))


def test_csv_survives_a_bom_crlf_quotes_empty_lines_and_an_index(root: Path) -> None:
    rows = [{"": i} | row | {"note": 'a "quoted",\r\nnote | ü 🐈'} for i, row in enumerate(ROWS)]
    path = write(root / "a.csv", rows, encoding="utf-8-sig", quoting=csv.QUOTE_ALL)
    path.write_bytes(path.read_bytes().replace(b"\r\n", b"\r\n\r\n") + b"\r\n,,,,,,,,\r\n")
    check_all(path)
    path.write_bytes(path.read_bytes().replace(b",", b", "))
    check_all(path)


def test_compressed_tables_are_read(root: Path) -> None:
    path = write(root / "a.csv", ROWS)
    (root / "a.csv.gz").write_bytes(gzip.compress(path.read_bytes()))
    check_all(root / "a.csv.gz")


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_json_and_parquet_have_lists_numbers_and_nulls(root: Path, name: str) -> None:
    tags = [["red", "big", "red"], None, [], ["big"], ["red"], None]
    typed = []
    for row, names in zip(ROWS, tags, strict=True):
        truths = {key: {"1": True, "true": True, "yes": True, "": None}.get(row[key], False) for key in ("wet", "dark")}
        age = float(row["age"]) if row["age"] else None
        typed.append(row | truths | {"species": row["species"] or None, "tags": names, "age": age})
    check_all(write(root / name, typed))


def test_a_single_class_is_like_a_folder(root: Path) -> None:
    rows = [{"label": label} for label in ("b", "a", "", " b ", "a", "10", "2")]
    train, test = splits(write(root / "a.csv", [row | {"split": s} for s in ("train", "test") for row in rows]))
    assert (train.class_names, train.fields, train.group) == (("10", "2", "a", "b"), (), None)
    assert train.label.dtype == np.int32 and train.label.tolist() == [3, 2, 3, 2, 0, 1]
    assert numbers(train) == [0, 1, 3, 4, 5, 6]
    assert numbers(test) == [7, 8, 10, 11, 12, 13]
    assert (train.origin.folder, train.origin.layout) == (str(root), "table")
    assert datasets.describe(train, test) == "4 classes, from 1 image (10) to 2 (a)"
    assert "skipped: 2 rows without a label" in list(datasets.describe_origin(train, test))
    assert "not used: 7 rows of the split 'test'" in list(datasets.describe_origin(train, train, used=("train", "")))
    assert not any("not used" in line for line in datasets.describe_origin(train, test, used=("train", "test")))


def test_numbers_are_classes_by_their_text(root: Path) -> None:
    rows = [{"label": label} for label in (1, 2, 2.0, True, 1.5, None)] * 2
    train, _ = splits(
        write(root / "a.jsonl", [row | {"split": "test" if i > 5 else "train"} for i, row in enumerate(rows)])
    )
    assert train.class_names == ("1", "1.5", "2", "true")
    assert train.label.tolist() == [0, 2, 2, 3, 1]


def test_a_single_column_of_zeros_and_ones_is_a_tag(root: Path) -> None:
    rows = [{"wet": value, "split": split} for value, split in zip("01 1", ["train"] * 3 + ["test"], strict=True)]
    train, test = splits(write(root / "a.csv", rows), "tags:wet")
    assert train.fields[0].names == ("wet",)
    assert train.label["wet"].tolist() == [[0], [1], [-1]]
    assert test.label["wet"].tolist() == [[1]]
    assert datasets.describe(train, test) == "wet: 1 tag (33 % missing)"


def test_a_constant_number_is_allowed_and_reported(root: Path) -> None:
    train, test = splits(write(root / "a.csv", [{"n": "0.1"}] * 10), "number:n")
    assert (train.fields[0].mean, train.fields[0].std) == (0.1, 1)
    assert set(train.label["n"].tolist()) == {0}
    assert datasets.describe(train, test) == "n: always 0.1, from which nothing can be learned"


def labelled(count: int = 20) -> list[dict[str, str]]:
    return [{"label": "ab"[i % 2], "patient": f"p{i // 4}"} for i in range(count)]


def test_without_a_column_of_splits_a_part_is_held_out(root: Path) -> None:
    path = write(root / "a.csv", labelled())
    train, test = splits(path)
    assert sorted(numbers(train) + numbers(test)) == list(range(20))
    assert np.bincount(train.label).tolist() == [8, 8]
    assert np.bincount(test.label).tolist() == [2, 2]
    reordered, _ = splits(
        write(root / "b.csv", [{"path": f"{i}.png", "label": "ab"[i % 2]} for i in reversed(range(20))])
    )
    assert sorted(numbers(reordered)) == sorted(numbers(train))
    more, _ = splits(write(root / "c.csv", labelled(22)))
    assert len(set(numbers(more)) ^ set(numbers(train))) <= 3
    with pytest.raises(UserError, match="there is no column 'split' to name the split 'val'; add it, or set"):
        datasets.load(f"table:{path}", "val", DataOptions())


@pytest.mark.parametrize("targets", ["", "number:age", "age=number:age, class:label"])
def test_groups_are_not_divided(root: Path, targets: str) -> None:
    rows = [row | {"age": str(i)} for i, row in enumerate(labelled())]
    train, test = splits(write(root / "a.csv", rows), targets, group="patient")
    assert train.group is not None and test.group is not None
    assert not set(train.group) & set(test.group)
    assert (train.num_examples, test.num_examples) == (16, 4)
    assert len(set(test.group)) == 1


def test_a_row_without_a_group_is_one_and_rows_of_one_file_are_in_one(root: Path) -> None:
    rows = [{"path": f"{i // 2}.png", "label": "ab"[i % 2], "patient": ""} for i in range(12)]
    rows[0]["patient"] = rows[11]["patient"] = "p"
    path = write(root / "a.csv", rows)
    train, test = splits(path, group="patient", holdout=0.5)
    assert train.group is not None and test.group is not None
    assert sorted(set(train.group) | set(test.group)) == [0, 1, 2, 3, 4]  # the first and the last file are in one
    assert not set(train.origin.files) & set(test.origin.files)
    train, test = splits(path, holdout=0.5)
    assert not set(train.origin.files) & set(test.origin.files)


@pytest.mark.parametrize("cached", ["auto", "never"])
def test_files_and_groups_in_both_splits_are_reported(root: Path, cached: str) -> None:
    rows = [
        {"path": f"./{i % 3}.png" if i > 3 else f"{i}.png", "label": "ab"[i % 2], "patient": f"p{i % 4}"}
        | {"split": split}
        for i, split in enumerate(["train"] * 4 + ["test"] * 4)
    ]
    train, test = splits(write(root / "a.csv", rows), group="patient", cache=cached)
    assert list(datasets.shared_images(train, test)) == [0, 1, 2, 3]
    assert "; 4 test images are also in the training set, which inflates the accuracy" in datasets.describe(train, test)
    for i in range(4, 8):
        rows[i]["path"] = f"{i}.png"
    train, test = splits(write(root / "a.csv", rows), group="patient", cache=cached)
    assert "; 4 groups are in both sets, which inflates the accuracy" in datasets.describe(train, test)


def test_images_are_decoded_once_even_if_labels_change(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row | {"split": "train" if i < 16 else "test"} for i, row in enumerate(labelled())]
    path = write(root / "a.csv", rows)
    first, _ = splits(path)
    assert isinstance(first.image, np.memmap)
    monkeypatch.setattr(image_folder, "read_file", None)
    rows[0]["label"] = "c"
    again, _ = splits(write(path, rows))
    assert again.class_names == ("a", "b", "c")
    assert differences(first.identity(), again) == "3 classes instead of 2"
    monkeypatch.undo()
    Image.new("RGB", (4, 4), "red").save(root / "1.png")
    monkeypatch.setenv("JAXFT_CACHE", str(root.parent / "cache"))
    changed, _ = splits(path)
    assert changed.image[1, 0, 0].tolist() == [255, 0, 0]


def test_lazy_images_and_images_of_several_sizes(root: Path) -> None:
    path = write(root / "a.csv", labelled())
    train, _ = splits(path, cache="never")
    assert isinstance(train.image, LazyImages)
    assert numbers(train) == numbers(splits(path)[0])
    Image.new("RGB", (9, 6)).save(root / "0.png")
    assert {data.image.shape[1:3] for data in splits(path, side=3)} == {(3, 3)}


@pytest.mark.parametrize("cached", ["auto", "never"])
def test_unreadable_files_are_refused_or_skipped(root: Path, cached: str) -> None:
    rows = [{"label": "ab"[i % 2], "age": i, "split": "train" if i < 6 else "test"} for i in range(12)]
    path = write(root / "a.csv", rows)
    (root / "3.png").write_text("no image")
    (root / "5.png").unlink()
    with pytest.raises(UserError, match=r"1 file not found in .*: 5\.png"):
        splits(path, cache=cached)
    train, _ = splits(path, "class:label, number:age", cache=cached, unreadable="skip")
    assert numbers(train) == [0, 1, 2, 4]
    assert train.label["label"].tolist() == [0, 1, 0, 0]
    assert train.fields[1].mean == 1.75
    (root / "1.png").write_text("no image")
    with pytest.raises(UserError, match="no file of b in column 'label' can be read as an image"):
        splits(path, cache=cached, unreadable="skip")


def test_a_moved_table_is_the_same_and_a_changed_one_is_not(root: Path, tmp_path: Path) -> None:
    for targets in ("", ALL):
        rows = [{"label": "ab"[i % 2]} | row for i, row in enumerate(ROWS)]
        train, _ = splits(write(root / "a.csv", rows), targets)
        stored = json.loads(json.dumps(train.identity()))
        moved = shutil.copytree(root, tmp_path / f"moved{len(targets)}")
        assert differences(stored, splits(moved / "a.csv", targets)[0]) == ""
        Image.new("RGB", (4, 4), "red").save(moved / "0.png")
        changed = splits(moved / "a.csv", targets)[0]
        assert differences(stored, changed) == "the files of the images have other content or another order"
    rows[0] |= {"age": "4", "species": "dog"}
    changed = splits(write(root / "a.csv", rows), ALL)[0]
    assert differences(stored, changed) == "species has other labels, age has other labels"
    rows = [row | {"species": row["species"].replace("cat", "cow")} for row in ROWS]
    renamed = splits(write(root / "a.csv", rows), ALL)[0]
    assert differences(stored, renamed) == "species has other labels"
    more = splits(write(root / "a.csv", [*ROWS, ROWS[0]]), ALL)[0]
    assert differences(stored, more) == "5 images instead of 4"
    other = splits(write(root / "a.csv", ROWS), "tags:tags")[0]
    assert differences(stored, other) == "the targets are tags instead of species, tags, age and 1 more"
    assert may_change("data.name", "table:a", "table:b") and not may_change("data.name", "table:a", "folder:b")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("path,lable\n0.png,a\n", r"there is no column 'label', did you mean 'lable'\? \(--config\.targets\)"),
        ("file,label\n0.png,a\n", r"there is no column 'path', it has file, label \(--config\.data\.path_column\)"),
        ("", "has no rows; write one row for each image"),
        ("path,label\n\n,\n", "has no rows"),
        (
            "path,label\n0.png,a\n1.png\n2.png,b,c\n",
            "its header has 2 cells, but line 3 has 1 cell, line 4 has 3 cells",
        ),
        ("path,label,label\n0.png,a,b\n", "it has several columns 'label'; rename or remove them"),
        ("path;label\n0.png;a\n", "its cells are separated by ';' instead of commas"),
        ('path,label\n0.png,"a\n', "line 2: .*; check its quotes"),
        ("path,label\n0.png,a\0\n", "line 2 has a NUL byte"),
        (
            "path,label\n0.png,a\n1.png,\n2.png,a\n3.png,a\n",
            "the training split has only one class, 'a'; two or more are needed",
        ),
        ("path,label\n0.png,\n1.png,\n", "column 'label': no row of the split 'train' has a label"),
        (
            "path,label\n0.png,a\n1.png,a\n2.png,b\n",
            r"classes with one image cannot be divided by data\.holdout=0\.2: b",
        ),
        (
            "path,label\n0.png,a\nx.png,a\ny.png,b\nz.png,b\nw.png,b\n",
            r"4 files not found in .*: x\.png, y\.png, z\.png and 1",
        ),
        ("path,label\n0.png,a\n,b\n", "column 'path': line 3 has no path of an image"),
        (
            "path,label,split\n0.png,a,training\n1.png,b,val\n",
            "no row has the split 'train' in .*, there are training, val",
        ),
        ("path,label,split\n0.png,a,\n", "no row has the split 'train' in the column 'split', its cells are empty"),
    ],
)
def test_wrong_tables_are_reported(root: Path, text: str, expected: str) -> None:
    (root / "a.csv").write_text(text)
    with pytest.raises(UserError, match=expected):
        splits(root / "a.csv")


@pytest.mark.parametrize(
    ("targets", "cells", "expected"),
    [
        (
            "number:x",
            ["1,000", "2", "1_000"],
            "column 'x': line 2 holds '1,000', which is not a number .*, line 4 holds '1_000'",
        ),
        ("number:x", ["inf", "2", "٣"], "line 2 holds 'inf', .*, line 4 holds '٣'"),
        ("number:x", ["", "", ""], "column 'x': no row of the training split has a label"),
        ("number:x", ["1e308", "-1e308", "1e308"], "column 'x': its numbers are too large"),
        ("number:x", ["1e31", "", "3e31"], "column 'x': its numbers are too large; divide them by a constant"),
        ("number:x", ["1e-300", "2e-300", ""], "column 'x': its numbers differ too little"),
        ("tags:x", ["|", "", " "], "column 'x': no row of the training split has a tag"),
        ("tags:x|y", ["1", "0", "2"], "line 4 holds '2', which is not 0, 1, true, false, yes, no or empty"),
        ("tags:x|y", ["1", "0", ""], "no row of the training split has a value of y"),
    ],
)
def test_wrong_labels_are_reported(root: Path, targets: str, cells: list[str], expected: str) -> None:
    path = write(root / "a.csv", [{"x": cell, "y": "", "split": "train"} for cell in cells])
    with pytest.raises(UserError, match=expected):
        splits(path, targets)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_tags_that_are_a_structure_are_reported(root: Path, name: str) -> None:
    path = write(root / name, [{"x": {"a": 1}, "split": "train"}])
    with pytest.raises(UserError, match=r"column 'x': (line|row) 1 is a dict, not text or a number"):
        splits(path, "tags:x")


@pytest.mark.filterwarnings("error")
def test_test_numbers_far_from_those_of_training_are_reported(root: Path) -> None:
    cells = ["1", "2", "3", "4e13", "-1e300"]
    path = write(root / "a.csv", [{"x": x, "split": "train" if i < 3 else "test"} for i, x in enumerate(cells)])
    with pytest.raises(UserError, match=r"1e\+12 or more standard deviations .*, 2: 4e\+13, -1e\+300"):
        splits(path, "number:x")


def test_classes_and_tags_that_training_lacks_are_reported_together(root: Path) -> None:
    rows = [
        {"kind": kind, "t": tags, "split": split}
        for kind, tags, split in [
            ("cat", "x", "train"),
            ("dog", "y|z", "train"),
            ("Cat", "X|w", "test"),
            ("cow", "", "test"),
        ]
    ]
    with pytest.raises(UserError) as error:
        splits(write(root / "a.csv", rows), "class:kind, tags:t")
    text = str(error.value)
    assert "column 'kind' has classes that the training split lacks: 'Cat' (training has 'cat'), 'cow'; " in text
    assert "column 't' has tags that the training split lacks: 'X' (training has 'x'), 'w'" in text


def test_everything_that_is_wrong_is_reported_at_once(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"kind": "a", "age": "old", "path": "?.png", "split": "train"}, {"kind": "", "age": "1", "split": "test"}]
    path = write(root / "a.csv", rows)
    with pytest.raises(
        UserError, match=r"column 'age': line 2 holds 'old'.*; 1 file not found in .*: \?\.png; .*one class"
    ):
        splits(path, "class:kind, number:age")
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith(f"the table {path}: ") for line in lines)
    assert [line.removeprefix(f"the table {path}: ")[:10] for line in lines] == [
        *["column 'ag", "1 file not", "column 'ki", "column 'ag"]
    ]
    with pytest.raises(
        UserError, match=r"no column 'files', .*; there is no column 'sex', .*; there is no column 'patient'"
    ):
        splits(path, "number:age, class:sex", path_column="files", group="patient")
    assert len(capsys.readouterr().err.splitlines()) == 3  # since the error's line is cut


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.xlsx", b"PK", "is none of .csv, .tsv, .jsonl, .parquet"),
        ("a.csv", "päth,label\n".encode("utf-16"), "is not encoded as UTF-8"),
        ("a.csv", "päth,label\n".encode("latin-1"), "is not encoded as UTF-8"),
        ("a.csv.gz", b"path,label", "cannot be read"),
        ("a.parquet", b"PAR1", "is not a Parquet file"),
        ("a.parquet", b"", "is not a Parquet file"),
        (
            "a.jsonl",
            b'{"path": "0.png"}\n[]\n{"a": 1, "a": 2}\n{',
            "line 2 is not a JSON object, line 3 is not JSON .*line 4",
        ),
        ("a.jsonl", b'{"path": "\\u0000", "label": "a"}\n', "line 1 has a path with a NUL"),
        ("a.jsonl", b'{"path": "\\ud800", "label": "a"}\n', "line 1 has a path that no file can have"),
        (
            "a.jsonl",
            b'{"path": "0.png", "label": {"a": 1}}\n',
            "column 'label': line 1 is a dict, not text or a number",
        ),
        (
            "a.jsonl",
            b'{"path": "0.png", "label": "\\ud800"}\n',
            "column 'label': line 1 holds half of a surrogate pair, which is not a character",
        ),
    ],
)
def test_files_that_are_not_tables_are_reported(root: Path, name: str, content: bytes, expected: str) -> None:
    (root / name).write_bytes(content)
    with pytest.raises(UserError, match=expected):
        splits(root / name)


def test_paths_without_the_prefix_get_a_hint(root: Path) -> None:
    path = write(root / "a.csv", labelled())
    (root / "folder.csv").mkdir()
    for name in (str(path), f"csv:{path}", f"folder:{path}"):
        with pytest.raises(UserError, match=r"set '?--config\.data\.name='?table:"):
            datasets.load(name, "train")
    with pytest.raises(UserError, match=r"there is no table .*missing\.csv"):
        datasets.load(f"table:{root}/missing.csv", "train")
    with pytest.raises(UserError, match="it is a folder, not a file"):
        datasets.load(f"table:{root}/folder.csv", "train")
    with pytest.raises(UserError, match=r"data\.name lacks the table's path; set --config\.data\.name=table:FILE"):
        datasets.load("table:", "train")
    with pytest.raises(UserError, match="targets are columns of a table"):
        datasets.load("sample:cifar10", "train", targets="class:label")


@given(
    cells=st.lists(
        st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), min_size=3, max_size=3)
    )
)
def test_any_text_survives(tmp_path_factory: pytest.TempPathFactory, cells: list[list[str]]) -> None:
    path = tmp_path_factory.mktemp("any") / "a.tsv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t").writerows([["path", "x", "ü"], *(["p", *row] for row in cells)][:1])
        csv.writer(file, delimiter="\t").writerows([["p" + row[0], *row[1:]] for row in cells])
    if cells:
        table = read_table(path, ["path", "x", "ü"])
        assert list(zip(*table.columns.values(), strict=True)) == [("p" + row[0], *row[1:]) for row in cells]


def test_load_table_takes_fields(root: Path) -> None:
    data = load_table(write(root / "a.csv", ROWS), "train", DataOptions(), parse_targets("number:age"))
    assert data.fields[0].mean == 6
