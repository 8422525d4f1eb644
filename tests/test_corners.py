"""Every corner of the settings trains two steps: the smallest and largest K, T, G, W, all choices that go together."""
import itertools
import json
import math

import pytest
import torch
from safetensors.torch import load_file

import model
import reward
import train
from fixtures import Judge, make_tasks
from test_train import config

# How turns become advantages: an aggregate other than the mean is of a whole trajectory, so that it needs that spread.
CREDITS = [(aggregate, "trajectory") for aggregate in train.AGGREGATE] + [("mean", "turn"), ("mean", "togo")]
CHOICES = {"credit": CREDITS, "objective": [("grpo", "cps"), ("grpo", "sde"), ("nft", None)], "fuse": list(train.FUSE),
           "K": [1, 6, 2], "T and W": [(2, 1), (3, 1), (3, 2)], "G": [2, 3], "R": [1, 3], "kl": [0, .1],
           "shared_noise": [True, False]}


def allowed(case):
    """Samples of NFT that start from one noise would be equal."""
    return not (case.get("objective") == ("nft", None) and case.get("shared_noise"))


def pairs_of(case):
    """Every two of the choices in a case."""
    return set(itertools.combinations(case.items(), 2))


def cover():
    """Few cases in which every two allowed choices of different kinds meet: greedily, always the same ones.

    All 5,040 would take two hours, and what breaks in a combination is nearly always a pair.
    """
    left = set()
    for a, b in itertools.combinations(CHOICES, 2):
        for x, y in itertools.product(CHOICES[a], CHOICES[b]):
            if allowed({a: x, b: y}):
                left.add(((a, x), (b, y)))
    cases = []
    while left:
        case = {}
        for name, values in CHOICES.items():
            # the value that meets the most partners it has not met; of equal ones those used least
            def worth(value):
                new = sum(((other, chosen), (name, value)) in left for other, chosen in case.items())
                open_pairs = sum((name, value) in pair for pair in left)
                return new, open_pairs
            fitting = [value for value in values if allowed(case | {name: value})]
            case[name] = max(fitting, key=worth)
        if not pairs_of(case) & left:
            a, b = sorted(left, key=repr)[0]
            case = next(full for value in itertools.product(*CHOICES.values())
                        if allowed(full := dict(zip(CHOICES, value))) and {a, b} <= set(full.items()))
        left -= pairs_of(case)
        cases.append(case)
    return cases


CASES = cover()


class Colours(Judge):
    """R rewards: how red, how much as before, how green."""

    def __init__(self, R):
        super().__init__()
        self.names = ["following", "consistency", "green"][:R]
        self.weights, self.turns = [1 / R] * R, []

    def rewards(self, tasks, images, k):
        self.turns.append(k)
        green = images[:, k + 1, 1].float().mean((1, 2)) / 255
        return torch.cat([super().rewards(tasks, images, k), green[:, None]], 1)[:, :len(self.names)]


def name_of(case):
    return "-".join(str(value).replace(" ", "") for value in case.values())


def test_the_cases_cover_every_two_choices():
    """Catches: a covering set that lost a pair, or holds what is refused; a choice that was added and not tried."""
    met = set().union(*map(pairs_of, CASES))
    for a, b in itertools.combinations(CHOICES, 2):
        for x, y in itertools.product(CHOICES[a], CHOICES[b]):
            assert (((a, x), (b, y)) in met) == allowed({a: x, b: y}), (a, x, b, y)
    assert {credit[0] for credit in CREDITS} == set(train.AGGREGATE) and {c[1] for c in CREDITS} == set(train.SPREAD)
    assert len(CASES) < 30


@pytest.mark.parametrize("case", CASES, ids=map(name_of, CASES))
def test_every_corner_trains_two_steps(case, tmp_path, monkeypatch):
    """Catches: a dimension of one that is squeezed away, a turn or a reward too many, a window that does not fit, a
    loss of one objective with the numbers of another: a traceback, NaN, or two steps that move nothing."""
    (aggregate, spread), (algo, kind), (T, W), R, K, G = (case[name] for name in (
        "credit", "objective", "T and W", "R", "K", "G"))
    judge, tasks = Colours(R), make_tasks(4, K)
    monkeypatch.setattr(reward, "load", lambda *_, **__: judge)
    monkeypatch.setattr(train.data, "load", lambda *_, **__: tasks)
    choices = dict(spread=spread, fuse=case["fuse"], turns=K, denoise=T, window=W, group=G, kl=case["kl"], tasks=2,
                   updates=1, steps=2, referee="none")
    choices |= {"aggregate": aggregate} if aggregate != "mean" else {}
    choices |= {"step_kind": kind, "shared_noise": str(case["shared_noise"]).lower()} if algo == "grpo" else {}
    cfg = config(tmp_path, algo, **choices)
    assert (cfg.turns, cfg.denoise, cfg.window, cfg.group, cfg.shared_noise) == (K, T, W, G, case["shared_noise"])
    train.main(cfg)

    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2] and train.checkpoints(tmp_path)[-1].stem == "step_000002"
    judged = [K - 1] if aggregate == "whole" else list(range(K))
    assert judge.turns == 2 * judged
    for row in rows:
        assert row["update/taken"] == 1 and row["update/skipped"] == 0 and row["judge/failed"] == 0
        assert row["advantage/used"] == 1 and row["advantage/abs"] > 0 and row["update/grad_norm"] > 0
        assert sum(name.startswith("reward/") for name in row) == R * (1 + K)
        unknown = {name for name, value in row.items() if value is None}
        assert unknown == {f"reward/{name}_turn{k + 1}" for name in judge.names for k in range(K) if k not in judged}
        assert all(math.isfinite(value) for value in row.values() if value is not None)
        assert ("update/kl" in row) == (case["kl"] > 0)
        if algo == "grpo":
            assert row["update/ratio_deviation_1"] < train.RATIO_WARN * cfg.clip
    state = load_file(tmp_path / model.LORA_FILE)
    assert any(value.abs().max() > 0 for name, value in state.items() if "lora_B" in name), "the LoRA did not move"
