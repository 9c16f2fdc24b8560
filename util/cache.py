"""A recording -> waveform -> mel-spectrogram in dB; the features of many, computed once and kept on disk.

    WAV file                 audio/1-100032-A-0.wav
    waveform                 (1, 220500) float32     load_waveform
    mel-spectrogram, dB      (1, 128, 431)           LogMel
    features of all clips    (N, 1, 128, 431)        load_features
"""
import contextlib
import hashlib
import json
import os
import pickle
import re
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import numpy as np
import soundfile
import soxr
import torch
import torchaudio
from tqdm import tqdm

SAMPLE_RATE = 44_100  # Hz, ESC-50's
CLIP_SAMPLES = 5 * SAMPLE_RATE
RATE_LIMITS = (1_000, 768_000)  # Hz; from below telephone speech to the fastest audio converters
MAX_CHANNELS = 64  # the largest microphone arrays on sale
# Data lengths of WAV files that were written as a stream, before their end was known: by ffmpeg, and by SoX.
STREAMED = (0xFFFFFFFF, 0x7FFFF000)
MAX_AMPLITUDE = 2.0 ** 31  # 32-bit integers kept as floats; squares of much larger samples are not finite

# The mel-spectrogram of the 2023 write-up (DB is torchaudio's and librosa's usual 80 dB and 1e-10).
MEL = {"sample_rate": SAMPLE_RATE, "n_fft": 2048, "hop_length": 512, "n_mels": 128, "f_min": 0.0, "f_max": 8000.0}
TOP_DB = 80.0
POWER_FLOOR = 1e-10
FRAMES = CLIP_SAMPLES // MEL["hop_length"] + 1  # 431: a frame at both ends (center=True)

WEIGHT_TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64)  # int64: BatchNorm's counter
CACHE_FORMAT = 1  # raised when the layout of the cached features changes, or LogMel's arithmetic


class UserError(ValueError):
    """Something the user can mend: one line that names the file or flag, what was found and what to do."""


# --- files ------------------------------------------------------------------------------------------------------------

def write_whole(path: Path, write) -> None:
    """Let write(temporary path) make a file, then put it at `path`: the file is there whole or not at all.

    Raises UserError naming the path if the disk is full, or the folder gone or not to be written to.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); make room for it or mend the folder, "
                        f"what was there before is whole") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, 300 characters at most, or its kind where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def one_line(message: str) -> str:
    """A message as a terminal may show it: in one line of at most 2000 characters, whatever names are in it."""
    shown = "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in message)
    return shown if len(shown) <= 2000 else shown[:1500] + " ... " + shown[-495:]


def refuse_irregular(path: str | Path) -> None:
    """Raise ValueError with one line if there is no regular file: a pipe would be waited on for ever."""
    if not os.path.isfile(path):  # (False, not an error, for names that cannot be)
        raise ValueError("is not a regular file" if os.path.exists(path) else "no such file")


def read_json(path: Path):
    """What a JSON file holds. Raises ValueError with one line if it is no regular file or no JSON."""
    refuse_irregular(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(first_line(error)) from error


def load_tensors(path: str | Path):
    """What torch.save wrote into a file, on the CPU: tensors and plain values. Nothing in the file is executed.

    Raises ValueError with one line if it is no such file, or unpacks to more than it is.
    """
    refuse_irregular(path)
    is_zip = False
    try:
        is_zip = zipfile.is_zipfile(path)
        if is_zip:
            with zipfile.ZipFile(path) as archive:  # torch packs without compressing
                if sum(member.file_size for member in archive.infolist()) > os.path.getsize(path):
                    raise ValueError("it unpacks to more than it is")
        with warnings.catch_warnings(action="ignore"):  # of pickles that torch.save did not write
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler and the zip reader raise a dozen kinds
        if not is_zip:  # torch takes it for a file of its first versions, and says little of it
            raise ValueError("it is not what torch.save writes, or cut short") from error
        if isinstance(error, pickle.UnpicklingError):
            raise ValueError("it holds more than tensors and plain values") from error
        raise ValueError(first_line(error)) from error


def check_weights(weights) -> None:
    """Raise ValueError with one line unless these are names with tensors of finite numbers."""
    if not isinstance(weights, dict) or not all(isinstance(name, str) and isinstance(tensor, torch.Tensor)
                                                for name, tensor in weights.items()):
        raise ValueError("expected names with tensors")
    for name, tensor in weights.items():
        if tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.dtype not in WEIGHT_TYPES:
            raise ValueError(f"{name} is no plain tensor of numbers")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"{name} is larger than what is stored of it")
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds numbers that are not finite")
        if name.endswith("running_var") and (tensor < 0).any():
            raise ValueError(f"{name} holds variances below 0")


def first_ten(errors: list[str]) -> str:
    """The first ten of the errors that are not empty, and how many more there are, in one line."""
    found = [error for error in errors if error]
    return "; ".join(found[:10]) + (f"; and {len(found) - 10} more" if len(found) > 10 else "")


def in_threads(function, items, title: str, progress: bool = True) -> list:
    """[function(item) for each item], in as many threads as cores are ours, with a progress bar on a terminal."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # Slurm gives some
    with ThreadPoolExecutor(cores) as pool, contextlib.closing(pool.map(function, items)) as results:
        # closing: an interrupt drops what has not begun
        return list(tqdm(results, title, len(items), unit=" clips", disable=None if progress else True))


