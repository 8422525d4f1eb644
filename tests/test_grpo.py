"""grpo.py against closed forms: Gaussians whose velocity is known, torch.distributions, longhand arithmetic."""
import math

import pytest
import torch

from grpo import grpo_loss, sde_step

KINDS = pytest.mark.parametrize("kind", ["cps", "sde"])
KONTEXT = [1, .9037, .7897, .6525, .4842, .2730, 0]      # the grid of FLUX.1-Kontext at 512 x 512, T = 6
T0, T1, ETA = .8, .6, .7                                 # one step, from t to t'


def draw(n=3, shape=(4, 6, 5)):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(n)]


def longhand(x_0, eps, kind):
    """Mean and std of the step from x_t = (1-t) x_0 + t eps, by way of the score -eps / t instead of x and v."""
    if kind == "cps":      # t' of noise in all: part of it the old eps, part of it fresh
        std = T1 * math.sin(ETA * math.pi / 2)
        return (1 - T1) * x_0 + T1 * math.cos(ETA * math.pi / 2) * eps, std
    g = ETA * math.sqrt(T0 / (1 - T0))
    drift = (eps - x_0) - g ** 2 / 2 * (-eps / T0)       # of the reverse SDE: v - g^2 / 2 score
    return (1 - T0) * x_0 + T0 * eps + drift * (T1 - T0), g * math.sqrt(T0 - T1)


def moments(kind, eta, grid, velocity, mean, std):
    """Mean and std of a Gaussian x along a grid, exactly: with v linear in x, a step maps x to a x + b + s noise."""
    for t, t_next in zip(grid, grid[1:]):
        x = torch.tensor([0., 1.]).view(2, 1, 1)
        _, _, mu, s = sde_step(velocity(x, t), x, t, t_next, eta, kind, grid[1], noise=torch.zeros_like(x))
        b, a = mu[0].item(), (mu[1] - mu[0]).item()
        mean, std = a * mean + b, math.hypot(a * std, s)
        yield t_next, mean, std


# ------------------------------------------------------------------------------------------------------------- the step

@KINDS
def test_eta_0_is_euler(kind):
    """A drift correction that does not vanish with the noise; evaluation and training on different samplers."""
    v, x, noise = draw()
    for t, t_next in zip(KONTEXT, KONTEXT[1:]):
        x_next, logp, mu, std = sde_step(v, x, t, t_next, 0., kind, KONTEXT[1], noise)
        torch.testing.assert_close(x_next, x + (t_next - t) * v, rtol=0, atol=2e-6)
        assert std == 0 and not logp.any() and torch.equal(mu, x_next)


@KINDS
def test_sample_is_the_longhand_mean_plus_std_times_noise(kind):
    """A slip in a coefficient; dt in place of sqrt(-dt); noise that is not scaled, or scaled twice."""
    x_0, eps, noise = draw()
    expected, std = longhand(x_0, eps, kind)
    x_next, _, mu, s = sde_step(eps - x_0, (1 - T0) * x_0 + T0 * eps, T0, T1, ETA, kind, noise=noise)
    torch.testing.assert_close(mu, expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(x_next, expected + std * noise, rtol=0, atol=2e-6)
    assert s == pytest.approx(std)


@KINDS
def test_logp_is_the_normal_log_density_without_its_constant(kind):
    """1 / (2 std^2) forgotten, std for variance, a sum for the mean, a mean over the batch."""
    x_0, eps, x_next = draw()
    mean, std = longhand(x_0, eps, kind)
    _, logp, _, _ = sde_step(eps - x_0, (1 - T0) * x_0 + T0 * eps, T0, T1, ETA, kind, x_next=x_next)
    density = torch.distributions.Normal(mean, std).log_prob(x_next).mean((1, 2))
    torch.testing.assert_close(logp, density + math.log(std) + math.log(2 * math.pi) / 2, rtol=1e-5, atol=1e-5)


@KINDS
def test_given_back_x_next_has_bitwise_the_same_logp_in_any_micro_batch(kind):
    """A ratio that is not exactly 1 before the first update: another code path for sampling and for training."""
    v, x, noise = draw(shape=(8, 9, 4))
    x_next, logp, mu, _ = sde_step(v, x, T0, T1, ETA, kind, noise=noise)
    for micro in (1, 3, 8):
        parts = [sde_step(v[s], x[s], T0, T1, ETA, kind, x_next=x_next[s]) for s in torch.arange(8).split(micro)]
        assert torch.equal(torch.cat([p[1] for p in parts]), logp) and torch.equal(torch.cat([p[2] for p in parts]), mu)
        assert torch.equal(torch.cat([p[0] for p in parts]), x_next)


@KINDS
def test_gradient_of_logp_is_the_score_of_the_noise(kind):
    """A sample that is not detached (the gradient would be 0), or a mean that is."""
    v, x, noise = draw()
    v.requires_grad_()
    _, logp, _, std = sde_step(v, x, T0, T1, ETA, kind, noise=noise)
    logp.sum().backward()
    g2 = ETA ** 2 * T0 / (1 - T0)
    dmu_dv = {"cps": -(1 - T1) * T0 + T1 * math.cos(ETA * math.pi / 2) * (1 - T0),
              "sde": (1 + g2 * (1 - T0) / (2 * T0)) * (T1 - T0)}[kind]
    torch.testing.assert_close(v.grad, noise * dmu_dv / (std * 30), rtol=1e-4, atol=1e-6)       # N C = 30


@KINDS
def test_half_precision_inputs_are_computed_in_float32(kind):
    """bf16 arithmetic: the update would not see the log-probability of the rollout."""
    v, x, noise = (y.bfloat16() for y in draw())
    half = sde_step(v, x, T0, T1, ETA, kind, noise=noise)
    full = sde_step(v.float(), x.float(), T0, T1, ETA, kind, noise=noise.float())
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(half[:3], full[:3]))


