"""The one door to models: every call of a network, layer or defence that somebody else wrote goes through here.

Whoever asks gets a tensor on the inputs' device; the model gets inputs of its own to spoil, in its own dtype and on its
own device, runs in eval mode, and is left as it was found. What is watched inside it is watched in the asking thread
only, so that any number of threads may ask one model, and use it otherwise, at once.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Model = Callable[..., Any]

VARIES = "gives another answer each time it is asked"
DEPENDS = "gives answers that depend on what else is in the batch"

# How far answers to the same inputs may differ, as a share of the largest: sums in another order are not told apart.
_ROUNDING = {torch.float16: 0.05, torch.bfloat16: 0.05}
_PROBABILITIES = 1e-4


class Asking(nn.Module):
    """A module of this package that asks models itself: it takes float32 inputs, whatever its models' dtype."""

    @property
    def inside(self) -> nn.Module:
        """The network whose layers go by their bare names where this is asked: itself, or the one that it steers.

        Training examples and what is made of them pass through that network, without what is around it.
        """
        return self

    def met(self, x: Tensor) -> Tensor:
        """Return inputs `(B, *S)` as the network inside meets them."""
        return x


class _Reached(BaseException):
    """Ends a pass of a model when all that was wanted is there."""


class _Here(threading.local):
    """What this thread does with the outputs of modules: the action by the module's id; and whose inputs it counts."""

    def __init__(self) -> None:
        self.actions: dict[int, Callable[[Any], Any]] = {}
        self.counted: frozenset[int] = frozenset()


_here = _Here()
_lock = threading.RLock()
# Under the lock: how many calls use a module's hook, and how many have put a module into eval mode.
_hooks: dict[nn.Module, tuple[int, RemovableHandle]] = {}
_held: dict[nn.Module, int] = {}


def _unlocked() -> None:
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    # A thread that held it does not live on in the child.
    os.register_at_fork(after_in_child=_unlocked)


def ask(model: Model, x: Tensor, memory_format: torch.memory_format = torch.preserve_format, **keywords: Any) -> Tensor:
    """Return the tensor `(B, ...)` that `model` gives for inputs `x` `(B, *S)`, on their device; differentiable in x.

    `model`: a module or function. Of a dict or object with `logits` these are taken, of a tuple the first. TypeError
    for anything else. `keywords` are handed on.
    """
    found: Tensor = _kept(tensor_of(_called(model, x, memory_format, **keywords)))
    return found.to(x.device)


def call(model: Model, x: Tensor, memory_format: torch.memory_format = torch.preserve_format, **keywords: Any) -> Any:
    """Return whatever `model` gives for inputs `x` `(B, *S)`, of which it gets a copy, in eval mode."""
    return _kept(_called(model, x, memory_format, **keywords))


def _called(model: Model, x: Tensor, memory_format: torch.memory_format, **keywords: Any) -> Any:
    inside = eager(model) if isinstance(model, nn.Module) else None
    # Compiled code leaves hooks out.
    run = _uncompiled(inside) if inside is not None and id(inside) in _here.counted else model
    with evaluating(model), blamed(x):
        return run(own(model, x, memory_format), **keywords)


def _kept(output: Any) -> Any:
    """Return a tensor that no later call of the model overwrites, as those do that give the same memory every time."""
    return output.clone() if isinstance(output, Tensor) and not output.requires_grad else output


@contextlib.contextmanager
def blamed(x: Tensor, what: str = "the model") -> Iterator[None]:
    """Note on errors that come out of a model, or of what else of it, about which inputs it was asked."""
    try:
        yield
    except Exception as error:
        if not hasattr(error, "__notes__"):
            error.add_note(f"raised by {what}, asked about inputs of shape {tuple(x.shape)} and {x.dtype}")
        raise


