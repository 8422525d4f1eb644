"""EdiVal-Bench (TianyuCodings/EdiVal): 572 photographs, three edits each. The one place for all that is EdiVal's.

    python bench/edival.py generate --model X --lora tuned=out/grpo --data CSV --images FOLDER
    python bench/edival.py report --verdicts RESULTS/base_generation --verdicts RESULTS/tuned_generation
    python bench/edival.py score --judge VLM                  a judge of ours on the same pictures: a proxy
    python bench/edival.py tasks --data CSV --images FOLDER --out tasks.jsonl      such a CSV as train.py's data

CSV is oai_instruction_generation_output.csv, FOLDER its input_images_resize_512. generate (torchrun possible) does what
EdiVal's baselines do and leaves out/edival/NAME_generation/multipass as EdiVal's eval.py wants it; RESULTS is what that
writes into evaluate_results/. A proxy compares our own runs with each other: never put it beside published numbers.

Facts read in EdiVal's eval.py, generate.py and baseline_generate/; no code of it is used.
"""
import argparse
import ast
import csv
import functools
import hashlib
import json
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # so that it runs from any folder

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import data
import eval as evaluation
import model
import reward
from rollout import Task, edit, select, stack_images

SIZE, SEED = 512, 1234         # of every picture; of every turn of every dialogue
BENCHMARK = "1c17f9f579c5"     # how the SHA-256 of EdiVal-Bench's own CSV begins
FOLDERS = {"own": "multipass", "clean": "clean", "nothing": "nothing"}     # pass -> folder of its pictures
UNKNOWN = float("nan")


# --------------------------------------------------------------------------------------------------------- its data

def load_tasks(path, images, K):
    """Tasks of a CSV in the form of EdiVal's instruction generator; without their pictures if `images` is None.

    images: a folder of pictures named INDEX_input_raw or INDEX, with any suffix. In meta are the last row's columns and
    what `by_turn` says. ValueError names the line, OSError a file that is not there.
    """
    files = {}
    for file in sorted(Path(images).iterdir()) if images else []:
        files.setdefault(file.stem.removesuffix("_input_raw"), file)
    tasks = []
    for index, turns in read_csv(path).items():
        # row k repeats all turns before k: the last one says everything but what changes from turn to turn
        rows = [turns[k] for k in sorted(turns)]
        last, where = rows[-1], rows[-1]["where"]
        whole = list(range(1, len(turns) + 1))
        if len(turns) > 1 and sorted(turns) != whole:
            raise ValueError(f"{where}: dialogue {index} has turns {sorted(turns)}, expected 1 to {max(turns)}")
        if images and index not in files:
            raise ValueError(f"{where}: --images {images} holds no {index}_input_raw.* and no {index}.*")
        line = {"image": "", "instructions": last["instructions"], "kinds": last["task_type"]}
        _, instructions, kinds, _ = data.check_row(line, where, K)
        if images:
            task = data.picture_task(files[index], instructions, kinds, where, None)
        else:
            task = Task(None, instructions, kinds, size=(SIZE, SIZE))
        number = {"index": int(index) if index.isdigit() else index}
        task.meta = last | by_turn(rows) | task.meta | number
        tasks.append(task)
    if not tasks:
        raise ValueError(f"{path} holds no tasks")
    return tasks


def read_csv(path):
    """The rows of such a CSV: {image_index: {turn: row}}. Lists are Python literals; the last row of a turn counts."""
    csv.field_size_limit(2 ** 31 - 1)                  # else 131,072 characters
    dialogues, where = {}, f"{path} line 1"
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = {"image_index", "turns", "task_type", "instructions"} - set(reader.fieldnames or [])
            for row in reader if not missing else []:
                where = f"{path} line {reader.line_num}"
                index, turn = row["image_index"], int(row["turns"])
                row = {name: literal(value or "") for name, value in row.items() if name}
                json.dumps(row, ensure_ascii=False).encode()                     # half a surrogate pair is no text
                dialogues.setdefault(index, {})[turn] = row | {"where": where}
    # what csv and ast raise for a text that is not theirs
    except (ValueError, TypeError, SyntaxError, csv.Error, RecursionError, MemoryError) as error:
        raise ValueError(f"{where} cannot be read: {data.one_line(error)}") from None
    if missing:
        raise ValueError(f"{path} is no CSV of EdiVal's form: it has no column {', '.join(sorted(missing))}")
    return dialogues


