"""eval.py: metrics by longhand, intervals that mean what they say, editors and judges of known scores, resuming."""
import dataclasses
import itertools
import json
import math
import random
import re
import shutil
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import data
import eval as evaluation
import model
import reward
import train
from bench import report
from fixtures import (ROOT, Judge, child_environment, editor_folder, held_by_another, make_tasks, move, new_editor,
                      record_disk, refused, run_script)
from rollout import Task
from shapes import world

NAN = float("nan")


# -------------------------------------------------------------------------------------------------------------- metrics

def arm(s, consistency, seeds=1, **more):
    """Success and consistency (n_seeds * n, K), lists or tensors, as Scores."""
    fold = lambda v: torch.as_tensor(v, dtype=torch.float64).view(seeds, -1, len(v[0]))
    measured = {name: fold(v) for name, v in more.items()}
    return evaluation.Scores(fold(s), fold(consistency)[..., None], measured)


def with_kinds(n, kinds=None):
    """Tasks of which only the kinds are there."""
    return [Task(None, [], kinds[i] if kinds else [], size=(0, 0)) for i in range(n)]


def measure(s, consistency, kinds=None, **more):
    tasks = with_kinds(len(s), kinds)
    return evaluation.summarise({"base": arm(s, consistency, **more)}, tasks, samples=10)["arms"]["base"]


