"""rollout.py: noise that is a function of its key, turns that chain on their own output, steps that can be replayed."""
import pytest
import torch

import model
from fixtures import make_tasks, new_editor, resized
from grpo import sde_step
from rollout import Task, draw_noise, rollout, select, stack_images

K, G, T = 2, 3, 4
WINDOW = dict(eta=.7, window=range(1, 3))


def roll(editor, tasks, G=G, seed=(5, 1), **options):
    return rollout(editor, tasks, G, K, T, seed, **options)


def near(a, b):
    """Equal pictures, but for values that lie within float error of a rounding boundary."""
    difference = (a.int() - b.int()).abs()
    return difference.max() <= 1 and (difference > 0).float().mean() < .01


# ---------------------------------------------------------------------------------------------------------------- noise

def test_noise_is_a_pure_function_of_its_key():
    """Catches: noise from the global generator, which a resume or another number of processes would shift."""
    a = draw_noise((9, 64), 1, 2, 3)
    state = torch.get_rng_state()
    torch.manual_seed(123)
    assert torch.equal(draw_noise((9, 64), 1, 2, 3), a)
    torch.set_rng_state(state)
    draw_noise((9, 64), 1, 2, 3)
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_of_every_key_is_another_and_standard_normal():
    """Catches: keys that are added or concatenated (1, 23 = 12, 3), and noise of another scale."""
    keys = [(1, 23), (12, 3), (1, 2, 3), (123,), (3, 12), (0, 0, 0), (0, 0, 1), (0, 1, 0)]
    x = torch.stack([draw_noise((40, 64), *key) for key in keys])
    assert x.dtype == torch.float32
    assert x.mean().abs() < .02 and (x.std() - 1).abs() < .02       # 20480 values: 2.9 and 4 standard errors
    assert (torch.corrcoef(x.flatten(1)) - torch.eye(len(keys))).abs().max() < .1
    assert (x.flatten().sort().values[10240 + 6990] - 1).abs() < .05    # a normal's quantile, P(x < 1) = .841


def test_seed_step_task_sample_turn_and_step_each_change_the_noise():
    """Catches: a part of the key forgotten: two turns, tasks or samples that share what they should not."""
    editor, tasks, first = new_editor(), make_tasks(2), []
    velocity = editor.velocity
    editor.velocity = lambda x, t, *rest: (first.append(x) if t[0] == 1 else None) or velocity(x, t, *rest)
    roll(editor, tasks), roll(editor, tasks, seed=(5, 2)), roll(editor, tasks, seed=(6, 1))
    x = torch.cat(first)                                             # (3 runs * K turns * S rows, N, C)
    assert len(x) == 3 * K * 2 * G
    correlation = torch.corrcoef(x.flatten(1)) - torch.eye(len(x))
    assert correlation.abs().max() < .25                              # 576 values: 6 standard errors

    a = roll(editor, tasks[:1], eta=.7, window=range(2))
    noises = []
    for k in range(K):
        for j in range(2):
            t, t_next = a.t[j].item(), a.t[j + 1].item()
            cond = select(a.cond[k], torch.arange(G), "cpu")
            v = editor.velocity(a.x[:, k, j], a.t[j].expand(G), cond, a.context[:, k], (48, 48))
            _, _, mu, std = sde_step(v, a.x[:, k, j], t, t_next, .7, x_next=a.x[:, k, j + 1])
            noises.append((a.x[:, k, j + 1] - mu) / std)
    x = torch.cat(noises + [a.x[:, k, 0] for k in range(K)])
    assert (torch.corrcoef(x.flatten(1).detach()) - torch.eye(len(x))).abs().max() < .25


# ---------------------------------------------------------------------------------------------------------------- turns

def test_same_seed_same_pictures_other_seed_others():
    """Catches: any unseeded random number in the rollout."""
    editor, tasks = new_editor(), make_tasks(2)
    a, b, c = roll(editor, tasks, **WINDOW), roll(editor, tasks, **WINDOW), roll(editor, tasks, seed=(5, 2), **WINDOW)
    assert torch.equal(a.images, b.images) and torch.equal(a.x, b.x) and torch.equal(a.logp, b.logp)
    assert torch.equal(a.images[:, 0], c.images[:, 0])
    assert all((a.images[s, 1:] != c.images[s, 1:]).any() for s in range(2 * G))


