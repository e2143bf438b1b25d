"""Schedulers under the name of the authors' 2020 release, for scripts written for it."""

from snn_lib.training.state import get_scheduler

__all__ = ["get_scheduler"]
