"""The flags, the recipes and the help; that --help and a wrong flag answer at once."""
import dataclasses
import json
import re
import subprocess
import sys

import pytest

import dsets
import training
from conftest import PROJECT, run, train_in
from util import config
from util.config import Config, parse_args
from util.errors import UserError, flag_name


# --- what is refused --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, named", [
    (["--epochs", "0"], "--epochs: '0'"),
    (["--epochs", "many"], "--epochs: 'many'"),
    (["--batch-size", "-3"], "--batch-size: '-3'"),
    (["--batch-size", "1" + "0" * 26], "--batch-size: '1000"),
    (["--lr", "nan"], "--lr: 'nan'"),
    (["--lr", "inf"], "--lr: 'inf'"),
    (["--seed", "-1"], "--seed: '-1'"),
    (["--views", "1.5"], "--views: '1.5'"),
    (["--f-max", "22051"], "--f-max: '22051'"),
    (["--crop-mels", "129"], "--crop-mels: '129'"),
    (["--crop-frames", "32"], "--crop-frames: '32'"),
    (["--freq-mask", "-1"], "--freq-mask: '-1'"),
    (["--time-mask", "x"], "--time-mask: 'x'"),
    (["--fold", "x"], "--fold: 'x'"),
    (["--fold"], "--fold"),
    (["--lr"], "--lr"),
    (["--tta-crops", "5"], "--tta-crops"),
    (["--model", "vgg"], "--model"),
    (["--recipe", "soup"], "--recipe"),
    (["--device", "tpu"], "--device"),
    (["--precision", "fp8"], "--precision"),
    (["--compile=1"], "--compile"),
    (["--pretrained", "imagenet"], "--model resnet18"),
    (["--demo", "--download"], "--download"),
    (["a/b"], "comment 'a/b'"),
    (["caf\udce9"], "comment 'caf"),
    (["two\nlines"], "comment 'two"),
    (["--tb-prefix", ".."], "--tb-prefix '..'"),
    (["--run-dir", ""], "--run-dir"),
    (["--data", ""], "--data"),
    (["--pretrained", "", "--model", "resnet18"], "--pretrained"),
    (["--data", "nowhere"], "--data nowhere"),
    (["--resume", "nowhere"], "nowhere/run.json"),
    (["--rerun", "nowhere"], "nowhere/run.json"),
    (["--rerun", "a", "--resume", "b"], "--rerun"),
])
def test_bad_flags_are_refused_in_one_line(flags, named, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(*flags, status=2)
    error = capsys.readouterr().err
    assert named in error and error.startswith("training.py: ") and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("written, meant", [
    ("--epoch", "--epochs"), ("--batchsize", "--batch-size"), ("--weight_decay", "--weight-decay"), ("--leraning-rate=0.1", None),
    ("--mixup-alpha", "--mixup"), ("--tta-crop=9", "--tta-crops"), ("--freq-masks", "--freq-mask"), ("--resume-from", "--resume"),
    ("--xyz", None)])
def test_a_misspelled_flag_is_answered_with_the_right_one(written, meant):
    with pytest.raises(UserError) as refusal:
        parse_args([written, "3"])
    message = str(refusal.value)
    assert message.startswith(written) and "\n" not in message
    assert f"{meant}?" in message if meant else "--help" in message


@pytest.mark.parametrize("flags", [["my", "run"], ["my", "run", "--lr", "0.1"], ["--lr", "0.1", "my", "run"]])
def test_a_comment_of_two_words_is_answered_with_quotes(flags):
    with pytest.raises(UserError, match='"my run"') as refusal:
        parse_args(flags)
    assert "quote" in str(refusal.value) and "\n" not in str(refusal.value)
    assert parse_args(["my run"]).comment == "my run"


@pytest.mark.parametrize("command", [
    ["training.py", "--help"], ["training.py", "--epoch", "3"], ["training.py", "--epochs", "0"],
    ["training.py", "--resume", "nowhere"], ["predict.py", "--help"], ["predict.py", "--tpo", "3"],
    ["predict.py", "run", "--top", "0"]])
def test_help_and_a_wrong_flag_answer_before_torch_is_imported(command):
    done = subprocess.run([sys.executable, "-X", "importtime", *command], cwd=PROJECT, capture_output=True, text=True)
    lines = done.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}
    assert "util.errors" in imported and not {name.partition(".")[0] for name in imported} & {"torch", "pandas", "sklearn"}
    told = [line for line in lines if not line.startswith("import time:")]
    if "--help" in command:
        assert done.returncode == 0 and told == [] and "--device" in done.stdout
    else:
        assert done.returncode == 2 and len(told) == 1 and told[0].startswith(f"{command[0]}: ") and done.stdout == ""


