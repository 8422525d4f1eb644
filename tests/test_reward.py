"""Judges: the embedded world's exact one, and a vision-language model in process (tiny and random, built here)."""
import ast
import functools
import importlib.util
import json
import math
import random
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import data
import model
import reward
from fixtures import ROOT, make_tasks, refused, run_script
from rollout import Task, stack_images
from shapes import world


# --------------------------------------------------------------------------------------------------------- exact judge

def test_the_exact_judge_keeps_rows_columns_and_turns_apart():
    """Columns swapped, a picture judged against another task, another turn, or the picture before the edit."""
    judge = reward.load("exact")
    assert judge.names == ["following", "consistency", "success", "possible"]
    # nothing is trained on what is 0 or 1
    assert judge.weights[2:] == [0, 0] and sum(judge.weights) == 1
    tasks = [task for task in data.load("shapes", "test", 3, limit=6) for _ in range(2)]         # S = 12: groups of 2
    good = torch.from_numpy(np.stack([world.render(task.meta["scenes"]) for task in tasks]))     # (S, 4, H, W, 3)
    good = good.permute(0, 1, 4, 2, 3)
    for k in range(3):
        images = good[:, :k + 2].clone()
        images[1::2, k + 1] = images[1::2, k]                        # the second of each group: nothing done
        r = judge(tasks, images, k)
        after, before = (images[:, i].permute(0, 2, 3, 1).numpy() for i in (-1, -2))
        success, following, consistency = world.judge(after, before, [task.meta["scenes"][:k + 2] for task in tasks])
        assert r.shape == (12, 4) and r.dtype == torch.float32
        assert torch.equal(r[:, :3], torch.tensor(np.stack([following, consistency, success], 1)))
        assert r[:, 2].tolist() == [1, 0] * 6 and r.min() >= 0 and r.max() <= 1 and r[:, 3].min() == 1


def test_the_exact_judge_follows_the_editors_choices():
    """A sample judged by the plan, or by what another sample of its group has chosen; a dialogue given up where one
    turn has become impossible."""
    ring, star = world.Object("ring", "red", "metal"), world.Object("star", "blue", "metal")
    operations = [world.Operation("subject_add", new=ring),
                  world.Operation("subject_add", ("ring", "red"), star, direction="left of"),
                  world.Operation("background_change", background="mint")]
    start, put = world.Scene("sand", (None,) * 9), lambda scene, place, new: world.apply(
        scene, world.Operation("subject_add", new=new, place=place))
    planned = [start, put(start, 4, ring), put(put(start, 4, ring), 3, star)]
    task = Task(Image.fromarray(world.render([start])[0]), ["Add", "Add", "Make"], ["", "", ""],
                {"scenes": [*planned, planned[2]._replace(background="mint")], "operations": operations})
    # one as planned, one elsewhere, one elsewhere but drawn as planned, one where nothing is left of it
    shown = [planned[1:], [put(start, 8, ring), put(put(start, 8, ring), 7, star)],
             [put(start, 8, ring), put(put(start, 8, ring), 3, star)], [put(start, 6, ring)] * 2]
    pictures = [[start, *scenes, scenes[1]._replace(background="mint")] for scenes in shown]
    images = torch.from_numpy(np.stack([world.render(scenes) for scenes in pictures])).permute(0, 1, 4, 2, 3)
    r = torch.stack([reward.load("exact")([task] * 4, images[:, :k + 2], k) for k in range(3)], 1)
    assert r[..., 2].tolist() == [[1, 1, 1], [1, 1, 1], [1, 0, 1], [1, 0, 1]]
    assert r[..., 3].tolist() == [[1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 0, 1]]
    assert r[3, 1, 0] == 0 and r[3, 1, 1] > .98


def test_the_exact_judge_refuses_pictures_of_the_real_world():
    """A KeyError in a background thread, an hour into a run on one's own pictures."""
    judge, tasks = reward.load("exact"), [photograph("Add a hat")]
    with pytest.raises(ValueError, match="embedded world only"):
        judge.check(tasks)
    with pytest.raises(ValueError, match="embedded world only"):
        judge(tasks, torch.zeros(1, 2, 3, 48, 48, dtype=torch.uint8), 0)


def photograph(*instructions):
    """A task of the real world: without scenes."""
    return Task(Image.new("RGB", (48, 48)), list(instructions), [""] * len(instructions))


# -------------------------------------------------------------------------------------------- threads and breakdowns

class Slow(reward.Judge):
    """Gives S rows of 0.5, once it is let; notes in which threads it worked, and how many at a time."""
    names, weights = ["beauty"], [1.]

    def __init__(self, thread=None):
        self.thread, self.let, self.where, self.busy, self.most = thread, threading.Event(), [], 0, 0

    def rewards(self, tasks, images, k):
        self.busy += 1
        self.most = max(self.most, self.busy)
        self.where.append(threading.current_thread())
        assert self.let.wait(20)
        self.busy -= 1
        return torch.full((len(tasks), 1), .5 + k)


def test_a_judge_works_in_the_background_one_turn_after_the_other():
    """A rollout that waits for its judge; turns judged at the same time, which needs their memory at the same time."""
    judge = Slow(ThreadPoolExecutor(1))
    futures = [judge.start([None] * 2, None, k) for k in range(3)]       # returns before the judge has answered
    assert not any(future.done() for future in futures)
    judge.let.set()
    assert [future.result(20).tolist() for future in futures] == [[[.5 + k]] * 2 for k in range(3)]
    assert judge.most == 1 and threading.main_thread() not in judge.where


