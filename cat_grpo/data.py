"""Rows of a local file, a folder or a hub data set become problems.

Only the mapped columns are read, so that gold answers beside them never reach training. BadInput says in one
line where a row is wrong: `problems.jsonl:7: prompt: expected text or chat messages, got 3`.
"""

import csv
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from cat_grpo.config import DataConfig
from cat_grpo.errors import BadInput, first_line
from cat_grpo.records import Kind, Message, Problem
from cat_grpo.shipped import shipped

if TYPE_CHECKING:
    from datasets import Dataset

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
ROLES = ("system", "user", "assistant")

Row = dict[str, Any]
LocatedRow = tuple[str, Row]
"""A row after its place, `file:line` from 1; in json, parquet and on the hub the line is the row's number."""


def load_problems(config: DataConfig) -> Sequence[Problem]:
    """Returns every problem of `config.path`, row by row; a folder's files in the order of their names.

    Files that have not changed since the last call are not read again.
    """
    local = _local_path(config.path)
    states = [(file, file.stat()) for file in (_files(local) if local else [])]
    return _problems(
        config.model_dump_json(),
        local,
        tuple((file, state.st_mtime_ns, state.st_size) for file, state in states),
    )


@lru_cache(maxsize=1)
def _problems(settings: str, local: Path | None, files: object) -> tuple[Problem, ...]:
    config = DataConfig.model_validate_json(settings)
    columns = (config.prompt_column, config.id_column, config.kind_column)
    if local is None:
        rows = dataset_rows(_load_from_hub(config), f"{config.path}[{config.split}]", columns)
    else:
        rows = read_rows(local, columns)
    problems: list[Problem] = []
    first: dict[str, str] = {}
    for location, row in rows:
        problem = to_problem(location, row, config)
        if problem.id in first:
            where = f"{location}: {config.id_column}: {problem.id!r} again, first at {first[problem.id]}"
            raise BadInput(f"{where} (a row without an id is known by its prompt)")
        first[problem.id] = location
        problems.append(problem)
    return tuple(problems)


def read_rows(path: Path, columns: Sequence[str] | None) -> Iterator[LocatedRow]:
    """The rows of a file or of a folder's files, with those of `columns` that they have; None: with all."""
    for file in _files(path):
        number = 0
        for number, row in _numbered_rows(file, columns):
            yield f"{file}:{number}", _pick(row, columns)
        if number == 0:
            raise BadInput(f"{file}: no rows")


def dataset_rows(dataset: "Dataset", name: str, columns: Sequence[str]) -> Iterator[LocatedRow]:
    """The rows of a `datasets` data set, with those of `columns` that it has."""
    chosen = dataset.select_columns([column for column in columns if column in dataset.column_names])
    if len(dataset) == 0:
        raise BadInput(f"{name}: no rows")
    for number, row in enumerate(chosen, 1):
        yield f"{name}:{number}", dict(row)


def to_problem(location: str, row: Row, config: DataConfig) -> Problem:
    """The problem of one row. Without an id it takes a hash of its prompt."""
    messages = _messages(row.get(config.prompt_column), f"{location}: {config.prompt_column}")
    kind: Any = config.kind or row.get(config.kind_column)
    if kind not in get_args(Kind):
        wanted = f"expected {' or '.join(get_args(Kind))}, here or for all rows in data.kind"
        raise BadInput(f"{location}: {config.kind_column}: {wanted}, {_got(kind)}")
    problem_id = row.get(config.id_column)
    if problem_id is None or problem_id == "":
        problem_id = hashlib.sha256(json.dumps(messages).encode()).hexdigest()[:16]
    if type(problem_id) not in (str, int):  # a bool is an int too
        where = f"{location}: {config.id_column}"
        raise BadInput(f"{where}: expected text or a whole number, {_got(problem_id)}")
    return Problem(str(problem_id), messages, kind)


def _messages(prompt: Any, where: str) -> tuple[Message, ...]:
    chat = _chat_in_text(prompt) if isinstance(prompt, str) else prompt
    if isinstance(chat, str):
        chat = [{"role": "user", "content": chat}]
    if not isinstance(chat, list) or not chat:
        raise BadInput(f"{where}: expected text or chat messages, {_got(prompt)}")
    messages = tuple(_message(turn, f"{where}: message {i}") for i, turn in enumerate(chat, 1))
    if messages[-1]["role"] != "user":
        raise BadInput(f"{where}: the last message must be the user's, not the {messages[-1]['role']}'s")
    if not messages[-1]["content"].strip():
        raise BadInput(f"{where}: empty")
    return messages


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise BadInput(f"{where}: expected a role and a content, {_got(turn)}")
    role, content = turn.get("role"), turn.get("content")
    if role not in ROLES:
        raise BadInput(f"{where}: role: expected one of {', '.join(ROLES)}, {_got(role)}")
    if not isinstance(content, str):
        raise BadInput(f"{where}: content: expected text, {_got(content)}")
    return {"role": role, "content": content}


