"""What an evaluation leaves to look at: results.json, tables.md, figures/, sheets/, and report.html with all of it.

    python bench/report.py OUT               writes the report of a finished evaluation once more
    write_report(out, result, arms, tasks)   does it for eval.py and bench/edival.py

`result` is what eval.summarise returns, with the settings of the evaluation beside it. Scores are in 0..1 there and in
percent in tables and figures. Nothing here measures anything. Figures need matplotlib; without it all else is written.
"""
import argparse
import base64
import io
import json
import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # so that it runs from any folder

import numpy as np
from jinja2 import Environment, FileSystemLoader
from PIL import Image

import data
import eval as evaluation
import model
from eval import significant

SHOWN = 120            # dialogues in report.html at most
COLORS = ["#4c5a6b", "#d1661a", "#1b7a6e", "#7b4fa3", "#b0322b", "#8a7a1d", "#2f6fd0", "#d65fa0", "#5aa02c", "#222222",
          "#00a0c0", "#e0a800", "#9c6b4e"]
PROFILES = {
    "exact": "Scored by the exact judge of the embedded world.",
    "VLM": "Scored by a vision-language model; an edit succeeds if its following is at least .5.",
    "proxy": "Proxy scores (EdiVal's data, our judge): not EdiVal-IF and EdiVal-CC, not comparable with published "
             "tables. An edit succeeds if its following is at least .5.",
    "EdiVal": "EdiVal's own verdicts; CC is the mean of its object and background consistency."}
NOTES = {
    "main": "Percent. IF: all turns so far succeeded; CC: consistency with the original picture; O = sqrt(IF CC).",
    "difference": "Percentage points, 95 % interval of the paired bootstrap over dialogues; n.s. = it covers 0, "
                  "or there is none; p = McNemar's exact test (several seeds: swapping whole dialogues).",
    "lost": "Percent, 95 % interval. IF_k = IF_k-1 · possible · (M clean + wear), over the dialogues that were right "
            "so far: possible = the turn can still be done after what the model chose; M clean = it succeeds on a "
            "clean picture of the same scene, from the same noise; wear = success on own outputs - M clean, same "
            "dialogues; propagation = the same of all turns that can be done, whatever failed before.",
    "lost of files": "Percent, 95 % interval. M clean: the same instructions on a clean context, where they speak of "
                     "nothing that an earlier one made; wear = success on own outputs - M clean, same dialogues.",
    "verdicts": "Known verdicts for M / IF / CC (EdiVal: object + background) per turn, all seeds; percent of turns "
                "that the judge failed on."}
CAPTIONS = {
    "success": "Cumulative success falls as soon as one turn fails; marginal success shows whether a later turn is "
               "harder than the first.",
    "plane": "Doing nothing gives high CC and no IF: an editor that games the consistency reward moves up and to the "
             "left. Grey lines: equal overall O.",
    "losses": "Share of all dialogues that die at each turn. Room: what the model chose has left none for this turn. "
              "Skill: it fails on a clean picture as well. Wear: it fails on the model's own outputs only (below 0: it "
              "succeeds there only).",
    "wear": "What is lost because the picture before is the model's own; same instructions, same noise.",
    "places": "Where the first object stands whose place was left open, if it was drawn right; counts, all seeds.",
    "drift": "What editing costs by itself, without any judge: 0 is a perfect copy.",
    "kinds": "Which edits the model can do."}


