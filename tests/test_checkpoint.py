"""Checkpoints and files of weights: what is in them, what is refused, pretrained weights."""
import copy
import hashlib
import io
import os
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

import dsets
import models
import training
from conftest import CPU, error_line, refused, run, Tiny, train_in
from util import checkpoint as checkpoints
from util import rundir

FEATURES = vars(dsets.FeatureParams())


# --- what training.py saves -------------------------------------------------------------------------------------------

def test_a_checkpoint_holds_all_that_a_prediction_needs(pristine_root, shared_run):
    checkpoint = checkpoints.load_checkpoint(shared_run / "seed-1" / "fold-3" / "last.pt")
    dataset = dsets.ESC50(pristine_root)
    training_clips, validation = dataset.split(3)
    assert checkpoint["classes"] == dataset.classes and checkpoint["model_name"] == "cnn8"
    assert checkpoint["mean_std"] == list(dataset.mean_std(training_clips))
    assert dsets.FeatureParams(**checkpoint["features"]) == dataset.params
    model = Tiny(2)
    checkpoints.load_weights(model, checkpoint["model"], "last.pt")
    batches = dsets.validation_batches(dataset, validation, checkpoint["mean_std"], batch_size=4, device=CPU,
                                       tta_crops=checkpoint["flags"]["tta_crops"])
    _, predictions, targets, _ = training.evaluate(model, batches, checkpoint["precision"])
    row = rundir.read_metrics(shared_run / "seed-1" / "fold-3")[-1]
    assert (predictions == targets).float().mean().item() == row["accuracy"]
    assert torch.equal(predictions, checkpoint["predictions"])


