"""last.pt and best.pt, and files of weights: save, load, does it fit. Nothing in a file is executed (weights_only)."""
import os
import pickle
import warnings
import zipfile
from pathlib import Path

import torch

from util.cache import mel_params, sha256
from util.errors import UserError, check_regular_file, check_types, reason, write_atomically
from util.rundir import check_same

CHECKPOINT_TYPES = {"model": dict, "model_name": str, "classes": list, "features": dict, "mean_std": list, "flags.tta_crops": int,
                    "seed": int, "fold": (int, str), "precision": str, "epoch": int, "history": list}

# torchvision's ResNet18_Weights.IMAGENET1K_V1
IMAGENET_URL = "https://download.pytorch.org/models/resnet18-f37072fd.pth"


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    def write(part: Path) -> None:
        with open(part, "wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:
                if isinstance(error.__context__, (OSError, KeyboardInterrupt)):  # torch's zip writer hides what ended its write
                    raise error.__context__ from None
                raise
    write_atomically(path, write)


def load_tensors(path: str | Path):
    """The tensors and plain values that torch.save wrote, on the CPU; UserError for another file, or one that unpacks to more."""
    check_regular_file(path)
    try:
        if zipfile.is_zipfile(path):  # else it is of a torch before 1.6, or damaged
            with zipfile.ZipFile(path) as archive:
                if sum(member.file_size for member in archive.infolist()) > os.path.getsize(path):  # torch.save does not compress
                    raise UserError("it unpacks to more than it is")
        with warnings.catch_warnings(action="ignore"):  # of pickles that torch.save did not write
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's readers raise a dozen types; an UnpicklingError advises to execute what is in the file
        why = "it is damaged, or holds more than that" if isinstance(error, pickle.UnpicklingError) else reason(error)
        raise UserError(f"{path}: cannot be read as a file of tensors and plain values ({why})") from error


def fingerprint(pretrained: str | None) -> str | None:
    """The SHA-256 of the file that --pretrained names; None where it names none, or one that is not there any more."""
    return sha256(Path(pretrained)) if pretrained and os.path.isfile(pretrained) else None


def load_checkpoint(path: Path) -> dict:
    """A checkpoint that training.py wrote, on the CPU. Raises UserError for any other file."""
    checkpoint = load_tensors(path)
    try:
        check_types(checkpoint, CHECKPOINT_TYPES)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: is not a checkpoint of this program ({reason(error)})") from error
    return checkpoint


def load_weights(model: torch.nn.Module, state_dict: dict, path: str | Path, strict: bool = True):
    """load_state_dict of weights from the file `path`; UserError if they do not fit or are not finite numbers."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of complex numbers
            keys = model.load_state_dict(state_dict, strict=strict)
    except Exception as error:  # torch raises its own and many others; what does not fit stands in the last line
        line = (str(error).strip() or repr(error)).splitlines()[-1].strip()
        raise UserError(f"{path}: does not fit {type(model).__name__} ({line[:300]})") from error
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all() or (name.endswith("running_var") and tensor.min() < 0):
            raise UserError(f"{path}: {name} holds numbers that are not finite, or variances below 0")
    return keys


def load_pretrained(model: torch.nn.Module, source: str, features: dict) -> list[str]:
    """Load the weights of all layers but the last one: of a checkpoint of this program, or ResNet-18's in torchvision's layout.

    source: a file's path, or "imagenet" (torchvision's published weights, fetched once into torch.hub's cache).
    features: the dsets.FeatureParams of this training; a checkpoint must have the same but for the crop.
    A stem of three input channels is summed to one: a gray picture, given as three equal channels, gives the same.
    Returns the classes that a checkpoint knows; of ImageNet weights none.
    Raises UserError if the weights cannot be fetched, read, or do not fit.
    """
    head = list(model.state_dict())[-1].rpartition(".")[0] + "."  # the last layer's name
    expected, checkpoint = "a checkpoint of this program, or torchvision's resnet18 state dict", None
    try:
        if source == "imagenet":
            state_dict = torch.hub.load_state_dict_from_url(IMAGENET_URL, map_location="cpu", check_hash=True, weights_only=True)
        else:
            state_dict = load_tensors(source)
        if "model_name" in state_dict:
            checkpoint = state_dict
            check_types(checkpoint, CHECKPOINT_TYPES)
            state_dict, found = checkpoint["model"], mel_params(checkpoint["features"])
        else:
            state_dict["conv1.weight"] = state_dict["conv1.weight"].sum(dim=1, keepdim=True)  # (64, 3, 7, 7) -> (64, 1, 7, 7)
        state_dict = {name: tensor for name, tensor in state_dict.items() if not name.startswith(head)}
    except Exception as error:  # urllib and torch raise a dozen types, and the file may hold anything
        remedy = f"check the connection, or fetch {IMAGENET_URL} by hand and name the file" if source == "imagenet" else \
            f"expected {expected}"
        raise UserError(f"--pretrained {source}: cannot be read ({reason(error)}); {remedy}") from error
    if checkpoint:
        check_same(f"--pretrained {source}: has other features; train with the same --f-max", found, mel_params(features))
    missing, unexpected = load_weights(model, state_dict, f"--pretrained {source}", strict=False)
    # num_batches_tracked: new in torch 0.4.1
    missing = [name for name in missing if not name.startswith(head) and not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        kind = f"it is a {checkpoint['model_name']}, " if checkpoint else ""
        raise UserError(f"--pretrained {source}: does not fit {type(model).__name__}: {kind}lacks {missing[:3]}, has "
                        f"{unexpected[:3]} besides; expected {expected}")
    return checkpoint["classes"] if checkpoint else []