def write_report(out, result, arms, tasks):
    """Write everything into the folder `out`. arms {name: Scores}; pictures are shown where all Scores have them."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    model.write_text(out / "results.json", json.dumps(result, indent=1, allow_nan=False))
    model.write_text(out / "tables.md", markdown(result))
    figures = draw_figures(result, out / "figures")
    pictured = all(scores.pictures for scores in arms.values())
    sheets = draw_sheets(arms, tasks, out / "sheets") if pictured else []
    rows, chosen = choose_shown(arms, len(tasks)) if pictured else ([], "")
    template = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True).get_template("report.html")
    page = template.render(
        headline=headline(result), setting=setting_line(result), profile=PROFILES[result["profile"]],
        proxy=result["profile"] == "proxy", tables=tables(result), arms=list(arms), chosen=chosen,
        figures=[(inline(Image.open(file)), CAPTIONS[file.stem]) for file in figures],
        sheets=[(inline(Image.open(file), 900), caption) for file, caption in sheets],
        dialogues=[describe_dialogue(arms, tasks[row], row) for row in rows],
        kinds=kinds_of([tasks[row] for row in rows], turns_of(arms)), turns=turns_of(arms))
    model.write_text(out / "report.html", page)


# ------------------------------------------------------------------------------------------------------------ tables

def nice(text):
    return text.replace("_", " ")


def percent(value, sign=""):
    return "–" if value is None else f"{100 * value:{sign}.2f}"


def with_bounds(values, metric, k):
    """A signed number in points with its interval, and n.s. where that covers 0 or is unknown."""
    interval, text = values["interval_95"][metric][k], percent(values[metric][k], "+")
    if interval:
        text += f" [{percent(interval[0], '+')}, {percent(interval[1], '+')}]"
    return text if significant(interval) else text + " n.s."


def in_bounds(values, metric, k):
    """A share in percent with its interval."""
    interval, text = values["interval_95"][metric][k], percent(values[metric][k])
    return f"{text} [{percent(interval[0])}, {percent(interval[1])}]" if interval else text


def metric_rows(arms, titles):
    """A row for each arm and metric that it has; titles {metric: words}."""
    rows = []
    for arm, values in arms.items():
        for metric, title in titles.items():
            if metric in values:
                rows.append([arm, title, *map(percent, values[metric])])
    return rows


def tables(result):
    """Every table: a list of (title, note, header, rows), cells as text."""
    arms, differences = result["arms"], result["differences"]
    base, K = next(iter(arms)), len(next(iter(arms.values()))["O"])
    turns = [f"turn {k + 1}" for k in range(K)]
    label = "proxy " if result["profile"] == "proxy" else ""

    # The main table, and every arm against the base.
    columns = [(metric, k) for metric in ("IF", "CC", "O") for k in range(K)]
    header = ["model", *[f"{label}{metric} {k + 1}" for metric, k in columns]]
    rows = [[arm, *[percent(values[metric][k]) for metric, k in columns]] for arm, values in arms.items()]
    found = [("Main results", NOTES["main"], header, rows)]
    for arm, difference in differences.items():
        rows = []
        for metric in ("M", "IF", "CC", "O"):
            cells = [with_bounds(difference, metric, k) for k in range(K)]
            for k, p in enumerate(difference["p"].get(metric, [])):
                cells[k] += f", p {p:.3f}" if p >= .001 else ", p < .001"
            rows.append([label + metric, *cells])
        found.append((f"{arm} against {base}", NOTES["difference"], ["", *turns], rows))

    # What the numbers are made of.
    rows = metric_rows(arms, {"M": "marginal M", "IF": "cumulative IF", "C": "conditional IF_k / IF_k-1",
                              "copied": "copy rate (output = input)"})
    for arm, values in arms.items():
        rows.append([arm, "flatness M_K / M_1", *[""] * (K - 1), percent(values["flatness"][0])])
    found.append(("Success turn by turn", "Percent.", ["model", "", *turns], rows))
    return [*found, *lost_table(arms, turns), *kind_table(result), verdict_table(arms, turns)]


def lost_table(arms, turns):
    """What was lost, and to what, where there were probes: a list of one table or none."""
    K, rows, title = len(turns), [], "What was lost: room, skill, wear"
    for arm, values in arms.items():
        for metric, words in (("possible", "possible"), ("M_clean", "M clean")):
            if metric in values:
                rows.append([arm, words, *[in_bounds(values, metric, k) for k in range(K)]])
        if "wear" in values:
            # turn 1 is its own clean context
            n, cells = values["n"]["clean"], ["–"] * K
            for k in range(1, K):
                cells[k] = f"{with_bounds(values, 'wear', k)} (n = {n[k]})" if n[k] else "–"
            rows.append([arm, "wear", *cells])
            for metric in [metric for metric in ("wear", "propagation") if metric in values and K > 1]:
                pooled = with_bounds(values, f"{metric}_pooled", 0)
                rows.append([arm, f"{metric}, turns 2 to {K} pooled", *[""] * (K - 1), pooled])
            rows += metric_rows({arm: values}, {"CC_self": "CC, own outputs", "CC_clean": "CC, clean context"})
        if "nothing" in values:
            drift = ["–" if x is None else f"{x:.2f}" for x in values["nothing"]]
            rows.append([arm, "drift under 'change nothing', mean |ΔRGB| of 255", *drift])
    if not any("possible" in values for values in arms.values()):
        return [("Wear and drift", NOTES["lost of files"], ["model", "", *turns], rows)] if rows else []
    return [(title, NOTES["lost"], ["model", "", *turns], rows)]


def kind_table(result):
    """Marginal success by edit type, if there are types: a list of one table or none."""
    arms, differences = result["arms"], result["differences"]
    base, rows = next(iter(arms)), []
    for metric in [name for name in arms[base] if name.startswith("kind ")]:
        kind = metric.removeprefix("kind ")
        n = arms[base]["n"][metric][0] // result.get("seeds", 1)
        row = [nice(kind), str(n), *[percent(values[metric][0]) for values in arms.values()]]
        row += [with_bounds(difference, metric, 0) for difference in differences.values()]
        for values in arms.values():
            row.append(" / ".join(percent(x) for x in values[f"turns {kind}"]))
        rows.append(row)
    header = ["type", "n", *arms, *[f"{arm} - {base}" for arm in differences], *[f"{arm}, by turn" for arm in arms]]
    note = "Percent; all turns together, then turn by turn."
    return [("Marginal success by edit type", note, header, rows)] if rows else []


def verdict_table(arms, turns):
    rows = []
    for arm, values in arms.items():
        n, row = values["n"], [arm]
        for k in range(len(turns)):
            parts = " + ".join(str(n[name][k]) for name in n if name.startswith("CC"))
            row.append(f"{n['M'][k]} / {n['IF'][k]} / {parts}")
        rows.append([*row, percent(values.get("judge_failed"))])
    return "How many verdicts", NOTES["verdicts"], ["model", *turns, "judge failed"], rows


def headline(result):
    """One sentence with the number that matters: overall at the last turn."""
    arms = result["arms"]
    base, K = next(iter(arms)), len(next(iter(arms.values()))["O"])
    words = [f"O_{K} is {percent(arms[base]['O'][-1])} for {base}"]
    for arm, difference in result["differences"].items():
        interval, text = difference["interval_95"]["O"][-1], f"{percent(difference['O'][-1], '+')} points"
        if interval:
            text += f", 95 % interval {percent(interval[0], '+')} to {percent(interval[1], '+')}"
        if not significant(interval):
            text += ", not significant"
        words.append(f"{percent(arms[arm]['O'][-1])} for {arm} ({text})")
    return ", ".join(words) + "."


def setting_line(result):
    """What was evaluated, in one line; result["note"] is what the caller has to say besides."""
    seeds = result.get("seeds", 1)
    words = [f"{result['n']} dialogues" + (f" x {seeds} seeds" if seeds > 1 else "")]
    for name, form in (("data", "data {}"), ("model", "model {}"), ("denoise", "{} denoising steps"),
                       ("guidance", "guidance {}"), ("judge", "judge {}"), ("note", "{}")):
        if result.get(name):
            words.append(form.format(result[name]))
    return "; ".join(words) + f". {PROFILES[result['profile']]}"


def plain(text):
    """Text for Markdown: on one line, nothing of it taken for the end of a table's cell or for HTML."""
    text = " ".join(text.split()).replace("|", r"\|")
    return re.sub(r"<(?=[a-zA-Z/!?])", r"\\<", text)