def compare(base, tuned, seeds=1, samples=1000):
    arms = {"base": arm(*base, seeds), "tuned": arm(*tuned, seeds)}
    return evaluation.summarise(arms, with_kinds(len(base[0]) // seeds), samples)["differences"]["tuned"]


def test_metrics_by_longhand():
    """Catches: a marginal rate where the cumulative one is meant, CC of successes only, O of one dialogue at a time."""
    s = [[1., 1, 0], [1, 0, 1], [0, 1, 1], [1, 1, 1]]
    values = measure(s, [[.9, .8, .7], [1., .6, .2], [.5, .4, .3], [.8, .6, .4]])
    assert values["M"] == [.75, .75, .75] and values["flatness"] == [1]
    assert values["IF"] == [.75, .5, .25]
    assert values["C"] == pytest.approx([.75, 2 / 3, 1 / 2])
    assert values["CC"] == pytest.approx([.8, .6, .4])
    assert values["O"] == pytest.approx([math.sqrt(.75 * .8), math.sqrt(.5 * .6), math.sqrt(.25 * .4)])
    assert values["n"]["M"] == [4, 4, 4] and values["n"]["CC0"] == [4, 4, 4]


def test_a_turn_that_the_judge_failed_on_is_left_out():
    """Catches: a failed judgement counted as a failed edit, or one NaN that makes a whole column NaN."""
    s = [[1., NAN, 1], [1, 1, 1], [0, 1, 0], [1, 0, 1]]
    values = measure(s, [[.9, NAN, .6], [.7, .5, .3], [.5, .4, .3], [.7, .6, .4]])
    assert values["M"] == pytest.approx([3 / 4, 2 / 3, 3 / 4])
    assert values["IF"] == pytest.approx([3 / 4, 1 / 3, 1 / 3])            # dialogue 1 is unknown from turn 2 on
    assert values["CC"] == pytest.approx([.7, .5, .4])
    assert values["n"]["M"] == [4, 3, 4] and values["n"]["IF"] == [4, 3, 3]


def test_success_is_the_judges_own_or_following_of_one_half():
    """Catches: a NaN that compares as false, and so as a failed edit."""
    r = torch.tensor([[[.9, .1, 0.], [.2, .3, 1.], [NAN, NAN, NAN]]])
    assert evaluation.successes(r, ["following", "consistency", "success"])[0, :2].tolist() == [0, 1]
    s = evaluation.successes(r[..., :2], ["following", "consistency"])[0]
    assert s[:2].tolist() == [1, 0] and s[2].isnan()
    assert evaluation.successes(torch.tensor([[[.5, 1.]]]), ["following", "consistency"]).item() == 1
    # a reward of one's own that says nothing of following
    assert evaluation.successes(torch.ones(2, 3, 1), ["smile"]).isnan().all()


def test_edit_types_are_counted_over_turns_and_per_turn():
    """Catches: types of another turn, a type that is missing in a turn taken for failure."""
    kinds = [["add", "remove", "add"], ["remove", "add", "color"]]
    values = measure([[1., 0, 0], [1, 1, 0]], [[1.] * 3] * 2, kinds)
    assert {k: v for k, v in values.items() if k.startswith("kind")} == {"kind add": [2 / 3], "kind color": [0],
                                                                         "kind remove": [.5]}
    assert values["n"]["kind add"] == [3] and values["n"]["turns add"] == [1, 1, 1]
    assert values["turns add"] == [1, 1, 0] and values["turns color"] == [None, None, 0]


def test_wear_compares_the_same_dialogues_and_turns():
    """Catches: M of all dialogues against the clean M of the independent instructions alone, or the opposite sign; turn
    1, where there is nothing to wear, in the pooled one."""
    s, clean = [[1., 0, 1], [1, 0, 0], [0, 1, 0], [1, 1, NAN]], [[1., 1, NAN], [1, 1, 1], [0, NAN, 0], [NAN, NAN, 1]]
    cc = [[.9, .8, .7], [.9, .6, .5], [.9, .5, .4], [.1, .1, .1]]
    kept = [[.9, .9, NAN], [.9, .7, .8], [.9, NAN, .6], [NAN, NAN, NAN]]
    values = measure(s, cc, clean=clean, kept_clean=kept)
    assert values["wear"] == pytest.approx([0, -1, -.5]) and values["n"]["clean"] == [3, 2, 2]
    assert values["M_clean"] == pytest.approx([2 / 3, 1, .5]) and values["M_self"] == pytest.approx([2 / 3, 0, 0])
    assert values["wear_pooled"] == pytest.approx([0 - 3 / 4])
    assert values["CC_clean"] == pytest.approx([.9, .8, .7]) and values["CC_self"] == pytest.approx([.9, .7, .45])
    assert "propagation" not in values

    # after a failure too, where a probe was made
    clean_any = [[1., 1, 1], [1, 1, 1], [0, 1, 1], [NAN, NAN, 1]]
    values = measure(s, cc, clean=clean, clean_any=clean_any, kept_clean=kept)
    assert values["wear"] == pytest.approx([0, -1, -.5])
    assert values["propagation"] == pytest.approx([0, -2 / 3, -2 / 3]) and values["n"]["clean_any"] == [3, 3, 3]
    assert values["propagation_pooled"] == pytest.approx([-4 / 6])


def test_room_is_what_is_left_of_all_turns_so_far():
    """Catches: the possible share of a turn taken for that of the dialogue."""
    possible = [[1., 1, 0], [1, 0, NAN], [1, 1, 1], [1, 1, 1]]
    values = measure([[1., 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 1]], [[1.] * 3] * 4, possible=possible)
    assert values["possible"] == pytest.approx([1, .75, 2 / 3]) and values["room"] == pytest.approx([1, .75, .5])


def scores(n, rates, seed):
    """Independent successes of given rates and consistencies around .8: a pair (n, K), (n, K)."""
    generator = torch.Generator().manual_seed(seed)
    s = (torch.rand(n, len(rates), generator=generator) < torch.tensor(rates)).float()
    return s, .8 + .1 * torch.rand(n, len(rates), generator=generator)


def test_the_interval_of_a_clear_difference_excludes_zero_and_that_of_none_covers_it():
    """Catches: base minus tuned, an interval of one arm, quantiles of the wrong axis."""
    base, tuned = scores(300, [.7, .5, .4], 0), scores(300, [.9, .8, .7], 1)
    d = compare(base, tuned)
    for m in ("M", "IF", "O", "CC"):
        difference = [b - a for a, b in zip(measure(*base)[m], measure(*tuned)[m])]
        assert d[m] == pytest.approx(difference) and torch.tensor(d["interval_95"][m]).shape == (3, 2)
        if m != "CC":
            assert all(0 < low < x < high for (low, high), x in zip(d["interval_95"][m], difference))
    low, high = d["interval_95"]["M"][0]
    # normal approximation
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt((.7 * .3 + .9 * .1) / 300), rel=.15)
    assert all(low == high == 0 for m in ("M", "IF", "CC", "O") for low,
               high in compare(base, base, samples=200)["interval_95"][m])
    assert all(low < 0 < high for low, high in compare(base, scores(300, [.7, .5, .4], 2))["interval_95"]["M"])


def test_an_arm_has_the_interval_of_a_binomial_and_of_the_delta_method():
    """Catches: the spread of the data in place of that of the mean; O's interval taken from IF's."""
    s, cc = scores(400, [.6], 3)
    values = evaluation.summarise({"base": arm(s, cc)}, with_kinds(400))["arms"]["base"]
    (low, high), (o_low, o_high), p = values["interval_95"]["M"][0], values["interval_95"]["O"][0], values["M"][0]
    se = math.sqrt(p * (1 - p) / 400)
    assert (low, high) == pytest.approx((p - 1.96 * se, p + 1.96 * se), abs=.006)
    C = values["CC"][0]                      # dO = (C dIF + IF dC) / 2 O, and dC is small here
    o_se = math.sqrt((C * se) ** 2 + (p * cc.std().item() / 20) ** 2) / (2 * values["O"][0])
    assert o_high - o_low == pytest.approx(2 * 1.96 * o_se, rel=.08)


def test_the_interval_is_paired_and_deterministic():
    """Catches: arms resampled apart (intervals several times too wide), or another interval at each call."""
    base = scores(200, [.5, .5], 0)
    tuned = (base[0].clone(), base[1] + .01)
    tuned[0][:10, 1] = 1                                                 # ten dialogues better, the rest the same
    a = compare(base, tuned)
    assert a == compare(base, tuned)
    low, high = a["interval_95"]["M"][1]
    assert high - low < .06                                                  # unpaired: .2
    assert a["interval_95"]["CC"][0] == pytest.approx([.01, .01], abs=1e-6)


def test_seeds_of_a_task_are_resampled_together():
    """Catches: three noise seeds of 100 tasks that pass for 300 independent tasks (intervals too narrow by sqrt 3)."""
    base, tuned = scores(100, [.5], 0), scores(100, [.6], 1)
    once = compare(base, tuned, samples=500)
    thrice = compare(*(tuple(v.repeat(3, 1) for v in pair) for pair in (base, tuned)), seeds=3, samples=500)
    assert torch.allclose(torch.tensor(once["interval_95"]["M"]), torch.tensor(thrice["interval_95"]["M"]), atol=1e-6)
    # the same evidence, three times written down
    assert once["p"]["M"] == pytest.approx(thrice["p"]["M"])


def test_a_judge_failure_does_not_break_the_interval():
    """Catches: quantiles of NaN."""
    base, tuned = scores(50, [.5, .4], 0), scores(50, [.9, .8], 1)
    base[0][3, 1] = tuned[1][7, 0] = NAN
    d = compare(base, tuned, samples=200)
    assert all(torch.tensor(d["interval_95"][m]).isfinite().all() for m in ("M", "IF", "CC", "O"))


def test_one_dialogue_shows_nothing():
    """Catches: the interval [1, 1] of a single dialogue, by which everything is significant; an edit type or a turn
    that one dialogue alone has."""
    d = compare((torch.zeros(1, 2), torch.zeros(1, 2)), (torch.ones(1, 2), torch.ones(1, 2)))
    assert d["M"] == [1, 1] and d["p"]["M"] == [1, 1]
    assert all(d["interval_95"][m] == [None, None] for m in ("M", "IF", "CC", "O"))
    values = measure([[1., 1], [NAN, 1], [NAN, 0]], [[1.] * 2] * 3, [["add", "add"], ["add", "add"], ["add", "color"]])
    assert values["interval_95"]["M"][0] is None and values["interval_95"]["M"][1] is not None
    assert values["interval_95"]["IF"] == values["interval_95"]["C"] == values["interval_95"]["O"] == [None, None]
    assert values["interval_95"]["kind color"] == [None] and values["interval_95"]["kind add"] != [None]
    assert measure([[1.], [0], [1]], [[NAN]] * 3)["interval_95"]["O"] == [None]
    # in a difference both arms need two
    few = [torch.tensor([[1.], [NAN], [NAN]]), torch.ones(3, 1)]
    assert compare(few, (torch.ones(3, 1), torch.ones(3, 1)))["interval_95"]["M"] == [None]


def test_what_is_unknown_is_null_in_json():
    """Catches: a bare NaN in validation.json or results.json, which is no JSON."""
    arms = {name: arm([[NAN, 0.]] * 3, [[NAN, 1.]] * 3, copied=[[NAN, 0]] * 3) for name in ("base", "tuned")}
    for scores in arms.values():
        scores.rewards = {"following": torch.full((1, 3, 2), NAN)}
    result = evaluation.summarise(arms, with_kinds(3), samples=10)
    text = json.dumps(result, allow_nan=False)
    assert json.loads(text) == result and result["arms"]["base"]["M"] == [None, 0]
    assert result["differences"]["tuned"]["O"] == [None, None] and result["arms"]["base"]["judge_failed"] == 1
    assert result["arms"]["base"]["rewards"]["following"] == [None, None]
    assert "?" in evaluation.table(result) and "nan" not in evaluation.table(result).lower()


def test_the_console_table_marks_what_is_not_significant():
    """Catches: difference and interval with opposite signs, or a mark on the wrong rows."""
    shown = ("M", "IF", "CC", "O", "kind color_alter")
    intervals = {"M": [[.1, .3]], "IF": [[.1, .3]], "CC": [[-.1, .4]], "O": [None], "kind color_alter": [[.1, .2]]}
    result = {"arms": {"base": {m: [.3] for m in shown}, "tuned": {m: [.5] for m in shown}},
              "differences": {"tuned": {m: [.2] for m in shown} | {"interval_95": intervals}}}
    lines = evaluation.table(result).splitlines()
    assert len(lines) == 6 and re.search(r"1 +M +0.300 +0.500 +\+0.200 \[\+0.100, \+0.300\]$", lines[1])
    assert [line.endswith("n.s.") for line in lines[1:]] == [False, False, True, True, False]
    assert re.search(r"^color_alter +0.300 +0.500 +\+0.200 \[\+0.100, \+0.200\]$", lines[5])


def test_differences_stand_under_their_titles_however_long_a_name_is():
    """Catches: columns of a fixed width, which names like nft-tasks_72-turns_1-0 push out of line."""
    arms = {name: {"O": [.3]} for name in ("base", "a-name-as-long-as-the-arms-of-a-study", "b")}
    difference = {"O": [.2], "interval_95": {"O": [[.1, .3]]}}
    tuned = list(arms)[1:]
    result = {"arms": arms, "differences": dict.fromkeys(tuned, difference)}
    title, line = evaluation.table(result).splitlines()
    places = [title.index(f"{name} - base") for name in tuned]
    assert [place for place in range(len(line)) if line.startswith("+0.200", place)] == places


@pytest.mark.parametrize("interval, yes", [((.01, .2), True), ((-.2, -.01), True), ((0, .2), False), ((-.1, 0), False),
                                           ((0, 0), False), (None, False)])
def test_an_interval_that_touches_zero_is_not_significant(interval, yes):
    """Catches: n.s. missing where the bound is 0 or nothing is known."""
    assert evaluation.significant(interval) == yes


# ------------------------------------------------------------------------------------------------------ contact sheets

def test_a_frame_is_green_red_or_grey(tmp_path):
    """Catches: colours exchanged; a turn on which the judge failed drawn as a failed edit."""
    pictures = np.full((5, 3, 48, 48), 128, np.uint8)
    rows = [("label", pictures, list("1234"), [True, False, None, NAN])]
    evaluation.contact_sheet(rows, tmp_path / "sheet.png", width=48)
    sheet = Image.open(tmp_path / "sheet.png")
    assert [sheet.getpixel((10 + k * 58 - 2, 30)) for k in range(5)] == [
        (255, 255, 255), (0, 128, 0), (255, 0, 0), (128, 128, 128), (128, 128, 128)]


def test_the_sheet_of_arms_shows_verdicts_and_differences_first(tmp_path, monkeypatch):
    """Catches: NaN that compares as a failure, a sheet of dialogues that all arms did alike, rows of another arm."""
    tasks = make_tasks(3, K=2)
    s = {"base": torch.tensor([[[1., 0], [1, 1], [NAN, 1]]]), "tuned": torch.tensor([[[1., 0], [1, 0], [NAN, 1]]])}
    pictures = torch.zeros(3, 3, 3, 48, 48, dtype=torch.uint8)
    arms = {name: evaluation.Scores(v, v[..., None], pictures=lambda row: pictures[row]) for name, v in s.items()}
    drawn = []
    monkeypatch.setattr(evaluation, "contact_sheet", lambda rows, path: drawn.extend(rows))
    evaluation.draw_arms(arms, tasks, tmp_path / "sheet.png")
    assert [(label, str(marks)) for label, _, _, marks in drawn] == [
        ("base", "[1.0, 1.0]"), ("tuned", "[1.0, 0.0]"), ("base", "[1.0, 0.0]"), ("tuned", "[1.0, 0.0]"),
        ("base", "[nan, 1.0]"), ("tuned", "[nan, 1.0]")]
    assert drawn[0][2] == [f"{k + 1}. {text}" for k, text in enumerate(tasks[1].instructions)]
    monkeypatch.undo()
    evaluation.draw_arms(arms, tasks, tmp_path / "sheet.png")
    row = Image.open(tmp_path / "sheet.png").height * 4 // 6 + 30
    assert Image.open(tmp_path / "sheet.png").getpixel((10 + 154 - 2, row)) == (128, 128, 128)


@pytest.mark.parametrize("better, worse", [(0, 0), (5, 0), (9, 2), (30, 12), (200, 150), (7, 7)])
def test_mcnemars_test_is_the_exact_binomial(better, worse):
    """Catches: one-sided p, the chi-square approximation, ties counted."""
    base = torch.tensor([[0.] * better + [1.] * worse + [1., 0.] * 10])
    tuned = torch.tensor([[1.] * better + [0.] * worse + [1., 0.] * 10])
    n, k = better + worse, min(better, worse)
    exact = min(1, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2 ** n) if n else 1
    assert evaluation.exact_p(base, tuned) == pytest.approx(exact)
    assert evaluation.exact_p(tuned, base) == pytest.approx(exact)


def test_with_seeds_the_task_is_what_is_swapped():
    """Catches: seeds of a task tested as if they were independent dialogues. Compared with all 2^n swaps."""
    base = torch.tensor([[0., 0, 1, 0, 1, 0], [0, 1, 1, 0, 0, 1]])
    tuned = torch.tensor([[1., 1, 1, 0, 0, 1], [1, 1, 0, NAN, 0, 1]])
    d = (tuned - base).nan_to_num(0).sum(0).tolist()                         # [2, 1, -1, 0, -1, 1]
    sums = [sum(sign * x for sign, x in zip(signs, d)) for signs in itertools.product((1, -1), repeat=6)]
    assert evaluation.exact_p(base, tuned) == pytest.approx(sum(abs(x) >= abs(sum(d)) for x in sums) / 64)


def test_published_overall_scores_are_the_root_of_following_times_consistency():
    """Catches: another definition of O. EdiVal-Bench's published triples (IF, CC, O) of turns 1 to 3, in percent."""
    published = """75.93 92.51 83.81 55.58 88.03 69.95 41.59 85.86 59.76
        75.19 94.49 84.29 55.92 91.20 71.41 40.08 88.49 59.55
        73.89 93.54 83.14 54.17 90.52 70.02 38.61 88.61 58.49    75.55 92.91 83.78 55.27 88.30 69.86 39.36 85.78 58.10
        72.90 84.22 78.36 44.06 80.52 59.56 22.55 77.98 41.93    59.97 95.32 75.61 32.69 92.24 54.91 16.61 90.22 38.71
        61.89 84.98 72.52 33.22 76.36 50.36 16.26 72.30 34.28"""
    numbers = torch.tensor([float(x) for x in published.split()], dtype=torch.float64).view(-1, 3)
    IF, CC, O = numbers.T / 100
    one = torch.ones(1, 1, dtype=torch.float64)
    # one dialogue of such a mean
    parts = {"M": (IF[None], one), "IF": (IF[None], one), "CC0": (CC[None], one)}
    assert len(numbers) == 21 and (evaluation.metrics(parts, one)["O"][0] - O).abs().max() * 100 < .01


def test_a_third_partys_counts_give_its_published_rates():
    """Catches: a conditional rate, or one over the survivors, where EdiVal means all dialogues. 354, 190, 93 of 572."""
    s = torch.zeros(572, 3)
    for i, turns in enumerate([3] * 93 + [2] * (190 - 93) + [1] * (354 - 190)):
        s[i, :turns] = 1
    # 311 and 292 succeed at turns 2 and 3 in all
    s[354:354 + 311 - 190, 1] = s[354:354 + 292 - 93, 2] = 1
    values = measure(s, torch.ones(572, 3))
    assert [round(100 * x, 2) for x in values["IF"]] == [61.89, 33.22, 16.26]
    assert [round(100 * x, 2) for x in values["M"]] == [61.89, 54.37, 51.05]
    assert [round(100 * x, 1) for x in values["C"][1:]] == [53.7, 48.9]


# --------------------------------------------------------------------------------------------- known judges and editors

class CopyEditor:
    """Returns every picture as it was: its velocity points from anything to the context, v = (x - context) / t."""
    device = torch.device("cpu")
    merged = nullcontext

    def latent_shape(self, size):
        return 3, size[0] * size[1]

    def times(self, T, size):
        return torch.linspace(1, 0, T + 1)

    def condition(self, instructions, pictures):
        return {"text": torch.zeros(1, 1)}, torch.zeros(len(instructions), dtype=torch.int64)

    def encode(self, pictures):
        return pictures.float().flatten(2) / 255

    def velocity(self, x, t, cond, context, size):
        return (x - context) / t[:, None, None]

    def decode(self, x, size):
        return (x.view(-1, 3, *size) * 255).round().byte()


class FaultyEditor(CopyEditor):
    """Does as told with probability `rates[0]` on a picture as it is rendered, `rates[1]` on one that it made itself.

    Else it copies its input: also what is impossible, and an instruction that it does not know (the drift probe). It
    reads the scene, and marks what it draws by one value of one pixel, unless both rates are equal. The start noise
    decides, so that other seeds give other luck, also where it puts what it may put anywhere. Takes one denoising step.
    """

    def __init__(self, tasks, rates):
        self.rates, self.operations = rates, {}
        for task in tasks:
            self.operations |= dict(zip(task.instructions, task.meta["operations"]))

    def condition(self, instructions, pictures):
        self.told = list(instructions)
        return {"row": torch.arange(len(instructions))}, torch.arange(len(instructions))

    def velocity(self, x, t, cond, context, size):
        target = context.clone()
        luck = torch.special.ndtr(x[:, 0, :2])
        for s, picture in enumerate(self.decode(context, size).permute(0, 2, 3, 1).numpy()):
            operation = self.operations.get(self.told[cond["row"][s]])
            scene = read_scene(picture)
            fresh = np.array_equal(picture, world.render([scene])[0])
            if operation is None or luck[s, 0] >= self.rates[0 if fresh else 1]:
                continue
            free = [i for i in range(9) if not scene.cells[i]]
            chosen = free[int(luck[s, 1] * len(free))] if free else None
            after = world.apply(scene, with_what_is_there(operation, scene), chosen)
            if after:
                drawn = world.render([after])[0]
                drawn[0, 0, 0] -= self.rates[0] != self.rates[1]
                target[s] = self.encode(torch.from_numpy(drawn).permute(2, 0, 1)[None])[0]
        return (x - target) / t[:, None, None]


def with_what_is_there(operation, scene):
    """What an instruction asks for, of an object whose other attributes it does not name."""
    here = world.find(scene, operation.key) if operation.key else None
    if here is None or operation.kind not in ("position_change", "color_alter"):
        return operation
    color = operation.new.color if operation.kind == "color_alter" else scene.cells[here].color
    return operation._replace(new=scene.cells[here]._replace(color=color))


def read_scene(picture):
    """The scene that a picture (48, 48, 3) shows."""
    seen = world.read(picture[None])
    cells = tuple(world.CONTENTS[content] for content in seen.contents[0])
    return world.Scene(list(world.BACKGROUNDS)[seen.background[0]], cells)


@pytest.fixture
def faulty(monkeypatch, tmp_path):
    """evaluate(rates of base, of tuned, words) -> results: eval.py with an editor of those rates; and the folder."""
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / model.LORA_FILE).write_bytes(b"weights")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").write_text("{}")
    loads = []

    draw_figures = report.draw_figures

    def evaluate(base, tuned, words, out=tmp_path / "out", figures=False):
        monkeypatch.setattr(report, "draw_figures", draw_figures if figures else lambda *_: [])

        def load(*_, **__):
            loads.append(1)
            return FaultyEditor(data.load_shapes("test", 4, 400), base)
        monkeypatch.setattr(model, "load", load)
        monkeypatch.setattr(model, "load_weights", lambda editor, path: setattr(editor, "rates", tuned))
        lora = ["--lora", str(tmp_path / "lora")] if tuned else []
        common = ["--model", str(tmp_path / "model"), *lora, "--denoise", "1", "--out", str(out)]
        evaluation.main([*common, *words.split()])
        file = out / "results.json"
        return json.loads(file.read_text()) if file.exists() else None
    evaluate.out, evaluate.loads = tmp_path / "out", loads
    return evaluate


