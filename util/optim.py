"""How weights move: optimizers, the learning rate's schedule, and their moving average."""
import copy
import math

import torch

from util.cache import check_weights

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def learning_rates(flags: dict, epoch: int, steps: int) -> list[float] | None:
    """The learning rate of each of an epoch's steps, or None if it is constant.

    cosine: a straight rise to --lr over the first tenth of all steps (warm-up: Goyal et al., "Accurate, large minibatch
    SGD", 2017), then half a cosine down to 0 (Loshchilov & Hutter, "SGDR", ICLR 2017, without restarts).
    """
    if flags["schedule"] == "constant":
        return None
    total = flags["epochs"] * steps
    warm_up = max(1, total // 10)

    def rate(step: int) -> float:
        if step < warm_up:
            return flags["lr"] * (step + 1) / warm_up
        return flags["lr"] * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (total - warm_up)))
    return [rate((epoch - 1) * steps + step) for step in range(steps)]


class WeightAverage:
    """An exponential moving average of a network's weights and batch statistics, for validation and prediction.

    The averaged network stands in `model`. decay: how much of the average stays at each step (Polyak & Juditsky, 1992,
    with exponential weights; as in Tarvainen & Valpola, "Mean teachers", NeurIPS 2017); 1 - 1/n at the n-th step while that
    is less, so that the untrained weights are gone after the first (as in their code). The batch statistics are averaged
    like weights, as torch's AveragedModel does with use_buffers.
    """

    def __init__(self, source: torch.nn.Module, decay: float):
        self.source, self.decay, self.updates = source, decay, 0
        self.model = copy.deepcopy(source)

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        share = max(1 - self.decay, 1 / self.updates)  # of the new weights
        for averaged, value in zip(self.model.state_dict().values(), self.source.state_dict().values()):
            if averaged.is_floating_point():
                averaged.lerp_(value, share)
            else:
                averaged.copy_(value)


def load_state(optimizer: torch.optim.Optimizer, state) -> None:
    """Give an Adam the moments of a checkpoint's, for the same parameters; its settings stay its own.

    Raises ValueError with one line if they do not fit.
    """
    own = optimizer.state_dict()
    moments = state.get("state") if isinstance(state, dict) else None
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not isinstance(moments, dict) or list(moments) != own["param_groups"][0]["params"]:
        raise ValueError("the optimizer's state is of other parameters")
    for parameter, values in zip(parameters, moments.values()):
        check_weights(values)
        shapes = {name: value.shape for name, value in values.items()}
        if shapes != {"step": torch.Size(), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}:
            raise ValueError("the optimizer's state has other shapes than the network's weights")
        if values["step"] < 1:
            raise ValueError(f"the optimizer's state is of step {values['step'].item():g}")
    optimizer.load_state_dict({"state": moments, "param_groups": own["param_groups"]})