def markdown(result):
    lines = ["# Multi-turn evaluation", "", plain(headline(result)), "", plain(setting_line(result))]
    for title, note, header, rows in tables(result):
        lines += ["", f"## {plain(title)}", "", note, ""]
        for cells in (header, ["---"] * len(header), *rows):
            lines.append("| " + " | ".join(plain(cell) or " " for cell in cells) + " |")
    return "\n".join(lines) + "\n"


# ----------------------------------------------------------------------------------------------------------- figures

def draw_figures(result, folder):
    """Write the figures that there are numbers for: [path]. Without matplotlib none, and a line on stderr."""
    try:
        import matplotlib.figure
    except ImportError:
        print("no figures: pip install matplotlib draws them", file=sys.stderr)
        return []
    matplotlib.rcParams["text.parse_math"] = False           # a $ in somebody's edit type is a dollar
    arms, files = result["arms"], []
    base, K = next(iter(arms.values())), len(next(iter(arms.values()))["O"])

    def figure(name, title, x, y, paint, *what, width=6.4):
        picture = matplotlib.figure.Figure(figsize=(width, 4.1), layout="constrained")
        axes = picture.add_subplot(xlabel=x, ylabel=y)
        axes.set_title(title + " (proxy)" * (result["profile"] == "proxy"), loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e6e6")
        axes.set_axisbelow(True)
        paint(axes, arms, *what)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, .5))
        folder.mkdir(parents=True, exist_ok=True)
        picture.savefig(folder / f"{name}.png", dpi=160)
        files.append(folder / f"{name}.png")

    lines = {"IF": "IF: all turns so far", "M": "M: this turn alone"}
    figure("success", "Success per turn", "turn", "percent of dialogues, 95 % intervals", paint_lines, lines, 100)
    if any(value is not None for values in arms.values() for value in values["CC"]):
        figure("plane", "Following against consistency", "IF, cumulative success, percent; numbers are turns",
               "CC, percent", paint_plane)
    if "possible" in base and "wear" in base:
        figure("losses", "Where the dialogues died", "", "percent of all dialogues", paint_losses,
               width=max(6.4, 2.4 + .4 * K * len(arms)))
    elif "wear" in base:
        bars = [(f"turn {k + 1}", "wear", k) for k in range(1, K)]
        figure("wear", "Wear", "", "M on own outputs - M on a clean context, points", paint_bars, bars)
    if any("places" in values for values in arms.values()):
        figure("places", "Places that were left open", "", "", paint_places, width=max(6.4, 2.4 * len(arms)))
    if "nothing" in base:
        figure("drift", "Drift when nothing is to change", "turn", "mean |RGB difference| from the original, of 255",
               paint_lines, {"nothing": "k times 'Change nothing'"}, 1)
    kinds = [name.removeprefix("kind ") for name in base if name.startswith("kind ")]
    if kinds:
        bars = [(nice(kind).replace(" ", "\n"), f"kind {kind}", 0) for kind in kinds]
        figure("kinds", "Marginal success by edit type, all turns", "", "percent, 95 % intervals", paint_bars, bars,
               width=max(6.4, 2.4 + .9 * len(kinds)))
    return files


