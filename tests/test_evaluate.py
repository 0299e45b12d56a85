"""The evaluation's figures against closed forms and against EDM's steps, one image at a time; the
shipped assets against their claims."""

import json
import socket
import threading
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import test_fid
import torch

import evaluate
import sample
from assets.mnist import load_mnist
from benchmarks.neighbours import neighbours
from edm_unet import EDMPrecond, heun_sample
from plumbing import digits, fid
from plumbing.files import read_tensors, write_tensors
from plumbing.options import UserError
from plumbing.pairs import sample_noise
from teachers import load_generator, load_teacher
from workloads import ASSETS, WORKLOADS, get_workload

fast = test_fid.fast  # a fixture: no Inception, and no roots of matrices
CPU = torch.device("cpu")
MNIST_GENERATOR = ASSETS / "mnist_generator.safetensors"


def test_diversity_is_the_mean_pairwise_distance_within_classes():
    images = torch.tensor([0.0, 3.0, 6.0, 10.0, 14.0]).reshape(5, 1, 1, 1)
    labels = torch.tensor([0, 0, 0, 1, 1])
    assert digits.class_diversity(images, labels).tolist() == pytest.approx([(3 + 3 + 6) / 3, 4])


def test_neighbours():
    """To the first neighbour, on a line; then of one distribution, in several parts."""
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0]])  # balls reach 1, 1, 1, 8
    generated = torch.tensor([[1.5], [2.5], [3.25], [30.0], [30.5]])  # 1, 0.75, 0.75, 0.5, 0.5
    found = neighbours(real, generated, k=1)
    # 1.5 and 2.5 lie in the balls of 1 and 2, 3.25 in that of 10; 30 and 30.5 in none.
    assert found["precision"] == 3 / 5
    assert found["recall"] == 2 / 4  # 1 and 2 lie in the ball of 1.5; 0 and 10 in none
    assert found["coverage"] == 3 / 4  # no generated point is within 1 of 0
    same = neighbours(*torch.randn(2, 1500, 8, generator=torch.Generator().manual_seed(0)))
    assert same["coverage"] == pytest.approx(1 - 2**-3, abs=0.03)
    assert same["precision"] == pytest.approx(same["recall"], abs=0.05) and same["recall"] > 0.8


def test_no_mnist_and_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", Mock(side_effect=OSError("no route to host")))
    with pytest.raises(UserError, match=r"^[^\n]*four files into .*MNIST/raw.*no route[^\n]*$"):
        load_mnist(str(tmp_path), train=True)


def test_shipped_files_are_small_and_belong_together():
    assert sum(path.stat().st_size for path in ASSETS.iterdir()) < 5_000_000
    teacher = load_teacher(get_workload()).record["sha256"]
    assert load_generator(MNIST_GENERATOR)[1]["teacher_sha256"] == teacher


def test_a_generator_of_another_teacher_is_not_compared(tmp_path):
    """The default teacher did not teach it: say so, rather than compare the two."""
    tensors, metadata = read_tensors(MNIST_GENERATOR)
    other = tmp_path / "generator.safetensors"
    write_tensors(other, tensors, metadata | {"teacher_sha256": "0123456789abcdef"})
    options = {"checkpoint": str(other), "device": "cpu"}
    words = "distilled from another teacher than mnist_teacher"
    for rows in ((), ("student", "untrained")):
        with pytest.raises(UserError, match=words):
            evaluate.load_rows(evaluate.Config(rows=rows, **options), CPU)
    with pytest.raises(UserError, match=words):
        sample.main(sample.Config(teacher=True, out=str(tmp_path / "x.png"), **options))
    assert not (tmp_path / "x.png").exists()
    given = {**options, "teacher_weights": str(ASSETS / "mnist_teacher.safetensors")}
    rows = evaluate.load_rows(evaluate.Config(**given), CPU)[1]
    assert len(rows) == 3 and words in rows[2].source  # it was the user's choice
    assert len(evaluate.load_rows(evaluate.Config(rows=("student",), **options), CPU)[1]) == 1


