"""Figure 3 of the paper in the plane: what each score does, and what the regression loss adds.

    python toy_2d.py                             about 20 seconds on a CPU
    python toy_2d.py --film figure3.gif          the same as a film, one minute more

The real data are two Gaussian modes, ten standard deviations apart. The teacher is their denoiser
E[x_0 | x_t] in closed form. The generator starts as one spot beside the near mode. It is trained
three times, by Algorithm 1 and the losses of dmd_loss.py:

    (a) real score only          all samples climb to the near mode's peak
    (b) real and fake scores     the samples spread over the near mode and miss the far one
    (c) scores and regression    both modes, half of the samples each

Eq. 7's noise is kept small: t is at most 260 of 1000, where sigma is a fifth of the distance
between the modes. With more noise, the far mode changes the teacher's score at the near one. With
--max-step 400, where sigma reaches that distance, (b) finds both modes without any pairs. The last
line it prints: wrote figure3.png
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dmd_loss import (
    SIGMA_DATA,
    T_MIN,
    T,
    all_noise_levels,
    denoising_loss,
    distribution_matching_loss,
    dm_noise_levels,
    l2_distance,
    regression_loss,
)
from edm_unet import EDMDenoiser, heun_sample, preconditioning
from plumbing.drawing import draw_film, draw_panels, only_to_look_at, write_figure
from plumbing.options import Options, option, run_script

MODES = torch.tensor([[-0.5, 0.0], [0.5, 0.0]])  # near, far: (2 modes, 2 axes)
STD = 0.1  # of each mode, along both axes
START = torch.tensor([-0.62, 0.12])  # the spot where the generator starts
NUM_PAIRS, BATCH = 10_000, 256
LEARNING_RATE = 5e-4  # of G; mu_fake's is ten times as high, so that it keeps up with G
ARROWS, FILM_T = 20, 240  # the film's number of arrows, and the noise level of their scores

# Panel -> (is the fake score used?, lambda_reg)
PANELS = {
    "(a) real score only": (False, 0.0),
    "(b) real and fake scores": (True, 0.0),
    "(c) scores and regression": (True, 1.0),
}


@dataclass
class Config(Options):
    """The options of the command."""

    out: str = option("figure3.png", "file of the picture")
    film: str | None = option(None, "file of a film of the training, a .gif")
    steps: int = option(3000, "training steps per panel", least=1)
    max_step: int = option(260, "T_max of Eq. 7 (the paper: 980)", least=T_MIN + 1, most=T)
    seed: int = option(0, "seed of everything random", least=0, below=2**63)


# --------------------------------------------------------------------------------------------------
# The teacher and the two networks. A point of the plane is an "image" (2, 1, 1)


class MixtureDenoiser(nn.Module):
    """The teacher in closed form: D(x; sigma) = E[x_0 | x] for x = x_0 + sigma n, n ~ N(0, I)."""

    def forward(self, x: Tensor, sigma: Tensor | float, cond: None = None) -> Tensor:
        """x (B, 2, 1, 1), sigma a number or (B,) -> (B, 2, 1, 1)."""
        sigma = torch.as_tensor(sigma).reshape(-1, 1, 1)
        offset = x.reshape(-1, 1, 2) - MODES  # (B, modes, axes)
        variance = STD**2 + sigma**2  # of each mode, once diffused

        # The probability of each mode, and the mean of x_0 if x came from that mode.
        p_mode = (-(offset**2).sum(dim=2, keepdim=True) / (2 * variance)).softmax(dim=1)
        mean = MODES + STD**2 / variance * offset
        return (p_mode * mean).sum(dim=1).reshape(x.shape)


def mlp(c_in: int) -> nn.Sequential:
    """c_in -> 2 numbers. tanh keeps the network bounded where there are no samples."""
    layers = []
    for fan_in in (c_in, 64, 64):
        linear = nn.Linear(fan_in, 64)
        nn.init.kaiming_normal_(linear.weight, nonlinearity="tanh")
        layers += [linear, nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(64, 2))


class MLPDenoiser(nn.Module):
    """mu_fake: D(x; sigma) = c_skip x + c_out F, EDM's preconditioning (EDM Table 1)."""

    def __init__(self):
        super().__init__()
        self.F = mlp(3)
        nn.init.zeros_(self.F[-1].weight)
        nn.init.zeros_(self.F[-1].bias)

    def forward(self, x: Tensor, sigma: Tensor, cond: None = None) -> Tensor:
        """x (B, 2, 1, 1), sigma (B,) -> (B, 2, 1, 1)."""
        point, sigma = x.flatten(1), sigma[:, None]
        c_skip, c_out, _, c_noise = preconditioning(sigma, SIGMA_DATA)
        # c_in is that of a single mode, because F must resolve fractions of STD.
        c_in = 1 / preconditioning(sigma, STD)[2]
        F = self.F(torch.cat([c_in * point, c_noise], dim=1))
        return (c_skip * point + c_out * F).reshape(x.shape)


