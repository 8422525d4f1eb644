"""Every corner of the settings trains two steps: the smallest and largest K, T, G, W, and all choices that go together."""
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

    All 4,536 would take an hour or two; faults of combinations are nearly always of two choices.
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
print(len(CASES))
