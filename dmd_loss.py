"""Distribution Matching Distillation (Yin et al., CVPR 2024, arXiv 2311.18828): the losses.

This file is the heart of the paper: Eq. 3 to 9, Algorithms 2 and 3, and Section 3.1's generator.
It depends on no network and no dataset. A denoiser `mu` is anything with

    mu(x_t, t, cond) -> estimate of the clean x_0       x_t (B, C, H, W), t (B,) long in 0 .. T-1
    mu.alpha, mu.sigma                                  its noise table, (T,) each
    mu.z_scale                                          x_{T-1} is z_scale * z for z ~ N(0, I)

This is mean prediction; Eq. 11 converts a noise prediction into it. There are three denoisers. The
score of mu_real, the frozen teacher, points towards real data. The score of mu_fake, trained on the
generator's samples, points towards these samples. The third is inside G, which calls it at T-1.

All losses are computed in float32, whatever dtype the networks ran in.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

T = 1000  # number of discrete noise levels, t = 0 .. T-1, larger is noisier
T_MIN, T_MAX = round(0.02 * T), round(0.98 * T)  # range of t in the KL gradient, Eq. 7
SIGMA_DATA = 0.5  # standard deviation of the data, as in EDM and Algorithm 3

# w_t of Eq. 7. m = |mu_real - x|_1 / (C S) for each sample; all shapes are (B, 1, 1, 1).
WEIGHTINGS = {
    "eq8": lambda alpha_t, sigma_t, m: sigma_t**2 / alpha_t / m,  # Eq. 8, the paper's choice
    # Algorithm 2, for Stable Diffusion. For EDM, whose alpha_t is 1, it equals eq8.
    "alg2": lambda alpha_t, sigma_t, m: sigma_t**2 / alpha_t**2 / m,
    # The alternatives in Table 2.
    "dreamfusion": lambda alpha_t, sigma_t, m: sigma_t / alpha_t,
    "prolificdreamer": lambda alpha_t, sigma_t, m: sigma_t**3 / alpha_t,
}


class OneStepGenerator(nn.Module):
    """Section 3.1: G(z) = mu(z, T-1), where mu starts as a copy of the teacher."""

    def __init__(self, mu: nn.Module):
        super().__init__()
        self.mu = mu

    def forward(self, z: Tensor, cond: Tensor | None = None) -> Tensor:
        """z ~ N(0, I) (B, C, H, W), cond as mu takes it -> x (B, C, H, W)."""
        t = torch.full((len(z),), len(self.mu.sigma) - 1, device=z.device)  # T-1
        return self.mu(self.mu.z_scale * z, t, cond)


def forward_diffusion(x: Tensor, noise: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """Eq. 3: x_t ~ N(alpha_t x, sigma_t^2 I), if noise ~ N(0, I); x, noise, x_t (B, C, H, W)."""
    return alpha_t * x + sigma_t * noise


def score(x_t: Tensor, mu: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """Eq. 4 and 5: s(x_t, t) = -(x_t - alpha_t mu(x_t, t)) / sigma_t^2, the gradient of log p_t.
    Here mu (B, C, H, W) is the denoiser's *prediction* for x_t; alpha_t, sigma_t (B, 1, 1, 1)."""
    return -(x_t - alpha_t * mu) / sigma_t**2


def dm_gradient(
    x: Tensor, x_t: Tensor, mu_real: Tensor, mu_fake: Tensor, alpha_t: Tensor, sigma_t: Tensor,
    weighting: str = "eq8",
) -> Tensor:  # fmt: skip
    """Eq. 7 without dG/dtheta: the gradient of the KL divergence w.r.t. each generated sample.

    Both scores contain x_t, which cancels. The result is w_t alpha_t^2 / sigma_t^2 times the
    difference mu_fake - mu_real. In float32 the cancellation costs digits: at EDM's t = 979 the
    relative error is 4e-4 if the predictions differ by 1e-2, and 4e-3 if they differ by 1e-3. That
    is far less than a bfloat16 network's own error.

    Args:
        x, x_t: generated samples before and after diffusion (Eq. 3), (B, C, H, W) each.
        mu_real, mu_fake: the two denoisers' *predictions* for x_t, (B, C, H, W).
        alpha_t, sigma_t: (B, 1, 1, 1), above 0.
        weighting: w_t, a key of WEIGHTINGS.

    Returns:
        w_t alpha_t (s_fake - s_real), (B, C, H, W).
    """
    s_real = score(x_t, mu_real, alpha_t, sigma_t)
    s_fake = score(x_t, mu_fake, alpha_t, sigma_t)
    mean_abs_error = (mu_real - x).abs().mean(dim=(1, 2, 3), keepdim=True)  # |mu_real - x|_1 / CS
    w_t = WEIGHTINGS[weighting](alpha_t, sigma_t, mean_abs_error)  # (B, 1, 1, 1)
    return w_t * alpha_t * (s_fake - s_real)


