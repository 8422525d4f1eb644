"""Tasks from files: right pictures, right splits, and one clear sentence for every bad line."""
import csv
import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from fixtures import ROOT

RESOLUTION = 39     # the pictures below, 48 x 32, are of this area


def halves(size, left, right, mode="RGB"):
    """A picture (W, H) of two flat colours side by side."""
    picture = Image.new(mode, size, left)
    picture.paste(right, (size[0] // 2, 0, *size))
    return picture


def encode(row):
    return json.dumps(row, ensure_ascii=False).encode()


def write(folder, rows, name="tasks.jsonl"):
    """A JSONL file with a good picture in a folder beside it; rows are objects, or raw bytes."""
    (folder / "pictures").mkdir(exist_ok=True)
    halves((48, 32), "red", "blue").save(folder / "pictures" / "a.png")
    (folder / name).write_bytes(b"\n".join(r if isinstance(r, bytes) else encode(r) for r in rows))
    return folder / name


def row(**changes):
    good = {"image": "pictures/a.png", "instructions": ["Add a hat", "Remove the dog", "Make it blue"]}
    return {k: v for k, v in (good | changes).items() if v is not None}


def sides(picture):
    """The colours well inside the left and right half of a picture."""
    pixels = np.asarray(picture)
    return tuple(pixels[8, 4].tolist()), tuple(pixels[8, -5].tolist())


def test_a_good_file_gives_its_tasks_in_order(tmp_path, monkeypatch):
    """Pictures looked up in the working directory, blank lines taken for tasks, more than K instructions refused."""
    path = write(tmp_path, [row(), b"", row(instructions=["One", "Two", "Three", "Four"], kinds=["color_alter"] * 4)])
    monkeypatch.chdir("/")
    first, second = data.load(path, "all", 3, RESOLUTION)
    assert first.instructions == ["Add a hat", "Remove the dog", "Make it blue"] and first.kinds == ["", "", ""]
    assert second.instructions[3] == "Four" and second.kinds == ["color_alter"] * 4 and second.meta["line"] == 3
    assert first.image.mode == "RGB" and first.image.size == (48, 32)
    assert sides(first.image) == ((255, 0, 0), (0, 0, 255))


def test_lines_end_at_line_feeds_only(tmp_path):
    """str.splitlines cuts at U+2028 and U+0085, which JSON allows in a string; Windows adds a BOM and \\r."""
    texts = ["a\u2028b", "c\x85d", "e\u2029f"]
    path = write(tmp_path, [b"\xef\xbb\xbf" + encode(row(instructions=texts)) + b"\r", row()])
    tasks = data.load(path, "all", 3, RESOLUTION)
    assert [task.instructions for task in tasks] == [texts, row()["instructions"]]


@pytest.mark.parametrize("size", [(512, 512), (4000, 3000), (600, 900), (100, 61), (1920, 1080), (300, 1000)])
def test_pictures_keep_their_aspect_ratio(tmp_path, size):
    """Pictures that are squeezed or squared, that grow with their ratio, with sides that patches do not divide."""
    (w, h), (W, H) = size, data.fit_size(*size, 512)
    assert W % 16 == H % 16 == 0 and abs(W * H / 512 ** 2 - 1) < .05 and abs(W / H / (w / h) - 1) < .05
    assert data.fit_size(*size[::-1], 512) == (H, W)
    picture = Image.new("RGB", size, "white")
    for colour, part in (("green", .96), ("black", .5)):         # at most 2 % of a side is cropped at each end
        picture.paste(colour, [round(s / 2 + sign * s * part / 2) for sign in (-1, 1) for s in size])
    picture.save(tmp_path / "p.png")
    pixels = np.asarray(data.load_picture(tmp_path / "p.png", 512, "here")).astype(int)
    assert pixels.shape == (H, W, 3)
    black = (pixels.max(-1) < 40)
    assert abs(black.any(0).sum() / W - .5) < .03 and abs(black.any(1).sum() / H - .5) < .03     # one scale both ways
    assert abs(black.any(0).argmax() / W - .25) < .02 and abs(black.any(1).argmax() / H - .25) < .02


def test_photographs_stand_upright(tmp_path):
    """A telephone's photo lies on its side: its rotation is in the EXIF data only."""
    exif = Image.Exif()
    exif[0x0112] = 6                                             # shown after turning 90 degrees clockwise
    halves((48, 32), "red", "blue").rotate(90, expand=True).save(tmp_path / "p.jpg", exif=exif, quality=95)
    left, right = sides(data.load_picture(tmp_path / "p.jpg", RESOLUTION, "here"))
    assert left[0] > 200 > 60 > left[2] and right[2] > 200 > 60 > right[0]


@pytest.mark.parametrize("mode, left, right, expected", [
    ("RGBA", (255, 0, 0, 255), (0, 0, 255, 255), ((255, 0, 0), (0, 0, 255))), ("L", 40, 200, ((40,) * 3, (200,) * 3)),
    ("1", 0, 1, ((0,) * 3, (255,) * 3)), ("LA", (40, 255), (200, 255), ((40,) * 3, (200,) * 3))])
def test_every_mode_becomes_rgb(tmp_path, mode, left, right, expected):
    """One greyscale or transparent picture among the tasks stops the run when a batch is stacked."""
    halves((48, 32), left, right, mode).save(tmp_path / "p.png")
    picture = data.load_picture(tmp_path / "p.png", RESOLUTION, "here")
    assert picture.mode == "RGB" and np.abs(np.subtract(sides(picture), expected)).max() <= 1


BAD = {
    "not JSON": (b"{'image': 1}", "is not JSON"),
    "not UTF-8": (b'{"image": "\xff"}', "is not JSON"),
    "not an object": (["pictures/a.png"], 'lacks "image"'),
    "no image": (row(image=None), 'lacks "image"'),
    "image no path": (row(image=3), 'lacks "image"'),
    "missing picture": (row(image="pictures/b.png"), "b.png does not exist"),
    "broken picture": (row(image="broken.png"), "broken.png cannot be read"),
    "half a picture": (row(image="half.png"), "half.png cannot be read"),
    "picture is a folder": (row(image="pictures"), "pictures cannot be read"),
    "no instructions": (row(instructions=None), 'lacks "instructions"'),
    "instructions a string": (row(instructions="Add a hat"), 'lacks "instructions"'),
    "instructions empty": (row(instructions=[]), 'lacks "instructions"'),
    "a blank instruction": (row(instructions=["Add a hat", " ", "Make it blue"]), 'lacks "instructions"'),
    "a number among instructions": (row(instructions=["Add a hat", 2, "Make it blue"]), 'lacks "instructions"'),
    "fewer than K": (row(instructions=["Add a hat", "Remove the dog"]), "2 instructions, fewer than the 3 turns"),
    "kinds too short": (row(kinds=["color_alter"]), '"kinds" must be a list of 3'),
    "kinds a string": (row(kinds="abc"), '"kinds" must be a list of 3'),
    "kinds not names": (row(kinds=[1, 2, 3]), '"kinds" must be a list of 3'),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_line_is_named(tmp_path, bad):
    """A traceback from deep inside PIL or json, or a line number that is off by one or does not count blank lines."""
    line, message = BAD[bad]
    (tmp_path / "broken.png").write_bytes(b"no picture")
    Image.effect_noise((48, 32), 50).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:500])
    with pytest.raises(ValueError) as error:
        data.load(write(tmp_path, [row(), b"", line, row()]), "train", 3, RESOLUTION)
    assert "tasks.jsonl line 3" in str(error.value) and message in str(error.value) and "\n" not in str(error.value)


def test_a_file_without_tasks_is_refused(tmp_path):
    """Training on nothing, or a bare FileNotFoundError."""
    with pytest.raises(ValueError, match="empty.jsonl holds no tasks"):
        data.load(write(tmp_path, [b"", b"  "], "empty.jsonl"), "train", 3, RESOLUTION)
    with pytest.raises(ValueError, match="nowhere.jsonl: no such file"):
        data.load(tmp_path / "nowhere.jsonl", "train", 3, RESOLUTION)


@pytest.mark.parametrize("n, n_val", [(1, 0), (2, 1), (4, 1), (10, 2), (100, 16)])
def test_validation_tasks_are_the_last_ones_and_none_of_them_is_trained_on(tmp_path, n, n_val):
    """A table before/after on tasks that the run has seen, of small files above all; a limit that takes the first."""
    path = write(tmp_path, [row(instructions=[f"{i}", "b", "c"]) for i in range(n)])
    read = lambda split, limit=4096: [int(t.instructions[0]) for t in data.load(path, split, 3, RESOLUTION, limit)]
    assert read("train") == list(range(n - n_val)) and read("val") == list(range(n - n_val, n))
    assert read("val", 1) == read("val")[:1] and read("test") == read("all") == list(range(n))


# -------------------------------------------------------------------------------------------------------- EdiVal's form

EDIVAL = ROOT.parent / "shared" / "data" / "edival" / "oai_instruction_generation_output.csv"


def edival(folder, rows):
    """A CSV of EdiVal's form with pictures 3 and 7; rows (image_index, turns, task_type, instructions)."""
    (folder / "pictures").mkdir(exist_ok=True)
    for name, colour in (("3_input_raw.png", "red"), ("7.jpg", "blue"), ("7_input_raw_turn_1.png", "white")):
        Image.new("RGB", (48, 32), colour).save(folder / "pictures" / name)
    with open(folder / "tasks.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("image_index", "turns", "task_type", "instructions", "bg_consistency", "unchanged_objects"),
                          *((*r, "False", "['a', 'b']") for r in rows)])
    return folder / "tasks.csv"


