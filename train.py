"""MT-EditFlow: teach an image editor to survive several edits in a row, by reinforcement learning with flow matching.

    python train.py                                                        the embedded world, a laptop, GRPO
    torchrun train.py --algo nft                                           the same by DiffusionNFT
    torchrun --nproc_per_node=8 train.py --preset kontext --data tasks.jsonl --judge <VLM>
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py --preset kontext ...

Each step: roll out B tasks x G samples x K turns on the model's own outputs; judge every turn; turn scores into
advantages (advantage.py); update with GRPO (grpo.py) or NFT (nft.py). Writes config.json, metrics.jsonl, samples/*.png,
checkpoint/ and pytorch_lora_weights.safetensors into --out, and ends with a table base | tuned on validation tasks.

Left out: DDP wrapper (trainable tensors are few: one flat all-reduce a step), learning-rate decay, mixed-precision
scalers (base in bf16, LoRA in fp32).
"""
import json
import math
import os
import random
import re
import signal
import sys
import time
import warnings
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import eval as evaluation
import model
import reward
from advantage import AGGREGATE, FUSE, SPREAD, advantages, group_normalize, group_std, turn_scores
from data import flag, option, read_json
from grpo import grpo_loss, sde_step
from nft import nft_loss, noised, old_decay
from rollout import draw_noise, rollout, select, timed

WARMUP = 5                   # steps over which --lr is reached: Adam's first steps move every weight by all of it
WEIGHT_DECAY, GRAD_NORM = 1e-4, 1.                # of AdamW(.9, .999); gradients are clipped to this norm
MAX_FAILED = .5                                   # share of a step's turns that the judge may fail on
MAX_SKIPPED, MAX_UNINFORMED = 10, 20              # in a row: gradients that are not finite, steps without information
RATIO_STOP, RATIO_WARN = .5, .02                  # how far from 1 the first ratio may be, as a share of --clip
ECHO = 2                                          # seconds in which a second signal counts as the first
FAR = .01                                         # mean (v - v_old)^2 of about ten steps, above which NFT runs away


# ------------------------------------------------------------------------------------------------------------ config

@dataclass
class Config:
    algo: str = option("grpo", "objective", ["grpo", "nft"], group="the run")
    preset: str = option("shapes", "defaults for a kind of editor, on eight GPUs of 80 GB or one; flags win",
                         ["shapes", "kontext", "klein", "qwen", "kontext-1gpu", "klein-1gpu", "qwen-1gpu"])
    steps: int = option(40, "training steps (rollouts)", low=1)
    out: str = option("", "folder of the run; empty = out/ALGO")
    resume: bool = option(False, "continue the run in --out", switch=True)
    save_every: int = option(10, "steps between checkpoints and contact sheets", low=1)
    val_tasks: int = option(300, "validation tasks of the closing table; 0 = no table", low=0)
    seed: int = option(0, "of LoRA, tasks and noise of training; validation has its own", low=0, high=10 ** 9)

    model: str = option("shapes/editor", "a diffusers folder or hub id", group="the editor")
    guidance: float = option(2.5, "guidance scale in rollout, update and evaluation alike", low=0)
    offload: bool = option(False, "text encoders are on the GPU only while they work; costs seconds a turn")
    shard: bool = option(False, "spread the frozen base over the processes; each gathers it block by block")
    lora: str = option("", "LoRA to start from: a file or folder in diffusers' layout; empty = a fresh one")
    lora_rank: int = option(64, "rank of a fresh LoRA; 0 = train the whole transformer", low=0)
    lora_alpha: int = option(64, "its scale is alpha / rank: change both together", above=0)
    lora_targets: str = option("every",
                               "which Linears get one: attention, all (the family's list), every, or ends of names")

    data: str = option("shapes", "'shapes' (the embedded world), or a JSONL file of dialogues", group="the rollout")
    resolution: int = option(512, "pictures are scaled to an area of this squared, in pixels", low=16, high=4096)
    tasks: int = option(24, "B, tasks in a step, over all processes", low=1)
    group: int = option(8, "G, samples per task", low=2)
    turns: int = option(3, "K, edits in a row", low=1)
    denoise: int = option(6, "T, denoising steps per turn in training", low=1)
    eval_denoise: int = option(8, "T in evaluation", low=1)
    shared_noise: bool = option(True, "samples of a group start each turn from the same noise (GRPO)")
    bf16: bool = option(True, "a CPU that is faster in bfloat16 multiplies in it; batches round in their own way then")
    micro: int = option(0, "rows in one forward, in rollout and update alike; 0 = all rows of an update", low=0)

    judge: str = option("shapes/judge", "'exact' (embedded world), a vision-language model's folder or hub id, or "
                                        "http://host:port/v1#model", group="the judge")
    referee: str = option("", "a judge that looks on and is not trained on; empty = exact where it can, 'none' = none")
    rubric: str = option("", "JSON file of prompts for the judge, in place of reward.py's")
    reasoning: str = option("logits", "expectation over the digits, a generated digit, or thinking first",
                            list(reward.ANSWERS))
    votes: int = option(1, "answers averaged for a score, if they are generated", low=1)
    judge_workers: int = option(32, "requests of a process at a time; rows in one forward of a judge in process", low=1)

    aggregate: str = option("mean", "turn scores -> trajectory score; whole = the judge is asked once, about all turns",
                            list(AGGREGATE), group="advantages")
    spread: str = option("turn", "which advantage a turn gets: the trajectory's, its own, or that of the turns to go",
                         list(SPREAD))
    fuse: str = option("advantage", "where several rewards meet", list(FUSE))
    reward_weights: str = option("", "one number for each reward, by commas; empty = the judge's own")
    min_std: float = option(.01, "a group with less spread in a reward teaches nothing about it", low=0, high=1)

    updates: int = option(2, "optimizer steps per rollout, each on a part of the tasks", low=1, group="the update")
    lr: float = option(4e-4, "learning rate of AdamW", above=0)
    ema: float = option(.97, "decay of the averaged weights, which are evaluated and saved", low=0, high=1)
    kl: float = option(0., "weight of the KL term mean (v - v_ref)^2", low=0)
    window: int = option(2, "W: GRPO's consecutive stochastic steps in a turn; times at which NFT takes a loss", low=1)
    train_steps: str = option("0-1", "first and last denoising step that may be trained; GRPO's last is T - 2 at most")
    step_kind: str = option("cps", "GRPO: stochastic step", ["cps", "sde"])
    eta: float = option(.8, "GRPO: noise level of the stochastic steps, at most 1 for cps", above=0)
    clip: float = option(1e-3, "GRPO: clip range of the ratio (small, since log-probs are means over latents)", above=0)
    beta: float = option(1., "NFT: mixing coefficient of the implicit policies", above=0)


