"""The paper's findings on the embedded world, each re-run by one command.

    python bench/study.py turns --jobs 2        train and evaluate every arm, then report; what is finished is skipped
    python bench/study.py report turns          table and figure once more, from results/turns/ alone

Runs lie in out/study/NAME/, a folder for each arm and training seed; what they said is in the .log beside it. A study
that was killed goes on where it was, when it is started again. The evidence (config, metrics, scores of every test
task, commit) goes to results/NAME/, and so do table.md, results.json and figure.png (bench/study_report.py).
"""
import fcntl
import json
import os
import subprocess
import sys
import time
from argparse import RawDescriptionHelpFormatter
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Callable, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))                                # so that it runs from any folder

import torch

import data
import eval as evaluation
import model
import reward
import train
from advantage import advantages
from bench import study_report
from bench.study_report import SCORES, STUDY, pack

STEPS = 40                   # of every arm
TURNS = 5                    # of the test dialogues
GRADIENTS = 3                # on disjoint tasks, whose cosines say how much of a gradient is chance
MOST = 2_000_000             # bytes of evidence of a study
OUT, RESULTS = Path("out/study"), Path("results")            # in the repository
# Columns of metrics.jsonl that are evidence, but for those of single turns.
KEPT = ("step", "reward/", "referee/", "group_std/", "teaches/", "advantage/used", "update/grad_norm",
        "seconds/judge_wait", "seconds/total")


# --------------------------------------------------------------------------------------------------------- the studies

class Study(NamedTuple):
    question: str
    metrics: list            # what the answer turns on, by the names in the table
    arms: dict               # {arm: what train.py is given besides the defaults}
    compare: list = None     # groups of arms: the others of a group against its first; None = all arms are one group
    clock: str = ""          # column of metrics.jsonl by which arms are compared at equal seconds too; "" = none
    cosine: bool = False     # measure the gradients' cosine as well


# Ninety edits of eight samples each in a step, however long the dialogues are; the updates divide each of these.
K1, K3, K5 = "--turns 1 --tasks 90", "--turns 3 --tasks 30", "--turns 5 --tasks 18"
# The paper's broadcast: every turn gets the trajectory's advantage.
PAPER = "--spread trajectory"
# Groups differ less in consistency than in following: the default would switch it off.
BOTH = "--min-std .002"

