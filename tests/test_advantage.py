"""advantage.py against longhand arithmetic, and against what must not change an advantage."""
from statistics import fmean, pstdev

import pytest
import torch

from advantage import AGGREGATE, advantages, group_normalize, group_std, turn_scores

NAN, W, FUSES, SPREADS = float("nan"), [.6, .4], ["advantage", "reward"], ["trajectory", "turn", "togo"]
EVERY = pytest.mark.parametrize("choice", [dict(fuse=f, spread=s) for f in FUSES for s in SPREADS], ids=str)


def rewards(B=3, G=6, K=3, M=2):
    return torch.rand(B, G, K, M, generator=torch.Generator().manual_seed(0))


def one_group(*rows):
    """One row per reward, one number per sample, a single turn -> (1, G, 1, M)."""
    return torch.tensor(rows).T[None, :, None]


def z(scores):
    return [(s - fmean(scores)) / pstdev(scores) for s in scores]


def close(A, expected, tolerance=1e-4):
    torch.testing.assert_close(A, torch.as_tensor(expected, dtype=A.dtype).expand_as(A), rtol=0, atol=tolerance)


# ------------------------------------------------------------------------------------------------------------- longhand

@pytest.mark.parametrize("fuse", FUSES)
@pytest.mark.parametrize("aggregate, spread, first, second", [
    ("mean", "trajectory", [.5, .55, .65], [.5, .55, .65]),
    ("min", "trajectory", [.2, .5, .4], [.2, .5, .4]),
    ("product", "trajectory", [.16, .3, .36], [.16, .3, .36]),
    ("last", "trajectory", [.2, .6, .9], [.2, .6, .9]),
    ("mean", "turn", [.8, .5, .4], [.2, .6, .9]),
    ("mean", "togo", [.5, .55, .65], [.2, .6, .9])])
def test_aggregates_and_spreads_by_longhand(aggregate, spread, first, second, fuse):
    """Another operator, another axis, turns in the wrong order, sample std in place of population std."""
    r = torch.tensor([[.8, .2], [.5, .6], [.4, .9]])[None, ..., None]        # three samples of two turns
    A, used = advantages(r, [1.], aggregate, fuse, spread)
    close(A[0], torch.tensor([z(first), z(second)]).T, 4e-3)                 # z but for the 1e-4 added to the std
    assert used.all()


def test_group_normalize_by_longhand():
    """The 1e-4 missing: it keeps a tiny spread from blowing up where min_std is 0."""
    close(group_normalize(torch.tensor([[.1, .3], [.1, .1002]]), min_std=0)[0], [[-.999, .999], [-.5, .5]], 5e-4)


def test_fusion_levels_by_the_worked_example():
    """Rewards fused at the wrong level, weights ignored, the rescale missing."""
    r1, r2, small = [1., 1., 0., 0.], [.9, .1, .9, .1], [.09, .01, .09, .01]
    close(advantages(one_group(r1, r2), [.5, .5], fuse="reward")[0].flatten(), [1.405, .156, -.156, -1.405], 6e-4)
    close(advantages(one_group(r1, small), [.5, .5], fuse="reward")[0].flatten(), [1.076, .917, -.917, -1.076], 6e-4)
    for second in r2, small:                             # advantage level: [1, 0, 0, -1] over its own std sqrt(1/2)
        close(advantages(one_group(r1, second), [.5, .5])[0].flatten(), [2 ** .5, 0, 0, -2 ** .5], 2e-3)
    # .75 [1, 1, -1, -1] + .25 [1, -1, 1, -1] = [1, .5, -.5, -1], over its std sqrt(.625)
    close(advantages(one_group(r1, r2), [.75, .25])[0].flatten(), [1.2649, .6325, -.6325, -1.2649], 1e-3)
    close(advantages(one_group(r1, r2), [.75, .25], fuse="reward")[0].flatten(), z([.975, .775, .225, .025]), 1e-3)


def test_batch_rescale_spans_all_groups_but_void_ones_and_has_a_floor():
    """The rescale per group, over void groups too, or without a floor: noise blown up where two rewards cancel."""
    up, down, flat = [1., 0.], [0., 1.], [.5, .5]
    agree, cancel, void = one_group(up, up), one_group(up, down), one_group(flat, flat)
    A, used = advantages(torch.cat([agree, cancel, void]), [.5, .5])
    close(A[..., 0], [[2 ** .5, -2 ** .5], [0, 0], [0, 0]], 1e-3)            # [1, -1] and [0, 0] over sqrt(1/2)
    assert used[..., 0].tolist() == [[1, 1], [1, 1], [0, 0]]
    close(advantages(cancel, [.52, .48])[0].flatten(), [.4, -.4], 1e-3)      # std .04 < .1: [.04, -.04] / .1
    close(advantages(cancel, [.6, .4])[0].flatten(), [1, -1], 1e-3)          # std .2 > .1