def numbers(values, metric, scale):
    """A metric with None as NaN, which is not drawn, and how far its interval reaches below and above, (2, X)."""
    middle = np.array([np.nan if x is None else scale * x for x in values[metric]])
    ends = [(np.nan, np.nan) if pair is None else pair for pair in values["interval_95"][metric]]
    low, high = scale * np.array(ends).T
    return middle, np.maximum([middle - low, high - middle], 0)


def color(j):
    """Of the j-th arm or metric; they come round again."""
    return COLORS[j % len(COLORS)]


def paint_lines(axes, arms, metrics, scale):
    """Metrics {name: words} over the turns, the first one solid; arms side by side where they would overlap."""
    styles = [{"marker": "o", "lw": 1.8}, {"marker": "o", "lw": 1.2, "ls": "--", "mfc": "white"}]
    for j, (arm, values) in enumerate(arms.items()):
        axes.plot([], [], color=color(j), lw=4, label=arm)
        for metric, style in zip(metrics, styles):
            middle, reach = numbers(values, metric, scale)
            x = 1 + np.arange(len(middle)) + .06 * (j - (len(arms) - 1) / 2)
            axes.errorbar(x, middle, reach, color=color(j), capsize=2.5, ms=5, **style)
    for words, style in zip(metrics.values(), styles):
        axes.plot([], [], color="black", ms=5, label=words, **style)
    axes.set_xticks(range(1, 1 + len(middle)))
    axes.set_ylim(bottom=0)


