"""model.py against diffusers itself: the same latents, the same pictures, LoRA files that load and have an effect."""
import math
import os
import re
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import model
from fixtures import ROOT, editor_folder, load_pipe, make_tasks, move, new_editor, record_disk, resized
from rollout import draw_noise, rollout, stack_images

SIZES = pytest.mark.parametrize("size", [(48, 48), (32, 64)], ids=lambda size: "%dx%d" % size)


def same_pictures(a, b):
    """Equal as uint8, but for the rare value that lies within float error of a rounding boundary."""
    difference = (a.int() - b.int()).abs()
    return difference.max() <= 1 and (difference > 0).float().mean() < 1e-3


def as_pil(picture):
    return Image.fromarray(picture.permute(1, 2, 0).numpy())


def pictures(n, size=(48, 48)):
    return stack_images(resized(make_tasks(n), size))


def inputs(editor, n=3, size=(48, 48), seed=7):
    """Arguments of velocity(): n rows that differ in everything."""
    tasks = make_tasks(n)
    tensors, index = editor.condition([task.instructions[0] for task in tasks], None)
    x = torch.stack([draw_noise(editor.latent_shape(size), seed, s) for s in range(n)])
    t = torch.linspace(.9, .2, n)
    return x, t, {name: value[index] for name, value in tensors.items()}, editor.encode(pictures(n, size)), size


def one_turn(pipe, task, T, size, noise, guidance=2.5, **call):
    """diffusers' own edit of a picture, from given noise -> latents (1, N, C)."""
    H, W = size
    return pipe(image=task.image, prompt=task.instructions[0], latents=noise[None], num_inference_steps=T,
                guidance_scale=guidance, height=H, width=W, max_area=H * W, _auto_resize=False, output_type="latent",
                **call).images


# --------------------------------------------------------------------------------------------------- equal to diffusers

@SIZES
def test_encode_equals_the_pipelines_own(size):
    """Catches: a sample in place of the mode, shift and scale swapped, 2 x 2 patches packed in another order."""
    editor, images = new_editor(), pictures(3, size)
    pipe = editor.pipe
    x = pipe.image_processor.preprocess([as_pil(p) for p in images])
    z = pipe._encode_vae_image(x, torch.Generator().manual_seed(0))
    expected = pipe._pack_latents(z, *z.shape)
    assert editor.latent_shape(size) == expected.shape[1:]
    assert torch.allclose(editor.encode(images), expected, atol=1e-5)


@SIZES
def test_decode_equals_the_pipelines_own_as_uint8(size):
    """Catches: truncation in place of rounding, no clamp, height and width swapped in unpacking."""
    editor = new_editor()
    pipe, x = editor.pipe, 2 * draw_noise((3, *editor.latent_shape(size)), 1)
    z = pipe._unpack_latents(x, *size, pipe.vae_scale_factor)
    z = z / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    with torch.no_grad():
        expected = pipe.image_processor.postprocess(pipe.vae.decode(z).sample, output_type="pil")
    ours = editor.decode(x, size)
    assert ours.dtype == torch.uint8 and ours.shape == (3, 3, *size)
    assert same_pictures(ours, torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in expected]))


@SIZES
def test_chunks_of_a_vae_change_no_bit(size, monkeypatch):
    """Catches: a chunk lost or in another order, and one of a single picture, which is not computed as in a batch."""
    editor, images = new_editor(), pictures(7, size)
    x = draw_noise((7, *editor.latent_shape(size)), 1)
    results = []
    for few in (7, 3, 6, 1):                                     # pictures at a time
        monkeypatch.setattr(model, "CHUNK", few * size[0] * size[1])
        results.append((editor.encode(images), editor.decode(x, size)))
    for context, after in results[1:]:
        assert torch.equal(context, results[0][0]) and torch.equal(after, results[0][1])


@pytest.mark.parametrize("size, T", [((48, 48), 8), ((48, 48), 3), ((32, 64), 5)])
def test_one_turn_of_rollout_is_the_pipelines_own_output(size, T):
    """Catches: a wrong time grid, t off by 1000, context with the noise's position ids, rows and columns swapped."""
    editor, pipe, (task,) = new_editor(), load_pipe(), resized(make_tasks(1), size)
    trajectory = rollout(editor, [task], 1, 1, T, (3,))
    noise = draw_noise(editor.latent_shape(size), 3, 0, 0, 0, 0)
    expected = one_turn(pipe, task, T, size, noise, max_sequence_length=14)
    assert torch.allclose(trajectory.x[:, 0, -1], expected, atol=1e-5)
    assert same_pictures(trajectory.images[:, 1], editor.decode(expected, size))
    assert not torch.allclose(expected, one_turn(pipe, task, T, size, 0 * noise, max_sequence_length=14), atol=.1)


def with_transformer(pipe, **changes):
    """The pipeline with a random transformer of another configuration."""
    from diffusers import FluxTransformer2DModel
    torch.manual_seed(1)
    pipe.transformer = FluxTransformer2DModel.from_config({**pipe.transformer.config, **changes}).eval()
    return pipe


