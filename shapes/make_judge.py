"""Make the embedded judge, a tiny vision-language model that learns to score the embedded editor's edits.

    python -m shapes.make_judge                   # writes shapes/judge; continues where it stopped
    python -m shapes.make_judge --report-only     # how well the judge in shapes/judge does, in each of its modes

The result is a LLaVA folder (CLIP vision tower, Llama). The exact judge gives the labels: half of the pictures are the
editor's own outputs, half are drawn by a careless editor made by hand (`botch`). About 40 minutes on one core,
22 on one that is fast in bfloat16.
"""
import argparse
import os
import random
import re
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import model
import reward
from data import Parser, run_main
from model import write_whole
from rollout import Task, rollout
from shapes import world
from shapes.make_editor import SAVE_EVERY, faster, find_device, load_progress, muon_and_adamw, save_progress, scheduled

HERE = Path(__file__).parent
REWARDS = ("following", "consistency")
KINDS = [(scoring, name, reasoning)                     # of questions
         for scoring in ("turn", "trajectory") for name in REWARDS for reasoning in ("direct", "think")]
TRAINED_ON = tuple(o for o in world.CONTENTS[1:] if o not in world.HELD_OUT)
FIRST_DIALOGUE = 2 * 10 ** 6                            # that it learns from: far from those of the editor
THINK = '{"score":'                                     # one token, so that answers in words of the world end in JSON
MARKS = 9                                               # the best score


# ----------------------------------------------------------------------------------------------- pictures to be judged

def other_object(rng, old):
    """A random object, often one that shares an attribute with the old one."""
    if old is None:
        return rng.choice(TRAINED_ON)
    alike = []
    for new in TRAINED_ON:
        shared = sum(a == b for a, b in zip(new, old))
        if shared == rng.randint(0, 2):
            alike.append(new)
    return rng.choice(alike or TRAINED_ON)


def careless_edit(rng, actual, before, want):
    """One edit of a careless editor: right, or not at all, half, to the wrong thing, elsewhere, or with side effects.

    `actual` is the scene of its picture so far; `before` and `want` are the scenes before and after the edit as asked.
    Returns the scene that it draws, and how much of it shows (1 = all, less = the picture so far shines through).
    """
    chances = {"right": 50, "nothing": 12, "half": 10, "wrong": 12, "elsewhere": 8, "side effects": 14}
    (outcome,) = rng.choices(list(chances), list(chances.values()))
    cells, ground, share = list(actual.cells), actual.background, 1.
    places = [i for i in range(9) if before.cells[i] != want.cells[i]]
    if outcome == "nothing":
        return actual, share
    for i in places:
        cells[i] = want.cells[i]
    if before.background != want.background:
        ground = want.background

    if outcome == "half":
        share = rng.uniform(.2, .8)
        if len(places) > 1 and rng.random() < .5:           # moved, but still there; or gone, but nowhere else
            share, i = 1., rng.choice(places)
            cells[i] = actual.cells[i]
    elif outcome == "wrong":
        for i in rng.sample(places, min(len(places), 1)):
            one, another = other_object(rng, want.cells[i]), other_object(rng, want.cells[i])
            cells[i] = rng.choice([one, None, another])
        if not places:
            ground = rng.choice(list(world.BACKGROUNDS))
    elif outcome in ("elsewhere", "side effects"):
        untouched = [i for i in range(9) if i not in places]
        count = rng.choice([1, 1, 1, 2, 2, 3, 5, 7])
        for i in rng.sample(untouched, count):
            alike, any_object = other_object(rng, cells[i]), other_object(rng, None)
            cells[i] = rng.choice([None, alike, any_object])
        if outcome == "elsewhere":
            for i in places:
                cells[i] = actual.cells[i]
        elif rng.random() < .2:
            ground = rng.choice(list(world.BACKGROUNDS))
    return world.Scene(ground, tuple(cells)), share