def paint_bars(axes, arms, groups):
    """Bars in groups (label, metric, its place), an arm beside the other, in percent."""
    width = .8 / len(arms)
    for j, (arm, values) in enumerate(arms.items()):
        height, reach = [], []
        for _, metric, place in groups:
            middle, around = numbers(values, metric, 100)
            height.append(middle[place])
            reach.append(around[:, place])
        x = np.arange(len(groups)) - .4 + (j + .5) * width
        axes.bar(x, height, .9 * width, color=color(j), label=arm)
        axes.errorbar(x, height, np.array(reach).T, fmt="none", color="#222222", capsize=2.5, lw=1.1)
    axes.axhline(0, color="#888888", lw=.8)
    axes.set_xticks(range(len(groups)), [label for label, _, _ in groups])


def losses(values):
    """Shares of all dialogues that each turn has lost to room, skill and wear, (3, K); they add up to what IF lost."""
    IF, possible, clean, wear = (np.array([np.nan if x is None else x for x in values[name]])
                                 for name in ("IF", "possible", "M_clean", "wear"))
    before = np.concatenate([[1], IF[:-1]])
    lost = before * np.array([1 - possible, possible * (1 - clean), -possible * wear])
    # where nobody is left, nothing is known and nothing is lost
    return np.where(before > 0, lost, 0)


def paint_losses(axes, arms):
    """Stacked bars, turns in groups, an arm beside the other: what each cause has cost, in percent."""
    width, places, names = .8 / len(arms), [], []
    for j, (arm, values) in enumerate(arms.items()):
        lost = 100 * np.nan_to_num(losses(values))
        x = np.arange(lost.shape[1]) - .4 + (j + .5) * width
        top, bottom = np.zeros(len(x)), np.zeros(len(x))
        for cause, heights, color in zip(("room", "skill", "wear"), lost, ("#2f6fd0", "#b9c4d0", "#d1661a")):
            # what is won goes below 0
            axes.bar(x, heights, .9 * width, np.where(heights < 0, bottom, top), color=color,
                     label=cause if j == 0 else None)
            top += heights.clip(0)
            bottom += heights.clip(None, 0)
        places += x.tolist()
        names += [arm] * len(x)
    axes.axhline(0, color="#888888", lw=.8)
    # the names of the arms under their bars, the turns under the names
    axes.xaxis.remove_overlapping_locs = False
    axes.set_xticks(places, names, minor=True, size=8, rotation=0 if len(arms) < 3 else 45)
    axes.set_xticks(range(len(x)), [f"turn {k + 1}" for k in range(len(x))])
    axes.tick_params(axis="x", which="major", length=0, pad=18 if len(arms) < 3 else 44)


def paint_places(axes, arms):
    """A 3 x 3 grid of counts for each arm, coloured by their share of the arm's."""
    there = {arm: np.array(values["places"]).reshape(3, 3) for arm, values in arms.items() if "places" in values}
    for j, (arm, counts) in enumerate(there.items()):
        left = 3.5 * j
        axes.imshow(counts / counts.sum(), cmap="Blues", vmin=0, vmax=.5, extent=(left, left + 3, 3, 0))
        axes.text(left + 1.5, -.15, arm, ha="center", va="bottom")
        for (row, column), count in np.ndenumerate(counts):
            color = "white" if count > .3 * counts.sum() else "black"
            axes.text(left + column + .5, row + .5, str(count), ha="center", va="center", color=color)
    axes.set(xlim=(-.1, 3.5 * len(there) - .4), ylim=(3.1, -.6))
    axes.set_axis_off()


