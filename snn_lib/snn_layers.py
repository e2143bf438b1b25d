"""The layers of the authors' 2020 release, under their old name."""

from snn_lib.release_2020.snn_layers import *  # noqa: F403