# --- audio ------------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def open_audio(source, name: str | Path):
    """The soundfile.SoundFile of a path or binary file; `name` stands for it in errors.

    Raises UserError if it is no regular file, cannot be decoded (also while it is read), is shorter than it says, or has
    an absurd sample rate or number of channels.
    """
    if isinstance(source, Path):
        try:
            refuse_irregular(source)
        except ValueError as error:
            raise UserError(f"{name}: {error}") from error
    try:
        with soundfile.SoundFile(source) as file:
            if not RATE_LIMITS[0] <= file.samplerate <= RATE_LIMITS[1]:
                raise UserError(f"{name}: sample rate {file.samplerate} Hz, expected {RATE_LIMITS[0]} to "
                                f"{RATE_LIMITS[1]} Hz")
            if file.channels > MAX_CHANNELS:
                raise UserError(f"{name}: has {file.channels} channels, expected {MAX_CHANNELS} at most")
            # libsndfile takes what there is and tells in its log alone
            short = re.search(r"^ *(?:data|SSND|Data Size) *: (\d+) \(should be (\d+)\)", file.extra_info, re.MULTILINE)
            if short and int(short[1]) not in STREAMED:
                raise UserError(f"{name}: is cut short: it says {short[1]} bytes of sound and has {short[2]}; fetch or copy it "
                                f"again")
            yield file
    except (soundfile.SoundFileError, OSError, TypeError, UnicodeError) as error:
        # TypeError: headerless, by the file's ending; UnicodeError: a name that is not UTF-8
        raise UserError(f"{name}: cannot be decoded as audio ({error})") from error


def to_mono(samples: np.ndarray, name: str | Path) -> np.ndarray:
    """The mean of the channels: samples (frames, channels) -> (frames,), float32.

    Raises UserError if a sample is not a finite number, or far too large.
    """
    peak = np.maximum(samples.max(initial=0), -samples.min(initial=0))  # NaN if one of them is
    if not np.isfinite(peak):
        raise UserError(f"{name}: holds samples that are not finite numbers")
    if peak > MAX_AMPLITUDE:
        raise UserError(f"{name}: holds samples as large as {peak:.3g}, expected about 1 at most")
    return samples.mean(axis=1) if samples.shape[1] > 1 else samples[:, 0]  # (frames, channels) -> (frames,)