def literal(value):
    """A cell of the CSV: a list or a truth value as Python writes it, read without running it; else its text."""
    return ast.literal_eval(value) if value.startswith("[") or value in ("True", "False") else value


def by_turn(rows):
    """What the rows of one dialogue say of each turn; {} for a dialogue of one row, or without these columns.

    background_kept: False from a change of the background on, where EdiVal has no consistency. objects_kept: those that
    should be unchanged so far. dependent: does the instruction name what an earlier turn made?
    """
    needed = {"bg_consistency", "unchanged_objects", "all_objects", "format_instructions"}
    if len(rows) < len(rows[-1]["instructions"]) or not needed <= rows[0].keys():
        return {}
    for k, row in enumerate(rows):
        least = {"task_type": 1, "format_instructions": k + 1, "unchanged_objects": 0, "all_objects": 0}
        for name, n in least.items():
            listed = isinstance(row[name], list) and all(isinstance(text, str) for text in row[name])
            if not listed or len(row[name]) < n:
                raise ValueError(f"{row['where']}: {name} must be a list of {n} texts or more")
        if not isinstance(row["bg_consistency"], bool):
            raise ValueError(f"{row['where']}: bg_consistency must be True or False")
    made, dependent = [], []
    for k, row in enumerate(rows):
        named = " | ".join(re.findall(r"\[([^\]]*)\]", row["format_instructions"][k]))
        dependent.append(any(re.search(rf"\b{re.escape(name)}\b", named) for name in made))
        # what is new in the list of all objects was made; before turn 1 there is no list, and new names come last
        if k:
            made += [name for name in row["all_objects"] if name not in rows[k - 1]["all_objects"]]
        elif row["task_type"][0] in ("subject_add", "subject_replace", "color_alter", "material_alter"):
            made += row["all_objects"][-1:]
    return {"background_kept": [row["bg_consistency"] for row in rows],
            "objects_kept": [row["unchanged_objects"] for row in rows], "dependent": dependent}


def convert(args):
    """Write a CSV of EdiVal's form as a JSONL file for train.py. EdiVal-Bench's own is refused."""
    digest = hashlib.sha256(Path(args.data).read_bytes()).hexdigest()
    if digest.startswith(BENCHMARK):
        raise ValueError(f"{args.data} is EdiVal-Bench itself: what is trained on it cannot be measured by it")
    lines = []
    for task in load_tasks(args.data, args.images, args.turns):
        image = os.path.relpath(task.meta["file"], args.out.parent)
        line = {"image": image, "instructions": task.instructions, "kinds": task.kinds}
        lines.append(json.dumps(line) + "\n")
    model.write_text(args.out, "".join(lines))
    print(f"{args.out}: {len(lines)} tasks")


# ----------------------------------------------------------------------------------------------------- its protocol

class Baseline(NamedTuple):
    """What EdiVal's baseline of a family fixes, besides pictures of SIZE x SIZE and LANCZOS both ways."""
    steps: int
    guidance: float
    size: int             # side at which the pipeline works by itself
    noise_device: str     # where the seed draws the noise; "" = the editor's device
    patch: int            # side of the latent patch that a token packs
    text: int             # tokens that a text is padded to, where the editor's default is another; 0 = the default


