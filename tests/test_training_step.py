"""The loop body of Algorithm 1 against gradients that are written out by hand."""

from copy import copy
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import ALONE, pairs_config, small_network, start

import dmd_loss
import make_pairs
import train
from plumbing.optim import Learner
from teachers import EDMTeacher
from workloads import get_workload

STEP = 25  # half of the warm-up
LAMBDA_REG = 0.3  # in this step


@pytest.fixture(scope="module")
def teacher():
    """A small network with random weights."""
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
    """A Run whose mu_fake differs from G, and a list that collects the gradient of each step."""
    monkeypatch.setattr(train, "load_teacher", lambda _: teacher)
    rates = {"learning_rate": 4e-4, "fake_lr_ratio": 4.0, "warmup": 52}
    phases = ((STEP, {}), (10**6, {"lambda_reg": LAMBDA_REG}))  # as Table 5 has them
    batch = {"batch_size": 4, "batch_size_ref": 2, "num_pairs": 7}
    options = {**rates, **batch, "phases": phases, **options}
    config = get_workload(pairs=str(tiny_pairs), out=str(tmp_path / "run"), **options)
    run, gradients = start(config), []
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


def by_hand(run, weighting=lambda sigma, error: 1 / error, over_snr=4):
    """The two gradients of step STEP, from the paper's formulas and autograd, and its losses."""
    b, config = train.draw_batch(run, STEP, range(4), range(2)), run.config.at(STEP)
    G, mu_fake, mu_real = run.G.network, run.mu_fake.network, run.teacher.mu_real
    x_all = mu_real.sigma[-1] * torch.cat([b.z, b.z_ref])
    x_all = G.mu.net(x_all, 80.0, b.cond)
    x, x_ref, cond = x_all[:4], x_all[4:], b.cond[:4]
    if config.kl_on_pairs:
        x, cond = x_all, b.cond
    with torch.no_grad():
        sigma = mu_real.sigma[b.t].reshape(-1, 1, 1, 1)
        x_t = x + sigma * b.noise
        p_fake, p_real = mu_fake.net(x_t, sigma, cond), mu_real.net(x_t, sigma, cond)
        error = (x - p_real).flatten(1).abs().mean(1).reshape(-1, 1, 1, 1)
        gradient = weighting(sigma, error) * (p_fake - p_real)
    loss_reg = ((x_ref - b.y_ref) ** 2).mean()
    loss_G = config.lambda_dm * (x * gradient).mean() + LAMBDA_REG * loss_reg
    of_G = torch.autograd.grad(loss_G, list(G.parameters()))

    sigma = mu_real.sigma[b.t_fake].reshape(-1, 1, 1, 1)
    x = x.detach()
    prediction = mu_fake.net(x + sigma * b.noise_fake, sigma, cond)
    loss_fake = ((1 / sigma**2 + over_snr) * (prediction - x) ** 2).mean()
    of_fake = torch.autograd.grad(loss_fake, list(mu_fake.parameters()))
    losses = torch.stack([0.5 * gradient.square().mean(), loss_reg, loss_fake])
    return (of_G, of_fake), losses.detach()


def agree(found, expected):
    """Assert that two gradients are equal up to rounding, relative to their norm."""
    found, expected = (torch.cat([p.flatten() for p in side]) for side in (found, expected))
    assert (found - expected).norm() < 1e-4 * expected.norm() and expected.norm() > 0


