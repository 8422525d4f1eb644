"""Multi-turn evaluation: how an editor's success and consistency hold up over K edits on its own outputs.

    python eval.py --run out/grpo                                     # a training run: base against tuned, test tasks
    python eval.py --model shapes/editor --lora out/grpo              # the same, by hand
    python eval.py --model X --lora A=out/grpo --lora B=out/nft       # any number of LoRAs against their base
    torchrun --nproc_per_node=8 eval.py generate --model X --data edival.csv --protocol edival
    python eval.py score --out out/eval --judge <VLM>                 # one stage alone; the rest is in out/eval/manifest.json
    python eval.py report --edival RESULTS/base_generation --edival RESULTS/tuned_generation      # EdiVal's own verdicts

Stages: generate (pictures, in EdiVal's layout) -> score (scores.jsonl) -> report (results.json, tables, figures, contact
sheets, report.html). Without a name all three run; what is finished is not repeated, what was interrupted goes on.

s_ik = did turn k of dialogue i succeed (the judge's `success`, else following >= .5)
M_k  = mean_i s_ik                     marginal success           CC_k = mean_i consistency_ik, against the original
IF_k = mean_i prod_{j<=k} s_ij         cumulative success         O_k  = sqrt(IF_k CC_k), overall
C_k  = IF_k / IF_{k-1}                 conditional success        flatness = M_K / M_1
EB_k = M_k on a clean context - M_k on own outputs, same tasks: the exposure-bias gap
All arms see the same tasks and the same noise. Intervals: paired bootstrap over tasks, the seeds of a task stay together.
"""
import argparse
import hashlib
import json
import os
import re
import sys
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import data
import model
import reward
from edival import SEED, SIZE, as_baseline, baseline_noise, collect_results, file_of
from report import contact_sheet, draw_arms, setting_line, table, write_report      # train.py draws with them too
from rollout import Task, by_size, draw_noise, rollout, stack_images

STAGES = ("generate", "score", "report")
NOTHING = "Change nothing"
FOLDERS = {"own": "multipass", "clean": "clean", "nothing": "nothing"}       # pass -> folder of its pictures; multipass is EdiVal's name
COPIED = 16, .005      # a turn is a copy if under .5 % of the picture (as 64 x 64 blocks) changes by more than 16 of 255



# ---------------------------------------------------------------------------------------------------------- generate

class Pass(NamedTuple):
    """Something that every arm is sampled on."""
    name: str      # own: the dialogues; clean: instruction `first` alone on a clean context; nothing: K times NOTHING
    tasks: dict    # row -> Task
    first: int     # turn of the dialogue that the first instruction of these tasks is
    turns: int