def paint_plane(axes, arms):
    """IF against CC, from turn 1 to K, over lines of equal O."""
    for j, (arm, values) in enumerate(arms.items()):
        IF, CC = numbers(values, "IF", 100)[0], numbers(values, "CC", 100)[0]
        axes.plot(IF, CC, "o-", color=color(j), lw=1.8, ms=6, label=arm)
        for k, point in enumerate(zip(IF, CC)):
            if np.isfinite(point).all():
                axes.annotate(str(k + 1), point, (5, -11), textcoords="offset points", color=color(j))
    left, right = np.clip(axes.get_xlim(), 0, 100)
    bottom, top = np.clip(axes.get_ylim(), 0, 100.5)
    x = np.linspace(max(left, .1), max(right, left + 1), 500)
    for O in range(5, 100, 5 if right - left < 60 else 10):
        y = O ** 2 / x
        seen = (y > bottom) & (y < top)
        if seen.sum() > 2:
            start = x[seen][0], y[seen][0]
            axes.plot(x[seen], y[seen], color="#b9c4d0", lw=.9, zorder=0)
            axes.annotate(f"O {O}", start, (2, -9), textcoords="offset points", color="#8794a3", size=8)
    axes.set(xlim=(left, max(right, left + 1)), ylim=(bottom, top))


# ---------------------------------------------------------------------------------------------------------- pictures

def turns_of(arms):
    return next(iter(arms.values())).success.shape[2]


def kinds_of(tasks, K):
    """Edit types of the first K turns of tasks, sorted."""
    return sorted({kind for task in tasks for kind in task.kinds[:K]} - {""})


def verdicts(scores, row):
    """True, False or None (no verdict) for each turn of a dialogue, first seed."""
    return [None if s != s else s > 0 for s in scores.success[0, row].tolist()]


def gains(arms, arm):
    """Rows from the biggest loss to the biggest win against the base, and what was won, in successful turns (n,)."""
    base = next(iter(arms.values()))
    turns = (arms[arm].success - base.success).nan_to_num(0).sum((0, 2)) / len(base.success)
    consistency = (arms[arm].consistency - base.consistency).nan_to_num(0).sum((0, 2, 3))
    return np.lexsort((consistency.numpy(), turns.numpy())), turns


def draw_sheets(arms, tasks, folder, most=6):
    """Write the contact sheets: [(path, caption)]. Random first, so that nobody sees the best ones only."""
    base, found = next(iter(arms)), []

    def sheet(name, rows, caption):
        cells = []
        for arm, row, note in rows:
            label = f"{arm}, dialogue {tasks[row].meta.get('index', row)}\n{note}"
            cells.append(evaluation.sheet_row(label, arms[arm], tasks[row], row))
        if cells:
            evaluation.contact_sheet(cells, folder / f"{name}.png")
            found.append((folder / f"{name}.png", caption))

    chosen = sorted(random.Random(0).sample(range(len(tasks)), min(most, len(tasks))))
    sheet("random", [(arm, row, "") for row in chosen for arm in arms], f"{len(chosen)} dialogues drawn at random")
    for arm in list(arms)[1:]:
        order, turns = gains(arms, arm)
        best = [row for row in order[::-1][:most].tolist() if turns[row] > 0]
        worst = [row for row in order[:most].tolist() if turns[row] < 0]
        for name, rows in (("wins", best), ("losses", worst)):
            pairs = [(a, row, f"{turns[row]:+g} turns") for row in rows for a in (base, arm)]
            sheet(f"{name}-{arm}", pairs, f"biggest {name} of {arm} against {base}, by successful turns")
    for arm, scores in arms.items():
        rows = []
        for kind in kinds_of(tasks, turns_of(arms)):
            failed = [(arm, row, f"{nice(kind)} failed at turn {k + 1}") for row, task in enumerate(tasks)
                      for k, good in enumerate(verdicts(scores, row)) if good is False and task.kinds[k] == kind]
            rows += random.Random(0).sample(failed, min(2, len(failed)))
        sheet(f"failures-{arm}", rows, f"failures of {arm}, up to two of each edit type, drawn at random")
    return found