# flag > preset > default. Sources of the real editors' numbers: the published recipes of Flow-GRPO, DiffusionNFT and
# Edit-R1, adapted to three turns; they are ours, not MT-EditFlow's, which are not public.
REAL = dict(data="tasks.jsonl", judge="Qwen/Qwen2.5-VL-7B-Instruct", steps=300, tasks=32, group=12, eval_denoise=28,
            lora_rank=64, lora_alpha=128, lora_targets="all", spread="trajectory", window=2, lr=1e-4, ema=.9, clip=1e-4,
            min_std=.02, micro=4, val_tasks=16, save_every=5)
REAL_NFT = dict(lora_rank=32, lora_alpha=64, updates=1, shared_noise=False, kl=1e-4)
KONTEXT = REAL | dict(model="black-forest-labs/FLUX.1-Kontext-dev", denoise=8, guidance=2.5)
KLEIN = REAL | dict(model="black-forest-labs/FLUX.2-klein-base-9B", denoise=10)
QWEN = REAL | dict(model="Qwen/Qwen-Image-Edit-2509", denoise=10, lora_targets="attention", tasks=16, micro=2,
                   offload=True, judge="Qwen/Qwen2.5-VL-3B-Instruct")   # 7 B would not fit beside the text encoder
ONE_GPU = dict(tasks=4, group=8, offload=True)     # the others are for eight GPUs: one would take ten times as long
PRESETS = {
    ("shapes", "grpo"): dict(),
    ("shapes", "nft"): dict(updates=3, spread="togo", train_steps="0-3", shared_noise=False),
    ("kontext", "grpo"): KONTEXT | dict(eta=.8, train_steps="0-3"),
    ("kontext", "nft"): KONTEXT | REAL_NFT | dict(lora_targets="attention", train_steps="0-7"),
    # klein's time shift leaves early steps no signal; klein-base is reported to collapse at a clip of 1e-4
    ("klein", "grpo"): KLEIN | dict(guidance=4., eta=.7, train_steps="4-8", kl=1e-3, clip=1e-5),
    ("klein", "nft"): KLEIN | REAL_NFT | dict(guidance=1., train_steps="0-9"),
    ("qwen", "grpo"): QWEN | dict(guidance=4., eta=.8, train_steps="0-4"),
    ("qwen", "nft"): QWEN | REAL_NFT | dict(guidance=1., train_steps="0-9"),
}
PRESETS |= {(f"{name}-1gpu", algo): values | ONE_GPU for (name, algo), values in PRESETS.items() if name != "shapes"}


# ------------------------------------------------------------------------------------------------------------- the loop

def main(cfg):
    run = prepare(cfg)                                       # all that can be refused is refused in here
    with run.held:                                           # --out is this run's alone
        step, stop = learn(run, cfg)
        finish(run, cfg, step, stop)


def learn(run, cfg):
    """The steps that are left -> the last one done, and the signal that ended it early, or 0."""
    editor, judge, referee, share, device = run.editor, run.judge, run.referee, run.share, run.device
    out, mine, streaks, stop = Path(cfg.out), torch.tensor(run.share.tasks), Counter(), 0
    asked = [cfg.turns - 1] if cfg.aggregate == "whole" else range(cfg.turns)
    progress = tqdm(range(run.done + 1, cfg.steps + 1), desc=cfg.algo, initial=run.done, total=cfg.steps,
                    disable=share.rank > 0)
    with interruptible(share.rank == 0) as caught:
        for step in progress:
            start, seconds, scores, seen = time.perf_counter(), {}, [], []
            batch = choose(run.tasks_by_size, cfg.tasks, cfg.seed, step)
            tasks = [batch[b] for b in share.tasks]
            rows = [task for task in tasks for _ in range(cfg.group)]

            def on_turn(k, images):
                with timed(seconds, "judge_wait", device):
                    scores.append(judge.start(rows, images, k) if k in asked else None)
                    seen.append(referee.start(rows, images, k) if referee else None)

            # 1. Roll out: K edits on the model's own outputs; turn k is judged while turn k+1 is sampled.
            trajectory = sample(editor, tasks, cfg, step, share, on_turn)

            # 2. Judge: rewards of all processes (B, G, K, R); NaN = the judge failed.
            with timed(seconds, "judge_wait", device):
                r = gather(collect(scores, judge, cfg), share, device)
                seen = gather(collect(seen, referee, cfg), share, device) if referee else None
            check_judge(r, run, cfg, step)

            # 3. Advantages (B, G, K): every sample against the other samples of its own task.
            A, used = advantages(r, run.weights, cfg.aggregate, cfg.fuse, cfg.spread, cfg.min_std)

            # 4. Update: an optimizer step on each part of the tasks; GRPO's first is exactly on-policy.
            with timed(seconds, "update", device):
                A_rows, used_rows = A[mine].flatten(0, 1), used[mine].flatten(0, 1)
                info = update(editor, trajectory, A_rows, used_rows, run.optimizer, cfg, step, share)
            if cfg.algo == "grpo":
                editor.copy_weights("old")
            else:
                editor.blend("old", old_decay(step * cfg.updates))

            # 5. Write down what happened; stop where going on makes no sense, or somebody asked for it.
            stop = over_processes(caught[0] if caught else 0, share, device, dist.ReduceOp.MAX)
            seconds |= trajectory.seconds | {"total": time.perf_counter() - start}
            if share.rank == 0:
                log(step_metrics(step, r, seen, A, used, info, seconds, run, cfg), out, progress)
                if stop or step in (1, cfg.steps) or step % cfg.save_every == 0:
                    sheet = out / "samples" / f"{step:06d}.png"
                    draw_samples(tasks, trajectory.images, r[mine], A[mine], judge.names, sheet)
                    save(editor, run.optimizer, step, out)
            check_streaks(streaks, used, info, step, out, share)
            if stop:
                break
    return step if stop else cfg.steps, stop


# ---------------------------------------------------------------------------------------------------- one training step

