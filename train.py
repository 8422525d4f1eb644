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
import argparse
import json
import math
import os
import sys
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import eval as evaluation
import model
import reward
from advantage import AGGREGATE, advantages
from grpo import grpo_loss, sde_step
from nft import nft_loss, noised, old_decay
from rollout import by_size, draw_noise, rollout, timed


# ------------------------------------------------------------------------------------------------------------ config

def option(default, help, choices=None):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass
class Config:
    algo: str = option("grpo", "objective", ["grpo", "nft"])
    preset: str = option("shapes", "defaults for a kind of editor, on eight GPUs of 80 GB or (-1gpu) one; a flag given by hand wins",
                         ["shapes", "kontext", "klein", "qwen", "kontext-1gpu", "klein-1gpu", "qwen-1gpu"])
    model: str = option("shapes/editor", "editor: a diffusers folder or hub id")
    lora: str = option("", "LoRA to start from: a file or folder in diffusers' layout; empty = a fresh one")
    judge: str = option("shapes/judge", "vision-language model: folder, hub id, or http://host:port/v1#model; or 'exact' (embedded world); several by commas")
    rubric: str = option("", "JSON file of prompts for such a model, in place of reward.py's")
    scoring: str = option("turn", "each turn scored by itself, or the trajectory as a whole: original, last picture, all instructions",
                          list(reward.RUBRICS))
    reasoning: str = option("logits", "expectation over the digits in one forward, a digit generated directly, or thinking first", list(reward.ANSWERS))
    votes: int = option(1, "answers averaged for a score, drawn at --temperature")
    temperature: float = option(0., "of the judge's generated answers; 0 = the likeliest")
    judge_workers: int = option(32, "requests to a server that are under way at a time; rows in one forward of a judge in process")
    judge_timeout: float = option(120., "seconds after which a server's answer counts as failed")
    judge_cache: str = option("", "SQLite file of scores, for deterministic ones only; empty = none")
    data: str = option("shapes", "'shapes' (embedded world), a JSONL file of tasks, or a CSV of EdiVal's form")
    images: str = option("", "folder of the pictures of such a CSV")
    resolution: int = option(512, "pictures of a file are scaled to an area of this squared, in pixels; their aspect ratio is kept")
    steps: int = option(60, "training steps (rollouts)")
    tasks: int = option(24, "B, tasks in a step, over all processes")
    group: int = option(8, "G, samples per task, at least 2")
    turns: int = option(3, "K, edits in a row")
    denoise: int = option(6, "T, denoising steps per turn in training")
    eval_denoise: int = option(8, "T in evaluation")
    offload: bool = option(False, "text encoders are on the GPU only while they work; costs seconds a turn")
    guidance: float = option(2.5, "in rollout, update and evaluation alike: an input of the transformer where it is distilled "
                                  "(Kontext), else true CFG, whose second forward 1 saves")
    aggregate: str = option("mean", "turn scores -> trajectory score", list(AGGREGATE))
    fuse: str = option("advantage", "where several rewards meet: as advantages or as raw rewards", ["advantage", "reward"])
    spread: str = option("turn", "which advantage a turn gets: the trajectory's, its own, or that of the turns to go",
                         ["trajectory", "turn", "togo"])
    weights: str = option("", "weight of each of the judge's rewards, comma-separated; empty = the judge's own")
    min_std: float = option(.05, "a group with less spread than this in a reward teaches nothing about it, in [0, 1]")
    lora_rank: int = option(64, "rank of the LoRA; 0 = train the whole transformer")
    lora_alpha: int = option(64, "scale of the LoRA, alpha / rank")
    lora_targets: str = option("every", "which Linears get a LoRA: attention, all (the family's usual list), every (of the transformer), or ends of names, by commas")
    lr: float = option(4e-4, "learning rate of AdamW(.9, .999)")
    warmup: int = option(5, "steps over which the learning rate rises to --lr: Adam's first steps move every weight by all of it")
    weight_decay: float = option(1e-4, "weight decay of AdamW")
    grad_norm: float = option(1., "gradients are clipped to this norm")
    ema: float = option(.97, "decay of the averaged weights, per update; evaluation and the saved LoRA use them")
    updates: int = option(2, "optimizer steps per rollout, each on its own part of the tasks; the first is exactly on-policy")
    micro: int = option(0, "rows in one forward, in rollout and update alike; 0 = all rows of an update")
    step_kind: str = option("cps", "stochastic step", ["cps", "sde"])
    eta: float = option(.8, "GRPO: noise level of the stochastic steps, in (0, 1] for cps")
    window: int = option(3, "GRPO: consecutive steps that are stochastic and trained, at most T - 1")
    train_first: int = option(0, "first denoising step that may be trained: GRPO's windows and NFT's times lie in first..last")
    train_last: int = option(4, "last denoising step that may be trained; for GRPO at most T - 2, the last step is Euler")
    shared_noise: bool = option(True, "samples of a group start each turn from the same noise")
    clip: float = option(1e-3, "GRPO: clip range of the ratio (small, since log-probs are means over latents)")
    beta: float = option(1., "NFT: mixing coefficient of the implicit policies, and nothing else")
    times: int = option(2, "NFT: times per turn at which the loss is taken, drawn from the rollout's grid")
    kl: float = option(0., "weight of the KL term mean (v - v_ref)^2, and nothing else")
    max_failed: float = option(.5, "stop if the judge fails on more than this share of a step, in [0, 1]")
    val_tasks: int = option(300, "validation tasks of the closing table; 0 = no table")
    sample_every: int = option(10, "steps between contact sheets")
    save_every: int = option(10, "steps between checkpoints")
    seed: int = option(0, "every random number of the run is a function of it")
    out: str = option("", "folder of the run; empty = out/ALGO")
    resume: bool = option(False, "continue the run in --out")