def test_a_turn_is_conditioned_on_the_uint8_output_of_the_turn_before():
    """Catches: every turn from the source, latents passed on without decoding and rounding, a neighbour's picture."""
    editor = new_editor()
    a = roll(editor, make_tasks(2))
    assert a.images.dtype == torch.uint8
    for k in range(K):
        assert torch.allclose(a.context[:, k], editor.encode(a.images[:, k]), atol=1e-6)
        assert near(a.images[:, k + 1], editor.decode(a.x[:, k, -1], (48, 48)))
    assert (a.context[:, 1] - a.context[:, 0]).abs().max() > .1


def test_a_turn_follows_its_own_instruction():
    """Catches: the first turn's instruction, or another task's, given at every turn."""
    editor, tasks = new_editor(), make_tasks(2)
    a = roll(editor, tasks)
    for k in range(K):
        rows = select(a.cond[k], torch.arange(2 * G), "cpu")
        for s in range(2 * G):
            tensors, index = editor.condition([tasks[s // G].instructions[k]], None)
            assert all(torch.allclose(rows[name][s], tensors[name][index[0]], atol=1e-5) for name in tensors)


def test_rows_of_a_group_share_task_and_source():
    """Catches: rows laid out sample by sample in place of task by task."""
    tasks = make_tasks(3)
    a = roll(new_editor(), tasks)
    assert torch.equal(a.images[:, 0], stack_images(tasks)[torch.arange(3 * G) // G])
    assert len({a.images[s, 1].numpy().tobytes() for s in range(3 * G)}) == 3 * G


@pytest.mark.parametrize("size", [(48, 48), (32, 64)])
def test_shapes_of_a_trajectory(size):
    """Catches: turns and steps swapped, or latents of Euler steps kept for nothing."""
    editor, tasks = new_editor(), resized(make_tasks(2), size)
    N, C = editor.latent_shape(size)
    a, S = roll(editor, tasks, **WINDOW), 2 * G
    assert a.images.shape == (S, K + 1, 3, *size) and a.context.shape == (S, K, N, C)
    assert a.x.shape == (S, K, 3, N, C) and a.logp.shape == (S, K, 2) and a.window == range(1, 3)
    assert a.t.shape == (T + 1,) and len(a.cond) == K
    assert a.x.dtype == a.logp.dtype == a.context.dtype == torch.float32
    b = roll(editor, tasks)                                          # NFT keeps x_0 only
    assert b.x.shape == (S, K, 1, N, C) and b.logp is None
    c = roll(editor, tasks, keep=False, **WINDOW)                    # evaluation keeps pictures only
    assert c.x is None and c.logp is None and c.context is None and torch.equal(c.images, a.images)
    assert set(a.seconds) == {"text", "vae", "velocity"} and all(v > 0 for v in a.seconds.values())


def test_each_turn_is_handed_to_the_judge_once_with_the_pictures_so_far():
    """Catches: the judge shown the turn before, or the whole trajectory only at the end."""
    seen = []
    a = roll(new_editor(), make_tasks(2), on_turn=lambda k, images: seen.append((k, images.clone())))
    assert [k for k, _ in seen] == [0, 1]
    assert all(torch.equal(images, a.images[:, :k + 2]) for k, images in seen)


def test_micro_batches_and_tasks_in_two_calls_change_nothing():
    """Catches: noise keyed by the row in a micro-batch or in a process, `task_rows` ignored, parts out of order."""
    editor, tasks = new_editor(), make_tasks(4)
    whole = roll(editor, tasks, **WINDOW, shared_noise=True)
    micro = roll(editor, tasks, **WINDOW, shared_noise=True, micro=2)
    halves = [roll(editor, tasks[i:i + 2], **WINDOW, shared_noise=True, task_rows=[i, i + 1]) for i in (0, 2)]
    for parts in ([micro], halves):
        joined = lambda name: torch.cat([getattr(part, name) for part in parts])
        assert near(whole.images, joined("images"))
        assert torch.allclose(whole.x[:, 0], joined("x")[:, 0], atol=1e-5)        # turn 1; later ones see the rounding
        assert torch.allclose(whole.logp, joined("logp"), atol=1e-4)
    elsewhere = roll(editor, tasks[:2], **WINDOW, shared_noise=True, task_rows=[2, 3])
    assert not near(halves[0].images[:, 1:], elsewhere.images[:, 1:])


# ----------------------------------------------------------------------------------------------------------- the window

def noise(k, i):
    """The noise that rows of two tasks get at turn k: i = 0 where it starts, i + 1 in stochastic step i."""
    return torch.stack([draw_noise((9, 64), 5, 1, s // G, s % G, k, i) for s in range(2 * G)])


def replay(editor, a, x, k, first, last):
    """Euler steps first .. last-1 of turn k from latents x."""
    cond = select(a.cond[k], torch.arange(len(x)), "cpu")
    with torch.no_grad():
        for i in range(first, last):
            x = x + (a.t[i + 1] - a.t[i]) * editor.velocity(x, a.t[i].expand(len(x)), cond, a.context[:, k], (48, 48))
    return x


@pytest.mark.parametrize("kind, start", [("cps", 0), ("cps", 1), ("sde", 0), ("sde", 1)])
def test_recorded_steps_are_stochastic_steps_with_their_log_probability(kind, start):
    """Catches: a latent stored a step too early or late, logp of other noise than was added, the rest not Euler."""
    editor, tasks = new_editor(), make_tasks(2)
    a = roll(editor, tasks, eta=.6, kind=kind, window=range(start, start + 2))
    for k in range(K):
        cond = select(a.cond[k], torch.arange(2 * G), "cpu")
        assert torch.allclose(replay(editor, a, noise(k, 0), k, 0, start), a.x[:, k, 0], atol=1e-5)
        for j in range(2):
            i = start + j
            eps = noise(k, i + 1)
            with torch.no_grad():
                v = editor.velocity(a.x[:, k, j], a.t[i].expand(2 * G), cond, a.context[:, k], (48, 48))
            step = (v, a.x[:, k, j], a.t[i].item(), a.t[i + 1].item(), .6, kind, a.t[1].item())
            x_next, logp, _, std = sde_step(*step, noise=eps)
            assert std > 0 and torch.equal(x_next, a.x[:, k, j + 1]) and torch.equal(logp, a.logp[:, k, j])
            assert torch.equal(sde_step(*step, x_next=a.x[:, k, j + 1])[1], a.logp[:, k, j])
            # -mean (std eps)^2 / 2 std^2 = -mean eps^2 / 2
            assert torch.allclose(logp, -eps.square().mean((1, 2)) / 2, atol=1e-3)
        assert near(editor.decode(replay(editor, a, a.x[:, k, 2], k, start + 2, T), (48, 48)), a.images[:, k + 1])


def test_without_noise_the_window_is_euler():
    """Catches: a drift that does not vanish with eta."""
    editor, tasks = new_editor(), make_tasks(2)
    euler = roll(editor, tasks)
    for kind in ("cps", "sde"):
        for eta, tolerance in ((0., 0), (1e-4, 2)):
            a = roll(editor, tasks, eta=eta, kind=kind, window=range(1, 3))
            difference = (a.images.int() - euler.images.int()).abs()
            assert difference.max() <= 1 + tolerance and (difference > 0).float().mean() < .05
    assert torch.equal(a.x[:, 0, 0], replay(editor, a, noise(0, 0), 0, 0, 1))


@pytest.mark.parametrize("start, window", [(2, 2), (0, 4), (3, 1), (-1, 2)])
def test_a_window_that_reaches_the_last_step_is_refused(start, window):
    """Catches: noise left in the picture that conditions the next turn, or a window that is cut short in silence."""
    with pytest.raises(ValueError, match=f"window of {window} steps from step {start} .* {T} steps"):
        roll(new_editor(), make_tasks(1), eta=.7, window=range(start, start + window))


def test_groups_share_their_initial_noise_and_nothing_else():
    """Catches: sharing over tasks or turns, or the window's noise shared too (then a group has no variance at all)."""
    editor, tasks = new_editor(), make_tasks(2)
    tasks[1].image, tasks[1].instructions = tasks[0].image, tasks[0].instructions    # noise alone tells rows apart
    a = roll(editor, tasks, shared_noise=True)
    rows = a.images.view(2, G, K + 1, -1)
    assert near(rows[:, :1].expand_as(rows), rows)
    assert not near(rows[0, 0, 1:], rows[1, 0, 1:])
    own = roll(editor, tasks).images.view(2, G, K + 1, -1)
    assert all(not near(own[b, 0, 1:], own[b, g, 1:]) for b in range(2) for g in range(1, G))

    b = roll(editor, tasks, shared_noise=True, eta=.7, window=range(2))
    x = b.x.view(2, G, K, 3, -1)
    assert torch.equal(x[:, :1, :, 0].expand(-1, G, -1, -1), x[:, :, :, 0])           # where the window begins: t = 1
    assert all((x[0, 0, k, 1] - x[0, 1, k, 1]).abs().max() > .1 for k in range(K))
    assert (x[0, 0, 0, 0] - x[0, 0, 1, 0]).abs().max() > .1 and (x[0, 0, 0, 0] - x[1, 0, 0, 0]).abs().max() > .1


def test_a_probe_of_turn_2_sees_the_noise_of_turn_2():
    """Catches: clean-context probes compared with own outputs under other noise, which hides a small gap."""
    editor, starts = new_editor(), []
    velocity = editor.velocity
    editor.velocity = lambda x, t, *rest: (starts.append(x) if t[0] == 1 else None) or velocity(x, t, *rest)
    roll(editor, make_tasks(1))
    rollout(editor, make_tasks(1, K=1), G, 1, T, (5, 1), first_turn=1)
    assert len(starts) == 3 and torch.equal(starts[1], starts[2]) and not torch.equal(starts[0], starts[1])


def test_a_groups_source_is_encoded_once():
    """Catches: the same picture through the VAE G times; a neighbour's latents where pictures differ."""
    editor, tasks, sizes = new_editor(), make_tasks(2), []
    encode = editor.encode
    editor.encode = lambda pictures: sizes.append(len(pictures)) or encode(pictures)
    a = roll(editor, tasks)
    assert sizes == [2, 2 * G] and torch.equal(a.context[:G, 0], a.context[:1, 0].expand(G, -1, -1))
    assert (a.context[0, 0] - a.context[G, 0]).abs().max() > .1


# ------------------------------------------------------------------------------------------------------------ bad input

def test_latents_that_are_not_finite_are_refused():
    """Catches: NaN weights or guidance that train on black pictures to the end, with exit code 0."""
    editor = new_editor(4)
    next(iter(editor.trained.values())).data.fill_(float("nan"))
    with pytest.raises(ValueError, match="latents are not finite.*--model.*--lora.*--guidance"):
        roll(editor, make_tasks(1))


def test_a_picture_given_as_a_function_is_read_when_it_is_used():
    """Catches: every picture of a data set decoded at the start and kept."""
    picture, reads = make_tasks(1)[0].image, []
    lazy = Task(lambda: reads.append(1) or picture, ["Add", "Remove"], ["", ""], size=(48, 48))
    assert lazy.size == make_tasks(1)[0].size and not reads
    assert torch.equal(stack_images([lazy]), stack_images(make_tasks(1))) and len(reads) == 1
    stack_images([lazy])
    assert len(reads) == 2



def test_pictures_of_two_sizes_are_refused():
    """Catches: a stacking error of numpy in place of the two sizes."""
    tasks = make_tasks(2)
    resized(tasks[1:], (32, 64))
    with pytest.raises(ValueError, match=r"one size.*\(32, 64\), \(48, 48\)"):
        roll(new_editor(), tasks)


def test_fewer_instructions_than_turns_are_refused():
    """Catches: an index error in the second turn, after the first was paid for."""
    with pytest.raises(ValueError, match="1 instructions, fewer than K = 2"):
        roll(new_editor(), [*make_tasks(1), *make_tasks(1, K=1)])


def test_the_weights_of_the_editor_are_the_ones_that_sample():
    """Catches: rollouts of `old` or `ref` that in truth use the policy."""
    editor, tasks = new_editor(4, moved=.1), make_tasks(1)
    policy = roll(editor, tasks)
    with editor.using("ref"):
        ref = roll(editor, tasks)
    assert torch.equal(ref.images, roll(new_editor(), tasks).images)
    assert not near(policy.images[:, 1:], ref.images[:, 1:])
