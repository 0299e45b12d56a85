"""Recall and coverage: whether two sets of digits, as features of a classifier, lie together."""

import torch
from torch import Tensor


def neighbours(real: Tensor, generated: Tensor, k: int = 3) -> dict[str, float]:
    """How two sets of features (N, D) overlap. The ball of a point reaches to its k-th nearest
    neighbour in the same set.

    Returns:
        Three shares, 0 .. 1. precision: generated points inside a real ball; recall: real points
        inside a generated ball (both Kynkaanniemi et al. 2019, arXiv 1904.06991); coverage: real
        balls with a generated point inside (Naeem et al. 2020, arXiv 2002.09797). For equal
        distributions, coverage is 1 - 2^-k, which is 0.875.
    """

    def radii(points: Tensor) -> Tensor:
        rows = (torch.cdist(part, points).kthvalue(k + 1).values for part in points.split(1000))
        return torch.cat(list(rows))  # (the nearest is the point itself)

    radius_real, radius_generated = radii(real), radii(generated)
    precision, recall, coverage = [], [], []
    for rows, radius in zip(real.split(1000), radius_real.split(1000), strict=True):
        distances = torch.cdist(rows, generated)  # (1000, N)
        precision.append((distances <= radius[:, None]).any(0))
        recall.append((distances <= radius_generated).any(1))
        coverage.append((distances <= radius[:, None]).any(1))
    shares = {
        "precision": torch.stack(precision).any(0),
        "recall": torch.cat(recall),
        "coverage": torch.cat(coverage),
    }
    return {name: float(share.double().mean()) for name, share in shares.items()}
