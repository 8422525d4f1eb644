"""train.py: gradients by longhand, exact resume, processes that agree, every impossible wish refused in one line."""
import dataclasses
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path
from unittest import mock

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import model
import reward
import train
from fixtures import (ROOT, Judge, child_environment, editor_folder, held_by_another, make_tasks, move, new_editor,
                      record_disk, refused, run_script, tiny_editor)
from grpo import grpo_loss, sde_step
from nft import nft_loss, noised
from rollout import rollout, select

ALGOS = pytest.mark.parametrize("algo", ["grpo", "nft"])
B, G, K, T, SIZE = 4, 2, 2, 3, (48, 48)


def flags(out, algo="grpo", **changes):
    """A small run as command-line words; changes by field name, None leaves a flag out."""
    options = dict(algo=algo, model=editor_folder(), judge="exact", out=out, tasks=B, group=G, turns=K, denoise=T, eval_denoise=2,
                   steps=2, lora_rank=4, lora_alpha=8, lr=1e-3, ema=.9, min_std=0, updates=2, window=1, val_tasks=0,
                   save_every=3) | changes
    last = options["denoise"] - (2 if algo == "grpo" else 1)
    options = dict(train_steps=f"0-{last}") | options
    words = []
    for name, value in options.items():
        if value is not None:
            words += ["--" + name.replace("_", "-")] + [str(value)] * (value is not True)
    return words


def config(out="unused", algo="grpo", **changes):
    return train.parse(flags(out, algo, **changes))


@pytest.fixture
def judge(monkeypatch):
    """A cheap judge in place of the exact one, and 64 tasks to choose from; set judge.edit to spoil its rewards."""
    judge, plain = Judge(), train.data.load
    monkeypatch.setattr(reward, "load", lambda *_, **__: judge)
    monkeypatch.setattr(train.data, "load", lambda *args, **more: plain(*args[:4], limit=64))
    return judge


