"""The worker's side of datasets: files into tables. Imports NumPy; the daemon never imports this."""