def wear(rng, cells):
    """Blur some cells or all, add noise and a colour cast, sometimes: cells (9, 16, 16, 3) in 0..255."""
    if rng.random() < .35:
        around = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        soft = sum(np.roll(cells, shift, (1, 2)) for shift in around) / 9
        hit = np.array([rng.random() < rng.choice([.2, 1.]) for _ in range(9)])
        blurred = cells + rng.uniform(.1, 1) * (soft - cells)
        cells = np.where(hit[:, None, None, None], blurred, cells)
    noise = np.random.default_rng(rng.getrandbits(32))
    if rng.random() < .5:
        grain = rng.uniform(0, 14) * noise.standard_normal(cells.shape)
        cast = rng.choice([0, 0, 8]) * noise.standard_normal(3)
        cells = cells + grain + cast
    return cells.clip(0, 255)


def botch(rng, scenes):
    """The pictures of a careless editor's dialogue: (K+1, 48, 48, 3) uint8, every turn from the picture before it."""
    def draw(scene):
        return world.cut(world.render([scene]))[0].astype(np.float32)

    actual, cells = scenes[0], draw(scenes[0])
    pictures = [cells]
    for before, want in zip(scenes, scenes[1:]):
        new, share = careless_edit(rng, actual, before, want)
        everywhere = new.background != actual.background
        redrawn = np.array([everywhere or a != b for a, b in zip(new.cells, actual.cells)])
        drawn = share * draw(new) + (1 - share) * cells
        cells = np.where(redrawn[:, None, None, None], drawn, cells)
        cells, actual = wear(rng, cells), new
        pictures.append(cells)
    # from cells back to pictures
    pictures = np.stack(pictures).reshape(-1, 3, 3, 16, 16, 3)
    pictures = pictures.transpose(0, 1, 3, 2, 4, 5).reshape(-1, world.SIZE, world.SIZE, 3)
    return pictures.round().astype(np.uint8)


def edited(tasks, split, start):
    """Pictures (n, 4, 3, 48, 48) uint8 of the base editor, 250 dialogues at a time.

    It samples as in training (stochastic steps too) and as in evaluation, with 6 to 8 steps.
    """
    editor = model.load(str(HERE / "editor"), find_device())
    images, rng = [], random.Random(start)
    for first in tqdm(range(0, len(tasks), 250), desc=f"editor {start}"):
        noise, T = {}, 8
        if split == "train":
            if rng.random() < .5:
                first_step = rng.randint(0, 2)
                noise = dict(eta=.8, window=range(first_step, first_step + 3))
            T = rng.choice([6, 8])
        some = tasks[first:first + 250]
        done = rollout(editor, some, 1, 3, T, (start, first), keep=False, **noise)
        images.append(done.images)
    return torch.cat(images)


def edits(work, part, split, start, n):
    """n dialogues of three edits and their pictures (n, 4, 3, 48, 48) uint8, kept on disk.

    `part` is "editor" for what the base editor makes of them, "botched" for the careless one.
    """
    tasks = data.load_shapes(split, 3, n, start)
    file = work / f"edits-{part}-{split}-{start}-{n}.pt"
    if not file.exists():
        if part == "editor":
            images = edited(tasks, split, start)
        else:
            pictures = []
            for i, task in enumerate(tasks):
                rng = random.Random(f"botch {start + i}")
                pictures.append(botch(rng, task.meta["scenes"]))
            images = torch.from_numpy(np.stack(pictures))
            images = images.permute(0, 1, 4, 2, 3).contiguous()
        write_whole(file, lambda path: torch.save(images, path))
    return tasks, torch.load(file, weights_only=True)


# -------------------------------------------------------------------------------------------------------------- labels

class Labelled(NamedTuple):
    """Dialogues with what the exact judge says of them; each of the last three by scoring, "turn" or "trajectory"."""
    tasks: list[Task]
    images: torch.Tensor        # (n, K+1, 3, 48, 48) uint8
    scores: dict                # (n, K or 1, 2): following, consistency; NaN where the edits undo each other
    texts: dict                 # [n][K or 1] pairs of texts: what the judge says when it thinks; None likewise
    cells: dict                 # (n, K or 1, 2, 2, 9), see label_cells


