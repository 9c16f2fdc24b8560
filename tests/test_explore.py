"""The explorers of the notebooks: what their pictures hold after a slider has moved, and what is heard of them. No browser."""
import base64
import io
import time

import numpy as np
import pytest
import soundfile
import torch

import dsets
from conftest import CPU, OTHER_PARAMS
import explore

MEAN_STD = (-20.0, 10.0)  # dB


def shown(explorer: explore.Explorer, panel: int) -> np.ndarray:
    """The mel-spectrogram in a panel of the picture."""
    image, = explorer.figure.axes[panel].images
    return np.asarray(image.get_array())


def set_values(explorer: explore.Explorer, **values) -> None:
    """Move sliders, named without their unit."""
    for name, value in values.items():
        slider, = [slider for title, slider in explorer.sliders.items() if title.split()[0] == name]
        slider.value = value


@pytest.fixture(params=["dataset", "other_dataset"])
def ds(request) -> dsets.ESC50:
    return request.getfixturevalue(request.param)


# --- spectrograms -----------------------------------------------------------------------------------------------------

def test_the_picture_starts_as_the_data_set_holds_it(ds):
    explorer = explore.spectrogram_explorer(ds)
    assert np.array_equal(shown(explorer, 0), ds[0][0][0])


@pytest.mark.parametrize("values", [
    {"n_fft": 4096}, {"hop_length": 256}, {"n_mels": 40}, {"top_db": 30.0}, {"f_min": 1000.0}, {"f_max": 12_000.0},
    {"n_fft": 4096, "hop_length": 2048, "n_mels": 100, "f_max": 20_000.0}], ids=str)
def test_a_moved_slider_draws_what_log_mel_gives(dataset, values):
    explorer = explore.spectrogram_explorer(dataset)
    before = explorer.picture.value
    set_values(explorer, **values)
    params = dsets.FeatureParams(**values, crop_mels=1, crop_frames=1)
    assert np.array_equal(shown(explorer, 0), dsets.LogMel(params)(dataset.waveform(0))[0])
    assert explorer.picture.value != before and explorer.message.value == ""


def test_parameters_that_do_not_go_together_are_named_and_the_picture_stays(dataset):
    explorer = explore.spectrogram_explorer(dataset)
    before = explorer.picture.value
    set_values(explorer, f_min=9000.0)
    assert "f_min < f_max" in explorer.message.value and explorer.picture.value == before
    with_filters = {name: explorer.sliders[name].value for name in ("n_fft", "hop_length", "n_mels", "f_min")}
    set_values(explorer, n_fft=256, hop_length=128, n_mels=8, f_min=50.0, f_max=100.0)
    assert "n_fft" in explorer.message.value
    set_values(explorer, **with_filters)
    set_values(explorer, f_max=12_000.0)
    assert explorer.message.value == "" and explorer.picture.value != before


def test_mels_without_a_frequency_are_told(dataset):
    explorer = explore.spectrogram_explorer(dataset)
    set_values(explorer, n_fft=512)
    assert "zero values" in explorer.message.value


@pytest.mark.parametrize("make", [explore.spectrogram_explorer, lambda ds: explore.augmentation_explorer(ds, MEAN_STD)])
def test_the_menus_choose_a_clip_to_see_and_to_hear(dataset, make):
    explorer = make(dataset)
    menu = explorer.menus[0]
    menu.target.value = 2
    indices = (dataset.targets == 2).nonzero().flatten().tolist()
    assert [index for _, index in menu.clip.options] == indices and menu.clip.value == indices[0]
    menu.clip.value = indices[-1]
    assert np.array_equal(shown(explorer, 0), dataset[indices[-1]][0][0])
    samples, rate = soundfile.read(io.BytesIO(menu.player.value), dtype="float32")
    assert rate == dsets.SAMPLE_RATE and np.allclose(samples, dataset.waveform(indices[-1])[0], atol=1e-4)


def test_a_picture_stands_where_no_kernel_runs(dataset):
    explorer = explore.spectrogram_explorer(dataset)
    assert base64.b64decode(explorer._repr_mimebundle_()["image/jpeg"]) == explorer.picture.value


# --- augmentation -----------------------------------------------------------------------------------------------------

def make_plain(ds: dsets.ESC50, **values) -> explore.Explorer:
    """An explorer that augments nothing but what `values` say; its crop is the whole clip."""
    explorer = explore.augmentation_explorer(ds, MEAN_STD)
    plain = {"lam": 1, "crop_mels": ds.params.n_mels, "crop_frames": ds.params.num_frames, "freq_mask": 0, "time_mask": 0}
    set_values(explorer, **plain | values)
    return explorer