def test_embedded_guidance_is_the_pipelines_own():
    """Catches: guidance left out, or scaled by 1000 twice: editors distilled with it would draw other pictures."""
    pipe, (task,) = with_transformer(load_pipe(), guidance_embeds=True), make_tasks(1)
    outputs = []
    for guidance in (2.5, 4.):
        editor = model.KontextEditor(pipe, "cpu", guidance=guidance)
        trajectory = rollout(editor, [task], 1, 1, 3, (3,))
        noise = draw_noise((9, 64), 3, 0, 0, 0, 0)
        outputs.append(one_turn(pipe, task, 3, (48, 48), noise, guidance, max_sequence_length=14))
        assert torch.allclose(trajectory.x[:, 0, -1], outputs[-1], atol=1e-5)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-4


@pytest.mark.parametrize("max_text, call", [(128, {"max_sequence_length": 128}), (512, {})])
def test_text_of_a_long_t5_tokenizer_is_padded_like_the_pipelines_own(max_text, call):
    """Catches: text cut or padded to another length than asked for; the pipeline's own default is 512 tokens."""
    pipe, (task,) = load_pipe(), make_tasks(1)
    pipe.tokenizer_2.model_max_length = 512
    editor = model.KontextEditor(pipe, "cpu", max_text=max_text)
    assert editor.condition(["x"], None)[0]["text"].shape[1] == max_text
    trajectory = rollout(editor, [task], 1, 1, 3, (3,))
    expected = one_turn(pipe, task, 3, (48, 48), draw_noise((9, 64), 3, 0, 0, 0, 0), **call)
    assert torch.allclose(trajectory.x[:, 0, -1], expected, atol=1e-5)


def test_text_is_never_longer_than_the_tokenizers_limit():
    """Catches: position embeddings asked for beyond what a small text encoder has."""
    editor = new_editor()
    limit = editor.pipe.tokenizer_2.model_max_length
    assert limit < editor.max_text and editor.condition(["x"], None)[0]["text"].shape[1] == limit


# ------------------------------------------------------------------------------------------------------------ an editor

def test_a_row_of_a_batch_equals_the_row_alone():
    """Catches: anything shared over rows by mistake (one time, one context or one text for the whole batch)."""
    editor = new_editor()
    x, t, cond, context, size = inputs(editor, 4)
    with torch.no_grad():
        batch = editor.velocity(x, t, cond, context, size)
        for s in range(4):
            one = slice(s, s + 1)
            alone = editor.velocity(x[one], t[one], {n: v[one] for n, v in cond.items()}, context[one], size)
            assert torch.allclose(batch[s], alone[0], atol=1e-5)
    images = pictures(4)
    assert torch.allclose(editor.encode(images)[2], editor.encode(images[2:3])[0], atol=1e-4)  # convolutions round more
    assert same_pictures(editor.decode(x, size)[2], editor.decode(x[2:3], size)[0])


def test_velocity_depends_on_every_input():
    """Catches: an input that is passed along but never read."""
    editor = new_editor()
    x, t, cond, context, size = inputs(editor, 2)
    with torch.no_grad():
        v = editor.velocity(x, t, cond, context, size)
        flipped = {n: u.flip(0) for n, u in cond.items()}
        for changed in ((x.flip(0), t, cond, context), (x, t.flip(0), cond, context), (x, t, flipped, context),
                        (x, t, cond | {"text": flipped["text"]}, context),
                        (x, t, cond | {"pooled": flipped["pooled"]}, context), (x, t, cond, context.flip(0))):
            assert (editor.velocity(*changed, size) - v).abs().max() > 1e-4


def test_text_is_encoded_once_per_distinct_instruction():
    """Catches: the text encoders run once per sample (G times too often), or rows pointed at the wrong text."""
    editor, rows = new_editor(), []
    encode = editor.pipe.encode_prompt
    editor.pipe.encode_prompt = lambda prompt, *a, **k: rows.append(len(prompt)) or encode(prompt, *a, **k)
    texts = ["Make the red star blue", "Remove the ring", "Make the red star blue", "Remove the ring", "Add a cross"]
    tensors, index = editor.condition(texts, None)
    assert rows == [3] and index.tolist() == [0, 1, 0, 1, 2]
    for s, text in enumerate(texts):
        alone, _ = editor.condition([text], None)
        for name in tensors:
            assert torch.allclose(tensors[name][index[s]], alone[name][0], atol=1e-5)


def test_sides_that_are_no_multiple_are_refused():
    """Catches: a reshape error deep in the rollout in place of both numbers."""
    with pytest.raises(ValueError, match="40 x 48.*multiples of 16"):
        new_editor().latent_shape((40, 48))


@pytest.mark.parametrize("T", [1, 4, 28])
def test_times_run_from_1_to_0(T):
    """Catches: a grid without its end, or in diffusers' 0..1000."""
    t = new_editor().times(T, (48, 48))
    assert t.shape == (T + 1,) and t[0] == 1 and t[-1] == 0 and (t.diff() < 0).all()


# ------------------------------------------------------------------------------------------------- LoRA and weight sets

