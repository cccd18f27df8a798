import functools
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from immunonet import data, zoo
from immunonet import learning as loop


def toy(n=40, *, shape=(1, 2, 2), seed=0):
    """Return two classes of noisy images, one dark and one bright."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 2
    x = (torch.rand((n, *shape), generator=generator) + y.reshape(-1, *[1] * len(shape))) / 2
    return data.Images(x, y, ("dark", "bright"))


def linear(shape=(1, 2, 2), seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def weights(net):
    return {key: value.clone() for key, value in net.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


OPTIONS = {"epochs": 4, "batch_size": 16, "lr": 0.05, "seed": 3}


def fit(net, *, images=None, held=None, **options):
    return zoo.train(net, images or toy(), held or toy(20, seed=1), **(OPTIONS | options))


def test_same_seed_same_weights():
    nets = [linear(), linear(), linear()]
    histories = [fit(net, seed=seed) for net, seed in zip(nets, (3, 3, 4), strict=True)]
    assert histories[0] == histories[1] != histories[2]
    assert same(weights(nets[0]), weights(nets[1]))
    assert not same(weights(nets[0]), weights(nets[2]))


def test_the_global_generator_is_left_alone():
    state = torch.random.get_rng_state()
    fit(linear((1, 4, 4)), images=toy(shape=(1, 4, 4)), held=toy(shape=(1, 4, 4)), augment=True)
    assert torch.equal(torch.random.get_rng_state(), state)


class Interrupt(Exception):
    pass


HARDENING = zoo.Adversarial(eps=0.1, iterations=2, ramp=2)
RANDOM = zoo.Adversarial(threats={"linf": 0.1, "l1": 0.3}, combine="random", iterations=1)


KINDS = {
    "plain": {},
    "augmented": {"augment": True},
    "hardened": {"adversarial": HARDENING},
    "bfloat16": {"bfloat16": True},
    "mean": {"ema": 0.8},
    "random": {"adversarial": RANDOM},
}


@functools.cache
def uninterrupted(kind):
    net = linear()
    return fit(net, **KINDS[kind]), weights(net)


@pytest.mark.parametrize(
    ("kind", "epoch", "within"),
    [
        *((kind, 1, True) for kind in KINDS),
        *((kind, 3, False) for kind in KINDS),
        *(("plain", epoch, within) for epoch, within in ((0, True), (0, False), (1, False), (3, True))),
    ],
)
def test_an_interrupted_run_resumes_exactly(tmp_path, kind, epoch, within):
    options = {**KINDS[kind], "checkpoint": tmp_path / "run.safetensors"}
    expected, whole = uninterrupted(kind)

    def stop(step, steps, history):
        if len(history) == epoch and (step % (steps // 4) == (1 if within else 0)):
            raise Interrupt

    with pytest.raises(Interrupt):
        fit(linear(), on_progress=stop, **options)
    resumed = linear()
    assert fit(resumed, **options) == expected
    assert same(weights(resumed), whole)
    finished = linear()
    assert fit(finished, **options) == expected
    assert same(weights(finished), whole)
    assert [file.name for file in tmp_path.iterdir()] == ["run.safetensors"]


def test_early_stopping_keeps_the_best_epoch():
    opposite = toy(20, seed=1)
    opposite = data.Images(opposite.x, 1 - opposite.y, opposite.classes)
    net = linear()
    history = fit(net, held=opposite, epochs=30, patience=2)
    best = max(range(len(history)), key=lambda i: (history[i]["validation_accuracy"], -history[i]["validation_loss"]))
    assert len(history) == best + 3 < 30
    assert zoo.accuracy(net, opposite) == history[best]["validation_accuracy"]
    again = linear()
    partial = fit(again, held=opposite, epochs=30, patience=None)
    assert partial[: len(history)] == history
    assert len(partial) == 30


def test_progress_is_told_of_every_step_and_epoch():
    calls = []
    history = fit(linear(), on_progress=lambda step, steps, epochs: calls.append((step, steps, len(epochs))))
    per_epoch = math.ceil(40 / 16)
    expected = []
    for epoch in range(4):
        expected += [(epoch * per_epoch + i, 4 * per_epoch, epoch) for i in range(1, per_epoch + 1)]
        expected += [((epoch + 1) * per_epoch, 4 * per_epoch, epoch + 1)]
    assert calls == expected
    assert [row["epoch"] for row in history] == [1, 2, 3, 4]


def test_training_beats_nearest_centroids_on_digits():
    images, test = data.load("digits", "train")[:600], data.load("digits", "test")
    chosen, held = data.split(len(images))
    net = zoo.build("digits")
    zoo.train(net, images[chosen], images[held], epochs=4, batch_size=32, lr=5e-3)
    assert not net.training
    centroids = torch.stack([images.x[images.y == label].mean(0).flatten() for label in range(10)])
    nearest = torch.cdist(test.x.flatten(1), centroids).argmin(1)
    assert zoo.accuracy(net, test) > float((nearest == test.y).float().mean())


def test_accuracy_counts_and_keeps_the_mode():
    images = data.Images(torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]]), torch.tensor([0, 1, 1]), ("a", "b"))
    net = nn.Sequential(nn.Identity(), nn.BatchNorm1d(2))
    assert zoo.accuracy(net, images, batch_size=2) == pytest.approx(2 / 3)
    assert net.training
    assert zoo.accuracy(net.eval(), images) == pytest.approx(2 / 3)
    assert not net.training


def test_learning_rate():
    rates = [loop.learning_rate(step, 100, 2.0) for step in range(100)]
    assert rates[:20] == pytest.approx(np.linspace(0, 2, 22)[1:-1])
    assert rates[20] == 2.0
    assert rates[60] == pytest.approx(1.0)
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert 0 < rates[-1] < 0.01


def test_augmentation_flips_and_shifts():
    x = torch.rand((30, 2, 5, 6), generator=torch.Generator().manual_seed(0))
    found = loop._augmented(x, torch.Generator().manual_seed(1))
    assert torch.equal(found, loop._augmented(x, torch.Generator().manual_seed(1)))
    seen = set()
    for image, moved in zip(x.numpy(), found.numpy(), strict=True):
        matches = [
            (flip, top, left)
            for flip in (False, True)
            for padded in [np.pad(image[:, :, ::-1] if flip else image, ((0, 0), (4, 4), (4, 4)))]
            for top in range(9)
            for left in range(9)
            if np.array_equal(padded[:, top : top + 5, left : left + 6], moved)
        ]
        assert matches
        seen.add(matches[0])
    assert len(seen) > 20


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epochs": 0}, ValueError, "epochs must be at least 1"),
        ({"batch_size": 1.5}, TypeError, "batch_size must be an integer"),
        ({"lr": 0.0}, ValueError, "lr must be a finite number in"),
        ({"weight_decay": -1}, ValueError, "weight_decay must be"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"patience": 0}, ValueError, "patience must be at least 1"),
        ({"augment": "yes"}, TypeError, "augment must be True or False"),
        ({"bfloat16": 1}, TypeError, "bfloat16 must be True or False"),
        ({"held": toy()[:0]}, ValueError, "validation_images is empty"),
        ({"images": toy()[:0]}, ValueError, "train_images is empty"),
        ({"lr": 1e30}, ValueError, "the loss became .* at step .*: give a smaller lr than 1e"),
    ],
)
def test_bad_settings(options, error, message):
    net = linear()
    images, held = options.pop("images", toy()), options.pop("held", toy())
    with pytest.raises(error, match=message):
        zoo.train(net, images, held, **(OPTIONS | options))


def test_checkpoints_of_other_runs_are_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    fit(linear(), checkpoint=path)
    whole = path.read_bytes()
    with pytest.raises(ValueError, match=r"run\.safetensors was made with epochs=4 \(now 5\), lr=0.05 \(now 0.1\)"):
        fit(linear(), checkpoint=path, epochs=5, lr=0.1)
    with pytest.raises(ValueError, match=r"was made with adversarial=None \(now {'loss': 'pgd', 'eps': 0.1,"):
        fit(linear(), checkpoint=path, adversarial=HARDENING)
    with pytest.raises(ValueError, match=r"was made with images=\['\w{12}', '\w{12}'\] \(now"):
        fit(linear(), checkpoint=path, held=toy(20, seed=9))
    with pytest.raises(ValueError, match=r"was made with first_weights=\w{12} \(now \w{12}\)"):
        fit(linear(seed=1), checkpoint=path)
    assert path.read_bytes() == whole
    path.write_bytes(whole[:-7])
    with pytest.raises(ValueError, match=r"run\.safetensors is not a readable safetensors file"):
        fit(linear(), checkpoint=path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"run\.safetensors is not a training checkpoint"):
        fit(linear(), checkpoint=path)


class Edge(nn.Module):
    """A net at whose first weights the loss is finite and its slope is not."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return torch.stack([self.weight.sqrt() * x.flatten(1).sum(1), x.flatten(1).sum(1)], 1)


