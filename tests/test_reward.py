"""Judges: the embedded world's exact one, and a vision-language model in process (tiny and random, built here)."""
import importlib.util
import json
import math
import random

import numpy as np
import pytest
import torch
from PIL import Image

import data
import reward
from fixtures import refused, run_script
from rollout import Task
from shapes import world


# --------------------------------------------------------------------------------------------------------- exact judge

def test_the_exact_judge_keeps_rows_columns_and_turns_apart():
    """Columns swapped, a picture judged against another task, another turn, or the picture before the edit."""
    judge = reward.load("exact")
    assert judge.names == ["following", "consistency", "success"] and len(judge.weights) == 3 and judge.weights[2] == 0
    tasks = [task for task in data.load("shapes", "test", 3, limit=6) for _ in range(2)]         # S = 12: groups of 2
    good = torch.from_numpy(np.stack([world.render(task.meta["scenes"]) for task in tasks]))     # (S, 4, H, W, 3)
    good = good.permute(0, 1, 4, 2, 3)
    for k in range(3):
        images = good[:, :k + 2].clone()
        images[1::2, k + 1] = images[1::2, k]                        # the second of each group: nothing done
        r = judge(tasks, images, k)
        after, before = (images[:, i].permute(0, 2, 3, 1).numpy() for i in (-1, -2))
        success, following, consistency = world.judge(after, before, [task.meta["scenes"][:k + 2] for task in tasks])
        assert r.shape == (12, 3) and r.dtype == torch.float32
        assert torch.equal(r, torch.tensor(np.stack([following, consistency, success], 1)))
        assert r[:, 2].tolist() == [1, 0] * 6 and r.min() >= 0 and r.max() <= 1


def test_the_exact_judge_refuses_pictures_of_the_real_world():
    """A KeyError in a background thread, an hour into a run on one's own pictures."""
    tasks = [Task(Image.new("RGB", (48, 48)), ["Add a hat"], [""])]
    with pytest.raises(ValueError, match="embedded world only"):
        reward.load("exact")(tasks, torch.zeros(1, 2, 3, 48, 48, dtype=torch.uint8), 0)


# ----------------------------------------------------------------------------------------------------------- VLM judge

WORDS = ["<pad>", "<unk>", "<s>", "<image>", *"0123456789", "add", "a", "hat", "remove", "the", "dog", "answer"]
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
                                   additional_special_tokens=special)


def make_llava(folder, words=WORDS, template=TEMPLATE):
    """A random LLaVA whose weights belong to words, not to ids: `words` in another order makes the same model."""
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
                         eos_token_id=None),
        vision_config=dict(tiny, model_type="clip_vision_model", image_size=16, patch_size=8, projection_dim=16),
        image_token_id=words.index("<image>"), image_seq_length=4))
    order = torch.tensor([WORDS.index(w) for w in words if w in WORDS])
    with torch.no_grad():
        for weight in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
            weight[:len(order)] = torch.randn(len(WORDS), 16)[order]
    model.save_pretrained(folder)
    return str(folder)


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


def test_a_judge_without_the_words_refuses(judge):
    """The embedded world's tiny judge, asked about photographs: it would score noise in silence."""
    task = lambda text: Task(Image.new("RGB", (48, 48)), ["add a hat", text], ["", ""])
    judge.check([task("remove the dog")])
    with pytest.raises(ValueError, match="no words for 'remove the zebra'"):
        judge.check([task("remove the dog"), task("remove the zebra")])


def test_a_batch_gives_each_row_the_score_it_gets_alone(judge):
    """Padding that is attended to, or that stands where the answer should; rows that come back in another order."""
    alone = torch.cat([scores(judge, [prompt]) for prompt in PROMPTS])
    assert alone.min() >= 0 and alone.max() <= 1 and alone.std() > .02
    for judge.workers in (2, 5):
        assert torch.allclose(scores(judge), alone, atol=1e-5)