# --- defaults and recipes ---------------------------------------------------------------------------------------------

def test_help_is_grouped_and_says_every_default():
    text = config.build_parser().format_help()
    for group in ("data:", "model:", "experiment:", "machine:", "output:", "again:"):
        assert f"\n{group}\n" in text
    text = " ".join(text.split())
    for name, default in vars(Config()).items():
        assert flag_name(name) in text
        if default and name not in config.STRONG:
            assert f"default {default[0] if isinstance(default, list) else default})" in text, name
    for name, strong in config.STRONG.items():
        assert f"default {getattr(Config(), name)}; strong {strong})" in text, name
    assert "default: runs/<tb-prefix>/<time>_<comment>" in text
    assert all(f"for strong with cnn4, {value} (default" in text for value in config.STRONG_CNN4.values())
    demo = next(field.metadata["help"] for field in dataclasses.fields(Config) if field.name == "demo")
    assert vars(parse_args(demo[demo.index("--epochs"):].split())) == vars(Config()) | config.DEMO_RECIPE


def test_the_defaults_are_the_write_ups_and_flags_win():
    flags = parse_args([])
    assert flags == Config()
    assert (flags.recipe, flags.optimizer, flags.lr, flags.weight_decay) == ("blog", "adam", 3e-4, 1e-3)
    assert (flags.epochs, flags.batch_size, flags.views) == (40, 32, 5)
    assert (flags.freq_mask, flags.time_mask, flags.mixup, flags.ema, flags.tta_crops) == (27, 100, 0, 0, 1)
    assert (flags.data, flags.fold, flags.seed, flags.model, flags.device) == ("data/ESC-50", [1], [42], "cnn8", "auto")
    flags = parse_args(["--lr", "0.1", "named"])
    assert flags == Config(lr=0.1, comment="named")


def test_strong_fills_in_what_is_not_given():
    assert config.STRONG.keys() <= vars(Config()).keys() and config.STRONG.keys() >= config.STRONG_CNN4.keys()
    flags = parse_args(["--recipe", "strong", "--mixup", "0"])
    assert vars(flags) == vars(Config()) | config.STRONG | {"recipe": "strong", "mixup": 0}
    assert (flags.optimizer, flags.lr, flags.f_max, flags.crop_mels, flags.crop_frames) == ("adamw", 2e-3, 16_000, 128, 431)
    assert parse_args(["--recipe", "strong", "--lr", str(Config().lr)]).lr == Config().lr, "also a value that is blog's default"
    flags = parse_args(["--recipe", "strong", "--model", "cnn4"])
    assert (flags.lr, flags.crop_mels, flags.crop_frames, flags.f_max) == (5e-4, 100, 384, 16_000)
    assert parse_args(["--recipe", "strong", "--model", "cnn4", "--lr", "0.1"]).lr == 0.1
    assert parse_args(["--model", "cnn4"]).lr == 3e-4


def test_demo_is_a_run_of_a_minute_unless_a_recipe_is_given():
    flags = parse_args(["--demo", "--epochs", "7"])
    assert vars(flags) == vars(Config()) | config.DEMO | config.DEMO_RECIPE | {"demo": True, "epochs": 7}
    assert flags.data == "data/demo" and parse_args(["--demo", "--data", "elsewhere"]).data == "elsewhere"
    assert vars(parse_args(["--demo", "--recipe", "strong"])) == vars(Config()) | config.STRONG | {
        "demo": True, "data": "data/demo", "recipe": "strong"}
    assert parse_args(["--demo", "--recipe", "blog"]) == Config(demo=True, data="data/demo")


def test_the_readmes_table_of_flags_says_the_recipes():
    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    lines = text[text.index("## Flags"):text.index("## Files")].splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("| `--recipe strong`"))
    for rows, recipe in ((lines[at - 3:at], {}), (lines[at:at + 8], config.STRONG)):
        flags = [flag for row in rows for flag in re.findall(r"`(--[a-z-]+ .+?)`", row) if flag != "--recipe strong"]
        assert vars(parse_args(" ".join(flags).split())) == vars(Config()) | recipe


def test_folds_and_seeds_are_each_taken_once_in_the_order_given():
    flags = parse_args(["--fold", "3", "1", "3", "--seed", "2", "2", "1"])
    assert flags.fold == [3, 1] and flags.seed == [2, 1]
    assert parse_args(["--fold", "all"]).fold == ["all"] and parse_args(["--seed", str(2 ** 63 - 1)]).seed == [2 ** 63 - 1]


