"""benchmarks/memory.py: what it counts, and what tensors without data find out."""

import contextlib
import math
from dataclasses import replace

import pytest
import torch

import train
from benchmarks import memory
from dmd_loss import l2_distance
from sd_loader import SD15
from workloads import WORKLOADS, get_workload

MiB = 2**20


def test_memory_is_counted_until_it_is_freed():
    """In units of 512 bytes, and once for all views of it."""
    with memory.Storages() as storages:
        x = torch.zeros(1000)  # 4000 bytes
        view, y = x[:3], torch.ones(1)
        assert (storages.bytes, storages.peak) == (4096 + 512, 4096 + 512)
        del x, y
        assert (storages.bytes, storages.peak) == (4096, 4096 + 512)
        del view
        weight = torch.ones(256, 512, requires_grad=True)
        inputs = torch.ones(128, 256)
        storages.peak = 0
        (inputs @ weight).relu().sum().backward()
    # At the peak: the weight, its inputs, relu's gradient, and the weight's gradient.
    assert storages.peak / MiB == pytest.approx(0.5 + 0.125 + 0.25 + 0.5, rel=0.01)
    assert storages.bytes / MiB == pytest.approx(0.5 + 0.125 + 0.5, rel=0.01)


@pytest.fixture
def small(monkeypatch):
    """Networks of one family each, with little in them."""
    few = {"model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [28]}
    for name in ("mnist", "imagenet64"):
        row = WORKLOADS[name]
        monkeypatch.setitem(WORKLOADS, name, replace(row, network=row.network | few))
    for part, sizes in {
        "unet": {"block_out_channels": [32, 32], "layers_per_block": 1, "sample_size": 8},
        "text_encoder": {"num_hidden_layers": 1},
        "tiny_vae": {"decoder_block_out_channels": [4, 4], "num_decoder_blocks": [1, 1]},
    }.items():
        monkeypatch.setitem(SD15, part, SD15[part] | sizes)
    monkeypatch.setattr(memory, "distance_of", lambda workload, device: l2_distance)


@pytest.mark.parametrize(("amp", "parts"), [("off", 1), ("bf16", 2)])
def test_a_step_without_data_takes_as_much_as_one_with_data(small, monkeypatch, amp, parts):
    def peak():
        return memory.peak.__wrapped__("mnist", 4, 2, amp=amp, parts=parts)

    estimate = peak()
    monkeypatch.setattr(memory, "without_data", contextlib.nullcontext)
    assert estimate == pytest.approx(peak(), rel=0.01)


def test_what_several_gpus_and_further_parts_add(small):
    """The gradients of both networks, all the time, and the samples of the other parts."""

    def peak(B, **how):
        return memory.peak.__wrapped__("mnist", B, B, amp="off", **how) * memory.GiB

    with memory.without_data():
        mu = memory.teacher_of(WORKLOADS["mnist"]).mu_real
    network = sum(math.ceil(4 * each.numel() / 512) * 512 for each in mu.parameters())
    assert network < peak(2, several=True) - peak(2) < 2.1 * network
    # In parts, there are gradients beside the buckets.
    added = peak(4, parts=2, several=True) - peak(4, parts=2)
    assert added == pytest.approx(2 * network, rel=0.1)
    # A part: z, z_ref, y_ref, two noises and x, of two samples each.
    samples = 6 * 2 * 4 * 28 * 28
    assert peak(6, parts=3) - peak(4, parts=2) == pytest.approx(samples, rel=0.1)


@pytest.mark.parametrize("dataset", ["mnist", "imagenet64", "sd15"])
def test_no_tensor_is_left_on_the_cpu(small, dataset):
    """Algorithm 1's losses on a GPU, without one, for PyTorch's builds that allow it."""
    device = torch.device("cuda")
    with memory.without_data():
        try:
            torch.rand(1, device=device).to("cpu").to(device)
        except (RuntimeError, AssertionError) as error:
            pytest.skip(f"no CUDA tensors without data: {str(error).splitlines()[0]}")
        workload = get_workload(dataset, batch_size=2, batch_size_ref=2, amp="off")
        run = memory.make_run(workload, device)
        batch = memory.draw_batch(run, 0, range(2), range(2))
        rest = (run.teacher, run.distance, workload, batch)
        x, *losses = train.generator_losses(run.G.model, run.mu_fake.model, *rest)
        losses.append(train.fake_loss(run.mu_fake.model, run.teacher, batch, x))
        pictures = run.teacher.decode(x)
    assert {each.device.type for each in (x, *losses, pictures)} == {"cuda"}


def test_the_smallest_number_of_parts_that_fits(monkeypatch):
    """A model of a peak: 10 GiB, 1 more for each 8 samples of a part, and 2 more on several GPUs;
    a card holds the peak, a tenth of it and 1 GiB. AdamW's state of CIFAR-10 takes 0.83 GiB."""

    def peak(dataset, B, R, parts, decoder, several):
        return 10 + (B + R) / parts / 8 + 2 * several

    monkeypatch.setattr(memory, "peak", peak)
    cells = {(gpus, card): memory.cell("cifar10", gpus, card, memory.Config())
             for gpus in (1, 7) for card in (10, 16, 24, 40, 80)}  # fmt: skip
    # 392 + 392 samples on one GPU: 108 GiB in one part, 59 in two; cards must have 119.8, 65.9.
    assert [cells[1, card] for card in (10, 16, 24, 40, 80)] == ["no", "28", "14", "4", "2"]
    assert [cells[7, card] for card in (10, 16, 24, 40, 80)] == ["no", "14", "2", "1", "1"]
    room = 1.1 * (12 + 2 / 8) + 1  # of 56 parts of 2 samples; a little less needs sharding
    assert memory.cell("cifar10", 7, room - 0.1, memory.Config()) == "28, sharded"
