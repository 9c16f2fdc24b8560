"""Recordings -> mel-spectrograms -> folds -> augmented batches.

    WAV file                 audio/1-100032-A-0.wav
    waveform                 (1, 220500) float32     load_waveform
    mel-spectrogram, dB      (1, 128, 431)           LogMel
    features of all clips    (N, 1, 128, 431)        ESC50, computed once and kept on disk
    crop                     (B, 1, 100, 384)        draw_crops, crop
    masked crop              (B, 1, 100, 384)        draw_masks, apply_masks

Every random draw comes from a generator made by `generator_for(seed, fold, epoch, purpose)`.
"""
import contextlib
import hashlib
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import numpy as np
import pandas as pd
import soundfile
import soxr
import torch
import torchaudio
from tqdm import tqdm

# ESC-50 (Piczak, ACM MM 2015): 2000 clips of 5 s at 44.1 kHz, 50 classes, 5 folds.
SAMPLE_RATE = 44_100  # Hz
CLIP_SAMPLES = 5 * SAMPLE_RATE
NUM_CLASSES = 50
NUM_FOLDS = 5
COLUMNS = ("filename", "fold", "target", "category", "esc10")
RATE_LIMITS = (1_000, 768_000)  # Hz; from below telephone speech to the fastest audio converters
MAX_AMPLITUDE = 2.0 ** 31  # 32-bit integers kept as floats; squares of much larger samples are not finite

# The mel-spectrogram of the 2023 write-up (DB is torchaudio's and librosa's usual 80 dB and 1e-10).
MEL = {"sample_rate": SAMPLE_RATE, "n_fft": 2048, "hop_length": 512, "n_mels": 128, "f_min": 0.0, "f_max": 8000.0}
TOP_DB = 80.0
POWER_FLOOR = 1e-10
FRAMES = CLIP_SAMPLES // MEL["hop_length"] + 1  # 431: a frame at both ends (center=True)

# The crop of the write-up; masks as in SpecAugment's policy "LD" (Park et al., Interspeech 2019, table 1).
CROP_MELS, CROP_FRAMES = 100, 384
FREQUENCY_MASKS, MAX_MASK_MELS = 2, 27
TIME_MASKS, MAX_MASK_FRAMES = 2, 100

CACHE_FORMAT = 1  # raised when the layout of the cached features changes


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


def first_ten(errors: list[str]) -> str:
    """The first ten of the errors that are not empty, and how many more there are, in one line."""
    found = [error for error in errors if error]
    return "; ".join(found[:10]) + (f"; and {len(found) - 10} more" if len(found) > 10 else "")


def in_threads(function, items, title: str, progress: bool = True) -> list:
    """[function(item) for each item], in as many threads as cores, with a progress bar on a terminal."""
    with ThreadPoolExecutor(os.cpu_count()) as pool, contextlib.closing(pool.map(function, items)) as results:
        # closing: an interrupt drops what has not begun
        return list(tqdm(results, title, len(items), unit=" clips", disable=None if progress else True))


