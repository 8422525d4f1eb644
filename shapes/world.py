"""The embedded world: procedural scenes, edits told in English, and a judge that is exact because it knows the scene.

A picture is 48 x 48 pixels: a plain background and a 3 x 3 grid of 16-pixel cells, each empty or holding one object
(shape, colour, material). One cell is one packed latent token of the embedded editor. An edit carries one of EdiVal's
type names, changes the scene in one place and is told in one of several phrasings. Instructions speak of objects that
earlier ones made, and some leave a choice: "Add a red metal star" does not say where. So what a scene should look like
depends on what the editor chose, and a choice may make a later instruction impossible ("Put a blue ring left of it").

    scene = sample_scene(rng);  instruction, operation, after = sample_edit(scene, rng);  render([scene, after])
    scenes, possible = resolve(starts, operations, pictures)      # what should be there, given where things were put
    success, following, consistency = judge(pictures, previous, scenes)

Everything is a pure function of a `random.Random`. Needs numpy and PIL only.
"""
import random
import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLORS = {"red": (222, 38, 38), "yellow": (246, 208, 30), "green": (30, 150, 62), "blue": (36, 84, 224),
          "purple": (150, 50, 190), "black": (28, 28, 34)}
MATERIALS = ("plastic", "wooden", "metal")
BACKGROUNDS = {"white": (250, 250, 250), "gray": (176, 178, 184), "sky": (164, 212, 246), "mint": (172, 236, 196),
               "pink": (250, 190, 208), "sand": (236, 214, 162)}
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
KINDS = ("subject_add", "subject_remove", "subject_replace", "color_alter", "material_alter", "position_change",
         "background_change")  # EdiVal's names; count_change and text_change have no single right picture here
DIRECTIONS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}      # (rows, columns)
GRID, CELL = 3, 16
SIZE = GRID * CELL


class Object(NamedTuple):
    shape: str
    color: str
    material: str


class Scene(NamedTuple):
    background: str
    cells: tuple  # 9 entries, row by row: an Object or None


# what a cell can hold, 109 things
CONTENTS = (None,) + tuple(Object(s, c, m) for s in SHAPES for c in COLORS for m in MATERIALS)
_CONTENT_ID = {content: i for i, content in enumerate(CONTENTS)}
_BACKGROUND_ID = {name: i for i, name in enumerate(BACKGROUNDS)}

# Combinations that no training or validation dialogue shows or asks for; the test split does. About one in eight.
HELD_OUT = frozenset(o for o in CONTENTS[1:] if zlib.crc32(" ".join(o).encode()) % 8 == 0)


# ---------------------------------------------------------------------------------------------------------- pictures

def _mask(shape):
    """Coverage of one cell by a shape, antialiased by drawing 8 times too large: (16, 16) in [0, 1]."""
    n = CELL * 8
    canvas = Image.new("L", (n, n))
    draw = ImageDraw.Draw(canvas)
    c, r = n / 2, n * .42
    point = lambda angle, radius: (c + radius * np.sin(angle), c - radius * np.cos(angle))
    if shape == "circle":
        draw.ellipse((c - r, c - r, c + r, c + r), fill=255)
    elif shape == "square":
        draw.rectangle((c - r * .9, c - r * .9, c + r * .9, c + r * .9), fill=255)
    elif shape == "triangle":
        draw.polygon([(c, c - r), (c + r, c + r * .85), (c - r, c + r * .85)], fill=255)
    elif shape == "star":
        draw.polygon([point(np.pi * i / 5, r * (1.1 if i % 2 == 0 else .45)) for i in range(10)], fill=255)
    elif shape == "ring":
        draw.ellipse((c - r, c - r, c + r, c + r), fill=255)
        draw.ellipse((c - r * .5, c - r * .5, c + r * .5, c + r * .5), fill=0)
    elif shape == "cross":
        draw.rectangle((c - r, c - r * .34, c + r, c + r * .34), fill=255)
        draw.rectangle((c - r * .34, c - r, c + r * .34, c + r), fill=255)
    return np.asarray(canvas.resize((CELL, CELL), Image.BOX), np.float32) / 255


