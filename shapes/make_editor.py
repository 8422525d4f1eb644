"""Make the embedded editor, a tiny FLUX.1-Kontext: train a VAE, then flow matching on clean single edits.

    python -m shapes.make_editor                    # writes shapes/editor; continues where it stopped
    python -m shapes.make_editor --out my/editor --flow-steps 2000

The result is a FluxKontextPipeline folder: FluxTransformer2DModel, AutoencoderKL, CLIP and T5 text encoders, all tiny.
It is an honest base model: it sees clean single edits only, never its own outputs, so it is good at one edit and falls
apart over three by itself. How good it gets is a matter of the number of steps, and of chance: another machine rounds
in another way. So look where a new one stands before you build on it (eval.py --model).
"""
import argparse
import json
import random
import time
from pathlib import Path

import torch
from tqdm import tqdm

from data import Parser, run_main
from model import multiplies_in_bfloat16, write_whole
from shapes import world

HERE = Path(__file__).parent
VAE = dict(
    down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    block_out_channels=(32, 32, 64, 64), layers_per_block=1, latent_channels=16, norm_num_groups=8,
    sample_size=world.SIZE, mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False)
DIALOGUES = 20_000          # clean dialogues of three edits that the flow model learns from
FIRST_DIALOGUE = 10 ** 6    # of them: far from those that reinforcement learning trains on
SAVE_EVERY = 100            # steps between checkpoints


# --------------------------------------------------------------------------------------- shared with make_judge.py

def pixels(scenes):
    """Scenes as the VAE's input: (n, 3, 48, 48) in [-1, 1], channels last."""
    pictures = torch.from_numpy(world.render(scenes)).permute(0, 3, 1, 2)
    x = pictures.float() / 127.5 - 1
    return x.to(memory_format=torch.channels_last)


def find_device():
    """A GPU, where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def faster(device):
    """A context in which products are made in bfloat16, where that is faster."""
    pays = device.type == "cuda" or multiplies_in_bfloat16(device)
    return torch.autocast(device.type, torch.bfloat16, enabled=pays)


def muon_and_adamw(params, hidden, lr):
    """Muon for the hidden matrices, AdamW for all else: AdamW alone took several times as many steps.

    `params`: {name: parameter}; `hidden`: the names of the hidden matrices.
    """
    matrices = [params[name] for name in hidden]
    others = [p for name, p in params.items() if name not in hidden]
    muon = torch.optim.Muon(matrices, lr, weight_decay=1e-2, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr, betas=(.9, .99), weight_decay=1e-2)
    return {"adamw": adamw, "muon": muon}


def scheduled(optimizers, share):
    """A schedule for each optimizer: share(step) of its learning rate. {name: optimizer} -> {name: schedule}."""
    schedule = torch.optim.lr_scheduler.LambdaLR
    return {f"{name} schedule": schedule(optimizer, share) for name, optimizer in optimizers.items()}


def save_progress(path, step, parts, **more):
    """Write a checkpoint, whole or not at all: the states of parts {name: module, optimizer, schedule}, and more."""
    states = {name: part.state_dict() for name, part in parts.items()}
    checkpoint = {"step": step, "parts": states, **more}
    write_whole(path, lambda file: torch.save(checkpoint, file))


def load_progress(path, parts):
    """Put a checkpoint's states back into parts; returns all that it holds, {"step": 0} if there is none."""
    if not path.exists():
        return {"step": 0}
    saved = torch.load(path, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(saved["parts"][name])
    return saved


# -------------------------------------------------------------------------------------------------------------- VAE

def crowd(rng):
    """A scene with any content in any cell: denser than a task's, so that the VAE sees every object often."""
    cells = [rng.choice(world.CONTENTS) if rng.random() < .7 else None for _ in range(9)]
    background = rng.choice(list(world.BACKGROUNDS))
    return world.Scene(background, tuple(cells))


def build_vae():
    """The untrained VAE, with little noise in its latents at first: with unit noise it collapses."""
    from diffusers import AutoencoderKL
    torch.manual_seed(0)
    vae = AutoencoderKL(**VAE).to(memory_format=torch.channels_last)
    with torch.no_grad():
        log_variance = slice(VAE["latent_channels"], None)
        vae.encoder.conv_out.weight[log_variance].zero_()
        vae.encoder.conv_out.bias[log_variance].fill_(-6)
    return vae


def train_vae(work, steps, batch=16, lr=1.5e-3):
    """Reconstruct crowded scenes; the learning rate falls to 2 % on the way. Returns the VAE."""
    device = find_device()
    vae = build_vae().to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr, betas=(.9, .99), weight_decay=1e-4)
    schedules = scheduled({"vae": optimizer}, lambda i: min((i + 1) / 50, 1.02 - i / steps))
    parts = {"vae": vae, "optimizer": optimizer, **schedules}
    # where an earlier run stopped
    saved = load_progress(work / "vae.pt", parts)
    if "rng" in saved:
        torch.set_rng_state(saved["rng"])

    bar = tqdm(range(saved["step"], steps), initial=saved["step"], total=steps, desc="vae")
    for step in bar:
        # reconstruct, in bfloat16
        rng = random.Random(f"vae {step}")
        x = pixels([crowd(rng) for _ in range(batch)]).to(device)
        with faster(device):
            latent = vae.encode(x).latent_dist
            y = vae.decode(latent.sample()).sample

        # the errors of the picture, and a little of what keeps latents near a standard normal
        error = y.float() - x
        l1, l2 = error.abs().mean(), error.square().mean()
        mean, log_variance = latent.mean.float(), latent.logvar.float()
        kl = .5 * (mean ** 2 + log_variance.exp() - 1 - log_variance).mean()
        loss = l1 + l2 + 1e-6 * kl

        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1)
        for part in (optimizer, *schedules.values()):
            part.step()
        if step % 20 == 0:
            bar.set_postfix(l1=f"{l1:.4f}", mse=f"{l2:.5f}", kl=f"{kl:.2f}")
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            save_progress(work / "vae.pt", step + 1, parts, rng=torch.get_rng_state())
    return vae.cpu()