def load_waveform(path: str | Path) -> torch.Tensor:
    """The first 5 s of a recording: (1, 220500) float32, nominally in [-1, 1], at 44 100 Hz.

    Channels are averaged, other sample rates resampled (soxr, high quality), shorter recordings padded with zeros.
    Raises UserError if the file cannot be decoded, is empty, or holds a sample that is not a finite number.
    """
    path = Path(path)
    if not path.is_file():  # a pipe would be waited on for ever
        raise UserError(f"{path}: {'is not a regular file' if path.exists() else 'no such file'}")
    try:
        with soundfile.SoundFile(path) as file:
            rate = file.samplerate
            if not RATE_LIMITS[0] <= rate <= RATE_LIMITS[1]:
                raise UserError(f"{path}: sample rate {rate} Hz, expected {RATE_LIMITS[0]} to {RATE_LIMITS[1]} Hz")
            # another second lets the resampling filter end past the cut
            frames = CLIP_SAMPLES if rate == SAMPLE_RATE else 6 * rate
            samples = file.read(frames, dtype="float32", always_2d=True)  # (frames, channels)
    except (soundfile.SoundFileError, OSError, TypeError) as error:  # TypeError: headerless, by the file's ending
        raise UserError(f"{path}: cannot be decoded as audio ({error})") from error
    if len(samples) == 0:
        raise UserError(f"{path}: holds no samples")
    peak = np.abs(samples).max()  # NaN if one of them is
    if not np.isfinite(peak):
        raise UserError(f"{path}: holds samples that are not finite numbers")
    if peak > MAX_AMPLITUDE:
        raise UserError(f"{path}: holds samples as large as {peak:.3g}, expected about 1 at most")
    mono = samples.mean(axis=1) if samples.shape[1] > 1 else samples[:, 0]  # (frames, channels) -> (frames,)
    if rate != SAMPLE_RATE:
        mono = soxr.resample(mono, rate, SAMPLE_RATE)
    mono = mono[:CLIP_SAMPLES]
    if len(mono) < CLIP_SAMPLES:
        mono = np.pad(mono, (0, CLIP_SAMPLES - len(mono)))
    return torch.from_numpy(mono)[None]  # (220500,) -> (1, 220500)


def read_table(root: str | Path) -> pd.DataFrame:
    """meta/esc50.csv of a root, checked: columns filename, fold, target, category, esc10, one row a clip.

    Raises UserError naming the line if a value is not what ESC-50's table may hold.
    """
    path = Path(root) / "meta" / "esc50.csv"
    if not path.is_file():
        raise UserError(f"--data {root}: has no meta/esc50.csv; name an ESC-50 folder, fetch it with --download, "
                        f"or try --demo")
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (OSError, ValueError, pd.errors.ParserError) as error:  # ValueError: not UTF-8, or no columns at all
        raise UserError(f"{path}: cannot be read as a comma-separated table ({str(error).strip()})") from error
    missing = [column for column in COLUMNS if column not in table.columns]
    if missing:
        raise UserError(f"{path}: has no column {', '.join(missing)}; expected {', '.join(COLUMNS)}")
    if table.empty:
        raise UserError(f"{path}: lists no clips")
    if not isinstance(table.index, pd.RangeIndex):  # pandas takes a cell too many for an index
        raise UserError(f"{path}: its rows have more cells than its header has; expected {', '.join(COLUMNS)}")
    table = table[list(COLUMNS)]

    def refuse(wrong: pd.Series, column: str, expected: str) -> None:
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            raise UserError(f"{path}: line {row + 2}: {column} is {table[column][row]!r}, expected {expected}")

    names = table["filename"]
    refuse((names == "") | names.str.contains(r"[/\\\x00]") | names.isin([".", ".."]), "filename",
           "the name of a file in audio/, without a folder")
    refuse(names.duplicated(), "filename", "each file once")
    for column, low, high in (("fold", 1, NUM_FOLDS), ("target", 0, NUM_CLASSES - 1)):
        allowed = [str(value) for value in range(low, high + 1)]
        refuse(~table[column].isin(allowed), column, f"a whole number from {low} to {high}")
    refuse(~table["esc10"].str.lower().isin(["true", "false"]), "esc10", "True or False")
    for column, other in (("target", "category"), ("category", "target")):
        first = table.groupby(column)[other].transform("first")
        refuse(table[other] != first, other, f"the same for every clip of one {column}")
    return table.assign(fold=table["fold"].astype(int), target=table["target"].astype(int),
                        esc10=table["esc10"].str.lower() == "true")


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


def cache_key(root: Path, table: pd.DataFrame) -> str:
    """A digest of all that features are computed from: parameters, library versions, each file's name, size, times.

    The time of change beside that of modification: files that were swapped or copied over keep the latter.
    """
    files = []
    for name in table["filename"]:
        with contextlib.suppress(OSError):  # a missing file is reported when the features are computed
            stat = os.stat(root / "audio" / name)
            files.append([name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns])
    made_from = {"format": CACHE_FORMAT, "mel": MEL, "top_db": TOP_DB, "torch": torch.__version__,
                 "torchaudio": torchaudio.__version__, "soundfile": soundfile.__libsndfile_version__,
                 "soxr": soxr.__version__, "files": files}
    return hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:16]


