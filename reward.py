"""Judges: they look at a picture before and after an edit and say how good the edit was.

    judge = load("exact")                                   # the embedded world's: reads the pictures symbolically
    judge = load("path/or/hub-id", reasoning="think")       # a vision-language model in process
    judge = load("http://host:8000/v1#model")               # ... behind any OpenAI-compatible server; its key is OPENAI_API_KEY
    judge = load("exact,http://host:8000/v1#model")         # both: a reward column for each of their scores
    r = judge(tasks, images, k)       # (S, M) in [0, 1]; NaN where the judge failed, never 0
    judge.names, judge.weights        # what the M columns are, and how they are weighted unless the user says otherwise
    judge.words                       # what went wrong last, in the judge's own words

`tasks` has S entries, `images` (S, k+2, 3, H, W) uint8 the pictures so far: [:, 0] the source, [:, k] before turn k,
[:, k+1] after it. train.py judges a turn in a background thread while the next one is sampled. One edit by hand:

    python reward.py --judge SPEC before.png after.png "instruction"
"""
import argparse
import base64
import hashlib
import http.client
import inspect
import io
import json
import math
import os
import re
import sqlite3
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

# What a model is asked, in place of which --rubric FILE may put a JSON object {"following": ..., "consistency": ..., more}.
# {instruction} is this turn's, told with the pictures before and after it; {instructions} are all so far, told with the
# original besides, so that slow drift is seen. With --scoring trajectory: the original, the last picture, {instructions}.
RUBRICS = {
    "turn": {
        "following": 'Picture 1 was edited into picture 2. The instruction was: "{instruction}". Was exactly this done, '
                     "completely and cleanly?",
        "consistency": "Picture 1 is the original, picture 2 was edited into picture 3. The instructions so far, the last one "
                       "for this edit:\n{instructions}\nIs everything that they do not ask for unchanged, and as sharp as before?"},
    "trajectory": {
        "following": "Picture 1 was edited into picture 2, in steps. The instructions were:\n{instructions}\nWas exactly this "
                     "done, completely and cleanly?",
        "consistency": "Picture 1 was edited into picture 2, in steps. The instructions were:\n{instructions}\nIs everything "
                       "that they do not ask for unchanged, and as sharp as before?"}}
DIGIT = "Answer with one digit from 0 (not at all) to 9 (perfectly)."
ANSWERS = {"logits": DIGIT, "direct": DIGIT,
           "think": 'Say what you see. Then end with the score from 0 (not at all) to 9 (perfectly) as JSON: {"score": N}'}
TOKENS = {"logits": 1, "direct": 16, "think": 2048}        # an answer's length at most
TRIES, PAUSE = 3, 1.                                       # calls for one answer at most; seconds before the second, then doubled


class Failed(Exception):
    """No score: the call failed, or its answer is none. `final`: asking again is no use."""

    def __init__(self, words, final=False):
        super().__init__(words)
        self.final = final


