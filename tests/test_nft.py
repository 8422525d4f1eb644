"""nft.py against closed forms and longhand arithmetic."""
import pytest
import torch

from nft import nft_loss, noised, old_decay

BETAS = pytest.mark.parametrize("beta", [.1, .5, 1.])
A_MAX = 5.
A = torch.tensor([-7., -5., -2., 0., 1., 5., 9.])                        # p = 0, 0, .3, .5, .6, 1, 1
P = torch.tensor([0., 0., .3, .5, .6, 1., 1.])


def problem(S=7, N=4, C=3):
    """v, v_old (equal), x_t, x_0, t: the same picture, noise, time and velocity in every row."""
    generator = torch.Generator().manual_seed(0)
    x_0, eps, error = (torch.randn(1, N, C, generator=generator).expand(S, N, C) for _ in range(3))
    t = torch.full((S,), .7)
    v = eps - x_0 + .3 * error
    return v, v.clone(), .3 * x_0 + .7 * eps, x_0, t


def gradient(A, beta, v, v_old, x_t, x_0, t):
    v = v.clone().requires_grad_()
    loss, info = nft_loss(v, v_old, x_t, x_0, t, A, beta, A_MAX)
    loss.sum().backward()
    return loss.detach(), v.grad, info


@BETAS
def test_loss_does_not_depend_on_p_at_the_old_policy(beta):
    """Positive and negative policy not symmetric about v_old, or only one branch weighted."""
    v, v_old, x_t, x_0, t = problem()
    difference = x_t - .7 * v - x_0
    expected = A_MAX / beta * difference.square().mean((1, 2)) / difference.abs().mean((1, 2))
    torch.testing.assert_close(nft_loss(v, v_old, x_t, x_0, t, A, beta, A_MAX)[0], expected, rtol=1e-5, atol=0)


@BETAS
def test_gradient_at_the_old_policy_is_2p_minus_1_times_flow_matching_for_any_beta(beta):
    """p not centred at 1/2 or not clamped, a sign slip in v-, 1 / beta missing, a gradient through w."""
    v, v_old, x_t, x_0, t = problem()
    difference = x_t - .7 * v - x_0                                      # x0-hat - x_0
    w = difference.abs().mean((1, 2), keepdim=True)
    expected = A_MAX * (2 * P - 1)[:, None, None] * -2 * .7 * difference / (w * 12)       # N C = 12
    torch.testing.assert_close(gradient(A, beta, v, v_old, x_t, x_0, t)[1], expected, rtol=1e-4, atol=1e-5)


@BETAS
def test_advantage_0_gives_no_gradient_at_the_old_policy(beta):
    """A sample of average quality that moves the policy."""
    _, grad, _ = gradient(torch.zeros(7), beta, *problem())
    assert grad.abs().max() < 1e-5


def test_good_samples_pull_x_0_hat_towards_x_0_and_bad_ones_push_it_away():
    """Ascent for descent, or positive and negative exchanged."""
    v, v_old, x_t, x_0, t = problem(2)
    _, grad, _ = gradient(torch.tensor([A_MAX, -A_MAX]), 1., v, v_old, x_t, x_0, t)
    distance = lambda v: (x_t - .7 * v - x_0).square().mean((1, 2))
    good, bad = distance(v - .01 * grad) - distance(v)
    assert good < 0 < bad


def test_loss_and_gradient_by_longhand_away_from_the_old_policy():
    """A coefficient of v+ or v-, the time, the adaptive weight, a mean over rows. Two rows of two numbers."""
    v, v_old = torch.tensor([[[1., 0.]]]).repeat(2, 1, 1), torch.tensor([[[0., .4]]]).repeat(2, 1, 1)
    x_t, x_0 = torch.tensor([[[.5, .2]]]).repeat(2, 1, 1), torch.tensor([[[.3, -.1]]]).repeat(2, 1, 1)
    loss, grad, info = gradient(torch.tensor([2.5, -10.]), .5, v, v_old, x_t, x_0, torch.tensor([.5, 1.]))
    # v+ = [.5, .2], v- = [-.5, .6]
    # row 1: t = .5, p = .75; x0+ - x_0 = [-.05, .2], w+ = .125, L+ = .17; x0- - x_0 = [.45, 0], w- = .225, L- = .45
    # row 2: t = 1, p = 0;    x0- - x_0 = [.7, -.3], w- = .5, L- = .58
    assert loss.tolist() == pytest.approx([10 * (.75 * .17 + .25 * .45), 10 * .58])
    # 5 t (-p (x0+ - x_0) / w+ + (1-p) (x0- - x_0) / w-)
    assert grad[0, 0].tolist() == pytest.approx([2., -3.], abs=1e-5)
    assert grad[1, 0].tolist() == pytest.approx([7., -3.], abs=1e-5)
    assert info["old_distance"].tolist() == pytest.approx([.58, .58]) and not info["old_distance"].requires_grad


@pytest.mark.parametrize("kl", [.5, 1.])
def test_negative_samples_alone_go_as_far_as_a_kl_term_lets_them(kl):
    """A push that grows with the error, as without the weight w, or one that --kl .5 cannot hold."""
    v, v_ref, x_t, x_0, t = problem(2)
    A, target = torch.tensor([-1., -3.]), (x_t - x_0) / .7                 # v*
    for _ in range(200):
        v = v.detach().requires_grad_()
        loss = nft_loss(v, v.detach(), x_t, x_0, t, A, 1., A_MAX)[0] + kl * (v - v_ref).square().mean((1, 2))
        v = v - 3 * torch.autograd.grad(loss.sum(), v)[0]                  # the old policy follows at once
    distance = lambda v: (v - target).abs().mean((1, 2))
    torch.testing.assert_close(distance(v), distance(v_ref) - .7 * A / kl, rtol=1e-4, atol=0)


def test_perfect_prediction_is_finite_thanks_to_the_floor_of_w():
    """0 / 0 where x0-hat equals x_0; and w under 1e-5, which would blow up rounding errors."""
    zero = torch.zeros(2, 1, 2)
    v = torch.tensor([0., 1e-6]).view(2, 1, 1).expand(2, 1, 2)
    loss, grad, _ = gradient(torch.tensor([5., 5.]), 1., v, zero, zero, zero, torch.ones(2))
    assert loss.tolist() == pytest.approx([0, 5 * 1e-12 / 1e-5], rel=1e-4) and grad.isfinite().all()


def test_noised_goes_from_the_picture_to_the_noise_row_by_row():
    """Time running the other way, or broadcast over the wrong axis."""
    x_0, eps = torch.tensor([1., 2.]).expand(3, 3, 2), torch.tensor([5., -2.]).expand(3, 3, 2)
    x = noised(x_0, torch.tensor([0., .25, 1.]), eps)
    assert x[:, 0].tolist() == [[1, 2], [2, 1], [5, -2]] and torch.equal(x, x[:, :1].expand_as(x))


def test_old_policy_follows_fast_at_first_and_by_half_in_the_end():
    """A ramp that starts at 0 (or never ends): the old policy frozen, or never apart from the policy."""
    assert [old_decay(step) for step in (1, 200, 500, 10_000)] == pytest.approx([.001, .2, .5, .5])
