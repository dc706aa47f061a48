"""The plan of the house, read from the syntax trees: who imports whom, and how large it may be."""

import ast
import re
import sys
from pathlib import Path

import pytest
from density import faults, measure, product_files

ROOT = Path(__file__).resolve().parents[1]
ORDER = ("encoders", "llama", "data", "merv", "eval", "train")  # each imports only earlier ones
BELOW_TRAIN = ("miniature", "miniature.world", "miniature.specialists", "miniature.preset")
OURS = {*ORDER, "cost", "support", "miniature", "lesson"}
FILES = product_files()


def module_name(file: Path) -> str:
    """support/cli.py -> support.cli; miniature/__init__.py -> miniature."""
    name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_nothing_of_ours_is_imported_inside_a_function(file):
    """Such an import hides a circle."""
    inside = imports(file, top_level=False) - imports(file, top_level=True)
    assert not {name for name in inside if name.split(".")[0] in OURS}


def imports(file: Path, top_level: bool) -> set[str]:
    """The modules that a file imports, at its top level or anywhere else."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    nodes = tree.body if top_level else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module != "__future__":
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_imports_go_one_way(file):
    """support <- encoders <- llama <- data <- merv <- eval <- train <- cost and the claims."""
    name = module_name(file)
    if name.startswith("support"):
        allowed = {"support"}
    elif name in ORDER:
        allowed = {"support", *ORDER[: ORDER.index(name)]}
        if name == "train":
            allowed.add("miniature")
    elif name in BELOW_TRAIN:
        allowed = {"support", "miniature", *ORDER[: ORDER.index("train")]}
    else:
        allowed = OURS - {"cost", "lesson"}  # a leaf
        if name.startswith("lesson"):
            allowed.add("lesson")
    assert {imported.split(".")[0] for imported in ours(file)} <= allowed


def ours(file: Path) -> set[str]:
    """The modules of this project that a file imports."""
    known = {module_name(other) for other in FILES}
    return imports(file, top_level=True) & known


def test_nobody_imports_a_leaf():
    """cost.py, the claims and the lesson are commands of their own."""
    for file in FILES:
        name = module_name(file)
        for imported in ours(file):
            assert imported != "cost", name
            assert imported != "miniature.claims" or name == "miniature.__main__", name
            assert not imported.startswith("lesson") or name.startswith("lesson"), name


def test_no_modules_import_each_other_in_a_circle():
    """Following imports from any module never leads back to it."""
    graph = {module_name(file): ours(file) - {"support", "miniature"} for file in FILES}
    for start in graph:
        seen, todo = set(), list(graph[start])
        while todo:
            name = todo.pop()
            assert name != start, f"{start} imports itself through others"
            if name not in seen:
                seen.add(name)
                todo += graph.get(name, ())


def test_the_six_are_the_only_python_files_at_the_top():
    """Beside cost.py, which is a command of its own."""
    assert {file.stem for file in ROOT.glob("*.py")} == {*ORDER, "cost"}


def test_the_code_stays_small():
    """The first three are today's size, so that growth is noticed."""
    assert lines(*(f"{name}.py" for name in ORDER)) <= 4226
    assert lines("*.py", "support/*.py") <= 10779
    assert lines("miniature/*.py") <= 866
    assert lines("lesson/**/*.py") <= 900
    assert lines("README.md") <= 200


def lines(*patterns: str) -> int:
    """Lines of all files that match."""
    files = [file for pattern in patterns for file in ROOT.glob(pattern)]
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_no_file_is_too_dense_to_read(file):
    """tests/density.py has the bounds."""
    name = str(file.relative_to(ROOT))
    assert not faults(name, measure(file.read_text(encoding="utf-8")))


def test_requirements_name_everything_that_is_imported():
    """Each third-party package of the product is in requirements.txt, and no mock is imported."""
    required = re.findall(r"^[\w-]+", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    packages = {name.lower().replace("-", "_") for name in required}
    known_as = {"PIL": "pillow"}
    for file in FILES:
        for name in imports(file, top_level=False):
            top = name.split(".")[0]
            assert not name.startswith("unittest"), file
            if top in OURS or top in sys.stdlib_module_names:
                continue
            assert known_as.get(top, top) in packages, f"{file.name} imports {top}"


def test_every_public_class_and_function_has_a_docstring():
    """At the top level of each file."""
    for file in FILES:
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{file.name}: {node.name}"
