"""Judges: they look at a picture before and after an edit and say how good the edit was.

    judge = load("exact")                               # the embedded world's own: reads the pictures symbolically
    judge = load("path/or/hub-id", reasoning="think")   # a vision-language model in process
    judge = load("http://host:8000/v1#model")           # ... behind an OpenAI-compatible server, with OPENAI_API_KEY
    judge.check(tasks)                                  # ValueError if it cannot judge these
    pending = judge.start(tasks, images, k)             # a Future: turn k is judged while turn k+1 is sampled
    r = pending.result()                                # (S, R) in [0, 1]; NaN where the judge failed, never 0
    r = judge(tasks, images, k)                         # the same, without a Future
    judge.names, judge.weights, judge.last_failure      # of the R columns; "" or what went wrong last

tasks: S of them. images: (S, k+2, 3, H, W) uint8, [:, 0] the source, [:, k] before turn k, [:, k+1] after it.
A judge of your own has names, weights, fingerprint and rewards(), as ExactJudge. One edit by hand:

    python reward.py --judge SPEC before.png after.png "instruction"
"""
import base64
import hashlib
import io
import json
import math
import os
import re
import sys
import time
import urllib.request
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

# What a model is asked, unless --rubric FILE holds a JSON object {"following": ..., "consistency": ..., others}.
# A prompt with {instruction}, this turn's, is asked about the pictures before and after. One with {instructions},
# all so far, sees the original besides, so that slow drift counts. "trajectory": the original and the last picture.
DONE = "Was exactly this done, completely and cleanly?"
KEPT = "Is everything that they do not ask for unchanged, and as sharp as before?"
STEPS = "Picture 1 was edited into picture 2, in steps. The instructions were:\n{instructions}\n"
RUBRICS = {
    "turn": {
        "following": 'Picture 1 was edited into picture 2. The instruction was: "{instruction}". ' + DONE,
        "consistency": "Picture 1 is the original, picture 2 was edited into picture 3. The instructions so far, "
                       "the last one for this edit:\n{instructions}\n" + KEPT},
    "trajectory": {"following": STEPS + DONE, "consistency": STEPS + KEPT}}
DIGIT = "Answer with one digit from 0 (not at all) to 9 (perfectly)."
THINK = 'Say what you see. Then end with the score from 0 (not at all) to 9 (perfectly) as JSON: {"score": N}'
ANSWERS = {"logits": DIGIT, "direct": DIGIT, "think": THINK}
# What counts as one: a single ASCII digit that is no part of a word or a number; a JSON object at the very end.
SCORE = {"direct": r"(?:\D*[^-+\u2212\u2013.,/\w])?([0-9])(?![/%\w]|[.,]\w)\D*",
         "think": r'.*\{[^{}]*"score"\s*:\s*([0-9](?:\.[0-9]+)?)\s*(?:,[^{}]*)?\}[\s`*.]*'}
TOKENS = {"logits": 1, "direct": 16, "think": 2048}          # an answer's length at most
TIMEOUT = {"logits": 120., "direct": 120., "think": 600.}    # seconds that a server may be silent
TRIES, PAUSE = 3, 1.    # calls for an answer at most; seconds before the second, then doubled
VOTE_TEMPERATURE = .7
TAKEN = "judge seed pass task turn kind copied drift success possible".split()    # what eval.py calls other things
REMEMBERED = 800        # pictures that a model on a CPU need not look at again
# Asked when a judge is loaded: what does not work is said at once, and not an hour into the run.
TRIAL = "following", torch.full((3, 3, 64, 64), 128, dtype=torch.uint8), ["Nothing"]