def prefixes(index, instructions):
    return [(index, k, str(["color_alter"] * k), str(instructions[:k])) for k in range(1, len(instructions) + 1)]


def test_a_csv_of_edivals_form_gives_a_task_for_each_picture(tmp_path):
    """A task for each of the cumulative rows, literals left as text, the wrong picture, order of rows relied upon,
    a row that was written again later."""
    texts = ['"Change the count of cat to 4"', "Add a dog, don't remove the cat", "Make it blue"]
    rows = prefixes(3, ["Corrected", "further", "down"]) + prefixes(3, texts)[::-1] + prefixes(7, ["One", "Two", "Three"])
    tasks = data.load(edival(tmp_path, rows), "all", 3, RESOLUTION, images=str(tmp_path / "pictures"))
    assert [task.instructions for task in tasks] == [texts, ["One", "Two", "Three"]]
    assert tasks[0].kinds == ["color_alter"] * 3 and tasks[0].meta["unchanged_objects"] == ["a", "b"]
    assert tasks[0].meta["bg_consistency"] is False
    assert np.asarray(tasks[0].image)[9, 9].tolist() == [255, 0, 0] and np.asarray(tasks[1].image)[9, 9, 2] > 250


BAD_ROWS = {
    "code in a list": ((3, 1, "['x']", "[__import__('os').getcwd()]"), "line 2 cannot be read"),
    "a cut list": ((3, 1, "['x']", "['a', 'b"), "line 2 cannot be read"),
    "turns not a number": ((3, "one", "['x']", "['a']"), "line 2 cannot be read"),
    "text": ((3, 1, "['x']", "Make it blue"), 'line 2 lacks "instructions"'),
    "too few": ((3, 1, "['x']", "['a']"), "line 2 has 1 instructions, fewer than the 2 turns"),
    "types too few": ((3, 2, "['x']", "['a', 'b']"), 'line 2: "task_type" must be a list of 2'),
    "no picture": ((4, 2, "['x', 'y']", "['a', 'b']"), "line 2: .*no 4_input_raw"),
}