def _texture(color, material):
    """Colour of every pixel of an object: (16, 16, 3) in 0..255. Wood has grain, metal a diagonal shine."""
    base = np.broadcast_to(np.float32(COLORS[color]), (CELL, CELL, 3))
    row, column = np.mgrid[0:CELL, 0:CELL].astype(np.float32)
    if material == "wooden":
        amount, other = .75 * (row % 4 >= 2), (122, 76, 34)
    elif material == "metal":
        amount, other = .85 * np.exp(-((row + column - 13) / 3.2) ** 2), (255, 255, 255)
    else:
        return base
    return base + amount[..., None].astype(np.float32) * (np.float32(other) - base)


def _sprites():
    """Every cell there can be: (6 backgrounds, 109 contents, 16, 16, 3) float32 in 0..255."""
    masks = {shape: _mask(shape)[..., None] for shape in SHAPES}
    ground = np.float32(list(BACKGROUNDS.values()))[:, None, None, None, :]
    alpha = np.stack([np.zeros((CELL, CELL, 1), np.float32)] + [masks[o.shape] for o in CONTENTS[1:]])
    paint = np.stack([np.zeros((CELL, CELL, 3), np.float32)] + [_texture(o.color, o.material) for o in CONTENTS[1:]])
    return (1 - alpha) * ground + alpha * paint


SPRITES = _sprites()
_SPRITES_U8 = SPRITES.round().astype(np.uint8)


def encode_scenes(scenes):
    """Scenes as integers: background (n,), contents (n, 9)."""
    return (np.array([_BACKGROUND_ID[s.background] for s in scenes]),
            np.array([[_CONTENT_ID[c] for c in s.cells] for s in scenes]))


def render(scenes):
    """Draw scenes: (n, 48, 48, 3) uint8."""
    background, contents = encode_scenes(scenes)
    cells = _SPRITES_U8[background[:, None], contents].reshape(-1, GRID, GRID, CELL, CELL, 3)
    return np.ascontiguousarray(cells.transpose(0, 1, 3, 2, 4, 5).reshape(-1, SIZE, SIZE, 3))


def cut(pictures):
    """Cells of pictures, row by row: (n, 48, 48, 3) -> (n, 9, 16, 16, 3)."""
    cells = pictures.reshape(-1, GRID, CELL, GRID, CELL, 3).transpose(0, 1, 3, 2, 4, 5)
    return cells.reshape(-1, GRID * GRID, CELL, CELL, 3)


# --------------------------------------------------------------------------------------------- scenes and operations

class Operation(NamedTuple):
    """What an instruction asks for; None where it says nothing."""
    kind: str
    key: tuple | None = None           # (shape, color) of the object that it speaks of
    new: Object | None = None          # what is in the cell afterwards
    place: int | None = None           # the cell, where it is told
    direction: str | None = None       # of DIRECTIONS: the cell beside the object `key`
    background: str | None = None

    @property
    def open(self):
        """Does it leave the place to the editor?"""
        return self.kind == "subject_add" and self.place is None and self.direction is None


def find(scene, key):
    """The cell of the object of this (shape, color), None if there is none."""
    for i, content in enumerate(scene.cells):
        if content and (content.shape, content.color) == key:
            return i
    return None


def beside(place, direction):
    """The cell next to another one, None outside the grid."""
    row, column = divmod(place, GRID)
    down, right = DIRECTIONS[direction]
    row, column = row + down, column + right
    inside = 0 <= row < GRID and 0 <= column < GRID
    return row * GRID + column if inside else None


def apply(scene, operation, chosen=None):
    """The scene after an operation, None where it is impossible. chosen: the cell of an open addition."""
    kind, key, new, place, direction, background = operation
    if background:
        return scene._replace(background=background)
    here = find(scene, key) if key else None
    if key and here is None:
        return None
    cells = list(scene.cells)

    # where the new content goes: an addition and a move need a free cell
    if kind in ("subject_add", "position_change"):
        to = beside(here, direction) if direction else chosen if operation.open else place
        if to is None or cells[to]:
            return None
    else:
        to = here
    if kind == "position_change":
        cells[here] = None
    cells[to] = new
    return scene._replace(cells=tuple(cells))


