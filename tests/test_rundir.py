"""A run's folder: run.json, joining and continuing a run, locks, metrics.jsonl."""
import functools
import json
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import filelock
import pytest
import torch

import dsets
from conftest import PROJECT, error_line, refused, results_of, run, train_in, write_root
from util import config, rundir
from util.errors import UserError

pytestmark = pytest.mark.usefixtures("tiny", "small_pictures")


def refused_in(capsys, run_dir: Path, root: Path, *flags) -> str:
    """The line that refuses a command like that of train_in."""
    run("--data", root, "--run-dir", run_dir, "--epochs", 2, "--views", 2, "--batch-size", 4, *flags, status=2)
    return error_line(capsys)


def run_config_of(run_dir: Path) -> dict:
    return json.loads((run_dir / "run.json").read_text())


def change_run_config(run_dir: Path, **parts) -> None:
    """Merge entries into parts of run.json: change_run_config(run_dir, versions={"torch": "1.0"})."""
    content = run_config_of(run_dir)
    for part, entries in parts.items():
        content[part] |= entries
    (run_dir / "run.json").write_text(json.dumps(content))


@pytest.fixture
def other_features(monkeypatch):
    """The features that a changed dsets.py would have."""
    params = dsets.FeatureParams(top_db=60.0, crop_mels=96)
    monkeypatch.setattr(dsets, "FeatureParams", lambda **flags: params)


# --- what is in it ----------------------------------------------------------------------------------------------------

def test_run_json_holds_all_that_a_run_depends_on(pristine_root, shared_run):
    content, dataset = run_config_of(shared_run), dsets.ESC50(pristine_root)
    expected = {"fold": [1, 3], "seed": [1, 2], "model": "cnn8", "epochs": 2, "device": "cpu"}
    assert content["flags"] | expected == content["flags"]
    assert content["flags"]["data"] == str(pristine_root.resolve()) and content["flags"]["precision"] in ("fp32", "bf16")
    assert content["features"] == vars(dataset.params)
    assert content["data"] == {"clips": 12, "classes": dataset.classes, "fingerprint": dataset.fingerprint()}
    assert content["versions"]["torch"] == version("torch") and content["hardware"]["world_size"] == 1
    assert content["hardware"]["threads"] == torch.get_num_threads()
    assert content["command"][:2] == ["training.py", "--data"] and content["sessions"] == []


def test_flags_of_run_json_are_read_back_as_they_were(shared_run):
    content = run_config_of(shared_run)
    flags = content["flags"]
    assert flags.keys() == {field.name for field in fields(config.Config)}
    assert vars(config.parse_args(["--rerun", str(shared_run)])) | {"rerun": None} == flags
    given = vars(config.parse_args(content["command"][1:]))
    assert {name for name, value in given.items() if value != flags[name]} <= {"run_dir", "precision"}


def test_a_run_leaves_these_files(shared_run):
    assert {path.name for path in shared_run.iterdir()} >= {"run.json", "summary.json", "seed-1", "seed-2"}
    for seed in (1, 2):
        for fold in (1, 3):
            folder = rundir.training_dir(shared_run, seed, fold)
            names = {path.name for path in folder.iterdir()}
            assert names >= {"metrics.jsonl", "last.pt", "best.pt", "report.csv", "confusion.png", "curves.png"}
            assert any(name.startswith("events.out.tfevents") for name in names)
            rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            assert rows == rundir.read_metrics(folder) and rundir.is_finished(folder, 2) and not rundir.is_finished(folder, 3)
            assert [(row["seed"], row["fold"], row["epoch"], row["phase"]) for row in rows] == [
                (seed, fold, epoch, phase) for epoch in (1, 2) for phase in ("training", "validation")]
            assert {*rows[0]} >= {"loss", "accuracy", "precision", "recall", "f1", "seconds"}
    assert not list(shared_run.rglob(".*.part"))


