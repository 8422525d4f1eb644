"""How much of a gradient is chance: first gradients of several settings, compared between disjoint sets of tasks.

    python bench/gradients.py "--algo nft" "--algo grpo" "--algo grpo --window 1 --train-steps 1-1" --batches 8

Each setting is what train.py would be given. A batch is a step's rollout by the editor as it is before training, with
tasks and noise of its own, the same tasks in all settings; its gradient is that of one update on it. Two columns:

    own     mean cosine between gradients of two batches. With g = signal + chance it is |signal|^2 / |g|^2, the share
            that batches have in common; n batches have the mean g of n own / (1 + (n - 1) own).
    first   mean cosine with the mean gradient of the first setting (over its other batches, for the first itself).
            Linear in the signal, so that it sees one that `own` loses in its error. Name the clearest setting first.

Both with the standard error over batches (`own`: over pairs). Nothing is written.
"""
import math
import sys
from argparse import RawDescriptionHelpFormatter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # so that it runs from any folder

import torch
from tqdm import tqdm

import data
import train
from advantage import advantages


def first_gradients(cfg, batches):
    """Gradients of one update on disjoint tasks, with the weights as they are: (batches that taught something, P)."""
    cfg = replace(cfg, updates=1, referee="none")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    share = train.divide(cfg, 0, 1)
    tasks_by_size, _ = train.load_tasks(cfg, 0)
    judge, _ = train.load_judges(cfg, device, [task for tasks in tasks_by_size.values() for task in tasks])
    editor, _ = train.load_editor(cfg, device, tasks_by_size)

    # The steps of an epoch have disjoint tasks.
    found = []
    for step in tqdm(range(1, 1 + batches), desc=cfg.algo, leave=False):
        tasks = train.choose(tasks_by_size, cfg.tasks, cfg.seed, step)
        found.append(first_gradient(editor, judge, tasks, cfg, step, share))
    found = [gradient for gradient in found if gradient is not None]
    return torch.stack(found) if found else torch.empty(0, 0)


def first_gradient(editor, judge, tasks, cfg, step, share):
    """The gradient of one update on these tasks, flat, with the weights as they are; None where nothing is learned."""
    rows = [task for task in tasks for _ in range(cfg.group)]
    scores = []
    trajectory = train.sample(editor, tasks, cfg, step, share,
                              lambda k, images: scores.append(judge.start(rows, images, k)))
    r = train.collect(scores, judge, cfg)
    weights = train.reward_weights(cfg, judge)
    A, used = advantages(r, weights, cfg.aggregate, cfg.fuse, cfg.spread, cfg.min_std)

    # An optimizer that moves nothing leaves the gradient where it is.
    params = list(editor.trained.values())
    still = SimpleNamespace(param_groups=[], zero_grad=editor.transformer.zero_grad, step=lambda: None)
    info = train.update(editor, trajectory, A.flatten(0, 1), used.flatten(0, 1), still, cfg, step, share)
    if not info["taken"]:
        return None
    unclipped = max(1., info["grad_norm"] / train.GRAD_NORM)                      # update() has clipped it
    return torch.cat([p.grad.flatten() for p in params]) * unclipped


def own_cosines(gradients):
    """Cosines of all pairs of rows: (n, P) -> (n (n-1) / 2,)."""
    units = torch.nn.functional.normalize(gradients, dim=1)
    pairs = torch.triu_indices(len(units), len(units), 1)
    return (units @ units.T)[pairs[0], pairs[1]]


def cosines_with(gradients, first):
    """Cosine of each row (n, P) with the mean of the rows of `first` (m, P), a row itself left out: (n,)."""
    total = first.sum(0)
    others = total - gradients if first is gradients else total.expand_as(gradients)
    return torch.cosine_similarity(gradients, others, dim=1)


def mean_and_error(values):
    """A mean with its standard error, in words."""
    if len(values) < 2:
        return "unknown"
    return f"{values.mean():+.4f} ± {values.std() / math.sqrt(len(values)):.4f}"


def main(argv=None):
    parser = data.Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="+", metavar="FLAGS", help="what train.py would be given, in quotes")
    parser.add_argument("--batches", type=int, default=8, help="gradients of each setting")
    args = parser.parse_args(argv)
    data.check_bounds("--batches", args.batches, {"at least": 2})
    configs = [train.parse(["--val-tasks", "0", *words.split()]) for words in args.settings]
    for cfg in configs:
        train.check(cfg)

    first = None
    print("| setting | own | first | norm |\n|---|---|---|---|", flush=True)
    for words, cfg in zip(args.settings, configs):
        gradients = first_gradients(cfg, args.batches)
        first = gradients if first is None else first
        if first.shape[1:] != gradients.shape[1:]:
            raise ValueError(f"{words!r} trains {gradients.shape[1]} numbers, the first setting {first.shape[1]}")
        cells = [mean_and_error(own_cosines(gradients)), mean_and_error(cosines_with(gradients, first)),
                 f"{gradients.norm(dim=1).mean():.2e}"]
        print(f"| {words} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    data.run_main(main)
