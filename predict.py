"""What sounds there are in a recording: the predictions of a trained network, a window of 5 s at a time.

    python predict.py runs/CNN/2026-11-25_02.13.14 recording.mp3
    python predict.py RUN_DIR folder-of-recordings --ensemble --format csv > sounds.csv
    python predict.py RUN_DIR/seed-42/fold-1/last.pt --onnx network.onnx
    python predict.py --help
"""
import argparse
import contextlib
import csv
import json
import os
import reprlib
import shutil
import signal
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":  # an interrupt ends the program without a traceback: there is nothing to save
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import numpy as np
import soundfile
import soxr
import torch

import dsets
from util import device as machine
import models
from util import export as onnx_graph
from util import rundir as runs
from util.cache import CLIP_SAMPLES, SAMPLE_RATE, LogMel, UserError, one_line, open_audio, pad_clip, to_mono

BATCH_WINDOWS = 16  # windows the networks see at once: memory is that of so many, whatever a recording's length


# --- the networks -----------------------------------------------------------------------------------------------------

class Predictor(torch.nn.Module):
    """Waveforms (B, 1, 220500) at 44 100 Hz -> probabilities (B, classes) of one checkpoint's network.

    The features, their normalisation, the crops and the precision are those of the network's validation.
    Raises UserError for a checkpoint whose parts do not fit together.
    """

    def __init__(self, path: Path):
        super().__init__()
        remedy = "name another checkpoint, or train that one again"
        try:
            checkpoint = runs.load_checkpoint(path)
        except UserError as error:
            raise UserError(f"{error}; {remedy}") from error
        if checkpoint["features"] != dsets.FEATURES:
            raise UserError(f"{path}: its network knows other features than this program computes "
                            f"({reprlib.repr(checkpoint['features'])}, here {dsets.FEATURES}); use the version of this program that "
                            f"trained it")
        try:
            self.classes = checkpoint["classes"]
            self.network = models.build_model(checkpoint["model_name"], len(self.classes))
            self.network.load_state_dict(checkpoint["model"])
        except (ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[-1].strip()[:300]  # load_state_dict says it last
            raise UserError(f"{path}: is not a whole checkpoint ({reason}); {remedy}") from error
        self.mean, self.std = (checkpoint["normalisation"][name] for name in ("mean", "std"))
        self.crops, self.precision = checkpoint["flags"]["crops"], checkpoint["precision"]
        self.log_mel = LogMel()
        self.to(memory_format=torch.channels_last).eval()

    @torch.inference_mode()
    def forward(self, waveforms: torch.Tensor) -> torch.Tensor:
        return self.classify(self.features(waveforms))

    def features(self, waveforms: torch.Tensor) -> torch.Tensor:
        """Waveforms (B, 1, 220500) -> mel-spectrograms (B, 1, 128, 431), one at a time: faster than a batch."""
        return torch.cat([self.log_mel(waveform[None]) for waveform in waveforms])

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """Mel-spectrograms (B, 1, 128, 431) in dB -> probabilities (B, classes), float32."""
        count, device = len(features), features.device
        corners = dsets.validation_corners(self.crops).to(device)
        rows = torch.arange(count, device=device).repeat(self.crops)
        examples = dsets.crop(features, rows, corners.repeat_interleave(count, dim=0))
        examples = dsets.normalise(examples, self.mean, self.std)  # (crops * B, 1, 100, 384)
        examples = examples.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            logits = self.network(examples)  # -> (crops * B, classes)
        return logits.float().unflatten(0, (self.crops, count)).mean(dim=0).softmax(dim=1)  # -> (B, classes)


class Ensemble:
    """The mean probabilities of several networks that know the same classes."""

    def __init__(self, paths: list[Path], device: torch.device):
        self.predictors = [Predictor(path).to(device) for path in paths]
        self.classes, self.device = self.predictors[0].classes, device
        for path, predictor in zip(paths, self.predictors):
            if predictor.classes != self.classes:
                raise UserError(f"{path}: knows other classes than {paths[0]}; networks that predict together must share them")

    @torch.inference_mode()
    def __call__(self, waveforms: torch.Tensor) -> torch.Tensor:
        """Waveforms (B, 1, 220500) -> probabilities (B, classes), on the CPU."""
        features = self.predictors[0].features(waveforms.to(self.device))  # all networks know the same features
        return torch.stack([predictor.classify(features) for predictor in self.predictors]).mean(dim=0).cpu()


def find_checkpoints(path: Path, ensemble: bool) -> list[Path]:
    """The checkpoint that a file, a training's folder or a run's folder means; all of a run's last ones for an ensemble.

    Raises UserError if there is none, or several and no ensemble.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: no such run or checkpoint; name a run's folder, or a last.pt in it")
    found = sorted([*path.glob("last.pt"), *path.glob("fold-*/last.pt"), *path.glob("seed-*/fold-*/last.pt")])
    if not found:
        raise UserError(f"{path}: holds no checkpoint (seed-S/fold-K/last.pt); name a run of training.py")
    if len(found) > 1 and not ensemble:
        raise UserError(f"{path}: holds {len(found)} trainings; name one of them ({found[0].parent}), or add --ensemble to "
                        f"let all predict together")
    return found


# --- recordings -------------------------------------------------------------------------------------------------------

def find_recordings(names: list[str]) -> list[str]:
    """Files as they are given; folders replaced by the audio files in and below them, by name, whatever their case.

    "-" is standard input. Raises UserError if a folder holds no audio file.
    """
    endings = {f".{name.lower()}" for name in soundfile.available_formats()} | {".aif", ".oga", ".opus"}
    found = []
    for name in names:
        if not name:
            raise UserError("FILE_OR_FOLDER: is empty; name a file or a folder")
        if name != "-" and os.path.isdir(name):  # (false, not an error, for names that cannot be)
            inside = sorted(path for path in Path(name).rglob("*") if path.suffix.lower() in endings and path.is_file())
            if not inside:
                raise UserError(f"{name}: holds no audio files ({', '.join(sorted(endings))})")
            found += map(str, inside)
        else:
            found.append(name)
    return found


@contextlib.contextmanager
def open_recording(name: str):
    """The soundfile.SoundFile of a file's name, or of "-". Raises UserError if it cannot be read."""
    if name != "-":
        with open_audio(Path(name), name) as file:
            yield file
        return
    if sys.stdin is None:
        raise UserError("standard input: is closed")
    with tempfile.TemporaryFile() as copy:  # a header is read with seeks, which a pipe has not
        shutil.copyfileobj(sys.stdin.buffer, copy)
        copy.seek(0)
        with open_audio(copy, "standard input") as file:
            yield file


def windows(name: str, hop: int):
    """Windows of a recording: first sample, samples in it and waveform (1, 220500), read as they are asked for.

    A window begins every `hop` samples at 44 100 Hz until one reaches the end; that one is padded with zeros. Channels
    are averaged, other sample rates resampled. Raises UserError if the recording cannot be read, or is empty.
    """
    shown = "standard input" if name == "-" else name
    start, pending = 0, np.zeros(0, np.float32)  # pending: the samples from `start` on that have been read
    with open_recording(name) as file:
        resampler, done = None, False
        if file.samplerate != SAMPLE_RATE:
            resampler = soxr.ResampleStream(file.samplerate, SAMPLE_RATE, 1, dtype="float32")
        while not done:
            samples = file.read(SAMPLE_RATE, dtype="float32", always_2d=True)  # (frames, channels)
            done = len(samples) == 0
            mono = to_mono(samples, shown)  # -> (frames,)
            if resampler:
                mono = resampler.resample_chunk(np.ascontiguousarray(mono), last=done)
            pending = np.concatenate([pending, mono])
            while len(pending) > CLIP_SAMPLES:  # a window that ends where the recording does is the last: it waits
                yield start, CLIP_SAMPLES, pad_clip(pending[:CLIP_SAMPLES])
                start, pending = start + hop, pending[hop:]
    if len(pending) == 0:
        raise UserError(f"{shown}: holds no samples, or too few to resample")
    yield start, len(pending), pad_clip(pending)


def predict(ensemble: Ensemble, name: str, hop: int) -> dict:
    """Predictions for one recording: starts (W,) and ends (W,) of its windows in s, their probabilities (W, classes).

    Also their mean (classes,), in which a last window that is not full weighs as much less. Memory does not grow with the
    recording but by these. Raises UserError if it cannot be read.
    """
    starts, ends, probabilities, batch = [], [], [], []

    def flush():
        probabilities.append(ensemble(torch.stack(batch)))
        batch.clear()

    for start, length, waveform in windows(name, hop):
        starts.append(start / SAMPLE_RATE)
        ends.append((start + length) / SAMPLE_RATE)
        batch.append(waveform)
        if len(batch) == BATCH_WINDOWS:
            flush()
    if batch:
        flush()
    probabilities = torch.cat(probabilities)  # -> (W, classes)
    seconds = torch.tensor(ends) - torch.tensor(starts)
    mean = (seconds / seconds.sum()) @ probabilities  # (W,) @ (W, classes) -> (classes,)
    return {"file": name, "starts": starts, "ends": ends, "probabilities": probabilities, "mean": mean}


# --- output -----------------------------------------------------------------------------------------------------------

def top_classes(probabilities: torch.Tensor, classes: list[str], top: int) -> list[tuple[str, float]]:
    """The likeliest classes of (classes,) with their probabilities, likeliest first."""
    values, indices = probabilities.topk(min(top, len(classes)))
    return [(classes[index], value) for index, value in zip(indices.tolist(), values.tolist())]


class TableWriter:
    """For reading: the whole recording, then a line a window."""

    def __init__(self, classes: list[str], top: int):
        self.classes, self.top = classes, top

    def write(self, result: dict) -> None:
        def line(title, probabilities):
            cells = (f"{name} {100 * value:.1f}%" for name, value in top_classes(probabilities, self.classes, self.top))
            print(f"{title:>17}  " + ", ".join(cells))

        print(f"{result['file']} ({result['ends'][-1]:.1f} s)")
        line("mean", result["mean"])
        if len(result["starts"]) > 1:
            for start, end, probabilities in zip(result["starts"], result["ends"], result["probabilities"]):
                line(f"{start:.1f} - {end:.1f} s", probabilities)

    def close(self) -> None:
        pass


class CsvWriter(TableWriter):
    """A row for each of a window's top classes; those of the whole recording have the window "mean"."""

    def __init__(self, classes: list[str], top: int):
        super().__init__(classes, top)
        self.rows = csv.writer(sys.stdout, lineterminator="\n")
        self.rows.writerow(["file", "window", "start_s", "end_s", "rank", "class", "probability"])

    def write(self, result: dict) -> None:
        parts = [("mean", 0.0, result["ends"][-1], result["mean"])]
        parts += zip(range(len(result["starts"])), result["starts"], result["ends"], result["probabilities"])
        for window, start, end, probabilities in parts:
            for rank, (name, value) in enumerate(top_classes(probabilities, self.classes, self.top), start=1):
                self.rows.writerow([result["file"], window, f"{start:.3f}", f"{end:.3f}", rank, name, f"{value:.6f}"])


class JsonWriter(TableWriter):
    """One array, an object a recording."""

    def __init__(self, classes: list[str], top: int):
        super().__init__(classes, top)
        self.separator = "["

    def write(self, result: dict) -> None:
        def top(probabilities):
            return [{"class": name, "probability": value}
                    for name, value in top_classes(probabilities, self.classes, self.top)]

        content = {"file": result["file"], "duration_s": result["ends"][-1], "top": top(result["mean"]),
                   "windows": [{"start_s": start, "end_s": end, "top": top(probabilities)} for start, end, probabilities
                               in zip(result["starts"], result["ends"], result["probabilities"])]}
        print(f"{self.separator}{json.dumps(content)}", end="")
        self.separator = ",\n"

    def close(self) -> None:
        print("[]" if self.separator == "[" else "]")


WRITERS = {"table": TableWriter, "csv": CsvWriter, "json": JsonWriter}


# --- the command ------------------------------------------------------------------------------------------------------

def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="predict.py", allow_abbrev=False, description="Say what sounds there are in "
                                     "recordings, a window of 5 s at a time.")
    parser.add_argument("model", metavar="RUN_OR_CHECKPOINT", help="a run's folder, one of its trainings, or a .pt file")
    parser.add_argument("recordings", metavar="FILE_OR_FOLDER", nargs="*",
                        help="audio that libsndfile reads (WAV, FLAC, OGG, MP3 ...), of any rate and length; - reads a WAV "
                             "from standard input")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="classes to name (default 5)")
    parser.add_argument("--hop", type=float, default=2.5, metavar="S",
                        help="seconds from one window's start to the next one's, 0.1 to 5 (default 2.5)")
    parser.add_argument("--format", choices=list(WRITERS), default="table", help="default table")
    parser.add_argument("--ensemble", action="store_true", help="all trainings of the run predict together, by their mean")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto",
                        help="auto takes a GPU if there is one (default auto)")
    parser.add_argument("--onnx", metavar="FILE", help="write the network, from waveform to probabilities, as an ONNX graph")

    def refuse(message: str):
        raise UserError(f"{message}; --help lists the flags")
    parser.error = refuse  # one line, without the usage
    return parser


