"""Imports go strictly downward: a room of jaxq imports only the rooms before it."""

import ast
from pathlib import Path

import jaxq

ROOT = Path(jaxq.__file__).parent
ORDER = [
    *[
        "formats",
        "metrics",
        "observers",
        "qtensor",
        "sharding",
        "kernels",
        "ops",
        "emulation",
        "methods",
    ],
    *[
        "recipes",
        "optim",
        "distillation",
        "serialization",
        "nn",
        "io",
        "models",
        "training",
        "evaluation",
        "cli",
    ],
]
# Reference models and what measures them know nothing of quantization, so any library's models can be measured.
ONLY = {"models": set(), "evaluation": {"metrics", "models"}}
# Inside a function only. QTensor's operators reach the matmul: a container that could not be multiplied would be no
# array. A model makes a quantized cache where one is asked for by name, and is told how to use it by the cache itself.
# Recipe.plan asks those who know models, as a user asks the recipe. A sequential run keeps finished blocks in files.
INSIDE = {("qtensor", "ops"), ("models", "ops"), ("recipes", "nn"), ("nn", "io")}


def imports(path: Path):
    """(line, room, whether it is inside a function) of every jaxq import in a file; "" for jaxq itself."""
    tree = ast.parse(path.read_text())
    inside = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, (
                f"{path}:{node.lineno}: relative import; write it from jaxq."
            )
            names = (
                [f"jaxq.{a.name}" for a in node.names]
                if node.module == "jaxq"
                else [node.module or ""]
            )
        for name in names:
            top, _, rest = name.partition(".")
            if top == "jaxq":
                yield node.lineno, rest.partition(".")[0], id(node) in inside


def test_imports_go_strictly_downward():
    problems = []
    files = [
        path
        for path in sorted(ROOT.rglob("*.py"))
        if path.parent != ROOT or path.stem in ORDER
    ]
    for path in files:
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        assert room in ORDER, (
            f"jaxq/{room} has no place in the order of rooms: give it one in {__file__}."
        )
        below = ONLY.get(room, set(ORDER[: ORDER.index(room)])) | {room}
        for line, target, in_function in imports(path):
            if target not in below and not (in_function and (room, target) in INSIDE):
                problems.append(
                    f"{path.relative_to(ROOT.parent)}:{line}: {room} imports jaxq.{target}".rstrip(
                        "."
                    )
                )
    assert files, "no file of jaxq was found"
    assert not problems, "imports must go downward:\n" + "\n".join(problems)


def test_no_file_lies_outside_a_room():
    loose = (
        {path.stem for path in ROOT.glob("*.py")}
        - set(ORDER)
        - {"__init__", "__main__"}
    )
    assert not loose, f"give these a room, or a place in the order: {sorted(loose)}"