def plan(tasks, K, probes):
    """The passes over these tasks; clean and nothing on `probes` of them, evenly spread."""
    rows = sorted({i * len(tasks) // probes for i in range(probes)}) if probes < len(tasks) else range(len(tasks))
    passes = [Pass("own", dict(enumerate(tasks)), 0, K)]
    if probes:
        for k in range(1, K):
            alone = {i: data.alone(tasks[i], k) for i in rows}
            passes.append(Pass("clean", {i: task for i, task in alone.items() if task}, k, 1))
        passes.append(Pass("nothing", {i: Task(tasks[i].image, [NOTHING] * K, [""] * K) for i in rows}, 0, K))
    return passes


def names_of(tasks):
    """The number that a task's files and scores carry: EdiVal's image index, else its row."""
    return [task.meta.get("index", i) for i, task in enumerate(tasks)]


def folder_of(out, arm, seed, settings):
    return Path(settings["pictures"].get(arm) or Path(out) / f"{arm}{f'-seed{seed}' * (seed > 0)}_generation")


def missing(passes, folder, names, rank=0, world=1):
    """What generation still has to do: (pass, rows of it on this process that lack a picture)."""
    for part in passes:
        where = folder / FOLDERS[part.name]
        rows = [i for i in list(part.tasks)[rank::world]
                if not all(file_of(where, names[i], part.first + k).is_file() for k in range(part.turns))]
        if rows:
            yield part, rows


def batches(part, rows, most):
    """Rows of a pass in parts of one picture size, at most `most` together."""
    return [[rows[i] for i in places] for places in by_size([part.tasks[i] for i in rows], most)] if rows else []


def generate(settings, out, passes, names, device, rank=0, world=1):
    """Write every arm's missing pictures; this process does each world-th task. LoRAs first: one that does not fit is refused at once."""
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    for arm in [*settings["loras"], *["base"] * bool(settings["model"])]:
        todo = [(seed, part, rows) for seed in range(settings["seeds"])
                for part, rows in missing(passes, folder_of(out, arm, seed, settings), names, rank, world)]
        if not todo:
            continue
        editor = model.load(settings["model"], device, dtype, settings["guidance"], settings["offload"])
        if arm != "base":
            model.load_weights(editor, settings["loras"][arm])
        T = settings["denoise"]
        if settings["protocol"]:
            editor, T = as_baseline(editor)
        for size in {task.image.size[::-1] for task in passes[0].tasks.values()}:
            editor.latent_shape(size)                                            # refuses a size that is no multiple
        settings |= {"denoise": T, "guidance": getattr(editor, "guidance", None)}
        if rank == 0:
            keep_manifest(settings, out)                                         # nothing is written before this
        with tqdm(total=sum(part.turns * len(rows) for _, part, rows in todo), desc=f"generate {arm}", unit="picture",
                  disable=rank > 0) as bar:
            for seed, part, rows in todo:
                where = folder_of(out, arm, seed, settings) / FOLDERS[part.name]
                where.mkdir(parents=True, exist_ok=True)
                noise = lambda shape, row, k: draw_noise(shape, seed, 0, row, 0, part.first + k, 0)   # a turn's is the same in every pass
                if settings["protocol"]:
                    noise = baseline_noise(editor, SEED + seed)
                for batch in batches(part, rows, settings["batch"]):
                    images = rollout(editor, [part.tasks[i] for i in batch], 1, part.turns, T, (seed, 0), task_rows=batch, keep=False,
                                     start_noise=noise, on_turn=lambda *_: bar.update(len(batch))).images
                    for i, pictures in zip(batch, images):
                        if part.name != "clean":
                            save_png(pictures[0], file_of(where, names[i]))
                        for k in range(part.turns):
                            save_png(pictures[k + 1], file_of(where, names[i], part.first + k))
        del editor                                                               # the next one may need its room


def save_png(picture, path):
    """Write a picture (3, H, W) uint8; the file appears whole or not at all."""
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path.with_suffix(".tmp"), "PNG", compress_level=1)
    os.replace(path.with_suffix(".tmp"), path)


# ------------------------------------------------------------------------------------------------------------- score

def evaluate(editor, judge, tasks, K, T, seeds=(0,), batch=100, desc="eval", show=True):
    """Generate and score in memory (train.py's closing table): r (n_seeds * n, K, M) and n images (K+1, 3, H, W) of the first seed."""
    rewards, images = [], [None] * len(tasks)
    with tqdm(total=len(seeds) * len(tasks), desc=desc, unit="task", disable=not show) as bar:
        for seed in seeds:
            scores, order = [], []
            for places in by_size(tasks, batch):
                part, r = [tasks[i] for i in places], []
                trajectory = rollout(editor, part, 1, K, T, (seed, 0), task_rows=places.tolist(), keep=False,
                                     on_turn=lambda k, pictures: r.append(judge(part, pictures, k)))
                scores.append(torch.stack(r, 1)), order.append(places)
                if seed == seeds[0]:
                    for i, pictures in zip(places, trajectory.images):
                        images[i] = pictures
                bar.update(len(part))
            rewards.append(torch.cat(scores)[torch.cat(order).argsort()])
    return torch.cat(rewards), images


def load_pictures(part, rows, folder, names):
    """The pictures of a pass: (rows, turns + 1, 3, H, W) uint8, the source first. ValueError names a picture that is missing or is another."""
    sources, pictures = stack_images([part.tasks[i] for i in rows]), []
    for i, source in zip(rows, sources):
        own = [source]
        for k in range(part.turns):
            path = file_of(folder / FOLDERS[part.name], names[i], part.first + k)
            if not path.is_file():
                raise ValueError(f"{path} is missing: dialogue {names[i]} needs the pictures of {part.turns} turns (run the stage generate, "
                                 f"or leave the dialogue out of --data)")
            with Image.open(path) as image:
                if image.size != (source.shape[2], source.shape[1]):
                    raise ValueError(f"{path} is {image.width} x {image.height}, expected {source.shape[2]} x {source.shape[1]} as the source")
                own.append(torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1))
        first = next((f for f in (file_of(folder / FOLDERS[part.name], names[i]).with_suffix(end) for end in (".png", ".jpg"))
                      if f.is_file()), None)
        if first and part.name == "own":
            with Image.open(first) as image:
                seen = torch.from_numpy(np.array(image.convert("RGB").resize((source.shape[2], source.shape[1]), Image.LANCZOS)))
            if (seen.permute(2, 0, 1).float() - source.float()).abs().mean() > 12:
                raise ValueError(f"{first} is not the picture of dialogue {names[i]} in --data")
        pictures.append(torch.stack(own))
    return torch.stack(pictures)