def load(spec, device="cpu", rubric="", scoring="turn", reasoning="logits", votes=1, temperature=0., judge_workers=32,
         judge_timeout=120., judge_cache=""):
    """A judge by name: "exact", a vision-language model's folder or hub id, http://host:port/v1#model; or several, by commas.

    rubric: JSON file of prompts, see RUBRICS; scoring: turn | trajectory; reasoning: logits (expectation over the ten
    digits, one forward) | direct (a generated digit) | think (a generated text that ends with the score); votes: answers
    averaged, drawn at `temperature`; judge_workers: requests under way at a time, rows in a forward; judge_timeout: seconds
    for an answer; judge_cache: SQLite file of scores. ValueError if that is no judge, or the values contradict each other.
    """
    specs = [part.strip() for part in spec.split(",")]
    told = dict(rubric=rubric, scoring=scoring, reasoning=reasoning, votes=votes, temperature=temperature, judge_cache=judge_cache)
    spare = [f"--{n} {v}".replace("_", "-") for n, v in told.items() if v != inspect.signature(load).parameters[n].default]
    for words, wrong in {
            f"{' '.join(spare)} is for vision-language models; --judge {spec} has none": spare and set(specs) == {"exact"},
            f"--scoring trajectory: the exact judge of --judge {spec} scores turns": scoring == "trajectory" and "exact" in specs,
            f"--scoring {scoring} is none of {', '.join(RUBRICS)}": scoring not in RUBRICS,
            f"--reasoning {reasoning} is none of {', '.join(ANSWERS)}": reasoning not in ANSWERS,
            f"--votes {votes} must be at least 1": votes < 1,
            f"--temperature {temperature} must be at least 0": not 0 <= temperature < math.inf,
            f"--judge-workers {judge_workers} must be at least 1": judge_workers < 1,
            f"--judge-timeout {judge_timeout} must be greater than 0": not 0 < judge_timeout < math.inf,
            f"--votes {votes} and --temperature {temperature} must be 1 and 0 with --reasoning logits, which draws nothing":
                reasoning == "logits" and (votes > 1 or temperature > 0),
            f"--votes {votes} at --temperature {temperature} would all be equal": votes > 1 and temperature == 0,
            f"--judge-cache {judge_cache} is for deterministic scores, not for --temperature {temperature}": judge_cache and temperature > 0}.items():
        if wrong:
            raise ValueError(words)
    options = dict(rubrics=read_rubrics(rubric, scoring), scoring=scoring, reasoning=reasoning, votes=votes, temperature=temperature,
                   workers=judge_workers, cache=Cache(judge_cache) if judge_cache else None)
    judges = [ExactJudge() if s == "exact" else ServedJudge(s, judge_timeout, **options) if re.match("https?://", s) else
              LocalJudge(s, device, **options) for s in specs]
    return judges[0] if len(judges) == 1 else Judges(judges, specs)


OPTIONS = list(inspect.signature(load).parameters)[2:]     # train.py's flags of the same names


def read_rubrics(path, scoring):
    """The prompts {name: text}: ours, or those of a JSON file. ValueError says what is wrong with it."""
    if not path:
        return RUBRICS[scoring]
    try:
        rubrics = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--rubric {path} is no JSON file that can be read: {error}") from None
    if not isinstance(rubrics, dict) or not {"following", "consistency"} <= set(rubrics):
        raise ValueError(f"--rubric {path} must be a JSON object with a prompt each for following and consistency, and others if you like")
    for name, text in rubrics.items():
        if not isinstance(text, str) or ("{instructions}" not in text and ("{instruction}" not in text or scoring == "trajectory")):
            raise ValueError(f"--rubric {path}: {name} must be a text with {'{instruction} or ' * (scoring == 'turn')}{{instructions}} in it")
    return rubrics


class ExactJudge:
    """The embedded world's own judge (shapes/world.py): needs tasks with meta["scenes"]."""
    names = ["following", "consistency", "success"]   # graded IF, CC, and IF as 0 or 1
    weights = [.8, .2, 0.]                            # graded scores only: groups of equal 0s and 1s teach nothing
    words = ""

    def check(self, tasks):
        """ValueError if these tasks cannot be judged."""
        if any("scenes" not in task.meta for task in tasks):
            raise ValueError("the exact judge knows the embedded world only; judge pictures of your own by a VLM (--judge)")

    def __call__(self, tasks, images, k):
        from shapes import world
        self.check(tasks)
        after, before = images[:, k + 1].permute(0, 2, 3, 1).numpy(), images[:, k].permute(0, 2, 3, 1).numpy()
        success, following, consistency = world.judge(after, before, [task.meta["scenes"][:k + 2] for task in tasks])
        return torch.from_numpy(np.stack([following, consistency, success], 1))


class Judges:
    """Several judges, one after the other; the first one's columns keep their names, which is what eval.py reads."""

    def __init__(self, judges, specs):
        self.judges, self.words = judges, ""
        short = [re.split("[/#]", spec.rstrip("/"))[-1] for spec in specs]
        short = [s if short.count(s) == 1 else f"{s}{i}" for i, s in enumerate(short, 1)]
        self.names = [name if i == 0 else f"{short[i]}:{name}" for i, judge in enumerate(judges) for name in judge.names]
        self.weights = [w / len(judges) for judge in judges for w in judge.weights]

    def check(self, tasks):
        for judge in self.judges:
            judge.check(tasks)

    def __call__(self, tasks, images, k):
        r = torch.cat([judge(tasks, images, k) for judge in self.judges], 1)
        self.words = "; ".join(judge.words for judge in self.judges if judge.words)
        return r


