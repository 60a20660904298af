"""Facts about jaxq's own source: import circles, name conditions, sizes.

    python tests/project/structure.py

prints every problem and exits with 1 if there is one. `test_structure.py` asserts that
there is none. The source is read as text; nothing of jaxq is imported.
"""

from __future__ import annotations

import ast
import functools
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "jaxq"

# A room imports only rooms that come before it.
ROOMS = (
    *("progress", "debug_checks", "files", "jaxprs", "processes", "meshes"),
    *("formats", "metrics", "observers", "qtensor"),
    *("kernels", "ops", "emulation", "methods", "recipes", "optim", "distillation"),
    *(
        "sharding",
        "serialization",
        "nn",
        "io",
        "models",
        "training",
        "evaluation",
        "cli",
        "__main__",
    ),
)
MOST_COLUMNS = 88
MOST_CODE_LINES = 80
# Functions of the loop that quantizes a model, and of its adapters.
DRIVERS = "jaxq.nn.transform"
MOST_DRIVER_LINES = 60
MOST_README_WORDS = 900
# Longer functions, each with its reason. Bodies of Pallas kernels are not counted.
LONG_FUNCTIONS: dict[str, str] = {}


class Module(NamedTuple):
    """One file of jaxq.

    Attributes:
      name: "jaxq.nn.transform._loop".
      path: of the file.
      text: its source.
      tree: its syntax tree.
    """

    name: str
    path: Path
    text: str
    tree: ast.Module

    @property
    def room(self) -> str:
        """The first part of the name below jaxq; empty for jaxq itself."""
        return self.name.partition(".")[2].partition(".")[0]

    @property
    def shown(self) -> str:
        return str(self.path.relative_to(ROOT))


def modules() -> dict[str, Module]:
    """Every file of jaxq, by module name."""
    files = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts).removesuffix(".__init__")
        text = path.read_text()
        files[name] = Module(name, path, text, ast.parse(text))
    return files


@functools.cache
def nodes(tree: ast.Module) -> tuple[ast.AST, ...]:
    """All nodes of a syntax tree. Several checks walk the same trees."""
    return tuple(ast.walk(tree))


# Imports.


def imports(module: Module, known: dict[str, Module]) -> Iterator[tuple[int, str]]:
    """(line, module) of every import of jaxq in a file.

    Imports inside functions, those for types only, and `import_module` of a constant
    are included.
    """
    for node in nodes(module.tree):
        if isinstance(node, ast.Call) and _called(node) == "import_module":
            for target in _strings(node):
                if target.partition(".")[0] == "jaxq":
                    yield node.lineno, target
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "jaxq":
                    yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(
                    f"{module.shown}:{node.lineno}: a relative import. "
                    "Write the whole name."
                )
            source = node.module or ""
            if source.partition(".")[0] != "jaxq":
                continue
            for alias in node.names:
                # `from jaxq.ops import _conv` imports a file of that name.
                inner = f"{source}.{alias.name}"
                yield node.lineno, inner if inner in known else source


def upward_imports(known: dict[str, Module]) -> list[str]:
    """Imports of a room that does not come before the importing one."""
    problems = []
    for module in known.values():
        if not module.room:
            continue
        if module.room not in ROOMS:
            problems.append(f"{module.shown}: room {module.room!r} has no place")
            continue
        for line, target in imports(module, known):
            room = target.partition(".")[2].partition(".")[0]
            if room == module.room:
                continue
            if not room or ROOMS.index(room) > ROOMS.index(module.room):
                problems.append(f"{module.shown}:{line}: imports {target}")
    return problems


def circles(known: dict[str, Module]) -> list[str]:
    """Groups of files that import one another, directly or through others.

    jaxq's own `__init__` is left out: every import of a file below it runs it first.
    """
    graph = {
        name: sorted({target for _, target in imports(module, known)} - {name, "jaxq"})
        for name, module in known.items()
        if name != "jaxq"
    }
    components = _strongly_connected(graph)
    return [" <-> ".join(sorted(names)) for names in components if len(names) > 1]


