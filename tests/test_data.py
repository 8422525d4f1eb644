"""Tasks from files: right pictures, right splits, and one clear sentence for every bad line."""
import json
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

import data
from fixtures import ROOT, child_environment
from rollout import Task

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
    assert second.instructions[3] == "Four" and second.kinds == ["color_alter"] * 4
    assert second.meta["where"].endswith("line 3")
    assert first.size == (32, 48) and first.picture().mode == "RGB" and first.picture().size == (48, 32)
    assert sides(first.picture()) == ((255, 0, 0), (0, 0, 255))


def test_lines_end_at_line_feeds_only(tmp_path):
    """str.splitlines cuts at U+2028 and U+0085, which JSON allows in a string; Windows adds a BOM and \\r."""
    texts = ["a\u2028b", "c\x85d", "e\u2029f"]
    path = write(tmp_path, [b"\xef\xbb\xbf" + encode(row(instructions=texts)) + b"\r", row()])
    tasks = data.load(path, "all", 3, RESOLUTION)
    assert [task.instructions for task in tasks] == [texts, row()["instructions"]]


def brightness_box(pixels):
    """Where a picture is black: (start, end) as shares of its width, and of its height."""
    black = pixels.max(-1) < 40
    shares = []
    for line in (black.any(0), black.any(1)):
        shares.append((line.argmax() / len(line), 1 - line[::-1].argmax() / len(line)))
    return shares


@pytest.mark.parametrize("size", [(512, 512), (4000, 3000), (600, 900), (100, 61), (1920, 1080), (300, 1000)])
def test_pictures_are_scaled_alike_both_ways_and_cropped_at_the_centre(tmp_path, size):
    """Pictures that are squeezed or squared, cropped at one side, with sides that patches do not divide."""
    (w, h), (W, H) = size, data.fit_size(*size, 512)
    assert W % 16 == H % 16 == 0 and abs(W * H / 512 ** 2 - 1) < .05
    kept_w, kept_h = min(1, W / H * h / w), min(1, H / W * w / h)         # the rest is cut
    assert min(kept_w, kept_h) > (.85 if max(w / h, h / w) <= 2 else .5)
    picture = Image.new("RGB", size, "white")
    picture.paste("black", [round(part * side) for part in (.4, .6) for side in size])
    picture.save(tmp_path / "p.png")
    pixels = np.asarray(data.load_picture(tmp_path / "p.png", 512, "here")).astype(int)
    assert pixels.shape == (H, W, 3)
    for kept, found in zip((kept_w, kept_h), brightness_box(pixels)):
        assert found == pytest.approx((.5 - .1 / kept, .5 + .1 / kept), abs=.02)


def test_pictures_of_any_shape_have_few_sizes():
    """A size for every aspect ratio: no two tasks of a step could be stacked, and there is nothing to draw from."""
    sizes = {data.fit_size(width, height, 512) for width in range(300, 1200, 7) for height in range(300, 1200, 11)}
    assert len(sizes) <= 11 and (512, 512) in sizes
    assert sizes == {size[::-1] for size in sizes}
    for W, H in sizes:
        assert data.fit_size(W, H, 512) == (W, H)                         # a picture that was fitted stays as it is
    assert data.fit_size(640, 640, 512) == (512, 512) and data.fit_size(500, 501, 1024) == (1024, 1024)
    assert data.fit_size(123, 457, None) == (123, 457)


def test_a_picture_is_read_when_it_is_used_and_not_kept(tmp_path, monkeypatch):
    """Every picture decoded at the start in every process, one broken file that stops all others, handles left open."""
    Image.effect_noise((48, 32), 50).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:500])
    path = write(tmp_path, [row(), row(), row(), row(), row(image="half.png"), row()])
    loaded, real_load = [], ImageFile.ImageFile.load
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: loaded.append(self.filename) or real_load(self))
    before = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
    tasks = data.load(path, "all", 3, RESOLUTION)
    assert not loaded and [task.size for task in tasks] == [(32, 48)] * 6
    assert sides(tasks[5].picture()) == ((255, 0, 0), (0, 0, 255)) and loaded
    halves((48, 32), "green", "blue").save(tmp_path / "pictures" / "a.png")
    assert sides(tasks[5].picture())[0] == (0, 128, 0)                    # read again: nothing is kept
    with pytest.raises(ValueError, match="line 5: picture .*half.png cannot be read") as error:
        tasks[4].picture()
    assert "\n" not in str(error.value)
    if sys.platform == "linux":
        assert len(os.listdir("/proc/self/fd")) == before


