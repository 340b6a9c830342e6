"""Reads the columns of a table from a .csv, .tsv, .jsonl or .parquet file."""

import csv
import difflib
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxft.errors import UserError, counted, shortened
from jaxft.files import open_regular, reason

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet", ".csv.gz", ".tsv.gz", ".jsonl.gz")
_SHOWN = 3  # rows in a message
_COLUMNS_SHOWN = 8


class Table(NamedTuple):
    """The columns of a table that are needed: text in .csv and .tsv files, any JSON values or numbers in others."""

    columns: dict[str, list[Any]]
    names: tuple[str, ...]  # of all columns
    numbers: list[int]  # of each row: its line in the file, or its row in a .parquet file, from 1
    unit: str  # "line" or "row": what the numbers count

    def missing(self, name: str, setting: str) -> str:
        """Returns '' if a column exists, else that it is missing, with the nearest. setting: the key that names it."""
        if name in self.names:
            return ""
        by_lower = {other.lower(): other for other in self.names if other}
        near = difflib.get_close_matches(name.lower(), by_lower, 1)
        columns = shortened([other for other in self.names if other], _COLUMNS_SHOWN)
        hint = f"did you mean '{by_lower[near[0]]}'?" if near else f"it has {columns}"
        return f"there is no column '{name}', {hint} ({setting})"


def is_table(path: Path) -> bool:
    """Returns whether a file is named like a table."""
    return path.name.lower().endswith(SUFFIXES)


def read_table(path: Path, wanted: Collection[str]) -> Table:
    """Reads the wanted columns of a table; those that it lacks are left out.

    Rows whose cells are all empty are skipped. Raises UserError if the file cannot be read, has no rows, has two
    columns of one name, or has rows with another number of cells than the header.
    """
    name = path.name.lower().removesuffix(".gz")
    if not is_table(path):
        raise UserError(f"the table {path} is none of {', '.join(SUFFIXES)}; export it as one of these")
    try:
        if name.endswith(".parquet"):
            table = _read_parquet(path, wanted)
        else:
            with open_regular(path) as file:
                binary: Any = gzip.GzipFile(fileobj=file) if path.name.lower().endswith(".gz") else file
                text = io.TextIOWrapper(binary, "utf-8-sig", newline="")
                if name.endswith(".jsonl"):
                    table = _read_json_lines(text, wanted)
                else:
                    table = _read_separated(text, "," if name.endswith(".csv") else "\t", wanted)
    except FileNotFoundError:
        raise UserError(f"there is no table {path}; data.name is table:FILE") from None
    except UnicodeDecodeError:
        raise UserError(f"the table {path} is not encoded as UTF-8; save it as UTF-8") from None
    except (OSError, EOFError, zlib.error, _TableError) as error:  # EOFError: a truncated .gz
        raise UserError(f"the table {path} cannot be read: {reason(error)}") from None
    if not table.numbers:
        raise UserError(f"the table {path} has no rows; write one row for each image")
    return table


class _TableError(Exception):
    """The content of a table is wrong."""


def _read_separated(file: io.TextIOWrapper, separator: str, wanted: Collection[str]) -> Table:
    reader = csv.reader(_without_nul(file), delimiter=separator, skipinitialspace=separator == ",", strict=True)
    try:
        header = [name.strip() for name in next(_rows(reader), [])]
        _check_header(header)
        if len(header) == 1 and (other := next((c for c in ",;\t" if c != separator and c in header[0]), "")):
            kind = "commas (.csv)" if separator == "," else "tabs (.tsv)"
            raise _TableError(f"its cells are separated by {other!r} instead of {kind}")
        cells: dict[str, list[Any]] = {name: [] for name in header if name in wanted}
        numbers, ragged = [], []
        for row in _rows(reader):
            if len(row) != len(header):
                ragged.append(f"line {reader.line_num} has {counted(len(row), 'cell')}")
                continue
            numbers.append(reader.line_num)
            for name, cell in zip(header, row, strict=True):
                if name in cells:
                    cells[name].append(cell)
    except csv.Error as error:
        raise _TableError(f"line {reader.line_num}: {error}; check its quotes") from None
    if ragged:
        raise _TableError(f"its header has {counted(len(header), 'cell')}, but {shortened(ragged, _SHOWN)}")
    return Table(cells, tuple(header), numbers, "line")


