"""Every flag of training.py, with its default and its help, and the recipes. Imports no torch: --help answers at once."""
import argparse
import dataclasses
import difflib
import math
from dataclasses import dataclass, fields
from pathlib import Path

from util import rundir
from util.errors import UserError, check_types, flag_name, reason, refuse_flags

MODELS = ("cnn8", "cnn4", "resnet18")  # the names in models.MODELS
TTA_CROPS = (1, 3, 9)  # the numbers that dsets.validation_corners knows


def number(kind: type, low: float, high: float):
    """An argparse type: an int or float from low to high."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:  # false for nan
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' if kind is int else ''}number from {low} to {high}")
        return value
    return parse


def fold_name(text: str) -> int | str:
    """An argparse type: a fold's number, "all" or "none"."""
    if text in ("all", "none"):
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a fold's number nor all or none; a comment comes before the flags")
    return int(text)


def flag(default, help: str, **options):
    """A field of Config: its default, its help, and other options of argparse's add_argument."""
    kind = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return dataclasses.field(**kind, metadata={"help": help, **options})


@dataclass
class Config:
    """The flags of training.py. The defaults are the `blog` recipe: the 2023 write-up's values, with two exceptions.

    The write-up does not give its batch size; 32 was the best of four (docs/results.md). Its code's masks have up to 13 mels and
    41 frames; freq_mask and time_mask are those of SpecAugment's policy "LD" (Park et al., Interspeech 2019, table 1).
    """

    comment: str = flag("", "a word that names the run's folder; put it first, and quote several words", nargs="?")
    data: str = flag("data/ESC-50", "ESC-50, UrbanSound8K, a folder with a table metadata.csv, or one with a folder of "
                                    "recordings for each class", metavar="DIR")
    folds: int | None = flag(None, "assign the clips of a data folder without folds to K folds (default 5)",
                             type=number(int, 2, 1000), metavar="K")
    split_long: bool = flag(False, "make clips of 5 s of the whole of longer recordings, not of their first 5 s alone")
    download: bool = flag(False, "fetch ESC-50 into --data first, if it is not complete there")
    demo: bool = flag(False, "train on synthetic sounds, written once to data/demo; without --recipe, with defaults for a short "
                             "run: --epochs 14 --views 2 --batch-size 16 --lr 2e-3 --lr-schedule cosine")
    esc10: bool = flag(False, "only the ten classes of ESC-10")
    model: str = flag("cnn8", "the network", choices=MODELS)
    pretrained: str | None = flag(None, "start from a checkpoint of this program, except for its last layer; resnet18: also from "
                                        "ImageNet weights, or a file of them", metavar="{imagenet,PATH}")
    fold: list = flag([1], "validation fold, one training for each: one, several, or all; none: train on all clips, "
                                "validate nothing", nargs="+", type=fold_name, metavar="K")
    seed: list = flag([42], "seed: one or several, each with every fold", nargs="+", type=number(int, 0, 2 ** 63 - 1),
                      metavar="S")
    recipe: str = flag("blog", "the defaults of the flags below; explicit flags take precedence", choices=("blog", "strong"))
    epochs: int = flag(40, "passes over all training examples", type=number(int, 1, 10 ** 6), metavar="N")
    batch_size: int = flag(32, "examples of each step, over all processes", type=number(int, 1, 10 ** 6), metavar="N")
    lr: float = flag(3e-4, "learning rate, or its peak; for strong with cnn4, 0.0005", type=number(float, 0, 1e3), metavar="X")
    weight_decay: float = flag(1e-3, "Adam's L2 penalty, or AdamW's weight decay", type=number(float, 0, 1e3), metavar="X")
    optimizer: str = flag("adam", "the optimizer", choices=("adam", "adamw"))
    lr_schedule: str = flag("constant", "cosine: a linear warm-up over a tenth, then down to 0", choices=("constant", "cosine"))
    f_max: float = flag(8000.0, "the highest frequency of the mel-spectrograms", type=number(float, 1000, 22_050), metavar="HZ")
    crop_mels: int = flag(100, "mels of a crop, of 128; for strong with cnn4, 100", type=number(int, 16, 128), metavar="N")
    # 33 or more: of fewer, a last batch of one example can leave BatchNorm a single value to normalize
    crop_frames: int = flag(384, "frames of a crop, of 431; for strong with cnn4, 384", type=number(int, 33, 431), metavar="N")
    views: int = flag(5, "random crops of each clip an epoch, all but the first masked", type=number(int, 1, 1000), metavar="N")
    freq_mask: int = flag(27, "SpecAugment: each of two masks covers up to N mels", type=number(int, 0, 1000), metavar="N")
    time_mask: int = flag(100, "SpecAugment: each of two masks covers up to N frames", type=number(int, 0, 10 ** 5), metavar="N")
    mixup: float = flag(0.0, "mix pairs of examples, lam of Beta(ALPHA, ALPHA); 0: off", type=number(float, 0, 100),
                        metavar="ALPHA")
    class_weights: str | None = flag(None, "balanced: rare classes weigh more in the loss", choices=("balanced",))
    label_smoothing: float = flag(0.0, "part of each target spread over all classes", type=number(float, 0, 0.99), metavar="X")
    time_shift: float = flag(0.0, "shift clips by up to S seconds; the end wraps around", type=number(float, 0, 5), metavar="S")
    time_stretch: float = flag(0.0, "play clips up to 1 + X times as fast or as slow", type=number(float, 0, 3), metavar="X")
    freq_shift: int = flag(0, "shift crops up or down by up to N mels; edge mels repeat", type=number(int, 0, 127), metavar="N")
    gain: float = flag(0.0, "make examples louder or softer by up to DB", type=number(float, 0, 40), metavar="DB")
    filter_augment: float = flag(0.0, "some frequencies louder or softer by up to DB", type=number(float, 0, 40), metavar="DB")
    ema: float = flag(0.0, "evaluate and save averaged weights; 0: off", type=number(float, 0, 0.9999), metavar="DECAY")
    tta_crops: int = flag(1, "validate by the center crop, or the mean logits of 3 shifted ones, or of a grid of up to 9",
                          type=int, choices=TTA_CROPS)
    device: str = flag("auto", "auto takes a GPU if there is one", choices=("auto", "cpu", "cuda", "mps"))
    precision: str = flag("auto", "auto takes bf16 where the hardware supports it", choices=("auto", "fp32", "bf16"))
    compile: bool = flag(False, "torch.compile the network: a slower start, then faster steps with cnn8 (docs/performance.md)")
    run_dir: str | None = flag(None, "the run's folder; default: runs/<tb-prefix>/<time>_<comment>", metavar="DIR")
    tb_prefix: str = flag("CNN", "folder of runs for TensorBoard", metavar="NAME")
    resume: str | None = flag(None, "do what is missing of that run, then print its table; --epochs may be raised, --fold and "
                                    "--seed name further ones, --data says where the data is now", metavar="RUN_DIR")
    rerun: str | None = flag(None, "run that experiment again in a new folder and compare, to the last bit; --data, --device and "
                                   "--precision may differ", metavar="RUN_DIR")


