"""eval.py: metrics by longhand, intervals that mean what they say, editors and judges of known scores, stages."""
import itertools
import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import eval as evaluation
import model
import reward
import train
from fixtures import ROOT, Judge, editor_folder, make_tasks, move, new_editor, refused, run_script
from rollout import Task

NAN = float("nan")


# -------------------------------------------------------------------------------------------------------------- metrics

def arm(s, consistency, seeds=1, **more):
    """Success and consistency (n_seeds * n, K), lists or tensors, as an arm of `summarise`."""
    fold = lambda v: torch.as_tensor(v, dtype=torch.float64).view(seeds, -1, len(v[0]))
    return {"s": fold(s), "cc": fold(consistency)[..., None]} | {name: fold(v) for name, v in more.items()}


def measure(s, consistency, kinds=None, **more):
    return evaluation.summarise({"base": arm(s, consistency, **more)}, kinds, samples=10)["arms"]["base"]


def compare(base, tuned, seeds=1, samples=1000):
    return evaluation.summarise({"base": arm(*base, seeds), "tuned": arm(*tuned, seeds)},
                                samples=samples)["differences"]["tuned"]


def test_metrics_by_longhand():
    """Catches: a marginal rate where the cumulative one is meant, CC of successes only, O of one dialogue at a time."""
    s = [[1., 1, 0], [1, 0, 1], [0, 1, 1], [1, 1, 1]]
    values = measure(s, [[.9, .8, .7], [1., .6, .2], [.5, .4, .3], [.8, .6, .4]])
    assert values["M"] == [.75, .75, .75] and values["flatness"] == [1]
    assert values["IF"] == [.75, .5, .25]
    assert values["C"] == pytest.approx([.75, 2 / 3, 1 / 2])
    assert values["CC"] == pytest.approx([.8, .6, .4])
    assert values["O"] == pytest.approx([math.sqrt(.75 * .8), math.sqrt(.5 * .6), math.sqrt(.25 * .4)])
    assert values["n"]["M"] == [4, 4, 4] and values["n"]["CC"] == [[4], [4], [4]]


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


def test_edit_types_are_counted_over_turns_and_per_turn():
    """Catches: types of another turn, a type that is missing in a turn taken for failure."""
    kinds = [["add", "remove", "add"], ["remove", "add", "color"]]
    values = measure([[1., 0, 0], [1, 1, 0]], [[1.] * 3] * 2, kinds)
    assert {k: v for k, v in values.items() if k.startswith("kind")} == {"kind add": [2 / 3], "kind color": [0],
                                                                         "kind remove": [.5]}
    assert values["n"]["kind add"] == [3] and values["n"]["turns add"] == [1, 1, 1]
    assert values["turns add"] == [1, 1, 0] and values["turns color"][2] == 0 and math.isnan(values["turns color"][0])


def test_the_exposure_gap_compares_the_same_dialogues_and_turns():
    """Catches: M of all dialogues against the clean M of the independent instructions alone, or the opposite sign."""
    s, clean = [[1., 0, 1], [1, 0, 0], [0, 1, 0], [1, 1, NAN]], [[1., 1, NAN], [1, 1, 1], [0, NAN, 0], [NAN, NAN, 1]]
    values = measure(s, [[1.] * 3] * 4, clean=clean)
    assert values["EB"] == pytest.approx([0, 1, .5]) and values["n"]["EB"] == [3, 2, 2]
    assert values["M_clean"] == pytest.approx([2 / 3, 1, .5]) and values["M_self"] == pytest.approx([2 / 3, 0, 0])


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
    values = evaluation.summarise({"base": arm(s, cc)})["arms"]["base"]
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
    """Draws the right picture with probability `rates[0]` after a right picture, `rates[1]` after a wrong one.

    Else it copies its input, and after an instruction that it does not know (the drift probe). The start noise decides,
    so that other seeds give other luck. Takes one denoising step.
    """

    def __init__(self, tasks, rates):
        from shapes import world
        self.rates, self.next = rates, {}
        for task in tasks:
            right = torch.from_numpy(world.render(task.meta["scenes"])).permute(0, 3, 1, 2)
            for k, text in enumerate(task.instructions):
                # after failures the input is an earlier right picture
                for j in range(k + 1):
                    self.next[text, right[j].numpy().tobytes()] = right[k + 1], j == k

    def condition(self, instructions, pictures):
        self.told = list(instructions)
        return {"row": torch.arange(len(instructions))}, torch.arange(len(instructions))

    def velocity(self, x, t, cond, context, size):
        target = context.clone()
        luck = torch.special.ndtr(x[:, 0, 0])
        for s, picture in enumerate(self.decode(context, size)):
            right, fresh = self.next.get((self.told[cond["row"][s]], picture.numpy().tobytes()), (None, None))
            if right is not None and luck[s] < self.rates[0 if fresh else 1]:
                target[s] = self.encode(right[None])[0]
        return (x - target) / t[:, None, None]


