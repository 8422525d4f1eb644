"""EdiVal-Bench: the layout of its pictures, what its baselines fix, and its own results.

    file_of(folder, index, k)                       # {index}_input_raw_turn_{k}.png: EdiVal's eval.py scores such folders unchanged
    AtSize(editor, (1024, 1024))                    # pictures of 512 x 512 edited at the size that the pipeline works at
    read_results("evaluate_results/base_generation")

Facts read in TianyuCodings/EdiVal (eval.py, generate.py, baseline_generate/flux.py); no code of it is used. Its data is read by data.py.
"""
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

SEED, SIZE = 1234, 512      # of every turn of every dialogue; of every picture


class Baseline(NamedTuple):
    """What EdiVal's baselines of a family fix, besides 512 x 512 pictures and LANCZOS both ways."""
    steps: int
    guidance: float
    size: int          # side at which the pipeline works by itself
    noise_on: str      # where the seed draws the noise; "" = the editor's device
    patch: int         # side of the latent patch that a token packs
    text: int          # tokens that the text is padded to, where the family's default for training is another; 0 = as it is


# EdiVal has no Qwen-Image-Edit-Plus and no FLUX.2-klein: there it is the pipeline's own defaults
BASELINES = {"FluxKontextPipeline": Baseline(28, 2.5, 1024, "", 2, 512), "QwenImageEditPipeline": Baseline(50, 4., 1024, "cpu", 2, 0),
             "QwenImageEditPlusPipeline": Baseline(50, 4., 1024, "cpu", 2, 0), "Flux2KleinPipeline": Baseline(50, 4., 512, "cpu", 1, 0)}


def as_baseline(editor):
    """Make an editor edit as EdiVal's baseline of its family does: (editor, denoising steps)."""
    rule = BASELINES[type(editor.pipe).__name__]
    editor.guidance, editor.guided = rule.guidance, editor.negative is not None and rule.guidance > 1
    if rule.text:
        editor.max_text = rule.text
    return AtSize(editor, (rule.size, rule.size)), rule.steps


def file_of(folder, name, k=None):
    """EdiVal's file names: of the source (k None) or after turn k = 0, 1, ..."""
    return folder / f"{name}_input_raw{'' if k is None else f'_turn_{k + 1}'}.png"


def resize(pictures, size):
    """Pictures (S, 3, h, w) uint8 -> (S, 3, *size) uint8, LANCZOS."""
    if tuple(pictures.shape[2:]) == tuple(size):
        return pictures
    images = [Image.fromarray(p.permute(1, 2, 0).cpu().numpy()).resize((size[1], size[0]), Image.LANCZOS) for p in pictures]
    return torch.from_numpy(np.stack([np.array(image) for image in images])).permute(0, 3, 1, 2)


class AtSize:
    """An editor that works at a size of its own, whatever its pictures have: scaled up before a turn and down after it."""

    def __init__(self, editor, size):
        self.editor, self.size = editor, size

    def __getattr__(self, name):                             # all that does not depend on the size
        return getattr(self.editor, name)

    def latent_shape(self, _):
        return self.editor.latent_shape(self.size)

    def times(self, T, _):
        return self.editor.times(T, self.size)

    def condition(self, instructions, pictures):
        return self.editor.condition(instructions, resize(pictures, self.size))

    def encode(self, pictures):
        return self.editor.encode(resize(pictures, self.size))

    def velocity(self, x, t, cond, context, _):
        return self.editor.velocity(x, t, cond, context, self.size)

    def decode(self, x, size):
        return resize(self.editor.decode(x, self.size), size)


def baseline_noise(editor, seed):
    """The noise that a baseline starts every turn of every dialogue from, for `rollout`: editor as `as_baseline` returns it."""
    rule, (H, W) = BASELINES[type(editor.pipe).__name__], editor.size
    (N, C), h, w, p = editor.latent_shape(None), H // editor.multiple, W // editor.multiple, rule.patch
    generator = torch.Generator(rule.noise_on or editor.device).manual_seed(seed)
    z = torch.randn(1, C // p ** 2, h * p, w * p, generator=generator, device=generator.device, dtype=editor.transformer.dtype)
    noise = z.float().cpu().view(C // p ** 2, h, p, w, p).permute(1, 3, 0, 2, 4).reshape(N, C)      # packed as the pipeline packs it
    return lambda shape, row, turn: noise


def read_results(folder):
    """EdiVal's results of one model: image_rate.json and task_rate.json, and, where they lie beside them, the files of each dialogue.

    Returns {index: (s of K turns, K pairs of object and background consistency, K kinds)}. ValueError names a hole or a contradiction.
    """
    folder = folder / "multipass" if (folder / "multipass").is_dir() else folder
    for name in ("image_rate.json", "task_rate.json"):
        if not (folder / name).is_file():
            raise ValueError(f"--edival {folder} holds no {name}: it is no result of EdiVal's eval.py")
    rates, by_task = (json.loads((folder / name).read_text()) for name in ("image_rate.json", "task_rate.json"))
    if not rates:
        raise ValueError(f"{folder / 'image_rate.json'} holds no dialogues")
    K = max(map(len, rates.values()))
    out, unknown = {}, float("nan")
    for index, s in sorted(rates.items(), key=lambda item: int(item[0])):
        if len(s) != K:
            raise ValueError(f"{folder / 'image_rate.json'}: dialogue {index} has {len(s)} of {K} turns")
        file = folder / f"{index}_input_raw.json"
        turns = json.loads(file.read_text()) if file.is_file() else {}
        turns = [turns.get(str(k + 1)) or {} for k in range(K)]
        pairs = [[unknown if turn.get(f"{part}_dinov3_consistency{'_mean' * (part == 'object')}") is None else
                  turn[f"{part}_dinov3_consistency{'_mean' * (part == 'object')}"] for part in ("object", "background")] for turn in turns]
        out[int(index)] = [float(v) for v in s], pairs, [turn.get("task_type", "") for turn in turns]
    counted, given = sum(sum(s) for s, _, _ in out.values()), by_task.get("overall", [])
    if len(given) != K * len(out) or abs(sum(given) - counted) > 1e-6:
        raise ValueError(f"{folder}: task_rate.json has {sum(given):g} successes in {len(given)} turns, image_rate.json {counted:g} in {K * len(out)}: "
                         "they are of different runs")
    return out


def collect_results(folders, tasks=None):
    """EdiVal's results of all models -> arms for `summarise`, the kinds and the indices. ValueError if the models were scored on different dialogues."""
    tables = {arm: read_results(Path(folder)) for arm, folder in folders.items()}
    base, indices = next(iter(tables)), list(next(iter(tables.values())))
    for arm, rows in tables.items():
        if rows.keys() != tables[base].keys():
            odd = min(rows.keys() ^ tables[base].keys())
            raise ValueError(f"{arm} and {base} were scored on different dialogues: {len(rows)} and {len(tables[base])}, index {odd} is in one alone")
    kinds = {task.meta["index"]: task.kinds for task in tasks or []}
    arms = {arm: {"s": torch.tensor([[rows[i][0] for i in indices]], dtype=torch.float64),
                  "cc": torch.tensor([[rows[i][1] for i in indices]], dtype=torch.float64)} for arm, rows in tables.items()}
    return arms, [kinds.get(i) or tables[base][i][2] for i in indices], indices