def change(before, after):
    """Pictures (S, 3, H, W) uint8 -> mean |difference| in 0..255 (S,), and whether `after` is a copy of `before` (S,).

    Differences are averaged over blocks before they count, so that a VAE's loss of fine texture does not pass for an edit.
    """
    difference = after.float() - before.float()
    blocks = F.adaptive_avg_pool2d(difference, tuple(min(64, side) for side in difference.shape[2:])).abs().amax(1)
    return difference.abs().mean((1, 2, 3)), (blocks > COPIED[0]).float().mean((1, 2)) < COPIED[1]


def load_features(folder, device="cpu", micro=32):
    """Similarity of what an edit leaves alone, by a vision transformer (DINOv2, DINOv3): pairs (S, 2, 3, H, W) uint8 -> (S,).

    Cosine of the patch tokens at the same place, mean over all but the least similar quarter of the picture: where the edit
    lies is not known here, and a quarter is what it may take. A proxy of EdiVal-CC, whose regions come from a detector.
    """
    from transformers import AutoModel
    try:
        net = AutoModel.from_pretrained(folder).to(device).eval()
        patch = net.config.patch_size
    except Exception as error:      # transformers raises many kinds for what is no such model
        raise ValueError(f"--features {folder} is no vision transformer that loads here: {(str(error) or type(error).__name__).splitlines()[0]}") from None
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in ((.485, .456, .406), (.229, .224, .225)))

    @torch.no_grad()
    def tokens(pictures):                                                # 16 x 16 patches; class and register tokens come first
        x = F.interpolate(pictures.to(device).float() / 255, (16 * patch, 16 * patch), mode="bicubic", antialias=True).clamp(0, 1)
        return F.normalize(net(pixel_values=(x - mean) / std).last_hidden_state[:, -256:].float(), dim=-1)

    def similarity(pairs):
        parts = [(tokens(part[:, 0]) * tokens(part[:, 1])).sum(-1) for part in pairs.split(micro)]
        return torch.cat(parts).sort(1, descending=True).values[:, :192].mean(1).cpu()
    return similarity


def read_scores(out):
    """All whole lines of scores.jsonl, and of what several processes left beside it."""
    rows = []
    for file in sorted(Path(out).glob("scores*.jsonl")):
        for line in file.read_text().splitlines(keepends=True):
            if line.endswith("\n"):                                      # else the process was killed while it wrote
                rows.append(json.loads(line))
    return rows


def score(settings, out, passes, names, judge, features=None, rank=0, world=1):
    """Judge every picture that has no score yet: a line (arm, seed, pass, task, turn) with all reward columns, null where the judge failed."""
    label = label_of(settings)
    done = {(row["arm"], row["seed"], row["pass"], row["task"], row["turn"]) for row in read_scores(out) if row["judge"] == label}
    todo = []
    for arm in arms_of(settings):
        for seed in range(settings["seeds"]):
            for part in passes:
                if arm in settings["pictures"] and part.name != "own":
                    continue
                rows = [i for i in list(part.tasks)[rank::world]
                        if any((arm, seed, part.name, names[i], part.first + k + 1) not in done for k in range(part.turns))]
                todo += [(arm, seed, part, batch) for batch in batches(part, rows, 32)]
    if not todo:
        return
    file = Path(out) / (f"scores-{rank}.jsonl" if world > 1 else "scores.jsonl")
    if file.exists() and not file.read_bytes().endswith(b"\n"):          # drop the half line of a killed process
        file.write_bytes(file.read_bytes()[:file.read_bytes().rfind(b"\n") + 1])
    bar = tqdm(total=sum(part.turns * len(rows) for _, _, part, rows in todo), desc="score", unit="turn", disable=rank > 0)
    for arm, seed, part, rows in todo:
        tasks, images = [part.tasks[i] for i in rows], load_pictures(part, rows, folder_of(out, arm, seed, settings), names)
        lines = []
        for k in range(part.turns):
            columns = {}
            if part.name != "nothing":
                columns = dict(zip(judge.names, judge(tasks, images[:, :k + 2], k).T.tolist()))
            if features and part.name == "own":
                kept = torch.tensor([task.meta.get("background_kept", [True] * (k + 1))[k] for task in tasks])
                columns["features"] = features(images[:, [0, k + 1]]).where(kept, torch.tensor(float("nan"))).tolist()
            columns["copied"] = change(images[:, k], images[:, k + 1])[1].float().tolist()
            columns["drift"] = change(images[:, 0], images[:, k + 1])[0].tolist()
            for j, i in enumerate(rows):
                if (arm, seed, part.name, names[i], part.first + k + 1) in done:
                    continue
                values = {name: None if v[j] != v[j] else round(v[j], 6) for name, v in columns.items()}
                lines.append({"arm": arm, "seed": seed, "pass": part.name, "task": names[i], "turn": part.first + k + 1,
                              "kind": tasks[j].kinds[k], "judge": label} | values)
        with open(file, "a") as stream:
            stream.write("".join(json.dumps(line) + "\n" for line in lines))
        bar.update(part.turns * len(rows))
    bar.close()


