"""Three convolutional networks for mel-spectrograms: a batch (B, 1, mels, frames) in, logits (B, classes) out.

`python models.py` prints every layer with its input and output shape and its parameter count.
The shapes in the comments are those of an example of (1, 100 mels, 384 frames).
"""
import torch
import torch.nn.functional as F
from torch import nn


class CNN8(nn.Module):
    """Seven convolutions and one linear layer; strides instead of max pooling, a global average before the head.

    All strides, no pooling between: Springenberg et al., "Striving for Simplicity" (ICLR workshop 2015).
    """

    def __init__(self, num_classes: int = 50, input_shape: tuple[int, int, int] = (1, 100, 384)):
        super().__init__()
        self.stem = conv_bn_relu(input_shape[0], 32, stride=2)
        self.block1 = nn.Sequential(conv_bn_relu(32, 64, stride=2), conv_bn_relu(64, 64, stride=1))
        self.block2 = nn.Sequential(conv_bn_relu(64, 128, stride=2), conv_bn_relu(128, 128, stride=1))
        self.block3 = nn.Sequential(conv_bn_relu(128, 256, stride=2), conv_bn_relu(256, 256, stride=1))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(256, num_classes)
        init_he(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (B, num_classes) of spectrograms (B, 1, mels, frames); no softmax."""
        x = self.stem(x)  # (B, 1, 100, 384) -> (B, 32, 50, 192)
        x = self.block1(x)  # -> (B, 64, 25, 96)
        x = self.block2(x)  # -> (B, 128, 13, 48)
        x = self.block3(x)  # -> (B, 256, 7, 24)
        x = self.avgpool(x).flatten(1)  # -> (B, 256)
        return self.fc(x)  # -> (B, num_classes)


class CNN4(nn.Module):
    """Four convolutions, each with batch normalization, tanh and a 2x2 max pool, and two linear layers.

    Takes examples of input_shape only: the first linear layer's size follows from it.
    """

    def __init__(self, num_classes: int = 50, input_shape: tuple[int, int, int] = (1, 100, 384)):
        super().__init__()
        self.block1 = conv_bn_pool_tanh(input_shape[0], 64, kernel_size=9, stride=2, padding=0)
        self.block2 = conv_bn_pool_tanh(64, 128, kernel_size=3, stride=1, padding=1)
        self.block3 = conv_bn_pool_tanh(128, 256, kernel_size=3, stride=1, padding=1)
        self.block4 = conv_bn_pool_tanh(256, 512, kernel_size=3, stride=1, padding=1)
        # each block: a convolution (the first of 9x9, stride 2), then a pool that halves; 100 -> 2 mels, 384 -> 11 frames
        mels, frames = (((size - 9) // 2 + 1) // 16 for size in input_shape[1:])
        if min(mels, frames) < 1:
            raise ValueError(f"cnn4: an example of {input_shape} is too small; expected at least (1, 39, 39)")
        self.fc1 = nn.Linear(512 * mels * frames, 2048)
        self.tanh = nn.Tanh()
        self.fc2 = nn.Linear(2048, num_classes)
        init_glorot(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (B, num_classes) of spectrograms (B, 1, 100, 384); no softmax."""
        x = self.block1(x)  # (B, 1, 100, 384) -> (B, 64, 23, 94)
        x = self.block2(x)  # -> (B, 128, 11, 47)
        x = self.block3(x)  # -> (B, 256, 5, 23)
        x = self.block4(x)  # -> (B, 512, 2, 11)
        x = self.tanh(self.fc1(x.flatten(1)))  # -> (B, 11264) -> (B, 2048)
        return self.fc2(x)  # -> (B, num_classes)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut: He et al., "Deep Residual Learning" (CVPR 2016), figure 5 left."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = None  # the shortcut is the identity where the shape stays
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_channels, h, w) -> (B, out_channels, h / stride, w / stride), rounded up."""
        shortcut = x if self.downsample is None else self.downsample(x)  # -> (B, out_channels, h / stride, w / stride)
        x = self.relu(self.bn1(self.conv1(x)))  # -> (B, out_channels, h / stride, w / stride)
        x = self.bn2(self.conv2(x))
        return self.relu(x + shortcut)


class ResNet18(nn.Module):
    """The standard ResNet-18 (He et al., CVPR 2016) with a stem of one input channel.

    Names and shapes of the state dict are torchvision's, but for the stem's input channels and the head's
    classes, so that published ImageNet weights load (util/checkpoint.py, `load_pretrained`).
    """

    def __init__(self, num_classes: int = 50, input_shape: tuple[int, int, int] = (1, 100, 384)):
        super().__init__()
        self.conv1 = nn.Conv2d(input_shape[0], 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = nn.Sequential(BasicBlock(64, 64, stride=1), BasicBlock(64, 64, stride=1))
        self.layer2 = nn.Sequential(BasicBlock(64, 128, stride=2), BasicBlock(128, 128, stride=1))
        self.layer3 = nn.Sequential(BasicBlock(128, 256, stride=2), BasicBlock(256, 256, stride=1))
        self.layer4 = nn.Sequential(BasicBlock(256, 512, stride=2), BasicBlock(512, 512, stride=1))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512, num_classes)
        init_he(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (B, num_classes) of spectrograms (B, 1, mels, frames); no softmax."""
        x = self.relu(self.bn1(self.conv1(x)))  # (B, 1, 100, 384) -> (B, 64, 50, 192)
        x = self.maxpool(x)  # -> (B, 64, 25, 96)
        x = self.layer1(x)  # -> (B, 64, 25, 96)
        x = self.layer2(x)  # -> (B, 128, 13, 48)
        x = self.layer3(x)  # -> (B, 256, 7, 24)
        x = self.layer4(x)  # -> (B, 512, 4, 12)
        x = self.avgpool(x).flatten(1)  # -> (B, 512)
        return self.fc(x)  # -> (B, num_classes)


def conv_bn_relu(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """A 3x3 convolution (no bias: the normalization has one), BatchNorm and ReLU.

    (B, in_channels, h, w) -> (B, out_channels, h / stride, w / stride), rounded up.
    """
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True))


def conv_bn_pool_tanh(in_channels: int, out_channels: int, kernel_size: int, stride: int,
                      padding: int) -> nn.Sequential:
    """A convolution, BatchNorm, 2x2 max pool and tanh.

    (B, in_channels, h, w) -> (B, out_channels, ...): the convolution's height and width, halved by the pool and rounded
    down. The pool stands before the tanh: tanh rises, so the maximum is the same either way, for a quarter of the tanhs.
    """
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.MaxPool2d(2),
        nn.Tanh())


def init_he(model: nn.Module) -> None:
    """For ReLU networks: He et al., "Delving Deep into Rectifiers" (ICCV 2015), fan-out, as in torchvision's ResNet."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def init_glorot(model: nn.Module) -> None:
    """For tanh networks: Glorot & Bengio, "Understanding the difficulty of training" (AISTATS 2010), eq. 16."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(module.weight)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)


MODELS = {"cnn8": CNN8, "cnn4": CNN4, "resnet18": ResNet18}


def build_model(name: str, num_classes: int = 50, input_shape: tuple[int, int, int] = (1, 100, 384)) -> nn.Module:
    """The model of that name ("cnn8", "cnn4", "resnet18") with new weights from torch's global generator.

    input_shape: (1, mels, frames) of an example. Raises ValueError for another name, or an example too small for the model.
    """
    if name not in MODELS:
        raise ValueError(f"model {name!r}: expected one of {', '.join(MODELS)}")
    return MODELS[name](num_classes, input_shape)


def average_logits(model: nn.Module, examples: torch.Tensor, clips: int, precision: str) -> torch.Tensor:
    """Logits (clips, classes), float32, of examples (crops * clips, 1, 100, 384): the mean over each clip's crops.

    All clips' first crops come first, then all second ones. precision: with "bf16", convolutions and the like are in bfloat16.
    """
    examples = examples.contiguous(memory_format=torch.channels_last)
    with torch.autocast(examples.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        logits = model(examples).float()  # -> (crops * clips, classes)
    return logits if len(logits) == clips else logits.unflatten(0, (-1, clips)).mean(dim=0)  # -> (clips, classes)


def class_activation_maps(model: nn.Module, examples: torch.Tensor) -> torch.Tensor:
    """What each place of the examples (B, 1, 100, 384) adds to each logit: (B, num_classes, 7, 24) for cnn8.

    Exact: their mean over the places is the logits, bias included. A linear layer after an average is the average of the
    layer at every place (class activation maps: Zhou et al., CVPR 2016). Raises ValueError for a model that does not end so.
    """
    if not (hasattr(model, "avgpool") and hasattr(model, "fc")):
        raise ValueError(f"{type(model).__name__}: does not end with avgpool and fc, as cnn8 and resnet18 do")
    before_pool = []
    handle = model.avgpool.register_forward_pre_hook(lambda _, inputs: before_pool.append(inputs[0]))
    try:
        model(examples)
    finally:
        handle.remove()
    return F.conv2d(before_pool[0], model.fc.weight[:, :, None, None], model.fc.bias)  # (B, 256, 7, 24) -> (B, 50, 7, 24)


def describe(model: nn.Module, input_shape: tuple[int, int, int] = (1, 100, 384)) -> str:
    """A table of the model's layers: name, type, input and output shape, parameters. One forward pass on zeros."""
    rows = []

    def shapes(value) -> str:
        if isinstance(value, (tuple, list)):  # inputs always are, and what a GRU returns
            return ", ".join(map(shapes, value))
        return str(tuple(value.shape))

    def record(name):
        def hook(module, inputs, output):
            count = sum(p.numel() for p in module.parameters())
            rows.append((name, type(module).__name__, shapes(inputs), shapes(output), count))
        return hook

    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    handles = [module.register_forward_hook(record(name)) for name, module in leaves]
    was_training = model.training
    with torch.inference_mode():
        model.eval()(torch.zeros(1, *input_shape))
    model.train(was_training)
    for handle in handles:
        handle.remove()
    lines = [f"{'layer':<24}{'type':<20}{'input':<22}{'output':<22}{'parameters':>12}"]
    lines += [f"{name:<24}{kind:<20}{before:<22}{after:<22}{count:>12,}" for name, kind, before, after, count in rows]
    return "\n".join([*lines, f"{'total':<88}{sum(p.numel() for p in model.parameters()):>12,}"])


if __name__ == "__main__":
    from dsets import FeatureParams  # as training uses
    for model_name in MODELS:
        network = build_model(model_name, input_shape=FeatureParams().input_shape)
        print(f"{model_name}\n{describe(network, FeatureParams().input_shape)}\n")
