"""Explorers for Jupyter: menus and sliders, a picture that follows them, and what the picture holds as sound again.

They call the functions that training calls. Nothing but the notebooks imports this module, which needs ipywidgets.
"""
import base64
import dataclasses
import io
import warnings

import ipywidgets as widgets
import torch
import torchaudio
from IPython.display import Audio
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

import dsets
from dsets import SAMPLE_RATE
from util import report
from util.config import Config
from util.errors import UserError

GRIFFIN_LIM_STEPS = 32  # torchaudio's and librosa's default


def invert_log_mel(decibels: torch.Tensor, params: dsets.FeatureParams) -> torch.Tensor:
    """A mel-spectrogram (n_mels, frames) in dB -> a waveform (samples,) at 44 100 Hz that nearly has it.

    Which of a mel's frequencies sounded, and in which phase, is lost. InverseMelScale finds power that gives these mels, and
    GriffinLim phases that fit this power (Griffin & Lim, IEEE TASSP 1984).
    """
    to_power = torchaudio.transforms.InverseMelScale(  # gelsd: the least squares that also take filters without a frequency
        params.n_fft // 2 + 1, params.n_mels, SAMPLE_RATE, params.f_min, params.f_max, driver="gelsd")
    to_waveform = torchaudio.transforms.GriffinLim(
        params.n_fft, GRIFFIN_LIM_STEPS, hop_length=params.hop_length, rand_init=False)  # the same sound each time
    return to_waveform(to_power(10 ** (decibels / 10)))  # (128, 431) -> (1025, 431) -> (220160,)


def wav_bytes(waveform: torch.Tensor) -> bytes:
    """A waveform (samples,) at 44 100 Hz as a WAV file; made softer only if its peak is above 1."""
    return Audio((waveform / waveform.abs().max().clamp(min=1)).numpy(), rate=SAMPLE_RATE, normalize=False).data


def redraw_mel(axes, feature: torch.Tensor, params: dsets.FeatureParams, *corner: int, **options):
    """report.draw_mel in place of the axes' last picture: axes that stay take half the time of new ones."""
    for artist in (*axes.images, *axes.patches):
        artist.remove()
    return report.draw_mel(axes, feature.numpy(), params, *corner, **options)


class ClipMenu(widgets.HBox):
    """Menus of the classes and of a class's clips, with a player; `clip.value` is the clip's index in the data set."""

    def __init__(self, ds: dsets.ESC50, target: int, title: str):
        self.ds = ds
        self.target = widgets.Dropdown(options=[(name, i) for i, name in enumerate(ds.classes)], value=target, description=title)
        self.clip = widgets.Dropdown(options=self.clips(), description="clip")
        self.player = widgets.Audio(autoplay=False, loop=False)
        self.target.observe(lambda _: setattr(self.clip, "options", self.clips()), "value")  # chooses the first of them
        self.clip.observe(self.load, "value")
        self.load()
        super().__init__([self.target, self.clip, self.player])

    def clips(self) -> list[tuple[str, int]]:
        indices = (self.ds.targets == self.target.value).nonzero().flatten().tolist()
        return [(f"{index}: {self.ds.table['file'][index]}", index) for index in indices]

    def load(self, _=None) -> None:
        self.waveform = self.ds.waveform(self.clip.value)  # (1, 220500)
        self.player.value = wav_bytes(self.waveform[0])


class Explorer(widgets.VBox):
    """Menus, sliders, a picture that follows them, and a button that makes sound of it.

    draw: draws on `figure` what the controls say; returns what to hear, a mel-spectrogram (n_mels, frames) in dB, and its
    FeatureParams. Where no kernel runs, the picture alone is shown.
    """

    def __init__(self, menus: list[ClipMenu], sliders: dict[str, widgets.Widget], figure: Figure, draw):
        self.menus, self.sliders, self.figure, self.draw = menus, sliders, figure, draw
        self.picture, self.message = widgets.Image(format="jpeg", layout={"align_self": "flex-start"}), widgets.Label()
        self.button = widgets.Button(description="hear the picture")
        self.heard = widgets.Audio(autoplay=False, loop=False)
        for name, slider in sliders.items():
            slider.description, slider.style.description_width, slider.layout.width = name, "11em", "95%"  # room for the longest
        for control in (*(menu.clip for menu in menus), *sliders.values()):
            control.observe(self.redraw, "value")
        self.button.on_click(self.hear)
        self.redraw()
        grid = widgets.GridBox(list(sliders.values()), layout={"grid_template_columns": "repeat(2, 30em)"})
        super().__init__([*menus, grid, self.picture, self.message, widgets.HBox([self.button, self.heard])])

    def redraw(self, _=None) -> None:
        self.heard.layout.visibility = "hidden"  # it was the last picture's
        with warnings.catch_warnings(record=True) as caught:  # torchaudio's, of filters without a frequency
            warnings.simplefilter("always")
            try:
                self.to_hear = self.draw()
                self.message.value = " ".join(str(warning.message) for warning in caught)
            except UserError as error:  # of parameters that do not go together; the last picture stays
                self.message.value = str(error).partition("; found")[0]
                return
        file = io.BytesIO()
        self.figure.savefig(file, format="jpeg")  # a PNG takes twice as long
        self.picture.value = file.getvalue()

    def hear(self, _=None) -> None:
        self.button.disabled = True  # it takes seconds
        with warnings.catch_warnings(action="ignore"):  # the message says it already
            self.heard.value = wav_bytes(invert_log_mel(*self.to_hear))
        self.heard.layout.visibility, self.button.disabled = "visible", False

    def _repr_mimebundle_(self, **options) -> dict:
        return {**super()._repr_mimebundle_(**options), "image/jpeg": base64.b64encode(self.picture.value).decode()}


def spectrogram_explorer(ds: dsets.ESC50) -> Explorer:
    """A clip's mel-spectrogram, with a slider for each of its parameters. They start as those of the data set."""
    menu, params = ClipMenu(ds, 0, "class"), ds.params
    sliders = {
        "n_fft": widgets.SelectionSlider(options=sorted({256, 512, 1024, 2048, 4096, 8192, params.n_fft}), value=params.n_fft),
        "hop_length": widgets.SelectionSlider(options=sorted({128, 256, 512, 1024, 2048, params.hop_length}),
                                              value=params.hop_length),
        "n_mels": widgets.IntSlider(params.n_mels, 8, 256),
        "top_db": widgets.FloatSlider(params.top_db, min=10, max=120),
        "f_min": widgets.FloatSlider(params.f_min, min=0, max=SAMPLE_RATE / 2, step=50, readout_format=".0f"),
        "f_max": widgets.FloatSlider(params.f_max, min=0, max=SAMPLE_RATE / 2, step=50, readout_format=".0f")}
    figure = Figure(figsize=(10, 3.4), dpi=80)
    place = {"left": 0.07, "right": 0.94, "bottom": 0.15, "wspace": 0.03}  # layout="constrained" would take most of the time
    axes, bar_axes = figure.subplots(1, 2, width_ratios=(60, 1), gridspec_kw=place)
    bar = figure.colorbar(ScalarMappable(cmap="magma"), bar_axes, label="dB")
    names, families = report.drawable(ds.classes)

    def draw():
        chosen = {name: slider.value for name, slider in sliders.items()}
        changed = dataclasses.replace(params, **chosen, crop_mels=1, crop_frames=1)  # no crop is cut of it
        decibels = dsets.LogMel(changed)(menu.waveform)[0]  # (1, 220500) -> (128, 431)
        image = redraw_mel(axes, decibels, changed)
        title = f"{names[ds.targets[menu.clip.value]]} {tuple(decibels.shape)}"
        axes.set_title(title, family=families, parse_math=False)  # a $ is a $
        bar.update_normal(image)
        return decibels, changed
    return Explorer([menu], sliders, figure, draw)


def augmentation_explorer(ds: dsets.ESC50, mean_std: tuple[float, float]) -> Explorer:
    """A clip's augmented example: crop, gain, filter and masks, then mixup with a partner that has draws of its own.

    seed: of all draws. crop_mels, crop_frames, gain and lam are used as they are; the other sliders are limits of draws.
    mean_std: that of the training folds.
    """
    own, partner, params = ClipMenu(ds, 0, "class"), ClipMenu(ds, len(ds.classes) - 1, "partner"), ds.params
    seconds = params.hop_length / SAMPLE_RATE  # a frame
    sliders = {
        "seed": widgets.IntSlider(42, 0, 99),
        "lam": widgets.FloatSlider(0.7, min=0.5, max=1, step=0.01),  # draw_lam's range; 1 mixes nothing
        "crop_mels": widgets.IntSlider(params.crop_mels, 8, params.n_mels),
        "crop_frames": widgets.IntSlider(params.crop_frames, 16, params.num_frames),  # GriffinLim needs samples
        "freq_mask (mels)": widgets.IntSlider(Config.freq_mask, 0, params.n_mels),
        "time_mask (frames)": widgets.IntSlider(Config.time_mask, 0, params.num_frames),
        "time_shift (s)": widgets.FloatSlider(0, min=0, max=5),
        "time_stretch": widgets.FloatSlider(0, min=0, max=1, step=0.05),
        "freq_shift (mels)": widgets.IntSlider(0, 0, 40),
        "gain (dB)": widgets.FloatSlider(0, min=-20, max=20),
        "filter_augment (dB)": widgets.FloatSlider(0, min=0, max=20)}
    figure = Figure(figsize=(13, 3.2), dpi=80)
    panels = figure.subplots(1, 3, gridspec_kw={"left": 0.06, "right": 0.98, "bottom": 0.16, "wspace": 0.2})
    names, families = report.drawable(ds.classes)

    def draw():
        (seed, lam, mels, frames, freq_mask, time_mask, time_shift, time_stretch, freq_shift, gain,
         filter_augment) = (slider.value for slider in sliders.values())
        changed = dataclasses.replace(params, crop_mels=mels, crop_frames=frames)

        def generator(purpose: str) -> torch.Generator:
            return dsets.generator_for(seed, 1, 1, purpose)
        rows = ds.rows[[own.clip.value, partner.clip.value]]
        corners = dsets.draw_corners(2, generator("crops"), changed, round(time_shift / seconds), freq_shift)
        rates = dsets.draw_stretches(2, time_stretch, generator("stretch"))
        decibels = gain + dsets.draw_filter_augment(2, filter_augment, generator("equalise"), changed)  # (2, 1, 100, 1)
        examples = dsets.crop(ds.features, rows, corners, changed, rates)  # (2, 1, 100, 384)
        examples = dsets.normalize(examples + decibels, *mean_std)
        examples = dsets.spec_augment(examples, dsets.draw_masks(2, generator("masks"), changed, freq_mask, time_mask))
        example = dsets.mix_examples(examples[:1], examples[1:], torch.tensor([lam]))[0, 0]  # -> (100, 384)
        for axes, menu, (low, first), rate in zip(panels, (own, partner), corners.tolist(), rates.tolist()):
            redraw_mel(axes, ds[menu.clip.value][0][0], params)
            for start in (first, first - params.num_frames):  # the second rectangle shows what wraps around
                axes.add_patch(Rectangle(((start - 0.5) * seconds, low - 0.5), frames * rate * seconds, mels, fill=False,
                                         color="white", linewidth=2))
            axes.set_title(names[ds.targets[menu.clip.value]], family=families, parse_math=False)
        panels[1].set(ylabel="", yticks=[])  # the first panel's: text takes most of the time
        low, first = corners[0].tolist()
        redraw_mel(panels[2], example, changed, low, first, vmin=-3, vmax=3)
        panels[2].set_title(f"example {tuple(example.shape)}, mean +- 3 std")
        heard = example * mean_std[1] + mean_std[0]  # in dB again
        whole = torch.full((params.n_mels, frames), heard.min().item())  # what lies outside of the crop is as silent as can be
        bottom, top = max(low, 0), min(low + mels, params.n_mels)
        if bottom < top:  # without mels that repeat beyond the edges
            whole[bottom:top] = heard[bottom - low:top - low]
        return whole, changed
    return Explorer([own, partner], sliders, figure, draw)
