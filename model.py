"""What an editor is: a frozen flow model with text and picture encoders around it, and LoRA weights that are trained.

    editor = load("shapes/editor")                     # a folder or hub id of a FluxKontextPipeline
    add_lora(editor, rank=64, alpha=128)               # rank 0: train the whole transformer
    cond = editor.condition(instructions, pictures)    # text, once per distinct instruction
    context = editor.encode(pictures)                  # (S, N, C)
    v = editor.velocity(x, t, cond, context, size)     # (S, N, C)
    pictures = editor.decode(x, size)                  # (S, 3, H, W) uint8
    with editor.weights("old"): ...                    # policy | old | ref | ema

Latents x (S, N, C) are packed tokens; t in [0, 1], 1 = noise; pictures (S, 3, H, W) uint8; size = (H, W).
diffusers' own 0..1000 timesteps appear in this file only.
"""
import json
import math
import os
import re
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

# The Linears that LoRA wraps, as in Flow-GRPO's Kontext recipe (all) and DiffusionNFT's (attention)
_ATTENTION = r"attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
LORA_TARGETS = {"attention": rf"{_ATTENTION}", "all": rf"({_ATTENTION}|ff(_context)?\.net\.(0\.proj|2)|proj_mlp)"}


# ----------------------------------------------------------------------------------------------------------- editors

