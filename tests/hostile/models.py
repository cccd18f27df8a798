"""Thirty-odd models that do what models should not, each with a plain one that it must answer like, or its error."""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from immunonet import Normalised

ATTACKS = ("fgsm", "pgd", "apgd ce", "apgd dlr", "square", "hopskipjump")
GRADIENT = ("fgsm", "pgd", "apgd ce", "apgd dlr")
SOFT = ("soft neighbours",)
DEFENCES = ("dknn", "rails", "rails in a space")
LAYERS = (*DEFENCES, *SOFT)
ACTIONS = (*DEFENCES, *ATTACKS, *SOFT)
# A subset is evaluated: each takes about ten attacks.
EVALUATED = "evaluate"


class Plain(nn.Module):
    """Inputs `(B, 1, 6, 6)` to 3 logits: what the others answer like."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.act1 = nn.Conv2d(1, 4, 3, padding=1), nn.ReLU()
        self.conv2, self.act2 = nn.Conv2d(4, 4, 3, padding=1), nn.Tanh()
        self.pool, self.fc = nn.MaxPool2d(2), nn.Linear(36, 3)

    def body(self, x: Tensor) -> Tensor:
        found: Tensor = self.act2(self.conv2(self.act1(self.conv1(x))))
        return found

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.fc(self.pool(self.body(x)).flatten(1))
        return found


@functools.cache
def trained() -> Plain:
    """Return a network that knows the images of these tests."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        net = Plain().float()
    x, y = images(60, seed=2)
    optimiser = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(40):
        optimiser.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimiser.step()
    optimiser.zero_grad()
    return net


def plain() -> Plain:
    return copy.deepcopy(trained())


