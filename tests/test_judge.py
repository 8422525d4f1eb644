"""shapes/judge, the tiny vision-language model, and how it is made: what it reads, how well it judges, what it says."""
import json
import random

import numpy as np
import pytest
import torch
from PIL import Image

import data
import reward
from fixtures import ROOT, make_tasks, run_script
from shapes import make_judge, world

FOLDER = ROOT / "shapes" / "judge"
MODES = pytest.mark.parametrize("reasoning", list(reward.ANSWERS))


def pictures(tasks, draw):
    """(n, K+1, 3, 48, 48) uint8 of what draw(task) gives."""
    drawn = np.stack([draw(task) for task in tasks])
    return torch.from_numpy(drawn).permute(0, 1, 4, 2, 3).contiguous()


def clean(task):
    return world.render(task.meta["scenes"])


def botched(task):
    return make_judge.botch(random.Random(str(task.instructions)), task.meta["scenes"])


def exact_scores(tasks, images):
    """The exact judge's scores of all three turns: (n, 3, 3)."""
    judge = reward.load("exact")
    return torch.stack([judge(tasks, images[:, :k + 2], k) for k in range(3)], 1)


# ------------------------------------------------------------------------------------------------------ the shipped one

def test_it_is_small_and_reads_every_instruction():
    """Weights that bloat the repository; words of the world or of our prompts that it has no token for."""
    assert sum(f.stat().st_size for f in FOLDER.iterdir()) < 12e6
    judge = reward.load(str(FOLDER))
    unknown = judge.tokenizer.unk_token_id
    for split in ("train", "test"):
        for instructions, _, _ in world.dialogues(split, 300, 3):
            assert not any(unknown in judge.tokenizer(text).input_ids for text in instructions)
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
    assert make_judge.auc(r[:, 0].numpy(), np.arange(48) < 24) > .95
    spoilt = done[:, :k + 2].clone()
    spoilt[:, k + 1] = done[:, k + 1].roll(1, 0)                     # the picture of another dialogue
    assert judge(tasks, spoilt, k)[:, 1].mean() < r[:24, 1].mean() - .3
    if reasoning == "logits":
        ((_, text),) = judge.score([judge.prompt("following", done[0, :2], tasks[0].instructions[:1])])
        assert float(text.split("(")[1].split("%")[0]) > 99, "the digits hold all the probability"


def test_it_scores_whole_trajectories():
    """Questions about a trajectory as a whole in words that it was never shown."""
    tasks = [t for t in make_tasks(24, K=3, start=6000) if t.meta["scenes"][0] != t.meta["scenes"][3]]
    done = pictures(tasks, clean)
    undone = done.clone()
    undone[:, 3] = undone[:, 0]
    judge = reward.load(str(FOLDER), scoring="trajectory")
    assert (judge(tasks, done, 2)[:, 0] > judge(tasks, undone, 2)[:, 0]).float().mean() > .9


def test_it_says_what_it_sees_from_the_command_line(tmp_path):
    """Reasoning that is not printed, or has nothing to do with the pictures."""
    (instruction,), _, scenes = world.sample_dialogue(random.Random(7), 1)
    paths = [tmp_path / "before.png", tmp_path / "after.png"]
    for path, picture in zip(paths, world.render(scenes)):
        Image.fromarray(picture).save(path)
    code, out, err = run_script("reward.py", "--judge", FOLDER, "--reasoning", "think", *paths, instruction)
    following, seen, consistency, same = out.splitlines()
    assert code == 0 and float(following.split()[1]) > .7 and float(consistency.split()[1]) > .7, out + err
    assert "wanted" in seen and "changed nothing" in same and json.loads(seen[seen.index("{"):])["score"] >= 7


# --------------------------------------------------------------------------------------------------- how it is made

@pytest.fixture(scope="module")
def part():
    """Twelve botched dialogues with their labels."""
    tasks = make_tasks(12, K=3)
    return make_judge.look(tasks, pictures(tasks, botched))


