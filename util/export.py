"""A trained network with its feature extraction as one ONNX graph, for programs without torch (predict.py --onnx)."""
import json
import logging
import math
import warnings
from pathlib import Path

import numpy as np
import torch

import dsets
from dsets import CLIP_SAMPLES, SAMPLE_RATE
from util.errors import UserError, write_atomically

TOLERANCE = 1e-4  # of probabilities, between onnxruntime and torch


class LogMelGraph(torch.nn.Module):
    """LogMel in operators that ONNX runtimes share: the Fourier transform is a convolution with windowed waves."""

    def __init__(self, log_mel: dsets.LogMel):
        super().__init__()
        self.params, n_fft = log_mel.params, log_mel.params.n_fft
        angles = 2 * math.pi / n_fft * torch.outer(torch.arange(log_mel.num_bins), torch.arange(n_fft)).double()  # (372, 2048)
        waves = torch.cat([angles.cos(), angles.sin()]) * log_mel.window.double()  # -> (744, 2048)
        self.register_buffer("waves", waves.float()[:, None])  # -> (744, 1, 2048)
        self.register_buffer("filters", log_mel.filters)  # (128, 372)

    def forward(self, waveforms: torch.Tensor) -> torch.Tensor:
        padded = torch.nn.functional.pad(waveforms, (self.params.n_fft // 2,) * 2, mode="reflect")  # (B, 1, 222548)
        parts = torch.nn.functional.conv1d(padded, self.waves, stride=self.params.hop_length)  # -> (B, 744, 431)
        real, imaginary = parts.chunk(2, dim=1)  # -> (B, 372, 431) each
        mel = self.filters @ (real.square() + imaginary.square())  # -> (B, 128, 431)
        decibels = 10 / math.log(10) * mel.clamp(min=self.params.amin).log()
        decibels = torch.maximum(decibels, decibels.amax(dim=(1, 2), keepdim=True) - self.params.top_db)
        return decibels[:, None]  # -> (B, 1, 128, 431)


class Graph(torch.nn.Module):
    """What is exported: waveform (B, 220500) -> probabilities (B, classes), in float32."""

    def __init__(self, network):
        super().__init__()
        self.log_mel, self.model, self.params = LogMelGraph(network.log_mel), network.model, network.params
        self.mean, self.std = network.mean, network.std
        mels, frames = dsets.validation_corners(self.params, network.tta_crops).T[:, :, None]  # (crops, 1) each
        mels, frames = mels + torch.arange(self.params.crop_mels), frames + torch.arange(self.params.crop_frames)
        self.register_buffer("mels", mels.clamp(0, self.params.n_mels - 1))  # (crops, 100), as dsets.crop has them
        self.register_buffer("frames", frames % self.params.num_frames)  # (crops, 384)

    def forward(self, waveform: torch.Tensor) -> torch.Tensor:
        features = dsets.normalize(self.log_mel(waveform[:, None]), self.mean, self.std)  # (B, 220500) -> (B, 1, 128, 431)
        logits = [self.model(features.index_select(2, mels).index_select(3, frames))  # -> (B, 1, 100, 384) -> (B, classes)
                  for mels, frames in zip(self.mels, self.frames)]
        return torch.stack(logits).mean(dim=0).softmax(dim=1)  # (crops, B, classes) -> (B, classes)


def export_onnx(network, path: Path) -> float:
    """Write a predict.Network, from waveform to probabilities, as one ONNX graph, and try it with onnxruntime.

    Returns the largest difference to torch's probabilities. Raises UserError if a library is missing; fails loudly, and writes
    nothing, if the two disagree.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (torch's exporter needs it)
    except ImportError as error:
        raise UserError(f"--onnx: needs the package {error.name}; pip install -r requirements.txt") from error
    t = torch.arange(CLIP_SAMPLES) / SAMPLE_RATE  # s
    noise = 0.1 * torch.randn(CLIP_SAMPLES, generator=torch.Generator().manual_seed(0))
    tones = [0.5 * torch.sin(2 * math.pi * 440 * t), torch.sin(2 * math.pi * 300 * t * t)]
    waveforms = torch.stack([noise, *tones, (t == 1).float(), 0 * t])
    network.precision = "fp32"
    differences = []

    def write(part: Path) -> None:
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of libraries that are not needed
        shapes = {"waveform": {0: torch.export.Dim("batch", min=1)}}
        with warnings.catch_warnings(action="ignore"):  # torch's, of itself
            program = torch.onnx.export(Graph(network).eval(), (waveforms,), dynamo=True, verbose=False, dynamic_shapes=shapes,
                                        input_names=["waveform"], output_names=["probabilities"])
        program.model.metadata_props.update(classes=json.dumps(network.classes), sample_rate_hz=str(SAMPLE_RATE))
        program.save(str(part))
        session = onnxruntime.InferenceSession(str(part), providers=["CPUExecutionProvider"])
        for batch in (waveforms, waveforms[:1]):
            found, = session.run(["probabilities"], {"waveform": batch.numpy()})
            differences.append(float(np.abs(found - network(batch[:, None]).numpy()).max()))
        if not max(differences) <= TOLERANCE:
            raise RuntimeError(f"onnxruntime differs from torch by {max(differences)}")

    write_atomically(path, write)
    return max(differences)
