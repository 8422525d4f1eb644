"""Train the embedded models from scratch. Each continues where it stopped.

    python -m shapes.pretrain                 # shapes/editor/: a VAE, then flow matching on clean single edits
    python -m shapes.pretrain --only judge    # shapes/judge/: a vision-language model that learns to score that editor's edits
    python -m shapes.pretrain --only report   # how well the judge does, in each of its modes

The editor is a FluxKontextPipeline folder: FluxTransformer2DModel, AutoencoderKL, CLIP and T5 text encoders, all tiny.
It is an honest base model: it sees clean single edits only, never its own outputs, so it is good at one edit and
falls apart over three by itself. Nothing but the number of steps decides how good it gets. The judge is a
LLaVA folder (CLIP vision tower, Llama), labelled by the exact judge, half on the editor's own outputs. On two cores the editor
takes about 16 minutes, the judge about 40 on one.
"""
import argparse
import json
import os
import random
import re
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import reward
from shapes import world

HERE = Path(__file__).parent
VAE = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
           block_out_channels=(32, 32, 64, 64), layers_per_block=1, latent_channels=16, norm_num_groups=8,
           sample_size=world.SIZE, mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False)


def pixels(scenes):
    """Scenes as the VAE's input: (n, 3, 48, 48) in [-1, 1]."""
    return torch.from_numpy(world.render(scenes)).permute(0, 3, 1, 2).float() / 127.5 - 1


def crowd(rng):
    """A scene with any content in any cell: denser than a task's, so that the VAE sees every object often."""
    cells = tuple(rng.choice(world.CONTENTS) if rng.random() < .7 else None for _ in range(9))
    return world.Scene(rng.choice(list(world.BACKGROUNDS)), cells)


def read_back(vae, n=500, seed=1):
    """Share of scenes that the exact judge reads back right from their reconstruction, and of cells."""
    rng = random.Random(seed)
    scenes = [world.sample_scene(rng) for _ in range(n)]
    with torch.no_grad():
        x = pixels(scenes).to(memory_format=torch.channels_last)
        out = torch.cat([vae.decode(vae.encode(b).latent_dist.mode()).sample for b in x.split(100)])
    pictures = ((out.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    ground, contents = world.encode_scenes(scenes)
    got_ground, got, distance, _ = world.read(pictures)
    right = (got == contents).all(1) & (got_ground == ground)
    return right.mean(), (got == contents).mean(), distance.min(2).mean()


def save(path, state):
    """Write a checkpoint or cached data whole or not at all."""
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def train_vae(work, steps, batch=16, lr=1.5e-3):
    from diffusers import AutoencoderKL
    torch.manual_seed(0)
    vae = AutoencoderKL(**VAE).to(memory_format=torch.channels_last)
    with torch.no_grad():                      # start with little noise in the latents: with unit noise it collapses
        vae.encoder.conv_out.weight[16:].zero_(), vae.encoder.conv_out.bias[16:].fill_(-6)
    optimizer = torch.optim.AdamW(vae.parameters(), lr, betas=(.9, .99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / 50, 1.02 - i / steps))
    state, first = work / "vae.pt", 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        vae.load_state_dict(saved["vae"]), optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"]), torch.set_rng_state(saved["rng"])
        first = saved["step"]

    bar = tqdm(range(first, steps), initial=first, total=steps, desc="vae")
    for step in bar:
        rng = random.Random(f"vae {step}")
        x = pixels([crowd(rng) for _ in range(batch)]).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            latent = vae.encode(x).latent_dist
            y = vae.decode(latent.sample()).sample
        error = y.float() - x
        kl = .5 * (latent.mean.float() ** 2 + latent.logvar.float().exp() - 1 - latent.logvar.float()).mean()
        loss = error.abs().mean() + error.square().mean() + 1e-6 * kl
        optimizer.zero_grad(), loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1)
        optimizer.step(), schedule.step()
        if step % 20 == 0:
            bar.set_postfix(l1=f"{error.abs().mean():.4f}", mse=f"{error.square().mean():.5f}", kl=f"{kl:.2f}")
        if (step + 1) % 500 == 0 or step + 1 == steps:
            save(state, dict(vae=vae.state_dict(), optimizer=optimizer.state_dict(), schedule=schedule.state_dict(),
                             rng=torch.get_rng_state(), step=step + 1))
    return vae


# ------------------------------------------------------------------------------------------------------------- flow

def build_tokenizers():
    """A BPE tokenizer (CLIP's kind) and a unigram one (T5's kind) over the world's own words; letters as a fallback."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer, T5Tokenizer
    texts = [text for instructions, _, _ in world.dialogues("train", 5000, 3) for text in instructions]
    words = sorted({word for text in texts for word in text.split()})
    letters = list("abcdefghijklmnopqrstuvwxyz")

    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer, bpe.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    bpe.train_from_iterator(words * 3, trainers.BpeTrainer(
        vocab_size=1000, end_of_word_suffix="</w>", initial_alphabet=letters, show_progress=False,
        special_tokens=["<|startoftext|>", "<|endoftext|>"]))
    trained = json.loads(bpe.to_str())["model"]
    vocab = trained["vocab"]
    for letter in letters:
        vocab.setdefault(letter + "</w>", len(vocab))
    clip = CLIPTokenizer(vocab=vocab, merges=[tuple(pair) for pair in trained["merges"]], model_max_length=24)

    pieces = [("<pad>", 0.), ("</s>", 0.), ("<unk>", 0.), ("\u2581", -4.)]
    pieces += [("\u2581" + word, -1.) for word in words]
    pieces += [(letter, -8.) for letter in letters + [letter.upper() for letter in letters]]
    t5 = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=14)
    return clip, t5


def build_pipeline(vae):
    """The untrained editor: a FluxKontextPipeline with every part tiny."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel
    clip_tokenizer, t5_tokenizer = build_tokenizers()
    torch.manual_seed(0)
    clip = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(clip_tokenizer), hidden_size=64, intermediate_size=256, num_hidden_layers=1, projection_dim=64,
        num_attention_heads=4, max_position_embeddings=clip_tokenizer.model_max_length, pad_token_id=clip_tokenizer.pad_token_id,
        bos_token_id=clip_tokenizer.bos_token_id, eos_token_id=clip_tokenizer.eos_token_id))
    t5 = T5EncoderModel(T5Config(
        vocab_size=len(t5_tokenizer), d_model=64, d_kv=16, d_ff=256, num_layers=2, num_heads=4, dropout_rate=0.,
        feed_forward_proj="gated-gelu", relative_attention_num_buckets=8, relative_attention_max_distance=16))
    transformer = FluxTransformer2DModel(
        in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=32, num_attention_heads=4,
        joint_attention_dim=64, pooled_projection_dim=64, guidance_embeds=False, axes_dims_rope=(8, 12, 12))
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3., use_dynamic_shifting=True, base_shift=.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096)
    return FluxKontextPipeline(scheduler, vae, clip, clip_tokenizer, t5, t5_tokenizer, transformer)