def logits(model: Model, x: Tensor) -> Tensor:
    """Return a model's logits or log-probabilities `(B, C)`, float32 or float64, for inputs `x` `(B, *S)`.

    Raises TypeError or ValueError unless there is one row per input, C is 2 or more, and all are finite.
    """
    found = ask(model, x)
    if found.ndim != 2 or len(found) != len(x) or found.shape[1] < 2 or not found.is_floating_point():
        raise ValueError(
            f"model must return logits ({len(x)}, C), floating and C of 2 or more, for {len(x)} inputs, "
            f"got {tuple(found.shape)} of {found.dtype}"
        )
    if not bool(torch.isfinite(found).all()):
        raise ValueError(f"model must return finite logits, got {int((~torch.isfinite(found)).sum())} NaN or infinite")
    return found if found.dtype == torch.float64 else found.float()


def own(model: Model, x: Tensor, memory_format: torch.memory_format = torch.preserve_format) -> Tensor:
    """Return a copy of inputs `x`, for a model that may change them: on its device, in the dtype of its parameters."""
    dtype, device = x.dtype, x.device
    if isinstance(model, nn.Module):
        device = next((t.device for t in itertools.chain(model.parameters(), model.buffers())), device)
        if not isinstance(model, Asking):
            dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), dtype)
    # Images that were transposed stay so in a plain copy, and a network that reshapes by view refuses them.
    format_ = torch.contiguous_format if memory_format == torch.preserve_format else memory_format
    return x.to(device, dtype, copy=True, memory_format=format_)


def tensor_of(output: Any, name: str = "model") -> Tensor:
    """Return the tensor in what a model gave: itself, the `logits` of a dict or object, or the first of a tuple."""
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    elif not isinstance(output, Tensor) and hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise TypeError(
            f"{name} must return a tensor of logits or log-probabilities (B, C), a dict or object with `logits`, or a "
            f"tuple that begins with them, got {type(output).__name__}"
        )
    return output


def takes_seed(function: object) -> bool:
    """Return whether a model or method takes a keyword `seed`."""
    call: Any = function.forward if isinstance(function, nn.Module) else function
    try:
        return "seed" in inspect.signature(call).parameters
    except (TypeError, ValueError):  # builtins have none
        return False


# --- Modes


@contextlib.contextmanager
def evaluating(*models: Model) -> Iterator[None]:
    """Put models, and networks that functions use, in eval mode; leave every training flag as it was found.

    Calls may overlap in several threads: the last one puts the flags back.
    """
    mine: list[nn.Module] = []
    with _lock:
        for network in [network for model in models for network in networks_of(model)]:
            inside = list(network.modules())
            changed = [m for m in inside if m.training]
            if changed:
                # The mode of an exported network is in its graph.
                with contextlib.suppress(NotImplementedError):
                    network.eval()
            for m in inside if changed or _held else ():
                if m in _held or m in changed:
                    _held[m] = _held.get(m, 0) + 1
                    mine.append(m)
    try:
        yield
    finally:
        with _lock:
            for m in mine:
                _held[m] -= 1
                if not _held[m]:
                    del _held[m]
                    m.training = True


def networks_of(model: Model, depth: int = 2) -> list[nn.Module]:
    """Return the module itself, or those that a function, partial or object holds, directly or in what it calls."""
    if isinstance(model, nn.Module):
        return [model]
    if depth < 0 or isinstance(model, type | ModuleType | Tensor):
        return []
    if isinstance(model, functools.partial):
        held = [model.func, *model.args, *model.keywords.values()]
    elif inspect.isroutine(model):
        function: Any = inspect.unwrap(model)
        held = [getattr(function, "__self__", None), *(getattr(function, "__defaults__", None) or ())]
        for cell in getattr(function, "__closure__", None) or ():
            with contextlib.suppress(ValueError):  # not filled yet
                held.append(cell.cell_contents)
        if (code := getattr(function, "__code__", None)) is not None:
            held += [function.__globals__[name] for name in code.co_names if name in function.__globals__]
    else:
        held = list(getattr(model, "__dict__", {}).values())
    found = [
        m for value in held if callable(value) or hasattr(value, "__dict__") for m in networks_of(value, depth - 1)
    ]
    return list(dict.fromkeys(found))


