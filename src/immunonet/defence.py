"""What RAILS and DkNN share: a wrapped model, its feature maps, a repertoire, calibration, save and load."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from immunonet import _check, _store
from immunonet.features import (
    FeatureMap,
    Layer,
    as_layers,
    build,
    check_names,
    evaluating,
    layer_names,
    space_map,
)
from immunonet.immune import sensing
from immunonet.repertoire import Index, Repertoire, check_classes, gather, hold_out

FORMAT = 1
PROBES = 8
DEFENCE_FILE = "defence.json"
CALIBRATION = ("label_scores", "strangeness", "scales")


class Defence(nn.Module, abc.ABC):
    """A trained classifier behind a nearest-neighbour defence. Subclasses are fitted before anything is asked.

    The model is never changed: it runs in eval mode without gradients and is left in the mode it was in.
    """

    repertoire: Repertoire
    _label_scores: Tensor
    _strangeness: Tensor
    _scales: Tensor

    def __init__(
        self,
        model: nn.Module,
        layers: Layer | Sequence[Layer],
        *,
        bounds: Any,
        space: str | None,
        false_alarm: float,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if space is not None and not isinstance(space, str):
            raise TypeError(f"space must be None or a submodule's name, got {space!r}")
        self.model = model
        self._layers = as_layers(layers)
        check_names(model, self._layers, space)
        # Registered so that .to(device) moves them with everything else.
        self._callables = nn.ModuleList(layer for layer in self._layers if isinstance(layer, nn.Module))
        self.space = space
        self.bounds = _check.Bounds.of("bounds", bounds)
        self.false_alarm = _check.number("false_alarm", false_alarm, least=0, most=1, above=True)
        self.classes = 0
        self.shape: tuple[int, ...] = ()
        self.feature_maps: list[FeatureMap] = []
        self.indices = nn.ModuleList()
        for name in CALIBRATION:
            self.register_buffer(f"_{name}", torch.empty(0), persistent=False)

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers' names; a callable goes by its own."""
        return layer_names(self._layers)

    @property
    def device(self) -> torch.device:
        """Where the model, and everything else, is."""
        for tensor in [*self.parameters(), *self.buffers()]:
            return tensor.device
        return torch.device("cpu")

    @torch.no_grad()
    def fit(self, x: Any, y: Any = None, calibration: Any = 0.05) -> Self:
        """Take the training examples as repertoire, calibrate sensing on others, and return self.

        Args:
            x: inputs `(N, *S)` within bounds (tensor or array), or a Dataset or DataLoader of `(x, y)`.
            y: labels `(N,)`, whole numbers in [0, C) where the model gives C logits.
            calibration: the fraction of the examples held out to calibrate on (the same ones each time), or
                `(x_cal, y_cal)`, which the model should never have seen: p-values are valid only then.

        Raises:
            ValueError or TypeError, before any work is lost, for inputs out of bounds, NaN, wrong shapes or
            labels, a class with fewer examples than neighbours, or a model or layer that cannot be used.
        """
        x, y = self._examples("x", "y", *gather(x, y))
        classes = self._count_classes(x)
        y = _check.labels("y", y, n=len(x), classes=classes)
        if isinstance(calibration, tuple | list):
            if len(calibration) != 2:
                raise ValueError(f"calibration must be a fraction or (x_cal, y_cal), got {len(calibration)} items")
            x_cal, y_cal = self._examples("x_cal", "y_cal", calibration[0], calibration[1], shape=tuple(x.shape[1:]))
            y_cal = _check.labels("y_cal", y_cal, n=len(x_cal), classes=classes)
        else:
            fraction = _check.number("calibration", calibration, least=0, most=1, above=True)
            keep, held = hold_out(y, fraction, seed=0)
            x, y, x_cal, y_cal = x[keep], y[keep], x[held], y[held]
        check_classes(y, classes, self._least_per_class())
        if len(y) < self._least_in_all():
            raise ValueError(f"neighbours={self._least_in_all()} is more than the {len(y)} examples of the repertoire")
        self._remember(x, y, classes)
        self._calibrate(x_cal, y_cal)
        return self

    def features(self, x: Any) -> list[Tensor]:
        """Return the features `(B, D)` of inputs `x` `(B, *S)`, one tensor per layer (reduced where affine)."""
        with torch.no_grad():
            cells = self._cells(self._inputs(x))
            return [feature_map.chunked(cells) for feature_map in self.feature_maps]

    def save(self, folder: str | Path) -> None:
        """Write the repertoire, calibration and settings to `folder` (safetensors and JSON); the model stays outside.

        An older save in the folder is replaced only when the new one is whole.
        """
        self._require_fit()
        folder = Path(folder)
        tensors = {
            "x": self.repertoire.x,
            "y": self.repertoire.y,
            **{f"calibration.{n}": getattr(self, f"_{n}") for n in CALIBRATION},
        }
        for i, probe in enumerate(self.features(self.repertoire.x[:PROBES])):
            tensors[f"probe.{i}"] = probe
        checksum = _store.write_tensors(folder / "repertoire.new", tensors)
        name = f"repertoire-{checksum[:12]}.safetensors"
        (folder / "repertoire.new").replace(folder / name)
        record = {
            "format": FORMAT,
            "defence": type(self).__name__,
            "layers": list(self.layers),
            "callables": [not isinstance(layer, str) for layer in self._layers],
            "settings": self._settings() | {"bounds": self.bounds.pairs(), "false_alarm": self.false_alarm},
            "classes": self.classes,
            "tensors": {"file": name, "sha256": checksum},
        }
        _store.write_json(folder / DEFENCE_FILE, record)
        for old in folder.glob("repertoire-*.safetensors"):
            if old.name != name:
                old.unlink()

    @classmethod
    @torch.no_grad()
    def load(cls, folder: str | Path, model: nn.Module, layers: Layer | Sequence[Layer] | None = None) -> Self:
        """Return the defence that `save` wrote, around `model`, which must have the weights it was fitted with.

        `layers` is needed again where one of them was a callable. Raises FileNotFoundError or ValueError for
        missing, truncated, edited or foreign files, another format version, and a model with other weights.
        """
        path = Path(folder) / DEFENCE_FILE
        record = _store.read_json(path)
        if not isinstance(record, dict) or "format" not in record or "defence" not in record:
            raise ValueError(f"{path} does not describe a defence; give the folder that save() wrote")
        if record["format"] != FORMAT:
            raise ValueError(f"{path} has format {record['format']}; this version reads format {FORMAT}")
        if record["defence"] != cls.__name__:
            raise ValueError(f"{path} holds a {record['defence']}, not a {cls.__name__}")
        try:
            names, callables, settings = record["layers"], record["callables"], record["settings"]
            file, checksum, classes = (
                record["tensors"]["file"],
                record["tensors"]["sha256"],
                record["classes"],
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} was edited: it lacks {error}") from error
        if layers is None and any(callables):
            raise ValueError(f"layers must be given again: {names[callables.index(True)]!r} was a callable")
        defence = cls._from_settings(model, names if layers is None else layers, settings)
        if len(defence.layers) != len(names):
            raise ValueError(f"layers must be {len(names)} as saved, {names}, got {list(defence.layers)}")
        tensors = _store.read_tensors(path.parent / file, checksum=checksum)
        device = defence.device
        defence._remember(tensors["x"].to(device), tensors["y"].to(device), classes)
        for i, (name, found) in enumerate(zip(names, defence.features(tensors["x"][:PROBES]), strict=True)):
            stored = tensors[f"probe.{i}"].to(device)
            if found.shape != stored.shape or not torch.allclose(_gram(found), _gram(stored), rtol=1e-3, atol=1e-5):
                raise ValueError(
                    f"model gives other features at layer {name!r} than when {folder} was saved: "
                    "load the weights that the defence was fitted with"
                )
        for name in CALIBRATION:
            setattr(defence, f"_{name}", tensors[f"calibration.{name}"].to(device))
        return defence

    @abc.abstractmethod
    def _settings(self) -> dict[str, Any]: ...

    @classmethod
    @abc.abstractmethod
    def _from_settings(cls, model: nn.Module, layers: Any, settings: dict[str, Any]) -> Self: ...

    @abc.abstractmethod
    def _least_per_class(self) -> int: ...

    @abc.abstractmethod
    def _least_in_all(self) -> int: ...

    @abc.abstractmethod
    def _groups(self, y: Tensor) -> tuple[Tensor, list[int]]:
        """Return the order in which the examples are indexed, and the sizes of the groups searched apart."""

    @abc.abstractmethod
    def _keys(self, features: Tensor) -> Tensor:
        """Return what the index compares, from features; may overwrite them."""

    @abc.abstractmethod
    def _calibrate(self, x: Tensor, y: Tensor) -> None: ...

    def _set_calibration(self, scores: Tensor, far: Tensor) -> None:
        """Keep the calibration examples' nonconformity `(n,)` and mean distances to their nearest `(n, L)`."""
        self._label_scores = scores.float().sort().values
        # Layers differ in scale; each counts in units of its own typical distance.
        self._scales = far.mean(0).clamp(min=1e-12)
        self._strangeness = (far / self._scales).sum(1).sort().values

    def _is_foreign(self, far: Tensor) -> Tensor:
        """Return whether `(B,)` mean distances `(B, L)` are stranger than all but `false_alarm` of calibration."""
        p = sensing.p_values(self._strangeness, (far / self._scales).sum(1))
        return p <= self.false_alarm

    def _cells(self, x: Tensor) -> Tensor:
        return space_map(self.model, self.space)(x)

    def _remember(self, x: Tensor, y: Tensor, classes: int) -> None:
        maps = build(self.model, self._layers, self.space, x[:PROBES])
        self.classes = classes
        order, counts = self._groups(y)
        cells = self._cells(x[order])
        indices = [Index(self._keys(feature_map.chunked(cells)), order, counts) for feature_map in maps]
        self.feature_maps, self.indices = maps, nn.ModuleList(indices)
        self.repertoire = Repertoire(x, y)
        self.shape = tuple(x.shape[1:])

    def _require_fit(self) -> None:
        if not self.feature_maps:
            name = type(self).__name__
            raise ValueError(f"this {name} is not fitted: call {name.lower()}.fit(x, y) with the training set first")

    def _inputs(self, x: Any, name: str = "x") -> Tensor:
        """Return checked inputs on the defence's device."""
        self._require_fit()
        x = _check.inputs(name, x, bounds=self.bounds, shape=self.shape).to(self.device)
        if not len(x):
            raise ValueError(f"{name} must hold at least one input, got shape {tuple(x.shape)}")
        return x

    def _examples(
        self, x_name: str, y_name: str, x: Any, y: Any, shape: tuple[int, ...] | None = None
    ) -> tuple[Tensor, Tensor]:
        x = _check.inputs(x_name, x, bounds=self.bounds, shape=shape)
        if not len(x):
            raise ValueError(f"{x_name} must hold at least one example, got shape {tuple(x.shape)}")
        y = _check.labels(y_name, y, n=len(x))
        return x.to(self.device), y.to(self.device)

    def _count_classes(self, x: Tensor) -> int:
        probe = FeatureMap("logits", self.model, self.model)
        with evaluating(self.model):
            out = self.model(x[: min(2, len(x))].to(_dtype(self.model)))
        if not isinstance(out, Tensor) or out.ndim != 2 or out.shape[1] < 2 or not out.is_floating_point():
            found = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"model must give logits (B, C) with C of 2 or more, got {found}")
        if not bool(torch.isfinite(probe(x[:1])).all()):
            raise ValueError("model gives NaN or infinite logits on the first example")
        if len(out) != min(2, len(x)):
            raise ValueError(f"model must give one row of logits per input, got {len(out)} for {min(2, len(x))}")
        return int(out.shape[1])


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _gram(features: Tensor) -> Tensor:
    """Return the inner products of features relative to their mean square: the same for every affine root."""
    gram = features @ features.T
    return gram / gram.diagonal().mean().clamp(min=1e-12)