# flag > preset > default. Sources of the real editors' numbers: the published recipes of Flow-GRPO, DiffusionNFT and
# Edit-R1, adapted to three turns; they are ours, not MT-EditFlow's, which are not public.
REAL = dict(data="tasks.jsonl", judge="Qwen/Qwen2.5-VL-7B-Instruct", steps=300, tasks=32, group=12, eval_denoise=28, lora_rank=64,
            lora_alpha=128, lora_targets="all", spread="trajectory", window=2, lr=1e-4, ema=.9, clip=1e-4, min_std=.02, micro=4,
            val_tasks=16, save_every=5)
REAL_NFT = dict(lora_rank=32, lora_alpha=64, updates=1, times=2, train_first=0, shared_noise=False, kl=1e-4)
KONTEXT = REAL | dict(model="black-forest-labs/FLUX.1-Kontext-dev", denoise=8, guidance=2.5)
KLEIN = REAL | dict(model="black-forest-labs/FLUX.2-klein-base-9B", denoise=10)
QWEN = REAL | dict(model="Qwen/Qwen-Image-Edit-2509", denoise=10, lora_targets="attention", tasks=16, micro=2, offload=True,
                   judge="Qwen/Qwen2.5-VL-3B-Instruct")         # beside 20 B and the visiting text encoder 7 B would not fit
ONE_GPU = dict(tasks=4, group=8, offload=True)     # the other real presets are for eight: a step of theirs takes one GPU ten times as long
PRESETS = {
    ("shapes", "grpo"): dict(),
    ("shapes", "nft"): dict(updates=3, beta=.2, train_last=3, shared_noise=False),
    ("kontext", "grpo"): KONTEXT | dict(eta=.8, train_first=0, train_last=3),
    ("kontext", "nft"): KONTEXT | REAL_NFT | dict(lora_targets="attention", train_last=7),
    ("klein", "grpo"): KLEIN | dict(guidance=4., eta=.7, train_first=4, train_last=8, kl=1e-3),   # its shift leaves early steps no signal
    ("klein", "nft"): KLEIN | REAL_NFT | dict(guidance=1., train_last=9),
    ("qwen", "grpo"): QWEN | dict(guidance=4., eta=.8, train_first=0, train_last=4),
    ("qwen", "nft"): QWEN | REAL_NFT | dict(guidance=1., train_last=9),
}
PRESETS |= {(f"{name}-1gpu", algo): values | ONE_GPU for (name, algo), values in PRESETS.items() if name != "shapes"}
FREE = {"steps", "resume", "out", "sample_every", "save_every", "judge_workers", "judge_timeout", "judge_cache"}    # may differ on --resume


def truth(word):
    """"true" or "false", from the command line."""
    if word.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{word!r} is neither true nor false")
    return word.lower() == "true"