def test_an_editor_of_known_error_rates_gives_those_rates_back(faulty):
    """Catches: turns, dialogues, seeds or arms mixed up anywhere from the pictures to the table; wear of another sign.

    Base: does as told with .9 on a clean picture, with .7 on its own; tuned: .9 on both, so it has no exposure bias.
    """
    result = faulty((.9, .7), (.9, .9), "--tasks 110 --seeds 2")
    room = room_of_chance(110)
    for arm, fresh, worn in (("base", .9, .7), ("tuned", .9, .9)):
        values = result["arms"][arm]
        C = [fresh, worn * room[1], worn * room[2]]
        truth = {"IF": [C[0], C[0] * C[1], C[0] * C[1] * C[2]], "C": C, "possible": room, "M_clean": [fresh] * 3,
                 "wear": [0, worn - fresh, worn - fresh], "wear_pooled": [worn - fresh], "M": C[:1]}
        for m, numbers in truth.items():
            for k, value in enumerate(numbers):
                low, high = values["interval_95"][m][k]
                margin = .4 * (high - low)                   # of 32 intervals of 95 % two would miss without it
                assert low - margin <= value <= high + margin, (arm, m, k, value, low, high)
        assert min(values["CC"]) > .97 and values["n"]["M"] == [220] * 3
        assert values["copied"] == pytest.approx([1 - x for x in values["M"]], abs=.03)
        assert values["nothing"] == [0, 0, 0] and min(values["CC_clean"]) > .97
        # places by chance: none is preferred, none is left out
        assert sum(values["places"]) > 100 and max(values["places"]) < 4 * min(values["places"])
    # .2: seen in 110 tasks; and where there is none, there is none in any single dialogue
    assert result["arms"]["base"]["interval_95"]["wear_pooled"][0][1] < 0
    assert result["arms"]["tuned"]["wear"] == [0, 0, 0]
    d = result["differences"]["tuned"]
    assert d["interval_95"]["O"][2][0] > 0 and d["p"]["IF"][2] < 1e-4
    kinds = result["arms"]["tuned"]
    # additions want room as well, and some other turns the object of one that failed
    others = [(kinds[k][0], kinds["n"][k][0]) for k in kinds if k.startswith("kind ") and k != "kind subject_add"]
    assert len(others) == 6 and .82 < sum(rate * n for rate, n in others) / sum(n for _, n in others) < .95
    assert .6 < kinds["kind subject_add"][0] < .75


def room_of_chance(n, K=3, tries=40):
    """Share of the dialogues so far possible in which the next turn is, where open places are chosen by chance."""
    possible = np.zeros(K + 1)
    for i, dialogue in enumerate(world.dialogues("test", n, K)):
        for luck in range(tries):
            scene, rng = dialogue.scenes[0], random.Random(f"{i} {luck}")
            for k, operation in enumerate([None, *dialogue.operations]):
                free = [cell for cell in range(9) if not scene.cells[cell]]
                scene = world.apply(scene, operation, rng.choice(free)) if operation else scene
                if scene is None:
                    break
                possible[k] += 1
    return (possible[1:] / possible[:-1]).tolist()