GROUPS = {"data": "data", "model": "model", "fold": "experiment", "device": "machine", "run_dir": "output", "resume": "again"}

# What the literature found to help a small network. Sources: adamw: Loshchilov & Hutter, ICLR 2019; label_smoothing: Szegedy et
# al., CVPR 2016; gain: Tokozume et al., ICLR 2018; the others where they are used. mixup and filter_augment were chosen on folds
# 1 to 3 of ESC-10; epochs, f_max, the crop, time_stretch, freq_shift and tta_crops on folds 1 and 2 of ESC-50
# (docs/results.md); the rest are the first values tried.
STRONG = {"epochs": 50, "lr": 2e-3, "weight_decay": 0.05, "optimizer": "adamw", "lr_schedule": "cosine", "mixup": 0.3,
          "label_smoothing": 0.1, "time_shift": 5.0, "time_stretch": 0.25, "freq_shift": 14, "gain": 6.0, "filter_augment": 6.0,
          "ema": 0.98, "f_max": 16_000.0, "crop_mels": 128, "crop_frames": 431, "tta_crops": 3}
# tanh and 23 million weights in one layer: fold 1 of ESC-10 reaches 81% in 12 epochs, 65% with 2e-3. Larger crops add weights
STRONG_CNN4 = {"lr": 5e-4, "crop_mels": 100, "crop_frames": 384}
DEMO = {"data": "data/demo"}
DEMO_RECIPE = {"epochs": 14, "views": 2, "batch_size": 16, "lr": 2e-3, "lr_schedule": "cosine"}  # 1 to 6 minutes on 2 cores

LOCATION_FLAGS = {"comment", "data", "download", "run_dir", "tb_prefix", "resume", "rerun"}  # these change no figure
MAY_CHANGE = {"--resume": {"resume", "data", "download", "epochs", "seed", "fold"},
              "--rerun": LOCATION_FLAGS | {"device", "precision"}}


