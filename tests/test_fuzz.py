"""Random files, answers and command lines: a value or a ValueError of one line, never another number than is said."""
import csv
import io
import json
import math
import re
import tempfile
from dataclasses import fields
from pathlib import Path

import pytest
from PIL import Image

import data
import eval as evaluation
import reward
import train
from bench import edival

pytest.importorskip("hypothesis", reason="hypothesis is not installed")
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st


def fuzz(n):
    """n examples, the same ones every time."""
    return settings(max_examples=n, derandomize=True, deadline=None, database=None,
                    suppress_health_check=list(HealthCheck))


def value_or_line(work, *args):
    """What work(*args) returns, or None where it refuses; another exception, or a refusal of many lines, is a fault."""
    try:
        return work(*args)
    except ValueError as error:
        line = data.one_line(error)
        assert line and type(error) is ValueError, f"{type(error).__name__}: {error}"
        return None


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as name:
        Image.new("RGB", (48, 32), "red").save(Path(name) / "a.png")
        Image.new("RGB", (48, 32), "red").save(Path(name) / "3_input_raw.png")
        yield Path(name)


# ----------------------------------------------------------------------------------------------------------- tasks, CSV

TEXT = st.text(max_size=8) | st.sampled_from(
    ["a.png", "Add a hat", "Remove it", "color_alter", "\x00", "\u2028", "nan"])
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=8)
WORDS = st.lists(TEXT | st.just("Add a hat"), min_size=1, max_size=4)
ROW = st.fixed_dictionaries({}, optional={"image": st.just("a.png") | JSON, "instructions": WORDS | JSON,
                                          "kinds": WORDS | JSON, "other": JSON})
GOOD_ROW = st.lists(st.text(max_size=8), min_size=3, max_size=4).map(lambda words: {
    "image": "a.png", "instructions": ["Add a hat"] + [f"say {word}" for word in words], "kinds": ["x", *words]})
GOOD_LINE = GOOD_ROW.map(lambda row: json.dumps(row).encode())
LINE = st.one_of([GOOD_LINE] * 12 + [st.binary(max_size=30), (ROW | JSON).map(lambda row: json.dumps(row).encode())])


@fuzz(150)
@given(lines=st.lists(LINE, max_size=4), K=st.integers(1, 3), split=st.sampled_from(["train", "val", "test", "all"]))
@example(lines=[b"[" * 100_000], K=1, split="all")
@example(lines=[b'{"image": "a.png", "instructions": ["\\ud800"]}'], K=1, split="all")
def test_any_task_file_is_tasks_or_one_line(folder, lines, K, split):
    """Catches: a traceback for a broken line; a line left out, put in another's place or cut to fewer turns than K."""
    path = folder / "tasks.jsonl"
    path.write_bytes(b"\n".join(lines))
    tasks = value_or_line(data.load, str(path), split, K, 39)
    rows = [json.loads(line.decode("utf-8-sig")) for line in b"\n".join(lines).split(b"\n") if tasks and line.strip()]
    if tasks is None:
        return
    if split in ("test", "all"):
        assert [task.instructions for task in tasks] == [row["instructions"] for row in rows]
    for task in tasks:
        assert len(task.instructions) >= K and len(task.kinds) == len(task.instructions)
        assert all(isinstance(text, str) for text in task.instructions + task.kinds)
        assert task.picture().size == (48, 32) and task.size == (32, 48)
    assert re.fullmatch("[0-9a-f]{16}", data.file_fingerprint(str(path)))


COLUMNS = ["image_index", "turns", "task_type", "instructions", "format_instructions", "bg_consistency",
           "unchanged_objects", "all_objects"]
CELL = TEXT | st.sampled_from([
    "3", "4", "1", "2", "True", "[]", "['x']", "['x', 'y']", "[1]", "[[]]", "[" * 300, "['a',", "[__import__('os')]",
    "-1", "1e9", "['Add a hat', 'Remove it']", "[b'x']", "[{}]", "[...]"])