@pytest.mark.parametrize("rates", [(.8, .5), (.6, .9), (1, 1), (.1, .1)])
def test_cumulative_success_falls_apart_exactly(rates):
    """Catches: a factor over other dialogues than the one before; possible turns among those that are lost already."""
    tasks = data.load_shapes("test", 4, 30)
    scores = evaluation.evaluate(FaultyEditor(tasks, rates), reward.load("exact"), tasks, 4, 1, seeds=2, probes=30,
                                 progress=False)
    values = evaluation.summarise({"base": scores}, tasks, samples=10)["arms"]["base"]
    # the first open addition of a dialogue stands somewhere, if it is right
    first = [next((k for k, o in enumerate(task.meta["operations"]) if o.open), None) for task in tasks]
    right = [scores.success[:, row, k].sum().item() for row, k in enumerate(first) if k is not None]
    assert sum(scores.places) == sum(right) and (0 < sum(right) < 2 * len(right) or rates == (1, 1))
    product = 1
    for k in range(4):
        if values["possible"][k] is None:
            # nobody is left
            assert values["IF"][k - 1] == values["IF"][k] == 0 and values["M_clean"][k] is values["wear"][k] is None
            continue
        product *= values["possible"][k] * (values["M_clean"][k] + values["wear"][k])
        assert product == pytest.approx(values["IF"][k], abs=1e-12)
        room = math.prod(values["possible"][:k + 1])
        assert values["room"][k] == pytest.approx(room)
    # after a turn that failed, or could not be done, the clean context is right again
    after_failure = scores.measured["clean"].isnan() & ~scores.measured["clean_any"].isnan()
    if rates != (1, 1):
        fresh = scores.measured["clean_any"][after_failure]
        assert len(fresh) > 50 and abs(fresh.mean() - rates[0]) < 2.6 * (rates[0] * (1 - rates[0]) / len(fresh)) ** .5
    else:
        assert values["M_clean"] == [1] * 4 and values["wear"] == values["propagation"] == [0] * 4
        assert 0 < values["IF"][3] < .7 and values["IF"][3] == pytest.approx(values["room"][3])


def test_a_copying_editor_copies_keeps_everything_and_follows_nothing(faulty):
    """Catches: success for pictures that were not edited; consistency that blames a copy for lacking the edits."""
    result = faulty((0, 0), None, "--tasks 60 --probes 10")["arms"]["base"]
    assert result["copied"] == [1, 1, 1] and result["IF"] == result["O"] == [0, 0, 0]
    # a later edit may happen to undo an earlier one
    assert result["M"][0] == 0 and max(result["M"]) < .1
    assert min(result["CC"]) > .99
    assert result["C"][1] is None and result["flatness"] == [None]           # 0 / 0 is unknown, not 0


def test_a_copy_is_told_from_an_edit():
    """Catches: a small edit that passes for a copy, a VAE's noise that passes for an edit."""
    generator = torch.Generator().manual_seed(0)
    before = torch.randint(60, 190, (1, 3, 256, 256), generator=generator, dtype=torch.uint8)
    noisy = (before + torch.randint(-12, 13, before.shape, generator=generator)).clamp(0, 255).byte()
    edited = noisy.clone()
    edited[:, :, 100:132, 100:132] = 255                                     # 1.6 % of the picture
    assert evaluation.change(before, before)[0].item() == 0
    assert [evaluation.change(before, after)[1].item() for after in (before, noisy, edited)] == [True, True, False]
    assert evaluation.change(before, noisy)[0].item() == pytest.approx(6.2, abs=.3)


def test_no_success_at_all_is_a_result(faulty):
    """Catches: a report that dies, also on every rerun, because the highest bar of a figure is 0."""
    result = faulty((0, 0), (0, 0), "--tasks 4 --probes 4", figures=True)
    assert all(result["arms"][name]["M"] == result["arms"][name]["O"] == [0, 0, 0] for name in ("base", "tuned"))
    assert result["differences"]["tuned"]["C"] == [0, None, None] and result["differences"]["tuned"]["O"] == [0, 0, 0]
    assert (faulty.out / "report.html").stat().st_size > 1000 and (faulty.out / "sheets" / "random.png").exists()
    # no addition was right, so that there is no place to show
    assert {f.name for f in (faulty.out / "figures").iterdir()} == {f"{name}.png" for name in (
        "success", "plane", "losses", "drift", "kinds")}


def test_the_closing_table_of_training_measures_the_same(faulty):
    """Catches: two ways of measuring that drift apart: in memory, as train.py does, and from disk."""
    result = faulty((.7, .3), None, "--tasks 40 --probes 40")["arms"]["base"]
    tasks = data.load_shapes("test", 3, 40)
    scores = evaluation.evaluate(FaultyEditor(tasks, (.7, .3)), reward.load("exact"), tasks, 3, 1, probes=40,
                                 progress=False)
    here = evaluation.summarise({"base": scores}, tasks)["arms"]["base"]
    assert close(here, {name: result[name] for name in here})
    pictures = np.array(Image.open(faulty.out / "arms" / "base" / "own" / "9_turn2.png")).transpose(2, 0, 1)
    assert scores.pictures(9).shape == (4, 3, 48, 48) and np.array_equal(scores.pictures(9)[2], pictures)


def test_an_editor_that_draws_the_right_picture_has_full_marks():
    """Catches: a turn judged by the scene of another turn."""
    tasks = make_tasks(20, K=3)
    turn = iter(range(3))

    class Oracle(CopyEditor):
        def decode(self, x, size):
            k = next(turn)
            return torch.from_numpy(world.render([task.meta["scenes"][k + 1] for task in tasks])).permute(0, 3, 1, 2)
    scores = evaluation.evaluate(Oracle(), reward.load("exact"), tasks, 3, 2, progress=False)
    result = evaluation.summarise({"base": scores}, tasks)["arms"]["base"]
    assert result["M"] == result["IF"] == [1, 1, 1] and min(result["CC"]) > .95 and min(result["O"]) > .95


def test_a_judge_of_known_rates_gives_those_rates_back():
    """Catches: turns or dialogues mixed up on the way from the judge to the table; batches that lose the last tasks."""
    n, K, generator = 30, 3, torch.Generator().manual_seed(0)
    truth = torch.rand(n, K, 2, generator=generator)
    truth[4, 1] = NAN
    tasks = [Task(task.image, task.instructions, task.kinds, {"row": i}) for i, task in enumerate(make_tasks(n, K))]
    judge = Judge(lambda r, part, k: truth[[task.meta["row"] for task in part], k])
    scores = evaluation.evaluate(CopyEditor(), judge, tasks, K, 2, seeds=2, batch=7, progress=False)
    assert scores.pictures(29).shape == (K + 1, 3, 48, 48)
    for r, name in enumerate(judge.names):
        assert torch.allclose(scores.rewards[name], truth[..., r].double().expand(2, n, K), atol=1e-6, equal_nan=True)
    result = evaluation.summarise({"base": scores}, tasks)["arms"]["base"]
    s = (truth[..., 0] >= .5).double()
    s[4, 1] = NAN
    assert result["M"] == pytest.approx([s[:, k].nanmean().item() for k in range(K)])
    assert result["CC"] == pytest.approx([truth[:, k, 1].nanmean().item() for k in range(K)], abs=1e-6)
    assert result["judge_failed"] == pytest.approx(1 / (n * K))
    following = [truth[:, k, 0].nanmean().item() for k in range(K)]
    assert result["rewards"]["following"] == pytest.approx(following, abs=1e-6)


def same(a, b):
    """Do two Scores hold the same rewards? Sums over a picture end in other digits where its memory lies otherwise."""
    return all(torch.allclose(a.rewards[name], b.rewards[name], rtol=0, atol=2e-6) for name in a.rewards)


def test_results_do_not_depend_on_the_batch_size():
    """Catches: noise keyed by the row in the batch, so that base and tuned differ by their batches."""
    editor, tasks = new_editor(), make_tasks(5)
    a, b = (evaluation.evaluate(editor, Judge(), tasks, 2, 3, batch=batch, progress=False) for batch in (5, 2))
    # a value near a rounding boundary may fall on either side
    difference = torch.stack([(a.pictures(i).int() - b.pictures(i).int()).abs() for i in range(5)])
    assert difference.max() <= 1 and (difference > 0).float().mean() < .01
    assert torch.allclose(a.rewards["following"], b.rewards["following"], atol=1e-3)


def test_seeds_bring_other_noise():
    """Catches: the same noise for every seed, which makes three seeds one."""
    scores = evaluation.evaluate(new_editor(), Judge(), make_tasks(2), 2, 3, seeds=2, progress=False)
    assert (scores.rewards["following"][0] != scores.rewards["following"][1]).all()


def test_base_and_untrained_lora_give_identical_rows():
    """Catches: other noise for the two arms, so that their difference is no longer paired."""
    editor, tasks = new_editor(4), make_tasks(3)
    arms = {}
    for name in ("ref", "ema"):
        with editor.using(name):
            arms[name] = evaluation.evaluate(editor, Judge(), tasks, 2, 3, progress=False)
    assert same(arms["ref"], arms["ema"])
    assert same(arms["ref"], evaluation.evaluate(new_editor(), Judge(), tasks, 2, 3, progress=False))
    result = evaluation.summarise(arms, tasks)
    assert result["arms"]["ref"] == result["arms"]["ema"]
    bounds = result["differences"]["ema"]["interval_95"]
    assert all(low == high == 0 for m in ("M", "IF", "CC", "O") for low, high in bounds[m])


