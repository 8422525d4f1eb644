"""bench/edival.py: published counts, the baselines' own pictures, EdiVal's results read back, proxies named so."""
import csv
import functools
import json
import random
import subprocess
import sys
from collections import Counter
from concurrent.futures import Future
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import eval as evaluation
import model
import reward
from bench import edival
from fixtures import PIPES, ROOT, editor_folder, load_pipe, tiny_editor
from rollout import Task

GOLDEN = ROOT.parent / "shared" / "data" / "edival" / "oai_instruction_generation_output.csv"
golden = pytest.mark.skipif(not GOLDEN.is_file(), reason="EdiVal's CSV is not in ../shared/data/edival")

# index -> turns (type, instruction, with brackets), objects that should be unchanged, all objects
DIALOGUES = {
    3: [("subject_add", "Add [hat]", ["cat"], ["cat", "hat"]),
        ("color_alter", "Change the color of [hat] to [red]", ["cat"], ["cat", "hat", "red hat"]),
        ("subject_remove", "Remove [cat]", [], ["cat", "hat", "red hat"])],
    10: [("background_change", "Change the background to [sea]", ["dog"], ["dog"]),
         ("subject_add", "Add [ball]", ["dog"], ["dog", "ball"]),
         ("count_change", '"Change the count of [ball] to [3]"', [], ["dog", "ball"])],
    11: [("text_change", "Add text '[HI]' on the image", ["dog"], ["dog"]),
         ("subject_remove", "Remove [dog]", [], ["dog"]),
         ("background_change", "Change the background to [park]", [], [])]}


PUBLISHED = dict(edival.BASELINES)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Pictures of 32 x 32, edited at 64 x 64 in three steps."""
    monkeypatch.setattr(edival, "SIZE", 32)
    monkeypatch.setitem(edival.BASELINES, "FluxKontextPipeline", edival.Baseline(3, 3., 64, "", 2, 512))


def write_csv(folder, dialogues=DIALOGUES, size=(32, 32)):
    """EdiVal's files in small: the CSV and its pictures. Returns the CSV's path."""
    folder.mkdir(exist_ok=True)
    with open(folder / "edival.csv", "w", newline="") as file:
        names = ("image_index turns task_type instructions format_instructions bg_consistency "
                 "unchanged_objects all_objects").split()
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for index, turns in dialogues.items():
            for k in range(len(turns)):
                kinds, told = ([turn[c] for turn in turns[:k + 1]] for c in (0, 1))
                writer.writerow(dict(zip(names,
                                         [index, k + 1, kinds, [t.replace("[", "").replace("]", "") for t in told],
                                          told, "background_change" not in kinds, turns[k][2], turns[k][3]])))
    for index in dialogues:
        Image.effect_noise(size, 90).convert("RGB").save(folder / f"{index}_input_raw.jpg", quality=95)
    return folder / "edival.csv"


# ------------------------------------------------------------------------------------------------------------ its data

@golden
def test_the_published_counts_of_the_benchmark():
    """Catches: rows lost or read twice, types of another turn, consistency where EdiVal has none."""
    tasks = edival.load_tasks(GOLDEN, None, 3)
    assert len(tasks) == 572 and sum(len(task.instructions) for task in tasks) == 1716
    assert Counter(kind for task in tasks for kind in task.kinds) == {
        "subject_add": 237, "subject_remove": 205, "background_change": 192, "count_change": 191,
        "material_alter": 188, "text_change": 188,
        "color_alter": 186, "subject_replace": 166, "position_change": 163}
    kept = [[task.meta["background_kept"][k] for task in tasks] for k in range(3)]
    objects = [[task.meta["background_kept"][k] and bool(task.meta["objects_kept"][k]) for task in tasks]
               for k in range(3)]
    assert [sum(k) for k in kept] == [507, 452, 380] and [sum(k) for k in objects] == [453, 354, 261]
    dependent = [sum(task.meta["dependent"][k] for task in tasks) / 572 for k in range(3)]
    assert dependent == pytest.approx([0, .138, .208], abs=.005)
    quotes = sum(text.startswith('"') for task in tasks for text in task.instructions)
    assert quotes > 150                                                      # kept as they are, like the baselines


@golden
def test_words_shared_with_an_earlier_edit_find_what_the_object_lists_find():
    """Catches: dependent instructions of a JSONL file, which has no lists, that pass for independent."""
    tasks = edival.load_tasks(GOLDEN, None, 3)
    pairs = [(task.meta["dependent"][k], data._speaks_of_earlier(task, k)) for task in tasks for k in (1, 2)]
    assert sum(listed and not guessed for listed, guessed in pairs) <= 1 and sum(listed for listed, _ in pairs) == 201
    assert sum(guessed for _, guessed in pairs) < 400


def test_a_small_table_gives_its_dialogues(tmp_path):
    """Catches: prefixes taken for dialogues, the row number for the index, a picture of another dialogue."""
    tasks = edival.load_tasks(write_csv(tmp_path), tmp_path, 2)
    assert [task.meta["index"] for task in tasks] == [3, 10, 11] and tasks[0].size == (32, 32)
    for task in tasks:
        with Image.open(tmp_path / f"{task.meta['index']}_input_raw.jpg") as picture:
            assert task.picture().tobytes() == picture.tobytes()
    assert tasks[1].instructions == ["Change the background to sea", "Add ball", '"Change the count of ball to 3"']
    assert [task.meta["background_kept"] for task in tasks] == [[True] * 3, [False] * 3, [True, True, False]]
    assert [task.meta["dependent"] for task in tasks] == [[False, True, False], [False, False, True], [False] * 3]
    assert data.alone(tasks[0], 1) is None and data.alone(tasks[0], 2).instructions == ["Remove cat"]
    assert data.alone(tasks[0], 2).image is tasks[0].image


def write_rows(folder, rows):
    """A CSV of EdiVal's form with pictures 3 and 7; rows (image_index, turns, task_type, instructions)."""
    for name, colour in (("3_input_raw.png", "red"), ("7.jpg", "blue"), ("7_input_raw_turn_1.png", "white")):
        Image.new("RGB", (48, 32), colour).save(folder / name)
    with open(folder / "tasks.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("image_index", "turns", "task_type", "instructions", "bg_consistency", "unchanged_objects"),
                          *((*row, "False", "['a', 'b']") for row in rows)])
    return folder / "tasks.csv"