@torch.no_grad()
def encode_dialogues(pipe, n, work):
    """Latents and token ids of n training dialogues (turn by turn, clean pictures), made once and kept on disk.

    Returns z (n, 4, 9, 64) float16 packed and unscaled, clip ids (n, 3, Lc), T5 ids (n, 3, Lt).
    """
    cache = work / "latents.pt"
    if cache.exists():
        return torch.load(cache, weights_only=True)
    z, texts = [], []
    for start in tqdm(range(0, n, 100), desc="encode"):
        batch = world.dialogues("train", min(100, n - start), 3, start=10 ** 6 + start)   # apart from what RL trains on
        with torch.autocast("cpu", torch.bfloat16):
            latent = pipe.vae.encode(pixels([s for _, _, scenes in batch for s in scenes]).to(memory_format=torch.channels_last))
        latent = latent.latent_dist.mode().contiguous()
        z.append(pipe._pack_latents(latent, len(latent), 16, 6, 6).half())
        texts += [text for instructions, _, _ in batch for text in instructions]
    ids = [t(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids.view(n, 3, -1)
           for t in (pipe.tokenizer, pipe.tokenizer_2)]
    data = (torch.cat(z).view(n, 4, 9, 64), *ids)
    save(cache, data)
    return data


def train_flow(work, vae, steps, n_dialogues=20000, batch=128, lr=2e-3):
    """Flow matching v = eps - x_0 on clean single edits; returns the pipeline with the averaged weights.

    The hidden matrices of the transformer are trained by Muon, everything else (text encoders too) by AdamW: with AdamW
    alone the same success took several times as many steps.
    """
    pipe = build_pipeline(vae.eval().requires_grad_(False))
    z, clip_ids, t5_ids = encode_dialogues(pipe, n_dialogues, work)
    vae.register_to_config(scaling_factor=1 / z[:2000].float().std().item(), shift_factor=z[:2000].float().mean().item())
    z = (z.float() - vae.config.shift_factor) * vae.config.scaling_factor
    parts = torch.nn.ModuleDict(dict(transformer=pipe.transformer, clip=pipe.text_encoder, t5=pipe.text_encoder_2))
    parts.requires_grad_(True).train()
    params = dict(parts.named_parameters())
    hidden = [n for n, p in params.items() if "transformer_blocks" in n and p.ndim == 2 and "norm" not in n]
    optimizers = [torch.optim.AdamW([p for n, p in params.items() if n not in hidden], lr, betas=(.9, .99), weight_decay=1e-2),
                  torch.optim.Muon([params[n] for n in hidden], lr, weight_decay=1e-2, adjust_lr_fn="match_rms_adamw")]
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda i: min((i + 1) / 100, 1)) for o in optimizers]
    params = list(params.values())
    ema = [p.detach().clone() for p in params]
    generator, first, state = torch.Generator().manual_seed(0), 0, work / "flow.pt"
    if state.exists():
        saved = torch.load(state, weights_only=True)
        parts.load_state_dict(saved["parts"]), generator.set_state(saved["generator"])
        for part, value in zip(optimizers + schedules, saved["optimizers"] + saved["schedules"]):
            part.load_state_dict(value)
        ema, first = saved["ema"], saved["step"]

    ids = pipe._prepare_latent_image_ids(1, world.GRID, world.GRID, "cpu", torch.float32)
    img_ids, txt_ids = torch.cat([ids, ids + torch.tensor([1., 0, 0])]), torch.zeros(t5_ids.shape[2], 3)
    bar = tqdm(range(first, steps), initial=first, total=steps, desc="flow")
    for step in bar:
        row = torch.randint(len(z), (batch,), generator=generator)
        turn = torch.randint(3, (batch,), generator=generator)
        context, x_0 = z[row, turn], z[row, turn + 1]
        eps = torch.randn(x_0.shape, generator=generator)
        t = torch.sigmoid(torch.randn(batch, generator=generator) + .5)
        x_t = (1 - t)[:, None, None] * x_0 + t[:, None, None] * eps
        v = pipe.transformer(
            hidden_states=torch.cat([x_t, context], 1), timestep=t, img_ids=img_ids, txt_ids=txt_ids,
            pooled_projections=pipe.text_encoder(clip_ids[row, turn]).pooler_output,
            encoder_hidden_states=pipe.text_encoder_2(t5_ids[row, turn])[0], return_dict=False)[0][:, :x_0.shape[1]]
        loss = (v - (eps - x_0)).square().mean()
        parts.zero_grad(), loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1)
        for part in optimizers + schedules:
            part.step()
        torch._foreach_lerp_(ema, params, 1 - min(.99, (1 + step) / (10 + step)))
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss:.4f}")
        if (step + 1) % 100 == 0:
            save(state, dict(parts=parts.state_dict(), ema=ema, step=step + 1, generator=generator.get_state(),
                             optimizers=[o.state_dict() for o in optimizers], schedules=[s.state_dict() for s in schedules]))
    with torch.no_grad():
        torch._foreach_copy_(params, ema)
    return pipe


