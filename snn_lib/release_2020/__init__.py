"""The interface of the authors' 2020 release; ``snn_lib`` itself has modules of the old names."""