@pytest.fixture
def faulty(monkeypatch, tmp_path):
    """evaluate(rates of base, of tuned, words) -> results: eval.py with an editor of those rates; and the folder."""
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / model.LORA_FILE).write_bytes(b"weights")
    loads = []

    def evaluate(base, tuned, words, out=tmp_path / "out"):
        def load(*_, **__):
            loads.append(1)
            return FaultyEditor(evaluation.data.load_shapes("test", 3, 400), base)
        monkeypatch.setattr(model, "load", load)
        monkeypatch.setattr(model, "load_weights", lambda editor, path: setattr(editor, "rates", tuned))
        lora = ["--lora", str(tmp_path / "lora")] if tuned else []
        evaluation.main([*words.split(), "--model", "x", *lora, "--denoise", "1", "--out", str(out)])
        file = out / "results.json"
        return json.loads(file.read_text()) if file.exists() else None
    evaluate.out, evaluate.loads = tmp_path / "out", loads
    return evaluate


def test_an_editor_of_known_error_rates_gives_those_rates_back(faulty):
    """Catches: turns, dialogues, seeds or arms mixed up anywhere from the pictures to the table; EB of another sign.

    Base: right with .8 after a right picture, .4 after a wrong one; tuned: .9 after both, so it has no exposure bias.
    """
    result = faulty((.8, .4), (.9, .9), "--tasks 110 --probes 110 --seeds 2")
    for arm, fresh, stale in (("base", .8, .4), ("tuned", .9, .9)):
        M = [fresh]
        for _ in range(2):
            M.append(M[-1] * fresh + (1 - M[-1]) * stale)
        truth = {"M": M, "IF": [fresh ** k for k in (1, 2, 3)], "C": [fresh] * 3, "EB": [0, fresh - M[1], fresh - M[2]]}
        for m, values in truth.items():
            for k, value in enumerate(values):
                low, high = result["arms"][arm]["interval_95"][m][k]
                margin = .4 * (high - low)                   # of 22 intervals of 95 % one would miss without it
                assert low - margin <= value <= high + margin, (arm, m, k, value, low, high)
        assert min(result["arms"][arm]["CC"]) > .97 and result["arms"][arm]["n"]["M"] == [220] * 3
        assert result["arms"][arm]["copied"] == pytest.approx([1 - x for x in result["arms"][arm]["M"]], abs=.02)
        assert result["arms"][arm]["nothing"] == [0, 0, 0]
    assert result["arms"]["base"]["interval_95"]["EB"][2][0] > 0             # .8 - .627: seen in 110 tasks
    d = result["differences"]["tuned"]
    assert d["interval_95"]["O"][2][0] > 0 and d["p"]["IF"][2] < 1e-4
    kinds = result["arms"]["tuned"]
    assert all(kinds["interval_95"][k][0][0] <= .9 + .05 and kinds["interval_95"][k][0][1] >= .9 - .05 for k in kinds
               if k.startswith("kind "))


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


