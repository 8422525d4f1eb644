"""What several test files share: the embedded editor, small tasks, a cheap judge, the scripts run in this process."""
import contextlib
import functools
import io
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import data
import model
import reward
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
    from shapes import make_editor
    torch.manual_seed(0)
    vae = AutoencoderKL(**make_editor.VAE, scaling_factor=1., shift_factor=0.)
    _folders.append(tempfile.TemporaryDirectory())
    make_editor.build_pipeline(vae).save_pretrained(_folders[-1].name)
    return _folders[-1].name


def load_pipe(folder=None):
    """The same folder, loaded by diffusers itself."""
    from diffusers import FluxKontextPipeline
    pipe = FluxKontextPipeline.from_pretrained(folder or editor_folder()).to(torch.float32)      # stored as float16
    pipe.set_progress_bar_config(disable=True)
    return pipe


# --------------------------------------------------------------------------- the other families, tiny, random weights

@functools.lru_cache
def tiny_tokenizer():
    """Qwen's tokenizer class: every byte a token, Qwen's special tokens, a chat template of Qwen3's shape."""
    from tokenizers import pre_tokenizers
    from transformers import Qwen2Tokenizer
    special = ["endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad"]
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], additional_special_tokens=[f"<|{name}|>" for name in special])
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if not enable_thinking %}<think></think>{% endif %}{% endif %}")
    return tokenizer


def randomize(module, seed=0):
    """Give every parameter of a module noise, so that nothing is 0 or 1 by initialisation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(.1 * torch.randn(p.shape, generator=generator))
    return module.eval()


def kontext_pipe(**transformer):
    """The embedded editor; with a random transformer of another configuration if one is given."""
    from diffusers import FluxTransformer2DModel
    pipe = load_pipe()
    if transformer:
        torch.manual_seed(1)
        pipe.transformer = FluxTransformer2DModel.from_config({**pipe.transformer.config, **transformer}).eval()
    return pipe


def klein_pipe(is_distilled=False, **transformer):
    from diffusers import (AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline,
                           Flux2Transformer2DModel)
    from transformers import Qwen3Config, Qwen3ForCausalLM
    torch.manual_seed(0)
    # the pipeline reads layers 9, 18 and 27
    text_encoder = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tiny_tokenizer()), hidden_size=16, intermediate_size=16, num_hidden_layers=28,
        head_dim=8, num_attention_heads=2, num_key_value_heads=1, bos_token_id=None, eos_token_id=None)).eval()
    vae = AutoencoderKLFlux2(block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4)
    vae.bn.running_mean.normal_(), vae.bn.running_var.uniform_(.5, 2)
    transformer = Flux2Transformer2DModel(**dict(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=48, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False) | transformer)
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3., use_dynamic_shifting=True, base_shift=.5, max_shift=1.15, base_image_seq_len=256,
        max_image_seq_len=4096)
    return quiet(Flux2KleinPipeline(scheduler, randomize(vae), text_encoder, tiny_tokenizer(), randomize(transformer),
                                    is_distilled=is_distilled))


def qwen_pipe(plus=False, **transformer):
    from diffusers import (AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageEditPipeline,
                           QwenImageEditPlusPipeline, QwenImageTransformer2DModel)
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    class Processor(Qwen2VLProcessor):
        """Without its part for videos, which needs torchvision."""
        def __init__(self, image_processor, tokenizer):
            super().__init__(image_processor, tokenizer)

        def check_argument_for_proper_class(self, name, argument):
            return type(argument)

        @classmethod
        def get_attributes(cls):
            return ["image_processor", "tokenizer"]

    torch.manual_seed(0)
    tokenizer, ids = tiny_tokenizer(), tiny_tokenizer().convert_tokens_to_ids
    text_encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, bos_token_id=None, eos_token_id=None,
            rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2]}),
        vision_config=dict(depth=2, hidden_size=16, intermediate_size=32, num_heads=2, out_hidden_size=16,
                           fullatt_block_indexes=[1], window_size=56),
        image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>"))).eval()
    vae = AutoencoderKLQwenImage(base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
                                 latents_mean=[.5, -1., .1, .3], latents_std=[2., .5, 1.5, 1.])
    transformer = QwenImageTransformer2DModel(**dict(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(4, 6, 6)) | transformer)
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=.5, max_shift=.9, base_image_seq_len=256, max_image_seq_len=8192,
        shift_terminal=.02)
    return quiet((QwenImageEditPlusPipeline if plus else QwenImageEditPipeline)(
        scheduler, randomize(vae), randomize(text_encoder), tokenizer, Processor(Qwen2VLImageProcessorPil(), tokenizer),
        randomize(transformer)))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


PIPES = {"kontext": kontext_pipe, "klein": klein_pipe, "qwen": qwen_pipe,
         "plus": functools.partial(qwen_pipe, plus=True)}


def tiny_editor(family, pipe=None, rank=None, moved=None, device="cpu", **options):
    """An editor of a family of PIPES around a tiny pipeline; with LoRA and moved like new_editor's."""
    pipe = pipe or PIPES[family]()
    if family == "klein":
        options = dict(max_text=48) | options                # of 512: a tenth of the time
    editor = model.FAMILIES[type(pipe).__name__](pipe, device, **options)
    if rank is not None:
        model.add_lora(editor, rank)
    if moved:
        move(editor, moved)
    return editor


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
            p.add_(std * torch.randn(p.shape, generator=generator).to(p.device))


