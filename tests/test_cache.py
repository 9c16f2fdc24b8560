"""Features computed once and memory-mapped: here of four small files, their first six bytes."""
import contextlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import PROJECT
from util import cache
from util.errors import UserError

NAMES = [f"audio/{letter}.wav" for letter in "abcd"]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A data folder of four files."""
    (tmp_path / "data" / "audio").mkdir(parents=True)
    for number, name in enumerate(NAMES):
        (tmp_path / "data" / name).write_bytes(bytes(range(6 * number, 6 * number + 6)))
    return tmp_path / "data"


def first_bytes(path: Path) -> np.ndarray:
    return np.frombuffer(path.read_bytes()[:6], np.uint8).astype(np.float32).reshape(1, 2, 3)


def load(folder: Path, compute=first_bytes, **params) -> tuple[torch.Tensor, list[str]]:
    """Features and digests of the files, each a clip."""
    clips = [(name, 0.0, 5.0) for name in NAMES]
    return cache.load_features(folder, clips, lambda path, spans, remarks: [compute(path)], (1, 2, 3), params)[:2]


def is_cached(folder: Path, **params) -> bool:
    """Whether the features are there without being computed."""
    def computed(path):
        raise UserError("computed")
    try:
        load(folder, computed, **params)
    except UserError:
        return False
    return True


def files_in(folder: Path) -> list[str]:
    """What is in the folder of features, but for the lock."""
    return sorted(path.name for path in folder.iterdir() if path.name != "lock")


def test_features_are_those_of_each_file_and_computed_once(folder):
    features, digests = load(folder)
    assert torch.equal(features, torch.arange(24.0).reshape(4, 1, 2, 3)) and features.dtype == torch.float32
    assert len(set(digests)) == 4 and all(len(digest) == 64 for digest in digests)
    assert is_cached(folder)
    again, same_digests = load(folder)
    assert torch.equal(again, features) and same_digests == digests


def test_all_clips_of_a_file_are_computed_in_one_call_and_lie_in_its_place(folder):
    calls = []

    def compute(path, spans, remarks):
        calls.append((path.name, [tuple(span) for span in spans]))
        remarks += ["is odd"] if path.name in ("b.wav", "c.wav") else []
        return (first_bytes(path) + 100 * start for start, _ in spans)
    clips = [(NAMES[0], 0.0, 5.0), (NAMES[1], 0.0, 5.0), (NAMES[1], 5.0, 10.0), (NAMES[1], 10.0, math.nan), (NAMES[2], 1.0, 2.0)]
    for _ in range(2):
        features, digests, remarks = cache.load_features(folder, clips, compute, (1, 2, 3), {})
        expected = [0, 6, 6 + 500, 6 + 1000, 12 + 100]
        assert features[:, 0, 0, 0].tolist() == expected and digests[1] == digests[2] == digests[3] != digests[0]
        assert remarks == {"is odd": [NAMES[1], NAMES[2]]}
    assert sorted((name, len(spans)) for name, spans in calls) == [("a.wav", 1), ("b.wav", 3), ("c.wav", 1)]
    features, *_ = cache.load_features(folder, [*clips[:-1], (NAMES[2], 2.0, 3.0)], compute, (1, 2, 3), {})
    assert features[-1, 0, 0, 0].item() == 12 + 200, "another part of the same file"


def test_nothing_done_to_features_reaches_the_file(folder):
    load(folder)[0].zero_()
    assert load(folder)[0].any()


def test_features_follow_files_that_are_swapped(folder):
    first, second = folder / NAMES[0], folder / NAMES[1]
    for path in (first, second):
        os.utime(path, (1e9, 1e9))  # as data sets are often unpacked: all at one time
    before, digests = load(folder)
    first.rename(folder / "aside")
    second.rename(first)
    (folder / "aside").rename(second)
    after, swapped_digests = load(folder)
    assert torch.equal(after, before[[1, 0, 2, 3]])
    assert swapped_digests == [digests[1], digests[0], *digests[2:]]


def test_changed_files_replace_the_features_of_the_same_parameters_alone(folder):
    load(folder, n_mels=128)
    load(folder, n_mels=64)
    assert is_cached(folder, n_mels=128) and is_cached(folder, n_mels=64)
    before = files_in(folder / "features")
    assert len(before) == 4  # features and digests of each
    (folder / NAMES[2]).write_bytes(b"changed")
    features, _ = load(folder, n_mels=64)
    assert features[2].flatten().tolist() == list(b"change") and torch.equal(features[1], torch.arange(6.0, 12).reshape(1, 2, 3))
    after = files_in(folder / "features")
    assert len(after) == 4 and len(set(after) & set(before)) == 2
    load(folder, n_mels=128)
    assert is_cached(folder, n_mels=64)
    after = files_in(folder / "features")
    assert len(after) == 4 and not set(after) & set(before)


def test_features_follow_the_parameters_and_the_libraries(folder, monkeypatch):
    load(folder, top_db=80.0)
    assert is_cached(folder, top_db=80.0) and not is_cached(folder, top_db=60.0)
    assert not is_cached(folder, top_db=80.0, amin=1e-10)
    monkeypatch.setattr(cache.importlib.metadata, "version", lambda name: "0")
    assert not is_cached(folder, top_db=80.0)


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "no features", "no digests", "[]", "5", "another shape",
                                    "doubles"])
def test_damaged_features_are_computed_again(folder, damage):
    expected, digests = load(folder)
    expected = expected.clone()
    path, = (folder / "features").glob("*.npy")
    if damage in ("[]", "5"):
        path.with_suffix(".json").write_text(damage)
    elif damage.startswith("no "):
        path.with_suffix(".npy" if damage == "no features" else ".json").unlink()
    elif damage == "another shape":
        np.save(path, np.zeros((4, 1, 3, 2), np.float32))
    elif damage == "doubles":
        np.save(path, np.zeros((4, 1, 2, 3)))
    else:
        path.write_bytes({"cut": path.read_bytes()[:-1], "garbage": b"garbage", "empty": b""}[damage])
    features, again = load(folder)
    assert torch.equal(features, expected) and again == digests
    assert json.loads(path.with_suffix(".json").read_text()) == [[digest, []] for digest in digests]


def test_all_bad_files_are_named_at_once_up_to_ten(folder):
    names = [f"audio/{number}.wav" for number in range(12)]
    for name in names:
        (folder / name).write_bytes(b"123456")

    def fails(path, spans, remarks):
        raise UserError(f"{path}: is bad")
    with pytest.raises(UserError) as refusal:
        cache.load_features(folder, [(name, 0.0, 5.0) for name in names], fails, (1, 2, 3), {})
    assert sum(f"{folder / name}: is bad" in str(refusal.value) for name in names) == 10
    assert "2 more" in str(refusal.value) and "\n" not in str(refusal.value)
    assert files_in(folder / "features") == []


def test_a_missing_file_is_named(folder):
    (folder / NAMES[3]).unlink()
    with pytest.raises(UserError, match=NAMES[3]):
        load(folder)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, UserError("is bad")])
def test_a_computation_that_ends_early_leaves_nothing(folder, error):
    def ends_early(path):
        if path.name == "c.wav":
            raise error
        return first_bytes(path)
    with pytest.raises(error if isinstance(error, type) else UserError):
        load(folder, ends_early)
    assert files_in(folder / "features") == []
    assert load(folder)[0].shape == (4, 1, 2, 3)


def test_what_a_killed_computation_left_is_removed(folder):
    left = folder / "features" / ".logmel-0123456789abcdef.npy.99999.part"
    left.parent.mkdir()
    left.write_bytes(b"half")
    load(folder)
    assert not left.exists()


def test_a_full_disk_is_an_error_of_one_line(folder):
    resource = pytest.importorskip("resource")  # not on Windows
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))  # the features take 160 000 bytes
    try:
        with pytest.raises(UserError, match=r"logmel-\S+\.npy: ") as refusal:
            cache.load_features(folder, [(name, 0.0, 5.0) for name in NAMES],
                                lambda path, spans, remarks: [np.ones((1, 100, 100), np.float32)], (1, 100, 100), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(refusal.value) and files_in(folder / "features") == []


def test_a_read_only_folder_is_served_from_the_users_cache(folder, tmp_path):
    (folder / "features").write_text("a file where the folder would be: nobody, not even root, can write into it")
    features, _ = load(folder)
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 1
    assert is_cached(folder) and torch.equal(load(folder)[0], features)


def test_without_a_home_the_systems_temporary_folder_serves(folder, tmp_path, monkeypatch):
    (folder / "features").write_text("")
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where neither HOME nor the user has a name
    monkeypatch.setattr(cache.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    monkeypatch.chdir(tmp_path)
    load(folder)
    assert len(list((tmp_path / "temporary").rglob("*.npy"))) == 1 and not Path("~").exists()


def test_a_file_system_without_mmap_has_its_features_read(folder, monkeypatch):
    expected, load_array = load(folder)[0].clone(), np.load

    def load_without_mmap(path, mmap_mode=None):
        if mmap_mode:
            raise OSError(22, "Invalid argument")
        return load_array(path)
    monkeypatch.setattr(np, "load", load_without_mmap)
    monkeypatch.setattr(cache, "compute_features", None)  # they are there
    assert torch.equal(load(folder)[0], expected)


def test_a_file_system_without_locks_is_served_from_the_users_cache(folder, tmp_path, monkeypatch):
    acquire = cache.filelock.FileLock.acquire

    def without_locks(self, *arguments, **keywords):
        if str(folder) in self.lock_file:
            raise NotImplementedError("FileSystem does not appear to support flock")
        return acquire(self, *arguments, **keywords)
    monkeypatch.setattr(cache.filelock.FileLock, "acquire", without_locks)
    load(folder)
    assert len(list((tmp_path / "cache").rglob("*.npy"))) == 1


def test_nowhere_to_write_is_refused(folder, monkeypatch):
    (folder / "features").write_text("")
    monkeypatch.setattr(cache.tempfile, "gettempdir", lambda: str(folder / "features"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "features"))
    with pytest.raises(UserError, match=str(folder / "features")) as refusal:
        load(folder)
    assert "\n" not in str(refusal.value)


@pytest.mark.slow
def test_two_processes_computing_at_once_both_end_well(own_root):
    code = f"import dsets; print(dsets.ESC50({str(own_root)!r}).features.sum().item())"
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=PROJECT) for _ in range(2)]
    sums = {process.communicate(timeout=120)[0] for process in processes}
    assert len(sums) == 1 and float(sums.pop()) and [process.returncode for process in processes] == [0, 0]
    assert len(files_in(own_root / "features")) == 2


def test_threads_give_their_results_in_order():
    assert cache.in_threads(lambda item: item ** 2, range(100), "squares") == [item ** 2 for item in range(100)]


@pytest.mark.parametrize("fails", [False, True])
def test_each_file_is_computed_by_one_thread_alone(folder, fails):
    before, seen = torch.get_num_threads(), []

    def compute(path):
        seen.append(torch.get_num_threads())
        if fails:
            raise UserError("is bad")
        return first_bytes(path)
    torch.set_num_threads(2)
    try:
        with pytest.raises(UserError) if fails else contextlib.nullcontext():
            load(folder, compute)
        assert seen == [1] * 4 and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
