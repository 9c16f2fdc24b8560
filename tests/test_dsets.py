import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dsets
from conftest import write_root

CPU = torch.device("cpu")


# --- the table --------------------------------------------------------------------------------------------------------

def change_table(root: Path, change) -> Path:
    path = root / "meta" / "esc50.csv"
    table = pd.read_csv(path, dtype=str)
    changed = change(table)
    (table if changed is None else changed).to_csv(path, index=False)
    return path


def set_value(column, value, row=1):
    def change(table):
        table.loc[row, column] = value
    return change


@pytest.mark.parametrize("change, words", [
    (lambda table: table.drop(columns=["fold", "esc10"]), "has no column fold, esc10; expected filename, fold"),
    (set_value("fold", "2.5"), "line 3: fold is '2.5', expected a whole number from 1 to 5"),
    (set_value("fold", "0"), "line 3: fold is '0', expected a whole number from 1 to 5"),
    (set_value("fold", "6"), "line 3: fold is '6', expected"),
    (set_value("fold", ""), "line 3: fold is '', expected"),
    (set_value("target", "50"), "line 3: target is '50', expected a whole number from 0 to 49"),
    (set_value("target", "-1"), "line 3: target is '-1', expected"),
    (set_value("target", "dog"), "line 3: target is 'dog', expected"),
    (set_value("esc10", "maybe"), "line 3: esc10 is 'maybe', expected True or False"),
    (set_value("filename", "1-0-A-0.wav"), "line 3: filename is '1-0-A-0.wav', expected each file once"),
    (set_value("filename", "../../etc/passwd"), "line 3: filename is .*, expected the name of a file in audio/"),
    (set_value("filename", "C:\\a.wav"), "line 3: filename is .*, expected the name of a file in audio/"),
    (set_value("filename", ".."), "line 3: filename is '..', expected the name of a file"),
    (set_value("filename", ""), "line 3: filename is '', expected the name of a file"),
    (set_value("category", "other", row=3), "line 5: category is 'other', expected the same for every clip of one target"),
    (set_value("target", "7", row=3), "line 5: target is '7', expected the same for every clip of one category"),
    (lambda table: table.iloc[:0], "lists no clips"),
])
def test_bad_tables_are_refused(own_root, change, words):
    path = change_table(own_root, change)
    with pytest.raises(dsets.UserError, match=re.escape(str(path)) + ".*" + words):
        dsets.read_table(own_root)


HEADER = b"filename,fold,target,category,esc10"


@pytest.mark.parametrize("content, words", [(b"\xff\xfe\x00", "cannot be read as a comma-separated table"),
                                            (b"", "begins with an empty line, or is empty"),
                                            (b'filename,fold\n"a,1\n', "has no column target, category, esc10"),
                                            (HEADER + b",fold\n", "names a column twice"),
                                            (HEADER + b'\n"a,1,0,dog,True\n', "cannot be read as a .* table .*end of data"),
                                            (HEADER + b"\n\na,1,0,dog\n", "line 3: has 4 cells, its header 5"),
                                            (HEADER + b"\n" * 16_000_001, "has 16 MB, expected 16 at most")])
def test_files_that_are_no_table_are_refused(own_root, content, words):
    (own_root / "meta" / "esc50.csv").write_bytes(content)
    with pytest.raises(dsets.UserError, match=words):
        dsets.read_table(own_root)


def test_a_folder_without_a_table_is_refused(tmp_path):
    with pytest.raises(dsets.UserError, match=f"--data {tmp_path}: has no meta/esc50.csv; .*--download.*--demo"):
        dsets.read_table(tmp_path)


def test_byte_order_mark_crlf_and_quotes_are_read(own_root):
    expected = dsets.read_table(own_root)
    path = own_root / "meta" / "esc50.csv"
    lines = path.read_text().splitlines()
    quoted = [",".join(f'"{cell}"' for cell in line.split(",")) for line in lines]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(quoted).encode())
    pd.testing.assert_frame_equal(dsets.read_table(own_root), expected)


def test_rows_with_more_cells_than_the_header_are_refused(own_root):
    path = own_root / "meta" / "esc50.csv"
    head, *rows = path.read_text().splitlines()
    path.write_text("\n".join([head, *(row + "," for row in rows)]))
    with pytest.raises(dsets.UserError, match="line 2: has 8 cells, its header 7"):
        dsets.read_table(own_root)