class KontextEditor:
    """FLUX.1-Kontext: the context picture's tokens follow the noisy ones in the sequence, with first position id 1."""

    def __init__(self, pipe, device, guidance=2.5, max_text=128):
        self.transformer, self.vae, self.scheduler = pipe.transformer, pipe.vae, pipe.scheduler
        self.pipe, self.device, self.guidance = pipe, torch.device(device), guidance
        self.max_text = min(max_text, pipe.tokenizer_2.model_max_length)
        self.multiple = pipe.vae_scale_factor * 2                # a side of a picture is a multiple of this many pixels
        self.trained, self.sets = {}, {}                         # name -> nn.Parameter; set name -> list of tensors
        for part in (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
            part.requires_grad_(False).to(self.device)
        self.vae.to(memory_format=torch.channels_last)           # convolutions run several times faster on CPUs
        if self.device.type == "cuda":
            self.transformer.enable_gradient_checkpointing()

    def latent_shape(self, size):
        """(N, C) of the packed latents of a picture (H, W). ValueError if a side is no multiple of `multiple`."""
        H, W = size
        if H % self.multiple or W % self.multiple:
            raise ValueError(f"picture is {H} x {W}, both sides must be multiples of {self.multiple}")
        return (H // self.multiple) * (W // self.multiple), self.transformer.config.in_channels

    def times(self, T, size):
        """The T+1 times of a denoising run, 1 -> 0, float32 on the CPU, shifted by the number of tokens as in the pipeline."""
        config, N = self.scheduler.config, self.latent_shape(size)[0]
        low, high = config.base_image_seq_len, config.max_image_seq_len
        mu = config.base_shift + (config.max_shift - config.base_shift) * (N - low) / (high - low)
        sigmas = torch.linspace(1, 1 / T, T, dtype=torch.float64).numpy()
        self.scheduler.set_timesteps(sigmas=sigmas, mu=mu)
        return self.scheduler.sigmas.float().clone()

    @torch.no_grad()
    def condition(self, instructions, pictures):
        """Text features, once per distinct instruction: ({name: tensor (n, ...)}, index (S,) into them).

        FLUX's text encoders do not see the pictures; editors whose encoders do return one row for each picture.
        """
        distinct = list(dict.fromkeys(instructions))
        text, pooled, _ = self.pipe.encode_prompt(distinct, distinct, device=self.device, max_sequence_length=self.max_text)
        return {"text": text, "pooled": pooled}, torch.tensor([distinct.index(i) for i in instructions])

    @torch.no_grad()
    def encode(self, pictures):
        """Pictures (S, 3, H, W) uint8 -> latents (S, N, C) float32: the mode of the VAE's posterior, normalised, packed."""
        H, W = pictures.shape[2:]
        N, C = self.latent_shape((H, W))
        x = (2 * (pictures.to(self.device).float() / 255) - 1).to(self.vae.dtype)
        z = self.vae.encode(x.contiguous(memory_format=torch.channels_last)).latent_dist.mode().float()
        z = (z - self.vae.config.shift_factor) * self.vae.config.scaling_factor
        h, w = H // self.multiple, W // self.multiple            # 2 x 2 latent pixels make one token
        return z.reshape(len(z), -1, h, 2, w, 2).permute(0, 2, 4, 1, 3, 5).reshape(len(z), N, C)

    @torch.no_grad()
    def decode(self, x, size):
        """Latents (S, N, C) -> pictures (S, 3, H, W) uint8, clamped and rounded: what a judge sees and the next turn gets."""
        h, w = size[0] // self.multiple, size[1] // self.multiple
        z = x.reshape(len(x), h, w, -1, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(len(x), -1, 2 * h, 2 * w)
        z = z / self.vae.config.scaling_factor + self.vae.config.shift_factor
        y = self.vae.decode(z.to(self.vae.dtype).contiguous(memory_format=torch.channels_last)).sample.float()
        return ((y / 2 + .5).clamp(0, 1) * 255).round().byte()

    def velocity(self, x, t, cond, context, size):
        """v(x_t, t | instruction, picture before): x, context (S, N, C), t (S,), cond {"text", "pooled"} of S rows -> (S, N, C) float32."""
        model, dtype, h, w = self.transformer, self.transformer.dtype, size[0] // self.multiple, size[1] // self.multiple
        rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        ids = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(h * w, 3)
        img_ids = torch.cat([ids, ids + torch.tensor([1, 0, 0])]).to(self.device, dtype)
        guidance = torch.full((len(x),), self.guidance, device=self.device) if model.config.guidance_embeds else None
        v = model(hidden_states=torch.cat([x, context], 1).to(dtype), timestep=(t * 1000).to(dtype) / 1000, guidance=guidance,
                  pooled_projections=cond["pooled"].to(dtype), encoder_hidden_states=cond["text"].to(dtype),
                  txt_ids=torch.zeros(cond["text"].shape[1], 3, device=self.device, dtype=dtype), img_ids=img_ids,
                  return_dict=False)[0]
        return v[:, :x.shape[1]].float()

    @contextmanager
    def weights(self, name):
        """Run with another weight set: policy (being trained), old (sampled), ref (before training), ema (averaged)."""
        policy = [p.data for p in self.trained.values()]
        if name != "policy":
            for p, value in zip(self.trained.values(), self.sets[name]):
                p.data = value
        try:
            yield self
        finally:
            for p, value in zip(self.trained.values(), policy):
                p.data = value

    def copy_weights(self, *names):
        """Make or renew weight sets as copies of the policy."""
        for name in names:
            self.sets[name] = [p.detach().clone() for p in self.trained.values()]

    @torch.no_grad()
    def blend(self, name, keep):
        """set <- keep * set + (1 - keep) * policy: the moving average of `old` and `ema`."""
        torch._foreach_lerp_(self.sets[name], [p.data for p in self.trained.values()], 1 - keep)


FAMILIES = {"FluxKontextPipeline": KontextEditor}     # pipeline class in model_index.json -> editor


def load(path, device="cpu", dtype=torch.float32, guidance=2.5):
    """Load an editor from a diffusers folder or hub id. ValueError if it is none, or of a family not supported."""
    import transformers
    transformers.logging.set_verbosity_error()       # else it reports on processors that no editor here uses
    import diffusers
    from diffusers import DiffusionPipeline
    if not Path(path).is_dir() and (Path(__file__).parent / path).is_dir():
        path = Path(__file__).parent / path          # the embedded editor, from any working directory
    index = Path(path) / "model_index.json"
    try:
        name = (json.loads(index.read_text()) if index.parent.is_dir() else DiffusionPipeline.load_config(path))["_class_name"]
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"--model {path} is no editor: it has no readable model_index.json ({type(error).__name__})") from None
    if name not in FAMILIES:
        raise ValueError(f"--model {path} is a {name}; supported are {', '.join(FAMILIES)}")
    try:
        pipe = getattr(diffusers, name).from_pretrained(path, dtype=dtype)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"--model {path} is no editor that can be loaded: {str(error).splitlines()[0]}") from None
    pipe.set_progress_bar_config(disable=True)
    return FAMILIES[name](pipe, device, guidance=guidance)


# -------------------------------------------------------------------------------------------------------------- LoRA

class LoRALinear(nn.Module):
    """y = W x + (alpha / r) B A x: W frozen, A (r, in) and B (out, r) float32; B = 0 at the start, so nothing changes."""

    def __init__(self, base, rank, alpha, generator=None):
        super().__init__()
        self.base, self.scale = base, alpha / rank
        device = base.weight.device
        self.A = nn.Parameter((torch.randn(rank, base.in_features, generator=generator) / rank).to(device))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    def forward(self, x):
        return self.base(x) + self.scale * F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))


