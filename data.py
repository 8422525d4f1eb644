"""Tasks (editing dialogues) from a JSONL file, from a CSV in EdiVal's form, or from the embedded world.

    load("shapes", "train", K=3)                                   the embedded world: splits train, val, test
    load("tasks.jsonl", "train", K=3, resolution=512)
    load("edival.csv", "all", K=3, resolution=512, images="folder of its pictures")

A line of the JSONL: {"image": "path relative to the file", "instructions": ["...", "..."], "kinds": ["color_alter", "..."]},
kinds optional. A picture keeps its aspect ratio: it is scaled to an area of resolution x resolution with sides that are
multiples of 16 pixels, and the little that this leaves over is cropped at the centre.
"""
import ast
import csv
import hashlib
import json
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from rollout import Task

VAL_TASKS = 16     # of a file, the last so many (at most a fifth, at least one) are kept for validation
MULTIPLE = 16      # of every supported editor: 8 pixels of its VAE, 2 x 2 patches
EDIVAL = "1c17f9f579c5"    # how the SHA-256 of EdiVal-Bench's own CSV begins


def load(spec, split="train", K=3, resolution=512, limit=4096, images=""):
    """Tasks of a split (train, val, test, all), each with at least K instructions. ValueError names what is wrong, and where.

    train and val of a file have no task in common; its test and all are the whole file.
    """
    if spec == "shapes":
        return load_shapes(split, K, limit)
    path = Path(spec)
    if not path.is_file():
        raise ValueError(f"--data {path}: no such file (give a JSONL file, a CSV of EdiVal's form, or 'shapes' for the embedded world)")
    tasks = read_edival(path, K, images) if path.suffix == ".csv" else read_jsonl(path, K)
    if not tasks:
        raise ValueError(f"{path} holds no tasks")
    if split in ("train", "val"):
        n_train = len(tasks) - min(VAL_TASKS, max(1, len(tasks) // 5)) if len(tasks) > 1 else 1
        tasks = tasks[:n_train] if split == "train" else tasks[n_train:]
    tasks = tasks[:limit]
    for task in tasks:
        task.image = load_picture(task.image, resolution, task.meta["where"])
    return tasks


def load_shapes(split, K, n, start=0):
    """Dialogues of the embedded world; meta["scenes"] holds the K + 1 scenes that the exact judge expects."""
    from shapes import world
    dialogues = world.dialogues(split, n, K, start)
    pictures = world.render([scenes[0] for _, _, scenes in dialogues])
    return [Task(Image.fromarray(picture), instructions, kinds, {"scenes": scenes})
            for picture, (instructions, kinds, scenes) in zip(pictures, dialogues)]


# Both readers give tasks whose image is still a path: only pictures of the split asked for are read.

def read_jsonl(path, K):
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
        check_strings(instructions, where, K)
        kinds = row.get("kinds", [""] * len(instructions))
        if not isinstance(kinds, list) or len(kinds) != len(instructions) or not all(isinstance(kind, str) for kind in kinds):
            raise ValueError(f'{where}: "kinds" must be a list of {len(instructions)} names, one for each instruction')
        tasks.append(Task(path.parent / row["image"], instructions, kinds, {"line": number, "where": where}))
    return tasks


def read_edival(path, K, images):
    """Tasks of a CSV in the form of EdiVal's instruction generator: a row for each (image_index, turns), the last one counts.

    `images` holds the pictures, named INDEX_input_raw or INDEX with any suffix. List columns are Python literals. What else
    the last row says (format_instructions, unchanged_objects, ...) is in meta, for judges that want it.
    """
    if not images or not Path(images).is_dir():
        raise ValueError(f"--data {path} needs --images, the folder of its pictures" + (f"; {images} is no folder" if images else ""))
    files = {}
    for file in sorted(Path(images).iterdir()):
        files.setdefault(file.stem.removesuffix("_input_raw"), file)
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader, last = csv.DictReader(file), {}
        missing = {"image_index", "turns", "task_type", "instructions"} - set(reader.fieldnames or [])
        if missing:
            raise ValueError(f"{path} is no CSV of EdiVal's form: it has no column {', '.join(sorted(missing))}")
        for row in reader:
            where = f"{path} line {reader.line_num}"
            try:
                row = {name: literal(value or "") for name, value in row.items() if name} | {"where": where}
                if int(row["turns"]) >= int(last.get(row["image_index"], row)["turns"]):
                    last[row["image_index"]] = row
            except (ValueError, SyntaxError) as error:
                raise ValueError(f"{where} cannot be read: {error}") from None
    tasks = []
    for index, row in last.items():
        check_strings(row["instructions"], row["where"], K)
        if not isinstance(row["task_type"], list) or len(row["task_type"]) != len(row["instructions"]):
            raise ValueError(f'{row["where"]}: "task_type" must be a list of {len(row["instructions"])} names, one for each instruction')
        if index not in files:
            raise ValueError(f"{row['where']}: --images {images} holds no {index}_input_raw.* and no {index}.*")
        tasks.append(Task(files[index], row["instructions"], row["task_type"], row))
    return tasks


def literal(value):
    """A cell of the CSV: a list or a truth value as Python writes it, read without running it; else its text."""
    return ast.literal_eval(value) if value.startswith("[") or value in ("True", "False") else value


def check_strings(instructions, where, K):
    if not isinstance(instructions, list) or not instructions or not all(isinstance(i, str) and i.strip() for i in instructions):
        raise ValueError(f'{where} lacks "instructions", a list of strings')
    if len(instructions) < K:
        raise ValueError(f"{where} has {len(instructions)} instructions, fewer than the {K} turns asked for")


def is_benchmark(spec):
    """Is this EdiVal-Bench's own CSV, which nothing may be trained on that is to be measured by it?"""
    return spec.endswith(".csv") and hashlib.sha256(Path(spec).read_bytes()).hexdigest().startswith(EDIVAL)


def fit_size(width, height, resolution):
    """(W, H) of a picture scaled to an area of resolution^2, its aspect ratio kept, rounded to multiples of MULTIPLE."""
    scale = resolution / math.sqrt(width * height)
    return tuple(max(1, round(side * scale / MULTIPLE)) * MULTIPLE for side in (width, height))


def load_picture(path, resolution, where):
    """Read a picture as RGB, upright, on white where it is transparent, scaled and cropped to `fit_size`."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):                        # 16 bits a pixel: PIL would cut off what is above 255
                image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            if image.mode == "F":
                raise ValueError("floating-point pixels have no known range, save it with 8 bits")
            image = image.convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"{where}: picture {path} does not exist") from None
    except Exception as error:      # PIL raises many kinds for broken files
        raise ValueError(f"{where}: picture {path} cannot be read ({error})") from None
    return ImageOps.fit(image, fit_size(*image.size, resolution), Image.LANCZOS)
