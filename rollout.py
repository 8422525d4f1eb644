"""Roll out whole dialogues: K edits in a row, every one on the model's own output, with per-step log-probabilities.

    letter  meaning                                   letter  meaning
    B       tasks in a step                           T       denoising steps per turn
    G       samples per task (the group)              W       consecutive steps that are stochastic and trained
    S       B G rows; row s belongs to task s // G    N, C    latent tokens, channels
    K       turns                                     t       flow time, 1 = noise, 0 = image

Turn k encodes picture k, denoises, decodes, clamps and rounds to uint8; that picture is what the judge sees and what
turn k+1 is conditioned on, in training and evaluation alike. Nothing is differentiated here: the update (train.py)
replays the trained steps from the trajectory.
"""
import hashlib
import time
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from grpo import sde_step


@dataclass
class Task:
    """One editing dialogue."""
    image: Image.Image                         # before turn 1
    instructions: list[str]                    # K strings
    kinds: list[str]                           # K edit types (EdiVal's names), "" if unknown
    meta: dict = field(default_factory=dict)   # whatever a judge wants


@dataclass
class Trajectory:
    """What one rollout leaves behind; all on the CPU."""
    images: torch.Tensor              # (S, K+1, 3, H, W) uint8; [:, 0] the source
    context: torch.Tensor             # (S, K, N, C) latents each turn was conditioned on
    x: torch.Tensor                   # (S, K, W+1, N, C) latents around the trained steps; x_0 alone, (S, K, 1, N, C), if W = 0
    logp: torch.Tensor | None         # (S, K, W) under the weights that sampled
    start: int                        # index of the first trained step
    t: torch.Tensor                   # (T+1,) 1 -> 0
    cond: list                        # K pairs: {name: tensor (n, ...)}, index (S,) into them
    group: torch.Tensor               # (S,) int64 task row; nothing is ever grouped by its text
    rows: torch.Tensor                # (S,) int64 rows of the step that these are; 0 .. S-1 unless its pictures differ in size
    seconds: dict                     # where the time went: text, vae, velocity

    def cond_rows(self, k, rows, device):
        """The conditioning of some rows at turn k: {name: tensor (len(rows), ...)}."""
        return cond_rows(self.cond[k], rows, device)


def cond_rows(cond, rows, device):
    """Some rows of what editor.condition() returned: {name: tensor (len(rows), ...)}."""
    tensors, index = cond
    return {name: value[index[rows]].to(device) for name, value in tensors.items()}


def draw_noise(shape, *key):
    """Standard normal noise (shape) that is a pure function of the key, a tuple of integers, drawn on the CPU.

    The same run on 1, 2 or 8 processes, in any micro-batches, and a resumed one see the same noise.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.randn(shape, generator=torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1))


def stack_images(tasks):
    """Source pictures of tasks: (n, 3, H, W) uint8. ValueError if their sizes differ."""
    if len({task.image.size for task in tasks}) > 1:
        raise ValueError(f"pictures of one rollout must have one size, got {sorted({task.image.size for task in tasks})}")
    return torch.from_numpy(np.stack([np.array(task.image.convert("RGB")) for task in tasks])).permute(0, 3, 1, 2)


def by_size(tasks, most=None):
    """Places of tasks whose pictures have one size, in order, at most `most` together: a list of index tensors."""
    places = {}
    for place, task in enumerate(tasks):
        places.setdefault(task.image.size, []).append(place)
    return [part for all_ in places.values() for part in torch.tensor(all_).split(most or len(tasks))]


@contextmanager
def timed(seconds, name, device):
    """Add the seconds that the block takes to seconds[name]."""
    start = time.perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds[name] = seconds.get(name, 0.) + time.perf_counter() - start


@torch.no_grad()
def rollout(editor, tasks, G, K, T, seed, eta=0., kind="cps", window=0, start=0, shared_noise=False, task_rows=None,
            micro=None, on_turn=None, keep=True):
    """Sample G trajectories of K turns for each task, with the weights that the editor has now -> Trajectory.

    Steps start .. start+window-1 are stochastic (`eta`, `kind`), all others, the last one always, are Euler; window = 0 is
    plain Euler throughout. `seed` is a tuple of integers (run seed, step). `shared_noise`: the rows of a group start each
    turn from the same noise. `task_rows`: rows of these tasks in the whole step, over all processes. `micro`: rows
    in one forward. `on_turn(k, images)` is called after each turn with images (S, k+2, 3, H, W). `keep=False` leaves
    latents out of the trajectory (evaluation). ValueError if the window does not fit before the last step.
    """
    if window and not 0 <= start <= T - 1 - window:
        raise ValueError(f"window of {window} steps from step {start} must end before the last of {T} steps, which is Euler")
    if min(len(task.instructions) for task in tasks) < K:
        raise ValueError(f"a task has {min(len(task.instructions) for task in tasks)} instructions, fewer than K = {K} turns")
    device, S = editor.device, len(tasks) * G
    images = stack_images(tasks).repeat_interleave(G, 0)[:, None]                     # (S, 1, 3, H, W)
    size = tuple(images.shape[3:])
    N, C = editor.latent_shape(size)
    t = editor.times(T, size)
    seconds, conds, contexts, kept, logps = {}, [], [], [], []

    for k in range(K):
        with timed(seconds, "text", device):
            cond = editor.condition([task.instructions[k] for task in tasks for _ in range(G)], images[:, k])
        conds.append(cond)
        parts = []
        for rows in torch.arange(S).split(micro or S):
            row_keys = [(task_rows[s // G] if task_rows else s // G, s % G) for s in rows.tolist()]
            with timed(seconds, "vae", device):
                context = editor.encode(images[rows, k])
            rows_cond = cond_rows(cond, rows, device)
            x = torch.stack([draw_noise((N, C), *seed, b, 0 if shared_noise else g, k, 0) for b, g in row_keys]).to(device)
            xs, logp = [], []
            with timed(seconds, "velocity", device):
                for i in range(T):
                    v = editor.velocity(x, t[i].to(device).expand(len(x)), rows_cond, context, size)
                    if start <= i < start + window:
                        noise = torch.stack([draw_noise((N, C), *seed, b, g, k, i + 1) for b, g in row_keys]).to(device)
                        xs.append(x.cpu())
                        x, lp, _, _ = sde_step(v, x, t[i].item(), t[i + 1].item(), eta, kind, t[1].item(), noise)
                        logp.append(lp.cpu())
                    else:
                        if window and i == start + window:
                            xs.append(x.cpu())
                        x = x + (t[i + 1] - t[i]) * v                                 # Euler
            with timed(seconds, "vae", device):
                after = editor.decode(x, size).cpu()
            parts.append((after, context.cpu(), torch.stack(xs or [x.cpu()], 1), torch.stack(logp, 1) if logp else None))
        after, context, x, logp = zip(*parts)
        images = torch.cat([images, torch.cat(after)[:, None]], 1)
        if keep:
            contexts.append(torch.cat(context)), kept.append(torch.cat(x))
            logps.append(torch.cat(logp) if window else None)
        if on_turn:
            on_turn(k, images)

    return Trajectory(images=images, context=torch.stack(contexts, 1) if keep else None, x=torch.stack(kept, 1) if keep else None,
                      logp=torch.stack(logps, 1) if keep and window else None, start=start, t=t, cond=conds,
                      group=torch.arange(S) // G, rows=torch.arange(S), seconds=seconds)
