import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import models

NAMES = ["cnn8", "cnn4", "resnet18"]


def examples(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 1, 100, 384, generator=torch.Generator().manual_seed(seed))


def shape_at(model: torch.nn.Module, module: torch.nn.Module) -> tuple[int, ...]:
    """The shape of what goes into `module` for one example."""
    shapes = []
    module.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    model.eval()(examples(1))
    return shapes[0]


@pytest.mark.parametrize("name, parameters", [("cnn8", 1_176_210), ("cnn4", 24_728_562), ("resnet18", 11_195_890)])
def test_parameter_counts(name, parameters):
    assert sum(p.numel() for p in models.build_model(name).parameters()) == parameters


def test_shapes_before_the_head():
    cnn8, cnn4, resnet18 = map(models.build_model, NAMES)
    assert shape_at(cnn8, cnn8.fc) == (1, 256)
    assert shape_at(cnn4, cnn4.fc1) == (1, 512 * 2 * 11)
    last = cnn4.block4[-1]
    shapes = []
    last.register_forward_hook(lambda _, __, output: shapes.append(tuple(output.shape)))
    cnn4(examples(1))
    assert shapes == [(1, 512, 2, 11)]
    assert shape_at(resnet18, resnet18.fc) == (1, 512)


def test_cnn8_is_seven_convolutions_and_one_linear_layer_without_max_pool():
    kinds = [type(module).__name__ for module in models.build_model("cnn8").modules()]
    assert kinds.count("Conv2d") == 7 and kinds.count("Linear") == 1 and "MaxPool2d" not in kinds


@pytest.mark.parametrize("name", NAMES)
def test_logits_one_a_class_and_no_softmax(name):
    logits = models.build_model(name, num_classes=7).eval()(examples(2))
    assert logits.shape == (2, 7)
    assert logits.min() < 0  # a softmax gives none


@pytest.mark.parametrize("name", NAMES)
def test_batch_of_one_equals_batch_of_many(name):
    model = models.build_model(name).eval()
    batch = examples(3)
    with torch.inference_mode():
        alone = torch.cat([model(batch[i:i + 1]) for i in range(3)])
        torch.testing.assert_close(model(batch), alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_gets_a_gradient(name):
    model = models.build_model(name)
    F.cross_entropy(model(examples(4)), torch.tensor([0, 1, 2, 3])).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, parameter_name


@pytest.mark.parametrize("name", NAMES)
def test_every_layer_is_called(name):
    model = models.build_model(name)
    leaves = {leaf_name for leaf_name, module in model.named_modules() if not list(module.children())}
    listed = {line.split()[0] for line in models.describe(model).splitlines()[1:-1]}
    assert listed == leaves


def test_pool_before_tanh_is_tanh_before_pool():
    x = examples(2) * 3
    assert torch.equal(torch.tanh(F.max_pool2d(x, 2)), F.max_pool2d(torch.tanh(x), 2))


def test_weights_start_as_the_papers_say():
    torch.manual_seed(0)
    conv = models.build_model("cnn8").block3[1][0]  # 3x3, 256 to 256: He et al., deviation sqrt(2 / fan out)
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (256 * 9)), rel=0.02)
    fc1 = models.build_model("cnn4").fc1  # Glorot & Bengio: uniform within sqrt(6 / (fan in + fan out))
    bound = math.sqrt(6 / (11264 + 2048))
    assert 0.999 < fc1.weight.abs().max().item() / bound < 1.000001
    assert fc1.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not fc1.bias.any()


def torchvision_resnet18_shapes(in_channels: int, num_classes: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of torchvision's resnet18 state dict, written out from its naming scheme."""
    def norm(name, channels):
        return {f"{name}.weight": (channels,), f"{name}.bias": (channels,), f"{name}.running_mean": (channels,),
                f"{name}.running_var": (channels,), f"{name}.num_batches_tracked": ()}

    shapes = {"conv1.weight": (64, in_channels, 7, 7), **norm("bn1", 64)}
    before = 64
    for layer, channels in enumerate([64, 128, 256, 512], start=1):
        for block in range(2):
            prefix = f"layer{layer}.{block}"
            shapes |= {f"{prefix}.conv1.weight": (channels, before, 3, 3), **norm(f"{prefix}.bn1", channels),
                       f"{prefix}.conv2.weight": (channels, channels, 3, 3), **norm(f"{prefix}.bn2", channels)}
            if layer > 1 and block == 0:
                shapes |= {f"{prefix}.downsample.0.weight": (channels, before, 1, 1),
                           **norm(f"{prefix}.downsample.1", channels)}
            before = channels
    return shapes | {"fc.weight": (num_classes, 512), "fc.bias": (num_classes,)}


def test_resnet18_has_torchvisions_names_and_shapes():
    model = models.build_model("resnet18")
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} \
        == torchvision_resnet18_shapes(1, 50)
    published = models.ResNet18(num_classes=1000, in_channels=3)
    assert sum(p.numel() for p in published.parameters()) == 11_689_512  # torchvision's documentation


