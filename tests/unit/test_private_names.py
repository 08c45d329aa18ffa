"""Private parts of other libraries are used in ``patches.py`` and ``compat.py`` files alone.

Found from the syntax trees: a private attribute that this package defines nowhere, a private
import, and an assignment to an attribute of another library's module or class. Overriding a private
method in a subclass, and calling the overridden one by ``super()``, is allowed: that is how
transformers' trainer is extended.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers

PACKAGE = Path(__file__).parents[2] / "s2s_scale"
HOMES = ("patches.py", "compat.py")

# Public in spite of the underscore, by the documentation of Python.
PUBLIC = {"_asdict", "_current_frames", "_exit", "_fields", "_make", "_replace"}

# file -> name -> why it stays there.
EXCEPTIONS: dict[str, dict[str, str]] = {}


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and len(name) > 1


def is_library(module: str) -> bool:
    """Whether it is neither ours nor Python's own."""
    return module.split(".")[0] not in {"s2s_scale", *sys.stdlib_module_names}


def functions_of(text: str) -> set[str]:
    return set(re.findall(r"^\s+def (_[a-z]\w*)", text, re.MULTILINE))


BASES = "".join(map(inspect.getsource, (transformers.Trainer, transformers.Seq2SeqTrainer)))
# Private methods and attributes of transformers' trainers, which are ours by inheritance alone.
INHERITED = functions_of(BASES) | set(re.findall(r"self\.(_[a-z]\w*)", BASES))


class Uses(ast.NodeVisitor):
    """Collects (line, name) of what a file uses of other libraries' private parts."""

    def __init__(self, ours: set[str]) -> None:
        self.ours = ours
        self.found: list[tuple[int, str]] = []
        self.foreign: set[str] = set()  # names bound to another library's module or class

    def note(self, node: ast.AST, name: str) -> None:
        self.found.append((node.lineno, name))

    def is_ours(self, name: str) -> bool:
        return name in self.ours or name in PUBLIC

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if is_library(alias.name):
                self.foreign.add(alias.asname or alias.name.split(".")[0])
                for part in filter(private, alias.name.split(".")):
                    self.note(node, part)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = node.module or ""
        if not is_library(module):
            return
        self.foreign.update(alias.asname or alias.name for alias in node.names)
        for part in (*module.split("."), *(alias.name for alias in node.names)):
            if private(part):
                self.note(node, part)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if private(node.attr) and not self.is_ours(node.attr):
            by_super = isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "super"
            if not by_super:
                self.note(node, node.attr)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        function = ast.unparse(node.func)
        if function in {"getattr", "hasattr", "setattr", "delattr"} and len(node.args) > 1:
            name = node.args[1]
            if isinstance(name, ast.Constant) and private(name.value):
                if not self.is_ours(name.value):
                    self.note(node, name.value)
            elif function == "setattr" and self.root(node.args[0]) in self.foreign:
                self.note(node, ast.unparse(node))
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        called = ast.unparse(node.value.func) if isinstance(node.value, ast.Call) else ""
        for target in node.targets:
            if called.endswith("import_module") and isinstance(target, ast.Name):
                self.foreign.add(target.id)
            self.assigned(target)
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit_Assign(ast.Assign([node.target], node.value, lineno=node.lineno))

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.assigned(node.target)
        self.generic_visit(node)

    def visit_Delete(self, node: ast.Delete) -> None:
        for target in node.targets:
            self.assigned(target)
        self.generic_visit(node)

    def assigned(self, target: ast.expr) -> None:
        """Note an assignment to an attribute of what another library was imported from."""
        for part in target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target]:
            if isinstance(part, ast.Attribute) and self.root(part.value) in self.foreign:
                self.note(part, ast.unparse(part))

    def root(self, node: ast.expr) -> str | None:
        while isinstance(node, ast.Attribute):
            node = node.value
        return node.id if isinstance(node, ast.Name) else None


def defined_in(tree: ast.AST) -> set[str]:
    """Private methods, class attributes and attributes of ``self`` that a file defines."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    found.add(member.name)
                elif isinstance(member, ast.AnnAssign):
                    found.add(ast.unparse(member.target))
                elif isinstance(member, ast.Assign):
                    found.update(map(ast.unparse, member.targets))
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.update([node.attr] if ast.unparse(node.value) in {"self", "cls"} else [])
    return set(filter(private, found))


def trees() -> Iterator[tuple[Path, ast.AST]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def own_names() -> set[str]:
    """What is ours: defined here, and no attribute that transformers' trainer has as well."""
    defined, overridden = set(), set()
    for path, tree in trees():
        if path.name not in HOMES:
            defined |= defined_in(tree)
            overridden |= functions_of(path.read_text(encoding="utf-8"))
    return (defined - INHERITED) | (overridden & INHERITED)


def uses_in(text: str, ours: set[str] | None = None) -> list[str]:
    tree = ast.parse(text)
    uses = Uses(defined_in(tree) if ours is None else ours)
    uses.visit(tree)
    return [name for _, name in sorted(uses.found)]


def test_private_names_of_others_are_used_in_their_files_alone():
    ours = own_names()
    assert len(ours) > 100
    wrong, excepted = [], set()
    for path, tree in trees():
        if path.name in HOMES:
            continue
        uses = Uses(ours)
        uses.visit(tree)
        file = path.relative_to(PACKAGE).as_posix()
        for line, name in uses.found:
            if name in EXCEPTIONS.get(file, {}):
                excepted.add((file, name))
            else:
                wrong.append(f"{file}:{line}: {name}")
    assert not wrong, "move these into patches.py or compat.py of the folder:\n" + "\n".join(wrong)
    listed = {(file, name) for file, names in EXCEPTIONS.items() for name in names}
    assert listed == excepted, "no longer there"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import torch._dynamo", ["_dynamo"]),
        ("from torch._dynamo import config", ["_dynamo"]),
        ("from transformers.trainer import _is_peft_model", ["_is_peft_model"]),
        ("def f(x): return x._version", ["_version"]),
        ("def f(x): return getattr(x, '_version', 0)", ["_version"]),
        ("import torch\ntorch.nn.functional.linear = 1", ["torch.nn.functional.linear"]),
        ("from torch import nn\ndef f():\n    nn.Linear.forward = 1", ["nn.Linear.forward"]),
        ("import importlib\nm = importlib.import_module('x')\nm.f = 1", ["m.f"]),
        ("import torch\nsetattr(torch, 'f', 1)", ["setattr(torch, 'f', 1)"]),
        ("class A(B):\n    def _run(self): return super()._run() + self._own()\n", ["_own"]),
        ("class A:\n    def __init__(self): self._x = 1\n    def f(self): return self._x", []),
        ("def f(row): return row._replace(a=1)", []),
        ("import torch\nx = torch.zeros(1)\nx.grad = None", []),
    ],
)
def test_the_search_itself(text, found):
    assert uses_in(text) == found


def test_an_attribute_of_transformers_trainer_is_not_ours_by_being_assigned():
    assert {"_tr_loss", "_get_train_sampler"} <= INHERITED
    assert "_tr_loss" not in own_names() and "_get_train_sampler" in own_names()