def load(spec, device="cpu", rubric="", reasoning="logits", votes=1, scoring="turn", workers=32, bf16=True):
    """A judge: "exact", a vision-language model's folder or hub id, or a server's http://host:port/v1#model.

    rubric: JSON file of prompts in place of RUBRICS. reasoning: logits (expectation over the ten digits, one forward) |
    direct (a generated digit) | think (a text that ends with the score). votes: answers averaged, drawn if several.
    scoring: turn | trajectory. workers: requests under way, or rows in a forward. ValueError: no such judge, or wishes
    that contradict each other. bf16: a CPU that is faster in bfloat16 multiplies in it.
    """
    asking = rubric, scoring, reasoning, votes, workers
    problems = {
        f"--reasoning {reasoning} is none of {', '.join(ANSWERS)}": reasoning not in ANSWERS,
        f"--votes {votes} and --judge-workers {workers} must be at least 1": min(votes, workers) < 1,
        f"--votes {votes} needs --reasoning direct or think: logits draws nothing": votes > 1 and reasoning == "logits",
        "--judge exact takes no --rubric, --reasoning or --votes, and scores no trajectory as a whole":
            spec == "exact" and asking[:-1] != ("", "turn", "logits", 1)}
    for problem, found in problems.items():
        if found:
            raise ValueError(problem)
    if spec == "exact":
        return ExactJudge()
    asking = read_rubrics(rubric, scoring), *asking[1:]
    try:
        judge = ServedJudge(spec, *asking) if re.match("https?://", spec) else LocalJudge(spec, device, bf16, *asking)
    # transformers raises many kinds for what is no such model, damaged, or not installed.
    except Exception as error:
        reason = one_line(error) or type(error).__name__
        wanted = "neither 'exact' nor a folder, hub id or server that works"
        raise ValueError(f"--judge {spec} is {wanted}: {reason}") from None
    everything = judge.model_digest, ANSWERS[reasoning], VOTE_TEMPERATURE, asking[:-1]
    judge.fingerprint = hashlib.sha256(repr(everything).encode()).hexdigest()[:16]
    return judge


def read_rubrics(path, scoring):
    """The prompts {name: text}: ours, or those of a JSON file. ValueError says what is wrong with it."""
    if not path:
        return RUBRICS[scoring]
    try:
        rubrics = dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"--rubric {path} is no file with a JSON object in it: {error}") from None
    places = ["{instructions}"] if scoring == "trajectory" else ["{instruction}", "{instructions}"]
    for name in ["following", "consistency", *rubrics]:
        text = rubrics.get(name)
        if not isinstance(text, str) or not any(place in text for place in places):
            raise ValueError(f"--rubric {path}: {name} must be a text with {' or '.join(places)} in it")
        if name in TAKEN:
            raise ValueError(f"--rubric {path}: no reward can be called {name}, nor {', '.join(TAKEN)}")
    return rubrics


def one_line(text):
    return " ".join(str(text).split())[:500]


class Judge:
    """What all judges share: where they work, and what happens when one breaks down."""
    last_failure = ""
    thread = None    # one of its own, for one turn after the other; None: it works in its caller's

    def check(self, tasks):
        """ValueError if these tasks cannot be judged."""

    def start(self, tasks, images, k):
        """Judge turn k: a Future of r (S, R) float32. A ValueError (refused input) comes out of its result()."""
        if self.thread:
            return self.thread.submit(self, tasks, images, k)
        future = Future()
        try:
            future.set_result(self(tasks, images, k))
        except ValueError as error:
            future.set_exception(error)
        return future

    def __call__(self, tasks, images, k):
        try:
            return self.rewards(tasks, images, k)
        except ValueError:
            raise
        except Exception as error:
            self.fail(f"{type(error).__name__}: {error}", f"on turn {k + 1}")
            return torch.full((len(tasks), len(self.names)), math.nan)

    def fail(self, reason, where):
        self.last_failure = one_line(reason)
        print(f"the judge failed {where}: {self.last_failure}", file=sys.stderr)


class ExactJudge(Judge):
    """The embedded world's own judge (shapes/world.py): needs tasks with meta["scenes"] and meta["operations"]."""
    # graded IF, CC, IF as 0 or 1, and whether the turn could be done after what the editor had chosen
    names = ["following", "consistency", "success", "possible"]
    weights = [.8, .2, 0., 0.]                         # graded scores only: groups of equal 0s and 1s teach nothing

    def __init__(self):
        source = Path(__file__).parent / "shapes" / "world.py"
        self.fingerprint = hashlib.sha256(source.read_bytes()).hexdigest()[:16]

    def check(self, tasks):
        if any("operations" not in task.meta for task in tasks):
            raise ValueError("--judge exact knows the embedded world only; other pictures need a vision-language model")

    def rewards(self, tasks, images, k):
        from shapes import world
        self.check(tasks)
        pixels = images.permute(0, 1, 3, 4, 2).numpy()
        starts, operations = ([task.meta[name] for task in tasks] for name in ("scenes", "operations"))
        scenes, possible = world.resolve([start[0] for start in starts], operations, pixels)
        success, following, consistency = world.judge(pixels[:, -1], pixels[:, -2], scenes)
        possible = possible[:, k].astype(np.float32)
        return torch.from_numpy(np.stack([following, consistency, success, possible], 1))


