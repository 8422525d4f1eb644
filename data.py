"""Tasks (editing dialogues) from a JSONL file or from the embedded world, and how every script starts and ends.

A line of the file: {"image": "path relative to it", "instructions": ["...", "..."], "kinds": ["color_alter", "..."]},
kinds optional. A picture is read when it is used; its size is known from the header of its file.
EdiVal-Bench's CSV is read by bench/edival.py.
"""
import argparse
import functools
import hashlib
import json
import math
import os
import re
import signal
import sys
import time
import warnings
from contextlib import contextmanager, suppress
from dataclasses import field, fields
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from rollout import Task

try:
    import fcntl
except ImportError:
    fcntl = None              # Windows

VAL_TASKS = 16         # of a file, the last so many (at most a fifth, at least one) are kept for validation
SHAPES_TASKS = 4096    # of the embedded world, which has no end
MULTIPLE = 16          # of every supported editor: 8 pixels of its VAE, 2 x 2 patches
ASPECTS = ("1:2", "9:16", "2:3", "3:4", "4:5", "1:1", "5:4", "4:3", "3:2", "16:9", "2:1")     # width : height
PATIENCE = 5           # seconds that torchrun has to end a process which another one has left alone


def load(spec, split="train", K=3, resolution=512, limit=None):
    """Tasks of 'shapes' (train, val, test) or a file (train, val without train's tasks; test, all: the whole file).

    Each has at least K instructions; `limit` takes the first so many. ValueError names what is wrong, and where.
    """
    if spec == "shapes":
        return load_shapes(split, K, SHAPES_TASKS if limit is None else limit)
    path = Path(spec)
    if not path.is_file():
        raise ValueError(f"--data {path}: no such file (give a JSONL file, or 'shapes' for the embedded world)")
    rows = [check_row(row, where, K) for where, row in read_rows(path)]
    if not rows:
        raise ValueError(f"{path} holds no tasks")
    n_val = min(VAL_TASKS, max(1, len(rows) // 5)) if len(rows) > 1 else 0
    if split == "train":
        rows = rows[:len(rows) - n_val]
    elif split == "val":
        rows = rows[len(rows) - n_val:]
    return [picture_task(path.parent / image, *rest, resolution) for image, *rest in rows[:limit]]


def load_shapes(split, K, n, start=0):
    """Dialogues of the embedded world; meta holds the operations, and K + 1 scenes: a way it may go."""
    from shapes import world
    dialogues = world.dialogues(split, n, K, start)
    pictures = world.render([dialogue.scenes[0] for dialogue in dialogues])
    tasks = []
    for picture, dialogue in zip(pictures, dialogues):
        meta = {"scenes": dialogue.scenes, "operations": dialogue.operations}
        tasks.append(Task(Image.fromarray(picture), dialogue.instructions, dialogue.kinds, meta))
    return tasks


def resolve(task, pictures):
    """What pictures (k + 1, 3, 48, 48) uint8 of a task of the embedded world should show, and which turns can be done.

    Returns k + 1 scenes and k truth values. They depend on where the editor has put what it was free to put.
    """
    from shapes import world
    pixels = pictures.permute(0, 2, 3, 1).numpy()[None]
    (scenes,), (possible,) = world.resolve([task.meta["scenes"][0]], [task.meta["operations"]], pixels)
    return scenes, possible.tolist()


def read_rows(path):
    """The JSON values of a file, one a line, each after its place in words."""
    # bytes end a line at \n only, text also at U+2028, which JSON allows in a string
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{path} line {number}"
            try:
                line = line.decode("utf-8-sig").strip()
                row = json.loads(line) if line else None
                json.dumps(row, ensure_ascii=False).encode()     # half a surrogate pair is JSON, but no text
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where} is not JSON in UTF-8: {error}") from None
            if line:
                yield where, row


def check_row(row, where, K):
    """A line's (picture, instructions, kinds, where). ValueError says what it lacks."""
    if not isinstance(row, dict) or not isinstance(row.get("image"), str):
        raise ValueError(f'{where} lacks "image", the path of a picture')
    instructions = row.get("instructions")
    listed = isinstance(instructions, list) and len(instructions) > 0
    if not listed or not all(isinstance(text, str) and text.strip() for text in instructions):
        raise ValueError(f'{where} lacks "instructions", a list of strings')
    if len(instructions) < K:
        raise ValueError(f"{where} has {len(instructions)} instructions, fewer than the {K} turns asked for")
    kinds = row.get("kinds", [""] * len(instructions))
    if not isinstance(kinds, list) or len(kinds) != len(instructions) or not all(isinstance(k, str) for k in kinds):
        raise ValueError(f'{where}: "kinds" must be a list of {len(instructions)} names, one for each instruction')
    return row["image"], instructions, kinds, where


def picture_task(path, instructions, kinds, where, resolution):
    """A task whose picture is a file. ValueError if there is none; what is broken in it is said when it is used."""
    with opened(path, where) as image:
        width, height = fit_size(*header_size(image), resolution)
    read = functools.partial(load_picture, path, resolution, where)
    return Task(read, instructions, kinds, {"where": where, "file": path}, (height, width))


def alone(task, k, scene=None):
    """Instruction k on a clean context, as a task of one turn; None where it speaks of what an earlier one made.

    The embedded world draws that context: `scene`, else the one that the task has planned.
    """
    turn = {"instructions": [task.instructions[k]], "kinds": [task.kinds[k]]}
    if "scenes" in task.meta:
        from shapes import world
        scene = scene or task.meta["scenes"][k]
        meta = {"scenes": [scene], "operations": [task.meta["operations"][k]]}
        return Task(Image.fromarray(world.render([scene])[0]), meta=meta, **turn)
    dependent = task.meta["dependent"][k] if "dependent" in task.meta else _speaks_of_earlier(task, k)
    if dependent:
        return None
    meta = {name: task.meta[name] for name in ("index", "where", "file") if name in task.meta}
    return Task(task.image, meta=meta, size=task.size, **turn)


def _words(text):
    return {word.rstrip("s") for word in re.findall(r"\w{3,}", text.lower())}


_USUAL = _words("""
    add make change turn replace remove delete take away move place put swap paint color colour background
    material position count text image picture photo scene with from into onto that this the and for left right
    above below under over near next behind front side have keep more red blue green yellow black white brown
    gray grey pink orange purple wooden wood metal plastic glass leather fabric dark light large small""")
_PRONOUNS = {"it", "its", "they", "them", "their", "he", "him", "his", "she", "her", "one"}
# after these kinds of edit something has a new name
_MAKES = ("", "subject_add", "subject_replace", "color_alter", "material_alter", "background_change", "text_change")
# where an instruction also names what stays: which part of it says what is new
_NEW = {"background_change": lambda text: text.split(",")[0],              # "... to a beach, keep the dog"
        "text_change": lambda text: re.split(r" to | with ", text)[-1]}    # "... the text on the shirt with SALE"
_UNSPACED = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]")       # Thai, Lao, Japanese, Chinese


