"""Tasks (editing dialogues) from a JSONL file or from the embedded world.

    load("shapes", "train", K=3)             the embedded world: splits train, val, test
    load("tasks.jsonl", "train", K=3, size=(512, 512))

A line of the JSONL: {"image": "path relative to the file", "instructions": ["...", "..."], "kinds": ["color_alter", "..."]},
kinds optional. Pictures are scaled to cover `size` and cropped at the centre.
"""
import json
from pathlib import Path

from PIL import Image, ImageOps

from rollout import Task

VAL_TASKS = 16    # of a JSONL file, the last so many (at most a fifth) are kept for validation


def load(spec, split="train", K=3, size=(512, 512), limit=4096):
    """Tasks of a split, each with at least K instructions. ValueError names what is wrong, and in which line."""
    if spec == "shapes":
        return load_shapes(split, K, limit)
    tasks = load_jsonl(spec, K, size)
    n_val = min(VAL_TASKS, len(tasks) // 5)
    return (tasks[:len(tasks) - n_val] if split == "train" else tasks[len(tasks) - n_val:] or tasks)[:limit]


def load_shapes(split, K, n, start=0):
    """Dialogues of the embedded world; meta["scenes"] holds the K + 1 scenes that the exact judge expects."""
    from shapes import world
    dialogues = world.dialogues(split, n, K, start)
    pictures = world.render([scenes[0] for _, _, scenes in dialogues])
    return [Task(Image.fromarray(picture), instructions, kinds, {"scenes": scenes})
            for picture, (instructions, kinds, scenes) in zip(pictures, dialogues)]


def load_jsonl(path, K, size):
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"--data {path}: no such file (give a JSONL file, or 'shapes' for the embedded world)")
    tasks = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):       # not splitlines: it also splits at U+2028
        where = f"{path} line {number}"
        try:
            line = line.decode("utf-8-sig")
            row = json.loads(line) if line.strip() else None
        except ValueError as error:
            raise ValueError(f"{where} is not JSON: {error}") from None
        if row is None:
            continue
        if not isinstance(row, dict) or not isinstance(row.get("image"), str):
            raise ValueError(f'{where} lacks "image", the path of a picture')
        instructions = row.get("instructions")
        if not isinstance(instructions, list) or not instructions or not all(isinstance(i, str) and i.strip() for i in instructions):
            raise ValueError(f'{where} lacks "instructions", a list of strings')
        if len(instructions) < K:
            raise ValueError(f"{where} has {len(instructions)} instructions, fewer than the {K} turns asked for")
        kinds = row.get("kinds", [""] * len(instructions))
        if not isinstance(kinds, list) or len(kinds) != len(instructions) or not all(isinstance(kind, str) for kind in kinds):
            raise ValueError(f'{where}: "kinds" must be a list of {len(instructions)} names, one for each instruction')
        tasks.append(Task(load_picture(path.parent / row["image"], size, where), instructions, kinds, {"line": number}))
    if not tasks:
        raise ValueError(f"{path} holds no tasks")
    return tasks


def load_picture(path, size, where):
    """Read a picture as RGB, upright, scaled to cover (H, W) and cropped at the centre."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"{where}: picture {path} does not exist") from None
    except Exception as error:      # PIL raises many kinds for broken files
        raise ValueError(f"{where}: picture {path} cannot be read ({error})") from None
    return ImageOps.fit(image, (size[1], size[0]), Image.LANCZOS)