def _chat_in_text(text: str) -> list | str:
    """A cell of a csv table can hold a chat only as JSON. Any other text is a prompt."""
    if not re.match(r'\s*\[\s*\{\s*"', text):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _got(value: Any) -> str:
    return "got nothing" if value is None else f"got {value!r:.60}"


def _pick(row: Row, columns: Sequence[str] | None) -> Row:
    return row if columns is None else {column: row[column] for column in columns if column in row}


def _local_path(path: str) -> Path | None:
    """The file or folder that `data.path` means; None for the id of a hub data set."""
    if not path:
        raise BadInput("data.path: expected a file, a folder or a hub data set id, got nothing")
    if path.startswith("lab:"):
        if path[4:] not in get_args(Kind):
            raise BadInput(f"data.path: expected lab:verifiable or lab:open, got {path}")
        return shipped("data", "lab", path[4:], "train.jsonl")
    local = Path(path).expanduser()
    is_hub_id = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", path) and local.suffix.lower() not in SUFFIXES
    return None if is_hub_id and not local.exists() else local


def _load_from_hub(config: DataConfig) -> "Dataset":
    from datasets import Dataset, load_dataset
    from datasets.exceptions import DatasetsError

    try:
        dataset = load_dataset(config.path, split=config.split)
    except (DatasetsError, OSError, ValueError) as error:
        reason = f"no such local path, and the hub: {first_line(error)}"
        raise BadInput(f"{config.path}: {reason}") from error
    assert isinstance(dataset, Dataset)  # one split, not streamed
    return dataset


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise BadInput(f"{path}: no such file or folder")
    # A name with a leading dot is a file that is still being copied.
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    if not files:
        raise BadInput(f"{path}: no {', '.join(SUFFIXES)} file in this folder")
    return files


def _numbered_rows(file: Path, columns: Sequence[str] | None) -> Iterator[tuple[int, Row]]:
    match file.suffix.lower():
        case ".jsonl":
            return _jsonl_rows(file)
        case ".json":
            return _json_rows(file)
        case ".csv":
            return _csv_rows(file)
        case ".parquet":
            return _parquet_rows(file, columns)
    raise BadInput(f"{file}: unknown extension: expected one of {', '.join(SUFFIXES)}")


def _jsonl_rows(file: Path) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(_lines(file), 1):
        if line.strip():
            yield number, _object(_json(line.strip(), file, number), f"{file}:{number}")


def _json_rows(file: Path) -> Iterator[tuple[int, Row]]:
    rows = _json("".join(_lines(file)), file, 1)
    if not isinstance(rows, list):
        raise BadInput(f"{file}: expected an array of objects, {_got(rows)}")
    for number, row in enumerate(rows, 1):
        yield number, _object(row, f"{file}:{number}")


def _csv_rows(file: Path) -> Iterator[tuple[int, Row]]:
    reader = csv.reader(_lines(file), strict=True)
    begin, header = 1, None
    try:
        for cells in reader:
            if header is None:
                header = cells
            elif cells and len(cells) != len(header):
                raise BadInput(f"{file}:{begin}: expected {len(header)} fields, got {len(cells)}")
            elif cells:
                yield begin, dict(zip(header, cells, strict=True))
            begin = reader.line_num + 1  # a quoted field may hold line breaks
    except csv.Error as error:
        raise BadInput(f"{file}:{begin}: not CSV: {error}") from error


def _parquet_rows(file: Path, columns: Sequence[str] | None) -> Iterator[tuple[int, Row]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            present = [name for name in table.schema_arrow.names if columns is None or name in columns]
            batches = table.iter_batches(batch_size=1024, columns=present)
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{file}: not parquet: {first_line(error)}") from error


def _lines(file: Path) -> Iterator[str]:
    """Decodes the lines, with their ends, one by one, so that an error has a line."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise BadInput(f"{file}:{number}: not UTF-8: {error.reason}") from error


def _json(text: str, file: Path, line: int) -> Any:
    """The value of a text that begins at this line of the file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{file}:{line + error.lineno - 1}"
        raise BadInput(f"{where}: not JSON: {error.msg} at column {error.colno}") from error


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise BadInput(f"{where}: expected an object, {_got(value)}")
    return value