def _speaks_of_earlier(task, k):
    """Cautious, where no list of objects says it: does instruction k share a word with one that made something?

    So does one with a pronoun, and one in a script that sets no spaces between words.
    """
    text = task.instructions[k].lower()
    if k > 0 and (_UNSPACED.search(text) or _PRONOUNS.intersection(re.findall(r"\w+", text))):
        return True
    for earlier, kind in zip(task.instructions[:k], task.kinds):
        made = _NEW[kind](earlier) if kind in _NEW else earlier
        if kind in _MAKES and (_words(text) & _words(made)) - _USUAL:
            return True
    return False


# ---------------------------------------------------------------------------------------------------------- pictures

def fit_size(width, height, resolution):
    """(W, H) that a picture is scaled and cropped to: about resolution^2 pixels, sides multiples of MULTIPLE.

    Its shape is the nearest of ASPECTS: the tasks of one training step need one size, so there must not be many. That
    crops up to a tenth, and what is longer than 2 : 1. resolution None: its own size.
    """
    if resolution is None:
        return width, height
    shapes = [tuple(map(int, aspect.split(":"))) for aspect in ASPECTS]
    w, h = min(shapes, key=lambda shape: abs(math.log(shape[0] * height / (shape[1] * width))))
    sides = resolution * math.sqrt(w / h), resolution * math.sqrt(h / w)
    return tuple(max(1, round(side / MULTIPLE)) * MULTIPLE for side in sides)


@contextmanager
def opened(path, where):
    """A picture's file, its header read. Whatever PIL raises in the block becomes a ValueError of one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                yield image
    # PIL raises many kinds for broken files
    except Exception as error:
        raise ValueError(f"{where}: picture {path} cannot be read ({one_line(error)})") from None


def header_size(image):
    """(width, height) of an opened picture as it is shown. EXIF data may turn it; a TIFF's size is turned already."""
    # not image.getexif(): that of a PNG decodes all pixels to look behind them
    orientation = Image.Image.getexif(image).get(0x0112, 1)
    turned = orientation in (5, 6, 7, 8) and image.format != "TIFF"
    return image.size[::-1] if turned else image.size


