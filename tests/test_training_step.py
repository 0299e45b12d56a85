"""Algorithm 1's loop body against gradients written out by hand, term by term."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import pairs_config, small_network

import make_pairs
import train
from plumbing.devices import Ranks
from plumbing.optim import Learner
from plumbing.pairs import Pairs
from teachers import EDMTeacher
from workloads import get_workload

ALONE = Ranks(0, 1, torch.device("cpu"))
STEP = 225  # of 900: a quarter of the way, where the schedules are nowhere at their ends


@pytest.fixture(scope="module")
def teacher():
    """A small network of random weights."""
    return EDMTeacher(small_network(), {"name": "small", "sha256": "0"})


@pytest.fixture(scope="module")
def tiny_pairs(teacher, tmp_path_factory):
    """Seven pairs of that teacher."""
    folder = tmp_path_factory.mktemp("tiny") / "pairs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_pairs, "load_teacher", lambda _: teacher)
        make_pairs.main(pairs_config(out=folder, num_pairs=7, steps=2, device="cpu"))
    return folder


def prepare(teacher, tiny_pairs, tmp_path, monkeypatch, **options):
    """A Run with a mu_fake of its own, and a list that gets the gradient of each Learner's step."""
    monkeypatch.setattr(train, "load_teacher", lambda _: teacher)
    options = {"batch_size": 4, "batch_size_ref": 2, **options}
    config = get_workload(pairs=str(tiny_pairs), out=str(tmp_path / "run"), **options)
    run, gradients = train.prepare(config, ALONE), []
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in run.mu_fake.network.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    original = Learner.step

    def step(learner, k):
        gradients.append([p.grad.clone() for p in learner.network.parameters()])
        return original(learner, k)

    monkeypatch.setattr(Learner, "step", step)
    return run, gradients


def by_hand(run, weighting_of_kl, lambda_reg, kl_on_pairs=False):
    """The two gradients of step STEP, from the paper's formulas and autograd."""
    b = train.draw_batch(run, STEP, range(4), range(2))
    G, mu_fake, mu_real = run.G.network, run.mu_fake.network, run.teacher.mu_real
    x_all = mu_real.sigma[-1] * torch.cat([b.z, b.z_ref])
    x_all = G.mu.net(x_all, 80.0, b.cond)
    x, x_ref, cond = x_all[:4], x_all[4:], b.cond[:4]
    if kl_on_pairs:
        x, cond = x_all, b.cond
    with torch.no_grad():
        sigma = mu_real.sigma[b.t].reshape(-1, 1, 1, 1)
        x_t = x + sigma * b.noise
        p_fake, p_real = mu_fake.net(x_t, sigma, cond), mu_real.net(x_t, sigma, cond)
        error = (x - p_real).flatten(1).abs().mean(1).reshape(-1, 1, 1, 1)
        gradient = weighting_of_kl(sigma, error) * (p_fake - p_real)
    loss_G = (x * gradient).mean() + lambda_reg * ((x_ref - b.y_ref) ** 2).mean()
    of_G = torch.autograd.grad(loss_G, list(G.parameters()))

    sigma = mu_real.sigma[b.t_fake].reshape(-1, 1, 1, 1)
    x = x.detach()
    prediction = mu_fake.net(x + sigma * b.noise_fake, sigma, cond)
    loss_fake = ((1 / sigma**2 + 4) * (prediction - x) ** 2).mean()
    return of_G, torch.autograd.grad(loss_fake, list(mu_fake.parameters()))


def agree(found, expected):
    """Assert that two gradients are equal up to rounding, relative to their norm."""
    found, expected = (torch.cat([p.flatten() for p in side]) for side in (found, expected))
    assert (found - expected).norm() < 1e-4 * expected.norm() and expected.norm() > 0


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kl_on_pairs", [False, True])
def test_the_gradients_of_a_step(
    teacher, tiny_pairs, tmp_path, monkeypatch, accumulate, kl_on_pairs
):
    """Eq. 7 with Eq. 8, Eq. 9 with the weight of this step, then Eq. 6; with Algorithm 1's line 4,
    and in parts."""
    run, gradients = prepare(
        teacher, tiny_pairs, tmp_path, monkeypatch, accumulate=accumulate, lambda_reg=0.5
    )
    run.config = replace(run.config, kl_on_pairs=kl_on_pairs)
    expected = by_hand(run, lambda sigma, error: 1 / error, 0.5 * 0.2**0.25, kl_on_pairs)
    before = [p.clone() for p in run.G.network.parameters()]
    scalars = train.training_step(run, STEP)
    for found, of_this in zip(gradients, expected, strict=True):
        agree(found, of_this)
    norms = [torch.cat([g.flatten() for g in side]).norm() for side in expected]
    torch.testing.assert_close(torch.stack(scalars[3:]), torch.stack(norms), rtol=1e-3, atol=0)

    # AdamW's first step is the learning rate's size: warm-up is over, the cosine has begun.
    rate = 4e-4 * 0.5 * (1 + math.cos(math.pi * (STEP - 50) / 850))
    for learner, ratio in ((run.G, 1), (run.mu_fake, 4)):
        (group,) = learner.optimizer.param_groups
        assert group["lr"] == pytest.approx(ratio * rate)
        assert (group["weight_decay"], group["betas"]) == (0.01, (0.9, 0.999))
    moved = [(p - q).abs().max() for p, q in zip(run.G.network.parameters(), before, strict=True)]
    assert 0.5 * rate < max(moved) < 1.5 * rate
    # The average has gone 1 - 226/235 of the way, what is clipped is what AdamW saw.
    old, new, mean = (
        torch.cat([p.detach().flatten().double() for p in parameters])
        for parameters in (before, run.G.network.parameters(), run.G.average.parameters())
    )
    way = (mean - old) @ (new - old) / (new - old).square().sum()
    assert way == pytest.approx(9 / 235, rel=0.01)


