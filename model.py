"""What an editor is: a frozen flow model with text and picture encoders around it, and LoRA weights that are trained.

    editor = load("shapes/editor")                     # a folder or hub id of one of the pipelines in FAMILIES
    add_lora(editor, rank=64, alpha=128)               # rank 0: train the whole transformer
    cond = editor.condition(instructions, pictures)    # text, once per distinct instruction
    context = editor.encode(pictures)                  # (S, N, C)
    v = editor.velocity(x, t, cond, context, size)     # (S, N, C)
    pictures = editor.decode(x, size)                  # (S, 3, H, W) uint8
    with editor.using("old"): ...                    # policy | old | ref | ema

Latents x (S, N, C) are packed tokens; t in [0, 1], 1 = noise; pictures (S, 3, H, W) uint8; size = (H, W).
diffusers' own 0..1000 timesteps appear in this file only.
"""
import hashlib
import json
import math
import os
import re
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence

_ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
              "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")


# ----------------------------------------------------------------------------------------------------------- editors

class Editor:
    """What the families share; each family below says what is its own.

    A family gives: `guidance`, the pipeline's usual one; `negative`, the prompt of true CFG's second branch, or None;
    `lora_targets`; `mean` and `std` of the packed latents' channels; shift(T, N), encode_text(), predict().
    """
    guidance, negative = 1., None
    lora_targets = {"attention": _ATTENTION}     # name -> how the names of the Linears end that LoRA wraps
    memory_format = torch.channels_last          # of pictures: convolutions run several times faster on CPUs

    def __init__(self, pipe, device, guidance=None, offload=False):
        self.transformer, self.vae, self.scheduler = pipe.transformer, pipe.vae, pipe.scheduler
        self.pipe, self.device, self.offload = pipe, torch.device(device), offload
        self.guidance = type(self).guidance if guidance is None else guidance
        self.guided = self.negative is not None and self.guidance > 1    # true CFG: a second forward with the negative prompt
        self.multiple = pipe.vae_scale_factor * 2                # a side of a picture is a multiple of this many pixels
        self.trained, self.sets = {}, {}                         # name -> nn.Parameter; set name -> list of tensors
        self.encoders = [part for name, part in pipe.components.items() if name.startswith("text_encoder") and part is not None]
        for part in (self.transformer, self.vae, *self.encoders):
            part.requires_grad_(False).to("cpu" if offload and part in self.encoders else self.device)
        self.vae.to(memory_format=self.memory_format)
        if self.device.type == "cuda":
            self.transformer.enable_gradient_checkpointing()

    def latent_shape(self, size):
        """(N, C) of the packed latents of a picture (H, W). ValueError if a side is no multiple of `multiple`."""
        H, W = size
        if H % self.multiple or W % self.multiple:
            raise ValueError(f"picture is {H} x {W}, both sides must be multiples of {self.multiple}")
        return (H // self.multiple) * (W // self.multiple), self.transformer.config.in_channels

    def times(self, T, size):
        """The T+1 times of a denoising run, 1 -> 0, float32 on the CPU, shifted as in the pipeline. ValueError if T is too small."""
        sigmas = torch.linspace(1, 1 / T, T, dtype=torch.float64).numpy()
        self.scheduler.set_timesteps(sigmas=sigmas, mu=self.shift(T, self.latent_shape(size)[0]))
        if not self.scheduler.sigmas.isfinite().all():           # schedulers that stretch to a terminal sigma need two steps
            raise ValueError(f"{T} denoising steps are too few for the scheduler of a {type(self.pipe).__name__}")
        return self.scheduler.sigmas.float().clone()

    def shift(self, T, N):
        """mu of the scheduler's shift: linear in the number of tokens, between the two ends that its config names."""
        config = self.scheduler.config
        low, high = config.base_image_seq_len, config.max_image_seq_len
        return config.base_shift + (config.max_shift - config.base_shift) * (N - low) / (high - low)

    def text_keys(self, instructions, pictures):
        """What a row's text features depend on: the instruction; where the text encoder sees the picture, that too."""
        return instructions

    @torch.no_grad()
    def condition(self, instructions, pictures):
        """Text features on the CPU, once per distinct key (`text_keys`): ({name: tensor (n, ...)}, index (S,) into them).

        With true CFG also those of the negative prompt, as negative_NAME. With `offload` the encoders visit the device.
        """
        keys, first = self.text_keys(instructions, pictures), {}
        for s, key in enumerate(keys):
            first.setdefault(key, s)
        rows, place = list(first.values()), {key: n for n, key in enumerate(first)}
        instructions, pictures = [instructions[s] for s in rows], None if pictures is None else pictures[rows]
        if self.offload:
            for part in self.encoders:
                part.to(self.device)
        cond = self.encode_text(instructions, pictures)
        if self.guided:
            negative = self.encode_text([self.negative] * len(rows), pictures)
            cond |= {f"negative_{name}": value for name, value in negative.items()}
        if self.offload:
            for part in self.encoders:
                part.to("cpu")
        return {name: value.cpu() for name, value in cond.items()}, torch.tensor([place[key] for key in keys])

    @torch.no_grad()
    def encode(self, pictures):
        """Pictures (S, 3, H, W) uint8 -> latents (S, N, C) float32: the mode of the VAE's posterior, packed, normalised."""
        H, W = pictures.shape[2:]
        N, C = self.latent_shape((H, W))
        x = (2 * (pictures.to(self.device).float() / 255) - 1).to(self.vae.dtype)
        z = self.vae_encode(x.contiguous(memory_format=self.memory_format)).float()
        h, w = H // self.multiple, W // self.multiple            # 2 x 2 latent pixels make one token
        z = z.reshape(len(z), -1, h, 2, w, 2).permute(0, 2, 4, 1, 3, 5).reshape(len(z), N, C)
        return (z - self.mean) / self.std

    @torch.no_grad()
    def decode(self, x, size):
        """Latents (S, N, C) -> pictures (S, 3, H, W) uint8, clamped and rounded: what a judge sees and the next turn gets."""
        h, w = size[0] // self.multiple, size[1] // self.multiple
        z = (x * self.std + self.mean).reshape(len(x), h, w, -1, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(len(x), -1, 2 * h, 2 * w)
        y = self.vae_decode(z.to(self.vae.dtype).contiguous(memory_format=self.memory_format)).float()
        return ((y / 2 + .5).clamp(0, 1) * 255).round().byte()

    def vae_encode(self, x):
        return self.vae.encode(x).latent_dist.mode()

    def vae_decode(self, z):
        return self.vae.decode(z).sample

    def velocity(self, x, t, cond, context, size):
        """v(x_t, t | instruction, picture before): x, context (S, N, C), t (S,), cond rows of condition() -> (S, N, C) float32.

        With true CFG both branches are part of the graph, so that log-probabilities are those of what was sampled.
        """
        v = self.predict(x, t, cond, context, size)
        if not self.guided:
            return v
        negative = {name.removeprefix("negative_"): value for name, value in cond.items() if name.startswith("negative_")}
        return self.guide(v, self.predict(x, t, negative, context, size))

    def guide(self, v, v_negative):
        return v_negative + self.guidance * (v - v_negative)

    def run(self, x, t, context, **inputs):
        """The transformer on [x, context], in its own precision -> v of x's tokens, float32."""
        dtype = self.transformer.dtype
        v = self.transformer(hidden_states=torch.cat([x, context], 1).to(dtype), timestep=(t * 1000).to(dtype) / 1000,
                             return_dict=False, **inputs)[0]
        return v[:, :x.shape[1]].float()

    def positions(self, size, *layers):
        """Position ids (len(layers) h w, 3) of the tokens of pictures of one size: their layer, row, column."""
        h, w = size[0] // self.multiple, size[1] // self.multiple
        return torch.cartesian_prod(torch.tensor(layers), torch.arange(h), torch.arange(w)).to(self.device)

    @contextmanager
    def using(self, name):
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


class KontextEditor(Editor):
    """FLUX.1-Kontext: the context picture's tokens follow the noisy ones in the sequence, with first position id 1.

    Guidance is distilled: an input of the transformer, where that has one. The LoRA lists are those of Flow-GRPO's
    Kontext recipe (all) and DiffusionNFT's (attention).
    """
    guidance = 2.5
    lora_targets = {"attention": _ATTENTION,
                    "all": _ATTENTION + ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp")}

    def __init__(self, pipe, device, guidance=None, offload=False, max_text=128):
        super().__init__(pipe, device, guidance, offload)
        self.mean, self.std = self.vae.config.shift_factor, 1 / self.vae.config.scaling_factor
        self.max_text = max_text

    def encode_text(self, instructions, pictures):
        length = min(self.max_text, self.pipe.tokenizer_2.model_max_length)
        text, pooled, _ = self.pipe.encode_prompt(instructions, instructions, device=self.device, max_sequence_length=length)
        return {"text": text, "pooled": pooled}

    def predict(self, x, t, cond, context, size):
        dtype, text = self.transformer.dtype, cond["text"]
        guidance = torch.full((len(x),), self.guidance, device=self.device) if self.transformer.config.guidance_embeds else None
        return self.run(x, t, context, guidance=guidance, pooled_projections=cond["pooled"].to(dtype),
                        encoder_hidden_states=text.to(dtype), txt_ids=torch.zeros(text.shape[1], 3, device=self.device),
                        img_ids=self.positions(size, 0, 1))


class KleinEditor(Editor):
    """FLUX.2-klein: the context's first position id is 10; latents are normalised by the VAE's batch-norm statistics.

    The single blocks' attention and feed-forward are fused into two Linears, which are more than half of the model: they
    belong to both LoRA lists. A step-distilled checkpoint ignores guidance, as in the pipeline.
    """
    guidance, negative = 4., ""
    lora_targets = {"attention": _ATTENTION + ("attn.to_qkv_mlp_proj", "attn.to_out")}
    lora_targets["all"] = lora_targets["attention"] + ("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out")

    def __init__(self, pipe, device, guidance=None, offload=False, max_text=512):
        super().__init__(pipe, device, guidance, offload)
        self.guided = self.guided and not pipe.config.is_distilled
        bn, self.max_text = self.vae.bn, max_text
        self.mean, self.std = bn.running_mean.float(), (bn.running_var.float() + self.vae.config.batch_norm_eps).sqrt()

    def shift(self, T, N):
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
        return compute_empirical_mu(N, T)

    def encode_text(self, instructions, pictures):
        # one at a time: the language model returns all hidden states and logits of its 512 padded tokens
        rows = [self.pipe.encode_prompt(i, device=self.device, max_sequence_length=self.max_text)[0] for i in instructions]
        return {"text": torch.cat(rows)}

    def predict(self, x, t, cond, context, size):
        text = cond["text"]
        ids = self.positions(size, 0, 10)
        txt_ids = F.pad(torch.arange(text.shape[1], device=self.device)[:, None], (3, 0))         # 0, 0, 0, place
        return self.run(x, t, context, encoder_hidden_states=text.to(self.transformer.dtype), txt_ids=txt_ids,
                        img_ids=F.pad(ids, (0, 1)), guidance=None)


class QwenEditor(Editor):
    """Qwen-Image-Edit: the text encoder sees the picture, so text features belong to a picture and an instruction.

    It is shown the picture at the size that is edited. CFG rescales each token to the length it has without guidance.
    """
    guidance, negative = 4., " "
    lora_targets = {"attention": _ATTENTION,
                    "all": _ATTENTION + ("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2")}
    memory_format = torch.contiguous_format      # a VAE for video: pictures are its first frame

    def __init__(self, pipe, device, guidance=None, offload=False):
        super().__init__(pipe, device, guidance, offload)
        self.mean, self.std = (torch.tensor(values, device=self.device).repeat_interleave(4)      # 4 latent pixels a token
                               for values in (self.vae.config.latents_mean, self.vae.config.latents_std))

    def vae_encode(self, x):
        return super().vae_encode(x[:, :, None])[:, :, 0]

    def vae_decode(self, z):
        return super().vae_decode(z[:, :, None])[:, :, 0]

    def text_keys(self, instructions, pictures):
        return [(text, picture.numpy().tobytes()) for text, picture in zip(instructions, pictures)]

    def show(self, picture):
        """A picture as encode_prompt takes it."""
        return picture

    def encode_text(self, instructions, pictures):
        # one at a time, as the Plus pipeline asks for: a list of pictures would be several references of every prompt
        shown = [self.show(Image.fromarray(picture.permute(1, 2, 0).numpy())) for picture in pictures]
        rows = [self.pipe.encode_prompt(text, picture, device=self.device)[0][0] for text, picture in zip(instructions, shown)]
        return {"text": pad_sequence(rows, batch_first=True), "length": torch.tensor([len(row) for row in rows])}

    def predict(self, x, t, cond, context, size):
        longest = int(cond["length"].max())
        mask = torch.arange(longest, device=self.device) < cond["length"][:, None]
        shape = (1, size[0] // self.multiple, size[1] // self.multiple)
        return self.run(x, t, context, encoder_hidden_states=cond["text"][:, :longest].to(self.transformer.dtype),
                        encoder_hidden_states_mask=None if mask.all() else mask, img_shapes=[[shape, shape]] * len(x))

    def guide(self, v, v_negative):
        guided = super().guide(v, v_negative)
        return guided * (v.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))


class QwenPlusEditor(QwenEditor):
    """Qwen-Image-Edit 2509 and 2511: the text encoder is shown the picture at an area of its own, whatever is edited."""

    def show(self, picture):
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus
        width, height = plus.calculate_dimensions(plus.CONDITION_IMAGE_SIZE, picture.width / picture.height)
        return [self.pipe.image_processor.resize(picture, height, width)]


# pipeline class in model_index.json -> editor
FAMILIES = {"FluxKontextPipeline": KontextEditor, "Flux2KleinPipeline": KleinEditor,
            "QwenImageEditPipeline": QwenEditor, "QwenImageEditPlusPipeline": QwenPlusEditor}


def fingerprint(path):
    """Short digest of the content at a path: a model folder, a LoRA file or folder, a hub id's cached files (else its name)."""
    folder = _locate(path)
    if not folder.exists():
        from huggingface_hub import snapshot_download
        try:
            folder = Path(snapshot_download(str(path), local_files_only=True))
        except (OSError, ValueError):
            return hashlib.sha256(str(path).encode()).hexdigest()[:16]
    if not (folder / "model_index.json").is_file():
        folder = find_weights(folder)
    digest = hashlib.sha256()
    files = [folder] if folder.is_file() else sorted(f for f in folder.rglob("*") if f.suffix in CONTENT and f.is_file())
    for file in files:
        digest.update(f"{file.relative_to(folder)} {file.stat().st_size} ".encode())
        with open(file, "rb") as opened:
            step = max(1 << 20, file.stat().st_size // 256)
            for start in range(0, file.stat().st_size, step):
                opened.seek(start)
                digest.update(opened.read(1 << 20))
    return digest.hexdigest()[:16]


CONTENT = (".json", ".safetensors", ".bin", ".txt", ".model", ".jinja")


def _locate(path):
    path = Path(path)
    here = Path(__file__).parent / path              # shapes/editor is found from any working directory
    return here if here.is_dir() and not path.exists() else path


def load(path, device="cpu", dtype=None, guidance=None, offload=False):
    """Load an editor from a diffusers folder or hub id. ValueError if it is none, or of a family not supported.

    `dtype` None: float32 on a CPU and for small models (transformer under 1 GB of files), else bfloat16.
    `guidance` None: the family's own. `offload`: text encoders are on the device only while they work.
    """
    import transformers
    transformers.logging.set_verbosity_error()       # else it reports on processors that no editor here uses
    import diffusers
    from diffusers import DiffusionPipeline
    path = _locate(path)
    index = Path(path) / "model_index.json"
    try:
        name = (json.loads(index.read_text()) if index.parent.is_dir() else DiffusionPipeline.load_config(str(path)))["_class_name"]
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"--model {path} is no editor: it has no readable model_index.json ({type(error).__name__})") from None
    if name not in FAMILIES:
        raise ValueError(f"--model {path} is a {name}; supported are {', '.join(FAMILIES)}")
    if dtype is None:
        size = sum(file.stat().st_size for file in (Path(path) / "transformer").glob("*.safetensors"))
        small = Path(path).is_dir() and size < 1e9
        dtype = torch.float32 if small or torch.device(device).type == "cpu" else torch.bfloat16
    try:
        pipe = getattr(diffusers, name).from_pretrained(str(path), dtype=dtype)
    except (OSError, SafetensorError, ImportError) as error:     # ImportError: a processor that needs torchvision
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"--model {path} is no editor that can be loaded: {reason}") from None
    pipe.set_progress_bar_config(disable=True)
    return FAMILIES[name](pipe, device, guidance, offload)


# -------------------------------------------------------------------------------------------------------------- LoRA

class LoRALinear(nn.Module):
    """y = W x + (alpha / r) B A x: W frozen, A (r, in) and B (out, r) float32; B = 0 at the start, so nothing changes.

    A ~ N(0, 1 / in): Adam moves all entries alike, and must not overwrite A, the directions that B learns in, within a few steps.
    """

    def __init__(self, base, rank, alpha, generator=None):
        super().__init__()
        self.base, self.scale = base, alpha / rank
        device = base.weight.device
        self.A = nn.Parameter((torch.randn(rank, base.in_features, generator=generator) / math.sqrt(base.in_features)).to(device))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    def forward(self, x):
        if self.base.weight.dtype == torch.float32:          # one product of x, not three; in bfloat16 W + B A would round B A away
            return F.linear(x, self.base.weight + self.scale * (self.B @ self.A), self.base.bias)
        return self.base(x) + self.scale * F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))


