"""Rewards of multi-turn trajectories -> advantages. Needs only torch; copy freely.

B tasks, G samples per task (the group), K turns, R rewards. r (B, G, K, R) lies in [0, 1]; NaN = the judge failed. Q is
the score that samples of a group are compared by.

    turns:   spread=trajectory   Q_r  = aggregate_k r_rk          mean | min | product | last; every turn gets this one
                                                                  (the broadcast of MT-EditFlow)
             spread=turn         Q_rk = r_rk                      a turn is compared by its own reward alone
             spread=togo         Q_rk = mean_{j >= k} r_rj        by what it led to
    group:   A_r = (Q_r - mean_g Q_r) / (std_g Q_r + 1e-4)        over the G samples of one task, each turn by itself
    fuse:    advantage           A = sum_r w_r A_r / max(batch std, .1)      every reward counts by its own scale
             reward              A = group(sum_r w_r Q_r)                    a reward of wide range drowns the others
    clip:    A in [-5, 5]

NaN is left out of mean and std, and such a sample's A_r is 0. A group whose std in a reward is under min_std gives 0
for that reward: set min_std far below the usual spread of every reward, or the reward is switched off.

What differs from the published code, and why
* Flow-GRPO and DiffusionNFT see one picture a sample; turns, their aggregation and their spread are MT-EditFlow's idea.
  Turns are never pooled in one baseline: later turns succeed less often, and would be punished for being late.
* Groups without spread are left out, not counted as zeros, so that a step's size does not depend on how many there are.
* The division by the batch's std at advantage level: following and consistency often pull against each other, then the
  sum of their unit-variance terms is small; it gives both fusion levels steps of one size (GDPO, arXiv 2601.05242).
* A_max of NFT and the clip here are one number, 5, as in DiffusionNFT's code.
"""
import torch

AGGREGATE = {                             # (B, G, K, R) -> (B, G, R)
    "mean": lambda r: r.mean(2),          # with an unjudged turn a trajectory has no score: NaN
    "min": lambda r: r.amin(2),           # likewise
    "product": lambda r: r.prod(2),       # likewise
    "last": lambda r: r[:, :, -1],        # the others do not count, judged or not
    "whole": lambda r: r[:, :, -1],       # the judge was asked once, at the end, about the whole trajectory
}
SPREAD = ("trajectory", "turn", "togo")
FUSE = ("advantage", "reward")


def turn_scores(r, aggregate="mean", spread="trajectory"):
    """What samples of a group are compared by: rewards r (B, G, K, R) -> Q (B, G, 1, R), or (B, G, K, R) by turn."""
    if spread == "trajectory":
        return AGGREGATE[aggregate](r)[:, :, None]
    if spread == "turn":
        return r
    K = r.shape[2]
    return torch.stack([r[:, :, k:].mean(2) for k in range(K)], 2)


def group_std(Q):
    """Mean and standard deviation over dim 1, the group, NaN left out: Q (B, G, ...) -> two of (B, 1, ...)."""
    judged = ~Q.isnan()
    n = judged.sum(1, keepdim=True).clamp(min=1)
    mean = Q.nan_to_num().sum(1, keepdim=True) / n
    centred = torch.where(judged, Q - mean, 0.)
    return mean, (centred.square().sum(1, keepdim=True) / n).sqrt()


def group_normalize(Q, min_std=.02):
    """(Q - mean) / (std + 1e-4) over dim 1, the group: Q (B, G, ...) -> A (B, G, ...), valid (B, G, ...) bool.

    NaN gets A = 0. A group gives 0 throughout, and is not valid, where its std is under `min_std` (nothing to learn but
    noise) or more than half of it is NaN.
    """
    judged = ~Q.isnan()
    mean, std = group_std(Q)
    enough = 2 * judged.sum(1, keepdim=True) >= Q.shape[1]
    spread_out = std >= max(min_std, 1e-8)                                        # 1e-8: equal scores, but for rounding
    valid = judged & enough & spread_out
    return torch.where(valid, (Q - mean) / (std + 1e-4), 0.), valid


def advantages(r, weights, aggregate="mean", fuse="advantage", spread="trajectory", min_std=.02, clip=5.):
    """Rewards r (B, G, K, R) and their weights (R,) -> A (B, G, K) in [-clip, clip], used (B, G, K) bool.

    Give the whole step's rewards, of all processes: fuse="advantage" divides by a standard deviation over the batch.
    Samples that are not `used` carry no information (no valid reward): leave them out, and divide by the number of used
    ones over all processes, or a process with few of them would count as much as one with many. A reward of weight 0
    is not looked at. ValueError if a choice is unknown or the weights do not fit.
    """
    if aggregate not in AGGREGATE or fuse not in FUSE or spread not in SPREAD:
        raise ValueError(f"unknown choice among aggregate={aggregate!r}, fuse={fuse!r}, spread={spread!r}")
    weights = torch.as_tensor(weights, dtype=torch.float64, device=r.device)
    if weights.shape != r.shape[3:]:
        raise ValueError(f"{weights.numel()} weights for {r.shape[3]} rewards")
    counts = weights != 0
    weights = weights[counts] / weights.abs().sum()                               # only their proportions matter
    Q = turn_scores(r.double()[..., counts], aggregate, spread)

    if fuse == "advantage":
        A_r, valid_r = group_normalize(Q, min_std)
        A, used = (A_r * weights).sum(-1), valid_r.any(-1)
        if used.any():
            batch_std = A[used].square().mean().sqrt()
            A = A / batch_std.clamp(min=.1)
    else:
        A, used = group_normalize((Q * weights).sum(-1), min_std)

    K = r.shape[2]
    return A.clamp(-clip, clip).float().expand(-1, -1, K), used.expand(-1, -1, K)
