"""The networks and paths of a study: with weights of their own, or trained and kept by all that they depend on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from immunonet import _store, data, zoo
from immunonet.cli import common
from immunonet.defences.path import FILE, ModePath
from immunonet.evaluation.records import envelope
from immunonet.studies import Study


@dataclass(frozen=True, kw_only=True)
class Nursery:
    """Makes the networks of a study from `images`, training and validation, and keeps them in `out`.

    `models`: names of the bases' networks. `own`: whether the files of weights that a study names are those meant.
    """

    study: Study
    models: dict[str, str]
    images: tuple[data.Images, data.Images]
    device: torch.device
    out: Path
    own: bool

    def built(self, name: str) -> nn.Module:
        """Return a base network with its weights, or else those of its recipe, trained if they are not kept yet."""
        base, training = self.study.bases[name], self.images[0]
        classes = len(training.classes)
        if self.own and base.weights is not None:
            path = Path(base.weights)
            if path.exists() or path.with_suffix(".json").exists():
                return common.load_model(self.models[name], path, self.device, classes=classes)
        net = common.build_model(self.models[name], classes=classes, seed=base.training.seed).to(self.device)
        if base.start is not None:
            net.load_state_dict(self.built(base.start).state_dict())
        recipe = base.training.model_dump(mode="json", exclude_unset=True)
        made_of = {"model": self.models[name], "training": recipe, **self._made_of(net)}
        path = self.out / "weights" / f"{name}-{_store.fingerprint(made_of)[:12]}.safetensors"
        if not path.with_suffix(".json").exists():
            history = _trained(name, path, zoo.train, net, *self.images, **dict(base.training))
            zoo.save_weights(net, path, recipe={**envelope([]), **made_of, "history": history})
            _checkpoint(path).unlink()
        zoo.load_weights(net, path)
        return net.eval()

    def path(self, name: str, ends: list[nn.Module]) -> ModePath:
        """Return a path between networks, its bends trained, if they are, and its points settled, if not kept yet."""
        join = self.study.paths[name]
        found = ModePath(*ends, images=zoo.statistics_of(self.images[0]).to(self.device))
        settings = None if join.training is None else dict(join.training)
        if settings is not None:
            settings["threats"] = settings["threats"] or self.study.threats
        made_of = {"training": settings, **self._made_of(*ends)}
        folder = self.out / "paths" / f"{name}-{_store.fingerprint(made_of)[:12]}"
        if not (folder / FILE).exists():
            if settings is not None:
                _trained(name, folder / "path", zoo.connect, found, *self.images, **settings)
            for t in self.study.profile.places:
                found.at(t)
            found.save(folder)
            _checkpoint(folder / "path").unlink(missing_ok=True)
        return ModePath.load(folder, ends[0], images=found.images)

    def _made_of(self, *nets: nn.Module) -> dict[str, Any]:
        training = self.images[0]
        first = _store.digest([value for net in nets for value in net.state_dict().values()])
        return {"first": first, "images": _store.digest([training.x, training.y])}


def _trained(name: str, path: Path, train: Callable[..., list[zoo.Epoch]], *args: Any, **how: Any) -> list[zoo.Epoch]:
    common.note(f"training {name}")
    return common.trained(f"training {name}", _checkpoint(path), how.pop("epochs"), train, *args, **how)


def _checkpoint(path: Path) -> Path:
    return path.with_suffix(".checkpoint.safetensors")
