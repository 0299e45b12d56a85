"""Compare LPIPS with max pooling in its VGG, as used here, to LPIPS with average pooling.

    python benchmarks/pooling.py                     about a minute on 2 CPU cores

The paper follows Song et al., who call PIQ's LPIPS with replace_pooling=True: the same network with
average pooling. Here both measure the distance between eight digits of the shipped student and the
teacher's digits for the same noise. This is repeated for three VGGs with random weights; the linear
layers are LPIPS's own. Each line gives the ratio of the losses, the ratio of the norms of their
gradients, and the cosine between these gradients:

    average over max pooling: loss=1.06, gradient=1.08, cosine=0.98
"""

import copy
import sys
from functools import partial
from pathlib import Path

import torch
from lpips import LPIPS
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from dmd_loss import lpips_distance, regression_loss
from teachers import load_generator, load_teacher
from workloads import ASSETS, get_workload


def average_pooling(network: LPIPS) -> LPIPS:
    """A copy of the network with average pooling, as PIQ's replace_pooling=True makes it."""
    network = copy.deepcopy(network)
    for part in network.net.children():  # five slices of VGG
        for name, layer in part.named_children():
            if isinstance(layer, nn.MaxPool2d):
                setattr(part, name, nn.AvgPool2d(2))
    return network


def main() -> None:
    """Measure and print."""
    torch.manual_seed(0)
    z, cond = torch.randn(8, 1, 28, 28), torch.arange(8)
    with torch.no_grad():
        x = load_generator(ASSETS / "mnist_generator.safetensors")[0](z, cond)
        y = load_teacher(get_workload()).solve(z, cond, steps=18)
    x.requires_grad_(True)
    for _ in range(3):
        ours = LPIPS(net="vgg", pnet_rand=True, verbose=False).eval()
        networks = (average_pooling(ours), ours)
        losses = [regression_loss(x, y, partial(lpips_distance, each)) for each in networks]
        average, maximum = (torch.autograd.grad(loss, x)[0].flatten() for loss in losses)
        cosine = torch.cosine_similarity(average, maximum, dim=0)
        loss, gradient = losses[0] / losses[1], average.norm() / maximum.norm()
        print(f"average over max pooling: {loss=:.2f}, {gradient=:.2f}, {cosine=:.2f}")


if __name__ == "__main__":
    main()