def sample_scene(rng, allowed=CONTENTS[1:]):
    """A scene of 1 to 4 objects, no two of the same colour and shape, so that "the red star" names one of them."""
    objects = {}
    for content in rng.sample(allowed, 12):
        objects.setdefault((content.shape, content.color), content)
    objects = list(objects.values())[:rng.randint(1, 4)]
    places = rng.sample(range(GRID * GRID), len(objects))
    cells = [None] * (GRID * GRID)
    for place, content in zip(places, objects):
        cells[place] = content
    return Scene(rng.choice(list(BACKGROUNDS)), tuple(cells))


def sample_edit(scene, rng, kind=None, allowed=CONTENTS[1:], way=None, key=None):
    """One edit of `kind` (a random one if None) that is possible in `scene`: (instruction, operation, scene after it).

    way: how an addition tells its place: "told", "open" (any free cell, all equally likely, in the scene after it) or
    "beside" an object, that of `key` if given; random if None. Returns None where the kind is impossible (nothing left
    to remove, no room to add).
    """
    kind = kind or rng.choice(KINDS)
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is none of {', '.join(KINDS)}")
    if kind == "background_change":
        new = rng.choice([b for b in BACKGROUNDS if b != scene.background])
        text = rng.choice(["Change the background to {}", "Make the background {}", "Set the scene on a {} background"])
        return _edit(scene, text.format(new), Operation(kind, background=new))
    if kind == "subject_add":
        return _sample_addition(scene, rng, allowed, way or rng.choice(["told", "open", "beside"]), key)

    # an object that is there
    full = [i for i, c in enumerate(scene.cells) if c]
    free = [i for i, c in enumerate(scene.cells) if not c]
    if not full or (kind == "subject_remove" and len(full) < 2) or (kind == "position_change" and not free):
        return None
    old = scene.cells[rng.choice(full)]
    words, key = [f"{old.color} {old.shape}"], (old.shape, old.color)       # words fill the gaps of the text
    if kind == "subject_remove":
        text = rng.choice(["Remove the {}", "Delete the {}", "Take away the {}", "Erase the {}"])
        operation = Operation(kind, key)
    elif kind == "position_change":
        to = rng.choice(free)
        text = rng.choice(["Move the {} to the {}", "Shift the {} to the {}", "Bring the {} to the {}"])
        words.append(PLACES[to])
        operation = Operation(kind, key, old, to)
    else:
        new = _other_object(scene, rng, kind, old, allowed)
        if new is None:
            return None
        text, word = _change_in_words(rng, kind, new)
        words.append(word)
        operation = Operation(kind, key, new)
    return _edit(scene, text.format(*words), operation)


def _edit(scene, text, operation, chosen=None):
    return text, operation, apply(scene, operation, chosen)


def _sample_addition(scene, rng, allowed, way, key):
    """An addition whose place is told, left open, or beside an object; None where there is no room."""
    full = [i for i, c in enumerate(scene.cells) if c]
    free = [i for i, c in enumerate(scene.cells) if not c]
    if len(free) < 2:
        return None
    taken = {(c.shape, c.color) for c in scene.cells if c}
    new = rng.choice([o for o in allowed if (o.shape, o.color) not in taken])
    kind, name = "subject_add", _name(new)
    if way == "open":
        text = rng.choice(["Add a {}", "Put a {} somewhere", "Place a {} anywhere"])
        return _edit(scene, text.format(name), Operation(kind, new=new), rng.choice(free))
    if way == "told":
        place = rng.choice(free)
        text = rng.choice(["Add a {} at the {}", "Put a {} at the {}", "Place a {} in the {} cell"])
        return _edit(scene, text.format(name, PLACES[place]), Operation(kind, new=new, place=place))

    # beside an object that has a free cell next to it
    anchors = full if key is None else [find(scene, key)]
    spots = [(i, direction) for i in anchors for direction in DIRECTIONS if beside(i, direction) in free]
    if not spots:
        return None
    i, direction = rng.choice(spots)
    anchor = scene.cells[i]
    text = rng.choice(["Add a {} {} the {}", "Put a {} {} the {}", "Place a {} {} the {}"])
    operation = Operation(kind, (anchor.shape, anchor.color), new, direction=direction)
    return _edit(scene, text.format(name, direction, f"{anchor.color} {anchor.shape}"), operation)