def prefixes(index, instructions):
    return [(index, k, str(["color_alter"] * k), str(instructions[:k])) for k in range(1, len(instructions) + 1)]


def test_a_csv_of_edivals_form_gives_a_task_for_each_picture(tmp_path):
    """A task for each of the cumulative rows, literals left as text, the wrong picture, order of rows relied upon,
    a row that was written again later, a cell of more than 131,072 characters refused."""
    texts = ['"Change the count of cat to 4"', "Add a dog, don't remove the cat", "Make it blue " + "x" * 200_000]
    rows = prefixes(3, ["Corrected", "further", "down"]) + prefixes(3, texts)[::-1]
    rows += prefixes(7, ["One", "Two", "Three"])
    tasks = edival.load_tasks(write_rows(tmp_path, rows), tmp_path, 3)
    assert [task.instructions for task in tasks] == [texts, ["One", "Two", "Three"]]
    assert tasks[0].kinds == ["color_alter"] * 3 and tasks[0].meta["unchanged_objects"] == ["a", "b"]
    assert tasks[0].meta["bg_consistency"] is False and tasks[0].size == (32, 48)
    red, blue = (np.asarray(task.picture())[9, 9] for task in tasks)
    assert red.tolist() == [255, 0, 0] and blue[2] > 250


BAD_ROWS = {
    "code in a list": ((3, 1, "['x']", "[__import__('os').getcwd()]"), "line 2 cannot be read"),
    "a cut list": ((3, 1, "['x']", "['a', 'b"), "line 2 cannot be read"),
    "nested too deeply": ((3, 1, "['x']", "[" * 100_000), "line 2 cannot be read"),
    "half a surrogate pair": ((3, 1, "['x']", "['a \\ud83d']"), "line 2 cannot be read"),
    "a list for an index": (("[3]", 2, "['x', 'y']", "['a', 'b']"), r"line 2: .*no \[3\]_input_raw"),
    "a truth for an index": (("True", 2, "['x', 'y']", "['a', 'b']"), "line 2: .*no True_input_raw"),
    "turns not a number": ((3, "one", "['x']", "['a']"), "line 2 cannot be read"),
    "text": ((3, 1, "['x']", "Make it blue"), 'line 2 lacks "instructions"'),
    "too few": ((3, 1, "['x']", "['a']"), "line 2 has 1 instructions, fewer than the 2 turns"),
    "types too few": ((3, 2, "['x']", "['a', 'b']"), 'line 2: "kinds" must be a list of 2'),
    "no picture": ((4, 2, "['x', 'y']", "['a', 'b']"), "line 2: .*no 4_input_raw"),
}