def look(tasks, images):
    """Label dialogues (n tasks, images (n, K+1, 3, 48, 48) uint8), turn by turn and as a whole."""
    n, K = len(tasks), images.shape[1] - 1
    pictures = images.permute(0, 1, 3, 4, 2).numpy()
    starts = [task.meta["scenes"][0] for task in tasks]
    dialogues, _ = world.resolve(starts, [task.meta["operations"] for task in tasks], pictures)
    all_spans = {"turn": [(k, k + 1) for k in range(K)], "trajectory": [(0, K)]}
    scores, texts, cells = {}, {}, {}
    for scoring, spans in all_spans.items():
        scores[scoring] = np.full((n, len(spans), 2), np.nan, np.float32)
        texts[scoring] = [[None] * len(spans) for _ in range(n)]
        cells[scoring] = np.full((n, len(spans), 2, 2, 9), -1)
        for column, (a, b) in enumerate(spans):
            # an impossible turn is a failed one; where edits undo each other there is nothing to follow
            rows = [i for i in range(n) if scoring == "turn" or dialogues[i][a] != dialogues[i][b]]
            if scoring == "turn":
                scenes = [dialogues[i][:b + 1] for i in rows]
            else:
                scenes = [[dialogues[i][0], dialogues[i][K]] for i in rows]
            after, before = pictures[rows, b], pictures[rows, a]
            _, following, consistency = world.judge(after, before, scenes)
            seen, seen_before = world.read(after), world.read(before)
            scores[scoring][rows, column] = np.stack([following, consistency], 1)
            cells[scoring][rows, column] = label_cells(scenes, seen, seen_before)
            for j, i in enumerate(rows):
                did = tell_following(scenes[j], seen, j)
                kept = tell_consistency(scenes[j], seen, seen_before, j)
                texts[scoring][i][column] = did, kept
    return Labelled(tasks, images, scores, texts, cells)


def label_cells(scenes, seen, seen_before):
    """What should be in every cell, and whether it is: (n, 2, 2, 9) for following and consistency.

    The first of the last but one axis is a content, -1 where nobody can tell; the second is
    0 = asked and done, 1 = asked, not done, 2 = not asked and kept (or nobody can tell), 3 = not asked, changed.
    """
    _, original = world.encode_scenes([s[0] for s in scenes])
    old_ground, old = world.encode_scenes([s[-2] for s in scenes])
    new_ground, new = world.encode_scenes([s[-1] for s in scenes])
    ground_asked = old_ground != new_ground
    ground = np.where(ground_asked, new_ground, seen_before.background)
    ground_right = (seen.background == ground) | (ground < 0)
    asked = (old != new) | ground_asked[:, None]
    labels = []
    # following compares with the picture before; consistency, where no edit has been, with the original
    for kept in (seen_before.contents, np.where(original == old, original, seen_before.contents)):
        should = np.where(old != new, new, kept)
        right = ((seen.contents == should) | (should < 0)) & ground_right[:, None]
        labels.append(np.stack([should, 2 * ~asked + ~right], 1))
    return np.stack(labels, 1)


def describe(content):
    if content is None:
        return "nothing"
    return f"{content.color} {content.material} {content.shape}"


def sharpness(error):
    """A mean squared distance of pixels from what they should be, as a word."""
    return "sharp" if error < .002 else "soft" if error < .006 else "bad"


def tell_following(scenes, seen, j):
    """"PLACE wanted THING seen THING sharp" for all that the instruction changes; seen is row j of a reading.

    "no room" where nothing could change.
    """
    before, want = scenes[-2:]
    words = []
    for i, place in enumerate(world.PLACES):
        if before.cells[i] != want.cells[i]:
            content = seen.contents[j, i]
            now = describe(world.CONTENTS[content]) if content >= 0 else "blur"
            error = seen.distance[j, i, world.CONTENTS.index(want.cells[i])]
            words.append(f"{place} wanted {describe(want.cells[i])} seen {now} {sharpness(error)}")
    if before.background != want.background:
        ground = seen.background[j]
        now = list(world.BACKGROUNDS)[ground] if ground >= 0 else "blur"
        words.append(f"background wanted {want.background} seen {now}")
    return " ".join(words) or "no room"


