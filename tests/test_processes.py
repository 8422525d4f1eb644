"""Several processes: a base that is spread over them, two nodes, and what is left when one of them is killed."""
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

import model
import train
from eval import start_processes
from fixtures import ROOT, child_environment, free_port, new_editor
from test_train import END_TO_END, assert_same_run, assert_same_within_rounding, flags, metrics, run_python

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
START = f"""
import os, signal, sys, time
sys.path[:0] = {[str(ROOT), str(ROOT / "tests")]}
import torch
torch.set_num_threads(1)
import data, model, reward, train
from fixtures import PIPES, Judge, free_port, move, tiny_editor
judge, load, choose, plain, batch = Judge(), data.load, train.choose, train.rollout, []
reward.load = lambda *_, **__: judge
data.load = lambda *args: load(*args[:4], *args[4:] or [64])
"""
TRAIN = "data.run_main(lambda: train.main(train.parse()))\n"


def write_script(folder, text):
    """A script that every process runs: train.py with a cheap judge, and whatever else."""
    file = folder / "script.py"
    file.write_text(START + text)
    return file


# -------------------------------------------------------------------------------------------------- a process that dies

DIES = """
kind, out = sys.argv[1], sys.argv[2]
del sys.argv[1:3]

def rollout(*args, **more):
    batch.append(1)
    if len(batch) == 2 and os.environ["RANK"] == "1":
        open(out, "w").write(str(time.time()))
        if kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("the third picture cannot be read") if kind == "raised" else RuntimeError("out of memory")
    if len(batch) == 2 and kind == "killed":
        time.sleep(600)                            # the other one is busy with a long rollout
    return plain(*args, **more)

train.rollout = rollout
""" + TRAIN


@pytest.mark.parametrize("kind, words", [("raised", r"script\.py: the third picture cannot be read"),
                                         ("crashed", "RuntimeError: out of memory"),
                                         ("killed", r"Signal 9 \(SIGKILL\) received by PID \d+")])
def test_a_process_that_dies_ends_all_in_seconds_and_has_the_last_word(tmp_path, kind, words):
    """Catches: the others' stacks of collectives above or below what happened; a busy one that goes on for half a
    minute, until torchrun kills it; a report that says where tracebacks are documented."""
    script = write_script(tmp_path, DIES)
    done = run_python(*TORCHRUN, script, kind, tmp_path / "died", *flags(tmp_path / "run"))
    assert time.time() - float((tmp_path / "died").read_text()) < 15
    assert done.returncode == 1 and "/gloo/" not in done.stderr and "interrupted" not in done.stderr
    *_, last, rule = done.stderr.splitlines()
    assert re.fullmatch("  traceback : " + words, last) and set(rule) == {"="}, done.stderr[-2000:]
    # torchrun's own, and that of an error which is not the user's
    assert done.stderr.count("Traceback") == 1 + (kind == "crashed")
    if kind == "raised":
        assert "\nscript.py: the third picture cannot be read\n" in done.stderr
    assert len(metrics(tmp_path / "run")) == 1


# ------------------------------------------------------------------------------------ killed at any moment, and resumed

