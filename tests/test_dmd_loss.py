"""The losses against closed forms: Gaussians, whose scores, KL and posterior means are known."""

from functools import partial
from unittest.mock import Mock

import lpips
import numpy as np
import pytest
import torch

import dmd_loss
from edm_unet import karras_sigmas
from sd_loader import sd_noise_table
from teachers import load_lpips

of_the_package = lpips.normalize_tensor

TABLES = {
    "edm": (torch.ones(1000, dtype=torch.float64), karras_sigmas(1000)),
    "sd": sd_noise_table(),
}


class GaussianDenoiser:
    """The exact denoiser of N(mean, std^2 I): E[x_0 | x_t], in closed form."""

    def __init__(self, mean, std, table, dtype=torch.float64):
        self.mean, self.std = mean, std
        self.alpha, self.sigma = (values.to(dtype) for values in table)
        self.calls = []

    def __call__(self, x_t, t, cond=None):
        self.calls.append((x_t, t))
        return self.at(x_t, dmd_loss.at(self.alpha, t), dmd_loss.at(self.sigma, t))

    def at(self, x_t, alpha_t, sigma_t):
        gain = alpha_t * self.std**2 / (alpha_t**2 * self.std**2 + sigma_t**2)
        return self.mean + gain * (x_t - alpha_t * self.mean)


def drawn(x, T):
    """Any t and noise for samples x, as the losses take them."""
    return {"t": torch.randint(T, (len(x),)), "noise": torch.randn(x.shape, dtype=x.dtype)}


def log_density(x_t, mean, std, alpha_t, sigma_t):
    variance = (alpha_t * std) ** 2 + sigma_t**2
    return -((x_t - alpha_t * mean) ** 2) / (2 * variance)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("t", [20, 300, 700, 979])
