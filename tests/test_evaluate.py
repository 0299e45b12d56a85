"""The evaluation's figures against closed forms and against EDM's steps, one image at a time; the
shipped assets against their claims."""

import json
import socket
from dataclasses import replace

import numpy as np
import pytest
import test_fid
import torch
from conftest import run_on_two_ranks

import evaluate
import sample
import teachers
from edm_unet import EDMPrecond, heun_sample
from plumbing import digits, fid
from plumbing.devices import Ranks
from plumbing.files import read_header, read_tensors, write_tensors
from plumbing.options import UserError
from plumbing.pairs import sample_noise
from teachers import load_generator, load_teacher
from workloads import ASSETS, WORKLOADS, get_workload

CPU = torch.device("cpu")
MNIST_GENERATOR = ASSETS / "mnist_generator.safetensors"
random_weights = test_fid.random_weights  # a fixture: a file like that of Inception's weights


# --------------------------------------------------------------------------------------------------
# MNIST


def test_diversity_is_the_mean_pairwise_distance_within_classes():
    images = torch.tensor([0.0, 3.0, 6.0, 10.0, 14.0]).reshape(5, 1, 1, 1)
    labels = torch.tensor([0, 0, 0, 1, 1])
    assert digits.class_diversity(images, labels).tolist() == pytest.approx([(3 + 3 + 6) / 3, 4])


def test_neighbours_on_a_line():
    """Real points 0, 1, 2, 10 and generated 1.5, 2.5, 3.25, 30, with balls to the first
    neighbour."""
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0]])  # balls reach 1, 1, 1, 8
    generated = torch.tensor([[1.5], [2.5], [3.25], [30.0]])  # 1, 0.75, 0.75, 26.75
    found = digits.neighbours(real, generated, k=1)
    # 1.5 and 2.5 lie in the balls of 1 and 2, 2.5 and 3.25 in that of 10; 30 in none.
    assert found["precision"] == 3 / 4
    # 1 and 2 lie in the ball of 1.5, 10 in that of 30 alone; 0 in none.
    assert found["recall"] == 3 / 4
    assert found["coverage"] == 3 / 4  # no generated point is within 1 of 0


def test_neighbours_tell_lost_modes_from_blur():
    draws = torch.Generator().manual_seed(0)
    real = torch.randn(1500, 8, generator=draws)
    real[750:, 0] += 20  # two modes
    again = torch.randn(1500, 8, generator=draws)
    again[750:, 0] += 20
    same = digits.neighbours(real, again)
    assert same["coverage"] == pytest.approx(1 - 2**-3, abs=0.03)
    lost = digits.neighbours(real, again[:750].repeat(2, 1) + 1e-3 * again)
    assert lost["precision"] > 0.9 * same["precision"]
    assert lost["recall"] < 0.55 and lost["coverage"] < 0.55 * same["coverage"] + 0.1
    blurred = digits.neighbours(real, again + 3 * torch.randn(1500, 8, generator=draws))
    assert blurred["precision"] < 0.3