def parse(argv=None):
    """Command line -> Config: flag > preset > default."""
    parser = evaluation.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(Config):
        name, help = "--" + f.name.replace("_", "-"), f"{f.metadata['help']} (default: {f.default})"
        if f.name == "resume":
            parser.add_argument(name, action="store_true", default=None, help=f.metadata["help"])
        elif f.type is bool:
            parser.add_argument(name, type=truth, metavar="{true,false}", help=help)
        else:
            parser.add_argument(name, type=f.type, choices=f.metadata["choices"], help=help)
    given = {k: v for k, v in vars(parser.parse_args(argv)).items() if v is not None}
    algo, preset = (given.get(name, getattr(Config, name)) for name in ("algo", "preset"))
    cfg = Config(**{**PRESETS[preset, algo], **given})
    cfg.out = cfg.out or f"out/{cfg.algo}"
    return cfg


def check(cfg, world):
    """Refuse impossible or contradictory values, naming both. Returns (tasks per process, rows per update, micro)."""
    for name, low, high in (("group", 2, None), ("tasks", 1, None), ("turns", 1, None), ("denoise", 1, None), ("steps", 1, None),
                            ("eval_denoise", 1, None), ("updates", 1, None), ("warmup", 0, None), ("micro", 0, None), ("lora_rank", 0, None),
                            ("resolution", 16, None), ("val_tasks", 0, None), ("sample_every", 1, None), ("save_every", 1, None), ("min_std", 0, 1),
                            ("max_failed", 0, 1), ("ema", 0, 1), ("kl", 0, None), ("eta", 0, None)):
        value = getattr(cfg, name)
        if value < low or (high is not None and value > high):
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least {low}" + (f" and at most {high}" if high is not None else ""))
    for name in ("lr", "clip", "beta", "grad_norm"):
        if not getattr(cfg, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(cfg, name)} must be greater than 0")
    if cfg.tasks % world:
        raise ValueError(f"--tasks {cfg.tasks} is not divisible by {world} processes: whole groups live on one process")
    local = cfg.tasks // world
    if local % cfg.updates:
        raise ValueError(f"--updates {cfg.updates} does not divide the {local} tasks of a process")
    rows = local * cfg.group // cfg.updates
    micro = cfg.micro or rows
    if rows % micro:
        raise ValueError(f"--micro {cfg.micro} does not divide the {rows} rows of an update ({local} tasks x {cfg.group} samples / {cfg.updates} updates)")
    last = cfg.denoise - 2 if cfg.algo == "grpo" else cfg.denoise - 1
    if not 0 <= cfg.train_first <= cfg.train_last <= last:
        raise ValueError(f"--train-first {cfg.train_first} and --train-last {cfg.train_last} must lie in order in 0 to {last} for "
                         f"{cfg.algo} with --denoise {cfg.denoise}")
    name, length = ("window", cfg.window) if cfg.algo == "grpo" else ("times", cfg.times)
    if not 1 <= length <= cfg.train_last - cfg.train_first + 1:
        raise ValueError(f"--{name} {length} must be from 1 to the {cfg.train_last - cfg.train_first + 1} steps from --train-first "
                         f"{cfg.train_first} to --train-last {cfg.train_last}")
    if cfg.algo == "grpo" and (cfg.eta == 0 or (cfg.step_kind == "cps" and cfg.eta > 1)):
        raise ValueError(f"--eta {cfg.eta} must be greater than 0" + (" and at most 1 for cps" if cfg.step_kind == "cps" else ""))
    if cfg.aggregate != "mean" and cfg.spread != "trajectory":
        raise ValueError(f"--aggregate {cfg.aggregate} does nothing with --spread {cfg.spread}: give --spread trajectory")
    if cfg.scoring == "trajectory" and (cfg.spread != "trajectory" or cfg.aggregate != "mean"):
        raise ValueError(f"--scoring trajectory gives all turns one score: --spread {cfg.spread} and --aggregate {cfg.aggregate} must be "
                         "trajectory and mean")
    return local, rows, micro