# --- Watching


def eager(model: nn.Module) -> nn.Module:
    """Return the module inside torch.compile or DataParallel, whose submodules have their bare names."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def inside(model: nn.Module) -> nn.Module:
    """Return the network that a model is, or that it steers: whose submodules the names of layers mean."""
    core = eager(model)
    return core if not isinstance(core, Asking) or core.inside is core else inside(core.inside)


def met(model: nn.Module, x: Tensor) -> Tensor:
    """Return inputs `(B, *S)` as the network inside a model meets them."""
    core = eager(model)
    return core.met(x) if isinstance(core, Asking) else x


def check_watchable(model: nn.Module) -> None:
    """Raise ValueError for a scripted, traced or exported model, inside which nothing can be watched."""
    network = inside(model)
    if isinstance(network, torch.jit.ScriptModule) or type(network).__name__ == "GraphModule":
        raise ValueError(
            f"model is a {type(network).__name__} (scripted, traced or exported), whose layers cannot be watched: "
            "give the eager module it was made from, or use 'input' or a callable as layer"
        )


@contextlib.contextmanager
def watching(actions: Mapping[nn.Module, Callable[[Any], Any]]) -> Iterator[None]:
    """Call `actions[module](output)` after every call of a module in this thread; what it returns replaces the output.

    None leaves it. Where a module is watched already, who watches from outside sees what this one makes of it.
    """
    before = _here.actions
    with _lock:
        for module in actions:
            users, handle = _hooks.get(module) or (0, module.register_forward_hook(_act))
            _hooks[module] = users + 1, handle
    mine = {id(module): action for module, action in actions.items()}
    _here.actions = before | {key: _then(action, before.get(key)) for key, action in mine.items()}
    try:
        yield
    finally:
        _here.actions = before
        with _lock:
            for module in actions:
                users, handle = _hooks.pop(module)
                if users > 1:
                    _hooks[module] = users - 1, handle
                else:
                    handle.remove()


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Hide calls of modules in this thread from all that watch them."""
    before, _here.actions = _here.actions, {}
    try:
        yield
    finally:
        _here.actions = before


def _then(first: Callable[[Any], Any], second: Callable[[Any], Any] | None) -> Callable[[Any], Any]:
    if second is None:
        return first

    def both(output: Any) -> Any:
        replaced = first(output)
        seen = output if replaced is None else replaced
        again = second(seen)
        return replaced if again is None else again

    return both


def _act(module: nn.Module, _args: Any, output: Any) -> Any:
    action = _here.actions.get(id(module))
    return None if action is None else action(output)


def outputs(
    model: nn.Module,
    names: Sequence[str],
    x: Tensor,
    *,
    given: tuple[str, Tensor] | None = None,
    memory_format: torch.memory_format = torch.preserve_format,
) -> list[Any]:
    """Return what the submodules `names` give for inputs `x` `(B, *S)`, in one pass that ends with the last of them.

    `given`: a submodule and what stands in for its output. ValueError for one that is never called.
    """
    check_watchable(model)
    core, network = eager(model), inside(model)
    modules = [network.get_submodule(name) for name in names]
    found: dict[nn.Module, Any] = {}

    def keep(module: nn.Module, output: Any) -> None:
        # What comes after, or a later call, may change it in place.
        found.setdefault(module, output.clone() if isinstance(output, Tensor) else output)
        if len(found) == len(set(modules)):
            raise _Reached

    actions: dict[nn.Module, Callable[[Any], Any]] = {m: functools.partial(keep, m) for m in modules}
    if given is not None:
        actions[network.get_submodule(given[0])] = lambda _: given[1]
    with evaluating(core), watching(actions), contextlib.suppress(_Reached), blamed(x):
        _uncompiled(core)(own(core, x, memory_format))
    for name, module in zip(names, modules, strict=True):
        if module not in found:
            raise ValueError(f"layer {name!r} is never called by the model")
    return [found[module] for module in modules]