def tell_consistency(scenes, seen, seen_before, j):
    """"changed PLACE PLACE sharp": what changed that the instruction does not speak of; row j of two readings.

    Where an earlier edit was, the picture before is what counts; where that cannot be read, nobody can tell.
    """
    grounds, cells = world.encode_scenes([scenes[0], *scenes[-2:]])                # the original, before, wanted
    original, before, want = np.column_stack([cells, grounds])                     # (10,) each, the ground comes last
    now, then = (np.append(reading.contents[j], reading.background[j]) for reading in (seen, seen_before))
    target = np.where(original == before, original, then)
    wrong = (before == want) & (target >= 0) & (now != target)
    changed = [what for what, is_wrong in zip([*world.PLACES, "background"], wrong) if is_wrong]
    blur = np.median(seen.distance[j].min(1))
    return f"changed {' '.join(changed) or 'nothing'} {sharpness(blur)}"


# --------------------------------------------------------------------------------------------------------- the model

def build_tokenizer():
    """A tokenizer of whole words: the world's, and each part of our own questions as one token, half the work."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    # all that it is ever asked or says
    asked = list(reward.ANSWERS.values())
    for rubrics in reward.RUBRICS.values():
        asked += rubrics.values()
    thoughts = "wanted seen nothing blur sharp soft bad changed background no room"
    texts = [*asked, thoughts, *world.PLACES, *world.BACKGROUNDS]
    texts += [describe(content) for content in world.CONTENTS]
    for dialogue in world.dialogues("train", 5000, 3):
        texts += dialogue.instructions

    phrases, found = set(), set()
    split = pre_tokenizers.Split(Regex(r"[^\w<>/]+"), "removed")
    for text in asked:
        phrases.update(part.strip() for part in re.split("{instructions?}", text))
    for text in texts:
        found.update(word for word, _ in split.pre_tokenize_str(text.lower()))
    words = ["<pad>", "<unk>", "<s>", "</s>", "<image>", "<answer>", *"0123456789", THINK, "}"]
    words += sorted(found - set("0123456789"))
    numbers = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = split
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=["<image>", "<answer>"], padding_side="left")
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in sorted(phrases)])
    return tokenizer


# the question first: so the pictures are looked at with it in mind
TEMPLATE = """\
{{ bos_token }}{% for message in messages %}\
{% if message.content is string %}{{ message.content }}{% else %}\
{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}\
{% for part in message.content %}{% if part.type != 'text' %}<image>{% endif %}{% endfor %}\
{% endif %}{% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"""


def build_judge():
    """The untrained judge, a LLaVA whose image tokens are the cells of the grid, and its processor."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    tokenizer = build_tokenizer()
    size = {"height": world.SIZE, "width": world.SIZE}
    pictures = CLIPImageProcessorPil(size=size, do_center_crop=False, image_mean=[.5] * 3, image_std=[.5] * 3)
    processor = LlavaProcessor(
        pictures, tokenizer, patch_size=world.CELL, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=TEMPLATE)
    special = dict(pad_token_id=0, bos_token_id=2, eos_token_id=3)
    vision = dict(
        model_type="clip_vision_model", hidden_size=192, intermediate_size=768, num_hidden_layers=1,
        num_attention_heads=6, image_size=world.SIZE, patch_size=world.CELL, projection_dim=192)
    text = dict(
        model_type="llama", hidden_size=128, intermediate_size=384, num_hidden_layers=5, num_attention_heads=4,
        vocab_size=len(tokenizer), max_position_embeddings=512, **special)
    torch.manual_seed(0)
    judge = LlavaForConditionalGeneration(LlavaConfig(
        vision_config=vision, text_config=text, vision_feature_layer=-1, image_seq_length=9,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), pad_token_id=0, eos_token_id=3))
    judge.generation_config.update(do_sample=True, **special)
    return judge, processor


