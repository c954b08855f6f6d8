"""Files, folders and data sets become problems; what is wrong is one line that says where."""

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from cat_grpo.config import DataConfig
from cat_grpo.data import dataset_rows, load_problems, read_rows, to_problem
from cat_grpo.errors import BadInput
from cat_grpo.records import Problem

COLUMNS = ("prompt", "id", "kind")
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "Because."},
    {"role": "user", "content": "And?"},
]
ROWS = [
    {"id": "a", "prompt": '1 + 1?\n\nIn words, "please".', "kind": "verifiable", "answer": "two"},
    {"id": "b", "prompt": "Ä 漢 \u2028 🙂", "kind": "open", "answer": "gold"},
    {"id": "c", "prompt": CHAT, "kind": "open", "answer": "gold"},
]


def user(text: str) -> tuple[dict[str, str], ...]:
    return ({"role": "user", "content": text},)


PROBLEMS = [
    Problem("a", user(ROWS[0]["prompt"]), "verifiable"),
    Problem("b", user(ROWS[1]["prompt"]), "open"),
    Problem("c", tuple(CHAT), "open"),
]


def write(path: Path, rows: list[dict]) -> Path:
    """The rows in the format of the path's extension; in tables a chat is JSON."""
    cells = [{k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows]
    match path.suffix:
        case ".jsonl":
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
        case ".json":
            path.write_text(json.dumps(rows, indent=1), "utf-8")
        case ".csv":
            with path.open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(cells)
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(cells), path, row_group_size=2)
    return path


def load(path: Path, **fields) -> list[Problem]:
    return list(load_problems(DataConfig(path=str(path), **fields)))


@pytest.fixture(params=[".jsonl", ".json", ".csv", ".parquet"])
def file(request, tmp_path) -> Path:
    return write(tmp_path / f"problems{request.param}", ROWS)


def test_every_format_holds_the_same_problems(file):
    assert load(file) == PROBLEMS


def test_gold_columns_are_not_read(file):
    assert [set(row) for _, row in read_rows(file, COLUMNS)] == [set(COLUMNS)] * 3
    assert "gold" not in repr(load(file))


def test_evaluation_reads_every_column(file):
    assert [row["answer"] for _, row in read_rows(file, None)] == ["two", "gold", "gold"]


def test_parquet_columns_that_are_not_asked_for_are_never_decoded(tmp_path):
    path = write(tmp_path / "p.parquet", [{"prompt": "Q?", "answer": "gold"}])
    path.write_bytes(path.read_bytes().replace(b"gold", b"\xff\xff\xff\xff"))  # no text any more
    assert [problem.question for problem in load(path, kind="open")] == ["Q?"]
    with pytest.raises(BadInput, match="not parquet"):
        list(read_rows(path, None))


def test_rows_know_where_they_are(tmp_path):
    lines = tmp_path / "p.jsonl"
    lines.write_text('{"prompt": "x"}\n\n{"prompt": "y"}\n')
    assert [place for place, _ in read_rows(lines, None)] == [f"{lines}:1", f"{lines}:3"]
    table = tmp_path / "p.csv"
    table.write_text('prompt,id\n"two\nlines",1\n"",2\n\nlast,3\n')
    assert [place for place, _ in read_rows(table, None)] == [f"{table}:{line}" for line in (2, 4, 6)]


def test_columns_are_mapped(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"problem": "Q?", "unique_id": "u/1", "solution": "gold"}])
    problems = load(path, prompt_column="problem", id_column="unique_id", kind="verifiable")
    assert problems == [Problem("u/1", user("Q?"), "verifiable")]


def test_the_kind_of_the_config_overrides_the_column(tmp_path):
    path = write(tmp_path / "p.jsonl", ROWS)
    assert {problem.kind for problem in load(path, kind="open")} == {"open"}


def test_a_row_without_an_id_is_known_by_its_prompt(tmp_path):
    one = write(tmp_path / "one.jsonl", [{"prompt": "x"}, {"prompt": "y", "id": None}])
    other = write(tmp_path / "other.csv", [{"prompt": "y", "id": ""}, {"prompt": "x", "id": ""}])
    x, y = (problem.id for problem in load(one, kind="open"))
    assert [problem.id for problem in load(other, kind="open")] == [y, x]
    assert x != y


