"""Networks along a path of weights (robust mode connectivity), and their ensemble as a defence."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from immunonet import _store, incoming, models
from immunonet.defences.answers import Answer
from immunonet.defences.base import Defence
from immunonet.paths import curves, statistics

_FORMAT = 1
FILE = "path.json"


class ModePath(nn.Module):
    """A path of weights between networks of one architecture (Garipov et al. 2018; Wang et al. 2023).

    Of two networks it is a quadratic Bezier curve: weights (1-t)^2 w_0 + 2 t (1-t) w + t^2 w_1, whose bend w begins in
    the middle, where the curve is the straight line; of three or more the chain of straight lines through them. The
    first and the last network stay as they are. What lies between, `bends`, is what `zoo.connect` trains, and all that
    this module has parameters of. The networks given are copied, not changed.

    `networks`: two or more classifiers of the same modules and parameters, on one device, and but for statistics of
    batch-norm layers with the same buffers; so must be parameters that need no gradient in any of them, unless none
    does. `images` `(N, *S)`: what those statistics are computed anew from at every point that is kept; None where
    the networks have none, or points at the ends alone are wanted. ValueError or TypeError otherwise.
    """

    def __init__(self, *networks: nn.Module, images: Any = None) -> None:
        super().__init__()
        curves.check_alike(networks)
        self.curve = "bezier" if len(networks) == 2 else "chain"
        ends = [_frozen(net) for net in (networks[0], networks[-1])]
        # In a tuple, out of the module's own parameters: those are what training moves. The last is for asking between.
        self._held = (*ends, _frozen(networks[0]))
        self.names = curves.trainable(networks)
        self._needs = {name: value.requires_grad for name, value in networks[0].named_parameters()}
        inner = [dict(net.named_parameters()) for net in networks[1:-1]]
        middle = [curves.mixed([dict(end.named_parameters()) for end in ends], [0.5, 0.5])]
        self.bends = nn.ModuleList(
            nn.ParameterList(nn.Parameter(point[name].detach().clone()) for name in self.names)
            for point in inner or middle
        )
        self.images = None if images is None else _images(images)
        self.settings: dict[str, Any] = {}
        self._kept: dict[float, dict[str, Tensor]] = {}

    @property
    def ends(self) -> tuple[nn.Module, nn.Module]:
        """The first and the last network, copies in eval mode."""
        return self._held[0], self._held[1]

    @property
    def normalises(self) -> bool:
        """Whether its networks have layers that keep statistics of batches."""
        return bool(curves.normalisers(self._held[-1]))

    def shares(self, t: float) -> list[float]:
        """Return the share of every point, ends and bends, at `t` in [0, 1]."""
        return curves.CURVES[self.curve](curves.place(t), 2 + len(self.bends))

    @property
    def corners(self) -> list[dict[str, Tensor]]:
        """The weights by name of the first end, of the bends, which are its parameters, and of the last end."""
        first, last = (dict[str, Tensor]((n, end.get_parameter(n)) for n in self.names) for end in self.ends)
        bends = [dict[str, Tensor](zip(self.names, bend.parameters(), strict=True)) for bend in self.bends]
        return [first, *bends, last]

    def weights(self, t: float) -> dict[str, Tensor]:
        """Return the parameters at `t` in [0, 1] by name, differentiable in the bends."""
        return curves.mixed(self.corners, self.shares(t))

    def between(self, t: float, *, training: bool = False) -> Callable[[Tensor], Tensor]:
        """Return the network at `t` as a function of inputs `(B, *S)`, differentiable in them and in the bends.

        It normalises by the statistics of the batch, and keeps none: those of the ends would be wrong between them.
        `training`: whether other layers, such as dropout, are as in training.
        """
        return self.at_weights(self.weights(t), training=training)

    def at_weights(self, weights: Mapping[str, Tensor], *, training: bool = False) -> Callable[[Tensor], Tensor]:
        """Return the network with some `weights` by name in the same way."""
        net = self._held[-1]

        def asked(x: Tensor) -> Tensor:
            net.train(training)
            with statistics.batch_statistics(net):
                return models.tensor_of(functional_call(net, dict(weights), (models.own(net, x),)))

        return asked

    @torch.no_grad()
    def at(self, t: float) -> nn.Module:
        """Return the network at `t` in [0, 1], a copy in eval mode with statistics of its own, which may be trained.

        At the ends it is the network given, bit for bit. ValueError where it has batch-norm layers and the path no
        images to compute their statistics from.
        """
        t = curves.place(t)
        net = _frozen(self.ends[int(t)] if t in (0.0, 1.0) else self._held[-1])
        for name, needs in self._needs.items():
            net.get_parameter(name).requires_grad_(needs)
        if t in (0.0, 1.0):
            return net
        for name, value in self.weights(t).items():
            net.get_parameter(name).copy_(value)
        if not self.normalises:
            return net
        if t not in self._kept:
            self.settle(net)
            self._kept[t] = {
                f"{name}.{key}" if name else key: value.clone()
                for name, layer in curves.normalisers(net).items()
                for key, value in layer.named_buffers(recurse=False)
            }
        for name, value in self._kept[t].items():
            net.get_buffer(name).copy_(value)
        return net

    def settle(self, net: nn.Module) -> None:
        """Give a network of this architecture batch statistics computed from the path's images, if it keeps any.

        ValueError where it does and the path has no images.
        """
        if self.normalises and self.images is None:
            kept = ", ".join(f"{t:g}" for t in (0, *sorted(self._kept), 1))
            raise ValueError(
                "images must be given where batch-norm statistics are wanted between ends: ModePath(..., images=x), "
                f"some thousand training images; without them there are the points at {kept}"
            )
        if self.images is not None:
            statistics.recompute(net, self.images)

    def ensemble(self, points: Sequence[float]) -> PathEnsemble:
        """Return the networks at some `points` in [0, 1] as one defence: the log of the mean of their softmax."""
        return PathEnsemble(self.ends[0], points=points, path=self)

    def moved(self) -> None:
        """Forget statistics of points: the bends are others than before."""
        self._kept.clear()

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `(B, C)` at the middle of the path."""
        return self.between(0.5)(x)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for net in self._held:
            net._apply(fn)
        self.images = None if self.images is None else fn(self.images)
        self._kept = {t: {name: fn(value) for name, value in own.items()} for t, own in self._kept.items()}
        return self

    def save(self, folder: str | Path) -> None:
        """Write ends, bends, the statistics of all points so far, and `settings` (safetensors and JSON) to `folder`.

        The images stay outside: points whose statistics are kept need none.
        """
        folder, tensors = Path(folder), dict[str, Tensor]()
        for i, net in enumerate(self.ends):
            tensors |= {f"end.{i}.{name}": value for name, value in net.state_dict().items()}
        for i, bend in enumerate(self.corners[1:-1]):
            tensors |= {f"bend.{i}.{name}": value.detach() for name, value in bend.items()}
        places = sorted(self._kept)
        for i, t in enumerate(places):
            tensors |= {f"kept.{i}.{name}": value for name, value in self._kept[t].items()}
        checksum = _store.write_tensors(folder / "path.new", tensors)
        name = f"path-{checksum[:12]}.safetensors"
        (folder / "path.new").replace(folder / name)
        record = {
            "format": _FORMAT, "curve": self.curve, "bends": len(self.bends), "kept": places,
            "settings": self.settings, "file": name, "sha256": checksum,
        }  # fmt: skip
        _store.write_json(folder / FILE, record | {"checksum": _store.fingerprint(record)})
        for old in folder.glob("path-*.safetensors"):
            if old.name != name:
                old.unlink()

    @classmethod
    @torch.no_grad()
    def load(cls, folder: str | Path, model: nn.Module, images: Any = None) -> Self:
        """Return the path that `save` wrote, of networks of the architecture of `model`.

        FileNotFoundError or ValueError for a file that is missing, edited, truncated, or of another architecture.
        """
        path = Path(folder) / FILE
        record = _store.read_json(path)
        if not isinstance(record, dict) or "curve" not in record or "sha256" not in record:
            raise ValueError(f"{path} does not describe a path; give the folder that save() wrote")
        if record.get("format") != _FORMAT:
            raise ValueError(f"{path} has format {record.get('format')}; this version reads {_FORMAT}")
        if record.pop("checksum", None) != _store.fingerprint(record):
            raise ValueError(f"{path} was edited: its content does not match its checksum")
        tensors = _store.read_tensors(path.with_name(record["file"]), checksum=record["sha256"])
        part = functools.partial(_part, tensors)
        nets = [copy.deepcopy(model) for _ in range(2 + (record["bends"] if record["curve"] == "chain" else 0))]
        try:
            for net in nets:
                net.load_state_dict(part("end.1." if net is nets[-1] else "end.0."))
            found = cls(*nets, images=images)
            for i, bend in enumerate(found.corners[1:-1]):
                own = part(f"bend.{i}.")
                for name, parameter in bend.items():
                    parameter.copy_(own[name])
        except (RuntimeError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path} does not fit {type(model).__name__}: {reason}") from error
        found.settings = record["settings"]
        found._kept = {t: part(f"kept.{i}.") for i, t in enumerate(record["kept"])}
        return found.to(next(model.parameters()).device)


