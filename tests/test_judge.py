"""shapes/judge, the tiny vision-language model, and how it is trained: what it reads, how well it judges, what it says."""
import json
import random

import numpy as np
import pytest
import torch
from PIL import Image

import reward
from fixtures import ROOT, make_tasks, run_script
from shapes import pretrain, world

FOLDER = ROOT / "shapes" / "judge"
MODES = pytest.mark.parametrize("reasoning", list(reward.ANSWERS))


def pictures(tasks, draw):
    """(n, K+1, 3, 48, 48) uint8 of what draw(task) gives."""
    return torch.from_numpy(np.stack([draw(task) for task in tasks])).permute(0, 1, 4, 2, 3).contiguous()


def clean(task):
    return world.render(task.meta["scenes"])


def botched(task):
    return pretrain.botch(random.Random(str(task.instructions)), task.meta["scenes"])


# --------------------------------------------------------------------------------------------------------- the shipped one

def test_it_is_small_and_reads_every_instruction():
    """Weights that bloat the repository; words of the world or of our prompts that it has no token for."""
    assert sum(f.stat().st_size for f in FOLDER.iterdir()) < 12e6
    judge = reward.load(str(FOLDER))
    unknown, phrases = judge.tokenizer.unk_token_id, 0
    texts = [text for split in ("train", "test") for told, _, _ in world.dialogues(split, 300, 3) for text in told]
    assert not any(unknown in judge.tokenizer(text).input_ids for text in texts)
    for scoring in reward.RUBRICS:
        for reasoning in reward.ANSWERS:
            judge = reward.load(str(FOLDER), scoring=scoring, reasoning=reasoning)
            for name in judge.names:
                _, text = judge.prompt(name, torch.zeros(3, 3, 48, 48), ["Add a red metal star at the top"])
                ids = judge.tokenizer(text).input_ids
                assert unknown not in ids and len(ids) < 14, "our own prompts are tokens of their own"


@MODES
def test_it_knows_a_good_edit_from_a_bad_one(reasoning):
    """Weights of another version than the prompts; pictures or instructions that do not reach the model."""
    tasks = make_tasks(24, K=3, start=5000)
    done = pictures(tasks, clean)
    judge, k = reward.load(str(FOLDER), reasoning=reasoning), 1
    images = done[:, :k + 2].repeat(2, 1, 1, 1, 1)
    images[24:, k + 1] = images[24:, k]                              # the second half: nothing done
    r = judge(tasks * 2, images, k)
    assert r.shape == (48, 2) and not r.isnan().any() and r.min() >= 0 and r.max() <= 1
    assert r[:24, 0].mean() > .85 and r[24:, 0].mean() < .15
    assert pretrain.auc(r[:, 0].numpy(), np.arange(48) < 24) > .95
    spoilt = done[:, :k + 2].clone()
    spoilt[:, k + 1] = done[:, k + 1].roll(1, 0)                     # the picture of another dialogue
    assert judge(tasks, spoilt, k)[:, 1].mean() < r[:24, 1].mean() - .3
    if reasoning == "logits":
        _, text = judge.score([judge.prompt("following", done[0, :2], tasks[0].instructions[:1])])[0]
        assert float(text.split("(")[1].split("%")[0]) > 99, "the digits hold all the probability"


def test_it_scores_whole_trajectories():
    """--scoring trajectory with prompts that it was never shown."""
    tasks = [t for t in make_tasks(24, K=3, start=6000) if t.meta["scenes"][0] != t.meta["scenes"][3]]
    done = pictures(tasks, clean)
    undone = done.clone()
    undone[:, 3] = undone[:, 0]
    judge = reward.load(str(FOLDER), scoring="trajectory")
    assert (judge(tasks, done, 2)[:, 0] > judge(tasks, undone, 2)[:, 0]).float().mean() > .9


