"""Multi-turn evaluation: how an editor's success and consistency hold up over K edits on its own outputs.

    python eval.py --run out/grpo                                  # a training run: base against tuned, test tasks
    python eval.py --model shapes/editor --lora out/grpo           # the same, by hand
    python eval.py --model shapes/editor                           # one editor alone

s_ik = did turn k of dialogue i succeed (the judge's `success`, else following >= .5)
M_k  = mean_i s_ik                     marginal success           CC_k = mean_i consistency_ik
IF_k = mean_i prod_{j<=k} s_ij         cumulative success         O_k  = sqrt(IF_k CC_k), overall
Base and tuned see the same tasks and the same noise; differences come with a paired bootstrap over tasks.
"""
import argparse
import json
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import data
import model
import reward
from rollout import by_size, rollout

METRICS = ("M", "IF", "CC", "O")


def evaluate(editor, judge, tasks, K, T, seeds=(0,), batch=100, desc="eval", show=True):
    """Sample every task once per seed and judge all turns: r (n_seeds * n, K, M) and n images (K+1, 3, H, W) of seed 0."""
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


def successes(r, names):
    """Rewards (n, K, M) -> s (n, K) in {0, 1}, NaN where the judge failed."""
    if "success" in names:
        return r[:, :, names.index("success")]
    following = r[:, :, names.index("following")]
    return torch.where(following.isnan(), following, (following >= .5).float())


def measure(s, consistency):
    """Success s and consistency (..., n, K), dialogues in the second-last dimension -> {M, IF, CC, O}: each (..., K).

    A turn that the judge failed on is left out of the means, and so is the cumulative success of what follows it.
    """
    values = {"M": s.nanmean(-2), "IF": s.cumprod(-1).nanmean(-2), "CC": consistency.nanmean(-2)}
    return values | {"O": (values["IF"] * values["CC"]).sqrt()}


def compare(base, tuned, n_tasks, samples=10_000, seed=0):
    """Paired bootstrap over tasks: base, tuned = pairs s, consistency (n_seeds * n, K) -> {metric: (K, 2)} 95 % intervals of the difference."""
    generator = torch.Generator().manual_seed(seed)
    fold = lambda v: v.view(-1, n_tasks, v.shape[-1]).transpose(0, 1).double()         # (n, seeds, K): a task's seeds stay together
    parts, differences = [tuple(map(fold, pair)) for pair in (base, tuned)], []
    for count in torch.arange(samples).split(200):
        rows = torch.randint(n_tasks, (len(count), n_tasks), generator=generator)
        low, high = (measure(*(v[rows].flatten(1, 2) for v in pair)) for pair in parts)
        differences.append(torch.stack([high[m] - low[m] for m in METRICS]))
    q = torch.quantile(torch.cat(differences, 1), torch.tensor([.025, .975], dtype=torch.float64), dim=1)   # (2, 4, K)
    return {m: q[:, i].T.tolist() for i, m in enumerate(METRICS)}


def report(arms, names, n_tasks):
    """Rewards of one or two arms {name: r (n_seeds * n, K, M)} -> dict of metrics per turn, with the interval of the difference."""
    pairs = {arm: (successes(r, names), r[:, :, names.index("consistency")]) for arm, r in arms.items()}
    out = {arm: {m: v.tolist() for m, v in measure(*pair).items()} for arm, pair in pairs.items()}
    for arm, r in arms.items():
        out[arm] |= {"judge_failed": r.isnan().any(2).float().mean().item(),
                     "rewards": {name: r[:, :, m].nanmean(0).tolist() for m, name in enumerate(names)}}
    if len(pairs) == 2:
        out["difference_95"] = compare(*pairs.values(), n_tasks)
    return out


def table(result):
    """The report as text: a row for each metric and turn."""
    arms = [arm for arm in result if "O" in result[arm] and arm != "difference_95"]
    lines = ["turn  metric  " + "".join(f"{arm:>9}" for arm in arms) + ("    difference [95 %]" if len(arms) == 2 else "")]
    for k in range(len(result[arms[0]]["O"])):
        for m in METRICS:
            values = [result[arm][m][k] for arm in arms]
            line = f"{k + 1:>4}  {m:<6}  " + "".join(f"{v:9.3f}" for v in values)
            if len(arms) == 2:
                low, high = result["difference_95"][m][k]
                line += f"    {values[1] - values[0]:+.3f} [{low:+.3f}, {high:+.3f}]" + ("  n.s." if low <= 0 <= high else "")
            lines.append(line)
    return "\n".join(lines)


