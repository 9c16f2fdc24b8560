"""What the machine has and how it is used: device, precision, deterministic algorithms, memory, cores."""
import contextlib
import ctypes
import getpass
import logging
import os
import platform
import warnings

import psutil
import torch

from util.errors import UserError, reason


def choose_device(name: str) -> torch.device:
    """The device of --device. Raises UserError if the machine does not have it."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    if not available.get(name):
        raise UserError(f"--device {name}: torch finds none here; expected one of "
                        f"{', '.join(kind for kind, there in available.items() if there)}")
    return torch.device(name)


def check_usable(device: torch.device) -> None:
    """Raise UserError if torch finds a GPU here but cannot use it: it has no kernels for it, or others have all of it."""
    try:
        torch.ones(1, device=device)
    except RuntimeError as error:
        raise UserError(f"--device {device.type}: torch cannot use this one ({reason(error)}); take --device cpu") from error


def choose_precision(name: str, device: torch.device) -> str:
    """fp32 or bf16; auto is bf16 only where the hardware supports it itself (CUDA, AVX512-BF16, AMX)."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"


def make_deterministic() -> None:
    """Only algorithms that give the same bits every time, on the CPU and on CUDA; and fp32 is fp32."""
    multiply_in_fp32()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, and nothing here reads such memory
    torch.backends.cudnn.benchmark = False  # it picks kernels by timing them


def multiply_in_fp32() -> None:
    """Have GPUs multiply fp32 in full, and not as TF32, with 11 bits of 24: torch's choice for convolutions since Ampere."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False  # also where TORCH_ALLOW_TF32_CUBLAS_OVERRIDE is set, as in NVIDIA's containers


def keep_freed_memory() -> None:
    """Have glibc keep the blocks that tensors free for the next ones, instead of returning them to the system.

    Otherwise each step gets its activations as new pages: 15 000 (cnn8) to 87 000 (cnn4) page faults a step on the CPU.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    libc.mallopt(trim_threshold, 2 ** 31 - 1)
    for size in (2 ** 25, 2 ** 30):  # glibc before 2.35 refuses the second; its limit is the first
        libc.mallopt(mmap_threshold, size)


def name_user() -> None:
    """Give a user without a name one (docker --user, Kubernetes): torch's compiler, which is imported anyway, asks for it."""
    try:
        getpass.getuser()
    except (KeyError, OSError):  # before and since Python 3.13
        os.environ["LOGNAME"] = f"user-{os.getuid()}"


def compile_model(model: torch.nn.Module) -> torch.nn.Module:
    """torch.compile for as many threads as there are now.

    torch keeps compiled code on disk. The number of threads is in the code, but in the key only as an option (pytorch issue
    160812): without it, a run of two threads would find the code for one, a third slower and with other bits.
    """
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it remarks on CUDA where there is none
    warnings.filterwarnings("ignore", "TensorFloat32")  # torch's advice to take it
    # As in a new process: a network is compiled for at most 8 shapes of batches, and those of earlier trainings would count.
    torch._dynamo.reset()
    # not dynamic: else a short batch has the code for all batches replaced, and the bits would depend on what ran before
    return torch.compile(model, dynamic=False, options={"cpp.threads": torch.get_num_threads()})


def own_stream(device: torch.device):
    """A context in which all work for a GPU is queued on one stream, as a recording needs it: the default stream has none."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else contextlib.nullcontext()


class Recorder:
    """Calls a function of tensors; where `enabled`, records its kernels once (torch.cuda.CUDAGraph) and then replays them.

    Launching the hundreds of kernels of a small network's step takes longer than running them; a replay launches all at once.
    Only calls with the shapes of the first one are recorded and replayed: a short last batch runs as it is. What the function
    changes (weights, the optimizer's state, its learning rate) must be changed in place, and live on the device.
    """

    WARM_UP = 3  # calls before the recording: libraries choose kernels, the optimizer makes its state, torch.compile compiles

    def __init__(self, enabled: bool):
        self.enabled, self.calls, self.shapes, self.graph = enabled, 0, None, None

    def __call__(self, function, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """function(*tensors), a tuple of tensors."""
        if not self.enabled:
            return function(*tensors)
        shapes = [tensor.shape for tensor in tensors]
        self.shapes = self.shapes or shapes
        self.calls += shapes == self.shapes
        if shapes != self.shapes or self.calls <= self.WARM_UP:
            return function(*tensors)
        if not self.graph:
            graph, self.inputs = torch.cuda.CUDAGraph(), [tensor.clone() for tensor in tensors]
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                self.outputs = function(*self.inputs)  # runs nothing yet
            self.graph = graph
        for buffer, tensor in zip(self.inputs, tensors):
            buffer.copy_(tensor)
        self.graph.replay()
        return tuple(output.clone() for output in self.outputs)  # the next replay writes over them


def busy_note() -> str:
    """A line, with the remedy, if other programs keep cores busy that this one is about to use; else nothing."""
    cores, threads = os.cpu_count(), torch.get_num_threads()
    if threads == 1:
        return ""
    busy = cores * psutil.cpu_percent(interval=0.2) / 100  # over 0.2 s, while this program waits
    if busy + threads < cores + 0.5:
        return ""
    return (f"\nnote   other programs keep {busy:.1f} of {cores} cores busy; {threads} threads beside them can be several times "
            f"slower than fewer: stop, and put OMP_NUM_THREADS={max(1, cores - round(busy))} before the command")
