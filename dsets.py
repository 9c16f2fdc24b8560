"""Recordings as tensors: recording -> waveform -> mel-spectrogram -> folds -> augmented batches.

    recording                any sample rate, any number of channels
    waveform                 (1, 220500) float32     load_waveform (util/waveforms.py)
    mel-spectrogram, dB      (1, 128, 431)           LogMel
    features of all clips    (N, 1, 128, 431)        ESC50 (computed once, see util/cache.py)
    crop                     (B, 1, 100, 384)        draw_corners, crop
    augmented example        (B, 1, 100, 384)        training_batches

Every random draw comes from a generator made by `generator_for(seed, fold, epoch, purpose)`.
"""
import functools
import hashlib
import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from util import cache, tables
from util.config import Config
from util.errors import UserError
from util.waveforms import CLIP_SAMPLES, SAMPLE_RATE, SOUND_NOTES, load_clips, load_waveform

FREQ_MASKS, TIME_MASKS = 2, 2  # SpecAugment's policy "LD" (Park et al., Interspeech 2019, table 1)
TTA_SHIFT_MELS = 5  # 4 and 7 did no better on folds 1 and 2 of ESC-50
FILTER_AUGMENT_POINTS = 5  # four bands between them; FilterAugment (Nam et al., ICASSP 2022) draws 3 to 6


@dataclass(frozen=True)
class FeatureParams:
    """Parameters of the mel-spectrogram and of the crop that a network sees; the defaults are those of the 2023 write-up.

    Raises UserError for a choice that cannot work.
    """

    n_fft: int = 2048  # samples of a window
    hop_length: int = 512  # samples from one frame to the next
    n_mels: int = 128
    f_min: float = 0.0  # Hz
    f_max: float = Config.f_max  # Hz
    top_db: float = 80.0  # dB below the loudest value; torchaudio's and librosa's usual value, as amin is
    amin: float = 1e-10  # smallest power
    crop_mels: int = Config.crop_mels
    crop_frames: int = Config.crop_frames

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, (int, field.type)) or (field.type is int and value < 1):
                expected = "an int above 0" if field.type is int else "a float"
                raise UserError(f"dsets.FeatureParams: {field.name} is {value!r:.100}, expected {expected}")
        for holds, expected in (  # bounds of size: a stranger's checkpoint shall not ask for gigabytes
                (16 <= self.n_fft <= 32_768, "n_fft from 16 to 32768"),
                (self.n_fft / 32 <= self.hop_length <= self.n_fft, "hop_length from n_fft / 32 to n_fft"),
                (1 <= self.n_mels <= min(512, self.n_fft / 2), "n_mels up to n_fft / 2, and to 512"),
                (0 <= self.f_min < self.f_max <= SAMPLE_RATE / 2, f"0 <= f_min < f_max <= {SAMPLE_RATE // 2} Hz"),
                (0 < self.top_db < 1000 and 0 < self.amin < 1, "top_db from 0 to 1000 dB, amin from 0 to 1"),
                (1 <= self.crop_mels <= self.n_mels and 1 <= self.crop_frames <= self.num_frames,
                 f"a crop within the mel-spectrogram of {self.n_mels} mels and {self.num_frames} frames"),
                (self.crop_mels * self.crop_frames <= 250_000, "a crop of 250 000 values at most")):
            if not holds:
                raise UserError(f"dsets.FeatureParams: expected {expected}; found {self}")

    @property
    def num_frames(self) -> int:
        return CLIP_SAMPLES // self.hop_length + 1  # 431: a frame at both ends (center=True)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """The shape of an example as the network gets it: (1, 100, 384)."""
        return 1, self.crop_mels, self.crop_frames


# --- waveform -> mel-spectrogram --------------------------------------------------------------------------------------

