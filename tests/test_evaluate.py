"""The evaluation's figures against closed forms, and the shipped assets against their claims."""

import json

import pytest
import torch

import evaluate
from edm_unet import heun_sample
from pairs import sample_noise
from workloads import ASSETS, MNIST_GENERATOR, load_generator, load_teacher

CPU = torch.device("cpu")


def random_covariance(seed, size=6):
    a = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return a @ a.T


def test_frechet_distance_of_diagonal_gaussians():
    """With commuting covariances it is |m1 - m2|^2 + |std_1 - std_2|^2."""
    m1, m2, s1, s2 = torch.rand(4, 6, dtype=torch.float64).unbind(0)
    found = evaluate.frechet_distance(m1, torch.diag(s1**2), m2, torch.diag(s2**2))
    assert found == pytest.approx(float(((m1 - m2) ** 2).sum() + ((s1 - s2) ** 2).sum()))


def test_frechet_distance_against_the_matrix_root_of_the_product():
    """tr (C1 C2)^(1/2) by the eigenvalues of the unsymmetric product itself."""
    c1, c2, zero = random_covariance(1), random_covariance(2), torch.zeros(6, dtype=torch.float64)
    root = torch.linalg.eigvals(c1 @ c2).sqrt().real.sum()
    expected = float(c1.trace() + c2.trace() - 2 * root)
    assert evaluate.frechet_distance(zero, c1, zero, c2) == pytest.approx(expected, rel=1e-6)
    assert evaluate.frechet_distance(zero, c1, zero, c1) == pytest.approx(0, abs=1e-8)


def test_diversity_is_the_mean_pairwise_distance_within_classes():
    images = torch.tensor([0.0, 3.0, 6.0, 10.0, 14.0]).reshape(5, 1, 1, 1)
    labels = torch.tensor([0, 0, 0, 1, 1])
    expected = ((3 + 3 + 6) / 3 + 4) / 2
    assert evaluate.class_diversity(images, labels) == pytest.approx(expected)


def test_statistics_are_those_of_numpy():
    features = torch.randn(50, 3)
    mean, covariance = evaluate.mean_and_covariance(features)
    torch.testing.assert_close(mean.float(), features.mean(0))
    centred = (features - features.mean(0)).double()
    torch.testing.assert_close(covariance, centred.T @ centred / 49, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("who", ["teacher", "student"])
def test_shipped_networks_make_digits(who):
    """200 digits, judged by the shipped classifier: nearly all of the class they were made for."""
    labels = torch.arange(200) % 10
    z = sample_noise(5, range(200), (1, 28, 28))
    with torch.inference_mode():
        if who == "teacher":
            images = heun_sample(load_teacher("mnist", None)[0].net, z, labels, steps=12)
        else:
            images = load_generator(MNIST_GENERATOR)[0](z, labels)
    _, predictions = evaluate.classify(evaluate.load_classifier(CPU), images, CPU)
    assert (predictions == labels).double().mean() >= 0.95


def test_shipped_files_are_small_and_say_what_they_are():
    sizes = {path.name: path.stat().st_size for path in ASSETS.iterdir()}
    assert sum(sizes.values()) < 5_000_000
    _, metadata = load_generator(MNIST_GENERATOR)
    assert json.loads(metadata["kwargs"])["img_resolution"] == 28
    assert metadata["teacher_sha256"] == load_teacher("mnist", None)[1]["sha256"]