STUDIES = {
    "turns": Study(
        "Does training on its own outputs make an editor robust to them, and does it teach it to leave room?",
        ["IF_3", "O_3", "O_5", "CC_5", "flatness", "possible", "wear"],
        {"grpo-k1": f"--algo grpo {PAPER} {K1}",
         "grpo-k3": f"--algo grpo {PAPER} {K3}",
         "grpo-k5": f"--algo grpo {PAPER} {K5}",
         "nft-k1": f"--algo nft {PAPER} {K1}",
         "nft-k3": f"--algo nft {PAPER} {K3}",
         "nft-k5": f"--algo nft {PAPER} {K5}"},
        [["grpo-k1", "grpo-k3", "grpo-k5"], ["nft-k1", "nft-k3", "nft-k5"]]),
    "credit": Study(
        "Does the broadcast of the trajectory's advantage bridge local planning and global success?",
        ["IF_3", "O_3", "O_5", "possible"],
        {"grpo-k3-trajectory": f"--algo grpo {K3} --spread trajectory",
         "grpo-k3-togo": f"--algo grpo {K3} --spread togo",
         "grpo-k3-turn": f"--algo grpo {K3} --spread turn",
         "grpo-k5-trajectory": f"--algo grpo {K5} --spread trajectory",
         "grpo-k5-togo": f"--algo grpo {K5} --spread togo",
         "grpo-k5-turn": f"--algo grpo {K5} --spread turn",
         "nft-k3-trajectory": f"--algo nft {K3} --spread trajectory",
         "nft-k3-togo": f"--algo nft {K3} --spread togo",
         "nft-k3-turn": f"--algo nft {K3} --spread turn",
         "nft-k5-trajectory": f"--algo nft {K5} --spread trajectory",
         "nft-k5-togo": f"--algo nft {K5} --spread togo",
         "nft-k5-turn": f"--algo nft {K5} --spread turn"},
        [[f"{start}-{spread}" for spread in ("trajectory", "togo", "turn")]
         for start in ("grpo-k3", "grpo-k5", "nft-k3", "nft-k5")],
        cosine=True),
    "aggregate": Study(
        "Which score of a trajectory: mean, least, product or last of its turns, or the judge's of the whole?",
        ["IF_3", "O_3", "O_5"],
        {"mean": f"--algo nft {K3} {PAPER} --aggregate mean",
         "min": f"--algo nft {K3} {PAPER} --aggregate min",
         "product": f"--algo nft {K3} {PAPER} --aggregate product",
         "last": f"--algo nft {K3} {PAPER} --aggregate last",
         "whole": f"--algo nft {K3} {PAPER} --aggregate whole"}),
    "fusion": Study(
        "Which fusion of following and consistency is hacked, and do later turns restrain it?",
        ["IF_3", "O_3", "CC_3", "M_clean", "wear"],
        {"k1-advantage": f"--algo nft {K1} {PAPER} {BOTH} --fuse advantage",
         "k1-reward": f"--algo nft {K1} {PAPER} {BOTH} --fuse reward",
         "k1-following": f"--algo nft {K1} {PAPER} {BOTH} --reward-weights 1,0",
         "k1-consistency": f"--algo nft {K1} {PAPER} {BOTH} --reward-weights 0,1",
         "k3-advantage": f"--algo nft {K3} {PAPER} {BOTH} --fuse advantage",
         "k3-reward": f"--algo nft {K3} {PAPER} {BOTH} --fuse reward",
         "k3-following": f"--algo nft {K3} {PAPER} {BOTH} --reward-weights 1,0",
         "k3-consistency": f"--algo nft {K3} {PAPER} {BOTH} --reward-weights 0,1"},
        [["k1-advantage", "k1-reward", "k1-following", "k1-consistency"],
         ["k3-advantage", "k3-reward", "k3-following", "k3-consistency"],
         *([f"k1-{fuse}", f"k3-{fuse}"] for fuse in ("advantage", "reward", "following", "consistency"))]),
    "reasoning": Study(
        "How may the judge answer: what do bias and variance of the reward do, at equal steps and equal judge seconds?",
        ["IF_3", "O_3", "O_5"],
        {"logits": f"--algo nft {K3} {PAPER} --reasoning logits",
         "direct": f"--algo nft {K3} {PAPER} --reasoning direct",
         "direct-x4": f"--algo nft {K3} {PAPER} --reasoning direct --votes 4",
         "think": f"--algo nft {K3} {PAPER} --reasoning think",
         "think-x4": f"--algo nft {K3} {PAPER} --reasoning think --votes 4"},
        clock="seconds/judge_wait"),
    "algorithms": Study(
        "GRPO or NFT, at equal steps and at equal seconds?",
        ["IF_3", "O_3", "O_5"],
        {"grpo": f"--algo grpo {K3} {PAPER}",
         "nft": f"--algo nft {K3} {PAPER}"},
        clock="seconds/total"),
}


# ------------------------------------------------------------------------------------------------------- jobs, resumed

class Job(NamedTuple):
    what: str                            # in words
    log: Path                            # what it says; locked while it runs
    is_done: Callable[[], bool]
    command: Callable[[], list]          # words after `python`, once it is known how far an earlier one came
    finish: Callable = lambda: None      # what is left to do when it has ended well


def work_through(waiting, at_once, threads):
    """Run jobs, some at once, each on so many threads (0: as many as it likes). ValueError says which one failed, why.

    However this ends, the jobs that still run are told to end, and finish their step first.
    """
    waiting, running, told = list(waiting), {}, set()
    total = len(waiting)
    try:
        while waiting or running:
            for job in list(waiting):
                if len(running) < at_once and (job.is_done() or start(job, running, threads, told)):
                    waiting.remove(job)
            for job, (child, begun) in list(running.items()):
                if child.poll() is None:
                    continue
                del running[job]
                if child.returncode:
                    raise ValueError(f"{job.what} failed (exit code {child.returncode}): {last_line(job.log)}")
                job.finish()
                done = total - len(waiting) - len(running)
                print(f"[{done}/{total}] {job.what}: {time.time() - begun:.0f} s", flush=True)
            if running or waiting:
                time.sleep(.2)
    finally:
        for child, _ in running.values():
            child.terminate()
        for child, _ in running.values():
            child.wait()


