"""Who may import whom, and what the README must hold."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ml_backend.cli import app
from ml_backend.settings import Settings
from sam_ext.predictor import Predictor

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
MODULES = sorted(
    path
    for package in ("sam_ext", "ml_backend")
    for path in (ROOT / package).rglob("*.py")
    if path.name != "__main__.py"
)
OF_LABEL_STUDIO = {"flask", "werkzeug", "requests", "label_studio_sdk", "label_studio_ml"}
MAY_NOT_IMPORT = {
    "sam_ext": {"ml_backend", "tests", "typer", *OF_LABEL_STUDIO},
    "ml_backend": {"tests"},
    "ml_backend/convert": {"torch", "sam_ext", "tests", *OF_LABEL_STUDIO},
    "ml_backend/label_config.py": {"torch", "sam_ext", "tests", *OF_LABEL_STUDIO},
}


def name_of(path):
    return str(path.relative_to(ROOT))


def imported(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names]
    names += [n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("package", MAY_NOT_IMPORT)
def test_import_direction(package):
    place = ROOT / package
    files = [place] if place.is_file() else sorted(place.rglob("*.py"))
    assert files, f"no Python files under {package}"
    broken = {name_of(file): imported(file) & MAY_NOT_IMPORT[package] for file in files}
    assert not {name: bad for name, bad in broken.items() if bad}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_exported_names_are_sorted_and_there(path):
    tree = ast.parse(path.read_text())
    exports = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
        and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets)
    ]
    if not exports:
        public = [
            node.name
            for node in tree.body
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
        ]
        assert not public, f"{name_of(path)} defines {public} and has no __all__"
        return
    (names,) = exports
    defined = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names_in = (part for target in targets for part in ast.walk(target))
            defined |= {part.id for part in names_in if isinstance(part, ast.Name)}
        elif isinstance(node, ast.ImportFrom):
            defined |= {alias.asname or alias.name for alias in node.names}
    assert names == sorted(names, key=_as_ruff_sorts)
    assert set(names) <= defined


def _as_ruff_sorts(name):
    """Constants, then classes, then the rest (RUF022)."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)


def test_modelling_code_needs_neither_label_studio_nor_flask():
    """Importing it brings none of them in by a detour either."""
    modules = [
        name_of(path).removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        for path in MODULES
        if path.is_relative_to(ROOT / "sam_ext")
    ]
    code = f"import sys, {', '.join(modules)}; print(*sorted(sys.modules))"
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    loaded = {name.split(".")[0] for name in process.stdout.split()}
    assert not loaded & {"ml_backend", *OF_LABEL_STUDIO}


def test_the_readmes_python_runs(tmp_path, monkeypatch):
    """Block after block, as in one session; with fewer steps, and files in a folder of its own."""
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    code = "\n".join(blocks).replace("steps=100", "steps=1")
    code = code.replace("cats.safetensors", str(tmp_path / "cats.safetensors"))
    monkeypatch.chdir(ROOT)
    names: dict[str, object] = {}
    exec(compile(code, str(README), "exec"), names)
    assert (tmp_path / "cats.safetensors").is_file()
    assert names["mask"].shape == names["image"].shape[:2]
    assert names["mask"].any()
    assert names["predictor"].fingerprint != Predictor(names["sam"]).fingerprint


def test_every_setting_is_in_the_readmes_table():
    cells = re.findall(r"^\| (`[A-Z_]+`(?:, `[A-Z_]+`)*) \|", README.read_text(), re.MULTILINE)
    rows = [name.strip("`") for cell in cells for name in cell.split(", ")]
    assert sorted(rows) == sorted(name.upper() for name in Settings.model_fields)


def test_every_command_is_in_the_readme():
    commands = [c.name or c.callback.__name__ for c in app.registered_commands]
    readme = README.read_text()
    named = [c for c in commands if f"sam-ml-backend {c}" in readme or f"make {c}" in readme]
    assert named == commands