def test_the_closing_table_of_training_measures_the_same(faulty):
    """Catches: two ways of measuring that drift apart: in memory, as train.py does, and from disk."""
    result = faulty((.7, .3), None, "--tasks 40 --probes 0")["arms"]["base"]
    tasks = evaluation.data.load_shapes("test", 3, 40)
    judge = reward.load("exact")
    r, images = evaluation.evaluate(FaultyEditor(tasks, (.7, .3)), judge, tasks, 3, 1, batch=7, show=False)
    here = evaluation.report({"base": r}, judge.names, 40)["arms"]["base"]
    assert all(here[m] == pytest.approx(result[m], abs=1e-6) for m in ("M", "IF", "C", "CC", "O"))
    assert here["rewards"]["following"] == pytest.approx(result["rewards"]["following"], abs=1e-6)
    assert torch.stack(images).shape == (40, 4, 3, 48, 48)


def test_an_editor_that_draws_the_right_picture_has_full_marks():
    """Catches: a turn judged by the scene of another turn."""
    from shapes import world
    tasks, judge = make_tasks(20, K=3), reward.load("exact")
    turn = iter(range(3))

    class Oracle(CopyEditor):
        def decode(self, x, size):
            k = next(turn)
            return torch.from_numpy(world.render([task.meta["scenes"][k + 1] for task in tasks])).permute(0, 3, 1, 2)
    r, _ = evaluation.evaluate(Oracle(), judge, tasks, 3, 2, show=False)
    result = evaluation.report({"base": r}, judge.names, 20)["arms"]["base"]
    assert result["M"] == result["IF"] == [1, 1, 1] and min(result["CC"]) > .95 and min(result["O"]) > .95


def test_a_judge_of_known_rates_gives_those_rates_back():
    """Catches: turns or dialogues mixed up on the way from the judge to the table; batches that lose the last tasks."""
    n, K, generator = 30, 3, torch.Generator().manual_seed(0)
    truth = torch.rand(n, K, 2, generator=generator)
    truth[4, 1] = NAN
    tasks = [Task(task.image, task.instructions, task.kinds, {"row": i}) for i, task in enumerate(make_tasks(n, K))]

    def judge(part, images, k):
        assert images.shape == (len(part), k + 2, 3, 48, 48)
        return truth[[task.meta["row"] for task in part], k]
    r, images = evaluation.evaluate(CopyEditor(), judge, tasks, K, 2, seeds=(0, 1), batch=7, show=False)
    assert r.shape == (2 * n, K, 2) and torch.stack(images).shape == (n, K + 1, 3, 48, 48)
    assert torch.equal(r.nan_to_num(-1), truth.repeat(2, 1, 1).nan_to_num(-1))
    report = evaluation.report({"base": r}, ["following", "consistency"], n)["arms"]["base"]
    s = (truth[..., 0] >= .5).double()
    s[4, 1] = NAN
    assert report["M"] == pytest.approx([s[:, k].nanmean().item() for k in range(K)])
    assert report["CC"] == pytest.approx([truth[:, k, 1].nanmean().item() for k in range(K)])
    assert report["judge_failed"] == pytest.approx(1 / (n * K))
    assert report["rewards"]["following"] == pytest.approx([truth[:, k, 0].nanmean().item() for k in range(K)])


