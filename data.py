"""Tasks (editing dialogues) from a JSONL file, from EdiVal's instruction CSV or from the embedded world.

    load("shapes", "train", K=3)             the embedded world: splits train, val, test
    load("tasks.jsonl", "train", K=3, size=(512, 512))         splits train, val (also called test), all
    load("oai_instruction_generation_output.csv", "all", K=3)  EdiVal-Bench: a test set, every split is all of it

A line of the JSONL: {"image": "path relative to the file", "instructions": ["...", "..."], "kinds": ["color_alter", "..."]},
kinds optional. Pictures are scaled to cover `size` and cropped at the centre.
"""
import ast
import csv
import json
import re
from pathlib import Path

from PIL import Image, ImageOps

from rollout import Task

VAL_TASKS = 16    # of a JSONL file, the last so many (at most a fifth) are kept for validation


def load(spec, split="train", K=3, size=(512, 512), limit=4096):
    """Tasks of a split, each with at least K instructions. ValueError names what is wrong, and in which line."""
    if spec == "shapes":
        return load_shapes(split, K, limit)
    if str(spec).endswith(".csv"):
        return load_edival(spec, K, size, limit)
    tasks = load_jsonl(spec, K, size)
    if split == "all":
        return tasks[:limit]
    n_val = min(VAL_TASKS, len(tasks) // 5)
    return (tasks[:len(tasks) - n_val] if split == "train" else tasks[len(tasks) - n_val:] or tasks)[:limit]


def load_shapes(split, K, n, start=0):
    """Dialogues of the embedded world; meta["scenes"] holds the K + 1 scenes that the exact judge expects."""
    from shapes import world
    dialogues = world.dialogues(split, n, K, start)
    pictures = world.render([scenes[0] for _, _, scenes in dialogues])
    return [Task(Image.fromarray(picture), instructions, kinds, {"scenes": scenes})
            for picture, (instructions, kinds, scenes) in zip(pictures, dialogues)]


def alone(task, k):
    """Instruction k of a task on a clean context, as a task of one turn: what the exposure-bias gap compares with.

    Embedded world: the rendered scene expected before turn k. Photographs: the original picture, and None where the
    instruction speaks of what an earlier one made.
    """
    words = dict(instructions=[task.instructions[k]], kinds=[task.kinds[k]])
    if "scenes" in task.meta:
        from shapes import world
        scenes = task.meta["scenes"][k:k + 2]
        return Task(Image.fromarray(world.render(scenes[:1])[0]), **words, meta={"scenes": scenes})
    dependent = task.meta["dependent"][k] if "dependent" in task.meta else _speaks_of_earlier(task, k)
    return None if dependent else Task(task.image, **words, meta={name: task.meta[name] for name in ("index", "line") if name in task.meta})


_USUAL = set("""add make change turn replace remove delete take away move place put swap paint color colour background material
    position count text image picture photo scene with from into onto that this the and for left right above below under over near next
    behind front side have keep them their its more red blue green yellow black white brown gray grey pink orange purple wooden wood metal
    plastic glass leather fabric dark light large small""".split())
_MAKES = ("", "subject_add", "subject_replace", "color_alter", "material_alter")     # kinds after which something has another name


def _speaks_of_earlier(task, k):
    """Cautious, where no list of objects says it: does instruction k share a word with an earlier one that made something?"""
    words = lambda text: {w.rstrip("s") for w in re.findall(r"\w{3,}", text.lower())} - _USUAL
    return any(words(task.instructions[k]) & words(task.instructions[j]) for j in range(k) if task.kinds[j] in _MAKES)


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


EDIVAL_LISTS = ("task_type", "instructions", "format_instructions", "unchanged_objects", "all_objects")


def read_edival(path):
    """EdiVal's instruction CSV, one row for each dialogue and turn -> {index: [row of turn 1, of turn 2, ...]}, lists as lists.

    ValueError if it is another file, or a dialogue lacks a turn.
    """
    path, dialogues = Path(path), {}
    if not path.is_file():
        raise ValueError(f"--data {path}: no such file (expected EdiVal's instruction CSV)")
    with open(path, newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            try:
                row |= {name: ast.literal_eval(row[name]) for name in EDIVAL_LISTS}      # Python literals, not JSON
                index, turn = int(row["image_index"]), int(row["turns"])
                row["bg_consistency"] = {"True": True, "False": False}[row["bg_consistency"]]
            except (KeyError, TypeError, ValueError, SyntaxError) as error:
                raise ValueError(f"{path} row {number} is no row of EdiVal's instruction CSV ({type(error).__name__}: {error})") from None
            dialogues.setdefault(index, {})[turn] = row
    for index, turns in dialogues.items():
        if sorted(turns) != list(range(1, len(turns) + 1)):
            raise ValueError(f"{path}: dialogue {index} has turns {sorted(turns)}, expected 1 to {max(turns)} without a hole")
    if not dialogues:
        raise ValueError(f"{path} holds no tasks")
    return {index: [turns[k] for k in sorted(turns)] for index, turns in sorted(dialogues.items())}


def load_edival(path, K, size=(512, 512), limit=4096, pictures=True):
    """EdiVal-Bench's dialogues; pictures `{index}_input_raw.jpg` (or .png) beside the CSV or in input_images_resize_512/ there.

    meta: `index`; `background_kept`, one bool a turn: False from a background change on, where consistency is not defined;
    `objects_kept`: objects that should be unchanged so far; `dependent`: does the instruction name what an earlier one made?
    """
    tasks, root = [], Path(path).parent
    for index, rows in list(read_edival(path).items())[:limit]:
        if len(rows) < K:
            raise ValueError(f"{path}: dialogue {index} has {len(rows)} instructions, fewer than the {K} turns asked for")
        made, dependent = [], []
        for k, row in enumerate(rows):
            kind, named = row["task_type"][k], " | ".join(re.findall(r"\[([^\]]*)\]", row["format_instructions"][k]))
            dependent.append(any(re.search(rf"\b{re.escape(name)}\b", named) for name in made))
            if k:
                made += [name for name in row["all_objects"] if name not in rows[k - 1]["all_objects"]]
            elif kind in ("subject_add", "subject_replace", "color_alter", "material_alter"):
                made += row["all_objects"][-1:]              # the list of the untouched picture is not in the file; new names come last
        meta = {"index": index, "background_kept": [row["bg_consistency"] for row in rows],
                "objects_kept": [row["unchanged_objects"] for row in rows], "dependent": dependent}
        places = [folder / f"{index}_input_raw{end}" for folder in (root, root / "input_images_resize_512") for end in (".jpg", ".png")]
        found = next((place for place in places if place.is_file()), places[0])
        image = load_picture(found, size, f"{path} dialogue {index}") if pictures else None
        tasks.append(Task(image, rows[-1]["instructions"], rows[-1]["task_type"], meta))
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
