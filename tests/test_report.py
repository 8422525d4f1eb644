"""bench/report.py: nothing lost or bent on the way from results to tables, figures, contact sheets and report.html."""
import json
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation
from bench import report
from bench.report import nice
from fixtures import make_tasks

NAN = float("nan")
K = 3


def make_arms(rates, n=8, seeds=2, pictures=True, embedded=True):
    """Arms of random scores: {name: Scores}; the picture after turn k of task i has one colour, (40 k, 20 i, 90)."""
    generator, arms = torch.Generator().manual_seed(0), {}
    draw = lambda: torch.rand(seeds, n, K, generator=generator, dtype=torch.float64)

    def picture(row):
        colors = torch.tensor([[40 * k, 20 * row % 256, 90] for k in range(K + 1)], dtype=torch.uint8)
        return colors[:, :, None, None].expand(-1, -1, 48, 48)
    for name, rate in rates.items():
        s = (draw() < rate).double()
        clean = s.clone()
        clean[..., 2] = NAN                                                  # no independent instruction at turn 3
        measured = {"copied": (draw() < .1).double(), "drift": 9 * draw(), "nothing": 5 * draw(), "clean": clean}
        measured["kept_clean"] = draw().where(~clean.isnan(), NAN)
        places = None
        if embedded:
            measured["possible"], places = (draw() < .8).double().clamp(min=s), [3, 0, 1, 9, 0, 2, 0, 0, 5]
        shown = picture if pictures else None
        arms[name] = evaluation.Scores(s, draw()[..., None], measured, {"following": draw()}, shown, places)
    return arms