# ------------------------------------------------------------------------------------------------ vision-language models

class VLMJudge:
    """What a model in process and one behind a server share: prompts, votes, cache, scores. They differ in `answer`."""
    words, warned = "", False

    def __init__(self, spec, version, rubrics, scoring, reasoning, votes, temperature, workers, cache):
        self.spec, self.version, self.rubrics, self.scoring, self.reasoning = spec, version, rubrics, scoring, reasoning
        self.votes, self.temperature, self.workers, self.cache = votes, temperature, workers, cache
        self.names, self.weights = list(rubrics), [1 / len(rubrics)] * len(rubrics)

    def check(self, tasks):
        """Any task can be judged."""

    def __call__(self, tasks, images, k):
        prompts = [self.prompt(name, images[s], task.instructions[:k + 1]) for name in self.names for s, task in enumerate(tasks)]
        return torch.tensor([score for score, _ in self.score(prompts)]).view(len(self.names), len(tasks)).T

    def prompt(self, name, images, instructions):
        """One question, as (pictures (n, 3, H, W) uint8, text), of the pictures (k+2, 3, H, W) and the k+1 instructions so far."""
        text = self.rubrics[name]
        rows = [0, -1] if self.scoring == "trajectory" else [0, -2, -1] if "{instructions}" in text else [-2, -1]
        told = {"{instruction}": instructions[-1], "{instructions}": "\n".join(f"{i}. {told}" for i, told in enumerate(instructions, 1))}
        return images[rows], re.sub("{instructions?}", lambda match: told[match[0]], text) + "\n" + ANSWERS[self.reasoning]

    def score(self, prompts):
        """Questions -> (score in [0, 1] or NaN, reasoning) each, in order: from the cache, or asked, equal ones once, `votes` times."""
        keys = [hashlib.blake2b(json.dumps([self.spec, self.version, self.reasoning, text, p.shape]).encode() + p.contiguous().numpy().tobytes(),
                                digest_size=16).hexdigest() for p, text in prompts]
        results = self.cache.get(keys) if self.cache else {}
        new = {key: prompt for key, prompt in zip(keys, prompts) if key not in results}
        answers = self.answer([prompt for prompt in new.values() for _ in range(self.votes)],
                              [int(key[:7], 16) + vote for key in new for vote in range(self.votes)]) if new else []
        for i, key in enumerate(new):
            good = [a for a in answers[i * self.votes:(i + 1) * self.votes] if not isinstance(a, Failed)]
            results[key] = (sum(score for score, _ in good) / len(good) if good else math.nan), "\n".join(text for _, text in good)
        failed = [a for a in answers if isinstance(a, Failed)]
        if failed:
            self.words = str(failed[-1])
            print(f"the judge failed in {len(failed)} of {len(answers)} calls, last: {self.words}", file=sys.stderr)
        if self.cache:
            self.cache.put({key: results[key] for key in new if not math.isnan(results[key][0])})
        return [results[key] for key in keys]

    def expect(self, p):
        """Probabilities of the ten digits, out of all tokens -> (expectation / 9, how they are spread), or Failed."""
        mass = sum(p)
        if not mass > 0:
            return Failed("its answer begins with no digit" if mass == 0 else "its probabilities are not numbers")
        if mass < .5 and not self.warned:
            self.warned = True
            print(f"warning: the ten digits hold only {mass:.1%} of the probability of {self.spec}'s answer; it may be better asked by "
                  "--reasoning direct or think", file=sys.stderr)
        return sum(d * q for d, q in enumerate(p)) / mass / 9, " ".join(f"{d}: {q / mass:.2f}" for d, q in enumerate(p)) + f" ({mass:.1%} of all)"

    def read(self, text):
        """A generated answer -> (score, answer), or Failed where it holds no score, several, or one out of range."""
        said = text.rpartition("</think>")[2]              # a thinking model's own block comes first
        if said == text and "<think>" in text:
            return Failed(f"its answer was cut off after {TOKENS[self.reasoning]} tokens, still thinking; thinking models need --reasoning think")
        try:
            if self.reasoning == "think":
                score = json.loads(re.findall(r"\{[^{}]*\}", said)[-1])["score"]
            else:
                score = float(re.fullmatch(r"\D*?(-?\d+(?:\.\d+)?)\D*", said)[1])
        except (LookupError, ValueError, TypeError):
            return Failed(f"its answer {'does not end with a JSON score' if self.reasoning == 'think' else 'is not one number'}: {said[-200:]!r}")
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not 0 <= score <= 9:
            return Failed(f"its score {score!r} is no number from 0 to 9")
        return score / 9, text.strip()


