"""Damages to the files and folders of a run, for benchmarks/damage.py: bytes, JSON, rows of metrics, arrays, kinds.

Every damage is a function of a path and a random generator; equal seeds give equal damages.
"""

import io
import json
import os
import random
import shutil
import stat
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

Damage = Callable[[Path, random.Random], None]

DEEP = 100_000  # levels of nesting, more than any JSON parser's stack holds
WRONG_VALUES: tuple[Any, ...] = (
    2.0,
    -1,
    -0.5,
    0,
    10**30,
    float("nan"),
    float("inf"),
    None,
    True,
    "text",
    "",
    "x" * 10_000,
    [],
    [1],
    {},
)


def remove(path: Path, rng: random.Random) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _changed(change: Callable[[bytearray, random.Random], bytes | bytearray]) -> Damage:
    def damage(path: Path, rng: random.Random) -> None:
        path.write_bytes(change(bytearray(path.read_bytes()), rng))

    return damage


def _flip(content: bytearray, rng: random.Random) -> bytearray:
    if content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return content


def _overwrite(content: bytearray, rng: random.Random) -> bytearray:
    place, size = rng.randrange(len(content) + 1), rng.choice([1, 8, 100])
    content[place : place + size] = rng.randbytes(min(size, len(content) - place))
    return content


def _insert(content: bytearray, rng: random.Random) -> bytearray:
    place = rng.randrange(len(content) + 1)
    content[place:place] = rng.randbytes(rng.choice([1, 8, 100]))
    return content


def _cut(content: bytearray, rng: random.Random) -> bytearray:
    place = rng.randrange(len(content) + 1)
    del content[place : place + rng.choice([1, 8, 100])]
    return content


BYTES: dict[str, Damage] = {
    "flip a bit": _changed(_flip),
    "overwrite": _changed(_overwrite),
    "insert": _changed(_insert),
    "cut out": _changed(_cut),
    "truncate": _changed(lambda content, rng: content[: rng.randrange(len(content) + 1)]),
    "append": _changed(lambda content, rng: content + rng.randbytes(8)),
    "zeros": _changed(lambda content, rng: bytes(len(content))),
    "empty": _changed(lambda content, rng: b""),
    "remove": remove,
}


def _replaced(create: Callable[[Path], Any]) -> Damage:
    """Removes the path, then creates something else in its place."""

    def damage(path: Path, rng: random.Random) -> None:
        remove(path, rng)
        path.parent.mkdir(parents=True, exist_ok=True)
        create(path)

    return damage


def _full_folder(path: Path) -> None:
    path.mkdir()
    (path / "file").write_text("text")


KINDS: dict[str, Damage] = {  # root ignores modes, so a link in a loop stands for a file that cannot be read
    "a folder": _replaced(Path.mkdir),
    "a full folder": _replaced(_full_folder),
    "a FIFO": _replaced(os.mkfifo),
    "a socket": _replaced(lambda path: os.mknod(path, stat.S_IFSOCK | 0o600)),
    "a link in a loop": _replaced(lambda path: path.symlink_to(path.name)),
    "a dangling link": _replaced(lambda path: path.symlink_to("nowhere")),
    "a device": _replaced(lambda path: path.symlink_to(os.devnull)),
}
FOLDERS: dict[str, Damage] = KINDS | {
    "remove": remove,
    "a file": _replaced(lambda path: path.write_text("text")),
}


def _json(change: Callable[[Any, random.Random], Any]) -> Damage:
    """Replaces the content by what `change` makes of it: bytes, or a value to be written as JSON."""

    def damage(path: Path, rng: random.Random) -> None:
        changed = change(json.loads(path.read_bytes()), rng)
        path.write_bytes(changed if isinstance(changed, bytes) else json.dumps(changed).encode())

    return damage


def _leaf(content: Any, rng: random.Random) -> tuple[Any, Any]:
    """Returns a random container inside the content and a key of it."""
    places: list[tuple[Any, Any]] = []

    def visit(node: Any) -> None:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            places.append((node, key))
            if isinstance(value, dict | list):
                visit(value)

    visit(content)
    return rng.choice(places) if places else ({}, "key")


