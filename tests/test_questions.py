"""docs/questions.md: its denoisers give the closed form's scores, its table of methods is right,
and its Markdown has no trap. (tests/test_readme.py checks its links.)"""

import math
import re

import pytest
import torch
from conftest import ROOT

import dmd_loss
import toy_2d
from dmd_loss import T, at
from edm_unet import EDMDenoiser
from plumbing.rundir import SCALARS

TEXT = (ROOT / "docs" / "questions.md").read_text(encoding="utf-8")


# --------------------------------------------------------------------------------------------------
# The denoisers for v and for a flow, with the exact predictions of the toy's mixture


@pytest.fixture(scope="module")
def shown() -> dict:
    """What the page's Python defines."""
    names = {}
    blocks = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, names)
    return names


@pytest.fixture
def float64():
    """At the lowest levels, a score divides a rounding error by 1e-6."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def mean_of_x_0(x_t, alpha_t, sigma_t):
    """E[x_0 | x_t] of the toy's mixture under any noise table."""
    if not alpha_t.any():  # x_t is pure noise
        return toy_2d.MODES.mean(0).to(x_t.dtype).reshape(1, 2, 1, 1).expand_as(x_t)
    return toy_2d.MixtureDenoiser()(x_t / alpha_t, (sigma_t / alpha_t).flatten())


class ClosedForm:
    """A denoiser by the formula, with the noise table of another."""

    def __init__(self, like, shift=0.0):
        self.alpha, self.sigma, self.shift = like.alpha, like.sigma, shift

    def __call__(self, x_t, t, cond=None):
        alpha_t, sigma_t = at(self.alpha, t), at(self.sigma, t)
        return mean_of_x_0(x_t - alpha_t * self.shift, alpha_t, sigma_t) + self.shift


def v_denoiser(shown, shift=0.0):
    """VDenoiser with a cosine table, which ends at alpha = 0."""
    s = torch.arange(1, T + 1) / T
    alpha, sigma = torch.cos(math.pi / 2 * s), torch.sin(math.pi / 2 * s)
    alpha[-1] = 0

    def v(x_t, t, cond):
        x_0, alpha_t, sigma_t = exact(x_t, t, cond), at(alpha, t), at(sigma, t)
        return alpha_t * (x_t - alpha_t * x_0) / sigma_t - sigma_t * x_0

    mu = shown["VDenoiser"](v, alpha, sigma)
    exact = ClosedForm(mu, shift)
    return mu


def flow_denoiser(shown, shift=0.0):
    """FlowDenoiser; its network is told s, not t."""

    def u(x_s, s, cond):
        alpha, sigma = 1 - s.reshape(-1, 1, 1, 1), s.reshape(-1, 1, 1, 1)
        x_0 = mean_of_x_0(x_s - alpha * shift, alpha, sigma) + shift
        return (x_s - alpha * x_0) / sigma - x_0

    return shown["FlowDenoiser"](u)


WRAPPED = pytest.mark.parametrize("make", [v_denoiser, flow_denoiser])


@WRAPPED
def test_the_score_at_every_level(make, shown, float64):
    """It is the gradient of the diffused mixture's log density."""
    mu, modes = make(shown), toy_2d.MODES.double().reshape(1, 2, 2, 1, 1)
    assert len(mu.alpha) == len(mu.sigma) == T and mu.sigma[0] > 0 and mu.alpha[-1] == 0
    for level in range(T):
        t = torch.full((8,), level)
        alpha_t, sigma_t = at(mu.alpha, t), at(mu.sigma, t)
        variance = (alpha_t * toy_2d.STD) ** 2 + sigma_t**2
        x_t = alpha_t * modes[0, level % 2] + variance.sqrt() * torch.randn(8, 2, 1, 1)
        x_t.requires_grad_()
        square = ((x_t[:, None] - alpha_t[:, None] * modes) ** 2).sum((2, 3, 4))
        log_density = torch.logsumexp(-square / (2 * variance.reshape(-1, 1)), dim=1)
        (expected,) = torch.autograd.grad(log_density.sum(), x_t)
        found = dmd_loss.score(x_t, mu(x_t, t), alpha_t, sigma_t)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weighting", ["eq8", "alg2"])
