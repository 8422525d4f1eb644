"""What a real editor costs on this machine: full size, random weights, one rollout and one update of GRPO and of NFT.

    python tests/gpu_check.py                                # all families, 512 x 512, K = 3; wants a GPU of 80 GB
    python tests/gpu_check.py --family kontext --micro 2     # the flags of a smaller GPU, to see whether they fit
    python tests/gpu_check.py --tiny                         # the same code on tiny models, anywhere: no figures

Transformer and VAE are built on the device from their published configurations, text features are random: no weights
are downloaded, and time and memory are those of real ones (without the text encoders, as between their visits by
--offload). Prints a Markdown row for each family and algorithm. Ratio drift is the largest |ratio - 1| before the first
update, which must be 0.
"""
import argparse
import gc
import inspect
import platform
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import diffusers
import model
import train
from rollout import Task, draw_noise, rollout, select

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


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device, work):
    """(seconds, result) of work()."""
    synchronize(device)
    start = time.perf_counter()
    result = work()
    synchronize(device)
    return time.perf_counter() - start, result


def matmul_rate(device, dtype):
    """Best measured rate of a large matrix product, FLOP/s."""
    n = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = min(timed(device, lambda: a @ b)[0] for _ in range(30))
    return 2 * n ** 3 / best


def settings(family, algo, args):
    """The preset of a family, with the sizes of this check."""
    flags = dict(preset=family, algo=algo, turns=args.turns, group=args.group, tasks=args.tasks, micro=args.micro,
                 updates=1)
    cfg = train.parse([word for name, value in flags.items() for word in (f"--{name}", str(value))])
    train.check(cfg)
    return cfg, train.divide(cfg, 0, 1)


def trainable(family, cfg, args, device, dtype):
    """A random editor with the LoRA of the preset and random text features."""
    editor = build(family, device, dtype, args.tiny)
    editor.guidance, editor.encode_text = cfg.guidance, random_text(family, args.tiny)
    editor.guided = editor.guided and cfg.guidance > 1
    return model.add_lora(editor, cfg.lora_rank, cfg.lora_alpha, cfg.lora_targets)


def one_forward(editor, pixels, micro):
    """(FLOP, seconds) of one forward of `micro` rows: the best of three, after one that warms up and counts."""
    device, size = editor.device, pixels.shape[1:3]
    images = torch.from_numpy(pixels[:1].repeat(micro, 0)).permute(0, 3, 1, 2)
    cond = select(editor.condition(["x"] * micro, images), range(micro), device)
    x = torch.randn(micro, *editor.latent_shape(size), device=device)
    t = torch.full((micro,), .7, device=device)
    forward = lambda: editor.velocity(x, t, cond, x, size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        forward()
    with torch.no_grad():
        seconds = min(timed(device, forward)[0] for _ in range(3))
    return counter.get_total_flops(), seconds


def peak_memory(device):
    """The most memory taken so far, in GB: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def measure(family, algo, args, device, dtype, rate):
    """One rollout and one update -> a Markdown row."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    cfg, share = settings(family, algo, args)
    editor = trainable(family, cfg, args, device, dtype)
    billions = sum(p.numel() for p in editor.transformer.parameters()) / 1e9
    H = W = args.resolution
    pixels = np.random.default_rng(0).integers(0, 256, (args.tasks, H, W, 3), dtype=np.uint8)
    tasks = [Task(Image.fromarray(p), [f"edit {b} {k}" for k in range(cfg.turns)], [""] * cfg.turns)
             for b, p in enumerate(pixels)]
    flop, per_forward = one_forward(editor, pixels, share.micro)

    t_rollout, trajectory = timed(device, lambda: rollout(
        editor, tasks, cfg.group, cfg.turns, cfg.denoise, (0, 1), train.stochastic_window(cfg, 1), cfg.eta,
        cfg.step_kind, cfg.shared_noise, micro=share.micro))
    optimizer = torch.optim.AdamW(editor.trained.values(), cfg.lr)
    A = draw_noise((share.rows, cfg.turns), 7)
    used = torch.ones_like(A, dtype=torch.bool)
    t_update, info = timed(device, lambda: train.update(editor, trajectory, A, used, optimizer, cfg, 1, share))
    drift = info.get("ratio_deviation_1")
    return (f"| {family} {billions:.1f} B, {algo} | {H} x {W} "
            f"| {cfg.turns}, {cfg.denoise}, {args.tasks} x {args.group}, {share.micro} | {peak_memory(device):.1f} "
            f"| {per_forward:.3f} | {flop / per_forward / rate:.0%} | {t_rollout:.1f} | {t_update:.1f} "
            f"| {'-' if drift is None else f'{drift:.1e}'} |")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--algo", nargs="+", choices=["grpo", "nft"], default=["grpo", "nft"])
    parser.add_argument("--tiny", action="store_true", help="tiny models: runs the code, its figures mean nothing")
    for name, value, help in (("resolution", 512, "side of the pictures in pixels"), ("turns", 3, "K"),
                              ("tasks", 2, "B"), ("group", 4, "G"), ("micro", 4, "rows in one forward")):
        parser.add_argument(f"--{name}", type=int, default=value, help=help)
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.tiny:
        sys.exit("gpu_check.py: no CUDA GPU here; --tiny runs the same code on tiny models")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rate = matmul_rate(device, dtype)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"{name}, torch {torch.__version__}: {rate / 1e12:.2f} TFLOP/s measured in a matrix product of {dtype}"
          + (" (tiny models: the figures mean nothing)" if args.tiny else ""))
    print("| editor | size | K, T, B x G, micro | peak GB | s per forward of micro rows | share of the measured rate "
          "| s per rollout | s per update | ratio drift |\n|" + "---|" * 9)
    for family in args.family:
        for algo in args.algo:
            try:
                print(measure(family, algo, args, device, dtype, rate), flush=True)
            except (torch.OutOfMemoryError, train.Stopped) as error:          # does not fit, or the ratio is not 1
                print(f"| {family}, {algo} | {str(error).splitlines()[0][:150]} |" + " |" * 7, flush=True)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