def test_a_score_depends_on_both_pictures_and_on_their_order(judge):
    """A judge that sees the picture after the edit only cannot say what was kept."""
    score = scores(judge, PROMPTS[:1])
    (before, after), (other, _) = PAIRS[:2]
    for pair in ((after, before), (before, other), (other, after)):
        assert (scores(judge, [(torch.stack(pair), QUESTIONS[0])]) - score).abs() > 1e-3


def test_digits_are_found_through_the_tokenizer(judge, tmp_path):
    """One model's ids of the digits written into the code, or taken to be in a row: another model is read as noise."""
    words = random.Random(0).sample(WORDS, len(WORDS))
    other = reward.load(make_llava(tmp_path, words))
    assert other.digits.tolist() == [words.index(str(d)) for d in range(10)] != judge.digits.tolist()
    assert torch.allclose(scores(other), scores(judge), atol=1e-5)


def test_digits_that_hold_little_of_the_probability_are_told_of(judge, capsys):
    """Scores read off a model that was about to say something else, and nobody notices."""
    assert judge.expect([.1] * 9 + [.05])[0] == pytest.approx((.1 * 36 + .05 * 9) / .95 / 9)
    assert capsys.readouterr().err == ""
    assert judge.expect([0, .1, 0, 0, 0, .3, 0, 0, 0, 0])[0] == pytest.approx((.1 * 1 + .3 * 5) / .4 / 9)
    assert "only 40.0%" in capsys.readouterr().err
    judge.expect([.02] * 10)
    assert capsys.readouterr().err == "", "said once, not for every picture"
    assert all(isinstance(judge.expect(p), reward.Failed) for p in ([0.] * 10, [math.nan] * 10))


def test_following_looks_at_the_turn_and_consistency_at_the_original_too(llava, monkeypatch):
    """Consistency against the picture just before alone: slow drift over the turns would never be seen."""
    images = torch.randint(0, 256, (2, 4, 3, 8, 8), dtype=torch.uint8)
    told = ["one", "add a {hat}", "remove {instructions}", "never"], ["first", "second", "third", "never"]
    tasks = [Task(None, instructions, [""] * 4) for instructions in told]
    for scoring in ("turn", "trajectory"):
        judge, asked = reward.load(llava, scoring=scoring), []
        monkeypatch.setattr(judge, "answer", lambda prompts, seeds: asked.extend(prompts) or
                            [(i / 10, "") for i, _ in enumerate(prompts)])
        assert judge.names == ["following", "consistency"]
        assert torch.allclose(judge(tasks, images, 2), torch.tensor([[0, .2], [.1, .3]]))
        pictures, texts = zip(*asked)
        rows = [[2, 3]] * 2 + [[0, 2, 3]] * 2 if scoring == "turn" else [[0, 3]] * 4
        assert all(torch.equal(p, images[i % 2, row]) for i, (p, row) in enumerate(zip(pictures, rows)))
        assert all("never" not in text and text.endswith(reward.ANSWERS["logits"]) for text in texts)
        assert "remove {instructions}" in texts[0] and "third" in texts[1] and "exactly" in texts[0]
        assert all(word in texts[2] for word in ("1. one", "2. add a {hat}", "3. remove {instructions}", "unchanged"))
        assert ("1. one" in texts[0]) == (scoring == "trajectory")


def test_a_call_that_fails_gives_nan_in_its_row_only(judge, monkeypatch, capsys):
    """A failure that ends the run, counts as 0, or shifts or drops the rows beside it."""
    want, forward = scores(judge), judge.forward

    def fails(prompts, seed):
        if any(text == QUESTIONS[1] for _, text in prompts):
            raise RuntimeError("out of memory")
        return forward(prompts, seed)

    monkeypatch.setattr(judge, "forward", fails)
    for judge.workers in (1, 3, 5):
        got = scores(judge)
        assert got.isnan().tolist() == [False, True, False, False, False]
        assert torch.allclose(got.nan_to_num(want[1].item()), want, atol=1e-5)
        assert judge.words == "RuntimeError: out of memory" and "1 of 5" in capsys.readouterr().err
    monkeypatch.setattr(judge, "forward", forward)
    judge.model.get_output_embeddings().weight.data.fill_(float("nan"))          # a model that has no answer
    assert scores(judge).isnan().all()