class VLMJudge(Judge):
    """What a vision-language model in process and one behind a server share. They differ in answer(questions, seeds).

    A question is (pictures (n, 3, H, W) uint8, text); an answer (score in [0, 1], what was said), or (NaN, why not).
    """

    def __init__(self, rubrics, scoring, reasoning, votes=1, workers=32):
        self.rubrics, self.scoring, self.reasoning = rubrics, scoring, reasoning
        self.votes, self.workers = votes, workers
        self.names, self.weights = list(rubrics), [1 / len(rubrics)] * len(rubrics)

    def rewards(self, tasks, images, k):
        questions = []
        for name in self.names:
            for task, pictures in zip(tasks, images):
                questions.append(self.prompt(name, pictures, task.instructions[:k + 1]))
        scores = torch.tensor([score for score, _ in self.score(questions)])
        return scores.view(len(self.names), len(tasks)).T

    def prompt(self, name, images, instructions):
        """The question about a reward, of the pictures (k+2, 3, H, W) and the k+1 instructions so far."""
        text = self.rubrics[name]
        rows = [0, -2, -1] if "{instructions}" in text else [-2, -1]
        rows = [0, -1] if self.scoring == "trajectory" else rows
        numbered = "\n".join(f"{i}. {instruction}" for i, instruction in enumerate(instructions, 1))
        fill = {"{instruction}": instructions[-1], "{instructions}": numbered}
        text = re.sub(r"\{instructions?\}", lambda place: fill[place[0]], text)
        return images[rows], text + "\n" + ANSWERS[self.reasoning]

    def score(self, questions):
        """Questions -> an answer each, the mean of its votes; votes that fail are left out."""
        # A seed is a function of the question, in whatever order it is asked; in process, of a batch's first question.
        seeds = [zlib.crc32(pictures.numpy().tobytes(), zlib.crc32(text.encode())) for pictures, text in questions]
        rounds = [self.answer(questions, [seed + vote for seed in seeds]) for vote in range(self.votes)]
        reasons = [text for answers in rounds for score, text in answers if math.isnan(score)]
        if reasons:
            self.fail(reasons[-1], f"in {len(reasons)} of {len(questions) * self.votes} answers")
        results = []
        for votes in zip(*rounds):
            good = [vote for vote in votes if not math.isnan(vote[0])] or votes[-1:]
            scores, texts = zip(*good)
            results.append((sum(scores) / len(scores), "\n".join(texts)))
        return results

    def read(self, text, cut=False):
        """A generated text, cut off at its length limit or not -> an answer."""
        said = text.rpartition("</think>")[2]    # a thinking model's own block comes first
        found = re.fullmatch(SCORE[self.reasoning], said, re.DOTALL)
        others = set(re.findall(r'"score"\s*:\s*"?(-?[0-9.]+)', said))
        if cut or (said == text and "<think>" in text):
            limit = f"{TOKENS[self.reasoning]} tokens; thinking models need --reasoning think"
            return math.nan, f"its answer was cut off after {limit}: {said[-200:]!r}"
        if not found or float(found[1]) > 9 or len(others) > 1:
            wanted = "JSON score" if self.reasoning == "think" else "digit"
            return math.nan, f"its answer is not one {wanted} from 0 to 9: {said[-200:]!r}"
        return float(found[1]) / 9, text.strip()


def expect(p, said):
    """Probabilities [10] of the digits out of all tokens, the likeliest token -> an answer: their expectation."""
    mass = sum(p)
    if not .5 <= mass <= 1.01:
        hint = f"it begins with {said!r}; ask it by --reasoning direct or think"
        return math.nan, f"the ten digits hold {mass:.1%} of the probability of its answer, not half to all: {hint}"
    mean = sum(digit * q for digit, q in enumerate(p)) / mass
    spread = " ".join(f"{digit}: {q / mass:.2f}" for digit, q in enumerate(p))
    return mean / 9, f"{spread} ({mass:.1%} of all)"


def once(keys, items, memory, work):
    """work([item, ...]) -> [result, ...], but for items whose key is in `memory`, which is emptied when it is large."""
    if len(memory) > REMEMBERED:
        memory.clear()
    new = {key: item for key, item in zip(keys, items) if key not in memory}
    if new:
        memory |= zip(new, work(list(new.values())))
    return [memory[key] for key in keys]