def test_nothing_of_a_file_is_cut(tmp_path):
    """The first 4,096 dialogues of a larger file taken for all of it, without a word."""
    path = write(tmp_path, [row(instructions=[str(i), "b", "c"]) for i in range(4200)])
    assert len(data.load(path, "train")) == 4184 and len(data.load(path, "all")) == 4200
    assert len(data.load(path, "train", limit=5)) == 5


def test_photographs_stand_upright(tmp_path):
    """A telephone's photo lies on its side: its rotation is in the EXIF data only; a size before it was turned."""
    exif = Image.Exif()
    exif[0x0112] = 6                                             # shown after turning 90 degrees clockwise
    lying = halves((48, 32), "red", "blue").rotate(90, expand=True)
    for name in ("p.jpg", "p.png", "p.tiff", "p.webp"):
        lying.save(tmp_path / name, exif=exif, quality=95)
        task = data.load(write(tmp_path, [row(image=name)]), "all", 3, RESOLUTION)[0]
        left, right = sides(task.picture())
        assert task.size == (32, 48) and task.picture().size == (48, 32), name
        assert left[0] > 200 > 60 > left[2] and right[2] > 200 > 60 > right[0], name


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
    "nested too deeply": (b'{"image": ' + b"[" * 100_000, "is not JSON"),
    "half a surrogate pair": (b'{"image": "pictures/a.png", "instructions": ["a \\ud83d", "b", "c"]}', "is not JSON"),
    "missing picture": (row(image="pictures/b.png"), "b.png cannot be read ([Errno 2] No such file"),
    "a path that no file can have": (row(image="a\0b.png"), "cannot be read"),
    "a decompression bomb": (row(image="bomb.png"), "bomb.png cannot be read (Image size (400000000 pixels)"),
    "nearly one": (row(image="large.png"), "large.png cannot be read (Image size (100000000 pixels)"),
    "broken picture": (row(image="broken.png"), "broken.png cannot be read"),
    "half a picture": (row(image="half.png"), "half.png cannot be read"),          # when it is used
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