def choose(tasks_by_size, B, seed, step):
    """The B tasks of step 1, 2, ..., all of one picture size; a pure function of (seed, step): resume needs no replay.

    tasks_by_size: {(height, width): tasks}. A size comes up as often as it has tasks; each has its own order, a new one
    every epoch. A size with fewer than B tasks fills the step with the beginning of its next epoch.
    """
    sizes = list(tasks_by_size)
    counts = [len(tasks_by_size[size]) for size in sizes]
    drawn = random.Random(f"{seed} sizes").choices(sizes, counts, k=step)
    size = drawn[-1]
    visit, tasks = drawn.count(size), tasks_by_size[size]
    chosen = []
    for position in range((visit - 1) * B, visit * B):
        epoch, place = divmod(position, len(tasks))
        if not chosen or place == 0:
            order = torch.randperm(len(tasks), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        chosen.append(tasks[order[place]])
    return chosen


def draw_int(low, high, *key):
    """A uniform integer in [low, high] that is a pure function of the key."""
    share = torch.special.ndtr(draw_noise(1, *key)).item()                        # uniform in [0, 1], its ends included
    return min(high, low + int(share * (high - low + 1)))


def stochastic_window(cfg, step):
    """The W steps that GRPO makes stochastic in this rollout; other objectives sample by Euler throughout."""
    if cfg.algo != "grpo":
        return range(0)
    steps = trained_steps(cfg)
    first = draw_int(steps.start, steps.stop - cfg.window, cfg.seed, step)
    return range(first, first + cfg.window)


def sample(editor, tasks, cfg, step, share, on_turn=None):
    """G trajectories of each task by the old policy -> Trajectory; a pure function of its weights and (seed, step)."""
    with editor.using("old"):
        return rollout(
            editor, tasks, cfg.group, cfg.turns, cfg.denoise, (cfg.seed, step), stochastic_window(cfg, step), cfg.eta,
            cfg.step_kind, cfg.shared_noise, share.tasks, micro=share.micro, on_turn=on_turn)


def collect(futures, judge, cfg):
    """A judge's answers on K turns -> r (tasks of this process, G, K, R), NaN where it was not asked (None)."""
    said = [None if future is None else future.result() for future in futures]
    asked = next(r for r in said if r is not None)
    r = torch.stack([torch.full_like(asked, math.nan) if r is None else r for r in said], 1)
    return r.view(-1, cfg.group, *r.shape[1:])


def gather(x, share, device):
    """Concatenate the processes' tensors (local tasks, ...), in the order of the step's tasks; on the CPU."""
    if share.world > 1:
        parts = [torch.empty_like(x, device=device) for _ in range(share.world)]
        dist.all_gather(parts, x.contiguous().to(device))
        x = torch.cat(parts).cpu()
    return x[torch.tensor(share.order).argsort()]


def replay(editor, trajectory, rows, k):
    """velocity(x, t) of some rows of turn k, conditioned as in the rollout."""
    cond = select(trajectory.cond[k], rows, editor.device)
    context = trajectory.context[rows, k].to(editor.device)
    size = tuple(trajectory.images.shape[3:])
    return lambda x, t: editor.velocity(x, t, cond, context, size)


def add_kl(loss, info, editor, velocity, v, x, t, kl):
    """L + kl mean (v - v_ref)^2, with gradient; v_ref is the velocity before training."""
    if kl == 0:
        return loss, info
    with torch.no_grad(), editor.using("ref"):
        v_ref = velocity(x, t)
    distance = (v - v_ref).square().mean((1, 2))
    return loss + kl * distance, info | {"kl": distance.detach()}


def grpo_terms(editor, trajectory, rows, k, A, keys, cfg):
    """GRPO on some rows at turn k: replay the W stochastic steps -> W times (loss (n,), info of (n,) tensors)."""
    device, times = editor.device, trajectory.t.tolist()
    velocity = replay(editor, trajectory, rows, k)
    for j, i in enumerate(trajectory.window):
        x = trajectory.x[rows, k, j].to(device)
        x_next = trajectory.x[rows, k, j + 1].to(device)
        t = torch.full((len(rows),), times[i], device=device)
        v = velocity(x, t)
        _, logp, _, _ = sde_step(v, x, times[i], times[i + 1], cfg.eta, cfg.step_kind, times[1], x_next=x_next)
        loss, info = grpo_loss(logp, trajectory.logp[rows, k, j].to(device), A, cfg.clip)
        ratio = info.pop("ratio")
        info |= {"log_ratio": ratio.log(), "ratio_deviation": (ratio - 1).abs()}
        yield add_kl(loss, info, editor, velocity, v, x, t, cfg.kl)


def nft_terms(editor, trajectory, rows, k, A, keys, cfg):
    """NFT on some rows at turn k, at W times of the rollout's grid -> W times (loss (n,), info of (n,) tensors)."""
    velocity = replay(editor, trajectory, rows, k)
    x_0 = trajectory.x[rows, k, 0].to(editor.device)
    for j in range(cfg.window):
        t, eps = forward_noise(trajectory, k, j, keys, cfg, editor.device)
        x = noised(x_0, t, eps)
        with torch.no_grad(), editor.using("old"):
            v_old = velocity(x, t)
        v = velocity(x, t)
        loss, info = nft_loss(v, v_old, x, x_0, t, A, cfg.beta)
        yield add_kl(loss, info, editor, velocity, v, x, t, cfg.kl)


def forward_noise(trajectory, k, j, keys, cfg, device):
    """The j-th time t (n,) and noise eps (n, N, C) to see samples of turn k again: pure functions of each row's key.

    Times are drawn without replacement from the --train-steps of the rollout's grid.
    """
    grid = trajectory.t[list(trained_steps(cfg))]
    order = torch.stack([draw_noise(len(grid), *key, k, 10_000).argsort() for key in keys])           # (n, len(grid))
    eps = torch.stack([draw_noise(trajectory.x.shape[3:], *key, k, 10_001 + j) for key in keys])
    return grid[order[:, j]].to(device), eps.to(device)


TERMS = {"grpo": grpo_terms, "nft": nft_terms}
LOGGED = {"grpo": ["loss", "log_ratio", "clip_fraction"], "nft": ["loss", "old_distance"]}


def micro_batches(part, used, needed, K, micro, whole):
    """(rows, turn) of one update, `micro` rows at a time as in the rollout.

    A batch in which no row is `needed` is left out. Of the others only the used rows are kept; but the batch stays
    whole if `whole` (in bfloat16 it rounds as one, and must be the rollout's), or if none is used here (another
    process's sharded forward needs this one's).
    """
    for batch in part.split(micro):
        for k in range(K):
            keep = used[batch, k]
            if needed[batch, k].any():
                yield batch if whole or not keep.any() else batch[keep], k


def needed_anywhere(used, device):
    """Samples for which any process makes a forward: all gather a sharded base together, and so make the same ones."""
    needed = used.to(device).int()
    dist.all_reduce(needed, dist.ReduceOp.MAX)
    return needed.cpu()


def update(editor, trajectory, A, used, optimizer, cfg, step, share):
    """One rollout's optimizer steps: A and used (S, K) of this process's rows -> info, means over what was trained on.

    loss = sum_{s,k used} sum_W (L + kl mean (v - v_ref)^2) / (n W), n = how many (s, k) are used in all processes.
    An update that no sample speaks for, or whose gradient or loss is not finite, is not taken.
    """
    device, params = editor.device, list(editor.trained.values())
    names = LOGGED[cfg.algo] + ["kl"] * (cfg.kl > 0)
    totals, n_total, norms, deviations, skipped = torch.zeros(len(names), device=device), 0, [], {}, 0
    # A ratio must start at 1, and in bfloat16 a batch of another size may compute another log-probability.
    has_ratio = "log_ratio" in names
    whole = has_ratio and editor.dtype != torch.float32
    needed = needed_anywhere(used, device) if cfg.shard else used
    for settings in optimizer.param_groups:
        settings["lr"] = cfg.lr * min(1, step / WARMUP)

    for u, part in enumerate(torch.arange(len(A)).split(share.rows)):
        # Nothing to learn in this part: the optimizer's momentum must not move the weights either.
        n = over_processes(used[part].sum(), share, device)
        if n == 0:
            continue

        # Gradients of this process's samples. Sums stay on the device: nothing in here waits for it.
        optimizer.zero_grad()
        sums = {name: torch.zeros((), device=device) for name in names}
        largest = torch.zeros((), device=device)
        with editor.merged():
            for rows, k in micro_batches(part, used, needed, cfg.turns, share.micro, whole):
                keys = [(cfg.seed, step, share.tasks[s // cfg.group], s % cfg.group) for s in rows.tolist()]
                counts = used[rows, k].float().to(device)
                for loss, info in TERMS[cfg.algo](editor, trajectory, rows, k, A[rows, k].to(device), keys, cfg):
                    ((loss * counts).sum() / (n * cfg.window)).backward()
                    if has_ratio:
                        largest = torch.maximum(largest, (info.pop("ratio_deviation") * counts).max())
                    for name, value in (info | {"loss": loss.detach()}).items():
                        sums[name] += (value * counts).sum()
        if has_ratio:
            deviations[f"ratio_deviation_{u + 1}"] = check_ratio(largest, not norms, cfg, share)

        # The same gradient on every process, so that all of them decide and move alike.
        sums = reduce_gradients(params, torch.stack(list(sums.values())), share)
        norm = torch.nn.utils.clip_grad_norm_(params, GRAD_NORM).item()
        if not math.isfinite(norm + sums[0].item()):
            skipped += 1
            continue
        optimizer.step()
        editor.blend("ema", cfg.ema)
        norms.append(norm)
        totals, n_total = totals + sums, n_total + n

    info = dict(zip(names, (totals / max(1, n_total * cfg.window)).tolist()))
    return info | deviations | {"grad_norm": sum(norms) / max(1, len(norms)), "taken": len(norms), "skipped": skipped}


def reduce_gradients(params, sums, share):
    """Sum the gradients over processes, and `sums` (n,) with them, in one flat all-reduce; returns the sums.

    A missing gradient (Qwen's last text stream) counts as zeros.
    """
    for p in params:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    if share.world == 1:
        return sums
    flat = torch.cat([sums, *(p.grad.flatten() for p in params)])
    dist.all_reduce(flat)
    sums, *gradients = flat.split([len(sums), *(p.numel() for p in params)])
    for p, gradient in zip(params, gradients):
        p.grad = gradient.view_as(p).clone()
    return sums


def over_processes(x, share, device, op=dist.ReduceOp.SUM):
    """The sum (or maximum) of a number over all processes, as a Python number."""
    x = torch.as_tensor(x, device=device)
    if share.world > 1:
        dist.all_reduce(x, op)
    return x.item()


def check_ratio(largest, first, cfg, share):
    """The largest |ratio - 1| of all processes. Before the first update it is 0, or rollout and update disagree."""
    deviation = over_processes(largest, share, largest.device, dist.ReduceOp.MAX)
    words = (f"ratio differs from 1 by {deviation:.1e} before the first update (--clip {cfg.clip:g}): rollout and "
             "update do not compute the same log-probability (precision, weights or conditioning differ)")
    if first and deviation > RATIO_STOP * cfg.clip:
        raise Stopped(words)
    if first and deviation > RATIO_WARN * cfg.clip and share.rank == 0:
        tqdm.write(f"warning: {words}", file=sys.stderr)
    return deviation


# -------------------------------------------------------------------------------------------- what a step leaves behind

def step_metrics(step, r, seen, A, used, info, seconds, run, cfg):
    """Rewards r (B, G, K, R), the referee's `seen` (B, G, K, ...) or None, and the rest of a step -> flat metrics.

    Every reward per turn; its spread within groups, and the share of groups where that is over --min-std: those that it
    teaches (with --fuse reward --min-std looks at the weighted sum instead). Where the referee's scores rise less than
    the judge's, the judge is being hacked.
    """
    metrics = {"step": step, "judge/failed": share_failed(r, cfg)}
    columns = [("reward", r, run.judge.names)]
    if run.referee:
        columns.append(("referee", seen, run.referee.names))
    for prefix, scores, names in columns:
        for m, name in enumerate(names):
            metrics[f"{prefix}/{name}"] = scores[..., m].nanmean().item()
            for k in range(cfg.turns):
                metrics[f"{prefix}/{name}_turn{k + 1}"] = scores[:, :, k, m].nanmean().item()

    Q = turn_scores(r, cfg.aggregate, cfg.spread)
    std, valid = group_std(Q)[1], group_normalize(Q, cfg.min_std)[1].any(1)
    for m, name in enumerate(run.judge.names):
        metrics[f"group_std/{name}"] = std[..., m].mean().item()
        metrics[f"teaches/{name}"] = valid[..., m].float().mean().item()
    metrics |= {"advantage/abs": A.abs().mean().item(), "advantage/used": used.float().mean().item()}
    metrics |= {f"update/{name}": value for name, value in info.items()}
    metrics |= {f"seconds/{name}": round(value, 3) for name, value in seconds.items()}
    # what is unknown (NaN) is null in the file, since JSON has no word for it
    return {name: value if math.isfinite(value) else None for name, value in metrics.items()}


def share_failed(r, cfg):
    """Share of the turns that the judge failed on, of those that it was asked about."""
    asked = r[:, :, -1:] if cfg.aggregate == "whole" else r
    return asked.isnan().any(-1).float().mean().item()


def log(metrics, out, progress):
    """Append a line to metrics.jsonl, and show the rewards beside the progress bar."""
    with open(out / "metrics.jsonl", "a") as file:
        file.write(json.dumps(metrics) + "\n")
        file.flush()
        os.fsync(file.fileno())                              # before the checkpoint that counts on this line
    rewards = {name.removeprefix("reward/"): value for name, value in metrics.items() if name.startswith("reward/")}
    known = {name: value for name, value in rewards.items() if value is not None and "_turn" not in name}
    progress.set_postfix({name: f"{value:.3f}" for name, value in known.items()})


def draw_samples(tasks, images, r, A, names, path, n=4):
    """Contact sheet of a step: the best and the worst sample of n tasks, with the rewards under each picture."""
    G, rows = r.shape[1], []
    success = evaluation.successes(r, names)                                             # (B, G, K), NaN = not judged
    for b in range(min(n, len(tasks))):
        ranking = A[b].mean(-1)
        for label, g in (("best", ranking.argmax().item()), ("worst", ranking.argmin().item())):
            captions, marks = [], []
            for k, instruction in enumerate(tasks[b].instructions[:r.shape[2]]):
                scores = " ".join(f"{name[:4]} {r[b, g, k, m]:.2f}" for m, name in enumerate(names))
                captions.append(f"{k + 1}. {instruction}\n{scores}")
                marks.append(None if success[b, g, k].isnan() else bool(success[b, g, k] > 0))
            rows.append((f"{label} of {G}, A {ranking[g]:+.1f}", images[b * G + g], captions, marks))
    evaluation.contact_sheet(rows, path)


class Stopped(ValueError):
    """A run that cannot go on; its last checkpoint is intact."""


def check_judge(r, run, cfg, step):
    """Stop a run whose judge has failed on too much of a step. The steps before it are saved first."""
    failed, judge = share_failed(r, cfg), run.judge
    if failed > MAX_FAILED:
        if run.share.rank == 0:
            save(run.editor, run.optimizer, step - 1, Path(cfg.out))
        raise Stopped(f"step {step}: the judge failed on {failed:.0%} of the turns, more than {MAX_FAILED:.0%}"
                      + (f"; its last words: {judge.last_failure}" if judge.last_failure else ""))


def check_streaks(streaks, used, info, step, out, share):
    """Count steps that taught nothing, and updates that were not taken, in a row; stop a run with too many of them.

    Warns of NFT that runs away (nft.py) by a moving mean of `old_distance`, since single steps may jump.
    """
    streaks["uninformed"] = 0 if used.any() else streaks["uninformed"] + 1
    streaks["skipped"] = 0 if info["taken"] else streaks["skipped"] + info["skipped"]
    before = streaks["old_distance"]
    streaks["old_distance"] = .9 * before + .1 * info.get("old_distance", 0.)
    last_good = f"the last checkpoint in {out / 'checkpoint'} is good"
    if streaks["uninformed"] == 1 and share.rank == 0:
        tqdm.write(f"step {step}: no sample carried information (each group's scores are alike): the weights stay",
                   file=sys.stderr)
    if before <= FAR < streaks["old_distance"] and share.rank == 0:
        tqdm.write(f"warning: step {step}: update/old_distance is {streaks['old_distance']:.3f}, above {FAR:g}: NFT "
                   "begins to run away on samples it was told to avoid; stop, or train with --kl .5", file=sys.stderr)
    if streaks["uninformed"] >= MAX_UNINFORMED:
        raise Stopped(f"step {step}: no sample carried information in {MAX_UNINFORMED} steps in a row: look at "
                      "samples/ and at group_std/* in metrics.jsonl (do the judge's scores vary? is --min-std above "
                      f"their spread? is there noise?); {last_good}")
    if streaks["skipped"] >= MAX_SKIPPED:
        raise Stopped(f"step {step}: the gradient was not finite in {streaks['skipped']} updates in a row: lower --lr, "
                      f"or look at the editor's weights; {last_good}")


# -------------------------------------------------------------------------------------------------- the folder of a run

def checkpoints(out):
    """The checkpoints of a run, step_NUMBER.pt, by their numbers; a file of another name is none."""
    found = {}
    for file in (out / "checkpoint").glob("step_*.pt"):
        name = re.fullmatch(r"step_(\d+)\.pt", file.name, re.ASCII)
        if name:
            found[int(name[1])] = file
    return [found[step] for step in sorted(found)]


def save(editor, optimizer, step, out):
    """Checkpoint of a step and LoRA; the last two checkpoints are kept."""
    folder = out / "checkpoint"
    model.save_weights(editor, out, "ema")               # first: a kill in between repeats steps and writes it again
    state = {"step": step, "policy": [p.data for p in editor.trained.values()], "sets": editor.sets,
             "optimizer": optimizer.state_dict()}
    model.write_whole(folder / f"step_{step:06d}.pt", lambda path: torch.save(state, path))
    for old in checkpoints(out)[:-2]:
        old.unlink()


def read_checkpoint(file, editor):
    """What `save` wrote, all of it looked at before anything is changed. ValueError if it does not fit the editor."""
    # Into main memory: the optimizer keeps its count of steps there, and a GPU would have to hold everything twice.
    state = torch.load(file, map_location="cpu", weights_only=True)
    shapes = [p.shape for p in editor.trained.values()]
    weight_sets = {name: state["sets"][name] for name in editor.sets} | {"policy": state["policy"]}
    for name, values in weight_sets.items():
        if [value.shape for value in values] != shapes:
            raise ValueError(f"its {name} weights do not fit the editor")
        model.check_finite(dict(zip(editor.trained, values)), f"its {name} set")
    return state | {"step": int(state["step"])}


def restore(editor, optimizer, out, say):
    """Load the newest checkpoint that can be read; returns the number of steps done. ValueError if there is none."""
    for file in reversed(checkpoints(out)):
        try:
            state = read_checkpoint(file, editor)
            optimizer.load_state_dict(state["optimizer"])
        except Exception as error:                           # torch raises many kinds for a file that is no checkpoint
            say(f"{file} is damaged and left out ({type(error).__name__}: {model.first_line(error)})")
            continue
        for p, value in zip(editor.trained.values(), state["policy"]):
            p.data.copy_(value)
        editor.sets = {name: [value.to(editor.device) for value in values] for name, values in state["sets"].items()}
        return state["step"]
    raise ValueError(f"--resume: no checkpoint in {out / 'checkpoint'} can be read; nothing was changed")


def check_out(cfg):
    """Refuse an --out that cannot be used, before anything is loaded; nothing is written here."""
    out, there = Path(cfg.out), (Path(cfg.out) / "config.json").exists()
    data.check_folder(out)
    if there and not cfg.resume:
        raise ValueError(f"--out {out} already holds a run: continue it with --resume, or choose another folder")
    if not there and any(file.name != "step_000000.pt" for file in checkpoints(out)):
        raise ValueError(f"--out {out} holds checkpoints and no config.json: move them away, or choose another folder")
    if cfg.resume and not there:
        raise ValueError(f"--resume: {out} holds no run")
    if cfg.resume:
        same_as_before(read_json(out / "config.json"), asdict(cfg), out)
        if not checkpoints(out):
            raise ValueError(f"--resume: {out / 'checkpoint'} holds no checkpoint; nothing was changed")


# May differ on --resume; of what is behind a path or an address, the content may not.
FREE = {"steps", "resume", "out", "save_every", "judge_workers", "shard", "offload"}
PLACES = {"model", "lora", "data", "judge"}


def same_as_before(before, now, out):
    """ValueError if a run is to be resumed with another config, or other contents behind the same names."""
    changed = [f"{name} {before.get(name)!r} -> {value!r}" for name, value in now.items()
               if name not in FREE | PLACES and before.get(name) != value]
    if changed:
        raise ValueError(f"--resume: the run in {out} was started with another config: {', '.join(changed)} "
                         "(give the command that started it, and --resume)")


def check_alike(editor, done, cfg, share, device):
    """ValueError where the processes have not read the same checkpoint: nodes that do not see the same folder."""
    bits = sum(p.detach().cpu().contiguous().view(torch.int32).sum().item() for p in editor.trained.values())
    for number in (done, bits):
        low, high = (over_processes(number, share, device, op) for op in (dist.ReduceOp.MIN, dist.ReduceOp.MAX))
        if low != high:
            raise ValueError(f"--out {cfg.out} must be one folder that all nodes see: they have read different runs")


def fingerprints(cfg, judge):
    """Digests of what is behind the names in a config: a run must not go on with other contents."""
    lora = model.fingerprint(cfg.lora) if cfg.lora else ""
    return {"content_of_model": model.fingerprint(cfg.model), "content_of_lora": lora,
            "content_of_data": data.file_fingerprint(cfg.data), "content_of_judge": judge.fingerprint}


def open_run(cfg, judge, editor, optimizer):
    """Make the folder of a new run, or load the checkpoint of a resumed one. Returns the number of steps done."""
    out, contents = Path(cfg.out), fingerprints(cfg, judge)
    if cfg.resume:
        before = read_json(out / "config.json")
        same_as_before(before, contents, out)
        done = restore(editor, optimizer, out, lambda words: print(words, file=sys.stderr, flush=True))
        keep_lines(out / "metrics.jsonl", done)
        now = {name: value for name, value in asdict(cfg).items() if name in PLACES | {"steps"}}
        model.write_text(out / "config.json", json.dumps(before | now, indent=1))
        if not (out / model.LORA_FILE).exists():
            model.save_weights(editor, out, "ema")
        return done
    save(editor, optimizer, 0, out)                          # so that a run can be resumed whenever it was killed
    model.write_text(out / "config.json", json.dumps(asdict(cfg) | contents, indent=1))
    return 0


def keep_lines(path, n):
    """Keep the first n lines of metrics.jsonl: a run killed between checkpoints repeats the steps after the last."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    model.write_whole(path, lambda new: new.write_bytes(b"".join(lines[:n])))


@contextmanager
def interruptible(loud=True):
    """Note SIGINT and SIGTERM in a list, so that the step is finished and saved; a later one ends the run at once."""
    caught, since = [], 0.

    def note(number, frame):
        nonlocal since
        data.leave_if_another_died(number)
        # A scheduler may signal every process, and torchrun passes on its own: that is one wish.
        if caught:
            if time.monotonic() - since > ECHO:
                os._exit(128 + number)
            return
        caught.append(number)
        since = time.monotonic()
        # a judge's server may take minutes to end the step; not print(), which this may have interrupted
        name = signal.Signals(number).name
        if loud:
            os.write(2, f"\n{name}: the step is finished and saved first; once more ends the run at once\n".encode())
    with data.handling(note):
        yield caught


def closing_table(run, cfg):
    """Base against tuned on the validation tasks, same noise: validation.json, a contact sheet, a table.

    By rank 0. Where the base is spread over the processes, the others make the same pictures, and judge nothing.
    """
    editor, val, first = run.editor, run.val, run.share.rank == 0
    out, arms = Path(cfg.out), {}
    judge = (run.referee or run.judge) if first else None
    if judge is run.judge and cfg.aggregate == "whole":      # turn by turn, as eval.py asks
        judge.rubrics, judge.scoring = reward.read_rubrics(cfg.rubric, "turn"), "turn"
    before = "start" if cfg.lora else "base"                 # with --lora, training did not start from the base
    editor.fast = False                                      # in float32, as eval.py
    for arm, name in ((before, "ref"), ("tuned", "ema")):
        with editor.using(name):
            arms[arm] = evaluation.evaluate(editor, judge, val, cfg.turns, cfg.eval_denoise, batch=cfg.micro or 100,
                                            probes=len(val), desc=f"validate {arm}", progress=first)
    if not first:
        return
    result = evaluation.summarise(arms, val)
    model.write_text(out / "validation.json", json.dumps(result, indent=1, allow_nan=False))
    evaluation.draw_arms(arms, val, out / "samples" / "validation.png")
    print(f"{len(val)} validation tasks, T = {cfg.eval_denoise}\n{evaluation.table(result)}")


def finish(run, cfg, step, stop):
    """The closing table and a last line; or, after a signal, how to go on."""
    if run.val and not stop:
        closing_table(run, cfg)
    if run.share.world > 1:
        dist.barrier()
        dist.destroy_process_group()
    if run.share.rank == 0:
        print(f"stopped by {signal.Signals(stop).name} after step {step}, which is saved: continue with --resume"
              if stop else f"written: {cfg.out}/ (weights, metrics.jsonl, samples/)")
    if stop:
        sys.exit(128 + stop)


# ------------------------------------------------------------------------------------------------ before the first step

class Share(NamedTuple):
    """What this process does of a step."""
    rank: int
    world: int            # processes
    tasks: list           # rows of its tasks in the step; an update has the same tasks on any number of processes
    order: list           # rows of all tasks, process by process: the order in which `gather` brings them
    rows: int             # rows s of an update
    micro: int            # rows in one forward


def divide(cfg, rank, world):
    """Share the tasks of a step out among the processes. ValueError if they cannot be."""
    if cfg.tasks % world:
        raise ValueError(f"--tasks {cfg.tasks} is not divisible by {world} processes: whole groups live on one process")
    local = cfg.tasks // world
    if local % cfg.updates:
        raise ValueError(f"--updates {cfg.updates} does not divide the {local} tasks of a process")
    rows = local * cfg.group // cfg.updates
    micro = cfg.micro or rows
    if rows % micro:
        raise ValueError(f"--micro {cfg.micro} does not divide the {rows} rows of an update ({local} tasks x "
                         f"{cfg.group} samples / {cfg.updates} updates)")
    parts = torch.arange(cfg.tasks).view(cfg.updates, world, -1).transpose(0, 1)   # (processes, updates, tasks of each)
    return Share(rank, world, parts[rank].flatten().tolist(), parts.flatten().tolist(), rows, micro)


def load_tasks(cfg, rank):
    """Training tasks by picture size, {(height, width): tasks}, and the validation tasks of the closing table."""
    tasks = data.load(cfg.data, "train", cfg.turns, cfg.resolution)
    if len(tasks) < cfg.tasks:
        raise ValueError(f"--tasks {cfg.tasks} is more than the {len(tasks)} training tasks of {cfg.data}")
    by_size = {}
    for task in tasks:
        by_size.setdefault(task.size, []).append(task)
    val = []
    if cfg.val_tasks and (rank == 0 or cfg.shard):
        val = data.load(cfg.data, "val", cfg.turns, cfg.resolution, cfg.val_tasks)
        if not val and rank == 0:
            print(f"{cfg.data} has a single task: none is left for validation", file=sys.stderr, flush=True)
    return by_size, val


def load_judges(cfg, device, tasks):
    """The judge that is trained on, and the referee that looks on, or None."""
    def load(spec, **more):
        if spec != "exact":                                  # which cannot be asked in other ways
            more |= dict(rubric=cfg.rubric, reasoning=cfg.reasoning, votes=cfg.votes, workers=cfg.judge_workers,
                         bf16=cfg.bf16)
        return reward.load(spec, device, **more)

    judge = load(cfg.judge, scoring="trajectory" if cfg.aggregate == "whole" else "turn")
    judge.check(tasks)
    name = cfg.referee
    if not name:
        name = "exact" if cfg.judge != "exact" and all("operations" in task.meta for task in tasks) else "none"
    if name == "none":
        return judge, None
    try:
        referee = load(name)
        referee.check(tasks)
    except ValueError as error:
        raise ValueError(f"--referee {name}: {error}") from None
    return judge, referee


def reward_weights(cfg, judge):
    """--reward-weights as numbers, one for each reward of the judge."""
    try:
        weights = [float(w) for w in cfg.reward_weights.split(",")] if cfg.reward_weights else judge.weights
    except ValueError:
        raise ValueError(f"--reward-weights {cfg.reward_weights!r} must be numbers separated by commas") from None
    if len(weights) != len(judge.names) or not any(weights) or not all(map(math.isfinite, weights)):
        raise ValueError(f"--reward-weights {cfg.reward_weights!r} must be {len(judge.names)} finite numbers, not all "
                         f"0: one for each of {', '.join(judge.names)}")
    return weights


def load_editor(cfg, device, sizes):
    """The editor with what is trained of it, and its optimizer."""
    editor = model.load(cfg.model, device, guidance=cfg.guidance, offload=cfg.offload, shard=cfg.shard)
    editor.fast = cfg.bf16 and model.multiplies_in_bfloat16(device)
    warnings.filterwarnings("ignore", "Mismatch dtype")      # autocast leaves a norm's few weights in float32
    for size in sizes:
        for T in (cfg.denoise, cfg.eval_denoise):
            editor.times(T, size)                            # refuses a size that is no multiple, and too few steps
    if cfg.lora:
        model.load_weights(editor, cfg.lora)
    else:
        model.add_lora(editor, cfg.lora_rank, cfg.lora_alpha, cfg.lora_targets, cfg.seed)
    if cfg.shard:
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")         # nothing writes into it
        model.shard(editor)
    return editor, torch.optim.AdamW(editor.trained.values(), cfg.lr, weight_decay=WEIGHT_DECAY)


def announce(cfg, share, editor, tasks_by_size):
    """What is going to happen, and what of it is not the default."""
    linears = sum(isinstance(module, model.LoRALinear) for module in editor.transformer.modules())
    trained = sum(p.numel() for p in editor.trained.values()) / 1e6
    others = [f"{flag(f.name)} {getattr(cfg, f.name)}" for f in fields(Config)
              if getattr(cfg, f.name) != f.default and f.name not in ("algo", "preset", "out", "resume")]
    print(f"{cfg.algo}: {cfg.tasks} tasks x {cfg.group} samples x {cfg.turns} turns x {cfg.denoise} denoising steps on "
          f"{share.world} process{'es' * (share.world > 1)} ({editor.device.type}); {cfg.updates} "
          f"update{'s' * (cfg.updates > 1)} of {share.rows} rows a process, {share.micro} in a forward")
    what = f"LoRA of {linears} Linears" if linears else "the whole transformer"
    print(f"trained: {what}, {trained:.2f} M parameters -> {cfg.out}")
    print(f"not the defaults (preset {cfg.preset}, {cfg.algo}): {' '.join(others) or 'nothing'}")
    counts = sorted(((len(tasks), size) for size, tasks in tasks_by_size.items()), reverse=True)
    sizes = ", ".join(f"{n} of {height} x {width}" for n, (height, width) in counts)
    print(f"pictures, height x width: {sizes}", flush=True)


class Run(NamedTuple):
    """What a run consists of, once everything that can be refused has been."""
    share: Share
    device: torch.device
    judge: object
    referee: object                  # or None
    weights: list                    # of the judge's rewards
    tasks_by_size: dict
    val: list                        # validation tasks, where the closing table needs them
    editor: model.Editor
    optimizer: torch.optim.Optimizer
    done: int                        # steps
    held: ExitStack                  # the claim on --out, by rank 0


def prepare(cfg):
    """Load everything that the run needs, refuse what cannot be, and open its folder: cheap refusals first."""
    check(cfg)
    rank, world, device = evaluation.start_processes("nccl" if torch.cuda.is_available() else "gloo")
    share = divide(cfg, rank, world)
    if rank == 0:
        check_out(cfg)
    tasks_by_size, val = load_tasks(cfg, rank)
    judge, referee = load_judges(cfg, device, [task for tasks in tasks_by_size.values() for task in tasks] + val)
    weights = reward_weights(cfg, judge)
    editor, optimizer = load_editor(cfg, device, tasks_by_size)

    # Rank 0 makes the folder or reads the checkpoint; then the others read the same one.
    out = Path(cfg.out)
    with ExitStack() as held:
        if rank == 0:
            announce(cfg, share, editor, tasks_by_size)
            out.mkdir(parents=True, exist_ok=True)
            data.claim(out, held)
            check_out(cfg)                                   # another run may have begun there meanwhile
            done = open_run(cfg, judge, editor, optimizer)
        if world > 1:
            dist.barrier()
        if rank > 0:
            if not checkpoints(out):
                raise ValueError(f"--out {out} must be one folder that all nodes see: process {rank} finds no run")
            done = restore(editor, optimizer, out, lambda words: None)
        if world > 1:
            check_alike(editor, done, cfg, share, device)
        return Run(share, device, judge, referee, weights, tasks_by_size, val, editor, optimizer, done, held.pop_all())


# ----------------------------------------------------------------------------------------------------- the command line

# Where a flag has an effect. Given anywhere else it is refused: whoever typed it expects something of it.
EFFECT = {
    "step_kind": ("--algo grpo", lambda cfg: cfg.algo == "grpo"),
    "eta": ("--algo grpo", lambda cfg: cfg.algo == "grpo"),
    "clip": ("--algo grpo", lambda cfg: cfg.algo == "grpo"),
    "beta": ("--algo nft", lambda cfg: cfg.algo == "nft"),
    "lora_rank": ("a fresh LoRA, without --lora", lambda cfg: not cfg.lora),
    "lora_alpha": ("a fresh LoRA, without --lora or --lora-rank 0", lambda cfg: not cfg.lora and cfg.lora_rank),
    "lora_targets": ("a fresh LoRA, without --lora or --lora-rank 0", lambda cfg: not cfg.lora and cfg.lora_rank),
    "resolution": ("--data FILE", lambda cfg: cfg.data != "shapes"),
    **dict.fromkeys(("rubric", "reasoning", "votes", "judge_workers"), (
        "a vision-language model as --judge or --referee",
        lambda cfg: cfg.judge != "exact" or cfg.referee not in ("", "none", "exact"))),
    "offload": ("a GPU", lambda cfg: not cfg.offload or torch.cuda.is_available()),
    "shard": ("several processes of torchrun, and a LoRA",
              lambda cfg: not cfg.shard or data.processes()[1] > 1 and (cfg.lora or cfg.lora_rank)),
    "aggregate": ("--spread trajectory", lambda cfg: cfg.aggregate == "mean" or cfg.spread == "trajectory"),
    "shared_noise": ("--algo grpo: with NFT all samples of a group would be equal",
                     lambda cfg: cfg.algo == "grpo" or not cfg.shared_noise),
}


def parse(argv=None):
    """Command line -> Config: flag > preset > default. ValueError for a flag that has no effect on what was chosen."""
    given = data.parse_flags(Config, __doc__, argv)
    algo = given.get("algo", Config.algo)
    preset = given.get("preset", Config.preset)
    cfg = Config(**{**PRESETS.get((preset, algo), {}), **given})
    cfg.out = cfg.out or f"out/{algo}"
    for name, (where, has_effect) in EFFECT.items():
        if name in given and not has_effect(cfg):
            raise ValueError(f"{flag(name)} {given[name]} has no effect here: it needs {where}")
    return cfg


def trained_steps(cfg):
    """--train-steps FIRST-LAST as a range."""
    first, _, last = cfg.train_steps.partition("-")
    if not (first.isdecimal() and last.isdecimal()):
        raise ValueError(f"--train-steps {cfg.train_steps!r} must be FIRST-LAST, such as {Config.train_steps}")
    return range(int(first), int(last) + 1)


def check(cfg):
    """Refuse impossible or contradictory values, naming both."""
    steps = trained_steps(cfg)
    last = cfg.denoise - 2 if cfg.algo == "grpo" else cfg.denoise - 1
    if last < 0:
        raise ValueError(f"--denoise {cfg.denoise} must be at least 2 for --algo grpo: the last step has no noise")
    if not 0 <= steps.start < steps.stop <= last + 1:
        raise ValueError(f"--train-steps {cfg.train_steps} must lie in order in 0 to {last} for --algo {cfg.algo} with "
                         f"--denoise {cfg.denoise}")
    if cfg.window > len(steps):
        raise ValueError(f"--window {cfg.window} must be at most the {len(steps)} steps of --train-steps "
                         f"{cfg.train_steps}")
    if cfg.algo == "grpo" and cfg.step_kind == "cps" and cfg.eta > 1:
        raise ValueError(f"--eta {cfg.eta} must be at most 1 for --step-kind cps")
    if cfg.aggregate == "whole" and cfg.spread != "trajectory":
        raise ValueError(f"--aggregate whole gives all turns one score: --spread {cfg.spread} must be trajectory")
    if cfg.referee and cfg.referee == cfg.judge:
        raise ValueError(f"--referee {cfg.referee} is the --judge itself, which sees nothing else")


if __name__ == "__main__":
    data.run_main(lambda: main(parse()))
