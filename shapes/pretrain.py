"""Train the embedded editor from scratch: a VAE, then flow matching on clean single edits. Writes shapes/editor/.

    python -m shapes.pretrain                 # both stages, about 16 minutes on two cores; continues where it stopped

The result is a FluxKontextPipeline folder: FluxTransformer2DModel, AutoencoderKL, CLIP and T5 text encoders, all tiny.
It is an honest base model: it sees clean single edits only, never its own outputs, so it is good at one edit and
falls apart over three by itself. Nothing but the number of steps decides how good it gets.
"""
import argparse
import json
import os
import random
import time
from pathlib import Path

import torch
from tqdm import tqdm

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


def save(path, **state):
    """Write a checkpoint whole or not at all."""
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
            save(state, vae=vae.state_dict(), optimizer=optimizer.state_dict(), schedule=schedule.state_dict(),
                 rng=torch.get_rng_state(), step=step + 1)
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
    torch.save(data, cache)
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
            save(state, parts=parts.state_dict(), ema=ema, step=step + 1, generator=generator.get_state(),
                 optimizers=[o.state_dict() for o in optimizers], schedules=[s.state_dict() for s in schedules])
    with torch.no_grad():
        torch._foreach_copy_(params, ema)
    return pipe


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "editor", help="folder of the finished editor")
    parser.add_argument("--work", type=Path, default=Path("out/pretrain"), help="folder of checkpoints and cached latents")
    parser.add_argument("--vae-steps", type=int, default=5000, help="steps of the VAE, 16 pictures each")
    parser.add_argument("--flow-steps", type=int, default=660, help="steps of the editor, 128 edits each; more make a better base")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    vae = train_vae(args.work, args.vae_steps)
    print("VAE: scenes read back %.3f, cells %.4f, distance %.6f" % read_back(vae))
    pipe = train_flow(args.work, vae, args.flow_steps)
    pipe.to(torch.float16).save_pretrained(args.out)       # half the size; loaded as float32
    print(f"{args.out} written after {(time.perf_counter() - start) / 60:.1f} minutes; python eval.py --model {args.out} measures it")


if __name__ == "__main__":
    main()