# ------------------------------------------------------------------------------------------------------------ judge

TRAINED_ON = tuple(o for o in world.CONTENTS[1:] if o not in world.HELD_OUT)
THINK = '{"score":'                                            # one token, so that the word-level tokenizer's answers are JSON
KINDS = [(scoring, name, reasoning) for scoring in reward.RUBRICS for name in ("following", "consistency") for reasoning in ("direct", "think")]


def botch(rng, scenes):
    """The pictures of a careless editor's dialogue: (K + 1, 48, 48, 3) uint8.

    Each turn is done right, or not at all, or half, or to the wrong thing, or with side effects; blur, noise and colour
    casts come on top and stay, since every turn starts from the picture before it.
    """
    draw = lambda scene: world.cut(world.render([scene]))[0].astype(np.float32)
    other = lambda old: rng.choice([o for o in TRAINED_ON if old is None or sum(a == b for a, b in zip(o, old)) == rng.randint(0, 2)] or TRAINED_ON)
    actual, pixels, pictures = scenes[0], draw(scenes[0]), []
    for before, want in zip([None, *scenes], scenes):
        if before:
            cells, ground, half = list(actual.cells), actual.background, 1.
            places = [i for i in range(9) if before.cells[i] != want.cells[i]]
            outcome = rng.choices(["right", "nothing", "half", "wrong", "elsewhere", "side effects"], [50, 12, 10, 12, 8, 14])[0]
            if outcome != "nothing":
                for i in places:
                    cells[i] = want.cells[i]
                ground = want.background if before.background != want.background else ground
            if outcome == "half":
                half = rng.uniform(.2, .8)
                if len(places) > 1 and rng.random() < .5:      # moved, but still there; or gone, but nowhere else
                    half, i = 1., rng.choice(places)
                    cells[i] = actual.cells[i]
            elif outcome == "wrong":
                for i in rng.sample(places, min(len(places), 1)):
                    cells[i] = rng.choice([other(want.cells[i]), None, other(want.cells[i])])
                ground = rng.choice(list(world.BACKGROUNDS)) if not places else ground
            elif outcome in ("elsewhere", "side effects"):
                for i in rng.sample([i for i in range(9) if i not in places], rng.choice([1, 1, 1, 2, 2, 3, 5, 7])):
                    cells[i] = rng.choice([None, other(cells[i]), other(None)])
                if outcome == "elsewhere":
                    for i in places:
                        cells[i] = actual.cells[i]
                elif rng.random() < .2:
                    ground = rng.choice(list(world.BACKGROUNDS))
            new, old = world.Scene(ground, tuple(cells)), actual
            moved = np.array([ground != old.background or cells[i] != old.cells[i] for i in range(9)])[:, None, None, None]
            pixels, actual = np.where(moved, half * draw(new) + (1 - half) * pixels, pixels), new
            if rng.random() < .35:                             # blur, some cells or all of them
                soft = sum(np.roll(pixels, (i, j), (1, 2)) for i in (-1, 0, 1) for j in (-1, 0, 1)) / 9
                hit = np.array([rng.random() < rng.choice([.2, 1.]) for _ in range(9)])[:, None, None, None]
                pixels = np.where(hit, pixels + rng.uniform(.1, 1) * (soft - pixels), pixels)
            noise = np.random.default_rng(rng.getrandbits(32))
            if rng.random() < .5:
                pixels = pixels + rng.uniform(0, 14) * noise.standard_normal(pixels.shape) + rng.choice([0, 0, 8]) * noise.standard_normal(3)
            pixels = pixels.clip(0, 255)
        pictures.append(pixels.reshape(3, 3, 16, 16, 3).transpose(0, 2, 1, 3, 4).reshape(48, 48, 3))
    return np.stack(pictures).round().astype(np.uint8)


