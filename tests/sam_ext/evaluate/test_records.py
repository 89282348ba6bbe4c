import json
from dataclasses import dataclass

import pytest

from sam_ext.errors import ConfigError
from sam_ext.evaluate import records
from sam_ext.evaluate.records import Measured, RowFile, machine_facts, markdown_table, provenance


@dataclass(frozen=True, kw_only=True)
class Line:
    name: str
    value: float | None


def lines(*names):
    return [Line(name=name, value=0.1) for name in names]


def never():
    raise AssertionError


def test_what_is_there_is_not_measured_again(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    file = RowFile(path, Line)
    assert file.get({"set": "a"}, lambda: lines("x", "y")) == tuple(lines("x", "y"))
    assert file.get({"set": "a"}, never) == tuple(lines("x", "y"))
    assert file.get({"set": "b"}, lambda: lines("z")) == tuple(lines("z"))
    again = RowFile(path, Line)
    assert again.get({"set": "b"}, never) == tuple(lines("z"))
    assert [(one.key, one.rows) for one in again.measured] == [
        ({"set": "a"}, tuple(lines("x", "y"))),
        ({"set": "b"}, tuple(lines("z"))),
    ]
    assert again.measured[0].machine.keys() == machine_facts().keys()


def test_keys_differ_by_any_value_and_not_by_their_order(tmp_path):
    file = RowFile(tmp_path / "rows.jsonl", Line)
    file.get({"set": "a", "seed": 0, "limit": None}, lambda: lines("x"))
    assert file.get({"limit": None, "seed": 0, "set": "a"}, never)
    assert file.get({"set": "a", "seed": 1, "limit": None}, lambda: lines("y"))[0].name == "y"


def test_without_a_file_nothing_is_kept():
    file = RowFile(None, Line)
    file.get({}, lambda: lines("x"))
    assert RowFile(None, Line).get({}, lambda: lines("y"))[0].name == "y"


def test_a_run_that_was_ended_while_it_wrote_loses_one_record(tmp_path):
    path = tmp_path / "rows.jsonl"
    RowFile(path, Line).get({"set": "a"}, lambda: lines("x"))
    whole = path.read_text()
    path.write_text(whole + whole[: len(whole) // 2])
    resumed = RowFile(path, Line)
    resumed.get({"set": "b"}, lambda: lines("y"))
    again = RowFile(path, Line)
    assert [one.rows[0].name for one in again.measured] == ["x", "y"]


def test_measuring_that_fails_keeps_nothing(tmp_path):
    file = RowFile(tmp_path / "rows.jsonl", Line)
    with pytest.raises(AssertionError):
        file.get({}, never)
    assert file.get({}, lambda: lines("x"))


def test_rows_of_another_table_are_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    for content in ({"key": {}, "rows": [{"other": 1}], "machine": {}}, {"rows": []}):
        path.write_text(json.dumps(content) + "\n")
        with pytest.raises(ConfigError, match=r"rows\.jsonl must hold rows of this table"):
            RowFile(path, Line)


def test_a_markdown_table_has_the_columns_that_say_something():
    rows = [{"a": 1, "b": None, "c": "x"}, {"a": None, "b": None, "c": "y"}]
    assert markdown_table(rows) == "| a | c |\n| --- | --- |\n| 1 | x |\n|  | y |\n"


def test_provenance_names_dates_commit_and_machine():
    def measured(date, commit):
        machine = {"processor": "P", "threads": 2, "torch": "2", "date": date, "commit": commit}
        return Measured(key={}, rows=(), machine=machine)

    assert provenance([measured("d2", "c1"), measured("d1", "c1"), measured("d3", "c2")]) == (
        "Measured d1 to d2 at c1 on P, 2 threads, torch 2.\n"
        "Measured d3 at c2 on P, 2 threads, torch 2."
    )


def test_code_outside_of_git_is_called_unknown(monkeypatch):
    monkeypatch.setattr(records.shutil, "which", lambda name: None)
    assert machine_facts()["commit"] == "unknown"
