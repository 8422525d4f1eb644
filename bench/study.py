"""The paper's findings on the embedded world, each re-run by one command.

    python bench/study.py turns --jobs 2        train and evaluate every arm, then report; what is finished is skipped
    python bench/study.py report turns          table and figure once more, from results/turns/ alone

Runs lie in out/study/runs/, a folder for each config and training seed; what they said is in the .log beside it. An arm
that several studies have is trained and evaluated once. A study that was killed goes on where it was, when it is
started again. The evidence (config, metrics, scores of every test task, commit) goes to results/NAME/, and so do
table.md, results.json and figure.png (bench/study_report.py).
"""
import fcntl
import json
import os
import re
import subprocess
import sys
import time
import zlib
from argparse import RawDescriptionHelpFormatter
from dataclasses import asdict
from pathlib import Path
from typing import Callable, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))                                # so that it runs from any folder

import torch

import data
import eval as evaluation
import model
import reward
import train
from bench import study_report
from bench.gradients import first_gradients, own_cosines
from bench.study_report import MEASURED, SCORES, STUDY, pack

STEPS = 40                   # of an arm that does not name its own
TURNS = 5                    # of the test dialogues
GRADIENTS = 4                # on disjoint tasks, whose cosines say how much of a gradient is chance
MOST = 2_000_000             # bytes of evidence of a study
OUT, RESULTS = Path("out/study"), Path("results")            # in the repository
CONTENTS = {}                # what `contents` has found
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


# What is learned late is trained for longer: leaving room pays off turns later. At step 80 or so NFT grows unstable.
LONG = "--steps 80"
# As many samples as in 133 of the default's steps, and a KL term: it holds NFT, and keeps GRPO from walking.
SMALL = "--updates 1 --steps 400"
HELD, HELD_GRPO = f"--kl .5 {SMALL}", f"--kl .001 {SMALL}"
# As many edits of eight samples each in a step as by default, 72, however long the dialogues are (K = 5: 75 or 70).
K1, K3, K5 = "--turns 1 --tasks 72", "", "--turns 5 --tasks 15"
K5_GRPO = "--turns 5 --tasks 14"         # its two updates divide them
# By default at advantage level, both alike.
FUSIONS = {"advantage": "", "reward": "--fuse reward", "following": "--reward-weights 1,0",
           "consistency": "--reward-weights 0,1"}
# What the aggregates aggregate: the paper's broadcast, every turn gets the trajectory's advantage.
BROADCAST = "--spread trajectory"
SPREADS = "trajectory", "togo", "turn"

