"""ClosedLoop: a network that heals its own states, per input, before they go on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from immunonet import _check, incoming, models
from immunonet.control.autoencoders import Autoencoder
from immunonet.control.learning import ROWS, Progress, chosen, directions, learned, rebuilt
from immunonet.control.manifolds import project
from immunonet.control.passing import INPUT, bare, check_way
from immunonet.data import Images
from immunonet.defences.healing import HealingDefence
from immunonet.defences.repertoire import Familiarity, hold_out
from immunonet.features.names import Layer, check_names
from immunonet.features.witness import Witness

# Examples by which a model is told.
PROBES = 8
_GRADIENTS = ("whole", "last", "start", "frozen")


class ClosedLoop(HealingDefence):
    """Closed-loop control of a classifier (Chen, Li, Zhang: ICLR 2021, JMLR 2022). It is fitted before it is asked.

    Every layer has a manifold of clean states, learned from examples that the network gets right. Per input controls u
    are added to the states at the layers, such that sum_t (||z_t - E_t(z_t)||^2 + c ||u_t||^2) / s_t^2 is small: z_t =
    x_t + u_t, E_t the projection onto the manifold, s_t what clean states lie off it. No label enters, and no input
    sees others of its batch. Linear manifolds have closed forms; for others the objective is lowered step by step.
    Against attackers who know it, linear control is a differentiable network without the directions that it leaves out
    (Croce et al. 2022): whatever lies within the manifold passes.

    Args:
        model: any classifier, inputs `(B, *S)` to logits `(B, C)`.
        layers: "input" and names of submodules, in running order; each must depend on nothing but the one before.
        manifold: "linear", "autoencoder" (settings: `Autoencoder`), an `Autoencoder`, or one module per layer of one's
            own that maps states `(B, *S)` to projections of that shape.
        rank: of linear manifolds: the share of variance they hold, a float in (0, 1], or a number of directions, an
            int.
        basis: "states", or "channels": of images one basis of the channels for all places, small whatever their size.
        penalty: c >= 0, the cost of control.
        look_ahead: of linear manifolds: whether what later layers will pay counts.
        outer, inner: of other manifolds: passes forward and backward, and steps of each layer by itself after each.
            `outer=0`: the projection alone.
        step: first step of the line search, in units of s^2; "auto": 1 / (2 (1 + c)), exact for a projection.
        gradient: of its own answer in the input: "whole", through all steps; "last", through the last outer one;
            "start", through the first projection alone; "frozen", the controls held constant. Attackers' matter.
        false_alarm: share of clean inputs that may be flagged foreign, in (0, 1].
        seed: of fitting.
        bounds: valid range of inputs; checked on every call.

    Raises:
        ValueError or TypeError that names the argument.
    """

    kind, title = "control", "Closed-loop control"
    optimizes = True
    words: ClassVar[Mapping[str, dict[str, Any]]] = {
        "authors": {
            "manifold": "autoencoder", "penalty": 1e-3, "outer": 0, "residual": False, "noise": 0.0, "eps": 0.0
        },
    }  # fmt: skip
    """`authors`: what the published code comes to. Its 3 x 10 steps on means over the batch move controls by 1.5 %."""

    def __init__(
        self,
        model: nn.Module,
        layers: Layer | Sequence[Layer] = (INPUT,),
        *,
        manifold: Any = "linear",
        rank: float | int = 0.99,
        basis: Literal["states", "channels"] = "states",
        penalty: float = 1e-3,
        look_ahead: bool = True,
        outer: int = 3,
        inner: int = 10,
        step: float | Literal["auto"] = "auto",
        gradient: Literal["whole", "last", "start", "frozen"] = "whole",
        false_alarm: float = 0.05,
        seed: int = 0,
        bounds: Any = (0.0, 1.0),
    ) -> None:
        super().__init__(model, bounds=bounds)
        names = [layers] if isinstance(layers, str) else list(layers) if isinstance(layers, Sequence) else [layers]
        own_names = [name for name in names if isinstance(name, str)]
        if not own_names or len(own_names) < len(names):
            raise TypeError(f"layers must be 'input' or names of submodules, in running order, got {layers!r}")
        if twice := [name for name in own_names if own_names.count(name) > 1]:
            raise ValueError(f"layers must name each layer once, got {twice[0]!r} twice")
        if INPUT in names[1:]:
            raise ValueError(f"layers must stand in running order, 'input' first, got {names}")
        check_names(model, [name for name in names if name != INPUT], None)
        self._layers: tuple[str, ...] = tuple(own_names)
        self.manifold, own = chosen(manifold, len(self._layers))
        self.manifolds = nn.ModuleList(own)
        self.rank = directions(rank)
        self.basis = _check.choice("basis", basis, ("states", "channels"))
        self.penalty = _check.number("penalty", penalty, least=0)
        self.look_ahead = _check.boolean("look_ahead", look_ahead)
        self.outer = _check.integer("outer", outer, least=0)
        self.inner = _check.integer("inner", inner)
        if isinstance(step, str) and step != "auto":
            raise TypeError(f"step must be a number above 0 or 'auto', got {step!r}")
        self.step = step if isinstance(step, str) else _check.number("step", step, least=0, above=True)
        self.gradient = _check.choice("gradient", gradient, _GRADIENTS)
        self.false_alarm = _check.number("false_alarm", false_alarm, least=0, most=1, above=True)
        self.seed = _check.integer("seed", seed, least=0, most=2**63 - 1)
        self.shape: tuple[int, ...] = ()
        self.shares: dict[str, float] = {}
        self.register_buffer("scales", torch.ones(len(self._layers)))

    # --- Fitting

    @torch.inference_mode(False)
    @torch.no_grad()
    def fit(
        self,
        x: Any = None,
        y: Any = None,
        calibration: Any = 0.05,
        *,
        checkpoint: str | Path | None = None,
        on_progress: Progress | None = None,
    ) -> Self:
        """Learn the manifolds from the examples that the model gets right, and return self.

        Args:
            x, y: inputs `(N, *S)` within bounds and labels `(N,)`, or a Dataset or DataLoader of both.
            calibration: the fraction of the examples, or others `(x_cal, y_cal)`, that scales and sensing are taken
                from.
            checkpoint: a folder in which the training of autoencoders is kept, and goes on after an interruption.
            on_progress: called as `(step, steps, epochs so far)` while an autoencoder is trained.

        Raises:
            ValueError or TypeError, before any work is lost, for inputs that cannot be used, a layer that is called
            twice, is not on the way from the one before, or is bypassed, and where the model gets no example right.
        """
        x, y = incoming.examples(x, y)
        x = incoming.inputs("x", x, bounds=self.bounds, own=True).to(self.device)
        if not len(x):
            raise ValueError(f"x must hold at least one example, got shape {tuple(x.shape)}")
        check_way(self.model, self._layers, x[:: max(1, len(x) // PROBES)][:PROBES])
        classes = int(models.logits(self.model, x[:2]).shape[1])
        y = incoming.labels("y", y, n=len(x), classes=classes, own=True).to(self.device)
        if not _check.is_number(calibration):
            x_cal, y_cal = incoming.calibration(calibration)
            x_cal = incoming.inputs("x_cal", x_cal, bounds=self.bounds, shape=tuple(x.shape[1:])).to(self.device)
            y_cal = incoming.labels("y_cal", y_cal, n=len(x_cal), classes=classes).to(self.device)
        else:
            fraction = _check.number("calibration", calibration, least=0, most=1, above=True)
            keep, out = hold_out(y, fraction, seed=0)
            x, y, x_cal, y_cal = x[keep], y[keep], x[out], y[out]
        right, held_right = self._right(x, y), self._right(x_cal, y_cal)
        for name, found in (("y", right), ("y_cal", held_right)):
            if not bool(found.any()):
                raise ValueError(
                    f"{name} must hold an example that the model gets right, which clean states are learned from, got "
                    f"none of {len(found)}: check that labels are in the model's order, and its weights"
                )
        names = tuple(map(str, range(classes)))
        self._learn(
            Images(x[right], y[right], names), Images(x_cal[held_right], y_cal[held_right], names),
            None if checkpoint is None else Path(checkpoint), on_progress,
        )  # fmt: skip
        self.classes, self.shape = classes, tuple(x.shape[1:])
        self.probes = x[:PROBES].clone()
        self.calibrate(x_cal, y_cal)
        self._witness = Witness([self.model], self._testimony)
        return self

    def _learn(self, images: Images, clean: Images, checkpoint: Path | None, on_progress: Progress | None) -> None:
        """Fit the manifolds that are not given, and their scales."""
        if self.manifold is not None:
            found, self.shares = learned(
                self.model, self._layers, self.manifold, images, clean, rank=self.rank, basis=self.basis,
                bounds=self.bounds, seed=self.seed, checkpoint=checkpoint, on_progress=on_progress,
            )  # fmt: skip
            self.manifolds = nn.ModuleList(found)
        for place, layer in enumerate(self._layers):
            state = bare(self.model, [layer], clean.x[:2])[0]
            with models.blamed(state, f"the manifold of layer {layer!r}"):
                project(self.manifolds[place], state)
        lying = torch.cat([self._steering.lying_bare(part) for part in clean.x.split(ROWS)])
        self.scales = lying.square().mean(0).sqrt().clamp(min=1e-6)

    def _right(self, x: Tensor, y: Tensor) -> Tensor:
        labels = [models.logits(self.model, part).argmax(1) for part in x.split(ROWS)]
        return torch.cat(labels) == y

    def calibrate(self, x: Tensor, y: Tensor) -> None:
        """Calibrate sensing on other examples `x` `(n, *S)`; the manifolds stay."""
        with torch.no_grad():
            far = torch.cat([self._steering.lying_bare(part.to(self.device)) for part in x.split(ROWS)])
        self.familiar = Familiarity.of(far)

    # --- The contract

    @property
    def costly(self) -> bool:  # type: ignore[override]
        """Whether autoencoders are trained."""
        return isinstance(self.manifold, Autoencoder)

    def settings(self) -> dict[str, Any]:
        """Return all keyword arguments that the constructor took."""
        manifold: Any = "linear" if self.manifold is not None else [type(own).__name__ for own in self.manifolds]
        if isinstance(self.manifold, Autoencoder):
            manifold = dataclasses.asdict(self.manifold)
        return super().settings() | {
            "manifold": manifold, "rank": self.rank, "basis": self.basis, "penalty": self.penalty,
            "look_ahead": self.look_ahead, "outer": self.outer, "inner": self.inner, "step": self.step,
            "gradient": self.gradient, "false_alarm": self.false_alarm, "seed": self.seed,
        }  # fmt: skip

    @classmethod
    def options(cls) -> list[str]:
        """Return the names of the settings: the constructor's, and those of `Autoencoder`."""
        return list(dict.fromkeys([*super().options(), *(field.name for field in dataclasses.fields(Autoencoder))]))

    @classmethod
    def made(cls, model: nn.Module, layers: Sequence[Layer], settings: Mapping[str, Any]) -> Self:
        """Return a ClosedLoop with these settings, not fitted; those of `Autoencoder` may stand beside its own."""
        cls.check_settings(settings)
        own = dict(settings)
        names = {field.name for field in dataclasses.fields(Autoencoder)} - {"seed"}
        learning = {name: own.pop(name) for name in names & own.keys()}
        given = own.get("manifold", "linear")
        if isinstance(given, Mapping):
            learning, given = {**given, **learning}, "autoencoder"
        if given == "autoencoder":
            own["manifold"] = Autoencoder(**{"seed": own.get("seed", 0), **learning})
        elif learning:
            raise ValueError(f"{', '.join(sorted(learning))} must be left out unless manifold='autoencoder'")
        return cls(model, list(layers) or [INPUT], **own)

    def with_settings(self, **changes: Any) -> Self:
        """Return a twin with some settings changed; the manifolds are shared."""
        own = {} if self.manifold is not None else {"manifold": list(self.manifolds)}
        twin = self.made(self.model, self._layers, self.settings() | own | changes)
        twin.adopt(self)
        return twin

    def save(self, folder: str | Path) -> None:
        """Write manifolds and settings to `folder`; ValueError for manifolds of one's own, which are modules."""
        if self.manifold is None:
            names = ", ".join(type(own).__name__ for own in self.manifolds)
            raise ValueError(
                f"manifold must be 'linear' or 'autoencoder' to be saved, got modules of your own ({names})"
            )
        super().save(folder)

    @classmethod
    def authors(cls, model: nn.Module, layers: Sequence[str] = (INPUT,), **overrides: Any) -> Self:
        """Return what the published code comes to: autoencoders trained on clean states alone, projecting once.

        Its 3 x 10 online steps go down means over the batch, by which controls move 1.5 % of what is left; its linear
        form centres by the mean of the test batch, so that a single input gets no control, and is left out.
        """
        return cls.made(model, layers, cls.words["authors"] | overrides)

    def fitted_by(self) -> dict[str, Any]:
        """Return the settings that the manifolds depend on."""
        names = ("manifold", "rank", "basis", "bounds", "seed")
        return {name: value for name, value in self.settings().items() if name in names}

    def adopt(self, other: Self) -> None:
        """Share the manifolds of `other`; ValueError where these settings need another fit."""
        if not other.shape:
            return
        for name, value in self.fitted_by().items():
            if value != other.settings()[name]:
                raise ValueError(
                    f"{name} must stay {other.settings()[name]!r}, which this was fitted with: fit another"
                )
        self.classes, self.shape, self.shares = other.classes, other.shape, other.shares
        self.manifolds, self.scales, self.probes = other.manifolds, other.scales, other.probes
        self.familiar, self._witness = other.familiar, other._witness

    def tensors(self) -> dict[str, Tensor]:
        """Return manifolds, scales and calibration, and a few examples with their answers, by which a model is told."""
        own = {} if self.manifold is None else self.manifolds.state_dict()
        return {
            **{f"manifolds.{name}": value for name, value in own.items()},
            **{f"familiar.{name}": value for name, value in self.familiar.named_buffers()},
            "scales": self.scales, "probes": self.probes, "answers": models.logits(self.model, self.probes),
        }  # fmt: skip

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what `tensors` gave; ValueError for a model with other weights."""
        probes = tensors["probes"]
        try:
            found = models.logits(self.model, probes)
            same = found.shape == tensors["answers"].shape and torch.allclose(
                found, tensors["answers"], rtol=1e-2, atol=1e-2
            )
        except (RuntimeError, ValueError):
            same = False
        if not same:
            raise ValueError(
                "model gives other logits than when this was saved: load the weights that the defence was fitted with"
            )
        if self.manifold is not None:
            self.manifolds = nn.ModuleList(
                rebuilt(self.manifold, _part(tensors, f"manifolds.{place}."), state, self.basis)
                for place, state in enumerate(bare(self.model, self._layers, probes[:1]))
            )
        self.scales, self.probes, self.shape = tensors["scales"], probes, tuple(probes.shape[1:])
        self.classes = int(tensors["answers"].shape[1])
        self.familiar = Familiarity(**_part(tensors, "familiar."))
        self._witness = Witness([self.model], self._testimony)

    def identity(self) -> list[Any]:
        """Return all that answers depend on: kind, settings, layers, the model, and the manifolds if it is fitted."""
        fitted = [self.manifolds, self.scales, *self.familiar.buffers()] if self.shape else None
        return [type(self).__qualname__, self.settings(), list(self._layers), self.model, fitted]

    def extra_repr(self) -> str:
        """Return layers, manifold, and what it is fitted on, in words."""
        kind = "own" if self.manifold is None else "linear" if self.manifold == "linear" else "autoencoder"
        return f"layers={list(self.layers)}, manifold={kind}, penalty={self.penalty:g}"


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
