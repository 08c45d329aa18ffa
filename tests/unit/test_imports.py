"""The architecture, read from the imports: every arrow points one way."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "s2s_scale"

# From the bottom up: a module may import, while it loads, from its own layer and those below.
LAYERS = (
    {"version", "errors", "utils", "compat"},
    {"config"},
    {"settings", "loss", "optim", "cpu", "data"},
    {"models"},
    {"backends", "evaluation", "generation", "checkpoint", "launch", "arguments"},
    {"resilience"},
    {"trainer"},
    {"report", "doctor", "runner"},
    {"cli", "demo"},
    {"__init__", "__main__"},
)
# Each library that only some runs need is imported in exactly one folder.
BACKEND_LIBRARIES = {
    "fairscale": "backends.fairscale_oss",
    "deepspeed": "backends.deepspeed",
    "torch_xla": "backends.xla",
}
HEAVY = {"torch", "transformers", "datasets", "accelerate"}


TOP_NAMES = {path.stem for path in PACKAGE.glob("*.py")} | {
    path.parent.name for path in PACKAGE.glob("*/__init__.py")
}


def modules() -> dict[str, Path]:
    found = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
        for path in PACKAGE.rglob("*.py")
    }
    assert len(found) > 50
    return found


def layer_of(module: str) -> int:
    top = module.split(".")[0]
    layers = [number for number, names in enumerate(LAYERS) if top in names]
    assert layers, f"{module}: put '{top}' into LAYERS"
    return layers[0]


def imports(path: Path, *, at_load: bool) -> set[str]:
    """Modules that a file imports; with ``at_load`` only those imported while it loads."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        is_typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if at_load and (is_function or is_typing):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_point_down(module):
    own = layer_of(module)
    for name in imports(modules()[module], at_load=True):
        if name.startswith("s2s_scale."):
            target = name.removeprefix("s2s_scale.")
            if target.split(".")[0] in TOP_NAMES:
                assert layer_of(target) <= own, f"{module} imports {name}"


def test_backend_libraries_have_one_home():
    for library, home in BACKEND_LIBRARIES.items():
        users = [
            module
            for module, path in modules().items()
            if any(name.split(".")[0] == library for name in imports(path, at_load=False))
        ]
        assert users
        assert all(user.startswith(f"{home}.") for user in users)


def test_the_core_never_names_a_backend():
    names = ("deepspeed", "fairscale", "torch_xla")
    for module, path in modules().items():
        if module.split(".")[0] in ("trainer", "data", "loss", "optim"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for node in ast.walk(tree):
                if isinstance(node, (ast.Name, ast.Attribute)):
                    name = node.id if isinstance(node, ast.Name) else node.attr
                    assert not any(backend in name.lower() for backend in names), (module, name)


@pytest.mark.parametrize("layer_name", ["errors", "config", "settings", "utils", "cli"])
def test_the_command_line_loads_nothing_heavy(layer_name):
    for module, path in modules().items():
        if module.split(".")[0] == layer_name:
            heavy = {name.split(".")[0] for name in imports(path, at_load=True)} & HEAVY
            assert not heavy, f"{module} imports {heavy} while it loads"
