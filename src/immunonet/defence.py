"""What RAILS and DkNN share: a wrapped model, its feature maps, a repertoire, calibration, save and load."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from immunonet import _check, _store
from immunonet.features import FeatureMap, Layer, as_layers, build, check_names, evaluating, layer_names, own, space_map
from immunonet.repertoire import Calibration, Repertoire, check_classes, gather, hold_out
from immunonet.search import ExactIndex, FeatureFile, Index, Progress, SignatureIndex, auto_budget, computed

FORMAT = 1
PROBES = 8
DEFENCE_FILE = "defence.json"


class Defence(nn.Module, abc.ABC):
    """A trained classifier behind a nearest-neighbour defence. Subclasses are fitted before anything is asked.

    The model is never changed: it runs in eval mode without gradients and is left in the mode it was in.
    """

    repertoire: Repertoire
    calibration: Calibration

    def __init__(
        self,
        model: nn.Module,
        layers: Layer | Sequence[Layer],
        *,
        bounds: Any,
        space: str | None,
        false_alarm: float,
        memory_budget: int | Literal["auto"],
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
        if isinstance(memory_budget, str) and memory_budget != "auto":
            raise TypeError(f"memory_budget must be bytes, an integer, or 'auto', got {memory_budget!r}")
        self.memory_budget = (
            auto_budget() if isinstance(memory_budget, str) else _check.integer("memory_budget", memory_budget)
        )
        self.false_alarm = _check.number("false_alarm", false_alarm, least=0, most=1, above=True)
        self.classes = 0
        self.shape: tuple[int, ...] = ()
        self.feature_maps: list[FeatureMap] = []
        self.indices = nn.ModuleList()

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
    def fit(
        self,
        x: Any,
        y: Any = None,
        calibration: Any = 0.05,
        *,
        feature_file: str | Path | None = None,
        on_progress: Progress | None = None,
    ) -> Self:
        """Take the training examples as repertoire, calibrate sensing on others, and return self.

        Args:
            x: inputs `(N, *S)` within bounds (tensor or array), or a Dataset or DataLoader of `(x, y)`.
            y: labels `(N,)`, whole numbers in [0, C) where the model gives C logits.
            calibration: the fraction of the examples held out to calibrate on (the same ones each time), or
                `(x_cal, y_cal)`, which the model should never have seen: p-values are valid only then. With
                fewer than 1 / false_alarm - 1 of them nothing can look foreign.
            feature_file: where features beyond `memory_budget` are kept as float16 (2 N D bytes, logged before they
                are written; ".0", ".1" and so on are added for several layers); None: computed again when needed.
            on_progress: called with how many examples are done, and how many there are, layer by layer.

        Raises:
            ValueError or TypeError, before any work is lost, for inputs out of bounds, NaN, wrong shapes or
            labels, a class with fewer examples than neighbours, or a model or layer that cannot be used.
            After a failed fit the defence is unfitted.
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
            if isinstance(calibration, bool) or not isinstance(calibration, int | float):
                raise TypeError(f"calibration must be a fraction or a pair (x_cal, y_cal), got {calibration!r}")
            fraction = _check.number("calibration", calibration, least=0, most=1, above=True)
            keep, held = hold_out(y, fraction, seed=0)
            x, y, x_cal, y_cal = x[keep], y[keep], x[held], y[held]
        check_classes(y, classes, self._least_per_class())
        if len(y) < self._least_in_all():
            raise ValueError(f"neighbours={self._least_in_all()} is more than the {len(y)} examples of the repertoire")
        try:
            self._remember(x, y, classes, feature_file, on_progress)
            self.calibration = self._calibrate(x_cal, y_cal)
        except BaseException:
            self.feature_maps = []
            raise
        return self

    def index(self, layer: int = 0) -> Index:
        """Return the search index of one layer, by its place in `layers`: its features of the repertoire."""
        self._require_fit()
        index = self.indices[_check.integer("layer", layer, least=0, most=len(self.indices) - 1)]
        assert isinstance(index, ExactIndex | SignatureIndex)
        return index

    def features(self, x: Any) -> list[Tensor]:
        """Return the features `(B, D)` of inputs `x` `(B, *S)`, one tensor per layer (reduced where affine)."""
        with torch.no_grad():
            cells = self._cells(self._inputs(x))
            return [feature_map.chunked(cells) for feature_map in self.feature_maps]

    @abc.abstractmethod
    def familiarity(self, x: Any) -> Tensor:
        """Return the p-value `(B,)` of each input's distance to its nearest examples: foreign ones have a small one."""

    def foreign(self, x: Any) -> Tensor:
        """Return whether `(B,)` inputs are farther from the examples than all but `false_alarm` of calibration data."""
        return self.familiarity(x).le(self.false_alarm)

    def save(self, folder: str | Path) -> None:
        """Write the repertoire, calibration and settings to `folder` (safetensors and JSON); the model stays outside.

        An older save in the folder is replaced only when the new one is whole.
        """
        self._require_fit()
        folder = Path(folder)
        tensors = {
            "x": self.repertoire.x,
            "y": self.repertoire.y,
            **{f"calibration.{name}": buffer for name, buffer in self.calibration.named_buffers()},
        }
        probes = self.repertoire.x[:PROBES]
        for i, probe in enumerate(self.features(probes)):
            tensors[f"probe.{i}"] = probe
        if (heard := self._known(probes)) is not None:
            tensors["probe.known"] = heard
        checksum = _store.write_tensors(folder / "repertoire.new", tensors)
        name = f"repertoire-{checksum[:12]}.safetensors"
        known = (folder / name).exists()
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
        try:
            _store.write_json(folder / DEFENCE_FILE, record | {"checksum": _store.fingerprint(record)})
        except BaseException:
            if not known:
                (folder / name).unlink(missing_ok=True)
            raise
        for old in folder.glob("repertoire-*.safetensors"):
            if old.name != name:
                old.unlink()

    @classmethod
    @torch.no_grad()
    def load(
        cls,
        folder: str | Path,
        model: nn.Module,
        layers: Layer | Sequence[Layer] | None = None,
        *,
        feature_file: str | Path | None = None,
        on_progress: Progress | None = None,
    ) -> Self:
        """Return the defence that `save` wrote, around `model`, which must have the weights it was fitted with.

        `layers` is needed again where one of them was a callable. `feature_file` and `on_progress` as in `fit`: a file
        that `fit` wrote is opened, where features exceed the budget again, and nothing in it is computed; None: the
        features of the repertoire are computed again. Raises FileNotFoundError or ValueError for
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
        if record.pop("checksum", None) != _store.fingerprint(record):
            raise ValueError(f"{path} was edited: its content does not match its checksum")
        names, callables, file = record["layers"], record["callables"], record["tensors"]["file"]
        if layers is None and any(callables):
            raise ValueError(f"layers must be given again: {names[callables.index(True)]!r} was a callable")
        given = as_layers(names if layers is None else layers)
        if len(given) != len(names):
            raise ValueError(f"layers must be {len(names)} as saved, {names}, got {list(layer_names(given))}")
        defence = cls._from_settings(model, given, record["settings"])
        tensors = _store.read_tensors(path.parent / file, checksum=record["tensors"]["sha256"])
        x, y = tensors["x"].to(defence.device), tensors["y"].to(defence.device)
        if (classes := defence._count_classes(x)) != record["classes"]:
            raise ValueError(f"model must give {record['classes']} logits, as when {folder} was saved, got {classes}")
        defence._remember(x, y, classes, feature_file, on_progress)
        for i, (name, found) in enumerate(zip(names, defence.features(x[:PROBES]), strict=True)):
            if not _alike(found, tensors[f"probe.{i}"].to(x.device)):
                raise ValueError(
                    f"model gives other features at layer {name!r} than when {folder} was saved: "
                    "load the weights that the defence was fitted with"
                )
        heard = defence._known(x[:PROBES])
        if heard is not None and not torch.allclose(heard, tensors["probe.known"].to(x.device), atol=1e-3):
            raise ValueError(
                f"model, which has a voice, gives other logits than when {folder} was saved: "
                "load the weights that the defence was fitted with"
            )
        prefix = "calibration."
        kept = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        defence.calibration = Calibration(**kept).to(x.device)
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
    def _keys(self, features: Tensor) -> Tensor:
        """Return what the index compares, from features; may overwrite them."""

    @abc.abstractmethod
    def _calibrate(self, x: Tensor, y: Tensor) -> Calibration: ...

    def _known(self, x: Tensor) -> Tensor | None:
        """Return what the model itself answers to inputs `(B, *S)`, probabilities `(B, C)`, if that counts."""
        return None

    def _cells(self, x: Tensor) -> Tensor:
        return space_map(self.model, self.space)(x)

    def _remember(
        self,
        x: Tensor,
        y: Tensor,
        classes: int,
        feature_file: str | Path | None = None,
        on_progress: Progress | None = None,
    ) -> None:
        maps = build(self.model, self._layers, self.space, x[:PROBES])
        self.classes = classes
        self.repertoire = Repertoire(x, y)
        self.shape = tuple(x.shape[1:])
        indices = []
        for i, feature_map in enumerate(maps):
            file = feature_file if feature_file is None or len(maps) == 1 else f"{feature_file}.{i}"
            indices.append(self._index(feature_map, file, on_progress))
        self.feature_maps, self.indices = maps, nn.ModuleList(indices)

    def _index(
        self, feature_map: FeatureMap, file: str | Path | None, on_progress: Progress | None
    ) -> ExactIndex | SignatureIndex:
        """Return an exact index of the repertoire's features, or one by signature where they exceed the budget."""

        def rows(examples: Tensor) -> Tensor:
            return self._keys(feature_map.chunked(self._cells(self.repertoire.x[examples])))

        y = self.repertoire.y
        order, counts = y.argsort(stable=True), torch.bincount(y, minlength=self.classes).tolist()
        if 4 * len(y) * rows(order[:1]).shape[1] * len(self._layers) <= self.memory_budget:
            return ExactIndex(computed(rows, order, on_progress), order, counts)
        source = rows if file is None else FeatureFile(file, rows, len(y), on_progress=on_progress)
        return SignatureIndex(source, order, counts, on_progress=on_progress)

    def _require_fit(self) -> None:
        if not self.feature_maps:
            name = type(self).__name__
            raise ValueError(f"this {name} is not fitted: call {name.lower()}.fit(x, y) with the training set first")

    def _inputs(self, x: Any, name: str = "x") -> Tensor:
        """Return checked inputs on the defence's device."""
        self._require_fit()
        checked = _check.inputs(name, x, bounds=self.bounds, shape=self.shape).to(self.device)
        if not len(checked):
            raise ValueError(f"{name} must hold at least one input, got shape {tuple(checked.shape)}")
        return checked

    def _examples(
        self, x_name: str, y_name: str, x: Any, y: Any, shape: tuple[int, ...] | None = None
    ) -> tuple[Tensor, Tensor]:
        x = _check.inputs(x_name, x, bounds=self.bounds, shape=shape)
        if not len(x):
            raise ValueError(f"{x_name} must hold at least one example, got shape {tuple(x.shape)}")
        y = _check.labels(y_name, y, n=len(x))
        return x.to(self.device), y.to(self.device)

    def _count_classes(self, x: Tensor) -> int:
        """Return how many classes the model tells apart, judged by its logits of one or two inputs."""
        probe = own(self.model, x[:2])
        try:
            with evaluating(self.model):
                out = self.model(probe)
        except Exception as error:
            raise ValueError(f"model fails on inputs of shape {tuple(probe.shape)}: {error}") from error
        if not isinstance(out, Tensor) or out.ndim != 2 or out.shape[1] < 2 or not out.is_floating_point():
            found = f"shape {tuple(out.shape)}, {out.dtype}" if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"model must give logits (B, C), floating and with C of 2 or more, got {found}")
        if len(out) != len(probe):
            raise ValueError(f"model must give one row of logits per input, got {len(out)} for {len(probe)}")
        if not bool(torch.isfinite(out).all()):
            raise ValueError("model gives NaN or infinite logits on the first examples")
        return int(out.shape[1])


def _alike(found: Tensor, stored: Tensor) -> bool:
    """Return whether features `(n, D)` have the same lengths and pairwise distances: every affine root keeps them."""
    a, b = (torch.cat([torch.linalg.vector_norm(f, dim=1), torch.pdist(f)]) for f in (found, stored))
    return torch.allclose(a, b, rtol=1e-3, atol=1e-5 * b.mean().item())