@pytest.mark.parametrize("kind", make_judge.KINDS, ids="-".join)
def test_training_asks_what_judging_asks(kind, part, tmp_path):
    """A judge trained on token ids or pixels that it never gets to see in use, or on answers that reward.py refuses."""
    scoring, name, reasoning = kind
    model, processor = make_judge.build_judge()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    asked = make_judge.draw_questions(random.Random(3), kind, 6, [part], processor.tokenizer)
    judge = reward.load(str(tmp_path), scoring=scoring, reasoning=reasoning, bf16=False)

    rng, prompts = random.Random(3), []
    while len(prompts) < 6:                                       # the same draws as above
        _, i, column = rng.randrange(1), rng.randrange(12), rng.randrange(3 if scoring == "turn" else 1)
        if not np.isnan(part.scores[scoring][i, column, 0]):
            k = column if scoring == "turn" else 2
            prompts.append(judge.prompt(name, part.images[i, :k + 2], part.tasks[i].instructions[:k + 1]))
    given = judge.prepare(prompts)
    start = (asked.labels != -100).int().argmax(1)
    for row in range(6):
        prompt = asked.ids[row, :start[row]]
        shown = given["input_ids"][row]
        assert torch.equal(shown[given["attention_mask"][row] > 0], prompt[asked.mask[row, :start[row]] > 0])
        score, _ = judge.read(processor.tokenizer.decode(asked.ids[row, start[row]:], skip_special_tokens=True))
        assert abs(score * 9 - asked.marks[row]) <= .501
        digit = processor.tokenizer.convert_tokens_to_ids(str(round(asked.marks[row].item())))
        assert asked.ids[row, asked.place] == digit
    assert torch.allclose(given["pixel_values"], asked.pixels, atol=1e-6)


def test_its_labels_are_the_exact_judges(part):
    """Labels of another turn, rewards swapped, edits that undo each other given a score."""
    exact = exact_scores(part.tasks, part.images)
    assert np.array_equal(part.scores["turn"], exact[..., :2].numpy())
    assert np.ptp(part.scores["turn"][..., 0]) > .5
    for i, task in enumerate(part.tasks):
        undone = task.meta["scenes"][0] == task.meta["scenes"][3]
        unknown = np.isnan(part.scores["trajectory"][i]).all()
        assert unknown == undone == (part.texts["trajectory"][i][0] is None)


def told(before, after):
    """What it should say of a perfect edit."""
    words = []
    for place, old, new in zip(world.PLACES, before.cells, after.cells):
        if old != new:
            words.append(f"{place} wanted {make_judge.describe(new)} seen {make_judge.describe(new)} sharp")
    if before.background != after.background:
        words.append(f"background wanted {after.background} seen {after.background}")
    return " ".join(words)


def cells_asked(before, after):
    return np.array([b != a or before.background != after.background for b, a in zip(before.cells, after.cells)])


def test_what_it_is_taught_to_say_is_true():
    """A description of another cell or picture: thinking that misleads the score."""
    tasks = make_tasks(30, K=3)
    done = pictures(tasks, clean)
    right = make_judge.look(tasks, done)
    for i, task in enumerate(tasks):
        for k, (did, kept) in enumerate(right.texts["turn"][i]):
            before, after = task.meta["scenes"][k:k + 2]
            assert kept == "changed nothing sharp" and did == told(before, after)
            for should, verdict in right.cells["turn"][i, k]:
                assert np.array_equal(should, world.encode_scenes([after])[1][0])
                assert np.array_equal(verdict, np.where(cells_asked(before, after), 0, 2))

    copies = done[:, [0, 0, 0, 0]]
    lazy = make_judge.look(tasks, copies)
    for i, task in enumerate(tasks):
        # what is openly added, and is nowhere, belongs somewhere
        (before, after, *_), _ = data.resolve(task, copies[i])
        verdicts = lazy.cells["turn"][i, 0, :, 1]
        assert np.array_equal(verdicts, [np.where(cells_asked(before, after), 1, 2)] * 2)
        changed = [c for c in range(9) if before.cells[c] != after.cells[c]]
        for c in changed[:1]:
            old, new = make_judge.describe(before.cells[c]), make_judge.describe(after.cells[c])
            assert f"{world.PLACES[c]} wanted {new} seen {old} " in lazy.texts["turn"][i][0][0]


def test_what_nobody_could_read_is_not_called_changed():
    """Words and verdicts that contradict the score, in which the exact judge leaves such cells and grounds out."""
    star, ring = world.Object("star", "red", "metal"), world.Object("ring", "blue", "metal")
    scenes = [world.Scene("white", (None,) * 9), world.Scene("gray", (star, *(None,) * 8)),
              world.Scene("gray", (star, ring, *(None,) * 7))]
    shown = world.read(world.render(scenes))
    before, after = (world.Reading(*(values[k:k + 1].copy() for values in shown)) for k in (1, 2))
    assert make_judge.tell_consistency(scenes, after, before, 0) == "changed nothing sharp"
    before.contents[0, 0] = -1
    before.background[0] = -1
    assert make_judge.tell_consistency(scenes, after, before, 0) == "changed nothing sharp"
    should, verdict = make_judge.label_cells([scenes], after, before)[0].transpose(1, 0, 2)
    assert (should[:, 0] == -1).all() and (verdict == [2, 0, *[2] * 7]).all()

    # known before and unreadable now, or another ground: that is a change
    before, after = (world.Reading(*(values[k:k + 1].copy() for values in shown)) for k in (1, 2))
    after.contents[0, 0] = after.background[0] = -1
    assert make_judge.tell_consistency(scenes, after, before, 0) == f"changed {world.PLACES[0]} background sharp"
    assert (make_judge.label_cells([scenes], after, before)[0, :, 1] == [3, 1, *[3] * 7]).all()


