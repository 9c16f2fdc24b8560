"""How fast, beside what a user would do instead: one command, a table and a JSON file.

    python benchmarks/speed.py [--data DIR] [--device cpu] [--repeat 5] [--rows 1 2 3 4 5] [--json speed.json]

1. features      WAV -> dB mel-spectrogram, clips/s: ours; torchaudio's transform clip by clip; librosa
2. training      examples/s of each network: ours; the plain loop (a Dataset that decodes, transforms, crops and masks
                 each item, a DataLoader with a worker a core, fp32, contiguous); and the share of the machine's
                 matrix-multiply rate (2048 x 2048, same precision) that our step attains; where its time goes
3. first step    seconds from the command to the first training step, with and without cached features
4. one clip      milliseconds from a file to its five likeliest classes
5. growth        examples/s and peak memory at 400, 2000 and 20 000 clips of random features

All candidates take turns on the same clips, ours in a process that is set up as training.py does it, the others in this
one, as a user's program would be. Figures are medians, with the least and the greatest beside them, and ratios are
medians of the ratios of neighboring turns. --data: an ESC-50 folder (default data/demo, which
`python training.py --demo` writes). What a GPU makes of the program, benchmarks/cuda.py measures.
"""
import argparse
import functools
import itertools
import json
import math
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
import torchaudio
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dsets
import models
import training
from dsets import SAMPLE_RATE
from util import cache, rundir, waveforms
from util import device as machine
from util.config import Config
from util.errors import write_atomically
from util.tables import read_esc50

BLOG = Config()  # the `blog` recipe
PARAMS = dsets.FeatureParams()


class Turns:
    """Rates (or times) of several candidates that took turns."""

    def __init__(self, candidates: dict, repeat: int):
        self.values = {name: [] for name in candidates}
        for turn in range(repeat + 1):
            for name, measure in candidates.items():
                value = measure()
                if turn:  # the first turn warms up
                    self.values[name].append(value)

    def row(self, name: str) -> dict:
        values = self.values[name]
        return {"median": statistics.median(values), "min": min(values), "max": max(values)}

    def ratio(self, name: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(self.values[name], self.values[other]))


def as_training_py() -> None:
    """How training.py sets a process up."""
    machine.make_deterministic()
    machine.keep_freed_memory()


def start_process(device: torch.device) -> None:
    """The same, and the stream that training.py has on a GPU, until the process ends."""
    as_training_py()
    machine.own_stream(device).__enter__()


class Steps:
    """A network's training, as training.py does it: call it with a number of steps to take the next ones.

    Epoch after epoch: an epoch's draws, made before its first batch, cost as much of the time as in a training.
    """

    def __init__(self, config: Config, dataset, clips: torch.Tensor, mean_std: tuple[float, float], precision: str,
                 device: torch.device, recorded: bool = True):
        torch.manual_seed(0)
        model = models.build_model(config.model, input_shape=dataset.params.input_shape)
        model = model.to(device, memory_format=torch.channels_last)
        self.optimizer = training.build_optimizer(model, config, device)
        self.ema = training.EMA(model, config.ema) if config.ema else None
        self.model = machine.compile_model(model) if config.compile else model
        self.recorder = machine.Recorder(recorded and device.type == "cuda")
        self.config, self.precision = config, precision
        options = {name: getattr(config, name) for name in training.AUGMENTATIONS}
        self.batches = itertools.chain.from_iterable(
            dsets.training_batches(dataset, clips, mean_std, batch_size=config.batch_size, seed=1, fold=1, epoch=epoch,
                                   device=device, **options) for epoch in itertools.count(1))

    def __call__(self, steps: int, watch=lambda batches: batches) -> float:
        """Seconds of so many steps, until the last one's results are on the CPU; watch: what goes over the batches first."""
        begin = time.perf_counter()
        batches, lrs = watch(itertools.islice(self.batches, steps)), steps * [self.config.lr]
        training.train_one_epoch(self.model, self.optimizer, batches, lrs, self.precision, ema=self.ema, recorder=self.recorder,
                                 label_smoothing=self.config.label_smoothing)
        return time.perf_counter() - begin


def random_dataset(device: torch.device, clips: int, params: dsets.FeatureParams = PARAMS):
    """Random features of so many clips on a device, in place of an `ESC50`."""
    generator = torch.Generator(device).manual_seed(0)
    features = torch.randn(clips, 1, params.n_mels, params.num_frames, device=device, generator=generator)
    return SimpleNamespace(features=features, rows=torch.arange(clips), targets=torch.arange(clips) % 50, params=params)


def seconds_of(function) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


# --- 1. features ------------------------------------------------------------------------------------------------------