def test_a_turns_noise_is_that_of_its_place():
    """Catches: pictures that are no longer those of earlier versions: noise of another key, or of another turn."""
    from rollout import draw_noise
    noise = lambda seed, turn: torch.stack([draw_noise((3, 48 * 48), seed, 0, row, 0, turn, 0) for row in range(3)])

    def check(tasks, passes):
        """passes: (seed, turn) of every forward, in their order."""
        seen = []

        class Editor(CopyEditor):
            def velocity(self, x, t, cond, context, size):
                seen.append(x)
                return super().velocity(x, t, cond, context, size)
        evaluation.evaluate(Editor(), Judge(), tasks, 2, 1, seeds=2, probes=3, progress=False)
        assert len(seen) == len(passes)
        for x, (seed, turn) in zip(seen, passes):
            assert torch.equal(x, noise(seed, turn)), (seed, turn)

    # of files, of each seed: own 1, own 2, clean 2, nothing 1, nothing 2
    files = make_tasks(3, K=2)
    for task in files:
        task.meta = {"dependent": [False, False]}
    check(files, [(seed, turn) for seed in (0, 1) for turn in (0, 1, 1, 0, 1)])
    # of the embedded world, clean at last; a second turn that is told its place, or changes something, is possible
    told = [task for task in make_tasks(60, K=2) if not task.meta["operations"][0].open][:3]
    check(told, [(seed, turn) for seed in (0, 1) for turn in (0, 1, 0, 1)] + [(0, 1), (1, 1)])


# ------------------------------------------------------------------------------------------------------------- resuming

def pictures(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in (folder / "arms").rglob("*.png")}


def lines_of(folder, arm="base"):
    return [json.loads(line) for line in (folder / "arms" / arm / "scores.jsonl").read_text().splitlines()]


def close(a, b):
    """Is this the same result? The exact judge's sums end in other digits in other batches."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[name], b[name]) for name in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(close, a, b))
    return a == (pytest.approx(b, abs=1e-5) if isinstance(b, float) else b)


def test_what_is_finished_is_not_repeated_and_what_was_interrupted_goes_on(faulty):
    """Catches: an hour of sampling lost or done twice; half a line of scores read; other noise on resume."""
    rates, words = ((.7, .3), (.9, .9)), "--tasks 6 --probes 3 --seeds 2"
    assert faulty(*rates, words + " --judge none") is None and not list(faulty.out.rglob("scores*"))
    whole = pictures(faulty.out)
    folders = [f"arms/{arm}/own{seed}" for arm in ("base", "tuned") for seed in ("", "-seed1")]
    assert {name for name in whole if "/own" in name} == {
        f"{folder}/{i}_turn{k}.png" for folder in folders for i in range(6) for k in (1, 2, 3)}
    first = faulty(*rates, words)
    file = faulty.out / "arms" / "tuned" / "scores.jsonl"
    scores, loads = file.read_text(), len(faulty.loads)
    stamps = {f: f.stat().st_mtime_ns for f in (faulty.out / "arms").rglob("*.png")}
    assert faulty(*rates, words) == first and len(faulty.loads) == loads == 2
    assert file.read_text() == scores and pictures(faulty.out) == whole

    # killed in the middle of a line, and a picture lost
    (faulty.out / "arms" / "tuned" / "own-seed1" / "4_turn2.png").unlink()
    file.write_text("".join(scores.splitlines(keepends=True)[:50]) + '{"seed": 0, "pa')
    assert close(faulty(*rates, words), first) and len(faulty.loads) == loads + 1
    assert pictures(faulty.out) == whole
    redone = {f.name for f, stamp in stamps.items() if f.stat().st_mtime_ns != stamp}
    assert redone == {f"4_turn{k}.png" for k in (1, 2, 3)}
    after = file.read_text().splitlines()
    assert after.pop(50) == '{"seed": 0, "pa' and after[:50] == scores.splitlines()[:50]
    key = lambda line: re.search('.*"turn": .', line)[0]
    assert sorted(map(key, after)) == sorted(map(key, scores.splitlines()))
    # a clean context alone is missing
    next((faulty.out / "arms" / "base" / "clean").iterdir()).unlink()
    assert close(faulty(*rates, words), first) and len(faulty.loads) == loads + 2 and pictures(faulty.out) == whole


def test_clean_contexts_are_planned_on_own_outputs_and_made_once(tmp_path):
    """Catches: pictures that are made twice, or by the plan of another arm; a plan that changes with the judge; clean
    contexts of turns that were lost before counted as this one's; probes that are added later at the price of all."""
    tasks, made = data.load_shapes("test", 3, 20), []

    def sample(editor, group, T, on_turn):
        made.extend((d.part, d.row, *d.turns) for d in group)
        return evaluation.sample_turns(editor, group, T, on_turn)

    def go(folder="arm", probes=20, judge=reward.load("exact"), rates=(.8, .6)):
        made.clear()
        return evaluation.evaluate(FaultyEditor(tasks, rates), judge, tasks, 3, 1, probes=probes, progress=False,
                                   folder=tmp_path / folder, sample=sample)
    whole = go()
    assert len(set(made)) == len(made) == 40 + sum(part == "clean" for part, *_ in made)
    planned = {(row, k) for part, row, k, *_ in made if part == "clean"}
    counted = {(row, k) for row, k in (~whole.measured["clean"][0].isnan()).nonzero().tolist() if k}
    possible = {(row, k) for row, k in (whole.rewards["possible"][0] == 1).nonzero().tolist() if k}
    right = whole.success[0]
    assert planned == possible and counted == {(row, k) for row, k in planned if right[row, :k].all()} != planned
    # once more, with two pictures lost, with another judge
    assert same(go(), whole) and not made
    for row, k in sorted(planned)[:2]:
        (tmp_path / "arm" / "clean" / f"{row}_turn{k + 1}.png").unlink()
    assert same(go(), whole) and made == [("clean", row, k) for row, k in sorted(planned, key=lambda x: x[1])
                                          if (row, k) in sorted(planned)[:2]]
    go(judge=Judge())
    assert not made
    # own outputs first, then more and more probes; of another arm other ones
    go("grown", 0)
    assert len(made) == 20
    go("grown", 7)
    grown = go("grown")
    assert all(part != "own" for part, *_ in made) and len(made) == 13 + sum(part == "clean" for part, *_ in made)
    assert torch.equal(grown.measured["clean"].nan_to_num(-1), whole.measured["clean"].nan_to_num(-1))
    go("other", rates=(.3, .3))
    assert planned != {(row, k) for part, row, k, *_ in made if part == "clean"}


def test_lines_that_are_no_scores_are_left_out(tmp_path):
    """Catches: a traceback for a scores.jsonl that was damaged or edited; its turns are judged again."""
    plan = evaluation.make_plan(make_tasks(1, K=1), 1, folder=tmp_path)
    good = {"seed": 0, "pass": "own", "task": plan[0].name, "turn": 1, "judge": "j", "following": 1.}
    lines = ["null", "[1]", "{}", '{"seed": [], "pass": {}, "task": 0, "turn": 1, "judge": "j"}', "[" * 99_999, "\xff"]
    (tmp_path / "scores.jsonl").write_bytes("\n".join([*lines, json.dumps(good)]).encode("latin1"))
    evaluation.read_scores(tmp_path, "j", plan)
    assert plan[0].lines == [good]


def test_pictures_of_unknown_origin_are_refused(faulty):
    """Catches: pictures of another editor scored as this one's, once settings.json is gone or says nothing."""
    words = "--tasks 2 --probes 0"
    faulty((.7, .3), None, words)
    for text in (None, "{}"):
        file = faulty.out / "settings.json"
        file.unlink() if text is None else file.write_text(text)
        with pytest.raises(ValueError, match="holds pictures, and no settings.json"):
            faulty((.7, .3), None, words)
        file.write_text("{}")


def test_an_evaluation_may_grow(faulty):
    """Catches: more tasks, seeds, turns or probes refused, or at the price of what is there."""
    faulty((.7, .3), None, "--tasks 3 --probes 2 --turns 2")
    there = {f: f.stat().st_mtime_ns for f in (faulty.out / "arms").rglob("*.png")}
    for words, n, K in (("--tasks 5 --probes 3 --turns 2", 5, 2), ("--tasks 5 --probes 3 --turns 2 --seeds 2", 5, 2),
                        ("--tasks 5 --probes 5 --turns 4 --seeds 2", 5, 4), ("--tasks 4 --probes 2 --turns 3", 4, 3)):
        result = faulty((.7, .3), None, words)
        assert result["n"] == n and len(result["arms"]["base"]["M"]) == K, words
        if "--turns 2" in words:
            assert all(f.stat().st_mtime_ns == stamp for f, stamp in there.items()), words
    # the same as one that was never interrupted
    assert close(result["arms"], faulty((.7, .3), None, words, faulty.out.parent / "fresh")["arms"])