def reward_weights(cfg, judge):
    """--weights as numbers, one for each reward of the judge."""
    try:
        weights = [float(w) for w in cfg.weights.split(",")] if cfg.weights else judge.weights
    except ValueError:
        raise ValueError(f"--weights {cfg.weights!r} must be numbers separated by commas") from None
    if len(weights) != len(judge.names) or not any(weights) or not all(map(math.isfinite, weights)):
        raise ValueError(f"--weights {cfg.weights!r} must be {len(judge.names)} finite numbers, not all 0: one for each of {', '.join(judge.names)}")
    return weights


# ---------------------------------------------------------------------------------------------------- one training step

class Stopped(Exception):
    """A run that cannot go on; its last checkpoint is intact."""


def judge_turn(judge, tasks, images, k, wanted=True, exact=None):
    """One turn's rewards (S, M), and beside them the exact judge's; NaN if they are not `wanted`, or if the judge breaks down.

    A judge that refuses its input (ValueError) stops the run.
    """
    r = torch.full((len(tasks), len(judge.names)), float("nan"))
    try:
        r = judge(tasks, images, k) if wanted else r
    except ValueError:
        raise
    except Exception as error:
        judge.words = f"{type(error).__name__}: {error}"
        tqdm.write(f"the judge failed on turn {k + 1}: {judge.words}", file=sys.stderr)
    return torch.cat([r, exact(tasks, images, k)], 1) if exact else r


