"""MNIST, which the assets were trained on and are measured against."""

import torch
from torch import Tensor

from plumbing.options import UserError, one_line


def load_mnist(folder: str, train: bool) -> tuple[Tensor, Tensor]:
    """MNIST through torchvision -> images (N, 1, 28, 28) float32 in [-1, 1], labels (N,) long."""
    from torchvision.datasets import MNIST  # slow to import

    try:
        data = MNIST(folder, train=train, download=True)
    except (OSError, RuntimeError, ValueError) as error:
        text = f"put MNIST's four files into {folder}/MNIST/raw: they cannot be downloaded"
        raise UserError(one_line(f"{text} ({error})")) from None
    return data.data[:, None].float() / 127.5 - 1, torch.as_tensor(data.targets)