def merge_scores(out):
    """One scores.jsonl of what several processes wrote."""
    parts = sorted(Path(out).glob("scores-*.jsonl"))
    if parts:
        rows = {json.dumps(row): None for row in read_scores(out)}
        (Path(out) / "scores.tmp").write_text("".join(f"{row}\n" for row in rows))
        os.replace(Path(out) / "scores.tmp", Path(out) / "scores.jsonl")
        for part in parts:
            part.unlink()


# ----------------------------------------------------------------------------------------------------------- measure

def successes(r, names):
    """Rewards (n, K, M) -> s (n, K) in {0, 1}, NaN where the judge failed."""
    if "success" in names:
        return r[:, :, names.index("success")]
    following = r[:, :, names.index("following")]
    return torch.where(following.isnan(), following, (following >= .5).float())


def moments(arm, kinds=None):
    """What the metrics of an arm are made of, for each task: {name: (sum over seeds, number of valid ones)}, each (n, X).

    arm: `s` (S, n, K), `cc` (S, n, K, parts), and where measured `copied`, `clean` (success on a clean context), `nothing`
    (drift), `drift`, all (S, n, K), NaN = unknown. kinds: n lists of K edit types. A turn that the judge failed on is left
    out of the means, and so is the cumulative success of what follows it.
    """
    s, unknown = arm["s"].double(), torch.tensor(float("nan"), dtype=torch.float64)
    values = {"M": s, "IF": s.cumprod(2)} | {f"CC{i}": cc for i, cc in enumerate(arm["cc"].unbind(3))}
    values |= {name: arm[name] for name in ("copied", "drift", "nothing") if name in arm}
    if "clean" in arm:
        values |= {"clean": arm["clean"].double().where(~s.isnan(), unknown), "self": s.where(~arm["clean"].isnan(), unknown)}
    for kind in sorted({kind for row in kinds or [] for kind in row} - {""}):
        here = torch.tensor([[k == kind for k in row] for row in kinds])
        values[f"kind {kind}"] = s.where(here, unknown).transpose(1, 2).flatten(0, 1)[..., None]      # all turns together
        values[f"turns {kind}"] = s.where(here, unknown)
    return {name: (v.double().nan_to_num(0).sum(0), (~v.isnan()).double().sum(0)) for name, v in values.items()}


def metrics(parts, w):
    """Every metric from the moments of an arm, tasks weighted by w (R, n): {name: (R, X)}. Ones give the estimate, counts a resample."""
    mean = {name: (w @ total) / (w @ valid) for name, (total, valid) in parts.items()}
    M, IF = mean.pop("M"), mean.pop("IF")
    CC = torch.stack([mean.pop(name) for name in list(mean) if name.startswith("CC")]).mean(0)     # EdiVal: mean of object and background
    out = {"M": M, "IF": IF, "C": IF / torch.cat([torch.ones_like(IF[:, :1]), IF[:, :-1]], 1), "CC": CC, "O": (IF * CC).sqrt(),
           "flatness": M[:, -1:] / M[:, :1]}
    if "clean" in mean:
        clean, own = mean.pop("clean"), mean.pop("self")
        out |= {"M_clean": clean, "M_self": own, "EB": clean - own}
    return out | mean


