"""The networks, all that models.MODELS names: another network is tested by its entry there."""
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import models
from conftest import OTHER_PARAMS, Tiny
from dsets import FeatureParams
from util import config

PARAMETERS = {"cnn8": 1_176_210, "cnn4": 24_728_562, "resnet18": 11_195_890}
SHAPES = [FeatureParams().input_shape, OTHER_PARAMS.input_shape]


def examples(count: int, input_shape: tuple[int, int, int] = SHAPES[0]) -> torch.Tensor:
    return torch.randn(count, *input_shape, generator=torch.Generator().manual_seed(0))


def shape_at(model: torch.nn.Module, module: torch.nn.Module) -> tuple[int, ...]:
    """The shape of what goes into `module` for one example."""
    shapes = []
    module.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    model.eval()(examples(1))
    return shapes[0]


def test_the_parser_knows_every_model():
    assert config.MODELS == tuple(models.MODELS)


@pytest.mark.parametrize("name, parameters", PARAMETERS.items())
def test_networks_have_the_documented_number_of_parameters(name, parameters):
    assert sum(p.numel() for p in models.build_model(name).parameters()) == parameters


def test_shapes_before_the_head():
    cnn8, cnn4, resnet18 = map(models.build_model, PARAMETERS)
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


@pytest.mark.parametrize("name", ["cnn8", "resnet18"])
def test_the_smallest_crop_of_the_flags_trains_on_a_single_example(name):
    config.parse_args(["--crop-mels", "16", "--crop-frames", "33"])
    assert models.build_model(name, 7, (1, 16, 33))(examples(1, (1, 16, 33))).shape == (1, 7)  # batch statistics need two values


@pytest.mark.parametrize("input_shape", SHAPES)
@pytest.mark.parametrize("name", models.MODELS)
def test_logits_one_a_class_and_no_softmax(name, input_shape):
    logits = models.build_model(name, 7, input_shape).eval()(examples(2, input_shape))
    assert logits.shape == (2, 7) and logits.isfinite().all()
    for values in (logits, logits.exp()):  # no softmax, no log_softmax
        assert (values.sum(dim=1) - 1).abs().min() > 1e-3