def our_features(root: Path, clips: int) -> float:
    files = {name: [(0.0, math.nan)] for name in read_esc50(root)["file"][:clips]}
    log_mel, shape = dsets.LogMel(PARAMS), (1, PARAMS.n_mels, PARAMS.num_frames)
    with tempfile.TemporaryDirectory() as folder:
        return len(files) / seconds_of(lambda: cache.compute_features(
            root, files, Path(folder) / "logmel.npy",
            lambda path, spans, _: (log_mel(waveform).numpy() for waveform in waveforms.load_clips(path, spans)), shape))


def torchaudio_transforms():
    """The same features, with torchaudio's own transforms."""
    mel = torchaudio.transforms.MelSpectrogram(SAMPLE_RATE, PARAMS.n_fft, hop_length=PARAMS.hop_length, n_mels=PARAMS.n_mels,
                                               f_min=PARAMS.f_min, f_max=PARAMS.f_max)
    return torch.nn.Sequential(mel, torchaudio.transforms.AmplitudeToDB("power", top_db=PARAMS.top_db))


def measure_features(own_process, root: Path, repeat: int, clips: int) -> dict:
    paths = [root / "audio" / name for name in read_esc50(root).head(clips)["filename"]]
    transforms = torchaudio_transforms()

    import librosa  # here: benchmarks/cuda.py does without

    def by_torchaudio():
        for path in paths:
            samples, _ = soundfile.read(path, dtype="float32")
            transforms(torch.from_numpy(samples)[None])

    def by_librosa():
        for path in paths:
            samples, _ = librosa.load(path, sr=SAMPLE_RATE)
            power = librosa.feature.melspectrogram(
                y=samples, sr=SAMPLE_RATE, n_fft=PARAMS.n_fft, hop_length=PARAMS.hop_length, n_mels=PARAMS.n_mels,
                fmin=PARAMS.f_min, fmax=PARAMS.f_max, htk=True, norm=None, pad_mode="reflect")
            librosa.power_to_db(power, top_db=PARAMS.top_db)

    turns = Turns({"ours": lambda: own_process.submit(our_features, root, clips).result(),
                   "torchaudio clip by clip": lambda: len(paths) / seconds_of(by_torchaudio),
                   "librosa": lambda: len(paths) / seconds_of(by_librosa)}, repeat)
    return {**{name: turns.row(name) for name in turns.values},
            "ours / librosa": turns.ratio("ours", "librosa"),
            "ours / torchaudio": turns.ratio("ours", "torchaudio clip by clip")}


# --- 2. training ------------------------------------------------------------------------------------------------------

class PlainDataset(torch.utils.data.Dataset):
    """What a user would write: every item decoded, transformed, cropped and masked when it is asked for."""

    def __init__(self, dataset: dsets.ESC50, indices: torch.Tensor, views: int):
        self.dataset, self.indices, self.views = dataset, indices.repeat_interleave(views), views
        self.transforms = torchaudio_transforms()
        self.masks = [torchaudio.transforms.FrequencyMasking(BLOG.freq_mask),
                      torchaudio.transforms.TimeMasking(BLOG.time_mask)] * 2

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, item):
        index = int(self.indices[item])
        samples, _ = soundfile.read(self.dataset.root / "audio" / self.dataset.table["filename"][index], dtype="float32")
        feature = (self.transforms(torch.from_numpy(samples)[None]) + 10) / 20
        low = np.random.randint(PARAMS.n_mels - PARAMS.crop_mels + 1)
        first = np.random.randint(PARAMS.num_frames - PARAMS.crop_frames + 1)
        feature = feature[:, low:low + PARAMS.crop_mels, first:first + PARAMS.crop_frames]
        if item % self.views:
            for mask in self.masks:
                feature = mask(feature)
        return feature, int(self.dataset.targets[index])


@functools.cache
def our_training(root: Path, name: str, device: torch.device, compiled: bool):
    """A function of a number of steps that takes them as training.py does and returns examples/s."""
    dataset = dsets.ESC50(root)
    clips, _ = dataset.split(dataset.folds[0])
    mean_std = dataset.mean_std(clips)
    if device.type == "cuda":
        dataset.features = dataset.features.to(device)
    precision = machine.choose_precision("auto", device)
    steps_of = Steps(Config(model=name, compile=compiled), dataset, clips, mean_std, precision, device)
    return lambda steps: steps * BLOG.batch_size / steps_of(steps)


def our_rate(steps: int, *arguments) -> float:
    return our_training(*arguments)(steps)


GROUPS = {"convolutions": "convolution", "matrix products": "mm", "batch normalization": "batch_norm",
          "ReLU, tanh": "clamp_min|threshold|tanh", "pooling": "pool", "casts, copies": "copy_|fill_",
          "optimizer": "adam|Optimizer"}