def make_tasks(n, K=2, start=0):
    """Tasks of the embedded world."""
    return data.load_shapes("train", K, n, start)


def resized(tasks, size):
    """The same tasks with pictures of another size (H, W)."""
    for task in tasks:
        task.image, task.size = task.image.resize(size[::-1]), size
    return tasks


class Judge(reward.Judge):
    """Colours as rewards: cheap, never constant within a group, sensitive to every pixel.

    `edit(r, tasks, k)` may spoil them. Refuses tasks that do not belong to the pictures they come with.
    """
    names, weights, fingerprint = ["following", "consistency"], [.5, .5], "colours"

    def __init__(self, edit=None):
        self.edit, self.calls = edit, []

    def rewards(self, tasks, images, k):
        self.calls.append((len(tasks), k))
        if images.shape[1] != k + 2 or not torch.equal(images[:, 0], stack_images(tasks)):
            raise ValueError(f"turn {k + 1}: the judge was given pictures of other tasks, or of another turn")
        x = images.float() / 255
        drift = (x[:, k + 1] - x[:, 0]).abs().mean((1, 2, 3))
        r = torch.stack([x[:, k + 1, 0].mean((1, 2)), 1 - drift], 1)
        return self.edit(r, tasks, k) if self.edit else r


def child_environment():
    """Of a process that a test starts: one thread, no network, and no GPU, which its children could not share."""
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
                         "CUDA_VISIBLE_DEVICES": ""}


def free_port():
    """A port on which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def record_disk(monkeypatch):
    """A list that os.fsync and os.replace fill: ("fsync", path) and ("replace", from, to), in order."""
    calls, fsync, replace = [], os.fsync, os.replace

    def noted_fsync(handle):
        calls.append(("fsync", os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def noted_replace(source, target):
        calls.append(("replace", str(source), str(target)))
        replace(source, target)
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("what a file handle belongs to is read in /proc, which is not here")
    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    return calls


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
    assert code == 2 and len(lines) == 1 and lines[0].startswith(f"{Path(name).name}: "), (code, out, err)
    return lines[0]


@contextlib.contextmanager
def held_by_another(folder):
    """A folder that another process keeps to itself."""
    child = "import sys; sys.path.insert(0, sys.argv[1])\nfrom contextlib import ExitStack\nimport data\n" \
            "with ExitStack() as held:\n    data.claim(sys.argv[2], held); print('has it', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", child, str(ROOT), str(folder)], text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, env=child_environment()) as other:
        assert other.stdout.readline() == "has it\n"
        yield