def test_ranks_share_the_digits(monkeypatch):
    """Three ranks' images add up to those of one process: of noise k and of class k mod 10."""
    config = evaluate.Config(checkpoint=str(MNIST_GENERATOR), rows=("student",), device="cpu")
    config, (row,) = evaluate.load_rows(config, CPU)
    config = replace(config, samples=23, batch_size=5, seed=3)
    judged = []

    def measure(images, labels, device):
        judged.append((images, labels))
        return {"fd": 1.0, "accuracy": 1.0, "diversity": 1.0}

    monkeypatch.setattr(evaluate, "measure", measure)
    for count in (1, 3):
        test_fid.on_ranks(count, lambda ranks: evaluate.measure_digits(row, config, ranks))
    (alone, labels), (shared, _) = judged  # by rank 0 alone
    assert ((alone - shared).abs() * 127.5 < 1.01).all()
    assert labels.tolist() == [k % 10 for k in range(23)]
    with torch.inference_mode():
        expected = row.solve(sample_noise("evaluation", 3, [17], (1, 28, 28)), torch.tensor([7]))
    torch.testing.assert_close(alone[17:18], expected.clamp(-1, 1), rtol=0, atol=0.01)


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    """A generator of CIFAR-10's shape with small random weights -> its file, its network. Beside it
    are real images' statistics (of none in particular), a generator whose weights are no numbers
    and the beginning of a UNet of Stable Diffusion."""
    kwargs = WORKLOADS["cifar10"].network | {
        "model_channels": 16, "num_blocks": 1, "channel_mult": [1, 1], "attn_resolutions": [],
    }  # fmt: skip
    torch.manual_seed(0)
    net = EDMPrecond(**kwargs).eval().requires_grad_(False)
    for weight in net.parameters():
        weight.copy_(torch.randn_like(weight) * 0.2)  # the last layer starts at zero
    path = tmp_path_factory.mktemp("cifar") / "generator.safetensors"
    metadata = {"role": "generator", "dataset": "cifar10", "kwargs": json.dumps(net.kwargs)}
    write_tensors(path, net.state_dict(), metadata | {"step": "7"})
    nan = {name: value * torch.nan for name, value in net.state_dict().items()}
    write_tensors(path.with_name("nan.safetensors"), nan, metadata | {"step": "7"})
    unet = {"down_blocks.0.resnets.0.conv1.weight": torch.zeros(1)}
    write_tensors(path.with_name("unet.safetensors"), unet, {})
    sigma = np.eye(fid.FEATURES) * 0.01
    np.savez(path.with_name("ref.npz"), mu=np.full(fid.FEATURES, 0.3), sigma=sigma)
    return path, net


def edm_images(net, seeds, steps=None):
    """EDM's generate.py, one image at a time; of steps None, the one-step generator of Section 3.1
    -> uint8 (N, 3, 32, 32)."""
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


def fid_config(cifar, /, **options):
    config = {"checkpoint": str(cifar[0]), "reference": str(cifar[0].with_name("ref.npz"))}
    return evaluate.Config(**config | {"samples": 9, "device": "cpu"} | options)


@pytest.mark.parametrize("case", [  # row, ranks, batch size, Heun steps, evaluations of the network
    ("student", 2, 2, None, 1),  # uneven shares
    ("student", 1, 9, None, 1),
    ("teacher", 1, 4, 3, 5),
    ("untrained", 1, 9, 1, 1),
])  # fmt: skip
def test_images_are_edms(case, cifar, fast, tmp_path, monkeypatch, capsys):
    """On any ranks in any batch, with seeds that pass 2^32."""
    row, count, batch_size, steps, evaluations = case
    (path, net), numbers, start, here = cifar, tmp_path / "n.json", 2**32 - 4, threading.local()
    config = fid_config(
        cifar, rows=(row,), teacher_weights=str(path), steps=3, batch_size=batch_size,
        seed=start, json=str(numbers),
    )  # fmt: skip
    monkeypatch.setattr(evaluate, "join_ranks", lambda device: here.ranks)

    def work(ranks):
        here.ranks = ranks
        evaluate.main(config)

    test_fid.on_ranks(count, work)
    features = test_fid.Projection()(edm_images(net, range(start, start + 9), steps))[0]
    expected = fid.mean_and_covariance(features)
    torch.testing.assert_close(fast, [expected], rtol=1e-3, atol=1e-5)  # once, by rank 0
    found = json.loads(numbers.read_text())[row]
    assert (found["evaluations"], found["seed"], found["count"]) == (evaluations, start, 9)
    assert found["fid"] == pytest.approx(float((expected[0] - 0.3).square().sum()), rel=1e-3)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith(row)]
    assert said == [f"{row}: FID {found['fid']:.2f} (9 images)"]


