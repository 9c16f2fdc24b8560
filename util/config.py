"""The command line of training.py: its flags, their defaults, and what cannot be meant by them."""
import argparse
import math
import reprlib
from pathlib import Path

import models
from util import rundir as runs
from util.cache import UserError

RECIPES = {
    # the write-up's of 2023; its batch size is not known: this one was measured (README)
    "blog": {"epochs": 40, "batch_size": 32, "lr": 3e-4, "weight_decay": 1e-3, "views": 5, "optimizer": "adam",
             "schedule": "constant", "mix": 0.0, "label_smoothing": 0.0, "time_shift": 0.0, "gain": 0.0, "equalise": 0.0,
             "average": 0.0, "crops": 1},
    # what the literature found to help; schedule, average, mix and equalise have their sources where they are used, the others:
    # adamw: Loshchilov & Hutter, ICLR 2019; label_smoothing: Szegedy et al., CVPR 2016; gain: Tokozume et al., ICLR 2018;
    # crops: Krizhevsky et al., NeurIPS 2012. mix and equalise were chosen on folds 1 to 3 (README), the rest are as first tried
    "strong": {"epochs": 100, "batch_size": 32, "lr": 2e-3, "weight_decay": 0.05, "views": 5, "optimizer": "adamw",
               "schedule": "cosine", "mix": 0.3, "label_smoothing": 0.1, "time_shift": 5.0, "gain": 6.0, "equalise": 6.0,
               "average": 0.98, "crops": 9},
}
# tanh, and 23 million weights in one layer: cnn4 learns fold 1 of ESC-10 to 81% in 12 epochs with this, to 65% with 2e-3
STRONG_CNN4 = {"lr": 5e-4}
DEFAULTS = {"comment": "", "data": "data/ESC-50", "download": False, "demo": False, "esc10": False, "model": "cnn8",
            "pretrained": None, "fold": ["1"], "seed": [42], "recipe": "blog", "device": "auto", "precision": "auto",
            "compile": False, "run_dir": None, "tb_prefix": "CNN"}
KNOWN = DEFAULTS | RECIPES["blog"]
OFF = {name: KNOWN[name] for name in (  # flags that the first version had not: in its records they were off
    "optimizer", "schedule", "mix", "label_smoothing", "time_shift", "gain", "equalise", "average", "crops")}
DEMO = {"data": "data/demo", "epochs": 14, "views": 2, "batch_size": 16, "lr": 1e-3}  # within 3 minutes on 2 cores
AUGMENTATIONS = ("time_shift", "gain", "equalise", "mix")  # of dsets.training_batches
WHERE_ONLY = {"comment", "data", "download", "run_dir", "tb_prefix"}  # these change no figure


