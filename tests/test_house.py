"""How the package is laid out: which file may import which, and what may travel with a checkpoint."""

import ast
from pathlib import Path

import pytest


SOURCE = Path(__file__).parent.parent / "src"
PACKAGE = SOURCE / "transformers_sled"
# From the top of the house to its ground. A file imports from its own floor and from those below.
FLOORS = [
    {"__init__"},
    {"cli", "batch", "server", "training"},
    {"serving_sled", "pipeline_sled", "precision"},
    {"generation_sled"},
    {"engine_sled"},
    {"step_sled"},
    {"modeling_sled", "cache_sled", "interleaving_sled", "processing_sled"},
    {"codec_sled", "text_sled", "audio_sled", "hub_sled", "voices"},
    {"normalization_sled", "pauses_sled", "quantization_sled"},
    {"configuration_sled"},
]
# What `generate` is mixed into has to know it.
MIXES_IN = {("modeling_sled", "generation_sled")}
# These need a server, a training loop or the package's own files around them.
AT_HOME = {"serving_sled", "pipeline_sled", "precision", "quantization_sled"}
# The version stands at the top of the house, and what an extra brings is imported where it is used.
SAID_ANYWHERE = {((), "__version__")}
OPTIONAL = {("cli", "batch"), ("cli", "server")}
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def name_of(path):
    """Name of a module within the package, in parts: `("training", "trainer")`, `()` for the package itself."""
    parts = path.with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


NAMES = {name_of(path) for path in MODULES}


def room_of(name):
    return name[0] if name else "__init__"


def floor_of(name):
    return next(index for index, floor in enumerate(FLOORS) if room_of(name) in floor)


def is_type_checking(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(path, at_run_time=True, at_top=False):
    """The package's own imports in a file, as pairs of a module and a name that is taken from it (or `None`)."""
    name = name_of(path)
    folder = name if path.name == "__init__.py" else name[:-1]
    found = []

    def visit(node):
        if at_run_time and is_type_checking(node):
            for child in node.orelse:
                visit(child)
            return
        if at_top and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                first, *rest = alias.name.split(".")
                if first == PACKAGE.name:
                    found.append((tuple(rest), None))
        elif isinstance(node, ast.ImportFrom):
            module = tuple(node.module.split(".")) if node.module else ()
            if node.level:
                module = folder[: len(folder) - node.level + 1] + module
            elif module[:1] == (PACKAGE.name,):
                module = module[1:]
            else:
                return
            for alias in node.names:
                if (*module, alias.name) in NAMES:
                    found.append(((*module, alias.name), None))
                else:
                    found.append((module, alias.name))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse((PACKAGE / path).read_text()))
    return found


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_arrows_run_down(path):
    name = name_of(path)
    up = [
        ".".join(module) or PACKAGE.name
        for module, what in imports(path)
        if floor_of(module) < floor_of(name)
        and (room_of(name), room_of(module)) not in MIXES_IN
        and (module, what) not in SAID_ANYWHERE
    ]
    assert up == []


def test_no_circle():
    """A file never comes back to itself through what it imports at run time, wherever in the file that is."""
    arrows = {
        name_of(path): {module for module, what in imports(path) if (module, what) not in SAID_ANYWHERE}
        - {name_of(path)}
        for path in MODULES
    }
    done, circles = set(), []

    def walk(name, trail):
        if name in trail:
            circles.append(" -> ".join(".".join(part) or PACKAGE.name for part in [*trail[trail.index(name) :], name]))
        elif name not in done:
            for other in sorted(arrows.get(name, ())):
                walk(other, [*trail, name])
            done.add(name)

    for name in sorted(arrows):
        walk(name, [])
    assert circles == []


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_no_underscore_name_of_another_file(path):
    private = [
        f"{'.'.join(module)}.{name}"
        for module, name in imports(path, at_run_time=False)
        if name is not None and name.startswith("_") and not name.startswith("__")
    ]
    private += [
        ".".join(module)
        for module, _ in imports(path, at_run_time=False)
        if any(part.startswith("_") and not part.startswith("__") for part in module)
    ]
    assert private == []


@pytest.mark.parametrize(
    "path", [path for path in MODULES if path.stem.endswith("_sled") and path.stem not in AT_HOME], ids=str
)
def test_what_travels_needs_nothing_that_stays(path):
    travels = {path.stem for path in MODULES if len(path.parts) == 1 and path.stem.endswith("_sled")} - AT_HOME
    assert len(path.parts) == 1
    stays = [
        ".".join(module) or PACKAGE.name
        for module, _ in imports(path, at_run_time=False)
        if module[:1] == () or module[0] not in travels
    ]
    assert stays == []
    tree = ast.parse((PACKAGE / path).read_text())
    absolute = [
        node.lineno
        for node in ast.walk(tree)
        if (isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == PACKAGE.name)
        or (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == PACKAGE.name for alias in node.names))
    ]
    # `transformers` finds the files to take along by their relative imports.
    assert absolute == []


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_are_at_the_top(path):
    late = set(imports(path)) - set(imports(path, at_top=True))
    assert {one for one in late if (room_of(name_of(path)), room_of(one[0])) not in OPTIONAL} == set()


def test_every_file_has_its_floor():
    rooms = {room_of(name) for name in NAMES}
    assert rooms - set().union(*FLOORS) == set()