def normalized(ds: dsets.ESC50, index: int) -> np.ndarray:
    return dsets.normalize(ds[index][0][0], *MEAN_STD).numpy()


def test_no_augmentation_gives_the_clip(ds):
    explorer = make_plain(ds)
    assert np.array_equal(shown(explorer, 2), normalized(ds, 0))


def test_lam_mixes_with_the_partner(ds):
    explorer = make_plain(ds, lam=0.75)
    explorer.menus[1].target.value = 1
    partner = explorer.menus[1].clip.value
    assert ds.targets[partner] == 1
    np.testing.assert_allclose(shown(explorer, 2), 0.75 * normalized(ds, 0) + 0.25 * normalized(ds, partner), atol=1e-5)


def test_gain_and_filter_are_added_in_db(ds):
    explorer = make_plain(ds, gain=6.0)
    np.testing.assert_allclose(shown(explorer, 2), normalized(ds, 0) + 6 / MEAN_STD[1], atol=1e-5)
    set_values(explorer, gain=0.0, filter_augment=8.0)
    added = MEAN_STD[1] * (shown(explorer, 2) - normalized(ds, 0))  # in dB
    assert np.ptp(added, axis=1).max() < 1e-3 and 1 < np.abs(added).max() <= 8, "the same at all times, within 8 dB"


def test_masks_have_the_widths_that_the_sliders_allow(dataset):
    explorer = make_plain(dataset, freq_mask=20)
    masked = shown(explorer, 2) == 0
    assert 0 < masked.all(axis=1).sum() <= 2 * 20 and not masked.all(axis=0).any()
    set_values(explorer, freq_mask=0, time_mask=50)
    masked = shown(explorer, 2) == 0
    assert 0 < masked.all(axis=0).sum() <= 2 * 50 and not masked.all(axis=1).any()


def test_crops_and_shifts_are_those_of_training(dataset):
    explorer = explore.augmentation_explorer(dataset, MEAN_STD)
    flags = {"time_shift": 5.0, "freq_shift": 20}
    corners = set()
    for seed in range(8):
        set_values(explorer, seed=seed, lam=1, freq_mask=0, time_mask=0, **flags)
        pair = torch.tensor([menu.clip.value for menu in explorer.menus])
        batch = next(dsets.training_batches(dataset, pair, MEAN_STD, views=1, batch_size=2, seed=seed, fold=1, epoch=1,
                                            device=CPU, **flags))
        own = batch.examples[batch.targets == dataset.targets[pair[0]]]
        assert np.array_equal(shown(explorer, 2), own[0, 0])
        corners.add(explorer.figure.axes[0].patches[0].get_xy())
    assert len(corners) == 8, "the frame on the clip is the crop's"


@pytest.mark.parametrize("values", [
    {"seed": 1}, {"lam": 0.5}, {"crop_mels": 50}, {"crop_frames": 150}, {"freq_mask": 50}, {"time_mask": 150},
    {"time_shift": 5.0}, {"time_stretch": 0.5}, {"freq_shift": 40}, {"gain": 3.0}, {"filter_augment": 10.0}], ids=str)
def test_every_slider_changes_the_example(ds, values):
    explorer = explore.augmentation_explorer(ds, MEAN_STD)
    example, picture = shown(explorer, 2), explorer.picture.value
    set_values(explorer, **values)
    assert not np.array_equal(shown(explorer, 2), example) and explorer.picture.value != picture


# --- sound ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("params", [dsets.FeatureParams(), OTHER_PARAMS])
def test_the_sound_of_a_mel_spectrogram_has_nearly_that_mel_spectrogram(dataset, params):
    log_mel = dsets.LogMel(params)
    decibels = log_mel(dataset.waveform(6))[0]
    waveform = explore.invert_log_mel(decibels, params)
    assert waveform.shape == ((params.num_frames - 1) * params.hop_length,)
    frames = slice(4, params.num_frames - 4)  # the ends are reflected: their neighbors are not the same
    assert (log_mel(waveform)[:, frames] - decibels[:, frames]).abs().median() < 1  # dB


def test_a_loud_sound_is_made_softer_and_others_stay():
    for peak, expected in ((0.5, 0.5), (4.0, 1.0)):
        samples, _ = soundfile.read(io.BytesIO(explore.wav_bytes(torch.tensor([0.0, peak, -peak / 2]))))
        assert samples == pytest.approx([0, expected, -expected / 2], abs=1e-4)