def test_the_gradient_is_clipped(teacher, tiny_pairs, tmp_path, monkeypatch):
    """To --grad-clip's norm, each network's by itself: a tenth of it is AdamW's first moment."""
    run, gradients = prepare(teacher, tiny_pairs, tmp_path, monkeypatch, grad_clip=0.03)
    train.training_step(run, STEP)
    for learner, found in zip((run.G, run.mu_fake), gradients, strict=True):
        moments = [state["exp_avg"].flatten() for state in learner.optimizer.state.values()]
        assert torch.cat(moments).norm() == pytest.approx(0.1 * 0.03, rel=1e-3)
        whole = torch.cat([g.flatten() for g in found])
        assert whole.norm() > 0.1  # before
        agree([torch.cat(moments) * whole.norm() / 0.003], [whole])


@pytest.mark.parametrize(
    ("weighting", "of_kl"),
    [("dreamfusion", lambda sigma, error: 1 / sigma), ("prolificdreamer", lambda s, e: s)],
)
def test_the_weighting_of_a_step(teacher, tiny_pairs, tmp_path, monkeypatch, weighting, of_kl):
    """Table 2's: the gradient is (alpha / sigma) or alpha sigma times p_fake - p_real."""
    run, gradients = prepare(teacher, tiny_pairs, tmp_path, monkeypatch, weighting=weighting)
    expected, _ = by_hand(run, of_kl, 0.2**0.25)
    train.training_step(run, STEP)
    agree(gradients[0], expected)


def test_the_weight_of_the_kl_gradient(teacher, tiny_pairs, tmp_path, monkeypatch):
    """--lambda-dm, and --max-dm-step, which no noise level exceeds."""
    options = {"lambda_dm": 3.0, "max_dm_step": 100}
    run, gradients = prepare(teacher, tiny_pairs, tmp_path, monkeypatch, **options)
    expected, _ = by_hand(run, lambda sigma, error: 3 / error, 0.2**0.25)
    train.training_step(run, STEP)
    agree(gradients[0], expected)
    levels = torch.cat([train.draw_batch(run, k, range(4), []).t for k in range(50)])
    assert levels.min() >= 20 and 80 < levels.max() < 100


def test_what_a_part_draws(teacher, tiny_pairs, tmp_path, monkeypatch):
    """Pairs come with their own noise and class; the unpaired classes are uniform."""
    run, _ = prepare(teacher, tiny_pairs, tmp_path, monkeypatch)
    batch = train.draw_batch(run, 3, range(2000), range(50))
    pairs = Pairs(tiny_pairs, "mnist")
    z, y, cond = pairs.batch(range(7))
    for i in range(50):
        (k,) = [k for k in range(7) if torch.equal(z[k], batch.z_ref[i])]
        assert torch.equal(y[k], batch.y_ref[i]) and cond[k] == batch.cond[2000 + i]
    assert len({tuple(row.flatten()[:3].tolist()) for row in batch.z_ref}) == 7
    counts = torch.bincount(batch.cond[:2000], minlength=10)
    assert len(counts) == 10 and counts.min() > 140 and counts.max() < 260
    # Classes, noise levels and noises know nothing of each other.
    drawn = [batch.cond[:2000], batch.t, batch.t_fake]
    drawn += [noise[:, 0, 5, 5] for noise in (batch.z, batch.noise, batch.noise_fake)]
    correlation = torch.corrcoef(torch.stack([values.double() for values in drawn]))
    assert (correlation - torch.eye(6)).abs().max() < 0.1


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_float32_is_tf32_only_beside_half_precision(
    teacher, tiny_pairs, tmp_path, monkeypatch, amp
):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", amp == "off")
    prepare(teacher, tiny_pairs, tmp_path, monkeypatch, amp=amp)
    assert torch.backends.cudnn.allow_tf32 == (amp != "off")


def test_dropout_is_off(teacher, tiny_pairs, tmp_path, monkeypatch):
    """Line 1 of Algorithm 1 refuses a network that is not in eval mode."""
    run, _ = prepare(teacher, tiny_pairs, tmp_path, monkeypatch)
    for learner in (run.G, run.mu_fake):
        assert not any(module.training for module in learner.network.modules())
    student = teacher.student
    monkeypatch.setattr(teacher, "student", lambda: student().train())
    with pytest.raises(AssertionError):
        train.prepare(replace(run.config, out=str(tmp_path / "other")), ALONE)