# ------------------------------------------------------------------------------------------ the distribution it samples

@pytest.mark.parametrize("eta", [.3, .8, 1.])
def test_cps_is_exact_for_a_point_mass_at_every_step(eta):
    """Noise that piles up or fades: the picture of turn k, noisy, would be what turn k+1 is conditioned on."""
    for t, mean, std in moments("cps", eta, KONTEXT, lambda x, t: (x - 2) / t, 0., 1.):      # x_0 = 2
        assert mean == pytest.approx((1 - t) * 2, abs=1e-5) and std == pytest.approx(t, abs=1e-5)


def test_sde_leaves_the_published_noise_on_the_kontext_grid():
    """t_1 not used at t = 1, or used after it. From x_0 + t eps, perfect v; ideal .904 .790 .653 .484 .273 0."""
    for t, t_next, left in zip(KONTEXT, KONTEXT[1:], [1.029, .981, .754, .582, .415, .326]):
        x = torch.ones(1, 1, 1)                          # x_0 = 0, so v = x / t, and mu / x of the old noise stays
        _, _, mu, std = sde_step(x / t, x, t, t_next, .9, "sde", KONTEXT[1], noise=x)
        assert math.hypot(mu.item() * t, std) == pytest.approx(left, abs=6e-4)


@pytest.mark.parametrize("eta", [.5, 1.])
def test_sde_keeps_the_marginals_of_a_gaussian(eta):
    """Drift correction dropped, halved or of the wrong sign: noise is added that the drift does not remove."""
    m, s = 1.5, .4                                       # x_0 ~ N(m, s^2), so x_t ~ N((1-t) m, (1-t)^2 s^2 + t^2)
    std = lambda t: math.hypot((1 - t) * s, t)
    velocity = lambda x, t: -m + (t - (1 - t) * s ** 2) / std(t) ** 2 * (x - (1 - t) * m)       # E[eps - x_0 | x_t]
    errors = []
    for n in (200, 400):
        grid = [.95 - .9 * i / n for i in range(n + 1)]
        steps = moments("sde", eta, grid, velocity, .05 * m, std(.95))
        errors.append(max(abs(mean - (1 - t) * m) + abs(sd - std(t)) for t, mean, sd in steps))
    assert errors[1] < .005 and errors[1] < .6 * errors[0]             # first order: half the step, half the error


def test_impossible_steps_are_refused():
    """1 / (1 - t) at t = 1 as a silent inf; a typo in the kind that samples something else."""
    v, x, noise = draw()
    with pytest.raises(ValueError, match="t_1"):
        sde_step(v, x, 1., .9, ETA, "sde", noise=noise)
    with pytest.raises(ValueError, match="ode"):
        sde_step(v, x, T0, T1, ETA, "ode", noise=noise)


# -------------------------------------------------------------------------------------------------------- the objective

def loss_and_gradient(ratio, A, clip):
    logp_old = torch.tensor([-.5, -.3, -.2, -.4])[:len(A)]
    logp = (logp_old + torch.tensor(ratio).log()).requires_grad_()
    loss, info = grpo_loss(logp, logp_old, torch.tensor(A), clip)
    loss.sum().backward()
    return loss.tolist(), logp.grad.tolist(), info


def test_loss_and_gradient_by_longhand_on_both_sides_of_the_clip():
    """Clip on the wrong side, min for max: steps that go too far would be pulled on, steps back would be stopped."""
    loss, gradient, info = loss_and_gradient([1.2, 1.2, .8, .8], [2., -2., 2., -2.], clip=.1)
    assert loss == pytest.approx([-2.2, 2.4, -1.6, 1.8])                 # max(-A ratio, -A clipped)
    assert gradient == pytest.approx([0, 2.4, -1.6, 0])                  # zero only where a further step is not wanted
    assert info["clip_fraction"].tolist() == [1, 0, 0, 1]
    assert info["ratio"].tolist() == pytest.approx([1.2, 1.2, .8, .8]) and not info["ratio"].requires_grad


def test_inside_the_clip_the_gradient_is_that_of_the_plain_ratio():
    """A clip range that is ignored, doubled or always binding."""
    loss, gradient, info = loss_and_gradient([1.09, .91], [2., -3.], clip=.1)
    assert loss == pytest.approx([-2.18, 2.73]) == gradient and not info["clip_fraction"].any()


def test_at_ratio_1_loss_and_gradient_are_minus_the_advantage():
    """Ascent for descent, or half a gradient at the tie of the two branches."""
    loss, gradient, _ = loss_and_gradient([1., 1., 1.], [2., -3., 0.], clip=1e-4)
    assert loss == gradient == [-2, 3, 0]