def start(job, running, threads, told):
    """Start a job's process. False where one of an earlier start, whose study was killed, has not ended yet."""
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with open(job.log, "a") as log:
        # The child inherits the open file, and so the lock: it falls when the last process of the job ends.
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if job not in told:
                print(f"{job.what} still runs from an earlier start: waiting for it", flush=True)
            told.add(job)
            return False
        # It may have ended just before.
        if job.is_done():
            return True
        environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
        words = [sys.executable, *map(str, job.command())]
        child = subprocess.Popen(words, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log,
                                 stderr=subprocess.STDOUT)
    running[job] = child, time.time()
    return True


def last_line(log):
    """Why a script ended, as it says itself; else the last it said."""
    lines = log.read_text(errors="replace").replace("\r", "\n").splitlines()
    lines = [line.strip() for line in lines if line.strip()]
    named = [line for line in lines if line.startswith(("train.py: ", "eval.py: "))]
    return (named or lines or ["it said nothing"])[-1]


def train_job(name, arm, seed, cfg):
    """The training of an arm with one seed."""
    out, log = ROOT / cfg.out, ROOT / OUT / name / f"{arm}-{seed}.log"
    words = STUDIES[name].arms[arm].split()

    def is_done():
        checkpoints = train.checkpoints(out)
        if not checkpoints or not (out / "config.json").is_file():
            return False
        done = int(checkpoints[-1].stem.removeprefix("step_"))
        if done > STEPS:
            raise ValueError(f"{cfg.out} is at step {done}, after the {STEPS} of a study: move it away")
        if done == STEPS:
            train.same_as_before(data.read_json(out / "config.json"), asdict(cfg), cfg.out)
        return done == STEPS

    def command():
        resume = ["--resume"] if (out / "config.json").is_file() else []
        return ["train.py", *words, *common_words(name, arm, seed), *resume]
    return Job(f"study {name}, arm {arm}, seed {seed}, training", log, is_done, command)


def common_words(name, arm, seed):
    return ["--steps", str(STEPS), "--val-tasks", "0", "--seed", str(seed), "--out", str(OUT / name / f"{arm}-{seed}")]


def eval_job(name, arm, configs, tasks, processes):
    """The evaluation of an arm's LoRAs, of all its seeds {seed: Config}; what there is of the base is used."""
    folder = OUT / name / "eval"
    loras = {f"{arm}-{seed}": cfg.out for seed, cfg in configs.items()}
    cfg = configs[0]
    words = ["eval.py", "--model", cfg.model, "--guidance", cfg.guidance, "--data", cfg.data, "--denoise",
             cfg.eval_denoise, "--turns", TURNS, "--tasks", tasks, "--out", folder]
    for lora, path in loras.items():
        words += ["--lora", f"{lora}={path}"]
    words = [str(word) for word in words]

    # Where all is there, eval.py would only write its report again: a note says what it was given when it ended.
    note = ROOT / folder / "done" / f"{arm}.json"

    def is_done():
        files = [model.find_weights(ROOT / path) for path in loras.values()]
        fresh = note.is_file() and all(note.stat().st_mtime > file.stat().st_mtime for file in files)
        return fresh and json.loads(note.read_text()) == words

    def command():
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        return [*launch * (processes > 1), *words]

    def finish():
        note.parent.mkdir(parents=True, exist_ok=True)
        model.write_text(note, json.dumps(words))
    return Job(f"study {name}, arm {arm}, evaluation", ROOT / OUT / name / "eval.log", is_done, command, finish)


# ---------------------------------------------------------------------------------------------- how noisy a gradient is