def _other_object(scene, rng, kind, old, allowed):
    """What an object becomes: another shape, or the same one in another colour or material; None if nothing is left."""
    taken = {(c.shape, c.color) for c in scene.cells if c}
    if kind == "subject_replace":
        choices = [o for o in allowed if (o.shape, o.color) not in taken and o.shape != old.shape]
    elif kind == "color_alter":
        choices = [o for o in allowed if (o.shape, o.material) == (old.shape, old.material)
                   and (o.shape, o.color) not in taken]
    else:
        choices = [o for o in allowed if (o.shape, o.color) == (old.shape, old.color) and o.material != old.material]
    return rng.choice(choices) if choices else None


def _change_in_words(rng, kind, new):
    """A phrasing with a gap for the object and one for what it becomes, and the word for the latter."""
    if kind == "subject_replace":
        return rng.choice(["Replace the {} with a {}", "Turn the {} into a {}", "Swap the {} for a {}"]), _name(new)
    if kind == "color_alter":
        return rng.choice(["Make the {} {}", "Change the color of the {} to {}", "Paint the {} {}"]), new.color
    text = rng.choice(["Change the material of the {} to {}", "Make the {} out of {}", "Turn the {} {}"])
    is_noun = text != "Turn the {} {}"
    return text, "wood" if is_noun and new.material == "wooden" else new.material


def _name(obj):
    return f"{obj.color} {obj.material} {obj.shape}"


# --------------------------------------------------------------------------------------------------------- dialogues

class Dialogue(NamedTuple):
    """K edits in a row. The scenes are one way it may go: open additions stand where a die has put them."""
    instructions: list
    operations: list
    scenes: list              # K + 1: the start, and after each edit

    @property
    def kinds(self):
        return [operation.kind for operation in self.operations]


OPEN, BUILD = .6, .7          # chance that a dialogue without an open addition gets one now; that one is built on


def sample_dialogue(rng, K, allowed=CONTENTS[1:]):
    """A Dialogue of K edits. What is openly added is built upon: later objects go beside it.

    All other kinds are different ones (repeats where K is large, or nothing else is possible). K = 1 is any turn of a
    dialogue of three, on the picture before it.
    """
    if K == 1:
        whole, k = sample_dialogue(rng, 3, allowed), rng.randrange(3)
        return Dialogue(whole.instructions[k:k + 1], whole.operations[k:k + 1], whole.scenes[k:k + 2])
    instructions, operations, scenes = [], [], [sample_scene(rng, allowed)]
    misses = 0
    while len(operations) < K:
        opened = [o.new for o in operations if o.open]
        opened = [(o.shape, o.color) for o in opened if o in scenes[-1].cells]
        if opened and rng.random() < BUILD and misses < 50:
            kind, way, key = "subject_add", "beside", rng.choice(opened)
        elif not opened and rng.random() < OPEN and misses < 50:
            kind, way, key = "subject_add", "open", None
        else:
            # a kind that was not among the last six; any, where the one that is left is impossible in this scene
            recent = [o.kind for o in operations if o.place is not None or o.kind != "subject_add"]
            fresh = [kind for kind in KINDS if kind not in recent[-(len(KINDS) - 1):]]
            kinds = fresh if misses < 50 else KINDS
            kind, way, key = rng.choices(kinds, [2 if kind == "subject_add" else 1 for kind in kinds])[0], "told", None
        edit = sample_edit(scenes[-1], rng, kind, allowed, way, key)
        if edit is None:
            misses += 1
            continue
        misses = 0
        instruction, operation, scene = edit
        instructions.append(instruction)
        operations.append(operation)
        scenes.append(scene)
    return Dialogue(instructions, operations, scenes)


def dialogues(split, n, K, start=0):
    """Dialogues start..start+n of a split: 'train' and 'val' without the held-out combinations, 'test' with them.

    The splits are disjoint streams of random numbers; dialogue i of a split is always the same one.
    """
    if split not in ("train", "val", "test"):
        raise ValueError(f"split {split!r} is none of train, val, test")
    allowed = CONTENTS[1:] if split == "test" else tuple(o for o in CONTENTS[1:] if o not in HELD_OUT)
    return [sample_dialogue(random.Random(f"{split} {i}"), K, allowed) for i in range(start, start + n)]


# ------------------------------------------------------------------------------------------------------ exact judge

NOISE = .002      # temperature of a reading: mean squared error per pixel (values in [0, 1]) that one nat costs
SMEARED = .012    # a cell further than this from everything it could be is unreadable