GOOD_ROWS = [["3", str(turn), "['x', 'y']", "['Add a hat', 'Remove it']", "['Add [hat]', 'Remove [it]']", "True",
              "['cat']", "['cat', 'hat']"] for turn in (1, 2)]
# a good dialogue with a few cells that are other ones, or rows of any cells
SPOILT_ROWS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 7), CELL), max_size=2).map(lambda changes: [
    [next((cell for row, column, cell in changes if (row, column) == (i, j)), good) for j, good in enumerate(line)]
    for i, line in enumerate(GOOD_ROWS)])
CSV_ROWS = SPOILT_ROWS | SPOILT_ROWS | st.lists(st.lists(CELL, max_size=9), max_size=3)


def as_csv(rows):
    file = io.StringIO()
    csv.writer(file).writerows(rows)
    return file.getvalue().encode("utf-8", "surrogatepass")


@fuzz(200)
@given(content=CSV_ROWS.map(lambda rows: as_csv([COLUMNS, *rows])) | CSV_ROWS.map(as_csv) | st.binary(max_size=60),
       pictured=st.booleans(), K=st.integers(1, 2))
@example(content=as_csv([COLUMNS, ["3", "1", "['x']", "[" * 100_000, "", "", "", ""]]), pictured=True, K=1)
@example(content=as_csv([COLUMNS, *[row[:4] + [""] + row[5:] for row in GOOD_ROWS]]), pictured=True, K=1)
@example(content=as_csv([COLUMNS, *GOOD_ROWS]), pictured=True, K=2)
def test_any_csv_is_tasks_or_one_line(folder, content, pictured, K):
    """Catches: a traceback of csv, ast or a missing column; a cell that is run; a row that is none taken for a task."""
    (folder / "edival.csv").write_bytes(content)
    tasks = value_or_line(edival.load_tasks, folder / "edival.csv", folder if pictured else None, K)
    for task in tasks or []:
        assert len(task.instructions) >= K and all(isinstance(text, str) for text in task.instructions + task.kinds)
        for name in ("background_kept", "objects_kept", "dependent"):
            assert len(task.meta.get(name, task.instructions)) == len(task.instructions)
        for k in range(K):
            if pictured:
                data.alone(task, k)


# -------------------------------------------------------------------------------------------------------------- answers

def reader(reasoning):
    return reward.VLMJudge(reward.RUBRICS["turn"], "turn", reasoning)


PIECE = st.text(max_size=6) | st.sampled_from([
    '{"score": 7}', '{"score": 7.5}', '{"score": 11}', '"score": 3', "7", "10", "-3", "0.7", "7/9", "\uff17", "\u0667",
    "<think>", "</think>", "\n", " ", "The score is ", "**", ".", "```", '{"why": "x", "score": 2}',
    '{"score": "5"}', "\u22123", "9%"])


@pytest.mark.parametrize("reasoning", ["direct", "think"])
@fuzz(300)
@given(pieces=st.lists(PIECE, max_size=5), cut=st.booleans())
def test_any_text_is_its_score_or_none(reasoning, pieces, cut):
    """Catches: a traceback of a regular expression; a score that the text does not hold, one of several, a part of a
    longer number, one of a text that was cut off."""
    text = "".join(pieces)
    score, said = reader(reasoning).read(text, cut)
    if math.isnan(score):
        return
    assert 0 <= score <= 1 and not cut and said == text.strip()
    answer = text.rpartition("</think>")[2]
    numbers = re.findall(r"\d+(?:\.\d+)?", answer)
    if reasoning == "direct":
        assert [float(number) for number in numbers] == [pytest.approx(score * 9)], text
    else:
        scores = [float(x) for x in re.findall(r'"score"\s*:\s*"?(-?[0-9.]+[0-9]|-?[0-9])', answer)]
        assert {round(x, 6) for x in scores} == {round(score * 9, 6)}, text