def distribution_matching_loss(
    mu_real: Callable, mu_fake: Callable, x: Tensor, cond: Tensor | None,
    *, t: Tensor, noise: Tensor, weighting: str = "eq8",
) -> Tensor:  # fmt: skip
    """Algorithm 2: a surrogate loss whose gradient w.r.t. x is Eq. 7's, divided by B C H W.

    Its *value*, 0.5 mean(grad^2), says how far apart the two scores are. It does not measure
    progress, because mu_fake moves too.

    Args:
        mu_real, mu_fake: the two denoisers; neither receives a gradient.
        x: generated samples (B, C, H, W), attached to the generator's graph.
        cond: the condition of both denoisers, or None.
        t, noise: noise levels (B,) long from dm_noise_levels, and N(0, I) in the shape of x.
        weighting: a key of WEIGHTINGS.

    Returns:
        the loss, a float32 scalar.
    """
    with torch.no_grad():
        alpha_t, sigma_t = at(mu_real.alpha, t), at(mu_real.sigma, t)
        x_0 = x.float()
        x_t = forward_diffusion(x_0, noise, alpha_t, sigma_t)
        p_real, p_fake = mu_real(x_t, t, cond).float(), mu_fake(x_t, t, cond).float()
        grad = dm_gradient(x_0, x_t, p_real, p_fake, alpha_t, sigma_t, weighting)
    return 0.5 * F.mse_loss(x.float(), (x_0 - grad).detach(), reduction="mean")


def denoising_weight(alpha_t: Tensor, sigma_t: Tensor, sigma_data: float | None) -> Tensor:
    """The weight over t in Eq. 6, as in the base model's training: EDM's lambda(sigma) = SNR +
    1 / sigma_data^2. Without sigma_data (SD v1.5), it is the SNR: Eq. 6 is then the MSE of eps."""
    snr = (alpha_t / sigma_t) ** 2
    return snr if sigma_data is None else snr + 1 / sigma_data**2


def denoising_loss(
    mu_fake: Callable, x: Tensor, cond: Tensor | None,
    *, t: Tensor, noise: Tensor, sigma_data: float | None = SIGMA_DATA,
) -> Tensor:  # fmt: skip
    """Algorithm 3 and Eq. 6: mu_fake learns to denoise generated samples at all noise levels.

    Args:
        mu_fake: the denoiser to train.
        x: generated samples (B, C, H, W); no gradient flows back into them.
        cond: their condition, or None.
        t, noise: noise levels (B,) long from all_noise_levels, and N(0, I) in the shape of x.
        sigma_data: see denoising_weight.

    Returns:
        the loss, a float32 scalar.
    """
    x = x.detach().float()
    alpha_t, sigma_t = at(mu_fake.alpha, t), at(mu_fake.sigma, t)
    x_t = forward_diffusion(x, noise, alpha_t, sigma_t)
    weight = denoising_weight(alpha_t, sigma_t, sigma_data)
    return (weight * (mu_fake(x_t, t, cond).float() - x) ** 2).mean()


def regression_loss(x_ref: Tensor, y_ref: Tensor, distance: Callable) -> Tensor:
    """Eq. 9: the mean distance between x_ref = G(z_ref), attached to the generator's graph, and
    y_ref, the teacher's ODE solution for z_ref; (B, C, H, W) each -> float32 scalar. `distance` is
    l2_distance, lpips_distance or the like, and may return any shape."""
    return distance(x_ref.float(), y_ref.detach().float()).mean()


def l2_distance(x: Tensor, y: Tensor) -> Tensor:
    """Squared difference (B, C, H, W): the replacement for LPIPS in appendix I."""
    return (x - y) ** 2


def lpips_distance(network: Callable, x: Tensor, y: Tensor, size: int = 224) -> Tensor:
    """LPIPS as in Section 3.3: in float32, on images upsampled bilinearly to VGG's 224x224.

    The paper uses PIQ's LPIPS "following Song et al.", who replace the VGG's max pooling with
    average pooling. The paper does not say whether DMD does so. The lpips package has max pooling.

    Args:
        network: LPIPS (Zhang et al. 2018, arXiv 1801.03924), frozen, for RGB images in [-1, 1].
        x, y: images (B, 1 or 3, H, W). They are not clamped, because clamping would stop the
            gradient where the generator overshoots.

    Returns:
        (B, 1, 1, 1).
    """
    x, y = (image.expand(-1, 3, -1, -1) for image in (x, y))
    with torch.autocast(x.device.type, enabled=False):
        if max(x.shape[2:]) < size:  # not Stable Diffusion's 512x512
            x, y = (F.interpolate(image, (size, size), mode="bilinear") for image in (x, y))
        return network(x, y)


def dm_noise_levels(u: Tensor, t_max: int = T_MAX) -> Tensor:
    """Eq. 7's t ~ U(T_min, T_max), excluding T_max; u (B,) uniform in [0, 1) -> (B,) long."""
    return T_MIN + (u * (t_max - T_MIN)).long()


def all_noise_levels(u: Tensor) -> Tensor:
    """Line 8 of Algorithm 1, t ~ U(0, 1): any of the T levels; u (B,) as above -> (B,) long."""
    return (u * T).long()


def at(table: Tensor, t: Tensor) -> Tensor:
    """table (T,), t (B,) -> table[t] as (B, 1, 1, 1)."""
    return table[t].reshape(-1, 1, 1, 1)