def test_advantage_is_clipped_on_both_sides():
    """One lucky or unlucky sample in a large group: z = sqrt(39) = 6.2."""
    r = torch.zeros(2, 40, 1, 1)
    r[0, 0], r[1, 1:] = 1, 1
    for fuse in FUSES:
        A, _ = advantages(r, [1.], fuse=fuse)
        assert A.max() == 5 and A.min() == -5
        assert advantages(r, [1.], fuse=fuse, clip=.125)[0].abs().eq(.125).any(1).all()


# --------------------------------------------------------------------------------------------- what must change nothing

@EVERY
def test_mean_is_zero_in_every_group_at_every_turn(choice):
    """Statistics over the wrong axis: over tasks, turns or rewards."""
    A, _ = advantages(rewards(), W, **choice)
    close(A.mean(1), 0, 1e-6)
    assert A.abs().max() > 1


@EVERY
def test_constant_added_to_one_task_turn_and_reward_changes_nothing(choice):
    """A baseline that is global, or shared by tasks, or pooled over turns."""
    offset = torch.rand(3, 1, 3, 2, generator=torch.Generator().manual_seed(1))
    close(advantages(rewards() + offset, W, **choice)[0], advantages(rewards(), W, **choice)[0])


@EVERY
def test_rewards_that_depend_only_on_the_turn_teach_nothing(choice):
    """Turns pooled in one baseline: later, harder turns would look bad by their number alone. And 0 / 0."""
    A, used = advantages(torch.tensor([[.9, .8], [.5, .4], [.1, .3]]).expand(2, 5, 3, 2), W, **choice)
    assert not A.any() and not used.any()


def test_constant_group_gives_zeros_and_weight_0_beside_a_useful_one():
    """Rounding noise over 1e-4 (.7 is no binary fraction); a group without information that counts."""
    for fuse in FUSES:
        A, used = advantages(torch.cat([torch.full((1, 6, 3, 2), .7), rewards(1)]), W, fuse=fuse)
        assert not A[0].any() and not used[0].any() and used[1].all()
        close(A[1:], advantages(rewards(1), W, fuse=fuse)[0])


def test_same_dialogue_on_two_pictures_is_two_groups():
    """Groups by instruction: every sample on the easier picture would win."""
    A, _ = advantages(torch.cat([rewards(1), rewards(1) + .5]), W)
    close(A[0], A[1])


@EVERY
def test_permuting_samples_and_tasks_permutes_advantages(choice):
    """Rows mixed up between rewards and advantages."""
    samples, tasks = torch.tensor([3, 0, 5, 1, 4, 2]), torch.tensor([2, 0, 1])
    permuted, _ = advantages(rewards()[tasks][:, samples], W, **choice)
    close(permuted, advantages(rewards(), W, **choice)[0][tasks][:, samples], 1e-6)


def test_rescaling_one_reward_matters_at_reward_level_only():
    """A reward of wide range drowning the other at advantage level too."""
    r, scale = rewards(), torch.tensor([1., .25])
    change = {f: (advantages(r * scale, W, fuse=f)[0] - advantages(r, W, fuse=f)[0]).abs().max() for f in FUSES}
    assert change["advantage"] < .01 and change["reward"] > .1


def test_only_the_proportions_of_the_weights_matter():
    """min_std or the rescale measured in units of the weights: small weights would void every group."""
    for fuse, factor in ("advantage", 10), ("reward", .1):
        scaled, _ = advantages(rewards(), [factor * w for w in W], fuse=fuse)
        close(scaled, advantages(rewards(), W, fuse=fuse)[0])


def test_group_under_min_std_gives_0_for_that_reward_alone():
    """Judge noise on a settled reward blown up to unit variance."""
    r = rewards()
    r[..., 1] = .5 + .01 * r[..., 1]
    A, used = advantages(r, W)
    close(A, advantages(r[..., :1], [1.])[0])
    assert used.all() and not advantages(r[..., 1:], [1.])[1].any()
    assert advantages(r[..., 1:], [1.], min_std=1e-4)[1].all()


def test_reward_of_weight_0_is_not_looked_at_even_where_it_is_nan():
    """0 * NaN = NaN: a reward that is only watched, and whose judge fails, voiding all others."""
    r = rewards()
    r[..., 1] = NAN
    for fuse in FUSES:
        for got, expected in zip(advantages(r, [.7, 0], fuse=fuse), advantages(r[..., :1], [.7], fuse=fuse)):
            assert torch.equal(got, expected)