@torch.no_grad()
def one_spot() -> nn.Sequential:
    """G before training: z (B, 2, 1, 1) -> START, plus a little that depends on z."""
    net = mlp(2)
    nn.init.normal_(net[-1].weight, std=0.002)
    net[-1].bias.copy_(START)
    return nn.Sequential(nn.Flatten(), net, nn.Unflatten(1, (2, 1, 1)))


def no_score(x_t: Tensor, t: Tensor, cond: None = None) -> Tensor:
    """Used in place of mu_fake to remove s_fake from Eq. 7: mu = x_t / alpha_t has the score 0."""
    return x_t


# --------------------------------------------------------------------------------------------------
# Algorithm 1


def make_pairs(mu_real: EDMDenoiser, seed: int) -> tuple[Tensor, Tensor]:
    """z_ref ~ N(0, I) and the teacher's ODE solution y_ref for it, (NUM_PAIRS, 2, 1, 1) each."""
    z_ref = torch.randn(NUM_PAIRS, 2, 1, 1, generator=torch.Generator().manual_seed(seed + 1))
    return z_ref, heun_sample(mu_real.net, z_ref, steps=40)


def train_panel(
    panel: str, config: Config, mu_real: EDMDenoiser, pairs: tuple[Tensor, Tensor]
) -> Iterator[tuple[nn.Module, EDMDenoiser]]:
    """Algorithm 1 for one of PANELS. Yields G and mu_fake before every step and at the end."""
    use_fake_score, lambda_reg = PANELS[panel]
    torch.manual_seed(config.seed)  # the same networks and numbers for every panel
    G, mu_fake = one_spot(), EDMDenoiser(MLPDenoiser())
    mu_used = mu_fake if use_fake_score else no_score
    adam_G, adam_fake = (torch.optim.Adam(network.parameters()) for network in (G, mu_fake))
    for step in tqdm(range(config.steps), desc=panel):
        yield G, mu_fake
        rate = LEARNING_RATE * (1 - step / config.steps)  # if constant, G and mu_fake would circle

        # 1. Sample z ~ N(0, I), and pairs (z_ref, y_ref) ~ D.
        z, noise, noise_fake = torch.randn(3, BATCH, 2, 1, 1)
        u, u_fake = torch.rand(2, BATCH)
        t, t_fake = dm_noise_levels(u, config.max_step), all_noise_levels(u_fake)
        k = torch.randint(NUM_PAIRS, (BATCH,))
        z_ref, y_ref = (part[k] for part in pairs)

        # 2. Generate x = G(z) and x_ref = G(z_ref) in one call.
        x, x_ref = G(torch.cat([z, z_ref])).split([BATCH, BATCH])

        # 3. Distribution-matching gradient (Eq. 7) and regression (Eq. 9); step G.
        loss_kl = distribution_matching_loss(mu_real, mu_used, x, None, t=t, noise=noise)
        loss_reg = regression_loss(x_ref, y_ref, l2_distance)
        (loss_kl + lambda_reg * loss_reg).backward()
        take_step(adam_G, rate)

        # 4. Denoise the generated samples (Eq. 6): the same x, detached.
        loss_denoise = denoising_loss(mu_fake, x.detach(), None, t=t_fake, noise=noise_fake)

        # 5. Step mu_fake.
        loss_denoise.backward()
        take_step(adam_fake, 10 * rate)
    yield G, mu_fake