def gradient_cosine(cfg):
    """Mean cosine between gradients of the first update on GRADIENTS disjoint sets of tasks; None if there is none.

    Each is that of a whole step, before any training: the less of it is chance, the nearer to 1.
    """
    cfg = replace(cfg, updates=1, referee="none")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    share = train.divide(cfg, 0, 1)
    tasks_by_size, _ = train.load_tasks(cfg, 0)
    judge, _ = train.load_judges(cfg, device, [task for tasks in tasks_by_size.values() for task in tasks])
    editor, _ = train.load_editor(cfg, device, tasks_by_size)

    # The steps of an epoch have disjoint tasks.
    gradients = []
    for step in range(1, 1 + GRADIENTS):
        tasks = train.choose(tasks_by_size, cfg.tasks, cfg.seed, step)
        gradients.append(first_gradient(editor, judge, tasks, cfg, step, share))
    pairs = [(i, j) for i in range(GRADIENTS) for j in range(i)]
    known = [pair for pair in pairs if gradients[pair[0]] is not None and gradients[pair[1]] is not None]
    cosines = [torch.cosine_similarity(gradients[i], gradients[j], dim=0).item() for i, j in known]
    return sum(cosines) / len(cosines) if cosines else None


def first_gradient(editor, judge, tasks, cfg, step, share):
    """The gradient of one update on these tasks, flat, with the weights as they are; None where nothing is learned."""
    rows = [task for task in tasks for _ in range(cfg.group)]
    scores = []
    with editor.using("old"):
        trajectory = train.rollout(
            editor, tasks, cfg.group, cfg.turns, cfg.denoise, (cfg.seed, step), train.stochastic_window(cfg, step),
            cfg.eta, cfg.step_kind, cfg.shared_noise, share.tasks, micro=share.micro,
            on_turn=lambda k, images: scores.append(judge.start(rows, images, k)))
    r = train.collect(scores, judge, cfg)
    weights = train.reward_weights(cfg, judge)
    A, used = advantages(r, weights, cfg.aggregate, cfg.fuse, cfg.spread, cfg.min_std)

    # An optimizer that moves nothing leaves the gradient where it is.
    params = list(editor.trained.values())
    still = SimpleNamespace(param_groups=[], zero_grad=editor.transformer.zero_grad, step=lambda: None)
    info = train.update(editor, trajectory, A.flatten(0, 1), used.flatten(0, 1), still, cfg, step, share)
    return torch.cat([p.grad.flatten() for p in params]) if info["taken"] else None


def measure_cosines(name, configs):
    """{arm: [cosine of each seed]}, written down as they are measured."""
    file = ROOT / OUT / name / "cosines.json"
    there = data.read_json(file) if file.is_file() else {}
    found = {}
    for (arm, seed), cfg in configs.items():
        run = f"{arm}-{seed}"
        if run not in there:
            there[run] = gradient_cosine(cfg)
            model.write_text(file, json.dumps(there))
            print(f"study {name}, arm {arm}, seed {seed}: cosine between gradients {there[run]}", flush=True)
        found.setdefault(arm, []).append(there[run])
    return found


# ------------------------------------------------------------------------------------------------------------- evidence

def note_commit(name):
    """The commits that the study was run with so far, this one last."""
    file = ROOT / OUT / name / "commits.json"
    commits = json.loads(file.read_text()) if file.is_file() else []
    commit = git("rev-parse", "--short", "HEAD") or "unknown"
    if git("status", "--porcelain", "--untracked-files=no"):
        commit += " with changes"
    if commit not in commits:
        commits.append(commit)
        file.parent.mkdir(parents=True, exist_ok=True)
        model.write_text(file, json.dumps(commits))
    return commits


def git(*words):
    """What git says of this repository; "" where there is none."""
    try:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def gather(name, configs, commits, cosines):
    """Put everything that the report needs into results/NAME/. ValueError if it is more than MOST bytes."""
    study, folder, results = STUDIES[name], ROOT / OUT / name, ROOT / RESULTS / name
    for (arm, seed), cfg in configs.items():
        place = results / f"{arm}-{seed}"
        place.mkdir(parents=True, exist_ok=True)
        model.write_text(place / "config.json", (ROOT / cfg.out / "config.json").read_text())
        lines = (ROOT / cfg.out / "metrics.jsonl").read_text().splitlines()
        model.write_text(place / "metrics.jsonl", "".join(thin(line) + "\n" for line in lines))

    # What each arm did on each test task.
    record = data.read_json(folder / "eval" / "settings.json")["settings"]
    settings = evaluation.Settings(**record)
    tasks = data.load(settings.data, settings.split, settings.turns, settings.resolution, settings.tasks)
    judge = reward.load(settings.judge, torch.device("cpu"))
    scores = {}
    for lora in ["base", *(f"{arm}-{seed}" for arm, seed in configs)]:
        found = evaluation.evaluate(None, judge, tasks, settings.turns, settings.denoise, settings.seeds,
                                    settings.batch, settings.probes, folder / "eval" / "arms" / lora, progress=False)
        scores[lora] = per_task(found, tasks)
    model.write_text(results / SCORES, json.dumps(scores, separators=(",", ":")))

    seeds = sorted({seed for _, seed in configs})
    more = {"compare": study.compare or [list(study.arms)], "name": name, "seeds": seeds, "steps": STEPS,
            "tasks": len(tasks), "turns": settings.turns, "judge": settings.judge, "commits": commits}
    more["cosines"] = cosines
    model.write_text(results / STUDY, json.dumps(study._asdict() | more, indent=1))
    size = sum(file.stat().st_size for file in results.rglob("*") if file.is_file())
    if size > MOST:
        raise ValueError(f"{RESULTS / name} holds {size} bytes, more than {MOST}: evaluate fewer --tasks")


