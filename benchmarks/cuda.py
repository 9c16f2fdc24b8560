"""What a GPU makes of this program: one command that tries everything and writes cuda.json and cuda.txt.

    python benchmarks/cuda.py [--data DIR] [--out DIR] [--parts profile bits ...] [--device cpu --steps 2]

profile   of each network: kernels and launches of a step, the slowest kernels, the gradient of the first convolution's weight;
          that no step of an epoch but the first waits for the GPU; gradients beside the CPU's
bits      of each network and precision, in short trainings: the same command twice, killed and resumed, and without a recorded
          step: the same bits?
blog      seconds of the `blog` recipe, its command's wall time, and `strong` per 10 000 steps
loops     the same steps eager, compiled, in a user's plain loop and with a DataLoader; share of the matrix-multiply rate; memory
together  1, 2, 4 and 8 commands in one run's folder at once: examples/s in all
rest      the tests for CUDA; torchrun with one process; predict.py on an hour of sound beside the CPU

Each part is a process with a time limit of its own, and keeps what it has when it fails; the next one goes on. All
should take eight minutes on a large card (an estimate). Without --data, noise stands for the 2000 clips (0.9 GB): no figure here
but a loss depends on them.
--device cpu with few --steps shows that the script itself runs.
"""
import argparse
import contextlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
import wave
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import torchaudio
from torch.utils.flop_counter import FlopCounterMode

PROJECT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(PROJECT), str(PROJECT / "benchmarks")]
import dsets
import models
import speed
import training
from util import checkpoint as checkpoints
from util import device as machine
from util import rundir
from util.config import Config, recipe_flags
from util.errors import exit_on_error, write_atomically
from util.tables import COLUMNS, ESC50_TABLE

LIMITS_S = {"profile": 70, "bits": 130, "blog": 130, "loops": 80, "together": 100, "rest": 120}
RECIPES = ("blog", "strong")
EAGER = """
import sys
import training
from util import device
device.Recorder.WARM_UP = 10 ** 9
sys.exit(training.main(sys.argv[1:]))
"""


# --- tools ------------------------------------------------------------------------------------------------------------

def write_noise_root(root: Path, clips_per_class: int) -> None:
    """Clips of 5 s of noise, once: 50 classes in 5 folds, the first ten ESC-10's."""
    if (root / ESC50_TABLE).exists():  # it is written last
        return
    for folder in ("audio", "meta"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    rows = [(f"{number}-{target}.wav", 1 + number % 5, target, f"noise_{target}", target < 10)
            for target in range(50) for number in range(clips_per_class)]
    noise = (3000 * np.random.default_rng(0).standard_normal(dsets.CLIP_SAMPLES)).astype("<i2")
    for number, row in enumerate(rows):
        write_wav(root / "audio" / row[0], np.roll(noise, 100 * number))
    pd.DataFrame(rows, columns=COLUMNS).to_csv(root / ESC50_TABLE, index=False)


def write_wav(path: Path, samples: np.ndarray) -> None:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, dsets.SAMPLE_RATE, len(samples), "NONE", ""))
        file.writeframes(samples.tobytes())


def command(*arguments, program=("training.py",)) -> subprocess.CompletedProcess:
    """A program of the project, to its end; raises with its last words if it fails."""
    words = [sys.executable, *program, *map(str, arguments)]
    done = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, arguments))}: status {done.returncode}: {(done.stderr or done.stdout)[-600:]}")
    return done


class Results:
    """A part's results, written after each of them: a part that is stopped keeps what it has."""

    def __init__(self, path: Path):
        self.path, self.content, self.lock = path, {}, threading.Lock()

    def attempt(self, name: str, function, *arguments) -> None:
        """Keep what function(*arguments) returns, or what went wrong, and the seconds it took."""
        begin = time.perf_counter()
        try:
            result = function(*arguments)
        except Exception as error:
            result = f"failed: {error!r}"[-700:]
        with self.lock:
            self.content[name] = {"result": result, "s": time.perf_counter() - begin}
            write_atomically(self.path, lambda part: part.write_text(json.dumps(self.content)))


def rows_of(folder: Path, phase: str) -> list[dict]:
    return [row for row in rundir.read_metrics(folder) if row["phase"] == phase]


def random_dataset(args, params: dsets.FeatureParams = speed.PARAMS):
    """Features of ESC-50's training folds on the device, as training.py holds them."""
    return speed.random_dataset(torch.device(args.device), 1600 if args.device == "cuda" else 64, params)


def auto_precision(args) -> str:
    return machine.choose_precision("auto", torch.device(args.device))


def steps_of(args, flags: dict, precision: str, recorded: bool = True) -> speed.Steps:
    config = Config(**flags)
    dataset = random_dataset(args, training.feature_params(config))
    return speed.Steps(config, dataset, dataset.rows, (0.0, 1.0), precision, torch.device(args.device), recorded)


# --- the parts --------------------------------------------------------------------------------------------------------

def profile(args, results: Results) -> None:
    for name in models.MODELS:
        results.attempt(f"{name}: gradients beside the CPU's, largest relative difference", gradient_difference, args, name)
    for name, recipe in itertools.product(models.MODELS, RECIPES):
        results.attempt(f"{name} {recipe}", profile_steps, args, name, recipe)
        if args.device == "cuda":
            results.attempt(f"{name} {recipe}: an epoch waits nowhere", waits_nowhere, args, name, recipe)


def profile_steps(args, name: str, recipe: str) -> dict:
    steps = steps_of(args, {"model": name, **recipe_flags(recipe, name)}, auto_precision(args), recorded=False)
    steps(3)
    seconds = steps(args.steps)
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * (args.device == "cuda")
    with torch.profiler.profile(activities=kinds, record_shapes=True) as profiled:
        steps(args.steps)
    kernels = [event for event in profiled.events()
               if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation]
    launches = [event for event in profiled.events() if re.match("cu(da)?Launch|cudaMemcpy|cudaMemset", event.name)]
    times = {}
    for event in kernels:
        times[event.name[:90]] = times.get(event.name[:90], 0) + event.device_time_total / args.steps
    stems = [event.device_time_total / event.count for event in profiled.key_averages(group_by_input_shape=True)
             if event.key == "aten::convolution_backward" and event.input_shapes[1][1] == 1]
    return {"kernels a step": len(kernels) / args.steps, "launches a step": len(launches) / args.steps,
            "kernels' ms a step": sum(times.values()) / 1000, "eager ms a step": 1000 * seconds / args.steps,
            "first convolution backward, ms": sum(stems) / 1000,
            "slowest kernels, us a step": dict(sorted(times.items(), key=lambda item: -item[1])[:8])}


def waits_nowhere(args, name: str, recipe: str) -> bool:
    """An epoch of recorded steps, and the augmentation between them, after the first batch; fails at what waits."""
    steps = steps_of(args, {"model": name, **recipe_flags(recipe, name)}, auto_precision(args))
    steps(4)

    def watch(batches):
        yield next(batches)
        torch.cuda.set_sync_debug_mode("error")
        yield from batches
        torch.cuda.set_sync_debug_mode("default")
    try:
        steps(100, watch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return True


def gradient_difference(args, name: str) -> float:
    """The largest relative difference of a parameter's gradient in fp32, in a first step, from the CPU's."""
    examples = torch.randn(32, *dsets.FeatureParams().input_shape, generator=torch.Generator().manual_seed(0))
    targets, gradients = torch.arange(32), []
    for device in ("cpu", args.device):
        torch.manual_seed(0)
        model = models.build_model(name).to(device, memory_format=torch.channels_last)
        losses, _ = training.forward(model, examples.to(device), targets.to(device), "fp32")
        losses.mean().backward()
        gradients.append([parameter.grad.cpu().double() for parameter in model.parameters()])
    return max(((one - other).norm() / one.norm()).item() for one, other in zip(*gradients))


def bits(args, results: Results) -> None:
    cases = [(name, recipe, precision, ()) for name, (recipe, precision) in itertools.product(
        models.MODELS, dict.fromkeys([("blog", "fp32"), ("strong", auto_precision(args)), ("strong", "fp32")]))]
    compiled = ("cnn8", "strong", auto_precision(args), ("--compile",))  # it takes longest
    with ThreadPoolExecutor(6 if args.device == "cuda" else 1) as pool:
        for case in [compiled, *cases] if args.device == "cuda" else cases[:1]:
            pool.submit(results.attempt, " ".join([*case[:3], *case[3]]), same_bits, args, *case)


def same_bits(args, name: str, recipe: str, precision: str, more: tuple) -> dict:
    flags = ["--data", args.data, "--esc10", "--device", args.device, "--model", name, "--recipe", recipe, *more,
             "--precision", precision, "--epochs", 2, "--views", 5 if args.device == "cuda" else 1]
    base = args.out / "bits" / "-".join([name, recipe, precision, *more])
    dirs = {kind: base / kind for kind in ("first", "again", "killed", "eager")}
    for kind in ("first", "again"):
        command(*flags, "--run-dir", dirs[kind])
    command(*flags, "--run-dir", dirs["eager"], program=("-c", EAGER))
    words = [sys.executable, "training.py", *map(str, flags), "--run-dir", str(dirs["killed"])]
    with subprocess.Popen(words, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        next((line for line in process.stdout if line.lstrip().startswith("1/")), None)
        process.send_signal(signal.SIGKILL)
    command("--resume", dirs["killed"])
    first = result_of(dirs["first"])
    same = {kind: result_of(folder) == first for kind, folder in dirs.items() if kind != "first"}
    shutil.rmtree(base)  # checkpoints of cnn4 are large
    return same


def result_of(run_dir: Path) -> tuple:
    """All that must be the same: metrics but for the seconds, and every tensor of the checkpoint."""
    folder = next(run_dir.glob("seed-*/fold-*"))
    checkpoint = checkpoints.load_tensors(folder / "last.pt")
    tensors = torch.utils._pytree.tree_leaves([checkpoint[name] for name in ("model", "raw_model", "optimizer", "predictions")])
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in rundir.read_metrics(folder)]
    return rows, [each.numpy().tobytes() if isinstance(each, torch.Tensor) else each for each in tensors]


def blog(args, results: Results) -> None:
    """The command as people run it, on 1600 training clips: epochs of 8000 examples."""
    for (recipe, epochs), name in itertools.product([("blog", 40), ("strong", 8)], models.MODELS):
        results.attempt(f"{name} {recipe}", run_command, args, name, recipe, epochs if args.device == "cuda" else 1)


def run_command(args, name: str, recipe: str, epochs: int) -> dict:
    run_dir = args.out / "blog" / f"{name}-{recipe}"
    begin = time.perf_counter()
    output = command("--data", args.noise, "--device", args.device, "--model", name, "--recipe", recipe, "--run-dir", run_dir,
                     "--epochs", epochs).stdout
    wall = time.perf_counter() - begin
    folder = run_dir / "seed-42" / "fold-1"
    seconds = [row["seconds"] for row in rows_of(folder, "training")]
    steps = -(-5 * (1600 if args.device == "cuda" else 50) // 32)  # an epoch
    return {"epochs": epochs, "training s": sum(seconds), "training s per 10 000 steps": 10_000 * sum(seconds) / epochs / steps,
            "first epoch s": seconds[0], "median later epoch s": statistics.median(seconds[1:] or seconds),
            "validation s": sum(row["seconds"] for row in rows_of(folder, "validation")), "command s": wall,
            "its own words": next((line for line in output.splitlines() if "s of training" in line), ""),
            "MB of last.pt and best.pt": [(folder / file).stat().st_size / 1e6 for file in ("last.pt", "best.pt")]}


def loops(args, results: Results) -> None:
    precision = auto_precision(args)
    results.attempt(f"matmul FLOP/s, {precision}", matmul_rate, torch.device(args.device), precision)
    rate = results.content[f"matmul FLOP/s, {precision}"]["result"]
    rate = rate if isinstance(rate, float) else math.nan  # it failed
    for name in models.MODELS:
        for kind, recorded, compiled in (("recorded", True, False), ("eager", False, False), ("recorded, --compile", True, True)):
            if name == "cnn8" or not compiled:
                results.attempt(f"{name} {kind}", time_steps, args, name, precision, recorded, compiled, rate)
        with as_users_programs():
            results.attempt(f"{name} plain loop", plain_loop, args, name)
            results.attempt(f"{name} DataLoader", loader_loop, args, name)


def time_steps(args, name: str, precision: str, recorded: bool, compiled: bool, matmul: float) -> dict:
    with FlopCounterMode(display=False) as flops:
        F.cross_entropy(models.build_model(name)(torch.zeros(1, *dsets.FeatureParams().input_shape)),
                        torch.zeros(1, dtype=torch.long)).backward()
    if args.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    count = 500 if args.device == "cuda" else args.steps
    steps = steps_of(args, {"model": name, "compile": compiled}, precision, recorded)
    steps(8)
    seconds = steps(count)
    result = {"s per 10 000 steps": 10_000 * seconds / count, "steps": count,
              "share of the matmul rate": 32 * flops.get_total_flops() * count / seconds / matmul}
    if args.device == "cuda":
        result["peak MB, features among them"] = torch.cuda.max_memory_reserved() / 1e6
    return result


@contextlib.contextmanager
def as_users_programs():
    """torch as it is where nobody asks for the same bits."""
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.allow_tf32 = True
    yield
    speed.as_training_py()


def matmul_rate(device: torch.device, precision: str) -> float:
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    rates = []
    for _ in range(6):
        speed.synchronize(device)
        begin = time.perf_counter()
        for _ in range(4):
            a @ a
        speed.synchronize(device)
        rates.append(4 * 2 * size ** 3 / (time.perf_counter() - begin))
    return statistics.median(rates)


def plain_loop(args, name: str) -> dict:
    """What a user would write with features on the device: crops and masks item by item, fp32, no recording."""
    steps = 300 if args.device == "cuda" else args.steps
    dataset, device = random_dataset(args), torch.device(args.device)
    model = models.build_model(name).to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), 3e-4, weight_decay=1e-3)
    masks = [torchaudio.transforms.FrequencyMasking(27), torchaudio.transforms.TimeMasking(100)] * 2

    def batch():
        examples, indices = [], torch.randint(len(dataset.rows), (32,)).tolist()
        for index in indices:
            low, first = np.random.randint(29), np.random.randint(48)
            example = (dataset.features[index][:, low:low + 100, first:first + 384] + 10) / 20
            for mask in masks:
                example = mask(example)
            examples.append(example)
        return torch.stack(examples), dataset.targets[indices].to(device)

    def step():
        examples, targets = batch()
        loss = F.cross_entropy(model(examples), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()
    for _ in range(3):
        step()
    return {"s per 10 000 steps": 10_000 / steps * speed.seconds_of(lambda: [step() for _ in range(steps)]), "steps": steps}


def loader_loop(args, name: str) -> dict:
    """The same with a DataLoader whose workers decode, transform, crop and mask (speed.py's plain loop)."""
    steps = 100 if args.device == "cuda" else 1
    dataset, device = dsets.ESC50(args.noise), torch.device(args.device)
    model = models.build_model(name).to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), 3e-4, weight_decay=1e-3)
    clips, _ = dataset.split(1)
    batches = iter(torch.utils.data.DataLoader(speed.PlainDataset(dataset, clips, 5), 32, shuffle=True, drop_last=True,
                                               num_workers=min(8, os.cpu_count()), prefetch_factor=1))

    def step():
        examples, targets = next(batches)
        loss = F.cross_entropy(model(examples.to(device)), targets.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()
    step()
    return {"s per 10 000 steps": 10_000 / steps * speed.seconds_of(lambda: [step() for _ in range(steps)]), "steps": steps}


def together(args, results: Results) -> None:
    seeds = range(4 if args.device == "cuda" else 2)
    results.attempt(f"{len(seeds)} seeds in one command", lambda: command(
        "--data", args.noise, "--device", args.device, "--run-dir", args.out / "together" / "in one", "--epochs",
        10 if args.device == "cuda" else 1, "--seed", *seeds) and "done")
    for count in (4, 1, 2, 8) if args.device == "cuda" else (1, 2):
        results.attempt(f"{count} commands", run_together, args, count)


def run_together(args, count: int) -> dict:
    epochs, examples = (10, 8000) if args.device == "cuda" else (1, 250)
    run_dir = args.out / "together" / str(count)

    def train(seed: int) -> None:
        command("--data", args.noise, "--device", args.device, "--run-dir", run_dir, "--epochs", epochs, "--seed", seed)
    with ThreadPoolExecutor(count) as pool:
        wall = speed.seconds_of(lambda: list(pool.map(train, range(count))))
    later = [[row["seconds"] for row in rows_of(folder, "training")[epochs // 2:]] for folder in run_dir.glob("seed-*/fold-*")]
    own = [examples / statistics.median(seconds) for seconds in later]  # of epochs that need not be at the same time
    return {"wall s": wall, "examples/s of all, start included": count * epochs * examples / wall,
            "sum of each command's own examples/s, later half of its epochs": sum(own)}


def rest(args, results: Results) -> None:
    folder = args.out / "rest"
    folder.mkdir()
    run_dir, recording = folder / "predict", folder / "long.wav"
    flags = ["--data", args.data, "--esc10", "--device", args.device, "--epochs", 1, "--precision", "fp32", "--views", 1]
    results.attempt("torchrun with one process", lambda: command(
        "--standalone", "--nproc-per-node=1", "training.py", *flags, "--run-dir", folder / "torchrun",
        program=("-m", "torch.distributed.run")) and "done")
    results.attempt("a run to predict with", lambda: command(*flags, "--run-dir", run_dir) and "done")
    seconds = 3600 if args.device == "cuda" else 20
    write_wav(recording, (3000 * np.random.default_rng(0).standard_normal(seconds * dsets.SAMPLE_RATE)).astype("<i2"))
    said = []
    for device in ("cpu", args.device):
        def predict():
            output = command(run_dir, recording, "--device", device, "--format", "json", "--top", 50,
                             program=("predict.py",)).stdout
            said.append({(window["start_s"], guess["class"]): guess["probability"]
                         for window in json.loads(output)[0]["windows"] for guess in window["top"]})
        results.attempt(f"predict.py --device {device} on {seconds} s", predict)
    results.attempt("largest difference of a probability",
                    lambda: max(abs(value - said[1][key]) for key, value in said[0].items()))
    results.attempt("tests for CUDA", lambda: command("-q", "tests/test_cuda.py", "-p", "no:cacheprovider",
                                                      program=("-m", "pytest")).stdout.splitlines()[-1])


# --- the command ------------------------------------------------------------------------------------------------------

PARTS = {"profile": profile, "bits": bits, "blog": blog, "loops": loops, "together": together, "rest": rest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="an ESC-50 folder for the bits and the rest (default: noise)")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--out", type=Path, default=Path("cuda-bench"), help="folder of what is written (default cuda-bench)")
    parser.add_argument("--steps", type=int, default=20, help="profiled steps (default 20)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default all, in this order")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # in a process of its own: prints its JSON
    args = parser.parse_args()
    exit_on_error("cuda.py", machine.choose_device, args.device)
    args.out = args.out.resolve()
    args.noise = args.out / f"noise-{args.device}"
    args.data = args.data.resolve() if args.data else args.noise
    if args.part:
        speed.start_process(torch.device(args.device))
        PARTS[args.part](args, Results(args.out / f"{args.part}.json"))
        return

    args.out.mkdir(parents=True, exist_ok=True)
    write_noise_root(args.noise, 40 if args.device == "cuda" else 2)
    for root, recipe in itertools.product({args.noise, args.data}, RECIPES):  # no part shall count its features
        dsets.ESC50(root, params=training.feature_params(Config(**recipe_flags(recipe, "cnn8"))))
    report = args.out / "cuda.json"
    results = json.loads(report.read_text()) if report.exists() else {}
    environment = rundir.environment(world_size=1) | {"torch": torch.__version__, "cuda": torch.version.cuda}
    if results.get("environment") != environment:  # else parts of an earlier command stay
        results = {"environment": environment}
    for part in args.parts:
        words = [sys.executable, __file__, "--part", part, "--device", args.device, "--out", args.out, "--steps", args.steps,
                 "--data", args.data]
        kept = args.out / f"{part}.json"
        kept.unlink(missing_ok=True)
        shutil.rmtree(args.out / part, ignore_errors=True)  # an earlier command's trainings
        begin, output = time.perf_counter(), open(args.out / f"{part}.log", "wb")
        # a session of its own: a part that runs too long ends with all its processes (but torchrun's, which have theirs)
        with output, subprocess.Popen(list(map(str, words)), stdout=output, stderr=output, start_new_session=True,
                                      env=os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}) as process:
            try:
                status = process.wait(timeout=LIMITS_S[part] if args.device == "cuda" else 600)
            except subprocess.TimeoutExpired:
                status = "stopped at its time limit"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        results[part] = {"status": status, "s": time.perf_counter() - begin}
        results[part] |= json.loads(kept.read_text()) if kept.exists() else {}
        write_atomically(report, lambda part: part.write_text(json.dumps(results, indent=2) + "\n"))
        (args.out / "cuda.txt").write_text("\n".join(page(results)) + "\n")
        print("\n".join(page({part: results[part]})), flush=True)


def page(results: dict, indent: str = "") -> list[str]:
    lines = []
    for name, value in results.items():
        seconds = ""
        if isinstance(value, dict) and "result" in value:
            value, seconds = value["result"], f" ({value['s']:.1f} s)"
        if isinstance(value, dict):
            lines += [f"{indent}{name}", *page(value, indent + "  ")]
        else:
            lines.append(f"{indent}{name:<52} {f'{value:.5g}' if isinstance(value, float) else value}{seconds}")
    return lines


if __name__ == "__main__":
    main()
