"""Batch statistics of a network: used without a trace, and computed anew from images."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from immunonet import models
from immunonet.paths.curves import normalisers

BATCH = 500


@contextlib.contextmanager
def batch_statistics(net: nn.Module) -> Iterator[None]:
    """Let a network's normalising layers use the statistics of the batch; what they keep is put back afterwards."""
    layers = list(normalisers(net).values())
    modes, kept = [layer.training for layer in layers], [_kept(layer) for layer in layers]
    for layer in layers:
        layer.train()
    try:
        yield
    finally:
        for layer, mode, values in zip(layers, modes, kept, strict=True):
            layer.train(mode)
            for key, value in values.items():
                setattr(layer, key, value)


def _kept(layer: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in layer.named_buffers(recurse=False)}


@torch.no_grad()
def recompute(net: nn.Module, x: Tensor, *, batch_size: int = BATCH) -> None:
    """Give the normalising layers of `net` the mean and variance, over all inputs `x` `(N, *S)`, of what reaches them.

    One pass in batches, in which every layer normalises by its batch; means and variances are pooled over all values,
    in float64, the variance unbiased. The published code takes the mean of the batches' variances, which lacks the
    variance between them. A network without such layers stays as it is.
    """
    layers, sums = normalisers(net), dict[str, tuple[int, Tensor, Tensor]]()
    if not layers:
        return

    def watch(name: str) -> object:
        def seen(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            values = inputs[0].detach().double().transpose(0, 1).flatten(1)
            count, mean = values.shape[1], values.mean(1)
            spread = (values - mean[:, None]).square().sum(1)
            if name in sums:
                n, old, squares = sums[name]
                step = mean - old
                # Chan et al. 1979: no large numbers are subtracted.
                mean = old + step * (count / (n + count))
                spread = squares + spread + step.square() * (n * count / (n + count))
                count += n
            sums[name] = count, mean, spread

        return layers[name].register_forward_pre_hook(seen)

    net.eval()
    hooks = [watch(name) for name in layers]
    try:
        with batch_statistics(net):
            for part in _batches(x, batch_size):
                net(models.own(net, part))
    finally:
        for hook in hooks:
            hook.remove()  # type: ignore[attr-defined]
    for name, (count, mean, spread) in sums.items():
        layer = layers[name]
        assert layer.running_mean is not None
        assert layer.running_var is not None
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(spread / max(1, count - 1))


def _batches(x: Tensor, size: int) -> list[Tensor]:
    """Return inputs in batches, the last of which is never of one alone: it has no variance."""
    parts = list(x.split(size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts
