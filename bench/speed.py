"""Where a training step spends its time on this machine, and how fast a full-size editor would be.

    python bench/speed.py                              default steps of both algorithms by parts -> out/speed.json
    python bench/speed.py --quick                      one step of each, nothing about how it grows
    python bench/speed.py --against OLD                default steps of the checkout in OLD and of this one, in turns
    python bench/speed.py --family kontext --micro 2   full-size editors with random weights: wants a GPU of 80 GB
    python bench/speed.py --family qwen --tiny         the same code on tiny models, anywhere: no figures

On a GPU all families of full-size editors (bench/fullsize.py) are measured unless some are named; each gives a Markdown
row for docs/editors.md. On a CPU CPU seconds count: other programs on the machine disturb them little.
"""
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from argparse import RawDescriptionHelpFormatter
from collections import Counter
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # so that it runs from any folder

import torch

import data
import model
import train
from bench import fullsize
from bench.fullsize import clocks, forget_peak, one_forward, peak_memory, rollout_and_update

PARTS = ["text", "encode", "velocity", "decode", "judge", "update forward", "backward", "everything else"]
# What is measured of how a step grows: small steps, each with one number changed.
POINT = dict(tasks=4, group=8, turns=3, denoise=6, resolution=48)
GROWTH = [{}, dict(turns=1), dict(turns=2), dict(group=4), dict(group=16), dict(denoise=12), dict(resolution=96)]
# A train.py, of any age, that says before every step what CPU time it has taken, and goes on when it is told to.
CHILD = """
import os, runpy, sys, time
sys.path.insert(0, os.getcwd())
import rollout
work = rollout.rollout
def wait(*given, **named):
    print("CPU", time.process_time(), flush=True)
    if not sys.stdin.readline():
        os._exit(0)                        # whoever measures is gone
    return work(*given, **named)
rollout.rollout = wait
sys.argv = ["train.py", *sys.argv[1:]]
runpy.run_path("train.py", run_name="__main__")
"""


# ---------------------------------------------------------------------------------------------------- a step, by parts

class Enough(Exception):
    """Ends a training that has been watched for long enough."""


class Clock:
    """CPU and wall seconds of named parts. A part inside another one is taken out of it."""

    def __init__(self, device):
        self.device, self.names = device, ["everything else"]
        self.reset()

    def reset(self):
        self.cpu, self.wall, self.calls = Counter(), Counter(), Counter()
        self.last = clocks(self.device)

    def charge(self):
        """What has passed since the last call belongs to the innermost part."""
        now = clocks(self.device)
        self.cpu[self.names[-1]] += now[0] - self.last[0]
        self.wall[self.names[-1]] += now[1] - self.last[1]
        self.last = now

    @contextmanager
    def part(self, name):
        self.charge()
        self.names.append(name)
        try:
            yield
        finally:
            self.charge()
            self.calls[self.names.pop()] += 1

    def around(self, name, work):
        """work, with its time counted as `name`."""
        def counted(*given, **named):
            with self.part(name):
                return work(*given, **named)
        return counted


def watch(algo, steps, *flags):
    """The training of an algorithm, `steps` steps after one to warm up -> {part: seconds, ...} of a step."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock, prepare, sample, seen, result = Clock(device), train.prepare, train.rollout, [], {}
    forget_peak(device)

    def watched_prepare(cfg):
        run = prepare(cfg)
        velocity = run.editor.velocity
        run.editor.condition = clock.around("text", run.editor.condition)
        run.editor.encode = clock.around("encode", run.editor.encode)
        run.editor.decode = clock.around("decode", run.editor.decode)
        run.judge.start = clock.around("judge", run.judge.start)

        def counted_velocity(*given):
            with clock.part("update forward" if "update" in clock.names else "velocity"):
                return velocity(*given)
        run.editor.velocity = counted_velocity
        return run

    def watched_rollout(*given, **named):
        clock.charge()
        seen.append(clock)
        if len(seen) == 2:
            clock.reset()
        if len(seen) == steps + 2:
            raise Enough
        return sample(*given, **named)

    # train.main() itself runs, with a clock around what it calls.
    with tempfile.TemporaryDirectory() as folder, ExitStack() as patches:
        patch = lambda *what: patches.enter_context(mock.patch.object(*what))
        patch(train, "prepare", watched_prepare)
        patch(train, "rollout", watched_rollout)
        patch(train, "update", clock.around("update", train.update))
        patch(train, "collect", clock.around("judge", train.collect))
        patch(torch.Tensor, "backward", clock.around("backward", torch.Tensor.backward))
        try:
            train.main(train.parse(["--algo", algo, "--val-tasks", "0", "--out", folder + "/run", *flags]))
        except Enough:
            pass

    # The update's own time is what is neither forward nor backward: the loss, the optimizer.
    for name, spent in (("cpu", clock.cpu), ("wall", clock.wall)):
        spent["everything else"] += spent.pop("update")
        result[name] = {part: spent[part] / steps for part in PARTS} | {"step": spent.total() / steps}
    forwards = clock.calls["velocity"] + clock.calls["update forward"]
    seconds = clock.wall["velocity"] + clock.wall["update forward"]
    return result | {"forwards_per_second": forwards / seconds, "peak_GB": peak_memory(device)}


def table(results):
    """{algo: what `watch` returns} as lines."""
    heads = [f"{algo + ' ' + kind:>12}" for algo in results for kind in ("cpu", "wall")]
    lines = [f"{'seconds a step':20}" + "".join(heads)]
    for part in [*PARTS, "step"]:
        cells = [f"{result[kind][part]:12.2f}" for result in results.values() for kind in ("cpu", "wall")]
        lines.append(f"{part:20}" + "".join(cells))
    for name in ("forwards_per_second", "peak_GB"):
        lines.append(f"{name:20}" + "".join(f"{result[name]:24.2f}" for result in results.values()))
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------- two checkouts

def against(theirs, ours, algo, steps):
    """Default steps of two checkouts in turns, one thread each -> CPU seconds of each step, ratio of the sums."""
    with tempfile.TemporaryDirectory() as out:
        both = {"theirs": start_child(theirs, algo, f"{out}/theirs"), "ours": start_child(ours, algo, f"{out}/ours")}
        seconds = {"theirs": [], "ours": []}
        try:
            last = {name: next_mark(child) for name, child in both.items()}
            for i in range(steps + 1):
                for name, child in both.items():
                    child.stdin.write("\n")
                    child.stdin.flush()
                    mark = next_mark(child)
                    seconds[name].append(mark - last[name])
                    last[name] = mark
        finally:
            for child in both.values():
                child.kill()
                child.communicate()

    # The first step of each has warmed up.
    theirs, ours = seconds["theirs"][1:], seconds["ours"][1:]
    ratios = [b / a for a, b in zip(theirs, ours)]
    ratio = sum(ours) / sum(theirs)
    print(f"{algo}: {statistics.mean(theirs):.2f} -> {statistics.mean(ours):.2f} CPU seconds a step, ratio {ratio:.3f} "
          f"({min(ratios):.3f} to {max(ratios):.3f} in {steps} steps)", flush=True)
    return {"theirs": theirs, "ours": ours, "ratio": ratio}


def start_child(folder, algo, out):
    words = ["--algo", algo, "--steps", "1000", "--val-tasks", "0", "--out", out]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([sys.executable, "-c", CHILD, *words], cwd=folder, env=environment, text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def next_mark(child):
    """The CPU time that a child has taken when its next step begins. ValueError if it ends before."""
    for line in child.stdout:
        if line.startswith("CPU "):
            return float(line.split()[1])
    raise ValueError(f"train.py has ended before its next step: run it by hand to see why ({' '.join(child.args[3:])})")


# ------------------------------------------------------------------------------------------- growth, and the command

def growth(device):
    """How rollout and update of the embedded editor grow with K, G, T and resolution, from one small step."""
    rows = []
    for algo in ("grpo", "nft"):
        for change in GROWTH:
            point = POINT | change
            flags = {"algo": algo, "updates": 1} | point
            del flags["resolution"]                              # which is that of the tasks
            cfg = fullsize.configure(flags)
            editor, _ = train.load_editor(cfg, device, [])
            size = point["resolution"], point["resolution"]
            rollout_and_update(editor, cfg, size)                # warms up
            rows.append({"algo": algo} | point | rollout_and_update(editor, cfg, size))
            words = ", ".join(f"{name} {value}" for name, value in change.items()) or f"{POINT}"
            print(f"{algo:5} {words}: rollout {rows[-1]['rollout_cpu']:.2f}, update {rows[-1]['update_cpu']:.2f} "
                  "CPU seconds", flush=True)
    return rows


def parse(argv=None):
    parser = data.Parser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one step of each algorithm, nothing about growth")
    parser.add_argument("--against", metavar="OLD", help="a checkout to compare default steps with")
    parser.add_argument("--family", nargs="+", choices=fullsize.FAMILIES, default=[], help="full-size editors")
    parser.add_argument("--tiny", action="store_true", help="tiny models: runs the code, its figures mean nothing")
    parser.add_argument("--out", default="out/speed.json", help="where all numbers go")
    for name, value, help in (("steps", 4, "steps of the embedded world, after one to warm up"),
                              ("resolution", 512, "side of a full-size editor's pictures in pixels"),
                              ("turns", 3, "K of theirs"), ("tasks", 2, "B"), ("group", 4, "G"),
                              ("micro", 4, "rows in one forward")):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{help} (default: {value})")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.family and device.type == "cpu" and not args.tiny:
        raise ValueError("--family wants a CUDA GPU; --tiny runs the same code on tiny models")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads", flush=True)
    result = {"device": name, "torch": torch.__version__, "threads": torch.get_num_threads()}
    if args.against:
        here = Path(__file__).resolve().parent.parent
        result["against"] = {algo: against(args.against, here, algo, args.steps) for algo in ("grpo", "nft")}
    elif not args.family:
        steps = 1 if args.quick else args.steps
        result["steps"] = {algo: watch(algo, steps) for algo in ("grpo", "nft")}
        print(table(result["steps"]))
        cfg = fullsize.configure({})
        editor, _ = train.load_editor(cfg, device, [])
        one = result["forward"] = one_forward(editor, (48, 48), train.divide(cfg, 0, 1).micro)
        print(f"a forward of {one['rows']} rows: {one['seconds']:.4f} s, {one['share']:.0%} of the machine's "
              f"{one['machine_FLOP_per_second'] / 1e9:.0f} GFLOP/s in the same matrix products")
        if not args.quick:
            result["growth"] = growth(device)
    if device.type == "cuda" and not (args.family or args.against or args.quick):
        args.family = list(fullsize.FAMILIES)
    if args.family:
        result["fullsize"] = fullsize.measure(args, device)
    model.write_text(Path(args.out), json.dumps(result, indent=1))


if __name__ == "__main__":
    data.run_main(main)
