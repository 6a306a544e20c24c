"""The simulator: the agents' and the server's own code, many in one process, and the world around them.

scenario.py, profiles.py, network.py, partition.py   boards, links and rows of a job's `simulation` section
harness.py, wires.py, keys.py, mortal.py             a fleet in this process, over memory or a real broker
faults.py, director.py                               what goes wrong, and making it happen
fleet_dir.py, processes.py, broker.py                a fleet on disk, real agents, a mosquitto of our own
runner.py, cli.py                                    from a job to its summary; `sordino-sim`
"""