def test_precision_is_the_workloads(cifar, tmp_path, monkeypatch):
    """As in make_pairs.py and sample.py: half on a GPU for Stable Diffusion alone."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    (tmp_path / "captions.txt").write_text("a cat")
    config = fid_config(cifar, captions=str(tmp_path / "captions.txt"), samples=2, reference=None)
    for dataset, samples, found in (("cifar10", 2, "off"), ("sd15", 1, "fp16")):
        how, workload = replace(config, samples=samples), get_workload(dataset)
        assert evaluate.complete(how, workload, torch.device("cuda")).amp == found
        how = replace(how, amp="bf16")
        assert evaluate.complete(how, workload, torch.device("cuda")).amp == "bf16"


def test_a_teacher_needs_no_generator(cifar, fast, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "find_generator", lambda given: MNIST_GENERATOR)
    with pytest.raises(UserError, match="makes mnist, not cifar10"):
        evaluate.main(evaluate.Config(dataset="cifar10", device="cpu", samples=9))  # a student does
    monkeypatch.setattr(evaluate, "find_generator", None)
    options = {"dataset": "cifar10", "teacher_weights": str(cifar[0]), "steps": 1}
    options |= {"rows": ("teacher",)}
    evaluate.main(fid_config(cifar, **options | {"checkpoint": None}))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("generator.safetensors: evaluations 1, 9 images, seed 0")
    assert lines[-1].startswith("teacher: FID ") and lines[-1].endswith(" (9 images)")


MNIST = {"checkpoint": str(MNIST_GENERATOR)}
BAD = [
    ({"rows": ("pupil",)}, "--rows must be one of untrained, teacher, student, not 'pupil'"),
    ({"steps": 0}, "--steps must be at least 1, not 0"), ({"seed": -1}, "--seed must be at least"),
    ({"batch_size": 0}, "--batch-size must be"), ({"samples": 1}, "--samples must be at least 2"),
    ({"guidance": 2.0}, "--guidance is for sd15"), ({"device": "gpu7"}, "'gpu7' cannot be used"),
    ({"clip_score": True}, "--clip-score is not for cifar10"),
    ({"out": "pictures"}, "--out is not for cifar10"),
    ({"reference": "no.npz"}, "no.npz does not exist"),
    ({"checkpoint": "no.pt"}, "no.pt does not exist"),
    ({"rows": ("teacher",), "teacher_weights": "no.pkl"}, "no.pkl does not exist"),
    ({"dataset": "mnist"}, "makes cifar10, not mnist"),
    (MNIST, "--reference is not for mnist"),
    (MNIST | {"reference": None, "samples": 199}, "--samples must be at least 200"),
    ({"dataset": "sd15", "rows": ("teacher",), "checkpoint": None}, "a file of --captions"),
    ({"checkpoint": "unet.safetensors"}, "a file of --captions"),  # before it is loaded
    ({"checkpoint": "nan.safetensors"}, "the model gives NaN"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "word"), BAD)
def test_bad_input(options, word, cifar, fast, monkeypatch):
    monkeypatch.chdir(cifar[0].parent)
    with pytest.raises(UserError, match=word) as raised:
        evaluate.main(fid_config(cifar, **options))
    assert "\n" not in str(raised.value)