def test_whole_numbers_are_ids(tmp_path):
    path = write(tmp_path / "p.parquet", [{"prompt": "x", "id": 7}])
    assert load(path, kind="open")[0].id == "7"


def test_a_folder_is_its_data_files_in_the_order_of_their_names(tmp_path):
    write(tmp_path / "2.csv", [{"prompt": "third", "kind": "open"}])
    write(tmp_path / "1.jsonl", [{"prompt": "first", "kind": "open"}, {"prompt": "second", "kind": "open"}])
    (tmp_path / "README.md").write_text("no data")
    (tmp_path / ".3.jsonl").write_text('{"prompt": "half a li')
    assert [problem.question for problem in load(tmp_path)] == ["first", "second", "third"]


def test_files_that_have_not_changed_are_read_once(tmp_path):
    write(tmp_path / "1.jsonl", [{"prompt": "first", "kind": "open"}])
    config = DataConfig(path=str(tmp_path))
    before = load_problems(config)
    assert load_problems(config) is before
    write(tmp_path / "1.jsonl", [{"prompt": "another", "kind": "open"}])
    assert [problem.question for problem in load_problems(config)] == ["another"]
    write(tmp_path / "2.jsonl", [{"prompt": "second", "kind": "open"}])
    assert [problem.question for problem in load_problems(config)] == ["another", "second"]
    assert [problem.kind for problem in load(tmp_path, kind="verifiable")] == ["verifiable"] * 2


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    path = tmp_path / "p.csv"
    path.write_bytes(b"\xef\xbb\xbfprompt,kind\r\nx,open\r\n")
    assert load(path)[0].question == "x"


@pytest.mark.parametrize("text", ["[1, 2, 3]", '[{"a": 1', "{}", '"quoted"', "{{ 7 }}"])
def test_text_that_looks_like_json_is_text(tmp_path, text):
    assert load(write(tmp_path / "p.csv", [{"prompt": text}]), kind="open")[0].question == text


@pytest.mark.parametrize("kind", ["verifiable", "open"])
def test_the_lab_has_a_name(kind, monkeypatch, tmp_path):
    monkeypatch.setattr("cat_grpo.data.shipped", tmp_path.joinpath)
    path = tmp_path / "data" / "lab" / kind / "train.jsonl"
    path.parent.mkdir(parents=True)
    write(path, [{"prompt": "x", "kind": kind}])
    assert load_problems(DataConfig(path=f"lab:{kind}"))[0].kind == kind


def test_a_hub_data_set_gives_the_mapped_columns_alone():
    dataset = Dataset.from_list([{"prompt": CHAT, "id": i, "rubrics": [{"points": 5}]} for i in range(2)])
    rows = list(dataset_rows(dataset, "owner/name[test]", COLUMNS))
    assert rows == [(f"owner/name[test]:{i + 1}", {"prompt": CHAT, "id": i}) for i in range(2)]
    assert to_problem(*rows[0], DataConfig(kind="open")) == Problem("0", tuple(CHAT), "open")


def test_an_empty_hub_data_set_is_an_error():
    with pytest.raises(BadInput, match=r"owner/name\[test\]: no rows"):
        list(dataset_rows(Dataset.from_dict({"prompt": []}), "owner/name[test]", COLUMNS))


def error(path: Path | str, **fields) -> str:
    """The one line that loading raises."""
    with pytest.raises(BadInput) as caught:
        load_problems(DataConfig(path=str(path), **fields))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": 3}, "prompt: expected text or chat messages, got 3"),
        ({"prompt": {"role": "user"}}, "prompt: expected text or chat messages, got {'role': 'user'}"),
        ({"prompt": []}, "prompt: expected text or chat messages, got []"),
        ({"question": "x"}, "prompt: expected text or chat messages, got nothing"),
        ({"prompt": "  "}, "prompt: empty"),
        ({"prompt": CHAT[:3]}, "prompt: the last message must be the user's, not the assistant's"),
        ({"prompt": ["x"]}, "prompt: message 1: expected a role and a content, got 'x'"),
        (
            {"prompt": [{"role": "human", "content": "x"}]},
            "prompt: message 1: role: expected one of system, user, assistant, got 'human'",
        ),
        ({"prompt": [*CHAT, {"role": "user"}]}, "prompt: message 5: content: expected text, got nothing"),
        ({"prompt": "x", "id": 1.5}, "id: expected text or a whole number, got 1.5"),
        ({"prompt": "x", "id": True}, "id: expected text or a whole number, got True"),
        (
            {"prompt": "x", "kind": "math"},
            "kind: expected verifiable or open, here or for all rows in data.kind, got 'math'",
        ),
        (["x"], "expected an object, got ['x']"),
    ],
)
def test_a_bad_row_is_named_with_its_line_and_key(tmp_path, row, message):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "good", "kind": "open"}\n' + json.dumps(row))
    kind = {} if "math" in message else {"kind": "open"}
    assert error(path, **kind) == f"{path}:2: {message}"


