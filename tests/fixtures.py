"""What several test files share: the embedded editor, small tasks, a cheap judge, the scripts run in this process."""
import contextlib
import functools
import io
import runpy
import sys
import tempfile
from pathlib import Path

import torch

import data
import model
from rollout import stack_images

torch.set_num_threads(1)      # on pictures this small a second thread mostly waits, for long where the machine is busy

ROOT = Path(__file__).resolve().parent.parent
_folders = []           # temporary folders, removed at exit


@functools.lru_cache
def editor_folder():
    """shapes/editor; where it is missing, an editor of its architecture with random weights, built once a session."""
    if (ROOT / "shapes" / "editor" / "model_index.json").is_file():
        return str(ROOT / "shapes" / "editor")
    from diffusers import AutoencoderKL
    from shapes import pretrain
    torch.manual_seed(0)
    vae = AutoencoderKL(**pretrain.VAE, scaling_factor=1., shift_factor=0.)
    _folders.append(tempfile.TemporaryDirectory())
    pretrain.build_pipeline(vae).save_pretrained(_folders[-1].name)
    return _folders[-1].name


def load_pipe(folder=None):
    """The same folder, loaded by diffusers itself."""
    from diffusers import FluxKontextPipeline
    pipe = FluxKontextPipeline.from_pretrained(folder or editor_folder()).to(torch.float32)      # stored as float16
    pipe.set_progress_bar_config(disable=True)
    return pipe


def new_editor(rank=None, alpha=None, moved=None, **load):
    """A fresh editor; with LoRA if rank is given, whose policy is moved off the base by noise of std `moved`."""
    editor = model.load(editor_folder(), **load)
    if rank is not None:
        model.add_lora(editor, rank, alpha)
    if moved:
        move(editor, moved)
    return editor


def move(editor, std, seed=0):
    """Add noise to the policy: what training would do, without the training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in editor.trained.values():
            p.add_(std * torch.randn(p.shape, generator=generator))


def make_tasks(n, K=2, start=0):
    """Tasks of the embedded world."""
    return data.load_shapes("train", K, n, start)


def resized(tasks, size):
    """The same tasks with pictures of another size (H, W)."""
    for task in tasks:
        task.image = task.image.resize(size[::-1])
    return tasks


class Judge:
    """Colours as rewards: cheap, never constant within a group, sensitive to every pixel.

    `edit(r, tasks, k)` may spoil them. Refuses tasks that do not belong to the pictures they come with.
    """
    names, weights, words = ["following", "consistency"], [.5, .5], ""

    def __init__(self, edit=None):
        self.edit, self.calls = edit, []

    def check(self, tasks):
        pass

    def __call__(self, tasks, images, k):
        self.calls.append((len(tasks), k))
        if images.shape[1] != k + 2 or not torch.equal(images[:, 0], stack_images(tasks)):
            raise ValueError(f"turn {k + 1}: the judge was given pictures of other tasks, or of another turn")
        x = images.float() / 255
        drift = (x[:, k + 1] - x[:, 0]).abs().mean((1, 2, 3))
        r = torch.stack([x[:, k + 1, 0].mean((1, 2)), 1 - drift], 1)
        return self.edit(r, tasks, k) if self.edit else r


def run_script(name, *argv):
    """`python NAME ARGV...` in this process, without the seconds of its imports -> (exit code, stdout, stderr)."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv, code = [name, *map(str, argv)], 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(ROOT / name), run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = before
    return code, out.getvalue(), err.getvalue()


def refused(name, *argv):
    """Run a script that must refuse: exit code 2 and one clear line on stderr, which is returned."""
    code, out, err = run_script(name, *argv)
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.strip() and "Loading" not in line]
    assert code == 2 and len(lines) == 1 and lines[0].startswith(f"{name}: "), (code, out, err)
    return lines[0]