def _rows(reader: Iterator[list[str]]) -> Iterator[list[str]]:
    """Yields the rows that have a cell which is not empty."""
    return (row for row in reader if any(map(str.strip, row)))


def _without_nul(lines: Iterator[str]) -> Iterator[str]:
    """Yields the lines. Raises _TableError if one holds a NUL, as binary files and UTF-16 do."""
    for number, line in enumerate(lines, 1):
        if "\0" in line:
            raise _TableError(f"line {number} has a NUL byte, so it is not a text in UTF-8; export it again")
        yield line


def _check_header(header: Sequence[str]) -> None:
    """Raises _TableError for two columns of one name, unless it is empty, as that of an index is."""
    if several := [f"'{name}'" for name, count in Counter(header).items() if count > 1 and name]:
        raise _TableError(f"it has several columns {shortened(several, _SHOWN)}; rename or remove them")


def _read_json_lines(file: io.TextIOWrapper, wanted: Collection[str]) -> Table:
    rows: list[dict[str, Any]] = []
    names: dict[str, None] = {}
    numbers, wrong = [], []
    for number, line in enumerate(_without_nul(file), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_unique_keys)
        except (ValueError, RecursionError) as error:
            wrong.append(f"line {number} is not JSON ({error})")
            continue
        if not isinstance(row, dict):
            wrong.append(f"line {number} is not a JSON object")
            continue
        names.update(dict.fromkeys(row))
        numbers.append(number)
        rows.append({name: row[name] for name in wanted if name in row})
    if wrong:
        raise _TableError(shortened(wrong, _SHOWN))
    columns = {name: [row.get(name) for row in rows] for name in wanted if name in names}
    return Table(columns, tuple(names), numbers, "line")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("it has a key twice")
    return content


def _read_parquet(path: Path, wanted: Collection[str]) -> Table:
    import pyarrow  # takes a while
    import pyarrow.parquet

    try:
        with open_regular(path) as file, pyarrow.parquet.ParquetFile(file) as parquet:
            names = tuple(parquet.schema_arrow.names)
            _check_header(names)
            found = parquet.read(columns=[name for name in wanted if name in names])
            count = parquet.metadata.num_rows
            columns = {name: found.column(name).to_pylist() for name in wanted if name in names}
    except (pyarrow.ArrowException, ValueError) as error:
        raise _TableError(f"it is not a Parquet file that pyarrow reads ({error})") from None
    return Table(columns, names, list(range(1, count + 1)), "row")


def as_text(value: Any) -> str:
    """Returns a cell as text without spaces around it: '' if it is empty, '3' for 3 and 3.0.

    Raises ValueError for a list or another structure, and for half of a surrogate pair, as JSON may hold.
    """
    if value is None or value != value:  # NaN
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, list | dict | tuple | bytes):
        raise ValueError(f"is a {type(value).__name__}, not text or a number")
    text = str(value).strip()
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which is not a character") from None
    return text


Parse = Callable[[Any], Any]


def parse_cells(table: Table, column: str, rows: Sequence[int], parse: Parse, problems: list[str]) -> list[Any]:
    """Returns parse(cell) for some rows of a column. ValueErrors become one entry of `problems`, and None in the list.

    Cells of equal text are parsed once.
    """
    parsed: dict[str, Any] = {}
    found: list[Any] = []
    wrong = []
    for row in rows:
        cell = table.columns[column][row]
        value = parsed.get(cell) if isinstance(cell, str) else None
        if value is None:
            try:
                value = parse(cell)
            except ValueError as error:
                wrong.append(f"{table.unit} {table.numbers[row]} {error}")
            if isinstance(cell, str):
                parsed[cell] = value
        found.append(value)
    if wrong:
        problems.append(f"column '{column}': {shortened(wrong, _SHOWN)}")
    return found
