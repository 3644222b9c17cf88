"""The size and density of the code: files, lines, functions, long lines, private reach.

    python benchmarks/house.py

`private` counts attributes that begin with one underscore, of objects other than self. `dense`
counts conditional expressions, comprehensions and walruses in a thousand lines that are not empty.
"""

import ast
import subprocess
from pathlib import Path
from statistics import median

from report import ROOT, table

PARTS = {
    "library": "src/savepoint/*.py",
    "  checkpoint": "src/savepoint/checkpoint/*.py",
    "  commands": "src/savepoint/commands/*.py",
    "project": "src/project/*.py",
    "tests": "tests/*.py",
    "benchmarks": "benchmarks/*.py",
}
DENSE = (ast.IfExp, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.NamedExpr)


def tracked(pattern: str) -> list[Path]:
    listed = subprocess.check_output(["git", "ls-files", pattern], cwd=ROOT, text=True)
    return [ROOT / name for name in listed.splitlines()]


def measured(files: list[Path]) -> list[str]:
    lines = [line for file in files for line in file.read_text().splitlines()]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    functions = [
        node.end_lineno - node.lineno + 1
        for node in nodes
        if isinstance(node, ast.FunctionDef) and node.end_lineno
    ]
    functions.sort()
    private = [
        node
        for node in nodes
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and ast.unparse(node.value) not in ("self", "cls", "super()")
    ]
    dense = sum(isinstance(node, DENSE) for node in nodes)
    filled = sum(bool(line.strip()) for line in lines)
    long = sum(len(line) > 100 for line in lines)
    return [
        str(len(files)),
        f"{len(lines):,}",
        f"{median(functions):.0f} / {functions[len(functions) * 9 // 10]} / {functions[-1]}",
        f"{100 * long / len(lines):.1f} %",
        f"{len(private)}",
        f"{1000 * dense / filled:.0f}",
    ]


def main() -> None:
    header = ["part", "files", "lines", "function p50/p90/max", "over 100", "private", "dense"]
    print(table(header, [[name, *measured(tracked(pattern))] for name, pattern in PARTS.items()]))


if __name__ == "__main__":
    main()
