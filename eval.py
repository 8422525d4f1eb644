"""Multi-turn evaluation: how an editor's success and consistency hold up over K edits on its own outputs.

    python eval.py --run out/grpo                                 a training run: base against tuned, test tasks
    python eval.py --model X --lora A=out/grpo --lora B=out/nft   any number of LoRAs against their base
    torchrun --nproc_per_node=8 eval.py --run out/grpo            the processes share the work

Pictures and scores are written as they are made, report.html at the end. What is there already is not made again: an
evaluation that was interrupted, or that is given more tasks, seeds, turns or LoRAs, goes on.

s_ik = did turn k of dialogue i succeed (the judge's `success`, else following >= .5)
M_k  = mean_i s_ik                     marginal success           CC_k = mean_i consistency_ik, against the original
IF_k = mean_i prod_{j<=k} s_ij         cumulative success         O_k  = sqrt(IF_k CC_k), overall
C_k  = IF_k / IF_{k-1}                 conditional success        flatness = M_K / M_1
What was lost, over the dialogues in which all turns before k were right (embedded world; of files, over all turns
that can be probed):  IF_k = prod_{j<=k} possible_j (M_clean_j + wear_j)
possible_k = share in which turn k can still be done after what the editor chose        lost for want of room
M_clean_k  = of these, success on a clean picture of the same scene, same noise         lost for want of skill
wear_k     = success on own outputs - M_clean_k, same dialogues                         lost by exposure bias
CC_clean and CC_self, M_self: on clean contexts, and on own outputs, of the same dialogues.
propagation_k = as wear_k, over all turns that can be done, whatever came before: what earlier failures cost, too
All arms see the same tasks and noise. Intervals: paired bootstrap over tasks, the seeds of a task stay together.
"""
import json
import math
import os
import re
import signal
import textwrap
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

import data
import model
import reward
from data import option, read_json
from rollout import Task, rollout

NOTHING = "Change nothing"
NOTHING_TASKS = 100    # that are told so at most: drift hardly differs from one to another
GAP = 10               # pixels between the pictures of a contact sheet
COPIED = 16, .005      # a copy: of the 64 x 64 cells of its picture under .5 % change by more than 16 of 255
SHOWN = "M", "IF", "CC", "O", "possible", "M_clean", "wear"       # in the console's table
JUDGE = ("judge", "rubric", "reasoning", "votes")
MEETING = timedelta(minutes=10)                                   # for all processes to come, after the first


# --------------------------------------------------------------------------------------------------- sample and judge

@dataclass
class Scores:
    """What one arm, a set of weights, did on n tasks of K turns. NaN = unknown, or not counted."""
    success: torch.Tensor                             # (seeds, n, K), 0 or 1
    consistency: torch.Tensor                         # (seeds, n, K, parts), with the original, in 0..1
    measured: dict = field(default_factory=dict)      # (seeds, n, K): copied, drift, nothing, clean, possible, ...
    rewards: dict = field(default_factory=dict)       # (seeds, n, K) of each of the judge's rewards
    pictures: Callable | None = None                  # row of a task -> (K+1, 3, H, W) uint8, of the first seed
    places: list | None = None                        # how many first open additions stand in each of the 9 cells


@dataclass
class Dialogue:
    """A task in one pass with one noise seed."""
    seed: int
    part: str             # the pass. own: the task; clean: one instruction, clean context; nothing: K times NOTHING
    row: int              # of the task
    name: int | str       # of the task in files and scores: meta["index"], else its row
    task: Task
    turns: range          # which turns of the row's task its instructions are
    files: list           # of the pictures after its turns; empty where all stays in memory
    lines: list           # of scores, one for each turn; None = not judged
    pictures: torch.Tensor | None = None      # (turns + 1, 3, H, W) uint8, where there are no files
    resolved: tuple | None = None             # what should be there and could be done, by `resolve`, once it was asked


def picture_file(folder, seed, part, name, k):
    """Where the picture after turn k = 0, 1, ... of a dialogue lies."""
    return Path(folder) / (f"{part}-seed{seed}" if seed else part) / f"{name}_turn{k + 1}.png"


def make_plan(tasks, K, seeds=1, probes=0, folder=None, file_of=picture_file):
    """All that an arm is sampled on before anything is known of its outputs, [Dialogue].

    The passes clean (of files; the embedded world's is planned by `plan_clean`) and nothing are made of `probes` of the
    tasks, evenly spread, nothing of NOTHING_TASKS at most.
    """
    plan = []
    for seed in range(seeds):
        for row, task in enumerate(tasks):
            plan.append(new_dialogue(seed, "own", row, tasks[row], task, range(K), folder, file_of))
        for k in range(1, K):
            for row in spread(len(tasks), probes):
                alone = None if "operations" in tasks[row].meta else data.alone(tasks[row], k)
                if alone:
                    plan.append(new_dialogue(seed, "clean", row, tasks[row], alone, range(k, k + 1), folder, file_of))
        for row in spread(len(tasks), min(probes, NOTHING_TASKS)):
            task = tasks[row]
            still = Task(task.image, [NOTHING] * K, [""] * K, size=task.size)
            plan.append(new_dialogue(seed, "nothing", row, task, still, range(K), folder, file_of))
    return plan


