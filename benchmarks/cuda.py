"""What a GPU makes of this program: one command that tries everything and writes cuda.json and cuda.txt.

    python benchmarks/cuda.py [--data DIR] [--out DIR] [--parts profile bits ...] [--device cpu --steps 2]

profile   of each network: kernels and launches of a step, the slowest kernels, the gradient of the first convolution's weight;
          that no step of an epoch but the first waits for the GPU; gradients beside the CPU's
bits      of each network and precision, in short trainings: the same command twice, killed and resumed, and without a recorded
          step: the same bits?
blog      seconds of the `blog` recipe, its command's wall time, peak memory, and `strong` per 10 000 steps
loops     the same steps eager, compiled, in a user's plain loop and with a DataLoader; share of the matrix-multiply rate
together  1, 2, 4 and 8 commands in one run's folder at once: examples/s in all
rest      the tests marked cuda; torchrun with one process; predict.py on an hour of sound beside the CPU

Each part is a process with a time limit of its own; where one fails, the next goes on. About eight minutes on an H100.
Without --data, short noise stands for the 2000 clips: no figure here but a loss depends on them. --device cpu with few --steps
shows that the script itself runs.
"""
import argparse
import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
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
from util.config import STRONG, Config
from util.tables import COLUMNS

LIMITS_S = {"profile": 80, "bits": 140, "blog": 150, "loops": 120, "together": 100, "rest": 120}
RECIPES = {"blog": {}, "strong": STRONG}
EAGER = """
import sys
import training
from util import device
device.Recorder.WARM_UP = 10 ** 9
sys.exit(training.main(sys.argv[1:]))
"""


# --- tools ------------------------------------------------------------------------------------------------------------