@pytest.mark.parametrize("reasoning", ["direct", "think"])
@fuzz(100)
@given(score=st.integers(0, 9), before=st.text("abc \n.,:*", max_size=12), after=st.text("abc \n", max_size=6))
def test_a_score_among_words_is_found(reasoning, score, before, after):
    """Catches: a reader so strict that it finds nothing: the test above would be content with it."""
    if reasoning == "think":
        text, wanted = before + f'{{"score": {score}}}\n', score / 9
    else:
        text, wanted = re.sub(r"[-.,]*$", "", before) + f" {score} " + after, score / 9
    assert reader(reasoning).read(text)[0] == pytest.approx(wanted), text


ODD_NUMBER = st.sampled_from([0., -.1, -1., -40., math.nan, math.inf, -math.inf, 1e-4])
NUMBER = st.floats() | ODD_NUMBER | st.none() | st.text(max_size=2)
DIGITS = [str(digit) for digit in range(10)]
TOKEN = st.sampled_from(DIGITS + [" 7", "7\n", "\uff17", "10", "A", ""]) | st.none() | st.integers()
SURE = st.permutations([("7", -.1), ("A", -3.), (" 3", -4.), ("", -9.)])
SPOILT = st.tuples(SURE, NUMBER).map(lambda drawn: [*drawn[0][:3], (drawn[0][3][0], drawn[1])])
LIKELIEST = (SURE | SPOILT).map(lambda tokens: {
    "logprobs": {"content": [{"top_logprobs": [{"token": token, "logprob": logprob} for token, logprob in tokens]}]},
    "message": {"content": "7"}})
CHOICE = LIKELIEST | LIKELIEST | st.fixed_dictionaries({}, optional={
    "message": st.fixed_dictionaries({}, optional={"content": st.text(max_size=5) | JSON}) | JSON,
    "logprobs": st.fixed_dictionaries({"content": st.lists(st.fixed_dictionaries({"top_logprobs": st.lists(
        st.fixed_dictionaries({}, optional={"token": TOKEN, "logprob": NUMBER}), max_size=4)}), max_size=2)}) | JSON,
    "finish_reason": st.sampled_from(["stop", "length", None])})
REPLY = st.fixed_dictionaries({"choices": st.lists(CHOICE, max_size=2) | JSON}) | JSON


@pytest.mark.parametrize("reasoning", ["logits", "direct"])
@fuzz(300)
@given(reply=REPLY.map(json.dumps) | st.text(max_size=20), status=st.sampled_from([200, 200, 200, 404, 500]))
def test_any_reply_of_a_server_is_a_score_or_none(reasoning, reply, status):
    """Catches: a traceback in a worker that takes its whole batch along; a number outside of 0 to 1; words of two
    lines; a score of a reply that was refused."""
    judge = object.__new__(reward.ServedJudge)
    reward.VLMJudge.__init__(judge, reward.RUBRICS["turn"], "turn", reasoning)
    judge.model, judge.post = "m", lambda body: (status, reply)
    score, said, seen = judge.call(judge.prompt(*reward.TRIAL), 0, 1)
    assert math.isnan(score) or (0 <= score <= 1 and seen == status == 200)
    assert isinstance(said, str) and (seen == 200 or len(said.splitlines()) <= 1)
    if reasoning == "logits" and not math.isnan(score):
        likeliest = json.loads(reply)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        p = [0.] * 10
        for entry in likeliest:
            assert -math.inf < entry["logprob"] <= 1e-3
            token = entry["token"].strip(" \t\n")
            if len(token) == 1 and token in "0123456789":
                p[int(token)] += math.exp(entry["logprob"])
        assert .5 <= sum(p) <= 1.01 and score == pytest.approx(sum(d * q for d, q in enumerate(p)) / sum(p) / 9)


# -------------------------------------------------------------------------------------------------------- command lines

ODD = st.sampled_from([
    "", "0", "1", "2", "3", "-1", "nan", "inf", "-inf", "1e999", "1e-400", "x", "0x10", "\u0663", " 4 ", "1_0", "true",
    "false", "0-4", "4-0", "0-", "-", "--", "1,2", "shapes", "exact", "none", "9" * 30, "a b", "\u00e9"])