@pytest.mark.parametrize("bad", BAD_ROWS)
def test_a_bad_row_is_named(tmp_path, bad):
    """A cell that is run as code, a traceback of ast, a row that is left out in silence."""
    line, message = BAD_ROWS[bad]
    with pytest.raises(ValueError, match=message) as error:
        edival.load_tasks(write_rows(tmp_path, [line]), tmp_path, 2)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("spoil, expected", [
    ("hole", "dialogue 10 has turns \\[1, 3\\], expected 1 to 3"),
    ("list", "line 3 cannot be read"), ("bytes", "line 3 cannot be read"), ("not UTF-8", "cannot be read"),
    ("other", "is no CSV of EdiVal's form: it has no column image_index, instructions, task_type, turns"),
    ("picture", "holds no 11_input_raw"), ("short", "line 4 has 3 instructions, fewer than the 4"),
    ("none", "holds no tasks")])
def test_a_bad_table_is_refused_with_its_place(tmp_path, spoil, expected):
    """Catches: a dialogue without its second turn evaluated as one of two turns, a traceback of the parser."""
    path = write_csv(tmp_path)
    lines = path.read_text().splitlines(keepends=True)
    if spoil == "hole":
        lines.pop(5)
    elif spoil == "list":
        lines[2] = lines[2].replace("]", "", 1)
    elif spoil == "bytes":
        lines[2] = lines[2].replace("hat", "h\0t", 1).replace("3,2", "3,\0", 1)
    elif spoil == "other":
        lines = ["a,b\n", "1,2\n"]
    elif spoil == "none":
        lines = lines[:1]
    elif spoil == "picture":
        (tmp_path / "11_input_raw.jpg").unlink()
    path.write_text("".join(lines))
    if spoil == "not UTF-8":
        path.write_bytes(path.read_bytes() + b"\xff\n")
    with pytest.raises(ValueError, match=expected) as error:
        edival.load_tasks(path, tmp_path, 4 if spoil == "short" else 3)
    assert "\n" not in str(error.value)


def test_a_csv_becomes_a_file_for_training_unless_it_is_the_benchmark(tmp_path, monkeypatch):
    """Catches: pictures that are not found from the JSONL's folder, instructions of the first turn alone; training on
    what the result is measured by."""
    path = write_csv(tmp_path / "csv")
    out = tmp_path / "new" / "tasks.jsonl"
    edival.main(["tasks", "--data", str(path), "--images", str(tmp_path / "csv"), "--out", str(out)])
    monkeypatch.chdir("/")
    tasks = data.load(out, "all", 3, 32)
    for task, own in zip(tasks, edival.load_tasks(path, tmp_path / "csv", 3), strict=True):
        assert (task.instructions, task.kinds) == (own.instructions, own.kinds)
        assert data.fingerprint(task) == data.fingerprint(own)
    if GOLDEN.is_file():
        with pytest.raises(ValueError, match="is EdiVal-Bench itself: what is trained on it cannot be measured by it"):
            edival.main(["tasks", "--data", str(GOLDEN), "--images", str(tmp_path), "--out", str(tmp_path / "b.jsonl")])
        assert not (tmp_path / "b.jsonl").exists()


# ------------------------------------------------------------------------------------------------------- its protocol

def generate(folder, out, *flags, model=None):
    """generate on the CSV in a folder."""
    edival.main(["generate", "--model", model or editor_folder(), "--data", str(folder / "edival.csv"), "--images",
                 str(folder), "--probes", "0", "--out", str(out), *flags])