def test_the_default_folder_is_named_by_time_and_comment(pristine_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("first", "--data", pristine_root, "--epochs", 1, "--views", 1, "--tb-prefix", "mine")
    monkeypatch.setattr(rundir.time, "strftime", lambda text: "2030-01-01_00.00.00")
    assert [rundir.new_run_dir("mine", "a").name for _ in range(2)] == ["2030-01-01_00.00.00_a", "2030-01-01_00.00.00_a-1"]
    trained, = (tmp_path / "runs" / "mine").glob("*_first")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d\.\d\d\.\d\d_first", trained.name) and (trained / "summary.json").exists()


def test_a_folder_of_runs_that_cannot_be_made_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").symlink_to(tmp_path / "not mounted")
    with pytest.raises(UserError, match="runs.*--run-dir"):
        rundir.new_run_dir("CNN", "")


def test_later_commands_are_recorded_as_sessions(pristine_root, tmp_path, monkeypatch):
    run_dir = train_in(tmp_path / "run", pristine_root)
    monkeypatch.setattr(rundir, "git", lambda *arguments: "another")
    train_in(run_dir, pristine_root, "--fold", 2)
    run("--resume", run_dir, "--epochs", 3)
    run("--resume", run_dir)  # only to look at the table
    content = run_config_of(run_dir)
    assert content["git"]["commit"] != "another" and content["flags"]["fold"] == [1, 2] and content["flags"]["epochs"] == 3
    assert [session["git"]["commit"] for session in content["sessions"]] == ["another", "another"]
    assert content["sessions"][1]["command"] == ["training.py", "--resume", str(run_dir), "--epochs", "3"]


def test_git_is_not_needed(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert rundir.git("rev-parse", "HEAD") is None
    assert rundir.environment(1)["git"] == {"commit": None, "dirty": None}, "nobody knows"


# --- damaged files ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"flags": {}}', b"\xff", b"[" * 100_000])
def test_a_damaged_run_json_is_refused(tmp_path, content):
    (tmp_path / "run.json").write_bytes(content)
    assert str(tmp_path / "run.json") in refused(rundir.read_run_config, tmp_path)


def test_a_run_json_cut_short_or_absent_is_refused(reference, capsys):
    path = reference / "run.json"
    path.write_bytes(path.read_bytes()[:-100])
    run("--resume", reference, status=2)
    assert str(path) in error_line(capsys)
    path.unlink()
    run("--resume", reference, status=2)
    assert str(path) in error_line(capsys)


@pytest.mark.parametrize("damage", ["missing", "type"])
def test_a_run_json_without_an_entry_or_with_another_type_is_refused(shared_run, tmp_path, damage):
    names = [*rundir.RUN_CONFIG_TYPES, *(f"flags.{field.name}" for field in fields(config.Config))]
    for name in names:
        content = run_config_of(shared_run)
        *parents, last = name.split(".")
        part = functools.reduce(dict.__getitem__, parents, content)
        if damage == "missing":
            del part[last]
        else:
            part[last] = 5 if isinstance(part[last], dict) else {}
        (tmp_path / "run.json").write_text(json.dumps(content))
        message = refused(config.parse_args, ["--resume", str(tmp_path)])
        assert str(tmp_path / "run.json") in message and last in message


def test_damaged_metrics_are_refused_and_written_again_once_removed(reference, shared_run, capsys):
    path = reference / "seed-1" / "fold-1" / "metrics.jsonl"
    for content in (b"\xff\xfe\n{}\n", b"{}\n{}\n", b"[1]\n[2]\n", path.read_bytes()[:-40]):
        path.write_bytes(content)
        assert str(path) in refused(rundir.read_metrics, path.parent)
    run("--resume", reference, status=2)
    assert str(path) in error_line(capsys)
    path.unlink()  # as the line says
    run("--resume", reference)
    assert results_of(reference) == results_of(shared_run)


# --- joining and continuing a run -------------------------------------------------------------------------------------

def test_commands_join_a_folder_with_trainings_of_their_own(pristine_root, shared_run, tmp_path, capsys):
    run_dir = train_in(tmp_path / "a run", pristine_root, "--fold", 3, "--seed", 1)
    train_in(run_dir, pristine_root, "--fold", 1, "--seed", 2)
    assert run_config_of(run_dir)["flags"]["fold"] == [1, 3]
    run("--resume", run_dir)  # the other two
    assert results_of(run_dir) == results_of(shared_run)
    capsys.readouterr()
    assert "--batch-size" in refused_in(capsys, run_dir, pristine_root, "--fold", 2, "--batch-size", 5)
    assert f"--resume '{run_dir.as_posix()}'" in refused_in(capsys, run_dir, pristine_root, "--fold", 1, "--seed", 1)


def test_resume_takes_further_folds_and_seeds(pristine_root, shared_run, tmp_path):
    """As after a job array of which some jobs never began."""
    run_dir = train_in(tmp_path / "run", pristine_root, "--fold", 3, "--seed", 2)
    run("--resume", run_dir, "--fold", 1, "--seed", 1)
    assert run_config_of(run_dir)["flags"] == run_config_of(shared_run)["flags"]
    assert results_of(run_dir) == results_of(shared_run)


def test_commands_with_another_precision_do_not_join(pristine_root, reference, capsys):
    there = run_config_of(reference)["flags"]["precision"]
    other = {"fp32": "bf16", "bf16": "fp32"}[there]
    assert "--precision" in refused_in(capsys, reference, pristine_root, "--fold", 2, "--precision", other)
    train_in(reference, pristine_root, "--fold", 2, "--precision", there)  # what auto became


def test_trainings_without_a_run_json_are_not_joined(pristine_root, reference, capsys):
    (reference / "run.json").unlink()
    assert str(reference) in refused_in(capsys, reference, pristine_root, "--seed", 1)


def test_a_run_dir_that_cannot_be_made_is_refused(pristine_root, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert f"--run-dir {tmp_path / 'file'}" in refused_in(capsys, tmp_path / "file", pristine_root)


@pytest.mark.parametrize("flags, named", [
    (["--lr", "0.1"], "--lr"), (["--fold", "7"], "--fold 7"), (["--run-dir", "x"], "--run-dir"), (["--model", "cnn4"], "--model"),
    (["--epochs", "1"], "--epochs 1"), (["other"], "comment")])
def test_resume_refuses_flags_that_would_change_the_result(reference, shared_run, capsys, flags, named):
    run("--resume", reference, *flags, status=2)
    assert named in error_line(capsys)
    assert run_config_of(reference) == run_config_of(shared_run)


def test_resume_finds_moved_data_and_refuses_other_data(root, tmp_path, capsys):
    run_dir = train_in(tmp_path / "run", root, "--epochs", 1)
    moved = root.rename(tmp_path / "moved")
    run("--resume", run_dir, "--epochs", 2, status=2)
    assert f"--data {root}" in error_line(capsys)
    run("--resume", run_dir, "--data", moved, "--fold", 2)
    run("--resume", run_dir, "--epochs", 2)  # it is known now
    other = write_root(tmp_path / "other", num_classes=2, clips=1)
    run("--resume", run_dir, "--data", other, status=2)
    assert f"--data {other.resolve()}" in error_line(capsys)
    assert f"--data {other.resolve()}" in refused_in(capsys, run_dir, other, "--fold", 3)


def test_runs_of_other_features_are_neither_resumed_nor_joined(pristine_root, reference, capsys, other_features):
    run("--resume", reference, "--epochs", 3, status=2)
    error = error_line(capsys)
    assert "top_db 80.0, here 60.0" in error and "crop_mels 100, here 96" in error and "n_mels" not in error
    error = refused_in(capsys, reference, pristine_root, "--fold", 2)
    assert "top_db" in error and "crop_mels" in error and "n_mels" not in error


@pytest.mark.parametrize("part, name", [("versions", "torch"), ("hardware", "world_size"), ("features", "n_fft")])
def test_a_run_goes_on_only_with_the_same(reference, part, name):
    then, now = run_config_of(reference), run_config_of(reference)
    rundir.check_same_run(reference, then, now)
    now["versions"]["python"] = now["hardware"]["cpu"] = now["git"]["commit"] = "another"
    rundir.check_same_run(reference, then, now)
    now[part][name] = 99
    message = refused(rundir.check_same_run, reference, then, now)
    assert str(reference) in message and "here 99" in message


def test_resume_refuses_other_versions(reference, capsys):
    change_run_config(reference, versions={"torch": "1.0"})
    run("--resume", reference, "--epochs", 3, status=2)
    error = error_line(capsys)
    assert f"torch 1.0, here {version('torch')}" in error and str(reference) in error


def test_commands_use_as_many_threads_as_the_run_began_with(pristine_root, tmp_path):
    """With others, sums have other last bits."""
    torch.set_num_threads(1)
    run_dir = train_in(tmp_path / "run", pristine_root, "--epochs", 1)
    for flags in (["--resume", run_dir], ["--rerun", run_dir, "--run-dir", tmp_path / "again"],
                  ["--data", pristine_root, "--run-dir", run_dir, "--fold", 2, "--epochs", 1, "--views", 2, "--batch-size", 4]):
        torch.set_num_threads(2)
        run(*flags)
        assert torch.get_num_threads() == 1
    assert run_config_of(tmp_path / "again")["hardware"]["threads"] == 1
    assert run_config_of(run_dir)["sessions"][0]["hardware"]["threads"] == 1


def test_a_run_goes_on_from_the_pretrained_weights_that_it_began_with(pristine_root, tmp_path, capsys, monkeypatch):
    weights, run_dir = tmp_path / "w.pt", tmp_path / "run"
    shutil.copy(train_in(tmp_path / "one", pristine_root, "--epochs", 1) / "seed-42" / "fold-1" / "last.pt", weights)
    monkeypatch.chdir(tmp_path)
    train_in(run_dir, pristine_root, "--epochs", 1, "--pretrained", "w.pt")
    monkeypatch.chdir(pristine_root)
    run("--resume", run_dir, "--fold", 2)  # finds them from elsewhere
    shutil.copy(train_in(tmp_path / "two", pristine_root, "--epochs", 1, "--seed", 1) / "seed-1" / "fold-1" / "last.pt", weights)
    run("--resume", run_dir, "--fold", 3, status=2)
    assert f"--pretrained {weights}: " in error_line(capsys)


def test_unfit_pretrained_weights_are_refused_before_a_folder_is_made(pristine_root, tmp_path, capsys):
    run_dir, weights = tmp_path / "run", tmp_path / "none.pth"
    assert str(weights) in refused_in(capsys, run_dir, pristine_root, "--model", "resnet18", "--pretrained", weights)
    assert not run_dir.exists()


# --- locks ------------------------------------------------------------------------------------------------------------

HOLD = """
import sys
from pathlib import Path
from util import rundir
with rundir.lock_training(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_on_one_training_is_refused(reference, capsys):
    folder = reference / "seed-1" / "fold-1"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], cwd=PROJECT, text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == "held\n"
    run("--resume", reference, "--epochs", 3, status=2)
    assert str(folder) in error_line(capsys)
    holder.kill()  # a dead process's lock does not block
    holder.communicate()
    with rundir.lock_training(folder):
        pass


def test_files_of_a_killed_process_are_removed_by_the_next(tmp_path):
    (tmp_path / ".last.pt.123.part").write_text("")
    with rundir.lock_training(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_command_that_joins_waits_for_the_folders_lock(tmp_path, shared_run):
    """Or of two commands at once, one would lose what the other wrote into run.json."""
    with filelock.FileLock(tmp_path / "lock"):
        arguments = (tmp_path, run_config_of(shared_run), config.LOCATION_FLAGS, False)
        joining = threading.Thread(target=rundir.record_run, args=arguments)
        joining.start()
        joining.join(timeout=0.3)
        assert joining.is_alive() and not (tmp_path / "run.json").exists()
    joining.join()
    assert run_config_of(tmp_path) == run_config_of(shared_run)


def test_a_file_system_without_locks_is_refused_by_folder(tmp_path, monkeypatch):
    def without_locks(self, *arguments, **keywords):
        raise NotImplementedError("FileSystem does not appear to support flock")
    monkeypatch.setattr(rundir.filelock.FileLock, "acquire", without_locks)
    message = refused(rundir.lock_training(tmp_path).__enter__)
    assert str(tmp_path) in message and "another process" not in message
