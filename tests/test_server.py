"""Judges behind a server: one that misbehaves in every way (written here), and a real one (transformers serve)."""
import base64
import importlib.util
import io
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

import reward
import train
from fixtures import ROOT, editor_folder, free_port, make_tasks, run_script
from rollout import Task
from shapes import world

KEY = "sk-never-to-be-told"


class Server(ThreadingHTTPServer):
    """Scores a picture by the digit in its first pixel's red; `spoil(body, n)` may answer otherwise for the n-th call.

    It returns None to go on, a number to send that HTTP status, text to say that, or bytes to send those as they are.
    """
    daemon_threads, request_queue_size = True, 128

    def __init__(self, spoil=lambda body, digit, n: None, logprobs=True):
        super().__init__(("127.0.0.1", 0), Handler)
        self.spoil, self.logprobs = spoil, logprobs
        self.lock, self.bodies, self.headers, self.busy, self.most_busy = threading.Lock(), [], [], 0, 0
        threading.Thread(target=self.serve_forever, args=(.01,), daemon=True).start()
        self.spec = f"http://127.0.0.1:{self.server_port}/v1#tiny"

    def handle_error(self, request, client_address):
        pass                                                     # clients that have gone

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def asked(self):
        """The calls after the one that load() makes."""
        return self.bodies[1:]


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self.server.headers.append(self.headers)
        self.reply(b"{}")

    def do_POST(self):
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        *pictures, text = body["messages"][0]["content"]
        body["pictures"] = [decode(p["image_url"]["url"]) for p in pictures]
        digit = int(body["pictures"][-1][0, 0, 0]) % 10
        with server.lock:
            n = len(server.bodies)
            server.bodies.append(body), server.headers.append(self.headers)
            server.busy += 1
            server.most_busy = max(server.most_busy, server.busy)
        spoilt = server.spoil(body, digit, n) if n else None
        with server.lock:
            server.busy -= 1
        if isinstance(spoilt, int):
            error = {"error": {"message": f"no {spoilt} for {KEY}\nsecond line"}}
            return self.reply(json.dumps(error).encode(), spoilt)
        if isinstance(spoilt, bytes):
            self.wfile.write(spoilt)
            return self.connection.close()
        thinks = text["text"].endswith(reward.ANSWERS["think"])
        said = spoilt if isinstance(spoilt, str) else f'I see. {{"score": {digit}}}' if thinks else str(digit)
        choice = {"message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
        if body.get("logprobs") and server.logprobs:
            spread = ((str(digit), .5), (f" {digit}", .25), ("A", .2))
            likeliest = [{"token": token, "logprob": math.log(p)} for token, p in spread]
            choice["logprobs"] = {"content": [{"token": said[0], "logprob": -.5, "top_logprobs": likeliest}]}
        if isinstance(spoilt, dict):
            choice = spoilt
        self.reply(json.dumps({"choices": [choice]}).encode())

    def reply(self, content, status=200):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def decode(url):
    kind, content = url.split(",")
    assert kind == "data:image/png;base64"
    return torch.from_numpy(np.array(Image.open(io.BytesIO(base64.b64decode(content))))).permute(2, 0, 1)


def prompts(n=20, seed=0):
    pictures = torch.randint(0, 250, (n, 2, 3, 9, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return [(p, f"question {i}\n{reward.DIGIT}") for i, p in enumerate(pictures)]


def digits(asked):
    return torch.tensor([int(p[-1, 0, 0, 0]) % 10 for p, _ in asked])


def scores(judge, asked):
    return torch.tensor([score for score, _ in judge.score(asked)])


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(reward, "PAUSE", .001)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_never_to_be_sent")


# --------------------------------------------------------------------------------------------------------- what is sent

def test_answers_that_come_out_of_order_go_to_their_own_rows():
    """Scores in the order in which the server finished; one call at a time; more calls at a time than were allowed.

    And: any token that happens to lie on the machine sent to the user's server.
    """
    rng = random.Random(0)
    with Server(lambda *_: time.sleep(rng.random() * .03)) as server:
        judge, asked = reward.load(server.spec, reasoning="direct", workers=6), prompts(40)
        assert torch.allclose(scores(judge, asked), digits(asked) / 9)
        assert 2 <= server.most_busy <= 6 and len(server.asked()) == 40 and judge.last_failure == ""
        assert all("Authorization" not in headers and "hf_never" not in str(headers) for headers in server.headers)
        sent = {body["messages"][0]["content"][-1]["text"]: body for body in server.asked()}
        for pictures, text in asked:                             # PNG: not one bit is lost
            assert torch.equal(torch.stack(sent[text]["pictures"]), pictures) and sent[text]["model"] == "tiny"
            assert sent[text]["temperature"] == 0 and "logprobs" not in sent[text] and "seed" not in sent[text]


def test_logits_come_from_the_likeliest_tokens():
    """The generated digit taken in place of the expectation, " 7" and "7" taken for two tokens, other tokens for 0."""
    with Server() as server:
        judge, asked = reward.load(server.spec), prompts()
        assert torch.allclose(scores(judge, asked), digits(asked) / 9, atol=1e-6)
        assert all(body["logprobs"] and body["top_logprobs"] == 20 for body in server.asked())
        assert all(body["max_tokens"] == 1 for body in server.asked())
        spread = [(" 3", .3), ("3", .1), ("8", .4), ("\u0663", .1), ("9th", .05), ("-", .05)]
        server.spoil = lambda *_: {"logprobs": {"content": [{"top_logprobs": [
            {"token": token, "logprob": math.log(p)} for token, p in spread]}]}}
        (score, text), = judge.score(prompts(1, seed=1))
        assert score == pytest.approx((.4 * 3 + .4 * 8) / .8 / 9) and "3: 0.50" in text and "80.0% of all" in text


def token(text, p):
    return {"token": text, "logprob": math.log(p)}


SEVEN = token("7", .9)


@pytest.mark.parametrize("likeliest, words", [
    ([{"token": "7", "logprob": .7}], "log-probability of its answer is 0.7"),
    ([{"token": "7", "logprob": math.nan}], "is nan"), ([{"token": "7", "logprob": math.inf}], "is inf"),
    ([SEVEN, {"token": "8", "logprob": -math.inf}], "is -inf"), ([SEVEN, {"token": "8", "logprob": None}], "TypeError"),
    ([token("\uff17", .95), token("2", .002)], "hold 0.2% of the probability of its answer, not half to all: it begins "
                                               "with '\uff17'"),
    ([token("\u30007", .9)], "hold 0.0%"), ([token("7\u00a0", .9)], "hold 0.0%"), ([token("0.", .9)], "hold 0.0%"),
    ([token("-7", .9)], "hold 0.0%"), ([token("\u2212", .9)], "hold 0.0%"),
    ([token("I", .9), *[token(str(d), .009) for d in range(10)]], "hold 9.0%"),
    ([SEVEN] * 10, "hold 900.0%"), ([], "IndexError"), (None, "TypeError")])
def test_likeliest_tokens_that_cannot_be_are_no_score(likeliest, words):
    """A wrong number where none is due: a full-width 7 read as the ASCII digits' 0.2 %, probabilities above 1."""
    with Server() as server:
        judge = reward.load(server.spec)
        server.spoil = lambda *_: {"logprobs": {"content": [{"top_logprobs": likeliest}]}}
        assert scores(judge, prompts(1)).isnan().all() and words in judge.last_failure
        server.spoil = lambda *_: {"logprobs": {"content": [{"top_logprobs": [{"token": "7", "logprob": 1e-7}]}]}}
        assert scores(judge, prompts(1)).tolist() == pytest.approx([7 / 9])              # a rounding error is forgiven


def test_a_server_without_likeliest_tokens_is_refused_unless_digits_are_generated():
    """Logits asked for, something else done, and nobody says so."""
    with Server(logprobs=False) as server:
        with pytest.raises(ValueError, match="gives no top_logprobs, which --reasoning logits needs; direct and think"):
            reward.load(server.spec)
        judge, asked = reward.load(server.spec, reasoning="direct"), prompts()
        assert torch.allclose(scores(judge, asked), digits(asked) / 9)


def test_answers_that_were_cut_off_are_no_score():
    """"I rate it 1", cut off in the middle of 10."""
    def spoil(body, *_):
        cut = "question 1" in str(body["messages"])
        return {"message": {"content": "I rate it 1"}, "finish_reason": "length" if cut else "stop"}
    with Server(spoil) as server:
        judge = reward.load(server.spec, reasoning="direct")
        assert scores(judge, prompts(3)).isnan().tolist() == [False, True, False]
        assert "cut off after 16 tokens" in judge.last_failure and "I rate it 1" in judge.last_failure


def test_votes_have_seeds_of_their_own():
    """Votes that a server with seeds draws all alike; the order of votes and rows mixed up."""
    votes = {}

    def spoil(body, digit, n):
        text = body["messages"][0]["content"][-1]["text"]
        votes.setdefault(text, []).append(body["seed"])
        return f'x {{"score": {(digit + body["seed"] % 3) % 10}}}'
    with Server(spoil) as server:
        judge = reward.load(server.spec, reasoning="think", votes=3, workers=4)
        asked = prompts(6)
        want = [sum((d + v) % 10 for v in range(3)) / 27 for d in digits(asked).tolist()]
        assert scores(judge, asked).tolist() == pytest.approx(want)
        assert all(len({seed % 3 for seed in seeds}) == 3 for seeds in votes.values()) and len(votes) == 6
        assert all((body["temperature"], body["top_p"]) == (.7, 1) for body in server.asked())
        assert torch.equal(scores(judge, asked), scores(reward.load(server.spec, reasoning="think", votes=3), asked))


def test_the_key_goes_to_the_server_and_nowhere_else(monkeypatch, capsys):
    """A key in an error message; or sent on to where a server redirects."""
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")                 # as a file of secrets may have it
    with Server() as other, Server() as server:
        judge = reward.load(server.spec, reasoning="direct")
        scores(judge, prompts(3))
        assert all(headers["Authorization"] == f"Bearer {KEY}" for headers in server.headers)
        told = []
        for answer in (401, f"a digit for {KEY}?", f"HTTP/1.0 200 OK\r\n\r\n{KEY}".encode(), {"message": KEY}):
            server.spoil = lambda *_: answer
            assert scores(judge, prompts(3, seed=1)).isnan().all()
            told.append(judge.last_failure)
        assert "no 401 for ***" in told[0] and all("***" in words for words in told)
        for status in (301, 302, 303, 307, 308):
            moved = f"HTTP/1.0 {status} Moved\r\nLocation: http://127.0.0.1:{other.server_port}/v1/models\r\n\r\n"
            server.spoil = lambda *_: moved.encode()
            assert scores(judge, prompts(1, seed=2)).isnan().all()
            told.append(judge.last_failure)
        assert all(KEY not in str(headers) for headers in other.headers)
        said = capsys.readouterr()
        assert KEY not in said.err + said.out + "".join(told)
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\u2026")              # a key with a character that no header can carry
    with pytest.raises(ValueError, match="^--judge http") as error:
        reward.load(server.spec)
    assert KEY not in str(error.value)


def test_a_key_of_a_few_letters_does_not_change_the_answers(monkeypatch):
    """OPENAI_API_KEY=1, as for servers that want any key: hidden in the answers, every 1 would become ***."""
    monkeypatch.setenv("OPENAI_API_KEY", "1")
    with Server(lambda *_: "1") as server:
        assert scores(reward.load(server.spec, reasoning="direct"), prompts(2)).tolist() == pytest.approx([1 / 9] * 2)


def test_the_key_is_in_no_file_and_no_line_of_a_run(few_tasks, tmp_path, monkeypatch):
    """A key in config.json, a checkpoint, the scores or the report, which people pass on; in the words of a server that
    refuses, which a run prints; at another server, which this one names."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    spoilt = {5: 401, 9: f"3 for {KEY}", 12: {"message": KEY}}
    with Server() as other, Server() as server:
        place = f"http://127.0.0.1:{other.server_port}/v1/models"
        spoilt[7] = f"HTTP/1.0 302 Moved\r\nLocation: {place}\r\n\r\n".encode()
        # not the question that is asked when a judge is loaded
        server.spoil = lambda body, digit, n: spoilt.get(n % 16) if body["pictures"][0].shape[2] != 64 else None
        run = tmp_path / "run"
        said = [run_script("train.py", *small_run(run, server.spec, judge_workers=1, steps=2, val_tasks=2))]
        said.append(run_script("eval.py", "--model", editor_folder(), "--lora", run, "--judge", server.spec,
                               "--reasoning", "direct", "--turns", 2, "--denoise", 2, "--probes", 2, "--out",
                               run / "eval"))
        server.spoil = lambda body, digit, n: 401 if body["pictures"][0].shape[2] != 64 else None
        said.append(run_script("train.py", *small_run(tmp_path / "late", server.spec)))
        assert [code for code, _, _ in said] == [0, 0, 2] and "no 401 for ***" in said[2][2]
        assert all(headers["Authorization"] == f"Bearer {KEY}" for headers in server.headers) and other.headers
        assert not [headers for headers in other.headers if KEY in str(headers)]
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert {"config.json", "metrics.jsonl", "step_000002.pt", "validation.json", "settings.json", "scores.jsonl",
            "report.html", "results.json"} <= {file.name for file in files}
    assert not [file for file in files if KEY.encode() in file.read_bytes()]
    assert KEY not in repr(said)


# ------------------------------------------------------------------------------------------------------ what goes wrong

def half(body, digit, n):
    return b"HTTP/1.0 200 OK\r\nContent-Length: 5000\r\n\r\n{\"choices\": [{\"mess"


def raw(start, body):
    return lambda *_: f"HTTP/1.0 {start}\r\n\r\n{body}".encode()


FAULTS = {                                               # what is answered, what is said of it, in how many calls
    "500": (lambda *_: 500, "HTTP 500: .*no 500 for", reward.TRIES), "503": (lambda *_: 503, "HTTP 503", reward.TRIES),
    "429": (lambda *_: 429, "HTTP 429", reward.TRIES), "408": (lambda *_: 408, "HTTP 408", reward.TRIES),
    "400 is final": (lambda *_: 400, "HTTP 400: .*no 400 for", 1), "422 is final": (lambda *_: 422, "HTTP 422", 1),
    "an error that is no object": (raw("400 No", '["too long"]'), 'HTTP 400: \\["too long"\\]', 1),
    "an error that is cut short": (raw("500 No\r\nContent-Length: 5000", "oops"), "IncompleteRead", reward.TRIES),
    "garbage": (lambda *_: "I like it", "not one digit from 0 to 9: 'I like it'", reward.TRIES),
    "out of range": (lambda *_: "10", "not one digit from 0 to 9: '10'", reward.TRIES),
    "no JSON": (raw("200 OK", "<html>"), "JSONDecodeError: .*<html>", reward.TRIES),
    "another JSON": (raw("200 OK", '{"choices": []}'), 'IndexError: .*"choices"', reward.TRIES),
    "JSON of nothing": (raw("200 OK", "null"), "TypeError: .*null", reward.TRIES),
    "an error with status 200": (raw("200 OK", '{"error": "busy"}'), "KeyError: .*busy", reward.TRIES),
    "no content": (lambda *_: {"message": {"content": None}, "finish_reason": "stop"}, "not one digit", reward.TRIES),
    "cut off while thinking": (lambda *_: {"message": {"content": None}, "finish_reason": "length"},
                               "cut off after 16 tokens; thinking models need --reasoning think", reward.TRIES),
    "half an answer": (half, "IncompleteRead", reward.TRIES),
    "slow": (lambda *_: time.sleep(.5), "timed out", reward.TRIES),
    "hung up": (lambda *_: b" ", "BadStatusLine", reward.TRIES)}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_call_that_goes_wrong_is_tried_again_and_is_then_nan_in_its_row_only(fault, capsys, monkeypatch):
    """A failure that counts as 0, is clamped, moves other rows, is never tried again, or is tried for ever."""
    spoil, words, tries = FAULTS[fault]
    asked = prompts(8)
    bad = {text for _, text in asked[2:4]}

    def some(body, *rest):
        return spoil(body, *rest) if body["messages"][0]["content"][-1]["text"] in bad else None
    with Server(some) as server:
        monkeypatch.setitem(reward.TIMEOUT, "direct", .2 if fault == "slow" else 30.)
        judge = reward.load(server.spec, reasoning="direct", workers=3)
        got = scores(judge, asked)
        assert got.isnan().tolist() == [2 <= i < 4 for i in range(8)]
        keep = ~got.isnan()
        assert torch.allclose(got[keep], digits(asked)[keep] / 9)
        assert len(server.asked()) == 6 + 2 * tries
        assert re.search(words, judge.last_failure) and "\n" not in judge.last_failure
        assert capsys.readouterr().err == f"the judge failed in 2 of 8 answers: {judge.last_failure}\n"


def test_a_fault_that_passes_costs_nothing(capsys):
    """One hiccup of a busy server, and the score is gone."""
    count = {}

    def spoil(body, digit, n):
        text = body["messages"][0]["content"][-1]["text"]
        count[text] = count.get(text, 0) + 1
        return (500, "what?", None)[count[text] - 1]
    with Server(spoil) as server:
        judge, asked = reward.load(server.spec, reasoning="direct"), prompts()
        assert torch.allclose(scores(judge, asked), digits(asked) / 9)
        assert set(count.values()) == {3} and capsys.readouterr().err == "" and judge.last_failure == ""


def test_the_pause_between_tries_grows(monkeypatch):
    """A server that is starting again, hammered."""
    pauses = []
    monkeypatch.setattr(reward, "PAUSE", 1.)
    with Server(lambda *_: 500) as server:
        judge = reward.load(server.spec, reasoning="direct")
        monkeypatch.setattr(reward.time, "sleep", pauses.append)
        assert scores(judge, prompts(1)).isnan().all()
    assert pauses == [1., 2.]


def test_a_server_that_is_gone_does_not_hold_up_the_run():
    """A thousand calls that each wait and try again, after the server has died: hours until the run stops."""
    with Server() as server:
        judge, asked = reward.load(server.spec, reasoning="direct", workers=4), prompts(60)
        server.spoil = lambda *_: 500
        assert scores(judge, asked).isnan().all()
        assert judge.last_failure.startswith("HTTP 500: ") and judge.last_failure.count("500") == 2      # said once
        assert reward.TRIES * 8 <= len(server.asked()) <= reward.TRIES * (8 + 4)
        server.spoil = lambda *_: None                           # the next turn tries again
        assert torch.allclose(scores(judge, asked), digits(asked) / 9)
    for _ in range(2):
        assert scores(judge, prompts(60, seed=1)).isnan().all()
        assert re.fullmatch("URLError: .*refused", judge.last_failure), "what was said before is repeated in it"


def test_a_server_that_fails_now_and_then_is_asked_to_the_end():
    """Failures counted over the whole batch, not in a row: half of the step unjudged for a few bad pictures."""
    with Server(lambda body, digit, n: 400 if digit % 2 else None) as server:
        asked = prompts(60)
        got, odd = scores(reward.load(server.spec, reasoning="direct", workers=1), asked), digits(asked) % 2 == 1
        assert got[odd].isnan().all() and not got[~odd].isnan().any() and odd.sum() > 16 and len(server.asked()) == 60


def test_what_is_no_server_is_refused_in_one_line(monkeypatch):
    """A traceback; or a run that starts and fails on every call."""
    nobody = f"http://127.0.0.1:{free_port()}/v1#m"
    with Server() as one:
        monkeypatch.setattr(Handler, "do_POST", lambda self: self.reply(b'{"error": "no model\\nof this name"}', 404))
        for spec, words in ((nobody, "refused"), (one.spec, "HTTP 404: .*no model"), ("http://#m", "no host"),
                            ("http:///v1#m", "no host")):
            with pytest.raises(ValueError, match=f"^--judge {re.escape(spec)} .*{words}") as error:
                reward.load(spec)
            assert len(str(error.value).splitlines()) == 1


# ----------------------------------------------------------------------------------------------------- training with it

def small_run(out, spec, **changes):
    options = dict(model=editor_folder(), out=out, judge=spec, tasks=2, group=2, turns=2, denoise=3, window=1,
                   train_steps="0-1", steps=3, lora_rank=2, updates=1, val_tasks=0, save_every=1, min_std=0,
                   reasoning="direct") | changes
    return [word for name, value in options.items() for word in ("--" + name.replace("_", "-"), str(value))]


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def few_tasks(monkeypatch):
    tasks = make_tasks(8)
    monkeypatch.setattr(train.data, "load", lambda *_, **__: tasks)


def test_a_judge_that_dies_in_the_middle_of_a_step(few_tasks, tmp_path):
    """The run crashes, trains on noise, or loses its checkpoint; the user is not told what the server said."""
    with Server() as server:                                     # 2 rewards x 4 rows x 2 turns = 16 calls a step
        server.spoil = lambda body, digit, n: 503 if n > 16 + 10 else None
        code, out, err = run_script("train.py", *small_run(tmp_path, server.spec, judge_workers=1))
        assert code == 2 and "Traceback" not in err
        last = "train.py: step 3: the judge failed on 100% of the turns, more than 50%; .*HTTP 503: .*no 503"
        assert re.match(last, err.splitlines()[-1])
        # Of step 2 turn 1 was judged, and of turn 2 all but consistency and two more.
        assert [row["judge/failed"] for row in metrics(tmp_path)] == [0, .5]


def test_the_exact_judge_looks_on(few_tasks, tmp_path):
    """Reward hacking that nobody can see; the exact reward taken for the judge's, or trained on."""
    with Server(lambda *_: "9") as server:                       # is pleased with everything
        code, out, err = run_script("train.py", *small_run(tmp_path, server.spec, steps=2))
        assert code == 0, err
    for row in metrics(tmp_path):
        assert row["reward/following"] == row["reward/following_turn2"] == 1
        assert {"referee/following", "referee/consistency", "referee/success", "referee/success_turn2"} <= set(row)
        assert row["referee/following"] < 1 and row["group_std/following"] == 0


@pytest.mark.parametrize("script", ["reward.py", "eval.py", "train.py"])
def test_ctrl_c_ends_a_script_whose_server_is_silent(script, tmp_path):
    """Catches: a program that is told to end, and waits for minutes until its server's time is up; a traceback; the
    first Ctrl-C in training without a word, so that it looks as if it had not been heard."""
    Image.new("RGB", (48, 48)).save(tmp_path / "a.png")
    answer, arrived = threading.Event(), threading.Event()
    with Server(lambda *_: arrived.set() or answer.wait(60) and None) as server:
        words = {"reward.py": ["--judge", server.spec, "--reasoning", "direct", *[tmp_path / "a.png"] * 2, "Nothing"],
                 "eval.py": ["--model", editor_folder(), "--judge", server.spec, "--reasoning", "direct", "--tasks", 2,
                             "--turns", 1, "--denoise", 1, "--probes", 0, "--out", tmp_path / "out"],
                 "train.py": small_run(tmp_path / "out", server.spec, referee="none")}[script]
        # a shell that starts the tests in the background has them, and their children, ignore Ctrl-C
        heard = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
        process = subprocess.Popen([sys.executable, ROOT / script, *map(str, words)], stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, text=True, preexec_fn=heard)
        try:
            assert arrived.wait(120), "the server was never asked"
            time.sleep(.3)
            process.send_signal(signal.SIGINT)
            if script == "train.py":
                # a scheduler and torchrun both pass it on
                time.sleep(.3)
                process.send_signal(signal.SIGINT)
                time.sleep(train.ECHO + .3)
                assert process.poll() is None, "the step was not waited for"
                process.send_signal(signal.SIGINT)
            start = time.perf_counter()
            _, err = process.communicate(timeout=30)
            assert time.perf_counter() - start < 10
        finally:
            process.kill()
            answer.set()
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.strip()]
    assert process.returncode == 130 and "Traceback" not in err, err
    told = "SIGINT: the step is finished and saved first; once more ends the run at once"
    assert lines[-1] == f"{script}: interrupted by SIGINT" if script != "train.py" else told in lines, err


def test_scoring_the_trajectory_costs_one_call_and_reaches_every_turn(few_tasks, tmp_path):
    """Every turn scored although the trajectory was to be; turns without a score; pictures of another turn."""
    with Server(lambda body, digit, n: str(n)) as server:
        flags = small_run(tmp_path, server.spec, steps=1, aggregate="whole", spread="trajectory")
        code, out, err = run_script("train.py", *flags)
        assert code == 0, err
        assert len(server.asked()) == 2 * 4                      # 2 rewards x 4 trajectories
        for body in server.asked():
            text = body["messages"][0]["content"][-1]["text"]
            assert len(body["pictures"]) == 2 and "1. " in text and "2. " in text
        sources = [torch.from_numpy(np.array(task.picture())).permute(2, 0, 1) for task in make_tasks(8)]
        assert all(any(torch.equal(body["pictures"][0], source) for source in sources) for body in server.asked())
    row, = metrics(tmp_path)
    assert row["judge/failed"] == 0
    assert row["reward/following_turn2"] == pytest.approx(row["reward/following"])     # the means of other sums
    assert row["advantage/used"] == 1


# -------------------------------------------------------------------------------------------------------- a real server

SERVING = all(importlib.util.find_spec(name) for name in ("openai", "fastapi", "uvicorn"))


@pytest.mark.skipif(not SERVING, reason="transformers serve needs tests/requirements.txt")
def test_a_real_server_gives_the_scores_of_the_model_in_process(tmp_path):
    """Pictures or words that change on the way through somebody else's server; a request that only our stub takes."""
    port = free_port()
    folder = str(ROOT / "shapes/judge")
    with open(tmp_path / "log", "w") as log:
        serve = [sys.executable, "-m", "transformers.cli.transformers", "serve", folder, "--device", "cpu",
                 "--dtype", "float32", "--port", str(port)]
        server = subprocess.Popen(serve, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5)
                break
            except OSError:
                assert server.poll() is None, (tmp_path / "log").read_text()
                time.sleep(.2)
        tasks = make_tasks(3)
        images = torch.from_numpy(np.stack([world.render(t.meta["scenes"]) for t in tasks])).permute(0, 1, 4, 2, 3)
        images[2, 2] = images[2, 1]                              # nothing done
        for reasoning in ("direct", "think"):
            served = reward.load(f"http://localhost:{port}/v1#{folder}", reasoning=reasoning, workers=2)
            assert torch.equal(served(tasks, images, 1), reward.load(folder, reasoning=reasoning)(tasks, images, 1))
        for spec, words in ((folder, "gives no top_logprobs"), (f"{folder}-another", "HTTP 4")):
            with pytest.raises(ValueError, match=words):
                reward.load(f"http://localhost:{port}/v1#{spec}")
    finally:
        server.terminate()
        server.wait(20)