# EdiVal has no Qwen-Image-Edit-Plus and no FLUX.2-klein: for these it is the pipeline's own defaults
BASELINES = {"FluxKontextPipeline": Baseline(28, 2.5, 1024, "", 2, 512),
             "QwenImageEditPipeline": Baseline(50, 4., 1024, "cpu", 2, 0),
             "QwenImageEditPlusPipeline": Baseline(50, 4., 1024, "cpu", 2, 0),
             "Flux2KleinPipeline": Baseline(50, 4., 512, "cpu", 1, 0)}


def baseline_of(editor):
    return BASELINES[type(editor.pipe).__name__]


def as_baseline(editor):
    """Give an editor the guidance and the text length of its family's baseline -> its number of denoising steps."""
    rule = baseline_of(editor)
    editor.guidance = rule.guidance
    if rule.text:
        editor.max_text = rule.text
    return rule.steps


def baseline_noise(editor, seed):
    """The noise (N, C) that a baseline starts every turn of every dialogue from, packed as its pipeline packs it."""
    rule = baseline_of(editor)
    N, C = editor.latent_shape((rule.size, rule.size))
    side, p = rule.size // editor.multiple, rule.patch
    device, channels = rule.noise_device or editor.device, C // p ** 2
    # drawn as latents of one picture, in the number format of the model; then p x p of them make a token
    generator = torch.Generator(device).manual_seed(seed)
    shape = 1, channels, side * p, side * p
    z = torch.randn(shape, generator=generator, device=device, dtype=editor.dtype)
    z = z.float().cpu().view(channels, side, p, side, p)
    return z.permute(1, 3, 0, 2, 4).reshape(N, C)


def resize(pictures, side):
    """Pictures (n, 3, H, W) uint8 -> (n, 3, side, side) uint8, LANCZOS."""
    if tuple(pictures.shape[2:]) == (side, side):
        return pictures
    resized = []
    for pixels in pictures.permute(0, 2, 3, 1).numpy():
        image = Image.fromarray(pixels).resize((side, side), Image.LANCZOS)
        resized.append(np.array(image))
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)


def sample_as_baseline(editor, group, T, on_turn):
    """Sample dialogues as EdiVal's baselines do -> (n, K+1, 3, H, W) uint8; called like eval.sample_turns."""
    tasks = [dialogue.task for dialogue in group]
    rows, side = torch.arange(len(tasks)), baseline_of(editor).size
    images = stack_images(tasks)[:, None]
    t = editor.times(T, (side, side))
    # the same noise for every turn of every dialogue
    noise = baseline_noise(editor, SEED + group[0].seed).repeat(len(tasks), 1, 1)
    for k in range(len(group[0].turns)):
        # a picture is scaled up for the edit and down after it, and the next turn gets the small one
        before = resize(images[:, k], side)
        cond = editor.condition([task.instructions[k] for task in tasks], before)
        turn = edit(editor, before, select(cond, rows, editor.device), noise, t)
        after = resize(turn.after, images.shape[3])
        images = torch.cat([images, after[:, None]], 1)
        on_turn(k, images)
    return images


def layout(pictures, folder, seed, part, name, k):
    """EdiVal's file names; k None: the source. Called like eval.picture_file, after the folder of an arm's pictures."""
    turn = "" if k is None else f"_turn_{k + 1}"
    return Path(pictures) / FOLDERS[part] / f"{name}_input_raw{turn}.png"


