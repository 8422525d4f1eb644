"""model.py for every family of editors, on tiny random-weight pipelines of the real classes, against diffusers."""
import functools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus
from PIL import Image
from safetensors.torch import load_file, save_file

import model
import train
from fixtures import PIPES, Judge, move, tiny_editor
from rollout import Task, draw_noise, rollout, select

FAMILIES = pytest.mark.parametrize("family", PIPES)
SIZES = pytest.mark.parametrize("size", [(64, 64), (96, 64), (64, 80)], ids=lambda size: "%dx%d" % size)
TEXTS = ["Make the red star blue", "Remove the ring", "Change the background to a beach with palms and a small boat"]


@functools.lru_cache(maxsize=2)
def pipe_of(family, **changes):
    """A tiny pipeline that no test changes; the last two are kept."""
    return PIPES[family](**changes)


def pictures(n, size):
    """Noisy pictures, so that every pixel counts."""
    return torch.randint(0, 256, (n, 3, *size), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)


def one_task(size, *instructions):
    picture = Image.fromarray(pictures(1, size)[0].permute(1, 2, 0).numpy())
    instructions = instructions or TEXTS[:1]
    return Task(picture, list(instructions), [""] * len(instructions))


def pipelines_own(pipe, family, task, T, size, noise, guidance, monkeypatch):
    """diffusers' own edit -> latents (1, N, C) before its decoder, picture (1, 3, H, W) uint8; from noise (N, C)."""
    H, W = size
    last = []
    call = dict(image=task.image, prompt=task.instructions[0], num_inference_steps=T, latents=noise[None],
                height=H, width=W, callback_on_step_end=lambda pipe, i, t, kwargs: last.append(kwargs["latents"]) or {})
    if family == "kontext":
        call |= dict(guidance_scale=guidance, max_area=H * W, _auto_resize=False, max_sequence_length=14)
    elif family == "klein":
        call |= dict(guidance_scale=guidance, max_sequence_length=48,
                     latents=noise.T.reshape(1, -1, H // 16, W // 16))
    else:
        call |= dict(true_cfg_scale=guidance, negative_prompt=" " if guidance > 1 else None)
        edit, plus = pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus      # else their context is always 1 MP
        original = plus.calculate_dimensions
        monkeypatch.setattr(edit, "calculate_dimensions", lambda area, ratio: (W, H, None))
        monkeypatch.setattr(plus, "calculate_dimensions",
                            lambda area, ratio: (W, H) if area == plus.VAE_IMAGE_SIZE else original(area, ratio))
    (picture,) = pipe(**call).images
    return last[-1], torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]


CASES = {
    "kontext": ("kontext", {}, 2.5), "kontext, guidance distilled": ("kontext", dict(guidance_embeds=True), 4.),
    "klein": ("klein", {}, 1.), "klein, true CFG": ("klein", {}, 4.),
    "klein, distilled": ("klein", dict(is_distilled=True), 4.),
    "qwen": ("qwen", {}, 1.), "qwen, true CFG": ("qwen", {}, 4.), "plus": ("plus", dict(zero_cond_t=True), 1.),
    "plus, true CFG": ("plus", {}, 3.),
}


@pytest.mark.parametrize("case", CASES)
@SIZES
def test_one_turn_of_rollout_is_the_pipelines_own_output(case, size, monkeypatch):
    """Catches: another time shift, packing, position ids, normalisation, template, arithmetic of the guidance."""
    family, changes, guidance = CASES[case]
    pipe, task, T = pipe_of(family, **changes), one_task(size), 3
    editor = tiny_editor(family, pipe, guidance=guidance)
    trajectory = rollout(editor, [task], 1, 1, T, (3,))
    noise = draw_noise(editor.latent_shape(size), 3, 0, 0, 0, 0)
    latents, picture = pipelines_own(pipe, family, task, T, size, noise, guidance, monkeypatch)
    assert latents.std() > .1 and picture.float().std() > 1
    assert torch.allclose(trajectory.x[:, 0, -1], latents, atol=1e-5)
    difference = (trajectory.images[:, 1].int() - picture.int()).abs()       # a value may lie on the edge of a rounding
    assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3


# ------------------------------------------------------------------------------------------------------------- batches

def rows_of(editor, texts, images, size, seed=7):
    """Arguments of velocity(): a row for each text and picture, all different."""
    cond, index = editor.condition(texts, images)
    x = torch.stack([draw_noise(editor.latent_shape(size), seed, s) for s in range(len(texts))])
    return x, torch.linspace(.9, .2, len(texts)), {n: v[index] for n, v in cond.items()}, editor.encode(images), size


@FAMILIES
def test_a_row_of_a_batch_equals_the_row_alone(family):
    """Catches: texts padded to the longest without a mask, pictures taken for several references of one prompt."""
    size, images = (64, 80), pictures(3, (64, 80))
    editor = tiny_editor(family, pipe_of(family))
    batch = rows_of(editor, TEXTS, images, size)
    with torch.no_grad():
        v = editor.velocity(*batch)
        for s in range(3):
            alone = rows_of(editor, TEXTS[s:s + 1], images[s:s + 1], size)
            assert torch.allclose(batch[3][s], alone[3][0], atol=1e-5)                          # encode
            out = editor.velocity(batch[0][s:s + 1], batch[1][s:s + 1], alone[2], alone[3], size)
            assert torch.allclose(v[s], out[0], atol=1e-5)
    x = batch[0]
    whole = editor.decode(x, size)
    difference = (whole.int() - torch.cat([editor.decode(x[s:s + 1], size) for s in range(3)]).int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3
    assert (whole[0] != whole[1]).any() and (v[0] - v[1]).abs().max() > 1e-3


@FAMILIES
def test_velocity_depends_on_every_input(family):
    """Catches: an input that is passed along but never read, the picture of Qwen's text encoder among them."""
    size, images = (64, 64), pictures(2, (64, 64))
    editor = tiny_editor(family, pipe_of(family))
    x, t, cond, context, _ = rows_of(editor, [TEXTS[0]] * 2, images, size)
    other = rows_of(editor, TEXTS[1:], images, size)[2]
    with torch.no_grad():
        v = editor.velocity(x, t, cond, context, size)
        changed = [(x.flip(0), t, cond, context), (x, t.flip(0), cond, context), (x, t, other, context),
                   (x, t, cond, context.flip(0))]
        if editor.guided:
            changed += [(x, t, cond | {"negative_text": cond["negative_text"] + .1}, context)]
        for arguments in changed:
            assert (editor.velocity(*arguments, size) - v).abs().max() > 1e-4


@FAMILIES
def test_text_is_encoded_once_for_what_it_depends_on(family):
    """Catches: Qwen's features shared by trajectories whose pictures differ, or a text encoded again for equal rows."""
    editor, prompts = tiny_editor(family, PIPES[family]()), []
    encode = editor.pipe.encode_prompt
    editor.pipe.encode_prompt = lambda prompt, *rest, **more: prompts.append(prompt) or encode(prompt, *rest, **more)
    images = pictures(2, (64, 64))[[0, 0, 1, 1]]
    cond, index = editor.condition([TEXTS[0], TEXTS[0], TEXTS[0], TEXTS[1]], images)
    sees = family in ("qwen", "plus")
    assert index.tolist() == ([0, 0, 1, 2] if sees else [0, 0, 0, 1])
    assert all(len(value) == 2 + sees and value.device.type == "cpu" for value in cond.values())
    told = sum(([p] if isinstance(p, str) else p for p in prompts), [])
    negatives = [editor.negative] * editor.guided * (2 + sees if sees else 1)
    expected = [TEXTS[0]] * (1 + sees) + [TEXTS[1]] + negatives
    assert sorted(told) == sorted(expected)
    if sees:
        assert (cond["text"][0] - cond["text"][1]).abs().max() > 1e-4


@FAMILIES
def test_guidance_1_is_one_forward_and_the_familys_own_is_the_default(family):
    """Catches: a second branch paid for where it does nothing, or guidance that is left at another family's value."""
    for guidance in (1., None):
        editor, forwards = tiny_editor(family, PIPES[family](), guidance=guidance), []
        editor.transformer.register_forward_hook(lambda *_: forwards.append(1))
        arguments = rows_of(editor, TEXTS[:2], pictures(2, (64, 64)), (64, 64))
        with torch.no_grad():
            editor.velocity(*arguments)
        twice = guidance is None and family != "kontext"
        assert len(forwards) == 1 + twice and editor.guided == twice
        assert any(name.startswith("negative") for name in arguments[2]) == twice
    assert editor.guidance == (2.5 if family == "kontext" else 4.)


@pytest.mark.parametrize("family", ["klein", "qwen"])
def test_both_branches_of_cfg_have_a_gradient(family):
    """Catches: the negative branch under no_grad, where the ratio of GRPO is that of another model than sampled."""
    editor = tiny_editor(family, PIPES[family](), rank=2, moved=.1)
    x, t, cond, context, size = rows_of(editor, TEXTS[:1], pictures(1, (64, 64)), (64, 64))
    name = next(n for n in editor.trained if n.endswith("0.attn.to_q.B"))
    p, h, weight = editor.trained[name], 1e-2, draw_noise(x.shape, 5)         # Qwen's guidance keeps a sum of squares
    loss = lambda: (editor.velocity(x, t, cond, context, size).double() * weight).sum()
    loss().backward()
    slope, along, values = p.grad.norm().item(), p.grad / p.grad.norm(), []
    for sign in (-1, 1):
        with torch.no_grad():
            p += sign * h * along
            values.append(loss().item())
            p -= sign * h * along
    assert slope == pytest.approx((values[1] - values[0]) / (2 * h), rel=.02) and slope > .1


@FAMILIES
def test_offloaded_encoders_give_the_same_text_and_go_home(family, monkeypatch):
    """Catches: encoders that stay on the device, or that are asked to work away from it."""
    moves = []
    for offload in (False, True):
        editor = tiny_editor(family, PIPES[family](), offload=offload)
        for part in editor.encoders:
            monkeypatch.setattr(part, "to", lambda device, part=part: moves.append(str(device)) or part)
        cond, _ = editor.condition(TEXTS[:2], pictures(2, (64, 64)))
        if offload:
            assert all(torch.equal(cond[name], before[name]) for name in before)
            n = len(editor.encoders)
            assert n == (2 if family == "kontext" else 1) and len(moves) == 2 * n and moves[n:] == ["cpu"] * n
        else:
            assert not moves
        before = cond


# ---------------------------------------------------------------------------------------------------------------- LoRA

def full_size(family):
    """The published transformer of a family on the meta device: shapes without memory."""
    from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel, QwenImageTransformer2DModel
    with torch.device("meta"):
        if family == "kontext":
            return FluxTransformer2DModel(guidance_embeds=True)
        if family == "klein":
            return Flux2Transformer2DModel(num_layers=8, num_single_layers=24, num_attention_heads=32,
                                           joint_attention_dim=12288, guidance_embeds=False)
        return QwenImageTransformer2DModel()


@pytest.mark.parametrize("family, targets, linears, millions", [
    ("kontext", "all", 380, 216.7), ("kontext", "attention", 266, None), ("klein", "all", 144, 174.),
    ("klein", "attention", 112, None), ("qwen", "attention", 480, 188.7), ("qwen", "all", 720, None)])
def test_a_lora_of_the_published_transformers_has_the_known_size(family, targets, linears, millions):
    """Catches: layers missed by a name that another family has: klein's fused single blocks hold most of it."""
    editor = SimpleNamespace(transformer=full_size(family), trained={}, copy_weights=lambda *names: None,
                             lora_targets=tiny_editor_class(family).lora_targets)
    model.add_lora(editor, 1, targets=targets)
    assert len(editor.trained) == 2 * linears
    if millions:                                       # at rank 64, counted in the public recipes' own lists
        assert 64 * sum(p.numel() for p in editor.trained.values()) / 1e6 == pytest.approx(millions, abs=.1)


def tiny_editor_class(family):
    return {"kontext": model.KontextEditor, "klein": model.KleinEditor, "qwen": model.QwenEditor}[family]


@FAMILIES
@pytest.mark.parametrize("targets", ["all", "attention"])
def test_every_family_has_its_lists_and_a_name_that_matches_nothing_is_refused(family, targets):
    """Catches: a target that is skipped in silence, so that a part of the model is never trained."""
    editor = tiny_editor(family, PIPES[family]())
    model.add_lora(editor, 2, targets=targets)
    names = {name.rsplit(".", 1)[0] for name in editor.trained}
    assert all(any(name.endswith(target) for name in names) for target in editor.lora_targets[targets])
    fresh = tiny_editor(family, PIPES[family]())
    model.add_lora(fresh, 2, targets="attn.to_q,proj_out")
    assert {name.split(".")[-2] for name in fresh.trained} == {"to_q", "proj_out"}
    for wrong in ("attn.to_q,attn.to_magic", "o_q"):
        with pytest.raises(ValueError, match=wrong.split(",")[-1]):
            model.add_lora(tiny_editor(family, pipe_of(family)), 2, targets=wrong)


def edit(editor, size=(64, 80)):
    return rollout(editor, [one_task(size)], 1, 1, 2, (3,))


@FAMILIES
@pytest.mark.parametrize("targets", ["all", "every"])
def test_a_saved_lora_draws_the_same_picture_in_the_familys_own_pipeline(family, targets, tmp_path, monkeypatch):
    """Catches: a file that diffusers loads without error and without effect, or in part: fused layers left out."""
    pytest.importorskip("peft")
    editor, size = model.add_lora(tiny_editor(family, PIPES[family]()), 4, targets=targets), (64, 80)
    move(editor, .1 if targets == "all" else .03)
    model.save_weights(editor, tmp_path)
    ours = edit(editor)
    pipe, noise = PIPES[family](), draw_noise(editor.latent_shape(size), 3, 0, 0, 0, 0)
    run = lambda: pipelines_own(pipe, family, one_task(size), 2, size, noise, editor.guidance, monkeypatch)
    base, _ = run()
    pipe.load_lora_weights(str(tmp_path))
    theirs, picture = run()
    assert (theirs - base).abs().max() > .01
    assert torch.allclose(ours.x[:, 0, -1], theirs, atol=1e-5)
    difference = (ours.images[:, 1].int() - picture.int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3
    single = load_file(tmp_path / model.LORA_FILE)
    loaded = [name for name, _ in pipe.transformer.named_parameters() if "lora_" in name]
    assert len(single) == len(editor.trained) == len(loaded)


@FAMILIES
def test_a_lora_that_diffusers_wrote_is_the_starting_point(family, tmp_path, monkeypatch):
    """Catches: the alpha in the file's metadata or keys forgotten, so that training starts from another strength."""
    peft = pytest.importorskip("peft")
    pipe, size = PIPES[family](), (64, 80)
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["to_q", "to_k", "to_v", "to_add_out"],
                             rank_pattern={"to_k": 2}, alpha_pattern={"to_v": 3}, init_lora_weights=False,
                             use_rslora=family == "klein")
    pipe.transformer.add_adapter(config)
    layers = peft.get_peft_model_state_dict(pipe.transformer)
    pipe.save_lora_weights(tmp_path, transformer_lora_layers=layers, transformer_lora_adapter_metadata=config.to_dict())
    editor = model.load_weights(tiny_editor(family, PIPES[family]()), tmp_path)
    noise = draw_noise(editor.latent_shape(size), 3, 0, 0, 0, 0)
    theirs, _ = pipelines_own(pipe, family, one_task(size), 2, size, noise, editor.guidance, monkeypatch)
    assert torch.allclose(edit(editor).x[:, 0, -1], theirs, atol=1e-5)
    assert (edit(tiny_editor(family, PIPES[family]())).x[:, 0, -1] - theirs).abs().max() > .01
    model.save_weights(editor, tmp_path / "again")                # alpha folded in: without metadata
    again = model.load_weights(tiny_editor(family, PIPES[family]()), tmp_path / "again")
    assert torch.allclose(edit(again).x[:, 0, -1], theirs, atol=1e-5)


@pytest.mark.parametrize("layout", ["alpha in the keys", "lora.down and lora.up"])
def test_loras_of_other_layouts_are_read_as_the_pipeline_reads_them(layout, tmp_path, monkeypatch):
    """Catches: community files refused, or read without the alpha that they carry in their keys."""
    pytest.importorskip("peft")
    editor, size = tiny_editor("kontext", rank=4, moved=.1), (64, 80)
    model.save_weights(editor, tmp_path)
    state = load_file(tmp_path / model.LORA_FILE)
    if layout.startswith("alpha"):
        state |= {k.replace("lora_A.weight", "alpha"): torch.tensor(8.) for k in state if "lora_A" in k}
    else:
        state = {k.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): v for k, v in state.items()}
    save_file(state, tmp_path / model.LORA_FILE)
    pipe, noise = PIPES["kontext"](), draw_noise(editor.latent_shape(size), 3, 0, 0, 0, 0)
    pipe.load_lora_weights(str(tmp_path))
    theirs, _ = pipelines_own(pipe, "kontext", one_task(size), 2, size, noise, 2.5, monkeypatch)
    loaded = edit(model.load_weights(tiny_editor("kontext"), tmp_path)).x[:, 0, -1]
    assert torch.allclose(loaded, theirs, atol=1e-5)
    same = torch.allclose(loaded, edit(editor).x[:, 0, -1], atol=1e-5)
    assert same != layout.startswith("alpha")


@FAMILIES
def test_gradients_with_checkpointing_are_those_without(family):
    """Catches: layers recomputed with other weights, and LoRA of a family that checkpointing cuts off the graph."""
    gradients = []
    for checkpointing in (False, True):
        editor = tiny_editor(family, PIPES[family](), rank=2, moved=.1)
        if checkpointing:
            editor.transformer.enable_gradient_checkpointing()
        v = editor.velocity(*rows_of(editor, TEXTS[:2], pictures(2, (64, 64)), (64, 64)))
        v.square().sum().backward()
        gradients.append({name: p.grad for name, p in editor.trained.items()})
    without, with_ = gradients
    missing = {name for name, g in without.items() if g is None}
    assert {name for name, g in with_.items() if g is None} == missing
    last_text = ("txt_mlp", "to_add_out")                                # of Qwen's last block: its output goes nowhere
    assert all("blocks.1." in name and any(part in name for part in last_text) for name in missing)
    for name in without.keys() - missing:
        assert torch.allclose(without[name], with_[name], rtol=1e-4, atol=1e-4 * without[name].abs().max())


# ------------------------------------------------------------------------------------------------- training, precision

def settings(algo="grpo", **changes):
    options = dict(algo=algo, tasks=2, group=2, turns=2, denoise=3, updates=1, micro=2, lora_rank=2, window=1,
                   train_steps="0-1" if algo == "grpo" else "0-2", min_std=0) | changes
    return train.parse([word for name, value in options.items() for word in (train.flag(name), str(value))])


def sample(editor, cfg, size=(64, 80), micro=2):
    tasks = [one_task(size, text, TEXTS[2]) for text in TEXTS[:cfg.tasks]]
    window = range(1, 1 + cfg.window) if cfg.algo == "grpo" else range(0)
    with editor.using("old"):
        return rollout(editor, tasks, cfg.group, cfg.turns, cfg.denoise, (0, 1), window, cfg.eta, cfg.step_kind,
                       micro=micro)


def one_update(editor, cfg, trajectory, micro=2):
    A = draw_noise((cfg.tasks * cfg.group, cfg.turns), 9)
    optimizer = torch.optim.AdamW(editor.trained.values(), 1e-3)
    share = train.divide(cfg, 0, 1)._replace(micro=micro)
    return train.update(editor, trajectory, A, torch.ones_like(A, dtype=torch.bool), optimizer, cfg, 9, share)


@FAMILIES
def test_the_ratio_is_exactly_1_in_bfloat16(family):
    """Catches: times, latents or features rounded once in the rollout and twice in the update; LoRA in bfloat16."""
    cfg = settings()
    editor = tiny_editor(family, PIPES[family]().to(torch.bfloat16), rank=2, moved=.05)
    editor.transformer.enable_gradient_checkpointing()                   # as on a GPU
    editor.copy_weights("old")
    trajectory, before = sample(editor, cfg), [p.detach().clone() for p in editor.trained.values()]
    info = one_update(editor, cfg, trajectory)
    assert info["ratio_deviation_1"] == 0 and info["log_ratio"] == 0 and info["grad_norm"] > 0
    assert editor.transformer.dtype == torch.bfloat16 and all(p.dtype == torch.float32 for p in editor.trained.values())
    assert sum((p != q).any().item() for p, q in zip(editor.trained.values(), before)) > len(before) / 2
    assert trajectory.x.dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares a CUDA GPU with the CPU")
@pytest.mark.parametrize("family", ["kontext", "klein"])       # blocks of two kinds
def test_gradients_on_a_gpu_are_those_on_a_cpu(family):
    """Catches: a backward pass of attention that reads a gradient of another layout: cuDNN's, on an H100."""
    size, gradients = (64, 80), []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.float16)):     # cuDNN's takes no float32
        editor = tiny_editor(family, PIPES[family]().to(dtype), rank=2, moved=.05, device=device)
        cond = select(editor.condition(TEXTS[:2], pictures(2, size)), torch.arange(2), editor.device)
        x, context = (draw_noise((2, *editor.latent_shape(size)), place).to(device) for place in (1, 2))
        v = editor.velocity(x, torch.tensor([.7, .7], device=device), cond, context, size)
        v.square().mean((1, 2)).sum().backward()
        gradients.append(torch.cat([p.grad.flatten().cpu() for p in editor.trained.values()]))
    expected, got = gradients
    assert (got - expected).norm() < .05 * expected.norm()


