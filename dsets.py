"""ESC-50 as mel-spectrograms -> folds -> augmented batches.

    features of all clips    (N, 1, 128, 431)        ESC50 (computed by recordings.py, once)
    crop                     (B, 1, 100, 384)        draw_crops, crop
    masked crop              (B, 1, 100, 384)        draw_masks, apply_masks

Every random draw comes from a generator made by `generator_for(seed, fold, epoch, purpose)`.
"""
import csv
import hashlib
import json
import math
import reprlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from util.cache import (  # some for whoever imports this file alone
    CLIP_SAMPLES, FRAMES, MEL, SAMPLE_RATE, TOP_DB, LogMel, UserError, load_features, load_waveform)

# ESC-50 (Piczak, ACM MM 2015): 2000 clips of 5 s at 44.1 kHz, 50 classes, 5 folds.
NUM_CLASSES = 50
NUM_FOLDS = 5
MAX_TABLE_BYTES = 16 * 10 ** 6  # of some 350 000 clips; the published table has 0.1 MB
COLUMNS = ("filename", "fold", "target", "category", "esc10")

# The crop of the write-up; masks as in SpecAugment's policy "LD" (Park et al., Interspeech 2019, table 1).
CROP_MELS, CROP_FRAMES = 100, 384
FEATURES = {**MEL, "top_db": TOP_DB, "crop": [CROP_MELS, CROP_FRAMES]}  # as checkpoints record what their network knows
FREQUENCY_MASKS, MAX_MASK_MELS = 2, 27
TIME_MASKS, MAX_MASK_FRAMES = 2, 100
EQUALISER_POINTS = 5  # four bands between them; FilterAugment (Nam et al., ICASSP 2022) draws 3 to 6


# --- the data set -----------------------------------------------------------------------------------------------------