def generate(args):
    """Write the pictures of base and LoRAs as EdiVal's baselines are made; what is there is not made again."""
    rank, _, device = evaluation.start_processes("gloo")
    loras = evaluation.name_loras(args.lora)
    for name, path in loras.items():
        if "_" in name:
            raise ValueError(f"the name {name!r} holds '_', where EdiVal cuts names: write --lora NAME={path}")
    tasks = load_tasks(args.data, args.images, args.turns)
    for task in tasks:
        if task.size != (SIZE, SIZE):
            raise ValueError(f"{task.meta['where']}: {task.meta['file']} is {task.size[1]} x {task.size[0]}, expected "
                             f"{SIZE} x {SIZE}, as in EdiVal's input_images_resize_512.zip")

    def made_of():
        weights = {"base": args.model, **loras}
        digests = {f"weights of {arm}": model.fingerprint(path) for arm, path in weights.items()}
        return digests | evaluation.made_of_tasks(tasks, args.turns)

    # OUT goes on with what is there only if that was made of the same
    record = read_record(args)
    evaluation.refuse_other(record["made_of"], made_of(), args.out)
    record["probes"] = args.probes
    record["arms"] = list(dict.fromkeys(["base", *record["arms"], *loras]))

    # LoRAs before the base: one that does not fit is refused before anything is written
    for arm, path in {**loras, "base": None}.items():
        file_of = functools.partial(layout, args.out / f"{arm}_generation")
        plan = evaluation.make_plan(tasks, args.turns, 1, args.probes, args.out, file_of)
        editor, T = None, 0
        if not all(file.is_file() for dialogue in plan for file in dialogue.files):
            editor = model.load(args.model, device, offload=args.offload)
            if path:
                model.load_weights(editor, path)
            T = as_baseline(editor)
        if rank == 0:
            # once more, since a hub id is known by its content only now that it is here
            record["made_of"] |= made_of()
            model.write_text(args.out / "edival.json", json.dumps(record, indent=1))
            save_sources(tasks, file_of)
        evaluation.evaluate(editor, None, tasks, args.turns, T, batch=args.batch, probes=args.probes,
                            folder=args.out, desc=f"generate {arm}", file_of=file_of, sample=sample_as_baseline)
        # the next one may need its room
        del editor


def save_sources(tasks, file_of):
    """Write the pictures before turn 1 beside the edited ones: EdiVal's eval.py compares with them."""
    for task in tasks:
        file = file_of(None, 0, "own", task.meta["index"], None)
        if not file.is_file():
            model.write_whole(file, lambda path: task.picture().save(path, "PNG"))


# ------------------------------------------------------------------------------------------------- verdicts of ours

def load_features(folder, device="cpu", micro=32):
    """Similarity of what an edit leaves alone, by DINOv2 or DINOv3: pairs (n, 2, 3, H, W) uint8 -> (n,).

    Cosine of the patch tokens at the same place, mean over all but the least similar quarter of the picture: where the
    edit lies is not known here, and a quarter is what it may take. EdiVal's own regions come from a detector.
    """
    from transformers import AutoModel
    try:
        net = AutoModel.from_pretrained(folder, use_safetensors=True, trust_remote_code=False).to(device).eval()
        side = 16 * net.config.patch_size
    # transformers raises many kinds for what is no such model
    except Exception as error:
        reason = data.one_line(error)
        raise ValueError(f"--features {folder} is no vision transformer that loads here: {reason}") from None
    mean = torch.tensor([.485, .456, .406], device=device).view(3, 1, 1)
    std = torch.tensor([.229, .224, .225], device=device).view(3, 1, 1)

    def tokens(pictures):
        x = pictures.to(device).float() / 255
        x = F.interpolate(x, (side, side), mode="bicubic", antialias=True)
        hidden = net(pixel_values=(x.clamp(0, 1) - mean) / std).last_hidden_state
        # 16 x 16 patches; class and register tokens come first
        return F.normalize(hidden[:, -256:].float(), dim=-1)

    @torch.no_grad()
    def similarity(pairs):
        found = []
        for part in pairs.split(micro):
            before, after = tokens(part[:, 0]), tokens(part[:, 1])
            cosine = (before * after).sum(-1)
            most_alike = cosine.topk(192, dim=1).values
            found.append(most_alike.mean(1).cpu())
        return torch.cat(found)
    return similarity