def test_it_says_what_it_sees_from_the_command_line(tmp_path):
    """Reasoning that is not printed, or has nothing to do with the pictures."""
    (instruction,), kind, scenes = world.sample_dialogue(random.Random(7), 1)
    for name, picture in zip(("before.png", "after.png"), world.render(scenes)):
        Image.fromarray(picture).save(tmp_path / name)
    code, out, err = run_script("reward.py", "--judge", FOLDER, "--reasoning", "think", tmp_path / "before.png", tmp_path / "after.png", instruction)
    following, seen, consistency, same = out.splitlines()
    assert code == 0 and float(following.split()[1]) > .7 and float(consistency.split()[1]) > .7, out + err
    assert "wanted" in seen and "changed nothing" in same and json.loads(seen[seen.index("{"):])["score"] >= 7


# ------------------------------------------------------------------------------------------------------------ its training

@pytest.fixture(scope="module")
def parts():
    tasks = make_tasks(12, K=3)
    images = pictures(tasks, botched)
    return [(tasks, images, *pretrain.look(tasks, images))]


def test_training_asks_what_judging_asks(parts, tmp_path):
    """A judge trained on token ids or pixels that it never gets to see in use."""
    model, processor = pretrain.build_judge()
    model.save_pretrained(tmp_path), processor.save_pretrained(tmp_path)
    questions = pretrain.Questions(processor.tokenizer, parts)
    tasks, images = parts[0][:2]
    for scoring, name, reasoning in pretrain.KINDS:
        ids, mask, labels, pixels, place, mark, _ = questions.draw(random.Random(3), (scoring, name, reasoning), 6)
        judge, seen = reward.load(str(tmp_path), scoring=scoring, reasoning=reasoning), []
        rng, prompts = random.Random(3), []
        while len(prompts) < 6:                                       # the same draws as above
            _, i, column = rng.randrange(1), rng.randrange(12), rng.randrange(3 if scoring == "turn" else 1)
            if not np.isnan(parts[0][2][scoring][i, column, 0]):
                k = column if scoring == "turn" else 2
                prompts.append(judge.prompt(name, images[i, :k + 2], tasks[i].instructions[:k + 1]))
        judge.model.forward = lambda **inputs: seen.append(inputs)
        judge.model.generate = lambda **inputs: seen.append(inputs)
        with pytest.raises((AttributeError, TypeError)):
            judge.forward(prompts, 0)
        given = seen[0]
        first = (labels != -100).int().argmax(1)
        for row in range(6):
            want = ids[row, :first[row]][mask[row, :first[row]] > 0]
            assert torch.equal(given["input_ids"][row][given["attention_mask"][row] > 0], want)
            answer = processor.tokenizer.decode(ids[row, first[row]:], skip_special_tokens=True)
            score, _ = judge.read(answer)
            assert abs(score * 9 - mark[row]) <= .501 and ids[row, place] == processor.tokenizer.convert_tokens_to_ids(str(round(mark[row].item())))
        assert torch.allclose(given["pixel_values"], pixels, atol=1e-6)


def test_its_labels_are_the_exact_judges(parts):
    """Labels of another turn, rewards swapped, edits that undo each other given a score."""
    tasks, images, scores, texts, _ = parts[0]
    exact = torch.stack([reward.ExactJudge()(tasks, images[:, :k + 2], k) for k in range(3)], 1)
    assert np.array_equal(scores["turn"], exact[..., :2].numpy()) and np.ptp(scores["turn"][..., 0]) > .5
    for i, task in enumerate(tasks):
        undone = task.meta["scenes"][0] == task.meta["scenes"][3]
        assert np.isnan(scores["trajectory"][i]).all() == undone == (texts["trajectory"][i][0] is None)