def _set(content: Any, rng: random.Random) -> Any:
    container, key = _leaf(content, rng)
    container[key] = rng.choice(WRONG_VALUES)
    return content


def _delete(content: Any, rng: random.Random) -> Any:
    container, key = _leaf(content, rng)
    if key in container or isinstance(container, list):
        del container[key]
    return content


def _nest(content: Any, rng: random.Random) -> bytes:
    return b'{"a":' * DEEP + b"1" + b"}" * DEEP


def _nest_leaf(content: Any, rng: random.Random) -> bytes:
    container, key = _leaf(content, rng)
    container[key] = "HERE"
    return json.dumps(content).encode().replace(b'"HERE"', b"[" * DEEP + b"]" * DEEP)


def _repeat_key(content: Any, rng: random.Random) -> bytes:
    key = rng.choice(sorted(content))
    return json.dumps(content).encode()[:-1] + f", {json.dumps(key)}: {json.dumps(rng.choice(WRONG_VALUES))}}}".encode()


JSON: dict[str, Damage] = {
    **{
        f"JSON {value}": _replaced(partial(Path.write_text, data=value))
        for value in ("[]", '"text"', "3", "null", "true", "NaN", "{}")
    },
    "JSON in a list": _json(lambda content, rng: [content]),
    "JSON nested": _json(_nest),
    "JSON nested value": _json(_nest_leaf),
    "JSON wrong value": _json(_set),
    "JSON wrong values": _json(lambda content, rng: _set(_set(_set(content, rng), rng), rng)),
    "JSON missing key": _json(_delete),
    "JSON repeated key": _json(_repeat_key),
    "JSON twice": _json(lambda content, rng: 2 * json.dumps(content).encode()),
    "JSON UTF-16": _json(lambda content, rng: json.dumps(content).encode("utf-16")),
}