def test_a_judge_in_process_on_a_cpu_works_at_once(llava):
    """Two sets of OpenMP threads on the same cores: sampling and judging both slower than one after the other."""
    judge = Slow()
    judge.let.set()
    assert judge.start([None], None, 0).done() and judge.where == [threading.main_thread()]
    assert reward.load("exact").thread is None and reward.load(llava).thread is None
    tasks = data.load("shapes", "test", 1, limit=2)
    images = torch.from_numpy(np.stack([world.render(task.meta["scenes"]) for task in tasks])).permute(0, 1, 4, 2, 3)
    future = reward.load("exact").start(tasks, images, 0)
    assert future.done() and future.result().shape == (2, 4)


@pytest.mark.parametrize("background", [False, True])
def test_a_judge_that_breaks_down_gives_nan_and_says_why_and_refused_input_is_raised(background, capsys):
    """Hours of training lost to one error of a judge; or a mistake of the caller taken for one, in silence."""
    judge, errors = Slow(ThreadPoolExecutor(1) if background else None), []
    judge.rewards = lambda tasks, images, k: (_ for _ in ()).throw(errors.pop())
    errors.append(RuntimeError("CUDA error:\n  an illegal memory access"))
    r = judge.start([None] * 3, None, 1).result(20)
    assert r.shape == (3, 1) and r.dtype == torch.float32 and r.isnan().all()
    assert judge.last_failure == "RuntimeError: CUDA error: an illegal memory access"
    assert capsys.readouterr().err.splitlines() == [f"the judge failed on turn 2: {judge.last_failure}"]
    errors.append(ValueError("pictures of another task"))
    future = judge.start([None] * 3, None, 1)                                      # raises in result(), not in start()
    with pytest.raises(ValueError, match="pictures of another task"):
        future.result(20)
    errors.append(RuntimeError("again"))
    assert judge([None], None, 0).isnan().all() and judge.last_failure == "RuntimeError: again"


# ----------------------------------------------------------------------------------------------------------- VLM judge

WORDS = ["<pad>", "<unk>", "<s>", "</s>", "<image>", *"0123456789", "add", "a", "hat", "remove", "the", "dog", "answer"]
TEMPLATE = ("{% for m in messages %}{% for c in m.content %}{% if c.type == 'image' %}<image>{% else %} {{ c.text }}"
            "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %} answer{% endif %}")
