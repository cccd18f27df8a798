"""The shape of the package, read from its code: what imports what, who knows which defence, how much is asked for."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

import immunonet
from immunonet.defences.base import REGISTRY

PACKAGE = Path(immunonet.__file__).parent


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# Not where the module is imported, which every worker does.
@functools.cache
def trees() -> dict[str, ast.Module]:
    return {name_of(path): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


# Imports.


def named(tree: ast.AST) -> Iterator[str]:
    """Yield the modules of the package that a module's code imports, at its top or inside a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in trees())
        elif isinstance(node, ast.ImportFrom) and node.module in trees():
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            # Of a package, what is imported may be one of its modules, or what it took from them.
            yield from (one if one in trees() else node.module for one in inner)


@functools.cache
def graph_of_imports() -> dict[str, set[str]]:
    return {module: set(named(tree)) - {module} for module, tree in trees().items()}


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Return the strongly connected components of more than one module."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        left = [start]
        while left:
            for following in graph[left.pop()] - seen:
                seen.add(following)
                left.append(following)
        reached[start] = seen
    found = [{b for b in graph if b in reached[a] and a in reached[b]} for a in graph if a in reached[a]]
    return [one for i, one in enumerate(found) if one not in found[:i]]


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [{"b", "c"}]
    assert circles({"a": {"b"}, "b": set()}) == []


def test_imports_go_round_in_no_circle() -> None:
    assert circles(graph_of_imports()) == []


def test_relative_imports_are_not_used() -> None:
    assert not [m for m, tree in trees().items() for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level]


def reachable(*starts: str) -> set[str]:
    """Return the modules that modules import, and those import, and so on, themselves among them."""
    seen, left = set(starts), list(starts)
    while left:
        following = graph_of_imports()[left.pop()] - seen
        seen |= following
        left += following
    return seen


def test_reports_know_nothing_of_evaluations() -> None:
    reports = [module for module in trees() if module.startswith("immunonet.report")]
    assert reports
    assert not [m for m in reachable(*reports) if m.startswith("immunonet.evaluation")]


@pytest.mark.parametrize("layer", ["features", "immune", "memory", "attacks", "defences"])
def test_what_is_measured_knows_nothing_of_those_who_measure(layer: str) -> None:
    own = [module for module in trees() if module.startswith(f"immunonet.{layer}")]
    assert not [m for m in reachable(*own) if m.split(".")[1] in ("evaluation", "studies", "cli", "report")]


# Who knows which defence.

CLASSES = {kind.__name__ for kind in REGISTRY.values()}
KINDS = set(REGISTRY)


def dispatches(tree: ast.AST) -> Iterator[str]:
    """Yield where code asks whether something is a defence of one kind, or compares the name of a kind."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            if {leaf.split(".")[-1] for leaf in leaves(node.args[1])} & CLASSES:
                yield ast.unparse(node)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "startswith":
            if strings(node.args) & KINDS:
                yield ast.unparse(node)
        elif isinstance(node, ast.Compare):
            if strings([node.left, *node.comparators]) & KINDS:
                yield ast.unparse(node)
        elif isinstance(node, ast.Match):
            for case in node.cases:
                patterns = list(ast.walk(case.pattern))
                classes = {ast.unparse(p.cls).split(".")[-1] for p in patterns if isinstance(p, ast.MatchClass)}
                values = strings([p.value for p in patterns if isinstance(p, ast.MatchValue)])
                if classes & CLASSES or values & KINDS:
                    yield f"case {ast.unparse(case.pattern)}"


def leaves(node: ast.AST) -> list[str]:
    """Return the classes named by `A`, `a.A`, `A | B` or `(A, B)`."""
    if isinstance(node, ast.Tuple):
        return [leaf for element in node.elts for leaf in leaves(element)]
    if isinstance(node, ast.BinOp):
        return leaves(node.left) + leaves(node.right)
    return [ast.unparse(node)]


def strings(nodes: list[ast.expr]) -> set[str]:
    """Return the strings written there, also in tuples, lists and sets; "rails-paper" and "rails " count as "rails"."""
    found = set()
    for node in nodes:
        parts = node.elts if isinstance(node, ast.Tuple | ast.List | ast.Set) else [node]
        written = [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
        found |= {word for text in written for word in (text, text.replace("-", " ").split(" ")[0])}
    return found


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("isinstance(d, RAILS | DkNN)", 1),
        ("isinstance(d, (base.Undefended, Defence))", 1),
        ("isinstance(d, Defence)", 0),
        ("kind == 'rails' or 'dknn' != kind or kind in ('cnn', 'x')", 3),
        ("name.startswith('rails-')", 1),
        ("x == 'a rail'", 0),
        ("match d:\n case RAILS(): 1\n case 'dknn' | 'x': 2\n case Other(): 3", 2),
    ],
)
def test_dispatches_are_found(code: str, count: int) -> None:
    assert len(list(dispatches(ast.parse(code)))) == count


def test_hardly_anything_outside_of_defences_knows_one_kind_from_another() -> None:
    found = [
        f"{module}: {where}"
        for module, tree in trees().items()
        if not module.startswith("immunonet.defences")
        for where in dispatches(tree)
    ]
    assert len(found) <= 3, "\n".join(found)


# How much is asked for.


def functions(module: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in ast.walk(trees()[module]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{module}.{node.name}", node


def test_functions_of_an_evaluation_take_few_arguments() -> None:
    most = 6
    found = {}
    for module in (m for m in trees() if m.startswith("immunonet.evaluation")):
        for name, node in functions(module):
            taken = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            count = len([arg for arg in taken if arg not in ("self", "cls")])
            if count > most:
                found[name] = count
    assert found.keys() == {"immunonet.evaluation.protocol.evaluate"}, found