# ---------------------------------------------------------------------------------------------------- generated answers

@pytest.mark.parametrize("reasoning, text, want", [
    ("direct", "7", 7), ("direct", " 9.\n", 9), ("direct", "Score: 4", 4), ("direct", "3.5", 3.5),
    ("direct", "<think>It is 2 or 3</think>\n\n8", 8), ("direct", "10", None), ("direct", "-1", None),
    ("direct", "7/9", None), ("direct", "good", None), ("direct", "", None), ("direct", "<think>It is 2", None),
    ("think", 'A star. {"score": 6}', 6), ("think", '```json\n{"why": "x", "score": 0}\n```', 0),
    ("think", '{"score": 1} no: {"score": 8.5 }', 8.5), ("think", 'It is 3</think>{"score": 2}', 2),
    ("think", '<think>{"score": 3}', None), ("think", '<think>{"score": 3}</think> none', None), ("think", '{"score": 12}', None),
    ("think", '{"score": -1}', None), ("think", '{"score": "7"}', None), ("think", '{"score": true}', None),
    ("think", '{"score": NaN}', None), ("think", '{"score": 7', None), ("think", '{"points": 7}', None), ("think", "7", None),
    ("think", "{7}", None), ("think", '{"score": [7]}', None), ("think", "", None)])
def test_a_generated_answer_is_read_strictly(reasoning, text, want):
    """A score out of range that is clamped, a number of the reasoning taken for the score, a half answer taken for a whole."""
    judge = reward.VLMJudge("", "", reward.RUBRICS["turn"], "turn", reasoning, 1, 0., 1, None)
    answer = judge.read(text)
    assert isinstance(answer, reward.Failed) if want is None else answer == (want / 9, text.strip())


def scripted(judge, monkeypatch, answer):
    """Let `answer(row)` be what the model generates for the row of a batch; returns the texts it was asked."""
    asked, processor = [], judge.processor

    def processed(text, **rest):
        asked.append(text)
        return processor(text=text, **rest)
    processed.apply_chat_template = processor.apply_chat_template
    monkeypatch.setattr(judge, "processor", processed)
    monkeypatch.setattr(judge.model, "generate", lambda input_ids, **_: torch.cat([input_ids, input_ids[:, -1:]], 1))
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
        judge.tokenizer.batch_decode = lambda ids, **_: ['Is it 3? {"score": 3}'] * len(ids)       # cut off
        assert scores(judge).isnan().all() and "still thinking" in judge.words


def test_a_model_that_can_do_both_is_told_whether_to_think(tmp_path, monkeypatch):
    """A hybrid model whose template thinks unless told otherwise."""
    template = TEMPLATE + "{% if enable_thinking is not defined or enable_thinking %} <think>{% endif %}"
    for reasoning in reward.ANSWERS:
        judge = reward.load(make_llava(tmp_path / reasoning, template=template), reasoning=reasoning)
        asked = scripted(judge, monkeypatch, lambda row: '</think> {"score": 5}')
        scores(judge)
        assert all(text.endswith("<think>") == (reasoning == "think") for text in asked[0])