@pytest.mark.parametrize("bad", BAD_ROWS)
def test_a_bad_row_is_named(tmp_path, bad):
    """A cell that is run as code, a traceback of ast, a row that is left out in silence."""
    line, message = BAD_ROWS[bad]
    with pytest.raises(ValueError, match=message) as error:
        data.load(edival(tmp_path, [line]), "all", 2, RESOLUTION, images=str(tmp_path / "pictures"))
    assert "\n" not in str(error.value)


def test_a_csv_without_its_pictures_or_of_another_form_is_refused(tmp_path):
    """An empty path that means the working directory; a CSV of something else read as no tasks."""
    path = edival(tmp_path, prefixes(3, ["a"]))
    for images in ("", str(tmp_path / "nowhere")):
        with pytest.raises(ValueError, match="needs --images"):
            data.load(path, "all", 1, RESOLUTION, images=images)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no column image_index, instructions, task_type, turns"):
        data.load(path, "all", 1, RESOLUTION, images=str(tmp_path))


@pytest.mark.skipif(not EDIVAL.exists(), reason="EdiVal's CSV is not here")
def test_edivals_own_csv_is_read_whole_and_known_again(tmp_path):
    """Sessions lost to commas, quotes or line ends in instructions; training on the benchmark without a warning."""
    for index in range(606):
        (tmp_path / f"{index}_input_raw.jpg").touch()                 # never opened: the paths are enough
    tasks = data.read_edival(EDIVAL, 3, str(tmp_path))
    assert len(tasks) == 572 and all(len(task.instructions) == len(task.kinds) == 3 for task in tasks)
    assert sum(text.startswith('"') for task in tasks for text in task.instructions) > 100
    assert sum(kind == "subject_add" for task in tasks for kind in task.kinds) == 237
    assert data.is_benchmark(str(EDIVAL)) and not data.is_benchmark(str(edival(tmp_path, [])))


