"""A model that wants normalised inputs, wrapped so that it takes raw ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from immunonet import incoming


class Normalised(nn.Module):
    """Apply `model` to (x - mean) / std, per channel or feature (the first axis of a sample).

    x: float (B, C, ...), in its raw range. mean, std: one number for all channels, or C of them, in the units
    of x; std above 0. ValueError if they are not finite, differ in number, or do not fit the input's
    channels.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, model: nn.Module, mean: float | Sequence[float] | Tensor, std: float | Sequence[float] | Tensor
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self.model = model
        for name, value in (("mean", mean), ("std", std)):
            try:
                numbers = incoming.tensor(name, value).to(torch.float32, copy=True)
            except (TypeError, ValueError) as error:
                raise TypeError(f"{name} must be a number or one per channel, got {value!r}") from error
            if numbers.ndim > 1 or not numbers.numel() or not bool(torch.isfinite(numbers).all()):
                raise ValueError(f"{name} must be a finite number or one per channel, got {value!r}")
            self.register_buffer(name, numbers.reshape(-1))
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean and std must have one length, got {len(self.mean)} and {len(self.std)}")
        if bool((self.std <= 0).any()):
            raise ValueError(f"std must be above 0, got {std!r}")

    def forward(self, x: Tensor) -> Tensor:
        """Return the model's output on the normalised x."""
        if len(self.mean) not in (1, x.shape[1]):
            raise ValueError(f"mean and std have {len(self.mean)} channels, but x has shape {tuple(x.shape)}")
        shape = (1, -1) + (1,) * (x.ndim - 2)
        output: Tensor = self.model((x - self.mean.reshape(shape)) / self.std.reshape(shape))
        return output
