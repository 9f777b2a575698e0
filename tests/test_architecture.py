"""A module imports only from floors above its own, and in no circle; rooms of one floor do not import each other."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = "magnification_invariant"
ROOT = Path(__file__).parents[1]

FLOORS = (
    {"_version", "files"},
    {"hub_files", "virtual_slides"},
    {"models", "data", "metrics"},
    {"records"},
    {"model_folder"},
    {"tasks", "signatures", "scope"},
    {"engine"},
    {"lomo"},
    {"predict"},
    {"report"},
    {"hub"},
    {"__init__"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def imports(source: str, module: str, for_types: bool = True) -> list[tuple[int, str]]:
    """Line and dotted name of all that is imported, also inside functions, relative or by import_module.

    Args:
        source: The module's text.
        module: Its dotted name; a package's ends in `.__init__`.
        for_types: Also what only a type checker imports.
    """
    names: list[tuple[int, str]] = []
    tree = ast.parse(source)
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    left_out = set() if for_types else {inside for block in blocks for inside in ast.walk(block)}
    for node in (node for node in ast.walk(tree) if node not in left_out):
        if isinstance(node, ast.Import):
            names += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*module.split(".")[: -node.level], *filter(None, [node.module])])
            base = base if node.level else node.module
            names += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                names.append((node.lineno, node.args[0].value))
    return names


def rooms_imported(source: str, module: str) -> list[tuple[int, str]]:
    """Line and room of every import from the package, see `imports`."""
    parts = [(line, name.split(".")) for line, name in imports(source, module)]
    # The root has the public names of all rooms: whoever imports one from it may mean any floor.
    return [
        (line, name[1] if len(name) > 1 and name[1] in FLOOR else "__init__")
        for line, name in parts
        if name[0] == PACKAGE
    ]


def circles(sources: dict[str, str]) -> list[list[str]]:
    """Modules that import each other: a chain of names for every import that leads back to where it began."""
    graph = {}
    for module, source in sources.items():
        names = [name for _, name in imports(source, module, for_types=False)]
        # "from a.b import c" means the module a.b.c, if there is one, or the name c of a.b or of the package a.b
        meant = [(name, f"{name}.__init__", parent := name.rpartition(".")[0], f"{parent}.__init__") for name in names]
        graph[module] = {next((m for m in each if m in sources), None) for each in meant} - {None, module}
    chains = []

    def follow(chain: list[str], done: set[str]) -> None:
        for module in sorted(graph[chain[-1]]):
            if module in chain:
                chains.append([*chain[chain.index(module) :], module])
            elif module not in done:
                follow([*chain, module], done)
        done.add(chain[-1])

    done: set[str] = set()
    for module in graph:
        if module not in done:
            follow([module], done)
    return chains


def violations(source: str, module: str) -> list[str]:
    """What is wrong with the imports of `module` (see `rooms_imported`)."""
    own = module.split(".")[1]
    if own not in FLOOR:
        return [f"{module} is on no floor: give it a floor in FLOORS, below all that it imports."]
    return [
        f"{module}, line {line}: {own} (floor {FLOOR[own]}) imports {room} (floor {FLOOR[room]})"
        for line, room in rooms_imported(source, module)
        if room != own and FLOOR[room] >= FLOOR[own]
    ]


def unsafe_loads(source: str) -> list[int]:
    """Lines that unpickle with torch: torch.load without a literal weights_only=True, or load under another name."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            lines += [node.lineno for alias in node.names if alias.name == "load"]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
            safe = any(
                k.arg == "weights_only" and isinstance(k.value, ast.Constant) and k.value.value is True
                for k in node.keywords
            )
            lines += [] if safe else [node.lineno]
    return lines


