"""ESC-50 roots on disk: fetch the published one, or synthesise a small one to try the program on.

A root is a folder with meta/esc50.csv and audio/*.wav, 16-bit mono at 44 100 Hz, 5 s each.
"""
import errno
import http.client
import lzma
import os
import shutil
import ssl
import struct
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
import soundfile
from tqdm import tqdm

from dsets import NUM_CLASSES, NUM_FOLDS, read_table
from util.cache import CLIP_SAMPLES, SAMPLE_RATE, UserError, first_line, first_ten, in_threads, load_waveform, write_whole

ESC50_URL = "https://github.com/karoldvl/ESC-50/archive/master.zip"
MAX_ARCHIVE_BYTES = 2 * 10 ** 9  # the published archive has 0.6 GB
MAX_UNPACKED_BYTES = 4 * 10 ** 9  # and unpacks to 0.9 GB
ATTEMPTS = 5  # connections in a row that bring nothing new before the transfer is given up
TIMEOUT = 30  # seconds without a byte
PAUSE = 1.0  # seconds between connections

DEMO_CLIPS_PER_CLASS = 10  # two a fold: 500 clips, 221 MB


# --- the published data set -------------------------------------------------------------------------------------------

def download(root: Path, url: str = "") -> None:
    """Fetch the published ESC-50 archive into `root`; do nothing where the data is already whole.

    A broken transfer goes on where it stopped, also in a later call. Everything is unpacked and checked beside
    the root before the first file is moved into it, the table last.
    Raises UserError if the archive cannot be had or is not whole.
    """
    url, root = url or ESC50_URL, root.resolve()  # resolved: what is beside a link may be another file system
    if not root.name:
        raise UserError(f"--data {root}: cannot be the data's own folder; name one below it")
    if (root / "meta" / "esc50.csv").is_file() and not problems(root):
        print(f"{root}: already whole, nothing to download")
        return
    archive = root.with_name(root.name + ".zip.part")
    unpacked = root.with_name(root.name + ".unpacked")
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        fetch(url, archive)
        shutil.rmtree(unpacked, ignore_errors=True)  # left by a killed attempt
        try:
            unpack(archive, unpacked, url)
            found = problems(unpacked)
            if found:
                raise UserError(f"--download: the archive from {url} is not whole: {first_ten(found)}; try again later")
            move_into(unpacked, root)
        except UserError:
            archive.unlink()  # a further attempt must not go on from it
            raise
        finally:
            shutil.rmtree(unpacked, ignore_errors=True)
        archive.unlink()
    except OSError as error:
        raise UserError(f"--download: cannot write beside {root} ({error}); free some space or name another --data") \
            from error


def fetch(url: str, path: Path) -> None:
    """Fetch `url` into `path`, going on from the bytes already there if the server can."""
    failures = most = 0
    while True:
        have = path.stat().st_size if path.exists() else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
                if response.status != 206:  # the whole file, from its start
                    have = 0
                length = response.headers.get("Content-Length")
                total = have + int(length) if length else None
                with open(path, "ab" if have else "wb") as file, \
                        tqdm(desc="download", total=total, initial=have, unit="B", unit_scale=True,
                             disable=None) as bar:
                    while block := response.read(1 << 20):
                        file.write(block)
                        bar.update(len(block))
                        if file.tell() > MAX_ARCHIVE_BYTES:
                            break
                    received = file.tell()
            if received > MAX_ARCHIVE_BYTES:
                path.unlink()
                raise UserError(f"--download: {url}: sends more than {MAX_ARCHIVE_BYTES / 1e9:.0f} GB; that is not ESC-50")
            if total is None or received >= total:
                return
            error = f"the connection ended after {received} of {total} bytes"
        except urllib.error.HTTPError as refusal:
            if refusal.code == 416 and have:  # nothing after what is there: it is all there
                return
            error = f"HTTP status {refusal.code}"
            if refusal.code < 500:
                raise UserError(f"--download: {url}: {error}; fetch the archive by hand and unpack it into the "
                                f"folder that --data names") from refusal
        except (http.client.HTTPException, urllib.error.URLError, ssl.SSLError, ConnectionError, TimeoutError) as broken:
            error = str(getattr(broken, "reason", broken)) or type(broken).__name__
        size = path.stat().st_size if path.exists() else 0
        failures = 0 if size > most else failures + 1  # a server that begins anew each time may never get further
        most = max(most, size)
        if failures == ATTEMPTS:
            raise UserError(f"--download: {url}: {error}; check the connection and run the command again: "
                            f"it goes on where it stopped, if the server can")
        time.sleep(PAUSE)