def take_step(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """One step at this learning rate."""
    optimizer.param_groups[0]["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad()


# --------------------------------------------------------------------------------------------------
# What comes out


@torch.no_grad()
def generate(G: nn.Module, seed: int, n: int = 5000) -> Tensor:
    """n fresh samples of G, (n, 2, 1, 1)."""
    return G(torch.randn(n, 2, 1, 1, generator=torch.Generator().manual_seed(seed + 2)))


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Samples x (B, 2, 1, 1) -> the share nearest to each mode (2 modes,), and the spread of these
    (2 modes, 2 axes), NaN for shares under 1 %. Spread is a standard deviation divided by STD,
    estimated as 1.4826 times the median absolute deviation, which stray samples hardly change."""
    x = x.flatten(1)
    nearest = torch.cdist(x, MODES).argmin(dim=1)
    share = torch.bincount(nearest, minlength=2) / len(x)
    spread = torch.full((2, 2), math.nan)
    for mode in range(2):
        if share[mode] >= 0.01:
            members = x[nearest == mode]
            deviation = (members - members.median(dim=0).values).abs().median(dim=0).values
            spread[mode] = 1.4826 * deviation / STD
    return share, spread


def draw(panels: dict[str, Tensor], size: tuple[float, float]):
    """Draw each panel's samples (B, 2, 1, 1) over real ones -> a figure of this size in inches."""
    noise = torch.randn(1400, 2, generator=torch.Generator().manual_seed(0))
    shares = [statistics(samples)[0].tolist() for samples in panels.values()]
    labels = [f"near mode {near:.0%}, far mode {far:.0%}" for near, far in shares]
    return draw_panels(panels, labels, MODES.repeat(700, 1) + STD * noise, MODES, STD, size)


@torch.no_grad()
def look(panel: str, G, mu_real, mu_fake, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """One moment of the film: samples (1400, 2, 1, 1), and sigma_t^2 s_real and sigma_t^2 s_fake at
    the first ARROWS of them, taken as x_t at t = FILM_T."""
    samples, (use_fake_score, _) = generate(G, seed, 1400), PANELS[panel]
    x, t = samples[:ARROWS], torch.full((ARROWS,), FILM_T)
    return samples, mu_real(x, t) - x, (mu_fake(x, t) - x) * use_fake_score


def main(config: Config) -> None:
    """Train the panels, print where their samples are, draw the figure."""
    torch.set_num_threads(1)  # several would wait for each other, because the tensors are tiny
    mu_real = EDMDenoiser(MixtureDenoiser())
    pairs = make_pairs(mu_real, config.seed)
    # Sixty moments, most of them early, when the samples move most.
    moments = sorted({round(config.steps * (k / 59) ** 2) for k in range(60)})
    samples, films = {}, {panel: [] for panel in PANELS}
    for panel, film in films.items():
        for step, (G, mu_fake) in enumerate(train_panel(panel, config, mu_real, pairs)):
            if step == 0:
                samples["start"] = generate(G, config.seed)
            if config.film and step in moments:
                film.append(look(panel, G, mu_real, mu_fake, config.seed))
        samples[panel] = generate(G, config.seed)

    print(f"{'':26} mode    share  spread x  spread y  (1 = the mode's own)")
    for panel, x in samples.items():
        share, spread = statistics(x)
        for mode, name in enumerate(["near", "far"]):
            row = f"{panel:26} {name:4} {share[mode]:8.1%}"
            print(row + "".join(f"{s:10.2f}" for s in spread[mode]).replace("nan", "  -"))

    write_figure(Path(config.out), draw(samples, (14, 2.2)))
    if config.film:
        with only_to_look_at(config.film):
            draw_film(Path(config.film), films, moments, draw)
            print(f"wrote {config.film}")
    print(f"wrote {config.out}")


if __name__ == "__main__":
    run_script(main, Config, __doc__)
