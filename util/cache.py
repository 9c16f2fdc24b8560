"""Features computed once, in threads, by a function of one file, and kept on disk to be memory-mapped."""
import contextlib
import hashlib
import importlib.metadata
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import filelock
import numpy as np
import torch
from tqdm import tqdm

from util.errors import UserError, first_ten, write_atomically
from util.rundir import remove_parts

LIBRARIES = ("torch", "torchaudio", "av", "soxr")  # that features are computed with


def load_features(root: Path, names: list[str], compute, shape: tuple[int, ...], params: dict) -> tuple[torch.Tensor, list[str]]:
    """Features (N, *shape) float32 of the files root/<name>, memory-mapped, and each file's SHA-256.

    compute(path) gives one file's features as an array of `shape`; params are all the numbers they depend on. They are
    computed the first time and whenever a file, a parameter or a library has changed.
    Raises UserError naming the files (ten at most) that cannot be used.
    """
    files = []
    for name in names:
        with contextlib.suppress(OSError):  # a missing file is reported when the features are computed
            stat = os.stat(root / name)
            files.append([name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns])  # ctime: swapped files keep their mtime
    prefix = f"logmel-{digest(params)}"  # of these parameters: a checkout with others keeps its own
    file_name = f"{prefix}-{digest([files, [importlib.metadata.version(name) for name in LIBRARIES]])}.npy"
    home = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or os.path.expanduser("~/.cache")
    folders = [root / "features", Path(home) / "esc50-features" / digest(str(root.resolve()))]  # the second if root is read-only
    for folder in folders:
        if cached := read_cache(folder / file_name, (len(names), *shape)):
            return cached
    for folder in folders:
        with contextlib.ExitStack() as stack:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(filelock.FileLock(folder / "lock"))  # a second process waits for the first one's features
            except OSError:  # not writable
                continue
            if cached := read_cache(folder / file_name, (len(names), *shape)):
                return cached
            remove_parts(folder)
            for stale in folder.glob(f"{prefix}-*"):
                with contextlib.suppress(OSError):  # in use by another process (Windows)
                    stale.unlink()
            compute_features(root, names, folder / file_name, compute, shape)
            return read_cache(folder / file_name, (len(names), *shape))
    raise UserError(f"{' and '.join(map(str, folders))}: are not writable; make one of them so, or set XDG_CACHE_HOME")


def digest(content) -> str:
    """The first 16 digits of the SHA-256 of something that JSON can hold."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def read_cache(path: Path, shape: tuple[int, ...]) -> tuple[torch.Tensor, list[str]] | None:
    """The cached features and file digests, or None if they are not there or damaged."""
    try:
        digests = json.loads(path.with_suffix(".json").read_text())
        features = np.load(path, mmap_mode="c")  # copy on write: nothing done to the tensor reaches the file
        if features.shape != shape or features.dtype != np.float32 or len(digests) != shape[0]:
            return None
    except (OSError, ValueError, EOFError, AttributeError, TypeError):  # whatever else the files hold
        return None
    return torch.from_numpy(features), digests


def compute_features(root: Path, names: list[str], path: Path, compute, shape: tuple[int, ...]) -> None:
    """Write the features of the files root/<name> to `path` and their SHA-256 beside it, all cores busy."""
    digests, errors = [""] * len(names), [""] * len(names)

    def write_both(temporary: Path) -> None:
        features = np.lib.format.open_memmap(temporary, "w+", np.float32, (len(names), *shape))
        header_bytes, clip_bytes = features.offset, features[0].nbytes
        del features  # written as a file: cheaper than page by page, and a full disk is an error one can catch

        def compute_one(index: int) -> None:
            try:
                with torch.inference_mode():
                    feature = compute(root / names[index])
                with open(root / names[index], "rb") as file:
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
            in_threads(compute_one, range(len(names)), "features")
        finally:
            torch.set_num_threads(threads)
        if any(errors):
            raise UserError(f"{first_ten(errors)}; fix them, take them out of the table, or fetch the data again (--download)")
        # the digests first: where there are features, they are there too
        write_atomically(path.with_suffix(".json"), lambda part: part.write_text(json.dumps(digests)))

    write_atomically(path, write_both)


def in_threads(function, items, title: str) -> list:
    """[function(item) for each item], in as many threads as this process may use cores, with a bar on a terminal."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # Slurm allots some
    with ThreadPoolExecutor(cores) as pool, contextlib.closing(pool.map(function, items)) as results:
        # closing: an interrupt drops what has not begun
        return list(tqdm(results, title, len(items), unit=" clips", disable=None))
