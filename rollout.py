"""Roll out whole dialogues: K edits in a row, every one on the model's own output, with per-step log-probabilities.

    letter  meaning                                   letter  meaning
    B       tasks in a step                           T       denoising steps per turn
    G       samples per task (the group)              W       consecutive steps that are stochastic and trained
    S       B G rows; row s belongs to task s // G    N, C    latent tokens, channels
    K       turns                                     t       flow time, 1 = noise, 0 = image

Turn k encodes picture k, denoises, decodes, clamps and rounds to uint8. That picture is what the judge sees and what
turn k+1 is conditioned on, in training and evaluation alike. All samples of a group go on to turn K, also after a turn
that failed. Nothing is differentiated here: the update (train.py) replays the trained steps from the trajectory.
"""
import hashlib
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from grpo import sde_step


@dataclass
class Task:
    """One editing dialogue. A picture given as a function is read whenever it is needed, and not kept."""
    image: Image.Image | Callable[[], Image.Image]     # before turn 1
    instructions: list[str]                            # K strings
    kinds: list[str]                                   # K edit types (EdiVal's names), "" if unknown
    meta: dict = field(default_factory=dict)           # whatever a judge wants
    size: tuple[int, int] | None = None                # (height, width); needed where the picture is a function

    def __post_init__(self):
        if self.size is None:
            self.size = self.image.height, self.image.width

    def picture(self):
        """The picture before turn 1, RGB."""
        image = self.image() if callable(self.image) else self.image
        return image.convert("RGB")


class Turn(NamedTuple):
    """What one edit of n rows leaves behind, on the CPU."""
    after: torch.Tensor           # (n, 3, H, W) uint8
    context: torch.Tensor         # (n, N, C) latents of the picture before
    x: torch.Tensor               # (n, W+1, N, C) latents around the stochastic steps; only x_0, (n, 1, N, C), if W = 0
    logp: torch.Tensor | None     # (n, W) under the weights that sampled


@dataclass
class Trajectory:
    """What a rollout leaves behind, on the CPU."""
    images: torch.Tensor          # (S, K+1, 3, H, W) uint8; [:, 0] the source
    context: torch.Tensor         # (S, K, N, C)
    x: torch.Tensor               # (S, K, W+1, N, C), or (S, K, 1, N, C) if W = 0
    logp: torch.Tensor | None     # (S, K, W)
    window: range                 # the W steps that are trained
    t: torch.Tensor               # (T+1,) 1 -> 0
    cond: list                    # of K turns, from editor.condition(): ({name: tensor (n, ...)}, index (S,) into them)
    seconds: dict                 # where the time went: text, vae, velocity