class Reading(NamedTuple):
    """What pictures show, cell by cell."""
    background: np.ndarray           # (n,) which one, -1 = unreadable
    contents: np.ndarray             # (n, 9) what is in the cells, -1 = unreadable
    distance: np.ndarray             # (n, 9, 109) mean squared distance of a cell to every content, values in [0, 1]
    background_belief: np.ndarray    # (n, 6) in each background, times how sharp the picture is


def read(pictures):
    """Read pictures (n, 48, 48, 3) uint8 symbolically, by the nearest cell there can be on the nearest background."""
    pictures = np.asarray(pictures)
    if pictures.shape[1:] != (SIZE, SIZE, 3):
        raise ValueError(f"the exact judge reads pictures of {SIZE} x {SIZE} RGB, got {pictures.shape[1:]}")
    # mean squared distance of every cell to every sprite: x^2 - 2 x y + y^2
    x = cut(pictures).reshape(-1, CELL * CELL * 3).astype(np.float32) / 255
    y = SPRITES.reshape(-1, CELL * CELL * 3) / 255
    # in float64: a CPU may round a row of x @ y.T by what else is in x, and cells that are alike must stay so
    product = (x.astype(np.float64) @ y.T.astype(np.float64)).astype(np.float32)
    distance = (x ** 2).mean(1)[:, None] - 2 / x.shape[1] * product + (y ** 2).mean(1)
    distance = distance.clip(0).reshape(-1, GRID * GRID, len(BACKGROUNDS), len(CONTENTS))

    # the background on which the cells fit best, and what fits best on it
    misfit = distance.min(3).mean(1)                                         # (n, 6)
    nearest = misfit.argmin(1)
    distance = distance[np.arange(len(distance)), :, nearest]                # (n, 9, 109)
    error = distance.min(2)
    contents = np.where(error < SMEARED, distance.argmin(2), -1)

    # is it sharp? Of most cells: one spoilt object spoils no background
    blur = np.median(error, 1, keepdims=True)
    background = np.where(blur[:, 0] < SMEARED, nearest, -1)
    return Reading(background, contents, distance, _posterior(misfit) * np.exp(-blur / (2 * SMEARED)))


def _posterior(distance):
    """Belief in each of the last axis's possibilities, from the distances to them."""
    weight = np.exp(-(distance - distance.min(-1, keepdims=True)) / NOISE)
    return weight / weight.sum(-1, keepdims=True)


def _agreements():
    """Do contents i and j agree in shape, colour, material? (3, 109, 109) of 0 and 1; nothing agrees with nothing."""
    table = np.zeros((3, len(CONTENTS), len(CONTENTS)), np.float32)
    for i, a in enumerate(CONTENTS):
        for j, b in enumerate(CONTENTS):
            for feature in range(3):
                if a is None or b is None:
                    table[feature, i, j] = a == b
                else:
                    table[feature, i, j] = a[feature] == b[feature]
    return table


_ATTRIBUTES = _agreements()


def resolve(starts, operations, pictures):
    """What pictures should show after each turn, given where the editor has put what it was free to put.

    starts: n scenes; operations: n lists, of K or more; pictures (n, K + 1, 48, 48, 3) uint8, the source first.
    An open addition belongs in the free cell that looks most like it; an impossible operation changes nothing.
    Returns n lists of K + 1 scenes, and which operations were possible (n, K).
    """
    n, K = len(starts), pictures.shape[1] - 1
    scenes, possible = [[start] for start in starts], np.ones((n, K), bool)
    for k in range(K):
        opened = [i for i in range(n) if operations[i][k].open]
        likeness = {}
        if opened:
            wanted = np.array([_CONTENT_ID[operations[i][k].new] for i in opened])
            likeness = dict(zip(opened, _likeness(read(pictures[opened, k + 1]), wanted)))
        for i in range(n):
            before, chosen = scenes[i][-1], None
            free = [cell for cell in range(GRID * GRID) if not before.cells[cell]]
            if i in likeness and free:
                chosen = max(free, key=lambda cell: likeness[i][cell])
            after = apply(before, operations[i][k], chosen)
            possible[i, k] = after is not None
            scenes[i].append(after or before)
    return scenes, possible