@pytest.mark.parametrize("targets", ["every", "all", "attention"])
def test_a_fresh_lora_changes_nothing_and_alone_is_trained(targets):
    """Catches: B not zero at the start, or gradients that reach the base weights."""
    editor = new_editor()
    args = inputs(editor)
    with torch.no_grad():
        before = editor.velocity(*args)
    model.add_lora(editor, 4, targets=targets)
    assert torch.equal(editor.velocity(*args).detach(), before)
    move(editor, .05)
    v = editor.velocity(*args)
    assert (v - before).abs().max() > 1e-3
    v.square().sum().backward()
    trained = {id(p) for p in editor.trained.values()}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in editor.trained.values())
    assert all(p.grad is None for p in editor.transformer.parameters() if id(p) not in trained)


def test_attention_targets_are_fewer_than_all_and_those_than_every():
    """Catches: a pattern that matches too much (norms, the output) or misses the feed-forward layers."""
    few, all_, every = ({n.rsplit(".", 1)[0] for n in model.add_lora(new_editor(), 2, targets=targets).trained}
                        for targets in ("attention", "all", "every"))
    linears = {n for n, m in new_editor().transformer.named_modules() if isinstance(m, torch.nn.Linear)}
    assert few < all_ < every == linears and all("attn." in n for n in few)
    assert not any("norm" in n or n.startswith("proj_out") for n in all_)
    kinds = {n.split(".", 2)[2] for n in all_}
    assert {"ff.net.0.proj", "ff_context.net.2", "attn.add_q_proj", "attn.to_out.0", "proj_mlp"} <= kinds


def test_an_empty_target_is_refused():
    """Catches: a comma too many in --lora-targets, and LoRA on every Linear in silence."""
    for targets in ("attn.to_q,", ",", ""):
        with pytest.raises(ValueError, match="no Linear .* named like the LoRA target ''"):
            model.add_lora(new_editor(), 2, targets=targets)


def test_a_file_that_cannot_be_finished_leaves_nothing_behind(tmp_path):
    """Catches: half a checkpoint that goes on filling a full disk; torch's words for it, which no user understands."""
    def full(path):
        path.write_text("half")
        raise RuntimeError("unexpected pos 1337856 vs 1337744")

    (tmp_path / "a.pt").write_text("before")
    with pytest.raises(OSError, match="cannot write .*a.pt .is the disk full.*unexpected pos"):
        model.write_whole(tmp_path / "a.pt", full)
    assert [file.name for file in tmp_path.iterdir()] == ["a.pt"] and (tmp_path / "a.pt").read_text() == "before"


def set_apart(editor):
    """Give policy, ref, old and ema four different values; returns the policy's."""
    for seed, name in enumerate(("ref", "old", "ema")):
        editor.copy_weights(name)
        move(editor, .05, seed)
    return [p.detach().clone() for p in editor.trained.values()]


def test_weight_sets_swap_and_come_back():
    """Catches: a set that is another one's, or the policy lost after sampling with `old`."""
    editor = new_editor(4)
    args, policy, seen = inputs(editor), set_apart(editor), {}
    with torch.no_grad():
        for name in ("policy", "ref", "old", "ema"):
            with editor.using(name) as inside:
                assert inside is editor
                expected = policy if name == "policy" else editor.sets[name]
                assert all(torch.equal(p, q) for p, q in zip(editor.trained.values(), expected))
                seen[name] = editor.velocity(*args)
            assert all(torch.equal(p, q) for p, q in zip(editor.trained.values(), policy))
    names = list(seen)
    assert all((seen[a] - seen[b]).abs().max() > 1e-4 for a in names for b in names if a < b)


def test_a_merged_lora_changes_no_bit_and_is_gone_afterwards():
    """Catches: another sum in the merged weight, one kept after the block or after an error in it, one used where
    gradients are wanted, one that takes the place of the LoRA in bfloat16."""
    editor = model.add_lora(new_editor(), 4, targets="every")
    move(editor, .1)
    args = inputs(editor)
    with torch.no_grad():
        expected = editor.velocity(*args)
        with editor.merged():
            assert torch.equal(editor.velocity(*args), expected)
    with torch.no_grad(), pytest.raises(KeyError), editor.merged():
        with torch.enable_grad():                                # a gradient is wanted that this sum cannot carry
            assert editor.velocity(*args).requires_grad
        raise KeyError
    move(editor, .1, seed=1)
    with torch.no_grad():
        changed = editor.velocity(*args)
    assert not torch.equal(changed, expected)

    editor.transformer.to(torch.bfloat16)
    editor.dtype = torch.bfloat16
    with torch.no_grad():
        expected = editor.velocity(*args)
        with editor.merged():
            assert torch.equal(editor.velocity(*args), expected)


def test_gradients_of_several_forwards_reach_the_lora_through_one_merged_weight():
    """Catches: a gradient of the last forward only, of the wrong weight set, counted twice, or without alpha / r."""
    editor = model.add_lora(new_editor(), 4, alpha=6, targets="every")
    move(editor, .1)
    several = [inputs(editor, seed=seed) for seed in (7, 8)]

    def learn():
        """Losses as an update has them: a forward of another set comes in between."""
        for args in several:
            with torch.no_grad(), editor.using("old"):
                v_old = editor.velocity(*args)
            (editor.velocity(*args) - v_old).square().mean().backward()
        return v_old
    v_old = learn()
    expected = [p.grad.clone() for p in editor.trained.values()]
    for p in editor.trained.values():
        p.grad = None
    with editor.merged():
        assert torch.equal(learn(), v_old)
    for p, gradient in zip(editor.trained.values(), expected):
        assert torch.allclose(p.grad, gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max())


