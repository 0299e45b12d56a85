"""EDM's networks against golden vectors, parameter counts and closed-form ODEs."""

import math

import pytest
import torch
from golden.networks import edm_network, edm_unet_inputs, relative_error

from edm_unet import EDMDenoiser, EDMPrecond, heun_sample, karras_sigmas


@pytest.mark.parametrize("name", ["song_int", "song_eps", "adm_int", "adm_eps"])
@torch.no_grad()
def test_network_matches_golden_vectors(name, monkeypatch):
    """In either memory layout. The tensors of the attention have consecutive channels in both:
    otherwise PyTorch falls back on HW x HW matrices without a word."""
    net, meta, data = edm_network(name)
    assert [k for k, _ in net.named_parameters()] == [k for k, _ in meta["param_keys"]]
    assert sum(p.numel() for p in net.parameters()) == meta["n_params"]
    for key, values in meta["fill_spot_check"].items():
        found = net.get_parameter(key).flatten()[: len(values)]
        torch.testing.assert_close(found, torch.tensor(values), rtol=0, atol=1e-7)

    seen, attend = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention",
        lambda *qkv: seen.extend(qkv) or attend(*qkv),
    )  # fmt: skip
    assert relative_error(net(data["x"], data["sigma"], data["labels"]), data["output"]) < 1e-5
    # The bare U-Net, where sigma's c_skip cannot hide an error.
    x, *rest = edm_unet_inputs(data)
    for layout in (torch.contiguous_format, torch.channels_last):
        unet = net.model.to(memory_format=layout)
        inside = unet(x.to(memory_format=layout), *rest)
        assert relative_error(inside, data["unet_output"]) < 1e-5
    attending = [module for module in net.modules() if getattr(module, "num_heads", 0)]
    assert len(seen) == 3 * 3 * len(attending) > 0
    assert all(each.stride(-1) == 1 for each in seen)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["song_int", "adm_int"])
def test_heun_trajectory_matches_golden_vectors(name):
    net, meta, data = edm_network(name)
    z, labels, expected = (data[f"heun_{key}"][:1] for key in ("latents", "labels", "end"))
    assert relative_error(heun_sample(net, z, labels, meta["heun"]["steps"]), expected) < 1e-5


CIFAR = dict(
    model_type="SongUNet", img_resolution=32, img_channels=3, channel_mult=[2, 2, 2],
    model_channels=128, augment_dim=9, dropout=0.13, channel_mult_noise=1,
    embedding_type="positional", encoder_type="standard", decoder_type="standard",
    resample_filter=[1, 1],
)  # fmt: skip
IMAGENET = dict(
    model_type="DhariwalUNet", img_resolution=64, img_channels=3, label_dim=1000,
    model_channels=192, channel_mult=[1, 2, 3, 4], dropout=0.1, use_fp16=True,
)  # fmt: skip


# EDM's files count 1,152 more for CIFAR-10: the augmentation embedding, unused here.
COUNTS = [(CIFAR | {"label_dim": 10}, 55_734_147), (CIFAR, 55_732_739), (IMAGENET, 295_899_267)]


@pytest.mark.parametrize(("kwargs", "count"), COUNTS)
def test_full_size_parameter_counts(kwargs, count):
    with torch.device("meta"):
        net = EDMPrecond(**kwargs)
    assert sum(p.numel() for p in net.parameters()) == count


def test_noise_levels():
    """The paper's table of T = 1000 levels, and EDM's 18, without a zero at the end."""
    sigma = EDMDenoiser(torch.nn.Identity()).sigma
    found = sigma[[0, 20, 980, 999]].tolist()
    assert found == pytest.approx([0.002, 0.00323, 72.05, 80], rel=1e-3)
    assert len(sigma) == 1000 and (sigma.diff() > 0).all()
    sigmas = karras_sigmas(18)
    assert len(sigmas) == 18 and sigmas[0] == pytest.approx(0.002) and sigmas[-1] == 80


class Recorder(torch.nn.Module):
    """A network's stand-in, x / 2, that keeps what it was called with."""

    def forward(self, x, noise_level, labels):
        self.given = x, noise_level, labels
        return x / 2


class Gaussian:
    """The exact denoiser of N(mean, std^2), and its exact ODE map from sigma = 80 to 0.

    dx/dsigma = (x - D)/sigma = sigma (x - mean) / (std^2 + sigma^2), so (x - mean) shrinks by
    std / sqrt(std^2 + 80^2).
    """

    def __init__(self, mean=0.3, std=0.5):
        self.mean, self.std, self.evaluations = mean, std, 0

    def __call__(self, x, sigma, class_labels=None):
        self.evaluations += 1
        gain = self.std**2 / (self.std**2 + sigma**2)
        return self.mean + gain * (x.double() - self.mean)

    def ode_end(self, z):
        shrink = self.std / (self.std**2 + 80**2) ** 0.5
        return self.mean + shrink * (80 * z.double() - self.mean)


