"""The floor plan holds: which part of the package may import which, found by reading the code.

A part is a folder, or the root with its flat Hub modules. `convert_checkpoint` is the one root
module that belongs to no checkpoint: the command of the `conversion` folder.
"""

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent
COMMANDS = {"convert_checkpoint", "__init__"}  # root modules that do not travel with checkpoints
ENTRIES = ("modeling_perceptiondlm", "processing_perceptiondlm")  # what a checkpoint names
MAX_HUB_MODULES = 23
# Folders that git leaves out: `make test-transformers` puts modules below `outputs`.
IGNORED = {
    line.rstrip("/") for line in (PACKAGE / ".gitignore").read_text().split() if line.endswith("/")
}

ALLOWED = {
    "root": {"root"},
    "common": {"root"},
    "scenes": {"root", "common"},
    "regions": {"root", "common"},
    "publishing": {"root", "common", "conversion"},
    "conversion": {"root", "common", "publishing"},
    "training": {"root", "common", "scenes", "conversion", "publishing"},
    "evaluation": {"root", "common", "scenes", "conversion"},
    "apps": {"root", "common", "scenes", "conversion", "regions"},
    "pipelines": {"root", "common", "scenes", "regions", "apps"},
    "benchmarks": {"root", "common", "scenes", "evaluation", "training", "pipelines", "apps"},
    "docs": {"root", "scenes", "apps", "regions"},  # scripts that draw figures and write tables
}


@dataclass(frozen=True)
class Import:
    """One import of this package's, by a module: "training.run", or "modeling_loss" at the root."""

    importer: str
    imported: str
    is_deferred: bool  # it stands inside a function

    def __str__(self) -> str:
        return f"{self.importer} -> {self.imported}"


@functools.cache
def modules() -> dict[str, Path]:
    """The package's modules by name, those of the tests left out."""
    paths = [
        path
        for path in PACKAGE.rglob("*.py")
        if not IGNORED & set(parts_of(path))
        and not any(part.startswith(".") or part == "tests" for part in parts_of(path))
    ]
    return {".".join(parts_of(path)).removesuffix(".py"): path for path in paths}


def parts_of(path: Path) -> tuple[str, ...]:
    return path.relative_to(PACKAGE).parts


def part_of(module: str) -> str:
    return module.split(".")[0] if "." in module else "root"


@functools.cache
def imports() -> tuple[Import, ...]:
    """Every import of one of the package's modules by another."""
    return tuple(found for module in modules() for found in imports_of(module))


def imports_of(module: str) -> Iterator[Import]:
    for statement, is_deferred in statements_of(module):
        for name in names_of(statement, module):
            yield Import(module, name, is_deferred)


@functools.cache
def statements_of(module: str) -> tuple:
    return tuple(import_statements(ast.parse(modules()[module].read_text())))


def import_statements(tree: ast.AST, is_deferred: bool = False):
    """All import statements below a node, and whether each runs only when a function is called."""
    blocks = ("body", "orelse", "finalbody", "handlers", "cases")  # where statements stand
    for child in (child for block in blocks for child in getattr(tree, block, ())):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child, is_deferred
        is_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
        yield from import_statements(child, is_deferred or is_function)


def names_of(statement: ast.Import | ast.ImportFrom, module: str) -> list[str]:
    """The modules of this package that a statement imports."""
    if isinstance(statement, ast.Import):
        named = [alias.name for alias in statement.names]
    elif statement.level:
        folder = module.split(".")[: -statement.level]
        base = ".".join(["perceptiondlm", *folder, *filter(None, [statement.module])])
        named = [modules_within(base, alias.name) for alias in statement.names]
    else:
        named = [modules_within(statement.module, alias.name) for alias in statement.names]
    return [name.removeprefix("perceptiondlm.") for name in named if "perceptiondlm." in name]


def modules_within(base: str, name: str) -> str:
    """`base.name` where that is a module, else `base`, which has something of this name."""
    inner = f"{base}.{name}"
    return inner if inner.removeprefix("perceptiondlm.") in modules() else base


def test_the_reader_of_imports_finds_those_that_are_known():
    """Else every test below could pass by finding nothing."""
    found = {str(one): one.is_deferred for one in imports()}
    assert found["evaluation.benchmarks -> image_masks"] is False
    assert found["processing_perceptiondlm -> processing_sequence"] is False
    assert found["apps.captioning.captioner -> image_processing_perceptiondlm"] is False
    assert found["evaluation.judge_prompts -> evaluation.crops"] is True  # inside a function


def test_every_folder_has_a_place_in_the_plan():
    folders = {part_of(module) for module in modules()}
    assert folders == set(ALLOWED)


@pytest.mark.parametrize("part", ALLOWED)
def test_a_part_imports_only_what_the_plan_allows(part):
    wrong = [
        str(one)
        for one in imports()
        if part_of(one.importer) == part
        and part_of(one.imported) not in ALLOWED[part] | {part}
        and one.importer not in COMMANDS
    ]
    assert wrong == []


def test_the_converter_imports_the_conversion_folder_alone():
    """It is a command for users, and may not become a second place for code."""
    own = {part_of(one.imported) for one in imports() if one.importer == "convert_checkpoint"}
    assert own == {"conversion"}


def test_no_folder_imports_a_command():
    wrong = [str(one) for one in imports() if one.imported in COMMANDS]
    assert wrong == []


def test_nothing_imports_the_tests():
    own = {path.stem for path in (PACKAGE / "tests").glob("*.py")} | {"tests"}
    for module in modules():
        for statement, _ in statements_of(module):
            named = [alias.name for alias in statement.names]
            if isinstance(statement, ast.ImportFrom):
                named = [] if statement.level else [statement.module]
            assert not own & {name.split(".")[0] for name in named}, module


def test_no_modules_import_each_other_in_a_circle():
    at_import = {module: set() for module in modules()}
    for one in imports():
        if not one.is_deferred:
            at_import[one.importer].add(one.imported)

    # What imports nothing that is left cannot be in a circle: take it away until all are gone.
    while done := {module for module, needed in at_import.items() if not needed & set(at_import)}:
        at_import = {module: needed for module, needed in at_import.items() if module not in done}
    assert sorted(at_import) == []


def test_a_checkpoint_carries_every_root_module_but_the_commands_and_no_other():
    closure, ahead = set(), list(ENTRIES)
    while ahead:
        module = ahead.pop()
        closure.add(module)
        ahead += [
            one.imported
            for one in imports()
            if one.importer == module and one.imported not in closure
        ]
    assert closure == {module for module in modules() if "." not in module} - COMMANDS
    assert len(closure) <= MAX_HUB_MODULES