def edits(work, part, split, start, n):
    """n dialogues of three edits and their pictures (n, 4, 3, 48, 48) uint8, kept on disk: of the base editor, or botched by hand.

    The editor samples as in training (stochastic windows too) and as in evaluation, with 6 to 8 steps.
    """
    import data
    import model
    from rollout import rollout
    tasks, file = data.load_shapes(split, 3, n, start), work / f"edits-{part}-{split}-{start}-{n}.pt"
    if not file.exists():
        if part == "editor":
            editor, images, rng = model.load(str(HERE / "editor")), [], random.Random(start)
            for first in tqdm(range(0, n, 50), desc=f"{part} {start}"):
                noise = dict(eta=.8, window=3, start=rng.randint(0, 2)) if split == "train" and rng.random() < .5 else {}
                steps = rng.choice([6, 8]) if split == "train" else 8
                images.append(rollout(editor, tasks[first:first + 50], 1, 3, steps, (start, first), keep=False, **noise).images)
            images = torch.cat(images)
        else:
            images = torch.from_numpy(np.stack([botch(random.Random(f"botch {start + i}"), task.meta["scenes"]) for i, task in enumerate(tasks)]))
            images = images.permute(0, 1, 4, 2, 3).contiguous()
        save(file, images)
    return tasks, torch.load(file, weights_only=True)


def describe(content):
    return "nothing" if content is None else " ".join((content.color, content.material, content.shape))


