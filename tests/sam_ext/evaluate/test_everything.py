import argparse
import json
import re
import shlex

import cv2
import pytest

from sam_ext.checkpoints import save_checkpoint
from sam_ext.errors import ConfigError
from sam_ext.evaluate import everything, resolution
from sam_ext.evaluate.__main__ import main
from sam_ext.evaluate.everything import README_TABLES, TABLES, measure_all
from tests.sam_ext.evaluate.folders import OBJECT, write_folder
from tests.test_architecture import README

LINES = {
    "sizes": (
        "resolution --data DIR/a --sizes 1",
        "resolution --data DIR/b --sizes 1 --limit 1",
        "resolution --data DIR/absent --sizes 1",
    ),
    "labels": ("adaptation --train DIR/a --test DIR/a --split train --methods direct --limit 1",),
}


@pytest.fixture
def data(tmp_path):
    for name in ("a", "b"):
        write_folder(tmp_path / "data" / name, [OBJECT] * 2, ("train", "test"))
    return tmp_path / "data"


@pytest.fixture
def model(small_sam, tmp_path):
    save_checkpoint(small_sam, tmp_path / "s.safetensors")
    return ("--model", str(tmp_path / "s.safetensors"), "--device", "cpu")


def test_a_table_is_all_its_commands_rows_with_commands_and_provenance(
    data, model, tmp_path, capsys
):
    out = tmp_path / "new" / "out"
    files = measure_all(LINES, data=data, out=out, model_arguments=model)
    assert files == [out / "sizes.md", out / "labels.md"]
    assert {path.name for path in out.iterdir()} == {
        *("sizes.md", "sizes.jsonl", "sizes-a.png", "sizes-b.png"),
        *("labels.md", "labels.jsonl", "labels.png"),
    }
    table, commands, measured = files[0].read_text().split("\n\n")
    lines = table.splitlines()
    assert len(lines) == 2 + 2 * 4
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| a"] * 4 + ["| b"] * 4
    assert commands.splitlines() == [
        "`python -m sam_ext.evaluate resolution --data DIR/a --sizes 1`  ",
        "`python -m sam_ext.evaluate resolution --data DIR/b --sizes 1 --limit 1`",
    ]
    assert re.match(r"Measured \d{4}-\d\d-\d\d .* at .+ on .+ threads, torch \d", measured)
    for path in out.glob("*.png"):
        assert min(cv2.imread(str(path)).shape[:2]) > 100
    assert f"sizes: left out absent, which {data} does not hold" in " ".join(
        capsys.readouterr().err.split()
    ).replace(" \n", "")


def test_what_was_measured_before_is_not_measured_again(data, model, tmp_path, monkeypatch):
    tables = {"sizes": LINES["sizes"][:1]}
    [file] = measure_all(tables, data=data, out=tmp_path, model_arguments=model)
    first = file.read_text()

    def never(*_, **__):
        raise NotImplementedError

    monkeypatch.setattr(resolution, "evaluate_resolution", never)
    file.unlink()
    measure_all(tables, data=data, out=tmp_path, model_arguments=model)
    assert file.read_text() == first
    kept = (tmp_path / "sizes.jsonl").read_text()
    (tmp_path / "sizes.jsonl").write_text(
        kept.replace(json.loads(kept.splitlines()[0])["key"]["model"], "another")
    )
    with pytest.raises(NotImplementedError):
        measure_all(tables, data=data, out=tmp_path, model_arguments=model)


def test_rows_of_another_model_in_the_same_file_have_no_part_in_the_table(data, model, tmp_path):
    tables = {"sizes": LINES["sizes"][:1]}
    [file] = measure_all(tables, data=data, out=tmp_path, model_arguments=model)
    kept = tmp_path / "sizes.jsonl"
    other = json.loads(kept.read_text().splitlines()[0])
    other["key"]["model"], other["rows"][0]["miou"] = "another", 2.0
    other["machine"]["commit"] = "of another"
    with kept.open("a") as lines:
        lines.write(json.dumps(other) + "\n")
    measure_all(tables, data=data, out=tmp_path, model_arguments=model)
    assert "of another" not in file.read_text()


def test_a_table_without_any_set_is_refused(data, tmp_path):
    with pytest.raises(ConfigError, match=r"hold a set of the table sizes, found none in"):
        measure_all({"sizes": LINES["sizes"][2:]}, data=data, out=tmp_path)


def test_the_command_measures_some_of_the_tables(data, model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(everything, "README_TABLES", LINES)
    command = ["all", "--data", str(data), "--out", str(tmp_path / "out"), *model, "--only"]
    main([*command, "labels"])
    assert capsys.readouterr().out.split() == [str(tmp_path / "out" / "labels.md")]
    with pytest.raises(ConfigError, match="some of sizes,labels, got coffee"):
        main([*command, "labels,coffee"])


@pytest.mark.parametrize("name", README_TABLES)
def test_the_readmes_tables_say_which_file_they_are_from(name):
    assert f"`{name}.md`" in README.read_text()


@pytest.mark.parametrize("line", [line for lines in README_TABLES.values() for line in lines])
def test_every_command_line_is_one(line):
    table, *arguments = shlex.split(line)
    parser = argparse.ArgumentParser()
    TABLES[table].add_arguments(parser)
    parser.parse_args(arguments)