@FAMILIES
def test_the_transformer_gets_the_pipelines_times_in_bfloat16(family, monkeypatch):
    """Catches: t rounded as t where the pipeline rounds 1000 t: another noise level than the editor was trained for."""
    seen, size = [], (64, 80)
    editor, pipe = (tiny_editor(family, PIPES[family]().to(torch.bfloat16), guidance=1), PIPES[family]().to(torch.bfloat16))
    for transformer in (editor.transformer, pipe.transformer):
        transformer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["timestep"]), with_kwargs=True)
    rollout(editor, [one_task(size)], 1, 1, 5, (3,))
    noise = draw_noise(editor.latent_shape(size), 3, 0, 0, 0, 0)
    pipelines_own(pipe, family, one_task(size), 5, size, noise.bfloat16(), 1., monkeypatch)
    ours, theirs = torch.cat(seen[:5]), torch.cat(seen[5:])
    assert len(ours) == len(theirs) == 5 and torch.equal(ours.float(), theirs.float())


def test_a_lora_does_in_bfloat16_what_it_does_in_float32():
    """Catches: the branch that only GPUs take, without the scale or with A and B exchanged."""
    base, x = torch.nn.Linear(48, 32), draw_noise((7, 48), 1)
    lora = model.LoRALinear(base, 4, 12)
    assert lora.A.std().item() == pytest.approx(48 ** -.5, rel=.2)                   # N(0, 1 / in), 192 draws
    lora.B.data = draw_noise(lora.B.shape, 2)
    by_hand = base(x) + 3 * x @ lora.A.T @ lora.B.T
    assert torch.allclose(lora(x), by_hand, atol=1e-5)
    base.to(torch.bfloat16)
    assert (lora(x.bfloat16()).float() - by_hand).norm() < .01 * by_hand.norm() and lora.A.dtype == torch.float32