def our_profile(steps: int, *arguments) -> dict:
    """Where our step's time goes: the operators' own times on the CPU, as shares."""
    rate = our_training(*arguments)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        rate(steps)
    times = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    shares = {group: sum(time for key, time in times.items() if re.search(pattern, key)) / sum(times.values())
              for group, pattern in GROUPS.items()}
    return shares | {"everything else": 1 - sum(shares.values())}


def measure_training(own_process, root: Path, repeat: int, device: torch.device, steps: int) -> dict:
    dataset = dsets.ESC50(root)
    clips, _ = dataset.split(dataset.folds[0])
    precision = machine.choose_precision("auto", device)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    results = {"precision": precision, "batch size": BLOG.batch_size}
    for name in models.MODELS:
        plain = models.build_model(name).to(device)
        optimizer = torch.optim.Adam(plain.parameters(), BLOG.lr, weight_decay=BLOG.weight_decay)

        def plain_loop() -> float:
            loader = torch.utils.data.DataLoader(PlainDataset(dataset, clips, BLOG.views), BLOG.batch_size, shuffle=True,
                                                 num_workers=os.cpu_count(), drop_last=True)
            plain.train()
            batches = iter(loader)
            next(batches)  # the workers' start is not counted
            begin = time.perf_counter()
            for _ in range(steps):
                examples, targets = next(batches)
                loss = F.cross_entropy(plain(examples.to(device)), targets.to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                loss.item()
            return steps * BLOG.batch_size / (time.perf_counter() - begin)

        def matmul() -> float:
            a = torch.randn(2048, 2048, dtype=dtype, device=device)
            product = torch.empty_like(a)
            synchronize(device)
            begin = time.perf_counter()
            for _ in range(8):
                torch.mm(a, a, out=product)
            synchronize(device)
            return 8 * 2 * 2048 ** 3 / (time.perf_counter() - begin)

        with FlopCounterMode(display=False) as flops:
            logits = plain(torch.zeros(1, *PARAMS.input_shape, device=device))
            F.cross_entropy(logits, torch.zeros(1, dtype=torch.long, device=device)).backward()
        ours = {f"ours{', --compile' if compiled else ''}": functools.partial(our_rate, steps, root, name, device, compiled)
                for compiled in (False, True)}
        turns = Turns({"matmul": matmul, "plain loop": plain_loop,
                       **{key: lambda rate=rate: own_process.submit(rate).result() for key, rate in ours.items()}}, repeat)
        results[name] = {"plain loop": turns.row("plain loop"), "matmul FLOP/s": turns.row("matmul")}
        for key in ours:
            results[name] |= {key: turns.row(key), f"{key} / plain loop": turns.ratio(key, "plain loop"),
                              f"{key} / matmul": turns.ratio(key, "matmul") * flops.get_total_flops()}
        if device.type == "cpu":
            results[name]["share of the time"] = own_process.submit(our_profile, steps, root, name, device, False).result()
    return results


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# --- 3. to the first step ---------------------------------------------------------------------------------------------

FIRST_STEP = """
import os, sys
import training
def stop(*arguments):
    os._exit(0)
training.forward = stop
training.main(sys.argv[1:])
"""


def measure_first_step(root: Path, repeat: int) -> dict:
    """Whole processes, from their start to where the first batch reaches the network."""
    def start() -> float:
        with tempfile.TemporaryDirectory() as folder:
            return seconds_of(lambda: subprocess.run(
                [sys.executable, "-c", FIRST_STEP, "--data", str(root), "--run-dir", folder + "/run"],
                cwd=Path(training.__file__).parent, stdout=subprocess.DEVNULL, check=True))

    def cold() -> float:
        for path in (root / "features").glob("logmel-*"):
            path.unlink()
        return start()

    def imports() -> float:
        return seconds_of(lambda: subprocess.run([sys.executable, "-c", "import training"], check=True,
                                                 cwd=Path(training.__file__).parent))

    turns = Turns({"cold": cold, "cached": start, "imports alone": imports}, repeat)
    return {name: turns.row(name) for name in turns.values} | {"clips": len(read_esc50(root))}


# --- 4. one clip ------------------------------------------------------------------------------------------------------

def measure_one_clip(root: Path, count: int = 200) -> dict:
    log_mel, model = dsets.LogMel(PARAMS), models.build_model("cnn8").eval()
    paths = [root / "audio" / name for name in read_esc50(root)["filename"]]
    corners = dsets.validation_corners(PARAMS)
    times = []
    with torch.inference_mode():
        for i in range(count + 10):
            begin = time.perf_counter()
            features = log_mel(dsets.load_waveform(paths[i % len(paths)])[None])
            examples = dsets.normalize(dsets.crop(features, torch.zeros(1, dtype=torch.long), corners, PARAMS), -10.0, 20.0)
            model(examples).softmax(dim=1).topk(5)
            times.append(1000 * (time.perf_counter() - begin))
    times = sorted(times[10:])
    return {"median ms": statistics.median(times), "99th percentile ms": times[int(0.99 * len(times))]}


# --- 5. growth --------------------------------------------------------------------------------------------------------

GROWTH = """
import re, sys
from pathlib import Path
from types import SimpleNamespace
sys.path.insert(0, "benchmarks")
import numpy, torch
import speed
from util import device as machine
path, steps = sys.argv[1], int(sys.argv[2])
device = torch.device("cpu")
features = torch.from_numpy(numpy.load(path, mmap_mode="c"))
clips = torch.arange(len(features))
dataset = SimpleNamespace(features=features, rows=clips, targets=clips % 50, params=speed.PARAMS)
machine.keep_freed_memory()
steps_of = speed.Steps(speed.BLOG, dataset, clips, (0.0, 1.0), machine.choose_precision("auto", device), device)
steps_of(5)  # to warm up
seconds = steps_of(steps)
# not getrusage: what it says of a child includes its parent
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
print(steps * speed.BLOG.batch_size / seconds, peak / 1024)
"""


def measure_growth(repeat: int, steps: int, sizes: tuple[int, ...] = (400, 2000, 20_000)) -> dict:
    """cnn8's examples/s and peak resident memory (MB; Linux) on random features of so many clips, in fresh processes."""
    with tempfile.TemporaryDirectory(dir=".") as folder:
        for size in sizes:
            features = np.lib.format.open_memmap(f"{folder}/{size}.npy", "w+", np.float32,
                                                 (size, 1, PARAMS.n_mels, PARAMS.num_frames))
            for index in range(size):
                features[index] = np.random.default_rng(index).standard_normal(features.shape[1:], np.float32)
            features.flush()
        memory = {}

        def measure(size: int) -> float:
            done = subprocess.run([sys.executable, "-c", GROWTH, os.path.abspath(f"{folder}/{size}.npy"), str(steps)],
                                  cwd=Path(training.__file__).parent, capture_output=True, text=True,
                                  check=True)
            rate, memory[size] = map(float, done.stdout.split())
            return rate

        turns = Turns({size: lambda size=size: measure(size) for size in sizes}, repeat)
        return {f"{size} clips": {**turns.row(size), "peak MB": memory[size]} for size in sizes}


# --- the command ------------------------------------------------------------------------------------------------------

def print_table(results: dict, indent: str = "") -> None:
    for name, value in results.items():
        if isinstance(value, dict) and "median" in value:
            rest = "".join(f", {key} {number:,.0f}" for key, number in value.items() if key not in ("median", "min", "max"))
            print(f"{indent}{name:<28}{value['median']:>14,.4g}   ({value['min']:,.4g} to {value['max']:,.4g}){rest}")
        elif isinstance(value, dict):
            print(f"{indent}{name}")
            print_table(value, indent + "  ")
        else:
            print(f"{indent}{name:<28}{f'{value:>14,.4g}' if isinstance(value, (int, float)) else value}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="data/demo", help="an ESC-50 folder (default data/demo)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeat", type=int, default=5, help="counted turns (default 5)")
    parser.add_argument("--clips", type=int, default=200, help="clips of row 1 (default 200)")
    parser.add_argument("--steps", type=int, default=20, help="training steps a turn in rows 2 and 5 (default 20)")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="only these rows (default all)")
    parser.add_argument("--json", default="speed.json", help="where the figures go (default speed.json)")
    args = parser.parse_args()
    root, device = Path(args.data).resolve(), torch.device(args.device)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), start_process, (device,)) as own_process:
        results = rundir.environment(world_size=1)
        rows = [("features, clips/s", lambda: measure_features(own_process, root, args.repeat, args.clips)),
                ("training, examples/s", lambda: measure_training(own_process, root, args.repeat, device, args.steps)),
                ("command to first step, s", lambda: measure_first_step(root, args.repeat)),
                ("one clip to top 5", lambda: own_process.submit(measure_one_clip, root).result()),
                ("growth, examples/s", lambda: measure_growth(args.repeat, args.steps))]
        for number, (name, measure) in enumerate(rows, start=1):
            if number not in args.rows:
                continue
            results[name] = measure()
            print_table({name: results[name]})
            sys.stdout.flush()
            write_atomically(Path(args.json), lambda part: part.write_text(json.dumps(results, indent=2) + "\n"))


if __name__ == "__main__":
    main()