def run(argv: list[str]) -> int:
    args = build_parser().parse_intermixed_args(argv)  # flags may stand between the names
    if not 0.1 <= args.hop <= CLIP_SAMPLES / SAMPLE_RATE:
        raise UserError(f"--hop {args.hop:g}: expected seconds from 0.1 to 5; longer ones would leave gaps")
    if args.top < 1:
        raise UserError(f"--top {args.top}: expected 1 or more")
    if args.onnx is not None:
        onnx = Path(args.onnx)
        if onnx.suffix != ".onnx":  # a recording or a checkpoint is never written over
            raise UserError(f"--onnx {args.onnx}: expected a name that ends in .onnx")
        if not onnx.parent.is_dir() or (onnx.exists() and not onnx.is_file()):
            raise UserError(f"--onnx {args.onnx}: cannot be a file there; name one in a folder that exists")
    if not args.recordings and not args.onnx:
        raise UserError("FILE_OR_FOLDER: is missing; name recordings to listen to, or a file for --onnx")
    if not args.model:
        raise UserError("RUN_OR_CHECKPOINT: is empty; name a run's folder or a checkpoint")
    checkpoints = find_checkpoints(Path(args.model), args.ensemble)
    if args.onnx:
        if len(checkpoints) > 1:
            raise UserError("--onnx: writes one network; name one training instead of --ensemble")
        difference = onnx_graph.export(Predictor(checkpoints[0]), Path(args.onnx))
        print(f"{args.onnx}: waveform (batch, {CLIP_SAMPLES}) -> probabilities (batch, classes); onnxruntime agrees with "
              f"torch to {difference:.1e}", file=sys.stderr)
    if not args.recordings:
        return 0
    names = find_recordings(args.recordings)
    ensemble = Ensemble(checkpoints, machine.choose_device(args.device))
    writer = WRITERS[args.format](ensemble.classes, args.top)
    failed = 0
    for name in names:
        try:
            result = predict(ensemble, name, round(args.hop * SAMPLE_RATE))
        except UserError as error:
            print(f"predict.py: {one_line(str(error))}", file=sys.stderr)
            failed += 1
            continue
        writer.write(result)
        sys.stdout.flush()
    writer.close()
    sys.stdout.flush()  # here, where a closed pipe or a full disk can still be told
    if failed and len(names) > 1:
        print(f"predict.py: {failed} of {len(names)} recordings could not be used", file=sys.stderr)
    return 2 if failed else 0


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status: 0 done, 2 something the user can mend."""
    machine.keep_freed_memory()
    if sys.stdout is None:  # closed by who called
        sys.stdout = open(os.devnull, "w")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names that the terminal's encoding has not
    try:
        return run(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"predict.py: {one_line(str(error))}", file=sys.stderr)
    except OSError as error:
        message = "nobody reads it any more" if isinstance(error, BrokenPipeError) else error.strerror or error
        print(f"predict.py: {error.filename or 'output'}: {message}", file=sys.stderr)
        sys.stdout = open(os.devnull, "w")  # or the exit would stumble over it again
    return 2


if __name__ == "__main__":
    sys.exit(main())