def unpack(archive: Path, folder: Path, url: str) -> None:
    """Unpack the files below the archive's one top folder into `folder`. url: where it came from, for errors.

    Raises UserError if it is damaged, or holds a name that leads out of the folder, a link, or more than 4 GB.
    """
    try:
        unpack_members(archive, folder)
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError, ValueError,
            struct.error, OSError) as error:  # all that zipfile raises; OSError: for places before the file, or by bz2
        if isinstance(error, UserError) or (isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)):
            raise
        raise UserError(f"--download: what came from {url} is not a whole zip archive ({first_line(error)}); it was removed, "
                        f"try again") from error


def unpack_members(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as zipped:
        members = [member for member in zipped.infolist() if not member.filename.endswith("/")]
        if sum(member.file_size for member in members) > MAX_UNPACKED_BYTES:
            raise UserError(f"--download: the archive would unpack to more than {MAX_UNPACKED_BYTES / 1e9:.0f} GB; "
                            f"that is not ESC-50")
        for member in tqdm(members, "unpack", unit=" files", disable=None):
            parts = PurePosixPath(member.filename.replace("\\", "/")).parts
            is_link = (member.external_attr >> 16) & 0o170000 == 0o120000
            if is_link or len(parts) < 2 or ".." in parts or parts[0] == "/" or any(":" in part for part in parts):
                raise UserError(f"--download: the archive holds {member.filename!r}, which may lead out of the "
                                f"folder; that is not ESC-50")
            target = folder.joinpath(*parts[1:])
            if target.exists():
                raise UserError(f"--download: the archive holds {member.filename!r} twice; that is not ESC-50")
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError) as error:
                raise UserError(f"--download: the archive holds {member.filename!r} below a file; that is not ESC-50") from error
            with zipped.open(member) as source, open(target, "xb") as file:  # reads no more than file_size says
                shutil.copyfileobj(source, file, 1 << 20)


def problems(root: Path) -> list[str]:
    """What is wrong with a root: its table, or the clips of the table that are not there or do not decode."""
    def check(name: str) -> str:
        try:
            load_waveform(root / "audio" / name)
        except UserError as error:
            return str(error)
        return ""

    try:
        names = list(read_table(root)["filename"])
    except UserError as error:
        return [str(error)]
    return [error for error in in_threads(check, names, "check") if error]


def move_into(source: Path, root: Path) -> None:
    """Move every file of `source` into `root`, over what is there; the table last, as it makes a root of a folder."""
    files = sorted(path for path in source.rglob("*") if path.is_file())
    for file in sorted(files, key=lambda path: path.name == "esc50.csv"):
        target = root / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, target)


# --- the demo ---------------------------------------------------------------------------------------------------------