def test_what_it_is_taught_to_say_is_true():
    """A description of another cell or picture: thinking that misleads the score."""
    tasks = make_tasks(30, K=3)
    done = pictures(tasks, clean)
    _, texts, cells = pretrain.look(tasks, done)
    for i, (task, turns) in enumerate(zip(tasks, texts["turn"])):
        for k, (did, kept) in enumerate(turns):
            before, after = task.meta["scenes"][k:k + 2]
            asked = np.array([b != a or before.background != after.background for b, a in zip(before.cells, after.cells)])
            for should, verdict in cells["turn"][i, k]:
                assert np.array_equal(should, world.encode_scenes([after])[1][0]) and np.array_equal(verdict, np.where(asked, 0, 2))
            assert kept == "changed nothing sharp"
            want = [f"{world.PLACES[c]} wanted {x} seen {x} sharp" for c in range(9) if before.cells[c] != after.cells[c]
                    for x in [pretrain.describe(after.cells[c])]]
            if before.background != after.background:
                want.append(f"background wanted {after.background} seen {after.background}")
            assert did == " ".join(want)
    lazy = done[:, [0, 0, 0, 0]]
    _, texts, cells = pretrain.look(tasks, lazy)
    for i, (task, turns) in enumerate(zip(tasks, texts["turn"])):
        before, after = task.meta["scenes"][:2]
        asked = np.array([b != a or before.background != after.background for b, a in zip(before.cells, after.cells)])
        assert np.array_equal(cells["turn"][i, 0, :, 1], [np.where(asked, 1, 2)] * 2)
        c = next((c for c in range(9) if task.meta["scenes"][0].cells[c] != task.meta["scenes"][1].cells[c]), None)
        if c is not None:
            assert f"{world.PLACES[c]} wanted {pretrain.describe(task.meta['scenes'][1].cells[c])} seen " \
                   f"{pretrain.describe(task.meta['scenes'][0].cells[c])} " in turns[0][0]


def test_botched_edits_are_of_every_kind_and_reproducible():
    """Training pictures that are all right, or all wrong, or other ones on the next run."""
    tasks = make_tasks(60, K=3)
    images = pictures(tasks, botched)
    assert torch.equal(images, pictures(tasks, botched)) and torch.equal(images[:, 0], pictures(tasks, clean)[:, 0])
    r = torch.stack([reward.ExactJudge()(tasks, images[:, :k + 2], k) for k in range(3)], 1)
    assert .3 < r[..., 2].mean() < .8, "some succeed, some fail"
    assert (r[..., 0] > .9).float().mean() > .2 and (r[..., 0] < .1).float().mean() > .1 and ((r[..., 0] - .5).abs() < .3).float().mean() > .03
    assert r[..., 1].min() < .7 and r[..., 1].max() > .99 and r[:, 2, 1].mean() < r[:, 0, 1].mean(), "damage stays and adds up"


def test_its_training_resumes_bit_for_bit(parts, tmp_path, monkeypatch):
    """A run that is killed, continued, and learns from another point than where it was."""
    monkeypatch.setattr(pretrain, "edits", lambda *_: parts[0][:2])
    for name, steps in (("a", (2,)), ("b", (1, 2))):
        (tmp_path / name).mkdir()
        for n in steps:
            model, _ = pretrain.train_judge(tmp_path / name, n, batch=4, dialogues=500)
            (tmp_path / name / f"{n}.pt").write_bytes((tmp_path / name / "judge.pt").read_bytes())
    a, b = (torch.load(tmp_path / name / "2.pt", weights_only=True) for name in "ab")
    assert a["step"] == b["step"] == 2 and all(torch.equal(v, b["model"][n]) for n, v in a["model"].items())
    before = torch.load(tmp_path / "b" / "1.pt", weights_only=True)["model"]
    assert all(not torch.equal(v, before[n]) for n, v in a["model"].items() if "layers.0" in n and v.ndim == 2)


def test_auc_against_pairs_counted_by_hand():
    """Ties counted as wins; good and bad exchanged."""
    score, good = np.array([.1, .5, .5, .9, .3]), np.array([False, False, True, True, True])
    pairs = [(s > t) + .5 * (s == t) for s, g in zip(score, good) if g for t, h in zip(score, good) if not h]
    assert pretrain.auc(score, good) == pytest.approx(sum(pairs) / 6) == pytest.approx(4.5 / 6)