def read_table(root: str | Path) -> pd.DataFrame:
    """meta/esc50.csv of a root, checked: columns filename, fold, target, category, esc10, one row a clip.

    Raises UserError naming the line if a value is not what ESC-50's table may hold.
    """
    path = Path(root) / "meta" / "esc50.csv"
    if not path.is_file():
        raise UserError(f"--data {root}: has no meta/esc50.csv; name an ESC-50 folder, fetch it with --download, "
                        f"or try --demo")
    if path.stat().st_size > MAX_TABLE_BYTES:
        raise UserError(f"{path}: has {path.stat().st_size / 1e6:.0f} MB, expected {MAX_TABLE_BYTES / 1e6:.0f} at most; deal the "
                        f"clips out to several data folders")
    lines, rows = [], []
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            if not header:
                raise UserError(f"{path}: begins with an empty line, or is empty; expected {', '.join(COLUMNS)}")
            missing = [column for column in COLUMNS if column not in header]
            if missing:
                raise UserError(f"{path}: has no column {', '.join(missing)}; expected {', '.join(COLUMNS)}")
            if len(set(header)) < len(header):
                raise UserError(f"{path}: names a column twice; expected each once")
            places = [header.index(column) for column in COLUMNS]
            for cells in filter(None, reader):  # blank lines are none
                if len(cells) != len(header):
                    raise UserError(f"{path}: line {reader.line_num}: has {len(cells)} cells, its header {len(header)}; expected "
                                    f"{', '.join(COLUMNS)}")
                lines.append(reader.line_num)
                rows.append([cells[place] for place in places])
    except (OSError, UnicodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a comma-separated table in UTF-8 ({error}); save it as one") from error
    if not rows:
        raise UserError(f"{path}: lists no clips, expected a row for each; fetch it anew (--download)")
    table = pd.DataFrame(rows, columns=COLUMNS, dtype=object)

    def refuse(wrong: pd.Series, column: str, expected: str) -> None:
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            raise UserError(f"{path}: line {lines[row]}: {column} is {reprlib.repr(table[column][row])}, expected {expected}")

    names = table["filename"]
    refuse((names == "") | names.str.contains(r"[/\\:\x00]") | names.isin([".", ".."]), "filename",
           "the name of a file in audio/, without a folder")
    refuse(names.duplicated(), "filename", "each file once")
    for column, low, high in (("fold", 1, NUM_FOLDS), ("target", 0, NUM_CLASSES - 1)):
        allowed = [str(value) for value in range(low, high + 1)]
        refuse(~table[column].isin(allowed), column, f"a whole number from {low} to {high}")
    refuse(~table["esc10"].str.lower().isin(["true", "false"]), "esc10", "True or False")
    refuse(~table["category"].map(lambda name: name.isprintable() and bool(name.strip())), "category", "a printable name")
    for column, other in (("target", "category"), ("category", "target")):
        first = table.groupby(column)[other].transform("first")
        refuse(table[other] != first, other, f"the same for every clip of one {column}")
    return table.assign(fold=table["fold"].astype(int), target=table["target"].astype(int),
                        esc10=table["esc10"].str.lower() == "true")


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
        self.features, digests = load_features(self.root, list(table["filename"]), progress)
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
            raise UserError(f"--fold {fold}: every clip of {self.root} is in it, none is left to train on; give the clips "
                            f"of meta/esc50.csv more than one fold")
        return training, validation

    def statistics(self, indices: torch.Tensor) -> tuple[float, float]:
        """Mean and standard deviation (dB) over the features of these clips: give it the training clips."""
        totals = torch.zeros(2, dtype=torch.float64)
        for index in indices:
            feature = self.features[self.rows[index]].cpu().double()  # also on a GPU: the same bits everywhere
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


def draw_crops(count: int, generator: torch.Generator, shift_frames: int = 0) -> torch.Tensor:
    """Random corners (count, 2) of crops: lowest mel in 0..28, first frame in 0..47 + shift_frames (430 at most), int64.

    A crop that passes the end of its clip goes on at the beginning: as if the clip had been shifted in time, in a circle.
    """
    mels = torch.randint(MEL["n_mels"] - CROP_MELS + 1, (count,), generator=generator)
    frames = torch.randint(min(FRAMES, FRAMES - CROP_FRAMES + 1 + shift_frames), (count,), generator=generator)
    return torch.stack([mels, frames], dim=1)


def validation_corners(crops: int = 1) -> torch.Tensor:
    """The corners (crops, 2) at which a clip is heard in validation: 1, the centre (mel 14, frame 23), or a grid of 9."""
    mel, frame = (MEL["n_mels"] - CROP_MELS) // 2, (FRAMES - CROP_FRAMES) // 2
    if crops == 1:
        return torch.tensor([[mel, frame]])
    return torch.cartesian_prod(torch.tensor([0, mel, 2 * mel]), torch.tensor([0, frame, 2 * frame]))


def crop(features: torch.Tensor, rows: torch.Tensor, corners: torch.Tensor) -> torch.Tensor:
    """Cut (B, 1, 100, 384) out of features (N, 1, 128, 431): from rows (B,) at corners (B, 2), round the end."""
    mels = corners[:, 0, None] + torch.arange(CROP_MELS, device=corners.device)  # (B,) -> (B, 100)
    frames = (corners[:, 1, None] + torch.arange(CROP_FRAMES, device=corners.device)) % FRAMES  # (B,) -> (B, 384)
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


def draw_responses(count: int, equalise: float, generator: torch.Generator) -> torch.Tensor:
    """Random frequency responses (count, 1, 100, 1) in dB, as of other microphones and rooms.

    Straight lines between points that lie evenly over the crop's mels, each uniform within +-equalise dB: the linear kind
    of FilterAugment (Nam et al., ICASSP 2022), whose points lie at random.
    """
    points = equalise * (2 * torch.rand(count, 1, EQUALISER_POINTS, generator=generator) - 1)
    responses = F.interpolate(points, CROP_MELS, mode="linear", align_corners=True)  # (count, 1, 5) -> (count, 1, 100)
    return responses.unsqueeze(-1)  # -> (count, 1, 100, 1)


def draw_shares(count: int, mix: float, generator: torch.Generator) -> torch.Tensor:
    """How much of each example is its own, the rest another's: (count,) in [0.5, 1], float32.

    From a Beta(mix, mix) distribution as in mixup (Zhang et al., ICLR 2018), the larger part always the example's own. Of
    the generator, only the seed is used: torch draws no Beta from one.
    """
    shares = np.random.default_rng(generator.initial_seed() % 2 ** 64).beta(mix, mix, count)
    return torch.from_numpy(np.maximum(shares, 1 - shares).astype(np.float32))


def mix_examples(examples: torch.Tensor, others: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Each of the examples (B, 1, 100, 384) times its share (B,), plus one of the others (B, 1, 100, 384) times the rest."""
    shares = shares[:, None, None, None]  # (B,) -> (B, 1, 1, 1)
    return shares * examples + (1 - shares) * others


def normalise(decibels: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    """(decibels - mean) / std, both in dB, from the training folds (`ESC50.statistics`)."""
    return (decibels - mean) / std


class Batch(NamedTuple):
    """What one rank learns from in one step.

    examples   (B, 1, 100, 384), normalised
    targets    (B,) class indices
    shares     (B,) how much of each example is its own, the rest another's of the same batch; None if nothing is mixed
    others     (B,) targets of those; None if nothing is mixed
    positions  (B,) each example's place among the epoch's, on the CPU; (0,) where a rank got none of a short batch: the
               example is then another rank's, for the shapes' sake, and must not count
    size       examples of the whole batch, all ranks' together
    """

    examples: torch.Tensor
    targets: torch.Tensor
    shares: torch.Tensor | None
    others: torch.Tensor | None
    positions: torch.Tensor
    size: int


def training_batches(dataset: ESC50, indices: torch.Tensor, stats: tuple[float, float], *, views: int,
                     batch_size: int, seed: int, fold: int, epoch: int, device: torch.device, time_shift: float = 0.0,
                     gain: float = 0.0, equalise: float = 0.0, mix: float = 0.0, rank: int = 0, ranks: int = 1):
    """One epoch of shuffled, augmented batches on `device`, a `Batch` each.

    Each clip gives `views` examples: the first a random crop, the others random crops with masks. time_shift: by how much
    a clip may be shifted in a circle, s; gain: by how much it may be louder or softer, dB; equalise: by how much some
    frequencies may be louder or softer than others, dB (`draw_responses`); mix: how strongly each example is mixed with the
    one before it in its batch (`draw_shares`). Of each batch, this rank gets its part: the parts of all ranks in a row are
    the batch that one rank alone would get.
    All draws of the epoch are made at once and on the CPU: they depend on seed, fold and epoch alone.
    """
    def generator(purpose: str) -> torch.Generator:
        return generator_for(seed, fold, epoch, purpose)

    count = len(indices) * views
    corners = draw_crops(count, generator("crops"), round(time_shift * MEL["sample_rate"] / MEL["hop_length"]))
    masks = draw_masks(count, generator("masks"))
    order = torch.randperm(count, generator=generator("order"))
    masks[torch.arange(count) % views == 0] = 0  # [0, 0): the first view of each clip has no mask
    rows, targets = dataset.rows[indices[order // views]], dataset.targets[indices[order // views]]
    corners, masks, targets = corners[order], masks[order].to(device), targets.to(device)
    rows, corners = rows.to(dataset.features.device), corners.to(dataset.features.device)
    levels = gain * (2 * torch.rand(count, 1, 1, 1, generator=generator("gain")) - 1)  # dB
    if equalise:
        levels = levels + draw_responses(count, equalise, generator("equalise"))  # -> (count, 1, 100, 1)
    levels = levels.to(device)
    shares = draw_shares(count, mix, generator("mix")).to(device) if mix else None
    for start in range(0, count, batch_size):
        size = min(batch_size, count - start)
        part, longer = divmod(size, ranks)  # the first ranks get an example more
        first, length = start + rank * part + min(rank, longer), part + (rank < longer)
        if length == 0:
            first = start
        own = slice(first, first + max(length, 1))  # a slice: indices from the CPU would have a GPU waited for
        before = first - 1 if first > start else start + size - 1  # before the batch's first example comes its last

        def wanted(values: torch.Tensor) -> torch.Tensor:
            """Those of this rank's examples, and of the one before them where they are mixed."""
            return torch.cat([values[before:before + 1], values[own]]) if mix else values[own]

        examples = crop(dataset.features, wanted(rows), wanted(corners)).to(device)
        if gain or equalise:
            examples += wanted(levels)
        examples = apply_masks(normalise(examples, *stats), wanted(masks))
        if mix:
            examples = mix_examples(examples[1:], examples[:-1], shares[own])
        yield Batch(examples, targets[own], shares[own] if mix else None, wanted(targets)[:-1] if mix else None,
                    torch.arange(first, first + length), size)


def validation_batches(dataset: ESC50, indices: torch.Tensor, stats: tuple[float, float], *, batch_size: int,
                       device: torch.device, crops: int = 1, rank: int = 0, ranks: int = 1):
    """Crops (crops * B, 1, 100, 384) and targets (B,) on `device`, and the clips' positions (B,) among `indices`.

    All clips' first crops come first, then all their second ones. Each rank gets every so manieth batch: each clip once,
    in the same company whatever the number of ranks, as the last bits of a network's output depend on that.
    """
    corners = validation_corners(crops).to(dataset.features.device)
    for positions in torch.arange(len(indices)).split(batch_size)[rank::ranks]:
        batch = indices[positions]
        rows = dataset.rows[batch].to(dataset.features.device)
        examples = crop(dataset.features, rows.repeat(crops), corners.repeat_interleave(len(batch), dim=0)).to(device)
        yield normalise(examples, *stats), dataset.targets[batch].to(device), positions