def contact_sheet(rows, path, width=144):
    """Draw rows (label, images (K+1, 3, H, W) uint8, captions of the K turns, good: K bools or None) as one PNG."""
    font, K = ImageFont.load_default(11), len(rows[0][1]) - 1
    columns = width // 6                                                               # characters in a line of caption
    texts = [[textwrap.wrap(label, columns)] + [sum((textwrap.wrap(part, columns) for part in c.split("\n")), []) for c in captions]
             for label, _, captions, _ in rows]
    tall = [images.shape[2] * width // images.shape[3] for _, images, _, _ in rows]
    heights = [H + 14 + 13 * max(map(len, text)) for H, text in zip(tall, texts)]
    sheet = Image.new("RGB", ((K + 1) * (width + 10) + 10, sum(heights) + 10), "white")
    draw, y = ImageDraw.Draw(sheet), 10
    for (_, images, _, good), text, H, height in zip(rows, texts, tall, heights):
        for k in range(K + 1):
            x = 10 + k * (width + 10)
            picture = Image.fromarray(images[k].permute(1, 2, 0).numpy())
            sheet.paste(picture.resize((width, H), Image.NEAREST if picture.width < width else Image.LANCZOS), (x, y))
            if k and good is not None:
                draw.rectangle((x - 3, y - 3, x + width + 2, y + H + 2), outline="green" if good[k - 1] else "red", width=3)
            draw.multiline_text((x, y + H + 4), "\n".join(text[k]), "black", font, spacing=1)
        y += height
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def draw_arms(tasks, images, success, path, n=6):
    """Contact sheet of up to n tasks, one row for each arm: images {arm: n of (K+1, 3, H, W)}, success {arm: (n, K)}.

    Shows the first tasks in which the arms differ at the last turn, else the first tasks.
    """
    arms = list(images)
    order = range(len(tasks))
    if len(arms) == 2:
        order = sorted(order, key=lambda i: bool((success[arms[0]][i] == success[arms[1]][i]).all()))
    contact_sheet([(f"{arm}", images[arm][i], [f"{k + 1}. {text}" for k, text in enumerate(tasks[i].instructions[:len(images[arm][i]) - 1])],
                    success[arm][i] > 0) for i in list(order)[:n] for arm in arms], path)


class Parser(argparse.ArgumentParser):
    """Refuses in one line like everything else, without printing all flags."""

    def error(self, message):
        raise ValueError(message)


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder of a training run: its model, data, turns and steps, base against tuned")
    parser.add_argument("--model", help="editor: a folder or hub id; needed without --run")
    parser.add_argument("--lora", type=Path, help="LoRA file or folder to compare with the base")
    parser.add_argument("--data", help="'shapes', a JSONL file or a CSV of EdiVal's form (default: the run's, else shapes)")
    parser.add_argument("--images", help="folder of the pictures of such a CSV (default: the run's)")
    parser.add_argument("--split", choices=["train", "val", "test", "all"],
                        help="default: test of the embedded world; of the file that the run trained on val, of any other file all")
    parser.add_argument("--resolution", type=int, help="pictures are scaled to this area, squared, in pixels (default: the run's, else 512)")
    parser.add_argument("--guidance", type=float, help="guidance of both arms (default: the run's, else the family's own)")
    parser.add_argument("--offload", action="store_true", help="text encoders are on the GPU only while they work")
    parser.add_argument("--judge", help="'exact' or a VLM (default: exact for the embedded world, else the run's)")
    parser.add_argument("--tasks", type=int, default=500, help="number of tasks, at least 1")
    parser.add_argument("--turns", type=int, help="K, edits in a row (default: the run's, else 3)")
    parser.add_argument("--denoise", type=int, help="T, denoising steps per turn (default: the run's --eval-denoise, else 8)")
    parser.add_argument("--seeds", type=int, default=1, help="noise seeds per task, pooled")
    parser.add_argument("--batch", type=int, help="tasks in one forward (default: 100 of the embedded world, 4 of a file)")
    parser.add_argument("--out", type=Path, help="where results.json and the contact sheet go (default: RUN/eval, else out/eval)")
    args = parser.parse_args()

    config = {}
    if args.run:
        if args.model or args.lora:
            raise ValueError("--run already names the model and the LoRA: leave out --model and --lora")
        if not (args.run / "config.json").is_file():
            raise ValueError(f"--run {args.run} holds no config.json: it is no training run")
        config = json.loads((args.run / "config.json").read_text())
    elif not args.model:
        raise ValueError("give --run DIR or --model X")
    for name in ("tasks", "seeds", "batch", "turns", "denoise", "resolution"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value} must be at least 1")
    spec = args.data or config.get("data", "shapes")
    K, T = args.turns or config.get("turns", 3), args.denoise or config.get("eval_denoise", 8)
    split = args.split or ("test" if spec == "shapes" else "val" if spec == config.get("data") else "all")
    resolution, batch = args.resolution or config.get("resolution", 512), args.batch or (100 if spec == "shapes" else 4)
    guidance = config.get("guidance") if args.guidance is None else args.guidance
    lora, out = args.run or args.lora, args.out or (args.run / "eval" if args.run else Path("out/eval"))
    if lora:
        model.find_weights(lora)                             # refuse before the base is evaluated
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    tasks = data.load(spec, split, K, resolution, args.tasks, images=args.images or config.get("images", ""))
    if not tasks:
        raise ValueError(f"--split {split} of {spec} is empty")
    options = {}                                             # how the run asked its judge
    if not args.judge and spec != "shapes":
        options = {name: config[name] for name in reward.OPTIONS if name in config}
    judge = reward.load(args.judge or ("exact" if spec == "shapes" else config.get("judge", "exact")), device, **options)
    judge.check(tasks)
    editor = model.load(args.model or config["model"], device, dtype, guidance, args.offload or config.get("offload", False))
    arms, images = {}, {}
    for arm in ["base", "tuned"] if lora else ["base"]:
        if arm == "tuned":
            model.load_weights(editor, lora)
        arms[arm], images[arm] = evaluate(editor, judge, tasks, K, T, range(args.seeds), batch, arm)

    result = {"model": args.model or config["model"], "lora": str(lora) if lora else None, "data": spec, "split": split,
              "guidance": editor.guidance,
              "tasks": len(tasks), "seeds": args.seeds, "turns": K, "denoise": T} | report(arms, judge.names, len(tasks))
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(result, indent=1))
    draw_arms(tasks, images, {arm: successes(r, judge.names)[:len(tasks)] for arm, r in arms.items()}, out / "contact_sheet.png")
    print(f"{len(tasks)} {split} tasks x {args.seeds} seeds, T = {T}\n{table({a: result[a] for a in [*arms, 'difference_95'] if a in result})}")
    print(f"written: {out / 'results.json'}, {out / 'contact_sheet.png'}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        print(f"eval.py: {error}", file=sys.stderr)
        sys.exit(2)
