"""What a fleet does, for whoever looks: `sordino top`, `sordino web`, Prometheus, `sordino support-bundle`.

live        what a training process knows at this moment, and the small file in which it says so
publisher   keeps that file while a run goes on
births      who is online, heard from the broker by somebody who only listens
source      all of it for one moment: roster, run records, live files, births -> `View`
terminal    a View on a terminal
pages       a View as HTML
web         pages over HTTP
metrics     a View for Prometheus

Nothing here decides anything, or is asked by what trains: a viewer that fails leaves a run as it is.
"""
