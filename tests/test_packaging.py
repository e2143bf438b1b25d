"""The wheel: built, installed into a fresh environment, imported from another folder."""

import shutil
import subprocess
import sys
import sysconfig
import venv

from running import ROOT

import snn_lib

CODE = """
import torch, snn_lib
from snn_lib.snn_layers import *
from snn_lib import data_loaders, optimizers, schedulers, training, tasks, utilities
layer = snn_lib.SpikingNeuron(3, tau_m=4)
assert layer(2 * torch.ones(5, 2, 3))[0].shape == (5, 2, 3)
print(snn_lib.__version__, snn_lib.__file__)
"""


def command(*arguments, **options):
    done = subprocess.run(
        list(map(str, arguments)), capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_wheel_installs_and_imports_anywhere(tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    source = tmp_path / "source"  # a build leaves files behind
    shutil.copytree(ROOT / "snn_lib", source / "snn_lib")
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = ["wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path / "wheels", source]
    command(*pip, *build)
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    home = tmp_path / "environment"
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    command(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel)
    # Its dependencies are those of the environment that runs the tests.
    site = command(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    with open(f"{site}/dependencies.pth", "w") as file:
        file.write(sysconfig.get_path("purelib") + "\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    version, path = command(python, "-c", CODE, cwd=elsewhere).split()
    assert version == snn_lib.__version__
    assert path.startswith(site)
