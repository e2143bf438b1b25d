"""A spiking network classifies time series: archive sets, or files of yours, in seconds.

    python time_series.py --train
    python time_series.py --test
    python time_series.py --train dataset=GunPoint name=gun_point   # any UCR or UEA set
    python time_series.py --train dataset=mine.npz name=mine        # np.savez("mine.npz", x=x, y=y)

The network and its first weights are in snn_lib/time_series.py, its settings and their defaults in
snn_lib/tasks/time_series.py: whoever has only installed the library runs the same network by
python -m snn_lib.time_series mine.npz, or as an estimator, snn_lib.classifier.SpikingClassifier.
"""

from snn_lib.tasks.time_series import TimeSeries
from snn_lib.time_series import build_model, initialise
from snn_lib.training import main

if __name__ == "__main__":
    main(__file__, build_model, TimeSeries(), initialise)