def test_a_long_value_is_not_repeated_in_full(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"prompt": [["x" * 1000]]}])
    assert len(error(path)) < len(str(path)) + 150


@pytest.mark.parametrize("second", [{"id": "7", "prompt": "y"}, {"id": 7, "prompt": "y"}])
def test_an_id_is_taken_once(tmp_path, second):
    write(tmp_path / "1.jsonl", [{"id": "7", "prompt": "x"}])
    path = write(tmp_path / "2.jsonl", [second])
    assert f"{path}:1: id: '7' again, first at {tmp_path / '1.jsonl'}:1" in error(tmp_path, kind="open")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", b"", ": no rows"),
        ("p.json", b"[]", ": no rows"),
        ("p.csv", b"prompt,id\n", ": no rows"),
        ("p.parquet", b"", ": not parquet: "),
        ("p.parquet", b"PAR1 and more that is no parquet at all", ": not parquet: "),
        ("p.parquet", b"PAR1 no footer \x04\x00\x00\x00PAR1", ": not parquet: "),
        ("p.jsonl", b'{"prompt": "x"}\n{"prompt": \n', ":2: not JSON: Expecting value at column 11"),
        ("p.json", b'[\n{"prompt": "x"},\n]', ":3: not JSON: "),
        ("p.json", b'{"prompt": "x"}', ": expected an array of objects, got {'prompt': 'x'}"),
        ("p.json", b"[3]", ":1: expected an object, got 3"),
        ("p.jsonl", b'{"prompt": "x"}\n{"prompt": "\xe4"}\n', ":2: not UTF-8: "),
        ("p.csv", b"prompt\nx\n\xe4\n", ":3: not UTF-8: "),
        ("p.json", b"\xff\xfe[\x00", ":1: not UTF-8: "),
        ("p.csv", b"prompt,id\nx,1\ny\n", ":3: expected 2 fields, got 1"),
        ("p.csv", b'prompt\nx\n"y\n', ":3: not CSV: unexpected end of data"),
        ("p.csv", b"question\nx\n", ":2: prompt: expected text or chat messages, got nothing"),
        ("p.txt", b"x", ": unknown extension: expected one of .jsonl, .json, .csv, .parquet"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    assert error(path, kind="open").startswith(f"{path}{message}")


@pytest.mark.parametrize(
    "name", ["gone.jsonl", "folder/gone.parquet", "./gone", "/gone", "a/b/c", "../gone", "gone/"]
)
def test_a_local_path_that_is_not_there_does_not_go_to_the_hub(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert error(name) == f"{Path(name)}: no such file or folder"


def test_an_id_that_is_neither_here_nor_on_the_hub_says_both(monkeypatch):
    def load_dataset(path, split):
        raise ConnectionError(f"Couldn't reach {path!r} ({split})\nand much more")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    message = error("owner/name", split="test")
    assert message == "owner/name: no such local path, and the hub: Couldn't reach 'owner/name' (test)"


def test_a_folder_without_data_is_named(tmp_path):
    assert error(tmp_path) == f"{tmp_path}: no .jsonl, .json, .csv, .parquet file in this folder"


def test_an_empty_path_and_an_unknown_lab_are_named():
    assert error("") == "data.path: expected a file, a folder or a hub data set id, got nothing"
    assert error("lab:sums") == "data.path: expected lab:verifiable or lab:open, got lab:sums"