CASES = {  # name -> what differs: the options, and the arguments of by_hand
    "eq8": ({}, {}),
    "eq8, in parts": ({"accumulate": 2}, {}),
    "line 4": ({"kl_on_pairs": True}, {}),
    "line 4, in parts": ({"kl_on_pairs": True, "accumulate": 2}, {}),
    # Table 2's: the gradient is (alpha / sigma) or alpha sigma times p_fake - p_real.
    "dreamfusion": ({"weighting": "dreamfusion"}, {"weighting": lambda sigma, error: 1 / sigma}),
    "prolificdreamer": ({"weighting": "prolificdreamer"}, {"weighting": lambda s, error: s}),
    # The losses that are reported do not contain the weight.
    "lambda_dm": ({"lambda_dm": 3.0, "max_dm_step": 100}, {}),
    # A teacher that predicts the noise: the weight of the denoising loss is the SNR alone.
    "noise prediction": ({}, {"over_snr": 0}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_gradients_of_a_step(teacher, tiny_pairs, tmp_path, monkeypatch, case):
    """Eq. 7, Eq. 9 with the weight of this step, and Eq. 6."""
    options, how = CASES[case]
    monkeypatch.setattr(teacher, "sigma_data", None if "over_snr" in how else 0.5)
    run, gradients = prepare(teacher, tiny_pairs, tmp_path, monkeypatch, **options)
    expected, losses = by_hand(run, **how)
    scalars = train.training_step(run, STEP)
    for found, of_this in zip(gradients, expected, strict=True):
        agree(found, of_this)
    norms = [torch.cat([g.flatten() for g in side]).norm() for side in expected]
    expected = torch.cat([losses, torch.stack(norms)])
    torch.testing.assert_close(torch.stack(scalars), expected, rtol=1e-3, atol=0)
    if case == "lambda_dm":
        levels = torch.cat([train.draw_batch(run, k, range(4), []).t for k in range(50)])
        assert levels.min() >= 20 and 80 < levels.max() < 100


def test_what_a_step_does_to_the_weights(teacher, tiny_pairs, tmp_path, monkeypatch):
    """AdamW's first step is as large as the learning rate, half of what follows the warm-up."""
    run, _ = prepare(teacher, tiny_pairs, tmp_path, monkeypatch)
    before = [p.clone() for p in run.G.network.parameters()]
    train.training_step(run, STEP)
    rate = 2e-4
    for learner, ratio in ((run.G, 1), (run.mu_fake, 4)):
        (group,) = learner.optimizer.param_groups
        assert group["lr"] == pytest.approx(ratio * rate)
    moved = [(p - q).abs().max() for p, q in zip(run.G.network.parameters(), before, strict=True)]
    assert 0.5 * rate < max(moved) < 1.5 * rate
    # Only G has an average, which has gone 1 - (25/26)^4 of the way.
    assert run.mu_fake.average is run.mu_fake.network
    old, new, mean = (
        torch.cat([p.detach().flatten().double() for p in parameters])
        for parameters in (before, run.G.network.parameters(), run.G.average.parameters())
    )
    way = (mean - old) @ (new - old) / (new - old).square().sum()
    assert way == pytest.approx(1 - (25 / 26) ** 4, rel=0.01)


@pytest.mark.parametrize(("end", "later"), [(None, [8, 8]), (104, [4, 0])])
def test_the_learning_rate_warms_up_and_may_end_as_a_cosine(end, later):
    how = {"end": end, "betas": (0.9, 0.99), "weight_decay": 0, "grad_clip": 1}
    warm, cold = (Learner(torch.nn.Linear(1, 1), ALONE, 8.0, warmup=w, **how) for w in (4, 0))
    rates = [warm.learning_rate(k) for k in (0, 1, 2, 3, 4, 54, 104)]
    assert rates == pytest.approx([2, 4, 6, 8, 8, *later])
    assert cold.learning_rate(0) == 8


def test_the_gradient_is_clipped(teacher, tiny_pairs, tmp_path, monkeypatch):
    """Each network by itself, to the norm grad_clip, of which AdamW's first moment is a fifth."""
    options = {"grad_clip": 0.03, "beta1": 0.8, "beta2": 0.99, "weight_decay": 0.02}
    run, gradients = prepare(teacher, tiny_pairs, tmp_path, monkeypatch, **options)
    train.training_step(run, STEP)
    for learner, found in zip((run.G, run.mu_fake), gradients, strict=True):
        moments = [state["exp_avg"].flatten() for state in learner.optimizer.state.values()]
        assert torch.cat(moments).norm() == pytest.approx(0.2 * 0.03, rel=1e-3)
        whole = torch.cat([g.flatten() for g in found])
        assert whole.norm() > 0.1  # before
        agree([torch.cat(moments) * whole.norm() / 0.006], [whole])
        (group,) = learner.optimizer.param_groups
        assert (group["weight_decay"], group["betas"]) == (0.02, (0.8, 0.99))


def test_each_network_has_a_loss_scale_of_its_own(teacher, tiny_pairs, tmp_path, monkeypatch):
    """With fp16. The reported norms are those of the unscaled gradients."""
    run, _ = prepare(teacher, tiny_pairs, tmp_path, monkeypatch, amp="fp16")
    assert run.G.scaler.is_enabled() and run.mu_fake.scaler.is_enabled()
    run.G.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    expected, _ = by_hand(run)
    norms = torch.stack(train.training_step(run, STEP)[3:])
    whole = [torch.cat([g.flatten() for g in side]).norm() for side in expected]
    torch.testing.assert_close(norms, torch.stack(whole), rtol=0.05, atol=0)


def test_half_precision_is_of_the_networks_alone(teacher, tiny_pairs, tmp_path, monkeypatch):
    """All of them run in it, but LPIPS leaves it."""
    run, _ = prepare(teacher, tiny_pairs, tmp_path, monkeypatch, amp="bf16")
    seen = []

    def note(name, function):
        def call(*arguments):
            seen.append((name, torch.is_autocast_enabled("cpu")))
            return function(*arguments)

        return call

    run.teacher = copy(teacher)
    run.teacher.mu_real = teacher.student()
    run.teacher.decode = note("decode", teacher.decode)
    lpips = note("lpips", lambda x, y: (x - y).square().mean((1, 2, 3)))
    run.distance = partial(dmd_loss.lpips_distance, lpips)
    networks = (run.G.network, run.mu_fake.network, run.teacher.mu_real)
    for name, network in zip(("G", "mu_fake", "mu_real"), networks, strict=True):
        network.forward = note(name, network.forward)
    train.training_step(run, STEP)
    assert seen == [
        ("G", True), ("mu_real", True), ("mu_fake", True),
        ("decode", True), ("decode", True), ("lpips", False), ("mu_fake", True),
    ]  # fmt: skip


class SevenPairs:
    """Pairs that say their number: z = k, y = -k, and the prompt or the class is k."""

    def __init__(self, text: bool):
        self.text = text

    def prompts(self, indices):
        return list(map(str, indices))

    def __len__(self):
        return 7

    def batch(self, indices):
        z = torch.tensor(indices, dtype=torch.float32).reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2)
        return z, -z, self.prompts(indices) if self.text else torch.tensor(indices)


def draw(step=3, rows=range(2000), rows_ref=range(2000), classes=0, **options):
    """Part of a batch with line 4 of Algorithm 1, of 10 classes or with prompts 0 .. 6."""
    config = get_workload("sd15", batch_size=2000, batch_size_ref=2000, **options)
    teacher = SimpleNamespace(
        num_classes=classes,
        image_shape=(1, 2, 2),
        encode=lambda cond: torch.tensor([int(k) for k in cond]),
    )
    pairs = SevenPairs(text=not classes)
    run = SimpleNamespace(config=config, ranks=ALONE, teacher=teacher, pairs=pairs)
    return train.draw_batch(run, step, rows, rows_ref)


@pytest.mark.parametrize("classes", [0, 10])
def test_what_a_part_draws(classes):
    """Pairs have their own noise and condition. Everything else is independent, between the
    unpaired and the paired half as well as within a row."""
    b = draw(classes=classes)
    for values in (b.z_ref, -b.y_ref):
        assert torch.equal(values[:, 0, 1, 1], b.cond[2000:])
    for half, kinds in ((b.cond[:2000], classes or 7), (b.cond[2000:], 7)):  # uniform
        counts = torch.bincount(half, minlength=kinds)
        assert len(counts) == kinds and (counts - 2000 / kinds).abs().max() < 70
    assert 20 <= b.t.min() < 25 and 975 <= b.t.max() < 980
    assert 0 <= b.t_fake.min() < 5 and 995 <= b.t_fake.max() < 1000
    drawn = [b.cond, b.t, b.t_fake, b.noise[:, 0, 1, 1], b.noise_fake[:, 0, 1, 1]]
    columns = [half for values in drawn for half in values.double().chunk(2)]
    columns.append(b.z[:, 0, 1, 1].double())
    correlation = torch.corrcoef(torch.stack(columns)) - torch.eye(11)
    assert correlation.abs().max() < 0.12  # 5 standard errors


def test_seed_step_and_row_decide_what_is_drawn():
    """Nothing else does."""
    whole, rows, rows_ref = draw(), [7, 1900, 3], [1999, 0]
    both = [*rows, *(2000 + row for row in rows_ref)]
    part = draw(rows=rows, rows_ref=rows_ref)._asdict()
    for name, values in whole._asdict().items():
        chosen = {"z": rows, "z_ref": rows_ref, "y_ref": rows_ref}.get(name, both)
        assert torch.equal(part[name], values[chosen]), name
    assert all(map(torch.equal, whole, draw()))
    for other in (draw(step=4), draw(seed=1)):
        for values, others in zip(whole, other, strict=True):
            same = (values == others).flatten(1 if values.ndim > 1 else 0)
            assert same.double().mean() < 0.25  # of seven pairs and prompts, 1/7


def test_one_guidance_scale_for_both_losses(teacher, tmp_path, monkeypatch):
    """Section 3.4: mu_real is guided as the pairs were, whatever the scale of the workload."""

    def load_teacher(config):
        loaded = copy(teacher)
        loaded.guidance = config.guidance
        return loaded

    pairs = SimpleNamespace(meta={"guidance": 2.0}, check_teacher=lambda record: None)
    monkeypatch.setattr(train, "Pairs", lambda folder, dataset, first: pairs)
    monkeypatch.setattr(train, "load_teacher", load_teacher)
    config = get_workload("sd15", out=str(tmp_path / "run"), distance="l2")
    assert config.guidance == 3
    run = start(config)
    assert run.teacher.guidance == run.config.guidance == 2


def test_dropout_is_off(teacher, tiny_pairs, tmp_path, monkeypatch):
    """Line 1 of Algorithm 1 refuses a network that is not in eval mode."""
    run, _ = prepare(teacher, tiny_pairs, tmp_path, monkeypatch)
    for learner in (run.G, run.mu_fake):
        assert not any(module.training for module in learner.network.modules())
    student = teacher.student
    monkeypatch.setattr(teacher, "student", lambda: student().train())
    with pytest.raises(AssertionError):
        start(replace(run.config, out=str(tmp_path / "other")))
    monkeypatch.setattr(teacher, "student", lambda: student().eval())
    monkeypatch.setattr(teacher, "mu_real", student().train())
    with pytest.raises(AssertionError):
        start(replace(run.config, out=str(tmp_path / "third")))