def test_heun_converges_with_second_order():
    z = torch.randn(100, 1, 2, 2, dtype=torch.float64)
    errors = []
    for steps in (32, 64, 128):
        net = Gaussian()
        end = heun_sample(net, z, steps=steps)
        assert net.evaluations == 2 * steps - 1
        errors.append((end.double() - net.ode_end(z)).abs().max().item())
    # Halving the step must divide the error by about four.
    assert 3.2 < errors[0] / errors[1] < 5 and 3.2 < errors[1] / errors[2] < 5
    assert errors[2] < 2e-3


def test_heun_gives_the_labels_to_every_evaluation_and_builds_no_graph():
    """One step is the untrained generator."""
    labels, seen = torch.tensor([3, 1]), []

    def net(x, sigma, class_labels):
        seen.append(class_labels)
        return x * torch.ones((), requires_grad=True)

    end = heun_sample(net, torch.randn(2, 1, 2, 2), labels, steps=3)
    assert len(seen) == 5 and all(given is labels for given in seen)
    assert end.dtype == torch.float32 and not end.requires_grad
    net, z = Gaussian(), torch.randn(3, 1, 2, 2)
    torch.testing.assert_close(heun_sample(net, z, steps=1), net(80 * z, 80.0).float())


def test_the_denoiser_is_the_network_at_its_noise_table():
    """Here of another sigma_max; the table is no part of the weights' file."""
    mu = EDMDenoiser(Recorder(), sigma_max=40.0)
    assert mu.z_scale == pytest.approx(40) and not mu.state_dict()
    assert mu.alpha.tolist() == [1.0] * 1000
    # EDM Eq. 5 with rho = 7.
    ends = 0.002 ** (1 / 7), 40 ** (1 / 7)
    x_t, t, cond = torch.randn(3, 1, 2, 2), torch.tensor([0, 333, 999]), torch.tensor([4, 1, 0])
    assert torch.equal(mu(x_t, t, cond), x_t / 2)
    assert mu.net.given[0] is x_t and mu.net.given[2] is cond
    levels = [(ends[0] + i / 999 * (ends[1] - ends[0])) ** 7 for i in t.tolist()]
    assert mu.net.given[1].tolist() == pytest.approx(levels, rel=1e-5)


@pytest.mark.parametrize("label_dim", [0, 4])
def test_the_preconditioning_is_table_1s(label_dim):
    """With a sigma_data of its own, and with labels and noise levels in every form."""
    kwargs = dict(model_channels=4, channel_mult=[1], num_blocks=1, attn_resolutions=[])
    net = EDMPrecond(8, 1, label_dim, "SongUNet", sigma_data=0.7, **kwargs)
    net.model = Recorder()
    x, sigma = torch.randn(3, 1, 8, 8, dtype=torch.float64), [0.1, 1.0, 30.0]
    found = net(x, torch.tensor(sigma), torch.tensor([0, 3, 1]))
    inputs, c_noise, labels = net.model.given
    for i, s in enumerate(sigma):
        c_in, c_skip = 1 / math.sqrt(s**2 + 0.49), 0.49 / (s**2 + 0.49)
        c_out = 0.7 * s / math.sqrt(s**2 + 0.49)
        torch.testing.assert_close(inputs[i], (c_in * x[i]).float())
        torch.testing.assert_close(found[i], ((c_skip + c_out * c_in / 2) * x[i]).float())
        assert c_noise[i].item() == pytest.approx(math.log(s) / 4, abs=1e-6)
        assert torch.equal(net(x[i : i + 1], s), found[i : i + 1])
    if label_dim == 0:  # the labels do not matter
        assert labels is None
        return
    one_hot = torch.eye(4)[[0, 3, 1]]
    assert torch.equal(labels, one_hot) and labels.dtype == torch.float32
    for given in (None, one_hot, one_hot.long()):
        assert torch.equal(net(x, torch.tensor(sigma).reshape(3, 1, 1, 1), given), found)
        labels, expected = net.model.given[2], torch.zeros(3, 4) if given is None else one_hot
        assert torch.equal(labels, expected) and labels.dtype == torch.float32


WRONG = [({"encoder_type": "residual"}, "NCSN"), ({"num_bloks": 1}, "num_bloks")]
WRONG += [({"model_type": "VGG"}, "unknown model_type 'VGG'")]
WRONG += [({"sigma_data": s}, "sigma_data must") for s in ("1", None, -1, 0, math.nan, math.inf)]


@pytest.mark.parametrize(("wrong", "word"), WRONG)
def test_wrong_arguments_are_value_errors(wrong, word):
    with pytest.raises(ValueError, match=word):
        EDMPrecond(32, 3, **{"model_type": "SongUNet", **wrong})