def test_votes_are_averaged_and_drawn_anew_yet_reproducibly(llava, monkeypatch):
    """Votes that are all the same draw, that depend on what was drawn before, or that disturb the run's random numbers."""
    judge = reward.load(llava, reasoning="direct", votes=3, temperature=.7)
    judge.spec, judge.version, drawn = "tiny", 0, []               # of which the seeds are a function: not of this run's folder and clock

    def generate(input_ids, do_sample, temperature, **_):
        assert do_sample and temperature == .7
        drawn.append(torch.randint(6 if len(drawn) == 3 else 10, (len(input_ids), 1)))
        return torch.cat([input_ids, drawn[-1]], 1)

    monkeypatch.setattr(judge.model, "generate", generate)
    monkeypatch.setattr(judge.tokenizer, "batch_decode", lambda ids, **_: [str(i) for i, in ids.tolist()])
    torch.manual_seed(5)
    want = torch.rand(1)
    torch.manual_seed(5)
    got = scores(judge)
    assert torch.equal(torch.rand(1), want), "the global generator moved"
    votes = drawn[0].view(5, 3).double() / 9
    assert torch.allclose(got, votes.mean(1).float()) and votes.std(1).min() > 0
    assert torch.equal(scores(judge), got)
    assert not torch.equal(scores(judge, [(p.flip(0), text) for p, text in PROMPTS]), got)


def test_a_vote_that_fails_is_drawn_again_and_then_left_out(llava, monkeypatch, capsys):
    """One garbled vote of three that spoils the score, counts as 0, or is asked for for ever."""
    judge = reward.load(llava, reasoning="direct", votes=3, temperature=.7)
    calls = []

    def forward(prompts, seed):
        calls.append((len(prompts), seed))
        return [(.5, "") if i % 3 else reward.Failed("garbage") for i in range(len(prompts))]

    monkeypatch.setattr(judge, "forward", forward)
    assert scores(judge).tolist() == [.5] * 5                     # of 15 draws 5, 2, 1 fail in turn
    assert [n for n, _ in calls] == [15, 5, 2] and len({seed for _, seed in calls}) == 3
    assert "in 1 of 15 calls" in capsys.readouterr().err
    monkeypatch.setattr(judge, "forward", lambda prompts, seed: [reward.Failed("garbage")] * len(prompts))
    assert scores(judge).isnan().all()


# ---------------------------------------------------------------------------------------------------------------- cache

def test_the_cache_answers_for_the_same_question_only(llava, tmp_path, monkeypatch):
    """An answer for another picture, instruction, way of asking or model; failures that are remembered for ever."""
    file = str(tmp_path / "new" / "scores")
    judge = reward.load(llava, judge_cache=file)
    want = judge.score(PROMPTS)
    asked = []

    def fails(prompts, seeds):
        asked.append(len(prompts))
        return [reward.Failed("asked")] * len(prompts)

    again = reward.load(llava, judge_cache=file)
    monkeypatch.setattr(again, "answer", fails)
    assert again.score(PROMPTS) == want and asked == []
    (pair, question), other = PROMPTS[0], PAIRS[0].clone()
    other[1, 2, 5, 5] ^= 1
    for prompt in ((other, question), (pair.flip(0), question), (pair.view(2, 3, 40, 24), question), (pair, question + " ")):
        (score, _), = again.score([prompt])
        assert math.isnan(score), "another question"
    assert asked == [1] * 4
    for changes in (dict(reasoning="direct"), dict(version="trained further"), dict(spec="another model")):
        monkeypatch.setattr(again, next(iter(changes)), next(iter(changes.values())))
        assert all(math.isnan(score) for score, _ in again.score(PROMPTS))
        monkeypatch.undo()
        monkeypatch.setattr(again, "answer", fails)
    monkeypatch.setattr(again, "answer", lambda prompts, seeds: [(.25, "now")] * len(prompts))
    assert again.score([(other, question), PROMPTS[0]]) == [(.25, "now"), want[0]], "a failure was remembered"