def test_no_mnist_and_no_network(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    with pytest.raises(UserError, match=r"four files into .*MNIST/raw.*no route") as raised:
        digits.load_mnist(str(tmp_path), train=True)
    assert "\n" not in str(raised.value)


@pytest.mark.slow
@pytest.mark.parametrize("who", ["teacher", "student"])
def test_shipped_networks_make_digits(who):
    """200 digits, judged by the shipped classifier: nearly all of the class they were made for."""
    labels = torch.arange(200) % 10
    z = sample_noise("pairs", 5, range(200), (1, 28, 28))
    with torch.inference_mode():
        if who == "teacher":
            images = load_teacher(get_workload()).solve(z, labels, 8)
        else:
            images = load_generator(MNIST_GENERATOR)[0](z, labels)
    _, logits = digits.classify(digits.load_classifier(CPU), images, CPU)
    assert (logits.argmax(1) == labels).double().mean() >= 0.94


def test_shipped_files_are_small_and_say_what_they_are():
    sizes = {path.name: path.stat().st_size for path in ASSETS.iterdir()}
    assert sum(sizes.values()) < 5_000_000
    _, metadata = load_generator(MNIST_GENERATOR)
    assert json.loads(metadata["kwargs"])["img_resolution"] == 28
    assert metadata["teacher_sha256"] == load_teacher(get_workload()).record["sha256"]


def test_a_generator_of_another_teacher_is_not_compared(tmp_path):
    """The default teacher did not teach it: say so, rather than compare the two."""
    tensors, metadata = read_tensors(MNIST_GENERATOR)
    other = tmp_path / "generator.safetensors"
    write_tensors(other, tensors, metadata | {"teacher_sha256": "0123456789abcdef"})
    options = {"checkpoint": str(other), "device": "cpu"}
    for rows in ((), ("student", "teacher"), ("student", "untrained")):
        with pytest.raises(UserError, match="distilled from another teacher than mnist_teacher"):
            evaluate.load_rows(evaluate.Config(rows=rows, **options), CPU)
    with pytest.raises(UserError, match="distilled from another teacher than mnist_teacher"):
        sample.main(sample.Config(teacher=True, out=str(tmp_path / "x.png"), **options))
    assert not (tmp_path / "x.png").exists()
    given = {**options, "teacher_weights": str(ASSETS / "mnist_teacher.safetensors")}
    assert len(evaluate.load_rows(evaluate.Config(**given), CPU)[1]) == 3
    assert len(evaluate.load_rows(evaluate.Config(rows=("student",), **options), CPU)[1]) == 1


def test_ranks_share_the_digits(monkeypatch):
    """Three ranks' images add up to those of one process: of noise k and of class k mod 10."""
    config = evaluate.Config(checkpoint=str(MNIST_GENERATOR), rows=("student",), device="cpu")
    config, (row,) = evaluate.load_rows(config, CPU)
    config = replace(config, samples=23, batch_size=5, seed=3)
    parts, judged = [], []

    def measure(images, labels, device):
        judged.append((images, labels))
        return {"fd": 1.0, "accuracy": 1.0, "diversity": 1.0}

    monkeypatch.setattr(evaluate, "measure", measure)
    evaluate.measure_digits(row, config, Ranks(0, 1, CPU))
    ((whole, labels),) = judged
    monkeypatch.setattr(Ranks, "sum", lambda self, images: parts.append(images) or images)
    for rank in range(3):
        evaluate.measure_digits(row, config, Ranks(rank, 3, CPU))
    assert len(judged) == 2  # rank 0 alone judges
    assert ((whole - sum(parts)).abs() * 127.5 < 1.01).all()

    assert labels.tolist() == [k % 10 for k in range(23)]
    with torch.inference_mode():
        expected = row.solve(sample_noise("evaluation", 3, [17], (1, 28, 28)), torch.tensor([7]))
    torch.testing.assert_close(whole[17:18], expected.clamp(-1, 1), rtol=0, atol=0.01)


# --------------------------------------------------------------------------------------------------
# FID


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    """A generator of CIFAR-10's shape with small random weights -> its file, its network."""
    kwargs = WORKLOADS["cifar10"].network | {
        "model_channels": 16, "num_blocks": 1, "channel_mult": [1, 1], "attn_resolutions": [],
    }  # fmt: skip
    torch.manual_seed(0)
    net = EDMPrecond(**kwargs).eval().requires_grad_(False)
    for weight in net.parameters():
        weight.copy_(torch.randn_like(weight) * 0.2)  # the last layer starts at zero
    path = tmp_path_factory.mktemp("cifar") / "generator.safetensors"
    metadata = {"role": "generator", "dataset": "cifar10", "kwargs": json.dumps(net.kwargs)}
    write_tensors(path, net.state_dict(), metadata | {"step": 7})
    return path, net


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Statistics of no images in particular, in EDM's layout."""
    path = tmp_path_factory.mktemp("reference") / "ref.npz"
    np.savez(path, mu=np.full(fid.FEATURES, 0.3), sigma=np.eye(fid.FEATURES) * 0.01)
    return path


def edm_images(net, seeds, steps=None):
    """EDM's generate.py, one image at a time; of steps None, the one-step generator of Section 3.1.

    Returns uint8 (N, 3, 32, 32).
    """
    images = []
    for seed in seeds:
        generator = torch.Generator("cpu").manual_seed(int(seed) % (1 << 32))
        latents = torch.randn([1, 3, 32, 32], generator=generator)
        label = torch.eye(10)[torch.randint(10, size=[1], generator=generator)]
        if steps is None:
            image = net(80.0 * latents, 80.0, label)
        else:
            image = heun_sample(net, latents, label, steps)
        images.append((image * 127.5 + 128).clip(0, 255).to(torch.uint8))
    return torch.cat(images)


@pytest.mark.slow
def test_fid_on_two_ranks_is_edms(cifar, reference, random_weights, tmp_path):
    """By command, against EDM's steps here: seeds that pass 2^32, two ranks, uneven shares."""
    path, net = cifar
    start, numbers = 2**32 - 4, tmp_path / "numbers.json"
    result = run_on_two_ranks(
        "evaluate.py", "--checkpoint", path, "--samples", 7, "--batch-size", 2, "--seed", start,
        "--reference", reference, "--device", "cpu", "--json", numbers,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr

    images = edm_images(net, range(start, start + 7))
    drawn = fid.mean_and_covariance(fid.inception("cpu")(images)[0])
    expected = fid.frechet_distance(*drawn, *test_fid.read(reference))
    # A rounding to uint8 may fall the other way, which moves the features a little.
    assert json.loads(numbers.read_text())["student"]["fid"] == pytest.approx(expected, rel=1e-4)
    last = result.stdout.splitlines()[-1]
    assert last.startswith("student: FID ") and last.endswith(" (7 images)")
    assert float(last.split()[2]) == pytest.approx(expected, rel=1e-4, abs=0.01)
    assert result.stdout.count("student: FID") == 1  # rank 0 alone prints


@pytest.fixture
def fast(monkeypatch):
    """A small network in Inception's place, and a distance that takes no roots of matrices -> a
    list of the drawn images' (mean, covariance)."""
    drawn = []

    def distance(mean_1, cov_1, mean_2, cov_2):
        drawn.append((mean_1, cov_1))
        return float((mean_1 - mean_2).square().sum())

    monkeypatch.setattr(evaluate, "inception", lambda device: test_fid.Projection())
    monkeypatch.setattr(evaluate, "frechet_distance", distance)
    return drawn


def fid_config(cifar, ref, /, **options):
    config = {"checkpoint": str(cifar[0]), "reference": str(ref), "samples": 9}
    return evaluate.Config(**config | {"device": "cpu"} | options)


@pytest.mark.parametrize(
    ("row", "batch_size", "steps", "evaluations"),
    [
        ("student", 2, None, 1),
        ("student", 9, None, 1),
        ("teacher", 4, 3, 5),
        ("untrained", 9, 1, 1),
    ],
)
def test_images_are_edms_in_any_batch(
    cifar, reference, fast, tmp_path, row, batch_size, steps, evaluations
):
    """All rows; the teacher takes 3 Heun steps, and one is the untrained student."""
    (path, net), numbers = cifar, tmp_path / "numbers.json"
    config = fid_config(
        cifar, reference, rows=(row,), teacher_weights=str(path), steps=3, batch_size=batch_size,
        seed=5, json=str(numbers),
    )  # fmt: skip
    evaluate.main(config)
    features = test_fid.Projection()(edm_images(net, range(5, 14), steps))[0]
    expected = fid.mean_and_covariance(features)
    torch.testing.assert_close(fast, [expected], rtol=1e-3, atol=1e-5)
    found = json.loads(numbers.read_text())[row]
    assert (found["evaluations"], found["seed"], found["count"]) == (evaluations, 5, 9)


def test_a_teacher_needs_no_generator(cifar, reference, fast, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "find_generator", lambda given: MNIST_GENERATOR)
    with pytest.raises(UserError, match="makes mnist, not cifar10"):
        evaluate.main(evaluate.Config(dataset="cifar10", device="cpu"))  # the student does
    monkeypatch.setattr(evaluate, "find_generator", None)
    options = {"dataset": "cifar10", "teacher_weights": str(cifar[0]), "steps": 1}
    options |= {"rows": ("teacher",)}
    evaluate.main(fid_config(cifar, reference, **options | {"checkpoint": None}))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("generator.safetensors: evaluations 1, 9 images, seed 0")
    assert lines[-1].startswith("teacher: FID ") and lines[-1].endswith(" (9 images)")


# --------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"rows": ("pupil",)}, "--rows must be one of untrained, teacher, student, not 'pupil'"),
        ({"steps": 0}, "--steps must be at least 1, not 0"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"samples": 1}, "--samples must be at least 2, not 1"),
        ({"seed": -1}, "--seed must be at least 0"),
        ({"guidance": 2.0}, "--guidance is for sd15"),
        ({"clip_score": True}, "--clip-score is not for cifar10"),
        ({"out": "pictures"}, "--out is not for cifar10"),
        ({"reference": "no.npz"}, "no.npz does not exist"),
        ({"checkpoint": "no.pt"}, "no.pt does not exist"),
        ({"dataset": "mnist"}, "makes cifar10, not mnist"),
        ({"dataset": "cifar10", "checkpoint": str(MNIST_GENERATOR)}, "makes mnist, not cifar10"),
        ({"rows": ("teacher",), "teacher_weights": "no.pkl"}, "no.pkl does not exist"),
        ({"device": "gpu7"}, "'gpu7' cannot be used"),
    ],
)
def test_bad_input(options, word, cifar, reference, fast):
    with pytest.raises(UserError, match=word) as raised:
        evaluate.main(fid_config(cifar, reference, **options))
    assert "\n" not in str(raised.value)


