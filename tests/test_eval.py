"""eval.py: the metrics by longhand, an interval that means what it says, editors and judges whose scores are known."""
import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from PIL import Image

import eval as evaluation
import model
import reward
import train
from fixtures import ROOT, Judge, editor_folder, make_tasks, move, new_editor, refused, run_script
from rollout import Task

NAN = float("nan")


# -------------------------------------------------------------------------------------------------------------- metrics

def test_metrics_by_longhand():
    """Catches: a marginal rate where the cumulative one is meant, CC of successes only, O of one dialogue at a time."""
    s = torch.tensor([[1., 1, 0], [1, 0, 1], [0, 1, 1], [1, 1, 1]])
    consistency = torch.tensor([[.9, .8, .7], [1., .6, .2], [.5, .4, .3], [.8, .6, .4]])
    values = {m: v.tolist() for m, v in evaluation.measure(s, consistency).items()}
    assert values["M"] == [.75, .75, .75]
    assert values["IF"] == [.75, .5, .25]
    assert values["CC"] == pytest.approx([.8, .6, .4])
    assert values["O"] == pytest.approx([math.sqrt(.75 * .8), math.sqrt(.5 * .6), math.sqrt(.25 * .4)])


def test_a_turn_that_the_judge_failed_on_is_left_out():
    """Catches: a failed judgement counted as a failed edit, or one NaN that makes a whole column NaN."""
    s = torch.tensor([[1., NAN, 1], [1, 1, 1], [0, 1, 0], [1, 0, 1]])
    consistency = torch.tensor([[.9, NAN, .6], [.7, .5, .3], [.5, .4, .3], [.7, .6, .4]])
    values = {m: v.tolist() for m, v in evaluation.measure(s, consistency).items()}
    assert values["M"] == pytest.approx([3 / 4, 2 / 3, 3 / 4])
    assert values["IF"] == pytest.approx([3 / 4, 1 / 3, 1 / 3])            # dialogue 1 is unknown from turn 2 on
    assert values["CC"] == pytest.approx([.7, .5, .4])


def test_success_is_the_judges_own_or_following_of_one_half():
    """Catches: a NaN that compares as false, and so as a failed edit."""
    r = torch.tensor([[[.9, .1, 0.], [.2, .3, 1.], [NAN, NAN, NAN]]])
    assert evaluation.successes(r, ["following", "consistency", "success"])[0, :2].tolist() == [0, 1]
    s = evaluation.successes(r[..., :2], ["following", "consistency"])[0]
    assert s[:2].tolist() == [1, 0] and s[2].isnan()
    assert evaluation.successes(torch.tensor([[[.5, 1.]]]), ["following", "consistency"]).item() == 1


def scores(n, rates, seed):
    """Independent successes of given rates and consistencies around .8: a pair (n, K), (n, K)."""
    generator = torch.Generator().manual_seed(seed)
    s = (torch.rand(n, len(rates), generator=generator) < torch.tensor(rates)).float()
    return s, .8 + .1 * torch.rand(n, len(rates), generator=generator)


def test_the_interval_of_a_clear_difference_excludes_zero_and_that_of_none_covers_it():
    """Catches: base minus tuned, an interval of one arm, quantiles of the wrong axis."""
    base, tuned = scores(300, [.7, .5, .4], 0), scores(300, [.9, .8, .7], 1)
    interval = evaluation.compare(base, tuned, 300, samples=1000)
    assert {m: torch.tensor(rows).shape for m, rows in interval.items()} == {m: (3, 2) for m in ("M", "IF", "CC", "O")}
    difference = {m: (v - evaluation.measure(*base)[m]).tolist() for m, v in evaluation.measure(*tuned).items()}
    for m in ("M", "IF", "O"):
        assert all(0 < low < d < high for (low, high), d in zip(interval[m], difference[m]))
    width = interval["M"][0][1] - interval["M"][0][0]
    assert width == pytest.approx(2 * 1.96 * math.sqrt((.7 * .3 + .9 * .1) / 300), rel=.15)      # normal approximation
    same = evaluation.compare(base, base, 300, samples=200)
    assert all(low == high == 0 for rows in same.values() for low, high in rows)
    again = evaluation.compare(base, scores(300, [.7, .5, .4], 2), 300, samples=1000)
    assert all(low < 0 < high for low, high in again["M"])