def consistency_by(features, scores, tasks):
    """Consistency (1, n, K, 1) with the original by features; unknown where the background was to change."""
    rows = []
    for row, task in enumerate(tqdm(tasks, desc="features", unit="task")):
        pictures = scores.pictures(row)
        source, after = pictures[:1], pictures[1:]
        pairs = torch.stack([source.expand_as(after), after], 1)
        kept = task.meta.get("background_kept", [True] * len(after))
        kept = torch.tensor(kept[:len(after)])
        rows.append(features(pairs).double().where(kept, UNKNOWN))
    return torch.stack(rows)[None, ..., None]


def check_pictures(folder, tasks, K):
    """ValueError unless a folder in EdiVal's layout has all pictures of these tasks, and they are of these tasks."""
    for task in tasks:
        index = task.meta["index"]
        for k in range(K):
            file = layout(folder, None, 0, "own", index, k)
            if not file.is_file():
                raise ValueError(f"{file} is missing: dialogue {index} needs the pictures of {K} turns")
        file = layout(folder, None, 0, "own", index, None)
        file = file if file.is_file() else file.with_suffix(".jpg")
        # it may have gone through another program: a mean difference of 12 of 255 is too much for that
        if file.is_file():
            source = np.array(task.picture(), np.float32)
            seen = np.array(data.load_picture(file, SIZE, str(folder)), np.float32)
            if source.shape != seen.shape or np.abs(seen - source).mean() > 12:
                raise ValueError(f"{file} is not the picture of dialogue {index} in --data")


def digest_pictures(folder, tasks, K):
    """Short digest of the pictures of these tasks: nothing else says whether somebody has made them anew."""
    content = hashlib.sha256()
    for task in tasks:
        for k in range(K):
            content.update(layout(folder, None, 0, "own", task.meta["index"], k).read_bytes())
    return content.hexdigest()[:8]


def score(args):
    """Judge the pictures by a judge of ours, and report: a proxy."""
    rank, _, device = evaluation.start_processes("gloo")
    # The tasks and where their pictures are: refused before a judge is loaded.
    record = read_record(args)
    K = record["turns"]
    if not record["images"]:
        raise ValueError(f"{args.out} holds no pictures of generate: give --data and --images")
    tasks = load_tasks(record["data"], record["images"], K)
    evaluation.refuse_other(record["made_of"], evaluation.made_of_tasks(tasks, K), args.out)
    folders = {arm: args.out / f"{arm}_generation" for arm in record["arms"]}
    folders |= named_folders(args.pictures, folders)
    if not folders:
        raise ValueError(f"{args.out} holds no pictures: run generate, or give --pictures")
    for folder in folders.values():
        check_pictures(folder, tasks, K)
    judge = reward.load(args.judge, device, rubric=args.rubric, reasoning=args.reasoning, votes=args.votes,
                        workers=args.judge_workers)
    judge.check(tasks)
    features = load_features(args.features, device) if args.features else None

    # Judge, then report. Pictures of others have no probes.
    arms = {}
    for arm, folder in folders.items():
        ours = arm in record["arms"]
        probes = record["probes"] if ours else 0
        kept = args.out / "scores" / (arm if ours else f"{arm}-{digest_pictures(folder, tasks, K)}")
        arms[arm] = evaluation.evaluate(None, judge, tasks, K, 0, batch=32, probes=probes, desc=f"score {arm}",
                                        folder=kept, file_of=functools.partial(layout, folder))
    if rank > 0:
        return
    about = {"profile": "proxy", "data": record["data"], "judge": args.judge}
    if features:
        about["note"] = f"consistency by the features of {args.features}"
        for scores in arms.values():
            scores.consistency = consistency_by(features, scores, tasks)
            # On clean contexts the judge alone has looked, by another measure.
            if "kept_clean" in scores.measured:
                scores.measured["kept_clean"] = torch.full_like(scores.measured["kept_clean"], UNKNOWN)
    finish(args.out, about, arms, tasks)
    if judge.last_failure:
        print(f"the judge failed at times: {judge.last_failure}")


# --------------------------------------------------------------------------------------------- EdiVal's own verdicts