def test_equal_questions_are_asked_once(judge, monkeypatch):
    """Groups whose samples came out the same cost G calls; or their order gets lost."""
    asked = []
    monkeypatch.setattr(judge, "answer", lambda prompts, seeds: asked.extend(t for _, t in prompts) or
                        [(len(text) / 100, "") for _, text in prompts])
    got = scores(judge, [PROMPTS[i] for i in (0, 1, 0, 2, 1, 0)])
    assert sorted(asked) == sorted(QUESTIONS[:3])
    assert torch.allclose(got, torch.tensor([len(QUESTIONS[i]) / 100 for i in (0, 1, 0, 2, 1, 0)]))


# --------------------------------------------------------------------------------------------------- what can be loaded

def test_several_judges_give_their_columns_side_by_side(llava, tmp_path):
    """Columns of one judge under another's name; names that clash, so that one metric overwrites another."""
    second = make_llava(tmp_path / "other", random.Random(0).sample(WORDS, len(WORDS)))
    judge = reward.load(f"{llava}, exact,{second}")
    assert judge.names == ["following", "consistency", "exact:following", "exact:consistency", "exact:success",
                           "other:following", "other:consistency"]
    assert judge.weights == pytest.approx([1 / 6, 1 / 6, .8 / 3, .2 / 3, 0, 1 / 6, 1 / 6])
    tasks = data.load("shapes", "test", 2, limit=3)
    images = torch.from_numpy(np.stack([world.render(t.meta["scenes"]) for t in tasks])).permute(0, 1, 4, 2, 3)[:, :2]
    parts = [reward.load(spec)(tasks, images, 0) for spec in (llava, "exact", second)]
    assert torch.allclose(judge(tasks, images, 0), torch.cat(parts, 1), atol=1e-6)
    assert len(set(reward.load(f"{llava},{llava},{llava}").names)) == 6
    with pytest.raises(ValueError, match="embedded world only"):
        judge.check([Task(None, ["add"], [""])])


@pytest.mark.parametrize("options, words", [
    (dict(reasoning="logits", votes=4, temperature=.7), "--votes 4 .*--temperature 0.7 .*logits"),
    (dict(temperature=.7), "--temperature 0.7 .*logits"), (dict(reasoning="think", votes=4), "--votes 4 at --temperature 0"),
    (dict(reasoning="think", votes=0), "--votes 0 .*at least 1"), (dict(reasoning="think", temperature=-1.), "--temperature -1"),
    (dict(reasoning="think", temperature=math.nan), "--temperature nan"), (dict(judge_workers=0), "--judge-workers 0"),
    (dict(judge_timeout=0.), "--judge-timeout 0"), (dict(reasoning="guess"), "--reasoning guess .*logits, direct, think"),
    (dict(reasoning="think", temperature=.7, judge_cache="TMP/c"), "--judge-cache .*--temperature 0.7"),
    (dict(judge_cache="TMP"), "--judge-cache .*no SQLite file"), (dict(judge_cache="TMP/no cache"), "no SQLite file"),
    (dict(judge="exact", reasoning="think"), "--reasoning think .*exact"), (dict(judge="exact", judge_cache="c"), "--judge-cache c .*exact"),
    (dict(judge="exact,JUDGE", scoring="trajectory"), "--scoring trajectory.*exact"), (dict(rubric="TMP/none"), "--rubric .*none"),
    (dict(rubric="TMP/no cache"), "--rubric .*JSON"), (dict(rubric="TMP/list"), "following and consistency"),
    (dict(rubric="TMP/no place"), "consistency must .*{instruction} or {instructions}"),
    (dict(rubric="TMP/turn", scoring="trajectory"), "following must be a text with {instructions}")])