def _rows(change: Callable[[list[Any], random.Random], Any]) -> Damage:
    """Replaces the rows of metrics.jsonl; rows that are bytes are written as they are."""

    def damage(path: Path, rng: random.Random) -> None:
        rows: list[Any] = [json.loads(line) for line in path.read_bytes().splitlines()]
        rows = change(rows, rng) or rows
        path.write_bytes(
            b"".join((row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n") for row in rows)
        )

    return damage


def _in_row(key: str, values: tuple[Any, ...], split: str | None = None) -> Damage:
    def change(rows: list[Any], rng: random.Random) -> None:
        row = rng.choice([row for row in rows if split in (None, row["split"])])
        row[key] = rng.choice(values)

    return _rows(change)


def _insert_row(make: Callable[[list[Any], random.Random], Any]) -> Damage:
    def change(rows: list[Any], rng: random.Random) -> None:
        rows.insert(rng.randrange(len(rows) + 1), make(rows, rng))

    return _rows(change)


def _evaluations(rows: list[Any]) -> list[Any]:
    return [row for row in rows if row["split"] == "eval"]


def _exchange_accuracies(rows: list[Any], rng: random.Random) -> None:
    a, b = rng.sample(_evaluations(rows), 2)
    a["accuracy"], b["accuracy"] = b["accuracy"], a["accuracy"]


def _drop_evaluation(rows: list[Any], rng: random.Random) -> None:
    rows.remove(rng.choice(_evaluations(rows)))


def _drop_row(rows: list[Any], rng: random.Random) -> None:
    rows.pop(rng.randrange(len(rows)))


def _drop_key(rows: list[Any], rng: random.Random) -> None:
    row = rng.choice(rows)
    del row[rng.choice(sorted(row))]


def _exchange_rows(rows: list[Any], rng: random.Random) -> None:
    i, j = rng.sample(range(len(rows)), 2)
    rows[i], rows[j] = rows[j], rows[i]


def _replace_row(rows: list[Any], rng: random.Random) -> None:
    others = (b"[]\n", b"3\n", b'"text"\n', b"null\n", b"{}\n", b"\n", b"  \n", b"\0\n", b"{\n", b"\xff\xfe\n")
    rows[rng.randrange(len(rows))] = rng.choice(others)


ROWS: dict[str, Damage] = {
    "row: higher accuracy": _in_row("accuracy", (0.97, 1.0), "eval"),
    "row: lower accuracy": _in_row("accuracy", (0.0, 0.01), "eval"),
    "row: wrong accuracy": _in_row("accuracy", (2.0, -0.5, float("nan"), float("inf"), None, "text", True, [], {})),
    "row: wrong loss": _in_row("loss", (float("nan"), float("inf"), None, "text", True, [])),
    "row: wrong step": _in_row("step", (0, -1, 1.5, "3", None, 10**30, True, [], 4.0)),
    "row: wrong epoch": _in_row("epoch", (0, -1, 1.5, "3", None, 10**30, True, [])),
    "row: wrong split": _in_row("split", ("test", None, 3, ["eval"], {}, "")),
    "row: wrong seconds": _in_row("seconds", (-1, float("nan"), float("inf"), 10**30, None, "text")),
    "row: wrong speed": _in_row("images_per_second", (-1, 0, float("nan"), float("inf"), None, "text")),
    "row: accuracies exchanged": _rows(_exchange_accuracies),
    "row: evaluation missing": _rows(_drop_evaluation),
    "row: missing": _rows(_drop_row),
    "row: key missing": _rows(_drop_key),
    "row: twice": _insert_row(lambda rows, rng: rng.choice(rows)),
    "row: evaluation twice": _insert_row(lambda rows, rng: rng.choice(_evaluations(rows)) | {"accuracy": 0.97}),
    "row: without a checkpoint": _insert_row(
        lambda rows, rng: _evaluations(rows)[-1] | {"step": rng.choice([1, 100]), "accuracy": 0.97}
    ),
    "row: exchanged": _rows(_exchange_rows),
    "row: another value": _rows(_replace_row),
    "row: nested": _insert_row(lambda rows, rng: b'{"step":' * DEEP + b"\n"),
    "row: on one line": _rows(lambda rows, rng: [json.dumps(rows[0]).encode(), *rows[1:]]),
    "row: half of the last": _rows(
        lambda rows, rng: [*rows[:-1], json.dumps(rows[-1]).encode()[: rng.randrange(1, 60)]]
    ),
    "row: last without newline": _rows(lambda rows, rng: [*rows[:-1], json.dumps(rows[-1]).encode()]),
    "row: all missing": _rows(lambda rows, rng: [b""]),
}


def _arrays(change: Callable[[dict[str, Any], random.Random], Any]) -> Damage:
    """Changes the arrays of an .npz file and writes it again, whole and with right checksums."""

    def damage(path: Path, rng: random.Random) -> None:
        with np.load(path) as file:
            arrays: dict[str, Any] = {name: file[name] for name in file.files}
        change(arrays, rng)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=True, **arrays)
        path.write_bytes(buffer.getvalue())

    return damage


def _in_array(make: Callable[[np.ndarray], Any], images: bool = True) -> Damage:
    def change(arrays: dict[str, Any], rng: random.Random) -> None:
        names = [name for name in sorted(arrays) if name != "info" and (images or not name.startswith("picture_"))]
        name = rng.choice(names)
        arrays[name] = make(arrays[name])

    return _arrays(change)


def _in_info(change: Callable[[Any, random.Random], Any]) -> Damage:
    def in_arrays(arrays: dict[str, Any], rng: random.Random) -> None:
        changed = change(json.loads(str(arrays["info"])), rng)
        arrays["info"] = np.array(changed.decode() if isinstance(changed, bytes) else json.dumps(changed))

    return _arrays(in_arrays)


def _drop_array(arrays: dict[str, Any], rng: random.Random) -> None:
    del arrays[rng.choice(sorted(arrays))]


def _forge_shape(path: Path, rng: random.Random) -> None:
    """Writes an archive whose first array claims to have 10**12 rows."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**12,)})
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members[rng.choice(sorted(members))] = header.getvalue()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


ARRAYS: dict[str, Damage] = {
    "array: missing": _arrays(_drop_array),
    "array: text": _in_array(lambda array: array.astype(str)),
    "array: NaN": _in_array(lambda array: np.full(array.shape, np.nan)),
    "array: shorter": _in_array(lambda array: np.atleast_1d(array)[:-1], images=False),
    "array: longer": _in_array(
        lambda array: np.concatenate([np.atleast_1d(array), np.atleast_1d(array)[:1]]), images=False
    ),
    "array: empty": _in_array(lambda array: np.atleast_1d(array)[:0]),
    "array: scalar": _in_array(lambda array: array.flat[0] if array.size else 0),
    "array: more axes": _in_array(lambda array: array[None]),
    "array: negative": _in_array(lambda array: np.full(array.shape, -1)),
    "array: out of range": _in_array(lambda array: np.full(array.shape, 10**9)),
    "array: objects": _in_array(lambda array: np.array([{}] * max(array.size, 1), object)),
    "array: forged shape": _forge_shape,
    "info: not JSON": _in_info(lambda info, rng: b"{"),
    "info: a list": _in_info(lambda info, rng: []),
    "info: null": _in_info(lambda info, rng: None),
    "info: nested": _in_info(_nest),
    "info: wrong value": _in_info(_set),
    "info: missing key": _in_info(_delete),
}

ODD_NAMES = (
    *("99999999999999999999", "9223372036854775807", "2147483648", "-1", "007", "12.5", "abc", "9 ", "1e9"),
    *("\u0663", "\uff11\uff12", "\u00b2", "9.orbax-checkpoint-tmp", "1" * 250, "\udcff"),
)


def _odd_name(create: Callable[[Path, Path], Any]) -> Damage:
    """Creates an entry with an odd name in a folder of checkpoints; `create` gets its path and the latest one."""

    def damage(path: Path, rng: random.Random) -> None:
        latest = max((entry for entry in path.iterdir() if entry.name.isdecimal()), key=lambda entry: int(entry.name))
        create(path / rng.choice(ODD_NAMES), latest)

    return damage


NAMES: dict[str, Damage] = {
    "odd name: empty folder": _odd_name(lambda path, latest: path.mkdir()),
    "odd name: file": _odd_name(lambda path, latest: path.write_text("text")),
    "odd name: FIFO": _odd_name(lambda path, latest: os.mkfifo(path)),
    "odd name: link in a loop": _odd_name(lambda path, latest: path.symlink_to(path.name)),
    "odd name: copy of the latest": _odd_name(lambda path, latest: shutil.copytree(latest, path)),
}


def damage_checkpoint(folder: Path, rng: random.Random) -> str:
    """Makes one random damage to a checkpoint's folder and describes it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    (path,) = rng.choices(files, [path.stat().st_size for path in files] if rng.random() < 0.5 else None)
    name = path.relative_to(folder)
    content = bytearray(path.read_bytes())
    place = rng.randrange(len(content) + 1)
    kind = rng.choice(
        ["flip a bit", "overwrite", "insert", "cut out", "truncate", "empty", "remove", "swap", "remove a folder"]
    )
    size = rng.choice([1, 8, 100])
    if kind == "flip a bit" and content:
        content[place % len(content)] ^= 1 << rng.randrange(8)
    elif kind == "overwrite":
        content[place : place + size] = rng.randbytes(min(size, len(content) - place))
    elif kind == "insert":
        content[place:place] = rng.randbytes(size)
    elif kind == "cut out":
        del content[place : place + size]
    elif kind == "truncate":
        del content[place:]
    elif kind == "empty":
        content.clear()
    if kind == "remove":
        path.unlink()
    elif kind == "remove a folder":
        folders = sorted(path for path in folder.rglob("*") if path.is_dir())
        shutil.rmtree(rng.choice(folders))
    elif kind == "swap":
        other = rng.choice(files)
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)
    else:
        path.write_bytes(content)
    return f"{kind}: {name}"
