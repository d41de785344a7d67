"""What holds the house together beyond the direction of imports, which lint-imports checks."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

import regard
from regard.errors import (
    FileError,
    ImageError,
    ResourceError,
    StateError,
    Stopped,
    UsageError,
    is_out_of_memory,
)

SOURCE = Path(regard.__file__).parent
MODULES = sorted(SOURCE.rglob("*.py"))


@functools.cache
def trees():
    return [(path, ast.parse(path.read_text(encoding="utf-8"))) for path in MODULES]


def test_no_module_imports_the_package_itself():
    # `import regard` below the top would be an arrow from everywhere to everything
    found = [
        path.name
        for path, tree in trees()
        for node in ast.walk(tree)
        if (isinstance(node, ast.Import) and any(a.name == "regard" for a in node.names))
        or (isinstance(node, ast.ImportFrom) and node.module == "regard")
    ]
    assert found == []


def test_only_commands_print():
    allowed = {"commands", "cli.py"}
    program = "engines/standalone.py"  # copied beside an export, where it runs by itself
    found = [
        f"{path.relative_to(SOURCE)}:{node.lineno}"
        for path, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
        and path.relative_to(SOURCE).parts[0] not in allowed
        and path.relative_to(SOURCE).as_posix() != program
    ]
    assert found == []


def test_users_errors_are_regards_own_and_of_the_built_in_kind():
    raised = {
        name
        for _, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
        for name in [getattr(node.exc.func, "id", "")]
    }
    assert not raised & {"OSError", "Exception", "ArithmeticError"}
    assert issubclass(UsageError, ValueError)
    assert issubclass(ImageError, ValueError)
    assert issubclass(StateError, FileError)
    assert issubclass(FileError, OSError)
    assert (UsageError.exit_code, FileError.exit_code, Stopped(1, 15).exit_code) == (2, 1, 143)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        ResourceError("full"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"
        ),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes."),
    ],
)
def test_out_of_memory_is_recognized(error):
    assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))


def test_a_fault_of_ours_is_a_traceback_and_no_users_mistake():
    code = (
        "import regard.commands.models as m, regard.cli, sys\n"
        "def broken(*a, **k): a, b = (1, 2, 3)\n"
        "regard.cli.app.command(broken, name='broken')\n"
        "regard.cli.main(['broken'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 70
    first, *rest = done.stderr.splitlines()
    assert "bug in Regard" in first
    assert rest[-1].startswith("ValueError: too many values")


@pytest.mark.slow
def test_debugging_shows_the_traceback_of_a_users_mistake_too(monkeypatch):
    monkeypatch.setenv("REGARD_DEBUG", "1")
    done = subprocess.run(
        [sys.executable, "-m", "regard", "models", "nothing-like-it"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("regard: ")


def test_evaluating_loads_nothing_of_training(tmp_path):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "regard", "evaluate", tmp_path, "digits"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "regard.runs" in loaded
    assert {n for n in loaded if n.startswith("regard.training")} == set()
    assert "accelerate" not in loaded


def test_output_never_fails_for_its_letters(monkeypatch, tmp_path):
    for name in ("良性", "悪性"):  # classes that cp1252 has no letters for
        (tmp_path / name).mkdir()
        for i in range(3):
            from PIL import Image

            Image.new("L", (8, 8), 40 * i).save(tmp_path / name / f"{i}.png")
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")
    done = subprocess.run(
        [sys.executable, "-m", "regard", "data", tmp_path, "--val", "0", "--test", "0"],
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert b"\\u826f" in done.stdout
