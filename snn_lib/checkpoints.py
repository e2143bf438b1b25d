"""The command ``python -m snn_lib.checkpoints``, which reads checkpoints of the 2020 release."""

from snn_lib.release_2020.conversion import main

if __name__ == "__main__":
    main()