def _strongly_connected(graph: dict[str, list[str]]) -> list[list[str]]:
    """Tarjan's algorithm (1972), with a stack of its own instead of recursion."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    components: list[list[str]] = []
    for start in graph:
        if start in order:
            continue
        work = [(start, iter(graph[start]))]
        order[start] = lowest[start] = len(order)
        stack.append(start)
        while work:
            name, targets = work[-1]
            target = next(targets, None)
            if target is None:
                work.pop()
                if work:
                    parent = work[-1][0]
                    lowest[parent] = min(lowest[parent], lowest[name])
                if lowest[name] == order[name]:
                    first = stack.index(name)
                    components.append(stack[first:])
                    del stack[first:]
            elif target not in order:
                order[target] = lowest[target] = len(order)
                stack.append(target)
                work.append((target, iter(graph.get(target, []))))
            elif target in stack:
                lowest[name] = min(lowest[name], order[target])
    return components


# Conditions on names.


def method_names(known: dict[str, Module]) -> dict[str, str]:
    """Name of each post-training method, and the file of its record."""
    return _names_of_records(known, "jaxq.methods", "Method")


def scale_rule_names(known: dict[str, Module]) -> dict[str, str]:
    """Name of each scale rule, and the file of its record."""
    return _names_of_records(known, "jaxq.qtensor", "ScaleRule")


def _names_of_records(
    known: dict[str, Module], package: str, record: str
) -> dict[str, str]:
    """The first argument of every call `record("name", ...)` in a package."""
    names = {}
    for module in known.values():
        if not module.name.startswith(package):
            continue
        for node in nodes(module.tree):
            if not isinstance(node, ast.Call) or _called(node) != record:
                continue
            values = [
                *node.args[:1],
                *(k.value for k in node.keywords if k.arg == "name"),
            ]
            for value in values:
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    names[value.value] = module.name
    return names


def _called(node: ast.Call) -> str:
    function = node.func
    return getattr(function, "attr", None) or getattr(function, "id", "")


# These names mean other things too: a clipping rule, the fallback of a method. A
# condition on one of them counts only if it speaks of a method or of a scale rule.
AMBIGUOUS = frozenset({"absmax", "absmean", "clip", "equalize", "rtn"})
# In this room the names of methods are names of other libraries' file formats.
FILE_FORMATS = "io"
_SUBJECT = re.compile(r"\b(method|scale_rule|rule|solved)\b")
_PREFIX_TESTS = ("startswith", "endswith")


def name_conditions(known: dict[str, Module]) -> list[str]:
    """Conditions on a method's or scale rule's name, outside of the file that owns it.

    These are conditions: a comparison or a `match` case with the name, `startswith`
    and `endswith`, a dict with the name as a key that a variable indexes, `in` a
    constant that holds the name, and a comparison with a method's record.
    """
    owners = method_names(known) | scale_rule_names(known)
    constants = {
        (module.name, name): value
        for module in known.values()
        for name, value in _constants(module)
    }
    # Presets and recipes share a few names with methods. Their tables do not count.
    constants = {
        key: value
        for key, value in constants.items()
        if 2 * len(set(_strings(value)) & set(owners)) >= len(set(_strings(value)))
    }
    problems = []
    for module in known.values():
        values = _visible_constants(module, constants)
        for node in nodes(module.tree):
            parts = _condition_parts(node)
            if not parts:
                continue
            # The values of constants count as if they stood in the condition.
            parts += [
                values[name]
                for part in parts
                for name in _names(part)
                if name in values
            ]
            names = {name for part in parts for name in _strings(part)} & set(owners)
            foreign = {name for name in names if owners[name] != module.name}
            text = " ".join(ast.unparse(part) for part in parts)
            is_certain = bool(foreign - AMBIGUOUS) and module.room != FILE_FORMATS
            is_about_methods = bool(foreign and _SUBJECT.search(text))
            if is_certain or is_about_methods or _compares_record(node):
                problems.append(
                    f"{module.shown}:{node.lineno}: {ast.unparse(node)[:80]}"
                )
    return problems


def _constants(module: Module) -> Iterator[tuple[str, ast.expr]]:
    """(name, value) of the collections of strings that a file assigns to a name."""
    for node in nodes(module.tree):
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AnnAssign):
            targets = [node.target]
        else:
            continue
        value = node.value
        if isinstance(value, ast.Call) and _called(value) in ("frozenset", "set"):
            value = value.args[0] if value.args else None
        if isinstance(value, ast.Dict):
            value = ast.Tuple([key for key in value.keys if key], ast.Load())
        if isinstance(value, ast.Tuple | ast.List | ast.Set):
            for target in targets:
                if isinstance(target, ast.Name):
                    yield target.id, value


def _visible_constants(
    module: Module, constants: dict[tuple[str, str], ast.expr]
) -> dict[str, ast.expr]:
    """The constants that a file can name: its own, imported ones, `module.NAME`."""
    # Only names in capitals are found behind a dot: others are often attributes.
    visible = {name: value for (_, name), value in constants.items() if name.isupper()}
    visible |= {
        name: value
        for (owner, name), value in constants.items()
        if owner == module.name
    }
    for node in nodes(module.tree):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                value = constants.get((node.module or "", alias.name))
                if value is not None:
                    visible[alias.asname or alias.name] = value
    return visible


def _condition_parts(node: ast.AST) -> list[ast.AST]:
    """The parts of a condition on a value. Empty if a node is no condition."""
    if isinstance(node, ast.Compare):
        return [node.left, *node.comparators]
    if isinstance(node, ast.Match):
        return [node.subject, *(case.pattern for case in node.cases)]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        if node.func.attr in _PREFIX_TESTS:
            return [node.func.value, *node.args]
        if node.func.attr == "get" and node.args:
            return _lookup_parts(node.func.value, node.args[0])
    if isinstance(node, ast.Subscript):
        return _lookup_parts(node.value, node.slice)
    return []


def _lookup_parts(table: ast.expr, key: ast.expr) -> list[ast.AST]:
    """The keys of a dict that a variable indexes. Empty for other lookups."""
    if isinstance(key, ast.Constant):
        return []
    if isinstance(table, ast.Dict):
        return [key, *(name for name in table.keys if name is not None)]
    return [key, table] if isinstance(table, ast.Name | ast.Attribute) else []


def _compares_record(node: ast.AST) -> bool:
    """True for a comparison with the record of one method, such as `_gptq.METHOD`."""
    if not isinstance(node, ast.Compare):
        return False
    sides = [node.left, *node.comparators]
    return any("METHOD" in _names(side) for side in sides)


def _names(node: ast.AST) -> list[str]:
    """The names that an expression is: `NAME` or the last part of `module.NAME`."""
    if isinstance(node, ast.Name):
        return [node.id]
    return [node.attr] if isinstance(node, ast.Attribute) else []


def _strings(node: ast.AST) -> Iterator[str]:
    for inner in ast.walk(node):
        if isinstance(inner, ast.Constant) and isinstance(inner.value, str):
            yield inner.value


# Sizes.


def code_lines(module: Module, function: ast.AST) -> int:
    """Lines of a function without docstrings, comments and empty lines."""
    documented: set[int] = set()
    for node in ast.walk(function):
        body = getattr(node, "body", None)
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            assert body
            documented |= set(range(body[0].lineno, body[0].end_lineno + 1))
    first, last = function.lineno, function.end_lineno  # pyright: ignore
    count = 0
    for number, line in enumerate(module.text.splitlines()[first - 1 : last], first):
        text = line.strip()
        if text and not text.startswith("#") and number not in documented:
            count += 1
    return count


def functions(module: Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    """(qualified name, function) of every function in a file, inner ones too."""

    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef):
                yield f"{prefix}{child.name}", child
                yield from walk(child, f"{prefix}{child.name}.")
            elif isinstance(child, ast.ClassDef):
                yield from walk(child, f"{prefix}{child.name}.")
            else:
                yield from walk(child, prefix)

    return walk(module.tree, f"{module.name}.")


def long_functions(known: dict[str, Module]) -> list[str]:
    """Functions over the limit that have no reason in LONG_FUNCTIONS."""
    problems = []
    for module in known.values():
        is_driver = module.name.startswith(DRIVERS)
        most = MOST_DRIVER_LINES if is_driver else MOST_CODE_LINES
        for name, function in functions(module):
            if function.name == "kernel" or name in LONG_FUNCTIONS:
                continue
            kernels = [
                inner
                for inner in ast.walk(function)
                if isinstance(inner, ast.FunctionDef) and inner.name == "kernel"
            ]
            inside = sum(code_lines(module, kernel) for kernel in kernels)
            count = code_lines(module, function) - inside
            if count > most:
                problems.append(
                    f"{module.shown}:{function.lineno}: {name}: {count} lines"
                )
    return problems


def wide_lines(folders: Sequence[str] = ("jaxq", "tests", "benchmarks", "examples")):
    """Lines with more than 88 columns: of Python files, documents, and settings."""
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    paths += [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    paths += [ROOT / ".ci/run", ROOT / "pyproject.toml", ROOT / "noxfile.py"]
    problems = []
    for path in sorted(paths):
        text = path.read_text()
        lines = prose_and_code(text) if path.suffix == ".md" else enumerated(text)
        for number, line in lines:
            if len(line) > MOST_COLUMNS:
                where = f"{path.relative_to(ROOT)}:{number}"
                problems.append(f"{where}: {len(line)} columns")
    return problems


def enumerated(text: str) -> Iterator[tuple[int, str]]:
    """(number, line) of every line."""
    return enumerate(text.splitlines(), 1)


def prose_and_code(text: str) -> Iterator[tuple[int, str]]:
    """(number, line) of a Markdown text without what cannot be wrapped.

    Rows of tables, output (blocks without a language or with "text", and the lines
    after a prompt) and lines with a URL are left out.
    """
    language = None  # of the block of code around a line; None outside of blocks
    has_prompts = False
    for number, line in enumerated(text):
        if line.lstrip().startswith("```"):
            language = line.strip().strip("`") if language is None else None
            has_prompts = False
            continue
        has_prompts = has_prompts or line.startswith(">>> ")
        is_output = language in ("", "text")
        if language is not None and has_prompts:
            is_output = not line.startswith((">>> ", "... "))
        is_row = language is None and line.lstrip().startswith("|")
        if not is_output and not is_row and "://" not in line:
            yield number, line


def readme_words() -> int:
    """Words of the README, counted as `wc -w` does."""
    return len((ROOT / "README.md").read_text().split())


@functools.cache
def report() -> dict[str, list[str]]:
    """The problems of each kind."""
    known = modules()
    words = readme_words()
    too_long = words > MOST_README_WORDS
    return {
        "imports of a room that does not come before": upward_imports(known),
        "import circles between files": circles(known),
        "conditions on the name of a method or scale rule": name_conditions(known),
        f"functions over {MOST_CODE_LINES} lines of code (in {DRIVERS}: "
        f"{MOST_DRIVER_LINES})": long_functions(known),
        f"lines over {MOST_COLUMNS} columns": wide_lines(),
        f"README over {MOST_README_WORDS} words": [f"{words} words"]
        if too_long
        else [],
    }


def main() -> int:
    problems = report()
    for title, lines in problems.items():
        print(f"{title}: {len(lines) or 'none'}")
        for line in lines:
            print(f"  {line}")
    print(f"methods: {', '.join(sorted(method_names(modules())))}")
    print(f"scale rules: {', '.join(sorted(scale_rule_names(modules())))}")
    print(f"README: {readme_words()} words")
    return 1 if any(problems.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