def load_features(root: str | Path, table: pd.DataFrame, progress: bool = True) -> tuple[torch.Tensor, list[str]]:
    """Features (N, 1, 128, 431) float32 of the table's clips, memory-mapped, and each file's SHA-256.

    They are computed the first time and whenever a file, a parameter or a library has changed.
    Raises UserError naming the files (ten at most) that cannot be used.
    """
    root = Path(root)
    key = cache_key(root, table)
    for folder in cache_folders(root):
        cached = read_cache(folder / f"logmel-{key}.npy", len(table))
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
            cached = read_cache(path, len(table))
            if cached is None:
                for stale in [*folder.glob("logmel-*"), *folder.glob(".logmel-*.part")]:
                    with contextlib.suppress(OSError):  # in use by another process (Windows)
                        stale.unlink()
                compute_features(root, table, path, progress)
                cached = read_cache(path, len(table))
            return cached
        finally:
            lock.release()
    raise UserError(f"no room for the features: cannot write to {' or '.join(map(str, cache_folders(root)))}; "
                    f"make one of them writable, or set XDG_CACHE_HOME")


def read_cache(path: Path, num_clips: int) -> tuple[torch.Tensor, list[str]] | None:
    """The cached features and file digests, or None if there are none or they are not whole."""
    try:
        digests = json.loads(path.with_suffix(".json").read_text())
        features = np.load(path, mmap_mode="c")  # copy on write: nothing done to the tensor reaches the file
        whole = features.shape == (num_clips, 1, MEL["n_mels"], FRAMES) and features.dtype == np.float32 \
            and len(digests) == num_clips
    except (OSError, ValueError, EOFError, AttributeError, TypeError):  # whatever else the files hold
        return None
    if not whole:
        return None
    return torch.from_numpy(features), digests


def compute_features(root: Path, table: pd.DataFrame, path: Path, progress: bool) -> None:
    """Write the features of the table's clips to `path` and the files' SHA-256 beside it, all cores busy."""
    names = list(table["filename"])
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
            raise UserError(f"{first_ten(errors)}; mend or remove them, or fetch the data again (--download)")
        # the digests first: where there are features, they are there too
        write_whole(path.with_suffix(".json"), lambda part: part.write_text(json.dumps(digests)))

    write_whole(path, write_both)


# --- the data set -----------------------------------------------------------------------------------------------------