def choose_shown(arms, n, most=SHOWN):
    """Rows of the dialogues in report.html: all, or a third each of biggest wins, biggest losses and random ones."""
    if n <= most:
        return list(range(n)), "All dialogues"
    part, order = 0, []
    if len(arms) > 1:
        part, order = most // 3, gains(arms, list(arms)[-1])[0].tolist()
    edge = {*order[:part], *order[len(order) - part:]}
    drawn = random.Random(0).sample([row for row in range(n) if row not in edge], most - len(edge))
    words = f"{part} biggest losses, {part} biggest wins and {len(drawn)} at random" if part else "drawn at random"
    return sorted(edge | set(drawn)), f"{most} of {n} dialogues: {words}"


def inline(image, width=None):
    """A picture as a data URI: PNG where it is small or drawn, else a JPEG of at most `width` pixels."""
    stream, kind = io.BytesIO(), "png"
    if width and image.width > 96:
        width, kind = min(width, image.width), "jpeg"
        image = image.convert("RGB").resize((width, round(image.height * width / image.width)), Image.LANCZOS)
        image.save(stream, "JPEG", quality=85)
    else:
        image.save(stream, "PNG", optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def describe_dialogue(arms, task, row):
    """A dialogue as the template wants it: pictures as data URIs, and of every arm what the filters can ask for."""
    kinds = task.kinds[:turns_of(arms)]
    found = {"name": task.meta.get("index", row), "kinds": kinds, "arms": []}
    found["told"] = list(zip(task.instructions, kinds))
    for arm, scores in arms.items():
        good = verdicts(scores, row)
        outcome = ["yes"] if all(good) else ["no"] if False in good else []
        outcome += [f"fail{k + 1}" for k, verdict in enumerate(good) if verdict is False]
        marks = ["unknown" if verdict is None else "ok" if verdict else "no" for verdict in good]
        images = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in scores.pictures(row)]
        source, *after = [inline(image, 256) for image in images]
        found["arms"].append({"name": arm, "outcome": "\n".join(outcome), "turns": list(zip(after, marks))})
        found |= {"source": source, "small": images[0].width <= 96}
    return found


# ------------------------------------------------------------------------------------------------------ command line

def read_evaluation(out):
    """(settings, arms, tasks) of the evaluation that eval.py left in a folder. ValueError if it is not finished."""
    record = data.read_json(out / "settings.json")
    if "judge" not in record:
        raise ValueError(f"{out} holds pictures without scores: run eval.py with --judge")
    try:
        data.check_settings(evaluation.Settings, record["settings"], out / "settings.json")
        settings = evaluation.Settings(**record["settings"])
        fingerprint, names = record["judge"]["fingerprint"], [str(name) for name in record["judge"]["names"]]
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{out / 'settings.json'} is not what eval.py writes: {data.one_line(error)}") from None
    tasks = data.load(settings.data, settings.split, settings.turns, settings.resolution, settings.tasks)
    made_of = data.read_made_of(out / "settings.json")
    evaluation.refuse_other(made_of, evaluation.made_of_tasks(tasks, settings.turns), out)
    if settings.probes is None:
        raise ValueError(f"{out / 'settings.json'} does not say how many probes there are")
    sampled, arms = (tasks, settings.turns, settings.seeds, settings.probes), {}
    for arm in ("base", *settings.lora):
        folder = out / "arms" / arm
        plan, _ = evaluation.read_plan(*sampled, folder)
        evaluation.read_scores(folder, fingerprint, plan)
        arms[arm] = evaluation.collect(plan, names)
    return settings, arms, tasks


def main(argv=None):
    parser = data.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of a finished evaluation")
    out = parser.parse_args(argv).out
    settings, arms, tasks = read_evaluation(out)
    write_report(out, evaluation.conclude(settings, arms, tasks), arms, tasks)
    print(f"written: {out / 'report.html'}")


if __name__ == "__main__":
    data.run_main(main)