def number(kind, low, high):
    """An argparse type: `kind` (int or float) from low to high."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:  # nan is never
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' if kind is int else ''}number from {low} to {high}")
        return value
    return parse


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="training.py", allow_abbrev=False, description="Teach a convolutional network to recognise environmental "
        "sounds (ESC-50) and report how well it does.", epilog="Several processes: torchrun --nproc-per-node=N training.py "
        "... deals each batch out to N processes (a GPU each, or shares of the CPU's cores); each normalises its part by the "
        "part's own batch statistics.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=110))

    def default(name: str) -> str:
        return f"(default {RECIPES['blog'][name]}; strong {RECIPES['strong'][name]})"

    parser.add_argument("comment", nargs="?", help="a word or two that name the run's folder")
    data = parser.add_argument_group("data")
    data.add_argument("--data", metavar="DIR", help=f"the ESC-50 folder (default {DEFAULTS['data']})")
    data.add_argument("--download", action="store_true", help="fetch ESC-50 into --data first, if it is not there whole")
    data.add_argument("--demo", action="store_true",
                      help=f"train on synthetic sounds, written once to {DEMO['data']}; without --recipe, the defaults are --epochs "
                           f"{DEMO['epochs']} --views {DEMO['views']} --batch-size {DEMO['batch_size']} "
                           f"--lr {DEMO['lr']:g}")
    data.add_argument("--esc10", action="store_true", help="only the ten classes of ESC-10")
    model = parser.add_argument_group("model")
    model.add_argument("--model", choices=list(models.MODELS), help=f"the network (default {DEFAULTS['model']})")
    model.add_argument("--pretrained", metavar="{imagenet,PATH}",
                       help="start resnet18 from torchvision's ImageNet weights or a file of them (default: from scratch)")
    experiment = parser.add_argument_group("experiment")
    experiment.add_argument("--fold", nargs="+", metavar="K",
                            help="validation fold, one training each: one, several, or all (default 1)")
    experiment.add_argument("--seed", nargs="+", type=number(int, 0, 2 ** 63 - 1), metavar="S",
                            help="seed: one or several, each with every fold (default 42)")
    experiment.add_argument("--recipe", choices=list(RECIPES),
                            help="the defaults of the flags below; a flag beside it wins (default blog)")
    experiment.add_argument("--epochs", type=number(int, 1, 10 ** 6), metavar="N", help=default("epochs"))
    experiment.add_argument("--batch-size", type=number(int, 1, 10 ** 6), metavar="N",
                            help=f"examples a step, of all processes together {default('batch_size')}")
    experiment.add_argument("--lr", type=number(float, 0, 1e3), metavar="X",
                            help=f"learning rate, its peak under a schedule {default('lr')[:-1]}, with cnn4 "
                                 f"{STRONG_CNN4['lr']})")
    experiment.add_argument("--weight-decay", type=number(float, 0, 1e3), metavar="X",
                            help=f"Adam's L2 penalty, AdamW's decoupled decay {default('weight_decay')}")
    experiment.add_argument("--optimizer", choices=["adam", "adamw"], help=default("optimizer"))
    experiment.add_argument("--schedule", choices=["constant", "cosine"],
                            help=f"of the learning rate; cosine: up over a tenth of the steps, then down to 0 "
                                 f"{default('schedule')}")
    experiment.add_argument("--average", type=number(float, 0, 0.9999), metavar="D",
                            help=f"judge and keep a moving average of the weights, of which D stays at each step; 0: the "
                                 f"weights themselves {default('average')}")
    experiment.add_argument("--views", type=number(int, 1, 1000), metavar="N",
                            help=f"examples of each training clip an epoch: one random crop, the others also masked "
                                 f"{default('views')}")
    experiment.add_argument("--mix", type=number(float, 0, 100), metavar="A",
                            help=f"mix each example with another, by shares from Beta(A, A); 0: not {default('mix')}")
    experiment.add_argument("--label-smoothing", type=number(float, 0, 0.99), metavar="X",
                            help=f"share of each target that is spread over all classes {default('label_smoothing')}")
    experiment.add_argument("--time-shift", type=number(float, 0, 5), metavar="S",
                            help=f"shift training clips in a circle by up to S seconds {default('time_shift')}")
    experiment.add_argument("--gain", type=number(float, 0, 40), metavar="DB",
                            help=f"make training examples louder or softer by up to DB {default('gain')}")
    experiment.add_argument("--equalise", type=number(float, 0, 40), metavar="DB",
                            help=f"make some frequencies of training examples louder or softer by up to DB "
                                 f"{default('equalise')}")
    experiment.add_argument("--crops", type=int, choices=[1, 9],
                            help=f"crops of a validation clip whose logits are averaged: the centre, or a grid of 9 "
                                 f"{default('crops')}")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"],
                         help="auto takes a GPU if there is one (default auto)")
    machine.add_argument("--precision", choices=["auto", "fp32", "bf16"],
                         help="auto takes bf16 where the hardware multiplies it (default auto)")
    machine.add_argument("--compile", action="store_true", help="torch.compile the network: slower start, then faster steps with "
                                                               "cnn8 (README, Performance)")
    output = parser.add_argument_group("output")
    output.add_argument("--run-dir", metavar="DIR", help="the run's folder (default runs/<tb-prefix>/<time>_<comment>)")
    output.add_argument("--tb-prefix", metavar="NAME", help=f"folder of runs for TensorBoard (default {DEFAULTS['tb_prefix']})")
    again = parser.add_argument_group("again")
    again.add_argument("--resume", metavar="RUN_DIR", help="do what is missing of that run, then print its table; "
                                                          "--epochs may be raised, --fold and --seed name further ones, --data say "
                                                          "where the data is now")
    again.add_argument("--rerun", metavar="RUN_DIR", help="run that experiment again in a new folder and compare, to "
                                                         "the last bit; --data, --device, --precision may differ")

    def refuse(message: str):
        raise UserError(f"{message}; --help lists the flags")
    parser.error = refuse  # one line, without the usage
    return parser


def parse_flags(argv: list[str]) -> tuple[dict, dict]:
    """All flags with their values, and those that were given. Raises UserError for what cannot be meant.

    With --resume or --rerun, the flags are those of the recorded run.
    """
    given = {name: value for name, value in vars(build_parser().parse_args(argv)).items()
             if value is not None and value is not False}
    for name, value in given.items():
        if value == "" and name != "comment":
            raise UserError(f"{flag_of(name)}: is empty; give it a value, or leave it out")
    if "resume" in given and "rerun" in given:
        raise UserError("--rerun: runs anew, --resume goes on; leave one of them out")
    for again in ("resume", "rerun"):
        if again in given:
            return recorded_flags(again, given), given
    recipe = RECIPES[given.get("recipe", DEFAULTS["recipe"])]
    if recipe is RECIPES["strong"] and given.get("model") == "cnn4":
        recipe = recipe | STRONG_CNN4
    demo = DEMO if "demo" in given else {}
    flags = {**DEFAULTS, **recipe, **demo, **(recipe if "recipe" in given else {}), **given}
    if flags["demo"] and flags["download"]:
        raise UserError("--download: fetches ESC-50, --demo writes sounds of its own; leave one of them out")
    if flags["pretrained"] and flags["model"] != "resnet18":
        raise UserError(f"--pretrained: there are weights for resnet18 alone, not for {flags['model']}; "
                        f"add --model resnet18")
    refuse_folder_names(flags)
    flags["seed"] = list(dict.fromkeys(flags["seed"]))  # each once, in the order given
    return flags, given


def refuse_folder_names(flags: dict) -> None:
    """Raise UserError for a comment or prefix that cannot be part of a folder's name."""
    for name in ("comment", "tb_prefix"):
        if set(flags[name]) & set('/\\:*?"<>|') or not flags[name].isprintable() or flags[name] in (".", ".."):
            raise UserError(f"{flag_of(name)} {flags[name]!r}: names a folder, expected printable letters and no "
                            f"/ \\ : * ? \" < > |")