def imagenet_like_state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    state = {name: torch.rand(shape, generator=generator) + 0.1 if "running_var" in name
             else torch.randn(shape, generator=generator) * 0.05
             for name, shape in torchvision_resnet18_shapes(3, 1000).items()}
    return {name: torch.tensor(7) if name.endswith("tracked") else tensor for name, tensor in state.items()}


def test_pretrained_weights_give_what_three_equal_channels_give(tmp_path):
    torch.save(imagenet_like_state(), tmp_path / "weights.pth")
    model = models.build_model("resnet18")
    head = model.fc.weight.clone()
    models.load_pretrained(model, str(tmp_path / "weights.pth"))
    assert torch.equal(model.fc.weight, head)
    published = models.ResNet18(num_classes=1000, in_channels=3)
    published.load_state_dict(imagenet_like_state())
    model.fc = published.fc
    grey = examples(2)
    with torch.inference_mode():
        torch.testing.assert_close(model.conv1(grey), published.conv1(grey.expand(2, 3, 100, 384)), atol=1e-5, rtol=1e-5)
        expected = published.eval()(grey.expand(2, 3, 100, 384))
        torch.testing.assert_close(model.eval()(grey), expected, atol=1e-4, rtol=1e-4)


def test_pretrained_imagenet_comes_through_torch_hub(tmp_path, monkeypatch):
    import hashlib
    torch.save(imagenet_like_state(), tmp_path / "weights.pth")
    digest = hashlib.sha256((tmp_path / "weights.pth").read_bytes()).hexdigest()[:8]
    published = tmp_path / f"resnet18-{digest}.pth"
    (tmp_path / "weights.pth").rename(published)
    monkeypatch.setattr(models, "IMAGENET_URL", published.as_uri())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    model = models.build_model("resnet18")
    models.load_pretrained(model, "imagenet")
    assert torch.equal(model.bn1.weight, imagenet_like_state()["bn1.weight"])
    for name, words in (("resnet18-11111111.pth", "cannot be fetched from .*; check the connection"),
                        ("resnet18-00000000.pth", "cannot be read as a file of tensors .invalid hash value")):
        if name == "resnet18-00000000.pth":
            published.rename(tmp_path / name)  # its digest is another
        monkeypatch.setattr(models, "IMAGENET_URL", (tmp_path / name).as_uri())
        with pytest.raises(ValueError, match=f"^--pretrained imagenet: {words}"):
            models.load_pretrained(model, "imagenet")


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def broken(state: dict, change: str) -> object:
    if change == "missing":
        del state["layer1.0.conv1.weight"]
    elif change == "extra":
        state["layer9.weight"] = torch.zeros(1)
    elif change == "shape":
        state["layer1.0.conv1.weight"] = torch.zeros(64, 64, 5, 5)
    elif change == "list":
        return list(state.values())
    elif change == "code":
        return {"conv1.weight": Malicious()}
    return state


@pytest.mark.parametrize("change, words", [
    ("missing", "has no layer1.0.conv1.weight; expected torchvision's resnet18 state dict"),
    ("extra", "holds layer9.weight, which resnet18 does not have"),
    ("shape", r"layer1.0.conv1.weight has shape \(64, 64, 5, 5\), expected \(64, 64, 3, 3\)"),
    ("list", "expected a state dict"),
    ("code", "cannot be read as a file of tensors"),
])
def test_pretrained_files_refused(tmp_path, monkeypatch, change, words):
    monkeypatch.chdir(tmp_path)
    torch.save(broken(imagenet_like_state(), change), "weights.pth")
    model = models.build_model("resnet18")
    before = model.conv1.weight.clone()
    with pytest.raises(ValueError, match=words) as refusal:
        models.load_pretrained(model, "weights.pth")
    assert "\n" not in str(refusal.value)
    assert torch.equal(model.conv1.weight, before)
    assert not Path("executed").exists()


@pytest.mark.parametrize("content", [None, b"", b"not a checkpoint"])
def test_pretrained_garbage_refused(tmp_path, content):
    path = tmp_path / "weights.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="weights.pth: cannot be read as a file of tensors"):
        models.load_pretrained(models.build_model("resnet18"), str(path))


def test_unknown_model_refused():
    with pytest.raises(ValueError, match="model 'vgg': expected one of cnn8, cnn4, resnet18"):
        models.build_model("vgg")


def test_the_command_prints_layers_shapes_and_counts():
    done = subprocess.run([sys.executable, models.__file__], capture_output=True, text=True, check=True)
    assert "(1, 256, 5, 23)       (1, 512, 5, 23)          1,179,648" in done.stdout
    for total in ("1,176,210", "24,728,562", "11,195,890"):
        assert total in done.stdout
