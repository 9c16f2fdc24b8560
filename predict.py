"""Name the sounds in recordings: the predictions of a trained network, a window of 5 s at a time.

    python predict.py recording.m4a                       one of 50 kinds of sounds, without any training
    python predict.py RUN_DIR recording.mp3               a class of your own training
    python predict.py RUN_DIR folder-of-recordings --format csv > sounds.csv
    arecord -f cd | python predict.py RUN_DIR -
    python predict.py RUN_DIR/seed-42/fold-1 --onnx network.onnx
    python predict.py --help
"""
import argparse
import contextlib
import copy
import csv
import itertools
import json
import math
import os
import signal
import sys
import threading
from pathlib import Path

from util.errors import UserError, exit_on_error, print_error, printable, reason, refuse_flags, write_atomically

WEIGHTS = Path(__file__).resolve().parent / "weights" / "cnn8-esc50.pt"  # how it was made: docs/results.md


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The flags of a command. Raises UserError for one that is none, or a value that it cannot have."""
    parser = argparse.ArgumentParser(prog="predict.py", allow_abbrev=False,
                                     description="Name the sounds in recordings, a window of 5 s at a time.",
                                     epilog=f"{WEIGHTS.name} was trained on 1600 clips of ESC-50, which are under CC BY-NC 3.0; "
                                            "networks trained the same way on 1200 named 86.6% of the others correctly "
                                            "(docs/results.md).")
    parser.add_argument("model", metavar="RUN_OR_CHECKPOINT", nargs="?",
                        help="a run's folder, whose finished trainings predict together by their mean; the folder of one "
                             f"training; or a .pt file; without it, the 50 classes of weights/{WEIGHTS.name}")
    parser.add_argument("recordings", metavar="FILE_OR_FOLDER", nargs="*",
                        help="audio that FFmpeg decodes (WAV, FLAC, MP3, M4A, OGG ...), of any rate and length; - is standard "
                             "input, each window printed as soon as it is heard")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="classes to name (default 5)")
    parser.add_argument("--hop", type=float, default=2.5, metavar="S",
                        help="seconds from one window's start to the next one's, 0.1 to 5 (default 2.5)")
    parser.add_argument("--format", choices=["table", "csv", "json", "jsonl", "labels"], default="table",
                        help="jsonl: an object a line; labels: a label track for Audacity, of one recording (default table)")
    parser.add_argument("--threshold", type=float, default=0.0, metavar="P",
                        help="show - where the likeliest class has a probability below P, 0 to 1 (default 0)")
    parser.add_argument("--plot", metavar="FILE.png", help="draw one recording: its mel-spectrogram and its likeliest classes")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto",
                        help="auto takes a GPU if there is one (default auto)")
    parser.add_argument("--onnx", metavar="FILE", help="write the network, from waveform to probabilities, as an ONNX graph")
    parser.error = refuse_flags
    args = parser.parse_intermixed_args(argv)  # flags may stand between the names
    check_hop(args.hop)
    if args.top < 1:
        raise UserError(f"--top {args.top}: expected 1 or more")
    if not 0 <= args.threshold <= 1:
        raise UserError(f"--threshold {args.threshold:g}: expected a probability from 0 to 1")
    for flag, file, ending in (("--onnx", args.onnx, ".onnx"), ("--plot", args.plot, ".png")):
        if file is not None and not file.endswith(ending):  # never writes over a recording
            raise UserError(f"{flag} {file}: expected a name that ends in {ending}")
    if "" in (args.model, *args.recordings) or not (args.model or args.onnx):
        raise UserError("FILE_OR_FOLDER: is missing or empty; name recordings to predict, or a file for --onnx")
    return args


def check_hop(hop: float) -> None:
    """Raise UserError for seconds that --hop cannot have."""
    if not 0.1 <= hop <= 5:
        raise UserError(f"--hop {hop:g}: expected seconds from 0.1 to 5; longer ones would leave gaps")


if __name__ == "__main__":  # torch takes seconds to import: until then, answer --help and a wrong flag
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:  # as in a script's background jobs
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # an interrupt ends without a traceback: nothing needs saving
    exit_on_error("predict.py", parse_args, sys.argv[1:])

import torch

import dsets
import models
from dsets import CLIP_SAMPLES, SAMPLE_RATE
from util import checkpoint as checkpoints
from util import device as machine
from util import audio, command, report, rundir, waveforms
from util.config import TTA_CROPS
from util.recordings import ENDINGS, find_recordings, spell_as_on_disk

BATCH_WINDOWS = 16  # windows the networks see at once: memory is that of so many, whatever a recording's length
PLOT_COLUMNS = 2000  # of a spectrogram, at most; more than a picture has pixels


class Network(torch.nn.Module):
    """Waveforms (B, 1, 220500) at 44 100 Hz -> probabilities (B, classes) of one checkpoint's network.

    Features, normalization, crops and precision are those of the network's validation.
    Raises UserError for a checkpoint whose parts do not fit together.
    """

    def __init__(self, path: str | Path):
        super().__init__()
        try:
            checkpoint = checkpoints.load_checkpoint(Path(path))
            self.params, self.classes = dsets.FeatureParams(**checkpoint["features"]), checkpoint["classes"]
            if not self.classes or not all(isinstance(name, str) for name in self.classes):
                raise UserError("classes are not names")
            self.mean, self.std = map(float, checkpoint["mean_std"])
            self.tta_crops, self.precision = checkpoint["flags"]["tta_crops"], checkpoint["precision"]
            if not (math.isfinite(self.mean) and 0 < self.std < math.inf and self.tta_crops in TTA_CROPS):
                raise UserError(f"mean {self.mean}, std {self.std}, {self.tta_crops} crops")
            self.model = models.build_model(checkpoint["model_name"], len(self.classes), self.params.input_shape)
            checkpoints.load_weights(self.model, checkpoint["model"], path)
            self.log_mel = dsets.LogMel(self.params)
        except (TypeError, ValueError, RuntimeError) as error:  # UserError is a ValueError
            raise UserError(f"{path}: cannot predict ({reason(error)}); name another checkpoint, or train it again") from error
        self.to(memory_format=torch.channels_last).eval()

    @torch.inference_mode()
    def forward(self, waveforms: torch.Tensor) -> torch.Tensor:
        return self.classify(self.features(waveforms))

    def features(self, waveforms: torch.Tensor) -> torch.Tensor:
        """Waveforms (B, 1, 220500) -> mel-spectrograms (B, 1, 128, 431), one at a time: faster than a batch."""
        return torch.cat([self.log_mel(waveform[None]) for waveform in waveforms])

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """Mel-spectrograms (B, 1, 128, 431) in dB -> probabilities (B, classes), float32."""
        rows = torch.arange(len(features), device=features.device)
        corners = dsets.validation_corners(self.params, self.tta_crops).to(features.device)  # (crops, 2)
        examples = dsets.validation_crops(features, rows, corners, self.params)  # -> (crops * B, 1, 100, 384)
        examples = dsets.normalize(examples, self.mean, self.std)
        return models.average_logits(self.model, examples, len(rows), self.precision).softmax(dim=1)  # -> (B, classes)


class Predictor:
    """What a run's networks hear, by their mean: Predictor("runs/CNN/...")("recording.m4a").

    path: a run's folder (its finished trainings predict together), a training's folder, or a checkpoint; by default a network
    that knows ESC-50's classes. device: see --device. Raises UserError if there is none, or if they do not know the same
    classes by the same features.
    """

    def __init__(self, path: str | Path = WEIGHTS, device: str = "auto"):
        self.device, paths = machine.choose_device(device), find_checkpoints(Path(spell_as_on_disk(str(path))))
        machine.check_usable(self.device)
        self.networks = [Network(each).to(self.device) for each in paths]
        self.classes, self.params = self.networks[0].classes, self.networks[0].params
        for each, network in zip(paths, self.networks):
            parts = [{"classes": one.classes, **vars(one.params)} for one in (network, self.networks[0])]
            rundir.check_same(f"{each}: cannot predict together with {paths[0]}", *parts)

    def features(self, waveforms: torch.Tensor) -> torch.Tensor:
        """Waveforms (B, 1, 220500) -> mel-spectrograms (B, 1, 128, 431), on the device."""
        return self.networks[0].features(waveforms.to(self.device))

    @torch.inference_mode()
    def __call__(self, sound: torch.Tensor | str | Path, hop: float = 2.5):
        """Waveforms (B, 1, 220500) -> probabilities (B, classes), on the CPU. Of a recording's name, a dictionary:

        file, starts and ends (W,) of its windows in s, one every `hop` s, probabilities (W, classes), their mean (classes,),
        and notes on what is odd. Raises UserError if the recording cannot be read, for a hop beyond 0.1 to 5 s, and for what is
        neither a name nor a tensor of that shape.
        """
        check_hop(hop)
        if not isinstance(sound, (str, Path)):
            if not (isinstance(sound, torch.Tensor) and sound.is_floating_point() and sound.shape[1:] == (1, CLIP_SAMPLES)
                    and len(sound) > 0 and sound.isfinite().all()):
                shape, dtype = tuple(getattr(sound, "shape", ())), getattr(sound, "dtype", "no dtype")
                raise UserError(f"Predictor: found a {type(sound).__name__} {shape} of {dtype}, expected a tensor of finite "
                                f"floats (B, 1, {CLIP_SAMPLES}), as dsets.load_waveform(file)[None] gives, or a recording's name")
            features = self.features(sound.float())
            return torch.stack([network.classify(features) for network in self.networks]).mean(dim=0).cpu()
        *windows, mean = predict(self, str(sound), round(hop * SAMPLE_RATE), top=1)
        starts, ends = (torch.tensor([row[name] for row in windows]) for name in ("start_s", "end_s"))
        return {"file": str(sound), "starts": starts, "ends": ends, "mean": mean["probabilities"].float(), "notes": mean["notes"],
                "probabilities": torch.stack([row["probabilities"] for row in windows])}


def is_model(name: str, below: bool = False) -> bool:
    """Whether this is the name of a checkpoint (it ends in .pt), or of a folder with a run.json or a last.pt in (or below) it."""
    path = spell_as_on_disk(name)
    folders = os.walk(path) if os.path.isdir(path) else ()  # os.walk raises for names that no file can have
    folders = folders if below else itertools.islice(folders, 1)
    return name.endswith(".pt") or any("run.json" in files or "last.pt" in files for _, _, files in folders)


def choose_model(names: list[str]) -> tuple[str | Path, list[str]]:
    """The run or checkpoint that the first name is, else WEIGHTS, which is said on stderr; and the names of recordings.

    Raises UserError for a first name that is no file and has no recording's ending: it looks like a run; and for a later run.
    """
    for name in names[1:]:
        if is_model(name):
            raise UserError(f"{name}: is a run or a checkpoint; name one, and before the recordings")
    if names and is_model(names[0], below=True):
        return names[0], names[1:]
    is_recording = not names or names[0] == "-" or Path(names[0]).suffix.lower() in ENDINGS
    if not is_recording and not os.path.exists(spell_as_on_disk(names[0])):
        raise UserError(f"{names[0]}: no such run, checkpoint or recording")
    print_error("predict.py", f"note: no run is named: {WEIGHTS} predicts, trained on ESC-50")
    return WEIGHTS, names


def find_checkpoints(path: Path) -> list[Path]:
    """The checkpoints that a path names: a file itself, a training's last.pt, or those of all finished trainings of a run.

    Says on stderr how many these are, where a run has several trainings. Raises UserError if there are none.
    """
    if path.is_file() or (path / "last.pt").exists():
        return [path if path.is_file() else path / "last.pt"]
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if not (path / "run.json").exists():
        newest = max(path.rglob("run.json"), key=os.path.getmtime, default=None)
        raise UserError(f"{path}: holds no checkpoint (last.pt) and no run (run.json); "
                        + (f"did you mean {newest.parent}?" if newest else "name a run's folder or a training's in it"))
    flags = rundir.read_run_config(path)["flags"]
    folders = [rundir.training_dir(path, seed, fold) for seed, fold in itertools.product(flags["seed"], flags["fold"])]
    begun = [folder for folder in folders if (folder / "last.pt").exists()]
    finished = [folder / "last.pt" for folder in begun if rundir.is_finished(folder, flags["epochs"])]
    if not finished:
        raise UserError(f"{path}: no training of {len(folders)} is finished; wait, or name one ({(begun or folders)[0]})")
    if len(folders) > 1:
        print_error("predict.py", f"note: {path}: its finished trainings predict together, by their mean: {len(finished)}; "
                                  f"not finished: {len(folders) - len(finished)}")
    return finished


def predict(predictor: Predictor, name: str, hop: int, top: int, threshold: float = 0.0, interrupts: list | tuple = ()):
    """Yield the rows of one recording: each window as soon as it is heard; at last the mean, with notes on the recording.

    hop: samples from one window's start to the next one's. A row: window (0, 1 ... "mean"), start_s, end_s, probabilities
    (classes,), top (class and probability, likeliest first; the class of a single one is "-" if the likeliest is below
    `threshold`). In the mean, a last window that is not full weighs less. Where an interrupt has come into `interrupts`
    meanwhile, no note tells that the rest is missing. Raises UserError if the recording cannot be read.
    """
    def row(window: int | str, start: int, end: int, probabilities: torch.Tensor) -> dict:
        guesses = [{"class": predictor.classes[index], "probability": value.item()}
                   for value, index in zip(*probabilities.topk(min(top, len(predictor.classes))))]
        if guesses[0]["probability"] < threshold:
            guesses = [guesses[0] | {"class": "-"}]
        return {"window": window, "start_s": start / SAMPLE_RATE, "end_s": end / SAMPLE_RATE, "top": guesses,
                "probabilities": probabilities}

    notes, count, heard, total = [], 0, 0, 0.0
    found = waveforms.windows(name, hop, notes)
    while batch := list(itertools.islice(found, 1 if name == "-" else BATCH_WINDOWS)):
        for (start, length, _), probabilities in zip(batch, predictor(torch.stack([waveform for _, _, waveform in batch]))):
            yield row(count, start, start + length, probabilities)
            count, heard, total = count + 1, heard + length, total + length * probabilities.double()
    notes = [note for note in notes if not (interrupts and audio.COPY_AGAIN in note)]
    yield row("mean", 0, start + length, total / heard) | {"notes": notes}


def print_row(name: str, row: dict, form: str) -> None:
    """Print one row: as a line of a table to read, as CSV rows, or as an object of JSON."""
    if form == "table":
        title = "mean" if row["window"] == "mean" else f"{row['start_s']:.1f} - {row['end_s']:.1f} s"
        guesses = [guess["class"] + f" {100 * guess['probability']:.1f}%" * (guess["class"] != "-") for guess in row["top"]]
        print(f"{title:>17}  " + printable(", ".join(guesses)))
    elif form == "csv":
        span = [f"{row['start_s']:.3f}", f"{row['end_s']:.3f}"]
        csv.writer(sys.stdout, lineterminator="\n").writerows(
            [name, row["window"], *span, rank, guess["class"], f"{guess['probability']:.6f}"]
            for rank, guess in enumerate(row["top"], start=1))
    else:
        print(json.dumps({"file": name, **{key: row[key] for key in row if key != "probabilities"}}))


def print_recording(name: str, windows: list[dict], mean: dict, form: str, is_first: bool) -> None:
    """Print all rows of one recording: as an object of a JSON array, as labels, or one by one with the mean first."""
    if form == "json":
        parts = [{key: row[key] for key in ("start_s", "end_s", "top")} for row in windows]
        print("" if is_first else ",\n", end="")
        print(json.dumps({"file": name, "duration_s": mean["end_s"], "top": mean["top"], "windows": parts,
                          "notes": mean["notes"]}), end="")
    elif form == "labels":
        edges = window_edges(windows)
        for label, group in itertools.groupby(range(len(windows)), lambda index: windows[index]["top"][0]["class"]):
            indices = list(group)
            print(f"{edges[indices[0]]:.6f}\t{edges[indices[-1] + 1]:.6f}\t{printable(label)}\n" if label != "-" else "", end="")
    else:
        print(f"{printable(name)} ({mean['end_s']:.1f} s)\n" if form == "table" else "", end="")
        for row in [mean] if form == "table" and len(windows) == 1 else [mean, *windows]:  # a single window is the mean
            print_row(name, row, form)


def window_edges(windows: list[dict]) -> list[float]:
    """Times (windows + 1,) in s between which each window speaks: a hop around its middle, the first and last to the ends."""
    starts = [row["start_s"] for row in windows]
    between = [(one + other) / 2 + CLIP_SAMPLES / SAMPLE_RATE / 2 for one, other in itertools.pairwise(starts)]
    return [0.0, *between, windows[-1]["end_s"]]


def draw(predictor: Predictor, name: str, windows: list[dict], path: Path) -> None:
    """Draw a recording's mel-spectrogram, for which it is read once more, and its windows' rows, as PNG.

    Each column shows the loudest of its frames. Raises UserError if the file cannot be written.
    """
    params, samples = predictor.params, round(windows[-1]["end_s"] * SAMPLE_RATE)
    columns = max(1, min(PLOT_COLUMNS, samples // params.hop_length))
    picture = torch.full((params.n_mels, columns), -math.inf)
    for start, length, waveform in waveforms.windows(name):  # side by side
        frames = torch.arange(length // params.hop_length + 1)  # those of the recording, not of the padding
        feature = predictor.features(waveform[None])[0, 0].cpu()[:, frames]  # (1, 1, 220500) -> (mels, frames)
        column = ((start + params.hop_length * frames) * columns // samples).clamp(max=columns - 1)
        picture.scatter_reduce_(1, column.expand(params.n_mels, -1), feature, "amax")
    picture[:, column[-1] + 1:] = picture[:, column[-1], None]  # a rest of less than 0.1 s has no window
    probabilities = torch.stack([row["probabilities"] for row in windows])  # (windows, classes)
    figure = report.recording_figure(picture.numpy(), params, window_edges(windows), probabilities.numpy(), predictor.classes)
    write_atomically(path, lambda part: figure.savefig(part, format="png", dpi=100))


# --- the command ------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def interrupt_ends_input(interrupts: list):
    """Ctrl-C ends standard input, so that what was heard gets its mean, and is noted in `interrupts`; a second one as before."""
    def end_input(number: int, _) -> None:
        interrupts.append(number)
        signal.signal(signal.SIGINT, before)
        with open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), 0)  # a read that waits for more goes on and finds the end

    before = signal.signal(signal.SIGINT, end_input)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def run(args: argparse.Namespace) -> int:
    model, recordings = choose_model([args.model, *args.recordings] if args.model else [])
    if not (recordings or args.onnx):
        raise UserError(f"FILE_OR_FOLDER: is missing; {model} is a checkpoint, or holds a run: name recordings after it, or a "
                        f"file for --onnx")
    predictor = Predictor(model, args.device)
    if args.onnx:
        if len(predictor.networks) > 1:
            raise UserError(f"--onnx {args.onnx}: expected one network, {model} holds several; name one of its trainings")
        from util import export
        difference = export.export_onnx(copy.deepcopy(predictor.networks[0]).cpu(), Path(args.onnx))
        print(f"{args.onnx}: waveform (batch, {CLIP_SAMPLES}) -> probabilities (batch, classes); onnxruntime agrees with torch "
              f"to {difference:.1e}", file=sys.stderr)
    if not recordings:
        return 0
    names = [found for name in recordings for found in find_recordings(name)]
    if len(names) > 1 and (args.plot or args.format == "labels"):
        raise UserError(f"{'--plot' if args.plot else '--format labels'}: expected one recording, found {len(names)}; name one")
    if args.plot and not Path(args.plot).parent.is_dir():
        raise UserError(f"--plot {args.plot}: no such folder; make it first, or name another")
    if args.plot and names == ["-"]:
        raise UserError("--plot: cannot draw standard input, which is read only once; save it to a file and name that")
    print({"csv": "file,window,start_s,end_s,rank,class,probability\n", "json": "["}.get(args.format, ""), end="")
    failed, interrupts = 0, []
    for number, name in enumerate(names):
        listens = name == "-" and threading.current_thread() is threading.main_thread() and \
            signal.getsignal(signal.SIGINT) != signal.SIG_IGN  # no other thread may handle signals
        rows = predict(predictor, name, round(args.hop * SAMPLE_RATE), args.top, args.threshold, interrupts)
        try:
            with interrupt_ends_input(interrupts) if listens else contextlib.nullcontext():
                if name == "-" and args.format in ("table", "csv", "jsonl"):
                    print("-\n" if args.format == "table" else "", end="")
                    for row in rows:  # each as soon as it is heard; the mean is the last
                        print_row(name, row, args.format)
                        sys.stdout.flush()
                    mean = row
                else:
                    *windows, mean = rows
                    print_recording(name, windows, mean, args.format, is_first=number == failed)
            sys.stdout.flush()
            for note in mean["notes"]:
                print_error("predict.py", f"note: {name}: {note}")
            if args.plot:
                draw(predictor, name, windows, Path(args.plot))
        except UserError as error:
            print_error("predict.py", str(error))
            failed += 1
        if interrupts:
            break
    print("]\n" if args.format == "json" else "", end="")
    sys.stdout.flush()  # here, where a closed pipe or a full disk can still be reported
    if failed and len(names) > 1:
        print_error("predict.py", f"{failed} of {len(names)} recordings could not be used")
    return 130 if interrupts else 2 if failed else 0


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status: 0 done, 2 something the user can fix."""
    machine.keep_freed_memory()
    machine.multiply_in_fp32()
    machine.name_user()
    command.open_output()
    try:
        return run(parse_args(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        print_error("predict.py", str(error))
    except OSError as error:
        message = "nobody reads it any more" if isinstance(error, BrokenPipeError) else error.strerror or error
        print_error("predict.py", f"{error.filename or 'output'}: {message}")
        command.discard_output()
    return 2


if __name__ == "__main__":
    sys.exit(main())
