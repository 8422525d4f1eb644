"""model.py for every family of editors, on tiny random-weight pipelines of the real classes, against diffusers itself."""
import functools

import numpy as np
import pytest
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus

from fixtures import PIPES, make_tasks, resized, tiny_editor
from rollout import draw_noise, rollout, stack_images

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


def one_task(size, text=TEXTS[0]):
    from PIL import Image
    (task,) = make_tasks(1)
    task.image = Image.fromarray(pictures(1, size)[0].permute(1, 2, 0).numpy()).resize(size[::-1])
    task.instructions = [text]
    return task


def pipelines_own(pipe, family, task, T, size, noise, guidance, monkeypatch):
    """diffusers' own edit from given noise -> latents (1, N, C) before its decoder, picture (1, 3, H, W) uint8."""
    H, W = size
    last = []
    call = dict(image=task.image, prompt=task.instructions[0], latents=noise[None], num_inference_steps=T, height=H, width=W,
                callback_on_step_end=lambda pipe, i, t, kwargs: last.append(kwargs["latents"]) or {})
    if family == "kontext":
        call |= dict(guidance_scale=guidance, max_area=H * W, _auto_resize=False, max_sequence_length=14)
    elif family == "klein":
        latents = noise.T.reshape(1, -1, H // 16, W // 16)
        call |= dict(guidance_scale=guidance, latents=latents, max_sequence_length=48)
    else:
        call |= dict(true_cfg_scale=guidance, negative_prompt=" " if guidance > 1 else None)
        edit, plus = pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus           # their context: 1 MP whatever is asked for
        original = plus.calculate_dimensions
        monkeypatch.setattr(edit, "calculate_dimensions", lambda area, ratio: (W, H, None))
        monkeypatch.setattr(plus, "calculate_dimensions",
                            lambda area, ratio: (W, H) if area == plus.VAE_IMAGE_SIZE else original(area, ratio))
    (picture,) = pipe(**call).images
    return last[-1], torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]


CASES = {
    "kontext": ("kontext", {}, 2.5), "kontext, guidance distilled": ("kontext", dict(guidance_embeds=True), 4.),
    "klein": ("klein", {}, 1.), "klein, true CFG": ("klein", {}, 4.), "klein, distilled": ("klein", dict(is_distilled=True), 4.),
    "qwen": ("qwen", {}, 1.), "qwen, true CFG": ("qwen", {}, 4.), "plus": ("plus", dict(zero_cond_t=True), 1.),
    "plus, true CFG": ("plus", {}, 3.),
}


@pytest.mark.parametrize("case", CASES)
@SIZES
def test_one_turn_of_rollout_is_the_pipelines_own_output(case, size, monkeypatch):
    """Catches: another time shift, packing, position ids, normalisation, prompt template, or arithmetic of the guidance."""
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
