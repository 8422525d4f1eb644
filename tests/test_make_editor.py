"""How the embedded editor is made: reproducible, resumable, and of parts that fit the world."""
import hashlib
import random
import re
import runpy
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from fixtures import ROOT
from shapes import make_editor, world

TOKENIZERS = """
import sys
sys.path.insert(0, "tests")
from test_make_editor import digest, make_editor
print(*map(digest, make_editor.build_tokenizers()))
"""


def digest(tokenizer):
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def test_the_tokenizers_are_the_same_at_every_making():
    """Catches: token numbers that depend on a hash seed: the same seeds would make another editor each time."""
    run = subprocess.run([sys.executable, "-c", TOKENIZERS], cwd=ROOT, check=True, capture_output=True, text=True)
    here = [digest(tokenizer) for tokenizer in make_editor.build_tokenizers()]
    assert run.stdout.split() == here and len(set(here)) == 2


def test_every_word_of_the_world_is_a_token_and_every_instruction_fits():
    """Catches: words cut into letters, instructions cut at the end: the editor would be told less than it is asked."""
    clip, t5 = make_editor.build_tokenizers()
    for split in ("train", "test"):
        for instructions, _, _ in world.dialogues(split, 300, 3):
            for text in instructions:
                words = text.split()
                assert [token.removesuffix("</w>") for token in clip.tokenize(text)] == [word.lower() for word in words]
                assert [token.removeprefix("\u2581") for token in t5.tokenize(text)] == words
                assert len(clip(text).input_ids) <= clip.model_max_length
                assert len(t5(text).input_ids) <= t5.model_max_length


def make(work):
    """Three steps of each -> all weights."""
    vae = make_editor.train_vae(work, 3, batch=2)
    pipe = make_editor.train_flow(work, vae, 3, batch=4)
    parts = pipe.vae, pipe.transformer, pipe.text_encoder, pipe.text_encoder_2
    return [value for part in parts for value in part.state_dict().values()]


def test_a_making_that_is_killed_goes_on_bit_for_bit(tmp_path, monkeypatch):
    """Catches: a run that goes on with other noise, another order or a fresh average, or that cannot go on at all."""
    monkeypatch.setattr(make_editor, "DIALOGUES", 20)
    straight = make(tmp_path / "a")
    save, kills = make_editor.save_progress, 0

    def save_and_die(*args, **more):
        save(*args, **more)
        raise KeyboardInterrupt

    monkeypatch.setattr(make_editor, "SAVE_EVERY", 1)
    monkeypatch.setattr(make_editor, "save_progress", save_and_die)
    while kills < 6:
        torch.manual_seed(kills)                                        # whatever else draws numbers meanwhile
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "b")
        kills += 1
    resumed = make(tmp_path / "b")
    assert len(straight) == len(resumed) > 200
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed))


def test_what_the_flow_model_should_say_is_noise_minus_picture():
    """Catches: the velocity's sign, the context taken for the target, a time that runs the other way."""
    pipe = make_editor.build_pipeline(make_editor.build_vae())
    context, x_0, eps = torch.randn(3, 2, 9, 64).unbind(0)
    seen = {}

    def transformer(**inputs):
        seen.update(inputs)
        return (torch.cat([eps - x_0, context], 1),)

    pipe.transformer = transformer
    ids = [tokenizer(["Make the red star blue"] * 2, return_tensors="pt").input_ids
           for tokenizer in (pipe.tokenizer, pipe.tokenizer_2)]
    t = torch.tensor([.25, 1.])
    assert make_editor.flow_loss(pipe, context, x_0, eps, t, *ids) == 0
    assert torch.allclose(seen["hidden_states"][0, :9], .75 * x_0[0] + .25 * eps[0])
    assert torch.equal(seen["hidden_states"][1, :9], eps[1]) and torch.equal(seen["hidden_states"][:, 9:], context)
    assert seen["img_ids"][:9, 0].tolist() == [0] * 9 and seen["img_ids"][9:, 0].tolist() == [1] * 9


def test_read_back_counts_what_the_exact_judge_reads():
    """Catches: a share of scenes taken for one of cells, or a perfect VAE that reads as a bad one."""
    class Perfect:
        """A VAE whose latents are the pictures themselves."""
        def encode(self, x):
            return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: x))

        def decode(self, x):
            return SimpleNamespace(sample=x)

    scenes, cells, distance = make_editor.read_back(Perfect(), n=20)
    assert scenes == cells == 1 and distance < 1e-5

    class OneCellLost(Perfect):
        def decode(self, x):
            x, noise = x.clone(), torch.Generator().manual_seed(0)
            x[:, :, :world.CELL, :world.CELL] = torch.rand(world.CELL, world.CELL, generator=noise)
            return super().decode(x)

    scenes, cells, distance = make_editor.read_back(OneCellLost(), n=20)
    assert scenes == 0 and cells == pytest.approx(8 / 9) and distance > .001


def test_the_vaes_scenes_hold_every_content_on_every_background():
    """Catches: an object that the VAE never sees, so that no editor could draw it."""
    rng = random.Random(0)
    scenes = [make_editor.crowd(rng) for _ in range(400)]
    assert {content for scene in scenes for content in scene.cells} == set(world.CONTENTS)
    assert {scene.background for scene in scenes} == set(world.BACKGROUNDS)
    x = make_editor.pixels(scenes[:3])
    assert x.shape == (3, 3, world.SIZE, world.SIZE) and x.min() >= -1 and x.max() <= 1 and x.std() > .3


@pytest.mark.parametrize("name, words, said", [
    ("editor", ["--vae-steps", "0"], "--vae-steps 0 .*at least 1"), ("editor", ["--out", "FILE"], "--out .*is a file"),
    ("judge", ["--steps", "-1"], "--steps -1 must be at least 1"), ("judge", ["--out", "FILE"], "--out .*is a file")])
def test_what_cannot_be_made_is_refused_before_anything_is_trained(name, words, said, tmp_path, monkeypatch, capsys):
    """Catches: a division by zero, a model without training, a quarter of an hour before --out is looked at."""
    file = tmp_path / "file"
    file.write_text("mine")
    words = [str(file) if word == "FILE" else word for word in words]
    monkeypatch.setattr(sys, "argv", ["make", "--work", str(tmp_path / "work"), *words])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(f"shapes.make_{name}", run_name="__main__")
    err = capsys.readouterr().err
    assert stop.value.code == 2 and re.fullmatch(f"make: {said}.*\n", err), err
    assert file.read_text() == "mine" and not (tmp_path / "work").exists()