@torch.no_grad()
def read_back(vae, n=500, seed=1):
    """Share of n scenes, and of their cells, that the exact judge reads back right from their reconstruction.

    The third number is the mean squared distance of a cell from the nearest one there can be, values in [0, 1].
    """
    rng = random.Random(seed)
    scenes = [world.sample_scene(rng) for _ in range(n)]
    parts = []
    for x in pixels(scenes).split(100):
        latent = vae.encode(x).latent_dist.mode()
        parts.append(vae.decode(latent).sample)
    y = (torch.cat(parts).clamp(-1, 1) + 1) * 127.5
    seen = world.read(y.round().byte().permute(0, 2, 3, 1).numpy())

    ground, contents = world.encode_scenes(scenes)
    right_cells = seen.contents == contents
    right = right_cells.all(1) & (seen.background == ground)
    return right.mean(), right_cells.mean(), seen.distance.min(2).mean()


# ------------------------------------------------------------------------------------------------------- the pipeline

def build_tokenizers():
    """A BPE tokenizer (CLIP's kind) and a unigram one (T5's kind) over the world's own words; letters as a fallback."""
    from transformers import T5Tokenizer
    found = set()
    for dialogue in world.dialogues("train", 5000, 3):
        for text in dialogue.instructions:
            found.update(text.split())
    words = sorted(found)
    letters = list("abcdefghijklmnopqrstuvwxyz")

    # T5: pieces with their log-probabilities; a word as a whole is likelier than its letters
    pieces = [("<pad>", 0.), ("</s>", 0.), ("<unk>", 0.), ("\u2581", -4.)]
    pieces += [("\u2581" + word, -1.) for word in words]
    pieces += [(letter, -8.) for letter in letters]
    pieces += [(letter.upper(), -8.) for letter in letters]
    t5 = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=14)
    return build_clip_tokenizer(words, letters), t5


def build_clip_tokenizer(words, letters):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    # last letters are named here, else they are numbered by chance, and the merges with them
    first_tokens = ["<|startoftext|>", "<|endoftext|>"] + [letter + "</w>" for letter in letters]
    trainer = trainers.BpeTrainer(
        vocab_size=1000, end_of_word_suffix="</w>", initial_alphabet=letters, show_progress=False,
        special_tokens=first_tokens)
    bpe.train_from_iterator(words * 3, trainer)
    trained = json.loads(bpe.to_str())["model"]
    merges = [tuple(pair) for pair in trained["merges"]]
    return CLIPTokenizer(vocab=trained["vocab"], merges=merges, model_max_length=24)