@WRAPPED
def test_the_gradient_of_the_kl_loss(make, weighting, shown):
    """It is that of the closed form at the levels of Eq. 7, and NaN at the last level."""
    torch.manual_seed(0)
    mu_real, mu_fake = make(shown), make(shown, shift=0.2)
    t = dmd_loss.dm_noise_levels(torch.linspace(0, 0.9999, 500))
    assert t.min() == 20 and t.max() == 979
    noise, start = torch.randn(2, 500, 2, 1, 1)

    def gradient(real, fake, t=t):
        x = (0.5 * start).requires_grad_()
        how = dict(t=t, noise=noise, weighting=weighting)
        dmd_loss.distribution_matching_loss(real, fake, x, None, **how).backward()
        return x.grad * x.numel()

    expected = gradient(ClosedForm(mu_real), ClosedForm(mu_real, 0.2))
    found = gradient(mu_real, mu_fake)
    assert expected.abs().mean() > 0.1
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)
    assert gradient(mu_real, mu_fake, torch.full((500,), T - 1)).isnan().all()


@WRAPPED
def test_the_generator_starts_as_the_mean_of_the_data(make, shown):
    z = torch.randn(8, 2, 1, 1)
    x = dmd_loss.OneStepGenerator(make(shown))(z)
    torch.testing.assert_close(x, torch.zeros(8, 2, 1, 1), rtol=0, atol=1e-6)


@WRAPPED
def test_the_weights_of_the_denoising_loss(make, shown):
    """sigma_data = 1 is the squared error of v, and 0.5 to 1 times that of u."""
    mu = make(shown)
    ratio = dmd_loss.denoising_weight(mu.alpha, mu.sigma, 1.0) * mu.sigma**2
    assert ratio.max() <= 1.00001 and ratio.min() >= (0.499 if make is flow_denoiser else 0.999)


# --------------------------------------------------------------------------------------------------
# SDS, VSD, DMD, SiD


def a_batch(weighting: str, n: int = 1000) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """At the toy's start: arguments of dm_gradient in float64, the noise, and t."""
    torch.manual_seed(0)
    mu, noise = EDMDenoiser(toy_2d.MixtureDenoiser()), torch.randn(n, 2, 1, 1).double()
    x = toy_2d.START.double().reshape(1, 2, 1, 1).expand(n, 2, 1, 1)
    t = dmd_loss.dm_noise_levels(torch.rand(n), 260)
    alpha_t, sigma_t = at(mu.alpha, t).double(), at(mu.sigma, t).double()
    x_t = dmd_loss.forward_diffusion(x, noise, alpha_t, sigma_t)
    known = dict(x=x, x_t=x_t, mu_real=mu(x_t, t), alpha_t=alpha_t, sigma_t=sigma_t)
    return known | {"weighting": weighting}, noise, t


def eps(x_t, x_0, alpha_t, sigma_t):
    """Eq. 11."""
    return (x_t - alpha_t * x_0) / sigma_t


def test_sds_and_vsd_are_dm_gradient():
    for weighting, factor in (("dreamfusion", 0), ("prolificdreamer", 2)):
        known, noise, _ = a_batch(weighting)
        x, sigma_t = known["x"], known["sigma_t"]
        levels = {name: known[name] for name in ("x_t", "alpha_t", "sigma_t")}
        torch.testing.assert_close(eps(x_0=x, **levels), noise)  # SDS subtracts the noise itself
        for mu_fake in (x, x + 0.1):  # SDS, and VSD with some prediction
            eps_real, eps_fake = (eps(x_0=mu, **levels) for mu in (known["mu_real"], mu_fake))
            found = dmd_loss.dm_gradient(mu_fake=mu_fake, **known)
            torch.testing.assert_close(found, sigma_t**factor * (eps_real - eps_fake))


def test_panel_a_is_sds_on_average_if_the_weight_does_not_see_the_noise():
    for weighting, factor in (("dreamfusion", 1), ("prolificdreamer", 1), ("eq8", 2)):
        known, noise, t = a_batch(weighting, n=400_000)
        panel_a = dmd_loss.dm_gradient(mu_fake=toy_2d.no_score(known["x_t"], t), **known)
        sds = dmd_loss.dm_gradient(mu_fake=known["x"], **known)
        m = (known["mu_real"] - known["x"]).abs().mean(dim=1, keepdim=True)
        w_t = dmd_loss.WEIGHTINGS[weighting](known["alpha_t"], known["sigma_t"], m)
        difference = w_t * known["alpha_t"] * noise / known["sigma_t"]
        torch.testing.assert_close(panel_a - sds, difference, rtol=1e-6, atol=1e-6)
        scale, apart = sds.mean(0).norm(), panel_a.mean(0) - factor * sds.mean(0)
        assert scale > 10 * sds.std() / 400_000**0.5 and apart.norm() < 0.1 * scale