QUESTIONS = ["add a hat", "remove", "remove the dog add the hat a dog", "the dog", "add"]
PAIRS = torch.randint(0, 256, (5, 2, 3, 24, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
PROMPTS = list(zip(PAIRS, QUESTIONS))


def make_tokenizer(words, special):
    """One token for each word; a sentence begins with <s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", words.index("<s>"))])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>",
                                   eos_token="</s>", additional_special_tokens=special)


def make_llava(folder, words=WORDS, template=None):
    """A random LLaVA whose weights belong to words, not to ids: `words` in another order makes the same model."""
    template = TEMPLATE if template is None else template
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    tokenizer = make_tokenizer(words, ["<image>"])
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    LlavaProcessor(pictures, tokenizer, patch_size=8, vision_feature_select_strategy="default",
                   num_additional_image_tokens=1, chat_template=template).save_pretrained(folder)
    tiny = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, initializer_range=.3)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(
        text_config=dict(tiny, model_type="llama", vocab_size=len(words), pad_token_id=None, bos_token_id=None,
                         eos_token_id=words.index("</s>")),
        vision_config=dict(tiny, model_type="clip_vision_model", image_size=16, patch_size=8, projection_dim=16),
        image_token_id=words.index("<image>"), image_seq_length=4, eos_token_id=words.index("</s>")))
    order = torch.tensor([WORDS.index(w) for w in words if w in WORDS])
    with torch.no_grad():
        for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            weight[:len(order)] = torch.randn(len(WORDS), 16)[order]
        for i, word in enumerate(words):
            if word not in "0123456789":                          # so that most of the probability is on digits
                model.get_output_embeddings().weight[i] = 0
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def float32(monkeypatch):
    """The same numbers on every CPU: some would multiply in bfloat16."""
    monkeypatch.setattr(model, "multiplies_in_bfloat16", lambda device: False)


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return make_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture
def judge(llava):
    return reward.load(llava)


def scores(judge, prompts=PROMPTS):
    return torch.tensor([score for score, _ in judge.score(prompts)])


def by_hand(folder, pair, question):
    """The score of one row from token ids put together here: <s>, 4 for each picture, the question, "answer"."""
    from transformers import LlavaForConditionalGeneration
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    ids = [WORDS.index(w) for w in ["<s>"] + ["<image>"] * 8 + question.split() + ["answer"]]
    pictures = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pair]
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(pictures, return_tensors="pt").pixel_values
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0, -1]
    weights = [torch.exp(logits[WORDS.index(str(d))].double()).item() for d in range(10)]
    return sum(d * w for d, w in enumerate(weights)) / sum(weights) / 9


@pytest.mark.parametrize("template", [TEMPLATE, "{{ bos_token }}" + TEMPLATE], ids=["plain", "template with <s>"])
def test_a_score_is_the_expectation_over_the_digits_at_the_answers_place(template, tmp_path):
    """Logits of another position, a softmax over all words, division by 10, a picture left out, <s> given twice."""
    folder = make_llava(tmp_path, template=template)
    (score, text), = reward.load(folder).score(PROMPTS[3:4])
    assert abs(score - by_hand(folder, *PROMPTS[3])) < 1e-5
    assert abs(sum(d * float(text.split()[2 * d + 1]) for d in range(10)) / 9 - score) < .02, "not what it says"


def test_a_cpu_that_multiplies_in_bfloat16_gives_nearly_the_same_scores(llava, judge, monkeypatch):
    """Catches: a fast judge that sees other pictures, whose scores are rounded to what training would feel, or who
    does not ask for --bf16."""
    monkeypatch.setattr(model, "multiplies_in_bfloat16", lambda device: True)
    fast = reward.load(llava)
    difference = (scores(fast) - scores(judge)).abs()
    assert 0 < difference.max() < .02 and next(fast.model.parameters()).dtype == torch.bfloat16
    assert torch.equal(scores(reward.load(llava, bf16=False)), scores(judge))


def test_a_judge_without_the_words_refuses(judge):
    """The embedded world's tiny judge, asked about photographs: it would score noise in silence."""
    judge.check([photograph("add a hat", "remove the dog")])
    with pytest.raises(ValueError, match="no words for 'remove the zebra'"):
        judge.check([photograph("add a hat", "remove the dog"), photograph("remove the zebra")])
    with pytest.raises(ValueError, match="surrogate"):                            # half of an emoji: no text at all
        judge.check([photograph("add a \ud83d")])


def test_a_batch_gives_each_row_the_score_it_gets_alone(judge):
    """Padding that is attended to, or that stands where the answer should; rows that come back in another order."""
    alone = torch.cat([scores(judge, [prompt]) for prompt in PROMPTS])
    assert alone.min() >= 0 and alone.max() <= 1 and alone.std() > .02
    for judge.workers in (2, 5):
        assert torch.allclose(scores(judge), alone, atol=1e-5)


def test_a_picture_is_looked_at_once_for_all_questions_that_show_it(llava, monkeypatch):
    """Catches: features of another picture, or of an old one; a memory that grows without end, or is not used."""
    plain = reward.load(llava)
    del plain.processor.image_processor.preprocess, plain.model.model.get_image_features      # as the library has them
    judge, looks = reward.load(llava, workers=5), []
    judge.model.model.vision_tower.register_forward_pre_hook(lambda tower, given: looks.append(len(given[0])))
    monkeypatch.setattr(reward, "REMEMBERED", 15)
    # ten pictures, each in several questions, at both places
    prompts = PROMPTS + [(pair.flip(0), text) for pair, text in PROMPTS] + PROMPTS[::-1]
    expected = scores(plain, prompts)
    assert torch.allclose(scores(judge, prompts), expected, atol=1e-6) and sum(looks) == 10
    others = [(255 - pair, text) for pair, text in PROMPTS]
    assert torch.allclose(scores(judge, others), scores(plain, others), atol=1e-6) and sum(looks) == 20
    assert torch.allclose(scores(judge, prompts), expected, atol=1e-6) and sum(looks) == 30   # forgotten


def test_a_score_depends_on_both_pictures_and_on_their_order(judge):
    """A judge that sees the picture after the edit only cannot say what was kept."""
    score = scores(judge, PROMPTS[:1])
    (before, after), (other, _) = PAIRS[:2]
    for pair in ((after, before), (before, other), (other, after)):
        assert (scores(judge, [(torch.stack(pair), QUESTIONS[0])]) - score).abs() > 1e-4


def test_digits_are_found_through_the_tokenizer(judge, tmp_path):
    """One model's ids of the digits written into the code, or taken to be in a row: another model is read as noise."""
    words = random.Random(0).sample(WORDS, len(WORDS))
    other = reward.load(make_llava(tmp_path, words))
    assert other.digits.tolist() == [words.index(str(d)) for d in range(10)] != judge.digits.tolist()
    assert torch.allclose(scores(other), scores(judge), atol=1e-5)


def test_digits_that_hold_less_than_half_of_the_probability_are_no_score():
    """Scores read off a model that was about to say something else: a full-width 7 at 95 %, an ASCII 2 at 0.2 %."""
    assert reward.expect([.1] * 9 + [.05], "1")[0] == pytest.approx((.1 * 36 + .05 * 9) / .95 / 9)
    assert reward.expect([0, .2, 0, 0, 0, .3, 0, 0, 0, 0], "5")[0] == pytest.approx((.2 * 1 + .3 * 5) / .5 / 9)
    score, text = reward.expect([0, .1, 0, 0, 0, .3, 0, 0, 0, 0], "\uff17")
    assert math.isnan(score) and "40.0%" in text and "'\uff17'" in text and "direct or think" in text
    for p in ([0.] * 10, [math.nan] * 10, [math.inf] + [0.] * 9, [.0001] * 10, [1.] * 10, [-1., 1.6] + [0.] * 8):
        score, text = reward.expect(p, "I")
        assert math.isnan(score) == (sum(p) != pytest.approx(.6)), p


def test_a_model_that_would_rather_say_something_else_has_no_score(judge):
    """The expectation over ten digits that the model does not think of."""
    judge.model.get_output_embeddings().weight.data.zero_()       # all words are as likely: the digits are 10 of 22
    assert scores(judge).isnan().all()
    assert "hold 45.5% of" in judge.last_failure and "begins with '<pad>'" in judge.last_failure


def test_following_looks_at_the_turn_and_consistency_at_the_original_too(llava, monkeypatch):
    """Consistency against the picture just before alone: slow drift over the turns would never be seen."""
    images = torch.randint(0, 256, (2, 4, 3, 8, 8), dtype=torch.uint8)
    tasks = [photograph("one", "add a {hat}", "remove {instructions}", "never"),
             photograph("first", "second", "third", "never")]
    for scoring in ("turn", "trajectory"):
        judge, asked = reward.load(llava, scoring=scoring), []
        monkeypatch.setattr(judge, "answer", lambda questions, seeds: asked.extend(questions) or
                            [(i / 10, "") for i, _ in enumerate(questions)])
        assert judge.names == ["following", "consistency"]
        assert torch.allclose(judge(tasks, images, 2), torch.tensor([[0, .2], [.1, .3]]))
        pictures, texts = zip(*asked)
        rows = [[2, 3]] * 2 + [[0, 2, 3]] * 2 if scoring == "turn" else [[0, 3]] * 4
        assert all(torch.equal(p, images[i % 2, row]) for i, (p, row) in enumerate(zip(pictures, rows)))
        assert all("never" not in text and text.endswith(reward.ANSWERS["logits"]) for text in texts)
        assert "remove {instructions}" in texts[0] and "third" in texts[1] and "exactly" in texts[0]
        assert all(word in texts[2] for word in ("1. one", "2. add a {hat}", "3. remove {instructions}", "unchanged"))
        assert ("1. one" in texts[0]) == (scoring == "trajectory")


def test_a_row_that_fails_gives_nan_in_its_row_only(judge, monkeypatch, capsys):
    """A failure that ends the run, counts as 0, or shifts or drops the rows beside it."""
    want, forward, sizes = scores(judge), judge.forward, []

    def fails(questions, seed):
        sizes.append(len(questions))
        if any(text == QUESTIONS[1] for _, text in questions):
            raise RuntimeError("out of\nmemory")
        return forward(questions, seed)

    monkeypatch.setattr(judge, "forward", fails)
    for judge.workers, wanted in ((1, [1] * 5), (3, [3, 1, 2, 1, 1, 2]), (5, [5, 2, 1, 1, 3])):
        sizes.clear()
        got = scores(judge)
        assert got.isnan().tolist() == [False, True, False, False, False] and sizes == wanted
        assert torch.allclose(got.nan_to_num(want[1].item()), want, atol=1e-5)
        assert judge.last_failure == "RuntimeError: out of memory"
        assert capsys.readouterr().err == "the judge failed in 1 of 5 answers: RuntimeError: out of memory\n"
    monkeypatch.setattr(judge, "forward", forward)
    judge.model.get_output_embeddings().weight.data.fill_(float("nan"))          # a model that has no answer
    assert scores(judge).isnan().all()


def test_many_questions_are_cut_into_batches_of_workers(judge, monkeypatch):
    """A batch larger than was allowed; a question that gets lost between two batches; a stack that overflows."""
    monkeypatch.setattr(judge, "forward", lambda questions, seed: sizes.append(len(questions)) or
                        [(i / 2000, "") for i, _ in questions])
    for judge.workers, n in ((1, 1500), (32, 1000), (32, 33), (7, 100)):
        sizes, left = [], list(range(n))
        answers = judge.answer([(i, "") for i in left], left)
        assert [score for score, _ in answers] == [i / 2000 for i in left]
        assert max(sizes) == min(judge.workers, n) and len(sizes) == -(-n // judge.workers)


# ---------------------------------------------------------------------------------------------------- generated answers

DIRECT = {
    "7": 7, " 9.\n": 9, "Score: 4": 4, "**7**": 7, "0": 0, "(3)": 3, "I rate it 1": 1, "4 is my score": 4,
    "<think>It is 2 or 3</think>\n\n8": 8, "3.5": None, "0.7": None, ".7": None, "7.5": None, "3,5": None, "10": None,
    "-1": None, "\u22123": None, "\u20133": None, "+3": None, "7/9": None, "7/10": None, "1/2": None, "70%": None,
    "7%": None, "7 or 8": None, "7 7": None, "good": None, "": None, "<think>It is 2": None, "\uff17": None,
    "7 \uff17": None, "\u0667": None, "7\u00bd": None, "No1": None, "2nd": None}
THINKS = {
    'A star. {"score": 6}': 6, '```json\n{"why": "x", "score": 0}\n```': 0, '{"score": 3, "why": "x"}': 3,
    '{"score": 8.5 }': 8.5, 'It is 3</think>{"score": 2}': 2, '{"score": 2} so {"score": 2}.': 2,
    '{"score": 1} no: {"score": 8}': None, '{"score": "1"} no: {"score": 8}': None, '{"score": 7, "score": 2}': None,
    '{"score": 7}. Wait, no: 2.': None, '{"score": 7} of 10': None, '<think>{"score": 3}': None,
    '<think>{"score": 3}</think> none': None, '{"score": 12}': None, '{"score": 9.5}': None, '{"score": -1}': None,
    '{"score": \u22121}': None, '{"score": \uff17}': None, '{"score": "7"}': None, '{"score": true}': None,
    '{"score": NaN}': None, '{"score": 7': None, '{"points": 7}': None, "7": None, "{7}": None, '{"score": [7]}': None,
    '{"score": 7/10}': None, "": None}


@pytest.mark.parametrize("reasoning, text, want", [("direct", *case) for case in DIRECT.items()] +
                         [("think", *case) for case in THINKS.items()])
def test_a_generated_answer_is_read_strictly(reasoning, text, want):
    """A score out of range that is clamped, a number of the thought taken for the score, a half answer for a whole."""
    judge = reward.VLMJudge(reward.RUBRICS["turn"], "turn", reasoning)
    score, said = judge.read(text)
    if want is None:
        assert math.isnan(score) and said.startswith("its answer ") and repr(text[-5:])[1:-1] in said
    else:
        assert (score, said) == (want / 9, text.strip())
    score, said = judge.read(text, cut=True)
    assert math.isnan(score) and f"cut off after {reward.TOKENS[reasoning]} tokens" in said


def generate(last, input_ids, **_):
    """A model that says one thing, whose last token is `last`."""
    return torch.cat([input_ids, input_ids.new_full((len(input_ids), 1), last)], 1)


def scripted(judge, monkeypatch, answer):
    """Let `answer(row)` be what the model generates for the row of a batch; returns the texts it was asked."""
    asked, processor = [], judge.processor

    def processed(text, **rest):
        asked.append(text)
        return processor(text=text, **rest)
    processed.apply_chat_template, processed.chat_template = processor.apply_chat_template, processor.chat_template
    monkeypatch.setattr(judge, "processor", processed)
    end = judge.model.generation_config.eos_token_id
    monkeypatch.setattr(judge.model, "generate", functools.partial(generate, end))
    monkeypatch.setattr(judge.tokenizer, "batch_decode", lambda ids, **_: [answer(row) for row in range(len(ids))])
    return asked


@pytest.mark.parametrize("reasoning", list(reward.ANSWERS))
def test_a_thinking_models_block_is_closed_unless_it_is_to_think(reasoning, tmp_path, monkeypatch):
    """The digits read in the middle of a thought; a score of the thought taken for the answer."""
    judge = reward.load(make_llava(tmp_path, template=TEMPLATE + " <think>\n"), reasoning=reasoning)
    said = {"direct": "5", "think": 'Is it 3? {"score": 3}</think> {"score": 5}'}.get(reasoning)
    asked = scripted(judge, monkeypatch, lambda row: said)
    got = scores(judge)
    assert got.shape == (5,) and (reasoning == "logits" or got.tolist() == pytest.approx([5 / 9] * 5))
    assert all(text.endswith("<think>" if reasoning == "think" else "<think>\n\n</think>\n\n") for text in asked[0])
    if reasoning == "think":
        monkeypatch.setattr(judge.model, "generate", functools.partial(generate, WORDS.index("hat")))      # cut off
        monkeypatch.setattr(judge.tokenizer, "batch_decode", lambda ids, **_: ['Is it 3? {"score": 3}'] * len(ids))
        assert scores(judge).isnan().all() and "cut off after 2048 tokens" in judge.last_failure


def test_a_text_without_its_end_is_no_answer(llava, monkeypatch):
    """"I rate it 1", cut off in the middle of 10."""
    judge = reward.load(llava, reasoning="direct")
    end, hat = (WORDS.index(word) for word in ("</s>", "hat"))
    rows = torch.tensor([[hat, end, 0], [hat, hat, hat], [end, 0, 0], [hat, hat, end], [hat, hat, hat]])
    monkeypatch.setattr(judge.model, "generate", lambda input_ids, **_: torch.cat([input_ids, rows], 1))
    monkeypatch.setattr(judge.tokenizer, "batch_decode", lambda ids, **_: ["I rate it 1"] * len(ids))
    assert scores(judge).isnan().tolist() == [False, True, False, False, True]
    assert "cut off after 16 tokens" in judge.last_failure and "I rate it 1" in judge.last_failure
    monkeypatch.setattr(judge.model.generation_config, "eos_token_id", [hat, WORDS.index("dog")])      # several ends
    assert scores(judge).isnan().tolist() == [False, False, True, False, False]
    monkeypatch.setattr(judge.model.generation_config, "eos_token_id", None)
    assert scores(judge).isnan().all()


def test_a_model_that_can_do_both_is_told_whether_to_think(tmp_path, monkeypatch):
    """A hybrid model whose template thinks unless told otherwise."""
    template = TEMPLATE + "{% if enable_thinking is not defined or enable_thinking %} <think>{% endif %}"
    for reasoning in reward.ANSWERS:
        judge = reward.load(make_llava(tmp_path / reasoning, template=template), reasoning=reasoning)
        asked = scripted(judge, monkeypatch, lambda row: '</think> {"score": 5}')
        scores(judge)
        assert all(text.endswith("<think>" if reasoning == "think" else "answer") for text in asked[0])


def test_votes_are_averaged_and_drawn_anew_yet_reproducibly(llava, monkeypatch):
    """Votes that are all the same draw, that depend on earlier draws, or that disturb the run's random numbers."""
    judge, drawn = reward.load(llava, reasoning="direct", votes=3), []

    def generate(input_ids, do_sample, temperature, **_):
        assert do_sample and temperature == reward.VOTE_TEMPERATURE == .7
        drawn.append(torch.randint(10, (len(input_ids), 1)))
        return torch.cat([input_ids, drawn[-1], torch.full_like(drawn[-1], WORDS.index("</s>"))], 1)

    monkeypatch.setattr(judge.model, "generate", generate)
    monkeypatch.setattr(judge.tokenizer, "batch_decode", lambda ids, **_: [str(i) for i, _ in ids.tolist()])
    torch.manual_seed(5)
    want = torch.rand(1)
    torch.manual_seed(5)
    got = scores(judge)
    assert torch.equal(torch.rand(1), want), "the global generator moved"
    votes = torch.cat(drawn, 1).double() / 9
    assert votes.shape == (5, 3) and torch.allclose(got, votes.mean(1).float()) and votes.std(1).min() > 0
    assert torch.equal(scores(judge), got)
    assert not torch.equal(scores(judge, [(p.flip(0), text) for p, text in PROMPTS]), got)
    assert not torch.equal(scores(judge, [(p, text + " a") for p, text in PROMPTS]), got)


def test_one_answer_is_the_likeliest(llava, monkeypatch):
    """A single answer that is drawn: another score for the same picture, each time."""
    judge, options = reward.load(llava, reasoning="direct"), []
    monkeypatch.setattr(judge.model, "generate", lambda input_ids, **given: options.append(given) or input_ids)
    scores(judge)
    assert options[0]["do_sample"] is False and not options[0].get("temperature")


def test_answers_are_the_models_own(tmp_path):
    """Penalties and cut-offs of a model's generation_config.json: a digit of the question is less likely in the answer,
    votes are all the likeliest one."""
    shipped, other = ROOT / "shapes/judge", tmp_path / "judge"
    shutil.copytree(shipped, other)
    settings = json.loads((other / "generation_config.json").read_text())
    settings |= {"repetition_penalty": 5., "top_k": 1, "top_p": .1, "temperature": .01, "max_new_tokens": 3}
    (other / "generation_config.json").write_text(json.dumps(settings))
    tasks = make_tasks(8)
    images = stack_images(tasks)
    images = torch.stack([images, images.flip(3)], 1)
    for votes in (1, 4):
        plain, given = (reward.load(str(path), reasoning="think", votes=votes) for path in (shipped, other))
        want = plain(tasks, images, 0)
        assert torch.equal(given(tasks, images, 0), want) and len(want.unique()) > 2 + votes


def test_votes_that_fail_are_left_out(llava, monkeypatch, capsys):
    """One garbled vote of three that spoils the score, or counts as 0."""
    judge = reward.load(llava, reasoning="direct", votes=3)
    monkeypatch.setattr(judge, "answer", lambda questions, seeds: [
        (math.nan, "garbage") if (row + seed) % 3 == 0 else (.5, "5") for row, seed in enumerate(range(len(seeds)))])
    assert scores(judge)[1:3].tolist() == [.5] * 2
    capsys.readouterr()
    no, garbage, none = ((math.nan, text) for text in ("no", "garbage", "none"))
    answers = iter([[(.2, "a"), no], [garbage, no], [(.4, "b"), none]])
    monkeypatch.setattr(judge, "answer", lambda questions, seeds: next(answers))
    (mean, texts), (nothing, why) = judge.score(PROMPTS[:2])
    assert mean == pytest.approx(.3) and texts == "a\nb" and math.isnan(nothing) and why == "none"
    assert capsys.readouterr().err == "the judge failed in 4 of 6 answers: none\n"


# ---------------------------------------------------------------------------------------------------------------- cache

# --------------------------------------------------------------------------------------------------- what can be loaded

@pytest.mark.parametrize("options, words", [
    (dict(reasoning="logits", votes=4), "--votes 4 .*--reasoning direct or think"),
    (dict(reasoning="think", votes=0), "--votes 0 .*at least 1"), (dict(workers=0), "--judge-workers 0 .*at least 1"),
    (dict(reasoning="guess"), "--reasoning guess .*logits, direct, think"), (dict(judge=""), "--judge  "),
    (dict(judge="exact", reasoning="think"), "exact .*--reasoning"),
    (dict(judge="exact", rubric="r"), "exact .*--rubric"),
    (dict(judge="exact", reasoning="think", votes=4), "exact .*--votes"),
    (dict(judge="exact", scoring="trajectory"), "exact .*trajectory"), (dict(rubric="TMP/none"), "--rubric .*none"),
    (dict(rubric="TMP/text"), "--rubric .*JSON"), (dict(rubric="TMP/list"), "--rubric .*JSON"),
    (dict(rubric="TMP"), "--rubric .*JSON"), (dict(rubric="TMP/deep"), "--rubric .*JSON"),
    (dict(rubric="TMP/one"), "consistency must .*{instruction} or {instructions}"),
    (dict(rubric="TMP/no place"), "consistency must .*{instruction} or {instructions}"),
    (dict(rubric="TMP/number"), "beauty must be a text"), (dict(rubric="TMP/taken"), "no reward can be called drift"),
    (dict(rubric="TMP/turn", scoring="trajectory"), "following must be a text with {instructions}")])
def test_contradictory_wishes_are_refused_in_one_line(options, words, llava, tmp_path):
    """A wish that is silently not fulfilled: four votes that are one, a rubric that never sees the instruction."""
    good = {"following": "{instruction}?", "consistency": "{instructions}?"}
    for name, content in (("list", [1]), ("no place", good | {"consistency": "Good?"}), ("turn", good),
                          ("number", good | {"beauty": 3}),
                          ("taken", good | {"drift": "{instruction}?"}), ("one", {"following": "{instruction}?"})):
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "text").write_bytes(b"this is no JSON at all \xff")
    (tmp_path / "deep").write_text("[" * 100000)
    options = {n: v.replace("TMP", str(tmp_path)) if isinstance(v, str) else v for n, v in options.items()}
    with pytest.raises(ValueError, match=words) as error:
        reward.load(options.pop("judge", llava), **options)
    assert len(str(error.value).splitlines()) == 1


def test_ones_own_rubric_is_what_is_asked(llava, tmp_path, monkeypatch):
    """A rubric file that is read and forgotten, or whose third reward gets no column."""
    rubric = {"following": "Did it? {instruction}", "consistency": "Same? {instructions}",
              "beauty": "Nice? {instruction}"}
    (tmp_path / "rubric.json").write_text(json.dumps(rubric))
    judge, asked = reward.load(llava, rubric=str(tmp_path / "rubric.json")), []
    monkeypatch.setattr(judge, "answer", lambda questions, seeds: asked.extend(questions) or
                        [(.5, "")] * len(questions))
    assert judge([photograph("a", "b")], torch.zeros(1, 3, 3, 8, 8, dtype=torch.uint8), 1).shape == (1, 3)
    assert judge.names == list(rubric) and judge.weights == pytest.approx([1 / 3] * 3)
    assert [(len(p), text.split("\nAnswer")[0]) for p, text in asked] == [
        (2, "Did it? b"), (3, "Same? 1. a\n2. b"), (2, "Nice? b")]


def test_what_is_no_judge_is_refused_in_one_line(tmp_path):
    """A traceback of forty lines from a library, or a judge that loads and then fails at the first step."""
    from transformers import AutoProcessor
    names = ("empty", "config only", "broken config", "broken weights", "a tensor is missing", "no digits", "no template")
    folders = {name: tmp_path / name for name in names}
    for name, folder in folders.items():
        if name in ("empty", "config only"):
            folder.mkdir()
        else:
            make_llava(folder, [w for w in WORDS if name != "no digits" or w not in "789"])
    (folders["config only"] / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (folders["broken config"] / "config.json").write_text("{")
    (folders["broken weights"] / "model.safetensors").write_bytes(b"no weights")
    # the library would draw it at random, and only warn
    file = folders["a tensor is missing"] / "model.safetensors"
    state = load_file(file)
    del state[min(name for name in state if "mlp" in name)]
    save_file(state, file, {"format": "pt"})
    for file in ("chat_template.jinja", "chat_template.json"):
        (folders["no template"] / file).unlink(missing_ok=True)
    assert AutoProcessor.from_pretrained(folders["no template"]).chat_template is None
    nothing = [tmp_path / "nowhere", "../nowhere", "nobody/no-model-of-this-name", "exact,shapes/judge"]
    for path in [*nothing, *folders.values()]:
        with pytest.raises(ValueError) as error:
            reward.load(str(path))
        assert str(error.value).startswith(f"--judge {path} ") and len(str(error.value).strip().splitlines()) == 1
        assert len(str(error.value).split(": ", 1)[1]) > 5, "the reason is missing"


def test_the_shipped_judge_is_found_from_any_working_directory(tmp_path, monkeypatch):
    """The default --judge shapes/judge, taken for a model of the hub wherever the working directory is another."""
    monkeypatch.chdir(tmp_path)
    assert reward.load("shapes/judge").fingerprint == reward.load(str(ROOT / "shapes" / "judge")).fingerprint
    make_llava(tmp_path / "shapes" / "judge")                                     # nearer by: this one is meant
    assert reward.load("shapes/judge").fingerprint == reward.load(str(tmp_path / "shapes" / "judge")).fingerprint


def test_a_model_that_is_nowhere_costs_one_question_to_the_hub(monkeypatch, tmp_path):
    """Minutes without a word: a folder that is missing, looked for on the hub a dozen times with growing pauses."""
    import huggingface_hub
    import transformers
    asked = []

    def model_info(self, path, timeout):
        asked.append((path, timeout))
        raise OSError("Name or service\nnot known")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    processor = transformers.AutoProcessor
    monkeypatch.setattr(processor, "from_pretrained", lambda *_, **__: pytest.fail("the hub was asked again"))
    with pytest.raises(ValueError, match="^--judge somebody/judge .*: Name or service not known$"):
        reward.load("somebody/judge")
    assert asked == [("somebody/judge", 10)]
    # What was downloaded before is not asked about: it loads on machines without a network.
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda path, file: str(tmp_path / "config.json"))
    monkeypatch.setattr(processor, "from_pretrained", lambda path, **_: asked.append(str(path)) or 1 / 0)
    with pytest.raises(ValueError, match="division"):
        reward.load("somebody/judge")
    assert asked[1:] == ["somebody/judge"]


def test_a_fingerprint_is_of_what_the_scores_depend_on(llava, tmp_path, monkeypatch):
    """Scores of another model, prompt or mode taken for this one's; or the same judge, moved, for another."""
    first = reward.load(llava).fingerprint
    shutil.copytree(llava, tmp_path / "moved")
    assert reward.load(str(tmp_path / "moved"), workers=2).fingerprint == first
    rubric = {"following": "{instruction}?", "consistency": "{instructions}?"}
    (tmp_path / "rubric.json").write_text(json.dumps(rubric))
    others = [dict(reasoning="direct"), dict(reasoning="think"), dict(reasoning="direct", votes=2),
              dict(scoring="trajectory"), dict(rubric=str(tmp_path / "rubric.json"))]
    seen = [first, reward.load("exact").fingerprint] + [reward.load(llava, **options).fingerprint for options in others]
    (tmp_path / "rubric.json").write_text(json.dumps(rubric | {"following": "{instruction}!"}))
    seen.append(reward.load(llava, rubric=str(tmp_path / "rubric.json")).fingerprint)
    weights, template = tmp_path / "moved" / "model.safetensors", tmp_path / "moved" / "chat_template.jinja"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    seen.append(reward.load(str(tmp_path / "moved")).fingerprint)
    template.write_text(template.read_text() + " ")
    seen.append(reward.load(str(tmp_path / "moved")).fingerprint)
    assert len(set(seen)) == len(seen) == 10 and all(5 < len(name) < 20 for name in seen)
    (tmp_path / "shapes").mkdir()
    shutil.copy(ROOT / "shapes" / "world.py", tmp_path / "shapes")
    monkeypatch.setattr(reward, "__file__", str(tmp_path / "reward.py"))
    assert reward.load("exact").fingerprint == seen[1]
    with open(tmp_path / "shapes" / "world.py", "a") as file:
        file.write("# another world\n")
    assert reward.load("exact").fingerprint not in seen


def test_reward_is_imported_without_heavy_packages():
    """Seconds of waiting before a wrong flag is refused; a file that cannot be copied without the rest of this one."""
    body = ast.parse((ROOT / "reward.py").read_text()).body
    names = {alias.name.split(".")[0] for node in body if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module.split(".")[0] for node in body if isinstance(node, ast.ImportFrom)}
    assert names - sys.stdlib_module_names == {"numpy", "torch", "PIL"}


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is installed")
def test_a_qwen_judge_without_torchvision_is_refused_in_one_line(tmp_path):
    """Qwen2.5-VL, the judge of --preset kontext: its processor asks for torchvision, and the user must be told so."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    special = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    words, tiny = WORDS + special, dict(hidden_size=16, intermediate_size=32, initializer_range=.3)
    tokenizer = make_tokenizer(words, special)
    tokenizer.chat_template = TEMPLATE.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
    tokenizer.save_pretrained(tmp_path)
    Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=56 * 56).save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"processor_class": "Qwen2_5_VLProcessor"}))
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        text_config=dict(tiny, vocab_size=len(words), num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
                         rope_parameters=rope, bos_token_id=2, eos_token_id=0),
        vision_config=dict(tiny, depth=2, num_heads=2, out_hidden_size=16, fullatt_block_indexes=[1]),
        vision_start_token_id=words.index(special[0]), vision_end_token_id=words.index(special[1]),
        image_token_id=words.index(special[2]), video_token_id=words.index(special[3]))).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="(?i)^--judge .* requires the torchvision library") as error:
        reward.load(str(tmp_path))
    assert len(str(error.value).splitlines()) == 1


# --------------------------------------------------------------------------------------------------- the command line

def test_one_edit_is_scored_from_the_command_line(llava, tmp_path):
    """Pictures swapped on the way, another score than in training, no word of what the model saw."""
    for name, picture in zip(("before", "after"), PAIRS[0]):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / f"{name}.png")
    Image.new("RGB", (8, 9)).save(tmp_path / "small.png")
    Image.new("1", (15000, 15000)).save(tmp_path / "bomb.png")
    edit = [tmp_path / "before.png", tmp_path / "after.png", "add a hat"]
    code, out, err = run_script("reward.py", "--judge", llava, *edit)
    judge = reward.load(llava)
    want = judge([photograph("add a hat")], PAIRS[:1], 0)[0]
    lines = out.splitlines()
    assert code == 0, err
    assert [line.split() for line in lines[::2]] == [[n, f"{w:.3f}"] for n, w in zip(judge.names, want)]
    assert all("0: 0." in line and "of all" in line for line in lines[1::2])
    for words, arguments in {"no.png": [tmp_path / "no.png", *edit[1:]], "8": [tmp_path / "small.png", *edit[1:]],
                             "bomb": [tmp_path / "bomb.png", *edit[1:]]}.items():
        assert words in refused("reward.py", "--judge", llava, *arguments)
    assert "no words for 'add a zebra'" in refused("reward.py", "--judge", llava, *edit[:2], "add a zebra")
    assert "surrogate" in refused("reward.py", "--judge", llava, *edit[:2], "add a \udcff")
    assert "--votes 4 needs" in refused("reward.py", "--judge", llava, "--votes", 4, *edit)
    assert "--votes" in refused("reward.py", "--judge", llava, "--votes", "many", *edit)
    assert "--temperature" in refused("reward.py", "--judge", llava, "--temperature", .7, *edit)
    assert "embedded world" in refused("reward.py", "--judge", "exact", *edit)
    code, out, err = run_script("reward.py", "--judge", llava, "--reasoning", "direct", *edit)
    assert code == 2 and "Traceback" not in err and err.splitlines()[-1].startswith("reward.py: the judge failed")
    assert "following nan\n  its answer " in out and "consistency nan\n  its answer " in out


def test_votes_are_drawn_from_the_command_line(tmp_path):
    """Votes that crash, or that want a second flag to be drawn at all."""
    (instruction,), _, scenes = world.sample_dialogue(random.Random(7), 1)
    for name, picture in zip(("before.png", "after.png"), world.render(scenes)):
        Image.fromarray(picture).save(tmp_path / name)
    edit = [tmp_path / "before.png", tmp_path / "after.png", instruction]
    judge = ["--judge", ROOT / "shapes" / "judge", "--reasoning", "direct", "--votes", 3]
    code, out, err = run_script("reward.py", *judge, *edit)
    lines = out.splitlines()
    assert code == 0 and len(lines) == 8, err
    assert lines[0].split()[0] == "following" and lines[4].split()[0] == "consistency"
    assert sum(map(int, lines[1:4])) / 27 == pytest.approx(float(lines[0].split()[1]), abs=6e-4)


def test_the_original_and_the_earlier_instructions_reach_the_judge(llava, tmp_path):
    """Consistency against the picture just before, although the user gave the first one."""
    for name, picture in zip(("original", "before", "after"), PAIRS.flatten(0, 1)):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / f"{name}.png")
    rubric = {"following": "add {instruction}", "consistency": "{instructions}"}
    (tmp_path / "rubric.json").write_text(json.dumps(rubric))
    asked = ["--judge", llava, "--rubric", tmp_path / "rubric.json", "--original", tmp_path / "original.png"]
    edit = [tmp_path / "before.png", tmp_path / "after.png", "add a hat", "remove"]
    code, out, err = run_script("reward.py", *asked, *edit)
    judge = reward.load(llava, rubric=str(tmp_path / "rubric.json"))
    want = judge([photograph("add a hat", "remove")], PAIRS.flatten(0, 1)[None, :3], 1)[0]
    assert code == 0 and [line.split()[1] for line in out.splitlines()[::2]] == [f"{w:.3f}" for w in want], err
    assert want[0] != want[1]