def look(tasks, images):
    """What the exact judge says of every turn, and of the whole, of following and of consistency.

    {scoring: scores (n, K or 1, 2)}, {scoring: [[two texts]]}, and {scoring: (n, K or 1, 2, 2, 9)} for every cell what should be
    in it (-1: nobody can tell), and 0 = asked and done, 1 = asked, not done, 2 = not asked, kept, 3 = not asked, changed.
    """
    n, K = len(tasks), images.shape[1] - 1
    pictures = images.permute(0, 1, 3, 4, 2).numpy()
    scores, texts, cells = {}, {}, {}
    grounds, names = list(world.BACKGROUNDS), list(world.CONTENTS)
    for scoring, turns in (("turn", [(k, k + 1) for k in range(K)]), ("trajectory", [(0, K)])):
        scores[scoring], texts[scoring] = np.full((n, len(turns), 2), np.nan, np.float32), [[None] * len(turns) for _ in range(n)]
        cells[scoring] = np.full((n, len(turns), 2, 2, 9), -1)
        for column, (a, b) in enumerate(turns):
            rows = [i for i in range(n) if tasks[i].meta["scenes"][a] != tasks[i].meta["scenes"][b]]       # edits that undo each other
            told = [tasks[i].meta["scenes"][:b + 1] if scoring == "turn" else tasks[i].meta["scenes"][::K] for i in rows]
            _, following, consistency = world.judge(pictures[rows, b], pictures[rows, a], told)
            scores[scoring][rows, column] = np.stack([following, consistency], 1)
            (ground, seen, distance, _), (ground_0, seen_0, _, _) = world.read(pictures[rows, b]), world.read(pictures[rows, a])
            (_, first), (old_ground, old), (new_ground, new) = (world.encode_scenes([s[k] for s in told]) for k in (0, -2, -1))
            grounds_asked = (old_ground != new_ground)[:, None]
            for m, kept in enumerate((seen_0, np.where(first == old, first, seen_0))):
                should, ground_should = np.where(old != new, new, kept), np.where(grounds_asked[:, 0], new_ground, ground_0)
                right = (seen == should) & (ground == ground_should)[:, None]
                cells[scoring][rows, column, m] = np.stack([should, 2 * ~((old != new) | grounds_asked) + ~right], 1)
            for j, (i, scenes) in enumerate(zip(rows, told)):
                first, before, want = scenes[0], scenes[-2], scenes[-1]
                did, kept = [], []
                for c in range(9):
                    now = describe(names[seen[j, c]]) if seen[j, c] >= 0 else "blur"
                    if before.cells[c] != want.cells[c]:
                        error = distance[j, c, names.index(want.cells[c])]
                        did.append(f"{world.PLACES[c]} wanted {describe(want.cells[c])} seen {now} "
                                   + ("sharp" if error < .002 else "soft" if error < .006 else "bad"))
                    elif (first.cells[c] if first.cells[c] == before.cells[c] else names[seen_0[j, c]] if seen_0[j, c] >= 0 else None) \
                            != (names[seen[j, c]] if seen[j, c] >= 0 else 0):
                        kept.append(world.PLACES[c])
                now = grounds[ground[j]] if ground[j] >= 0 else "blur"
                if before.background != want.background:
                    did.append(f"background wanted {want.background} seen {now}")
                elif now != (first.background if first.background == before.background else grounds[ground_0[j]]):
                    kept.append("background")
                blur = np.median(distance[j].min(1))
                texts[scoring][i][column] = (" ".join(did), f"changed {' '.join(kept) or 'nothing'} "
                                             + ("sharp" if blur < .002 else "soft" if blur < .006 else "bad"))
    return scores, texts, cells


