"""Optimisers under the name of the authors' 2020 release, for scripts written for it."""

from snn_lib.training.state import get_optimizer

__all__ = ["get_optimizer"]