def flag_of(name: str) -> str:
    """The flag as the user writes it."""
    return name if name == "comment" else "--" + name.replace("_", "-")


def recorded_flags(again: str, given: dict) -> dict:
    """The flags of the run that --resume or --rerun names.

    Raises UserError for a given one that would change the results, and for a record with a flag that cannot be.
    """
    run_dir = Path(given[again])
    record = runs.read_run(run_dir)
    flags = OFF | record["flags"]
    for name in sorted(flags.keys() | KNOWN.keys()):
        if name not in KNOWN:
            raise UserError(f"{run_dir / 'run.json'}: flags.{reprlib.repr(name)} is no flag of this program; expected "
                            f"{', '.join(KNOWN)}")
        value = flags.get(name)
        if (value is None and KNOWN[name] is not None) or (value == "" and name != "comment") \
                or isinstance(value, bool) != isinstance(KNOWN[name], bool):
            raise UserError(f"{run_dir / 'run.json'}: flags.{name} is {reprlib.repr(value)}, expected a value like "
                            f"{KNOWN[name]!r}; put it right there")
    argv = []  # as if they had been given: what is wrong with them is found where it always is
    for name, value in flags.items():
        if name != "comment" and value is not None and value is not False:  # 0 is a value
            argv += [flag_of(name), *([] if value is True else value if isinstance(value, list) else [value])]
    try:
        parsed = vars(build_parser().parse_args(list(map(str, argv))))
        flags |= {name: parsed[name] for name in flags if name != "comment" and parsed[name] is not None}
        flags["comment"] = str(flags["comment"])
        refuse_folder_names(flags)
    except UserError as error:
        raise UserError(f"{run_dir / 'run.json'}: {str(error)[:300]}") from error  # whatever stands there instead of a flag
    flags |= {"data": record["data"]["root"], "download": False}  # what was fetched is there
    if again == "rerun":
        flags |= {"run_dir": None, "device": record["device"], "precision": record["precision"]}
    may_differ = {"resume": {"data", "download", "epochs", "seed", "fold"}, "rerun": WHERE_ONLY | {"device", "precision"}}[again]
    for name, value in given.items():
        if again == "resume" and name == "epochs" and value < flags["epochs"]:
            raise UserError(f"--epochs {value}: the run has {flags['epochs']}; with --resume it may only be raised")
        if again == "resume" and name == "epochs" and value > flags["epochs"] and flags["schedule"] == "cosine":
            raise UserError(f"--epochs {value}: the cosine schedule of the run ends after {flags['epochs']} epochs; start a new "
                            f"run")
        if again == "resume" and name in ("seed", "fold") and value != ["all"]:
            given = {**given, name: list(dict.fromkeys([*flags[name], *value]))}  # beside those that are there
        if name != again and name not in may_differ and value != flags.get(name):
            raise UserError(f"{flag_of(name)}: cannot be changed with --{again} (the run has {flags.get(name)}); leave it "
                            f"out, or start a new run")
    return flags | {name: value for name, value in given.items() if name in may_differ}
