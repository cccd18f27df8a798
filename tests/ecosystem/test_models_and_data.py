"""Networks, data and metrics of other libraries, with RAILS between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ecosystem_nets import examples, fitted, net
from torch import Tensor, nn

from immunonet import RAILS, Maturation, load


@pytest.mark.parametrize("wrap", [lambda n: torch.compile(n, backend="eager"), nn.DataParallel])
def test_wrapped_networks_respond_as_the_bare_one(wrap: Any, batch: tuple[Tensor, Tensor]) -> None:
    x, _ = batch
    plain, wrapped = fitted(net(), "1").respond(x), fitted(wrap(net()), "1").respond(x)
    assert torch.equal(wrapped.labels, plain.labels)
    torch.testing.assert_close(wrapped.votes, plain.votes)


def test_a_metric_in_batches(rails: RAILS, batch: tuple[Tensor, Tensor]) -> None:
    """The protocol of torchmetrics: update(preds, target), then compute()."""

    class Accuracy:
        right = total = 0

        def update(self, preds: Tensor, target: Tensor) -> None:
            self.right += int((preds.argmax(1) == target).sum())
            self.total += len(target)

        def compute(self) -> float:
            return self.right / self.total

    metric = Accuracy()
    for part, labels in zip(batch[0].split(5), batch[1].split(5), strict=True):
        metric.update(rails(part), labels)
        metric.update(rails.predict_proba(part), labels)
    assert metric.compute() == float((rails.predict(batch[0]) == batch[1]).float().mean())


def test_a_dataset_of_hugging_face_is_fitted_on(batch: tuple[Tensor, Tensor]) -> None:
    datasets = pytest.importorskip("datasets")
    x, y = examples(90)
    rows = datasets.Dataset.from_dict({"image": x.tolist(), "label": y.tolist()}).with_format("torch")
    made = RAILS(net(), "input", maturation=Maturation(population=60, generations=3), seed=0)
    assert torch.equal(made.fit(rows).predict(batch[0]), fitted(net()).predict(batch[0]))


def test_an_image_classifier_of_transformers(batch: tuple[Tensor, Tensor]) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        image_size=6, patch_size=3, num_channels=1, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, num_labels=3,
    )  # fmt: skip

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.classifier = transformers.ViTForImageClassification(config).eval()

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.classifier(x).logits
            return logits

    assert fitted(Logits().eval(), "classifier.vit.embeddings").predict(batch[0]).shape == (12,)


def test_an_exported_base_lies_beside_the_saved_defence(tmp_path: Path, rails: RAILS) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    rails.save(tmp_path)
    torch.onnx.export(rails.model, (torch.rand(1, 1, 6, 6),), tmp_path / "base.onnx", dynamo=True)
    onnx.checker.check_model(tmp_path / "base.onnx")
    assert load(tmp_path, rails.model).kind == "rails"