class LogMel(torch.nn.Module):
    """Waveform (..., samples) in [-1, 1] -> mel-spectrogram (..., n_mels, frames) in dB.

    Equal to torchaudio's MelSpectrogram (HTK scale, no norm, power 2, reflect padding) followed by AmplitudeToDB(top_db=80)
    on one clip at a time; faster, as only frequency bins that reach a mel filter are squared and summed. The dB are cut 80
    below the loudest value of each clip, never of a batch.
    """

    def __init__(self, params: FeatureParams | None = None):
        super().__init__()
        import torchaudio  # here: with cached features, a training never needs it
        self.params = params = params or FeatureParams()
        filters = torchaudio.functional.melscale_fbanks(  # (1025 bins, 128 mels)
            params.n_fft // 2 + 1, params.f_min, params.f_max, params.n_mels, SAMPLE_RATE)
        if not filters.any():
            raise UserError(f"dsets.FeatureParams: expected a frequency of n_fft {params.n_fft} within a filter; found {params}")
        self.num_bins = int(filters.any(dim=1).nonzero().max()) + 1  # 372 of 1025: the others lie above f_max
        self.register_buffer("filters", filters[:self.num_bins].T.contiguous())  # (128 mels, 372 bins)
        self.register_buffer("window", torch.hann_window(params.n_fft))

    def forward(self, waveform: torch.Tensor) -> torch.Tensor:
        """(..., samples) in [-1, 1] -> (..., n_mels, frames) in dB."""
        flat = waveform.reshape(-1, waveform.shape[-1])  # (..., samples) -> (clips, samples)
        spectrum = torch.stft(flat, self.params.n_fft, self.params.hop_length, window=self.window, center=True,
                              pad_mode="reflect", return_complex=True)  # -> (clips, 1025, frames)
        spectrum = spectrum[:, :self.num_bins]  # -> (clips, 372, frames)
        power = spectrum.real.square().addcmul_(spectrum.imag, spectrum.imag)
        mel = self.filters @ power  # (128, 372) @ (clips, 372, frames) -> (clips, 128, frames)
        decibels = 10 * mel.clamp(min=self.params.amin).log10()
        decibels = torch.maximum(decibels, decibels.amax(dim=(1, 2), keepdim=True) - self.params.top_db)
        return decibels.reshape(*waveform.shape[:-1], *decibels.shape[1:])  # -> (..., 128, frames)


def normalize(decibels: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    """Decibels of any shape minus mean, over std, both in dB and of the training folds (`ESC50.mean_std`)."""
    return (decibels - mean) / std


# --- the data set and its folds ---------------------------------------------------------------------------------------

class ESC50(torch.utils.data.Dataset):
    """ESC-50, or a data folder of another layout, as mel-spectrograms: ds[i] is (feature (1, 128, 431) in dB, class index).

    layout    of the folder: ESC-50, UrbanSound8K, a table or folders (util/tables.py)
    table     a row a clip: file, start and end (s), fold, category and what the folder's own table says
    classes   names of the categories, ESC-50's in the order of their targets; class indices count through them from 0
    targets   (N,) class indices, int64; for all 50 classes of ESC-50 the same as the table's targets
    features  (M, 1, 128, 431) of all the folder's clips, memory-mapped; rows[i] is the row of clip i
    params    the FeatureParams of the features and of their crops
    notes     what is odd about the data, a line each

    esc10: keep ESC-50's clips of ESC-10 alone; folds: how many, where the folder has none of its own (default 5); split_long:
    make clips of 5 s of longer recordings. Raises UserError where the folder cannot be used.
    """

    def __init__(self, root: str | Path = "data/ESC-50", esc10: bool = False, params: FeatureParams | None = None,
                 folds: int | None = None, split_long: bool = False):
        self.root, self.params = Path(root), params or FeatureParams()
        self.layout, table, self.notes = tables.read_table(self.root, folds)
        if split_long:
            table, remarks = tables.split_long(self.root, table)
            self.add_notes(remarks, table["file"])
        keep = table["esc10"] if esc10 and self.layout == "ESC-50" else np.full(len(table), not esc10)
        if not np.any(keep):
            raise UserError(f"--esc10: no clip in {self.root} is marked as ESC-10's (meta/esc50.csv); leave the flag out")
        log_mel = functools.cache(lambda: LogMel(self.params))  # needed only if features are not there yet

        def compute(path: Path, spans: list, remarks: list[str]):
            for waveform in load_clips(path, spans, notes := []):
                yield log_mel()(waveform).numpy()
            remarks += [note for note in SOUND_NOTES if note in notes]

        self.features, digests, remarks = cache.load_features(
            self.root, list(zip(table["file"], table["start"], table["end"])), compute,
            (1, self.params.n_mels, self.params.num_frames), cache.mel_params(vars(self.params)),
            kind="logmel-parts" if split_long else "logmel")  # either keeps its own
        self.rows = torch.from_numpy(np.flatnonzero(keep))
        self.digests = [digests[row] for row in self.rows]
        self.table = table[keep].reset_index(drop=True)
        order = "target" if self.layout == "ESC-50" else "category"
        self.classes = list(self.table.sort_values(order)["category"].unique())
        self.targets = torch.tensor([self.classes.index(name) for name in self.table["category"]])
        self.folds = sorted(int(fold) for fold in self.table["fold"].unique())
        self.add_notes(remarks, self.table["file"])
        copied = self.table.groupby(np.array(self.digests))["fold"].transform("nunique") > 1
        self.add_notes({"have copies in other folds, accuracy is optimistic; give copies one group": self.table["file"][copied]},
                       self.table["file"])

    def add_notes(self, remarks: dict[str, list[str]], files) -> None:
        """Add remarks, each with the names of its recordings, to the notes, as far as these are among `files`."""
        for note, names in remarks.items():  # of features kept by another version, a note may have other words
            if names := sorted(set(names) & set(files)):
                said = f"1 recording {note}" if len(names) == 1 else f"{len(names)} recordings {SOUND_NOTES.get(note, note)}"
                self.notes.append(f"{said}: {', '.join(names[:10])}{' ...' if len(names) > 10 else ''}")

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.features[self.rows[index]], int(self.targets[index])

    def __repr__(self) -> str:
        return (f"{self.layout} {str(self.root)!r}: {len(self)} clips, {len(self.classes)} classes, "
                f"folds {', '.join(map(str, self.folds))}; features {tuple(self.features.shape[1:])} in dB")

    def waveform(self, index: int) -> torch.Tensor:
        """The waveform (1, 220500) of clip `index`, float32 at 44 100 Hz."""
        file, start, end = self.table.loc[range(len(self))[index], ["file", "start", "end"]]
        return load_waveform(self.root / file, start, end)

    def split(self, fold: int | str) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices of the training clips (all other folds) and of the validation clips (this fold); UserError if one is empty.

        Fold "none": all clips are for training.
        """
        if fold == "none":
            return torch.arange(len(self)), torch.arange(0)
        held_out = torch.tensor(self.table["fold"].to_numpy() == fold)
        training, validation = (~held_out).nonzero().flatten(), held_out.nonzero().flatten()
        if len(validation) == 0 or len(training) == 0:
            purpose = "validate" if len(training) else "train"
            expected = f"all, or some of its folds, {' '.join(map(str, self.folds))}"
            if len(self.folds) == 1:
                expected = f"two folds at least in its table (it has {self.folds[0]} alone), or --fold none"
            raise UserError(f"--fold {fold}: leaves no clip of {self.root} to {purpose} on; expected {expected}")
        return training, validation

    @functools.cached_property
    def clip_sums(self) -> torch.Tensor:
        """The sum and the sum of squares (N, 2) of each clip's feature, float64, from the CPU on any device: the same bits."""
        features = (self.features[row].cpu().double() for row in self.rows)
        return torch.stack([torch.stack([feature.sum(), feature.square().sum()]) for feature in features])

    def mean_std(self, indices: torch.Tensor) -> tuple[float, float]:
        """Mean and standard deviation (dB) over the features of these clips: give it the training clips."""
        totals, chosen = torch.zeros(2, dtype=torch.float64), self.clip_sums[indices]  # (clips, 2), also by a mask of all
        for sums in chosen:  # one by one: the same bits for the same clips
            totals += sums
        count = len(chosen) * self.features[0].numel()
        mean = totals[0].item() / count
        std = math.sqrt(max(totals[1].item() / count - mean ** 2, 0.0))
        return mean, std if std > 0 else 1.0  # silence everywhere: nothing to scale

    def fingerprint(self) -> str:
        """SHA-256 of the clips' table rows and the files' contents, wherever the folder lies."""
        rows = self.table.astype(str).values.tolist()
        return hashlib.sha256(json.dumps([rows, self.digests]).encode()).hexdigest()


# --- augmentation -----------------------------------------------------------------------------------------------------

def generator_for(seed: int, fold: int | str, epoch: int, purpose: str) -> torch.Generator:
    """A CPU generator for one purpose of one epoch: the same draws whatever else was drawn before."""
    digest = hashlib.sha256(f"{seed} {fold} {epoch} {purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def draw_corners(count: int, generator: torch.Generator, params: FeatureParams, shift_frames: int = 0,
                 shift_mels: int = 0) -> torch.Tensor:
    """Random corners (count, 2) of crops, int64: lowest mel in 0..28, first frame in 0..47 + shift_frames (430 at most).

    The lowest mel lies up to shift_mels lower or higher than that (at most 127). See `crop` for what lies beyond the edges.
    """
    shift_mels = min(shift_mels, params.n_mels - 1)
    mels = torch.randint(-shift_mels, params.n_mels - params.crop_mels + 1 + shift_mels, (count,), generator=generator)
    last = min(params.num_frames, params.num_frames - params.crop_frames + 1 + shift_frames)
    frames = torch.randint(last, (count,), generator=generator)
    return torch.stack([mels, frames], dim=1)  # (count,) each -> (count, 2)


def validation_corners(params: FeatureParams, tta_crops: int = 1) -> torch.Tensor:
    """The corners (crops, 2) of a validation clip's crops: 1, the center (mel 14, frame 23), or 3 or a grid of 9.

    3: the center, then 5 mels lower from a third of the clip on, and 5 higher from two thirds on; see `crop` for what lies
    beyond the edges. 9: a 3 x 3 grid (Krizhevsky et al., NeurIPS 2012, average such crops), equal corners once: 3 are left
    where a crop has all frames, 1 where it has all mels, too.
    """
    mel, frame = (params.n_mels - params.crop_mels) // 2, (params.num_frames - params.crop_frames) // 2
    third = round(params.num_frames / 3)
    if tta_crops == 1:
        return torch.tensor([[mel, frame]])
    if tta_crops == 3:
        return torch.tensor([[mel, frame], [mel - TTA_SHIFT_MELS, frame + third], [mel + TTA_SHIFT_MELS, frame + 2 * third]])
    mels, frames = (torch.tensor(sorted({0, middle, 2 * middle})) for middle in (mel, frame))
    return torch.cartesian_prod(mels, frames)  # -> (crops, 2)


def draw_stretches(count: int, time_stretch: float, generator: torch.Generator) -> torch.Tensor:
    """Rates (count,) at which frames are read, float32: from 1 / (1 + time_stretch) to 1 + time_stretch, their log uniform.

    Salamon & Bello (IEEE Signal Processing Letters, 2017) stretch waveforms, by 0.81 to 1.23.
    """
    return (1 + time_stretch) ** (2 * torch.rand(count, generator=generator) - 1)


def crop(features: torch.Tensor, rows: torch.Tensor, corners: torch.Tensor, params: FeatureParams,
         rates: torch.Tensor | None = None) -> torch.Tensor:
    """Cut (B, 1, 100, 384) out of features (N, 1, 128, 431): from rows (B,) at corners (B, 2), frames read at rates (B,).

    Beyond the last frame comes the first one, as if the clip had been shifted by torch.roll; beyond the first and the last
    mel these repeat. rates: frames of the clip to one of the crop, the nearest before; None: 1.
    """
    mels = corners[:, 0, None] + torch.arange(params.crop_mels, device=corners.device)  # (B,) -> (B, 100)
    mels = mels.clamp(0, params.n_mels - 1)
    frames = torch.arange(params.crop_frames, device=corners.device)
    if rates is not None:
        frames = (frames * rates[:, None]).long()  # (384,) -> (B, 384)
    frames = (corners[:, 1, None] + frames) % params.num_frames  # -> (B, 384)
    # indices (B, 1, 1), 0, (B, 100, 1), (B, 1, 384) -> (B, 100, 384)
    return features[rows[:, None, None], 0, mels[:, :, None], frames[:, None, :]].unsqueeze(1)  # -> (B, 1, 100, 384)


def validation_crops(features: torch.Tensor, rows: torch.Tensor, corners: torch.Tensor, params: FeatureParams) -> torch.Tensor:
    """The crops (crops * B, 1, 100, 384) at corners (crops, 2) of rows (B,): all first crops, then all second ones."""
    return crop(features, rows.repeat(len(corners)), corners.repeat_interleave(len(rows), dim=0), params)


def draw_masks(count: int, generator: torch.Generator, params: FeatureParams, freq_mask_param: int,
               time_mask_param: int) -> torch.Tensor:
    """SpecAugment's random bands (count, 4, 2), each [start, end): two of mels, then two of frames, int64.

    A width is drawn uniformly from 0 to freq_mask_param mels (time_mask_param frames), its start from where it fits.
    """
    size = torch.tensor([params.crop_mels] * FREQ_MASKS + [params.crop_frames] * TIME_MASKS)
    longest = torch.minimum(torch.tensor([freq_mask_param] * FREQ_MASKS + [time_mask_param] * TIME_MASKS), size)
    draws = torch.rand(2, count, FREQ_MASKS + TIME_MASKS, generator=generator, dtype=torch.float64)  # (2, count, 4)
    widths = (draws[0] * (longest + 1)).long()
    starts = (draws[1] * (size - widths + 1)).long()
    return torch.stack([starts, starts + widths], dim=-1)  # (count, 4) each -> (count, 4, 2)


def spec_augment(examples: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Examples (B, 1, 100, 384) with their own bands (B, 4, 2) set to 0, the mean of normalized features."""
    start, end = masks[..., 0, None], masks[..., 1, None]  # (B, 4, 1)
    mel = torch.arange(examples.shape[2], device=masks.device)
    frame = torch.arange(examples.shape[3], device=masks.device)
    mel_masked = ((mel >= start) & (mel < end))[:, :FREQ_MASKS].any(dim=1)  # (B, 2, 100) -> (B, 100)
    frame_masked = ((frame >= start) & (frame < end))[:, FREQ_MASKS:].any(dim=1)  # (B, 2, 384) -> (B, 384)
    masked = mel_masked[:, None, :, None] | frame_masked[:, None, None, :]  # -> (B, 1, 100, 384)
    return examples.masked_fill(masked, 0.0)


def draw_filter_augment(count: int, filter_augment: float, generator: torch.Generator, params: FeatureParams) -> torch.Tensor:
    """Random frequency responses (count, 1, 100, 1) in dB, as of other microphones and rooms.

    Straight lines between points evenly spaced over the crop's mels, each uniform within +-filter_augment dB: the linear
    kind of FilterAugment (Nam et al., ICASSP 2022), whose points lie at random.
    """
    points = filter_augment * (2 * torch.rand(count, 1, FILTER_AUGMENT_POINTS, generator=generator) - 1)
    responses = F.interpolate(points, params.crop_mels, mode="linear", align_corners=True)  # (count, 1, 5) -> (count, 1, 100)
    return responses.unsqueeze(-1)  # -> (count, 1, 100, 1)


def draw_lam(count: int, alpha: float, generator: torch.Generator) -> torch.Tensor:
    """Mixup's lam, how much of each example is its own: (count,) in [0.5, 1], float32.

    From a Beta(alpha, alpha) distribution (mixup: Zhang et al., ICLR 2018), the larger part always the example's own. Only
    the generator's seed is used: torch draws no Beta from a generator.
    """
    lam = np.random.default_rng(generator.initial_seed()).beta(alpha, alpha, count)
    return torch.from_numpy(np.maximum(lam, 1 - lam).astype(np.float32))


def mix_examples(examples: torch.Tensor, others: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
    """lam (B,) times each of the examples (B, 1, 100, 384), plus 1 - lam times one of the others (B, 1, 100, 384)."""
    lam = lam[:, None, None, None]  # (B,) -> (B, 1, 1, 1)
    return lam * examples + (1 - lam) * others


# --- batches ----------------------------------------------------------------------------------------------------------

class Batch(NamedTuple):
    """What one process (rank) learns from in one step.

    Where a rank gets none of a short batch, positions is empty, and the one example is another rank's and does not count.
    """

    examples: torch.Tensor  # (B, 1, 100, 384), normalized
    targets: torch.Tensor  # (B,) class indices
    lam: torch.Tensor | None  # (B,) how much of each example is its own, the rest another's of the batch; None without mixup
    other_targets: torch.Tensor | None  # (B,) class indices of the others; None without mixup
    positions: torch.Tensor  # (B,) each example's place among the epoch's, on the CPU
    size: int  # examples of the whole batch, over all ranks


def training_batches(dataset: ESC50, indices: torch.Tensor, mean_std: tuple[float, float], *, views: int, batch_size: int,
                     seed: int, fold: int | str, epoch: int, device: torch.device, freq_mask: int = Config.freq_mask,
                     time_mask: int = Config.time_mask, time_shift: float = 0.0, time_stretch: float = 0.0,
                     freq_shift: int = 0, gain: float = 0.0, filter_augment: float = 0.0, mixup: float = 0.0, rank: int = 0,
                     world_size: int = 1):
    """One epoch of shuffled, augmented batches on `device`, a `Batch` each.

    Each clip gives `views` examples: all random crops, all but the first also masked (freq_mask in mels, time_mask in
    frames: `draw_masks`), shifted by up to time_shift s and freq_shift mels (`draw_corners`), faster or slower
    (time_stretch: `draw_stretches`), up to gain dB louder or softer, some frequencies up to filter_augment dB
    (`draw_filter_augment`), mixed with the example before it in its batch (mixup: `draw_lam`'s alpha).
    Of each batch, this rank gets its part: the parts of all ranks in a row are the batch that one process alone would get.
    All draws of the epoch are made at once and on the CPU: they depend on seed, fold and epoch alone.
    """
    def generator(purpose: str) -> torch.Generator:  # another name for a purpose would change its draws
        return generator_for(seed, fold, epoch, purpose)

    params, count = dataset.params, len(indices) * views
    corners = draw_corners(count, generator("crops"), params, round(time_shift * SAMPLE_RATE / params.hop_length), freq_shift)
    masks = draw_masks(count, generator("masks"), params, freq_mask, time_mask)
    order = torch.randperm(count, generator=generator("order"))
    masks[torch.arange(count) % views == 0] = 0  # [0, 0): the first view of each clip has no mask
    rows, targets = dataset.rows[indices[order // views]], dataset.targets[indices[order // views]]
    corners, masks, targets = corners[order], masks[order].to(device), targets.to(device)
    rows, corners = rows.to(dataset.features.device), corners.to(dataset.features.device)
    rates = draw_stretches(count, time_stretch, generator("stretch")).to(dataset.features.device) if time_stretch else None
    decibels = gain * (2 * torch.rand(count, 1, 1, 1, generator=generator("gain")) - 1)
    if filter_augment:
        decibels = decibels + draw_filter_augment(count, filter_augment, generator("equalise"), params)  # -> (count, 1, 100, 1)
    decibels = decibels.to(device)
    lam = draw_lam(count, mixup, generator("mix")).to(device) if mixup else None
    for start in range(0, count, batch_size):
        size = min(batch_size, count - start)
        part, longer = divmod(size, world_size)  # the first ranks get an example more
        first, length = start + rank * part + min(rank, longer), part + (rank < longer)
        if length == 0:
            first = start
        own = slice(first, first + max(length, 1))  # a slice: a GPU would have to wait for indices from the CPU
        before = first - 1 if first > start else start + size - 1  # before the batch's first example comes its last

        def select(values: torch.Tensor) -> torch.Tensor:
            """The values of this rank's examples; with mixup, after that of the example before them."""
            return torch.cat([values[before:before + 1], values[own]]) if mixup else values[own]

        own_rates = select(rates) if time_stretch else None
        examples = crop(dataset.features, select(rows), select(corners), params, own_rates).to(device)  # -> (B, 1, 100, 384)
        if gain or filter_augment:
            examples += select(decibels)
        examples = spec_augment(normalize(examples, *mean_std), select(masks))
        if mixup:
            examples = mix_examples(examples[1:], examples[:-1], lam[own])
        yield Batch(examples, targets[own], lam[own] if mixup else None, select(targets)[:-1] if mixup else None,
                    torch.arange(first, first + length), size)


def validation_batches(dataset: ESC50, indices: torch.Tensor, mean_std: tuple[float, float], *, batch_size: int,
                       device: torch.device, tta_crops: int = 1, rank: int = 0, world_size: int = 1):
    """Crops (crops * B, 1, 100, 384) and targets (B,) on `device`, and the clips' positions (B,) among `indices`.

    All clips' first crops come first, then all their second ones. Rank r gets batches r, r + world_size and so on, never a part
    of one: the last bits of a clip's logits depend on its batch, and so are the same for any number of processes.
    """
    corners = validation_corners(dataset.params, tta_crops).to(dataset.features.device)  # (crops, 2)
    for start in range(rank * batch_size, len(indices), world_size * batch_size):
        positions = torch.arange(start, min(start + batch_size, len(indices)))
        batch = indices[positions]
        rows = dataset.rows[batch].to(dataset.features.device)
        examples = validation_crops(dataset.features, rows, corners, dataset.params)  # -> (crops * B, 1, 100, 384)
        yield normalize(examples.to(device), *mean_std), dataset.targets[batch].to(device), positions