def test_an_empty_side_of_the_split_is_refused(tmp_path):
    root = write_root(tmp_path / "root", num_classes=2, folds=1)
    with pytest.raises(dsets.UserError, match="--fold 1: every clip .* is in it, none is left to train on"):
        dsets.ESC50(root).split(1)
    with pytest.raises(dsets.UserError, match="--fold 3: no clip .* is in it; expected one of 1"):
        dsets.ESC50(root).split(3)


# --- the data set -----------------------------------------------------------------------------------------------------

def test_the_data_set_in_a_notebook(dataset, shared_root):
    assert len(dataset) == 24
    assert repr(dataset) == (f"ESC50({str(shared_root)!r}: 24 clips, 4 classes, folds 1, 2, 3; "
                             f"features (1, 128, 431) in dB)")
    assert dataset.classes == ["sound_0", "sound_1", "sound_2", "sound_3"]
    feature, target = dataset[5]
    assert feature.shape == (1, 128, 431) and feature.dtype == torch.float32
    assert dataset.classes[target] == dataset.table["category"][5]
    assert torch.equal(dataset[-1][0], dataset[23][0])
    assert dataset.waveform(-1).shape == (1, 220_500)
    assert len(list(dataset)) == 24
    for index in (24, -25):
        with pytest.raises(IndexError):
            dataset[index]
    batch, targets = next(iter(torch.utils.data.DataLoader(dataset, batch_size=5)))
    assert batch.shape == (5, 1, 128, 431) and targets.tolist() == dataset.targets[:5].tolist()


def test_nothing_done_to_features_reaches_the_file(own_root):
    dsets.ESC50(own_root).features.zero_()
    assert dsets.ESC50(own_root).features.any()


def test_esc10_keeps_its_clips_and_counts_classes_from_0(own_root):
    change_table(own_root, lambda table: table.assign(target=table["target"].map({"0": "38", "1": "11"}),
                                                      esc10=table["target"] == "0"))
    dataset = dsets.ESC50(own_root, esc10=True)
    assert dataset.classes == ["sound_0"] and dataset.targets.tolist() == [0, 0]
    everything = dsets.ESC50(own_root)
    assert everything.classes == ["sound_1", "sound_0"]  # by target: 11, 38
    kept = everything.targets == 1
    assert torch.equal(torch.stack([feature for feature, _ in dataset]), everything.features[kept])
    change_table(own_root, lambda table: table.assign(esc10="False"))
    with pytest.raises(dsets.UserError, match="--esc10: no clip"):
        dsets.ESC50(own_root, esc10=True)


def test_the_split_holds_out_one_fold(dataset):
    training, validation = dataset.split(2)
    assert set(dataset.table["fold"][validation.numpy()]) == {2}
    assert set(dataset.table["fold"][training.numpy()]) == {1, 3}
    assert sorted(torch.cat([training, validation]).tolist()) == list(range(24))


def test_statistics_are_those_of_the_given_clips(dataset):
    training, _ = dataset.split(1)
    values = dataset.features[training].double()
    mean, std = dataset.statistics(training)
    assert mean == pytest.approx(values.mean().item(), rel=1e-9)
    assert std == pytest.approx(values.std(correction=0).item(), rel=1e-9)
    normalised = dsets.normalise(dataset.features[training], mean, std)
    assert normalised.mean().abs() < 1e-3 and abs(normalised.std() - 1) < 1e-3


# --- augmentation -----------------------------------------------------------------------------------------------------

def test_generators_differ_in_every_part_and_repeat():
    def draw(*parts):
        return torch.rand(4, generator=dsets.generator_for(*parts)).tolist()
    parts = [(1, 1, 1, "a"), (2, 1, 1, "a"), (1, 2, 1, "a"), (1, 1, 2, "a"), (1, 1, 1, "b"), (11, 1, 1, "a")]
    assert len({tuple(draw(*part)) for part in parts}) == len(parts)
    assert draw(*parts[0]) == draw(*parts[0])


def test_crops_reach_every_corner_and_stay_inside():
    corners = dsets.draw_crops(20_000, dsets.generator_for(0, 0, 0, "test"))
    assert [sorted(set(column.tolist())) for column in corners.T] == [list(range(29)), list(range(48))]


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 23), st.integers(0, 28), st.integers(0, 47)), min_size=1, max_size=5))
def test_a_crop_is_a_slice(dataset, cuts):
    rows, mels, frames = (torch.tensor(column) for column in zip(*cuts))
    crops = dsets.crop(dataset.features, rows, torch.stack([mels, frames], dim=1))
    expected = [dataset.features[row, :, mel:mel + 100, frame:frame + 384] for row, mel, frame in cuts]
    assert torch.equal(crops, torch.stack(expected))