def test_score_is_the_gradient_of_the_log_density(table, t):
    alpha_t, sigma_t = (values[t] for values in TABLES[table])
    x_t = torch.randn(5, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(log_density(x_t, 0.3, 0.7, alpha_t, sigma_t).sum(), x_t)
    mu = GaussianDenoiser(0.3, 0.7, TABLES[table]).at(x_t, alpha_t, sigma_t)
    torch.testing.assert_close(dmd_loss.score(x_t, mu, alpha_t, sigma_t), expected)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("t", [20, 300, 700, 979])
@pytest.mark.parametrize("weighting", ["dreamfusion", "prolificdreamer"])
def test_gradient_is_that_of_the_kl_divergence(table, t, weighting):
    """E[dm_gradient dG/dtheta] = w_t dKL/dtheta for G(z) = mean + std z, theta = (mean, std).

    Both sides are polynomials of degree two in (z, noise), so Gauss-Hermite nodes give the
    expectation exactly. The weightings here do not depend on the sample.
    """
    alpha_t, sigma_t = (values[t] for values in TABLES[table])
    mean_real, std_real, mean_fake, std_fake = 0.3, 0.5, -0.4, 0.2

    # The closed-form KL of the diffused Gaussians, differentiated by autograd.
    theta = torch.tensor([mean_fake, std_fake], dtype=torch.float64, requires_grad=True)
    var_fake = (alpha_t * theta[1]) ** 2 + sigma_t**2
    var_real = (alpha_t * std_real) ** 2 + sigma_t**2
    distance = (alpha_t * (theta[0] - mean_real)) ** 2
    kl = 0.5 * ((var_fake + distance) / var_real - 1 - torch.log(var_fake / var_real))
    (expected,) = torch.autograd.grad(kl, theta)

    # Nodes and weights of E over z and noise.
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.hermite_e.hermegauss(8))
    weights = weights / weights.sum()
    z, noise = (v.reshape(-1, 1, 1, 1) for v in torch.meshgrid(nodes, nodes, indexing="ij"))
    probability = torch.outer(weights, weights).flatten()
    x = mean_fake + std_fake * z
    x_t = dmd_loss.forward_diffusion(x, noise, alpha_t, sigma_t)
    mu_real = GaussianDenoiser(mean_real, std_real, TABLES[table]).at(x_t, alpha_t, sigma_t)
    mu_fake = GaussianDenoiser(mean_fake, std_fake, TABLES[table]).at(x_t, alpha_t, sigma_t)
    grad = dmd_loss.dm_gradient(x, x_t, mu_real, mu_fake, alpha_t, sigma_t, weighting)
    found = torch.stack([probability @ grad.flatten(), probability @ (grad * z).flatten()])

    w_t = sigma_t / alpha_t if weighting == "dreamfusion" else sigma_t**3 / alpha_t
    torch.testing.assert_close(found, w_t * expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("table", TABLES)
def test_weightings_in_terms_of_the_predictions(table):
    """Substituting Eq. 4, 5 and 8 in Eq. 7 leaves multiples of mu_fake - mu_real."""
    alpha_t, sigma_t = (values[[30, 500, 960]].reshape(-1, 1, 1, 1) for values in TABLES[table])
    x, x_t, mu_real, mu_fake = torch.randn(4, 3, 2, 5, 5, dtype=torch.float64)
    delta = mu_fake - mu_real
    error = (mu_real - x).abs().mean(dim=(1, 2, 3), keepdim=True)
    expected = {
        "eq8": alpha_t * delta / error,
        "alg2": delta / error,
        "dreamfusion": alpha_t / sigma_t * delta,
        "prolificdreamer": alpha_t * sigma_t * delta,
    }
    assert set(expected) == set(dmd_loss.WEIGHTINGS)
    for weighting, value in expected.items():
        found = dmd_loss.dm_gradient(x, x_t, mu_real, mu_fake, alpha_t, sigma_t, weighting)
        torch.testing.assert_close(found, value)
    if table == "edm":  # alpha = 1: the two are the same
        torch.testing.assert_close(expected["eq8"], expected["alg2"])


@pytest.mark.parametrize(("difference", "expected"), [(1e-2, 4e-4), (1e-3, 4e-3)])
def test_what_the_cancellation_costs_in_float32(difference, expected):
    """The figures in dm_gradient's docstring."""
    alpha_t, sigma_t = (values[979].float().reshape(1, 1, 1, 1) for values in TABLES["edm"])
    x, noise, mu_real, change = torch.randn(4, 8, 3, 32, 32)
    x_t = dmd_loss.forward_diffusion(x, noise, alpha_t, sigma_t)
    given = (x, x_t, mu_real, mu_real + difference * change, alpha_t, sigma_t)
    exact = dmd_loss.dm_gradient(*(value.double() for value in given))
    error = (dmd_loss.dm_gradient(*given) - exact).norm() / exact.norm()
    assert error.item() == pytest.approx(expected, rel=0.15)


def test_surrogate_gradient_is_algorithm_2s():
    """d loss / d x = (p_fake - p_real) / mean|x - p_real| / (B C H W), at the given t and noise."""
    x = torch.randn(6, 2, 4, 4, requires_grad=True)
    mu_real = GaussianDenoiser(0.3, 0.5, TABLES["edm"], torch.float32)
    mu_fake = GaussianDenoiser(-0.4, 0.2, TABLES["edm"], torch.float32)
    t, noise = torch.tensor([20, 150, 300, 500, 700, 979]), torch.randn(x.shape)
    loss = dmd_loss.distribution_matching_loss(mu_real, mu_fake, x, None, t=t, noise=noise)
    loss.backward()

    x_t = x.detach() + dmd_loss.at(mu_real.sigma, t) * noise
    for mu in (mu_real, mu_fake):
        assert torch.equal(mu.calls[0][0], x_t) and torch.equal(mu.calls[0][1], t)
        assert not mu.calls[0][0].requires_grad  # Algorithm 2's no_grad: no graph of the denoisers
    p_real, p_fake = mu_real(x_t, t), mu_fake(x_t, t)
    weight = (x.detach() - p_real).abs().mean(dim=(1, 2, 3), keepdim=True)
    grad = (p_fake - p_real) / weight
    torch.testing.assert_close(x.grad * x.numel(), grad, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(loss, 0.5 * grad.square().mean(), rtol=1e-3, atol=1e-6)


class LinearDenoiser(torch.nn.Module):
    """mu(x_t, t) = a_t x_t + b_t with a small noise table of its own."""

    def __init__(self, alpha, sigma):
        super().__init__()
        self.register_buffer("alpha", torch.tensor(alpha))
        self.register_buffer("sigma", torch.tensor(sigma))
        self.a = torch.nn.Parameter(torch.zeros(len(alpha)))
        self.b = torch.nn.Parameter(torch.zeros(len(alpha)))
        self.z_scale = 1.0

    def forward(self, x_t, t, cond=None):
        return dmd_loss.at(self.a, t) * x_t + dmd_loss.at(self.b, t)


def linear_denoiser():
    return LinearDenoiser([1.0, 0.8, 0.3, 1.0], [0.1, 0.6, 0.95, 3.0])


def test_no_gradient_crosses_the_boundaries():
    mu_real, mu_fake = linear_denoiser(), linear_denoiser()
    G = dmd_loss.OneStepGenerator(linear_denoiser())
    torch.nn.init.constant_(mu_real.b, 0.5)
    torch.nn.init.constant_(G.mu.b, 0.7)
    x = G(torch.randn(8, 1, 2, 2))

    loss = dmd_loss.distribution_matching_loss(mu_real, mu_fake, x, None, **drawn(x, 4))
    loss.backward(retain_graph=True)
    assert G.mu.b.grad.abs().sum() > 0
    assert all(p.grad is None for mu in (mu_real, mu_fake) for p in mu.parameters())

    G.zero_grad(set_to_none=True)
    dmd_loss.denoising_loss(mu_fake, x, None, **drawn(x, 4)).backward()
    assert mu_fake.b.grad.abs().sum() > 0
    assert all(p.grad is None for p in [*G.parameters(), *mu_real.parameters()])


@pytest.mark.parametrize("sigma_data", [0.5, None])
def test_denoising_loss(sigma_data):
    """Being off by c costs mean_t(weight_t) c^2. It happens at the given noise (Eq. 3)."""

    class Off(LinearDenoiser):
        def forward(self, x_t, t, cond=None):
            self.given = x_t, t
            return x + 0.1

    mu = Off([1.0, 0.8], [0.1, 0.6])
    x = torch.randn(64, 1, 2, 2)
    given = drawn(x, 2)
    loss = dmd_loss.denoising_loss(mu, x, None, sigma_data=sigma_data, **given)
    snr = torch.tensor([100.0, 0.64 / 0.36])[given["t"]]
    weight = snr if sigma_data is None else snr + 4
    torch.testing.assert_close(loss, weight.mean() * 0.01, rtol=1e-4, atol=0)
    alpha_t, sigma_t = (table[given["t"]].reshape(64, 1, 1, 1) for table in (mu.alpha, mu.sigma))
    expected = alpha_t * x + sigma_t * given["noise"], given["t"]
    torch.testing.assert_close(mu.given, expected)


def test_noise_levels_are_the_papers_ranges():
    """KL: t in 0.02 T .. 0.98 T; denoising: all of them; every level as often as any other."""
    u = torch.arange(96_000, dtype=torch.float64) / 96_000
    u[-1] = 1 - 2**-53  # the largest that torch.rand gives
    for t, levels in (
        (dmd_loss.dm_noise_levels(u), range(20, 980)),
        (dmd_loss.dm_noise_levels(u, 500), range(20, 500)),
        (dmd_loss.all_noise_levels(u), range(1000)),
    ):
        count = torch.bincount(t, minlength=1000)
        assert (t.min(), t.max()) == (levels[0], levels[-1]) and t.dtype == torch.long
        assert (count[list(levels)] - 96_000 / len(levels)).abs().max() <= 1


def test_losses_are_float32_for_half_precision_networks():
    mu = GaussianDenoiser(0.3, 0.5, TABLES["sd"], torch.float32)

    def half(*arguments):  # a network under autocast
        return mu(*arguments).bfloat16()

    half.alpha, half.sigma = mu.alpha, mu.sigma
    x = torch.randn(4, 1, 2, 2, dtype=torch.bfloat16)
    given = drawn(x.float(), 1000)
    loss = dmd_loss.distribution_matching_loss(half, half, x, None, **given)
    assert loss.dtype == torch.float32
    assert dmd_loss.denoising_loss(half, x, None, **given).dtype == torch.float32
    assert dmd_loss.regression_loss(x, x, dmd_loss.l2_distance).dtype == torch.float32
    assert mu.calls[0][0].dtype == torch.float32  # x_t: small sigmas would vanish in bfloat16


@pytest.mark.parametrize("channels", [1, 3])
def test_lpips_sees_upsampled_unclamped_images(channels):
    """Bilinear to 224x224 keeps constants and ramps; values beyond 1 pass, with their gradient."""
    ramp = torch.linspace(-3, 3, 16).expand(2, channels, 16, 16).clone().requires_grad_(True)
    y = torch.full((2, channels, 16, 16), 0.5, requires_grad=True)
    seen = []

    def network(a, b):
        seen.extend((a, b))
        return (a - b).mean(dim=(1, 2, 3), keepdim=True)

    loss = dmd_loss.regression_loss(ramp, y, partial(dmd_loss.lpips_distance, network))
    loss.backward()
    a, b = seen
    assert a.shape == b.shape == (2, 3, 224, 224)
    torch.testing.assert_close(b, torch.full_like(b, 0.5))
    # Pixel centres: 224 = 14 * 16, so between the outer centres steps are 1/14 of the ramp's.
    torch.testing.assert_close(a[..., 8:215].diff(dim=-1), torch.full((2, 3, 224, 206), 0.4 / 14))
    assert [a.min().item(), a.max().item()] == pytest.approx([-3, 3])
    torch.testing.assert_close(ramp.grad.sum(), torch.tensor(1.0))  # nothing is lost
    assert (ramp.grad > 0).all() and y.grad is None


def test_lpips_sees_large_images_as_they_are():
    x, y = images = torch.randn(2, 1, 3, 8, 2)
    seen = dmd_loss.lpips_distance(lambda *given: torch.stack(given), x, y, size=4)
    assert torch.equal(seen, images)


def test_lpips_has_finite_gradients(monkeypatch, random_lpips):
    """Also where features are 0, or their squares are. Its values are the package's."""
    network, images = load_lpips(torch.device("cpu")), torch.randn(2, 1, 3, 32, 32)
    features = torch.randn(1, 4, 1, 3) * torch.tensor([1.0, 1e-30, 0.0])
    (gradient,) = torch.autograd.grad(
        lpips.normalize_tensor(features.requires_grad_()).sum(), features
    )
    assert gradient.isfinite().all()
    value = network(*images)
    monkeypatch.setattr(lpips, "normalize_tensor", of_the_package)
    assert value > 0 and network(*images).item() == pytest.approx(value.item(), rel=1e-6)


def test_a_full_gpu_is_not_blamed_on_lpips_weights(monkeypatch):
    too_large = torch.nn.Identity()
    too_large.to = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory"))
    monkeypatch.setattr(lpips, "LPIPS", lambda **_: too_large)
    with pytest.raises(torch.OutOfMemoryError):
        load_lpips(torch.device("cuda"))