def test_weights_that_blow_up_at_the_last_step_name_step_and_rate():
    with pytest.raises(
        ValueError, match=r"the weights became NaN or infinite at step 1 of 1, lr 0.0\d+: give a smaller"
    ):
        zoo.train(Edge(), toy(), toy(), epochs=1, batch_size=100, lr=0.05)


def test_checkpoints_of_other_settings_are_refused_in_either_direction(tmp_path):
    path = tmp_path / "run.safetensors"
    fit(linear(), ema=0.9, checkpoint=path)
    with pytest.raises(ValueError, match=r"was made with ema=0.9 \(now None\)"):
        fit(linear(), checkpoint=path)
    path.unlink()
    settings = [
        zoo.Adversarial(threats=dict(order), iterations=1)
        for order in ((("linf", 0.1), ("l1", 0.2)), (("l1", 0.2), ("linf", 0.1)))
    ]
    fit(linear(), adversarial=settings[0], checkpoint=path)
    with pytest.raises(ValueError, match="was made with adversarial="):
        fit(linear(), adversarial=settings[1], checkpoint=path)


def test_a_last_batch_of_one_joins_the_one_before():
    history = fit(linear(), images=toy(33), epochs=1, batch_size=16)
    assert len(history) == 1


def test_dropout_is_the_same_in_every_run_and_touches_no_other_numbers():
    def net():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))

    torch.manual_seed(1)
    nets = [net(), net()]
    before = torch.random.get_rng_state()
    fit(nets[0])
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(7)
    fit(nets[1])
    assert same(weights(nets[0]), weights(nets[1]))