def test_what_mnist_does_not_have():
    for options, word in (
        ({"reference": "ref.npz"}, "--reference is not for mnist"),
        ({"samples": 199}, "--samples must be at least 200"),
    ):
        with pytest.raises(UserError, match=word):
            evaluate.main(
                evaluate.Config(checkpoint=str(MNIST_GENERATOR), rows=("student",), **options)
            )


def test_text_to_image_without_captions_is_refused_before_it_is_loaded(tmp_path, monkeypatch):
    path = tmp_path / "unet.safetensors"
    write_tensors(path, {"down_blocks.0.resnets.0.conv1.weight": torch.zeros(1)}, {})
    monkeypatch.setattr(teachers, "load_network", None)
    for options in ({"checkpoint": str(path)}, {"dataset": "sd15", "rows": ("teacher",)}):
        with pytest.raises(UserError, match="give a file of --captions"):
            evaluate.main(evaluate.Config(device="cpu", **options))


def test_images_that_are_no_numbers(cifar, reference, fast, tmp_path):
    path, net = cifar
    tensors = {name: value * torch.nan for name, value in net.state_dict().items()}
    write_tensors(tmp_path / "nan.safetensors", tensors, read_header(path)[1])
    with pytest.raises(UserError, match=r"nan\.safetensors \(step 7\) gives NaN"):
        evaluate.main(fid_config((tmp_path / "nan.safetensors", net), reference))