@pytest.mark.parametrize("name", models.MODELS)
def test_batch_of_one_equals_batch_of_many(name):
    model = models.build_model(name).eval()
    batch = examples(3)
    with torch.inference_mode():
        alone = torch.cat([model(batch[i:i + 1]) for i in range(3)])
        torch.testing.assert_close(model(batch), alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("input_shape", SHAPES)
@pytest.mark.parametrize("name", models.MODELS)
def test_every_parameter_gets_a_gradient(name, input_shape):
    model = models.build_model(name, 50, input_shape)
    F.cross_entropy(model(examples(4, input_shape)), torch.tensor([0, 1, 2, 3])).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, parameter_name


@pytest.mark.parametrize("input_shape", SHAPES)
@pytest.mark.parametrize("name", models.MODELS)
def test_every_layer_is_called_and_listed(name, input_shape):
    model = models.build_model(name, 50, input_shape)
    leaves = {leaf_name for leaf_name, module in model.named_modules() if not list(module.children())}
    listed = {line.split()[0] for line in models.describe(model, input_shape).splitlines()[1:-1]}
    assert listed == leaves and model.training


def test_layers_that_return_several_tensors_are_listed_with_all_their_shapes():
    class Recurrent(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = torch.nn.GRU(100, 16, batch_first=True)
            self.fc = torch.nn.Linear(16, 3)

        def forward(self, x):
            return self.fc(self.gru(x[:, 0].transpose(1, 2))[1][0])  # (B, 1, 100, 384) -> (B, 384, 100) -> (B, 3)

    gru, fc, total = models.describe(Recurrent()).splitlines()[1:]
    assert "(1, 384, 100)" in gru and "(1, 384, 16)" in gru and "(1, 1, 16)" in gru and gru.split()[-1] == "5,664"
    assert fc.split()[0] == "fc" and total.split() == ["total", "5,715"]


def test_pool_before_tanh_is_tanh_before_pool():
    block = models.conv_bn_pool_tanh(1, 4, kernel_size=3, stride=1, padding=1)
    convolution, norm, _, _ = block
    x = examples(2)
    assert torch.equal(block(x), F.max_pool2d(torch.tanh(norm(convolution(x))), 2))


def test_a_residual_block_adds_its_shortcut_before_the_last_relu():
    block = models.BasicBlock(2, 2, stride=1).eval()
    torch.nn.init.zeros_(block.conv2.weight)
    x = torch.randn(1, 2, 4, 4)
    assert torch.equal(block(x), torch.relu(x))


def test_bf16_multiplies_in_bfloat16_and_gives_float32():
    model, seen = Tiny(4), []
    model.conv.register_forward_hook(lambda *call: seen.append(call[-1].dtype))
    logits = [models.average_logits(model, examples(2), 2, precision) for precision in ("fp32", "bf16")]
    assert seen == [torch.float32, torch.bfloat16] and {each.dtype for each in logits} == {torch.float32}


def test_weights_start_as_the_papers_say():
    torch.manual_seed(0)
    conv = models.build_model("cnn8").block3[0][0]  # 3x3, 128 to 256: He et al., deviation sqrt(2 / fan out)
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
    published = models.ResNet18(1000, (3, 100, 384))
    assert sum(p.numel() for p in published.parameters()) == 11_689_512  # torchvision's documentation


def test_unknown_model_refused():
    with pytest.raises(ValueError, match="vgg.*cnn8"):
        models.build_model("vgg")


def test_examples_too_small_for_the_network_refused():
    with pytest.raises(ValueError, match="cnn4"):
        models.build_model("cnn4", input_shape=(1, 38, 384))
    assert models.build_model("cnn4", 3, (1, 39, 39))(examples(2, (1, 39, 39))).shape == (2, 3)


@pytest.mark.parametrize("input_shape", SHAPES)
@pytest.mark.parametrize("name", ["cnn8", "resnet18"])
def test_the_mean_of_class_activation_maps_is_the_logits(name, input_shape):
    model = models.build_model(name, 7, input_shape).eval()
    torch.nn.init.normal_(model.fc.bias)
    batch = examples(3, input_shape)
    with torch.inference_mode():
        maps = models.class_activation_maps(model, batch)
        torch.testing.assert_close(maps.mean(dim=(2, 3)), model(batch), atol=1e-4, rtol=1e-4)
    stride = {"cnn8": 16, "resnet18": 32}[name]
    assert maps.shape == (3, 7, *(math.ceil(size / stride) for size in input_shape[1:]))
    assert not model.avgpool._forward_pre_hooks


def test_class_activation_maps_worked_by_hand():
    class Head(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.avgpool, self.fc = torch.nn.AdaptiveAvgPool2d(1), torch.nn.Linear(2, 2)

        def forward(self, x):
            return self.fc(self.avgpool(x).flatten(1))

    head = Head()
    head.load_state_dict({"fc.weight": torch.tensor([[1.0, 0.0], [2.0, -1.0]]), "fc.bias": torch.tensor([0.5, 0.0])})
    example = torch.tensor([[[[1.0, 3.0]], [[0.0, 4.0]]]])  # two channels of one row: at the left (1, 0), at the right (3, 4)
    assert models.class_activation_maps(head, example).tolist() == [[[[1.5, 3.5]], [[2.0, 2.0]]]]
    assert head(example).tolist() == [[2.5, 2.0]]


def test_class_activation_maps_need_an_average_before_the_head():
    for model in (models.build_model("cnn4"), Tiny()):
        with pytest.raises(ValueError, match="avgpool"):
            models.class_activation_maps(model, examples(1))


@pytest.mark.slow
def test_the_command_prints_layers_shapes_and_counts():
    done = subprocess.run([sys.executable, models.__file__], capture_output=True, text=True, check=True)
    assert "(1, 256, 5, 23)       (1, 512, 5, 23)          1,179,648" in done.stdout
    for total in PARAMETERS.values():
        assert f"{total:,}" in done.stdout