# ----------------------------------------------------------------------------------------------------------- questions

class Questions(NamedTuple):
    """Questions with the answers that the exact judge would give, as token ids; padded on the left."""
    ids: torch.Tensor           # (n, L)
    mask: torch.Tensor          # (n, L) 0 = padding
    labels: torch.Tensor        # (n, L) the answer's ids, -100 elsewhere
    pixels: torch.Tensor        # (n pictures, 3, 48, 48) in [-1, 1]
    place: int                  # of the digit, in every row
    marks: torch.Tensor         # (n,) the score, 0 to 9, not rounded
    cells: torch.Tensor         # (n, 2, 9), see label_cells
    contents: torch.Tensor      # (n pictures, 9) what is in each cell of each picture, -1 = unreadable
    ground: torch.Tensor        # (n pictures,) the background likewise

    def to(self, device):
        return Questions(*(part.to(device) if torch.is_tensor(part) else part for part in self))


def ask(kind, images, instructions):
    """The question (pictures, text) that reward.py asks about pictures (k+2, 3, 48, 48) and k+1 instructions so far."""
    scoring, name, reasoning = kind
    judge = reward.VLMJudge(reward.RUBRICS[scoring], scoring, reasoning)
    return judge.prompt(name, images, instructions)


def draw_questions(rng, kind, n, parts, tokenizer):
    """n random questions of a kind (scoring, name, reasoning) about parts, a list of Labelled -> Questions."""
    scoring, name, reasoning = kind
    column_of = REWARDS.index(name)
    word = tokenizer.convert_tokens_to_ids
    rows, pixels, marks, cells = [], [], [], []
    while len(rows) < n:
        # a turn of a dialogue that has a score
        part = parts[rng.randrange(len(parts))]
        scores = part.scores[scoring]
        i, turn = rng.randrange(len(part.tasks)), rng.randrange(scores.shape[1])
        score = float(scores[i, turn, column_of])
        if np.isnan(score):
            continue
        k = turn if scoring == "turn" else 2
        instructions = part.tasks[i].instructions[:k + 1]
        pictures, text = ask(kind, part.images[i, :k + 2], instructions)

        # as token ids: nine for each picture, one for each cell
        prompt = [word("<s>")] + tokenizer(text, add_special_tokens=False).input_ids
        prompt += [word("<image>")] * 9 * len(pictures) + [word("<answer>")]
        digit = str(round(MARKS * score))
        answer = [digit, "</s>"]
        if reasoning == "think":
            thoughts = part.texts[scoring][i][turn][column_of].split()
            answer = [*thoughts, THINK, digit, "}", "</s>"]
        rows.append((prompt, [word(token) for token in answer]))
        pixels.append(pictures)
        marks.append(MARKS * score)
        cells.append(part.cells[scoring][i, turn, column_of])

    # padded on the left, so that all answers end together
    L = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.zeros(n, L, dtype=torch.long)
    labels = torch.full((n, L), -100)
    for i, (prompt, answer) in enumerate(rows):
        both = prompt + answer
        ids[i, L - len(both):] = torch.tensor(both)
        labels[i, L - len(answer):] = torch.tensor(answer)
    pictures = torch.cat(pixels)
    reading = world.read(pictures.permute(0, 2, 3, 1).numpy())
    return Questions(
        ids=ids, mask=(ids != 0).long(), labels=labels, pixels=pictures.float() / 127.5 - 1,
        place=L - 3 if reasoning == "think" else L - 2, marks=torch.tensor(marks),
        cells=torch.from_numpy(np.stack(cells)), contents=torch.from_numpy(reading.contents),
        ground=torch.from_numpy(reading.background))