class PathEnsemble(Defence):
    """Networks at some points of a path as one classifier: the log of the mean of their softmax (ERMC).

    It is attacked as a whole, by its own gradient through all members. They are its submodules `members.0`,
    `members.1`, ..., so that a RAILS on it may measure affinity in layers of each: `RAILS(ensemble, ["members.0.fc1",
    "members.1.fc1"])`.

    Args:
        model: a network of the path's architecture, inputs `(B, *S)` to logits `(B, C)`.
        points: where on the path the members are, in [0, 1].
        path: the `ModePath`, or the folder that it was saved to; None: what was fitted is loaded with the defence.
        bounds: valid range of inputs.
    """

    kind, title = "path", "Path ensemble"

    def __init__(
        self, model: nn.Module, *, points: Any = (0.5,), path: ModePath | str | Path | None = None,
        bounds: Any = (0.0, 1.0),
    ) -> None:  # fmt: skip
        super().__init__(model, bounds=bounds)
        given = points.flatten().tolist() if isinstance(points, Tensor | np.ndarray) else points
        self.points = tuple(curves.place(t, "points") for t in (given if isinstance(given, list | tuple) else [given]))
        if not self.points:
            raise ValueError("points must name at least one place on the path, got none")
        if isinstance(path, str | Path):
            if not (Path(path) / FILE).is_file():
                raise ValueError(
                    f"path must be the folder of a path, as connect writes it; there is no {Path(path) / FILE}"
                )
            path = ModePath.load(path, model)
        elif path is not None and not isinstance(path, ModePath):
            raise TypeError(f"path must be a ModePath or the folder of one, got {path!r}")
        nets = [copy.deepcopy(model) for _ in self.points] if path is None else [path.at(t) for t in self.points]
        self.members = nn.ModuleList(_frozen(net) for net in nets)
        self._joined = path is not None

    def answer(self, x: Any, seed: int | None = None) -> Answer:
        """Return the answer to inputs `x` `(B, *S)`: the log of the members' mean probabilities, differentiable."""
        self.check_current()
        checked = incoming.inputs("x", x, bounds=self.bounds).to(self.device)
        # What an attack differentiates stays its own.
        inputs = x if isinstance(x, Tensor) and x.requires_grad else checked
        every = torch.stack([models.logits(net, inputs).log_softmax(1) for net in self.members])
        return Answer.of(every.logsumexp(0) - math.log(len(every)))

    def settings(self) -> dict[str, Any]:
        """Return the settings: where the members are, and the bounds."""
        return super().settings() | {"points": list(self.points)}

    def tensors(self) -> dict[str, Tensor]:
        """Return the members' weights and statistics."""
        return {name: value for name, value in self.members.state_dict().items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take them back; ValueError where the model is of another architecture."""
        try:
            self.members.load_state_dict(dict(tensors))
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"model is not of the architecture of the path: {reason}") from error
        self._joined = True

    def adopt(self, other: Self) -> None:
        """Share the members of `other`; ValueError where those of other points are asked for."""
        if self.points != other.points:
            raise ValueError(f"points must stay {other.points}: ask the path for another ensemble, got {self.points}")
        super().adopt(other)

    def check_current(self) -> None:
        """Raise ValueError unless its members are those of a path."""
        if not self._joined:
            raise ValueError("path must be given: path.ensemble(points), or path=FOLDER that connect wrote")


def _frozen(net: nn.Module) -> nn.Module:
    """Return a copy of a network, in eval mode, whose parameters need no gradient."""
    return copy.deepcopy(net).requires_grad_(False).eval()


def _images(images: Any) -> Tensor:
    """Return inputs `(N, *S)` of whatever range, of their own memory; ValueError unless they are finite."""
    found = incoming.tensor("images", images).detach().clone()
    if found.ndim < 2 or not len(found) or not found.is_floating_point() or not bool(torch.isfinite(found).all()):
        shape = f"{tuple(found.shape)} of {found.dtype}"
        raise ValueError(f"images must be one or more finite floating inputs (N, *S), got {shape}")
    return found


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
