"""What a study found, from its evidence alone: table.md, results.json and figure.png in results/NAME/.

Evidence: study.json (arms, seeds, commits), scores.json (what each arm did on each test task), and of every run
config.json and metrics.jsonl. bench/study.py gathers it, and calls `write_report`.
"""
import io
import json
import sys
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

import data
import eval as evaluation
import model
from bench.report import color
from eval import significant

STUDY, SCORES = "study.json", "scores.json"
MEASURED = ("possible", "clean", "clean_any", "kept_clean")  # kept beside success and consistency, of eval.Scores
SAMPLES = 2_000              # resamples of seeds and tasks
LAST = 5                     # training steps over which a reward is averaged
# The columns of the tables: (title, metric of eval.py, its turn; -1 = the mean of turns 2 to K).
COLUMNS = [("IF_3", "IF", 3), ("O_3", "O", 3), ("O_5", "O", 5), ("CC_3", "CC", 3), ("CC_5", "CC", 5),
           ("flatness", "flatness", 1), ("room_3", "room", 3), ("possible", "possible", -1),
           ("M_clean", "M_clean", -1), ("wear", "wear", -1), ("propagation", "propagation", -1)]
BY_TURN = ["M", "possible", "M_clean", "wear", "propagation"]
NOTE = """Means over the training seeds. Differences have 95 % intervals: paired bootstrap over training seeds and test
tasks, the same resamples of both in every arm; n.s. = the interval covers 0, or is unknown. Few seeds make the part of
an interval that is due to them too narrow: look at the seeds one by one. room_3 = possible_1 possible_2 possible_3: the
share of dialogues whose three turns could all be done if no edit failed for want of skill. M_clean is each arm's own,
over the dialogues that it got right so far; wear and propagation are success on own outputs minus on clean pictures, in
these dialogues and in all turns that can be done. Without turns they are means over turns 2 to K."""


class Evidence(NamedTuple):
    """What results/NAME/ holds."""
    study: dict              # of study.json
    parts: dict              # {"base" or "ARM-SEED": {name: (sum (n, X), how many are known (n, X))}}
    curves: dict             # {"ARM-SEED": rows of metrics.jsonl}


# ------------------------------------------------------------------------------------------------- scores, packed small

def pack(values):
    """Values (n, X) -> X of them: a text such as "01?" where all are 0, 1 or NaN; else thousandths, null for NaN."""
    columns = []
    for column in values.T.tolist():
        if all(value in (0, 1) or value != value for value in column):
            columns.append("".join("?" if value != value else str(int(value)) for value in column))
        else:
            columns.append([None if value != value else round(1000 * value) for value in column])
    return columns


def unpack(columns):
    """What `pack` made -> values (n, X) float64."""
    found = []
    for column in columns:
        if isinstance(column, str):
            found.append([float("nan") if sign == "?" else float(sign) for sign in column])
        else:
            found.append([float("nan") if value is None else value / 1000 for value in column])
    return torch.tensor(found, dtype=torch.float64).T


def read(folder):
    """The evidence of a study. ValueError if it is not there."""
    if not (folder / STUDY).is_file():
        raise ValueError(f"results/{folder.name} holds no {STUDY}: run the study first")
    study = data.read_json(folder / STUDY)
    parts, curves = {}, {}
    for run, columns in data.read_json(folder / SCORES).items():
        values = {name: unpack(of_turns)[None] for name, of_turns in columns.items()}           # one noise seed
        success, consistency = values.pop("success"), values.pop("consistency")[..., None]
        # Without kinds of edit: no study turns on them.
        no_kinds = [[""] * success.shape[2]] * success.shape[1]
        parts[run] = evaluation.moments(evaluation.Scores(success, consistency, values), no_kinds)
    for run in parts:
        if run != "base":
            lines = (folder / run / "metrics.jsonl").read_text().splitlines()
            curves[run] = [json.loads(line) for line in lines]
    return Evidence(study, parts, curves)


# ------------------------------------------------------------------------------------------------------------ bootstrap

