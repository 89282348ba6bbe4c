"""The bench runs, and says what it measured: with a small model, for moments."""

import json
import re
import subprocess
import sys

import pytest

from sam_ext.checkpoints import save_checkpoint
from tests import bench
from tests.conftest import build_small_sam


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "small.safetensors"
    save_checkpoint(build_small_sam(), path)
    return path


def test_a_row_holds_the_median_the_99th_percentile_and_the_bar():
    one = bench.row("embed 512x384", "ms", [*range(1, 102)], ratio=2.5)
    assert (one.runs, one.median, one.p99, one.ratio, one.bar) == (101, 51, 100, 2.5, "ratio >= 20")


def test_the_ratio_is_how_many_times_faster_ours_is(model):
    rows = bench.embed_rows(model, sizes_hw=((30, 40), (60, 50)), repeats=3)
    assert [row.name for row in rows] == [
        "embed 40x30",
        "embed 40x30, segment-anything",
        "embed 50x60",
        "embed 50x60, segment-anything",
    ]
    for ours, theirs in (rows[:2], rows[2:]):
        assert (ours.runs, theirs.runs) == (3, 3)
        # Medians are rounded to a tenth of a millisecond.
        assert ours.ratio == pytest.approx(theirs.median / ours.median, rel=0.1)


def test_clicks_are_timed_by_annotators_and_while_images_are_encoded(model, tmp_path):
    rows = bench.click_rows(model, tmp_path, annotators=(1, 3), busy=2, seconds=2)
    runs = {row.name: row.runs for row in rows}
    assert runs.pop("first click on a new image, meanwhile") >= 1
    assert runs == {
        "first click on a new image": 4,
        "click, 1 annotator": 2,
        "click, 3 annotators": 6,
        "click, 2 annotators, while encoding": 4,
    }
    assert all(0 < row.median <= row.p99 for row in rows)


def test_memory_is_that_of_the_process_and_its_children():
    hold = "held = bytearray(range(256)) * (100 << 12); input()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}])"
    process = subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE)
    try:
        while not (memory := bench.resident_mb(process.pid)) > 100:
            assert process.poll() is None
        assert memory < 200
    finally:
        process.communicate(b"\n")


def test_the_command_writes_rows_and_the_machines_facts(model, tmp_path, capsys):
    path = tmp_path / "bench.json"
    bench.main(["--only", "restart", "--quick", "--checkpoint", str(model), "--json", str(path)])
    content = json.loads(path.read_text())
    assert [row["name"] for row in content["rows"]] == [
        "restart to healthy",
        "first click after a restart",
    ]
    assert set(content["rows"][0]) >= {"name", "median", "p99", "ratio"}
    assert content["machine"]["cores"] >= 1
    assert re.search(r"torch: \d", capsys.readouterr().out)


def test_a_part_that_is_none_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--only", "embed,coffee"])
    assert "got coffee" in capsys.readouterr().err