def chunk(name, content):
    """A chunk of a PNG file."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_line_is_named(tmp_path, bad):
    """A traceback from deep inside PIL or json, or a line number that is off by one or does not count blank lines."""
    line, message = BAD[bad]
    (tmp_path / "broken.png").write_bytes(b"no picture")
    Image.effect_noise((48, 32), 50).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:500])
    for name, side in (("bomb", 20_000), ("large", 10_000)):                       # their header is enough
        header = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        (tmp_path / f"{name}.png").write_bytes(header + chunk(b"IDAT", b""))
    with pytest.raises(ValueError) as error:
        for task in data.load(write(tmp_path, [row(), b"", line, row()]), "train", 3, RESOLUTION):
            task.picture()
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
    read = lambda split, limit=None: [int(t.instructions[0]) for t in data.load(path, split, 3, RESOLUTION, limit)]
    assert read("train") == list(range(n - n_val)) and read("val") == list(range(n - n_val, n))
    assert read("val", 1) == read("val")[:1] and read("test") == read("all") == list(range(n))


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
        (H, W), pixels = task.size, np.asarray(task.picture())
        assert pixels.shape == (H, W, 3) and W % 16 == H % 16 == 0 and pixels.std() > 1, file
        assert abs(W * H / 128 ** 2 - 1) < .2, file
        assert abs(W / H / (w / h) - 1) < .2 or max(w / h, h / w) > 2, file


def test_the_embedded_world_comes_as_tasks_with_scenes():
    """A task whose picture is not its first scene, or whose scenes are not those of its turns."""
    from shapes import world
    tasks = data.load("shapes", "test", 3, limit=5)
    assert len(tasks) == 5
    for task, dialogue in zip(tasks, world.dialogues("test", 5, 3)):
        assert (task.instructions, task.kinds) == (dialogue.instructions, dialogue.kinds)
        assert task.meta == {"scenes": dialogue.scenes, "operations": dialogue.operations}
        assert np.array_equal(np.asarray(task.image), world.render(dialogue.scenes[:1])[0])
    assert data.load_shapes("test", 3, 2, start=3)[0].instructions == tasks[3].instructions
    assert len(data.load("shapes", "train", 1)) == 4096


@pytest.mark.parametrize("earlier, kind, text, dependent", [
    ("Add a dog on the sofa", "subject_add", "Make it brown", True),
    ("Add a dog on the sofa", "", "Give him a hat", True),
    ("Change the background to a beach", "background_change", "Add a crab on the beach", True),
    ("Change the text to SALE", "text_change", "Make the sale sign red", True),
    ("Add glasses to the man", "subject_add", "Remove the glass vase", False),      # glass is what many things are of
    ("添加一顶红帽子", "", "把红帽子变成蓝色", True),
    ("Add a dog on the sofa", "subject_add", "Change the background to this garden", False),
    ("Move the cup to the left", "position_change", "Paint the cup red", False),    # there from the start
    ("Add a red ball", "subject_add", "Remove the red car", False),
    ("Füge einen Hund hinzu", "", "Male den Hund braun", True)])
def test_an_instruction_that_speaks_of_an_earlier_edit_has_no_clean_context(earlier, kind, text, dependent):
    """Catches: "it" asked of a photograph that does not have it; everything dependent, so that nothing is probed."""
    task = Task(Image.new("RGB", (32, 32)), [earlier, text], [kind, ""], {}, (32, 32))
    assert (data.alone(task, 1) is None) == dependent and data.alone(task, 0) is not None


def test_a_turn_alone_is_asked_of_the_scene_that_there_is():
    """A clean context of the plan, although the editor has put things elsewhere; one that the judge takes for another."""
    import torch
    from shapes import world
    draw = lambda scenes: torch.from_numpy(world.render(scenes)).permute(0, 3, 1, 2)
    moved = 0
    for task in data.load("shapes", "test", 3, limit=40):
        planned, possible = data.resolve(task, draw(task.meta["scenes"]))
        assert planned == task.meta["scenes"] and possible == [True] * 3
        # the first object of this dialogue in another place
        start, operation = planned[0], task.meta["operations"][0]
        free = [i for i in range(9) if not start.cells[i] and not planned[1].cells[i]]
        shown = [start, world.apply(start, operation, free[0])]
        scenes, possible = data.resolve(task, draw(shown))
        assert scenes == shown and possible == [True]
        moved += scenes[1] != planned[1]
        for scene in (planned[1], scenes[1]):
            alone = data.alone(task, 1, scene)
            assert np.array_equal(np.asarray(alone.image), world.render([scene])[0])
            assert (alone.instructions, alone.kinds) == (task.instructions[1:2], task.kinds[1:2])
            assert alone.meta == {"scenes": [scene], "operations": task.meta["operations"][1:2]}
        assert data.alone(task, 1).meta["scenes"] == planned[1:2]
    assert moved > 10


# ------------------------------------------------------------------------------------------------------ fingerprints

def test_a_fingerprint_is_of_contents_and_not_of_paths(tmp_path):
    """Old pictures and scores kept after the instructions or a picture of a task file have changed; the same files
    elsewhere taken for others."""
    def read(folder, **changes):
        folder.mkdir(exist_ok=True)
        return data.load(write(folder, [row(**changes)]), "all", 3, RESOLUTION)[0]

    task = read(tmp_path / "a")
    prints = {data.fingerprint(task)}
    assert data.fingerprint(read(tmp_path / "b")) in prints
    other = {"instructions": ["Add a hat", "Remove the dog", "Make it red"]}
    for changes in (other, {"kinds": ["", "", "color_alter"]}):
        prints.add(data.fingerprint(read(tmp_path / "b", **changes)))
    halves((48, 32), "red", "green").save(tmp_path / "a" / "pictures" / "a.png")
    prints.add(data.fingerprint(task))
    assert len(prints) == 4
    in_memory = [Task(Image.new("RGB", size, colour), ["Add a hat"], [""])
                 for size, colour in (((48, 32), "red"), ((48, 32), "blue"), ((32, 48), "red"))]
    assert len({data.fingerprint(task) for task in in_memory}) == 3
    assert all(len(digest) == 16 for digest in prints)


def test_a_task_file_is_known_by_its_bytes_and_its_pictures_sizes(tmp_path, monkeypatch):
    """A resumed run that goes on with other tasks; a moved folder taken for other tasks."""
    found = []
    for folder, colour in (("a", "red"), ("b", "red")):
        (tmp_path / folder).mkdir()
        path = write(tmp_path / folder, [row()])
        found.append(data.file_fingerprint(str(path)))
    assert found[0] == found[1]
    Image.effect_noise((48, 32), 50).save(path.parent / "pictures" / "a.png")
    found.append(data.file_fingerprint(str(path)))
    path.write_bytes(path.read_bytes().replace(b"hat", b"cap"))
    found.append(data.file_fingerprint(str(path)))
    found.append(data.file_fingerprint("shapes"))
    assert len(set(found)) == 4


# ----------------------------------------------------------------------------------------------------------- scripts

@pytest.mark.parametrize("raised, code, line", [
    (ValueError("two\nlines"), 2, "a.py: two lines"),
    (OSError(28, "No space left"), 2, "a.py: [Errno 28] No space left"),
    (ValueError(), 2, "a.py: ValueError"), (KeyboardInterrupt(), 130, "a.py: interrupted by SIGINT")])
def test_a_script_ends_in_one_line(monkeypatch, capsys, raised, code, line):
    """A traceback where a user's mistake, a full disk or Ctrl-C ends a script; exit code 0 or 1 for it."""
    def main():
        raise raised

    monkeypatch.setattr(sys, "argv", ["/somewhere/a.py"])
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as stop:
        data.run_main(main)
    assert (stop.value.code, *capsys.readouterr()) == (code, "", line + "\n")