def read_results(folder):
    """EdiVal's results of one model: image_rate.json, task_rate.json and, where they are, the files of each dialogue.

    Returns {index: (s of K turns, K pairs of object and background consistency, K kinds)}. ValueError names a hole or a
    contradiction.
    """
    folder = folder / "multipass" if (folder / "multipass").is_dir() else folder
    for name in ("image_rate.json", "task_rate.json"):
        if not (folder / name).is_file():
            raise ValueError(f"--verdicts {folder} holds no {name}: it is no result of EdiVal's eval.py")
    rates = data.read_json(folder / "image_rate.json")
    by_task = data.read_json(folder / "task_rate.json")
    if not rates:
        raise ValueError(f"{folder / 'image_rate.json'} holds no dialogues")
    K = max(map(len, rates.values()))
    found = {}
    for index in sorted(rates, key=int):
        s = rates[index]
        if len(s) != K:
            raise ValueError(f"{folder / 'image_rate.json'}: dialogue {index} has {len(s)} of {K} turns")
        # consistency and kinds are in the file of the dialogue, where it was kept
        file = folder / f"{index}_input_raw.json"
        turns = data.read_json(file) if file.is_file() else {}
        pairs, kinds = [], []
        for k in range(K):
            turn = turns.get(str(k + 1)) or {}
            pair = turn.get("object_dinov3_consistency_mean"), turn.get("background_dinov3_consistency")
            pairs.append([UNKNOWN if value is None else value for value in pair])
            kinds.append(turn.get("task_type", ""))
        found[int(index)] = [float(value) for value in s], pairs, kinds
    # a partial run leaves two files that do not agree
    given, turns = by_task.get("overall", []), K * len(found)
    counted = sum(sum(s) for s, _, _ in found.values())
    if len(given) != turns or abs(sum(given) - counted) > 1e-6:
        raise ValueError(f"{folder}: task_rate.json has {sum(given):g} successes in {len(given)} turns, "
                         f"image_rate.json {counted:g} in {turns}: they are of different runs")
    return found


def collect_results(folders):
    """EdiVal's results of all models -> {arm: Scores}, {index: kinds}. ValueError for different dialogues."""
    results = {arm: read_results(folder) for arm, folder in folders.items()}
    base = next(iter(results))
    arms, indices = {}, results[base].keys()
    for arm, found in results.items():
        if found.keys() != indices:
            odd = min(found.keys() ^ indices)
            raise ValueError(f"{arm} and {base} were scored on different dialogues: {len(found)} and {len(indices)}, "
                             f"index {odd} is in one alone")
        success, consistency, _ = zip(*found.values())
        arms[arm] = evaluation.Scores(torch.tensor([success], dtype=torch.float64),
                                      torch.tensor([consistency], dtype=torch.float64))
    return arms, {index: kinds for index, (_, _, kinds) in results[base].items()}


def report(args):
    """Report EdiVal's own verdicts, with the pictures where OUT holds those that were scored."""
    record = read_record(args)
    arms, kinds = collect_results(named_folders(args.verdicts))
    K = next(iter(arms.values())).success.shape[2]

    # The instructions are in the CSV; without it the results alone are shown.
    tasks = [Task(None, [""] * K, kinds[index], {"index": index}, (SIZE, SIZE)) for index in kinds]
    if record["data"]:
        known = load_tasks(record["data"], record["images"], K)
        known = {task.meta["index"]: task for task in known}
        tasks = [known.get(task.meta["index"], task) for task in tasks]
    for arm, scores in arms.items():
        file_of = functools.partial(layout, args.out / f"{arm}_generation")
        plan = evaluation.make_plan(tasks, K, folder=args.out, file_of=file_of)
        there = all(file.is_file() for dialogue in plan for file in dialogue.files)
        if record["images"] and there:
            scores.pictures = lambda row, plan=plan: evaluation.load_pictures(plan[row])
    finish(args.out / "edival", {"profile": "EdiVal"}, arms, tasks)