def estimate(evidence, samples=SAMPLES):
    """Metrics of every arm, means over its seeds: {arm: {metric: (1 + samples, X)}}, and {"ARM-SEED": {metric: (X,)}}.

    The first row is the estimate, the others are resamples of seeds and of tasks, the same ones in every arm.
    """
    study, seeds = evidence.study, evidence.study["seeds"]
    generator = torch.Generator().manual_seed(0)
    n = len(evidence.parts["base"]["M"][0])
    of_tasks = torch.cat([torch.ones(1, n, dtype=torch.float64), evaluation.resample(n, samples, generator)])
    of_seeds = evaluation.resample(len(seeds), samples, generator) / len(seeds)
    of_seeds = torch.cat([torch.full((1, len(seeds)), 1 / len(seeds), dtype=torch.float64), of_seeds])

    arms, runs = {"base": evaluation.metrics(evidence.parts["base"], of_tasks)}, {}
    for arm in study["arms"]:
        found = [evaluation.metrics(evidence.parts[f"{arm}-{seed}"], of_tasks) for seed in seeds]
        arms[arm] = {}
        for name in found[0]:
            values = torch.stack([metrics[name] for metrics in found], 1)         # (1 + samples, seeds, X)
            # a seed that is not in a resample does not count, even where it is unknown
            weighted = torch.where(of_seeds[..., None] > 0, values * of_seeds[..., None], 0.)
            arms[arm][name] = weighted.sum(1)
        for seed, metrics in zip(seeds, found):
            runs[f"{arm}-{seed}"] = {name: values[0] for name, values in metrics.items()}
    for seed in seeds:
        runs[f"base-{seed}"] = {name: values[0] for name, values in arms["base"].items()}
    return arms, runs


def interval(draws):
    """95 % interval of draws (samples,), or None where over a fifth of them are unknown."""
    if draws.isnan().double().mean() > .2:
        return None
    ends = torch.tensor([.025, .975], dtype=torch.float64)
    return torch.nanquantile(draws, ends).tolist()


def at(values, turn):
    """A column's number: values (..., X) of a metric -> (...); turn as in COLUMNS."""
    return values[..., 1:].mean(-1) if turn == -1 else values[..., turn - 1]


def known_columns(metrics):
    """The COLUMNS that an arm has numbers for."""
    return [(title, name, turn) for title, name, turn in COLUMNS
            if name in metrics and max(turn, 2 if turn == -1 else 1) <= metrics[name].shape[-1]]


# --------------------------------------------------------------------------------------------------------------- tables

def shown(value, sign=""):
    return "?" if value is None or value != value else f"{value:{sign}.3f}"


def with_interval(draws):
    """A difference, draws[0], with the interval of the others."""
    bounds, text = interval(draws[1:]), shown(draws[0].item(), "+")
    if bounds:
        text += f" [{bounds[0]:+.3f}, {bounds[1]:+.3f}]"
    return text if significant(bounds) else text + " n.s."


def pairs(study):
    """(arm, what it is compared with): the base, and the first arm of its group."""
    with_base = [(arm, "base") for arm in study["arms"]]
    return with_base + [(arm, group[0]) for group in study["compare"] for arm in group[1:]]


def mean_tables(study, arms, columns):
    """Means of every arm, at all turns, and turn by turn."""
    rows = [[arm, *[shown(at(metrics[name], turn)[0].item()) for _, name, turn in columns]]
            for arm, metrics in arms.items()]
    by_turn = []
    for arm, metrics in arms.items():
        for name in BY_TURN:
            if name in metrics:
                by_turn.append([arm, name, *[shown(value) for value in metrics[name][0].tolist()]])
    turns = [f"turn {k + 1}" for k in range(study["turns"])]
    return [("Means", ["arm", *[title for title, _, _ in columns]], rows),
            ("Turn by turn", ["arm", "", *turns], by_turn)]


def difference_tables(study, arms, runs, columns):
    """Every arm against the base and the first of its group: with intervals, seed by seed, and turn by turn."""
    rows, by_turn, by_seed = [], [], []
    decides = [column for column in columns if column[0] in study["metrics"]]
    for arm, first in pairs(study):
        a, b, label = arms[arm], arms[first], f"{arm} - {first}"
        rows.append([label, *[with_interval(at(a[name], turn) - at(b[name], turn)) for _, name, turn in columns]])
        for name in BY_TURN:
            if name in a:
                cells = (a[name] - b[name]).T
                by_turn.append([label, name, *[with_interval(draws) for draws in cells]])
        cells = []
        for _, name, turn in decides:
            found = [at(runs[f"{arm}-{seed}"][name] - runs[f"{first}-{seed}"][name], turn) for seed in study["seeds"]]
            cells.append(" ".join(shown(value.item(), "+") for value in found))
        by_seed.append([label, *cells])
    turns = [f"turn {k + 1}" for k in range(study["turns"])]
    seeds = ", ".join(map(str, study["seeds"]))
    return [("Differences", ["", *[title for title, _, _ in columns]], rows),
            (f"Differences of seeds {seeds}", ["", *[title for title, _, _ in decides]], by_seed),
            ("Differences turn by turn", ["", "", *turns], by_turn)]


