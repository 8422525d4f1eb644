"""Flow-GRPO: the stochastic denoising step with its log-probability, and the clipped objective.

Needs only torch; copy freely.

x_t = (1-t) x_0 + t eps, v = eps - x_0, t runs from 1 (noise) to 0 (image). One step goes from t to t' < t.

    Euler (eta = 0):  x' = x + (t' - t) v
    cps:  std = t' sin(eta pi/2)                           coefficients-preserving: the total noise stays at t'
          mu  = (1-t')(x - t v) + sqrt(t'^2 - std^2)(x + (1-t) v)
    sde:  s   = eta sqrt(t / (1 - t*)),  dt = t' - t       t* = t, except t_1 (the grid's second time) where t = 1
          mu  = x (1 + s^2 dt / 2t) + v (1 + s^2 (1-t) / 2t) dt,   std = s sqrt(-dt)
    then  x' = mu + std eps,   log p(x') = -mean_{N,C} (x' - mu)^2 / (2 std^2)

    ratio = p(x') / p_old(x') = exp(logp - logp_old)
    loss  = max(-A ratio, -A clip(ratio, 1-c, 1+c))

Sampling, and the replay that trains, for one step of S rows with advantages A (S,):

    v = velocity(x, t)                                                  # without gradient, under the old weights
    x_next, logp_old, _, _ = sde_step(v, x, t, t_next, eta=.8, noise=torch.randn_like(x))
    ...                                                                 # the rest of the trajectory, then rewards and A
    for _ in range(2):
        v = velocity(x, t)                                              # with gradient, under the new weights
        _, logp, _, _ = sde_step(v, x, t, t_next, eta=.8, x_next=x_next)
        loss, info = grpo_loss(logp, logp_old, A, clip=1e-3)            # the first time info["ratio"] is exactly 1
        optimizer.zero_grad(), loss.mean().backward(), optimizer.step()

What differs from the published code, and why
* Flow-GRPO's cps leaves 1 / (2 std^2) out of the log-probability, which weights every step by 2 std^2 (1.48 ... .13 on
  FLUX.1-Kontext's grid at T = 6). Here it stays, as in sde: log p is that of the Gaussian that was sampled from.
* The last step of a turn is never stochastic here (rollout.py): noise left in a picture would condition the next turn.
* The KL term is that of velocities, mean (v - v_ref)^2, and is added in train.py: one term serves GRPO and NFT.
* Samples without information are left out of the mean, not counted as zeros (advantage.py, train.py).
As published: a mean over latents, not a sum (it tempers the true log-ratio by 1 / (N C), and sets the scale of the clip
range), and the constants of the Gaussian left out, since they cancel in the ratio.

Sources: Flow-GRPO (arXiv 2505.05470) for sde and the objective, Flow-CPS (arXiv 2509.05952) for cps.
"""
import math

import torch


def sde_step(v, x, t, t_next, eta, kind="cps", t_1=None, noise=None, x_next=None):
    """One denoising step: velocity v, latents x (S, N, C) at time t -> x_next (S, N, C), logp (S,), mu (S, N, C), std.

    Give `noise` (S, N, C) to sample, or `x_next` to get the log-probability of what was sampled before. `t`, `t_next`
    and `t_1` are floats. With eta = 0 (or cps at t' = 0) the step is deterministic: std = 0 and logp = 0.
    Everything is computed in float32. ValueError if `kind` is unknown or an sde step at t = 1 lacks `t_1`.
    """
    v, x = v.float(), x.float()                      # bf16 would lose the small differences between t and t'
    if kind == "cps":
        std = t_next * math.sin(eta * math.pi / 2)
        x_0, eps = x - t * v, x + (1 - t) * v        # the image and the noise that v points to
        mu = (1 - t_next) * x_0 + math.sqrt(t_next ** 2 - std ** 2) * eps
    elif kind == "sde":
        t_star = t_1 if t == 1 else t
        if t_star is None:
            raise ValueError("an sde step at t = 1 divides by 1 - t: give t_1, the second time of the grid")
        s = eta * math.sqrt(t / (1 - t_star))
        dt = t_next - t
        std = s * math.sqrt(-dt)
        mu = x * (1 + s ** 2 * dt / (2 * t)) + v * (1 + s ** 2 * (1 - t) / (2 * t)) * dt
    else:
        raise ValueError(f"step kind {kind!r} is none of cps, sde")

    if x_next is None:
        x_next = mu + std * noise.float() if std > 0 else mu
        x_next = x_next.detach()
    if std == 0:
        return x_next, torch.zeros(len(x), device=x.device), mu, std
    logp = -(x_next.float() - mu).square().mean((1, 2)) / (2 * std ** 2)
    return x_next, logp, mu, std


def grpo_loss(logp, logp_old, A, clip=1e-4):
    """Clipped objective, per row: logp, logp_old, A (S,) -> loss (S,), info of (S,) tensors without gradient.

    PPO (arXiv 1707.06347), eq. 7. The ratio is exactly 1 before the first update of a rollout; anything else is a
    mismatch of rollout and update. `clip` is small, since log-probs are means over latents.
    """
    ratio = (logp - logp_old).exp()
    loss = torch.maximum(-A * ratio, -A * ratio.clamp(1 - clip, 1 + clip))
    clipped = ((A > 0) & (ratio > 1 + clip)) | ((A < 0) & (ratio < 1 - clip))   # here the gradient is zero
    return loss, {"ratio": ratio.detach(), "clip_fraction": clipped.float()}