def words_of(settings_class):
    """Random flags of a dataclass of options, each with a fitting value, or with any."""
    words = []
    for f in fields(settings_class):
        name, choices = data.flag(f.name), f.metadata["choices"]
        fitting = st.sampled_from(choices) if choices else {
            bool: st.sampled_from(["true", "false"]), int: st.integers(0, 12).map(str), str: ODD, dict: ODD,
            float: st.sampled_from(["0", ".5", "1", "2.5"])}[f.type]
        value = fitting | fitting | ODD
        words.append(st.just([name]) if f.metadata["switch"] else st.tuples(st.just(name), value).map(list))
    anything = st.one_of(words) | st.one_of(words) | st.one_of(words) | ODD.map(lambda word: [word])
    return st.lists(anything, max_size=7).map(lambda lists: [word for part in lists for word in part])


@fuzz(400)
@given(words=words_of(train.Config))
@example(words=["--lr", "inf"])
@example(words=["--kl", "nan"])
def test_any_command_line_of_training_is_a_config_or_one_line(words):
    """Catches: a traceback, or a page of usage, for a typing error; a flag that is given and not in the config; a
    number outside of its bounds that is let through."""
    def work():
        cfg = train.parse(words)
        train.check(cfg)
        train.divide(cfg, 0, 1)
        return cfg
    if {"-h", "--help"} & set(words):
        return
    cfg = value_or_line(work)
    if cfg is None:
        return
    given_flags = data.parse_flags(train.Config, "", words)
    assert all(getattr(cfg, name) == value for name, value in given_flags.items() if value != "")
    for f in fields(cfg):
        value = getattr(cfg, f.name)
        assert type(value) is f.type or (f.type is float and type(value) is int)
        if f.type in (int, float):
            bounds = {"at least": -math.inf, "greater than": -math.inf, "at most": math.inf} | f.metadata["bounds"]
            assert math.isfinite(value) and bounds["at least"] <= value <= bounds["at most"]
            assert value > bounds["greater than"]
        assert not f.metadata["choices"] or value in f.metadata["choices"]
    steps, window = train.trained_steps(cfg), train.stochastic_window(cfg, 1)
    assert len(steps) >= cfg.window
    assert cfg.algo != "grpo" or (len(window) == cfg.window and window.stop < cfg.denoise)


@fuzz(300)
@given(words=words_of(evaluation.Settings), model=st.booleans())
def test_any_command_line_of_an_evaluation_is_settings_or_one_line(words, model):
    """Catches: a traceback for a typing error; a flag that is given and not in the settings."""
    words = words + ["--model", "m"] * model
    def work():
        return evaluation.settle(data.parse_flags(evaluation.Settings, "", words))
    found = value_or_line(work)
    if found is None:
        return
    given_flags = data.parse_flags(evaluation.Settings, "", words)
    for name, value in given_flags.items():
        assert name == "lora" or getattr(found, name) == value
    assert len(found.lora) == len(given_flags.get("lora", []))
    assert all(re.fullmatch(r"\w[\w.-]*", name) and name != "base" for name in found.lora)


NAMES = [f.name for f in fields(evaluation.Settings)] + ["eval_denoise", "x"]


@fuzz(150)
@given(values=st.dictionaries(st.sampled_from(NAMES), JSON, max_size=5), raw=st.binary(max_size=20),
       broken=st.booleans())
def test_any_config_of_a_run_is_settings_or_one_line(folder, values, raw, broken):
    """Catches: a traceback where a run's folder comes from elsewhere; a value of another type in the settings."""
    (folder / "config.json").write_bytes(raw if broken else json.dumps(values).encode())
    found = value_or_line(evaluation.settle, {"run": str(folder)})
    for f in fields(found) if found else []:
        value = getattr(found, f.name)
        assert value is None or isinstance(value, (int, float) if f.type is float else f.type), f.name