def test_the_policy_comes_back_after_an_exception_and_from_inside_another_set():
    """Catches: a failed rollout that leaves `old` in place, so that training goes on from it."""
    editor = new_editor(4)
    policy = set_apart(editor)
    with pytest.raises(KeyError):
        with editor.using("old"), editor.using("ref"):
            raise KeyError
    assert all(torch.equal(p, q) for p, q in zip(editor.trained.values(), policy))
    with editor.using("old"):
        with editor.using("ref"):
            pass
        assert all(torch.equal(p, q) for p, q in zip(editor.trained.values(), editor.sets["old"]))


def test_sets_are_copies():
    """Catches: `old` and `ref` that share memory with the policy, and so follow every optimizer step."""
    editor = new_editor(4)
    before = {name: [v.clone() for v in values] for name, values in editor.sets.items()}
    move(editor, 1.)
    assert set(before) == {"ref", "old", "ema"}
    assert all(torch.equal(v, w) for name in before for v, w in zip(before[name], editor.sets[name]))


def test_blend_keeps_the_share_it_says():
    """Catches: keep and 1 - keep swapped (an EMA of decay .9 that forgets 90 % at each update)."""
    editor = new_editor(4)
    policy = set_apart(editor)
    old, ref = ([v.clone() for v in editor.sets[name]] for name in ("old", "ref"))
    editor.blend("old", .9)
    assert all(torch.allclose(v, .9 * o + .1 * p, atol=1e-6) for v, o, p in zip(editor.sets["old"], old, policy))
    assert all(torch.equal(p, q) for p, q in zip(editor.trained.values(), policy))
    assert all(torch.equal(v, w) for v, w in zip(editor.sets["ref"], ref))


# -------------------------------------------------------------------------------------------------------- save and load

@pytest.mark.parametrize("rank, alpha", [(4, 12), (8, 8)])
def test_a_saved_lora_draws_the_same_picture_in_a_fresh_diffusers_pipeline(tmp_path, rank, alpha):
    """Catches: a file that diffusers loads without error and without effect, or with alpha / rank lost."""
    pytest.importorskip("peft")
    editor, (task,) = new_editor(rank, alpha, moved=.1), make_tasks(1)
    model.save_weights(editor, tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    ours = rollout(editor, [task], 1, 1, 4, (3,)).x[:, 0, -1]

    pipe, noise = load_pipe(), draw_noise((9, 64), 3, 0, 0, 0, 0)
    base = one_turn(pipe, task, 4, (48, 48), noise, max_sequence_length=14)
    pipe.load_lora_weights(str(tmp_path))
    theirs = one_turn(pipe, task, 4, (48, 48), noise, max_sequence_length=14)
    assert (theirs - base).abs().max() > .01
    assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("as_folder", [True, False])
def test_our_own_loader_gives_the_same_velocity(tmp_path, as_folder):
    """Catches: A and B swapped, alpha / rank applied twice, or sets that still hold the weights before loading."""
    editor = new_editor(4, 12, moved=.1)
    args = inputs(editor)
    model.save_weights(editor, tmp_path)
    loaded = model.load_weights(new_editor(), tmp_path if as_folder else tmp_path / model.LORA_FILE)
    with torch.no_grad():
        expected, base = editor.velocity(*args), new_editor().velocity(*args)
        assert torch.allclose(loaded.velocity(*args), expected, atol=1e-5)
        assert (expected - base).abs().max() > 1e-3
        for name in ("old", "ref", "ema"):
            with loaded.using(name):
                assert torch.allclose(loaded.velocity(*args), expected, atol=1e-5)
    loaded.velocity(*args).sum().backward()
    assert all(p.grad is not None for p in loaded.trained.values())


def test_the_set_asked_for_is_saved(tmp_path):
    """Catches: the policy written where the averaged weights were asked for."""
    editor = new_editor(4, 8)
    set_apart(editor)
    model.save_weights(editor, tmp_path, "ema")
    state = load_file(tmp_path / model.LORA_FILE)
    names = [n.removesuffix(".A") for n in editor.trained if n.endswith(".A")]
    assert len(state) == 2 * len(names)
    values = dict(zip(editor.trained, editor.sets["ema"]))
    for name in names:
        assert torch.equal(state[f"transformer.{name}.lora_A.weight"], values[f"{name}.A"])
        assert torch.allclose(state[f"transformer.{name}.lora_B.weight"], 2 * values[f"{name}.B"])


def spoilt_loras():
    A, B = (f"transformer.transformer_blocks.0.attn.to_q.lora_{letter}.weight" for letter in "AB")
    good = {A: torch.zeros(4, 128), B: torch.zeros(128, 4)}
    return {
        "another width": {A: torch.zeros(4, 256), B: torch.zeros(256, 4)},
        "another module": {k.replace("to_q", "to_magic"): v for k, v in good.items()},
        "peft's layout": {k.replace("transformer.", "base_model.model.", 1): v for k, v in good.items()},
        "B missing": {A: good[A]},
        "ranks of A and B differ": {A: good[A], B: torch.zeros(128, 2)},
        "a bias too": good | {B.replace("weight", "bias"): torch.zeros(128)},
        "DoRA by PEFT": good | {A.replace("lora_A", "lora_magnitude_vector"): torch.zeros(128)},
        "DoRA by others": good | {A.replace("lora_A.weight", "dora_scale"): torch.zeros(128, 1)},
        "no LoRA at all": {},
    }


@pytest.mark.parametrize("spoilt", spoilt_loras())
def test_a_lora_of_another_model_is_refused(tmp_path, spoilt):
    """Catches: keys skipped in silence, so that a run starts from, or evaluates, the base model."""
    save_file(spoilt_loras()[spoilt], tmp_path / model.LORA_FILE)
    with pytest.raises(ValueError, match="safetensors.*(fit|LoRA)") as error:
        model.load_weights(new_editor(), tmp_path)
    assert "\n" not in str(error.value)


def test_a_lora_file_that_is_missing_or_broken_is_refused(tmp_path):
    """Catches: a loader's own exception, with a traceback, for a mistyped path or a cut download."""
    with pytest.raises(ValueError, match="no LoRA at .*nowhere"):
        model.load_weights(new_editor(), tmp_path / "nowhere")
    (tmp_path / model.LORA_FILE).write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match=model.LORA_FILE):
        model.load_weights(new_editor(), tmp_path)