class ESC50(torch.utils.data.Dataset):
    """ESC-50, or a root laid out like it, as mel-spectrograms.

    ds[i] is (feature (1, 128, 431) float32 in dB, class index); len(ds) the number of clips.

    table     a row a clip: filename, fold, target, category, esc10
    classes   category names in the order of their targets; class indices count through them from 0
    targets   (N,) class indices, int64; for all 50 classes the same as the table's targets
    features  (M, 1, 128, 431) of all the root's clips, memory-mapped; rows[i] is the row of clip i

    root: a folder with meta/esc50.csv and audio/*.wav; esc10: keep the clips of ESC-10 alone;
    progress: show a bar while features are computed (on a terminal).
    Raises UserError where the root cannot be used.
    """

    def __init__(self, root: str | Path = "data/ESC-50", esc10: bool = False, progress: bool = True):
        self.root = Path(root)
        table = read_table(self.root)
        keep = table["esc10"] if esc10 else table["target"] >= 0
        if not keep.any():
            raise UserError(f"--esc10: no clip in {self.root}/meta/esc50.csv is marked esc10; leave the flag out")
        self.features, digests = load_features(self.root, table, progress)
        self.rows = torch.from_numpy(np.flatnonzero(keep))
        self.digests = [digests[row] for row in self.rows]
        self.table = table[keep].reset_index(drop=True)
        self.classes = list(self.table.sort_values("target")["category"].unique())
        self.targets = torch.tensor([self.classes.index(name) for name in self.table["category"]])
        self.folds = sorted(int(fold) for fold in self.table["fold"].unique())

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"clip {index} of {len(self)}")
        return self.features[self.rows[index]], int(self.targets[index])

    def __repr__(self) -> str:
        return (f"ESC50({str(self.root)!r}: {len(self)} clips, {len(self.classes)} classes, "
                f"folds {', '.join(map(str, self.folds))}; features (1, {MEL['n_mels']}, {FRAMES}) in dB)")

    def waveform(self, index: int) -> torch.Tensor:
        """The waveform (1, 220500) of clip `index`, float32 at 44 100 Hz."""
        return load_waveform(self.root / "audio" / self.table["filename"][range(len(self))[index]])

    def split(self, fold: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices of the training clips (all other folds) and of the validation clips (this fold).

        Raises UserError if either side would be empty.
        """
        held_out = torch.tensor(self.table["fold"].to_numpy() == fold)
        training, validation = (~held_out).nonzero().flatten(), held_out.nonzero().flatten()
        if len(validation) == 0:
            raise UserError(f"--fold {fold}: no clip of {self.root} is in it; expected one of "
                            f"{', '.join(map(str, self.folds))}")
        if len(training) == 0:
            raise UserError(f"--fold {fold}: every clip of {self.root} is in it, none is left to train on")
        return training, validation

    def statistics(self, indices: torch.Tensor) -> tuple[float, float]:
        """Mean and standard deviation (dB) over the features of these clips: give it the training clips."""
        totals = torch.zeros(2, dtype=torch.float64)
        for index in indices:
            feature = self.features[self.rows[index]].double()
            totals += torch.stack([feature.sum(), feature.square().sum()])
        count = len(indices) * MEL["n_mels"] * FRAMES
        mean = totals[0].item() / count
        std = math.sqrt(max(totals[1].item() / count - mean ** 2, 0.0))
        return mean, std if std > 0 else 1.0  # silence everywhere: nothing to scale

    def fingerprint(self) -> str:
        """SHA-256 of the clips' table rows and the files' contents, wherever the root lies."""
        rows = self.table.astype(str).values.tolist()
        return hashlib.sha256(json.dumps([rows, self.digests]).encode()).hexdigest()


# --- augmentation -----------------------------------------------------------------------------------------------------

def generator_for(seed: int, fold: int, epoch: int, purpose: str) -> torch.Generator:
    """A CPU generator for one purpose of one epoch: the same draws whatever else was drawn before."""
    digest = hashlib.sha256(f"{seed} {fold} {epoch} {purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def draw_crops(count: int, generator: torch.Generator) -> torch.Tensor:
    """Random corners (count, 2) of crops: lowest mel in 0..28, first frame in 0..47, int64."""
    mels = torch.randint(MEL["n_mels"] - CROP_MELS + 1, (count,), generator=generator)
    frames = torch.randint(FRAMES - CROP_FRAMES + 1, (count,), generator=generator)
    return torch.stack([mels, frames], dim=1)


def centre_crops(count: int) -> torch.Tensor:
    """The corners (count, 2) of centre crops: mel 14, frame 23."""
    return torch.tensor([(MEL["n_mels"] - CROP_MELS) // 2, (FRAMES - CROP_FRAMES) // 2]).expand(count, 2)


def crop(features: torch.Tensor, rows: torch.Tensor, corners: torch.Tensor) -> torch.Tensor:
    """Cut (B, 1, 100, 384) out of features (N, 1, 128, 431): from rows (B,) at corners (B, 2)."""
    mels = corners[:, 0, None] + torch.arange(CROP_MELS, device=corners.device)  # (B,) -> (B, 100)
    frames = corners[:, 1, None] + torch.arange(CROP_FRAMES, device=corners.device)  # (B,) -> (B, 384)
    # indices (B, 1, 1), 0, (B, 100, 1), (B, 1, 384) -> (B, 100, 384)
    return features[rows[:, None, None], 0, mels[:, :, None], frames[:, None, :]].unsqueeze(1)  # -> (B, 1, 100, 384)


def draw_masks(count: int, generator: torch.Generator) -> torch.Tensor:
    """Random bands (count, 4, 2), each [start, end): two of mels, then two of frames, int64.

    A width is drawn uniformly from 0 to 27 mels (100 frames), its start from where it fits: SpecAugment.
    """
    longest = torch.tensor([MAX_MASK_MELS] * FREQUENCY_MASKS + [MAX_MASK_FRAMES] * TIME_MASKS)
    size = torch.tensor([CROP_MELS] * FREQUENCY_MASKS + [CROP_FRAMES] * TIME_MASKS)
    draws = torch.rand(2, count, FREQUENCY_MASKS + TIME_MASKS, generator=generator, dtype=torch.float64)
    widths = (draws[0] * (longest + 1)).long()
    starts = (draws[1] * (size - widths + 1)).long()
    return torch.stack([starts, starts + widths], dim=-1)


def apply_masks(examples: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Examples (B, 1, 100, 384) with their own bands (B, 4, 2) set to 0, the mean of normalised features."""
    start, end = masks[..., 0, None], masks[..., 1, None]  # (B, 4, 1)
    mel = torch.arange(CROP_MELS, device=masks.device)
    frame = torch.arange(CROP_FRAMES, device=masks.device)
    mel_masked = ((mel >= start) & (mel < end))[:, :FREQUENCY_MASKS].any(dim=1)  # (B, 2, 100) -> (B, 100)
    frame_masked = ((frame >= start) & (frame < end))[:, FREQUENCY_MASKS:].any(dim=1)  # (B, 2, 384) -> (B, 384)
    masked = mel_masked[:, None, :, None] | frame_masked[:, None, None, :]  # -> (B, 1, 100, 384)
    return examples.masked_fill(masked, 0.0)


def normalise(decibels: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    """(decibels - mean) / std, both in dB, from the training folds (`ESC50.statistics`)."""
    return (decibels - mean) / std


def training_batches(dataset: ESC50, indices: torch.Tensor, stats: tuple[float, float], *, views: int,
                     batch_size: int, seed: int, fold: int, epoch: int, device: torch.device):
    """One epoch of shuffled, augmented batches: examples (B, 1, 100, 384) and targets (B,) on `device`.

    Each clip gives `views` examples: the first a random crop, the others random crops with masks.
    All draws of the epoch are made at once and on the CPU: they depend on seed, fold and epoch alone.
    """
    count = len(indices) * views
    corners = draw_crops(count, generator_for(seed, fold, epoch, "crops"))
    masks = draw_masks(count, generator_for(seed, fold, epoch, "masks"))
    order = torch.randperm(count, generator=generator_for(seed, fold, epoch, "order"))
    masks[torch.arange(count) % views == 0] = 0  # [0, 0): the first view of each clip has no mask
    rows, targets = dataset.rows[indices[order // views]], dataset.targets[indices[order // views]]
    corners, masks, targets = corners[order], masks[order].to(device), targets.to(device)
    rows, corners = rows.to(dataset.features.device), corners.to(dataset.features.device)
    for batch in torch.arange(count).split(batch_size):
        batch = slice(batch[0].item(), batch[-1].item() + 1)
        examples = crop(dataset.features, rows[batch], corners[batch]).to(device)
        yield apply_masks(normalise(examples, *stats), masks[batch]), targets[batch]


def validation_batches(dataset: ESC50, indices: torch.Tensor, stats: tuple[float, float], *, batch_size: int,
                       device: torch.device):
    """Centre crops (B, 1, 100, 384) and targets (B,) on `device`, each clip once, in the order of `indices`."""
    for batch in indices.split(batch_size):
        rows = dataset.rows[batch].to(dataset.features.device)
        examples = crop(dataset.features, rows, centre_crops(len(batch)).to(dataset.features.device)).to(device)
        yield normalise(examples, *stats), dataset.targets[batch].to(device)