class LocalJudge(VLMJudge):
    """A vision-language model in process, by transformers; the digits' ids are looked up through its tokenizer."""

    def __init__(self, path, device, **options):
        from transformers import AutoModelForImageTextToText, AutoProcessor
        device = torch.device(device)
        try:
            self.processor = AutoProcessor.from_pretrained(path)
            self.model = AutoModelForImageTextToText.from_pretrained(path, dtype="auto" if device.type == "cuda" else torch.float32)
        except Exception as error:      # transformers raises many kinds for what is no such model, and for what is not installed
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if "torchvision" in str(error).lower():
                reason = f"its processor requires the torchvision library: pip install torchvision ({reason})"
            raise ValueError(f"--judge {path} is neither 'exact' nor a vision-language model that loads here: {reason}") from None
        if getattr(self.processor, "chat_template", None) is None:
            raise ValueError(f"--judge {path} is no judge: its processor has no chat template")
        self.model.to(device).eval().requires_grad_(False)
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.padding_side = "left"               # so that the last position is the answer's in every row
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        ids = [self.tokenizer.encode(str(d), add_special_tokens=False)[-1] for d in range(10)]
        if len(set(ids)) < 10:
            raise ValueError(f"--judge {path} is no judge: its tokenizer has no token of its own for each digit")
        self.digits = torch.tensor(ids, device=device)
        self.keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(self.model.forward).parameters else {}
        version = [getattr(self.model.config, "_commit_hash", None)] + [f.stat().st_mtime_ns for f in sorted(Path(path).glob("*.safetensors"))]
        super().__init__(path, version, **options)
        self.asked = {"enable_thinking": self.reasoning == "think"} if "enable_thinking" in str(self.processor.chat_template) else {}

    def check(self, tasks):
        """ValueError if its tokenizer has no words for an instruction: the tiny judge's knows the embedded world's alone."""
        told = sorted({instruction for task in tasks for instruction in task.instructions})
        for instruction, ids in zip(told, self.tokenizer(told).input_ids):
            if self.tokenizer.unk_token_id in ids:
                raise ValueError(f"--judge {self.spec} has no words for {instruction!r}; choose a judge that has")

    def answer(self, prompts, seeds):
        answers = [None] * len(prompts)

        def fill(rows):
            try:
                for row, answer in zip(rows, self.forward([prompts[i] for i in rows], seeds[rows[0]])):
                    answers[row] = answer
                return
            except Exception as error:
                answers[rows[0]] = Failed(f"{type(error).__name__}: {error}")
            if len(rows) > 1:                              # one bad row must not take others with it, and halves need less memory
                fill(rows[:len(rows) // 2])
                fill(rows[len(rows) // 2:])

        todo = list(range(len(prompts)))
        for attempt in range(TRIES if self.temperature else 1):           # what is not drawn would be the same again
            for first in range(0, len(todo), self.workers):
                fill(todo[first:first + self.workers])
            todo = [i for i in todo if isinstance(answers[i], Failed)]
            seeds = [seed + self.votes for seed in seeds]
        return answers

    @torch.no_grad()
    def forward(self, prompts, seed):
        """A batch of questions -> answers."""
        chats = [[{"role": "user", "content": [{"type": "image"}] * len(p) + [{"type": "text", "text": text}]}] for p, text in prompts]
        texts = [self.processor.apply_chat_template(chat, add_generation_prompt=True, **self.asked) for chat in chats]
        opened = texts[0].rstrip().endswith("<think>")     # a thinking model's template: only --reasoning think lets it
        if opened and self.reasoning != "think":
            texts = [text.rstrip() + "\n\n</think>\n\n" for text in texts]
        bos = self.tokenizer.bos_token                     # many templates write it already: twice would be another prompt
        inputs = self.processor(images=[[Image.fromarray(x.permute(1, 2, 0).numpy()) for x in p] for p, _ in prompts], text=texts, padding=True,
                                return_tensors="pt", add_special_tokens=not (bos and texts[0].startswith(bos))).to(self.model.device, self.model.dtype)
        if self.reasoning == "logits":
            logits = self.model(**inputs, **self.keep).logits[:, -1].float()
            return [self.expect(p) for p in logits.softmax(-1)[:, self.digits].tolist()]
        draw = dict(do_sample=True, temperature=self.temperature) if self.temperature else dict(do_sample=False)
        with torch.random.fork_rng([self.model.device] if self.model.device.type == "cuda" else []):
            torch.manual_seed(seed)
            ids = self.model.generate(**inputs, max_new_tokens=TOKENS[self.reasoning], pad_token_id=self.tokenizer.pad_token_id, **draw)
        said = self.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
        return [self.read("<think>" * (opened and self.reasoning == "think") + text) for text in said]


class ServedJudge(VLMJudge):
    """A vision-language model behind an OpenAI-compatible server: pictures travel as PNG in JSON, order is kept."""

    def __init__(self, spec, timeout, **options):
        url, _, self.model = spec.partition("#")
        self.url, self.timeout, self.key, self.streak = url.rstrip("/"), timeout, os.environ.get("OPENAI_API_KEY", ""), 0
        super().__init__(self.url, self.model, **options)
        try:                                                # a question now, rather than an hour into the run
            if not self.model:
                served = [model["id"] for model in self.call("/models")["data"]]
                if len(served) != 1:
                    raise ValueError(f"--judge {spec} serves {', '.join(served) or 'no model'}: name one as {url}#MODEL")
                self.model = self.version = served[0]
            grey = torch.full((3, 3, 64, 64), 128, dtype=torch.uint8)
            choice = self.complete(self.prompt("following", grey, ["Nothing"]), 0, 1)
        except (Failed, LookupError, TypeError) as error:
            raise ValueError(f"--judge {spec} does not answer: {error}") from None
        if self.reasoning == "logits" and not ((choice.get("logprobs") or {}).get("content") or [{}])[0].get("top_logprobs"):
            print(f"warning: {url} gives no top_logprobs, so --reasoning logits is not possible: its scores will be generated digits, "
                  "as with --reasoning direct", file=sys.stderr)
            self.reasoning = "direct"

    def answer(self, prompts, seeds):
        self.streak = 0
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(self.ask, prompts, seeds))

    def ask(self, prompt, seed):
        """One answer, or Failed after TRIES calls. When a whole round of workers has failed, the rest of the batch is not tried."""
        answer = Failed(f"not asked, after {self.streak} failures in a row: {self.words}")
        for attempt in range(TRIES if self.streak < max(8, self.workers) else 0):
            if attempt:
                time.sleep(PAUSE * 2 ** (attempt - 1))
            try:
                choice = self.complete(prompt, seed + attempt * self.votes, TOKENS[self.reasoning])
                if self.reasoning == "logits":
                    likeliest = choice["logprobs"]["content"][0]["top_logprobs"]
                    answer = self.expect([sum(math.exp(x["logprob"]) for x in likeliest if x["token"].strip() == str(d)) for d in range(10)])
                else:
                    cut = choice.get("finish_reason") == "length"           # some servers take the thinking out of the content
                    answer = self.read(choice["message"].get("content") or "<think>" * cut)
            except Failed as failure:
                answer = failure
            except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
                answer = Failed(f"its answer is no chat completion: {type(error).__name__}: {error}")
            if not isinstance(answer, Failed):
                self.streak = 0
                return answer
            if answer.final:
                break
        self.streak, self.words = self.streak + 1, str(answer)
        return answer

    def complete(self, prompt, seed, tokens):
        """One chat completion: its first choice."""
        content, (pictures, text) = [], prompt
        for picture in pictures:
            file = io.BytesIO()
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(file, "PNG", compress_level=1)
            content.append({"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()}})
        body = {"model": self.model, "messages": [{"role": "user", "content": content + [{"type": "text", "text": text}]}],
                "max_tokens": tokens, "temperature": self.temperature}
        body |= {"logprobs": True, "top_logprobs": 20} if self.reasoning == "logits" else {"seed": seed} if self.temperature else {}
        return self.call("/chat/completions", body)["choices"][0]

    def call(self, path, body=None):
        """One HTTP call -> JSON; Failed carries the server's own words, without the key."""
        request = urllib.request.Request(self.url + path, json.dumps(body).encode() if body else None, {"Content-Type": "application/json"})
        if self.key:
            request.add_unredirected_header("Authorization", f"Bearer {self.key}")         # never to another host
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            words, final = f"HTTP {error.code}: {error.read(2000).decode(errors='replace')}", error.code < 500 and error.code not in (408, 429)
        except (OSError, http.client.HTTPException, ValueError) as error:
            words, final = f"{type(error).__name__}: {getattr(error, 'reason', None) or error}", False
        words = " ".join(words.split())[:500]
        raise Failed(words.replace(self.key, "***") if self.key else words, final)


class Cache:
    """Scores that are already known, {key: (score, reasoning)}, in a SQLite file that several runs may share."""

    def __init__(self, path):
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self.db = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
            self.db.execute("CREATE TABLE IF NOT EXISTS scores (key TEXT PRIMARY KEY, score REAL, reasoning TEXT) WITHOUT ROWID")
        except (OSError, sqlite3.Error) as error:
            raise ValueError(f"--judge-cache {path} is no SQLite file that can be written: {error}") from None

    def get(self, keys):
        rows = ((key, self.db.execute("SELECT score, reasoning FROM scores WHERE key = ?", (key,)).fetchone()) for key in set(keys))
        return {key: row for key, row in rows if row}

    def put(self, results):
        try:
            self.db.execute("BEGIN IMMEDIATE")
            self.db.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?, ?)", [(key, *result) for key, result in results.items()])
            self.db.execute("COMMIT")
        except sqlite3.Error as error:                     # a full disk must not cost the scores themselves
            print(f"warning: the judge's cache was not written: {error}", file=sys.stderr)


def main():
    def refuse(message):
        raise ValueError(message)
    parser = argparse.ArgumentParser(description="Score one edit by a vision-language model and print what it says.")
    parser.error = refuse
    for name, default, help in (("judge", None, "folder, hub id, or http://host:port/v1#model; several by commas"),
                                ("rubric", "", "JSON file of prompts in place of the built-in ones"), ("scoring", "turn", "turn or trajectory"),
                                ("reasoning", "logits", "logits, direct or think"), ("votes", 1, "answers averaged"),
                                ("temperature", 0., "of the answers; 0 = the likeliest"), ("judge-cache", "", "SQLite file of scores"),
                                ("original", "", "the picture before the first of several edits (default: BEFORE)")):
        parser.add_argument(f"--{name}", type=type(default or ""), default=default, required=default is None, help=help)
    parser.add_argument("before", help="the picture before the edit")
    parser.add_argument("after", help="the picture after the edit")
    parser.add_argument("instruction", nargs="+", help="the instructions so far; the last one is this edit's")
    args = vars(parser.parse_args())
    paths = [args["original"] or args["before"], args["before"], args["after"]]
    try:
        pictures = [Image.open(path).convert("RGB") for path in paths]
    except OSError as error:
        raise ValueError(f"no picture that can be read: {error}") from None
    if len({picture.size for picture in pictures}) > 1:
        raise ValueError("pictures of one edit must have one size, got " + ", ".join(f"{p} {x.width} x {x.height}" for p, x in zip(paths, pictures)))
    images = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures])
    judge = load(args["judge"], "cuda" if torch.cuda.is_available() else "cpu", **{name: args[name] for name in OPTIONS if name in args})
    for one in getattr(judge, "judges", [judge]):
        if isinstance(one, ExactJudge):
            raise ValueError("--judge exact needs the scenes of the embedded world, which a picture does not tell")
        for name in one.names:
            (score, text), = one.score([one.prompt(name, images, args["instruction"])])
            print(f"{name} {score:.3f}\n  " + text.replace("\n", "\n  "))
        if one.words:
            raise ValueError(f"the judge failed: {one.words}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        print(f"reward.py: {error}", file=sys.stderr)
        sys.exit(2)