def thin(line):
    """A line of metrics.jsonl without the columns of single turns, four digits a number."""
    row = {}
    for column, value in json.loads(line).items():
        if column.startswith(KEPT) and "_turn" not in column:
            row[column] = float(f"{value:.4g}") if isinstance(value, float) else value
    return json.dumps(row)


def per_task(scores, tasks):
    """What the metrics of an arm are made of, task by task: {name of a moment: as `pack` packs it}."""
    K = scores.success.shape[2]
    found = {}
    # Without kinds of edit: those means take most of the room, and no study turns on them.
    for name, (total, count) in evaluation.moments(scores, [[""] * K] * len(tasks)).items():
        if name not in ("copied", "drift", "nothing"):
            found[name] = pack(total / count)
    return found


# ---------------------------------------------------------------------------------------------------------- the command

def run(name, seeds, jobs, tasks):
    """Train and evaluate the arms of a study, as far as that is not done, and gather the evidence."""
    configs = {}
    for seed in range(seeds):
        for arm, words in STUDIES[name].arms.items():
            cfg = train.parse([*words.split(), *common_words(name, arm, seed)])
            train.check(cfg)
            configs[arm, seed] = cfg
    commits = note_commit(name)

    # Seed by seed, so that a study that is stopped early has whole sets of arms.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = max(1, cores // jobs) if jobs > 1 else 0
    work_through([train_job(name, arm, seed, cfg) for (arm, seed), cfg in configs.items()], jobs, threads)
    evaluations = []
    for arm in STUDIES[name].arms:
        of_arm = {seed: configs[arm, seed] for seed in range(seeds)}
        evaluations.append(eval_job(name, arm, of_arm, tasks, jobs))
    work_through(evaluations, 1, threads)

    cosines = measure_cosines(name, configs) if STUDIES[name].cosine else {}
    gather(name, configs, commits, cosines)


def parse(argv=None):
    parser = data.Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter,
                         usage="%(prog)s [report] NAME [--seeds 3] [--jobs 1] [--tasks 500]")
    parser.add_argument("words", nargs="+", metavar="NAME", help=f"one of {', '.join(STUDIES)}")
    for name, value, help in (("seeds", 3, "training seeds of each arm"),
                              ("jobs", 1, "arms at a time; more than one share the cores"),
                              ("tasks", 500, "test tasks")):
        parser.add_argument(f"--{name}", type=int, help=f"{help} (default: {value})")
    args = parser.parse_args(argv)
    given = {name: value for name, value in vars(args).items() if name != "words" and value is not None}
    reports = args.words[0] == "report"
    names = args.words[reports:]
    if len(names) != 1 or names[0] not in STUDIES:
        raise ValueError(f"{' '.join(names)!r} is no study: name one of {', '.join(STUDIES)}")
    if reports and given:
        raise ValueError(f"--{next(iter(given))} has no effect here: a report reads what was run")
    for flag, value in given.items():
        data.check_bounds(f"--{flag}", value, {"at least": 1})
    return names[0], reports, {"seeds": 3, "jobs": 1, "tasks": 500} | given


def main(argv=None):
    name, reports, options = parse(argv)
    if not reports:
        run(name, **options)
    print(study_report.write_report(ROOT / RESULTS / name))


if __name__ == "__main__":
    data.run_main(main)
