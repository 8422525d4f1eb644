"""What an editor is: a frozen flow model with encoders of text and pictures around it, and LoRA that is trained.

    editor = load("shapes/editor")                     # a folder or hub id of one of the pipelines in FAMILIES
    add_lora(editor, rank=64, alpha=128)               # rank 0: train the whole transformer
    text, index = editor.condition(instructions, pictures)                # once per distinct instruction; row -> which
    cond = {name: value[index].to(editor.device) for name, value in text.items()}
    context = editor.encode(pictures)                  # (S, N, C)
    v = editor.velocity(x, t, cond, context, size)     # (S, N, C)
    pictures = editor.decode(x, size)                  # (S, 3, H, W) uint8
    with editor.using("old"): ...                      # policy | old | ref | ema

Latents x (S, N, C) are packed tokens; t in [0, 1], 1 = noise; pictures (S, 3, H, W) uint8; size = (H, W).
diffusers' own 0..1000 timesteps appear in this file only.
"""
import hashlib
import json
import math
import os
import re
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence

ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
             "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")
CHUNK = 16 * 48 * 48     # pixels that a CPU puts through a VAE at a time


def multiplies_in_bfloat16(device):
    """Is it a CPU that is faster in bfloat16 than in float32? One with AMX, or AMD's with avx512_bf16 (results.md).

    Intel's with avx512_bf16 and without AMX is slower. A look at flags and no measurement: a resumed run must compute
    the same bits.
    """
    def has(feature):
        check = getattr(torch.cpu, f"_is_{feature}_supported", None)
        return check is not None and check()
    on_cpu = torch.device(device).type == "cpu"
    return on_cpu and (has("amx_tile") or has("avx512_bf16") and made_by_amd())


def made_by_amd():
    """Is it AMD's CPU? Linux tells; elsewhere no."""
    listed = Path("/proc/cpuinfo")
    return listed.exists() and "AuthenticAMD" in listed.read_text()


# ------------------------------------------------------------------------------------------------------------ editors

