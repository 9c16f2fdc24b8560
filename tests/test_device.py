"""The machine: device, precision, deterministic algorithms, memory, compiled code, busy cores."""
import getpass
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import psutil
import pytest
import torch

from conftest import CPU, PROJECT, run
from util import device
from util.errors import UserError

CUDA, MPS = torch.device("cuda"), torch.device("mps")


def pretend(monkeypatch, *, cuda: bool = False, mps: bool = False, cores: int = 8, busy: float = 0.0, threads: int = 8) -> None:
    """Another machine."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: 100 * busy / cores)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)


@pytest.mark.parametrize("there, expected", [
    ({}, CPU), ({"cuda": True}, CUDA), ({"mps": True}, MPS), ({"cuda": True, "mps": True}, CUDA)])
def test_auto_takes_a_gpu_where_there_is_one(monkeypatch, there, expected):
    pretend(monkeypatch, **there)
    assert device.choose_device("auto") == expected and device.choose_device("cpu") == CPU
    for name in there:
        assert device.choose_device(name) == torch.device(name)


@pytest.mark.parametrize("name, there", [("cuda", {}), ("mps", {"cuda": True})])
def test_an_absent_device_is_refused_with_those_that_are_there(monkeypatch, name, there):
    pretend(monkeypatch, **there)
    with pytest.raises(UserError, match=f"^--device {name}: ") as refusal:
        device.choose_device(name)
    message = str(refusal.value).removeprefix(f"--device {name}")
    assert "\n" not in message and all(kind in message for kind in ("cpu", *there)) and name not in message


def test_a_gpu_that_torch_cannot_use_is_refused_with_the_remedy(monkeypatch):
    def without_kernels(*_, device):
        raise torch.AcceleratorError("CUDA error: no kernel image is available\nSearch for it")
    device.check_usable(CPU)
    monkeypatch.setattr(torch, "ones", without_kernels)
    with pytest.raises(UserError, match="^--device cuda: .*no kernel image is available.*--device cpu$"):
        device.check_usable(CUDA)


def test_training_refuses_an_absent_device(monkeypatch, capsys):
    pretend(monkeypatch)
    run("--device", "cuda", status=2)
    error = capsys.readouterr().err
    assert "--device cuda" in error and error.count("\n") == 1


@pytest.mark.parametrize("capabilities, expected", [
    ({}, "fp32"), ({"avx512_f": True}, "fp32"), ({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16")])
def test_auto_takes_bf16_where_a_cpu_supports_it(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert device.choose_precision("auto", CPU) == expected
    assert [device.choose_precision(name, CPU) for name in ("fp32", "bf16")] == ["fp32", "bf16"]
    assert device.choose_precision("auto", MPS) == "fp32"


@pytest.mark.parametrize("supported", [True, False])
def test_auto_takes_bf16_where_a_gpu_supports_it(monkeypatch, supported):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or supported)
    assert device.choose_precision("auto", CUDA) == ("bf16" if supported else "fp32")


SETTINGS = """
import torch
from util import device
device.make_deterministic()
print(torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32,
      torch.backends.cuda.matmul.allow_tf32)
"""

PAGE_FAULTS = """
import resource, torch
from util import device
device.keep_freed_memory()
for step in range(12):
    activations = [torch.zeros(2 ** 24) for _ in range(4)]
    del activations
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


def output_of(code: str, **environment: str) -> str:
    """What a process of its own prints: these settings are for its whole life."""
    return subprocess.run([sys.executable, "-c", code], cwd=PROJECT, stdout=subprocess.PIPE, text=True,
                          check=True, env=os.environ | environment).stdout


def test_algorithms_are_deterministic_and_fp32_is_fp32():
    for override in "01":
        assert output_of(SETTINGS, TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=override).split() == ["True", "False", "False", "False"]


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_used_again():
    faults = list(map(int, output_of(PAGE_FAULTS).split()))
    # a step's 256 MB are 65 536 pages, were they new in each; glibc needs some steps to find a place for all four
    assert faults[11] - faults[5] < 3 * 65_536


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """torch's compiler, with a cache of the test's own."""
    if not shutil.which("g++") or not Path(sysconfig.get_path("include"), "Python.h").exists():
        pytest.skip("torch.compile wants a C++ compiler and Python's headers")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("torch._inductor.cpu_vec_isa.valid_vec_isa_list", lambda: [])  # to probe them takes half a minute


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own use of it
def test_compiled_code_is_not_that_of_another_number_of_threads(compiler):
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        torch._dynamo.utils.counters.clear()
        assert device.compile_model(torch.nn.ReLU())(torch.ones(1000))[0] == 1
        counted = torch._dynamo.utils.counters
        found.append(bool(counted["inductor"]["fxgraph_cache_hit"] or counted["aot_autograd"]["autograd_cache_hit"]))
    torch.set_num_threads(before)
    assert found == [False, False, True]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own use of it
def test_the_shapes_of_earlier_trainings_do_not_count(compiler):
    """Else those beyond the eighth would not be compiled, and have other bits."""
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        for size in (2, 3):
            assert device.compile_model(torch.nn.ReLU())(torch.ones(size)).sum() == size


@pytest.mark.parametrize("machine, remedy", [
    ({"busy": 0.0}, None), ({"busy": 0.3}, None),  # nobody else
    ({"busy": 4.0}, "OMP_NUM_THREADS=4"), ({"busy": 7.0}, "OMP_NUM_THREADS=1"), ({"busy": 20.0}, "OMP_NUM_THREADS=1"),
    ({"busy": 4.0, "threads": 4}, None), ({"busy": 20.0, "threads": 1}, None),  # as it advises
])
def test_busy_cores_are_noted_with_the_remedy(monkeypatch, machine, remedy):
    pretend(monkeypatch, **machine)
    note = device.busy_note()
    assert remedy in note and note.strip().count("\n") == 0 if remedy else note == ""


def test_a_user_without_a_name_gets_one(monkeypatch):
    pwd = pytest.importorskip("pwd")  # not on Windows

    def nobody(number):
        raise KeyError(f"getpwuid(): uid not found: {number}")
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    device.name_user()
    assert getpass.getuser() == f"user-{os.getuid()}"