class Batches(torch.utils.data.Dataset):
    """The questions of each step, one batch of each kind: [(kind, Questions)], a pure function of the step."""

    def __init__(self, parts, tokenizer, batch):
        self.parts, self.tokenizer, self.batch = parts, tokenizer, batch

    def __getitem__(self, step):
        rng, found = random.Random(f"judge {step}"), []
        for kind in KINDS:
            # of whole trajectories, which are fewer, at every fourth step only
            if kind[0] == "turn":
                found.append((kind, draw_questions(rng, kind, self.batch, self.parts, self.tokenizer)))
            elif step % 4 == 0:
                found.append((kind, draw_questions(rng, kind, self.batch // 2, self.parts, self.tokenizer)))
        return found


# ------------------------------------------------------------------------------------------------------------ training

NAMES = world.SHAPES, tuple(world.COLORS), world.MATERIALS
SIZES = [1 + len(names) for names in NAMES]             # 0 = nothing


def feature_table():
    """Shape, colour and material of every content as numbers (110, 3); the last row, content -1: nobody can tell."""
    rows = [[0, 0, 0]]
    for content in world.CONTENTS[1:]:
        rows.append([1 + names.index(feature) for names, feature in zip(NAMES, content)])
    return torch.tensor(rows + [[-1, -1, -1]])


FEATURES = feature_table()


def content_loss(logits, contents, weight):
    """Cross-entropy of shape, colour and material: logits (n, sum(SIZES)), contents (n,) with -1 = nobody can tell."""
    loss = 0
    for part, true in zip(logits.split(SIZES, 1), FEATURES[contents.cpu()].to(logits.device).unbind(1)):
        loss = loss + F.cross_entropy(part, true, ignore_index=-1, reduction="none")
    return (loss * weight).sum() / weight.sum()


def answer_losses(logits, questions, zero):
    """Loss of the digit, and of all other words of the answers; logits (answer tokens, words), zero the id of "0".

    A score between two digits asks for both in proportion, so that the expectation is the score.
    """
    answers = questions.labels[:, 1:]
    spoken = answers != -100
    places = torch.arange(answers.shape[1], device=answers.device).expand_as(answers)[spoken]
    digit = places == questions.place - 1
    logp = logits.log_softmax(-1)
    low = questions.marks.floor().clamp(max=MARKS - 1)
    low_share, high_share = low + 1 - questions.marks, questions.marks - low
    token = (zero + low.long())[:, None]
    of_low = logp[digit].gather(1, token)[:, 0]
    of_high = logp[digit].gather(1, token + 1)[:, 0]
    score = -(low_share * of_low + high_share * of_high).mean()
    return score, F.nll_loss(logp[~digit], answers[spoken][~digit])


def losses(judge, readers, questions, image, zero):
    """All losses of a batch {name: loss}: score and words of the answers; seen, should and right of the readers."""
    ids = questions.ids
    with faster(ids.device):
        out = judge.model(input_ids=ids, attention_mask=questions.mask, pixel_values=questions.pixels,
                          output_hidden_states=True)
        spoken = questions.labels[:, 1:] != -100
        logits = judge.lm_head(out.last_hidden_state[:, :-1][spoken]).float()
        cells = torch.cat(list(out.image_hidden_states)).view(-1, judge.config.text_config.hidden_size)
        seen = readers["seen"](cells).float()
        count = (ids == image).cumsum(1)
        last_picture = (ids == image) & (count > count[:, -1:] - 9)
        should = readers["should"](out.hidden_states[-3][last_picture]).float()
        right = readers["right"](out.hidden_states[-2][last_picture]).float()
    score, words = answer_losses(logits, questions, zero)

    # what is in each cell of each picture, as the exact judge reads it
    contents = questions.contents.flatten()
    of_contents, of_ground = seen.view(len(questions.ground), 9, -1).tensor_split([sum(SIZES)], -1)
    seen_loss = content_loss(of_contents.flatten(0, 1), contents, torch.ones_like(contents, dtype=torch.float))
    seen_loss = seen_loss + F.cross_entropy(of_ground.mean(1), questions.ground, ignore_index=-1)

    # what should be in each cell of the last picture, and whether it is; few cells are asked for, and they matter most
    content, verdict = questions.cells[:, 0].flatten(), questions.cells[:, 1].flatten()
    weight = 1 + 3. * (verdict < 2)
    should_loss = content_loss(should, content, weight)
    right_loss = F.cross_entropy(right, verdict, reduction="none")
    right_loss = (right_loss * weight).sum() / weight.sum()
    return {"score": score, "words": words, "seen": seen_loss, "should": should_loss, "right": right_loss}


def label_all(work, dialogues):
    """Labelled dialogues to learn from, 500 at a time: as many of the base editor as of the careless one."""
    parts = []
    for start in range(0, dialogues, 500):
        for part in ("editor", "botched"):
            parts.append(look(*edits(work, part, "train", FIRST_DIALOGUE + start, 500)))
    return parts


def build_readers(width):
    """Linear readers of hidden states: what is in a cell, what should be, and which of the four verdicts it gets."""
    contents = sum(SIZES)
    return torch.nn.ModuleDict({
        "seen": torch.nn.Linear(width, contents + len(world.BACKGROUNDS)),
        "should": torch.nn.Sequential(torch.nn.LayerNorm(width), torch.nn.Linear(width, contents)),
        "right": torch.nn.Sequential(torch.nn.LayerNorm(width), torch.nn.Linear(width, 4))})


def train_judge(work, steps, batch=32, lr=2e-3, dialogues=4000):
    """Train the judge on the exact judge's answers; returns it and its processor.

    Three linear readers, thrown away later, shorten the way: of the image tokens, what is in each cell; of the last
    picture's cells inside the language model, what should be there, and whether it is. Without the first most of the
    training goes by before the vision tower has found out what there is to see; without the others a digit at once is
    hardly learned.
    """
    device = find_device()
    judge, processor = build_judge()
    judge.to(device)
    # a third faster than the others, backward on a CPU in bfloat16
    judge.set_attn_implementation("eager")
    image, zero = processor.tokenizer.convert_tokens_to_ids(["<image>", "0"])
    parts = label_all(work, dialogues)
    readers = build_readers(width=128).to(device)
    params = dict(judge.named_parameters())
    params |= {f"reader.{name}": p for name, p in readers.named_parameters()}
    hidden = [name for name, p in params.items() if ".layers." in name and p.ndim == 2]
    optimizers = muon_and_adamw(params, hidden, lr)
    schedules = scheduled(optimizers, lambda i: min((i + 1) / 100, 1.02 - i / steps))
    progress = {"judge": judge, "readers": readers, **optimizers, **schedules}
    start, averages = load_progress(work / "judge.pt", progress)["step"], {}

    # beside a GPU questions are drawn by processes of their own
    workers = min(12, os.cpu_count() - 1) if device.type == "cuda" else 0
    batches = torch.utils.data.DataLoader(Batches(parts, processor.tokenizer, batch), batch_size=None,
                                          sampler=range(start, steps), num_workers=workers)
    judge.train()
    bar = tqdm(batches, initial=start, total=steps, desc="judge")
    for step, drawn in enumerate(bar, start):
        for (scoring, name, reasoning), questions in drawn:
            loss = losses(judge, readers, questions.to(device), image, zero)
            # a digit's only other word is that it ends
            share = 1. if reasoning == "think" else .1
            total = loss["score"] + share * loss["words"] + .3 * loss["seen"] + loss["should"] + loss["right"]
            total.backward()
            for part, value in loss.items():
                part = f"{scoring}-{name}-{reasoning} {part}"
                averages[part] = .98 * averages.get(part, value.detach()) + .02 * value.detach()
        torch.nn.utils.clip_grad_norm_(params.values(), 1)
        for part in (*optimizers.values(), *schedules.values()):
            part.step()
        for optimizer in optimizers.values():
            optimizer.zero_grad()
        if step % 50 == 0:
            bar.write(f"{step} " + " ".join(f"{name} {value:.3f}" for name, value in averages.items()))
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            save_progress(work / "judge.pt", step + 1, progress)
    return judge.eval().cpu(), processor


# -------------------------------------------------------------------------------------------------------------- report

def auc(score, good):
    """How often a good one scores higher than a bad one (ties count half): area under the ROC curve."""
    difference = score[good][:, None] - score[~good]
    return (difference > 0).mean() + .5 * (difference == 0).mean()


def single_votes(judge, tasks, images, votes):
    """Scores (votes, 3 n, 2) of n dialogues' turns, turn by turn, each vote by itself; NaN where there is none."""
    rounds = []
    for vote in range(votes):
        turns = []
        for k in range(3):
            questions = []
            for name in judge.names:
                for task, pictures in zip(tasks, images[:, :k + 2]):
                    questions.append(judge.prompt(name, pictures, task.instructions[:k + 1]))
            answers = judge.answer(questions, [vote] * len(questions))
            scores = np.array([score for score, _ in answers])
            turns.append(scores.reshape(len(judge.names), len(tasks)).T)
        rounds.append(np.concatenate(turns))
    return np.stack(rounds)


def report(folder, work, n=200, votes=4):
    """The judge against the exact one, on n test tasks (with objects never trained on) after the base editor's edits.

    Per way of asking and reward: correlation, AUC (following: of exact success; consistency: of more than the exact
    median), bias (mean difference), spread (standard deviation of a single vote around its question's mean), share of
    answers without a score, seconds per 1,000 judgements.
    """
    tasks, images = edits(work, "editor", "test", 0, n)
    exact_judge = reward.load("exact")
    turns = [exact_judge(tasks, images[:, :k + 2], k) for k in range(3)]
    exact = torch.cat(turns).numpy()                       # (3 n, 3)
    lines = ["reasoning  votes  reward       corr    AUC    bias  spread  failed  s / 1,000"]
    ways = [("logits", 1), ("direct", 1), ("direct", votes), ("think", 1), ("think", votes)]
    for reasoning, count in ways:
        judge = reward.load(str(folder), reasoning=reasoning, votes=count)
        start = time.process_time()
        draws = single_votes(judge, tasks, images, count)
        seconds = 1000 * (time.process_time() - start) / draws[0].size
        for column, name in enumerate(REWARDS):
            success, truth = exact[:, 2] > 0, exact[:, column]
            good = success if name == "following" else truth > np.median(truth)
            line = compare(draws[..., column], truth, good)
            lines.append(f"{reasoning:<9}  {count:>5}  {name:<11} {line} {seconds:10.1f}")
    return "\n".join(lines)


def compare(draws, truth, good):
    """Columns of the report: scores of single votes (votes, m) against the exact ones (m,); which are good (m,)."""
    score = np.nanmean(draws, 0)
    known = ~np.isnan(score)
    score, truth, good = score[known], truth[known], good[known]
    correlation = np.corrcoef(score, truth)[0, 1] if score.std() else np.nan
    spread = "      -"
    if len(draws) > 1:
        spread = f"{np.sqrt(np.nanvar(draws, 0, ddof=1).mean()):7.3f}"
    bias, failed = (score - truth).mean(), np.isnan(draws).mean()
    return f"{correlation:6.3f} {auc(score, good):6.3f} {bias:+7.3f} {spread} {failed:7.3f}"


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "judge", help="folder of the finished judge")
    parser.add_argument("--work", type=Path, default=Path("out/make_judge"), help="folder of checkpoints and pictures")
    parser.add_argument("--steps", type=int, default=2200, help="steps of 128 questions")
    parser.add_argument("--report-only", action="store_true", help="train nothing, compare --out with the exact judge")
    args = parser.parse_args()
    # said now, and not after most of an hour
    if args.steps < 1:
        raise ValueError(f"--steps {args.steps} must be at least 1")
    if args.out.is_file():
        raise ValueError(f"--out {args.out} is a file, expected a folder")
    if not args.report_only:
        start = time.perf_counter()
        judge, processor = train_judge(args.work, args.steps)
        judge.to(torch.float16).save_pretrained(args.out)
        processor.save_pretrained(args.out)
        print(f"{args.out} written after {(time.perf_counter() - start) / 60:.1f} minutes")
    print(report(args.out, args.work))


if __name__ == "__main__":
    run_main(main)