def test_the_button_makes_sound_of_the_crop_until_the_picture_changes(other_dataset):
    explorer = explore.augmentation_explorer(other_dataset, MEAN_STD)
    assert explorer.heard.layout.visibility == "hidden"
    set_values(explorer, lam=1, crop_frames=100)
    explorer.button.click()
    samples, rate = soundfile.read(io.BytesIO(explorer.heard.value))
    assert (len(samples), rate) == (99 * OTHER_PARAMS.hop_length, dsets.SAMPLE_RATE) and np.abs(samples).max() > 0.01
    assert explorer.heard.layout.visibility == "visible" and not explorer.button.disabled
    set_values(explorer, seed=1)
    assert explorer.heard.layout.visibility == "hidden"


def test_the_smallest_crop_is_drawn_and_heard(ds):
    explorer = explore.augmentation_explorer(ds, MEAN_STD)
    smallest = {name: explorer.sliders[name].min for name in ("crop_mels", "crop_frames")}
    set_values(explorer, **smallest)
    explorer.button.click()
    assert shown(explorer, 2).shape == tuple(smallest.values()) and len(explorer.heard.value) > 1000


def test_a_crop_that_lies_beyond_the_edge_is_drawn_and_silent(dataset):
    explorer = explore.augmentation_explorer(dataset, MEAN_STD)
    silent = 0
    for seed in range(40):
        set_values(explorer, seed=seed, crop_mels=8, freq_shift=40)
        low = round(explorer.figure.axes[0].patches[0].get_y() + 0.5)
        heard, _ = explorer.to_hear
        assert bool((heard == heard.min()).all(dim=1).sum() >= 128 - max(0, min(low + 8, 128) - max(low, 0)))
        silent += low <= -8 or low >= 128
    assert silent > 3


def test_a_stretch_reads_more_or_less_of_the_clip(dataset):
    explorer = make_plain(dataset, crop_frames=200, time_stretch=1.0)
    widths = set()
    for seed in range(20):
        set_values(explorer, seed=seed)
        frame = explorer.figure.axes[0].patches[0]
        first, width = (round(value * dsets.SAMPLE_RATE / 512, 2) for value in (frame.get_x(), frame.get_width()))
        frames = int(first + 0.5) + (torch.arange(200) * (width / 200)).long()
        found = shown(explorer, 2) == normalized(dataset, 0)[:, frames % 431]
        assert found.all(axis=0).mean() > 0.95, "but for what a rounded rate gives"
        widths.add(width)
    assert 100 <= min(widths) < 150 and 300 < max(widths) <= 400


def test_mels_that_repeat_beyond_the_edges_are_not_heard(dataset):
    explorer = explore.augmentation_explorer(dataset, MEAN_STD)
    lowest = set()
    for seed in range(20):
        set_values(explorer, seed=seed, freq_shift=40)
        heard, _ = explorer.to_hear
        example = torch.from_numpy(shown(explorer, 2)) * MEAN_STD[1] + MEAN_STD[0]
        low = round(explorer.figure.axes[0].patches[0].get_y() + 0.5)
        inside = range(max(low, 0), min(low + 100, 128))
        assert heard.shape == (128, 384) and torch.equal(heard[inside], example[inside.start - low:inside.stop - low])
        lowest.add(low)
    assert min(lowest) < 0 and max(lowest) > 28


def test_what_lies_outside_of_the_crop_is_as_low_as_its_lowest_value(dataset):
    explorer = explore.augmentation_explorer(dataset, MEAN_STD)
    heard, params = explorer.to_hear
    example = torch.from_numpy(shown(explorer, 2)) * MEAN_STD[1] + MEAN_STD[0]
    low = round(explorer.figure.axes[0].patches[0].get_y() + 0.5)
    assert heard.shape == (128, 384) and torch.equal(heard[low:low + 100], example)
    outside = torch.cat([heard[:low], heard[low + 100:]])
    assert len(outside) == 28 and (outside == example.min()).all() and params == dataset.params


@pytest.mark.slow
@pytest.mark.parametrize("make", [explore.spectrogram_explorer, lambda ds: explore.augmentation_explorer(ds, MEAN_STD)])
def test_the_picture_follows_within_a_third_of_a_second(dataset, make):
    explorer = make(dataset)
    slider = explorer.sliders.get("n_mels") or explorer.sliders["seed"]
    seconds = []
    for _ in range(5):
        start = time.process_time()  # of this process: others may keep the cores busy
        slider.value -= 1
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.3