def recipe_flags(recipe: str | None, model: str) -> dict:
    """What a recipe changes of Config's defaults for a network."""
    return STRONG | (STRONG_CNN4 if model == "cnn4" else {}) if recipe == "strong" else {}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="training.py", allow_abbrev=False,
        description="Teach a convolutional network to recognize environmental sounds (ESC-50) and report how well it does.",
        epilog="Several processes: torchrun --nproc-per-node=N training.py ... (docs/distributed.md).",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=110))
    group = parser
    for each in fields(Config):
        if each.name in GROUPS:
            group = parser.add_argument_group(GROUPS[each.name])
        options, default = dict(each.metadata), getattr(Config(), each.name)
        if each.type is bool:
            options["action"] = "store_true"
        if each.name in STRONG:
            options["help"] += f" (default {default}; strong {STRONG[each.name]})"
        elif default:
            options["help"] += f" (default {default[0] if isinstance(default, list) else default})"
        group.add_argument(flag_name(each.name), default=default, **options)
    parser.error = refuse_flags
    return parser


def parse_args(argv: list[str]) -> Config:
    """The flags of a command; one that is not given is that of the run to --resume or --rerun, of the recipe, or the default.

    Raises UserError for what is no flag, is no value of it, or would change a recorded run.
    """
    parser = build_parser()
    parser.set_defaults(recipe=None)
    first, unknown = parser.parse_known_args(argv)
    if unknown and not unknown[0].startswith("-"):
        raise UserError(f'{unknown[0]}: unexpected word; quote a comment of several words: "{first.comment} {unknown[0]}"')
    if unknown:
        flags = [flag_name(each.name) for each in fields(Config) if each.name != "comment"]
        close = difflib.get_close_matches(unknown[0].split("=")[0], flags, n=1)
        raise UserError(f"{unknown[0]}: unknown flag; " + (f"did you mean {close[0]}?" if close else "--help lists the flags"))
    if first.resume and first.rerun:
        raise UserError("--rerun: starts a new run, --resume continues one; leave one of them out")
    recorded, run_dir = None, first.resume or first.rerun
    if run_dir:
        flags = rundir.read_run_config(Path(run_dir))["flags"]
        try:
            check_types(flags, {each.name: each.type for each in fields(Config)})
            recorded = Config(**flags)
        except (KeyError, TypeError) as error:
            raise UserError(f"{run_dir}/run.json: has other flags than this program ({reason(error)}); use the code of that "
                            f"time, restore it, or start a new run") from error
    recipe = recipe_flags(first.recipe, first.model)
    if first.demo:
        recipe = DEMO | (recipe if first.recipe else DEMO_RECIPE)
    parser.set_defaults(**vars(recorded) if recorded else {"recipe": "blog", **recipe})
    config = Config(**vars(parser.parse_args(argv)))

    for name, value in vars(config).items():
        if value == "" and name != "comment":
            raise UserError(f"{flag_name(name)}: is empty; give it a value, or leave it out")
        is_folder = name in ("comment", "tb_prefix")
        if is_folder and (set(value) & set('/\\:*?"<>|') or not value.isprintable() or value in (".", "..")):
            raise UserError(f"{flag_name(name)} {value!r}: names a folder, expected printable letters and no / \\ : * ? \" < > |")
    if config.demo and config.download:
        raise UserError("--download: fetches ESC-50, --demo writes synthetic sounds; leave one of them out")
    if config.pretrained == "imagenet" and config.model != "resnet18":
        raise UserError(f"--pretrained imagenet: these weights are for resnet18, not for {config.model}; add --model resnet18")
    if recorded:
        check_recorded(config, recorded)
    if config.resume:  # beside those that are there
        config.seed = recorded.seed + config.seed
        config.fold = recorded.fold + config.fold
    config.seed, config.fold = list(dict.fromkeys(config.seed)), list(dict.fromkeys(config.fold))  # each once, in the order given
    return config


def check_recorded(config: Config, recorded: Config) -> None:
    """Raise UserError for a flag beside --resume or --rerun that would change the results."""
    again = "--resume" if config.resume else "--rerun"
    for name, value in vars(config).items():
        if name not in MAY_CHANGE[again] and value != getattr(recorded, name):
            raise UserError(f"{flag_name(name)} {value}: cannot be changed with {again} (the run has {getattr(recorded, name)}); "
                            f"leave it out, or start a new run")
    if config.epochs < recorded.epochs or (config.epochs > recorded.epochs and config.lr_schedule == "cosine"):
        raise UserError(f"--epochs {config.epochs}: the run has {recorded.epochs}; it may only be raised, and not with "
                        f"--lr-schedule cosine, which ends with the last epoch; start a new run")