def test_probes_are_spread_over_the_tasks():
    """Catches: probes on the first tasks of a file alone, which may be of one kind; turns of another number."""
    tasks, probed = make_tasks(10, K=3), [0, 2, 5, 7]
    for world_made in (False, True):
        files = [Task(task.image, task.instructions, task.kinds, {"dependent": [False] * 3}) for task in tasks]
        plan = evaluation.make_plan(tasks if world_made else files, 3, 2, 4)
        if world_made:
            # a perfect editor that puts all things where they are planned
            for d in plan:
                d.pictures = torch.from_numpy(world.render(tasks[d.row].meta["scenes"])).permute(0, 3, 1, 2)
            plan += evaluation.plan_clean(plan, tasks, 4)
        rows = {(d.seed, d.part, d.turns): [] for d in plan}
        for d in plan:
            rows[d.seed, d.part, d.turns].append(d.row)
        for seed in (0, 1):
            assert rows.pop((seed, "own", range(3))) == list(range(10))
            assert rows.pop((seed, "clean", range(1, 2))) == rows.pop((seed, "clean", range(2, 3))) == probed
            assert rows.pop((seed, "nothing", range(3))) == probed
        assert not rows
    assert [d.row for d in evaluation.make_plan(tasks, 1, 1, 99) if d.part == "nothing"] == list(range(10))


def test_the_passes_see_the_same_tasks_and_noise(faulty):
    """Catches: clean contexts of another dialogue, or edited from other noise than the model's own turn."""
    faulty((.5, .5), None, "--tasks 24 --judge none")
    folder, tasks = faulty.out / "arms" / "base", data.load_shapes("test", 3, 24)
    same, fewer = 0, 0
    for i, task in enumerate(tasks):
        files = [folder / "own" / f"{i}_turn{k}.png" for k in (1, 2, 3)]
        shown = np.stack([np.array(picture) for picture in (task.image, *map(Image.open, files))])
        scenes, possible = data.resolve(task, torch.from_numpy(shown).permute(0, 3, 1, 2))
        for k in (1, 2):
            clean = folder / "clean" / f"{i}_turn{k + 1}.png"
            assert clean.exists() == possible[k]
            fewer += not possible[k]
            # then both passes edit one picture
            if possible[k] and np.array_equal(shown[k], world.render(scenes[k:k + 1])[0]):
                assert clean.read_bytes() == files[k].read_bytes()
                same += 1
        assert Image.open(folder / "nothing" / f"{i}_turn3.png").tobytes() == task.image.tobytes()
    # other noise would agree by chance in one of 2^8 runs or fewer
    assert 8 <= same < 48 and fewer > 2


def test_another_judge_scores_the_same_pictures_and_the_first_ones_scores_stay(faulty, monkeypatch):
    """Catches: scores of two judges, or of one by two rubrics, mixed in one mean; pictures sampled again."""
    first = faulty((.7, .3), None, "--tasks 5 --probes 2")
    loads, before, whole = len(faulty.loads), lines_of(faulty.out), pictures(faulty.out)
    load, results = reward.load, {}
    for rubric in ("one", "two"):
        judge = Judge(lambda r, tasks, k: r / 2 if rubric == "two" else r)
        judge.fingerprint = f"colours by rubric {rubric}"
        monkeypatch.setattr(reward, "load", lambda *_, **__: judge)
        results[rubric] = faulty((.7, .3), None, "--tasks 5 --probes 2 --judge colours")
        assert results[rubric]["judge"] == "colours"
        assert judge.calls, "no new scores"
        judge.calls.clear()
        assert faulty((.7, .3), None, "--tasks 5 --probes 2 --judge colours") == results[rubric] and not judge.calls
    assert len(faulty.loads) == loads and pictures(faulty.out) == whole
    lines = lines_of(faulty.out)
    assert lines[:len(before)] == before and len(lines) == 3 * len(before)
    one, two = (results[rubric]["arms"]["base"]["rewards"]["following"] for rubric in ("one", "two"))
    assert one == pytest.approx([2 * x for x in two], abs=1e-5)
    monkeypatch.setattr(reward, "load", load)
    assert faulty((.7, .3), None, "--tasks 5 --probes 2")["arms"] == first["arms"] and lines_of(faulty.out) == lines


def test_a_turn_on_which_the_judge_failed_is_null_and_asked_again(faulty, monkeypatch):
    """Catches: a server that was down for a minute, whose gaps stay for ever; a score replaced by a later failure."""
    down = torch.tensor(True)

    def spoil(r, tasks, k):
        return r.index_put((torch.tensor([0]), torch.tensor([0])), torch.tensor(NAN)) if down else r
    judge = Judge(spoil)
    judge.last_failure = "connection refused"
    monkeypatch.setattr(reward, "load", lambda *_, **__: judge)
    words = "--tasks 5 --probes 0 --judge colours"
    result = faulty((.7, .3), None, words)["arms"]["base"]
    assert result["judge_failed"] == pytest.approx(1 / 5) and result["n"]["M"] == [4, 4, 4]
    assert sum(line["following"] is None for line in lines_of(faulty.out)) == 3
    down.fill_(False)
    result = faulty((.7, .3), None, words)["arms"]["base"]
    assert result["judge_failed"] == 0 and result["n"]["M"] == [5, 5, 5] and len(lines_of(faulty.out)) == 18
    # whatever order the lines are in: other processes write other files
    file = faulty.out / "arms" / "base" / "scores.jsonl"
    file.write_text("".join(reversed(file.read_text().splitlines(keepends=True))))
    down.fill_(True)
    assert faulty((.7, .3), None, words)["arms"]["base"] == result and len(lines_of(faulty.out)) == 18