def test_the_protocol_gives_the_pictures_of_the_baselines_own_loop(tmp_path, monkeypatch):
    """Catches: other noise than seed 1234 every turn, noise packed otherwise, guidance, steps, another way of scaling,
    a first turn from the original file in place of what is written. EdiVal's loop over the pipeline, in small."""
    from diffusers.pipelines.flux import pipeline_flux_kontext
    monkeypatch.setattr(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", [(64, 64)])
    write_csv(tmp_path, {index: DIALOGUES[index] for index in (3, 10)})
    generate(tmp_path, tmp_path / "out", "--turns", "2")
    pipe, folder = load_pipe(), tmp_path / "out" / "base_generation" / "multipass"
    for index in (3, 10):
        current = Image.open(folder / f"{index}_input_raw.png")
        assert np.array_equal(np.array(current),
                              np.array(Image.open(tmp_path / f"{index}_input_raw.jpg").convert("RGB")))
        for k in range(2):
            torch.manual_seed(1234)
            text = DIALOGUES[index][k][1].replace("[", "").replace("]", "")
            edited = pipe(image=current, prompt=text, guidance_scale=3., num_inference_steps=3, height=64, width=64,
                          max_area=64 * 64, max_sequence_length=14).images[0]
            current = edited.resize((32, 32), Image.LANCZOS)
            ours = np.array(Image.open(folder / f"{index}_input_raw_turn_{k + 1}.png")).astype(int)
            assert np.abs(ours - np.array(current)).max() <= 1, (index, k)


def pipelines_own(pipe, family, picture, text, rule, monkeypatch):
    """What a pipeline makes of a picture in three steps with its seed: (3, H, W) uint8."""
    H, W = picture.height, picture.width
    call = dict(image=picture, prompt=text, num_inference_steps=3, height=H, width=W,
                generator=torch.Generator().manual_seed(1234))
    if family == "kontext":
        call |= dict(guidance_scale=rule.guidance, max_area=H * W, _auto_resize=False, max_sequence_length=14)
    elif family == "klein":
        call |= dict(guidance_scale=rule.guidance, max_sequence_length=48)
    else:
        # else their context is always of a million pixels
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus as plus
        original = plus.calculate_dimensions
        monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: (W, H, None))
        monkeypatch.setattr(plus, "calculate_dimensions",
                            lambda area, ratio: (W, H) if area == plus.VAE_IMAGE_SIZE else original(area, ratio))
        call |= dict(true_cfg_scale=rule.guidance, negative_prompt=" ")
    return torch.from_numpy(np.array(pipe(**call).images[0])).permute(2, 0, 1)


@pytest.mark.parametrize("family", PIPES)
def test_the_protocol_is_the_pipeline_with_its_seed(family, monkeypatch):
    """Catches: noise of seed 1234 packed otherwise than the pipeline packs what it draws; the editor's own guidance."""
    pipe = PIPES[family]()
    name = type(pipe).__name__
    rule = PUBLISHED[name]._replace(steps=3, size=96, text=0, guidance=3.)
    monkeypatch.setitem(edival.BASELINES, name, rule)
    noise = torch.randint(0, 256, (96, 96, 3), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)
    task = Task(Image.fromarray(noise.numpy()), ["Make the red star blue"], [""])
    editor = tiny_editor(family, pipe)
    T = edival.as_baseline(editor)
    ours = edival.sample_as_baseline(editor, evaluation.make_plan([task], 1), T, lambda k, images: None)[0, 1]
    theirs = pipelines_own(pipe, family, task.image, task.instructions[0], rule, monkeypatch)
    difference = (ours.int() - theirs.int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 1e-3
    assert theirs.float().std() > 1


def test_the_table_of_baselines_is_the_published_protocol():
    """Catches: a default of training that slips into a benchmark; EdiVal's generate.py and the pipelines say these."""
    assert {name: rule[:3] for name, rule in PUBLISHED.items()} == {
        "FluxKontextPipeline": (28, 2.5, 1024), "QwenImageEditPipeline": (50, 4., 1024),
        "QwenImageEditPlusPipeline": (50, 4., 1024), "Flux2KleinPipeline": (50, 4., 512)}


def test_every_family_packs_its_noise_as_its_pipeline_does(monkeypatch):
    """Catches: FLUX.2's latents, which are patches already, packed like FLUX.1's."""
    from diffusers import Flux2KleinPipeline, FluxKontextPipeline
    pack = {"FluxKontextPipeline": lambda z: FluxKontextPipeline._pack_latents(z, 1, 16, 8, 8)[0],
            "Flux2KleinPipeline": lambda z: Flux2KleinPipeline._pack_latents(z)[0]}
    for family, shape in (("FluxKontextPipeline", (1, 16, 8, 8)), ("Flux2KleinPipeline", (1, 64, 4, 4))):
        monkeypatch.setitem(edival.BASELINES, family, PUBLISHED[family]._replace(size=64))
        editor = SimpleNamespace(pipe=type(family, (), {})(), device="cpu", multiple=16,
                                 latent_shape=lambda size: (16, 64), dtype=torch.float32)
        z = torch.randn(shape, generator=torch.Generator().manual_seed(1234))
        assert torch.equal(edival.baseline_noise(editor, 1234), pack[family](z)), family


# -------------------------------------------------------------------------------------------------- what generate does

class CopyEditor:
    """Returns every picture as it was: its velocity points from anything to the context, v = (x - context) / t."""
    device, multiple, negative, guidance, max_text = torch.device("cpu"), 16, None, 1., 77
    pipe, dtype = type("FluxKontextPipeline", (), {})(), torch.float32
    loaded = []
    merged = nullcontext

    def latent_shape(self, size):
        return size[0] * size[1] // 256, 768

    def times(self, T, size):
        return torch.linspace(1, 0, T + 1)

    def condition(self, instructions, pictures):
        return {"text": torch.zeros(1, 1)}, torch.zeros(len(instructions), dtype=torch.int64)

    def encode(self, pictures):
        tiles = pictures.float().unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 1, 4, 5)
        return tiles.flatten(3).flatten(1, 2) / 255

    def velocity(self, x, t, cond, context, size):
        return (x - context) / t[:, None, None]

    def decode(self, x, size):
        h, w = size[0] // 16, size[1] // 16
        tiles = x.view(-1, h, w, 3, 16, 16).permute(0, 3, 1, 4, 2, 5)
        return (tiles.reshape(-1, 3, *size) * 255).round().clamp(0, 255).byte()