class Editor:
    """What the families share. A family gives statistics(), encode_text() and predict(), and overrides what differs."""
    guidance = 1.                                # the pipeline's usual one
    negative = None                              # the prompt of true CFG's second branch, if there is one
    max_text = None                              # tokens that a text is padded or cut to
    lora_targets = {"attention": ATTENTION}      # name of a list -> how the names of the Linears end that LoRA wraps
    memory_format = torch.channels_last          # of pictures: convolutions run several times faster on CPUs
    video = False                                # is the VAE one for video?
    fast = False                                 # let a CPU multiply in bfloat16, as --bf16 asks
    sharded = False                              # has shard() spread the frozen weights over the processes?

    def __init__(self, pipe, device, guidance=None, offload=False, max_text=None, shard=False):
        self.pipe, self.device, self.offload = pipe, torch.device(device), offload
        self.transformer, self.vae, self.scheduler = pipe.transformer, pipe.vae, pipe.scheduler
        self.dtype = pipe.transformer.dtype                      # asked once: it looks through all modules
        self.encoders = [part for name, part in pipe.components.items() if name.startswith("text_encoder") and part]
        self.multiple = 2 * pipe.vae_scale_factor                # a side of a picture is a multiple of this many pixels
        self.max_text = max_text or self.max_text
        self.guidance = self.guidance if guidance is None else guidance
        # True CFG is a second forward with the negative prompt; step-distilled models ignore it, as in the pipeline.
        distilled = getattr(pipe.config, "is_distilled", False)
        self.guided = self.negative is not None and self.guidance > 1 and not distilled
        self.trained, self.sets = {}, {}                         # name -> nn.Parameter; set name -> list of tensors

        for part in (self.transformer, self.vae, *self.encoders):
            part.requires_grad_(False)
            waits = shard if part is self.transformer else offload and part in self.encoders
            part.to("cpu" if waits else self.device)
        self.vae.to(memory_format=self.memory_format)
        if self.device.type == "cuda":
            self.transformer.enable_gradient_checkpointing()
            # With cuDNN's attention, torch 2.11's choice on an H100, Kontext's update ends in an illegal memory access.
            # By torch's source (native/cudnn/MHA.cpp) the plan of a backward pass is kept by the layouts of q, k and v.
            # Those are the same in both kinds of blocks, the gradient's is not: one plan reads beyond the other's
            # memory. Off for the whole process, since checkpointing computes again outside of the forward's contexts.
            torch.backends.cuda.enable_cudnn_sdp(False)
        self.mean, self.std = self.statistics()                  # of the packed latents' channels

    def latent_shape(self, size):
        """(N, C) of the packed latents of a picture (H, W). ValueError if a side is no multiple of `multiple`."""
        H, W = size
        if H % self.multiple or W % self.multiple:
            raise ValueError(f"picture is {H} x {W}, both sides must be multiples of {self.multiple}")
        return (H // self.multiple) * (W // self.multiple), self.transformer.config.in_channels

    def times(self, T, size):
        """The T+1 times of a denoising run, 1 -> 0, float32 on the CPU, shifted as in the pipeline.

        ValueError if T is too small: schedulers that stretch their times to a last one above 0 need two steps.
        """
        N, _ = self.latent_shape(size)
        sigmas = torch.linspace(1, 1 / T, T, dtype=torch.float64).numpy()
        self.scheduler.set_timesteps(sigmas=sigmas, mu=self.shift(T, N))
        if not self.scheduler.sigmas.isfinite().all():
            raise ValueError(f"{T} denoising steps are too few for the scheduler of a {type(self.pipe).__name__}")
        return self.scheduler.sigmas.float().clone()

    def shift(self, T, N):
        """mu of the scheduler's shift: linear in the number of tokens, between the two ends that its config names."""
        config = self.scheduler.config
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        return config.base_shift + slope * (N - config.base_image_seq_len)

    def text_keys(self, instructions, pictures):
        """What a row's text features depend on: the instruction; where the text encoder sees the picture, that too."""
        return instructions

    @torch.no_grad()
    def condition(self, instructions, pictures):
        """Text features on the CPU, once per distinct key of `text_keys`.

        Returns {name: tensor (n, ...)} and for each of the S rows its place in them (S,). With true CFG also those of
        the negative prompt, as negative_NAME. With `offload` the encoders visit the device.
        """
        keys, rows, place = self.text_keys(instructions, pictures), [], {}
        for s, key in enumerate(keys):
            if key not in place:
                place[key] = len(rows)
                rows.append(s)                                   # the first row of each
        instructions = [instructions[s] for s in rows]
        pictures = None if pictures is None else pictures[rows]

        for part in self.encoders if self.offload else []:
            part.to(self.device)
        cond = self.encode_text(instructions, pictures)
        if self.guided:
            negative = self.encode_text([self.negative] * len(rows), pictures)
            cond |= {f"negative_{name}": value for name, value in negative.items()}
        for part in self.encoders if self.offload else []:
            part.to("cpu")
        index = torch.tensor([place[key] for key in keys])
        return {name: value.cpu() for name, value in cond.items()}, index

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.fast)

    def in_chunks(self, work, x, pixels):
        """work(x), on a CPU as many pictures at a time as its cache holds: the same numbers, in 2/3 of the time."""
        if self.device.type != "cpu" or len(x) == 0:
            return work(x)
        # Never one picture out of several: alone it is computed in another layout, with other rounding.
        few = max(3, CHUNK // pixels)
        parts = x.tensor_split(math.ceil(len(x) / few))
        return torch.cat([work(part) for part in parts])

    @torch.no_grad()
    def encode(self, pictures):
        """Pictures (S, 3, H, W) uint8 -> latents (S, N, C) float32: the posterior's mode, packed, normalised."""
        S, _, H, W = pictures.shape
        N, C = self.latent_shape((H, W))
        h, w = H // self.multiple, W // self.multiple
        y = 2 * (pictures.to(self.device).float() / 255) - 1
        y = y.to(self.vae.dtype).contiguous(memory_format=self.memory_format)
        # a VAE for video takes a picture for its first frame
        y = y[:, :, None] if self.video else y
        with self.autocast():
            z = self.in_chunks(lambda part: self.vae.encode(part).latent_dist.mode(), y, H * W).float()
        # 2 x 2 latent pixels make one token
        z = z.reshape(S, -1, h, 2, w, 2).permute(0, 2, 4, 1, 3, 5).reshape(S, N, C)
        return (z - self.mean) / self.std

    @torch.no_grad()
    def decode(self, x, size):
        """Latents (S, N, C) -> pictures (S, 3, H, W) uint8, clamped and rounded: what the next turn gets."""
        S, h, w = len(x), size[0] // self.multiple, size[1] // self.multiple
        z = (x * self.std + self.mean).reshape(S, h, w, -1, 2, 2)
        z = z.permute(0, 3, 1, 4, 2, 5).reshape(S, -1, 2 * h, 2 * w)
        z = z.to(self.vae.dtype).contiguous(memory_format=self.memory_format)
        z = z[:, :, None] if self.video else z
        with self.autocast():
            y = self.in_chunks(lambda part: self.vae.decode(part).sample, z, size[0] * size[1])
        y = y.float().reshape(S, 3, *size)
        return ((y / 2 + .5).clamp(0, 1) * 255).round().byte()

    def velocity(self, x, t, cond, context, size):
        """v(x_t, t | instruction, picture before) (S, N, C) float32, of x and context (S, N, C), t (S,), rows of cond.

        With true CFG both branches are part of the graph, so that log-probabilities are those of what was sampled.
        """
        v = self.predict(x, t, cond, context, size)
        if not self.guided:
            return v
        prefix = "negative_"
        negative = {name.removeprefix(prefix): value for name, value in cond.items() if name.startswith(prefix)}
        return self.guide(v, self.predict(x, t, negative, context, size))

    def guide(self, v, v_negative):
        return v_negative + self.guidance * (v - v_negative)

    def run(self, x, t, context, **inputs):
        """The transformer on [x, context], in its own precision -> v of x's tokens, float32."""
        both = torch.cat([x, context], 1).to(self.dtype)
        t = (t * 1000).to(self.dtype) / 1000                     # rounded where the pipeline rounds
        with self.autocast():
            v = self.transformer(hidden_states=both, timestep=t, return_dict=False, **inputs)[0]
        return v[:, :x.shape[1]].float()

    def positions(self, size, *layers):
        """Position ids (len(layers) h w, 3) of the tokens of pictures of one size: their layer, row, column."""
        h, w = size[0] // self.multiple, size[1] // self.multiple
        return torch.cartesian_prod(torch.tensor(layers), torch.arange(h), torch.arange(w)).to(self.device)

    @contextmanager
    def using(self, name):
        """Run with another weight set: policy (being trained), old (sampled), ref (before training), ema (averaged)."""
        before = [p.data for p in self.trained.values()]
        values = before if name == "policy" else self.sets[name]
        merged = {layer: layer.merged for layer in self.lora_layers()}       # of the set that was in use
        try:
            for p, value in zip(self.trained.values(), values):
                p.data = value
            for layer in merged:
                layer.merged = None
            yield self
        finally:
            for p, value in zip(self.trained.values(), before):
                p.data = value
            for layer, weight in merged.items():
                layer.merged = weight

    @contextmanager
    def merged(self):
        """Make W + s B A once for all forwards of this weight set in here. Gradients reach A and B when it is left.

        In float32 only: in bfloat16 the sum would round B A away. Nothing is changed that would have to be undone.
        """
        layers, learning = self.lora_layers(), torch.is_grad_enabled()
        try:
            for layer in layers:
                layer.merged = layer.weight().detach().requires_grad_(learning)
            yield self
            seen = [layer for layer in layers if layer.merged.grad is not None]
            if seen:
                torch.autograd.backward([layer.weight() for layer in seen], [layer.merged.grad for layer in seen])
        finally:
            for layer in layers:
                layer.merged = None

    def lora_layers(self):
        """Its Linears with LoRA whose weight is float32, and here as a whole."""
        if self.sharded:
            return []
        layers = [module for module in self.transformer.modules() if isinstance(module, LoRALinear)]
        return [layer for layer in layers if layer.base.weight.dtype == torch.float32]

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

    Guidance is distilled: an input of the transformer, where that has one. T5 sees the first 128 tokens of a text, as
    in Flow-GRPO; the pipeline's own default is 512, and its padding makes other pictures. The LoRA lists are those of
    Flow-GRPO's Kontext recipe (all) and DiffusionNFT's (attention).
    """
    guidance = 2.5
    max_text = 128
    lora_targets = {"attention": ATTENTION, "all": ATTENTION + (
        "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp")}

    def statistics(self):
        return self.vae.config.shift_factor, 1 / self.vae.config.scaling_factor

    def encode_text(self, instructions, pictures):
        length = min(self.max_text, self.pipe.tokenizer_2.model_max_length)
        text, pooled, _ = self.pipe.encode_prompt(
            instructions, instructions, device=self.device, max_sequence_length=length)
        return {"text": text, "pooled": pooled}

    def predict(self, x, t, cond, context, size):
        text = cond["text"].to(self.dtype)
        guidance = None
        if self.transformer.config.guidance_embeds:
            guidance = torch.full((len(x),), self.guidance, device=self.device)
        return self.run(x, t, context, guidance=guidance, encoder_hidden_states=text,
                        pooled_projections=cond["pooled"].to(text.dtype), img_ids=self.positions(size, 0, 1),
                        txt_ids=torch.zeros(text.shape[1], 3, device=self.device))


class KleinEditor(Editor):
    """FLUX.2-klein: the context's first position id is 10; latents are normalised by the VAE's batch-norm statistics.

    The single blocks' attention and feed-forward are fused into two Linears, which are more than half of the model:
    they belong to both LoRA lists.
    """
    guidance = 4.
    negative = ""
    max_text = 512
    lora_targets = {"attention": ATTENTION + ("attn.to_qkv_mlp_proj", "attn.to_out")}
    lora_targets["all"] = lora_targets["attention"] + (
        "ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out")

    def statistics(self):
        variance = self.vae.bn.running_var.float() + self.vae.config.batch_norm_eps
        return self.vae.bn.running_mean.float(), variance.sqrt()

    def shift(self, T, N):
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
        return compute_empirical_mu(N, T)

    def encode_text(self, instructions, pictures):
        # one at a time: the language model returns all hidden states and logits of its 512 padded tokens
        # (and each text once: the negative prompt is the same for all)
        found = {}
        for text in dict.fromkeys(instructions):
            found[text] = self.pipe.encode_prompt(text, device=self.device, max_sequence_length=self.max_text)[0]
        return {"text": torch.cat([found[text] for text in instructions])}

    def predict(self, x, t, cond, context, size):
        text = cond["text"].to(self.dtype)
        places = torch.arange(text.shape[1], device=self.device)
        return self.run(x, t, context, guidance=None, encoder_hidden_states=text,
                        img_ids=F.pad(self.positions(size, 0, 10), (0, 1)),      # layer, row, column, 0
                        txt_ids=F.pad(places[:, None], (3, 0)))                  # 0, 0, 0, place


class QwenEditor(Editor):
    """Qwen-Image-Edit: the text encoder sees the picture, so text features belong to a picture and an instruction.

    It is shown the picture at the size that is edited. CFG rescales each token to the length it has without guidance.
    """
    guidance = 4.
    negative = " "
    lora_targets = {"attention": ATTENTION, "all": ATTENTION + (
        "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2")}
    memory_format = torch.contiguous_format
    video = True

    def statistics(self):
        config = self.vae.config
        mean, std = (torch.tensor(values, device=self.device) for values in (config.latents_mean, config.latents_std))
        return mean.repeat_interleave(4), std.repeat_interleave(4)      # 4 latent pixels a token

    def text_keys(self, instructions, pictures):
        return [(text, picture.numpy().tobytes()) for text, picture in zip(instructions, pictures)]

    def show(self, picture):
        """A picture as encode_prompt takes it."""
        return picture

    def encode_text(self, instructions, pictures):
        # one at a time, as the Plus pipeline asks for: a list of pictures would be several references of every prompt
        rows = []
        for text, picture in zip(instructions, pictures):
            shown = self.show(Image.fromarray(picture.permute(1, 2, 0).numpy()))
            rows.append(self.pipe.encode_prompt(text, shown, device=self.device)[0][0])
        return {"text": pad_sequence(rows, batch_first=True), "length": torch.tensor([len(row) for row in rows])}

    def predict(self, x, t, cond, context, size):
        longest = int(cond["length"].max())
        mask = torch.arange(longest, device=self.device) < cond["length"][:, None]
        shape = (1, size[0] // self.multiple, size[1] // self.multiple)
        return self.run(x, t, context, img_shapes=[[shape, shape]] * len(x),
                        encoder_hidden_states=cond["text"][:, :longest].to(self.dtype),
                        encoder_hidden_states_mask=None if mask.all() else mask)

    def guide(self, v, v_negative):
        guided = super().guide(v, v_negative)
        return guided * (v.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))


class QwenPlusEditor(QwenEditor):
    """Qwen-Image-Edit 2509 and 2511: the text encoder sees the picture at an area of its own, whatever is edited."""

    def show(self, picture):
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus
        width, height = plus.calculate_dimensions(plus.CONDITION_IMAGE_SIZE, picture.width / picture.height)
        return [self.pipe.image_processor.resize(picture, height, width)]


# pipeline class in model_index.json -> editor
FAMILIES = {"FluxKontextPipeline": KontextEditor, "Flux2KleinPipeline": KleinEditor,
            "QwenImageEditPipeline": QwenEditor, "QwenImageEditPlusPipeline": QwenPlusEditor}


# ------------------------------------------------------------------------------------------------------------ loading

def load(path, device="cpu", dtype=None, guidance=None, offload=False, shard=False):
    """Load an editor from a diffusers folder or hub id. ValueError if it is none, not whole, or of another family.

    `dtype` None: float32 on a CPU and for small models (a transformer under 1 GB of files), else bfloat16.
    `guidance` None: the family's own. `offload`: text encoders are on the device only while they work. `shard`: the
    transformer waits on the CPU for shard().
    """
    if guidance is not None and not 0 <= guidance < math.inf:
        raise ValueError(f"--guidance {guidance} is no finite number from 0 up")
    try:
        pipe = load_pipeline(path, dtype, torch.device(device).type == "cpu")
    except Exception as error:                       # diffusers and transformers raise many kinds, of many lines
        hint = "" if Path(path).is_dir() else " (no folder here; a hub id needs a network and, for some, HF_TOKEN)"
        raise ValueError(f"--model {path} is no editor that can be loaded{hint}: {first_line(error)}") from error
    editor = FAMILIES[type(pipe).__name__](pipe, device, guidance, offload, shard=shard)
    without = editor.negative is None and not editor.transformer.config.guidance_embeds
    # Kontext's is train.py's default, which nobody typed
    if without and guidance not in (None, KontextEditor.guidance):
        raise ValueError(f"--guidance {guidance} has no effect here: the transformer of {path} takes none")
    return editor


def load_pipeline(path, dtype, on_cpu):
    """The pipeline of a folder or hub id. ValueError, or an error of the libraries, if it is not whole and finite."""
    import diffusers
    import transformers
    diffusers.logging.set_verbosity_error()          # what matters of their warnings is raised below
    transformers.logging.set_verbosity_error()

    folder, family, parts = find_pipeline(path)
    networks = check_parts(folder, parts)
    if dtype is None:
        size = sum(file.stat().st_size for file in (folder / "transformer").glob("*.safetensors"))
        dtype = torch.float32 if on_cpu or size < 1e9 else torch.bfloat16
    models = {name: load_network(folder / name, *parts[name], dtype) for name in networks}
    pipe = getattr(diffusers, family).from_pretrained(folder, dtype=dtype, **models)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def find_pipeline(path):
    """Which pipeline it is -> its folder, its family, its parts {name: (library, class)}.

    A hub id is downloaded only if it is one of the families. ValueError if it is none, or a part is of another library.
    """
    import diffusers
    folder = find_folder(path)
    if folder.is_dir():
        index = json.loads((folder / "model_index.json").read_text())
    else:
        index = diffusers.DiffusionPipeline.load_config(str(path))
    family = index.get("_class_name")
    if family not in FAMILIES:
        raise ValueError(f"it is a {family}; supported are {', '.join(FAMILIES)}")
    parts = {name: part for name, part in index.items() if isinstance(part, list) and part[0]}
    for name, (library, _) in parts.items():
        if library not in ("diffusers", "transformers"):         # it would be imported
            raise ValueError(f"its {name} is of {library!r}, expected diffusers or transformers")
    if not folder.is_dir():
        folder = Path(diffusers.DiffusionPipeline.download(str(path), use_safetensors=True))
    return folder, family, parts


def check_parts(folder, parts):
    """Which parts are networks, by name. ValueError if a part has not the files that it needs."""
    # Small files first: where transformers finds no tokenizer or config, it goes on with no words, or a default size.
    for name in parts:
        files = {file.name for file in (folder / name).glob("*")}
        whole = any(file.endswith("config.json") for file in files)
        if name.startswith(("tokenizer", "processor")):
            whole = "tokenizer_config.json" in files and files & {"tokenizer.json", "spiece.model", "merges.txt"}
        if not whole:
            raise ValueError(f"{name}/ is not whole, it holds {', '.join(sorted(files)) or 'nothing'}")

    # A pickle (.bin) is none: it may run anything when it is loaded.
    networks = [name for name in parts if name in ("transformer", "vae") or name.startswith("text_encoder")]
    for name in networks:
        if not any((folder / name).glob("*.safetensors")):
            raise ValueError(f"{name}/ holds no safetensors file")
    return networks


def load_network(folder, library, class_name, dtype):
    """A network, tensor by tensor: the libraries only warn of a missing one, and draw it at random. ValueError then."""
    import diffusers
    import transformers
    network_class = getattr(diffusers if library == "diffusers" else transformers, class_name)
    network, info = network_class.from_pretrained(folder, dtype=dtype, use_safetensors=True, output_loading_info=True)
    missing = [key for key in sorted(info["missing_keys"]) if "num_batches_tracked" not in key]
    if missing:
        raise ValueError(f"{folder.name}/ lacks {missing[0]} ({len(missing)} missing in all)")
    check_finite(network.state_dict(), f"{folder.name}/")
    return network


def find_folder(path):
    """A path, beside this file if it is not there: shapes/editor is found from any working directory."""
    beside = Path(__file__).parent / path
    return beside if beside.is_dir() and not Path(path).exists() else Path(path)


def fingerprint(path):
    """Short digest of the content at a path: a model folder, a LoRA file or folder, or a hub id by its cached files.

    Of a file over 256 MB, 256 blocks of 1 MB count. A hub id of which nothing is cached: a digest of its name (so ask
    after it was loaded). ValueError if a folder holds neither a model nor a LoRA.
    """
    found, digest = find_folder(path), hashlib.sha256()
    if not found.exists():
        from huggingface_hub import snapshot_download
        try:
            found = Path(snapshot_download(str(path), local_files_only=True))
        except (OSError, ValueError):
            return hashlib.sha256(str(path).encode()).hexdigest()[:16]
    # the files that a model is loaded from, or the one with trained weights
    if (found / "model_index.json").is_file():
        endings = {".json", ".safetensors", ".txt", ".model", ".jinja"}
        files = sorted(file for file in found.rglob("*") if file.suffix in endings)
    else:
        found = find_weights(found)
        files = [found]
    for file in files:
        size, block = file.stat().st_size, 1 << 20
        digest.update(f"{file.relative_to(found)} {size} ".encode())
        with open(file, "rb") as content:
            for start in range(0, size, max(block, size // 256)):
                content.seek(start)
                digest.update(content.read(block))
    return digest.hexdigest()[:16]


def check_finite(state, where):
    """ValueError that names the first tensor with NaN or infinity in a dict of tensors."""
    for name, tensor in state.items():
        if not tensor.sum(dtype=torch.float32).isfinite():       # much faster than looking at each number
            raise ValueError(f"{where} holds numbers that are not finite, in {name}")


def first_line(error):
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__


# --------------------------------------------------------------------------------------------------------------- LoRA

LORA_FILE = "pytorch_lora_weights.safetensors"            # the name that pipe.load_lora_weights(folder) looks for
WHOLE_FILE = "diffusion_pytorch_model.safetensors"        # and the one that a transformer's folder holds


class LoRALinear(nn.Module):
    """y = W x + (alpha / r) B A x: W frozen, A (r, in) and B (out, r) float32; B = 0 at the start, so nothing changes.

    A ~ N(0, 1 / in): Adam moves all entries alike, and must not overwrite A, the directions that B learns in, within a
    few steps.
    """

    def __init__(self, base, rank, alpha, generator=None):
        super().__init__()
        self.base, self.scale, self.merged = base, alpha / rank, None
        A = torch.randn(rank, base.in_features, generator=generator) / math.sqrt(base.in_features)
        B = torch.zeros(base.out_features, rank)
        self.A, self.B = nn.Parameter(A.to(base.weight.device)), nn.Parameter(B.to(base.weight.device))

    def weight(self):
        with torch.autocast(self.A.device.type, enabled=False):
            return self.base.weight + self.scale * (self.B @ self.A)

    def forward(self, x):
        if self.base.weight.dtype == torch.float32:
            # one product of x, not three; in bfloat16 W + B A would round B A away
            unfit = self.merged is None or (torch.is_grad_enabled() and not self.merged.requires_grad)
            return F.linear(x, self.weight() if unfit else self.merged, self.base.bias)
        return self.base(x) + self.scale * F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))


def add_lora(editor, rank, alpha=None, targets="all", seed=0):
    """Make the editor trainable: LoRA of `rank` on the target Linears, or the whole transformer if rank is 0.

    `targets` is "every" for every Linear, one of the family's lists (`lora_targets`), or ends of names separated by
    commas. Fills editor.trained and the sets ref, old and ema with the weights as they are now. `alpha` None: 2 rank.
    ValueError if a target matches no Linear, alpha is not above 0, or rank is 0 and the transformer is not in float32.
    """
    transformer, chosen = editor.transformer, set()
    if rank == 0:
        if editor.dtype != torch.float32:
            raise ValueError(f"LoRA rank 0 trains the transformer itself, here in {editor.dtype}: a step of 1e-4 "
                             "is below the precision of most of its numbers, they would never move; train a LoRA")
        transformer.requires_grad_(True)
        editor.trained = dict(transformer.named_parameters())
        editor.copy_weights("ref", "old", "ema")
        return editor

    # every end must be that of some Linear: else a part would be left out in silence
    linears = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    ends = linears if targets == "every" else editor.lora_targets.get(targets) or targets.split(",")
    for end in ends:
        names = [name for name in linears if f".{name}".endswith(f".{end}")]
        if not names:
            raise ValueError(f"no Linear of {type(transformer).__name__} is named like the LoRA target {end!r}")
        chosen.update(names)

    generator = torch.Generator().manual_seed(seed)
    for name in linears:
        if name in chosen:
            wrap(editor, name, rank, 2 * rank if alpha is None else alpha, generator)
    editor.copy_weights("ref", "old", "ema")
    return editor


def wrap(editor, name, rank, alpha, generator=None):
    """Put LoRA around one Linear of the transformer."""
    if not 0 < alpha < math.inf:
        raise ValueError(f"LoRA alpha {alpha} of {name} is no finite number above 0")
    parent, _, child = name.rpartition(".")
    parent = editor.transformer.get_submodule(parent)
    module = LoRALinear(getattr(parent, child), rank, alpha, generator)
    setattr(parent, child, module)
    editor.trained |= {f"{name}.A": module.A, f"{name}.B": module.B}
    return module


def shard(editor):
    """Spread the frozen weights of the transformer over the processes of torchrun; LoRA stays whole on each.

    The weights of a block are gathered when it computes, forward and backward, and let go after it. So from now on all
    processes must make the same forwards. ValueError if nothing is frozen.
    """
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    transformer, lora = editor.transformer, set(editor.trained.values())
    if lora == set(transformer.parameters()):
        raise ValueError("--shard spreads what is frozen, and here the whole transformer is trained: train a LoRA")
    for p in lora:
        p.data = p.data.to(editor.device)
    editor.sets = {name: [value.to(editor.device) for value in values] for name, values in editor.sets.items()}

    # Each block is moved to the device and cut before the next one: it never holds all of them.
    mesh = dist.init_device_mesh(editor.device.type, (dist.get_world_size(),))
    stacks = [child for child in transformer.children() if isinstance(child, nn.ModuleList)]
    for stack in stacks:
        for block in stack:
            fully_shard(block, mesh=mesh, ignored_params=lora)
    # last, what lies around the blocks
    fully_shard(transformer, mesh=mesh, ignored_params=lora, reshard_after_forward=True)
    editor.sharded = True
    return editor


def lora_key(name, letter):
    return f"transformer.{name}.lora_{letter}.weight"


def save_weights(editor, folder, name="policy"):
    """Write a weight set in diffusers' layout: a LoRA as LORA_FILE, with rank 0 a `transformer` folder.

    Each file is whole or as it was before. alpha / r is folded into B: a file of PEFT's layout, or with alpha left out,
    loads in diffusers with another effect or none. OSError if it cannot be written, ValueError if it is not finite.
    """
    folder, transformer, state = Path(folder), editor.transformer, {}
    with editor.using(name):
        for module_name, module in transformer.named_modules():
            if isinstance(module, LoRALinear):
                state[lora_key(module_name, "A")] = module.A.detach()
                state[lora_key(module_name, "B")] = module.scale * module.B.detach()
        file = folder / LORA_FILE if state else folder / "transformer" / WHOLE_FILE
        state = state or transformer.state_dict()
        state = {key: value.cpu().contiguous() for key, value in state.items()}
    check_finite(state, f"{file} is not written: the {name} set")
    if file.name == WHOLE_FILE:
        write_text(file.with_name("config.json"), transformer.to_json_string())
    write_whole(file, lambda path: save_file(state, path, {"format": "pt"}))


def write_whole(file, writer):
    """Let writer(path) write a file under another name, then rename it: whole or not at all, also when the power fails.

    OSError names the file.
    """
    temporary = file.with_name(file.name + ".tmp")
    new = [folder for folder in file.parents if not folder.exists()]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)                        # left by one that was killed
        temporary.touch()
        rights = temporary.stat().st_mode                        # what the user's umask gives a new file
        writer(temporary)
        with suppress(OSError):                                  # safetensors 0.8 writes files for their owner alone
            temporary.chmod(rights)
        with open(temporary, "r+b") as written:                  # Windows brings only to the disk what it may write
            os.fsync(written.fileno())
        os.replace(temporary, file)
        # the new name, and those of the folders made for it, are on the disk when the lists that hold them are
        for folder in (file.parent, *(made.parent for made in new)):
            sync_folder(folder)
    except (OSError, SafetensorError, RuntimeError) as error:
        with suppress(OSError):
            temporary.unlink()                                   # half a file, which may be what fills the disk
        # torch says nothing of the disk, only that its position in the file is not the expected one
        hint = " (is the disk full?)" if isinstance(error, RuntimeError) else ""
        raise OSError(f"cannot write {file}{hint}: {first_line(error)}") from None


def write_text(file, text):
    """A text file, whole or not at all, in UTF-8."""
    write_whole(file, lambda path: path.write_text(text, encoding="utf-8"))


def sync_folder(folder):
    """Bring a folder's list of files to the disk, where that can be asked for: not on Windows, nor on some networks."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        with suppress(OSError):
            os.fsync(handle)
        os.close(handle)


def find_weights(path):
    """The file that save_weights wrote: the path itself, or a LoRA or transformer in it. ValueError: there is none."""
    path = Path(path)
    for file in (path / "transformer" / WHOLE_FILE, path / WHOLE_FILE, path / LORA_FILE, path):
        if file.is_file():
            return file
    raise ValueError(f"no LoRA at {path}: expected a safetensors file, or a folder with {LORA_FILE} or transformer/")


def load_weights(editor, path):
    """Load a LoRA as the policy, from a file or a folder that holds one, or what `save_weights` wrote with rank 0.

    Any file that the pipeline's own load_lora_weights takes: its alpha is found in its keys or in its metadata, else it
    is the rank. ValueError if the file fits another model, holds more than LoRA of Linears of the transformer, or NaN.
    """
    file, transformer = find_weights(path), editor.transformer
    try:
        state, alphas = load_file(file), {}
        if file.name != WHOLE_FILE:
            state, alphas = read_lora(editor.pipe, file, state)
        check_finite(state, "it")
        if file.name == WHOLE_FILE:
            transformer.load_state_dict(state)
            return add_lora(editor, 0)
    except Exception as error:      # of many kinds: of safetensors, of torch, of diffusers' converters
        raise ValueError(f"{file} holds no LoRA that can be loaded: {first_line(error)}") from error

    # look at all of it before a layer is touched
    linears = {name: module for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    layers = {}
    for name in sorted(alphas):
        A, B = (state.get(lora_key(name, letter), torch.empty(0)) for letter in "AB")
        base = linears.get(name)
        if base is None or A.shape != (len(A), base.in_features) or B.shape != (base.out_features, len(A)):
            raise ValueError(f"{file} does not fit this editor: {name} has A {tuple(A.shape)} and B {tuple(B.shape)}, "
                             f"the layer there is {base}")
        layers[name] = A, B
    if not layers:
        raise ValueError(f"{file} holds no LoRA: it has no tensors")
    # left out, they would make another editor in silence: biases, DoRA's magnitudes
    others = state.keys() - {lora_key(name, letter) for name in layers for letter in "AB"}
    if others:
        raise ValueError(f"{file} holds more than LoRA's A and B of Linears: {min(others)}")

    for name, (A, B) in layers.items():
        module = wrap(editor, name, len(A), alphas[name])
        module.A.data.copy_(A)
        module.B.data.copy_(B)
    editor.copy_weights("ref", "old", "ema")
    return editor


def read_lora(pipe, file, state):
    """A LoRA in any layout that the pipeline reads -> {transformer.NAME.lora_A.weight: ...}, {NAME: alpha}.

    A key of another form gives a NAME too, so that whoever looks for it in the editor finds that it does not fit.
    """
    from diffusers.utils import convert_unet_state_dict_to_peft
    for key in state:
        if "dora_scale" in key:                                  # which diffusers leaves out
            raise ValueError(f"it is DoRA, it holds {key}")
    read = pipe.lora_state_dict(state, return_alphas=True)
    state, in_keys = read if isinstance(read, tuple) else (read, None)
    if any(".lora." in key for key in state):                    # diffusers' older names: lora.down and lora.up
        state = convert_unet_state_dict_to_peft(state)
    # the adapter's config, as PEFT writes it
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata() or {}
    config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    config = {key.removeprefix("transformer."): value for key, value in config.items()}

    def alpha(name, rank):
        # in the file's keys, else by the rules of PEFT's config, else the rank
        key, value = f"transformer.{name}.alpha", config.get("lora_alpha", rank)
        if in_keys and key in in_keys:
            return in_keys[key]
        for pattern in config.get("alpha_pattern", {}):
            if re.fullmatch(rf"(.*\.)?({pattern})", name):
                value = config["alpha_pattern"][pattern]
                break
        return value * math.sqrt(rank) if config.get("use_rslora") else value
    alphas = {}
    for name in {key.removeprefix("transformer.").rsplit(".", 2)[0] for key in state}:
        A = state.get(lora_key(name, "A"), ())
        alphas[name] = float(alpha(name, len(A)))
    return state, alphas