def build_judge():
    """The untrained judge, a LLaVA whose image tokens are the cells of the grid, and its processor with a tokenizer of words."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    asked = [text for rubrics in reward.RUBRICS.values() for text in rubrics.values()] + list(reward.ANSWERS.values())
    phrases = sorted({part.strip() for text in asked for part in re.split("{instructions?}", text)})        # one token each: half the work
    texts = asked + [text for instructions, _, _ in world.dialogues("train", 5000, 3) for text in instructions]
    texts += ["wanted seen nothing blur sharp soft bad changed background", *map(describe, world.CONTENTS), *world.PLACES, *world.BACKGROUNDS]
    split = pre_tokenizers.Split(Regex(r"[^\w<>/]+"), "removed")
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text.lower())} - set("0123456789"))
    words = ["<pad>", "<unk>", "<s>", "</s>", "<image>", "<answer>", *"0123456789", THINK, "}", *words]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), split
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
                                        additional_special_tokens=["<image>", "<answer>"], padding_side="left")
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    pictures = CLIPImageProcessorPil(size={"height": world.SIZE, "width": world.SIZE}, do_center_crop=False,
                                     image_mean=[.5] * 3, image_std=[.5] * 3)
    template = ("{{ bos_token }}{% for message in messages %}{% if message.content is string %}{{ message.content }}{% else %}"  # question first:
                "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"     # pictures are looked at
                "{% for part in message.content %}{% if part.type != 'text' %}<image>{% endif %}{% endfor %}"              # with it in mind
                "{% endif %}{% endfor %}{% if add_generation_prompt %}<answer>{% endif %}")
    processor = LlavaProcessor(pictures, tokenizer, patch_size=world.CELL, vision_feature_select_strategy="default",
                               num_additional_image_tokens=1, chat_template=template)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(
        vision_config=dict(model_type="clip_vision_model", hidden_size=192, intermediate_size=768, num_hidden_layers=1, num_attention_heads=6,
                           image_size=world.SIZE, patch_size=world.CELL, projection_dim=192),
        text_config=dict(model_type="llama", hidden_size=128, intermediate_size=384, num_hidden_layers=5, num_attention_heads=4,
                         vocab_size=len(tokenizer), max_position_embeddings=512, pad_token_id=0, bos_token_id=2, eos_token_id=3),
        vision_feature_layer=-1, image_seq_length=9, image_token_id=words.index("<image>"), pad_token_id=0, eos_token_id=3))
    model.generation_config.update(pad_token_id=0, bos_token_id=2, eos_token_id=3, do_sample=True)
    return model, processor


class Questions:
    """Random questions with the answers that the exact judge would give, as token ids."""

    def __init__(self, tokenizer, parts):
        self.tokenizer, self.word = tokenizer, tokenizer.convert_tokens_to_ids
        self.tasks, self.images, self.scores, self.texts, self.cells = zip(*parts)
        self.ask = {(scoring, reasoning): reward.VLMJudge("", "", reward.RUBRICS[scoring], scoring, reasoning, 1, 0., 1, None).prompt
                    for scoring in reward.RUBRICS for reasoning in ("direct", "think")}

    def draw(self, rng, kind, n):
        """n questions of a kind -> ids, mask, labels (n, L), pixels (n * pictures, 3, 48, 48), the digit's place, score (n,) in 0..9,
        cells (n, 2, 9) as look() tells them; left-padded."""
        scoring, name, reasoning = kind
        rows, pixels, marks, cells = [], [], [], []
        while len(rows) < n:
            part = rng.randrange(len(self.tasks))
            i, column = rng.randrange(len(self.tasks[part])), rng.randrange(self.scores[part][scoring].shape[1])
            score = self.scores[part][scoring][i, column, int(name == "consistency")]
            if np.isnan(score):
                continue
            k = column if scoring == "turn" else 2
            pictures, text = self.ask[scoring, reasoning](name, self.images[part][i, :k + 2], self.tasks[part][i].instructions[:k + 1])
            said = [] if reasoning == "direct" else self.texts[part][scoring][i][column][name == "consistency"].split() + [THINK]
            answer = [self.word(w) for w in said] + [self.word(str(round(9 * float(score))))] + [self.word("}")] * (reasoning == "think") + [self.word("</s>")]
            prompt = [self.word("<s>")] + self.tokenizer(text, add_special_tokens=False).input_ids
            prompt += [self.word("<image>")] * 9 * len(pictures) + [self.word("<answer>")]
            rows.append((prompt, answer)), pixels.append(pictures), marks.append(9 * float(score))
            cells.append(self.cells[part][scoring][i, column, int(name == "consistency")])
        L = max(len(p) + len(a) for p, a in rows)
        ids, labels = torch.zeros(n, L, dtype=torch.long), torch.full((n, L), -100)
        for i, (p, a) in enumerate(rows):
            ids[i, L - len(p) - len(a):], labels[i, L - len(a):] = torch.tensor(p + a), torch.tensor(a)
        place = L - 2 - (reasoning == "think")                              # of the digit, in every row
        return (ids, (ids != 0).long(), labels, torch.cat(pixels).float() / 127.5 - 1, place, torch.tensor(marks),
                torch.from_numpy(np.stack(cells)))


FEATURES = torch.tensor([[0, 0, 0], *[[1 + world.SHAPES.index(o.shape), 1 + list(world.COLORS).index(o.color), 1 + world.MATERIALS.index(o.material)]
                                      for o in world.CONTENTS[1:]], [-1, -1, -1]])         # of every content; the last: nobody can tell


def feature_loss(logits, contents, weight):
    """Cross-entropy of shape, colour and material, 0 = nothing: logits (n, 7 + 7 + 4), contents (n,) with -1 = nobody can tell, weight (n,)."""
    loss = sum(torch.nn.functional.cross_entropy(p, FEATURES[contents, i], ignore_index=-1, reduction="none")
               for i, p in enumerate(logits.split([7, 7, 4], 1)))
    return (loss * weight).sum() / weight.sum()


def train_judge(work, steps, batch=32, lr=2e-3, dialogues=4000):
    """Cross-entropy on the answers; a score between two digits asks for both in proportion, so that the expectation is the score.

    Three linear readers, thrown away later, shorten the way: of the image tokens, what is in each cell; of the last picture's
    cells inside the language model, what should be there, and whether it is. Without the first most of the training goes by
    before the vision tower has found out what there is to see; without the others a digit at once is hardly learned.
    """
    model, processor = build_judge()
    model.set_attn_implementation("eager")                     # a third faster than the others, backward on a CPU in bfloat16
    tokenizer = processor.tokenizer
    image, zero = tokenizer.convert_tokens_to_ids(["<image>", "0"])
    parts = []
    for part, start in [(part, 2 * 10 ** 6 + start) for start in range(0, dialogues, 500) for part in ("editor", "botched")]:
        tasks, images = edits(work, part, "train", start, 500)
        parts.append((tasks, images, *look(tasks, images)))
    questions = Questions(tokenizer, parts)
    layer = lambda n: torch.nn.Sequential(torch.nn.LayerNorm(128), torch.nn.Linear(128, n))
    reader = torch.nn.ModuleDict(dict(seen=torch.nn.Linear(128, 18 + len(world.BACKGROUNDS)), should=layer(18), right=layer(4)))
    params = {**dict(model.named_parameters()), **{f"reader.{n}": p for n, p in reader.named_parameters()}}
    hidden = [n for n, p in params.items() if ".layers." in n and p.ndim == 2]
    optimizers = [torch.optim.AdamW([p for n, p in params.items() if n not in hidden], lr, betas=(.9, .99), weight_decay=1e-2),
                  torch.optim.Muon([params[n] for n in hidden], lr, weight_decay=1e-2, adjust_lr_fn="match_rms_adamw")]
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda i: min((i + 1) / 100, 1.02 - i / steps)) for o in optimizers]
    state, first = work / "judge.pt", 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"]), reader.load_state_dict(saved["reader"])
        for part, value in zip(optimizers + schedules, saved["optimizers"] + saved["schedules"]):
            part.load_state_dict(value)
        first = saved["step"]
    seen = {}
    model.train()
    bar = tqdm(range(first, steps), initial=first, total=steps, desc="judge")
    for step in bar:
        rng = random.Random(f"judge {step}")
        for kind in KINDS[:4] if step % 4 else KINDS:
            ids, mask, labels, x, place, mark, true = questions.draw(rng, kind, batch if kind[0] == "turn" else batch // 2)
            with torch.autocast("cpu", torch.bfloat16):
                out = model.model(input_ids=ids, attention_mask=mask, pixel_values=x, output_hidden_states=True)
                logits = model.lm_head(out.last_hidden_state[:, :-1][labels[:, 1:] != -100]).float()
                cells = reader["seen"](out.image_hidden_states).float()
                after = (ids == image).cumsum(1)
                after = (ids == image) & (after > after[:, -1:] - 9)                      # the last picture's nine tokens
                should, right = (reader[n](out.hidden_states[i][after]).float() for n, i in (("should", -3), ("right", -2)))
            target = labels[:, 1:][labels[:, 1:] != -100]
            digit = (torch.where(labels[:, 1:] != -100, torch.arange(ids.shape[1] - 1), -1) == place - 1)[labels[:, 1:] != -100]
            logp = logits.log_softmax(-1)
            low = mark.floor().clamp(max=8)
            score_loss = -((low + 1 - mark) * logp[digit].gather(1, (zero + low.long())[:, None])[:, 0]
                           + (mark - low) * logp[digit].gather(1, (zero + low.long() + 1)[:, None])[:, 0]).mean()
            word_loss = torch.nn.functional.nll_loss(logp[~digit], target[~digit])
            pictures = ((x + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
            ground, contents, _, _ = world.read(pictures)
            cells = cells.view(len(x), 9, -1)
            read_loss = feature_loss(cells[..., :18].flatten(0, 1), torch.from_numpy(contents).flatten(), torch.ones(contents.size)) \
                + torch.nn.functional.cross_entropy(cells[..., 18:].mean(1), torch.from_numpy(ground), ignore_index=-1)
            asked = 1 + 3. * (true[:, 1] < 2).flatten()                                   # few cells are, and they are what is to be learned
            should_loss = feature_loss(should, true[:, 0].flatten(), asked)
            right_loss = (torch.nn.functional.cross_entropy(right, true[:, 1].flatten(), reduction="none") * asked).sum() / asked.sum()
            (score_loss + word_loss * (kind[2] == "think") + .1 * word_loss * (kind[2] == "direct")
             + .3 * read_loss + should_loss + right_loss).backward()
            for name, value in (("read", read_loss), ("should " + kind[1], should_loss), ("right " + kind[1], right_loss),
                                ("-".join(kind), score_loss), ("words " + kind[1], word_loss)):
                seen[name] = .98 * seen.get(name, value.item()) + .02 * value.item()
        torch.nn.utils.clip_grad_norm_(params.values(), 1)
        for part in optimizers + schedules:
            part.step()
        for o in optimizers:
            o.zero_grad()
        if step % 50 == 0:
            bar.write(f"{step} " + " ".join(f"{n} {v:.3f}" for n, v in seen.items()))
        if (step + 1) % 100 == 0 or step + 1 == steps:
            save(state, dict(model=model.state_dict(), reader=reader.state_dict(), step=step + 1,
                             optimizers=[o.state_dict() for o in optimizers], schedules=[s.state_dict() for s in schedules]))
    return model.eval(), processor


def auc(score, good):
    """How often a good one scores higher than a bad one (ties count half): area under the ROC curve."""
    above = (score[good][:, None] > score[~good]) + .5 * (score[good][:, None] == score[~good])
    return above.mean()


def report_judge(folder, work, n=200, votes=4, temperature=.7):
    """The judge against the exact one, on n test tasks (with objects never trained on) after the base editor's three turns.

    Per way of asking and reward: correlation, AUC (following: of exact success; consistency: of more than the exact median),
    bias (mean difference), spread (standard deviation of a single vote around its question's mean), seconds per 1,000 judgements.
    """
    tasks, images = edits(work, "editor", "test", 0, n)
    exact = torch.stack([reward.ExactJudge()(tasks, images[:, :k + 2], k) for k in range(3)], 1).flatten(0, 1).numpy()       # (3 n, 3)
    lines = ["reasoning  votes  reward       corr    AUC    bias  spread  failed  s / 1,000"]
    for reasoning, count, heat in (("logits", 1, 0.), ("direct", 1, 0.), ("direct", votes, temperature), ("think", 1, 0.), ("think", votes, temperature)):
        judge = reward.load(str(folder), reasoning=reasoning, temperature=heat)
        start, draws = time.process_time(), []
        for vote in range(count):
            judge.version = vote                                       # the draws are a function of the question and of this
            draws.append(torch.stack([judge(tasks, images[:, :k + 2], k) for k in range(3)], 1).flatten(0, 1).numpy())
        seconds, draws = time.process_time() - start, np.stack(draws)                                                          # (votes, 3 n, 2)
        score = np.nanmean(draws, 0)
        for m, name in enumerate(judge.names):
            ok = ~np.isnan(score[:, m])
            good = exact[:, 2] > 0 if name == "following" else exact[:, 1] > np.median(exact[:, 1])
            spread = f"{np.sqrt(np.nanvar(draws[..., m], 0, ddof=1).mean()):7.3f}" if count > 1 else "      -"
            corr = np.corrcoef(score[ok, m], exact[ok, m])[0, 1] if score[ok, m].std() else np.nan
            lines.append(f"{reasoning:<9}  {count:>5}  {name:<11} {corr:6.3f} {auc(score[ok, m], good[ok]):6.3f} {(score[ok, m] - exact[ok, m]).mean():+7.3f} "
                         f"{spread} {np.isnan(draws[..., m]).mean():7.3f} {seconds / (count * 3 * n * 2) * 1000:10.1f}")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="editor", choices=["editor", "judge", "report"], help="what to train, or the report on the judge")
    parser.add_argument("--out", type=Path, help="folder of the finished model (default: shapes/editor or shapes/judge)")
    parser.add_argument("--work", type=Path, default=Path("out/pretrain"), help="folder of checkpoints and cached pictures")
    parser.add_argument("--vae-steps", type=int, default=5000, help="steps of the VAE, 16 pictures each")
    parser.add_argument("--flow-steps", type=int, default=660, help="steps of the editor, 128 edits each; more make a better base")
    parser.add_argument("--judge-steps", type=int, default=2000, help="steps of the judge, 128 questions each")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    start, out = time.perf_counter(), args.out or HERE / ("editor" if args.only == "editor" else "judge")
    if args.only == "editor":
        vae = train_vae(args.work, args.vae_steps)
        print("VAE: scenes read back %.3f, cells %.4f, distance %.6f" % read_back(vae))
        pipe = train_flow(args.work, vae, args.flow_steps)
        pipe.to(torch.float16).save_pretrained(out)            # half the size; loaded as float32
        print(f"{out} written after {(time.perf_counter() - start) / 60:.1f} minutes; python eval.py --model {out} measures it")
    if args.only == "judge":
        judge, processor = train_judge(args.work, args.judge_steps)
        judge.to(torch.float16).save_pretrained(out), processor.save_pretrained(out)
        print(f"{out} written after {(time.perf_counter() - start) / 60:.1f} minutes")
    if args.only != "editor":
        print(report_judge(out, args.work))


if __name__ == "__main__":
    main()
