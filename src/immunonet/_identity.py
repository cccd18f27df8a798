"""What a result depends on, read from the things themselves: a defence, a network, an attack, a function."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import sys
from collections.abc import Mapping
from types import CodeType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from immunonet import _store

# Objects within objects that are looked into; lists, sets and tables do not count.
_DEPTH = 6


def identity(*things: Any) -> str:
    """Return a digest of things and of all that can be read of what they do: it changes where their answers may.

    Networks count by their weights, settings and the code of their classes, functions by their code and what it uses,
    tensors and arrays by their values, other objects by their attributes; what says itself by an `identity()` by that.
    What lies outside the process, such as a file that is read when it is asked, is not seen.
    """
    found = hashlib.sha256()
    for part in _parts(things, _DEPTH, ()):
        found.update(part)
    return found.hexdigest()


def _parts(thing: Any, depth: int, above: tuple[int, ...]) -> list[bytes]:
    """Return the pieces that tell a thing from others; what contains itself is not followed."""
    if thing is None or isinstance(thing, bool | int | float | complex | str | bytes | type(...)):
        return [f"{type(thing).__name__} {thing!r};".encode()]
    if isinstance(thing, Tensor):
        return [f"tensor {thing.dtype} {tuple(thing.shape)} {_store.digest([thing])};".encode()]
    if isinstance(thing, np.ndarray | np.generic):
        array = np.asarray(thing)
        return [f"array {array.dtype} {array.shape};".encode(), array.tobytes()]
    name = f"{type(thing).__module__}.{type(thing).__qualname__}".encode()
    if depth < 0 or id(thing) in above or isinstance(thing, ModuleType):
        return [name]
    within = functools.partial(_all, depth=depth, above=(*above, id(thing)))
    if isinstance(thing, list | tuple):
        return [f"{len(thing)}(".encode(), *within(thing), b")"]
    if isinstance(thing, set | frozenset):
        return [b"{", *sorted(b"".join(within([part])) for part in thing), b"}"]
    if isinstance(thing, Mapping):
        return [f"{len(thing)}{{".encode(), *within(list(thing.items())), b"}"]
    inside = functools.partial(_all, depth=depth - 1, above=(*above, id(thing)))
    if isinstance(thing, torch.dtype | torch.device | torch.Size | CodeType):
        return _code(thing) if isinstance(thing, CodeType) else [repr(thing).encode()]
    if isinstance(thing, type):
        return [f"class {thing.__module__}.{thing.__qualname__};".encode(), *_methods(thing)]
    if isinstance(thing, functools.partial):
        return [b"partial", *inside([thing.func, thing.args, thing.keywords])]
    if inspect.isroutine(thing):
        return [b"function", *_function(thing, inside)]
    if callable(told := getattr(thing, "identity", None)) and not isinstance(thing, type):
        return [name, *inside([told()])]
    if dataclasses.is_dataclass(thing):
        return [name, *inside([(f.name, getattr(thing, f.name)) for f in dataclasses.fields(thing)])]
    if isinstance(thing, nn.Module):
        return [name, *_methods(type(thing)), *inside(_module(thing))]
    return [name, *_methods(type(thing)), *inside(sorted(getattr(thing, "__dict__", {}).items()))]


def _all(things: Any, depth: int, above: tuple[int, ...]) -> list[bytes]:
    return [part for thing in things for part in _parts(thing, depth, above)]


def _module(module: nn.Module) -> list[Any]:
    """Return a module's parameters and buffers, kept or not, its submodules, its hooks, and its other attributes."""
    tensors = [*module._parameters.items(), *module._buffers.items()]
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    # The mode is ours to set; torch's own bookkeeping begins with an underscore.
    own = {k: v for k, v in vars(module).items() if k not in _TORCH and k != "training"}
    return [*tensors, *module._modules.items(), hooks, sorted(own.items(), key=lambda item: item[0])]


_TORCH = frozenset(vars(nn.Module()))


def _methods(kind: type) -> list[bytes]:
    """Return the code of a class and those it is made from, less those of torch and of Python itself."""
    found = []
    for part in kind.__mro__:
        if _foreign(part.__module__):
            continue
        for name, value in sorted(vars(part).items()):
            function = getattr(value, "__func__", value)
            if (code := getattr(function, "__code__", None)) is not None:
                found += [name.encode(), *_code(code)]
            elif isinstance(value, bool | int | float | str):
                found.append(f"{name}={value!r};".encode() if name not in ("__module__", "__doc__") else b"")
    return found


def _function(function: Any, inside: Any) -> list[bytes]:
    """Return the code of a function, its defaults, and what its closure and the globals it names hold."""
    function = inspect.unwrap(function)
    if _foreign(getattr(function, "__module__", None)):
        return [
            f"{function.__module__}.{function.__qualname__}".encode(),
            *inside([getattr(function, "__self__", None)]),
        ]
    if (code := getattr(function, "__code__", None)) is None:
        return [repr(getattr(function, "__qualname__", "")).encode(), *inside([getattr(function, "__self__", None)])]
    cells = [cell.cell_contents for cell in function.__closure__ or () if _filled(cell)]
    known = function.__globals__
    used = [(name, known[name]) for name in code.co_names if name in known and not isinstance(known[name], type)]
    held = [getattr(function, "__self__", None), function.__defaults__, function.__kwdefaults__, cells, used]
    return [*_code(code), *inside(held)]


_FOREIGN = sys.stdlib_module_names | {"torch", "numpy", "builtins"}


def _foreign(module: str | None) -> bool:
    """Return whether code is torch's, NumPy's or Python's own, and told by its name."""
    return (module or "builtins").partition(".")[0] in _FOREIGN


def _code(code: CodeType) -> list[bytes]:
    inner = [part for const in code.co_consts if isinstance(const, CodeType) for part in _code(const)]
    plain = [const for const in code.co_consts if not isinstance(const, CodeType)]
    return [code.co_code, repr(code.co_names).encode(), repr(plain).encode(), *inner]


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False
