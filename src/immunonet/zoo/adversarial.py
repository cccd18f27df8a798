"""Adversarial training: the loss at the worst point that a short attack finds near each training image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from immunonet import _check, models
from immunonet.attacks import PGD
from immunonet.attacks._losses import log_odds
from immunonet.attacks.norms import NORMS
from immunonet.data import Images, sample

LOSSES = ("pgd", "trades")
_BALL = NORMS["linf"]


@dataclass(frozen=True, kw_only=True)
class Adversarial:
    """Settings of adversarial training within the L-infinity ball of radius `eps` and [0, 1].

    `loss` "pgd": the cross-entropy at the attacked image (Madry et al. 2018). "trades": the cross-entropy at the
    image itself plus `beta` times the divergence KL(image || attacked image), which the attack climbs in place
    of the cross-entropy (Zhang et al. 2019).

    The attack starts at a random point of the ball and takes `iterations` steps of size `step` (None: eps / 4)
    along the gradient's sign. It asks the network in eval mode, as it will be attacked, so that the points on
    its way do not enter the batch-norm averages (Pang et al. 2021); the loss is taken in training mode. `eps`
    and `step` grow linearly from 0 over the first `ramp` epochs: at a large `eps` a network may otherwise never
    leave the constant answer. Validation attacks within `validation_eps` (None: eps). All in units of the input.
    """

    loss: str = "pgd"
    eps: float = 8 / 255
    step: float | None = None
    iterations: int = 7
    beta: float = 6.0
    ramp: int = 0
    validation_eps: float | None = None

    def __post_init__(self) -> None:
        _check.keep(self, _check.choice, "loss", options=LOSSES)
        _check.keep(self, _check.number, "eps", least=0, most=1)
        _check.keep(self, _check.number, "step", "validation_eps", least=0, most=1, optional=True)
        _check.keep(self, _check.integer, "iterations")
        _check.keep(self, _check.number, "beta", least=0)
        _check.keep(self, _check.integer, "ramp", least=0)

    @property
    def measured_eps(self) -> float:
        """The radius within which validation attacks."""
        return self.eps if self.validation_eps is None else self.validation_eps

    def attacked(self, net: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator, epoch: float) -> Tensor:
        """Return the attacked images of `x` (B, C, H, W) with labels `y` (B,), `epoch` >= 0 epochs into training."""
        strength = min(1.0, epoch / self.ramp) if self.ramp else 1.0
        eps, step = strength * self.eps, strength * (self.eps / 4 if self.step is None else self.step)
        if eps == 0:
            return x  # no random number is drawn: plain training, bit for bit
        low, high = x.new_zeros(()), x.new_ones(())
        point = (x + _BALL.random_within(x, eps, generator)).clamp(low, high)
        with models.evaluating(net):
            with torch.no_grad():
                clean = models.ask(net, x).float() if self.loss == "trades" else None
            for _ in range(self.iterations):
                point.requires_grad_()
                logits = models.ask(net, point).float()
                climbed = log_odds(logits, y).sum() if clean is None else divergence(clean, logits)
                (gradient,) = torch.autograd.grad(climbed, point)
                point = _BALL.project(point.detach() + step * gradient.sign(), x, eps, low, high)
        return point

    def objective(self, net: nn.Module, x: Tensor, attacked: Tensor, y: Tensor) -> Tensor:
        """Return the mean loss of a batch, to be minimised."""
        logits = models.tensor_of(net(models.own(net, attacked))).float()
        if self.loss == "pgd":
            return F.cross_entropy(logits, y)
        clean = models.tensor_of(net(models.own(net, x))).float()
        return F.cross_entropy(clean, y) + self.beta * divergence(clean, logits) / len(x)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence in nats of softmax(q) from softmax(p), logits (B, C), summed over B."""
    return F.kl_div(q.log_softmax(1), p.log_softmax(1), reduction="sum", log_target=True)


def robust_accuracy(net: nn.Module, images: Images, *, eps: float, iterations: int = 10, most: int = 1000) -> float:
    """Return the share of images that `net` classifies rightly at every point PGD visits.

    Of more than `most` images it is that of a fixed random sample (`data.sample`) of as many. PGD in the L-infinity
    ball of radius `eps` with one random start and steps of eps / 4: an upper bound of the accuracy in the worst case.
    """
    if len(images) > most:
        images = images[sample(len(images), most)]
    device = next(net.parameters()).device
    attack = PGD(eps=eps, step=eps / 4, iterations=iterations)
    return 1 - float(attack(net, images.x.to(device), images.y.to(device)).success.double().mean())