def test_several_loras_each_against_the_base(faulty, tmp_path):
    """Catches: a second LoRA loaded on top of the first, or compared with it in place of the base; one added later."""
    for name in ("a", "b_c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / model.LORA_FILE).write_bytes(name.encode())
    words = f"--tasks 4 --probes 0 --lora {tmp_path / 'a'} --lora Mine={tmp_path / 'b_c'}"
    result = faulty((.8, .8), (.8, .8), words)
    assert list(result["arms"]) == ["base", "lora", "a", "Mine"]
    assert list(result["differences"]) == ["lora", "a", "Mine"]
    assert len(faulty.loads) == 4 and (faulty.out / "sheets" / "failures-Mine.png").exists()
    words = f"--tasks 4 --probes 0 --lora Later={tmp_path / 'a'}"
    assert list(faulty((.8, .8), (.8, .8), words)["arms"]) == ["base", "lora", "Later"] and len(faulty.loads) == 5


@pytest.mark.parametrize("change, expected", [
    ("--denoise 5", "another evaluation .denoise 1 -> 5."),
    ("--guidance 3", "another evaluation .guidance None -> 3.0."),
    ("LORA", "another evaluation .weights of tuned \\w+ -> \\w+."),
    ("MODEL", "another evaluation .weights of base \\w+ -> \\w+."),
    ("--split val", "another evaluation .dialogue 0, turn 1 .*; dialogue 0, turn 2 .* and 6 more."),
    ("SIZE", "2_turn2.png is 20 x 30, expected 48 x 48")])
def test_what_contradicts_the_folder_is_refused(faulty, change, expected):
    """Catches: pictures of two settings in one mean; weights that changed under the same path."""
    faulty((.7, .3), (.9, .9), "--tasks 3 --probes 0 --judge none")
    folder, loads = faulty.out.parent, len(faulty.loads)
    if change == "LORA":
        (folder / "lora" / model.LORA_FILE).write_bytes(b"others")
    elif change == "MODEL":
        (folder / "model" / "model_index.json").write_text('{"other": 1}')
    elif change == "SIZE":
        Image.new("RGB", (20, 30)).save(faulty.out / "arms" / "base" / "own" / "2_turn2.png")
    before = pictures(faulty.out)
    with pytest.raises(ValueError, match=expected):
        faulty((.7, .3), (.9, .9), "--tasks 3 --probes 0 " + (change if change[0] == "-" else ""))
    assert pictures(faulty.out) == before and not (faulty.out / "results.json").exists() and len(faulty.loads) == loads


def test_two_processes_do_not_evaluate_in_one_folder(faulty):
    """Catches: pictures of two evaluations that were begun at once, and their scores, line by line in one file."""
    faulty((.7, .3), (.9, .9), "--tasks 2 --probes 0 --judge none")
    with held_by_another(faulty.out), pytest.raises(ValueError, match=f"--out {faulty.out}: another process writes there"):
        faulty((.7, .3), (.9, .9), "--tasks 3 --probes 0")
    assert not any(faulty.out.glob("arms/*/scores.jsonl")) and not any(faulty.out.glob("arms/*/own/2_*"))
    faulty((.7, .3), (.9, .9), "--tasks 3 --probes 0")                                     # the other one has ended


def test_what_is_evaluated_is_known_by_content(faulty, monkeypatch, tmp_path):
    """Catches: instructions, kinds or a picture that changed under the same names, and old pictures shown for them;
    the same file refused because it moved."""
    monkeypatch.setattr(reward, "load", lambda *_, **__: Judge())
    monkeypatch.setattr(model, "load", lambda *_, **__: CopyEditor())

    def write(folder, second, picture=90):
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (48, 48), (picture, 60, 30)).save(folder / "a.png")
        rows = [{"image": "a.png", "instructions": ["Add a ring", second], "kinds": ["add", "add"]}] * 2
        (folder / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(folder, turns=2):
        words = "--judge x --resolution 48 --denoise 1 --probes 0 --turns"
        evaluation.main(["--model", str(tmp_path / "model"), "--data", str(folder / "tasks.jsonl"), *words.split(),
                         str(turns), "--out", str(tmp_path / "out")])
    write(tmp_path / "one", "Add a star")
    run(tmp_path / "one", 1)
    run(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "moved")
    run(tmp_path / "moved")
    for second, picture, expected in (("Add a cross", 90, "dialogue 0, turn 2 .*; dialogue 1, turn 2"),
                                      ("Add a star", 91, "dialogue 0, turn 1 .*; dialogue 0, turn 2")):
        write(tmp_path / "one", second, picture)
        with pytest.raises(ValueError, match=f"holds another evaluation .{expected}"):
            run(tmp_path / "one")


def test_pictures_that_are_there_need_no_editor_and_those_that_are_missing_are_named(tmp_path):
    """Catches: an editor loaded to read pictures; a traceback, or a shorter dialogue, where a picture is missing."""
    tasks, judge = make_tasks(3, K=2), Judge()
    options = dict(folder=tmp_path / "arm", progress=False)
    assert evaluation.evaluate(CopyEditor(), None, tasks, 2, 1, **options) is None
    scores = evaluation.evaluate(None, judge, tasks, 2, 1, **options)
    assert same(scores, evaluation.evaluate(CopyEditor(), judge, tasks, 2, 1, progress=False))
    (tmp_path / "arm" / "own" / "1_turn2.png").unlink()
    with pytest.raises(ValueError, match="lacks pictures of dialogue 1"):
        evaluation.evaluate(None, judge, tasks, 2, 1, **options)


def test_a_power_cut_leaves_no_picture_that_is_a_name_without_bytes(tmp_path, monkeypatch):
    """Catches: an empty file that counts as a picture which is there, so that the evaluation never gets beyond it."""
    calls = record_disk(monkeypatch)
    evaluation.evaluate(CopyEditor(), None, make_tasks(2, K=2), 2, 1, folder=tmp_path / "arm", progress=False)
    pictures = [str(file) for file in tmp_path.rglob("*.png")]
    assert len(pictures) == 4
    for file in pictures:
        i = calls.index(("replace", f"{file}.tmp", file))
        assert calls[i - 1] == ("fsync", f"{file}.tmp")
        assert calls[i + 1] == ("fsync", str(tmp_path / "arm" / "own"))


def test_pictures_may_lie_and_be_made_elsewhere(tmp_path):
    """Catches: hooks of bench/edival.py that are not called, or with other turns; names that are not the index."""
    tasks, calls = make_tasks(2, K=2), []
    for i, task in enumerate(tasks):
        task.meta = {"index": f"n{i}", "dependent": [False, True]}

    def file_of(folder, seed, part, name, k):
        return tmp_path / f"{part}-{seed}" / f"{name}-{k}.png"

    def sample(editor, group, T, on_turn):
        calls.append((editor, [d.name for d in group], group[0].part, group[0].turns, T))
        images = torch.stack([evaluation.load_pictures(dataclasses.replace(d, files=[])) for d in group])
        for k in range(len(group[0].turns)):
            images = torch.cat([images, images[:, -1:]], 1)
            on_turn(k, images)
        return images
    scores = evaluation.evaluate("editor", Judge(), tasks, 2, 7, probes=1, folder=tmp_path / "arm", progress=False,
                                 file_of=file_of, sample=sample)
    assert calls == [("editor", ["n0", "n1"], "own", range(2), 7), ("editor", ["n0"], "nothing", range(2), 7)]
    assert {str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*.png")} == {
        f"{place}-{k}.png" for place in ("own-0/n0", "own-0/n1", "nothing-0/n0") for k in (0, 1)}
    assert scores.measured["copied"].tolist() == [[[1, 1], [1, 1]]]
    assert torch.equal(scores.pictures(1)[0], scores.pictures(1)[2])
    assert all(line["task"] in ("n0", "n1") for line in map(json.loads, open(tmp_path / "arm" / "scores.jsonl")))


# ---------------------------------------------------------------------------------------------------------- the program

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a training run, its LoRA large enough to be seen in the table."""
    out = tmp_path_factory.mktemp("trained") / "run"
    cfg = train.parse(["--model", editor_folder(), "--turns", "2", "--eval-denoise", "2", "--out", str(out)])
    out.mkdir()
    (out / "config.json").write_text(json.dumps(dataclasses.asdict(cfg) | {"of_a_later_version": 1}))
    editor = new_editor(4)
    move(editor, .2)
    model.save_weights(editor, out)
    return out


def settle(*words):
    return evaluation.settle(data.parse_flags(evaluation.Settings, "", list(map(str, words))))


def test_settings_come_from_flags_then_the_run_then_defaults(run, tmp_path):
    """Catches: a flag that the run's config overrides, T of training in place of evaluation's, tasks of a step taken
    for tasks of an evaluation, a rubric that stays with another judge, settings that change on their way."""
    settings = settle("--run", run)
    assert (settings.turns, settings.denoise, settings.tasks) == (2, 2, 500)
    assert (settings.split, settings.judge) == ("test", "exact")
    assert settings.model == editor_folder() and settings.lora == {"tuned": str(run)} and settings.out == f"{run}/eval"
    assert settings.guidance == train.Config.guidance and settings.batch == 100
    assert settle("--run", run, "--turns", 5, "--out", "x").turns == 5
    assert (settle("--model", "m").denoise, settle("--model", "m", "--data", "a.jsonl").denoise) == (8, 28)
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.turns = 3
    old = {"model": "m", "data": "mine.jsonl", "turns": 4, "eval_denoise": 11, "judge": "vlm", "rubric": "r.json",
           "votes": 3, "reasoning": "think", "judge_cache": "gone", "temperature": .7, "guidance": None}
    (tmp_path / "config.json").write_text(json.dumps(old))
    settings = settle("--run", tmp_path)
    assert (settings.data, settings.split, settings.tasks, settings.guidance) == ("mine.jsonl", "val", None, None)
    assert (settings.judge, settings.rubric, settings.reasoning, settings.votes) == ("vlm", "r.json", "think", 3)
    other = settle("--run", tmp_path, "--data", "other.jsonl", "--judge", "second")
    assert (other.split, other.judge, other.rubric, other.votes) == ("all", "second", "", 1)


def test_only_what_was_held_out_of_the_training_file_is_evaluated_whatever_its_path(tmp_path, monkeypatch):
    """Catches: training tasks scored as if never seen, since the file has another name from another folder."""
    picture, line = tmp_path / "a.png", {"image": "a.png", "instructions": ["Make it black"]}
    Image.new("RGB", (64, 64)).save(picture)
    trained, other = tmp_path / "trained.jsonl", tmp_path / "other.jsonl"
    trained.write_text(json.dumps(line))
    other.write_text(json.dumps(line | {"instructions": ["Make it white"]}))
    cfg = {"model": "m", "data": "trained.jsonl", "content_of_data": data.file_fingerprint(trained)}
    (tmp_path / "config.json").write_text(json.dumps(cfg))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert settle("--run", tmp_path, "--data", trained).split == "val"
    assert settle("--run", tmp_path, "--data", "../trained.jsonl").split == "val"
    assert settle("--run", tmp_path, "--data", other).split == "all"


def test_a_training_file_that_has_changed_is_not_taken_for_the_one_that_was_trained_on(tmp_path, monkeypatch):
    """Catches: lines in another order, or a file of the same name elsewhere: training tasks as held out."""
    file, other = tmp_path / "tasks.jsonl", tmp_path / "elsewhere" / "tasks.jsonl"
    other.parent.mkdir()
    for folder in (tmp_path, other.parent):
        Image.new("RGB", (64, 64)).save(folder / "a.png")
    file.write_text('{"image": "a.png", "instructions": ["Make it black"]}\n')
    cfg = {"model": "m", "data": "tasks.jsonl", "content_of_data": data.file_fingerprint(file)}
    (tmp_path / "config.json").write_text(json.dumps(cfg))
    monkeypatch.chdir(tmp_path)
    assert settle("--run", ".").split == "val"
    other.write_text('{"image": "a.png", "instructions": ["Make it white"]}\n')
    monkeypatch.chdir(other.parent)
    with pytest.raises(ValueError, match="--data tasks.jsonl is not the file that --run was trained on"):
        settle("--run", "..")
    assert settle("--run", "..", "--split", "all").split == "all"


def test_a_lora_that_is_not_there_is_named_as_it_was_written():
    """Catches: two mistyped folders of one parent refused as two models of one name."""
    assert evaluation.name_loras(["out/grpo", "out/nft"]) == {"grpo": "out/grpo", "nft": "out/nft"}


def check_results(folder, stdout, arms, K):
    result = json.loads((folder / "results.json").read_text())
    assert list(result["arms"]) == arms
    for values in result["arms"].values():
        assert all(len(values[m]) == K for m in ("M", "IF", "CC", "O"))
        assert all(0 <= v <= 1 for m in ("M", "IF", "CC", "O") for v in values[m])
    assert len(re.findall(r"^ +\d  (?:M|IF|CC|O) ", stdout, re.M)) == 4 * K
    assert Image.open(folder / "sheets" / "random.png").size[0] == (K + 1) * 154 + 7
    for name in ("tables.md", "report.html", "figures/success.png", "arms/base/scores.jsonl", "settings.json"):
        assert (folder / name).stat().st_size > 300 or "scores" in name, name
    return result


def test_eval_of_a_run_and_of_a_lora_by_hand_on_two_processes_agree(run, tmp_path):
    """Catches: anything that breaks the commands of the README; --run with another model, LoRA, T or K; tasks that two
    processes both do or neither does, or edit from other noise."""
    pipes = dict(env=child_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    by_hand = ["--model", editor_folder(), "--lora", run, "--turns", "2", "--denoise", "2", "--guidance", "2.5",
               "--out", tmp_path]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    started = [subprocess.Popen([sys.executable, *words[0], "eval.py", "--tasks", "5", "--probes", "4", *words[1]],
                                cwd=ROOT, **pipes)
               for words in (([], ["--run", run]), (torchrun, by_hand))]
    results = []
    (tmp_path / "arms" / "base").mkdir(parents=True)
    (tmp_path / "arms" / "base" / "scores.jsonl").write_text("")
    for process, folder in zip(started, (run / "eval", tmp_path)):
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err[-3000:]
        results.append(check_results(folder, out, ["base", "tuned"], 2))
    a, b = results
    assert a["arms"]["base"] != a["arms"]["tuned"] and a["n"] == 5 and a["denoise"] == 2
    assert sorted(pictures(run / "eval")) == sorted(pictures(tmp_path))
    key = lambda row: [row[name] for name in ("seed", "pass", "task", "turn")]
    for arm in ("base", "tuned"):
        one, two = (sorted((json.loads(line) for file in (folder / "arms" / arm).glob("scores*.jsonl")
                            for line in file.read_text().splitlines()), key=key) for folder in (run / "eval", tmp_path))
        assert list(map(key, one)) == list(map(key, two))
        passes = [line["pass"] for line in one]
        assert passes.count("own") == 5 * 2 and passes.count("nothing") == 4 * 2 and 1 <= passes.count("clean") <= 4
        # other batches: a value near a rounding boundary may fall on either side
        for x, y in zip(one, two):
            assert x["drift"] == pytest.approx(y["drift"], abs=.05)
            assert x.get("consistency", 0) == pytest.approx(y.get("consistency", 0), abs=.02)
    assert len(list((tmp_path / "arms" / "tuned").glob("scores-*.jsonl"))) == 2


def test_one_editor_alone_and_several_seeds(tmp_path):
    """Catches: a table that needs two arms, or seeds that are averaged into the wrong tasks. One turn has no gap."""
    words = f"--out {tmp_path} --tasks 3 --turns 1 --denoise 2 --seeds 2 --batch 2 --split val --probes 1"
    code, out, _ = run_script("eval.py", "--model", editor_folder(), *words.split())
    assert code == 0 and "3 dialogues x 2 seeds" in out and "2 denoising steps" in out
    result = check_results(tmp_path, out, ["base"], 1)
    assert result["seeds"] == 2 and result["lora"] == {} == result["differences"]
    assert result["arms"]["base"]["n"]["M"] == [6] and "EB" not in result["arms"]["base"]


def test_eval_on_pictures_of_ones_own(run, tmp_path, monkeypatch):
    """Catches: a path that only the embedded world takes; the run's picture size forgotten; a fifth of a file."""
    monkeypatch.setattr(reward, "load", lambda *_, **__: Judge())
    Image.effect_noise((60, 50), 90).convert("RGB").save(tmp_path / "a.png")
    Image.effect_noise((50, 90), 90).convert("RGB").save(tmp_path / "b.png")
    (tmp_path / "tasks.jsonl").write_text('{"image": "a.png", "instructions": ["Add a ring", "Remove the ring"]}\n'
                                          '{"image": "b.png", "instructions": ["Add a ring", "Turn day into night"]}\n')
    code, out, _ = run_script("eval.py", "--run", run, "--data", tmp_path / "tasks.jsonl", "--judge", "x",
                              "--resolution", 48, "--out", tmp_path / "out")
    result = check_results(tmp_path / "out", out, ["base", "tuned"], 2)
    assert code == 0 and result["n"] == 2 and result["resolution"] == 48 and result["profile"] == "VLM"
    assert result["arms"]["base"]["n"]["clean"] == [2, 1]       # "Remove the ring" needs what turn 1 made


def test_the_report_is_written_once_more_from_the_folder(faulty, capsys):
    """Catches: a report that needs the editor, the judge or the weights; one of an evaluation that is not finished."""
    faulty((.7, .3), (.9, .9), "--tasks 3 --probes 2 --judge none")
    with pytest.raises(ValueError, match="holds pictures without scores"):
        report.main([str(faulty.out)])
    result = faulty((.7, .3), (.9, .9), "--tasks 3 --probes 2")
    page = (faulty.out / "report.html").read_text()
    shutil.rmtree(faulty.out.parent / "lora")
    for name in ("results.json", "report.html"):
        (faulty.out / name).unlink()
    report.main([str(faulty.out)])
    assert json.loads((faulty.out / "results.json").read_text()) == result
    assert (faulty.out / "report.html").read_text() == page
    lines = (faulty.out / "arms" / "base" / "scores.jsonl").read_text().splitlines(keepends=True)
    (faulty.out / "arms" / "base" / "scores.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(ValueError, match="of dialogue . .pass clean, seed 0. is not judged"):
        report.main([str(faulty.out)])


IMPOSSIBLE = {      # what is typed (RUN and TMP are folders), what the one line must say
    "neither run nor model": ("", "--run.*--model"),
    "run and model": ("--run RUN --model x", "--run.*--model"),
    "run without config": ("--run TMP", "TMP.*config.json"),
    "config that is a list": ("--run LIST", "LIST/config.json must hold a JSON object, not a list"),
    "config that is no JSON": ("--run WORDS", "WORDS/config.json cannot be read"),
    "no editor": ("--model TMP", "TMP is no editor"),
    "missing lora": ("--model EDITOR --lora TMP/nowhere", "no LoRA at TMP/nowhere"),
    "folder without lora": ("--model EDITOR --lora TMP", "no LoRA at TMP"),
    "no tasks": ("--model EDITOR --tasks 0", "--tasks 0.*at least 1"),
    "no seeds": ("--model EDITOR --seeds 0", "--seeds 0.*at least 1"),
    "no turns": ("--model EDITOR --turns 0", "--turns 0.*at least 1"),
    "negative steps": ("--model EDITOR --denoise -2", "--denoise -2.*at least 1"),
    "guidance that is no number": ("--model EDITOR --guidance nan", "--guidance nan.*finite number"),
    "guidance of an editor without": ("--model EDITOR --guidance 9", "--guidance 9.0 has no effect.*EDITOR takes none"),
    "pictures of 10 gigapixels": ("--model EDITOR --data x.jsonl --resolution 100000", "100000 must be at most 4096"),
    "infinite guidance": ("--model EDITOR --guidance inf", "--guidance inf.*finite number"),
    "unknown split": ("--model EDITOR --split dev", "dev.*train.*val.*test"),
    "a stage": ("generate --model EDITOR", "unrecognized arguments.*generate"),
    "negative probes": ("--model EDITOR --probes -1", "--probes -1.*at least 0"),
    "a name twice": ("--model EDITOR --lora A=RUN --lora A=RUN", "two models are named 'A'"),
    "a lora named base": ("--model EDITOR --lora base=RUN", "two models are named 'base'"),
    "a name that is no file's": ("--model EDITOR --lora a:b=RUN", "'a:b' may hold"),
    "size of the embedded world": ("--model EDITOR --resolution 64", "--resolution does nothing with --data shapes"),
    "offload on a CPU": ("--model EDITOR --offload true", "--offload does nothing without a GPU"),
    "a table": ("--model EDITOR --data TMP/none.csv", "TMP/none.csv.*no such file"),
    "empty data": ("--model EDITOR --data EMPTY --judge exact", "tasks.jsonl holds no tasks"),
    "lora of another family": ("--model EDITOR --lora OTHER", "does not fit this editor"),
    "a file as out": ("--model EDITOR --out EMPTY", "EMPTY is no folder"),
    "out in a file": ("--model EDITOR --out EMPTY/a/b", "--out EMPTY/a/b: EMPTY is no folder"),
    "unknown flag": ("--model EDITOR --task 3 --lorra=x", "unrecognized arguments.*--lorra=x"),
    "missing data": ("--model EDITOR --data TMP/none.jsonl", "TMP/none.jsonl.*no such file"),
    "no judge": ("--model EDITOR --judge TMP", "TMP"),
    "a rubric for the exact judge": ("--model EDITOR --rubric TMP", "--judge exact takes no --rubric"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_bad_input_is_refused_in_one_line_and_nothing_is_written(case, run, tmp_path, monkeypatch):
    """Catches: a traceback, a default taken in silence, an editor or a judge loaded before a typing error is told."""
    words, expected = IMPOSSIBLE[case]
    if case == "offload on a CPU" and torch.cuda.is_available():
        pytest.skip("has an effect on a GPU")
    loading = ("lora of another family", "no judge", "a rubric for the exact judge", "guidance of an editor without")
    if case not in loading:
        monkeypatch.setattr(model, "load", None)
        monkeypatch.setattr(reward, "load", None)
    (tmp_path / "empty").mkdir()
    (tmp_path / "tasks.jsonl").write_text("\n\n")
    for name, text in (("list", "[1]"), ("words", "no JSON")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    save_file({f"transformer.blocks.0.attn.lora_{x}.weight": torch.zeros(4, 4) for x in "AB"},
              tmp_path / "other.safetensors")
    places = {"TMP": "empty", "LIST": "list", "WORDS": "words", "EMPTY": "tasks.jsonl", "OTHER": "other.safetensors"}
    places = {name: str(tmp_path / place) for name, place in places.items()}
    places |= {"EDITOR": editor_folder(), "RUN": str(run)}
    fill = lambda text, as_is=str: re.sub("|".join(places), lambda name: as_is(places[name[0]]), text)
    out = [] if "--out" in words else ["--out", tmp_path / "out"]
    line = refused("eval.py", *map(fill, words.split()), *out)
    assert re.search(fill(expected, re.escape), line), line
    assert not (tmp_path / "out").exists()


def test_a_run_whose_lora_was_never_written_is_refused_before_anything_is_sampled(run, tmp_path, monkeypatch):
    """Catches: base evaluated alone and printed as if it were the result, or evaluated in vain."""
    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    monkeypatch.setattr(model, "load", None)
    monkeypatch.setattr(reward, "load", None)
    assert "no LoRA at" in refused("eval.py", "--run", tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["config.json"]