@pytest.mark.slow
def test_sds_collapses_in_the_toy(monkeypatch):
    loss = toy_2d.distribution_matching_loss

    def sds(mu_real, mu_used, x, cond, **how):
        assert mu_used is toy_2d.no_score
        return loss(mu_real, lambda x_t, t, cond: x.detach(), x, cond, **how)

    monkeypatch.setattr(toy_2d, "distribution_matching_loss", sds)
    mu_real = EDMDenoiser(toy_2d.MixtureDenoiser())
    pairs, config = toy_2d.make_pairs(mu_real, 3), toy_2d.Config(seed=3, steps=600)
    *_, (G, _) = toy_2d.train_panel("(a) real score only", config, mu_real, pairs)
    share, spread = toy_2d.statistics(toy_2d.generate(G, 3))
    assert share[0] >= 0.9 and (spread[0] < 1 / 3).all()


def test_sid_has_dmds_gradient_if_the_predictions_are_fixed():
    known, noise, _ = a_batch("eq8")
    mu_real, mu_fake = known["mu_real"], known["mu_real"] + 0.1 * noise.flip(0)
    m = (mu_real - known["x"]).abs().mean(dim=(1, 2, 3), keepdim=True)
    x = known["x"].clone().requires_grad_()
    loss = (mu_real - mu_fake) * (mu_real - x - 1.2 * (mu_real - mu_fake)) / m
    (found,) = torch.autograd.grad(loss.sum(), x)
    expected = dmd_loss.dm_gradient(mu_fake=mu_fake, **known)
    torch.testing.assert_close(found, expected)


# --------------------------------------------------------------------------------------------------
# The text


def marked(name: str) -> list[list[str]]:
    """The cells of a table between its markers, each on a line of its own; row 1 is the rule."""
    found = re.findall(rf"^<!-- {name} -->\n(.*?)^<!-- end -->\n", TEXT, re.DOTALL | re.MULTILINE)
    assert len(found) == 1, name
    rows = [re.fullmatch(r"\| (.*?) ?\|", line)[1] for line in found[0].splitlines()]
    return [row.split(" | ") for row in rows]


def test_its_tables():
    """As many cells in every row as in the head, and nothing but text, code, equations, bold and
    links, for docs/build.py; the first has everything that is logged."""
    for name in ("healthy", "pedigree"):
        head, rule, *rows = marked(name)
        assert set(rule) == {"---"} and len(rule) == len(head)
        for row in rows:
            assert len(row) + row[-1].endswith(" |") == len(head), row
            assert not re.search(r"<|!\[|~~|\\\|", "".join(row))
    logged = "".join(row[0] for row in marked("healthy")[2:])
    for name in (*SCALARS, "learning_rate", "images_per_s"):
        assert f"`{name}`" in logged
    methods = [row[0].split("**")[1] for row in marked("pedigree")[2:]]
    assert methods == ["SDS", "VSD", "DMD", "DMD2", "SiD"]


def test_every_question_is_listed_and_answered_at_once():
    """In this order; an answer begins with a sentence in bold."""
    listed = re.findall(r"^- \[(.*?)\]\(#.*?\)$", TEXT, re.MULTILINE)
    sections = re.findall(r"^## (.*)\n\n(.*)", TEXT, re.MULTILINE)
    assert listed == [question for question, _ in sections] and 15 <= len(listed) <= 18
    for question, answer in sections:
        assert question.endswith("?") and answer.startswith("**"), question


def test_its_equations_survive_github():
    """Markdown reads these before an equation is found: | ends a cell, }_ and * begin emphasis, and
    a backslash before punctuation vanishes."""
    prose = re.sub(r"^```.*?^```|`[^`\n]*`", "", TEXT, flags=re.DOTALL | re.MULTILINE)
    equations = re.findall(r"\$\$?([^$]+)\$\$?", prose)
    assert len(equations) > 50 and prose.count("$") % 2 == 0
    for equation in equations:
        assert not re.search(r"[|*<>\n]|\}_|\\[^a-zA-Z]", equation), equation