def test_the_centre_crop_is_in_the_middle():
    assert dsets.validation_corners().tolist() == [[14, 23]]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2 ** 32), st.integers(1, 6))
def test_masks_set_their_bands_to_the_mean_and_nothing_else(seed, count):
    masks = dsets.draw_masks(count, torch.Generator().manual_seed(seed))
    masked = dsets.apply_masks(torch.ones(count, 1, 100, 384), masks)
    for bands, example in zip(masks.tolist(), masked):
        expected = torch.ones(1, 100, 384)
        for start, end in bands[:2]:
            assert 0 <= start <= end <= 100 and end - start <= 27
            expected[:, start:end] = 0
        for start, end in bands[2:]:
            assert 0 <= start <= end <= 384 and end - start <= 100
            expected[:, :, start:end] = 0
        assert torch.equal(example, expected)


def test_every_example_has_its_own_masks_of_every_width():
    masks = dsets.draw_masks(20_000, dsets.generator_for(0, 0, 0, "test"))
    widths = masks[..., 1] - masks[..., 0]
    assert set(widths[:, :2].flatten().tolist()) == set(range(28))
    assert set(widths[:, 2:].flatten().tolist()) == set(range(101))
    assert len({tuple(row) for row in masks.flatten(1).tolist()}) > 19_900


def epoch_of(dataset, **changes):
    training, _ = dataset.split(1)
    arguments = {"views": 5, "batch_size": 16, "seed": 1, "fold": 1, "epoch": 1, "device": CPU, **changes}
    batches = list(dsets.training_batches(dataset, training, dataset.statistics(training), **arguments))
    return torch.cat([examples for examples, *_ in batches]), torch.cat([targets for _, targets, *_ in batches])


def test_an_epoch_has_five_views_of_every_training_clip_one_of_them_unmasked(dataset, monkeypatch):
    training, _ = dataset.split(1)
    marks = torch.arange(1.0, 25.0).reshape(24, 1, 1, 1).expand(24, 1, 128, 431)  # clip i is all i + 1
    monkeypatch.setattr(dataset, "features", marks)
    monkeypatch.setattr(dsets, "normalise", lambda examples, mean, std: examples)
    examples, targets = epoch_of(dataset)
    assert examples.shape == (80, 1, 100, 384)
    clips = examples.amax(dim=(1, 2, 3)).long() - 1
    assert sorted(clips.tolist()) == sorted(training.tolist() * 5)
    assert torch.equal(targets, dataset.targets[clips])
    unmasked = (examples != 0).all(dim=3).all(dim=2).flatten()
    assert sorted(clips[unmasked].tolist()) == training.tolist()
    assert clips.tolist() != sorted(clips.tolist())  # shuffled


def test_an_epoch_does_not_depend_on_the_batch_size_or_the_global_generators(dataset):
    torch.manual_seed(1)
    first = epoch_of(dataset, batch_size=7)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = epoch_of(dataset, batch_size=80)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert torch.equal(torch.get_rng_state(), state)