def modules() -> dict[str, str]:
    """Dotted name to text of every module of the package."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text(encoding="utf-8")
        for path in sorted((ROOT / PACKAGE).rglob("*.py"))
    }


def test_modules_import_only_from_floors_above():
    sources = modules()
    assert f"{PACKAGE}.__init__" in sources
    assert not [violation for module, source in sources.items() for violation in violations(source, module)]


def test_no_module_imports_itself_through_others():
    assert circles(modules()) == []


@pytest.mark.parametrize(
    "one, other",
    [
        ("from a.other import f", "def g():\n    from a.one import h"),
        ("from . import other", "def g():\n    from importlib import import_module\n    import_module('a.one')"),
        ("import a.other as o", "from a import one"),
    ],
)
def test_a_circle_is_seen(one, other):
    sources = {"a.__init__": "", "a.one": one, "a.other": other, "a.third": "from a.one import f\nimport json"}
    assert circles(sources) == [["a.one", "a.other", "a.one"]]
    for fine in ("from a import f", "if TYPE_CHECKING:\n    from a.one import C"):
        assert circles(sources | {"a.other": fine}) == []


def test_json_is_read_in_few_places():
    """`files.read_json` says which file is damaged; the others read strings from elsewhere."""
    assert len([name for name, text in modules().items() if "json.loads" in text or "json.load(" in text]) <= 4


def test_torch_loads_weights_only():
    folders = [ROOT / PACKAGE, ROOT / "examples", ROOT / "benchmarks"]
    files = [file for folder in folders for file in folder.rglob("*.py")]
    assert not [f"{file}:{line}" for file in files for line in unsafe_loads(file.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(
    ("module", "source", "room"),
    [
        ("data.pixels", "from magnification_invariant.models import embed", "models"),
        ("data.pixels", "import magnification_invariant.models.magdg as m", "models"),
        ("data.pixels", "from magnification_invariant import metrics", "metrics"),
        ("data.pixels", "from .. import metrics", "metrics"),
        ("data.pixels", "from ..metrics.intervals import cluster_interval", "metrics"),
        ("data.__init__", "from ..metrics import auc", "metrics"),
        ("data.pixels", "def f():\n    from magnification_invariant.engine import fit", "engine"),
        ("data.pixels", "import importlib\nimportlib.import_module('magnification_invariant.lomo')", "lomo"),
        ("data.pixels", "from magnification_invariant import fit", "__init__"),
        ("engine", "import magnification_invariant", "__init__"),
        ("engine", "from . import lomo", "lomo"),
        ("engine", "from .lomo import grid", "lomo"),
        ("report.table", "import magnification_invariant.hub.card, json", "hub"),
    ],
)
def test_a_violation_is_seen(module, source, room):
    (found,) = violations(source, f"{PACKAGE}.{module}")
    assert f" imports {room} " in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("data.pixels", "from magnification_invariant.data.breakhis import load_breakhis"),
        ("data.pixels", "from .breakhis import load_breakhis\nfrom . import splits"),
        ("data.__init__", "from .breakhis import load_breakhis\nfrom . import splits"),
        ("engine", "from magnification_invariant import metrics, tasks\nfrom .data.pixels import PixelCache"),
        ("hub.card", "from magnification_invariant._version import __version__\nimport torch, magnification"),
        ("__init__", "from magnification_invariant import models\nfrom .engine import fit"),
    ],
)
def test_what_is_allowed(module, source):
    assert not violations(source, f"{PACKAGE}.{module}")


def test_a_new_room_needs_a_floor():
    assert "give it a floor" in violations("", f"{PACKAGE}.utilities")[0]


def test_an_unsafe_load_is_seen():
    assert unsafe_loads("import torch\ntorch.load(f)\ntorch.load(f, weights_only=False)\ntorch.load(f, 'cpu')") == [
        2,
        3,
        4,
    ]
    assert unsafe_loads("from torch import nn, load") == [1]
    assert unsafe_loads("torch.load(f, map_location='cpu', weights_only=True)\njson.load(f)") == []


HEAVY = {"datasets", "evaluate", "accelerate", "sklearn", "gradio", "matplotlib"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "code, heavy",
    [
        (f"import {PACKAGE}, {PACKAGE}.data", HEAVY),
        ("import magdg; magdg.main(['--help'])", HEAVY | {"torch", "timm", "numpy", PACKAGE}),
        ("import magdg; magdg.main(['no-such-command'])", HEAVY | {"torch", "timm", "numpy", PACKAGE}),
        ("import magdg; magdg.main(['predict', '--help'])", HEAVY | {"torch", "timm", "pandas"}),
    ],
)
def test_imports_stay_light(code, heavy):
    code = f"import atexit, sys\natexit.register(lambda: print('heavy:', *({heavy} & set(sys.modules))))\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.rstrip().endswith("heavy:") and "Traceback" not in done.stderr, done.stderr