STUDIES = {
    "turns": Study(
        "Does training on its own outputs make an editor robust to them, and does it teach it to leave room?",
        ["IF_3", "O_3", "O_5", "CC_5", "flatness", "room_3", "wear"],
        {"nft-k1": f"--algo nft {K1}",
         "nft-k3": f"--algo nft {K3}",
         "nft-k5": f"--algo nft {K5}",
         "grpo-k1": f"--algo grpo {K1}",
         "grpo-k3": f"--algo grpo {K3}",
         "grpo-k5": f"--algo grpo {K5_GRPO}"},
        [["nft-k1", "nft-k3", "nft-k5"], ["grpo-k1", "grpo-k3", "grpo-k5"]]),
    "longer": Study(
        "Trained twice as long: what do three turns teach that single edits do not?",
        ["IF_3", "O_3", "O_5", "CC_3", "possible", "room_3", "M_clean"],
        {f"k{K}{name}": f"--algo nft {words} {fusion} {LONG}"
         for name, fusion in (("", ""), ("-following", "--reward-weights 1,0"))
         for K, words in ((1, K1), (3, K3))},
        [["k1", "k3"], ["k1-following", "k3-following"]]),
    "planning": Study(
        "Both rewards, held by a KL term, trained longer still: do three turns teach to plan, and single edits not?",
        ["IF_3", "O_3", "O_5", "CC_3", "possible", "room_3", "M_clean"],
        {"k1": f"--algo nft --turns 1 --tasks 24 {HELD}",
         "k3": f"--algo nft --tasks 8 {HELD}"}),
    "planning-grpo": Study(
        "By GRPO, held by a weaker KL term: do three turns teach to plan, and single edits not?",
        ["IF_3", "O_3", "O_5", "CC_3", "possible", "room_3", "M_clean"],
        {"k1": f"--algo grpo --turns 1 --tasks 24 {HELD_GRPO}",
         "k3": f"--algo grpo --tasks 8 {HELD_GRPO} --spread togo"}),
    "grpo-kl": Study(
        "How much of GRPO's way is a walk that no reward asks for: what does a KL term keep, and what does it cost?",
        ["IF_3", "O_3", "O_5", "CC_3", "CC_5"],
        {"kl0": "--algo grpo",
         "kl.001": "--algo grpo --kl .001",
         "kl.003": "--algo grpo --kl .003"}),
    "credit": Study(
        "Does the broadcast of the trajectory's advantage bridge local planning and global success?",
        ["IF_3", "O_3", "O_5", "room_3"],
        {f"{algo}-k{K}-{spread}": f"--algo {algo} {words} --spread {spread}"
         for algo, K, words in (("nft", 3, K3), ("nft", 5, K5), ("grpo", 3, K3), ("grpo", 5, K5_GRPO))
         for spread in SPREADS},
        [[f"{algo}-k{K}-{spread}" for spread in SPREADS]
         for algo in ("nft", "grpo") for K in (3, 5)],
        cosine=True),
    "credit-longer": Study(
        "Trained as long as in `planning`: does the broadcast teach to plan, as the turns to go do?",
        ["IF_3", "O_3", "O_5", "CC_3", "possible", "room_3", "M_clean"],
        {spread: f"--algo nft --tasks 8 {HELD} --spread {spread}" for spread in SPREADS},
        [[*SPREADS], ["turn", "togo"]]),
    "aggregate": Study(
        "Which score of a trajectory: mean, least, product or last of its turns, or the judge's of the whole?",
        ["IF_3", "O_3", "O_5"],
        {aggregate: f"--algo nft {K3} {BROADCAST} --aggregate {aggregate}"
         for aggregate in ("mean", "min", "product", "last", "whole")}),
    "fusion": Study(
        "Which fusion of following and consistency is hacked, and do later turns restrain it?",
        ["IF_3", "O_3", "CC_3", "M_clean", "wear"],
        {f"k{K}-{name}": f"--algo nft {words} {fusion}"
         for K, words in ((1, K1), (3, K3))
         for name, fusion in FUSIONS.items()},
        [*([f"k{K}-{name}" for name in FUSIONS] for K in (1, 3)),
         *([f"k1-{name}", f"k3-{name}"] for name in FUSIONS)]),
    "reasoning": Study(
        "How may the judge answer: what do bias and variance of the reward do, at equal steps and equal judge seconds?",
        ["IF_3", "O_3", "O_5"],
        {"logits": f"--algo nft {K3}",
         "direct": f"--algo nft {K3} --reasoning direct",
         "direct-x4": f"--algo nft {K3} --reasoning direct --votes 4",
         "think": f"--algo nft {K3} --reasoning think",
         "think-x4": f"--algo nft {K3} --reasoning think --votes 4"},
        clock="seconds/judge_wait"),
    "algorithms": Study(
        "GRPO or NFT, at equal steps and at equal seconds?",
        ["IF_3", "O_3", "O_5"],
        {"grpo": f"--algo grpo {K3}",
         "nft": f"--algo nft {K3}"},
        clock="seconds/total", cosine=True),
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
                if len(running) == at_once:
                    break
                if job.is_done() or start(job, running, threads, told):
                    waiting.remove(job)
            for job, (child, begun, said) in list(running.items()):
                if child.poll() is None:
                    continue
                del running[job]
                if child.returncode:
                    raise ValueError(f"{job.what} failed (exit code {child.returncode}): {last_line(job.log, said)}")
                job.finish()
                done = total - len(waiting) - len(running)
                print(f"[{done}/{total}] {job.what}: {time.time() - begun:.0f} s", flush=True)
            if running or waiting:
                time.sleep(.2)
    finally:
        for child, _, _ in running.values():
            child.terminate()
        for child, _, _ in running.values():
            child.wait()


def start(job, running, threads, told):
    """Start a job's process, unless it has just been done. False where one of an earlier start has not ended yet."""
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
        words, said = [sys.executable, *map(str, job.command())], log.tell()
        # A session of its own: Ctrl-C is for this program, which then asks its children to finish their step.
        child = subprocess.Popen(words, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log,
                                 stderr=subprocess.STDOUT, start_new_session=True)
    running[job] = child, time.time(), said
    return True


def last_line(log, since):
    """Why a script ended, by its own words; else the last it said. Earlier starts said the bytes before `since`."""
    lines = log.read_bytes()[since:].decode(errors="replace").replace("\r", "\n").splitlines()
    lines = [line.strip() for line in lines if line.strip()]
    named = [line for line in lines if line.startswith(("train.py: ", "eval.py: "))]
    return (named or lines or ["it said nothing"])[-1]


def run_name(words, seed):
    """What the run of an arm is called, alike in all studies: all of its config that is not the preset's default."""
    cfg = asdict(train.parse(words.split()))
    usual = asdict(train.parse(["--algo", cfg["algo"]]))
    parts = [f"{name}_{value}" for name, value in cfg.items() if value != usual[name]]
    return re.sub(r"[^\w.-]", "_", "-".join([cfg["algo"], *parts, str(seed)]))


def all_words(words, seed):
    """What train.py is given: the arm's words, whose --steps come last and so count, and what all arms have."""
    out = OUT / "runs" / run_name(words, seed)
    return ["--steps", str(STEPS), "--val-tasks", "0", "--seed", str(seed), "--out", str(out), *words.split()]


def contents(cfg):
    """Digests of what is behind a config's names now: a run of other weights, pictures or judge is another run."""
    key = cfg.model, cfg.lora, cfg.data, cfg.judge, cfg.rubric, cfg.reasoning, cfg.votes, cfg.aggregate == "whole"
    if key not in CONTENTS:
        judge, _ = train.load_judges(cfg, torch.device("cpu"), [])
        CONTENTS[key] = train.fingerprints(cfg, judge)
    return CONTENTS[key]


def train_job(name, arm, seed, cfg):
    """The training of an arm with one seed."""
    out = ROOT / cfg.out
    words = STUDIES[name].arms[arm]

    def is_done():
        checkpoints = train.checkpoints(out)
        if not checkpoints or not (out / "config.json").is_file():
            return False
        done = int(checkpoints[-1].stem.removeprefix("step_"))
        if done > cfg.steps:
            raise ValueError(f"{cfg.out} is at step {done}, after the {cfg.steps} of a study: move it away")
        if done == cfg.steps:
            train.same_as_before(data.read_json(out / "config.json"), asdict(cfg) | contents(cfg), cfg.out)
        return done == cfg.steps

    def command():
        resume = ["--resume"] if (out / "config.json").is_file() else []
        return ["train.py", *all_words(words, seed), *resume]
    log = out.with_name(f"{out.name}.log")
    return Job(f"study {name}, arm {arm}, seed {seed}, training", log, is_done, command)


def eval_job(name, arm, configs, tasks, processes):
    """The evaluation of an arm's LoRAs, of all its seeds {seed: Config}; what there is of the base is used."""
    folder = OUT / "eval"
    loras = {Path(cfg.out).name: cfg.out for cfg in configs.values()}
    cfg = configs[0]
    words = ["eval.py", "--model", cfg.model, "--guidance", cfg.guidance, "--data", cfg.data, "--denoise",
             cfg.eval_denoise, "--turns", TURNS, "--tasks", tasks, "--out", folder]
    for lora, path in loras.items():
        words += ["--lora", f"{lora}={path}"]
    words = [str(word) for word in words]

    # Where all is there, eval.py would only write its report again: a note says what it was given when it ended.
    note = ROOT / folder / "done" / f"{next(iter(loras))}.json"

    def is_done():
        files = [model.find_weights(ROOT / path) for path in loras.values()]
        fresh = note.is_file() and all(note.stat().st_mtime > file.stat().st_mtime for file in files)
        return fresh and json.loads(note.read_text()) == [words, contents(cfg)]

    def command():
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        return [*launch * (processes > 1), *words]

    def finish():
        note.parent.mkdir(parents=True, exist_ok=True)
        model.write_text(note, json.dumps([words, contents(cfg)]))
    return Job(f"study {name}, arm {arm}, evaluation", ROOT / OUT / "eval.log", is_done, command, finish)


# ---------------------------------------------------------------------------------------------- how noisy a gradient is

def measure_cosines(name, configs):
    """{arm: [cosine of each seed]}, written down as they are measured, for all studies that have the arm."""
    file = ROOT / OUT / "cosines.json"
    there = data.read_json(file) if file.is_file() else {}
    found = {}
    for (arm, seed), cfg in configs.items():
        config = zlib.crc32(json.dumps(asdict(cfg)).encode())                                # defaults may change
        run = f"{Path(cfg.out).name} {config:08x}"
        if run not in there:
            cosines = own_cosines(first_gradients(cfg, GRADIENTS))
            there[run] = cosines.mean().item() if len(cosines) else None
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
    # A study that is gathered a second time has itself changed what lies in results/.
    if git("status", "--porcelain", "--untracked-files=no", "--", f":!{RESULTS}"):
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


def check_kept(name, study, seeds, tasks):
    """ValueError if results/NAME/ holds arms, seeds or test tasks that are not in this study: they would be lost."""
    file = ROOT / RESULTS / name / STUDY
    if not file.is_file():
        return
    there = data.read_json(file)
    lost = [f"arm {arm}" for arm in there["arms"] if arm not in study.arms]
    lost += [f"seed {seed}" for seed in there["seeds"] if seed >= seeds]
    lost += [f"{there['tasks']} test tasks"] * (there["tasks"] > tasks)
    if lost:
        raise ValueError(f"{RESULTS / name} holds more than this ({', '.join(lost)}): name that too, or move it")


def gather(name, study, configs, tasks, commits, cosines):
    """Put everything that the report needs into results/NAME/. ValueError if it is more than MOST bytes."""
    folder, results = ROOT / OUT / "eval", ROOT / RESULTS / name
    for (arm, seed), cfg in configs.items():
        place = results / f"{arm}-{seed}"
        place.mkdir(parents=True, exist_ok=True)
        model.write_text(place / "config.json", (ROOT / cfg.out / "config.json").read_text())
        lines = (ROOT / cfg.out / "metrics.jsonl").read_text().splitlines()
        model.write_text(place / "metrics.jsonl", "".join(thin(line) + "\n" for line in lines))

    # What each arm did on each test task.
    record = data.read_json(folder / "settings.json")["settings"]       # of the last study's evaluation
    settings = evaluation.Settings(**record | {"tasks": tasks, "probes": tasks})
    tasks = data.load(settings.data, settings.split, settings.turns, settings.resolution, settings.tasks)
    judge = reward.load(settings.judge, torch.device("cpu"))
    scores, loras = {}, {f"{arm}-{seed}": Path(cfg.out).name for (arm, seed), cfg in configs.items()}
    for run, lora in {"base": "base", **loras}.items():
        found = evaluation.evaluate(None, judge, tasks, settings.turns, settings.denoise, settings.seeds,
                                    settings.batch, settings.probes, folder / "arms" / lora, progress=False)
        scores[run] = per_task(found)
    model.write_text(results / SCORES, json.dumps(scores, separators=(",", ":")))

    seeds, steps = sorted({seed for _, seed in configs}), max(cfg.steps for cfg in configs.values())
    more = {"compare": study.compare or [list(study.arms)], "name": name, "seeds": seeds, "steps": steps,
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
    return json.dumps(row, separators=(",", ":"))


def per_task(scores):
    """What an arm did on each test task with one noise seed: {what: a text or numbers a turn, as `pack` makes them}."""
    values = {"success": scores.success, "consistency": scores.consistency.mean(3)}
    values |= {name: value for name, value in scores.measured.items() if name in MEASURED}
    return {name: pack(value[0].double()) for name, value in values.items()}


# ---------------------------------------------------------------------------------------------------------- the command

def only(study, arms):
    """A study of some of its arms. ValueError if it has no such arm."""
    for arm in arms:
        if arm not in study.arms:
            raise ValueError(f"--arms {arm} is no arm of this study: name some of {', '.join(study.arms)}")
    groups = [[arm for arm in group if arm in arms] for group in study.compare or [list(study.arms)]]
    return study._replace(arms={arm: study.arms[arm] for arm in arms}, compare=[group for group in groups if group])


def run(name, seeds, jobs, tasks, arms=""):
    """Train and evaluate the arms of a study, as far as that is not done, and gather the evidence."""
    study, configs = STUDIES[name], {}
    study = only(study, arms.split(",")) if arms else study
    for seed in range(seeds):
        for arm, words in study.arms.items():
            cfg = train.parse(all_words(words, seed))
            train.check(cfg)
            configs[arm, seed] = cfg
    check_kept(name, study, seeds, tasks)
    commits = note_commit(name)

    # Seed by seed, so that a study that is stopped early has whole sets of arms.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = max(1, cores // jobs) if jobs > 1 else 0
    work_through([train_job(name, arm, seed, cfg) for (arm, seed), cfg in configs.items()], jobs, threads)
    evaluations = []
    for arm in study.arms:
        of_arm = {seed: configs[arm, seed] for seed in range(seeds)}
        evaluations.append(eval_job(name, arm, of_arm, tasks, jobs))
    work_through(evaluations, 1, threads)

    cosines = measure_cosines(name, configs) if study.cosine else {}
    gather(name, study, configs, tasks, commits, cosines)


def parse(argv=None):
    parser = data.Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter,
                         usage="%(prog)s [report] NAME [--seeds 3] [--jobs 1] [--tasks 500] [--arms A,B]")
    parser.add_argument("words", nargs="+", metavar="NAME", help=f"one of {', '.join(STUDIES)}")
    parser.add_argument("--arms", help="only these, by commas (default: all of the study)")
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
        if flag != "arms":
            data.check_bounds(f"--{flag}", value, {"at least": 1})
    return names[0], reports, {"seeds": 3, "jobs": 1, "tasks": 500} | given


def main(argv=None):
    name, reports, options = parse(argv)
    if not reports:
        run(name, **options)
    print(study_report.write_report(ROOT / RESULTS / name))


if __name__ == "__main__":
    data.run_main(main)
