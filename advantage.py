"""Rewards of multi-turn trajectories -> advantages. Needs only torch; copy freely.

B tasks, G samples per task (the group), K turns, M rewards. Rewards r (B, G, K, M) lie in [0, 1]; NaN = the judge failed.

    turns:   S_m = aggregate_k r_m                              mean | min | product | last
    group:   A_m = (S_m - mean_g S_m) / (std_g S_m + 1e-4)      over the G samples of one task, never over turns
    fuse:    A   = sum_m w_m A_m                                advantage level: every reward counts by its own scale
             A   = group(sum_m w_m S_m)                         reward level: a reward of wide range drowns the others
    spread:  trajectory   every turn of a trajectory gets the same A (MT-EditFlow: broadcast)
             turn         each turn is compared with the same turn of the other samples, by its own reward alone
             togo         likewise, by the mean reward from that turn on
"""
import torch

AGGREGATE = {
    "mean": lambda r: r.mean(2),
    "min": lambda r: r.amin(2),      # NaN wins in all four: a trajectory with an unjudged turn has no score
    "product": lambda r: r.prod(2),
    "last": lambda r: r[:, :, -1],
}


def group_normalize(S, min_std=.02):
    """(S - mean) / (std + 1e-4) over dim 1, the group: S (B, G, ...) -> A (B, G, ...), valid (B, G, ...) bool.

    NaN is left out of mean and std and gets A = 0. A group gives 0 throughout, and is not valid, where its std is under
    `min_std` (nothing to learn but noise) or more than half of it is NaN.
    """
    ok = ~S.isnan()
    n = ok.sum(1, keepdim=True).clamp(min=1)
    mean = S.nan_to_num().sum(1, keepdim=True) / n
    centred = torch.where(ok, S - mean, 0.)
    std = (centred.square().sum(1, keepdim=True) / n).sqrt()
    valid = ok & (std >= min_std) & (2 * ok.sum(1, keepdim=True) >= S.shape[1])
    return torch.where(valid, centred / (std + 1e-4), 0.), valid


def advantages(r, weights, aggregate="mean", fuse="advantage", spread="trajectory", min_std=.02, clip=5.):
    """Rewards r (B, G, K, M) and weights (M,) -> A (B, G, K) in [-clip, clip] and weight (B, G, K) in {0, 1}.

    Give the whole step's rewards, of all processes: fuse="advantage" divides by a standard deviation over the batch.
    Weight 0 marks samples that carry no information (no valid reward): leave them out, and divide by the sum of the weights
    over all processes, or a process with few samples would count as much as one with many. A reward of weight 0 is not
    looked at. ValueError if a choice is unknown.
    """
    if aggregate not in AGGREGATE or fuse not in ("advantage", "reward") or spread not in ("trajectory", "turn", "togo"):
        raise ValueError(f"unknown choice among aggregate={aggregate!r}, fuse={fuse!r}, spread={spread!r}")
    weights = torch.as_tensor(weights, dtype=torch.float64, device=r.device)
    if weights.shape != r.shape[3:]:
        raise ValueError(f"{weights.numel()} weights for {r.shape[3]} rewards")
    K, used = r.shape[2], weights != 0
    r, weights = r.double()[..., used], weights[used] / weights.abs().sum()           # only their proportions matter

    if spread == "trajectory":
        S = AGGREGATE[aggregate](r)[:, :, None]                                       # (B, G, 1, M)
    elif spread == "turn":
        S = r                                                                         # (B, G, K, M)
    else:
        S = torch.stack([r[:, :, k:].mean(2) for k in range(K)], 2)                   # mean_{j >= k} r_j

    if fuse == "advantage":
        A_m, valid = group_normalize(S, min_std)
        A, valid = (A_m * weights).sum(-1), valid.any(-1)
        # differs from a plain weighted sum: IF and CC are often anti-correlated, then the sum of unit-variance terms is
        # small; dividing by the batch's own std gives both fusion levels steps of one size (GDPO, arXiv 2601.05242)
        if valid.any():
            A = A / A[valid].square().mean().sqrt().clamp(min=.1)
    else:
        A, valid = group_normalize((S * weights).sum(-1), min_std)

    A = A.clamp(-clip, clip).expand(-1, -1, K)
    return A.float(), valid.expand(-1, -1, K).float()