def new_dialogue(seed, part, row, of, task, turns, folder, file_of):
    """A Dialogue: `task` is what is sampled, `of` the task of that row."""
    name = of.meta.get("index", row)
    files = [file_of(folder, seed, part, name, k) for k in turns] if folder else []
    return Dialogue(seed, part, row, name, task, turns, files, [None] * len(turns))


def spread(n, count):
    """`count` of n rows, evenly spread: the first so many of a file may be of one kind."""
    return range(n) if count >= n else sorted({i * n // count for i in range(count)})


def resolve(d):
    """data.resolve() of a dialogue that has its pictures."""
    if d.resolved is None:
        d.resolved = data.resolve(d.task, load_pictures(d))
    return d.resolved


def plan_clean(plan, tasks, probes, folder=None, file_of=picture_file):
    """The pass clean of the embedded world, planned on an arm's own outputs: [Dialogue].

    Turn k, if it can still be done, on a picture of the scene that the turns before should have made, given where the
    editor has put things; with the same noise. It depends on the pictures alone: another judge needs no other ones.
    """
    probed, clean = set(spread(len(tasks), probes)), []
    for d in plan:
        if d.part != "own" or d.row not in probed or "operations" not in d.task.meta:
            continue
        scenes, possible = resolve(d)
        for k in d.turns[1:]:
            if possible[k]:
                alone = data.alone(d.task, k, scenes[k])
                clean.append(new_dialogue(d.seed, "clean", d.row, d.task, alone, range(k, k + 1), folder, file_of))
    return sorted(clean, key=lambda d: (d.seed, d.turns.start, d.row))


def read_plan(tasks, K, seeds, probes, folder):
    """All that an arm is sampled on, with the pictures its folder has -> [Dialogue], and whether none is missing."""
    def pictured(plan):
        return all(file.is_file() for d in plan for file in d.files)

    plan, complete = make_plan(tasks, K, seeds, probes, folder), False
    if pictured(plan):
        # what is sampled next depends on its own outputs
        clean = plan_clean(plan, tasks, probes, folder)
        complete = pictured(clean)
        plan += clean
    return plan, complete


def sample_turns(editor, group, T, on_turn):
    """Sample dialogues of one pass, seed and picture size -> (n, turns + 1, 3, H, W) uint8; on_turn as in `rollout`."""
    turns, seed = group[0].turns, (group[0].seed, 0)
    tasks = [d.task for d in group]
    rows = [d.row for d in group]
    return rollout(editor, tasks, 1, len(turns), T, seed, task_rows=rows, first_turn=turns.start, keep=False,
                   on_turn=on_turn).images


def evaluate(editor, judge, tasks, K, T, seeds=1, batch=100, probes=0, folder=None, desc="eval", progress=True,
             file_of=picture_file, sample=sample_turns):
    """Sample and judge the weights that the editor has now -> Scores; None if judge is None, for pictures alone.

    With a folder, pictures and scores*.jsonl are written into it as they are made, what is there is used, and the
    processes of torchrun, all of which must call, share the work. Without one, all stays in memory. `editor` may be
    None where every picture is there. `file_of` says where a picture lies, `sample` makes those of a [Dialogue]: they
    are called like picture_file and sample_turns. ValueError if pictures are missing or of another size than expected.
    """
    shared = folder is not None and dist.is_initialized()

    def do(plan, desc):
        """Make and judge what is missing; on return all of it is known to every process."""
        if folder and judge:
            read_scores(folder, judge.fingerprint, plan)
        carry_out(editor, judge, plan, T, batch, folder, desc, progress, sample, shared)
        if shared:
            # once all have come here, the others' pictures and scores are on disk
            dist.barrier()
            if judge:
                read_scores(folder, judge.fingerprint, plan)

    plan = make_plan(tasks, K, seeds, probes, folder, file_of)
    do(plan, desc)
    clean = plan_clean(plan, tasks, probes, folder, file_of)
    if clean:
        do(clean, f"{desc}, clean")
    return collect(plan + clean, judge.names) if judge else None


def carry_out(editor, judge, plan, T, batch, folder, desc, progress, sample, shared):
    """This process's share of a plan, batch by batch: make the pictures or load them, judge them meanwhile."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if shared else (0, 1)
    work = find_work(plan[rank::world], judge, batch)
    turns = sum(len(d.turns) for _, group in work for d in group)
    silent = not progress or rank > 0 or not turns

    with tqdm(total=turns, desc=desc, unit="turn", disable=silent) as bar:
        for there, group in work:
            group_tasks, verdicts = [d.task for d in group], []

            def on_turn(k, pictures):
                if judge and group[0].part != "nothing":
                    verdicts.append(judge.start(group_tasks, pictures, k))
                bar.update(len(group))

            # The pictures, from disk or from the editor.
            if there:
                pictures = torch.stack([load_pictures(d) for d in group])
                for k in range(len(group[0].turns)):
                    on_turn(k, pictures[:, :k + 2])
            elif editor is None:
                raise ValueError(f"{folder} lacks pictures of dialogue {group[0].name}, and no editor is there")
            else:
                pictures = sample(editor, group, T, on_turn)
                keep_pictures(group, pictures)

            # Their scores, as soon as the judge is done with the last turn.
            if judge:
                lines = score(judge, group, pictures, [future.result() for future in verdicts])
                if folder:
                    append_lines(Path(folder) / ("scores.jsonl" if world == 1 else f"scores-{rank}.jsonl"), lines)


def find_work(plan, judge, batch):
    """What of a plan is not done: [(are all pictures there, [Dialogue] of one pass, seed and picture size)]."""
    groups, work = {}, []
    for d in plan:
        there = bool(d.files) and all(file.is_file() for file in d.files)
        judged = not judge or all(is_whole(line) for line in d.lines)
        if not (there and judged):
            # what a batch must have in common
            alike = there, d.seed, d.part, d.turns, d.task.size
            groups.setdefault(alike, []).append(d)
    for (there, *_), group in groups.items():
        # a rollout takes `batch` of them at a time
        for i in range(0, len(group), batch):
            work.append((there, group[i:i + batch]))
    return work


def keep_pictures(group, pictures):
    """Write pictures (n, turns + 1, 3, H, W) uint8 without the sources, each file whole or not at all; or keep them."""
    for d, dialogue in zip(group, pictures):
        for picture, file in zip(dialogue[1:], d.files):
            image = Image.fromarray(picture.permute(1, 2, 0).numpy())
            model.write_whole(file, lambda path: image.save(path, "PNG", compress_level=1))
        if not d.files and d.part == "own":
            d.pictures = dialogue


def load_pictures(d):
    """The pictures of a dialogue, the source first: (turns + 1, 3, H, W) uint8. ValueError if one has another size."""
    if d.pictures is not None:
        return d.pictures
    pictures = [np.array(d.task.picture())]
    for file in d.files:
        with data.opened(file, f"dialogue {d.name}") as image:
            pictures.append(np.array(image.convert("RGB")))
        height, width = d.task.size
        if image.size != (width, height):
            raise ValueError(f"{file} is {image.width} x {image.height}, expected {width} x {height} as the source")
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def change(before, after):
    """Pictures (n, 3, H, W) uint8 -> mean |difference| in 0..255 (n,), and whether `after` is a copy of `before` (n,).

    Differences are averaged over blocks first, so that a VAE's loss of fine texture does not pass for an edit.
    """
    difference = after.float() - before.float()
    grid = [min(64, side) for side in difference.shape[2:]]
    blocks = F.adaptive_avg_pool2d(difference, grid).abs().amax(1)
    changed = (blocks > COPIED[0]).float().mean((1, 2))
    return difference.abs().mean((1, 2, 3)), changed < COPIED[1]


# --------------------------------------------------------------------------------------------------- lines of scores

def score(judge, group, pictures, verdicts):
    """Give every turn that has none its line of scores, null where the judge failed, and return these lines.

    verdicts: the judge's r (n, R) of each turn; empty in the pass nothing, which is not judged.
    """
    lines = []
    for i, k in enumerate(group[0].turns):
        columns = dict(zip(judge.names, verdicts[i].T)) if verdicts else {}
        source, before, after = pictures[:, 0], pictures[:, i], pictures[:, i + 1]
        columns["copied"] = change(before, after)[1].float()
        columns["drift"] = change(source, after)[0]
        for j, d in enumerate(group):
            # scored before, then: its picture was missing
            if is_whole(d.lines[i]):
                continue
            line = {"seed": d.seed, "pass": d.part, "task": d.name, "turn": k + 1, "kind": d.task.kinds[i]}
            line["judge"] = judge.fingerprint
            for name, column in columns.items():
                value = column[j].item()
                line[name] = None if math.isnan(value) else round(value, 6)
            d.lines[i] = line
            lines.append(line)
    return lines


def is_whole(line):
    """Is a turn judged? Where the judge failed, it is asked again."""
    return line is not None and None not in line.values()


def read_scores(folder, fingerprint, plan):
    """Give the turns of a plan their lines of scores*.jsonl, those by the judge of this fingerprint."""
    places = {}
    for d in plan:
        for i, k in enumerate(d.turns):
            places[d.seed, d.part, d.name, k + 1] = d, i
    for file in sorted(Path(folder).glob("scores*.jsonl")):
        for text in file.read_text(errors="replace").splitlines():
            # half a line is what a process leaves that is killed while it writes
            try:
                line = json.loads(text)
                key = line["seed"], line["pass"], line["task"], line["turn"]
                ours = line["judge"] == fingerprint and key in places
            except (ValueError, TypeError, KeyError, RecursionError):
                continue
            if ours:
                d, i = places[key]
                d.lines[i] = d.lines[i] if is_whole(d.lines[i]) else line


def append_lines(file, lines):
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "ab+") as stream:
        stream.seek(max(0, stream.tell() - 1))
        # the half line of a killed process gets its end, so that it spoils no other
        half = stream.read() not in (b"", b"\n")
        text = "".join(json.dumps(line) + "\n" for line in lines)
        stream.write(b"\n" * half + text.encode())


def tabulate(plan, names):
    """The lines of a plan -> {(pass, column): values (seeds, n, K)}, NaN = unknown. ValueError if a turn has none."""
    n = 1 + max(d.row for d in plan)
    shape = 1 + max(d.seed for d in plan), n, plan[0].turns.stop
    tables = defaultdict(lambda: torch.full(shape, math.nan, dtype=torch.float64))
    for d in plan:
        for k, line in zip(d.turns, d.lines):
            if line is None:
                raise ValueError(f"turn {k + 1} of dialogue {d.name} (pass {d.part}, seed {d.seed}) is not judged")
            for name in (*names, "copied", "drift"):
                if line.get(name) is not None:
                    tables[d.part, name][d.seed, d.row, k] = line[name]
    return tables


def collect(plan, names):
    """The lines of a plan -> Scores; names are the judge's rewards. ValueError if a turn has no line."""
    tables = tabulate(plan, names)

    # What the judge's scores say of success, in the passes that were made.
    def success(part):
        r = torch.stack([tables[part, name] for name in names], -1)
        return successes(r, names)

    measured = {"copied": tables["own", "copied"], "drift": tables["own", "drift"]}
    parts = {d.part for d in plan}
    if "nothing" in parts:
        measured["nothing"] = tables["nothing", "drift"]
    own = success("own")
    right_so_far = F.pad(own[..., :-1].cumprod(2), (1, 0), value=1.) == 1
    if "clean" in parts:
        # turn 1 is its own clean context
        clean, kept = success("clean"), tables["clean", "consistency"]
        clean[..., 0], kept[..., 0] = own[..., 0], tables["own", "consistency"][..., 0]
        if "operations" in plan[0].task.meta:
            measured["clean_any"] = clean
            clean, kept = (v.where(right_so_far, math.nan) for v in (clean, kept))
        measured |= {"clean": clean, "kept_clean": kept}
    if "possible" in names:
        measured["possible"] = tables["own", "possible"].where(right_so_far, math.nan)
    rewards = {name: tables["own", name] for name in names}
    consistency = tables["own", "consistency"][..., None]
    return Scores(own, consistency, measured, rewards, lambda row: load_pictures(plan[row]), count_places(plan, own))


def count_places(plan, success):
    """Where the first open addition of dialogues stands, if it was drawn right: 9 counts; None without any."""
    from shapes.world import GRID
    counts = [0] * GRID ** 2
    for d in plan:
        operations = d.task.meta.get("operations", []) if d.part == "own" else []
        first = next((k for k in d.turns if k < len(operations) and operations[k].open), None)
        if first is not None and success[d.seed, d.row, first] == 1:
            scenes, _ = resolve(d)
            changed = [a != b for a, b in zip(scenes[first].cells, scenes[first + 1].cells)]
            counts[changed.index(True)] += 1
    return counts if any(counts) else None


# ----------------------------------------------------------------------------------------------------------- measure

def successes(r, names):
    """Rewards (..., R) -> s (...) in {0, 1}, NaN where the judge failed, or does not judge following."""
    if "success" in names:
        return r[..., names.index("success")]
    if "following" not in names:
        return torch.full_like(r[..., 0], math.nan)
    following = r[..., names.index("following")]
    return torch.where(following.isnan(), following, (following >= .5).to(following.dtype))


def moments(scores, kinds):
    """What an arm's metrics are made of: {name: (sum over the seeds of a task, number of known ones)}, each (n, X).

    kinds: n lists of K edit types. A turn that the judge failed on is left out of the means, and so is the cumulative
    success of what follows it.
    """
    # Everything that a mean is taken of, (seeds, n, X).
    s = scores.success.double()
    values = {"M": s, "IF": s.cumprod(2), **scores.measured}
    for i, part in enumerate(scores.consistency.unbind(3)):
        values[f"CC{i}"] = part
    # Wear is a difference of two means over the same turns; consistency on both contexts likewise.
    if "clean" in values:
        pairs = {"clean": s, "clean_any": s, "kept_clean": scores.consistency.double().mean(3)}
        for name in [name for name in pairs if name in values]:
            clean, own, name_self = values[name].double(), pairs[name], name.replace("clean", "self")
            values[name] = clean.where(~own.isnan(), math.nan)
            values[name_self] = own.where(~clean.isnan(), math.nan)
        for name in [name for name in ("clean", "self", "clean_any", "self_any") if name in values]:
            later = values[name][..., 1:]
            values[f"{name}_later"] = later.transpose(1, 2).flatten(0, 1)[..., None]
    # Marginal success of each edit type: turn by turn, and of all turns together.
    for kind in sorted({kind for row in kinds for kind in row} - {""}):
        here = torch.tensor([[k == kind for k in row] for row in kinds])
        turns = s.where(here, math.nan)
        values[f"turns {kind}"] = turns
        values[f"kind {kind}"] = turns.transpose(1, 2).flatten(0, 1)[..., None]

    # Per task, so that a bootstrap over tasks keeps the seeds of a task together.
    found = {}
    for name, v in values.items():
        total = v.double().nan_to_num(0).sum(0)
        found[name] = total, (~v.isnan()).double().sum(0)
    return found


def metrics(parts, w):
    """Every metric from the moments of an arm, tasks weighted by w (R, n): {name: (R, X)}. Ones give the estimate."""
    found = {name: (w @ total) / (w @ count) for name, (total, count) in parts.items()}
    consistencies = [found.pop(name) for name in parts if name.startswith("CC")]
    M, IF, CC = found["M"], found["IF"], torch.stack(consistencies).mean(0)
    before = F.pad(IF[:, :-1], (1, 0), value=1.)
    found |= {"C": IF / before, "CC": CC, "O": (IF * CC).sqrt(), "flatness": M[:, -1:] / M[:, :1]}
    if "clean" in found:
        clean, own = found.pop("clean"), found.pop("self")
        found |= {"M_clean": clean, "M_self": own, "wear": own - clean}
        found |= {"CC_clean": found.pop("kept_clean"), "CC_self": found.pop("kept_self")}
        found["wear_pooled"] = found.pop("self_later") - found.pop("clean_later")          # of turns 2 to K
    if "clean_any" in found:
        found["propagation"] = found.pop("self_any") - found.pop("clean_any")
        found["propagation_pooled"] = found.pop("self_any_later") - found.pop("clean_any_later")
    if "possible" in found:
        found["room"] = found["possible"].cumprod(1)                                       # all turns so far
    return found


def resample(n, samples, generator):
    """How often each of n is in a resample: (samples, n) float64, rows sum to n."""
    rows = torch.randint(n, (samples, n), generator=generator)
    weights = torch.zeros(samples, n, dtype=torch.float64)
    return weights.scatter_add_(1, rows, torch.ones_like(weights))


def bootstrap(parts, samples):
    """The metrics of `samples` resamples of the tasks, {name: (samples, X)}; the same resamples for every arm."""
    n, generator = len(parts["M"][0]), torch.Generator().manual_seed(0)
    draws = defaultdict(list)
    for some in torch.arange(samples).split(max(1, 2_000_000 // n)):
        for name, v in metrics(parts, resample(n, len(some), generator)).items():
            draws[name].append(v)
    return {name: torch.cat(v) for name, v in draws.items()}


def exact_p(base, tuned):
    """McNemar's exact test of paired successes (seeds, n): two-sided p.

    With several seeds a task's seeds are swapped together, so that the task stays the unit: the exact distribution of
    sum_i ±d_i, d_i the difference of task i summed over seeds. For one seed that is McNemar's binomial.
    """
    d = (tuned - base).nan_to_num(0).sum(0).round().long()
    total = int(d.abs().sum())
    p = np.zeros(2 * total + 1)
    p[total] = 1
    # p[total + x] = probability of the sum x; it never wraps, since total is the largest sum.
    for step in d[d != 0].abs().tolist():
        p = .5 * np.roll(p, step) + .5 * np.roll(p, -step)
    as_far = np.abs(np.arange(-total, total + 1)) >= abs(int(d.sum()))
    return min(1., float(p[as_far].sum()))


def describe(values, draws, n):
    """Metrics {name: (1, X)} of n tasks as lists, with 95 % intervals of their draws {name: (samples, X)}.

    None where a single task is known, whose interval would have no width. A quarter to 37 % of the resamples lack one
    given task, and at most 14 % lack both of two: so that is seen in the share of draws that have no value.
    """
    ends = torch.tensor([.025, .975], dtype=torch.float64)
    found = {"interval_95": {}}
    for name, v in values.items():
        found[name] = v[0].tolist()
        pairs = torch.nanquantile(draws[name], ends, dim=0).T.tolist()
        lone = draws[name].isnan().double().mean(0) > .2
        found["interval_95"][name] = [None if n == 1 or alone else pair for pair, alone in zip(pairs, lone)]
    return found


def significant(interval):
    """Does a 95 % interval exclude 0? An unknown one does not."""
    return interval is not None and (interval[0] > 0 or interval[1] < 0)


def summarise(arms, tasks, samples=10_000):
    """Arms {name: Scores}, the first one the base -> {"arms": {name: metrics}, "differences": {name: tuned - base}}.

    Each metric has its values per turn, and under "interval_95" the bootstrap's; differences have paired ones, and
    "p", McNemar's for M and IF. "n": how many verdicts, of all seeds, a mean rests on. None = unknown: the result is
    JSON. Of tasks only the kinds are read.
    """
    base = next(iter(arms))
    _, n, K = arms[base].success.shape
    kinds = [task.kinds[:K] for task in tasks]

    # Every arm by itself: the estimate, and its resamples.
    values, draws, result = {}, {}, {"arms": {}, "differences": {}}
    for arm, scores in arms.items():
        parts = moments(scores, kinds)
        values[arm] = metrics(parts, torch.ones(1, n, dtype=torch.float64))
        draws[arm] = bootstrap(parts, samples)
        found = result["arms"][arm] = describe(values[arm], draws[arm], n)
        found["n"] = {name: count.sum(0).long().tolist() for name, (_, count) in parts.items()}
        if scores.rewards:
            failed = torch.stack([r.isnan() for r in scores.rewards.values()]).any(0)
            found["judge_failed"] = failed.double().mean().item()
            found["rewards"] = {name: r.flatten(0, 1).nanmean(0).tolist() for name, r in scores.rewards.items()}
        if scores.places:
            found["places"] = scores.places

    # Every arm against the base, on the same resamples: the interval is paired.
    for arm in list(arms)[1:]:
        both = [name for name in values[arm] if name in values[base]]
        minus = {name: values[arm][name] - values[base][name] for name in both}
        minus_draws = {name: draws[arm][name] - draws[base][name] for name in both}
        p = {"M": [], "IF": []}
        for k in range(K):
            pair = [arms[name].success.double() for name in (base, arm)]
            p["M"].append(exact_p(*[s[..., k] for s in pair]))
            p["IF"].append(exact_p(*[s.cumprod(2)[..., k] for s in pair]))
        result["differences"][arm] = describe(minus, minus_draws, n) | {"p": p}
    return without_nan(result)


def without_nan(x):
    """NaN and infinities as None, all the way down: JSON knows neither."""
    if isinstance(x, dict):
        return {key: without_nan(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [without_nan(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


# -------------------------------------------------------------------------------------------------------------- show

def table(result):
    """The console's table: a row for each turn and metric, then each edit type over all turns; arms and differences."""
    arms, differences = result["arms"], result["differences"]
    base, width = next(iter(arms)), max(9, *(len(arm) + 2 for arm in arms))
    header = f"{'turn  metric':<18}" + "".join(f"{arm:>{width}}" for arm in arms)
    titles = {arm: f"    {f'{arm} - {base} [95 %]':<32}" for arm in differences}
    header += "".join(titles.values())
    lines = [header.rstrip()]

    def row(label, metric, k):
        line = f"{label:<18}"
        for values in arms.values():
            line += f"{shown(values[metric][k], '.3f'):>{width}}"
        for arm, d in differences.items():
            interval = d["interval_95"][metric][k]
            bounds = f" [{interval[0]:+.3f}, {interval[1]:+.3f}]" if interval else ""
            mark = "" if significant(interval) else "  n.s."
            cell = f"    {shown(d[metric][k], '+.3f')}{bounds}{mark}"
            line += f"{cell:<{len(titles[arm])}}"
        lines.append(line.rstrip())

    for k in range(len(arms[base]["O"])):
        for metric in [name for name in SHOWN if all(name in values for values in arms.values())]:
            row(f"{k + 1:>4}  {metric}", metric, k)
    for metric in [name for name in arms[base] if name.startswith("kind ")]:
        row(metric.removeprefix("kind "), metric, 0)
    return "\n".join(lines)


def shown(value, form):
    return "?" if value is None else format(value, form)


def draw_cell(picture, text, color, width):
    """A picture (3, H, W) uint8, scaled to a width in pixels and framed in a colour, and text under it."""
    image = Image.fromarray(np.asarray(picture).transpose(1, 2, 0))
    height = image.height * width // image.width
    image = image.resize((width, height), Image.NEAREST if image.width < width else Image.LANCZOS)
    lines = []
    for part in text.split("\n"):
        lines += textwrap.wrap(part, width // 6)
    cell = Image.new("RGB", (width + GAP, height + 16 + 13 * len(lines)), "white")
    cell.paste(ImageOps.expand(image, 3, color))
    font = ImageFont.load_default(11)
    ImageDraw.Draw(cell).multiline_text((3, height + 7), "\n".join(lines), "black", font, spacing=1)
    return cell


def contact_sheet(rows, path, width=144):
    """Draw rows (label, images (K+1, 3, H, W) uint8, captions [K], marks [K]) as one PNG, pictures `width` pixels wide.

    A mark is True (green frame), False (red), None or NaN (grey: the judge failed). The label is under the source.
    """
    grid = []
    for label, images, captions, marks in rows:
        cells = [draw_cell(images[0], label, "white", width)]
        for picture, text, mark in zip(images[1:], captions, marks):
            failed = mark is None or math.isnan(mark)
            color = "grey" if failed else "green" if mark else "red"
            cells.append(draw_cell(picture, text, color, width))
        grid.append(cells)
    heights = [max(cell.height for cell in cells) for cells in grid]
    columns = max(len(cells) for cells in grid)
    sheet = Image.new("RGB", (columns * (width + GAP) + 7, sum(heights) + 7), "white")
    for row, cells in enumerate(grid):
        for column, cell in enumerate(cells):
            sheet.paste(cell, (7 + column * (width + GAP), 7 + sum(heights[:row])))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def sheet_row(label, scores, task, row):
    """A dialogue of an arm as a row of a contact sheet, first seed."""
    marks = scores.success[0, row].tolist()
    captions = [f"{k + 1}. {task.instructions[k]}" for k in range(len(marks))]
    return label, scores.pictures(row), captions, marks


def draw_arms(arms, tasks, path, most=6):
    """Contact sheet of some tasks, a row for each arm; first those on which base and last arm differ."""
    success = [scores.success[0].nan_to_num(-1) for scores in arms.values()]
    order = sorted(range(len(tasks)), key=lambda row: torch.equal(success[0][row], success[-1][row]))
    rows = []
    for row in order[:most]:
        for arm, scores in arms.items():
            rows.append(sheet_row(arm, scores, tasks[row], row))
    contact_sheet(rows, path)


# ------------------------------------------------------------------------------------------------------ command line

@dataclass(frozen=True)
class Settings:
    """What an evaluation is. Flags > config.json of --run > these defaults; None: it depends, see `settle`."""
    run: str = option("", "folder of a training run: its model, data, turns and steps; base against tuned")
    model: str = option(None, "editor: a folder or hub id; needed without --run")
    lora: dict = option(None, "[NAME=]PATH of a LoRA to compare with the base; may be repeated")
    data: str = option("shapes", "'shapes' or a JSONL file (default: the run's, else shapes)")
    split: str = option(None, "default: test of shapes; val of the file that the run trained on, all of any other",
                        choices=["train", "val", "test", "all"])
    judge: str = option("exact", "'exact', a VLM, 'none' (pictures alone); default: exact for shapes, else the run's")
    rubric: str = option("", "JSON file of prompts for a VLM (default: the run's)")
    reasoning: str = option("logits", "how a VLM scores (default: the run's)", choices=[*reward.ANSWERS])
    votes: int = option(1, "answers of a VLM averaged for a score (default: the run's)", low=1)
    tasks: int = option(None, "number of tasks (default: 500 of shapes, all of a file)", low=1)
    probes: int = option(None, "tasks for M_clean and wear, and for the drift; 0 = none (default: all of shapes, 100)",
                         low=0)
    turns: int = option(3, "K, edits in a row (default: the run's, else 3)", low=1)
    denoise: int = option(None, "T, steps per turn (default: the run's --eval-denoise, else 8 for shapes, 28)", low=1)
    guidance: float = option(None, "guidance scale (default: the run's, else the family's)", low=0)
    resolution: int = option(512, "pictures of a file have this area, squared (default: the run's, else 512)", low=16,
                             high=4096)
    offload: bool = option(False, "text encoders are on the GPU only while they work")
    seeds: int = option(1, "noise seeds per task, pooled (default: 1)", low=1)
    batch: int = option(None, "dialogues in one forward (default: 100 for shapes, else 4)", low=1)
    out: str = option("out/eval", "folder of the evaluation (default: RUN/eval, else out/eval)")


def read_run(run):
    """What an evaluation takes from the config.json of a training run, of this version or an older one."""
    config = read_json(Path(run) / "config.json")
    config |= {"denoise": config.get("eval_denoise"), "lora": [f"tuned={run}"], "out": f"{run}/eval"}
    data.check_settings(Settings, config | {"lora": None}, Path(run) / "config.json")
    names = ("model", "lora", "data", "turns", "denoise", "guidance", "resolution", "offload", *JUDGE, "out",
             "content_of_data")
    return {name: config[name] for name in names if config.get(name) is not None}


def settle(flags):
    """Flags > config.json of --run > defaults -> Settings. ValueError for flags that contradict each other."""
    if "run" in flags and ("model" in flags or "lora" in flags):
        raise ValueError("--run already names the model and the LoRA: leave out --model and --lora")
    if "run" not in flags and "model" not in flags:
        raise ValueError("give --run DIR or --model X")

    # What was trained, and on what.
    config = read_run(flags["run"]) if "run" in flags else {}
    trained_on, content = config.get("data"), config.pop("content_of_data", None)
    source = flags.get("data", trained_on or "shapes")
    if "resolution" in flags and source == "shapes":
        raise ValueError("--resolution does nothing with --data shapes, whose pictures have one size")
    if "offload" in flags and not torch.cuda.is_available():
        raise ValueError("--offload does nothing without a GPU")

    # The embedded world has a judge that is always right; elsewhere the run's own, unless one is named.
    if source == "shapes" or "judge" in flags:
        config = {name: value for name, value in config.items() if name not in JUDGE}

    # Defaults that depend on the data.
    if source == "shapes":
        depends = {"split": "test", "tasks": 500, "probes": flags.get("tasks", 500), "denoise": 8, "batch": 100}
    else:
        # The file that was trained on, by whatever path: of that only what was held out.
        known = content and Path(source).is_file()
        same = data.file_fingerprint(source) == content if known else source == trained_on
        if source == trained_on and not same and "split" not in flags:
            raise ValueError(f"--data {source} is not the file that --run was trained on, of which some tasks were "
                             "held out (it has changed, or lies in another folder): name that one, or --split all")
        depends = {"split": "val" if same else "all", "probes": 100, "denoise": 28, "batch": 4}
    chosen = depends | config | flags
    return Settings(**chosen | {"lora": name_loras(chosen.get("lora", []))})


def name_loras(texts):
    """["[NAME=]PATH", ...] -> {arm: path}. ValueError for a name twice, or one that is no file name everywhere."""
    found = {}
    for text in texts:
        name, sign, path = text.partition("=")
        if not sign or "/" in name:
            place, path = Path(text).resolve(), text
            folder = place.parent if place.is_file() else place
            name = folder.name if len(texts) > 1 else "tuned"
        if not re.fullmatch(r"\w[\w.-]*", name, re.ASCII):
            raise ValueError(f"{name!r} may hold letters, digits, '.', '_' and '-' only: write NAME={path}")
        if name in found or name == "base":
            raise ValueError(f"two models are named {name!r}: give {path} another name, NAME={path}")
        found[name] = path
    return found


def made_of(settings):
    """What pictures depend on besides the tasks, by content: {what: digest or value}. ValueError if it is not there."""
    folder = model.find_folder(settings.model)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise ValueError(f"--model {settings.model} is no editor: it has no model_index.json")
    found = {"denoise": settings.denoise, "guidance": settings.guidance, "resolution": settings.resolution}
    found["weights of base"] = model.fingerprint(settings.model)
    for arm, path in settings.lora.items():
        found[f"weights of {arm}"] = model.fingerprint(model.find_weights(path))
    return found


def made_of_tasks(tasks, K):
    """Digests of picture and instructions up to each turn, so that an evaluation may be given more turns."""
    found = {}
    for row, task in enumerate(tasks):
        name = task.meta.get("index", row)
        for k in range(1, K + 1):
            start = replace(task, instructions=task.instructions[:k], kinds=task.kinds[:k])
            found[f"dialogue {name}, turn {k}"] = data.fingerprint(start)
    return found


def refuse_other(before, now, out):
    """ValueError if OUT's pictures were made of something else."""
    changed = [f"{what} {before[what]} -> {value}" for what, value in now.items() if before.get(what, value) != value]
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise ValueError(f"{out} holds another evaluation ({'; '.join(changed[:3])}{more}): choose another --out")


def conclude(settings, arms, tasks):
    """Everything that results.json says."""
    profile = "exact" if settings.judge == "exact" else "VLM"
    return asdict(settings) | {"n": len(tasks), "profile": profile} | summarise(arms, tasks)


def start_processes(collectives):
    """(rank, number of processes, device) of this process of torchrun: a GPU each, `collectives` nccl or gloo."""
    rank, world = data.processes()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        place, n = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if place >= n:
            raise ValueError(f"--nproc_per_node is more than the {n} GPU{'s' * (n > 1)} of this machine: each process "
                             "takes one (with CUDA_VISIBLE_DEVICES= in front of the command all run on the CPU)")
        device = torch.device("cuda", place)
        torch.cuda.set_device(device)                        # before anything collective
    if world > 1:
        meet(collectives, device)
    return rank, world, device


def meet(collectives, device):
    """Join the other processes. ValueError if they are not all there after ten minutes.

    From then on they wait for each other as long as it takes: rank 0 may judge for longer than NCCL's default allows.
    """
    try:
        with data.handling(signal.SIG_DFL):                  # torch waits outside Python, where no handler of ours runs
            store, rank, world = next(rendezvous("env://", timeout=MEETING))
            dist.init_process_group(collectives, store=store, rank=rank, world_size=world, timeout=timedelta(days=7),
                                    device_id=device if collectives == "nccl" else None)
    except dist.DistStoreError as error:
        place = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise ValueError(f"not all of {os.environ['WORLD_SIZE']} processes (WORLD_SIZE) came to {place} within "
                         f"{MEETING}: {data.one_line(error)}") from None


def load_arm(settings, arm, sizes, device):
    """The editor with the weights of an arm. ValueError if they do not fit, or the editor cannot edit such pictures."""
    offload = settings.offload and device.type == "cuda"
    editor = model.load(settings.model, device, guidance=settings.guidance, offload=offload)
    if arm != "base":
        model.load_weights(editor, settings.lora[arm])
    for size in sizes:
        editor.times(settings.denoise, size)                 # refuses a size that is no multiple, and too few steps
    return editor


def main(argv=None):
    # Everything that can be refused without an editor and a judge.
    settings = settle(data.parse_flags(Settings, __doc__, argv))
    out = Path(settings.out)
    data.check_folder(out)
    tasks = data.load(settings.data, settings.split, settings.turns, settings.resolution, settings.tasks)
    if not tasks:
        raise ValueError(f"--split {settings.split} of {settings.data} is empty")
    file = out / "settings.json"
    before = data.read_made_of(file) if file.is_file() else {}
    if not before and any(out.glob("arms/*/*/*.png")):
        raise ValueError(f"{out} holds pictures, and no settings.json that says of what they were made: choose another "
                         "--out")
    of_tasks = made_of_tasks(tasks, settings.turns)
    refuse_other(before, made_of(settings) | of_tasks, out)

    rank, world, device = start_processes("gloo")            # nothing but barriers between them
    judge = None
    if settings.judge != "none":
        judge = reward.load(settings.judge, device, rubric=settings.rubric, reasoning=settings.reasoning,
                            votes=settings.votes)
        judge.check(tasks)

    with ExitStack() as held:                                # process 0's claim on --out
        arms = make_arms(settings, tasks, judge, before | of_tasks, rank, device, held)
        if rank == 0 and judge:
            report(settings, arms, tasks, judge)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def make_arms(settings, tasks, judge, made_before, rank, device, held):
    """Every arm's pictures and scores, as far as they are not there -> {arm: Scores}, "base" first."""
    out = Path(settings.out)
    # LoRAs before the base, so that one that does not fit is refused at once: until then nothing is written.
    arms = dict.fromkeys(["base", *settings.lora])
    for number, arm in enumerate([*settings.lora, "base"]):
        folder, editor = out / "arms" / arm, None
        _, complete = read_plan(tasks, settings.turns, settings.seeds, settings.probes, folder)
        if not complete:
            editor = load_arm(settings, arm, {task.size for task in tasks}, device)
        if rank == 0 and number == 0:
            out.mkdir(parents=True, exist_ok=True)
            data.claim(out, held)
            # once more, since a hub id is known by its content only now that it is here
            record = {"settings": asdict(settings), "made_of": made_before | made_of(settings)}
            if judge:
                record["judge"] = {"fingerprint": judge.fingerprint, "names": judge.names}
            model.write_text(out / "settings.json", json.dumps(record, indent=1))
        arms[arm] = evaluate(editor, judge, tasks, settings.turns, settings.denoise, settings.seeds, settings.batch,
                             settings.probes, folder, desc=arm)
        del editor                                           # the next one may need its room
    return arms


def report(settings, arms, tasks, judge):
    """Write the report of an evaluation, and print its table."""
    from bench.report import setting_line, write_report
    out, result = Path(settings.out), conclude(settings, arms, tasks)
    write_report(out, result, arms, tasks)
    print(f"{setting_line(result)}\n{table(result)}")
    print(f"written: {out / 'report.html'}, results.json, tables.md, figures/, sheets/")
    if judge.last_failure:
        print(f"the judge failed at times, at last: {judge.last_failure}")


if __name__ == "__main__":
    data.run_main(main)
