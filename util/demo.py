"""A small synthetic data set, laid out like ESC-50 (training.py --demo)."""
import wave
from pathlib import Path

import numpy as np
import pandas as pd

from util.cache import in_threads
from util.errors import UserError, write_atomically
from util.tables import ESC50_TABLE, NUM_CLASSES, NUM_FOLDS, check_free
from util.waveforms import CLIP_SAMPLES, SAMPLE_RATE

CLIPS_PER_CLASS = 10  # two a fold: 500 clips, 221 MB


def write_demo(root: Path) -> None:
    """Write 500 synthetic clips, once: 50 classes (10 kinds of sound in 5 registers), 5 folds.

    Every clip is drawn from a generator of its own, seeded by its class and number: the same on every machine.
    Raises UserError if the folder holds other data.
    """
    clips = [(target, number) for number in range(CLIPS_PER_CLASS) for target in range(NUM_CLASSES)]
    rows = [{"filename": f"{number % NUM_FOLDS + 1}-{1000 + target}-{'ABCDEFGHIJ'[number]}-{target}.wav",
             "fold": number % NUM_FOLDS + 1, "target": target,
             "category": f"{list(KINDS)[target // 5]}_{REGISTERS[target % 5][0]}", "esc10": target < 10,
             "src_file": 1000 + target, "take": "ABCDEFGHIJ"[number]} for target, number in clips]
    text = pd.DataFrame(rows).to_csv(index=False, lineterminator="\n")
    path, names = root / ESC50_TABLE, [row["filename"] for row in rows]
    if path.is_file() and path.read_bytes() != text.encode():
        raise UserError(f"--demo: {root} holds another data set; leave out --data, or name a new folder")
    if path.is_file() and all((root / "audio" / name).exists() for name in names):
        return
    check_free(root, "--demo", set(names))

    def write_clip(index: int) -> None:
        clip = demo_clip(clips[index][0], np.random.default_rng(clips[index]))
        write_atomically(root / "audio" / names[index], lambda part: write_wav(part, clip))

    for folder in ("audio", "meta"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    in_threads(write_clip, range(len(rows)), f"demo clips into {root}")
    write_atomically(path, lambda part: part.write_bytes(text.encode()))  # last: it makes a data folder of it


def write_wav(path: Path, samples: np.ndarray) -> None:
    """Write samples (n,) in [-1, 1] as 16-bit WAV at 44 100 Hz."""
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
        wide = np.rint(np.multiply(samples, 2.0 ** 31)).astype(np.int32)  # 32 bits first: rounded as libsndfile does
        file.writeframes((wide >> 16).astype("<i2").tobytes())


def band_noise(samples: int, low: float, high: float, rng: np.random.Generator) -> np.ndarray:
    """Noise of unit standard deviation between two frequencies (Hz)."""
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    frequencies = np.fft.rfftfreq(samples, 1 / SAMPLE_RATE)
    spectrum[(frequencies < low) | (frequencies > high)] = 0
    band = np.fft.irfft(spectrum, samples)
    return band / band.std()


def sweep(pitch: float, octaves: np.ndarray) -> np.ndarray:
    """A sine whose frequency (Hz) is `pitch` shifted by so many octaves at each sample."""
    return np.sin(2 * np.pi * np.cumsum(pitch * 2 ** octaves) / SAMPLE_RATE)


# Each kind of sound takes time (s), a pitch (Hz) and a generator, and gives samples of any scale.
KINDS = {
    "tone": lambda t, pitch, rng: sum(np.sin(2 * np.pi * pitch * k * t + rng.uniform(0, 6.28)) / k for k in range(1, 6)),
    "noise": lambda t, pitch, rng: band_noise(len(t), pitch * 0.8, pitch * 1.25, rng),
    "siren": lambda t, pitch, rng: sweep(pitch, 0.25 * np.sin(2 * np.pi * rng.uniform(0.8, 1.5) * t)),
    "chirp_up": lambda t, pitch, rng: sweep(pitch, (t * rng.uniform(1.5, 2.5)) % 1 - 0.5),
    "chirp_down": lambda t, pitch, rng: sweep(pitch, 0.5 - (t * rng.uniform(1.5, 2.5)) % 1),
    "clicks": lambda t, pitch, rng: np.exp(-((t * rng.uniform(5, 8)) % 1) * 60) * KINDS["noise"](t, pitch, rng),
    "bell": lambda t, pitch, rng: bell(t, pitch, t % rng.uniform(0.9, 1.4)),
    "pulsing": lambda t, pitch, rng: KINDS["tone"](t, pitch, rng) * (np.sin(2 * np.pi * rng.uniform(3, 5) * t) > 0),
    "whistle": lambda t, pitch, rng: np.sin(2 * np.pi * pitch * t + 2 * np.sin(2 * np.pi * rng.uniform(5, 7) * t)),
    "gusts": lambda t, pitch, rng: KINDS["noise"](t, pitch, rng) * (
        1 + np.sin(2 * np.pi * rng.uniform(0.4, 0.8) * t + rng.uniform(0, 6.28))),
}
REGISTERS = [("lowest", 220.0), ("low", 440.0), ("middle", 880.0), ("high", 1760.0), ("highest", 3520.0)]  # Hz


def bell(t: np.ndarray, pitch: float, since: np.ndarray) -> np.ndarray:
    """Three inharmonic partials that decay; since: the last stroke, s."""
    return sum(np.sin(2 * np.pi * pitch * ratio * t) * np.exp(-since * 3 * ratio) for ratio in (1, 2.76, 5.4))


def demo_clip(target: int, rng: np.random.Generator) -> np.ndarray:
    """One clip (220500,) in [-1, 1]: a sound of class `target` somewhere in 5 s, over noise of random loudness."""
    t = np.arange(CLIP_SAMPLES) / SAMPLE_RATE
    pitch = REGISTERS[target % 5][1] * 2 ** rng.uniform(-0.25, 0.25)  # registers are an octave apart
    sound = list(KINDS.values())[target // 5](t, pitch, rng)
    begin = rng.uniform(0, 1.5)
    sound = sound * ((t >= begin) & (t < begin + rng.uniform(2.5, 3.5)))
    background = band_noise(CLIP_SAMPLES, 50, rng.uniform(1000, 12000), rng)
    clip = sound / np.abs(sound).max() + background * 10 ** (rng.uniform(-50, -20) / 20)
    return clip / np.abs(clip).max() * rng.uniform(0.1, 0.9)