def test_contradictory_wishes_are_refused_in_one_line(options, words, llava, tmp_path):
    """A wish that is silently not fulfilled: four votes that are one, a rubric that never sees the instruction."""
    (tmp_path / "no cache").write_bytes(b"this is no database file at all" * 40)
    good = {"following": "{instruction}?", "consistency": "{instructions}?"}
    for name, content in (("list", [1]), ("no place", good | {"consistency": "Good?"}), ("turn", good)):
        (tmp_path / name).write_text(json.dumps(content))
    options = {n: v.replace("TMP", str(tmp_path)) if isinstance(v, str) else v for n, v in options.items()}
    with pytest.raises(ValueError, match=words) as error:
        reward.load(options.pop("judge", llava).replace("JUDGE", llava), **options)
    assert len(str(error.value).splitlines()) == 1


def test_ones_own_rubric_is_what_is_asked(llava, tmp_path, monkeypatch):
    """A rubric file that is read and forgotten, or whose third reward gets no column."""
    rubric = {"following": "Did it? {instruction}", "consistency": "Same? {instructions}", "beauty": "Nice? {instruction}"}
    (tmp_path / "rubric.json").write_text(json.dumps(rubric))
    judge, asked = reward.load(llava, rubric=str(tmp_path / "rubric.json")), []
    monkeypatch.setattr(judge, "answer", lambda prompts, seeds: asked.extend(prompts) or [(.5, "")] * len(prompts))
    assert judge(([Task(None, ["a", "b"], [""] * 2)]), torch.zeros(1, 3, 3, 8, 8, dtype=torch.uint8), 1).shape == (1, 3)
    assert judge.names == list(rubric) and judge.weights == pytest.approx([1 / 3] * 3)
    assert [(len(p), text.split("\nAnswer")[0]) for p, text in asked] == [
        (2, "Did it? b"), (3, "Same? 1. a\n2. b"), (2, "Nice? b")]


def test_what_is_no_judge_is_refused_in_one_line(tmp_path):
    """A traceback of forty lines from a library, or a judge that loads and then fails at the first step."""
    from transformers import AutoProcessor
    names = ("empty", "config only", "broken config", "broken weights", "no digits", "no template")
    folders = {name: tmp_path / name for name in names}
    for name, folder in folders.items():
        if name in ("empty", "config only"):
            folder.mkdir()
        else:
            make_llava(folder, [w for w in WORDS if name != "no digits" or w not in "789"])
    (folders["config only"] / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (folders["broken config"] / "config.json").write_text("{")
    (folders["broken weights"] / "model.safetensors").write_bytes(b"no weights")
    for file in ("chat_template.jinja", "chat_template.json"):
        (folders["no template"] / file).unlink(missing_ok=True)
    assert AutoProcessor.from_pretrained(folders["no template"]).chat_template is None
    for path in [tmp_path / "nowhere", "nobody/no-model-of-this-name", *folders.values()]:
        with pytest.raises(ValueError) as error:
            reward.load(str(path))
        assert str(error.value).startswith(f"--judge {path} ") and len(str(error.value).strip().splitlines()) == 1
        assert len(str(error.value).split(": ", 1)[1]) > 5, "the reason is missing"


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is installed: the processor loads")
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
    edit = [tmp_path / "before.png", tmp_path / "after.png", "Add a hat"]
    code, out, err = run_script("reward.py", "--judge", llava, *edit)
    judge = reward.load(llava)
    want = judge(([Task(None, ["Add a hat"], [""])]), PAIRS[:1], 0)[0]
    lines = out.splitlines()
    assert code == 0 and [line.split() for line in lines[::2]] == [[n, f"{w:.3f}"] for n, w in zip(judge.names, want)], err
    assert all("0: 0." in line and "of all" in line for line in lines[1::2])
    bad = {"no/such.png .*|no picture": [tmp_path / "no.png", *edit[1:]], "8 x 9": [tmp_path / "small.png", *edit[1:]]}
    for words, arguments in bad.items():
        assert any(word in refused("reward.py", "--judge", llava, *arguments) for word in words.split(" .*|"))
    assert "embedded world" in refused("reward.py", "--judge", "exact", *edit)
    assert "the judge failed" in run_script("reward.py", "--judge", llava, "--reasoning", "think", *edit)[2]