def test_the_interval_is_paired_and_deterministic():
    """Catches: arms resampled apart (intervals several times too wide), or another interval at each call."""
    base = scores(200, [.5, .5], 0)
    tuned = (base[0].clone(), base[1] + .01)
    tuned[0][:10, 1] = 1                                                 # ten dialogues better, the rest the same
    a = evaluation.compare(base, tuned, 200, samples=1000)
    assert a == evaluation.compare(base, tuned, 200, samples=1000)
    low, high = a["M"][1]
    assert high - low < .06                                                  # unpaired: .2
    assert a["CC"][0] == pytest.approx([.01, .01], abs=1e-6)


def test_seeds_of_a_task_are_resampled_together():
    """Catches: three noise seeds of 100 tasks that pass for 300 independent tasks (intervals too narrow by sqrt 3)."""
    base, tuned = scores(100, [.5], 0), scores(100, [.6], 1)
    once = evaluation.compare(base, tuned, 100, samples=500)
    thrice = evaluation.compare(*(tuple(v.repeat(3, 1) for v in pair) for pair in (base, tuned)), 100, samples=500)
    assert torch.allclose(torch.tensor(once["M"]), torch.tensor(thrice["M"]), atol=1e-6)


def test_a_judge_failure_does_not_break_the_interval():
    """Catches: quantiles of NaN."""
    base, tuned = scores(50, [.5, .4], 0), scores(50, [.9, .8], 1)
    base[0][3, 1] = tuned[1][7, 0] = NAN
    interval = evaluation.compare(base, tuned, 50, samples=200)
    assert all(torch.tensor(rows).isfinite().all() for rows in interval.values())


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


def test_a_copying_editor_follows_nothing_and_keeps_everything():
    """Catches: success for pictures that were not edited; consistency against something else than the original."""
    tasks, judge = make_tasks(40, K=3), reward.load("exact")
    r, images = evaluation.evaluate(CopyEditor(), judge, tasks, 3, 4, show=False)
    images = torch.stack(images)
    assert (images == images[:, :1]).all()
    result = evaluation.report({"base": r}, judge.names, 40)["base"]
    assert result["IF"] == [0, 0, 0] and result["O"] == [0, 0, 0]
    assert result["M"][0] == 0 and max(result["M"]) < .1          # a later edit may happen to undo an earlier one
    assert .9 < result["CC"][0] and result["CC"][0] > result["CC"][1] > result["CC"][2] > .7    # it lacks the edits


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
    result = evaluation.report({"base": r}, judge.names, 20)["base"]
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
    report = evaluation.report({"base": r}, ["following", "consistency"], n)["base"]
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
    assert result["base"] == result["tuned"]
    assert all(low == high == 0 for rows in result["difference_95"].values() for low, high in rows)


def test_the_table_marks_what_is_not_significant():
    """Catches: difference and interval with opposite signs, or a mark on the wrong rows."""
    arm = lambda v: {m: [v] for m in evaluation.METRICS}
    intervals = {m: [[-.1, .4]] if m == "CC" else [[.1, .3]] for m in evaluation.METRICS}
    result = {"base": arm(.3), "tuned": arm(.5), "difference_95": intervals}
    lines = evaluation.table(result).splitlines()
    assert len(lines) == 5 and re.search(r"1 +M +0.300 +0.500 +\+0.200 \[\+0.100, \+0.300\]$", lines[1])
    assert [("n.s." in line) for line in lines[1:]] == [m == "CC" for m in evaluation.METRICS]