def _likeness(seen, wanted):
    """How much cells look like a content: wanted (n,) -> (n, 9) in [0, 1], attributes that agree, times how sharp."""
    target = np.repeat(wanted[:, None], GRID * GRID, 1)
    error = np.take_along_axis(seen.distance, target[..., None], 2)[..., 0]
    return _agreement(seen, target).mean(0) * np.exp(-error / (2 * SMEARED))


def judge(pictures, previous, scenes):
    """Judge one edit each: pictures and the pictures before the edit (n, 48, 48, 3) uint8, and n lists of the expected
    scenes, the original first, the last two before and after this edit: equal where it is impossible, and it fails.

    Returns three arrays (n,): `success` in {0, 1}: what the instruction changes reads as asked; `following` in [0, 1],
    graded: the mean belief in each attribute that should change, times that in those that should not, times how sharp
    it is; `consistency` in [0, 1]: all that the instruction does not speak of, half of it symbolic agreement (beliefs
    in cells and background), half pixel distance. What no instruction has touched is compared with the original scene,
    what an earlier one did with the picture before: so a picture that is only copied is consistent, and so is one that
    keeps an earlier failure, while slow drift counts in full.
    """
    seen, seen_before = read(pictures), read(previous)
    original, old, new = (encode_scenes([s[k] for s in scenes]) for k in (0, -2, -1))    # (background, contents)
    ground_asked, asked = old[0] != new[0], old[1] != new[1]                             # (n,), (n, 9)
    count = asked.sum(1) + ground_asked                                                  # 0: impossible
    right = np.where(asked, seen.contents == new[1], True).all(1) & (~ground_asked | (seen.background == new[0]))
    success = right & (count > 0)
    done, ground_done = _done(seen, old, new)
    following = ((done * asked).sum(1) + ground_done * ground_asked) / count.clip(1)

    # what should be there: the original where no edit has been, else what the picture before shows (-1: nobody knows)
    target = np.where(old[1] == original[1], original[1], seen_before.contents)
    ground_target = np.where(old[0] == original[0], original[0], seen_before.background)
    kept, ground_kept = ~asked & (target >= 0), ~ground_asked & (ground_target >= 0)
    consistency = _same(pictures, seen, target, kept, ground_target, ground_kept)
    return success.astype(np.float32), following.astype(np.float32), consistency.astype(np.float32)


def _agreement(seen, target):
    """Belief that a cell agrees with its target (n, 9) in shape, colour, material: (3, n, 9)."""
    return np.einsum("fnkc,nkc->fnk", _ATTRIBUTES[:, target], _posterior(seen.distance))


def _done(seen, old, new):
    """How far cells (n, 9) and backgrounds (n,) are what an edit from `old` to `new` asks for, in [0, 1]."""
    right = _agreement(seen, new[1])
    changes = ~_ATTRIBUTES.astype(bool)[:, new[1], old[1]]                               # (3, n, 9)
    of_changed = (right * changes).sum(0) / changes.sum(0).clip(1)
    of_kept = np.where(changes, 1, right).min(0)
    error = np.take_along_axis(seen.distance, new[1][..., None], 2)[..., 0]
    cells = of_changed * of_kept * np.exp(-error / (2 * SMEARED))
    return cells, np.take_along_axis(seen.background_belief, new[0][:, None], 1)[:, 0]


def _same(pictures, seen, target, kept, ground_target, ground_kept):
    """How far what is `kept` is the same as its target (n,): half symbols, half pixels."""
    # where the background is not to be kept, cells lie on whatever background there is
    ground_target = np.where(ground_kept, ground_target, seen.background_belief.argmax(1))
    ground_same = np.take_along_axis(seen.background_belief, ground_target[:, None], 1)[:, 0] * ground_kept
    same = _agreement(seen, target).mean(0) * (seen.contents == target)
    symbols = ((same * kept).sum(1) + ground_same) / (kept.sum(1) + ground_kept).clip(1)

    should = _SPRITES_U8[ground_target[:, None], target]                                 # (n, 9, 16, 16, 3)
    difference = np.abs(cut(np.asarray(pictures, np.float32)) - should).mean((2, 3, 4))  # (n, 9) in 0..255
    pixels = 1 - ((difference * kept).sum(1) / kept.sum(1).clip(1) / 64).clip(0, 1)
    return .5 * symbols + .5 * pixels
