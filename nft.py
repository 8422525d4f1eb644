"""DiffusionNFT: reinforcement learning on the forward process. Needs only torch; copy freely.

Instead of the likelihood of a sampling path it needs only the sample x_0 that the old policy made: noise it to
x_t = (1-t) x_0 + t eps and ask the velocity to explain good samples (p near 1) better than the old policy does, and bad
samples (p near 0) worse, by an implicit positive and an implicit negative policy around the old one.

    p    = clamp(A / (2 A_max) + 1/2, 0, 1)                       optimality probability
    v+   = beta v + (1-beta) v_old        v- = (1+beta) v_old - beta v
    x0+- = x_t - t v+-                    w+- = mean |x0+- - x_0|   (no gradient, at least 1e-5)
    L+-  = mean (x0+- - x_0)^2 / w+-
    loss = A_max / beta (p L+ + (1-p) L-)
    old <- d old + (1-d) policy           d = min(.001 n, .5), once a rollout, after optimizer step n

At v = v_old the loss does not depend on p, and its gradient is A times that of weighted flow matching in x_0 space,
mean (x_0(v) - x_0)^2 / w: A_max / beta cancels beta and the 1 / A_max in 2p - 1 = A / A_max (where |A| <= A_max).

Weights w apart, one sample's loss is least at v = v_old + A / (beta A_max) (v* - v_old), v* = (x_t - x_0) / t: a
negative sample adds to the error that a positive one takes away, and `old` follows. Where x_t or the picture tells that
a sample will be a negative one, errors grow like interest (docs/results.md: "runs away"). A term kl mean (v - v_ref)^2
bounds them: where all samples are negative, mean |v - v*| ends at mean |v_ref - v*| + t |A| / kl.

What differs from the published code, and why
* Nothing in the loss. Like that code, and unlike its paper, it is taken in x_0 space with the adaptive weight w.
* Times t are drawn without replacement from the rollout's own grid (train.py), with noise of its own for every row.
* Samples without information (advantage.py) are left out; p = 1/2 would train them all the same.

Source: DiffusionNFT (arXiv 2509.16117) and its published code.
"""
import torch


def noised(x_0, t, eps):
    """x_t = (1-t) x_0 + t eps: x_0, eps (S, N, C), t (S,)."""
    t = t[:, None, None]
    return (1 - t) * x_0 + t * eps


def nft_loss(v, v_old, x_t, x_0, t, A, beta=1., A_max=5.):
    """Negative-aware objective, per row: v, v_old, x_t, x_0 (S, N, C), t, A (S,) -> loss (S,), info of (S,) tensors."""
    v, v_old, x_t, x_0 = v.float(), v_old.float(), x_t.float(), x_0.float()
    p = (A / (2 * A_max) + .5).clamp(0, 1)
    v_positive = beta * v + (1 - beta) * v_old
    v_negative = (1 + beta) * v_old - beta * v

    def error(v):                                                       # L+-
        difference = x_t - t[:, None, None] * v - x_0
        w = difference.detach().abs().mean((1, 2)).clamp(min=1e-5)
        return difference.square().mean((1, 2)) / w

    loss = A_max / beta * (p * error(v_positive) + (1 - p) * error(v_negative))
    return loss, {"old_distance": (v - v_old).detach().square().mean((1, 2))}


def old_decay(n, slope=.001, limit=.5):
    """How much of the old policy stays in it once n optimizer steps were taken: old <- d old + (1-d) policy."""
    return min(slope * n, limit)
