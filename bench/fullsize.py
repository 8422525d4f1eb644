"""What one forward, one rollout and one update cost on this machine: of any editor, and of full-size ones.

Those have random weights: transformer and VAE are built on the device from their published configurations, text
features are random. Nothing is downloaded, and time and memory are those of real ones (without the text encoders, as
between their visits by --offload). `python bench/speed.py --family NAME` prints their rows for docs/editors.md. Ratio
drift is the largest |ratio - 1| before the first update, which must be 0.
"""
import gc
import inspect
import resource
import time
from collections import Counter
from unittest import mock

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import model
import train
from rollout import Task, draw_noise, select

SHIFT = dict(use_dynamic_shifting=True, base_shift=.5, max_shift=1.15, base_image_seq_len=256, max_image_seq_len=4096)
FLUX_VAE = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                scaling_factor=.3611, shift_factor=.1159, use_quant_conv=False, use_post_quant_conv=False,
                block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16)
SMALL = dict(num_layers=2, attention_head_dim=16, num_attention_heads=2)

# family -> pipeline, scheduler; transformer and VAE: class, published configuration, what is tiny of it;
# text features: tokens, and their width in the published and the tiny model
FAMILIES = {
    "kontext": dict(
        pipeline="FluxKontextPipeline", scheduler=dict(shift=3.) | SHIFT,
        transformer=("FluxTransformer2DModel", dict(guidance_embeds=True),
                     SMALL | dict(num_single_layers=2, joint_attention_dim=32, pooled_projection_dim=16,
                                  axes_dims_rope=(4, 6, 6))),
        vae=("AutoencoderKL", FLUX_VAE, dict(block_out_channels=(8, 8, 8, 8), norm_num_groups=4, layers_per_block=1)),
        text=(128, 4096, 32), pooled=(768, 16)),
    "klein": dict(
        pipeline="Flux2KleinPipeline", scheduler=dict(shift=3.) | SHIFT,
        transformer=("Flux2Transformer2DModel", dict(num_layers=8, num_single_layers=24, num_attention_heads=32,
                                                     joint_attention_dim=12288, guidance_embeds=False),
                     SMALL | dict(num_single_layers=2, joint_attention_dim=48, axes_dims_rope=(4, 4, 4, 4))),
        vae=("AutoencoderKLFlux2", {}, dict(block_out_channels=(8, 8, 8, 8), norm_num_groups=4, layers_per_block=1)),
        text=(512, 12288, 48)),
    "qwen": dict(
        pipeline="QwenImageEditPipeline",
        scheduler=SHIFT | dict(max_shift=.9, max_image_seq_len=8192, shift_terminal=.02),
        transformer=("QwenImageTransformer2DModel", {}, SMALL | dict(joint_attention_dim=16, axes_dims_rope=(4, 6, 6))),
        vae=("AutoencoderKLQwenImage", {}, dict(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1)),
        text=(420, 3584, 16)),              # 334 tokens of a 512 x 512 picture, the template, an instruction
}


# ------------------------------------------------------------------------------------------ one forward, and its rate