@pytest.fixture
def copies(monkeypatch, tmp_path):
    """A CSV in tmp_path/csv and an editor that copies; the calls of model.load and of model.load_weights."""
    calls = []
    monkeypatch.setitem(edival.BASELINES, "FluxKontextPipeline", edival.Baseline(1, 3., 32, "", 2, 512))
    monkeypatch.setattr(model, "load", lambda path, *_, **__: calls.append(path) or CopyEditor())
    monkeypatch.setattr(model, "load_weights", lambda editor, path: calls.append(path))
    monkeypatch.setattr(model, "fingerprint", lambda path: f"content of {path}")
    write_csv(tmp_path / "csv")
    return calls


def test_generate_leaves_what_edivals_eval_wants_and_does_nothing_twice(tmp_path, copies):
    """Catches: a name that EdiVal cuts at _, a missing source, JPEG, an editor loaded for nothing, a finished picture
    made again, a LoRA that does not fit found after the base is done."""
    with pytest.raises(ValueError, match="'my_lora' holds '_', where EdiVal cuts names: write --lora NAME="):
        generate(tmp_path / "csv", tmp_path / "out", "--lora", f"my_lora={tmp_path}", model="X")
    lora = ["--lora", f"my-lora={tmp_path}"]
    generate(tmp_path / "csv", tmp_path / "out", *lora, model="X")
    assert copies == ["X", str(tmp_path), "X"]
    for arm in ("base", "my-lora"):
        folder = tmp_path / "out" / f"{arm}_generation" / "multipass"
        assert {file.name for file in folder.iterdir()} == {
            f"{i}_input_raw{end}.png" for i in DIALOGUES for end in ("", "_turn_1", "_turn_2", "_turn_3")}
        assert all(Image.open(file).format == "PNG" and Image.open(file).size == (32, 32) for file in folder.iterdir())
    generate(tmp_path / "csv", tmp_path / "out", *lora, model="X")
    assert len(copies) == 3
    gone, kept = folder / "10_input_raw_turn_2.png", folder / "3_input_raw_turn_1.png"
    gone.unlink()
    before = kept.stat().st_mtime_ns
    generate(tmp_path / "csv", tmp_path / "out", *lora, model="X")
    assert len(copies) == 5 and gone.is_file() and kept.stat().st_mtime_ns == before


@pytest.mark.parametrize("changed", ["model", "lora", "picture", "instruction"])
def test_pictures_of_something_else_are_not_gone_on_with(tmp_path, copies, monkeypatch, changed):
    """Catches: half of the pictures of the weights, the table or the photographs of yesterday, under one name."""
    flags = ["--lora", f"A={tmp_path}"]
    generate(tmp_path / "csv", tmp_path / "out", *flags, model="X")
    if changed == "picture":
        Image.new("RGB", (32, 32)).save(tmp_path / "csv" / "10_input_raw.jpg")
    elif changed == "instruction":
        path = tmp_path / "csv" / "edival.csv"
        path.write_text(path.read_text().replace("Add ball", "Add bell"))
    else:
        trained = "X" if changed == "model" else str(tmp_path)
        monkeypatch.setattr(model, "fingerprint", lambda path: f"content of {path}" + "!" * (path == trained))
    what = {"model": "weights of base", "lora": "weights of A"}.get(changed, "dialogue 10")
    with pytest.raises(ValueError, match=f"out holds another evaluation \\({what}.*choose another --out"):
        generate(tmp_path / "csv", tmp_path / "out", *flags, model="X")