def summarise(arms, tasks, **about):
    about = {"profile": "exact", "data": "shapes", "judge": "exact", "denoise": 8, "seeds": 2} | about
    return about | {"n": len(tasks)} | evaluation.summarise(arms, tasks, samples=50)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A report of three arms on 8 dialogues, one of them with a failed judgement: (folder, result, arms, tasks)."""
    out, tasks = tmp_path_factory.mktemp("report"), make_tasks(8, K=K)
    arms = make_arms({"base": .5, "tuned": .8, "other.arm-2": .5})
    arms["tuned"].success[0, 2, 1] = NAN
    tasks[3].instructions[0] = 'Add <b>"this"</b> & that'
    result = summarise(arms, tasks)
    report.write_report(out, result, arms, tasks)
    return out, result, arms, tasks


def test_results_are_json_that_everybody_reads(written):
    """Catches: NaN, which is no JSON; numbers rounded in the file that others compute with."""
    def refuse(word):
        raise ValueError(word)
    again = json.loads((written[0] / "results.json").read_text(), parse_constant=refuse)
    assert again["arms"]["base"]["O"] == written[1]["arms"]["base"]["O"] and again["arms"]["base"]["wear"][2] is None


def test_the_tables_hold_the_numbers(written):
    """Catches: a column shifted, a row of another arm, a cell that breaks the table."""
    out, result, _, _ = written
    text = (out / "tables.md").read_text()
    found = {title: [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in part.splitlines()
                     if line.startswith("| ")] for title, part in re.findall(r"## (.*)\n((?:(?!## ).*\n)*)", text)}
    assert all(len({len(row) for row in rows}) == 1 for rows in found.values())
    main = found["Main results"]
    assert main[0][1:] == [f"{metric} {k}" for metric in ("IF", "CC", "O") for k in (1, 2, 3)]
    for row in main[2:]:
        values = result["arms"][row[0]]
        expected = [f"{100 * values[metric][k]:.2f}" for metric in ("IF", "CC", "O") for k in range(K)]
        assert row[1:] == expected
    for arm in ("tuned", "other.arm-2"):
        difference = result["differences"][arm]
        for row in found[f"{arm} against base"][2:]:
            for k, cell in enumerate(row[1:]):
                low, high = difference["interval_95"][row[0]][k]
                start = f"{100 * difference[row[0]][k]:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"
                assert cell.startswith(start) and ("n.s." in cell) == (low <= 0 <= high)
    kinds = {row[0]: row for row in found["Marginal success by edit type"][2:]}
    for kind in kinds:
        metric = "kind " + kind.replace(" ", "_")
        assert kinds[kind][2] == f"{100 * result['arms']['base'][metric][0]:.2f}"
        assert int(kinds[kind][1]) == sum(task.kinds[:K].count(kind.replace(" ", "_")) for task in written[3])
    lost = {(row[0], row[1]): row[2:] for row in found["What was lost: room, skill, wear"][2:]}
    for arm, values in result["arms"].items():
        for words, metric in (("possible", "possible"), ("M clean", "M_clean")):
            low, high = values["interval_95"][metric][1]
            assert lost[arm, words][1] == f"{100 * values[metric][1]:.2f} [{100 * low:.2f}, {100 * high:.2f}]"
        low, high = values["interval_95"]["wear_pooled"][0]
        pooled = f"{100 * values['wear_pooled'][0]:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"
        assert lost[arm, "wear, turns 2 to 3 pooled"] == ["", "", pooled + " n.s." * (low <= 0 <= high)]
        for words, metric in (("CC, own outputs", "CC_self"), ("CC, clean context", "CC_clean")):
            assert lost[arm, words] == [f"{100 * x:.2f}" for x in values[metric][:2]] + ["–"]
    # turn 1 has nothing to wear, turn 3 no clean context
    assert lost["base", "wear"][::2] == ["–", "–"] and lost["base", "wear"][1].endswith("n.s. (n = 16)")
    assert found["How many verdicts"][3][2] == "15 / 15 / 16"                # tuned, turn 2


@pytest.mark.parametrize("profile, sentence", [
    ("EdiVal", "EdiVal's own verdicts; CC is the mean of its object and background consistency."),
    ("proxy", "Proxy scores (EdiVal's data, our judge): not EdiVal-IF and EdiVal-CC, not comparable with published "
              "tables.")])
def test_names_are_spelled_as_they_are(tmp_path, profile, sentence):
    """Catches: "Edival's own verdicts; cc is", "not edival-if": a sentence put in capitals by rule; a proxy's numbers
    without the word."""
    tasks = make_tasks(3, K=K)
    arms = make_arms({"base": .5, "tuned": .5}, 3, embedded=False)
    report.write_report(tmp_path, summarise(arms, tasks, profile=profile, note="CC by DINOv3"), arms, tasks)
    # what is lost for want of room is known of the embedded world alone
    text = (tmp_path / "tables.md").read_text()
    assert "## Wear and drift" in text and "What was lost" not in text and "possible" not in text
    figures = {file.stem for file in (tmp_path / "figures").glob("*")}
    assert not figures or figures == {"success", "plane", "wear", "drift", "kinds"}
    page = (tmp_path / "report.html").read_text().replace("&#39;", "'")
    for text in ((tmp_path / "tables.md").read_text(), page):
        assert sentence in text and "CC by DINOv3" in text
        assert text.count("EdiVal-IF") == text.count("not EdiVal-IF")
        assert ("proxy IF 1" in text) == ("proxy O 3" in text) == (profile == "proxy")
    assert (page.count(sentence) == 2) == ("<b>Proxy.</b>" in page) == (profile == "proxy")


class Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.links, self.tasks, self.images, self.text = [], [], [], [], ""

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.links += [attributes[name] for name in ("src", "href") if name in attributes]
        if tag == "img":
            self.images.append(attributes)
        if (attributes.get("class") or "").startswith("task"):
            self.tasks.append(attributes)
        if tag not in ("img", "meta", "br", "!doctype", "html", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag != "html":
            assert self.open.pop() == tag, tag

    def handle_data(self, text):
        self.text += text


def test_the_html_stands_alone_and_says_what_its_filters_need(written):
    """Catches: a link to a file or to the network, a tag left open, an outcome of another arm or turn, pictures of
    another dialogue, an instruction that is taken for HTML."""
    out, _, arms, tasks = written
    text, reader = (out / "report.html").read_text(), Reader()
    reader.feed(text)
    assert not reader.open and all(link.startswith("data:image/") for link in reader.links) and "http" not in text
    assert 'Add <b>"this"</b> & that' in reader.text and '<b>"this"' not in text
    assert 'max="3"' in text and len(reader.tasks) == 8
    large = [image for image in reader.images if image.get("class") == "large"]
    small = [image for image in reader.images if image.get("class") in ("ok", "no", "unknown")]
    assert len(large) == 8 * (1 + 3) and len(small) == 8 * 3 * K
    assert len(reader.images) == len(large) + len(small) + 6 + len(list((out / "sheets").iterdir()))
    for i, task in enumerate(reader.tasks):
        assert task["data-kind"].split() == tasks[i].kinds[:3]
        for j, arm in enumerate(arms):
            s = arms[arm].success[0, i].tolist()
            expected = ["yes"] * (s == [1, 1, 1]) + ["no"] * (0 in s) + [f"fail{k + 1}" for k in range(3) if s[k] == 0]
            assert task[f"data-arm{j}"].split() == expected
            marks = [image["class"] for image in small[3 * (3 * i + j):3 * (3 * i + j + 1)]]
            assert marks == ["unknown" if v != v else "ok" if v else "no" for v in s]
    task_4_turn_2 = Image.new("RGB", (48, 48), (80, 80, 90))
    assert small[3 * 3 * 4 + 1]["src"] == report.inline(task_4_turn_2, 256)
    assert "not significant" in text or "95 % interval" in text


def test_the_sheets_show_what_they_promise(written, tmp_path, monkeypatch):
    """Catches: wins shown as losses; a sheet of the best cases alone; a failed judge among the failed edits."""
    out, _, arms, tasks = written
    names = {f.stem for f in (out / "sheets").iterdir()}
    assert {"random", "wins-tuned", "failures-base", "failures-tuned"} <= names
    order, turns = report.gains(arms, "tuned")
    by_hand = np.nan_to_num((arms["tuned"].success - arms["base"].success).numpy()).sum((0, 2)) / 2
    assert np.allclose(turns, by_hand) and turns[order[-1]] == max(by_hand) and turns[order[0]] == min(by_hand)
    drawn = {}
    monkeypatch.setattr(evaluation, "contact_sheet", lambda rows, path: drawn.setdefault(path.stem, rows))
    report.draw_sheets(arms, tasks, tmp_path, most=3)
    labels = [label for label, *_ in drawn["wins-tuned"]]
    for i, row in enumerate(order[::-1][:3]):
        assert labels[2 * i:2 * i + 2] == [f"{arm}, dialogue {row}\n{turns[row]:+g} turns" for arm in ("base", "tuned")]
    assert len(drawn["random"]) == 3 * 3 and len({label for label, *_ in drawn["random"]}) == 9
    failures = {}
    for arm in arms:
        for label, _, _, marks in drawn.get(f"failures-{arm}", []):
            dialogue, kind, turn = re.fullmatch(r".*, dialogue (\d)\n(.*) failed at turn (\d)", label).groups()
            assert marks[int(turn) - 1] == 0 and nice(tasks[int(dialogue)].kinds[int(turn) - 1]) == kind
            failures[arm, kind] = failures.get((arm, kind), 0) + 1
    assert failures and max(failures.values()) == 2


def test_the_html_of_many_dialogues_shows_extremes_and_chance():
    """Catches: a file of hundreds of megabytes; a choice that hides the losses."""
    arms = make_arms({"base": .5, "tuned": .5}, 300, 1)
    rows, words = report.choose_shown(arms, 300)
    order, _ = report.gains(arms, "tuned")
    assert len(rows) == len(set(rows)) == 120 and set(order[:40]) | set(order[-40:]) <= set(rows)
    assert "40 biggest losses" in words
    assert report.choose_shown(arms, 100) == (list(range(100)), "All dialogues")
    alone = {"base": arms["base"]}
    assert report.choose_shown(alone, 300)[1] == "120 of 300 dialogues: drawn at random"


# ----------------------------------------------------------------------------------------------------------- figures

def axes():
    return pytest.importorskip("matplotlib.figure").Figure().add_subplot()


def test_figures_put_points_and_intervals_where_their_numbers_are():
    """Catches: turns beside their ticks, an interval around another point, a metric of another arm, a scale of 1."""
    values = {"IF": [.5, None, .25], "M": [.5, .4, .3], "CC": [.9, .8, .7], "wear": [0, .2, None],
              "interval_95": {"IF": [[.4, .7], None, [.2, .25]], "M": [[.4, .6]] * 3,
                              "wear": [[0, 0], [-.1, .3], None]}}
    middle, reach = report.numbers(values | {"interval_95": {"IF": values["interval_95"]["IF"]}}, "IF", 100)
    assert np.allclose(middle, [50, NAN, 25], equal_nan=True)
    assert np.allclose(reach, [[10, NAN, 5], [20, NAN, 0]], equal_nan=True)
    plot = axes()
    report.paint_lines(plot, {"a": values, "b": values}, {"IF": "words"}, 100)
    bars = [container for container in plot.containers]
    for place, bar in zip((-.03, .03), bars):
        line, _, (spans,) = bar
        assert np.allclose(line.get_xdata(), np.arange(1, 4) + place)
        assert np.allclose(line.get_ydata(), [50, NAN, 25], equal_nan=True)
        assert np.allclose(spans.get_segments()[0], [[1 + place, 40], [1 + place, 70]])
    plot = axes()
    report.paint_bars(plot, {"a": values, "b": values}, [("turn 2", "wear", 1), ("turn 3", "wear", 2)])
    assert [bar.get_height() for bar in plot.patches][::2] == [20, 20]
    assert [text.get_text() for text in plot.get_xticklabels()] == ["turn 2", "turn 3"]
    plot = axes()
    values["interval_95"]["CC"] = [None] * 3
    report.paint_plane(plot, {"a": values})
    assert np.allclose(plot.lines[0].get_xydata(), [[50, 90], [NAN, 80], [25, 70]], equal_nan=True)
    for curve in plot.lines[1:]:
        O = (curve.get_xdata() * curve.get_ydata()) ** .5
        assert np.allclose(O, O[0]) and O[0] % 5 == pytest.approx(0, abs=1e-6)


def test_what_the_dialogues_died_of_adds_up_to_what_was_lost():
    """Catches: shares of the survivors taken for shares of all; wear of the wrong sign; a turn or an arm beside its
    name; what is won hidden behind what is lost."""
    base = {"IF": [.9, .54, 0, 0], "possible": [1, .8, .5, None], "M_clean": [.9, .9, .2, None],
            "wear": [0, -.15, -.2, None]}
    tuned = {"IF": [1, .9, .8, .8], "possible": [1, 1, 1, 1], "M_clean": [1, .8, .9, 1], "wear": [0, .1, -.1 / 9, 0]}
    lost = report.losses(base)
    assert np.allclose(lost[:, 1], [.9 * .2, .9 * .8 * .1, .9 * .8 * .15]) and np.allclose(lost[:, 3], 0)
    for values in (base, tuned):
        IF = np.array([1, *values["IF"]])
        assert np.allclose(report.losses(values).sum(0), IF[:-1] - IF[1:])
    plot = axes()
    report.paint_losses(plot, {"base": base, "tuned": tuned})
    (rooms, skills, wears), (_, more, less) = plot.containers[:3], plot.containers[3:]
    assert [bar.get_label() for bar in (rooms, skills, wears)] == ["room", "skill", "wear"]
    # base at turn 2: one upon the other
    room, skill, wear = (bars[1] for bars in (rooms, skills, wears))
    assert (room.get_y(), room.get_height()) == pytest.approx((0, 18)) and skill.get_y() == pytest.approx(18)
    assert (wear.get_y(), wear.get_height()) == pytest.approx((25.2, 10.8))
    # tuned at turn 2: beside it, and what wear has won is below 0
    assert more[1].get_x() > room.get_x() and (more[1].get_y(), more[1].get_height()) == pytest.approx((0, 20))
    assert (less[1].get_y(), less[1].get_height()) == pytest.approx((0, -10))
    assert [text.get_text() for text in plot.get_xticklabels()] == [f"turn {k}" for k in (1, 2, 3, 4)]
    ticks = dict(zip(plot.get_xticks(minor=True).round(3), [t.get_text() for t in plot.get_xticklabels(minor=True)]))
    for bars, name in ((rooms, "base"), (more, "tuned")):
        assert {ticks[round(bar.get_x() + bar.get_width() / 2, 3)] for bar in bars} == {name}


def test_open_places_are_shown_where_they_are():
    """Catches: rows and columns exchanged, the top at the bottom, counts of another arm."""
    plot, counts = axes(), list(range(1, 10))
    report.paint_places(plot, {"base": {"places": counts}, "none": {}, "tuned": {"places": counts[::-1]}})
    assert [text.get_text() for text in plot.texts] == ["base", *map(str, counts), "tuned", *map(str, counts[::-1])]
    down = plot.get_ylim()
    # the first cell is at the top left, the second one beside it
    first, second, fourth = (plot.texts[i].get_position() for i in (1, 2, 4))
    assert down[0] > down[1] and second == (first[0] + 1, first[1]) and fourth == (first[0], first[1] + 1)
    for image, start in zip(plot.images, (0, 3.5)):
        left, right, bottom, top = image.get_extent()
        assert (left, right, bottom, top) == (start, start + 3, 3, 0) and image.get_array()[0, 0] in (1 / 45, 9 / 45)
    assert plot.texts[10].get_position()[0] == 5


@pytest.mark.parametrize("case", ["no success", "one dialogue", "no consistency", "the judge failed"])
def test_figures_are_drawn_of_poor_results(tmp_path, case, recwarn):
    """Catches: a division by the highest bar, an axis from 0 to 0, an interval that is not there."""
    pytest.importorskip("matplotlib")
    n = 1 if case == "one dialogue" else 4
    tasks = make_tasks(n, K=K)
    arms = make_arms({"base": 0 if case == "no success" else .5, "tuned": 0 if case == "no success" else .5}, n)
    for scores in arms.values():
        if case in ("no consistency", "the judge failed"):
            scores.consistency[:] = NAN
        if case == "the judge failed":
            scores.success[:] = NAN
    report.write_report(tmp_path, summarise(arms, tasks), arms, tasks)
    figures = {f.stem for f in (tmp_path / "figures").iterdir()}
    assert figures == {"success", "plane", "losses", "places", "drift", "kinds"} - (
        {"plane"} if case in ("no consistency", "the judge failed") else set())
    assert (tmp_path / "report.html").stat().st_size > 1000
    assert not [w for w in recwarn if "divide" in str(w.message)]


def test_without_matplotlib_one_line_says_how_to_get_it_and_all_else_is_written(tmp_path, monkeypatch, capsys):
    """Catches: an evaluation that dies after its last turn, or that says nothing of the figures that are not there."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    tasks = make_tasks(2, K=K)
    arms = make_arms({"base": .5}, 2)
    report.write_report(tmp_path, summarise(arms, tasks), arms, tasks)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "pip install matplotlib" in err
    assert {f.name for f in tmp_path.iterdir()} == {"results.json", "tables.md", "report.html", "sheets"}
    assert "<h2>Figures" not in (tmp_path / "report.html").read_text()


def test_results_without_pictures_are_reported_without_them(tmp_path, monkeypatch):
    """Catches: EdiVal's own results, whose pictures are elsewhere, that cannot be reported."""
    monkeypatch.setattr(report, "draw_figures", lambda *_: [])
    tasks = make_tasks(2, K=K)
    arms = make_arms({"base": .5, "tuned": .7}, 2, pictures=False)
    report.write_report(tmp_path, summarise(arms, tasks), arms, tasks)
    page = (tmp_path / "report.html").read_text()
    assert "Dialogues</h2>" not in page and "<script" not in page and not (tmp_path / "sheets").exists()
