"""Tasks from a JSONL file: right pictures, right splits, and one clear sentence for every bad line."""
import json

import numpy as np
import pytest
from PIL import Image

import data

SIZE = (16, 24)     # (H, W)


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
    first, second = data.load(path, "train", 3, SIZE)
    assert first.instructions == ["Add a hat", "Remove the dog", "Make it blue"] and first.kinds == ["", "", ""]
    assert second.instructions[3] == "Four" and second.kinds == ["color_alter"] * 4 and second.meta["line"] == 3
    assert first.image.mode == "RGB" and first.image.size == (24, 16)
    assert sides(first.image) == ((255, 0, 0), (0, 0, 255))


def test_lines_end_at_line_feeds_only(tmp_path):
    """str.splitlines cuts at U+2028 and U+0085, which JSON allows in a string; Windows adds a BOM and \\r."""
    texts = ["a\u2028b", "c\x85d", "e\u2029f"]
    path = write(tmp_path, [b"\xef\xbb\xbf" + encode(row(instructions=texts)) + b"\r", row()])
    tasks = data.load(path, "train", 3, SIZE)
    assert [task.instructions for task in tasks] == [texts, row()["instructions"]]


@pytest.mark.parametrize("size", [(240, 32), (48, 320), (12, 8), (24, 16)])
def test_pictures_are_scaled_to_cover_and_cropped_at_the_centre(tmp_path, size):
    """Pictures that are squeezed, padded, cropped at a corner, or come with height and width swapped."""
    picture = Image.new("RGB", size, "white")
    w, h = min(size[0], size[1] * 1.5), min(size[1], size[0] / 1.5)      # of the part that should be seen: all green,
    for colour, part in (("green", 2), ("black", 8)):                    # with a black box in the middle
        picture.paste(colour, [round(s / 2 + sign * v / part) for sign in (-1, 1) for s, v in zip(size, (w, h))])
    picture.save(tmp_path / "p.png")
    pixels = np.asarray(data.load_picture(tmp_path / "p.png", SIZE, "here")).astype(int)
    assert pixels.shape == (16, 24, 3)
    assert np.abs(pixels[[2, 2, -3, -3], [2, -3, 2, -3]] - (0, 128, 0)).max() < 30 and pixels[7:9, 11:13].max() < 40
    assert pixels[..., 0].max() < 60                                     # no white: nothing outside the centre is seen


def test_photographs_stand_upright(tmp_path):
    """A telephone's photo lies on its side: its rotation is in the EXIF data only."""
    exif = Image.Exif()
    exif[0x0112] = 6                                             # shown after turning 90 degrees clockwise
    halves((48, 32), "red", "blue").rotate(90, expand=True).save(tmp_path / "p.jpg", exif=exif, quality=95)
    left, right = sides(data.load_picture(tmp_path / "p.jpg", SIZE, "here"))
    assert left[0] > 200 > 60 > left[2] and right[2] > 200 > 60 > right[0]


@pytest.mark.parametrize("mode, left, right, expected", [
    ("RGBA", (255, 0, 0, 255), (0, 0, 255, 255), ((255, 0, 0), (0, 0, 255))), ("L", 40, 200, ((40,) * 3, (200,) * 3)),
    ("1", 0, 1, ((0,) * 3, (255,) * 3)), ("LA", (40, 255), (200, 255), ((40,) * 3, (200,) * 3))])
def test_every_mode_becomes_rgb(tmp_path, mode, left, right, expected):
    """One greyscale or transparent picture among the tasks stops the run when a batch is stacked."""
    halves((48, 32), left, right, mode).save(tmp_path / "p.png")
    picture = data.load_picture(tmp_path / "p.png", SIZE, "here")
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
        data.load(write(tmp_path, [row(), b"", line, row()]), "train", 3, SIZE)
    assert "tasks.jsonl line 3" in str(error.value) and message in str(error.value) and "\n" not in str(error.value)


def test_a_file_without_tasks_is_refused(tmp_path):
    """Training on nothing, or a bare FileNotFoundError."""
    with pytest.raises(ValueError, match="empty.jsonl holds no tasks"):
        data.load(write(tmp_path, [b"", b"  "], "empty.jsonl"), "train", 3, SIZE)
    with pytest.raises(ValueError, match="nowhere.jsonl: no such file"):
        data.load(tmp_path / "nowhere.jsonl", "train", 3, SIZE)


@pytest.mark.parametrize("n, n_val", [(10, 2), (100, 16)])
def test_validation_tasks_are_the_last_ones_and_none_of_them_is_trained_on(tmp_path, n, n_val):
    """A table before/after on tasks that the run has seen; --val-tasks that takes the first, or more than there are."""
    path = write(tmp_path, [row(instructions=[f"{i}", "b", "c"]) for i in range(n)])
    train, val, few = ([int(task.instructions[0]) for task in data.load(path, split, 3, SIZE, limit)]
                       for split, limit in (("train", 4096), ("val", 4096), ("val", 1)))
    assert train == list(range(n - n_val)) and val == list(range(n - n_val, n)) and few == val[:1]


def test_the_embedded_world_comes_as_tasks_with_scenes():
    """A task whose picture is not its first scene, or whose scenes are not those of its turns."""
    from shapes import world
    tasks = data.load("shapes", "test", 3, limit=5)
    assert len(tasks) == 5
    for task, (instructions, kinds, scenes) in zip(tasks, world.dialogues("test", 5, 3)):
        assert (task.instructions, task.kinds, task.meta["scenes"]) == (instructions, kinds, scenes)
        assert np.array_equal(np.asarray(task.image), world.render(scenes[:1])[0])
    assert data.load_shapes("test", 3, 2, start=3)[0].instructions == tasks[3].instructions
