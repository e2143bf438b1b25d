"""An experiment runs without what Linux has, but Windows or macOS has not.

What PyTorch for Linux needs itself is taken away once it is imported. SIGTERM stays, since Python
has it on every system.
"""

import re
import sys

from running import ROOT, shell, the_run, tiny

WITHOUT = """
import ctypes, multiprocessing, os, runpy, signal, sys
import torch

for name in ("fcntl", "grp", "pwd", "resource", "termios"):  # modules
    sys.modules[name] = None
for name in ("fork", "getuid", "register_at_fork", "sched_getaffinity", "sysconf", "sysconf_names"):
    delattr(os, name)
for name in ("SIGHUP", "SIGKILL", "SIGUSR1"):
    delattr(signal, name)
multiprocessing.get_all_start_methods = lambda: ["spawn"]

class Library(ctypes.CDLL):  # no glibc with its allocator, and no OpenMP library like GNU's
    def __getattr__(self, name):
        if name == "mallopt" or name.startswith("GOMP_"):
            raise AttributeError(name)
        return super().__getattr__(name)

ctypes.CDLL = Library
torch.set_num_threads(2)  # a single one would need no threads of anybody's
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_an_experiment_trains_and_tests(tmp_path):
    few = "mnist_config.training_size=128", "hyperparameters.epoch=1"
    arguments = "--train", *tiny(tmp_path, *few)
    finished = shell(sys.executable, "-c", WITHOUT, ROOT / "snn_mlp_1.py", *arguments)
    assert finished.code == 0, finished.err
    assert "kernels cpu (llvmlite)" in finished.out
    assert re.search(r"test loss [\d.]+, accuracy", finished.out)
    assert (the_run(tmp_path) / "best").exists()