def test_pictures_of_another_size_are_not_of_the_protocol(tmp_path, copies):
    """Catches: the benchmark's originals scaled in silence, by another filter than EdiVal's."""
    Image.new("RGB", (40, 32)).save(tmp_path / "csv" / "10_input_raw.jpg")
    with pytest.raises(ValueError, match="line 7: .*10_input_raw.jpg is 40 x 32, expected 32 x 32"):
        generate(tmp_path / "csv", tmp_path / "out", model="X")
    assert not (tmp_path / "out").exists() and not copies


def test_the_command_runs_from_any_folder(tmp_path):
    """Catches: an import that works in the repository's root alone; a traceback where one line is promised."""
    run = functools.partial(subprocess.run, cwd=tmp_path, capture_output=True, text=True)
    done = run([sys.executable, ROOT / "bench" / "edival.py", "score", "--judge", "exact"])
    assert done.returncode == 2 and done.stderr == (
        "edival.py: out/edival holds no pictures of generate: give --data and --images\n")


# ---------------------------------------------------------------------------------------------------------- its results

def write_results(folder, s, kinds=None, consistency=None):
    """What EdiVal's eval.py leaves: s {index: K scores}, consistency {index: K pairs (object, background) or None}."""
    folder.mkdir(parents=True)
    by_task = {"overall": [float(x) for row in s.values() for x in row]}
    (folder / "image_rate.json").write_text(json.dumps(s))
    (folder / "task_rate.json").write_text(json.dumps(by_task))
    for index in consistency or {}:
        turns = {str(k + 1): {"instruction_following": s[index][k], "task_type": kinds[index][k],
                              "object_dinov3_consistency_mean": pair and pair[0],
                              "background_dinov3_consistency": pair and pair[1]} for k,
                              pair in enumerate(consistency[index])}
        (folder / f"{index}_input_raw.json").write_text(json.dumps({"base_image_quality": {}} | turns))


@golden
def test_results_with_a_third_partys_counts_give_its_published_rates(tmp_path):
    """Catches: CC pooled over object and background samples in place of the mean of their means; wrong denominators."""
    tasks = edival.load_tasks(GOLDEN, None, 3)
    s = {task.meta["index"]: [0, 0, 0] for task in tasks}
    rows = list(s.values())
    for i, turns in enumerate([3] * 93 + [2] * (190 - 93) + [1] * (354 - 190)):
        rows[i][:turns] = [1] * turns
    for k, count in ((1, 311 - 190), (2, 292 - 93)):
        for row in rows[354:354 + count]:
            row[k] = 1
    pair = lambda task, k: (.7 if task.meta["objects_kept"][k] else None,
                            .9) if task.meta["background_kept"][k] else None
    consistency = {task.meta["index"]: [pair(task, k) for k in range(3)] for task in tasks}
    write_results(tmp_path / "Lance_generation" / "multipass", s, {task.meta["index"]: task.kinds for task in tasks},
                  consistency)
    edival.main(["report", "--verdicts", str(tmp_path / "Lance_generation"), "--out", str(tmp_path)])
    result = json.loads((tmp_path / "edival" / "results.json").read_text())
    lance = result["arms"]["Lance"]
    assert [round(100 * x, 2) for x in lance["IF"]] == [61.89, 33.22, 16.26]
    assert [round(100 * x, 2) for x in lance["M"]] == [61.89, 54.37, 51.05]
    assert (lance["n"]["CC0"], lance["n"]["CC1"]) == ([453, 354, 261], [507, 452, 380])      # objects, background
    assert lance["CC"] == pytest.approx([.8] * 3)
    assert lance["n"]["kind subject_add"] == [237] and result["profile"] == "EdiVal" and result["n"] == 572
    assert "proxy" not in (tmp_path / "edival" / "tables.md").read_text()


