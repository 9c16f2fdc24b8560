"""Features computed once, in threads, by a function of one file, and kept on disk to be memory-mapped."""
import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import numpy as np
import torch
from tqdm import tqdm

from util.errors import UserError, check_regular_file, first_ten, write_atomically
from util.rundir import remove_parts

LIBRARIES = ("torch", "torchaudio", "av", "soxr")  # that features are computed with


def mel_params(params: dict) -> dict:
    """The dsets.FeatureParams that features depend on: all but the crop's."""
    return {name: value for name, value in params.items() if not name.startswith("crop")}


def load_features(root: Path, clips: list[tuple], compute, shape: tuple[int, ...], params: dict, kind: str = "logmel"):
    """Features (N, *shape) float32 of the clips, memory-mapped; each clip's file's SHA-256; remarks, each with its files' names.

    clips: (name, start, end) of each: a part of the file root/<name>, those of one file in a row. compute(path, spans, remarks)
    yields the features of a file's spans (start, end) one after the other, each an array of `shape`, and may append strings to
    `remarks`; params are all the numbers they depend on. Features are computed the first time and whenever a file, a clip, a
    parameter or a library has changed.
    Raises UserError naming the files (ten at most) that cannot be used.
    """
    files = {name: [span for _, *span in spans] for name, spans in itertools.groupby(clips, key=lambda clip: clip[0])}
    stats = []
    for name in files:
        with contextlib.suppress(OSError):  # a missing file is reported when the features are computed
            stat = os.stat(root / name)
            stats.append([name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns])  # ctime: swapped files keep their mtime
    prefix = f"{kind}-{digest(params)}"  # of these parameters: a checkout with others keeps its own
    key = digest([stats, clips, [importlib.metadata.version(name) for name in LIBRARIES]])
    file_name = f"{prefix}-{key}.npy"
    folders = [root / "features"]
    for home in (os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or os.path.expanduser("~/.cache"),
                 tempfile.gettempdir()):  # where root is read-only; a user without a home has no cache folder
        if not home.startswith("~"):
            folders.append(Path(home) / "esc50-features" / digest(str(root.resolve())))
    for folder in folders:
        if cached := read_cache(folder / file_name, files, shape):
            return cached
    for folder in folders:
        with contextlib.ExitStack() as stack:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(filelock.FileLock(folder / "lock"))  # a second process waits for the first one's features
            except (OSError, NotImplementedError):  # not writable, or on a file system without locks
                continue
            if cached := read_cache(folder / file_name, files, shape):
                return cached
            remove_parts(folder)
            for stale in folder.glob(f"{prefix}-*"):
                with contextlib.suppress(OSError):  # in use by another process (Windows)
                    stale.unlink()
            compute_features(root, files, folder / file_name, compute, shape)
            return read_cache(folder / file_name, files, shape)
    raise UserError(f"{' and '.join(map(str, folders))}: are not writable; make one of them so, or set XDG_CACHE_HOME")


def sha256(path: Path) -> str:
    """A file's SHA-256; UserError if it cannot be read."""
    check_regular_file(path)
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error


def digest(content) -> str:
    """The first 16 digits of the SHA-256 of something that JSON can hold."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def read_cache(path: Path, files: dict, shape: tuple[int, ...]) -> tuple[torch.Tensor, list[str], dict[str, list[str]]] | None:
    """What load_features returns, or None if it is not there or damaged."""
    try:
        of_files = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        try:
            features = np.load(path, mmap_mode="c")  # copy on write: nothing done to the tensor reaches the file
        except OSError:  # it is not there, or its file system has no mmap
            features = np.load(path)
        digests, remarks = [], {}
        for (name, spans), (file_digest, said) in zip(files.items(), of_files, strict=True):
            digests += [file_digest] * len(spans)
            for remark in said:
                remarks.setdefault(remark, []).append(name)
        if features.shape != (len(digests), *shape) or features.dtype != np.float32:
            return None
    except (OSError, ValueError, EOFError, AttributeError, TypeError):  # whatever else the files hold
        return None
    return torch.from_numpy(features), digests, remarks


def compute_features(root: Path, files: dict, path: Path, compute, shape: tuple[int, ...]) -> None:
    """Write the features of all spans of the files root/<name> to `path`, and the files' SHA-256 and remarks beside it."""
    items, of_files, errors = list(files.items()), [None] * len(files), [""] * len(files)
    offsets = [0, *itertools.accumulate(map(len, files.values()))]  # the row of each file's first span

    def write_both(temporary: Path) -> None:
        # a plain file: cheaper than page by page, a full disk is an error one can catch, and some file systems have no mmap
        with open(temporary, "wb") as output:
            header = {"descr": "<f4", "fortran_order": False, "shape": (offsets[-1], *shape)}
            np.lib.format.write_array_header_1_0(output, header)
            header_bytes, clip_bytes = output.tell(), 4 * math.prod(shape)
            output.truncate(header_bytes + offsets[-1] * clip_bytes)

        def compute_one(index: int) -> None:
            (name, spans), remarks = items[index], []
            with torch.inference_mode(), open(temporary, "rb+") as output:
                output.seek(header_bytes + offsets[index] * clip_bytes)
                try:
                    of_files[index] = sha256(root / name), remarks
                    for feature in compute(root / name, spans, remarks):
                        output.write(feature.tobytes())
                except UserError as error:
                    errors[index] = str(error)

        # One file a thread, clip by clip: a clip's spectrum stays in the processor's cache, which a batch's does not.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            in_threads(compute_one, range(len(files)), "features")
        finally:
            torch.set_num_threads(threads)
        if any(errors):
            raise UserError(f"{first_ten(errors)}; fix them or take them out (--download and --demo restore what they wrote)")
        # written first: who finds the features finds this file, too
        write_atomically(path.with_suffix(".json"), lambda part: part.write_text(json.dumps(of_files)))

    write_atomically(path, write_both)


def in_threads(function, items, title: str) -> list:
    """[function(item) for each item], in as many threads as this process may use cores, with a bar on a terminal."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # Slurm allots some
    with ThreadPoolExecutor(cores) as pool, contextlib.closing(pool.map(function, items)) as results:
        # closing: an interrupt drops what has not begun
        return list(tqdm(results, title, len(items), unit=" clips", disable=None))