def cosine_table(study):
    """How much of a gradient is not chance."""
    rows = []
    for arm, values in study["cosines"].items():
        known = [value for value in values if value is not None]
        mean = sum(known) / len(known) if known else None
        rows.append([arm, shown(mean), " ".join(shown(value) for value in values)])
    title = "Cosine between the gradients of a step on disjoint tasks, before training"
    return [(title, ["arm", "mean", "by seed"], rows)] if rows else []


def seen_reward(rows):
    """The column of metrics.jsonl that is nearest to success as somebody sees it who is not trained on."""
    for column in ("referee/success", "referee/following", "reward/following"):
        if rows and rows[0].get(column) is not None:
            return column
    return None


def spent(rows, clock):
    """Seconds since the beginning after each step, of a column of metrics.jsonl."""
    return np.cumsum([row[clock] for row in rows])


def last_mean(rows, column):
    values = [row[column] for row in rows[-LAST:] if row.get(column) is not None]
    return sum(values) / len(values) if values else None


def clock_table(study, curves):
    """Arms at equal steps, and at the seconds of the fastest: what was seen of the samples that they trained on."""
    clock, runs = study["clock"], {}
    if not clock:
        return []
    for arm in study["arms"]:
        runs[arm] = [curves[f"{arm}-{seed}"] for seed in study["seeds"]]
    budget = min(np.mean([spent(rows, clock)[-1] for rows in of_arm]) for of_arm in runs.values())
    column = seen_reward(next(iter(runs.values()))[0])
    table = []
    for arm, of_arm in runs.items():
        # one step more than fits would be unfair, none at all would be no number
        within = [rows[:max(1, int((spent(rows, clock) <= budget).sum()))] for rows in of_arm]
        total = np.mean([spent(rows, clock)[-1] for rows in of_arm])
        steps = np.mean([len(rows) for rows in within])
        ends = [mean_of([last_mean(rows, column) for rows in some]) for some in (of_arm, within)]
        table.append([arm, f"{total:.0f}", shown(ends[0]), f"{steps:.1f}", shown(ends[1])])
    header = ["arm", f"{clock} of all steps", f"{column} at equal steps", "steps at equal seconds", "and then"]
    return [(f"At equal seconds ({budget:.0f}), mean of the last {LAST} steps, samples of training", header, table)]


