"""The network that comes with the project."""
import numpy as np
import pytest
import soundfile

import models
import predict
import training
from conftest import REAL
from dsets import SAMPLE_RATE
from util import checkpoint as checkpoints
from util.config import parse_args
from util.errors import UserError


def test_the_weights_name_fifty_classes_of_any_recording(tmp_path, capsys):
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).uniform(-0.5, 0.5, 7 * SAMPLE_RATE), SAMPLE_RATE)
    assert predict.main([str(tmp_path / "a.wav"), "--device", "cpu", "--format", "csv", "--top", "50"]) == 0
    captured = capsys.readouterr()
    rows = [line.split(",") for line in captured.out.splitlines()[1:]]
    windows = {row[1]: {other[5]: float(other[6]) for other in rows if other[1] == row[1]} for row in rows}
    assert windows.keys() == {"0", "1", "mean"}
    assert all(len(found) == 50 and sum(found.values()) == pytest.approx(1, abs=1e-3) for found in windows.values())
    assert str(predict.WEIGHTS) in captured.err and captured.err.count("\n") == 1


def test_a_strong_training_can_start_from_the_weights():
    features = vars(training.feature_params(parse_args(["--recipe", "strong"])))
    assert len(checkpoints.load_pretrained(models.build_model("cnn8", 3), str(predict.WEIGHTS), features)) == 50
    with pytest.raises(UserError, match="it is a cnn8"):
        checkpoints.load_pretrained(models.build_model("cnn4", 3), str(predict.WEIGHTS), features)


@pytest.mark.slow
def test_the_weights_recognize_the_clips_that_they_were_trained_on():
    """It says nothing of how good they are, but that weights, features and classes belong together."""
    names = sorted(REAL.glob("1-*"))[::4]  # of fold 1; a name ends in the number of its class
    if not names:
        pytest.skip("no real recordings beside the project")
    predictor = predict.Predictor(device="cpu")
    right = [int(predictor(name)["mean"].argmax()) == int(name.stem.rpartition("-")[2]) for name in names]
    assert np.mean(right) > 0.9
