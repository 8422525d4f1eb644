"""How results are shown: console, Markdown and LaTeX tables, figures drawn by PIL, contact sheets, one self-contained report.html.

    write_report(out, results, arms, tasks, kinds, names, pictures)     # everything that `eval.py report` writes
    table(results)                                                      # the console's table
    contact_sheet(rows, path)                                           # pictures with captions and green or red borders

`results` is what eval.summarise returns, with the settings of the evaluation beside it. Scores are in 0..1 there and in
percent in tables and figures. Nothing here measures anything.
"""
import base64
import html
import io
import json
import math
import random
import re
import textwrap
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SHOWN = ("M", "IF", "CC", "O")
TITLES = {"M": "marginal success M", "IF": "cumulative success IF", "C": "conditional success IF_k / IF_k-1", "CC": "consistency CC",
          "O": "overall O",
          "EB": "exposure-bias gap EB", "copied": "copy rate", "nothing": "drift under 'change nothing'", "flatness": "flatness M_K / M_1"}
PROFILES = {"exact": "scored by the exact judge of the embedded world", "VLM": "scored by a vision-language model",
            "proxy": "proxy scores (EdiVal's data, our judge): not EdiVal-IF and EdiVal-CC, not comparable with published tables",
            "EdiVal": "EdiVal's own verdicts; CC is the mean of its object and background consistency"}
COLORS = ["#4c5a6b", "#d1661a", "#1b7a6e", "#7b4fa3", "#b0322b", "#8a7a1d", "#2f6fd0", "#d65fa0", "#5aa02c", "#222222"]   # of the arms, base first


def nice(text):
    return text.replace("_", " ")


def significant(interval):
    """Does a 95 % interval exclude 0? An unknown one does not."""
    low, high = interval
    return low > 0 or high < 0