@FAMILIES
def test_the_ratio_hardly_depends_on_the_micro_batches(family):
    """Catches: conditioning of other rows, and padding that changes a row, when a batch is put together otherwise."""
    cfg = settings()
    editor = tiny_editor(family, PIPES[family](), rank=2, moved=.05)
    editor.copy_weights("old")
    trajectory = sample(editor, cfg, micro=4)
    assert one_update(editor, cfg, trajectory, micro=1)["ratio_deviation_1"] < 1e-5


@FAMILIES
def test_nft_updates_every_family(family):
    """Catches: a family that GRPO alone can train."""
    cfg = settings("nft", guidance=1)
    editor = tiny_editor(family, PIPES[family](), rank=2, moved=.05, guidance=1)
    editor.copy_weights("old")
    info = one_update(editor, cfg, sample(editor, cfg))
    assert info["old_distance"] == 0 and info["grad_norm"] > 0


@pytest.mark.parametrize("family", ["klein", "plus"])
def test_a_run_of_another_family(family, tmp_path, monkeypatch, capsys):
    """Catches: anything in train.py and eval.py that only Kontext has; LoRA count left unsaid."""
    monkeypatch.setattr(model, "load", lambda path, device, guidance, offload, shard=False: tiny_editor(
        family, PIPES[family](), guidance=guidance, offload=offload))
    monkeypatch.setattr(train.reward, "load", lambda *_, **__: Judge())
    for name, size in (("a", (90, 60)), ("b", (64, 64))):
        Image.effect_noise(size, 90).convert("RGB").save(tmp_path / f"{name}.png")
    lines = ['{"image": "%s.png", "instructions": ["Make it blue", "Add a hat"]}' % name for name in "ab"] * 3
    (tmp_path / "tasks.jsonl").write_text("\n".join(lines))
    cfg = settings(data=tmp_path / "tasks.jsonl", resolution=64, steps=1, eval_denoise=2, val_tasks=1,
                   out=tmp_path / "run", guidance=3, lora_targets="all", referee="none")
    cfg.offload = True                                                            # as a flag it wants a GPU
    train.main(cfg)
    out = capsys.readouterr().out
    linears = {"klein": 2 * 12 + 2 * 2, "plus": 2 * 12}[family]                   # two double blocks, two single ones
    assert f"LoRA of {linears} Linears" in out and "3 of 48 x 80, 2 of 64 x 64" in out
    (row,) = (json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert row["update/ratio_deviation_1"] == 0 and row["update/grad_norm"] > 0
    pipe = PIPES[family]()
    pipe.load_lora_weights(str(tmp_path / "run"))
