"""A trained network with its feature extraction as one ONNX graph, for programs without torch (predict.py --onnx)."""
import json
import logging
import math
import warnings
from pathlib import Path

import numpy as np
import torch

import dsets
from util.cache import CLIP_SAMPLES, MEL, POWER_FLOOR, SAMPLE_RATE, TOP_DB, LogMel, UserError, write_whole

TOLERANCE = 1e-4  # of probabilities, between onnxruntime and torch


class LogMelGraph(torch.nn.Module):
    """LogMel in operators that ONNX runtimes share: the Fourier transform is a convolution with windowed waves."""

    def __init__(self, log_mel: LogMel):
        super().__init__()
        n_fft, bins = MEL["n_fft"], log_mel.num_bins
        angles = 2 * math.pi / n_fft * torch.outer(torch.arange(bins), torch.arange(n_fft)).double()  # (372, 2048)
        waves = torch.cat([angles.cos(), angles.sin()]) * log_mel.window.double()  # -> (744, 2048)
        self.register_buffer("waves", waves.float()[:, None])  # -> (744, 1, 2048)
        self.register_buffer("filters", log_mel.filters)  # (128, 372)

    def forward(self, waveforms: torch.Tensor) -> torch.Tensor:
        padded = torch.nn.functional.pad(waveforms, (MEL["n_fft"] // 2,) * 2, mode="reflect")  # (B, 1, 222548)
        parts = torch.nn.functional.conv1d(padded, self.waves, stride=MEL["hop_length"])  # -> (B, 744, 431)
        real, imaginary = parts.chunk(2, dim=1)  # -> (B, 372, 431) each
        mel = self.filters @ (real.square() + imaginary.square())  # -> (B, 128, 431)
        decibels = 10 / math.log(10) * mel.clamp(min=POWER_FLOOR).log()
        return torch.maximum(decibels, decibels.amax(dim=(1, 2), keepdim=True) - TOP_DB)[:, None]  # -> (B, 1, 128, 431)


class Graph(torch.nn.Module):
    """What is exported: waveform (B, 220500) -> probabilities (B, classes), in float32."""

    def __init__(self, predictor):
        super().__init__()
        self.log_mel, self.network = LogMelGraph(predictor.log_mel), predictor.network
        self.mean, self.std = predictor.mean, predictor.std
        self.corners = dsets.validation_corners(predictor.crops).tolist()  # here: the exporter takes numbers, not tensors

    def forward(self, waveform: torch.Tensor) -> torch.Tensor:
        features = self.log_mel(waveform[:, None])  # (B, 220500) -> (B, 1, 128, 431)
        features = dsets.normalise(features, self.mean, self.std)
        logits = [self.network(features[:, :, mel:mel + dsets.CROP_MELS, frame:frame + dsets.CROP_FRAMES])  # -> (B, classes)
                  for mel, frame in self.corners]
        return torch.stack(logits).mean(dim=0).softmax(dim=1)


def export(predictor, path: Path) -> float:
    """Write the whole way from a waveform to probabilities as one ONNX graph, and try it with onnxruntime.

    Returns the largest difference to torch's probabilities, on noise, tones, a click and silence. Raises UserError if a
    library is missing; fails loudly if the two disagree: nothing is written then.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (torch's exporter wants it)
    except ImportError as error:
        raise UserError(f"--onnx: needs the package {error.name}; pip install -r requirements.txt") from error
    generator = torch.Generator().manual_seed(0)
    t = torch.arange(CLIP_SAMPLES) / SAMPLE_RATE  # s
    waveforms = torch.stack([0.1 * torch.randn(CLIP_SAMPLES, generator=generator), 0.5 * torch.sin(2 * math.pi * 440 * t),
                             torch.sin(2 * math.pi * 300 * t * t), (t == 1).float(), torch.zeros(CLIP_SAMPLES)])

    def write(part: Path) -> None:
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of libraries that are not needed
        with warnings.catch_warnings():  # and of its own doings
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                Graph(predictor).eval(), (waveforms,), dynamo=True, verbose=False, input_names=["waveform"],
                output_names=["probabilities"], dynamic_shapes={"waveform": {0: torch.export.Dim("batch", min=1)}})
        for name, text in {"classes": json.dumps(predictor.classes), "sample_rate_hz": str(SAMPLE_RATE)}.items():
            program.model.metadata_props[name] = text
        program.save(str(part))
        session = onnxruntime.InferenceSession(str(part), providers=["CPUExecutionProvider"])
        for batch in (waveforms, waveforms[:1]):
            found, = session.run(["probabilities"], {"waveform": batch.numpy()})
            differences.append(float(np.abs(found - predictor(batch[:, None]).numpy()).max()))
        if not max(differences) <= TOLERANCE:
            raise RuntimeError(f"onnxruntime differs from torch by {max(differences)}")

    predictor.precision = "fp32"
    differences = []
    write_whole(path, write)
    return max(differences)