def test_rank_0_trains_saves_and_loads_the_whole_transformer(tmp_path):
    """Catches: frozen parts in full fine-tuning, or a save that keeps the base weights."""
    from diffusers import FluxTransformer2DModel
    editor = new_editor(0)
    assert list(editor.trained) == [n for n, _ in editor.transformer.named_parameters()]
    assert all(p.requires_grad for p in editor.trained.values())
    args = inputs(editor)
    move(editor, .01)
    editor.copy_weights("ema")
    move(editor, .01)
    model.save_weights(editor, tmp_path, "ema")
    theirs = FluxTransformer2DModel.from_pretrained(tmp_path / "transformer").state_dict()
    assert all(torch.equal(theirs[n], v) for n, v in zip(editor.trained, editor.sets["ema"]))
    loaded = model.load_weights(new_editor(), tmp_path)
    with torch.no_grad(), editor.using("ema"):
        assert torch.allclose(loaded.velocity(*args), editor.velocity(*args), atol=1e-5)
    loaded.velocity(*args).sum().backward()
    assert list(loaded.trained) == list(editor.trained) and any(p.grad is not None for p in loaded.trained.values())


def test_alphas_that_mean_nothing_are_refused(tmp_path):
    """Catches: --lora-alpha 0 trains for hours without an effect, -5 in the wrong direction; nan in a file's keys."""
    for alpha in (0, -5, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"alpha {alpha}"):
            model.add_lora(new_editor(), 4, alpha)
    model.save_weights(new_editor(4, moved=.1), tmp_path)
    state = load_file(tmp_path / model.LORA_FILE)
    keys = [key.replace("lora_A.weight", "alpha") for key in state if "lora_A" in key]
    save_file(state | {key: torch.tensor(math.nan) for key in keys}, tmp_path / model.LORA_FILE)
    with pytest.raises(ValueError, match="alpha nan"):
        model.load_weights(new_editor(), tmp_path)


