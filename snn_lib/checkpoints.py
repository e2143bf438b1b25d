"""The command ``python -m snn_lib.checkpoints``; a run's files are in ``training.checkpoints``."""

from snn_lib.conversion import main

if __name__ == "__main__":
    main()