KILLS = int(os.environ.get("KILLS", 4))            # of each algorithm on each number of processes, a quarter
# Processes are forked, so that imports are paid once. When one is killed, the other is ended as torchrun would.
RANDOM = """
import multiprocessing, random
from multiprocessing.connection import wait
fork, kills, draw = multiprocessing.get_context("fork"), int(sys.argv[1]), random.Random(0)
folder, words = sys.argv[2], sys.argv[3:]
from diffusers import FluxKontextPipeline          # imports most of what loading an editor imports

def work(words, rank, world, port):
    place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world, LOCAL_WORLD_SIZE=world, MASTER_PORT=port)
    os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
    data.run_main(lambda: train.main(train.parse(words)))

def killed(name, algo, world, steps=4, patience=600):
    # Start or resume a run, and kill one of its processes when patience ends, unless it ended before: was it killed?
    out = f"{folder}/{algo}-{name}"
    more = ["--out", out, "--steps", str(steps)] + ["--resume"] * os.path.exists(f"{out}/config.json")
    port = free_port()
    line = [*words, "--algo", algo, *more]
    ranks = [fork.Process(target=work, args=(line, rank, world, port)) for rank in range(world)]
    for process in ranks:
        process.start()
    left, end = ranks, time.time() + patience
    while left and time.time() < end:
        wait([process.sentinel for process in left], end - time.time())
        left = [process for process in left if process.is_alive()]
    if left:
        victim = draw.choice(left)
        victim.kill()
        victim.join()
        for process in left:
            if victim.exitcode:                   # it may have ended just before
                process.terminate()
            process.join(20)
            assert not process.is_alive(), "it goes on without the one that was killed"
    codes = [process.exitcode for process in ranks]
    assert -signal.SIGKILL in codes or not any(codes), codes
    return any(codes)

for algo in ("grpo", "nft"):
    for world in (1, 2):
        start = time.time()
        assert not killed(f"straight-{world}", algo, world)
        seconds, runs, written = time.time() - start, 0, []
        while len(written) < kills:
            name, runs = f"killed-{world}-{runs}", runs + 1
            while killed(name, algo, world, patience=600 if len(written) == kills else draw.uniform(0, seconds)):
                file = f"{folder}/{algo}-{name}/metrics.jsonl"
                written.append(len(open(file).readlines()) if os.path.exists(file) else 0)
        print(f"{algo}, {world} process(es): {kills} kills in {runs} runs after step", *sorted(written), flush=True)
    assert not killed("changed", algo, 2, steps=2)
    assert not killed("changed", algo, 1)
"""


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory):
    """A folder with runs of four steps, ALGO-KIND-...: straight, killed and resumed, resumed on other processes."""
    folder = tmp_path_factory.mktemp("disturbed")
    same = dict(micro=2, bf16="false", min_std=1e-3)             # on one process and on two
    words = flags(None, None, steps=None, train_steps="0-1", save_every=2, val_tasks=2, **same)
    kills = -(-KILLS // 4)
    done = run_python(write_script(folder, RANDOM), kills, folder, *words, limit=60 + 150 * kills)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    print(done.stdout)
    return folder


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("algo", ["grpo", "nft"])
def test_kills_at_random_leave_the_bits_of_a_run_that_nobody_disturbed(disturbed, algo, world):
    """Catches: a moment that nobody thought of: half a file, a line too many, a step that is made twice or left out, a
    folder that can be neither resumed nor started again. KILLS=50 pytest -s makes as many kills, counted."""
    straight, runs = disturbed / f"{algo}-straight-{world}", list(disturbed.glob(f"{algo}-killed-{world}-*"))
    assert runs
    for run in runs:
        assert_same_run(straight, run)
        assert (run / "validation.json").read_bytes() == (straight / "validation.json").read_bytes()


@pytest.mark.parametrize("algo", ["grpo", "nft"])
def test_a_run_may_go_on_with_another_number_of_processes(disturbed, algo):
    """Catches: a checkpoint that holds what is of one process, a task order or noise that depends on their number."""
    assert_same_within_rounding(disturbed / f"{algo}-straight-1", disturbed / f"{algo}-changed", algo)


# ------------------------------------------------------------------------------------------------------------ two nodes

SAME = END_TO_END | dict(kl=.1, min_std=0)
# In the second update of two, one of two processes has nothing to train on; in the first it has one turn of two.
UNEVEN = """
def noted(*args):
    batch[:] = choose(*args)
    return batch

def edit(r, tasks, k):
    for s, task in enumerate(tasks):
        if batch and (task is batch[2] or task is batch[0] and k == 1):
            r[s] = .5
    return r

train.choose, judge.edit = noted, edit
""" + TRAIN


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Both algorithms on one process: {algo: folder}."""
    def launch(algo, folder):
        done = run_python(write_script(folder, UNEVEN), *flags(folder / "run", algo, **SAME))
        assert done.returncode == 0, done.stderr[-3000:]
        assert [row["advantage/used"] for row in metrics(folder / "run")] == [5 / 8, 5 / 8]
        return folder / "run"
    return {algo: launch(algo, tmp_path_factory.mktemp(algo)) for algo in ("grpo", "nft")}


def test_more_processes_than_gpus_are_refused_in_one_line(monkeypatch):
    """Catches: CUDA's "invalid device ordinal" and a stack, which name neither the flag nor the number."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="--nproc_per_node is more than the 1 GPU of this machine"):
        start_processes("nccl")


@pytest.mark.parametrize("number", [None, signal.SIGINT, signal.SIGTERM])
def test_a_process_whose_others_never_come_ends(tmp_path, number):
    """Catches: an environment left by another launcher, or a node that is down: days of waiting without a word, which
    neither Ctrl-C nor a scheduler's signal ends."""
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    seconds = 2 if number is None else 600
    script = write_script(tmp_path, "import datetime, eval as evaluation\n"
                          f"evaluation.MEETING = datetime.timedelta(seconds={seconds})\n"
                          "print('here', flush=True)\ndata.run_main(lambda: evaluation.start_processes('gloo'))\n")
    child = subprocess.Popen([sys.executable, script], cwd=ROOT, env=child_environment() | place, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        assert child.stdout.readline() == "here\n"
        if number is not None:
            time.sleep(2)
            child.send_signal(number)
        said = child.communicate(timeout=60)[1]
    finally:
        child.kill()
    if number is None:
        assert child.returncode == 2
        assert re.search(f"not all of 2 processes .WORLD_SIZE. came to 127.0.0.1:{place['MASTER_PORT']} within", said)
        assert "Traceback" not in said
    else:
        assert child.returncode == -number


def test_two_nodes_train_as_one_process(alone, tmp_path):
    """Catches: a rank, a GPU's number or a share of the tasks that is taken from the place within the node."""
    port = free_port()
    script = write_script(tmp_path, UNEVEN)
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d",
             f"--rdzv_endpoint=127.0.0.1:{port}", "--local_addr=127.0.0.1", script, *flags(tmp_path / "run", **SAME)]
    pipes = dict(cwd=ROOT, env=child_environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    nodes = [subprocess.Popen(agent, **pipes) for _ in range(2)]
    try:
        said = [node.communicate(timeout=300) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], said
    assert sorted("2 processes" in out for out, _ in said) == [False, True]           # rank 0 speaks for all
    assert_same_within_rounding(alone["grpo"], tmp_path / "run", "grpo")


OWN_FOLDER = """
at = sys.argv.index("--out") + 1
sys.argv[at] += os.environ["RANK"]                 # as on two nodes, each with its own disk
""" + TRAIN


@pytest.mark.parametrize("stale, words", [(False, "process 1 finds no run"), (True, "they have read different runs")])
def test_nodes_that_do_not_see_the_same_folder_are_refused(tmp_path, stale, words):
    """Catches: processes that train on from different weights, or wait for each other in a collective for days."""
    for rank in range(2) if stale else ():
        done = run_python(write_script(tmp_path, TRAIN), *flags(tmp_path / f"run{rank}", steps=1, seed=rank))
        assert done.returncode == 0, done.stderr[-3000:]
    script = write_script(tmp_path, OWN_FOLDER)
    done = run_python(*TORCHRUN, script, *flags(tmp_path / "run", steps=2, seed=0), *["--resume"] * stale)
    assert done.returncode == 1 and f"must be one folder that all nodes see: {words}" in done.stderr, done.stderr[-3000:]


# -------------------------------------------------------------------------------------------------------------- --shard

@pytest.mark.parametrize("algo", ["grpo", "nft"])
def test_a_sharded_base_trains_as_a_whole_one_does(alone, tmp_path, algo):
    """Catches: a LoRA that is cut or moved with the base, gradients of a base that was not gathered, processes that
    wait for ever for one that had nothing to train on or makes no closing table; another training after --resume."""
    script = write_script(tmp_path, UNEVEN)

    def launch(out, steps, *more):
        done = run_python(*TORCHRUN, script, *flags(out, algo, **SAME | dict(shard="true", steps=steps)), *more)
        assert done.returncode == 0, done.stderr[-3000:]
    launch(tmp_path / "straight", 2)
    assert_same_within_rounding(alone[algo], tmp_path / "straight", algo)
    tables = [json.loads((out / "validation.json").read_text()) for out in (alone[algo], tmp_path / "straight")]
    for arm in ("base", "tuned"):
        assert tables[0]["arms"][arm]["CC"] == pytest.approx(tables[1]["arms"][arm]["CC"], abs=1e-3)

    if algo == "grpo":
        launch(tmp_path / "resumed", 1)
        launch(tmp_path / "resumed", 2, "--resume")
        assert_same_run(tmp_path / "straight", tmp_path / "resumed")


FAMILIES = """
import torch.distributed as dist
dist.init_process_group("gloo")
rank = dist.get_rank()

for family in ("kontext", "klein", "qwen"):
    got = []
    for sharded in (False, True):
        pipe = PIPES[family]()
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.to(torch.bfloat16)
        editor = tiny_editor(family, pipe, guidance=3., shard=sharded)
        editor.transformer.enable_gradient_checkpointing()
        model.add_lora(editor, 4, 8)
        if sharded:
            weights = editor.transformer.named_parameters
            frozen = {name: p.numel() for name, p in weights() if name not in editor.trained}
            model.shard(editor)
            here = {name: p.to_local().numel() for name, p in weights() if name in frozen}
            assert sum(here.values()) < .6 * sum(frozen.values()), (sum(here.values()), sum(frozen.values()))
        move(editor, .02)
        # other pictures on each process
        g = torch.Generator().manual_seed(rank)
        N, C = editor.latent_shape((64, 64))
        x, context = torch.randn(2, N, C, generator=g), torch.randn(2, N, C, generator=g)
        cond, index = editor.condition(["Make it red"] * 2, (255 * torch.rand(2, 3, 64, 64, generator=g)).byte())
        cond = {name: value[index] for name, value in cond.items()}
        velocity = lambda: editor.velocity(x, torch.full((2,), .7), cond, context, (64, 64))
        with editor.merged():
            for _ in range(2):
                v = velocity()
                with torch.no_grad(), editor.using("ref"):
                    v_ref = velocity()
                ((v - v_ref).square().mean() + v.mean()).backward()
        got.append([v.detach(), v_ref] + [p.grad for p in editor.trained.values() if p.grad is not None])
    assert len(got[0]) == len(got[1]) and sum(p.any().item() for p in got[0]) > 20
    assert all(torch.equal(a, b) for a, b in zip(*got)), family
dist.barrier()
"""


def test_a_sharded_base_gives_the_same_bits_in_every_family(tmp_path):
    """Catches: what only real editors have: bfloat16, gradients recomputed in the backward, two forwards of true CFG,
    a forward with other weights between forward and backward; a base of which each process still holds all."""
    done = run_python(*TORCHRUN, write_script(tmp_path, FAMILIES))
    assert done.returncode == 0, done.stderr[-3000:]


def test_shard_is_refused_where_nothing_is_frozen(tmp_path, monkeypatch):
    """Catches: a transformer that is trained, cut into pieces that no optimizer and no checkpoint knows of."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--shard True has no effect here: it needs several processes.* and a LoRA"):
        train.parse(flags(tmp_path, shard="true", lora_rank=0, lora_alpha=None))
    with pytest.raises(ValueError, match="--shard .* the whole transformer is trained"):
        model.shard(new_editor(0))
