"""The utilities of the authors' 2020 release, under their old name."""

from snn_lib.release_2020.utilities import *  # noqa: F403