# ------------------------------------------------------------------------------------------------------------- pictures

def test_transparent_pixels_are_white(tmp_path):
    """Whatever colour an editor of pictures left under transparent pixels, often black, shown to the judge."""
    layers = Image.new("RGBA", (48, 32), (255, 0, 0, 255))
    layers.paste((0, 0, 0, 0), (24, 0, 48, 32))
    for name, picture in (("rgba", layers), ("p", layers.quantize()), ("la", layers.convert("LA"))):
        picture.save(tmp_path / f"{name}.png")
        left, right = sides(data.load_picture(tmp_path / f"{name}.png", RESOLUTION, "here"))
        assert right == (255, 255, 255) and left != (255, 255, 255), name


def test_16_bit_grey_is_scaled(tmp_path):
    """Scans and depth pictures that PIL cuts off at 255, so that they turn white."""
    grey = np.full((32, 48), 12850, np.uint16)
    grey[:, 24:] = 51400
    Image.fromarray(grey).save(tmp_path / "p.png")
    assert sides(data.load_picture(tmp_path / "p.png", RESOLUTION, "here")) == ((50,) * 3, (200,) * 3)
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "p.tiff")
    with pytest.raises(ValueError, match="here: .*floating-point"):
        data.load_picture(tmp_path / "p.tiff", RESOLUTION, "here")


def test_photographs(tmp_path):
    """Real files: progressive or greyscale JPEG, PNG with a palette; sizes that no test thought of."""
    specs = [(find_spec("skimage"), "data"), (find_spec("sklearn"), "datasets/images")]
    if None in (spec for spec, _ in specs):
        pytest.skip("scikit-image or scikit-learn, which ship photographs, are not installed")
    folders = [Path(spec.origin).parent / name for spec, name in specs]
    files = [file for folder in folders for file in sorted(folder.glob("*")) if file.suffix in (".jpg", ".png")]
    assert len(files) >= 4
    lines = [row(image=str(file)) for file in files]
    tasks = data.load(write(tmp_path, lines), "all", 3, 128)
    for task, file in zip(tasks, files, strict=True):
        with Image.open(file) as original:
            w, h = original.size
        (W, H), pixels = task.image.size, np.asarray(task.image)
        assert task.image.mode == "RGB" and W % 16 == H % 16 == 0 and pixels.std() > 1, file
        assert abs(W * H / 128 ** 2 - 1) < .2, file
        assert abs(W / H / (w / h) - 1) < .2 or max(w / h, h / w) > 4, file


def test_the_embedded_world_comes_as_tasks_with_scenes():
    """A task whose picture is not its first scene, or whose scenes are not those of its turns."""
    from shapes import world
    tasks = data.load("shapes", "test", 3, limit=5)
    assert len(tasks) == 5
    for task, (instructions, kinds, scenes) in zip(tasks, world.dialogues("test", 5, 3)):
        assert (task.instructions, task.kinds, task.meta["scenes"]) == (instructions, kinds, scenes)
        assert np.array_equal(np.asarray(task.image), world.render(scenes[:1])[0])
    assert data.load_shapes("test", 3, 2, start=3)[0].instructions == tasks[3].instructions