def test_botched_edits_are_of_every_kind_and_reproducible():
    """Training pictures that are all right, or all wrong, or other ones on the next run."""
    tasks = make_tasks(60, K=3)
    images = pictures(tasks, botched)
    assert torch.equal(images, pictures(tasks, botched))
    assert torch.equal(images[:, 0], pictures(tasks, clean)[:, 0])
    following, consistency, success, _ = exact_scores(tasks, images).unbind(-1)
    assert .3 < success.mean() < .8, "some succeed, some fail"
    assert (following > .9).float().mean() > .2 and (following < .1).float().mean() > .1
    assert ((following - .5).abs() < .3).float().mean() > .03
    assert consistency.min() < .7 and consistency.max() > .99
    assert consistency[:, 2].mean() < consistency[:, 0].mean(), "damage stays and adds up"


def test_pictures_of_the_editor_are_made_once_and_without_noise_for_the_report(tmp_path, monkeypatch):
    """The report on the noisy pictures of training; twenty minutes of sampling done again at every start."""
    windows, made = [], make_judge.rollout
    monkeypatch.setattr(make_judge, "rollout",
                        lambda *args, **options: windows.append(options.get("window")) or made(*args, **options))
    tasks, images = make_judge.edits(tmp_path, "editor", "test", 1, 2)
    again = make_judge.edits(tmp_path, "editor", "test", 1, 2)
    assert windows == [None] and images.shape == (2, 4, 3, 48, 48) and torch.equal(images, again[1])
    assert torch.equal(images[:, 0], pictures(tasks, clean)[:, 0])
    for start in range(4):
        make_judge.edits(tmp_path, "editor", "train", start, 1)
    assert {len(window) for window in windows[1:] if window} == {3} and None in windows[1:]


def test_its_training_resumes_bit_for_bit(part, tmp_path, monkeypatch):
    """A run that is killed, continued, and learns from another point than where it was."""
    monkeypatch.setattr(make_judge, "edits", lambda *_: (part.tasks, part.images))
    batches, draw = [], make_judge.draw_questions
    monkeypatch.setattr(make_judge, "draw_questions", lambda *args: batches.append(args[1]) or draw(*args))
    states = {}
    for name, steps in (("a", (2,)), ("b", (1, 2))):
        for n in steps:
            make_judge.train_judge(tmp_path / name, n, batch=4, dialogues=500)
            states[name, n] = torch.load(tmp_path / name / "judge.pt", weights_only=True)
    assert batches == 2 * (make_judge.KINDS + make_judge.KINDS[:4]), "the second run goes on where the first stopped"
    a, b = states["a", 2], states["b", 2]
    assert a["step"] == b["step"] == 2
    before = states["b", 1]["parts"]["judge"]
    for name, value in a["parts"]["judge"].items():
        assert torch.equal(value, b["parts"]["judge"][name])
        assert not ("layers.0" in name and value.ndim == 2 and torch.equal(value, before[name]))


def test_auc_against_pairs_counted_by_hand():
    """Ties counted as wins; good and bad exchanged."""
    score, good = np.array([.1, .5, .5, .9, .3]), np.array([False, False, True, True, True])
    pairs = [(s > t) + .5 * (s == t) for s, g in zip(score, good) if g for t, h in zip(score, good) if not h]
    assert make_judge.auc(score, good) == pytest.approx(sum(pairs) / 6) == pytest.approx(4.5 / 6)


def test_the_report_has_a_line_for_each_way_of_asking(tmp_path, monkeypatch):
    """A report that breaks after 40 minutes of training, or whose votes are all the same draw."""
    tasks = make_tasks(8, K=3)
    monkeypatch.setattr(make_judge, "edits", lambda *_: (tasks, pictures(tasks, botched)))
    lines = make_judge.report(FOLDER, tmp_path, n=8, votes=2).splitlines()
    table = [line.split() for line in lines[1:]]
    asked = [("logits", "1"), ("direct", "1"), ("direct", "2"), ("think", "1"), ("think", "2")]
    assert [tuple(row[:3]) for row in table] == [(*ask, name) for ask in asked for name in make_judge.REWARDS]
    for row in table:
        correlation, area, bias, spread, failed = row[3:8]
        assert float(correlation) > .3 and float(area) > .6 and abs(float(bias)) < .3 and float(failed) < .1
        assert spread == "-" if row[1] == "1" else 0 < float(spread) < .3