class LocalJudge(VLMJudge):
    """A vision-language model in process, by transformers."""

    def __init__(self, path, device, bf16, *asking):
        from huggingface_hub import HfApi, try_to_load_from_cache
        from model import find_folder, fingerprint, multiplies_in_bfloat16
        from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig
        super().__init__(*asking)
        self.path, self.device, folder = path, torch.device(device), find_folder(path)
        if not folder.is_dir() and not try_to_load_from_cache(path, "config.json"):
            # One question: from_pretrained asks for a dozen files, each for half a minute if there is no network.
            HfApi().model_info(path, timeout=10)
        self.processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        self.tokenizer = self.processor.tokenizer
        # Padded on the left, so that the last position is the answer's in every row.
        self.tokenizer.padding_side = "left"
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        ids = [self.tokenizer.encode(str(digit), add_special_tokens=False)[-1] for digit in range(10)]
        if len(set(ids)) < 10:
            raise ValueError("its tokenizer has no token of its own for each digit")
        self.digits = torch.tensor(ids, device=self.device)
        dtype = "auto" if self.device.type == "cuda" else torch.float32
        if bf16 and multiplies_in_bfloat16(device):
            dtype = torch.bfloat16                           # half the time, scores within .001
        # No pickled weights and no code of the model's own: either could run anything.
        net, info = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True)
        # The library only warns of a tensor that is missing, and draws it at random.
        if info["missing_keys"]:
            raise ValueError(f"its files lack {min(info['missing_keys'])} ({len(info['missing_keys'])} missing in all)")
        # Answers are the model's own, without the penalties and cut-offs that its files suggest for conversation.
        tokens = net.generation_config
        net.generation_config = GenerationConfig(bos_token_id=tokens.bos_token_id, eos_token_id=tokens.eos_token_id)
        self.model = net.to(self.device).eval()
        # A folder's json, jinja and safetensors files, or the hub's name for what it gave.
        files = [fingerprint(file) for file in sorted(folder.glob("*.[js]*"))]
        self.model_digest = files or (path, self.model.config._commit_hash)
        # On a CPU it works in the caller's thread: a second set of OpenMP threads would slow both down. On a GPU of
        # several a new thread would start on the first one.
        here = dict(initializer=torch.cuda.set_device, initargs=[self.device.index or 0])
        self.thread = None if self.device.type == "cpu" else ThreadPoolExecutor(1, **here)
        trial = self.prompt(*TRIAL)
        inputs = self.prepare([trial])
        # LLaVA's form: a row of pixels for a picture, and nothing else. On a GPU there may be no memory to spare.
        llava = set(inputs) == {"input_ids", "attention_mask", "pixel_values"}
        if self.device.type == "cpu" and llava and len(inputs["pixel_values"]) == len(trial[0]):
            self.share_pictures()

    def share_pictures(self):
        """Process a picture, and let the vision tower see it, once for all questions that show it."""
        from transformers import BatchFeature
        from transformers.modeling_outputs import BaseModelOutputWithPooling
        processor, network = self.processor.image_processor, self.model.model
        process, look = processor.preprocess, network.get_image_features
        pixels_of, features_of = {}, {}

        def process_once(images, **options):
            pictures = [picture for row in images for picture in row]
            keys = [(picture.size, picture.tobytes()) for picture in pictures]
            work = lambda new: process(new, **options)["pixel_values"]
            return BatchFeature({"pixel_values": torch.stack(once(keys, pictures, pixels_of, work))})

        def look_once(pixel_values, **options):
            keys = [row.view(torch.uint8).numpy().tobytes() for row in pixel_values]
            work = lambda new: look(torch.stack(new), **options).pooler_output
            return BaseModelOutputWithPooling(pooler_output=once(keys, pixel_values, features_of, work))

        processor.preprocess, network.get_image_features = process_once, look_once

    def check(self, tasks):
        """ValueError if its tokenizer has no words for an instruction: the tiny judge's knows the embedded world's."""
        for text in sorted({instruction for task in tasks for instruction in task.instructions}):
            ids = self.tokenizer(text.encode().decode()).input_ids
            if self.tokenizer.unk_token_id in ids:
                raise ValueError(f"--judge {self.path} has no words for {text!r}; choose a judge that has")

    def answer(self, questions, seeds):
        """Batches of `workers`. One that fails is halved: a bad row takes no others with it, and less memory may do."""
        if len(questions) > self.workers:
            cuts = [slice(i, i + self.workers) for i in range(0, len(questions), self.workers)]
            return [answer for cut in cuts for answer in self.answer(questions[cut], seeds[cut])]
        try:
            return self.forward(questions, seeds[0])
        except Exception as error:
            if len(questions) == 1:
                return [(math.nan, f"{type(error).__name__}: {error}")]
        half = len(questions) // 2
        return self.answer(questions[:half], seeds[:half]) + self.answer(questions[half:], seeds[half:])

    def chat(self, n, text):
        """A question of n pictures in the words of the model's chat template, up to where its answer begins."""
        think = self.reasoning == "think"
        hybrid = {"enable_thinking": think} if "enable_thinking" in str(self.processor.chat_template) else {}
        content = [{"type": "image"}] * n + [{"type": "text", "text": text}]
        chat = [{"role": "user", "content": content}]
        said = self.processor.apply_chat_template(chat, add_generation_prompt=True, **hybrid)
        # The templates of some thinking models begin a thought: only --reasoning think lets them.
        return said if think else re.sub(r"<think>\s*$", "<think>\n\n</think>\n\n", said)

    def prepare(self, questions):
        """Questions -> the model's inputs."""
        asked = [(len(pictures), text) for pictures, text in questions]                  # alike for a group's samples
        texts = once(asked, asked, {}, lambda new: [self.chat(n, text) for n, text in new])
        images = [[Image.fromarray(pixels) for pixels in pictures.permute(0, 2, 3, 1).numpy()]
                  for pictures, _ in questions]
        # Many templates write the first token themselves: twice it would be another prompt.
        special = not texts[0].startswith(self.tokenizer.bos_token or "no such text")
        options = dict(padding=True, return_tensors="pt", add_special_tokens=special)
        return self.processor(images=images, text=texts, **options).to(self.device, self.model.dtype)

    @torch.no_grad()
    def forward(self, questions, seed):
        """A batch of questions -> answers."""
        inputs = self.prepare(questions)
        if self.reasoning == "logits":
            logits = self.model(**inputs, logits_to_keep=1).logits[:, -1].float()
            likeliest = self.tokenizer.batch_decode(logits.argmax(-1, keepdim=True))
            p = logits.softmax(-1)[:, self.digits].tolist()
            return [expect(*row) for row in zip(p, likeliest)]
        options = dict(max_new_tokens=TOKENS[self.reasoning], pad_token_id=self.tokenizer.pad_token_id)
        draw = dict(do_sample=True, temperature=VOTE_TEMPERATURE, top_k=0) if self.votes > 1 else dict(do_sample=False)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            ids = self.model.generate(**inputs, **options, **draw)
        ids = ids[:, inputs["input_ids"].shape[1]:]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        ends = torch.tensor(self.model.generation_config.eos_token_id or [], device=self.device)
        cut = ~torch.isin(ids, ends).any(1)
        return [self.read(*row) for row in zip(texts, cut.tolist())]


