"""On a GPU: a recorded step, runs that repeat and resume to the last bit, predictions beside the CPU's. Skipped elsewhere."""
import json
import shutil

import pytest
import torch

import models
import predict
import training
from conftest import results_of, run, train_in
from util import device as machine

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(autouse=True)
def small(small_pictures):
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("recipe", ["blog", "strong"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", models.MODELS)
def test_a_training_repeats_resumes_and_needs_no_recording_to_the_last_bit(pristine_root, tmp_path, monkeypatch, name, precision,
                                                                           recipe):
    flags = ["--recipe", recipe, "--device", "cuda", "--model", name, "--precision", precision, "--fold", 1, 2]
    replays, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(graph) or replay(graph))
    first = results_of(train_in(tmp_path / "first", pristine_root, *flags))
    assert len(replays) == 2 * (2 * 4 - 3)  # 16 examples of two epochs in batches of 4, three of which warm up

    evaluations, evaluate = [], training.evaluate

    def stops(*arguments):
        evaluations.append(1)
        if len(evaluations) == 2:
            raise RuntimeError("stopped in epoch 2")
        return evaluate(*arguments)
    monkeypatch.setattr(training, "evaluate", stops)
    with pytest.raises(RuntimeError, match="stopped in epoch 2"):
        train_in(tmp_path / "resumed", pristine_root, *flags)
    monkeypatch.setattr(training, "evaluate", evaluate)
    run("--resume", tmp_path / "resumed")
    assert results_of(tmp_path / "resumed") == first

    monkeypatch.setattr(machine.Recorder, "WARM_UP", 10 ** 9)
    assert results_of(train_in(tmp_path / "eager", pristine_root, *flags)) == first
    shutil.rmtree(tmp_path)  # checkpoints of cnn4 are large


def test_a_gpu_predicts_what_the_cpu_does(pristine_root, tmp_path, capsys):
    run_dir = train_in(tmp_path / "run", pristine_root, "--device", "cuda", "--precision", "fp32")
    clip = next((pristine_root / "audio").glob("*.wav"))
    capsys.readouterr()
    answers = []
    for device in ("cpu", "cuda"):
        assert predict.main([str(run_dir), str(clip), "--device", device, "--format", "json", "--top", "2"]) == 0
        top = json.loads(capsys.readouterr().out)[0]["top"]
        answers.append({guess["class"]: guess["probability"] for guess in top})
    assert answers[0] == pytest.approx(answers[1], abs=1e-3)
