"""What the experiments of a study share: images, networks, adversarial examples, fitted and tuned defences."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from immunonet import RAILS, DkNN, Maturation, _store
from immunonet.attacks import FGSM, PGD
from immunonet.data import Images, sample
from immunonet.defences.repertoire import check_classes
from immunonet.evaluation.asking import describe_attack
from immunonet.evaluation.benchmark import neighbour_scores
from immunonet.evaluation.journal import Journal
from immunonet.features.names import Layer
from immunonet.studies.settings import Study

# Fitted defences that are kept: more would not fit in memory where layers are wide.
KEPT = 2
# Images that a fit calibrates on where only labels are asked for.
CALIBRATION = 50

Attack = FGSM | PGD | None
Metric = Literal["cosine", "euclidean"]
T = TypeVar("T", RAILS, DkNN)


class Lab:
    """The data, networks and defences of one study on one machine.

    `nets`: the bases by name, on the device that everything runs on; `training`: the repertoire; `held_out`: the
    validation split, for calibration, tuning and ablations; `test`; `others`: other datasets' test splits by name;
    of the validation split, and of the others where the study's `order` is "random", the first few are a random sample;
    `layer(name, net)` returns what a layer's name stands for; `folder` keeps adversarial examples; `journal` keeps
    what was tuned.
    """

    def __init__(
        self,
        study: Study,
        *,
        nets: dict[str, nn.Module],
        training: Images,
        held_out: Images,
        test: Images,
        others: dict[str, Images],
        layer: Callable[[str, nn.Module], Layer],
        folder: Path,
        journal: Journal,
    ) -> None:
        self.study, self.nets, self.folder, self.journal = study, nets, folder, journal
        self.training, self.held_out = training, held_out[sample(len(held_out))]
        if study.order == "random":
            test, others = test[sample(len(test))], {name: it[sample(len(it))] for name, it in others.items()}
        self.splits = {"validation": self.held_out, "test": test} | others
        self.device = next(next(iter(nets.values())).parameters()).device
        self._layer = layer
        self._weights = {name: digest(net) for name, net in nets.items()}
        self._fitted: dict[str, RAILS | DkNN] = {}
        self._calibrated: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()

    def weights(self, base: str) -> str:
        """Return the sha256 of a base's weights."""
        return self._weights[base]

    def images(self, split: str, part: slice) -> tuple[Tensor, Tensor]:
        """Return some images and labels of a split, on the device."""
        found = self.splits[split][part]
        return found.x.to(self.device), found.y.to(self.device)

    def where(self, split: str, n: int) -> list[int] | dict[str, Any]:
        """Return what a row says about which images the first `n` of a split are."""
        if split != "validation" and self.study.order == "file":
            return [0, n]
        return {"sample": [n, len(self.splits[split])], "seed": 0}

    def adversarials(self, base: str, attack: Attack, split: str, part: slice) -> Tensor:
        """Return some images of a split under an attack on a base; they are kept by the hash of all they depend on."""
        x, y = self.images(split, part)
        if attack is None:
            return x
        made_of = {
            "weights": self.weights(base),
            "attack": type(attack).__name__,
            "settings": describe_attack(attack),
            "images": hashlib.sha256(x.cpu().contiguous().numpy().tobytes()).hexdigest(),
        }
        path = self.folder / "adversarials" / f"{_store.fingerprint(made_of)[:20]}.safetensors"
        if not path.exists():
            _store.write_tensors(path, {"x": attack(self.nets[base], x, y).adversarials})
        return _store.read_tensors(path)["x"].to(self.device)

    def maps(self, base: str, layers: Sequence[str]) -> list[Layer]:
        """Return the feature maps that the names of layers stand for."""
        return [self._layer(name, self.nets[base]) for name in layers]

    def examples(self, repertoire: int | None) -> tuple[Tensor, Tensor]:
        """Return a fixed random sample of so many training examples, in their original order (None: all)."""
        if repertoire is None:
            return self.training.x, self.training.y
        chosen = sample(len(self.training), repertoire).sort().values
        return self.training.x[chosen], self.training.y[chosen]

    def rails(
        self,
        base: str,
        layers: Sequence[str],
        maturations: list[Maturation],
        *,
        options: dict[str, Any] | None = None,
        repertoire: int | None = None,
    ) -> RAILS:
        """Return a RAILS to ask for labels; one with the same features is used again, with other settings."""
        made_of = ["rails", base, list(layers), options or {}, repertoire]
        new = RAILS(self.nets[base], self.maps(base, layers), maturation=maturations, **options or {})
        rails = cast(RAILS, self._keep(made_of, new, repertoire))
        check_classes(rails.repertoire.y, rails.classes, max(m.neighbours for m in maturations))
        rails.maturations = new.maturations
        return rails

    def dknn(
        self,
        base: str,
        layers: Sequence[str],
        neighbours: int,
        metric: Metric,
        *,
        repertoire: int | None = None,
    ) -> DkNN:
        """Return a DkNN to ask for labels; one with the same features is used again, with other neighbours."""
        new = DkNN(self.nets[base], self.maps(base, layers), neighbours=neighbours, metric=metric)
        dknn = cast(DkNN, self._keep(["dknn", base, list(layers), metric, repertoire], new, repertoire))
        dknn.neighbours = neighbours
        return dknn

    @torch.no_grad()
    def calibrated(self, defence: T) -> T:
        """Return a defence of `rails` or `dknn` calibrated for its present settings on all of the validation split."""
        settings = defence.settings()
        if self._calibrated.get(defence) != settings:
            x, y = self.held_out.x.to(self.device), self.held_out.y.to(self.device)
            defence.calibration = defence._calibrate(x, y)
            self._calibrated[defence] = settings
        return defence

    def tuned(
        self,
        base: str,
        candidates: Sequence[Sequence[str]],
        metrics: Sequence[Metric],
        *,
        repertoire: int | None = None,
    ) -> dict[str, Any]:
        """Return the `layers`, `neighbours` and `metric` with which DkNN does best on validation, and that `accuracy`.

        It is the mean over the study's tuning images, clean and attacked. The first of the candidates, then the
        fewest neighbours win a tie.
        """
        found = [
            {"layers": list(layers), "neighbours": k, "metric": metric, "accuracy": score}
            for layers in candidates
            for k, metric, score in self._scores(base, layers, metrics, repertoire)
        ]
        best = max(choice["accuracy"] for choice in found)
        first = next(choice for choice in found if choice["accuracy"] == best)
        images = min(self.study.tuning.images, len(self.held_out))
        return first | {
            "images": images,
            "slice": self.where("validation", images),
            "candidates": [list(layers) for layers in candidates],
        }

    def _scores(
        self, base: str, layers: Sequence[str], metrics: Sequence[Metric], repertoire: int | None
    ) -> list[tuple[int, Metric, float]]:
        """Return the accuracy of DkNN for each number of neighbours and metric, the fewest neighbours first."""
        tuning, scores = self.study.tuning, []
        part = slice(0, min(tuning.images, len(self.held_out)))
        counts = sorted(k for k in tuning.neighbours if k <= len(self.examples(repertoire)[1]))
        for metric in metrics:
            key = f"tuning {base} {'+'.join(layers)} {metric} {repertoire}"
            if key not in self.journal:
                _, y = self.images("validation", part)
                attacks = [self.study.attack(name) for name in tuning.attacks]
                versions = [self.adversarials(base, attack, "validation", part) for attack in attacks]
                dknn = self.dknn(base, layers, counts[-1], metric, repertoire=repertoire)
                self.journal.add(key, list(neighbour_scores(dknn, counts, versions, y).values()))
            scores += [(k, metric, score) for k, score in zip(counts, self.journal[key], strict=True)]
        return sorted(scores, key=lambda score: score[0])

    def _keep(self, made_of: list[Any], new: RAILS | DkNN, repertoire: int | None) -> RAILS | DkNN:
        key = _store.fingerprint(made_of)
        if key in self._fitted:
            self._fitted[key] = self._fitted.pop(key)  # the last used is the last to go
        else:
            while len(self._fitted) >= KEPT:
                del self._fitted[next(iter(self._fitted))]
            few = self.held_out[:CALIBRATION]  # labels do not depend on it; `calibrated` does it in earnest
            self._fitted[key] = new.fit(*self.examples(repertoire), calibration=(few.x, few.y))
        return self._fitted[key]


def digest(net: nn.Module) -> str:
    """Return the sha256 of a network's weights."""
    found = hashlib.sha256()
    for name, value in net.state_dict().items():
        found.update(name.encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