class BetweenDevices(TorchDispatchMode):
    """Notes every operation that has tensors of more than one kind of device."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        if len({tensor.device.type for tensor in tensors}) > 1:
            self.seen.append(str(function))
        return result


@pytest.mark.parametrize("mix", [0.0, 0.3])
def test_with_features_on_a_gpu_no_batch_after_the_first_waits_for_the_cpu(dataset, monkeypatch, mix):
    """On tensors that have no data, only shapes and a device: no GPU is needed."""
    training, _ = dataset.split(1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        monkeypatch.setattr(dataset, "features", torch.empty(dataset.features.shape, device="cuda"))
        batches = dsets.training_batches(
            dataset, training, (0.0, 1.0), views=5, batch_size=16, seed=1, fold=1, epoch=1, device=torch.device("cuda"),
            time_shift=5.0, gain=6.0, equalise=6.0, mix=mix)
        first = next(batches)  # before it, the epoch's draws are copied to the device
        with BetweenDevices() as between:
            rest = list(batches)
    assert between.seen == [] and len(rest) == 4
    for batch in [first, *rest]:
        assert batch.examples.shape == (16, 1, 100, 384) and batch.examples.device.type == batch.targets.device.type == "cuda"


def test_statistics_take_features_that_are_on_a_gpu(dataset, monkeypatch):
    with FakeTensorMode(allow_non_fake_inputs=True):
        feature = torch.empty(dataset.features.shape[1:], device="cuda")
    monkeypatch.setattr(dataset, "features", {row: feature for row in range(len(dataset))})
    monkeypatch.setattr(dataset, "rows", list(range(len(dataset))))
    dataset.statistics(dataset.split(1)[0])  # operations on two devices would be refused


def test_validation_takes_features_that_are_on_a_gpu(dataset, monkeypatch):
    _, validation = dataset.split(1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        monkeypatch.setattr(dataset, "features", torch.empty(dataset.features.shape, device="cuda"))
        examples, targets, _ = next(dsets.validation_batches(dataset, validation, (0.0, 1.0), batch_size=4,
                                                             device=torch.device("cuda"), crops=9))
    assert examples.shape == (36, 1, 100, 384) and examples.device.type == targets.device.type == "cuda"


@pytest.mark.parametrize("change", [{"seed": 2}, {"fold": 2}, {"epoch": 2}])
def test_another_seed_fold_or_epoch_gives_other_examples(dataset, change):
    assert not torch.equal(epoch_of(dataset)[0], epoch_of(dataset, **change)[0])


def test_every_draw_of_an_epoch_follows_seed_fold_and_epoch(dataset, monkeypatch):
    asked, generator_for = [], dsets.generator_for

    def recording(*parts):
        asked.append(parts)
        return generator_for(*parts)
    monkeypatch.setattr(dsets, "generator_for", recording)
    epoch_of(dataset, seed=7, fold=2, epoch=3, mix=1.0, equalise=6.0)
    assert sorted(asked) == [(7, 2, 3, purpose) for purpose in ("crops", "equalise", "gain", "masks", "mix", "order")]


def test_a_shifted_crop_goes_on_at_the_beginning(dataset):
    found = dsets.crop(dataset.features, torch.tensor([3]), torch.tensor([[10, 400]]))
    expected = torch.cat([dataset.features[3], dataset.features[3]], dim=-1)[:, 10:110, 400:784]
    assert torch.equal(found[0], expected)
    frames = dsets.draw_crops(20_000, dsets.generator_for(1, 1, 1, "test"), shift_frames=431)[:, 1]
    assert set(frames.tolist()) == set(range(431)), "5 s of shift reach everywhere"
    frames = dsets.draw_crops(20_000, dsets.generator_for(1, 1, 1, "test"), shift_frames=10)[:, 1]
    assert set(frames.tolist()) == set(range(58))


def test_gain_is_what_a_louder_recording_would_be(dataset):
    plain, _ = epoch_of(dataset, views=1)
    louder, _ = epoch_of(dataset, views=1, gain=6.0)
    _, std = dataset.statistics(dataset.split(1)[0])
    difference = (louder - plain) * std  # dB
    each = difference.flatten(1)
    assert torch.allclose(each, each[:, :1].expand_as(each), atol=1e-3), "one gain an example"
    assert each[:, 0].abs().max() <= 6 and each[:, 0].min() < -2 and each[:, 0].max() > 2


def test_equalising_adds_straight_lines_over_the_mels(dataset):
    plain, _ = epoch_of(dataset, views=1)
    equalised, _ = epoch_of(dataset, views=1, equalise=6.0)
    _, std = dataset.statistics(dataset.split(1)[0])
    response = (equalised - plain) * std  # dB, (16, 1, 100, 384)
    assert torch.allclose(response, response[..., :1].expand_as(response), atol=1e-3), "the same in all frames"
    response = response[:, 0, :, 0]
    assert response.abs().max() <= 6.001 and response.min() < -4 and response.max() > 4
    assert response.std(dim=0).min() > 1, "each example its own, at each mel"
    bend = response.diff(dim=1).diff(dim=1).abs().amax(dim=0)  # at mels 1 to 98; points at 0, 24.75, 49.5, 74.25, 99
    straight = [mel for mel in range(98) if mel + 1 not in {24, 25, 49, 50, 74, 75}]
    assert bend[straight].max() < 1e-3 < 0.05 < bend.max()


def test_shares_are_the_larger_parts_of_a_beta_distribution():
    shares = dsets.draw_shares(20_000, 1.0, dsets.generator_for(1, 1, 1, "test"))
    assert shares.min() >= 0.5 and shares.max() <= 1 and shares.dtype == torch.float32
    assert shares.mean() == pytest.approx(0.75, abs=0.01)  # Beta(1, 1) is uniform
    assert dsets.draw_shares(20_000, 0.1, dsets.generator_for(1, 1, 1, "test")).mean() > 0.9
    assert torch.equal(shares, dsets.draw_shares(20_000, 1.0, dsets.generator_for(1, 1, 1, "test")))


def test_mixed_examples_are_sums_of_neighbours(dataset):
    training, _ = dataset.split(1)
    options = {"views": 2, "batch_size": 5, "seed": 1, "fold": 1, "epoch": 1, "device": CPU}
    plain = list(dsets.training_batches(dataset, training, (-40.0, 20.0), **options))
    mixed = list(dsets.training_batches(dataset, training, (-40.0, 20.0), mix=1.0, **options))
    for alone, sums in zip(plain, mixed, strict=True):
        assert alone.shares is None and alone.others is None and torch.equal(alone.targets, sums.targets)
        for i in range(len(sums.targets)):
            expected = sums.shares[i] * alone.examples[i] + (1 - sums.shares[i]) * alone.examples[i - 1]
            torch.testing.assert_close(sums.examples[i], expected)
            assert sums.others[i] == alone.targets[i - 1]


@pytest.mark.parametrize("mix", [0.0, 1.0])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_the_parts_of_all_ranks_in_a_row_are_the_batch_of_one(dataset, mix, ranks):
    training, _ = dataset.split(1)
    options = {"views": 1, "batch_size": 5, "seed": 1, "fold": 1, "epoch": 1, "device": CPU, "mix": mix, "time_shift": 5.0,
               "gain": 6.0, "equalise": 6.0}  # 16 examples: batches of 5, 5, 5 and 1
    whole = list(dsets.training_batches(dataset, training, (-40.0, 20.0), **options))
    parts = [list(dsets.training_batches(dataset, training, (-40.0, 20.0), rank=rank, ranks=ranks, **options))
             for rank in range(ranks)]
    for batch, *shared in zip(whole, *parts, strict=True):
        counts = [len(part.positions) for part in shared]
        assert max(counts) - min(counts) <= 1 and all(part.size == len(batch.targets) for part in shared)
        assert all(len(part.examples) == len(part.targets) == max(1, count) for part, count in zip(shared, counts))
        for name in ("examples", "targets", "shares", "others", "positions") if mix else ("examples", "targets", "positions"):
            together = [getattr(part, name)[:count] for part, count in zip(shared, counts)]
            assert torch.equal(torch.cat(together), getattr(batch, name))
    assert torch.cat([batch.positions for batch in whole]).tolist() == list(range(16))


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_ranks_validate_each_clip_once_in_the_batches_of_one(dataset, ranks):
    options = {"batch_size": 3, "device": CPU, "crops": 9}
    whole = list(dsets.validation_batches(dataset, torch.arange(8, 16), (0.0, 1.0), **options))
    parts = [list(dsets.validation_batches(dataset, torch.arange(8, 16), (0.0, 1.0), rank=rank, ranks=ranks, **options))
             for rank in range(ranks)]
    assert sum(map(len, parts)) == len(whole) == 3
    for i, batch in enumerate(whole):
        assert all(torch.equal(a, b) for a, b in zip(batch, parts[i % ranks][i // ranks], strict=True))


def test_nine_crops_are_a_grid_from_corner_to_corner(dataset):
    assert dsets.validation_corners(9).tolist() == [[mel, frame] for mel in (0, 14, 28) for frame in (0, 23, 46)]
    batch, = dsets.validation_batches(dataset, torch.arange(2), (0.0, 1.0), batch_size=2, device=CPU, crops=9)
    assert batch[0].shape == (18, 1, 100, 384) and len(batch[1]) == 2
    assert torch.equal(batch[0][17], dataset.features[1][:, 28:128, 46:430])


def test_validation_is_each_clip_once_cropped_in_the_middle(dataset):
    _, validation = dataset.split(3)
    batches = list(dsets.validation_batches(dataset, validation, (2.0, 3.0), batch_size=3, device=CPU))
    examples = torch.cat([examples for examples, *_ in batches])
    expected = (dataset.features[validation][:, :, 14:114, 23:407] - 2.0) / 3.0
    assert torch.equal(examples, expected)
    assert torch.equal(torch.cat([targets for _, targets, _ in batches]), dataset.targets[validation])