def load_waveform(path: str | Path) -> torch.Tensor:
    """The first 5 s of a recording: (1, 220500) float32, nominally in [-1, 1], at 44 100 Hz.

    Channels are averaged, other sample rates resampled (soxr, high quality), shorter recordings padded with zeros.
    Raises UserError if the file cannot be decoded, is empty, or holds a sample that is not a finite number.
    """
    path = Path(path)
    with open_audio(path, path) as file:
        rate = file.samplerate
        # another second lets the resampling filter end past the cut
        frames = CLIP_SAMPLES if rate == SAMPLE_RATE else 6 * rate
        blocks = file.blocks(rate, frames=min(frames, file.frames), dtype="float32", always_2d=True)  # (frames, channels)
        mono = np.concatenate([np.zeros(0, np.float32), *(to_mono(block, path) for block in blocks)])  # -> (frames,)
    if len(mono) == 0:
        raise UserError(f"{path}: holds no samples")
    if rate != SAMPLE_RATE:
        mono = soxr.resample(mono, rate, SAMPLE_RATE)
    return pad_clip(mono[:CLIP_SAMPLES])


def pad_clip(samples: np.ndarray) -> torch.Tensor:
    """At most 220 500 samples, followed by zeros where they are fewer: (frames,) -> (1, 220500)."""
    if len(samples) < CLIP_SAMPLES:
        samples = np.pad(samples, (0, CLIP_SAMPLES - len(samples)))
    return torch.from_numpy(samples)[None]  # (220500,) -> (1, 220500)


# --- features ---------------------------------------------------------------------------------------------------------