# ----------------------------------------------------------------------------------------------------- command line

def read_record(args):
    """What generate left in OUT/edival.json, if anything; the flags of now win."""
    file = args.out / "edival.json"
    record = {"data": None, "images": None, "turns": 3, "probes": 0, "arms": [], "made_of": {}}
    if file.is_file():
        record |= data.read_json(file)
        kept = {"data": str, "images": str, "turns": int, "probes": int, "arms": list, "made_of": dict}
        for name, wanted in kept.items():
            if record[name] is not None and not isinstance(record[name], wanted):
                raise ValueError(f"{file}: {name} must be of type {wanted.__name__}")
    for name in ("data", "images"):
        if getattr(args, name):
            record[name] = str(Path(getattr(args, name)).resolve())
    record["turns"] = args.turns or record["turns"]
    return record


def named_folders(paths, taken=()):
    """Folders NAME_generation, or multipass in one, as {NAME: folder}. ValueError for a name twice."""
    found = {}
    for path in map(Path, paths):
        folder = path.parent if path.name == "multipass" else path
        name = folder.resolve().name.split("_")[0]
        if name in found or name in taken:
            raise ValueError(f"two models are named {name!r}: rename the folder {folder}")
        found[name] = folder
    return found


def finish(out, about, arms, tasks):
    """Write a report and print its table."""
    from bench.report import setting_line, write_report
    result = about | {"n": len(tasks)} | evaluation.summarise(arms, tasks)
    write_report(out, result, arms, tasks)
    print(f"{setting_line(result)}\n{evaluation.table(result)}\nwritten: {out / 'report.html'}")


def at_least(low):
    """A whole number from `low` up, for argparse."""
    def number(text):
        if int(text) < low:
            raise argparse.ArgumentTypeError(f"{text} must be at least {low}")
        return int(text)
    return number


def parse(argv=None):
    parser = data.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, run in (("generate", generate), ("score", score), ("report", report), ("tasks", convert)):
        command = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        needed = run in (generate, convert)
        command.add_argument("--data", required=needed, help="EdiVal's CSV (default: what generate was given)")
        command.add_argument("--images", required=needed, help="folder of its pictures")
        command.add_argument("--turns", type=at_least(1), default=3 if needed else None, help="K (default: 3)")
        out = None if run is convert else Path("out/edival")
        command.add_argument("--out", type=Path, default=out, required=out is None, help=f"(default: {out})")
        command.set_defaults(run=run)

    add = commands.choices["generate"].add_argument
    add("--model", required=True, help="editor: a folder or hub id")
    add("--lora", action="append", default=[], metavar="[NAME=]PATH", help="to compare with the base; may be repeated")
    add("--probes", type=at_least(0), default=100, help="tasks for M_clean, wear and the drift; 0 = none")
    add("--batch", type=at_least(1), default=4, help="dialogues in one forward")
    add("--offload", action="store_true", help="text encoders are on the GPU only while they work")

    add = commands.choices["score"].add_argument
    add("--judge", required=True, help="a VLM: a folder, a hub id or http://host:port/v1#model")
    add("--rubric", default="", help="JSON file of its prompts")
    add("--reasoning", default="logits", choices=["logits", "direct", "think"], help="how it scores")
    add("--votes", type=at_least(1), default=1, help="answers averaged for a score")
    add("--judge-workers", type=at_least(1), default=32, help="requests to it under way at a time")
    add("--features", help="a DINOv2 or DINOv3 folder or hub id: consistency by its features, not by the judge")
    add("--pictures", action="append", default=[], metavar="NAME_generation", help="made elsewhere, in EdiVal's layout")

    add = commands.choices["report"].add_argument
    add("--verdicts", action="append", required=True, metavar="RESULTS/NAME_generation",
        help="what EdiVal's eval.py wrote for a model, the base first; may be repeated")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    args.run(args)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    data.run_main(main)