def mean_of(values):
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def markdown(study, tables):
    """table.md."""
    count, seeds = len(study["arms"]), len(study["seeds"])
    command = (f"python bench/study.py {study['name']} --arms {','.join(study['arms'])} --seeds {seeds} "
               f"--tasks {study['tasks']}")
    lines = [f"# {study['name']}: {study['question']}", "",
             f"{count} arms x {seeds} training seeds x {study['steps']} steps; {study['tasks']} test tasks of "
             f"{study['turns']} turns, judge {study['judge']}; commit {', '.join(study['commits'])}; `{command}`.", "",
             f"It turns on {', '.join(study['metrics'])}.", "", " ".join(NOTE.split())]
    flags = [[arm, f"`{words}`"] for arm, words in study["arms"].items()]
    for title, header, rows in [("Arms", ["arm", "flags of train.py"], flags), *tables]:
        lines += ["", f"## {title}", ""]
        for cells in (header, ["---"] * len(header), *rows):
            lines.append("| " + " | ".join(cell or " " for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def numbers(study, arms, columns):
    """results.json: the means and differences of the columns, with intervals, as numbers."""
    def describe(draws):
        value = draws[0].item()
        return {"value": value, "interval_95": interval(draws[1:])}
    found = {"arms": {}, "differences": {}}
    for arm, metrics in arms.items():
        found["arms"][arm] = {title: describe(at(metrics[name], turn)) for title, name, turn in columns}
    for arm, first in pairs(study):
        minus = {title: describe(at(arms[arm][name], turn) - at(arms[first][name], turn))
                 for title, name, turn in columns}
        found["differences"][f"{arm} - {first}"] = minus
    return evaluation.without_nan(found)


# --------------------------------------------------------------------------------------------------------------- figure

def draw(study, arms, curves, columns, path):
    """O over the turns, the differences that the answer turns on, the training. Without matplotlib: a line."""
    try:
        import matplotlib.figure
    except ImportError:
        print("no figure: pip install matplotlib draws it", file=sys.stderr)
        return
    compared = pairs(study)
    height = max(4.2, .32 * len(compared) + 1.6)
    picture = matplotlib.figure.Figure(figsize=(15, height), layout="constrained")
    left, middle, right = picture.subplots(1, 3)
    paint_turns(left, study, arms)
    paint_differences(middle, compared, arms, [column for column in columns if column[0] in study["metrics"]])
    paint_training(right, study, curves)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e6e6e6")
        axes.set_axisbelow(True)
        # none on the right, where the arms have the colours they have on the left
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    stream = io.BytesIO()
    picture.savefig(stream, dpi=110)
    # in 256 colours: a third of the size
    Image.open(stream).convert("RGB").quantize(256).save(path, optimize=True)


def paint_turns(axes, study, arms):
    axes.set(title="overall O on own outputs", xlabel="turn", xticks=range(1, 1 + study["turns"]))
    for j, (arm, metrics) in enumerate(arms.items()):
        values = metrics["O"][0].tolist()
        axes.plot(range(1, 1 + len(values)), values, marker="o", ms=4, color=color(j),
                  ls="-" if j < 10 else "--", label=arm)


def paint_differences(axes, compared, arms, columns):
    axes.set(title="difference, 95 % interval", yticks=range(len(compared)),
             yticklabels=[f"{arm} - {first}" for arm, first in compared])
    axes.axvline(0, color="#888888", lw=.8)
    for j, (title, name, turn) in enumerate(columns):
        shift = .7 * ((j + .5) / len(columns) - .5)
        axes.plot([], [], color=color(j), marker="o", ms=4, label=title)
        for row, (arm, first) in enumerate(compared):
            draws = at(arms[arm][name], turn) - at(arms[first][name], turn)
            bounds = interval(draws[1:])
            axes.plot(draws[0], row + shift, color=color(j), marker="o", ms=4)
            if bounds:
                axes.plot(bounds, [row + shift] * 2, color=color(j), lw=1.2)
    axes.invert_yaxis()


def paint_training(axes, study, curves):
    """Following of the samples trained on, as the referee saw it, and (dotted) the judge that is trained on.

    Every step has other tasks, the same in all arms: running means over an eighth of the steps tell the arms apart.
    """
    clock = study["clock"]
    for j, arm in enumerate(study["arms"]):
        of_arm = [curves[f"{arm}-{seed}"] for seed in study["seeds"]]
        steps = range(min(len(rows) for rows in of_arm))
        width = max(1, len(steps) // 8)
        x = [step + 1 for step in steps]
        if clock:
            x = np.mean([spent(rows, clock)[:len(steps)] for rows in of_arm], 0)
        for column, style in (("referee/following", "-"), ("reward/following", ":")):
            # in floats None is NaN
            y = np.array([mean_of([rows[i].get(column) for rows in of_arm]) for i in steps], float)
            if not np.isnan(y).all():
                means = np.convolve(y, np.ones(width) / width, "valid")
                axes.plot(x[width - 1:], means, color=color(j + 1), ls=style, lw=1.2)
    axes.set(title=f"following in training: referee -, judge ...\n(means of {width} steps)", xlabel=clock or "step")


def write_report(folder):
    """Write table.md, results.json and figure.png from the evidence in a folder; returns the table."""
    evidence = read(folder)
    study = evidence.study
    arms, runs = estimate(evidence)
    columns = known_columns(arms["base"])
    means, by_turn = mean_tables(study, arms, columns)
    tables = [means, *difference_tables(study, arms, runs, columns), by_turn, *cosine_table(study),
              *clock_table(study, evidence.curves)]
    text = markdown(study, tables)
    model.write_text(folder / "table.md", text)
    model.write_text(folder / "results.json", json.dumps(numbers(study, arms, columns), indent=1, allow_nan=False))
    draw(study, arms, evidence.curves, columns, folder / "figure.png")
    return text
