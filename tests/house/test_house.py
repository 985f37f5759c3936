"""The rules of the house: imports go down, every config loads, every option is read, every README command exists."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from pipetrgl.config.load import load
from pipetrgl.config.schema import Config
from pipetrgl.config.study import load_study

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "pipetrgl"
FLOORS = [
    {"errors", "logs", "memory"},
    {"config", "world", "microbatch", "seeds", "blocks"},
    {
        "data",
        "models",
        "partition",
        "objective",
        "objectives",
        "stability",
        "optim",
        "precision",
        "kernels",
        "channels",
    },
    {"stage"},
    {"engine"},
    {"blueprint", "worker", "scheduled", "recorder", "export"},
    {"launchers"},
    {"studies"},
    {"console", "cli", "__main__"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# Rooms on one floor do not see each other, but these single files stand on one another.
NEIGHBOURS = {
    ("worker", "blueprint"),
    ("scheduled", "worker"),
    ("recorder", "blueprint"),
    ("export", "blueprint"),
    ("__main__", "cli"),
    ("cli", "console"),
}
SOURCES = sorted(PACKAGE.rglob("*.py"))
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """The rooms of the package that a file imports, at any depth of the code."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            if name.startswith("pipetrgl."):
                yield name.split(".")[1]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path: Path) -> None:
    mine = room_of(path)
    if mine == "__init__":
        return
    for room in imports(path):
        if room == mine or (mine, room) in NEIGHBOURS:
            continue
        assert FLOOR[room] < FLOOR[mine], f"{mine} (floor {FLOOR[mine]}) imports {room} (floor {FLOOR[room]})"


def test_the_schema_knows_no_torch() -> None:
    code = "import sys, pipetrgl.config.load; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_only_launchers_read_the_environment_or_create_processes() -> None:
    for path in SOURCES:
        text = path.read_text()
        if room_of(path) != "launchers":
            assert "os.environ" not in text, path
            assert not re.search(r"\b(subprocess|multiprocessing)\b", text), path


def test_the_library_never_prints_and_every_file_opens_with_a_sentence() -> None:
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        if path.name == "__init__.py":
            continue
        docstring = ast.get_docstring(tree)
        assert docstring, f"{path} has no docstring"
        assert docstring.split("\n\n")[0].endswith((".", ":")), path
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        prints = any(isinstance(call, ast.Name) and call.id == "print" for call in calls)
        assert not prints or path.name in ("cli.py", "local.py"), path  # local.py: a worker's last words, to its log


def test_inner_init_files_are_empty() -> None:
    for path in PACKAGE.glob("*/__init__.py"):
        assert path.read_text() == "", path


def test_transport_means_the_regulariser_and_nothing_else() -> None:
    for room in ("channels", "launchers"):
        for path in (PACKAGE / room).glob("*.py"):
            assert "transport" not in path.read_text().lower(), path


def test_no_pickle_and_no_unsafe_load() -> None:
    for path in SOURCES:
        assert not re.search(
            r"\bimport pickle\b|pickle\.load|weights_only=False|yaml\.load\(|yaml\.unsafe", path.read_text()
        )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_config_loads_and_opens_with_an_honest_head(path: Path) -> None:
    (load_study if path.parent.name == "studies" else load)(path)
    head = path.read_text().split("\n\n")[0].lower()
    assert path.read_text().startswith("#")
    for word in ("command", "expected", "time"):
        assert word in head, f"{path}: its head does not say '{word}'"


def fields(model: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield name
        for kind in (field.annotation, *get_args(field.annotation)):  # a section, or a list of them
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from fields(kind)


@pytest.mark.parametrize("name", sorted(set(fields(Config))))
def test_every_config_field_is_read_somewhere(name: str) -> None:
    readers = [path for path in SOURCES if path.parent.name != "config"]
    assert any(re.search(rf"\.{name}\b", path.read_text()) for path in readers)


def test_every_config_field_is_documented() -> None:
    def undocumented(model: type[BaseModel], path: str) -> Iterator[str]:
        for name, field in model.model_fields.items():
            nested = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
            if nested:
                yield from undocumented(field.annotation, f"{path}{name}.")  # type: ignore[arg-type]
            elif not field.description:
                yield path + name

    assert list(undocumented(Config, "")) == []


def test_every_readme_command_names_something_that_exists() -> None:
    readme = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", readme, re.DOTALL)
    words = [word for block in blocks for word in re.findall(r"(?:configs|launch|benchmarks|docs)/[\w./-]+", block)]
    assert words
    for word in words:
        assert (ROOT / word).exists(), word
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"^make (\w+)", "\n".join(blocks), re.MULTILINE):
        assert target in targets
    help_text = subprocess.run(
        [sys.executable, "-m", "pipetrgl", "--help"], capture_output=True, text=True, check=True
    ).stdout
    for command in re.findall(r"^pipetrgl (\w+)", "\n".join(blocks), re.MULTILINE):
        assert command in help_text