class LogMel(torch.nn.Module):
    """Waveform (..., samples) in [-1, 1] -> mel-spectrogram (..., 128 mels, frames) in dB.

    Equal to torchaudio's MelSpectrogram (HTK scale, no norm, power 2, reflect padding) followed by
    AmplitudeToDB(top_db=80) on one clip at a time; faster, as only frequency bins that reach a mel filter
    are squared and summed. The dB are cut 80 below the loudest value of each clip, never of a batch.
    """

    def __init__(self):
        super().__init__()
        filters = torchaudio.functional.melscale_fbanks(  # (1025 bins, 128 mels)
            MEL["n_fft"] // 2 + 1, MEL["f_min"], MEL["f_max"], MEL["n_mels"], MEL["sample_rate"])
        self.num_bins = int(filters.any(dim=1).nonzero().max()) + 1  # 372 of 1025: the others lie above f_max
        self.register_buffer("filters", filters[:self.num_bins].T.contiguous())  # (128 mels, 372 bins)
        self.register_buffer("window", torch.hann_window(MEL["n_fft"]))

    def forward(self, waveform: torch.Tensor) -> torch.Tensor:
        flat = waveform.reshape(-1, waveform.shape[-1])  # (..., samples) -> (clips, samples)
        spectrum = torch.stft(flat, MEL["n_fft"], MEL["hop_length"], window=self.window, center=True,
                              pad_mode="reflect", return_complex=True)  # -> (clips, 1025, frames)
        spectrum = spectrum[:, :self.num_bins]  # -> (clips, 372, frames)
        power = spectrum.real.square().addcmul_(spectrum.imag, spectrum.imag)
        mel = self.filters @ power  # (128, 372) @ (clips, 372, frames) -> (clips, 128, frames)
        decibels = 10 * mel.clamp(min=POWER_FLOOR).log10()
        decibels = torch.maximum(decibels, decibels.amax(dim=(1, 2), keepdim=True) - TOP_DB)
        return decibels.reshape(*waveform.shape[:-1], *decibels.shape[1:])  # -> (..., 128, frames)


def cache_folders(root: Path) -> list[Path]:
    """Where the features of a root may lie: in the root, or for a root one may not write to, the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or os.path.expanduser("~/.cache")
    digest = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]
    return [root / "features", Path(home) / "esc50-features" / digest]


def cache_key(root: Path, names: list[str]) -> str:
    """A digest of all that features are computed from: parameters, library versions, each file's name, size, times.

    The time of change beside that of modification: files that were swapped or copied over keep the latter.
    """
    files = []
    for name in names:
        with contextlib.suppress(OSError):  # a missing file is reported when the features are computed
            stat = os.stat(root / "audio" / name)
            files.append([name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns])
    made_from = {"format": CACHE_FORMAT, "mel": MEL, "top_db": TOP_DB, "power_floor": POWER_FLOOR, "torch": torch.__version__,
                 "torchaudio": torchaudio.__version__, "soundfile": soundfile.__libsndfile_version__,
                 "soxr": soxr.__version__, "files": files}
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:16]


def load_features(root: str | Path, names: list[str], progress: bool = True) -> tuple[torch.Tensor, list[str]]:
    """Features (N, 1, 128, 431) float32 of the files audio/<name>, memory-mapped, and each file's SHA-256.

    They are computed the first time and whenever a file, a parameter or a library has changed.
    Raises UserError naming the files (ten at most) that cannot be used.
    """
    root = Path(root)
    key = cache_key(root, names)
    for folder in cache_folders(root):
        cached = read_cache(folder / f"logmel-{key}.npy", len(names))
        if cached is not None:
            return cached
    for folder in cache_folders(root):
        lock = filelock.FileLock(folder / "lock")  # a second process waits for the first one's features
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except OSError:  # not to be written to
            continue
        try:
            path = folder / f"logmel-{key}.npy"
            cached = read_cache(path, len(names))
            if cached is None:
                for stale in [*folder.glob("logmel-*"), *folder.glob(".logmel-*.part")]:
                    with contextlib.suppress(OSError):  # in use by another process (Windows)
                        stale.unlink()
                compute_features(root, names, path, progress)
                cached = read_cache(path, len(names))
            return cached
        finally:
            lock.release()
    raise UserError(f"no room for the features: cannot write to {' or '.join(map(str, cache_folders(root)))}; "
                    f"make one of them writable, or set XDG_CACHE_HOME")


def read_cache(path: Path, num_clips: int) -> tuple[torch.Tensor, list[str]] | None:
    """The cached features and file digests, or None if there are none or they are not whole."""
    try:
        digests = read_json(path.with_suffix(".json"))
        features = np.load(path, mmap_mode="c")  # copy on write: nothing done to the tensor reaches the file
        whole = features.shape == (num_clips, 1, MEL["n_mels"], FRAMES) and features.dtype == np.float32 \
            and len(digests) == num_clips
    except (OSError, ValueError, EOFError, AttributeError, TypeError):  # whatever else the files hold
        return None
    if not whole:
        return None
    return torch.from_numpy(features), digests


def compute_features(root: Path, names: list[str], path: Path, progress: bool) -> None:
    """Write the features of the files audio/<name> to `path` and their SHA-256 beside it, all cores busy."""
    log_mel = LogMel()
    digests, errors = [""] * len(names), [""] * len(names)

    def write_both(temporary: Path) -> None:
        features = np.lib.format.open_memmap(temporary, "w+", np.float32, (len(names), 1, MEL["n_mels"], FRAMES))
        header_bytes, clip_bytes = features.offset, features[0].nbytes
        del features  # written to as a file: cheaper than page by page, and a full disk is an error one can catch

        def compute_one(index: int) -> None:
            wav = root / "audio" / names[index]
            try:
                with torch.inference_mode():
                    feature = log_mel(load_waveform(wav)).numpy()  # (1, 128, 431)
                with open(wav, "rb") as file:
                    digests[index] = hashlib.file_digest(file, "sha256").hexdigest()
            except (UserError, OSError) as error:
                errors[index] = str(error)
                return
            with open(temporary, "rb+") as file:
                file.seek(header_bytes + index * clip_bytes)
                file.write(feature.tobytes())

        # One clip a thread: its spectrum stays in the processor's cache, which a batch's does not.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            in_threads(compute_one, range(len(names)), "features", progress)
        finally:
            torch.set_num_threads(threads)
        if any(errors):
            raise UserError(f"{first_ten(errors)}; mend them, take their rows out of meta/esc50.csv, or "
                            f"make the data anew (--download; for --demo, in a new folder)")
        # the digests first: where there are features, they are there too
        write_whole(path.with_suffix(".json"), lambda part: part.write_text(json.dumps(digests)))

    write_whole(path, write_both)
