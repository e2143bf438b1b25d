"""The interface of the authors' 2020 release, which has its old names in ``snn_lib`` itself."""