def write_demo(root: Path) -> None:
    """Write a root of 500 synthetic clips, once: 50 classes (10 kinds of sound in 5 registers), 5 folds.

    Every clip is drawn from a generator of its own, seeded by its class and number: the same on every machine.
    Raises UserError if the folder holds another table.
    """
    rows = [(f"{number % NUM_FOLDS + 1}-{1000 + target}-{'ABCDEFGHIJ'[number]}-{target}.wav", number % NUM_FOLDS + 1,
             target, f"{KINDS[target // 5].__name__}_{REGISTERS[target % 5][0]}", target < 10, f"{1000 + target}",
             "ABCDEFGHIJ"[number])
            for number in range(DEMO_CLIPS_PER_CLASS) for target in range(NUM_CLASSES)]
    table = pd.DataFrame(rows, columns=["filename", "fold", "target", "category", "esc10", "src_file", "take"])
    text = table.to_csv(index=False, lineterminator="\n")
    path = root / "meta" / "esc50.csv"
    if path.is_file():
        if path.read_bytes() != text.encode():
            raise UserError(f"--demo: {root} holds another data set; leave out --data, or name a new folder")
        return

    def write_clip(row: tuple) -> None:
        name, target, number = row[0], row[2], "ABCDEFGHIJ".index(row[6])
        clip = demo_clip(target, np.random.default_rng([target, number]))
        write_whole(root / "audio" / name,
                    lambda part: soundfile.write(part, clip, SAMPLE_RATE, subtype="PCM_16", format="WAV"))

    try:
        for folder in ("audio", "meta"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        in_threads(write_clip, rows, f"demo clips into {root}")
        write_whole(path, lambda part: part.write_bytes(text.encode()))  # last: it makes a root of the folder
    except OSError as error:
        raise UserError(f"--demo: cannot write to {root} ({error}); name another folder with --data") from error


# Each kind of sound takes time (s, float64), a pitch (Hz) and a generator, and gives samples of any scale.

def tone(t, pitch, rng):
    return sum(np.sin(2 * np.pi * pitch * k * t + rng.uniform(0, 6.28)) / k for k in range(1, 6))


def noise(t, pitch, rng):
    return band_noise(len(t), pitch * 0.8, pitch * 1.25, rng)


def siren(t, pitch, rng):
    swing = 0.25 * np.sin(2 * np.pi * rng.uniform(0.8, 1.5) * t)
    return np.sin(2 * np.pi * np.cumsum(pitch * 2 ** swing) / SAMPLE_RATE)


def chirp_up(t, pitch, rng):
    phase = (t * rng.uniform(1.5, 2.5)) % 1
    return np.sin(2 * np.pi * np.cumsum(pitch * 2 ** (phase - 0.5)) / SAMPLE_RATE)


def chirp_down(t, pitch, rng):
    phase = (t * rng.uniform(1.5, 2.5)) % 1
    return np.sin(2 * np.pi * np.cumsum(pitch * 2 ** (0.5 - phase)) / SAMPLE_RATE)


def clicks(t, pitch, rng):
    return np.exp(-((t * rng.uniform(5, 8)) % 1) * 60) * noise(t, pitch, rng)


def bell(t, pitch, rng):
    since = t % rng.uniform(0.9, 1.4)
    return sum(np.sin(2 * np.pi * pitch * ratio * t) * np.exp(-since * 3 * ratio) for ratio in (1, 2.76, 5.4))


def pulsing(t, pitch, rng):
    return tone(t, pitch, rng) * (np.sin(2 * np.pi * rng.uniform(3, 5) * t) > 0)


def whistle(t, pitch, rng):
    return np.sin(2 * np.pi * pitch * t + 2 * np.sin(2 * np.pi * rng.uniform(5, 7) * t))


def gusts(t, pitch, rng):
    return noise(t, pitch, rng) * (1 + np.sin(2 * np.pi * rng.uniform(0.4, 0.8) * t + rng.uniform(0, 6.28)))


KINDS = [tone, noise, siren, chirp_up, chirp_down, clicks, bell, pulsing, whistle, gusts]
REGISTERS = [("lowest", 220.0), ("low", 440.0), ("middle", 880.0), ("high", 1760.0), ("highest", 3520.0)]  # Hz


def band_noise(samples: int, low: float, high: float, rng: np.random.Generator) -> np.ndarray:
    """Noise of unit deviation between two frequencies (Hz)."""
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    frequencies = np.fft.rfftfreq(samples, 1 / SAMPLE_RATE)
    spectrum[(frequencies < low) | (frequencies > high)] = 0
    band = np.fft.irfft(spectrum, samples)
    return band / band.std()


def demo_clip(target: int, rng: np.random.Generator) -> np.ndarray:
    """One clip (220500,) in [-1, 1]: a sound of class `target` somewhere in 5 s, over noise of random loudness."""
    t = np.arange(CLIP_SAMPLES) / SAMPLE_RATE
    pitch = REGISTERS[target % 5][1] * 2 ** rng.uniform(-0.25, 0.25)  # registers are an octave apart
    sound = KINDS[target // 5](t, pitch, rng)
    begin = rng.uniform(0, 1.5)
    sound = sound * ((t >= begin) & (t < begin + rng.uniform(2.5, 3.5)))
    background = band_noise(CLIP_SAMPLES, 50, rng.uniform(1000, 12000), rng)
    clip = sound / np.abs(sound).max() + background * 10 ** (rng.uniform(-50, -20) / 20)
    return clip / np.abs(clip).max() * rng.uniform(0.1, 0.9)