def test_results_do_not_depend_on_the_batch_size():
    """Catches: noise keyed by the row in the batch, so that base and tuned differ by their batches."""
    editor, judge, tasks = new_editor(), Judge(), make_tasks(5)
    (a, x), (b, y) = (evaluation.evaluate(editor, judge, tasks, 2, 3, batch=batch, show=False) for batch in (5, 2))
    # a value near a rounding boundary may fall on either side
    difference = (torch.stack(x).int() - torch.stack(y).int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < .01 and torch.allclose(a, b, atol=1e-3)


def test_seeds_bring_other_noise():
    """Catches: the same noise for every seed, which makes three seeds one."""
    r, _ = evaluation.evaluate(new_editor(), Judge(), make_tasks(2), 2, 3, seeds=(0, 1), show=False)
    assert (r[:2] != r[2:]).all()


def test_base_and_untrained_lora_give_identical_rows():
    """Catches: other noise for the two arms, so that their difference is no longer paired."""
    editor, judge, tasks = new_editor(4), Judge(), make_tasks(3)
    rows = {}
    for name in ("ref", "ema"):
        with editor.weights(name):
            rows[name], _ = evaluation.evaluate(editor, judge, tasks, 2, 3, show=False)
    assert torch.equal(rows["ref"], rows["ema"])
    assert torch.equal(rows["ref"], evaluation.evaluate(new_editor(), judge, tasks, 2, 3, show=False)[0])
    result = evaluation.report({"base": rows["ref"], "tuned": rows["ema"]}, judge.names, 3)
    assert result["arms"]["base"] == result["arms"]["tuned"]
    assert all(low == high == 0 for m in ("M", "IF", "CC", "O") for low,
               high in result["differences"]["tuned"]["interval_95"][m])


# --------------------------------------------------------------------------------------------------------------- stages

def pictures(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*.png") if "_generation" in str(f)}


def test_a_finished_stage_is_not_repeated_and_an_interrupted_one_goes_on(faulty):
    """Catches: an hour of sampling lost or done twice; half a line of scores read; other noise on resume."""
    rates, words = ((.7, .3), (.9, .9)), "--tasks 6 --probes 3 --seeds 2"
    faulty(*rates, "generate " + words)
    assert not (faulty.out / "scores.jsonl").exists() and not (faulty.out / "results.json").exists()
    whole = pictures(faulty.out)
    names = [f"{i}_input_raw.png" for i in range(6)] + [f"{i}_input_raw_turn_{k}.png" for i in range(6)
                                                        for k in (1, 2, 3)]
    folders = {f"{arm}{seed}_generation" for arm in ("base", "tuned") for seed in ("", "-seed1")}
    assert {n for n in whole if "multipass" in n} == {f"{folder}/multipass/{name}" for folder in folders
                                                      for name in names}
    first = faulty(*rates, words)
    scores = (faulty.out / "scores.jsonl").read_text()
    loads, stamps = len(faulty.loads), {f: f.stat().st_mtime_ns for f in faulty.out.rglob("*.png")
                                        if "_generation" in str(f)}
    assert faulty(*rates, words) == first and len(faulty.loads) == loads
    assert (faulty.out / "scores.jsonl").read_text() == scores

    lost = faulty.out / "tuned-seed1_generation" / "multipass" / "4_input_raw_turn_2.png"
    lost.unlink()
    (faulty.out / "scores.jsonl").write_text("".join(scores.splitlines(keepends=True)[:50]) + '{"arm": "ba')
    assert faulty(*rates, words) == first and len(faulty.loads) == loads + 1
    assert pictures(faulty.out) == whole
    redone = {f.name for f, stamp in stamps.items() if f.stat().st_mtime_ns != stamp}
    assert redone == {"4_input_raw.png", *(f"4_input_raw_turn_{k}.png" for k in (1, 2, 3))}
    key = lambda line: [json.loads(line)[name] for name in ("arm", "seed", "pass", "task", "turn")]
    after = (faulty.out / "scores.jsonl").read_text().splitlines()
    assert sorted(after) == sorted(scores.splitlines()) and len(set(map(str, map(key, after)))) == len(after)

    more = faulty(*rates, "--tasks 8 --probes 3 --seeds 2")                  # an evaluation may grow
    assert more["n"] == 8 and {n: v for n, v in pictures(faulty.out).items() if n in whole and "multipass" in n} == \
        {n: v for n, v in whole.items() if "multipass" in n}


def test_the_passes_see_the_same_tasks_and_noise(faulty):
    """Catches: clean contexts of another dialogue, or edited from other noise than the model's own turn."""
    faulty((.5, .5), None, "generate --tasks 16 --probes 16")
    folder, tasks = faulty.out / "base_generation", evaluation.data.load_shapes("test", 3, 16)
    same = 0
    for i, task in enumerate(tasks):
        for k in (1, 2):
            before = Image.open(folder / "multipass" / f"{i}_input_raw_turn_{k}.png")
            # then both passes edit one picture
            if before.tobytes() == evaluation.data.alone(task, k).image.tobytes():
                own, clean = ((folder / where / f"{i}_input_raw_turn_{k + 1}.png").read_bytes()
                              for where in ("multipass", "clean"))
                assert own == clean
                same += 1
        first, last = (folder / "nothing" / f"{i}_input_raw{turn}.png" for turn in ("", "_turn_3"))
        assert first.read_bytes() == last.read_bytes()
    # other noise would agree by chance in one of 2^8 runs or fewer
    assert 8 <= same < 32


def test_another_judge_scores_the_same_pictures_and_the_first_ones_scores_stay(faulty, monkeypatch):
    """Catches: scores of two judges mixed in one mean; pictures sampled again for the second judge."""
    first = faulty((.7, .3), None, "--tasks 5 --probes 2")
    loads, lines = len(faulty.loads), (faulty.out / "scores.jsonl").read_text()
    nan = lambda r, tasks, k: r.index_put((torch.tensor([0]), torch.tensor([0])), torch.tensor(NAN))
    monkeypatch.setattr(reward, "load", lambda *_, **__: Judge(nan))
    evaluation.main(["score", "--judge", "colours", "--out", str(faulty.out)])
    evaluation.main(["report", "--out", str(faulty.out)])
    result, text = json.loads((faulty.out / "results.json").read_text()), (faulty.out / "scores.jsonl").read_text()
    assert result["judge"] == "colours" and result["arms"] != first["arms"] and len(faulty.loads) == loads
    assert text.startswith(lines) and '"following": null' in text[len(lines):]
    assert result["arms"]["base"]["judge_failed"] == pytest.approx(1 / 5)
    assert result["arms"]["base"]["n"]["M"] == [4, 4, 4]
    evaluation.main(["report", "--judge", "exact", "--out", str(faulty.out)])
    assert json.loads((faulty.out / "results.json").read_text())["arms"] == first["arms"]


def test_several_loras_each_against_the_base(faulty, tmp_path):
    """Catches: a second LoRA loaded on top of the first, or compared with it in place of the base."""
    for name in ("a", "b_c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / model.LORA_FILE).write_bytes(name.encode())
    result = faulty((.8, .8), (.8, .8), f"--tasks 4 --probes 0 --lora {tmp_path / 'a'} --lora Mine={tmp_path / 'b_c'}")
    assert list(result["arms"]) == ["base", "a", "Mine", "lora"]
    assert list(result["differences"]) == ["a", "Mine", "lora"]
    assert len(faulty.loads) == 4 and (faulty.out / "sheets" / "failures-Mine.png").exists()


@pytest.mark.parametrize("change, expected", [
    ("--turns 2", "another evaluation.*turns 3 -> 2"), ("--denoise 5", "another evaluation.*denoise 1 -> 5"),
    ("LORA", "other weights named 'tuned'"),
    ("--data none.jsonl", "another evaluation.*data 'shapes' -> 'none.jsonl'"),
    ("GAP", "base_generation/multipass/2_input_raw_turn_2.png is missing"),
    ("SIZE", "2_input_raw_turn_2.png is 20 x 30, expected 48 x 48"),
    ("SCORE", "scores.jsonl has 0 of the 9 scores of base")])
def test_what_contradicts_the_folder_is_refused(faulty, change, expected):
    """Catches: pictures of two settings in one mean; a dialogue with a hole averaged as if it were shorter."""
    faulty((.7, .3), (.9, .9), "generate --tasks 3 --probes 0")
    hole = faulty.out / "base_generation" / "multipass" / "2_input_raw_turn_2.png"
    words = {"GAP": "score", "SIZE": "score", "SCORE": "report", "LORA": ""}.get(change, change)
    if change == "LORA":
        (faulty.out.parent / "lora" / model.LORA_FILE).write_bytes(b"others")
    elif change == "GAP":
        hole.unlink()
    elif change == "SIZE":
        Image.new("RGB", (20, 30)).save(hole)
    before = pictures(faulty.out)
    with pytest.raises(ValueError, match=expected):
        evaluation.main([*words.split(), *(["--lora", str(faulty.out.parent / "lora")] * (change == "LORA")), "--out",
                         str(faulty.out)])
    assert pictures(faulty.out) == before and not (faulty.out / "results.json").exists()


def test_pictures_made_elsewhere_are_scored_like_ours(faulty, tmp_path):
    """Catches: a layout that only we can read; a source that is another picture; a model scored on too few."""
    ours = faulty((.7, .3), None, "--tasks 4 --probes 0")["arms"]["base"]
    theirs = tmp_path / "Kontext_generation"
    (faulty.out / "base_generation").rename(theirs)
    evaluation.main(["--pictures", str(theirs), "--tasks", "4", "--out", str(tmp_path / "theirs")])
    result = json.loads((tmp_path / "theirs" / "results.json").read_text())
    assert list(result["arms"]) == ["Kontext"] and result["arms"]["Kontext"] == ours
    with pytest.raises(ValueError, match="4_input_raw_turn_1.png is missing: dialogue 4"):
        evaluation.main(["--pictures", str(theirs), "--tasks", "5", "--out", str(tmp_path / "more")])
    os.replace(theirs / "multipass" / "1_input_raw.png", theirs / "multipass" / "2_input_raw.png")
    with pytest.raises(ValueError, match="2_input_raw.png is not the picture of dialogue 2"):
        evaluation.main(["--pictures", str(theirs), "--tasks", "4", "--out", str(tmp_path / "other")])


# ---------------------------------------------------------------------------------------------------------- the program

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A training run of one step, its LoRA made large enough to be seen in the table."""
    out = tmp_path_factory.mktemp("trained") / "run"
    words = ("--tasks 2 --group 2 --turns 2 --denoise 3 --eval-denoise 2 --window 1 --train-first 0 --train-last 1 "
             "--updates 1 --lora-rank 4 --lora-alpha 8 --steps 1 --val-tasks 0 --min-std 0 --judge exact")
    train.main(train.parse(["--model", editor_folder(), "--out", str(out), *words.split()]))
    editor = model.load_weights(new_editor(), out)
    move(editor, .2)
    model.save_weights(editor, out)
    return out


def check_results(folder, stdout, arms, K):
    result = json.loads((folder / "results.json").read_text())
    assert list(result["arms"]) == arms
    for values in result["arms"].values():
        assert all(len(values[m]) == K for m in ("M", "IF", "CC", "O"))
        assert all(0 <= v <= 1 for m in ("M", "IF", "CC", "O") for v in values[m])
    assert len(re.findall(r"^ +\d  (?:M|IF|CC|O) ", stdout, re.M)) == 4 * K
    assert Image.open(folder / "sheets" / "random.png").size[0] == (K + 1) * 154 + 10
    for name in ("tables.md", "tables.tex", "report.html", "figures/success.png", "scores.jsonl", "manifest.json"):
        assert (folder / name).stat().st_size > 300, name
    return result


def test_eval_of_a_run_and_of_a_lora_by_hand_on_two_processes_agree(run, tmp_path):
    """Catches: anything that breaks the commands of the README; --run with another model, LoRA, T or K; tasks that two
    processes both do or neither does, or edit from other noise."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    by_hand = ["--model", editor_folder(), "--lora", run, "--turns", "2", "--denoise", "2", "--out", tmp_path]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    started = [subprocess.Popen([sys.executable, *words[0], "eval.py", "--tasks", "5", "--probes", "2", *words[1]],
                                cwd=ROOT, env=env, **pipes)
               for words in (([], ["--run", run]), (torchrun, by_hand))]
    results = []
    for process, folder in zip(started, (run / "eval", tmp_path)):
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err[-3000:]
        results.append(check_results(folder, out, ["base", "tuned"], 2))
    a, b = results
    assert a["arms"]["base"] != a["arms"]["tuned"] and a["n"] == 5 and a["denoise"] == 2
    assert sorted(pictures(run / "eval")) == sorted(pictures(tmp_path)) and not list(tmp_path.glob("scores-*"))
    key = lambda row: [row[name] for name in ("arm", "seed", "pass", "task", "turn")]
    one, two = (sorted(map(json.loads, (folder / "scores.jsonl").read_text().splitlines()), key=key)
                for folder in (run / "eval", tmp_path))
    assert list(map(key, one)) == list(map(key, two)) and len(one) == 2 * (5 * 2 + 2 + 2 * 2)
    # other batches: a value near a rounding boundary may fall on either side
    for x, y in zip(one, two):
        assert x["drift"] == pytest.approx(y["drift"], abs=.05)
        assert x.get("consistency", 0) == pytest.approx(y.get("consistency", 0), abs=.02)


def test_one_editor_alone_and_several_seeds(tmp_path):
    """Catches: a table that needs two arms, or seeds that are averaged into the wrong tasks. One turn has no gap."""
    words = f"--out {tmp_path} --tasks 3 --turns 1 --denoise 2 --seeds 2 --batch 2 --split val --probes 1"
    code, out, _ = run_script("eval.py", "--model", editor_folder(), *words.split())
    assert code == 0 and "3 dialogues x 2 seeds" in out and "2 denoising steps" in out
    result = check_results(tmp_path, out, ["base"], 1)
    assert result["seeds"] == 2 and result["loras"] == {} == result["differences"]
    assert result["arms"]["base"]["n"]["M"] == [6] and "EB" not in result["arms"]["base"]


def test_eval_on_pictures_of_ones_own(run, tmp_path, monkeypatch):
    """Catches: a path that only the embedded world takes; the run's picture size forgotten; a fifth of a file."""
    monkeypatch.setattr(reward, "load", lambda *_, **__: Judge())
    Image.effect_noise((60, 50), 90).convert("RGB").save(tmp_path / "a.png")
    (tmp_path / "tasks.jsonl").write_text('{"image": "a.png", "instructions": ["Add a ring", "Remove the ring"]}\n'
                                          '{"image": "a.png", "instructions": ["Add a ring", "Make it night"]}\n')
    code, out, _ = run_script("eval.py", "--run", run, "--data", tmp_path / "tasks.jsonl", "--judge", "x",
                              "--resolution", 48, "--out",
                              tmp_path / "out")
    result = check_results(tmp_path / "out", out, ["base", "tuned"], 2)
    assert code == 0 and result["n"] == 2 and result["resolution"] == 48 and result["profile"] == "VLM"
    assert result["arms"]["base"]["n"]["EB"] == [2, 1]       # "Remove the ring" needs what turn 1 made


IMPOSSIBLE = {      # what is typed (RUN and TMP are folders), what the one line must say
    "neither run nor model": ("", "--run.*--model"),
    "run and model": ("--run RUN --model x", "--run.*--model"),
    "run without config": ("--run TMP", "TMP.*config.json"),
    "no editor": ("--model TMP", "TMP.*no editor"),
    "missing lora": ("--model EDITOR --lora TMP/nowhere", "no LoRA at TMP/nowhere"),
    "folder without lora": ("--model EDITOR --lora TMP", "no LoRA at TMP"),
    "no tasks": ("--model EDITOR --tasks 0", "--tasks 0.*at least 1"),
    "no seeds": ("--model EDITOR --seeds 0", "--seeds 0.*at least 1"),
    "no turns": ("--model EDITOR --turns 0", "--turns 0.*at least 1"),
    "negative steps": ("--model EDITOR --denoise -2", "--denoise -2.*at least 1"),
    "unknown split": ("--model EDITOR --split dev", "dev.*train.*val.*test"),
    "unknown stage": ("paint --model EDITOR", "paint.*generate.*score.*report"),
    "negative probes": ("--model EDITOR --probes -1", "--probes -1.*at least 0"),
    "a name twice": ("--model EDITOR --lora A=RUN --lora A=RUN", "two models are named 'A'"),
    "a lora named base": ("--model EDITOR --lora base=RUN", "two models are named 'base'"),
    "a name that EdiVal cuts": ("--model EDITOR --lora my_lora=RUN", "'my_lora'.*EdiVal cuts names"),
    "protocol with steps": ("--model EDITOR --data x.csv --protocol edival --denoise 4",
                            "--protocol edival.*fixes --denoise"),
    "protocol without photographs": ("--model EDITOR --protocol edival", "--protocol edival is for photographs"),
    "pictures of no layout": ("--pictures TMP", "--pictures TMP holds no multipass/"),
    "no EdiVal results": ("report --edival TMP", "TMP holds no image_rate.json"),
    "EdiVal results to score": ("score --edival TMP", "--edival is for the stage report"),
    "no such table": ("--model EDITOR --data TMP/none.csv", "TMP/none.csv.*no such file"),
    "empty data": ("--model EDITOR --data EMPTY --judge exact", "tasks.jsonl holds no tasks"),
    "lora of another family": ("--model EDITOR --lora OTHER", "does not fit this editor"),
    "no features": ("--model EDITOR --features TMP", "--features TMP is no vision transformer"),
    "unknown flag": ("--model EDITOR --task 3 --lorra=x", "unrecognized arguments.*--lorra=x"),
    "missing data": ("--model EDITOR --data TMP/none.jsonl", "TMP/none.jsonl.*no such file"),
    "no judge": ("--model EDITOR --judge TMP", "TMP.*neither"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_bad_input_is_refused_in_one_line_and_nothing_is_written(case, run, tmp_path):
    """Catches: a traceback, a default taken in silence, the base evaluated for an hour before a LoRA is missed."""
    words, expected = IMPOSSIBLE[case]
    (tmp_path / "empty").mkdir()
    (tmp_path / "tasks.jsonl").write_text("\n\n")
    save_file({f"transformer.blocks.0.attn.lora_{x}.weight": torch.zeros(4, 4) for x in "AB"},
              tmp_path / "other.safetensors")
    places = {"TMP": str(tmp_path / "empty"), "EDITOR": editor_folder(), "RUN": str(run),
              "EMPTY": str(tmp_path / "tasks.jsonl"),
              "OTHER": str(tmp_path / "other.safetensors")}
    fill = lambda text, as_is=str: re.sub("TMP|EDITOR|RUN|EMPTY|OTHER", lambda name: as_is(places[name[0]]), text)
    line = refused("eval.py", *map(fill, words.split()), "--out", tmp_path / "out")
    assert re.search(fill(expected, re.escape), line), line
    assert not (tmp_path / "out").exists()


def test_a_run_whose_lora_was_never_written_is_refused_before_anything_is_sampled(run, tmp_path, monkeypatch):
    """Catches: base evaluated alone and printed as if it were the result, or evaluated in vain."""
    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    monkeypatch.setattr(model, "load", None)
    assert "no LoRA at" in refused("eval.py", "--run", tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["config.json"]