def draw_resamples(n, samples, seed=0):
    """How often each of n tasks is in a bootstrap sample: parts (R, n) float64 of `samples` rows in all."""
    generator = torch.Generator().manual_seed(seed)
    for part in torch.arange(samples).split(max(1, 2_000_000 // n)):
        rows = torch.randint(n, (len(part), n), generator=generator)
        counts = torch.zeros(len(part), n, dtype=torch.float64)
        yield counts.scatter_add_(1, rows, torch.ones_like(counts))


def exact_p(base, tuned):
    """McNemar's exact test of paired successes (S, n): two-sided p.

    With several seeds a task's seeds are swapped together, so that the task stays the unit: the exact distribution of
    sum_i ±d_i, d_i the difference of task i summed over seeds. For one seed that is McNemar's binomial.
    """
    d = (tuned - base).nan_to_num(0).sum(0).round().long()
    total = int(d.abs().sum())
    p = np.zeros(2 * total + 1)
    p[total] = 1
    for step in d[d != 0].abs().tolist():
        p = .5 * np.roll(p, step) + .5 * np.roll(p, -step)               # never wraps: total is the largest sum
    return min(1., float(p[np.abs(np.arange(-total, total + 1)) >= abs(int(d.sum()))].sum()))


def summarise(arms, kinds=None, samples=10_000):
    """Arms {name: see `moments`}, the first one the base -> {"arms": {name: metrics}, "differences": {name: tuned - base}}.

    Each metric has its values per turn, and under "interval_95" the bootstrap's; differences have "interval_95" of their
    own, paired, and "p", McNemar's for marginal and cumulative success. NaN where there is nothing to take a mean of.
    """
    parts = {name: moments(arm, kinds) for name, arm in arms.items()}
    base, n = next(iter(arms)), next(iter(arms.values()))["s"].shape[1]
    values = {name: metrics(m, torch.ones(1, n, dtype=torch.float64)) for name, m in parts.items()}
    draws = {name: {metric: [] for metric in v} for name, v in values.items()}
    for w in draw_resamples(n, samples):
        for name in arms:
            for metric, v in metrics(parts[name], w).items():
                draws[name][metric].append(v)
    draws = {name: {metric: torch.cat(v) for metric, v in d.items()} for name, d in draws.items()}
    interval = lambda v: torch.nanquantile(v, torch.tensor([.025, .975], dtype=torch.float64), dim=0).T.tolist()
    result = {"arms": {}, "differences": {}}
    for name, arm in arms.items():
        count = lambda key: parts[name][key][1].sum(0).long().tolist()
        valid = {metric: count(key) for metric, key in (("M", "M"), ("IF", "IF"), ("EB", "clean")) if key in parts[name]}
        valid |= {key: count(key) for key in parts[name] if key.startswith(("kind ", "turns "))}
        valid["CC"] = list(map(list, zip(*(count(key) for key in parts[name] if key.startswith("CC")))))       # per turn, of each part
        result["arms"][name] = {metric: v[0].tolist() for metric, v in values[name].items()} | {
            "interval_95": {metric: interval(v) for metric, v in draws[name].items()}, "n": valid}
        if name != base:
            common = [metric for metric in values[name] if metric in values[base]]
            s = [arms[a]["s"].double() for a in (base, name)]
            result["differences"][name] = {metric: (values[name][metric] - values[base][metric])[0].tolist() for metric in common} | {
                "interval_95": {metric: interval(draws[name][metric] - draws[base][metric]) for metric in common},
                "p": {"M": [exact_p(s[0][..., k], s[1][..., k]) for k in range(s[0].shape[2])],
                      "IF": [exact_p(*(v.cumprod(2)[..., k] for v in s)) for k in range(s[0].shape[2])]}}
    return result


def report(arms, names, n_tasks, kinds=None):
    """Rewards of arms {name: r (n_seeds * n, K, M)} -> `summarise`, with the mean of every reward and the share of judge failures."""
    fold = lambda v: v.view(-1, n_tasks, *v.shape[1:])
    c = names.index("consistency")
    result = summarise({arm: {"s": fold(successes(r, names)), "cc": fold(r[..., [c]])} for arm, r in arms.items()}, kinds)
    for arm, r in arms.items():
        result["arms"][arm] |= judged(r, names)
    return result


def judged(r, names):
    """Rewards (n, K, M) -> the share of turns that the judge failed on, and the mean of every reward per turn."""
    return {"judge_failed": r.isnan().any(2).double().mean().item(),
            "rewards": {name: r[..., m].nanmean(0).tolist() for m, name in enumerate(names)}}


def collect(settings, out, passes, names):
    """scores.jsonl -> arms for `summarise`, and extras {arm: judge_failed, rewards}. ValueError if a turn has no score."""
    label, S, n, K = label_of(settings), settings["seeds"], len(names), passes[0].turns
    row_of, arms, extras = {name: i for i, name in enumerate(names)}, {}, {}
    scored = [row for row in read_scores(out) if row["judge"] == label]
    fixed = {"arm", "seed", "pass", "task", "turn", "kind", "judge"}
    for arm in arms_of(settings):
        table = {}                                           # (pass, column) -> (S, n, K)
        for row in scored:
            if row["arm"] == arm and row["seed"] < S and row["task"] in row_of and row["turn"] <= K:
                for name in row.keys() - fixed:
                    at = table.setdefault((row["pass"], name), torch.full((S, n, K), float("nan"), dtype=torch.float64))
                    at[row["seed"], row_of[row["task"]], row["turn"] - 1] = float("nan") if row[name] is None else row[name]
        there = int((~table["own", "copied"].isnan()).sum()) if table else 0
        if there < S * n * K:
            raise ValueError(f"{Path(out) / 'scores.jsonl'} has {there} of the {S * n * K} scores of {arm} by the judge {label!r}: run the stage score")
        columns = [name for where, name in table if where == "own" and name not in ("copied", "drift", "features")]
        columns.sort(key=["following", "consistency", "success", *sorted(columns)].index)
        stack = lambda where: torch.stack([table[where, name] for name in columns], -1)                        # (S, n, K, M)
        r = stack("own").flatten(0, 1)
        s = successes(r, columns).view(S, n, K)
        arms[arm] = {"s": s, "cc": table["own", "features" if ("own", "features") in table else "consistency"][..., None],
                     "copied": table["own", "copied"], "drift": table["own", "drift"]}
        if ("clean", "copied") in table:
            clean = successes(stack("clean").flatten(0, 1), columns).view(S, n, K)
            # turn 1 is its own clean context
            probed = ~table["nothing", "drift"][:, :, :1].isnan()
            arms[arm]["clean"] = torch.cat([s[..., :1].where(probed, torch.tensor(float("nan"), dtype=s.dtype)), clean[..., 1:]], 2)
        if ("nothing", "drift") in table:
            arms[arm]["nothing"] = table["nothing", "drift"]
        extras[arm] = judged(r, columns)
    return arms, extras


# ------------------------------------------------------------------------------------------------------ command line

class Parser(argparse.ArgumentParser):
    """Refuses in one line like everything else, without printing all flags."""

    def error(self, message):
        raise ValueError(message)


def parse(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", nargs="?", choices=STAGES, help="one stage alone (default: all that is not finished)")
    parser.add_argument("--run", type=Path, help="folder of a training run: its model, data, turns and steps, base against tuned")
    parser.add_argument("--model", help="editor: a folder or hub id; needed without --run")
    parser.add_argument("--lora", action="append", default=[], metavar="[NAME=]PATH",
                        help="LoRA file or folder to compare with the base; may be repeated")
    parser.add_argument("--pictures", action="append", default=[], metavar="NAME_generation",
                        help="a folder of pictures in EdiVal's layout, made elsewhere, to score; may be repeated")
    parser.add_argument("--edival", action="append", default=[], metavar="RESULTS",
                        help="EdiVal's own results of a model, to report; may be repeated")
    parser.add_argument("--data", help="'shapes', a JSONL file or EdiVal's CSV (default: the run's, else shapes)")
    parser.add_argument("--images", help="folder of the pictures of such a CSV (default: the run's)")
    parser.add_argument("--split", choices=["train", "val", "test", "all"],
                        help="default: test of shapes; of the file that the run trained on val, of any other file all")
    parser.add_argument("--protocol", choices=["edival"],
                        help="what EdiVal's baselines fix: 512 x 512, seed 1234 every turn, steps and guidance of the family")
    parser.add_argument("--judge", help="'exact' or a VLM (default: exact for the embedded world, else the run's)")
    parser.add_argument("--features", help="a DINOv2 or DINOv3 folder or hub id: consistency by its features in place of the judge's")
    parser.add_argument("--tasks", type=int, help="number of tasks, at least 1 (default: 500 of shapes, all of a file)")
    parser.add_argument("--probes", type=int,
                        help="tasks for the exposure-bias gap and the drift under 'change nothing'; 0 = none (default: 100)")
    parser.add_argument("--turns", type=int, help="K, edits in a row (default: the run's, else 3)")
    parser.add_argument("--denoise", type=int,
                        help="T, denoising steps per turn (default: the run's --eval-denoise, else 8 for shapes, 28)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the run's, else the family's)")
    parser.add_argument("--resolution", type=int, help="pictures are scaled to this area, squared, in pixels (default: the run's, else 512)")
    parser.add_argument("--offload", action="store_true", default=None, help="text encoders are on the GPU only while they work")
    parser.add_argument("--seeds", type=int, help="noise seeds per task, pooled (default: 1)")
    parser.add_argument("--batch", type=int, help="tasks in one forward (default: 100 for shapes, else 4)")
    parser.add_argument("--out", type=Path, help="folder of the evaluation (default: RUN/eval, else out/eval)")
    return parser.parse_args(argv)


def named(paths, derive, taken=()):
    """["[NAME=]PATH", ...] -> {name: path}. ValueError for a name twice, or one that EdiVal's scripts would cut."""
    out = {}
    for text in paths:
        name, sign, path = text.partition("=")
        name, path = (name, path) if sign and "/" not in name else (derive(Path(text).resolve()), text)
        if not re.fullmatch(r"[A-Za-z0-9.-]+", name):
            raise ValueError(f"the name {name!r} of {path} may hold letters, digits, '.' and '-' only: EdiVal cuts names at '_'")
        if name in out or name in taken:
            raise ValueError(f"two models are named {name!r}: give {path} another name, NAME={path}")
        out[name] = path
    return out


def fingerprint(path):
    """Digest of the weights at a path, so that an evaluation never goes on with others."""
    found = model.find_weights(path)
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(found.rglob("*")) if found.is_dir() else [found]:
        if file.is_file():
            with open(file, "rb") as stream:
                while block := stream.read(1 << 24):
                    digest.update(block)
    return digest.hexdigest()


FROZEN = ("model", "data", "split", "turns", "denoise", "guidance", "resolution", "protocol")       # what a picture depends on


def settle(args):
    """Flags > manifest of --out > config of --run > defaults: (settings, folder). ValueError for what contradicts what is there."""
    config = {}
    if args.run:
        if args.model or args.lora:
            raise ValueError("--run already names the model and the LoRA: leave out --model and --lora")
        if not (args.run / "config.json").is_file():
            raise ValueError(f"--run {args.run} holds no config.json: it is no training run")
        config = json.loads((args.run / "config.json").read_text())
        config |= {"denoise": config.get("eval_denoise"), "tasks": None}       # tasks: of a training step
    for name, low in (("tasks", 1), ("seeds", 1), ("batch", 1), ("turns", 1), ("denoise", 1), ("resolution", 1), ("probes", 0)):
        value = getattr(args, name)
        if value is not None and value < low:
            raise ValueError(f"--{name} {value} must be at least {low}")
    out = args.out or (args.run / "eval" if args.run else Path("out/eval"))
    before = json.loads((out / "manifest.json").read_text()) if (out / "manifest.json").is_file() else {}
    def first(name, default=None):
        return next((v for v in (getattr(args, name), before.get(name), config.get(name)) if v is not None), default)

    settings = {name: first(name) for name in ("model", "protocol", "features", "guidance", "denoise")}
    settings |= {"data": first("data", "shapes"), "images": first("images", ""), "offload": first("offload", False)}
    shapes, csv = settings["data"] == "shapes", str(settings["data"]).endswith(".csv")
    settings |= {"split": first("split", "test" if shapes else "val" if settings["data"] == config.get("data") else "all"),
                 "turns": first("turns", 3), "resolution": first("resolution", SIZE), "tasks": first("tasks", 500 if shapes else 1_000_000),
                 "probes": first("probes", 100), "seeds": first("seeds", 1), "batch": first("batch", 100 if shapes else 4),
                 "judge": args.judge or before.get("judge") or ("exact" if shapes else config.get("judge", "exact"))}
    asked = {} if args.judge else before.get("asked") or ({} if shapes else config)
    settings["asked"] = {name: asked[name] for name in reward.OPTIONS if name in asked}      # how the run asked its judge
    if settings["protocol"]:
        if shapes or args.denoise or args.guidance or args.resolution:
            raise ValueError("--protocol edival is for photographs (--data), and fixes --denoise, --guidance and --resolution: leave them out")
        settings |= {"resolution": SIZE, "denoise": before.get("denoise"), "guidance": before.get("guidance")}    # None: the family's
    elif not settings["denoise"]:
        settings["denoise"] = 8 if shapes else 28

    last = lambda path: (path if path.is_dir() else path.parent).name.replace("_", "-")
    model_of = lambda path: (path.parent if path.name == "multipass" else path).name.split("_")[0]
    loras = {"tuned": str(args.run)} if args.run else named(args.lora, last if len(args.lora) > 1 else lambda _: "tuned", ["base"])
    weights = {name: fingerprint(path) for name, path in loras.items()}
    for name in loras.keys() & before.get("weights", {}).keys():
        if weights[name] != before["weights"][name]:
            raise ValueError(f"{out} holds pictures of other weights named {name!r}: choose another --out, or name these, --lora NAME={loras[name]}")
    settings |= {"loras": before.get("loras", {}) | loras, "weights": before.get("weights", {}) | weights}
    ours = [*["base"] * bool(settings["model"]), *settings["loras"]]
    settings["pictures"] = before.get("pictures", {}) | named(args.pictures, model_of, ours)
    settings["edival"] = named(args.edival, model_of)        # not kept: EdiVal's verdicts are a report beside ours
    changed = [f"{name} {before[name]!r} -> {settings[name]!r}" for name in FROZEN
               if before.get(name) is not None and before[name] != settings[name]]
    if changed:
        raise ValueError(f"{out} holds another evaluation ({', '.join(changed)}): choose another --out")
    if not (settings["model"] or settings["pictures"] or settings["edival"]):
        raise ValueError("give --run DIR or --model X (or --pictures, or --edival)")
    for name, folder in settings["pictures"].items():
        if not (Path(folder) / "multipass").is_dir():
            raise ValueError(f"--pictures {folder} holds no multipass/: it is not in EdiVal's layout")
    if settings["pictures"] and settings["seeds"] > 1:
        raise ValueError(f"--seeds {settings['seeds']}: pictures made elsewhere are of one seed")
    return settings, out


def arms_of(settings):
    return [*["base"] * bool(settings["model"]), *settings["loras"], *settings["pictures"]]


def label_of(settings):
    """Who scored: part of every line of scores.jsonl."""
    asked = [f" {name}={value}" for name, value in settings["asked"].items() if name not in ("judge_workers", "judge_timeout", "judge_cache")]
    return settings["judge"] + "".join(asked) + (f" + features {settings['features']}" if settings["features"] else "")


def profile_of(settings):
    """exact | EdiVal | proxy (EdiVal's data by our judges: never to be mistaken for EdiVal's own detectors) | VLM."""
    return "EdiVal" if settings["edival"] else "proxy" if str(settings["data"]).endswith(".csv") else "exact" if settings["judge"] == "exact" else "VLM"


def keep_manifest(settings, out):
    Path(out).mkdir(parents=True, exist_ok=True)
    (Path(out) / "manifest.tmp").write_text(json.dumps(settings, indent=1))
    os.replace(Path(out) / "manifest.tmp", Path(out) / "manifest.json")


def main(argv=None):
    args = parse(argv)
    settings, out = settle(args)
    stages = [args.stage] if args.stage else STAGES
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")

    K, csv = settings["turns"], str(settings["data"]).endswith(".csv")
    if settings["edival"]:                                   # scored elsewhere: only the report is ours
        if args.stage in ("generate", "score"):
            raise ValueError(f"--edival is for the stage report: {args.stage} has nothing to do with it")
        return report_edival(settings, out, data.read_edival(Path(settings["data"]), K, None) if csv else None)

    tasks = data.load(settings["data"], settings["split"], K, settings["resolution"], settings["tasks"], images=settings["images"])
    if not tasks:
        raise ValueError(f"--split {settings['split']} of {settings['data']} is empty")
    for task in tasks if settings["protocol"] else []:
        if task.image.size != (SIZE, SIZE):
            raise ValueError(f"dialogue {task.meta.get('index')}: its picture becomes {task.image.width} x {task.image.height}, EdiVal's protocol is for "
                             f"square ones ({SIZE} x {SIZE}, as in its input_images_resize_512.zip)")
    names, passes = names_of(tasks), plan(tasks, K, settings["probes"])
    if "score" in stages:                                    # refuse before anything is sampled
        judge = reward.load(settings["judge"], device, **settings["asked"])
        judge.check(tasks)
        features = load_features(settings["features"], device) if settings["features"] else None
    if world > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=7))
    if "generate" in stages and settings["model"]:
        generate(settings, out, passes, names, device, rank, world)
    if world > 1:
        dist.barrier()
    if "score" in stages:
        if rank == 0:
            keep_manifest(settings, out)
        score(settings, out, passes, names, judge, features, rank, world)
        if world > 1:
            dist.barrier()
        if rank == 0:
            merge_scores(out)
    if "report" in stages and rank == 0:
        arms, extras = collect(settings, out, passes, names)
        kinds = [task.kinds[:K] for task in tasks]
        result = summarise(arms, kinds)
        for arm in arms:
            result["arms"][arm] |= extras[arm]
        finish(settings, out, out, result, arms, tasks, kinds, names)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def report_edival(settings, out, tasks):
    """The same report from EdiVal's own results, into OUT/edival; with pictures where OUT holds those that were scored."""
    arms, kinds, names = collect_results(settings["edival"], tasks)
    K = arms[next(iter(arms))]["s"].shape[2]
    settings |= {"turns": K, "seeds": 1}
    at = {arm: folder_of(out, arm, 0, settings) / "multipass" for arm in arms}
    there = tasks and all(file_of(at[arm], name, k).is_file() for arm in arms for name in names for k in (None, *range(K)))
    if there:
        tasks = [task for task in tasks if task.meta["index"] in names]
        for task in tasks:
            task.image = Image.open(file_of(at[next(iter(arms))], task.meta["index"]))
    finish(settings, out, out / "edival", summarise(arms, kinds), arms, tasks if there else None, kinds, names)


def finish(settings, out, folder, result, arms, tasks, kinds, names):
    """Write everything that the report stage writes into a folder, and print the table."""
    result = settings | {"profile": profile_of(settings), "n": len(names)} | result

    def paths(arm):
        return lambda i: [file_of(folder_of(out, arm, 0, settings) / "multipass", names[i], k) for k in (None, *range(settings["turns"]))]
    write_report(folder, result, arms, tasks, kinds, names, {arm: paths(arm) for arm in arms} if tasks else {})
    print(f"{setting_line(result)}\n{table(result)}\nwritten: {folder / 'report.html'}, results.json, tables.md, tables.tex, figures/, sheets/")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        print(f"eval.py: {error}", file=sys.stderr)
        sys.exit(2)
