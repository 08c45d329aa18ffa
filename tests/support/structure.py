"""Figures of a package's structure, read from its source.

``python -m tests.support.structure FOLDER…`` prints several folders, such as checkouts of two
revisions, side by side:

    git worktree add /tmp/before REVISION
    python -m tests.support.structure /tmp/before/s2s_scale s2s_scale
"""

from __future__ import annotations

import ast
import io
import statistics
import sys
import tokenize
from collections import Counter
from pathlib import Path

SHORT = 5
"""A function of at most so many lines is counted as short."""
NOT_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def code_lines(source: str, tree: ast.Module) -> int:
    """Lines that hold a token other than a comment or a docstring."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NOT_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):
        # A string that is a statement: a docstring, or the text below a constant.
        value = node.value if isinstance(node, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            lines.difference_update(range(value.lineno, int(value.end_lineno or 0) + 1))
    return len(lines)


def function_lines(function: Function) -> int:
    """Lines of a function without its decorators, its docstring included."""
    return int(function.end_lineno or 0) - function.lineno + 1


def own_classes(trees: dict[str, ast.Module], name: str) -> int:
    """Classes of the package in the longest chain of bases of the class called ``name``."""
    bases: dict[str, list[str]] = {}
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                names = [ast.unparse(base) for base in node.bases]
                # A base with the class's own name is the library's class of that name.
                bases[node.name] = [base for base in names if "." not in base and base != node.name]

    def depth(current: str) -> int:
        return 1 + max((depth(base) for base in bases[current] if base in bases), default=0)

    return depth(name) if name in bases else 0


def methods(trees: dict[str, ast.Module], name: str) -> int:
    """Methods and properties in the body of the class called ``name``, ``__init__`` apart."""
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and node.name == name:
                found = [item.name for item in node.body if isinstance(item, Function)]
                return len(set(found) - {"__init__"})
    return 0


def importers(trees: dict[str, ast.Module], package: str) -> Counter[str]:
    """Module of the package -> number of its other files that import it or a name of it."""
    found: Counter[str] = Counter()
    for module, tree in trees.items():
        wanted: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                wanted.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                wanted.add(node.module)
                wanted.update(f"{node.module}.{alias.name}" for alias in node.names)
        names = {name.removeprefix(f"{package}.") for name in wanted}
        found.update(name for name in names if name in trees and name != module)
    return found


def figures(folder: Path) -> dict[str, str]:
    """Name of a figure -> its value for the package in ``folder``."""
    sources = {
        ".".join(path.relative_to(folder).with_suffix("").parts): path.read_text(encoding="utf-8")
        for path in sorted(folder.rglob("*.py"))
    }
    assert sources, f"{folder} holds no Python file"
    trees = {module: ast.parse(source) for module, source in sources.items()}
    functions = [
        node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, Function)
    ]
    lengths = [function_lines(function) for function in functions]
    uses: Counter[str] = Counter()
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Name):
                uses[node.id] += 1
            elif isinstance(node, ast.Attribute):
                uses[node.attr] += 1
    private = [f.name for f in functions if f.name.startswith("_") and not f.name.endswith("__")]
    longest = max(sources, key=lambda module: sources[module].count("\n"))
    by_importers = importers(trees, folder.name)
    modules = [module for module in trees if not module.endswith(("__init__", "__main__"))]
    code = sum(code_lines(source, trees[module]) for module, source in sources.items())
    return {
        "files": f"{len(sources):,}",
        "lines": f"{sum(source.count(chr(10)) for source in sources.values()):,}",
        "code lines (no blank line, comment, docstring)": f"{code:,}",
        "longest file": f"{sources[longest].count(chr(10)):,} ({longest})",
        "functions": f"{len(functions):,}",
        "lines of a function, mean": f"{statistics.mean(lengths):.1f}",
        "lines of a function, median": f"{statistics.median(lengths):g}",
        f"functions of at most {SHORT} lines": f"{sum(length <= SHORT for length in lengths):,}",
        "private functions named once": f"{sum(uses[name] == 1 for name in private):,}",
        "files with a single importer": f"{sum(by_importers[module] == 1 for module in modules):,}",
        "own classes in Seq2SeqTrainer's chain": str(own_classes(trees, "Seq2SeqTrainer")),
        "methods and properties of Backend": str(methods(trees, "Backend")),
    }


def main(folders: list[Path]) -> None:
    """Print a table with a column for each folder."""
    columns = [figures(folder) for folder in folders]
    print("| | " + " | ".join(str(folder) for folder in folders) + " |")
    print("|---|" + "---:|" * len(folders))
    for name in columns[0]:
        print(f"| {name} | " + " | ".join(column[name] for column in columns) + " |")


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]] or [Path("s2s_scale")])