def test_sigterm_ends_a_script_in_one_line_too(monkeypatch, capsys):
    """Catches: a closing table or an evaluation that a scheduler ends without a word; a handler that stays behind."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "argv", ["/somewhere/a.py"])
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as stop:
        data.run_main(lambda: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(9))
    assert (stop.value.code, *capsys.readouterr()) == (143, "", "a.py: interrupted by SIGTERM\n")
    assert signal.getsignal(signal.SIGTERM) == before


def test_letters_that_a_terminal_does_not_have_do_not_end_a_script(tmp_path):
    """Catches: a run of hours that ends with exit code 2, and without its table, for a kind of edit named in Chinese."""
    script = f"import sys; sys.path[:0] = [{str(ROOT)!r}]; import data; data.run_main(lambda: print('\u989c\u8272 1'))"
    done = subprocess.run([sys.executable, "-c", script], env=child_environment() | {"PYTHONIOENCODING": "ascii"},
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\\u989c\\u8272 1\n", "")


@pytest.mark.parametrize("rank, world, expected", [
    (None, None, (0, 1)), ("0", "1", (0, 1)), ("3", "4", (3, 4)), ("1", None, "RANK=1 and WORLD_SIZE=1"),
    ("4", "4", "RANK=4 and WORLD_SIZE=4"), ("0", "", "WORLD_SIZE= in"), ("a", "2", "RANK=a"), ("0", "0", "WORLD_SIZE=0"),
    ("-1", "2", "RANK=-1")])
def test_an_environment_of_another_launcher_is_refused(monkeypatch, rank, world, expected):
    """Catches: a number of a process that is left from elsewhere: an evaluation whose rank 0, which reports, never is."""
    for name, value in (("RANK", rank), ("WORLD_SIZE", world)):
        monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, raising=False)
    if isinstance(expected, tuple):
        assert data.processes() == expected
    else:
        with pytest.raises(ValueError, match=f"{expected}.*torchrun"):
            data.processes()


def test_a_fault_of_ours_keeps_its_traceback():
    """Every exception taken for a mistake of the user: nobody could find the fault."""
    with pytest.raises(ZeroDivisionError):
        data.run_main(lambda: 1 / 0)


def test_a_wrong_flag_is_one_line(capsys):
    """A page of usage before the one line that matters."""
    parser = data.Parser()
    parser.add_argument("--turns", type=int)
    with pytest.raises(ValueError, match="argument --turns: invalid int value: 'three'"):
        parser.parse_args(["--turns", "three"])
    assert capsys.readouterr() == ("", "")