def images(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return noisy copies `(n, 1, 6, 6)` of one random pattern per class, in [0, 1], and their 3 labels."""
    y = torch.arange(n) % 3
    patterns = torch.rand(3, 1, 6, 6, generator=torch.Generator().manual_seed(99), dtype=torch.float32)
    noise = torch.rand(n, 1, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    return 0.3 * patterns[y] + 0.7 * noise, y


class Around(nn.Module):
    """A plain network and what is done before and after it."""

    def __init__(
        self,
        net: nn.Module,
        before: Callable[[Tensor], Tensor] = lambda x: x,
        after: Callable[[Tensor], Any] = lambda found: found,
    ) -> None:
        super().__init__()
        self.net, self.before, self.after = net, before, after

    def forward(self, x: Tensor) -> Any:
        return self.after(self.net(self.before(x)))


class Named(nn.Module):
    """The layers of a plain network in an order of one's own: `act1` and `act2` keep their names."""

    def __init__(self, net: Plain) -> None:
        super().__init__()
        for name, module in net.named_children():
            self.add_module(name, module)


# --- What they do wrong


class Counts(Around):
    """Answers a little otherwise every time."""

    calls = 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return self.net(x + 0.05 * self.calls)


class Remembers(Around):
    """Mixes each batch with the last one of the same size."""

    last: Tensor | None = None

    def forward(self, x: Tensor) -> Any:
        last, self.last = self.last, x.detach()
        return self.net(x if last is None or last.shape != x.shape else (x + last) / 2)


class Overwrites(nn.Module):
    """Gives the same memory every time, and answers at random."""

    def __init__(self, net: nn.Module, noise: float) -> None:
        super().__init__()
        self.net, self.noise = net, noise
        self.same: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        found = self.net(x)
        out = self.same.setdefault(len(x), torch.zeros_like(found).detach())
        out.detach().copy_(found.detach() + self.noise * torch.randn_like(found))
        return out


class DropsAlways(Named):
    def forward(self, x: Tensor) -> Tensor:
        found = self.act2(self.conv2(F.dropout(self.act1(self.conv1(x)), 0.5, training=True)))
        return self.fc(self.pool(found).flatten(1))


class Checkpointed(Named):
    def __init__(self, net: Plain, use_reentrant: bool) -> None:
        super().__init__(net)
        self.use_reentrant = use_reentrant

    def first(self, x: Tensor) -> Tensor:
        return self.act1(self.conv1(x))

    def forward(self, x: Tensor) -> Tensor:
        found = checkpoint(self.first, x, use_reentrant=self.use_reentrant)
        return self.fc(self.pool(self.act2(self.conv2(found))).flatten(1))


class CheckpointedBody(Plain):
    use_reentrant = False

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = checkpoint(self.body, x, use_reentrant=self.use_reentrant)
        return self.fc(self.pool(found).flatten(1))


class CheckpointedReentrantBody(CheckpointedBody):
    use_reentrant = True


class Mixed(Named):
    """A body in one dtype, a head in another."""

    def __init__(self, net: Plain, body: torch.dtype, head: torch.dtype) -> None:
        super().__init__(net)
        self.to(body)
        self.head_dtype = head
        self.fc.to(head)

    def forward(self, x: Tensor) -> Tensor:
        found = self.act2(self.conv2(self.act1(self.conv1(x))))
        return self.fc(self.pool(found).flatten(1).to(self.head_dtype))


class Casts(Named):
    """The weights of a network in float32, and every step computed in the dtype of its own weights."""

    def __init__(self, net: Any) -> None:
        super().__init__(net)
        self.dtypes = {name: getattr(net, name).weight.dtype for name in ("conv1", "conv2", "fc")}
        self.float()

    def step(self, name: str, x: Tensor) -> Tensor:
        dtype, module = self.dtypes[name], getattr(self, name)
        inputs = (x.to(dtype), module.weight.to(dtype), module.bias.to(dtype))
        return F.linear(*inputs) if name == "fc" else F.conv2d(*inputs, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        found = self.act2(self.step("conv2", self.act1(self.step("conv1", x))))
        return self.step("fc", self.pool(found).flatten(1))


class TwiceCalled(Named):
    """One module for both activations, and for two convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        found = self.act1(self.conv1(x))
        found = self.act2(self.conv2(self.conv2(found)))
        return self.fc(self.pool(found).flatten(1))


class SameParameter(Named):
    """Two modules that hold one parameter."""

    def __init__(self, net: Plain, *, tied: bool) -> None:
        super().__init__(net)
        self.again = nn.Conv2d(4, 4, 3, padding=1)
        if tied:
            self.again.weight, self.again.bias = self.conv2.weight, self.conv2.bias
        else:
            self.again.load_state_dict(self.conv2.state_dict())

    def forward(self, x: Tensor) -> Tensor:
        found = self.act2(self.again(self.conv2(self.act1(self.conv1(x)))))
        return self.fc(self.pool(found).flatten(1))


class Lazy(Named):
    """A last layer that takes its width from the first inputs it sees."""

    def __init__(self, net: Plain) -> None:
        super().__init__(net)
        self.fc = nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.act2(self.conv2(self.act1(self.conv1(x))))).flatten(1))


class Normed(Named):
    """Normalisation and dropout, which are other functions in train mode."""

    def __init__(self, net: Plain, *, tracked: bool = True) -> None:
        super().__init__(net)
        self.norm, self.drop = nn.BatchNorm2d(4, track_running_stats=tracked), nn.Dropout(0.5)
        if tracked:
            self.norm.running_mean = torch.tensor([0.1, -0.1, 0.2, 0.0])
            self.norm.running_var = torch.tensor([0.5, 1.5, 2.0, 1.0])

    def forward(self, x: Tensor) -> Tensor:
        found = self.act2(self.conv2(self.drop(self.act1(self.norm(self.conv1(x))))))
        return self.fc(self.pool(found).flatten(1))


class NormedByHand(Named):
    """What a normed network is in eval mode."""

    def __init__(self, net: Normed) -> None:
        super().__init__(net)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm
        found = F.batch_norm(self.conv1(x), n.running_mean, n.running_var, n.weight, n.bias, False, 0.0, n.eps)
        found = self.act2(self.conv2(self.act1(found)))
        return self.fc(self.pool(found).flatten(1))


class WithoutParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act1, self.act2 = nn.Identity(), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.act2(self.act1(x)).flatten(1).view(len(x), 3, 12).mean(2) * 20
        return found


class Views(Named):
    def forward(self, x: Tensor) -> Tensor:
        found = x.view(len(x), 36).view(len(x), 1, 6, 6)
        found = self.act2(self.conv2(self.act1(self.conv1(found))))
        return self.fc(self.pool(found).view(len(x), 36))


class Keywords(Around):
    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float = 1.0, labels: Any = None) -> Any:
        return self.net(x if mask is None else x * mask) * scale


class Unpicklable(Around):
    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.lock, self.generator = threading.Lock(), torch.Generator()

    def forward(self, x: Tensor) -> Any:
        with self.lock:
            return self.net(x)


class Batches(Around):
    """Takes batches of some sizes only."""

    def __init__(self, net: nn.Module, least: int, most: int) -> None:
        super().__init__(net)
        self.least, self.most = least, most

    def forward(self, x: Tensor) -> Any:
        if not self.least <= len(x) <= self.most:
            raise RuntimeError("this batch is of a size that I was not made for")
        return self.net(x)


class OwnDevice(Around):
    def forward(self, x: Tensor) -> Any:
        return self.net(x.to(next(self.parameters()).device))


class Losses(Around):
    """Gives losses in train mode, as detectors do."""

    def forward(self, x: Tensor) -> Any:
        return {"loss": x.mean()} if self.training else self.net(x)


class Quiet(Around):
    def __init__(self, net: nn.Module, mode: Callable[[], Any]) -> None:
        super().__init__(net)
        self.mode = mode

    def forward(self, x: Tensor) -> Any:
        with self.mode():
            return self.net(x)


@dataclass
class Output:
    """What Hugging Face's models give."""

    logits: Tensor
    hidden_states: Any = None


def timed(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def around(*arguments: Any, **keywords: Any) -> Any:
        return forward(*arguments, **keywords)

    return around


class Decorated(Around):
    @timed
    def forward(self, x: Tensor) -> Any:
        return self.net(x)


class Asked:
    """An object whose method is the model."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net

    def scores(self, x: Tensor) -> Any:
        return self.net(x)


def scaled(net: nn.Module, x: Tensor, scale: float = 1.0) -> Any:
    return net(x) * scale


def defaulted(net: Plain) -> Callable[..., Any]:
    inside = Normed(net)
    return lambda x, inside=inside: inside(x)


def closure(net: nn.Module) -> Callable[[Tensor], Any]:
    def model(x: Tensor) -> Any:
        return net(x)

    return model


def spoils(x: Tensor) -> Tensor:
    return x.mul_(0.5).add_(0.1)


def nan_for_a_class(found: Tensor) -> Tensor:
    return torch.where(found.argmax(1, keepdim=True) == 0, torch.nan, found)


def nan_where_high(found: Tensor) -> Tensor:
    return torch.where(found >= images_highest(), torch.nan, found)


@functools.cache
def images_highest() -> float:
    """Return the activation that one of the images has, and no other."""
    return float(plain().body(images(30)[0]).max().detach())


class Cleans(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.nan_to_num()


# --- How they are made


def changed(net: Plain, **modules: nn.Module) -> Plain:
    for name, module in modules.items():
        setattr(net, name, module)
    return net


def hooked(net: Plain) -> Plain:
    """A network with hooks of its user's, one of which replaces an output."""
    net.conv1.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 0.5,))
    net.act1.register_forward_hook(lambda _, inputs, output: output * 2)
    net.act2.register_forward_hook(lambda _, inputs, keywords, output: None, with_kwargs=True)
    net.fc.register_full_backward_hook(lambda *_: None)
    return net


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x.relu()


def unhooked(net: Plain) -> nn.Module:
    twin = plain()
    twin.act1 = Doubled()  # type: ignore[assignment]
    with torch.no_grad():
        twin.conv1.weight.mul_(0.5)
    return twin


def normed(net: Plain) -> Plain:
    parametrizations.weight_norm(net.conv2)
    parametrizations.spectral_norm(net.fc)
    return net.eval()


def unparametrized(net: Plain) -> Plain:
    twin = plain()
    twin.conv2.weight = nn.Parameter(net.conv2.weight.detach().clone())
    twin.fc.weight = nn.Parameter(net.fc.weight.detach().clone())
    return twin


def traced(net: Plain) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(net.eval(), torch.rand(2, 1, 6, 6))


def scripted(net: Plain) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(net)


def quantised(net: Plain) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(net.eval(), {nn.Linear})


def deep(net: Plain) -> nn.Sequential:
    many = [layer for _ in range(60) for layer in (nn.ReLU(), nn.Identity())]
    return nn.Sequential(net.conv1, *many, net.conv2, net.act2, net.pool, nn.Flatten(), net.fc)


def in_dict(net: Plain) -> nn.Module:
    """A network whose modules have names that look like something else."""
    found = nn.Sequential()
    for name, module in (("0:4", net.conv1), ("a b", net.act1), ("2", net.conv2), ("a:4", net.act2)):
        found.add_module(name, module)
    for name, module in (("pool", net.pool), ("flat", nn.Flatten()), ("fc", net.fc)):
        found.add_module(name, module)
    return found


def lazy(net: Plain, materialised: bool) -> Lazy:
    torch.manual_seed(0)
    found = Lazy(net)
    if materialised:
        found(torch.rand(2, 1, 6, 6))
    return found


def compiled_in_place(net: Plain) -> Plain:
    net.compile(backend="eager")
    return net


@contextlib.contextmanager
def doubles() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


# --- The table


@dataclass(frozen=True)
class Case:
    """A model made of a plain network, and the plain one that it must answer like.

    `twin`: makes that one of the model; None: the plain network itself. `layers`: where `act1` and `act2` are.
    `fails`, `warns`: what the error or warning of an action says; `may`: what it says if there is one. `actions`: those
    that are tried. `close`: how far features and adversarials may be apart, as a share of the largest. `around`: where
    all happens.
    """

    make: Callable[[Plain], Any]
    twin: Callable[[Any], Any] | None = None
    layers: tuple[str, str] = ("act1", "act2")
    may: str | None = None
    fails: dict[str, str] = field(default_factory=dict)
    warns: dict[str, str] = field(default_factory=dict)
    actions: tuple[str, ...] = ACTIONS
    close: float = 1e-4
    around: Callable[[], Any] = contextlib.nullcontext


NET = ("net.act1", "net.act2")
VARIES = "gives another answer each time it is asked"
DEPENDS = "gives answers that depend on what else is in the batch"


def every(actions: tuple[str, ...], match: str) -> dict[str, str]:
    return dict.fromkeys(actions, match)


FUNCTION = {"fails": every(LAYERS, r"model must be a torch\.nn\.Module"), "actions": (*ATTACKS, "dknn", "rails")}
NO_GRADIENT = every(GRADIENT, "model must be differentiable in its input")
NO_LOGITS = every(ACTIONS, "model must return logits")
SCRIPTED = every(LAYERS, r"model is a \w+ \(scripted, traced or exported\)")
UNSTEADY_LAYER = r"layer '[\w.]+' " + VARIES

MODELS: dict[str, Case] = {
    "plain": Case(lambda net: net),
    "changes its input": Case(
        lambda net: Around(net, spoils),
        lambda _: Around(plain(), lambda x: x * 0.5 + 0.1),
        layers=NET,
        actions=(*ACTIONS, EVALUATED),
    ),
    "activations in place": Case(lambda net: changed(net, act1=nn.ReLU(inplace=True))),
    "counts its calls": Case(
        Counts, layers=NET, fails=every(LAYERS, UNSTEADY_LAYER), warns=every(ATTACKS, "model " + VARIES)
    ),
    "remembers its last batch": Case(
        Remembers,
        layers=NET,
        fails=every(LAYERS, r"layer '[\w.]+' gives a"),
        warns=every(ATTACKS, "model gives a"),
    ),
    "overwrites its answer": Case(lambda net: Overwrites(net, 0.0), layers=NET, fails=NO_GRADIENT),
    "overwrites its answer, at random": Case(
        lambda net: Overwrites(net, 1.0),
        layers=NET,
        fails=NO_GRADIENT,
        warns=every(ATTACKS, "model " + VARIES),
    ),
    "a layer that overwrites its answer, at random": Case(
        lambda net: changed(net, act2=Overwrites(net.act2, 1.0)), actions=DEFENCES, fails=every(LAYERS, UNSTEADY_LAYER)
    ),
    "bfloat16 body, float32 head": Case(lambda net: Mixed(net, torch.bfloat16, torch.float32), Casts),
    "float32 body, bfloat16 head": Case(lambda net: Mixed(net, torch.float32, torch.bfloat16), Casts),
    "bfloat16": Case(lambda net: net.bfloat16(), Casts),
    "float16": Case(lambda net: net.half(), Casts),
    "float64": Case(lambda net: net.double(), Casts),
    "gives a dict": Case(lambda net: Around(net, after=lambda found: {"logits": found, "loss": None}), layers=NET),
    "gives an object": Case(lambda net: Around(net, after=Output), layers=NET),
    "gives a tuple": Case(lambda net: Around(net, after=lambda found: (found, [found])), layers=NET),
    "gives a list": Case(lambda net: Around(net, after=lambda found: [found]), layers=NET),
    "gives nothing": Case(
        lambda net: Around(net, after=lambda found: None),
        layers=NET,
        fails=every(ACTIONS, "model must return a tensor"),
    ),
    "gives probabilities": Case(
        lambda net: Around(net, after=lambda found: found.softmax(1)),
        layers=NET,
        warns=every((*DEFENCES, *GRADIENT, "square", *SOFT), "model returns probabilities"),
    ),
    "gives NaN for some inputs": Case(
        lambda net: Around(net, after=nan_for_a_class),
        layers=NET,
        fails=every(ACTIONS, "model must return finite logits"),
    ),
    "a layer gives NaN for some inputs": Case(
        lambda net: changed(net, act2=Around(net.act2, after=nan_where_high), pool=nn.Sequential(Cleans(), net.pool)),
        actions=LAYERS,
        fails=every(LAYERS, "layer 'act2' gave NaN or infinite features"),
    ),
    "gives too few rows": Case(lambda net: Around(net, after=lambda found: found[:1]), layers=NET, fails=NO_LOGITS),
    "gives too many rows": Case(
        lambda net: Around(net, after=lambda found: found.repeat(2, 1)), layers=NET, fails=NO_LOGITS
    ),
    "gives labels": Case(lambda net: Around(net, after=lambda found: found.argmax(1)), layers=NET, fails=NO_LOGITS),
    "gives integers": Case(lambda net: Around(net, after=lambda found: found.long()), layers=NET, fails=NO_LOGITS),
    "gives losses in train mode": Case(Losses, layers=NET),
    "compiled": Case(
        lambda net: torch.compile(net, backend="eager", dynamic=True),
        actions=("rails in a space", "pgd"),
    ),
    "compiled in place": Case(compiled_in_place, actions=("dknn", "pgd", "soft neighbours")),
    "data parallel": Case(lambda net: nn.DataParallel(net)),
    "scripted": Case(scripted, fails=SCRIPTED),
    "traced": Case(traced, fails=SCRIPTED),
    "checkpointed": Case(lambda net: Checkpointed(net, False)),
    "checkpointed, reentrant": Case(
        lambda net: Checkpointed(net, True), fails=every((*GRADIENT, *SOFT), "raised by the gradient of the model")
    ),
    "layers inside a checkpoint": Case(
        lambda net: CheckpointedBody(), twin=lambda net: copied(Plain(), net), actions=ACTIONS
    ),
    "layers inside a reentrant checkpoint": Case(
        lambda net: CheckpointedReentrantBody(),
        twin=lambda net: copied(Plain(), net),
        fails=every(GRADIENT, "raised by the gradient of the model")
        | every(SOFT, "model must be differentiable in its input"),
    ),
    "one module called twice": Case(TwiceCalled, lambda net: SameParameter(net, tied=False)),
    "a layer that is called twice": Case(
        TwiceCalled,
        layers=("act1", "conv2"),
        actions=("dknn", "rails", "rails in a space"),
        fails=every(LAYERS, "layer 'conv2' is called 2 times"),
    ),
    "a space that is called twice": Case(
        TwiceCalled,
        layers=("conv2", "act2"),
        actions=("rails in a space",),
        fails=every(LAYERS, "layer 'conv2' is called 2 times"),
    ),
    "a layer that is never called": Case(
        lambda net: changed(net, spare=nn.Linear(2, 2)),
        layers=("act1", "spare"),
        actions=("dknn", "rails", "rails in a space"),
        fails=every(LAYERS, "layer 'spare' is called 0 times"),
    ),
    "one parameter in two modules": Case(
        lambda net: SameParameter(net, tied=True), lambda net: SameParameter(net, tied=False)
    ),
    "lazy": Case(functools.partial(lazy, materialised=False), Casts),
    "lazy, materialised": Case(functools.partial(lazy, materialised=True), Casts),
    "hooks that change what passes": Case(hooked, unhooked),
    "parametrised": Case(normed, unparametrized),
    "no gradient inside": Case(
        lambda net: Quiet(net, torch.no_grad),
        layers=NET,
        fails=NO_GRADIENT | every(SOFT, "model must be differentiable in its input"),
    ),
    "inference mode inside": Case(
        lambda net: Quiet(net, torch.inference_mode),
        layers=NET,
        fails=NO_GRADIENT | every(SOFT, "model must be differentiable in its input"),
    ),
    "decorated": Case(Decorated, layers=NET),
    "float64 by default": Case(lambda net: net, around=doubles),
    "float64 by default and by nature": Case(lambda net: net.double(), Casts, around=doubles),
    "normalises over the batch": Case(
        lambda net: Normed(net, tracked=False),
        fails=every(LAYERS, r"layer '[\w.]+' " + DEPENDS),
        warns=every(ATTACKS, "model " + DEPENDS),
    ),
    "dropout in eval mode": Case(
        DropsAlways, fails=every(LAYERS, UNSTEADY_LAYER), warns=every(ATTACKS, "model " + VARIES)
    ),
    "in train mode": Case(Normed, NormedByHand),
    "a lambda": Case(defaulted, lambda f: NormedByHand(f.__defaults__[0]), **FUNCTION),
    "a partial": Case(
        lambda net: functools.partial(scaled, Normed(net), scale=2.0),
        lambda f: Around(NormedByHand(f.args[0]), after=lambda found: 2 * found),
        **FUNCTION,
    ),
    "a closure": Case(
        lambda net: closure(Normed(net)), lambda f: NormedByHand(f.__closure__[0].cell_contents), **FUNCTION
    ),
    "a bound method": Case(lambda net: Asked(Normed(net)).scores, lambda f: NormedByHand(f.__self__.net), **FUNCTION),
    "no parameters": Case(lambda net: WithoutParameters(), lambda _: WithoutParameters()),
    "strange names": Case(in_dict, layers=("a b", "a:4")),
    "reshapes by view": Case(Views),
    "normalised": Case(
        lambda net: Normalised(net, 0.5, 0.25),
        lambda _: Around(plain(), lambda x: (x - 0.5) / 0.25),
        layers=("model.act1", "model.act2"),
    ),
    "quantised as it goes": Case(  # by the range of each batch
        quantised, fails=NO_GRADIENT, warns=every(ATTACKS, "model " + DEPENDS), actions=(*DEFENCES, *ATTACKS)
    ),
    "very deep": Case(deep, layers=("1", "122"), actions=("rails in a space", "soft neighbours")),
    "more arguments": Case(Keywords, layers=NET),
    "cannot be copied": Case(Unpicklable, layers=NET),
    "no batches of one": Case(
        lambda net: Batches(net, 2, 1000),
        layers=NET,
        fails=every(LAYERS, r"what else is in the batch|model.*inputs of shape \(1, 1, 6, 6\)"),
        warns=every(ATTACKS, "model gives answers that depend on what else is in the batch"),
    ),
    "small batches only": Case(
        lambda net: Batches(net, 1, 16),
        layers=NET,
        fails=every(LAYERS, r"model.*inputs of shape \(\d+, 1, 6, 6\)"),
        may=r"model, asked about inputs of shape \(\d+, 1, 6, 6\)",
    ),
    "its own device": Case(OwnDevice, layers=NET),
    "frozen": Case(lambda net: net.requires_grad_(False)),
}


def copied(twin: nn.Module, net: nn.Module) -> nn.Module:
    twin.load_state_dict(net.state_dict())
    return twin