def calls(model: nn.Module, name: str, x: Tensor) -> int:
    """Return how often the submodule `name` is called in one pass for inputs `x` `(B, *S)`."""
    core, count = eager(model), 0

    def called(_: Any) -> None:
        nonlocal count
        count += 1

    with evaluating(core), watching({inside(core).get_submodule(name): called}), blamed(x):
        _uncompiled(core)(own(core, x))
    return count


def steered(model: nn.Module, actions: Mapping[str, Callable[[Tensor], Tensor]], x: Tensor) -> Tensor:
    """Return the tensor that a model gives for inputs `x` `(B, *S)`, outputs of submodules replaced by `actions`.

    Differentiable in `x`, and in what the actions add.
    """
    check_watchable(model)
    core = eager(model)
    within = {core.get_submodule(name): action for name, action in actions.items()}
    with evaluating(core), watching(within), blamed(x):
        return _kept(tensor_of(_uncompiled(core)(own(core, x)))).to(x.device)  # type: ignore[no-any-return]


@contextlib.contextmanager
def counted(model: nn.Module) -> Iterator[Callable[[], int]]:
    """Count the inputs that enter a model in this thread, wherever a pass ends; what is given returns their number."""
    core, thread, entered = eager(model), threading.get_ident(), 0

    def count(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        nonlocal entered
        if threading.get_ident() == thread:
            entered += next((len(v) for v in (*arguments, *keywords.values()) if isinstance(v, Tensor)), 0)

    before = _here.counted
    with _lock:
        handle = core.register_forward_pre_hook(count, with_kwargs=True)
    _here.counted = before | {id(core)}
    try:
        yield lambda: entered
    finally:
        _here.counted = before
        with _lock:
            handle.remove()


def _uncompiled(model: nn.Module) -> Callable[[Tensor], Any]:
    # `model.compile()` leaves hooks out.
    compiled = getattr(model, "_compiled_call_impl", None) is not None
    return model._call_impl if compiled else model


# --- What a model does that its user may not know


def unsteady(function: Callable[[Tensor], Tensor], x: Tensor, first: Tensor | None = None) -> str | None:
    """Return `VARIES` or `DEPENDS` where answers to inputs `x` `(B, *S)` change that should not; None where none do.

    The same rows are asked together, twice, or once more after their `first` answers, and two of them alone.
    """
    with torch.no_grad():
        first = function(x) if first is None else first
        if not _same(first, function(x)):
            return VARIES
        try:
            alone = torch.cat([function(row) for row in x[:2].split(1)])
        except Exception:  # such as normalisation over the batch, which one input has none of
            return DEPENDS
    return None if _same(first[:2], alone) else DEPENDS


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not a.numel():
        return a.shape == b.shape
    share = _ROUNDING.get(a.dtype, 1e-3)
    a, b = a.double().nan_to_num(), b.double().nan_to_num()
    return bool(((a - b).abs() <= share * a.abs().max() + 1e-6).all())


def are_probabilities(found: Tensor) -> bool:
    """Return whether rows `(B, C)` look like probabilities: none is negative, and each sums to 1."""
    sums = found.double().sum(1)
    return bool((found >= 0).all()) and bool(((sums - 1).abs() <= _PROBABILITIES).all())


def warn_of_probabilities(found: Tensor) -> None:
    """Warn if what a model returned `(B, C)` are probabilities instead of logits."""
    if len(found) and are_probabilities(found):
        warnings.warn(
            "model returns probabilities (rows that are at least 0 and sum to 1), not logits: where it is sure their "
            "gradient is 0, so that attacks are weak, and their softmax is nearly even; return the logits, without the "
            "last softmax",
            UserWarning,
            stacklevel=4,
        )
