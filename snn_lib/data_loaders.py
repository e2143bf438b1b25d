"""The data loaders of the authors' 2020 release, under their old name."""

from snn_lib.release_2020.data_loaders import *  # noqa: F403