def draw_noise(shape, *key):
    """Standard normal noise (shape) that is a pure function of the key, a tuple of integers, drawn on the CPU.

    The same run on 1, 2 or 8 processes, in any micro-batches, and a resumed one see the same noise.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    seed = int.from_bytes(digest, "little") >> 1
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stack_images(tasks):
    """Source pictures of tasks: (n, 3, H, W) uint8. ValueError if their sizes differ."""
    sizes = {task.size for task in tasks}
    if len(sizes) > 1:
        raise ValueError(f"pictures of one rollout must have one size, got {sorted(sizes)}")
    pictures = np.stack([np.array(task.picture()) for task in tasks])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2)


def select(cond, rows, device):
    """Some rows of what editor.condition() returned: {name: tensor (len(rows), ...)}."""
    tensors, index = cond
    return {name: value[index[rows]].to(device) for name, value in tensors.items()}


@contextmanager
def timed(seconds, name, device):
    """Add the seconds that the block takes to seconds[name]."""
    start = time.perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds[name] = seconds.get(name, 0.) + time.perf_counter() - start


def encode_once(editor, pictures):
    """editor.encode() of pictures (n, 3, H, W) -> (n, N, C); equal neighbours (a group's source) are encoded once."""
    differs = (pictures[1:] != pictures[:-1]).flatten(1).any(1)
    place = torch.cat([torch.zeros(1, dtype=torch.long), differs.cumsum(0)])      # which distinct picture a row shows
    first = torch.cat([torch.ones(1, dtype=torch.bool), differs])                 # is a row the first one to show it
    return editor.encode(pictures[first])[place]


@torch.no_grad()
def edit(editor, before, cond, x, t, window=range(0), eta=0., kind="cps", step_noise=None, seconds=None):
    """One turn of n rows: encode the pictures before, denoise in T steps, decode -> Turn.

    before (n, 3, H, W) uint8; cond from `select`; x (n, N, C) the noise to start from; t (T+1,) from editor.times().
    The steps in `window` are stochastic (`eta`, `kind`; step_noise(i) gives their noise (n, N, C)), all others Euler.
    `seconds` collects where the time goes. ValueError if the latents are not finite.
    """
    device, size = editor.device, tuple(before.shape[2:])
    seconds = {} if seconds is None else seconds
    times = t.tolist()

    # What is edited: the latents of the picture before, fixed over the whole turn.
    with timed(seconds, "vae", device):
        context = encode_once(editor, before)

    # From noise to image. The latents around the stochastic steps are kept: the update replays those steps.
    x, t, kept, logps = x.to(device), t.to(device), [], []
    with editor.merged(), timed(seconds, "velocity", device):
        for i in range(len(times) - 1):
            v = editor.velocity(x, t[i].expand(len(x)), cond, context, size)
            if i in window:
                kept = kept or [x]
                noise = step_noise(i).to(device)
                x, logp, _, _ = sde_step(v, x, times[i], times[i + 1], eta, kind, times[1], noise)
                kept.append(x)
                logps.append(logp)
            else:
                x = x + (t[i + 1] - t[i]) * v                                     # Euler
    if not x.isfinite().all():
        raise ValueError("the editor's latents are not finite: look at the weights of --model and --lora, "
                         "at --guidance, and in training at --lr")

    # The picture as a judge sees it and the next turn gets it: clamped and rounded to uint8.
    with timed(seconds, "vae", device):
        after = editor.decode(x, size).cpu()
    return Turn(after=after, context=context.cpu(), x=torch.stack(kept or [x], 1).cpu(),
                logp=torch.stack(logps, 1).cpu() if logps else None)


@torch.no_grad()
def rollout(editor, tasks, G, K, T, seed, window=range(0), eta=0., kind="cps", shared_noise=False, task_rows=None,
            first_turn=0, micro=None, keep=True, on_turn=None):
    """Sample G trajectories of K turns for each task, with the weights that the editor has now -> Trajectory.

    The steps in `window` are stochastic (`eta`, `kind`), all others, the last one always, are Euler. All noise is a
    pure function of `seed`, a tuple of integers (run seed, step), and of a sample's place. `shared_noise`: the rows of
    a group start each turn from the same noise. `task_rows`: rows of these tasks in the whole step, over all processes.
    `first_turn`: which turn of the dialogue the first instruction is; only the noise depends on it. `micro`: rows in
    one forward. `keep=False` leaves latents out (evaluation). `on_turn(k, images)` is called after each turn with the
    pictures so far, (S, k+2, 3, H, W). ValueError if the window does not fit before the last step, a task has fewer
    than K instructions, or the pictures' sizes differ.
    """
    if window and not 0 <= window.start <= T - 1 - len(window):
        raise ValueError(f"window of {len(window)} steps from step {window.start} must end before the last of {T} "
                         "steps, which is Euler")
    shortest = min(len(task.instructions) for task in tasks)
    if shortest < K:
        raise ValueError(f"a task has {shortest} instructions, fewer than K = {K} turns")

    # Row s = b G + g is sample g of task b.
    S = len(tasks) * G
    task_rows = list(range(len(tasks))) if task_rows is None else task_rows
    images = stack_images(tasks).repeat_interleave(G, 0)[:, None]                 # (S, 1, 3, H, W)
    size = tuple(images.shape[3:])
    shape = editor.latent_shape(size)                                             # (N, C)
    t = editor.times(T, size)

    def noise(rows, k, place):
        """Noise of some rows at turn k: place 0 = what the turn starts from, i + 1 = denoising step i."""
        shared = shared_noise and place == 0
        keys = [(task_rows[s // G], 0 if shared else s % G) for s in rows.tolist()]
        return torch.stack([draw_noise(shape, *seed, b, g, first_turn + k, place) for b, g in keys])

    seconds, conds, turns = {}, [], []
    for k in range(K):
        # What is asked for: the k-th instruction (Qwen's text encoder also looks at the picture).
        instructions = [task.instructions[k] for task in tasks for _ in range(G)]
        with timed(seconds, "text", editor.device):
            conds.append(editor.condition(instructions, images[:, k]))

        # Edit picture k, some rows at a time.
        parts = []
        for rows in torch.arange(S).split(micro or S):
            cond = select(conds[k], rows, editor.device)
            start = noise(rows, k, 0)
            step_noise = lambda i, rows=rows: noise(rows, k, i + 1)
            parts.append(edit(editor, images[rows, k], cond, start, t, window, eta, kind, step_noise, seconds))

        # The result is picture k+1, which the next turn edits.
        after, context, x, logp = zip(*parts)
        images = torch.cat([images, torch.cat(after)[:, None]], 1)
        if keep:
            turns.append((torch.cat(context), torch.cat(x), torch.cat(logp) if window else None))
        if on_turn:
            on_turn(k, images)

    context, x, logp = zip(*turns) if keep else (None, None, None)
    return Trajectory(images=images, context=torch.stack(context, 1) if keep else None,
                      x=torch.stack(x, 1) if keep else None, logp=torch.stack(logp, 1) if keep and window else None,
                      window=window, t=t, cond=conds, seconds=seconds)