# --- the way of a flag ------------------------------------------------------------------------------------------------

@pytest.mark.usefixtures("tiny", "small_pictures")
def test_masks_and_other_augmentation_reach_the_batches(root, tmp_path, monkeypatch):
    masks, options, draw_masks, training_batches = set(), [], dsets.draw_masks, dsets.training_batches

    def drawing(count, generator, params, *longest):
        masks.add(longest)
        return draw_masks(count, generator, params, *longest)

    def making(*arguments, **keywords):
        options.append(keywords)
        return training_batches(*arguments, **keywords)
    monkeypatch.setattr(dsets, "draw_masks", drawing)
    monkeypatch.setattr(dsets, "training_batches", making)
    given = {"freq_mask": 3, "time_mask": 5, "views": 2, "mixup": 0.4, "time_shift": 1.5, "time_stretch": 0.2, "freq_shift": 4,
             "gain": 2.0, "filter_augment": 3.0}
    assert given.keys() == set(training.AUGMENTATIONS)
    flags = [part for name, value in given.items() for part in (flag_name(name), value)]
    train_in(tmp_path / "run", root, *flags)
    assert masks == {(3, 5)}
    assert all(each.items() >= given.items() for each in options) and {each["epoch"] for each in options} == {1, 2}
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())["flags"]
    assert recorded.items() >= given.items()


def record(monkeypatch, **changes) -> Config:
    """Every run folder has these flags."""
    recorded = Config(**changes)
    monkeypatch.setattr(config.rundir, "read_run_config", lambda run_dir: {"flags": dict(vars(recorded))})
    return recorded


def test_flags_of_a_run_are_those_of_its_record(monkeypatch):
    recorded = record(monkeypatch, lr=0.5, fold=[1, 2, "none"], seed=[1], data="here", epochs=3, device="cpu", precision="fp32")
    assert parse_args(["--resume", "run"]) == dataclasses.replace(recorded, resume="run")
    further = parse_args(["--resume", "run", "--fold", "3", "1", "--seed", "2", "--epochs", "4", "--data", "there"])
    assert further == dataclasses.replace(recorded, resume="run", fold=[1, 2, "none", 3], seed=[1, 2], epochs=4, data="there")
    assert parse_args(["--resume", "run", "--fold", "all"]).fold == [1, 2, "none", "all"], "what had begun is never left out"
    again = parse_args(["--rerun", "run", "--data", "there", "--precision", "bf16"])
    assert again == dataclasses.replace(recorded, rerun="run", data="there", precision="bf16")


@pytest.mark.parametrize("flags, named", [
    (["--resume", "run", "--lr", "0.1"], "--lr 0.1"), (["--resume", "run", "--model", "cnn4"], "--model cnn4"),
    (["--resume", "run", "--run-dir", "x"], "--run-dir x"), (["--resume", "run", "--recipe", "strong"], "--recipe strong"),
    (["--resume", "run", "other"], "comment other"), (["--resume", "run", "--epochs", "39"], "--epochs 39"),
    (["--resume", "run", "--lr-schedule", "cosine"], "--lr-schedule cosine"), (["--rerun", "run", "--lr", "0.1"], "--lr 0.1"),
    (["--rerun", "run", "--epochs", "41"], "--epochs 41"), (["--rerun", "run", "--fold", "2"], "--fold")])
def test_a_flag_that_would_change_a_run_is_refused(monkeypatch, flags, named):
    record(monkeypatch)
    with pytest.raises(UserError) as refusal:
        parse_args(flags)
    assert str(refusal.value).startswith(named) and "\n" not in str(refusal.value)


def test_a_cosine_schedule_that_has_ended_has_no_further_epochs(monkeypatch):
    record(monkeypatch, lr_schedule="cosine")
    with pytest.raises(UserError, match="^--epochs 41: "):
        parse_args(["--resume", "run", "--epochs", "41"])
    assert parse_args(["--resume", "run", "--epochs", "40"]).epochs == 40


@pytest.mark.parametrize("name, value", [("lr", "x"), ("lr", None), ("fold", 1), ("epochs", None), ("run_dir", 5),
                                         ("nonsense", 1)])
def test_damaged_flags_of_a_record_are_refused_in_one_line(monkeypatch, name, value):
    flags = vars(Config()) | {name: value}
    for damaged in (flags, {key: flags[key] for key in flags.keys() - {"model"}}):
        monkeypatch.setattr(config.rundir, "read_run_config", lambda run_dir: {"flags": damaged})
        with pytest.raises(UserError, match="run.json") as refusal:
            parse_args(["--resume", "run"])
        assert "\n" not in str(refusal.value)