class ServedJudge(VLMJudge):
    """A vision-language model behind an OpenAI-compatible server: pictures travel as PNG in JSON."""

    def __init__(self, spec, *asking):
        super().__init__(*asking)
        self.url, _, self.model = spec.partition("#")
        self.key = "".join(os.environ.get("OPENAI_API_KEY", "").split())
        self.model_digest, self.thread = self.model, ThreadPoolExecutor(1)
        score, text, status = self.call(self.prompt(*TRIAL), 0, 1)
        if status != 200 or (self.reasoning == "logits" and math.isnan(score)):
            raise ValueError(text)

    def answer(self, questions, seeds):
        self.streak, self.reason = 0, ""
        pool = ThreadPoolExecutor(self.workers)
        try:
            return list(pool.map(self.ask, questions, seeds))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)       # after Ctrl-C nobody waits for a slow server

    def ask(self, question, seed):
        """A question -> an answer, in TRIES calls at most. Once a whole round of workers has failed, none."""
        if self.streak >= max(8, self.workers):
            return math.nan, self.reason
        for attempt in range(TRIES):
            if attempt:
                time.sleep(PAUSE * 2 ** (attempt - 1))
            score, text, status = self.call(question, seed + attempt * self.votes, TOKENS[self.reasoning])
            # A question that was refused would be again; a server that was busy or too slow may have time later.
            refused = 300 <= status < 500 and status not in (408, 429)
            if refused or not math.isnan(score):
                break
        self.streak = self.streak + 1 if math.isnan(score) else 0
        self.reason = text
        return score, text

    def call(self, question, seed, tokens):
        """One call -> (score, what was said, 200), or (NaN, why not, HTTP status or 0)."""
        (pictures, text), content = question, []
        for pixels in pictures.permute(0, 2, 3, 1).numpy():
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG", compress_level=1)
            url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
            content.append({"type": "image_url", "image_url": {"url": url}})
        content.append({"type": "text", "text": text})
        chat = [{"role": "user", "content": content}]
        body = {"model": self.model, "messages": chat, "max_tokens": tokens, "temperature": 0}
        if self.reasoning == "logits":
            body |= {"logprobs": True, "top_logprobs": 20}
        if self.votes > 1:
            body |= {"temperature": VOTE_TEMPERATURE, "top_p": 1, "seed": seed}
        status, reply = 0, ""
        try:
            status, reply = self.post(json.dumps(body).encode())
            if status == 200:
                return *self.understand(json.loads(reply)["choices"][0]), status
            problem = f"HTTP {status}:"
        except Exception as error:
            status, problem = 0, f"{type(error).__name__}: {getattr(error, 'reason', None) or error}"
        return math.nan, one_line(f"{problem} {reply}"), status

    def post(self, body):
        """One HTTP call -> (status, text)."""
        # Not by huggingface_hub's InferenceClient: where no key is set it sends the machine's Hugging Face token to the
        # user's server, HF_HUB_OFFLINE forbids it every server, and it loses the status of some errors.
        url = self.url.rstrip("/") + "/chat/completions"
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        if self.key:
            request.add_unredirected_header("Authorization", f"Bearer {self.key}")
        try:
            response = urllib.request.urlopen(request, timeout=TIMEOUT[self.reasoning])
        except urllib.error.HTTPError as error:
            response = error    # which is read like any other
        with response:
            text = response.read().decode(errors="replace")
        # A short key ("EMPTY") is no secret, and may be a word of the answer.
        return response.status, text.replace(self.key, "***") if len(self.key) > 7 else text

    def understand(self, choice):
        """The first choice of a chat completion -> an answer."""
        if self.reasoning != "logits":
            return self.read(choice["message"]["content"] or "", choice.get("finish_reason") == "length")
        if not choice.get("logprobs"):
            return math.nan, "it gives no top_logprobs, which --reasoning logits needs; direct and think do not"
        p, likeliest = [0.] * 10, choice["logprobs"]["content"][0]["top_logprobs"]
        for token in likeliest:
            digit, logprob = token["token"].strip(" \t\n"), token["logprob"]
            # A little above 0 is rounding.
            if not -math.inf < logprob <= 1e-3:
                return math.nan, f"a log-probability of its answer is {logprob}, not finite and at most 0"
            if re.fullmatch("[0-9]", digit):
                p[int(digit)] += math.exp(logprob)
        return expect(p, likeliest[0]["token"])


