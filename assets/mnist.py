"""MNIST, which the assets were trained on and are measured against."""

import torch
from torch import Tensor

from plumbing.options import UserError, one_line


def load_mnist(folder: str, train: bool) -> tuple[Tensor, Tensor]:
    """MNIST through torchvision -> images (N, 1, 28, 28) float32 in [-1, 1], labels (N,) long."""
    from torchvision.datasets import MNIST  # slow to import

    try:
        data = MNIST(folder, train=train, download=True)
    except Exception as error:  # for a web page in place of a file, a bare AssertionError
        text = f"put MNIST's four files into {folder}/MNIST/raw: those there are damaged or"
        text += f" cannot be downloaded ({type(error).__name__}: {error})"
        raise UserError(one_line(text)) from None
    return data.data[:, None].float() / 127.5 - 1, torch.as_tensor(data.targets)