def add_lora(editor, rank, alpha=None, targets="all", seed=0):
    """Make the editor trainable: LoRA of `rank` on the target Linears, or the whole transformer if rank is 0.

    Fills editor.trained and the sets ref, old and ema with the weights as they are now. `alpha` defaults to 2 rank.
    """
    if rank == 0:
        editor.transformer.requires_grad_(True)
        editor.trained = dict(editor.transformer.named_parameters())
    else:
        generator = torch.Generator().manual_seed(seed)
        found = [n for n, m in editor.transformer.named_modules()
                 if isinstance(m, nn.Linear) and re.search(LORA_TARGETS[targets] + "$", n)]
        if not found:
            raise ValueError(f"no Linear of {type(editor.transformer).__name__} matches the LoRA targets {LORA_TARGETS[targets]}")
        for name in found:
            _wrap(editor, name, rank, 2 * rank if alpha is None else alpha, generator)
    editor.copy_weights("ref", "old", "ema")
    return editor


def _wrap(editor, name, rank, alpha, generator=None):
    parent, _, child = name.rpartition(".")
    parent = editor.transformer.get_submodule(parent)
    module = LoRALinear(getattr(parent, child), rank, alpha, generator)
    setattr(parent, child, module)
    editor.trained |= {f"{name}.A": module.A, f"{name}.B": module.B}


LORA_FILE = "pytorch_lora_weights.safetensors"   # the name that pipe.load_lora_weights(folder) looks for


def save_weights(editor, folder, name="policy"):
    """Write a weight set in diffusers' own layout: LoRA as `pytorch_lora_weights.safetensors`, or a `transformer` folder.

    alpha / r is folded into B: files of PEFT's layout, or without alpha, load in diffusers with another effect or none.
    """
    folder = Path(folder)
    with editor.weights(name):
        if not any(isinstance(m, LoRALinear) for m in editor.transformer.modules()):
            editor.transformer.save_pretrained(folder / "transformer")
            return
        state = {}
        for module_name, m in editor.transformer.named_modules():
            if isinstance(m, LoRALinear):
                state[f"transformer.{module_name}.lora_A.weight"] = m.A.detach().cpu().contiguous()
                state[f"transformer.{module_name}.lora_B.weight"] = (m.scale * m.B.detach()).cpu().contiguous()
        save_file(state, folder / (LORA_FILE + ".tmp"))
        os.replace(folder / (LORA_FILE + ".tmp"), folder / LORA_FILE)


def find_weights(path):
    """The LoRA file at a path (a file, or a folder that holds one), or a `transformer` folder. ValueError if there is none."""
    path = Path(path)
    for found in (path / "transformer", path / LORA_FILE, path):
        if found.is_file() or (found.name == "transformer" and found.is_dir()):
            return found
    raise ValueError(f"no LoRA at {path}: expected a safetensors file, or a folder with {LORA_FILE} or transformer/")


def load_weights(editor, path):
    """Load what `save_weights` wrote, from a LoRA file or a folder that holds one (or a `transformer` folder), as the policy.

    ValueError if the file fits another model.
    """
    file = find_weights(path)
    if file.is_dir():
        editor.transformer = type(editor.transformer).from_pretrained(file).to(editor.device).requires_grad_(False)
        editor.pipe.transformer = editor.transformer
        return add_lora(editor, 0)
    try:
        state = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} holds no LoRA that can be read: {error}") from None
    linears = {n: m for n, m in editor.transformer.named_modules() if isinstance(m, nn.Linear)}
    names = sorted({key.removeprefix("transformer.").rsplit(".", 2)[0] for key in state})
    if not names:
        raise ValueError(f"{file} holds no LoRA: it has no tensors")
    for name in names:
        A, B = (state.get(f"transformer.{name}.lora_{letter}.weight") for letter in "AB")
        base = linears.get(name)
        if A is None or B is None or base is None or B.shape[1:] != A.shape[:1] or (len(B), *A.shape[1:]) != (base.out_features, base.in_features):
            raise ValueError(f"{file} does not fit this editor: {name} is "
                             + ("not a Linear of it" if base is None else f"{base.out_features} x {base.in_features}")
                             + f", the file has {' and '.join(f'{k} {tuple(v.shape)}' for k, v in state.items() if f'{name}.' in k)}")
        _wrap(editor, name, len(A), len(A))
    for name in names:
        for letter in "AB":
            editor.trained[f"{name}.{letter}"].data.copy_(state[f"transformer.{name}.lora_{letter}.weight"])
    editor.copy_weights("ref", "old", "ema")
    return editor