def write_noise_root(root: Path, clips_per_class: int) -> None:
    """Clips of a tenth of a second of noise (padded when they are read): 50 classes in 5 folds, the first ten ESC-10's."""
    for folder in ("audio", "meta"):
        (root / folder).mkdir(parents=True)
    rows = [(f"{number}-{target}.wav", 1 + number % 5, target, f"noise_{target}", target < 10)
            for target in range(50) for number in range(clips_per_class)]
    for seed, row in enumerate(rows):
        samples = (3000 * np.random.default_rng(seed).standard_normal(dsets.SAMPLE_RATE // 10)).astype("<i2")
        write_wav(root / "audio" / row[0], samples)
    pd.DataFrame(rows, columns=COLUMNS).to_csv(root / "meta" / "esc50.csv", index=False)


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


def rows_of(folder: Path, phase: str) -> list[dict]:
    return [row for row in rundir.read_metrics(folder) if row["phase"] == phase]


def random_dataset(args):
    """Features of ESC-50's training folds on the device, as training.py holds them."""
    return speed.random_dataset(torch.device(args.device), 1600 if args.device == "cuda" else 64)


def steps_of(args, recipe: dict, precision: str, recorded: bool = True) -> speed.Steps:
    dataset = random_dataset(args)
    return speed.Steps(Config(**recipe), dataset, dataset.rows, (0.0, 1.0), precision, torch.device(args.device), recorded)


# --- the parts --------------------------------------------------------------------------------------------------------

def profile(args) -> dict:
    results = {}
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * (args.device == "cuda")
    for name, recipe in itertools.product(models.MODELS, ("blog", "strong")):
        take = steps_of(args, {"model": name, **RECIPES[recipe]}, "bf16", recorded=False)
        take(3)
        with torch.profiler.profile(activities=kinds, record_shapes=True) as profiled:
            seconds = take(args.steps)
        kernels = [event for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        launches = [event for event in profiled.events() if re.match("cu(da)?Launch|cudaMemcpy|cudaMemset", event.name)]
        by_name = {}
        for event in kernels:
            by_name[event.name[:90]] = by_name.get(event.name[:90], 0) + event.device_time_total / args.steps
        stems = [event.device_time_total / event.count for event in profiled.key_averages(group_by_input_shape=True)
                 if event.key == "aten::convolution_backward" and event.input_shapes[1][1] == 1]
        results[f"{name} {recipe}"] = {
            "kernels a step": len(kernels) / args.steps, "launches a step": len(launches) / args.steps,
            "kernels' ms a step": sum(by_name.values()) / 1000, "eager ms a step": 1000 * seconds / args.steps,
            "first convolution backward, ms": sum(stems) / 1000,
            "slowest kernels, us a step": dict(sorted(by_name.items(), key=lambda item: -item[1])[:8])}
        if args.device == "cuda":
            results[f"{name} {recipe}"]["an epoch without a wait"] = runs_without_a_wait(args, name, recipe)
    for name in models.MODELS:
        results[f"{name} gradients beside the CPU's, relative"] = gradient_difference(args, name)
    return results


def runs_without_a_wait(args, name: str, recipe: str):
    """True, or what waited: an epoch of recorded steps, and the augmentation between them, after the first batch."""
    take = steps_of(args, {"model": name, **RECIPES[recipe]}, "bf16")
    take(4)

    def watch(batches):
        yield next(batches)
        torch.cuda.set_sync_debug_mode("error")
        yield from batches
        torch.cuda.set_sync_debug_mode("default")
    try:
        take(100, watch)
        return True
    except RuntimeError as error:
        torch.cuda.set_sync_debug_mode("default")
        return str(error)[:300]


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


def bits(args) -> dict:
    cases = list(itertools.product(models.MODELS, ("blog", "strong"), ("fp32", "bf16")))
    if args.device == "cpu":
        cases = cases[:1]

    def case(name: str, recipe: str, precision: str) -> dict:
        flags = ["--data", args.data, "--esc10", "--device", args.device, "--model", name, "--recipe", recipe,
                 "--precision", precision, "--epochs", 2, "--views", 5 if args.device == "cuda" else 1]
        dirs = {kind: args.out / "bits" / f"{name}-{recipe}-{precision}-{kind}" for kind in ("first", "again", "killed", "eager")}
        for kind in ("first", "again"):
            command(*flags, "--run-dir", dirs[kind])
        command(*flags, "--run-dir", dirs["eager"], program=("-c", EAGER))
        words = [sys.executable, "training.py", *map(str, flags), "--run-dir", str(dirs["killed"])]
        with subprocess.Popen(words, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            next((line for line in process.stdout if line.lstrip().startswith("1/")), None)
            process.send_signal(signal.SIGKILL)
        command("--resume", dirs["killed"])
        first = result_of(dirs["first"])
        return {kind: result_of(folder) == first for kind, folder in dirs.items() if kind != "first"}

    results = {}
    with ThreadPoolExecutor(6 if args.device == "cuda" else 1) as pool:
        for each, future in [(each, pool.submit(case, *each)) for each in cases]:
            try:
                results[" ".join(each)] = future.result()
            except Exception as error:
                results[" ".join(each)] = str(error)[-600:]
    return results


def result_of(run_dir: Path) -> tuple:
    """All that must be the same: metrics but for the seconds, and every tensor of the checkpoint."""
    folder = next(run_dir.glob("seed-*/fold-*"))
    checkpoint = checkpoints.load_tensors(folder / "last.pt")
    tensors = torch.utils._pytree.tree_leaves([checkpoint[name] for name in ("model", "raw_model", "optimizer", "predictions")])
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in rundir.read_metrics(folder)]
    return rows, [each.numpy().tobytes() if isinstance(each, torch.Tensor) else each for each in tensors]


def blog(args) -> dict:
    """The command as people run it, on 1600 training clips: 40 epochs of 8000 examples; of `strong`, 8."""
    results = {}
    for (recipe, epochs), name in itertools.product([("blog", 40), ("strong", 8)], models.MODELS):
        run_dir = args.out / "blog" / f"{name}-{recipe}"
        begin = time.perf_counter()
        output = command("--data", args.noise, "--device", args.device, "--model", name, "--recipe", recipe, "--run-dir", run_dir,
                         "--epochs", epochs if args.device == "cuda" else 1).stdout
        wall = time.perf_counter() - begin
        folder = run_dir / "seed-42" / "fold-1"
        rows, validated = rows_of(folder, "training"), rows_of(folder, "validation")
        examples = 5 * len(rows) * (1600 if args.device == "cuda" else 50)
        spent, later = sum(row["seconds"] for row in rows), [row["seconds"] for row in rows[1:]] or [rows[0]["seconds"]]
        results[f"{name} {recipe}"] = {
            "training s": spent, "epochs": len(rows), "training s per 10 000 steps": spent / examples * 320_000,
            "first epoch s": rows[0]["seconds"], "median later epoch s": statistics.median(later),
            "validation s": sum(row["seconds"] for row in validated), "command s": wall,
            "its own words": next((line for line in output.splitlines() if "s of training" in line), ""),
            "MB of last.pt, best.pt": [(folder / file).stat().st_size / 1e6 for file in ("last.pt", "best.pt")]}
    return results


def loops(args) -> dict:
    precision = machine.choose_precision("auto", torch.device(args.device))
    results = {"precision": precision, "matmul FLOP/s": matmul_rate(torch.device(args.device), precision)}
    steps = 500 if args.device == "cuda" else args.steps
    for name in models.MODELS:
        with FlopCounterMode(display=False) as flops:
            F.cross_entropy(models.build_model(name)(torch.zeros(1, *dsets.FeatureParams().input_shape)),
                            torch.zeros(1, dtype=torch.long)).backward()
        row = results[name] = {}
        for kind, recorded, compiled in (("recorded", True, False), ("eager", False, False), ("recorded, --compile", True, True)):
            try:
                take = steps_of(args, {"model": name, "compile": compiled}, precision, recorded)
                take(8)
                if args.device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                seconds = take(steps)
                row[f"{kind}: s per 10 000 steps, from {steps}"] = 10_000 * seconds / steps
                if args.device == "cuda":
                    row[f"{kind}: peak MB"] = torch.cuda.max_memory_allocated() / 1e6
                if kind == "recorded":
                    row["share of the matmul rate"] = 32 * flops.get_total_flops() * steps / seconds / results["matmul FLOP/s"]
            except Exception as error:
                row[kind] = repr(error)[:400]
        row[f"plain loop: s per 10 000 steps, from {steps}"] = 10_000 * plain_loop(args, name, steps) / steps
        with_loader = min(steps, 100)
        row[f"DataLoader: s per 10 000 steps, from {with_loader}"] = 10_000 * loader_loop(args, name, with_loader) / with_loader
    return results


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


def plain_loop(args, name: str, steps: int) -> float:
    """Seconds of what a user would write with features on the device: crops and masks item by item, fp32, no recording."""
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
    return speed.seconds_of(lambda: [step() for _ in range(steps)])


def loader_loop(args, name: str, steps: int) -> float:
    """The same with a DataLoader whose workers decode, transform, crop and mask (speed.py's plain loop)."""
    dataset, device = dsets.ESC50(args.noise), torch.device(args.device)
    model = models.build_model(name).to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), 3e-4, weight_decay=1e-3)
    clips, _ = dataset.split(1)
    batches = iter(torch.utils.data.DataLoader(speed.PlainDataset(dataset, clips, 5), 32, shuffle=True, drop_last=True,
                                               num_workers=os.cpu_count()))

    def step():
        examples, targets = next(batches)
        loss = F.cross_entropy(model(examples.to(device)), targets.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()
    step()
    return speed.seconds_of(lambda: [step() for _ in range(steps)])


def together(args) -> dict:
    results = {}
    epochs = 12 if args.device == "cuda" else 1
    for count in (1, 2, 4, 8) if args.device == "cuda" else (1, 2):
        run_dir = args.out / "together" / str(count)

        def train(seed: int) -> None:
            command("--data", args.noise, "--device", args.device, "--run-dir", run_dir, "--epochs", epochs, "--seed", seed)
        with ThreadPoolExecutor(count) as pool:
            wall = speed.seconds_of(lambda: list(pool.map(train, range(count))))
        rows = [rows_of(folder, "training")[epochs // 2:] for folder in run_dir.glob("seed-*/fold-*")]
        examples = 8000 if args.device == "cuda" else 250
        results[f"{count} commands"] = {
            "wall s": wall, "examples/s of all, start included": count * epochs * examples / wall,
            "examples/s of all, later half of the epochs": sum(
                examples / statistics.median(row["seconds"] for row in each) for each in rows)}
    run_dir = args.out / "together" / "in one"
    seconds = speed.seconds_of(lambda: command("--data", args.noise, "--device", args.device, "--run-dir", run_dir, "--epochs",
                                               epochs, "--seed", *range(4 if args.device == "cuda" else 2)))
    results["4 seeds in one command, wall s"] = seconds
    return results


def rest(args) -> dict:
    results = {}

    def attempt(name: str, function) -> None:
        begin = time.perf_counter()
        try:
            outcome = function()
        except Exception as error:
            outcome = str(error)[-600:]
        results[name] = {"result": outcome, "s": time.perf_counter() - begin}

    attempt("tests marked cuda", lambda: command("-q", "-m", "cuda", "-p", "no:cacheprovider",
                                                 program=("-m", "pytest")).stdout.splitlines()[-1])
    flags = ["--data", args.data, "--esc10", "--device", args.device, "--epochs", 1, "--precision", "fp32", "--views", 1]
    attempt("torchrun with one process", lambda: command(
        "--standalone", "--nproc-per-node=1", "training.py", *flags, "--run-dir", args.out / "torchrun",
        program=("-m", "torch.distributed.run")) and "done")
    attempt("a run to predict with", lambda: command(*flags, "--run-dir", args.out / "predict") and "done")
    seconds = 3600 if args.device == "cuda" else 20
    write_wav(args.out / "hour.wav", (3000 * np.random.default_rng(0).standard_normal(seconds * dsets.SAMPLE_RATE)).astype("<i2"))
    said = {}
    for device in dict.fromkeys(["cpu", args.device]):
        def predict():
            said[device] = json.loads(command(args.out / "predict", args.out / "hour.wav", "--device", device, "--format", "json",
                                              "--top", 50, program=("predict.py",)).stdout)[0]["windows"]
            return f"{len(said[device])} windows"
        attempt(f"predict.py --device {device} on {seconds} s", predict)
    if len(said) == 2:
        probabilities = [{(window["start_s"], guess["class"]): guess["probability"]
                          for window in windows for guess in window["top"]} for windows in said.values()]
        results["largest difference of a probability"] = max(abs(value - probabilities[1][key])
                                                             for key, value in probabilities[0].items())
    return results


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
    args.out = args.out.resolve()
    args.noise = args.out / "noise"
    args.data = args.data.resolve() if args.data else args.noise
    if args.part:
        speed.as_training_py()
        with machine.own_stream(torch.device(args.device)):
            print(json.dumps(PARTS[args.part](args)))
        return

    args.out.mkdir(parents=True)
    write_noise_root(args.noise, 40 if args.device == "cuda" else 2)
    results = {"environment": rundir.environment(world_size=1) | {"torch": torch.__version__, "cuda": torch.version.cuda}}
    for part in args.parts:
        words = [sys.executable, __file__, "--part", part, "--device", args.device, "--out", args.out, "--steps", args.steps,
                 "--data", args.data]
        begin = time.perf_counter()
        # a session of its own: a part that runs too long ends with all its processes
        with subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, stderr=open(args.out / f"{part}.err", "wb"),
                              start_new_session=True) as process:
            try:
                output, _ = process.communicate(timeout=LIMITS_S[part] if args.device == "cuda" else 600)
                results[part] = json.loads(output.splitlines()[-1])
            except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
                results[part] = {"failed": repr(error)[:200], "stderr": (args.out / f"{part}.err").read_text()[-1500:]}
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
        results[f"{part}, s"] = time.perf_counter() - begin
        (args.out / "cuda.json").write_text(json.dumps(results, indent=2) + "\n")
        (args.out / "cuda.txt").write_text("\n".join(page(results)) + "\n")
        print("\n".join(page({part: results[part], f"{part}, s": results[f"{part}, s"]})), flush=True)


def page(results: dict, indent: str = "") -> list[str]:
    lines = []
    for name, value in results.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}", *page(value, indent + "  ")]
        else:
            lines.append(f"{indent}{name:<52} {f'{value:.5g}' if isinstance(value, float) else value}")
    return lines


if __name__ == "__main__":
    main()
