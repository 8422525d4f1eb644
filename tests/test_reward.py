"""Judges: the embedded world's exact one, and a vision-language model in process (tiny and random, built here)."""
import importlib.util
import json
import random

import numpy as np
import pytest
import torch
from PIL import Image

import data
import reward
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
ROW_3 = dict(pair=PAIRS[3], question=QUESTIONS[3])


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
    score = reward.load(folder).score(ROW_3["pair"][None], [ROW_3["question"]])
    assert score.shape == (1,) and abs(score.item() - by_hand(folder, **ROW_3)) < 1e-5


def test_a_batch_gives_each_row_the_score_it_gets_alone(judge):
    """Padding that is attended to, or that stands where the answer should; rows that come back in another order."""
    alone = torch.cat([judge.score(PAIRS[i:i + 1], QUESTIONS[i:i + 1]) for i in range(5)])
    assert alone.min() >= 0 and alone.max() <= 1 and alone.std() > .02
    for judge.micro in (2, 5):
        assert torch.allclose(judge.score(PAIRS, QUESTIONS), alone, atol=1e-5)


def test_a_score_depends_on_both_pictures_and_on_their_order(judge):
    """A judge that sees the picture after the edit only cannot say what was kept."""
    score = judge.score(PAIRS[:1], QUESTIONS[:1])
    (before, after), (other, _) = PAIRS[:2]
    for pair in ((after, before), (before, other), (other, after)):
        assert (judge.score(torch.stack(pair)[None], QUESTIONS[:1]) - score).abs() > 1e-3


def test_digits_are_found_through_the_tokenizer(judge, tmp_path):
    """One model's ids of the digits written into the code, or taken to be in a row: another model is read as noise."""
    words = random.Random(0).sample(WORDS, len(WORDS))
    other = reward.load(make_llava(tmp_path, words))
    assert other.digits.tolist() == [words.index(str(d)) for d in range(10)] != judge.digits.tolist()
    assert torch.allclose(other.score(PAIRS, QUESTIONS), judge.score(PAIRS, QUESTIONS), atol=1e-5)


def test_following_looks_at_the_turn_and_consistency_at_the_original(judge, monkeypatch):
    """Consistency against the picture just before: slow drift over the turns would never be seen."""
    asked, images = [], torch.randint(0, 256, (2, 3, 3, 8, 8), dtype=torch.uint8)

    def score(pairs, questions):
        asked.append((pairs, questions))
        return torch.full((2,), len(asked) / 10)

    monkeypatch.setattr(judge, "score", score)
    told = ["add a {hat}", "remove the dog", "never"], ["one", "two", "three"]
    tasks = [Task(None, instructions, [""] * 3) for instructions in told]
    assert judge.names == ["following", "consistency"]
    assert torch.equal(judge(tasks, images, 1), torch.tensor([[.1, .2]] * 2))
    assert torch.equal(asked[0][0], images[:, 1:]) and torch.equal(asked[1][0], images[:, [0, 2]])
    (following, _), (consistency, other) = asked[0][1], asked[1][1]
    assert "remove the dog" in following and "{hat}" not in following and "completely" in following
    assert "add a {hat}" in consistency and "remove the dog" in consistency and "unchanged" in consistency
    assert "never" not in consistency and "one" in other and "two" in other and "dog" not in other


def test_a_call_that_fails_gives_nan_in_its_row_only(judge, monkeypatch):
    """A failure that ends the run, counts as 0, or shifts or drops the rows beside it."""
    want, expectation = judge.score(PAIRS, QUESTIONS), judge.expectation

    def fails(pictures, questions):
        if QUESTIONS[1] in questions:
            raise RuntimeError("out of memory")
        return expectation(pictures, questions)

    monkeypatch.setattr(judge, "expectation", fails)
    judge.micro = 3
    got = judge.score(PAIRS, QUESTIONS)
    assert got.isnan().tolist() == [False, True, False, False, False]
    assert torch.allclose(got.nan_to_num(want[1].item()), want, atol=1e-5)
    monkeypatch.setattr(judge, "expectation", expectation)
    judge.model.get_output_embeddings().weight.data.fill_(float("nan"))          # a model that has no answer
    assert judge.score(PAIRS, QUESTIONS).isnan().all()


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
