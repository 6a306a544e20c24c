"""SPDZ on secret shares, without I/O: Plan -> circuit (`lowering`), preprocessing (`dealing`), party (`party`), MAC
check (`check`)."""