def clocks(device):
    """CPU and wall seconds, when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.process_time(), time.perf_counter()


def best_seconds(device, work, tries=5):
    """The shortest of a few calls, after one to warm up: CPU seconds on a CPU with one thread, else wall seconds."""
    work()
    which = 0 if device.type == "cpu" and torch.get_num_threads() == 1 else 1
    seconds = []
    for _ in range(tries):
        start = clocks(device)[which]
        work()
        seconds.append(clocks(device)[which] - start)
    return min(seconds)


def one_forward(editor, size, micro):
    """One forward of `micro` rows: FLOP, seconds, and its FLOP/s as a share of the machine's rate.

    The machine's rate is measured here and now: that of the same matrix products as in the forward, alone.
    """
    device, shapes = editor.device, Counter()
    dtype = torch.bfloat16 if editor.fast else editor.dtype
    images = torch.zeros(micro, 3, *size, dtype=torch.uint8)
    cond = select(editor.condition(["Add a red circle"] * micro, images), torch.arange(micro), device)
    x = torch.randn(micro, *editor.latent_shape(size), device=device)
    t = torch.full((micro,), .7, device=device)
    forward = lambda: editor.velocity(x, t, cond, x, size)

    def product(x, weight, *bias):
        shapes[x.numel() // x.shape[-1], *weight.shape] += 1
        return linear(x, weight, *bias)
    linear = F.linear

    # What the forward multiplies, how much it is, and how long it takes.
    with torch.no_grad(), editor.merged():
        with FlopCounterMode(display=False) as counter, mock.patch.object(F, "linear", product):
            forward()
        seconds = best_seconds(device, forward)

    # The same products alone, on numbers of no meaning.
    products, spent = 0, 0.
    for (rows, out, wide), count in shapes.items():
        a, b = (torch.randn(n, wide, device=device, dtype=dtype) for n in (rows, out))
        spent += count * best_seconds(device, lambda: F.linear(a, b))
        products += count * 2 * rows * wide * out
    flop, rate = counter.get_total_flops(), products / spent
    return {"rows": micro, "FLOP": flop, "seconds": seconds, "machine_FLOP_per_second": rate,
            "share": flop / seconds / rate}


# ------------------------------------------------------------------------------------------------- rollout and update

def random_tasks(B, K, size):
    """Tasks of noise."""
    pixels = np.random.default_rng(0).integers(0, 256, (B, *size, 3), dtype=np.uint8)
    colours = ["red", "blue", "green", "yellow"]
    return [Task(Image.fromarray(p), [f"Add a {colours[(b + k) % 4]} circle" for k in range(K)], [""] * K)
            for b, p in enumerate(pixels)]


def rollout_and_update(editor, cfg, size):
    """One rollout without a judge, and the updates on random advantages -> CPU and wall seconds, ratio drift."""
    device, share = editor.device, train.divide(cfg, 0, 1)
    tasks = random_tasks(cfg.tasks, cfg.turns, size)
    optimizer = torch.optim.AdamW(editor.trained.values(), cfg.lr)
    editor.copy_weights("old")
    marks = [clocks(device)]
    trajectory = train.sample(editor, tasks, cfg, 1, share)
    marks.append(clocks(device))

    # Every sample is trained on: the most that an update can cost.
    A = draw_noise((cfg.tasks * cfg.group, cfg.turns), 7)
    info = train.update(editor, trajectory, A, torch.ones_like(A, dtype=torch.bool), optimizer, cfg, 1, share)
    marks.append(clocks(device))
    result = {"drift": info.get("ratio_deviation_1")}
    for name, before, after in zip(("rollout", "update"), marks, marks[1:]):
        result |= {f"{name}_cpu": after[0] - before[0], f"{name}_wall": after[1] - before[1]}
    return result


# ------------------------------------------------------------------------------------------------------ what they are

def build(family, device, dtype, tiny):
    """A random editor; its weights are made on the device in the dtype, so that nothing larger ever exists."""
    parts, before = FAMILIES[family], torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.manual_seed(0)
    try:
        with torch.device(device):
            transformer, vae = (getattr(diffusers, name)(**(full | small if tiny else full)).eval()
                                for name, full, small in (parts["transformer"], parts["vae"]))
    finally:
        torch.set_default_dtype(before)
    pipeline = getattr(diffusers, parts["pipeline"])
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**parts["scheduler"])
    given = dict(transformer=transformer, vae=vae, scheduler=scheduler)      # all others None: no text encoders
    needed = [name for name, p in inspect.signature(pipeline).parameters.items() if p.default is p.empty]
    return model.FAMILIES[parts["pipeline"]](pipeline(**{name: given.get(name) for name in needed}), device)


def random_text(family, tiny):
    """encode_text with random features: a pure function of the instruction."""
    length, *width = FAMILIES[family]["text"]
    length = 16 if tiny else length

    def encode_text(instructions, pictures):
        noise = lambda i, *shape: draw_noise(shape, *instructions[i].encode(), 0).to(torch.bfloat16)
        text = torch.stack([noise(i, length, width[tiny]) for i in range(len(instructions))])
        if family == "qwen":
            return {"text": text, "length": torch.full((len(text),), length)}
        if family == "kontext":
            pooled = [noise(i, FAMILIES[family]["pooled"][tiny]) for i in range(len(text))]
            return {"text": text, "pooled": torch.stack(pooled)}
        return {"text": text}
    return encode_text


def forget_peak(device):
    """Let `peak_memory` count from here on. On a CPU it cannot: there it is that of the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device):
    """The most memory taken since `forget_peak`, in GB: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def configure(flags):
    """{flag: value} -> the config of a training, checked."""
    cfg = train.parse([word for name, value in flags.items() for word in (f"--{name}", str(value))])
    train.check(cfg)
    return cfg


def one_row(family, algo, args, device):
    """One rollout and one update of a full-size editor by its preset -> (Markdown row, numbers)."""
    forget_peak(device)
    cfg = configure(dict(preset=family, algo=algo, turns=args.turns, group=args.group, tasks=args.tasks,
                         micro=args.micro, updates=1))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    editor = build(family, device, dtype, args.tiny)
    editor.guidance, editor.encode_text = cfg.guidance, random_text(family, args.tiny)
    editor.guided = editor.guided and cfg.guidance > 1
    model.add_lora(editor, cfg.lora_rank, cfg.lora_alpha, cfg.lora_targets)
    billions, size = sum(p.numel() for p in editor.transformer.parameters()) / 1e9, (args.resolution, args.resolution)
    one = one_forward(editor, size, args.micro)
    both = rollout_and_update(editor, cfg, size)
    drift = "-" if both["drift"] is None else f"{both['drift']:.1e}"
    row = (f"| {family} {billions:.1f} B, {algo} | {args.resolution} x {args.resolution} "
           f"| {cfg.turns}, {cfg.denoise}, {args.tasks} x {args.group}, {args.micro} | {peak_memory(device):.1f} "
           f"| {one['seconds']:.3f} | {one['share']:.0%} | {both['rollout_wall']:.1f} | {both['update_wall']:.1f} "
           f"| {drift} |")
    return row, {"family": family, "algo": algo} | one | both


def measure(args, device):
    """A Markdown row for each family and algorithm; what does not fit, or whose ratio is not 1, says so in its row."""
    print("| editor | size | K, T, B x G, micro | peak GB | s per forward of micro rows | share of the measured rate "
          "| s per rollout | s per update | ratio drift |\n|" + "---|" * 9)
    rows = []
    for family in args.family:
        for algo in ("grpo", "nft"):
            try:
                row, numbers = one_row(family, algo, args, device)
                rows.append(numbers)
            except (torch.OutOfMemoryError, train.Stopped) as error:
                row = f"| {family}, {algo} | {str(error).splitlines()[0][:150]} |" + " |" * 7
            print(row, flush=True)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return rows
