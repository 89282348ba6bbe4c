"""Each state of torchvision in a fresh interpreter, as it can be imported only once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(code, *, torchvision=None, folder=None):
    """Run code in a new interpreter, with a torchvision of this source where one is given."""
    search = [str(ROOT)]
    if torchvision is not None:
        (folder / "torchvision").mkdir()
        (folder / "torchvision" / "__init__.py").write_text(torchvision)
        search.insert(0, str(folder))
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(search), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )


def test_segment_anything_imports_with_the_torchvision_that_is_installed():
    done = run("import sam_ext._torchvision, segment_anything.automatic_mask_generator")
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


@pytest.mark.parametrize(
    ("torchvision", "operators"),
    [
        pytest.param("", [False, False], id="imports by itself"),
        pytest.param(
            """
import torch
torch.library.register_fake("torchvision::nms", lambda dets, scores, iou_threshold: dets)
torch.library.register_fake("torchvision::qnms", lambda dets, scores, iou_threshold: dets)
""",
            [True, True],
            id="both operators missing",
        ),
        pytest.param(
            """
import torch
if not hasattr(torch.ops.torchvision, "nms"):
    torch.library.define(
        "torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    )
torch.library.register_fake("torchvision::qnms", lambda dets, scores, iou_threshold: dets)
""",
            [True, True],
            id="one operator missing",
        ),
    ],
)
def test_only_missing_operators_are_named(tmp_path, torchvision, operators):
    code = """
import torch
from sam_ext._torchvision import ensure_importable
ensure_importable()
print([hasattr(torch.ops.torchvision, name) for name in ("nms", "qnms")])
"""
    done = run(code, torchvision=torchvision, folder=tmp_path)
    assert (done.stdout, done.stderr, done.returncode) == (f"{operators}\n", "", 0)


def test_another_failure_of_torchvisions_import_is_not_hidden(tmp_path):
    done = run(
        "import sam_ext._torchvision",
        torchvision="raise RuntimeError('compiled with another CUDA')",
        folder=tmp_path,
    )
    assert done.stderr.endswith("RuntimeError: compiled with another CUDA\n")
