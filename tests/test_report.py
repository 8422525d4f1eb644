"""report.py: nothing lost or bent on the way from results to tables, figures, contact sheets and report.html."""
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation
import report
from fixtures import make_tasks

NAN = float("nan")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A report of three arms on 8 dialogues, one of them with a failed judgement: (folder, results)."""
    out, tasks, K = tmp_path_factory.mktemp("report"), make_tasks(8, K=3), 3
    generator, arms = torch.Generator().manual_seed(0), {}
    for name, rate in (("base", .5), ("tuned", .8), ("other.arm-2", .5)):
        draw = lambda: torch.rand(2, 8, K, generator=generator, dtype=torch.float64)
        s = (draw() < rate).double()
        arms[name] = {"s": s, "cc": draw()[..., None], "copied": (draw() < .1).double(), "drift": 9 * draw(),
                      "nothing": 5 * draw(), "clean": s.clone()}
        folder = out / f"{name}_generation"
        folder.mkdir()
        for i in range(8):
            for k in range(K + 1):
                Image.new("RGB", (48, 48), (40 * k, 20 * i, 90)).save(folder / f"{i}-{k}.png")
    arms["tuned"]["s"][0, 2, 1] = NAN
    for name in arms:
        arms[name]["clean"][:, :, 2] = NAN                                   # no independent instruction at turn 3
    kinds = [task.kinds for task in tasks]
    results = {"profile": "exact", "model": "shapes/editor", "data": "shapes", "judge": "exact", "denoise": 8,
               "seeds": 2, "n": 8}
    results |= evaluation.summarise(arms, kinds, samples=50)
    pictures = {name: lambda i, name=name: [out / f"{name}_generation" / f"{i}-{k}.png" for k in range(K + 1)]
                for name in arms}
    report.write_report(out, results, arms, tasks, kinds, list(range(8)), pictures)
    return out, results, arms, tasks


def test_results_are_json_that_everybody_reads(written):
    """Catches: NaN, which is no JSON; numbers rounded in the file that others compute with."""
    def refuse(word):
        raise ValueError(word)
    again = json.loads((written[0] / "results.json").read_text(), parse_constant=refuse)
    assert again["arms"]["base"]["O"] == written[1]["arms"]["base"]["O"] and again["arms"]["base"]["EB"][2] is None


def test_the_console_table_marks_what_is_not_significant():
    """Catches: difference and interval with opposite signs, or a mark on the wrong rows."""
    arm = lambda v: {m: [v] for m in report.SHOWN}
    intervals = {m: [[-.1, .4]] if m == "CC" else [[.1, .3]] for m in report.SHOWN}
    results = {"arms": {"base": arm(.3), "tuned": arm(.5)},
               "differences": {"tuned": arm(.2) | {"interval_95": intervals}}}
    lines = report.table(results).splitlines()
    assert len(lines) == 5 and re.search(r"1 +M +0.300 +0.500 +\+0.200 \[\+0.100, \+0.300\]$", lines[1])
    assert [("n.s." in line) for line in lines[1:]] == [m == "CC" for m in report.SHOWN]


@pytest.mark.parametrize("low, high, yes", [(.01, .2, True), (-.2, -.01, True), (0, .2, False), (-.1, 0, False),
                                            (0, 0, False), (NAN, NAN, False)])
def test_an_interval_that_touches_zero_is_not_significant(low, high, yes):
    """Catches: n.s. missing where the bound is 0 or nothing is known."""
    assert report.significant((low, high)) == yes


def test_markdown_and_latex_hold_the_same_numbers(written):
    """Catches: a column shifted in one of them, characters that are LaTeX commands, percent signs that cut a line."""
    out, results, _, _ = written
    md, tex = (out / "tables.md").read_text(), (out / "tables.tex").read_text()
    rows = [line for line in md.splitlines() if line.startswith("| ")]
    assert len({tuple(r.split("|")[1:-1]) for r in rows}) > 20
    first = rows[1].split("|")
    assert first[1].strip() == "base"
    assert float(first[2]) == pytest.approx(100 * results["arms"]["base"]["IF"][0], abs=.006)
    assert float(first[10]) == pytest.approx(100 * results["arms"]["base"]["O"][2], abs=.006)
    numbers = lambda text: sorted(re.findall(r"\d+\.\d\d", text))
    assert numbers(md.split("## Main")[1]) == numbers(tex.split(r"\toprule", 1)[1])
    body = re.sub(r"\\[\\{}%&_#$]", "", "\n".join(line for line in tex.splitlines() if not line.startswith("%")))
    assert body.count("{") == body.count("}") and body.count("$") % 2 == 0 and "%" not in body
    assert "_" not in body.replace("IF_k", "")
    for table in re.findall(r"\\begin{tabular}{(l.*?)}(.*?)\\end{tabular}", tex, re.S):
        cells = [re.sub(r"\\&", "", line).count("&") for line in table[1].splitlines() if line.endswith(r"\\")]
        assert set(cells) == {len(table[0]) - 1}


class Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.links, self.tasks, self.images = [], [], [], 0

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.links += [attributes[name] for name in ("src", "href") if name in attributes]
        self.images += tag == "img"
        if attributes.get("class") == "task":
            self.tasks.append(attributes)
        if tag not in ("img", "meta", "br", "!doctype", "html"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag


def test_the_html_stands_alone_and_says_what_its_filters_need(written):
    """Catches: a link to a file or to the network, a tag left open, an outcome of another arm or turn."""
    out, results, arms, tasks = written
    text, reader = (out / "report.html").read_text(), Reader()
    reader.feed(text)
    assert not reader.open and all(link.startswith("data:image/") for link in reader.links) and "http" not in text
    assert reader.images == 5 + 8 * 3 * 4 + len(list((out / "sheets").iterdir())) and len(reader.tasks) == 8
    for i, task in enumerate(reader.tasks):
        assert task["data-kind"].split() == tasks[i].kinds[:3]
        for j, arm in enumerate(arms):
            s = arms[arm]["s"][0, i].tolist()
            expected = ["yes"] * (s == [1, 1, 1]) + ["no"] * (0 in s) + [f"fail{k + 1}" for k in range(3) if s[k] == 0]
            assert task[f"data-arm{j}"].split() == expected
    assert "not significant" in text or "95 % interval" in text


def test_the_sheets_show_what_they_promise(written):
    """Catches: wins shown as losses; a sheet of the best cases alone."""
    out, _, arms, tasks = written
    names = {f.stem for f in (out / "sheets").iterdir()}
    assert {"random", "wins-tuned", "failures-base", "failures-tuned"} <= names
    order, turns = report.gains(arms, "base", "tuned")
    by_hand = [float(np.nan_to_num((arms["tuned"]["s"] - arms["base"]["s"])[:, i].numpy()).sum() / 2) for i in range(8)]
    assert turns.tolist() == by_hand and turns[order[-1]] == max(by_hand) and turns[order[0]] == min(by_hand)


def test_a_border_is_green_red_or_missing(tmp_path):
    """Catches: colours exchanged, or a turn without a verdict drawn as a failure."""
    pictures = np.full((4, 3, 48, 48), 128, np.uint8)
    report.contact_sheet([("label", pictures, ["1", "2", "3"], [True, False, None])], tmp_path / "sheet.png", width=48)
    sheet = Image.open(tmp_path / "sheet.png")
    assert [sheet.getpixel((10 + k * 58 - 2, 30))
            for k in range(4)] == [(255, 255, 255), (0, 128, 0), (255, 0, 0), (255, 255, 255)]


def test_figures_put_points_where_their_numbers_are(tmp_path):
    """Catches: an axis upside down, ticks beside their values, an interval drawn around another point."""
    plot = report.Plot("t", x=(0, 10), y=(-1, 1))
    assert plot.at(0, -1) == (plot.box[0], plot.box[3]) and plot.at(10, 1) == (plot.box[2], plot.box[1])
    plot.dot(5, .5, "#ff0000")
    plot.span(2, -.5, .5, "#0000ff")
    plot.save(tmp_path / "plot.png")
    image = Image.open(tmp_path / "plot.png")
    at = lambda x, y: image.getpixel(tuple(round(c * plot.SCALE) for c in plot.at(x, y)))
    assert at(5, .5) == (255, 0, 0) and at(2, 0) == at(2, .49) == (0, 0, 255)
    assert at(2, .8) == at(5, -.5) == (255, 255, 255)
    assert report.scale(.03, .47)[0] == (0, .5) and report.scale(-.02, .33)[0][0] <= -.02
    assert [word for _, word in report.scale(0, 1)[1]] == ["0", "20", "40", "60", "80", "100"]


def test_the_html_of_many_dialogues_shows_extremes_and_chance(written):
    """Catches: a file of hundreds of megabytes; a choice that hides the losses."""
    generator = torch.Generator().manual_seed(1)
    s = [(torch.rand(1, 300, 3, generator=generator) < .5).double() for _ in range(2)]
    arms = {name: {"s": v, "cc": torch.ones(1, 300, 3, 1)} for name, v in zip(("base", "tuned"), s)}
    rows, words = report.choose_shown(arms, 300)
    order, turns = report.gains(arms, "base", "tuned")
    assert len(rows) == len(set(rows)) == 120 and set(order[:40]) | set(order[-40:]) <= set(rows)
    assert "40 biggest losses" in words
    assert report.choose_shown(arms, 100) == (list(range(100)), "all dialogues")