def test_two_models_are_compared_and_types_come_from_the_csv(tmp_path):
    """Catches: rows of two models paired by place and not by index; a report of EdiVal's that overwrites ours."""
    path, random_ = write_csv(tmp_path), random.Random(0)
    s = {str(i): [random_.randint(0, 1) for _ in range(3)] for i in DIALOGUES}
    write_results(tmp_path / "base_generation" / "multipass", s)
    write_results(tmp_path / "tuned_generation" / "multipass", {i: [1, 1, 1] for i in reversed(s)})
    write_results(tmp_path / "same_generation", {i: s[i] for i in reversed(s)})
    (tmp_path / "results.json").write_text("ours")
    edival.main(["report", "--verdicts", str(tmp_path / "base_generation"), "--verdicts",
                 str(tmp_path / "tuned_generation" / "multipass"), "--verdicts", str(tmp_path / "same_generation"),
                 "--data", str(path), "--images", str(tmp_path), "--out", str(tmp_path)])
    result = json.loads((tmp_path / "edival" / "results.json").read_text())
    assert (tmp_path / "results.json").read_text() == "ours" and result["arms"]["tuned"]["IF"] == [1, 1, 1]
    assert result["arms"]["base"]["M"] == pytest.approx(np.mean(list(s.values()), 0))
    assert result["arms"]["base"]["CC"] == [None] * 3
    same = result["differences"]["same"]
    assert same["M"] == [0, 0, 0] and same["interval_95"]["M"] == [[0, 0]] * 3
    assert result["arms"]["base"]["turns count_change"] == [None, None, s["10"][2]]


@pytest.mark.parametrize("spoil, expected", [("hole", "dialogue 10 has 2 of 3 turns"), ("sum", "different runs"),
                                             ("none", "holds no dialogues"),
                                             ("index", "scored on different dialogues: 3 and 2, index 11"),
                                             ("name", "two models are named 'base'"),
                                             ("file", "holds no image_rate.json: it is no result of EdiVal's eval.py"),
                                             ("list", "image_rate.json must hold a JSON object")])