def add_lora(editor, rank, alpha=None, targets="all", seed=0):
    """Make the editor trainable: LoRA of `rank` on the target Linears, or the whole transformer if rank is 0.

    `targets` is "every" for every Linear, one of the family's lists (`lora_targets`), or ends of names separated by commas.
    Fills editor.trained and the sets ref, old and ema with the weights as they are now. `alpha` defaults to 2 rank.
    ValueError if a target matches no Linear.
    """
    if rank == 0:
        editor.transformer.requires_grad_(True)
        editor.trained = dict(editor.transformer.named_parameters())
    else:
        generator = torch.Generator().manual_seed(seed)
        linears = [name for name, module in editor.transformer.named_modules() if isinstance(module, nn.Linear)]
        ends = editor.lora_targets.get(targets) or targets.split(",")
        found = {end: [name for name in linears if targets == "every" or f".{name}".endswith(f".{end}")] for end in ends}
        for end, names in found.items():
            if not names:
                raise ValueError(f"no Linear of {type(editor.transformer).__name__} is named like the LoRA target {end!r}")
        for name in linears:
            if any(name in names for names in found.values()):
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
    with editor.using(name):
        if not any(isinstance(m, LoRALinear) for m in editor.transformer.modules()):
            editor.transformer.save_pretrained(folder / "transformer")
            return
        state = {}
        for module_name, m in editor.transformer.named_modules():
            if isinstance(m, LoRALinear):
                state[f"transformer.{module_name}.lora_A.weight"] = m.A.detach().cpu().contiguous()
                state[f"transformer.{module_name}.lora_B.weight"] = (m.scale * m.B.detach()).cpu().contiguous()
        folder.mkdir(parents=True, exist_ok=True)
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
    """Load a LoRA as the policy, from a file or a folder that holds one, or what `save_weights` wrote with rank 0.

    Any file that the pipeline's own load_lora_weights takes: its alpha is found in its keys or in its metadata, else it
    is the rank. ValueError if the file fits another model, or holds more than LoRA of Linears of the transformer.
    """
    file = find_weights(path)
    if file.is_dir():
        whole = type(editor.transformer).from_pretrained(file)
        editor.transformer.load_state_dict(whole.state_dict())
        return add_lora(editor, 0)
    try:
        state, alpha = read_lora(editor.pipe, file)
    except Exception as error:      # many kinds for what is no LoRA: of safetensors, of diffusers' converters
        raise ValueError(f"{file} holds no LoRA that can be read: {(str(error) or type(error).__name__).splitlines()[0]}") from None
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
    for name in names:
        A, B = (state[f"transformer.{name}.lora_{letter}.weight"] for letter in "AB")
        _wrap(editor, name, len(A), alpha(name, len(A)))
        editor.trained[f"{name}.A"].data.copy_(A), editor.trained[f"{name}.B"].data.copy_(B)
    editor.copy_weights("ref", "old", "ema")
    return editor


def read_lora(pipe, file):
    """A LoRA file, through the pipeline's own converters -> {transformer.NAME.lora_A.weight: ...}, alpha(name, rank)."""
    from diffusers.utils import convert_unet_state_dict_to_peft
    read = pipe.lora_state_dict(load_file(file), return_alphas=True)
    state, alphas = read if isinstance(read, tuple) else (read, {})
    if any(".lora." in key for key in state):                    # diffusers' older names: lora.down and lora.up
        state = convert_unet_state_dict_to_peft(state)
    with safe_open(file, "pt") as opened:
        config = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
    config = {key.removeprefix("transformer."): value for key, value in config.items()}

    def alpha(name, rank):
        if f"transformer.{name}.alpha" in (alphas or {}):
            return float(alphas[f"transformer.{name}.alpha"])
        own = [value for pattern, value in config.get("alpha_pattern", {}).items() if re.fullmatch(rf"(.*\.)?({pattern})", name)]
        value = own[0] if own else config.get("lora_alpha", rank)
        return value * math.sqrt(rank) if config.get("use_rslora") else value
    return state, alpha