def main():
    from data import Parser, load_picture
    from rollout import Task, stack_images
    parser = Parser(description="Score one edit by a vision-language model and print what it says.")
    parser.add_argument("--judge", required=True, help="folder, hub id, or http://host:port/v1#model")
    parser.add_argument("--rubric", default="", help="JSON file of prompts in place of the built-in ones")
    parser.add_argument("--reasoning", default="logits", help="logits, direct or think")
    parser.add_argument("--votes", type=int, default=1, help="answers averaged, with --reasoning direct or think")
    parser.add_argument("--original", help="the picture before the first of several edits (default: BEFORE)")
    parser.add_argument("before", help="the picture before the edit")
    parser.add_argument("after", help="the picture after the edit")
    parser.add_argument("instruction", nargs="+", help="the instructions so far; the last one is this edit's")
    args = parser.parse_args()
    paths = [args.original or args.before, args.before, args.after]
    tasks = [Task(load_picture(path, None, path), args.instruction, []) for path in paths]
    images = stack_images(tasks)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    judge = load(args.judge, device, args.rubric, args.reasoning, args.votes)
    judge.check(tasks)
    answers = judge.score([judge.prompt(name, images, args.instruction) for name in judge.names])
    for name, (score, text) in zip(judge.names, answers):
        print(f"{name} {score:.3f}\n  " + text.replace("\n", "\n  "))
    if any(math.isnan(score) for score, _ in answers):
        raise ValueError("the judge failed: where it says nan, there is no score")


if __name__ == "__main__":
    from data import run_main
    run_main(main)
