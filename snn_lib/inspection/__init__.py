"""Looking into a network: recording, counting, measuring, drawing."""