def test_results_that_cannot_be_compared_are_refused(tmp_path, spoil, expected):
    """Catches: a partial run averaged over whatever is complete, two files of different runs."""
    s = {i: [1, 0, 1] for i in DIALOGUES}
    write_results(tmp_path / "a" / "base_generation" / "multipass",
                  {i: s[i] for i in ([3, 10] if spoil == "index" else s)})
    spoilt = {"hole": s | {10: [1, 0]}, "none": {}}.get(spoil, s)
    folder = tmp_path / "b" / ("base_generation" if spoil == "name" else "tuned_generation")
    write_results(folder / "multipass", spoilt)
    if spoil == "file":
        (folder / "multipass" / "image_rate.json").unlink()
    if spoil == "list":
        (folder / "multipass" / "image_rate.json").write_text("[]")
    if spoil == "sum":
        (folder / "multipass" / "task_rate.json").write_text(json.dumps({"overall": [1.] * 9}))
    with pytest.raises(ValueError, match=expected):
        edival.main(["report", "--verdicts", str(tmp_path / "a" / "base_generation"), "--verdicts", str(folder),
                     "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------------ our proxy

@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    from transformers import Dinov2Config, Dinov2Model
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dino")
    Dinov2Model(Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, patch_size=2, image_size=16,
                             mlp_ratio=2)).save_pretrained(folder)
    return folder


def test_features_are_patch_similarities_without_the_edits_quarter(dino):
    """Catches: the class token among the patches, similarity of other places, an edit that costs consistency."""
    similarity = edival.load_features(dino)
    generator = torch.Generator().manual_seed(0)
    a, other = torch.randint(0, 256, (2, 3, 32, 32), generator=generator, dtype=torch.uint8)
    edited = a.clone()
    edited[:, :8, :8] = 255
    same, local, whole, swapped = similarity(torch.stack([torch.stack([a, b])
                                                          for b in (a, edited, other, a.flip(2))])).tolist()
    assert same == pytest.approx(1, abs=1e-5) and local > .98 > whole and local > swapped
    from transformers import AutoModel
    net, shift = AutoModel.from_pretrained(dino).eval(), torch.tensor([.485, .456, .406]).view(3, 1, 1)
    scale = torch.tensor([.229, .224, .225]).view(3, 1, 1)
    with torch.no_grad():
        # 256 patches of 2 x 2
        u, v = (net((x[None] / 255 - shift) / scale).last_hidden_state[0, 1:] for x in (a, other))
    by_hand = torch.cosine_similarity(u, v, dim=-1).sort().values[64:].mean().item()
    assert whole == pytest.approx(by_hand, abs=1e-4)


class StubJudge:
    """Following by colour, consistency by drift; notes what it was asked."""
    names, weights, fingerprint, last_failure = ["following", "consistency"], [.5, .5], "stub", ""

    def __init__(self):
        self.asked = 0

    def check(self, tasks):
        pass

    def start(self, tasks, images, k):
        self.asked += len(tasks)
        x, future = images.float() / 255, Future()
        drift = (x[:, k + 1] - x[:, 0]).abs().mean((1, 2, 3))
        future.set_result(torch.stack([x[:, k + 1, 0].mean((1, 2)), 1 - drift], 1))
        return future


@pytest.fixture
def judge(monkeypatch):
    judge = StubJudge()
    monkeypatch.setattr(reward, "load", lambda *_, **__: judge)
    return judge


def test_edivals_data_by_our_judges_is_always_called_a_proxy(tmp_path, copies, judge, dino, capsys):
    """Catches: a VLM's opinion published as EdiVal-IF; consistency after a background change, where EdiVal has none."""
    out = tmp_path / "out"
    generate(tmp_path / "csv", out, "--probes", "9", model="X")
    edival.main(["score", "--judge", "vlm", "--features", str(dino), "--out", str(out)])
    result = json.loads((out / "results.json").read_text())
    base = result["arms"]["base"]
    assert result["profile"] == "proxy" and base["CC"] == pytest.approx([1] * 3, abs=1e-5)
    assert base["n"]["CC0"] == [2, 2, 1] and base["n"]["clean"] == [3, 2, 2] and base["n"]["nothing"] == [3] * 3
    # never the judge's consistency on clean contexts beside that of the features
    assert base["CC_clean"] == base["CC_self"] == [None] * 3
    for name in ("tables.md", "report.html"):
        text = (out / name).read_text()
        assert "proxy IF 1" in text and "proxy O 3" in text and "roxy scores" in text, name
        assert text.count("EdiVal-IF") == text.count("not EdiVal-IF")
    assert "Proxy scores" in capsys.readouterr().out
    asked = judge.asked
    edival.main(["score", "--judge", "vlm", "--out", str(out)])
    assert judge.asked == asked and asked == 3 * 3 + 2 + 2


def test_pictures_made_elsewhere_are_scored_beside_ours(tmp_path, copies, judge):
    """Catches: the folder's name for the model's, pictures of other dialogues, a dialogue that is left out in silence,
    files written into somebody else's folder."""
    generate(tmp_path / "csv", tmp_path / "out", model="X")
    theirs = tmp_path / "Kontext_generation" / "multipass"
    theirs.mkdir(parents=True)
    for file in (tmp_path / "out" / "base_generation" / "multipass").iterdir():
        (theirs / file.name).write_bytes(file.read_bytes())
    files = {file.name for file in theirs.iterdir()}
    score = ["score", "--judge", "vlm", "--out", str(tmp_path / "out"), "--pictures", str(theirs.parent)]
    edival.main(score)
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(result["arms"]) == ["base", "Kontext"] and result["differences"]["Kontext"]["M"] == [0, 0, 0]
    assert {file.name for file in theirs.iterdir()} == files and len(list(theirs.parent.iterdir())) == 1
    # made anew under the same name, they are judged anew; and as little is asked again as before
    Image.new("RGB", (32, 32), "white").save(theirs / "10_input_raw_turn_3.png")
    for asked in (judge.asked + 9, judge.asked + 9):
        edival.main(score)
        arms = json.loads((tmp_path / "out" / "results.json").read_text())["arms"]
        last = {arm: values["rewards"]["following"][2] for arm, values in arms.items()}
        assert judge.asked == asked and last["Kontext"] > last["base"]
    Image.new("RGB", (32, 32), "red").save(theirs / "10_input_raw.png")
    with pytest.raises(ValueError, match="10_input_raw.png is not the picture of dialogue 10 in --data"):
        edival.main(score)
    (theirs / "10_input_raw_turn_3.png").unlink()
    with pytest.raises(ValueError, match="10_input_raw_turn_3.png is missing: dialogue 10 needs the pictures of 3"):
        edival.main(score)


def test_a_report_of_edivals_verdicts_shows_the_pictures_that_were_scored(tmp_path, copies):
    """Catches: verdicts beside the pictures of another dialogue or model; a report that fails without pictures."""
    generate(tmp_path / "csv", tmp_path / "out", model="X")
    write_results(tmp_path / "base_generation" / "multipass", {index: [1, 0, 1] for index in (11, 3)})
    edival.main(["report", "--verdicts", str(tmp_path / "base_generation"), "--out", str(tmp_path / "out")])
    result = json.loads((tmp_path / "out" / "edival" / "results.json").read_text())
    assert result["n"] == 2 and result["profile"] == "EdiVal" and result["arms"]["base"]["M"] == [1, 0, 1]
    text = (tmp_path / "out" / "edival" / "report.html").read_text()
    assert "Remove dog" in text and "Change the color of hat to red" in text and "Add ball" not in text
    assert text.count("data:image/") >= 8