# ---------------------------------------------------------------------------------------------------------- the program

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A training run of one step, its LoRA made large enough to be seen in the table."""
    out = tmp_path_factory.mktemp("trained") / "run"
    words = ("--tasks 2 --group 2 --turns 2 --denoise 3 --eval-denoise 2 --window 1 --train-first 0 --train-last 1 "
             "--updates 1 --lora-rank 4 --lora-alpha 8 --steps 1 --val-tasks 0 --min-std 0")
    train.main(train.parse(["--model", editor_folder(), "--out", str(out), *words.split()]))
    editor = model.load_weights(new_editor(), out)
    move(editor, .2)
    model.save_weights(editor, out)
    return out


def check_results(folder, stdout, arms, K):
    result = json.loads((folder / "results.json").read_text())
    assert [arm for arm in ("base", "tuned") if arm in result] == arms
    for arm in arms:
        assert all(len(result[arm][m]) == K for m in evaluation.METRICS)
        assert all(0 <= v <= 1 for m in evaluation.METRICS for v in result[arm][m])
    assert len(re.findall(r"^ +\d  (?:M|IF|CC|O) ", stdout, re.M)) == 4 * K
    assert Image.open(folder / "contact_sheet.png").size[0] == (K + 1) * 154 + 10
    return result


def test_eval_of_a_run_and_of_a_lora_by_hand_agree(run, tmp_path):
    """Catches: anything that breaks the two commands of the README; --run with another model, LoRA, T or K."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    by_hand = ["--model", editor_folder(), "--lora", run, "--turns", "2", "--denoise", "2", "--out", tmp_path]
    started = [subprocess.Popen([sys.executable, "eval.py", "--tasks", "6", *words], cwd=ROOT, env=env, **pipes)
               for words in (["--run", run], by_hand)]
    results = []
    for process, folder in zip(started, (run / "eval", tmp_path)):
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err[-3000:]
        results.append(check_results(folder, out, ["base", "tuned"], 2))
    a, b = results
    assert a["base"] != a["tuned"] and a["tasks"] == 6 and a["denoise"] == 2
    assert all(a[name] == b[name] for name in a if name not in ("lora", "out"))


def test_one_editor_alone_and_several_seeds(tmp_path):
    """Catches: a table that needs two arms, or seeds that are averaged into the wrong tasks."""
    words = f"--out {tmp_path} --tasks 3 --turns 1 --denoise 2 --seeds 2 --batch 2 --split val"
    code, out, _ = run_script("eval.py", "--model", editor_folder(), *words.split())
    assert code == 0 and "3 val tasks x 2 seeds, T = 2" in out
    result = check_results(tmp_path, out, ["base"], 1)
    assert result["seeds"] == 2 and result["lora"] is None and "difference_95" not in result


def test_eval_on_pictures_of_ones_own(run, tmp_path, monkeypatch):
    """Catches: a path that only the embedded world takes; the run's judge or picture size forgotten."""
    monkeypatch.setattr(reward, "load", lambda *_: Judge())
    Image.effect_noise((60, 50), 90).convert("RGB").save(tmp_path / "a.png")
    (tmp_path / "tasks.jsonl").write_text('{"image": "a.png", "instructions": ["Add a ring", "Remove it"]}\n' * 5)
    code, out, _ = run_script("eval.py", "--run", run, "--data", tmp_path / "tasks.jsonl", "--out", tmp_path / "out")
    assert code == 0 and check_results(tmp_path / "out", out, ["base", "tuned"], 2)["tasks"] == 1      # a fifth of 5


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
    "unknown flag": ("--model EDITOR --task 3 --lorra x", "unrecognized arguments.*--lorra x"),
    "missing data": ("--model EDITOR --data TMP/none.jsonl", "TMP/none.jsonl.*no such file"),
    "no judge": ("--model EDITOR --judge TMP", "TMP.*neither"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_bad_input_is_refused_in_one_line_and_nothing_is_written(case, run, tmp_path):
    """Catches: a traceback, a default taken in silence, the base evaluated for an hour before a LoRA is missed."""
    words, expected = IMPOSSIBLE[case]
    (tmp_path / "empty").mkdir()
    places = {"TMP": str(tmp_path / "empty"), "EDITOR": editor_folder(), "RUN": str(run)}
    fill = lambda text, as_is=str: re.sub("TMP|EDITOR|RUN", lambda name: as_is(places[name[0]]), text)
    line = refused("eval.py", *map(fill, words.split()), "--out", tmp_path / "out")
    assert re.search(fill(expected, re.escape), line), line
    assert not (tmp_path / "out").exists()


def test_a_run_whose_lora_was_never_written_is_refused_before_anything_is_sampled(run, tmp_path, monkeypatch):
    """Catches: base evaluated alone and printed as if it were the result, or evaluated in vain."""
    (tmp_path / "config.json").write_text((run / "config.json").read_text())
    monkeypatch.setattr(evaluation, "evaluate", None)
    assert "no LoRA at" in refused("eval.py", "--run", tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["config.json"]