def load_picture(path, resolution, where):
    """A picture as RGB, upright, on white where it is transparent, of the size that `fit_size` says."""
    with opened(path, where) as image:
        size = fit_size(*header_size(image), resolution)
        image = ImageOps.exif_transpose(image)
        if image.mode == "F":
            raise ValueError("floating-point pixels have no known range: save it with 8 bits")
        # 16 bits a pixel: PIL would cut off what is above 255
        if image.mode.startswith("I"):
            grey = np.asarray(image).clip(0, 65535) / 257
            image = Image.fromarray(grey.round().astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    return ImageOps.fit(image, size, Image.LANCZOS)


# ------------------------------------------------------------------------------------------------------ fingerprints

def fingerprint(task):
    """Short digest of a task's instructions, kinds and picture: the content of its file, wherever that lies."""
    digest = hashlib.blake2b(json.dumps([task.instructions, task.kinds]).encode(), digest_size=8)
    if "file" in task.meta:
        digest.update(Path(task.meta["file"]).read_bytes())
    else:
        digest.update(repr(task.size).encode() + task.picture().tobytes())
    return digest.hexdigest()


def file_fingerprint(spec):
    """Short digest of a file that `load` takes and of the sizes in bytes of its pictures; of the world's source."""
    path = Path(__file__).parent / "shapes" / "world.py" if spec == "shapes" else Path(spec)
    digest = hashlib.blake2b(path.read_bytes(), digest_size=8)
    for _, row in read_rows(path) if spec != "shapes" else []:
        digest.update(f"{(path.parent / row['image']).stat().st_size} ".encode())
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------------- scripts

class Parser(argparse.ArgumentParser):
    """Refuses a flag by a ValueError of one line in place of all flags."""

    def error(self, message):
        raise ValueError(message)


def flag(name):
    return "--" + name.replace("_", "-")


def option(default, help, choices=None, low=None, above=None, high=None, group=None, switch=False):
    """A dataclass field that is a flag; `low`, `above` and `high` bound it. A `switch` takes no value."""
    bounds = {"at least": low, "greater than": above, "at most": high}
    bounds = {words: bound for words, bound in bounds.items() if bound is not None}
    return field(default=default, metadata=dict(help=help, choices=choices, bounds=bounds, group=group, switch=switch))


def truth(word):
    """"true" or "false", from the command line."""
    if word.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{word!r} is neither true nor false")
    return word.lower() == "true"


def parse_flags(settings, description, argv=None):
    """Command line of a dataclass of options -> {name: value} of the flags that are given. ValueError for a bad one."""
    parser = Parser(usage="%(prog)s [--flag value ...]", description=description,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser
    for f in fields(settings):
        choices, bounds = f.metadata["choices"], f.metadata["bounds"]
        if f.metadata["group"]:
            group = parser.add_argument_group(f.metadata["group"])
        notes = [f"{words} {bound:g}" for words, bound in bounds.items()]
        if "default" not in f.metadata["help"]:
            notes.insert(0, f"default: {f.default}")
        how = {"help": f.metadata["help"] + f" ({', '.join(notes)})" * bool(notes)}
        if f.metadata["switch"]:
            how = {"help": f.metadata["help"], "action": "store_true", "default": None}
        elif f.type is bool:
            how |= {"type": truth, "metavar": "{true,false}"}
        elif f.type is dict:
            how |= {"action": "append", "metavar": "[NAME=]PATH"}
        else:
            how |= {"type": f.type, "choices": choices, "metavar": None if choices else ""}
        group.add_argument(flag(f.name), **how)
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    for f in fields(settings):
        if f.name in given and f.type in (int, float):
            check_bounds(flag(f.name), given[f.name], f.metadata["bounds"])
    return given


def check_bounds(name, value, bounds):
    """ValueError unless a number is finite and within its bounds, which it names."""
    if not math.isfinite(value):
        raise ValueError(f"{name} {value} must be a finite number")
    holds = {"at least": float.__ge__, "greater than": float.__gt__, "at most": float.__le__}
    for words, bound in bounds.items():
        if not holds[words](float(value), float(bound)):
            raise ValueError(f"{name} {value} must be {words} {bound:g}")


def check_settings(settings, values, where):
    """ValueError unless values from a file are such as the flags of a dataclass of options may have; None is free."""
    for f in fields(settings):
        value, wanted = values.get(f.name), {float: (int, float)}.get(f.type, f.type)
        if value is None:
            continue
        # True is an int to Python
        if not isinstance(value, wanted) or isinstance(value, bool) != (f.type is bool):
            raise ValueError(f"{where}: {f.name} must be of type {f.type.__name__}, not {type(value).__name__}")
        if f.type in (int, float):
            check_bounds(f"{where}: {f.name}", value, f.metadata["bounds"])
        choices = f.metadata["choices"]
        if choices and value not in choices:
            raise ValueError(f"{where}: {f.name} must be one of {', '.join(choices)}")


def check_folder(out):
    """ValueError if a folder cannot be made or written at a path; nothing is written here."""
    places = Path(out), *Path(out).absolute().parents
    place = next(place for place in places if place.exists() or place.is_symlink())    # one to nowhere is in the way
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ValueError(f"--out {out}: {place} is no folder that can be written to")


def claim(out, held):
    """Keep a folder to this process until the ExitStack `held` is closed. ValueError if another process has it."""
    if fcntl is None:
        return
    folder = os.open(out, os.O_RDONLY)
    held.callback(os.close, folder)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"--out {out}: another process writes there") from None
    except OSError:
        pass                                                 # a file system without locks


def read_json(path):
    """A JSON object. ValueError if there is none."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        repr(found)                                          # what is nested too deeply to be shown is no setting
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(found).__name__}")
    return found


def read_made_of(file):
    """What the pictures beside a JSON file were made of, {what: digest or value}. ValueError if it does not say so."""
    found = read_json(file).get("made_of", {})
    if not isinstance(found, dict):
        raise ValueError(f"{file}: made_of must be a JSON object, not a {type(found).__name__}")
    return found


def one_line(error):
    return " ".join(str(error).split()) or type(error).__name__


def run_main(main):
    """Run a script. What its user can cause is one line on stderr and exit code 2; Ctrl-C 130 and SIGTERM 143.

    Of several processes the one that fails says why, and torchrun ends the others, which say nothing.
    """
    caught = [signal.SIGINT]
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")    # a terminal without such letters gets their numbers

    def interrupt(number, frame):
        leave_if_another_died(number)
        caught.append(number)
        raise KeyboardInterrupt
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        main()
    except (ValueError, OSError) as error:
        last_words(one_line(error))
        sys.exit(2)
    except KeyboardInterrupt:
        last_words(f"interrupted by {signal.Signals(caught[-1]).name}")
        with suppress(OSError):
            sys.stdout.flush()
        # not sys.exit: it waits for threads, and a judge's may wait for its server for minutes
        os._exit(128 + caught[-1])
    except Exception as error:
        if not lost_connection(error):
            tell_torchrun(f"{type(error).__name__}: {one_line(error)}")
            raise
        # Another one ended, and has said why. torchrun ends this one at once, if both are on the same machine.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(PATIENCE)
        last_words("a process on another machine has ended, or cannot be reached: look at what it said")
        sys.exit(2)
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def handling(handler):
    """Ctrl-C and SIGTERM go to a handler, or to signal.SIG_DFL, and afterwards where they went before."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def last_words(message):
    """A line on stderr, and in torchrun's report, that says why this process ends."""
    message = f"{Path(sys.argv[0]).name}: {message}"
    # below the progress bar, which may be that of another process
    print("\n" * (processes_here() > 1) + message, file=sys.stderr, flush=True)
    tell_torchrun(message)


def tell_torchrun(message):
    """Leave a message for the end of the report that torchrun prints when one of its processes has failed."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        content = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
        with suppress(OSError):
            Path(file).write_text(json.dumps({"message": content}))


def lost_connection(error):
    """Is it an error of a collective, because another process has ended?"""
    from torch.distributed import DistError
    return isinstance(error, DistError) or "/gloo/" in str(error)


def processes():
    """(rank, number of processes) of this one of torchrun's. ValueError where the environment fits no such run."""
    rank, world = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise ValueError(f"RANK={rank} and WORLD_SIZE={world} in the environment belong to no run of several "
                         "processes: start those by torchrun, or unset both")
    return int(rank), int(world)


def processes_here():
    """Processes of this run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def leave_if_another_died(number):
    """End at once if torchrun sent the signal because another of its processes has died: no step can be finished.

    Seen where the system lists a process's children, as Linux does. Elsewhere torchrun kills after 30 seconds.
    """
    parent = os.getppid()
    listed = Path(f"/proc/{parent}/task/{parent}/children")
    children = listed.read_text().split() if listed.exists() else []
    if str(os.getpid()) in children and len(children) < processes_here():
        os._exit(128 + number)
