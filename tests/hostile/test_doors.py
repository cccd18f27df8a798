"""What only one module may do: ask models, watch them, set their modes, copy them."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import immunonet

PACKAGE = Path(immunonet.__file__).parent

# What models that somebody else wrote are called by.
MODELS = {
    "model", "net", "network", "base", "defence", "target", "surrogate", "backward", "backward_model", "_function",
    "function", "layer", "victim", "classifier", "module", "core",
}  # fmt: skip
ALLOWED = {
    "normalised.py: self.model": "a module of the user's network itself: whoever asks it came through the door",
    "features/affine.py: function": "a FeatureMap, which asks through the door",
    "zoo/training.py: net": "training, whose network is in train mode and is changed",
    "paths/statistics.py: net": "a copy of this package's own, whose batch statistics are computed",
}


# Not where the module is imported, which every worker does.
@functools.cache
def trees() -> dict[str, ast.Module]:
    return {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


@functools.cache
def calls(tree: ast.AST) -> tuple[ast.Call, ...]:
    return tuple(node for node in ast.walk(tree) if isinstance(node, ast.Call))


def last(node: ast.AST) -> str | None:
    """Return the last name of `a.b.c` or `a`."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else None


def test_models_are_called_in_one_place() -> None:
    found = {
        f"{file}: {ast.unparse(call.func)}"
        for file, tree in trees().items()
        for call in calls(tree)
        if (name := last(call.func)) in MODELS and (isinstance(call.func, ast.Name) or bound(call.func))
        if file != "models.py" and name is not None and not defined(tree, call.func)
    }
    assert found == set(ALLOWED)


def bound(function: ast.AST) -> bool:
    """Return whether it is an attribute of `self` or of a problem: others are methods, such as torch's."""
    holders = {"self", "problem", "scene", "subject", "lab"}
    return isinstance(function, ast.Attribute) and last(function.value) in holders


def defined(tree: ast.AST, function: ast.AST) -> bool:
    """Return whether the module has a function or class of this name itself, or imports it."""
    return isinstance(function, ast.Name) and function.id in names(tree)


@functools.cache
def names(tree: ast.AST) -> set[str]:
    """Return the names of a module's functions and classes, and of what it imports."""
    own = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    return own | {a.asname or a.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}


def places(*attributes: str) -> dict[str, set[str]]:
    """Return the files in which methods of these names are called, and of what."""
    found: dict[str, set[str]] = {}
    for file, tree in trees().items():
        for call in calls(tree):
            if isinstance(call.func, ast.Attribute) and call.func.attr in attributes:
                found.setdefault(file, set()).add(ast.unparse(call.func.value))
    return found


def test_hooks_are_set_in_one_place() -> None:
    hooks = [
        "register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
        "register_module_forward_hook", "register_module_forward_pre_hook", "register_hook",
    ]  # fmt: skip
    # Statistics are computed in copies of this package's own.
    assert set(places(*hooks)) == {"models.py", "paths/statistics.py"}


def test_modes_are_set_in_one_place() -> None:
    assert places("eval") == {
        "models.py": {"network"},
        # Networks of this package, as they are built, trained or read.
        "zoo/networks.py": {"_NETWORKS[name](classes)"},
        "learning.py": {"task.module"},
        "control/autoencoders.py": {"made.to(mean.device)"},
        "cli/common.py": {"net"},
        "cli/networks.py": {"net"},
        # Copies of what was given.
        "defences/path.py": {"copy.deepcopy(net).requires_grad_(False)"},
        "paths/statistics.py": {"net"},
    }
    # `zoo.train` trains a network.
    assert {file: found - {"zoo"} for file, found in places("train").items() if found != {"zoo"}} == {
        "zoo/training.py": {"self.module"},
        "control/autoencoders.py": {"self.module"},
        "defences/path.py": {"net"},
        "paths/statistics.py": {"layer"},
    }
    setting = {
        file
        for file, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Attribute) and target.attr == "training"
    }
    assert setting == {"models.py"}


def test_models_are_not_copied() -> None:
    # Shallow copies of modules share what looks like their own.
    assert "copy" not in {of for found in places("copy").values() for of in found}
    # Settings of a caller; networks of a path, which are only joined if they are whole modules of one architecture; a
    # network that autoencoders are trained through: one that is no whole module cannot be, as with any training.
    assert places("deepcopy") == {
        "evaluation/protocol.py": {"copy"}, "defences/path.py": {"copy"}, "control/autoencoders.py": {"copy"},
    }  # fmt: skip


def test_what_is_beside_the_door() -> None:
    assert places("forward", "__call__", "_call_impl") == {}
    asked = {file: of for file, of in places("predict").items() if not file.startswith(("cli/", "studies/"))}
    # A defence's own labels, in eval mode; what it asks comes through the door.
    assert asked == {"evaluation/lab.py": {"defence"}, "defences/base.py": {"self", "self.with_settings(**variant)"}}