def test_rank_0_wants_float32():
    """Catches: full fine-tuning in bfloat16, in which most weights never move at a step of 1e-4."""
    with pytest.raises(ValueError, match="bfloat16.*never move") as error:
        model.add_lora(new_editor(dtype=torch.bfloat16), 0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(tmp_path, value):
    """Catches: one bad gradient that overwrites the only good LoRA; a run that starts from NaN and ends with exit 0."""
    editor = new_editor(4, moved=.1)
    model.save_weights(editor, tmp_path)
    good = (tmp_path / model.LORA_FILE).read_bytes()
    name = list(editor.trained)[5]
    with torch.no_grad():
        editor.trained[name].view(-1)[3] = value
    with pytest.raises(ValueError, match=f"{model.LORA_FILE}.*not finite.*{name.split('.')[-2]}"):
        model.save_weights(editor, tmp_path)
    assert (tmp_path / model.LORA_FILE).read_bytes() == good and len(list(tmp_path.iterdir())) == 1

    state = load_file(tmp_path / model.LORA_FILE)
    key = sorted(state)[7]
    state[key].view(-1)[0] = value
    save_file(state, tmp_path / model.LORA_FILE)
    with pytest.raises(ValueError, match=f"not finite.*{key}"):
        model.load_weights(new_editor(), tmp_path)


@pytest.mark.parametrize("rank", [4, 0])
def test_what_cannot_be_written_is_an_oserror_and_leaves_the_file_as_it_was(tmp_path, rank, monkeypatch):
    """Catches: a full disk, told as a traceback of safetensors; half a file in the place of the last good one."""
    editor = new_editor(rank, moved=.01)
    model.save_weights(editor, tmp_path)
    file = model.find_weights(tmp_path)
    good = file.read_bytes()
    move(editor, .01)

    def full_disk(state, path, metadata=None):
        Path(path).write_bytes(b"half of it")
        raise model.SafetensorError("I/O error: No space left on device\nat some line")

    with monkeypatch.context() as patch:
        patch.setattr(model, "save_file", full_disk)
        with pytest.raises(OSError, match=f"{file.name}.*No space left") as error:
            model.save_weights(editor, tmp_path)
    assert "\n" not in str(error.value) and file.read_bytes() == good
    model.load_weights(new_editor(), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write .*file"):
        model.save_weights(editor, tmp_path / "file")
    model.save_weights(editor, tmp_path)                          # what is left of the failure is not in the way
    assert file.read_bytes() != good and not list(tmp_path.rglob("*.tmp"))


def test_a_file_is_on_the_disk_before_it_takes_the_old_ones_place(tmp_path, monkeypatch):
    """Catches: a rename that survives a power cut while the bytes do not: an empty file where a good one was; a file
    whose name, or whose new folder, is gone after one although it was written."""
    calls = record_disk(monkeypatch)
    model.save_weights(new_editor(4, moved=.1), tmp_path)
    temporary, file = (str(tmp_path / name) for name in (model.LORA_FILE + ".tmp", model.LORA_FILE))
    assert calls == [("fsync", temporary), ("replace", temporary, file), ("fsync", str(tmp_path))]
    del calls[:]
    file = tmp_path / "new" / "folder" / "file"
    model.write_whole(file, lambda path: path.write_text("whole"))
    assert calls[:2] == [("fsync", f"{file}.tmp"), ("replace", f"{file}.tmp", str(file))]
    assert calls[2:] == [("fsync", str(folder)) for folder in (file.parent, file.parent.parent, tmp_path)]


def test_a_folder_that_cannot_be_brought_to_the_disk_is_no_reason_to_stop(tmp_path, monkeypatch):
    """Catches: a network's file system, on which a folder has no fsync, and so no run could save anything."""
    fsync = os.fsync

    def only_files(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(22, "Invalid argument")
        fsync(handle)
    monkeypatch.setattr(os, "fsync", only_files)
    model.write_text(tmp_path / "new" / "file", "whole")
    assert (tmp_path / "new" / "file").read_text() == "whole"


def test_a_hub_id_that_cannot_be_reached_is_told_as_one(monkeypatch):
    """Catches: "no file named model_index.json", and nothing of a network, on a machine without one."""
    def load_pipeline(*_):                                        # what diffusers says after half a minute
        raise OSError("nobody/nothing does not appear to have a file named model_index.json.\nmore")
    monkeypatch.setattr(model, "load_pipeline", load_pipeline)
    with pytest.raises(ValueError, match="can be loaded .no folder here; a hub id needs a network") as error:
        model.load("nobody/nothing")
    assert "\n" not in str(error.value)


@pytest.mark.skipif(os.name != "posix", reason="no umask here")
@pytest.mark.parametrize("umask, rights", [(0o022, 0o644), (0o007, 0o660)])
def test_weights_may_be_read_by_whom_the_umask_lets(tmp_path, umask, rights):
    """Catches: a LoRA in a shared folder that nobody else can load: safetensors 0.8 makes files for their owner alone."""
    (tmp_path / f"{model.LORA_FILE}.tmp").touch(0o600)            # of a run that was killed
    before = os.umask(umask)
    try:
        model.save_weights(new_editor(4, moved=.1), tmp_path)
    finally:
        os.umask(before)
    assert model.find_weights(tmp_path).stat().st_mode & 0o777 == rights


def test_a_transformer_of_another_model_is_refused(tmp_path):
    """Catches: a traceback of many lines for weights of another width, or missing ones left as they were."""
    model.save_weights(new_editor(0), tmp_path)
    file = tmp_path / "transformer" / model.WHOLE_FILE
    state = load_file(file)
    lost = state.pop("proj_out.weight")
    for spoilt in (state, state | {"proj_out.weight": lost[:, :5].contiguous()},
                   state | {"proj_out.weight": lost * math.nan}):
        save_file(spoilt, file)
        with pytest.raises(ValueError, match=model.WHOLE_FILE) as error:
            model.load_weights(new_editor(), tmp_path)
        assert "\n" not in str(error.value)


class PipelineOfTheDocs:
    """What the snippet of docs/editors.md gets in place of 12 B parameters: the embedded ones, from rollout's noise."""

    def __init__(self, folder):
        self.folder, self.turn, self.pipe = folder, 0, load_pipe()
        self.pipe.tokenizer_2.model_max_length = 512              # as the real one's: the embedded one's is 14

    def to(self, device):
        return self

    def load_lora_weights(self, folder):
        self.pipe.load_lora_weights(str(self.folder))

    def __call__(self, **call):
        noise = draw_noise((9, 64), 3, 0, 0, self.turn, 0)
        self.turn += 1
        return self.pipe(latents=noise[None], **call)


def test_the_docs_snippet_for_diffusers_makes_the_pictures_that_eval_makes(tmp_path, monkeypatch):
    """Catches: a documented call that pads the text to 512 tokens, or edits a picture of 1 MP in place of its own."""
    pytest.importorskip("peft")
    (snippet,) = re.findall(r"```python\n(import torch.*?)```", (ROOT / "docs" / "editors.md").read_text(), re.DOTALL)
    editor, (task,) = model.KontextEditor(PipelineOfTheDocs(tmp_path).pipe, "cpu"), make_tasks(1)
    model.add_lora(editor, 4)
    move(editor, .05)
    model.save_weights(editor, tmp_path)
    task.instructions = ["Make the cat black", "Add a red scarf"]
    assert all(f'"{text}"' in snippet for text in task.instructions)
    ours = rollout(editor, [task], 1, 2, 28, (3,)).images

    pipe = PipelineOfTheDocs(tmp_path)
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", lambda *_, **__: pipe)
    monkeypatch.setattr(Image, "open", lambda path: task.picture())
    names = {}
    exec(snippet, names)
    theirs = torch.from_numpy(np.array(names["picture"])).permute(2, 0, 1)
    assert same_pictures(ours[0, 2], theirs) and not same_pictures(ours[0, 1], theirs)


# ------------------------------------------------------------------------------------------------------------ no editor

def no_editors(folder):
    """Folders that are no editor, each with the words its refusal must hold."""
    index = lambda text: (folder / "model_index.json").write_text(text)
    return {
        "empty": (lambda: None, "no editor"),
        "index is not JSON": (lambda: index("{"), "no editor"),
        "index is a list": (lambda: index("[1]"), "no editor"),
        "index without a class": (lambda: index("{}"), "no editor"),
        "another pipeline": (lambda: index('{"_class_name": "StableDiffusionPipeline"}'), "StableDiffusion.*Kontext"),
        "weights missing": (lambda: shutil.copytree(editor_folder(), folder, dirs_exist_ok=True,
                                                    ignore=shutil.ignore_patterns("diffusion_pytorch*")), "no editor"),
        "no such path": (lambda: folder.rmdir(), "no editor"),
    }


@pytest.mark.parametrize("case", no_editors(Path()))
def test_what_is_no_editor_is_refused(tmp_path, case):
    """Catches: a traceback from deep inside diffusers, or another family run as if it were Kontext."""
    (tmp_path / "x").mkdir()
    make, words = no_editors(tmp_path / "x")[case]
    make()
    with pytest.raises(ValueError, match=words) as error:
        model.load(str(tmp_path / "x"))
    assert str(tmp_path / "x") in str(error.value) and "\n" not in str(error.value)


def spoil_tensor(folder, part, value):
    """A copy of the embedded editor's files in which one tensor of a part is missing (value None), or holds a value."""
    shutil.copytree(editor_folder(), folder, dirs_exist_ok=True)
    (file,) = (folder / part).glob("*.safetensors")
    state = load_file(file)
    name = sorted(state)[len(state) // 2]
    if value is None:
        del state[name]
    else:
        state[name].view(-1)[-1] = value
    save_file(state, file, {"format": "pt"})
    return name


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "text_encoder_2"])
def test_an_editor_with_a_missing_or_spoilt_tensor_is_refused(tmp_path, part, value, capfd):
    """Catches: layers drawn at random with a mere warning; a run on a model that answers NaN to everything."""
    name = spoil_tensor(tmp_path / "x", part, value)
    with pytest.raises(ValueError, match=f"{part}/ .*{re.escape(name)}") as error:
        model.load(str(tmp_path / "x"))
    assert ("lacks" if value is None else "not finite") in str(error.value) and "\n" not in str(error.value)
    assert "TRAIN this model" not in "".join(capfd.readouterr())


FILES = ["tokenizer/tokenizer.json", "tokenizer_2/tokenizer.json", "tokenizer_2/tokenizer_config.json", "tokenizer",
         "text_encoder_2/config.json", "text_encoder", "vae/config.json", "scheduler/scheduler_config.json"]


@pytest.mark.parametrize("lost", FILES)
def test_an_editor_with_a_missing_file_is_refused_before_its_models_are_read(tmp_path, lost, monkeypatch):
    """Catches: a tokenizer without words, or a text encoder of default size, made up in silence: exit 0 at the end."""
    folder = tmp_path / "x"
    shutil.copytree(editor_folder(), folder)
    shutil.rmtree(folder / lost) if (folder / lost).is_dir() else (folder / lost).unlink()
    monkeypatch.setattr(model, "check_finite", lambda *_: pytest.fail("a model was loaded before the refusal"))
    with pytest.raises(ValueError, match=f"no editor.* {lost.split('/')[0]}/ is not whole"):
        model.load(str(folder))


@pytest.mark.parametrize("guidance", [math.nan, math.inf, -3., -math.inf])
def test_guidance_that_is_no_number_from_0_up_is_refused_before_anything_is_loaded(guidance):
    """Catches: minutes of loading and hours of training at a guidance of nan."""
    with pytest.raises(ValueError, match=f"--guidance {guidance}"):
        model.load("no/such/editor", guidance=guidance)


def test_small_editors_are_float32_and_large_ones_bfloat16_except_on_a_cpu(tmp_path):
    """Catches: the embedded world in bfloat16 on a GPU, which is not what the README measured; 12 B in float32."""
    small, large = editor_folder(), tmp_path / "x"
    shutil.copytree(small, large)
    with open(large / "transformer" / "more.safetensors", "wb") as file:
        file.truncate(10 ** 9)                                    # takes no room on the disk
    for folder, on_cpu, dtype in ((small, True, torch.float32), (small, False, torch.float32),
                                  (large, True, torch.float32), (large, False, torch.bfloat16)):
        pipe = model.load_pipeline(folder, None, on_cpu)
        assert {part.dtype for part in (pipe.transformer, pipe.vae, pipe.text_encoder)} == {dtype}
    assert model.load(small, dtype=torch.bfloat16).transformer.dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------------- where and what

def fake_hub(folder, monkeypatch):
    """A hub cache that holds the embedded editor as me/tiny."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    repo = folder / "models--me--tiny"
    shutil.copytree(editor_folder(), repo / "snapshots" / "abc")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")


def test_a_hub_id_is_loaded_and_fingerprinted_from_the_cache(tmp_path, monkeypatch):
    """Catches: an editor of the hub that only loads with a network, or whose content is not looked at."""
    fake_hub(tmp_path, monkeypatch)
    editor = model.load("me/tiny")
    assert torch.equal(editor.transformer.proj_out.weight, new_editor().transformer.proj_out.weight)
    assert model.fingerprint("me/tiny") == model.fingerprint(editor_folder())
    with pytest.raises(ValueError, match="--model me/other is no editor"):
        model.load("me/other")
    assert model.fingerprint("me/other") not in (model.fingerprint("me/tiny"), model.fingerprint("me/another"))


def test_the_embedded_editor_is_found_from_any_folder(tmp_path, monkeypatch):
    """Catches: the first command of the README fails, or asks the hub for minutes, outside the repository."""
    monkeypatch.chdir(tmp_path)
    if (ROOT / "shapes" / "editor").is_dir():
        assert isinstance(model.load("shapes/editor"), model.KontextEditor)
        assert model.fingerprint("shapes/editor") == model.fingerprint(ROOT / "shapes" / "editor")


def test_a_fingerprint_is_that_of_the_content(tmp_path):
    """Catches: other weights in the same place taken for the same model; the same ones elsewhere for others."""
    a, b = tmp_path / "a", tmp_path / "b"
    shutil.copytree(editor_folder(), a)
    shutil.copytree(editor_folder(), b)
    one = model.fingerprint(a)
    (b / "README.md").write_text("not loaded")
    assert one == model.fingerprint(b) == model.fingerprint(str(a)) and re.fullmatch("[0-9a-f]{16}", one)
    seen = {one}
    for file in sorted(b.rglob("*.json")) + sorted(b.rglob("*.safetensors")):
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)
        seen.add(model.fingerprint(b))
    assert len(seen) == 1 + len(list(b.rglob("*.json"))) + len(list(b.rglob("*.safetensors")))
    with pytest.raises(ValueError, match="no LoRA at"):
        model.fingerprint(tmp_path)


def test_the_fingerprint_of_a_lora_is_that_of_its_file_alone(tmp_path):
    """Catches: a run whose metrics grow and whose LoRA therefore seems to be another; a folder unlike its file."""
    model.save_weights(new_editor(4, moved=.1), tmp_path / "a")
    model.save_weights(new_editor(4, moved=.2), tmp_path / "b")
    one = model.fingerprint(tmp_path / "a")
    (tmp_path / "a" / "metrics.jsonl").write_text("{}")
    (tmp_path / "a" / "config.json").write_text("{}")
    assert one == model.fingerprint(tmp_path / "a") == model.fingerprint(tmp_path / "a" / model.LORA_FILE)
    assert one != model.fingerprint(tmp_path / "b")


def test_a_large_file_is_looked_at_from_end_to_end(tmp_path):
    """Catches: minutes of reading for a model of 24 GB, or a look at its beginning alone."""
    file = tmp_path / "large.safetensors"
    with open(file, "wb") as content:
        content.truncate(600 << 20)
    seen, size = {model.fingerprint(file)}, file.stat().st_size
    for part in (0, 100, 255):
        with open(file, "r+b") as content:
            content.seek(part * (size // 256) + 5)
            content.write(b"x")
        seen.add(model.fingerprint(file))
    assert len(seen) == 4


@pytest.mark.parametrize("amx, avx512_bf16, amd, device, yes", [
    (True, True, False, "cpu", True), (True, False, False, "cpu", True), (False, True, True, "cpu", True),
    (False, True, False, "cpu", False), (False, False, True, "cpu", False), (True, True, True, "cuda", False)])
def test_a_cpu_multiplies_in_bfloat16_where_that_is_faster(amx, avx512_bf16, amd, device, yes, monkeypatch):
    """Catches: bfloat16 on an Intel CPU with avx512_bf16 alone, where a step takes half as long again."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16, raising=False)
    monkeypatch.setattr(model, "made_by_amd", lambda: amd)
    assert model.multiplies_in_bfloat16(device) is yes


def test_the_example_at_the_top_of_the_file_runs(monkeypatch):
    """Catches: a line that a reader copies, and that fails."""
    monkeypatch.chdir(ROOT)
    code = "\n".join(line.strip() for line in model.__doc__.splitlines() if line.startswith("    "))
    tasks, size = make_tasks(3), (48, 48)
    source = stack_images(tasks)
    first, _, last = (task.instructions[0] for task in tasks)
    names = vars(model) | {"instructions": [first, first, last], "pictures": source,
                           "size": size, "x": torch.randn(3, 9, 64), "t": torch.full((3,), .5)}
    exec(code, names)
    assert names["v"].shape == (3, 9, 64) and names["pictures"].shape == source.shape and "old" in names["editor"].sets