def jsonable(x):
    """NaN and infinities as None, all the way down: JSON knows neither."""
    if isinstance(x, dict):
        return {str(k): jsonable(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [jsonable(v) for v in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


# ------------------------------------------------------------------------------------------------------------ tables

def table(results):
    """The console's table: a row for each turn and metric, every arm, and its difference from the base with the interval."""
    arms, differences = results["arms"], results["differences"]
    width = max(9, *(len(arm) + 2 for arm in arms))
    lines = ["turn  metric  " + "".join(f"{arm:>{width}}" for arm in arms)
             + "".join(f"    {f'{arm} - {next(iter(arms))} [95 %]':<32}" for arm in differences)]
    for k in range(len(next(iter(arms.values()))["O"])):
        for m in SHOWN:
            line = f"{k + 1:>4}  {m:<6}  " + "".join(f"{values[m][k]:{width}.3f}" for values in arms.values())
            for d in differences.values():
                (low, high), value = d["interval_95"][m][k], d[m][k]
                line += f"    {f'{value:+.3f} [{low:+.3f}, {high:+.3f}]' + '  n.s.' * (not significant((low, high))):<32}"
            lines.append(line.rstrip())
    return "\n".join(lines)


def percent(value, sign=""):
    return "–" if value is None or not math.isfinite(value) else f"{100 * value:{sign}.2f}"


def delta(d, m, k):
    """A difference in points with its interval, and n.s. where that covers 0."""
    low, high = d["interval_95"][m][k]
    return f"{percent(d[m][k], '+')} [{percent(low, '+')}, {percent(high, '+')}]" + " n.s." * (not significant((low, high)))


def p_value(p):
    return f"p {p:.3f}" if p >= .001 else "p < .001"


def tables(results):
    """Every table: a list of (title, note, header, rows), cells as text."""
    arms, differences = results["arms"], results["differences"]
    K, base, label = len(next(iter(arms.values()))["O"]), next(iter(arms)), "proxy " * (results["profile"] == "proxy")
    turns = [f"turn {k + 1}" for k in range(K)]
    found = [("Main results", "Percent. IF: all turns so far succeeded; CC: consistency with the original picture; O = sqrt(IF CC).",
              ["model"] + [f"{label}{m} {k + 1}" for m in ("IF", "CC", "O") for k in range(K)],
              [[arm] + [percent(v[m][k]) for m in ("IF", "CC", "O") for k in range(K)] for arm, v in arms.items()])]
    for arm, d in differences.items():
        rows = [[f"{label}{m}"] + [delta(d, m, k) + (f", {p_value(d['p'][m][k])}" if m in d["p"] else "") for k in range(K)]
                for m in ("M", "IF", "CC", "O")]
        found.append((f"{arm} against {base}",
                      "Difference in percentage points, 95 % interval of the paired bootstrap over dialogues; "
                      "n.s. = the interval covers 0; p = McNemar's exact test (several seeds: swapping whole dialogues).", ["", *turns], rows))
    rows = []
    for arm, v in arms.items():
        for m, name in (("M", "marginal M"), ("IF", "cumulative IF"), ("C", "conditional IF_k / IF_k-1"),
                        ("copied", "copy rate (output = input)")):
            if m in v:
                rows.append([arm, name, *[percent(x) for x in v[m]]])
        rows.append([arm, "flatness M_K / M_1", *[""] * (K - 1), percent(v["flatness"][0])])
    found.append(("Success turn by turn", "Percent.", ["model", "", *turns], rows))
    rows = []
    for arm, v in arms.items():
        if "EB" in v:
            n, bounds = v["n"]["EB"], v["interval_95"]["EB"]
            for m, name in (("M_clean", "M on a clean context"), ("M_self", "M on own outputs")):
                rows.append([arm, name, *[percent(x) for x in v[m]]])
            rows.append([arm, "gap EB",
                         *[f"{percent(v['EB'][k], '+')} [{percent(bounds[k][0], '+')}, {percent(bounds[k][1], '+')}] (n = {n[k]})"
                                          if n[k] else "–" for k in range(K)]])
        if "nothing" in v:
            rows.append([arm, "drift under 'change nothing', mean |ΔRGB| of 255", *[f"{x:.2f}" for x in v["nothing"]]])
    if rows:
        found.append(("Exposure bias", "The same instructions on a clean context and on the model's own outputs: what is lost is the gap.",
                      ["model", "", *turns], rows))
    kinds = [name for name in next(iter(arms.values())) if name.startswith("kind ")]
    if kinds:
        rows = []
        for kind in kinds:
            name = kind.removeprefix("kind ")
            n = arms[base]["n"][kind][0]
            rows.append([name, str(n // max(1, results.get("seeds") or 1)), *[percent(v[kind][0]) for v in arms.values()],
                         *[delta(d, kind, 0) for d in differences.values()],
                         *[" / ".join(f"{100 * x:.1f}" if x == x else "–" for x in v[f"turns {name}"]) for v in arms.values()]])
        found.append(("Marginal success by edit type", "Percent; all turns together, then turn by turn.",
                      ["type", "n", *arms, *[f"{arm} - {base}" for arm in differences], *[f"{arm}, by turn" for arm in arms]], rows))
    rows = []
    for arm, v in arms.items():
        rows.append([arm, *[f"{v['n']['M'][k]} / {v['n']['IF'][k]} / {' + '.join(map(str, v['n']['CC'][k]))}" for k in range(K)],
                     percent(v["judge_failed"]) if "judge_failed" in v else "–"])
    found.append(("How many verdicts",
                  "Valid verdicts for M / IF / CC (EdiVal: object + background) per turn, all seeds; percent of turns that the judge failed on.",
                  ["model", *turns, "judge failed"], rows))
    return found


def headline(results):
    """One sentence with the number that matters: overall at the last turn."""
    arms, K = results["arms"], len(next(iter(results["arms"].values()))["O"])
    base = next(iter(arms))
    words = [f"O_{K} is {percent(arms[base]['O'][-1])} for {base}"]
    for arm, d in results["differences"].items():
        low, high = d["interval_95"]["O"][-1]
        words.append(f"{percent(arms[arm]['O'][-1])} for {arm} ({percent(d['O'][-1], '+')} points, 95 % interval {percent(low, '+')} to "
                     f"{percent(high, '+')}{'' if significant((low, high)) else ', not significant'})")
    return ", ".join(words) + "."


def setting_line(results):
    words = [f"{results['n']} dialogues" + (f" x {results['seeds']} seeds" if (results.get("seeds") or 1) > 1 else ""),
             f"data {results['data']}" if not results.get("edival") else ""]
    if results.get("model") and not results.get("edival"):
        words += [f"model {results['model']}", f"{results['denoise']} denoising steps", f"guidance {results['guidance']}"
                  if results.get("guidance") else "",
                  "EdiVal's protocol" if results.get("protocol") else ""]
    words += ["" if results.get("edival") else f"judge {results['judge']}", f"CC from the features of {results['features']}"
              if results.get("features") else ""]
    return "; ".join(word for word in words if word) + f". {PROFILES[results['profile']].capitalize()}."


def markdown(results):
    lines = ["# Multi-turn evaluation", "", headline(results), "", setting_line(results)]
    for title, note, header, rows in tables(results):
        lines += ["", f"## {title}", "", note, "", "| " + " | ".join(cell or " " for cell in header) + " |", "|" + "---|" * len(header)]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def latex(results):
    """Tables for a paper, shrunk to the line where they are wider: needs \\usepackage{booktabs,adjustbox}."""
    special = {"_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "–": "--", "Δ": r"$\Delta$", "|": r"$|$", "<": "$<$", ">": "$>$",
               "\\": r"\textbackslash{}",
               "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "{": r"\{", "}": r"\}", "$": r"\$"}
    escape = lambda text: "".join(special.get(c, c) for c in text)
    head = lambda text: re.sub(r"([+-])(?=\d)", r"$\1$", escape(text)).replace("n.s.", r"\textit{n.s.}")
    lines = ["% " + setting_line(results), "% needs \\usepackage{booktabs,adjustbox}"]
    for title, note, header, rows in tables(results):
        lines += ["", r"\begin{table}", r"\centering\small",
                  rf"\caption{{{escape(title)}. {escape(note)} {escape(PROFILES[results['profile']].capitalize())}.}}",
                  rf"\begin{{adjustbox}}{{max width=\linewidth}}\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}", r"\toprule",
                  " & ".join(map(head, header)) + r" \\", r"\midrule"]
        lines += [" & ".join(map(head, row)) + r" \\" for row in rows] + [r"\bottomrule", r"\end{tabular}\end{adjustbox}", r"\end{table}"]
    return "\n".join(lines) + "\n"


# ----------------------------------------------------------------------------------------------------------- figures

class Plot:
    """Axes on a white picture, drawn twice as large and scaled down: x and y are in data units."""
    SCALE = 2

    def __init__(self, title, size=(560, 400), x=(0, 1), y=(0, 1), margin=(64, 62, 150, 52)):
        self.x, self.y, (left, top, right, bottom) = x, y, margin
        self.box = left, top, size[0] - right, size[1] - bottom
        self.image = Image.new("RGB", (size[0] * self.SCALE, size[1] * self.SCALE), "white")
        self.draw = ImageDraw.Draw(self.image)
        self.legend = []
        self.text((left - 50, 12), title, size=15)

    def at(self, x, y):
        left, top, right, bottom = self.box
        return (left + (x - self.x[0]) / (self.x[1] - self.x[0]) * (right - left),
                bottom - (y - self.y[0]) / (self.y[1] - self.y[0]) * (bottom - top))

    def text(self, at, text, color="#222222", size=12, anchor="la"):
        self.draw.text([c * self.SCALE for c in at], text, color, ImageFont.load_default(size * self.SCALE), anchor=anchor)

    def line(self, points, color, width=1.5, dash=0):
        points = [tuple(c * self.SCALE for c in self.at(*p)) for p in points]
        for (x0, y0), (x1, y1) in zip(points, points[1:]):
            n = max(1, int(math.hypot(x1 - x0, y1 - y0) / (dash * self.SCALE))) if dash else 1
            for i in range(0, n, 2 if dash else 1):
                part = [(x0 + (x1 - x0) * u / n, y0 + (y1 - y0) * u / n) for u in (i, min(n, i + 1))]
                self.draw.line(part, color, round(width * self.SCALE), joint="curve")

    def dot(self, x, y, color, radius=4, hollow=False):
        cx, cy = (c * self.SCALE for c in self.at(x, y))
        r = radius * self.SCALE
        self.draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill="white" if hollow else color, outline=color, width=2 * self.SCALE)

    def bar(self, x0, x1, y0, y1, color):
        (a, b), (c, d) = self.at(x0, y0), self.at(x1, y1)
        self.draw.rectangle([v * self.SCALE for v in (min(a, c), min(b, d) - 1, max(a, c), max(b, d))], fill=color)       # 0 is a line

    def span(self, x, low, high, color="#222222", width=1.2, cap=3):
        """An interval in y at x, with caps."""
        if math.isfinite(low) and math.isfinite(high):
            self.line([(x, low), (x, high)], color, width)
            for y in (low, high):
                cx, cy = self.at(x, y)
                self.draw.line([v * self.SCALE for v in (cx - cap, cy, cx + cap, cy)], color, round(width * self.SCALE))

    def axes(self, x_ticks, y_ticks, x_title="", y_title="", grid=True):
        left, top, right, bottom = self.box
        for value, word in y_ticks:
            _, y = self.at(self.x[0], value)
            if grid:
                self.line([(self.x[0], value), (self.x[1], value)], "#e6e6e6", 1)
            self.text((left - 7, y), word, "#555555", 11, "rm")
        for value, word in x_ticks:
            x, _ = self.at(value, self.y[0])
            self.text((x, bottom + 7), word, "#555555", 11, "ma")
        self.line([(self.x[0], self.y[0]), (self.x[1], self.y[0])], "#888888", 1)
        self.line([(self.x[0], self.y[0]), (self.x[0], self.y[1])], "#888888", 1)
        self.text(((left + right) / 2, bottom + 26), x_title, "#333333", 12, "ma")
        self.text((left - 50, top - 9), y_title, "#333333", 11, "ls")

    def key(self, entries):
        """Legend at the right: (colour, text)."""
        x, y = self.box[2] + 14, self.box[1] + 6
        for color, text in entries:
            if color:
                self.draw.rectangle([v * self.SCALE for v in (x, y - 5, x + 10, y + 5)], fill=color)
            for line in textwrap.wrap(text, 19):
                self.text((x + 16 * bool(color), y), line, "#222222", 11, "lm")
                y += 16
            y += 3

    def save(self, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.image.resize((self.image.width, self.image.height)).save(path)


def scale(low, high, n=5):
    """Round ticks that cover [low, high]: (low', high'), [(value, text)] in percent."""
    step = next(s for s in (.01, .02, .05, .1, .2, .25, .5, 1) if (high - low) / s <= n + 1 or s == 1)
    low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    return (low, high), [(low + i * step, f"{100 * (low + i * step):.0f}") for i in range(round((high - low) / step) + 1)]


def finite(values):
    return [v for v in values if v is not None and math.isfinite(v)]


def draw_success(results, path):
    """M and IF per turn, every arm, with intervals."""
    arms = results["arms"]
    K = len(next(iter(arms.values()))["O"])
    top = max(finite(high for v in arms.values() for m in ("M", "IF") for _, high in v["interval_95"][m]), default=1)
    y, ticks = scale(0, min(1, top))
    plot = Plot("Success per turn" + " (proxy)" * (results["profile"] == "proxy"), x=(.6, K + .4), y=y)
    plot.axes([(k + 1, str(k + 1)) for k in range(K)], ticks, "turn", "percent of dialogues, 95 % intervals")
    for j, (arm, v) in enumerate(arms.items()):
        shift = .06 * (j - (len(arms) - 1) / 2)
        for m, dash in (("M", 5), ("IF", 0)):
            points = [(k + 1 + shift, v[m][k]) for k in range(K) if math.isfinite(v[m][k])]
            plot.line(points, COLORS[j % 10], 2, dash)
            for k in range(K):
                plot.span(k + 1 + shift, *v["interval_95"][m][k], COLORS[j % 10])
            for point in points:
                plot.dot(*point, COLORS[j % 10], 3.5, hollow=m == "M")
    plot.key([(COLORS[j % 10], arm) for j, arm in enumerate(arms)] + [("", ""), ("", "filled, solid: IF, all turns so far"),
                                                                     ("", "hollow, dashed: M, this turn alone")])
    plot.save(path)


def draw_plane(results, path):
    """IF against CC with lines of equal O, an arrow from turn 1 to K for every arm: reward hacking moves up and to the left."""
    arms = results["arms"]
    points = {arm: [(a, b) for a, b in zip(v["IF"], v["CC"]) if math.isfinite(a) and math.isfinite(b)] for arm, v in arms.items()}
    every = [p for ps in points.values() for p in ps] or [(0, 0), (1, 1)]
    xs, ys = zip(*every)
    (x, x_ticks), (y, y_ticks) = scale(max(0, min(xs) - .05), min(1, max(xs) + .05)), scale(max(0, min(ys) - .04), min(1, max(ys) + .02), 6)
    plot = Plot("Following against consistency" + " (proxy)" * (results["profile"] == "proxy"), x=x, y=y)
    plot.axes(x_ticks, y_ticks, "IF, cumulative success, percent", "CC, percent")
    for level in range(5, 100, 5 if x[1] - x[0] < .6 else 10):
        curve = [(u, (level / 100) ** 2 / u) for u in np.linspace(max(x[0], 1e-3), x[1], 3000)
                 if y[0] <= (level / 100) ** 2 / max(u, 1e-9) <= y[1]]
        if len(curve) > 1:
            plot.line(curve, "#b9c4d0", 1)
            plot.text(plot.at(*curve[0]), f"O {level}", "#8794a3", 10, "lb" if curve[0][1] < y[1] - .02 * (y[1] - y[0]) else "lt")
    for j, (arm, ps) in enumerate(points.items()):
        plot.line(ps, COLORS[j % 10], 2)
        for k, p in enumerate(ps):
            plot.dot(*p, COLORS[j % 10], 4)
            cx, cy = plot.at(*p)
            plot.text((cx + 7, cy + 3), str(k + 1), COLORS[j % 10], 11)
    plot.key([(COLORS[j % 10], arm) for j, arm in enumerate(arms)] + [("", ""), ("", "numbers: turns"), ("", "grey lines: equal overall O")])
    plot.save(path)


def draw_bars(groups, arms, title, y_title, path, legend=(), width=None):
    """Grouped bars with intervals: groups = [(name, {arm: (value, (low, high))})]."""
    values = finite(v for _, row in groups for value, interval in row.values() for v in (value, *interval))
    y, ticks = scale(min([0, *values]), max([.05, *values]))
    plot = Plot(title, (width or max(480, 130 + 150 + 74 * len(groups)), 400), x=(-.6, len(groups) - .4), y=y, margin=(64, 62, 150, 74))
    plot.axes([], ticks, "", y_title)
    for g, (name, row) in enumerate(groups):
        x, bottom = plot.at(g, y[0])
        for i, line in enumerate(textwrap.wrap(nice(name), 11)):
            plot.text((x, bottom + 7 + 14 * i), line, "#555555", 11, "ma")
        for j, (arm, (value, (low, high))) in enumerate(row.items()):
            wide = .8 / len(row)
            left = g - .4 + j * wide
            if math.isfinite(value):
                plot.bar(left + .02, left + wide - .02, 0, value, COLORS[list(arms).index(arm) % 10])
                plot.span(left + wide / 2, low, high)
    plot.line([(plot.x[0], 0), (plot.x[1], 0)], "#888888", 1)
    plot.key([(COLORS[j % 10], arm) for j, arm in enumerate(arms)] + [("", ""), *[("", text) for text in legend]])
    plot.save(path)


def draw_drift(results, path):
    """Mean |ΔRGB| to the original under K repeated "change nothing" edits."""
    arms = {arm: v for arm, v in results["arms"].items() if "nothing" in v}
    K = len(next(iter(arms.values()))["nothing"])
    top = max([1, *finite(high for v in arms.values() for _, high in v["interval_95"]["nothing"])])
    step = next(s for s in (.5, 1, 2, 5, 10, 20, 50) if top / s <= 6)
    plot = Plot("Drift when nothing is to change", x=(.6, K + .4), y=(0, math.ceil(top / step) * step))
    plot.axes([(k + 1, str(k + 1)) for k in range(K)], [(i * step, f"{i * step:g}") for i in range(math.ceil(top / step) + 1)], "turn",
              "mean |RGB difference| from the original, of 255")
    for j, (arm, v) in enumerate(arms.items()):
        shift = .06 * (j - (len(arms) - 1) / 2)
        plot.line([(k + 1 + shift, v["nothing"][k]) for k in range(K)], COLORS[j % 10], 2)
        for k in range(K):
            plot.span(k + 1 + shift, *v["interval_95"]["nothing"][k], COLORS[j % 10])
            plot.dot(k + 1 + shift, v["nothing"][k], COLORS[j % 10], 3.5)
    plot.key([(COLORS[j % 10], arm) for j, arm in enumerate(arms)] + [("", ""), ("", "K times 'Change nothing'")])
    plot.save(path)


def draw_figures(results, folder):
    """Write the figures: [(path, caption)]."""
    arms, proxy = results["arms"], " (proxy)" * (results["profile"] == "proxy")
    draw_success(results, folder / "success.png")
    found = [(folder / "success.png",
              "Cumulative success falls as soon as one turn fails; marginal success shows whether a later turn is harder than the first.")]
    if any(finite(v["CC"]) for v in arms.values()):
        draw_plane(results, folder / "plane.png")
        found.append((folder / "plane.png",
                      "Doing nothing gives high CC and no IF: an editor that games the consistency reward moves up and to the left."))
    K = len(next(iter(arms.values()))["O"])
    groups = [(f"turn {k + 1}", {arm: (v["EB"][k], v["interval_95"]["EB"][k]) for arm, v in arms.items() if "EB" in v})
              for k in range(1, K)]
    if groups and groups[0][1]:
        draw_bars(groups, arms, "Exposure-bias gap" + proxy, "M on clean context - M on own outputs, points", folder / "exposure.png",
                  ["same instructions, same noise", "0 = own errors do no harm"], 560)
        found.append((folder / "exposure.png", "How many more edits would succeed if the picture before had been right."))
    if any("nothing" in v for v in arms.values()):
        draw_drift(results, folder / "drift.png")
        found.append((folder / "drift.png", "What editing costs by itself, without any judge: 0 is a perfect copy."))
    groups = [(name.removeprefix("kind "), {arm: (v[name][0], v["interval_95"][name][0]) for arm, v in arms.items()})
              for name in next(iter(arms.values())) if name.startswith("kind ")]
    if groups:
        draw_bars(groups, arms, "Marginal success by edit type, all turns" + proxy, "percent, 95 % intervals", folder / "kinds.png")
        found.append((folder / "kinds.png", "Which edits the model can do."))
    return found


# ---------------------------------------------------------------------------------------------------- contact sheets

def contact_sheet(rows, path, width=144):
    """Draw rows (label, images (K+1, 3, H, W) uint8, captions of the K turns, good: K bools or None) as one PNG.

    An entry of good that is None has no border: the judge gave no verdict.
    """
    font, K = ImageFont.load_default(11), len(rows[0][1]) - 1
    columns = width // 6                                                               # characters in a line of caption
    texts = [[sum((textwrap.wrap(part, columns) for part in text.split("\n")), []) for text in (label, *captions)]
             for label, _, captions, _ in rows]
    tall = [images.shape[2] * width // images.shape[3] for _, images, _, _ in rows]
    heights = [H + 14 + 13 * max(map(len, text)) for H, text in zip(tall, texts)]
    sheet = Image.new("RGB", ((K + 1) * (width + 10) + 10, sum(heights) + 10), "white")
    draw, y = ImageDraw.Draw(sheet), 10
    for (_, images, _, good), text, H, height in zip(rows, texts, tall, heights):
        for k in range(K + 1):
            x = 10 + k * (width + 10)
            picture = Image.fromarray(np.asarray(images[k]).transpose(1, 2, 0))
            sheet.paste(picture.resize((width, H), Image.NEAREST if picture.width < width else Image.LANCZOS), (x, y))
            if k and good is not None and good[k - 1] is not None:
                draw.rectangle((x - 3, y - 3, x + width + 2, y + H + 2), outline="green" if good[k - 1] else "red", width=3)
            draw.multiline_text((x, y + H + 4), "\n".join(text[k]), "black", font, spacing=1)
        y += height
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def told(task, K):
    return [f"{k + 1}. {text}" for k, text in enumerate(task.instructions[:K])]


def draw_arms(tasks, images, success, path, n=6):
    """Contact sheet of up to n tasks, one row for each arm: images {arm: n of (K+1, 3, H, W)}, success {arm: (n, K)}.

    Shows the first tasks in which the arms differ at the last turn, else the first tasks.
    """
    arms = list(images)
    order = range(len(tasks))
    if len(arms) == 2:
        order = sorted(order, key=lambda i: bool((success[arms[0]][i] == success[arms[1]][i]).all()))
    contact_sheet([(arm, images[arm][i], told(tasks[i], len(images[arm][i]) - 1), success[arm][i] > 0) for i in list(order)[:n]
                   for arm in arms], path)


def verdicts(s, i):
    """True, False or None (no verdict) for each turn of dialogue i, s (S, n, K), first seed."""
    return [None if math.isnan(v) else v > 0 for v in s[0, i].tolist()]


def gains(arms, base, arm):
    """How much better each dialogue went than with the base: order, by successful turns, then consistency; gain in turns (n,)."""
    turns = np.nan_to_num((arms[arm]["s"] - arms[base]["s"]).numpy()).sum((0, 2)) / len(arms[base]["s"])
    consistency = np.nan_to_num((arms[arm]["cc"] - arms[base]["cc"]).numpy()).sum((0, 2, 3))
    return np.lexsort((consistency, turns)), turns


def draw_sheets(arms, tasks, kinds, names, pictures, folder, n=6):
    """Write the contact sheets: [(path, caption)]. Random first, so that nobody sees the best ones only."""
    base, K = next(iter(arms)), arms[next(iter(arms))]["s"].shape[2]

    def row(arm, i, note=""):
        images = [np.array(Image.open(path).convert("RGB")).transpose(2, 0, 1) if k
                  else np.array(tasks[i].image.convert("RGB")).transpose(2, 0, 1)
                  for k, path in enumerate(pictures[arm](i))]
        return f"{arm}, dialogue {names[i]}\n{note}".strip(), np.stack(images), told(tasks[i], K), verdicts(arms[arm]["s"], i)

    def sheet(name, rows, caption):
        if rows:
            contact_sheet(rows, folder / f"{name}.png")
            found.append((folder / f"{name}.png", caption))
    found = []
    chosen = sorted(random.Random(0).sample(range(len(tasks)), min(n, len(tasks))))
    sheet("random", [row(arm, i) for i in chosen for arm in arms], f"{len(chosen)} dialogues drawn at random")
    for arm in list(arms)[1:]:
        order, turns = gains(arms, base, arm)
        best, worst = [i for i in order[::-1][:n] if turns[i] > 0], [i for i in order[:n] if turns[i] < 0]
        sheet(f"wins-{arm}", [row(a, i, f"{turns[i]:+g} turns") for i in best for a in (base, arm)],
              f"biggest wins of {arm} over {base}, by successful turns")
        sheet(f"losses-{arm}", [row(a, i, f"{turns[i]:+g} turns") for i in worst for a in (base, arm)],
              f"biggest losses of {arm} against {base}")
    for arm in arms:
        rows = []
        for kind in sorted({kind for row_ in kinds for kind in row_} - {""}):
            failed = [(i, k) for i in range(len(tasks)) for k in range(K) if kinds[i][k] == kind
                      and verdicts(arms[arm]["s"], i)[k] is False]
            rows += [row(arm, i, f"{nice(kind)} failed at turn {k + 1}") for i, k in random.Random(0).sample(failed, min(2, len(failed)))]
        sheet(f"failures-{arm}", rows, f"failures of {arm}, up to two of each edit type, drawn at random")
    return found


# ------------------------------------------------------------------------------------------------------- report.html

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:0 auto;max-width:1180px;padding:24px;color:#1d2329;background:#fff}
h1{font-size:26px;margin:0 0 4px}h2{margin:36px 0 6px;font-size:19px;border-bottom:1px solid #dde2e7;padding-bottom:4px}
.lead{font-size:18px;margin:8px 0}.note{color:#56616d;margin:4px 0 10px}
.warn{background:#fff3d6;border-left:4px solid #d99a00;padding:6px 12px;margin:12px 0}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:13.5px}
th,td{padding:4px 10px;text-align:right;border-bottom:1px solid #e8ecef;white-space:nowrap}
th:first-child,td:first-child,td.l,th.l{text-align:left}th{background:#f4f6f8}
.figures{display:flex;flex-wrap:wrap;gap:16px}.figures figure{margin:0;max-width:100%}
.figures img{max-width:100%;border:1px solid #e8ecef;display:block}
figcaption{color:#56616d;font-size:13px}
.filters{position:sticky;top:0;background:#fff;padding:10px 0;border-bottom:1px solid #dde2e7;z-index:1}
.filters label{margin-right:16px;white-space:nowrap}select{font:inherit}
.task{padding:12px 0;border-bottom:1px solid #e8ecef}.arms{display:flex;flex-wrap:wrap;gap:10px 34px}
.arm{flex:0 1 auto}.arm b{display:block;font-size:13px}.strip{display:flex;gap:8px}.strip div{width:120px;font-size:11.5px;line-height:1.3}
.strip img{width:114px;display:block;border:3px solid #c9d0d6}.small img{image-rendering:pixelated}
.strip .ok img{border-color:#1f9d55}.strip .no img{border-color:#d8322a}details img{max-width:100%}summary{cursor:pointer}
"""

SCRIPT = """
const selects=[...document.querySelectorAll('.filters select')],count=document.getElementById('count');
function filter(){let n=0;for(const t of document.querySelectorAll('.task')){
 const ok=selects.every(s=>!s.value||(' '+t.dataset[s.name]+' ').includes(' '+s.value+' '));t.hidden=!ok;n+=ok}
 count.textContent=n+' dialogue'+(n==1?'':'s')+' shown'}
selects.forEach(s=>s.onchange=filter);filter()
"""


def inline(image, width=None):
    """A picture as a data URI: PNG where it is small or drawn, else a JPEG of at most `width` pixels."""
    stream = io.BytesIO()
    if width and image.width > 96:
        image.convert("RGB").resize((min(width, image.width), round(image.height * min(width, image.width) / image.width)),
                                    Image.LANCZOS).save(stream, "JPEG", quality=85)
        kind = "jpeg"
    else:
        image.save(stream, "PNG", optimize=True)
        kind = "png"
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def choose_shown(arms, n, most=120):
    """Rows of the dialogues that report.html shows: all, or a third each of the biggest wins, biggest losses and random ones."""
    if n <= most:
        return list(range(n)), "all dialogues"
    order = gains(arms, next(iter(arms)), list(arms)[-1])[0].tolist()
    part = most // 3 if len(arms) > 1 else 0
    edge = set(order[:part] + order[n - part:])
    drawn = random.Random(0).sample([i for i in range(n) if i not in edge], most - len(edge))
    words = f"{most} of {n} dialogues: " + (f"{part} biggest losses, {part} biggest wins and {len(drawn)} at random" if part
                                            else "drawn at random")
    return sorted(edge | set(drawn)), words


def write_html(path, results, figures, sheets, arms, tasks, kinds, names, pictures):
    """One file with everything in it: tables, figures, contact sheets, and the dialogues side by side with filters."""
    e = html.escape
    parts = ["<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width,initial-scale=1'>"
             f"<title>Multi-turn evaluation</title><style>{STYLE}</style><h1>Multi-turn evaluation</h1>",
             f"<p class=lead>{e(headline(results))}</p><p class=note>{e(setting_line(results))}</p>"]
    if results["profile"] == "proxy":
        parts.append(f"<p class=warn><b>Proxy.</b> {e(PROFILES['proxy'].capitalize())}.</p>")
    parts.append("<h2>Figures</h2><div class=figures>")
    for file, caption in figures:
        image = Image.open(file)
        parts.append(f"<figure style='width:{image.width // Plot.SCALE}px'><img src='{inline(image)}' alt='{e(file.stem)}'>"
                     f"<figcaption>{e(caption)}</figcaption></figure>")
    parts.append("</div>")
    for title, note, header, rows in tables(results):
        left = {1} if header[1:2] == [""] else set()
        cells = lambda row, tag: "".join(f"<{tag}{' class=l' * (i in left)}>{e(cell)}</{tag}>" for i, cell in enumerate(row))
        parts.append(f"<h2>{e(title)}</h2><p class=note>{e(note)}</p><div class=wide><table><tr>{cells(header, 'th')}</tr>"
                     + "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows) + "</table></div>")
    if sheets:
        parts.append("<h2>Contact sheets</h2><p class=note>Green border: the edit succeeded; red: it failed. "
                     "Every picture is edited from the one on its left.</p>")
        for i, (file, caption) in enumerate(sheets):
            parts.append(f"<details{' open' * (i == 0)}><summary>{e(caption)}</summary>"
                         f"<img src='{inline(Image.open(file), 900)}' alt='{e(caption)}'></details>")
    if pictures:
        parts += html_dialogues(arms, tasks, kinds, names, pictures)
    path.write_text("\n".join(parts), encoding="utf-8")


def html_dialogues(arms, tasks, kinds, names, pictures):
    """The dialogues with their filters: data-kind and data-armJ hold what the selects of the same names can ask for."""
    e, K = html.escape, arms[next(iter(arms))]["s"].shape[2]
    rows, words = choose_shown(arms, len(tasks))

    def select(label, name, options):
        return (f"<label>{e(label)} <select name={name}>" + "".join(f"<option value='{e(value)}'>{e(text)}</option>" for value,
                                                                    text in options)
                + "</select></label>")
    outcomes = [("", "any outcome"), ("yes", "succeeds"), ("no", "fails"), *[(f"fail{k + 1}", f"fails at turn {k + 1}") for k in range(K)]]
    every = sorted({kind for i in rows for kind in kinds[i]} - {""})
    parts = [f"<h2>Dialogues</h2><p class=note>{e(words[0].upper() + words[1:])}; first noise seed. A dialogue succeeds if every turn does.</p>",
             "<div class=filters>", select("edit type", "kind", [("", "any"), *[(kind, nice(kind)) for kind in every]]),
             *[select(arm, f"arm{j}", outcomes) for j, arm in enumerate(arms)], "<span id=count></span></div>"]
    small = " small" * (tasks[0].image.width <= 96)
    for i in rows:
        marks, strips = "", ""
        for j, arm in enumerate(arms):
            good = verdicts(arms[arm]["s"], i)
            outcome = "yes" if all(v is True for v in good) else "no" if False in good else ""
            marks += f" data-arm{j}='{' '.join([outcome, *[f'fail{k + 1}' for k, v in enumerate(good) if v is False]])}'"
            images = [tasks[i].image, *[Image.open(file) for file in pictures[arm](i)[1:]]]
            classes = ["", *["" if v is None else "ok" if v else "no" for v in good]]
            strips += f"<div class=arm><b>{e(arm)}</b><div class='strip{small}'>"
            for image, text, c in zip(images, ["source", *told(tasks[i], K)], classes):
                strips += f"<div class='{c}'><img loading=lazy src='{inline(image, 228)}' alt=''>{e(text)}</div>"
            strips += "</div></div>"
        about = f": {', '.join(map(nice, kinds[i]))}" * any(kinds[i])
        parts.append(f"<div class=task data-kind='{e(' '.join(kinds[i]))}'{marks}><div class=note>dialogue {e(f'{names[i]}{about}')}</div>"
                     f"<div class=arms>{strips}</div></div>")
    return parts + [f"<script>{SCRIPT}</script>"]


def write_report(out, results, arms, tasks, kinds, names, pictures):
    """Write results.json, tables.md, tables.tex, figures/, sheets/ and report.html into `out`.

    arms: tensors of eval.moments. pictures: {arm: function of a row -> K + 1 paths}, {} (and tasks None) where there are none.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(jsonable(results), indent=1))
    (out / "tables.md").write_text(markdown(results), encoding="utf-8")
    (out / "tables.tex").write_text(latex(results), encoding="utf-8")
    figures = draw_figures(results, out / "figures")
    sheets = draw_sheets(arms, tasks, kinds, names, pictures, out / "sheets") if pictures else []
    write_html(out / "report.html", results, figures, sheets, arms, tasks, kinds, names, pictures)