def metrics(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def without_seconds(rows):
    return [{n: v for n, v in row.items() if not n.startswith("seconds/")} for row in rows]


def state(out):
    """The newest checkpoint of a run."""
    return torch.load(max(Path(out).glob("checkpoint/step_*.pt")), weights_only=True)


def flatten(tree):
    """All leaves of nested dicts and lists, in order."""
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else None
    return [tree] if children is None else [leaf for child in children for leaf in flatten(child)]


def assert_same_run(a, b):
    """Bit for bit: checkpoint, LoRA file, metrics but for the seconds."""
    x, y = flatten(state(a)), flatten(state(b))
    assert len(x) == len(y) > 20
    assert all(torch.equal(u, v) if isinstance(u, torch.Tensor) else u == v for u, v in zip(x, y))
    assert (Path(a) / model.LORA_FILE).read_bytes() == (Path(b) / model.LORA_FILE).read_bytes()
    assert without_seconds(metrics(a)) == without_seconds(metrics(b))


def norms(tensors):
    """To compare tensors whatever their names and order."""
    return sorted(v.norm().item() for v in tensors)


def digest(folder):
    """Names and contents of all files under a folder."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(Path(folder).rglob("*")) if f.is_file()}


# ----------------------------------------------------------------------------------------- one update, against longhand

class Recorder:
    """An optimizer that notes the gradients and moves nothing."""

    def __init__(self, editor):
        self.params, self.gradients, self.param_groups = list(editor.trained.values()), [], []

    def zero_grad(self):
        for p in self.params:
            p.grad = None

    def step(self):
        self.gradients.append(torch.cat([p.grad.flatten().clone() for p in self.params]))


def sampled(cfg, policy_is_old=True):
    """An editor whose policy, old and ref differ (old = policy where the ratio must be 1), and a trajectory."""
    editor = new_editor(4, 8, moved=.05)
    editor.copy_weights("old")
    if not policy_is_old:
        move(editor, .02, seed=1)
    return editor, sample(editor, cfg)


def sample(editor, cfg, n=B, micro=None):
    window = range(1, 1 + cfg.window) if cfg.algo == "grpo" else range(0)
    with editor.using("old"):
        return rollout(editor, make_tasks(n), G, K, cfg.denoise, (cfg.seed, 1), window, cfg.eta, cfg.step_kind,
                       cfg.shared_noise, micro=micro)


def alone(n, rows=None, micro=None):
    """The share of a single process: n rows in all, `rows` in an update."""
    tasks = list(range(n // G))
    return train.Share(0, 1, tasks, tasks, rows or n, micro or rows or n)


def step_of(editor, cfg, trajectory, A, used, optimizer, step=1, rows=None, micro=None):
    """train.update() of a single process."""
    return train.update(editor, trajectory, A, used, optimizer, cfg, step, alone(len(A), rows, micro))


def gradients(editor, cfg, trajectory, A, used, rows=None, micro=None):
    """The gradients of one rollout's updates, not clipped, and what update() says of them."""
    recorder = Recorder(editor)
    with mock.patch.object(train, "GRAD_NORM", 1e9):
        info = step_of(editor, cfg, trajectory, A, used, recorder, rows=rows, micro=micro)
    return recorder.gradients, info


def forward_noise(trajectory, cfg, s, k, j):
    """NFT's time and noise of row s at step 1."""
    t, eps = train.forward_noise(trajectory, k, j, [(cfg.seed, 1, s // G, s % G)], cfg, "cpu")
    return t[0], eps[0]


def advantage_rows(n=B, seed=0):
    """Advantages that differ between rows and turns, the last group not used."""
    A = torch.randn(n * G, K, generator=torch.Generator().manual_seed(seed))
    used = torch.ones(n * G, K, dtype=torch.bool)
    used[-G:] = False
    return A * used, used


def longhand(editor, cfg, a, A, used, rows):
    """The gradient of the formula in update()'s docstring, written out in one expression per term."""
    numerator = 0.
    for k in range(K):
        cond, context = select(a.cond[k], rows, "cpu"), a.context[rows, k]
        for j in range(cfg.window):
            if cfg.algo == "grpo":
                x, t = a.x[rows, k, j], a.t[a.window[j]].expand(len(rows))
            else:
                draws = [forward_noise(a, cfg, s, k, j) for s in rows.tolist()]
                t, eps = (torch.stack(parts) for parts in zip(*draws))
                x = noised(a.x[rows, k, 0], t, eps)
            arguments = (x, t, cond, context, SIZE)
            with torch.no_grad(), editor.using("ref"):
                v_ref = editor.velocity(*arguments)
            with torch.no_grad(), editor.using("old"):
                v_old = editor.velocity(*arguments)
            v = editor.velocity(*arguments)
            if cfg.algo == "grpo":
                i = a.window[j]
                _, logp, _, _ = sde_step(v, x, a.t[i].item(), a.t[i + 1].item(), cfg.eta, cfg.step_kind, a.t[1].item(),
                                         x_next=a.x[rows, k, j + 1])
                loss = grpo_loss(logp, a.logp[rows, k, j], A[rows, k], cfg.clip)[0]
            else:
                loss = nft_loss(v, v_old, x, a.x[rows, k, 0], t, A[rows, k], cfg.beta)[0]
            loss = loss + cfg.kl * (v - v_ref).square().mean((1, 2))
            numerator = numerator + (loss * used[rows, k]).sum() / cfg.window
    loss = numerator / used[rows].sum()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(editor.trained.values()))])


def assert_close(a, b, tolerance=1e-5):
    assert (a - b).norm() <= tolerance * b.norm() and b.norm() > 0, ((a - b).norm(), b.norm())


CASES = [("grpo", dict(window=1)), ("grpo", dict(denoise=4, window=2, kl=.3)),
         ("grpo", dict(step_kind="sde", window=1, shared_noise="false")),
         ("nft", dict(kl=0)), ("nft", dict(window=2, beta=.5, kl=.3))]


@pytest.mark.parametrize("algo, changes", CASES, ids=str)
def test_the_gradient_of_an_update_is_that_of_the_formula(algo, changes):
    """Catches: a missing 1 / K or 1 / W, a wrong turn, window step, set or denominator; KL without gradient."""
    cfg = config(algo=algo, **changes)
    editor, a = sampled(cfg, policy_is_old=algo == "grpo")
    A, used = advantage_rows()
    parts = torch.arange(len(A)).split(len(A) // 2)
    used[0, 0] = False                                                   # spread=turn weighs turns of a row differently
    got, _ = gradients(editor, cfg, a, A, used, rows=len(A) // 2)
    assert len(got) == 2
    for part, gradient in zip(parts, got):
        assert_close(gradient, longhand(editor, cfg, a, A, used, part))


@ALGOS
def test_the_gradient_does_not_depend_on_the_micro_batches(algo):
    """Catches: each micro-batch divided by its own size, gradients zeroed in between, noise keyed by its rows."""
    cfg = config(algo=algo, kl=.1)
    editor, a = sampled(cfg)
    A, used = advantage_rows()
    (whole,), info = gradients(editor, cfg, a, A, used)
    for micro in (1, 2, 4):
        (gradient,), parts = gradients(editor, cfg, a, A, used, micro=micro)
        assert_close(gradient, whole)
        assert parts["loss"] == pytest.approx(info["loss"], rel=1e-4, abs=1e-6)


@ALGOS
def test_rows_that_are_not_used_do_not_move_the_gradient(algo):
    """Catches: failed or uninformative groups that count in the denominator, or whose garbage leaks into the mean."""
    cfg = config(algo=algo, kl=.1)
    editor, a = sampled(cfg)
    fewer = sample(editor, cfg, n=B - 1)
    A, used = advantage_rows()
    (clean,), _ = gradients(editor, cfg, fewer, A[:-G], used[:-G])
    A[-G:] = 5.
    (garbage,), _ = gradients(editor, cfg, a, A, used)
    assert_close(garbage, clean, 1e-4)


@ALGOS
def test_an_update_that_nothing_speaks_for_is_not_taken(algo):
    """Catches: AdamW's momentum and decay that move the weights by .67 lr in an update without a single sample."""
    cfg = config(algo=algo)
    editor, a = sampled(cfg)
    A, used = advantage_rows()
    optimizer = torch.optim.AdamW(editor.trained.values(), 1e-3)
    step_of(editor, cfg, a, A, used, optimizer)                                           # there is momentum now
    before = [[v.clone() for v in values] for values in (editor.trained.values(), editor.sets["ema"])]
    info = step_of(editor, cfg, a, A, torch.zeros_like(used), optimizer)
    assert info["taken"] == info["grad_norm"] == 0
    for old, new in zip(before, (editor.trained.values(), editor.sets["ema"])):
        assert all(torch.equal(v, w) for v, w in zip(old, new))


@ALGOS
def test_a_gradient_that_is_not_finite_is_not_taken(algo):
    """Catches: one NaN that makes all weights, the averages and the only checkpoint NaN."""
    cfg = config(algo=algo)
    editor, a = sampled(cfg)
    A, used = advantage_rows()
    before = [[v.clone() for v in values] for values in (editor.trained.values(), editor.sets["ema"])]
    for bad in (float("nan"), float("inf")):
        spoilt = dataclasses.replace(a, context=a.context.clone())
        spoilt.context[0, 0, 3, 5] = bad
        optimizer = torch.optim.AdamW(editor.trained.values(), 1e-3)
        info = step_of(editor, cfg, spoilt, A, used, optimizer)
        assert (info["taken"], info["skipped"]) == (0, 1) and not optimizer.state
        for old, new in zip(before, (editor.trained.values(), editor.sets["ema"])):
            assert all(torch.equal(v, w) for v, w in zip(old, new))
    info = step_of(editor, cfg, a, A, used, optimizer)                                    # and the next one goes on
    assert (info["taken"], info["skipped"]) == (1, 0) and info["grad_norm"] > 0


@ALGOS
def test_the_kl_term_has_a_gradient_and_ref_gets_none(algo):
    """Catches: KL under no_grad (a number in the log and nothing else), or a ref that moves with the policy."""
    cfg = config(algo=algo, kl=1.)
    editor, a = sampled(cfg)
    A, used = torch.zeros(B * G, K), torch.ones(B * G, K, dtype=torch.bool)
    if algo == "nft":                # at A = 0 its loss still pulls v to x_0's: compare with and without the term
        without = config(algo=algo, kl=0.)
        (rest,), _ = gradients(editor, without, a, A, used)
    else:
        rest = 0.
    ref = [v.clone() for v in editor.sets["ref"]]
    (gradient,), info = gradients(editor, cfg, a, A, used)
    assert (gradient - rest).norm() > 1e-3 and info["kl"] > 1e-5
    optimizer = torch.optim.AdamW(editor.trained.values(), 1e-3)
    step_of(editor, cfg, a, A, used, optimizer)
    assert all(torch.equal(v, w) and v.grad is None for v, w in zip(editor.sets["ref"], ref))
    editor.copy_weights("ref")                                                # at policy = ref it vanishes
    (gradient,), info = gradients(editor, config(algo=algo, kl=1.), sample_of_policy(editor, cfg), A, used)
    assert info["kl"] == 0


def sample_of_policy(editor, cfg):
    editor.copy_weights("old")
    return sample(editor, cfg)


@pytest.mark.parametrize("micro", [1, 2, 4, None])
@pytest.mark.parametrize("kind", ["cps", "sde"])
def test_the_ratio_is_exactly_1_before_the_first_update(micro, kind):
    """Catches: log-probs of unrounded latents, other conditioning or precision in the update than in the rollout."""
    cfg = config(step_kind=kind)
    editor = new_editor(4, 8, moved=.05)
    editor.copy_weights("old")
    a = sample(editor, cfg, n=2, micro=micro)
    A, used = advantage_rows(2)
    _, info = gradients(editor, cfg, a, A, torch.ones_like(used), micro=micro)
    assert info["ratio_deviation_1"] == 0 and info["log_ratio"] == 0 and info["clip_fraction"] == 0
    used[0, 1] = False                                                          # other batches than the rollout's: up to rounding
    _, info = gradients(editor, cfg, a, A, used, micro=micro)
    assert info["ratio_deviation_1"] < 1e-6 and abs(info["log_ratio"]) < 1e-6 and info["clip_fraction"] == 0


@pytest.mark.parametrize("algo, dtype", [("grpo", torch.float32), ("grpo", torch.bfloat16), ("nft", torch.float32), ("nft", torch.bfloat16)])
def test_rows_that_are_not_used_are_not_computed(algo, dtype, monkeypatch):
    """Catches: half of the update spent on groups that teach nothing; GRPO's batches in bfloat16 of another size than the rollout's."""
    cfg = config(algo=algo, window=1)
    editor = new_editor(4, 8, moved=.05, dtype=dtype)
    editor.copy_weights("old")
    a = sample(editor, cfg, n=3, micro=2)
    A, used = advantage_rows(3)
    used[0, 1] = False
    seen, velocity = [], editor.velocity
    monkeypatch.setattr(editor, "velocity", lambda x, *rest: seen.append((len(x), torch.is_grad_enabled())) or velocity(x, *rest))
    _, info = gradients(editor, cfg, a, A, used, micro=2)
    with_gradient = sorted(n for n, grad in seen if grad)
    counts = sorted(int(n) for batch in used.split(2) for n in batch.sum(0) if n)
    assert counts == [1, 2, 2, 2]                                               # nothing of the last group's two turns
    assert with_gradient == ([2] * 4 if (algo, dtype) == ("grpo", torch.bfloat16) else counts)
    assert info.get("ratio_deviation_1", 0) <= (0 if dtype == torch.bfloat16 else 1e-6)


def test_a_ratio_that_is_not_1_before_the_first_update_stops_the_run():
    """Catches: training on in silence when rollout and update disagree."""
    cfg = config()
    editor, a = sampled(cfg)
    a.logp[3, 1, 0] += 1e-3
    with pytest.raises(Exception, match="ratio differs from 1 by 1.0e-03 before the first update"):
        gradients(editor, cfg, a, *advantage_rows())


@ALGOS
def test_every_update_moves_the_policy_and_a_tenth_of_the_average(algo):
    """Catches: ema blended once per rollout, with the decay the wrong way round, or before the step."""
    cfg = config(algo=algo)
    editor, a = sampled(cfg)
    now = lambda: [p.detach().clone() for p in editor.trained.values()]
    expected, policies = [v.clone() for v in editor.sets["ema"]], [now()]

    class Noted(torch.optim.AdamW):
        def step(self):
            super().step()
            policies.append(now())
    (A, used), optimizer, half = advantage_rows(), Noted(editor.trained.values(), 1e-3), B * G // 2
    step_of(editor, cfg, a, A, torch.ones_like(used), optimizer, step=9, rows=half)
    assert len(policies) == 3
    for before, after in zip(policies, policies[1:]):
        assert any((p - q).abs().max() > 1e-4 for p, q in zip(before, after))
        expected = [.9 * v + .1 * p for v, p in zip(expected, after)]
    assert all(torch.allclose(v, w, atol=1e-6) for v, w in zip(editor.sets["ema"], expected))


def test_the_learning_rate_rises_to_its_value_and_stays():
    """Catches: a rate of 0 at the first step, one that rises on beyond --lr, or starts anew on resume."""
    cfg = config(lr=.01)
    editor, a = sampled(cfg)
    recorder, rates = Recorder(editor), []
    recorder.param_groups = [{}]
    for step in (1, 2, 5, 9):
        step_of(editor, cfg, a, *advantage_rows(), recorder, step)
        rates.append(recorder.param_groups[0]["lr"])
    assert rates == pytest.approx([.002, .004, .01, .01])


def test_times_of_nft_come_from_the_rollouts_grid_without_replacement():
    """Catches: t = 0 (where x_t = x_0 teaches nothing), one time drawn twice for a turn, --train-steps ignored."""
    cfg = config(algo="nft", denoise=4, window=4)
    _, a = sampled(cfg)
    draws = {(s, k): [forward_noise(a, cfg, s, k, j) for j in range(4)] for s in range(B * G) for k in range(K)}
    assert all(sorted(t.item() for t, _ in row) == sorted(a.t[:-1].tolist()) for row in draws.values())
    assert len({tuple(t.item() for t, _ in row) for row in draws.values()}) > 5
    eps = torch.stack([e.flatten() for row in draws.values() for _, e in row])
    assert (torch.corrcoef(eps) - torch.eye(len(eps))).abs().max() < .25
    cfg.train_steps = "1-2"
    assert {forward_noise(a, cfg, s, 0, 0)[0].item() for s in range(B * G)} == set(a.t[1:3].tolist())


# ----------------------------------------------------------------------------------------------------- order and chance

def test_every_epoch_is_a_permutation_and_a_step_needs_no_history():
    """Catches: tasks drawn with replacement, one order for every epoch, an order that depends on the steps before."""
    tasks = list(range(10))
    choose = lambda seed, step: train.choose({(48, 48): tasks}, 4, seed, step)
    rows = sum((choose(3, step) for step in range(1, 6)), [])               # 20 = two epochs, step 3 across the seam
    assert sorted(rows[:10]) == sorted(rows[10:]) == tasks and rows[:10] != rows[10:] and rows[:10] != tasks
    assert choose(3, 3) == rows[8:12]
    assert choose(4, 1) != rows[:4] or choose(4, 2) != rows[4:8]


def test_a_step_has_pictures_of_one_size_and_every_task_its_share():
    """Catches: sizes mixed in a step, a small size that is never drawn or drawn too often, tasks lost at an epoch's end."""
    tasks_by_size = {(48, 48): list("abcdefghi"), (32, 64): list("xyz")}
    steps = [train.choose(tasks_by_size, 4, 0, step) for step in range(1, 601)]
    assert steps == [train.choose(tasks_by_size, 4, 0, step) for step in range(1, 601)]
    assert all(set(step) <= set("xyz") or not set(step) & set("xyz") for step in steps)
    counts = Counter(sum(steps, []))
    assert set(counts) == set("abcdefghixyz")
    assert all(abs(count - 200) < 45 for count in counts.values()), counts          # 600 * 4 / 12, sizes are drawn
    small = sum((step for step in steps if step[0] in "xyz"), [])
    assert all(sorted(small[i:i + 3]) == list("xyz") for i in range(0, len(small) - 2, 3))


def test_the_window_starts_everywhere_in_its_range():
    """Catches: a last start that is never drawn, or drawn twice as often."""
    draws = [train.draw_int(1, 3, 0, step) for step in range(300)]
    assert draws == [train.draw_int(1, 3, 0, step) for step in range(300)]
    assert set(draws) == {1, 2, 3} and min(map(draws.count, (1, 2, 3))) > 70           # 100 +- 8
    assert {train.draw_int(2, 2, 0, step) for step in range(20)} == {2}


def test_the_largest_noise_stays_in_the_range(monkeypatch):
    """Catches: a share of exactly 1, which rounding gives for noise above 5.4: a window one step too late."""
    monkeypatch.setattr(train, "draw_noise", lambda *_: torch.tensor([9.]))
    assert train.draw_int(1, 3) == 3
    monkeypatch.setattr(train, "draw_noise", lambda *_: torch.tensor([-9.]))
    assert train.draw_int(1, 3) == 1


@ALGOS
def test_samples_come_from_the_old_weights(algo, tmp_path, monkeypatch, judge):
    """Catches: NFT rolled out by the policy, or `old` renewed at the wrong time or by the wrong share."""
    seen, plain, load = [], train.rollout, model.load
    monkeypatch.setattr(model, "load", lambda *a, **k: seen.append(load(*a, **k)) or seen[0])
    monkeypatch.setattr(train, "old_decay", lambda n: .75 if n in (2, 4) else 1 / 0)      # optimizer steps, not rollouts

    def checked(editor, *args, **options):
        assert all(torch.equal(p, v) for p, v in zip(editor.trained.values(), editor.sets["old"]))
        seen.append([v.clone() for v in editor.sets["old"]])
        return plain(editor, *args, **options)
    monkeypatch.setattr(train, "rollout", checked)
    train.main(config(tmp_path, algo, steps=2))
    editor, first, second = seen
    after = [p.detach() for p in editor.trained.values()]
    if algo == "grpo":
        assert all(torch.equal(v, p) for v, p in zip(editor.sets["old"], after))
    else:
        expected = [.75 * v + .25 * p for v, p in zip(second, after)]
        assert all(torch.allclose(v, w, atol=1e-6) for v, w in zip(editor.sets["old"], expected))
    assert all(torch.equal(v, w) for v, w in zip(first, editor.sets["ref"]))
    assert any((v - w).abs().max() > 0 for v, w in zip(first, second))


# --------------------------------------------------------------------------------------------------------------- resume

@ALGOS
def test_six_steps_are_three_and_three_resumed_bit_for_bit(algo, tmp_path, judge):
    """Catches: policy, old, ema, optimizer, step, noise or the order of tasks forgotten in a checkpoint."""
    train.main(config(tmp_path / "a", algo, steps=6))
    train.main(config(tmp_path / "b", algo, steps=3))
    assert state(tmp_path / "b")["step"] == 3 and len(metrics(tmp_path / "b")) == 3
    train.main(config(tmp_path / "b", algo, steps=6, resume=True))
    assert_same_run(tmp_path / "a", tmp_path / "b")

    rows, saved = metrics(tmp_path / "a"), state(tmp_path / "a")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6] and all(row["update/grad_norm"] > 0 for row in rows)
    lora = load_file(tmp_path / "a" / model.LORA_FILE)                    # the averaged weights, B times alpha / r
    A, B_ = (saved["sets"]["ema"][first::2] for first in (0, 1))
    assert norms(v for n, v in lora.items() if "lora_A" in n) == pytest.approx(norms(A))
    assert norms(v for n, v in lora.items() if "lora_B" in n) == pytest.approx(norms(2 * v for v in B_))
    assert any((p - v).abs().max() > 1e-5 for p, v in zip(saved["policy"], saved["sets"]["ema"]))
    # the sets are four different things, so none can stand in for another in the comparison above
    assert any((p - v).abs().max() > 1e-5 for p, v in zip(saved["sets"]["ref"], saved["sets"]["ema"]))


KILLS = """
import io, os, signal, sys
sys.path[:0] = {paths}
import torch
torch.set_num_threads(1)
import model, reward, train
from diffusers import FluxKontextPipeline          # imports most of what loading an editor imports
from fixtures import Judge
reward.load = lambda *_, **__: Judge()
load, train.data.load = train.data.load, lambda *args, **more: load(*args[:4], limit=64)
die = lambda: os.kill(os.getpid(), signal.SIGKILL)

def nth(module, name, n, act):              # the n-th call of module.name does something else
    plain, calls = getattr(module, name), []
    def patched(*args, **options):
        calls.append(1)
        return act(plain, *args) if len(calls) == n else plain(*args, **options)
    setattr(module, name, patched)

def half(plain, value, path):               # a kill in the middle of writing
    whole = io.BytesIO()
    plain(value, whole)
    with open(path, "wb") as file:
        file.write(whole.getvalue()[:len(whole.getvalue()) // 2])
    die()

moments = dict(
    none=lambda: None,
    while_the_folder_is_made=lambda: nth(model, "write_whole", 3, lambda *_: die()),
    before_the_second_checkpoint=lambda: nth(train, "rollout", 2, lambda *_: die()),
    between_checkpoints=lambda: nth(train, "rollout", 4, lambda *_: die()),
    while_the_checkpoint_is_written=lambda: nth(torch, "save", 3, half),
    between_checkpoint_and_lora=lambda: nth(model, "save_weights", 3, lambda *_: die()))

def run(argv, moment):                      # in a child of its own: imports are paid once
    if not (pid := os.fork()):
        moments[moment]()
        train.main(train.parse(argv))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

for moment in moments:
    argv = {flags}
    argv[argv.index("--out") + 1] += "/" + moment
    code = run(argv, moment)
    assert code == (0 if moment == "none" else -signal.SIGKILL), (moment, code)
    if code:
        again = [] if moment == "while_the_folder_is_made" else ["--resume"]
        assert run(argv + again, "none") == 0, moment
"""


def run_python(*words, limit=900):
    """python WORDS in a process of its own, on one thread of the CPU, `limit` seconds at most."""
    words, env = [sys.executable, *map(str, words)], child_environment()
    return subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=limit)


def test_a_kill_at_any_moment_leaves_a_run_that_resumes_to_the_same_end(tmp_path):
    """Catches: a checkpoint overwritten in place, metrics lines counted twice, a run that cannot start again."""
    script = KILLS.format(paths=[str(ROOT), str(ROOT / "tests")], flags=flags(tmp_path, steps=4, save_every=2))
    done = run_python("-c", script)
    assert done.returncode == 0, done.stderr[-3000:]
    moments = sorted(f.name for f in tmp_path.iterdir())
    assert len(moments) == 6
    for moment in moments:
        assert_same_run(tmp_path / "none", tmp_path / moment)
        assert not list((tmp_path / moment).rglob("*.tmp"))


# ----------------------------------------------------------------------------------------- the real program, end to end

# 4 rows in a forward with one process and with two, so that both compute the same batches; two updates, GRPO's default
# groups without spread would turn rounding error into advantages, and one process would not be two
END_TO_END = dict(bf16=False, steps=2, group=4, micro=4, val_tasks=4, save_every=2, min_std=1e-3)


@pytest.fixture(scope="module")
def end_to_end(tmp_path_factory):
    """Both algorithms with one process and with two, default judge: {(algo, processes): (folder, finished process)}."""
    def launch(algo, processes):
        out = tmp_path_factory.mktemp(f"{algo}{processes}") / "run"
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        return out, run_python(*torchrun * (processes > 1), "train.py", *flags(out, algo, **END_TO_END))
    return {(algo, processes): launch(algo, processes) for algo in ("grpo", "nft") for processes in (1, 2)}


@pytest.mark.parametrize("processes", [1, 2])
@ALGOS
def test_training_end_to_end(end_to_end, algo, processes):
    """Catches: anything that breaks the one command of the README; files that are promised and missing."""
    out, done = end_to_end[algo, processes]
    assert done.returncode == 0, done.stderr[-3000:]
    geometry = f"{algo}: 4 tasks x 4 samples x 2 turns x 3 denoising steps on {processes} process"
    assert done.stdout.splitlines()[0].startswith(geometry)
    files = {"config.json", "metrics.jsonl", "checkpoint/step_000001.pt", "checkpoint/step_000002.pt", "validation.json",
             model.LORA_FILE}
    assert set(digest(out)) == files | {f"samples/{name}.png" for name in ("000001", "000002", "validation")}
    written = json.loads((out / "config.json").read_text())
    contents = {name: written.pop(name) for name in list(written) if name.startswith("content_of_")}
    assert written == vars(config(out, algo, **END_TO_END))
    assert all(contents[f"content_of_{name}"] for name in ("model", "data", "judge")) and contents["content_of_lora"] == ""
    for number, row in enumerate(metrics(out), 1):
        assert row["step"] == number and row["judge/failed"] == 0 and row["update/grad_norm"] > 0
        assert 0 <= row["reward/success_turn2"] <= 1 and 0 < row["reward/consistency"] <= 1
        assert {f"seconds/{part}" for part in ("text", "vae", "velocity", "judge_wait", "update", "total")} <= set(row)
        if algo == "grpo":
            assert row["update/ratio_deviation_1"] == 0 < row["update/ratio_deviation_2"]
    for sheet in (out / "samples").iterdir():
        assert Image.open(sheet).size[0] == 3 * 153 + 10                # source and two turns
    table = done.stdout[done.stdout.index("4 validation tasks"):]
    assert len(re.findall(r"^ +[12]  (M|IF|CC|O) .*\[.*\]", table, re.M)) == 8 and "base" in table and "tuned" in table
    result = json.loads((out / "validation.json").read_text())
    base, tuned = result["arms"]["base"], result["arms"]["tuned"]
    assert len(base["O"]) == len(tuned["O"]) == K and base != tuned


def test_the_closing_table_asks_turn_by_turn_where_training_asked_about_the_whole(tmp_path, monkeypatch):
    """Catches: success of all turns so far taken for that of a turn, and cumulated once more."""
    asked, prompt = [], reward.VLMJudge.prompt

    def note(*given):
        asked.append(prompt(*given))
        return asked[-1]
    monkeypatch.setattr(reward.VLMJudge, "prompt", note)
    train.main(config(tmp_path, judge="shapes/judge", referee="none", aggregate="whole", spread="trajectory", steps=1,
                      val_tasks=2))
    whole = [text.startswith("Picture 1 was edited into picture 2, in steps.") for _, text in asked[1:]]
    trained_on = 2 * B * G
    assert all(whole[:trained_on]) and not any(whole[trained_on:]) and len(whole) >= trained_on + 2 * 2 * 2 * K


def test_too_few_steps_of_evaluation_are_refused_before_training(tmp_path, monkeypatch):
    """Catches: hours of training that end in a refusal: schedulers with a last time above 0 need two steps."""
    monkeypatch.setattr(model, "load", lambda *_, **__: tiny_editor("qwen"))
    cfg = config(tmp_path, eval_denoise=1)
    with pytest.raises(ValueError, match="^1 denoising steps are too few for the scheduler"):
        train.load_editor(cfg, torch.device("cpu"), [(48, 48)])
    train.load_editor(config(tmp_path, eval_denoise=2), torch.device("cpu"), [(48, 48)])


def test_a_referee_beside_the_exact_judge_is_asked_in_the_way_that_was_named():
    """Catches: --reasoning refused, since the judge itself does not reason."""
    cfg = config(judge="exact", referee="shapes/judge", reasoning="direct", judge_workers=3)
    judge, referee = train.load_judges(cfg, torch.device("cpu"), make_tasks(1))
    assert isinstance(judge, reward.ExactJudge) and (referee.reasoning, referee.workers) == ("direct", 3)


def test_the_default_judge_is_the_shipped_one_and_the_exact_one_looks_on(tmp_path):
    """Catches: a default run that the exact judge decides; a VLM that is trained on with nothing to compare it with."""
    code, out, err = run_script("train.py", *flags(tmp_path / "run", judge=None, steps=1, val_tasks=4))
    assert code == 0, err[-3000:]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["judge"] == "shapes/judge"
    (row,) = metrics(tmp_path / "run")
    names = {name.split("_turn")[0] for name in row if name.startswith(("reward/", "referee/"))}
    of_referee = {f"referee/{name}" for name in ("following", "consistency", "success", "possible")}
    assert names == {"reward/following", "reward/consistency"} | of_referee
    assert row["judge/failed"] == 0 and abs(row["reward/following"] - row["referee/following"]) < .2
    assert "success" in json.loads((tmp_path / "run" / "validation.json").read_text())["arms"]["base"]["rewards"]


@ALGOS
def test_two_processes_are_one(end_to_end, algo):
    """Catches: noise keyed within a process, rewards gathered out of order, gradients averaged twice or not summed, and
    updates that split the step's tasks in another way."""
    assert_same_within_rounding(end_to_end[algo, 1][0], end_to_end[algo, 2][0], algo)


def assert_same_within_rounding(one, two, algo):
    """The metrics and the weights of two runs."""
    seen = 0
    for a, b in zip(metrics(one), metrics(two), strict=True):
        names = [n for n in a if n.startswith(("reward/", "group_std/", "teaches/", "judge/", "advantage/", "update/"))]
        pairs = {n: (a[n], b[n]) for n in names if "ratio" not in n}          # log-ratios are mostly rounding error
        assert len(pairs) > 15 and all(x == pytest.approx(y, rel=1e-3, abs=1e-4) for x, y in pairs.values()), pairs
        # the largest of all processes, not one's own; missing where the second update had nothing to train on
        deviation = "update/ratio_deviation_2"
        assert (deviation in a) == (deviation in b)
        assert a.get(deviation, 0) == pytest.approx(b.get(deviation, 0), rel=.05)
        seen += deviation in a
    assert seen or algo == "nft"
    a, b = state(one), state(two)
    moved = torch.cat([(p - r).abs().flatten() for p, r in zip(a["policy"], a["sets"]["ref"])])
    assert moved.max() > 1e-3
    for x, y in zip([a["policy"], *a["sets"].values()], [b["policy"], *b["sets"].values()], strict=True):
        difference = torch.cat([(u - v).abs().flatten() for u, v in zip(x, y, strict=True)])
        # Adam divides by the size of the gradient: where that is almost 0, float error alone moves a weight
        assert (difference > 1e-5).float().mean() < 2e-3 and difference.mean() < 1e-3 * moved.mean(), difference.mean()


def test_training_in_bfloat16_starts_at_a_ratio_of_1_and_is_evaluated_in_float32(tmp_path, judge, monkeypatch):
    """Catches: a replay that rounds otherwise than the rollout; a closing table that no eval.py could repeat; a --bf16
    that changes nothing."""
    monkeypatch.setattr(model, "multiplies_in_bfloat16", lambda device: True)
    seen, plain = [], train.evaluation.evaluate
    monkeypatch.setattr(train.evaluation, "evaluate", lambda editor, *rest, **more: [
        seen.append(editor.fast), plain(editor, *rest, **more)][1])
    rows = {}
    for bf16 in ("true", "false"):
        train.main(config(tmp_path / bf16, steps=2, val_tasks=2, bf16=bf16))
        rows[bf16] = without_seconds(metrics(tmp_path / bf16))
    assert rows["true"][1]["update/ratio_deviation_1"] < 1e-6 and seen == [False] * 4
    assert rows["true"] != rows["false"]


def test_velocities_in_bfloat16_are_nearly_those_of_float32_merged_or_not():
    """Catches: autocast around nothing or around W + s B A, which NFT's old policy would see and its new one not."""
    editor = new_editor(rank=4, moved=.05)
    x, context, t = torch.randn(4, 9, 64), torch.randn(4, 9, 64), torch.full((4,), .7)
    cond = select(editor.condition(["Make the red star blue"] * 4, None), torch.arange(4), editor.device)
    velocity = lambda: editor.velocity(x, t, cond, context, SIZE)
    with torch.no_grad():
        exact = velocity()
        editor.fast = True
        close = velocity()
        with editor.merged():
            assert torch.equal(velocity(), close)
    assert 0 < (close - exact).norm() < .02 * exact.norm()


# ----------------------------------------------------------------------------------------------------- judges that fail

def test_judge_failures_are_counted_and_aligned_and_the_run_goes_on(tmp_path, judge, monkeypatch):
    """Catches: a failure taken as reward 0, a row that shifts all rows after it, NaN in the weights."""
    given, plain = [], train.update

    def noted(editor, trajectory, A, used, *rest):
        given.append((A.view(B, 4, K), used.view(B, 4, K)))
        return plain(editor, trajectory, A, used, *rest)
    monkeypatch.setattr(train, "update", noted)
    train.main(config(tmp_path / "clean", group=4, steps=1, spread="trajectory"))

    turns = {}

    def edit(r, tasks, k):
        if k == 1:
            r[4 + 2] = float("nan")                                       # task 1, sample 2, turn 2
        turns[k] = r.clone()
        return r
    judge.edit = edit
    train.main(config(tmp_path / "spoilt", group=4, steps=2, spread="trajectory"))
    rows = metrics(tmp_path / "spoilt")
    assert [row["judge/failed"] for row in rows] == [pytest.approx(1 / (B * 4 * K))] * 2
    for k, name in ((0, "following_turn1"), (1, "following_turn2")):
        assert rows[-1][f"reward/{name}"] == pytest.approx(turns[k][:, 0].nanmean().item())
    (A_0, _), (A, used) = given[:2]
    assert used[1, 2].tolist() == [0, 0] and A[1, 2].tolist() == [0, 0] and used.sum() == (B * 4 - 1) * K
    other = torch.tensor([0, 2, 3])                            # their groups saw no failure; the batch's scale did
    assert torch.allclose(A[other] / A[other].norm(), A_0[other] / A_0[other].norm(), atol=1e-5)
    assert all(p.isfinite().all() for p in flatten(state(tmp_path / "spoilt")) if isinstance(p, torch.Tensor))


def test_a_judge_that_raises_counts_as_failed_and_the_run_goes_on(tmp_path, judge):
    """Catches: hours of training lost to one timeout of a judge."""
    def edit(r, tasks, k):
        if len(judge.calls) == 2 * K:                                     # the last turn of step 2
            raise TimeoutError("no answer")
        return r
    judge.edit = edit
    train.main(config(tmp_path, steps=3))
    assert [row["judge/failed"] for row in metrics(tmp_path)] == [0, .5, 0]


def test_too_many_failures_stop_the_run_and_leave_the_checkpoint(tmp_path, judge):
    """Catches: training on noise for hours after the judge has died, or a checkpoint or the steps before lost with it."""
    train.main(config(tmp_path / "a", steps=3))
    judge.calls.clear()
    judge.edit = lambda r, tasks, k: r.fill_(float("nan")) if len(judge.calls) > 2 * K else r
    code, out, err = run_script("train.py", *flags(tmp_path / "b", steps=3, save_every=10))
    assert code == 2 and "Traceback" not in err
    assert err.splitlines()[-1] == "train.py: step 3: the judge failed on 100% of the turns, more than 50%"
    assert state(tmp_path / "b")["step"] == 2 and len(metrics(tmp_path / "b")) == 2
    judge.edit = None
    train.main(config(tmp_path / "b", steps=3, save_every=2, resume=True))
    assert_same_run(tmp_path / "a", tmp_path / "b")


# ------------------------------------------------------------------------------------- runs that cannot go on, or must stop

def constant(r, tasks, k):
    return torch.full_like(r, .5)


def test_steps_that_teach_nothing_say_so_and_stop_the_run_in_the_end(tmp_path, judge, monkeypatch, capsys):
    """Catches: hours of training on a judge that gives everything the same score, ended with exit code 0 and no word."""
    monkeypatch.setattr(train, "MAX_UNINFORMED", 3)
    judge.edit = constant
    with pytest.raises(train.Stopped, match="no sample carried information in 3 steps in a row.*--min-std.*checkpoint"):
        train.main(config(tmp_path, steps=5))
    assert capsys.readouterr().err.count("no sample carried information (each group") == 1
    rows, start = metrics(tmp_path), state(tmp_path)
    assert [row["advantage/used"] for row in rows] == [0, 0, 0] and rows[0]["teaches/following"] == 0
    assert all(torch.equal(p, v) for p, v in zip(start["policy"], start["sets"]["ref"]))


@pytest.mark.parametrize("distances, warned_at", [([.002] * 80 + [.08], []), ([.002] * 5 + [.02] * 20, [12])])
def test_nft_that_runs_away_is_told_once(distances, warned_at, tmp_path, capsys):
    """Catches: hours of NFT past the point where it damages its editor, without a word; a warning at one odd step."""
    streaks, used, told = [Counter(), Counter()], torch.ones(1, dtype=torch.bool), []
    for step, distance in enumerate(distances, 1):
        info = {"taken": 1, "skipped": 0, "old_distance": distance}
        for rank in (0, 1):                                                            # only the first process speaks
            share = train.Share(rank, 2, [0], [0], 1, 1)
            train.check_streaks(streaks[rank], used, info, step, tmp_path, share)
        told += [step] * capsys.readouterr().err.count("NFT begins to run away")
    assert told == warned_at


def test_gradients_that_are_not_finite_stop_the_run_in_the_end(tmp_path, judge, monkeypatch):
    """Catches: a run that skips every update for ever; NaN in a checkpoint."""
    monkeypatch.setattr(train, "MAX_SKIPPED", 4)
    monkeypatch.setattr(train, "grpo_loss", lambda logp, *_: (logp * math.nan, {"ratio": logp * 0 + 1, "clip_fraction": logp * 0}))
    with pytest.raises(train.Stopped, match="the gradient was not finite in 4 updates in a row.*checkpoint"):
        train.main(config(tmp_path, steps=5))
    assert [row["update/skipped"] for row in metrics(tmp_path)] == [2, 2]
    assert metrics(tmp_path)[0]["update/loss"] == 0
    assert all(p.isfinite().all() for p in flatten(state(tmp_path)) if isinstance(p, torch.Tensor))


def test_two_processes_do_not_train_in_one_folder(tmp_path, judge):
    """Catches: two runs that began at once, or a --resume while the first still runs: lines and checkpoints mixed."""
    train.main(config(tmp_path, steps=1))
    before = (tmp_path / "config.json").read_bytes()
    with held_by_another(tmp_path), pytest.raises(ValueError, match=f"--out {tmp_path}: another process writes there"):
        train.main(config(tmp_path, steps=2, resume=True))
    assert len(metrics(tmp_path)) == 1
    train.main(config(tmp_path, steps=2, resume=True))                                     # the other one has ended
    assert len(metrics(tmp_path)) == 2

    # A run that began while this one was loading its models.
    def load(*args, **more):
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "config.json").write_bytes(before)
        return load_editor(*args, **more)
    load_editor = train.load_editor
    with mock.patch.object(train, "load_editor", load), pytest.raises(ValueError, match="already holds a run"):
        train.main(config(tmp_path / "new", steps=1))
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["config.json"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_step_and_resume_goes_on(number, tmp_path, judge, capsys):
    """Catches: steps lost to Ctrl-C or to a scheduler's SIGTERM; a traceback; another end than without the pause."""
    train.main(config(tmp_path / "a", steps=3))

    def edit(r, tasks, k):
        if len(judge.calls) == K * 3 + K + 1:                      # in the second step of the second run
            os.kill(os.getpid(), number)
        return r
    judge.edit = edit
    with pytest.raises(SystemExit) as stop:
        train.main(config(tmp_path / "b", steps=3))
    assert stop.value.code == 128 + number
    assert f"stopped by {number.name} after step 2" in capsys.readouterr().out
    assert state(tmp_path / "b")["step"] == len(metrics(tmp_path / "b")) == 2
    judge.edit = None
    train.main(config(tmp_path / "b", steps=3, resume=True))
    assert state(tmp_path / "b")["step"] == 3
    assert (tmp_path / "a" / model.LORA_FILE).read_bytes() == (tmp_path / "b" / model.LORA_FILE).read_bytes()
    assert without_seconds(metrics(tmp_path / "a")) == without_seconds(metrics(tmp_path / "b"))


def test_a_power_cut_finds_every_file_whole_and_every_line_that_a_checkpoint_counts_on(tmp_path, judge, monkeypatch):
    """Catches: a checkpoint whose name is on the disk before its bytes, or never; one of step 2 whose metrics end at
    step 1, so that a later resume takes the lines of other steps for those; a validation.json that is half written."""
    out, calls = tmp_path / "run", record_disk(monkeypatch)
    train.main(config(out, steps=2, save_every=1, val_tasks=2))
    replaced = [Path(call[2]) for call in calls if call[0] == "replace"]
    names = [str(file.relative_to(out)) for file in replaced]
    saved = [[model.LORA_FILE, f"checkpoint/step_{step:06d}.pt"] for step in range(3)]
    assert names == [*saved[0], "config.json", *saved[1], *saved[2], "validation.json"]
    for file in replaced:
        i = calls.index(("replace", f"{file}.tmp", str(file)))
        assert calls[i - 1] == ("fsync", f"{file}.tmp") and ("fsync", str(file.parent)) in calls[i + 1:i + 4]
    noted = [i for i, call in enumerate(calls) if call == ("fsync", str(out / "metrics.jsonl"))]
    for step, i in enumerate(noted, 1):
        file = out / "checkpoint" / f"step_{step:06d}.pt"
        assert i < calls.index(("replace", f"{file}.tmp", str(file)))
        assert ("fsync", str(out)) in calls[i:]                  # the name of metrics.jsonl
    assert len(noted) == 2
    del calls[:]
    train.main(config(out, steps=2, save_every=1, val_tasks=2, resume=True))
    assert ("replace", str(out / "metrics.jsonl.tmp"), str(out / "metrics.jsonl")) in calls


def test_a_file_that_is_no_checkpoint_is_neither_the_newest_nor_an_old_one(tmp_path, judge):
    """Catches: a copy that somebody keeps as step_zzz.pt or step_best.pt, which a run then goes on from; one that
    counts among the two that are kept, or is deleted; step 1,000,000 taken for an older one than 999,999."""
    train.main(config(tmp_path / "a", steps=3, save_every=1))
    train.main(config(tmp_path / "b", steps=1, save_every=1))
    folder = tmp_path / "b" / "checkpoint"
    names = ("step_zzz.pt", "step_best.pt", "step_2 (copy).pt", "step_.pt", "step_000009.pt.tmp")
    strays = [folder / name for name in names]
    for file in strays:
        file.write_bytes((folder / "step_000000.pt").read_bytes())
    train.main(config(tmp_path / "b", steps=3, save_every=1, resume=True))
    assert all(file.exists() for file in strays)
    assert [file.name for file in train.checkpoints(tmp_path / "b")] == ["step_000002.pt", "step_000003.pt"]
    assert (tmp_path / "a" / model.LORA_FILE).read_bytes() == (tmp_path / "b" / model.LORA_FILE).read_bytes()
    assert without_seconds(metrics(tmp_path / "a")) == without_seconds(metrics(tmp_path / "b"))
    (folder / "step_1000000.pt").touch(), (folder / "step_999999.pt").touch()
    assert [file.name for file in train.checkpoints(tmp_path / "b")][2:] == ["step_999999.pt", "step_1000000.pt"]
    for file in train.checkpoints(tmp_path / "b"):
        file.unlink()
    assert "holds no checkpoint" in refused("train.py", *flags(tmp_path / "b", steps=5, save_every=1, resume=True))


def test_a_damaged_checkpoint_is_said_and_the_one_before_it_used(tmp_path, judge, capsys):
    """Catches: a traceback of torch.load, or a run that starts again at step 0 without a word."""
    train.main(config(tmp_path / "a", steps=4, save_every=1))
    train.main(config(tmp_path / "b", steps=3, save_every=1))
    newest, before = sorted((tmp_path / "b" / "checkpoint").glob("step_*.pt"), reverse=True)
    assert (newest.name, before.name) == ("step_000003.pt", "step_000002.pt")
    newest.write_bytes(newest.read_bytes()[:-5000])
    train.main(config(tmp_path / "b", steps=4, save_every=1, resume=True))
    assert "step_000003.pt is damaged" in capsys.readouterr().err
    assert_same_run(tmp_path / "a", tmp_path / "b")

    for file in (tmp_path / "b" / "checkpoint").glob("step_*.pt"):
        file.write_bytes(b"garbage")
    rows = metrics(tmp_path / "b")
    with pytest.raises(ValueError, match="no checkpoint .* can be read"):
        train.main(config(tmp_path / "b", steps=5, save_every=1, resume=True))
    for file in (tmp_path / "b" / "checkpoint").glob("step_*.pt"):
        file.unlink()
    before = digest(tmp_path)
    assert "holds no checkpoint" in refused("train.py", *flags(tmp_path / "b", steps=5, save_every=1, resume=True))
    assert digest(tmp_path) == before and metrics(tmp_path / "b") == rows


@pytest.mark.parametrize("damage", ["a set is gone", "a set is short", "another shape", "NaN", "no step", "no policy"])
def test_a_checkpoint_that_does_not_fit_is_left_out(damage, tmp_path, judge, capsys):
    """Catches: half a checkpoint loaded before it is found out, or one with NaN that training goes on from."""
    train.main(config(tmp_path / "b", steps=3, save_every=1))
    newest = tmp_path / "b" / "checkpoint" / "step_000003.pt"
    spoilt = torch.load(newest)
    tensors = spoilt["sets"]["old"]
    {"a set is gone": lambda: spoilt["sets"].pop("ema"), "a set is short": tensors.pop,
     "another shape": lambda: tensors.append(tensors.pop()[:1]), "NaN": lambda: tensors[0].fill_(math.nan),
     "no step": lambda: spoilt.update(step="x"), "no policy": lambda: spoilt.pop("policy")}[damage]()
    torch.save(spoilt, newest)
    train.main(config(tmp_path / "b", steps=4, save_every=1, resume=True))
    assert re.search("step_000003.pt is damaged and left out", capsys.readouterr().err)
    rows, checkpoint = metrics(tmp_path / "b"), state(tmp_path / "b")
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and checkpoint["step"] == 4
    assert all(value.isfinite().all() for value in checkpoint["sets"]["old"])


def test_a_lora_that_is_gone_is_written_again(tmp_path, judge):
    """Catches: a finished run that says "written" of a file that is not there."""
    train.main(config(tmp_path, steps=1))
    lora = (tmp_path / model.LORA_FILE).read_bytes()
    (tmp_path / model.LORA_FILE).unlink()
    train.main(config(tmp_path, steps=1, resume=True))
    assert (tmp_path / model.LORA_FILE).read_bytes() == lora


def test_a_run_goes_on_when_what_it_reads_has_moved(tmp_path, judge):
    """Catches: a resume refused, or later an evaluation of pictures that are gone, since a folder has another name."""
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        Image.effect_noise((48, 48), 90).convert("RGB").save(tmp_path / place / "a.png")
        (tmp_path / place / "tasks.jsonl").write_text(PICTURE * 6)
    shutil.copy(tmp_path / "here" / "a.png", tmp_path / "there")
    run, options = tmp_path / "run", dict(resolution=48, steps=1)
    train.main(config(run, **options, data=tmp_path / "here" / "tasks.jsonl"))
    (tmp_path / "here" / "tasks.jsonl").unlink()
    options |= dict(steps=2, resume=True)
    train.main(config(run, **options, data=tmp_path / "there" / "tasks.jsonl"))
    assert len(metrics(run)) == 2
    assert json.loads((run / "config.json").read_text())["data"] == str(tmp_path / "there" / "tasks.jsonl")


def test_a_run_is_not_resumed_with_other_contents_behind_the_same_names(tmp_path, judge):
    """Catches: instructions, a rubric or a LoRA changed in place between two halves of one run."""
    Image.effect_noise((48, 48), 90).convert("RGB").save(tmp_path / "a.png")
    (tmp_path / "tasks.jsonl").write_text(PICTURE * 6)
    options = dict(data=tmp_path / "tasks.jsonl", resolution=48)
    train.main(config(tmp_path / "run", steps=1, **options))
    before = digest(tmp_path / "run")
    (tmp_path / "tasks.jsonl").write_text(PICTURE.replace("ring", "star") * 6)
    with pytest.raises(ValueError, match="another config: content_of_data '.*' -> '.*'"):
        train.main(config(tmp_path / "run", steps=2, resume=True, **options))
    (tmp_path / "tasks.jsonl").write_text(PICTURE * 6)
    judge.fingerprint = "other prompts"
    with pytest.raises(ValueError, match="another config: content_of_judge 'colours' -> 'other prompts'"):
        train.main(config(tmp_path / "run", steps=2, resume=True, **options))
    assert digest(tmp_path / "run") == before


@pytest.mark.parametrize("damage", ["[1, 2]", "{", "null"])
def test_a_config_that_is_none_is_refused_in_one_line(damage, tmp_path, judge):
    """Catches: a traceback for a file that somebody edited."""
    train.main(config(tmp_path / "run", steps=1))
    (tmp_path / "run" / "config.json").write_text(damage)
    assert "config.json" in refused("train.py", *flags(tmp_path / "run", steps=2, resume=True))


def test_an_out_that_cannot_be_used_is_refused_in_one_line(tmp_path):
    """Catches: minutes of loading before a traceback says that --out is a file, or lies in one."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link_to_no_file").symlink_to("nowhere")
    for out in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / "link_to_no_file"):
        assert re.search("--out .*file.* no folder that can be written", refused("train.py", *flags(out)))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_first_ratio_near_1_is_a_warning_and_far_from_it_the_end(capsys):
    """Catches: a run on a GPU stopped by one rounding step whatever --clip is, or a mismatch that nobody sees."""
    cfg, share = config(clip=1e-3), alone(B * G)
    assert train.check_ratio(torch.tensor(1e-6), True, cfg, share) == pytest.approx(1e-6)
    assert not capsys.readouterr().err
    train.check_ratio(torch.tensor(1e-4), True, cfg, share)
    assert "warning: ratio differs from 1 by 1.0e-04" in capsys.readouterr().err
    train.check_ratio(torch.tensor(.9), False, cfg, share)                     # later updates are off-policy
    with pytest.raises(train.Stopped, match="ratio differs from 1 by 6.0e-04"):
        train.check_ratio(torch.tensor(6e-4), True, cfg, share)


# ------------------------------------------------------------------------------------------------------------ the flags

def test_every_field_has_help_and_help_lists_its_default(monkeypatch):
    """Catches: an undocumented flag, a percent sign that breaks --help."""
    monkeypatch.setenv("COLUMNS", "1000")                                 # argparse would break lines at hyphens
    code, out, _ = run_script("train.py", "--help")
    text = " ".join(out.split())
    assert code == 0
    for f in fields(train.Config):
        help = f.metadata["help"]
        assert len(help) >= 8 and "--" + f.name.replace("_", "-") in text, f.name
        assert " ".join(help.split()) in text and (f.name == "resume" or f"(default: {f.default}" in text), f.name


def test_a_flag_wins_over_a_preset_over_a_default():
    """Catches: a preset that overrides what was typed."""
    assert vars(train.parse([])) == vars(train.parse(["--algo", "grpo", "--preset", "shapes", "--out", "out/grpo"]))
    for (preset, algo), changes in train.PRESETS.items():
        chosen = ["--preset", preset, "--algo", algo]
        cfg, defaults = train.parse(chosen), {f.name: f.default for f in fields(train.Config)}
        assert vars(cfg) == defaults | changes | dict(preset=preset, algo=algo, out=f"out/{algo}")
        by_hand = train.parse(chosen + ["--lr", "3e-5", "--tasks", "8"])
        assert vars(by_hand) == vars(cfg) | dict(lr=3e-5, tasks=8)
        assert train.parse(chosen + ["--shared-noise", "false"]).shared_noise is False


def test_whole_groups_live_on_one_process():
    """Catches: ranks with unequal work, which hang in the next all-reduce."""
    cfg = config(tasks=4)
    assert train.divide(cfg, 0, 1) == (0, 1, [0, 1, 2, 3], [0, 1, 2, 3], 4, 4)
    assert train.divide(cfg, 1, 2) == (1, 2, [1, 3], [0, 2, 1, 3], 2, 2)        # each update has the tasks 0, 1 and then 2, 3
    with pytest.raises(ValueError, match="--tasks 4 .*3 processes"):
        train.divide(cfg, 0, 3)


IMPOSSIBLE = {      # what is typed, what the one line must say
    "unknown flag": (dict(grup=3), "unrecognized arguments: --grup 3"),
    "unknown choice": (dict(algo="ppo"), "ppo.*grpo.*nft"),
    "no number": (dict(tasks="many"), "--tasks.*many"),
    "no truth value": (dict(shared_noise="maybe"), "--shared-noise.*maybe"),
    "group of one": (dict(group=1), "--group 1 .*2"),
    "no turns": (dict(turns=0), "--turns 0 .*1"),
    "window longer than T - 1": (dict(window=3), "--window 3 .* 2 steps of --train-steps 0-1"),
    "window reaches the last step": (dict(train_steps="0-2"), "--train-steps 0-2 .*0 to 1 .*--denoise 3"),
    "window ends before it starts": (dict(train_steps="1-0"), "--train-steps 1-0 .*in order"),
    "no noise": (dict(eta=0), "--eta 0.*greater than 0"),
    "too much noise": (dict(eta=1.5), "--eta 1.5.*at most 1"),
    "micro does not divide": (dict(micro=3), "--micro 3 .*4 rows"),
    "updates do not divide": (dict(updates=3), "--updates 3 .*4 tasks"),
    "times beyond the grid": (dict(algo="nft", window=4), "--window 4 .* 3 steps"),
    "aggregate without effect": (dict(aggregate="min", spread="togo"), "--aggregate min .*no effect.*--spread trajectory"),
    "learning rate": (dict(lr=-1), "--lr -1.*greater than 0"),
    "weights of wrong count": (dict(reward_weights="1,2"), "--reward-weights '1,2' .* 4 .*numbers.*following, consistency, success"),
    "weights all zero": (dict(reward_weights="0,0,0,0"), "--reward-weights '0,0,0,0' .*not all 0"),
    "weights no numbers": (dict(reward_weights="a,b,c,d"), "--reward-weights 'a,b,c,d' .*numbers"),
    "seed": (dict(seed=10 ** 30), "--seed .*at most"),
    "too few steps for any noise": (dict(denoise=1, train_steps="0-0"), "--denoise 1 .*at least 2.*grpo"),
    "no referee": (dict(referee="/nowhere"), "--referee /nowhere: .*neither"),
    "no judge": (dict(judge="/nowhere"), "--judge /nowhere is neither"),
    "no server": (dict(judge="http://localhost:9/v1#m"), "localhost:9.*Connection refused"),
    "an exact judge that thinks": (dict(reasoning="think"), "--reasoning think .*vision-language model as --judge"),
    "votes of what draws nothing": (dict(judge="shapes/judge", votes=4), "--votes 4 .*logits"),
    "one score for all turns, spread by turn": (dict(judge="J", aggregate="whole"), "--aggregate whole .*--spread trajectory"),
    "the judge as its own referee": (dict(referee="exact"), "--referee exact .*--judge itself"),
    "infinity": (dict(lr="inf"), "--lr inf .*finite"),
    "not a number": (dict(ema="nan"), "--ema nan .*finite"),
    "samples that would all be equal": (dict(algo="nft", shared_noise="true"), "--shared-noise True .*equal"),
    "pictures of 10 gigapixels": (dict(data="x.jsonl", resolution=100000), "--resolution 100000 must be at most 4096"),
    "no data": (dict(data="/nowhere.jsonl"), "/nowhere.jsonl.*no such file"),
    "no editor": (dict(model="/nowhere"), "/nowhere.*no editor"),
    "no lora": (dict(lora="/nowhere", lora_rank=None, lora_alpha=None), "/nowhere"),
    "resume without a run": (dict(resume=True), "--resume.*holds no run"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_bad_input_is_refused_in_one_line_and_nothing_is_written(case, tmp_path):
    """Catches: tracebacks, defaults taken in silence, an --out that then "already holds a run"."""
    changes, words = IMPOSSIBLE[case]
    line = refused("train.py", *flags(tmp_path / "run", **changes))
    assert re.search(words, line), line
    assert not (tmp_path / "run").exists()


IDLE = {      # flags without an effect on what was chosen, what the one line must name
    "eta": ("nft", dict(eta=.5), "--eta 0.5 .*--algo grpo"),
    "clip": ("nft", dict(clip=.1), "--clip 0.1 .*--algo grpo"),
    "step kind": ("nft", dict(step_kind="sde"), "--step-kind sde .*--algo grpo"),
    "beta": ("grpo", dict(beta=.5), "--beta 0.5 .*--algo nft"),
    "rank of a given LoRA": ("grpo", dict(lora="x", lora_alpha=None), "--lora-rank 4 .*--lora"),
    "alpha of a given LoRA": ("grpo", dict(lora="x", lora_rank=None), "--lora-alpha 8 .*--lora"),
    "targets of a given LoRA": ("grpo", dict(lora="x", lora_rank=None, lora_alpha=None, lora_targets="all"), "--lora-targets all"),
    "alpha of no LoRA": ("grpo", dict(lora_rank=0), "--lora-alpha 8 .*--lora-rank 0"),
    "targets of no LoRA": ("grpo", dict(lora_rank=0, lora_alpha=None, lora_targets="all"), "--lora-targets all .*--lora-rank 0"),
    "resolution of shapes": ("grpo", dict(resolution=64), "--resolution 64 .*--data"),
    "workers of the exact judge": ("grpo", dict(judge_workers=2), "--judge-workers 2 .*--judge"),
    "rubric of the exact judge": ("grpo", dict(rubric="x"), "--rubric x .*--judge"),
    "offload": ("grpo", dict(offload="true"), "--offload True .*GPU"),
    "shard": ("grpo", dict(shard="true"), "--shard True .*several processes"),
    "guidance of an editor without": ("grpo", dict(guidance=3), "--guidance 3.0 .*takes none"),
}


@pytest.mark.parametrize("case", IDLE)
def test_a_flag_without_an_effect_is_refused(case, tmp_path):
    """Catches: a choice taken in silence and then ignored."""
    algo, changes, words = IDLE[case]
    if case == "offload" and torch.cuda.is_available():
        pytest.skip("has an effect on a GPU")
    line = refused("train.py", *flags(tmp_path / "run", algo, **changes))
    assert re.search(words, line) and "no effect" in line, line
    assert not (tmp_path / "run").exists()


PICTURE = '{"image": "a.png", "instructions": ["Add a ring", "Remove it"]}\n'
BAD_DATA = {      # the file, what the one line must say
    "not JSON": (PICTURE + "\n{image: a.png}\n", "line 3 is not JSON"),
    "no instructions": (PICTURE + '{"image": "a.png"}\n', 'line 2 lacks "instructions"'),
    "no picture": ('{"instructions": ["Add", "Remove"]}\n', 'line 1 lacks "image"'),
    "too few instructions": (PICTURE * 2 + PICTURE.replace(', "Remove it"', ""), "line 3 has 1 instructions.* 2 turns"),
    "missing picture": (PICTURE.replace("a.png", "b.png"), "line 1.*b.png cannot be read.*No such file"),
    "no tasks": ("\n", "holds no tasks"),
    "fewer tasks than B": (PICTURE * 3, "--tasks 4 .* 2 training tasks"),
    "no scenes for the exact judge": (PICTURE * 8, "--judge exact knows the embedded world only"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_refused_with_its_line_and_nothing_is_written(case, tmp_path):
    """Catches: a run that starts and dies at the first bad picture, or an error that does not say where to look."""
    text, words = BAD_DATA[case]
    Image.new("RGB", (60, 50), "red").save(tmp_path / "a.png")
    (tmp_path / "tasks.jsonl").write_text(text)
    line = refused("train.py", *flags(tmp_path / "run", data=tmp_path / "tasks.jsonl"))
    assert re.search(words, line), line
    assert not (tmp_path / "run").exists()


def test_a_run_is_never_overwritten(tmp_path, judge):
    """Catches: a second run that mixes with the first, or a resumed one under another config."""
    train.main(config(tmp_path / "run", steps=1))
    before = digest(tmp_path)
    assert "already holds a run" in refused("train.py", *flags(tmp_path / "run", steps=1))
    # weights of a run whose config.json somebody has moved are nobody's to go on from
    (tmp_path / "run" / "config.json").rename(tmp_path / "config.json")
    for more in ({}, {"resume": True}):
        line = refused("train.py", *flags(tmp_path / "run", steps=1, **more))
        assert line.endswith("holds checkpoints and no config.json: move them away, or choose another folder")
    (tmp_path / "config.json").rename(tmp_path / "run" / "config.json")
    line = refused("train.py", *flags(tmp_path / "run", steps=4, resume=True, lr=.5, group=4))
    assert re.search("group 2 -> 4.*lr 0.001 -> 0.5", line) and "steps" not in line
    assert digest(tmp_path) == before
    train.main(config(tmp_path / "run", steps=1, resume=True))               # nothing left to do, and nothing undone
    assert digest(tmp_path) == before


def test_training_on_pictures_of_ones_own(tmp_path, judge, capsys):
    """Catches: a path that only the embedded world takes: other sizes, two sizes in a step, a LoRA to start from."""
    for name, size in (("a", (60, 50)), ("b", (30, 60))):
        Image.effect_noise(size, 90).convert("RGB").save(tmp_path / f"{name}.png")
    (tmp_path / "tasks.jsonl").write_text((PICTURE + PICTURE.replace("a.png", "b.png")) * 6)
    options = dict(data=tmp_path / "tasks.jsonl", resolution=48, steps=1, val_tasks=2)
    train.main(config(tmp_path / "a", **options))
    assert "5 of 64 x 32, 5 of 48 x 48" in capsys.readouterr().out
    train.main(config(tmp_path / "b", "nft", **options, lora=tmp_path / "a", lora_rank=None, lora_alpha=None))
    assert all(metrics(tmp_path / name)[0]["update/grad_norm"] > 0 for name in "ab")
    assert metrics(tmp_path / "a")[0]["update/ratio_deviation_1"] == 0
    saved = load_file(tmp_path / "a" / model.LORA_FILE)
    assert norms(state(tmp_path / "b")["sets"]["ref"]) == pytest.approx(norms(saved.values()))
    assert set(json.loads((tmp_path / "b" / "validation.json").read_text())["arms"]) == {"start", "tuned"}


def test_a_picture_that_breaks_later_stops_the_run_in_one_line(tmp_path, judge):
    """Catches: a traceback of PIL at step 500, and a checkpoint lost with it."""
    Image.new("RGB", (48, 48), "red").save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    (tmp_path / "tasks.jsonl").write_text((PICTURE.replace("a.png", "broken.png")) * 6)
    code, out, err = run_script("train.py", *flags(tmp_path / "run", data=tmp_path / "tasks.jsonl"))
    assert code == 2 and "Traceback" not in err
    assert re.search("train.py: .*line [1-6].*broken.png cannot be read", err.splitlines()[-1])
    assert state(tmp_path / "run")["step"] == 0


def test_the_launch_lines_of_the_docs_are_possible():
    """Catches: an example that the first user types in vain: flags of last month, tasks that the processes do not divide."""
    text = "\n".join(file.read_text() for file in [ROOT / "README.md", ROOT / "train.py", *sorted((ROOT / "docs").glob("*.md"))])
    lines = re.findall(r"(?:torchrun|python) ((?:--\S+ )*)train\.py([^\n`]*)", text.replace("\\\n", " "))
    for launcher, flags in lines:
        launch = dict(word.lstrip("-").split("=") for word in launcher.split())
        cfg = train.parse(shlex.split(re.split(" {3,}#| {5,}", flags)[0].replace("...", "")))
        train.check(cfg)
        train.divide(cfg, 0, int(launch.get("nproc_per_node", 1)) * int(launch.get("nnodes", 1)))
    assert len(lines) > 15


@pytest.mark.parametrize("preset, algo", train.PRESETS)
def test_every_preset_starts_on_the_machine_it_is_for(preset, algo):
    """Catches: numbers that contradict each other, so that the advertised command refuses itself."""
    cfg = train.parse(["--preset", preset, "--algo", algo])
    train.check(cfg)
    train.divide(cfg, 0, 8 if preset in ("kontext", "klein", "qwen") else 1)
    first, last = {"kontext": (0, cfg.denoise // 2 - 2), "klein": (cfg.denoise // 2 - 1, cfg.denoise - 3),
                   "qwen": (0, cfg.denoise // 2 - 2)}.get(preset.split("-")[0], (0, 0))
    if algo == "grpo":
        steps = train.trained_steps(cfg)
        assert (steps.start, steps.stop - cfg.window) == (first, last)
    elif preset != "shapes":
        assert cfg.guidance == (2.5 if preset.startswith("kontext") else 1)


def test_the_whole_transformer_can_be_trained(tmp_path, judge):
    """Catches: --lora-rank 0 that trains nothing, or saves what eval.py cannot load."""
    train.main(config(tmp_path, steps=1, lora_rank=0, lora_alpha=None, lr=1e-4))
    editor = model.load_weights(new_editor(), tmp_path)
    ema = state(tmp_path)["sets"]["ema"]
    assert all(torch.allclose(p, v.cpu()) for p, v in zip(editor.trained.values(), ema, strict=True))