# ------------------------------------------------------------------------------------------------ failures of the judge

@EVERY
def test_nan_sample_gets_0_and_does_not_move_the_others(choice):
    """A judge failure read as a score of 0, or a NaN spreading through mean, std or the rescale."""
    r, others = rewards(), [0, 1, 2, 4, 5]
    r[:, 3] = NAN
    A, used = advantages(r, W, **choice)
    assert not A[:, 3].any() and not used[:, 3].any() and used[:, others].all()
    close(A[:, others], advantages(r[:, others], W, **choice)[0], 1e-6)


@pytest.mark.parametrize("fuse", FUSES)
@pytest.mark.parametrize("aggregate, spread, expected", [
    ("mean", "trajectory", [0, 0, 0]), ("min", "trajectory", [0, 0, 0]), ("product", "trajectory", [0, 0, 0]),
    ("last", "trajectory", [1, 1, 1]), ("whole", "trajectory", [1, 1, 1]), ("mean", "turn", [1, 0, 1]), ("mean", "togo", [0, 0, 1])])
def test_unjudged_turn_voids_exactly_the_turns_whose_score_needs_it(aggregate, spread, expected, fuse):
    """An aggregate that skips NaN: a trajectory judged by its easy turns alone."""
    r = rewards()
    r[0, 2, 1] = NAN
    A, used = advantages(r, W, aggregate, fuse, spread)
    assert used[0, 2].tolist() == A[0, 2].ne(0).tolist() == expected and not A.isnan().any()


def test_sample_with_one_failed_judge_keeps_the_other_reward_at_advantage_level():
    """The sample dropped, or its failed reward counted as 0. At reward level it has no score."""
    r = one_group([1., 1., NAN, 0., 0.], [1., 1., 1., 0., 0.])
    A, used = advantages(r, [.5, .5])
    a = torch.tensor([1., 1., 0., -1., -1.]) + torch.tensor(z([1, 1, 1, 0, 0]))
    close(A.flatten(), a / a.square().mean().sqrt(), 1e-3)
    assert used.all() and advantages(r, [.5, .5], fuse="reward")[1].flatten().tolist() == [1, 1, 0, 1, 1]


def test_group_is_void_when_more_than_half_of_it_is_nan():
    """A baseline from a few survivors; or a half-judged group thrown away."""
    A, valid = group_normalize(torch.tensor([[.1, .5, NAN, NAN, NAN]]))
    assert not A.any() and not valid.any()
    A, valid = group_normalize(torch.tensor([[.1, .5, NAN, NAN]]))
    close(A, [[-1, 1, 0, 0]], 1e-3)
    assert valid.tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("wrong", [dict(aggregate="sum"), dict(fuse="none"), dict(spread="step"),
                                   dict(weights=[1.]), dict(weights=[1.] * 3)], ids=str)
def test_unknown_choices_and_wrong_numbers_of_weights_are_refused(wrong):
    """A typo that falls through to a default; one weight broadcast over all rewards."""
    with pytest.raises(ValueError, match="unknown choice|weights for 2 rewards"):
        advantages(rewards(), **{"weights": W, **wrong})


def test_scores_and_their_spread_are_those_that_min_std_looks_at():
    """A metric of another spread than the one that is filtered: group_std over trajectory means under spread=turn."""
    r = rewards()
    r[1, 3] = NAN
    for aggregate, spread in [*((name, "trajectory") for name in AGGREGATE), ("mean", "turn"), ("mean", "togo")]:
        S = turn_scores(r, aggregate, spread)
        mean, std = group_std(S)
        assert std.shape == (3, 1, 1 if spread == "trajectory" else 3, 2)
        for b, k, m in [(0, 0, 0), (1, 0, 1), (2, S.shape[2] - 1, 0)]:
            judged = [value for value in S[b, :, k, m].tolist() if value == value]
            assert mean[b, 0, k, m].item() == pytest.approx(fmean(judged), abs=1e-6)
            assert std[b, 0, k, m].item() == pytest.approx(pstdev(judged), abs=1e-6)
        threshold = std.median().item()
        assert torch.equal(group_normalize(S, threshold)[1].any(1), (std >= threshold)[:, 0])


def test_equal_scores_teach_nothing_even_where_min_std_is_0():
    """Rounding of .7, which is no binary fraction, taken for a spread: a constant judge that "teaches" every group."""
    A, used = advantages(torch.full((2, 6, 3, 2), .7), W, min_std=0)
    assert not used.any() and not A.any()