@pytest.mark.usefixtures("tiny", "small_pictures")
def test_best_is_the_first_epoch_of_the_lowest_validation_loss(pristine_root, tmp_path, monkeypatch):
    evaluate, losses = training.evaluate, iter([3.0, 1.0, 2.0, 1.0])

    def evaluate_with_losses(*arguments):
        _, *others = evaluate(*arguments)
        return torch.full(others[0].shape, next(losses)), *others
    monkeypatch.setattr(training, "evaluate", evaluate_with_losses)
    folder = train_in(tmp_path / "run", pristine_root, "--epochs", 4) / "seed-42" / "fold-1"
    best, last = (checkpoints.load_checkpoint(folder / name) for name in ("best.pt", "last.pt"))
    assert (best["epoch"], last["epoch"]) == (2, 4)
    assert "optimizer" not in best and "raw_model" not in best
    assert best["history"] == last["history"][:4] and last["history"] == rundir.read_metrics(folder)


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path):
    resource = pytest.importorskip("resource")  # not on Windows
    path = tmp_path / "last.pt"
    checkpoints.save_checkpoint(path, {"weights": torch.zeros(10)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # no file may grow larger, as on a full disk
    try:
        message = refused(checkpoints.save_checkpoint, path, {"weights": torch.ones(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(path) in message and os.listdir(tmp_path) == ["last.pt"]
    assert torch.equal(checkpoints.load_tensors(path)["weights"], torch.zeros(10))


def test_an_interrupt_while_a_checkpoint_is_written_stays_one(tmp_path, monkeypatch):
    class Interrupted(io.FileIO):
        writes = 0

        def write(self, data):  # where the handler of a signal runs
            self.writes += 1
            if self.writes == 2:
                raise KeyboardInterrupt
            return super().write(data)
    monkeypatch.setattr(checkpoints, "open", Interrupted, raising=False)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save_checkpoint(tmp_path / "last.pt", {"model": torch.zeros(10)})
    assert not list(tmp_path.iterdir())


# --- files that are none ----------------------------------------------------------------------------------------------

class Malicious:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def write_garbage(path: Path, kind: str) -> None:
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "code":
        torch.save({"conv1.weight": Malicious()}, path)
    elif kind == "bomb":
        torch.save(torch.zeros(10 ** 6), path.with_name("stored.pth"))
        with zipfile.ZipFile(path.with_name("stored.pth")) as stored, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for member in stored.namelist():
                archive.writestr(member, stored.read(member))
    elif kind == "truncated":
        torch.save(torch.zeros(1000), path)
        path.write_bytes(path.read_bytes()[:1000])
    elif kind in ("empty", "text"):
        path.write_bytes(b"" if kind == "empty" else b"not a checkpoint")


@pytest.mark.parametrize("kind", [
    "absent", "empty", "text", "folder", "truncated", "code", "bomb",
    pytest.param("pipe", marks=pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes"))])
def test_files_that_hold_no_tensors_are_refused(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    write_garbage(tmp_path / "weights.pth", kind)
    for function in (checkpoints.load_tensors, checkpoints.load_checkpoint):
        message = refused(function, tmp_path / "weights.pth")
        assert str(tmp_path / "weights.pth") in message and (kind != "bomb" or "unpacks to more than it is" in message)
    assert "weights.pth" in refused(checkpoints.load_pretrained, Tiny(2), "weights.pth", FEATURES)
    assert not Path("executed").exists()


def test_files_of_torch_before_1_6_are_read(tmp_path):
    torch.save({"weights": torch.arange(3)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(checkpoints.load_tensors(tmp_path / "old.pth")["weights"], torch.arange(3))


@pytest.mark.parametrize("damage", ["missing", "type"])
def test_a_checkpoint_without_an_entry_or_with_another_type_is_refused(shared_run, tmp_path, damage):
    whole = checkpoints.load_checkpoint(shared_run / "seed-1" / "fold-1" / "best.pt")
    for name in checkpoints.CHECKPOINT_TYPES:
        checkpoint = copy.deepcopy(whole)
        *parents, last = name.split(".")
        part = checkpoint[parents[0]] if parents else checkpoint
        part[last] = 1.5
        if damage == "missing":
            del part[last]
        torch.save(checkpoint, tmp_path / "best.pt")
        message = refused(checkpoints.load_checkpoint, tmp_path / "best.pt")
        assert str(tmp_path / "best.pt") in message and last in message


def test_tensors_that_are_no_checkpoint_are_refused(tmp_path, recwarn):
    for content in (torch.zeros(3), [1], {"weights": torch.zeros(3)}, "text"):
        torch.save(content, tmp_path / "best.pt")
        assert str(tmp_path / "best.pt") in refused(checkpoints.load_checkpoint, tmp_path / "best.pt")
    assert not recwarn.list, "a second line on stderr"


@pytest.mark.parametrize("name, value", [
    ("fc.weight", torch.zeros(3, 5)), ("fc.weight", None), ("more", torch.zeros(1)), ("fc.bias", "text"),
    ("fc.bias", torch.tensor([0.0, float("nan")])), ("bn.running_var", torch.full((4,), torch.inf)),
    ("bn.running_var", torch.full((4,), -1.0))])
def test_weights_that_do_not_fit_or_are_not_finite_are_refused(name, value):
    state_dict = Tiny(2).state_dict()
    checkpoints.load_weights(Tiny(2), state_dict, "some.pt")
    state_dict[name] = value
    if value is None:
        del state_dict[name]
    message = refused(checkpoints.load_weights, Tiny(2), state_dict, "some.pt")
    assert message.startswith("some.pt: ") and name in message


def replace_last(path: Path, kind: str) -> None:
    """Put another file in place of last.pt."""
    checkpoint = torch.load(path, weights_only=True)
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    elif kind == "code":
        torch.save({**checkpoint, "epoch": Malicious()}, path)
    elif kind == "best":
        shutil.copy(path.with_name("best.pt"), path)
    elif kind == "another fold":
        shutil.copy(path.parents[1] / "fold-3" / "last.pt", path)
    elif kind == "features":
        torch.save({**checkpoint, "features": {**checkpoint["features"], "top_db": 60.0}}, path)
    elif kind == "optimizer":
        torch.save({**checkpoint, "optimizer": {"param_groups": []}}, path)
    elif kind == "weights":
        torch.save({**checkpoint, "model": {**checkpoint["model"], "fc.bias": torch.zeros(9)}}, path)
    else:
        others = {"model_name": "cnn4", "classes": ["sound_1", "sound_0"], "precision": "fp16"}
        torch.save({**checkpoint, kind: others[kind]}, path)


@pytest.mark.usefixtures("tiny", "small_pictures")
@pytest.mark.parametrize("kind, named", [
    ("truncated", ""), ("code", ""), ("best", "optimizer"), ("another fold", "fold 3, here 1"), ("features", "top_db"),
    ("optimizer", ""), ("weights", "fc.bias"), ("model_name", "cnn4, here cnn8"), ("classes", "classes ['sound_1'"),
    ("precision", "precision fp16, here ")])
def test_resume_refuses_a_last_checkpoint_that_is_damaged_or_anothers(reference, capsys, monkeypatch, tmp_path, kind, named):
    monkeypatch.chdir(tmp_path)
    path = reference / "seed-1" / "fold-1" / "last.pt"
    replace_last(path, kind)
    before = path.read_bytes()
    run("--resume", reference, "--epochs", 3, status=2)
    error = error_line(capsys)
    assert error.startswith(f"training.py: {path}: ") and named in error
    assert path.read_bytes() == before and not Path("executed").exists()


# --- pretrained weights -----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def published() -> models.ResNet18:
    """A network as torchvision publishes it: three channels, 1000 classes, batch statistics that are not those of a new one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = models.ResNet18(1000, (3, 100, 384))
        for name, tensor in model.state_dict().items():
            if "running" in name:
                tensor.uniform_(0.1, 1.1)
            elif name.endswith("tracked"):
                tensor.fill_(7)
    return model.eval()


def test_pretrained_weights_give_what_three_equal_channels_give(published, tmp_path):
    torch.save(published.state_dict(), tmp_path / "weights.pth")
    model = models.build_model("resnet18", 7).eval()
    head = model.fc.weight.clone()
    checkpoints.load_pretrained(model, str(tmp_path / "weights.pth"), FEATURES)
    assert torch.equal(model.fc.weight, head) and model.bn1.num_batches_tracked == 7
    model.fc = published.fc
    gray = torch.randn(2, 1, 100, 384)
    with torch.inference_mode():
        torch.testing.assert_close(model.conv1(gray), published.conv1(gray.expand(2, 3, 100, 384)), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model(gray), published(gray.expand(2, 3, 100, 384)), atol=1e-4, rtol=1e-4)


def test_a_last_layer_of_any_kind_stays_new(tmp_path):
    class Convolutions(torch.nn.Module):
        def __init__(self, classes):
            super().__init__()
            self.conv1, self.head = torch.nn.Conv2d(1, 2, 3), torch.nn.Conv2d(2, classes, 1)

    torch.save({"conv1.weight": torch.ones(2, 3, 3, 3), "conv1.bias": torch.ones(2)}, tmp_path / "weights.pth")
    model = Convolutions(5)
    before = model.head.weight.clone()
    checkpoints.load_pretrained(model, str(tmp_path / "weights.pth"), FEATURES)
    assert (model.conv1.weight == 3).all() and torch.equal(model.head.weight, before)


@pytest.mark.slow
def test_pretrained_imagenet_comes_through_torch_hub(published, tmp_path, monkeypatch):
    torch.save(published.state_dict(), tmp_path / "weights.pth")
    digest = hashlib.sha256((tmp_path / "weights.pth").read_bytes()).hexdigest()[:8]
    there = (tmp_path / "weights.pth").rename(tmp_path / f"resnet18-{digest}.pth")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(checkpoints, "IMAGENET_URL", there.as_uri())
    model = models.build_model("resnet18")
    checkpoints.load_pretrained(model, "imagenet", FEATURES)
    assert torch.equal(model.bn1.running_mean, published.bn1.running_mean)
    there.rename(tmp_path / "resnet18-00000000.pth")  # its digest is another
    for name in ("resnet18-11111111.pth", "resnet18-00000000.pth"):
        monkeypatch.setattr(checkpoints, "IMAGENET_URL", (tmp_path / name).as_uri())
        assert refused(checkpoints.load_pretrained, model, "imagenet", FEATURES).startswith("--pretrained imagenet: ")


class Small(torch.nn.Module):
    """A stem and a last layer named as torchvision's, and few weights."""

    def __init__(self, channels: int = 1):
        super().__init__()
        self.conv1, self.bn = torch.nn.Conv2d(channels, 4, 3), torch.nn.BatchNorm2d(4)
        self.conv2, self.fc = torch.nn.Conv2d(4, 4, 3), torch.nn.Linear(4, 2)


@pytest.mark.parametrize("name, value", [
    ("conv2.weight", None), ("conv1.weight", None), ("layer9.weight", torch.zeros(1)), ("conv2.weight", torch.zeros(4, 4, 5, 5)),
    ("conv1.weight", torch.zeros(2)), ("bn.weight", "text"), ("bn.weight", torch.full((4,), torch.nan))])
def test_pretrained_weights_that_do_not_fit_are_refused(tmp_path, name, value):
    state_dict = Small(3).state_dict()
    torch.save(state_dict, tmp_path / "weights.pth")
    checkpoints.load_pretrained(Small(), str(tmp_path / "weights.pth"), FEATURES)  # they fit
    state_dict[name] = value
    if value is None:
        del state_dict[name]
    torch.save(state_dict, tmp_path / "weights.pth")
    message = refused(checkpoints.load_pretrained, Small(), str(tmp_path / "weights.pth"), FEATURES)
    assert message.startswith(f"--pretrained {tmp_path / 'weights.pth'}: ")


def test_pretrained_files_that_hold_no_state_dict_are_refused(tmp_path):
    model = Tiny(2)
    stranger = {"model": {}, "model_name": "resnet18", "classes": [], "features": {1: 2}, "mean_std": [], "seed": 1, "fold": 1,
                "flags": {"tta_crops": 1}, "precision": "fp32", "epoch": 1, "history": []}
    for content in ([1], torch.zeros(3), {}, {1: 2}, stranger):
        torch.save(content, tmp_path / "weights.pth")
        path = str(tmp_path / "weights.pth")
        assert path in refused(checkpoints.load_pretrained, model, path, FEATURES)