def build_text_encoders(clip_tokenizer, t5_tokenizer):
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel
    clip = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(clip_tokenizer), max_position_embeddings=clip_tokenizer.model_max_length,
        hidden_size=64, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4, projection_dim=64,
        pad_token_id=clip_tokenizer.pad_token_id, bos_token_id=clip_tokenizer.bos_token_id,
        eos_token_id=clip_tokenizer.eos_token_id))
    t5 = T5EncoderModel(T5Config(
        vocab_size=len(t5_tokenizer), feed_forward_proj="gated-gelu", dropout_rate=0.,
        d_model=64, d_kv=16, d_ff=256, num_layers=2, num_heads=4,
        relative_attention_num_buckets=8, relative_attention_max_distance=16))
    return clip, t5


def build_pipeline(vae):
    """The untrained editor: a FluxKontextPipeline with every part tiny."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxTransformer2DModel
    clip_tokenizer, t5_tokenizer = build_tokenizers()
    torch.manual_seed(0)
    clip, t5 = build_text_encoders(clip_tokenizer, t5_tokenizer)
    transformer = FluxTransformer2DModel(
        in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=32, num_attention_heads=4,
        joint_attention_dim=64, pooled_projection_dim=64, guidance_embeds=False, axes_dims_rope=(8, 12, 12))
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3., use_dynamic_shifting=True, base_shift=.5, max_shift=1.15, base_image_seq_len=256,
        max_image_seq_len=4096)
    return FluxKontextPipeline(scheduler, vae, clip, clip_tokenizer, t5, t5_tokenizer, transformer)


# -------------------------------------------------------------------------------------------------------------- flow

@torch.no_grad()
def encode_dialogues(pipe, n, work):
    """Latents and token ids of n training dialogues, made once and kept on disk: each turn starts from a clean picture.

    Returns z (n, 4, 9, 64) float16, packed and not normalised, CLIP's ids (n, 3, 24) and T5's (n, 3, 14).
    """
    cache = work / "latents.pt"
    if cache.exists():
        return torch.load(cache, weights_only=True)
    device, z, texts = find_device(), [], []
    pipe.vae.to(device)
    for start in tqdm(range(0, n, 100), desc="encode"):
        batch = world.dialogues("train", min(100, n - start), 3, start=FIRST_DIALOGUE + start)
        scenes = [scene for dialogue in batch for scene in dialogue.scenes]
        with faster(device):
            latent = pipe.vae.encode(pixels(scenes).to(device)).latent_dist.mode()
        # a cell of the grid is 2 x 2 latent pixels, one token
        side = 2 * world.GRID
        tokens = pipe._pack_latents(latent.contiguous(), len(latent), VAE["latent_channels"], side, side)
        z.append(tokens.half().cpu())
        texts += [text for dialogue in batch for text in dialogue.instructions]

    pipe.vae.cpu()
    ids = []
    for tokenizer in (pipe.tokenizer, pipe.tokenizer_2):
        tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        ids.append(tokens.input_ids.view(n, 3, -1))
    data = (torch.cat(z).view(n, 4, 9, 64), *ids)
    write_whole(cache, lambda file: torch.save(data, file))
    return data


def flow_loss(pipe, context, x_0, eps, t, clip_ids, t5_ids):
    """Flow matching: the transformer at x_t should say v = eps - x_0. Latents (n, 9, 64), t (n,), token ids (n, L)."""
    share = t[:, None, None]
    x_t = (1 - share) * x_0 + share * eps
    device = x_0.device
    ids = pipe._prepare_latent_image_ids(1, world.GRID, world.GRID, device, torch.float32)
    of_context = torch.tensor([1., 0, 0], device=device)            # its first id is 1, as in Kontext
    img_ids = torch.cat([ids, ids + of_context])
    v = pipe.transformer(
        hidden_states=torch.cat([x_t, context], 1), timestep=t, img_ids=img_ids,
        pooled_projections=pipe.text_encoder(clip_ids).pooler_output,
        encoder_hidden_states=pipe.text_encoder_2(t5_ids)[0],
        txt_ids=torch.zeros(t5_ids.shape[1], 3, device=device), return_dict=False)[0]
    v = v[:, :x_0.shape[1]]
    return (v - (eps - x_0)).square().mean()


def train_flow(work, vae, steps, batch=128, lr=2e-3):
    """Flow matching on clean single edits, text encoders included; returns the pipeline with the averaged weights."""
    # clean latents, normalised as the pipeline will do it
    pipe = build_pipeline(vae.eval().requires_grad_(False))
    z, clip_ids, t5_ids = encode_dialogues(pipe, DIALOGUES, work)
    sample = z[:2000].float()
    vae.register_to_config(scaling_factor=1 / sample.std().item(), shift_factor=sample.mean().item())
    z = (z.float() - vae.config.shift_factor) * vae.config.scaling_factor

    # what is trained, and how
    device = find_device()
    models = {"transformer": pipe.transformer, "clip": pipe.text_encoder, "t5": pipe.text_encoder_2}
    models = torch.nn.ModuleDict(models).requires_grad_(True).train().to(device)
    params = dict(models.named_parameters())
    blocks = [name for name in params if "transformer_blocks" in name and "norm" not in name]
    optimizers = muon_and_adamw(params, [name for name in blocks if params[name].ndim == 2], lr)
    schedules = scheduled(optimizers, lambda i: min((i + 1) / 100, 1))
    params = list(params.values())
    generator = torch.Generator().manual_seed(0)

    # where an earlier run stopped
    parts = {"models": models, **optimizers, **schedules}
    saved = load_progress(work / "flow.pt", parts)
    ema = saved.get("ema") or [p.detach().clone() for p in params]
    if "generator" in saved:
        generator.set_state(saved["generator"])

    bar = tqdm(range(saved["step"], steps), initial=saved["step"], total=steps, desc="flow")
    for step in bar:
        # one turn of each of `batch` dialogues, at a time that is often in the middle
        row = torch.randint(len(z), (batch,), generator=generator)
        turn = torch.randint(3, (batch,), generator=generator)
        context, x_0 = z[row, turn], z[row, turn + 1]
        eps = torch.randn(x_0.shape, generator=generator)
        t = torch.sigmoid(torch.randn(batch, generator=generator) + .5)
        drawn = context, x_0, eps, t, clip_ids[row, turn], t5_ids[row, turn]
        loss = flow_loss(pipe, *(part.to(device) for part in drawn))

        models.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1)
        for part in (*optimizers.values(), *schedules.values()):
            part.step()
        decay = min(.99, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(ema, params, 1 - decay)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss:.4f}")
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            save_progress(work / "flow.pt", step + 1, parts, ema=ema, generator=generator.get_state())
    with torch.no_grad():
        torch._foreach_copy_(params, ema)
    return pipe.to("cpu")


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "editor", help="folder of the finished editor")
    parser.add_argument("--work", type=Path, default=Path("out/make_editor"), help="folder of checkpoints and latents")
    parser.add_argument("--vae-steps", type=int, default=5000, help="steps of the VAE, 16 pictures each")
    parser.add_argument("--flow-steps", type=int, default=800, help="steps of 128 edits; more make a better base")
    args = parser.parse_args()
    # said now, and not after a quarter of an hour
    if min(args.vae_steps, args.flow_steps) < 1:
        raise ValueError(f"--vae-steps {args.vae_steps} and --flow-steps {args.flow_steps} must be at least 1")
    if args.out.is_file():
        raise ValueError(f"--out {args.out} is a file, expected a folder")
    start = time.perf_counter()
    vae = train_vae(args.work, args.vae_steps)
    print("VAE: scenes read back %.3f, cells %.4f, distance %.6f" % read_back(vae))
    pipe = train_flow(args.work, vae, args.flow_steps)
    pipe.to(torch.float16).save_pretrained(args.out)            # half the size; loaded as float32
    minutes = (time.perf_counter() - start) / 60
    print(f"{args.out} written after {minutes:.1f} minutes; python eval.py --model {args.out} measures it")


if __name__ == "__main__":
    run_main(main)