def choose(tasks, B, seed, step):
    """The B tasks of step 1, 2, ...: a new random order each epoch, as a pure function of (seed, step), so resume needs no replay."""
    rows = []
    for position in range((step - 1) * B, step * B):
        epoch, place = divmod(position, len(tasks))
        if not rows or place == 0:
            order = torch.randperm(len(tasks), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        rows.append(tasks[order[place]])
    return rows


def draw_int(low, high, *key):
    """A uniform integer in [low, high] that is a pure function of the key."""
    return low + int(torch.special.ndtr(draw_noise(1, *key)).item() * (high - low + 1)) if high > low else low


def gather(x, world):
    """Concatenate the processes' tensors, in order of rank."""
    if world == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world)]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def update(editor, trajectories, A, weight, optimizer, cfg, step, rows, micro, own, world):
    """One rollout's optimizer steps: A and weight (S, K) of this process's tasks `own` -> info of means over the step.

    `trajectories` are one for each size of the pictures, and hold all rows of A between them.

    loss = sum_s w_s (1 / K W) sum_{k,i} (L + kl mean (v - v_ref)^2) / sum_s w_s, the last sum over all processes; NFT
    takes --times random times per turn in place of the window's steps. Samples of weight 0 are left out.
    """
    K, device, params = cfg.turns, editor.device, list(editor.trained.values())
    n_inner = cfg.window if cfg.algo == "grpo" else cfg.times
    # GRPO in bfloat16: a batch of another size may compute another log-probability, so a batch is left out as a whole or not at all
    whole = cfg.algo == "grpo" and editor.transformer.dtype != torch.float32
    for settings in optimizer.param_groups:
        settings["lr"] = cfg.lr * min(1, step / max(1, cfg.warmup))
    names = ["loss", *(["log_ratio", "clip_fraction"] if cfg.algo == "grpo" else ["old_distance"]), *["kl"] * (cfg.kl > 0)]
    totals, largest, norms = dict.fromkeys(names, 0.), [0.] * cfg.updates, []
    for u, part in enumerate(torch.arange(len(A)).split(rows)):
        total = weight[part].sum() / K
        if world > 1:
            total = total.to(device)
            dist.all_reduce(total)
        optimizer.zero_grad()
        batches = [(trajectory, batch) for trajectory in trajectories
                   for batch in torch.isin(trajectory.rows, part).nonzero().flatten().split(micro) if len(batch)]
        for trajectory, micro_batch in batches:
            size = tuple(trajectory.images.shape[3:])
            for k in range(K):
                used = weight[trajectory.rows[micro_batch], k] > 0
                batch = micro_batch[used.any().expand_as(used) if whole else used]
                if not len(batch):                           # nothing in here waits for another process, so they may differ
                    continue
                places = trajectory.rows[batch]                                                   # rows of A
                keys = [(own[s // cfg.group].item(), s % cfg.group) for s in places.tolist()]     # task of the whole step, sample
                cond = trajectory.cond_rows(k, batch, device)
                context = trajectory.context[batch, k].to(device)
                a, w = A[places, k].to(device), weight[places, k].to(device)
                for j in range(n_inner):
                    if cfg.algo == "grpo":
                        i = trajectory.start + j
                        x, t = trajectory.x[batch, k, j].to(device), trajectory.t[i].to(device).expand(len(batch))
                    else:
                        x_0 = trajectory.x[batch, k, 0].to(device)
                        t, eps = zip(*(forward_noise(trajectory, x_0.shape[1:], cfg, (cfg.seed, step, *key, k), j) for key in keys))
                        t, eps = torch.stack(t).to(device), torch.stack(eps).to(device)
                        x = noised(x_0, t, eps)
                        with torch.no_grad(), editor.weights("old"):
                            v_old = editor.velocity(x, t, cond, context, size)
                    if cfg.kl:
                        with torch.no_grad(), editor.weights("ref"):
                            v_ref = editor.velocity(x, t, cond, context, size)
                    v = editor.velocity(x, t, cond, context, size)
                    if cfg.algo == "grpo":
                        _, logp, _, _ = sde_step(v, x, trajectory.t[i].item(), trajectory.t[i + 1].item(), cfg.eta, cfg.step_kind,
                                                 trajectory.t[1].item(), x_next=trajectory.x[batch, k, j + 1].to(device))
                        loss, info = grpo_loss(logp, trajectory.logp[batch, k, j].to(device), a, cfg.clip)
                        ratio = info.pop("ratio")
                        largest[u] = max(largest[u], deviation := (ratio - 1).abs().max().item())
                        if u == 0 and not deviation < 1e-5:
                            raise Stopped(f"ratio differs from 1 by {deviation:.1e} before the first update: rollout and update do not "
                                               "compute the same log-probability (precision, weights or conditioning differ)")
                        info["log_ratio"] = ratio.log()
                    else:
                        loss, info = nft_loss(v, v_old, x, x_0, t, a, cfg.beta)
                    if cfg.kl:
                        kl = (v - v_ref).square().mean((1, 2))
                        loss, info["kl"] = loss + cfg.kl * kl, kl.detach()
                    ((loss * w).sum() / (total.clamp(min=1) * K * n_inner)).backward()
                    info["loss"] = loss.detach()
                    for name in names:
                        totals[name] += (info[name] * w).sum().item() / n_inner
        reduce_gradients(params, world)
        norms.append(torch.nn.utils.clip_grad_norm_(params, cfg.grad_norm).item())
        optimizer.step()
        editor.blend("ema", cfg.ema)
    everyone = gather(torch.tensor([[weight.sum(), *totals.values(), *largest]], dtype=torch.float64, device=device), world).cpu()
    n, *sums = everyone[:, :1 + len(names)].sum(0).tolist()
    info = {name: value / max(1, n) for name, value in zip(names, sums)}              # means over what was trained on
    if cfg.algo == "grpo":
        info |= {f"ratio_deviation_{u + 1}": value for u, value in enumerate(everyone[:, 1 + len(names):].amax(0).tolist())}
    return info | {"grad_norm": sum(norms) / len(norms)}


def forward_noise(trajectory, shape, cfg, key, j):
    """NFT's time and noise of one row: t drawn without replacement from the trained part of the rollout's grid, eps (N, C)."""
    order = draw_noise(cfg.train_last - cfg.train_first + 1, *key, 10_000).argsort()
    return trajectory.t[cfg.train_first + order[j]], draw_noise(shape, *key, 10_001 + j)


def reduce_gradients(params, world):
    """Sum gradients over processes in one flat all-reduce; a missing gradient (Qwen's last text stream) counts as zeros."""
    for p in params:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    if world == 1:
        return
    flat = torch.cat([p.grad.flatten() for p in params])
    dist.all_reduce(flat)
    for p, g in zip(params, flat.split([p.numel() for p in params])):
        p.grad = g.view_as(p).clone()


# --------------------------------------------------------------------------------------------------------- bookkeeping

def reward_metrics(r, A, weight, names, exact, exact_names):
    """r (B, G, K, M) -> flat metrics: every reward per turn, spread within groups, share of judge failures and of used samples.

    exact (B, G, K, ...): what the exact judge says of the same pictures; where it rises less than r, r is being hacked.
    """
    metrics = {"judge/failed": r.isnan().any(-1).float().mean().item()}
    for m, name in enumerate(names):
        for k in range(r.shape[2]):
            metrics[f"reward/{name}_turn{k + 1}"] = r[:, :, k, m].nanmean().item()
        metrics[f"reward/{name}"] = r[..., m].nanmean().item()
        means = r[..., m].mean(2)                                       # (B, G) trajectory scores
        metrics[f"group_std/{name}"] = means.std(1, correction=0).nanmean().item()
    for m, name in enumerate(exact_names):
        metrics[f"exact/{name}"] = exact[..., m].mean().item()
        metrics |= {f"exact/{name}_turn{k + 1}": exact[:, :, k, m].mean().item() for k in range(exact.shape[2])}
    return metrics | {"advantage/abs": A.abs().mean().item(), "advantage/used": weight.mean().item()}


def save(editor, optimizer, step, out):
    """Checkpoint and LoRA; each file appears whole or not at all, so that a kill at any moment leaves a usable one."""
    folder = Path(out) / "checkpoint"
    folder.mkdir(exist_ok=True)
    model.save_weights(editor, out, "ema")                   # first: a kill in between repeats steps and writes it again
    state = {"step": step, "policy": [p.data for p in editor.trained.values()], "sets": editor.sets, "optimizer": optimizer.state_dict()}
    torch.save(state, folder / "state.tmp")
    os.replace(folder / "state.tmp", folder / "state.pt")


def restore(editor, optimizer, out):
    """Load the checkpoint of a run; returns the number of steps done, and drops metrics written after it."""
    state = torch.load(Path(out) / "checkpoint" / "state.pt", map_location=editor.device, weights_only=True)
    for p, value in zip(editor.trained.values(), state["policy"], strict=True):
        p.data.copy_(value)
    editor.sets = state["sets"]
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def open_run(cfg):
    """Make the folder of a new run, or check that a resumed one has this config. Returns the folder."""
    out = Path(cfg.out)
    file = out / "config.json"
    if not cfg.resume:
        if file.exists():
            raise ValueError(f"--out {out} already holds a run: continue it with --resume, or choose another folder")
        out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asdict(cfg), indent=1))
        return out
    if not file.exists():
        raise ValueError(f"--resume: {out} holds no run")
    before, now = json.loads(file.read_text()), asdict(cfg)
    changed = [f"{name} {before.get(name)!r} -> {now[name]!r}" for name in now if name not in FREE and before.get(name) != now[name]]
    if changed:
        raise ValueError(f"--resume: the run in {out} was started with another config: {', '.join(changed)}")
    return out


def truncate(path, step):
    """Keep the first `step` lines of metrics.jsonl: a run killed between checkpoints repeats the steps after the last one."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    path.with_suffix(".tmp").write_text("".join(lines[:step]))
    os.replace(path.with_suffix(".tmp"), path)


def draw_samples(tasks, images, r, A, names, path, n=4):
    """Contact sheet of a step: for each of n tasks its best and its worst sample, with the rewards under each picture."""
    rows = []
    for b in range(min(n, len(tasks))):
        for label, g in (("best", A[b].mean(-1).argmax().item()), ("worst", A[b].mean(-1).argmin().item())):
            captions = [f"{k + 1}. {tasks[b].instructions[k]}\n" + " ".join(f"{name[:4]} {r[b, g, k, m]:.2f}" for m, name in enumerate(names))
                        for k in range(r.shape[2])]
            good = evaluation.successes(r[b, g][None], names)[0] > 0
            rows.append((f"{label} of {r.shape[1]}, A {A[b, g].mean():+.1f}", images[b * r.shape[1] + g], captions, good))
    evaluation.contact_sheet(rows, path)


# ---------------------------------------------------------------------------------------------------------------- main

def main(cfg):
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    local, rows, micro = check(cfg, world)
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")

    judge = reward.load(cfg.judge, device, **{name: getattr(cfg, name) for name in reward.OPTIONS})
    weights = reward_weights(cfg, judge)
    tasks = data.load(cfg.data, "train", cfg.turns, cfg.resolution, images=cfg.images)
    val = data.load(cfg.data, "val", cfg.turns, cfg.resolution, cfg.val_tasks, images=cfg.images) if cfg.val_tasks and rank == 0 else []
    if len(tasks) < cfg.tasks:
        raise ValueError(f"--tasks {cfg.tasks} is more than the {len(tasks)} training tasks of {cfg.data}")
    judge.check(tasks + val)
    exact = reward.ExactJudge() if cfg.judge != "exact" and all("scenes" in task.meta for task in tasks) else None     # looks on, if it can
    exact_names = exact.names if exact else []
    sizes = Counter(task.image.size for task in tasks)
    if len(sizes) > 1 and cfg.group % micro:                 # so that rollout and update see the same micro-batches of each size
        if cfg.micro:
            raise ValueError(f"--micro {cfg.micro} does not divide --group {cfg.group}, as it must where pictures have several sizes "
                             f"({len(sizes)} sizes)")
        micro = cfg.group
    editor = model.load(cfg.model, device, torch.bfloat16 if cuda else torch.float32, cfg.guidance, cfg.offload)
    for width, height in sizes:
        editor.latent_shape((height, width))                 # refuses a size that is no multiple
    if cfg.lora:
        model.load_weights(editor, cfg.lora)
    else:
        model.add_lora(editor, cfg.lora_rank, cfg.lora_alpha, cfg.lora_targets, cfg.seed)
    optimizer = torch.optim.AdamW(editor.trained.values(), cfg.lr, weight_decay=cfg.weight_decay)
    if rank == 0:
        out = open_run(cfg)
        linears = sum(isinstance(module, model.LoRALinear) for module in editor.transformer.modules())
        n_params = sum(p.numel() for p in editor.trained.values())
        print(f"{cfg.algo}: {cfg.tasks} tasks x {cfg.group} samples x {cfg.turns} turns x {cfg.denoise} denoising steps on {world} "
              f"process{'es' * (world > 1)} ({device.type}); {cfg.updates} update{'s' * (cfg.updates > 1)} of {rows} rows a process, "
              f"{micro} in a forward; {f'LoRA of {linears} Linears' if linears else 'the whole transformer'}, "
              f"{n_params / 1e6:.2f} M parameters -> {cfg.out}", flush=True)
        print("pictures, height x width: " + ", ".join(f"{n} of {height} x {width}" for (width, height), n in sizes.most_common()), flush=True)
        if cfg.data != "shapes" and data.is_benchmark(cfg.data):
            print(f"warning: {cfg.data} is EdiVal-Bench itself; what is trained on it must not be measured by it", file=sys.stderr, flush=True)
        if cfg.val_tasks and not val:
            print(f"{cfg.data} has a single task: none is left for validation", file=sys.stderr, flush=True)
    if world > 1:
        dist.barrier()                                       # rank 0 refuses first
    out, done = Path(cfg.out), 0
    if cfg.resume and (out / "checkpoint" / "state.pt").exists():
        done = restore(editor, optimizer, out)
    if rank == 0:
        truncate(out / "metrics.jsonl", done)

    # a process's part of every update's tasks, (processes, local): so that an update sees the same tasks on any number of processes
    everyone = torch.arange(cfg.tasks).view(cfg.updates, world, -1).transpose(0, 1).reshape(world, local)
    own = everyone[rank]
    pool = ThreadPoolExecutor(1)
    # a model in process on a CPU judges between the turns: two sets of threads on the same cores slow each other down, even afterwards
    between = device.type == "cpu" and any(isinstance(one, reward.LocalJudge) for one in getattr(judge, "judges", [judge]))
    bar = tqdm(range(done + 1, cfg.steps + 1), initial=done, total=cfg.steps, desc=cfg.algo, disable=rank > 0)
    for step in bar:
        start, seconds = time.perf_counter(), {}
        batch = choose(tasks, cfg.tasks, cfg.seed, step)
        mine = [batch[b] for b in own]
        window = dict(eta=cfg.eta, kind=cfg.step_kind, window=cfg.window,
                      start=draw_int(cfg.train_first, cfg.train_last - cfg.window + 1, cfg.seed, step)) if cfg.algo == "grpo" else {}
        trajectories, futures = [], []

        def on_turn(k, images):                              # turn k is judged while turn k+1 is sampled
            question = judge, repeated, images, k, cfg.scoring == "turn" or k == cfg.turns - 1, exact
            if not between:
                futures.append(pool.submit(judge_turn, *question))
                return
            futures.append(Future())
            with timed(seconds, "judge_wait", device):
                futures[-1].set_result(judge_turn(*question))

        with editor.weights("old"):
            for places in by_size(mine):
                repeated = [mine[i] for i in places for _ in range(cfg.group)]
                trajectories.append(rollout(
                    editor, [mine[i] for i in places], cfg.group, cfg.turns, cfg.denoise, (cfg.seed, step), **window,
                    shared_noise=cfg.shared_noise, task_rows=own[places].tolist(), micro=micro, on_turn=on_turn))
                trajectories[-1].rows = (places[:, None] * cfg.group + torch.arange(cfg.group)).flatten()
        order = torch.cat([trajectory.rows for trajectory in trajectories]).argsort()
        with timed(seconds, "judge_wait", device):
            scores = [future.result() for future in futures]                               # K of each size
        r = torch.cat([torch.stack(scores[i:i + cfg.turns], 1) for i in range(0, len(scores), cfg.turns)])[order]      # (S, K, M)
        r = gather(r.view(local, cfg.group, cfg.turns, -1).to(device), world).cpu()        # (B, G, K, M), process by process
        r, seen = r[everyone.flatten().argsort()].split([len(judge.names), len(exact_names)], -1)     # in the order of the step's tasks
        if cfg.scoring == "trajectory":
            r = r[:, :, -1:].expand_as(r)                                                  # all turns get the last one's
        failed = r.isnan().any(-1).float().mean().item()
        if failed > cfg.max_failed:
            raise Stopped(f"step {step}: the judge failed on {failed:.0%} of the turns, more than --max-failed {cfg.max_failed:.0%}"
                          + (f"; its last words: {judge.words}" if judge.words else ""))

        A, weight = advantages(r, weights, cfg.aggregate, cfg.fuse, cfg.spread, cfg.min_std)    # (B, G, K), of all processes
        with timed(seconds, "update", device):
            info = update(editor, trajectories, A[own].flatten(0, 1), weight[own].flatten(0, 1), optimizer, cfg, step, rows, micro, own, world)
        if cfg.algo == "grpo":
            editor.copy_weights("old")
        else:
            editor.blend("old", old_decay(step))

        if rank == 0:
            for name in trajectories[0].seconds:
                seconds[name] = sum(trajectory.seconds[name] for trajectory in trajectories)
            seconds["total"] = time.perf_counter() - start
            metrics = {"step": step, **reward_metrics(r, A, weight, judge.names, seen, exact_names), **{f"update/{n}": v for n, v in info.items()},
                       **{f"seconds/{n}": round(v, 3) for n, v in seconds.items()}}
            with open(out / "metrics.jsonl", "a") as file:
                file.write(json.dumps(metrics) + "\n")
            last = f"{judge.names[0]}_turn{cfg.turns}"
            bar.set_postfix({judge.names[0]: f"{metrics[f'reward/{judge.names[0]}']:.3f}", last: f"{metrics[f'reward/{last}']:.3f}"})
            if step % cfg.sample_every == 0 or step in (1, cfg.steps):
                pictures = [images for trajectory in trajectories for images in trajectory.images]
                draw_samples(mine, [pictures[i] for i in order], r[own], A[own], judge.names, out / "samples" / f"{step:06d}.png")
            if step % cfg.save_every == 0 or step == cfg.steps:
                save(editor, optimizer, step, out)

    if val:
        referee = exact or judge                             # the judge that trained the model, only where there is no exact one
        arms, images = {}, {}
        for arm, name in (("base", "ref"), ("tuned", "ema")):
            with editor.weights(name):
                arms[arm], images[arm] = evaluation.evaluate(editor, referee, val, cfg.turns, cfg.eval_denoise, batch=cfg.micro or 100,
                                                                    desc=f"validate {arm}")
        result = evaluation.report(arms, referee.names, len(val))
        (out / "validation.json").write_text(json.dumps(result, indent=1))
        evaluation.draw_arms(val, images, {a: evaluation.successes(v, referee.names) for a, v in arms.items()}, out / "samples" / "validation.png")
        print(f"{len(val)} validation tasks, T = {cfg.eval_denoise}\n{evaluation.table(result)}\nwritten: {out}/ (LoRA, metrics.jsonl, samples/)")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(parse())
    except (ValueError, Stopped) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
